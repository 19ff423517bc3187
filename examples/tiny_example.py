"""A bottleneck of expressivity, seen and taken away: the example of TINY's appendix A.4.

    python examples/tiny_example.py [--figure bottleneck.png]

A line is to become 2 sin(x) + x at four points. The desired update v_goal, minus the gradient of
each point's loss, is (0, 4, 0, −4); the best line through it leaves Ψ = 4.8 of its mean square 8.
Then the line grows in two ways. A layer is inserted that changes nothing yet (a pair of GELUs), and
all of v_goal is in reach. And a network with one hidden unit gets more of them by TINY, units and
present weights together, as far as a search along their amplitude says; the loss is zero to
rounding when there are as many weights to the output as points. Takes about 5 seconds on one core.

Source: Verbockhaven, Rudkiewicz, Chevallier, Charpiat (2024), Growing Tiny Networks.
"""

import argparse
import math

import torch
from torch import nn

import graphgrow as gg
from graphgrow.scores import Tiny, advance, amplify, best_step, bottleneck, output_bottleneck

X = torch.linspace(0, 1.5 * math.pi, 4, dtype=torch.double)[:, None]
POINTS = [(X, 2 * X.sin() + X)]
PAPER = 4.8  # by hand: 8 minus the part of (0, 4, 0, −4) that a line can do, 3.2


def loss(output, target):
    """Return the mean squared error, summed over outputs."""
    return (output - target).square().sum(1).mean()


def line():
    """Return the paper's model: y = 1 · x + 0."""
    layer = nn.Linear(1, 1).double()
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    return gg.trace(nn.Sequential(layer), X)


def followed(graph, steps=20):
    """Go along the best update of all weights and return the loss after each step."""
    losses = []
    for _ in range(steps):
        update = output_bottleneck(graph, POINTS, loss).update
        losses.append(advance(graph, update, POINTS, loss).after)
    return losses


def grown(units=3):
    """Let one hidden unit get company and return width, Ψ before and loss after each growth."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1)).double()
    graph, rows = gg.trace(model, X), []
    for width in range(1, units + 1):
        found = gg.moments(graph, POINTS, loss, ["0"], overlap=True)
        reached = advance(graph, best_step(graph, found["0"]), POINTS, loss).after
        rows.append((width, bottleneck(found["0"]), reached))
        found = gg.moments(graph, POINTS, loss, ["0"], overlap=True)
        for proposal in Tiny(1, joint=True).proposals(graph, found):
            result = gg.apply(graph, proposal.rewrite)
            amplify(result, proposal, POINTS, loss)
            graph = result.graph
    return rows


def save_figure(reach, rows, path):
    """Draw what is desired beside what a line can do, and Ψ and the loss by width."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5))
    x, y = X[:, 0], POINTS[0][1][:, 0]
    many = torch.linspace(-0.3, 5, 200)
    left.plot(many, 2 * many.sin() + many, "k:", label="2 sin(x) + x")
    left.plot(many, many, "k", label="the line")
    best = reach.update["0.weight"].item() * x + reach.update["0.bias"].item()
    for shift, (name, change) in enumerate({"desired": 2 * (y - x), "best": best}.items()):
        left.quiver(x + 0.08 * shift, x, 0 * x, change, angles="xy", scale_units="xy", scale=2,
                    color=f"C{shift}", label=f"{name} update, half", width=0.006)  # fmt: skip
    left.legend(fontsize=8)
    widths, psi, losses = zip(*rows, strict=True)
    right.semilogy(widths, [max(p, 1e-16) for p in psi], "o-", label="bottleneck Ψ")
    right.semilogy(widths, [max(v, 1e-16) for v in losses], "s-", label="loss")
    right.set(xlabel="hidden units", xticks=widths)
    right.legend(fontsize=8)
    plt.tight_layout()
    plt.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", help="where to draw")
    options = parser.parse_args()
    graph = line()
    reach = output_bottleneck(graph, POINTS, loss)
    print(f"a line: Ψ {reach.bottleneck:.3f} of {reach.desired:.3f}; by hand {PAPER} of 8")
    deeper = gg.apply(graph, gg.Deepen("0", layer=gg.Split("gelu"))).graph
    beyond, losses = output_bottleneck(deeper, POINTS, loss), followed(deeper)
    print(f"with a layer that changes nothing yet: Ψ {beyond.bottleneck:.1e}; its loss by step:")
    print(" ".join(f"{value:.1e}" for value in losses))
    rows = grown()
    for width, psi, value in rows:
        print(f"{width} hidden units: Ψ {psi:.4f}, loss {value:.2e}")
    if options.figure:
        save_figure(reach, rows, options.figure)
    assert abs(reach.bottleneck - PAPER) < 1e-9 and abs(reach.desired - 8) < 1e-9
    assert beyond.bottleneck < 1e-9 and losses[-1] < 1e-6
    assert rows[-1][2] < 1e-6 < rows[0][2]


if __name__ == "__main__":
    main()
