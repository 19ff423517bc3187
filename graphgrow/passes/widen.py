"""Widening: new units in an axis, with weights that keep the function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from graphgrow.errors import NotApplicable
from graphgrow.ir.analyse import Analysis, Axis
from graphgrow.ir.graph import Graph
from graphgrow.passes.factors import listed
from graphgrow.passes.follow import Follower, is_averaged
from graphgrow.passes.prove import Proof, Verdict, judge, rounding
from graphgrow.passes.resize import resize
from graphgrow.passes.rewrite import Edit, Rewrite, TensorOrigin, free_axes
from graphgrow.passes.units import Resized, gather, inserted, is_new, precise, times
from graphgrow.passes.weights import Copy, MeanFill, Pairs, Scheme, ZeroIncoming, ZeroOutgoing

# packed projections have two parts (keys and values, gates) or three; heads are more
MOST_PARTS = 4


@dataclass(frozen=True)
class Widen(Rewrite):
    """Insert `units` new units into an axis, before unit `at` (at the end if left out).

    `axis` is the axis' name, or the path of any module that produces it. `weights` says how the new
    entries are filled; left out, the first scheme is taken that is exact on this axis and leaves
    units that can learn: zero outgoing, zero incoming (of all layers that write it, or of one
    factor of a product), pairs, copies; mean fill where a norm goes over the units. `numbers` is
    filled by `apply`, for the journal: factors of what calls add to statistics (eps), by mode and
    node.
    """

    axis: str
    units: int
    at: int | None = None
    weights: Scheme | None = None
    numbers: tuple[tuple[str, str, float], ...] = field(default=(), repr=False)

    @staticmethod
    def places(graph: Graph) -> list[str]:
        """Return the axes that have no obstacle of their own."""
        return free_axes(graph)

    def edit(self, graph: Graph) -> Edit:
        """Return the edit of `graph`. Raises NotApplicable with the obstacle's sentence."""
        axis = self._checked(graph)
        change = Resized(graph.analysis, axis.name, inserted(axis.width, self.units, self.at))
        refusals: list[str] = []
        for scheme in self._schemes(axis, graph.analysis):
            try:
                tensors, verdict = _filled(scheme, change, graph.state)
                if verdict.reason is None and not verdict.dead:
                    return self._edit(graph, change, tensors, verdict, scheme)
            except NotApplicable as error:
                refusals.append(str(error))
                continue
            refusals.append(_refusal(axis, self.units, verdict, scheme))
        raise NotApplicable(refusals[0])

    def _schemes(self, axis: Axis, analysis: Analysis) -> tuple[Scheme, ...]:
        if self.weights is not None:
            return (self.weights,)
        if any(axis.name in step.mixed for step in analysis.touching(axis.name)):
            return (MeanFill(), Copy())
        if is_averaged(analysis, axis.name):
            return (ZeroIncoming(), MeanFill(), Copy())
        if any(analysis.windows(step, axis.name) for step in analysis.touching(axis.name)):
            return (ZeroIncoming(), *_alone(axis))
        even = (Pairs(),) if self.units % 2 == 0 else ()
        parts = (ZeroOutgoing(factor=factor) for factor in _factors(axis, analysis))
        return (ZeroOutgoing(), ZeroIncoming(), *_alone(axis), *parts, *even, Copy())

    def _checked(self, graph: Graph) -> Axis:
        axis = graph.axis(self.axis)
        if axis.obstacle is not None:
            raise NotApplicable(axis.obstacle)
        place = axis.width if self.at is None else self.at
        if self.units < 1 or not 0 <= place <= axis.width:
            raise NotApplicable(
                f"cannot widen axis '{axis.name}' ({axis.width} units) by {self.units} at "
                f"{place}: units must be at least 1 and the place from 0 to {axis.width}"
            )
        return axis

    def _edit(
        self,
        graph: Graph,
        change: Resized,
        tensors: Mapping[str, Tensor],
        verdict: Verdict,
        scheme: Scheme,
    ) -> Edit:
        folded = {
            path: _minus(tensors.get(path, graph.state[path]), c)
            for path, c in verdict.folds.items()
        }
        made_up = verdict.compensation
        for path, factor in made_up.tensors.items():
            tensors = {**tensors, path: times(tensors.get(path, graph.state[path]), factor)}
        origin = {
            path: _with_scale(change.origin(path), graph.state[path], tensors[path])
            for path in tensors
        }
        numbers = listed(made_up.numbers)
        chosen = replace(self, axis=change.axis, weights=scheme, numbers=numbers)
        grown = resize(graph, change, {**tensors, **folded}, chosen)
        inexact = [*verdict.folds, *verdict.rounded, *made_up.tensors]
        inexact += tensors if made_up.numbers else ()
        lost = rounding(inexact, graph.state)
        proof = Proof(str(chosen), lines=verdict.lines, rounding=lost)
        return Edit(grown, proof, origin)


def _alone(axis: Axis) -> Iterator[Scheme]:
    """Yield the schemes in which one of several layers that write an axis is zero, or some are."""
    paths = tuple(at.path for at in axis.producers)
    chosen = [(path,) for path in paths[1:] + paths[:1]] if len(paths) > 1 else []
    if len(paths) > 2:  # layers that share a rotary table: the keys of all, or all queries
        chosen += [paths[1::2], paths[::2]]
    yield from (ZeroIncoming(paths=some) for some in chosen)


def _factors(axis: Axis, analysis: Analysis) -> Iterator[tuple[str, str, int]]:
    """Yield the parts of parameters whose rows of one unit are packed: queries, keys, values."""
    for at in axis.producers:
        terms = analysis.state[at.path][at.dim].apart()
        holding = [k for k, term in enumerate(terms) if axis.name in term]
        if 1 < len(holding) <= MOST_PARTS:
            yield from ((at.path, "", k) for k in holding)
        for factor in terms[holding[0]] if len(holding) == 1 else ():
            parts = analysis.axes.get(factor) if isinstance(factor, str) else None
            if parts is None or parts.obstacle is None or not 1 < parts.width <= MOST_PARTS:
                continue
            yield from ((at.path, parts.name, k) for k in range(parts.width))


def _filled(
    scheme: Scheme, change: Resized, state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Verdict]:
    """Return the tensors that a scheme fills and what following them shows.

    `ZeroIncoming` without a constant of its own is tried with zero, then, if its units could not
    learn or would hold something else, with pairs that cancel at biases of zero and of one.
    """
    choices: list[Scheme] = [scheme]
    if isinstance(scheme, ZeroIncoming) and scheme.paths is None and scheme.constant is None:
        choices += [replace(scheme, constant=0.0), replace(scheme, constant=1.0)]
    found: tuple[dict[str, Tensor], Verdict] | None = None
    for choice in choices:
        tensors = choice.fill(change, state)
        verdict = judge(Follower(change, {**state, **tensors}).run(), state)
        if verdict.reason is None:
            found = tensors, verdict
            if not verdict.dead and not verdict.folds:
                break
        elif found is None:  # nothing to build with, and as large as the model
            found = {}, verdict
        del tensors
    assert found is not None
    return found


def _refusal(axis: Axis, units: int, verdict: Verdict, scheme: Scheme) -> str:
    head = f"cannot widen axis '{axis.name}' ({axis.width} units) by {units} with {scheme}"
    if verdict.reason is not None:
        return f"{head}: {verdict.reason}"
    return f"{head}: {len(verdict.dead)} of the new units would get no gradient for ever"


def _minus(bias: Tensor, constant: Tensor) -> Tensor:
    return (precise(bias.detach()) - constant.to(bias.device)).to(bias.dtype)


def _with_scale(origin: TensorOrigin, old: Tensor, new: Tensor) -> TensorOrigin:
    """Return an origin with new over old value for every old entry, where any was changed."""
    if torch.equal(gather(new, TensorOrigin(tuple(map(_kept, origin.dims)))), old.detach()):
        return origin
    moved = gather(old, origin)
    kept = ~is_new(origin, new.shape).to(new.device)
    ratio = torch.where(kept & (moved != 0), (precise(new) / precise(moved)).real, 1.0)
    return replace(origin, scale=ratio)


def _kept(index: Tensor | None) -> Tensor | None:
    """Return where, in a wider dim, the old entries are."""
    return None if index is None else (index >= 0).nonzero().flatten()
