"""From a user's model to a Graph: one run recorded in each mode, and the two joined."""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from graphgrow.errors import UnsupportedOp
from graphgrow.ir.admit import admit, duplicate
from graphgrow.ir.assemble import is_torch_leaf, tensors
from graphgrow.ir.graph import Graph
from graphgrow.ir.intercept import HiddenCalls, place_of, place_of_error, user_frame
from graphgrow.ir.modes import join
from graphgrow.ir.names import Names
from graphgrow.ir.record import Recorder, depends
from graphgrow.ir.sizes import took_bare
from graphgrow.ir.tape import Tape, has_tensors


def trace(
    model: nn.Module,
    *example_inputs: Any,
    leaves: Sequence[type[nn.Module] | str] = (),
    **example_kwargs: Any,
) -> Graph:
    """Return the graph of `model`, recorded on the example inputs in train and in eval mode.

    `leaves` are module classes or dotted paths that become one node each, beside torch's own
    layers. The model is not changed, and the graph's tensors are the model's own.

    Raises: UnsupportedOp if the model does what no graph can hold, a branch on a tensor's value
    above all, or if the example inputs do not fit it.
    """
    model = admit(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    leaf_paths = _leaf_paths(modules, leaves)
    inputs = _bound(model, example_inputs, example_kwargs)
    names = Names(dict(tensors(model)))
    with _surroundings_kept(names.state):
        train, eval_ = (_record(model, mode, leaf_paths, inputs, names) for mode in (True, False))
    state = names.state_of(train, eval_)
    example = tuple(value for _, value in _arguments(inputs))
    return Graph(*join(train, eval_), modules, leaf_paths, state, example)


def _leaf_paths(
    modules: dict[str, nn.Module], asked: Sequence[type[nn.Module] | str]
) -> frozenset[str]:
    """Return the paths of the modules to record as one node; the root never is."""
    unknown = [leaf for leaf in asked if isinstance(leaf, str) and leaf not in modules]
    if unknown:
        raise UnsupportedOp(f"cannot trace with leaf {unknown[0]!r}: the model has no such module")
    classes = tuple(leaf for leaf in asked if isinstance(leaf, type))
    chosen = {id(modules[leaf]) for leaf in asked if isinstance(leaf, str)}
    return frozenset(
        path
        for path, module in modules.items()
        if path and (is_torch_leaf(module) or isinstance(module, classes) or id(module) in chosen)
    )


# Arguments


def _bound(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> inspect.BoundArguments:
    """Return the example inputs by the names of forward's parameters."""
    signature = inspect.signature(model.forward)
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UnsupportedOp(
            f"cannot trace {type(model).__name__!r}: the example inputs do not fit "
            f"forward{signature}: {error}"
        ) from error


def _arguments(inputs: inspect.BoundArguments) -> list[tuple[str, Any]]:
    """Return name and value of every argument, in the order of forward's signature."""
    named: list[tuple[str, Any]] = []
    for name, value in inputs.arguments.items():
        kind = inputs.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named += [(f"{name}_{i}", part) for i, part in enumerate(value)]
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named += value.items()
        else:
            named.append((name, value))
    return named


def _copies(inputs: inspect.BoundArguments) -> tuple[inspect.BoundArguments, dict[int, str]]:
    """Return a copy of the inputs, and the name of the argument of each tensor in it, by id.

    One tensor passed twice becomes two, so that the recording can tell them apart.
    """
    owners: dict[int, str] = {}

    def copied(name: str, value: Any) -> Any:
        made, originals = duplicate(value)
        owners.update(dict.fromkeys(originals, name))
        return made

    made = inspect.BoundArguments(inputs.signature, type(inputs.arguments)())
    for name, value in inputs.arguments.items():
        kind = inputs.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            made.arguments[name] = tuple(copied(name, part) for part in value)
        elif kind is inspect.Parameter.VAR_KEYWORD:
            made.arguments[name] = {key: copied(key, part) for key, part in value.items()}
        else:
            made.arguments[name] = copied(name, value)
    return made, owners


def _defaults(named: Sequence[tuple[str, Any]]) -> list[tuple[Any, ...]]:
    """Return for each argument its value as a default, or nothing before the last with tensors."""
    defaults: list[tuple[Any, ...]] = []
    for _, value in reversed(named):
        baked = not has_tensors(value) and len(defaults) == sum(map(len, defaults))
        defaults.append((value,) if baked and _is_literal(value) else ())
    return defaults[::-1]


def _is_literal(value: Any) -> bool:
    """Return whether Python code for `value` is its repr."""
    return all(
        type(leaf) in (bool, int, float, complex, str, type(None)) for leaf in tree_leaves(value)
    )


# Runs


def _record(
    model: nn.Module,
    training: bool,
    leaves: frozenset[str],
    inputs: inspect.BoundArguments,
    names: Names,
) -> fx.Graph:
    """Return the graph of one run in the given mode."""
    asking: list[dict[str, Any]] = []
    run = functools.partial(_run, model, training, leaves, inputs, names, asking)
    graph, has_strangers, hides = _once_all_ask(run, asking)
    if has_strangers:  # constants, unless made by operators that no recorded call ran
        run(watched=True)
    if hides and _told(run(seeming=-HIDDEN)[0]) != _told(graph):
        raise UnsupportedOp(
            f"cannot trace {type(model).__name__!r}: its code takes a number that a tensor's "
            "values decide for a bare one, as a slice of a list does"
        )
    return graph


HIDDEN = 10**400  # an int that no index, size or float can be


def _once_all_ask(run: Callable[[], Any], asking: list[dict[str, Any]]) -> Any:
    """Return what `run` gives when `asking` has all modules that ask for the int of a tensor."""
    while True:
        known = len(asking)
        try:
            return run()
        except UnsupportedOp:
            if len(asking) == known:
                raise


def _told(graph: fx.Graph) -> list[Any]:
    """Return what one recording has to have in common with another of the same run."""
    return [
        (
            node.op,
            node.name,
            list(map(str, node.all_input_nodes)),
            [n for n in tree_leaves(node.args) if _bare(n)],
        )
        for node in graph.nodes
    ]


def _bare(value: Any) -> bool:
    return type(value) in (int, float, bool, str)


def _run(
    model: nn.Module,
    training: bool,
    leaves: frozenset[str],
    inputs: inspect.BoundArguments,
    names: Names,
    asking: list[dict[str, Any]],
    *,
    watched: bool = False,
    seeming: int = HIDDEN,
) -> tuple[fx.Graph, bool, bool]:
    """Return the graph, and whether it holds tensors that are neither the model's nor computed.

    Then whether there were numbers that tensor values decide: to the code that runs they seem to be
    `seeming`.
    """
    title = type(model).__name__
    copied, originals = duplicate(model)
    copied.train(training)
    values, owners = _copies(inputs)
    strangers: list[Tensor] = []

    def name_of(tensor: Tensor) -> str:
        if id(tensor) in owners:
            tape.refuse(
                f"argument {owners[id(tensor)]!r} hides tensors in an object; "
                "pass tensors, lists, tuples, dicts or dataclasses"
            )
        if id(tensor) not in originals:
            strangers.append(tensor)
            return names.of_stranger(tensor, len(strangers))
        return names.of(originals[id(tensor)])

    paths = {id(module): path for path, module in copied.named_modules()}
    tape = Tape(title, name_of)
    recorder = Recorder(tape, paths, leaves, asking, seeming)
    named = _arguments(values)
    for (name, value), default in zip(named, _defaults(named), strict=True):
        tape.placeholder(name, value, default)
    buffers = dict(copied.named_buffers())
    hidden = (
        HiddenCalls(lambda *call: _refuse_hidden(recorder, tape, *call))
        if watched
        else nullcontext()
    )
    try:
        with recorder.recording(), hidden:
            out = copied(*values.args, **values.kwargs)
    except Exception as error:
        raise _explained(error, recorder, tape, title, training) from error
    if tape.refusal is not None:
        raise tape.refusal
    _record_updates(tape, buffers, dict(copied.named_buffers()))
    tape.output(out)
    return tape.graph, bool(strangers), recorder.hides


def _explained(
    error: Exception, recorder: Recorder, tape: Tape, title: str, training: bool
) -> Exception:
    """Return the refusal that made the model fail, or one that says where its own code did."""
    if tape.refusal is not None:
        return tape.refusal
    where = recorder.failed or title
    if took_bare(error):
        return UnsupportedOp(f"cannot trace {where!r}: {depends(place_of_error(error))}")
    mode = "train" if training else "eval"
    fact = str(error).strip().partition("\n")[0]
    return UnsupportedOp(
        f"cannot trace {title!r}: on the example inputs in {mode} mode, {where!r} raises "
        f"{type(error).__name__}: {fact}"
    )


def _refuse_hidden(recorder: Recorder, tape: Tape, operator: str, used: list[Tensor]) -> None:
    """Refuse an operator on computed tensors that runs although no recorded call runs it."""
    if recorder.listens() and any(map(tape.knows, used)):
        tape.refuse(
            f"{place_of(user_frame())} runs {operator} out of Python's sight (scripted code, an "
            "extension); mark the module a leaf with trace(model, ..., leaves=[...])"
        )


def _record_updates(tape: Tape, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Record that the run put other tensors in the place of buffers."""
    for path, old in before.items():
        new = after.get(path, old)
        if new is old or not tape.knows(new):
            continue
        if (new.shape, new.dtype) != (old.shape, old.dtype):
            tape.refuse(f"its run replaces buffer {path!r} by one of another size or dtype")
        tape.update(old, new)


@contextmanager
def _surroundings_kept(state: Mapping[str, Tensor]) -> Iterator[None]:
    """Put back random states after the block, and run it in the modes that recording needs."""
    gpus = sorted({tensor.device.index for tensor in state.values() if tensor.is_cuda})
    python, numpy = random.getstate(), np.random.get_state()
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.random.fork_rng(gpus))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            random.setstate(python)
            np.random.set_state(numpy)
