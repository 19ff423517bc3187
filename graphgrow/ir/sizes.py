"""Numbers that remember which node of a recorded graph computes them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Protocol

from torch import fx


class Tape(Protocol):
    """What a number needs of its recorder: to say how it was computed from other numbers."""

    def number(self, value: Any, op: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Return `value`, carrying a node that computes it as `op(*args)` while recording."""


class SizeNumber:
    """What `SizeInt` and `SizeFloat` share: the tape and the node, made when first asked for."""

    _tape: Tape
    _make: Callable[[], fx.Node]

    def node(self) -> fx.Node:
        """Return the node that computes this number."""
        return self._make()

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        return plain(self)

    def __reduce__(self) -> Any:
        return type(plain(self)), (plain(self),)


class SizeInt(SizeNumber, int):
    """An int that carries the node which computes it; arithmetic on it is recorded."""


class SizeFloat(SizeNumber, float):
    """A float computed from sizes, with its node."""


def sized(value: int | float, tape: Tape, make: Callable[[], fx.Node]) -> SizeInt | SizeFloat:
    """Return `value` as a number whose node is `make()`."""
    number = SizeFloat(value) if isinstance(value, float) else SizeInt(value)
    number._tape, number._make = tape, make
    return number


def plain(value: Any) -> Any:
    """Return a bare int or float for a node-carrying one, and any other value as it is."""
    if isinstance(value, SizeInt):
        return int.__int__(value)
    return float.__float__(value) if isinstance(value, SizeFloat) else value


def _recorded(op: Callable[..., Any], *, reflected: bool = False) -> Callable[..., Any]:
    def method(self: Any, *others: Any) -> Any:
        if not all(isinstance(other, int | float) for other in others):
            return NotImplemented
        args = (*others, self) if reflected else (self, *others)
        return self._tape.number(op(*map(plain, args)), op, args)

    return method


def _divmod(self: Any, other: Any) -> Any:
    return self // other, self % other


def _rdivmod(self: Any, other: Any) -> Any:
    return other // self, other % self


for _kind in (SizeInt, SizeFloat):
    for _name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow"):
        _op = getattr(operator, _name)
        setattr(_kind, f"__{_name}__", _recorded(_op))
        setattr(_kind, f"__r{_name}__", _recorded(_op, reflected=True))
    _kind.__neg__ = _recorded(operator.neg)  # pyright: ignore[reportAttributeAccessIssue]
    _kind.__divmod__, _kind.__rdivmod__ = _divmod, _rdivmod
for _name in ("floor", "ceil", "trunc"):
    setattr(SizeFloat, f"__{_name}__", _recorded(getattr(math, _name)))
SizeFloat.__round__ = _recorded(round)  # pyright: ignore[reportAttributeAccessIssue]
