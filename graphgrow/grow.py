"""Growing a model while it trains: measure, propose, choose, apply, carry the optimizer over."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim import Optimizer

from graphgrow.errors import NotApplicable, NotEquivalent
from graphgrow.ir.graph import Graph
from graphgrow.ir.lower import lower
from graphgrow.ir.trace import trace
from graphgrow.measure.cost import flops, latency, parameters
from graphgrow.moments import ALL, Loss, Moments, moments, obstacle
from graphgrow.optim.migrate import migrate
from graphgrow.passes.apply import apply
from graphgrow.passes.journal import rewrite_from_json, rewrites_to_json
from graphgrow.passes.rewrite import Grown, Rewrite
from graphgrow.passes.units import is_new
from graphgrow.passes.weights import Given
from graphgrow.passes.widen import Widen
from graphgrow.scores.amplitude import amplify, mean_loss, settle
from graphgrow.scores.carry import carried
from graphgrow.scores.proposal import Proposal
from graphgrow.scores.senn import Senn
from graphgrow.when import ALWAYS, Choosy, Clock, When
from graphgrow.where import ANYWHERE, UNLIMITED, Budget, HowMany, Where, cost_of

LATER = 100  # steps after a growth at which the loss is recorded again
Batches = Sequence[tuple[Any, Any]]
Event = dict[str, Any]


class Score(Protocol):
    """What proposes new units from moments; `project` says whether these must be projected.

    A score with an attribute `overlap` that is true gets what producers and consumers read, too;
    one with `needs` gets the moments that it names alone (see `moments`).
    """

    @property
    def project(self) -> bool:
        """Whether moments must be projected."""
        ...

    def proposals(self, graph: Graph, moments: Mapping[str, Moments]) -> list[Proposal]:
        """Return the proposals for axes by their moments."""
        ...


@runtime_checkable
class Search(Protocol):
    """What proposes units and layers from the batches themselves."""

    def propose(
        self, graph: Graph, batches: Batches, loss: Loss, axes: Iterable[str] | None = None
    ) -> list[Proposal]:
        """Return the proposals for places, axes only those named."""
        ...


class Grower:
    """Grows a model in the user's own training loop.

    Call `step(batches)` after `optimizer.step()`: where `when` says so, it measures on `batches`,
    asks `score`, takes the best proposals that fit into `budget`, and goes on with the same model
    and the same optimizer object. `model` is that model, written back into the user's own object
    where its `forward` allows that, else a new one. How many units an axis gets is what the score
    says, or `many`. With `amplitude`, proposals with a target (TINY's) are followed as far as a
    line search on the batches says, or, where it is a number, to weights of that mean square (see
    `settle`): the only step that changes the function. `record` has one plain dict for each growth,
    `journal` the rewrites.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        loss: Loss,
        optimizer: Optimizer,
        score: Score | Search,
        when: When = ALWAYS,
        where: Where = ANYWHERE,
        many: HowMany | None = None,
        budget: Budget = UNLIMITED,
        amplitude: bool | float = False,
    ) -> None:
        given = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.score, self.when, self.where, self.budget = score, when, where, budget
        self.many, self.amplitude = many, amplitude
        self.graph = trace(model, *given)
        self.clock = Clock()
        self.record: list[Event] = []
        self._spent = {"units": 0, "parameters": 0, "flops": 0}
        self._past: tuple[Rewrite, ...] = ()

    @property
    def journal(self) -> tuple[Rewrite, ...]:
        """The rewrites since the user's model, as `gg.save` takes them.

        They are without the numbers that scores gave: those are in the model's tensors.
        """
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
        self.graph = self.graph.renewed()
        axes = self._axes()
        ranked = self.where.ranked(self.graph, self._proposals(axes, batches))
        self.clock = self.clock.struck(axes[0] if self.where.turns and axes else None)
        taken, refused = self._take_all(ranked, batches, held)
        if not taken:
            return None
        free = [axis for axis in self.graph.axes.values() if axis.obstacle is None]
        event = {
            "step": self.clock.steps,
            "growths": taken,
            "refused": refused,
            "widths": {axis.name: axis.width for axis in free},
            "parameters": parameters(self.graph),
            "flops": flops(self.graph),
            "loss_before": taken[0]["loss_before"],
            "loss_after": taken[-1]["loss_after"],
            f"loss_{LATER}_later": None,
            "seconds": time.perf_counter() - start,
        }
        self.record.append(event)
        return event

    def _look_back(self, batches: Batches) -> None:
        """Note the loss of growths that were so many steps ago."""
        name = f"loss_{LATER}_later"
        for event in self.record:
            if event[name] is None and self.clock.steps >= event["step"] + LATER:
                event[name] = mean_loss(self.graph, batches[:1], self.loss)

    # --- measure and propose

    def _proposals(self, axes: list[str], batches: Batches) -> list[Proposal]:
        """Return what the score proposes for axes, for as many units as are wanted."""
        score: Any = self.score
        searches = isinstance(score, Search)
        if searches and not isinstance(self.when, Choosy):
            named = axes if self.where.turns else self.where.axes
            return score.propose(self.graph, batches, self.loss, named)
        if not axes:
            return []
        found: Mapping[str, Moments] = moments(
            self.graph,
            batches,
            self.loss,
            axes,
            project=getattr(score, "project", False),
            overlap=getattr(score, "overlap", False),
            of=self._needs(),
        )
        if isinstance(self.when, Choosy):
            found = self.when.ripe(self.graph, found)
        if searches:
            return score.propose(self.graph, batches, self.loss, tuple(found))
        if self.many is None:
            return score.proposals(self.graph, found)
        proposals: list[Proposal] = []
        for name, measured in found.items():
            sized = dataclasses.replace(score, units=self._wanted(name))
            proposals += sized.proposals(self.graph, {name: measured})
        return proposals

    def _needs(self) -> list[str]:
        """Return the moments that the score and the schedule look at."""
        asked: list[Any] = [self.when] if isinstance(self.when, Choosy) else []
        if not isinstance(self.score, Search):
            asked.append(self.score)
        return list(dict.fromkeys(name for one in asked for name in getattr(one, "needs", ALL)))

    def _axes(self) -> list[str]:
        """Return the axes to measure now: those that may grow, or the one whose turn it is."""
        free = [self.graph.axis(name) for name in self.where.axes or self.graph.axes]
        names = [axis.name for axis in free if axis.obstacle is None]
        if self.where.axes is None:
            names = [name for name in names if obstacle(self.graph, name) is None]
        wanted = [name for name in names if self._wanted(name)]
        return self.where.in_turn(names, wanted, self.clock.turn)

    def _wanted(self, name: str) -> int:
        """Return how many units an axis may get now, no more than there is room for."""
        axis = self.graph.axes[name]
        room = self.where.room(axis)
        count = 1 if self.many is None else self.many.units(axis)
        return int(max(0, min(count, room)))

    # --- apply

    def _take_all(
        self, ranked: list[Proposal], batches: Batches, held: Batches | None
    ) -> tuple[list[Event], list[str]]:
        """Apply the best proposals and return what they did, and why others were not taken."""
        done: list[Grown] = []
        taken: list[Event] = []
        refused: list[str] = []
        for proposal in ranked:
            if len(taken) == self.where.places:
                break
            if not self.budget.allows(self._spent, cost_of(proposal)):
                continue
            try:
                for other in done:
                    proposal = carried(proposal, other)
                grown = self._applied(proposal)
            except NotApplicable as error:
                refused.append(str(error))
                continue
            cost = self._cost(proposal, grown)
            if not self.budget.allows(self._spent, cost):  # beside others it costs more
                continue
            taken.append(self._take(proposal, grown, cost, batches, held))
            done.append(grown)
        return taken, refused

    def _applied(self, proposal: Proposal) -> Grown:
        """Return the graph that a proposal makes. Raises NotApplicable where it is too slow."""
        grown = apply(self.graph, proposal.rewrite, verify=False)
        most = self.budget.latency
        if most is not None and (found := latency(grown.graph)) > most:
            raise NotApplicable(
                f"cannot grow '{proposal.place}' by {proposal.units}: the example inputs would "
                f"take {found * 1e3:.3g} ms, and the budget is {most * 1e3:.3g} ms"
            )
        return grown

    def _cost(self, proposal: Proposal, grown: Grown) -> dict[str, int]:
        """Return what a proposal costs as it was applied."""
        more = parameters(grown.graph) - parameters(self.graph)
        work = flops(grown.graph) - flops(self.graph)
        return {"units": proposal.units, "parameters": more, "flops": work}

    def _take(
        self,
        proposal: Proposal,
        grown: Grown,
        cost: Mapping[str, int],
        batches: Batches,
        held: Batches | None,
    ) -> Event:
        """Go on with a grown graph and return what its growth did."""
        before, after = (mean_loss(g, batches[:1], self.loss) for g in (self.graph, grown.graph))
        _check(before, after, proposal, grown)
        migrate(self.optimizer, grown)
        self.graph, self.model = _short(grown.graph), _lowered(grown.graph, self.model)
        self._spent = {name: self._spent[name] + cost[name] for name in cost}
        event = {
            "rewrite": type(proposal.rewrite).__name__,
            "axis": proposal.place,
            **cost,
            "gain": proposal.gain,
            "unit": proposal.unit,
            "gain_measured": None,
            "loss_before": before,
            "loss_after": after,
        }
        if proposal.unit == "learning rate":
            event["gain_measured"] = new_gradient(grown, batches, self.loss)
        elif isinstance(self.score, Senn):
            event["gain_measured"] = self.score.gained(grown, batches, self.loss)
        if self.amplitude is not False and proposal.target is not None:
            given = held or batches
            if self.amplitude is True:
                found = amplify(grown, proposal, given, self.loss)
            else:
                found = settle(grown, proposal, self.amplitude, given, self.loss)
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


def _short(graph: Graph) -> Graph:
    """Return a graph whose journal ends without numbers: a long run's would fill the memory."""
    *before, last = graph.journal
    if isinstance(last, Widen) and isinstance(last.weights, Given):
        last = dataclasses.replace(last, weights=Given(seed=last.weights.seed))
    return dataclasses.replace(graph, journal=(*before, last))


def _lowered(graph: Graph, model: nn.Module) -> nn.Module:
    """Return the model of a grown graph: the user's own object where its forward still fits."""
    try:
        return lower(graph, into=model)
    except NotApplicable:
        return lower(graph).train(model.training)


def _check(before: float, after: float, proposal: Proposal, grown: Grown) -> None:
    """Raise where growth changed the loss by more than rounding may."""
    dtypes = [t.dtype for t in grown.graph.state.values() if t.is_floating_point()]
    eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    bound = max(1e-10, 100 * eps, grown.proof.rounding)
    if not abs(after - before) <= bound * max(abs(before), 1.0):
        what = f"{proposal.units} units in" if proposal.units else "a layer at"
        raise NotEquivalent(
            f"not equivalent after {what} '{proposal.place}': the loss went from {before:.6g} to "
            f"{after:.6g} on the first batch"
        )


def new_gradient(grown: Grown, batches: Batches, loss: Loss) -> float:
    """Return the squared norm of the gradient of all new entries on batches, in eval mode.

    It is what the loss falls by to first order for one unit of learning rate there.
    """
    model = lower(grown.graph).eval()
    tensors = {id(grown.graph.state[path]): path for path in grown.origin}  # tied ones once
    state = {path: grown.graph.state[path] for path in tensors.values()}
    changed = {path: t for path, t in state.items() if t.requires_grad}
    total, count = {path: torch.zeros_like(t) for path, t in changed.items()}, 0
    for inputs, target in batches:
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        value = loss(model(*given), target) * len(given[0])
        slopes = torch.autograd.grad(value, list(changed.values()), allow_unused=True)
        for path, slope in zip(changed, slopes, strict=True):
            if slope is not None:
                total[path] += slope
        count += len(given[0])
    size = 0.0
    for path, slope in total.items():
        new = is_new(grown.origin[path], slope.shape).to(slope.device)
        size += float((slope[new].double() / count).square().sum())
    return size
