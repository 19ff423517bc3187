"""Merging: all units of an axis that others or constants can stand in for go at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from graphgrow.errors import NotApplicable
from graphgrow.ir.analyse import Axis, ParameterDim
from graphgrow.ir.graph import Graph
from graphgrow.passes.ranges import Box, Ranges
from graphgrow.passes.remove import Remove, bounds, is_removable
from graphgrow.passes.rewrite import Edit, Rewrite, free_axes
from graphgrow.passes.units import Resized


@dataclass(frozen=True)
class Merge(Rewrite):
    """Remove every unit of an axis that does nothing of its own, exactly.

    Those are units that nothing reads, that equal another or are a multiple of one, or that hold a
    constant: for all inputs, or for those whose entries lie in the `box` `(least, largest)`. What
    `apply` does, and the journal keeps, is the `Remove` of these units.

    Source: Serra, Kumar & Ramalingam (2020), Lossless compression of deep neural networks.
    """

    axis: str
    box: Box | None = None

    @staticmethod
    def places(graph: Graph) -> list[str]:
        """Return the axes that have no obstacle of their own."""
        return free_axes(graph)

    def edit(self, graph: Graph) -> Edit:
        """Return the edit of `graph`. Raises NotApplicable with the obstacle's sentence."""
        axis = graph.axis(self.axis)
        if axis.obstacle is not None:
            raise NotApplicable(axis.obstacle.replace("cannot widen", "cannot merge units of"))
        found = _removable(graph, axis, self.box)
        if not found:
            raise NotApplicable(
                f"cannot merge units of axis '{axis.name}' ({axis.width} units): each does "
                "something of its own; Remove takes units away by least squares"
            )
        edit = Remove(axis.name, found, box=self.box).edit(graph)
        return replace(edit, proof=replace(edit.proof, rewrite=str(self)))


def _removable(graph: Graph, axis: Axis, box: Box | None) -> tuple[int, ...]:
    """Return the units that can be removed together, the first of equal ones kept."""
    known = bounds(graph, axis, box)
    suspects = _suspects(graph, axis, known)
    whole = suspects[: axis.width - 1]
    if not whole or is_removable(graph, axis, whole, known):
        return tuple(sorted(whole))
    gone: tuple[int, ...] = ()
    for unit in suspects:
        if len(gone) < axis.width - 1 and is_removable(graph, axis, (*gone, unit), known):
            gone = (*gone, unit)
    return tuple(sorted(gone))


def _suspects(graph: Graph, axis: Axis, known: Ranges | None) -> tuple[int, ...]:
    """Return the units whose numbers make it worth a try, the last ones first."""
    same = Resized(graph.analysis, axis.name, np.arange(axis.width))
    found = torch.zeros(axis.width, dtype=torch.bool)

    def entries(at: ParameterDim) -> torch.Tensor:
        return same.slices(graph.state[at.path], at.path, at.dim).double()

    written = [entries(at) for at in axis.producers]
    if written:
        rows = torch.nn.functional.normalize(torch.cat(written, 1), dim=1)
        alike = (rows @ rows.T).abs() > 1 - 1e-12
        found |= alike.tril(-1).any(1) | (rows == 0).all(1)
    if axis.consumers:
        found |= (torch.cat([entries(at) for at in axis.consumers], 1) == 0).all(1)
    for at in axis.carriers:
        found |= (entries(at) == 0).all(1)
    for step in graph.analysis.touching(axis.name):
        clip = known.of(graph.analysis, step, axis.name) if known is not None else None
        found |= torch.from_numpy(~np.isnan(clip.held)) if clip is not None else False
    return tuple(reversed(found.nonzero().flatten().tolist()))
