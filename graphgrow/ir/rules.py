"""What is known of each ATen operator: one row each.

A row relates the layouts of an operator's inputs to those of its outputs (`relate`) and says how it
treats the units of an axis (`kind`), so that a proof can follow new units through it. An operator
without a row freezes what it touches. All pointwise operators share one row, by `torch.Tag`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from graphgrow.ir import layout
from graphgrow.ir.layout import ONE, Composition, Misaligned, freeze, fresh, unify

aten = torch.ops.aten
KERNEL = "is a kernel size"
SPATIAL = "is a size computed by the model"
OVER = "is normalised over"
PADDING = "is padding"
PIXELS = "is the side of a block of pixels"
Dims = list[Composition]


class Kind(Enum):
    """How an operator treats the units of an axis that it keeps, or contracts."""

    POINTWISE = "computes each entry from the entries at its place"
    SEPARATE = "computes each unit from the same unit"
    MOVE = "moves entries"
    NORM = "normalises each unit by its own statistics"
    CENTER = "normalises units by the mean and spread of all"
    CONTRACT = "sums products over units"
    SUM = "sums over units"
    ATTEND = "sums values, weighted by products of queries and keys"
    GATHER = "looks up rows"
    FILL = "fills a new tensor"
    RANDOM = "draws random numbers"
    OVERWRITTEN = "is another view of what was written in place"


@dataclass(eq=False)
class Call:
    """One ATen call as it is seen: the arguments, the results, and the layouts known so far.

    `strides` are those that the tensor arguments had before the call, which may set them in place.
    """

    func: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: list[Tensor]
    of: Callable[[Tensor], Dims]
    strides: tuple[tuple[int, ...], ...] = ()

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """Return an argument given by position or by name."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)

    def tensors(self) -> list[Tensor]:
        """Return the tensors among the arguments, in order."""
        return [t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]


@dataclass(frozen=True)
class Contracted:
    """A dim of the input tensor number `slot` over which products are summed."""

    slot: int
    dim: int
    over: Composition


@dataclass(frozen=True)
class Window:
    """A dim of the first output where each entry is a sum over a window of the input's entries.

    The window reaches `before` and `after` positions beyond the entry's own, over zeros where it
    leaves the dim, unless the input was padded there by something else.
    """

    dim: int
    before: int
    after: int


@dataclass(frozen=True)
class Outcome:
    """The layouts of the outputs, and what a contraction sums over.

    `batched` is the layout that both factors keep; `bias` the slot of an added per-unit input;
    `border` is true where a constant unit adds something else than the sum of its weights: less
    near zero padding, a multiple where the product is scaled. `mixed` is the dim whose units a norm
    compares with each other, `standardised` one that it may compare in a parameter, whose numbers
    are known; `windows` are dims along which units are added to those beside them.
    """

    outs: Sequence[Dims]
    contracted: tuple[Contracted, ...] = ()
    batched: Composition = ONE
    bias: int | None = None
    border: bool = False
    mixed: Composition = ONE
    standardised: Composition = ONE
    windows: tuple[Window, ...] = ()


@dataclass(frozen=True)
class Row:
    """All that is known of one operator.

    `keeps` says which constant content of a unit survives: "any" constant stays as it is, "zero"
    alone stays, "none". `homogeneous`: a unit times a positive number gives the output times it;
    `odd`: a unit times −1 gives the output times −1.
    """

    relate: Callable[[Call], Outcome]
    kind: Kind
    keeps: str = "none"
    homogeneous: bool = False
    odd: bool = False


def row_of(func: torch._ops.OpOverload) -> Row | None:
    """Return the row of an operator, None where none is known.

    An operator that writes in place has the row of the one that does not.
    """
    packet = func.overloadpacket
    if packet not in ROWS and packet.__name__.endswith("_"):
        packet = getattr(aten, packet.__name__[:-1], packet)
    if packet in ROWS:
        return ROWS[packet]
    overloads = [func, *(getattr(packet, name) for name in packet.overloads())]
    return POINTWISE if any(torch.Tag.pointwise in f.tags for f in overloads) else None


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """Return what weight norm makes of direction and length: a weight, and its norms."""
    norm = v.norm(2, [d for d in range(v.dim()) if d != dim], keepdim=True)
    return v * (g / norm), norm


# fused operators that are seen as those they consist of
TAKEN_APART: dict[torch._ops.OpOverload, Callable[..., Any]] = {
    aten._weight_norm_interface.default: _weight_norm
}


# --- pointwise -----------------------------------------------------------------------------------


def broadcast(c: Call) -> Outcome:
    """Align the inputs' dims from the last; equal sizes are one axis."""
    return Outcome([_aligned(c, out, c.tensors()) for out in c.outs])


def _aligned(c: Call, out: Tensor, tensors: list[Tensor]) -> Dims:
    dims: Dims = []
    for d in range(-out.dim(), 0):
        found = [c.of(t)[d] for t in tensors if t.dim() >= -d and t.shape[d] == out.shape[d]]
        for t in tensors:
            if t.dim() >= -d and t.shape[d] != out.shape[d]:
                freeze(c.of(t)[d], layout.ONE_ONLY)
        new = ONE if out.shape[d] == 1 else fresh(out.shape[d])
        dims.append(_one(found) if found else new)
    return dims


def _one(found: list[Composition]) -> Composition:
    for other in found[1:]:
        unify(found[0], other)
    return found[0]


def _free(size: int) -> Composition:
    return ONE if size == 1 else fresh(size, SPATIAL)


# --- movement ------------------------------------------------------------------------------------


def same(c: Call) -> Outcome:
    """Give every output of the input's shape the input's layout."""
    x = c.tensors()[0]
    return Outcome([list(c.of(x)) for _ in c.outs])


def restride(c: Call) -> Outcome:
    """Keep the layout where shape and strides stay; others mean other units."""
    x, (out,) = c.args[0], c.outs
    before = c.strides[0] if c.strides else x.stride()
    if (x is out and not c.strides) or len(before) != out.dim() or x.shape != out.shape:
        raise Misaligned("strides are set by hand")
    stays = all(a == b for a, b, n in zip(before, out.stride(), out.shape, strict=True) if n > 1)
    if not stays or out.storage_offset() != x.storage_offset():
        raise Misaligned("strides are set by hand")
    return same(c)


def convert(c: Call) -> Outcome:
    """Keep the layout; real numbers that are cut to whole ones are other numbers."""
    if c.args[0].is_floating_point() and not c.outs[0].is_floating_point():
        raise Misaligned("real numbers are cut to whole ones")
    return same(c)


def view(c: Call) -> Outcome:
    """Flatten and split runs of dims."""
    x, (out,) = c.args[0], c.outs
    if x.dtype != out.dtype:
        raise Misaligned("its bits are read as other numbers")
    if x.numel() == 0 and x.shape != out.shape:
        raise Misaligned("a tensor without entries is reshaped")
    return Outcome([regroup(c.of(x), list(x.shape), list(out.shape))])


def regroup(dims: Dims, before: list[int], after: list[int]) -> Dims:
    """Return the layouts of dims of sizes `before` viewed as `after`."""
    out: Dims = []
    for i, j in _runs(before, after):
        sizes, run = after[j], dims[i]
        if before[i] == sizes:
            out.extend(run)
            continue
        joined = layout.join(run)
        out.extend(_split_ones(joined, sizes))
    return out


def _split_ones(joined: Composition, sizes: list[int]) -> Dims:
    real = [s for s in sizes if s != 1]
    if not real:
        freeze(joined, "has width one and is reshaped")
        return [ONE for _ in sizes]
    parts = iter([joined] if len(real) == 1 else layout.split(joined, real))
    return [ONE if s == 1 else next(parts) for s in sizes]


def _runs(before: list[int], after: list[int]) -> Iterator[tuple[slice, slice]]:
    """Yield the shortest runs of dims with equal products on both sides."""
    i = j = 0
    while i < len(before) or j < len(after):
        a, b = i, j
        p = before[i] if i < len(before) else 1
        q = after[j] if j < len(after) else 1
        i, j = min(i + 1, len(before)), min(j + 1, len(after))
        while p != q:
            if p < q:
                p, i = p * before[i], i + 1
            else:
                q, j = q * after[j], j + 1
        yield slice(a, i), slice(b, j)


def transpose(c: Call) -> Outcome:
    """Swap two dims."""
    dims = list(c.of(c.args[0]))
    i, j = (0, 1) if len(c.args) == 1 else (c.args[1], c.args[2])
    if len(dims) > 1:
        dims[i], dims[j] = dims[j], dims[i]
    return Outcome([dims])


def permute(c: Call) -> Outcome:
    """Reorder the dims."""
    dims = c.of(c.args[0])
    return Outcome([[dims[i] for i in c.args[1]]])


def unsqueeze(c: Call) -> Outcome:
    """Insert a dim of size one."""
    dims = list(c.of(c.args[0]))
    dims.insert(c.args[1] % (len(dims) + 1), ONE)
    return Outcome([dims])


def squeeze(c: Call) -> Outcome:
    """Drop dims of size one."""
    before = c.of(c.args[0])
    asked = c.arg(1, "dim", list(range(len(before))))
    asked = asked if isinstance(asked, list | tuple) else [asked]
    asked = [d % len(before) for d in asked if before]
    dims: Dims = []
    for d, parts in enumerate(before):
        if d in asked and layout.size_of(parts) == 1:
            freeze(parts, "has width one and is squeezed away")
        else:
            dims.append(parts)
    return Outcome([dims])


def expand(c: Call) -> Outcome:
    """Repeat dims of size one without copying."""
    return Outcome([_aligned(c, c.outs[0], [c.args[0]])])


def repeat(c: Call) -> Outcome:
    """Tile every dim a fixed number of times."""
    x, times = c.args[0], list(c.args[1])
    dims = [ONE] * (len(times) - x.dim()) + list(c.of(x))
    tiled = [d if n == 1 else layout.join([_free(n), d]) for n, d in zip(times, dims, strict=True)]
    return Outcome([tiled])


def cat(c: Call) -> Outcome:
    """Concatenate along one dim; the others are one axis each."""
    tensors = [t for t in c.args[0] if t.dim() == c.outs[0].dim() and t.numel()]
    at = c.arg(1, "dim", 0) % c.outs[0].dim()
    dims: Dims = []
    for d in range(c.outs[0].dim()):
        found = [c.of(t)[d] for t in tensors]
        dims.append(tuple(term for p in found for term in p) if d == at else _one(found))
    return Outcome([dims])


def stack(c: Call) -> Outcome:
    """Stack equal layouts along a new dim."""
    tensors, out = c.args[0], c.outs[0]
    at = c.arg(1, "dim", 0) % out.dim()
    dims = [_one([c.of(t)[d] for t in tensors]) for d in range(out.dim() - 1)]
    dims.insert(at, _free(len(tensors)))
    return Outcome([dims])


def split(c: Call) -> Outcome:
    """Cut one dim into consecutive pieces."""
    x = c.args[0]
    d = c.arg(2, "dim", 0) % x.dim()
    pieces = layout.cut(c.of(x)[d], [out.shape[d] for out in c.outs])
    return Outcome([_replace(c.of(x), d, p) for p in pieces])


def glu(c: Call) -> Outcome:
    """Gate the first half of a dim by the second, unit by unit."""
    x, out = c.args[0], c.outs[0]
    d = c.arg(1, "dim", -1) % x.dim()
    value, gate = layout.cut(c.of(x)[d], [out.shape[d]] * 2)
    unify(value, gate)
    return Outcome([_replace(c.of(x), d, value)])


def _replace(dims: Dims, d: int, parts: Composition) -> Dims:
    return [*dims[:d], parts, *dims[d + 1 :]]


def pick(c: Call) -> Outcome:
    """Take single positions of one dim."""
    x = c.args[0]
    d = c.arg(1, "dim", 0) % x.dim()
    freeze(c.of(x)[d], "is picked from by position")
    return Outcome([_replace(c.of(x), d, ONE)[:d] + list(c.of(x)[d + 1 :]) for _ in c.outs])


def slice_(c: Call) -> Outcome:
    """Take a range of one dim."""
    x, out = c.args[0], c.outs[0]
    d = c.arg(1, "dim", 0) % x.dim()
    size, kept, step = x.shape[d], out.shape[d], c.arg(4, "step", 1)
    if size == kept:
        return Outcome([list(c.of(x))])
    if step != 1:
        freeze(c.of(x)[d], "is sliced with a step")
        return Outcome([_replace(c.of(x), d, _free(kept))])
    start = c.arg(2, "start") or 0
    start = min(max(start + size if start < 0 else start, 0), size)
    pieces = layout.cut(c.of(x)[d], [start, kept, size - start - kept])
    return Outcome([_replace(c.of(x), d, pieces[1])])


def reorder(c: Call) -> Outcome:
    """Keep the layouts; the dims named change the order of their positions."""
    x = c.args[0]
    dims = c.args[1] if c.func.overloadpacket is aten.flip else c.arg(2, "dims")
    for d in dims or range(x.dim()):
        freeze(c.of(x)[d % x.dim()], "changes its order")
    return Outcome([list(c.of(x))])


def index(c: Call) -> Outcome:
    """Index some dims by tensors; the other dims stay."""
    x, indices, out = c.args[0], list(c.args[1]), c.outs[0]
    used = _indexed(indices)
    for d in used:
        freeze(c.of(x)[d], "is indexed by a tensor")
    for i in indices:
        if i is not None:
            _freeze_indices(c, i)
    kept = [p for d, p in enumerate(c.of(x)) if d not in used]
    new = [_free(s) for s in _index_shape(x, used, out)]
    at = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    return Outcome([kept[:at] + new + kept[at:]])


def _indexed(indices: list[Tensor | None]) -> list[int]:
    """Return the dims that are indexed; a mask takes as many as it has."""
    used: list[int] = []
    d = 0
    for i in indices:
        span = i.dim() if i is not None and i.dtype in (torch.bool, torch.uint8) else 1
        used.extend(range(d, d + span) if i is not None else ())
        d += span
    return used


def _freeze_indices(c: Call, indices: Tensor) -> None:
    for parts in c.of(indices):
        freeze(parts, "lists positions of another tensor")


def _index_shape(x: Tensor, used: list[int], out: Tensor) -> list[int]:
    count = out.dim() - (x.dim() - len(used))
    at = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    return list(out.shape[at : at + count])


def index_select(c: Call) -> Outcome:
    """Take listed positions of one dim."""
    x, d = c.args[0], c.args[1] % c.args[0].dim()
    freeze(c.of(x)[d], "is indexed by a tensor")
    _freeze_indices(c, c.args[2])
    return Outcome([_replace(c.of(x), d, _free(c.outs[0].shape[d]))])


def gather(c: Call) -> Outcome:
    """Take listed positions of one dim, others at each place of the other dims."""
    x, d, listed = c.args[0], c.args[1], c.args[2]
    if x.dim() == 0:
        return Outcome([[ONE]] if listed.dim() else [[]])
    freeze(c.of(x)[d % x.dim()], "is indexed by a tensor")
    freeze(c.of(listed)[d % x.dim()], "lists positions of another tensor")
    for k, (parts, places) in enumerate(zip(c.of(x), c.of(listed), strict=True)):
        if k != d % x.dim():
            unify(layout.cut(parts, [listed.shape[k], x.shape[k] - listed.shape[k]])[0], places)
    return Outcome([list(c.of(listed))])


def scatter(c: Call) -> Outcome:
    """Write or add to listed positions of one dim; the others stay where all are written."""
    x, d, written = c.args[0], c.args[1] % max(c.args[0].dim(), 1), c.tensors()[1:]
    for tensor in written:
        for k, parts in enumerate(c.of(tensor)):
            if k == d or tensor.shape[k] != x.shape[k]:
                freeze(parts, "lists positions of another tensor")
                freeze(c.of(x)[k], "is indexed by a tensor")
            else:
                unify(parts, c.of(x)[k])
    return same(c)


def found(c: Call) -> Outcome:
    """List the positions of entries that are not zero."""
    for parts in c.of(c.args[0]):
        freeze(parts, "lists positions of another tensor")
    return Outcome([_frozen(out) for out in c.outs])


def index_add(c: Call) -> Outcome:
    """Write or add whole rows to listed positions of one dim; the other dims stay."""
    x, d, rows = c.args[0], c.args[1] % max(c.args[0].dim(), 1), c.args[3]
    _freeze_indices(c, c.args[2])
    if x.dim() and rows.dim() == x.dim():
        freeze(c.of(x)[d], "is indexed by a tensor")
        freeze(c.of(rows)[d], "lists positions of another tensor")
        for k, parts in enumerate(c.of(rows)):
            if k != d:
                unify(parts, c.of(x)[k])
    return same(c)


def index_put(c: Call) -> Outcome:
    """Write values where some dims are indexed by tensors; the other dims stay."""
    x, values = c.args[0], c.args[2]
    shape = x[tuple(slice(None) if i is None else i for i in c.args[1])]
    places = index(replace(c, outs=[shape])).outs[0]
    for parts, place in zip(reversed(c.of(values)), reversed(places), strict=False):
        if layout.size_of(parts) == layout.size_of(place):
            unify(parts, place)
        else:
            freeze(parts, layout.ONE_ONLY)
    return same(c)


def pack(c: Call) -> Outcome:
    """Lay the positions of sequences of several lengths in a row, without those behind the ends."""
    x, lengths = c.args[:2]
    for parts in (*c.of(x)[:2], *c.of(lengths)):
        freeze(parts, "is a sequence or a position of one")
    data, sizes = c.outs
    return Outcome([[_free(data.shape[0]), *c.of(x)[2:]], _frozen(sizes)])


def pad(c: Call) -> Outcome:
    """Put constant positions before and after each padded dim."""
    x, amounts = c.args[0], list(c.args[1])
    dims = list(c.of(x))
    for k in range(len(amounts) // 2):
        before, after = amounts[2 * k], amounts[2 * k + 1]
        d = x.dim() - 1 - k
        if before == after == 0:
            continue
        if before < 0 or after < 0:
            freeze(dims[d], "is cropped by a padding")
            dims[d] = _free(c.outs[0].shape[d])
            continue
        ends = [fresh(n, PADDING) if n else () for n in (before, after)]
        dims[d] = ends[0] + dims[d] + ends[1]
    if c.arg(2, "value", 0) != 0:
        for parts in c.of(x):
            freeze(parts, "is padded with a number that is not zero")
    return Outcome([dims])


def pixel_shuffle(c: Call) -> Outcome:
    """Move factors of the channels into space."""
    x, r = c.args
    *lead, channels, h, w = c.of(x)
    parts = layout.split(channels, [x.shape[-3] // (r * r), r, r])
    for factor in parts[1:]:
        freeze(factor, PIXELS)
    return Outcome([[*lead, parts[0], layout.join([h, parts[1]]), layout.join([w, parts[2]])]])


def pixel_unshuffle(c: Call) -> Outcome:
    """Move factors of space into the channels."""
    x, r = c.args
    *lead, channels, h, w = c.of(x)
    (h, a), (w, b) = (layout.split(p, [p_size // r, r]) for p, p_size in _sized(h, w))
    for factor in (a, b):
        freeze(factor, PIXELS)
    return Outcome([[*lead, layout.join([channels, a, b]), h, w]])


def _sized(*parts: Composition) -> list[tuple[Composition, int]]:
    return [(p, layout.size_of(p)) for p in parts]


def channel_shuffle(c: Call) -> Outcome:
    """Transpose the channels seen as groups times channels of a group."""
    x, groups = c.args
    parts = layout.split(c.of(x)[1], [groups, x.shape[1] // groups])
    return Outcome([_replace(c.of(x), 1, layout.join([parts[1], parts[0]]))])


def im2col(c: Call) -> Outcome:
    """Lay out the patches of an image: channels times kernel, positions."""
    x, kernel, out = c.args[0], c.args[1], c.outs[0]
    for parts in c.of(x)[2:]:
        freeze(parts, _over(c))
    patch = layout.join([c.of(x)[1], *(_kernel(k) for k in kernel)])
    return Outcome([[c.of(x)[0], patch, _free(out.shape[2])]])


def unfold(c: Call) -> Outcome:
    """Cut one dim into windows; their number and length are sizes of their own."""
    x, out = c.args[0], c.outs[0]
    dims = list(c.of(x))
    if not dims:
        raise Misaligned("a number is cut into windows")
    d = c.args[1] % len(dims)
    freeze(dims[d], "is cut into windows")
    dims[d] = _free(out.shape[d])
    return Outcome([[*dims, _free(out.shape[-1])]])


def _kernel(size: int) -> Composition:
    return ONE if size == 1 else fresh(size, KERNEL)


# --- units stay apart ----------------------------------------------------------------------------


def spatial(c: Call) -> Outcome:
    """Keep batch and channels; the last dims get new sizes (pooling, resampling)."""
    return Outcome([_resampled(c, out, {}) for out in c.outs])


def averaged(c: Call) -> Outcome:
    """Keep batch and channels, and space where windows that go step by step lose no position.

    There they reach over the ends by as much as is padded, so that each position has its window.
    """
    x, (out,) = c.args[0], c.outs
    count = _spatial_dims(c)
    kernel, padding = _sides(c.args[1], count), _sides(c.arg(3, "padding", 0), count)
    stride = _sides(c.arg(2, "stride") or kernel, count)
    even = bool(c.arg(5, "count_include_pad", True)) or c.arg(6, "divisor_override") is not None
    kept: dict[int, Composition] = {}
    windows: list[Window] = []
    for d, k, step, p in zip(range(x.dim() - count, x.dim()), kernel, stride, padding, strict=True):
        before, inside, after = _unpadded(c.of(x)[d]) if k > 1 else (0, c.of(x)[d], 0)
        if step == 1 and before + after + 2 * p == k - 1 and (even or p == 0):
            kept[d] = inside
            windows += [Window(d, before + p, after + p)] if k > 1 else []
    return Outcome([_resampled(c, out, kept)], windows=tuple(windows))


def _sides(given: int | Sequence[int], count: int) -> list[int]:
    """Return a number for each dim, where one may be given for all."""
    sides = [given] if isinstance(given, int) else list(given)
    return sides * count if len(sides) == 1 else sides


def _unpadded(parts: Composition) -> tuple[int, Composition, int]:
    """Return a dim without the padding at its ends, and how much there was at each."""
    terms = layout.expand(parts)
    padded = [len(term) == 1 and term[0].frozen == PADDING for term in terms]
    first = padded.index(False) if False in padded else len(terms)
    last = len(terms) - (padded[::-1].index(False) if False in padded else 0)
    return layout.size_of(terms[:first]), terms[first:last], layout.size_of(terms[last:])


def _resampled(c: Call, out: Tensor, kept: Mapping[int, Composition]) -> Dims:
    """Return the layouts of an output whose last dims are new sizes, but for those `kept`."""
    x, over = c.args[0], _over(c)
    dims = list(c.of(x))
    for d in range(x.dim() - _spatial_dims(c), x.dim()):
        # units stay so named: the operator is why they cannot be more, not that they are space
        units = any(atom.frozen in (None, over) for atom in layout.leaves(dims[d]))
        if d not in kept:
            freeze(dims[d], over)
        new = fresh(out.shape[d], over) if units else _free(out.shape[d])
        dims[d] = kept.get(d, ONE if out.shape[d] == 1 else new)
    return dims


def sampled(c: Call) -> Outcome:
    """Read each channel at the places that a grid lists."""
    for parts in (c.of(c.args[0])[0], *c.of(c.args[1])):
        freeze(parts, "is read at the places of a grid")
    return spatial(c)


def _spatial_dims(c: Call) -> int:
    name = c.func.overloadpacket.__name__
    return int(next(digit for digit in reversed(name.split("_with")[0]) if digit in "123"))


def _over(c: Call) -> str:
    """Return why the dims that an operator goes over keep their sizes, with its name."""
    return f"is space that '{_named(c)}' goes over"


def _mixing(c: Call) -> str:
    """Return why the units that an operator compares cannot be more, with its name."""
    return f"goes into '{_named(c)}', which mixes its units"


def _named(c: Call) -> str:
    return c.func.overloadpacket.__name__.strip("_").removeprefix("native_")


def reduce(c: Call) -> Outcome:
    """Keep the dims that are not reduced; the reduced ones mix their units."""
    return _reduced(c, lambda parts: freeze(parts, _mixing(c)), ())


def norm(c: Call) -> Outcome:
    """Reduce to a norm, to which a unit that is zero adds nothing if its power is positive."""
    power = c.arg(1, "ord", c.arg(1, "p", 2))
    if power == 0:
        raise Misaligned("it counts the entries that are not zero")
    return sum_(c) if power is None or power > 0 else reduce(c)


def sum_(c: Call) -> Outcome:
    """Sum or average over dims; a unit that is zero adds nothing to the sum."""
    x, dims = c.args[0], _reduced_dims(c)
    over = tuple(Contracted(0, d, c.of(x)[d]) for d in dims)
    return _reduced(c, lambda parts: None, over)


def _reduced(c: Call, on: Callable[[Composition], None], over: tuple[Contracted, ...]) -> Outcome:
    x, dims = c.args[0], _reduced_dims(c)
    for d in dims:
        on(c.of(x)[d])
    keepdim = c.outs[0].dim() == x.dim()
    kept = [ONE if d in dims else p for d, p in enumerate(c.of(x)) if keepdim or d not in dims]
    return Outcome([kept for _ in c.outs], over)


def _reduced_dims(c: Call) -> list[int]:
    x = c.args[0]
    found = c.arg(_dim_position(c), "dim")
    if found is None or found == [] or x.dim() == 0:
        return list(range(x.dim()))
    return [d % x.dim() for d in (found if isinstance(found, list | tuple) else [found])]


def _dim_position(c: Call) -> int:
    names = [a.name for a in c.func._schema.arguments]
    return names.index("dim") if "dim" in names else len(names)


def along(c: Call) -> Outcome:
    """Keep the shape; one dim mixes its positions (softmax, cumulative sums, sorting)."""
    x = c.args[0]
    if x.dim() == 0:
        return Outcome([[] for _ in c.outs])
    d = c.arg(_dim_position(c), "dim", -1)
    freeze(c.of(x)[d % x.dim()], _mixing(c))
    shapes = [out.shape[d % x.dim()] if out.dim() else 1 for out in c.outs]
    return Outcome(
        [
            list(c.of(x)) if s == x.shape[d] else _replace(c.of(x), d % x.dim(), _free(s))
            for s in shapes
        ]
    )


# --- norms ---------------------------------------------------------------------------------------


def batch_norm(c: Call) -> Outcome:
    """Normalise each channel over batch and space."""
    x = c.args[0]
    for t in c.args[1:5]:
        if isinstance(t, Tensor):
            unify(c.of(t)[0], c.of(x)[1])
    over = [parts for d, parts in enumerate(c.of(x)) if d != 1]
    alone = [parts for parts in over if layout.size_of(parts) > 1]
    if len(alone) > 1 or isinstance(c.args[3], Tensor):  # running means
        for parts in over:
            freeze(parts, OVER)
        alone = []
    rest = [
        [c.of(x)[1]] if o.dim() == 1 and o.shape[0] == x.shape[1] else _frozen(o)
        for o in c.outs[1:]
    ]
    return Outcome([list(c.of(x)), *rest], standardised=alone[0] if alone else ONE)


def _frozen(out: Tensor) -> Dims:
    return [_free(s) for s in out.shape]


def layer_norm(c: Call) -> Outcome:
    """Normalise over the last dims together; a single dim may change its width."""
    x, count = c.args[0], len(c.args[1])
    dims = c.of(x)
    single = count == 1
    for t in c.args[2:4]:
        if isinstance(t, Tensor):
            for d in range(count):
                unify(c.of(t)[d], dims[x.dim() - count + d])
    for parts in dims[x.dim() - count :] if not single else []:
        freeze(parts, _mixing(c))
    statistics = [*dims[: x.dim() - count], *[ONE] * count]
    outs = [list(dims), *(list(statistics) for _ in c.outs[1:])]
    return Outcome(outs, mixed=dims[-1] if single else ONE)


def group_norm(c: Call) -> Outcome:
    """Normalise over each group of channels and space."""
    x, groups = c.args[0], c.args[6]
    channels = c.of(x)[1]
    for t in c.args[1:3]:
        if isinstance(t, Tensor):
            unify(c.of(t)[0], channels)
    parts = [channels] if groups == 1 else layout.split(channels, [groups, x.shape[1] // groups])
    mixed = parts[-1] if x.shape[1] // groups > 1 else ONE
    for space in c.of(x)[2:]:
        freeze(space, OVER)
    statistics = [c.of(x)[0], ONE if groups == 1 < x.shape[1] else parts[0]]
    return Outcome([list(c.of(x)), *(list(statistics) for _ in c.outs[1:])], mixed=mixed)


# --- contractions --------------------------------------------------------------------------------


def mm(c: Call) -> Outcome:
    """Multiply two matrices."""
    return _product(c, 0, None)


def addmm(c: Call) -> Outcome:
    """Multiply two matrices and add a bias."""
    alpha, beta = c.kwargs.get("alpha", 1), c.kwargs.get("beta", 1)
    if beta != 1:
        for parts in c.of(c.args[0]):
            freeze(parts, "is multiplied before it is added")
    return replace(_product(c, 1, 0), border=alpha != 1 or beta != 1)


def _product(c: Call, first: int, bias: int | None) -> Outcome:
    a, b = c.of(c.args[first]), c.of(c.args[first + 1])
    unify(a[-1], b[-2])
    if len(a) == 3:
        unify(a[0], b[0])
    out = [*a[:-1], b[-1]]
    if bias is not None:
        added = c.args[bias]
        for d in range(-added.dim(), 0):
            if added.shape[d] == c.outs[0].shape[d]:
                unify(c.of(added)[d], out[d])
            else:
                freeze(c.of(added)[d], layout.ONE_ONLY)
    return Outcome(
        [out],
        (Contracted(first, len(a) - 1, a[-1]), Contracted(first + 1, len(b) - 2, b[-2])),
        a[0] if len(a) == 3 else ONE,
        bias,
    )


def mv(c: Call) -> Outcome:
    """Multiply a matrix and a vector, or two vectors."""
    a, b = c.of(c.args[0]), c.of(c.args[1])
    unify(a[-1], b[-1])
    over = (Contracted(0, len(a) - 1, a[-1]), Contracted(1, 0, b[-1]))
    return Outcome([a[:-1]], over)


def linear(c: Call) -> Outcome:
    """Multiply by a transposed weight `(out, in)` and add a bias."""
    x, w, b = c.args[0], c.args[1], c.arg(2, "bias")
    unify(c.of(x)[-1], c.of(w)[1])
    if b is not None:
        unify(c.of(b)[0], c.of(w)[0])
    over = (Contracted(0, x.dim() - 1, c.of(x)[-1]), Contracted(1, 1, c.of(w)[1]))
    return Outcome([[*c.of(x)[:-1], c.of(w)[0]]], over, bias=None if b is None else 2)


def trilinear(c: Call) -> Outcome:
    """Multiply two inputs by a weight `(out, in1, in2)`, as bilinear layers do."""
    x, w, y = (c.of(t) for t in c.args[:3])
    if c.args[3:7] != ([1, 3], [0], [1, 2], [2, 3]):
        raise Misaligned("it sums other dims than a bilinear layer does")
    unify(x[0], y[0])
    unify(x[1], w[1])
    unify(y[1], w[2])
    over = [Contracted(0, 1, x[1]), Contracted(1, 1, w[1])]
    over += [Contracted(1, 2, w[2]), Contracted(2, 1, y[1])]
    return Outcome([[x[0], w[0]]], tuple(over), border=True)  # a constant is one times the other


def convolution(c: Call) -> Outcome:
    """Convolve, with groups, either way."""
    x, w, b = c.args[:3]
    transposed, groups = c.args[6], c.args[8]
    relate = _transposed if transposed else _forward
    out, over_x, over_w, batched = relate(c.of(x)[1], c.of(w), x.shape[1], w.shape, groups)
    for atom in (atom for parts in c.of(w)[2:] for atom in layout.leaves(parts)):
        atom.frozen = KERNEL  # whatever was said of it before: a kernel has sizes, not units
    space, windows = ([], []) if transposed else _slid(c)
    for parts in c.of(x)[2:] if transposed else ():
        freeze(parts, _over(c))
        space.append(_free(c.outs[0].shape[2 + len(space)]))
    if b is not None:
        unify(c.of(b)[0], out)
    over = (Contracted(0, 1, over_x), Contracted(1, 0 if transposed else 1, over_w))
    border = transposed or any(p != 0 for p in c.args[4])
    bias = None if b is None else 2
    return Outcome([[c.of(x)[0], out, *space]], over, batched, bias, border, windows=tuple(windows))


def _slid(c: Call) -> tuple[list[Composition], list[Window]]:
    """Return the dims that a filter slides over, and its windows where these are units.

    Units (as in efficient channel attention) stay where each position has a window around it.
    """
    x, w, kept, windows = c.args[0], c.args[1], list[Composition](), list[Window]()
    for d, step, pad, apart in zip(range(2, x.dim()), *c.args[3:6], strict=True):
        parts, reach = c.of(x)[d], apart * (w.shape[d] - 1)
        before, inside, after = _unpadded(parts) if reach else (0, parts, 0)
        units = all(atom.frozen is None for atom in layout.leaves(inside))
        if units and step == 1 and before + after + 2 * pad == reach:
            kept.append(inside)
            windows += [Window(d, before + pad, after + pad)] if reach else []
        else:
            freeze(parts, _over(c))
            kept.append(_free(c.outs[0].shape[d]))
    return kept, windows


Related = tuple[Composition, Composition, Composition, Composition]


def _forward(x: Composition, w: Dims, size: int, shape: torch.Size, groups: int) -> Related:
    if groups == 1:
        unify(x, w[1])
        return w[0], x, w[1], ONE
    g, inside = layout.split(x, [groups, size // groups])
    unify(inside, w[1])
    g_w, _ = layout.split(w[0], [groups, shape[0] // groups])
    unify(g, g_w)
    return w[0], inside, w[1], g


def _transposed(x: Composition, w: Dims, size: int, shape: torch.Size, groups: int) -> Related:
    unify(x, w[0])
    if groups == 1:
        return w[1], x, w[0], ONE
    g, inside = layout.split(x, [groups, size // groups])
    return layout.join([g, w[1]]), inside, inside, g


def attention(c: Call) -> Outcome:
    """Attend: heads stay apart, queries and keys are contracted over their features.

    Where there are fewer keys' heads than queries', each serves a group of these.
    """
    q, k, v = (c.of(t) for t in c.args[:3])
    for d in range(len(q) - 2):
        heads, served = layout.size_of(q[d]), layout.size_of(k[d])
        shared = [q[d]] if heads == served else layout.split(q[d], [served, heads // served])
        _one([shared[0], k[d], v[d]])
    unify(k[-2], v[-2])
    freeze(k[-2], "is attended over")
    unify(q[-1], k[-1])
    over = (Contracted(0, len(q) - 1, q[-1]), Contracted(1, len(k) - 1, k[-1]))
    scores = [*q[:-1], k[-2]]
    for mask in c.tensors()[3:]:
        _masked(c.of(mask), scores)
    if _is_causal(c):
        freeze(q[-2], "is attended by its order")
    sizes = [layout.size_of(p) for p in q[:-1]]
    rest = [
        [*q[:-1], *(_free(n) for n in o.shape[len(sizes) :])]
        if list(o.shape[: len(sizes)]) == sizes
        else _frozen(o)
        for o in c.outs[1:]
    ]
    return Outcome([[*q[:-1], v[-1]], *rest], over)


def _masked(mask: Dims, scores: Dims) -> None:
    """Tie the dims of what is added to attention's scores to theirs."""
    for parts, score in zip(reversed(mask), reversed(scores), strict=False):
        if layout.size_of(parts) == layout.size_of(score):
            unify(parts, score)
        else:
            freeze(parts, layout.ONE_ONLY)


def _is_causal(c: Call) -> bool:
    names = [a.name for a in c.func._schema.arguments]
    return bool(c.arg(names.index("is_causal"), "is_causal", False))


def embedding(c: Call) -> Outcome:
    """Look up rows of a table."""
    table, indices = c.args[:2]
    freeze(c.of(table)[0], "is indexed by a tensor")
    _freeze_indices(c, indices)
    return Outcome([[*c.of(indices), c.of(table)[1]]])


# --- no inputs -----------------------------------------------------------------------------------


def made(c: Call) -> Outcome:
    """Give a uniformly filled tensor axes that may become any others."""
    return Outcome([[ONE if s == 1 else fresh(s) for s in out.shape] for out in c.outs])


def counted(c: Call) -> Outcome:
    """Give a tensor whose content depends on the position fixed axes."""
    return Outcome([[_free(s) for s in out.shape] for out in c.outs])


POINTWISE = Row(broadcast, Kind.POINTWISE)
HOMOGENEOUS = Row(broadcast, Kind.POINTWISE, homogeneous=True)
LIKE = Row(same, Kind.MOVE, "any", True)
MOVE = {"kind": Kind.MOVE, "keeps": "any", "homogeneous": True}
POOL = Row(spatial, Kind.SEPARATE, "any", True)
REDUCE = Row(reduce, Kind.SEPARATE, "any", True)
MIX = Row(along, Kind.SEPARATE)
FILL = Row(made, Kind.FILL)
RANDOM = Row(made, Kind.RANDOM)
DRAWN = Row(broadcast, Kind.RANDOM)
COUNT = Row(counted, Kind.FILL)
NORM = Row(batch_norm, Kind.NORM)


def _table(*groups: tuple[Row, str]) -> dict[Any, Row]:
    return {
        getattr(aten, name): row
        for row, names in groups
        for name in names.split()
        if hasattr(aten, name)
    }


ROWS: dict[Any, Row] = _table(
    # units move, nothing is computed
    (Row(view, **MOVE), "view _unsafe_view reshape _reshape_alias unflatten"),
    (Row(transpose, **MOVE), "t transpose t_ transpose_"),
    (Row(permute, **MOVE), "permute"),
    (Row(unsqueeze, **MOVE), "unsqueeze unsqueeze_"),
    (Row(squeeze, **MOVE), "squeeze squeeze_"),
    (Row(expand, **MOVE), "expand"),
    (Row(repeat, **MOVE), "repeat"),
    (Row(cat, **MOVE), "cat"),
    (Row(stack, **MOVE), "stack"),
    (Row(split, **MOVE), "split split_with_sizes chunk"),
    (Row(split, **MOVE), "unsafe_split unsafe_split_with_sizes unsafe_chunk"),
    (Row(pick, **MOVE), "select unbind"),
    (Row(slice_, **MOVE), "slice"),
    (Row(reorder, **MOVE), "flip roll"),
    (Row(index, **MOVE), "index _unsafe_index"),
    (Row(index_select, **MOVE), "index_select"),
    (Row(gather, **MOVE), "gather"),
    (Row(found, Kind.SEPARATE), "nonzero bincount"),
    (Row(pack, **MOVE), "_pack_padded_sequence"),
    (Row(pixel_shuffle, **MOVE), "pixel_shuffle"),
    (Row(pixel_unshuffle, **MOVE), "pixel_unshuffle"),
    (Row(channel_shuffle, **MOVE), "channel_shuffle native_channel_shuffle"),
    (Row(convert, **MOVE), "_to_copy"),
    (LIKE, "clone detach detach_ alias contiguous lift_fresh lift_fresh_copy"),
    (Row(restride, **MOVE), "as_strided as_strided_"),
    (Row(pad, Kind.MOVE, "zero", True), "constant_pad_nd"),
    (Row(im2col, Kind.MOVE, "zero", True), "im2col"),
    (Row(unfold, **MOVE), "unfold"),
    # each entry from the entries at its place
    (HOMOGENEOUS, "relu relu_ leaky_relu leaky_relu_ neg abs add add_ sub sub_ copy_"),
    (Row(broadcast, Kind.POINTWISE, odd=True), "tanh tanh_ sin erf atan asinh sinh tan softshrink"),
    (POINTWISE, "fill_ masked_fill masked_fill_ _prelu_kernel where hardswish hardswish_"),
    (Row(broadcast, Kind.SEPARATE), "log_sigmoid_forward"),
    (Row(glu, Kind.SEPARATE, "zero"), "glu"),
    (Row(broadcast, Kind.FILL), "zero_"),
    # each unit from the same unit
    (POOL, "_adaptive_avg_pool1d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d"),
    (POOL, "max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d"),
    (POOL, "adaptive_max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d"),
    (POOL, "upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d"),
    (POOL, "_upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_nearest_exact2d"),
    (POOL, "reflection_pad1d reflection_pad2d reflection_pad3d"),
    (POOL, "replication_pad1d replication_pad2d replication_pad3d"),
    (Row(averaged, Kind.SEPARATE, "zero", True), "avg_pool1d avg_pool2d avg_pool3d"),
    (Row(sampled, Kind.SEPARATE, "zero", True), "grid_sampler_2d grid_sampler_3d"),
    (REDUCE, "amax amin max min"),
    (Row(reduce, Kind.SEPARATE, "zero", True), "std"),
    (Row(scatter, Kind.SEPARATE), "scatter"),
    (Row(scatter, Kind.SEPARATE, "zero", True), "scatter_add"),
    (Row(scatter, Kind.SEPARATE, "zero"), "scatter_reduce"),
    (Row(index_add, Kind.SEPARATE, "zero", True), "index_add"),
    (Row(index_add, Kind.SEPARATE, "zero"), "index_reduce"),
    (Row(index_add, Kind.SEPARATE, "any", True), "index_copy"),
    (Row(index_put, Kind.SEPARATE), "index_put"),
    (Row(norm, Kind.SUM, "zero", True), "linalg_vector_norm norm"),
    (Row(reduce, Kind.SEPARATE, "zero"), "var prod"),
    (Row(reduce, Kind.SEPARATE), "any all argmax argmin logsumexp var_mean std_mean median"),
    (Row(sum_, Kind.SUM, "zero", True), "sum"),
    (Row(sum_, Kind.SUM, "any", True), "mean"),
    (MIX, "_softmax _log_softmax _safe_softmax cumsum sort topk cumprod argsort"),
    (DRAWN, "native_dropout bernoulli bernoulli_ rand_like randn_like randint_like"),
    (DRAWN, "uniform_ normal_ rrelu_with_noise rrelu_with_noise_"),
    # norms
    (NORM, "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training"),
    (NORM, "cudnn_batch_norm miopen_batch_norm _batch_norm_with_update batch_norm_with_update"),
    (NORM, "_batch_norm_no_update"),
    (Row(layer_norm, Kind.CENTER), "native_layer_norm"),
    (Row(group_norm, Kind.CENTER), "native_group_norm"),
    # sums of products
    (Row(mm, Kind.CONTRACT), "mm bmm"),
    (Row(addmm, Kind.CONTRACT), "addmm baddbmm"),
    (Row(mv, Kind.CONTRACT), "mv dot"),
    (Row(linear, Kind.CONTRACT), "linear"),
    (Row(trilinear, Kind.CONTRACT), "_trilinear"),
    (Row(convolution, Kind.CONTRACT), "convolution _convolution"),
    (Row(attention, Kind.ATTEND), "_scaled_dot_product_flash_attention_for_cpu"),
    (Row(attention, Kind.ATTEND), "_scaled_dot_product_flash_attention"),
    (Row(attention, Kind.ATTEND), "_scaled_dot_product_efficient_attention"),
    (Row(attention, Kind.ATTEND), "_scaled_dot_product_cudnn_attention"),
    (Row(attention, Kind.ATTEND), "_scaled_dot_product_attention_math"),
    (Row(embedding, Kind.GATHER, "any", True), "embedding"),
    # new tensors
    (FILL, "zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones"),
    (FILL, "new_full new_empty empty_strided new_empty_strided empty_permuted scalar_tensor"),
    (RANDOM, "rand randn"),
    (COUNT, "_local_scalar_dense"),
    (COUNT, "arange linspace eye tril_indices triu_indices randint randperm"),
)
for _name in ("zeros_like", "ones_like", "full_like", "empty_like"):
    ROWS[getattr(aten, _name)] = Row(same, Kind.FILL)
