"""What a score proposes: new units with weights, what they gain and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphgrow.ir.analyse import ParameterDim, Slot, Step
from graphgrow.ir.graph import Graph
from graphgrow.ir.outcome import Kind
from graphgrow.measure.cost import flops, parameters
from graphgrow.measure.patches import tap
from graphgrow.measure.routes import products
from graphgrow.moments import Moments
from graphgrow.passes.deepen import Deepen
from graphgrow.passes.follow import Follower
from graphgrow.passes.prove import old_entries
from graphgrow.passes.units import Resized, inserted
from graphgrow.passes.weights import Given, Scheme
from graphgrow.passes.widen import Widen
from graphgrow.scores.departure import Departure
from graphgrow.scores.slopes import slopes

Weights = Mapping[str, Tensor]
"""Numbers by parameter path: of new units `(units, entries)`, as `Given` takes them, or whole."""


@dataclass(frozen=True)
class Proposal:
    """A rewrite that a score found, new units or a new layer, its predicted gain and its cost.

    `rewrite` keeps the function. `gain` is a decrease of the loss to first order, for one unit of
    what `unit` says. `parameters` and `flops` (per example, forward) are what it adds. `target` is
    where weights would go beyond that, if the method says so, and `update` what is added to present
    weights then, by path: a separate step (see `amplify`) goes there.
    """

    rewrite: Widen | Deepen
    gain: float
    unit: str
    parameters: int
    flops: int
    target: Given | Departure | None = None
    update: Weights = field(default_factory=dict, compare=False)

    @property
    def place(self) -> str:
        """The axis that gets new units, or the module at which a layer is inserted."""
        return self.rewrite.axis if isinstance(self.rewrite, Widen) else self.rewrite.at

    @property
    def units(self) -> int:
        """How many units it adds to an axis that is there: none where it inserts a layer."""
        return self.rewrite.units if isinstance(self.rewrite, Widen) else 0


def untied(graph: Graph, moments: Mapping[str, Moments]) -> list[Moments]:
    """Return the moments of axes whose incoming weights are not the outgoing ones as well.

    One tensor that writes an axis and reads it in the same dim leaves no choice of two sides.
    """
    found = []
    for measured in moments.values():
        written = {at.path for at in graph.axes[measured.axis].producers}
        if all(producer.path in written for producer in measured.producers):
            found.append(measured)
    return found


@dataclass(frozen=True, eq=False)
class Site:
    """One axis that new units are proposed for: its moments, and the edit that inserts them."""

    graph: Graph
    moments: Moments
    change: Resized

    @staticmethod
    def of(graph: Graph, moments: Moments, units: int) -> Site:
        """Return the site of `units` new units at the end of an axis."""
        axis = graph.axes[moments.axis]
        change = Resized(graph.analysis, axis.name, inserted(axis.width, units, None))
        return Site(graph, moments, change)

    def dim(self, path: str) -> ParameterDim:
        """Return the dim of a tensor in which it has units of the axis as writer or reader."""
        axis = self.graph.axes[self.moments.axis]
        return next(at for at in (*axis.producers, *axis.consumers, *axis.carriers)
                    if at.path == path)  # fmt: skip

    def incoming(self, found: Tensor) -> dict[str, Tensor]:
        """Return the entries of producers and their biases, of `found` `(units, parts, in)`.

        Those of producers that the moments leave out, which write gates, are zero.
        """
        measured = {producer.path for producer in self.moments.producers}
        axis = self.graph.axes[self.moments.axis]
        others = [at for at in axis.producers if at.path not in measured]
        entries: dict[str, Tensor] = {
            at.path: torch.zeros(len(found), len(self.old(at.path)), dtype=torch.double)
            for at in others
        }
        for producer in self.moments.producers:
            mine = found[:, :, producer.rows]
            entries[producer.path] = self._placed(producer.path, mine[..., : producer.entries])
            if producer.bias is not None:
                entries[producer.bias] = mine[..., producer.entries]
        return entries

    def outgoing(self, found: Tensor) -> dict[str, Tensor]:
        """Return the entries of consumers, of `found` `(units, parts, out)`."""
        return {
            c.path: self._placed(c.path, found[:, :, c.columns]) for c in self.moments.consumers
        }

    def old(self, path: str) -> Tensor:
        """Return which entries of a new unit meet present units in the tensor's other dims."""
        return old_entries(self.change, self.dim(path))

    def _placed(self, path: str, values: Tensor) -> Tensor:
        """Return entries with zeros where a new unit meets a new one in the same tensor."""
        mask = self.old(path)
        placed = torch.zeros(len(values), len(mask), dtype=torch.double)
        placed[:, mask] = values.flatten(1).double().cpu()
        return placed

    def drawn(self, scheme: Scheme, paths: tuple[ParameterDim, ...]) -> dict[str, Tensor]:
        """Return the entries that a scheme gives to new units in some tensors."""
        tensors, new = scheme.fill(self.change, self.graph.state), torch.from_numpy(self.change.new)
        return {
            at.path: self.change.slices(tensors[at.path], at.path, at.dim)[new].double()
            for at in paths
        }

    def neutral(self) -> dict[str, Tensor]:
        """Return entries with which norms, biases and filters of a unit's own change nothing."""
        return {**self.filters(), **neutral(self.graph, self.change)}

    def filters(self) -> dict[str, Tensor]:
        """Return entries of filters of each unit's own that pass on their centre alone.

        Moments are taken for units that have such filters.
        """
        found: dict[str, Tensor] = {}
        carriers = {at.path for at in self.graph.axes[self.moments.axis].carriers}
        for product in products(self.graph.analysis, "eval").values():
            if product.window is not None and product.weight in carriers:
                kernel = tuple(self.graph.state[product.weight].shape[2:])
                one = torch.zeros(kernel, dtype=torch.double)
                one[tap(kernel)] = 1
                found[product.weight] = one.flatten().expand(len(self.change.new), -1)
        return found

    def follow(self, carried: Weights) -> Follower:
        """Return new units followed, with zero incoming weights and these other entries."""
        zero = self.incoming(torch.zeros(len(self.change.new), *self.moments.cross.shape[:2]))
        tensors = Given.of({**zero, **carried}).fill(self.change, self.graph.state)
        return Follower(self.change, {**self.graph.state, **tensors}).run()

    def sloped(self, found: Tensor, follower: Follower, ahead: float = 0.0) -> Tensor:
        """Return `(parts, in, out)` times the slopes at what new units hold.

        Activations with a kink count by the side of `ahead`.
        """
        rows = {p.path: p.rows for p in self.moments.producers}
        columns = {c.path: c.columns for c in self.moments.consumers}
        scaled = torch.zeros_like(found)
        for (producer, consumer), slope in slopes(self.moments.route, follower, ahead).items():
            at = (slice(None), rows[producer], columns[consumer])
            scaled[at] = slope * found[at]
        return scaled

    def proposal(
        self,
        weights: Given,
        gain: float,
        unit: str,
        target: Given | None = None,
        update: Weights | None = None,
    ) -> Proposal:
        """Return the proposal of these weights with their cost."""
        rewrite = Widen(self.moments.axis, len(self.change.new), weights=weights)
        return costed(self.graph, rewrite, gain, unit, target, update)


def costed(
    graph: Graph,
    rewrite: Widen,
    gain: float,
    unit: str,
    target: Given | Departure | None = None,
    update: Weights | None = None,
) -> Proposal:
    """Return the proposal of a rewrite with what it adds in parameters and FLOPs."""
    widths = dict(graph.analysis.widths())
    widths[rewrite.axis] += rewrite.units
    more, work = (count(graph, widths) - count(graph) for count in (parameters, flops))
    return Proposal(rewrite, gain, unit, more, work, target, update or {})


def neutral(graph: Graph, change: Resized) -> dict[str, Tensor]:
    """Return new units' entries with which norms and biases change nothing, by path.

    A batch norm gets scale and variance one, shift and mean zero; a bias is zero.
    """
    found: dict[str, Tensor] = {}
    carriers = {at.path: at for at in graph.axes[change.axis].carriers}
    for step in graph.analysis.steps:
        for path, value in _neutral(graph, step).items():
            if path in carriers:
                size = len(change.new), change.at(path, carriers[path].dim).shape[1]
                found[path] = torch.full(size, value, dtype=torch.double)
    return found


def _neutral(graph: Graph, step: Step) -> dict[str, float]:
    """Return the number with which each parameter of a step changes nothing, where there is one."""
    if step.row.kind is Kind.NORM:
        values = {1: 1.0, 2: 0.0, 3: 0.0, 4: 1.0}
    elif step.row.kind is Kind.CONTRACT:
        values = dict.fromkeys(range(len(step.args)), 0.0)
    else:
        return {}
    found: dict[str, float] = {}
    for position, arg in enumerate(step.args):
        if isinstance(arg, Slot) and position in values:
            source = graph.analysis.sources.get(step.inputs[arg.number])
            if source and (step.row.kind is Kind.NORM or arg.number == step.bias):
                found[source.path] = values[position]
    return found
