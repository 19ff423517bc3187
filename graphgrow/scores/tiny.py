"""TINY: new units that take away most of the expressivity bottleneck.

Source: Verbockhaven, Rudkiewicz, Charpiat, Chevallier 2024, "Growing tiny networks".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from graphgrow.ir.graph import Graph
from graphgrow.measure.spectral import best_update, inverse_root
from graphgrow.moments import Moments
from graphgrow.passes.weights import Given
from graphgrow.scores.proposal import Proposal, Site, untied


@dataclass(frozen=True)
class Tiny:
    """Units whose linear effect comes nearest to what present weights cannot do (Prop. 3.2).

    Takes `units` of them, or left out all that are significant: those whose singular value is
    larger than independent noise of the same size would give (see `noise`). The rewrite gives new
    units their optimal incoming weights, which nothing reads; `target` has the optimal outgoing
    ones too, for `amplify` to go there.

    The gain is the decrease of the loss for one unit of amplitude, to first order where activations
    are linear around what new units hold at first; ReLU counts by its right side. It is taken with
    the whole desired update: the paper's Σλ² leaves out that new units' effect is not orthogonal to
    that of present ones.
    """

    units: int | None = None
    project: ClassVar[bool] = True

    def proposals(self, graph: Graph, moments: Mapping[str, Moments]) -> list[Proposal]:
        """Return a proposal for each axis where one significant unit at least is found."""
        found = (self._proposal(graph, m) for m in untied(graph, moments))
        return [p for p in found if p is not None and p.rewrite.obstacle(graph) is None]

    def _proposal(self, graph: Graph, moments: Moments) -> Proposal | None:
        values, alpha, omega = solved(moments)
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
        cross = site.cross(follower, ahead=1e-9)
        gain = torch.einsum("kge,geo,kgo->", alpha[:count], cross, omega[:count])
        start = Given.of({**carried, **incoming})
        return site.proposal(start, float(gain), "amplitude", Given.of(incoming, outgoing))


def solved(moments: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """Return singular values `(parts, rank)`, incoming and outgoing weights of the optimal units.

    Weights are `(units, parts, in)` and `(units, parts, out)`, in the order of singular values.
    Where a consumer reads a position several times (kernels, a module called twice) its outgoing
    weights are as large as a bound allows that holds for each unit: then the bottleneck falls by
    the square of the singular value at least; else by exactly that.

    Source: Prop. 3.2 and appendix C.2, whose trace identity holds for one offset only.
    """
    if moments.projected is None:
        raise ValueError(
            f"cannot solve for units of axis '{moments.axis}': its moments are not projected; "
            "measure with project=True"
        )
    reads = torch.ones(moments.cross.shape[2], dtype=torch.double, device=moments.cross.device)
    for consumer in moments.consumers:
        reads[consumer.columns] = consumer.reads
    root = inverse_root(moments.inputs)
    left, values, right = torch.linalg.svd(
        root @ moments.projected / reads.sqrt(), full_matrices=False
    )
    least = values[..., :1] * max(moments.cross.shape[1:]) * torch.finfo(values.dtype).eps
    values = torch.where(values > least, values, 0.0)
    scale = values.sqrt()[..., None, :]
    alpha = (root @ left) * scale  # (parts, in, rank)
    omega = right.mT * scale / reads.sqrt()[:, None]
    return values, alpha.permute(2, 0, 1), omega.permute(2, 0, 1)


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
