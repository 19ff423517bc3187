"""Which rewrites of a kind a graph admits."""

from __future__ import annotations

from typing import Any

from graphgrow.ir.graph import Graph
from graphgrow.passes.rewrite import Rewrite


def candidates(graph: Graph, kind: type[Rewrite], **arguments: Any) -> list[Rewrite]:
    """Return every rewrite of `kind` with these arguments that has no obstacle on `graph`."""
    places = kind.places(graph)  # pyright: ignore[reportAttributeAccessIssue]
    made = (kind(place, **arguments) for place in places)
    return [rewrite for rewrite in made if rewrite.obstacle(graph) is None]
