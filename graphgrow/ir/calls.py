"""What a torch function is to a recording: how it is written as a node, and what it may not do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from graphgrow.ir.attention import attend

# functions recorded as what others they consist of: their own code ties sizes to each other
WRITTEN_OUT: Mapping[Any, Callable[..., Any]] = {F.multi_head_attention_forward: attend}
_METHODS = {
    function: name
    for name in reversed(dir(Tensor))  # a plain name wins over a dunder of the same function
    if callable(function := getattr(Tensor, name)) and not isinstance(function, type)
}
_SIZES = frozenset(
    {Tensor.size, Tensor.numel, Tensor.nelement, torch.numel, getattr(Tensor.shape, "__get__")}  # noqa: B009
)
_READS = frozenset(
    "__bool__ __int__ __float__ __complex__ __index__ __contains__ item tolist numpy __array__ "
    "__dlpack__ is_nonzero equal allclose".split()
)
_WHOLE = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})
_RANDOM = ("rand", "bernoulli", "dropout", "normal", "uniform", "multinomial", "poisson")
_UPDATES = ("batch_norm", "instance_norm")
_SIZED_BY_VALUES = frozenset(
    "nonzero argwhere masked_select unique unique_consecutive bincount repeat_interleave one_hot "
    "_unique2 _pack_padded_sequence".split()
)
_SIZED_BY_FIRST = frozenset(
    "index_add index_put index_copy index_fill scatter scatter_add scatter_reduce "
    "masked_scatter".split()
)
_VIEWS = frozenset(
    "__getitem__ getitem chunk contiguous detach diagonal expand expand_as flatten movedim mT "
    "narrow permute reshape select split squeeze swapaxes T t to transpose type_as unbind "
    "unflatten unsqueeze view view_as".split()
)


@dataclass(frozen=True)
class Apply:
    """Applies an autograd function, and has the name that code written from a graph needs."""

    function: type[torch.autograd.Function]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the autograd function gives."""
        return self.function.apply(*args, **kwargs)

    @property
    def __name__(self) -> str:
        return f"apply_{self.function.__name__}"


def spell(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    """Return op, target and arguments of the node that calls `function` with `args`."""
    if function.__name__ == "__get__":
        attribute = getattr(function, "__self__").__name__  # noqa: B009
        if attribute == "data":
            return "call_method", "detach", args[:1]
        return "call_function", getattr, (args[0], attribute)
    if function in _METHODS:
        return "call_method", _METHODS[function], args
    return "call_function", function, args


def is_size(function: Callable[..., Any]) -> bool:
    """Return whether `function` gives sizes of a tensor: all, one, or their product."""
    return function in _SIZES


def reads_values(function: Callable[..., Any]) -> bool:
    """Return whether `function` hands a tensor's values over to Python."""
    return function.__name__ in _READS


def gives_int(function: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Return whether `function` makes a Python int of a tensor of whole numbers."""
    whole = isinstance(args[0], Tensor) and args[0].dtype in _WHOLE
    return whole and function.__name__ in ("item", "__int__")


def writes(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call of `name` with `kwargs` writes into one of its arguments."""
    in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    return in_place or kwargs.get("out") is not None or kwargs.get("inplace") is True


def sized_by_values(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether the size of what `name` returns depends on the values of its tensors."""
    if name in ("where", "repeat_interleave", "one_hot"):
        known = {"where": 3, "repeat_interleave": 4, "one_hot": 2}[name]
        return len(args) + len(kwargs) < known and not _repeats_by_number(name, args, kwargs)
    if name == "__getitem__":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in index)
    return name in _SIZED_BY_VALUES


def _repeats_by_number(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    repeats = kwargs.get("repeats", args[1] if len(args) > 1 else None)
    return name == "repeat_interleave" and isinstance(repeats, int)


def sized_by_first(name: str) -> bool:
    """Return whether the result of `name` has the size of its first argument alone."""
    return name.rstrip("_") in _SIZED_BY_FIRST


def viewed(node: fx.Node) -> Iterator[fx.Node]:
    """Yield what `node` takes first, and if that may be a view, what it is a view of, and so on."""
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
        yield node
        attribute = node.args[1] if node.target is getattr else name_of(node)
        if attribute not in _VIEWS:
            return


def gives_size(node: fx.Node) -> bool:
    """Return whether `node` asks for a size of a tensor."""
    return node.op == "call_method" and node.target in ("size", "numel")


def gives_device(node: fx.Node) -> bool:
    """Return whether `node` asks where a tensor lies."""
    return node.target is getattr and node.args[1] == "device"


def is_random(node: fx.Node) -> bool:
    """Return whether `node` draws random numbers."""
    return any(word in name_of(node) for word in _RANDOM)


def is_needed(node: fx.Node) -> bool:
    """Return whether `node` must stay although nothing reads it: it writes, or draws at random."""
    if node.op in ("placeholder", "output", "call_module"):
        return True
    if node.op == "get_attr":
        return False
    return writes(name_of(node), node.kwargs) or name_of(node).endswith(_UPDATES) or is_random(node)


def name_of(node: fx.Node) -> str:
    """Return the bare name of what `node` calls: `add_` for `Tensor.add_`."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
