"""AdaRad: length and direction of a unit's incoming weights learn at step sizes of their own.

Source: Philipp and Carbonell (2017), Nonparametric Neural Networks, algorithms 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphgrow.ir.graph import Graph
from graphgrow.optim.fans import Fans, Slices, fan_ins, joined
from graphgrow.passes.rewrite import Grown

each: Any = torch  # whose functions of lists of tensors have no stubs
SHARED = "fans"  # the key, in `state`, of what belongs to fan-ins and not to one parameter
TINY = 1e-30  # no length and no mean is as small, and its inverse is a number of any type

# Numbers of fan-ins are NumPy's: they are few, and fifty operations on a few are several times as
# fast there as torch's.
Numbers = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a step finds out about every fan-in, `(fans,)` each, from weights and gradients.

    `length` is that of the weights, one where they are zero; the part of the gradient along them is
    `radial` times the weights, and `across` is the length of the rest of it. Fan-ins that are
    `zero` (None: none is) have no direction: all of the gradient is across them. Those that are not
    `live` (None: all are) stay as they are.
    """

    slices: Slices
    weights: list[Tensor]
    gradients: list[Tensor]
    length: Numbers
    radial: Numbers
    across: Numbers
    zero: Numbers | None
    live: Numbers | None

    def spread(self, *numbers: Numbers) -> list[list[Tensor]]:
        """Return numbers of fan-ins in shapes to multiply the weights by, a list for each."""
        return self.slices.spread(self.weights, *numbers)

    def kept(self, numbers: Any, still: Numbers | float) -> Any:
        """Return numbers of fan-ins, of those that are to stay as they are others."""
        return numbers if self.live is None else np.where(self.live, numbers, still)

    def instead(self, numbers: Any, others: Numbers | float) -> Any:
        """Return numbers of fan-ins, of those that are zero others."""
        return numbers if self.zero is None else np.where(self.zero, others, numbers)


class AdaRad(Optimizer):
    """Gradient descent that turns every fan-in at a normalised speed and shrinks its length.

    The gradient of each fan-in is split into a part along the weights, which changes their length
    with step size `radial_lr`, and one across them, which is divided by its running root mean
    square (`mixing`, `eps`) and turns them, by `lr` times its length in radians. Then the fan-in
    gets shorter by `radial_lr * penalty * share`, down to exact zeros: the proximal step of an ℓ2
    fan-in regulariser of strength `penalty`. `share` is the size of a batch over that of the
    training set: gradients, which are to be those of the mean loss of a batch, are multiplied by it
    too, as in the paper, so that step sizes are by epoch, and a fan-in of length 1, left to itself,
    is gone after 1 / (radial_lr * penalty) epochs. Where that makes radial steps so large that they
    jump over the length they aim at (a small penalty), `radial_limit` bounds how much the gradient
    may change a length in one step; where the length comes to rest stays the same.

    What is a fan-in is read off the axes of `graph` (`fans.fan_ins`). `param_groups` has one group
    for each bundle of axes, under the `name` of its first, whose settings may be changed; the group
    "rest" has the parameters of no fan-in, which take plain gradient steps of size `rest_lr` and
    do not shrink. A fan-in of length zero has no direction: all of its gradient counts as radial,
    so it stays zero unless the gradient is longer than the penalty. `gg.migrate` carries state and
    groups over a rewrite; a state dict fits the optimizer made of a graph as wide as the one saved.
    Where a rewrite brings new groups (Deepen), schedulers with numbers by group are made anew.

    Raises:
        ValueError: where a setting is negative; from `step`, where a gradient is sparse.

    Source: Philipp and Carbonell (2017), algorithm 1, with units in its order, the last of the last
    layer first, which matters for the largest mean square so far. Biases, branches, convolutions
    and parameters of no fan-in are not in the paper.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        lr: float,
        radial_lr: float,
        penalty: float,
        share: float = 1.0,
        mixing: float = 0.005,
        eps: float = 1e-8,
        rest_lr: float = 0.1,
        radial_limit: float = math.inf,
        **more: float,
    ) -> None:
        settings = {"lr": lr, "radial_lr": radial_lr, "penalty": penalty, "share": share}
        settings |= {"mixing": mixing, "eps": eps, "rest_lr": rest_lr}
        settings |= {"radial_limit": radial_limit, **more}
        for name, value in settings.items():
            if not value >= 0:
                raise ValueError(
                    f"cannot make {type(self).__name__}: {name} is {value}; give a number that is "
                    "not negative"
                )
        self.fans = fan_ins(graph)
        super().__init__(_groups(graph, self.fans), settings)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "fans": self.fans}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step and return what `closure`, if given, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with np.errstate(all="ignore"):  # what overflows shows in the weights, as with torch
            seen = self._seen(self._held())
            if seen is not None:
                self._move(seen, self._rate(seen))
        inside = self.fans.slices.paths
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if name not in inside and parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-group["rest_lr"])
        return loss

    def _held(self) -> dict[str, Tensor]:
        """Return the parameters of all groups by path."""
        return {
            name: parameter
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        }

    def _seen(self, found: Mapping[str, Tensor]) -> _Seen | None:
        """Return the parts of the gradient along and across the fan-ins (line 11), None if none.

        Where a part of a fan-in has no gradient, it is zero there.
        """
        slices, live = self._live(found)
        weights = [found[part.path] for part in slices.parts]
        if not weights:
            return None
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        pieces = slices.squares(weights) + slices.squares(gradients)
        table = _told(pieces + slices.dots(weights, gradients)).reshape(3, -1)
        length, gradient, along = slices.totals(table)  # the first two are squares
        zero = None
        if not length.all():
            empty = length == 0  # or not live, and so not looked at
            length, zero = length + empty, empty if live is None else empty & live
        radial = along / length
        across = np.sqrt(_rest(gradient, radial * along))
        return _Seen(slices, weights, gradients, np.sqrt(length), radial, across, zero, live)

    def _live(self, found: Mapping[str, Tensor]) -> tuple[Slices, Numbers | None]:
        """Return the slices of the fan-ins that have a gradient, and which do: None for all."""
        moved = [p for p in self.fans.parts if p.path in found and found[p.path].grad is not None]
        for part in moved:
            if found[part.path].grad.is_sparse:  # type: ignore[union-attr]
                raise ValueError(
                    f"cannot step {type(self).__name__}: the gradient of '{part.path}' is sparse; "
                    "make the layer without sparse=True"
                )
        if len(moved) == len(self.fans.parts):
            return self.fans.slices, None
        live = np.zeros(self.fans.count, dtype=bool)
        for part in moved:
            live[part.units] = True
        held = (part for part in self.fans.parts if part.path in found)
        return Slices(tuple(p for p in held if live[p.units].any()), self.fans.count), live

    def _of(self, name: str) -> Any:
        """Return a setting of the groups: one number, or where they differ one for each fan-in."""
        values = [group[name] for group in self.param_groups]
        if all(value == values[0] for value in values):
            return values[0]
        found = np.zeros(self.fans.count)
        homes = {n: g[name] for g in self.param_groups for n in g["param_names"]}
        for part in reversed(self.fans.parts):  # the first has the last word
            if part.path in homes:
                found[part.units] = homes[part.path]
        return found

    def _shared(self, like: Numbers) -> dict[str, Tensor]:
        """Return what is kept of fan-ins, zeros at first, `like` being one number of each.

        `running` has the running means of the squares across, and their capacities, `(2, fans)`,
        `most` the largest of both so far, `(2, 1)`.
        """
        if SHARED not in self.state:
            running, most = (
                torch.from_numpy(np.zeros_like(like, shape=(2, n))) for n in (len(like), 1)
            )
            self.state[SHARED] = {"running": running, "most": most}  # type: ignore[index]
        return self.state[SHARED]  # type: ignore[index]

    def _rate(self, seen: _Seen) -> Numbers:
        """Return the angle of turning by unit of gradient across a fan-in (lines 12 to 14)."""
        shared, share, mixing = self._shared(seen.across), self._of("share"), self._of("mixing")
        before, most = (shared[name].numpy(force=True) for name in ("running", "most"))
        running = before * (1 - mixing)
        running[0] += seen.instead(mixing * (seen.across * share) ** 2, 0.0)
        running[1] += mixing
        running = running if seen.live is None else np.where(seen.live, running, before)
        so_far = np.maximum(np.maximum.accumulate(running[:, ::-1], axis=1), most)[:, ::-1]
        shared["running"] = torch.from_numpy(running)
        shared["most"] = torch.from_numpy(so_far[:, :1].copy())
        own, most = (table[0] / np.maximum(table[1], TINY) for table in (running, so_far))
        return np.sqrt(most / (own + self._of("eps"))) * (self._of("lr") * share)

    def _turn(self, seen: _Seen, angle: Numbers, reach: Numbers) -> tuple[Numbers, ...]:
        """Return angle, length before and length after of lines 15 to 17.

        The length before is negative where the radial step turns a fan-in round. The gradient of a
        fan-in that is zero, of length `reach`, takes the place of the weights: a right angle.
        """
        step, limit = self._of("radial_lr") * self._of("share"), self._of("radial_limit")
        change = seen.instead(seen.radial * seen.length, -reach) * step
        after = seen.instead(seen.length, 0.0) - np.maximum(np.minimum(change, limit), -limit)
        left = np.maximum(np.abs(after) - step * self._of("penalty"), 0.0)
        return seen.instead(angle, np.pi / 2), np.copysign(seen.length, after), left

    def _move(self, seen: _Seen, rate: Numbers) -> None:
        """Move all weights: along the gradient across them is along the gradient less the rest."""
        angle, before, left = self._turn(seen, rate * seen.across, seen.across)
        added = left * np.sin(angle) / np.maximum(seen.across, TINY)
        kept = left * np.cos(angle) / before + added * seen.radial
        kept, taken = seen.spread(seen.kept(kept, 1.0), seen.kept(-added, 0.0))
        each._foreach_mul_(seen.weights, kept)
        each._foreach_addcmul_(seen.weights, seen.gradients, taken)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; what belongs to fan-ins is copied, so that its owner keeps its own."""
        state = state_dict["state"]
        if SHARED in state:
            state_dict = {**state_dict, "state": {**state, SHARED: {**state[SHARED]}}}
        super().load_state_dict(state_dict)

    def carry(self, grown: Grown) -> Callable[[], None]:
        """Return what makes groups and the state of fan-ins those of the grown graph.

        `gg.migrate` calls it after parameters and their own states were replaced. It does not
        raise. Bundles that are new get a group with the settings of the one that their first
        parameter joined, and groups that hold nothing any more go: the groups are those of an
        optimizer made of the grown graph.
        """
        after = fan_ins(grown.graph)
        source, groups = _sources(self.fans, after, grown), _groups(grown.graph, after)

        def carried() -> None:
            self.fans = after
            self._regroup(groups)
            shared = self.state.get(SHARED, {})  # type: ignore[arg-type]
            for name in set(shared) - {"most"}:
                here = source.to(shared[name].device)
                shared[name] = shared[name][..., here.clamp(min=0)].masked_fill(here < 0, 0.0)
            self._straighten()

        return carried

    def _regroup(self, groups: list[dict[str, Any]]) -> None:
        """Put the parameters that are held into `groups`, with the settings that they have."""
        settings = {group["name"]: group for group in self.param_groups}
        joined = {id(p): group for group in self.param_groups for p in group["params"]}
        regrouped = []
        for wanted in groups:
            held = [(name, p) for name, p in wanted["params"] if id(p) in joined]
            if held:
                group = settings.get(wanted["name"]) or {**joined[id(held[0][1])]}
                group["name"], group["params"] = wanted["name"], [p for _, p in held]
                group["param_names"] = [name for name, _ in held]
                regrouped.append(group)
        self.param_groups[:] = regrouped

    def _straighten(self) -> None:
        """Put in order what a rewrite of the weights leaves out of it."""


class AdaRadM(AdaRad):
    """AdaRad with momentum: fan-ins turn along the running mean of their gradients across them.

    The mean (of rate `momentum_mixing`) turns with its fan-in and so stays at right angles to it;
    where units that a fan-in read are removed, it is made so again.

    Source: Philipp and Carbonell (2017), algorithm 2. In its line 20 the mean turns towards the
    weights of line 19, already turned; that would not leave it at right angles to them, as the text
    wants it, so here it turns towards the weights of before.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        lr: float,
        radial_lr: float,
        penalty: float,
        share: float = 1.0,
        mixing: float = 0.005,
        momentum_mixing: float = 0.1,
        eps: float = 1e-8,
        rest_lr: float = 0.1,
        radial_limit: float = math.inf,
    ) -> None:
        settings = {"lr": lr, "radial_lr": radial_lr, "penalty": penalty, "share": share}
        settings |= {"mixing": mixing, "eps": eps, "rest_lr": rest_lr}
        settings |= {"radial_limit": radial_limit}
        super().__init__(graph, momentum_mixing=momentum_mixing, **settings)

    def _shared(self, like: Numbers) -> dict[str, Tensor]:
        shared = super()._shared(like)
        for name in ("mean_capacity", "reach"):
            if name not in shared:
                shared[name] = torch.from_numpy(np.zeros_like(like))
        return shared

    def _move(self, seen: _Seen, rate: Numbers) -> None:
        """Move weights and running means; a mean starts anew where the fan-in is zero.

        What of a gradient is along its fan-in leaves the mean together with the first of three
        shears, which turn both in place, in their plane; of angles beyond 90° the half turn is a
        change of signs. So the length of a mean, `reach`, is found before it is at right angles,
        and bounded by what it was: what is left of two long vectors may be no more than rounding.
        """
        shared, weights, slices = self._shared(seen.length), seen.weights, seen.slices
        mixing = seen.kept(seen.instead(self._of("momentum_mixing"), 1.0), 0.0)
        capacity = shared["mean_capacity"].numpy(force=True) * (1 - mixing) + mixing
        shared["mean_capacity"] = torch.from_numpy(seen.instead(capacity, 0.0))
        means = [self._mean(weight) for weight in weights]
        mixed = seen.spread(mixing)[0] if isinstance(mixing, np.ndarray) else mixing
        each._foreach_lerp_(means, seen.gradients, mixed)
        lost = -mixing * seen.radial
        whole, along = slices.totals(_told(slices.squares(means))), lost * seen.length
        before = shared["reach"].numpy(force=True)
        most = before * (1 - mixing) + seen.across * mixing  # by the triangle inequality
        reach = np.minimum(np.sqrt(_rest(whole, seen.instead(along * along, 0.0))), most)
        shared["reach"] = torch.from_numpy(seen.kept(seen.instead(reach, 0.0), before))
        angle, before, left = self._turn(seen, rate * reach / np.maximum(capacity, TINY), reach)
        factor = None if seen.zero is None else np.where(seen.zero, 0.0, 1.0)
        if (angle > np.pi / 2).any():
            turns = np.rint(angle / np.pi)
            sign = 1 - 2 * (turns % 2)
            angle, left = angle - turns * np.pi, sign * left
            factor = sign if factor is None else sign * factor
        tangent, slope = np.tan(angle / 2), np.maximum(reach, TINY) / before
        leans = seen.kept(tangent * slope, 0.0)
        added = seen.kept(tangent / (1 + tangent * tangent) / slope * -2, 0.0)
        kept = seen.kept(left / before, 1.0)
        first, second, last, kept = seen.spread(lost + leans, added, leans, kept)
        each._foreach_addcmul_(means, weights, first)
        each._foreach_addcmul_(weights, means, second)
        each._foreach_addcmul_(means, weights, last)
        each._foreach_mul_(weights, kept)
        if factor is not None:
            each._foreach_mul_(means, *seen.spread(seen.kept(factor, 1.0)))

    def _mean(self, weight: Tensor) -> Tensor:
        """Return the running mean of a parameter's gradients across its fan-ins, zeros at first."""
        state = self.state[weight]
        if "mean" not in state:
            state["mean"] = torch.zeros_like(weight)
        return state["mean"]

    @torch.no_grad()
    def _straighten(self) -> None:
        """Take out of the means what is along the weights that are left (lines 31 to 35)."""
        held = self._held()
        parts = tuple(
            part
            for part in self.fans.parts
            if part.path in held and "mean" in self.state.get(held[part.path], {})
        )
        if not parts:
            return
        slices, weights = Slices(parts, self.fans.count), [held[part.path] for part in parts]
        means = [self.state[weight]["mean"] for weight in weights]
        length = slices.totals(_told(slices.squares(weights)))
        inner = slices.totals(_told(slices.dots(weights, means)))
        (taken,) = slices.spread(means, -inner / np.where(length == 0, 1.0, length))
        each._foreach_addcmul_(means, weights, taken)


def _rest(square: Numbers, part: Numbers) -> Numbers:
    """Return what is left of squares without a part, none where that is no more than rounding."""
    rest = square - part
    return rest * (rest > square * (16 * np.finfo(square.dtype).eps))


def _told(pieces: Sequence[Tensor]) -> Numbers:
    """Return the numbers of the slices of all parts as NumPy's."""
    return joined(pieces).numpy(force=True)


def _groups(graph: Graph, fans: Fans) -> list[dict[str, Any]]:
    """Return one group for each bundle of fan-ins and one for the rest, parameters with names."""
    ends = [*fans.starts[1:], fans.count]
    groups: list[dict[str, Any]] = [{"name": name, "params": []} for name in fans.names]
    for part in fans.parts:
        last = int(part.units.max()) if len(part.units) else 0
        at = next(k for k, end in enumerate(ends) if last < end)
        groups[at]["params"].append((part.path, graph.state[part.path]))
    inside = {part.path for part in fans.parts}
    rest = [
        (path, tensor)
        for path, tensor in graph.state.items()
        if isinstance(tensor, nn.Parameter)
        and tensor.requires_grad
        and graph.analysis.tied[path] == path
        and path not in inside
    ]
    return [*groups, {"name": "rest", "params": rest}] if rest else groups


def _sources(before: Fans, after: Fans, grown: Grown) -> Tensor:
    """Return the old number of every fan-in of the grown graph, −1 for a new one, `(fans,)`."""
    source, old = torch.full((after.count,), -1), {part.path: part for part in before.parts}
    for part in after.parts:
        if part.path in old and old[part.path].dims == part.dims:
            origin, shape = grown.origin.get(part.path), grown.before.state[part.path].shape
            units = old[part.path].units.reshape([shape[d] for d in part.dims])
            for k, d in enumerate(part.dims):
                index = None if origin is None else origin.dims[d]
                if index is not None:
                    new = (index < 0).reshape([-1 if j == k else 1 for j in range(len(part.dims))])
                    units = units.index_select(k, index.clamp(min=0)).masked_fill(new, -1)
            source[part.units] = torch.maximum(source[part.units], units.reshape(-1))
    return source
