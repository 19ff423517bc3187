"""Writing a graph into the user's own model: its tensors, and the attributes that state sizes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphgrow.errors import NotApplicable, UnsupportedOp
from graphgrow.ir.assemble import place, redirect, tensors
from graphgrow.ir.graph import Graph
from graphgrow.ir.trace import trace

Attributes = dict[str, dict[str, Any]]  # new values by name, by the path of the module


def write_back(graph: Graph, model: nn.Module) -> nn.Module:
    """Return `model` with the tensors and attributes of `graph`.

    Raises:
        NotApplicable: before any change, where they do not fit or its forward would compute
            something else.
    """
    misfit = next(_misfits(graph, model), None)
    stated = None if misfit else _stated(graph, model)
    if stated is None:
        name = type(model).__name__
        fact = misfit or next(_edited(graph, model))
        raise NotApplicable(f"cannot lower into '{name}': {fact}; lower without into")
    _tell(model, graph, stated)
    own = dict(model.named_modules(remove_duplicate=False))
    fresh = {
        id(old): graph.state[path] for path, old in tensors(model) if old is not graph.state[path]
    }
    for path, _ in [*tensors(model)]:
        owner, _, name = path.rpartition(".")
        place(own[owner], name, graph.state[path])
    for module in own.values() if fresh else ():
        redirect(module, fresh)
    return model


def _tell(model: nn.Module, graph: Graph, stated: Attributes) -> None:
    """Give the modules of `model` the attributes that the graph's have, and those stated."""
    for path, module in model.named_modules(remove_duplicate=False):
        vars(module).update(_changed(module, graph.modules[path]))
        vars(module).update(stated.get(path, {}))


# --------------------------------------------------------------------------- attributes of forwards


@dataclass(frozen=True)
class _Gap:
    """Where two recordings differ: the code of which module, and by which number if by no more."""

    module: str
    numbers: tuple[float, float] | None = None


def _stated(graph: Graph, model: nn.Module) -> Attributes | None:
    """Return the attributes with which the model's own code computes the graph, None if none do.

    A recording of the model as it is shows which numbers in its calls have to change. Attributes of
    the modules there that state these numbers get the new ones, and a recording of a copy with the
    graph's tensors has to be the graph.
    """
    if next(_edited(graph, model), None) is None:
        return {}
    found = _gaps_of(model, graph)
    if found is None or any(gap.numbers is None for gap in found):
        return None
    own = dict(model.named_modules(remove_duplicate=False))
    holders = {gap: _holding(own[gap.module], *gap.numbers) for gap in found if gap.numbers}
    if not all(holders.values()):
        return None
    for attributes in _choices(holders):
        trial = copy.deepcopy(model, {id(t): graph.state[path] for path, t in tensors(model)})
        _tell(trial, graph, attributes)
        if _gaps_of(trial, graph) == []:
            return attributes
    return None


def _choices(holders: Mapping[_Gap, dict[str, Any]]) -> Iterator[Attributes]:
    """Yield attributes that may be meant: all, then one alone wherever several state a number."""
    unclear = {name: None for named in holders.values() if len(named) > 1 for name in named}
    for chosen in (None, *unclear):
        every: Attributes = {}
        for gap, named in holders.items():
            meant = {chosen: named[chosen]} if chosen in named and len(named) > 1 else named
            every.setdefault(gap.module, {}).update(meant)
        yield every


def _holding(module: nn.Module, old: float, new: float) -> dict[str, Any]:
    """Return the attributes of a module that are the old number or a tuple with it, made new."""

    def replaced(value: Any) -> Any:
        if type(value) is tuple:
            return tuple(map(replaced, value))
        return new if type(value) is type(old) and value == old else value

    changed = {name: replaced(value) for name, value in vars(module).items()}
    return {name: value for name, value in changed.items() if value is not vars(module)[name]}


def _gaps_of(model: nn.Module, graph: Graph) -> list[_Gap] | None:
    """Return where a recording of `model` differs from the graph, None where it has no likeness."""
    named = (node for node in graph.train.nodes if node.op == "placeholder")
    example = {str(node.target): v for node, v in zip(named, graph.example, strict=True)}
    try:
        recorded = trace(model, leaves=[*graph.leaves], **example)
        if (recorded.train is recorded.eval) != (graph.train is graph.eval):
            return None
        return [*_gaps(recorded.train, graph.train), *_gaps(recorded.eval, graph.eval)]
    except (UnsupportedOp, _Unlike):
        return None


class _Unlike(Exception):
    """Two structures are not node by node the same."""


def _gaps(one: fx.Graph, other: fx.Graph) -> Iterator[_Gap]:
    """Yield where arguments of two structures differ. Raises _Unlike where calls do."""
    if len(one.nodes) != len(other.nodes):
        raise _Unlike
    twins: dict[fx.Node, fx.Node] = {}
    for a, b in zip(one.nodes, other.nodes, strict=True):
        if (a.op, a.target) != (b.op, b.target):
            raise _Unlike
        twins[a] = b
        for numbers in _unequal((a.args, a.kwargs), (b.args, b.kwargs), twins):
            yield _Gap(a.meta["module"], numbers)


def _unequal(one: Any, other: Any, twins: Mapping[fx.Node, fx.Node]) -> Iterator[Any]:
    """Yield pairs of numbers that differ, None for other differences of two arguments."""
    if isinstance(one, fx.Node):
        if twins[one] is not other:
            yield None
    elif isinstance(one, tuple | list) and isinstance(other, tuple | list):
        if len(one) != len(other):
            yield None
        for a, b in zip(one, other, strict=False):
            yield from _unequal(a, b, twins)
    elif isinstance(one, dict) and isinstance(other, dict):
        yield from _unequal(sorted(one.items()), sorted(other.items()), twins)
    elif isinstance(one, slice) and isinstance(other, slice):
        bounds = [(piece.start, piece.stop, piece.step) for piece in (one, other)]
        yield from _unequal(bounds[0], bounds[1], twins)
    elif type(one) is not type(other) or one != other:
        yield (one, other) if {type(one), type(other)} <= {int, float} else None


# --------------------------------------------------------------------------- what does not fit


def _misfits(graph: Graph, model: nn.Module) -> Iterator[str]:
    """Yield a sentence for everything that keeps `graph` from being written into `model`."""
    own = dict(model.named_modules(remove_duplicate=False))
    held = dict(tensors(model))
    yield from _differences("module", graph.modules, own)
    yield from _differences("tensor", _registered(graph), held)
    for path in own:
        theirs, ours = type(own[path]).__name__, type(graph.modules[path]).__name__
        if type(own[path]) is not type(graph.modules[path]):
            yield f"its module '{path}' is a {theirs}, the graph's a {ours}"
    for path, tensor in held.items():
        if isinstance(tensor, nn.Parameter) != isinstance(graph.state[path], nn.Parameter):
            yield f"its tensor '{path}' is a parameter on one side and a buffer on the other"
    if len({(id(own[p]), id(graph.modules[p])) for p in own}) > len({id(m) for m in own.values()}):
        yield "it shares a module between paths where the graph has two"


def _edited(graph: Graph, model: nn.Module) -> Iterator[str]:
    """Yield a sentence for every call that a rewrite changed: a number, or sizes that it ties.

    The graph has the parts of a call whose own code ties the sizes of its tensors.
    """
    held = dict(tensors(model))
    for node in (*graph.train.nodes, *graph.eval.nodes):
        if "edited" in node.meta:
            yield f"its forward would need another literal at '{node.name}' ({node.meta['edited']})"
        for read in node.all_input_nodes if "part_of" in node.meta else ():
            old, new = (state.get(str(read.target)) for state in (held, graph.state))
            if old is not None and new is not None and old.shape != new.shape:
                yield (
                    f"its forward calls '{node.meta['part_of']}' with '{read.target}' of "
                    f"{tuple(old.shape)}, which becomes {tuple(new.shape)}"
                )


def _registered(graph: Graph) -> dict[str, Tensor]:
    """Return the tensors of `graph` without the constants that tracing found in the code."""
    return {
        path: tensor
        for path, tensor in graph.state.items()
        if isinstance(tensor, nn.Parameter) or _has_name(graph.modules, path)
    }


def _has_name(modules: Mapping[str, nn.Module], path: str) -> bool:
    owner, _, name = path.rpartition(".")
    return name in modules[owner]._parameters or name in modules[owner]._buffers


def _differences(kind: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"it has no {kind} '{path}'" for path in ours if path not in theirs)
    yield from (f"the graph has no {kind} '{path}'" for path in theirs if path not in ours)


def _changed(module: nn.Module, template: nn.Module) -> dict[str, Any]:
    """Return what says that `template` is another layer than `module`: numbers, names, tuples."""
    own, missing = vars(module), object()
    return {
        name: value
        for name, value in vars(template).items()
        if name != "training"
        and _is_plain(value)
        and (name not in own or _is_plain(own[name]))
        and own.get(name, missing) != value
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype))
