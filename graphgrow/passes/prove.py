"""The proof that a wider layer computes what the narrower one did, read off the followed units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from graphgrow.ir.analyse import ParameterDim, Step
from graphgrow.ir.outcome import Kind, aten
from graphgrow.passes.content import Arrival, Reduction
from graphgrow.passes.factors import Compensation, compensated, repeats
from graphgrow.passes.follow import Follower
from graphgrow.passes.ranges import Box
from graphgrow.passes.units import Resized


@dataclass(frozen=True)
class Proof:
    """Why a rewrite keeps the function: the rewrite, its modes and domain, and the steps.

    `modes` are those in which it is exact. `rounding` bounds what rounding the new numbers to the
    model's precision may change, relative to the output: zero where entries only move. `error` is
    the largest relative change measured where the rewrite is not exact. `box` is what the entries
    of the inputs must be between for the domain to hold, None where they may be any numbers.
    """

    rewrite: str
    exact: bool = True
    modes: tuple[str, ...] = ("train", "eval")
    domain: str = "all inputs"
    lines: tuple[str, ...] = ()
    rounding: float = 0.0
    error: float | None = None
    box: Box | None = None

    def __str__(self) -> str:
        exact = f"exact in {' and '.join(self.modes)}" if self.modes else "not exact"
        head = f"{self.rewrite}: {exact}, {self.domain}"
        if self.rounding:
            head += f", rounding at most {self.rounding:.1e}"
        if self.error is not None:
            head += f", measured change {self.error:.1e}"
        return "\n".join([head, *(f"  {line}" for line in self.lines)])


@dataclass(frozen=True, eq=False)
class Verdict:
    """What following the new units showed: a reason against, or what must be folded and the lines.

    `folds` has, for each bias, the constant that the new units add and that it must give up.
    `dead` are new units that could never learn. `compensation` takes back the factors that old
    units get where a mean or a norm goes over all of them. `rounded` are weights that add up to the
    old ones in the model's own precision, but not beyond.
    """

    reason: str | None = None
    folds: Mapping[str, Tensor] = field(default_factory=dict)
    lines: tuple[str, ...] = ()
    dead: tuple[int, ...] = ()
    compensation: Compensation = field(default_factory=Compensation)
    rounded: frozenset[str] = frozenset()


def judge(follower: Follower, narrow: Mapping[str, Tensor]) -> Verdict:
    """Return whether the followed axis computes what the tensors of the narrower one do."""
    alive, stuck = np.zeros(len(follower.new), dtype=bool), follower.stuck.copy()
    folds: dict[str, Tensor] = {}
    lines: dict[tuple[str, str], list[str]] = {}
    rounded: frozenset[str] = frozenset()
    made_up = compensated(follower)
    blocked = next(iter(follower.blocked), None)
    reason = blocked or made_up.reason or _moved(follower, narrow)
    if reason is not None:
        return Verdict(reason)
    for arrival in follower.statistics:
        text = _unchanged(arrival)
        lines.setdefault((arrival.step.where, text), []).append(arrival.step.mode)
    for step in follower.windowed:
        text = "new units are zero wherever old ones have them in their windows"
        lines.setdefault((step.where, text), []).append(step.mode)
    for arrival in follower.arrivals:
        found = _judged(follower, arrival, narrow)
        if found.reason is not None:
            return found
        for path, constant in found.folds.items():
            if path in folds and not torch.equal(folds[path], constant):
                return Verdict(_disagreeing(arrival.step, path))
            folds[path] = constant
        rounded |= found.rounded
        alive |= _alive(follower, arrival)
        stuck |= _stuck(arrival)
        where = arrival.step.where
        if found.lines:
            lines.setdefault((where, " ".join(found.lines)), []).append(arrival.step.mode)
    folds = {path: constant for path, constant in folds.items() if bool((constant != 0).any())}
    missing = _unfolded(follower, folds)
    if missing is not None:
        return Verdict(missing)
    said = tuple(f"[{' and '.join(dict.fromkeys(m))}] {w}: {t}" for (w, t), m in lines.items())
    dead = tuple(int(u) for u in follower.new[~alive | stuck])
    return Verdict(None, folds, (*said, *made_up.lines), dead, made_up, rounded)


def _moved(follower: Follower, narrow: Mapping[str, Tensor]) -> str | None:
    """Return that old units are written by other weights than before: by those that read them."""
    axis = follower.resized.analysis.axes[follower.axis]
    old = torch.from_numpy(follower.old)
    for at in (at for at in axis.producers + axis.carriers if at in axis.consumers):
        now = follower.slices(at)[old][:, old_entries(follower.resized, at)]
        if not torch.equal(now, narrow_slices(follower.resized, narrow[at.path], at).to(now)):
            return f"'{at}' would have to change where it is read but not where it writes"
    return None


def _disagreeing(step: Step, path: str) -> str:
    return (
        f"the constant that new units add at {step.where} is not the same in both modes and each "
        f"time '{path}' is used"
    )


def _unchanged(arrival: Arrival) -> str:
    """Return why a mean or norm over units is as before but for a factor."""
    content = arrival.content
    if arrival.step.standardised:
        return "what it has for new units is the mean of each row, and standardised it is zero"
    if content.zero().all():
        return "new units are zero and add nothing"
    if content.mean().all():
        return f"{len(content.units)} new units are the mean of the others"
    return f"{len(content.units)} new units are copies, of each as many as of any other"


def _unfolded(follower: Follower, folds: Mapping[str, Tensor]) -> str | None:
    """Return what speaks against folding: a bias that is also used where no constant arrives."""
    analysis = follower.resized.analysis
    arrived = {id(a.step) for a in follower.arrivals}
    for step in analysis.steps if folds else ():
        for number in step.inputs:
            source = analysis.sources.get(number)
            if source is None or step.row.kind is Kind.MOVE or id(step) in arrived:
                continue
            if source.path in folds and bool((folds[source.path] != 0).any()):
                return f"the bias '{source.path}' is also used by {step.where}"
    return None


def _judged(follower: Follower, arrival: Arrival, narrow: Mapping[str, Tensor]) -> Verdict:
    step = arrival.step
    if arrival.weight is None and arrival.other is None:
        return Verdict()
    if arrival.weight is None:
        factor = repeats(follower, arrival)
        if factor == 1:
            return Verdict(lines=("new units are zero and add nothing",))
        if factor is not None:
            copies = f"{_unchanged(arrival)}, in both factors"
            return Verdict(lines=(f"{copies}: the sum is multiplied by {factor:.6g}",))
        return Verdict(f"{step.where} sums over its units with no weight that could be zero")
    reduction = follower.reduction(arrival)
    places = old_entries(follower.resized, arrival.weight)
    before = narrow_slices(follower.resized, narrow[arrival.weight.path], arrival.weight)
    columns = reduction.columns if places.all() else reduction.columns[:, places]
    if not torch.equal(columns.to(before), before):
        return Verdict(
            f"the weights that {step.where} has for old units and their copies do not add up "
            f"to its old weights in {step.mode} mode ('{arrival.weight}')"
        )
    # a bilinear layer may read the units twice: then what new ones meet of new ones counts as well
    twice = sum(follower.axis in axes for axes in step.contracted.values()) > 2
    if bool((reduction.own if twice else reduction.own[:, places]).any()):
        return Verdict(
            f"{step.where} reads new units through weights that are not zero in {step.mode} mode"
        )
    lines = [_line(arrival, reduction)]
    same = columns.dtype == before.dtype or torch.equal(columns, before.to(columns))
    rounded = frozenset() if same else frozenset({arrival.weight.path})
    constant = reduction.constant[places]
    if bool((constant != 0).any()):
        return replace(_folded(follower, arrival, reduction, lines), rounded=rounded)
    bias = _bias(follower, step)
    if bias is None or not arrival.content.constant().any():
        return Verdict(lines=tuple(lines), rounded=rounded)
    nothing = per_output(follower.resized, arrival.weight, bias, reduction.constant)
    return Verdict(folds={bias: nothing}, lines=tuple(lines), rounded=rounded)


def _line(arrival: Arrival, reduction: Reduction) -> str:
    content, at = arrival.content, arrival.weight
    copies = int(((content.like >= 0) & ~_itself(arrival)).sum())
    parts = []
    if copies:
        parts.append(f"{copies} multiples of other units, their columns of '{at}' add up")
    if content.mixed().any():
        parts.append(f"{int(content.mixed().sum())} means, whose columns of '{at}' are spread")
    if content.constant().any():
        parts.append(f"{int(content.constant().sum())} constant units")
    if len(reduction.own):
        parts.append(f"{len(reduction.own)} new units meet zero columns of '{at}'")
    return ", ".join(parts)


def _itself(arrival: Arrival) -> np.ndarray:
    content = arrival.content
    return content.like == content.units


def _folded(
    follower: Follower, arrival: Arrival, reduction: Reduction, lines: list[str]
) -> Verdict:
    step, at = arrival.step, arrival.weight
    assert at is not None
    bias = _bias(follower, step)
    if step.border:
        return Verdict(f"{step.where} pads with zeros, so a constant unit is none at the border")
    if bias is None:
        return Verdict(f"{step.where} has no bias to fold the constant of new units into")
    constant = per_output(follower.resized, at, bias, reduction.constant)
    return Verdict(
        folds={bias: constant},
        lines=(*lines, f"their constant is folded out of '{bias}'"),
    )


def _bias(follower: Follower, step: Step) -> str | None:
    """Return the bias that a contraction adds, None where it adds none or a computed one."""
    sources = follower.resized.analysis.sources
    source = None if step.bias is None else sources.get(step.inputs[step.bias])
    return None if source is None else source.path


def per_output(resized: Resized, at: ParameterDim, bias: str, entries: Tensor) -> Tensor:
    """Return a constant by entry of a bias: a weight summed over all dims but that one."""
    analysis = resized.analysis
    widths = resized.widths()
    layouts = analysis.state[at.path]
    others = [d for d in range(len(layouts)) if d != at.dim]
    shape = [-1, *(layouts[d].size(widths) for d in others)]
    out = next(k for k, d in enumerate(others) if layouts[d] == analysis.state[bias][0])
    summed = entries.reshape(shape)
    return summed.sum([d for d in range(summed.dim()) if d != out + 1])


def rounding(paths: Iterable[str], state: Mapping[str, Tensor]) -> float:
    """Return the bound for tensors whose values were added to: a hundred units of rounding."""
    return max((100 * torch.finfo(state[path].dtype).eps for path in paths), default=0.0)


def old_entries(resized: Resized, at: ParameterDim) -> Tensor:
    """Return which entries of a unit's slice belong to old units in the tensor's other dims."""
    widths, layouts = resized.widths(), resized.analysis.state[at.path]
    places = resized.at(at.path, at.dim).shape[1]
    mask = torch.ones(places, dtype=torch.bool)
    for d, layout in enumerate(layouts):
        if d == at.dim:
            continue
        units = layout.units(widths, resized.axis)
        old = torch.from_numpy((units < 0) | np.isin(units, resized.old))
        mask = (mask[:, None] & old[None, :]).reshape(-1)
    return mask


def narrow_slices(resized: Resized, tensor: Tensor, at: ParameterDim) -> Tensor:
    """Return a narrow tensor's entries by old unit: `(old width, entries)`."""
    same = replace(resized, units=np.arange(len(resized.old)))
    return same.slices(tensor, at.path, at.dim)


def _alive(follower: Follower, arrival: Arrival) -> np.ndarray:
    """Return which new units get a gradient at one arrival, now or once their readers moved."""
    content, other = arrival.content, arrival.other
    if arrival.weight is None:
        moves = content.slope != 0
        if other is None and arrival.step.func.overloadpacket not in (aten.sum, aten.mean):
            return ~content.zero()  # a norm is flat where a unit is zero
        if other is None:
            return ~content.zero() | moves
        # a product of two: the one that is zero moves if the other is not
        return (moves & ~other.zero()) | ((other.slope != 0) & ~content.zero())
    columns = follower.slices(arrival.weight)[torch.from_numpy(follower.new)]
    read = (columns != 0).any(1).numpy()
    return ~content.zero() | (read & (content.slope != 0))


def _stuck(arrival: Arrival) -> np.ndarray:
    """Return which new units are zero in both factors of a product, so that neither ever moves."""
    if arrival.other is None or arrival.weight is not None:
        return np.zeros(len(arrival.content.units), dtype=bool)
    return arrival.content.zero() & arrival.other.zero()
