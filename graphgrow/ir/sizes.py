"""Numbers that remember which node of a recorded graph computes them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Protocol

from torch import fx


class Recording(Protocol):
    """What a number needs of whoever records."""

    def number(self, value: Any, op: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Return `value`, carrying a node that computes it as `op(*args)` while recording."""
        ...

    def refuse_branch(self) -> None:
        """Raise that a branch depends on a tensor's values, while recording."""
        ...


class SizeNumber:
    """What numbers with a node share: their recording, and the node, made when first asked for."""

    recording: Recording
    make: Callable[[], fx.Node]

    def node(self) -> fx.Node:
        """Return the node that computes this number."""
        return self.make()

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


class DataSize(SizeInt):
    """A size that depends on the values of a tensor (`nonzero`): no branch may look at it."""


def sized(
    value: int | float, recording: Recording, make: Callable[[], fx.Node], *, of_data: bool = False
) -> SizeInt | SizeFloat:
    """Return `value` as a number whose node is `make()`; `of_data` if tensor values decide it."""
    kind = SizeFloat if isinstance(value, float) else DataSize if of_data else SizeInt
    number = kind(value)
    number.recording, number.make = recording, make
    return number


def plain(value: Any) -> Any:
    """Return a bare int or float for a node-carrying one, and any other value as it is."""
    if isinstance(value, SizeInt):
        return int.__int__(value)
    return float.__float__(value) if isinstance(value, SizeFloat) else value


def _recorded(op: Callable[..., Any], *, reflected: bool = False) -> Callable[..., Any]:
    def method(self: SizeNumber, *others: Any) -> Any:
        if not all(isinstance(other, int | float) for other in others):
            return NotImplemented
        args = (*others, self) if reflected else (self, *others)
        return self.recording.number(op(*map(plain, args)), op, args)

    return method


def _divmod(self: Any, other: Any) -> Any:
    return self // other, self % other


def _reflected_divmod(self: Any, other: Any) -> Any:
    return other // self, other % self


def _refused(name: str) -> Callable[..., Any]:
    compare = getattr(int, name)

    def method(self: DataSize, *others: Any) -> Any:
        self.recording.refuse_branch()
        return compare(self, *others)

    return method


for _kind in (SizeInt, SizeFloat):
    for _name in "add sub mul floordiv truediv mod pow".split():
        _op = getattr(operator, _name)
        setattr(_kind, f"__{_name}__", _recorded(_op))
        setattr(_kind, f"__r{_name}__", _recorded(_op, reflected=True))
    setattr(_kind, "__neg__", _recorded(operator.neg))  # noqa: B010
    setattr(_kind, "__divmod__", _divmod)  # noqa: B010
    setattr(_kind, "__rdivmod__", _reflected_divmod)  # noqa: B010
for _op in (math.floor, math.ceil, math.trunc, round):
    setattr(SizeFloat, f"__{_op.__name__}__", _recorded(_op))
for _name in "__lt__ __le__ __eq__ __ne__ __gt__ __ge__ __bool__".split():
    setattr(DataSize, _name, _refused(_name))
setattr(DataSize, "__hash__", int.__hash__)  # noqa: B010
