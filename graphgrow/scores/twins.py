"""Every unit of an axis as two twins that are moved apart: what splitting methods try out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphgrow.ir.analyse import Axis
from graphgrow.ir.graph import Graph
from graphgrow.passes.apply import apply
from graphgrow.passes.rewrite import Rewrite
from graphgrow.passes.units import Resized, inserted
from graphgrow.passes.weights import Copy
from graphgrow.passes.widen import Widen
from graphgrow.scores.departure import Departure
from graphgrow.scores.proposal import Proposal, costed
from graphgrow.scores.rows import Rows, fan_in, one_sided

Batches = Iterable[tuple[Any, Any]]


@dataclass(frozen=True, eq=False)
class Twins:
    """A graph in which all units of an axis are two, and the incoming weights of either half.

    `extra` further units stand behind them.
    """

    graph: Graph
    first: Rows
    second: Rows
    extra: np.ndarray

    @staticmethod
    def of(graph: Graph, name: str, *more: Rewrite, extra: int = 0) -> Twins:
        """Return the graph with every unit split evenly, then with `more` rewrites applied."""
        axis = graph.axes[name]
        wide = apply(graph, split(axis, range(axis.width)), *more, verify=False).graph
        units = inserted(axis.width, axis.width + extra, None)
        change, dims = Resized(graph.analysis, name, units), fan_in(graph, axis)
        halves = np.split(np.arange(2 * axis.width), 2)
        first, second = (Rows(change, half, dims) for half in halves)
        return Twins(wide, first, second, np.arange(2 * axis.width, len(units)))


def split(axis: Axis, units: Iterable[int]) -> Widen:
    """Return the rewrite that splits units into two equal halves each."""
    sources = tuple(int(u) for u in units)
    return Widen(axis.name, len(sources), weights=Copy(sources, even=True))


def splittable(graph: Graph, axes: Sequence[str] | None) -> list[str]:
    """Return the axes, of those asked for or all, whose units can be split and moved apart."""
    names = list(graph.axes) if axes is None else [graph.axis(name).name for name in axes]
    found = [graph.axes[name] for name in names if graph.axes[name].obstacle is None]
    return [
        axis.name
        for axis in found
        if one_sided(graph, axis) and split(axis, range(axis.width)).obstacle(graph) is None
    ]


def apart(
    graph: Graph, name: str, units: Sequence[int], line: Tensor, gain: float, unit: str
) -> Proposal:
    """Return the proposal that splits `units`, to go apart by plus and minus `line`.

    `line` is `(units, entries)` of the incoming weights, for a step of one.
    """
    axis = graph.axes[name]
    change = Resized(graph.analysis, name, inserted(axis.width, len(units), None))
    both = np.concatenate([np.array(units, dtype=int), change.new])
    rows = Rows(change, both, fan_in(graph, axis))
    away = Departure.of(both, rows.split(torch.cat([line, -line])))
    return costed(graph, split(axis, units), gain, unit, away)
