"""Layers split in two: schemes that put an invertible layer and an activation before a layer.

The algebra is exact; numbers are computed in float64, and what their rounding to the model's own
type may change is stated.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from graphgrow.nn import Rational
from graphgrow.passes.place import CONVOLUTIONS, Insertion, Part, Place, weight_of, width

CONDITION = 1e6  # a matrix above it is taken for singular
Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Factor:
    """The layer W becomes (W Q⁻¹) ∘ id ∘ Q, `id` a learned activation that starts there.

    `matrix` holds the rows of Q, `(units, in)`: square and invertible, or with more rows, of full
    rank; in a grouped convolution it is that of each group. Left out, Q is a random orthogonal
    matrix, drawn anew for each group, the best conditioned there is. Q is a linear layer, or for a
    convolution a 1×1 convolution with the same groups; it gets a `bias` where one is given, folded
    out of the old one, and else in a linear layer with a bias, one of zeros. `activation` is
    "rational" (`nn.Rational`, for each unit its own) or "prelu" (slope 1, which learns from
    negative values alone).

    Source: Mitchell, Mundt, Kersting (2023), Self Expanding Neural Networks, section 3.
    """

    matrix: Rows | None = None
    activation: str = "rational"
    bias: tuple[float, ...] | None = None
    seed: int = 0

    def insertion(self, place: Place) -> Insertion:
        """Return Q and the activation, to go before the layer, and the layer's weight W Q⁻¹."""
        _check_choice(place, self.activation, ("rational", "prelu"))
        like, factors = weight_of(place), _factors(place, self.matrix, self.bias, self.seed)
        if self.activation == "rational":
            units = factors.forth.shape[:2].numel()
            shape = (units, *[1] * (like.dim() - 2))
            activation = Rational(*shape, device="meta", dtype=like.dtype)
            start = {"alpha": 1.0, "beta": 0.0, "gamma": 0.0}
        else:
            activation = nn.PReLU(device="meta", dtype=like.dtype)
            start = {"weight": 1.0}
        tensors = {
            name: torch.full(parameter.shape, start[name], dtype=torch.double)
            for name, parameter in activation.named_parameters()
        }
        return _factored(place, factors, Part("act", activation, tensors))


_ODD: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "relu": (nn.ReLU, 1.0),
    "leaky_relu": (nn.LeakyReLU, 1.01),
    "gelu": (nn.GELU, 1.0),
    "silu": (nn.SiLU, 1.0),
    # torch takes softplus(z) for z above the threshold, which drops e⁻ᶻ: at 20 still 2e-9
    "softplus": (lambda: nn.Softplus(threshold=40.0), 1.0),
    "hardswish": (nn.Hardswish, 1.0),
}


@dataclass(frozen=True)
class Split:
    """The layer W becomes [W Q⁻¹, −W Q⁻¹]/c ∘ s ∘ [Q; −Q], an ordinary activation s between.

    For these activations s(z) − s(−z) = c z with c = 1, for LeakyReLU of slope a with c = 1 + a.
    The new layer has two units for each row of Q; `matrix`, `bias` and `seed` are as in `Factor`.
    """

    activation: str = "relu"
    matrix: Rows | None = None
    bias: tuple[float, ...] | None = None
    seed: int = 0

    def insertion(self, place: Place) -> Insertion:
        """Return [Q; −Q] and s, to go before the layer, and the layer's weight."""
        _check_choice(place, self.activation, tuple(_ODD))
        make, slope = _ODD[self.activation]
        once = _factors(place, self.matrix, self.bias, self.seed)
        twice = _Factors(
            torch.cat([once.forth, -once.forth], 1),
            torch.cat([once.back, -once.back], 2) / slope,
            None if once.bias is None else torch.cat([once.bias, -once.bias], 1),
            once.offset,
            once.condition,
        )
        return _factored(place, twice, Part("act", make()))


def _check_choice(place: Place, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        place.refuse(
            f"activation '{given}' is none of those that fit; give {', '.join(map(repr, choices))}"
        )


@dataclass(frozen=True, eq=False)
class _Factors:
    """Q by group, `(groups, units, in)`, its left inverse, `(groups, in, units)`, and its bias.

    `offset` is what the bias, taken back, adds to the layer's input, `(groups, in)`.
    """

    forth: Tensor
    back: Tensor
    bias: Tensor | None
    offset: Tensor | None
    condition: float


def _factors(
    place: Place, rows: Rows | None, bias: tuple[float, ...] | None, seed: int
) -> _Factors:
    weight = weight_of(place)
    groups = getattr(place.module, "groups", 1)
    inputs = width(place.module) // groups
    drawn = _orthogonal(place, groups, inputs, seed) if rows is None else None
    exact = _given(place, rows, groups, inputs) if drawn is None else drawn
    # rounded first, so that the inverse is that of the matrix which the model will hold
    forth = exact.to(weight.dtype).double()
    condition = 1.0 if rows is None else float(torch.linalg.cond(forth).max())
    if not condition <= CONDITION:
        place.refuse(
            f"the matrix is not invertible, or nearly so (condition number {condition:.0e}, "
            f"at most {CONDITION:.0e}); give another, or none for an orthogonal one"
        )
    q, r = torch.linalg.qr(forth)
    back = torch.linalg.solve_triangular(r, q.mT, upper=True)
    added = _bias(place, bias, groups, forth.shape[1])
    offset = None if bias is None else torch.einsum("gcq,gq->gc", back, added)
    return _Factors(forth, back, added, offset, condition)


def _orthogonal(place: Place, groups: int, width: int, seed: int) -> Tensor:
    number = zlib.crc32(f"{place.path}:{seed}".encode())
    generator = torch.Generator().manual_seed(number)
    drawn = torch.randn(groups, width, width, generator=generator, dtype=torch.double)
    return torch.linalg.qr(drawn)[0]


def _given(place: Place, rows: Rows | None, groups: int, width: int) -> Tensor:
    matrix = _tensor(place, rows, "matrix")
    if matrix.dim() != 2 or matrix.shape[1] != width or len(matrix) < width:
        shape = " by ".join(map(str, matrix.shape))
        place.refuse(
            f"the matrix is {shape}, but {place.kind} reads {width} units"
            f"{' in each group' if groups > 1 else ''}; "
            f"give {width} columns and at least as many rows"
        )
    return matrix.expand(groups, -1, -1)


def _tensor(place: Place, numbers: Any, what: str) -> Tensor:
    try:
        found = torch.tensor(numbers, dtype=torch.double)
    except (TypeError, ValueError):
        place.refuse(f"the {what} is no table of numbers with equal rows; give one that is")
    if not bool(found.isfinite().all()):
        place.refuse(f"the {what} has entries that are not finite; give numbers that are")
    return found


def _bias(place: Place, given: tuple[float, ...] | None, groups: int, units: int) -> Tensor | None:
    """Return the new layer's bias by group, `(groups, units)`, None where it is to have none."""
    module = place.module
    if given is None:
        is_offset = isinstance(module, nn.Linear) and place.has("bias")
        return torch.zeros(groups, units, dtype=torch.double) if is_offset else None
    bias = _tensor(place, given, "bias")
    if bias.shape != (groups * units,):
        place.refuse(
            f"the bias has {bias.numel()} numbers, the new layer {groups * units} units; "
            "give one for each"
        )
    if not place.has("bias"):
        place.refuse(f"{place.kind} has no bias to fold that of the new layer into; give none")
    # the border of a padded convolution would read zeros, where the inside reads the bias
    if isinstance(module, _ConvTransposeNd) or (
        isinstance(module, _ConvNd) and _pads_zeros(module)
    ):
        place.refuse(
            f"{place.kind} pads with zeros, so a bias before it changes the border; give none"
        )
    return bias.reshape(groups, units)


def _pads_zeros(module: _ConvNd) -> bool:
    padding = module.padding
    padded = padding == "same" if isinstance(padding, str) else any(padding)
    return module.padding_mode == "zeros" and padded


def _factored(place: Place, factors: _Factors, activation: Part) -> Insertion:
    """Return Q and an activation before the layer, whose weight takes the inverse of Q.

    A zero-padded convolution stays exact at the border: Q has no bias and the activation parts
    cancel or map zero to zero, so the zeros that it pads mean what they meant before.
    """
    module, weight = place.module, weight_of(place)
    forth, groups = factors.forth, factors.forth.shape[0]
    old = _blocks(module, weight)
    blocks = torch.einsum("gocs,gcq->goqs", old, factors.back)
    tensors = {"weight": _from_blocks(module, blocks, weight)}
    layer = _reader(place, groups * forth.shape[1], bias=factors.bias is not None)
    new = {"weight": forth.reshape(layer.weight.shape)}
    if factors.bias is not None:
        new["bias"] = factors.bias.reshape(-1)
    precision = torch.finfo(weight.dtype)
    lines = [
        f"'{place.path}.weight' takes the inverse of '{{in}}.weight' (condition number "
        f"{factors.condition:.3g}); rounding to {precision.dtype} changes what the two give by at "
        f"most {factors.condition * precision.eps / 2:.1e} of the norms of weight and input"
    ]
    if factors.offset is not None:
        constant = torch.einsum("gocs,gc->go", old, factors.offset).reshape(-1)
        tensors["bias"] = place.graph.state[f"{place.path}.bias"].detach().cpu() - constant
        lines.append(f"the bias of '{{in}}' is folded out of '{place.path}.bias'")
    name = "in_features" if isinstance(module, nn.Linear) else "in_channels"
    return Insertion(
        parts=(Part("in", layer, new), activation),
        like=weight,
        tensors=tensors,
        attributes={name: groups * forth.shape[1]},
        lines=tuple(lines),
        rounding=100 * factors.condition * precision.eps,
    )


def _reader(place: Place, units: int, *, bias: bool) -> nn.Linear | _ConvNd:
    """Return a layer without values that reads what the one there does: linear, or 1×1."""
    module: Any = place.module
    weight = weight_of(place)
    like: dict[str, Any] = {"device": "meta", "dtype": weight.dtype}
    if isinstance(module, nn.Linear):
        return nn.Linear(module.in_features, units, bias, **like)
    kind = CONVOLUTIONS[weight.dim() - 2]
    return kind(module.in_channels, units, 1, groups=module.groups, bias=bias, **like)


def _blocks(module: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight in float64 as `(groups, out, in, positions of the kernel)`."""
    groups = getattr(module, "groups", 1)
    values = weight.detach().cpu().double()
    first, second = weight.shape[:2]
    blocks = values.reshape(groups, first // groups, second, -1)
    return blocks.transpose(1, 2) if isinstance(module, _ConvTransposeNd) else blocks


def _from_blocks(module: nn.Module, blocks: Tensor, weight: Tensor) -> Tensor:
    """Return the weight that `_blocks` would show so, its kernel that of `weight`."""
    if isinstance(module, _ConvTransposeNd):
        blocks = blocks.transpose(1, 2)
    return blocks.reshape(-1, blocks.shape[2], *weight.shape[2:])
