"""Which new units have incoming weights that are a multiple of another unit's."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def likeness(
    incoming: Tensor, old: np.ndarray, new: np.ndarray, asked: np.ndarray, eps: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each new unit the unit that it is a multiple of, itself for none, and the factor.

    `incoming` has the weights of all units, `(units, entries)`, equal up to rounding at the
    precision `eps`; a new unit is like an old one or a new one before it. `asked`, `(new,)`, says
    which are looked at.
    """
    if incoming.is_complex():
        incoming = torch.view_as_real(incoming).flatten(1)
    like, scale = new.copy(), np.ones(len(new))
    norms = incoming.norm(dim=1)
    directions = incoming / norms.clamp(min=1e-300)[:, None]
    order, looked_at = np.concatenate([old, new]), np.flatnonzero(asked)
    cosines = directions[torch.from_numpy(new[looked_at])] @ directions.T
    parallel = cosines.abs().numpy() > 1 - 1e-12
    for k, alike in zip(looked_at, parallel, strict=True):
        before = order[: len(old) + k]
        if norms[new[k]] != 0:
            candidates = before[alike[before]]
            found = next(iter(_multiples(incoming, norms, new[k], candidates, eps)), None)
            like[k], scale[k] = found or (new[k], 1.0)
    return like, scale


def _multiples(
    incoming: Tensor, norms: Tensor, unit: int, candidates: np.ndarray, eps: float
) -> Iterator[tuple[int, float]]:
    """Yield the candidates that a unit is a multiple of, equal ones first, with the factor."""
    for i in candidates:
        if torch.equal(incoming[i], incoming[unit]):
            yield int(i), 1.0
    for i in candidates:
        ratio = float(incoming[unit] @ incoming[i] / norms[i] ** 2)
        if close(incoming[unit], ratio * incoming[i], eps):
            yield int(i), ratio


def close(a: Tensor, b: Tensor, eps: float) -> bool:
    """Return whether two rows are equal up to rounding at the precision `eps`."""
    if eps == 0:
        return torch.equal(a, b)
    return bool((a - b).abs().max() <= 8 * eps * max(float(a.abs().max()), 1e-300))
