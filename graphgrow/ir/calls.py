"""What a torch function is to a recording: how it is written as a node, and what it may not do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

_METHODS = {
    function: name
    for name in reversed(dir(Tensor))
    if callable(function := getattr(Tensor, name)) and not isinstance(function, type)
}
_READS = frozenset(
    "__bool__ __int__ __float__ __complex__ __index__ __contains__ item tolist numpy __array__ "
    "__dlpack__ is_nonzero equal allclose".split()
)
_RANDOM = ("rand", "bernoulli", "dropout", "normal", "uniform", "multinomial", "poisson")
_UPDATES = ("batch_norm", "instance_norm")


def spell(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    """Return op, target and arguments of the node that calls `function` with `args`."""
    if function.__name__ == "__get__":
        name = function.__self__.__name__  # pyright: ignore[reportFunctionMemberAccess]
        if name == "data":
            return "call_method", "detach", args[:1]
        return "call_function", getattr, (args[0], name)
    if function in _METHODS:
        return "call_method", _METHODS[function], args
    return "call_function", function, args


def reads_values(function: Callable[..., Any]) -> bool:
    """Return whether `function` hands a tensor's values over to Python."""
    return function.__name__ in _READS


def in_place(name: str, kwargs: dict[str, Any]) -> bool:
    """Return whether a call of `name` with `kwargs` writes into one of its arguments."""
    writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    return writes or kwargs.get("out") is not None or kwargs.get("inplace") is True


def is_needed(node: fx.Node) -> bool:
    """Return whether `node` must stay although nothing reads it: it writes, or draws at random."""
    if node.op in ("placeholder", "output", "call_module"):
        return True
    if node.op == "get_attr":
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return in_place(name, node.kwargs) or name.endswith(_UPDATES) or any(w in name for w in _RANDOM)


def is_size(function: Callable[..., Any]) -> bool:
    """Return whether `function` gives sizes of a tensor: all, one, or their product."""
    return function in _SIZES


_SIZES = frozenset({Tensor.size, Tensor.numel, Tensor.nelement, torch.numel, Tensor.shape.__get__})  # pyright: ignore
