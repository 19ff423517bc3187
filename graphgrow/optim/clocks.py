"""What an optimizer counts per parameter, counted per entry where entries were born later.

Adam divides its averages by `1 − β**step`, with one `step` for a whole parameter. An entry that was
inserted later, with averages zero, needs its own count. So where ages differ, `state[p]["step"]` is
a tensor of one count for each entry (the youngest inserted last count from 0). torch itself takes
only one count, so two hooks stand around `optimizer.step()`: the first hands torch the count of the
oldest entries, the second steps the younger entries again, from their values before the step, by a
copy of the same optimizer that holds nothing but them. Their updates are therefore those of a fresh
optimizer, whatever its formula. A process that lacks the hooks does not step wrongly: torch refuses
a `step` of several elements ("a Tensor with 12 elements cannot be converted to Scalar").
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Group = Mapping[str, Any]


@dataclass(frozen=True)
class Entrywise:
    """An optimizer whose update of one entry reads that entry and its parameter's clocks only.

    `clocks` names the scalar states that the update reads. `reads` gives what it computes from
    `step` and a group's settings: counts for which this is equal are as good as one. `fresh` gives
    the state at age zero where that is not 0. `eager` says that states are made with the optimizer,
    not at the first step; those of the parameter's shape are then all in `fresh`.
    """

    clocks: tuple[str, ...] = ()
    reads: Callable[[Group, float], tuple[float, ...]] = lambda group, step: (step,)
    fresh: Mapping[str, Callable[[Group], float]] = field(default_factory=dict)
    eager: bool = False


def _corrections(group: Group, step: float) -> tuple[float, ...]:
    """Return the bias corrections of the two averages, as torch computes them."""
    return tuple(1 - float(beta) ** step for beta in group["betas"])


def _nesterov(group: Group, step: float) -> tuple[float, ...]:
    """Return what NAdam computes: its corrections and its two momentum coefficients."""
    decay = group["momentum_decay"]
    return *_corrections(group, step), 0.96 ** (step * decay), 0.96 ** ((step + 1) * decay)


def _rectified(group: Group, step: float) -> tuple[float, ...]:
    """Return what RAdam computes: its corrections and the length of its moving average."""
    first, second = _corrections(group, step)
    tail = 2 * step * (1 - second) / second if second else 0.0
    return first, second, 2 / (1 - float(group["betas"][1])) - 1 - tail


ENTRYWISE: dict[type[Optimizer], Entrywise] = {
    torch.optim.SGD: Entrywise(),
    torch.optim.RMSprop: Entrywise(),
    torch.optim.Adadelta: Entrywise(),
    torch.optim.Adagrad: Entrywise(
        fresh={"sum": lambda group: group["initial_accumulator_value"]}, eager=True
    ),
    torch.optim.Rprop: Entrywise(fresh={"step_size": lambda group: float(group["lr"])}),
    torch.optim.Adam: Entrywise(clocks=("step",), reads=_corrections),
    torch.optim.AdamW: Entrywise(clocks=("step",), reads=_corrections),
    torch.optim.Adamax: Entrywise(clocks=("step",), reads=_corrections),
    torch.optim.RAdam: Entrywise(clocks=("step",), reads=_rectified),
    torch.optim.NAdam: Entrywise(
        clocks=("step", "mu_product"), reads=_nesterov, fresh={"mu_product": lambda group: 1.0}
    ),
}


def row_of(optimizer: Optimizer) -> Entrywise | None:
    """Return the row that describes `optimizer`, also through a subclass that keeps its `step`."""
    kind = type(optimizer)
    for base in kind.__mro__:
        if base in ENTRYWISE and inspect.unwrap(base.step) is inspect.unwrap(kind.step):
            return ENTRYWISE[base]
    return None


def resume(optimizer: Optimizer) -> None:
    """Let `optimizer` step entries of different ages, which `migrate` does of itself.

    To be called once in a fresh process, after `load_state_dict` of a checkpoint that was saved
    after growth, and on a copy or an unpickled optimizer, because torch keeps no hooks in these.
    Calling it again, or on an optimizer that needs none, changes nothing.
    """
    row = row_of(optimizer)
    if row is None or not row.clocks or optimizer in _RESUMED:
        return
    hooks = _Hooks(row)
    optimizer.register_step_pre_hook(hooks.before)
    handle = optimizer.register_step_post_hook(hooks.after)
    # First of all, so that a hook which reads the parameters (an average of weights) sees the end.
    optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)  # type: ignore
    optimizer.register_state_dict_pre_hook(hooks.finish)
    _RESUMED.add(optimizer)


_RESUMED: WeakSet[Optimizer] = WeakSet()


def spread(clock: Tensor, parameter: Tensor) -> Tensor:
    """Return `clock` as one value for each entry of `parameter`."""
    return clock.to(parameter.device).expand(parameter.shape)


def gathered_up(clocks: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
    """Return `clocks` as torch has them, one value each, if all entries are of one age."""
    steps = clocks["step"]
    if steps.numel() and bool((steps != steps.flatten()[0]).any()):
        return {name: clock.contiguous() for name, clock in clocks.items()}
    return {name: _one(clock, group) for name, clock in clocks.items()}


def _one(clock: Tensor, group: Group) -> Tensor:
    """Return the first value of `clock` where torch keeps a clock: on the CPU unless told."""
    value = clock.flatten()[0] if clock.numel() else clock.new_zeros(())
    there = group.get("capturable") or group.get("fused")
    return value.clone() if there else value.cpu().clone()


@dataclass(frozen=True, eq=False)
class _Young:
    """The entries of one age: where they are, and their values and states before the step."""

    mask: Tensor
    values: nn.Parameter
    state: dict[str, Any]


@dataclass(frozen=True, eq=False)
class _Held:
    """One parameter whose entries differ in age: its clocks and its younger entries."""

    parameter: Tensor
    group: Group
    clocks: dict[str, Tensor]
    oldest: Tensor
    young: list[_Young]


class _Hooks:
    """The two hooks around one optimizer's step, and what the first leaves for the second."""

    def __init__(self, row: Entrywise) -> None:
        self.row = row
        self.held: list[_Held] = []

    def before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Hold the younger entries, and give torch the clocks of the oldest."""
        self.finish(optimizer)
        self.held = [
            _hold(optimizer.state[parameter], parameter, group, self.row)
            for group in optimizer.param_groups
            for parameter in group["params"]
            if _ages_differ(optimizer.state.get(parameter))
        ]

    def after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Step the younger entries from where they were."""
        self.finish(optimizer)

    @torch.no_grad()
    def finish(self, optimizer: Optimizer) -> None:
        """Step what is held if torch stepped its parameter, and put the clocks back.

        A step that raised leaves entries held; then this runs before the next step or checkpoint.
        """
        held, self.held = self.held, []
        stepped = [
            entry
            for entry in held
            if entry.parameter.grad is not None
            and bool(optimizer.state[entry.parameter]["step"] != entry.oldest)
        ]
        if stepped:
            _step_young(optimizer, stepped)
        for entry in held:
            if entry in stepped:
                _put_back(optimizer.state[entry.parameter], entry, self.row)
            else:
                optimizer.state[entry.parameter].update(entry.clocks)


def _ages_differ(state: Mapping[str, Any] | None) -> bool:
    return bool(state) and isinstance(state.get("step"), Tensor) and state["step"].dim() > 0


@torch.no_grad()
def _hold(state: dict[str, Any], parameter: Tensor, group: Group, row: Entrywise) -> _Held:
    """Return the younger entries of `parameter`, and leave the oldest one's clocks in `state`."""
    clocks = {name: state[name] for name in row.clocks}
    *ages, oldest = _ages(clocks["step"])
    young = [_take(state, parameter, clocks["step"] == age, group, row) for age in ages]
    here = clocks["step"] == oldest
    state.update({name: _one(clock[here], group) for name, clock in clocks.items()})
    return _Held(parameter, group, clocks, state["step"].clone(), young)


def _ages(steps: Tensor) -> list[Tensor]:
    """Return the counts that occur, youngest first: they are few, so this beats sorting."""
    ages = [steps.min()]
    while (older := steps[steps > ages[-1]]).numel():
        ages.append(older.min())
    return ages


def _take(
    state: Mapping[str, Any], parameter: Tensor, mask: Tensor, group: Group, row: Entrywise
) -> _Young:
    """Return the entries of `parameter` under `mask` with their states, flat."""
    taken = {
        name: value[mask] if isinstance(value, Tensor) and value.shape == mask.shape else value
        for name, value in state.items()
    }
    taken.update({name: _one(taken[name], group) for name in row.clocks})
    return _Young(mask, nn.Parameter(parameter[mask]), taken)


def _step_young(optimizer: Optimizer, stepped: list[_Held]) -> None:
    """Step all younger entries by a copy of `optimizer` that holds nothing else."""
    for held in stepped:
        for young in held.young:
            young.values.grad = held.parameter.grad[young.mask]  # type: ignore[index]
    twin = copy.copy(optimizer)  # as for pickling: settings, but no hooks
    twin.param_groups = [
        {**held.group, "params": [young.values for young in held.young]} for held in stepped
    ]
    twin.state = defaultdict(dict, {y.values: y.state for held in stepped for y in held.young})
    twin.step()


def _put_back(state: dict[str, Any], held: _Held, row: Entrywise) -> None:
    """Write the stepped younger entries into their parameter and its state."""
    settled = row.reads(held.group, float(state["step"]))
    clocks = {n: spread(state[n], held.parameter).clone() for n in row.clocks}
    for young in held.young:
        held.parameter[young.mask] = young.values
        if row.reads(held.group, float(young.state["step"])) != settled:
            for name in row.clocks:
                clocks[name][young.mask] = young.state[name].to(clocks[name].device)
        for name, value in young.state.items():
            if name not in row.clocks and isinstance(value, Tensor) and value.dim() > 0:
                state[name][young.mask] = value
    state.update(gathered_up(clocks, held.group))
