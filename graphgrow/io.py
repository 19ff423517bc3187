"""A grown model in one safetensors file: its tensors, and in the header the journal of rewrites.

The header's entry `graphgrow` is JSON: `format` and `version` of what wrote it, `model` (the class
that was traced), `journal`, `aliases` (path of a tied tensor → path that holds it), `example` (the
example inputs by argument name, tensors as numbers of `example.<n>`) and `leaves` (modules that
were traced as one node). Tensors stand under `state.<path>`. Nothing in the file is executed.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from graphgrow.errors import NotApplicable
from graphgrow.ir.assemble import place, redirect, tensors, twin
from graphgrow.ir.graph import Graph
from graphgrow.ir.lower import lower
from graphgrow.ir.trace import trace
from graphgrow.passes.journal import rewrite_from_json, rewrites_to_json
from graphgrow.passes.replay import replay
from graphgrow.passes.rewrite import Grown, Rewrite
from graphgrow.version import __version__

FORMAT = 1

Path_ = str | os.PathLike[str]
Journal = Graph | Grown | Sequence[Rewrite]


def save(path: Path_, source: nn.Module | Graph | Grown, journal: Journal | None = None) -> None:
    """Write the tensors of `source`, its journal and its example inputs to a file at `path`.

    A graph, or what `apply` returned, brings its journal. A module needs one: the graph (or
    `Grown`) that it was lowered from, or a plain sequence of rewrites; then no example inputs are
    known, and `load` has to be given some. The file appears whole or not at all.

    Raises ValueError where there is nothing to say how the model grew, or a tensor has no place in
    a safetensors file.
    """
    if isinstance(source, nn.Module):
        if journal is None:
            raise ValueError(
                f"cannot save {type(source).__name__} without its journal: pass the graph it was "
                "lowered from, or the rewrites since the model's class, as journal="
            )
        state, name = dict(tensors(source)), type(source).__name__
    else:
        if journal is not None:
            raise ValueError("cannot save a graph with another journal than its own")
        journal, state = source, (source.graph if isinstance(source, Grown) else source).state
        name = None
    graph = journal.graph if isinstance(journal, Grown) else journal
    stored, aliases = _stored(state)
    header: dict[str, Any] = {"format": FORMAT, "version": __version__, "aliases": aliases}
    if isinstance(graph, Graph):
        example, numbered = _packed(graph)
        stored |= {f"example.{number}": _storable(t, "example") for number, t in numbered.items()}
        name = type(graph.modules[""]).__name__
        header |= {"example": example, "leaves": sorted(graph.leaves)}
    rewrites = graph.journal if isinstance(graph, Graph) else graph
    header |= {"model": name, "journal": rewrites_to_json(rewrites)}
    _write(Path(path), stored, {"graphgrow": json.dumps(header)})


def load(path: Path_, model: nn.Module, *example_inputs: Any, **example_kwargs: Any) -> nn.Module:
    """Return `model` as it was when saved: grown by the journal, with the tensors of the file.

    `model` is a fresh model of the class that was first traced. Where its own `forward` still fits
    it is grown in place and returned, with new parameter objects, so make the optimizer afterwards;
    where it does not, a module written from the graph is returned. Tensors are those of the file
    bit for bit, in its dtype, on the devices of `model`. Example inputs, if given, serve to trace
    it in place of the saved ones.

    Raises ValueError if the file is damaged, newer than this version, or of another model; then
    `model` is as it was.
    """
    saved = _read(Path(path))
    try:
        graph = _replayed(saved, model, example_inputs, example_kwargs)
        found = None if graph is None else _needed(graph)
        state = _filled(saved, dict(tensors(model)) if graph is None else graph.state, found)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"cannot load '{path}' (saved from {saved.header['model']}) into "
            f"{type(model).__name__}: {error}"
        ) from error
    # Everything is read and fits: from here on nothing raises.
    if graph is None:
        return _put(model, state)
    graph = replace(graph, state=state)
    try:
        return lower(graph, into=model)
    except NotApplicable:
        return lower(graph)


# --------------------------------------------------------------------------- writing


def _stored(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors by their name in the file, and the paths that share one by that."""
    first: dict[int, str] = {}
    stored, aliases = {}, {}
    for path, tensor in state.items():
        if id(tensor) in first:
            aliases[path] = first[id(tensor)]
        else:
            first[id(tensor)] = path
            stored[f"state.{path}"] = _storable(tensor, path)
    return stored, aliases


def _storable(tensor: Tensor, path: str) -> Tensor:
    """Return a copy of `tensor` as the file holds it: dense, on the CPU, in memory of its own."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.dtype.itemsize > 8:
        raise ValueError(
            f"cannot save '{path}': a safetensors file has no place for a tensor of dtype "
            f"{tensor.dtype} and layout {tensor.layout}"
        )
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _packed(graph: Graph) -> tuple[list[list[Any]], dict[int, Tensor]]:
    """Return the example inputs as JSON by argument name, and the tensors in them by number."""
    numbered: dict[int, Tensor] = {}

    def packed(value: Any) -> Any:
        if isinstance(value, Tensor):
            numbered[len(numbered)] = value
            return {"tensor": len(numbered) - 1}
        if isinstance(value, dict):
            return {"dict": [[packed(key), packed(part)] for key, part in value.items()]}
        if type(value) in (list, tuple):
            return {type(value).__name__: [packed(part) for part in value]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"value": value}
        raise ValueError(
            f"cannot save an example input of type {type(value).__name__}: it is made of tensors, "
            "numbers, text and tuples, lists or dictionaries of these"
        )

    names = [str(node.target) for node in graph.train.nodes if node.op == "placeholder"]
    example = [[name, packed(value)] for name, value in zip(names, graph.example, strict=True)]
    return example, numbered


def _write(path: Path, stored: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write the file beside its place and move it there."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file(stored, beside, metadata)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


# --------------------------------------------------------------------------- reading


@dataclass(frozen=True, eq=False)
class _Saved:
    """What a file holds."""

    header: Mapping[str, Any]
    rewrites: tuple[Rewrite, ...]
    state: Mapping[str, Tensor]
    example: list[tuple[str, Any]] | None


def _read(path: Path) -> _Saved:
    """Return what the file at `path` holds, whole and checked."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("graphgrow")
            names = file.keys()  # not a dict: it cannot be iterated itself
            stored = {} if text is None else {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"cannot load '{path}': it is damaged or cut short ({error})") from error
    if text is None:
        raise ValueError(f"cannot load '{path}': it was not written by graphgrow")
    try:
        header = json.loads(text)
        newer = header["format"] > FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot load '{path}': its header is damaged ({error!r})") from error
    if newer:
        raise ValueError(
            f"cannot load '{path}': it has format {header['format']} and this is graphgrow "
            f"{__version__}, which reads formats up to {FORMAT}; graphgrow {header['version']} "
            "wrote it and reads it"
        )
    try:
        rewrites = tuple(rewrite_from_json(entry) for entry in header["journal"])
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"cannot load '{path}': its journal was written by graphgrow {header['version']} and "
            f"this is {__version__}: {error}"
        ) from error
    state = {key.removeprefix("state."): t for key, t in stored.items() if key.startswith("state.")}
    state |= {path: state[held] for path, held in header["aliases"].items()}
    example = header.get("example")
    if example is not None:
        example = [(name, _unpacked(value, stored)) for name, value in example]
    return _Saved(header, rewrites, state, example)


def _unpacked(value: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Any:
    """Return an example input from its JSON."""
    ((kind, content),) = value.items()
    if kind == "tensor":
        return stored[f"example.{content}"]
    if kind == "dict":
        return {_unpacked(key, stored): _unpacked(part, stored) for key, part in content}
    if kind in ("list", "tuple"):
        parts = [_unpacked(part, stored) for part in content]
        return tuple(parts) if kind == "tuple" else parts
    return content


def _replayed(
    saved: _Saved, model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> Graph | None:
    """Return the graph of `model` after the journal, None where the journal is empty."""
    if not saved.rewrites:
        return None
    if not inputs and not named:
        if saved.example is None:
            raise ValueError(
                "the file holds no example inputs; give load those that the model is traced on"
            )
        inputs, named = _arguments(model, _like_model(saved.example, model))
    paths = {path for path, _ in model.named_modules(remove_duplicate=False)}
    leaves = [path for path in saved.header.get("leaves", ()) if path in paths]
    graph = trace(model, *inputs, leaves=leaves, **named)
    return replay(graph, *saved.rewrites)


def _like_model(example: list[tuple[str, Any]], model: nn.Module) -> list[tuple[str, Any]]:
    """Return the example inputs where `model` is, and as precise as its parameters."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    if first is None:
        return example

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            floats = value.is_floating_point()
            return value.to(first.device, first.dtype if floats else value.dtype)
        if isinstance(value, dict):
            return {key: moved(part) for key, part in value.items()}
        return type(value)(map(moved, value)) if isinstance(value, (list, tuple)) else value

    return [(name, moved(value)) for name, value in example]


def _arguments(
    model: nn.Module, example: Iterable[tuple[str, Any]]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the example inputs as `forward` takes them."""
    kinds = {name: p.kind for name, p in inspect.signature(model.forward).parameters.items()}
    variable = next((n for n, k in kinds.items() if k is inspect.Parameter.VAR_POSITIONAL), None)
    by_position = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL}
    if variable is not None:  # then what stands before it has to be given by position, too
        by_position.add(inspect.Parameter.POSITIONAL_OR_KEYWORD)
    inputs, named = [], {}
    for name, value in example:
        one_of_many = name not in kinds and name.startswith(f"{variable}_")
        kind = inspect.Parameter.VAR_POSITIONAL if one_of_many else kinds.get(name)
        if kind in by_position:
            inputs.append(value)
        else:
            named[name] = value
    return tuple(inputs), named


# --------------------------------------------------------------------------- filling


def _needed(graph: Graph) -> set[str]:
    """Return the paths that the file must have; the rest are constants found in the code."""
    return {
        path
        for path in graph.state
        for module in [graph.modules[path.rpartition(".")[0]]]
        if path.rpartition(".")[2] in {**module._parameters, **module._buffers}
    }


def _filled(
    saved: _Saved, state: Mapping[str, Tensor], needed: set[str] | None
) -> dict[str, Tensor]:
    """Return `state` with the values of the file, tied where `state` is tied."""
    for path in sorted(saved.state):
        if path not in state:
            raise ValueError(f"the file has '{path}', which the model lacks")
    filled: dict[int, Tensor] = {}
    sources: dict[int, str] = {}
    for path, tensor in state.items():
        if path not in saved.state:
            if needed is None or path in needed:
                raise ValueError(f"the model has '{path}', which the file lacks")
            filled.setdefault(id(tensor), tensor)
            continue
        values = saved.state[path]
        if values.shape != tensor.shape:
            raise ValueError(
                f"'{path}' has shape {tuple(values.shape)} in the file and "
                f"{tuple(tensor.shape)} in the model after {len(saved.rewrites)} rewrites"
            )
        tied = sources.setdefault(id(tensor), path)
        if tied != path and not torch.equal(values, saved.state[tied]):
            raise ValueError(f"'{tied}' and '{path}' are one tensor in the model, two in the file")
        if id(tensor) not in filled:
            # memory of torch's own, whose alignment the last bit of a product may depend on
            filled[id(tensor)] = twin(tensor, values.to(tensor.device, copy=True))
    return {path: filled[id(tensor)] for path, tensor in state.items()}


def _put(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Return `model` with the tensors of `state`."""
    own = dict(model.named_modules(remove_duplicate=False))
    fresh = {id(old): state[path] for path, old in tensors(model)}
    for path, tensor in state.items():
        owner, _, name = path.rpartition(".")
        place(own[owner], name, tensor)
    for module in own.values():
        redirect(module, fresh)
    return model
