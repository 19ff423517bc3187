"""Random draws replaced by their mean, so that models of different widths can be compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graphgrow.dispatch import Dispatch

aten = torch.ops.aten


def _normal(
    mean: Any, std: Any = 1.0, size: Any = None, *, generator: Any = None, **like: Any
) -> Tensor:
    if size is not None:
        return torch.full(size, float(mean), **like)
    return mean.clone() if isinstance(mean, Tensor) else torch.full_like(std, mean)


def _between(*args: Any, generator: Any = None, **like: Any) -> Tensor:
    *bounds, size = args
    like.setdefault("dtype", torch.int64)
    return torch.full(size, _middle(*bounds), **like)


def _in_order(count: int, generator: Any = None, **like: Any) -> Tensor:
    like.setdefault("dtype", torch.int64)
    return torch.arange(count, **like)


def _middle(*bounds: int) -> int:
    low, high = bounds if len(bounds) == 2 else (0, *bounds)
    return (low + high - 1) // 2


def _leaky(x: Tensor, noise: Tensor, low: float = 1 / 8, high: float = 1 / 3, *_: Any) -> Tensor:
    return torch.where(x < 0, x * ((low + high) / 2), x)


# One row for each operator that draws: the mean of what it draws, with its own signature.
MEANS: dict[Any, Callable[..., Any]] = {
    aten.bernoulli: lambda x, p=None, generator=None: (
        x.clone() if p is None else torch.full_like(x, p)
    ),
    aten.bernoulli_: lambda x, p=0.5, generator=None: (
        x.copy_(p) if isinstance(p, Tensor) else x.fill_(p)
    ),
    aten.native_dropout: lambda x, p, train: (x.clone(), torch.ones_like(x, dtype=torch.bool)),
    aten.rand: lambda size, generator=None, names=None, **like: torch.full(size, 0.5, **like),
    aten.rand_like: lambda x, generator=None, **like: torch.full_like(x, 0.5, **like),
    aten.randn: lambda size, generator=None, names=None, **like: torch.zeros(size, **like),
    aten.randn_like: lambda x, generator=None, **like: torch.zeros_like(x, **like),
    aten.uniform_: lambda x, low=0.0, high=1.0, generator=None: x.fill_((low + high) / 2),
    aten.normal_: lambda x, mean=0.0, std=1.0, generator=None: x.fill_(mean),
    aten.normal: _normal,
    aten.log_normal_: lambda x, m=1.0, s=2.0, generator=None: x.fill_(math.exp(m + s * s / 2)),
    aten.exponential_: lambda x, rate=1.0, generator=None: x.fill_(1 / rate),
    aten.geometric_: lambda x, p, generator=None: x.fill_(1 / p),
    aten.poisson: lambda x, generator=None: x.clone(),
    aten.randint: _between,
    aten.randint_like: lambda x, *bounds, generator=None, **like: torch.full_like(
        x, _middle(*bounds), **like
    ),
    aten.randperm: _in_order,
    aten.rrelu_with_noise: lambda x, *args: _leaky(x, *args),
    aten.rrelu_with_noise_: lambda x, *args: x.copy_(_leaky(x, *args)),
}


class Mean(Dispatch):
    """Within it, every operator that draws random numbers gives their mean instead."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the mean of a draw, and what `func` returns where it draws nothing."""
        named = {**(kwargs or {})}
        mean = MEANS.get(func.overloadpacket)
        if mean is not None:
            return mean(*args, **named)
        positional = list(args)
        for place, name in _dropping(func):
            if place < len(positional):
                positional[place] = 0.0
            elif name in named:
                named[name] = 0.0
        return func(*positional, **named)


@cache
def _dropping(func: Any) -> list[tuple[int, str]]:
    """Return the arguments of an operator (attention, recurrent kernels) that say what to drop."""
    names = [argument.name for argument in func._schema.arguments]
    return [(place, name) for place, name in enumerate(names) if name in ("dropout_p", "dropout")]
