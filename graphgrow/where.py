"""Where to grow and by how much: which axes, in what order, how many units, within which budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from graphgrow.ir.analyse import Axis
from graphgrow.ir.graph import Graph
from graphgrow.scores.proposal import Proposal


@dataclass(frozen=True)
class Budget:
    """How much all growth together may add; None is without limit. FLOPs are per example.

    `latency` is the time in seconds that the grown model may take for its example inputs, measured
    before a growth is accepted: runs with it cannot be repeated bit for bit.
    """

    units: int | None = None
    parameters: int | None = None
    flops: int | None = None
    latency: float | None = None

    def allows(self, spent: Mapping[str, int], cost: Mapping[str, int]) -> bool:
        """Return whether a cost fits into what is left of units, parameters and FLOPs."""
        limits = {name: getattr(self, name) for name in cost}
        return all(n is None or spent[name] + cost[name] <= n for name, n in limits.items())


UNLIMITED = Budget()


def cost_of(proposal: Proposal) -> dict[str, int]:
    """Return what a proposal costs by the names of a budget."""
    return {"units": proposal.units, "parameters": proposal.parameters, "flops": proposal.flops}


@dataclass(frozen=True)
class Where:
    """Which proposals to take at one growth, of those that fit into the budget.

    Of `axes` (all that can be measured if left out) the best `places` are taken: those with the
    largest gain per `per` ("parameters", "flops" or "units"), or with None the largest gain.
    A proposal has to gain more than `least` in these terms. `most` limits the width of axes by
    name, as protocols with a final architecture do; layers, where a score proposes them, may go
    anywhere. With `turns`, axes take turns in their order:
    each growth looks at the next one alone that has room.
    """

    axes: tuple[str, ...] | None = None
    places: int = 1
    per: str | None = "parameters"
    least: float = 0.0
    most: tuple[tuple[str, int], ...] = ()
    turns: bool = False

    def room(self, axis: Axis) -> float:
        """Return how many units an axis may get."""
        return dict(self.most).get(axis.name, math.inf) - axis.width

    def in_turn(self, names: list[str], wanted: list[str], last: str | None) -> list[str]:
        """Return the axes to look at: all that are wanted, or the next of them after the last."""
        if not self.turns:
            return wanted
        start = names.index(last) + 1 if last in names else 0
        return [name for name in (*names[start:], *names[:start]) if name in wanted][:1]

    def ranked(self, graph: Graph, proposals: Iterable[Proposal]) -> list[Proposal]:
        """Return the proposals that are worth it, best first."""
        fits = [
            p
            for p in proposals
            if self._worth(p) > self.least
            and (not p.units or p.units <= self.room(graph.axes[p.place]))
        ]
        return sorted(fits, key=self._worth, reverse=True)

    def _worth(self, proposal: Proposal) -> float:
        return proposal.gain / (1 if self.per is None else max(cost_of(proposal)[self.per], 1))


ANYWHERE = Where()


class HowMany(Protocol):
    """How many units an axis gets at one growth."""

    def units(self, axis: Axis) -> int:
        """Return the number for one axis, 0 where it gets none."""
        ...


@dataclass(frozen=True)
class Doubling:
    """As many units as an axis has."""

    def units(self, axis: Axis) -> int:
        """Return the width."""
        return axis.width


@dataclass(frozen=True)
class Quota:
    """A number for each axis by name, and `other` for those that are not named.

    Source: Verbockhaven et al. 2024, table 2; Evci et al. 2022, growth by a share of the width.
    """

    named: tuple[tuple[str, int], ...]
    other: int = 0

    def units(self, axis: Axis) -> int:
        """Return the number of the axis."""
        return dict(self.named).get(axis.name, self.other)
