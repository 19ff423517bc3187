"""Recording one concrete run of a model as a torch.fx graph."""

from __future__ import annotations

import itertools
import math
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
from graphgrow.ir.sizes import DataNumber, bare, of_data, plain, sized
from graphgrow.ir.tape import Tape

_LOCK = threading.RLock()


def depends(place: str) -> str:
    """Return what to say of code at `place` that a tensor's value steers."""
    return (
        f"the branch at {place} depends on a tensor's value; "
        "mark the module a leaf with trace(model, ..., leaves=[...])"
    )


class Recorder(TorchFunctionMode):
    """Writes every torch call, leaf module call and size computation of one run on a tape.

    `paths` names the modules of the model by id; `leaves` are the paths to record as one node.
    `asking` are the names of modules whose code asks for the int of a tensor; where others do, they
    join these, and the recording refuses: it can be made once more. `hidden` is what numbers that
    tensor values decide seem to be to code that takes them for bare ones; `hides`: there were some.
    """

    def __init__(
        self,
        tape: Tape,
        paths: Mapping[int, str],
        leaves: frozenset[str],
        asking: list[dict[str, Any]],
        hidden: int,
    ) -> None:
        super().__init__()
        self._asking, self.hidden, self.hides = asking, hidden, False
        self.failed: str | None = None
        self._tape, self._paths, self._leaves = tape, paths, leaves
        self._sizes: dict[Any, fx.Node] = {}  # by node and dim, or by the mark of data sizes
        self._paused = True
        self._thread = threading.get_ident()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what this thread does in the block."""
        with _LOCK, intercepted(self, tuple(self._asking)), self:
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
            if calls.gives_int(func, args) and not self._is_fixed(func, args):
                return self.whole(args[0]) if func is Tensor.item else self.bare_int(args[0])
            self._check_read(func, args)
        if func is Tensor.unbind and self._counts_data(*args, **kwargs):
            self.refuse_branch()
        with self._pause():
            out = func(*bare(args), **bare(kwargs))
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
            func(*bare(args), **bare(kwargs))
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
                out = original(module, *bare(args), **bare(kwargs))
            written = getattr(module, "inplace", False) is True
            name = type(module).__name__
            return self._record("call_module", path, args, kwargs, out, written, name)
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
            out = original(*bare(args), **bare(kwargs))
        return self._record("call_function", calls.Apply(function), args, kwargs, out, False)

    @contextmanager
    def _blaming(self, path: str) -> Iterator[None]:
        """Remember the innermost module in which an error was raised."""
        try:
            yield
        except Exception:
            self.failed = path if self.failed is None else self.failed
            raise

    def _counts_data(self, tensor: Tensor, dim: int = 0) -> bool:
        """Return whether tensor values decide the size of a dim."""
        return dim % max(tensor.dim(), 1) in self._tape.data_sizes.of(self._tape.node_of(tensor))

    def _record(
        self,
        op: str,
        target: Any,
        args: Any,
        kwargs: Any,
        out: Any,
        written: bool,
        name: str | None = None,
    ) -> Any:
        """Add the node of a call that gave `out`; return `out`, as an object of its own."""
        tape = self._tape
        if torch._C._is_any_autocast_enabled():
            place = place_of(user_frame())
            tape.refuse(f"{place} runs under autocast; put autocast around the whole model")
        node = tape.add(op, target, tape.argument(tuple(args)), tape.argument(dict(kwargs)))
        with self._pause():
            tape.data_sizes.note(node, name or calls.name_of(node), args, kwargs, out)
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
            with self._pause():
                tape.bind(out, node)
        return out

    # Sizes, and values that code may not look at

    def number(self, value: Any, op: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Return `value`, carrying a node that computes it as `op(*args)` while recording."""
        if not self.listens() or not isinstance(value, int | float):
            return value
        node = self._tape.add("call_function", op, self._tape.argument(args))
        if any(isinstance(arg, DataNumber) for arg in args):
            return self._hiding(value, lambda: node)
        return sized(value, self, lambda: node)

    def _hiding(self, value: Any, make: Callable[[], fx.Node], *, filled: bool = False) -> Any:
        """Return a number that tensor values decide."""
        self.hides = True
        return of_data(value, self, make, filled=filled)

    def whole(self, number: Any) -> Any:
        """Return the int of a tensor or of a number with a node, carrying a node."""
        if not isinstance(number, Tensor):
            return number if isinstance(number, int) else math.trunc(number)
        if not calls.gives_int(Tensor.item, (number,)) or self._is_fixed(Tensor.item, (number,)):
            return int(number)
        with self._pause():
            value = number.item()
        node = self._tape.add("call_method", "item", (self._tape.node_of(number),))
        return self._hiding(value, lambda: node)

    def bare_int(self, number: Any) -> int:
        """Refuse that code makes a bare int of a tensor's value, and note which code it is."""
        names = user_frame().f_globals
        if self.listens() and not any(names is others for others in self._asking):
            self._asking.append(names)
        self.refuse_branch()
        with self._pause():
            return int(plain(number))

    def _size(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the sizes that `func` asks for, each carrying a node."""
        tensor = args[0]
        with self._pause():
            out = func(*args, **kwargs)
        node = self._tape.node_of(tensor)
        if isinstance(out, torch.Size):
            return torch.Size([self._dim(n, node, i) for i, n in enumerate(out)])
        if func is not Tensor.size:
            return self._dim(out, node, 0 if tensor.dim() == 1 else None)
        dim = plain(args[1] if len(args) > 1 else kwargs["dim"])
        return self._dim(out, node, dim % tensor.dim())

    def _dim(self, size: int, node: fx.Node, dim: int | None) -> Any:
        """Return `size` with a node, made on first use: of one dim, or of all (`None`)."""
        data = self._tape.data_sizes
        marks = (
            data.of(node) if dim is None else {d: m for d, m in data.of(node).items() if d == dim}
        )
        key: Any = (node, dim) if dim is None or not marks else marks[dim]

        def make() -> fx.Node:
            if isinstance(key, fx.Node):
                return key
            if key not in self._sizes:
                method, rest = ("numel", ()) if dim is None else ("size", (dim,))
                self._sizes[key] = self._tape.add("call_method", method, (node, *rest))
            return self._sizes[key]

        if marks:
            return self._hiding(size, make, filled=size > 0 and data.is_filled(marks))
        return sized(size, self, make)

    def _check_read(self, func: Any, args: Any) -> None:
        """Refuse if Python would see values that another run may change.

        The truth of what follows from sizes alone is as good as a comparison of sizes.
        """
        if not self._is_fixed(func, args):
            self.refuse_branch()

    def _is_fixed(self, func: Any, args: Any) -> bool:
        nodes = [self._tape.node_of(arg) for arg in args if isinstance(arg, Tensor)]
        is_truth = func is Tensor.__bool__
        return all(self._tape.is_fixed(node, but_for_sizes=is_truth) for node in nodes)

    def refuse_branch(self) -> None:
        """Raise that a branch depends on a tensor's values, while recording."""
        frame = user_frame()
        if self.listens() and not asserts(frame):
            self._tape.refuse(depends(place_of(frame)))
