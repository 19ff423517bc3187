"""Every torchvision classifier and segmenter: its axes, which can grow, why others can't.

    python benchmarks/coverage.py [NAME ...] [--widen {each,all,none}]

Random weights, float64, small images. With `each`, every axis without an obstacle is widened by
three, alone; with `all` (the default) all of them at once; the largest relative difference of the
outputs in both modes is printed. Needs torchvision.
"""

from __future__ import annotations

import argparse
import collections
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import vision

import graphgrow as gg


def main() -> None:
    """Print one line a model, and the obstacles with how many axes they hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--widen", choices=("each", "all", "none"), default="all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, build, size in vision.zoo():
        if not options.names or name in options.names:
            with vision.silenced():
                report(name, build().double(), size, options.widen)


def report(name: str, model: torch.nn.Module, size: int, widen: str) -> None:
    """Print what was found on one model."""
    images = torch.randn(2, 3, size, size, dtype=torch.double)
    start = time.perf_counter()
    graph = gg.trace(model, images)
    axes = graph.axes
    seconds = time.perf_counter() - start
    free = [axis for axis in axes.values() if axis.obstacle is None]
    worst, refused = widened(graph, images, [axis.name for axis in free], widen)
    print(
        f"{name:32} {len(axes):4} axes {len(free):4} free {seconds:6.2f} s  difference {worst:.1e}",
        f"unknown {dict(graph.analysis.unknown)}" if graph.analysis.unknown else "",
        flush=True,
    )
    reasons = [axis.obstacle.split("units): ")[1] for axis in axes.values() if axis.obstacle]
    for reason, count in collections.Counter(reasons).most_common():
        print(f"    {count:4} axes: {reason}")
    for sentence in refused:
        print(f"    REFUSED {sentence}")


def widened(
    graph: gg.Graph, images: torch.Tensor, names: list[str], widen: str
) -> tuple[float, list[str]]:
    """Return the largest relative difference after widening, and the sentences of refusals."""
    refused: list[str] = []
    worst = 0.0
    fits: list[gg.Widen] = []
    for name in names if widen != "none" else []:
        rewrite = gg.Widen(name, units=3)
        obstacle = rewrite.obstacle(graph)
        if obstacle is not None:
            refused.append(obstacle)
            continue
        fits.append(rewrite)
        if widen == "each":
            grown = gg.apply(graph, rewrite, verify=False)
            worst = max(worst, gg.compare(graph, grown.graph, images).relative)
    if widen == "all" and fits:
        grown = gg.apply(graph, *fits, verify=False)
        worst = gg.compare(graph, grown.graph, images).relative
    return worst, refused


if __name__ == "__main__":
    main()
