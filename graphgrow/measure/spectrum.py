"""Sums of products at all distances at once, by Fourier transforms.

A distance is a product of spectra: a few multiplications for each pair of channels, instead of one
for each place and distance. Transforms are padded so that nothing comes around.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from graphgrow.measure.distances import Along
from graphgrow.measure.image import Image

Offset = tuple[int, ...]


def lags(
    x: Image, y: Image, along: Sequence[Along], wanted: Sequence[Offset]
) -> Iterator[tuple[Offset, slice, Tensor]]:
    """Yield sums of products for whole stretches, one number for each dim.

    They come in parts `(g, e, f)`: some of the channels of x, as the slice says.
    """
    steps = tuple(zip(*(a.steps for a in along), strict=True))
    lengths = _lengths(x, y, along, wanted)
    for (one, other), found in _by_phase(along, wanted).items():
        here = x.spectrum(one, steps[0], lengths)
        there = y.spectrum(other, steps[1], lengths)
        reached = [sorted({lag[d] for lag in found}) for d in range(len(along))]
        for rows in _cut(x.channels, len(there) * y.values.shape[1]):
            sums = _back(here[..., rows].mH @ there, lengths, reached)
            for lag, numbers in found.items():
                at = tuple(places.index(n) for places, n in zip(reached, lag, strict=True))
                yield numbers, rows, sums[at]


def _cut(channels: int, size: int) -> Iterator[slice]:
    """Yield even parts of channels, each of which has `size` numbers in a product of spectra."""
    rows = math.ceil(channels / math.ceil(channels * size / PRODUCT))
    yield from (slice(start, start + rows) for start in range(0, channels, rows))


def cheaper(x: Image, y: Image, along: Sequence[Along], wanted: Sequence[Offset]) -> bool:
    """Return whether spectra take less time than products of all whole stretches.

    Counts multiplications of a pair of channels: complex ones at the rate of products, and what
    transforms and small products take besides, by measurement.
    """
    if not wanted or min(x.examples, *x.space, *y.space) < 2:
        return False
    places = 0
    for numbers in wanted:
        stretches = [a.stretches[n] for a, n in zip(along, numbers, strict=True)]
        places += math.prod(s.high - s.low for s in stretches)
    lengths = _lengths(x, y, along, wanted)
    frequencies = math.prod(lengths[:-1]) * (lengths[-1] // 2 + 1)
    phases = _by_phase(along, wanted)
    pairs = x.channels * y.channels
    transforms = TRANSFORM * x.examples * frequencies
    transforms *= x.channels * len({x for x, _ in phases}) + y.channels * len(
        {y for _, y in phases}
    )
    spectral = frequencies * len(phases) * (4 * x.examples + BACK) * pairs + transforms
    return spectral < (places * x.examples + OVERHEAD * len(wanted)) * pairs


TRANSFORM = 200  # multiplications that one frequency of one channel takes the time of
PRODUCT = 3 << 20  # numbers in a product of spectra: allocators reuse what is below 32 MiB
BACK = 80  # multiplications that take the time of transforming one frequency back
OVERHEAD = 60  # multiplications that take the time of adding one product to a sum


def _by_phase(
    along: Sequence[Along], wanted: Sequence[Offset]
) -> dict[tuple[Offset, Offset], dict[Offset, Offset]]:
    """Return, for the first places of x and y, the distances in steps and their numbers."""
    found: dict[tuple[Offset, Offset], dict[Offset, Offset]] = {}
    for numbers in wanted:
        stretches = [a.stretches[n] for a, n in zip(along, numbers, strict=True)]
        turns = [
            (*divmod(s.a, a.steps[0]), *divmod(s.b, a.steps[1]))
            for s, a in zip(stretches, along, strict=True)
        ]
        phases = tuple(t[1] for t in turns), tuple(t[3] for t in turns)
        found.setdefault(phases, {})[tuple(t[0] - t[2] for t in turns)] = numbers
    return found


def _lengths(x: Image, y: Image, along: Sequence[Along], wanted: Sequence[Offset]) -> Offset:
    spaces = enumerate(zip(along, x.space, y.space, strict=True))
    return tuple(_length(a, m, n, {numbers[d] for numbers in wanted}) for d, (a, m, n) in spaces)


def _length(along: Along, x: int, y: int, wanted: set[int]) -> int:
    """Return a length of transforms that keeps all wanted distances of one dim apart."""
    distances = [
        s.a // along.steps[0] - s.b // along.steps[1] for s in (along.stretches[n] for n in wanted)
    ]
    x, y = (-(-size // step) for size, step in zip((x, y), along.steps, strict=True))
    least = max(x, y, x - min(distances), y + max(distances))
    return next(n for n in itertools.count(least + least % 2, 2) if _smooth(n))


def _smooth(number: int) -> bool:
    for prime in (2, 3, 5, 7, 11, 13, 17):
        while number % prime == 0:
            number //= prime
    return number == 1


def _back(product: Tensor, lengths: Offset, reached: list[list[int]]) -> Tensor:
    """Return sums at distances `(*distances, g, e, f)` of a product of spectra."""
    shape = product.shape[1:]
    counts = [*lengths[:-1], lengths[-1] // 2 + 1]
    found = product.reshape(*counts, -1)
    for dim in reversed(range(len(lengths))):
        length, count = lengths[dim], counts[dim]
        turns = torch.outer(torch.tensor(reached[dim]), torch.arange(count)).double()
        weights = torch.polar(torch.full_like(turns, 1 / length), turns * (-2 * math.pi / length))
        if dim == len(lengths) - 1:
            weights[:, 1 : (length + 1) // 2] *= 2  # the other half of a real signal's spectrum
        done = math.prod(counts[:dim])
        inverse = weights.to(found).expand(done, -1, -1)
        found = inverse.bmm(found.reshape(done, count, -1))
    return found.real.reshape(*map(len, reached), *shape)
