"""When to grow: every so many steps, on a plateau, where too much is out of reach."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, runtime_checkable

from graphgrow.ir.graph import Graph
from graphgrow.moments import Moments
from graphgrow.scores.tiny import bottleneck


@dataclass(frozen=True)
class Clock:
    """How far training is: steps taken, the step of the last growth, the smallest loss since.

    `turn` is the axis that was looked at last, where axes take turns.
    """

    steps: int = 0
    grown: int = 0
    best: float = math.inf
    best_at: int = 0
    turn: str | None = None

    def after(self, value: float | None, least: float) -> Clock:
        """Return the clock one step later, `value` the loss there, better by `least` to count."""
        steps = self.steps + 1
        bound = self.best if math.isinf(self.best) else self.best - least * abs(self.best)
        if value is None or not value < bound:
            return replace(self, steps=steps)
        return replace(self, steps=steps, best=value, best_at=steps)

    def struck(self, turn: str | None) -> Clock:
        """Return the clock after it was time to grow, and whose turn it was, if axes take turns."""
        return replace(self, grown=self.steps, best=math.inf, turn=turn)


class When(Protocol):
    """When to grow."""

    def due(self, clock: Clock) -> bool:
        """Return whether a model is to grow now."""
        ...


@runtime_checkable
class Choosy(When, Protocol):
    """A `When` that also looks at what was measured: all moments, or those that `needs` names."""

    def ripe(self, graph: Graph, measured: Mapping[str, Moments]) -> Mapping[str, Moments]:
        """Return the moments of those axes that are to grow now."""
        ...


@dataclass(frozen=True)
class Every:
    """Grow every so many steps; calls of `Grower.step` are what counts."""

    steps: int = 1

    @staticmethod
    def epochs(count: float, batches: int) -> Every:
        """Return every `count` epochs, of `batches` steps each."""
        return Every(max(1, round(count * batches)))

    def due(self, clock: Clock) -> bool:
        """Return whether the number of steps is a multiple."""
        return clock.steps % self.steps == 0


ALWAYS = Every(1)


@dataclass(frozen=True)
class Plateau:
    """Grow when the loss given to `Grower.step` was not smaller for `patience` steps.

    Smaller means by a share `least` of the smallest one since the last growth.
    """

    patience: int
    least: float = 0.0

    def due(self, clock: Clock) -> bool:
        """Return whether patience is at an end."""
        return clock.steps - max(clock.best_at, clock.grown) >= self.patience


@dataclass(frozen=True)
class Bottleneck:
    """Grow axes whose consumers cannot do so much of what is desired of them.

    Every `steps` steps, axes are measured; those are to grow whose bottleneck is at least `share`
    of the mean squared desired update.

    Source: Verbockhaven et al. 2024, Definition 3.1.
    """

    share: float
    steps: int = 1
    needs: ClassVar[tuple[str, ...]] = ("present", "desired", "gradient")

    def due(self, clock: Clock) -> bool:
        """Return whether it is time to measure."""
        return clock.steps % self.steps == 0

    def ripe(self, graph: Graph, measured: Mapping[str, Moments]) -> Mapping[str, Moments]:
        """Return the moments of axes with at least that share."""
        return {n: m for n, m in measured.items() if bottleneck(m) >= self.share * _desired(m)}


def _desired(moments: Moments) -> float:
    """Return the mean squared norm of what is desired at an axis' consumers."""
    traces = (c.gradient.diagonal(dim1=-2, dim2=-1).sum() for c in moments.consumers)
    return sum(float(trace) for trace in traces)
