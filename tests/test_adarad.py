"""AdaRad against a literal transcription, its shrinkage, its fan-ins, and growth under it."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import networks
from torch import Tensor, nn

import graphgrow as gg
from graphgrow.optim.fans import fan_ins, fan_outs


class Literal:
    """Algorithm 1 (and 2 with `arithmetic`) of Philipp and Carbonell (2017), unit by unit.

    `weights` are `(in, out)` as in the paper. Line numbers are those of algorithm 1. No units are
    added or removed here. Line 8 divides by the size of the training set, of which a batch has the
    part `share`.
    """

    def __init__(
        self, weights, angular, radial, penalty, share, mixing, eps, arithmetic=None, limit=math.inf
    ):
        self.weights, self.angular, self.radial = weights, angular, radial
        self.penalty, self.share, self.mixing, self.eps = penalty, share, mixing, eps
        self.arithmetic, self.limit = arithmetic, limit
        self.most = self.most_capacity = 0.0  # 2
        self.mean = [torch.zeros_like(w) for w in weights]
        self.square = [[0.0] * w.shape[1] for w in weights]  # 4
        self.capacity = [[0.0] * w.shape[1] for w in weights]
        self.mean_capacity = [[0.0] * w.shape[1] for w in weights]

    def step(self, gradients: list[Tensor]) -> None:
        for layer in reversed(range(len(self.weights))):  # 9
            for j in reversed(range(self.weights[layer].shape[1])):  # 10
                self._unit(layer, j, self.share * gradients[layer][:, j])  # 8

    def _unit(self, layer: int, j: int, gradient: Tensor) -> None:
        weight = self.weights[layer][:, j].clone()
        along = gradient.dot(weight) / weight.dot(weight) * weight  # 11
        across = gradient - along
        beta = self.mixing  # 12
        self.square[layer][j] = (1 - beta) * self.square[layer][j] + beta * across.dot(across)
        self.capacity[layer][j] = (1 - beta) * self.capacity[layer][j] + beta
        self.most = max(self.most, self.square[layer][j])  # 13
        self.most_capacity = max(self.most_capacity, self.capacity[layer][j])
        if self.arithmetic is not None:  # algorithm 2, line 16
            rate = self.arithmetic
            mean = (1 - rate) * self.mean[layer][:, j] + rate * across
            self.mean_capacity[layer][j] = (1 - rate) * self.mean_capacity[layer][j] + rate
            across = mean / self.mean_capacity[layer][j]
        own = math.sqrt(self.square[layer][j] / self.capacity[layer][j] + self.eps)  # 14
        adjusted = math.sqrt(self.most / self.most_capacity) / own * across
        change = self.radial * along  # 15
        length = float(change.norm())
        weight = weight - change * min(1.0, self.limit / length if length else 1.0)
        angle = self.angular * float(adjusted.norm())
        before = weight
        if angle > 0:
            weight = rotated(weight, angle, -adjusted / adjusted.norm())  # 16
        if self.arithmetic is not None:  # algorithm 2, line 20
            self.mean[layer][:, j] = (
                rotated(mean, angle, before / before.norm()) if angle > 0 else mean
            )
        length = float(weight.norm())  # 17
        lost = self.radial * self.penalty * self.share
        self.weights[layer][:, j] = weight * max(0.0, 1 - lost / length)


def rotated(vector: Tensor, angle: float, direction: Tensor) -> Tensor:
    """Return a vector turned by an angle towards a unit vector at right angles to it."""
    return math.cos(angle) * vector + math.sin(angle) * vector.norm() * direction


def mlp(*sizes: int, bias: bool = False, seed: int = 0) -> nn.Sequential:
    """Return linear layers with ReLUs between, in float64."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for into, out in pairwise(sizes):
        layers += [nn.Linear(into, out, bias), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
    return model


def traced(model: nn.Sequential) -> gg.Graph:
    return gg.trace(model, torch.zeros(2, model[0].in_features).double())


def noise(like: Tensor, seed: int) -> Tensor:
    """Return random numbers, others than `mlp` has from the same seed."""
    generator = torch.Generator().manual_seed(~seed)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)


sizes = st.lists(st.integers(1, 5), min_size=2, max_size=4)


def nearly_parallel(weight, gradient):
    """Return whether what is left of a gradient across some fan-in is mostly rounding."""
    weight, gradient = weight.detach(), gradient.detach()
    along = (weight * gradient).sum(1).square()
    whole = weight.square().sum(1) * gradient.square().sum(1)
    return weight.shape[1] > 1 and bool((whole - along < 1e-4 * whole).any())


@pytest.mark.parametrize("kind", [gg.AdaRad, gg.AdaRadM])
@given(
    sizes=sizes,
    seed=st.integers(0, 2**16),
    angular=st.sampled_from([0.1, 3.0, 10.0]),
    radial=st.sampled_from([0.0, 0.1, 5.0]),
    penalty=st.sampled_from([0.0, 0.01, 0.1]),
    mixing=st.sampled_from([0.005, 0.3]),
    limit=st.sampled_from([math.inf, 0.3]),
)
def test_steps_are_those_of_the_algorithm(
    kind, sizes, seed, angular, radial, penalty, mixing, limit
):
    """The algorithm has no limit, or one that is infinite."""
    model = mlp(*sizes, seed=seed)
    weights = [layer.weight.detach().T.clone() for layer in model[::2]]
    momentum = 0.2 if kind is gg.AdaRadM else None
    literal = Literal(weights, angular, radial, penalty, 0.1, mixing, 1e-8, momentum, limit)
    more = {} if momentum is None else {"momentum_mixing": momentum}
    optimizer = kind(
        traced(model),
        lr=angular,
        radial_lr=radial,
        penalty=penalty,
        share=0.1,
        mixing=mixing,
        radial_limit=limit,
        **more,
    )
    for t in range(6):
        for k, layer in enumerate(model[::2]):
            layer.weight.grad = noise(layer.weight, 100 * seed + 10 * t + k)
            assume(not nearly_parallel(layer.weight, layer.weight.grad))
        literal.step([layer.weight.grad.T for layer in model[::2]])
        optimizer.step()
        for layer, expected in zip(model[::2], literal.weights, strict=True):
            assert torch.allclose(layer.weight.T, expected, rtol=0, atol=1e-10)
        if any(bool((w.norm(dim=0) == 0).any()) for w in literal.weights):
            return  # the paper removes such units at once


@given(steps=st.integers(1, 60), penalty=st.floats(1e-4, 0.1), share=st.sampled_from([1.0, 0.02]))
def test_a_unit_of_length_one_is_gone_after_the_steps_that_the_step_sizes_say(
    steps: int, penalty: float, share: float
) -> None:
    model = mlp(4, 3, 2)
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight /= layer.weight.norm(dim=1, keepdim=True)
    radial = 1 / ((steps - 0.5) * penalty * share)  # half a step before the last
    optimizer = gg.AdaRad(traced(model), lr=0.1, radial_lr=radial, penalty=penalty, share=share)
    for t in range(steps):
        assert all(bool(layer.weight.any(dim=1).all()) for layer in model[::2]), t
        for layer in model[::2]:
            layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
    assert all(torch.equal(p, torch.zeros_like(p)) for p in model.parameters())


def test_what_is_learned_across_the_weights_does_not_change_their_length() -> None:
    model = mlp(5, 4, 3)
    optimizer = gg.AdaRad(traced(model), lr=3.0, radial_lr=0.0, penalty=1.0)
    before = [layer.weight.norm(dim=1) for layer in model[::2]]
    for t in range(5):
        for layer in model[::2]:
            layer.weight.grad = noise(layer.weight, t)
        optimizer.step()
    for layer, length in zip(model[::2], before, strict=True):
        assert torch.allclose(layer.weight.norm(dim=1), length, rtol=1e-12)


@given(
    sizes=st.lists(st.integers(1, 6), min_size=3, max_size=6),
    seed=st.integers(0, 2**16),
    lambdas=st.lists(st.floats(1e-3, 10.0), min_size=5, max_size=5),
    p=st.sampled_from([1, 2]),
    side=st.sampled_from(["in", "out"]),
)
def test_penalties_by_layer_are_one_penalty_of_rescaled_weights(sizes, seed, lambdas, p, side):
    """Proposition 1: f and the regulariser are the same at λ = (λ₁ … λ_L)^(1/L) and W_l λ_l / λ."""
    model = mlp(*sizes, seed=seed)
    lambdas = lambdas[: len(sizes) - 1]
    shared = math.prod(lambdas) ** (1 / len(lambdas))
    rescaled = copy.deepcopy(model)
    with torch.no_grad():
        for layer, own in zip(rescaled[::2], lambdas, strict=True):
            layer.weight *= own / shared
    x = noise(torch.empty(7, sizes[0], dtype=torch.double), seed)
    assert torch.allclose(model(x), rescaled(x), rtol=1e-10, atol=1e-12)
    optimizer = gg.AdaRad(traced(model), lr=0.0, radial_lr=0.0, penalty=0.0)
    assert [group["name"] for group in optimizer.param_groups] == [
        str(2 * k) for k in range(len(lambdas))
    ]
    separate = sum(
        own * layer.weight.norm(p=p, dim=1 if side == "in" else 0).sum()
        for own, layer in zip(lambdas, model[::2], strict=True)
    )
    graph = traced(rescaled)
    fans = fan_ins(graph) if side == "in" else fan_outs(graph)
    assert torch.allclose(gg.penalty(fans, graph.state, shared, p=p), separate, rtol=1e-12)


class Stage(nn.Module):
    """A residual stage with a depthwise convolution, a norm and two concatenated branches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.inner = nn.Conv2d(4, 5, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(5)
        self.outer = nn.Conv2d(5, 4, 3, padding=1)
        self.depth = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.left, self.right = nn.ConvTranspose2d(4, 2, 1), nn.Conv2d(4, 3, 1)
        self.last = nn.Linear(5 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.outer(torch.relu(self.norm(self.inner(torch.relu(x)))))
        x = self.depth(x)
        x = torch.cat([self.left(x), self.right(x)], 1)
        return self.last(torch.relu(x).flatten(1))


def stage() -> tuple[Stage, gg.Graph]:
    torch.manual_seed(0)
    model = Stage().double()
    return model, gg.trace(model, torch.randn(2, 3, 4, 4).double())


def test_a_fan_in_is_all_that_writes_a_unit() -> None:
    fans = fan_ins(stage()[1])
    bundles = {
        name: [part.path for part in fans.parts if int(part.units[0]) in fans.named(name)]
        for name in fans.names
    }
    assert bundles == {
        "stem": ["stem.weight", "outer.weight", "stem.bias", "outer.bias"],
        "inner": ["inner.weight"],
        "left": ["left.weight", "left.bias"],
        "right": ["right.weight", "right.bias"],
        "last": ["last.weight", "last.bias"],
        "depth.weight": ["depth.weight", "depth.bias"],
    }


def test_a_fan_in_of_a_grouped_transposed_convolution_is_of_a_group_and_a_unit_in_it() -> None:
    """Its weight has the units of all groups in dim 0 and those inside a group in dim 1."""
    layer = nn.ConvTranspose2d(6, 4, 2, groups=2).double()
    model = nn.Sequential(nn.Conv2d(3, 6, 1, bias=False).double(), layer)
    fans = fan_ins(gg.trace(model, noise(torch.empty(1, 3, 4, 4, dtype=torch.double), 0)))
    weight, bias = (next(p for p in fans.parts if p.path == f"1.{n}") for n in ("weight", "bias"))
    units = weight.units.reshape(6, 2)
    assert weight.dims == (0, 1) and bias.units.unique().numel() == 4
    for group in range(2):
        for unit in range(2):
            assert (units[3 * group : 3 * group + 3, unit] == bias.units[2 * group + unit]).all()


def test_a_fan_out_is_all_that_reads_a_unit() -> None:
    fans = fan_outs(stage()[1])
    found = {part.path: (part.dims[0], len(set(part.units.tolist()))) for part in fans.parts}
    assert found["last.weight"] == (1, 5)  # sixteen places are one unit
    assert found["inner.weight"] == (1, 4) and found["stem.weight"] == (1, 3)
    stem = {p.path for p in fans.parts if set(p.units.tolist()) & set(fans.named("stem"))}
    assert stem == {"inner.weight", "left.weight", "right.weight"}


def test_the_fan_ins_of_a_stage_shrink_to_zero_together() -> None:
    model, graph = stage()
    members = (model.stem, model.outer)

    def length() -> Tensor:
        parts = [t.flatten(1) for m in members for t in (m.weight, m.bias[:, None])]
        return torch.cat(parts, 1).norm(dim=1).detach()

    optimizer = gg.AdaRad(graph, lr=0.0, radial_lr=0.05, penalty=1.0)
    before = length()
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert torch.allclose(length(), before - 0.15, rtol=1e-12)


def test_groups_are_bundles_whose_settings_count() -> None:
    model = mlp(4, 3, 2)
    optimizer = gg.AdaRad(traced(model), lr=0.1, radial_lr=0.1, penalty=0.0)
    assert [group["name"] for group in optimizer.param_groups] == ["0", "2"]
    optimizer.param_groups[1]["penalty"] = 1.0
    before = [layer.weight.norm(dim=1) for layer in model[::2]]
    for layer in model[::2]:
        layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    assert torch.allclose(model[0].weight.norm(dim=1), before[0], rtol=1e-12)
    assert torch.allclose(model[2].weight.norm(dim=1), before[1] - 0.1, rtol=1e-12)


def test_what_is_no_fan_in_takes_plain_steps() -> None:
    model, graph = stage()
    optimizer = gg.AdaRad(graph, lr=1.0, radial_lr=1.0, penalty=1.0, rest_lr=0.5)
    before = model.norm.weight.detach().clone()
    others = {k: v.clone() for k, v in model.state_dict().items() if "norm" not in k}
    model.norm.weight.grad = torch.ones(5).double()
    optimizer.step()  # nothing else has a gradient, so nothing else moves
    assert torch.equal(model.norm.weight, before - 0.5)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in others.items())


@pytest.mark.parametrize("kind", [gg.AdaRad, gg.AdaRadM])
def test_a_zero_fan_in_stays_zero_unless_its_gradient_is_longer_than_the_penalty(kind) -> None:
    model = mlp(3, 2, 2)
    with torch.no_grad():
        model[0].weight.zero_()
    optimizer = kind(traced(model), lr=1.0, radial_lr=0.5, penalty=0.1)
    model[2].weight.grad = torch.zeros(2, 2).double()
    model[0].weight.grad = torch.tensor([[0.05, 0, 0], [0, 0.3, 0.4]], dtype=torch.double)
    optimizer.step()
    expected = torch.tensor([[0, 0, 0], [0, -0.12, -0.16]], dtype=torch.double)
    assert torch.allclose(model[0].weight, expected, rtol=0, atol=1e-15)
    if kind is gg.AdaRadM:  # a mean that was not there has not begun
        assert not optimizer.state[model[0].weight]["mean"].any()


@pytest.mark.parametrize("kind", [gg.AdaRad, gg.AdaRadM])
def test_a_layer_without_gradients_stays_with_all_that_is_kept_of_it(kind) -> None:
    """The others step as if it were not there."""
    model = mlp(4, 3, 2)
    optimizer = kind(traced(model), lr=3.0, radial_lr=0.5, penalty=0.1)
    stepped(optimizer, model, 0)
    shared = {k: v.clone() for k, v in optimizer.state["fans"].items() if k != "most"}
    before = copy.deepcopy((model[0].weight.detach(), optimizer.state[model[0].weight]))
    model[0].weight.grad, model[2].weight.grad = None, noise(model[2].weight, 5)
    moved = model[2].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[0].weight, before[0])
    for name, value in before[1].items():
        assert torch.equal(optimizer.state[model[0].weight][name], value)
    for name, value in shared.items():
        assert torch.equal(optimizer.state["fans"][name][..., :3], value[..., :3])
        assert not torch.equal(optimizer.state["fans"][name][..., 3:], value[..., 3:])
    assert not torch.equal(model[2].weight, moved)


@pytest.mark.parametrize("kind", [gg.AdaRad, gg.AdaRadM])
def test_a_fan_in_of_one_entry_does_not_turn_however_gradients_differ_in_size(kind) -> None:
    """All of each gradient is along it, but for rounding, which is large beside a small one."""
    model = mlp(1, 8, 2).float()
    graph = gg.trace(model, torch.zeros(2, 1))
    optimizer = kind(graph, lr=3.0, radial_lr=0.0, penalty=0.0, eps=1e-12)
    before = model[0].weight.detach().clone()
    for t in range(30):
        for k, p in enumerate(model.parameters()):
            p.grad = noise(p, 10 * t + k) * 10.0 ** (-t / 4)
        optimizer.step()
        assert torch.allclose(model[0].weight, before, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [gg.AdaRad, gg.AdaRadM])
def test_shorter_numbers_step_alike(kind, dtype: torch.dtype) -> None:
    """Both optimizers see the weights and the gradients of the shorter ones before each step."""
    short = mlp(20, 15, 10).to(dtype)
    long = copy.deepcopy(short).double()
    settings = {"lr": 0.3, "radial_lr": 0.5, "penalty": 0.1}
    graphs = (gg.trace(m, torch.zeros(2, 20, dtype=m[0].weight.dtype)) for m in (short, long))
    one, two = (kind(graph, **settings) for graph in graphs)
    bound = 30 * torch.finfo(dtype).eps
    for t in range(5):
        for k, (p, q) in enumerate(zip(short.parameters(), long.parameters(), strict=True)):
            q.data.copy_(p.data)
            p.grad = noise(p, 10 * t + k)
            q.grad = p.grad.double()
        one.step()
        two.step()
        for p, q in zip(short.parameters(), long.parameters(), strict=True):
            assert p.dtype == dtype and (p.double() - q).norm() <= bound * q.norm()


@pytest.mark.parametrize("name", ["lr", "radial_lr", "penalty", "share", "mixing", "radial_limit"])
def test_negative_settings_are_refused(name: str) -> None:
    settings = {"lr": 1.0, "radial_lr": 1.0, "penalty": 1.0} | {name: -0.5}
    with pytest.raises(ValueError, match=rf"cannot make AdaRad: {name} is -0.5; give a number"):
        gg.AdaRad(traced(mlp(2, 3, 1)), **settings)


def stepped(optimizer, model: nn.Module, seed: int) -> None:
    for k, p in enumerate(model.parameters()):
        p.grad = noise(p, 31 * seed + k)
    optimizer.step()


@pytest.mark.parametrize("kind", [gg.AdaRad, gg.AdaRadM])
def test_old_units_step_on_as_if_nothing_had_grown(kind) -> None:
    """New units start anew; old fan-ins get zeros, with gradients of zero here, and go on."""
    model = mlp(4, 3, 2, bias=True)
    graph = traced(model)
    settings = {"lr": 0.1, "radial_lr": 0.05, "penalty": 0.01}
    optimizer = kind(graph, **settings)
    for t in range(5):
        stepped(optimizer, model, t)
    control_model, control = copy.deepcopy((model, optimizer))
    grown = gg.apply(graph, gg.Widen("0", 2, at=1))
    gg.migrate(optimizer, grown)
    assert optimizer.fans.count == 7
    wide = gg.lower(grown.graph)
    old = [0, 3, 4]
    for t in range(5, 10):
        for k, p in enumerate(control_model.parameters()):
            p.grad = noise(p, 31 * t + k)
        control.step()
        for name, p in wide.named_parameters():
            narrow = control_model.get_parameter(name).grad
            p.grad = torch.zeros_like(p)
            if name.startswith("0."):
                p.grad[old] = narrow
            elif name == "2.weight":
                p.grad[:, old] = narrow
            else:
                p.grad = narrow.clone()
        optimizer.step()
        first, last = wide.get_parameter("0.weight"), wide.get_parameter("2.weight")
        assert torch.allclose(first[old], control_model[0].weight, rtol=0, atol=1e-13)
        assert torch.allclose(last[:, old], control_model[2].weight, rtol=0, atol=1e-13)


def test_a_new_unit_starts_with_capacity_zero_and_a_removed_one_takes_its_own_along() -> None:
    model = mlp(4, 3, 2)
    graph = traced(model)
    optimizer = gg.AdaRad(graph, lr=0.1, radial_lr=0.0, penalty=0.0)
    stepped(optimizer, model, 0)
    before = {k: v.clone() for k, v in optimizer.state["fans"].items()}
    grown = gg.apply(graph, gg.Widen("0", 1, at=0))
    gg.migrate(optimizer, grown)
    state = optimizer.state["fans"]
    assert state["running"][1].tolist() == [0.0, *before["running"][1].tolist()]
    assert torch.equal(state["most"], before["most"])
    removed = gg.apply(grown.graph, gg.Remove("0", (0,)))
    gg.migrate(optimizer, removed)
    assert torch.equal(optimizer.state["fans"]["running"], before["running"])


def test_means_are_at_right_angles_again_after_a_removal() -> None:
    model = mlp(4, 3, 2)
    graph = traced(model)
    optimizer = gg.AdaRadM(graph, lr=0.1, radial_lr=0.05, penalty=0.01)
    for t in range(5):
        stepped(optimizer, model, t)
    with torch.no_grad():
        model[0].weight[1] = 0
    grown = gg.apply(graph, gg.Remove("0", (1,)))
    gg.migrate(optimizer, grown)
    for t in range(3):
        for path in ("0.weight", "2.weight"):
            weight = grown.graph.state[path]
            mean = optimizer.state[weight]["mean"]
            assert mean.shape == weight.shape
            assert (mean * weight).sum(1).abs().max() <= 1e-13
        stepped(optimizer, gg.lower(grown.graph), t)


@pytest.mark.parametrize("kind", [gg.AdaRad, gg.AdaRadM])
def test_a_state_dict_and_a_copy_go_on_in_the_same_way(kind) -> None:
    model = mlp(4, 3, 2, bias=True)
    graph = traced(model)
    settings = {"lr": 0.1, "radial_lr": 0.05, "penalty": 0.01}
    optimizer = kind(graph, **settings)
    stepped(optimizer, model, 0)
    grown = gg.apply(graph, gg.Widen("0", 2))
    gg.migrate(optimizer, grown)
    model = gg.lower(grown.graph)
    stepped(optimizer, model, 1)
    twin = copy.deepcopy(model)
    fresh = kind(gg.trace(twin, torch.zeros(2, 4).double()), lr=9.0, radial_lr=9.0, penalty=9.0)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied, copy_optimizer = copy.deepcopy((model, optimizer))
    for t in range(2, 5):
        stepped(optimizer, model, t)
        stepped(fresh, twin, t)
        stepped(copy_optimizer, copied, t)
        for p, q, r in zip(model.parameters(), twin.parameters(), copied.parameters(), strict=True):
            assert torch.equal(p, q) and torch.equal(p, r)


@pytest.mark.parametrize("kind", [gg.AdaRad, gg.AdaRadM])
def test_a_loaded_state_is_the_loaders_own(kind) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    graph = gg.trace(model, torch.randn(5, 3).double())
    first, second = (kind(graph, lr=0.1, radial_lr=0.01, penalty=0.1) for _ in range(2))
    gg.lower(graph)(torch.randn(5, 3).double()).sum().backward()
    first.step()
    second.load_state_dict(first.state_dict())
    before = {name: value.clone() for name, value in second.state["fans"].items()}
    first.step()
    gg.migrate(first, gg.apply(graph, gg.Widen("0", 2)))
    assert all(torch.equal(second.state["fans"][name], value) for name, value in before.items())


@pytest.mark.parametrize("kind", [gg.AdaRad, gg.AdaRadM])
def test_a_new_layer_joins_with_fan_ins_of_its_own(kind) -> None:
    model = mlp(4, 3, 2, bias=True)
    graph = traced(model)
    optimizer = kind(graph, lr=0.1, radial_lr=0.1, penalty=0.1)
    stepped(optimizer, model, 0)
    before = optimizer.state["fans"]["running"][1].clone()
    grown = gg.apply(graph, gg.Deepen("2"))
    gg.migrate(optimizer, grown)
    assert optimizer.fans.names == ("0", "2_in", "2")
    assert optimizer.state["fans"]["running"][1].tolist() == [
        *before[:3].tolist(),
        *[0.0] * 3,
        *before[3:].tolist(),
    ]
    fresh = kind(grown.graph, lr=9.0, radial_lr=9.0, penalty=9.0)
    names = [group["name"] for group in optimizer.param_groups]
    assert names == ["0", "2_in", "2"] == [group["name"] for group in fresh.param_groups]
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}
    fresh.load_state_dict(optimizer.state_dict())
    weight = grown.graph.state["2_in.weight"]
    length = weight.detach().norm(dim=1)
    bias = grown.graph.state.get("2_in.bias")
    for p in grown.graph.state.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert bias is not None or weight.shape == (3, 3)
    assert torch.allclose(weight.norm(dim=1), length - 0.01, atol=1e-12)


def test_capping_a_norm_leaves_the_fan_ins_as_they_are() -> None:
    model, graph = stage()
    optimizer = gg.AdaRad(graph, lr=0.1, radial_lr=0.1, penalty=0.1)
    stepped(optimizer, model, 0)
    before = optimizer.state["fans"]["running"].clone()
    grown = gg.apply(graph, gg.Cap("norm"))
    gg.migrate(optimizer, grown)
    assert torch.equal(optimizer.state["fans"]["running"], before)
    assert "rest" not in [group["name"] for group in optimizer.param_groups]
    stepped(optimizer, gg.lower(grown.graph), 1)


@pytest.mark.parametrize("kind", [gg.AdaRad, gg.AdaRadM])
@given(net=networks(), seed=st.integers(0, 2**16))
@settings(max_examples=25)
def test_any_network_steps_grows_and_steps(kind, net, seed: int) -> None:
    """Every trainable parameter is in one fan-in or in none, and lengths change as they should."""
    graph = net.trace()
    fans = gg.fan_ins(graph)
    assert len({part.path for part in fans.parts}) == len(fans.parts)
    numbers = torch.cat([part.units for part in fans.parts]).unique()
    assert numbers.tolist() == list(range(fans.count))
    optimizer = kind(graph, lr=0.1, radial_lr=0.01, penalty=1.0)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = {id(t) for t in graph.state.values() if isinstance(t, nn.Parameter)}
    assert held == trained

    def lengths(now: gg.Graph) -> Tensor:
        fans = gg.fan_ins(now)
        total = torch.zeros(fans.count).double()
        for part in fans.parts:
            dims = tuple(range(len(part.dims)))
            weight = now.state[part.path].detach().movedim(part.dims, dims)
            total.index_add_(0, part.units, weight.reshape(len(part.units), -1).square().sum(1))
        return total.sqrt()

    def idle(now: gg.Graph) -> None:
        """Step without gradients, so that every fan-in gets shorter by 0.01."""
        before = lengths(now)
        for p in {id(t): t for t in now.state.values() if t.requires_grad}.values():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        found = lengths(now)
        assert torch.allclose(found, (before - 0.01).clamp(min=0), rtol=0, atol=1e-12)

    idle(graph)
    for rewrite in gg.candidates(graph, gg.Widen, units=1)[:2]:
        grown = gg.apply(graph, rewrite, verify=False)
        gg.migrate(optimizer, grown)
        graph = grown.graph
        idle(graph)
    for k, p in enumerate({id(t): t for t in graph.state.values() if t.requires_grad}.values()):
        p.grad = noise(p, seed + k)
    optimizer.step()
    assert all(bool(t.isfinite().all()) for t in graph.state.values())


def test_sparse_gradients_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))
    tokens = torch.tensor([[1, 2]])
    optimizer = gg.AdaRad(gg.trace(model, tokens), lr=1.0, radial_lr=1.0, penalty=0.0)
    model(tokens).sum().backward()
    with pytest.raises(ValueError, match=r"cannot step AdaRad: the gradient of '0.weight' is sp"):
        optimizer.step()
