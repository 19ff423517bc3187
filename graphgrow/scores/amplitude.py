"""The step beyond growing that some methods take: to where their units lead, as far as it helps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphgrow.ir.graph import Graph
from graphgrow.ir.lower import lower
from graphgrow.moments import Loss
from graphgrow.passes.rewrite import Grown
from graphgrow.passes.units import Resized, inserted
from graphgrow.passes.weights import Given
from graphgrow.scores.departure import Departure
from graphgrow.scores.proposal import Proposal

AMPLITUDES = tuple(2.0**k for k in range(-14, 5))


@dataclass(frozen=True)
class Amplified:
    """What was found along an amplitude: the best one and the loss without and with it."""

    amplitude: float
    before: float
    after: float


def amplify(
    grown: Grown,
    proposal: Proposal,
    batches: Sequence[tuple[Any, Any]],
    loss: Loss,
    amplitudes: Iterable[float] = AMPLITUDES,
) -> Amplified:
    """Go from a rewrite to its proposal's target by a line search, and return what that changed.

    Where the target is weights (TINY's), new units get √γ times them on both sides, outgoing ones
    with the sign of γ (the paper's activations are linear, ReLU is not); where it is a `Departure`,
    γ is the step along it. γ is that of `amplitudes`, each tried with both signs, with the smallest
    mean loss on `batches` in eval mode; 0, and nothing is written, where none is smaller than
    before. The numbers are written into the tensors of `grown.graph`, so that an optimizer that
    holds them goes on.

    Raises:
        ValueError: where the proposal has no target.

    Source: Verbockhaven et al. 2024, section 3.2 and appendix D.3.
    """
    if proposal.target is None:
        raise ValueError(f"cannot amplify {proposal.rewrite.axis}: the proposal has no target")
    before, graph = mean_loss(grown.graph, batches, loss), grown.graph
    kept = {path: graph.state[path].detach().clone() for path in grown.origin}
    best = Amplified(0.0, before, before)
    for size in amplitudes:
        for gamma in (size, -size):
            go(grown, proposal, gamma)
            found = mean_loss(graph, batches, loss)
            if found < best.after:
                best = Amplified(gamma, before, found)
            with torch.no_grad():
                for path, tensor in kept.items():
                    graph.state[path].copy_(tensor)
    if best.amplitude:
        go(grown, proposal, best.amplitude)
    return best


def go(grown: Grown, proposal: Proposal, gamma: float) -> None:
    """Write the weights at an amplitude into tensors that are as the rewrite left them."""
    if isinstance(proposal.target, Departure):
        proposal.target.add(grown, gamma)
    else:
        write(grown, amplified(proposal, gamma))


def amplified(proposal: Proposal, gamma: float) -> Given:
    """Return √|γ| times a proposal's target on both sides, outgoing weights with the sign of γ."""
    assert isinstance(proposal.target, Given)
    root = abs(gamma) ** 0.5

    def times(factor: float, weights: tuple[tuple[str, Any], ...]) -> dict[str, Tensor]:
        return {path: factor * torch.tensor(w, dtype=torch.double) for path, w in weights}

    outgoing = times(root if gamma >= 0 else -root, proposal.target.outgoing)
    return Given.of(times(root, proposal.target.incoming), outgoing)


def write(grown: Grown, weights: Given) -> None:
    """Write entries of the new units of one widening into the grown tensors; the rest stays."""
    (rewrite,) = grown.rewrites
    axis = grown.before.axis(rewrite.axis)
    units = inserted(axis.width, rewrite.units, rewrite.at)
    change = Resized(grown.before.analysis, axis.name, units)
    written = {at.path: at.dim for at in (*axis.carriers, *axis.producers)}
    read = {at.path: at.dim for at in axis.consumers}
    for dims, entries in ((written, weights.incoming), (read, weights.outgoing)):
        for path, values in entries:
            tensor = grown.graph.state[path].detach()
            places = torch.from_numpy(change.at(path, dims[path])[change.new].reshape(-1))
            moved = tensor.movedim(dims[path], 0)
            numbers = torch.tensor(values, dtype=torch.double).to(tensor)
            moved[places.to(tensor.device)] = numbers.reshape(len(places), *moved.shape[1:])


def mean_loss(graph: Graph, batches: Iterable[tuple[Any, Any]], loss: Loss) -> float:
    """Return the mean loss over the examples of batches, in eval mode."""
    model, total, count = lower(graph).eval(), 0.0, 0
    with torch.no_grad():
        for inputs, target in batches:
            given = inputs if isinstance(inputs, tuple) else (inputs,)
            examples = len(given[0])
            total += float(loss(model(*given), target)) * examples
            count += examples
    return total / max(count, 1)
