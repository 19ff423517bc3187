"""What a rewrite is, what applying one returns, and how its index map is stated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from graphgrow.errors import NotApplicable
from graphgrow.ir.graph import Graph


@dataclass(frozen=True, eq=False)
class TensorOrigin:
    """Where the entries of one changed tensor come from.

    `dims` has for each dim the old index of every new index, `(new size,)`, −1 for a new one, or
    None where that dim is as before. `scale` is new value over old value for every entry that was
    rescaled or split, in the new shape, or None where no entry was.
    """

    dims: tuple[Tensor | None, ...]
    scale: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Edit:
    """What a rewrite does to a graph: the graph it makes, where its tensors come from, why it may.

    Nothing of it is applied yet; `apply` checks it and makes it a `Grown`.
    """

    graph: Graph
    proof: Any
    origin: Mapping[str, TensorOrigin] = field(default_factory=dict)


class Rewrite(Protocol):
    """One edit of a graph: a frozen dataclass, hashable, JSON both ways."""

    @staticmethod
    def places(graph: Graph) -> Sequence[Any]:
        """Return what may be tried as the first argument on `graph`."""
        ...

    def obstacle(self, graph: Graph) -> str | None:
        """Return the sentence that says why this cannot be applied, None where it can."""
        try:
            self.edit(graph)
        except NotApplicable as error:
            return str(error)
        return None

    def edit(self, graph: Graph) -> Edit:
        """Return the edit of `graph`. Raises NotApplicable with the obstacle's sentence."""
        ...


def free_axes(graph: Graph) -> list[str]:
    """Return the axes that have no obstacle of their own."""
    return [axis.name for axis in graph.axes.values() if axis.obstacle is None]


@dataclass(frozen=True, eq=False)
class Grown:
    """What `apply` returns: the graph before and after, and how one came from the other.

    `origin` holds the changed tensors by path; a path of `graph.state` that `before.state` lacks is
    a new tensor.
    """

    before: Graph
    graph: Graph
    origin: Mapping[str, TensorOrigin]
    proof: Any
    rewrites: tuple[Any, ...]
