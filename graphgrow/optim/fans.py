"""Fan-ins and fan-outs of a graph's units: which entries of which parameters are one vector.

The units of an axis have several producers where a sum is written (a residual stage), and several
axes share a dim where outputs are concatenated or flattened. So a fan is not a row of one matrix:
it is all the weights that write one unit together, wherever they are, or all that read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import numpy as np
import torch
from torch import Tensor, nn

from graphgrow.ir.analyse import ParameterDim, Step
from graphgrow.ir.graph import Graph
from graphgrow.ir.rules import Kind


@dataclass(frozen=True, eq=False)
class Part:
    """The slices of one parameter along one dim: `units` has the fan of each, `(size,)`."""

    path: str
    dim: int
    units: Tensor


@dataclass(frozen=True, eq=False)
class Slices:
    """All slices of some parts, one after the other, and the fan of each, `(slices,)`.

    Numbers of slices and numbers of fans go from one to the other here, for all parameters at once.
    """

    parts: tuple[Part, ...]
    count: int

    @cached_property
    def fans(self) -> Tensor | None:
        """The fan of each slice, None where slices are the fans themselves, in order."""
        fans = torch.cat([torch.arange(0), *(part.units for part in self.parts)])
        return None if torch.equal(fans, torch.arange(self.count)) else fans

    def sums(self, values: Tensor) -> Tensor:
        """Return the sums over fans of numbers of slices, `(..., fans)`."""
        if self.fans is None:
            return values
        total = values.new_zeros(*values.shape[:-1], self.count)
        return total.index_add_(-1, self.fans.to(values.device), values)

    def spread(self, values: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return numbers of fans, `(fans,)`, by part, in shapes to multiply its tensor by."""
        each = values if self.fans is None else values[self.fans.to(values.device)]
        columns = each[:, None].split([len(part.units) for part in self.parts])
        return [
            _like(column, tensor).reshape(_along(part.dim, tensor))
            if part.dim or tensor.dim() != 2
            else _like(column, tensor)
            for column, part, tensor in zip(columns, self.parts, tensors, strict=True)
        ]

    def lengths(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the length of every slice of a tensor for each part, `(size of dim,)`."""
        pairs = zip(tensors, self.parts, strict=True)
        return [torch.linalg.vector_norm(_slices(t, part.dim), dim=1) for t, part in pairs]

    def dots(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
        """Return the dot products of the slices of two tensors for each part."""
        found = zip(first, second, self.parts, strict=True)
        return [torch.linalg.vecdot(_slices(a, p.dim), _slices(b, p.dim)) for a, b, p in found]


def joined(pieces: Sequence[Tensor]) -> Tensor:
    """Return the numbers of the slices of all parts as one, in type and place of the first."""
    return torch.cat([_like(piece, pieces[0]) for piece in pieces])


def _like(values: Tensor, other: Tensor) -> Tensor:
    same = values.dtype == other.dtype and values.device == other.device
    return values if same else values.to(other)


def _along(dim: int, tensor: Tensor) -> list[int]:
    return [-1 if d == dim else 1 for d in range(tensor.dim())]


def _slices(tensor: Tensor, dim: int) -> Tensor:
    if dim == 0 and tensor.dim() == 2:
        return tensor
    return tensor[:, None] if tensor.dim() == 1 else tensor.movedim(dim, 0).flatten(1)


@dataclass(frozen=True, eq=False)
class Fans:
    """Vectors of weights, numbered through the graph in topological order of their axes.

    `names` has the first axis of each bundle of axes that are written (or read) together, or the
    path of depthwise filters, and `starts` the number of its first fan; `parts` say which slices of
    which parameters they are.
    """

    names: tuple[str, ...]
    starts: tuple[int, ...]
    count: int
    parts: tuple[Part, ...]

    @cached_property
    def slices(self) -> Slices:
        """The slices of all parts."""
        return Slices(self.parts, self.count)

    def named(self, name: str) -> range:
        """Return the numbers of the fans of the bundle of that name."""
        at = self.names.index(name)
        return range(self.starts[at], [*self.starts, self.count][at + 1])


def fan_ins(graph: Graph) -> Fans:
    """Return the fan-in of every unit that trainable weights write: of outputs, too.

    The bias that a layer adds is in it, as the weight of a unit that is always one; the filters of
    a depthwise convolution, which write the units that they read, are fan-ins of their own. What
    remains (scales and shifts of norms, numbers of activations) is nobody's fan-in. Source: Philipp
    and Carbonell (2017), equation 2, where layers have neither biases nor branches.
    """
    analysis = graph.analysis
    writing: dict[str, tuple[ParameterDim, str]] = {}
    for axis in analysis.axes.values():
        for at in axis.producers:
            writing.setdefault(at.path, (at, ""))
    for step in analysis.steps:
        if step.row.kind is Kind.CONTRACT:
            _filters(graph, step, writing)
    for step in analysis.steps:
        if step.row.kind is Kind.CONTRACT and step.bias is not None:
            _bias(graph, step, writing)
    return _fans(graph, writing.values())


def fan_outs(graph: Graph) -> Fans:
    """Return the fan-out of every unit that trainable weights read: of inputs, too.

    A parameter that is read in two of its dims counts in the first. Source: Philipp and Carbonell
    (2017), equation 3.
    """
    reading: dict[str, tuple[ParameterDim, str]] = {}
    for axis in graph.analysis.axes.values():
        for at in axis.consumers:
            reading.setdefault(at.path, (at, ""))
    return _fans(graph, reading.values())


def _weights(graph: Graph, step: Step) -> list[str]:
    """Return the parameters that are factors in a contraction."""
    sources = graph.analysis.sources
    found = [sources.get(n) for slot, n in enumerate(step.inputs) if slot != step.bias]
    return [source.path for source in found if source is not None]


def _filters(graph: Graph, step: Step, writing: dict[str, tuple[ParameterDim, str]]) -> None:
    """Add the weights of a contraction that write the very axes that they share with its input."""
    for path in _weights(graph, step):
        if path in writing:
            continue
        layouts = graph.analysis.state[path]
        dims = [d for d, layout in enumerate(layouts) if step.batched & set(layout.axes())]
        if dims:
            writing[path] = (ParameterDim(path, dims[0]), path)


def _bias(graph: Graph, step: Step, writing: dict[str, tuple[ParameterDim, str]]) -> None:
    """Add the bias of a contraction to the fan-ins of the weight beside it."""
    source = graph.analysis.sources.get(step.inputs[step.bias or 0])
    layouts = graph.analysis.state
    if source is None or source.path in writing or len(layouts[source.path]) != 1:
        return
    for path in _weights(graph, step):
        at, own = writing.get(path, (None, ""))
        if at is not None and layouts[path][at.dim] == layouts[source.path][0]:
            writing[source.path] = (ParameterDim(source.path, 0), own)
            return


def _fans(graph: Graph, found: Iterable[tuple[ParameterDim, str]]) -> Fans:
    """Return fans from dims: those that share axes are one bundle, kept apart by the `str` beside.

    A dim of no axis keeps to itself.
    """
    order = {name: k for k, name in enumerate(graph.axes)}
    dims = [(at, own) for at, own in found if _learns(graph.state[at.path])]
    links = nx.Graph()
    for at, own in dims:
        links.add_node((at, own))
        inside = set(graph.analysis.state[at.path][at.dim].axes())
        links.add_edges_from(((at, own), (axis, own)) for axis in inside)
    bundles = []
    for bundle in nx.connected_components(links):
        inside = sorted((key for key, _ in bundle if isinstance(key, str)), key=order.__getitem__)
        members = [at for at, own in dims if (at, own) in bundle]
        first = next(k for k, dim in enumerate(dims) if dim in bundle)
        place = order[inside[0]] if inside else len(order)
        name = dims[first][1] or (inside[0] if inside else members[0].path)
        bundles.append((place, first, name, inside, members))
    names, starts, parts, count = [], [], [], 0
    for _, _, name, inside, members in sorted(bundles, key=lambda bundle: bundle[:2]):
        units, number = _numbered(graph, members, inside)
        parts += [Part(at.path, at.dim, u + count) for at, u in zip(members, units, strict=True)]
        names.append(name)
        starts.append(count)
        count += number
    return Fans(tuple(names), tuple(starts), count, tuple(parts))


def _learns(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad


def _numbered(graph: Graph, dims: list[ParameterDim], axes: list[str]) -> tuple[list[Tensor], int]:
    """Return the number of the fan at each position of each dim, and how many there are.

    Positions are of one fan where they agree in the units of all axes; one in no axis is its own.
    """
    widths, rows = graph.analysis.widths(), []
    for k, at in enumerate(dims):
        layout = graph.analysis.state[at.path][at.dim]
        units = [layout.units(widths, axis) for axis in axes]
        size = graph.state[at.path].shape[at.dim]
        alone = np.all([u < 0 for u in units], axis=0) if units else np.ones(size, dtype=bool)
        place = np.stack([np.full(size, k), np.arange(size)])
        rows.append(np.stack([*units, *np.where(alone, place, -1)], axis=1))
    different, number = np.unique(np.concatenate(rows), axis=0, return_inverse=True)
    cuts = np.cumsum([len(r) for r in rows])[:-1]
    pieces = np.split(number.reshape(-1), cuts)
    return [torch.from_numpy(p) for p in pieces], len(different)
