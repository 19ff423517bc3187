"""Removing units: exactly where others or constants stand in for them, else by least squares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from graphgrow.errors import NotApplicable
from graphgrow.ir.analyse import Analysis, Axis, ParameterDim, Slot
from graphgrow.ir.assemble import assemble
from graphgrow.ir.graph import Graph
from graphgrow.ir.layout import Layout
from graphgrow.passes.content import Arrival, Reduction
from graphgrow.passes.factors import Compensation, listed
from graphgrow.passes.follow import Follower
from graphgrow.passes.prove import Proof, Verdict, judge, old_entries, per_output, rounding
from graphgrow.passes.ranges import CLIPS, Box, Ranges, domain, is_bounded, ranges
from graphgrow.passes.resize import resize
from graphgrow.passes.rewrite import Edit, Rewrite, free_axes
from graphgrow.passes.units import Resized, gather, precise, times


@dataclass(frozen=True)
class Absorb:
    """Coefficients by which kept units stand in for removed ones, by the weight that reads them.

    For each consuming parameter one row a removed unit: a number for every kept unit and a
    constant. Source: least squares as in optimal brain surgery (Hassibi & Stork 1993).
    """

    coefficients: tuple[tuple[str, tuple[tuple[float, ...], ...]], ...]

    @staticmethod
    def fit(graph: Graph, axis: str, units: tuple[int, ...], *inputs: Any) -> Absorb:
        """Return the coefficients that fit the removed units on these inputs, in eval mode."""
        change = _removal(graph.analysis, graph.axis(axis), units)
        follower = Follower(change, graph.state).run()
        found: dict[str, tuple[tuple[float, ...], ...]] = {}
        for arrival in follower.arrivals:
            if arrival.weight is not None and arrival.step.mode == "eval":
                samples = _samples(graph, arrival, change.axis, inputs or graph.example)
                rows = _solved(samples, change)
                found[arrival.weight.path] = tuple(map(tuple, rows.tolist()))
        return Absorb(tuple(sorted(found.items())))


@dataclass(frozen=True)
class Remove(Rewrite):
    """Remove the numbered `units` of an axis.

    Exact where a unit's outgoing weights are zero, or the unit is a constant, equal to another or a
    multiple of one: its readers' weights and biases take over what it added. Constants are also
    units that a ReLU, or another clipping, holds at one number for all inputs, or for inputs whose
    entries lie in the `box` `(least, largest)`, as the proof then says. For other units give
    `absorb`: coefficients, or model inputs to fit them on; the removal is then not exact, and the
    proof says by how much the outputs changed. `numbers` is filled by `apply`, for the journal, as
    that of `Widen`.
    """

    axis: str
    units: tuple[int, ...]
    absorb: Absorb | Tensor | tuple[Tensor, ...] | None = None
    box: Box | None = None
    numbers: tuple[tuple[str, str, float], ...] = field(default=(), repr=False)

    @staticmethod
    def places(graph: Graph) -> list[str]:
        """Return the axes that have no obstacle of their own."""
        return free_axes(graph)

    def edit(self, graph: Graph) -> Edit:
        """Return the edit of `graph`. Raises NotApplicable with the obstacle's sentence."""
        axis, units = self._checked(graph)
        change = _removal(graph.analysis, axis, units)
        absorb = self.absorb
        if absorb is not None and not isinstance(absorb, Absorb):
            given = absorb if isinstance(absorb, tuple) else (absorb,)
            absorb = Absorb.fit(graph, axis.name, units, *given)
        narrowed = _Narrowed(graph, change, absorb)
        box, where = None, "all inputs"
        known = bounds(graph, axis, self.box) if narrowed.reason is not None else None
        if known is not None:
            bounded = _Narrowed(graph, change, absorb, known)
            if bounded.reason is None:
                narrowed, box, where = bounded, self.box, domain(self.box)
        if narrowed.reason is not None:
            raise NotApplicable(
                f"cannot remove {len(units)} of the {axis.width} units of axis '{axis.name}' "
                f"exactly: {narrowed.reason}; give absorb= for least squares"
            )
        chosen = replace(
            self,
            axis=axis.name,
            units=units,
            absorb=absorb if narrowed.fitted else None,
            numbers=listed(narrowed.numbers),
        )
        grown = resize(graph, narrowed.kept, narrowed.tensors, chosen)
        origin = {path: narrowed.kept.origin(path) for path in narrowed.tensors}
        said = str(replace(chosen, absorb=None))
        lost = rounding(narrowed.rounded, graph.state)
        proof = Proof(
            said,
            not narrowed.fitted,
            domain=where,
            lines=narrowed.lines,
            rounding=lost,
            box=box,
        )
        if narrowed.fitted:
            proof = replace(proof, modes=())
        return Edit(grown, proof, origin)

    def _checked(self, graph: Graph) -> tuple[Axis, tuple[int, ...]]:
        axis = graph.axis(self.axis)
        if axis.obstacle is not None:
            raise NotApplicable(axis.obstacle.replace("cannot widen", "cannot remove units of"))
        units = tuple(sorted(set(self.units)))
        inside = all(0 <= u < axis.width for u in units)
        if not units or not inside or len(units) >= axis.width or len(units) != len(self.units):
            raise NotApplicable(
                f"cannot remove units {self.units} of axis '{axis.name}' ({axis.width} units): "
                f"give different units from 0 to {axis.width - 1}, and leave at least one"
            )
        return axis, units


def _removal(analysis: Analysis, axis: Axis, units: tuple[int, ...]) -> Resized:
    """Return the edit read backwards: the removed units are the ones that would be new."""
    position = np.full(axis.width, -1)
    kept = np.setdiff1d(np.arange(axis.width), units)
    position[kept] = np.arange(len(kept))
    return Resized(analysis, axis.name, position)


def bounds(graph: Graph, axis: Axis, box: Box | None) -> Ranges | None:
    """Return the ranges of a graph's values, None where they can say nothing of an axis' units."""
    clipped = any(s.func.overloadpacket in CLIPS for s in graph.analysis.touching(axis.name))
    return ranges(graph, box) if clipped and (box is not None or is_bounded(graph)) else None


def is_removable(graph: Graph, axis: Axis, units: tuple[int, ...], known: Ranges | None) -> bool:
    """Return whether units go exactly, with what is known of ranges."""
    change = _removal(graph.analysis, axis, tuple(sorted(units)))
    return _Narrowed(graph, change, None, known).reason is None


def _read_backwards(sentence: str) -> str:
    return sentence.replace("new units", "removed units").replace("new ones", "removed ones")


class _Narrowed:
    """The tensors of the narrower graph, or the reason why there are none."""

    def __init__(
        self,
        graph: Graph,
        change: Resized,
        absorb: Absorb | None,
        bounds: Ranges | None = None,
    ) -> None:
        self.graph, self.change = graph, change
        self.kept = Resized(graph.analysis, change.axis, change.old)
        self.absorb = dict(absorb.coefficients) if absorb is not None else None
        self.fitted, self.reason, self.lines = False, None, ()
        self.shifted: set[str] = set()
        self.rounded: set[str] = set()
        self.tensors = {p: gather(graph.state[p], self.kept.origin(p)) for p in change.paths()}
        self.numbers: Mapping[tuple[str, str], float] = {}
        follower = Follower(change, graph.state, bounds).run()
        for arrival in follower.arrivals:
            if arrival.weight is not None:
                self._reduce(follower, arrival)
        if self.fitted:
            self.lines = ("removed units are replaced by least squares",)
            return
        verdict = judge(follower, {**graph.state, **self.tensors})
        self.reason = verdict.reason and _read_backwards(verdict.reason)
        self.lines = tuple(map(_read_backwards, verdict.lines))
        if self.reason is None:
            self._fold(verdict)
            self._rescale(verdict.compensation)

    def _rescale(self, made_up: Compensation) -> None:
        """Take back what made up for the number of units that means and norms go over."""
        for path, factor in made_up.tensors.items():
            now = self.tensors.get(path, self.graph.state[path])
            self.tensors[path] = times(now, 1 / factor)
            self.rounded.add(path)
        self.numbers = {call: 1 / factor for call, factor in made_up.numbers.items()}
        self.rounded.update(self.tensors if self.numbers else ())

    def _reduce(self, follower: Follower, arrival: Arrival) -> None:
        at = arrival.weight
        assert at is not None
        places = old_entries(self.change, at)
        reduction = follower.reduction(arrival)
        if bool((reduction.own[:, places] != 0).any()) and self.absorb is not None:
            self.fitted = True
            reduction = self._absorbed(follower, arrival, self.absorb)
        self._write(at, reduction.columns[:, places])
        if self.fitted and arrival.step.bias is not None and arrival.step.mode == "eval":
            self._add(follower, arrival, reduction)

    def _absorbed(
        self, follower: Follower, arrival: Arrival, coefficients: Mapping[str, Any]
    ) -> Reduction:
        at = arrival.weight
        assert at is not None
        if at.path not in coefficients:
            raise NotApplicable(
                f"cannot absorb removed units in '{at.path}': no coefficients given"
            )
        columns = follower.slices(at)
        rows = torch.tensor(coefficients[at.path], dtype=columns.dtype)
        old, new = torch.from_numpy(follower.old), torch.from_numpy(follower.new)
        if rows.shape != (len(new), len(old) + 1):
            raise NotApplicable(
                f"cannot absorb removed units in '{at.path}': coefficients have shape "
                f"{tuple(rows.shape)}, not {(len(new), len(old) + 1)}"
            )
        gone = columns[new]
        return Reduction(columns[old] + rows[:, :-1].T @ gone, gone[:0], rows[:, -1] @ gone)

    def _write(self, at: ParameterDim, columns: Tensor) -> None:
        """Write a weight's columns `(kept units, entries)`."""
        tensor = self.tensors[at.path]
        places = torch.from_numpy(self.kept.at(at.path, at.dim).reshape(-1))
        moved = tensor.movedim(at.dim, 0)
        shape = (len(places), *moved.shape[1:])
        new, at_places = columns.to(tensor).reshape(shape), places.to(tensor.device)
        if not torch.equal(moved[at_places], new):
            moved[at_places] = new
            self.rounded.add(at.path)

    def _add(self, follower: Follower, arrival: Arrival, reduction: Reduction) -> None:
        """Add what constants stood for to the bias that reads them."""
        source = self.graph.analysis.sources.get(arrival.step.inputs[arrival.step.bias or 0])
        if source is None or arrival.weight is None or source.path in self.shifted:
            return
        self.shifted.add(source.path)
        constant = per_output(self.change, arrival.weight, source.path, reduction.constant)
        self._shift(source.path, constant)

    def _fold(self, verdict: Verdict) -> None:
        for path, constant in verdict.folds.items():
            self._shift(path, constant)

    def _shift(self, path: str, constant: Tensor) -> None:
        if path in self.tensors:
            constant = gather(constant, self.kept.origin(path))
        if bool((constant != 0).any()):
            self.rounded.add(path)
        bias = self.tensors.get(path, self.graph.state[path]).detach()
        self.tensors[path] = (precise(bias) + constant.to(bias.device)).to(bias.dtype)


class _Capture(fx.Interpreter):
    """Runs a graph and keeps the value of one node."""

    def run_until(self, wanted: str, inputs: tuple[Any, ...]) -> Tensor:
        """Return what the node named `wanted` computes on these inputs."""
        self.wanted, self.found = wanted, None
        with torch.no_grad():
            self.run(*inputs)
        assert isinstance(self.found, Tensor)
        return self.found

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name == self.wanted:
            self.found = result.detach().clone()
        return result


def _reader(graph: Graph, arrival: Arrival, axis: str) -> tuple[fx.Node, Layout]:
    """Return the node whose value arrives at a contraction, and the layout that has the axis."""
    analysis = graph.analysis
    node = next(n for n in graph.eval.nodes if n.name == arrival.step.node)
    for arg in tree_leaves((node.args, node.kwargs)):
        value = analysis.nodes.get(("eval", arg.name)) if isinstance(arg, fx.Node) else None
        if isinstance(value, Slot) and arg.op != "get_attr":
            layouts = [la for la in analysis.values[value.number] if axis in la.axes()]
            if len(layouts) == 1:
                return arg, layouts[0]
    raise NotApplicable(f"cannot absorb units at {arrival.step.where}: what it reads is not a node")


def _samples(graph: Graph, arrival: Arrival, axis: str, inputs: tuple[Any, ...]) -> Tensor:
    """Return what arrives at a contraction in eval mode, `(units, samples)`."""
    node, layout = _reader(graph, arrival, axis)
    buffers = {p: t if isinstance(t, nn.Parameter) else t.clone() for p, t in graph.state.items()}
    tree = assemble(graph.modules, graph.leaves, buffers).eval()
    values = _Capture(tree, graph=graph.eval).run_until(node.name, inputs).double()
    dim = graph.analysis.values[graph.analysis.nodes["eval", node.name].number].index(layout)
    units = layout.units(graph.analysis.widths(), axis)
    order = np.argsort(units, kind="stable")[(units < 0).sum() :]
    return values.movedim(dim, 0)[torch.from_numpy(order)].reshape(graph.axes[axis].width, -1)


def _solved(samples: Tensor, change: Resized) -> Tensor:
    """Return coefficients for each removed unit over the kept ones and one, by least squares."""
    old, new = torch.from_numpy(change.old), torch.from_numpy(change.new)
    kept = torch.cat([samples[old], torch.ones(1, samples.shape[1], dtype=samples.dtype)])
    return torch.linalg.lstsq(kept.T, samples[new].T, driver="gelsd").solution.T
