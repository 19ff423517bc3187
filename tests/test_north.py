"""NORTH against its definitions: orthogonality by dense singular values, and units by their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import mean_square, networks
from test_moments import CASES, Case, close, data, loss, row, traced
from test_scores import double, gradients
from torch import Tensor, nn

import graphgrow as gg
from graphgrow.moments import moments, obstacle
from graphgrow.scores.north import Orthogonality, independent, orthogonality, weights

HOW = ("select", "pre", "weight", "random")
NAMES = [
    *("hidden units", "tokens", "channels", "strides and borders", "residual stage", "a branch"),
    *("inside the groups", "flattened", "averaged over space", "inside a residual block"),
]
# what the consumer of each case reads, as a module of the model, and its kernel
READ: dict[str, tuple[str, int]] = {
    "hidden units": ("2", 1),
    "tokens": ("2", 1),
    "channels": ("3", 3),
    "flattened": ("3", 1),
    "a branch": ("3", 1),
    "inside a residual block": ("second.branch.3", 3),
}


def measured(case: Case, count: int = 30) -> tuple[gg.Graph, str, list[tuple[Tensor, Tensor]]]:
    model, graph = traced(case)
    return graph, graph.axis(case[1]).name, data(model, case, (count, count // 2))


def reads(graph: gg.Graph, batches: Any, path: str, kernel: int) -> Tensor:
    """What a layer reads, `(units, samples)`: units are channels, or blocks that were flattened."""
    model, seen = gg.lower(graph).eval(), []
    layer = model.get_submodule(path)
    layer.register_forward_hook(lambda m, i, o: seen.append(i[0].detach()))
    for x, _ in batches:
        model(x)
    x = torch.cat(seen)
    if kernel > 1:
        x = F.unfold(x, kernel, padding=layer.padding).unflatten(1, (x.shape[1], -1))
    return x.movedim(1, 0).flatten(1) if isinstance(layer, nn.Conv2d) else x.flatten(0, -2).T


@pytest.mark.parametrize("name", READ)
def test_orthogonality_is_the_share_of_large_singular_values(name: str) -> None:
    graph, axis, batches = measured(CASES[name])
    found = moments(graph, batches, loss, [axis])[axis]
    h = reads(graph, batches, *READ[name])
    if name == "flattened":
        h = h.unflatten(0, (4, -1)).flatten(1)
    if name == "a branch":
        h = h[3:]
    values = torch.linalg.svdvals(h / h.shape[1] ** 0.5)
    for level in (0.01, *((values[:-1] + values[1:]) / 2).tolist()):
        expected = float((values > level).sum()) / len(values)
        assert orthogonality(graph, found, level) == pytest.approx(expected)


def test_a_copy_of_a_unit_is_no_direction_of_its_own() -> None:
    graph, axis, batches = measured(CASES["hidden units"])
    wide = gg.apply(graph, gg.Widen(axis, 2, weights=gg.Copy((0, 1)))).graph
    assert orthogonality(graph, moments(graph, batches, loss, [axis])[axis], 1e-6) == 1
    assert orthogonality(wide, moments(wide, batches, loss, [axis])[axis], 1e-6) == 4 / 6


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_proposed_is_exact_and_has_the_gradient_that_is_predicted(
    name: str, how: Any
) -> None:
    graph, axis, batches = measured(CASES[name])
    score = gg.scores.North(how, 2, candidates=4)
    (proposal,) = score.propose(graph, batches[:1], loss, [axis])
    grown = gg.apply(graph, proposal.rewrite)
    assert gg.compare(graph, grown.graph, batches[0][0]).relative <= 1e-10
    paths = [at.path for at in graph.axes[axis].consumers]
    assert float(gradients(grown, paths, batches[:1])) == pytest.approx(proposal.gain, rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_new_units_are_orthogonal_and_of_mean_length(name: str) -> None:
    graph, axis, batches = measured(CASES[name])
    (proposal,) = gg.scores.North("weight", 2).propose(graph, batches, loss, [axis])
    wide = gg.apply(graph, proposal.rewrite).graph
    found = weights(wide, moments(wide, batches, loss, [axis])[axis])
    width = graph.axes[axis].width
    present, new = found[:width].movedim(0, 1), found[width:].movedim(0, 1)
    assert close(new.norm(dim=2), present.norm(dim=2).mean(1, keepdim=True).expand(-1, 2))
    if present.shape[2] >= width + 2:  # there is room for both
        assert (new @ present.mT).abs().max() < 1e-8
        assert (new[:, 0] * new[:, 1]).sum(1).abs().max() < 1e-8


@pytest.mark.parametrize("name", ["shallow", "strides and borders"])
def test_pre_activations_of_new_units_are_orthogonal(name: str) -> None:
    wide_input: Case = (lambda: row(nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 2)), "0", (9,))
    graph, axis, batches = measured({**CASES, "shallow": wide_input}[name])
    (proposal,) = gg.scores.North("pre", 3).propose(graph, batches, loss, [axis])
    model, seen = gg.lower(gg.apply(graph, proposal.rewrite).graph).eval(), []
    model.get_submodule("0").register_forward_hook(lambda m, i, o: seen.append(o.detach()))
    for x, _ in batches:
        model(x)
    z = torch.cat(seen).movedim(1, 0).flatten(1)
    z = F.normalize(z, dim=1)
    assert (z[4:] @ z[:4].T).abs().max() < 1e-8
    assert (z[4:] @ z[4:].T - torch.eye(3)).abs().max() < 1e-8


def test_selected_units_leave_most_singular_values() -> None:
    graph, axis, batches = measured(CASES["hidden units"])
    x = torch.cat([x for x, _ in batches])
    score = gg.scores.North("select", 2, candidates=6, level=0.1)
    (proposal,) = score.propose(graph, batches, loss, [axis])
    plain = gg.scores.North("random", 6).propose(graph, batches, loss, [axis])[0].rewrite.weights
    rows = [double(dict(plain.incoming)[path]) for path in ("0.weight", "0.bias")]
    state = {path: tensor.detach() for path, tensor in graph.state.items()}
    h = torch.tanh(x @ state["0.weight"].T + state["0.bias"])
    ranks = []
    for w, b in zip(*rows, strict=True):
        both = torch.cat([h, torch.tanh(x @ w + b)[:, None]], 1)
        values = torch.linalg.svdvals(both / len(x) ** 0.5)
        ranks.append((int((values > 0.1).sum()), float(values.sum())))
    best = sorted(range(6), key=lambda k: ranks[k], reverse=True)[:2]
    assert len({count for count, _ in ranks}) > 1
    expected = rows[0][best]
    assert torch.equal(double(dict(proposal.rewrite.weights.incoming)["0.weight"]), expected)


def test_more_directions_count_before_larger_ones() -> None:
    covariance = torch.diag(double([1.0, 0.0, 4.0, 0.25]))
    covariance[0, 2] = covariance[2, 0] = 2.0  # the second candidate is twice the present unit
    covariance[1, 1] = 0.01
    assert independent(covariance, 1, 3, 0.2) == [2, 1, 0]


# ------------------------------------------------------------------------------ the trigger


def test_the_trigger_says_how_many_units_an_axis_gets() -> None:
    graph, axis, batches = measured(CASES["hidden units"])
    found = moments(graph, batches, loss, [axis])
    level = 0.3
    phi = orthogonality(graph, found[axis], level)
    assert phi == 0.75
    start = Orthogonality.at(graph, found, share=0.3, level=level)
    assert start.start == ((axis, 0.75),)
    assert start.units(graph, found[axis]) == 2  # of 4 · (0.75 − 0.3 · 0.75) = 2.1
    assert list(start.ripe(graph, found)) == [axis]
    assert Orthogonality.at(graph, found, share=1.0, level=level).ripe(graph, found) == {}
    assert Orthogonality(((axis, 1.0),), 0.9, level).units(graph, found[axis]) == 0
    assert Orthogonality((), 0.5, level).units(graph, found[axis]) == 1  # 4 · (0.75 − 0.5)
    scores = [gg.scores.North(how, start).propose(graph, batches, loss, [axis]) for how in HOW]
    assert [p.rewrite.units for (p,) in scores] == [2, 2, 2, 2]
    never = Orthogonality(((axis, 1.0),), 1.0, level)
    assert gg.scores.North("random", never).propose(graph, batches, loss, [axis]) == []


@pytest.mark.parametrize("score", [gg.scores.North("weight"), gg.scores.Random()])
def test_a_grower_grows_where_the_trigger_says(score: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(60, 4, dtype=torch.double)
    y = torch.sin(x[:, :2])
    model = row(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        model[0].weight[4] = model[0].weight[3]  # the first layer does not use its width
        model[0].bias[4] = model[0].bias[3]
    graph = gg.trace(model, x[:2])
    when = Orthogonality((), share=1.0, level=1e-6, steps=2)
    assert list(when.ripe(graph, moments(graph, [(x, y)], loss))) == []
    when = Orthogonality((), share=0.7, level=1e-6, steps=2)
    assert [when.units(graph, m) for m in moments(graph, [(x, y)], loss).values()] == [0, 0]
    when = Orthogonality((("0", 1.2), ("2", 1.0)), share=0.66, level=1e-6, steps=2)
    assert list(when.ripe(graph, moments(graph, [(x, y)], loss))) == ["2"]
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    grower = gg.Grower(
        model,
        x[:2],
        loss=loss,
        optimizer=optimizer,
        score=score,
        when=when,
        where=gg.Where(places=5),
    )
    assert grower.step([(x, y)]) is None
    event = grower.step([(x, y)])
    assert event is not None and event["widths"] == {"0": 5, "2": 4}


@settings(max_examples=10)
@given(st.data())
def test_what_is_proposed_for_random_networks_is_exact(drawn: Any) -> None:
    network = drawn.draw(networks())
    graph, x = network.trace(), network.inputs(4)
    score = gg.scores.North(drawn.draw(st.sampled_from(HOW)), candidates=3)
    free = [name for name, axis in graph.axes.items() if axis.obstacle is None]
    measurable = [name for name in free if obstacle(graph, name) is None]
    found = [
        p for name in measurable for p in score.propose(graph, [(x, None)], mean_square, [name])
    ]
    for proposal in found:
        grown = gg.apply(graph, proposal.rewrite)
        difference = gg.compare(graph, grown.graph, x)
        assert difference.train.relative <= 1e-10 and difference.eval.relative <= 1e-10
