"""Local response norms: windows over neighbouring units, and what may stand at their ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import fill
from torch import Tensor, nn

import graphgrow as gg
from graphgrow.measure.routes import route

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Normed(nn.Module):
    """A layer, `between` its units, and a layer that reads them."""

    def __init__(self, between: Any, width: int = 6, space: int = 1) -> None:
        super().__init__()
        self.a = CONVOLUTIONS[space](2, width, 2)
        self.between = between
        self.o = CONVOLUTIONS[space](width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.between(self.a(x)))


def traced(between: Any, width: int = 6, space: int = 1) -> tuple[nn.Module, Tensor, gg.Graph]:
    model = fill(Normed(between, width, space).double(), 0)
    x = torch.randn(3, 2, *[4] * space, dtype=torch.double)
    return model, x, gg.trace(model, x)


def norm(size: int) -> nn.Module:
    return nn.LocalResponseNorm(size, alpha=0.9, beta=0.6, k=1.2)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("space", CONVOLUTIONS)
def test_zero_units_at_an_end_come_and_go_exactly(space: int, after: bool) -> None:
    parts = (nn.Tanh(), norm(5)) if after else (norm(5), nn.Tanh())
    model, x, graph = traced(nn.Sequential(*parts), space=space)
    for at, units in ((None, (6, 7, 8)), (0, (0, 1, 2))):
        grown = gg.apply(graph, gg.Widen("a", 3, at))
        assert gg.compare(model, grown.graph, x).relative <= 1e-14
        back = gg.apply(grown.graph, gg.Remove("a", units)).graph
        assert all(torch.equal(back.state[path], graph.state[path]) for path in graph.state)
        between = gg.Remove("a", (*units[:2], 4)).obstacle(grown.graph)
        assert "removed ones stand between others, not at an end" in str(between)


@given(st.data(), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**16))
def test_what_is_refused_would_change_old_units(
    data: st.DataObject, size: int, width: int, seed: int
) -> None:
    at = data.draw(st.integers(0, width))
    zero = data.draw(st.lists(st.booleans(), min_size=1, max_size=4))
    _, _, graph = traced(nn.Sequential(norm(size), nn.Tanh()), width)
    generator = torch.Generator().manual_seed(seed)
    kept = torch.tensor(zero, dtype=torch.double)[:, None]
    rows, bias = (torch.randn(len(zero), n, generator=generator).double() for n in (4, 1))
    given_ = gg.Given.of(
        {"a.weight": rows * (1 - kept), "a.bias": bias * (1 - kept)},
        {"o.weight": torch.ones(len(zero), 2) * kept},
    )
    before = torch.rand(1, width, 1, generator=generator).double()
    new = bias[None] * (1 - kept)
    wide = torch.cat([before[:, :at], new, before[:, at:]], 1)
    normed = F.local_response_norm(wide, size, 0.9, 0.6, 1.2)
    old = torch.cat([normed[:, :at], normed[:, at + len(zero) :]], 1)
    same = bool((old - F.local_response_norm(before, size, 0.9, 0.6, 1.2)).abs().max() < 1e-12)
    assert (gg.Widen("a", len(zero), at, given_).obstacle(graph) is None) == same


def test_a_mean_of_old_units_needs_readers_of_zero_and_one_of_zeros_does_not() -> None:
    mean = nn.AvgPool2d((3, 1), 1, (1, 0))
    model, x, graph = traced(lambda x: mean(x.tanh()))
    incoming = {"a.weight": torch.zeros(3, 4), "a.bias": torch.zeros(3, 1)}
    readers = torch.ones(3, 2)
    wide = gg.Widen("a", 3, weights=gg.Given.of(incoming, {"o.weight": readers}))
    assert "through weights that are not zero" in str(wide.obstacle(graph))
    readers[0] = 0
    wide = gg.Widen("a", 3, weights=gg.Given.of(incoming, {"o.weight": readers}))
    assert gg.compare(model, gg.apply(graph, wide).graph, x).relative <= 1e-14


def raised(x: Tensor) -> Tensor:
    """Return means over units, with ones beyond the ends."""
    padded = F.pad(x.tanh(), (0, 0, 1, 1)) + 1
    return F.avg_pool2d(padded, (3, 1), 1)


def padded_twice(x: Tensor) -> Tensor:
    """Return means over units, with ones and zeros beyond the ends."""
    padded = F.pad(F.pad(x.tanh(), (0, 0, 1, 1)) + 1, (0, 0, 1, 1))
    return F.avg_pool2d(padded, (5, 1), 1)


@pytest.mark.parametrize("between", [raised, padded_twice])
def test_what_is_padded_must_be_zero(between: Any) -> None:
    _, _, graph = traced(between)
    said = str(gg.Widen("a", 3).obstacle(graph))
    assert "what lies beyond their ends is not known to be zero" in said


def test_a_norm_that_would_divide_zero_by_zero_is_refused() -> None:
    _, _, graph = traced(nn.Sequential(nn.LocalResponseNorm(3, k=0.0), nn.Tanh()))
    assert "divides by new units that are zero" in str(gg.Widen("a", 2).obstacle(graph))


def test_idle_units_at_the_end_of_a_normed_relu_go() -> None:
    model, x, graph = traced(nn.Sequential(nn.ReLU(), norm(5)))
    with torch.no_grad():
        for path in ("a.weight", "a.bias"):
            graph.state[path][4:] = 0
    smaller = gg.apply(graph, gg.Remove("a", (4, 5)))
    assert smaller.graph.axes["a"].width == 4
    assert gg.compare(model, smaller.graph, x).relative <= 1e-14


def test_moments_are_refused_where_units_meet_their_neighbours() -> None:
    _, _, graph = traced(lambda x: F.avg_pool2d(x.tanh(), (3, 1), 1, (1, 0)))
    with pytest.raises(gg.NotApplicable, match="goes over neighbouring units"):
        route(graph, "a", "eval")
