"""Interval arithmetic over tensors: between which numbers each entry lies, through each operator.

Bounds are wider than what is computed by what rounding can do; an operator without a rule gives
nothing but what its own outputs are always between.

Source: Serra, Kumar & Ramalingam (2020), Lossless compression of deep neural networks, for boxes;
that what leaves a norm over units lies in a ball, whatever went in, is our own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from graphgrow.ir.outcome import Kind, Row, aten


@dataclass(frozen=True, eq=False)
class Ball:
    """A bound on rows of the last dim: `shift + scale · x̂` with ‖x̂‖² at most the width.

    `centred`: the entries of x̂ also sum to zero, as behind a LayerNorm. `scale` and `shift` have
    the width's shape `(width,)`.
    """

    scale: Tensor
    shift: Tensor
    centred: bool

    def range(self, shape: torch.Size) -> Range:
        """Return the bounds of each entry of a tensor of this shape."""
        width = len(self.scale)
        most = math.sqrt(width - 1 if self.centred else width)
        reach = self.scale.abs() * most * (1 + 1e-6)
        low, high = (self.shift - reach).expand(shape), (self.shift + reach).expand(shape)
        return Range(low, high, self)


@dataclass(frozen=True, eq=False)
class Range:
    """The least and the largest number that each entry can be, in float64.

    `is_point`: both are the same, a parameter's numbers. `said` notes how the tensor came about
    where that bounds more than its entries do: a square, a mean of squares, one over its root, with
    the tensor that was squared.
    """

    low: Tensor
    high: Tensor
    ball: Ball | None = None
    is_point: bool = False
    said: tuple[str, Any] | None = None


def point(tensor: Tensor) -> Range:
    """Return the range of a tensor whose numbers are known."""
    value = tensor.detach().to("cpu", torch.double)
    return Range(value, value, is_point=True)


def anything(shape: torch.Size) -> Range:
    """Return the range of which nothing is known."""
    low = torch.full((), -torch.inf, dtype=torch.double).expand(shape)
    return Range(low, -low)


@dataclass(frozen=True, eq=False)
class Operation:
    """One ATen call: its row, arguments with a Range for each tensor, result, and precision."""

    func: Any
    row: Row
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Tensor
    eps: float

    def varying(self) -> list[Range]:
        """Return the ranges of the arguments that are no known numbers."""
        return [r for r in self.ranges() if not r.is_point]

    def ranges(self) -> list[Range]:
        """Return the ranges of all tensors among the arguments."""
        found: list[Range] = []
        tree_map(lambda a: found.append(a) if isinstance(a, Range) else None, self._all())
        return found

    def at(self, choose: Callable[[Range], Tensor]) -> Tensor:
        """Return what the operator makes of one tensor for each range."""

        def chosen(value: Any) -> Any:
            if isinstance(value, Range):  # its own memory, laid out so that any view is possible
                return choose(value).clone(memory_format=torch.contiguous_format)
            return value

        args, kwargs = tree_map(chosen, self._all())
        found = self.func(*args, **kwargs)
        return found if isinstance(found, Tensor) else found[0]

    def _all(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.args, dict(self.kwargs)


def through(operation: Operation) -> Range:
    """Return the range of an operator's (first) output."""
    packet, shape = operation.func.overloadpacket, operation.out.shape
    name = packet.__name__.removesuffix("_")
    found = _RULES.get(name, _by_kind)(operation) if operation.ranges() else None
    if found is None and name in _BETWEEN:
        low, high = (torch.full(shape, end, dtype=torch.double) for end in _BETWEEN[name])
        found = Range(low, high)
    if found is None or found.low.shape != shape:
        return anything(shape)
    low = torch.nan_to_num(found.low, -torch.inf, torch.inf, -torch.inf)
    high = torch.nan_to_num(found.high, torch.inf, torch.inf, -torch.inf)
    return replace(found, low=low, high=high)


# what an operator's output is between, whatever goes in
_BETWEEN = {
    "_softmax": (0.0, 1.0),
    "sigmoid": (0.0, 1.0),
    "hardsigmoid": (0.0, 1.0),
    "tanh": (-1.0, 1.0),
    "sin": (-1.0, 1.0),
    "cos": (-1.0, 1.0),
    "erf": (-1.0, 1.0),
    "relu": (0.0, torch.inf),
    "abs": (0.0, torch.inf),
    "exp": (0.0, torch.inf),
}


BOUNDED = {*_BETWEEN, "native_layer_norm", "rsqrt", "hardtanh", "clamp", "embedding"}
BOUNDED -= {"relu", "abs", "exp"}
"""The operators whose outputs have a bound on both sides, and what RMS norms are made of."""


def _by_kind(o: Operation) -> Range | None:
    """Return what follows from the kind of an operator alone: entries that only move."""
    bits = any(isinstance(a, torch.dtype) for a in o.args)  # a view of them as other numbers
    by_strides = o.func.overloadpacket in (aten.as_strided, aten.as_strided_)
    if o.row.kind is not Kind.MOVE or by_strides or bits or not o.out.is_floating_point():
        return None
    found = _ends(o)
    return replace(found, is_point=not o.varying(), ball=_kept_ball(o))


def _kept_ball(o: Operation) -> Ball | None:
    """Return the ball of a tensor that is moved with its last dim whole."""
    ranges, name = o.ranges(), o.func.overloadpacket.__name__
    ball = ranges[0].ball if len(ranges) == 1 else None
    if ball is None or o.out.shape[-1:] != ranges[0].low.shape[-1:] or name not in _WHOLE_ROWS:
        return None
    last = len(ranges[0].low.shape) - 1
    by_dim = name in ("select", "slice", "unsqueeze")
    dim = o.args[1] if by_dim and len(o.args) > 1 else 0
    return None if by_dim and dim in (-1, last, last + 1) else ball


_WHOLE_ROWS = {
    *("view", "_unsafe_view", "reshape", "alias", "detach", "clone", "_to_copy", "contiguous"),
    *("select", "slice", "unsqueeze", "expand"),
}


def _ends(o: Operation) -> Range:
    """Return the range of an operator that never falls where what goes in rises."""
    return Range(o.at(lambda r: r.low), o.at(lambda r: r.high))


def _linear(o: Operation) -> Range | None:
    """Return the range of sums of products with known numbers."""
    varying = o.varying()
    scaled = any(o.kwargs.get(name, 1) != 1 for name in ("alpha", "beta"))
    if len(varying) != 1 or scaled or not o.out.is_floating_point():
        return None
    x = varying[0]
    operands = o.ranges()
    weight = max((r for r in operands if r.is_point), key=lambda r: r.low.dim(), default=None)
    if weight is None:
        return None
    middle, reach = (x.low + x.high) / 2, (x.high - x.low) / 2
    size = torch.maximum(x.low.abs(), x.high.abs())
    terms = weight.low.numel() // max(min(weight.low.shape[:2], default=1), 1)
    lost = (2 * terms + 4) * o.eps * o.at(lambda r: size if r is x else r.low.abs())
    center = o.at(lambda r: middle if r is x else r.low)
    spread = _unbiased(o, lambda r: reach if r is x else r.low.abs(), weight, x)
    found = Range(center - spread - lost, center + spread + lost)
    if x.ball is None or o.func.overloadpacket not in _ROWWISE:
        return found
    return _within(found, _ball_sums(o, x, weight))


def _unbiased(o: Operation, choose: Callable[[Range], Tensor], weight: Range, x: Range) -> Tensor:
    """Return the products alone, without what is added to them."""
    return o.at(lambda r: choose(r) if r is weight or r is x else torch.zeros_like(r.low))


def _ball_sums(o: Operation, x: Range, weight: Range) -> Range:
    """Return the range of sums over a ball: of its centre, and by its radius in the metric."""
    assert x.ball is not None
    ball, width = x.ball, len(x.ball.scale)
    rows = x.low.shape
    center = o.at(lambda r: ball.shift.expand(rows) if r is x else r.low)
    squares = _unbiased(
        o, lambda r: ball.scale.square().expand(rows) if r is x else r.low.square(), weight, x
    )
    if ball.centred:
        total = _unbiased(o, lambda r: ball.scale.expand(rows) if r is x else r.low, weight, x)
        squares = squares - total.square() / width + 1e-12 * squares
    reach = (width * squares.clamp(min=0)).sqrt()
    size = o.at(lambda r: ball.shift.abs().expand(rows) if r is x else r.low.abs()) + reach
    lost = size * max(width * o.eps, 1e-6)
    return Range(center - reach - lost, center + reach + lost)


def _within(a: Range, b: Range) -> Range:
    return Range(torch.fmax(a.low, b.low), torch.fmin(a.high, b.high))


_ROWWISE = {aten.mm, aten.addmm, aten.linear}


def _sum(o: Operation) -> Range | None:
    """Return the range of a sum or a difference of two, or of one and a number."""
    a, b, *more = o.args
    if more or o.kwargs.get("alpha", 1) != 1 or not o.out.is_floating_point():
        return None
    negative = o.func.overloadpacket in (aten.sub, aten.sub_)
    (al, ah), (bl, bh) = (_both(a), _both(b))
    bl, bh = (-bh, -bl) if negative else (bl, bh)
    known = not o.varying()
    size = torch.maximum(al.abs(), ah.abs()) + torch.maximum(bl.abs(), bh.abs())
    lost = 0.0 if known else o.eps * size
    said = None
    if isinstance(a, Range) and not isinstance(b, Range) and not negative and b >= 0:
        said = a.said  # a mean of squares and eps
    ball = None if negative else _shifted(a, b)
    return Range(al + bl - lost, ah + bh + lost, ball, known, said)


def _both(value: Any) -> tuple[Tensor, Tensor]:
    if isinstance(value, Range):
        return value.low, value.high
    number = torch.tensor(float(value), dtype=torch.double)
    return number, number


def _shifted(a: Any, b: Any) -> Ball | None:
    """Return the ball of a sum of one and known numbers by unit."""
    x, other = (a, b) if isinstance(a, Range) and a.ball is not None else (b, a)
    if not isinstance(x, Range) or x.ball is None:
        return None
    row = _row(other, len(x.ball.scale))
    return None if row is None else replace(x.ball, shift=x.ball.shift + row)


def _row(value: Any, width: int) -> Tensor | None:
    """Return known numbers as one for each unit, None where they are more."""
    if not isinstance(value, Range):
        return torch.full((width,), float(value), dtype=torch.double)
    numbers = value.low
    by_unit = numbers.numel() == 1 or numbers.shape[-1] == numbers.numel() == width
    return numbers.reshape(-1).expand(width) if value.is_point and by_unit else None


def _product(o: Operation) -> Range | None:
    """Return the range of a product, a ball where one is a tensor and one its inverse size."""
    a, b = o.args[:2]
    if not o.out.is_floating_point():
        return None
    (al, ah), (bl, bh) = (_both(a), _both(b))
    corners = torch.stack(torch.broadcast_tensors(al * bl, al * bh, ah * bl, ah * bh))
    undefined = corners.isnan().any(0)
    low = torch.where(undefined, -torch.inf, corners.amin(0))
    high = torch.where(undefined, torch.inf, corners.amax(0))
    known = not o.varying()
    lost = 0.0 if known else o.eps * torch.maximum(low.abs(), high.abs())
    found = Range(low - lost, high + lost, is_point=known)
    if a is b and isinstance(a, Range):
        return replace(found, low=found.low.clamp(min=0), said=("square", a))
    ball = _scaled(a, b) or _scaled(b, a)
    return found if ball is None else replace(_within(found, ball.range(o.out.shape)), ball=ball)


def _scaled(x: Any, other: Any) -> Ball | None:
    """Return the ball of a product: of one and numbers by unit, or of a tensor and its size."""
    if not isinstance(x, Range):
        return None
    if isinstance(other, Range) and other.said is not None and other.said[0] == "inverse":
        ones = torch.ones(x.low.shape[-1], dtype=torch.double)
        return Ball(ones, torch.zeros_like(ones), False) if other.said[1] is x else None
    row = None if x.ball is None else _row(other, len(x.ball.scale))
    if x.ball is None or row is None:
        return None
    return replace(x.ball, scale=x.ball.scale * row, shift=x.ball.shift * row)


def _power(o: Operation) -> Range | None:
    x, exponent = o.args
    if exponent != 2 or not isinstance(x, Range):
        return None
    high = torch.maximum(x.low.square(), x.high.square()) * (1 + o.eps)
    return Range(torch.zeros_like(high), high, said=("square", x))


def _average(o: Operation) -> Range | None:
    """Return the range of a sum or mean of entries."""
    if not o.out.is_floating_point():
        return None
    found, x = _ends(o), o.ranges()[0]
    terms = x.low.numel() // max(o.out.numel(), 1)
    lost = (terms + 2) * o.eps * o.at(lambda r: torch.maximum(r.low.abs(), r.high.abs()))
    return Range(found.low - lost, found.high + lost)


def _mean(o: Operation) -> Range | None:
    """Return the range of a mean, which over the last dim of a square is worth noting."""
    found, x = _average(o), o.ranges()[0]
    if found is None:
        return None
    dims = o.args[1] if len(o.args) > 1 else None
    last = x.low.dim() - 1
    over_last = isinstance(dims, list | tuple) and len(dims) == 1 and dims[0] in (-1, last)
    kept = len(o.args) > 2 and o.args[2]
    if x.said is not None and x.said[0] == "square" and over_last and kept:
        return replace(found, said=("mean", x.said[1]))
    return found


def _inverse_root(o: Operation) -> Range | None:
    x = o.ranges()[0]
    low = x.high.clamp(min=0).rsqrt() * (1 - 4 * o.eps)
    high = x.low.clamp(min=0).rsqrt() * (1 + 4 * o.eps)
    mean = x.said is not None and x.said[0] == "mean"
    return Range(low, high, said=("inverse", x.said[1]) if mean and x.said else None)


def _layer_norm(o: Operation) -> Range | None:
    """Return the ball in which what leaves a norm over the last dim lies."""
    _, shape, weight, bias, *_ = o.args
    if len(shape) != 1:
        return None
    ones = torch.ones(shape[0], dtype=torch.double)
    scale = ones if weight is None else _known(weight)
    shift = 0 * ones if bias is None else _known(bias)
    if scale is None or shift is None:
        return None
    return Ball(scale, shift, True).range(o.out.shape)


def _known(value: Range) -> Tensor | None:
    return value.low if value.is_point else None


def _batch_norm(o: Operation) -> Range | None:
    """Return the range of a batch norm with running statistics; in train mode nothing is known."""
    x, weight, bias, mean, var, *rest = o.args
    trains = rest[0] if isinstance(rest[0], bool) else "no_training" not in o.func._schema.name
    eps = next(a for a in reversed(o.args) if isinstance(a, float))
    if trains or mean is None or not (mean.is_point and var.is_point):
        return None
    if not all(p is None or p.is_point for p in (weight, bias)):
        return None
    rate = (var.low + eps).rsqrt() * (1 if weight is None else weight.low)
    shift = (0 if bias is None else bias.low) - mean.low * rate
    shape = [-1 if d == 1 else 1 for d in range(x.low.dim())]
    rate, shift, middle = (t.reshape(shape) for t in (rate, shift, mean.low))
    ends = torch.stack([end * rate + shift for end in (x.low, x.high)])
    size = (torch.maximum(x.low.abs(), x.high.abs()) + middle.abs()) * rate.abs()
    lost = 8 * o.eps * (size + ends.abs().amax(0))
    return Range(ends.amin(0) - lost, ends.amax(0) + lost)


def _dropout(o: Operation) -> Range | None:
    x, p, trains = o.args
    if trains is False or p == 0:
        return replace(x, is_point=False)
    if p >= 1:
        return None
    factor = (1 + 2 * o.eps) / (1 - p)
    return Range((x.low * factor).clamp(max=0), (x.high * factor).clamp(min=0))


def _converted(o: Operation) -> Range | None:
    """Return the range of a copy in another precision, which rounds."""
    x = o.ranges()[0]
    if not o.out.is_floating_point() or x.is_point:
        return x if o.out.is_floating_point() else None
    lost = o.eps * torch.maximum(x.low.abs(), x.high.abs())
    return Range(x.low - lost, x.high + lost, x.ball)


def _rows(o: Operation) -> Range | None:
    """Return the range of rows that are looked up."""
    table = o.args[0]
    if not isinstance(table, Range) or not table.is_point:
        return None
    return Range(table.low.amin(0).expand(o.out.shape), table.low.amax(0).expand(o.out.shape))


def _filled(o: Operation) -> Range | None:
    x, _, value = o.args
    low, high = _both(value)
    return Range(torch.minimum(x.low, low), torch.maximum(x.high, high))


_RULES: dict[str, Callable[[Operation], Range | None]] = {
    **dict.fromkeys(
        (
            *("relu", "hardtanh", "clamp", "clamp_min", "clamp_max", "sigmoid", "tanh"),
            *("hardsigmoid", "softplus", "exp", "erf", "amax", "amin", "upsample_nearest2d"),
            *("max_pool2d_with_indices", "adaptive_max_pool2d"),
        ),
        lambda o: _ends(o) if o.out.is_floating_point() else None,
    ),
    **dict.fromkeys(
        ("sum", "avg_pool1d", "avg_pool2d", "_adaptive_avg_pool2d", "upsample_bilinear2d"), _average
    ),
    **dict.fromkeys(("mm", "addmm", "linear", "convolution", "bmm"), _linear),
    **dict.fromkeys(("add", "sub"), _sum),
    "mul": _product,
    "pow": _power,
    "mean": _mean,
    "rsqrt": _inverse_root,
    "native_layer_norm": _layer_norm,
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "_to_copy": _converted,
    "native_dropout": _dropout,
    "embedding": _rows,
    "masked_fill": _filled,
}
