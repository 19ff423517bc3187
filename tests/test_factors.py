"""Means and norms over units: what makes up for new units, in widening, removal and checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import fill
from torch import Tensor, nn

import graphgrow as gg


class Hand(nn.Module):
    """A norm written by hand: centred or not, weight plus one or not."""

    def __init__(self, width: int, centred: bool, plus_one: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.centred, self.plus_one = centred, plus_one

    def forward(self, x: Tensor) -> Tensor:
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)
        return x * (1 + self.weight) if self.plus_one else self.weight * x


NORMS = {
    "layer": lambda w: nn.LayerNorm(w, eps=1e-3),
    "layer, no weight": lambda w: nn.LayerNorm(w, eps=1e-3, elementwise_affine=False),
    "rms": lambda w: nn.RMSNorm(w, eps=1e-3),
    "rms, usual eps": nn.RMSNorm,
    "rms, no weight": lambda w: nn.RMSNorm(w, eps=1e-3, elementwise_affine=False),
    "hand": lambda w: Hand(w, False, False),
    "hand, plus one": lambda w: Hand(w, False, True),
    "hand, centred": lambda w: Hand(w, True, False),
    "hand, centred, plus one": lambda w: Hand(w, True, True),
    "group": lambda w: nn.GroupNorm(2, w, eps=1e-3),
}


class Stream(nn.Module):
    """Tokens and positions on a residual stream, its norms before or after the branches."""

    def __init__(self, norm: str, post: bool, width: int = 4) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(9, width), nn.Parameter(torch.randn(5, width))
        self.norm1, self.norm2 = NORMS[norm](width), NORMS[norm](width)
        self.up, self.down = nn.Linear(width, 6), nn.Linear(6, width)
        self.head, self.post = nn.Linear(width, 3), post

    def forward(self, x: Tensor) -> Tensor:
        x = (self.embed(x) + self.positions).flatten(0, 1)
        if self.post:
            x = self.norm1(x + self.down(torch.tanh(self.up(x))))
            return self.head(self.norm2(x))
        x = x + self.down(torch.tanh(self.up(self.norm1(x))))
        return self.head(self.norm2(x))


def tokens(batch: int) -> Tensor:
    return torch.randint(0, 9, (batch, 5), generator=torch.Generator().manual_seed(batch))


def built(norm: str, post: bool) -> tuple[nn.Module, gg.Graph]:
    model = fill(Stream(norm, post).double(), 1)
    return model, gg.trace(model, tokens(3))


@given(
    st.sampled_from([*NORMS]),
    st.booleans(),
    st.integers(1, 8),
    st.sampled_from([None, 0, 1]),
    st.booleans(),
)
def test_a_stream_grows_and_shrinks_exactly(
    norm: str, post: bool, units: int, at: int | None, copied: bool
) -> None:
    model, graph = built(norm, post)
    axis = "embed[1]" if norm == "group" else "embed"
    per = graph.axes[axis].width
    rewrite = gg.Widen(axis, units, at, gg.Copy() if copied else None)
    whole = units % per == 0
    # after a norm of its sum a stream is neither zero nor the mean in its new units
    alone = norm != "group" and not (post and "layer" in norm) and not (post and "centred" in norm)
    if not (whole if copied else whole or alone):
        assert rewrite.obstacle(graph) is not None
        return
    grown = gg.apply(graph, rewrite)
    assert gg.compare(model, grown.graph, tokens(4)).relative <= 1e-12
    first = per if at is None else at
    back = gg.apply(grown.graph, gg.Remove(axis, tuple(range(first, first + units)))).graph
    assert gg.compare(model, back, tokens(4)).relative <= 1e-12


@pytest.mark.parametrize("norm", NORMS)
def test_checkpoints_have_what_was_made_up_for(norm: str, tmp_path: Path) -> None:
    model, graph = built(norm, post=False)
    axis = "embed[1]" if norm == "group" else "embed"
    grown = gg.apply(graph, gg.Widen(axis, graph.axes[axis].width), gg.Widen("up", 2))
    after = gg.apply(grown.graph, gg.Remove("up", (7,)))
    gg.save(tmp_path / "grown", after)
    loaded = gg.load(tmp_path / "grown", Stream(norm, post=False).double())
    assert gg.compare(gg.lower(after.graph), loaded, tokens(4)).absolute == 0
    assert gg.compare(model, loaded, tokens(4)).relative <= 1e-12


@pytest.mark.parametrize("norm", NORMS)
def test_new_units_of_a_stream_learn(norm: str) -> None:
    _, graph = built(norm, post=False)
    axis = "embed[1]" if norm == "group" else "embed"
    width = graph.axes[axis].width
    wider = gg.lower(gg.apply(graph, gg.Widen(axis, width)).graph).train()
    optimizer = torch.optim.SGD(wider.parameters(), 0.1)
    for step in range(2):
        optimizer.zero_grad()
        F.cross_entropy(wider(tokens(3 + step)), torch.arange(5 * (3 + step)) % 3).backward()
        optimizer.step()
    for path in ("embed.weight", "up.weight", "head.weight"):
        gradient = wider.get_parameter(path).grad
        assert gradient is not None and (gradient != 0).any(0).all(), path
