"""Schemes for the weights of new units: which side is zero, copied, split, paired or given.

A scheme fills the entries of new units in every tensor that carries the axis; whether the function
is kept is not taken from the scheme but proved on the numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from graphgrow.errors import NotApplicable
from graphgrow.ir.analyse import ParameterDim, Slot
from graphgrow.ir.outcome import Kind
from graphgrow.passes.follow import SUMS, Follower
from graphgrow.passes.mixtures import scales, weights_before
from graphgrow.passes.standard import standards
from graphgrow.passes.units import Resized, precise, resized_state


class Scheme(Protocol):
    """What fills the weights of new units."""

    def fill(self, resized: Resized, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the changed tensors, the entries of new units filled."""
        ...


@dataclass(frozen=True)
class ZeroOutgoing:
    """New units are like typical old ones and nothing reads them yet.

    Incoming weights are drawn from N(0, s²), s the root mean square of the layer's own weights,
    and negated where their sum is negative, so that a ReLU behind them is seldom off for good;
    biases and norms get the mean over the old units. Any activation, both modes.

    Where new units are multiplied with new ones that the same parameter writes (packed queries and
    keys), `factor` says which rows are zero so that the product is: the parameter's path, and the
    axis that counts its parts ("" where they are terms of a sum) with the number of the one.

    Source: Gesmundo & Maile (2023), Composable function-preserving expansions.
    """

    seed: int = 0
    factor: tuple[str, str, int] | None = None

    def fill(self, resized: Resized, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the changed tensors, outgoing weights zero."""
        fill = _Fill(resized, state, self.seed)
        fill.carriers()
        fill.producers()
        fill.consumers_zero()
        if self.factor is not None:
            fill.part_zero(*self.factor)
        return fill.tensors


@dataclass(frozen=True)
class ZeroIncoming:
    """New units hold a constant until their incoming weights move.

    Incoming weights are zero, outgoing ones drawn. Where activations keep zero and are alive there,
    the constant is zero. Else it is what comes of biases at `constant`, and the outgoing weights of
    each two units cancel, so that no bias has to change and zero padding does no harm; an odd unit
    has outgoing weights of zero, which its constant moves. Where units are products of what several
    layers write (queries and keys, gates), `paths` names the weights that are zero, and the others
    are drawn: with all of them zero no unit could ever learn.

    Source: Evci et al. (2022), GradMax, section 3; the constants, which keep torch's ReLU alive,
    are ours. `Given` may hold any others: what they add is folded out of the readers' biases.
    """

    constant: float | None = None
    seed: int = 0
    paths: tuple[str, ...] | None = None

    def fill(self, resized: Resized, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the changed tensors, incoming weights zero."""
        fill = _Fill(resized, state, self.seed)
        fill.carriers()
        if self.paths is None:
            fill.zero(added(resized))
        fill.consumers()
        if self.constant is not None:
            fill.cancel()
        fill.producers()
        fill.producers_zero(self.paths)
        fill.constants(self.constant or 0.0, self.paths)
        return fill.tensors


@dataclass(frozen=True)
class Pairs:
    """New units come in equal pairs whose outgoing weights cancel. An even number.

    Source: Yuan, Savarese & Maire (2023), Accelerated training via incrementally growing networks.
    """

    seed: int = 0

    def fill(self, resized: Resized, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the changed tensors, the second half of the new units twins of the first."""
        if len(resized.new) % 2:
            raise NotApplicable(
                f"cannot widen axis '{resized.axis}' by {len(resized.new)} in pairs: "
                "the number is odd; give an even one"
            )
        fill = _Fill(resized, state, self.seed)
        fill.carriers()
        fill.producers()
        half = len(resized.new) // 2
        fill.consumers()
        fill.twins(resized.new[:half], resized.new[half:])
        return fill.tensors


@dataclass(frozen=True)
class Copy:
    """New units copy old ones, whose outgoing weights are split entry by entry.

    `sources` are the old units to copy, in turn; left out, they are drawn without repetition as
    far as there are enough. Each split leaves between 5 and 50 percent of a weight to the copy, so
    that the two parts add up to the old weight bit for bit. With `even` it leaves half: that is for
    methods that move the two apart afterwards, or they learn the same for ever.

    Source: Chen, Goodfellow & Shlens (2016), Net2Net. The split by entry, where the paper halves,
    is ours.
    """

    sources: tuple[int, ...] | None = None
    seed: int = 0
    even: bool = False

    def fill(self, resized: Resized, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the changed tensors, outgoing weights split."""
        fill = _Fill(resized, state, self.seed)
        fill.copies(self._chosen(resized), self.even)
        return fill.tensors

    def _chosen(self, resized: Resized) -> np.ndarray:
        width = len(resized.old)
        if self.sources is None:
            order = np.random.default_rng(self.seed).permutation(width)
            return np.resize(order, len(resized.new))
        if not self.sources or not all(0 <= s < width for s in self.sources):
            raise NotApplicable(
                f"cannot widen axis '{resized.axis}' ({width} units) by copies of "
                f"{self.sources}: sources are units from 0 to {width - 1}"
            )
        return np.resize(np.array(self.sources), len(resized.new))


@dataclass(frozen=True)
class MeanFill:
    """New units are the mean of the old ones, as norms over units ask for.

    All that writes them gets the mean over the old units, biases, embeddings and position tables
    too. Norms leave nothing of new units, and their biases add nothing, so that outgoing weights
    behind them are drawn; those that read a mean as it is are zero.
    The spread falls as the width grows: the proof has what follows it, norm weights and eps. Copies
    of one mean learn differently, because what reads them differs.

    Source: Wang, Su, Fan et al. (2023), LEMON, "average" expansion; eps rescaled too.
    """

    seed: int = 0

    def fill(self, resized: Resized, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the changed tensors, incoming weights the mean."""
        fill = _Fill(resized, state, self.seed)
        fill.consumers()
        fill.means()
        fill.quiet()
        return fill.tensors


@dataclass(frozen=True)
class Given:
    """Weights that a score found: entries of new units by parameter path, as nested tuples.

    `incoming` may name producers and carriers, `outgoing` consumers; each holds, for every new
    unit, that parameter's entries in row-major order without the axis' own dim, `(units, entries)`.
    What is not named is as in `ZeroOutgoing`. Build one from tensors with `Given.of`.
    """

    incoming: tuple[tuple[str, Any], ...] = ()
    outgoing: tuple[tuple[str, Any], ...] = ()
    seed: int = 0

    @staticmethod
    def of(
        incoming: Mapping[str, Tensor] | None = None,
        outgoing: Mapping[str, Tensor] | None = None,
        seed: int = 0,
    ) -> Given:
        """Return the scheme that holds these tensors' numbers."""

        def listed(weights: Mapping[str, Tensor] | None) -> tuple[tuple[str, Any], ...]:
            found = sorted((weights or {}).items())
            return tuple((path, tuple(map(tuple, w.flatten(1).tolist()))) for path, w in found)

        return Given(listed(incoming), listed(outgoing), seed)

    def fill(self, resized: Resized, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the changed tensors, named entries as given."""
        fill = _Fill(resized, state, self.seed)
        fill.carriers()
        fill.producers()
        fill.consumers_zero()
        axis = resized.analysis.axes[resized.axis]
        fill.given(dict(self.incoming), axis.producers + axis.carriers)
        fill.given(dict(self.outgoing), axis.consumers)
        return fill.tensors


class _Fill:
    """The changed tensors of one edit while their new entries are filled."""

    def __init__(self, resized: Resized, state: Mapping[str, Tensor], seed: int) -> None:
        self.resized, self.state, self.seed = resized, state, seed
        self.axis = resized.analysis.axes[resized.axis]
        self.tensors, self.origins = resized_state(state, resized)

    def _write(self, at: ParameterDim, units: np.ndarray, values: Tensor) -> None:
        """Write the entries `(units, entries)` of some units of one parameter dim."""
        tensor = self.tensors[at.path]
        places = torch.from_numpy(self.resized.at(at.path, at.dim)[units].reshape(-1))
        moved = tensor.movedim(at.dim, 0)
        shape = (len(places), *moved.shape[1:])
        moved[places.to(tensor.device)] = values.to(tensor).reshape(shape)

    def _read(self, at: ParameterDim, units: np.ndarray) -> Tensor:
        """Return the entries of some units of one parameter dim, `(units, entries)`."""
        return self.resized.slices(self.tensors[at.path], at.path, at.dim, units).clone()

    def _drawn(self, at: ParameterDim, like: Tensor) -> Tensor:
        """Return standard normal numbers that depend on the seed and the parameter alone."""
        seed = zlib.crc32(f"{at.path}:{at.dim}:{self.seed}".encode())
        generator = torch.Generator().manual_seed(seed)
        dtype = torch.promote_types(like.dtype, torch.double)
        return torch.randn(like.shape, generator=generator, dtype=dtype)

    def _draw(self, at: ParameterDim) -> None:
        old, new = self._read(at, self.resized.old), self._read(at, self.resized.new)
        size = float(precise(old).abs().square().mean().sqrt()) if old.numel() else 0.0
        self._write(at, self.resized.new, self._drawn(at, new) * (size or new.shape[1] ** -0.5))

    def producers(self) -> None:
        """Draw incoming weights of the size of the old ones, each unit's with a sum above zero.

        What comes out of most activations is positive more often than not, so that a ReLU behind a
        negative sum might be off for every input, and its unit never learn.
        """
        for at in self.axis.producers:
            self._draw(at)
            new = self._read(at, self.resized.new)
            signs = torch.where(new.sum(1, keepdim=True).real < 0, -1.0, 1.0).to(new)
            self._write(at, self.resized.new, new * signs)

    def consumers(self) -> None:
        """Draw outgoing weights of the size of the old ones."""
        for at in self.axis.consumers:
            self._draw(at)

    def cancel(self) -> None:
        """Make the outgoing weights of every second new unit the negatives of the one before."""
        new = self.resized.new
        first, second, odd = new[: len(new) // 2 * 2 : 2], new[1::2], new[len(new) // 2 * 2 :]
        for at in self.axis.consumers:
            self._write(at, second, -self._read(at, first))
            self._write(at, odd, torch.zeros_like(self._read(at, odd)))

    def producers_zero(self, paths: tuple[str, ...] | None) -> None:
        """Make incoming weights zero: those named, or all."""
        self.zero(at for at in self.axis.producers if paths is None or at.path in paths)

    def consumers_zero(self) -> None:
        """Make all outgoing weights zero, or what standardising makes zero."""
        self.zero(self.axis.consumers)
        for _, standard in standards(self.resized):
            if standard is not None:
                means = standard.means(self.resized, self.tensors[standard.at.path])
                self._write(standard.at, self.resized.new, means)

    def zero(self, dims: Iterable[ParameterDim]) -> None:
        """Make the new units' entries of some parameter dims zero."""
        for at in dims:
            new = self._read(at, self.resized.new)
            self._write(at, self.resized.new, torch.zeros_like(new))

    def carriers(self) -> None:
        """Give per-unit tensors the old units' mean, parameters of several entries their spread.

        Buffers get no spread: a drawn variance could be negative. Filters that are all zero have
        none to give: new ones are drawn, or two zeros in a row would keep new units dead.
        """
        for at in self.axis.carriers:
            old, new = self._read(at, self.resized.old), self._read(at, self.resized.new)
            if not old.is_floating_point():
                self._write(at, self.resized.new, old[:1].expand_as(new))
                continue
            mean = old.double().mean(0, keepdim=True)
            values = mean.expand_as(new)
            learned = isinstance(self.state[at.path], nn.Parameter)
            if learned and new.shape[1] > 1 and not old.any():
                values = new.shape[1] ** -0.5 * self._drawn(at, new)
            elif learned and new.shape[1] > 1 and len(old) > 1:
                values = values + old.double().std(0, keepdim=True) * self._drawn(at, new)
            self._write(at, self.resized.new, values)

    def means(self) -> None:
        """Make all that writes or carries new units the mean over the old ones.

        What a scale multiplies that differs between units is the mean with that scale's weights.
        """
        weights, scaling = dict[ParameterDim, Tensor](), set[ParameterDim]()
        for scale, written in scales(self.resized).items():
            old = self._read(scale, self.resized.old)
            if old.shape[1] == 1 and (old != old[:1]).any():
                weights.update(dict.fromkeys(written, self._scale(scale)))
                scaling.add(scale)
        for at in self.axis.producers + self.axis.carriers:
            old, new = self._read(at, self.resized.old), self._read(at, self.resized.new)
            if old.is_floating_point() and at not in scaling:
                same = (old == old[:1]).all(0, keepdim=True)  # the mean of equals, unrounded
                mean = torch.where(same, old[:1].double(), old.double().mean(0, keepdim=True))
                mean = weights[at].to(old.device) @ old.double() if at in weights else mean
                self._write(at, self.resized.new, mean.expand_as(new))

    def _scale(self, at: ParameterDim) -> Tensor:
        """Give new units the root mean square of a scale; return the weights that this asks for."""
        old, new = self._read(at, self.resized.old), self._read(at, self.resized.new)
        self._write(at, self.resized.new, old.double().square().mean().sqrt().expand_as(new))
        return torch.from_numpy(weights_before(old, self._read(at, self.resized.new)))

    def quiet(self) -> None:
        """Let what is added to new units behind norms be zero, and what reads them before any."""
        follower = Follower(self.resized, {**self.state, **self.tensors}).run()
        read = [a.weight for a in follower.arrivals if not a.content.constant().all()]
        self.zero([*follower.silent(), *(at for at in read if at is not None)])

    def part_zero(self, path: str, counted_by: str, part: int) -> None:
        """Make one of the parts of a parameter's new rows zero, and of their bias."""
        rows = {at for at in self.axis.producers if at.path == path}
        for at in rows | self._biases({Kind.CONTRACT}, (path,)):
            layout = self.resized.analysis.state[at.path][at.dim]
            parts = layout.parts(self.resized.widths(), counted_by)
            new = self._read(at, self.resized.new)
            here = parts[self.resized.at(at.path, at.dim)[self.resized.new]] == part
            cut = new.reshape(*here.shape, -1).masked_fill(torch.from_numpy(here)[..., None], 0)
            self._write(at, self.resized.new, cut.reshape(new.shape))

    def twins(self, first: np.ndarray, second: np.ndarray) -> None:
        """Make the second units equal to the first, their outgoing weights the negatives."""
        for at in self.axis.producers + self.axis.carriers:
            self._write(at, second, self._read(at, first))
        for at in self.axis.consumers:
            self._write(at, second, -self._read(at, first))

    def copies(self, sources: np.ndarray, even: bool) -> None:
        """Copy old units into the new ones and split their outgoing weights."""
        old, new = self.resized.old, self.resized.new
        for at in self.axis.consumers:
            kept_columns, made = self._read(at, old), self._read(at, new)
            for k, source in enumerate(sources):
                whole = kept_columns[source : source + 1].clone()
                seed = ParameterDim(f"{at.path}#{k}", at.dim)
                drawn = self._drawn(seed, whole.real).abs().clamp(max=2)
                share = torch.full_like(drawn, 0.5) if even else drawn * 0.2 + 0.5
                kept = (precise(whole) * share).to(whole)
                kept_columns[source], made[k] = kept[0], (whole - kept)[0]
            self._write(at, old, kept_columns)
            self._write(at, new, made)
        for at in self.axis.producers + self.axis.carriers:
            self._write(at, new, self._read(at, old[sources]))

    def given(self, entries: Mapping[str, Any], dims: tuple[ParameterDim, ...]) -> None:
        """Write entries by parameter path."""
        known = {at.path: at for at in dims}
        for path, values in entries.items():
            if path not in known:
                raise NotApplicable(
                    f"cannot widen axis '{self.axis.name}' with weights for '{path}': "
                    f"it is none of {sorted(known)}"
                )
            new = self._read(known[path], self.resized.new)
            found = torch.tensor(values, dtype=torch.double)
            if found.shape != new.shape:
                raise NotApplicable(
                    f"cannot widen axis '{self.axis.name}' with weights of shape "
                    f"{tuple(found.shape)} for '{path}': it takes {tuple(new.shape)}"
                )
            self._write(known[path], self.resized.new, found)

    def constants(self, value: float, paths: tuple[str, ...] | None) -> None:
        """Let new units with zero incoming weights hold `value` where their activations begin.

        Layers write it through their bias, and a batch norm through its own, which takes what
        arrives for the running mean so that both modes agree.
        """
        norms = self._parts({Kind.NORM})
        for at in self._biases({Kind.CONTRACT}, paths):
            new = self._read(at, self.resized.new)
            self._write(at, self.resized.new, torch.full_like(new, 0.0 if norms else value))
        for at in self._biases({Kind.NORM}):
            new = self._read(at, self.resized.new)
            self._write(at, self.resized.new, torch.full_like(new, value))
        for _ in norms:  # what one is centred at may move what arrives at the next
            if not self._center_norms():
                break

    def _parts(self, kinds: set[Kind]) -> list[tuple[Any, list[ParameterDim | None]]]:
        """Return this axis' steps of some kinds with the parameter of each tensor argument."""
        analysis, found = self.resized.analysis, []
        for step in analysis.steps:
            if step.row.kind not in kinds:
                continue
            parts: list[ParameterDim | None] = []
            for arg in step.args:
                source = (
                    analysis.sources.get(step.inputs[arg.number]) if isinstance(arg, Slot) else None
                )
                dims = self.resized.dims(source.path) if source is not None else []
                parts.append(ParameterDim(source.path, dims[0]) if source and dims else None)
            if any(parts):
                found.append((step, parts))
        return found

    def _biases(self, kinds: set[Kind], paths: tuple[str, ...] | None = None) -> set[ParameterDim]:
        found = set()
        for step, parts in self._parts(kinds):
            computed = (self.resized.analysis.computed.get(n, ()) for n in step.inputs)
            met = {part.path for part in parts if part}.union(*computed)
            if paths is not None and met.isdisjoint(paths):
                continue
            at = 2 if step.row.kind is Kind.NORM else _bias_position(step)
            if at is not None and at < len(parts) and parts[at] is not None:
                found.add(parts[at])
        return found

    def _center_norms(self) -> bool:
        """Let norms take what arrives for their running means; return whether any was another."""
        moved = False
        state = {**self.state, **self.tensors}
        follower = Follower(self.resized, state).run()
        for step, parts in self._parts({Kind.NORM}):
            mean = parts[3] if len(parts) > 3 else None
            if mean is not None:
                arriving = follower.content(step.inputs[0])
                held = np.where(arriving.constant(), arriving.scale, 0.0)
                entries = self._read(mean, self.resized.new)
                centre = torch.from_numpy(held)[:, None].expand_as(entries).to(entries)
                moved |= not torch.equal(entries, centre)
                self._write(mean, self.resized.new, centre)
        return moved


def added(resized: Resized) -> list[ParameterDim]:
    """Return the carriers that are added to what layers write, or concatenated with it."""
    analysis, found = resized.analysis, dict[ParameterDim, None]()
    carriers = set(analysis.axes[resized.axis].carriers)
    for step in analysis.steps:
        moved = step.row.kind is Kind.MOVE and len(step.inputs) > 1
        if not moved and step.func.overloadpacket not in SUMS:
            continue
        for number in step.inputs:
            source = analysis.sources.get(number)
            if source is not None:
                dims = [ParameterDim(source.path, d) for d in resized.dims(source.path)]
                found.update(dict.fromkeys(at for at in dims if at in carriers))
    return list(found)


def _bias_position(step: Any) -> int | None:
    return next(
        (i for i, a in enumerate(step.args) if isinstance(a, Slot) and a.number == step.bias), None
    )
