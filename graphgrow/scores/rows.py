"""The weights of units of an axis as one vector each, whatever tensors they are spread over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from graphgrow.ir.analyse import Axis, ParameterDim
from graphgrow.ir.graph import Graph
from graphgrow.ir.outcome import Kind
from graphgrow.passes.units import Resized


@dataclass(frozen=True, eq=False)
class Rows:
    """Entries of units in the tensors of an edited axis, joined: `(units, entries)`.

    `units` are positions in the edited axis, `dims` the tensors in order.
    """

    change: Resized
    units: np.ndarray
    dims: tuple[ParameterDim, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """The tensors' paths."""
        return tuple(at.path for at in self.dims)

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the joined entries, as a function of the tensors."""
        return torch.cat([self._of(tensors[at.path], at) for at in self.dims], 1)

    def gradient(self, of: Tensor, tensors: Mapping[str, Tensor], further: bool = False) -> Tensor:
        """Return the joined entries of a number's gradient; `further` lets it be differentiated."""
        leaves = [tensors[at.path] for at in self.dims]
        found = torch.autograd.grad(
            of, leaves, create_graph=further, retain_graph=True, allow_unused=True
        )
        grads = [
            torch.zeros_like(leaf) if grad is None else grad
            for leaf, grad in zip(leaves, found, strict=True)
        ]
        return self.read(dict(zip(self.paths, grads, strict=True)))

    def write(self, tensors: Mapping[str, Tensor], values: Tensor) -> None:
        """Write joined entries into the tensors."""
        for path, entries in self.split(values).items():
            at = next(at for at in self.dims if at.path == path)
            moved = tensors[path].detach().movedim(at.dim, 0)
            places = self._places[at].to(moved.device)
            moved[places] = entries.to(moved).reshape(len(places), *moved.shape[1:])

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """Return joined entries by path, `(units, entries)` each, as `Given` takes them."""
        sizes = [self.entries(at) for at in self.dims]
        pieces = values.detach().split(sizes, 1)
        return {at.path: piece for at, piece in zip(self.dims, pieces, strict=True)}

    @cached_property
    def _places(self) -> dict[ParameterDim, Tensor]:
        """The positions of the units in the dim of each tensor."""
        found = {at: self.change.at(at.path, at.dim)[self.units].reshape(-1) for at in self.dims}
        return {at: torch.from_numpy(places) for at, places in found.items()}

    def _of(self, tensor: Tensor, at: ParameterDim) -> Tensor:
        places = self._places[at].to(tensor.device)
        return tensor.index_select(at.dim, places).movedim(at.dim, 0).reshape(len(self.units), -1)

    def entries(self, at: ParameterDim) -> int:
        """Return how many entries a unit has in one of the tensors."""
        layouts, widths = self.change.analysis.state[at.path], self.change.widths()
        whole = [layout.size(widths) for layout in layouts]
        each = self.change.at(at.path, at.dim).shape[1]
        return each * int(np.prod([s for d, s in enumerate(whole) if d != at.dim]))


def fan_in(graph: Graph, axis: Axis) -> tuple[ParameterDim, ...]:
    """Return what writes the units of an axis: its producers, and the biases added beside them."""
    written = {at.path for at in axis.producers}
    carried = {at.path: at for at in axis.carriers}
    found = dict.fromkeys(axis.producers)
    for step in graph.analysis.steps:
        if step.row.kind is Kind.CONTRACT and step.bias is not None:
            sources = {s: graph.analysis.sources.get(n) for s, n in enumerate(step.inputs)}
            bias = sources.pop(step.bias)
            if bias and bias.path in carried and _any(sources.values(), written):
                found[carried[bias.path]] = None
    return tuple(found)


def _any(sources: Iterable[object], paths: set[str]) -> bool:
    return any(getattr(source, "path", None) in paths for source in sources)


def one_sided(graph: Graph, axis: Axis) -> bool:
    """Return whether what writes an axis is not what reads it as well, so that both can differ."""
    return not {at.path for at in axis.producers} & {at.path for at in axis.consumers}
