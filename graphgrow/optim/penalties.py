"""Penalties on the lengths of fan-ins or fan-outs, and their proximal steps, for any optimizer.

Source: Philipp and Carbonell (2017), equations 2 and 3, for p = 1 and p = 2.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from graphgrow.optim.fans import Fans, joined


def penalty(fans: Fans, state: Mapping[str, Tensor], strength: float, *, p: int = 2) -> Tensor:
    """Return Ω, `strength` times the sum of the p-norms of all fans, as part of a loss.

    `fans` are those of `fan_ins(graph)` or `fan_outs(graph)` and `state` is `graph.state`. At a fan
    of length zero the gradient is zero.

    Raises:
        ValueError: where `strength` is negative, or `p` neither 1 nor 2.
    """
    _check("penalise", strength, p)
    if p == 1:
        return strength * sum(
            (state[part.path].abs().sum() for part in fans.parts), torch.zeros(())
        )
    total = _squares(fans, state)
    zero = total == 0
    return strength * total.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0).sum()


@torch.no_grad()
def shrink(fans: Fans, state: Mapping[str, Tensor], amount: float, *, p: int = 2) -> None:
    """Make fans shorter by `amount`, in place: the proximal step of `penalty`, to exact zeros.

    To be called after `optimizer.step()`, with the step size times the strength. For p = 2 every
    fan gets shorter by `amount` and is zero where it is no longer; for p = 1 every entry does.

    Raises:
        ValueError: where `amount` is negative, or `p` neither 1 nor 2.
    """
    _check("shrink", amount, p)
    if p == 1:
        for part in fans.parts:
            weight = state[part.path]
            weight.copy_(torch.nn.functional.softshrink(weight, amount))
        return
    length = _squares(fans, state).sqrt_()
    tiny = torch.finfo(length.dtype).tiny
    kept = (1 - amount / length.clamp(min=tiny)).clamp(min=0.0)
    tensors = [state[part.path] for part in fans.parts]
    (factors,) = fans.slices.spread(tensors, kept.numpy(force=True))
    for tensor, factor in zip(tensors, factors, strict=True):
        tensor.mul_(factor)


def _check(what: str, strength: float, p: int) -> None:
    if not strength >= 0:
        raise ValueError(
            f"cannot {what} fans by {strength}: it is negative; give a number that is not"
        )
    if p not in (1, 2):
        raise ValueError(f"cannot {what} fans with p={p}: only p=1 and p=2 have a proximal step")


def _squares(fans: Fans, state: Mapping[str, Tensor]) -> Tensor:
    if not fans.parts:
        return torch.zeros(0)
    squares = fans.slices.squares([state[part.path] for part in fans.parts])
    return fans.slices.sums(joined(squares))
