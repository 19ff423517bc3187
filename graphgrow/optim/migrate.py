"""An optimizer goes on with the grown model: same object, same groups, state entry by entry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphgrow.optim.adarad import AdaRad
from graphgrow.optim.clocks import Entrywise, gathered_up, resume, row_of, spread
from graphgrow.passes.rewrite import Grown, TensorOrigin
from graphgrow.passes.units import gather, is_new


@dataclass(frozen=True, eq=False)
class _Entry:
    """A parameter as it will stand in a group: its name there and its state."""

    name: str
    parameter: Tensor
    state: dict[str, Any] | None


def migrate(optimizer: Optimizer, grown: Grown) -> None:
    """Make `optimizer`, which trains the model of `grown.before`, train that of `grown.graph`.

    It stays the same object with the same groups, so learning rates, schedulers and gradient
    scalers go on. Every entry that was there keeps its state. A new entry starts as in a fresh
    optimizer: state zero and age zero, and Adam, AdamW, NAdam, RAdam and Adamax correct its bias by
    its own age (see `clocks`). SGD, RMSprop, Adagrad and Adadelta have no such correction; SGD with
    dampening damps the first gradient of a new entry, and Adagrad's `lr_decay` follows the age of
    the parameter. AdaRad's groups and its state of whole fan-ins follow the graph. A new parameter
    joins the group of its nearest relative by path; where the relatives are not in the optimizer,
    it is not either. Gradients that wait for a step move along, with zeros for new entries.
    `TensorOrigin.scale` is not applied to state: whether a gradient shrinks (rescaling) or stays
    (splitting) is not known from it.

    An optimizer of another class is taken if its states have the parameter's shape and it counts
    nothing; one that counts needs a row in `graphgrow.optim.clocks.ENTRYWISE`.

    Raises ValueError, with nothing changed, where a state or a parameter has no known place.
    """
    _refuse_whole_model_optimizers(optimizer)
    placed: set[int] = set()
    groups = [
        list(_moved(optimizer, grown, index, placed))
        for index in range(len(optimizer.param_groups))
    ]
    for path, parameter in _inserted(grown, groups):
        index = _home(path, optimizer, grown)
        if index is not None:
            state = _state_of_new(parameter, optimizer, index)
            groups[index].append(_Entry(path, parameter, state))
    gradients = list(_gradients(grown))
    carried = optimizer.carry(grown) if isinstance(optimizer, AdaRad) else None
    # Everything is known to fit: from here on nothing raises.
    _write(optimizer, groups)
    for parameter, gradient in gradients:
        parameter.grad = gradient
    if carried is not None:
        carried()
    resume(optimizer)


def _refuse_whole_model_optimizers(optimizer: Optimizer) -> None:
    kind = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            f"cannot migrate {kind}: its history is of all parameters in one vector; "
            "make a new one for the grown model"
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError(
            f"cannot migrate {kind} with differentiable=True: the history of its steps ends where "
            "parameters are replaced"
        )
    if row_of(optimizer) is None and any("step" in group for group in optimizer.param_groups):
        raise ValueError(_needs_a_row(optimizer, "'step' of its groups"))


def _needs_a_row(optimizer: Optimizer, what: str) -> str:
    return (
        f"cannot migrate {type(optimizer).__name__}: it counts in {what}, and it is not known what "
        "new entries need; add a row to graphgrow.optim.clocks.ENTRYWISE"
    )


def _moved(optimizer: Optimizer, grown: Grown, index: int, placed: set[int]) -> Iterable[_Entry]:
    """Yield what becomes of each parameter of one group, in order, if not yet among `placed`."""
    group = optimizer.param_groups[index]
    paths = _paths(grown.before.state)
    names = group.get("param_names", [None] * len(group["params"]))
    for position, (old, name) in enumerate(zip(group["params"], names, strict=True)):
        if id(old) not in paths:
            raise ValueError(
                f"cannot migrate {type(optimizer).__name__}: parameter {position} of group {index},"
                f" of shape {tuple(old.shape)}, is not in the graph before growth; migrate with the"
                " result of the rewrite of the model that this optimizer trains"
            )
        for path in paths[id(old)]:
            new = grown.graph.state.get(path)
            if isinstance(new, nn.Parameter) and id(new) not in placed:
                placed.add(id(new))
                state = _state(optimizer, group, path, new, grown)
                yield _Entry(path if name is None else name, new, state)


def _paths(state: Mapping[str, Tensor]) -> dict[int, list[str]]:
    """Return the paths of every tensor, by its identity."""
    paths: dict[int, list[str]] = {}
    for path, tensor in state.items():
        paths.setdefault(id(tensor), []).append(path)
    return paths


def _state(
    optimizer: Optimizer, group: Mapping[str, Any], path: str, new: Tensor, grown: Grown
) -> dict[str, Any] | None:
    """Return the state of `new` at `path`, gathered from that of the parameter it came from."""
    old = grown.before.state[path]
    if old not in optimizer.state or new is old:
        return optimizer.state.get(old)
    row = row_of(optimizer)
    origin = _origin(grown, path, old, new)
    carried, clocks = {}, {}
    for name, value in optimizer.state[old].items():
        if not isinstance(value, Tensor) or (value.dim() == 0 and old.dim() > 0):
            if row is not None and name in row.clocks:
                clocks[name] = spread(torch.as_tensor(value), old)
            else:
                carried[name] = _whole(value, name, optimizer, path)
        elif value.shape != old.shape:
            raise ValueError(
                f"cannot migrate {type(optimizer).__name__}: state '{name}' of '{path}' has shape "
                f"{tuple(value.shape)}, neither that of the parameter, {tuple(old.shape)}, nor one "
                "value"
            )
        elif row is not None and name in row.clocks:
            clocks[name] = value
        else:
            carried[name] = _like(new, _gathered(value, origin, _fresh(row, name, group)))
    grown_clocks = {
        name: _gathered(clock, origin, _fresh(row, name, group)) for name, clock in clocks.items()
    }
    return carried | (gathered_up(grown_clocks, group) if clocks else {})


def _whole(value: Any, name: str, optimizer: Optimizer, path: str) -> Any:
    """Return a state that belongs to a whole parameter, where it may stay as it is."""
    if isinstance(value, (list, tuple, dict)):
        raise ValueError(
            f"cannot migrate {type(optimizer).__name__}: state '{name}' of '{path}' is a "
            f"{type(value).__name__}, not a tensor of the parameter's shape"
        )
    if row_of(optimizer) is None and value is not None:
        raise ValueError(_needs_a_row(optimizer, f"state '{name}' of '{path}'"))
    return value.clone() if isinstance(value, Tensor) else value


def _fresh(row: Entrywise | None, name: str, group: Mapping[str, Any]) -> float:
    """Return the state `name` of an entry that was never stepped."""
    return row.fresh[name](group) if row is not None and name in row.fresh else 0.0


def _origin(grown: Grown, path: str, old: Tensor, new: Tensor) -> TensorOrigin:
    """Return where the entries of `new` are in `old`, checked to fit both."""
    tied = (origin for p, origin in grown.origin.items() if grown.graph.state.get(p) is new)
    origin = grown.origin.get(path) or next(tied, TensorOrigin((None,) * old.dim()))
    sizes = [n if i is None else len(i) for n, i in zip(old.shape, origin.dims, strict=False)]
    if len(origin.dims) != old.dim() or sizes != list(new.shape):
        raise ValueError(
            f"cannot migrate '{path}' from shape {tuple(old.shape)} to {tuple(new.shape)}: the "
            "origin does not say where its entries come from"
        )
    return origin


def _gathered(old: Tensor, origin: TensorOrigin, fill: float) -> Tensor:
    """Return the entries of `old` at their new places, `fill` where they are new."""
    moved = gather(old, origin)
    return moved.masked_fill(is_new(origin, moved.shape).to(moved.device), fill) if fill else moved


def _like(parameter: Tensor, values: Tensor) -> Tensor:
    """Return `values` in the memory layout of `parameter`, where optimizers are fastest."""
    return torch.empty_like(parameter, dtype=values.dtype, requires_grad=False).copy_(values)


def _inserted(grown: Grown, groups: list[list[_Entry]]) -> Iterable[tuple[str, nn.Parameter]]:
    """Yield path and tensor of every trainable parameter that the graph before had no path for."""
    seen = {id(entry.parameter) for entries in groups for entry in entries}
    seen.update(id(grown.graph.state.get(path)) for path in grown.before.state)
    for path, tensor in grown.graph.state.items():
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad and id(tensor) not in seen:
            seen.add(id(tensor))
            yield path, tensor


def _home(path: str, optimizer: Optimizer, grown: Grown) -> int | None:
    """Return the group of the nearest relative of a new parameter, None if it has none there.

    The nearest are those with the longest dotted prefix in common; of these, one of the same name
    and number of dims goes first, so that a bias joins the group of the biases.
    """
    new = grown.graph.state[path]
    groups = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    relatives = {p: t for p, t in grown.before.state.items() if isinstance(t, nn.Parameter)}
    nearest = max((_common(path, p) for p in relatives), default=0)
    there = [
        (p, t) for p, t in relatives.items() if _common(path, p) == nearest and id(t) in groups
    ]

    def likeness(relative: tuple[str, Tensor]) -> tuple[bool, bool]:
        same_name = relative[0].rpartition(".")[2] == path.rpartition(".")[2]
        return same_name, relative[1].dim() == new.dim()

    return groups[id(max(there, key=likeness)[1])] if there else None


def _common(a: str, b: str) -> int:
    """Return how many leading parts of two dotted paths are the same."""
    parts = list(zip(a.split("."), b.split("."), strict=False))
    return next((i for i, (x, y) in enumerate(parts) if x != y), len(parts))


def _state_of_new(new: Tensor, optimizer: Optimizer, index: int) -> dict[str, Any] | None:
    """Return the state of a new parameter where the optimizer would not make it at its step."""
    row = row_of(optimizer)
    model = next(iter(optimizer.state), None)
    if row is None or not row.eager or model is None:
        return None
    group = optimizer.param_groups[index]
    return {
        name: torch.full_like(new, row.fresh[name](group), requires_grad=False)
        if name in row.fresh
        else torch.zeros_like(value)
        for name, value in optimizer.state[model].items()
    }


def _gradients(grown: Grown) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield each replaced parameter with the gradient that its entries were waiting with."""
    for path, new in grown.graph.state.items():
        old = grown.before.state.get(path)
        if old is None or old is new or old.grad is None or not isinstance(new, nn.Parameter):
            continue
        origin = _origin(grown, path, old, new)
        yield new, _like(new, gather(old.grad, origin))


def _write(optimizer: Optimizer, groups: list[list[_Entry]]) -> None:
    """Put parameters and states into `optimizer`, in place."""
    states = {e.parameter: e.state for entries in groups for e in entries if e.state is not None}
    others = {key: state for key, state in optimizer.state.items() if not isinstance(key, Tensor)}
    optimizer.state.clear()
    optimizer.state.update(others | states)
    for group, entries in zip(optimizer.param_groups, groups, strict=True):
        group["params"][:] = [entry.parameter for entry in entries]
        if "param_names" in group:
            group["param_names"][:] = [entry.name for entry in entries]
