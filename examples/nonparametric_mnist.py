"""A nonparametric network finds its size on MNIST while it is trained.

    GRAPHGROW_DATA=... python examples/nonparametric_mnist.py [--full] [--figure sizes.png]

Two hidden layers start with ten units each and get one more each epoch; AdaRad makes the lengths of
all fan-ins shorter, and units whose incoming weights reach zero are removed. After `--grow` epochs
no more are added, and for `--settle` epochs what is not needed goes. Then networks of the size that
came out are trained from scratch by RMSprop and by SGD. GRAPHGROW_DATA is a directory with MNIST's
four files. `--full` is the run of figure 3 of Philipp and Carbonell (2017), Nonparametric Neural
Networks: 1000 epochs and 1000 more with λ = 3e-4, which take half an hour, and less for each
parametric network; the short one takes three minutes. Measured with `--full --scratch 100`: 106-22
units (paper 193-36), 25 training images wrong (about 30), a median life of 56 epochs (about 50),
and 1.8 % of the test images wrong, beside 2.3 and 2.1 % by RMSprop and SGD at that size.

Images have mean 0 and deviation 1 over all pixels. The paper does not say how its inputs are
scaled, and sizes depend on it: the penalty is on lengths, and images that are s times as large need
first-layer fan-ins 1/s as long. With pixels from 0 to 1, 3.2 times smaller, the network ends much
smaller. That lengths in the first layer are "much less than 1" and those of the outputs 3.5 to 4.5
in the paper speaks for standardised images: so they come out here.
"""

import argparse
import time
from itertools import pairwise
from statistics import median

import torch
import torch.nn.functional as F
from nonparametric_report import Run, mnist, report, save_figure
from torch import nn

import graphgrow as gg
from graphgrow.nn import CapNorm

FULL = {"grow": 1000, "settle": 1000, "life": 50, "penalty": 3e-4, "scratch": 1000}
SHORT = {"grow": 100, "settle": 60, "life": 20, "penalty": 3e-4, "scratch": 30}
BATCH, ANGULAR, START, VALIDATION = 1000, 10.0, (10, 10), 10_000
COMING = 50  # new units of a layer in the life of one, as in the paper: one each epoch for 50


def network(widths, norm):
    """Return the network of the paper: no biases, and a fan-in of expected length one."""
    layers = []
    for into, out in pairwise(widths):
        layers += [nn.Linear(into, out, bias=False), norm(out), nn.ReLU()]
    layers = layers[:-2]  # the output is not normalised
    for layer in layers[::3]:
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    return nn.Sequential(*layers)


def epoch(model, optimizer, data, draws, after=lambda: None):
    """Train for one epoch, batches drawn without replacement, and return the mean loss."""
    images, labels = data
    total = 0.0
    for batch in torch.randperm(len(images), generator=draws).split(BATCH):
        loss = F.cross_entropy(model.train()(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after()
        total += loss.item() * len(batch) / len(images)
    return total


@torch.no_grad()
def error(model, data):
    """Return the part of the images that is classified wrongly."""
    images, labels = data
    return (model.eval()(images).argmax(1) != labels).float().mean().item()


def grown(options, train, validation):
    """Train a nonparametric network and return what happened."""
    draws, share = torch.Generator().manual_seed(options.seed), BATCH / len(train[0])
    graph = gg.trace(network((784, *START, 10), CapNorm), train[0][:BATCH])
    optimizer = gg.AdaRad(
        graph,
        lr=ANGULAR,
        radial_lr=1 / (options.life * options.penalty),
        penalty=options.penalty,
        share=share,
    )
    run = Run(graph, START)
    for number in range(options.grow + options.settle):
        loss = epoch(gg.lower(run.graph), optimizer, train, draws)
        rate = COMING / options.life if number < options.grow else 0.0
        change = gg.turn_over(run.graph, add=rate, generator=draws)
        if change is not None:
            gg.migrate(optimizer, change.grown)
        run.follow(number, change, loss, error(gg.lower(run.graph), validation))
    return run


def scratch(kind, sizes, options, train, validation):
    """Train a network of these sizes from the start, by RMSprop or as the grown one but by SGD.

    Return it with its losses and validation errors by epoch.
    """
    draws = torch.Generator().manual_seed(options.seed)
    if kind == "RMSprop":
        model = network((784, *sizes, 10), lambda n: nn.BatchNorm1d(n, affine=False))
        optimizer, amount = torch.optim.RMSprop(model.parameters(), lr=1e-3), 0.0
    else:
        model, rate = network((784, *sizes, 10), CapNorm), ANGULAR * BATCH / len(train[0])
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        amount = rate * options.penalty
    graph = gg.trace(model, train[0][:2])
    fans = gg.fan_ins(graph)
    curves = [], []
    for _ in range(options.scratch):
        loss = epoch(model, optimizer, train, draws, lambda: gg.shrink(fans, graph.state, amount))
        curves[0].append(loss)
        curves[1].append(error(model, validation))
    return model, curves


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the settings of the paper")
    for name, value in SHORT.items():
        parser.add_argument(f"--{name}", type=type(value), help=f"{value}, in full {FULL[name]}")
    parser.add_argument("--images", type=int, default=50_000, help="to train on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", help="where to draw the panels of figure 3")
    options = parser.parse_args()
    for name, value in (FULL if options.full else SHORT).items():
        setattr(options, name, value if getattr(options, name) is None else getattr(options, name))
    data = mnist()
    if data is None:
        return
    (images, labels), test = data
    train = images[: options.images], labels[: options.images]
    validation = images[-VALIDATION:], labels[-VALIDATION:]
    torch.set_num_threads(1)  # networks as small as these gain nothing from more
    torch.manual_seed(options.seed)
    began = time.perf_counter()
    run = grown(options, train, validation)
    found = {"nonparametric": gg.lower(run.graph)}
    for kind in ("RMSprop", "SGD") if options.scratch else ():
        found[kind], run.beside[kind] = scratch(kind, run.sizes[-1], options, train, validation)
    errors = {kind: (error(model, train), error(model, test)) for kind, model in found.items()}
    report(run, options, errors, time.perf_counter() - began)
    if options.figure:
        save_figure(run, options.figure)
    assert run.change < 1e-10, "units that come and go must not change the outputs"
    if options.grow > 2 * options.life and options.settle > 1.5 * options.life:
        assert 0.8 < median(run.lives) / options.life < 1.8, run.lives
        assert sum(run.sizes[-1]) < max(map(sum, run.sizes)), "what is not needed must go"
        assert median(run.errors[-20:]) < 0.05, run.errors  # single epochs jump


if __name__ == "__main__":
    main()
