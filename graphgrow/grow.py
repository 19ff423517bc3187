"""Growing a model while it trains: measure, propose, choose, apply, carry the optimizer over."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim import Optimizer

from graphgrow.errors import NotApplicable, NotEquivalent
from graphgrow.ir.graph import Graph
from graphgrow.ir.lower import lower
from graphgrow.ir.trace import trace
from graphgrow.measure.cost import flops, parameters
from graphgrow.moments import Loss, Moments, moments, obstacle
from graphgrow.optim.migrate import migrate
from graphgrow.passes.apply import apply
from graphgrow.passes.journal import rewrite_from_json, rewrites_to_json
from graphgrow.passes.rewrite import Rewrite
from graphgrow.scores.amplitude import amplify, mean_loss
from graphgrow.scores.proposal import Proposal

LATER = 100  # steps after a growth at which the loss is recorded again
Batches = Sequence[tuple[Any, Any]]
Event = dict[str, Any]


class Score(Protocol):
    """What proposes new units from moments; `project` says whether these must be projected."""

    @property
    def project(self) -> bool:
        """Whether moments must be projected."""
        ...

    def proposals(self, graph: Graph, moments: Mapping[str, Moments]) -> list[Proposal]:
        """Return the proposals for axes by their moments."""
        ...


@runtime_checkable
class Search(Protocol):
    """What proposes new units from the examples themselves, where moments do not say enough."""

    def propose(
        self, graph: Graph, batches: Batches, loss: Loss, axes: Sequence[str] | None = None
    ) -> list[Proposal]:
        """Return the proposals for axes, all that can be widened if left out."""
        ...


@dataclass(frozen=True)
class Clock:
    """How far training is: steps taken, the step of the last growth, the smallest loss since."""

    steps: int = 0
    grown: int = 0
    best: float = math.inf
    best_at: int = 0

    def after(self, value: float | None, least: float) -> Clock:
        """Return the clock one step later, `value` the loss there, better by `least` to count."""
        steps = self.steps + 1
        bound = self.best if math.isinf(self.best) else self.best - least * abs(self.best)
        if value is None or not value < bound:
            return replace(self, steps=steps)
        return replace(self, steps=steps, best=value, best_at=steps)


class When(Protocol):
    """When to grow."""

    def due(self, clock: Clock) -> bool:
        """Return whether a model is to grow now."""
        ...


@runtime_checkable
class Choosy(When, Protocol):
    """A `When` that also looks at what was measured."""

    def ripe(self, graph: Graph, measured: Mapping[str, Moments]) -> Mapping[str, Moments]:
        """Return the moments of those axes that are to grow now."""
        ...


@dataclass(frozen=True)
class Every:
    """Grow every so many steps; calls of `Grower.step` are what counts."""

    steps: int = 1

    def due(self, clock: Clock) -> bool:
        """Return whether the number of steps is a multiple."""
        return clock.steps % self.steps == 0


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
class Budget:
    """How much all growth together may add; None is without limit. FLOPs are per example."""

    units: int | None = None
    parameters: int | None = None
    flops: int | None = None

    def allows(self, spent: Mapping[str, int], proposal: Proposal) -> bool:
        """Return whether a proposal fits into what is left."""
        cost = _cost(proposal)
        limits = {name: getattr(self, name) for name in cost}
        return all(n is None or spent[name] + cost[name] <= n for name, n in limits.items())


@dataclass(frozen=True)
class Where:
    """Which proposals to take at one growth, of those that fit into the budget.

    Of `axes` (all that can be measured if left out) the best `places` are taken: those with the
    largest gain per `per` ("parameters", "flops" or "units"), or with None the largest gain.
    A proposal has to gain more than `least` in these terms. `most` limits the width of axes by
    name, as protocols with a final architecture do.
    """

    axes: tuple[str, ...] | None = None
    places: int = 1
    per: str | None = "parameters"
    least: float = 0.0
    most: tuple[tuple[str, int], ...] = ()

    def ranked(self, graph: Graph, proposals: Iterable[Proposal]) -> list[Proposal]:
        """Return the proposals that are worth it, best first."""
        most = dict(self.most)
        fits = [
            p
            for p in proposals
            if self._worth(p) > self.least
            and graph.axes[p.rewrite.axis].width + p.rewrite.units
            <= most.get(p.rewrite.axis, math.inf)
        ]
        return sorted(fits, key=self._worth, reverse=True)

    def _worth(self, proposal: Proposal) -> float:
        return proposal.gain / (1 if self.per is None else max(_cost(proposal)[self.per], 1))


def _cost(proposal: Proposal) -> dict[str, int]:
    units = proposal.rewrite.units
    return {"units": units, "parameters": proposal.parameters, "flops": proposal.flops}


class Grower:
    """Grows a model in the user's own training loop.

    Call `step(batches)` after `optimizer.step()`: where `when` says so, it measures on `batches`,
    asks `score`, takes the best proposals that fit into `budget`, and goes on with the same model
    and the same optimizer object. `model` is that model, written back into the user's own object
    where its `forward` allows that, else a new one. With `amplitude`, proposals with a target
    (TINY's) are followed as far as a line search on the batches says: the only step that changes
    the function. `record` has one plain dict for each growth, `journal` the rewrites.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        loss: Loss,
        optimizer: Optimizer,
        score: Score | Search,
        when: When = Every(1),
        where: Where = Where(),
        budget: Budget = Budget(),
        amplitude: bool = False,
    ) -> None:
        given = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.score, self.when, self.where, self.budget = score, when, where, budget
        self.amplitude = amplitude
        self.graph = trace(model, *given)
        self.clock = Clock()
        self.record: list[Event] = []
        self._spent = {"units": 0, "parameters": 0, "flops": 0}
        self._past: tuple[Rewrite, ...] = ()

    @property
    def journal(self) -> tuple[Rewrite, ...]:
        """The rewrites since the user's model, as `gg.save` takes them."""
        return (*self._past, *self.graph.journal)

    def step(
        self, batches: Batches, value: float | None = None, held: Batches | None = None
    ) -> Event | None:
        """Return what was grown at this step of training, None where nothing was.

        `batches` are `(inputs, target)` to measure on, `value` the loss that `Plateau` watches,
        `held` batches for the line search of the amplitude, else `batches`. The loss on the first
        batch is the same before and after the rewrites.

        Raises:
            NotEquivalent: where that is not so; then nothing has changed.
        """
        self.clock = self.clock.after(value, getattr(self.when, "least", 0.0))
        self._look_back(batches)
        if not self.when.due(self.clock):
            return None
        start = time.perf_counter()
        ranked = self.where.ranked(self.graph, self._proposals(batches))
        taken: list[Event] = []
        for proposal in ranked:
            fits = len(taken) < self.where.places and self.budget.allows(self._spent, proposal)
            growth = self._take(proposal, batches, held) if fits else None
            taken += [growth] if growth is not None else []
        self.clock = replace(self.clock, grown=self.clock.steps, best=math.inf)
        if not taken:
            return None
        axes = self.graph.axes.values()
        event = {
            "step": self.clock.steps,
            "growths": taken,
            "widths": {axis.name: axis.width for axis in axes if axis.obstacle is None},
            "parameters": parameters(self.graph),
            "flops": flops(self.graph),
            "loss_before": taken[0]["loss_before"],
            "loss_after": taken[-1]["loss_after"],
            f"loss_{LATER}_later": None,
            "seconds": time.perf_counter() - start,
        }
        self.record.append(event)
        return event

    def _proposals(self, batches: Batches) -> list[Proposal]:
        """Return what the score proposes, for the axes that are to grow now."""
        score = self.score
        if isinstance(score, Search) and not isinstance(self.when, Choosy):
            return score.propose(self.graph, batches, self.loss, self.where.axes)
        project = not isinstance(score, Search) and score.project
        found: Mapping[str, Moments] = moments(
            self.graph, batches, self.loss, self._axes(), project=project
        )
        if isinstance(self.when, Choosy):
            found = self.when.ripe(self.graph, found)
        if isinstance(score, Search):
            return score.propose(self.graph, batches, self.loss, tuple(found))
        return score.proposals(self.graph, found)

    def _axes(self) -> list[str]:
        names = self.where.axes or tuple(self.graph.axes)
        free = [self.graph.axis(name) for name in names]
        wanted = [axis.name for axis in free if axis.obstacle is None]
        if self.where.axes is not None:
            return wanted
        return [name for name in wanted if obstacle(self.graph, name) is None]

    def _look_back(self, batches: Batches) -> None:
        """Note the loss of growths that were so many steps ago."""
        name = f"loss_{LATER}_later"
        for event in self.record:
            if event[name] is None and self.clock.steps >= event["step"] + LATER:
                event[name] = mean_loss(self.graph, batches[:1], self.loss)

    def _take(self, proposal: Proposal, batches: Batches, held: Batches | None) -> Event | None:
        """Apply one proposal and return what it did, None where it does not fit any more."""
        try:
            grown = apply(self.graph, proposal.rewrite, verify=False)
        except NotApplicable:  # another growth of this step changed the shape of its weights
            return None
        before, after = (mean_loss(g, batches[:1], self.loss) for g in (self.graph, grown.graph))
        _check(before, after, proposal, self.graph)
        migrate(self.optimizer, grown)
        self.graph, self.model = grown.graph, _lowered(grown.graph, self.model)
        for name, cost in _cost(proposal).items():
            self._spent[name] += cost
        event = {
            "axis": proposal.rewrite.axis,
            **_cost(proposal),
            "gain": proposal.gain,
            "unit": proposal.unit,
            "loss_before": before,
            "loss_after": after,
        }
        if self.amplitude and proposal.target is not None:
            found = amplify(grown, proposal, held or batches, self.loss)
            event |= {"amplitude": found.amplitude, "gain_measured": found.before - found.after}
        return event

    # --- going on later

    def lines(self) -> str:
        """Return the record as JSON, one line for each growth."""
        return "\n".join(json.dumps(event) for event in self.record)

    def state(self) -> dict[str, Any]:
        """Return where growth stands, as plain data for a checkpoint beside model and optimizer."""
        journal = rewrites_to_json(self.journal)
        clock, record = asdict(self.clock), copy.deepcopy(self.record)
        return {"clock": clock, "record": record, "spent": {**self._spent}, "journal": journal}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned; model and optimizer are those of the checkpoint."""
        self.clock, self.record = Clock(**state["clock"]), copy.deepcopy(state["record"])
        self._spent = dict(state["spent"])
        self._past = tuple(rewrite_from_json(rewrite) for rewrite in state["journal"])


def _lowered(graph: Graph, model: nn.Module) -> nn.Module:
    """Return the model of a grown graph: the user's own object where its forward still fits."""
    try:
        return lower(graph, into=model)
    except NotApplicable:
        return lower(graph).train(model.training)


def _check(before: float, after: float, proposal: Proposal, graph: Graph) -> None:
    """Raise where growth changed the loss by more than rounding may."""
    dtypes = [t.dtype for t in graph.state.values() if t.is_floating_point()]
    eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    if not abs(after - before) <= max(1e-10, 100 * eps) * max(abs(before), 1.0):
        axis, units = proposal.rewrite.axis, proposal.rewrite.units
        raise NotEquivalent(
            f"not equivalent after {units} units in '{axis}': the loss went from {before:.6g} to "
            f"{after:.6g} on the first batch"
        )
