"""The natural expansion score of a layer, and what more activations would add to it.

The layer's block of the Fisher matrix is taken for a product of two factors, S ⊗ A: the covariance
A of what it reads and the metric S of what it writes. Source: Mitchell, Mundt, Kersting (2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Block:
    """One weight's damped factors and gradient, for each of g groups.

    `inputs` `(g, b, b)` is A + δI and `metric` `(g, o, o)` S + εI, with δ = `ridge` and ε the
    `damping` times the mean of the diagonal of A and of S; `cross` `(g, b, o)` is the gradient.
    """

    inputs: Tensor
    metric: Tensor
    cross: Tensor
    ridge: float

    @staticmethod
    def of(inputs: Tensor, metric: Tensor, cross: Tensor, damping: float) -> Block:
        """Return the block with both factors damped."""
        ridge = damping * _level(inputs)
        return Block(_plus(inputs, ridge), _plus(metric, damping * _level(metric)), cross, ridge)

    def update(self) -> Tensor:
        """Return what predicts the gradient from what is read, A⁻¹E[a gᵀ]: `(g, b, o)`."""
        return torch.linalg.solve(self.inputs, self.cross)

    def whiten(self, gradients: Tensor) -> Tensor:
        """Return gradients `(g, o, ...)` in the coordinates in which S is the identity."""
        root = torch.linalg.cholesky(self.metric).to(gradients)
        flat = torch.linalg.solve_triangular(root, gradients.flatten(2), upper=False)
        return flat.unflatten(2, gradients.shape[2:])

    def score(self) -> float:
        """Return η = Tr[S⁻¹E[g aᵀ]A⁻¹E[a gᵀ]], the sum over groups.

        It is the decrease of the loss for one unit of natural-gradient learning rate, as far as
        this layer brings it about.

        Source: Mitchell et al. (2023), section 3.6.
        """
        gradient = torch.linalg.solve(self.metric, self.cross.mT).mT
        return float((self.update() * gradient).sum())

    def bound(self, own: Tensor, cross: Tensor) -> Tensor:
        """Return the lower bound Δη′ on what proposals add, `(k,)`.

        For each of k proposals with `e` activations, `own` `(g, k, e, e)` is their covariance and
        `cross` `(g, k, e, o)` their moment with the whitened residual gradient.

        Source: Mitchell et al. (2023), theorem 2.
        """
        return _explained(_plus(own, self.ridge), cross)

    def increase(self, own: Tensor, cross: Tensor, among: Tensor) -> Tensor:
        """Return what proposals add to η exactly, `(k,)`, by the Schur complement of A.

        `among` `(g, k, e, b)` is the moment of their activations with what is read now; the rest is
        as in `bound`.

        Source: Mitchell et al. (2023), corollary 3.1.
        """
        known = torch.linalg.solve(self.inputs[:, None], among.mT)
        return _explained(_plus(own, self.ridge) - among @ known, cross)


def _explained(own: Tensor, cross: Tensor) -> Tensor:
    """Return Tr[own⁻¹ cross crossᵀ] summed over groups, `(k,)`."""
    return (torch.linalg.solve(own, cross) * cross).sum((0, 2, 3))


def _plus(matrix: Tensor, amount: float) -> Tensor:
    return matrix + amount * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def _level(matrix: Tensor) -> float:
    """Return the mean of the diagonal, one where all of it is zero: nothing is read or wanted."""
    return float(matrix.diagonal(dim1=-2, dim2=-1).mean()) or 1.0
