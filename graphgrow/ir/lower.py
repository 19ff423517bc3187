"""From a graph back to a module: its forward is written out as Python and runs plain torch."""

from __future__ import annotations

import importlib
import itertools
import linecache
import symtable
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from textwrap import indent
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphgrow.errors import NotApplicable, UnsupportedOp
from graphgrow.ir.assemble import assemble, place, redirect, tensors
from graphgrow.ir.graph import Graph


def lower(graph: Graph, *, into: nn.Module | None = None) -> nn.Module:
    """Return a module that computes `graph` with the very tensors of `graph.state`.

    It has the paths and the `state_dict` keys of the traced model, the user's own leaf modules as
    shallow copies, and a `forward` written as Python; its text is the attribute `code`. Modules
    that are not leaves become containers: their methods and hooks are part of that text.

    With `into`, the tensors and the changed attributes are written into that model instead, which
    keeps its class, methods and hooks, and it is returned. That needs a model of unchanged
    structure whose own `forward` has no literal that a rewrite changed; a refusal leaves it as it
    was.

    Raises:
        NotApplicable: `into` does not fit; the sentence says where.
        UnsupportedOp: the two modes of the graph cannot be written as one forward.
    """
    if into is not None:
        return _write_back(graph, into)
    root = assemble(graph.modules, graph.leaves, graph.state)
    if "" in graph.leaves:
        return root
    forward = _forward(graph)
    root.__class__ = forward.kind
    if not hasattr(root, "code"):  # the user's own layer of that name comes first
        vars(root)["code"] = forward.text
    return root


# --------------------------------------------------------------------------- the text of a forward


class Lowered(nn.Module):
    """A module whose forward `lower` wrote: it copies and pickles as the text of that forward."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how to make the module again: its written forward, and its state."""
        kind = type(self)
        # a class derived from this one by others has to pickle on its own
        return _blank, (vars(kind).get("_written", kind),), self.__getstate__()


@dataclass(frozen=True, eq=False)
class Forward:
    """The text of a forward, and what the global names in it stand for."""

    name: str
    text: str
    names: Mapping[str, Any]

    @cached_property
    def kind(self) -> type[Lowered]:
        """The class with this forward; its source shows in tracebacks while the class lives."""
        file = f"<graphgrow {self.name} {next(_numbers)}>"
        scope = {**self.names, "__name__": __name__}
        exec(compile(self.text, file, "exec", dont_inherit=True), scope)
        body = {"__module__": __name__, "forward": scope["forward"], "_written": self}
        kind = type(self.name, (Lowered,), body)
        linecache.cache[file] = len(self.text), None, self.text.splitlines(True), file
        weakref.finalize(kind, linecache.cache.pop, file, None)
        return kind

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        """Return itself: copies of a lowered module are of one class."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the text and the names; modules, which do not pickle, by their import path."""
        paths = {n: v.__name__ for n, v in self.names.items() if isinstance(v, ModuleType)}
        others = {n: v for n, v in self.names.items() if n not in paths}
        return _read, (self.name, self.text, paths, others)


_numbers = itertools.count()


def _blank(source: Forward | type[Lowered]) -> Lowered:
    return object.__new__(source.kind if isinstance(source, Forward) else source)


def _read(name: str, text: str, paths: dict[str, str], others: dict[str, Any]) -> Forward:
    found = {alias: importlib.import_module(path) for alias, path in paths.items()}
    return Forward(name, text, {**found, **others})


def _forward(graph: Graph) -> Forward:
    """Return the written forward of `graph`: one body, or one for each mode."""
    name = type(graph.modules[""]).__name__
    train = _Body.of(graph.train)
    if graph.train is graph.eval:
        return Forward(name, f"{train.head}\n{train.lines}\n", train.names)
    other = _Body.of(graph.eval)
    if train.head != other.head or train.collides(other) or other.collides(train):
        raise UnsupportedOp(
            f"cannot write the forward of '{name}': its two modes use one name for two things "
            f"('{train.head}' in train mode, '{other.head}' in eval mode); trace it in one mode"
        )
    modes = ("if self.training:", indent(train.lines, "    "), "else:", indent(other.lines, "    "))
    text = "\n".join((train.head, f"    {modes[0]}", modes[1], f"    {modes[2]}", modes[3], ""))
    return Forward(name, text, {**train.names, **other.names})


@dataclass(frozen=True)
class _Body:
    """One structure as Python: its `def` line, its indented lines, the names used in it."""

    head: str
    lines: str
    names: Mapping[str, Any]
    locals: frozenset[str]

    @classmethod
    def of(cls, structure: fx.Graph) -> _Body:
        code = structure.python_code(root_module="self")
        text = code.src[code.src.index("def forward(") :].rstrip()
        head, _, lines = text.partition("\n")
        module = symtable.symtable(text, "<forward>", "exec")
        inner = next(t for t in module.get_children() if t.get_name() == "forward")
        assert isinstance(inner, symtable.Function)
        used = {*inner.get_globals(), *module.get_identifiers()}
        names = {name: value for name, value in code.globals.items() if name in used}
        return cls(head, lines, names, frozenset(inner.get_locals()))

    def collides(self, other: _Body) -> bool:
        """Return whether a global name of this body means something else in the other one."""
        return any(
            name in other.locals or other.names.get(name, value) is not value
            for name, value in self.names.items()
        )


# --------------------------------------------------------------------------- into the user's model


def _write_back(graph: Graph, model: nn.Module) -> nn.Module:
    """Return `model` with the tensors and attributes of `graph`, or raise before any change."""
    misfit = next(_misfits(graph, model), None)
    if misfit is not None:
        name = type(model).__name__
        raise NotApplicable(f"cannot lower into '{name}': {misfit}; lower without into")
    own = dict(model.named_modules(remove_duplicate=False))
    fresh = {
        id(old): graph.state[path] for path, old in tensors(model) if old is not graph.state[path]
    }
    for path, _ in [*tensors(model)]:
        owner, _, name = path.rpartition(".")
        place(own[owner], name, graph.state[path])
    for path, module in own.items():
        vars(module).update(_changed(module, graph.modules[path]))
        if fresh:
            redirect(module, fresh)
    return model


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
    for node in (*graph.train.nodes, *graph.eval.nodes):
        if "edited" in node.meta:
            yield f"its forward would need another literal at '{node.name}' ({node.meta['edited']})"


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
