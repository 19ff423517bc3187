"""Numbers that remember which node of a recorded graph computes them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import fx


class Recording(Protocol):
    """What a number needs of whoever records.

    `hidden` is what a `DataSize` seems to be, too large or too small to be used.
    """

    hidden: int

    def number(self, value: Any, op: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Return `value`, carrying a node that computes it as `op(*args)` while recording."""
        ...

    def refuse_branch(self) -> None:
        """Raise that a branch depends on a tensor's values, while recording."""
        ...

    def bare_int(self, number: Any) -> int:
        """Return the bare int of a number that tensor values decide; raise while recording."""
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


class DataNumber(SizeNumber):
    """A number that the values of a tensor decide: no branch may look at it.

    `value` is what it is. Code that takes it for a bare number (`list.__getitem__`) finds one that
    is of no use. One that counts `filled` places is not zero, whatever the values are.
    """

    value: Any
    filled: bool

    def __repr__(self) -> str:
        return repr(self.value)

    def __int__(self) -> int:
        return self.recording.bare_int(self)


class DataSize(DataNumber, SizeInt):
    """An int that the values of a tensor decide, as the size of what `nonzero` gives."""


class DataFloat(DataNumber, SizeFloat):
    """A float computed from a `DataSize`."""


def took_bare(error: Exception) -> bool:
    """Return whether code failed since it took a `DataSize` for a bare int."""
    return isinstance(error, OverflowError) or DataSize.__name__ in str(error)


def sized(value: int | float, recording: Recording, make: Callable[[], fx.Node]) -> Any:
    """Return `value` as a number whose node is `make()`."""
    number = SizeFloat(value) if isinstance(value, float) else SizeInt(value)
    number.recording, number.make = recording, make
    return number


def of_data(
    value: int | float, recording: Recording, make: Callable[[], fx.Node], *, filled: bool = False
) -> Any:
    """Return `value`, which tensor values decide, as a number whose node is `make()`."""
    is_float = isinstance(value, float)
    number = DataFloat(math.nan) if is_float else DataSize(recording.hidden)
    number.recording, number.make, number.value, number.filled = recording, make, value, filled
    return number


def plain(value: Any) -> Any:
    """Return a bare int or float for a node-carrying one, and any other value as it is."""
    if isinstance(value, DataNumber):
        return value.value
    if isinstance(value, SizeInt):
        return int.__int__(value)
    return float.__float__(value) if isinstance(value, SizeFloat) else value


def bare(value: Any) -> Any:
    """Return `value` with bare numbers in place of node-carrying ones, in containers too."""
    if isinstance(value, slice):
        return slice(bare(value.start), bare(value.stop), bare(value.step))
    if type(value) in (tuple, list, torch.Size):
        return type(value)(map(bare, value))
    if type(value) is dict:
        return {key: bare(part) for key, part in value.items()}
    return plain(value)


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
    def method(self: DataNumber, *others: Any) -> Any:
        if name not in _COMPARED or not (_is_of_zero(self, others) or _is_of_itself(self, others)):
            self.recording.refuse_branch()
        return getattr(self.value, name)(*map(plain, others))

    return method


def _is_of_zero(number: DataNumber, others: tuple[Any, ...]) -> bool:
    """Return whether a number that is not zero is compared with zero."""
    return number.filled and (not others or (type(others[0]) is int and others[0] == 0))


def _is_of_itself(number: DataNumber, others: tuple[Any, ...]) -> bool:
    """Return whether a number is compared with one that is the same whatever the values are."""
    return (
        len(others) == 1 and isinstance(others[0], DataNumber) and others[0].node() is number.node()
    )


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
_COMPARED = "__lt__ __le__ __eq__ __ne__ __gt__ __ge__ __bool__".split()
_BITS = "and or xor lshift rshift rand ror rxor rlshift rrshift abs invert float".split()
for _name in _COMPARED:
    setattr(DataSize, _name, _refused(_name))
    setattr(DataFloat, _name, _refused(_name))
for _name in _BITS:
    setattr(DataSize, f"__{_name}__", _refused(f"__{_name}__"))
setattr(DataSize, "__hash__", int.__hash__)  # noqa: B010
setattr(DataFloat, "__hash__", float.__hash__)  # noqa: B010
