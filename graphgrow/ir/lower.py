"""From a graph back to a module: its forward is written out as Python and runs plain torch."""

from __future__ import annotations

import importlib
import itertools
import linecache
import symtable
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from textwrap import indent
from types import ModuleType
from typing import Any

from torch import fx, nn

from graphgrow.errors import UnsupportedOp
from graphgrow.ir.assemble import assemble
from graphgrow.ir.graph import Graph
from graphgrow.ir.write_back import write_back


def lower(graph: Graph, *, into: nn.Module | None = None) -> nn.Module:
    """Return a module that computes `graph` with the very tensors of `graph.state`.

    It has the paths and the `state_dict` keys of the traced model, the user's own leaf modules as
    shallow copies, and a `forward` written as Python; its text is the attribute `code`. Modules
    that are not leaves become containers: their methods and hooks are part of that text.

    With `into`, the tensors and the changed attributes are written into that model instead, which
    keeps its class, methods and hooks, and it is returned. That needs a model of unchanged
    structure whose own `forward` computes the graph when attributes state the new sizes
    (`num_heads`, `head_dim`): it is recorded once more to see that it does. A refusal leaves it as
    it was.

    Raises:
        NotApplicable: `into` does not fit; the sentence says where.
        UnsupportedOp: the two modes of the graph cannot be written as one forward.
    """
    if into is not None:
        return write_back(graph, into)
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
