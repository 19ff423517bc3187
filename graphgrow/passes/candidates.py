"""Which rewrites of a kind a graph admits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from graphgrow.ir.graph import Graph
from graphgrow.passes.rewrite import Rewrite


def candidates(graph: Graph, kind: type[Rewrite], **arguments: Any) -> list[Rewrite]:
    """Return every rewrite of `kind` with these arguments that has no obstacle on `graph`."""
    at = cast(Callable[..., Rewrite], kind)
    places = (p if isinstance(p, tuple) else (p,) for p in kind.places(graph))
    made = (at(*place, **arguments) for place in places)
    return [rewrite for rewrite in made if rewrite.obstacle(graph) is None]
