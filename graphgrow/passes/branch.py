"""Branches: what a layer or two make of one value is added to another, and is zero at first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, count
from operator import add
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphgrow.errors import NotApplicable
from graphgrow.ir.analyse import Slot
from graphgrow.ir.graph import Graph
from graphgrow.ir.layout import Layout
from graphgrow.ir.trace import trace
from graphgrow.passes.branch_layers import BranchLayers, Ends, Skip
from graphgrow.passes.prove import Proof
from graphgrow.passes.rewrite import Edit

MODES = ("train", "eval")


@dataclass(frozen=True)
class Branch:
    """Add to the value of `target` what new layers make of the value of `source`.

    Both are paths of modules that are called once, or names of nodes as `print(graph)` shows them;
    `source` may be `target` itself, which makes a residual branch. Their values must agree in all
    but the number of units. `layers` are `Skip` (a projection), `Residual` or `TransformerBlock`;
    their last weights are zero, and nothing else is, so the branch learns from the first step on.
    New modules stand beside the target, at `<target>_branch`.

    Source: Zhang, Dauphin & Ma (2019), Fixup, zero last layers; Gesmundo & Maile (2023) for blocks.
    """

    source: str
    target: str
    layers: BranchLayers = field(default_factory=Skip)

    @staticmethod
    def places(graph: Graph) -> list[tuple[str, str]]:
        """Return the pairs of source and target whose values agree in all but their units."""
        named = [place for place in _places(graph) if _is_joined(graph, place)]
        return [
            (a.name, b.name)
            for j, b in enumerate(named)
            for a in named[: j + 1]
            if a.others == b.others and a.unit_dim == b.unit_dim
        ]

    def obstacle(self, graph: Graph) -> str | None:
        """Return the sentence that says why no branch can be added so, None where it can."""
        try:
            self._ends(graph)
        except NotApplicable as error:
            return str(error)
        return None

    def edit(self, graph: Graph) -> Edit:
        """Return the edit of `graph`. Raises NotApplicable with the obstacle's sentence."""
        source, target = self._ends(graph)
        ends = _sizes(graph, source, target)
        like = _like(graph, target)
        module = _typed(self.layers.module(ends), like).train(graph.modules[""].training)
        inner = trace(module, torch.zeros(ends.shape, dtype=like.dtype, device=like.device))
        prefix = _free_path(graph, target)
        nodes = {mode: (source.nodes[mode], target.nodes[mode]) for mode in MODES}
        train = _joined(graph.train, nodes["train"], inner.train, prefix)
        same = graph.eval is graph.train and inner.eval is inner.train
        grown = replace(
            graph,
            train=train,
            eval=train if same else _joined(graph.eval, nodes["eval"], inner.eval, prefix),
            modules={**graph.modules, **_under(prefix, inner.modules)},
            leaves=graph.leaves | set(_under(prefix, dict.fromkeys(inner.leaves))),
            state={**graph.state, **_under(prefix, inner.state)},
            journal=(*graph.journal, self),
        )
        zero = [f"'{prefix}.{name}'" for name in self.layers.zero]
        line = (
            f"{' and '.join(zero)} {'is' if len(zero) == 1 else 'are'} zero, and so is what it adds"
        )
        return Edit(grown, Proof(str(self), domain="all finite values", lines=(line,)))

    def _ends(self, graph: Graph) -> tuple[_Place, _Place]:
        places = {place.name: place for place in _places(graph)}
        where = f"cannot add a branch from '{self.source}' to '{self.target}'"
        for name in (self.source, self.target):
            if name not in places:
                raise NotApplicable(
                    f"{where}: '{name}' is no module or node that is called once in each mode and "
                    "gives one tensor with one dim of units; give a pair that Branch.places lists"
                )
        source, target = places[self.source], places[self.target]
        order = list(places)
        if order.index(self.source) > order.index(self.target):
            raise NotApplicable(f"{where}: '{self.source}' is computed after '{self.target}'")
        if source.unit_dim != target.unit_dim or source.others != target.others:
            said = [f"[{', '.join(map(str, place.dims))}]" for place in (source, target)]
            raise NotApplicable(
                f"{where}: their values have layouts {said[0]} and {said[1]}, which differ in more "
                "than the units"
            )
        self.layers.check(where, _sizes(graph, source, target))
        written = _written_later(graph, source, target)
        if written is not None:
            raise NotApplicable(
                f"{where}: '{written}' writes over '{self.source}' in place after '{self.target}' "
                "is computed; make it a new tensor"
            )
        return source, target


@dataclass(frozen=True, eq=False)
class _Place:
    """A value that a branch may read or add to: its nodes by mode, its layouts, its unit dim."""

    name: str
    nodes: Mapping[str, fx.Node]
    dims: tuple[Layout, ...]
    unit_dim: int

    @property
    def others(self) -> tuple[Layout, ...]:
        """The layouts of all dims but that of the units."""
        return self.dims[: self.unit_dim] + self.dims[self.unit_dim + 1 :]


def _places(graph: Graph) -> Iterator[_Place]:
    """Yield every value of one tensor that both modes compute once, in order."""
    train = {name: node for name, node in _called_once(graph.train)}
    written = {name for name, axis in graph.axes.items() if axis.producers}
    for name, node in _called_once(graph.eval):
        nodes = {"train": train.get(name), "eval": node}
        found = [_dims(graph, mode, n) for mode, n in nodes.items() if n is not None]
        if len(found) < 2 or found[0] != found[1] or found[0] is None:
            continue
        dims = found[0]
        holding = [d for d, layout in enumerate(dims) if written.intersection(layout.axes())]
        if len(dims) > 1 and holding in ([1], [len(dims) - 1]):
            yield _Place(name, {m: n for m, n in nodes.items() if n}, dims, holding[0])


def _called_once(structure: fx.Graph) -> list[tuple[str, fx.Node]]:
    """Return the calls of a structure by module path, or by their own name."""
    found: dict[str, list[fx.Node]] = {}
    for node in structure.nodes:
        if node.op == "call_module":
            found.setdefault(str(node.target), []).append(node)
        elif node.op in ("call_function", "call_method"):
            found.setdefault(node.name, []).append(node)
    return [(name, nodes[0]) for name, nodes in found.items() if len(nodes) == 1]


def _dims(graph: Graph, mode: str, node: fx.Node) -> tuple[Layout, ...] | None:
    value = graph.analysis.nodes.get((mode, node.name))
    return graph.analysis.values[value.number] if isinstance(value, Slot) else None


def _is_joined(graph: Graph, place: _Place) -> bool:
    """Return whether a place is worth listing: the value of a layer or a sum, no mere view."""
    node = place.nodes["eval"]
    called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op == "call_module" or called in ("add", "iadd", "add_", "__add__", "cat", "concat")


def _sizes(graph: Graph, source: _Place, target: _Place) -> Ends:
    widths = graph.analysis.widths()
    shape = tuple(layout.size(widths) for layout in source.dims)
    return Ends(shape, source.unit_dim, target.dims[target.unit_dim].size(widths))


def _like(graph: Graph, target: _Place) -> Tensor:
    """Return a parameter that writes the target's units: new ones get its dtype and device."""
    names = target.dims[target.unit_dim].axes()
    producers = [at for name in names if name in graph.axes for at in graph.axes[name].producers]
    return graph.state[producers[0].path]


def _typed(module: nn.Module, like: Tensor) -> nn.Module:
    """Return a module of the dtype, device and `requires_grad` of a parameter."""
    made = module.to(device=like.device, dtype=like.dtype)
    return made.requires_grad_(like.requires_grad)


def _written_later(graph: Graph, source: _Place, target: _Place) -> str | None:
    """Return what writes over the source in place once the branch has read it, None if nothing."""
    for mode, structure in (("train", graph.train), ("eval", graph.eval)):
        order = {node: i for i, node in enumerate(structure.nodes)}
        for user in source.nodes[mode].users:
            called = user.target if isinstance(user.target, str) else user.target.__name__
            module = graph.modules.get(str(user.target)) if user.op == "call_module" else None
            in_place = getattr(module, "inplace", False) or (
                user.op != "call_module" and called.endswith("_") and not called.endswith("__")
            )
            if in_place and source is not target and order[user] > order[target.nodes[mode]]:
                return user.name
    return None


def _free_path(graph: Graph, target: _Place) -> str:
    """Return a path beside the target that no module or tensor has."""
    node = target.nodes["eval"]
    owner = str(node.meta.get("module") or "")
    stem = target.name if node.op == "call_module" else ".".join(filter(None, (owner, target.name)))
    taken = {*graph.modules, *graph.state}
    if stem.rpartition(".")[0] not in graph.modules:
        stem = target.name.replace(".", "_")
    return next(
        path
        for end in chain([""], map(str, count(2)))
        if (path := f"{stem}_branch{end}") not in taken
    )


def _under(prefix: str, named: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{name}" if name else prefix: value for name, value in named.items()}


def _joined(
    structure: fx.Graph, ends: tuple[fx.Node, fx.Node], inner: fx.Graph, prefix: str
) -> fx.Graph:
    """Return a copy of a structure in which readers of the target read its sum with the branch."""
    made, copies = fx.Graph(), {}
    made.output(made.graph_copy(structure, copies))
    source, target = (copies[node] for node in ends)
    readers = list(target.users)
    owner = target.meta.get("module", "")
    with made.inserting_before(target.next):
        inside = {next(n for n in inner.nodes if n.op == "placeholder"): source}
        for node in inner.nodes:
            if node.op in ("placeholder", "output"):
                continue
            inside[node] = made.node_copy(node, inside.__getitem__)
            if node.op in ("call_module", "get_attr"):
                inside[node].target = f"{prefix}.{node.target}"
            inside[node].meta = {**node.meta, "module": prefix}
        result = next(n for n in inner.nodes if n.op == "output").args[0]
        assert isinstance(result, fx.Node)
        total = made.create_node("call_function", add, (target, inside[result]))
        total.meta["module"] = owner
    for reader in readers:
        reader.replace_input_with(target, total)
    return made
