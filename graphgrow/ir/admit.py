"""Which models can be traced, and the copy of one that a recording may run."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from graphgrow.errors import UnsupportedOp
from graphgrow.ir.assemble import tensors

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def admit(model: Any) -> nn.Module:
    """Return `model` without what torch.compile or data parallelism put around it.

    Raises: UnsupportedOp if it is of a kind that cannot be traced.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedOp(f"cannot trace a {type(model).__name__}: it is not an nn.Module")
    while isinstance(model, _WRAPPERS) or type(model).__name__ == "OptimizedModule":
        model = model.module if isinstance(model, _WRAPPERS) else model._orig_mod
    _check_modules(model)
    _check_tensors(model)
    return model


def _check_modules(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            fact = "is scripted, so its code cannot be followed; trace the module it came from"
        elif (
            type(module).__module__.startswith("torch.") and ".quantized" in type(module).__module__
        ):
            fact = "is quantized; trace the float model"
        else:
            continue
        raise UnsupportedOp(f"cannot trace {path or type(model).__name__!r}: it {fact}")


def _check_tensors(model: nn.Module) -> None:
    devices: dict[torch.device, str] = {}
    for path, tensor in tensors(model):
        if is_lazy(tensor):
            raise UnsupportedOp(
                f"cannot trace {path!r}: its sizes are not known yet; run the lazy module once"
            )
        devices.setdefault(tensor.device, path)
    if len(devices) > 1:
        places = ", ".join(f"{path!r} is on {device}" for device, path in devices.items())
        raise UnsupportedOp(f"cannot trace a model on {len(devices)} devices: {places}")


def duplicate(value: Any) -> tuple[Any, dict[int, Tensor]]:
    """Return a deep copy of a model or an argument, and the original of each tensor by copy's id.

    Parameters share their memory with the original's but need no gradient; all else is copied.

    Raises: UnsupportedOp if something in it cannot be copied.
    """
    modules = list(value.modules()) if isinstance(value, nn.Module) else []
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    memo: dict[int, Any] = {id(p): _twin(p) for p in parameters}
    held = tree_leaves([vars(module) for module in modules] or value)
    grown = [t for t in held if isinstance(t, Tensor) and t.grad_fn is not None]
    memo |= {id(t): t.detach().clone() for t in grown}  # deepcopy refuses what has a history
    try:
        made = copy.deepcopy(value, memo)
    except Exception as error:
        message = f"cannot trace {type(value).__name__!r}: it cannot be copied: {error}"
        raise UnsupportedOp(message) from error
    kept = [t for t in memo.get(id(memo), ()) if isinstance(t, Tensor)]
    return made, {id(memo[id(t)]): t for t in (*parameters, *grown, *kept)}


def _twin(parameter: nn.Parameter) -> nn.Parameter:
    """Return a parameter on the same memory that needs no gradient."""
    if type(parameter) is not nn.Parameter:
        return parameter
    return nn.Parameter(parameter.detach(), requires_grad=False)
