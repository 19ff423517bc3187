"""Seeing what torch's function modes do not show: modules, len, int, autograd functions, C++ code.

Code that asks torch whether it is being traced is told that it is, since what it then does is meant
to hold for all inputs (transformers' masks do not look at their values then).
"""

from __future__ import annotations

import builtins
import functools
import linecache
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import transformer

from graphgrow.dispatch import Dispatch
from graphgrow.ir.sizes import DataNumber, SizeNumber, plain

_NOT_USERS = tuple(
    str(folder) + os.sep for folder in (Path(torch.__file__).parent, Path(__file__).parent.parent)
)


class Listener(Protocol):
    """Who is told of the calls."""

    def listens(self) -> bool:
        """Return whether a call made now is to be told."""
        ...

    def call(self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Call `module` by `original` and return what it gives."""
        ...

    def whole(self, number: Any) -> Any:
        """Return the int of a tensor or of a number with a node, carrying a node."""
        ...

    def refuse_branch(self) -> None:
        """Raise that a branch depends on a tensor's values."""
        ...

    def apply(self, original: Callable[..., Any], function: type, args: Any, kwargs: Any) -> Any:
        """Call an autograd function by `original` and return what it gives."""
        ...


@contextmanager
def intercepted(listener: Listener, asking: Sequence[dict[str, Any]] = ()) -> Iterator[None]:
    """Tell `listener` of calls while the block runs; everything is put back afterwards.

    The patches are global, so the listener must tell its own thread from others. `asking` are the
    names of modules whose code asks for the `int` of a tensor.
    """
    call, length, tracing = nn.Module.__call__, builtins.len, vars(torch.jit)["is_tracing"]
    is_causal, range_ = transformer._detect_is_causal_mask, builtins.range
    apply = vars(torch.autograd.Function)["apply"]

    @functools.wraps(call)
    def heard_call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return listener.call(call, self, args, kwargs)

    @functools.wraps(apply.__func__)
    def heard_apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        return listener.apply(apply.__get__(None, cls), cls, args, kwargs)

    def heard_length(value: Any) -> int:
        # len() itself makes a bare int of whatever Tensor.__len__ returns
        if isinstance(value, Tensor) and listener.listens() and value.dim():
            return value.size(0)
        return length(value)

    def heard_question() -> bool:
        return listener.listens() or tracing()

    def heard_is_causal(mask: Tensor | None, hint: bool | None = None, size: Any = None) -> bool:
        # whether the mask's values are causal is torch's own question, asked for speed alone
        return bool(hint) if listener.listens() else is_causal(mask, hint, size)

    try:
        for names in asking:
            names["int"] = _heard_int(listener)
        setattr(builtins, "range", _heard_range(listener, range_))  # noqa: B010
        transformer._detect_is_causal_mask = heard_is_causal
        nn.Module.__call__ = heard_call
        setattr(torch.autograd.Function, "apply", classmethod(heard_apply))  # noqa: B010
        builtins.len = heard_length
        setattr(torch.jit, "is_tracing", heard_question)  # noqa: B010
        yield
    finally:
        nn.Module.__call__, builtins.len, builtins.range = call, length, range_
        for names in asking:
            del names["int"]
        setattr(torch.jit, "is_tracing", tracing)  # noqa: B010
        transformer._detect_is_causal_mask = is_causal
        setattr(torch.autograd.Function, "apply", apply)  # noqa: B010


class _StandIn(type):
    """The class of what stands in for a builtin class: isinstance and == take it for that."""

    builtin: type

    def __new__(cls, name: str, bases: Any, names: Any, builtin: type) -> Any:
        return super().__new__(cls, name, bases, {**names, "builtin": builtin})

    def __init__(cls, name: str, bases: Any, names: Any, builtin: type) -> None:
        super().__init__(name, bases, names)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.builtin, name)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, cls.builtin)

    def __subclasscheck__(cls, kind: Any) -> bool:
        return issubclass(kind, cls.builtin)

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.builtin

    def __hash__(cls) -> int:
        return hash(cls.builtin)


def _heard_int(listener: Listener) -> type:
    """Return what stands in for int, which makes bare ints of whatever Tensor.__int__ returns."""

    class Heard(metaclass=_StandIn, builtin=int):
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            if args and isinstance(args[0], Tensor | SizeNumber) and listener.listens():
                return listener.whole(args[0])
            return int(*args, **kwargs)

    return Heard


def _heard_range(listener: Listener, builtin: type[range]) -> type:
    """Return what stands in for range, where no number may be that tensor values decide."""

    class Heard(metaclass=_StandIn, builtin=builtin):
        def __new__(cls, *args: Any) -> Any:
            if any(isinstance(arg, DataNumber) for arg in args):
                listener.refuse_branch()
            return builtin(*map(plain, args))

    return Heard


class HiddenCalls(Dispatch):
    """Tells of operators on tensors that run although no recorded call runs them."""

    def __init__(self, report: Callable[[str, list[Tensor]], None]) -> None:
        super().__init__()
        self._report = report

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Report the operator and run it."""
        self._report(str(func), [arg for arg in args if isinstance(arg, Tensor)])
        return func(*args, **(kwargs or {}))


def user_frame() -> FrameType:
    """Return the innermost running frame outside torch and graphgrow."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_USERS):
        frame = frame.f_back
    return frame


def place_of(frame: FrameType) -> str:
    """Return file and line that `frame` is at."""
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def place_of_error(error: BaseException) -> str:
    """Return file and line of the innermost code outside torch and graphgrow that raised it."""
    frames = list(traceback.walk_tb(error.__traceback__))
    users = [f for f in frames if not f[0].f_code.co_filename.startswith(_NOT_USERS)]
    frame, line = (users or frames)[-1]
    return f"{Path(frame.f_code.co_filename).name}:{line}"


def asserts(frame: FrameType) -> bool:
    """Return whether `frame` is at an assert statement."""
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return line.strip().startswith(("assert ", "assert("))
