"""Natural gradient steps against dense Fisher matrices of small networks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_moments import loss
from test_senn import Naive
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import graphgrow as gg
from graphgrow.nn import Rational
from graphgrow.optim.natural import Fisher, conjugate

METRICS = ("euclidean", "loss")


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv1d(2, 3, 2, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(9, 4), Rational(4),
        nn.Linear(4, 3),
    ).double()  # fmt: skip
    with torch.no_grad():
        for p in model[4].parameters():
            p.normal_()
    return model


def examples(count: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 2, 4, generator=generator, dtype=torch.double)
    return x, torch.randint(3, (count,), generator=generator)


def dense(model: nn.Module, x: Tensor, y: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """E[Jᵀ H J] and the gradient by torch's own derivatives."""
    params = {n: p.detach() for n, p in model.named_parameters()}
    jacobian = jacrev(lambda p: functional_call(model, p, (x,)))(params)
    j = torch.cat([jacobian[n].detach().flatten(2) for n in params], 2)
    outputs = model(x).detach()
    h = torch.stack([
        jacrev(jacrev(lambda o, t=t: F.cross_entropy(o[None], t[None])))(o)
        for o, t in zip(outputs, y, strict=True)
    ])  # fmt: skip
    h = torch.eye(3, dtype=torch.double).expand_as(h) if metric == "euclidean" else h
    matrix = torch.einsum("noi,nop,npj->ij", j, h, j) / len(x)
    slope = torch.func.grad(lambda p: F.cross_entropy(functional_call(model, p, (x,)), y))(params)
    return matrix, torch.cat([slope[n].detach().flatten() for n in params])


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def closure(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    def run() -> Any:
        outputs = model(x)
        return F.cross_entropy(outputs, y), outputs

    return run


@pytest.mark.parametrize("metric", METRICS)
def test_fisher_vector_products_are_those_of_the_dense_matrix(metric: str) -> None:
    model, (x, y) = network(), examples()
    matrix, _ = dense(model, x, y, metric)
    outputs = model(x)
    params = list(model.parameters())
    fisher = Fisher(F.cross_entropy(outputs, y), outputs, params, metric)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        v = [torch.randn(p.shape, generator=generator, dtype=torch.double) for p in params]
        assert torch.allclose(flat(fisher.times(v)), matrix @ flat(v), rtol=1e-10)


@given(st.integers(1, 8), st.integers(0, 2**31))
def test_conjugate_gradients_solve_the_dense_system(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.double)
    matrix = root @ root.T + 0.1 * torch.eye(size, dtype=torch.double)
    right = torch.randn(size, generator=generator, dtype=torch.double)
    cut = seed % (size + 1)

    def times(v: list[Tensor]) -> list[Tensor]:
        return list((matrix @ torch.cat(v)).split([cut, size - cut]))

    found = torch.cat(conjugate(times, list(right.split([cut, size - cut])), 10 * size, 1e-12))
    assert torch.allclose(matrix @ found, right, atol=1e-8 * float(right.norm()) + 1e-12)
    nothing = conjugate(times, [torch.zeros(cut).double(), torch.zeros(size - cut).double()], 5, 0)
    assert not torch.cat(nothing).any()


@pytest.mark.parametrize("metric", METRICS)
def test_a_step_is_the_damped_natural_gradient(metric: str) -> None:
    model, (x, y) = network(), examples()
    matrix, gradient = dense(model, x, y, metric)
    before = flat(model.parameters())
    step = torch.linalg.solve(matrix + 0.3 * torch.eye(len(matrix)).double(), gradient)
    optimizer = gg.NaturalGradient(
        model.parameters(), 0.5, 0.3, metric=metric, tolerance=1e-12, weight_decay=0.1
    )
    value = optimizer.step(closure(model, x, y))
    assert torch.allclose(flat(model.parameters()), 0.95 * before - 0.5 * step, rtol=1e-8)
    assert optimizer.score == pytest.approx(float(step @ gradient), rel=1e-8)
    assert float(closure(model, x, y)()[0].detach()) < float(value)


def test_groups_have_their_own_damping_and_learning_rate() -> None:
    model, (x, y) = network(), examples()
    matrix, gradient = dense(model, x, y, "euclidean")
    before, params = flat(model.parameters()), list(model.parameters())
    groups = [{"params": params[:1], "lr": 0.0}, {"params": params[1:], "damping": 2.0}]
    first = params[0].numel()
    amount = torch.full((len(matrix),), 2.0).double()
    amount[:first] = 0.1
    step = torch.linalg.solve(matrix + amount.diag(), gradient)
    gg.NaturalGradient(groups, 0.5, 0.1, tolerance=1e-12).step(closure(model, x, y))
    step[:first] = 0
    assert torch.allclose(flat(model.parameters()), before - 0.5 * step, rtol=1e-8)


@pytest.mark.parametrize("kind", [gg.NaturalGradient, gg.KroneckerGradient])
def test_no_step_is_longer_than_the_radius(kind: Any) -> None:
    x, y = examples()
    moved = []
    for radius in (math.inf, 0.05, 1e3):
        model = network()
        optimizer = kind(model.parameters(), 0.5, 0.1, radius=radius)
        before = flat(model.parameters())
        optimizer.step(closure(model, x, y))
        moved.append(flat(model.parameters()) - before)
        rate = min(0.5, radius / optimizer.score**0.5)
        assert torch.allclose(moved[-1] / rate, moved[0] / 0.5)
    assert torch.equal(moved[0], moved[2]) and moved[1].norm() < 0.5 * moved[0].norm()


@pytest.mark.parametrize("grouped", [False, True])
def test_the_kronecker_step_is_that_of_its_factors(grouped: bool) -> None:
    """With one output a random sign is all there is to draw, and squares to one.

    Damped: (A + π√λ) ⊗ (S + √λ/π), π² the ratio of the means of their diagonals.
    """
    torch.manual_seed(1)
    first = (
        nn.Conv1d(2, 4, 2, padding=1, groups=2) if grouped else nn.Conv1d(2, 4, 2, 2, bias=False)
    )
    size = 4 * (5 if grouped else 2)
    model = nn.Sequential(
        first, nn.Tanh(), nn.Flatten(), nn.Linear(size, 4), Rational(4), nn.Linear(4, 1)
    ).double()
    x, _ = examples()
    y = torch.cos(x.sum((1, 2)))[:, None]
    rest = [p for n, p in model.named_parameters() if n.startswith("4.")]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    outputs = model(x)
    fisher = Fisher(loss(outputs, y), outputs, rest, "euclidean")
    slope = torch.autograd.grad(loss(outputs, y), rest, retain_graph=True)
    block = torch.stack([flat(fisher.times(list(e.split(4)))) for e in torch.eye(12).double()])
    expected = torch.linalg.solve(block + 0.04 * torch.eye(12).double(), flat(slope))
    naive = {path: Naive(model, path, x, y) for path in ("0", "3", "5")}

    def run() -> Any:
        outputs = model(x)
        return loss(outputs, y), outputs

    optimizer = gg.KroneckerGradient(model.parameters(), 0.7, 0.04, iterations=99, tolerance=1e-12)
    optimizer.step(run)
    steps = {n: (before[n] - p.detach()) / 0.7 for n, p in model.named_parameters()}
    assert torch.allclose(flat(v for n, v in steps.items() if n.startswith("4.")), expected)
    for path, found in naive.items():
        groups, b, o = found.cross.shape
        means = [float(m.diagonal(dim1=1, dim2=2).mean()) for m in (found.inputs, found.s)]
        ratio = (means[0] / means[1]) ** 0.5
        a = found.inputs + 0.2 * ratio * torch.eye(b).double()
        s = found.s + 0.2 / ratio * torch.eye(o).double()
        step = torch.linalg.solve(s, torch.linalg.solve(a, found.cross).mT)  # (g, o, b)
        weight = steps[f"{path}.weight"]
        assert torch.allclose(weight.reshape(groups, o, -1), step[..., : weight[0].numel()])
        if f"{path}.bias" in steps:
            assert torch.allclose(steps[f"{path}.bias"].reshape(groups, o), step[..., -1])


@pytest.mark.parametrize("metric", METRICS)
def test_random_changes_of_outputs_have_the_metric_as_their_covariance(metric: str) -> None:
    model, (x, y) = network(), examples(4)
    outputs = model(x)
    fisher = Fisher(F.cross_entropy(outputs, y), outputs, model.parameters(), metric)
    generator, total = torch.Generator().manual_seed(0), torch.zeros(4, 3, 3).double()
    for _ in range(1000):
        (r,) = fisher.drawn(generator)
        total += torch.einsum("no,np->nop", r, r).detach() / 1000 * 4
    p = outputs.detach().softmax(1)
    h = torch.diag_embed(p) - p[:, :, None] * p[:, None] if metric == "loss" else torch.eye(3)
    assert (total - h).abs().max() < 0.1


@pytest.mark.parametrize("kind", [gg.NaturalGradient, gg.KroneckerGradient])
def test_both_go_on_with_a_grown_model(kind: Any) -> None:
    model, (x, y) = network(), examples()
    optimizer = kind(model.parameters(), 0.2)
    losses = [float(optimizer.step(closure(model, x, y))) for _ in range(5)]
    graph = gg.trace(model, x[:2])
    grown = gg.apply(graph, gg.Widen("3", 2), gg.Deepen("5", gg.Factor()))
    gg.migrate(optimizer, grown)
    model = gg.lower(grown.graph)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {*map(id, model.parameters())}
    before = model.get_submodule("5_act").get_parameter("gamma").detach().clone()
    losses += [float(optimizer.step(closure(model, x, y))) for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert not torch.equal(model.get_submodule("5_act").get_parameter("gamma"), before)


@pytest.mark.parametrize(
    "settings", [{"lr": -1.0}, {"damping": 0.0}, {"radius": 0.0}, {"metric": "cosine"}]
)
def test_bad_settings_are_refused_in_a_sentence(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"cannot make NaturalGradient: .*; give"):
        gg.NaturalGradient(network().parameters(), **settings)


def test_a_diverged_model_is_refused_and_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    x, y = torch.ones(5, 3, dtype=torch.double), torch.zeros(5, dtype=torch.long)
    with torch.no_grad():
        model[0].weight.fill_(1e160)
    before, optimizer = flat(model.parameters()), gg.KroneckerGradient(model.parameters())
    with pytest.raises(ValueError, match="cannot step KroneckerGradient: the damped covariance of"):
        optimizer.step(closure(model, x, y))
    assert torch.equal(flat(model.parameters()), before)
