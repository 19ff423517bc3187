"""GradMax: new units that will get the largest gradient.

Source: Evci, van Merriënboer, Unterthiner, Vladymyrov, Pedregosa 2022, "GradMax".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from graphgrow.ir.graph import Graph
from graphgrow.moments import Moments
from graphgrow.passes.weights import Given, ZeroIncoming
from graphgrow.scores.proposal import Proposal, Site, untied


@dataclass(frozen=True)
class GradMax:
    """Zero incoming weights; outgoing ones along the top singular vectors of the cross moment.

    Each new unit's outgoing weights have `scale` times the mean norm of present units' (the
    paper's code), or the norm `norm`. Where an activation has no slope at zero (torch's ReLU), new
    units hold a constant that is folded out of the consumers' biases. A consumer without a bias, or
    that pads with zeros, cannot fold it: then outgoing weights are the corners of a simplex over
    one direction less, which sum to zero, so that the constants of the units cancel; it takes two
    units at least.

    Where new units hold zero, the target is a gradient step of their incoming weights.

    The gain is the squared norm of the gradient of the new incoming weights: the decrease of the
    loss to first order for one unit of learning rate. Orthogonal directions are the best only among
    orthogonal ones: the paper's constraint on the norm alone would copy the first direction.
    """

    units: int = 1
    scale: float = 0.5
    norm: float | None = None
    project: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("cross",)

    def proposals(self, graph: Graph, moments: Mapping[str, Moments]) -> list[Proposal]:
        """Return a proposal for each axis where units are alive and exact."""
        found = (self._proposal(graph, m) for m in untied(graph, moments))
        return [p for p in found if p is not None]

    def _proposal(self, graph: Graph, moments: Moments) -> Proposal | None:
        count = min(self.units, *moments.cross.shape[1:])
        site = Site.of(graph, moments, count)
        size = self.scale * outgoing_norm(site) if self.norm is None else self.norm
        for constant, frame in ((0.0, _corner), (1.0, _corner), (1.0, _simplex)):
            found = self._with(site, constant, size, frame)
            if found is not None and found.rewrite.obstacle(graph) is None:
                return found
        return None

    def _with(self, site: Site, constant: float, size: float, frame: Frame) -> Proposal | None:
        """Return the proposal of units that hold a constant, None where they would get nothing."""
        count, moments = len(site.change.new), site.moments
        carriers = site.graph.axes[moments.axis].carriers
        carried = {**site.drawn(ZeroIncoming(constant), carriers), **site.filters()}
        cross = site.sloped(moments.cross, site.follow(carried))
        if not cross.any():
            return None
        right = torch.linalg.svd(cross, full_matrices=False)[2]  # (parts, rank, out)
        turned = frame(count).to(right)
        omega = torch.einsum("kr,gro->kgo", turned, right[:, : turned.shape[1]])
        omega = size * omega / moments.parts**0.5
        if frame is _simplex:
            omega = _balanced(omega, [site.graph.state[c.path].dtype for c in moments.consumers])
        slope = torch.einsum("geo,kgo->kge", cross, omega)
        zero = site.incoming(torch.zeros(count, *cross.shape[:2]))
        outgoing, target = site.outgoing(omega), None
        if not constant:  # else a step of its incoming weights alone is no step from zero
            target = Given.of(site.incoming(slope), outgoing)
        weights = Given.of({**zero, **carried}, outgoing)
        gain = float(slope.square().sum())
        return site.proposal(weights, gain, "learning rate", target) if gain else None


Frame = Callable[[int], Tensor]
"""Gives directions of length one for so many units, `(units, rank)`."""


def _corner(count: int) -> Tensor:
    """Return one direction of its own for each unit."""
    return torch.eye(count, dtype=torch.double)


def _simplex(count: int) -> Tensor:
    """Return the corners of a simplex: they sum to zero, and each direction counts the same."""
    ones = torch.ones(count, 1, dtype=torch.double)
    basis = torch.linalg.qr(torch.cat([ones, torch.eye(count, dtype=torch.double)], 1)).Q
    return basis[:, 1:] * (count / max(count - 1, 1)) ** 0.5


def _balanced(omega: Tensor, dtypes: Iterable[torch.dtype]) -> Tensor:
    """Return weights `(units, ...)` that sum to zero without any rounding in these types.

    They are multiples of one number, few enough for their sums to be exact.
    """
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    largest = float(omega.abs().max()) * len(omega) or 1.0
    unit = 2.0 ** math.ceil(math.log2(largest * eps))
    most = (omega[:-1] / unit).round() * unit
    return torch.cat([most, -most.sum(0, keepdim=True)])


def outgoing_norm(site: Site) -> float:
    """Return the mean norm of a present unit's outgoing weights."""
    squares = torch.zeros(site.graph.axes[site.moments.axis].width, dtype=torch.double)
    present = Site.of(site.graph, site.moments, 0).change
    for consumer in site.moments.consumers:
        weight, at = site.graph.state[consumer.path], site.dim(consumer.path)
        rows = present.slices(weight, at.path, at.dim)
        squares += rows.double().square().sum(1)
    return float(squares.sqrt().mean()) or 1.0
