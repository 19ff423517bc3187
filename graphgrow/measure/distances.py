"""Where pairs of offsets of convolutions read along one spatial dim.

Two entries of a patch are the same two channels a fixed distance apart, whatever the position. A
pair of offsets is therefore the whole of its distance, all places where both are inside, less at
most two short ends where one of them, or the unit between, is outside.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from graphgrow.measure.patches import Window

Terms = tuple[tuple[int, int], ...]
"""Numbers of stretches, each with the sign that it is counted with."""


@dataclass(frozen=True)
class Stretch:
    """Places along one spatial dim: x is read at u·s + a and y at u·t + b, from `low` to `high`.

    It is `whole` where these are all places inside both.
    """

    a: int
    b: int
    low: int
    high: int
    whole: bool

    def places(self, steps: tuple[int, int]) -> tuple[slice, slice]:
        """Return what is read of x and of y."""
        (s, t), last = steps, self.high - 1
        x = slice(self.low * s + self.a, last * s + self.a + 1, s)
        return x, slice(self.low * t + self.b, last * t + self.b + 1, t)


@dataclass(frozen=True)
class Along:
    """How pairs of offsets read along one spatial dim of two tensors, x and y.

    `steps` are the strides s and t of reading. `pairs` gives the terms of the offset i into x and
    j into y. Sums for spaces with equal pairs can be added.
    """

    steps: tuple[int, int]
    stretches: tuple[Stretch, ...]
    pairs: tuple[tuple[tuple[int, int], Terms], ...]


Reading = tuple[tuple[int, int], int, int, int, int]
"""A pair of offsets, its a and b, and from where up to below where u goes."""


def _along(found: Iterable[Reading], steps: tuple[int, int], sizes: tuple[int, int]) -> Along:
    """Return the stretches of readings of spaces of these sizes."""
    known: dict[Stretch, int] = {}
    pairs: list[tuple[tuple[int, int], Terms]] = []
    for pair, a, b, low, high in found:
        terms = []
        if low < high:
            first, last = _both(_within(a, steps[0], sizes[0]), _within(b, steps[1], sizes[1]))
            ends = [(first, last, 1), (first, low, -1), (high, last, -1)]
            for start, end, sign in ends:
                if start < end:
                    stretch = Stretch(a, b, start, end, (start, end) == (first, last))
                    terms.append((known.setdefault(stretch, len(known)), sign))
        pairs.append((pair, tuple(terms)))
    return Along(steps, tuple(known), tuple(pairs))


def _within(start: int, step: int, size: int) -> tuple[int, int]:
    """Return from where up to below where `start + u · step` is in a space of `size` places."""
    return -(start // step), (size - 1 - start) // step + 1


def _both(*bounds: tuple[int, int]) -> tuple[int, int]:
    return max(low for low, _ in bounds), min(high for _, high in bounds)


Line = tuple[int, int, int, int]
"""Kernel, stride, padding and dilation of a convolution along one dim."""


def among_patches(first: Line, second: Line, sizes: tuple[int, int]) -> Along:
    """Return how pairs of offsets of two convolutions read their spaces for the same output."""
    (k1, s1, p1, d1), (k2, s2, p2, d2) = first, second
    out = outputs(first, sizes[0])
    found: list[Reading] = []
    for i, j in itertools.product(range(k1), range(k2)):
        turn, a = divmod(i * d1 - p1, s1)
        b = j * d2 - p2 - turn * s2
        bounds = (turn, turn + out), _within(a, s1, sizes[0]), _within(b, s2, sizes[1])
        found.append(((i, j), a, b, *_both(*bounds)))
    return _along(found, (s1, s2), sizes)


def through_units(first: Line, second: Line, sizes: tuple[int, int, int]) -> Along:
    """Return how a convolution reads one space through the units of another before it.

    `sizes` are those of the space, of the units and of the output. Pairs are offsets of the first
    and of the second.
    """
    (k1, s1, p1, d1), (k2, s2, p2, d2) = first, second
    size, units, out = sizes
    found: list[Reading] = []
    for i, j in itertools.product(range(k1), range(k2)):
        unit = j * d2 - p2
        a = unit * s1 + i * d1 - p1
        bounds = (0, out), _within(unit, s2, units), _within(a, s1 * s2, size)
        found.append(((i, j), a, 0, *_both(*bounds)))
    return _along(found, (s1 * s2, 1), (size, out))


def outputs(line: Line, size: int) -> int:
    """Return how many places a convolution writes along a dim of some size."""
    kernel, stride, padding, dilation = line
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def lines(window: Window, kernel: tuple[int, ...]) -> list[Line]:
    """Return the convolution along each spatial dim."""
    return list(zip(kernel, window.stride, window.padding, window.dilation, strict=True))
