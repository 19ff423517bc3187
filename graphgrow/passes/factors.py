"""By which number old units are multiplied when an axis is resized, and what takes that back.

A mean over units falls when zero units join them, the spread of units when their mean joins them; a
sum over units, or of products of two activations, grows when copies of each join. From there on
old units differ from those of the narrower graph by one known factor. It is followed through the
operators until a weight takes it back; a number that is added on the way (the eps of a norm) has to
be multiplied by it. What a product of two activations is multiplied with, before or after, takes
its factor back. The factor of a value is always the wider one over the narrower.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from torch.utils._pytree import tree_leaves

from graphgrow.ir.analyse import Slot, Step
from graphgrow.ir.layout import Layout
from graphgrow.ir.outcome import Kind, aten
from graphgrow.passes.content import Arrival, Content
from graphgrow.passes.follow import SUMS, Follower, place

UNKNOWN = float("nan")


@dataclass(frozen=True)
class Compensation:
    """What takes the factors of old units back, or the reason why nothing can.

    `tensors` has the factor of each parameter, `numbers` that of the number in a call (what it adds
    to a statistic, the scale of a product), by mode and node: wider over narrower. `lines` say so
    for the proof.
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


def repeats(follower: Follower, arrival: Arrival) -> float | None:
    """Return the factor of a sum of products of two activations, None where it is not known.

    It is one where new units of either are zero, and the number of copies of each where those of
    both are copies of the same units.
    """
    one, other = arrival.content, arrival.other
    if other is None or (one.zero() | other.zero()).all():
        return 1.0
    even = _even(one, follower.old) and _even(other, follower.old)
    if not even or len(arrival.step.contracted) != 2 or (one.like != other.like).any():
        return None
    return _growth(follower, arrival.step) if _whole(follower, arrival.step) else None


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
        self.products: set[int] = set()  # products of activations that are factors too large

    def run(self) -> None:
        spreads = {id(a.step): self._spread(a) for a in self.follower.statistics}
        for arrival in self.follower.arrivals:
            if arrival.other is not None:  # what is not known of it `judge` refuses
                spreads[id(arrival.step)] = _Spread(repeats(self.follower, arrival) or 1.0)
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
            alone = self.follower.goes_over_alone(step)
            if content.mean().all() and alone:
                return _Spread((new / old) ** 0.5, old / new)
            if _even(content, self.follower.old):
                return _Spread()
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
            return _Spread(1 / _growth(self.follower, step) if averaged else 1.0)
        even = _even(content, self.follower.old)
        if _whole(self.follower, step) and (even or (averaged and content.mean().all())):
            return _Spread(1.0 if averaged else _growth(self.follower, step) ** _root(step))
        raise _Blocked(f"{step.where} sums over its units with no weight that could be zero")

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
        output = _settled(rule(step, found, spread))
        for at, number in enumerate(step.outputs):
            known = at == 0 or step.row.kind is Kind.MOVE
            factor = output if known else UNKNOWN
            if factor != 1:
                self.factors[number] = factor
                moved = step.row.kind is Kind.MOVE and self.products.issuperset(step.inputs)
                if moved or (step.row.kind is Kind.CONTRACT and spread.output != 1):
                    self.products.add(number)

    def _blocked(self, step: Step) -> _Blocked:
        return _Blocked(
            f"{step.where} does not pass on the factor by which {len(self.follower.resized.new)} "
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
        if step.inputs[0] in self.products and _literal(step):
            self._scale(step, 1 / found[0])
            return 1.0
        if packet in _PRODUCTS:
            return self._absorbed(step, float(np.prod(found)), self._weights(step))
        if packet in _QUOTIENTS and not _rounds(step):
            return found[0] / (found[1] if len(found) > 1 else 1.0)
        if packet in _POWERS:
            power = _POWERS[packet] if len(step.args) == 1 else step.args[1]
            if isinstance(power, int | float):
                return found[0] ** power
        if packet is aten.copy_:
            return found[1]
        if packet in SUMS and len(found) == 1:
            self._number(step, found[0], "adds to it")
            return found[0]
        if packet in _BOUNDS and all(self._is_stated(step, n) for n in step.inputs[1:]):
            self._number(step, found[0], "bounds it by")
            return found[0]
        if step.row.homogeneous and len(step.args) == len(found):
            return self._alike(step, found, spread)
        raise self._blocked(step)

    def _is_stated(self, step: Step, number: int) -> bool:
        """Return whether a value is a number that the call of a step states."""
        maker = self.makers.get(number)
        if maker is None or maker.node != step.node:
            return False
        return maker.func.overloadpacket is aten.scalar_tensor

    def _contract(self, step: Step, found: list[float], spread: _Spread) -> float:
        biased = step.bias is not None
        factor = float(np.prod([f for slot, f in enumerate(found) if slot != step.bias]))
        factor = _settled(factor * spread.output)
        scale = self._scale_before(step) if spread.output != 1 != factor else None
        if scale is not None:
            self._scale(scale, 1 / factor)
            return 1.0
        over = {slot for slot, _ in step.contracted}
        weights = [slot for slot in self._weights(step) if slot in over or len(found) > 2]
        output = self._absorbed(step, factor, [s for s in weights if s != step.bias])
        if biased and (output != 1 or found[step.bias or 0] != 1):
            raise self._blocked(step)
        return output

    def _attend(self, step: Step, found: list[float], spread: _Spread) -> float:
        if any(f != 1 for f in found[3:]):
            raise self._blocked(step)
        factor = _settled(found[0] * found[1] * spread.output)
        self._number(step, 1 / factor, "multiplies it with")
        return found[2]

    def _scale(self, step: Step, factor: float) -> None:
        """Multiply the number that a step multiplies with, or divide the one that it divides by."""
        divides = step.func.overloadpacket in _QUOTIENTS
        self._number(step, 1 / factor if divides else factor, "multiplies it with")

    def _scale_before(self, contraction: Step) -> Step | None:
        """Return the step that multiplies a factor of a contraction with a number, if one does.

        What it makes may be moved, but must go to the contraction alone.
        """
        for number in contraction.inputs:
            step: Step | None = contraction
            while step is not None:
                step = self._maker(number, step)
                if step is not None and step.row.kind is not Kind.MOVE:
                    return step
                number = step.inputs[0] if step is not None else number
        return None

    def _maker(self, number: int, reader: Step) -> Step | None:
        """Return the step that makes a value for one reader, by a move or a number as a factor."""
        step = self.makers.get(number)
        readers = self.readers[number]
        if step is None or readers != [reader] or reader.inputs.count(number) > 1:
            return None
        moves = step.row.kind is Kind.MOVE and len(step.inputs) == len(step.outputs) == 1
        return step if moves or _literal(step) else None

    @cached_property
    def makers(self) -> dict[int, Step]:
        """The step that computes each value."""
        return {number: step for step in self.analysis.steps for number in step.outputs}

    @cached_property
    def readers(self) -> dict[int, list[Step]]:
        """The steps that read each value; none that has units of the axis is an output."""
        found: dict[int, list[Step]] = defaultdict(list)
        for step in self.analysis.steps:
            for number in dict.fromkeys(step.inputs):
                found[number].append(step)
        return found

    def _center(self, step: Step, found: list[float], spread: _Spread) -> float:
        """A norm takes back what all its units were multiplied by, if its eps follows."""
        if any(f != 1 for f in found[1:]):
            raise self._blocked(step)
        self._number(step, spread.number * found[0] ** 2, "adds to it")
        affine = [step.args[place(step, name)] for name in ("weight", "bias")]
        slots = [part.number for part in affine if isinstance(part, Slot)]
        return self._absorbed(step, spread.output, slots[:1]) if slots else spread.output

    def _standard(self, step: Step, found: list[float], spread: _Spread) -> float:
        """A weight that is standardised gets larger as its spread falls; a gain takes that back."""
        if not step.standardised:
            return self._homogeneous(step, found, spread)
        if any(f != 1 for f in found):
            raise self._blocked(step)
        self._number(step, spread.number, "adds to it")
        gain = step.args[place(step, "weight")]
        if not isinstance(gain, Slot):
            return spread.output
        path, readers = self._behind(step, gain.number)
        return self._taken_back(path, readers, spread.output)

    def _behind(self, step: Step, slot: int) -> tuple[str, list[Step]]:
        """Return the parameter that an input is, but for numbers that multiply it, and by what."""
        number, readers = step.inputs[slot], [step]
        while (source := self.analysis.sources.get(number)) is None:
            maker = self.makers.get(number)
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

    def _number(self, step: Step, factor: float, does: str) -> None:
        if factor == 1:
            return
        call = step.mode, step.node
        if self.numbers.setdefault(call, factor) != factor:
            raise _Blocked(f"what {step.where} {does} would need two factors")
        self.lines.append(f"what {step.where} {does} is multiplied by {factor:.6g}")

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


def _settled(factor: float) -> float:
    """Return a factor that is one but for rounding as one."""
    return 1.0 if abs(factor - 1) < 1e-12 else factor


def _growth(follower: Follower, step: Step) -> float:
    """Return the wider over the narrower number of entries that a sum goes over."""
    widths = follower.resized.widths()
    narrow = {**widths, follower.axis: len(follower.old)}
    ratio = 1.0
    for layout in _summed(follower, step):
        ratio *= layout.size(widths) / layout.size(narrow)
    return ratio


def _whole(follower: Follower, step: Step) -> bool:
    """Return whether a sum goes over units of the axis alone, none of another beside them."""
    terms = [t for layout in _summed(follower, step) for t in layout.apart()]
    return all(follower.axis in term for term in terms)


def _summed(follower: Follower, step: Step) -> list[Layout]:
    """Return the layouts of the dims that a step sums and the axis is in, those of one factor."""
    first = min(slot for slot, _ in step.contracted)
    values = follower.resized.analysis.values[step.inputs[first]]
    over = [values[dim] for slot, dim in step.contracted if slot == first]
    return [layout for layout in over if follower.axis in layout.axes()]


def _root(step: Step) -> float:
    """Return the power of a sum that a norm is, one for a plain sum."""
    if step.func.overloadpacket is aten.sum:
        return 1.0
    power = step.args[1] if len(step.args) > 1 else step.kwargs.get("ord", 2)
    return 1 / (2.0 if power is None else power)


def _literal(step: Step) -> bool:
    """Return whether a step multiplies or divides its one tensor by a number."""
    scales = step.func.overloadpacket in _PRODUCTS | _QUOTIENTS and len(step.args) == 2
    stated = scales and step.args[0] == Slot(0) and isinstance(step.args[1], int | float)
    return stated and not _rounds(step)


def _rounds(step: Step) -> bool:
    return step.kwargs.get("rounding_mode") is not None


_PRODUCTS = {aten.mul, aten.mul_}
_QUOTIENTS = {aten.div, aten.div_}
_BOUNDS = {aten.clamp, aten.clamp_, aten.clamp_min, aten.clamp_min_, aten.clamp_max}
_BOUNDS |= {aten.clamp_max_}
_POWERS = {
    aten.pow: None,
    aten.pow_: None,
    aten.sqrt: 0.5,
    aten.rsqrt: -0.5,
    aten.reciprocal: -1,
    aten.square: 2,
}
