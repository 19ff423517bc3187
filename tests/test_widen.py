"""Every kind of axis, widened by every scheme, at the end and in the middle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from strategies import (
    Concat,
    Flatten,
    Gate,
    Residual,
    Shuffle,
    Siblings,
    Squeeze,
    Tied,
    Twice,
    fill,
)
from torch import Tensor, nn

import graphgrow as gg


class Stage(nn.Module):
    """A residual stage with a projection shortcut, then an identity one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Residual(_block(2, 3, 4), nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)))
        self.second = Residual(_block(4, 5, 4), nn.Identity())
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def _block(before: int, hidden: int, after: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(before, hidden, 3, padding=1, bias=False),
        nn.BatchNorm2d(hidden),
        nn.ReLU(),
        nn.Conv2d(hidden, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
    )


class Words(nn.Module):
    """Word vectors through a layer to one score a position."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden, self.score = nn.Embedding(7, 4), nn.Linear(4, 3), nn.Linear(3, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.score(torch.tanh(self.hidden(self.table(tokens))))


class Functional(nn.Module):
    """Layers written as functional calls on parameters, with the mode handed on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(4, 3)), nn.Parameter(torch.empty(4))
        self.scale, self.shift = nn.Parameter(torch.empty(4)), nn.Parameter(torch.empty(4))
        self.register_buffer("running_mean", torch.empty(4))
        self.register_buffer("running_var", torch.empty(4))
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.weight, self.bias)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.scale, self.shift, self.training
        )
        return self.last(F.dropout(torch.relu(x), 0.3, training=self.training))


IMAGE, VECTOR = (2, 2, 6, 6), (3, 3)


@dataclass(frozen=True)
class Case:
    """A model, an axis of it, how many units come at once, and where the new columns are zero."""

    model: Any
    axis: str
    multiple: int
    consumers: str
    shape: tuple[int, ...] = IMAGE


def _in_a_row(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


CASES = {
    "hidden units": Case(
        lambda: _in_a_row(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)),
        "0",
        1,
        "2.weight[1]",
        VECTOR,
    ),
    "convolution channels": Case(
        lambda: _in_a_row(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)),
        "0",
        1,
        "3.weight[1]",
    ),
    "residual stage": Case(Stage, "first.branch.3", 1, "second.branch.0.weight[1] head.weight[1]"),
    "inside a residual block": Case(Stage, "second.branch.0", 1, "second.branch.3.weight[1]"),
    "depthwise convolution": Case(
        lambda: _in_a_row(
            nn.Conv2d(2, 4, 1),
            nn.Conv2d(4, 4, 3, padding=1, groups=4),
            nn.SiLU(),
            nn.Conv2d(4, 2, 1),
        ),
        "0",
        1,
        "3.weight[1]",
    ),
    "depthwise convolution that doubles": Case(
        lambda: _in_a_row(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(6, 2, 1)),
        "0",
        1,
        "2.weight[1]",
    ),
    "inside the groups of a convolution": Case(
        lambda: _in_a_row(nn.Conv2d(2, 6, 1), nn.SiLU(), nn.Conv2d(6, 4, 3, groups=2)),
        "0[1]",
        1,
        "2.weight[1]",
    ),
    "whole groups of a convolution": Case(
        lambda: _in_a_row(
            nn.Conv2d(2, 6, 1), nn.SiLU(), nn.Conv2d(6, 4, 3, groups=2), nn.Conv2d(4, 2, 1)
        ),
        "0[0]",
        1,
        "3.weight[1]",
    ),
    "a branch of a concatenation": Case(
        lambda: _in_a_row(
            Concat(nn.Conv2d(2, 3, 1), nn.Conv2d(2, 4, 3, padding=1)),
            nn.BatchNorm2d(7),
            nn.ReLU(),
            nn.Conv2d(7, 2, 1),
        ),
        "0.branches.0",
        1,
        "3.weight[1]",
    ),
    "densely connected": Case(
        lambda: _in_a_row(
            nn.Conv2d(2, 3, 1),
            Concat(nn.Identity(), nn.Conv2d(3, 2, 1)),
            Concat(nn.Identity(), nn.Conv2d(5, 2, 1)),
            nn.Conv2d(7, 2, 1),
        ),
        "1.branches.1",
        1,
        "2.branches.1.weight[1] 3.weight[1]",
    ),
    "channel shuffle": Case(
        lambda: _in_a_row(
            nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 3, groups=2), Shuffle(2), nn.Conv2d(6, 2, 1)
        ),
        "1[1]",
        1,
        "3.weight[1]",
    ),
    "channel shuffle of a concatenation": Case(
        lambda: _in_a_row(
            Concat(nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1)), nn.ChannelShuffle(2), nn.Conv2d(6, 2, 1)
        ),
        "0.branches.0",
        1,
        "2.weight[1]",
    ),
    "squeeze and excitation, what is scaled": Case(
        lambda: _in_a_row(nn.Conv2d(2, 4, 1), nn.SiLU(), Squeeze(4, 3), nn.Conv2d(4, 2, 1)),
        "0",
        1,
        "2.down.weight[1] 3.weight[1]",
    ),
    "squeeze and excitation, the middle": Case(
        lambda: _in_a_row(nn.Conv2d(2, 4, 1), Squeeze(4, 3), nn.Conv2d(4, 2, 1)),
        "1.down",
        1,
        "1.up.weight[1]",
    ),
    "flattened into a linear layer": Case(
        lambda: _in_a_row(nn.Conv2d(2, 4, 3), nn.ReLU(), Flatten("view"), nn.Linear(64, 3)),
        "0",
        1,
        "3.weight[1]",
    ),
    "pixel shuffle": Case(
        lambda: _in_a_row(nn.Conv2d(2, 8, 1), nn.PixelShuffle(2), nn.Conv2d(2, 2, 1)),
        "0",
        1,
        "2.weight[1]",
    ),
    "transposed convolution": Case(
        lambda: _in_a_row(
            nn.ConvTranspose2d(2, 4, 2, 2),
            nn.BatchNorm2d(4),
            nn.SiLU(),
            nn.ConvTranspose2d(4, 2, 3),
        ),
        "0",
        1,
        "3.weight[0]",
    ),
    "grouped transposed convolution": Case(
        lambda: _in_a_row(
            nn.Conv2d(2, 4, 1), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Conv2d(6, 2, 1)
        ),
        "1",
        1,
        "2.weight[1]",
    ),
    "gated units": Case(
        lambda: _in_a_row(Gate(nn.Linear(3, 8), "chunk"), nn.Linear(4, 2)),
        "0.layer",
        1,
        "1.weight[1]",
        VECTOR,
    ),
    "word vectors": Case(Words, "table", 1, "hidden.weight[1]", (2, 5)),
    "tied parameters": Case(
        lambda: _in_a_row(Tied(3, 4), nn.Linear(3, 2)),
        "0.encoder",
        1,
        "0.encoder.weight[0]",
        VECTOR,
    ),
    "siblings of one weight": Case(
        lambda: _in_a_row(nn.Linear(3, 4), Siblings(4), nn.Linear(4, 2)),
        "0",
        1,
        "1.a.weight[1] 2.weight[1]",
        VECTOR,
    ),
    "a module called twice": Case(
        lambda: _in_a_row(nn.Linear(3, 4), Twice(nn.Linear(4, 4)), nn.Linear(4, 2)),
        "0",
        1,
        "1.inner.weight[1] 2.weight[1]",
        VECTOR,
    ),
    "inside a module called twice": Case(
        lambda: _in_a_row(
            Twice(_in_a_row(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))), nn.Linear(3, 2)
        ),
        "0.inner.0",
        1,
        "0.inner.2.weight[1]",
        VECTOR,
    ),
    "functional calls": Case(Functional, "weight", 1, "last.weight[1]", VECTOR),
}

REFUSED = {
    # one tensor writes the units and reads them: it is not zero, or split, on one side alone
    ("tied parameters", "Pairs"): "reads new units through weights that are not zero",
    ("tied parameters", "Copy"): "change where it is read but not where it writes",
    # dropout draws for the copy on its own
    (
        "functional calls",
        "Pairs",
    ): "reads new units through weights that are not zero in train mode",
    # zero behind a ReLU is dead, and what dropout makes of constants is not the same for a pair
    ("functional calls", "ZeroIncoming"): "would get no gradient for ever",
    ("functional calls", "Copy"): "do not add up to its old weights in train mode",
}
SCHEMES = (None, gg.ZeroOutgoing(), gg.ZeroIncoming(), gg.Pairs(), gg.Copy())


def inputs(case: Case, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, *case.shape[1:])
    if case.model is Words:
        return torch.randint(7, shape, generator=generator)
    return torch.randn(shape, generator=generator, dtype=torch.double)


@pytest.mark.parametrize("name", CASES)
def test_the_axis_is_found_with_what_reads_it(name: str) -> None:
    case = CASES[name]
    axis = gg.trace(case.model().double(), inputs(case, 2)).axis(case.axis)
    assert axis.obstacle is None
    assert (axis.multiple, " ".join(map(str, axis.consumers))) == (case.multiple, case.consumers)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", CASES)
def test_a_wider_axis_computes_the_same(name: str, scheme: Any) -> None:
    case = CASES[name]
    model = fill(case.model().double(), 1)
    graph = gg.trace(model, inputs(case, 2))
    axis = graph.axis(case.axis)
    for at in (None, 0, axis.width // 2):
        count = 3 if at == 0 and not isinstance(scheme, gg.Pairs) else 2
        rewrite = gg.Widen(case.axis, count, at, scheme)
        if (name, type(scheme).__name__) in REFUSED:
            assert REFUSED[name, type(scheme).__name__] in str(rewrite.obstacle(graph))
            continue
        grown = gg.apply(graph, rewrite)
        assert grown.graph.axes[axis.name].width == axis.width + count
        assert gg.compare(model, grown.graph, inputs(case, 5)).relative <= 1e-10
        first = axis.width if at is None else at
        units = range(first, first + count)
        back = gg.apply(grown.graph, gg.Remove(axis.name, tuple(units))).graph
        assert str(back) == str(graph)
        assert gg.compare(model, back, inputs(case, 5)).relative <= 1e-10
        assert "folded" not in str(grown.proof)
        assert all(torch.equal(t, back.state[p]) for p, t in graph.state.items())


@pytest.mark.parametrize("even", [False, True])
def test_copies_of_tied_units_are_refused_since_their_halves_would_write_too(even: bool) -> None:
    """One unit and one input: the halves of the weight that reads it add up to what it was."""
    model = fill(_in_a_row(Tied(1, 1), nn.Linear(1, 2)).double(), 0)
    rewrite = gg.Widen("0.encoder", 1, weights=gg.Copy(even=even))
    said = rewrite.obstacle(gg.trace(model, torch.ones(3, 1, dtype=torch.double)))
    assert said is not None and "'0.encoder.weight[0]'" in said


class Gated(nn.Module):
    """Units of one layer, behind a ReLU, times those of another."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.last = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.gate(x)) * self.up(x))


def test_a_factor_that_is_zero_behind_a_relu_never_moves() -> None:
    graph = gg.trace(fill(Gated().double(), 0), torch.randn(5, 3, dtype=torch.double))
    gate, up = (
        gg.Widen("gate", 2, weights=gg.ZeroIncoming(paths=(path,))).obstacle(graph)
        for path in ("gate.weight", "up.weight")
    )
    assert "2 of the new units would get no gradient for ever" in str(gate)
    assert up is None
