"""Recording one concrete run of a model as a torch.fx graph."""

from __future__ import annotations

import operator
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from graphgrow.errors import UnsupportedOp
from graphgrow.ir import calls
from graphgrow.ir.intercept import asserts, intercepted, place_of, user_frame
from graphgrow.ir.sizes import DataSize, SizeNumber, plain, sized

_LOCK = threading.RLock()


class Recorder(TorchFunctionMode):
    """Writes every torch call, leaf module call and size computation of one run into `graph`.

    `title` names the model in messages, `paths` its modules by id; `leaves` are the paths to record
    as one node, and `name_of` gives the path of a tensor that the run did not compute.
    """

    def __init__(
        self,
        title: str,
        paths: Mapping[int, str],
        leaves: frozenset[str],
        name_of: Callable[[Tensor], str],
    ) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self._title = title
        self.failed: str | None = None
        self.refusal: UnsupportedOp | None = None  # kept, since the model's code may catch it
        self._paths, self._leaves, self._name_of = paths, leaves, name_of
        self._nodes: dict[int, tuple[Tensor, fx.Node]] = {}  # keeps tensors alive: ids stay unique
        self._sizes: dict[tuple[fx.Node, int | None], fx.Node] = {}
        self._cuts: dict[fx.Node, fx.Node] = {}  # what no_grad code reads instead of a node
        self._sized_by_values: set[fx.Node] = set()
        self._inputs: list[tuple[torch.device, fx.Node]] = []
        self._where = [""]
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

    def computed(self, tensor: Tensor) -> bool:
        """Return whether the run gave `tensor`, or a call in it used `tensor`."""
        return id(tensor) in self._nodes

    def refuse(self, what: str) -> NoReturn:
        """Raise that what the running module does cannot be traced."""
        where = self._where[-1] or self._title
        self.refusal = self.refusal or UnsupportedOp(f"cannot trace {where!r}: {what}")
        raise self.refusal

    # What a run begins and ends with

    def placeholder(self, name: str, value: Any, default: tuple[Any, ...]) -> None:
        """Add an input of the model; tensors inside a container are taken out of it by nodes."""
        node = self._add("placeholder", name, default)
        self._bind(value, node)
        if isinstance(value, Tensor):
            self._inputs.append((value.device, node))

    def update(self, before: Tensor, after: Tensor) -> None:
        """Add nodes that write into the buffer `before` what the run put in its place."""
        new = self._add("call_method", "detach", (self._node_of(after),))
        self._add("call_method", "copy_", (self._node_of(before), new))

    def output(self, value: Any) -> None:
        """Add the output node and remove what nothing needs."""
        self._add("output", "output", (self._result(value),))
        self.graph.eliminate_dead_code(is_impure_node=calls.is_needed)

    def _result(self, value: Any) -> Any:
        """Return what the output node must hold to give `value` again, its classes kept."""
        if is_dataclass(value) and not isinstance(value, type):
            parts = {f.name: self._result(getattr(value, f.name)) for f in fields(value)}
            return self._add("call_function", type(value), (), parts)
        if isinstance(value, dict):
            parts = {key: self._result(part) for key, part in value.items()}
            is_plain = isinstance(value, defaultdict) or type(value) is dict
            return parts if is_plain else self._add("call_function", type(value), (parts,))
        if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
            parts = [self._result(part) for part in value]
            return parts if isinstance(value, list) else _like(value, parts)
        if isinstance(value, torch.Size | Tensor | int | float | complex | str | None):
            return self._argument(value)
        name = type(value).__name__
        self.refuse(
            f"it returns a {name}; return tensors, numbers, tuples, lists, dicts or dataclasses"
        )

    # Nodes and arguments

    def _add(self, op: str, target: Any, args: Any = (), kwargs: Mapping | None = None) -> fx.Node:
        """Return a new node, marked with the module whose forward is running."""
        node = self.graph.create_node(op, target, args, dict(kwargs or {}))
        node.meta["module"] = self._where[-1]
        return node

    def _node_of(self, tensor: Tensor) -> fx.Node:
        """Return the node that computes `tensor`, or the get_attr node of a stored tensor."""
        if id(tensor) not in self._nodes:
            if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                self.refuse(f"{place_of(user_frame())} runs under torch.func; make it a leaf")
            self._nodes[id(tensor)] = (tensor, self._add("get_attr", self._name_of(tensor)))
        return self._nodes[id(tensor)][1]

    def _argument(self, value: Any) -> Any:
        """Return `value` with every tensor and size in it replaced by its node."""
        return map_aggregate(value, self._part)

    def _part(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            node = self._node_of(value)
            return node if torch.is_grad_enabled() else self._cut(node)
        if isinstance(value, SizeNumber):
            return value.node()
        if isinstance(value, torch.device):
            return next((self._device(n) for device, n in self._inputs if device == value), value)
        if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
            return value.item()
        return value

    def _device(self, node: fx.Node) -> fx.Node:
        return self._add("call_function", getattr, (node, "device"))

    def _cut(self, node: fx.Node) -> fx.Node:
        """Return a node with the value of `node` through which no gradient flows."""
        if node not in self._cuts:
            self._cuts[node] = self._add("call_method", "detach", (node,))
            self._free(self._cuts[node])
        return self._cuts[node]

    def _free(self, node: fx.Node) -> None:
        """Remember that no gradient flows through `node` as it is."""
        self._cuts[node] = node

    def _bind(self, value: Any, node: fx.Node) -> None:
        """Remember that `node` computes `value`, and its parts where `value` is a container."""
        if isinstance(value, Tensor):
            node = node if torch.is_grad_enabled() else self._cut(node)
            self._nodes[id(value)] = (value, node)
            return
        for key, part in _parts(value):
            if has_tensors(part):
                function = getattr if _is_object(value) else operator.getitem
                item = self._add("call_function", function, (node, key))
                if node in self._sized_by_values:
                    self._sized_by_values.add(item)
                if node in self._cuts and node.op != "call_module":
                    self._free(item)
                self._bind(part, item)

    # Calls

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
            self._check_read(func, args)
        if func is Tensor.unbind and self._node_of(args[0]) in self._sized_by_values:
            self.refuse_branch()
        with self.paused():
            out = func(*args, **kwargs)
        written = calls.writes(func.__name__, kwargs)
        if not written and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            return out
        op, target, spelled = calls.spell(func, args)
        return self._record(op, target, spelled, kwargs, out, written)

    def call(self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Call `module`: as one node where it is a leaf, else recording what it does inside."""
        path = self._paths.get(id(module))
        if path is None or not self.listens():
            return original(module, *args, **kwargs)
        if path in self._leaves:
            with self._blaming(path), self.paused():
                out = original(module, *args, **kwargs)
            written = getattr(module, "inplace", False) is True
            return self._record("call_module", path, args, kwargs, out, written)
        self._where.append(path)
        try:
            with self._blaming(path):
                if type(module).__name__ == "OptimizedModule":
                    return module._orig_mod(*args, **kwargs)  # pyright: ignore
                return original(module, *args, **kwargs)
        finally:
            self._where.pop()

    def apply(self, original: Callable[..., Any], function: type, args: Any, kwargs: Any) -> Any:
        """Call an autograd function as one node, since its backward is its own."""
        if not self.listens():
            return original(*args, **kwargs)
        if function.__name__ == "CheckpointFunction":  # what it runs is the model's own code
            return args[0](*args[2:])
        with self.paused():
            out = original(*args, **kwargs)
        return self._record("call_function", original, args, kwargs, out, False)

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
        if torch._C._is_any_autocast_enabled():
            self.refuse(
                f"{place_of(user_frame())} runs under autocast; use autocast around the model"
            )
        node = self._add(op, target, self._argument(tuple(args)), self._argument(dict(kwargs)))
        self._note_sizes(node, args, kwargs)
        if op != "call_module" and not torch.is_grad_enabled():
            self._free(node)
        if isinstance(out, Tensor) and id(out) in self._nodes:
            if written and self._nodes[id(out)][1] not in node.all_input_nodes:
                return out  # written through a detached alias: the tensor's history stays
            if not written:
                with self.paused():
                    out = out.detach()  # another object on the same memory
        if out is not None:
            self._bind(out, node)
        return out

    # Sizes, and values that code may not look at

    def number(self, value: Any, op: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Return `value`, carrying a node that computes it as `op(*args)` while recording."""
        if not self.listens() or not isinstance(value, int | float):
            return value
        node = self._add("call_function", op, self._argument(args))
        of_data = any(isinstance(arg, DataSize) for arg in args)
        return sized(value, self, lambda: node, of_data=of_data)

    def _size(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the sizes that `func` asks for, each carrying a node."""
        tensor = args[0]
        with self.paused():
            out = func(*args, **kwargs)
        node = self._node_of(tensor)
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
                self._sizes[node, dim] = self._add("call_method", method, (node, *rest))
            return self._sizes[node, dim]

        return sized(size, self, make, of_data=node in self._sized_by_values)

    def _note_sizes(self, node: fx.Node, args: Any, kwargs: Any) -> None:
        """Remember whether the size of what `node` gives depends on the values of tensors."""
        name = getattr(node.target, "__name__", node.target).removesuffix("_")
        sources = node.all_input_nodes
        if calls.sized_by_first(name) or calls.writes(str(node.target), node.kwargs):
            sources = sources[:1]
        if calls.sized_by_values(name, args, kwargs) or any(
            source in self._sized_by_values for source in sources
        ):
            self._sized_by_values.add(node)

    def refuse_branch(self) -> None:
        """Raise that a branch depends on a tensor's values, while recording."""
        frame = user_frame()
        if self.listens() and not asserts(frame):
            self.refuse(
                f"the branch at {place_of(frame)} depends on a tensor's value; "
                "mark the module a leaf with trace(model, ..., leaves=[...])"
            )

    def _check_read(self, func: Any, args: Any) -> None:
        """Raise if Python would see values that another run may change."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if not all(self._is_fixed(self._node_of(tensor)) for tensor in tensors):
            self.refuse_branch()

    def _is_fixed(self, node: fx.Node) -> bool:
        """Return whether `node` and all connected with it come from literals alone."""
        if node.target == "lt" and node.op == "call_method" and _draws_below_zero(node):
            return True
        seen, left = {node}, [node]
        while left:
            node = left.pop()
            stored = node.op == "get_attr" and not str(node.target).startswith("_constant")
            if stored or node.op in ("placeholder", "call_module") or calls.is_random(node):
                return False
            found = {*node.all_input_nodes, *node.users} - seen
            seen |= found
            left += found
        return True


def _draws_below_zero(node: fx.Node) -> bool:
    """Return whether `node` asks if torch.rand is below 0, as layers to drop never do."""
    drawn, bound = node.args[:2]
    is_rand = isinstance(drawn, fx.Node) and drawn.target is torch.rand
    return is_rand and isinstance(bound, int | float) and bound <= 0


def _like(value: tuple[Any, ...], parts: list[Any]) -> tuple[Any, ...]:
    """Return `parts` as a tuple, or a named tuple, like `value`."""
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def has_tensors(value: Any) -> bool:
    """Return whether `value` is a tensor or holds one, in containers or as an attribute."""
    return any(isinstance(leaf, Tensor) or _is_object(leaf) for leaf in tree_leaves(value))


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
