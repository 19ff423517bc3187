"""Products of what convolutions read and want, summed for pairs of offsets without unfolding.

Two entries of a patch are the same two channels a fixed distance apart, whatever the position; so
sums of products repeat for equal distances, but for the border, where one pair of offsets reads
inside and another outside. Along each spatial dim a pair is therefore the whole of its distance
(all places where both are inside) less at most two short ends. Products are summed once for each
distance and end, and put together for pairs of offsets when they are asked for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graphgrow.measure.distances import Along, Terms
from graphgrow.measure.image import Image
from graphgrow.measure.patches import Window, offsets
from graphgrow.measure.spectrum import cheaper, lags

Offset = tuple[int, ...]

BLOCK = 32  # channels whose entries are put together at once: the result stays in the cache


Pattern = tuple[tuple[tuple[tuple[int, int], Terms], ...], ...]
"""The pairs along each dim."""
Key = tuple[Pattern, Offset]
"""A pattern and the number of a stretch along each dim."""


@dataclass
class Correlation:
    """Sums of products of x `(g, e, …)` and y `(h, f, …)` for pairs of offsets.

    One of g and h may be 1. `kernels` are the offsets into x and into y. With `symmetric`, x and y
    are one image and each pair of offsets is summed in one order only.
    """

    kernels: tuple[Offset, Offset]
    symmetric: bool
    sums: dict[Key, Tensor] = field(default_factory=dict)
    channels: tuple[int, int] = (0, 0)

    def add(self, x: Image, y: Image, along: list[Along]) -> None:
        """Add the products of one batch."""
        self.channels = x.channels, y.channels
        pattern = tuple(a.pairs for a in along)
        wanted = sorted({numbers for _, _, numbers, _ in self._terms(pattern)})
        whole, ends = [], []
        for numbers in wanted:
            stretches = [a.stretches[n] for a, n in zip(along, numbers, strict=True)]
            (whole if all(s.whole for s in stretches) else ends).append(numbers)
        if cheaper(x, y, along, whole):
            for numbers, rows, found in lags(x, y, along, whole):
                self._sum((pattern, numbers), x, y)[:, rows] += found
        else:
            ends = wanted
        for numbers in ends:
            stretches = zip(along, numbers, strict=True)
            places = [a.stretches[n].places(a.steps) for a, n in stretches]
            read, wanted_ = zip(*places, strict=True)
            self._sum((pattern, numbers), x, y).add_(x.rows(read) @ y.rows(wanted_).mT)

    def _sum(self, key: Key, x: Image, y: Image) -> Tensor:
        if key not in self.sums:
            shape = max(x.groups, y.groups), x.channels, y.channels
            self.sums[key] = x.values.new_zeros(shape, dtype=torch.double)
        return self.sums[key]

    def sizes(self) -> tuple[int, int]:
        """Return how many entries x and y have in a group, all offsets counted."""
        first, second = map(math.prod, self.kernels)
        return self.channels[0] * first, self.channels[1] * second

    def _terms(self, pattern: Pattern) -> Iterator[tuple[Offset, Offset, Offset, int]]:
        """Yield pairs of offsets with the numbers of each of their terms, and its sign."""
        for choice in itertools.product(*pattern):
            i, j = (tuple(pair[side] for pair, _ in choice) for side in (0, 1))
            if self.symmetric and i > j:
                continue
            for terms in itertools.product(*(terms for _, terms in choice)):
                sign = 1
                for _, s in terms:
                    sign *= s
                yield i, j, tuple(number for number, _ in terms), sign

    def into(self, out: Tensor) -> None:
        """Add all sums to a tensor `(parts, e · kernel, f · kernel)`."""
        first, second = self.kernels
        terms = [(p, *term) for p in {p for p, _ in self.sums} for term in self._terms(p)]
        into = out.unflatten(2, (-1, *second)).unflatten(1, (-1, *first))
        dims, whole = len(first), slice(None)
        order = (0, 1 + dims, *range(1, 1 + dims), 2 + 2 * dims, *range(2 + dims, 2 + 2 * dims))
        for start in range(0, into.shape[1], BLOCK):
            rows = slice(start, start + BLOCK)
            block = into[:, rows]
            sizes = len(out), *first, block.shape[1], *second, into.shape[2 + dims]
            made = torch.zeros(sizes, dtype=out.dtype, device=out.device)
            for pattern, i, j, numbers, sign in terms:
                known = self.sums[pattern, numbers]
                made[(whole, *i, whole, *j)].add_(known[:, rows], alpha=sign)
                if self.symmetric and i != j:
                    made[(whole, *j, whole, *i)].add_(known[:, :, rows].mT, alpha=sign)
            block += made.permute(order)


def read_sums(x: Image, window: Window, kernel: Offset, out: Offset) -> Tensor:
    """Return sums over positions of what a convolution reads, `(g, e · kernel)`."""
    at = offsets(window, kernel, list(x.space), list(out))
    return _sums(x, kernel, ((offset, read) for offset, read, _ in at))


def wanted_sums(v: Image, window: Window, kernel: Offset, space: Offset) -> Tensor:
    """Return sums of what a convolution wants over the positions that read inside the space.

    The result is `(g, f · kernel)`.
    """
    at = offsets(window, kernel, list(space), list(v.space))
    return _sums(v, kernel, ((offset, positions) for offset, _, positions in at))


def _sums(image: Image, kernel: Offset, places: Iterable[tuple[Offset, Any]]) -> Tensor:
    dims = tuple(range(2, 2 + len(kernel)))
    found = image.values.new_zeros(image.values.shape[1], *kernel, dtype=torch.double)
    for offset, at in places:
        found[(..., *offset)] = image.values[(..., *at)].sum((0, *dims)).double()
    return found.unflatten(0, (image.groups, -1)).flatten(1)
