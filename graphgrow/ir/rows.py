"""Running a graph so that linear layers multiply alike, whatever the batch."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn


class RowInterpreter(fx.Interpreter):
    """Runs a graph node by node; linear layers get rows that lie in one piece of memory.

    Which operator multiplies others depends on their strides, on the size of the batch, and on
    whether the weight wants a gradient.
    """

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return what a module gives."""
        linear = isinstance(self.submodules[str(target)], nn.Linear)
        return super().call_module(target, _in_one_piece(args) if linear else args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return what a function gives."""
        linear = target is F.linear
        return super().call_function(target, _in_one_piece(args) if linear else args, kwargs)


def _in_one_piece(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].contiguous(), *args[1:]) if args and isinstance(args[0], Tensor) else args
