"""What a branch is made of: ordinary torch layers whose last weights are zero."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphgrow.errors import NotApplicable
from graphgrow.passes.place import CONVOLUTIONS

_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


@dataclass(frozen=True)
class Ends:
    """The shape of what a branch reads, the dim of its units, and how many units it writes."""

    shape: tuple[int, ...]
    unit_dim: int
    units: int

    @property
    def spatial(self) -> int:
        """How many dims of space lie behind the units."""
        return len(self.shape) - 2 if self.unit_dim == 1 else 0

    @property
    def width(self) -> int:
        """How many units the branch reads."""
        return self.shape[self.unit_dim]


class BranchLayers(Protocol):
    """The layers of a branch: `zero` has the paths of those whose weights are zero."""

    @property
    def zero(self) -> tuple[str, ...]:
        """The paths of the layers that make the branch zero."""
        ...

    def check(self, where: str, ends: Ends) -> None:
        """Raise NotApplicable, beginning with `where`, if the layers do not fit there."""
        ...

    def module(self, ends: Ends) -> nn.Module:
        """Return the layers as one module."""
        ...


@dataclass(frozen=True)
class Skip:
    """A projection of every place alone, linear or a 1×1 convolution, without bias: zero."""

    @property
    def zero(self) -> tuple[str, ...]:
        """The paths of the layers that make the branch zero."""
        return ("projection",)

    def check(self, where: str, ends: Ends) -> None:
        """A projection fits everywhere."""

    def module(self, ends: Ends) -> nn.Module:
        """Return the projection."""
        projection = _zero(_layer(ends, ends.width, ends.units, 1, False))
        return nn.Sequential(OrderedDict(projection=projection))


@dataclass(frozen=True)
class Residual:
    """A layer of `units` units, an activation, and a layer that is zero.

    The first is linear, or a convolution with a `kernel` of odd size, padded to keep its size, and
    initialised as torch does, from `seed`. `activation` is relu, gelu, silu or tanh.
    """

    units: int
    kernel: int = 1
    activation: str = "relu"
    seed: int = 0

    @property
    def zero(self) -> tuple[str, ...]:
        """The paths of the layers that make the branch zero."""
        return ("last",)

    def check(self, where: str, ends: Ends) -> None:
        """Raise NotApplicable for what is no layer: no units, an even kernel, one without space."""
        if self.units < 1 or self.activation not in _ACTIVATIONS:
            raise NotApplicable(
                f"{where}: a residual has at least one unit and one of {sorted(_ACTIVATIONS)}, "
                f"this one {self.units} and '{self.activation}'"
            )
        if self.kernel % 2 == 0 or self.kernel < 1 or (self.kernel > 1 and not ends.spatial):
            raise NotApplicable(
                f"{where}: a kernel of {self.kernel} does not fit {ends.spatial} dims of space; "
                "it must be odd, and 1 where there is none"
            )

    def module(self, ends: Ends) -> nn.Module:
        """Return the layers."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            first = _layer(ends, ends.width, self.units, self.kernel, True)
            last = _zero(_layer(ends, self.units, ends.units, 1, True))
        act = _ACTIVATIONS[self.activation]()
        return nn.Sequential(OrderedDict(first=first, act=act, last=last))


@dataclass(frozen=True)
class TransformerBlock:
    """A pre-norm transformer block on a stream `(batch, places, units)`: attention, then an MLP.

    `heads` of `features` each, `hidden` units with GELU between. Both last projections are zero, so
    the block is the identity at first. A branch for a place and itself.

    Source: Vaswani et al. (2017), Xiong et al. (2020), the pre-norm form.
    """

    heads: int
    features: int
    hidden: int
    causal: bool = False
    seed: int = 0

    @property
    def zero(self) -> tuple[str, ...]:
        """The paths of the layers that make the branch zero."""
        return ("out", "down")

    def check(self, where: str, ends: Ends) -> None:
        """Raise NotApplicable where there is no stream of places."""
        if min(self.heads, self.features, self.hidden) < 1:
            raise NotApplicable(f"{where}: a block has heads, features and hidden units, all ≥ 1")
        if len(ends.shape) != 3 or ends.unit_dim != 2 or ends.width != ends.units:
            raise NotApplicable(
                f"{where}: a transformer block reads and writes one stream (batch, places, units), "
                f"and these are values of shape {ends.shape} and {ends.units} units"
            )

    def module(self, ends: Ends) -> nn.Module:
        """Return the block without its residual sum."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return _Block(ends.width, self)


class _Block(nn.Module):
    """What a pre-norm transformer block adds to its stream."""

    def __init__(self, width: int, of: TransformerBlock) -> None:
        super().__init__()
        inner = of.heads * of.features
        self.heads, self.causal = of.heads, of.causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, inner) for _ in range(3))
        self.out = _zero(nn.Linear(inner, width))
        self.up, self.act = nn.Linear(width, of.hidden), nn.GELU()
        self.down = _zero(nn.Linear(of.hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        read = self.norm1(x)
        q, k, v = (
            layer(read).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        attended = self.out(attended.transpose(1, 2).flatten(2))
        return attended + self.down(self.act(self.up(self.norm2(x + attended))))


def _layer(ends: Ends, read: int, written: int, kernel: int, bias: bool) -> nn.Module:
    if not ends.spatial:
        return nn.Linear(read, written, bias)
    return CONVOLUTIONS[ends.spatial](read, written, kernel, padding=kernel // 2, bias=bias)


def _zero(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
