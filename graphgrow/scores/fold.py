"""Folding: a new unit that bends the model where a typical mistake could be told apart.

Source: Kang 2025, "Explainable network growth by folding on typical mis-predictions".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from graphgrow.errors import NotApplicable
from graphgrow.ir.analyse import Axis, ParameterDim, Slot
from graphgrow.ir.graph import Graph
from graphgrow.ir.outcome import Kind, aten
from graphgrow.measure.replica import Replica, doubled
from graphgrow.measure.routes import Product, products
from graphgrow.measure.segment import boundary, surface, twice
from graphgrow.moments import Loss
from graphgrow.passes.deepen import Deepen
from graphgrow.passes.identity import Identity
from graphgrow.passes.units import Resized, inserted
from graphgrow.passes.weights import Given
from graphgrow.passes.widen import Widen
from graphgrow.scores.departure import Departure
from graphgrow.scores.proposal import Proposal, costed, neutral
from graphgrow.scores.rows import Rows, one_sided

Batches = Iterable[tuple[Any, Any]]


@dataclass(frozen=True, eq=False)
class Crease:
    """Where to fold: a typical mistake and the fold point near it, one example each, no batch dim.

    `loss` is the mean loss of the mistake's cluster.
    """

    mistake: Tensor
    point: Tensor
    loss: float


@dataclass(frozen=True)
class Fold:
    """New units that are zero at a fold point and active at a typical mistake beside it.

    Mistakes (wrong classes; in a regression all examples) are grouped by k-means, weighted by their
    loss; the `units` clusters of the largest mean loss each give the instance nearest their centre.
    Its fold point is the nearest point of the decision boundary between the class that was given
    and the right one; in a regression, of the regression surface; where nothing is active, the
    middle between the mistake and the nearest example that the model does well.

    Of each new unit's incoming weights w, the bias is that of w·x + b = 0 at the fold point, and
    the length is the mean of present ones'. Among directions whose cosine with mistake minus fold
    point is `align` at least, w is one of a large gradient of the unit's outgoing weights
    (GradMax), by gradient ascent in `steps`; with `align` 1 it is that line itself. Outgoing
    weights are zero; `target` moves them against their gradient, by `scale` times the mean length
    of present ones.

    Where producers read something else than the input, mistake and fold point are what they read
    then; of a convolution, at the position where present units differ most; of a layer called
    several times, in its first call. The gain is the squared gradient of the new outgoing weights:
    the decrease of the loss to first order for one unit of learning rate, on the examples that were
    looked at, `examples` at most.

    The slides set the new bias to zero and take GradMax on the incoming weights, whose gradient is
    zero (their Lemma 5); we take the bias that they derive and the gradient of outgoing weights.
    """

    units: int = 1
    clusters: int = 8
    align: float = 0.5
    steps: int = 20
    scale: float = 0.5
    examples: int = 512
    classes: bool | None = None
    seed: int = 0

    def propose(
        self, graph: Graph, batches: Batches, loss: Loss, axes: Sequence[str] | None = None
    ) -> list[Proposal]:
        """Return a proposal for each axis that can be folded, of those asked for or all.

        `classes` says whether outputs are scores of classes, by the type of the targets (integers)
        if left out. One number that is scored is positive for the second class.

        Raises:
            NotApplicable: where the model has several inputs or is not piecewise linear.
        """
        x, y = _sampled(batches, self.examples, self.seed)
        found = self.creases(graph, x, y, loss)
        names = list(graph.axes) if axes is None else [graph.axis(name).name for name in axes]
        free = [graph.axes[name] for name in names if graph.axes[name].obstacle is None]
        made = [
            self._proposal(graph, axis, found, (x, y), loss)
            for axis in free
            if found and one_sided(graph, axis)
        ]
        return [p for p in made if p is not None and p.rewrite.obstacle(graph) is None]

    # --- where

    def creases(self, graph: Graph, x: Tensor, y: Any, loss: Loss) -> list[Crease]:
        """Return the folds of the worst clusters, worst first, no more than `units`."""
        replica = Replica(graph)
        with torch.no_grad():
            output = replica.output(x)
        losses = _losses(output, y, loss)
        classes = not y.is_floating_point() if self.classes is None else self.classes
        scores = output.reshape(len(x), -1)
        well = _given(scores) == y.flatten() if classes else losses < losses.mean()
        among = ~well if classes else torch.ones_like(well)
        found: list[Crease] = []
        for at, mean in self._typical(x[among], losses[among])[: self.units]:
            k = int(among.nonzero()[at])
            near = (x - x[k]).flatten(1).norm(dim=1).argsort()
            if classes:
                mix = _mix(scores[k], int(y.flatten()[k]))
                across = (scores @ mix) * (scores[k] @ mix) < 0
                point = boundary(replica, x[k], mix, (x[i] for i in near if across[i]))
            else:
                point = surface(replica, x[k], y[k])
            if point is None or torch.equal(point, doubled(x[k])):  # nothing is active there
                point = (doubled(x[k]) + doubled(x[near[well[near]]][:1].mean(0))) / 2
            if point.isfinite().all():
                found.append(Crease(doubled(x[k]), point, mean))
        return found

    def _typical(self, x: Tensor, losses: Tensor) -> list[tuple[int, float]]:
        """Return the instance nearest the centre of each cluster and the cluster's mean loss."""
        try:
            from sklearn.cluster import KMeans
        except ImportError:
            raise ImportError("Fold groups mistakes with scikit-learn; install it") from None

        if not len(x) or not losses.any():
            return []
        rows = x.flatten(1).double().cpu().numpy()
        count = min(self.clusters, len(np.unique(rows, axis=0)))
        means = KMeans(count, n_init="auto", random_state=self.seed)
        label = means.fit_predict(rows, sample_weight=losses.cpu().numpy())
        found = []
        for k in range(count):
            inside = np.flatnonzero(label == k)
            if len(inside):
                away = ((rows[inside] - means.cluster_centers_[k]) ** 2).sum(1)
                found.append((int(inside[away.argmin()]), float(losses[inside].mean())))
        return sorted(found, key=lambda pair: -pair[1])

    # --- which weights

    def _proposal(
        self,
        graph: Graph,
        axis: Axis,
        found: list[Crease],
        data: tuple[Tensor, Any],
        loss: Loss,
    ) -> Proposal | None:
        count = len(found)
        change = Resized(graph.analysis, axis.name, inserted(axis.width, count, None))
        writes = _writes(graph, axis)
        if writes is None:
            return None
        try:
            start = Widen(axis.name, count, weights=Given.of(neutral(graph, change)))
            grown = start.edit(graph).graph
        except NotApplicable:  # an obstacle of this axis: others may have none
            return None
        rows = Rows(change, change.new, _dims(axis, writes))
        out = Rows(change, change.new, axis.consumers)
        replica = Replica(grown, (*rows.paths, *out.paths))
        planes = [_plane(replica, grown, rows, writes, k, c) for k, c in enumerate(found)]
        seen = [c for c, plane in zip(found, planes, strict=True) if plane.normal.any()]
        if len(seen) < count:  # what the producers read is the same on both sides
            return self._proposal(graph, axis, seen, data, loss) if seen else None
        length = _length(rows, graph, axis)
        ascent = _Ascent(replica, rows, out, planes, length, [data], loss)
        weights, gains = ascent.run(self.align, self.steps)
        gradient = ascent.gradient(weights, further=False)
        size = self.scale * _outgoing_length(graph, axis)
        away = -size * F.normalize(gradient, dim=1)
        given = Given.of({**neutral(graph, change), **rows.split(ascent.folded(weights))})
        rewrite = Widen(axis.name, count, weights=given)
        line = Departure.of(change.new, out.split(away))
        return costed(graph, rewrite, float(gains.sum()), "learning rate", line)


@dataclass(frozen=True, eq=False)
class Plane:
    """Where one new unit is to be zero: `normal` `(entries,)` from fold point to mistake.

    `shifts` has, for each channel of the unit, the entry that is its shift, what that counts for,
    and what its producer reads at the fold point, `(entries,)`.
    """

    normal: Tensor
    shifts: tuple[tuple[int, float, Tensor], ...]


@dataclass(eq=False)
class _Ascent:
    """GradMax by ascent: the gradient of new outgoing weights as a function of incoming ones."""

    replica: Replica
    rows: Rows
    out: Rows
    planes: list[Plane]
    length: float
    data: list[tuple[Tensor, Any]]
    loss: Loss

    def folded(self, directions: Tensor) -> Tensor:
        """Return all entries of units of these directions, `(units, entries)`, zero at the fold."""
        rows = self.length * directions
        for k, plane in enumerate(self.planes):
            for entry, size, at in plane.shifts:
                rows[k, entry] = -size * (self.length * directions[k] @ at)
        return rows

    def gradient(self, directions: Tensor, further: bool) -> Tensor:
        """Return the loss's gradient by the new outgoing weights, `(units, out)`."""
        self.rows.write(self.replica.tensors, self.folded(directions))
        value = self.replica.loss(self.data, self.loss)
        return self.out.gradient(value, self.replica.tensors, further)

    def run(self, align: float, steps: int) -> tuple[Tensor, Tensor]:
        """Return unit directions `(units, entries)` within reach of the normals, and gains."""
        normals = torch.stack([F.normalize(plane.normal, dim=0) for plane in self.planes])
        now, rate = normals.clone(), 0.5
        best, most = now.clone(), torch.full_like(now[:, 0], -1.0)
        for step in range(steps + 1 if align < 1 else 1):
            found = self.gradient(now, further=True)
            gains = found.square().sum(1)
            better = gains.detach() > most
            best, most = torch.where(better[:, None], now, best), gains.detach().maximum(most)
            if step < steps:
                slope = F.normalize(self._slope(gains.sum()), dim=1)
                now = _within(now + rate * slope, normals, align)
                rate *= 0.01 ** (1 / steps)
        return best, most

    def _slope(self, gain: Tensor) -> Tensor:
        """Return the derivative of the gain by the directions, the shifts following them."""
        if not gain.requires_grad:
            return torch.zeros_like(self.rows.read(self.replica.tensors))
        found = self.rows.gradient(gain, self.replica.tensors)
        slope = found.clone()
        for k, plane in enumerate(self.planes):
            for entry, size, at in plane.shifts:
                slope[k] -= size * found[k, entry] * at
                slope[k, entry] = 0.0
        return slope


def _within(rows: Tensor, normals: Tensor, align: float) -> Tensor:
    """Return unit vectors in the direction of rows, turned to a cosine of `align` if below."""
    rows = F.normalize(rows, dim=1)
    along = (rows * normals).sum(1, keepdim=True)
    beside = F.normalize(rows - along * normals, dim=1)
    turned = align * normals + (1 - align**2) ** 0.5 * beside
    return torch.where(along < align, turned, rows)


# ------------------------------------------------------------------------------ examples


def _sampled(batches: Batches, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of all examples, or of as many as asked for, drawn."""
    pairs = list(batches)
    if not pairs:
        raise ValueError("cannot fold without examples: there is no batch")
    if any(not isinstance(part, Tensor) for pair in pairs for part in pair):
        raise NotApplicable(
            "cannot fold a model of several inputs or targets: mistakes are points in the space of "
            "one input; give batches of one tensor each"
        )
    x, y = (torch.cat([pair[k] for pair in pairs]) for k in (0, 1))
    if not x.is_floating_point():
        raise NotApplicable(f"cannot fold a model that reads {x.dtype}: inputs have to be numbers")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    kept = slice(None) if len(x) <= count else order[:count].sort().values.to(x.device)
    return x[kept], y[kept]


def _losses(output: Tensor, y: Tensor, loss: Loss) -> Tensor:
    """Return the loss of each example, as its weight."""
    one = [float(loss(output[k : k + 1], doubled(y[k : k + 1]))) for k in range(len(output))]
    return output.new_tensor(one).clamp(min=0)


def _given(scores: Tensor) -> Tensor:
    """Return the class that scores `(n, out)` give."""
    return scores.argmax(1) if scores.shape[1] > 1 else (scores[:, 0] > 0).long()


def _mix(scores: Tensor, right: int) -> Tensor:
    """Return the mix of outputs that is zero between the class given and the right one."""
    mix = torch.zeros_like(scores)
    if len(scores) == 1:
        mix[0] = 1.0
    else:
        mix[scores.argmax()], mix[right] = 1.0, -1.0
    return mix


# ------------------------------------------------------------------------------ what is written


@dataclass(frozen=True, eq=False)
class _Write:
    """One producer's use, and the carrier that shifts what it writes, by what factor."""

    product: Product
    shift: str
    size: float


def _writes(graph: Graph, axis: Axis) -> list[_Write] | None:
    """Return the use of each producer, None where one has no bias, nor a norm with one."""
    carriers = {at.path for at in axis.carriers}
    paths, found = {at.path for at in axis.producers}, {}
    for product in products(graph.analysis, "eval").values():
        if product.weight not in paths or product.weight in found:
            continue
        if product.embeds or not _seen_whole(graph, axis, product):
            return None
        shift, size = product.bias, 1.0
        if shift not in carriers:
            shift, size = _norm_shift(graph, product)
        if shift in carriers:
            found[product.weight] = _Write(product, shift, size)
    return list(found.values()) if set(found) == paths else None


def _seen_whole(graph: Graph, axis: Axis, product: Product) -> bool:
    """Return whether the value of a use's node is what the use writes, up to moves and a bias."""
    steps = [s for s in graph.analysis.steps if (s.mode, s.node) == ("eval", product.step.node)]
    others = [s for s in steps if s is not product.step]
    plain = all(s.row.kind is Kind.MOVE or s.func.overloadpacket in _SUMS for s in others)
    value = graph.analysis.nodes["eval", product.step.node]
    return plain and isinstance(value, Slot) and value.number in graph.analysis.holding[axis.name]


_SUMS = {aten.add, aten.add_}


def _norm_shift(graph: Graph, product: Product) -> tuple[str | None, float]:
    """Return the bias of the batch norm that reads a use's output, and its neutral scale."""
    for step in graph.analysis.steps:
        if step.row.kind is Kind.NORM and step.inputs[0] in product.step.outputs:
            part = step.args[2]
            source = graph.analysis.sources.get(step.inputs[part.number]) if part else None
            eps = next(a for a in reversed(step.args) if isinstance(a, float))
            return (source.path if source else None), (1 + eps) ** -0.5
    return None, 1.0


def _dims(axis: Axis, writes: list[_Write]) -> tuple[ParameterDim, ...]:
    shifts = {write.shift for write in writes}
    return (*axis.producers, *(at for at in axis.carriers if at.path in shifts))


def _plane(
    replica: Replica, grown: Graph, rows: Rows, writes: list[_Write], k: int, crease: Crease
) -> Plane:
    """Return the plane of the k-th new unit through what its producers read at the fold point."""
    nodes = [write.product.step.node for write in writes]
    seen = [replica.values(twice(p), nodes) for p in (crease.mistake, crease.point)]
    starts = _starts(rows)
    normal, shifts = torch.zeros_like(rows.read(replica.tensors)[k]).detach(), []
    producers = min(starts[write.shift] for write in writes)
    for write in writes:
        one, other = (_units(grown, write.product, s, rows.change) for s in seen)
        at = int((one - other)[:, rows.change.old].abs().sum((1, 2)).argmax())
        for channel in range(one.shape[2]):
            unit = int(rows.change.new[k])
            there, here = (
                rows.gradient(value[at, unit, channel], replica.tensors)[k].detach()
                for value in (one, other)
            )
            here[producers:] = there[producers:] = 0.0
            normal += there - here
            shifts.append((starts[write.shift] + channel, write.size, here))
    return Plane(normal, tuple(shifts))


def _starts(rows: Rows) -> dict[str, int]:
    """Return where the entries of each tensor begin in the joined rows."""
    sizes = [rows.entries(at) for at in rows.dims]
    return dict(zip(rows.paths, np.cumsum([0, *sizes]).tolist(), strict=False))


def _units(grown: Graph, product: Product, seen: dict[str, Any], change: Resized) -> Tensor:
    """Return what a use of a weight writes: `(positions, units, channels)`, of one example."""
    analysis, node = grown.analysis, product.step.node
    slot = analysis.nodes["eval", node]
    assert isinstance(slot, Slot)
    layouts = analysis.values[slot.number]
    dim = next(d for d, layout in enumerate(layouts) if change.axis in layout.axes())
    units = layouts[dim].units(analysis.widths(), change.axis)
    order = torch.from_numpy(np.argsort(units, kind="stable")[(units < 0).sum() :])
    first = seen[node][: len(seen[node]) // 2]
    value = first.movedim(dim, -1).index_select(-1, order.to(first.device))
    return value.reshape(-1, len(change.units), len(order) // len(change.units))


def _length(rows: Rows, graph: Graph, axis: Axis) -> float:
    """Return the mean length of present units' incoming weights, without their shifts."""
    change = Resized(graph.analysis, axis.name, np.arange(axis.width))
    present = Rows(change, change.old, axis.producers).read(graph.state)
    return float(present.detach().double().norm(dim=1).mean()) or 1.0


def _outgoing_length(graph: Graph, axis: Axis) -> float:
    change = Resized(graph.analysis, axis.name, np.arange(axis.width))
    present = Rows(change, change.old, axis.consumers).read(graph.state)
    return float(present.detach().double().norm(dim=1).mean()) or 1.0


# ------------------------------------------------------------------------------ depth


def deepening(graph: Graph, axis: str) -> Deepen:
    """Return the rewrite that puts an equivalent layer behind an axis, as folding goes on there.

    It is an identity layer behind the first piecewise linear activation of the axis that is
    idempotent (ReLU), or in front of the first layer that reads it.

    Raises:
        NotApplicable: where there is none, with the sentence of the last place tried.

    Source: Kang 2025, "equivalent network deepening".
    """
    name = graph.axis(axis).name
    held, why = graph.analysis.holding[name], "nothing behind it is an activation or a layer"
    read = {at.path.rpartition(".")[0] for at in graph.axes[name].consumers}
    for path in Deepen.places(graph):
        node = next(n for n in graph.eval.nodes if n.target == path)
        value = graph.analysis.nodes.get(("eval", node.name))
        holds = isinstance(value, Slot) and value.number in held
        if path in read or (holds and not graph.modules[path].state_dict()):
            rewrite = Deepen(path, Identity())
            why = rewrite.obstacle(graph)
            if why is None:
                return rewrite
    raise NotApplicable(f"cannot deepen behind axis '{name}': {why}")
