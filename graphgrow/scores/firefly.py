"""Firefly: split units and new ones are tried all together, a little, and the best are kept.

Source: Wu, Liu, Stone, Liu 2020, "Firefly neural architecture descent".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from graphgrow.ir.graph import Graph
from graphgrow.measure.replica import Replica
from graphgrow.moments import Loss
from graphgrow.passes.units import Resized, inserted
from graphgrow.passes.weights import Given, ZeroOutgoing
from graphgrow.passes.widen import Widen
from graphgrow.scores.departure import Departure
from graphgrow.scores.proposal import Proposal, costed
from graphgrow.scores.rows import Rows, fan_in
from graphgrow.scores.twins import Batches, Twins, apart, splittable

# Gauss and Legendre's points and weights on (0, 1), exact for polynomials of degree 9
NODES = np.polynomial.legendre.leggauss(5)


@dataclass(frozen=True)
class Firefly:
    """The best of two kinds of units: halves of present ones moved apart, and new ones.

    All units of an axis are split, to θ + εδ and θ − εδ, and `new` units are added, with outgoing
    weights ε times a direction. With ε the same for all, `step` times the mean length of present
    weights, directions go down the loss for `descent` steps on all batches. Then ε of each goes
    from zero to there, and its share of the change of the loss is its integrated gradient; the
    `units` of the largest decreases are proposed, split ones and new ones as two proposals.

    Rewrites keep the function: halves are equal, new units have their incoming weights and nothing
    reads them. `target` is the rest of the way at a step of one. The gain is what is predicted for
    that: the decrease of the loss in its own units, for so large a step. The paper lets descent
    change ε as well, within its bound, which it mostly reaches; and integrates for one candidate at
    a time with others at their bound, we for all at once, so that shares add up to the change.
    """

    units: int = 1
    new: int = 4
    step: float = 0.1
    descent: int = 10
    seed: int = 0

    def propose(
        self, graph: Graph, batches: Batches, loss: Loss, axes: Sequence[str] | None = None
    ) -> list[Proposal]:
        """Return the proposals for each axis, of those asked for or all, where a unit helps."""
        batches = list(batches)
        found: list[Proposal] = []
        for name in splittable(graph, axes):
            candidates = Candidates(graph, name, self, batches, loss)
            candidates.descend()
            found += candidates.proposals(candidates.decreases())
        return found


class Candidates:
    """The split and new units of one axis, all of them in one graph, and their directions."""

    def __init__(self, graph: Graph, name: str, how: Firefly, batches: Batches, loss: Loss) -> None:
        self.graph, self.name, self.how = graph, name, how
        self.batches, self.loss = batches, loss
        axis = graph.axes[name]
        added = Widen(name, how.new, weights=ZeroOutgoing(how.seed))
        self.twins = Twins.of(graph, name, added, extra=how.new)
        change, dims = self.twins.first.change, fan_in(graph, axis)
        self.incoming = Rows(change, self.twins.extra, dims)
        self.outgoing = Rows(change, self.twins.extra, axis.consumers)
        self.carried = Rows(change, self.twins.extra, (*axis.producers, *axis.carriers))
        self.replica = Replica(self.twins.graph, (*self.incoming.paths, *self.outgoing.paths))
        tensors, generator = self.replica.tensors, torch.Generator().manual_seed(how.seed)
        present = Resized(graph.analysis, name, np.arange(axis.width))
        reads = Rows(present, present.old, axis.consumers).read(graph.state).detach().double()
        self.start = self.twins.first.read(tensors).detach()
        self.length = float(self.start.norm(dim=1).mean()) or 1.0
        self.reach = float(reads.norm(dim=1).mean()) or 1.0

        def drawn(like: Tensor) -> Tensor:
            numbers = torch.randn(like.shape, generator=generator, dtype=torch.double)
            return F.normalize(numbers.to(like), dim=1)

        self.splits = drawn(self.start)
        self.ins = F.normalize(self.incoming.read(tensors).detach(), dim=1)
        self.outs = drawn(self.outgoing.read(tensors))

    def place(self, share: float) -> None:
        """Set all candidates to a share of ε."""
        tensors, step = self.replica.tensors, share * self.how.step
        self.twins.first.write(tensors, self.start + step * self.length * self.splits)
        self.twins.second.write(tensors, self.start - step * self.length * self.splits)
        self.incoming.write(tensors, self.length * self.ins)
        self.outgoing.write(tensors, step * self.reach * self.outs)

    def slopes(self, share: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss's gradient by displacements, new incoming and outgoing weights."""
        self.place(share)
        value = self.replica.loss(self.batches, self.loss)
        rows = (self.twins.first, self.twins.second, self.incoming, self.outgoing)
        first, second, ins, outs = (r.gradient(value, self.replica.tensors) for r in rows)
        return first - second, ins, outs

    def descend(self) -> None:
        """Turn all directions against the gradient of the loss at ε."""
        rate = 0.5
        for _ in range(self.how.descent):
            splits, ins, outs = (F.normalize(s, dim=1) for s in self.slopes(1.0))
            self.splits = F.normalize(self.splits - rate * splits, dim=1)
            self.ins = F.normalize(self.ins - rate * ins, dim=1)
            self.outs = F.normalize(self.outs - rate * outs, dim=1)
            rate *= 0.01 ** (1 / self.how.descent)

    def decreases(self) -> Tensor:
        """Return each candidate's share in the decrease of the loss: splits, then new units."""
        total = torch.zeros(len(self.splits) + len(self.outs)).to(self.splits)
        for node, weight in zip(*NODES, strict=True):
            splits, _, outs = self.slopes((node + 1) / 2)
            along = (self.length * splits * self.splits, self.reach * outs * self.outs)
            total -= weight / 2 * self.how.step * torch.cat([a.sum(1) for a in along])
        return total

    def proposals(self, decreases: Tensor) -> list[Proposal]:
        """Return the proposals of the best candidates."""
        best = decreases.argsort(descending=True)[: self.how.units]
        kept = sorted(int(k) for k in best if decreases[k] > 0)
        width = len(self.splits)
        old, new = [k for k in kept if k < width], [k - width for k in kept if k >= width]
        found = []
        if old:
            line = self.how.step * self.length * self.splits[old]
            gain = float(decreases[old].sum())
            found.append(apart(self.graph, self.name, old, line, gain, "step"))
        if new:
            found.append(self._added(new, float(decreases[[k + width for k in new]].sum())))
        return found

    def _added(self, new: list[int], gain: float) -> Proposal:
        self.place(0.0)
        count, width = len(new), self.graph.axes[self.name].width
        change = Resized(self.graph.analysis, self.name, inserted(width, count, None))
        carried = self.carried.split(self.carried.read(self.replica.tensors))
        given = Given.of({path: rows[new] for path, rows in carried.items()})
        line = self.how.step * self.reach * self.outs[new]
        rows = Rows(change, change.new, self.graph.axes[self.name].consumers)
        away = Departure.of(change.new, rows.split(line))
        return costed(self.graph, Widen(self.name, count, weights=given), gain, "step", away)
