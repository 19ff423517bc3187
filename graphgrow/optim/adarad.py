"""AdaRad: length and direction of a unit's incoming weights learn at step sizes of their own.

Source: Philipp and Carbonell (2017), Nonparametric Neural Networks, algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphgrow.ir.graph import Graph
from graphgrow.optim.fans import Fans, Part, dots, fan_ins, squares
from graphgrow.passes.rewrite import Grown

SHARED = "fans"  # the key, in `state`, of what belongs to fan-ins and not to one parameter


@dataclass(frozen=True, eq=False)
class _Member:
    """A parameter's part in the fan-ins, with its gradient."""

    part: Part
    weight: Tensor
    gradient: Tensor


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a step finds out about every fan-in, `(fans,)` each.

    `length` is that of the weights, `gradient` that of the gradient, `across` that of its part
    across the weights; its part along them is `radial` times the weights. Fan-ins that are `zero`
    have no direction; those that are not `live` (None: all are) stay as they are.
    """

    length: Tensor
    gradient: Tensor
    across: Tensor
    radial: Tensor
    zero: Tensor
    live: Tensor | None


@dataclass(frozen=True, eq=False)
class _Turn:
    """What a step does to every fan-in, `(fans,)` each.

    The weights become `kept` times themselves plus `added` times the vector they turn along, and
    that becomes `follows` times itself plus `leans` times the weights of before.
    """

    kept: Tensor
    added: Tensor
    follows: Tensor
    leans: Tensor


class AdaRad(Optimizer):
    """Gradient descent that turns every fan-in at a normalised speed and shrinks its length.

    The gradient of each fan-in is split into a part along the weights, which changes their length
    with step size `radial_lr`, and one across them, which is divided by its running root mean
    square (`mixing`, `eps`) and turns them, by `lr` times its length in radians. Then the fan-in
    gets shorter by `radial_lr * penalty * share`, down to exact zeros: the proximal step of an ℓ2
    fan-in regulariser of strength `penalty`. `share` is the size of a batch over that of the
    training set: gradients, which are to be those of the mean loss of a batch, are multiplied by it
    too, as in the paper, so that step sizes are by epoch, and a fan-in of length 1, left to itself,
    is gone after 1 / (radial_lr * penalty) epochs.

    What is a fan-in is read off the axes of `graph` (`fans.fan_ins`). `param_groups` has one group
    for each bundle of axes, under the `name` of its first, whose settings may be changed; the group
    "rest" has the parameters of no fan-in, which take plain gradient steps of size `rest_lr` and
    do not shrink. A fan-in of length zero has no direction: all of its gradient counts as radial,
    so it stays zero unless the gradient is longer than the penalty. `gg.migrate` carries the state
    over a rewrite; a state dict fits the optimizer made of a graph as wide as the one saved.

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
        **more: float,
    ) -> None:
        settings = {"lr": lr, "radial_lr": radial_lr, "penalty": penalty, "share": share}
        settings |= {"mixing": mixing, "eps": eps, "rest_lr": rest_lr, **more}
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
        live, members = self._members()
        if members:
            seen = self._seen(live, members)
            self._move(members, seen, self._rate(seen))
        inside = {part.path for part in self.fans.parts}
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if name not in inside and parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-group["rest_lr"])
        return loss

    def _members(self) -> tuple[Tensor | None, list[_Member]]:
        """Return which fan-ins have a gradient, None for all, and the parts of those.

        Where a part of a fan-in has none, it is zero there.
        """
        members = self._parts()
        if all(m.weight.grad is not None for m in members):
            return None, members
        live = torch.zeros(self.fans.count, dtype=torch.bool)
        for m in members:
            live[m.part.units] |= m.weight.grad is not None
        return live, [m for m in members if bool(live[m.part.units].any())]

    def _parts(self) -> list[_Member]:
        found = {
            name: parameter
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        }
        members = []
        for part in (part for part in self.fans.parts if part.path in found):
            weight = found[part.path]
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            if gradient.is_sparse:
                raise ValueError(
                    f"cannot step {type(self).__name__}: the gradient of '{part.path}' is sparse; "
                    "make the layer without sparse=True"
                )
            members.append(_Member(part, weight, gradient))
        return members

    def _seen(self, live: Tensor | None, members: list[_Member]) -> _Seen:
        """Return the parts of the gradient along and across the fan-ins (line 11)."""
        like = members[0].weight
        length, gradient, radial = like.new_zeros(3, self.fans.count)
        for m in members:
            m.part.added(length, squares(m.weight, m.part.dim))
            m.part.added(gradient, squares(m.gradient, m.part.dim))
            m.part.added(radial, dots(m.weight, m.gradient, m.part.dim))
        share, zero = self._of("share", like), length == 0
        gradient *= share**2
        radial *= share / length.masked_fill(zero, 1.0)  # length is a square until the end
        across = gradient - radial.square() * length
        noise = across <= 16 * torch.finfo(like.dtype).eps * gradient  # parallel but for rounding
        across.masked_fill_(noise | zero, 0.0)
        live = None if live is None else live.to(like.device)
        return _Seen(length.sqrt_(), gradient.sqrt_(), across.sqrt_(), radial, zero, live)

    def _of(self, name: str, like: Tensor) -> float | Tensor:
        """Return a setting of the groups: one number, or where they differ one for each fan-in."""
        values = [group[name] for group in self.param_groups]
        if all(value == values[0] for value in values):
            return values[0]
        found = like.new_zeros(self.fans.count)
        homes = {n: g[name] for g in self.param_groups for n in g["param_names"]}
        for part in reversed(self.fans.parts):  # the first has the last word
            if part.path in homes:
                found[part.units.to(like.device)] = homes[part.path]
        return found

    def _shared(self, like: Tensor) -> dict[str, Tensor]:
        """Return what is kept of fan-ins, zeros at first."""
        if SHARED not in self.state:
            each, one = like.new_zeros(self.fans.count), like.new_zeros(1)
            self.state[SHARED] = {"square": each, "capacity": each.clone()}  # type: ignore[index]
            self.state[SHARED] |= {"most": one, "most_capacity": one.clone()}  # type: ignore[index]
        return self.state[SHARED]  # type: ignore[index]

    def _rate(self, seen: _Seen) -> Tensor:
        """Return the angle of turning by unit of gradient across a fan-in (lines 12 to 14)."""
        like = seen.across
        shared, mixing = self._shared(like), self._of("mixing", like)
        for name, now in (("square", like.square()), ("capacity", 1.0)):
            mixed = (1 - mixing) * shared[name] + mixing * now
            shared[name] = mixed if seen.live is None else mixed.where(seen.live, shared[name])
        most = []
        for name, each in (("most", "square"), ("most_capacity", "capacity")):
            so_far = torch.cat([shared[name], shared[each].flip(0)]).cummax(0).values
            shared[name] = so_far[-1:].clone()
            most.append(so_far[1:].flip(0))
        own = shared["square"] / shared["capacity"].clamp(min=_tiny(like))
        faster = most[0] / most[1].clamp(min=_tiny(like)) / (own + self._of("eps", like))
        return faster.sqrt() * self._of("lr", like)

    def _turn(self, seen: _Seen, reach: Tensor, angle: Tensor) -> _Turn:
        """Return what lines 15 to 17 do, `reach` being the length of the vector turned along."""
        like = seen.length
        radial_lr, one = self._of("radial_lr", like), seen.length.masked_fill(seen.zero, 1.0)
        kept, cosine, sine = 1 - radial_lr * seen.radial, angle.cos(), angle.sin()
        after = torch.where(seen.zero, radial_lr * seen.gradient, kept.abs() * like)
        lost = radial_lr * self._of("penalty", like) * self._of("share", like)
        shrunk = (1 - lost / after.clamp(min=_tiny(like))).clamp(min=0.0)
        added = after * sine * (reach > 0) / reach.clamp(min=_tiny(like))
        added = -shrunk * torch.where(seen.zero, radial_lr, added)
        follows, leans = cosine.masked_fill(seen.zero, 0.0), kept.sign() * sine * reach / one
        turn = _Turn(shrunk * kept * cosine, added, follows, leans.masked_fill(seen.zero, 0.0))
        if seen.live is None:
            return turn
        still = {"kept": 1.0, "added": 0.0, "follows": 1.0, "leans": 0.0}
        return _Turn(**{k: getattr(turn, k).masked_fill(~seen.live, v) for k, v in still.items()})

    def _move(self, members: list[_Member], seen: _Seen, rate: Tensor) -> None:
        """Move all weights: along the gradient across them is along the gradient less the rest."""
        turn = self._turn(seen, seen.across, rate * seen.across)
        kept = turn.kept - turn.added * seen.radial
        added = turn.added * self._of("share", kept)
        for m in members:
            m.weight.mul_(m.part.along(kept, m.weight))
            m.weight.addcmul_(m.gradient, m.part.along(added, m.weight))

    def carry(self, grown: Grown) -> Callable[[], None]:
        """Return what makes the state of fan-ins that of the grown graph; `gg.migrate` calls it.

        It is called after parameters and their own states were replaced, and does not raise.
        """
        after = fan_ins(grown.graph)
        source = _sources(self.fans, after, grown)
        first = {id(t): grown.graph.analysis.tied[p] for p, t in grown.graph.state.items()}

        def carried() -> None:
            self.fans = after
            for group in self.param_groups:
                group["param_names"][:] = [first[id(p)] for p in group["params"]]
            shared = self.state.get(SHARED, {})  # type: ignore[arg-type]
            for name in set(shared) - {"most", "most_capacity"}:
                here = source.to(shared[name].device)
                shared[name] = shared[name][here.clamp(min=0)].masked_fill(here < 0, 0.0)
            self._straighten(grown)

        return carried

    def _straighten(self, grown: Grown) -> None:
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
    ) -> None:
        settings = {"lr": lr, "radial_lr": radial_lr, "penalty": penalty, "share": share}
        settings |= {"mixing": mixing, "eps": eps, "rest_lr": rest_lr}
        super().__init__(graph, momentum_mixing=momentum_mixing, **settings)

    def _move(self, members: list[_Member], seen: _Seen, rate: Tensor) -> None:
        """Move weights and running means; a mean starts anew where the fan-in is zero."""
        shared, like = self._shared(seen.length), seen.length
        share = self._of("share", like)
        mixing = torch.zeros_like(like) + self._of("momentum_mixing", like)
        mixing.masked_fill_(seen.zero, 1.0)
        if seen.live is not None:
            mixing.masked_fill_(~seen.live, 0.0)
        capacity = (1 - mixing) * shared.get("mean_capacity", torch.zeros_like(like)) + mixing
        shared["mean_capacity"] = capacity.masked_fill(seen.zero, 0.0)
        means = [
            self.state[m.weight].setdefault("mean", torch.zeros_like(m.weight)) for m in members
        ]
        for m, mean in zip(members, means, strict=True):
            mean.mul_(m.part.along(1 - mixing, mean))
            mean.addcmul_(m.gradient, m.part.along(mixing * share, mean))
            mean.addcmul_(m.weight, m.part.along(-mixing * seen.radial, mean))
        reach = self._lengths(members, means)
        turn = self._turn(seen, reach, rate * reach / capacity.clamp(min=_tiny(like)))
        for m, mean in zip(members, means, strict=True):
            turned = mean * m.part.along(turn.follows, mean)
            turned.addcmul_(m.weight, m.part.along(turn.leans, mean))
            m.weight.mul_(m.part.along(turn.kept, mean))
            m.weight.addcmul_(mean, m.part.along(turn.added, mean))
            mean.copy_(turned)

    def _lengths(self, members: list[_Member], entries: list[Tensor]) -> Tensor:
        """Return the length of every fan-in's entries, `(fans,)`."""
        total = members[0].weight.new_zeros(self.fans.count)
        for m, values in zip(members, entries, strict=True):
            m.part.added(total, squares(values, m.part.dim))
        return total.sqrt_()

    @torch.no_grad()
    def _straighten(self, grown: Grown) -> None:
        """Take out of the means what is along the weights that are left (lines 31 to 35)."""
        members = [m for m in self._parts() if "mean" in self.state[m.weight]]
        if not members:
            return
        means = [self.state[m.weight]["mean"] for m in members]
        length = self._lengths(members, [m.weight for m in members])
        inner = torch.zeros_like(length)
        for m, mean in zip(members, means, strict=True):
            m.part.added(inner, dots(m.weight, mean, m.part.dim))
        inner /= length.square().masked_fill_(length == 0, 1.0)
        for m, mean in zip(members, means, strict=True):
            mean.addcmul_(m.weight, m.part.along(inner, mean), value=-1)


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny


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
        if part.path in old and old[part.path].dim == part.dim:
            units, origin = old[part.path].units, grown.origin.get(part.path)
            index = None if origin is None else origin.dims[part.dim]
            if index is not None:
                units = units[index.clamp(min=0)].masked_fill(index < 0, -1)
            source[part.units] = torch.maximum(source[part.units], units)
    return source
