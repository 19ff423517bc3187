"""Deepening: a new layer that computes the identity, before or after a module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphgrow.errors import NotApplicable
from graphgrow.ir.assemble import shell, twin
from graphgrow.ir.graph import Graph
from graphgrow.passes.identity import Identity, is_activation
from graphgrow.passes.layers import Factor
from graphgrow.passes.place import Insertion, Layer, Part, Place, first_input, input_dim, is_layer
from graphgrow.passes.prove import Proof
from graphgrow.passes.rewrite import Edit, Rewrite, TensorOrigin


@dataclass(frozen=True)
class Deepen(Rewrite):
    """Insert a layer that computes the identity at a module: each time that it is called.

    `at` is the path of a linear or convolution layer, before which the layer goes, or of an
    activation, after which it goes. `layer` says what it is: `Identity`, `Factor` or `Split`; left
    out, it is an `Identity` where the values there come from an idempotent activation, else a
    `Factor`.

    New modules stand beside `at`, named after it: `fc_in` and `fc_act` before `fc`, `relu_out` and
    `relu_act` after `relu`, with a number where the name is taken. Mode, dtype, device and
    `requires_grad` are those of `at` (of the nearest weights before it, for an activation). Where
    the weight of `at` is multiplied by an inverse, none of its entries is an old one any more: all
    count as new in the origin, so that an optimizer starts them at age zero.
    """

    at: str
    layer: Layer | None = None

    @staticmethod
    def places(graph: Graph) -> list[str]:
        """Return the paths of the layers and activations that are called."""
        called = {
            str(node.target): None
            for structure in (graph.train, graph.eval)
            for node in structure.nodes
            if node.op == "call_module"
        }
        return [p for p in called if is_layer(graph.modules[p]) or is_activation(graph.modules[p])]

    def edit(self, graph: Graph) -> Edit:
        """Return the edit of `graph`. Raises NotApplicable with the obstacle's sentence."""
        place = _place(graph, self.at)
        layer, found = self._chosen(place)
        done = replace(self, layer=layer)
        grown, names = _inserted(place, found)
        lines = tuple(line.format(**names) for line in found.lines)
        exact = found.modes == ("train", "eval")
        proof = Proof(str(done), exact, found.modes, lines=lines, rounding=found.rounding)
        origin = _origin(place, found.tensors)
        return Edit(replace(grown, journal=(*graph.journal, done)), proof, origin)

    def _chosen(self, place: Place) -> tuple[Layer, Insertion]:
        """Return the scheme and what it inserts: the one given, or the first that fits."""
        if self.layer is not None:
            return self.layer, self.layer.insertion(place)
        if not is_layer(place.module):
            return Identity(), Identity().insertion(place)
        try:
            return Identity(), Identity().insertion(place)
        except NotApplicable:
            return Factor(), Factor().insertion(place)


def _place(graph: Graph, path: str) -> Place:
    """Return the place of a module by any of its paths, the one that is called first."""
    if path not in graph.modules:
        raise NotApplicable(
            f"cannot deepen at '{path}': the model has no such module; give one of those that "
            "Deepen.places lists"
        )
    module = graph.modules[path]
    found = tuple(
        (mode, node)
        for mode, structure in (("train", graph.train), ("eval", graph.eval))
        for node in structure.nodes
        if node.op == "call_module" and graph.modules[str(node.target)] is module
    )
    if not found:
        raise NotApplicable(
            f"cannot deepen at '{path}': no node of the graph calls this {type(module).__name__}; "
            "give a layer or an activation that the model calls"
        )
    return Place(graph, str(found[0][1].target), module, found)


def _origin(place: Place, tensors: Mapping[str, Tensor]) -> dict[str, TensorOrigin]:
    """Return the origin of the place's weight where it is changed: its entries are all new."""
    if "weight" not in tensors:
        return {}
    weight, read = tensors["weight"], input_dim(place.module)
    new = torch.full((weight.shape[read],), -1)
    dims = tuple(new if d == read else None for d in range(weight.dim()))
    return {path: TensorOrigin(dims) for path in _paths(place, "weight")}


def _paths(place: Place, name: str) -> Iterable[str]:
    """Return every path of a tensor of the module at a place, which may stand at several."""
    tensor = place.graph.state[f"{place.path}.{name}"]
    return [path for path, other in place.graph.state.items() if other is tensor]


# ------------------------------------------------------------------------------ the new graph


def _inserted(place: Place, found: Insertion) -> tuple[Graph, dict[str, str]]:
    """Return the graph with the parts of an insertion, and the path of each by its suffix."""
    graph = place.graph
    names = _names(place, found.parts)
    train = _structure(graph.train, place, found, names)
    same = graph.eval is graph.train
    eval_ = train if same else _structure(graph.eval, place, found, names)
    modules, state = _replaced(place, found)
    leaves = set(graph.leaves)
    for part in found.parts:
        if part.module is not None:
            template, tensors = _made(place, part.module, part.tensors, found.like)
            for path in _beside(place, names[part.suffix]):
                modules[path] = template
                state.update({f"{path}.{name}": t for name, t in tensors.items()})
                leaves.add(path)
    changed = replace(
        graph, train=train, eval=eval_, modules=modules, leaves=frozenset(leaves), state=state
    )
    return changed, names


def _made(
    place: Place, module: nn.Module, values: Mapping[str, Tensor], like: Tensor | None
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a new module's template and tensors, of the place's mode and of the type of `like`."""
    template = shell(module, keep_class=True)
    template.training = place.module.training
    tensors = {}
    for name, value in values.items():
        assert like is not None
        kind = like.dtype if value.is_floating_point() else value.dtype
        moved = _plain(value.to(device=like.device, dtype=kind))
        learned = name in module._parameters
        tensors[name] = nn.Parameter(moved, like.requires_grad) if learned else moved
    return template, tensors


def _plain(values: Tensor) -> Tensor:
    """Return a tensor with the strides that a loaded one has, on which kernels may depend."""
    return values.clone(memory_format=torch.contiguous_format)


def _names(place: Place, parts: tuple[Part, ...]) -> dict[str, str]:
    """Return a free path for each part, beside the place and named after it."""
    graph = place.graph
    taken = {*graph.modules, *graph.state}
    endings = chain([""], map(str, count(2)))
    for ending in endings:
        names = {part.suffix: f"{place.path}_{part.suffix}{ending}" for part in parts}
        if not any(set(_beside(place, path)) & taken for path in names.values()):
            return names
    raise AssertionError("numbers do not end")


def _beside(place: Place, path: str) -> list[str]:
    """Return the paths at which a new module at `path` is seen, where its owner has several."""
    owner, _, name = path.rpartition(".")
    modules = place.graph.modules
    twins = [p for p, module in modules.items() if module is modules[owner]]
    return [f"{p}.{name}" if p else name for p in twins]


def _replaced(place: Place, found: Insertion) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    """Return all modules and tensors, those of the place with their new values."""
    graph, module = place.graph, place.module
    modules, state = dict(graph.modules), dict(graph.state)
    told = {n: v for n, v in found.attributes.items() if getattr(module, n) != v}
    if told:
        fresh = shell(module, keep_class=True)
        fresh.__dict__.update(told)
        modules = {p: fresh if m is module else m for p, m in modules.items()}
    for name, values in found.tensors.items():
        old = graph.state[f"{place.path}.{name}"]
        new = twin(old, _plain(values.to(device=old.device, dtype=old.dtype)))
        state.update(dict.fromkeys(_paths(place, name), new))
    return modules, state


def _structure(
    structure: fx.Graph, place: Place, found: Insertion, names: Mapping[str, str]
) -> fx.Graph:
    """Return a copy of a structure with calls of the new parts at each call of the place."""
    made, copies = fx.Graph(), {}
    made.output(made.graph_copy(structure, copies))
    for call in [n for n in structure.nodes if n in {node for _, node in place.calls}]:
        node = copies[call]
        if found.after:
            _insert_after(made, node, found.parts, names)
        else:
            _insert_before(made, node, found.parts, names)
    return made


def _insert_before(
    made: fx.Graph, node: fx.Node, parts: tuple[Part, ...], names: Mapping[str, str]
) -> None:
    value = first_input(node)
    with made.inserting_before(node):
        last = _called(made, value, node, parts, names)
    node.args, node.kwargs = _with_input(node, last)


def _insert_after(
    made: fx.Graph, node: fx.Node, parts: tuple[Part, ...], names: Mapping[str, str]
) -> None:
    readers = list(node.users)
    with made.inserting_before(node.next):
        last = _called(made, node, node, parts, names)
    for reader in readers:
        reader.replace_input_with(node, last)


def _called(
    made: fx.Graph,
    value: fx.Node,
    owner: fx.Node,
    parts: tuple[Part, ...],
    names: Mapping[str, str],
) -> fx.Node:
    """Return the last of the calls of all parts, the first of which reads `value`."""
    for part in parts:
        if part.call is None:
            value = made.create_node("call_module", names[part.suffix], (value,))
        else:
            args, kwargs = _with_input(part.call, value)
            value = made.create_node(part.call.op, part.call.target, args, kwargs)
        value.meta["module"] = owner.meta.get("module", "")
    return value


def _with_input(node: fx.Node, value: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's arguments with `value` read first."""
    if node.args:
        return (value, *node.args[1:]), dict(node.kwargs)
    return (), {**node.kwargs, "input": value}
