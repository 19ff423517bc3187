"""CapNorm, growing through it, putting it in place of batch norm, and penalties on fans."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import fill
from torch import Tensor, nn

import graphgrow as gg
from graphgrow.nn import CapNorm
from graphgrow.passes.journal import rewrite_from_json, rewrites_to_json

seeds = st.integers(0, 2**16)


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.double)


@given(seed=seeds, spread=st.sampled_from([0.1, 1.0, 10.0]), positions=st.sampled_from([(), (3,)]))
def test_units_are_centred_and_made_smaller_but_never_larger(seed, spread, positions) -> None:
    x = spread * noise(6, 4, *positions, seed=seed) + 1
    norm = CapNorm(4, momentum=0.25).double()
    y = norm(x)
    for u in range(4):
        mean, deviation = x[:, u].mean(), x[:, u].std(correction=0)
        expected = (x[:, u] - mean) / max(float(deviation), 1.0)
        assert torch.allclose(y[:, u], expected, rtol=1e-12, atol=1e-12)
        assert torch.allclose(norm.running_mean[u], 0.25 * mean, rtol=1e-12)
        assert torch.allclose(norm.running_var[u], 0.75 + 0.25 * deviation**2, rtol=1e-12)


def test_eval_mode_uses_the_running_statistics_and_keeps_them() -> None:
    norm = fill(CapNorm(3).double(), 1).eval()
    norm.running_var[0] = 0.25
    before, x = copy.deepcopy(norm.state_dict()), noise(5, 3)
    y = norm(x)
    assert torch.allclose(y[:, 0], x[:, 0] - norm.running_mean[0], rtol=1e-12)
    scaled = (x[:, 1] - norm.running_mean[1]) / max(1.0, float(norm.running_var[1])) ** 0.5
    assert torch.allclose(y[:, 1], scaled, rtol=1e-12)
    assert all(torch.equal(norm.state_dict()[k], v) for k, v in before.items())


def test_the_gradient_along_the_weights_is_zero_where_units_are_made_smaller() -> None:
    """Which is why lengths shrink linearly until σ < 1 (section 4.2)."""
    layer, norm = fill(nn.Linear(3, 4, bias=False).double(), 0), CapNorm(4).double()
    x, weights = noise(50, 3), noise(50, 4, seed=1)
    for factor, zero in ((10.0, True), (0.1, False)):
        layer.zero_grad()
        with torch.no_grad():
            layer.weight *= factor
        (norm(layer(x)) * weights).sum().backward()
        along = (layer.weight.grad * layer.weight).sum(1)
        assert bool((along.abs() < 1e-10).all()) == zero


def capped(kind: str, activation: nn.Module | None = None) -> tuple[nn.Sequential, Tensor]:
    act = activation or nn.ReLU()
    if kind == "linear":
        layers, x = [nn.Linear(3, 6), CapNorm(6), act, nn.Linear(6, 2)], noise(9, 3)
    else:
        layers = [nn.Conv2d(3, 6, 3), CapNorm(6), act, nn.Conv2d(6, 2, 3, padding=1)]
        x = noise(4, 3, 5, 5)
    return fill(nn.Sequential(*layers).double(), 2), x


SCHEMES = [None, gg.ZeroOutgoing(), gg.ZeroIncoming(), gg.Pairs(), gg.Copy()]


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("weights", SCHEMES, ids=str)
def test_an_axis_grows_and_shrinks_through_capnorm(kind: str, weights) -> None:
    model, x = capped(kind)
    graph = gg.trace(model, x)
    grown = gg.apply(graph, gg.Widen("0", 2, at=1, weights=weights))
    found = gg.compare(model, grown.graph, x)
    assert found.relative <= 1e-10
    lowered = gg.lower(grown.graph)
    assert lowered.get_submodule("1").num_features == 8
    narrow = gg.apply(grown.graph, gg.Remove("0", (1, 2)))
    assert gg.compare(model, narrow.graph, x).relative <= 1e-10


@pytest.mark.parametrize("after", [nn.BatchNorm1d(6, affine=False), nn.Tanh()], ids=["norm", "act"])
def test_a_capnorm_with_running_statistics_of_its_own_is_followed_in_eval_mode(after) -> None:
    """What it writes into its buffers in train mode is not what eval mode reads."""
    layers = [nn.Linear(3, 6, bias=False), CapNorm(6), after, nn.Linear(6, 2, bias=False)]
    model, x = fill(nn.Sequential(*layers).double(), 2), noise(9, 3)
    for weights in (None, gg.ZeroIncoming()):
        grown = gg.apply(gg.trace(model, x), gg.Widen("0", 1, weights=weights))
        assert gg.compare(model, grown.graph, x).relative <= 1e-10


def test_a_unit_without_input_goes_through_capnorm_where_the_modes_agree() -> None:
    model, x = capped("linear")
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = 0, 0
    model[1].running_mean[4] = -1.0
    said = gg.Remove("0", (4,)).obstacle(gg.trace(model, x))
    assert said is not None and "is not the same in both modes" in said
    model[1].running_mean[4] = 0.0
    assert gg.Remove("0", (4,)).obstacle(gg.trace(model, x)) is None


def normed(kind: type[nn.Module], **options) -> tuple[nn.Sequential, Tensor]:
    if kind is nn.BatchNorm2d:
        layers: list[nn.Module] = [nn.Conv2d(3, 4, 3), kind(4, **options), nn.ReLU(), nn.Flatten()]
        x = noise(3, 3, 4, 4)
    else:
        layers, x = [nn.Linear(3, 4), kind(4, **options), nn.ReLU()], noise(5, 3)
    size = 16 if kind is nn.BatchNorm2d else 4
    return fill(nn.Sequential(*layers, nn.Linear(size, 2)).double(), 3), x


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d])
@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_is_capped_and_says_by_how_much_that_changes_the_outputs(kind, affine) -> None:
    model, x = normed(kind, affine=affine, momentum=0.3)
    graph = gg.trace(model, x)
    assert gg.Cap.places(graph) == ["1"]
    grown = gg.apply(graph, gg.Cap("1"))
    assert not grown.proof.exact and grown.proof.modes == ()
    assert grown.proof.error == gg.compare(model, grown.graph, x).relative > 0
    expected = copy.deepcopy(model)
    expected[1] = CapNorm(4, momentum=0.3).double()
    expected[1].running_mean, expected[1].running_var = model[1].running_mean, model[1].running_var
    lowered = gg.lower(grown.graph)
    assert isinstance(lowered.get_submodule("1"), CapNorm)
    assert set(lowered.state_dict()) == set(expected.state_dict())
    for mode in (True, False):
        assert torch.equal(lowered.train(mode)(x), expected.train(mode)(x))
    assert gg.apply(grown.graph, gg.Widen("0", 2)).graph.axes["0"].width == 6


def test_capping_is_exact_in_eval_mode_where_the_norm_had_that_scale() -> None:
    model, x = normed(nn.BatchNorm1d)
    norm = model[1]
    with torch.no_grad():
        norm.bias.zero_()
        deviation = norm.running_var.sqrt().clamp(min=1)
        norm.weight.copy_((norm.running_var + norm.eps).sqrt() / deviation)
    grown = gg.apply(gg.trace(model, x), gg.Cap("1"))
    assert gg.compare(model, grown.graph, x).eval.relative <= 1e-12


@pytest.mark.parametrize(
    ("at", "options", "sentence"),
    [
        ("0", {}, "cannot cap '0': it is a Linear; give a batch norm"),
        ("9", {}, "cannot cap '9': there is no such module; give a batch norm"),
        (
            "1",
            {"track_running_stats": False},
            "cannot cap '1': it keeps no running statistics; make the norm with "
            "track_running_stats=True",
        ),
    ],
)
def test_what_cannot_be_capped_says_why(at: str, options, sentence: str) -> None:
    graph = gg.trace(*normed(nn.BatchNorm1d, **options))
    assert gg.Cap(at).obstacle(graph) == sentence
    with pytest.raises(gg.NotApplicable) as raised:
        gg.apply(graph, gg.Cap(at))
    assert str(raised.value) == sentence


def test_a_capped_model_is_saved_and_loaded_and_its_optimizer_goes_on(tmp_path) -> None:
    model, x = normed(nn.BatchNorm1d)
    fresh = copy.deepcopy(model)
    graph = gg.trace(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(x).sum().backward()
    optimizer.step()
    grown = gg.apply(graph, gg.Cap("1"), gg.Widen("0", 2))
    gg.migrate(optimizer, grown)
    assert len(optimizer.param_groups[0]["params"]) == 4
    gg.save(tmp_path / "capped", grown)
    loaded = gg.load(tmp_path / "capped", fresh)
    assert torch.equal(loaded.eval()(x), gg.lower(grown.graph).eval()(x))
    (cap,) = rewrites_to_json([gg.Cap("1")])
    assert rewrite_from_json(cap) == gg.Cap("1")


# ------------------------------------------------------------------------------------- penalties


def branches() -> gg.Graph:
    """Return two layers whose outputs are added, before a third."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4, bias=False), nn.Linear(2, 4, bias=False)
            self.out = nn.Linear(4, 2, bias=False)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.out(torch.relu(self.a(x) + self.b(y)))

    return gg.trace(fill(Sum().double(), 5), noise(2, 3), noise(2, 2))


SIDES = {"in": gg.fan_ins, "out": gg.fan_outs}


def vectors(graph: gg.Graph, side: str) -> list[Tensor]:
    """Return the fans of `branches` by hand."""
    a, b, out = (graph.state[f"{name}.weight"] for name in ("a", "b", "out"))
    if side == "in":
        return [*torch.cat([a, b], 1), *out]
    return [*a.T, *b.T, *out.T]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("p", [1, 2])
def test_a_penalty_is_the_sum_of_the_norms(side: str, p: int) -> None:
    graph = branches()
    found = gg.penalty(SIDES[side](graph), graph.state, 0.5, p=p)
    assert torch.allclose(found, 0.5 * sum(v.norm(p=p) for v in vectors(graph, side)), rtol=1e-12)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("p", [1, 2])
@given(amount=st.floats(0.0, 2.0))
def test_the_proximal_step_is_the_minimum_that_defines_it(side: str, p: int, amount: float) -> None:
    """x = prox(w) where w − x is `amount` times a subgradient of the norm at x."""
    graph = branches()
    before = [v.detach().clone() for v in vectors(graph, side)]
    gg.shrink(SIDES[side](graph), graph.state, amount, p=p)
    for w, x in zip(before, vectors(graph, side), strict=True):
        if p == 1:
            assert torch.allclose((w - x)[x != 0], amount * x[x != 0].sign(), atol=1e-12)
            assert bool(((w - x)[x == 0].abs() <= amount + 1e-12).all())
        elif bool(x.any()):
            assert torch.allclose(w - x, amount * x / x.norm(), atol=1e-12)
        else:
            assert w.norm() <= amount + 1e-12


def test_the_gradient_of_a_penalty_is_finite_at_zero() -> None:
    graph = branches()
    with torch.no_grad():
        graph.state["out.weight"].zero_()
    gg.penalty(gg.fan_ins(graph), graph.state, 1.0).backward()
    assert torch.equal(graph.state["out.weight"].grad, torch.zeros(2, 4).double())


@pytest.mark.parametrize(
    ("amount", "p", "sentence"),
    [
        (-0.1, 2, "cannot shrink fans by -0.1: it is negative; give a number that is not"),
        (0.1, 3, "cannot shrink fans with p=3: only p=1 and p=2 have a proximal step"),
    ],
)
def test_penalties_that_make_no_sense_are_refused(amount: float, p: int, sentence: str) -> None:
    graph = branches()
    with pytest.raises(ValueError) as raised:
        gg.shrink(gg.fan_ins(graph), graph.state, amount, p=p)
    assert str(raised.value) == sentence
