"""Branches: zero at first, alive from the first step, between any two places that fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from strategies import branched, fill
from test_mean_fill import Transformer, images
from torch import nn

import graphgrow as gg


@given(branched())
def test_a_branch_changes_no_bit_and_its_last_layer_learns(case: tuple) -> None:
    net, graph, rewrite = case
    grown = gg.apply(graph, rewrite)
    assert gg.compare(graph, grown.graph, net.inputs(4, 1)).absolute == 0
    model = gg.lower(grown.graph).train()
    new = {p: t for p, t in model.named_parameters() if p not in graph.state}
    last = rewrite.layers.zero[0]
    assert any(last in path for path in new)
    target = gg.lower(graph).train()
    gradients = []
    for module in (model, target):
        module(net.inputs(4, 1)).sin().sum().backward()
        gradients.append({p: t.grad for p, t in module.named_parameters() if t.grad is not None})
    for path, gradient in gradients[1].items():
        assert torch.allclose(gradients[0][path], gradient, rtol=1e-9, atol=1e-12), path
    for path in new:
        if last not in path and path in gradients[0]:
            assert not gradients[0][path].any(), path


def test_a_skip_between_stages_of_other_widths_is_a_projection() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    graph = gg.trace(model, x)
    assert gg.Branch("1", "2") in gg.candidates(graph, gg.Branch)
    grown = gg.apply(graph, gg.Branch("1", "2"))
    wider = gg.lower(grown.graph)
    assert wider.get_parameter("2_branch.projection.weight").shape == (4, 6)
    wider(x).square().sum().backward()
    assert wider.get_parameter("2_branch.projection.weight").grad.any()
    optimizer = torch.optim.Adam(model.parameters())
    gg.migrate(optimizer, grown)
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == sum(
        p.numel() for p in wider.parameters()
    )


def test_a_transformer_block_goes_into_a_stream_and_grows(tmp_path: Path) -> None:
    model = fill(Transformer().double(), 1)
    graph = gg.trace(model, images())
    stream = next(t for _, t in reversed(gg.Branch.places(graph)) if t.startswith("add"))
    block = gg.Branch(stream, stream, gg.TransformerBlock(heads=2, features=3, hidden=5))
    grown = gg.apply(graph, block)
    assert gg.compare(model, grown.graph, images(5)).absolute == 0
    axes = {n: a for n, a in grown.graph.axes.items() if "branch" in n}
    assert {a.width for a in axes.values() if a.obstacle is None} == {2, 3, 5}
    wider = [gg.Widen(n, 3) for n, a in axes.items() if a.obstacle is None]
    larger = gg.apply(grown.graph, *wider, gg.Widen("patches", 2))
    assert gg.compare(model, larger.graph, images(5)).relative <= 1e-12
    gg.save(tmp_path / "grown", larger)
    loaded = gg.load(tmp_path / "grown", Transformer().double())
    assert gg.compare(gg.lower(larger.graph), loaded, images(5)).absolute == 0


class InPlace(nn.Module):
    """Writes over what its first layer gave once the second one has run."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)
        b = self.b(x)
        return self.o(a.relu_() + b)


@pytest.mark.parametrize(
    ("source", "target", "layers", "said"),
    [
        ("0", "nowhere", gg.Skip(), "'nowhere' is no module or node that is called once"),
        ("2", "0", gg.Skip(), "'2' is computed after '0'"),
        ("0", "2", gg.Residual(0), "a residual has at least one unit"),
        ("0", "2", gg.Residual(2, kernel=3), "a kernel of 3 does not fit 0 dims of space"),
        ("0", "2", gg.TransformerBlock(1, 1, 1), "a transformer block reads and writes one stream"),
    ],
)
def test_what_does_not_fit_is_refused(source: str, target: str, layers: object, said: str) -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    rewrite = gg.Branch(source, target, layers)
    graph = gg.trace(model, torch.randn(5, 3))
    obstacle = rewrite.obstacle(graph)
    assert obstacle is not None and said in obstacle and obstacle.startswith("cannot add a branch")
    with pytest.raises(gg.NotApplicable, match="cannot add a branch"):
        gg.apply(graph, rewrite)


def test_values_of_other_places_and_those_written_over_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    said = gg.Branch("0", "2").obstacle(gg.trace(model, torch.randn(2, 3, 8, 8)))
    assert said is not None and "which differ in more than the units" in said
    said = gg.Branch("a", "b").obstacle(gg.trace(InPlace(), torch.randn(2, 3)))
    assert said is not None and "writes over 'a' in place after 'b' is computed" in said
