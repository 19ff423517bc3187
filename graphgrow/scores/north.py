"""NORTH*: new units whose activations are orthogonal to present ones, where these use their width.

Source: Maile, Rachelson, Luga, Wilson 2022, "When, where, and how to add new neurons to ANNs".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from graphgrow.ir.graph import Graph
from graphgrow.measure.spectral import inverse_root
from graphgrow.moments import Consumer, Loss, Moments, moments
from graphgrow.passes.units import Resized
from graphgrow.passes.weights import Given
from graphgrow.passes.widen import Widen
from graphgrow.scores.proposal import Proposal, Site, untied

Batches = Iterable[tuple[Any, Any]]


@dataclass(frozen=True)
class North:
    """Units as independent of present ones as can be, which nothing reads yet.

    `how` says in what: "select" takes, of `candidates` drawn ones, those that leave most singular
    values of all activations above `level` if each is added alone, larger singular values first;
    "pre" draws pre-activations orthogonal to present ones over the examples; "weight" draws
    incoming weights orthogonal to present ones; "random" just draws. Weights have the mean length
    of present ones. Where no direction is left, plain drawn ones are taken. `units` is a number or
    a trigger, which says how many for each axis.

    The gain is the squared gradient of new outgoing weights, measured on the widened graph: the
    decrease of the loss to first order for one unit of learning rate. The paper has no such figure,
    it compares layers by their trigger.
    """

    how: Literal["select", "pre", "weight", "random"] = "select"
    units: int | Orthogonality = 1
    candidates: int = 32
    level: float = 0.01
    seed: int = 0

    def propose(
        self, graph: Graph, batches: Batches, loss: Loss, axes: Sequence[str] | None = None
    ) -> list[Proposal]:
        """Return a proposal for each axis that can be measured, of those asked for or all."""
        batches = list(batches)
        found = moments(graph, batches, loss, axes, of=("inputs", "present"))
        made = [self._proposal(graph, m, batches, loss) for m in untied(graph, found)]
        return [p for p in made if p is not None and p.rewrite.obstacle(graph) is None]

    def _proposal(
        self, graph: Graph, measured: Moments, batches: Batches, loss: Loss
    ) -> Proposal | None:
        units = self.units
        count = units if isinstance(units, int) else units.units(graph, measured)
        if count == 0:
            return None
        tried = max(self.candidates, count) if self.how == "select" else count
        incoming = self._drawn(graph, measured, tried)
        start = _given(Site.of(graph, measured, tried), incoming)
        wide = Widen(measured.axis, tried, weights=start)
        if wide.obstacle(graph) is not None:
            return None
        grown = wide.edit(graph).graph.renewed()
        of = "present", "desired"
        (seen,) = moments(grown, batches, loss, [measured.axis], of=of).values()
        gains = desired(grown, seen).square().sum(1)
        width = graph.axes[measured.axis].width
        chosen = list(range(count))
        if self.how == "select":
            chosen = independent(covariance(grown, seen), width, count, self.level)
        site = Site.of(graph, measured, count)
        gain = float(gains[[width + k for k in chosen]].sum())
        return site.proposal(_given(site, incoming[chosen]), gain, "learning rate")

    def _drawn(self, graph: Graph, measured: Moments, count: int) -> Tensor:
        """Return incoming weights of new units, `(units, parts, in)`."""
        present = weights(graph, measured)
        generator = torch.Generator().manual_seed(self.seed)
        size = (count, *present.shape[1:])
        drawn = torch.randn(size, generator=generator, dtype=torch.double).to(present)
        made = drawn
        if self.how == "weight":
            made = _beside(drawn, present)
        elif self.how == "pre":
            root, back = inverse_root(measured.inputs, 0.5), inverse_root(measured.inputs)
            within, seen = _times(root @ back, drawn), _times(root, present)
            made = _times(back, _beside(within, seen))
        lost = made.norm(dim=2, keepdim=True) == 0
        length = present.norm(dim=2).mean(0)[None, :, None]
        return length * F.normalize(torch.where(lost, drawn, made), dim=2)


def _given(site: Site, incoming: Tensor) -> Given:
    return Given.of({**site.neutral(), **site.incoming(incoming)})


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Return matrices `(parts, n, n)` times vectors `(k, parts, n)`."""
    return (matrices @ vectors[..., None])[..., 0]


def _beside(drawn: Tensor, present: Tensor) -> Tensor:
    """Return drawn vectors `(k, parts, n)` less what present ones and those before them span."""
    made, basis = [], present.movedim(0, 1)
    for vector in drawn:
        _, values, right = torch.linalg.svd(basis, full_matrices=False)
        spans = torch.where(values > values[:, :1] * 1e-10, 1.0, 0.0)[..., None] * right
        left = vector
        for _ in range(2):  # twice is enough
            left = left - ((spans @ left[..., None]).mT @ spans)[:, 0]
        left = torch.where(left.norm(dim=1) > 1e-8 * vector.norm(dim=1), left.mT, 0.0).mT
        made.append(left)
        basis = torch.cat([basis, left[:, None]], 1)
    return torch.stack(made)


def weights(graph: Graph, measured: Moments) -> Tensor:
    """Return present units' incoming weights in the order of moments, `(units, parts, in)`."""
    site = Site.of(graph, measured, 0)
    rows = measured.inputs.new_zeros(len(site.change.units), *measured.inputs.shape[:2])
    for producer in measured.producers:
        at = producer.rows.start
        for path, entries in ((producer.path, producer.entries), (producer.bias, 1)):
            if path is not None:
                found = site.change.slices(graph.state[path], path, site.dim(path).dim)
                found = found.double().reshape(len(rows), measured.parts, entries)
                rows[:, :, at : at + entries] = found
                at += entries
    return rows


def independent(covariance: Tensor, width: int, count: int, level: float) -> list[int]:
    """Return which units behind the first `width` add most singular values, each taken alone.

    `covariance` is that of the activations of all. More singular values above `level` come first,
    among equals a larger sum.
    """
    ranks = []
    for k in range(len(covariance) - width):
        kept = [*range(width), width + k]
        values = singular(covariance[kept][:, kept])
        ranks.append((-int((values > level).sum()), -float(values.sum()), k))
    return [k for *_, k in sorted(ranks)[:count]]


def singular(covariance: Tensor) -> Tensor:
    """Return the singular values of activations over √n, of their covariance."""
    return torch.linalg.eigvalsh(covariance).clamp(min=0).sqrt()


# ------------------------------------------------------------------------------ what is measured


def covariance(graph: Graph, measured: Moments) -> Tensor:
    """Return the covariance of the units of an axis where they are read, `(width, width)`.

    It is a mean over examples and over all positions, offsets of kernels and consumers that read
    them, not centred.
    """
    total, count = 0.0, 0.0
    for consumer in measured.consumers:
        present = consumer.present
        for entries in _entries(graph, measured, consumer):
            found = present[:, entries][:, :, entries]
            total = total + found.sum(0)
            count += len(found) * _positions(graph, measured, consumer)
    assert isinstance(total, Tensor)
    return total / count


def desired(graph: Graph, measured: Moments) -> Tensor:
    """Return the desired update of each unit's outgoing weights, `(width, out)`."""
    rows = [
        consumer.desired[:, entries].movedim(1, 0).flatten(1)
        for consumer in measured.consumers
        for entries in _entries(graph, measured, consumer)
    ]
    return torch.cat(rows, 1)


def _entries(graph: Graph, measured: Moments, consumer: Consumer) -> list[np.ndarray]:
    """Return where each unit is among what a consumer reads, for each place and kernel offset."""
    at = next(at for at in graph.axes[measured.axis].consumers if at.path == consumer.path)
    change = Resized(graph.analysis, measured.axis, np.arange(graph.axes[measured.axis].width))
    size, places = math.prod(graph.state[at.path].shape[2:]), change.at(at.path, at.dim)
    offsets = itertools.product(range(places.shape[1]), range(size))
    return [places[:, place] * size + offset for place, offset in offsets]


def _positions(graph: Graph, measured: Moments, consumer: Consumer) -> float:
    """Return how many positions of an example a consumer writes, all its uses together."""
    examples = next(t.shape[0] for t in graph.example if getattr(t, "ndim", 0))
    widths, total = graph.analysis.widths(), 0
    for read in measured.route.reads[consumer.path]:
        use = read.product
        written = graph.analysis.values[use.step.outputs[0]]
        out = graph.state[use.weight].shape[use.out]
        total += math.prod(layout.size(widths) for layout in written) // out
    return total / examples


# ------------------------------------------------------------------------------ when


@dataclass(frozen=True)
class Orthogonality:
    """When an axis uses its width: grow where as many directions are alive as at the beginning.

    φ is the share of singular values of activations over √n that are above `level`. With φ₀ that at
    the beginning, in `start` by axis (1 where it is not known), an axis of M units is to get
    ⌊M (φ − `share` φ₀)⌋ more, none where that is negative. Due every `steps` steps.

    Source: Maile et al. 2022, the trigger T_act, whose minimum with zero has to be a maximum. The
    paper replaces φ₀ of a convolution by the largest φ so far.
    """

    start: tuple[tuple[str, float], ...] = ()
    share: float = 0.97
    level: float = 0.01
    steps: int = 1
    needs: ClassVar[tuple[str, ...]] = ("present",)

    @staticmethod
    def at(
        graph: Graph,
        measured: Mapping[str, Moments],
        share: float = 0.97,
        level: float = 0.01,
        steps: int = 1,
    ) -> Orthogonality:
        """Return the trigger that takes these moments for the beginning."""
        start = {name: orthogonality(graph, m, level) for name, m in measured.items()}
        return Orthogonality(tuple(start.items()), share, level, steps)

    def due(self, clock: Clock) -> bool:
        """Return whether it is time to measure."""
        return clock.steps % self.steps == 0

    def ripe(self, graph: Graph, measured: Mapping[str, Moments]) -> dict[str, Moments]:
        """Return the moments of those axes that are to grow now."""
        return {name: m for name, m in measured.items() if self.units(graph, m) > 0}

    def units(self, graph: Graph, measured: Moments) -> int:
        """Return how many units an axis is to get now."""
        width = graph.axes[measured.axis].width
        base = self.share * dict(self.start).get(measured.axis, 1.0)
        now = orthogonality(graph, measured, self.level)
        return max(0, math.floor(width * (now - base) + 1e-9))


class Clock(Protocol):
    """What a trigger asks of the time: the steps so far."""

    @property
    def steps(self) -> int:
        """The steps so far."""
        ...


def orthogonality(graph: Graph, measured: Moments, level: float = 0.01) -> float:
    """Return φ, the share of singular values of an axis' activations over √n above `level`.

    There have to be more examples than units for all to be.
    """
    values = singular(covariance(graph, measured))
    return float((values > level).sum()) / len(values)
