"""Sums over the ranks of torch.distributed, where it is initialised."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from graphgrow.measure.correlate import Correlation
from graphgrow.measure.sums import Sum, Sums


def joined(sums: Sums, device: torch.device) -> Sums:
    """Return the sums over all ranks, in place, where there are several.

    All ranks plan the same sums; which tensors these have depends on each rank's batches.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return sums
    mine = list(sums.all())
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (sums.loss, sums.examples, [_described(s) for s in mine]))
    sums.loss, sums.examples = sum(t[0] for t in told), sum(t[1] for t in told)
    for at, one in enumerate(mine):
        _join(one, [t[2][at] for t in told], device)
    return sums


def _described(one: Sum) -> tuple[Any, ...]:
    """Return all that other ranks must know of a sum to add theirs."""
    shapes = {name: tuple(t.shape) for name, t in _tensors(one).items()}
    c = one.correlation
    return shapes, one.upper, one.count, c and (c.kernels, c.symmetric, c.channels)


def _tensors(one: Sum) -> dict[Any, Tensor]:
    """Return the tensors of a sum, those of a correlation by their keys."""
    found = {name: getattr(one, name) for name in ("dense", "row", "column")}
    sums = one.correlation.sums if one.correlation else {}
    return {name: t for name, t in (*found.items(), *sums.items()) if t is not None}


def _join(one: Sum, told: list[tuple[Any, ...]], device: torch.device) -> None:
    one.upper, one.count = any(t[1] for t in told), sum(t[2] for t in told)
    correlations = [t[3] for t in told if t[3]]
    if correlations and one.correlation is None:
        kernels, symmetric, channels = correlations[0]
        one.correlation = Correlation(kernels, symmetric, channels=channels)
    shapes = {name: shape for t in told for name, shape in t[0].items()}
    known = _tensors(one)
    for name in sorted(shapes, key=repr):
        tensor = known.get(name)
        if tensor is None:
            tensor = torch.zeros(shapes[name], device=device)
        tensor = tensor.double()
        dist.all_reduce(tensor)
        if isinstance(name, str):
            setattr(one, name, tensor)
        elif one.correlation is not None:
            one.correlation.sums[name] = tensor
