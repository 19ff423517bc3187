"""Trace every classification and segmentation model of torchvision; run the graphs; print times.

    python benchmarks/tracing.py [name ...]

For each model: seconds to trace, nodes in train mode, whether one graph serves both modes, and
whether the graphs give the model's own bits at two other batch sizes. Needs 8 GB of memory.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import vision
from test_trace import differences

from graphgrow.ir.trace import trace


def main(names: list[str]) -> None:
    """Print one line a model, for `names` or for all."""
    torch.set_num_threads(1)
    for name, build, size in vision.zoo():
        if not names or name in names:
            with vision.silenced():
                model = build()
            print(f"{name:32} {line(model, size)}", flush=True)


def line(model: torch.nn.Module, size: int) -> str:
    """Return the figures of one model."""
    start = time.perf_counter()
    graph = trace(model, torch.randn(2, 3, size, size))
    seconds = time.perf_counter() - start
    wrong = [differences(model, graph, torch.randn(n, 3, size, size)) for n in (3, 4)]
    graphs = "one graph" if graph.train is graph.eval else "two graphs"
    exact = f"differs in {wrong}" if any(wrong) else "exact"
    return f"{seconds:6.2f} s {len(graph.train.nodes):6} nodes  {graphs:10} {exact}"


if __name__ == "__main__":
    main(sys.argv[1:])
