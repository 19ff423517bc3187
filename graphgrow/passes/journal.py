"""Rewrites as JSON, both ways."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

from graphgrow.passes.branch import Branch
from graphgrow.passes.branch_layers import Residual, Skip, TransformerBlock
from graphgrow.passes.cap import Cap
from graphgrow.passes.deepen import Deepen
from graphgrow.passes.fold import Fold
from graphgrow.passes.fresh import UnitLength
from graphgrow.passes.identity import Identity
from graphgrow.passes.layers import Factor, Split
from graphgrow.passes.merge import Merge
from graphgrow.passes.remove import Absorb, Remove
from graphgrow.passes.rewrite import Rewrite
from graphgrow.passes.weights import Copy, Given, MeanFill, Pairs, ZeroIncoming, ZeroOutgoing
from graphgrow.passes.widen import Widen

_KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        *(Widen, ZeroOutgoing, ZeroIncoming, Pairs, Copy, Given, MeanFill, UnitLength),
        *(Deepen, Identity, Factor, Split),
        *(Remove, Absorb, Merge, Cap),
        *(Branch, Skip, Residual, TransformerBlock, Fold),
    )
}


def rewrites_to_json(rewrites: Iterable[Rewrite]) -> list[dict[str, Any]]:
    """Return the rewrites as plain lists, dicts, numbers and strings."""
    return [_plain(rewrite) for rewrite in rewrites]


def rewrite_from_json(data: dict[str, Any]) -> Rewrite:
    """Return the rewrite that `rewrites_to_json` wrote.

    Raises:
        ValueError: where the data name a kind that is not known, or arguments it does not take.
    """
    found = _value(data)
    if not hasattr(found, "edit"):
        raise ValueError(f"cannot read a rewrite from {data!r}: it is none of {sorted(_KINDS)}")
    return found


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        given = {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
        return {"kind": type(value).__name__, **given}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _value(data: Any) -> Any:
    if isinstance(data, list):
        return tuple(_value(v) for v in data)
    if not isinstance(data, dict):
        return data
    kind = _KINDS.get(data.get("kind", ""))
    if kind is None:
        raise ValueError(f"cannot read a rewrite of kind {data.get('kind')!r}: it is not known")
    named = {name: _value(v) for name, v in data.items() if name != "kind"}
    unknown = set(named) - {f.name for f in fields(kind)}
    if unknown:
        raise ValueError(f"cannot read a {kind.__name__}: it takes no {sorted(unknown)}")
    return kind(**named)
