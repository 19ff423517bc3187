"""Rules of operators that combine entries: windows, sums, norms and sums of products."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from graphgrow.ir import layout
from graphgrow.ir.layout import ONE, Composition, Misaligned, freeze, fresh, unify
from graphgrow.ir.movements import freeze_positions, replaced, unified
from graphgrow.ir.outcome import (
    KERNEL,
    OVER,
    PADDING,
    Call,
    Contracted,
    Dims,
    Outcome,
    Window,
    all_computed,
    computed,
    goes_over,
    mixes,
)

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
    x, over = c.args[0], goes_over(c)
    dims = list(c.of(x))
    for d in range(x.dim() - _spatial_dims(c), x.dim()):
        # units stay so named: the operator is why they cannot be more, not that they are space
        units = any(atom.frozen in (None, over) for atom in layout.leaves(dims[d]))
        if d not in kept:
            freeze(dims[d], over)
        new = fresh(out.shape[d], over) if units else computed(out.shape[d])
        dims[d] = kept.get(d, ONE if out.shape[d] == 1 else new)
    return dims


def sampled(c: Call) -> Outcome:
    """Read each channel at the places that a grid lists."""
    for parts in (c.of(c.args[0])[0], *c.of(c.args[1])):
        freeze(parts, "is read at the places of a grid")
    return spatial(c)


def transformed(c: Call) -> Outcome:
    """Keep the dims that a Fourier transform does not make frequencies of."""
    dims, sizes = list(c.of(c.args[0])), c.outs[0].shape
    for d in c.args[1]:
        freeze(dims[d], mixes(c))
        dims[d] = dims[d] if layout.size_of(dims[d]) == sizes[d] else computed(sizes[d])
    return Outcome([dims])


def cornered(c: Call) -> Outcome:
    """Keep all dims; which entries stay depends on the position in the last two."""
    dims = list(c.of(c.args[0]))
    for parts in dims[-2:]:
        freeze(parts, goes_over(c))
    return Outcome([dims])


def _spatial_dims(c: Call) -> int:
    name = c.func.overloadpacket.__name__
    return int(next(digit for digit in reversed(name.split("_with")[0]) if digit in "123"))


def reduce(c: Call) -> Outcome:
    """Keep the dims that are not reduced; the reduced ones mix their units."""
    return _reduced(c, lambda parts: freeze(parts, mixes(c)), ())


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
    freeze(c.of(x)[d % x.dim()], mixes(c))
    shapes = [out.shape[d % x.dim()] if out.dim() else 1 for out in c.outs]
    return Outcome(
        [
            list(c.of(x)) if s == x.shape[d] else replaced(c.of(x), d % x.dim(), computed(s))
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
        [c.of(x)[1]] if o.dim() == 1 and o.shape[0] == x.shape[1] else all_computed(o)
        for o in c.outs[1:]
    ]
    return Outcome([list(c.of(x)), *rest], standardised=alone[0] if alone else ONE)


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
        freeze(parts, mixes(c))
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
        freeze(parts, goes_over(c))
        space.append(computed(c.outs[0].shape[2 + len(space)]))
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
    sides = (_sides(given, x.dim() - 2) for given in c.args[3:6])
    for d, step, pad, apart in zip(range(2, x.dim()), *sides, strict=True):
        parts, reach = c.of(x)[d], apart * (w.shape[d] - 1)
        before, inside, after = _unpadded(parts) if reach else (0, parts, 0)
        units = all(atom.frozen is None for atom in layout.leaves(inside))
        if units and step == 1 and before + after + 2 * pad == reach:
            kept.append(inside)
            windows += [Window(d, before + pad, after + pad)] if reach else []
        else:
            freeze(parts, goes_over(c))
            kept.append(computed(c.outs[0].shape[d]))
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
        unified([shared[0], k[d], v[d]])
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
        [*q[:-1], *(computed(n) for n in o.shape[len(sizes) :])]
        if list(o.shape[: len(sizes)]) == sizes
        else all_computed(o)
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
    freeze_positions(c, indices)
    return Outcome([[*c.of(indices), c.of(table)[1]]])


def embedding_bag(c: Call) -> Outcome:
    """Look up rows of a table and add up, or average, those of each bag."""
    table, *listed = c.args[:3]
    freeze(c.of(table)[0], "is indexed by a tensor")
    for positions in [
        *listed,
        *([c.args[6]] if c.arg(6, "per_sample_weights") is not None else []),
    ]:
        freeze_positions(c, positions)
    if c.arg(4, "mode", 0) == 2:
        freeze(c.of(table)[1], "is picked from by the largest of some rows")
    bags, *rest = c.outs
    return Outcome([[computed(bags.shape[0]), c.of(table)[1]], *map(all_computed, rest)])
