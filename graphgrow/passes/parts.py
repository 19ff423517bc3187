"""Parts of a packed dim (queries, keys and values) in which the new units of an axis are zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from graphgrow.ir.analyse import Step
from graphgrow.ir.layout import Layout

_SPLITS = ("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk")
_ORDERS = ("flip", "roll")


@dataclass(frozen=True, eq=False)
class Part:
    """One term of a packed dim: the factors beside the axis, and where in them it is zero.

    `zero` has one dim for each of `factors`.
    """

    factors: tuple[object, ...]
    zero: np.ndarray


@dataclass(frozen=True, eq=False)
class Parts:
    """The terms of a value's dim that has the axis (`Layout.apart`), None for those without it."""

    axis: str
    terms: tuple[Part | None, ...]

    @staticmethod
    def of(layout: Layout, axis: str, widths: Mapping[str, int], zero: np.ndarray) -> Parts:
        """Return the parts of a dim; `zero` lists the places of the axis in it, in order."""
        first = layout.units(widths, axis) == 0
        numbers = layout.parts(widths, "")[first]
        terms: list[Part | None] = []
        for number, term in enumerate(layout.apart()):
            factors = tuple(f for f in term if f != axis)
            sizes = [widths[f] if isinstance(f, str) else f for f in factors]
            found = zero[numbers == number]
            terms.append(Part(factors, found.reshape(sizes)) if axis in term else None)
        return Parts(axis, tuple(terms))

    def all_zero(self) -> bool:
        """Return whether the axis is zero wherever it is."""
        return all(part.zero.all() for part in self.terms if part is not None)

    def moved(self, step: Step, dims: Sequence[tuple[Layout, ...]]) -> list[Parts | None]:
        """Return the parts of each output of a step that moves entries, None where unknown.

        `dims` has the layouts of the input and of each output.
        """
        name, (before, *after) = step.func.overloadpacket.__name__, dims
        if name in _SPLITS:
            return self._pieces(before, after)
        if name in ("select", "unbind"):
            given = [a for a in step.args[1:] if isinstance(a, int)]
            at = given[0] % len(before) if given else 0
            indices = given[1:2] if name == "select" else range(len(after))
            return [self._picked(before[at], int(i)) for i in indices]
        if name in _ORDERS:
            return [None for _ in after]
        same = all(_count(d, self.axis) == len([t for t in self.terms if t]) for d in after)
        return [self if same and len(step.inputs) == 1 else None for _ in after]

    def _pieces(
        self, before: tuple[Layout, ...], after: Sequence[tuple[Layout, ...]]
    ) -> list[Parts | None]:
        at = next((d for d, dim in enumerate(before) if self.axis in dim.axes()), None)
        if at is None or any(len(before) != len(dims) for dims in after):
            return [None for _ in after]
        if all(dims[at] == before[at] for dims in after):
            return [self for _ in after]
        counts = [len(dims[at].apart()) for dims in after]
        if sum(counts) != len(self.terms):
            return [None for _ in after]
        ends = np.cumsum(counts)
        return [
            replace(self, terms=self.terms[e - n : e]) for e, n in zip(ends, counts, strict=True)
        ]

    def _picked(self, dim: Layout, index: int) -> Parts | None:
        """Return the parts once one unit of a factor is picked."""
        factor = dim.terms[0][0] if len(dim.terms) == 1 and len(dim.terms[0]) == 1 else None
        if all(part is None or factor not in part.factors for part in self.terms):
            return self if factor is not None else None
        terms: list[Part | None] = []
        for part in self.terms:
            if part is None or factor not in part.factors or part.factors.count(factor) != 1:
                return None
            at = part.factors.index(factor)
            left = part.factors[:at] + part.factors[at + 1 :]
            terms.append(Part(left, part.zero.take(index, axis=at)))
        return replace(self, terms=tuple(terms))


def _count(dims: Sequence[Layout], axis: str) -> int:
    return max((sum(axis in term for term in dim.apart()) for dim in dims), default=0)
