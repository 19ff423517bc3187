"""Splitting and Firefly against their definitions: second derivatives and integrated gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import mean_square, networks
from test_moments import CASES, Case, batch, close, data, loss, row, traced
from test_scores import double
from torch import Tensor, nn

import graphgrow as gg
from graphgrow.measure.cost import flops, parameters
from graphgrow.scores.amplitude import amplify, mean_loss
from graphgrow.scores.firefly import Candidates, Firefly
from graphgrow.scores.splitting import smallest, splitting_matrices

NAMES = [
    *("hidden units", "without bias", "tokens", "channels", "strides and borders"),
    *("residual stage", "inside a residual block", "inside the groups", "a branch", "flattened"),
    *("averaged over space", "the middle of a squeeze", "inside a module called twice"),
]
SCORES = (gg.scores.Splitting(2), gg.scores.Firefly(3, descent=2))


def measured(case: Case, count: int = 12) -> tuple[gg.Graph, str, list[tuple[Tensor, Tensor]]]:
    model, graph = traced(case)
    return graph, graph.axis(case[1]).name, data(model, case, (count, count // 2))


@pytest.mark.parametrize("score", SCORES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_proposed_keeps_the_function_and_costs_what_it_says(name: str, score: Any) -> None:
    graph, axis, batches = measured(CASES[name])
    proposals = score.propose(graph, batches, loss, [axis])
    assert proposals
    for proposal in proposals:
        grown = gg.apply(graph, proposal.rewrite)
        assert gg.compare(graph, grown.graph, batches[0][0]).relative <= 1e-10
        assert proposal.parameters == parameters(grown.graph) - parameters(graph) > 0
        assert proposal.flops == flops(grown.graph) - flops(graph) > 0
        assert proposal.gain > 0


# ------------------------------------------------------------------------------ Splitting


def test_splitting_matrices_are_those_of_the_paper() -> None:
    """S = E[(g·ω) σ''(z) x xᵀ], the bias a weight of one."""
    graph, axis, batches = measured(CASES["hidden units"])
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    state = {path: tensor.detach() for path, tensor in graph.state.items()}
    z = x @ state["0.weight"].T + state["0.bias"]
    output = torch.tanh(z) @ state["2.weight"].T + state["2.bias"]
    wanted = 2 * (output - y) @ state["2.weight"]  # by example and unit
    bent = -2 * torch.tanh(z) * (1 - torch.tanh(z) ** 2)
    one = torch.cat([x, torch.ones(len(x), 1, dtype=torch.double)], 1)
    expected = torch.einsum("nu,ni,nj->uij", wanted * bent, one, one) / len(x)
    assert close(splitting_matrices(graph, axis, batches, loss), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_small_split_changes_the_loss_as_its_matrix_says(name: str) -> None:
    graph, axis, batches = measured(CASES[name])
    (proposal,) = gg.scores.Splitting(2, steps=64).propose(graph, batches, loss, [axis])
    grown = gg.apply(graph, proposal.rewrite)
    before = mean_loss(grown.graph, batches, loss)
    changes = []
    for step, back in ((1e-3, 0.0), (2e-3, 1e-3)):  # the next term is of fourth order
        proposal.target.add(grown, step - back)
        changes.append((before - mean_loss(grown.graph, batches, loss)) / step**2)
    assert (4 * changes[0] - changes[1]) / 3 == pytest.approx(proposal.gain, rel=1e-3)


@pytest.mark.parametrize("name", ["hidden units", "channels", "residual stage"])
def test_units_are_split_along_the_smallest_eigenvalues(name: str) -> None:
    graph, axis, batches = measured(CASES[name])
    (proposal,) = gg.scores.Splitting(2, steps=64).propose(graph, batches, loss, [axis])
    values, vectors = torch.linalg.eigh(splitting_matrices(graph, axis, batches, loss))
    best = values[:, 0].argsort()[:2]
    assert proposal.gain == pytest.approx(float(-values[best, 0].sum() / 2), rel=1e-10)
    assert proposal.rewrite.weights.sources == tuple(best.tolist())
    if name == "hidden units":  # one producer: its weights, then its bias
        rows = torch.cat([double(w) for _, w in reversed(proposal.target.weights)], 1)
        along = (rows[:2] * vectors[best, :, 0]).sum(1)
        assert close(along.abs(), torch.ones(2).double()) and close(rows[:2], -rows[2:])


def test_a_few_steps_of_lanczos_come_near_the_smallest_eigenvalue() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 40, 40, generator=generator, dtype=torch.double)
    a = a + a.mT
    a[2] = 0.0
    start = torch.randn(3, 40, generator=generator, dtype=torch.double)

    def times(v: Tensor) -> Tensor:
        return (a @ v[..., None])[..., 0]

    exact = torch.linalg.eigvalsh(a)[:, 0]
    values, vectors = smallest(times, start, 100)
    assert close(values, exact)
    assert close((vectors * times(vectors)).sum(1), exact)
    near, vectors = smallest(times, start, 12)
    assert (exact <= near + 1e-12).all() and near[0] < 0.9 * exact[0]
    assert close((vectors * times(vectors)).sum(1), near)


def test_rectified_units_are_not_split() -> None:
    case: Case = (lambda: row(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), "0", (3,))
    graph, axis, batches = measured(case)
    assert not splitting_matrices(graph, axis, batches, loss).any()
    assert gg.scores.Splitting().propose(graph, batches, loss) == []


def test_halves_go_apart_as_far_as_that_helps_on_held_out_examples() -> None:
    graph, axis, batches = measured(CASES["channels"], 40)
    (proposal,) = gg.scores.Splitting().propose(graph, batches[:1], loss, [axis])
    grown = gg.apply(graph, proposal.rewrite)
    found = amplify(grown, proposal, batches[1:], loss)
    assert found.after < found.before and found.amplitude != 0
    assert mean_loss(grown.graph, batches[1:], loss) == pytest.approx(found.after, rel=1e-12)
    assert mean_loss(graph, batches[1:], loss) == pytest.approx(found.before, rel=1e-12)


# ------------------------------------------------------------------------------ Firefly


@pytest.mark.parametrize("name", ["hidden units", "channels", "residual stage"])
def test_the_decreases_of_all_candidates_are_that_of_the_loss(name: str) -> None:
    graph, axis, batches = measured(CASES[name])
    candidates = Candidates(graph, axis, Firefly(), batches, loss)
    before = mean_loss(graph, batches, loss)
    candidates.descend()
    candidates.place(1.0)
    after = float(candidates.replica.loss(batches, loss).detach())
    total = float(candidates.decreases().sum())
    assert after < before and total == pytest.approx(before - after, rel=1e-6)


def test_each_candidate_is_judged_by_its_own_derivative() -> None:
    graph, axis, batches = measured(CASES["channels"])
    how = Firefly(new=2, step=0.3)
    candidates = Candidates(graph, axis, how, batches, loss)
    splits, _, outs = candidates.slopes(0.5)
    found = torch.cat(
        [
            (splits * candidates.splits).sum(1) * candidates.length,
            (outs * candidates.outs).sum(1) * candidates.reach,
        ]
    )
    directions = candidates.splits, candidates.outs

    def moved(k: int, by: float) -> float:
        """The loss with the ε of candidate k larger by a share."""
        scale = torch.ones(len(found), 1, dtype=torch.double)
        scale[k] += by
        width = len(directions[0])
        candidates.splits, candidates.outs = (
            directions[0] * scale[:width],
            directions[1] * scale[width:],
        )
        candidates.place(0.5)
        return float(candidates.replica.loss(batches, loss).detach())

    for k in range(len(found)):
        slope = (moved(k, 1e-5) - moved(k, -1e-5)) / (2e-5 * 0.5 * how.step)
        assert slope == pytest.approx(float(found[k]), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls_by_what_is_predicted_where_steps_are_small(name: str) -> None:
    graph, axis, batches = measured(CASES[name])
    before = mean_loss(graph, batches, loss)
    for proposal in gg.scores.Firefly(4, step=1e-4, descent=3).propose(
        graph, batches, loss, [axis]
    ):
        grown = gg.apply(graph, proposal.rewrite)
        proposal.target.add(grown, 1.0)
        measured_ = before - mean_loss(grown.graph, batches, loss)
        assert measured_ == pytest.approx(proposal.gain, rel=2e-2)


def test_new_units_and_split_ones_are_chosen_by_their_decrease() -> None:
    graph, axis, batches = measured(CASES["hidden units"])
    how = Firefly(3, descent=3)
    candidates = Candidates(graph, axis, how, batches, loss)
    candidates.descend()
    decreases = candidates.decreases()
    best = decreases.topk(3)
    proposals = how.propose(graph, batches, loss, [axis])
    assert sum(p.rewrite.units for p in proposals) == int((best.values > 0).sum())
    assert sum(p.gain for p in proposals) == pytest.approx(float(best.values.clamp(min=0).sum()))


@settings(max_examples=10)
@given(st.data())
def test_what_is_proposed_for_random_networks_is_exact(drawn: Any) -> None:
    network = drawn.draw(networks())
    graph, x = network.trace(), network.inputs(4)
    for score in (gg.scores.Splitting(1, steps=2), gg.scores.Firefly(2, new=1, descent=1)):
        for proposal in score.propose(graph, [(x, None)], mean_square):
            grown = gg.apply(graph, proposal.rewrite)
            difference = gg.compare(graph, grown.graph, x)
            assert difference.train.relative <= 1e-10 and difference.eval.relative <= 1e-10


def test_words_have_no_direction_that_is_not_a_table() -> None:
    graph, axis, batches = measured(CASES["word vectors"])
    for score in SCORES:
        for proposal in score.propose(graph, batches, loss, [axis]):
            grown = gg.apply(graph, proposal.rewrite)
            assert gg.compare(graph, grown.graph, batch(CASES["word vectors"], 3)).relative <= 1e-10
