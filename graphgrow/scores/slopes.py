"""How much of a small change at a new unit's producers arrives at its consumers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from graphgrow.ir.analyse import ParameterDim, Slot, Step
from graphgrow.ir.outcome import Kind
from graphgrow.measure.routes import Route
from graphgrow.passes.follow import Follower

Slopes = dict[tuple[str, str], float]
"""The factor between a producer and a consumer, by their paths: 0 where it does not feed it."""


def slopes(route: Route, follower: Follower, ahead: float = 0.0) -> Slopes:
    """Return the slopes along the ways of a new unit that holds constants, in eval mode.

    `follower` has followed it. Activations with a kink count by the side at `ahead`: a positive
    number takes the right one. Where what the unit holds is not known, the slope of activations
    is taken for one.
    """
    return _Slopes(route, follower, ahead).run()


@dataclass(eq=False)
class _Slopes:
    route: Route
    follower: Follower
    ahead: float
    carried: dict[int, dict[str, float]] = field(default_factory=dict)

    def run(self) -> Slopes:
        written = {id(p.step): path for path, ps in self.route.writes.items() for p in ps}
        read = {id(r.product.step): path for path, rs in self.route.reads.items() for r in rs}
        found: Slopes = {}
        for step in self.follower.resized.analysis.steps:
            if step.mode != "eval":
                continue
            if id(step) in read:
                for number in step.inputs:
                    for producer, slope in self.carried.get(number, {}).items():
                        found[producer, read[id(step)]] = slope
            else:
                self._pass(step)
            if id(step) in written:
                self.carried[step.outputs[0]] = {written[id(step)]: 1.0}
        return found

    def _pass(self, step: Step) -> None:
        """Note what the outputs of a step carry that neither writes nor reads the units."""
        incoming = [n for n in step.inputs if n in self.carried]
        if not incoming:
            return
        rates = self._rates(step, incoming)
        joined: dict[str, float] = {}
        for number, rate in zip(incoming, rates, strict=True):
            for producer, slope in self.carried[number].items():
                joined[producer] = joined.get(producer, 0.0) + rate * slope
        for number in step.outputs:
            if number in self.follower.held:
                self.carried[number] = joined

    def _rates(self, step: Step, incoming: list[int]) -> list[float]:
        if step.row.kind is Kind.NORM:
            return [self._norm(step)]
        if step.row.kind is not Kind.POINTWISE:
            return [1.0] * len(incoming)
        contents = [self.follower.content(number) for number in incoming]
        if not all(c.constant().all() for c in contents):
            return [1.0] * len(incoming)
        leaves = {
            number: torch.full((), float(c.scale[0]) + self.ahead, dtype=torch.double)
            for number, c in zip(incoming, contents, strict=True)
        }
        for leaf in leaves.values():
            leaf.requires_grad_()

        def operand(a: Any) -> Any:
            if not isinstance(a, Slot):
                return a
            number = step.inputs[a.number]
            return leaves[number] * 1 if number in leaves else self._beside(number)

        with torch.enable_grad():
            args, kwargs = tree_map(operand, (step.args, dict(step.kwargs)))
            result = step.func(*args, **kwargs)
            if not result.requires_grad:
                return [0.0] * len(incoming)
            grads = torch.autograd.grad(result.sum(), list(leaves.values()), allow_unused=True)
        return [0.0 if g is None else float(g) for g in grads]

    def _beside(self, number: int) -> Tensor:
        """Return what the other side of an operator has: a gate's constant, or a parameter's."""
        if number in self.follower.held and number not in self.follower.resized.analysis.sources:
            content = self.follower.content(number)
            if content.constant().all():
                return torch.full((), float(content.scale[0]), dtype=torch.double)
        return self._number(number)

    def _norm(self, step: Step) -> float:
        """Return the factor of a batch norm with its running variance."""
        weight, _, _, var = (self._part(step, i) for i in range(1, 5))
        eps = next(a for a in reversed(step.args) if isinstance(a, float))
        scale = 1.0 if weight is None else weight
        return scale / (1.0 + eps if var is None else var + eps) ** 0.5

    def _part(self, step: Step, position: int) -> float | None:
        part = step.args[position] if position < len(step.args) else None
        return float(self._number(step.inputs[part.number])) if isinstance(part, Slot) else None

    def _number(self, number: int) -> Tensor:
        """Return what a parameter has for the first new unit, 0 where it is none."""
        resized = self.follower.resized
        source = resized.analysis.sources.get(number)
        if source is None:
            return torch.zeros((), dtype=torch.double)
        tensor, dims = self.follower.state[source.path], resized.dims(source.path)
        if not dims:
            return tensor.detach().cpu().double().flatten()[0]
        entries = self.follower.slices(ParameterDim(source.path, dims[0]))
        return entries[int(resized.new[0])][0].double()
