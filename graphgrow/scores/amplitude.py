"""The step beyond growing that some methods take: to where their units lead, as far as it helps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphgrow.ir.graph import Graph
from graphgrow.ir.lower import lower
from graphgrow.moments import Loss
from graphgrow.passes.rewrite import Grown
from graphgrow.passes.units import Resized, gather, inserted
from graphgrow.passes.weights import Given
from graphgrow.scores.departure import Departure
from graphgrow.scores.proposal import Proposal

Batches = Sequence[tuple[Any, Any]]
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
    batches: Batches,
    loss: Loss,
    amplitudes: Iterable[float] = AMPLITUDES,
) -> Amplified:
    """Go from a rewrite to its proposal's target by a line search, and return what that changed.

    Where the target is weights (TINY's), new units get √γ times them on both sides, outgoing ones
    with the sign of γ (the paper's activations are linear, ReLU is not); where it is a `Departure`,
    γ is the step along it. γ is that of `amplitudes`, each tried with both signs, with the smallest
    mean loss on `batches`, in eval mode; 0, and nothing is written, where none is smaller than
    before. Where the proposal has an update of present weights, |γ| times that is added. The
    numbers are written into the tensors of `grown.graph`, so that an optimizer that holds them goes
    on; biases that the graph before growth shares change there too.

    Raises:
        ValueError: where the proposal has no target.

    Source: Verbockhaven et al. 2024, section 3.2 and appendix D.3.
    """
    if proposal.target is None:
        raise ValueError(f"cannot amplify {proposal.place}: the proposal has no target")
    kept = _kept(grown.graph, [*grown.origin, *proposal.update])

    def put(gamma: float) -> None:
        _put(grown.graph, kept)
        if gamma:
            go(grown, proposal, gamma)

    signed = [gamma for size in amplitudes for gamma in (size, -size)]
    return _searched(grown.graph, put, batches, loss, signed)


def settle(
    grown: Grown, proposal: Proposal, size: float, batches: Batches, loss: Loss
) -> Amplified:
    """Give new units their target weights, each side scaled, and return what that changed.

    Over the new units the mean square of the norms of incoming weights is `size`, and so is that of
    outgoing ones. No update of present weights is added.

    Raises:
        ValueError: where the proposal has no target.

    Source: Verbockhaven et al. 2024, appendix D.3.1.
    """
    if not isinstance(proposal.target, Given):
        raise ValueError(f"cannot settle {proposal.place}: the proposal has no target weights")
    before = mean_loss(grown.graph, batches, loss)
    target = proposal.target
    write(grown, Given.of(_sized(target.incoming, size), _sized(target.outgoing, size)))
    return Amplified(size, before, mean_loss(grown.graph, batches, loss))


def _sized(weights: tuple[tuple[str, Any], ...], size: float) -> dict[str, Tensor]:
    """Return entries by path, scaled to a mean squared norm of units."""
    found = {path: torch.tensor(w, dtype=torch.double) for path, w in weights}
    mean = torch.cat(list(found.values()), 1).square().sum(1).mean()
    return {path: w * (size / mean) ** 0.5 for path, w in found.items()}


def advance(
    graph: Graph,
    update: Mapping[str, Tensor],
    batches: Batches,
    loss: Loss,
    amplitudes: Iterable[float] = AMPLITUDES,
) -> Amplified:
    """Add γ times an update to tensors of a graph, and return what that changed.

    `update` has changes by path, as `best_step` returns them; γ is that of `amplitudes` with the
    smallest mean loss on `batches`, in eval mode, or 0 where none is smaller than before.

    Source: Verbockhaven et al. 2024, appendix D.3.2.
    """
    kept = _kept(graph, update)

    def put(gamma: float) -> None:
        _put(graph, kept)
        _add(graph, update, gamma)

    return _searched(graph, put, batches, loss, amplitudes)


def _searched(
    graph: Graph,
    put: Callable[[float], None],
    batches: Batches,
    loss: Loss,
    amplitudes: Iterable[float],
) -> Amplified:
    """Return the amplitude with the smallest loss, its numbers put into the graph's tensors."""
    before = mean_loss(graph, batches, loss)
    best = Amplified(0.0, before, before)
    for gamma in amplitudes:
        put(gamma)
        found = mean_loss(graph, batches, loss)
        if found < best.after:
            best = Amplified(gamma, before, found)
    put(best.amplitude)
    return best


def _kept(graph: Graph, paths: Iterable[str]) -> dict[str, Tensor]:
    return {path: graph.state[path].detach().clone() for path in paths}


def _put(graph: Graph, numbers: Mapping[str, Tensor]) -> None:
    for path, tensor in numbers.items():
        graph.state[path].detach().copy_(tensor)


def _add(graph: Graph, update: Mapping[str, Tensor], gamma: float) -> None:
    for path, change in update.items():
        tensor = graph.state[path].detach()
        tensor.add_(change.to(tensor), alpha=gamma)


def go(grown: Grown, proposal: Proposal, gamma: float) -> None:
    """Go to a proposal's target at amplitude γ and add |γ| times its update of present weights."""
    if isinstance(proposal.target, Departure):
        proposal.target.add(grown, gamma)
    else:
        write(grown, amplified(proposal, gamma))
    wider = {
        path: gather(change, grown.origin[path]) if path in grown.origin else change
        for path, change in proposal.update.items()
    }
    _add(grown.graph, wider, abs(gamma))


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
