"""Fan-ins and fan-outs of a graph's units: which entries of which parameters are one vector.

The units of an axis have several producers where a sum is written (a residual stage), and several
axes share a dim where outputs are concatenated or flattened. So a fan is not a row of one matrix:
it is all the weights that write one unit together, wherever they are, or all that read it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from graphgrow.ir.analyse import ParameterDim, Step
from graphgrow.ir.graph import Graph
from graphgrow.ir.outcome import Kind


@dataclass(frozen=True, eq=False)
class Part:
    """The slices of one parameter at all places in some dims, row-major.

    `units` has the fan of each slice. The dims are one but where groups are a dim of their own, as
    in a transposed convolution.
    """

    path: str
    dims: tuple[int, ...]
    units: Tensor

    def rows(self, tensor: Tensor) -> Tensor:
        """Return the slices of a tensor, `(slices, entries)`."""
        if self.dims == (0,) and tensor.dim() == 2:
            return tensor
        return tensor.movedim(self.dims, tuple(range(len(self.dims)))).reshape(len(self.units), -1)

    def column(self, values: Tensor, tensor: Tensor) -> Tensor:
        """Return a number for each slice, `(slices, 1)`, in a shape to multiply a tensor by."""
        if self.dims == (0,) and tensor.dim() == 2:
            return values
        return values.reshape([n if d in self.dims else 1 for d, n in enumerate(tensor.shape)])


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

    def totals(self, values: np.ndarray) -> np.ndarray:
        """Return what `sums` does, of and in NumPy's numbers."""
        return values if self.fans is None else self.sums(torch.from_numpy(values)).numpy()

    def spread(self, tensors: Sequence[Tensor], *values: np.ndarray) -> list[list[Tensor]]:
        """Return numbers of fans, `(fans,)` each, by part, in shapes to multiply its tensor by."""
        found = []
        for value in values:
            each = (value if self.fans is None else value[self.fans])[:, None]
            columns = [torch.from_numpy(each[here]) for here in self.places]
            pairs = zip(self.parts, columns, tensors, strict=True)
            found.append([part.column(_like(column, t), t) for part, column, t in pairs])
        return found

    @cached_property
    def paths(self) -> frozenset[str]:
        """The parameters of the parts."""
        return frozenset(part.path for part in self.parts)

    @cached_property
    def places(self) -> list[slice]:
        """Where the slices of each part are among all."""
        ends = np.cumsum([0, *(len(part.units) for part in self.parts)]).tolist()
        return [slice(a, b) for a, b in pairwise(ends)]

    def squares(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the squared length of every slice of a tensor for each part."""
        return self.dots(tensors, tensors)

    def dots(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
        """Return the dot products of the slices of two tensors for each part."""
        found = zip(self.parts, first, second, strict=True)
        return [_dots(_exact(p.rows(a)), _exact(p.rows(b))) for p, a, b in found]


def _dots(first: Tensor, second: Tensor) -> Tensor:
    """Return the dot products of rows: NumPy's, where that will do, write no table of products."""
    if first.is_cpu and not torch.is_grad_enabled():
        return torch.from_numpy(np.vecdot(first.numpy(force=True), second.numpy(force=True)))
    return torch.linalg.vecdot(first, second)


def joined(pieces: Sequence[Tensor]) -> Tensor:
    """Return the numbers of the slices of all parts as one, in type and place of the first."""
    return torch.cat([_like(piece, pieces[0]) for piece in pieces])


def _exact(rows: Tensor) -> Tensor:
    """Return numbers in a type whose sums of squares mean something."""
    return rows if rows.dtype.itemsize >= 4 else rows.float()


def _like(values: Tensor, other: Tensor) -> Tensor:
    same = values.dtype == other.dtype and values.device == other.device
    return values if same else values.to(other)


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
    remains (scales and shifts of norms, numbers of activations, what weights are computed from) is
    nobody's fan-in. Source: Philipp and Carbonell (2017), equation 2, where layers have neither
    biases nor branches.
    """
    analysis = graph.analysis
    writing: dict[str, _Site] = {}
    plain = _plain(graph)
    for axis in analysis.axes.values():
        for at in (at for at in axis.producers if at.path in plain):
            writing.setdefault(at.path, _site(graph, at))
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
    reading: dict[str, _Site] = {}
    plain = _plain(graph)
    for axis in graph.analysis.axes.values():
        for at in (at for at in axis.consumers if at.path in plain):
            reading.setdefault(at.path, _site(graph, at))
    return _fans(graph, reading.values())


def _plain(graph: Graph) -> set[str]:
    """Return the paths of weights that are used as they are, not to compute others from."""
    analysis = graph.analysis
    used = {n for s in analysis.steps if s.row.kind in _WEIGHED for n in s.inputs}
    return {analysis.sources[n].path for n in used if n in analysis.sources}


_WEIGHED = (Kind.CONTRACT, Kind.GATHER)


@dataclass(frozen=True)
class _Site:
    """The dims of a parameter whose places are units of some axes.

    Sites that share axes are of one bundle, unless they stand for themselves (`own`, their path).
    """

    path: str
    dims: tuple[int, ...]
    axes: frozenset[str]
    own: str = ""


def _site(graph: Graph, at: ParameterDim, own: str = "") -> _Site:
    return _Site(at.path, (at.dim,), frozenset(graph.analysis.state[at.path][at.dim].axes()), own)


def _weights(graph: Graph, step: Step) -> list[str]:
    """Return the parameters that are factors in a contraction."""
    sources = graph.analysis.sources
    found = [sources.get(n) for slot, n in enumerate(step.inputs) if slot != step.bias]
    return [source.path for source in found if source is not None]


def _filters(graph: Graph, step: Step, writing: dict[str, _Site]) -> None:
    """Add the weights of a contraction that write the very axes that they share with its input.

    Where such an axis has a dim of its own beside the one that is written, the units are at both.
    """
    for path in _weights(graph, step):
        inside = [frozenset(layout.axes()) & step.batched for layout in graph.analysis.state[path]]
        dims = [d for d, axes in enumerate(inside) if axes]
        if dims and path not in writing:
            writing[path] = _site(graph, ParameterDim(path, dims[0]), path)
        elif dims:
            site = writing[path]
            dims = tuple(sorted({*site.dims, *dims}))
            writing[path] = replace(site, dims=dims, axes=site.axes.union(*inside))


def _bias(graph: Graph, step: Step, writing: dict[str, _Site]) -> None:
    """Add the bias of a contraction to the fan-ins of the weight beside it."""
    source = graph.analysis.sources.get(step.inputs[step.bias or 0])
    layouts = graph.analysis.state
    if source is None or source.path in writing or len(layouts[source.path]) != 1:
        return
    (layout,) = layouts[source.path]
    for site in (writing[path] for path in _weights(graph, step) if path in writing):
        alike = len(site.dims) == 1 and layouts[site.path][site.dims[0]] == layout
        if alike or (site.axes and site.axes == set(layout.axes())):
            writing[source.path] = replace(site, path=source.path, dims=(0,))
            return


def _fans(graph: Graph, found: Iterable[_Site]) -> Fans:
    """Return fans from sites: those that share axes are one bundle.

    A dim of no axis keeps to itself.
    """
    import networkx as nx  # 12 MiB that most programs do without

    order = {name: k for k, name in enumerate(graph.axes)}
    sites = [site for site in found if _learns(graph.state[site.path])]
    links = nx.Graph()
    for site in sites:
        links.add_node(site)
        links.add_edges_from((site, (axis, site.own)) for axis in site.axes)
    bundles = []
    for bundle in nx.connected_components(links):
        inside = sorted((key[0] for key in bundle if isinstance(key, tuple)), key=order.__getitem__)
        members = [site for site in sites if site in bundle]
        place = order[inside[0]] if inside else len(order)
        name = members[0].own or (inside[0] if inside else members[0].path)
        bundles.append((place, sites.index(members[0]), name, inside, members))
    names, starts, parts, count = [], [], [], 0
    for _, _, name, inside, members in sorted(bundles, key=lambda bundle: bundle[:2]):
        units, number = _numbered(graph, members, inside)
        parts += [Part(at.path, at.dims, u + count) for at, u in zip(members, units, strict=True)]
        names.append(name)
        starts.append(count)
        count += number
    return Fans(tuple(names), tuple(starts), count, tuple(parts))


def _learns(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad


def _numbered(graph: Graph, sites: list[_Site], axes: list[str]) -> tuple[list[Tensor], int]:
    """Return the number of the fan at each place of each site, and how many there are.

    Places are of one fan where they agree in the units of all axes; one in no axis is its own.
    """
    rows = []
    for k, site in enumerate(sites):
        units = [_units(graph, site, axis) for axis in axes]
        size = math.prod(graph.state[site.path].shape[d] for d in site.dims)
        alone = np.all([u < 0 for u in units], axis=0) if units else np.ones(size, dtype=bool)
        place = np.stack([np.full(size, k), np.arange(size)])
        rows.append(np.stack([*units, *np.where(alone, place, -1)], axis=1))
    different, number = np.unique(np.concatenate(rows), axis=0, return_inverse=True)
    cuts = np.cumsum([len(r) for r in rows])[:-1]
    pieces = np.split(number.reshape(-1), cuts)
    return [torch.from_numpy(p) for p in pieces], len(different)


def _units(graph: Graph, site: _Site, axis: str) -> np.ndarray:
    """Return the unit of an axis that each place of a site is of, −1 where it is of none."""
    sizes = [graph.state[site.path].shape[d] for d in site.dims]
    found = np.full(sizes, -1)
    for k, d in enumerate(site.dims):
        units = graph.analysis.state[site.path][d].units(graph.analysis.widths(), axis)
        shape = [-1 if j == k else 1 for j in range(len(sizes))]
        found = np.where(found < 0, units.reshape(shape), found)
    return found.reshape(-1) if axis in site.axes else np.full(found.size, -1)
