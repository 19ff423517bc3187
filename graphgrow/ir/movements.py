"""Rules of operators that move entries, or compute each from the entries at its place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from graphgrow.ir import layout
from graphgrow.ir.layout import ONE, Composition, Misaligned, freeze, fresh, unify
from graphgrow.ir.outcome import (
    KERNEL,
    PADDING,
    PAIR,
    PIXELS,
    Call,
    Dims,
    Outcome,
    all_computed,
    aten,
    computed,
    goes_over,
)


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
        dims.append(unified(found) if found else new)
    return dims


def unified(found: list[Composition]) -> Composition:
    """Return what several dims are, once they are one."""
    for other in found[1:]:
        unify(found[0], other)
    return found[0]


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
    before, after = (t.is_floating_point() or t.is_complex() for t in (c.args[0], c.outs[0]))
    if before and not after:
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
    both = zip(times, dims, strict=True)
    tiled = [d if n == 1 else layout.join([computed(n), d]) for n, d in both]
    return Outcome([tiled])


def cat(c: Call) -> Outcome:
    """Concatenate along one dim; the others are one axis each."""
    tensors = [t for t in c.args[0] if t.dim() == c.outs[0].dim() and t.numel()]
    at = c.arg(1, "dim", 0) % c.outs[0].dim()
    dims: Dims = []
    for d in range(c.outs[0].dim()):
        found = [c.of(t)[d] for t in tensors]
        dims.append(tuple(term for p in found for term in p) if d == at else unified(found))
    return Outcome([dims])


def stack(c: Call) -> Outcome:
    """Stack equal layouts along a new dim."""
    tensors, out = c.args[0], c.outs[0]
    at = c.arg(1, "dim", 0) % out.dim()
    dims = [unified([c.of(t)[d] for t in tensors]) for d in range(out.dim() - 1)]
    dims.insert(at, computed(len(tensors)))
    return Outcome([dims])


def split(c: Call) -> Outcome:
    """Cut one dim into consecutive pieces."""
    x = c.args[0]
    d = c.arg(2, "dim", 0) % x.dim()
    pieces = layout.cut(c.of(x)[d], [out.shape[d] for out in c.outs])
    return Outcome([replaced(c.of(x), d, p) for p in pieces])


def glu(c: Call) -> Outcome:
    """Gate the first half of a dim by the second, unit by unit."""
    x, out = c.args[0], c.outs[0]
    d = c.arg(1, "dim", -1) % x.dim()
    value, gate = layout.cut(c.of(x)[d], [out.shape[d]] * 2)
    unify(value, gate)
    return Outcome([replaced(c.of(x), d, value)])


def replaced(dims: Dims, d: int, parts: Composition) -> Dims:
    """Return layouts with another one for dim `d`."""
    return [*dims[:d], parts, *dims[d + 1 :]]


def pick(c: Call) -> Outcome:
    """Take single positions of one dim."""
    x = c.args[0]
    d = c.arg(1, "dim", 0) % x.dim()
    freeze(c.of(x)[d], "is picked from by position")
    return Outcome([replaced(c.of(x), d, ONE)[:d] + list(c.of(x)[d + 1 :]) for _ in c.outs])


def slice_(c: Call) -> Outcome:
    """Take a range of one dim."""
    x, out = c.args[0], c.outs[0]
    d = c.arg(1, "dim", 0) % x.dim()
    size, kept, step = x.shape[d], out.shape[d], c.arg(4, "step", 1)
    if size == kept:
        return Outcome([list(c.of(x))])
    if step != 1:
        freeze(c.of(x)[d], "is sliced with a step")
        return Outcome([replaced(c.of(x), d, computed(kept))])
    start = c.arg(2, "start") or 0
    start = min(max(start + size if start < 0 else start, 0), size)
    pieces = layout.cut(c.of(x)[d], [start, kept, size - start - kept])
    return Outcome([replaced(c.of(x), d, pieces[1])])


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
            freeze_positions(c, i)
    kept = [p for d, p in enumerate(c.of(x)) if d not in used]
    new = [computed(s) for s in _index_shape(x, used, out)]
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


def freeze_positions(c: Call, indices: Tensor) -> None:
    """Freeze all dims of a tensor that lists positions."""
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
    freeze_positions(c, c.args[2])
    return Outcome([replaced(c.of(x), d, computed(c.outs[0].shape[d]))])


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
    return Outcome([all_computed(out) for out in c.outs])


def index_add(c: Call) -> Outcome:
    """Write or add whole rows to listed positions of one dim; the other dims stay."""
    x, d, rows = c.args[0], c.args[1] % max(c.args[0].dim(), 1), c.args[3]
    freeze_positions(c, c.args[2])
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
    return Outcome([[computed(data.shape[0]), *c.of(x)[2:]], all_computed(sizes)])


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
            dims[d] = computed(c.outs[0].shape[d])
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
    return Outcome([replaced(c.of(x), 1, layout.join([parts[1], parts[0]]))])


def im2col(c: Call) -> Outcome:
    """Lay out the patches of an image: channels times kernel, positions."""
    x, kernel, out = c.args[0], c.args[1], c.outs[0]
    for parts in c.of(x)[2:]:
        freeze(parts, goes_over(c))
    patch = layout.join([c.of(x)[1], *(_kernel(k) for k in kernel)])
    return Outcome([[c.of(x)[0], patch, computed(out.shape[2])]])


def col2im(c: Call) -> Outcome:
    """Add up patches, channels times kernel at positions, where they lie in an image."""
    x, kernel, out = c.args[0], c.args[2], c.outs[0]
    *lead, patch, positions = c.of(x)
    channels, *sides = regroup([patch], [x.shape[-2]], [out.shape[-3], *kernel])
    for parts in sides:
        freeze(parts, KERNEL)
    freeze(positions, goes_over(c))
    return Outcome([[*lead, channels, *(computed(n) for n in out.shape[-2:])]])


def view_as_real(c: Call) -> Outcome:
    """See each complex number as two real ones, in a new last dim."""
    return Outcome([[*c.of(c.args[0]), fresh(2, PAIR)]])


def view_as_complex(c: Call) -> Outcome:
    """See the two numbers of the last dim as a complex one."""
    *kept, pair = c.of(c.args[0])
    freeze(pair, PAIR)
    return Outcome([kept])


def unfold(c: Call) -> Outcome:
    """Cut one dim into windows; their number and length are sizes of their own."""
    x, out = c.args[0], c.outs[0]
    dims = list(c.of(x))
    if not dims:
        raise Misaligned("a number is cut into windows")
    d = c.args[1] % len(dims)
    freeze(dims[d], "is cut into windows")
    dims[d] = computed(out.shape[d])
    return Outcome([[*dims, computed(out.shape[-1])]])


def _kernel(size: int) -> Composition:
    return ONE if size == 1 else fresh(size, KERNEL)
