"""New units tried out: what they would give to the layers that read them, for any weights.

The widened graph itself computes it, so that whatever stands between the layers that write an axis
and those that read it is followed: norms, activations, poolings, products, sums of branches.
Nothing reads the new units yet, so all that does not carry the axis is computed once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from graphgrow.errors import NotApplicable
from graphgrow.ir.analyse import Slot
from graphgrow.ir.assemble import assemble, place
from graphgrow.ir.graph import Graph
from graphgrow.measure.capture import apart
from graphgrow.measure.patches import patches, rows, summable
from graphgrow.measure.routes import Product
from graphgrow.measure.sample import reading
from graphgrow.passes.apply import apply
from graphgrow.passes.units import Resized, inserted
from graphgrow.passes.weights import ZeroOutgoing
from graphgrow.passes.widen import Widen

_CONTRACTIONS = {"linear", "conv1d", "conv2d", "conv3d", "matmul", "mm", "addmm", "__matmul__"}


class Trial:
    """`units` new units of an axis of a graph on the inputs of one batch, in eval mode.

    Raises:
        NotApplicable: where new units that nothing reads would change the function, or where they
            are read by something else than a plain weight.
    """

    def __init__(self, graph: Graph, axis: str, units: int, inputs: Any) -> None:
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        found = graph.axis(axis)
        self.uses, self.examples, self.units = reading(graph, found.name), len(given[0]), units
        wide = apply(graph, Widen(found.name, units, weights=ZeroOutgoing()), verify=False).graph
        self.change = Resized(graph.analysis, found.name, inserted(found.width, units, None))
        self.state = {path: tensor.detach() for path, tensor in wide.state.items()}
        self.read = {
            use.weight: self._places(use.weight, 1 if use.window else 1 - use.out)
            for use in self.uses
        }
        self.written = {
            at.path: (at.dim, self._places(at.path, at.dim))
            for at in (*found.carriers, *found.producers)
        }
        tied = graph.analysis.tied
        self.paths = {path: [p for p in tied if tied[p] == path] for path in self.written}
        self.tree = assemble(wide.modules, wide.leaves, apart(wide.state)).eval()
        self.run = fx.Interpreter(self.tree, garbage_collect_values=False, graph=wide.eval)
        self.run.extra_traceback = False
        with torch.no_grad():
            self.run.run(*tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, given))
        self.nodes = self._carrying(wide.eval)

    def _carrying(self, structure: fx.Graph) -> list[fx.Node]:
        """Return the nodes that carry the axis, up to the last that reads it."""
        analysis, readers = self.change.analysis, {use.step.node for use in self.uses}
        held = analysis.holding[self.change.axis]

        def carries(node: fx.Node) -> bool:
            return bool(held & _numbers(analysis.nodes.get(("eval", node.name))))

        order = [n for n in structure.nodes if n.name in readers or carries(n)]
        last = max(k for k, n in enumerate(order) if n.name in readers)
        return [n for n in order[: last + 1] if n.op not in ("placeholder", "output")]

    def activations(self, weights: Mapping[str, Tensor]) -> dict[Product, Tensor]:
        """Return what new units give to each use: `(g, units, entries, n, *positions)`.

        `weights` are entries of the new units by parameter path, in the shape that `Given` takes;
        what is not named stays as it was drawn. The result follows them by autograd.
        """
        for path, entries in weights.items():
            tensor = self._written(path, entries)
            for same in self.paths[path]:
                owner, _, name = same.rpartition(".")
                place(self.tree.get_submodule(owner), name, tensor)
        expected: dict[str, list[Product]] = {}
        for use in self.uses:
            expected.setdefault(use.weight, []).append(use)
        reads = _Reads({path: self._tensor(path) for path in expected})
        for node in self.nodes:
            with reads:
                self.run.env[node] = self.run.run_node(node)
        given: dict[Product, Tensor] = {}
        for path, uses in expected.items():
            if len(reads.found[path]) != len(uses):
                raise NotApplicable(
                    f"cannot try units of axis '{self.change.axis}': '{path}' is not called as a "
                    "linear or convolution layer calls its weight"
                )
            given |= {u: self._new(u, x) for u, x in zip(uses, reads.found[path], strict=True)}
        return given

    def _tensor(self, path: str) -> Tensor:
        owner, _, name = path.rpartition(".")
        return getattr(self.tree.get_submodule(owner), name)

    def _written(self, path: str, entries: Tensor) -> Tensor:
        """Return a tensor of the wider graph with these entries of the new units."""
        dim, places = self.written[path]
        tensor = self.state[path].movedim(dim, 0)
        values = entries.to(tensor).reshape(len(places), *tensor.shape[1:])
        return tensor.index_copy(0, places, values).movedim(0, dim)

    def _new(self, use: Product, x: Tensor) -> Tensor:
        """Return the new units of what a use reads, its patches by unit."""
        places = self.read[use.weight]
        if use.window is None:
            x = x.flatten(0, -2).index_select(-1, places)
        else:
            x = x.unflatten(1, (use.window.groups, -1)).index_select(2, places).flatten(1, 2)
        kernel = tuple(self.state[use.weight].shape[2:])
        return by_candidate(use, x, kernel, self.examples, self.units)

    def _places(self, path: str, dim: int) -> Tensor:
        """Return where a tensor has the new units in one dim."""
        places = self.change.at(path, dim)[self.change.new].reshape(-1)
        return torch.from_numpy(places).to(self.state[path].device)


def by_candidate(
    use: Product, x: Tensor, kernel: tuple[int, ...], examples: int, count: int
) -> Tensor:
    """Return what `count` candidates give to one use: `(g, count, entries, n, *positions)`.

    `x` is what they give as a layer would read it, that of each candidate together: the last dim
    `(count ...)` for a linear layer, the second `(g count ...)` for a convolution.
    """
    x = summable(x)
    if use.window is None:
        return rows(x, examples).unflatten(1, (count, -1))
    groups = use.window.groups
    found = patches(x.contiguous(), replace(use.window, groups=1), kernel)[0]
    return found.unflatten(0, (groups, count, -1))


def _numbers(value: Any) -> set[int]:
    return {v.number for v in tree_leaves(value) if isinstance(v, Slot)}


class _Reads(TorchFunctionMode):
    """Notes what is multiplied by some weights, as part of what autograd follows."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.paths = {_memory(weight): path for path, weight in weights.items()}
        self.found: dict[str, list[Tensor]] = {path: [] for path in weights}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") in _CONTRACTIONS:
            operands = [*args, *(kwargs or {}).values()]
            for x, weight in pairwise(operands):
                if isinstance(x, Tensor) and isinstance(weight, Tensor):
                    path = self.paths.get(_memory(weight))
                    if path is not None:
                        self.found[path].append(x)
        return func(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> tuple[Any, Any]:
    """Return what a weight and its transposed view have in common."""
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset()
