"""Every row of the table of operators, held to what it says over calls drawn at random.

A drawn call is related by its row; then, for each axis that the row leaves free, units are gathered
in all inputs, changed one at a time, zeroed, set to a constant and multiplied, and the outputs must
follow as the row says. Wrong rows must be found by the same check.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_flatten, tree_unflatten

from graphgrow.ir import layout, movements, outcome, reductions, rules
from graphgrow.ir.layout import ONE, Atom, Layout, Misaligned, freeze, fresh, settle, unify
from graphgrow.ir.outcome import Call, Kind, Outcome, Row, aten
from graphgrow.ir.rules import row_of

CLOSE = {"rtol": 1e-10, "atol": 1e-10, "equal_nan": True}

# ------------------------------------------------------------------------------ sample calls


@dataclass(frozen=True)
class Entry:
    """Stands for a tensor of a sample call: its shape and which numbers it holds."""

    shape: tuple[int, ...]
    kind: str = "real"
    high: int = 2

    def numbers(self, generator: torch.Generator) -> Tensor:
        """Return a tensor of random numbers."""
        if self.kind == "whole":
            return torch.randint(self.high, self.shape, generator=generator)
        if self.kind == "truth":
            return torch.randint(2, self.shape, generator=generator).bool()
        if self.kind == "certain":
            return torch.randint(2, self.shape, generator=generator).double()
        if self.kind == "start":
            return torch.zeros(self.shape, dtype=torch.long)
        if self.kind == "lengths":
            drawn = torch.randint(1, self.high + 1, self.shape, generator=generator)
            return drawn.sort(descending=True).values
        dtype = torch.complex128 if self.kind == "complex" else torch.double
        drawn = torch.randn(self.shape, generator=generator, dtype=dtype)
        return drawn.abs() + 0.5 if self.kind == "positive" else drawn


@dataclass(frozen=True)
class Sample:
    """A call of an operator. `content` says whether its outputs follow from its inputs.

    A `resizable` call has no argument that tells a size of a free axis.
    """

    func: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    resizable: bool = False
    content: str = "follows"

    def numbers(self, seed: int) -> list[Tensor]:
        """Return tensors for the entries, in order."""
        generator = torch.Generator().manual_seed(seed)
        leaves = tree_flatten((self.args, self.kwargs))[0]
        return [leaf.numbers(generator) for leaf in leaves if isinstance(leaf, Entry)]

    def filled(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with copies of tensors for the entries."""
        leaves, spec = tree_flatten((self.args, self.kwargs))
        rest = iter(tensors)
        made = [next(rest).clone() if isinstance(leaf, Entry) else leaf for leaf in leaves]
        return tree_unflatten(made, spec)

    def run(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return the outputs on changed tensors, which must fit together as those drawn do."""
        try:
            return self.call(tensors).outs
        except RuntimeError as error:
            raise AssertionError(f"{self.func} does not run: {error}") from error

    def call(self, tensors: list[Tensor]) -> Call:
        """Run on the tensors and return what the analysis sees of it."""
        args, kwargs = self.filled(tensors)
        torch.manual_seed(0)
        outs = [t for t in tree_flatten(self.func(*args, **kwargs))[0] if isinstance(t, Tensor)]
        copies = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        dims = {
            id(copy): [fresh(n) for n in t.shape] for copy, t in zip(copies, tensors, strict=True)
        }
        return Call(self.func, args, kwargs, outs, lambda t: dims[id(t)])


Build = Callable[[st.DrawFn, str], Sample]
Shape = tuple[int, ...]


def overload(name: str, which: str = "default") -> torch._ops.OpOverload:
    return getattr(getattr(aten, name), which)


def shapes(least: int, most: int = 4, smallest: int = 1) -> st.SearchStrategy[Shape]:
    """Return shapes whose sizes all differ, and shapes in which they may be equal."""
    different = st.permutations([2, 3, 4, 5])
    any_size = st.integers(smallest, 3)
    return st.integers(least, most).flatmap(
        lambda n: st.one_of(
            different.map(lambda sizes: tuple(sizes[:n])), st.tuples(*[any_size] * n)
        )
    )


def shape_and_dim(draw: st.DrawFn, least: int = 1, smallest: int = 1) -> tuple[Shape, int]:
    shape = draw(shapes(least, 3, smallest))
    return shape, draw(st.integers(-len(shape), len(shape) - 1))


def narrowed(draw: st.DrawFn, shape: Shape) -> Shape:
    """Return a shape that broadcasts to `shape`."""
    flags = draw(st.tuples(*[st.booleans()] * len(shape)))
    sizes = tuple(1 if flag else n for flag, n in zip(flags, shape, strict=True))
    return sizes[draw(st.integers(0, len(shape))) :]


def unary(draw: st.DrawFn, name: str) -> Sample:
    return Sample(overload(name), (Entry(draw(shapes(0))),), resizable=True)


def copied(draw: st.DrawFn, name: str) -> Sample:
    """A copy; a change of precision is one too."""
    dtypes = [None, torch.double, torch.complex128] if name == "_to_copy" else [None]
    dtype = draw(st.sampled_from(dtypes))
    kwargs = {} if dtype is None else {"dtype": dtype}
    return replace(unary(draw, name), kwargs=kwargs)


def binary(draw: st.DrawFn, name: str) -> Sample:
    shape = draw(shapes(0))
    if name in ("add", "sub", "add_", "sub_"):
        if draw(st.integers(0, 4)) == 0:
            return Sample(overload(name, "Scalar"), (Entry(shape), 1.5), resizable=True)
        kwargs = {"alpha": 2} if draw(st.booleans()) else {}
        pair = [Entry(shape), Entry(narrowed(draw, shape))]
        if not name.endswith("_") and draw(st.booleans()):
            pair.reverse()
        return Sample(overload(name, "Tensor"), tuple(pair), kwargs, resizable=True)
    return Sample(overload(name), (Entry(shape), Entry(narrowed(draw, shape))), resizable=True)


def masked(draw: st.DrawFn, name: str) -> Sample:
    shape = draw(shapes(0))
    mask = Entry(narrowed(draw, shape), "truth")
    if name == "where":
        other = Entry(narrowed(draw, shape))
        return Sample(overload(name, "self"), (mask, Entry(shape), other), resizable=True)
    return Sample(overload(name, "Scalar"), (Entry(shape), mask, -2.0), resizable=True)


def prelu(draw: st.DrawFn, name: str) -> Sample:
    shape = draw(shapes(1))
    weight = tuple(n if d == 1 else 1 for d, n in enumerate(shape))
    return Sample(overload(name), (Entry(shape), Entry(weight)), resizable=True)


def filled(draw: st.DrawFn, name: str) -> Sample:
    shape = draw(shapes(0))
    if draw(st.booleans()):
        return Sample(overload(name, "Scalar"), (Entry(shape), 2.0), resizable=True)
    return Sample(overload(name, "Tensor"), (Entry(shape), Entry(())), resizable=True)


def regrouped(draw: st.DrawFn, name: str) -> Sample:
    """A view: one product of small factors grouped in two ways, with ones between."""
    factors = draw(st.lists(st.integers(2, 3), max_size=5))
    before, after = (draw(groupings(factors)) for _ in range(2))
    if name == "unflatten":
        shape, dim = shape_and_dim(draw)
        sizes = draw(groupings(draw(st.lists(st.integers(2, 3), max_size=3))))
        shape = list(shape)
        shape[dim] = math.prod(sizes)
        return Sample(overload(name, "int"), (Entry(tuple(shape)), dim, sizes or [1]))
    if name == "_reshape_alias":
        strides = list(torch.empty(after).stride())
        return Sample(overload(name), (Entry(tuple(before)), after, strides))
    return Sample(overload(name), (Entry(tuple(before)), after))


@st.composite
def groupings(draw: st.DrawFn, factors: list[int]) -> list[int]:
    """Return sizes that group consecutive factors, some of them one."""
    sizes: list[int] = []
    rest = list(factors)
    while rest:
        count = draw(st.integers(0, len(rest)))
        sizes.append(math.prod(rest[:count]))
        rest = rest[max(count, 0) :]
        if count == 0:
            sizes.append(rest.pop(0))
    return sizes + [1] * draw(st.integers(0, 1))


def swapped(draw: st.DrawFn, name: str) -> Sample:
    if name.strip("_") == "t":
        return Sample(overload(name), (Entry(draw(shapes(0, 2))),), resizable=True)
    shape, i = shape_and_dim(draw)
    j = draw(st.integers(-len(shape), len(shape) - 1))
    which = "default" if name.endswith("_") else "int"
    return Sample(overload(name, which), (Entry(shape), i, j), resizable=True)


def permuted(draw: st.DrawFn, name: str) -> Sample:
    shape = draw(shapes(0))
    order = draw(st.permutations(range(len(shape))))
    signs = draw(st.tuples(*[st.booleans()] * len(shape)))
    order = [d - len(shape) if s else d for d, s in zip(order, signs, strict=True)]
    return Sample(overload(name), (Entry(shape), order), resizable=True)


def unsqueezed(draw: st.DrawFn, name: str) -> Sample:
    shape = draw(shapes(0, 3))
    dim = draw(st.integers(-len(shape) - 1, len(shape)))
    return Sample(overload(name), (Entry(shape), dim), resizable=True)


def squeezed(draw: st.DrawFn, name: str) -> Sample:
    shape = draw(st.lists(st.sampled_from([1, 1, 2, 3]), max_size=4).map(tuple))
    every = range(-max(len(shape), 1), max(len(shape), 1))
    which = draw(st.sampled_from(["default", "dim", "dims"]))
    if which == "default":
        return Sample(overload(name), (Entry(shape),))
    one = draw(st.sampled_from(every))
    if which == "dim":
        return Sample(overload(name, which), (Entry(shape), one))
    return Sample(overload(name, which), (Entry(shape), [one]))


def expanded(draw: st.DrawFn, name: str) -> Sample:
    whole = draw(shapes(1))
    shape = narrowed(draw, whole)
    kept = [-1 if draw(st.booleans()) else n for n in shape]
    lead = len(whole) - len(shape)
    sizes = [w if n == 1 else k for w, n, k in zip(whole[lead:], shape, kept, strict=True)]
    return Sample(overload(name), (Entry(shape), [*whole[:lead], *sizes]))


def repeated(draw: st.DrawFn, name: str) -> Sample:
    shape = draw(shapes(0, 3))
    more = draw(st.integers(0, 1))
    times = draw(
        st.lists(st.integers(1, 3), min_size=len(shape) + more, max_size=len(shape) + more)
    )
    return Sample(overload(name), (Entry(shape), times), resizable=True)


def concatenated(draw: st.DrawFn, name: str) -> Sample:
    shape, dim = shape_and_dim(draw)
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    entries = [Entry((*shape[:dim], n, *shape[dim:][1:])) for n in sizes]
    if dim == -1:
        entries = [Entry((*shape[:-1], n)) for n in sizes]
    if draw(st.integers(0, 5)) == 0:
        entries.append(Entry((0,)))
    return Sample(overload(name), (entries, dim), resizable=True)


def stacked(draw: st.DrawFn, name: str) -> Sample:
    shape = draw(shapes(0, 3))
    count, dim = draw(st.integers(1, 3)), draw(st.integers(-len(shape) - 1, len(shape)))
    return Sample(overload(name), ([Entry(shape)] * count, dim), resizable=True)


def pieces(draw: st.DrawFn, name: str) -> Sample:
    shape, dim = shape_and_dim(draw)
    size = shape[dim]
    if name.endswith("chunk"):
        return Sample(overload(name), (Entry(shape), draw(st.integers(1, 4)), dim))
    if name in ("split", "unsafe_split") and draw(st.booleans()):
        return Sample(overload(name, "Tensor"), (Entry(shape), draw(st.integers(1, size)), dim))
    at = sorted(draw(st.lists(st.integers(0, size), max_size=3)))
    sizes = [b - a for a, b in zip([0, *at], [*at, size], strict=True)]
    if name == "unsafe_split":
        name = "unsafe_split_with_sizes"
    which = "sizes" if name == "split" else "default"
    return Sample(overload(name, which), (Entry(shape), sizes, dim))


def gated(draw: st.DrawFn, name: str) -> Sample:
    shape, dim = shape_and_dim(draw)
    sizes = list(shape)
    sizes[dim] *= 2
    return Sample(overload(name), (Entry(tuple(sizes)), dim), resizable=True)


def picked(draw: st.DrawFn, name: str) -> Sample:
    shape, dim = shape_and_dim(draw)
    if name == "unbind":
        return Sample(overload(name, "int"), (Entry(shape), dim))
    at = draw(st.integers(-shape[dim], shape[dim] - 1))
    return Sample(overload(name, "int"), (Entry(shape), dim, at))


def sliced(draw: st.DrawFn, name: str) -> Sample:
    shape, dim = shape_and_dim(draw)
    place = st.none() | st.integers(-6, 6)
    ends = (draw(place), draw(st.none() | st.integers(-6, 6) | st.just(2**63 - 1)))
    step = draw(st.sampled_from([1, 1, 2]))
    return Sample(overload(name, "Tensor"), (Entry(shape), dim, *ends, step))


def reordered(draw: st.DrawFn, name: str) -> Sample:
    shape = draw(shapes(1, 3))
    dims = draw(st.lists(st.sampled_from(range(len(shape))), unique=True))
    signed = [d - len(shape) if draw(st.booleans()) else d for d in dims]
    if name == "flip":
        return Sample(overload(name), (Entry(shape), signed))
    if not dims:
        return Sample(overload(name), (Entry(shape), [draw(st.integers(1, 2))]))
    return Sample(overload(name), (Entry(shape), [1] * len(dims), signed))


def indexed(draw: st.DrawFn, name: str) -> Sample:
    shape = draw(shapes(1, 4))
    to = draw(st.sampled_from([(2,), (3, 1), (1,), (4,)]))
    if name == "index" and draw(st.integers(0, 2)) == 0:
        before, over = draw(st.integers(0, len(shape) - 1)), draw(st.integers(1, 2))
        mask = Entry(shape[before:][:over], "truth")
        return Sample(overload(name, "Tensor"), (Entry(shape), [*[None] * before, mask]))
    indices: list[Entry | None] = [
        Entry(to, "whole", n) if draw(st.booleans()) else None
        for n in shape[: draw(st.integers(1, len(shape)))]
    ]
    if all(i is None for i in indices):
        indices[-1] = Entry(to, "whole", shape[len(indices) - 1])
    return Sample(overload(name, "Tensor"), (Entry(shape), indices))


def selected(draw: st.DrawFn, name: str) -> Sample:
    shape, dim = shape_and_dim(draw)
    index = Entry((draw(st.integers(1, 4)),), "whole", shape[dim])
    return Sample(overload(name), (Entry(shape), dim, index))


def listed(draw: st.DrawFn, name: str) -> Sample:
    shape, dim = shape_and_dim(draw)
    sizes = [draw(st.integers(1, n)) for n in shape]
    sizes[dim] = draw(st.integers(1, 4))
    index = Entry(tuple(sizes), "whole", shape[dim])
    return Sample(overload(name), (Entry(shape), dim, index), resizable=True)


def scattered(draw: st.DrawFn, name: str) -> Sample:
    shape, dim = shape_and_dim(draw)
    sizes = tuple(draw(st.sampled_from([n, n, draw(st.integers(1, n))])) for n in shape)
    index = Entry(sizes, "whole", shape[dim])
    if draw(st.booleans()):
        return Sample(overload(name, "value"), (Entry(shape), dim, index, 2.5), resizable=True)
    return Sample(overload(name, "src"), (Entry(shape), dim, index, Entry(sizes)), resizable=True)


def added(draw: st.DrawFn, name: str) -> Sample:
    """Entries added to, or reduced at, listed positions."""
    shape, dim = shape_and_dim(draw)
    sizes = tuple(draw(st.sampled_from([n, n, draw(st.integers(1, n))])) for n in shape)
    x, index, values = Entry(shape), Entry(sizes, "whole", shape[dim]), Entry(sizes)
    if name == "scatter_add":
        return Sample(overload(name), (x, dim, index, values), resizable=True)
    how = draw(st.sampled_from(["sum", "prod", "mean", "amax", "amin"]))
    kwargs = {"include_self": draw(st.booleans())}
    return Sample(overload(name, "two"), (x, dim, index, values, how), kwargs, resizable=True)


def rows_added(draw: st.DrawFn, name: str) -> Sample:
    shape, dim = shape_and_dim(draw)
    count = draw(st.integers(1, shape[dim] if name == "index_copy" else 4))
    sizes = list(shape)
    sizes[dim] = count
    args = (Entry(shape), dim, Entry((count,), "whole", shape[dim]), Entry(tuple(sizes)))
    if name == "index_reduce":
        args = (*args, draw(st.sampled_from(["prod", "mean", "amax", "amin"])))
        return Sample(overload(name), args, {"include_self": draw(st.booleans())}, resizable=True)
    return Sample(overload(name), args, resizable=True)


def put(draw: st.DrawFn, name: str) -> Sample:
    """Values written, or added, to what `index` would read."""
    sample = indexed(draw, "index")
    x, indices = sample.args
    shape = torch.zeros(x.shape)[
        tuple(slice(None) if i is None else i.numbers(torch.Generator()) for i in indices)
    ].shape
    is_mask = any(i is not None and i.kind == "truth" for i in indices)
    values = Entry(() if is_mask else narrowed(draw, tuple(shape)))
    return Sample(overload(name), (x, indices, values, draw(st.booleans())))


def positions(draw: st.DrawFn, name: str) -> Sample:
    shape = (draw(st.integers(1, 5)),) if name == "bincount" else draw(shapes(1, 3))
    return Sample(overload(name), (Entry(shape, "whole", 2),))


def packed(draw: st.DrawFn, name: str) -> Sample:
    shape, batch_first = draw(shapes(3, 4)), draw(st.booleans())
    lengths = Entry((shape[not batch_first],), "lengths", shape[batch_first])
    return Sample(overload(name), (Entry(shape), lengths, batch_first), resizable=True)


def read(draw: st.DrawFn, name: str) -> Sample:
    return Sample(overload(name), (Entry(()),))


def restrided(draw: st.DrawFn, name: str) -> Sample:
    shape = draw(shapes(1, 3))
    return Sample(overload(name), (Entry(shape), list(shape), list(torch.empty(shape).stride())))


def padded(draw: st.DrawFn, name: str) -> Sample:
    shape = draw(shapes(1, 4))
    count = draw(st.integers(1, len(shape)))
    least = [-((n - 1) // 2) for n in reversed(shape[-count:]) for _ in range(2)]
    amounts = [draw(st.integers(n, 2)) for n in least]
    value = draw(st.sampled_from([(), (0,), (0.0,), (1.5,)]))
    return Sample(overload(name), (Entry(shape), amounts, *value), resizable=min(amounts) >= 0)


def image(draw: st.DrawFn, space: int = 2, smallest: int = 3) -> Shape:
    """Return the shape of a batch of images, or of one without a batch."""
    sizes = draw(st.permutations([2, 3, 4])) if draw(st.booleans()) else [2, 2, 2]
    sides = [draw(st.integers(smallest, 5)) for _ in range(space)]
    return (*sizes[: 2 if draw(st.booleans()) else 1], *sides)


def pixels(draw: st.DrawFn, name: str) -> Sample:
    *lead, c, h, w = draw(shapes(3, 4))
    r = draw(st.integers(1, 3))
    shape = (*lead, c, h * r, w * r) if "un" in name else (*lead, c * r * r, h, w)
    return Sample(overload(name), (Entry(shape), r), resizable=True)


def shuffled(draw: st.DrawFn, name: str) -> Sample:
    n, c, h, w = draw(shapes(4))
    groups = draw(st.integers(1, 3))
    return Sample(overload(name), (Entry((n, c * groups, h, w)), groups))


def windowed(draw: st.DrawFn, name: str) -> Sample:
    shape, dim = shape_and_dim(draw)
    length, step = draw(st.integers(1, shape[dim])), draw(st.integers(1, 3))
    return Sample(overload(name), (Entry(shape), dim, length, step))


def patches(draw: st.DrawFn, name: str) -> Sample:
    n, c, *_ = draw(shapes(2))
    kernel, stride = draw(st.tuples(*[st.sampled_from([[1, 2], [2, 2], [3, 1], [1, 1]])] * 2))
    padding = draw(st.sampled_from([[0, 0], [1, 0]]))
    return Sample(overload(name), (Entry((n, c, 4, 3)), kernel, [1, 1], padding, stride))


def unpatched(draw: st.DrawFn, name: str) -> Sample:
    n, c, *_ = draw(shapes(2))
    (a, b) = kernel = draw(st.sampled_from([[1, 2], [2, 2], [3, 1], [1, 1]]))
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    entry = Entry((*([n] if draw(st.booleans()) else []), c * a * b, rows * columns))
    size = [rows + a - 1, columns + b - 1]
    return Sample(overload(name), (entry, size, kernel, [1, 1], [0, 0], [1, 1]))


def conjugated(draw: st.DrawFn, name: str) -> Sample:
    kind = draw(st.sampled_from(["real", "complex"])) if name.startswith("resolve") else "complex"
    return Sample(overload(name), (Entry(draw(shapes(0)), kind),), resizable=True)


def pairs_seen(draw: st.DrawFn, name: str) -> Sample:
    shape = draw(shapes(0, 3))
    if name == "view_as_real":
        return Sample(overload(name), (Entry(shape, "complex"),), resizable=True)
    return Sample(overload(name), (Entry((*shape, 2)),), resizable=True)


def pairs_made(draw: st.DrawFn, name: str) -> Sample:
    shape = draw(shapes(0))
    return Sample(overload(name), (Entry(shape), Entry(narrowed(draw, shape))), resizable=True)


def transformed(draw: st.DrawFn, name: str) -> Sample:
    """A Fourier transform over some dims; real numbers that come back are odd or even in count."""
    shape = draw(shapes(1, 3))
    dims = draw(st.permutations(range(len(shape))))[: draw(st.integers(1, len(shape)))]
    entry = Entry(shape, "real" if name == "_fft_r2c" else "complex")
    last = {"_fft_c2r": 2 * shape[dims[-1]] - draw(st.integers(1, 2))}.get(name, True)
    return Sample(overload(name), (entry, list(dims), draw(st.integers(0, 2)), max(last, 1)))


def cornered(draw: st.DrawFn, name: str) -> Sample:
    return Sample(overload(name), (Entry(draw(shapes(2))), draw(st.integers(-1, 1))))


def bags(draw: st.DrawFn, name: str) -> Sample:
    """Rows of a table, in two bags; weights of rows go with sums alone."""
    rows, count = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    offsets = Entry((2,), "start")
    mode = draw(st.integers(0, 2))
    weights = Entry((count,)) if mode == 0 and draw(st.booleans()) else None
    table = Entry((rows, draw(st.integers(1, 3))))
    listed = Entry((count,), "whole", rows)
    return Sample(overload(name), (table, listed, offsets, False, mode, False, weights))


def side(name: str) -> int:
    """Return over how many dims an operator goes, as its name says."""
    return next(n for n in (1, 2, 3) if f"{n}d" in name)


def pooled(draw: st.DrawFn, name: str) -> Sample:
    d = side(name)
    shape = image(draw, d)
    if "adaptive" in name:
        return Sample(overload(name), (Entry(shape), [draw(st.integers(1, 3))] * d), resizable=True)
    choices = [(2, 1, 0), (2, 2, 1), (3, 2, 1), (3, 1, 0), (3, 1, 1), (1, 1, 0)]
    kernel, stride, padding = draw(st.sampled_from(choices))
    args = (Entry(shape), [kernel] * d, [stride] * d, [padding] * d)
    if name.startswith("avg"):
        return Sample(overload(name), (*args, False, draw(st.booleans())), resizable=True)
    return Sample(overload(name), args, resizable=True)


def resampled(draw: st.DrawFn, name: str) -> Sample:
    d = side(name)
    shape = draw(shapes(2, 2)) + tuple(draw(st.integers(2, 4)) for _ in range(d))
    sizes = [draw(st.integers(1, 5)) for _ in range(d)]
    corners = () if "nearest" in name else (draw(st.booleans()),)
    return Sample(overload(name), (Entry(shape), sizes, *corners), resizable=True)


def bordered(draw: st.DrawFn, name: str) -> Sample:
    d = side(name)
    amounts = [draw(st.integers(0, 2)) for _ in range(2 * d)]
    return Sample(overload(name), (Entry(image(draw, d)), amounts), resizable=True)


def gridded(draw: st.DrawFn, name: str) -> Sample:
    d = side(name)
    n, c, *_ = draw(shapes(2))
    sides = [draw(st.integers(2, 4)) for _ in range(d)]
    grid = Entry((n, *[draw(st.integers(1, 3)) for _ in range(d)], d))
    how = (draw(st.integers(0, 1)), draw(st.integers(0, 2)), draw(st.booleans()))
    return Sample(overload(name), (Entry((n, c, *sides)), grid, *how), resizable=True)


REDUCTIONS = {
    "max": "default dim",
    "min": "default dim",
    "mean": "default dim",
    "std": "default dim correction",
    "var": "default dim correction",
    "var_mean": "default dim correction",
    "std_mean": "default dim correction",
    "norm": "Scalar ScalarOpt_dim",
    "prod": "default dim_int",
    "any": "default dim dims",
    "all": "default dim dims",
    "median": "default dim",
    "sum": "default dim_IntList",
}


def reduced(draw: st.DrawFn, name: str) -> Sample:
    """A reduction over any dims, its arguments as its schema asks for them."""
    func = overload(name, draw(st.sampled_from(REDUCTIONS.get(name, "default").split())))
    smallest = 2 if name[:3] in ("std", "var") else 1
    shape = draw(shapes(1 if smallest == 2 else 0, 3, smallest))
    truth = name in ("any", "all") and draw(st.booleans())
    args: list[Any] = [Entry(shape, "truth" if truth else "real")]
    kwargs: dict[str, Any] = {}
    for a in func._schema.arguments[1:]:
        value = _reducing(draw, a, len(shape), name)
        if a.kwarg_only and a.name == "correction":
            kwargs[a.name] = draw(st.sampled_from([0, 1]))
        elif not a.kwarg_only:
            args.append(value)
    return Sample(func, tuple(args), kwargs, resizable=True)


def _reducing(draw: st.DrawFn, a: Any, count: int, name: str) -> Any:
    if a.name in ("keepdim", "unbiased"):
        return draw(st.booleans())
    if a.name in ("ord", "p"):
        return draw(st.sampled_from([2, 1, 3.0, float("inf")]))
    if a.name != "dim":
        return None
    every = st.sampled_from(range(-max(count, 1), max(count, 1)))
    if "List" not in str(a.type):
        return draw(every | st.none()) if "Optional" in str(a.type) else draw(every)
    some = draw(st.lists(every, unique_by=lambda d: d % max(count, 1), min_size=1))
    return some


def mixed(draw: st.DrawFn, name: str) -> Sample:
    shape, dim = shape_and_dim(draw)
    if draw(st.integers(0, 9)) == 0 and name != "topk":
        shape, dim = (), draw(st.integers(-1, 0))
    if name in ("_softmax", "_log_softmax"):
        return Sample(overload(name), (Entry(shape), dim, False), resizable=True)
    if name == "topk":
        return Sample(overload(name), (Entry(shape), draw(st.integers(1, shape[dim])), dim))
    if name in ("sort", "argsort") and draw(st.booleans()):
        kwargs = {"stable": True, "dim": dim}
        return Sample(overload(name, "stable"), (Entry(shape),), kwargs, resizable=True)
    return Sample(overload(name), (Entry(shape), dim), resizable=True)


def dropped(draw: st.DrawFn, name: str) -> Sample:
    p = draw(st.sampled_from([0.0, 0.4]))
    x = Entry(draw(shapes(0)))
    if name == "native_dropout":
        content = "random" if p else "follows"
        return Sample(overload(name), (x, p, True), resizable=not p, content=content)
    kind = draw(st.sampled_from(["default", "tensor", "number"]))
    which = {"default": "default", "tensor": "Tensor", "number": "p"}[kind]
    if name == "bernoulli_":
        which = "Tensor" if kind == "tensor" else "float"
    odds: tuple[Any, ...] = () if kind == "default" and name == "bernoulli" else (p,)
    if which == "Tensor":
        odds = (Entry(x.shape, "certain"),)
    if which == "default":
        x = replace(x, kind="certain")
    content = "random" if odds == (0.4,) else "follows"
    return Sample(overload(name, which), (x, *odds), resizable=True, content=content)


def random_like(draw: st.DrawFn, name: str) -> Sample:
    high = (5,) if name == "randint_like" else ()
    return Sample(overload(name), (Entry(draw(shapes(0))), *high), content="random")


def leaked(draw: st.DrawFn, name: str) -> Sample:
    shape, training = draw(shapes(0)), draw(st.booleans())
    content = "undefined" if training else "follows"
    args = (Entry(shape), Entry(shape), 0.1, 0.3, training)
    return Sample(overload(name), args, resizable=not training, content=content)


def batch_normed(draw: st.DrawFn, name: str) -> Sample:
    shape = draw(shapes(2, 4, 2))
    channels = Entry((shape[1],))
    weight, bias = (channels if draw(st.booleans()) else None for _ in range(2))
    kept = (channels, Entry((shape[1],), "positive"))
    args: tuple[Any, ...] = (Entry(shape), weight, bias)
    rest: tuple[Any, ...] = (0.1, 1e-3)
    if "no_training" in name or "update" in name:
        return Sample(overload(name), (*args, *kept, *rest), resizable=True)
    if name == "_native_batch_norm_legit" and draw(st.booleans()):
        return Sample(overload(name, "no_stats"), (*args, True, *rest), resizable=True)
    training = draw(st.booleans())
    if name == "native_batch_norm" and training and draw(st.booleans()):
        kept = (None, None)
    return Sample(overload(name), (*args, *kept, training, *rest), resizable=True)


def layer_normed(draw: st.DrawFn, name: str) -> Sample:
    shape = draw(shapes(1, 4))
    last = shape[-draw(st.integers(1, len(shape))) :]
    weight, bias = (Entry(last) if draw(st.booleans()) else None for _ in range(2))
    return Sample(overload(name), (Entry(shape), list(last), weight, bias, 1e-3), resizable=True)


def group_normed(draw: st.DrawFn, name: str) -> Sample:
    n, inside, *space = draw(shapes(2, 4))
    groups = draw(st.integers(1, 3))
    c = groups * inside
    weight, bias = (Entry((c,)) if draw(st.booleans()) else None for _ in range(2))
    sizes = (n, c, math.prod(space), groups, 1e-3)
    return Sample(overload(name), (Entry((n, c, *space)), weight, bias, *sizes))


def multiplied(draw: st.DrawFn, name: str) -> Sample:
    batch, a, b, c = draw(shapes(4))
    lead = (batch,) if name.endswith("bmm") else ()
    factors = Entry((*lead, a, b)), Entry((*lead, b, c))
    if not name.startswith(("add", "badd")):
        return Sample(overload(name), factors, resizable=True)
    added = Entry(narrowed(draw, (*lead, a, c)))
    scale = draw(st.sampled_from([{}, {}, {"alpha": 0.5}, {"beta": 2}]))
    return Sample(overload(name), (added, *factors), scale, resizable=True)


def vectors(draw: st.DrawFn, name: str) -> Sample:
    a, b = draw(shapes(2, 2))
    first = Entry((b,)) if name == "dot" else Entry((a, b))
    return Sample(overload(name), (first, Entry((b,))), resizable=True)


def linear(draw: st.DrawFn, name: str) -> Sample:
    *lead, i, o = draw(shapes(2, 4))
    bias = (Entry((o,)),) if draw(st.booleans()) else ()
    return Sample(overload(name), (Entry((*lead, i)), Entry((o, i)), *bias), resizable=True)


def trilinear(draw: st.DrawFn, name: str) -> Sample:
    n, i, j, o = draw(shapes(4, 4))
    args = Entry((n, i)), Entry((o, i, j)), Entry((n, j)), [1, 3], [0], [1, 2], [2, 3]
    return Sample(overload(name), args, resizable=True)


def convolved(draw: st.DrawFn, name: str) -> Sample:
    """A convolution of one or two dims, grouped or not, either way."""
    d, groups = draw(st.integers(1, 2)), draw(st.sampled_from([1, 1, 2, 3]))
    n, i, o, _ = draw(st.one_of(st.permutations([1, 2, 3, 4]), st.just([2, 2, 2, 2])))
    transposed = draw(st.booleans())
    kernel = [draw(st.integers(1, 2)) for _ in range(d)]
    stride, padding = draw(st.integers(1, 2)), draw(st.integers(0, 1))
    padding = min(padding, *(k - 1 for k in kernel)) if transposed else padding
    weight = (groups * i, o, *kernel) if transposed else (groups * o, i, *kernel)
    x, bias = Entry((n, groups * i, *[3, 4][:d])), Entry((groups * o,))
    more = [draw(st.integers(0, stride - 1)) if transposed else 0] * d
    each = draw(st.sampled_from([1, d]))  # one number may stand for all dims
    sizes = ([stride] * each, [padding] * each, [1] * d, transposed, more, groups)
    args = (x, Entry(weight), bias if draw(st.booleans()) else None, *sizes)
    flags = (False, False, False, False) if name.startswith("_") else ()
    return Sample(overload(name), (*args, *flags), resizable=groups == 1)


def attended(draw: st.DrawFn, name: str) -> Sample:
    b, h, length, s = draw(shapes(4))
    e, v = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    v = e if "flash" in name else v
    args = (Entry((b, h, length, e)), Entry((b, h, s, e)), Entry((b, h, s, v)))
    masks = [(length, s), (b, h, length, s), (1, h, length, s), (b, 1, length, s)]
    if "math" not in name:
        masks = masks[:2]
    mask = draw(st.none() | st.sampled_from(masks))
    causal = mask is None and length == s and draw(st.booleans())
    kwargs: dict[str, Any] = {"scale": 0.7} if draw(st.booleans()) else {}
    given = None if mask is None else Entry(mask)
    if "math" in name:
        return Sample(overload(name), (*args, given, 0.0, causal), kwargs)
    return Sample(overload(name), (*args, 0.0, causal), {"attn_mask": given, **kwargs})


def looked_up(draw: st.DrawFn, name: str) -> Sample:
    words, features, *lead = draw(shapes(2, 4))
    return Sample(
        overload(name),
        (Entry((words, features)), Entry(tuple(lead), "whole", words)),
        resizable=True,
    )


def made(draw: st.DrawFn, name: str) -> Sample:
    sizes = list(draw(shapes(0)))
    x = () if not name.startswith("new") else (Entry(draw(shapes(0, 2))),)
    number = (2.5,) if "full" in name else ()
    strides = {"strided": [torch.empty(sizes).stride()], "permuted": [range(len(sizes))]}
    extra = [list(s) for key, more in strides.items() if name.endswith(key) for s in more]
    which = {"empty": "memory_format"}.get(name, "default")
    content = "undefined" if "empty" in name else "random" if "rand" in name else "follows"
    return Sample(overload(name, which), (*x, sizes, *number, *extra), content=content)


def made_like(draw: st.DrawFn, name: str) -> Sample:
    number = (2.5,) if "full" in name else ()
    content = "undefined" if "empty" in name else "follows"
    args = (Entry(draw(shapes(0))), *number)
    return Sample(overload(name), args, resizable=True, content=content)


def scalar(draw: st.DrawFn, name: str) -> Sample:
    return Sample(overload(name), (2.5,))


def counted(draw: st.DrawFn, name: str) -> Sample:
    n, m = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    if name == "randint":
        return Sample(overload(name), (5, [n, m]), content="random")
    args = {"linspace": (0, 1, n), "tril_indices": (n, m), "triu_indices": (n, m)}.get(name, (n,))
    return Sample(overload(name), args, content="random" if "rand" in name else "follows")


SAMPLES: dict[Build, str] = {
    unary: "relu relu_ leaky_relu leaky_relu_ neg _neg_view abs tanh tanh_ sin erf atan asinh sinh "
    "tan softshrink zero_ hardswish hardswish_ log_sigmoid_forward",
    copied: "clone _to_copy detach detach_ alias contiguous lift_fresh lift_fresh_copy",
    binary: "add add_ sub sub_ copy_",
    masked: "masked_fill masked_fill_ where",
    prelu: "_prelu_kernel",
    filled: "fill_",
    regrouped: "view _unsafe_view reshape _reshape_alias unflatten",
    swapped: "t transpose t_ transpose_",
    permuted: "permute",
    unsqueezed: "unsqueeze unsqueeze_",
    squeezed: "squeeze squeeze_",
    expanded: "expand",
    repeated: "repeat",
    concatenated: "cat",
    stacked: "stack",
    pieces: "split split_with_sizes chunk unsafe_split unsafe_split_with_sizes unsafe_chunk",
    gated: "glu",
    picked: "select unbind",
    sliced: "slice",
    reordered: "flip roll",
    indexed: "index _unsafe_index",
    selected: "index_select",
    listed: "gather",
    scattered: "scatter",
    added: "scatter_add scatter_reduce",
    rows_added: "index_add index_reduce index_copy",
    put: "index_put",
    positions: "nonzero bincount",
    packed: "_pack_padded_sequence",
    read: "_local_scalar_dense",
    restrided: "as_strided",
    padded: "constant_pad_nd",
    pixels: "pixel_shuffle pixel_unshuffle",
    shuffled: "channel_shuffle native_channel_shuffle",
    patches: "im2col",
    unpatched: "col2im",
    conjugated: "_conj _conj_physical resolve_conj resolve_neg",
    pairs_seen: "view_as_real view_as_complex",
    pairs_made: "complex polar",
    transformed: "_fft_r2c _fft_c2r _fft_c2c",
    cornered: "tril triu",
    bags: "_embedding_bag _embedding_bag_forward_only",
    windowed: "unfold",
    pooled: "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d "
    "avg_pool3d",
    resampled: "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d "
    "upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa _upsample_nearest_exact2d",
    bordered: "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
    "replication_pad2d replication_pad3d",
    gridded: "grid_sampler_2d grid_sampler_3d",
    reduced: "mean amax amin max min std linalg_vector_norm norm var prod any all argmax argmin "
    "logsumexp var_mean std_mean median sum",
    mixed: "_softmax _log_softmax _safe_softmax cumsum sort topk cumprod argsort",
    dropped: "native_dropout bernoulli bernoulli_",
    random_like: "rand_like randn_like uniform_ normal_ randint_like",
    leaked: "rrelu_with_noise rrelu_with_noise_",
    batch_normed: "native_batch_norm _native_batch_norm_legit _batch_norm_with_update "
    "_native_batch_norm_legit_no_training _batch_norm_no_update",
    layer_normed: "native_layer_norm",
    group_normed: "native_group_norm",
    multiplied: "mm bmm addmm baddbmm",
    vectors: "mv dot",
    linear: "linear",
    trilinear: "_trilinear",
    convolved: "convolution _convolution",
    attended: "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_attention_math",
    looked_up: "embedding",
    made: "zeros ones full empty new_zeros new_ones new_full new_empty empty_strided "
    "new_empty_strided empty_permuted rand randn",
    made_like: "zeros_like ones_like full_like empty_like",
    scalar: "scalar_tensor",
    counted: "arange linspace eye tril_indices triu_indices randint randperm",
}
BUILDS = {name: build for build, names in SAMPLES.items() for name in names.split()}

# These kernels exist on accelerators alone; each shares the row of one that runs here.
ELSEWHERE = {
    "cudnn_batch_norm": "native_batch_norm",
    "miopen_batch_norm": "native_batch_norm",
    "_scaled_dot_product_flash_attention": "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention": "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_cudnn_attention": "_scaled_dot_product_flash_attention_for_cpu",
}
# What an operator writes in place has its new shape when the row sees it, so it is never followed.
NEVER_FOLLOWED = ("as_strided_",)


@st.composite
def samples(draw: st.DrawFn, name: str) -> Sample:
    """Return calls of the operator with this name."""
    return BUILDS[name](draw, name)


# ------------------------------------------------------------------------------ the check


@dataclass(frozen=True, eq=False)
class Related:
    """A sample call, its inputs and outputs, and their layouts as the row gives them."""

    sample: Sample
    row: Row
    outcome: Outcome
    tensors: list[Tensor]
    outs: list[Tensor]
    inputs: list[list[Layout]]
    outputs: list[list[Layout]]
    widths: dict[str, int]
    frozen: dict[str, str]
    summed: dict[str, list[tuple[int, int]]]
    mixed: set[str]

    def free(self) -> Iterator[str]:
        """Yield the axes that may change."""
        layouts = [dim for dims in self.inputs + self.outputs for dim in dims]
        for axis, width in self.widths.items():
            powers = any(list(dim.axes()).count(axis) > _terms(dim, axis) for dim in layouts)
            if width and axis not in self.frozen and not powers:
                yield axis

    def units(self, layouts: list[Layout], axis: str) -> list[np.ndarray]:
        return [dim.units(self.widths, axis) for dim in layouts]

    def carriers(self, axis: str) -> list[int]:
        """Return which inputs have the axis."""
        return [i for i, dims in enumerate(self.inputs) if any(axis in d.axes() for d in dims)]


def _terms(dim: Layout, axis: str) -> int:
    return sum(axis in Layout((term,)).axes() for term in dim.terms)


def related(row: Row, sample: Sample, seed: int) -> Related:
    """Run a sample call and relate it by a row; the sizes of the layouts must be the outputs'."""
    tensors = sample.numbers(seed)
    call = sample.call(tensors)
    arguments = call.tensors()
    outcome = row.relate(call)
    dims = [call.of(t) for t in arguments]
    names: dict[Atom, str] = {}
    for parts in [p for ds in [*dims, *outcome.outs] for p in ds]:
        for atom in layout.leaves(parts):
            names.setdefault(atom, f"a{len(names)}")

    def settled(many: Any) -> list[list[Layout]]:
        return [[settle(parts, names.__getitem__) for parts in ds] for ds in many]

    widths = {name: atom.size for atom, name in names.items()}
    outputs = settled(outcome.outs)
    assert [[d.size(widths) for d in ds] for ds in outputs] == [list(o.shape) for o in call.outs]
    summed: dict[str, list[tuple[int, int]]] = {}
    for c in outcome.contracted:
        for atom in layout.leaves(c.over):
            summed.setdefault(names[atom], []).append((c.slot, c.dim))
    frozen = {name: atom.frozen for atom, name in names.items() if atom.frozen is not None}
    over = (outcome.mixed, outcome.standardised)
    mixed = {names[atom] for parts in over for atom in layout.leaves(parts)}
    ins, outs = settled(dims), call.outs
    return Related(sample, row, outcome, tensors, outs, ins, outputs, widths, frozen, summed, mixed)


def check(row: Row, sample: Sample, seed: int) -> None:
    """Assert all that a row says of a sample call, for each axis that it leaves free."""
    r = related(row, sample, seed)
    rng = np.random.default_rng(seed)
    for axis in r.free():
        unit = int(rng.integers(r.widths[axis]))
        if axis in r.mixed:
            check_centred(r, axis, rng)
            continue
        if windows := [w for w in r.outcome.windows if axis in r.outputs[0][w.dim].axes()]:
            check_windows(r, windows[0], unit, rng)
            continue
        if r.sample.content == "follows":
            check_gathered(r, axis, rng)
        if axis in r.summed:
            check_summed(r, axis, rng)
        elif r.sample.content != "undefined":
            check_apart(r, axis, unit, sample.numbers(seed + 1))
            check_content(r, axis, unit)
    if row.kind is Kind.FILL:
        check_filled(r)
    if r.outcome.bias is not None:
        check_bias(r)


def agree(got: list[Tensor], wanted: list[Tensor], what: str) -> None:
    for g, w in zip(got, wanted, strict=True):
        assert_close(g, w, msg=lambda text: f"{what}: {text}", **CLOSE)


def gathered(
    r: Related, tensor: Tensor, layouts: list[Layout], axis: str, units: np.ndarray
) -> Tensor:
    """Return a tensor whose units of one axis are those listed."""
    for d, dim in enumerate(layouts):
        if axis in dim.axes():
            index = torch.from_numpy(dim.origin(r.widths, {axis: units}))
            tensor = tensor.index_select(d, index)
    return tensor


def all_gathered(r: Related, axis: str, units: np.ndarray) -> list[Tensor]:
    return [gathered(r, t, dims, axis, units) for t, dims in zip(r.tensors, r.inputs, strict=True)]


def check_gathered(r: Related, axis: str, rng: np.random.Generator) -> None:
    """Units permuted in all inputs are permuted in the outputs; repeated ones are repeated."""
    width = r.widths[axis]
    units = rng.permutation(width)
    if axis not in r.summed and width > 0:
        count = int(rng.integers(1, width + 3)) if r.sample.resizable else width
        units = rng.integers(width, size=count) if rng.integers(2) else units
    got = r.sample.run(all_gathered(r, axis, units))
    wanted = [gathered(r, o, dims, axis, units) for o, dims in zip(r.outs, r.outputs, strict=True)]
    agree(got, wanted, f"units of {axis} gathered by {units}")


def check_centred(r: Related, axis: str, rng: np.random.Generator) -> None:
    """Units may change places or be doubled; their mean leaves others as they were, rescaled."""
    units = rng.permutation(r.widths[axis])
    for order in (units, np.concatenate([units, units])):
        tensors = all_gathered(r, axis, order)
        wanted = [gathered(r, o, d, axis, order) for o, d in zip(r.outs, r.outputs, strict=True)]
        agree(normed(r, tensors), wanted, f"units of {axis} as {order}")
    if r.sample.func.overloadpacket is aten.native_layer_norm:
        check_mean(r, axis, int(rng.integers(1, 4)))


def check_windows(r: Related, window: outcome.Window, unit: int, rng: np.random.Generator) -> None:
    """Zeros at the ends change nothing; a unit changes those that have it in their windows."""
    x, d, width = r.tensors[0], window.dim, r.tensors[0].shape[window.dim]
    ends = [x.narrow(d, 0, 1).expand(*x.shape[:d], n, *x.shape[d + 1 :]) for n in (1, 2)]
    got = r.sample.run([torch.cat([ends[0] * 0, x, ends[1] * 0], d)])[0].narrow(d, 1, width)
    agree([got], [r.outs[0]], f"dim {d} with zeros at its ends")
    moved = x.index_fill(d, torch.tensor([unit]), float(rng.normal()))
    far = [p for p in range(width) if not p - window.before <= unit <= p + window.after]
    got, wanted = (
        o.index_select(d, torch.tensor(far)) for o in (r.sample.run([moved])[0], *r.outs)
    )
    agree([got], [wanted], f"positions {far} of dim {d} with another {unit}")


def normed(r: Related, tensors: list[Tensor]) -> list[Tensor]:
    """Return what a norm makes of tensors of any width."""
    args, _ = r.sample.filled(tensors)
    x, *rest = args
    if r.sample.func.overloadpacket is aten.native_layer_norm:
        return list(r.sample.func(x, [x.shape[-1]], *rest[1:]))
    if r.sample.func.overloadpacket is aten.native_group_norm:
        return list(r.sample.func(x, *rest[:3], x.shape[1], *rest[4:]))
    return list(r.sample.func(*args))


def check_mean(r: Related, axis: str, more: int) -> None:
    """New units that are the mean leave the others as they were, if weight and eps follow."""
    old = r.widths[axis]
    new, ratio = old + more, old / (old + more)
    args, _ = r.sample.filled(r.tensors)
    x, _, weight, bias, eps = args
    x = torch.cat([x, x.mean(-1, keepdim=True).expand(*x.shape[:-1], more)], -1)
    weight = x.new_ones(old) if weight is None else weight
    weight = torch.cat([weight, weight.new_ones(more)]) * ratio**0.5
    bias = None if bias is None else torch.cat([bias, bias.new_zeros(more)])
    got = r.sample.func(x, [new], weight, bias, eps * ratio)[0]
    agree([got[..., :old]], [r.outs[0]], f"{more} new units of {axis}")
    assert got[..., old:].abs().max() < 1e-12


def touched(r: Related, tensor: Tensor, layouts: list[Layout], axis: str, units: Any) -> Tensor:
    """Return which entries of a tensor belong to the given units of an axis."""
    mask = torch.zeros(tensor.shape, dtype=torch.bool)
    for d, found in enumerate(r.units(layouts, axis)):
        here = torch.from_numpy(np.isin(found, units) & (found >= 0))
        mask |= here.reshape([-1 if k == d else 1 for k in range(tensor.dim())])
    return mask


def changed(
    r: Related, axis: str, unit: int, how: Callable[[int, Tensor], Tensor], real: bool = True
) -> list[Tensor]:
    """Return the inputs with one unit changed in all of them, or in those of numbers alone."""
    return [
        torch.where(touched(r, t, dims, axis, unit), how(i, t), t)
        if t.is_floating_point() or t.is_complex() or not real
        else t
        for i, (t, dims) in enumerate(zip(r.tensors, r.inputs, strict=True))
    ]


def check_apart(r: Related, axis: str, unit: int, other: list[Tensor]) -> None:
    """A unit changed in all inputs changes this unit of the outputs alone."""
    got = r.sample.run(changed(r, axis, unit, lambda i, t: other[i], real=False))
    for g, o, dims in zip(got, r.outs, r.outputs, strict=True):
        mask = touched(r, o, dims, axis, unit)
        agree([g[~mask]], [o[~mask]], f"entries that are not of unit {unit} of {axis}")


def check_summed(r: Related, axis: str, rng: np.random.Generator) -> None:
    """A unit that is zero in one factor is zero in any, and may as well be left out."""
    kept = rng.permutation(r.widths[axis])[: rng.integers(1, r.widths[axis] + 1)]
    results = []
    for slot, dim in r.summed[axis]:
        layouts = [d if k == dim else Layout(((),)) for k, d in enumerate(r.inputs[slot])]
        assert axis in layouts[dim].axes(), f"{axis} is not in dim {dim} of input {slot}"
        mask = touched(r, r.tensors[slot], layouts, axis, kept)
        inputs = list(r.tensors)
        inputs[slot] = inputs[slot] * mask
        results.append(r.sample.run(inputs))
    if r.sample.resizable:
        narrow = r.sample.run(all_gathered(r, axis, kept))
        if r.sample.func.overloadpacket is aten.mean:
            narrow = [out * (len(kept) / r.widths[axis]) for out in narrow]
        results.append(narrow)
    for got in results[1:]:
        agree(got, results[0], f"units of {axis} other than {kept} left out")
    if r.row.kind is Kind.CONTRACT and not r.outcome.border:
        check_even(r, axis, int(rng.integers(r.widths[axis])))


def check_even(r: Related, axis: str, unit: int) -> None:
    """A unit that is one constant adds the same wherever the other factor is the same."""
    slot, other = r.summed[axis][0][0], r.summed[axis][1][0]
    inputs = [list(r.tensors), list(r.tensors)]
    for value, tensors in enumerate(inputs):
        mask = touched(r, tensors[slot], r.inputs[slot], axis, unit)
        tensors[slot] = tensors[slot].masked_fill(mask, float(value))
    zero, one = (r.sample.run(tensors)[0] for tensors in inputs)
    added = one - zero
    theirs = {a for dim in r.inputs[other] for a in dim.axes()}
    for d, dim in enumerate(r.outputs[0]):
        if added.shape[d] and not theirs.intersection(dim.axes()):
            wanted = added.narrow(d, 0, 1).expand_as(added)
            agree([added], [wanted], f"what a constant unit of {axis} adds along dim {d}")
            added = added.narrow(d, 0, 1)
    mask = touched(r, r.tensors[other], r.inputs[other], axis, unit)
    if added.numel():
        agree([added.sum()], [(r.tensors[other] * mask).sum()], f"all that unit {unit} adds")


def check_content(r: Related, axis: str, unit: int) -> None:
    """What a row says of constant, zero and multiplied units holds."""
    kind, row = r.row.kind, r.row
    if kind is Kind.NORM and axis in r.inputs[0][1].axes():
        check_normed(r, axis, unit)
    if kind is Kind.CONTRACT:
        check_unwritten(r, axis, unit)
    if kind in (Kind.NORM, Kind.CONTRACT, Kind.FILL, Kind.RANDOM) or not r.carriers(axis):
        return
    if row.keeps in ("any", "zero"):
        for constant in (0.0, 1.75) if row.keeps == "any" else (0.0,):
            got = r.sample.run(changed(r, axis, unit, lambda i, t: torch.full_like(t, constant)))  # noqa: B023
            expect(r, axis, unit, got, lambda o: torch.full_like(o, constant))  # noqa: B023
    for factor in factors(r, axis):
        got = r.sample.run(changed(r, axis, unit, lambda i, t: t * factor))  # noqa: B023
        expect(r, axis, unit, got, lambda o: o * factor)  # noqa: B023


def factors(r: Related, axis: str) -> list[float]:
    """Return by what a unit may be multiplied: any number where it is moved."""
    row = r.row
    if row.kind is Kind.POINTWISE:
        packet = r.sample.func.overloadpacket
        whole = len(r.carriers(axis)) == len(r.tensors)
        plain = packet not in ADDED or len(r.sample.args) == len(r.tensors)
        if not (whole and plain):
            return []
    found = [2.5] if row.homogeneous else []
    if row.odd or (row.homogeneous and row.kind is Kind.MOVE):
        found.append(-1.0)
    return found


ADDED = {aten.add, aten.add_, aten.sub, aten.sub_}


def expect(
    r: Related, axis: str, unit: int, got: list[Tensor], wanted: Callable[[Tensor], Tensor]
) -> None:
    """Assert what one unit holds in those outputs that are numbers and have the axis."""
    for g, o, dims in zip(got, r.outs, r.outputs, strict=True):
        if o.is_floating_point() or o.is_complex():
            mask = touched(r, o, dims, axis, unit)
            agree([g[mask]], [wanted(o)[mask]], f"unit {unit} of {axis}")


def check_filled(r: Related) -> None:
    """A filled tensor with free axes holds one number."""
    if r.sample.content != "follows":
        return
    for o, dims in zip(r.outs, r.outputs, strict=True):
        if any(axis not in r.frozen for dim in dims for axis in dim.axes()):
            assert (o == o.reshape(-1)[0]).all()


def check_normed(r: Related, axis: str, unit: int) -> None:
    """A constant unit is constant after a norm, and its bias where the norm uses the batch."""
    x, weight, bias, mean, var = _norm_parts(r.sample, r.tensors)
    constant = torch.where(touched(r, x, r.inputs[0], axis, unit), 1.75, x)
    out = r.sample.run([constant, *r.tensors[1:]])[0]
    w, b = (1.0 if weight is None else weight[unit]), (0.0 if bias is None else bias[unit])
    batch = torch.as_tensor(b, dtype=torch.double)
    eps = r.sample.args[-1]
    wanted = batch if mean is None else w * (1.75 - mean[unit]) / (var[unit] + eps) ** 0.5 + b
    agree([out[:, unit]], [torch.as_tensor(wanted).expand_as(out[:, unit])], f"unit {unit}")


def _norm_parts(sample: Sample, tensors: list[Tensor]) -> list[Any]:
    """Return input, weight, bias, and the mean and variance where these are not the batch's."""
    args, _ = sample.filled(tensors)
    name = str(sample.func)
    flags = [a for a in args if isinstance(a, bool)]
    batch = flags[0] if flags else "with_update" in name
    return [*args[:3], None, None] if batch else list(args[:5])


def check_unwritten(r: Related, axis: str, unit: int) -> None:
    """A kept unit that is zero in any one factor holds what is added to it alone."""
    slots = [s for s in r.carriers(axis) if s != r.outcome.bias]
    products = [s for s in range(len(r.tensors)) if s != r.outcome.bias]
    nothing = [t * 0 if s in products else t for s, t in enumerate(r.tensors)]
    added = r.sample.run(nothing)[0]
    for slot in slots:
        inputs = list(r.tensors)
        mask = touched(r, inputs[slot], r.inputs[slot], axis, unit)
        inputs[slot] = inputs[slot].masked_fill(mask, 0)
        out = r.sample.run(inputs)[0]
        here = touched(r, out, r.outputs[0], axis, unit)
        agree([out[here]], [added[here]], f"unit {unit} of {axis}, zero in input {slot}")


def check_bias(r: Related) -> None:
    """What is added to a unit of the bias is added to this unit of the output."""
    slot = r.outcome.bias
    assert slot is not None
    bias, dims, out = r.tensors[slot], r.inputs[slot], r.outs[0]
    raised = [t + 1 if s == slot else t for s, t in enumerate(r.tensors)]
    if any(axis in r.frozen for dim in dims for axis in dim.axes()) or not bias.dim():
        return
    agree(r.sample.run(raised), [out + 1], "a raised bias")
    for axis in {a for dim in dims for a in dim.axes()}:
        mask = touched(r, bias, dims, axis, 0)
        raised[slot] = torch.where(mask, bias + 1, bias)
        here = touched(r, out, r.outputs[0], axis, 0)
        agree(r.sample.run(raised), [torch.where(here, out + 1, out)], f"unit 0 of {axis} raised")


# ------------------------------------------------------------------------------ the rows hold

seeds = st.integers(0, 2**16)
# Where arguments decide how dims relate, more calls are drawn.
CAREFUL = (regrouped, concatenated, pieces, sliced, indexed, padded, group_normed, convolved)
CAREFUL += (attended, multiplied, squeezed, batch_normed)


def few(share: int) -> settings:
    """Return settings for a share of the profile's examples."""
    return settings(max_examples=max(settings().max_examples // share, 5))


def row_named(name: str) -> Row:
    return rules.ROWS[getattr(aten, name)]


def test_every_row_has_sample_calls() -> None:
    known = {packet.__name__ for packet in rules.ROWS}
    assert known <= {*BUILDS, *ELSEWHERE, *NEVER_FOLLOWED}
    assert set(BUILDS) <= known, "a sample call has lost its row"


@pytest.mark.parametrize("name", BUILDS)
def test_a_row_says_what_its_operator_does(name: str) -> None:
    @few(4 if BUILDS[name] in CAREFUL else 10)
    @given(samples(name), seeds)
    def holds(sample: Sample, seed: int) -> None:
        check(row_named(name), sample, seed)

    holds()


@pytest.mark.parametrize("name", [n for n in ELSEWHERE if hasattr(aten, n)])
def test_kernels_of_accelerators_share_a_row_that_is_tested(name: str) -> None:
    assert ELSEWHERE[name] in BUILDS
    assert row_named(name) == row_named(ELSEWHERE[name])
    first, second = (
        [a.name for a in overload(n)._schema.arguments[:3]] for n in (name, ELSEWHERE[name])
    )
    assert first == second


REFUSED = {
    "strides by hand": Sample(aten.as_strided.default, (Entry((2, 2)), [2, 2], [1, 2])),
    "an offset by hand": Sample(aten.as_strided.default, (Entry((2, 2)), [1, 2], [2, 1], 2)),
    "strides in place": Sample(aten.as_strided_.default, (Entry((2, 2)), [2, 2], [1, 2])),
    "other factors": Sample(aten.view.default, (Entry((4, 3)), [6, 2])),
    "other bits": Sample(aten.view.dtype, (Entry((2, 3)), torch.long)),
    "no entries": Sample(aten.view.default, (Entry((2, 0, 3)), [0])),
    "whole numbers": Sample(aten._to_copy.default, (Entry((2,)),), {"dtype": torch.long}),
    "a number": Sample(aten.unfold.default, (Entry(()), 0, 1, 1)),
    "a count": Sample(aten.linalg_vector_norm.default, (Entry((2, 3)), 0, [1])),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_related_is_refused(what: str) -> None:
    sample = REFUSED[what]
    row = row_of(sample.func)
    assert row is not None
    with pytest.raises(Misaligned):
        related(row, sample, 0)


# ------------------------------------------------------------------------------ the pointwise row

TENSORS = ("Tensor",), ("Tensor", "Tensor"), ("Tensor", "Tensor", "Tensor")
WHOLE = ("bitwise", "shift", "gcd", "lcm", "__i", "__xor")


def pointwise_operators() -> list[torch._ops.OpOverload]:
    """Return the operators of the pointwise row that need tensors and nothing else."""
    found = []
    for packet in (getattr(aten, name) for name in dir(aten)):
        for which in packet.overloads() if hasattr(packet, "overloads") else ():
            func = getattr(packet, which)
            needed = tuple(str(a.type) for a in func._schema.arguments if not a.has_default_value())
            given_back = "out" in which.lower() or which == "grad_input"
            masked = packet.__name__ in ("where", "masked_fill", "masked_fill_")
            if row_of(func) is rules.POINTWISE and needed in TENSORS and not given_back | masked:
                found.append(func)
    return found


OPERATORS = {str(func): func for func in pointwise_operators()}


@st.composite
def pointwise(draw: st.DrawFn) -> Sample:
    """Return calls of any pointwise operator, its first input of the output's shape."""
    func = draw(st.sampled_from(list(OPERATORS.values())))
    kind = "whole" if any(word in str(func) for word in WHOLE) else "real"
    shape = draw(shapes(0))
    count = sum(not a.has_default_value() for a in func._schema.arguments)
    written = any(a.alias_info is not None for a in func._schema.arguments)
    rest = [shape if draw(st.booleans()) else narrowed(draw, shape) for _ in range(count - 1)]
    entries = [Entry(s, kind) for s in (shape, *rest)]
    if not written and draw(st.booleans()):
        entries.reverse()
    kwargs: dict[str, Any] = {}
    if any(word in str(func) for word in ("clip", "clamp")) and count == 1:
        kwargs["min"] = Entry(narrowed(draw, shape)) if "Tensor" in str(func) else 0.3
    return Sample(func, tuple(entries), kwargs, resizable=True)


@given(pointwise(), seeds)
def test_the_pointwise_row_holds_for_every_operator_tagged_so(sample: Sample, seed: int) -> None:
    check(rules.POINTWISE, sample, seed)


def test_hundreds_of_operators_are_pointwise() -> None:
    assert len(OPERATORS) > 200


def test_an_operator_without_a_row_has_none() -> None:
    assert row_of(aten.cross.default) is None


def test_writing_in_place_has_the_row_of_not_doing_so() -> None:
    assert row_of(aten.cumsum_.default) is row_of(aten.cumsum.default)


# ------------------------------------------------------------------------------ the rows say enough


PLAIN = ([1], [0], [1], False, [0])
UPWARD = ([1], [0], [1], True, [0])
CPU_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default


def t(*shape: int, kind: str = "real", high: int = 2) -> Entry:
    return Entry(shape, kind, high)


# Layouts of inputs and outputs as they are to be; an axis with a mark is frozen.
SAID: tuple[tuple[torch._ops.OpOverload, tuple[Any, ...], str], ...] = (
    (aten.relu.default, (t(2, 3),), "a b -> a b"),
    (aten.add.Tensor, (t(2, 3), t(3)), "a b, b -> a b"),
    (aten.add.Tensor, (t(2, 3), t(2, 1)), "a b, a c! -> a b"),
    (aten.log_sigmoid_forward.default, (t(2),), "a -> a, a"),
    (aten.view.default, (t(2, 3, 4), [6, 4]), "a b c -> (a b) c"),
    (aten.view.default, (t(6, 4), [2, 3, 4]), "(a b) c -> a b c"),
    (aten.view.default, (t(6, 4), [3, 8]), "(a b) c -> a (b c)"),
    (aten.view.default, (t(2, 1, 3), [2, 3]), "a b! c -> a c"),
    (aten.t.default, (t(2, 3),), "a b -> b a"),
    (aten.transpose.int, (t(2, 3, 4), 0, -1), "a b c -> c b a"),
    (aten.permute.default, (t(2, 3, 4), [2, 0, 1]), "a b c -> c a b"),
    (aten.unsqueeze.default, (t(2, 3), 1), "a b -> a 1 b"),
    (aten.squeeze.dim, (t(2, 1), 1), "a b! -> a"),
    (aten.expand.default, (t(1, 3), [2, 4, 3]), "a! b -> c d b"),
    (aten.repeat.default, (t(2, 3), [2, 1, 4]), "a b -> c! a (d! b)"),
    (aten.cat.default, ([t(2, 3), t(4, 3)],), "a b, c b -> (a + c) b"),
    (aten.stack.default, ([t(2, 3), t(2, 3)], 1), "a b, a b -> a c! b"),
    (aten.split.Tensor, (t(5, 3), 2), "(a + b + c) d -> a d, b d, c d"),
    (aten.glu.default, (t(2, 6), 1), "a (b + b) -> a b"),
    (aten.select.int, (t(2, 3), 1, 0), "a b! -> a"),
    (aten.unbind.int, (t(2, 3),), "a! b -> b, b"),
    (aten.slice.Tensor, (t(2, 5), 1, 1, 3), "a (b + c + d) -> a c"),
    (aten.slice.Tensor, (t(2, 5), 1, 0, 5, 2), "a b! -> a c!"),
    (aten.flip.default, (t(2, 3), [1]), "a b! -> a b!"),
    (aten.roll.default, (t(2, 3, 4), [1], [-1]), "a b c! -> a b c!"),
    (aten.index.Tensor, (t(2, 3, 4), [None, t(5, kind="whole")]), "a b! c, d! -> a e! c"),
    (aten.index_select.default, (t(2, 3), 1, t(4, kind="whole")), "a b!, c! -> a d!"),
    (aten.gather.default, (t(2, 3), 1, t(2, 4, kind="whole")), "a b!, a c! -> a c!"),
    (aten.gather.default, (t(2, 3), 1, t(1, 4, kind="whole")), "(a + b) c!, a d! -> a d!"),
    (aten.constant_pad_nd.default, (t(2, 3), [1, 0]), "a b -> a (c! + b)"),
    (aten.constant_pad_nd.default, (t(2, 3), [1, 0], 1.0), "a! b! -> a! (c! + b!)"),
    (aten.pixel_shuffle.default, (t(2, 12, 3, 5), 2), "a (b c! d!) e f -> a b (e c!) (f d!)"),
    (aten.pixel_unshuffle.default, (t(2, 3, 4, 6), 2), "a b (c d!) (e f!) -> a (b d! f!) c e"),
    (aten.channel_shuffle.default, (t(2, 6, 1, 1), 3), "a (b c) d e -> a (c b) d e"),
    (aten.clone.default, (t(2, 3),), "a b -> a b"),
    (aten.as_strided.default, (t(2, 3), [2, 3], [3, 1]), "a b -> a b"),
    (
        aten.im2col.default,
        (t(2, 3, 4, 5), [2, 2], [1, 1], [0, 0], [1, 1]),
        "a b c! d! -> a (b e! f!) g!",
    ),
    (aten.unfold.default, (t(2, 5, 3), 1, 2, 1), "a b! c -> a d! c e!"),
    (
        aten.col2im.default,
        (t(2, 12, 12), [4, 5], [2, 2], [1, 1], [0, 0], [1, 1]),
        "a (b c! d!) e! -> a b f! g!",
    ),
    (aten.view_as_real.default, (t(2, 3, kind="complex"),), "a b -> a b c!"),
    (aten.view_as_complex.default, (t(2, 3, 2),), "a b c! -> a b"),
    (aten._fft_r2c.default, (t(2, 3, 5), [2], 0, True), "a b c! -> a b d!"),
    (aten._fft_c2c.default, (t(2, 3, kind="complex"), [1], 0, True), "a b! -> a b!"),
    (aten.tril.default, (t(2, 3, 4),), "a b! c! -> a b! c!"),
    (
        aten._embedding_bag.default,
        (t(5, 3), t(4, kind="whole"), t(2, kind="start")),
        "a! b, c!, d! -> e! b, f!, g!, h!",
    ),
    (aten.avg_pool2d.default, (t(2, 3, 4, 5), [2, 2]), "a b c! d! -> a b e! f!"),
    (aten.avg_pool2d.default, (t(2, 3, 4, 5), [3, 1], [1, 1], [1, 0]), "a b c d -> a b c d"),
    (
        aten.avg_pool2d.default,
        (t(2, 3, 4, 5), [3, 1], [1, 1], [1, 0], False, False),
        "a b c! d -> a b e! d",
    ),
    (aten.max_pool2d_with_indices.default, (t(3, 4, 5), [2, 2]), "a b! c! -> a d! e!, a f! g!"),
    (
        aten.grid_sampler_2d.default,
        (t(2, 3, 4, 5), t(2, 6, 7, 2), 0, 0, False),
        "a! b c! d!, e! f! g! h! -> a! b i! j!",
    ),
    (aten.mean.dim, (t(2, 3, 4), [1]), "a b c -> a c"),
    (aten.amax.default, (t(2, 3, 4), [-1, 0], True), "a! b c! -> 1 b 1"),
    (aten.sum.dim_IntList, (t(2, 3, 4), [1]), "a b c -> a c"),
    (
        aten.scatter.value,
        (t(2, 5, 4), 1, t(2, 3, 4, kind="whole"), 0.0),
        "a b! c, a d! c -> a b! c",
    ),
    (
        aten.scatter_add.default,
        (t(2, 5, 4), 1, t(2, 3, 4, kind="whole"), t(2, 3, 4)),
        "a b! c, a d! c, a e! c -> a b! c",
    ),
    (aten.nonzero.default, (t(2, 3),), "a! b! -> c! d!"),
    (
        aten.index_add.default,
        (t(2, 5, 4), 1, t(3, kind="whole"), t(2, 3, 4)),
        "a b! c, d!, a e! c -> a b! c",
    ),
    (
        aten.index_put.default,
        (t(2, 5, 4), [None, t(3, kind="whole")], t(3, 4)),
        "a b! c, d!, e! c -> a b! c",
    ),
    (
        aten._pack_padded_sequence.default,
        (t(3, 2, 4), t(2, kind="lengths", high=3), False),
        "a! b! c, d! -> e! c, f!",
    ),
    (aten.norm.ScalarOpt_dim, (t(2, 3, 4), 2, [1]), "a b c -> a c"),
    (aten.norm.ScalarOpt_dim, (t(2, 3, 4), -1, [1]), "a b! c -> a c"),
    (aten._to_copy.default, (t(2, 3),), "a b -> a b"),
    (aten._softmax.default, (t(2, 3), -1, False), "a b! -> a b!"),
    (aten.topk.default, (t(2, 5), 3), "a b! -> a c!, a d!"),
    (aten.native_dropout.default, (t(2, 3), 0.5, True), "a b -> a b, a b"),
    (
        aten.native_batch_norm.default,
        (t(2, 3, 4), t(3), t(3), t(3), t(3), True, 0.1, 1.0),
        "a! b c!, b, b, b, b -> a! b c!, b, b",
    ),
    (
        aten.native_layer_norm.default,
        (t(2, 3, 4), [4], None, None, 1.0),
        "a b c -> a b c, a b 1, a b 1",
    ),
    (
        aten.native_layer_norm.default,
        (t(2, 3, 4), [4], t(4), t(4), 1.0),
        "a b c, c, c -> a b c, a b 1, a b 1",
    ),
    (
        aten.native_group_norm.default,
        (t(2, 6, 4), t(6), t(6), 2, 6, 4, 3, 1.0),
        "a (b c) d!, (b c), (b c) -> a (b c) d!, a b, a b",
    ),
    (
        aten.native_group_norm.default,
        (t(2, 3, 4), t(3), None, 2, 3, 4, 3, 1.0),
        "a b c!, b -> a b c!, a b, a b",
    ),
    (aten.mm.default, (t(2, 3), t(3, 4)), "a b, b c -> a c"),
    (aten.bmm.default, (t(5, 2, 3), t(5, 3, 4)), "a b c, a c d -> a b d"),
    (aten.addmm.default, (t(4), t(2, 3), t(3, 4)), "a, b c, c a -> b a"),
    (aten.mv.default, (t(2, 3), t(3)), "a b, b -> a"),
    (aten.linear.default, (t(2, 5, 3), t(4, 3), t(4)), "a b c, d c, d -> a b d"),
    (
        aten._trilinear.default,
        (t(2, 3), t(4, 3, 5), t(2, 5), [1, 3], [0], [1, 2], [2, 3]),
        "a b, c b d, a d -> a c",
    ),
    (
        aten.convolution.default,
        (t(2, 3, 7), t(4, 3, 2), t(4), *PLAIN, 1),
        "a b c!, d b e!, d -> a d f!",
    ),
    (
        aten.convolution.default,
        (t(2, 6, 7), t(4, 3, 2), t(4), *PLAIN, 2),
        "a (b c) d!, (b e) c f!, (b e) -> a (b e) g!",
    ),
    (
        aten.convolution.default,
        (t(2, 3, 7), t(6, 1, 2), t(6), *PLAIN, 3),
        "a b c!, (b d) e! f!, (b d) -> a (b d) g!",
    ),
    (
        aten.convolution.default,
        (t(2, 3, 7), t(3, 4, 2), t(4), *UPWARD, 1),
        "a b c!, b d e!, d -> a d f!",
    ),
    (
        aten.convolution.default,
        (t(2, 6, 7), t(6, 4, 2), t(8), *UPWARD, 2),
        "a (b c) d!, (b c) e f!, (b e) -> a (b e) g!",
    ),
    (
        CPU_ATTENTION,
        (t(2, 3, 4, 5), t(2, 3, 6, 5), t(2, 3, 6, 5)),
        "a b c d, a b e! d, a b e! f -> a b c f, a b c",
    ),
    (
        CPU_ATTENTION,
        (t(2, 3, 4, 5), t(2, 3, 4, 5), t(2, 3, 4, 5), 0.0, True),
        "a b c! d, a b e! d, a b e! f -> a b c! f, a b c!",
    ),
    (aten.embedding.default, (t(7, 3), t(2, 5, kind="whole")), "a! b, c! d! -> c! d! b"),
    (aten.zeros.default, ([2, 1, 3],), "-> a 1 b"),
    (aten.zeros_like.default, (t(2, 3),), "a b -> a b"),
    (aten.arange.default, (4,), "-> a!"),
)


def said(sample: Sample) -> str:
    """Return what the row of a call says of its layouts, in letters."""
    row = row_of(sample.func)
    assert row is not None
    r = related(row, sample, 0)
    order = [a for dims in r.inputs + r.outputs for dim in dims for a in dim.axes()]
    letters = {a: "abcdefghijklmnopq"[i] for i, a in enumerate(dict.fromkeys(order))}
    marks = {a: letters[a] + "!" * (a in r.frozen) for a in letters}

    def text(dim: Layout) -> str:
        words = str(dim)
        for axis in sorted(marks, key=len, reverse=True):
            words = words.replace(axis, f"<{axis}>")
        for axis, mark in marks.items():
            words = words.replace(f"<{axis}>", mark)
        return words

    sides = [", ".join(" ".join(map(text, dims)) for dims in s) for s in (r.inputs, r.outputs)]
    return " -> ".join(sides).strip()


@pytest.mark.parametrize(("func", "args", "layouts"), SAID, ids=[str(c[0]) for c in SAID])
def test_layouts_are_related_as_written(
    func: torch._ops.OpOverload, args: tuple[Any, ...], layouts: str
) -> None:
    assert said(Sample(func, args)) == layouts


def test_every_relation_is_written_down() -> None:
    written = {row_of(func).relate for func, *_ in SAID}
    assert {row.relate for row in rules.ROWS.values()} <= written


# ------------------------------------------------------------------------------ wrong rows


def cat_backwards(c: Call) -> Outcome:
    """As cat, with the pieces in the wrong order."""
    (dims,) = movements.cat(c).outs
    at = c.arg(1, "dim", 0) % len(dims)
    return Outcome([[tuple(reversed(p)) if d == at else p for d, p in enumerate(dims)]])


def glu_untied(c: Call) -> Outcome:
    """As glu, with the gates free to be others than those of the values."""
    x, d = c.args[0], c.arg(1, "dim", -1)
    value, _ = layout.cut(c.of(x)[d], [c.outs[0].shape[d]] * 2)
    dims = list(c.of(x))
    dims[d] = value
    return Outcome([dims])


def shuffle_in_place(c: Call) -> Outcome:
    """As channel_shuffle, with the factors joined in their old order."""
    x, groups = c.args
    parts = layout.split(c.of(x)[1], [groups, x.shape[1] // groups])
    dims = list(c.of(x))
    dims[1] = layout.join(parts)
    return Outcome([dims])


def layer_norm_free(c: Call) -> Outcome:
    """As layer_norm, with nothing frozen."""
    return Outcome([list(c.of(c.args[0])), *(outcome.all_computed(o) for o in c.outs[1:])])


def group_norm_free(c: Call) -> Outcome:
    """As group_norm, with the channels of a group free."""
    for t in c.args[1:3]:
        if isinstance(t, Tensor):
            unify(c.of(t)[0], c.of(c.args[0])[1])
    dims = c.of(c.args[0])
    for parts in (dims[0], *dims[2:]):
        freeze(parts, "is left out of what is wrong here")
    return Outcome([list(dims), *(outcome.all_computed(o) for o in c.outs[1:])])


def batch_norm_untied(c: Call) -> Outcome:
    """As a batch norm, with a bias of its own."""
    wrong = replace_call(c, args=(*c.args[:2], None, *c.args[3:]))
    return reductions.batch_norm(wrong)


def replace_call(c: Call, args: tuple[Any, ...]) -> Call:
    return Call(c.func, args, c.kwargs, c.outs, c.of)


def convolution_untied(c: Call) -> Outcome:
    """As a grouped convolution whose output's groups are not the input's."""
    x, w = c.args[:2]
    groups = c.args[8]
    right = reductions.convolution(replace_call(c, (x, w, *c.args[2:8], groups)))
    out = [right.outs[0][0], fresh(c.outs[0].shape[1]), *right.outs[0][2:]]
    return replace(right, outs=[out])


def transposed_swapped(c: Call) -> Outcome:
    """As a convolution that takes every weight for one that is not transposed."""
    return reductions.convolution(replace_call(c, (*c.args[:6], False, *c.args[7:])))


def border_unseen(c: Call) -> Outcome:
    """As a convolution that never pads."""
    return replace(reductions.convolution(c), border=False)


def addmm_unscaled(c: Call) -> Outcome:
    """As addmm, taken for a product that is not scaled."""
    return reductions._product(c, 1, 0)


def linear_unpaired(c: Call) -> Outcome:
    """As linear, with the columns of the weight not tied to the input's features."""
    x, w = c.args[:2]
    over = (
        outcome.Contracted(0, x.dim() - 1, c.of(x)[-1]),
        outcome.Contracted(1, 1, c.of(x)[-1]),
    )
    return Outcome([[*c.of(x)[:-1], c.of(w)[0]]], over)


def unbiased(c: Call) -> Outcome:
    """As linear, with the bias in the input's place."""
    right = reductions.linear(c)
    return right if right.bias is None else replace(right, bias=1)


def borders_uncounted(c: Call) -> Outcome:
    """As an average, its divisor taken for the same at the border."""
    return reductions.averaged(replace_call(c, c.args[:4]))


def windows_unseen(c: Call) -> Outcome:
    """As an average that leaves units apart."""
    return replace(reductions.averaged(c), windows=())


def flattened(c: Call) -> Outcome:
    """As a view that makes new axes of what it splits."""
    return Outcome([[ONE if n == 1 else fresh(n) for n in c.outs[0].shape]])


def row_like(name: str, **facets: Any) -> Row:
    return replace(row_named(name), **facets)


MUTANTS: dict[str, tuple[str, Row]] = {
    "pieces in the wrong order": ("cat", row_like("cat", relate=cat_backwards)),
    "softmax as pointwise": ("_softmax", rules.POINTWISE),
    "a largest that mixes nothing": ("amax", row_like("amax", relate=reductions.sum_)),
    "cumsum as pointwise": ("cumsum", rules.POINTWISE),
    "sort as pointwise": ("sort", rules.POINTWISE),
    "gates of other units": ("glu", row_like("glu", relate=glu_untied)),
    "glu keeps constants": ("glu", row_like("glu", keeps="any")),
    "a shuffle that stays": (
        "channel_shuffle",
        row_like("channel_shuffle", relate=shuffle_in_place),
    ),
    "a layer norm that freezes nothing": (
        "native_layer_norm",
        row_like("native_layer_norm", relate=layer_norm_free),
    ),
    "a group norm that freezes nothing": (
        "native_group_norm",
        row_like("native_group_norm", relate=group_norm_free),
    ),
    "a bias of other channels": (
        "native_batch_norm",
        row_like("native_batch_norm", relate=batch_norm_untied),
    ),
    "groups that are not tied": (
        "convolution",
        row_like("convolution", relate=convolution_untied),
    ),
    "a transposed weight taken for none": (
        "convolution",
        row_like("convolution", relate=transposed_swapped),
    ),
    "a border that is not seen": ("convolution", row_like("convolution", relate=border_unseen)),
    "a scale that is not seen": ("addmm", row_like("addmm", relate=addmm_unscaled)),
    "factors that are not paired": ("linear", row_like("linear", relate=linear_unpaired)),
    "a weight taken for the bias": ("linear", row_like("linear", relate=unbiased)),
    "a view that forgets": ("view", row_like("view", relate=flattened)),
    "an average over padding keeps constants": ("avg_pool2d", row_like("avg_pool2d", keeps="any")),
    "a divisor that stays": ("avg_pool2d", row_like("avg_pool2d", relate=borders_uncounted)),
    "windows that are not seen": ("avg_pool2d", row_like("avg_pool2d", relate=windows_unseen)),
    "padding keeps constants": ("constant_pad_nd", row_like("constant_pad_nd", keeps="any")),
    "a deviation keeps constants": ("std", row_like("std", keeps="any")),
    "a variance is homogeneous": ("var", row_like("var", homogeneous=True)),
    "sums of entries keep constants": ("scatter_add", row_like("scatter_add", keeps="any")),
    "sums of rows keep constants": ("index_add", row_like("index_add", keeps="any")),
    "products are homogeneous": ("scatter_reduce", row_like("scatter_reduce", homogeneous=True)),
    "products of rows as well": ("index_reduce", row_like("index_reduce", homogeneous=True)),
    "writing keeps zero": ("index_put", row_like("index_put", keeps="zero")),
    "rows added that stay free": ("index_add", row_like("index_add", relate=movements.same)),
    "exp keeps zero": ("exp", Row(movements.broadcast, Kind.SEPARATE, "zero")),
    "relu is odd": ("relu", row_like("relu", odd=True)),
    "tanh is homogeneous": ("tanh", row_like("tanh", homogeneous=True)),
    "clone is a new tensor": ("clone", row_like("clone", kind=Kind.FILL)),
    "arange as a free axis": ("arange", rules.FILL),
    "indices that stay free": ("flip", row_like("flip", relate=movements.same)),
    "a swap that is none": ("transpose", row_like("transpose", relate=movements.same)),
}
BUILDS_OF_MUTANTS: dict[str, Build] = {**BUILDS, "exp": unary}


@pytest.mark.parametrize("what", MUTANTS)
def test_a_wrong_row_is_found(what: str) -> None:
    name, row = MUTANTS[what]
    drawn = st.composite(lambda draw: BUILDS_OF_MUTANTS[name](draw, name))()

    @settings(
        max_examples=100,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    @given(drawn, seeds)
    def holds(sample: Sample, seed: int) -> None:
        with contextlib.suppress(Misaligned):
            check(row, sample, seed)

    with pytest.raises(AssertionError):
        holds()
