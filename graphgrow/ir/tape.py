"""The graph that a recording writes, and which of its nodes computes which tensor."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.fx.node import map_aggregate
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from graphgrow.errors import UnsupportedOp
from graphgrow.ir import calls
from graphgrow.ir.data_sizes import DataSizes
from graphgrow.ir.sizes import SizeNumber


class Tape:
    """The graph so far and the tensors that its nodes compute.

    `title` names the model in messages; `name_of` gives the path of a tensor that no node computes.
    """

    def __init__(self, title: str, name_of: Callable[[Tensor], str]) -> None:
        self.graph = fx.Graph()
        self.where = [""]  # the paths of the modules whose forwards are running
        self.refusal: UnsupportedOp | None = None  # kept, since the model's code may catch it
        self.data_sizes = DataSizes(self.node_of)
        self._title, self._name_of = title, name_of
        self._nodes: dict[int, tuple[Tensor, fx.Node]] = {}  # keeps tensors alive: ids stay unique
        self._cuts: dict[fx.Node, fx.Node] = {}  # what no_grad code reads instead of a node
        self._writes: defaultdict[fx.Node, list[fx.Node]] = defaultdict(list)
        self._inputs: list[tuple[torch.device, fx.Node]] = []

    def refuse(self, what: str) -> NoReturn:
        """Raise that what the running module does cannot be traced."""
        where = self.where[-1] or self._title
        self.refusal = self.refusal or UnsupportedOp(f"cannot trace {where!r}: {what}")
        raise self.refusal

    # Nodes

    def add(self, op: str, target: Any, args: Any = (), kwargs: Mapping | None = None) -> fx.Node:
        """Return a new node, marked with the module whose forward is running."""
        node = self.graph.create_node(op, target, args, dict(kwargs or {}))
        node.meta["module"] = self.where[-1]
        return node

    def placeholder(self, name: str, value: Any, default: tuple[Any, ...]) -> None:
        """Add an input of the model; tensors inside a container are taken out of it by nodes."""
        node = self.add("placeholder", name, default)
        self.bind(value, node)
        if isinstance(value, Tensor):
            self._inputs.append((value.device, node))

    def update(self, before: Tensor, after: Tensor) -> None:
        """Add nodes that write into the buffer `before` what the run put in its place."""
        new = self.add("call_method", "detach", (self.node_of(after),))
        self.add("call_method", "copy_", (self.node_of(before), new))

    def output(self, value: Any) -> None:
        """Add the output node and remove what nothing needs."""
        self.add("output", "output", (self._result(value),))
        self.graph.eliminate_dead_code(is_impure_node=calls.is_needed)

    def _result(self, value: Any) -> Any:
        """Return what the output node must hold to give `value` again, its classes kept."""
        if is_dataclass(value) and not isinstance(value, type):
            parts = {f.name: self._result(getattr(value, f.name)) for f in fields(value)}
            return self.add("call_function", type(value), (), parts)
        if isinstance(value, dict):
            parts = {key: self._result(part) for key, part in value.items()}
            is_plain = isinstance(value, defaultdict) or type(value) is dict
            return parts if is_plain else self.add("call_function", type(value), (parts,))
        if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
            parts = [self._result(part) for part in value]
            if isinstance(value, list):
                return parts
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if isinstance(value, torch.Size | Tensor | int | float | complex | str | None):
            return self.argument(value)
        self.refuse(
            f"it returns a {type(value).__name__}; return tensors, numbers, tuples, lists, dicts "
            "or dataclasses"
        )

    # Tensors and arguments

    def knows(self, tensor: Tensor) -> bool:
        """Return whether a node stands for `tensor`."""
        return id(tensor) in self._nodes

    def node_of(self, tensor: Tensor) -> fx.Node:
        """Return the node that computes `tensor`, or the get_attr node of a stored tensor."""
        if not self.knows(tensor):
            if is_functorch_wrapped_tensor(tensor):
                self.refuse("its code runs under a transform of torch.func; make it a leaf")
            self._nodes[id(tensor)] = (tensor, self.add("get_attr", self._name_of(tensor)))
        return self._nodes[id(tensor)][1]

    def bind(self, value: Any, node: fx.Node) -> None:
        """Remember that `node` computes `value`, and its parts where `value` is a container."""
        if isinstance(value, Tensor):
            self._nodes[id(value)] = (value, self._read(node))
            return
        for key, part in _parts(value):
            if has_tensors(part):
                take = getattr if _is_object(value) else operator.getitem
                item = self._part_of(node, take, key)
                self.data_sizes.note_part(node, item, part)
                self.bind(part, item)

    def _part_of(self, node: fx.Node, take: Callable[..., Any], key: Any) -> fx.Node:
        item = self.add("call_function", take, (node, key))
        if self._cuts.get(node) is node:
            self.cut_off(item)
        return item

    def argument(self, value: Any) -> Any:
        """Return `value` with every tensor and size in it replaced by its node."""
        if isinstance(value, PackedSequence):  # not even its parts' nodes make one
            return self.add("call_function", PackedSequence, self.argument(tuple(value)))
        if type(value) is tuple:
            return tuple(self.argument(part) for part in value)
        if type(value) is dict:
            return {key: self.argument(part) for key, part in value.items()}
        return map_aggregate(value, self._leaf)

    def _leaf(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._read(self.node_of(value))
        if isinstance(value, SizeNumber):
            return value.node()
        if isinstance(value, torch.device):
            nodes = (node for device, node in self._inputs if device == value)
            node = next(nodes, None)
            return self.add("call_function", getattr, (node, "device")) if node else value
        if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
            return value.item()
        return value

    # Gradients: code under no_grad reads detached nodes, so that a graph needs no such regions

    def _read(self, node: fx.Node) -> fx.Node:
        """Return `node`, or where gradients are off a node of its value without its history."""
        if torch.is_grad_enabled():
            return node
        if node not in self._cuts:
            self._cuts[node] = self.add("call_method", "detach", (node,))
            self.cut_off(self._cuts[node])
        return self._cuts[node]

    def cut_off(self, node: fx.Node) -> None:
        """Remember that no gradient flows through `node` as it is."""
        self._cuts[node] = node

    # What depends on values

    def note_write(self, node: fx.Node) -> None:
        """Remember that `node` changes its first input, and what that input is a view of."""
        for changed in calls.viewed(node):
            self._writes[changed].append(node)

    def is_fixed(self, node: fx.Node, *, but_for_sizes: bool) -> bool:
        """Return whether `node` comes from literals alone, or from literals and sizes."""
        if _never_true(node):
            return True
        seen, left = {node}, [node]
        while left:
            node = left.pop()
            is_size = calls.gives_size(node) and not self.data_sizes.of(node.args[0])
            if calls.gives_device(node) or (is_size and but_for_sizes):
                continue
            stored = node.op == "get_attr" and not str(node.target).startswith("_constant")
            if stored or node.op in ("placeholder", "call_module") or calls.is_random(node):
                return False
            found = {*node.all_input_nodes, *self._writes[node]} - seen
            seen |= found
            left += found
        return True


def _never_true(node: fx.Node) -> bool:
    """Return whether `node` asks if torch.rand is below 0, as code that drops no layers does."""
    if (node.op, node.target) != ("call_method", "lt"):
        return False
    drawn, bound = node.args
    is_rand = isinstance(drawn, fx.Node) and drawn.target is torch.rand
    return is_rand and isinstance(bound, int | float) and bound <= 0


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
