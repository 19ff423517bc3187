"""Second moments of what layers read and what the loss wants of them, for every axis at once.

They are all that the scores of growth methods need of the data. One pass runs the graph forward and
backward over the batches and adds up products, position by position; nothing is kept per example.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from graphgrow.errors import NotApplicable
from graphgrow.ir.graph import Graph
from graphgrow.measure.capture import Capture
from graphgrow.measure.patches import reads
from graphgrow.measure.pieces import Batch, entries_of, kernel_of, outputs_of
from graphgrow.measure.ranks import joined
from graphgrow.measure.routes import Feed, Product, Read, Route, route
from graphgrow.measure.spectral import best_update
from graphgrow.measure.sums import Sum, Sums, planned

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
class Mean:
    """A mean over examples, of sums that are put together when it is asked for.

    `shape` is that of the whole; each of `terms` is a sum and the place that it is added to, turned
    over in its last dims where it says so.
    """

    shape: tuple[int, int, int]
    terms: tuple[tuple[Sum, tuple[slice, slice], bool], ...]
    examples: int
    device: torch.device

    def tensor(self) -> Tensor:
        """Return the mean in double precision."""
        total = torch.zeros(self.shape, dtype=torch.double, device=self.device)
        for part, (rows, columns), turned in self.terms:
            place = total[:, rows, columns]
            part.into(place.mT if turned else place)
        return total.div_(self.examples)


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
    means: Mapping[str, Mean]

    @property
    def present(self) -> Tensor:
        """The covariance of present activations `(g, b, b)`."""
        return _asked(self.means, "present", self.path)

    @property
    def desired(self) -> Tensor:
        """The cross moment of present activations and the desired update `(g, b, o)`."""
        return _asked(self.means, "desired", self.path)

    @property
    def gradient(self) -> Tensor:
        """The covariance of the desired update `(g, o, o)`."""
        return _asked(self.means, "gradient", self.path)

    @property
    def overlap(self) -> Tensor | None:
        """The cross moment of what producers and this consumer read, None if not asked for."""
        return self.means["overlap"].tensor() if "overlap" in self.means else None


@dataclass(frozen=True, eq=False)
class Moments:
    """The second moments of one axis, averages over examples of sums over positions.

    A new unit has `parts` channels, each with incoming weights of its own, `in` in all, and
    outgoing ones, `out`: those of all producers and all consumers joined, in the axis' order. For
    each part, `inputs` `(in, in)` is the covariance of what producers read (S), added up over the
    sets of producers that feed one consumer; `cross` `(in, out)` is the cross moment of what
    producers read, where a consumer reads it, with its desired update −∂L/∂output (N), which is
    `projected` on what the consumer's own weights cannot do where that was asked for. Matrices are
    put together each time they are asked for: keep one that is used more than once.

    A new unit with incoming weights α and outgoing ones ω that are small changes the loss by
    −Σ αᵀ N ω to first order in αω, times the slopes of activations and norms at what it holds
    (Verbockhaven et al. 2024 have consumers that read the activation of producers). On the way a
    filter of its own is one at its centre and zero elsewhere, a gate has zero incoming weights and
    is a constant that counts as a slope, and attention has the weights of its head, which new
    features of values do not change; their parts are the heads. Behind max pooling, or where two
    factors start at zero, no such N exists, and `obstacle` says so.
    """

    axis: str
    route: Route
    examples: int
    loss: float
    producers: tuple[Producer, ...]
    consumers: tuple[Consumer, ...]
    means: Mapping[str, Mean]

    @property
    def parts(self) -> int:
        """How many channels a unit has."""
        return self.route.parts

    @property
    def inputs(self) -> Tensor:
        """The covariance of what producers read (S), `(parts, in, in)`."""
        return _asked(self.means, "inputs", self.axis)

    @property
    def cross(self) -> Tensor:
        """The cross moment with the desired update (N), `(parts, in, out)`."""
        return _asked(self.means, "cross", self.axis)

    @property
    def projected(self) -> Tensor | None:
        """The cross moment with what consumers' own weights cannot do, None if not asked for."""
        return self.means["projected"].tensor() if "projected" in self.means else None


def _asked(means: Mapping[str, Mean], name: str, of: str) -> Tensor:
    if name not in means:
        raise ValueError(
            f"cannot give '{name}' of '{of}': only {sorted(means)} were measured; "
            f"ask for it with of=('{name}', …)"
        )
    return means[name].tensor()


ALL = ("inputs", "cross", "present", "desired", "gradient")


def moments(
    graph: Graph,
    batches: Iterable[tuple[Any, Any]],
    loss: Loss,
    axes: Sequence[str] | None = None,
    *,
    mode: str = "eval",
    project: bool = False,
    overlap: bool = False,
    of: Collection[str] = ALL,
) -> dict[str, Moments]:
    """Return the moments of axes by name: those asked for, or all that can be measured.

    Each of `batches` is `(inputs, target)`; several inputs are a tuple, their first dim the
    examples. `loss(output, target)` is a mean over the batch, so that sums do not depend on how
    examples were batched. Sums are in double precision. `of` names the moments that are wanted;
    others cost nothing. With `project`, the batches are gone through twice: the second pass takes
    away what the consumers' own weights can do (TINY's V_goal_proj, Prop. 3.1). With `overlap`, the
    cross moments of what producers and consumers read are taken too, which cost as much as the rest
    or more. Where torch.distributed is initialised, sums are over all ranks. The model, its
    buffers, gradients and modes, and the random number generators stay as they are.

    Raises:
        NotApplicable: where an axis that was asked for cannot be measured.
        ValueError: without any example, or where `of` names something else.
    """
    if unknown := sorted(set(of) - set(ALL)):
        raise ValueError(f"cannot measure {unknown}: moments are {list(ALL)}")
    routes = _routes(graph, axes, mode)
    batches = list(batches) if project and not isinstance(batches, Sequence) else batches
    kinds = {*of, *(("overlap",) if overlap else ()), *(("present", "desired") if project else ())}
    sums = _summed(graph, batches, loss, routes, mode, kinds)
    consumers = _consumers(graph, routes, sums)
    means = {name: _means(graph, found, sums) for name, found in routes.items()}
    if project:
        updates = {path: best_update(c.present, c.desired) for path, c in consumers.items()}
        again = _summed(graph, batches, loss, routes, mode, {"cross"}, updates)
        for name, found in routes.items():
            means[name]["projected"] = _cross(graph, found, again.cross, again.examples)
    return {
        name: Moments(
            name,
            found,
            sums.examples,
            sums.loss / sums.examples,
            _producers(graph, found),
            _of_axis(graph, found, consumers, sums),
            means[name],
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
    kinds: Collection[str],
    updates: Mapping[str, Tensor] | None = None,
) -> Sums:
    """Return the sums of one pass; with `updates`, of what these cannot do."""
    wanted: dict[Product, list[Read]] = {}
    for found in routes.values():
        for read in (read for reads_ in found.reads.values() for read in reads_):
            wanted.setdefault(read.product, []).append(read)
    feeds = {f for reads_ in wanted.values() for r in reads_ for f in r.feeds}
    mixes = {mix for feed in feeds for mix in feed.mixes}
    watched = {*wanted, *(feed.product for feed in feeds), *mixes}
    capture, sums = Capture(graph, mode, watched), planned(wanted, kinds)
    for inputs, target in batches:
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        batch = Batch(graph, sums, wanted, updates, len(given[0]))
        value = capture.run(given, target, loss, wanted, batch.add, batch.examples)
        sums.loss += value * batch.examples
        sums.examples += batch.examples
    for one in sums.all():
        one.close()
    sums = joined(sums, _device(graph))
    if not sums.examples:
        raise ValueError("cannot measure without examples: there is no batch")
    return sums


def _device(graph: Graph) -> torch.device:
    return next(iter(graph.state.values())).device


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
    own = {(Feed(u), Feed(u)): u for u in uses}
    known = {
        "present": (b, b, [s for pair, s in sums.covariance.items() if pair in own]),
        "desired": (b, out, [sums.desired[u] for u in uses if u in sums.desired]),
        "gradient": (out, out, [sums.gradient[u] for u in uses if u in sums.gradient]),
    }
    means = {
        name: Mean((groups, e, f), tuple((s, _ALL, False) for s in found), sums.examples, device)
        for name, (e, f, found) in known.items()
        if found
    }
    return Consumer(path, use.bias, slice(0), 1, means)


_ALL = slice(None), slice(None)


def _of_axis(
    graph: Graph, found: Route, consumers: Mapping[str, Consumer], sums: Sums
) -> tuple[Consumer, ...]:
    """Return an axis' consumers with their places and how often they read a position of a unit."""
    placed = []
    for path, columns in _columns(graph, found).items():
        uses = found.reads[path]
        same, use = max(sum(u.feeds == r.feeds for u in uses) for r in uses), uses[0].product
        often = reads(use.window, kernel_of(graph, use)) if use.window else 1
        means = dict(consumers[path].means)
        if sums.overlap:
            places = max(uses[0].flat, 1) * math.prod(kernel_of(graph, use))
            width = _read_size(graph, use) * places
            terms = _terms(graph, found, path, slice(0, width), sums.overlap)
            means["overlap"] = _mean(graph, found, width, terms, sums.examples)
        placed.append(replace(consumers[path], columns=columns, reads=same * often, means=means))
    return tuple(placed)


Term = tuple[Sum, tuple[slice, slice], bool]


def _means(graph: Graph, found: Route, sums: Sums) -> dict[str, Mean]:
    """Return what was measured of an axis, by name."""
    means = {}
    if sums.cross:
        means["cross"] = _cross(graph, found, sums.cross, sums.examples)
    terms = _among(graph, found, sums)
    if terms:
        width = _producers(graph, found)[-1].rows.stop
        means["inputs"] = _mean(graph, found, width, terms, sums.examples)
    return means


def _mean(graph: Graph, found: Route, columns: int, terms: list[Term], examples: int) -> Mean:
    """Return a mean `(parts, in, columns)` of what an axis' producers read."""
    producers = _producers(graph, found)
    shape = found.parts, producers[-1].rows.stop, columns
    return Mean(shape, tuple(terms), examples, graph.state[producers[0].path].device)


def _among(graph: Graph, found: Route, sums: Sums) -> list[Term]:
    """Return the sums of the covariance of what the producers of an axis read, joined."""
    rows = {p.path: p.rows for p in _producers(graph, found)}
    terms: list[Term] = []
    for feeds in {read.feeds for reads_ in found.reads.values() for read in reads_}:
        for a, b in itertools.product(feeds, repeat=2):
            turned = (a, b) not in sums.covariance
            known = sums.covariance.get((b, a) if turned else (a, b))
            if known is not None:
                place = rows[a.product.weight], rows[b.product.weight]
                terms.append((known, place, turned))
    return terms


def _cross(
    graph: Graph, found: Route, sums: Mapping[tuple[Feed, Product], Sum], examples: int
) -> Mean:
    """Return the cross moment of an axis: `(parts, in, out)`."""
    columns = _columns(graph, found)
    terms = [t for path in found.reads for t in _terms(graph, found, path, columns[path], sums)]
    return _mean(graph, found, max(c.stop for c in columns.values()), terms, examples)


def _terms(
    graph: Graph,
    found: Route,
    path: str,
    columns: slice,
    sums: Mapping[tuple[Feed, Product], Sum],
) -> list[Term]:
    """Return the sums of all ways from producers to the uses of one consumer."""
    rows = {p.path: p.rows for p in _producers(graph, found)}
    return [
        (sums[feed, read.product], (rows[feed.product.weight], columns), False)
        for read in found.reads[path]
        for feed in read.feeds
    ]
