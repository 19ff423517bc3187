"""Joining the graphs of train and eval mode into one where only flags differ."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx


def join(train: fx.Graph, eval_: fx.Graph) -> tuple[fx.Graph, fx.Graph]:
    """Return one graph twice if the two differ only in flags that follow the mode, else both.

    A flag that is True in train mode and False in eval mode becomes a get_attr node of the
    `training` attribute of the module whose code passed it; the opposite flag is its `not`, and a
    float that is 0 in one of the modes, such as a dropout rate, is a product with the flag.
    """
    pairs = list(zip(train.nodes, eval_.nodes, strict=False))
    if len(train.nodes) != len(eval_.nodes):
        return train, eval_
    twins = dict(pairs)
    if not all(_match(one, other, twins) for one, other in pairs):
        return train, eval_
    flags: dict[tuple[str, bool], fx.Node] = {}
    for one, other in pairs:
        one.args = _merge(one.args, other.args, one, flags)
        one.kwargs = _merge(one.kwargs, other.kwargs, one, flags)
    return train, train


def _match(one: fx.Node, other: fx.Node, twins: dict[fx.Node, fx.Node]) -> bool:
    """Return whether two nodes do the same on the same values, flags aside."""
    return (
        (one.op, one.target, one.meta["module"]) == (other.op, other.target, other.meta["module"])
        and _same(one.args, other.args, twins)
        and _same(one.kwargs, other.kwargs, twins)
    )


def _same(one: Any, other: Any, twins: dict[fx.Node, fx.Node]) -> bool:
    """Return whether two arguments are the same value, flags aside."""
    if isinstance(one, fx.Node):
        return twins[one] is other
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other, [twins] * len(one)))
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same(one[k], other[k], twins) for k in one)
    if isinstance(one, slice):
        return _same(_bounds(one), _bounds(other), twins)
    return isinstance(one, bool) or one is other or one == other or _is_rate(one, other)


def _is_rate(one: Any, other: Any) -> bool:
    """Return whether two floats are one rate that a mode switches off."""
    return isinstance(one, float) and one != other and 0.0 in (one, other)


def _merge(one: Any, other: Any, user: fx.Node, flags: dict[tuple[str, bool], fx.Node]) -> Any:
    """Return argument `one` of `user` with each flag that differs from `other`'s made a node."""
    if isinstance(one, bool) and one is not other:
        return _flag(user, one, flags)
    if _is_rate(one, other):
        with user.graph.inserting_before(user):
            rate = user.graph.call_function(
                operator.mul, (_flag(user, one != 0, flags), one or other)
            )
        rate.meta["module"] = user.meta["module"]
        return rate
    if isinstance(one, tuple | list):
        items = [_merge(a, b, user, flags) for a, b in zip(one, other, strict=True)]
        if isinstance(one, list):
            return items
        return type(one)(*items) if hasattr(one, "_fields") else tuple(items)
    if isinstance(one, dict):
        return {key: _merge(one[key], other[key], user, flags) for key in one}
    if isinstance(one, slice):
        return slice(*_merge(_bounds(one), _bounds(other), user, flags))
    return one


def _flag(user: fx.Node, in_train: bool, flags: dict[tuple[str, bool], fx.Node]) -> fx.Node:
    """Return the node of a flag that is `in_train` in train mode, made before its first user."""
    path = user.meta["module"]
    if (path, in_train) not in flags:
        if in_train:
            target = f"{path}.training" if path else "training"
            make = ("get_attr", target, ())
        else:
            make = ("call_function", operator.not_, (_flag(user, True, flags),))
        with user.graph.inserting_before(user):
            flags[path, in_train] = user.graph.create_node(*make)
        flags[path, in_train].meta["module"] = path
    return flags[path, in_train]


def _bounds(piece: slice) -> tuple[Any, Any, Any]:
    return piece.start, piece.stop, piece.step
