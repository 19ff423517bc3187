"""What a rewrite is, what applying one returns, and how its index map is stated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

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
