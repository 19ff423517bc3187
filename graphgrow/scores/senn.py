"""SENN: units and layers that make natural gradient descent fastest, where and when they do.

Source: Mitchell, Mundt, Kersting 2023, "Self-Expanding Neural Networks".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphgrow.ir.graph import Graph
from graphgrow.measure.cost import flops, parameters
from graphgrow.measure.routes import Product
from graphgrow.measure.sample import PROBES, Sample, sample
from graphgrow.moments import Loss
from graphgrow.passes.apply import apply
from graphgrow.passes.deepen import Deepen
from graphgrow.passes.rewrite import Grown
from graphgrow.passes.widen import Widen
from graphgrow.scores.candidates import Activations, NewLayer, NewUnits
from graphgrow.scores.kronecker import Block
from graphgrow.scores.proposal import Proposal
from graphgrow.scores.search import Ascent, Mala, Score

DEFAULT = Ascent()


@dataclass(frozen=True)
class Finding:
    """The best rewrite of one place, and the scores that say whether it is worth it.

    `score` is η of the layers that read it now, `increase` what the rewrite adds to it, exactly,
    and `bound` the paper's lower bound on that. `limit` is λ, more than which η of the outputs
    cannot be. `size` is how many units the rewrite counts as. All of η, Δη and λ are decreases of
    the loss for one unit of natural-gradient learning rate.
    """

    rewrite: Widen | Deepen
    score: float
    increase: float
    bound: float
    limit: float
    size: float = 1.0

    @property
    def ratio(self) -> float:
        """Δη/η for each unit that the rewrite counts as."""
        return self.increase / self.size / max(self.score, 1e-300)

    def passes(self, tau: float, alpha: float) -> bool:
        """Return whether η grows more than τ times, and by more than α times λ."""
        return 1 + self.ratio > tau and self.increase / self.size > alpha * self.limit


@dataclass(frozen=True)
class Senn:
    """Units and layers that raise the natural expansion score η = gᵀF⁻¹g most.

    F is the Fisher matrix of the euclidean metric at the outputs, E[JᵀJ], layer by layer in the
    Kronecker approximation, by `probes` backward passes at most (see `sample`); the damping of each
    factor is `damping` times the mean of its diagonal. For every axis, `candidates` times `units`
    new units are tried at once in the widened graph, so any axis will do whose new units linear or
    convolution layers read. With `layers`, candidates for a layer are tried too before each linear
    or convolution layer that reads at most `widest` units: an invertible matrix, then a rational
    activation. `search` raises Δη on the first batch; where there are three, the second chooses
    among what it found, since most candidates fit the first batch alone; what is chosen is judged
    by Δη on the last. Without `exact` it raises the paper's lower bound Δη′, whose cost does not
    depend on how much a layer reads; once a layer is well trained the bound is far below Δη.

    A place is proposed only where η becomes more than `tau` times as large and grows by more than
    `alpha` times λ, the mean squared gradient at the outputs. A layer counts as `layer_size` units,
    by which its increase is divided. The gain is that increase: the decrease of the loss for one
    unit of natural-gradient learning rate.

    New units keep the activation that stands there; a rational one has parameters of its own, drawn
    and searched with the weights. A layer is searched with its activation free, as the paper has
    it, and inserted with the identity. Departures: the exact Δη judges, α is in units of λ, and
    incoming weights are drawn with a variance of one over their number, biases with one.
    """

    units: int = 1
    layers: bool = False
    candidates: int = 64
    search: Ascent | Mala = DEFAULT
    exact: bool = True
    tau: float = 2.0
    alpha: float = 0.0025
    layer_size: float = 2.0
    widest: int = 64
    damping: float = 1e-3
    probes: int = PROBES
    seed: int = 0

    def propose(
        self,
        graph: Graph,
        batches: Sequence[tuple[Any, Any]],
        loss: Loss,
        axes: Iterable[str] | None = None,
    ) -> list[Proposal]:
        """Return a proposal for each place where one passes the thresholds."""
        found = self.findings(graph, batches, loss, axes)
        return [_proposal(graph, f) for f in found if f.passes(self.tau, self.alpha)]

    def findings(
        self,
        graph: Graph,
        batches: Sequence[tuple[Any, Any]],
        loss: Loss,
        axes: Iterable[str] | None = None,
    ) -> list[Finding]:
        """Return the best rewrite of each place, whether it passes or not.

        Without `axes`, places are all axes that can be tried.
        """
        wanted = graph.axes if axes is None else dict.fromkeys(graph.axis(a).name for a in axes)
        units = [NewUnits.of(graph, a, self.units, self.seed) for a in wanted if self.units]
        places: list[NewUnits | NewLayer] = [place for place in units if place is not None]
        if self.layers:
            places += NewLayer.places(graph, self.widest, self.layer_size, self.seed)
        if not places:
            return []
        uses = [use for place in places for use in place.uses]
        last = len(batches) - 1
        roles = 0, min(1, max(last - 1, 0)), last
        seen = {k: sample(graph, batches[k], loss, uses, probes=self.probes) for k in set(roles)}
        looks = [_Look(batches[k][0], seen[k]) for k in roles]
        return [self._best(place, *looks) for place in places]

    def gained(self, grown: Grown, batches: Sequence[tuple[Any, Any]], loss: Loss) -> float | None:
        """Return by how much growth raised η on the last batch, each side with its own damping.

        None for a layer, which was searched with its activation free and stands as the identity.
        """
        rewrite, scores = grown.graph.journal[-1], []
        if not isinstance(rewrite, Widen):
            return None
        for graph in (grown.before.renewed(), grown.graph.renewed()):
            place = NewUnits.of(graph, rewrite.axis, 1, self.seed)
            if place is None:
                return None
            seen = sample(graph, batches[-1], loss, place.uses, probes=self.probes)
            scores.append(_Judge(seen, place.uses, self.damping).score)
        return scores[1] - scores[0]

    def _best(
        self, place: NewUnits | NewLayer, first: _Look, middle: _Look, last: _Look
    ) -> Finding:
        generator = torch.Generator().manual_seed(place.number)
        start = torch.randn(self.candidates, place.size, generator=generator, dtype=torch.double)
        start = start.to(next(iter(first.seen.readers.values())).metric.device)
        found = self.search.run(self._worth(place, first), start, generator)
        with torch.no_grad():
            values = self._worth(place, middle)(found)
            chosen = found[self.search.choose(values, generator)][None]
            judge = _Judge(last.seen, place.uses, self.damping)
            activations = place.tried(last.inputs, last.seen, 1)(place.settled(chosen))
            increase, bound = float(judge.increase(activations)), float(judge.bound(activations))
        rewrite = place.rewrite(chosen[0])
        return Finding(rewrite, judge.score, increase, bound, last.seen.limit, place.counts)

    def _worth(self, place: NewUnits | NewLayer, look: _Look) -> Score:
        """Return what gives each candidate's Δη/η on a batch."""
        judge = _Judge(look.seen, place.uses, self.damping)
        tried = place.tried(look.inputs, look.seen, self.candidates)
        worth = judge.increase if self.exact else judge.bound
        return lambda found: worth(tried(found)) / judge.score * place.steady(found)


@dataclass(frozen=True, eq=False)
class _Look:
    """A batch that candidates are searched, chosen or judged on."""

    inputs: Any
    seen: Sample


def _proposal(graph: Graph, found: Finding) -> Proposal:
    """Return the proposal of a finding with its cost."""
    gain, unit = found.increase / found.size, "natural learning rate"
    if isinstance(found.rewrite, Widen):
        grown, widths = graph, dict(graph.analysis.widths())
        widths[found.rewrite.axis] += found.rewrite.units
    else:
        grown, widths = apply(graph, found.rewrite, verify=False).graph, None
    more = parameters(grown, widths) - parameters(graph)
    return Proposal(found.rewrite, gain, unit, more, flops(grown, widths) - flops(graph))


# ------------------------------------------------------------------------------ judging candidates


class _Judge:
    """The blocks of the weights that read a place, and what their gradients leave unexplained."""

    def __init__(self, seen: Sample, uses: Iterable[Product], damping: float) -> None:
        self.seen = seen
        readers = [seen.readers[path] for path in dict.fromkeys(use.weight for use in uses)]
        self.blocks = {r.path: Block.of(r.inputs, r.metric, r.cross, damping) for r in readers}
        self.score = max(sum(b.score() for b in self.blocks.values()), 1e-300)
        self.residual: dict[Product, Tensor] = {}
        for reader in readers:
            block = self.blocks[reader.path]
            update = block.update()
            for use, gradient in reader.gradients.items():
                left = [
                    piece.movedim(0, 2).flatten(2) - update.to(piece).mT @ present.flatten(2)
                    for present, piece in seen.pieces(use, gradient.movedim(2, 0))
                ]
                self.residual[use] = block.whiten(torch.cat(left, 2))

    def bound(self, activations: Activations) -> Tensor:
        """Return Δη′ of each candidate, `(candidates,)`."""
        found = [self.blocks[path].bound(own, cross) for path, own, cross in self._by(activations)]
        return torch.stack(found).sum(0)

    def increase(self, activations: Activations) -> Tensor:
        """Return Δη of each candidate, `(candidates,)`."""
        found = []
        for path, own, cross in self._by(activations):
            among = []
            for use in self.seen.readers[path].reads:
                for present, piece in self.seen.pieces(use, activations[use].movedim(3, 0)):
                    a = piece.movedim(0, 3).flatten(3)
                    among.append((a @ present.flatten(2)[:, None].mT).double())
            total = torch.stack(among).sum(0) / self.seen.examples
            found.append(self.blocks[path].increase(own, cross, total))
        return torch.stack(found).sum(0)

    def _by(self, activations: Activations) -> Iterable[tuple[str, Tensor, Tensor]]:
        """Yield each weight with the candidates' covariance and moment with what is left there."""
        for path in self.blocks:
            a = {use: activations[use].flatten(3) for use in self.seen.readers[path].reads}
            own = torch.stack([(x @ x.mT).double() for x in a.values()]).sum(0)
            cross = [(x @ self.residual[use][:, None].mT).double() for use, x in a.items()]
            count = self.seen.examples
            yield path, own / count, torch.stack(cross).sum(0) / count
