"""Prints the time of a step of AdaRad over that of a step of RMSprop, on one MLP.

    OMP_NUM_THREADS=1 python benchmarks/adarad_step.py

Only `optimizer.step()` is timed, with gradients at hand, on a network 784-500-500-10 without
biases. The optimizers step in turn, which goes first changes every round, and the ratio is taken
within a round, so that drift of the machine's speed divides out. Printed is the median over the
rounds and the quartiles. Times are CPU seconds of the one thread. "with shrink" is RMSprop with the
ℓ2 fan-in penalty that AdaRad has, which the paper counts too. About 15 seconds.
"""

from __future__ import annotations

import statistics
import time
from itertools import pairwise

import torch
from torch import nn

import graphgrow as gg

ROUNDS = 1500


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = (784, 500, 500, 10)
    layers = [nn.Linear(i, o, bias=False) for i, o in pairwise(sizes)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    graph = gg.trace(model, torch.randn(2, sizes[0]))
    settings = {"lr": 1e-3, "radial_lr": 1e-3, "penalty": 1e-6}
    fans, rmsprop = gg.fan_ins(graph), torch.optim.RMSprop(model.parameters(), lr=1e-7)

    def shrinking() -> None:
        rmsprop.step()
        gg.shrink(fans, graph.state, 1e-9)

    steps = {
        "RMSprop": rmsprop.step,
        "with shrink": shrinking,
        "AdaRad": gg.AdaRad(graph, **settings).step,
        "AdaRadM": gg.AdaRadM(graph, **settings).step,
        "SGD": torch.optim.SGD(model.parameters(), lr=1e-7).step,
    }
    names = list(steps)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    taken: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(ROUNDS + 20):
        for k in range(len(names)):
            name = names[(round_ + k) % len(names)]
            start = time.process_time()
            steps[name]()
            seconds = time.process_time() - start
            if round_ >= 20:
                taken[name].append(seconds)
    for name, seconds in taken.items():
        ratios = [s / r for s, r in zip(seconds, taken["RMSprop"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        step = statistics.median(seconds) * 1e6
        print(f"{name:<12}{step:>7.0f} µs  / RMSprop {middle:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
