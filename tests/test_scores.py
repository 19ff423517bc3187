"""Every score against its own definition, by brute force on small cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Tied, networks
from strategies import fill as filled
from test_moments import CASES, VECTOR, Case, batch, close, data, loss, row, traced
from torch import Tensor, nn

import graphgrow as gg
from graphgrow.measure.cost import flops, parameters
from graphgrow.moments import moments
from graphgrow.scores.amplitude import amplified, amplify, mean_loss, write
from graphgrow.scores.tiny import bottleneck, noise, solved

SMOOTH = [name for name in CASES if name not in ("called twice", "one weight in two layers")]
SCORES = (gg.scores.Tiny(2), gg.scores.GradMax(2), gg.scores.Random(2))


def double(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.double)


def measured(case: Case, count: int = 30) -> tuple[gg.Graph, Any, list[tuple[Tensor, Tensor]]]:
    model, graph = traced(case)
    batches = data(model, case, (count,))
    axis = graph.axis(case[1]).name
    return graph, moments(graph, batches, loss, [axis], project=True)[axis], batches


@pytest.mark.parametrize("score", SCORES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", CASES)
def test_what_is_proposed_keeps_the_function_and_costs_what_it_says(name: str, score: Any) -> None:
    graph, found, batches = measured(CASES[name], 8)
    for proposal in score.proposals(graph, {found.axis: found}):
        grown = gg.apply(graph, proposal.rewrite)
        assert gg.compare(graph, grown.graph, batches[0][0]).relative <= 1e-10
        assert grown.graph.axes[found.axis].width == graph.axes[found.axis].width + 2
        unique = {id(t): t.numel() for t in gg.lower(grown.graph).parameters()}
        before = {id(t): t.numel() for t in gg.lower(graph).parameters()}
        assert proposal.parameters == sum(unique.values()) - sum(before.values())
        assert proposal.flops == flops(grown.graph) - flops(graph) > 0
        assert parameters(graph) == sum(before.values())


def test_flops_are_those_of_the_forward_pass() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for name in ("strides and borders", "residual stage", "tokens", "inside the groups"):
        _, graph = traced(CASES[name])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            gg.lower(graph).eval()(batch(CASES[name], 2))
        assert flops(graph) * 2 == counter.get_total_flops()


# ------------------------------------------------------------------------------ TINY

PAIR: Case = (
    lambda: row(nn.Linear(3, 2), nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4)),
    "1",
    VECTOR,
)


def least_squares(b: Tensor, v: Tensor) -> Tensor:
    """What is left of `v` `(n, out)` that no layer of inputs `b` `(n, in)` gives."""
    return v - b @ torch.linalg.lstsq(b, v, driver="gelsd").solution


def seen(graph: gg.Graph, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the layer before the axis reads, what the one after reads, and its desired update."""
    model = gg.lower(graph).eval()
    one = torch.ones(len(x), 1, dtype=torch.double)
    before = model.get_submodule("0")(x)
    after = torch.tanh(model.get_submodule("1")(before))
    output = model.get_submodule("3")(after)
    (v,) = torch.autograd.grad(loss(output, y), output)
    return torch.cat([before, one], 1).detach(), torch.cat([after, one], 1).detach(), -len(x) * v


def test_the_bottleneck_falls_by_the_squared_singular_values() -> None:
    graph, found, ((x, y),) = measured(PAIR)
    before, after, v = seen(graph, x, y)
    left = least_squares(after, v)
    assert abs(bottleneck(found) - left.square().sum() / len(x)) < 1e-10 * bottleneck(found)
    values, alpha, omega = solved(found)
    for count in range(values.shape[1] + 1):
        update = before @ alpha[:count, 0].T @ omega[:count, 0]
        remains = (left - update).square().sum() / len(x)
        expected = bottleneck(found) - values[0, :count].square().sum()
        assert abs(remains - expected) < 1e-10 * bottleneck(found)
    best = least_squares(before, left).square().sum() / len(x)
    assert abs(remains - best) < 1e-10 * bottleneck(found)


def test_no_unit_takes_more_away_than_the_first() -> None:
    graph, found, ((x, y),) = measured(PAIR)
    before, after, v = seen(graph, x, y)
    left = least_squares(after, v)
    values, _, _ = solved(found)
    best = bottleneck(found) - values[0, 0].square()
    for seed in range(20):  # alternating least squares from anywhere goes to the same unit
        generator = torch.Generator().manual_seed(seed)
        alpha = torch.randn(3, 1, generator=generator, dtype=torch.double)
        for _ in range(200):
            omega = torch.linalg.lstsq(before @ alpha, left).solution
            alpha = torch.linalg.lstsq(before, left @ torch.linalg.pinv(omega)).solution
        omega = torch.linalg.lstsq(before @ alpha, left).solution
        remains = (left - before @ alpha @ omega).square().sum() / len(x)
        assert remains > best * (1 - 1e-10)


def test_units_found_in_two_rounds_are_those_found_in_one() -> None:
    """Corollary 1, at first order: what the first units do is no longer desired."""
    graph, found, ((x, y),) = measured(PAIR)
    before, after, v = seen(graph, x, y)
    values, alpha, omega = solved(found)
    left = least_squares(after, v) - before @ alpha[:1, 0].T @ omega[:1, 0]
    second = torch.linalg.svd(_root(before) @ (before.T @ left / len(x)))
    assert close(second.S[: values.shape[1] - 1], values[0, 1:])


def _root(x: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    kept = values > 1e-12 * values.max()
    return vectors[:, kept] @ torch.diag(values[kept] ** -0.5) @ vectors[:, kept].T


@pytest.mark.parametrize("name", SMOOTH)
def test_loss_falls_with_the_amplitude_as_predicted(name: str) -> None:
    graph, found, batches = measured(CASES[name])
    proposals = gg.scores.Tiny(2).proposals(graph, {found.axis: found})
    for proposal in proposals:
        grown = gg.apply(graph, proposal.rewrite, verify=False)
        start = mean_loss(grown.graph, batches, loss)

        slopes = []
        for gamma in (1e-6, 4e-6):
            write(grown, amplified(proposal, gamma))
            slopes.append((start - mean_loss(grown.graph, batches, loss)) / gamma)
        limit = 2 * slopes[0] - slopes[1]  # the next term is of order √γ
        assert abs(limit - proposal.gain) < 1e-3 * abs(proposal.gain) + 1e-8


@pytest.mark.parametrize("name", ["strides and borders", "channels", "residual stage"])
def test_with_kernels_each_unit_takes_its_squared_singular_value_at_least(name: str) -> None:
    """The unit's own effect on what consumers write, by the derivative of the wider model."""
    graph, found, batches = measured(CASES[name], 6)
    values, alpha, omega = solved(found)
    for k in range(2):
        wanted = (alpha[k] * torch.einsum("geo,go->ge", found.projected, omega[k])).sum()
        size = _effect(graph, found, alpha[k : k + 1], omega[k : k + 1], batches[0][0])
        assert 2 * wanted - size > values[:, k].square().sum() * (1 - 1e-8)


def _effect(graph: gg.Graph, found: Any, alpha: Tensor, omega: Tensor, x: Tensor) -> Tensor:
    """Mean over examples of the squared change of what consumers write, activations linear."""
    from graphgrow.scores.proposal import Site

    site = Site.of(graph, found, 1)
    start = gg.Given.of({**site.neutral(), **site.incoming(alpha)})
    grown = gg.apply(graph, gg.Widen(found.axis, 1, weights=start), verify=False)
    target = gg.Given.of(site.incoming(alpha), site.outgoing(omega))
    proposal = gg.scores.Proposal(grown.rewrites[0], 0.0, "", 0, 0, target)
    out: list[list[Tensor]] = []
    for gamma in (0.0, 1e-7):
        write(grown, amplified(proposal, gamma))
        model, rows = gg.lower(grown.graph).eval(), []
        for c in found.consumers:
            module = model.get_submodule(c.path.rpartition(".")[0])
            module.register_forward_hook(lambda m, i, o, rows=rows: rows.append(o.detach()))
        model(x)
        out.append(rows)
    # the first consumer alone: what later ones read has changed already
    return ((out[1][0] - out[0][0]) / 1e-7).square().sum() / len(x)


def test_the_line_search_lowers_the_loss_on_held_out_data_or_leaves_it() -> None:
    graph, found, _ = measured(CASES["channels"], 40)
    (proposal,) = gg.scores.Tiny(2).proposals(graph, {found.axis: found})
    grown = gg.apply(graph, proposal.rewrite)
    held = data(*_model(CASES["channels"]), (20,))
    result = amplify(grown, proposal, held, loss)
    assert result.after < result.before and result.amplitude != 0
    assert abs(mean_loss(grown.graph, held, loss) - result.after) < 1e-12 * result.after
    assert abs(mean_loss(graph, held, loss) - result.before) < 1e-12 * result.before
    again = gg.apply(graph, proposal.rewrite)
    kept = {path: t.detach().clone() for path, t in again.graph.state.items()}
    assert amplify(again, proposal, held, loss, [1e6]).amplitude == 0
    assert all(torch.equal(t, kept[path]) for path, t in again.graph.state.items())


def _model(case: Case) -> tuple[nn.Module, Case]:
    return traced(case)[0], case


def test_what_is_desired_at_random_is_not_significant() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 5, generator=generator, dtype=torch.double)
    y = torch.randn(4000, 4, generator=generator, dtype=torch.double)
    model = filled(row(nn.Linear(5, 1), nn.Tanh(), nn.Linear(1, 4)).double(), 0)
    graph = gg.trace(model, x[:2])
    found = moments(graph, [(x, y)], loss, ["0"], project=True)["0"]
    assert gg.scores.Tiny().proposals(graph, {"0": found}) == []
    assert solved(found)[0].max() > noise(found) / 3
    wanted = torch.sin(2 * x[:, :1]) + 0.1 * y
    found = moments(graph, [(x, wanted)], loss, ["0"], project=True)["0"]
    (proposal,) = gg.scores.Tiny().proposals(graph, {"0": found})
    assert proposal.rewrite.units == 1


# ------------------------------------------------------------------------------ GradMax


def gradients(grown: gg.Grown, paths: list[str], batches: Any) -> Tensor:
    """The squared norm of the gradient of new entries of some tensors."""
    model = gg.lower(grown.graph).eval()
    ((x, y),) = batches
    value = loss(model(x), y)
    tensors = [grown.graph.state[path] for path in paths]
    total = torch.zeros((), dtype=torch.double)
    for path, found in zip(paths, torch.autograd.grad(value, tensors), strict=True):
        new = torch.zeros(found.shape, dtype=torch.bool)
        for dim, index in enumerate(grown.origin[path].dims):
            if index is not None:
                new |= (index < 0).reshape([-1 if d == dim else 1 for d in range(found.dim())])
        total += found[new].square().sum()
    return total


RECTIFIED: Case = (lambda: row(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), "0", VECTOR)
GRADMAX = {
    "hidden units": CASES["hidden units"],
    "strides and borders": CASES["strides and borders"],
    "channels": CASES["channels"],
    "inside the groups": CASES["inside the groups"],
    "flattened": CASES["flattened"],
    "a branch": CASES["a branch"],
    "averaged over space": CASES["averaged over space"],
    "the middle of a squeeze": CASES["the middle of a squeeze"],
    "rectified": RECTIFIED,
}


@pytest.mark.parametrize("name", GRADMAX)
def test_gradmax_gets_the_gradient_that_it_predicts_and_no_other_gets_more(name: str) -> None:
    graph, found, batches = measured(GRADMAX[name])
    (proposal,) = gg.scores.GradMax(2).proposals(graph, {found.axis: found})
    grown = gg.apply(graph, proposal.rewrite)
    paths = [p.path for p in found.producers] + [p.bias for p in found.producers if p.bias]
    assert close(gradients(grown, paths, batches), double(proposal.gain))
    assert proposal.gain > 0
    weights = dict(proposal.rewrite.weights.outgoing)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):  # two orthogonal directions of the same norm in each part
        other = {}
        for c in found.consumers:
            size = found.parts, (c.columns.stop - c.columns.start), 2
            basis = torch.linalg.qr(torch.randn(size, generator=generator, dtype=torch.double)).Q
            norm = double(weights[c.path]).norm(dim=1).mean() / found.parts**0.5
            other[c.path] = (norm * basis).permute(2, 0, 1).flatten(1)
        scheme = gg.Given(proposal.rewrite.weights.incoming, gg.Given.of(None, other).outgoing)
        rival = gg.apply(graph, gg.Widen(found.axis, 2, weights=scheme), verify=False)
        assert gradients(rival, paths, batches) <= proposal.gain * (1 + 1e-9)


def test_the_first_unit_of_gradmax_is_the_best_that_ascent_finds() -> None:
    graph, found, _ = measured(CASES["hidden units"])
    (proposal,) = gg.scores.GradMax(1).proposals(graph, {found.axis: found})
    omega = double(dict(proposal.rewrite.weights.outgoing)["2.weight"][0])
    best = max(_ascended(found.cross[0], omega.norm(), seed) for seed in range(5))
    assert abs(best - proposal.gain) < 1e-8 * best


def _ascended(cross: Tensor, norm: Tensor, seed: int) -> float:
    omega = torch.randn(cross.shape[1], generator=torch.Generator().manual_seed(seed)).double()
    for _ in range(2000):
        omega = F.normalize(omega + cross.T @ (cross @ omega), dim=0) * norm
    return float((cross @ omega).square().sum())


def test_random_units_get_the_gradient_that_is_predicted() -> None:
    case: Case = (lambda: row(nn.Linear(3, 4), nn.Identity(), nn.Linear(4, 2)), "0", VECTOR)
    graph, found, batches = measured(case)
    (proposal,) = gg.scores.Random(3, seed=5).proposals(graph, {found.axis: found})
    grown = gg.apply(graph, proposal.rewrite)
    assert close(gradients(grown, ["2.weight"], batches), double(proposal.gain))


def test_units_that_would_add_a_constant_are_not_proposed_by_tiny() -> None:
    case: Case = (lambda: row(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)), "0", VECTOR)
    graph, found, _ = measured(case)
    assert gg.scores.Tiny(1).proposals(graph, {found.axis: found}) == []
    assert len(gg.scores.GradMax(1).proposals(graph, {found.axis: found})) == 1


@pytest.mark.parametrize("score", SCORES, ids=lambda s: type(s).__name__)
def test_a_tied_weight_gets_no_proposal(score: Any) -> None:
    graph, found, _ = measured((lambda: row(Tied(3, 4), nn.Linear(3, 2)), "0.encoder", VECTOR), 5)
    assert score.proposals(graph, {found.axis: found}) == []


@settings(max_examples=15)
@given(st.data())
def test_what_is_proposed_for_random_networks_is_exact(drawn: Any) -> None:
    network = drawn.draw(networks())
    graph, x = network.trace(), network.inputs(4)

    def small(output: Tensor, target: None) -> Tensor:
        return output.square().flatten(1).sum(1).mean()

    found = moments(graph, [(x, None)], small, project=True)
    for score in (gg.scores.Tiny(1), gg.scores.GradMax(1), gg.scores.Random(1)):
        for proposal in score.proposals(graph, found):
            gg.apply(graph, proposal.rewrite)
