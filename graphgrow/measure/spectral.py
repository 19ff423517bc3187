"""Inverses of covariances that may be singular: directions without any variance are left out."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_root(covariance: Tensor, power: float = -0.5, of: Tensor | None = None) -> Tensor:
    """Return a power of a covariance `(..., n, n)`, zero where it has no variance.

    Eigenvalues below n times the rounding of the largest count as zero. Where the covariance is
    what was left of another, that is `of`, whose largest eigenvalue counts then.
    """
    values, vectors = torch.linalg.eigh(covariance)
    largest = values if of is None else torch.linalg.eigvalsh(of)
    bound = largest[..., -1:].abs() * covariance.shape[-1] * torch.finfo(values.dtype).eps
    kept = values > bound
    scale = torch.where(kept, torch.where(kept, values, 1.0) ** power, 0.0)
    return (vectors * scale[..., None, :]) @ vectors.mT


def best_update(present: Tensor, desired: Tensor) -> Tensor:
    """Return the update of a layer's weights that comes nearest to the desired one, `(g, b, o)`.

    `present` `(g, b, b)` and `desired` `(g, b, o)` are moments of what the layer reads.

    Source: Verbockhaven et al. 2024, Prop. 3.1.
    """
    return inverse_root(present, -1.0) @ desired
