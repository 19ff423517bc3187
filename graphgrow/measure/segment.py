"""The affine piece of a piecewise linear graph at one input, and where its decisions change.

Nothing is assumed of the model but that it is affine around the input in eval mode (ReLU and other
piecewise linear activations, convolutions, batch norm, pooling): the piece is its Jacobian.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from graphgrow.errors import NotApplicable
from graphgrow.ir.graph import Graph
from graphgrow.measure.replica import Replica, doubled

STEPS, HALVINGS = 20, 60
LEVEL = 1e-9  # a margin below this share of the outputs counts as zero
BEND = 1e-9  # a second derivative below this share of the first counts as none


@dataclass(frozen=True, eq=False)
class Segment:
    """What a graph computes around one input: `weight` `(out, in)` times it, plus `bias` `(out,)`.

    Input and output are flattened.
    """

    weight: Tensor
    bias: Tensor


def segment(graph: Graph, x: Tensor) -> Segment:
    """Return the activated affine segment of a graph at one input, in eval mode.

    `x` is one example without the batch dim; the graph takes one input.

    Raises:
        NotApplicable: where the graph is not affine there.

    Source: Kang 2025, "activated linear segment", read off a shallow MLP there.
    """
    return piece(Replica(graph), x)


def piece(replica: Replica, x: Tensor) -> Segment:
    """Return the affine segment of a replica's graph at one input."""
    point = doubled(x).detach().clone().requires_grad_()
    output = replica.output(twice(point))[0].flatten()
    rows = [_gradient(entry, point) for entry in output]
    _affine(output, point)
    weight = torch.stack(rows).flatten(1)
    return Segment(weight, output.detach() - weight @ point.detach().flatten())


def twice(x: Tensor) -> Tensor:
    """Return a batch of one example, two times: torch's group norm may refuse to take one."""
    return torch.stack([x, x])


def _gradient(entry: Tensor, point: Tensor) -> Tensor:
    if not entry.requires_grad:
        return torch.zeros_like(point)
    (found,) = torch.autograd.grad(entry, point, retain_graph=True, allow_unused=True)
    return torch.zeros_like(point) if found is None else found


def _affine(output: Tensor, point: Tensor) -> None:
    """Raise where a second derivative is not zero, along fixed mixed directions."""
    if not output.requires_grad:
        return
    mix = torch.cos(torch.arange(len(output)).to(output))
    (slope,) = torch.autograd.grad(output @ mix, point, create_graph=True)
    if not slope.requires_grad:
        return
    along = torch.sin(1 + torch.arange(slope.numel()).to(slope))
    (bend,) = torch.autograd.grad(slope.flatten() @ along, point, allow_unused=True)
    if bend is not None and bend.norm() > BEND * slope.norm():
        raise NotApplicable(
            "cannot take the affine segment at an input: the second derivative there is "
            f"{float(bend.norm()):.1e} beside a first of {float(slope.detach().norm()):.1e}; it "
            "takes a graph of piecewise linear operators, such as ReLU"
        )


def boundary(
    replica: Replica, x: Tensor, mix: Tensor, others: Iterable[Tensor] = ()
) -> Tensor | None:
    """Return a point near `x` where `mix` `(out,)` times the outputs is zero.

    The nearest point of the boundary of the segment at `x`, if it lies on that segment. If not, the
    same step is taken again from there, until the sign changes; then a point of the boundary is on
    the straight line. Where that leads nowhere, it is on the line to the first of `others` on the
    other side. Without one the model has no boundary that we know of: then it is that of the
    segment, if extended; None where nothing is active.

    Source: Kang 2025, fold point search: the first step alone, which may leave the segment.
    """
    point, first = doubled(x), None
    start = margin(replica, point, mix)
    for _ in range(STEPS):
        here = piece(replica, point)
        weight, level = mix @ here.weight, LEVEL * (1 + float(here.bias.abs().max()))
        now = float(weight @ point.flatten() + mix @ here.bias)
        if abs(now) <= level:
            return point
        if not weight.any():
            break
        ahead = point - (now * weight / (weight @ weight)).reshape(point.shape)
        then = margin(replica, ahead, mix)
        if then * now < 0 and abs(then) > level:
            return _between(replica, point, ahead, mix)
        point, first = ahead, ahead if first is None else first
    for other in others:
        if margin(replica, doubled(other), mix) * start < 0:
            return _between(replica, doubled(x), doubled(other), mix)
    return first


def margin(replica: Replica, x: Tensor, mix: Tensor) -> float:
    """Return `mix` times the outputs at one input."""
    with torch.no_grad():
        return float(mix @ replica.output(twice(x))[0].flatten())


def _between(replica: Replica, one: Tensor, other: Tensor, mix: Tensor) -> Tensor:
    """Return a point of the line between two on different sides where the sign changes."""
    sign = margin(replica, one, mix) > 0
    for _ in range(HALVINGS):
        middle = (one + other) / 2
        if (margin(replica, middle, mix) > 0) == sign:
            one = middle
        else:
            other = middle
    return (one + other) / 2


def surface(replica: Replica, x: Tensor, y: Tensor) -> Tensor:
    """Return the input at which the segment at `x` comes nearest to the point (x, y).

    That is the nearest point of the regression surface, seen in the space of inputs.

    Source: Kang 2025, where regression curves take the place of decision boundaries.
    """
    here = piece(replica, x)
    missing = doubled(y).flatten() - here.weight @ doubled(x).flatten() - here.bias
    gram = torch.eye(len(missing)).to(missing) + here.weight @ here.weight.T
    step = here.weight.T @ torch.linalg.solve(gram, missing)
    return doubled(x) + step.reshape(x.shape)
