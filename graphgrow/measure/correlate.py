"""Covariances of what convolutions read, without unfolding it.

Two entries of a patch are the same two channels a fixed distance apart, whatever the position; so
entries of patch covariances repeat for equal distances, but for the border, where one pair of
offsets reads inside and another outside. Each spatial dim is therefore cut into segments in which
all pairs of one distance read alike (a long one and a few of one or two places). Products are
summed once for each distance and segment, and a pair of offsets is a sum of segments.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphgrow.measure.patches import Window, offsets

Offset = tuple[int, ...]


@dataclass(frozen=True)
class Along:
    """How pairs of offsets read along one spatial dim of two tensors, x and y.

    Segment number k has the places `x[k]` of x and `y[k]` of y; `pairs[i, j]` are the segments of
    the offset i into x and j into y.
    """

    x: tuple[slice, ...]
    y: tuple[slice, ...]
    pairs: dict[tuple[int, int], tuple[int, ...]]


def _along(reads: Iterable[tuple[tuple[int, int], int, int, int, int, int, int]]) -> Along:
    """Return the segments of pairs `(i, j)` that read x at `u · s + a` and y at `u · t + b`.

    Each is `((i, j), a, s, b, t, low, high)`, with u from low up to below high.
    """
    found = list(reads)
    ends: dict[tuple[int, int], set[int]] = {}
    for _, a, _, b, _, low, high in found:
        ends.setdefault((a, b), set()).update((low, high) if low < high else ())
    xs: list[slice] = []
    ys: list[slice] = []
    known: dict[tuple[int, int, int, int], int] = {}
    pairs: dict[tuple[int, int], tuple[int, ...]] = {}
    for pair, a, s, b, t, low, high in found:
        cuts = [e for e in sorted(ends[a, b]) if low <= e <= high] if low < high else []
        numbers = []
        for start, end in itertools.pairwise(cuts):
            key = (a, b, start, end)
            if key not in known:
                known[key] = len(xs)
                xs.append(slice(start * s + a, (end - 1) * s + a + 1, s))
                ys.append(slice(start * t + b, (end - 1) * t + b + 1, t))
            numbers.append(known[key])
        pairs[pair] = tuple(numbers)
    return Along(tuple(xs), tuple(ys), pairs)


def _within(start: int, step: int, size: int) -> tuple[int, int]:
    """Return from where up to below where `start + u · step` is in a space of `size` places."""
    return -(start // step), (size - 1 - start) // step + 1


def among_patches(kernel: int, stride: int, padding: int, dilation: int, size: int) -> Along:
    """Return how pairs of offsets of one convolution read one space."""
    out = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    reads = []
    for i, j in itertools.product(range(kernel), repeat=2):
        turn, a = divmod(i * dilation - padding, stride)
        b = j * dilation - padding - turn * stride
        bounds = ((turn, turn + out), _within(a, stride, size), _within(b, stride, size))
        low, high = max(low for low, _ in bounds), min(high for _, high in bounds)
        reads.append(((i, j), a, stride, b, stride, low, high))
    return _along(reads)


def through_units(
    first: tuple[int, int, int, int], second: tuple[int, int, int, int], sizes: tuple[int, int, int]
) -> Along:
    """Return how a convolution reads one space through the units of another before it.

    Each convolution is `(kernel, stride, padding, dilation)`; `sizes` are those of the space, of
    the units and of the output. Pairs are offsets of the first and of the second.
    """
    (k1, s1, p1, d1), (k2, s2, p2, d2) = first, second
    size, units, out = sizes
    reads = []
    for i, j in itertools.product(range(k1), range(k2)):
        unit = j * d2 - p2
        a = unit * s1 + i * d1 - p1
        bounds = ((0, out), _within(unit, s2, units), _within(a, s1 * s2, size))
        low, high = max(low for low, _ in bounds), min(high for _, high in bounds)
        reads.append(((i, j), a, s1 * s2, 0, 1, low, high))
    return _along(reads)


Key = tuple[Offset, Offset, Offset]


@dataclass
class Correlation:
    """Sums of products of x `(g, e, n, *space)` and y `(h, f, n, *space)` for pairs of offsets.

    One of g and h may be 1. `kernels` are the offsets into x and into y. With `symmetric`, x and y
    are one tensor and each pair of offsets is summed in one order only.
    """

    kernels: tuple[Offset, Offset]
    symmetric: bool
    sums: dict[Key, Tensor] = field(default_factory=dict)
    pairs: dict[tuple[Offset, Offset], set[Key]] = field(default_factory=dict)

    def _wanted(self) -> Iterator[tuple[Offset, Offset]]:
        both = [list(itertools.product(*map(range, kernel))) for kernel in self.kernels]
        for i, j in itertools.product(*both):
            if not self.symmetric or i <= j:
                yield i, j

    def add(self, x: Tensor, y: Tensor, along: list[Along]) -> None:
        """Add the products of one batch."""
        spaces = tuple(x.shape[3:]), tuple(y.shape[3:])
        now: set[Key] = set()
        for i, j in self._wanted():
            numbers = [a.pairs[pair] for a, pair in zip(along, zip(i, j, strict=True), strict=True)]
            keys = {(*spaces, segments) for segments in itertools.product(*numbers)}
            self.pairs.setdefault((i, j), set()).update(keys)
            now |= keys
        for key in sorted(now):
            a = x[(..., *(w.x[k] for w, k in zip(along, key[2], strict=True)))].flatten(2)
            b = y[(..., *(w.y[k] for w, k in zip(along, key[2], strict=True)))].flatten(2)
            found = a @ b.mT
            self.sums[key] = self.sums[key].add_(found) if key in self.sums else found.double()

    def into(self, out: Tensor) -> None:
        """Add all sums to a tensor `(parts, e, *kernel, f, *kernel)`."""
        whole = slice(None)
        for (i, j), keys in self.pairs.items():
            for key in keys:
                out[(whole, whole, *i, whole, *j)] += self.sums[key]
                if self.symmetric and i != j:
                    out[(whole, whole, *j, whole, *i)] += self.sums[key].mT


def lines(window: Window, kernel: Offset) -> list[tuple[int, int, int, int]]:
    """Return kernel, stride, padding and dilation along each spatial dim."""
    return list(zip(kernel, window.stride, window.padding, window.dilation, strict=True))


def read_sums(x: Tensor, window: Window, kernel: Offset, out: Offset) -> Tensor:
    """Return sums over positions of what a convolution reads, `(g, e, *kernel)`."""
    found = torch.zeros(*x.shape[:2], *kernel, dtype=torch.double, device=x.device)
    for offset, read, _ in offsets(window, kernel, list(x.shape[3:]), list(out)):
        found[(..., *offset)] = x[(..., *read)].flatten(2).sum(2).double()
    return found


def wanted_sums(v: Tensor, window: Window, kernel: Offset, space: Offset) -> Tensor:
    """Return sums of what a convolution wants over the positions that read inside the space.

    `v` is `(g, f, n, *positions)`; the result is `(g, f, *kernel)`.
    """
    found = torch.zeros(*v.shape[:2], *kernel, dtype=torch.double, device=v.device)
    for offset, _, at in offsets(window, kernel, list(space), list(v.shape[3:])):
        found[(..., *offset)] = v[(..., *at)].flatten(2).sum(2).double()
    return found
