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
    """Return what NAdam computes: its corrections and its two momentum coefficients over β₁."""
    decay = group["momentum_decay"]
    momenta = (1 - 0.5 * 0.96 ** (k * decay) for k in (step, step + 1))
    return *_corrections(group, step), *momenta


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


def _memory_order(parameter: Tensor) -> tuple[int, ...]:
    """Return the dims of `parameter`, outermost in memory first, so that flat indices are cheap."""
    return tuple(sorted(range(parameter.dim()), key=lambda dim: -parameter.stride(dim)))


def _read(tensor: Tensor, order: tuple[int, ...], index: Tensor) -> Tensor:
    """Return the entries of `tensor` at flat `index`, counted in `order`."""
    return tensor.detach().permute(order).reshape(-1).index_select(0, index)


def _write(tensor: Tensor, order: tuple[int, ...], index: Tensor, values: Tensor) -> None:
    """Write `values` to the entries of `tensor` at flat `index`, counted in `order`."""
    view = tensor.detach().permute(order)
    flat = view.reshape(-1)
    flat.index_copy_(0, index, values)
    if not view.is_contiguous():  # then `flat` is a copy
        view.copy_(flat.view(view.shape))


@dataclass(frozen=True, eq=False)
class _Cohort:
    """The entries of one age: where they are, and their clocks, one value each as in torch."""

    index: Tensor
    clocks: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class _Ages:
    """The ages in one parameter: clocks of one value for each entry, and who is younger.

    What `entries` says is said again by `oldest` and `young`, which are there for speed.
    """

    entries: dict[str, Tensor]
    order: tuple[int, ...]
    oldest: dict[str, Tensor]
    young: tuple[_Cohort, ...]


@dataclass(frozen=True, eq=False)
class _Held:
    """One parameter between the hooks: its younger entries and their states before the step."""

    parameter: Tensor
    group: Group
    ages: _Ages
    values: list[nn.Parameter]
    states: list[dict[str, Any]]


class _Hooks:
    """The two hooks around one optimizer's step, and what the first leaves for the second."""

    def __init__(self, row: Entrywise) -> None:
        self.row = row
        self.held: list[_Held] = []
        self.ages: dict[int, _Ages] = {}

    @torch.no_grad()
    def before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Hold the younger entries, and give torch the clocks of the oldest."""
        self.finish(optimizer)
        known, self.ages = self.ages, {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter)
                if (
                    not state
                    or not isinstance(state.get("step"), Tensor)
                    or not state["step"].dim()
                ):
                    continue
                ages = known.get(id(parameter))
                if ages is None or ages.entries["step"] is not state["step"]:
                    ages = _ages(state, parameter, group, self.row)
                self.ages[id(parameter)] = ages
                self.held.append(_hold(state, parameter, group, ages))

    def after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Step the younger entries from where they were."""
        self.finish(optimizer)

    @torch.no_grad()
    def finish(self, optimizer: Optimizer) -> None:
        """Step what is held if torch stepped its parameter, and put the clocks back.

        A step that raised leaves entries held; then this runs before the next step or checkpoint.
        """
        held, self.held = self.held, []
        stepped = [entry for entry in held if _was_stepped(entry, optimizer)]
        if stepped:
            _step_young(optimizer, stepped)
        for entry in held:
            state = optimizer.state[entry.parameter]
            if entry in stepped:
                self.ages[id(entry.parameter)] = _put_back(state, entry, self.row)
            else:
                state.update(entry.ages.entries)


def _ages(state: Mapping[str, Any], parameter: Tensor, group: Group, row: Entrywise) -> _Ages:
    """Return who is how old in `parameter`."""
    entries = {
        name: torch.empty_like(parameter, dtype=state[name].dtype).copy_(state[name])
        for name in row.clocks
    }
    order = _memory_order(parameter)
    steps = entries["step"].permute(order).reshape(-1)
    counts = [steps.min()]
    while (older := steps[steps > counts[-1]]).numel():  # few ages, so this beats sorting
        counts.append(older.min())
    *young, oldest = [
        _Cohort(index, {name: _one(_read(entries[name], order, index), group) for name in entries})
        for index in ((steps == count).nonzero().flatten() for count in counts)
    ]
    return _Ages(entries, order, oldest.clocks, tuple(young))


def _hold(state: dict[str, Any], parameter: Tensor, group: Group, ages: _Ages) -> _Held:
    """Return the younger entries of `parameter`, and leave the clocks of the oldest in `state`."""
    shaped = [
        name
        for name, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape and name not in ages.oldest
    ]
    rest = {name: value for name, value in state.items() if name not in shaped}
    values, states = [], []
    for cohort in ages.young:
        values.append(nn.Parameter(_read(parameter, ages.order, cohort.index)))
        taken = {name: _read(state[name], ages.order, cohort.index) for name in shaped}
        clocks = {name: clock.clone() for name, clock in cohort.clocks.items()}
        states.append(rest | taken | clocks)
    state.update({name: clock.clone() for name, clock in ages.oldest.items()})
    return _Held(parameter, group, ages, values, states)


def _was_stepped(held: _Held, optimizer: Optimizer) -> bool:
    count = optimizer.state[held.parameter]["step"]
    return held.parameter.grad is not None and bool(count != held.ages.oldest["step"])


def _step_young(optimizer: Optimizer, stepped: list[_Held]) -> None:
    """Step all younger entries by a copy of `optimizer` that holds nothing else."""
    states: defaultdict[Any, Any] = defaultdict(dict)
    for held in stepped:
        for cohort, values, state in zip(held.ages.young, held.values, held.states, strict=True):
            gradient = held.parameter.grad
            assert gradient is not None
            values.grad = _read(gradient, held.ages.order, cohort.index)
            states[values] = state
    twin = copy.copy(optimizer)  # as for pickling: settings, but no hooks
    twin.param_groups = [{**held.group, "params": held.values} for held in stepped]
    twin.state = states
    twin.step()


def _put_back(state: dict[str, Any], held: _Held, row: Entrywise) -> _Ages:
    """Write the stepped younger entries into their parameter and its state; return the ages now."""
    ages, young = held.ages, []
    oldest = {name: state[name] for name in row.clocks}
    precision = torch.finfo(held.parameter.dtype).eps / 4
    for name, entries in ages.entries.items():
        entries.fill_(oldest[name].item())
    for cohort, values, stepped in zip(ages.young, held.values, held.states, strict=True):
        _write(held.parameter, ages.order, cohort.index, values)
        for name, value in stepped.items():
            if name not in row.clocks and isinstance(value, Tensor) and value.dim():
                _write(state[name], ages.order, cohort.index, value)
        clocks = {name: stepped[name] for name in row.clocks}
        if _agree(row, held.group, clocks["step"], oldest["step"], precision):
            continue
        young.append(_Cohort(cohort.index, clocks))
        for name, entries in ages.entries.items():
            same = clocks[name].to(entries.device).expand(cohort.index.shape)
            _write(entries, ages.order, cohort.index, same)
    state.update(ages.entries if young else oldest)
    return _Ages(ages.entries, ages.order, oldest, tuple(young))


def _agree(row: Entrywise, group: Group, a: Tensor, b: Tensor, precision: float) -> bool:
    """Return whether an update reads the same from the counts `a` and `b`, but for rounding."""
    pairs = zip(row.reads(group, float(a)), row.reads(group, float(b)), strict=True)
    return all(abs(x - y) <= precision * abs(y) for x, y in pairs)
