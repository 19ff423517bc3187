"""Where a layer can be inserted, and what is inserted there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvTransposeNd

from graphgrow.errors import NotApplicable
from graphgrow.ir.graph import Graph

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
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

    def has(self, name: str) -> bool:
        """Return whether the module has a parameter of that name; a template may have no values."""
        return f"{self.path}.{name}" in self.graph.state


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
    which the function is kept; `rounding` bounds what the new numbers' precision may change. New
    tensors get device, dtype and `requires_grad` of `like`.
    """

    parts: tuple[Part, ...]
    like: Tensor | None = None
    after: bool = False
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    modes: tuple[str, ...] = ("train", "eval")
    lines: tuple[str, ...] = ()
    rounding: float = 0.0


class Layer(Protocol):
    """What is inserted, and why it is the identity."""

    def insertion(self, place: Place) -> Insertion:
        """Return what to insert at a place. Raises NotApplicable where it would not be exact."""
        ...


def is_layer(module: nn.Module) -> bool:
    """Return whether a module is a linear or a convolution layer, or calls itself as one does."""
    kind = next((k for k in _LAYERS if isinstance(module, k)), None)
    same = ("forward", "_conv_forward", "__call__")
    return kind is not None and all(
        getattr(type(module), name, None) is getattr(kind, name, None) for name in same
    )


def width(module: Any) -> int:
    """Return how many units a layer reads."""
    return module.in_features if isinstance(module, nn.Linear) else module.in_channels


def weight_of(place: Place) -> Tensor:
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
    own = {id(state[f"{place.path}.{n}"]) for n in ("weight", "bias") if place.has(n)}
    for path, tensor in state.items():
        owner = path.rpartition(".")[0]
        if id(tensor) in own and place.graph.modules.get(owner) is not module:
            place.refuse(
                f"its tensors are tied to '{path}', which would change with them; give another "
                "layer, or Identity() where it reads what an idempotent activation gives"
            )
    for structure in (place.graph.train, place.graph.eval):
        for node in structure.nodes:
            if node.op == "get_attr" and id(state.get(str(node.target))) in own:
                place.refuse(
                    f"the model's own code reads its '{node.target}' as well; give another layer, "
                    "or Identity() where it reads what an idempotent activation gives"
                )
    if not weight.is_floating_point():
        place.refuse(f"its weight is of type {weight.dtype}; give a layer of real numbers")
    return weight


def input_dim(module: nn.Module) -> int:
    """Return the dim of a layer's weight that is contracted with its input."""
    return 0 if isinstance(module, _ConvTransposeNd) else 1


def first_input(node: fx.Node) -> fx.Node:
    """Return the value that a call reads first."""
    given = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(given, fx.Node)
    return given
