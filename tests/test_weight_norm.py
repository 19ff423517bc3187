"""Weights that are computed from parameters: weight norm, and what only looks like it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from strategies import Residual, fill
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrizations import weight_norm

import graphgrow as gg
from graphgrow.measure.routes import route
from graphgrow.optim.fans import fan_ins, fan_outs

G, V = "0.parametrizations.weight.original0", "0.parametrizations.weight.original1"


def linear() -> nn.Module:
    return nn.Sequential(weight_norm(nn.Linear(3, 6)), nn.Tanh(), weight_norm(nn.Linear(6, 2)))


def image() -> nn.Module:
    first, second = weight_norm(nn.Conv2d(3, 6, 2)), weight_norm(nn.Conv2d(6, 2, 2), dim=1)
    return nn.Sequential(first, nn.GELU(), second)


def upward() -> nn.Module:
    first, second = nn.ConvTranspose2d(3, 6, 2), nn.ConvTranspose2d(6, 2, 2)
    return nn.Sequential(weight_norm(first, dim=1), nn.ReLU(), weight_norm(second, dim=1))


def traced(make: Any) -> tuple[nn.Module, torch.Tensor, gg.Graph]:
    model = fill(make().double(), 0)
    shape = (4, 3) if make is linear else (2, 3, 4, 4)
    x = torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    return model, x, gg.trace(model, x)


@pytest.mark.parametrize("make", [linear, image, upward])
def test_units_come_and_go_in_the_users_own_model(make: Any) -> None:
    model, x, graph = traced(make)
    before, keys = copy.deepcopy(model), list(model.state_dict())
    for at in (None, 2):
        grown = gg.apply(graph, gg.Widen("0", 3, at))
        assert gg.compare(before, grown.graph, x).relative <= 1e-14
        assert grown.proof.rounding == 0
        first = 6 if at is None else at
        back = gg.apply(grown.graph, gg.Remove("0", (first, first + 1, first + 2))).graph
        assert all(torch.equal(back.state[path], graph.state[path]) for path in graph.state)
        again = gg.apply(grown.graph.renewed(), gg.Widen("0", 1)).graph
        assert gg.compare(before, again, x).relative <= 1e-14
    gg.lower(gg.apply(graph, gg.Widen("0", 3)).graph, into=model)
    assert list(model.state_dict()) == keys
    assert "9" in repr(model.get_submodule("0")).splitlines()[1]
    assert torch.allclose(model(x), before(x), atol=1e-14)


def test_incoming_weights_are_zero_in_length_and_not_in_direction() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(3, 6)), nn.Tanh(), nn.Linear(6, 2)).double()
    x = torch.randn(4, 3, dtype=torch.double)
    graph = gg.trace(model, x)
    grown = gg.apply(graph, gg.Widen("0", 2, weights=gg.ZeroIncoming(paths=(G,))))
    assert not grown.graph.state[G][6:].any()
    assert grown.graph.state[V][6:].all()
    assert gg.compare(model, grown.graph, x).relative <= 1e-14
    for zero in (gg.ZeroIncoming(), gg.ZeroIncoming(paths=(V,))):
        said = str(gg.Widen("0", 2, weights=zero).obstacle(graph))
        assert "ParametrizedLinear '0' divides by new units that are zero" in said


def test_columns_that_would_change_the_length_of_rows_are_refused() -> None:
    _, _, graph = traced(linear)
    for weights in (gg.Copy(), gg.Pairs(), gg.ZeroIncoming(paths=(G,))):
        said = str(gg.Widen("0", 2, weights=weights).obstacle(graph))
        assert "ParametrizedLinear '2' sums over its units with no weight that could be" in said
    said = str(gg.Remove("0", (1,)).obstacle(graph))
    assert "ParametrizedLinear '2' sums over its units with no weight that could be zero" in said


def test_one_length_for_the_whole_weight_leaves_no_room_for_rows() -> None:
    whole = weight_norm(nn.Linear(3, 6), dim=-1)  # one for all, as None
    graph = gg.trace(nn.Sequential(whole, nn.Tanh(), nn.Linear(6, 2)), torch.ones(2, 3))
    said = str(gg.Widen("0", 2, weights=gg.ZeroOutgoing()).obstacle(graph))
    assert "ParametrizedLinear '0' sums over its units with no weight that could be zero" in said


@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (parametrizations.spectral_norm, "is fixed by _SpectralNorm, which keeps '_u'"),
        (parametrizations.orthogonal, "is fixed by _Orthogonal, which keeps 'base'"),
        (nn.utils.weight_norm, "is fixed by a hook that computes a tensor of Linear '2'"),
        (nn.utils.spectral_norm, "is fixed by a hook that computes a tensor of Linear '2'"),
    ],
)
def test_other_weights_that_are_computed_are_refused_by_what_computes_them(
    wrap: Any, reason: str
) -> None:
    with warnings.catch_warnings(action="ignore"):
        model = nn.Sequential(wrap(nn.Linear(3, 6)), nn.Tanh(), wrap(nn.Linear(6, 2)))
    graph = gg.trace(model, torch.ones(2, 3))
    assert all(gg.Widen(name, 2).obstacle(graph) for name in graph.axes)
    assert any(reason in str(axis.obstacle) for axis in graph.axes.values())


def test_a_layer_is_inserted_before_it_and_a_branch_taken_out_with_it() -> None:
    last = nn.Linear(6, 6)
    branch = nn.Sequential(weight_norm(nn.Linear(6, 6)), nn.Tanh(), last)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), Residual(branch, nn.Identity()))
    model, x = fill(model.double(), 0), torch.randn(4, 3, dtype=torch.double)
    graph = gg.trace(model, x)
    deeper = gg.apply(graph, gg.Deepen("2.branch.0", gg.Identity()))
    assert gg.compare(model, deeper.graph, x).relative <= 1e-14
    said = str(gg.Deepen("2.branch.0", gg.Factor()).obstacle(graph))
    assert "a hook or parametrization makes the weight" in said
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
    less = gg.apply(gg.trace(model, x), gg.Fold("2.branch.2")).graph
    assert gg.compare(model, less, x).absolute == 0
    assert list(less.state) == ["0.weight", "0.bias"]


def test_moments_and_fans_leave_computed_weights_out() -> None:
    _, _, graph = traced(linear)
    with pytest.raises(gg.NotApplicable, match="'0' writes it with a weight that is computed"):
        route(graph, "0")
    assert fan_ins(graph).names == fan_outs(graph).names == ()
