"""What a layer reads, position by position, and products of it summed over positions.

Patches are made for a few examples at a time, so that memory does not grow with the batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ENTRIES = 1 << 23  # numbers in one chunk of what is read: 32 MiB in float32


@dataclass(frozen=True)
class Window:
    """How a convolution reads space: one number for each spatial dim."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1


def patches(x: Tensor, window: Window, kernel: tuple[int, ...], bias: bool = False) -> Tensor:
    """Return what a convolution reads: `(groups, in/groups · kernel, n, *positions)`.

    `x` is `(n, in, *space)`; entries are in the row-major order of the weight. With `bias`, a last
    entry is one everywhere.
    """
    n, channels, *space = x.shape
    x = F.pad(x, [p for pad in reversed(window.padding) for p in (pad, pad)])
    spans = zip(space, window.padding, window.dilation, kernel, window.stride, strict=True)
    out = [(s + 2 * p - d * (k - 1) - 1) // t + 1 for s, p, d, k, t in spans]
    strides = x.stride()
    steps = [s * t for s, t in zip(strides[2:], window.stride, strict=True)]
    offsets = [s * d for s, d in zip(strides[2:], window.dilation, strict=True)]
    inside = channels // window.groups
    view = x.as_strided(
        (window.groups, inside, *kernel, n, *out),
        (strides[1] * inside, strides[1], *offsets, strides[0], *steps),
    )
    entries = inside * math.prod(kernel)
    if not bias:
        return view.reshape(window.groups, entries, n, *out)
    made = x.new_empty(window.groups, entries + 1, n, *out)
    made[:, entries] = 1
    made[:, :entries].view(window.groups, inside, *kernel, n, *out).copy_(view)
    return made


def rows(x: Tensor, examples: int, bias: bool = False) -> Tensor:
    """Return what a linear layer reads, `(1, in, n, positions)`; `x` is `(n · positions, in)`."""
    if bias:
        x = F.pad(x, (0, 1), value=1.0)
    return x.reshape(examples, -1, x.shape[-1]).permute(2, 0, 1)[None]


def channels(v: Tensor, groups: int, examples: int, convolved: bool) -> Tensor:
    """Return a layer's output by group: `(groups, out/groups, n, *positions)`."""
    if not convolved:
        return v.reshape(examples, -1, v.shape[-1]).permute(2, 0, 1)[None]
    return v.movedim(1, 0).unflatten(0, (groups, -1))


def chunks(tensors: list[Tensor], examples: int, size: int) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield consecutive pieces of all tensors along their first dims, with how many examples.

    All first dims are multiples of the examples, or pieces are larger. `size` is how many numbers
    the patches of all examples have; those of a piece have no more than `ENTRIES`, where possible.
    """
    groups = math.gcd(examples, *(t.shape[0] for t in tensors))
    step = max(1, groups * ENTRIES // max(size, 1))
    for start in range(0, groups, step):
        end = min(start + step, groups)
        cut = [t[t.shape[0] // groups * start : t.shape[0] // groups * end] for t in tensors]
        yield examples // groups * (end - start), cut


def reads(window: Window, kernel: tuple[int, ...]) -> int:
    """Return how often a convolution reads one position at most."""
    return math.prod(
        max(_reads(k, t, d)) for k, t, d in zip(kernel, window.stride, window.dilation, strict=True)
    )


def _reads(kernel: int, stride: int, dilation: int) -> list[int]:
    places = [k * dilation % stride for k in range(kernel)]
    return [places.count(place) for place in range(stride)]


def offsets(
    window: Window, kernel: tuple[int, ...], space: list[int], out: list[int]
) -> Iterator[tuple[tuple[int, ...], Any, Any]]:
    """Yield each kernel offset with where it reads: slices of the space and of the positions.

    Only positions that read inside the space are in them.
    """
    sizes = zip(kernel, window.stride, window.padding, window.dilation, space, out, strict=True)
    ranges = [[(k, *_inside(k * d - p, t, s, o)) for k in range(n)] for n, t, p, d, s, o in sizes]
    for choice in itertools.product(*ranges):
        yield tuple(c[0] for c in choice), tuple(c[1] for c in choice), tuple(c[2] for c in choice)


def _inside(start: int, stride: int, space: int, out: int) -> tuple[slice, slice]:
    """Return the places `start + j · stride` inside `space` and the positions j, as slices."""
    first = max(0, -(start // stride))
    last = min(out - 1, (space - 1 - start) // stride)
    if last < first:
        return slice(0, 0), slice(0, 0)
    read = slice(start + first * stride, start + last * stride + 1, stride)
    return read, slice(first, last + 1)


@dataclass(frozen=True, eq=False)
class Pool:
    """A linear operator on the positions of each unit, and the units' dim before and after it.

    `positions` are the sizes that it is written for, of all dims but the first and the units'.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    before: int
    after: int
    positions: tuple[int, ...]


def tap(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Return the offset of a kernel's centre, the first of two."""
    return tuple((k - 1) // 2 for k in kernel)


def in_place(window: Window, kernel: tuple[int, ...]) -> bool:
    """Return whether a convolution's positions are those of its space, seen from the centre."""
    sizes = zip(kernel, tap(kernel), window.padding, window.dilation, strict=True)
    whole = all(2 * p == d * (k - 1) and c * d == p for k, c, p, d in sizes)
    return whole and set(window.stride) == {1}


def centred(x: Tensor, kernel: tuple[int, ...], window: Window) -> Tensor:
    """Return what a filter of each unit's own gives if it has a one at its centre alone.

    `x` is `(n, units, *space)`.
    """
    units = x.shape[1]
    weight = x.new_zeros(units, 1, *kernel)
    weight[(slice(None), 0, *tap(kernel))] = 1
    plain = (False, (0,) * len(kernel), units)
    return torch.convolution(
        x, weight, None, window.stride, window.padding, window.dilation, *plain
    )


def pooled(x: Tensor, pool: Pool) -> Tensor:
    """Return patches after linear pooling, entries taken for units: `(g, e, n, *positions)`."""
    shape, moved = x.shape[:2], x.flatten(0, 1)  # (g·e, n, *positions)
    if moved.dim() != 2 + len(pool.positions):
        moved = moved.reshape(*moved.shape[:2], *pool.positions)
    units = moved.movedim(0, pool.before)
    moved = pool.func(units, *pool.args, **pool.kwargs).movedim(pool.after, 0)
    return moved.reshape(*shape, *moved.shape[1:])


def gram(x: Tensor, y: Tensor) -> Tensor:
    """Return the sums over positions of products of entries: `(g, e, n, ...)` gives `(g, e, f)`."""
    return x.flatten(2) @ y.flatten(2).mT


def mapped(x: Tensor, v: Tensor, window: Window, kernel: tuple[int, ...]) -> Tensor:
    """Return products of what units could read and what a convolution of them wants.

    `x` is `(g, e, n, *space)` for each of g parts of a unit, `v` `(g, out, n, *positions)`; g may
    be 1 in one of them. The result is `(g, e, out · kernel)`: at each offset, the places that the
    convolution reads times
    what it wants where it reads them.
    """
    found = x.new_zeros(max(len(x), len(v)), x.shape[1], v.shape[1], *kernel)
    for offset, read, at in offsets(window, kernel, list(x.shape[3:]), list(v.shape[3:])):
        found[(..., *offset)] = gram(x[(..., *read)], v[(..., *at)])
    return found.flatten(2)


def summable(tensor: Tensor) -> Tensor:
    """Return the tensor in a type that sums of products may be taken in: float32 at least."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
