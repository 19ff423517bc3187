"""Prints what moments of every measurable hidden axis cost, over plain forward and backward.

    OMP_NUM_THREADS=1 python benchmarks/moments_cost.py [mlp] [resnet18] [--gromo PYTHON]

`mlp` is 784-256-256-10 on 10 batches of 256, `resnet18` that for CIFAR at full width (11.2 million
parameters) on 4 batches of 64, its axes those inside the 8 blocks. Every row is a process of its
own, all on the same random batches: CPU seconds of the one thread (the median over the rounds, in
which rows take turns) and the peak of resident memory. "S and N" and "N" are what TINY without
projection and GradMax need; "put together" also makes every matrix, one axis after another, as
scores do; "project" goes through the batches twice and gives TINY's projected cross moment, too.
With `--gromo`, the interpreter of an environment that has gromo 0.1.0 (it needs nothing of this
package), its statistics for the same axes are a row, too. `python benchmarks/moments_cost.py
--count` prints multiplications instead, over those of plain forward and backward: of these without
weight gradients, and of each moment by its definition (half of a symmetric one), with products of
equal distances once, and by products of spectra, transforms aside.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROUNDS = {"mlp": 5, "resnet18": 1}
ROWS: dict[str, dict[str, Any]] = {
    "moments": {},
    "S and N": {"of": ("inputs", "cross")},
    "N": {"of": ("cross",)},
    "project": {"project": True},
    "put together": {},
}


class Block(nn.Module):
    """Two 3×3 convolutions with batch norm, added to their input or to a projection of it."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.down: nn.Module = nn.Identity()
        if before != after:
            conv = nn.Conv2d(before, after, 1, stride, bias=False)
            self.down = nn.Sequential(conv, nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        inside = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inside)) + self.down(x))


def network(name: str) -> nn.Module:
    """Return the network, in eval mode."""
    torch.manual_seed(0)
    if name == "mlp":
        hidden = (nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        return nn.Sequential(*hidden, nn.Linear(256, 10)).eval()
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    before = 64
    for after in (64, 128, 256, 512):
        layers += [Block(before, after, 1 if after == 64 else 2), Block(after, after, 1)]
        before = after
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    return nn.Sequential(*layers, *head).eval()


def data(name: str) -> list[tuple[Tensor, Tensor]]:
    """Return the batches."""
    torch.manual_seed(1)
    count, examples, shape = (10, 256, (784,)) if name == "mlp" else (4, 64, (3, 32, 32))
    return [
        (torch.randn(examples, *shape), torch.randint(0, 10, (examples,))) for _ in range(count)
    ]


def plain(name: str, batches: list[Any]) -> Callable[[], None]:
    """Return what runs forward and backward with the gradients of all parameters."""
    model = network(name)

    def run() -> None:
        for x, y in batches:
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()

    return run


def ours(name: str, batches: list[Any], row: str) -> Callable[[], None]:
    """Return what measures every hidden axis of the MLP, or inside every block."""
    import graphgrow as gg

    graph = gg.trace(network(name), batches[0][0][:2])
    free = [axis.name for axis in graph.axes.values() if axis.obstacle is None]
    axes = [axis for axis in free if name == "mlp" or axis.endswith("conv1")]
    assert len(axes) == (2 if name == "mlp" else 8)

    def run() -> None:
        found = gg.moments(graph, batches, F.cross_entropy, axes, **ROWS[row])
        for measured in found.values() if row == "put together" else ():
            for make in (lambda m: m.inputs, lambda m: m.cross):
                make(measured)
            for consumer in measured.consumers:
                for make in (lambda c: c.present, lambda c: c.desired, lambda c: c.gradient):
                    make(consumer)

    return run


def gromo(name: str, batches: list[Any]) -> Callable[[], None]:
    """Return what collects gromo's statistics of the same axes."""
    from gromo.containers.growing_mlp import GrowingMLP  # type: ignore
    from gromo.containers.resnet import init_full_resnet_structure  # type: ignore
    from gromo.modules.conv2d_growing_module import RestrictedConv2dGrowingModule  # type: ignore

    if name == "mlp":
        model = GrowingMLP(784, 10, 256, 2, activation=nn.ReLU())
    else:
        model = init_full_resnet_structure(
            (3, 32, 32),
            out_features=10,
            reduction_factor=1.0,
            use_preactivation=False,
            small_inputs=True,
            skip_first_downsample=False,
            growing_conv_type=RestrictedConv2dGrowingModule,
        )
    model.set_growing_layers("all")

    def run() -> None:
        model.init_computation()
        model.eval()
        for x, y in batches:
            model.zero_grad()
            F.cross_entropy(model(x), y, reduction="sum").backward()
            model.update_computation()
        model.reset_computation()

    return run


# ------------------------------------------------------------------------------ arithmetic

Counts = dict[str, tuple[float, float, float]]
"""Multiplications for one example: by definition, by distances, by spectra."""


def linear_counts() -> tuple[int, int, Counts]:
    """Return those of plain forward and backward, without weight gradients, and of moments."""
    forward, first = 784 * 256 + 256 * 256 + 256 * 10, 784 * 256
    found = {
        "inputs": 784**2 / 2 + 256**2 / 2,
        "cross": 784 * 256 + 256 * 10,
        "present": 256**2 / 2,  # of the last layer; that of the one before is its inputs'
        "desired": 256 * 256 + 256 * 10,
        "gradient": 256**2 / 2 + 10**2 / 2,
    }
    return 3 * forward - first, 2 * forward - first, {k: (v, v, v) for k, v in found.items()}


def convolution_counts() -> tuple[int, int, Counts]:
    """Return the same of the ResNet-18."""
    first = 27 * 64 * 32**2
    forward, total = first + 512 * 10, {name: [0.0, 0.0, 0.0] for name in NAMES}
    before = 64
    for after, size, steps in (
        (64, 32, (1, 1)),
        (128, 16, (2, 1)),
        (256, 8, (2, 1)),
        (512, 4, (2, 1)),
    ):
        for step in steps:
            n, ab, aa, bb = size**2, before * after, after**2, before**2
            forward += 9 * n * (ab + aa) + (n * ab if before != after else 0)
            lags, near = (_places(size, reach) ** 2 for reach in (2, 1))
            spectra = 4 * (size + 2) * ((size + 2) // 2 + 1)
            half, wide = (lags + n) / 2, 49 * n if step == 2 else lags
            inputs = (34 * n * bb,) * 2 if step == 2 else (half * bb, spectra * bb)
            for name, counts in {
                "inputs": (81 / 2 * n * bb, *inputs),
                "cross": (81 * n * ab, wide * ab, step**2 * spectra * ab),
                "present": (81 / 2 * n * aa, half * aa, spectra * aa),
                "desired": (9 * n * aa, near * aa, spectra * aa),
                "gradient": (n * aa / 2,) * 3,
            }.items():
                total[name] = [t + c for t, c in zip(total[name], counts, strict=True)]
            before = after
    counted = {name: (c[0], c[1], c[2]) for name, c in total.items()}
    return 3 * forward - first, 2 * forward - first, counted


NAMES = ("inputs", "cross", "present", "desired", "gradient")


def _places(size: int, reach: int) -> int:
    """Return how many places all distances up to one have along a dim."""
    return sum(size - abs(lag) for lag in range(-reach, reach + 1))


def count() -> None:
    """Print the arithmetic."""
    for name, (plain_, without, counts) in (
        ("mlp", linear_counts()),
        ("resnet18", convolution_counts()),
    ):
        print(f"{name:9} without weight gradients {without / plain_:5.2f} × plain")
        for kind, way in enumerate(("by definition", "by distances", "by spectra")):
            shares = {k: c[kind] / plain_ for k, c in counts.items()}
            parts = " ".join(f"{k} {share:4.2f}" for k, share in shares.items())
            total = without / plain_ + sum(shares.values())
            print(f"{name:9} {way:14} {parts}  all {total:5.2f}")


def measure(name: str, row: str) -> None:
    """Print CPU seconds and peak memory of one row as JSON."""
    torch.set_num_threads(1)
    batches = data(name)
    if row == "plain":
        run = plain(name, batches)
    elif row == "gromo":
        run = gromo(name, batches)
    else:
        run = ours(name, batches, row)
    if name == "mlp":
        run()  # warm caches
    start = time.process_time()
    run()
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "MiB": peak}))


def main(arguments: list[str]) -> None:
    interpreters = dict.fromkeys(("plain", *ROWS), sys.executable)
    if "--gromo" in arguments:
        at = arguments.index("--gromo")
        interpreters["gromo"] = arguments[at + 1]
        arguments = arguments[:at] + arguments[at + 2 :]
    for name in arguments or list(ROUNDS):
        found: dict[str, list[dict[str, float]]] = {row: [] for row in interpreters}
        for _ in range(ROUNDS[name]):
            for row, python in interpreters.items():
                command = [python, "-W", "ignore", __file__, "--row", name, row]
                out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                found[row].append(json.loads(out.splitlines()[-1]))
        base = {
            key: statistics.median(f[key] for f in found["plain"]) for key in ("seconds", "MiB")
        }
        for row, values in found.items():
            seconds = statistics.median(v["seconds"] for v in values)
            peak = statistics.median(v["MiB"] for v in values)
            ratios = f"{seconds / base['seconds']:5.2f} × plain {peak / base['MiB']:9.2f} × plain"
            print(f"{name:9} {row:12} {seconds:8.3f} s {peak:7.0f} MiB {ratios}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--row"]:
        measure(*sys.argv[2:4])
    elif sys.argv[1:2] == ["--count"]:
        count()
    else:
        main(sys.argv[1:])
