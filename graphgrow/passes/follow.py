"""What the units of an edited axis hold, followed through every operator of a graph.

Each new unit of each tensor is a multiple of another unit, or a constant (zero for one), or a unit
of its own. Nothing is assumed of the weights: what a layer writes is read off its numbers, and each
operator's row says what survives it. Where an axis is contracted, the weights of units that hold
the same are added up (`Reduction`): the sum must be what the narrower layer has. Widening checks
that; removal makes it so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from graphgrow.ir.analyse import Analysis, ParameterDim, Slot, Source, Step
from graphgrow.ir.outcome import Kind, Window, aten
from graphgrow.passes.content import CONSTANT, Arrival, Content, Reduction
from graphgrow.passes.likeness import close, likeness
from graphgrow.passes.mixtures import MEAN, Mixtures
from graphgrow.passes.parts import Parts
from graphgrow.passes.ranges import Ranges
from graphgrow.passes.standard import standards
from graphgrow.passes.units import Resized, picked, precise
from graphgrow.passes.windows import disturbance


class Follower:
    """Follows the new units of one axis through a graph whose tensors are `state`.

    With `ranges`, units that clipping (a ReLU) holds at one number are known to be constants, and
    those that it never changes to be what they were.
    """

    def __init__(
        self, resized: Resized, state: Mapping[str, Tensor], ranges: Ranges | None = None
    ) -> None:
        self.resized, self.state, self.ranges = resized, state, ranges
        self.axis, self.new, self.old = resized.axis, resized.new, resized.old
        self.contents: dict[int, Content] = {}
        self.arrivals: list[Arrival] = []
        self.statistics: list[Arrival] = []
        self.windowed: list[Step] = []
        self.blocked: list[str] = []
        self._slices: dict[ParameterDim, Tensor] = {}
        self.held = resized.analysis.holding.get(resized.axis, frozenset())
        # only norms and means over units ask whether some are the mean of the others
        self.averages = is_averaged(resized.analysis, resized.axis)
        self.mixtures = Mixtures(resized, self.slices, scaled=self.averages)
        self._means: dict[int, int] = {}
        self._silent: set[ParameterDim] = set()
        self._parts: dict[int, Parts] = {}
        self.stuck = np.zeros(len(self.new), dtype=bool)  # zero in two factors: neither ever moves
        self.needed = self._needed()
        self.guess = self._guess()

    # --- what the numbers say

    def slices(self, at: ParameterDim) -> Tensor:
        """Return a parameter's entries by unit of the axis, in double precision."""
        if at not in self._slices:
            raw = self.resized.slices(self.state[at.path], at.path, at.dim)
            numbers = raw.is_floating_point() or raw.is_complex()
            self._slices[at] = precise(raw) if numbers else raw
        return self._slices[at]

    def _needed(self) -> np.ndarray:
        """Return which new units some consumer reads with weights that are not zero."""
        needed = np.zeros(len(self.new), dtype=bool)
        axis = self.resized.analysis.axes[self.axis]
        for at in axis.consumers:
            columns = self.slices(at)[torch.from_numpy(self.new)]
            needed |= (columns != 0).any(1).numpy()
        return needed if axis.consumers else ~needed

    def _guess(self) -> tuple[np.ndarray, np.ndarray]:
        """Return for each new unit the unit that it is a multiple of, and the multiple."""
        axis = self.resized.analysis.axes[self.axis]
        written = [self.slices(at) for at in axis.producers if self.state[at.path].dim() > 0]
        if not written or not self.needed.any():
            return self.new.copy(), np.ones(len(self.new))
        incoming = torch.cat(written, 1)
        return likeness(incoming, self.old, self.new, self.needed, self._eps())

    def _eps(self) -> float:
        axis = self.resized.analysis.axes[self.axis]
        dtypes = [self.state[at.path].dtype for at in axis.producers + axis.carriers]
        return max((torch.finfo(d).eps for d in dtypes if d.is_floating_point), default=0.0)

    # --- the walk

    def run(self) -> Follower:
        """Follow all steps and return self, with what they do to old units noted.

        `arrivals` are contractions, `statistics` means and norms over units, `windowed` sums over
        units beside each other. `blocked` has the reasons why nothing can be exact.
        """
        for step in self.resized.analysis.touching(self.axis):
            content = self._clipped(step, self._through(step))
            # what stands beside the first output of a computation (indices, say) is not known
            alike = step.outputs if step.row.kind is Kind.MOVE else step.outputs[:1]
            for number in alike:
                if content is not None and self._has(number):
                    self.contents[number] = content
            if step.row.kind is Kind.MOVE and step.inputs[0] in self._parts:
                self._move_parts(step)
        return self

    def _has(self, number: int) -> bool:
        return number in self.held

    def _clipped(self, step: Step, content: Content | None) -> Content | None:
        """Return what new units hold where ranges say more than the operator alone."""
        analysis = self.resized.analysis
        clip = self.ranges.of(analysis, step, self.axis) if self.ranges and content else None
        if clip is None or content is None or not self._has(step.inputs[0]):
            return content
        before, held, kept = self.content(step.inputs[0]), clip.held[self.new], clip.kept[self.new]
        known = ~np.isnan(held)
        like = before.like.copy()
        whole = bool(clip.kept[self.old].all())  # a mean is kept where all are
        others = [clip.kept[u] if u >= 0 else u == CONSTANT or whole for u in like]
        kept = kept & np.array(others, dtype=bool)
        like, scale, slope = (
            np.where(kept, was, now)
            for was, now in (
                (like, content.like),
                (before.scale, content.scale),
                (before.slope, content.slope),
            )
        )
        return Content(
            self.new,
            np.where(known, CONSTANT, like),
            np.where(known, held, scale),
            np.where(known, 0.0, slope),
        )

    def _through(self, step: Step) -> Content | None:
        kind = step.row.kind
        windows = self.resized.analysis.windows(step, self.axis)
        if kind is Kind.CONTRACT and not windows:
            return self._contract(step)
        if kind is Kind.SUM:
            return self._sum(step)
        if kind is Kind.ATTEND:
            return self._attend(step)
        if kind in (Kind.FILL, Kind.RANDOM):
            return self._made(step)
        if kind is Kind.OVERWRITTEN:
            return self._overwritten(step)
        if kind is Kind.POINTWISE:
            return self._pointwise(step)
        if kind is Kind.NORM:
            return self._norm(step) if self.axis not in step.standardised else self._standard(step)
        if self.axis in step.mixed:
            return self._center(step)
        if windows:
            return self._windowed(step, windows)
        return self._kept(step)

    def content(self, number: int) -> Content:
        """Return what the new units of a value hold."""
        if number not in self.contents:
            source = self.resized.analysis.sources.get(number)
            found = self._of_source(source) if source is not None else self.arbitrary()
            self.contents[number] = found
            if source is not None and len(dims := self.resized.dims(source.path)) == 1:
                at = ParameterDim(source.path, dims[0])
                self._note_parts(number, at, self.slices(at))
        return self.contents[number]

    def arbitrary(self) -> Content:
        """Return the content of which nothing is known."""
        count = len(self.new)
        return Content(self.new, self.new.copy(), np.ones(count), np.ones(count))

    def _of_source(self, source: Source) -> Content:
        dims = [ParameterDim(source.path, d) for d in self.resized.dims(source.path)]
        return self._joined([self._of_entries(self.slices(at), at) for at in dims])

    def _of_entries(self, entries: Tensor, at: ParameterDim) -> Content:
        """Return what entries by unit are: one number, a multiple of a unit, or their own."""
        mine, like, scale = entries[torch.from_numpy(self.new)], *self.guess
        uniform = (mine == mine[:, :1].real).all(1).numpy()
        alike = np.array(
            [
                like[k] != self.new[k] and scale[k] == 1 and torch.equal(entries[like[k]], mine[k])
                for k in range(len(self.new))
            ],
            dtype=bool,
        )
        first = mine[:, 0].real.double().numpy() if mine.shape[1] else np.zeros(len(self.new))
        code = self._averaged(entries, at)
        mean = code <= MEAN
        return Content(
            self.new,
            np.where(mean, code, np.where(alike, like, np.where(uniform, CONSTANT, self.new))),
            np.where(mean | alike | ~uniform, 1.0, first),
            np.ones(len(self.new)),
        )

    def _averaged(self, entries: Tensor, at: ParameterDim) -> np.ndarray:
        """Return which mean of the old units' entries those of each new unit are, 0 for none."""
        found = np.zeros(len(self.new), dtype=int)
        if not self.averages or not entries.is_floating_point():
            return found
        old, new = (entries[torch.from_numpy(units)] for units in (self.old, self.new))
        size = max(float(old.abs().max()) if old.numel() else 0.0, 1e-300)
        eps = max(self._eps(), torch.finfo(torch.double).eps)
        for code in reversed(self.mixtures.asked(at)):
            gap = (new - torch.from_numpy(self.mixtures.weights(code)) @ old.double()).abs()
            found[(gap <= 8 * eps * size).reshape(len(new), -1).all(1).numpy()] = code
        return found

    def _joined(self, contents: list[Content]) -> Content:
        """Return what holds in all of several tensors.

        A copy stays one beside numbers that are the same for all units, a mean beside zeros.
        """
        first, *others = sorted(contents, key=lambda c: c.uniform)
        same = np.ones(len(self.new), dtype=bool)
        slope = first.slope
        for other in others:
            alike = (other.like == first.like) & (other.scale == first.scale)
            if other.uniform:
                alike |= (first.like >= 0) & (first.scale == 1)
                alike |= ~first.constant() & other.zero()
            same &= alike
            slope = np.where(slope == 0, other.slope, slope)
        return Content(
            self.new, np.where(same, first.like, self.new), np.where(same, first.scale, 1.0), slope
        )

    def _carrying(self, step: Step) -> list[int]:
        return [slot for slot, number in enumerate(step.inputs) if self._has(number)]

    def _source(self, step: Step, slot: int | None) -> Source | None:
        return None if slot is None else self.resized.analysis.sources.get(step.inputs[slot])

    def _entries(self, source: Source) -> Tensor:
        """Return a carried parameter's entries by unit, all its dims of the axis side by side."""
        dims = self.resized.dims(source.path)
        return torch.cat([self.slices(ParameterDim(source.path, d)) for d in dims], 1)

    # --- one method for each kind of row

    def _made(self, step: Step) -> Content:
        carried = [s for s in self._carrying(step)]
        value = _fill_value(step)
        if step.row.kind is Kind.RANDOM:
            held = [self.content(step.inputs[s]) for s in carried]
            dropout = step.func.overloadpacket is aten.native_dropout
            if held and dropout and step.args[1] == 0:
                return held[0]
            zero = held[0].zero() if held and dropout else 0
            return self._masked(np.zeros(len(self.new), dtype=bool) | zero, 0.0)
        if value is None:
            return self.arbitrary()
        filled = self._masked(np.ones(len(self.new), dtype=bool), value, slope=0.0)
        return replace(filled, uniform=True)

    def _overwritten(self, step: Step) -> Content:
        """Return what a view holds of which some entries were written in place elsewhere."""
        if not all(map(self._has, step.inputs)):
            return self.arbitrary()
        return self._joined([self.content(number) for number in step.inputs])

    def _masked(
        self, constant: np.ndarray, value: float | np.ndarray, slope: float = 1.0
    ) -> Content:
        count = len(self.new)
        return Content(
            self.new,
            np.where(constant, CONSTANT, self.new),
            np.where(constant, value, 1.0),
            np.full(count, slope),
        )

    def _attend(self, step: Step) -> Content | None:
        """Follow attention: features of queries meet those of keys, values are averaged."""
        meeting = [key for key, axes in step.contracted.items() if self.axis in axes]
        if meeting:
            self._arrive(step, meeting)
        if not any(self._has(number) for number in step.outputs):
            return None
        averaged = [2] if meeting else self._carrying(step)
        self._meet(step, [slot for slot in averaged if slot < 2])
        if averaged == [2]:  # features of values: the same weights average each of them
            content = self.content(step.inputs[2])
            lost = content.constant() & ~content.zero()
            return Content(
                self.new,
                np.where(lost, self.new, content.like),
                np.where(lost, 1.0, content.scale),
                content.slope,
            )
        return self._kept(step)

    def _meet(self, step: Step, factors: list[int]) -> None:
        """Note new units that are zero in both factors of a product (new heads), and stay so."""
        if len(factors) != 2:
            return
        numbers = [step.inputs[slot] for slot in factors]
        zero = self.content(numbers[0]).zero() & self.content(numbers[1]).zero()
        if zero.any() and not self._read_elsewhere(step, numbers):
            self.stuck |= zero

    def _read_elsewhere(self, step: Step, numbers: list[int]) -> bool:
        """Return whether what leads to some values is read by steps that do not lead to them."""
        steps = [s for s in self.resized.analysis.steps if s.mode == step.mode]
        makers = {number: s for s in steps for number in s.outputs}
        values, leading, left = set(), {id(step)}, list(numbers)
        while left:
            number = left.pop()
            if number not in values and self._has(number):
                values.add(number)
                maker = makers.get(number)
                leading.add(id(maker))
                left += maker.inputs if maker is not None else ()
        return any(id(s) not in leading and not values.isdisjoint(s.inputs) for s in steps)

    def _move_parts(self, step: Step) -> None:
        """Follow the parts of a packed dim; one of which nothing is left but zeros is zero."""
        values, parts = self.resized.analysis.values, self._parts[step.inputs[0]]
        moved = parts.moved(step, [values[n] for n in (step.inputs[0], *step.outputs)])
        for number, found in zip(step.outputs, moved, strict=True):
            if found is not None and found.all_zero():
                self.contents[number] = self._masked(np.ones(len(self.new), dtype=bool), 0.0)
            elif found is not None:
                self._parts[number] = found

    def _kept(self, step: Step) -> Content:
        slots = [s for s in self._carrying(step) if not self._lists_alike(step, s)]
        held = [self.content(step.inputs[s]) for s in slots]
        if not held:
            return replace(self.arbitrary(), uniform=step.func.overloadpacket is aten.expand)
        joined, row = self._joined(held), step.row
        if _draws(step):
            return self.arbitrary()
        lost = joined.constant() & (joined.scale != 0) & (row.keeps != "any")
        lost |= joined.constant() & (row.keeps == "none")
        if step.func.overloadpacket not in _AVERAGES and row.kind not in (Kind.MOVE, Kind.GATHER):
            lost |= joined.mixed()
        if not row.homogeneous:
            lost |= ~joined.constant() & (joined.scale != 1)
        lost |= ~joined.constant() & (joined.scale < 0) & (row.kind is not Kind.MOVE)
        return Content(
            self.new,
            np.where(lost, self.new, joined.like),
            np.where(lost, 1.0, joined.scale),
            joined.slope,
            row.kind is Kind.MOVE and all(c.uniform for c in held),
        )

    def _lists_alike(self, step: Step, slot: int) -> bool:
        """Return whether an input lists positions, the same for all units."""
        names = [a.name for a in step.func._schema.arguments]
        at = names.index("index") if "index" in names else len(step.args)
        given = step.args[at] if at < len(step.args) else None
        return given == Slot(slot) and self.content(step.inputs[slot]).uniform

    def _windowed(self, step: Step, windows: tuple[Window, ...]) -> Content:
        """Return what windows give: zero for new units that have nothing but zeros in theirs."""
        content = self.content(step.inputs[0])
        zero = content.zero()
        for window in windows:
            reason, zero = disturbance(self.resized, step, window, zero)
            self.blocked += [] if reason is None else [reason]
        self.windowed.append(step)
        if step.bias is not None:
            zero = zero & False
        return replace(self._masked(zero, 0.0), slope=content.slope)

    def _sum(self, step: Step) -> Content | None:
        content = self.content(step.inputs[0])
        if any(self.axis in axes for axes in step.contracted.values()):
            self.arrivals.append(Arrival(step, content, None))
            self.statistics.append(self.arrivals[-1])
            if step.func.overloadpacket is aten.mean and self._is_over_units_alone(step):
                self._means[step.outputs[0]] = step.inputs[0]
        if not any(self._has(number) for number in step.outputs):
            return None
        return self._kept(step)

    def _pointwise(self, step: Step) -> Content:
        slots = self._carrying(step)
        if not slots:
            return self.arbitrary()
        contents = {slot: self.content(step.inputs[slot]) for slot in slots}
        like, scale = self._agreed(step, contents)
        zero, moved = self._zero_factor(step, contents)
        like, scale = np.where(zero, CONSTANT, like), np.where(zero, 0.0, scale)
        if step.func.overloadpacket in SUMS and len(slots) == 2:
            for slot in slots:
                if contents[slot].zero().all():
                    self._note_silent(step, 1 - slot)
        code = self._mean_kept(step, contents)
        mean = code <= MEAN
        if self._is_centred(step):
            mean = code == MEAN
            code = np.where(mean, CONSTANT, code)
        like = np.where(mean, code, like)
        scale = np.where(mean, np.where(code == CONSTANT, 0.0, 1.0), scale)
        numbers = {slot: self._as_numbers(step, slot, c) for slot, c in contents.items()}
        constant = np.all([c.constant() for c in numbers.values()], axis=0)
        value, slope = self._evaluated(step, numbers, constant)
        # how much and which way other factors move it is not known, so it must not cancel in sums
        slope = np.where(zero & ~constant, moved != 0, slope)
        known = constant & ~np.isnan(value)
        if all(self._source(step, slot) is not None for slot in slots):
            known &= like == self.new  # of parameters alone, who is like whom says more
        return Content(
            self.new, np.where(known, CONSTANT, like), np.where(known, value, scale), slope
        )

    def _zero_factor(
        self, step: Step, contents: Mapping[int, Content]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return which new units are zero since a factor or dividend is, and how that one moves."""
        none = np.zeros(len(self.new), dtype=bool)
        packet, factors = step.func.overloadpacket, list(contents.values())
        if packet in _QUOTIENTS:
            factors = [contents[0]] if 0 in contents else []
            if any(c.zero().any() for slot, c in contents.items() if slot):
                fact = f"divides by new units that are zero in {step.mode} mode"
                self.blocked.append(f"{step.where} {fact}")
        elif packet not in _PRODUCTS:
            factors = []
        zero = np.any([none, *(c.zero() for c in factors)], axis=0)
        moved = [c.slope for c in factors]
        return zero, np.select([c.zero() for c in factors], moved, 1.0) if moved else none

    def _as_numbers(self, step: Step, slot: int, content: Content) -> Content:
        """Return the content of an input, a parameter's one number rather than what it is like."""
        source = self._source(step, slot)
        if source is None:
            return content
        held = _one_number(self._entries(source)[torch.from_numpy(self.new)])
        return self._masked(~np.isnan(held), np.nan_to_num(held))

    def _mean_kept(self, step: Step, contents: Mapping[int, Content]) -> np.ndarray:
        """Return which mean new units are after sums, and after products with one number each."""
        packet, none = step.func.overloadpacket, np.zeros(len(self.new), dtype=int)
        if not self.averages or packet not in _LINEAR | _PRODUCTS | _QUOTIENTS:
            return none
        if packet in _LINEAR:
            first, *others = [c.like for c in contents.values()]
            same = np.all([first <= MEAN, *(like == first for like in others)], axis=0)
            return np.where(same, first, 0)
        sources = {slot: self._source(step, slot) for slot in contents}
        computed = [slot for slot, source in sources.items() if source is None]
        if len(computed) != 1 or (packet in _QUOTIENTS and computed != [0]):
            return none
        codes = contents[computed[0]].like
        entries = [self._entries(s) for s in sources.values() if s is not None]
        if all(map(_uniform, entries)):
            return np.where(codes <= MEAN, codes, 0)
        if packet in _QUOTIENTS or len(entries) != 1 or entries[0].shape[1] != 1:
            return none
        (scale,) = entries[0].T.double().numpy()
        scaled = [
            self.mixtures.scaled(c, scale[self.old], scale[u]) if c <= MEAN else None
            for u, c in zip(self.new, codes, strict=True)
        ]
        return np.array([code or 0 for code in scaled], dtype=int)

    def _is_over_units_alone(self, step: Step) -> bool:
        values = self.resized.analysis.values[step.inputs[0]]
        over = [values[dim].terms for _, dim in step.contracted]
        return over == [((self.axis,),)]

    def silent(self) -> set[ParameterDim]:
        """Return the parameter dims whose entries are added to new units that are zero."""
        return self._silent

    def _note_silent(self, step: Step, position: int) -> None:
        part = step.args[position]
        source = self._source(step, part.number) if isinstance(part, Slot) else None
        if source is not None:
            self._silent |= {ParameterDim(source.path, d) for d in self.resized.dims(source.path)}

    def _is_centred(self, step: Step) -> bool:
        """Return whether a step subtracts the mean of units, which leaves nothing of new ones."""
        subtracts = step.func.overloadpacket in _DIFFERENCES and len(step.inputs) == 2
        return subtracts and self._means.get(step.inputs[1]) == step.inputs[0]

    def _standard(self, step: Step) -> Content:
        """Return what standardising a weight leaves of new units: zero, if they are rows' means."""
        standard = next(found for norm, found in standards(self.resized) if norm is step)
        zero = np.zeros(len(self.new), dtype=bool)
        shifts = isinstance(step.args[place(step, "bias")], Slot)
        if standard is not None and not shifts:
            tensor = self.state[standard.at.path].detach()
            means, new = standard.means(self.resized, tensor), torch.from_numpy(self.new)
            size = max(float(tensor.abs().max()), 1e-300)
            gap = (self.slices(standard.at)[new] - means).abs()
            eps = torch.finfo(tensor.dtype).eps
            zero = (gap <= 8 * eps * size).reshape(len(new), -1).all(1).numpy()
        content = self._masked(zero, 0.0)
        self.statistics.append(Arrival(step, content, None))
        return content

    def _center(self, step: Step) -> Content:
        """Return what a norm over the units leaves of new ones: its bias, if they are the mean."""
        content = self.content(step.inputs[0])
        weight, bias = (self._norm_part(step, place(step, n)) for n in ("weight", "bias"))
        self.statistics.append(Arrival(step, content, None))
        if content.mean().all():
            self._note_silent(step, place(step, "bias"))
        held = np.zeros(len(self.new))
        if bias is not None:
            held = _one_number(bias[torch.from_numpy(self.new)])
        known = self.goes_over_alone(step) & content.mean() & ~np.isnan(held)
        parts = [p for p in (weight, bias) if p is not None]
        copied = self._copied(content, parts)
        return Content(
            self.new,
            np.where(known, CONSTANT, np.where(copied, content.like, self.new)),
            np.where(known, held, 1.0),
            content.slope,
        )

    def goes_over_alone(self, step: Step) -> bool:
        """Return whether a norm's statistics go over the units at one place, each of them once."""
        over = self.resized.analysis.values[step.inputs[0]][-1]
        return step.func.overloadpacket in _OVER_LAST and over.apart() == ((self.axis,),)

    def _copied(self, content: Content, parts: list[Tensor]) -> np.ndarray:
        """Return which new units equal another in content and in some per-unit entries."""
        return np.array(
            [
                i >= 0 and i != u and s == 1 and all(torch.equal(p[i], p[u]) for p in parts)
                for u, i, s in zip(self.new, content.like, content.scale, strict=True)
            ],
            dtype=bool,
        )

    def _agreed(self, step: Step, contents: Mapping[int, Content]) -> tuple[np.ndarray, np.ndarray]:
        """Return the unit that each new unit equals in every input, itself where there is none."""
        like, scale = self.new.copy(), np.ones(len(self.new))
        sources = {slot: self._source(step, slot) for slot in contents}
        computed = [c for slot, c in contents.items() if sources[slot] is None]
        carried = [self._entries(s) for s in sources.values() if s is not None]
        product = step.func.overloadpacket in _PRODUCTS
        if not computed:
            computed, carried = list(contents.values()), []
        # beside numbers that are the same for all units, equal units stay equal
        own = [c for c in computed if not c.uniform] or computed
        mixed, computed = len(own) < len(computed), own
        for k, u in enumerate(self.new):
            i, s = computed[0].like[k], computed[0].scale[k]
            if i == u or i < 0 or (mixed and s != 1):
                continue
            if any(c.like[k] != i or c.scale[k] != s for c in computed[1:]):
                continue
            if s == 1 or (product and len(computed) == 1):
                fits = all(torch.equal(e[u], e[i]) for e in carried)
            else:
                fits = _scales(step, len(contents), s) and all(
                    close(e[u], s * e[i], self._eps()) for e in carried
                )
            if fits:
                like[k], scale[k] = i, s
        return like, scale

    def _evaluated(
        self, step: Step, contents: Mapping[int, Content], constant: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the operator's value on constant units, and how it moves with their weights."""
        value, slope = np.full(len(self.new), np.nan), np.ones(len(self.new))
        if not constant.any():
            return value, slope
        leaves: dict[int, Tensor] = {}
        masks = _masks(step)
        computed = [slot for slot in contents if self._source(step, slot) is None]
        moving = computed or list(contents)  # a weight that is computed moves with its parameters

        def operand(a: object) -> object:
            if not isinstance(a, Slot):
                return a
            if a.number not in contents:
                single = self._single(step, a.number)
                return single if single is None or a.number not in masks else single != 0
            made = torch.from_numpy(contents[a.number].scale[constant])
            if a.number in masks:
                return made != 0
            made.requires_grad_()
            if a.number in moving:
                leaves[a.number] = made
            return made * 1

        args, kwargs = tree_map(operand, (step.args, dict(step.kwargs)))
        if any(a is None and isinstance(b, Slot) for a, b in zip(args, step.args, strict=True)):
            return value, slope
        with torch.enable_grad():
            result = step.func(*args, **kwargs)
            grads = (
                torch.autograd.grad(result.sum(), list(leaves.values()), allow_unused=True)
                if (leaves and result.requires_grad)
                else ()
            )
        value[constant] = result.detach().numpy()
        moved = np.zeros(int(constant.sum()))
        for slot, grad in zip(leaves, grads, strict=False):
            if grad is not None:
                rate = torch.from_numpy(contents[slot].slope[constant])
                moved = moved + (grad * rate).numpy()  # NumPy would warn of roots at zero
        slope[constant] = moved
        return value, slope

    def _single(self, step: Step, slot: int) -> Tensor | None:
        """Return the one number that a parameter without units holds, None if it has more."""
        source = self._source(step, slot)
        if source is None or self.state[source.path].numel() != 1:
            return None
        return self.state[source.path].detach().cpu().double().reshape(())

    def _norm(self, step: Step) -> Content:
        content = self.content(step.inputs[0])
        weight, bias, mean, var = (self._norm_part(step, i) for i in range(1, 5))
        eps = next(a for a in reversed(step.args) if isinstance(a, float))
        batch = (step.mode == "train" and _uses_batch(step)) or mean is None
        count = len(self.resized.units)
        w = torch.ones(count, 1) if weight is None else weight
        b = torch.zeros(count, 1) if bias is None else bias
        new = torch.from_numpy(self.new)
        if batch:
            value, rate = b[new], w[new] / eps**0.5
        else:
            assert mean is not None and var is not None
            rate = w[new] / (var[new] + eps).sqrt()
            value = rate * (torch.from_numpy(content.scale)[:, None] - mean[new]) + b[new]
        held = _one_number(value)
        constant = content.constant() & ~np.isnan(held)
        scale = np.full(len(self.new), np.nan)
        for k, (u, i) in enumerate(zip(self.new, content.like, strict=True)):
            alike = all(torch.equal(p[i], p[u]) for p in (mean, var) if p is not None)
            if i >= 0 and content.scale[k] == 1 and alike:
                scale[k] = self._factor(w[u], b[u], w[i], b[i])
        kept = ~np.isnan(scale)
        return Content(
            self.new,
            np.where(constant, CONSTANT, np.where(kept, content.like, self.new)),
            np.where(constant, held, np.where(kept, scale, 1.0)),
            content.slope * rate[:, 0].double().numpy(),
        )

    def _factor(self, weight: Tensor, bias: Tensor, of_weight: Tensor, of_bias: Tensor) -> float:
        """Return by what a unit's scale and shift multiply another's, NaN where they do not."""
        if torch.equal(weight, of_weight) and torch.equal(bias, of_bias):
            return 1.0
        factor = float(weight / of_weight)
        fits = close(bias, factor * of_bias, self._eps()) and np.isfinite(factor)
        return factor if fits else float("nan")

    def _norm_part(self, step: Step, position: int) -> Tensor | None:
        """Return one per-unit input of a batch norm by unit, None where it has none."""
        part = step.args[position] if position < len(step.args) else None
        if not isinstance(part, Slot):
            return None
        source = self._source(step, part.number)
        if source is None:
            return torch.full((len(self.resized.units), 1), float("nan"), dtype=torch.double)
        return self._entries(source)

    def _contract(self, step: Step) -> Content | None:
        meeting = [key for key, axes in step.contracted.items() if self.axis in axes]
        if meeting:
            self._arrive(step, meeting)
        if not any(self._has(number) for number in step.outputs):
            return None
        return self._written(step, meeting)

    def _arrive(self, step: Step, meeting: list[tuple[int, int]]) -> None:
        weights = [(slot, dim) for slot, dim in meeting if self._source(step, slot) is not None]
        found = [self.content(step.inputs[slot]) for slot, _ in meeting]
        slot = weights[-1][0] if weights else None
        source = self._source(step, slot)
        dims = [self._tensor_dim(source, d) for s, d in weights if s == slot] if source else []
        if not dims or None in dims:
            self.arrivals.append(Arrival(step, found[0], None, found[1]))
            return
        content = self._joined([c for c, (s, _) in zip(found, meeting, strict=True) if s != slot])
        self.arrivals.extend(Arrival(step, content, at) for at in dims)

    def _tensor_dim(self, source: Source, dim: int) -> ParameterDim | None:
        """Return the tensor's dim that a contracted dim of a value is, None if uncertain."""
        if source.dims is not None:
            return ParameterDim(source.path, source.dims[dim])
        dims = self.resized.dims(source.path)
        return ParameterDim(source.path, dims[0]) if len(dims) == 1 else None

    def _written(self, step: Step, meeting: list[tuple[int, int]]) -> Content:
        """Return what a contraction writes to the new units that it keeps."""
        contracted = {slot: dim for slot, dim in meeting}
        kept = [
            s for s in self._carrying(step) if s != step.bias and self._keeps(step, s, contracted)
        ]
        weights = [s for s in kept if self._source(step, s) is not None]
        if len(kept) == 1 and weights:
            return self._rows(step, weights[0], contracted.get(weights[0]))
        if not weights:
            self._meet(step, kept)
        contents = [self.content(step.inputs[s]) for s in kept]
        zero = np.any([c.zero() for c in contents], axis=0)
        like, scale = self._agreed_factors(step, kept, weights)
        if step.bias is not None:
            bias = self._source(step, step.bias)
            value = np.full(len(self.new), np.nan)
            if bias is not None and self._has(step.inputs[step.bias]):
                value = _one_number(self._entries(bias)[torch.from_numpy(self.new)])
            zero = zero & ~np.isnan(value)
            return Content(
                self.new,
                np.where(zero, CONSTANT, like),
                np.where(zero, value, scale),
                np.ones(len(self.new)),
            )
        return Content(
            self.new,
            np.where(zero, CONSTANT, like),
            np.where(zero, 0.0, scale),
            np.ones(len(self.new)),
        )

    def _keeps(self, step: Step, slot: int, contracted: Mapping[int, int]) -> bool:
        """Return whether an input has the axis in a dim that is not summed over."""
        layouts = self.resized.analysis.values[step.inputs[slot]]
        return any(
            self.axis in layout.axes() and (d != contracted.get(slot) or self.axis in step.batched)
            for d, layout in enumerate(layouts)
        )

    def _agreed_factors(
        self, step: Step, kept: list[int], weights: list[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        like, scale = self.new.copy(), np.ones(len(self.new))
        computed = [self.content(step.inputs[s]) for s in kept if s not in weights]
        sources = [self._source(step, s) for s in weights]
        if step.bias is not None and self._has(step.inputs[step.bias]):
            sources.append(self._source(step, step.bias))
        if not computed or any(s is None for s in sources):
            return like, scale
        carried = [self._entries(s) for s in sources if s is not None]
        for k, u in enumerate(self.new):
            i = computed[0].like[k]
            equal = all(c.like[k] == i and c.scale[k] == 1 for c in computed)
            if (
                equal
                and i not in (u, CONSTANT)
                and i > MEAN
                and all(torch.equal(e[u], e[i]) for e in carried)
            ):
                like[k] = i
        return like, scale

    def _rows(self, step: Step, slot: int, contracted: int | None) -> Content:
        """Return what a weight's rows write: their own, a multiple of a unit, or the bias alone."""
        source = self._source(step, slot)
        assert source is not None
        dims = [
            d
            for d in self.resized.dims(source.path)
            if contracted is None or source.dims is None or d != source.dims[contracted]
        ]
        if len(dims) != 1:
            return self.arbitrary()
        rows = self.slices(ParameterDim(source.path, dims[0]))
        bias, computed = self._bias(step), None
        if bias is None:
            computed = step.inputs[step.bias or 0]
            if not self._has(computed):
                return self.arbitrary()
            bias = torch.zeros(len(self.resized.units), 1, dtype=torch.double)
        like, scale = self.guess
        value = _one_number(bias[torch.from_numpy(self.new)])
        zero = (rows[torch.from_numpy(self.new)] == 0).all(1).numpy()
        if source.dims is not None and computed is None:
            self._note_parts(step.outputs[0], ParameterDim(source.path, dims[0]), rows, bias)
        else:
            if source.dims is None:  # a part of the tensor, zero where the others may not be
                zero = zero | self.content(step.inputs[slot]).zero()
            added = None if step.bias is None else self.content(step.inputs[step.bias])
            if added is not None:
                value = np.where(added.constant(), added.scale, value)
        zero = zero & ~np.isnan(value)
        both = torch.cat([rows, bias], 1)
        fits = np.array(
            [
                like[k] != u and close(both[u], scale[k] * both[like[k]], self._tolerance(scale[k]))
                for k, u in enumerate(self.new)
            ],
            dtype=bool,
        )
        code = self._averaged(both, ParameterDim(source.path, dims[0]))
        mean = code <= MEAN
        found = Content(
            self.new,
            np.where(mean, code, np.where(zero, CONSTANT, np.where(fits, like, self.new))),
            np.where(mean, 1.0, np.where(zero, value, np.where(fits, scale, 1.0))),
            np.ones(len(self.new)),
        )
        return found if computed is None else self._joined([found, self.content(computed)])

    def _note_parts(
        self, number: int, at: ParameterDim, rows: Tensor, bias: Tensor | None = None
    ) -> None:
        """Note where some parts of a packed dim have no weights for new units, and others have.

        `number` is the value that has the dim: the tensor itself, or what its rows write.
        """
        layout = self.resized.analysis.state[at.path][at.dim]
        places = self.resized.at(at.path, at.dim).shape[1]
        new = torch.from_numpy(self.new)
        if places == 1 or (bias is not None and bias.shape[1] not in (1, places)):
            return
        used = (rows[new].reshape(len(new), places, -1) != 0).any(2)
        used = used if bias is None else used | (bias[new] != 0)
        zero = ~used.any(0).numpy()
        if zero.any() and not zero.all():
            widths = self.resized.analysis.widths()
            self._parts[number] = Parts.of(layout, self.axis, widths, zero)

    def _tolerance(self, scale: float) -> float:
        return 0.0 if scale == 1 else self._eps()

    def _bias(self, step: Step) -> Tensor | None:
        """Return a contraction's bias by unit, zeros without one, None where it is not known."""
        if step.bias is None:
            return torch.zeros(len(self.resized.units), 1, dtype=torch.double)
        source = self._source(step, step.bias)
        if source is None or not self._has(step.inputs[step.bias]):
            return None
        return self._entries(source)

    # --- contractions

    def reduction(self, arrival: Arrival) -> Reduction:
        """Return the weights that the narrower layer needs where the axis is contracted."""
        assert arrival.weight is not None
        columns, content = self.slices(arrival.weight), arrival.content
        moved = not ((content.like == self.new) | content.constant()).all()
        total = columns.clone() if moved else columns  # large, so not copied without need
        constant = torch.zeros(columns.shape[1], dtype=columns.dtype)
        own = np.zeros(len(self.resized.units), dtype=bool)
        for k in reversed(range(len(self.new))):
            u, i = self.new[k], content.like[k]
            if i == CONSTANT:
                constant = constant + content.scale[k] * columns[u]
            elif i <= MEAN:
                weights = torch.from_numpy(self.mixtures.weights(i))[:, None]
                total[torch.from_numpy(self.old)] += weights.to(total) * total[u]
            elif i != u:
                total[i] = total[i] + content.scale[k] * total[u]
            else:
                own[u] = True
        return Reduction(picked(total, self.old), total[torch.from_numpy(own)], constant)


def place(step: Step, name: str) -> int:
    """Return the position of an operator's argument of that name."""
    return [a.name for a in step.func._schema.arguments].index(name)


def is_averaged(analysis: Analysis, axis: str) -> bool:
    """Return whether some operator takes a mean over the units of an axis, or their spread."""
    return any(
        axis in step.mixed
        or (
            step.func.overloadpacket is aten.mean
            and any(axis in axes for axes in step.contracted.values())
        )
        for step in analysis.touching(axis)
    )


_PRODUCTS = {aten.mul, aten.mul_}
_DIFFERENCES = {aten.sub, aten.sub_}
SUMS = {aten.add, aten.add_, *_DIFFERENCES}
_QUOTIENTS = {aten.div, aten.div_}
_LINEAR = {aten.neg, *SUMS}
# sums over positions, of which the mean over units is the mean over units of the sums
_AVERAGES = {aten.mean, aten.sum, aten._adaptive_avg_pool2d, aten.avg_pool2d}
_AVERAGES |= {aten.scatter_add, aten.scatter_add_, aten.index_add, aten.index_add_}


# norms whose statistics go over the last dim, and nothing else
_OVER_LAST = {aten.native_layer_norm}


def _uniform(entries: Tensor) -> bool:
    """Return whether all units have the same entries."""
    return bool((entries == entries[:1]).all())


def _scales(step: Step, carried: int, scale: float) -> bool:
    """Return whether an operator multiplies its output by what multiplies all its inputs."""
    linear = step.func.overloadpacket in _LINEAR
    whole = carried == len(step.inputs) and (not linear or len(step.args) == carried)
    kept = (step.row.odd and scale == -1) or (step.row.homogeneous and scale > 0)
    return whole and (linear or kept)


def _one_number(entries: Tensor) -> np.ndarray:
    """Return the number that all entries of each unit are, NaN where they differ."""
    same = (entries == entries[:, :1]).all(1)
    return torch.where(same, entries[:, 0].real.double(), torch.nan).numpy()


def _masks(step: Step) -> set[int]:
    """Return the numbers of the inputs that must be truth values."""
    names = [given.name for given in step.func._schema.arguments]
    return {
        given.number
        for name, given in zip(names, step.args, strict=False)
        if name in ("mask", "condition") and isinstance(given, Slot)
    }


def _uses_batch(step: Step) -> bool:
    flags = [a for a in step.args if isinstance(a, bool)]
    name = str(step.func)
    return flags[0] if flags else "no_stats" in name or "with_update" in name


def _draws(step: Step) -> bool:
    """Return whether a step drops entries at random beside what it computes (attention)."""
    names = [a.name for a in step.func._schema.arguments]
    at = names.index("dropout_p") if "dropout_p" in names else len(step.args)
    given = step.args[at] if at < len(step.args) else step.kwargs.get("dropout_p", 0.0)
    return isinstance(given, float) and given > 0


def _fill_value(step: Step) -> float | None:
    name = step.func.overloadpacket.__name__
    if "zero" in name:
        return 0.0
    if "ones" in name:
        return 1.0
    if "full" in name:
        value = step.args[2] if name == "new_full" else step.args[1]
        return float(value) if isinstance(value, int | float) else None
    return None
