"""Sums of products over the examples of batches, in the forms that cost least."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphgrow.measure.correlate import Correlation
from graphgrow.measure.routes import Feed, Product, Read

BLOCK = 128  # rows and columns of one symmetric product: what is below the diagonal is left out
RUN = 4096  # products summed in single precision before they are added to the sum


@dataclass(eq=False)
class Sum:
    """One sum of products of x `(g, e, …)` and y `(h, f, …)`, positions joined in the last dim.

    It is dense, or by distances where convolutions read. Either side may have an entry of ones
    after its e or f others: `row` are sums of y, for the ones of x, `column` sums of x, and `count`
    the positions. With `upper`, y is x, there is no column, and only what is above the diagonal of
    the dense sum counts. `recent` are products of the last `run` positions, not yet in it.
    """

    dense: Tensor | None = None
    correlation: Correlation | None = None
    row: Tensor | None = None
    column: Tensor | None = None
    count: float = 0.0
    upper: bool = False
    recent: Tensor | None = None
    run: int = 0

    def add(self, found: Tensor) -> None:
        """Add products that are at hand."""
        self.dense = _plus(self.dense, found)

    def add_ones(self, row: Tensor | None, column: Tensor | None, count: float) -> None:
        """Add sums of one side of products whose other side is one."""
        self.row = self.row if row is None else _plus(self.row, row)
        self.column = self.column if column is None else _plus(self.column, column)
        self.count += count

    def add_products(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add products of `x` `(g, e, n)` and `y` `(h, f, n)`; of `x` with itself without y."""
        recent = self._recent(x, x if y is None else y)
        if y is None:
            self.upper = True
            for i in range(0, x.shape[1], BLOCK):
                _add_product(recent[:, i : i + BLOCK, i:], x[:, i : i + BLOCK], x[:, i:])
        else:
            _add_product(recent, x, y)
        self.run += x.shape[2]
        if self.run >= RUN:
            self.settle()

    def _recent(self, x: Tensor, y: Tensor) -> Tensor:
        """Return where products are added: the dense sum itself where that is as precise."""
        shape = max(len(x), len(y)), x.shape[1], y.shape[1]
        if x.dtype is torch.double:
            self.dense = x.new_zeros(shape) if self.dense is None else self.dense
            return self.dense
        self.recent = x.new_zeros(shape) if self.recent is None else self.recent
        return self.recent

    def settle(self) -> None:
        """Add recent products to the sum."""
        if self.recent is not None and self.run:
            self.add(self.recent)
            self.recent.zero_()
        self.run = 0

    def close(self) -> None:
        """Add recent products for good; where they are all there is, they stay as they are."""
        if self.dense is None:
            self.dense = self.recent
        else:
            self.settle()
        self.recent, self.run = None, 0

    def into(self, out: Tensor) -> None:
        """Add the sum to a tensor `(parts, e, f)`, which may leave out the entries of ones."""
        e, f = out.shape[1:]
        symmetric = self.upper
        if self.dense is not None:
            e, f = min(e, self.dense.shape[1]), min(f, self.dense.shape[2])
            out[:, :e, :f] += self.dense[:, :e, :f]
            if self.upper:
                _mirror(out, self.dense, e)
        if self.correlation is not None:
            e, f = self.correlation.sizes()
            symmetric = self.correlation.symmetric
            self.correlation.into(out[:, :e, :f])
        column = self.row if symmetric else self.column
        if self.row is not None and out.shape[1] > e:
            out[:, e, :f] += self.row
        if column is not None and out.shape[2] > f:
            out[:, :e, f] += column
            out[:, e:, f] += self.count


def _add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add x yᵀ, a plain matrix product where there is one group: that is faster."""
    if len(total) == 1:
        total[0].addmm_(x[0], y[0].mT)
    else:
        shape = len(total), -1, -1
        total.baddbmm_(x.expand(shape), y.mT.expand(shape))


def _plus(known: Tensor | None, found: Tensor) -> Tensor:
    """Return a sum in double precision, in place where there is one."""
    if known is not None:
        return known.add_(found)
    return torch.empty(found.shape, dtype=torch.double, device=found.device).copy_(found)


def _mirror(out: Tensor, upper: Tensor, size: int) -> None:
    """Add what is above the diagonal blocks of a symmetric sum below them, too."""
    for i in range(0, size, BLOCK):
        end = min(i + BLOCK, size)
        out[:, end:size, i:end] += upper[:, i:end, end:size].mT


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

    def all(self) -> Iterator[Sum]:
        """Yield all sums in the order in which they were planned."""
        for kind in (self.covariance, self.cross, self.overlap, self.desired, self.gradient):
            yield from kind.values()


def planned(wanted: Mapping[Product, list[Read]], of: Collection[str]) -> Sums:
    """Return empty sums for the moments named: those of `wanted` consumers and of their feeds."""
    sums = Sums()
    for product, reads in wanted.items():
        own = Feed(product)
        if "present" in of:
            sums.covariance.setdefault((own, own), Sum())
        for kind in ("desired", "gradient"):
            if kind in of:
                getattr(sums, kind)[product] = Sum()
        for feeds in (read.feeds for read in reads):
            for a, b in itertools.product(feeds, repeat=2) if "inputs" in of else ():
                if (b, a) not in sums.covariance:
                    sums.covariance.setdefault((a, b), Sum())
            for kind in ("cross", "overlap"):
                if kind in of:
                    getattr(sums, kind).update({(feed, product): Sum() for feed in feeds})
    return sums
