"""Modules that rewrites put into a model: plain torch, usable in any model by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Rational(nn.Module):
    """The activation αx + (β + γx)/(1 + x²): the identity as it starts, at (1, 0, 0), then learned.

    It has no poles and grows linearly. α, β and γ are one number each, whatever the input's shape.

    Source: Mitchell, Mundt, Kersting, Self Expanding Neural Networks (2023), section 3.
    """

    def __init__(
        self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.alpha = nn.Parameter(torch.ones((), **place))
        self.beta = nn.Parameter(torch.zeros((), **place))
        self.gamma = nn.Parameter(torch.zeros((), **place))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of every entry of `x`."""
        return self.alpha * x + (self.beta + self.gamma * x) / (1 + x * x)
