"""New units that are weighted means of the old ones, and what weights a scale per unit asks for.

A norm over units keeps the old ones where a new one is their plain mean. Where a scale stands
between (LayerScale), what is scaled has to be the mean with other weights: the scale's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from graphgrow.ir.analyse import ParameterDim, Source, Step
from graphgrow.ir.outcome import Kind, aten
from graphgrow.passes.units import Resized

MEAN = -2  # the code of the plain mean; those below are means with weights

_PRODUCTS = {aten.mul, aten.mul_}
_SUMS = {aten.add, aten.add_, aten.sub, aten.sub_}


class Mixtures:
    """The weights of the means that new units of one axis may be, each `(old width,)`, by code."""

    def __init__(
        self, resized: Resized, slices: Callable[[ParameterDim], Tensor], *, scaled: bool
    ) -> None:
        """With `scaled`, know what the scales of the graph ask of the layers before them."""
        self.plain = np.full(len(resized.old), 1 / max(len(resized.old), 1))
        self._weights = [self.plain]
        self._before: dict[ParameterDim, int] = {}
        for scale, written in scales(resized).items() if scaled else ():
            entries = slices(scale)
            old, new = (entries[torch.from_numpy(u)] for u in (resized.old, resized.new))
            if entries.shape[1] == 1 and len(new) and (new == new[0]).all() and new[0] != 0:
                code = self._code(weights_before(old, new))
                self._before.update(dict.fromkeys(written, code))

    def weights(self, code: int) -> np.ndarray:
        """Return the weights of a mean."""
        return self._weights[MEAN - code]

    def asked(self, at: ParameterDim | None) -> tuple[int, ...]:
        """Return the means that the entries of a parameter dim may be, the plain one first."""
        return (MEAN, self._before[at]) if at in self._before else (MEAN,)

    def scaled(self, code: int, old: np.ndarray, new: float) -> int | None:
        """Return the mean that another becomes when every unit is multiplied by a number."""
        weights = self.weights(code)
        with np.errstate(divide="ignore", invalid="ignore"):
            moved = np.where((old == 0) & (weights == 0), self.plain, new * weights / old)
        return self._code(moved) if np.isfinite(moved).all() else None

    def _code(self, weights: np.ndarray) -> int:
        for known, others in enumerate(self._weights):
            if np.allclose(weights, others, rtol=1e-13, atol=0):
                return MEAN - known
        self._weights.append(weights)
        return MEAN - len(self._weights) + 1


def weights_before(old: Tensor, new: Tensor) -> np.ndarray:
    """Return the weights that a scale makes the plain mean: its own numbers over the new one.

    `old` and `new` are its entries `(units, 1)`, those of new units all equal.
    """
    return (old[:, 0].double() / (new[0, 0].double() * len(old))).cpu().numpy()


def scales(resized: Resized) -> Mapping[ParameterDim, frozenset[ParameterDim]]:
    """Return the parameters that units are multiplied with, and what writes those units.

    That is rows, biases and tables by unit, with sums and moves between at most.
    """
    analysis, found = resized.analysis, dict[ParameterDim, frozenset[ParameterDim]]()
    touching = analysis.touching(resized.axis)
    makers = {number: step for step in touching for number in step.outputs}
    carriers = set(analysis.axes[resized.axis].carriers)
    for step in touching:
        if step.func.overloadpacket not in _PRODUCTS or len(step.inputs) != 2:
            continue
        for number, other in (step.inputs, step.inputs[::-1]):
            for scale in _dims(resized, analysis.sources.get(number)) & carriers:
                found[scale] = found.get(scale, frozenset()) | _writers(resized, makers, other)
    return {scale: written for scale, written in found.items() if written}


def _dims(resized: Resized, source: Source | None) -> frozenset[ParameterDim]:
    if source is None:
        return frozenset()
    return frozenset(ParameterDim(source.path, d) for d in resized.dims(source.path))


def _writers(resized: Resized, makers: Mapping[int, Step], value: int) -> frozenset[ParameterDim]:
    """Return the parameter dims that a value is written with, none if by other steps as well."""
    sources, found = resized.analysis.sources, frozenset[ParameterDim]()
    left, seen = [value], set[int]()
    while left:
        number = left.pop()
        if number in seen:
            continue
        seen.add(number)
        step = makers.get(number)
        if number in sources:
            found |= _dims(resized, sources[number])
        elif step is None:
            return frozenset()
        elif step.row.kind is Kind.CONTRACT:
            found |= frozenset().union(*(_dims(resized, sources.get(n)) for n in step.inputs))
        elif step.row.kind is Kind.MOVE or step.func.overloadpacket in _SUMS:
            left += step.inputs
        elif step.func.overloadpacket is aten.native_dropout:
            left.append(step.inputs[0])
        else:
            return frozenset()
    return found
