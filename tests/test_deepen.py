"""A new layer that computes the identity: exact, alive, and an ordinary part of the model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import graphgrow as gg
from graphgrow.io import load, save
from graphgrow.nn import Rational
from graphgrow.passes import layers as room
from graphgrow.passes.journal import rewrite_from_json, rewrites_to_json

EXACT = 1e-10
ODD = ("relu", "leaky_relu", "gelu", "silu", "softplus", "hardswish")
PARAMETRISED = ("rational", "prelu")
LAYERS = [gg.Identity(), gg.Identity(1), gg.Identity(5)]
LAYERS += [gg.Factor(activation=name) for name in PARAMETRISED]
LAYERS += [gg.Split(name) for name in ODD]

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class Net(nn.Module):
    """A layer behind an activation of a stem of its own width, outputs as they come."""

    def __init__(self, stem: nn.Module, layer: nn.Module, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.layer, self.act = stem, layer, act

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.act(self.stem(x)))


@dataclass(frozen=True)
class Drawn:
    """A network and an input that fits it."""

    net: nn.Module
    x: Tensor

    def trace(self) -> gg.Graph:
        return gg.trace(self.net, self.x)


def made(net: nn.Module, *shape: int) -> Drawn:
    """Return a network in float64 with a random input."""
    return Drawn(net.double(), torch.randn(shape, dtype=torch.double))


def mlp(act: Callable[[Tensor], Tensor] = F.relu) -> Drawn:
    torch.manual_seed(0)
    return made(Net(nn.Linear(4, 6), nn.Linear(6, 3), act), 7, 4)


def images(act: Callable[[Tensor], Tensor] = F.relu, **geometry: Any) -> Drawn:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, **{"padding": 1, **geometry})
    return made(Net(nn.Conv2d(3, 4, 1), layer, act), 3, 3, 6, 6)


@st.composite
def nets(draw: st.DrawFn, act: Callable[[Tensor], Tensor] = F.relu) -> Drawn:
    """Return networks with a linear or convolution layer of any geometry, called `layer`."""
    torch.manual_seed(draw(st.integers(0, 99)))
    spatial, bias = draw(st.integers(0, 3)), draw(st.booleans())
    wide, out = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    if spatial == 0:
        shape = (16, *[2] * draw(st.integers(0, 2)), 3)
        return made(Net(_stem(nn.Linear(3, wide)), nn.Linear(wide, out, bias), act), *shape)
    groups = draw(st.integers(1, 3))
    stem = _stem(_CONVOLUTIONS[spatial](2, wide * groups, 1))
    layer = draw(convolutions(spatial, wide * groups, out * groups, groups, bias))
    return made(Net(stem, layer, act), 8, 2, *[5] * spatial)


@st.composite
def deepenings(draw: st.DrawFn) -> tuple[Drawn, Any]:
    """Return networks and layers that are exact in them, behind ReLU or any values."""
    layer = draw(st.sampled_from(LAYERS))
    return draw(nets(F.relu if isinstance(layer, gg.Identity) else nn.Identity())), layer


@st.composite
def convolutions(
    draw: st.DrawFn, spatial: int, inputs: int, outputs: int, groups: int, bias: bool
) -> nn.Module:
    """Return convolutions, transposed ones among them."""
    geometry: dict[str, Any] = {
        "kernel_size": draw(st.integers(1, 3)),
        "stride": draw(st.integers(1, 2)),
        "dilation": draw(st.integers(1, 2)),
        "padding": draw(st.integers(0, 2)),
        "groups": groups,
        "bias": bias,
    }
    if draw(st.booleans()):
        return _TRANSPOSED[spatial](inputs, outputs, **geometry)
    # torch has reflected padding for volumes only with sizes that differ from what is drawn here
    mode = draw(st.sampled_from(["zeros", "circular", "replicate"]))
    if geometry["stride"] == 1 and geometry["kernel_size"] % 2 and draw(st.booleans()):
        geometry["padding"] = "same"
    return _CONVOLUTIONS[spatial](inputs, outputs, padding_mode=mode, **geometry)


def _stem(layer: nn.Module) -> nn.Module:
    """Return `layer` without a bias, so that its values are of both signs."""
    nn.init.zeros_(layer.bias)
    return layer


def apart(before: gg.Graph, after: gg.Graph, x: Tensor) -> float:
    return gg.compare(before, after, x).relative


def new_parameters(grown: gg.Grown) -> dict[str, nn.Parameter]:
    """Return the parameters that the graph before had not, or has with other entries now."""
    return {
        path: tensor
        for path, tensor in grown.graph.state.items()
        if isinstance(tensor, nn.Parameter) and grown.before.state.get(path) is not tensor
    }


# ------------------------------------------------------------------------------ properties


@given(nets(), st.sampled_from(LAYERS))
def test_an_inserted_layer_keeps_the_function_in_both_modes(net: Drawn, layer: Any) -> None:
    graph = net.trace()
    grown = gg.apply(graph, gg.Deepen("layer", layer), verify=False)
    assert grown.proof.exact and apart(graph, grown.graph, torch.randn_like(net.x)) <= EXACT


@given(deepenings())
def test_every_new_parameter_gets_a_gradient_within_two_steps(drawn: Any) -> None:
    net, layer = drawn
    grown = gg.apply(net.trace(), gg.Deepen("layer", layer), verify=False)
    model, new = gg.lower(grown.graph), new_parameters(grown)
    alive: set[str] = set()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    target = torch.randn_like(model(net.x))
    for _ in range(2):
        optimizer.zero_grad()
        (model(net.x) - target).square().mean().backward()
        optimizer.step()
        alive |= {path for path, p in new.items() if p.grad is not None and p.grad.any()}
    assert alive == set(new) != set()


@given(deepenings(), st.sampled_from(ODD))
def test_a_place_can_be_deepened_again(drawn: Any, odd: str) -> None:
    net, layer = drawn
    graph = net.trace()
    steps = [layer, None, gg.Split(odd), gg.Factor()]
    grown = gg.apply(graph, *[gg.Deepen("layer", step) for step in steps])
    assert apart(graph, grown.graph, net.x) <= EXACT


@given(nets(), st.sampled_from(LAYERS))
def test_what_is_lowered_can_be_traced_again(net: Drawn, layer: Any) -> None:
    grown = gg.apply(net.trace(), gg.Deepen("layer", layer), verify=False)
    assert apart(grown.graph, gg.trace(gg.lower(grown.graph), net.x), net.x) == 0


@given(deepenings(), st.data())
def test_the_axes_of_the_deeper_graph_can_be_widened(drawn: Any, data: st.DataObject) -> None:
    net, layer = drawn
    grown = gg.apply(net.trace(), gg.Deepen("layer", layer), verify=False)
    free = [name for name, axis in grown.graph.axes.items() if axis.obstacle is None]
    axis = data.draw(st.sampled_from(free)) if free else assume(False)
    wider = gg.apply(grown.graph, gg.Widen(str(axis), 2, weights=gg.ZeroOutgoing()))
    assert apart(grown.before, wider.graph, net.x) <= EXACT


@pytest.mark.parametrize("build", [mlp, images])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_new_layer_has_an_axis_that_can_be_widened(build: Any, layer: Any) -> None:
    net = build()
    steps = gg.Deepen("layer", layer), gg.Widen("layer_in", 3, at=1)
    assert apart(net.trace(), gg.apply(net.trace(), *steps).graph, net.x) <= EXACT


@given(nets(), st.sampled_from(LAYERS))
def test_a_rewrite_comes_back_from_json(net: Drawn, layer: Any) -> None:
    grown = gg.apply(net.trace(), gg.Deepen("layer", layer), verify=False)
    text = json.dumps(rewrites_to_json(grown.graph.journal))
    assert tuple(map(rewrite_from_json, json.loads(text))) == grown.graph.journal


@st.composite
def matrices(draw: st.DrawFn) -> tuple[tuple[float, ...], ...]:
    """Return matrices of small whole numbers, many of which do not fit or have no inverse."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    numbers = st.tuples(*[st.integers(-2, 2).map(float)] * columns)
    return draw(st.tuples(*[numbers] * rows))


@given(nets(), matrices(), st.sampled_from([gg.Factor, gg.Split]))
def test_a_matrix_is_refused_or_exact(net: Drawn, rows: Any, scheme: Any) -> None:
    graph, rewrite = net.trace(), gg.Deepen("layer", scheme(matrix=rows))
    sentence = rewrite.obstacle(graph)
    if sentence is None:
        assert apart(graph, gg.apply(graph, rewrite).graph, net.x) <= EXACT
    else:
        with pytest.raises(gg.NotApplicable) as caught:
            gg.apply(graph, rewrite)
        assert str(caught.value) == sentence


@given(nets(), st.sampled_from([gg.Factor, gg.Split]), st.integers(0, 9))
def test_a_given_bias_is_folded_or_refused(net: Drawn, scheme: Any, seed: int) -> None:
    layer: Any = net.net.get_submodule("layer")
    width = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    graph = net.trace()
    rewrite = gg.Deepen("layer", scheme(bias=(0.5,) * width, seed=seed))
    if rewrite.obstacle(graph) is None:
        assert apart(graph, gg.apply(graph, rewrite).graph, net.x) <= EXACT
    else:
        assert layer.bias is None or not isinstance(layer, nn.Linear)


# ------------------------------------------------------------------------------ identity layers


@pytest.mark.parametrize(
    "act",
    [
        *(F.relu, F.relu6, F.hardtanh, torch.abs, torch.relu, Tensor.relu, nn.ReLU(), nn.ReLU6()),
        *(nn.Hardtanh(-0.5, 0.25), lambda x: x.clamp(min=0.1), lambda x: F.relu(x, inplace=True)),
        *(nn.ReLU(inplace=True), lambda x: abs(x), lambda x: torch.clamp(x, -1, 1).contiguous()),
    ],
)
def test_an_idempotent_activation_takes_an_identity_layer_behind_it(act: Any) -> None:
    net = images(act)
    grown = gg.apply(net.trace(), gg.Deepen("layer", gg.Identity()))
    assert grown.proof.exact and "layer_in" in grown.graph.modules


@pytest.mark.parametrize(
    "act", [F.gelu, torch.tanh, F.leaky_relu, nn.SiLU(), nn.ELU(), torch.sigmoid, nn.PReLU()]
)
def test_other_activations_are_refused(act: Any) -> None:
    sentence = gg.Deepen("layer", gg.Identity()).obstacle(images(act).trace())
    assert sentence is not None and "which is not an idempotent activation" in sentence


def test_the_sentence_at_an_activation_names_it() -> None:
    sentence = gg.Deepen("act").obstacle(mlp(nn.GELU()).trace())
    assert sentence == (
        "cannot deepen at 'act': GELU is not idempotent, so it would change what it gave before; "
        "give the path of the layer that reads it, with Split() or Factor()"
    )


@pytest.mark.parametrize("build", [mlp, images])
def test_an_activation_takes_the_layer_that_its_values_have_the_shape_for(build: Any) -> None:
    graph = build(nn.ReLU()).trace()
    grown = gg.apply(graph, gg.Deepen("act"))
    kind = nn.Linear if build is mlp else nn.Conv2d
    assert type(grown.graph.modules["act_out"]) is kind and "act_act" in grown.graph.modules


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Dropout(0.3)])
def test_poolings_between_keep_what_relu_gave(pool: nn.Module) -> None:
    net = images(nn.Sequential(nn.ReLU(), pool))
    assert gg.apply(net.trace(), gg.Deepen("layer", gg.Identity())).proof.exact


def test_averages_leave_the_range_of_abs_below_but_not_of_clamp() -> None:
    net = images(nn.Sequential(nn.Hardtanh(0.2, 0.4), nn.Dropout(0.3)))
    assert gg.Deepen("layer", gg.Identity()).obstacle(net.trace()) is not None


def test_an_activation_further_up_does_not_count() -> None:
    net = images(nn.Sequential(nn.ReLU(), nn.AvgPool2d(2), nn.GELU()))
    assert gg.Deepen("layer", gg.Identity()).obstacle(net.trace()) is not None


def test_an_identity_convolution_may_have_groups() -> None:
    net = images(nn.ReLU())
    grown = gg.apply(net.trace(), gg.Deepen("act", gg.Identity(3, groups=4)))
    assert grown.graph.state["act_out.weight"].shape == (4, 1, 3, 3)


@pytest.mark.parametrize("layer", [gg.Identity(2), gg.Identity(0), gg.Identity(3, groups=3)])
def test_a_kernel_without_a_centre_and_uneven_groups_are_refused(layer: gg.Identity) -> None:
    with pytest.raises(gg.NotApplicable, match="give a"):
        gg.apply(images(nn.ReLU()).trace(), gg.Deepen("act", layer))


@pytest.mark.parametrize("build", [mlp, images])
def test_a_batch_norm_is_exact_in_eval_mode_alone(build: Any) -> None:
    net = build(nn.ReLU())
    grown = gg.apply(net.trace(), gg.Deepen("layer", gg.Identity(norm=True)))
    found = gg.compare(grown.before, grown.graph, torch.randn_like(net.x))
    assert found.eval.relative <= EXACT < 1e-3 < found.train.relative
    assert (grown.proof.exact, grown.proof.modes) == (False, ("eval",))


def test_the_proof_of_a_batch_norm_says_in_which_mode() -> None:
    grown = gg.apply(mlp().trace(), gg.Deepen("layer", gg.Identity(norm=True)))
    assert "exact in eval, all inputs" in str(grown.proof)
    assert "measured change" in str(grown.proof)


def test_a_batch_norm_starts_from_the_statistics_of_the_example_inputs() -> None:
    net = images(nn.ReLU())
    grown = gg.apply(net.trace(), gg.Deepen("layer", gg.Identity(norm=True)))
    assert gg.compare(grown.before, grown.graph, net.x).train.relative <= EXACT


def test_a_batch_norm_of_sequences_of_features_is_refused() -> None:
    net = made(Net(nn.Linear(4, 6), nn.Linear(6, 3), F.relu), 2, 5, 4)
    sentence = gg.Deepen("layer", gg.Identity(norm=True)).obstacle(net.trace())
    assert sentence is not None and "batch norm needs values of 2 dims" in sentence


# ------------------------------------------------------------------------------ factors and splits


def test_left_out_the_scheme_is_an_identity_where_that_is_exact() -> None:
    (chosen,) = gg.apply(mlp().trace(), gg.Deepen("layer")).graph.journal
    assert chosen == gg.Deepen("layer", gg.Identity())


def test_left_out_the_scheme_is_a_factor_elsewhere() -> None:
    (chosen,) = gg.apply(mlp(torch.tanh).trace(), gg.Deepen("layer")).graph.journal
    assert chosen == gg.Deepen("layer", gg.Factor())


def test_a_random_matrix_is_orthogonal_and_the_seeds_own() -> None:
    graph = images().trace()
    drawn = [
        gg.apply(graph, gg.Deepen("layer", gg.Factor(seed=seed))).graph.state["layer_in.weight"]
        for seed in (0, 0, 1)
    ]
    q = drawn[0].detach().flatten(1)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert (q @ q.mT - torch.eye(4)).abs().max() < 1e-12


def test_a_tall_matrix_makes_a_wider_layer_with_true_sizes() -> None:
    rows = tuple(map(tuple, torch.randn(9, 6, dtype=torch.double).tolist()))
    model = gg.lower(gg.apply(mlp().trace(), gg.Deepen("layer", gg.Split(matrix=rows))).graph)
    assert (model.layer_in.out_features, model.layer.in_features) == (18, 18)


MATRICES = {
    "not invertible, or nearly so": tuple((1.0,) * 6 for _ in range(6)),
    "the matrix is 1 by 2, but Linear reads 6 units; give 6 columns": ((1.0, 2.0),),
    "no table of numbers with equal rows": ((1.0, 2.0), (3.0,)),
    "entries that are not finite": ((float("nan"),) * 6,) * 6,
}


@pytest.mark.parametrize("sentence", MATRICES)
@pytest.mark.parametrize("scheme", [gg.Factor, gg.Split])
def test_a_matrix_that_cannot_be_undone_is_refused(scheme: Any, sentence: str) -> None:
    with pytest.raises(gg.NotApplicable, match=sentence):
        gg.apply(mlp().trace(), gg.Deepen("layer", scheme(matrix=MATRICES[sentence])))


@pytest.mark.parametrize("layer", [gg.Factor(activation="tanh"), gg.Split("tanh")])
def test_an_activation_without_such_an_identity_is_refused(layer: Any) -> None:
    with pytest.raises(
        gg.NotApplicable, match="activation 'tanh' is none of those that fit; give '"
    ):
        gg.apply(mlp().trace(), gg.Deepen("layer", layer))


def test_a_bias_before_padded_zeros_is_refused() -> None:
    with pytest.raises(gg.NotApplicable, match="pads with zeros, so a bias before it"):
        gg.apply(images().trace(), gg.Deepen("layer", gg.Factor(bias=(1.0,) * 4)))


def test_the_rounding_of_a_bad_matrix_is_in_the_proof() -> None:
    rows = tuple(map(tuple, torch.diag(torch.tensor([1.0, 1, 1, 1, 1, 1e-4])).tolist()))
    net = mlp()
    graph = gg.trace(net.net.float(), net.x.float())
    proof = gg.apply(graph, gg.Deepen("layer", gg.Factor(rows))).proof
    assert proof.exact and 1e-2 < proof.rounding < 1 and "condition number 1e+04" in str(proof)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_low_precision_the_change_is_one_of_rounding(dtype: torch.dtype) -> None:
    net = mlp(torch.tanh)
    graph = gg.trace(net.net.to(dtype), net.x.to(dtype))
    grown = gg.apply(graph, gg.Deepen("layer", gg.Split("gelu")))
    found = gg.compare(graph, grown.graph, net.x.to(dtype)).relative
    assert 0 < found < 2 * torch.finfo(dtype).eps
    assert {t.dtype for t in grown.graph.state.values()} == {dtype}


@pytest.mark.parametrize("size", [1.0, 30.0, 1e3])
def test_a_softplus_is_split_exactly_far_from_zero(size: float) -> None:
    net = mlp(torch.tanh)
    grown = gg.apply(net.trace(), gg.Deepen("stem", gg.Split("softplus")))
    assert apart(grown.before, grown.graph, size * net.x) < 1e-14


def test_softmax_and_attention_are_no_places() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 3)).double()
    graph = gg.trace(model, torch.randn(2, 4, dtype=torch.double))
    assert gg.Deepen("1", gg.Factor()).obstacle(graph) == (
        "cannot deepen at '1': LSTM is neither a linear nor a convolution layer; "
        "give the path of one"
    )


# ------------------------------------------------------------------------------ wrong rules


def test_a_forgotten_division_by_the_slope_is_caught(monkeypatch: Any) -> None:
    monkeypatch.setitem(room._ODD, "leaky_relu", (nn.LeakyReLU, 1.0))
    with pytest.raises(gg.NotEquivalent):
        gg.apply(mlp().trace(), gg.Deepen("layer", gg.Split("leaky_relu")))


def test_an_activation_that_is_not_odd_in_its_difference_is_caught(monkeypatch: Any) -> None:
    monkeypatch.setitem(room._ODD, "mish", (nn.Mish, 1.0))
    with pytest.raises(gg.NotEquivalent):
        gg.apply(mlp().trace(), gg.Deepen("layer", gg.Split("mish")))


def test_a_bias_folded_at_a_padded_border_is_caught(monkeypatch: Any) -> None:
    monkeypatch.setattr(room, "_pads_zeros", lambda module: False)
    with pytest.raises(gg.NotEquivalent):
        gg.apply(images().trace(), gg.Deepen("layer", gg.Factor(bias=(1.0,) * 4)))


def test_a_matrix_used_for_its_inverse_is_caught(monkeypatch: Any) -> None:
    monkeypatch.setattr(room.torch.linalg, "solve_triangular", lambda r, q, upper: r)
    with pytest.raises(gg.NotEquivalent):
        gg.apply(mlp().trace(), gg.Deepen("layer", gg.Factor()))


# ------------------------------------------------------------------------------ part of the model


def test_the_old_keys_and_untouched_tensors_stay() -> None:
    net = images()
    model = gg.lower(gg.apply(net.trace(), gg.Deepen("layer", gg.Split())).graph)
    new = model.state_dict().keys() - net.net.state_dict().keys()
    assert new == {"layer_in.weight"} and model.stem.weight is net.net.stem.weight
    assert net.net.state_dict().keys() < model.state_dict().keys()


def test_new_modules_inherit_mode_and_frozen_weights() -> None:
    net = mlp()
    net.net.layer.requires_grad_(False)
    net.net.eval()
    model = gg.lower(gg.apply(net.trace(), gg.Deepen("layer", gg.Factor())).graph)
    assert not any(m.training for m in model.modules())
    assert not any(p.requires_grad for p in (*model.layer_in.parameters(), model.layer_act.alpha))


def test_names_that_are_taken_are_left_alone() -> None:
    net = mlp()
    net.net.layer_act = nn.Linear(2, 2)
    grown = gg.apply(net.trace(), gg.Deepen("layer", gg.Factor()))
    assert {"layer_in2", "layer_act2"} < set(grown.graph.modules)


def test_layers_of_a_sequential_are_named_after_their_number() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x = torch.randn(5, 4, dtype=torch.double)
    grown = gg.apply(gg.trace(model, x), gg.Deepen("2"), gg.Deepen("1"))
    assert {"2_in", "2_act", "1_out", "1_act"} < set(dict(gg.lower(grown.graph).named_children()))


class Twice(nn.Module):
    """A layer and a block that are called two times."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.one = self.other = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(self.fc(F.relu(self.fc(F.relu(x))))))


@pytest.mark.parametrize("at", ["fc", "one.2", "other.2", "other.1"])
def test_a_layer_called_twice_gets_one_new_layer_at_each_call(at: str) -> None:
    net = made(Twice(), 5, 4)
    grown = gg.apply(net.trace(), gg.Deepen(at))
    new = grown.graph.modules.keys() - grown.before.modules.keys()
    called = [node.target for node in grown.graph.eval.nodes if node.target in new]
    assert sorted(called) == sorted(2 * [*dict.fromkeys(called)]) != []


def test_a_shared_block_keeps_its_new_layer_at_both_paths() -> None:
    grown = gg.apply(made(Twice(), 5, 4).trace(), gg.Deepen("one.2", gg.Factor()))
    model = gg.lower(grown.graph)
    assert model.get_submodule("one.2_in") is model.get_submodule("other.2_in")
    assert set(model.state_dict()) == set(grown.graph.state)


class Modes(nn.Module):
    """A head that train mode alone calls."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.main, self.aux = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        x = self.body(x).relu()
        return (self.main(x), self.aux(x)) if self.training else self.main(x)


@pytest.mark.parametrize("at", ["body", "main", "aux"])
def test_both_structures_are_deepened_where_they_call_the_layer(at: str) -> None:
    grown = gg.apply(made(Modes(), 5, 4).trace(), gg.Deepen(at))
    called = [f"{at}_in" in str(g) for g in (grown.graph.train, grown.graph.eval)]
    assert called == [True, at != "aux"]


def test_one_structure_for_both_modes_stays_one() -> None:
    graph = gg.apply(images().trace(), gg.Deepen("layer")).graph
    assert graph.train is graph.eval


def test_a_graph_is_not_changed_by_its_rewrite() -> None:
    graph = images().trace()
    before = str(graph), list(graph.state), list(graph.modules)
    gg.apply(graph, gg.Deepen("layer", gg.Factor()))
    assert (str(graph), list(graph.state), list(graph.modules)) == before


def test_a_tied_weight_is_refused() -> None:
    net = made(Net(nn.Linear(4, 4), nn.Linear(4, 4), F.gelu), 5, 4)
    net.net.layer.weight = net.net.stem.weight
    sentence = gg.Deepen("layer").obstacle(net.trace())
    assert sentence is not None and "tied to 'stem.weight'" in sentence


def test_a_weight_that_code_reads_is_refused() -> None:
    sentence = gg.Deepen("layer", gg.Factor()).obstacle(made(Reads(), 7, 4).trace())
    assert sentence is not None and "code reads its 'layer.weight' as well" in sentence


class Reads(nn.Module):
    """A model whose code reads the weight of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.layer.weight.sum()


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_a_weight_that_is_computed_is_refused(wrap: Any) -> None:
    net = mlp()
    net.net.layer = wrap(net.net.layer)
    sentence = gg.Deepen("layer", gg.Factor()).obstacle(net.trace())
    assert sentence is not None and sentence.startswith("cannot deepen at 'layer': ")


@pytest.mark.parametrize("at", ["nowhere", "unused", ""])
def test_a_place_that_is_not_called_is_refused(at: str) -> None:
    net = mlp()
    net.net.unused = nn.Linear(2, 2).double()
    sentence = gg.Deepen(at).obstacle(net.trace())
    assert sentence is not None and sentence.startswith(f"cannot deepen at '{at}': ")


def test_the_candidates_are_those_without_an_obstacle() -> None:
    graph = images(nn.GELU()).trace()
    assert [c.at for c in gg.candidates(graph, gg.Deepen, layer=gg.Split())] == ["stem", "layer"]
    assert gg.candidates(graph, gg.Deepen, layer=gg.Identity()) == []


@pytest.mark.parametrize("scheme", [gg.Identity(), gg.Factor(), gg.Split("silu")])
def test_an_optimizer_goes_on_with_the_deeper_model(scheme: Any) -> None:
    net = images()
    optimizer = torch.optim.Adam(net.net.parameters(), 1e-3)
    net.net(net.x).square().mean().backward()
    optimizer.step()
    grown = gg.apply(gg.trace(net.net, net.x), gg.Deepen("layer", scheme))
    gg.migrate(optimizer, grown)
    model = gg.lower(grown.graph)
    losses = [_stepped(model, optimizer, net.x) for _ in range(20)]
    assert losses[-1] < losses[0]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def _stepped(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> float:
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_a_factored_weight_counts_as_new_in_the_origin() -> None:
    grown = gg.apply(mlp().trace(), gg.Deepen("layer", gg.Split()))
    rows, columns = grown.origin["layer.weight"].dims
    assert rows is None and columns is not None and columns.tolist() == [-1] * 12


def test_widening_after_deepening_in_one_go_keeps_the_function() -> None:
    graph = mlp().trace()
    steps = gg.Deepen("layer", gg.Factor()), gg.Widen("layer_in", 3), gg.Deepen("layer_in")
    assert apart(graph, gg.apply(graph, *steps).graph, mlp().x) <= EXACT


@pytest.mark.parametrize("build", [mlp, images])
@pytest.mark.parametrize("layer", [*LAYERS, gg.Identity(norm=True)], ids=str)
def test_a_deeper_model_comes_back_on_a_fresh_one(build: Any, layer: Any, tmp_path: Path) -> None:
    net = build(nn.ReLU())
    steps = gg.Deepen("layer", layer), gg.Widen("layer_in", 2), gg.Deepen("layer_in", gg.Split())
    grown = gg.apply(net.trace(), *steps)
    save(tmp_path / "net", grown)
    fresh = copy.deepcopy(net.net)
    for parameter in fresh.parameters():
        nn.init.normal_(parameter)
    again, model = load(tmp_path / "net", fresh), gg.lower(grown.graph)
    assert list(again.state_dict()) == list(model.state_dict())
    assert all(torch.equal(t, again.state_dict()[key]) for key, t in model.state_dict().items())
    for training in (True, False):
        assert torch.equal(again.train(training)(net.x), model.train(training)(net.x))


@pytest.mark.parametrize("build", [mlp, images])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_units_added_to_a_new_layer_can_be_removed_again(build: Any, layer: Any) -> None:
    net = build()
    once = gg.apply(net.trace(), gg.Deepen("layer", layer)).graph
    axis = once.axis("layer_in")
    added = tuple(range(axis.width, axis.width + 2))
    twice = gg.apply(once, gg.Widen(axis.name, 2), gg.Remove(axis.name, added)).graph
    assert str(twice) == str(once)
    assert all(torch.equal(tensor, twice.state[path]) for path, tensor in once.state.items())


REFUSALS: list[tuple[str, Any]] = [
    *((at, layer) for at in ("nowhere", "act", "", "stem.weight") for layer in LAYERS),
    ("layer", gg.Identity(2)),
    ("layer", gg.Identity(3, groups=3)),
    *(("layer", kind(matrix=rows)) for kind in (gg.Factor, gg.Split) for rows in MATRICES.values()),
    *(("layer", kind(bias=(1.0,))) for kind in (gg.Factor, gg.Split)),
    *(("layer", kind(bias=(float("nan"),) * 4)) for kind in (gg.Factor, gg.Split)),
    *(("layer", kind(activation="tanh")) for kind in (gg.Factor, gg.Split)),
]


@pytest.mark.parametrize("act", [nn.GELU(), nn.BatchNorm2d(4), nn.Identity()])
def test_a_refusal_is_one_sentence_with_place_fact_and_way_out(act: nn.Module) -> None:
    graph = images(act).trace()
    for at, layer in [*REFUSALS, ("layer", gg.Identity())]:
        sentence = gg.Deepen(at, layer).obstacle(graph)
        assert sentence is not None and sentence.startswith(f"cannot deepen at '{at}': ")
        fact, _, way = sentence.partition("; ")
        assert fact and way.startswith(("give ", "use ")) and "\n" not in sentence, sentence


# ------------------------------------------------------------------------------ the activation


def test_a_rational_starts_as_the_identity() -> None:
    x = torch.randn(100) * 1e3
    assert torch.equal(Rational()(x), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_rational_has_finite_gradients_in_every_precision(dtype: torch.dtype) -> None:
    act, x = Rational(dtype=dtype), torch.tensor([-6e4, -1, 0, 1, 6e4], dtype=dtype)
    x.requires_grad_()
    (act(x) / 1e4).sum().backward()
    assert all(bool(t.grad.isfinite().all()) for t in (x, *act.parameters()))


def test_a_rational_compiles_and_exports() -> None:
    act, x = Rational(), torch.randn(3, 4)
    nn.init.constant_(act.gamma, 0.5)
    exported = torch.export.export(act, (x,)).module()
    compiled = torch.compile(act, backend="aot_eager")
    assert torch.allclose(exported(x), act(x)) and torch.allclose(compiled(x), act(x))


def test_every_unit_of_a_factor_has_a_rational_of_its_own() -> None:
    x = torch.randn(2, 3, 5, 5, dtype=torch.double)
    graph = gg.trace(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(18, 2)).double(), x)
    grown = gg.apply(graph, gg.Deepen("0", gg.Factor()), gg.Deepen("2", gg.Factor()))
    shapes = {path: tuple(t.shape) for path, t in grown.graph.state.items() if "alpha" in path}
    assert shapes == {"0_act.alpha": (3, 1, 1), "2_act.alpha": (18,)}
    wider = gg.apply(grown.graph, gg.Widen("0_in", 2), gg.Widen("2_in", 1))
    assert wider.graph.state["0_act.beta"].shape == (5, 1, 1)
    act = Rational(2, dtype=torch.double)
    with torch.no_grad():
        act.alpha.copy_(torch.tensor([2.0, 3.0]))
    assert torch.equal(act(x[0, 0, 0, :2]), x[0, 0, 0, :2] * act.alpha)


def test_a_rational_is_the_formula() -> None:
    act, x = Rational(dtype=torch.double), torch.randn(9, dtype=torch.double)
    with torch.no_grad():
        for parameter, value in zip(act.parameters(), (2.0, 3.0, 5.0), strict=True):
            parameter.fill_(value)
    assert torch.allclose(act(x), 2 * x + (3 + 5 * x) / (1 + x**2))
