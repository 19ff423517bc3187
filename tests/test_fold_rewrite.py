"""Folding: the inverse of branches and of deepening, batch norms in eval mode, linear pairs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import branched, deepenings, fill, networks
from torch import nn

import graphgrow as gg


@given(branched())
def test_folding_a_new_branch_gives_the_old_graph_back(case: tuple) -> None:
    net, before, rewrite = case
    wider = gg.apply(before, rewrite).graph
    last = next(p for p in wider.leaves - before.leaves if p.endswith(("last", "projection")))
    after = gg.apply(wider, gg.Fold(last)).graph
    assert gg.compare(before, after, net.inputs(4, 1)).absolute == 0
    assert after.state.keys() == before.state.keys()
    assert all(after.state[path] is before.state[path] for path in before.state)


@st.composite
def folded(draw: st.DrawFn) -> tuple:
    net = draw(networks())
    graph = net.trace()
    deeper = draw(deepenings(graph))
    if deeper.obstacle(graph) is None:
        graph = gg.apply(graph, deeper, verify=False).graph
    rewrites = gg.candidates(graph, gg.Fold)
    assume(rewrites)
    return net, graph, draw(st.sampled_from(rewrites))


@given(folded())
def test_what_can_be_folded_is_exact_in_the_modes_of_its_proof(case: tuple) -> None:
    net, graph, rewrite = case
    grown = gg.apply(graph, rewrite)
    found = gg.compare(graph, grown.graph, net.inputs(4, 1))
    assert all(getattr(found, mode).relative <= 1e-10 for mode in grown.proof.modes)
    assert rewrite.at not in grown.graph.modules
    assert not any(path.startswith(f"{rewrite.at}.") for path in grown.graph.state)


@pytest.mark.parametrize("layer", [nn.Linear(3, 3), nn.Conv2d(3, 3, 3, padding=1, bias=False)])
def test_an_identity_layer_goes_and_another_stays(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Tanh(), layer, nn.Tanh()).double()
    x = torch.randn(2, 3, dtype=torch.double)
    x = x if isinstance(layer, nn.Linear) else x[..., None, None].expand(2, 3, 4, 4)
    said = gg.Fold("1").obstacle(gg.trace(model, x))
    assert said is not None and said.startswith("cannot fold '1': this")
    with torch.no_grad():
        eye = nn.init.eye_ if isinstance(layer, nn.Linear) else nn.init.dirac_
        eye(layer.weight)
        if layer.bias is not None:
            layer.bias.zero_()
    grown = gg.apply(gg.trace(model, x), gg.Fold("1"))
    assert gg.compare(model, grown.graph, x).absolute == 0
    assert not grown.graph.state


def test_a_batch_norm_is_folded_for_eval_mode_and_saved(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(2, 6, 3, groups=1, bias=False), nn.BatchNorm2d(6), nn.Flatten()
        ).double()

    model, x = fill(build(), 1), torch.randn(3, 2, 5, 5).double()
    grown = gg.apply(gg.trace(model, x), gg.Fold("1"))
    assert grown.proof.modes == ("eval",) and not grown.proof.exact
    assert gg.compare(model, grown.graph, x).eval.relative <= 1e-12
    assert {*grown.graph.state} == {"0.weight", "0.bias"}
    gg.save(tmp_path / "folded", grown)
    loaded = gg.load(tmp_path / "folded", build())
    assert gg.compare(gg.lower(grown.graph), loaded, x).absolute == 0


def test_a_branch_that_training_made_zero_is_folded_and_saved(tmp_path: Path) -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 5), nn.Linear(5, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.c(self.b(x).tanh())

    model, x = Summed().double(), torch.randn(3, 3).double()
    with torch.no_grad():
        model.c.weight.zero_()
        model.c.bias.zero_()
    grown = gg.apply(gg.trace(model, x), gg.Fold("c"))
    assert {*grown.graph.state} == {"a.weight", "a.bias"}
    gg.save(tmp_path / "folded", grown)
    loaded = gg.load(tmp_path / "folded", Summed().double())
    assert gg.compare(model, loaded, x).absolute == 0


def test_linear_pairs_are_multiplied_and_the_optimizer_follows() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2), nn.Tanh()).double()
    optimizer = torch.optim.Adam(model.parameters())
    x = torch.randn(4, 3).double()
    model(x).square().sum().backward()
    optimizer.step()
    grown = gg.apply(gg.trace(model, x), gg.Fold("1"))
    assert gg.compare(model, grown.graph, x).relative <= 1e-12
    merged = gg.lower(grown.graph)
    assert merged.get_submodule("0").out_features == 2
    gg.migrate(optimizer, grown)
    assert len(optimizer.param_groups[0]["params"]) == 2
    merged(x).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("at", "said"),
    [
        ("nowhere", "it is no module that is called once in each mode"),
        ("0", "is neither zero, nor the identity, nor linear behind a linear layer"),
        ("1", "is neither zero, nor the identity, nor linear behind a linear layer"),
    ],
)
def test_what_has_to_stay_is_said(at: str, said: str) -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    graph = gg.trace(model, torch.randn(5, 3))
    obstacle = gg.Fold(at).obstacle(graph)
    assert obstacle is not None and said in obstacle


class Decoding(nn.Module):
    """Reads the weight of its first layer, and of the one that could be multiplied into, again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.second(self.first(x)).tanh()
        return self.last(hidden @ self.first.weight.T).tanh()


def test_a_layer_whose_weight_is_read_elsewhere_stays_as_it_is() -> None:
    torch.manual_seed(0)
    graph = gg.trace(Decoding().double(), torch.randn(2, 3, dtype=torch.double))
    said = gg.Fold("first").obstacle(graph)
    assert said is not None and "'first.weight' is read outside of it too" in said
    assert gg.Fold("second").obstacle(graph) is not None  # into the first
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    tied[3].weight = tied[0].weight
    graph = gg.trace(tied, torch.randn(2, 3, dtype=torch.double))
    assert gg.Fold("1").obstacle(graph) is not None
