"""Which calls and layers an edit of an axis can concern, so that an edit looks at no others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import fx
from torch.utils._pytree import tree_leaves

from graphgrow.ir.analyse import Analysis, Slot


@dataclass(frozen=True)
class Concerned:
    """The nodes, by mode and name, and the leaf modules in which an axis takes part."""

    nodes: set[tuple[str, str]] = field(default_factory=set)
    leaves: dict[str, None] = field(default_factory=dict)


def concerned(
    structures: Mapping[str, fx.Graph], leaves: Iterable[str], analysis: Analysis
) -> dict[str, Concerned]:
    """Return by axis what computes or reads values, or numbers from their sizes, that have it."""
    holders = _by_value(analysis)
    found: defaultdict[str, Concerned] = defaultdict(Concerned)
    known = frozenset(leaves)
    for name, dims in analysis.state.items():
        owner = name.rpartition(".")[0]
        for axis in (axis for layout in dims for axis in layout.axes() if owner in known):
            found[axis].leaves[owner] = None
    for mode, structure in structures.items():
        given: dict[fx.Node, set[str]] = {}
        for node in structure.nodes:
            read = set().union(*(given[n] for n in node.all_input_nodes))
            value = analysis.nodes.get((mode, node.name))
            slots = [leaf.number for leaf in tree_leaves(value) if isinstance(leaf, Slot)]
            given[node] = set().union(*(holders[number] for number in slots)) if slots else read
            for axis in read | given[node]:
                found[axis].nodes.add((mode, node.name))
                if node.op == "call_module":
                    found[axis].leaves[str(node.target)] = None
    return found


def _by_value(analysis: Analysis) -> defaultdict[int, set[str]]:
    """Return the axes of each value by its number."""
    found: defaultdict[int, set[str]] = defaultdict(set)
    for axis, numbers in analysis.holding.items():
        for number in numbers:
            found[number].add(axis)
    return found
