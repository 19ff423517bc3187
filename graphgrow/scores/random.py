"""Random units that nothing reads yet, as growth without any information has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from graphgrow.ir.graph import Graph
from graphgrow.moments import Moments
from graphgrow.passes.weights import Given, ZeroIncoming, ZeroOutgoing
from graphgrow.scores.proposal import Proposal, Site, untied


@dataclass(frozen=True)
class Random:
    """Incoming weights drawn with the size of present ones, outgoing ones zero; both in the target.

    The gain is the squared norm of the gradient of the new outgoing weights: the decrease of the
    loss to first order for one unit of learning rate, activations taken for linear.
    """

    units: int = 1
    seed: int = 0
    project: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("cross",)

    def proposals(self, graph: Graph, moments: Mapping[str, Moments]) -> list[Proposal]:
        """Return a proposal for each axis."""
        found = (self._proposal(graph, m) for m in untied(graph, moments))
        return [p for p in found if p.rewrite.obstacle(graph) is None]

    def _proposal(self, graph: Graph, moments: Moments) -> Proposal:
        site = Site.of(graph, moments, self.units)
        carried = site.neutral()
        incoming = site.drawn(ZeroOutgoing(self.seed), graph.axes[moments.axis].producers)
        alpha = torch.zeros(self.units, *moments.cross.shape[:2], dtype=torch.double)
        for producer in moments.producers:
            rows = slice(producer.rows.start, producer.rows.start + producer.entries)
            mine = incoming[producer.path][:, site.old(producer.path)]
            alpha[:, :, rows] = mine.reshape(self.units, moments.parts, -1)
        cross = site.sloped(moments.cross, site.follow(carried), ahead=1e-9)
        gain = float(torch.einsum("kge,geo->kgo", alpha.to(cross), cross).square().sum())
        weights = Given.of({**carried, **incoming}, seed=self.seed)
        consumers = graph.axes[moments.axis].consumers
        outgoing = site.drawn(ZeroIncoming(seed=self.seed), consumers)
        return site.proposal(weights, gain, "learning rate", Given.of(incoming, outgoing))
