"""GradMax: new units that will get the largest gradient.

Source: Evci, van Merriënboer, Unterthiner, Vladymyrov, Pedregosa 2022, "GradMax".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from graphgrow.ir.graph import Graph
from graphgrow.moments import Moments
from graphgrow.passes.weights import Given, ZeroIncoming
from graphgrow.scores.proposal import Proposal, Site, untied


@dataclass(frozen=True)
class GradMax:
    """Zero incoming weights; outgoing ones along the top singular vectors of the cross moment.

    Each new unit's outgoing weights have `scale` times the mean norm of present units' (the
    paper's code), or the norm `norm`. Where an activation has no slope at zero (torch's ReLU), new
    units hold a
    constant that is folded out of the consumers' biases; a consumer that pads with zeros cannot
    fold it, and there is no proposal then.

    Where new units hold zero, the target is a gradient step of their incoming weights.

    The gain is the squared norm of the gradient of the new incoming weights: the decrease of the
    loss to first order for one unit of learning rate. Orthogonal directions are the best only among
    orthogonal ones: the paper's constraint on the norm alone would copy the first direction.
    """

    units: int = 1
    scale: float = 0.5
    norm: float | None = None
    project: ClassVar[bool] = False

    def proposals(self, graph: Graph, moments: Mapping[str, Moments]) -> list[Proposal]:
        """Return a proposal for each axis where units are alive and exact."""
        found = (self._proposal(graph, m) for m in untied(graph, moments))
        return [p for p in found if p is not None]

    def _proposal(self, graph: Graph, moments: Moments) -> Proposal | None:
        count = min(self.units, *moments.cross.shape[1:])
        site = Site.of(graph, moments, count)
        size = self.scale * outgoing_norm(site) if self.norm is None else self.norm
        for constant in (0.0, 1.0):
            found = self._with(site, constant, size)
            if found is not None and found.rewrite.obstacle(graph) is None:
                return found
        return None

    def _with(self, site: Site, constant: float, size: float) -> Proposal | None:
        """Return the proposal of units that hold a constant, None where they would get nothing."""
        count, moments = len(site.change.new), site.moments
        carriers = site.graph.axes[moments.axis].carriers
        carried = site.drawn(ZeroIncoming(constant), carriers)
        cross = site.sloped(moments.cross, site.follow(carried))
        if not cross.any():
            return None
        _, values, right = torch.linalg.svd(cross, full_matrices=False)
        omega = size * right[:, :count].transpose(0, 1) / moments.parts**0.5
        gain = float((values[:, :count] * size).square().sum() / moments.parts)
        zero = site.incoming(torch.zeros(count, *cross.shape[:2]))
        outgoing, target = site.outgoing(omega), None
        if not constant:  # else a step of its incoming weights alone is no step from zero
            stepped = torch.einsum("geo,kgo->kge", cross, omega)
            target = Given.of(site.incoming(stepped), outgoing)
        weights = Given.of({**zero, **carried}, outgoing)
        return site.proposal(weights, gain, "learning rate", target)


def outgoing_norm(site: Site) -> float:
    """Return the mean norm of a present unit's outgoing weights."""
    squares = torch.zeros(site.graph.axes[site.moments.axis].width, dtype=torch.double)
    present = Site.of(site.graph, site.moments, 0).change
    for consumer in site.moments.consumers:
        weight, at = site.graph.state[consumer.path], site.dim(consumer.path)
        rows = present.slices(weight, at.path, at.dim)
        squares += rows.double().square().sum(1)
    return float(squares.sqrt().mean()) or 1.0
