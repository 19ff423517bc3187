"""Second moments of what layers read and what the loss wants of them, for every axis at once.

They are all that the scores of growth methods need of the data. One pass runs the graph forward and
backward over the batches and adds up products, position by position; nothing is kept per example.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from graphgrow.errors import NotApplicable
from graphgrow.ir.graph import Graph
from graphgrow.measure.capture import Capture
from graphgrow.measure.patches import (
    channels,
    chunks,
    gram,
    mapped,
    patches,
    pooled,
    reads,
    rows,
    summable,
)
from graphgrow.measure.routes import Feed, Product, Read, Route, route
from graphgrow.measure.spectral import best_update

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
    `(g, o, o)` the covariance of the desired update.
    """

    path: str
    bias: str | None
    columns: slice
    reads: int
    present: Tensor
    desired: Tensor
    gradient: Tensor


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
) -> dict[str, Moments]:
    """Return the moments of axes by name: those asked for, or all that can be measured.

    Each of `batches` is `(inputs, target)`; several inputs are a tuple, their first dim the
    examples. `loss(output, target)` is a mean over the batch, so that sums do not depend on how
    examples were batched. Sums are in double precision. With `project`, the batches are gone
    through twice: the second pass takes away what the consumers' own weights can do (TINY's
    V_goal_proj, Prop. 3.1). Where torch.distributed is initialised, sums are over all ranks. The
    model, its buffers, gradients and modes, and the random number generators stay as they are.

    Raises:
        NotApplicable: where an axis that was asked for cannot be measured.
        ValueError: without any example.
    """
    routes = _routes(graph, axes, mode)
    batches = list(batches) if project and not isinstance(batches, Sequence) else batches
    sums = _summed(graph, batches, loss, routes, mode)
    projected: Mapping[str, Tensor] = {}
    if project:
        updates = {p: best_update(c.present, c.desired) for p, c in sums.consumers.items()}
        again = _summed(graph, batches, loss, routes, mode, updates)
        projected = {name: axis.cross / again.examples for name, axis in again.axes.items()}
    return {name: _averaged(routes[name], sums, graph, projected.get(name)) for name in routes}


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


# --------------------------------------------------------------------------- sums


@dataclass
class _OfConsumer:
    """Sums of one weight that reads: of what it reads and of what is desired there."""

    present: Tensor
    desired: Tensor
    gradient: Tensor


@dataclass
class _OfAxis:
    """Sums of one axis, and its places for producers and consumers."""

    producers: tuple[Producer, ...]
    columns: Mapping[str, slice]
    inputs: Tensor
    cross: Tensor


@dataclass
class _Sums:
    """All sums of a pass."""

    axes: Mapping[str, _OfAxis]
    consumers: Mapping[str, _OfConsumer]
    loss: float = 0.0
    examples: int = 0


def _summed(
    graph: Graph,
    batches: Iterable[tuple[Any, Any]],
    loss: Loss,
    routes: Mapping[str, Route],
    mode: str,
    updates: Mapping[str, Tensor] | None = None,
) -> _Sums:
    """Return the sums of one pass, over all ranks; with `updates`, of what these cannot do."""
    wanted: dict[Product, list[tuple[str, Read]]] = {}
    for name, found in routes.items():
        for read in (read for reads_ in found.reads.values() for read in reads_):
            wanted.setdefault(read.product, []).append((name, read))
    sums = _Sums(
        {name: _of_axis(graph, found) for name, found in routes.items()},
        {product.weight: _of_consumer(graph, product) for product in wanted},
    )
    feeds = {f.product for reads_ in wanted.values() for _, r in reads_ for f in r.feeds}
    capture = Capture(graph, mode, feeds | set(wanted))
    for inputs, target in batches:
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        batch = _Batch(graph, sums, wanted, updates, len(given[0]))
        value = capture.run(given, target, loss, wanted, batch.add)
        sums.loss += value * batch.examples
        sums.examples += batch.examples
    _over_ranks(sums)
    if not sums.examples:
        raise ValueError("cannot measure without examples: there is no batch")
    return sums


def _of_axis(graph: Graph, found: Route) -> _OfAxis:
    """Return zero sums for an axis."""
    producers, width = [], 0
    for path, uses in found.writes.items():
        entries, bias = _entries(graph, uses[0]), _bias(found.axis, graph, uses)
        rows_ = slice(width, width + entries + (bias is not None))
        producers.append(Producer(path, entries, bias, rows_))
        width = rows_.stop
    columns, out = {}, 0
    for path, reads_ in found.reads.items():
        size = _columns(graph, reads_[0])
        columns[path] = slice(out, out + size)
        out += size
    like = _like(graph, producers[0].path)
    inputs = torch.zeros(found.parts, width, width, **like)
    return _OfAxis(tuple(producers), columns, inputs, torch.zeros(found.parts, width, out, **like))


def _entries(graph: Graph, use: Product) -> int:
    """Return how many numbers of a weight one output channel has."""
    return graph.state[use.weight].numel() // _outputs(graph, use)


def _outputs(graph: Graph, use: Product) -> int:
    return graph.state[use.weight].shape[use.out]


def _kernel(graph: Graph, use: Product) -> tuple[int, ...]:
    return tuple(graph.state[use.weight].shape[2:]) if use.window else ()


def _bias(axis: str, graph: Graph, uses: tuple[Product, ...]) -> str | None:
    """Return the bias that all uses of a weight add to units of the axis, None without one."""
    paths = {use.bias for use in uses}
    path = paths.pop() if len(paths) == 1 else None
    return path if path and axis in graph.analysis.state[path][0].axes() else None


def _columns(graph: Graph, read: Read) -> int:
    """Return how many outgoing weights each part of a unit has in one consumer."""
    use = read.product
    groups = use.window.groups if use.window else 1
    return _outputs(graph, use) // groups * math.prod(_kernel(graph, use)) * max(read.flat, 1)


def _like(graph: Graph, path: str) -> dict[str, Any]:
    return {"dtype": torch.double, "device": graph.state[path].device}


def _of_consumer(graph: Graph, product: Product) -> _OfConsumer:
    """Return zero sums for a weight that reads."""
    groups = product.window.groups if product.window else 1
    own = _entries(graph, product) + (product.bias is not None)
    out, like = _outputs(graph, product) // groups, _like(graph, product.weight)
    sizes = ((own, own), (own, out), (out, out))
    return _OfConsumer(*(torch.zeros(groups, *size, **like) for size in sizes))


def _over_ranks(sums: _Sums) -> None:
    """Add up what all ranks have summed, where there are several."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    first = next(iter(sums.axes.values()), None)
    counts = torch.tensor([sums.loss, float(sums.examples)], dtype=torch.double)
    counts = counts.to(first.inputs.device) if first else counts
    torch.distributed.all_reduce(counts)
    sums.loss, sums.examples = float(counts[0]), int(counts[1])
    for found in (*sums.axes.values(), *sums.consumers.values()):
        for tensor in vars(found).values():
            if isinstance(tensor, Tensor):
                torch.distributed.all_reduce(tensor)


# --------------------------------------------------------------------------- one batch


@dataclass
class _Batch:
    """Adds the products of one batch to the sums while its backward pass runs."""

    graph: Graph
    sums: _Sums
    wanted: Mapping[Product, list[tuple[str, Read]]]
    updates: Mapping[str, Tensor] | None
    examples: int
    counted: set[tuple[str, frozenset[Feed]]] = field(default_factory=set)

    def add(self, product: Product, read: Mapping[Product, Tensor], gradient: Tensor) -> None:
        """Add what one use of a consumer has to say; `gradient` is that of the mean loss."""
        feeds = list({f.product for _, r in self.wanted[product] for f in r.feeds})
        tensors = [gradient, read[product], *(read[use] for use in feeds)]
        size = sum(self._size(use, read[use]) for use in (product, *feeds))
        for examples, (v, own, *others) in chunks(tensors, self.examples, size):
            x = dict(zip(feeds, others, strict=True))
            self._add(_Piece(self.graph, examples, product, own, x), v * -self.examples)
        self.counted.update((name, r.feeds) for name, r in self.wanted[product])

    def _size(self, use: Product, x: Tensor) -> int:
        """Return about how many numbers the patches of a whole batch have."""
        window = use.window
        stride = math.prod(window.stride) if window else 1
        entries = len(self.graph.state[use.weight]) if use.embeds else 1
        return x.numel() * math.prod(_kernel(self.graph, use)) * entries // stride

    def _add(self, piece: _Piece, gradient: Tensor) -> None:
        product = piece.product
        mine = piece.patches(product, piece.own, product.bias is not None)
        groups = product.window.groups if product.window else 1
        convolved = product.window is not None
        v = channels(summable(gradient), groups, piece.examples, convolved)
        consumer = self.sums.consumers[product.weight]
        if self.updates is None:
            consumer.present += gram(mine, mine)
            consumer.desired += gram(mine, v)
            consumer.gradient += gram(v, v)
        else:
            able = self.updates[product.weight].to(v).mT @ mine.flatten(2)
            v = v - able.reshape(v.shape)
        for name, read in self.wanted[product]:
            axis = self.sums.axes[name]
            columns = axis.columns[product.weight]
            x = [(p.rows, piece.joined(p, read)) for p in axis.producers]
            fed = [(rows_, found) for rows_, found in x if found is not None]
            for rows_, found in fed:
                axis.cross[:, rows_, columns] += piece.met(found, v, read)
            if self.updates is None and (name, read.feeds) not in self.counted:
                for (p, a), (q, b) in itertools.product(fed, repeat=2):
                    axis.inputs[:, p, q] += gram(a, b)


@dataclass
class _Piece:
    """A few examples of a batch: what one consumer and all that feed it read."""

    graph: Graph
    examples: int
    product: Product
    own: Tensor
    x: Mapping[Product, Tensor]

    def patches(self, use: Product, x: Tensor, bias: bool) -> Tensor:
        """Return what one use of a weight reads at each position: `(g, e, n, *positions)`."""
        if use.window is not None:
            return patches(summable(x), use.window, _kernel(self.graph, use), bias)
        if use.embeds:
            weight = self.graph.state[use.weight]
            x = torch.nn.functional.one_hot(x.flatten(), len(weight)).to(weight.dtype)
        return rows(summable(x), self.examples, bias)

    def joined(self, producer: Producer, read: Read) -> Tensor | None:
        """Return what a producer reads where a consumer reads it, None if it does not feed it."""
        found = None
        for feed in read.feeds:
            if feed.product.weight == producer.path:
                use = feed.product
                x = pooled(self.patches(use, self.x[use], producer.bias is not None), feed.pools)
                found = x if found is None else found + x
        return found

    def met(self, x: Tensor, v: Tensor, read: Read) -> Tensor:
        """Return products of what producers read and what the consumer wants: `(g, in, out)`."""
        window = self.product.window
        if window is not None:
            x = x.reshape(*x.shape[:2], self.own.shape[0], *self.own.shape[2:])
            return mapped(x, v, window, _kernel(self.graph, self.product))
        if read.flat:
            return torch.einsum("gent,gon->geto", x.flatten(3), v.flatten(2)).flatten(2)
        return gram(x, v)


def _averaged(found: Route, sums: _Sums, graph: Graph, projected: Tensor | None) -> Moments:
    """Return the averages over examples of an axis' sums."""
    axis, n = sums.axes[found.axis], sums.examples
    consumers = []
    for path, columns in axis.columns.items():
        own, uses = sums.consumers[path], found.reads[path]
        same = max(sum(u.feeds == r.feeds for u in uses) for r in uses)
        use = uses[0].product
        often = reads(use.window, _kernel(graph, use)) if use.window else 1
        means = (own.present / n, own.desired / n, own.gradient / n)
        consumers.append(Consumer(path, use.bias, columns, same * often, *means))
    return Moments(
        found.axis,
        found,
        n,
        sums.loss / n,
        axis.producers,
        tuple(consumers),
        axis.inputs / n,
        axis.cross / n,
        projected,
    )
