"""What can be tried at a place of a graph: new units of an axis, a new layer before a layer.

Candidates are rows of numbers, each like a standard normal one. A place turns them into activations
on a batch, which autograd follows, and one of them into a rewrite.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from graphgrow.errors import NotApplicable
from graphgrow.ir.analyse import ParameterDim, Slot
from graphgrow.ir.graph import Graph
from graphgrow.ir.outcome import Kind
from graphgrow.measure.routes import Product
from graphgrow.measure.sample import Sample, reading, uses_of
from graphgrow.measure.trial import Trial, by_candidate
from graphgrow.passes.deepen import Deepen
from graphgrow.passes.layers import Factor
from graphgrow.passes.place import is_layer, width
from graphgrow.passes.prove import old_entries
from graphgrow.passes.units import Resized, inserted
from graphgrow.passes.weights import Given
from graphgrow.passes.widen import Widen

Activations = dict[Product, Tensor]
"""What candidates give to each use of a weight: `(g, candidates, entries, n, *positions)`."""

FLOOR = 1e-3  # of the mean singular value of a new layer: the least that each is raised to
STEADY = 0.01  # how much it counts against a new layer that it changes volumes


@dataclass(frozen=True, eq=False)
class _Entries:
    """Entries of a new unit in one tensor: how many are searched, and of what size.

    Those that meet new units are zero. Where none is searched, all are `rest`.
    """

    at: ParameterDim
    count: int
    scale: float
    rest: float = 0.0


@dataclass(frozen=True, eq=False)
class NewUnits:
    """New units of an axis."""

    graph: Graph
    axis: str
    count: int
    entries: tuple[_Entries, ...]
    uses: tuple[Product, ...]
    number: int
    counts: float = 1.0

    @staticmethod
    def of(graph: Graph, name: str, units: int, seed: int) -> NewUnits | None:
        """Return `units` new units of an axis, None where they cannot be tried."""
        axis = graph.axes[name]
        if axis.obstacle is not None:
            return None
        if set(axis.producers) & set(axis.consumers):
            return None  # a tied weight leaves no choice of two sides
        number = zlib.crc32(f"{name}:{axis.width}:{seed}".encode())
        try:
            uses = tuple(reading(graph, name))
            place = NewUnits(graph, name, units, _entries(graph, name), uses, number)
            drawn = place.rewrite(torch.ones(place.size))
            return place if drawn.obstacle(graph) is None else None
        except NotApplicable:
            return None

    @property
    def size(self) -> int:
        """How many numbers one candidate has."""
        return self.count * sum(e.count for e in self.entries)

    def weights(self, candidates: int) -> Callable[[Tensor], dict[str, Tensor]]:
        """Return what gives the entries of new units by path, of candidates `(k, size)`."""
        change = _change(self.graph, self.axis, candidates * self.count)
        old = {e.at.path: old_entries(change, e.at) for e in self.entries}

        def entries(found: Tensor) -> dict[str, Tensor]:
            units, weights = found.reshape(candidates * self.count, -1), {}
            parts = units.split([e.count for e in self.entries], 1)
            for e, part in zip(self.entries, parts, strict=True):
                mask = old[e.at.path].to(found.device)
                values = units.new_full((len(units), len(mask)), 0.0 if e.count else e.rest)
                if e.count:
                    values = values.masked_scatter(mask, part * e.scale)
                weights[e.at.path] = values
            return weights

        return entries

    def tried(self, inputs: Any, seen: Sample, candidates: int) -> Callable[[Tensor], Activations]:
        """Return what gives the activations of candidates on a batch."""
        trial = Trial(self.graph, self.axis, candidates * self.count, inputs)
        weights = self.weights(candidates)

        def activations(found: Tensor) -> Activations:
            given = trial.activations(weights(found))
            return {
                use: a.unflatten(1, (candidates, self.count)).flatten(2, 3)
                for use, a in given.items()
            }

        return activations

    def steady(self, found: Tensor) -> Tensor:
        """Return a factor of the scores, `(k,)`: one."""
        return found.new_ones(len(found))

    def settled(self, found: Tensor) -> Tensor:
        """Return the candidates as they are inserted: as they are."""
        return found

    def rewrite(self, found: Tensor) -> Widen:
        """Return the widening by one candidate, `(size,)`."""
        incoming = self.weights(1)(found[None].detach().double().cpu())
        return Widen(self.axis, self.count, weights=Given.of(incoming))


def _change(graph: Graph, axis: str, units: int) -> Resized:
    return Resized(graph.analysis, axis, inserted(graph.axes[axis].width, units, None))


def _entries(graph: Graph, name: str) -> tuple[_Entries, ...]:
    """Return the entries of a new unit in all tensors that make it: norms change nothing."""
    axis, change, norms = graph.axes[name], _change(graph, name, 1), _norms(graph)
    found = []
    for at in (*axis.producers, *axis.carriers):
        tensor = graph.state[at.path]
        if at.path in norms:
            found.append(_Entries(at, 0, 1.0, norms[at.path]))
        elif isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
            count = int(old_entries(change, at).sum())
            found.append(_Entries(at, count, max(count, 1) ** -0.5))
    return tuple(found)


def _norms(graph: Graph) -> Mapping[str, float]:
    """Return the parameters and buffers of norms, with the number that changes nothing."""
    found: dict[str, float] = {}
    for step in graph.analysis.steps:
        if step.row.kind is Kind.NORM:
            for arg, value in zip(step.args[1:5], (1.0, 0.0, 0.0, 1.0), strict=False):
                if isinstance(arg, Slot) and step.inputs[arg.number] in graph.analysis.sources:
                    found[graph.analysis.sources[step.inputs[arg.number]].path] = value
    return found


@dataclass(frozen=True, eq=False)
class NewLayer:
    """A new layer before a linear or convolution layer."""

    graph: Graph
    at: str
    uses: tuple[Product, ...]
    width: int
    bias: bool
    number: int
    counts: float

    @staticmethod
    def places(graph: Graph, widest: int, size: float, seed: int) -> list[NewLayer]:
        """Return the layers that read at most `widest` units, before which one can be tried."""
        found = []
        for at in Deepen.places(graph):
            module = graph.modules[at]
            if not is_layer(module) or Deepen(at, Factor()).obstacle(graph) is not None:
                continue
            units = width(module) // getattr(module, "groups", 1)
            uses = tuple(uses_of(graph, [graph.analysis.tied[f"{at}.weight"]]))
            if units <= widest and uses:
                number = zlib.crc32(f"{at}:{seed}".encode())
                found.append(NewLayer(graph, at, uses, units, _takes_bias(graph, at), number, size))
        return found

    @property
    def size(self) -> int:
        """How many numbers one candidate has: matrix, bias, and three of each activation."""
        return self.width * (self.width + self.bias + 3)

    def _parts(self, found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return matrices `(k, units, in)`, biases `(k, units)` and activations `(k, 3, units)`."""
        d, k = self.width, len(found)
        matrix = found[:, : d * d].reshape(k, d, d) * d**-0.5
        bias = found[:, d * d : d * d + d] if self.bias else found.new_zeros(k, d)
        return matrix, bias, found[:, -3 * d :].reshape(k, 3, d)

    def tried(self, inputs: Any, seen: Sample, candidates: int) -> Callable[[Tensor], Activations]:
        """Return what gives the activations of candidates on a batch."""

        def activations(found: Tensor) -> Activations:
            given = {}
            for use in self.uses:
                x = self._given(found, use, seen.readers[use.weight].reads[use])
                kernel = tuple(self.graph.state[use.weight].shape[2:])
                given[use] = by_candidate(use, x, kernel, seen.examples, candidates)
            return given

        return activations

    def _given(self, found: Tensor, use: Product, x: Tensor) -> Tensor:
        """Return what the new layers give where the old one reads `x`."""
        matrix, bias, shape = self._parts(found.to(x))
        parts = [bias, *shape.unbind(1)]
        if use.window is None:
            z = torch.einsum("nc,kqc->nkq", x.flatten(0, -2), matrix)
            return _rational(z, *parts).flatten(1)
        z = torch.einsum("ngc...,kqc->ngkq...", x.unflatten(1, (use.window.groups, -1)), matrix)
        parts = [part.reshape(*part.shape, *[1] * (z.dim() - 4)) for part in parts]
        return _rational(z, *parts).flatten(1, 3)

    def steady(self, found: Tensor) -> Tensor:
        """Return the factor by which a matrix that changes volumes counts less."""
        return (-STEADY * self._parts(found)[0].slogdet().logabsdet.square()).exp()

    def settled(self, found: Tensor) -> Tensor:
        """Return the candidates with singular values raised to the least allowed."""
        u, values, v = torch.linalg.svd(self._parts(found)[0].double())
        values = torch.maximum(values, FLOOR * values.mean(-1, keepdim=True))
        matrix = (u * values[:, None]) @ v * self.width**0.5
        return torch.cat([matrix.flatten(1).to(found), found[:, self.width**2 :]], 1)

    def rewrite(self, found: Tensor) -> Deepen:
        """Return the insertion of one candidate, `(size,)`."""
        matrix, bias, _ = self._parts(self.settled(found[None].detach().double().cpu()))
        given = tuple(bias[0].tolist()) if self.bias else None
        return Deepen(self.at, Factor(tuple(map(tuple, matrix[0].tolist())), bias=given))


def _rational(x: Tensor, bias: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
    z = x + bias
    return alpha * z + (beta + gamma * z) / (1 + z * z)


def _takes_bias(graph: Graph, at: str) -> bool:
    """Return whether a new layer can have a bias that is folded out of the old one's."""
    groups = getattr(graph.modules[at], "groups", 1)
    if groups > 1 or f"{at}.bias" not in graph.state:
        return False
    if not isinstance(graph.modules[at], _ConvNd):
        return True
    layer = Factor(bias=(0.0,) * width(graph.modules[at]))
    return Deepen(at, layer).obstacle(graph) is None
