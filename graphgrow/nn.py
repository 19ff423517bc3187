"""Modules that rewrites put into a model: plain torch, usable in any model by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Rational(nn.Module):
    """The activation αx + (β + γx)/(1 + x²): the identity as it starts, at (1, 0, 0), then learned.

    It has no poles and grows linearly. α, β and γ have the given `shape`, which broadcasts to that
    of the input: none for one number each, `(units,)` for units in the last dim, `(channels, 1, 1)`
    for images.

    Source: Mitchell, Mundt, Kersting, Self Expanding Neural Networks (2023), section 3.1, where
    every unit has its own.
    """

    def __init__(
        self,
        *shape: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.alpha = nn.Parameter(torch.ones(shape, **place))
        self.beta = nn.Parameter(torch.zeros(shape, **place))
        self.gamma = nn.Parameter(torch.zeros(shape, **place))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of every entry of `x`."""
        return self.alpha * x + (self.beta + self.gamma * x) / (1 + x * x)


class CapNorm(nn.Module):
    """Batch normalisation that makes units smaller but never larger: (z − μ) / max(σ, 1).

    μ and σ are mean and standard deviation of each unit over the batch and all positions, with
    dim 1 of the input the units, `(batch, units, ...)`; in eval mode running ones, mixed in at rate
    `momentum`. There is no scale and no shift to learn, so that weights cannot be shrunk at no
    cost: this is the norm to go with a penalty on their lengths.

    Source: Philipp and Carbonell (2017), section 3.2, which does not say what stands for the
    statistics of the batch at test time; here the running ones, σ² without Bessel's correction.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        momentum: float = 0.1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features, self.momentum = num_features, momentum
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_buffer("running_mean", torch.zeros(num_features, **place))
        self.register_buffer("running_var", torch.ones(num_features, **place))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised `x`; in train mode move the running statistics."""
        if self.training:
            over = [d for d in range(x.dim()) if d != 1]
            mean = x.mean(over)
            centred = x - mean.reshape(1, -1, *[1] * (x.dim() - 2))
            var = centred.square().mean(over)
            with torch.no_grad():
                self.running_mean.lerp_(mean.detach(), self.momentum)
                self.running_var.lerp_(var.detach(), self.momentum)
        else:
            centred = x - self.running_mean.reshape(1, -1, *[1] * (x.dim() - 2))
            var = self.running_var
        return centred / var.clamp(min=1).sqrt().reshape(1, -1, *[1] * (x.dim() - 2))

    def extra_repr(self) -> str:
        """Return the arguments in words, as torch's layers have it."""
        return f"{self.num_features}, momentum={self.momentum}"
