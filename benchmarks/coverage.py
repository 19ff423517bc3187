"""Every torchvision classifier and segmenter: its axes, which can grow, why others can't.

    python benchmarks/coverage.py [NAME ...] [--widen {each,all,none}] > docs/torchvision.md

Random weights, float64, small images. With `all` (the default), every axis without an obstacle is
widened by three, all of them at once; with `each`, each of them alone. Printed, as a table, is the
largest relative difference of the outputs in train and in eval mode. The largest model needs some
20 GB. Needs torchvision.
"""

from __future__ import annotations

import argparse
import collections
import re
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import vision

import graphgrow as gg


def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--widen", choices=("each", "all", "none"), default="all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("# torchvision's models, widened\n")
    command = f"python benchmarks/coverage.py --widen {options.widen}"
    print(f"`{command}`, torch {torch.__version__}, random weights, float64.")
    print(
        "Each axis that can be widened is, by three units. *difference*: of the outputs, relative,"
    )
    print("in train and eval mode; *seconds*: of CPU, to trace and analyse.\n")
    print("| model | axes | widened | difference | seconds | the other axes |")
    print("|---|---|---|---|---|---|")
    rows: list[str] = []
    for name, build, size in vision.zoo():
        if not options.names or name in options.names:
            with vision.silenced():
                rows.append(line(name, build().double(), size, options.widen))
            print(rows[-1], flush=True)
    print(total(rows))


def total(rows: list[str]) -> str:
    """Return the row of sums, with the largest difference."""
    axes, widened, differences, seconds = zip(*(row.split("|")[2:6] for row in rows), strict=True)
    counts = f"{sum(map(int, axes))} | {sum(map(int, widened))}"
    worst, time_taken = max(map(float, differences)), sum(map(float, seconds))
    return f"| all {len(rows)} | {counts} | {worst:.0e} | {time_taken:.1f} | |"


def line(name: str, model: nn.Module, size: int, widen: str) -> str:
    """Return what was found on one model, as a row of the table."""
    images = torch.randn(2, 3, size, size, dtype=torch.double)
    start = time.process_time()
    graph = gg.trace(model, images)
    axes = graph.axes
    seconds = time.process_time() - start
    free = [axis.name for axis in axes.values() if axis.obstacle is None]
    fits = [name for name in free if gg.Widen(name, 3).obstacle(graph) is None]
    worst = difference(graph, images, fits, widen)
    reasons = [axis.obstacle.split("units): it ")[1] for axis in axes.values() if axis.obstacle]
    reasons += [gg.Widen(n, 3).obstacle(graph).split(": ", 1)[1] for n in free if n not in fits]
    counted = collections.Counter(re.sub(r" '[^']*'", "", reason) for reason in reasons)
    said = "; ".join(f"{count} × {reason}" for reason, count in counted.most_common())
    return f"| {name} | {len(axes)} | {len(fits)} | {worst:.0e} | {seconds:.1f} | {said} |"


def difference(graph: gg.Graph, images: Tensor, names: list[str], widen: str) -> float:
    """Return the largest relative difference of the outputs after widening."""
    rewrites = [gg.Widen(name, 3) for name in names]
    if widen == "none" or not rewrites:
        return 0.0
    if widen == "all":
        return gg.compare(graph, gg.apply(graph, *rewrites, verify=False).graph, images).relative
    return max(
        gg.compare(graph, gg.apply(graph, rewrite, verify=False).graph, images).relative
        for rewrite in rewrites
    )


if __name__ == "__main__":
    main()
