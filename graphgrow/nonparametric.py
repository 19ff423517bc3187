"""Nonparametric networks: units come and go all the time while a model is trained.

Nothing here runs a training loop. `turn_over` takes units that have become zero out of a graph and
puts new ones in, `Protocol` says from the validation errors when to stop adding, to rewind and to
take smaller steps, and a `Snapshot` is what is rewound to.

Source: Philipp and Carbonell (2017), Nonparametric Neural Networks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from graphgrow.errors import NotApplicable
from graphgrow.ir.analyse import Slot
from graphgrow.ir.graph import Graph
from graphgrow.nn import CapNorm
from graphgrow.optim.clocks import resume
from graphgrow.passes.apply import apply
from graphgrow.passes.follow import Follower
from graphgrow.passes.fresh import UnitLength
from graphgrow.passes.remove import Remove
from graphgrow.passes.rewrite import Grown
from graphgrow.passes.units import Resized
from graphgrow.passes.widen import Widen


@dataclass(frozen=True, eq=False)
class Turnover:
    """What `turn_over` did: `grown` is what `apply` returned for all axes together.

    `removed` has the old numbers of the units that were taken out, by axis, `added` the number of
    new ones, which stand behind the others. `settled` are the running means that were first set to
    what a zero unit has; the removal is exact beside the graph with those. `skipped` says why an
    axis stayed as it is.
    """

    grown: Grown
    removed: Mapping[str, tuple[int, ...]]
    added: Mapping[str, int]
    settled: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)


def turn_over(
    graph: Graph,
    *,
    add: float = 0.0,
    generator: torch.Generator | None = None,
    axes: Sequence[str] | None = None,
    skip: bool = False,
    length: float = 1.0,
    verify: bool = False,
) -> Turnover | None:
    """Return the graph without its zero units and with `add` new ones on each axis, None as it was.

    A unit is zero if all weights that write it are. Two units of an axis stay even so, which the
    paper does not ask for: at one unit, what is broadcast over the axis (the statistics of a
    CapNorm) can no longer be told from what is not, and the axis could not grow again. What a unit
    adds as a constant, σ(0) or that of a bias, goes to the biases of its readers. New units have
    random incoming weights of expected length `length`, and nothing reads them yet; where `add` is
    no whole number, that many are added on average (Poisson). `axes` are those that may change;
    left out, all that can be widened. With `skip`, an axis that refuses stays as it is and the
    sentence is in `skipped`. However many units go, each axis is rewritten once for them.

    A norm's running mean still remembers a unit that has just become zero, so that in eval mode it
    is not zero yet; the mean is set to what arrives there first, which train mode does not see.

    Raises:
        NotApplicable: where an axis of `axes` cannot be widened, or its zero units cannot be
            removed exactly; the sentence is that of the rewrite.
        ValueError: where `add` is negative.

    Source: Philipp and Carbonell (2017), algorithm 1, lines 18 to 25.
    """
    if not add >= 0:
        raise ValueError(f"cannot add {add} units: the number is negative; give 0 or more")
    names, skipped = _named(graph, axes, skip)
    removed = {name: zero_units(graph, name) for name in names}
    added = {name: _drawn(add, generator) for name in names}
    widen = {
        name: Widen(name, count, weights=UnitLength(length, _seed(generator)))
        for name, count in added.items()
        if count
    }
    remove = {name: Remove(name, units) for name, units in removed.items() if units}
    now, settled = _settled(graph, remove)
    if skip:
        remove, widen = _possible(now, remove, skipped), _possible(now, widen, skipped)
    rewrites = (*remove.values(), *widen.values())
    if not rewrites:
        return None
    return Turnover(
        apply(now, *rewrites, verify=verify),
        {name: rewrite.units for name, rewrite in remove.items()},
        {name: rewrite.units for name, rewrite in widen.items()},
        settled,
        skipped,
    )


def zero_units(graph: Graph, axis: str) -> tuple[int, ...]:
    """Return the units of an axis that are written by zero weights alone, so that two are left.

    The biases of the layers that write them may be anything. Of more than may go, the last ones.
    """
    found = graph.axis(axis)
    whole = Resized(graph.analysis, found.name, np.arange(found.width))
    written = torch.zeros(found.width, dtype=torch.bool)
    for at in found.producers:
        written |= whole.slices(graph.state[at.path], at.path, at.dim).any(1).cpu()
    zero = tuple((~written).nonzero().flatten().tolist()) if found.producers else ()
    return zero[max(0, len(zero) + 2 - found.width) :]


def _named(
    graph: Graph, axes: Sequence[str] | None, skip: bool
) -> tuple[list[str], dict[str, str]]:
    """Return the axes that may change, and why others that were asked for may not."""
    if axes is None:
        free = [a.name for a in graph.axes.values() if a.obstacle is None and a.producers]
        return free, {}
    asked = [graph.axis(name) for name in axes]
    refused = {axis.name: axis.obstacle for axis in asked if axis.obstacle is not None}
    if refused and not skip:
        raise NotApplicable(next(iter(refused.values())))
    return [axis.name for axis in asked if axis.name not in refused], refused


def _drawn(rate: float, generator: torch.Generator | None) -> int:
    whole = float(rate).is_integer()
    return int(rate) if whole else int(torch.poisson(torch.tensor(rate), generator=generator))


def _seed(generator: torch.Generator | None) -> int:
    return int(torch.randint(2**31, (), generator=generator))


def _possible(graph: Graph, rewrites: Mapping[str, Any], skipped: dict[str, str]) -> dict[str, Any]:
    """Return the rewrites that apply, and note why the others do not."""
    said = {name: rewrite.obstacle(graph) for name, rewrite in rewrites.items()}
    skipped.update({name: reason for name, reason in said.items() if reason is not None})
    return {name: rewrite for name, rewrite in rewrites.items() if said[name] is None}


# ------------------------------------------------------------------- what norms remember of units


def _settled(graph: Graph, removals: Mapping[str, Remove]) -> tuple[Graph, tuple[str, ...]]:
    """Return the graph whose norms have true running means of the units to remove, and which."""
    state = dict(graph.state)
    for name, rewrite in removals.items():
        for path, number in _norms(graph, name):
            found = _true_mean(graph, name, rewrite.units, state, path, number)
            if not torch.equal(found, state[path]):
                state.update({p: found for p, t in graph.state.items() if t is graph.state[path]})
    changed = tuple(path for path, t in state.items() if t is not graph.state[path])
    if not changed:
        return graph, ()
    now = replace(graph, state=state)
    now.__dict__["analysis"] = graph.analysis
    return now, changed


def _norms(graph: Graph, axis: str) -> list[tuple[str, int]]:
    """Return the running means of an axis in order, each with the number of the value it is of."""
    found = []
    for node in graph.eval.nodes:
        module = graph.modules.get(str(node.target)) if node.op == "call_module" else None
        path = f"{node.target}.running_mean"
        if isinstance(module, _BatchNorm | CapNorm) and path in graph.state:
            value = graph.analysis.nodes.get(("eval", node.all_input_nodes[0].name))
            layout = graph.analysis.state[path][0]
            if isinstance(value, Slot) and axis in layout.axes():
                found.append((path, value.number))
    return found


def _true_mean(
    graph: Graph,
    axis: str,
    units: tuple[int, ...],
    state: Mapping[str, Tensor],
    path: str,
    number: int,
) -> Tensor:
    """Return a running mean, set to what arrives of the units where that is a constant."""
    position = np.arange(graph.axes[axis].width)
    position[list(units)] = -1  # read as the units that a widening would have added
    change = Resized(graph.analysis, axis, position)
    content = Follower(change, state).run().content(number)
    mean = state[path].clone()
    for unit, constant, value in zip(change.new, content.constant(), content.scale, strict=True):
        if constant:
            mean[torch.from_numpy(change.at(path, 0)[unit]).to(mean.device)] = float(value)
    return mean


# --------------------------------------------------------------------------------------- protocol


@dataclass(frozen=True)
class Progress:
    """How far a training run is: a value that `Protocol.after` returns, of plain numbers.

    `phase` is "grow" (units come and go), "settle" (they only go), "free" (no penalty), "anneal"
    (smaller steps) or "done". `evaluations` counts all, those that were rewound too, `began` those
    before this phase (or this step size). `best` is the lowest error so far in this phase, `mark`
    the evaluation to which to rewind and `marked` its error. After an evaluation, `keep` says that
    this is what to rewind to from now on, `rewind` to go back to what was kept.
    """

    phase: str = "grow"
    evaluations: int = 0
    began: int = 0
    best: float = math.inf
    mark: int = 0
    marked: float = math.inf
    divisions: int = 0
    moved: bool = False
    keep: bool = False
    rewind: bool = False

    @property
    def adding(self) -> bool:
        """Whether units are added."""
        return self.phase == "grow"

    @property
    def penalised(self) -> bool:
        """Whether weights shrink."""
        return self.phase in ("grow", "settle")


@dataclass(frozen=True)
class Protocol:
    """When to stop adding units, rewind, drop the penalty and divide the angular step size.

    Grow until the validation error has not improved for `patience` evaluations, rewind those; go on
    without adding until no unit was removed and the error has not improved for `patience`, rewind,
    drop the penalty; go on until it has not improved for `patience`, rewind, divide the step size
    by `divisor`; from then on divide whenever it has not improved for `fine_patience`, and be done
    when the error never moved in that time. Where a run must not take long, each of these ends
    after `longest` evaluations in any case. A run is resumed from its last `Progress` and what it
    kept.

    Source: Philipp and Carbonell (2017), section 7.4.1 (an evaluation is an epoch there; for poker,
    section 7.4.2, a tenth of the patience). "Too small to change the error" is read as: not once
    another error than the one rewound to.
    """

    patience: int = 100
    fine_patience: int = 5
    divisor: float = 3.0
    longest: int | None = None

    def after(self, progress: Progress, error: float, *, removed: int = 0) -> Progress:
        """Return the progress after an evaluation, `removed` units having gone since the last."""
        if progress.phase == "done":
            raise ValueError("cannot go on after phase 'done': start with Progress()")
        better = error < progress.best
        now = replace(
            progress,
            evaluations=progress.evaluations + 1,
            best=min(error, progress.best),
            moved=progress.moved or error != progress.marked,
            keep=better or (progress.phase == "settle" and removed > 0),
            rewind=False,
        )
        if now.keep:
            now = replace(now, mark=now.evaluations, marked=error)
        patient = self.fine_patience if now.divisions else self.patience
        over = self.longest is not None and now.evaluations - now.began >= self.longest
        return self._next(now) if over or now.evaluations - now.mark >= patient else now

    def _next(self, now: Progress) -> Progress:
        following = {"grow": "settle", "settle": "free", "free": "anneal", "anneal": "anneal"}
        phase, divisions = following[now.phase], now.divisions
        if phase == "anneal":
            phase = "anneal" if now.moved or not divisions else "done"
            divisions += phase == "anneal"
        return replace(
            now,
            phase=phase,
            divisions=divisions,
            best=now.marked,
            mark=now.evaluations,
            began=now.evaluations,
            moved=False,
            rewind=True,
        )

    def settings(self, progress: Progress, lr: float, penalty: float) -> dict[str, float]:
        """Return `lr` and `penalty` as they are to be set in the groups of an optimizer."""
        return {
            "lr": lr / self.divisor**progress.divisions,
            "penalty": penalty if progress.penalised else 0.0,
        }


# --------------------------------------------------------------------------------------- rewinding


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A graph and its optimizer as they were, which further training leaves alone."""

    graph: Graph
    optimizer: Optimizer

    @staticmethod
    def of(graph: Graph, optimizer: Optimizer) -> Snapshot:
        """Return a copy of all tensors and of the optimizer's state and settings."""
        memo: dict[int, Any] = {}
        state = {path: copy.deepcopy(tensor, memo) for path, tensor in graph.state.items()}
        kept = replace(graph, state=state)
        kept.__dict__["analysis"] = graph.analysis
        copied = copy.deepcopy(optimizer, memo)
        resume(copied)
        return Snapshot(kept, copied)

    def restored(self) -> tuple[Graph, Optimizer]:
        """Return graph and optimizer to go on with; the snapshot stays as it is.

        They are new objects: lower the graph again, and make schedulers anew.
        """
        again = Snapshot.of(self.graph, self.optimizer)
        return again.graph, again.optimizer
