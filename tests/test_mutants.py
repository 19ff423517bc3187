"""Deliberate mistakes in the library, each found by the properties that hold without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import test_properties as properties
import torch
from hypothesis import Phase, given, settings
from strategies import Concat, Drawn, Network, fill, widenings
from torch import Tensor, nn

import graphgrow as gg
from graphgrow.ir.layout import Layout
from graphgrow.optim import migrate
from graphgrow.passes import layers, resize, units, weights, widen
from graphgrow.passes.prove import Verdict
from graphgrow.passes.units import Resized

Check = Callable[[], None]
Patch = pytest.MonkeyPatch


def found(check: Check) -> None:
    """Assert that a check fails, by its own assertion or by what `apply` verifies."""
    with pytest.raises((AssertionError, gg.NotEquivalent)):
        check()


# ------------------------------------------------------------------------------ what is checked


def images(*blocks: nn.Module) -> Drawn:
    return Drawn(fill(Network([*blocks]).double(), 0), (2, 5, 5))


def norms() -> Drawn:
    """Return two convolutions with a batch norm and ReLU between."""
    return images(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))


def concat() -> Drawn:
    """Return two branches of their own widths, side by side."""
    return images(Concat(nn.Conv2d(2, 3, 1), nn.Conv2d(2, 4, 1)), nn.Tanh(), nn.Conv2d(7, 2, 1))


def function(net: Drawn, *rewrites: Any, verify: bool = True) -> Check:
    """Return the check that rewrites keep the function."""

    def check() -> None:
        grown = gg.apply(net.trace(), *rewrites, verify=verify)
        properties.check_function(net, net.model, grown.graph)

    return check


@dataclass(frozen=True)
class Mutant:
    """A mistake, and the check that is to find it."""

    check: Check
    patch: Callable[[Patch], None]


# ------------------------------------------------------------------------------ mistakes


def forget_buffers(patch: Patch) -> None:
    """Take what a fresh layer has for running statistics, in place of the old ones moved."""
    moved = units.gather

    def made(state: Any, resized: Resized) -> Any:
        origins = {path: resized.origin(path) for path in resized.paths()}
        tensors = {path: moved(state[path], o) for path, o in origins.items()}
        fresh = {p: torch.ones_like(t) for p, t in tensors.items() if p.endswith("running_var")}
        return {**tensors, **fresh}, origins

    patch.setattr(weights, "resized_state", made)


def draw_outgoing(patch: Patch) -> None:
    """Leave the columns of new units as they were drawn."""
    patch.setattr(weights._Fill, "consumers_zero", weights._Fill.consumers)


def believe(patch: Patch) -> None:
    """Prove nothing: every scheme counts as exact."""
    patch.setattr(widen, "judge", lambda follower, narrow: Verdict())


def unproved(mistake: Callable[[Patch], None]) -> Callable[[Patch], None]:
    """Return a mistake that the proof does not look for."""

    def both(patch: Patch) -> None:
        mistake(patch)
        believe(patch)

    return both


def shift_terms(patch: Patch) -> None:
    """Start each term of a concatenated dim one entry late."""
    origin = Layout.origin

    def shifted(self: Layout, widths: Any, moved: Any) -> np.ndarray:
        found = origin(self, widths, moved)
        late = (found + 1) % self.size(widths)
        return np.where(found < 0, found, late) if len(self.terms) > 1 else found

    patch.setattr(Layout, "origin", shifted)


def swap_terms(patch: Patch) -> None:
    """Take a concatenated dim for its terms in the opposite order when new units are placed."""
    find = Layout.units

    def swapped(self: Layout, widths: Any, axis: str) -> np.ndarray:
        return find(Layout(tuple(reversed(self.terms))), widths, axis)

    patch.setattr(Layout, "units", swapped)


def forget_moments(patch: Patch) -> None:
    gathered = migrate._gathered

    def forgotten(old: Tensor, origin: Any, fill: float) -> Tensor:
        return torch.zeros_like(gathered(old, origin, fill))

    patch.setattr(migrate, "_gathered", forgotten)


def reverse_moments(patch: Patch) -> None:
    gathered = migrate._gathered

    def reversed_(old: Tensor, origin: Any, fill: float) -> Tensor:
        return gathered(old.flip(0), origin, fill)

    patch.setattr(migrate, "_gathered", reversed_)


def forget_constant(patch: Patch) -> None:
    patch.setattr(widen, "_minus", lambda bias, constant: bias)


def fold_twice(patch: Patch) -> None:
    minus = widen._minus
    patch.setattr(widen, "_minus", lambda bias, constant: minus(bias, 2 * constant))


def invert_roughly(patch: Patch) -> None:
    """Let one entry of the inverse be off by a millionth."""
    factors = layers._factors

    def rough(*args: Any) -> Any:
        made = factors(*args)
        off = torch.zeros_like(made.back)
        off[0, 0, 0] = 1e-6
        return replace(made, back=made.back + off)

    patch.setattr(layers, "_factors", rough)


def forget_offset(patch: Patch) -> None:
    """Give the inserted layer a bias and don't fold it out of the next one."""
    factors = layers._factors
    patch.setattr(layers, "_factors", lambda *args: replace(factors(*args), offset=None))


def zero_twice(patch: Patch) -> None:
    """Make incoming weights zero as well as outgoing ones, and the proof not look."""

    def producers(self: Any) -> None:
        biases = [at for at in self.axis.carriers if at.path.endswith("bias")]
        for at in (*self.axis.producers, *biases):
            new = self._read(at, self.resized.new)
            self._write(at, self.resized.new, torch.zeros_like(new))

    patch.setattr(weights._Fill, "producers", producers)
    believe(patch)


def forget_attributes(patch: Patch) -> None:
    patch.setattr(resize, "resized", lambda module, sizes: {})


# ------------------------------------------------------------------------------ all are found


WIDER = gg.Widen("blocks.0", 2, at=1, weights=gg.ZeroOutgoing())
CONSTANT = gg.Widen(
    "blocks.0",
    2,
    weights=gg.Given.of(
        incoming={
            "blocks.0.weight": torch.zeros(2, 18),
            "blocks.0.bias": torch.zeros(2, 1),
            "blocks.1.running_mean": torch.zeros(2, 1),
            "blocks.1.bias": torch.ones(2, 1),
        },
        outgoing={"blocks.3.weight": torch.randn(2, 3, generator=torch.Generator().manual_seed(0))},
    ),
)
BRANCH = gg.Widen("blocks.0.branches.0", 2, weights=gg.ZeroOutgoing())


def next_step(optimizer: str) -> Check:
    make = properties.OPTIMIZERS[optimizer]
    return lambda: properties.check_next_step(norms(), WIDER, make)


def origins(net: Drawn, rewrite: Any) -> Check:
    return lambda: properties.check_origin(gg.apply(net.trace(), rewrite, verify=False))


def liveness(net: Drawn, rewrite: Any) -> Check:
    return lambda: properties.check_liveness(net, gg.apply(net.trace(), rewrite))


def attributes() -> None:
    for module in gg.lower(gg.apply(norms().trace(), WIDER, verify=False).graph).modules():
        properties.check_attributes(module)


MUTANTS = {
    "buffers start afresh": Mutant(function(norms(), WIDER), forget_buffers),
    "buffers start afresh, seen by the check": Mutant(
        function(norms(), WIDER, verify=False), forget_buffers
    ),
    "buffers start afresh, seen in the origin": Mutant(origins(norms(), WIDER), forget_buffers),
    "columns not zeroed": Mutant(function(norms(), WIDER), unproved(draw_outgoing)),
    "columns not zeroed, seen by the check": Mutant(
        function(norms(), WIDER, verify=False), unproved(draw_outgoing)
    ),
    "terms shifted": Mutant(function(concat(), BRANCH), unproved(shift_terms)),
    "terms shifted, seen by the check": Mutant(
        function(concat(), BRANCH, verify=False), unproved(shift_terms)
    ),
    "terms swapped": Mutant(function(concat(), BRANCH), unproved(swap_terms)),
    "moments forgotten, SGD": Mutant(next_step("SGD"), forget_moments),
    "moments forgotten, Adam": Mutant(next_step("Adam"), forget_moments),
    "moments reversed, SGD": Mutant(next_step("SGD"), reverse_moments),
    "moments reversed, AdamW": Mutant(next_step("AdamW"), reverse_moments),
    "moments reversed, RMSprop": Mutant(next_step("RMSprop"), reverse_moments),
    "constant not folded": Mutant(function(norms(), CONSTANT), forget_constant),
    "constant not folded, seen by the check": Mutant(
        function(norms(), CONSTANT, verify=False), forget_constant
    ),
    "constant folded twice": Mutant(function(norms(), CONSTANT), fold_twice),
    "rough inverse": Mutant(function(norms(), gg.Deepen("blocks.3", gg.Factor())), invert_roughly),
    "rough inverse, split": Mutant(
        function(norms(), gg.Deepen("blocks.0", gg.Split("silu")), verify=False), invert_roughly
    ),
    "bias not folded": Mutant(
        function(norms(), gg.Deepen("blocks.3", gg.Factor(bias=(0.5,) * 4))), forget_offset
    ),
    "two zeros in a row": Mutant(liveness(norms(), WIDER), zero_twice),
    "attributes untrue": Mutant(attributes, forget_attributes),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_found_and_the_code_passes(name: str, monkeypatch: Patch) -> None:
    mutant = MUTANTS[name]
    mutant.check()
    mutant.patch(monkeypatch)
    found(mutant.check)
    monkeypatch.undo()
    mutant.check()


PROVED = {
    "columns not zeroed": Mutant(function(norms(), WIDER), draw_outgoing),
    "terms shifted": Mutant(function(concat(), BRANCH), shift_terms),
    "terms swapped": Mutant(function(concat(), BRANCH), swap_terms),
}


@pytest.mark.parametrize("name", PROVED)
def test_the_proof_finds_a_mutant_before_anything_runs(name: str, monkeypatch: Patch) -> None:
    mutant = PROVED[name]
    mutant.check()
    mutant.patch(monkeypatch)
    with pytest.raises(gg.NotApplicable, match="cannot widen"):
        mutant.check()


@pytest.mark.parametrize("patch", [forget_buffers, unproved(draw_outgoing)])
def test_a_mutant_is_found_in_random_networks(patch: Any, monkeypatch: Patch) -> None:
    @settings(phases=[Phase.generate], max_examples=100)
    @given(properties.growths(widenings))
    def search(growth: properties.Growth) -> None:
        grown = gg.apply(growth.graph, growth.rewrite, verify=False)
        properties.check_function(growth.net, growth.net.model, grown.graph)

    patch(monkeypatch)
    with pytest.raises((AssertionError, ExceptionGroup)):
        search()
