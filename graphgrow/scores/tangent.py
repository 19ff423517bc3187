"""The bottleneck at a network's output: what the best update of all its weights cannot do.

Source: Verbockhaven, Rudkiewicz, Charpiat, Chevallier 2024, "Growing tiny networks", section 2.2
and eq. 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

from graphgrow.ir.graph import Graph
from graphgrow.ir.lower import lower
from graphgrow.moments import Loss
from graphgrow.scores.amplitude import Batches

Weights = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Reach:
    """How far all weights reach towards the desired update of the outputs, to first order.

    `desired` is its mean squared norm over examples and `bottleneck` (Ψ) what the best update of
    the weights leaves of it, in units of (loss per output)². `update` is that update by path.
    """

    desired: float
    bottleneck: float
    update: Mapping[str, Tensor]


def output_bottleneck(
    graph: Graph, batches: Batches, loss: Loss, steps: int = 1000, least: float = 1e-12
) -> Reach:
    """Return what an update of all weights can do at the output of a graph, in eval mode.

    The least squares problem is solved by conjugate gradients (CGLS) with products of the Jacobian
    alone, at most `steps` of two passes over the batches each; it ends where the squared gradient
    is `least` times that at the start. Each step lowers the bottleneck: it is never underestimated.
    The output must be one tensor, its first dim the examples.
    """
    model = lower(graph).eval()
    weights = {path: p.detach() for path, p in model.named_parameters()}
    given = [inputs if isinstance(inputs, tuple) else (inputs,) for inputs, _ in batches]
    count = sum(len(inputs[0]) for inputs in given)
    left = [_desired(model, x, y, loss) for x, (_, y) in zip(given, batches, strict=True)]
    desired = _size(left) / count
    update = {path: torch.zeros_like(w) for path, w in weights.items()}
    wanted = _back(model, weights, given, left)
    direction, size = wanted, _size(wanted.values())
    first = size
    for _ in range(steps):
        if size <= least * first:
            break
        moved = [_ahead(model, weights, x, direction) for x in given]
        length = size / _size(moved)
        update = {path: update[path] + length * direction[path] for path in update}
        left = [r - length * m for r, m in zip(left, moved, strict=True)]
        wanted = _back(model, weights, given, left)
        before, size = size, _size(wanted.values())
        direction = {path: wanted[path] + size / before * direction[path] for path in update}
    return Reach(desired, _size(left) / count, update)


def _size(tensors: Any) -> float:
    return sum(float(t.double().square().sum()) for t in tensors)


def _desired(model: nn.Module, inputs: tuple[Any, ...], target: Any, loss: Loss) -> Tensor:
    """Return minus the gradient of each example's loss at its output."""
    output = model(*inputs).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(output, target), output)
    return -len(output) * gradient


def _ahead(
    model: nn.Module, weights: Weights, inputs: tuple[Any, ...], direction: Weights
) -> Tensor:
    """Return how outputs move with the weights, to first order.

    It is the derivative of the transposed product, which is linear: torch's forward mode lacks
    operators and scripts some.
    """
    output, back, *_ = vjp(lambda w: functional_call(model, w, inputs), weights)
    ahead = vjp(lambda left: back(left)[0], torch.zeros_like(output))[1]
    return ahead(direction)[0]


def _back(
    model: nn.Module, weights: Weights, given: list[tuple[Any, ...]], left: list[Tensor]
) -> Weights:
    """Return the product of the transposed Jacobian with what is left at the outputs."""
    total = {path: torch.zeros_like(w) for path, w in weights.items()}
    for x, rest in zip(given, left, strict=True):
        (found,) = vjp(lambda w, x=x: functional_call(model, w, x), weights)[1](rest)
        total = {path: total[path] + found[path] for path in total}
    return total
