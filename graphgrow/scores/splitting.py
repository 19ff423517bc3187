"""Splitting steepest descent: units are split where that lowers the loss most.

Source: Wu, Wang, Liu 2019, "Splitting steepest descent for growing neural architectures".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graphgrow.ir.graph import Graph
from graphgrow.measure.replica import Replica, size
from graphgrow.moments import Loss
from graphgrow.scores.proposal import Proposal
from graphgrow.scores.twins import Batches, Twins, apart, splittable

LEAST = 1e-9  # eigenvalues nearer to zero than this share of the largest are none


@dataclass(frozen=True)
class Splitting:
    """Units split in two along the eigenvector of their splitting matrix' smallest eigenvalue.

    With v that vector, of length one, and λ its eigenvalue, half of a unit's outgoing weights go to
    a unit at θ + εv and half to one at θ − εv; to second order the loss changes by ε²λ/2. Of each
    axis the `units` with the smallest negative λ are proposed. The rewrite is the split alone: two
    equal halves, which learn the same until `target` moves them apart by ε.

    The gain is the decrease of the loss for one squared step ε². Eigenvalues are those of Lanczos'
    method in `steps` steps, each a second derivative on all batches, of all units of an axis
    together: exact up to so many incoming weights, else no smaller than the true ones. Splitting
    matrices are zero for piecewise linear activations (ReLU), which are never proposed.
    """

    units: int = 1
    steps: int = 16
    seed: int = 0

    def propose(
        self, graph: Graph, batches: Batches, loss: Loss, axes: Sequence[str] | None = None
    ) -> list[Proposal]:
        """Return a proposal for each axis, of those asked for or all, where a split helps."""
        batches = list(batches)
        made = [self._proposal(graph, name, batches, loss) for name in splittable(graph, axes)]
        return [p for p in made if p is not None]

    def _proposal(self, graph: Graph, name: str, batches: Batches, loss: Loss) -> Proposal | None:
        times, like = splitting(graph, name, batches, loss)
        generator = torch.Generator().manual_seed(self.seed)
        start = torch.randn(like.shape, generator=generator, dtype=torch.double).to(like)
        values, vectors = smallest(times, start, self.steps)
        order = values.argsort()[: self.units]
        chosen = [int(u) for u in order if values[u] < 0]
        if not chosen:
            return None
        gain = float(-values[chosen].sum() / 2)
        return apart(graph, name, chosen, vectors[chosen], gain, "squared step")


def splitting(
    graph: Graph, name: str, batches: Batches, loss: Loss
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return what multiplies each unit's splitting matrix by a vector, and the vectors' likeness.

    Vectors are `(units, entries)`: incoming weights, biases with them. Twins that are moved apart
    change the loss in second order only, and no two units together: so the loss's second derivative
    by the difference of all twins is all splitting matrices at once, whatever the graph is between.
    """
    twins = Twins.of(graph, name)
    first, second = twins.first, twins.second
    replica = Replica(twins.graph, first.paths)

    def times(vectors: Tensor) -> Tensor:
        total, count = torch.zeros_like(vectors), 0
        for batch in batches:
            examples = size(batch[0])
            value = replica.loss([batch], loss)
            slopes = first.gradient(value, replica.tensors, further=True)
            slopes = slopes - second.gradient(value, replica.tensors, further=True)
            along = (slopes * vectors).sum()
            if along.requires_grad:
                found = first.gradient(along, replica.tensors)
                total += examples * (found - second.gradient(along, replica.tensors)).detach()
            count += examples
        return total / max(count, 1)

    return times, first.read(replica.tensors).detach()


def splitting_matrices(graph: Graph, axis: str, batches: Batches, loss: Loss) -> Tensor:
    """Return the splitting matrix of each unit of an axis, `(units, entries, entries)`.

    Entries are incoming weights by producer, then biases. Source: Wu et al. 2019, equation 5.
    """
    times, like = splitting(graph, graph.axis(axis).name, list(batches), loss)
    columns = []
    for k in range(like.shape[1]):
        vectors = torch.zeros_like(like)
        vectors[:, k] = 1.0
        columns.append(times(vectors))
    return torch.stack(columns, 2)


def smallest(times: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return the smallest eigenvalue `(units,)` and its vector `(units, entries)` of each matrix.

    Lanczos' method from `start` `(units, entries)`, with all vectors kept orthogonal.
    """
    basis: list[Tensor] = []
    products: list[Tensor] = []
    vector = F.normalize(start, dim=1)
    for _ in range(min(steps, start.shape[1])):
        basis.append(vector)
        products.append(times(vector))
        vector = products[-1]
        for _ in range(2):  # twice is enough
            q = torch.stack(basis, 1)
            vector = vector - ((q @ vector[..., None]).mT @ q)[:, 0]
        if not (vector.norm(dim=1) > LEAST * products[0].norm(dim=1)).any():
            break
        vector = F.normalize(vector, dim=1)
    q, p = torch.stack(basis, 1), torch.stack(products, 1)
    projected = q @ p.mT
    values, vectors = torch.linalg.eigh((projected + projected.mT) / 2)
    least = LEAST * values.abs().amax(1)
    found = torch.where(values[:, 0] < -least, values[:, 0], values[:, 0].clamp(min=0.0))
    return found, F.normalize((vectors[..., :1].mT @ q)[:, 0], dim=1)
