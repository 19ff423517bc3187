"""By which number old units are multiplied when an axis is resized, and what takes that back.

A mean over units falls when zero units join them, the spread of units when their mean joins them.
From there on old units differ from those of the narrower graph by one known factor. It is followed
through the operators until a weight takes it back; a number that is added on the way (the eps of a
norm) has to be multiplied by it. The factor of a value is always the wider one over the narrower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch.utils._pytree import tree_leaves

from graphgrow.ir.analyse import Slot, Step
from graphgrow.ir.rules import Kind, aten
from graphgrow.passes.follow import OVER_UNITS_ALONE, SUMS, Arrival, Content, Follower, place

UNKNOWN = float("nan")


@dataclass(frozen=True)
class Compensation:
    """What takes the factors of old units back, or the reason why nothing can.

    `tensors` has the factor of each parameter, `numbers` that of what a call adds to a statistic,
    by mode and node: wider over narrower. `lines` say so for the proof.
    """

    reason: str | None = None
    tensors: Mapping[str, float] = field(default_factory=dict)
    numbers: Mapping[tuple[str, str], float] = field(default_factory=dict)
    lines: tuple[str, ...] = ()


def compensated(follower: Follower) -> Compensation:
    """Return what takes back the factors that the new units of a followed axis cause."""
    walk = _Walk(follower)
    try:
        walk.run()
    except _Blocked as error:
        return Compensation(str(error))
    return Compensation(None, walk.tensors, walk.numbers, tuple(dict.fromkeys(walk.lines)))


def listed(numbers: Mapping[tuple[str, str], float]) -> tuple[tuple[str, str, float], ...]:
    """Return the factors of numbers as a rewrite holds them: mode, node, factor."""
    return tuple(sorted((mode, node, factor) for (mode, node), factor in numbers.items()))


class _Blocked(Exception):
    """A factor that nothing takes back; the message says where."""


@dataclass(frozen=True)
class _Spread:
    """What new units do to a statistic: its factor, that of the sum a number is added to."""

    output: float = 1.0
    number: float = 1.0


class _Walk:
    """The factors of values by number, where they are not one."""

    def __init__(self, follower: Follower) -> None:
        self.follower, self.analysis = follower, follower.resized.analysis
        self.factors: dict[int, float] = {}
        self.tensors: dict[str, float] = {}
        self.numbers: dict[tuple[str, str], float] = {}
        self.lines: list[str] = []
        self.absorbing: set[int] = set()

    def run(self) -> None:
        spreads = {id(a.step): self._spread(a) for a in self.follower.statistics}
        if all(s == _Spread() for s in spreads.values()):
            return
        for step in self.analysis.steps:
            spread = spreads.get(id(step), _Spread())
            if spread != _Spread() or any(n in self.factors for n in step.inputs):
                self._through(step, spread)
        self._check_uses()
        self._check_outputs()

    def _spread(self, arrival: Arrival) -> _Spread:
        step, content = arrival.step, arrival.content
        new, old = len(self.follower.resized.units), len(self.follower.old)
        if step.row.kind is Kind.CENTER:
            if content.mean().all() and step.func.overloadpacket in OVER_UNITS_ALONE:
                return _Spread((new / old) ** 0.5, old / new)
            if _even(content, self.follower.old):
                return _Spread()
            alone = step.func.overloadpacket in OVER_UNITS_ALONE
            wanted = "neither the mean of the others nor" if alone else "no"
            raise _Blocked(
                f"{step.where} normalises over units, and new ones are {wanted} copies of each as "
                f"often as of any other in {step.mode} mode"
            )
        if step.standardised:
            if content.zero().all():
                return _Spread((new / old) ** 0.5, old / new)
            raise _Blocked(
                f"{step.where} standardises its weight over units, and new ones are not the mean "
                "of each row"
            )
        averaged = step.func.overloadpacket is aten.mean
        if content.zero().all():
            return _Spread(self._sizes(step) if averaged else 1.0)
        if averaged and (content.mean().all() or _even(content, self.follower.old)):
            return _Spread()
        raise _Blocked(f"{step.where} sums over its units with no weight that could be zero")

    def _sizes(self, step: Step) -> float:
        """Return the narrower over the wider number of entries that a mean is taken of."""
        widths = self.follower.resized.widths()
        narrow = {**widths, self.follower.axis: len(self.follower.old)}
        ratio = 1.0
        for slot, dim in step.contracted:
            layout = self.analysis.values[step.inputs[slot]][dim]
            ratio *= layout.size(narrow) / layout.size(widths)
        return ratio

    # --- steps

    def _through(self, step: Step, spread: _Spread) -> None:
        found = [self.factors.get(n, 1.0) for n in step.inputs]
        rule = {
            Kind.MOVE: self._alike,
            Kind.POINTWISE: self._pointwise,
            Kind.CONTRACT: self._contract,
            Kind.CENTER: self._center,
            Kind.NORM: self._standard,
            Kind.ATTEND: self._attend,
            Kind.FILL: lambda *_: 1.0,
        }.get(step.row.kind, self._homogeneous)
        output = rule(step, found, spread)
        output = 1.0 if abs(output - 1) < 1e-12 else output
        for at, number in enumerate(step.outputs):
            known = at == 0 or step.row.kind is Kind.MOVE
            factor = output if known else UNKNOWN
            if factor != 1:
                self.factors[number] = factor

    def _blocked(self, step: Step) -> _Blocked:
        return _Blocked(
            f"{step.where} does not pass on the factor by which {len(self.follower.resized.units)} "
            f"units change what is averaged over them ({step.func.overloadpacket.__name__} in "
            f"{step.mode} mode)"
        )

    def _alike(self, step: Step, found: list[float], spread: _Spread) -> float:
        if not np.allclose(found, found[0], rtol=1e-12):
            raise self._blocked(step)
        return found[0]

    def _homogeneous(self, step: Step, found: list[float], spread: _Spread) -> float:
        packet = step.func.overloadpacket
        if packet is aten.native_dropout:
            return found[0]
        if any(f != 1 for f in found) and not (step.row.homogeneous and len(found) == 1):
            raise self._blocked(step)
        return found[0] * spread.output

    def _pointwise(self, step: Step, found: list[float], spread: _Spread) -> float:
        packet = step.func.overloadpacket
        if packet in _PRODUCTS:
            return self._absorbed(step, float(np.prod(found)), self._weights(step))
        if packet in _QUOTIENTS:
            return found[0] / (found[1] if len(found) > 1 else 1.0)
        if packet in _POWERS:
            power = _POWERS[packet] if len(step.args) == 1 else step.args[1]
            if isinstance(power, int | float):
                return found[0] ** power
        if packet is aten.copy_:
            return found[1]
        if packet in SUMS and len(found) == 1:
            self._number(step, found[0])
            return found[0]
        if step.row.homogeneous and len(step.args) == len(found):
            return self._alike(step, found, spread)
        raise self._blocked(step)

    def _contract(self, step: Step, found: list[float], spread: _Spread) -> float:
        biased = step.bias is not None
        factor = float(np.prod([f for slot, f in enumerate(found) if slot != step.bias]))
        over = {slot for slot, _ in step.contracted}
        weights = [slot for slot in self._weights(step) if slot in over or len(found) > 2]
        output = self._absorbed(step, factor, [s for s in weights if s != step.bias])
        if biased and (output != 1 or found[step.bias or 0] != 1):
            raise self._blocked(step)
        return output

    def _attend(self, step: Step, found: list[float], spread: _Spread) -> float:
        if abs(found[0] * found[1] - 1) > 1e-12 or any(f != 1 for f in found[3:]):
            raise self._blocked(step)
        return found[2]

    def _center(self, step: Step, found: list[float], spread: _Spread) -> float:
        """A norm takes back what all its units were multiplied by, if its eps follows."""
        if any(f != 1 for f in found[1:]):
            raise self._blocked(step)
        self._number(step, spread.number * found[0] ** 2)
        affine = [step.args[place(step, name)] for name in ("weight", "bias")]
        slots = [part.number for part in affine if isinstance(part, Slot)]
        return self._absorbed(step, spread.output, slots[:1]) if slots else spread.output

    def _standard(self, step: Step, found: list[float], spread: _Spread) -> float:
        """A weight that is standardised gets larger as its spread falls; a gain takes that back."""
        if not step.standardised:
            return self._homogeneous(step, found, spread)
        if any(f != 1 for f in found):
            raise self._blocked(step)
        self._number(step, spread.number)
        gain = step.args[place(step, "weight")]
        if not isinstance(gain, Slot):
            return spread.output
        path, readers = self._behind(step, gain.number)
        return self._taken_back(path, readers, spread.output)

    def _behind(self, step: Step, slot: int) -> tuple[str, list[Step]]:
        """Return the parameter that an input is, but for numbers that multiply it, and by what."""
        number, readers = step.inputs[slot], [step]
        while (source := self.analysis.sources.get(number)) is None:
            maker = next((s for s in self.analysis.steps if number in s.outputs), None)
            scaled = maker is not None and maker.func.overloadpacket in _PRODUCTS | _QUOTIENTS
            moved = maker is not None and maker.row.kind is Kind.MOVE
            if maker is None or not (scaled or moved) or len(maker.inputs) != 1:
                raise _Blocked(f"{step.where} has a weight that is computed, so it cannot follow")
            number = maker.inputs[0]
            readers.append(maker)
        return source.path, readers

    def _weights(self, step: Step) -> list[int]:
        """Return the slots of a step that are parameters or buffers of real numbers."""
        sources, state = self.analysis.sources, self.follower.state
        return [
            slot
            for slot, number in enumerate(step.inputs)
            if number in sources and state[sources[number].path].is_floating_point()
        ]

    def _absorbed(self, step: Step, factor: float, weights: list[int]) -> float:
        """Return what is left of a factor once one of the weights has taken it back."""
        if factor == 1 or not weights:
            return factor
        source = self.analysis.sources.get(step.inputs[weights[0]])
        if source is None:
            raise _Blocked(f"{step.where} has a weight that is computed, so it cannot follow")
        return self._taken_back(source.path, [step], factor)

    def _taken_back(self, path: str, readers: list[Step], factor: float) -> float:
        """Return what is left of a factor that a parameter takes back, read by these steps."""
        if self.tensors.setdefault(path, 1 / factor) != 1 / factor:
            raise _Blocked(f"'{path}' would need two factors, one of them at {readers[0].where}")
        self.absorbing.update(map(id, readers))
        self.lines.append(
            f"'{path}' is multiplied by {1 / factor:.6g} to make up for the new units"
        )
        return 1.0

    def _number(self, step: Step, factor: float) -> None:
        if factor == 1:
            return
        call = step.mode, step.node
        if self.numbers.setdefault(call, factor) != factor:
            raise _Blocked(f"what {step.where} adds would need two factors")
        self.lines.append(f"what {step.where} adds to it is multiplied by {factor:.6g}")

    # --- the whole

    def _check_uses(self) -> None:
        """Refuse parameters that are also read where no factor has to be taken back."""
        for step in self.analysis.steps:
            if step.row.kind is Kind.MOVE or id(step) in self.absorbing:
                continue
            for number in step.inputs:
                source = self.analysis.sources.get(number)
                if source is not None and source.path in self.tensors:
                    raise _Blocked(
                        f"'{source.path}' would have to be multiplied by "
                        f"{self.tensors[source.path]:.6g}, but {step.where} reads it as well"
                    )

    def _check_outputs(self) -> None:
        for (mode, name), value in self.analysis.nodes.items():
            for leaf in tree_leaves(value) if name == "output" else ():
                if isinstance(leaf, Slot) and leaf.number in self.factors:
                    raise _Blocked(
                        f"the model's output would be multiplied by "
                        f"{self.factors[leaf.number]:.6g} in {mode} mode"
                    )


def _even(content: Content, old: np.ndarray) -> bool:
    """Return whether new units are copies, of each old one as many as of any other."""
    if not len(old) or len(content.units) % len(old):
        return False
    alike = np.isin(content.like, old) & (content.scale == 1)
    counts = [(content.like == unit).sum() for unit in old]
    return bool(alike.all()) and len(set(counts)) == 1


_PRODUCTS = {aten.mul, aten.mul_}
_QUOTIENTS = {aten.div, aten.div_}
_POWERS = {
    aten.pow: None,
    aten.pow_: None,
    aten.sqrt: 0.5,
    aten.rsqrt: -0.5,
    aten.reciprocal: -1,
    aten.square: 2,
}
