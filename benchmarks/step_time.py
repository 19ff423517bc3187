"""Prints the time of a training step of a lowered model over that of the model it came from.

    OMP_NUM_THREADS=1 python benchmarks/step_time.py

One step is forward, backward and SGD. The two models step in turn, which of them goes first changes
every round, and the ratio is taken within a round, so that drift of the machine's speed divides
out. Printed is the median over the rounds and the quartiles. A third model, a second copy of the
original, is stepped and compared in the same way: its ratio shows what this machine can tell apart.
Times are CPU seconds of the one thread, which other programs beside it disturb less. About 70
seconds on one core.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import vision

from graphgrow.ir.lower import lower
from graphgrow.ir.trace import trace

SECONDS = 20  # of stepping, for each model


def models() -> dict[str, tuple[nn.Module, Tensor]]:
    """Return the models with one batch for each."""
    zoo = vision.torchvision().models
    vit = zoo.VisionTransformer(32, 8, 4, 4, hidden_dim=128, mlp_dim=256, num_classes=10)
    nn.init.normal_(vit.heads[0].weight)  # torchvision's zero head would make zero gradients
    images = torch.randn(32, 3, 32, 32)
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
    return {
        "mlp": (nn.Sequential(*layers), torch.randn(32, 64)),
        "vit": (vit, images),
        "resnet18": (zoo.resnet18(num_classes=10), images),
    }


def stepper(model: nn.Module, x: Tensor) -> Callable[[], float]:
    """Return a function that takes one training step and returns the CPU seconds it took."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    target = torch.arange(len(x)) % 10

    def step() -> float:
        start = time.process_time()
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
        return time.process_time() - start

    return step


def rounds(model: nn.Module, x: Tensor) -> list[tuple[float, float, float]]:
    """Return the seconds of a step of the model, of its lowered form and of its copy, by round."""
    twins = model, lower(trace(copy.deepcopy(model), x)), copy.deepcopy(model)
    steps = [stepper(twin.train(), x) for twin in twins]
    for step in steps * 3:
        step()
    taken: list[tuple[float, float, float]] = []
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        order = sorted(range(3), key=lambda i: (i + len(taken)) % 3)
        seconds = {i: steps[i]() for i in order}
        taken.append((seconds[0], seconds[1], seconds[2]))
    return taken


def summary(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"{'model':<10}{'step':>10}  {'lowered / original':<24}{'copy / original':<24}rounds")
    for name, (model, x) in models().items():
        taken = rounds(model, x)
        lowered = summary([b / a for a, b, _ in taken])
        copied = summary([c / a for a, _, c in taken])
        step = statistics.median(a for a, _, _ in taken) * 1000
        print(f"{name:<10}{step:>7.2f} ms  {lowered:<24}{copied:<24}{len(taken)}", flush=True)


if __name__ == "__main__":
    main()
