"""Recording one concrete run of a model as a torch.fx graph."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from graphgrow.ir import calls
from graphgrow.ir.intercept import asserts, intercepted, place_of, user_frame
from graphgrow.ir.sizes import DataSize, plain, sized
from graphgrow.ir.tape import Tape

_LOCK = threading.RLock()


class Recorder(TorchFunctionMode):
    """Writes every torch call, leaf module call and size computation of one run on a tape.

    `paths` names the modules of the model by id; `leaves` are the paths to record as one node.
    """

    def __init__(self, tape: Tape, paths: Mapping[int, str], leaves: frozenset[str]) -> None:
        super().__init__()
        self.failed: str | None = None
        self._tape, self._paths, self._leaves = tape, paths, leaves
        self._sizes: dict[tuple[fx.Node, int | None], fx.Node] = {}
        self._paused = True
        self._thread = threading.get_ident()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what this thread does in the block."""
        with _LOCK, intercepted(self), self:
            self._paused = False
            try:
                yield
            finally:
                self._paused = True

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """Record nothing in the block."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def listens(self) -> bool:
        """Return whether what happens now, in this thread, is to be recorded."""
        return not self._paused and threading.get_ident() == self._thread

    # Calls

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call `func` and record it."""
        kwargs = kwargs or {}
        if not self.listens():
            return func(*args, **kwargs)
        if func in calls.WRITTEN_OUT:
            return self._written_out(func, args, kwargs)
        if calls.is_size(func):
            return self._size(func, args, kwargs)
        if calls.reads_values(func):
            self._check_read(func, args)
        if func is Tensor.unbind and self._tape.node_of(args[0]) in self._tape.sized_by_values:
            self.refuse_branch()
        with self._pause():
            out = func(*args, **kwargs)
        written = calls.writes(func.__name__, kwargs)
        if not written and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            return out
        op, target, spelled = calls.spell(func, args)
        return self._record(op, target, spelled, kwargs, out, written)

    def _written_out(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call what `func` consists of; its nodes remember whose parts they are.

        `func` is called as well, since it may refuse sizes that its parts would take.
        """
        with self._pause():
            func(*args, **kwargs)
        nodes = self._tape.graph.nodes
        last = next(reversed(nodes), None)
        with self:  # torch runs __torch_function__ outside its mode
            out = calls.WRITTEN_OUT[func](*args, **kwargs)
        for node in itertools.takewhile(lambda n: n is not last, reversed(nodes)):
            node.meta["part_of"] = func.__name__
        return out

    def call(self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Call `module`: as one node where it is a leaf, else recording what it does inside."""
        path = self._paths.get(id(module))
        if path is None or not self.listens():
            return original(module, *args, **kwargs)
        if path in self._leaves:
            with self._blaming(path), self._pause():
                out = original(module, *args, **kwargs)
            written = getattr(module, "inplace", False) is True
            return self._record("call_module", path, args, kwargs, out, written)
        self._tape.where.append(path)
        try:
            with self._blaming(path):
                if type(module).__name__ == "OptimizedModule":
                    return module._orig_mod(*args, **kwargs)  # pyright: ignore
                return original(module, *args, **kwargs)
        finally:
            self._tape.where.pop()

    def apply(self, original: Callable[..., Any], function: type, args: Any, kwargs: Any) -> Any:
        """Call an autograd function as one node, since its backward is its own."""
        if not self.listens():
            return original(*args, **kwargs)
        if function.__name__ == "CheckpointFunction":  # what it runs is the model's own code
            return args[0](*args[2:])
        with self._pause():
            out = original(*args, **kwargs)
        return self._record("call_function", calls.Apply(function), args, kwargs, out, False)

    @contextmanager
    def _blaming(self, path: str) -> Iterator[None]:
        """Remember the innermost module in which an error was raised."""
        try:
            yield
        except Exception:
            self.failed = path if self.failed is None else self.failed
            raise

    def _record(self, op: str, target: Any, args: Any, kwargs: Any, out: Any, written: bool) -> Any:
        """Add the node of a call that gave `out`; return `out`, as an object of its own."""
        tape = self._tape
        if torch._C._is_any_autocast_enabled():
            place = place_of(user_frame())
            tape.refuse(f"{place} runs under autocast; put autocast around the whole model")
        node = tape.add(op, target, tape.argument(tuple(args)), tape.argument(dict(kwargs)))
        tape.note_sizes(node, args, kwargs)
        if written:
            tape.note_write(node)
        if op != "call_module" and not torch.is_grad_enabled():
            tape.cut_off(node)
        if isinstance(out, Tensor) and tape.knows(out):
            if written and tape.node_of(out) not in node.all_input_nodes:
                return out  # written through a detached alias: the tensor's history stays
            if not written:
                with self._pause():
                    out = out.detach()  # another object on the same memory
        if out is not None:
            tape.bind(out, node)
        return out

    # Sizes, and values that code may not look at

    def number(self, value: Any, op: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Return `value`, carrying a node that computes it as `op(*args)` while recording."""
        if not self.listens() or not isinstance(value, int | float):
            return value
        node = self._tape.add("call_function", op, self._tape.argument(args))
        of_data = any(isinstance(arg, DataSize) for arg in args)
        return sized(value, self, lambda: node, of_data=of_data)

    def _size(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the sizes that `func` asks for, each carrying a node."""
        tensor = args[0]
        with self._pause():
            out = func(*args, **kwargs)
        node = self._tape.node_of(tensor)
        if isinstance(out, torch.Size):
            return torch.Size([self._dim(n, node, i) for i, n in enumerate(out)])
        if func is not Tensor.size:
            return self._dim(out, node, None)
        dim = plain(args[1] if len(args) > 1 else kwargs["dim"])
        return self._dim(out, node, dim % tensor.dim())

    def _dim(self, size: int, node: fx.Node, dim: int | None) -> Any:
        """Return `size` with a node, made on first use: of one dim, or of all (`None`)."""

        def make() -> fx.Node:
            if (node, dim) not in self._sizes:
                method, rest = ("numel", ()) if dim is None else ("size", (dim,))
                self._sizes[node, dim] = self._tape.add("call_method", method, (node, *rest))
            return self._sizes[node, dim]

        return sized(size, self, make, of_data=node in self._tape.sized_by_values)

    def _check_read(self, func: Any, args: Any) -> None:
        """Refuse if Python would see values that another run may change.

        The truth of what follows from sizes alone is as good as a comparison of sizes.
        """
        nodes = [self._tape.node_of(arg) for arg in args if isinstance(arg, Tensor)]
        is_truth = func is Tensor.__bool__
        if not all(self._tape.is_fixed(node, but_for_sizes=is_truth) for node in nodes):
            self.refuse_branch()

    def refuse_branch(self) -> None:
        """Raise that a branch depends on a tensor's values, while recording."""
        frame = user_frame()
        if self.listens() and not asserts(frame):
            self._tape.refuse(
                f"the branch at {place_of(frame)} depends on a tensor's value; "
                "mark the module a leaf with trace(model, ..., leaves=[...])"
            )
