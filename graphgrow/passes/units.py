"""Tensors seen unit by unit: slices of an axis, and the index map of an edited axis."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graphgrow.ir.analyse import Analysis
from graphgrow.passes.rewrite import TensorOrigin


@dataclass(frozen=True, eq=False)
class Resized:
    """One axis before and after an edit: `units` has the old unit of every new unit, −1 for new."""

    analysis: Analysis
    axis: str
    units: np.ndarray

    @property
    def old(self) -> np.ndarray:
        """The positions, in the wider axis, of the units that exist in both."""
        return np.flatnonzero(self.units >= 0)

    @property
    def new(self) -> np.ndarray:
        """The positions, in the wider axis, of the units that only it has."""
        return np.flatnonzero(self.units < 0)

    def widths(self) -> dict[str, int]:
        """Return the width of every axis after the edit."""
        return {**self.analysis.widths(), self.axis: len(self.units)}

    def dims(self, path: str) -> list[int]:
        """Return the dims of a tensor in which the axis takes part."""
        layouts = self.analysis.state[path]
        return [d for d, layout in enumerate(layouts) if self.axis in layout.axes()]

    def paths(self) -> tuple[str, ...]:
        """Return the tensors that the edit changes, tied ones by their first path."""
        return self.analysis.tensors(self.axis)

    def origin(self, path: str) -> TensorOrigin:
        """Return where each entry of a changed tensor comes from."""
        widths, moved = self.analysis.widths(), {self.axis: self.units}
        changed = self.dims(path)
        return TensorOrigin(
            tuple(
                torch.from_numpy(layout.origin(widths, moved)) if d in changed else None
                for d, layout in enumerate(self.analysis.state[path])
            )
        )

    def at(self, path: str, dim: int) -> np.ndarray:
        """Return, for each unit after the edit, its positions along a dim: `(width, places)`."""
        units = self.analysis.state[path][dim].units(self.widths(), self.axis)
        order = np.argsort(units, kind="stable")
        return order[(units < 0).sum() :].reshape(len(self.units), -1)

    def slices(
        self, tensor: Tensor, path: str, dim: int, units: np.ndarray | None = None
    ) -> Tensor:
        """Return a tensor's entries by unit on the CPU: `(units, entries)`, of all or of some."""
        places = self.at(path, dim) if units is None else self.at(path, dim)[units]
        found = picked(tensor.detach().cpu().movedim(dim, 0), places.reshape(-1))
        return found.reshape(len(places), places.shape[1] * math.prod(found.shape[1:]))


def precise(tensor: Tensor) -> Tensor:
    """Return a tensor's numbers in double precision, complex ones as such."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float64))


def picked(tensor: Tensor, places: np.ndarray) -> Tensor:
    """Return some rows of a tensor, without copying where they lie one after the other."""
    first = int(places[0]) if len(places) else 0
    if np.array_equal(places, np.arange(first, first + len(places))):
        return tensor[first : first + len(places)]
    return tensor.index_select(0, torch.from_numpy(places).to(tensor.device))


def gather(tensor: Tensor, origin: TensorOrigin) -> Tensor:
    """Return a tensor's entries moved to their new places, zero where they are new."""
    moved = tensor.detach()
    for dim, index in enumerate(origin.dims):
        if index is not None:
            index = index.to(moved.device)
            moved = moved.index_select(dim, index.clamp(min=0))
            shape = [-1 if d == dim else 1 for d in range(moved.dim())]
            moved = moved.masked_fill_((index < 0).reshape(shape), 0)
    return moved


def times(tensor: Tensor, factor: float) -> Tensor:
    """Return a tensor multiplied by a number, rounded once."""
    return (precise(tensor.detach()) * factor).to(tensor.dtype)


def is_new(origin: TensorOrigin, shape: torch.Size) -> Tensor:
    """Return which entries of a changed tensor are new."""
    new = torch.zeros(shape, dtype=torch.bool)
    for dim, index in enumerate(origin.dims):
        if index is not None:
            new |= (index < 0).reshape([-1 if d == dim else 1 for d in range(len(shape))])
    return new


def inserted(width: int, count: int, at: int | None) -> np.ndarray:
    """Return the old unit of every unit after `count` new ones are inserted before unit `at`."""
    place = width if at is None else at
    old = np.arange(width)
    return np.concatenate([old[:place], np.full(count, -1), old[place:]])


def resized_state(
    state: Mapping[str, Tensor], resized: Resized
) -> tuple[dict[str, Tensor], dict[str, TensorOrigin]]:
    """Return the changed tensors with zeros for new entries, and their origins."""
    origins = {path: resized.origin(path) for path in resized.paths()}
    return {path: gather(state[path], o) for path, o in origins.items()}, origins
