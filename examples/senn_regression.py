"""Self-expanding networks: units where the error is, layers when the score asks for them.

    python examples/senn_regression.py [--steps 300] [--figure senn.png]

Regression: one hidden layer of one unit learns a function of one variable from 50 samples by
natural gradient descent (conjugate gradients, learning rate 0.1, damping 0.1); every 30 steps units
are added as long as one makes the natural expansion score more than τ = 2 times as large. The
landscape is the best relative increase that a rational unit with its centre and scale could bring.
Half-moons: a linear classifier of 200 points with noise 0.3 gets layers of two units when the score
asks for one, every 30 steps, at most one in 90; a layer counts as two units. α is 0.0025 of the
squared gradient at the outputs; candidates are drawn by MALA. Both take half a minute on one core.

The paper is Mitchell, Mundt and Kersting (2023), Self-Expanding Neural Networks, figures 2 and 3.
Its target function is a random network too, but not this one.
"""

import argparse
import dataclasses
import time

import torch
import torch.nn.functional as F
from torch import nn

import graphgrow as gg
from graphgrow.measure.sample import reading, sample
from graphgrow.nn import Rational
from graphgrow.scores.kronecker import Block

LOOK, PAUSE = 30, 90  # steps between two looks at the score, and between two layers
CHAINS, MOVES = 64, 60  # candidates, and steps of MALA
DAMPING = 1e-3  # of each Kronecker factor, times the mean of its diagonal


def squares(output, target):
    return (output - target).square().sum(1).mean() / 2


def target_function(x):
    """Return a smooth function of one variable: a random network with four hidden layers."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        weight = torch.randn(16, x.shape[1], generator=generator).double()
        bias = torch.randn(16, generator=generator).double() / 2
        x = torch.tanh(2.2 * x @ weight.T / x.shape[1] ** 0.5 + bias)
    return x @ torch.randn(16, 1, generator=generator).double() / 4


def moons(count, noise, generator):
    """Return points of two interleaved half circles, and which of the two."""
    angle = torch.linspace(0, torch.pi, count // 2).double()
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
    points = torch.cat([upper, lower])
    points = points + noise * torch.randn(points.shape, generator=generator).double()
    return points, torch.arange(2).repeat_interleave(count // 2)


def normal(module, generator):
    """Draw the numbers of a module, weights with a variance of one over their fan-in."""
    with torch.no_grad():
        for parameter in module.parameters():
            fan = parameter.shape[1] if parameter.dim() == 2 else 1
            parameter.normal_(0, fan**-0.5, generator=generator)


def kept(graph):
    """Return a graph with tensors of its own: those of a grower's are trained further."""
    state = {path: tensor.detach().clone() for path, tensor in graph.state.items()}
    return dataclasses.replace(graph, state=state)


def trained(grower, data, loss, steps):
    """Take natural gradient steps and yield the number of each after it."""
    for step in range(1, steps + 1):

        def closure():
            outputs = grower.model(data[0])
            return loss(outputs, data[1]), outputs

        value = grower.optimizer.step(closure)
        yield step, value.item()


# ------------------------------------------------------------------------------ units


def landscape(graph, data, centres, scales):
    """Return Δη′/η of the best rational unit with each centre and scale: `(scales, centres)`.

    With both given the unit is linear in its three other parameters, so that the best one's score
    is that of the three functions z, 1/(1 + z²) and z/(1 + z²) together.
    """
    (use,) = reading(graph, graph.axis("0").name)
    seen = sample(graph, data, squares, [use])
    read = seen.readers[use.weight]
    block = Block.of(read.inputs, read.metric, read.cross, DAMPING)
    ((present, gradient),) = seen.pieces(use, read.gradients[use].movedim(2, 0))
    present, gradient = present.flatten(2), gradient.movedim(0, 2).flatten(2)
    left = block.whiten(gradient - block.update().mT @ present)[:, None]
    z = (data[0][:, 0] - centres[None, :, None]) / scales[:, None, None]
    basis = torch.stack([z, 1 / (1 + z * z), z / (1 + z * z)], 2).flatten(0, 1)[None]
    own, cross, among = (basis @ t.mT / len(z[0, 0]) for t in (basis, left, present[:, None]))
    return (block.increase(own, cross, among) / block.score()).reshape(len(scales), len(centres))


def error_near(model, data, centre, scale):
    """Return the mean squared error around a unit, over that of all samples."""
    with torch.no_grad():
        squared = (model(data[0]) - data[1]).square()[:, 0]
    weight = 1 / (1 + ((data[0][:, 0] - centre) / scale).square())
    return ((weight * squared).sum() / weight.sum() / squared.mean()).item()


def regression(steps, seed):
    """Grow one hidden layer and return what was seen."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, 1, generator=generator).double()
    data = x, target_function(x)
    model = nn.Sequential(nn.Linear(1, 1), Rational(1), nn.Linear(1, 1)).double()
    normal(model, generator)
    search = gg.scores.Mala(steps=MOVES, best=True)
    score = gg.scores.Senn(candidates=CHAINS, search=search, damping=DAMPING)
    optimizer = gg.NaturalGradient(model.parameters(), 0.1, 0.1)
    grower = gg.Grower(model, x[:2], loss=squares, optimizer=optimizer, score=score)
    run = {"data": data, "losses": [], "units": [], "grower": grower}
    for step, loss in trained(grower, data, squares, steps):
        run["losses"].append(loss)
        while step % LOOK == 0 and step < steps:
            before = kept(grower.graph)
            event = grower.step([data])
            if event is None:
                break
            weight, bias = (grower.graph.state[f"0.{n}"][-1].item() for n in ("weight", "bias"))
            centre, scale = -bias / weight, 1 / abs(weight)
            near = error_near(gg.lower(before), data, centre, scale)
            unit = {"step": step, "centre": centre, "scale": scale, "near": near, "event": event}
            run["units"].append(unit | {"before": before, "after": kept(grower.graph)})
    return run


# ------------------------------------------------------------------------------ layers


def half_moons(steps, seed):
    """Start with a linear classifier, add layers, and return what was seen."""
    data = moons(200, 0.3, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 2)).double()
    normal(model, generator)
    search = gg.scores.Mala(steps=MOVES)
    score = gg.scores.Senn(0, layers=True, candidates=CHAINS, search=search, damping=DAMPING)
    optimizer = gg.NaturalGradient(model.parameters(), 0.1, 0.1)
    grower = gg.Grower(
        model, data[0][:2], loss=F.cross_entropy, optimizer=optimizer, score=score,
        where=gg.Where(per=None),
    )  # fmt: skip
    run = {"data": data, "scores": [], "layers": [], "models": [], "losses": []}
    last = -PAUSE
    for step, loss in trained(grower, data, F.cross_entropy, steps):
        run["losses"].append(loss)
        if step % (LOOK // 3) == 0:
            found = score.findings(grower.graph, [data], F.cross_entropy)
            run["scores"].append((step, max(f.ratio for f in found)))
        if step % LOOK == 0 and step - last >= PAUSE and step < steps:
            graph = kept(grower.graph)
            if grower.step([data]) is not None:
                last = step
                run["models"].append(gg.lower(graph))
                run["layers"].append((step, grower.record[-1]["growths"][0]))
    run["models"].append(grower.model)
    run["accuracies"] = [accuracy(model, data) for model in run["models"]]
    return run


def accuracy(model, data):
    with torch.no_grad():
        return (model(data[0]).argmax(1) == data[1]).double().mean().item()


# ------------------------------------------------------------------------------ report


def save_figure(fit, layers, path):
    """Draw figure 2 (fits over landscapes) and figure 3 (score by step, decision boundaries)."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print(f"cannot draw '{path}': matplotlib is not installed")
        return
    figure, panels = plt.subplots(3, 4, figsize=(17, 11))
    draw_units(panels, fit)
    draw_layers(panels[2], layers)
    figure.tight_layout()
    figure.savefig(path)


def draw_units(panels, fit):
    """Draw the network before and after its fourth unit, before the fifth, and at the end."""
    units, end = fit["units"], fit["grower"].graph
    fourth, fifth = (units[min(k, len(units) - 1)] for k in (2, 3))
    frames = [
        ("before the fourth unit", fourth["before"], fourth),
        ("after it", fourth["after"], fourth),
        ("before the fifth", fifth["before"], fifth),
        ("at the end", end, None),
    ]
    grid = torch.linspace(-2.8, 2.8, 300).double()
    centres, scales = torch.linspace(-2.8, 2.8, 90).double(), torch.logspace(-1, 1, 60).double()
    for column, (title, graph, unit) in enumerate(frames):
        top, below = panels[0, column], panels[1, column]
        with torch.no_grad():
            top.plot(grid, gg.lower(graph)(grid[:, None])[:, 0], "black")
        top.plot(grid, target_function(grid[:, None])[:, 0], "r--")
        top.plot(*(t[:, 0] for t in fit["data"]), "b.")
        present = graph.state["0.weight"].detach()[:, 0], graph.state["0.bias"].detach()
        for centre in -present[1] / present[0]:
            if abs(centre) < 2.8:
                top.axvline(centre, color="gray", lw=0.5)
        top.set_title(title)
        found = landscape(graph, fit["data"], centres, scales).clamp(max=10)
        image = below.pcolormesh(centres, scales, found, norm="log", vmin=1e-2, vmax=10)
        below.contour(centres, scales, found, [1.0], colors="white")
        if unit is not None:
            below.plot(unit["centre"], unit["scale"], "r*" if column % 2 == 0 else "k*")
        below.set_yscale("log")
        below.set_xlabel("centre of a new unit (scale upward): Δη/η")
        panels[0, 0].figure.colorbar(image, ax=below)


def draw_layers(panels, run):
    """Draw the score by step, and the decision boundary at the end of each phase."""
    panels[0].semilogy(*zip(*run["scores"], strict=True))
    panels[0].axhline(1.0, color="gray")
    panels[0].set_title("Δη/η of the best layer")
    for step, _ in run["layers"]:
        panels[0].axvline(step, color="green", lw=0.7)
    points, labels = run["data"]
    side = torch.linspace(-2, 3, 120).double()
    y, x = torch.meshgrid(side, side, indexing="ij")
    for number, (panel, model) in enumerate(zip(panels[1:], run["models"], strict=False)):
        with torch.no_grad():
            chance = model(torch.stack([x, y], 2).reshape(-1, 2)).softmax(1)[:, 1]
        panel.contourf(x, y, chance.reshape(x.shape), 12, cmap="RdBu", alpha=0.7)
        panel.scatter(*points.T, c=labels, cmap="RdBu", s=8, edgecolors="black", linewidths=0.3)
        panel.set_title(f"{number} hidden layers, accuracy {run['accuracies'][number]:.3f}")


def report(fit, layers, seconds):
    """Print what came out beside what the paper says."""
    first = fit["data"][1].square().mean().item() / 2
    near = sorted(unit["near"] for unit in fit["units"])
    accuracies = ", ".join(f"{a:.3f}" for a in layers["accuracies"])
    steps = ", ".join(str(step) for step, _ in layers["layers"])
    rows = [
        ("units, at first and at the end", "not given; 5 or more", f"1, {1 + len(near)}"),
        ("where units come", "where errors are large", f"{near[len(near) // 2]:.1f} × mean error"),
        ("error left at the end", "negligible", f"{100 * fit['losses'][-1] / first:.2f} %"),
        ("layers added to half-moons", "2 (from none)", f"{len(layers['layers'])}, at {steps}"),
        ("accuracy at the end of each phase", "rises", accuracies),
    ]
    print(f"{'':<36}{'paper':<24}here")
    for row in rows:
        print(f"{row[0]:<36}{row[1]:<24}{row[2]}")
    print(f"{seconds:.0f} s of processor time")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="of each of the two")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", help="where to draw figures 2 and 3")
    options = parser.parse_args()
    torch.set_num_threads(1)  # networks as small as these gain nothing from more
    began = time.process_time()
    fit = regression(options.steps, options.seed)
    layers = half_moons(options.steps, options.seed)
    report(fit, layers, time.process_time() - began)
    if options.figure:
        save_figure(fit, layers, options.figure)
    for event in fit["grower"].record:
        assert abs(event["loss_after"] - event["loss_before"]) < 1e-9, event
    if options.steps >= 300:
        near = sorted(unit["near"] for unit in fit["units"])
        assert near[len(near) // 2] > 1, "most units come where errors are larger than elsewhere"
        assert fit["losses"][-1] < 0.05 * fit["losses"][0], "units that come let the error go"
        assert len(layers["layers"]) >= 2 and layers["accuracies"][-1] > layers["accuracies"][0]


if __name__ == "__main__":
    main()
