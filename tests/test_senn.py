"""The natural expansion score against dense Fisher matrices and naive sums over positions."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import Tied, networks
from test_moments import CASES, IMAGE, REFUSED, VECTOR, Case, data, loss, row, traced
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import graphgrow as gg
from graphgrow.measure.cost import flops, parameters
from graphgrow.measure.sample import sample, uses_of
from graphgrow.nn import Rational
from graphgrow.scores.kronecker import Block
from graphgrow.scores.search import Ascent, Mala
from graphgrow.scores.senn import Finding

QUICK = Ascent(steps=3)
CHAIN: Case = (
    lambda: row(nn.Linear(3, 4), Rational(4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)),
    "2",
    VECTOR,
)
STRAIGHT: Case = (
    lambda: row(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)),
    "0",
    VECTOR,
)
POOLED: Case = (
    lambda: row(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2)),
    "0",
    IMAGE,
)
UNTIED = [name for name in CASES if name not in ("word vectors",)]


def best(case: Case, count: int = 30, **settings: Any) -> tuple[gg.Graph, Finding, Any]:
    model, graph = traced(case)
    batches = data(model, case, (count,))
    score = gg.scores.Senn(search=QUICK, candidates=4, probes=1000, **settings)
    (found,) = score.findings(graph, batches, loss, [case[1]])
    return graph, found, batches


# ------------------------------------------------------------------------------ dense Fisher


def fisher(model: nn.Module, path: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """E[JᵀJ] and the gradient, of weight and bias of one layer, by torch's own derivatives."""
    names = [f"{path}.weight", f"{path}.bias"]
    whole = dict(model.named_parameters())
    found = {name: whole[name].detach() for name in names}

    def outputs(params: dict[str, Tensor]) -> Tensor:
        return functional_call(model, params, (x,))

    jacobian = jacrev(outputs)(found)
    j = torch.cat([jacobian[name].detach().flatten(2) for name in names], 2).flatten(0, 1)
    slope = torch.func.grad(lambda p: loss(outputs(p), y))(found)
    gradient = torch.cat([slope[name].detach().flatten() for name in names])
    return j.T @ j / len(x), gradient


def dense(matrix: Tensor, gradient: Tensor) -> float:
    return float(gradient @ torch.linalg.solve(matrix, gradient))


def damped(matrix: Tensor, amount: float) -> Tensor:
    return matrix + amount * torch.eye(len(matrix), dtype=matrix.dtype)


def test_the_score_of_the_last_layer_is_that_of_the_dense_fisher_matrix() -> None:
    """F = A ⊗ I there. Damped: (A + δI) ⊗ (1 + ε)I, with δ = 0.1 mean diag A and ε = 0.1."""
    graph, found, ((x, y),) = best(CHAIN, damping=0.1)
    matrix, gradient = fisher(gg.lower(graph).eval(), "4", x, y)
    read = sample(graph, (x, y), loss, uses_of(graph, ["4.weight"])).readers["4.weight"]
    delta = 0.1 * float(read.inputs.diagonal(dim1=1, dim2=2).mean())
    expected = dense(damped(matrix, delta), gradient) / 1.1
    assert found.score == pytest.approx(expected, rel=1e-10)
    wide = gg.apply(graph, found.rewrite).graph
    matrix, gradient = fisher(gg.lower(wide).eval(), "4", x, y)
    grown = dense(damped(matrix, delta), gradient) / 1.1
    assert found.increase == pytest.approx(grown - expected, rel=1e-8)
    assert 0 < found.bound < found.increase < found.limit


def test_in_a_linear_network_the_score_of_a_hidden_layer_is_dense_too() -> None:
    graph, found, ((x, y),) = best(STRAIGHT, damping=1e-9)
    matrix, gradient = fisher(gg.lower(graph).eval(), "1", x, y)
    rank = torch.linalg.matrix_rank(matrix, hermitian=True)
    assert rank == 2 * 4  # four numbers read, dependent on the three inputs and one
    assert found.score == pytest.approx(dense(damped(matrix, 1e-9), gradient), rel=1e-4)
    assert abs(found.increase) < 1e-5 * found.score  # linear units add nothing to a linear layer


def test_the_limit_is_the_squared_gradient_at_the_outputs() -> None:
    graph, found, ((x, y),) = best(CHAIN)
    output = gg.lower(graph).eval()(x).detach().requires_grad_()
    (g,) = torch.autograd.grad(loss(output, y), output)
    assert found.limit == pytest.approx(float(g.square().sum()) * len(x), rel=1e-12)


# ------------------------------------------------------------------------------ any geometry


class Naive:
    """Factors of one layer of a model by derivatives of its output with respect to its weight."""

    def __init__(self, model: nn.Module, path: str, x: Tensor, y: Tensor) -> None:
        self.layer: Any = model.get_submodule(path)
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        hook = self.layer.register_forward_hook(
            lambda m, a, o: (inputs.append(a[0].detach()), outputs.append(o))[2:] or None
        )
        out = model(x)
        hook.remove()
        groups, count = getattr(self.layer, "groups", 1), len(x)
        value = loss(out, y)
        slopes = [s * count for s in torch.autograd.grad(value, outputs, retain_graph=True)]
        flat = out.reshape(count, -1)
        self.a, self.g, metric, positions = [], [], 0.0, 0
        for read, slope in zip(inputs, slopes, strict=True):
            self.a.append(self.features(read, groups))
            self.g.append(self.split(slope, groups))
            positions += self.g[-1].shape[2] // count
        for k in range(flat.shape[1]):
            for wrote in outputs:
                (v,) = torch.autograd.grad(flat[:, k].sum(), wrote, retain_graph=True)
                v = self.split(v, groups)
                metric = metric + v @ v.mT / count
        self.s = metric / positions
        a, g = torch.cat(self.a, 2), torch.cat(self.g, 2)
        self.inputs, self.cross = a @ a.mT / count, a @ g.mT / count

    def features(self, read: Tensor, groups: int) -> Tensor:
        """What is read by each group, `(g, b, positions of all examples)`."""
        own = {n: p.detach() for n, p in self.layer.named_parameters()}
        per = self.layer.weight.shape[0] // groups
        made = []
        for group in range(groups):
            first = group * per

            def one(params: dict[str, Tensor], at: int = first) -> Tensor:
                out = functional_call(self.layer, params, (read,))
                channel = 1 if isinstance(self.layer, nn.modules.conv._ConvNd) else -1
                return out.select(channel, at).reshape(-1)

            jacobian = jacrev(one)(own)
            parts = [jacobian["weight"][:, first].flatten(1)]
            parts += [jacobian["bias"][:, first, None]] if "bias" in own else []
            made.append(torch.cat(parts, 1).T)
        return torch.stack(made)

    def split(self, v: Tensor, groups: int) -> Tensor:
        channel = 1 if isinstance(self.layer, nn.modules.conv._ConvNd) else -1
        v = v.movedim(channel, 0).reshape(v.shape[channel], -1)
        return v.reshape(groups, -1, v.shape[1])

    def score(self, damping: float, like: Naive | None = None) -> float:
        """η, damped as `like` would be."""
        like = like or self
        total = 0.0
        level = float(like.inputs.diagonal(dim1=1, dim2=2).mean())
        size = float(like.s.diagonal(dim1=1, dim2=2).mean())
        for a, s, c in zip(self.inputs, like.s, self.cross, strict=True):
            whole = torch.kron(damped(a, damping * level), damped(s, damping * size))
            total += dense(whole, c.flatten())
        return total


GEOMETRIES = {
    name: CASES[name]
    for name in (
        *("hidden units", "without bias", "tokens", "tokens averaged", "channels"),
        *("strides and borders", "in one dimension", "padded in a circle", "residual stage"),
        *("inside a residual block", "inside the groups", "written by groups", "a branch"),
        *("densely connected", "flattened", "averaged over space", "pooled by averages"),
        *("the middle of a squeeze", "inside a module called twice"),
    )
} | {"pooled by maxima": POOLED, "gated": REFUSED["chunk in '0' moves its positions"]}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_increase_is_what_the_grown_model_has_more(name: str) -> None:
    graph, found, ((x, y),) = best(GEOMETRIES[name], 6, units=2, damping=0.05)
    grown = gg.apply(graph, found.rewrite)
    assert gg.compare(graph, grown.graph, x).relative <= 1e-10
    axis = graph.axes[found.rewrite.axis]
    before, after, own, bound = 0.0, 0.0, 0.0, 0.0
    for path in {at.path.rpartition(".")[0] for at in axis.consumers}:
        old = Naive(gg.lower(graph).eval(), path, x, y)
        new = Naive(gg.lower(grown.graph).eval(), path, x, y)
        before += old.score(0.05)
        after += new.score(0.05, old)
        own += new.score(0.05)
        bound += _bound(old, new, 0.05)
    assert found.score == pytest.approx(before, rel=1e-8)
    assert found.increase == pytest.approx(after - before, rel=1e-7, abs=1e-10 * before)
    assert found.bound == pytest.approx(bound, rel=1e-7, abs=1e-10 * before)
    assert found.bound <= found.increase * (1 + 1e-9)
    gained = gg.scores.Senn(probes=1000, damping=0.05).gained(grown, [(x, y)], loss)
    assert gained == pytest.approx(own - before, rel=1e-7, abs=1e-10 * before)


def _bound(old: Naive, new: Naive, damping: float) -> float:
    """Δη′ from its definition, of residual gradients and what only the new layer reads."""
    level = damping * float(old.inputs.diagonal(dim1=1, dim2=2).mean())
    size = damping * float(old.s.diagonal(dim1=1, dim2=2).mean())
    total, count = 0.0, len(new.a) and 6
    a, p, g = torch.cat(old.a, 2), torch.cat(new.a, 2), torch.cat(old.g, 2)
    for k in range(len(a)):
        mine = [r for r in p[k] if not any(torch.allclose(r, q, atol=1e-12) for q in a[k])]
        fresh = torch.stack(mine) if mine else a.new_zeros(0, a.shape[2])
        update = torch.linalg.solve(damped(old.inputs[k], level), old.cross[k])
        left = g[k] - update.T @ a[k]
        c = fresh @ left.T / count
        inner = torch.linalg.solve(damped(fresh @ fresh.T / count, level), c)
        total += float((torch.linalg.solve(damped(old.s[k], size), inner.T).T * c).sum())
    return total


def test_more_outputs_than_probes_are_sampled_with_the_right_mean() -> None:
    model, graph = traced(CHAIN)
    ((x, y),) = data(model, CHAIN, (4000,))
    use = uses_of(graph, ["2.weight"])
    exact = sample(graph, (x, y), loss, use).readers["2.weight"].metric
    drawn = sample(graph, (x, y), loss, use, probes=1).readers["2.weight"].metric
    assert 0 < (drawn - exact).norm() < 0.05 * exact.norm()


# ------------------------------------------------------------------------------ bounds


@given(st.data())
def test_the_lower_bound_is_below_the_increase(drawn: Any) -> None:
    seed = drawn.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    b, e, o, n = (drawn.draw(st.integers(1, 5)) for _ in range(4))
    block, a, p, g = _drawn(generator, b, e, o, n + 1, drawn.draw(st.floats(1e-4, 1.0)))
    whole = torch.cat([a, p], 1)
    left = block.whiten(g - block.update().mT @ a)
    own, cross, among = p @ p.mT / (n + 1), p @ left.mT / (n + 1), p @ a.mT / (n + 1)
    bound, found = (
        block.bound(own[None], cross[None]),
        block.increase(own[None], cross[None], among[None]),
    )
    assert float(bound) <= float(found) * (1 + 1e-7) + 1e-12
    grown = Block(
        damped(whole[0] @ whole[0].T / (n + 1), block.ridge)[None],
        block.metric,
        whole @ g.mT / (n + 1),
        block.ridge,
    )
    assert float(found) == pytest.approx(grown.score() - block.score(), rel=1e-6, abs=1e-9)


def _drawn(
    generator: torch.Generator, b: int, e: int, o: int, n: int, damping: float
) -> tuple[Block, Tensor, Tensor, Tensor]:
    a, p, g = (torch.randn(1, k, n, generator=generator, dtype=torch.double) for k in (b, e, o))
    metric = torch.eye(o, dtype=torch.double)[None]
    return Block.of(a @ a.mT / n, metric, a @ g.mT / n, damping), a, p, g


@given(st.integers(0, 2**31), st.floats(1.05, 3.0), st.floats(1e-4, 0.3))
def test_successive_additions_are_no_more_than_theorem_1_says(
    seed: int, tau: float, alpha: float
) -> None:
    """Units are added as long as one of a pool passes, without training in between."""
    generator = torch.Generator().manual_seed(seed)
    n = 12
    block, a, pool, g = _drawn(generator, 1, 60, 2, n, 1e-6)
    limit, added = float(g.square().sum() / n), 0
    while True:
        left = block.whiten(g - block.update().mT @ a)
        own = (pool * pool).sum(2)[..., None, None] / n
        cross, among = (pool @ t.mT / n for t in (left, a))
        found = block.increase(own, cross[:, :, None], among[:, :, None])
        k = int(found.argmax())
        score = block.score()
        if not Finding(None, score, float(found[k]), 0.0, limit).passes(tau, alpha):  # type: ignore[arg-type]
            break
        added, a = added + 1, torch.cat([a, pool[:, k : k + 1]], 1)
        inputs = damped(a[0] @ a[0].T / n, block.ridge)[None]
        block = Block(inputs, block.metric, a @ g.mT / n, block.ridge)
        assert block.score() <= limit * (1 + 1e-3)
    assert added == 0 or added < 1 + math.log(1 / alpha) / math.log(tau)


# ------------------------------------------------------------------------------ proposals

SCORES = {
    "ascent": gg.scores.Senn(2, search=QUICK, candidates=3, layers=True, tau=0.0, alpha=-1e9),
    "mala": gg.scores.Senn(1, search=Mala(steps=3), candidates=3, layers=True, tau=0.0, alpha=-1e9),
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("name", ["channels", "inside the groups", "residual stage", "tokens"])
def test_what_is_proposed_keeps_the_function_and_costs_what_it_says(name: str, kind: str) -> None:
    model, graph = traced(CASES[name])
    batches = data(model, CASES[name], (6, 5))
    proposals = SCORES[kind].propose(graph, batches, loss)
    assert {type(p.rewrite) for p in proposals} == {gg.Widen, gg.Deepen}
    for proposal in proposals:
        grown = gg.apply(graph, proposal.rewrite)
        assert gg.compare(graph, grown.graph, batches[0][0]).relative <= 1e-10
        assert proposal.parameters == parameters(grown.graph) - parameters(graph) > 0
        assert proposal.flops == flops(grown.graph) - flops(graph) > 0
        assert proposal.gain >= 0


@settings(max_examples=5)
@given(st.data())
def test_what_is_proposed_for_random_networks_is_exact(drawn: Any) -> None:
    network = drawn.draw(networks())
    assume(trains(network))
    graph, x = network.trace(), network.inputs(4)

    def small(output: Tensor, target: None) -> Tensor:
        return output.square().flatten(1).sum(1).mean()

    kinds = {"layers": drawn.draw(st.booleans()), "units": 1}
    score = gg.scores.Senn(search=Ascent(steps=1), candidates=2, tau=0.0, alpha=-1e9, **kinds)
    for proposal in score.propose(graph, [(x, None)], small):
        grown = gg.apply(graph, proposal.rewrite)
        assert gg.compare(graph, grown.graph, x).relative <= 1e-10


def trains(network: Any) -> bool:
    """Whether torch can go backward: not where one ReLU in place writes over another's result."""
    try:
        copy.deepcopy(network.model).eval()(network.inputs(2)).sum().backward()
    except RuntimeError:
        return False
    return True


def test_a_tied_weight_gets_no_units_and_a_fixed_axis_neither() -> None:
    model, graph = traced((lambda: row(Tied(3, 4), nn.Linear(3, 2)), "0.encoder", VECTOR))
    batches = data(model, (lambda: model, "0.encoder", VECTOR), (5,))
    found = gg.scores.Senn(search=QUICK, candidates=2).findings(graph, batches, loss)
    assert found == []


def test_a_layer_is_worth_what_its_activations_would_add() -> None:
    """By the definition: the layer's activations beside what the old layer reads."""
    model, graph = traced(CHAIN)
    ((x, y),) = batches = data(model, CHAIN, (40,))
    score = gg.scores.Senn(0, layers=True, search=QUICK, candidates=4, damping=0.02, layer_size=3)
    found = {f.rewrite.at: f for f in score.findings(graph, batches, loss)}
    assert set(found) == {"0", "2", "4"}
    for at, finding in found.items():
        assert 0 < finding.bound <= finding.increase
        assert finding.size == 3 and finding.ratio == finding.increase / 3 / finding.score
        old = Naive(gg.lower(graph).eval(), at, x, y)
        assert finding.score == pytest.approx(old.score(0.02), rel=1e-8)
        grown = gg.apply(graph, finding.rewrite).graph
        assert isinstance(grown.modules[f"{at}_act"], Rational)


def test_layers_that_read_too_much_are_left_out() -> None:
    model, graph = traced(CHAIN)
    batches = data(model, CHAIN, (10,))
    score = gg.scores.Senn(0, layers=True, search=QUICK, candidates=2, widest=4)
    assert {f.rewrite.at for f in score.findings(graph, batches, loss)} == {"0", "2"}


def test_thresholds_are_relative_to_the_score_and_to_the_limit() -> None:
    found = Finding(gg.Widen("a", 1), 2.0, 3.0, 1.0, 10.0)
    assert found.passes(2.4, 0.2) and not found.passes(2.5, 0.2) and not found.passes(2.4, 0.3)
    layer = Finding(gg.Deepen("a"), 2.0, 3.0, 1.0, 10.0, 2.0)
    assert layer.passes(1.7, 0.1) and not layer.passes(1.75, 0.1) and not layer.passes(1.7, 0.15)


def test_of_three_batches_the_second_chooses() -> None:
    """The chosen candidate is the best there, which the best on the first batch need not be."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    graph = gg.trace(model, torch.zeros(2, 4, dtype=torch.double))
    batches = [
        (torch.randn(20, 4, dtype=torch.double), torch.randint(0, 3, (20,))) for _ in range(3)
    ]

    def best(seen: Any, only: int | None = None) -> Finding:
        score = gg.scores.Senn(candidates=8, search=Drawn(only))
        (found,) = score.findings(graph, seen, F.cross_entropy, ["0"])
        return found

    alone = [best([batches[1]], k) for k in range(8)]
    assert best(batches).rewrite == max(alone, key=lambda f: f.increase).rewrite
    assert best(batches[::2]).rewrite != best(batches).rewrite


class Drawn(Ascent):
    """Leaves candidates where they were drawn; `only` is the one to choose, not the best."""

    def __init__(self, only: int | None = None) -> None:
        super().__init__(steps=0)
        object.__setattr__(self, "only", only)

    def choose(self, values: Tensor, generator: torch.Generator) -> int:
        only = vars(self)["only"]
        return super().choose(values, generator) if only is None else only


# ------------------------------------------------------------------------------ search


def peak(u: Tensor) -> Tensor:
    return (-(u - 2).square().sum(1)).exp()


def test_ascent_never_goes_down_and_finds_the_peak() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(20, 3, generator=generator, dtype=torch.double)
    values = peak(start)
    for steps in (1, 2, 5, 20):
        now = peak(Ascent(steps).run(peak, start, generator))
        assert bool((now >= values).all())
        values = now
    end = Ascent(200).run(peak, start, generator)
    assert (end - 2).abs().max() < 1e-3
    assert Ascent().choose(torch.tensor([1.0, 3.0, 2.0]), generator) == 1


def wells(u: Tensor) -> Tensor:
    return -2 * (u.square() - 1).square().sum(1) + 0.5 * u.sum(1)


@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_mala_keeps_the_density_that_it_is_for(rate: float) -> None:
    """Chains that start from the density stay in it: what detailed balance is good for."""
    generator, temperature, count = torch.Generator().manual_seed(1), 2.0, 40_000
    grid = torch.linspace(-4, 4, 4001, dtype=torch.double)
    density = (wells(grid[:, None]) / temperature - grid.square() / 2).softmax(0)
    start = grid[torch.multinomial(density, count, replacement=True, generator=generator)]
    end = Mala(8, temperature, rate, adapt=0).run(wells, start[:, None], generator)[:, 0]
    assert (end != start).double().mean() > 0.5
    edges = torch.tensor([-1.2, -0.8, -0.3, 0.2, 0.7, 1.1, 1.5], dtype=torch.double)
    share = torch.zeros(8, dtype=torch.double).index_add_(0, torch.bucketize(grid, edges), density)
    seen = torch.bincount(torch.bucketize(end, edges), minlength=8)
    chi = ((seen - count * share).square() / (count * share)).sum()
    assert chi < 26  # of 7 degrees of freedom: one in 2000 is larger


def test_mala_adapts_its_steps_and_draws_by_score() -> None:
    generator = torch.Generator().manual_seed(2)
    start = torch.zeros(200, 2, dtype=torch.double)
    end = Mala(200, 1.0, 1e-6).run(peak, start, generator)
    assert end.var() > 0.3  # steps of 1e-6 would not have come so far
    values = torch.tensor([0.0, math.log(3.0)])
    picks = [Mala(temperature=1.0).choose(values, generator) for _ in range(2000)]
    assert 0.7 < sum(picks) / 2000 < 0.8
    assert Mala(best=True).choose(torch.tensor([1.0, 3.0, 2.0]), generator) == 1
