"""Large models, traced and widened: time, and memory relative to the model's own.

    python benchmarks/scale.py [NAME ...] [--profile N]

Each in a process of its own, in float32, on one thread; times are of CPU. `gpt` is 24 layers of
width 1024 as GPT-2 has them, written here, and widened in every MLP; `gpt2` the same size of
transformers' GPT-2 (skipped without transformers); `densenet` torchvision's DenseNet-201 and
`resnet` a ResNet of 1000 convolutions, both widened in every axis that can grow, one after another;
`resnet500` has half as many, and should take half as long. *memory* is the highest resident memory
over that after building the model, in multiples of its tensors, the model itself counted once.
Needs torchvision for `densenet`. With `--profile` the N functions that took most follow, in seconds
of their own under the profiler, which makes calls of Python slower than they are.
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import importlib
import importlib.util
import itertools
import multiprocessing
import pstats
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import vision

import graphgrow as gg


def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *MODELS], metavar="NAME")
    parser.add_argument("--profile", type=int, default=0, metavar="N")
    options = parser.parse_args()
    print("model      tensors  axes  widened   trace  analyse   widen   memory  difference")
    for name in options.names or MODELS:
        if name == "gpt2" and importlib.util.find_spec("transformers") is None:
            print("gpt2       needs transformers (requirements/zoo.txt)")
            continue
        end, given = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(
            target=measured, args=(name, given, options.profile)
        )
        process.start()
        given.close()
        try:
            print(end.recv(), flush=True)
        except EOFError:
            print(f"{name:10} failed")
        process.join()


class Block(nn.Module):
    """A pre-norm transformer block with fused projections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(width, 2)
        split = (batch, length, self.heads, width // self.heads)
        q, k, v = (part.view(split).transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """A language model of the size of GPT-2 medium, its output tied to its embedding."""

    def __init__(self, layers: int = 24, width: int = 1024, heads: int = 16) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50257, width), nn.Embedding(1024, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 50257, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.places(torch.arange(words.shape[1], device=words.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Residual(nn.Module):
    """Two convolutions and a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


def resnet(layers: int = 1000, width: int = 16) -> nn.Module:
    """Return a ResNet of that many convolutions, at one resolution."""
    blocks = [Residual(width) for _ in range(layers // 2)]
    ends = nn.Conv2d(3, width, 3, padding=1), nn.Flatten(), nn.Linear(width * 64, 10)
    return nn.Sequential(ends[0], *blocks, *ends[1:])


def gpt2() -> nn.Module:
    """Return transformers' GPT-2 medium with random weights."""
    vision.torchvision()  # which transformers imports
    transformers = importlib.import_module("transformers")
    config = transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16, use_cache=False)
    return transformers.GPT2LMHeadModel(config)


def densenet() -> nn.Module:
    """Return torchvision's DenseNet-201 with random weights."""
    return vision.build("densenet201")


def words() -> Tensor:
    return torch.randint(3, 50257, (1, 16))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str]] = {
    "gpt": (Gpt, words, "up"),
    "gpt2": (gpt2, words, "c_fc"),
    "densenet": (densenet, lambda: torch.randn(2, 3, 64, 64), ""),
    "resnet": (resnet, lambda: torch.randn(2, 3, 8, 8), ""),
    "resnet500": (functools.partial(resnet, 500), lambda: torch.randn(2, 3, 8, 8), ""),
}


def measured(name: str, given: Connection, functions: int) -> None:
    """Send a line on one model, and a profile of so many functions below it."""
    torch.set_num_threads(1)
    build, inputs, only = MODELS[name]
    with vision.silenced():
        model, x = build(), inputs()
    size = sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()})
    start, watch, profile = resident(), Watch(), cProfile.Profile()
    if functions:
        profile.enable()
    times = [time.process_time()]
    graph = gg.trace(model, x)
    times.append(time.process_time())
    axes = graph.axes
    times.append(time.process_time())
    free = [a.name for a in axes.values() if a.obstacle is None and only in a.name]
    grown = graph
    done = 0
    for axis in free:
        widen = gg.Widen(axis, 16 if only else 1)
        try:
            grown = gg.apply(grown, widen, verify=False).graph
            done += 1
        except gg.NotApplicable:
            continue
    times.append(time.process_time())
    profile.disable()
    memory = (watch.stop() - start + size) / size
    found = gg.compare(graph, grown, x, double=False).relative
    trace, analyse, widen_ = (b - a for a, b in itertools.pairwise(times))
    given.send(
        f"{name:10} {size / 2**20:5.0f} MB {len(axes):5} {done:8} {trace:6.1f} s {analyse:6.1f} s "
        f"{widen_:6.1f} s {memory:7.1f} {found:11.0e}"
        + (most_of(profile, functions) if functions else "")
    )


def most_of(profile: cProfile.Profile, functions: int) -> str:
    """Return lines: seconds of its own, calls and name of the functions that took most."""
    stats = pstats.Stats(profile).get_stats_profile().func_profiles
    longest = sorted(stats.items(), key=lambda item: -item[1].tottime)[:functions]
    return "".join(
        f"\n{own.tottime:16.1f} s {own.ncalls:>16}  {Path(own.file_name).name} {name}"
        for name, own in longest
    )


class Watch:
    """Notes the highest resident memory until it is stopped."""

    def __init__(self) -> None:
        self.most, self._over = resident(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(0.02):
            self.most = max(self.most, resident())

    def stop(self) -> int:
        """Return the highest number of bytes seen."""
        self._over.set()
        self._thread.join()
        return max(self.most, resident())


def resident() -> int:
    """Return how many bytes of memory this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


if __name__ == "__main__":
    main()
