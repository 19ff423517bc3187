"""From a user's model to a Graph: one run recorded in each mode, and the two joined."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from graphgrow.errors import UnsupportedOp
from graphgrow.ir.assemble import is_torch_leaf, tensors
from graphgrow.ir.graph import Graph
from graphgrow.ir.modes import join
from graphgrow.ir.record import Recorder


def trace(
    model: nn.Module,
    *example_inputs: Any,
    leaves: Sequence[type[nn.Module] | str] = (),
    **example_kwargs: Any,
) -> Graph:
    """Return the graph of `model`, recorded on the example inputs in train and in eval mode.

    `leaves` are module classes or dotted paths that become one node each, beside torch's own
    layers. The model is not changed, and the graph's tensors are the model's own.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    leaf_paths = _leaf_paths(modules, tuple(leaves))
    inputs = _inputs(model, example_inputs, example_kwargs)
    state = dict(tensors(model))
    recordings = []
    for training in (True, False):
        recordings.append(_record(model, training, leaf_paths, inputs, state))
    train, eval_ = join(*recordings)
    example = tuple(value for _, value in inputs)
    return Graph(train, eval_, modules, leaf_paths, state, example)


def _leaf_paths(modules: dict[str, nn.Module], asked: tuple[type | str, ...]) -> frozenset[str]:
    classes = tuple(leaf for leaf in asked if isinstance(leaf, type))
    found = {
        id(module)
        for path, module in modules.items()
        if path and (is_torch_leaf(module) or isinstance(module, classes) or path in asked)
    }
    inside = {id(part) for module in modules.values() if id(module) in found for part in module.modules()}
    return frozenset(path for path, module in modules.items() if path and id(module) in inside)


def _inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return name and value of every argument, in the order of forward's signature."""
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UnsupportedOp(f"cannot trace {type(model).__name__!r}: the example inputs do not fit forward{signature}: {error}") from error
    named: list[tuple[str, Any]] = []
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named += [(f"{name}_{i}", part) for i, part in enumerate(value)]
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named += list(value.items())
        else:
            named.append((name, value))
    return named


def _record(
    model: nn.Module,
    training: bool,
    leaves: frozenset[str],
    inputs: list[tuple[str, Any]],
    state: dict[str, Tensor],
) -> fx.Graph:
    memo: dict[int, Any] = {id(p): _alias(p) for p in model.parameters()}
    run = copy.deepcopy(model, memo).train(training)
    kept = [*model.parameters(), *(x for x in memo.get(id(memo), ()) if isinstance(x, Tensor))]
    originals = {id(memo[id(tensor)]): tensor for tensor in kept}
    names: dict[int, str] = {}
    for path, tensor in state.items():
        names.setdefault(id(tensor), path)

    def name_of(tensor: Tensor) -> str:
        original = originals.get(id(tensor), tensor)
        if id(original) not in names:
            name = f"_constant{sum(path.startswith('_constant') for path in state)}"
            state[name] = original
            names[id(original)] = name
        return names[id(original)]

    paths = {id(module): path for path, module in run.named_modules()}
    recorder = Recorder(paths, leaves, name_of)
    values = [tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, v) for _, v in inputs]
    for (name, _), value in zip(inputs, values, strict=True):
        recorder.placeholder(name, value, ())
    with torch.enable_grad(), recorder.recording():
        out = run(*values)
    recorder.output(out)
    return recorder.graph


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    """Return a parameter with the same memory that needs no gradient."""
    if type(parameter) is not nn.Parameter:
        return parameter
    return nn.Parameter(parameter.detach(), requires_grad=False)
