"""Adding up, while a backward pass runs, what layers read and what is desired of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphgrow.ir.analyse import Step
from graphgrow.ir.graph import Graph
from graphgrow.ir.outcome import Kind
from graphgrow.measure.correlate import Correlation, read_sums, wanted_sums
from graphgrow.measure.distances import Along, among_patches, lines, outputs, through_units
from graphgrow.measure.image import Image
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
from graphgrow.measure.routes import Feed, Mix, Product, Read, argument
from graphgrow.measure.sums import Sum, Sums


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
class Batch:
    """Adds the products of one batch to the sums that there are, while its backward pass runs.

    `updates` are those of present weights, which are taken away from what is desired.
    """

    graph: Graph
    sums: Sums
    wanted: Mapping[Product, list[Read]]
    updates: Mapping[str, Tensor] | None
    examples: int
    done: set[tuple[Feed, Feed]] = field(default_factory=set)

    def add(
        self,
        product: Product,
        read: Mapping[Product, Tensor],
        attended: Mapping[Mix, list[Tensor]],
        desired: Tensor,
    ) -> None:
        """Add what one use of a consumer has to say; `desired` is its desired update."""
        sums, ways = self.sums, {feed: r for r in self.wanted[product] for feed in r.feeds}
        feeds = [Feed(product), *ways]
        pairs = [(a, b) for a in feeds for b in feeds if (a, b) in sums.covariance]
        pairs = [pair for pair in dict.fromkeys(pairs) if pair not in self.done]
        for piece in self._pieces(product, feeds, read, attended, desired):
            if self.updates is not None:
                piece.take(self.updates[product.weight])
            if product in sums.gradient:
                sums.gradient[product].add_products(piece.wanted.rows())
            if product in sums.desired:
                piece.add_desired(sums.desired[product])
            for pair in pairs:
                piece.add_covariance(*pair, sums.covariance[pair])
            for feed, r in ways.items():
                if (feed, product) in sums.cross:
                    piece.add_cross(feed, r, piece.wanted, sums.cross[feed, product])
                if (feed, product) in sums.overlap:
                    piece.add_cross(feed, r, piece.present(), sums.overlap[feed, product])
        self.done.update(pairs)

    def _pieces(
        self,
        product: Product,
        feeds: list[Feed],
        read: Mapping[Product, Tensor],
        attended: Mapping[Mix, list[Tensor]],
        desired: Tensor,
    ) -> Iterator[Piece]:
        """Yield the batch a few examples at a time, so that what is made of them stays small."""
        uses = list(dict.fromkeys(feed.product for feed in feeds))
        mixes = list(dict.fromkeys(mix for feed in feeds for mix in feed.mixes))
        size = sum(self._size(feed, read[feed.product]) for feed in feeds)
        if any((feed, product) in self.sums.overlap for feed in feeds):
            size *= math.prod(kernel_of(self.graph, product))
        whole = [desired, *(read[u] for u in uses), *(t for mix in mixes for t in attended[mix])]
        for examples, (v, *parts) in chunks(whole, self.examples, size):
            x, weights = dict(zip(uses, parts, strict=False)), iter(parts[len(uses) :])
            mixing = {mix: [next(weights) for _ in attended[mix]] for mix in mixes}
            yield Piece(self.graph, examples, product, x, v, mixing)

    def _size(self, feed: Feed, x: Tensor) -> int:
        """Return about how many numbers are made of what a whole batch reads."""
        use = feed.product
        rows = len(self.graph.state[use.weight]) if use.embeds else 1
        unfolded = math.prod(kernel_of(self.graph, use)) if feed.pools else 1
        return x.numel() * rows * unfolded * math.prod(mix.heads for mix in feed.mixes)


class Piece:
    """A few examples of a batch: what uses of weights read, and what is desired of one of them."""

    def __init__(
        self,
        graph: Graph,
        examples: int,
        product: Product,
        x: Mapping[Product, Tensor],
        desired: Tensor,
        attended: Mapping[Mix, list[Tensor]],
    ) -> None:
        self.graph, self.examples, self.product, self.x = graph, examples, product, x
        self.attended = attended
        self.wanted = self._image(product, desired)
        self.images: dict[Product, Image] = {}

    def _image(self, use: Product, x: Tensor) -> Image:
        """Return what a layer reads or writes; rows of a linear layer have no space."""
        if use.window is None:
            return Image(summable(x).reshape(-1, x.shape[-1]))
        return Image(summable(x).contiguous(), use.window.groups)

    def image(self, use: Product) -> Image:
        """Return what a layer reads as it is."""
        if use not in self.images:
            self.images[use] = self._image(use, self.x[use])
        return self.images[use]

    def patches(self, feed: Feed) -> Tensor:
        """Return what is read at each position with its bias: `(g, e, n, *positions)`."""
        use, bias = feed.product, feed.product.bias is not None
        x = self.x[use]
        if use.window is not None:
            found = patches(summable(x), use.window, kernel_of(self.graph, use), bias)
        else:
            if use.embeds:
                weight = self.graph.state[use.weight]
                x = torch.nn.functional.one_hot(x.flatten(), len(weight)).to(weight.dtype)
            found = rows(summable(x), self.examples, bias)
        for pool in feed.pools:
            found = self._mixed(found, pool) if isinstance(pool, Mix) else pooled(found, pool)
        return found

    def _mixed(self, x: Tensor, mix: Mix) -> Tensor:
        """Return patches `(1, e, n, positions)` after attention: `(heads, e, n, positions)`."""
        weights = [summable(t) for t in self.attended[mix]]
        attends = mix.step.row.kind is Kind.ATTEND
        count = len(weights[0]) if attends else len(weights[0]) // mix.heads
        values = x[0].flatten(1).T.reshape(count, 1, -1, x.shape[1])
        values = values.expand(-1, mix.heads, -1, -1)
        if attends:
            mask = weights[2] if len(weights) > 2 else None
            found = attend(mix.step, weights[0], weights[1], mask, values)
        else:
            found = torch.bmm(weights[0], values.flatten(0, 1)).unflatten(0, (count, -1))
        return found.permute(1, 3, 0, 2).reshape(mix.heads, x.shape[1], self.examples, -1)

    def present(self) -> Image:
        """Return what the consumer reads at each position, in the place of what it desires."""
        found = self.patches(Feed(self.product)).flatten(0, 1).movedim(0, 1)
        if self.product.window is None:
            found = found.movedim(1, -1).flatten(0, -2)
        return self._image(self.product, found)

    def take(self, update: Tensor) -> None:
        """Take what an update `(g, e, out/g)` of the consumer's weights does from the desired."""
        use, x = self.product, self.image(self.product).values
        update = update.to(x)
        e = entries_of(self.graph, use)
        bias = update[:, e].flatten() if use.bias is not None else None
        weight = update[:, :e].mT.flatten(0, 1)
        if use.window is None:
            able = torch.nn.functional.linear(x, weight, bias)
        else:
            w = use.window
            weight = weight.unflatten(1, (-1, *kernel_of(self.graph, use)))
            plain = (False, (0,) * len(w.stride), w.groups)
            able = torch.convolution(x, weight, bias, w.stride, w.padding, w.dilation, *plain)
        self.wanted = self._image(use, self.wanted.values - able)

    # ------------------------------------------------------------ what is added

    def add_desired(self, found: Sum) -> None:
        """Add products of what the consumer reads and of what it wants."""
        use = self.product
        if use.window is not None:
            one = (1,) * len(use.window.stride)
            self._correlated(use, self.wanted, Window(one, (0,) * len(one), one), one, found)
        else:
            self._rows(Feed(use), self.wanted, found)

    def add_covariance(self, a: Feed, b: Feed, found: Sum) -> None:
        """Add products of what two feeds read at the same positions."""
        if _spatial(a) and _spatial(b):
            self._among(a.product, b.product, found)
        elif a == b and _plain(a):
            image = self.image(a.product)
            x = image.rows()
            found.add_products(x)
            if a.product.bias is not None:
                found.add_ones(image.totals(), None, x.shape[2])
        elif a == b:
            found.add_products(self.patches(a).flatten(2))
        else:
            found.add(gram(self.patches(a), self.patches(b)))

    def add_cross(self, feed: Feed, read: Read, v: Image, found: Sum) -> None:
        """Add products of what a feed reads, where the consumer reads it, and what that wants."""
        window, use = read.product.window, feed.product
        kernel = kernel_of(self.graph, read.product)
        if window is None and _plain(feed) and not read.flat:
            self._rows(feed, v, found)
        elif window is None:
            wanted = channels(v.values, 1, self.examples, convolved=False)
            x = self.patches(feed)
            if read.flat:
                x = x.flatten(3)  # (g, e, n, positions)
                found.add(torch.einsum("gent,gon->geto", x, wanted.flatten(2)).flatten(2))
            else:
                found.add(gram(x, wanted))
        elif _spatial(feed) and self._units(use) == self.image(read.product).space:
            self._correlated(use, v, window, kernel, found)
        else:
            own, x = self.x[read.product], self.patches(feed)
            x = x.reshape(*x.shape[:2], own.shape[0], *own.shape[2:])
            wanted = channels(v.values, v.groups, self.examples, convolved=True)
            found.add(mapped(x, wanted, window, kernel))

    def _rows(self, feed: Feed, v: Image, found: Sum) -> None:
        """Add products of the rows that a linear layer reads and others."""
        wanted = v.rows()
        if not _plain(feed):
            found.add(gram(self.patches(feed), channels(v.values, 1, self.examples, False)))
            return
        found.add_products(self.image(feed.product).rows(), wanted)
        if feed.product.bias is not None:
            found.add_ones(v.totals(), None, 0)

    def _among(self, first: Product, second: Product, found: Sum) -> None:
        """Add products of what two convolutions read at the same positions."""
        x, y = self.image(first), self.image(second)
        one, other = kernel_of(self.graph, first), kernel_of(self.graph, second)
        assert first.window is not None and second.window is not None
        spans = zip(lines(first.window, one), lines(second.window, other), strict=True)
        sizes = zip(x.space, y.space, strict=True)
        along = [among_patches(a, b, size) for (a, b), size in zip(spans, sizes, strict=True)]
        same = first == second
        found.correlation = found.correlation or Correlation((one, other), same)
        found.correlation.add(x, y, along)
        out = self._units(first)
        row = read_sums(y, second.window, other, out) if first.bias else None
        column = read_sums(x, first.window, one, out) if second.bias and not same else None
        count = x.examples * math.prod(out) if first.bias and second.bias else 0
        found.add_ones(row, column, count)

    def _correlated(
        self, use: Product, v: Image, window: Window, kernel: tuple[int, ...], found: Sum
    ) -> None:
        """Add products of what a convolution reads and what another wants of its output."""
        assert use.window is not None
        x, first = self.image(use), kernel_of(self.graph, use)
        units = self._units(use)
        sizes = zip(x.space, units, v.space, strict=True)
        spans = zip(lines(use.window, first), lines(window, kernel), sizes, strict=True)
        along: list[Along] = [through_units(a, b, size) for a, b, size in spans]
        found.correlation = found.correlation or Correlation((first, kernel), False)
        found.correlation.add(x, v, along)
        if use.bias is not None:
            found.add_ones(wanted_sums(v, window, kernel, units), None, 0)

    def _units(self, use: Product) -> tuple[int, ...]:
        """Return the sizes of a convolution's output along each spatial dim."""
        assert use.window is not None
        spans = lines(use.window, kernel_of(self.graph, use))
        return tuple(outputs(a, n) for a, n in zip(spans, self.image(use).space, strict=True))


def _plain(feed: Feed) -> bool:
    """Return whether a linear layer reads rows, and positions are not pooled after it."""
    return feed.product.window is None and not feed.product.embeds and not feed.pools


def _spatial(feed: Feed) -> bool:
    """Return whether a convolution reads, and positions are not pooled after it."""
    return feed.product.window is not None and not feed.pools


def attend(
    step: Step, queries: Tensor, keys: Tensor, mask: Tensor | None, values: Tensor
) -> Tensor:
    """Return scaled dot product attention as a step has it, of other values."""
    return torch.nn.functional.scaled_dot_product_attention(
        queries,
        keys,
        values,
        mask,
        is_causal=argument(step, "is_causal", False),
        scale=argument(step, "scale", None),
        enable_gqa=keys.shape[1] != queries.shape[1],
    )
