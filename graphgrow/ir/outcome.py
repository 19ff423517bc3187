"""What a rule is asked, and what it answers: a call, and the layouts of what it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from graphgrow.ir.layout import ONE, Composition, fresh

aten = torch.ops.aten
KERNEL = "is a kernel size"
SPATIAL = "is a size computed by the model"
OVER = "is normalised over"
PADDING = "is padding"
PIXELS = "is the side of a block of pixels"
PAIR = "is the real and the imaginary part of a number"
Dims = list[Composition]


class Kind(Enum):
    """How an operator treats the units of an axis that it keeps, or contracts."""

    POINTWISE = "computes each entry from the entries at its place"
    SEPARATE = "computes each unit from the same unit"
    MOVE = "moves entries"
    NORM = "normalises each unit by its own statistics"
    CENTER = "normalises units by the mean and spread of all"
    CONTRACT = "sums products over units"
    SUM = "sums over units"
    ATTEND = "sums values, weighted by products of queries and keys"
    GATHER = "looks up rows"
    FILL = "fills a new tensor"
    RANDOM = "draws random numbers"
    OVERWRITTEN = "is another view of what was written in place"


@dataclass(eq=False)
class Call:
    """One ATen call as it is seen: the arguments, the results, and the layouts known so far.

    `strides` are those that the tensor arguments had before the call, which may set them in place.
    """

    func: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: list[Tensor]
    of: Callable[[Tensor], Dims]
    strides: tuple[tuple[int, ...], ...] = ()

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """Return an argument given by position or by name."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)

    def tensors(self) -> list[Tensor]:
        """Return the tensors among the arguments, in order."""
        return [t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]


@dataclass(frozen=True)
class Contracted:
    """A dim of the input tensor number `slot` over which products are summed."""

    slot: int
    dim: int
    over: Composition


@dataclass(frozen=True)
class Window:
    """A dim of the first output where each entry is a sum over a window of the input's entries.

    The window reaches `before` and `after` positions beyond the entry's own, over zeros where it
    leaves the dim, unless the input was padded there by something else.
    """

    dim: int
    before: int
    after: int


@dataclass(frozen=True)
class Outcome:
    """The layouts of the outputs, and what a contraction sums over.

    `batched` is the layout that both factors keep; `bias` the slot of an added per-unit input;
    `border` is true where a constant unit adds something else than the sum of its weights: less
    near zero padding, a multiple where the product is scaled. `mixed` is the dim whose units a norm
    compares with each other, `standardised` one that it may compare in a parameter, whose numbers
    are known; `windows` are dims along which units are added to those beside them.
    """

    outs: Sequence[Dims]
    contracted: tuple[Contracted, ...] = ()
    batched: Composition = ONE
    bias: int | None = None
    border: bool = False
    mixed: Composition = ONE
    standardised: Composition = ONE
    windows: tuple[Window, ...] = ()


@dataclass(frozen=True)
class Row:
    """All that is known of one operator.

    `keeps` says which constant content of a unit survives: "any" constant stays as it is, "zero"
    alone stays, "none". `homogeneous`: a unit times a positive number gives the output times it;
    `odd`: a unit times −1 gives the output times −1.
    """

    relate: Callable[[Call], Outcome]
    kind: Kind
    keeps: str = "none"
    homogeneous: bool = False
    odd: bool = False


def computed(size: int) -> Composition:
    """Return a dim of a size that the model computes."""
    return ONE if size == 1 else fresh(size, SPATIAL)


def all_computed(out: Tensor) -> Dims:
    """Return the layouts of a tensor all of whose sizes the model computes."""
    return [computed(s) for s in out.shape]


def goes_over(c: Call) -> str:
    """Return why the dims that an operator goes over keep their sizes, with its name."""
    return f"is space that '{_named(c)}' goes over"


def mixes(c: Call) -> str:
    """Return why the units that an operator compares cannot be more, with its name."""
    return f"goes into '{_named(c)}', which mixes its units"


def _named(c: Call) -> str:
    return c.func.overloadpacket.__name__.strip("_").removeprefix("native_")
