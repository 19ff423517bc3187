"""A journal replayed on a fresh model: the structure it leads to, whatever the numbers are.

A rewrite may be exact only on trained numbers (units that were zero are removed), and those are not
there when a journal is read. What it makes of the structure doesn't depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from graphgrow.errors import NotApplicable
from graphgrow.ir.graph import Graph
from graphgrow.passes.fold import Fold, refold
from graphgrow.passes.remove import Remove
from graphgrow.passes.resize import resize
from graphgrow.passes.rewrite import Rewrite
from graphgrow.passes.units import Resized, inserted, resized_state
from graphgrow.passes.widen import Widen


def replay(graph: Graph, *rewrites: Rewrite) -> Graph:
    """Return what `rewrites` make of the structure of `graph`; tensors have the right shapes only.

    Raises NotApplicable where a rewrite finds no such axis, units or place.
    """
    for rewrite in rewrites:
        if isinstance(rewrite, Fold):
            graph = refold(graph, rewrite)
            continue
        units = _UNITS.get(type(rewrite))
        if units is None:
            graph = rewrite.edit(graph).graph
            continue
        axis = graph.axis(rewrite.axis)  # type: ignore[attr-defined]
        if axis.obstacle is not None:
            raise NotApplicable(axis.obstacle)
        change = Resized(graph.analysis, axis.name, units(rewrite, axis.width))
        tensors, _ = resized_state(graph.state, change)
        graph = resize(graph, change, tensors, rewrite)
    return graph


def _kept(rewrite: Remove, width: int) -> np.ndarray:
    if not set(rewrite.units) < set(range(width)):
        raise NotApplicable(f"cannot replay {rewrite}: the axis has {width} units")
    return np.setdiff1d(np.arange(width), rewrite.units)


def _widened(rewrite: Widen, width: int) -> np.ndarray:
    if not 0 <= (width if rewrite.at is None else rewrite.at) <= width:
        raise NotApplicable(f"cannot replay {rewrite}: the axis has {width} units")
    return inserted(width, rewrite.units, rewrite.at)


# The old unit of every new one, for the rewrites that edit one axis.
_UNITS: dict[type, Callable[[Any, int], np.ndarray]] = {Widen: _widened, Remove: _kept}
