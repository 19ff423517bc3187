"""Recording one concrete run of a model as a torch.fx graph."""

from __future__ import annotations

import builtins
import functools
import operator
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from graphgrow.errors import UnsupportedOp
from graphgrow.ir import calls
from graphgrow.ir.sizes import SizeNumber, plain, sized

_LOCK = threading.RLock()
_OURS = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent))


class Recorder(TorchFunctionMode):
    """Writes every torch call, leaf module call and size computation of one run into `graph`.

    `paths` names the modules of the model by id, `leaves` are the paths to record as one node, and
    `name_of` gives the path of a tensor that the run did not compute: a parameter, a constant.
    """

    def __init__(
        self,
        paths: Mapping[int, str],
        leaves: frozenset[str],
        name_of: Callable[[Tensor], str],
    ) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.failed: str | None = None
        self._paths, self._leaves, self._name_of = paths, leaves, name_of
        self._nodes: dict[int, tuple[Tensor, fx.Node]] = {}
        self._sizes: dict[tuple[fx.Node, int | None], fx.Node] = {}
        self._where = [""]
        self._paused = True
        self._thread = threading.get_ident()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what this thread does in the block; nn.Module and builtins are restored after."""
        with _LOCK, _patched(self), self:
            self._paused = False
            try:
                yield
            finally:
                self._paused = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing in the block."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def listens(self) -> bool:
        """Return whether what happens now, in this thread, is to be recorded."""
        return not self._paused and threading.get_ident() == self._thread

    def add(self, op: str, target: Any, args: tuple = (), kwargs: Mapping | None = None) -> fx.Node:
        """Return a new node, marked with the module whose forward is running."""
        node = self.graph.create_node(op, target, args, dict(kwargs or {}))
        node.meta["module"] = self._where[-1]
        return node

    def placeholder(self, name: str, value: Any, default: tuple[Any, ...]) -> None:
        """Add an input of the model; tensors inside a container are taken out of it by nodes."""
        self.bind(value, self.add("placeholder", name, default))

    def bind(self, value: Any, node: fx.Node) -> None:
        """Remember that `node` computes `value`, and its parts where `value` is a container."""
        if isinstance(value, Tensor):
            self._nodes[id(value)] = (value, node)
            return
        for key, part in _parts(value):
            if any(isinstance(leaf, Tensor) for leaf in tree_leaves(part)) or _is_object(part):
                function = getattr if _is_object(value) else operator.getitem
                self.bind(part, self.add("call_function", function, (node, key)))

    def output(self, value: Any) -> None:
        """Add the output node and remove what nothing needs."""
        self.add("output", "output", (self.result(value),))
        self.graph.eliminate_dead_code(is_impure_node=calls.is_needed)

    def result(self, value: Any) -> Any:
        """Return what the output node must hold to give `value` again, its classes kept."""
        if isinstance(value, dict) and type(value) is not dict:
            items = {key: self.result(part) for key, part in value.items()}
            if is_dataclass(value):
                return self.add("call_function", type(value), (), items)
            return self.add("call_function", type(value), (items,))
        if is_dataclass(value) and not isinstance(value, type):
            items = {f.name: self.result(getattr(value, f.name)) for f in fields(value)}
            return self.add("call_function", type(value), (), items)
        if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
            items = [self.result(part) for part in value]
            if isinstance(value, list):
                return items
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if isinstance(value, dict):
            return {key: self.result(part) for key, part in value.items()}
        return self.argument(value)

    def node_of(self, tensor: Tensor) -> fx.Node:
        """Return the node that computes `tensor`, or the get_attr node of a stored tensor."""
        if id(tensor) not in self._nodes:
            self._nodes[id(tensor)] = (tensor, self.add("get_attr", self._name_of(tensor)))
        return self._nodes[id(tensor)][1]

    def argument(self, value: Any) -> Any:
        """Return `value` with every tensor and size in it replaced by its node."""
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, SizeNumber):
            return value.node()
        if isinstance(value, tuple | list):
            items = [self.argument(part) for part in value]
            if isinstance(value, list):
                return items
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if isinstance(value, dict):
            return {key: self.argument(part) for key, part in value.items()}
        if isinstance(value, slice):
            return slice(*map(self.argument, (value.start, value.stop, value.step)))
        return value.item() if type(value).__module__ == "numpy" and value.ndim == 0 else value

    def number(self, value: Any, op: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Return `value`, carrying a node that computes it as `op(*args)` while recording."""
        if not self.listens() or not isinstance(value, int | float):
            return value
        node = self.add("call_function", op, self.argument(args))
        return sized(value, self, lambda: node)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call `func` and record it."""
        kwargs = kwargs or {}
        if not self.listens():
            return func(*args, **kwargs)
        if calls.is_size(func):
            return self._size(func, args, kwargs)
        if calls.reads_values(func):
            self._refuse_to_read(args)
        with self.paused():
            out = func(*args, **kwargs)
        written = calls.in_place(func.__name__, kwargs)
        if not written and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            return out
        op, target, args_ = calls.spell(func, args)
        return self._record(op, target, args_, kwargs, out, written)

    def call(self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Call `module`: as one node where it is a leaf, else recording what it does inside."""
        if type(module).__name__ == "OptimizedModule":
            return module._orig_mod(*args, **kwargs)
        path = self._paths.get(id(module))
        if path is None or not self.listens():
            return original(module, *args, **kwargs)
        try:
            if path not in self._leaves:
                self._where.append(path)
                return original(module, *args, **kwargs)
            with self.paused():
                out = original(module, *args, **kwargs)
        except Exception:
            self.failed = path if self.failed is None else self.failed
            raise
        finally:
            if path not in self._leaves:
                self._where.pop()
        written = getattr(module, "inplace", False) is True
        return self._record("call_module", path, args, kwargs, out, written)

    def _record(
        self, op: str, target: Any, args: Any, kwargs: Any, out: Any, written: bool
    ) -> Any:
        """Add the node of a call that gave `out` and return `out`, never another call's object."""
        node = self.add(op, target, self.argument(tuple(args)), self.argument(dict(kwargs)))
        if isinstance(out, Tensor) and not written and any(out is arg for arg in tree_leaves(args)):
            with self.paused():
                out = out.detach()
        if out is not None:
            self.bind(out, node)
        return out

    def _size(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the sizes that `func` asks for, each carrying a node."""
        tensor = args[0]
        with self.paused():
            out = func(*args, **kwargs)
        node = self.node_of(tensor)
        if isinstance(out, torch.Size):
            return torch.Size([self._dim(n, node, i) for i, n in enumerate(out)])
        if func.__name__ != "size":
            return self._dim(out, node, None)
        dim = args[1] if len(args) > 1 else kwargs["dim"]
        return self._dim(out, node, plain(dim) % tensor.dim())

    def _dim(self, size: int, node: fx.Node, dim: int | None) -> Any:
        """Return `size` with a node, made on first use: of one dim, or of all (`None`)."""

        def make() -> fx.Node:
            if (node, dim) not in self._sizes:
                method, rest = ("numel", ()) if dim is None else ("size", (dim,))
                self._sizes[node, dim] = self.add("call_method", method, (node, *rest))
            return self._sizes[node, dim]

        return sized(size, self, make)

    def _refuse_to_read(self, args: Any) -> None:
        raise UnsupportedOp(
            f"cannot trace {self._where[-1]!r}: the code at {user_line()} depends on a tensor's "
            "value; mark the module a leaf with trace(model, ..., leaves=[...])"
        )


def user_line() -> str:
    """Return file and line of the innermost running code outside torch and graphgrow."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _is_object(value: Any) -> bool:
    """Return whether `value` is no container that torch knows, but has tensors as attributes."""
    if isinstance(value, Tensor | dict | list | tuple | type | nn.Module):
        return False
    return any(isinstance(part, Tensor) for part in getattr(value, "__dict__", {}).values())


def _parts(value: Any) -> list[tuple[Any, Any]]:
    """Return key and part for each part of a container, nothing for any other value."""
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        return list(enumerate(value))
    return list(vars(value).items()) if _is_object(value) else []


@contextmanager
def _patched(recorder: Recorder) -> Iterator[None]:
    """Let `recorder` see module calls and the length of tensors for the time of the block."""
    call, length = nn.Module.__call__, builtins.len

    @functools.wraps(call)
    def recorded_call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return recorder.call(call, self, args, kwargs)

    @functools.wraps(length)
    def recorded_length(value: Any) -> int:
        if isinstance(value, Tensor) and recorder.listens() and value.dim():
            return value.size(0)
        return length(value)

    nn.Module.__call__ = recorded_call
    builtins.len = recorded_length
    try:
        yield
    finally:
        nn.Module.__call__, builtins.len = call, length
