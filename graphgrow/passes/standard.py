"""Weights that a norm brings to mean zero and one size before they are used (standardisation).

Entries of new units leave the mean of a row as it was if they are that mean, and come out as zero.
Only the row's spread falls, by a known factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from graphgrow.ir.analyse import ParameterDim, Step
from graphgrow.passes.units import Resized


@dataclass(frozen=True)
class Standard:
    """A parameter dim over whose units a norm goes, among others, and the dim of its rows."""

    at: ParameterDim
    rows: int

    def means(self, resized: Resized, tensor: Tensor) -> Tensor:
        """Return what the new units' entries `(units, entries)` are if they are a row's mean."""
        places = resized.at(self.at.path, self.at.dim)[resized.old].reshape(-1)
        old = (
            tensor.detach()
            .double()
            .index_select(self.at.dim, torch.from_numpy(places).to(tensor.device))
        )
        over = [d for d in range(tensor.dim()) if d != self.rows]
        mean = old.mean(over, keepdim=True).expand(tensor.shape)
        return resized.slices(mean, self.at.path, self.at.dim)[torch.from_numpy(resized.new)]


def standards(resized: Resized) -> Iterator[tuple[Step, Standard | None]]:
    """Yield the steps that standardise a weight over the axis, and which; None where unclear."""
    analysis = resized.analysis
    for step in analysis.touching(resized.axis):
        if resized.axis in step.standardised:
            yield step, _standard(resized, step)


def _standard(resized: Resized, step: Step) -> Standard | None:
    analysis = resized.analysis
    path = analysis.sources[step.inputs[0]].path
    kept = analysis.values[step.inputs[0]][1]
    rows = [d for d, layout in enumerate(analysis.state[path]) if layout == kept]
    dims = [d for d in resized.dims(path) if d not in rows[:1]]
    found = len(dims) == 1 and rows and rows[0] != dims[0]
    return Standard(ParameterDim(path, dims[0]), rows[0]) if found else None
