"""Second moments of what layers read and what the loss wants of them, for every axis at once.

They are all that the scores of growth methods need of the data. One pass runs the graph forward and
backward over the batches and adds up products, position by position; nothing is kept per example.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from graphgrow.errors import NotApplicable
from graphgrow.ir.graph import Graph
from graphgrow.measure.capture import Capture
from graphgrow.measure.patches import reads
from graphgrow.measure.routes import Feed, Product, Read, Route, route
from graphgrow.measure.spectral import best_update
from graphgrow.measure.sums import Batch, Sum, Sums, entries_of, kernel_of, outputs_of

Loss = Callable[[Any, Any], Tensor]
"""Gives the mean over a batch's examples of what is to become small, of output and target."""


@dataclass(frozen=True)
class Producer:
    """The incoming weights of one unit: `entries` numbers of a parameter, a bias where it has one.

    `rows` are their places in the joined input; the bias is the last of them.
    """

    path: str
    entries: int
    bias: str | None
    rows: slice


@dataclass(frozen=True, eq=False)
class Consumer:
    """The outgoing weights of one unit, and what the layer that reads them has of its own.

    `columns` are their places in the joined desired update. `reads` is how often one position of a
    unit is read at most. For each of g groups, with `b` entries read for a position (a last one of
    ones where there is a bias) and `o` outputs: `present` `(g, b, b)` is the covariance of present
    activations, `desired` `(g, b, o)` their cross moment with the desired update, and `gradient`
    `(g, o, o)` the covariance of the desired update. `overlap`, where it was asked for, is `cross`
    in these columns with what is read in place of what is desired: b instead of o.
    """

    path: str
    bias: str | None
    columns: slice
    reads: int
    present: Tensor
    desired: Tensor
    gradient: Tensor
    overlap: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Moments:
    """The second moments of one axis, averages over examples of sums over positions.

    A new unit has `parts` channels, each with incoming weights of its own, `in` in all, and
    outgoing ones, `out`: those of all producers and all consumers joined, in the axis' order. For
    each part, `inputs` `(in, in)` is the covariance of what producers read (S), added up over the
    sets of producers that feed one consumer; `cross` `(in, out)` is the cross moment of what
    producers read, where a consumer reads it, with its desired update −∂L/∂output (N), which is
    `projected` on what the consumer's own weights cannot do where that was asked for.
    """

    axis: str
    route: Route
    examples: int
    loss: float
    producers: tuple[Producer, ...]
    consumers: tuple[Consumer, ...]
    inputs: Tensor
    cross: Tensor
    projected: Tensor | None

    @property
    def parts(self) -> int:
        """How many channels a unit has."""
        return self.route.parts


def moments(
    graph: Graph,
    batches: Iterable[tuple[Any, Any]],
    loss: Loss,
    axes: Sequence[str] | None = None,
    *,
    mode: str = "eval",
    project: bool = False,
    overlap: bool = False,
) -> dict[str, Moments]:
    """Return the moments of axes by name: those asked for, or all that can be measured.

    Each of `batches` is `(inputs, target)`; several inputs are a tuple, their first dim the
    examples. `loss(output, target)` is a mean over the batch, so that sums do not depend on how
    examples were batched. Sums are in double precision. With `project`, the batches are gone
    through twice: the second pass takes away what the consumers' own weights can do (TINY's
    V_goal_proj, Prop. 3.1). With `overlap`, the cross moments of what producers and consumers read
    are taken too, which cost as much as the rest or more. Where torch.distributed is initialised,
    sums are over all ranks. The model, its buffers, gradients and modes, and the random number
    generators stay as they are.

    Raises:
        NotApplicable: where an axis that was asked for cannot be measured.
        ValueError: without any example.
    """
    routes = _routes(graph, axes, mode)
    batches = list(batches) if project and not isinstance(batches, Sequence) else batches
    sums = _summed(graph, batches, loss, routes, mode, overlap=overlap)
    consumers = _consumers(graph, routes, sums)
    cross = {name: _cross(graph, found, sums) for name, found in routes.items()}
    sums.cross.clear()
    inputs = {name: _inputs(graph, found, sums) for name, found in routes.items()}
    sums.covariance.clear()
    projected: Mapping[str, Tensor] = {}
    if project:
        updates = {path: best_update(c.present, c.desired) for path, c in consumers.items()}
        again = _summed(graph, batches, loss, routes, mode, updates)
        projected = {name: _cross(graph, found, again) for name, found in routes.items()}
    return {
        name: Moments(
            name,
            found,
            sums.examples,
            sums.loss / sums.examples,
            _producers(graph, found),
            _of_axis(graph, found, consumers, sums if overlap else None),
            inputs[name],
            cross[name],
            projected.get(name),
        )
        for name, found in routes.items()
    }


def obstacle(graph: Graph, axis: str, mode: str = "eval") -> str | None:
    """Return the sentence that says why an axis cannot be measured, None where it can."""
    try:
        route(graph, axis, mode)
    except NotApplicable as error:
        return str(error)
    return None


def _routes(graph: Graph, axes: Sequence[str] | None, mode: str) -> dict[str, Route]:
    if axes is not None:
        found = [route(graph, axis, mode) for axis in axes]
    else:
        free = [name for name, axis in graph.axes.items() if axis.obstacle is None]
        found = [route(graph, name, mode) for name in free if obstacle(graph, name, mode) is None]
    return {r.axis: r for r in found}


# --------------------------------------------------------------------------- passes


def _summed(
    graph: Graph,
    batches: Iterable[tuple[Any, Any]],
    loss: Loss,
    routes: Mapping[str, Route],
    mode: str,
    updates: Mapping[str, Tensor] | None = None,
    overlap: bool = False,
) -> Sums:
    """Return the sums of one pass; with `updates`, of what these cannot do."""
    wanted: dict[Product, list[Read]] = {}
    for found in routes.values():
        for read in (read for reads_ in found.reads.values() for read in reads_):
            wanted.setdefault(read.product, []).append(read)
    feeds = {f.product for reads_ in wanted.values() for r in reads_ for f in r.feeds}
    capture, sums = Capture(graph, mode, feeds | set(wanted)), Sums()
    for inputs, target in batches:
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        batch = Batch(graph, sums, wanted, updates, len(given[0]), overlap)
        value = capture.run(given, target, loss, wanted, batch.add)
        sums.loss += value * batch.examples
        sums.examples += batch.examples
    counts = _over_ranks(torch.tensor([sums.loss, sums.examples], dtype=torch.double))
    sums.loss, sums.examples = float(counts[0]), int(counts[1])
    if not sums.examples:
        raise ValueError("cannot measure without examples: there is no batch")
    return sums


def _over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum over all ranks, where there are several."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


# --------------------------------------------------------------------------- from sums to moments


def _producers(graph: Graph, found: Route) -> tuple[Producer, ...]:
    producers, width = [], 0
    for path, uses in found.writes.items():
        entries, bias = entries_of(graph, uses[0]), _bias(found.axis, graph, uses)
        rows = slice(width, width + entries + (bias is not None))
        producers.append(Producer(path, entries, bias, rows))
        width = rows.stop
    return tuple(producers)


def _bias(axis: str, graph: Graph, uses: tuple[Product, ...]) -> str | None:
    """Return the bias that all uses of a weight add to units of the axis, None without one."""
    paths = {use.bias for use in uses}
    path = paths.pop() if len(paths) == 1 else None
    return path if path and axis in graph.analysis.state[path][0].axes() else None


def _columns(graph: Graph, found: Route) -> dict[str, slice]:
    """Return the places of each consumer among the outgoing weights of one part of a unit."""
    columns, out = {}, 0
    for path, (read, *_) in found.reads.items():
        use = read.product
        size = outputs_of(graph, use) // _groups(use) * math.prod(kernel_of(graph, use))
        columns[path] = slice(out, out + size * max(read.flat, 1))
        out = columns[path].stop
    return columns


def _groups(use: Product) -> int:
    return use.window.groups if use.window else 1


def _read_size(graph: Graph, use: Product) -> int:
    return entries_of(graph, use) + (use.bias is not None)


def _consumers(graph: Graph, routes: Mapping[str, Route], sums: Sums) -> dict[str, Consumer]:
    """Return what is known of each weight that reads, by its path; places are those of an axis."""
    uses: dict[str, dict[Product, None]] = {}
    for found in routes.values():
        for path, reads_ in found.reads.items():
            uses.setdefault(path, {}).update((read.product, None) for read in reads_)
    return {path: _consumer(graph, path, list(found), sums) for path, found in uses.items()}


def _consumer(graph: Graph, path: str, uses: list[Product], sums: Sums) -> Consumer:
    use, device = uses[0], graph.state[path].device
    groups, b = _groups(use), _read_size(graph, use)
    out = outputs_of(graph, use) // groups

    def mean(found: list[Sum | None], *sizes: int) -> Tensor:
        total = torch.zeros(groups, *sizes, dtype=torch.double, device=device)
        for part in found:
            if part is not None:
                part.into(total)
        return _over_ranks(total).div_(sums.examples)

    present = mean([sums.covariance.get((Feed(u), Feed(u))) for u in uses], b, b)
    desired = mean([sums.desired.pop(u, None) for u in uses], b, out)
    gradient = mean([sums.gradient.pop(u, None) for u in uses], out, out)
    return Consumer(path, use.bias, slice(0), 1, present, desired, gradient)


def _of_axis(
    graph: Graph, found: Route, consumers: Mapping[str, Consumer], sums: Sums | None
) -> tuple[Consumer, ...]:
    """Return an axis' consumers with their places and how often they read a position of a unit."""
    placed = []
    for path, columns in _columns(graph, found).items():
        uses = found.reads[path]
        same, use = max(sum(u.feeds == r.feeds for u in uses) for r in uses), uses[0].product
        often = reads(use.window, kernel_of(graph, use)) if use.window else 1
        overlap = None if sums is None else _overlap(graph, found, path, sums)
        consumer = replace(consumers[path], columns=columns, overlap=overlap)
        placed.append(replace(consumer, reads=same * often))
    return tuple(placed)


def _inputs(graph: Graph, found: Route, sums: Sums) -> Tensor:
    """Return the covariance of what the producers of an axis read, joined: `(parts, in, in)`."""
    producers = _producers(graph, found)
    width, device = producers[-1].rows.stop, graph.state[producers[0].path].device
    joined = torch.zeros(found.parts, width, width, dtype=torch.double, device=device)
    fed = {read.feeds for reads_ in found.reads.values() for read in reads_}
    for feeds in fed:
        for p, q in itertools.product(producers, repeat=2):
            for a, b in itertools.product(feeds, repeat=2):
                known = sums.covariance.get((a, b))
                if known and (a.product.weight, b.product.weight) == (p.path, q.path):
                    known.into(joined[:, p.rows, q.rows])
    return _over_ranks(joined).div_(sums.examples)


def _cross(graph: Graph, found: Route, sums: Sums) -> Tensor:
    """Return the cross moment of an axis: `(parts, in, out)`."""
    columns = _columns(graph, found)
    joined = _unread(graph, found, max(c.stop for c in columns.values()))
    for path, reads_ in found.reads.items():
        _join(joined[..., columns[path]], _producers(graph, found), reads_, sums.cross)
    return _over_ranks(joined).div_(sums.examples)


def _overlap(graph: Graph, found: Route, path: str, sums: Sums) -> Tensor:
    """Return the cross moment of what producers and one consumer read: `(parts, in, columns)`."""
    read, *_ = found.reads[path]
    places = max(read.flat, 1) * math.prod(kernel_of(graph, read.product))
    joined = _unread(graph, found, _read_size(graph, read.product) * places)
    _join(joined, _producers(graph, found), found.reads[path], sums.overlap)
    return _over_ranks(joined).div_(sums.examples)


def _unread(graph: Graph, found: Route, columns: int) -> Tensor:
    """Return zeros `(parts, in, columns)` for moments of what an axis' producers read."""
    producers = _producers(graph, found)
    device = graph.state[producers[0].path].device
    sizes = found.parts, producers[-1].rows.stop, columns
    return torch.zeros(*sizes, dtype=torch.double, device=device)


def _join(
    joined: Tensor,
    producers: tuple[Producer, ...],
    reads_: tuple[Read, ...],
    sums: Mapping[tuple[Feed, Product], Sum],
) -> None:
    """Add the sums of all ways from producers to the uses of one consumer."""
    for p, read in itertools.product(producers, reads_):
        for feed in read.feeds:
            known = sums.get((feed, read.product))
            if known and feed.product.weight == p.path:
                known.into(joined[:, p.rows])
