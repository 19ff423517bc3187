"""How long tracing and axis analysis take on one core, and how that grows with the network.

    python benchmarks/analysis_time.py

CPU seconds, the least of three runs, after one run that loads code. The chain is of linear layers
of width 8 with ReLUs; its last column is the time by node, in milliseconds: constant where growth
is linear. Needs torchvision.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import vision

import graphgrow as gg


def main() -> None:
    """Print the times of two torchvision models and of chains of three lengths."""
    torch.set_num_threads(1)
    seconds(chain(3), torch.randn(2, 8))
    for name in ("resnet50", "densenet121"):
        with vision.silenced():
            model = vision.build(name)
        for size in (64, 224):
            trace, axes, _ = least(model, torch.randn(2, 3, size, size))
            print(f"{name:12} {size:4} px  trace {trace:5.2f} s  axes {axes:5.2f} s", flush=True)
    for length in (10, 100, 1000):
        trace, axes, nodes = least(chain(length), torch.randn(2, 8))
        each = 1000 * (trace + axes) / nodes
        print(f"chain {length:5} layers  trace {trace:5.2f} s  axes {axes:5.2f} s  {each:5.2f} ms")


def chain(length: int) -> nn.Module:
    """Return `length` linear layers of width 8 with a ReLU after each."""
    return nn.Sequential(*(part for _ in range(length) for part in (nn.Linear(8, 8), nn.ReLU())))


def least(model: nn.Module, x: Tensor) -> tuple[float, float, int]:
    """Return the least seconds of three runs to trace and to analyse, and the number of nodes."""
    return min((seconds(model, x) for _ in range(3)), key=lambda found: found[0] + found[1])


def seconds(model: nn.Module, x: Tensor) -> tuple[float, float, int]:
    """Return CPU seconds to trace and to analyse, and the number of nodes."""
    start = time.process_time()
    graph = gg.trace(model, x)
    traced = time.process_time()
    assert graph.axes
    return traced - start, time.process_time() - traced, len(graph.train.nodes)


if __name__ == "__main__":
    main()
