"""A straight line away from what a rewrite made: the part of a method that changes the function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphgrow.passes.rewrite import Grown
from graphgrow.passes.units import Resized, inserted
from graphgrow.scores.rows import Rows


@dataclass(frozen=True)
class Departure:
    """What a step of one adds to the weights of some units, present ones or new.

    `units` are positions in the widened axis; `weights` holds by parameter path, for each of them,
    that parameter's entries, `(units, entries)` as in `Given`.
    """

    units: tuple[int, ...]
    weights: tuple[tuple[str, Any], ...]

    @staticmethod
    def of(units: np.ndarray, weights: Mapping[str, Tensor]) -> Departure:
        """Return the departure that holds these tensors' numbers."""
        rows = ((path, tuple(map(tuple, w.tolist()))) for path, w in sorted(weights.items()))
        return Departure(tuple(int(u) for u in units), tuple(rows))

    def add(self, grown: Grown, step: float) -> None:
        """Add `step` times the line to the tensors of one widening."""
        (rewrite,) = grown.rewrites
        axis = grown.before.axis(rewrite.axis)
        change = Resized(
            grown.before.analysis, axis.name, inserted(axis.width, rewrite.units, rewrite.at)
        )
        dims = {at.path: at for at in (*axis.producers, *axis.carriers, *axis.consumers)}
        for path, entries in self.weights:
            rows = Rows(change, np.array(self.units), (dims[path],))
            now = rows.read(grown.graph.state).detach().double()
            line = torch.tensor(entries, dtype=torch.double, device=now.device)
            rows.write(grown.graph.state, now + step * line)
