"""TINY: new units that take away most of the expressivity bottleneck.

Source: Verbockhaven, Rudkiewicz, Charpiat, Chevallier 2024, "Growing tiny networks".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from graphgrow.ir.graph import Graph
from graphgrow.measure.spectral import best_update, inverse_root
from graphgrow.moments import Consumer, Moments
from graphgrow.passes.weights import Given
from graphgrow.scores.proposal import Proposal, Site, untied


@dataclass(frozen=True)
class Tiny:
    """Units whose linear effect comes nearest to what present weights cannot do (Prop. 3.2).

    Takes `units` of them, or left out all that are significant: those whose singular value is
    larger than independent noise of the same size would give (see `noise`). The rewrite gives new
    units their optimal incoming weights, which nothing reads; `target` has the optimal outgoing
    ones too, for `amplify` to go there.

    With `joint`, units and the update of present weights beside them are the best together, which
    is never worse: units are found from what present ones do not see of their inputs, and the step
    of `amplify` moves present weights too. Where several layers read an axis, no closed form is
    known, and units are those of the problem solved one after the other.

    The gain is the decrease of the loss for one unit of amplitude, to first order where activations
    are linear around what new units hold at first; ReLU counts by its right side. It is taken with
    the whole desired update: the paper's Σλ² leaves out that new units' effect is not orthogonal to
    that of present ones.

    Source: Props. 3.1 and 3.2, eq. 6; the closed form of eq. 5 (appendix C.4 leaves it open) is
    ours.
    """

    units: int | None = None
    joint: bool = False

    @property
    def project(self) -> bool:
        """Whether moments must be projected: the joint problem does that itself."""
        return not self.joint

    @property
    def overlap(self) -> bool:
        """Whether what producers and consumers read must be measured together."""
        return self.joint

    @property
    def needs(self) -> tuple[str, ...]:
        """Which moments it looks at beside these: the gradient's says what is noise."""
        beside = ("present", "desired") if self.joint else ()
        return ("inputs", "cross", *beside, *(("gradient",) if self.units is None else ()))

    def proposals(self, graph: Graph, moments: Mapping[str, Moments]) -> list[Proposal]:
        """Return a proposal for each axis where one significant unit at least is found."""
        found = (self._proposal(graph, m) for m in untied(graph, moments))
        return [p for p in found if p is not None and p.rewrite.obstacle(graph) is None]

    def _proposal(self, graph: Graph, moments: Moments) -> Proposal | None:
        values, alpha, omega = solved(moments, joint=self.joint)
        count = significant(moments, values) if self.units is None else self.units
        count = min(count, int((values > 0).all(0).sum()))
        if count == 0:
            return None
        site = Site.of(graph, moments, count)
        carried = site.neutral()
        follower = site.follow(carried)
        if not all(arrival.content.zero().all() for arrival in follower.arrivals):
            return None  # an activation that is not zero at zero: units would add a constant
        incoming, outgoing = site.incoming(alpha[:count]), site.outgoing(omega[:count])
        units = torch.einsum("kge,kgo->geo", alpha[:count], omega[:count])
        made = site.sloped(units, follower, ahead=1e-9)
        gain, update = float((made * moments.cross).sum()), None
        if self.joint:
            step = beside(moments, made)
            gain += sum(float((step[c.path] * c.desired).sum()) for c in moments.consumers)
            update = placed(graph, moments, step)
        start = Given.of({**carried, **incoming})
        return site.proposal(start, gain, "amplitude", Given.of(incoming, outgoing), update)


def solved(moments: Moments, *, joint: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return singular values `(parts, rank)`, incoming and outgoing weights of the optimal units.

    Weights are `(units, parts, in)` and `(units, parts, out)`, in the order of singular values.
    Where a consumer reads a position several times (kernels, a module called twice) its outgoing
    weights are as large as a bound allows that holds for each unit: then the bottleneck falls by
    the square of the singular value at least; else by exactly that.

    Source: Prop. 3.2 and appendix C.2, whose trace identity holds for one offset only.
    """
    reads = torch.ones(moments.cross.shape[2], dtype=torch.double, device=moments.cross.device)
    for consumer in moments.consumers:
        reads[consumer.columns] = consumer.reads
    inputs, projected = unseen(moments) if joint else (moments.inputs, _projected(moments))
    root = inverse_root(inputs, of=moments.inputs)
    left, values, right = torch.linalg.svd(root @ projected / reads.sqrt(), full_matrices=False)
    least = values[..., :1] * max(moments.cross.shape[1:]) * torch.finfo(values.dtype).eps
    values = torch.where(values > least, values, 0.0)
    scale = values.sqrt()[..., None, :]
    alpha = (root @ left) * scale  # (parts, in, rank)
    omega = right.mT * scale / reads.sqrt()[:, None]
    return values, alpha.permute(2, 0, 1), omega.permute(2, 0, 1)


def _projected(moments: Moments) -> Tensor:
    if moments.projected is None:
        raise ValueError(
            f"cannot solve for units of axis '{moments.axis}': its moments are not projected; "
            "measure with project=True"
        )
    return moments.projected


# ------------------------------------------------------------ units and present weights together


def unseen(moments: Moments) -> tuple[Tensor, Tensor]:
    """Return covariance of inputs and cross moment of what present weights do not see of them.

    Of what producers read, the part that is linear in what the consumer reads is taken away, at
    each place where that reads a unit: S − Σ CA⁺Cᵀ over places and N − CA⁺D, with A its present
    activations' covariance, C the overlap and D what it desires. Several consumers see different
    parts: then the covariance is whole.
    """
    inputs, cross = moments.inputs, moments.cross.clone()
    for c in moments.consumers:
        overlap = _overlap(moments, c)
        seen = overlap @ inverse_root(c.present, -1.0)[:, None]  # (parts, places, in, b)
        wanted = _by_place(moments, c, moments.cross[..., c.columns], c.desired.shape[-1])
        _set(moments, c, cross, wanted - seen @ c.desired[:, None])
        if len(moments.consumers) == 1:
            inputs = inputs - (seen @ overlap.mT).sum(1) / c.reads
    return inputs, cross


def beside(moments: Moments, units: Tensor) -> dict[str, Tensor]:
    """Return the best update of consumers' present weights beside new units, `(g, b, o)` by path.

    `units` `(parts, in, out)` is how these map what producers read to what consumers write.
    """
    found = {}
    for c in moments.consumers:
        made = _by_place(moments, c, units[..., c.columns], c.desired.shape[-1])
        taken = (_overlap(moments, c).mT @ made).sum(1)  # (parts, b, o)
        taken = taken if len(c.desired) == len(taken) else taken.sum(0, keepdim=True)
        found[c.path] = best_update(c.present, c.desired - taken)
    return found


def _overlap(moments: Moments, consumer: Consumer) -> Tensor:
    """Return what producers and a consumer read together: `(parts, places, in, b)`."""
    if consumer.overlap is None:
        raise ValueError(
            f"cannot solve for units and present weights of axis '{moments.axis}' together: the "
            "overlap of their inputs is not measured; measure with overlap=True"
        )
    return _by_place(moments, consumer, consumer.overlap, consumer.present.shape[-1])


def _by_place(moments: Moments, consumer: Consumer, columns: Tensor, size: int) -> Tensor:
    """Return columns of a consumer `(parts, in, columns)` as `(parts, places, in, size)`.

    Places are offsets of a kernel, which stand last among columns, or positions that were
    flattened, which stand first.
    """
    if moments.route.reads[consumer.path][0].flat:
        return columns.unflatten(2, (-1, size)).transpose(1, 2)
    return columns.unflatten(2, (size, -1)).permute(0, 3, 1, 2)


def _set(moments: Moments, consumer: Consumer, joined: Tensor, found: Tensor) -> None:
    """Write `(parts, places, in, o)` into the columns of a consumer."""
    flat = moments.route.reads[consumer.path][0].flat
    order = (0, 2, 1, 3) if flat else (0, 2, 3, 1)
    joined[..., consumer.columns] = found.permute(order).flatten(2)


# ------------------------------------------------------------ present weights alone


def best_step(graph: Graph, moments: Moments) -> dict[str, Tensor]:
    """Return the update of present consumers' weights and biases that is best without new units.

    By path, in the shapes of the parameters; `advance` goes along it as far as that helps.

    Source: Prop. 3.1.
    """
    found = {c.path: best_update(c.present, c.desired) for c in moments.consumers}
    return placed(graph, moments, found)


def placed(graph: Graph, moments: Moments, update: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return updates `(g, b, o)` of consumers by path in the shapes of their parameters."""
    found: dict[str, Tensor] = {}
    for path, entries in update.items():
        weight, use = graph.state[path], moments.route.reads[path][0].product
        rows = entries.mT.flatten(0, 1)  # (out, b)
        whole = rows if use.bias is None else rows[:, :-1]
        found[path] = (whole if use.out == 0 else whole.mT).reshape(weight.shape)
        if use.bias is not None:
            found[use.bias] = rows[:, -1]
    return found


def bottleneck(moments: Moments) -> float:
    """Return the expressivity bottleneck Ψ at the consumers of an axis (Definition 3.1).

    It is the mean over examples of the squared part of the desired update that no update of the
    consumers' own weights gives: in units of (loss per pre-activation)².
    """
    total = 0.0
    for consumer in moments.consumers:
        able = (best_update(consumer.present, consumer.desired) * consumer.desired).sum()
        total += float(consumer.gradient.diagonal(dim1=-2, dim2=-1).sum() - able)
    return total


def noise(moments: Moments) -> float:
    """Return the largest singular value to expect where inputs say nothing of the desired update.

    With n examples and independent entries of the desired update's largest variance s², it is
    s · (√in + √out) / √n (Bai and Yin's edge).
    """
    largest = max(
        float(torch.linalg.eigvalsh(c.gradient)[..., -1].max()) for c in moments.consumers
    )
    rows, columns = moments.cross.shape[1:]
    return math.sqrt(max(largest, 0.0) / moments.examples) * (rows**0.5 + columns**0.5)


def significant(moments: Moments, values: Tensor) -> int:
    """Return how many singular values, `(parts, rank)`, are above noise in all parts."""
    return int((values > noise(moments)).all(0).sum())
