"""Sums of products over the examples of batches: of what is read, and of what is desired there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphgrow.ir.graph import Graph
from graphgrow.measure.correlate import (
    Along,
    Correlation,
    among_patches,
    lines,
    read_sums,
    through_units,
    wanted_sums,
)
from graphgrow.measure.patches import (
    Window,
    channels,
    chunks,
    gram,
    mapped,
    patches,
    pooled,
    rows,
    summable,
)
from graphgrow.measure.routes import Feed, Product, Read

BLOCK = 256  # rows and columns of one product: its result stays in the cache while it is added


def kernel_of(graph: Graph, use: Product) -> tuple[int, ...]:
    """Return the kernel of a convolution, empty for other layers."""
    return tuple(graph.state[use.weight].shape[2:]) if use.window else ()


def entries_of(graph: Graph, use: Product) -> int:
    """Return how many numbers of a weight one output channel has."""
    return graph.state[use.weight].numel() // outputs_of(graph, use)


def outputs_of(graph: Graph, use: Product) -> int:
    """Return how many output channels a weight has."""
    return graph.state[use.weight].shape[use.out]


@dataclass
class Sum:
    """One sum of products `(parts, e, f)`: dense, or by segments where two convolutions read.

    `edge` is what the entry of ones adds, which stands last after `entries` others: sums of what is
    read, with the `count` of positions, or of what is desired. With `upper`, only what is above the
    diagonal of the dense sum counts.
    """

    dense: Tensor | None = None
    correlation: Correlation | None = None
    edge: Tensor | None = None
    count: float = 0.0
    entries: int = 0
    upper: bool = False

    def add(self, found: Tensor) -> None:
        """Add products that are at hand."""
        self.dense = found.double() if self.dense is None else self.dense.add_(found)

    def add_gram(self, x: Tensor) -> None:
        """Add products of `x` `(g, e, n, ...)` with itself, blocks above the diagonal alone."""
        x = x.flatten(2)
        if self.dense is None:
            self.dense = x.new_zeros(*x.shape[:2], x.shape[1], dtype=torch.double)
        blocks = [slice(start, start + BLOCK) for start in range(0, x.shape[1], BLOCK)]
        for i, j in itertools.combinations_with_replacement(blocks, 2):
            self.dense[:, i, j] += x[:, i] @ x[:, j].mT
        self.upper = True

    def into(self, out: Tensor) -> None:
        """Add the sum to a tensor `(parts, e, f)`, which may leave out the entries of ones."""
        if self.dense is not None:
            dense = _mirrored(self.dense) if self.upper else self.dense
            out += dense[:, : out.shape[1], : out.shape[2]]
        if self.correlation is None or self.edge is None:
            return
        first, second = self.correlation.kernels
        e, symmetric, edge = self.entries, self.correlation.symmetric, self.edge.flatten(1)
        inner = out[:, :e, :e] if symmetric else out[:, :e]
        self.correlation.into(inner.unflatten(2, (-1, *second)).unflatten(1, (-1, *first)))
        if out.shape[1] > e:
            out[:, e, : e if symmetric else None] += edge
            if symmetric:
                out[:, :e, e] += edge
                out[:, e, e] += self.count


def _mirrored(upper: Tensor) -> Tensor:
    """Return a symmetric matrix, in place, from what is above its diagonal."""
    for i in range(0, upper.shape[1], BLOCK):
        end = min(i + BLOCK, upper.shape[1])
        upper[:, end:, i:end] = upper[:, i:end, end:].mT
    return upper


@dataclass
class Sums:
    """All sums of a pass: covariances of pairs of feeds, cross moments, and those of consumers.

    `overlap` has products of what feeds and consumers read, as `cross` of what consumers want.
    """

    covariance: dict[tuple[Feed, Feed], Sum] = field(default_factory=dict)
    cross: dict[tuple[Feed, Product], Sum] = field(default_factory=dict)
    overlap: dict[tuple[Feed, Product], Sum] = field(default_factory=dict)
    desired: dict[Product, Sum] = field(default_factory=dict)
    gradient: dict[Product, Sum] = field(default_factory=dict)
    loss: float = 0.0
    examples: int = 0


@dataclass
class Batch:
    """Adds the products of one batch to the sums while its backward pass runs.

    `updates` are those of present weights, which are taken away from what is desired; then cross
    moments alone are summed. With `overlap`, what consumers read takes the place of what they want
    in a second set of cross moments.
    """

    graph: Graph
    sums: Sums
    wanted: Mapping[Product, list[Read]]
    updates: Mapping[str, Tensor] | None
    examples: int
    overlap: bool = False
    done: set[tuple[Feed, Feed]] = field(default_factory=set)

    def add(self, product: Product, read: Mapping[Product, Tensor], gradient: Tensor) -> None:
        """Add what one use of a consumer has to say; `gradient` is that of the mean loss."""
        feeds = list(dict.fromkeys(f.product for r in self.wanted[product] for f in r.feeds))
        uses = list(dict.fromkeys([product, *feeds]))
        tensors = [gradient, *(read[use] for use in uses)]
        size = sum(self._size(use, read[use]) for use in uses)
        size *= math.prod(kernel_of(self.graph, product)) if self.overlap else 1
        ways = {feed: r for r in self.wanted[product] for feed in r.feeds}
        pairs = {(a, b) for r in self.wanted[product] for a in r.feeds for b in r.feeds}
        pairs = {*pairs, (Feed(product), Feed(product))} - self.done
        for examples, (v, *x) in chunks(tensors, self.examples, size):
            piece = Piece(self.graph, examples, dict(zip(uses, x, strict=True)))
            v = piece.wanted(product, v * -self.examples)
            if self.updates is not None:
                v = v - piece.able(product, self.updates[product.weight].to(v))
            else:
                piece.add_desired(product, v, self.sums)
                for a, b in sorted(pairs, key=lambda pair: uses.index(pair[0].product)):
                    piece.add_covariance(a, b, self.sums.covariance.setdefault((a, b), Sum()))
            for feed, r in ways.items():
                piece.add_cross(feed, r, v, self.sums.cross.setdefault((feed, product), Sum()))
                if self.overlap:
                    found = self.sums.overlap.setdefault((feed, product), Sum())
                    piece.add_cross(feed, r, piece.patches(Feed(product)), found)
        self.done |= pairs

    def _size(self, use: Product, x: Tensor) -> int:
        """Return about how many numbers are made of what a whole batch reads."""
        return x.numel() * (len(self.graph.state[use.weight]) if use.embeds else 1)


@dataclass
class Piece:
    """A few examples of a batch: what uses of weights read."""

    graph: Graph
    examples: int
    x: Mapping[Product, Tensor]

    def patches(self, feed: Feed) -> Tensor:
        """Return what is read at each position with its bias: `(g, e, n, *positions)`."""
        use, bias = feed.product, feed.product.bias is not None
        x = self.x[use]
        if use.window is not None:
            found = patches(summable(x), use.window, kernel_of(self.graph, use), bias)
            return pooled(found, feed.pools)
        if use.embeds:
            weight = self.graph.state[use.weight]
            x = torch.nn.functional.one_hot(x.flatten(), len(weight)).to(weight.dtype)
        return pooled(rows(summable(x), self.examples, bias), feed.pools)

    def space(self, use: Product) -> Tensor:
        """Return what a convolution reads as it is: `(g, in/g, n, *space)`."""
        assert use.window is not None
        x = summable(self.x[use]).movedim(1, 0).contiguous()
        return x.unflatten(0, (use.window.groups, -1))

    def wanted(self, product: Product, v: Tensor) -> Tensor:
        """Return a desired update by group and channel: `(g, out/g, n, *positions)`."""
        groups = product.window.groups if product.window else 1
        return channels(summable(v), groups, self.examples, product.window is not None).contiguous()

    def able(self, product: Product, update: Tensor) -> Tensor:
        """Return what an update `(g, e, out/g)` of a consumer's weights changes, as `wanted`."""
        x = summable(self.x[product])
        e = entries_of(self.graph, product)
        if product.window is None:
            found = rows(x, self.examples, product.bias is not None)
            return (update.mT @ found.flatten(2)).unflatten(2, found.shape[2:])
        w = product.window
        weight = update[:, :e].mT.flatten(0, 1).unflatten(1, (-1, *kernel_of(self.graph, product)))
        bias = update[:, e].flatten() if product.bias is not None else None
        plain = (False, (0,) * len(w.stride), w.groups)
        found = torch.convolution(x, weight, bias, w.stride, w.padding, w.dilation, *plain)
        return self.wanted(product, found)

    def add_desired(self, product: Product, v: Tensor, sums: Sums) -> None:
        """Add products of what a consumer reads and wants, and of what it wants with itself."""
        sums.gradient.setdefault(product, Sum()).add_gram(v)
        found = sums.desired.setdefault(product, Sum())
        if product.window is None:
            found.add(gram(self.patches(Feed(product)), v))
            return
        one = (1,) * len(product.window.stride)
        still = Window(one, (0,) * len(one), one)
        self._correlated(product, v, still, one, found)

    def add_covariance(self, a: Feed, b: Feed, found: Sum) -> None:
        """Add products of what two feeds read at the same positions."""
        use = a.product
        if a != b or use.window is None or a.pools:
            if a == b:
                found.add_gram(self.patches(a))
            else:
                found.add(gram(self.patches(a), self.patches(b)))
            return
        x, kernel = self.space(use), kernel_of(self.graph, use)
        along = [
            among_patches(*d, n)
            for d, n in zip(lines(use.window, kernel), x.shape[3:], strict=True)
        ]
        found.correlation = found.correlation or Correlation((kernel, kernel), True)
        found.entries = entries_of(self.graph, use)
        found.correlation.add(x, x, along)
        out = _out(x, use.window, kernel)
        edge = read_sums(x, use.window, kernel, out)
        found.edge = edge if found.edge is None else found.edge + edge
        found.count += x.shape[2] * math.prod(out)

    def add_cross(self, feed: Feed, read: Read, v: Tensor, found: Sum) -> None:
        """Add products of what a feed reads, where a consumer reads it, and what that wants."""
        window, own = read.product.window, self.x[read.product]
        kernel = kernel_of(self.graph, read.product)
        if window is None:
            x = self.patches(feed)
            if read.flat:
                x = x.flatten(3)  # (g, e, n, positions)
                found.add(torch.einsum("gent,gon->geto", x, v.flatten(2)).flatten(2))
            else:
                found.add(gram(x, v))
            return
        use = feed.product
        if use.window is not None and not feed.pools and self._units(use) == own.shape[2:]:
            self._correlated(use, v, window, kernel, found)
            return
        x = self.patches(feed)
        x = x.reshape(*x.shape[:2], own.shape[0], *own.shape[2:])
        found.add(mapped(x, v, window, kernel))

    def _units(self, use: Product) -> tuple[int, ...]:
        assert use.window is not None
        return _out(self.space(use), use.window, kernel_of(self.graph, use))

    def _correlated(
        self, use: Product, v: Tensor, window: Window, kernel: tuple[int, ...], found: Sum
    ) -> None:
        """Add products of what a convolution reads and what another wants of its output."""
        assert use.window is not None
        x, first = self.space(use), kernel_of(self.graph, use)
        units = _out(x, use.window, first)
        sizes = zip(x.shape[3:], units, v.shape[3:], strict=True)
        spans = zip(lines(use.window, first), lines(window, kernel), sizes, strict=True)
        along: list[Along] = [through_units(a, b, size) for a, b, size in spans]
        found.correlation = found.correlation or Correlation((first, kernel), False)
        found.entries = entries_of(self.graph, use)
        found.correlation.add(x, v, along)
        edge = wanted_sums(v, window, kernel, units)
        found.edge = edge if found.edge is None else found.edge + edge


def _out(x: Tensor, window: Window, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sizes of a convolution's output along each spatial dim."""
    spans = zip(lines(window, kernel), x.shape[3:], strict=True)
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for (k, s, p, d), n in spans)
