"""The value that every pass reads and returns: a recorded model with its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from graphgrow.errors import NotApplicable
from graphgrow.ir.analyse import Analysis, Axis, Slot, analyse
from graphgrow.ir.concern import Concerned, concerned

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True, eq=False)
class Graph:
    """A traced model: structure (nodes, module paths, literals) and state (tensors by path).

    `train` and `eval` are the structures recorded in the two modes; they are one object where one
    structure serves both, its mode-dependent arguments read from `training` attributes. Neither is
    ever changed in place. `modules` holds every module of the model by path ("" is the root) as a
    template: class, attributes, hooks; `leaves` are the paths called as one node. `state` holds
    every parameter and buffer at each of its paths: the very tensors that `lower` will use.
    `example` has one value for each placeholder, `journal` the rewrites since the user's model.
    """

    train: fx.Graph
    eval: fx.Graph
    modules: Mapping[str, nn.Module]
    leaves: frozenset[str]
    state: Mapping[str, Tensor]
    example: tuple[Any, ...]
    journal: tuple[Any, ...] = ()

    @cached_property
    def analysis(self) -> Analysis:
        """The layouts, axes and steps, derived once when first asked for."""
        return analyse(self)

    @cached_property
    def concerned(self) -> Mapping[str, Concerned]:
        """What an edit of each axis can concern; widths do not matter for it."""
        return concerned({"train": self.train, "eval": self.eval}, self.leaves, self.analysis)

    def renewed(self) -> Graph:
        """Return the graph with an analysis of how it runs now, if it has grown since the last.

        Rewrites need none. What is measured at operators does: which ones run, and with what sizes
        in their arguments, may depend on widths.
        """
        if self.analysis.current:
            return self
        fresh = replace(self)
        return fresh if set(fresh.axes) == set(self.axes) else self

    @property
    def axes(self) -> Mapping[str, Axis]:
        """The axes by name, in topological order."""
        return self.analysis.axes

    def axis(self, path: str) -> Axis:
        """Return the axis of that name, or the one that the module or parameter there produces.

        Raises:
            NotApplicable: where there is none, or several; the sentence lists them.
        """
        if path in self.axes:
            return self.axes[path]
        found = [a for a in self.axes.values() if any(_at(p.path, path) for p in a.producers)]
        free = [a for a in found if a.obstacle is None] or found
        if len(free) == 1:
            return free[0]
        if not found:
            raise NotApplicable(
                f"cannot find axis '{path}': no module or parameter there writes one"
            )
        names = ", ".join(f"'{a.name}' ({a.width} units)" for a in found)
        raise NotApplicable(f"cannot tell which axis of '{path}' is meant: it writes {names}")

    def __str__(self) -> str:
        if self.train is self.eval:
            return self._code(self.eval, "eval")
        train, eval_ = self._code(self.train, "train"), self._code(self.eval, "eval")
        return f"in train mode:\n{train}\n\nin eval mode:\n{eval_}"

    def _code(self, structure: fx.Graph, mode: str) -> str:
        return "\n".join(self._line(node, mode) for node in structure.nodes)

    def _line(self, node: fx.Node, mode: str) -> str:
        if node.op == "output":
            return f"return {node.args[0]}"
        args = [*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())]
        target = node.target if isinstance(node.target, str) else node.target.__name__
        call = target if node.op in ("placeholder", "get_attr") else f"{target}({', '.join(args)})"
        shapes = ", ".join(self.layouts(node.name, mode))
        return f"{node.name} = {call}" + (f"  # {shapes}" if shapes else "")

    def layouts(self, node: str, mode: str = "eval") -> list[str]:
        """Return the layouts of each tensor that a node computes, as text."""
        value = self.analysis.nodes.get((mode, node))
        slots = [v for v in tree_leaves(value) if isinstance(v, Slot)]
        return [f"[{', '.join(map(str, self.analysis.values[s.number]))}]" for s in slots]

    def to_networkx(self, mode: str = "eval") -> nx.DiGraph:
        """Return the dataflow between nodes, each with its operator, target and layouts."""
        import networkx as nx  # 12 MiB that most programs do without

        flow = nx.DiGraph()
        for node in (self.train if mode == "train" else self.eval).nodes:
            layouts = self.layouts(node.name, mode)
            flow.add_node(node.name, op=node.op, target=str(node.target), layouts=layouts)
            flow.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
        return flow


def _at(parameter: str, path: str) -> bool:
    """Return whether a parameter is the one named, or one of the module named."""
    return parameter == path or parameter.rpartition(".")[0] == path
