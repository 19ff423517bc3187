"""Every score against its own definition, by brute force on small cases."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Tied, mean_square, networks
from strategies import fill as filled
from test_moments import CASES, IMAGE, VECTOR, Case, batch, close, data, loss, row, traced
from torch import Tensor, nn

import graphgrow as gg
from graphgrow.measure.cost import flops, parameters
from graphgrow.moments import moments
from graphgrow.scores.amplitude import advance, amplify, go, mean_loss
from graphgrow.scores.gradmax import _simplex
from graphgrow.scores.proposal import Site
from graphgrow.scores.tangent import output_bottleneck
from graphgrow.scores.tiny import beside, best_step, bottleneck, noise, placed, solved, unseen

SMOOTH = [name for name in CASES if name not in ("called twice", "one weight in two layers")]
TOGETHER = gg.scores.Tiny(2, joint=True)
SCORES = (gg.scores.Tiny(2), TOGETHER, gg.scores.GradMax(2), gg.scores.Random(2))


def double(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.double)


def measured(case: Case, count: int = 30) -> tuple[gg.Graph, Any, list[tuple[Tensor, Tensor]]]:
    model, graph = traced(case)
    batches = data(model, case, (count,))
    axis = graph.axis(case[1]).name
    found = moments(graph, batches, loss, [axis], project=True, overlap=True)[axis]
    return graph, found, batches


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


@pytest.mark.parametrize(
    ("score", "small"), [(gg.scores.Tiny(2), 1e-6), (TOGETHER, 1e-8)], ids=["units", "joint"]
)
@pytest.mark.parametrize("name", SMOOTH)
def test_loss_falls_with_the_amplitude_as_predicted(name: str, score: Any, small: float) -> None:
    graph, found, batches = measured(CASES[name])
    proposals = score.proposals(graph, {found.axis: found})
    for proposal in proposals:
        slopes = []
        for gamma in (small, 4 * small):
            grown = gg.apply(apart(graph), proposal.rewrite, verify=False)
            start = mean_loss(grown.graph, batches, loss)
            go(grown, proposal, gamma)
            slopes.append((start - mean_loss(grown.graph, batches, loss)) / gamma)
        limit = 2 * slopes[0] - slopes[1]  # the next term is of order √γ
        assert abs(limit - proposal.gain) < 1e-3 * abs(proposal.gain) + 1e-8


@pytest.mark.parametrize("name", ["strides and borders", "channels", "residual stage"])
def test_with_kernels_each_unit_takes_its_squared_singular_value_at_least(name: str) -> None:
    """The unit's own effect on what consumers write, by the derivative of the wider model."""
    graph, found, batches = measured(CASES[name], 6)
    values, alpha, omega = solved(found)
    for k in range(2):
        unit = torch.einsum("ge,go->geo", alpha[k], omega[k])
        wanted = (found.projected * unit).sum()
        moved = _effect(graph, found, (alpha[k : k + 1], omega[k : k + 1]), {}, batches[0][0])
        size = moved.square().sum() / len(batches[0][0])
        assert 2 * wanted - size > values[:, k].square().sum() * (1 - 1e-8)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", ["one position", "channels", "tokens"])
def test_what_is_left_of_the_bottleneck_is_as_predicted(name: str, joint: bool) -> None:
    """Units and update as the model has them: exact without kernels, else at least as much."""
    pointwise: Case = (lambda: row(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 1)), "0", IMAGE)
    graph, found, ((x, y),) = measured(CASES.get(name, pointwise), 40)
    values, alpha, omega = solved(found, joint=joint)
    (consumer,) = found.consumers
    for k in (1, 2) if name != "channels" else (1,):
        units = torch.einsum("kge,kgo->geo", alpha[:k], omega[:k])
        step = placed(graph, found, beside(found, units)) if joint else best_step(graph, found)
        moved = _effect(graph, found, (alpha[:k], omega[:k]), step, x)
        left = (_wanted(graph, consumer.path, x, y) - moved).square().sum() / len(x)
        expected = bottleneck(found) - values[:, :k].square().sum()
        rounding = 1e-6 * values[:, :k].square().sum()
        assert left < expected + rounding
        assert name == "channels" or left > expected - rounding


def test_a_kernel_over_flat_images_takes_no_more_than_there_is() -> None:
    """Where all places of a kernel read the same, the bound behind it is tight."""
    case: Case = (lambda: row(nn.Conv2d(2, 4, 1), nn.Tanh(), nn.Conv2d(4, 2, 3)), "0", (2, 12, 12))
    model, graph = traced(case)
    x = batch(case, 40)[:, :, :1, :1].expand(-1, -1, 12, 12)
    y = torch.cos(3 * model(x)).detach()
    found = moments(graph, [(x, y)], loss, ["0"], project=True, overlap=True)["0"]
    for joint in (False, True):
        values, alpha, omega = solved(found, joint=joint)
        units = torch.einsum("kge,kgo->geo", alpha[:1], omega[:1])
        step = placed(graph, found, beside(found, units)) if joint else best_step(graph, found)
        moved = _effect(graph, found, (alpha[:1], omega[:1]), step, x)
        left = (_wanted(graph, "2.weight", x, y) - moved).square().sum() / len(x)
        assert left < bottleneck(found) - values[:, 0].square().sum() * (1 - 1e-6)


def _wanted(graph: gg.Graph, path: str, x: Tensor, y: Tensor) -> Tensor:
    """The desired update of what a layer writes."""
    model, written = gg.lower(graph).eval(), []
    layer = model.get_submodule(path.rpartition(".")[0])
    layer.register_forward_hook(lambda module, read, output: written.append(output))
    (slope,) = torch.autograd.grad(loss(model(x), y), written)
    return -len(x) * slope


def _effect(graph: gg.Graph, found: Any, weights: Any, step: Any, x: Tensor) -> Tensor:
    """How the first consumer's output moves with units at their weights and present ones."""
    alpha, omega = weights
    site = Site.of(graph, found, len(alpha))
    start = gg.Given.of({**site.neutral(), **site.incoming(alpha)})
    target = gg.Given.of(site.incoming(alpha), site.outgoing(omega))
    rewrite = gg.Widen(found.axis, len(alpha), weights=start)
    proposal = gg.scores.Proposal(rewrite, 0.0, "", 0, 0, target, step)
    out: list[Tensor] = []
    for gamma in (0.0, 1e-8):
        grown = gg.apply(apart(graph), rewrite, verify=False)
        go(grown, proposal, gamma)
        model = gg.lower(grown.graph).eval()
        layer = model.get_submodule(found.consumers[0].path.rpartition(".")[0])
        layer.register_forward_hook(lambda module, read, output: out.append(output.detach()))
        model(x)
    # the first consumer alone: what later ones read has changed already
    return (out[-1] - out[0]) / 1e-8


def apart(graph: gg.Graph) -> gg.Graph:
    """The same graph with tensors of its own."""
    return gg.trace(copy.deepcopy(gg.lower(graph)), *graph.example)


def test_units_and_present_weights_together_take_most_away() -> None:
    """The joint problem against rank-one updates found by alternation, and against the greedy."""
    graph, found, ((x, y),) = measured(PAIR)
    before, after, v = seen(graph, x, y)
    values, alpha, omega = solved(found, joint=True)
    for count in (1, 2, 3):
        unit = torch.einsum("kge,kgo->geo", alpha[:count], omega[:count])
        own = before @ unit[0]
        (step,) = beside(found, unit).values()
        remains = (v - own - after @ step[0]).square().sum() / len(x)
        expected = bottleneck(found) - values[0, :count].square().sum()
        assert abs(remains - expected) < 1e-10 * bottleneck(found)
        assert values[0, :count].norm() > solved(found)[0][0, :count].norm()
    rest, left = least_squares(after, before), least_squares(after, v)
    best = bottleneck(found) - values[0, 0].square()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        one = torch.randn(3, 1, generator=generator, dtype=torch.double)
        for _ in range(200):
            two = torch.linalg.lstsq(rest @ one, left).solution
            one = torch.linalg.lstsq(rest, left @ torch.linalg.pinv(two), driver="gelsd").solution
        two = torch.linalg.lstsq(rest @ one, left).solution
        assert (left - rest @ one @ two).square().sum() / len(x) > best * (1 - 1e-10)


@pytest.mark.parametrize("name", ["strides and borders", "inside the groups", "flattened"])
def test_the_overlap_gives_what_a_second_pass_projects(name: str) -> None:
    _, found, _ = measured(CASES[name], 100)
    assert bottleneck(found) > 1e-2 and found.projected is not None
    assert (unseen(found)[1] - found.projected).abs().max() < 1e-8 * found.cross.abs().max()


def test_growing_in_two_rounds_gives_what_one_gives() -> None:
    """Corollary 1, on a linear network with a quadratic loss, where first order is all there is."""

    def half(output: Tensor, target: Tensor) -> Tensor:
        return loss(output, target) / 2

    def grown(*rounds: int) -> tuple[float, list[float]]:
        model = filled(row(nn.Linear(6, 1), nn.Linear(1, 5)).double(), 3)
        graph, losses = gg.trace(model, x[:2]), []
        for count in rounds:
            found = moments(graph, [(x, y)], half, ["0"], overlap=True)
            score = gg.scores.Tiny(count, joint=True)
            (proposal,) = score.proposals(graph, found)
            result = gg.apply(graph, proposal.rewrite)
            go(result, proposal, 1.0)
            graph = result.graph
            losses.append(mean_loss(graph, [(x, y)], half))
        return losses[-1], losses

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator, dtype=torch.double)
    y = torch.randn(40, 5, generator=generator, dtype=torch.double)
    once, _ = grown(3)
    twice, (first, second) = grown(1, 2)
    assert abs(once - twice) < 1e-10 * once and second < 0.99 * first
    assert abs(grown(2, 1)[0] - once) < 1e-10 * once


@pytest.mark.parametrize("name", ["hidden units", "strides and borders", "inside the groups"])
def test_the_best_step_of_present_weights_is_that_of_least_squares(name: str) -> None:
    """Their effect on what the layer writes, against every other direction."""
    graph, found, ((x, y),) = measured(CASES[name], 12)
    step = best_step(graph, found)
    (consumer,) = found.consumers
    model = gg.lower(graph).eval()
    layer, read = model.get_submodule(consumer.path.rpartition(".")[0]), []
    layer.register_forward_hook(lambda m, i, o: read.extend([i[0].detach(), o]))
    output = model(x)
    (slope,) = torch.autograd.grad(loss(output, y), read[1], retain_graph=True)
    names = {path: path.rpartition(".")[2] for path in step}
    weights = {name: step[path] for path, name in names.items()}
    left = -len(x) * slope - torch.func.functional_call(layer, weights, (read[0],))
    assert abs(left.square().sum() / len(x) - bottleneck(found)) < 1e-9 * bottleneck(found)
    gradient = torch.func.vjp(lambda w: torch.func.functional_call(layer, w, (read[0],)), weights)
    assert all(g.abs().max() < 1e-9 * len(x) for g in gradient[1](left)[0].values())


def test_going_along_the_best_step_lowers_the_loss_as_predicted() -> None:
    graph, found, batches = measured(CASES["channels"])
    step, own = best_step(graph, found), apart(graph)
    slope = sum(float((step[c.path] * g).sum()) for c, g in _desired(graph, found))
    slope += sum(float((step[c.bias] * c.desired[0, -1]).sum()) for c in found.consumers)
    result = advance(own, step, batches, loss, [1e-7])
    assert abs((result.before - result.after) / 1e-7 - slope) < 1e-4 * slope
    assert advance(own, step, batches, loss).after < result.after
    kept = {path: t.detach().clone() for path, t in own.state.items()}
    assert advance(own, step, batches, loss, [1e9]).amplitude == 0
    assert all(torch.equal(t, kept[path]) for path, t in own.state.items())


def _desired(graph: gg.Graph, found: Any) -> Any:
    for c in found.consumers:
        rows = c.desired[:, :-1].mT.flatten(0, 1)
        yield c, rows.reshape(graph.state[c.path].shape)


def test_the_bottleneck_at_the_output_is_that_of_the_jacobian() -> None:
    model = filled(row(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 3)).double(), 0)
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    y = torch.cos(3 * model(x)).detach()
    graph = gg.trace(model, x[:2])
    found = output_bottleneck(graph, [(x[:4], y[:4]), (x[4:], y[4:])], loss)
    weights = dict(model.named_parameters())
    jacobian = torch.func.jacrev(lambda w: torch.func.functional_call(model, w, (x,)))(weights)
    columns = torch.cat([jacobian[path].reshape(27, -1) for path in weights], 1).detach()
    v = 2 * (y - model(x)).detach().reshape(27, 1)
    left = least_squares(columns, v)
    assert abs(found.desired - v.square().sum() / 9) < 1e-10 * found.desired
    assert abs(found.bottleneck - left.square().sum() / 9) < 1e-8 * found.desired
    moved = columns @ torch.cat([found.update[path].flatten() for path in weights])[:, None]
    assert (moved - (v - left)).abs().max() < 1e-5 * v.abs().max()
    layer = moments(graph, [(x, y)], loss, ["0"])["0"]
    assert found.bottleneck < bottleneck(layer)  # of the last layer's weights alone


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


@pytest.mark.parametrize("kind", [torch.double, torch.float])
def test_gradmax_is_exact_and_alive_where_no_constant_can_be_folded(kind: torch.dtype) -> None:
    """ReLU before a convolution that pads with zeros: constants cancel among the new units."""
    first, second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1, bias=False)
    model = filled(row(first, nn.BatchNorm2d(4), nn.ReLU(), second).double(), 1).to(kind)
    x = batch((lambda: model, "0", IMAGE), 20).to(kind)
    y = torch.cos(3 * model.eval()(x)).detach()
    graph = gg.trace(model, x[:2])
    found = moments(graph, [(x, y)], loss, ["0"])["0"]
    assert gg.scores.GradMax(1).proposals(graph, {"0": found}) == []
    (proposal,) = gg.scores.GradMax(3).proposals(graph, {"0": found})
    grown = gg.apply(graph, proposal.rewrite)
    assert gg.compare(graph, grown.graph, x).relative < 1e-10
    ((_, given),) = proposal.rewrite.weights.outgoing
    omega = double(given)
    assert torch.equal(omega.sum(0), torch.zeros(27, dtype=torch.double))
    sizes, gained = omega.norm(dim=1), gradients(grown, ["0.weight", "0.bias"], [(x, y)])
    assert (sizes / sizes.mean() - 1).abs().max() < 1e-5
    assert abs(gained / proposal.gain - 1) < (1e-9 if kind is torch.double else 1e-3)
    alone = torch.autograd.grad(loss(gg.lower(grown.graph)(x), y), grown.graph.state["0.weight"])
    assert alone[0][-3:].flatten(1).norm(dim=1).min() > 0
    generator, best = torch.Generator().manual_seed(0), (found.cross[0] @ omega.T).square().sum()
    for _ in range(20):  # corners of a simplex over other directions of the same length
        basis = torch.linalg.qr(torch.randn(27, 2, generator=generator, dtype=torch.double)).Q
        rival = sizes.mean() * _simplex(3) @ basis.T
        assert (found.cross[0] @ rival.T).square().sum() < best * (1 + 1e-6)


def test_gradmax_scales_new_units_by_the_present_ones() -> None:
    for name in ("hidden units", "channels", "residual stage"):
        graph, found, _ = measured(CASES[name])
        axis = graph.axes[found.axis]
        weights = [
            gg.lower(graph).get_parameter(at.path).movedim(at.dim, 0) for at in axis.consumers
        ]
        mean = torch.cat([w.flatten(1) for w in weights], 1).norm(dim=1).mean().item()
        for score, size in (
            (gg.scores.GradMax(2), mean / 2),
            (gg.scores.GradMax(2, norm=0.1), 0.1),
        ):
            (proposal,) = score.proposals(graph, {found.axis: found})
            outgoing = torch.cat([double(w) for _, w in proposal.rewrite.weights.outgoing], 1)
            assert close(outgoing.norm(dim=1), double(size).expand(2))


def test_a_step_of_gradmax_goes_along_the_gradient_of_its_incoming_weights() -> None:
    graph, found, batches = measured(CASES["channels"])
    (proposal,) = gg.scores.GradMax(2).proposals(graph, {found.axis: found})
    grown = gg.apply(graph, proposal.rewrite)
    start = mean_loss(grown.graph, batches, loss)
    go(grown, proposal, 1e-6)
    slope = (start - mean_loss(grown.graph, batches, loss)) / 1e-6
    assert slope == pytest.approx(proposal.gain, rel=1e-3)


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
    found = moments(graph, [(x, None)], mean_square, project=True)
    for score in (gg.scores.Tiny(1), gg.scores.GradMax(1), gg.scores.Random(1)):
        for proposal in score.proposals(graph, found):
            gg.apply(graph, proposal.rewrite)
