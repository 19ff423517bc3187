"""Proposals made beside one another: what was found before a growth, fitted to the graph after."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from graphgrow.errors import NotApplicable
from graphgrow.passes.rewrite import Grown, TensorOrigin
from graphgrow.passes.units import Resized, gather, inserted
from graphgrow.passes.weights import Given
from graphgrow.passes.widen import Widen
from graphgrow.scores.departure import Departure
from graphgrow.scores.proposal import Proposal


def carried(proposal: Proposal, grown: Grown) -> Proposal:
    """Return a proposal for `grown.before` as one for `grown.graph`, another axis' widening.

    Where the axes share tensors, the new units of one have weights of zero for those of the other.

    Raises:
        NotApplicable: where one dim of a tensor multiplies both axes, so that units got more
            entries there.
    """
    (other,), own = grown.rewrites, proposal.rewrite
    if not (isinstance(other, Widen) and isinstance(own, Widen)):
        return proposal
    update = {
        path: gather(change, grown.origin[path]) if path in grown.origin else change
        for path, change in proposal.update.items()
    }
    weights, target = own.weights, proposal.target
    if isinstance(weights, Given):
        weights = _fitted(weights, own, grown)
    if isinstance(target, Departure):
        _check_apart(target, own, grown)
    elif target is not None:
        target = _fitted(target, own, grown)
    return replace(proposal, rewrite=replace(own, weights=weights), target=target, update=update)


def _check_apart(departure: Departure, own: Widen, grown: Grown) -> None:
    shared = [path for path, _ in departure.weights if path in grown.origin]
    if shared:
        raise NotApplicable(
            f"cannot widen axis '{own.axis}' in one growth with '{grown.rewrites[0].axis}': both "
            f"change '{shared[0]}'; let them grow one after the other"
        )


def _fitted(weights: Given, own: Widen, grown: Grown) -> Given:
    analysis, (other,) = grown.before.analysis, grown.rewrites
    axis, beside = grown.before.axis(own.axis), grown.before.axis(other.axis)
    wide = Resized(analysis, axis.name, inserted(axis.width, own.units, own.at))
    moved = {beside.name: inserted(beside.width, other.units, other.at)}
    dims = {at.path: at.dim for at in (*axis.producers, *axis.consumers, *axis.carriers)}

    def fit(path: str, values: Any) -> Tensor:
        layouts, own_dim = analysis.state[path], dims[path]
        places = wide.at(path, own_dim).shape[1]
        units = layouts[own_dim].units(grown.graph.analysis.widths(), axis.name)
        if (units == 0).sum() != places:
            raise NotApplicable(
                f"cannot widen axis '{axis.name}' in one growth with '{beside.name}': dim "
                f"{own_dim} of '{path}' has a place for each pair of their units; let them grow "
                "one after the other"
            )
        others = [layout for d, layout in enumerate(layouts) if d != own_dim]
        shape = [layout.size(wide.widths()) for layout in others]
        index = [
            torch.from_numpy(layout.origin(wide.widths(), moved))
            if beside.name in layout.axes()
            else None
            for layout in others
        ]
        found = torch.tensor(values, dtype=torch.double).reshape(own.units, places, *shape)
        return gather(found, TensorOrigin((None, None, *index))).flatten(1)

    incoming, outgoing = (
        {path: fit(path, values) for path, values in side}
        for side in (weights.incoming, weights.outgoing)
    )
    return Given.of(incoming, outgoing, weights.seed)
