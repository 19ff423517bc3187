"""What new units of an edited axis hold in a tensor, and what of it arrives where it is summed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from graphgrow.ir.analyse import ParameterDim, Step
from graphgrow.passes.mixtures import MEAN

CONSTANT = -1


@dataclass(frozen=True, eq=False)
class Content:
    """What new units hold in one tensor: `scale` times unit `like`, or where that is −1 `scale`.

    Units are positions in the wider axis. A unit that is like itself is arbitrary, one that is like
    −2 the mean of the old ones, below that a mean with weights (`Mixtures`). `slope` says how a
    constant moves with the weights that write it, per unit of its pre-activation; zero means that
    those weights get no gradient. `units` are the new units themselves, `uniform`: all hold the
    same.
    """

    units: np.ndarray
    like: np.ndarray
    scale: np.ndarray
    slope: np.ndarray
    uniform: bool = False

    def constant(self) -> np.ndarray:
        """Return which units hold a constant."""
        return self.like == CONSTANT

    def mean(self) -> np.ndarray:
        """Return which units hold the mean of the old ones."""
        return self.like == MEAN

    def mixed(self) -> np.ndarray:
        """Return which units hold a mean of the old ones, with any weights."""
        return self.like <= MEAN

    def zero(self) -> np.ndarray:
        """Return which units are zero."""
        return self.constant() & (self.scale == 0)


@dataclass(frozen=True, eq=False)
class Arrival:
    """New units of known content at an operator that contracts them.

    `weight` is the parameter dim they meet, None where two activations meet or a plain sum is
    taken; `other` is the other factor's content then.
    """

    step: Step
    content: Content
    weight: ParameterDim | None
    other: Content | None = None


@dataclass(frozen=True, eq=False)
class Reduction:
    """The weights that a narrower axis needs: `columns` `(old width, entries)`.

    `own` is the sum left for new units that hold something of their own, zero where the narrower
    layer can do without them; `constant` is what constant units add, `(entries,)`.
    """

    columns: Tensor
    own: Tensor
    constant: Tensor
