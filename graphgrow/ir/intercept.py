"""Seeing what torch's function modes do not show: modules, len, autograd functions, C++ code.

Code that asks torch whether it is being traced is told that it is, since what it then does is meant
to hold for all inputs (transformers' masks do not look at their values then).
"""

from __future__ import annotations

import builtins
import functools
import linecache
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import transformer

from graphgrow.dispatch import Dispatch

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

    def apply(self, original: Callable[..., Any], function: type, args: Any, kwargs: Any) -> Any:
        """Call an autograd function by `original` and return what it gives."""
        ...


@contextmanager
def intercepted(listener: Listener) -> Iterator[None]:
    """Tell `listener` of calls while the block runs; everything is put back afterwards.

    The patches are global, so the listener must tell its own thread from others.
    """
    call, length, tracing = nn.Module.__call__, builtins.len, vars(torch.jit)["is_tracing"]
    is_causal = transformer._detect_is_causal_mask
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
        transformer._detect_is_causal_mask = heard_is_causal
        nn.Module.__call__ = heard_call
        setattr(torch.autograd.Function, "apply", classmethod(heard_apply))  # noqa: B010
        builtins.len = heard_length
        setattr(torch.jit, "is_tracing", heard_question)  # noqa: B010
        yield
    finally:
        nn.Module.__call__, builtins.len = call, length
        setattr(torch.jit, "is_tracing", tracing)  # noqa: B010
        transformer._detect_is_causal_mask = is_causal
        setattr(torch.autograd.Function, "apply", apply)  # noqa: B010


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


def asserts(frame: FrameType) -> bool:
    """Return whether `frame` is at an assert statement."""
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return line.strip().startswith(("assert ", "assert("))
