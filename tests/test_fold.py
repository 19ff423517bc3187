"""Folding against its definitions: affine segments, fold points, the units that fold there."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Residual, networks
from strategies import fill as filled
from test_moments import row
from test_scores import close, double
from torch import Tensor, nn

import graphgrow as gg
from graphgrow.measure.replica import Replica
from graphgrow.measure.segment import boundary, margin, segment, surface
from graphgrow.scores.fold import Crease, deepening


def mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for into, out in itertools.pairwise(widths):
        layers += [nn.Linear(into, out), nn.ReLU()]
    return row(*layers[:-1])


def images() -> nn.Module:
    return row(
        nn.Conv2d(2, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        Residual(row(nn.Conv2d(3, 4, 3, padding=1), nn.LeakyReLU(), nn.Conv2d(4, 3, 1)), nn.ReLU()),
        nn.Conv2d(3, 2, 2),
        nn.Flatten(),
        nn.Linear(2, 3),
    )


NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "shallow": (lambda: mlp(3, 6, 3), (3,)),
    "deep": (lambda: mlp(3, 5, 4, 5, 3), (3,)),
    "images": (images, (2, 4, 4)),
}


def traced(name: str, seed: int = 0) -> tuple[gg.Graph, Tensor, Tensor]:
    """The graph of a network with random numbers, examples and classes that it often misses."""
    make, shape = NETWORKS[name]
    torch.manual_seed(seed)
    model = filled(make().double(), seed)
    x = torch.randn(60, *shape, dtype=torch.double)
    y = (x.flatten(1)[:, :3] * double([1.0, -1.0, 2.0])).argmax(1)
    last = model[len(model) - 1]
    with torch.no_grad():  # each class is given now and then
        last.bias -= copy.deepcopy(model).eval()(x).mean(0)
    return gg.trace(model, x[:2]), x, y


# ------------------------------------------------------------------------------ segments


@pytest.mark.parametrize("name", NETWORKS)
def test_a_segment_is_the_network_at_a_point_and_around_it(name: str) -> None:
    for seed in range(5):
        graph, x, _ = traced(name, seed)
        model = gg.lower(graph).eval()
        piece = segment(graph, x[0])
        for away in torch.randn(5, *x[0].shape, dtype=torch.double):
            at = x[0] + 1e-7 * away
            expected = model(at[None]).flatten().detach()
            assert close(piece.weight @ at.flatten() + piece.bias, expected)


def test_a_segment_of_a_shallow_network_is_the_product_of_what_is_active() -> None:
    graph, x, _ = traced("shallow")
    state = graph.state
    active = (state["0.weight"] @ x[1] + state["0.bias"] > 0).double()
    piece = segment(graph, x[1])
    assert close(piece.weight, state["2.weight"] @ torch.diag(active) @ state["0.weight"])
    assert close(piece.bias, state["2.weight"] @ (active * state["0.bias"]) + state["2.bias"])


def test_what_bends_at_the_point_has_no_segment() -> None:
    graph = gg.trace(
        row(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.ones(2, 3).double()
    )
    with pytest.raises(gg.NotApplicable, match="piecewise linear"):
        segment(graph, torch.ones(3))


# ------------------------------------------------------------------------------ fold points


@pytest.mark.parametrize("name", NETWORKS)
def test_a_fold_point_is_on_the_decision_boundary(name: str) -> None:
    found = 0
    for seed in range(5):
        graph, x, y = traced(name, seed)
        model = gg.lower(graph).eval()
        creases = gg.scores.Fold(3).creases(graph, x, y, F.cross_entropy)
        for crease in creases:
            at = next(k for k in range(len(x)) if torch.equal(x[k], crease.mistake))
            given_, right = model(x[at : at + 1])[0].argmax(), y[at]
            assert given_ != right
            scores = model(crease.point[None])[0]
            if abs(scores[given_] - scores[right]) < 1e-7 * (1 + scores.abs().max()):
                found += 1
                continue
            every = model(x).detach()  # where the two are never told apart: the segment's boundary
            assert (every[:, given_] > every[:, right]).all()
            piece = segment(graph, crease.mistake)
            if not (piece.weight[given_] - piece.weight[right]).any():
                right_ones = x[every.argmax(1) == y]
                nearest = (right_ones - x[at]).flatten(1).norm(dim=1).argmin()
                assert close(crease.point, (x[at] + right_ones[nearest]) / 2)
                continue
            scores = piece.weight @ crease.point.flatten() + piece.bias
            assert abs(scores[given_] - scores[right]) < 1e-7 * (1 + scores.abs().max())
    assert found > 6


def test_on_one_segment_no_point_of_the_boundary_is_nearer() -> None:
    graph, x, _ = traced("shallow", 2)
    replica = Replica(graph)
    mix = double([1.0, -1.0, 0.0])
    nearest = 0
    for point in x[:20]:
        found = boundary(replica, point, mix)
        piece = segment(graph, point)
        w, m = mix @ piece.weight, margin(replica, point, mix)
        if found is None:
            continue
        if not close(found, point - m * w / (w @ w)):
            continue  # the step left the segment: another point of the boundary was taken
        nearest += 1
        distance = (found - point).norm()
        flat = lambda p, w=w, piece=piece: w @ p + mix @ piece.bias  # noqa: E731
        for away in torch.randn(200, 3, dtype=torch.double):
            closer = point + 0.999 * distance * away / away.norm()
            assert flat(closer) * flat(point) > 0
    assert nearest > 3


def test_a_region_where_nothing_is_active_folds_towards_the_other_side() -> None:
    model = mlp(2, 2, 2).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[0].bias.zero_()
        model[2].weight.copy_(double([[0.0, 0.0], [2.0, 2.0]]))
        model[2].bias.copy_(double([1.0, 0.0]))
    graph = gg.trace(model, torch.zeros(2, 2).double())
    dead, other = double([-1.0, -1.0]), double([1.0, 1.0])
    assert not segment(graph, dead).weight.any()
    assert boundary(Replica(graph), dead, double([1.0, -1.0])) is None
    found = boundary(Replica(graph), dead, double([1.0, -1.0]), [other])
    assert found is not None and close(found, double([0.25, 0.25]))


def test_where_steps_overshoot_the_boundary_between_them_is_found() -> None:
    model = mlp(1, 4, 1).double()
    with (
        torch.no_grad()
    ):  # steep between -0.1 and 0.1 only: steps from outside go further and further
        model[0].weight.copy_(double([[1.0], [-1.0], [1.0], [-1.0]]))
        model[0].bias.copy_(double([0.0, 0.0, -0.1, -0.1]))
        model[2].weight.copy_(double([[10.0, -10.0, -9.5, 9.5]]))
        model[2].bias.zero_()
    graph = gg.trace(model, torch.zeros(2, 1).double())
    found = boundary(Replica(graph), double([1.0]), double([1.0]))
    assert found is not None and abs(float(found)) < 1e-12


def test_a_regression_folds_at_the_nearest_point_of_its_surface() -> None:
    graph, x, _ = traced("deep")
    y = double([1.0, -2.0, 0.5])
    found = surface(Replica(graph), x[0], y)
    piece, moved = segment(graph, x[0]), x[0].clone().requires_grad_()
    search = torch.optim.LBFGS([moved], max_iter=40, tolerance_grad=1e-13, tolerance_change=1e-16)

    def distance() -> Tensor:
        search.zero_grad()
        missing = y - piece.weight @ moved - piece.bias
        value = (moved - x[0]).square().sum() + missing.square().sum()
        value.backward()
        return value

    search.step(distance)
    assert (found - moved.detach()).norm() < 1e-6 * (1 + found.norm())


def test_the_typical_mistake_is_amid_the_cluster_of_the_largest_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    spots = double([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    x = torch.cat([s + torch.randn(20, 2, generator=generator, dtype=torch.double) for s in spots])
    y = torch.cat([torch.full((20, 1), level).double() for level in (2.0, 3.0, 2.5)])
    model = mlp(2, 1, 1).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    graph = gg.trace(model, x[:2])
    creases = gg.scores.Fold(3, clusters=3).creases(graph, x, y, F.mse_loss)
    assert [int((crease.mistake - spots).norm(dim=1).argmin()) for crease in creases] == [1, 2, 0]
    for crease, spot in zip(creases, spots[[1, 2, 0]], strict=True):
        cluster = x[(x - spot).norm(dim=1) < 4.5]
        centre = cluster.mean(0)  # the loss is the same all over a cluster
        assert (crease.mistake - centre).norm() == (cluster - centre).norm(dim=1).min()


def test_clusters_are_weighted_by_the_loss() -> None:
    graph, x, _ = traced("shallow")
    y = gg.lower(graph)(x).detach() + 3 * x.clamp(min=0)
    losses = 3 * x.clamp(min=0).square().sum(1)
    ((crease),) = gg.scores.Fold(1, clusters=1).creases(graph, x, y, F.mse_loss)
    centre = (losses @ x) / losses.sum()
    assert torch.equal(crease.mistake, x[(x - centre).norm(dim=1).argmin()])
    assert not torch.equal(crease.mistake, x[(x - x.mean(0)).norm(dim=1).argmin()])


# ------------------------------------------------------------------------------ new units


def proposed(name: str, seed: int = 0, **options: Any) -> Any:
    graph, x, y = traced(name, seed)
    score = gg.scores.Fold(2, **options)
    creases = score.creases(graph, x, y, F.cross_entropy)
    return graph, creases, score.propose(graph, [(x, y)], F.cross_entropy), [(x, y)]


def written(graph: gg.Graph, path: str, at: Tensor) -> Tensor:
    """What a module gives to the example `at`."""
    model, seen = gg.lower(graph).eval(), []
    model.get_submodule(path).register_forward_hook(lambda m, i, o: seen.append(o.detach()))
    model(at[None])
    return seen[0][0]


@pytest.mark.parametrize("align", [0.1, 0.7, 1.0])
@pytest.mark.parametrize("name", ["shallow", "deep"])
def test_a_new_unit_is_zero_at_its_fold_point_and_active_at_the_mistake(
    name: str, align: float
) -> None:
    graph, creases, proposals, _ = proposed(name, align=align)
    assert [p.rewrite.axis for p in proposals] == [
        name for name in graph.axes if graph.axes[name].obstacle is None
    ]
    for proposal in proposals:
        path = proposal.rewrite.axis
        grown = gg.apply(graph, proposal.rewrite).graph
        width = graph.axes[path].width
        for k, crease in enumerate(creases):
            here, there = (
                written(grown, path, at)[width + k] for at in (crease.point, crease.mistake)
            )
            assert abs(here) < 1e-12 < there
            before = path if path == "0" else str(int(path) - 1)
            reads = [written(grown, before, at) for at in (crease.mistake, crease.point)]
            inputs = [crease.mistake, crease.point] if path == "0" else reads
            normal = inputs[0] - inputs[1]
            w = grown.state[f"{path}.weight"][width + k].detach()[: len(normal)]
            assert normal @ w >= (align - 1e-9) * normal.norm() * w.norm()
            present = graph.state[f"{path}.weight"].detach().norm(dim=1).mean()
            assert abs(w.norm() - present) < 1e-10 * present


def test_in_a_convolution_the_fold_is_where_present_units_differ_most() -> None:
    graph, creases, proposals, _ = proposed("images")
    assert {p.rewrite.axis for p in proposals} == {"0", "4.branch.0", "5"}
    after = {"0": "1", "4.branch.0": "4.branch.0", "5": "5"}  # the first layer's bias is its norm's
    for proposal in proposals:
        path, grown = proposal.rewrite.axis, gg.apply(graph, proposal.rewrite).graph
        width = graph.axes[path].width
        for k, crease in enumerate(creases):
            raw = [written(grown, path, at) for at in (crease.mistake, crease.point)]
            at = (raw[0] - raw[1])[:width].abs().sum(0).argmax()
            shifted = [
                written(grown, after[path], p)[width + k].flatten()[at]
                for p in (crease.mistake, crease.point)
            ]
            assert abs(shifted[1]) < 1e-12 < shifted[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_gradient_of_outgoing_weights_is_what_is_predicted(name: str) -> None:
    graph, _, proposals, batches = proposed(name)
    ((x, y),) = batches
    for proposal in proposals:
        grown = gg.apply(graph, proposal.rewrite)
        total, slope = 0.0, 0.0
        for path, line in proposal.target.weights:
            grad = gradient_by(grown, path, x, y).movedim(1, 0).flatten(1)
            new = grad[grown.origin[path].dims[1] < 0].reshape(len(line), -1)
            total += float(new.square().sum())
            slope -= float((new * double(line)).sum())
            assert (F.cosine_similarity(new, double(line)) < -1 + 1e-9).all()
        assert total == pytest.approx(proposal.gain, rel=1e-9)
        before = mean(grown.graph, x, y)
        proposal.target.add(grown, 1e-6)
        assert (before - mean(grown.graph, x, y)) / 1e-6 == pytest.approx(slope, rel=1e-3)


def gradient_by(grown: gg.Grown, path: str, x: Tensor, y: Tensor) -> Tensor:
    value = F.cross_entropy(gg.lower(grown.graph).eval()(x), y)
    return torch.autograd.grad(value, grown.graph.state[path])[0]


def mean(graph: gg.Graph, x: Tensor, y: Tensor) -> float:
    return float(F.cross_entropy(gg.lower(graph).eval()(x), y).detach())


def test_no_direction_on_a_circle_has_a_larger_gradient() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(80, 2, generator=generator, dtype=torch.double)
    y = (x[:, 1] > torch.sin(2 * x[:, 0])).long()
    model = filled(mlp(2, 2, 2).double(), 1)
    graph = gg.trace(model, x[:2])
    (crease,) = gg.scores.Fold().creases(graph, x, y, F.cross_entropy)
    normal = crease.mistake - crease.point
    for align in (0.0, 0.5, 0.9):
        (proposal,) = gg.scores.Fold(align=align, steps=40).propose(
            graph, [(x, y)], F.cross_entropy
        )
        length = double(dict(proposal.rewrite.weights.incoming)["0.weight"]).norm()
        best = 0.0
        for angle in torch.linspace(0, 6.2832, 361, dtype=torch.double):
            w = torch.stack([angle.cos(), angle.sin()]) * length
            if w @ normal >= align * w.norm() * normal.norm():
                best = max(best, gain_of(graph, w, crease, x, y))
        assert best * 0.99 < proposal.gain < best * 1.01


@pytest.mark.parametrize("seed", range(3))
def test_no_direction_nearby_has_a_larger_gradient(seed: int) -> None:
    graph, x, y = traced("shallow", seed)
    score = gg.scores.Fold(align=0.5, steps=60)
    (crease,) = score.creases(graph, x, y, F.cross_entropy)
    (proposal,) = score.propose(graph, [(x, y)], F.cross_entropy)
    w = double(dict(proposal.rewrite.weights.incoming)["0.weight"][0])
    normal = F.normalize(crease.mistake - crease.point, dim=0)
    for away in torch.randn(100, 3, dtype=torch.double):
        other = F.normalize(F.normalize(w, dim=0) + 0.01 * away, dim=0)
        if other @ normal >= 0.5:
            found = gain_of(graph, other * w.norm(), crease, x, y)
            assert found < proposal.gain * (1 + 1e-3)


def gain_of(graph: gg.Graph, w: Tensor, crease: Crease, x: Tensor, y: Tensor) -> float:
    """The squared gradient of the outgoing weights of a unit w·(x − fold point), written out."""
    scores = gg.lower(graph)(x).detach()
    wrong = scores.softmax(1) - F.one_hot(y, scores.shape[1])
    unit = ((x - crease.point) @ w).clamp(min=0)
    return float((unit @ wrong / len(x)).square().sum())


@pytest.mark.parametrize("classes", [True, False])
@settings(max_examples=20)
@given(drawn=st.data())
def test_folds_of_random_networks_are_exact_in_both_modes(classes: bool, drawn: Any) -> None:
    network = drawn.draw(networks())
    graph, x = network.trace(), network.inputs(6)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output.flatten(1).mean(1) - target).square().mean()

    y = torch.arange(len(x)) % 2 if classes else torch.arange(len(x)).double()
    if not x.is_floating_point():
        with pytest.raises(gg.NotApplicable, match="inputs have to be numbers"):
            gg.scores.Fold(2).propose(graph, [(x, y)], loss)
        return
    if not classes:
        y = gg.lower(graph).eval()(x).detach() + 1
        loss = F.mse_loss
    try:
        proposals = gg.scores.Fold(2, steps=2).propose(graph, [(x, y)], loss)
    except gg.NotApplicable as error:
        assert "piecewise linear" in str(error)
        return
    for proposal in proposals:
        grown = gg.apply(graph, proposal.rewrite)
        difference = gg.compare(graph, grown.graph, x)
        assert difference.train.relative <= 1e-10 and difference.eval.relative <= 1e-10


def test_folding_goes_deeper_behind_the_axis_and_keeps_the_function() -> None:
    for name in NETWORKS:
        graph, x, _ = traced(name)
        axis = "0"
        rewrite = deepening(graph, axis)
        grown = gg.apply(graph, rewrite)
        assert gg.compare(graph, grown.graph, x).relative <= 1e-10
        assert len(gg.Deepen.places(grown.graph)) > len(gg.Deepen.places(graph))
    smooth = gg.trace(row(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.ones(2, 3))
    with pytest.raises(gg.NotApplicable, match="cannot deepen behind axis '0'"):
        deepening(smooth, "0")


def test_what_an_axis_does_not_see_is_not_folded_there() -> None:
    model = filled(mlp(2, 2, 3, 2).double(), 0)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[0].bias.zero_()
    x = torch.randn(20, 2, dtype=torch.double)
    graph, data = gg.trace(model, x), (x, (x[:, 0] > 0).long())
    unseen = Crease(double([-1.0, -1.0]), double([-2.0, -1.0]), 1.0)
    seen = Crease(double([1.0, -1.0]), double([2.0, -1.0]), 1.0)

    def units(axis: str, *found: Crease) -> int:
        fold = gg.scores.Fold(2)._proposal(graph, graph.axes[axis], [*found], data, F.cross_entropy)
        return 0 if fold is None else fold.rewrite.units

    assert units("0", unseen, seen) == 2
    assert units("2", unseen, seen) == 1 and units("2", unseen) == 0


def test_a_model_is_folded_while_it_trains() -> None:
    torch.manual_seed(0)
    x = torch.randn(80, 2)
    y = (x[:, 1] > torch.sin(2 * x[:, 0])).long()
    model = mlp(2, 2, 2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    score, when = gg.scores.Fold(2), gg.Every(20)
    grower = gg.Grower(
        model,
        x[:2],
        loss=F.cross_entropy,
        optimizer=optimizer,
        score=score,
        when=when,
        amplitude=True,
    )
    for _ in range(40):
        optimizer.zero_grad()
        value = F.cross_entropy(grower.model(x), y)
        value.backward()
        optimizer.step()
        grower.step([(x, y)])
    assert [event["widths"]["0"] for event in grower.record] == [4, 6]
    for event in grower.record:
        (growth,) = event["growths"]
        assert growth["gain_measured"] > 0
        assert abs(growth["loss_after"] - growth["loss_before"]) < 1e-5
