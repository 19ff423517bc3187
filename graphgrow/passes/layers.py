"""Schemes for a new layer that computes the identity: what is put where, with which numbers.

Each scheme turns a `Place` into an `Insertion`. The algebra is exact; numbers are computed in
float64, and what their rounding to the model's own type may change is stated.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from graphgrow.errors import NotApplicable
from graphgrow.ir.assemble import shell
from graphgrow.ir.graph import Graph
from graphgrow.nn import Rational

CONDITION = 1e6  # a matrix above it is taken for singular

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_LAYERS = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


@dataclass(frozen=True, eq=False)
class Place:
    """Where a layer is to be inserted: a leaf module and its calls, by mode."""

    graph: Graph
    path: str
    module: nn.Module
    calls: tuple[tuple[str, fx.Node], ...]

    def refuse(self, fact: str) -> NoReturn:
        """Raise that nothing can be inserted here, with the fact."""
        raise NotApplicable(f"cannot deepen at '{self.path}': {fact}")

    @property
    def kind(self) -> str:
        """The class of the module, for sentences."""
        return type(self.module).__name__


@dataclass(frozen=True, eq=False)
class Part:
    """One call to insert: of a new module with tensors by name, or of what `call` calls."""

    suffix: str
    module: nn.Module | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    call: fx.Node | None = None


@dataclass(frozen=True, eq=False)
class Insertion:
    """Calls to insert, in order, before or after each call at a place; and what changes there.

    `tensors` and `attributes` are new values for the module at the place. `modes` are those in
    which the function is kept; `error` bounds the change of the layer's output by rounding,
    relative to the norms of its weight and input.
    """

    parts: tuple[Part, ...]
    after: bool = False
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    modes: tuple[str, ...] = ("train", "eval")
    lines: tuple[str, ...] = ()
    error: float | None = None


class Layer(Protocol):
    """What is inserted, and why it is the identity."""

    def insertion(self, place: Place) -> Insertion:
        """Return what to insert at a place. Raises NotApplicable where it would not be exact."""
        ...


# ------------------------------------------------------------------------------ factorisation


Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Factor:
    """The layer W becomes (W Q⁻¹) ∘ id ∘ Q, `id` a learned activation that starts there (R:B2, B7).

    `matrix` holds the rows of Q, `(units, in)`: square and invertible, or with more rows, of full
    rank; in a grouped convolution it is that of each group. Left out, Q is a random orthogonal
    matrix, drawn anew for each group, the best conditioned there is. Q is a linear layer, or for a
    convolution a 1×1 convolution with the same groups; it gets a `bias` where one is given, folded
    out of the old one, and else in a linear layer with a bias, one of zeros. `activation` is
    "rational" (`nn.Rational`) or "prelu" (slope 1).

    Source: Mitchell, Mundt, Kersting (2023), Self Expanding Neural Networks, section 3.
    """

    matrix: Rows | None = None
    activation: str = "rational"
    bias: tuple[float, ...] | None = None
    seed: int = 0

    def insertion(self, place: Place) -> Insertion:
        """Return Q and the activation, to go before the layer, and the layer's weight W Q⁻¹."""
        _check_choice(place, self.activation, ("rational", "prelu"))
        like = _weight(place)
        if self.activation == "rational":
            activation = Rational(device="meta", dtype=like.dtype)
            start = {"alpha": 1.0, "beta": 0.0, "gamma": 0.0}
        else:
            activation = nn.PReLU(device="meta", dtype=like.dtype)
            start = {"weight": 1.0}
        tensors = {
            name: torch.full(parameter.shape, start[name], dtype=torch.double)
            for name, parameter in activation.named_parameters()
        }
        factors = _factors(place, self.matrix, self.bias, self.seed)
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
    """The layer W becomes [W Q⁻¹, −W Q⁻¹]/c ∘ s ∘ [Q; −Q], an ordinary activation s between (R:B3).

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
            once.condition,
        )
        return _factored(place, twice, Part("act", make()))


def _check_choice(place: Place, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        place.refuse(f"activation '{given}' is none of {', '.join(map(repr, choices))}")


@dataclass(frozen=True, eq=False)
class _Factors:
    """Q by group, `(groups, units, in)`, its left inverse, `(groups, in, units)`, and its bias."""

    forth: Tensor
    back: Tensor
    bias: Tensor | None
    condition: float


def _factors(
    place: Place, rows: Rows | None, bias: tuple[float, ...] | None, seed: int
) -> _Factors:
    weight = _weight(place)
    groups = getattr(place.module, "groups", 1)
    width = _width(place.module) // groups
    drawn = _orthogonal(place, groups, width, seed) if rows is None else None
    exact = _given(place, rows, groups, width) if drawn is None else drawn
    # rounded first, so that the inverse is that of the matrix which the model will hold
    forth = exact.to(weight.dtype).double()
    condition = float(torch.linalg.cond(forth).max())
    if not condition <= CONDITION:
        place.refuse(
            f"the matrix is not invertible, or nearly so (condition number {condition:.0e}, "
            f"at most {CONDITION:.0e}); give another, or none for an orthogonal one"
        )
    back = torch.linalg.pinv(forth)
    return _Factors(forth, back, _bias(place, bias, groups, forth.shape[1]), condition)


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
        place.refuse(f"the {what} is no table of numbers with equal rows")
    if not bool(found.isfinite().all()):
        place.refuse(f"the {what} has entries that are not finite")
    return found


def _bias(
    place: Place, given: tuple[float, ...] | None, groups: int, units: int
) -> Tensor | None:
    """Return the new layer's bias by group, `(groups, units)`, None where it is to have none."""
    module = place.module
    if given is None:
        is_offset = isinstance(module, nn.Linear) and module.bias is not None
        return torch.zeros(groups, units, dtype=torch.double) if is_offset else None
    bias = _tensor(place, given, "bias")
    if bias.shape != (groups * units,):
        place.refuse(f"the bias has {bias.numel()} numbers, the new layer {groups * units} units")
    if f"{place.path}.bias" not in place.graph.state:
        place.refuse(f"{place.kind} has no bias to fold that of the new layer into; give none")
    # the border of a padded convolution would read zeros, where the inside reads the bias
    if isinstance(module, _ConvTransposeNd) or (isinstance(module, _ConvNd) and _pads_zeros(module)):
        place.refuse(f"{place.kind} pads with zeros, so a bias before it changes the border; give none")
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
    module, weight = place.module, _weight(place)
    forth, groups = factors.forth, factors.forth.shape[0]
    blocks = torch.einsum("gocs,gcq->goqs", _blocks(module, weight), factors.back)
    tensors = {"weight": _from_blocks(module, blocks, weight)}
    layer = _reader(module, groups * forth.shape[1], bias=factors.bias is not None)
    new = {"weight": forth.reshape(layer.weight.shape)}
    if factors.bias is not None:
        new["bias"] = factors.bias.reshape(-1)
        if bool((factors.bias != 0).any()):
            constant = torch.einsum("goqs,gq->go", blocks, factors.bias).reshape(-1)
            tensors["bias"] = place.graph.state[f"{place.path}.bias"].detach().cpu() - constant
    name = "in_features" if isinstance(module, nn.Linear) else "in_channels"
    error = factors.condition * torch.finfo(weight.dtype).eps / 2
    line = (
        f"'{place.path}.weight' times the inverse of the new layer's, condition number "
        f"{factors.condition:.3g}: rounding to {str(weight.dtype).removeprefix('torch.')} changes "
        f"its output by at most {error:.1e} of the norms of weight and input"
    )
    return Insertion(
        parts=(Part("in", layer, new), activation),
        tensors=tensors,
        attributes={name: groups * forth.shape[1]},
        lines=(line,),
        error=error,
    )


def _reader(module: nn.Module, units: int, *, bias: bool) -> nn.Linear | _ConvNd:
    """Return a layer without values that reads what `module` reads: linear, or a 1×1 convolution."""
    weight: Any = module.weight
    place: dict[str, Any] = {"device": "meta", "dtype": weight.dtype}
    if isinstance(module, nn.Linear):
        return nn.Linear(module.in_features, units, bias, **place)
    kind = _CONVOLUTIONS[weight.dim() - 2]
    groups, channels = module.groups, module.in_channels
    return kind(channels, units, 1, groups=groups, bias=bias, **place)


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


# ------------------------------------------------------------------------------ what layers are


def is_layer(module: nn.Module) -> bool:
    """Return whether a module is a linear or a convolution layer, or calls itself as one does."""
    kind = next((k for k in _LAYERS if isinstance(module, k)), None)
    same = ("forward", "_conv_forward", "__call__")
    return kind is not None and all(
        getattr(type(module), name, None) is getattr(kind, name, None) for name in same
    )


def _width(module: Any) -> int:
    return module.in_features if isinstance(module, nn.Linear) else module.in_channels


def _weight(place: Place) -> Tensor:
    """Return the weight of the layer at a place, which must be its alone and used as it is."""
    module, state = place.module, place.graph.state
    if not is_layer(module):
        place.refuse(
            f"{place.kind} is neither a linear nor a convolution layer; give the path of one"
        )
    if not isinstance(weight := state.get(f"{place.path}.weight"), nn.Parameter) or (
        hasattr(module, "parametrizations") or module._forward_pre_hooks
    ):
        place.refuse(f"a hook or parametrization makes the weight of {place.kind}; remove it first")
    own = {id(state[f"{place.path}.{n}"]) for n in ("weight", "bias") if _has(place, n)}
    for path, tensor in state.items():
        owner = path.rpartition(".")[0]
        if id(tensor) in own and place.graph.modules.get(owner) is not module:
            place.refuse(f"its tensors are tied to '{path}', which would change with them")
    for structure in (place.graph.train, place.graph.eval):
        for node in structure.nodes:
            if node.op == "get_attr" and id(state.get(str(node.target))) in own:
                place.refuse(f"the model's own code reads its '{node.target}' as well")
    if not weight.is_floating_point():
        place.refuse(f"its weight is of type {weight.dtype}")
    return weight


def _has(place: Place, name: str) -> bool:
    return f"{place.path}.{name}" in place.graph.state
