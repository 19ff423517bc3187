"""A lowered graph is an ordinary torch module: whatever holds for those is checked here."""

from __future__ import annotations

import copy
import gc
import io
import linecache
import os
import pickle
import subprocess
import sys
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from graphgrow.errors import NotApplicable, UnsupportedOp
from graphgrow.ir import lower as room
from graphgrow.ir.assemble import assemble, place, shell, tensors
from graphgrow.ir.graph import Graph
from graphgrow.ir.lower import lower
from graphgrow.ir.trace import trace

ROOT = Path(room.__file__).parents[2]


class Block(nn.Module):
    """A residual branch whose dropout is a functional call in a user's module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("shift", torch.ones(4, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(self.norm(self.conv(x)).relu(), 0.5, self.training)
        return x + y * self.shift


class Net(nn.Module):
    """A bit of everything, called with images of 6 by 6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(144, 5)
        self.scale = nn.Parameter(torch.ones(5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.head(x.reshape(x.shape[0], -1)) * self.scale


class Mlp(nn.Module):
    """Two layers, called with 3 features."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 4)
        self.down = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Heads(nn.Module):
    """Another structure in train mode than in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.main, self.aux = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        x = self.body(x).relu()
        return (self.main(x), self.aux(x)) if self.training else self.main(x)


class Wrap(nn.Module):
    """A model around one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Tensor) -> Any:
        return self.layer(*args)


class Tagged(nn.Linear):
    """A user's subclass of a torch layer, with what such classes carry."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.tag = "mine"
        self.calls: list[int] = []
        self.again = [self.weight]
        self.register_forward_hook(self.count)

    def count(self, *_: Any) -> None:
        self.calls.append(1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.again[0].T

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tag": "stored"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "restored": True})


class Symmetric(nn.Module):
    """A parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


def images(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 6, 6, dtype=torch.float64)


def features(n: int = 5) -> Tensor:
    return torch.randn(n, 3, dtype=torch.float64)


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def lowered(model: nn.Module, *inputs: Tensor) -> nn.Module:
    return lower(trace(model.double(), *inputs))


def same(one: nn.Module, other: nn.Module, *inputs: Any) -> bool:
    """Return whether two modules agree to the bit, whatever they draw at random."""
    outs = []
    for model in (one, other):
        torch.manual_seed(1)
        outs.append(copy.deepcopy(model)(*inputs))
    flat = [torch.utils._pytree.tree_leaves(out) for out in outs]
    return all(torch.equal(a, b) for a, b in zip(*flat, strict=True))


def widened(graph: Graph, width: int = 6) -> Graph:
    """Return the graph of an Mlp with other weights for `width` hidden units."""
    up, down = (shell(graph.modules[name], keep_class=True) for name in ("up", "down"))
    up.out_features = down.in_features = width
    shapes = {"up.weight": (width, 3), "up.bias": (width,), "down.weight": (2, width)}
    new = {p: nn.Parameter(torch.randn(s, dtype=torch.float64)) for p, s in shapes.items()}
    modules = {**graph.modules, "up": up, "down": down}
    return replace(graph, modules=modules, state={**graph.state, **new})


def edited(graph: Graph, sentence: str) -> Graph:
    """Return the graph with another call in its forward, marked so."""
    structure = copy.deepcopy(graph.train)
    node = next(node for node in structure.nodes if node.op == "call_function")
    node.target, node.meta["edited"] = torch.sin, sentence
    return replace(graph, train=structure, eval=structure)


# --------------------------------------------------------------------------- what the module is


@pytest.mark.parametrize("training", [True, False])
def test_a_lowered_model_gives_the_same_outputs_in_both_modes(training: bool) -> None:
    model = net()
    made = lowered(model, images()).train(training)
    assert same(model.train(training), made, images(3))


@pytest.mark.parametrize("training", [True, False])
def test_two_structures_follow_the_mode_of_the_lowered_module(training: bool) -> None:
    model = Heads().double()
    made = lowered(model, features()).train(training)
    assert same(model.train(training), made, features(7))


def test_two_structures_are_one_forward_with_a_branch() -> None:
    assert "if self.training:" in lowered(Heads(), features()).code


def test_modes_with_different_arguments_are_refused() -> None:
    graph = trace(Mlp().double(), features())
    renamed = torch.fx.Graph()
    renamed.output(renamed.placeholder("y"))
    with pytest.raises(UnsupportedOp, match="two modes"):
        lower(replace(graph, eval=renamed))


def test_the_keys_and_their_order_stay() -> None:
    model = net()
    assert list(lowered(model, images()).state_dict()) == list(model.state_dict())


def test_the_parameters_and_buffers_are_the_models_own_objects() -> None:
    model = net()
    held = dict(tensors(lowered(model, images())))
    assert all(held[path] is tensor for path, tensor in tensors(model))


def test_frozen_parameters_stay_frozen() -> None:
    model = net()
    assert not lowered(model, images()).get_parameter("scale").requires_grad


def test_the_class_is_named_after_the_users() -> None:
    assert type(lowered(net(), images())).__name__ == "Net"


def test_a_printed_leaf_shows_its_width() -> None:
    made = lower(widened(trace(Mlp().double(), features())))
    assert "(up): Linear(in_features=3, out_features=6, bias=True)" in repr(made)


def test_the_code_is_python_that_reads_like_the_model() -> None:
    assert lowered(Mlp(), features()).code.splitlines()[0] == "def forward(self, x):"


def test_a_layer_of_the_user_that_is_called_code_stays() -> None:
    class Coder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.code = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.code(x)

    assert isinstance(lowered(Coder(), features()).code, nn.Linear)


def test_the_mode_reaches_every_submodule() -> None:
    made = lowered(net(), images()).eval()
    assert not any(module.training for module in made.modules())


def test_the_mode_of_the_traced_model_is_kept() -> None:
    assert not lowered(net().eval(), images()).training


def test_a_buffer_that_is_not_saved_is_not_saved() -> None:
    made = lowered(net(), images())
    assert "shift" in made.blocks.get_submodule("0")._buffers
    assert "blocks.0.shift" not in made.state_dict()


def test_tied_parameters_stay_tied() -> None:
    model = Wrap(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    model.layer[1].weight = model.layer[0].weight
    held = dict(tensors(lowered(model, features())))
    assert held["layer.0.weight"] is held["layer.1.weight"]


def test_a_shared_module_stays_shared() -> None:
    layer = nn.Linear(3, 3)
    made = lowered(Wrap(nn.Sequential(layer, nn.ReLU(), layer)), features())
    assert made.get_submodule("layer.0") is made.get_submodule("layer.2")


def test_hooks_on_leaves_stay() -> None:
    model, seen = Mlp(), []
    model.up.register_forward_hook(lambda *_: seen.append(1))
    made = lowered(model, features())
    seen.clear()
    made(features())
    assert seen == [1]


def test_a_hook_added_later_is_the_lowered_modules_alone() -> None:
    model = Mlp()
    lowered(model, features()).up.register_forward_hook(lambda *_: None)
    assert not model.up._forward_hooks


# --------------------------------------------------------------------------- awkward leaves


def test_attention_keeps_its_raw_weight_and_its_child() -> None:
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    model = Wrap(nn.MultiheadAttention(8, 2, batch_first=True)).double()
    made = lowered(model, x, x, x)
    assert same(model, made, x, x, x)
    assert type(made.layer.out_proj) is type(model.layer.out_proj)


def test_the_flat_weights_of_an_lstm_are_the_graphs_tensors() -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    graph = trace(Wrap(nn.LSTM(3, 4)).double(), x)
    new = nn.Parameter(torch.randn(16, 3, dtype=torch.float64))
    made = lower(replace(graph, state={**graph.state, "layer.weight_ih_l0": new}))
    assert made.layer._flat_weights[0] is new


def test_a_lowered_lstm_has_nothing_to_set_right_at_its_first_call() -> None:
    graph = trace(Wrap(nn.LSTM(3, 4)).double(), torch.randn(2, 5, 3, dtype=torch.float64))
    new = nn.Parameter(torch.randn(16, 3, dtype=torch.float64))
    made = lower(replace(graph, state={**graph.state, "layer.weight_ih_l0": new}))
    assert not made.layer._weights_have_changed()


def test_lowering_an_lstm_leaves_the_users_flat_weights_alone() -> None:
    model = Wrap(nn.LSTM(3, 4)).double()
    graph = trace(model, torch.randn(2, 5, 3, dtype=torch.float64))
    new = nn.Parameter(torch.randn(16, 3, dtype=torch.float64))
    lower(replace(graph, state={**graph.state, "layer.weight_ih_l0": new}))
    assert model.layer._flat_weights[0] is model.layer.weight_ih_l0


def parametrized() -> nn.Module:
    model = Wrap(nn.Linear(3, 3)).double()
    parametrize.register_parametrization(model.layer, "weight", Symmetric())
    return model


def test_a_parametrized_layer_stays_parametrized() -> None:
    model = parametrized()
    made = lowered(model, features())
    assert list(made.state_dict()) == list(model.state_dict())
    assert same(model, made, features())


def test_a_parametrized_layer_reads_the_graphs_tensor() -> None:
    graph = trace(parametrized(), features())
    path = "layer.parametrizations.weight.original"
    new = nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))
    assert not lower(replace(graph, state={**graph.state, path: new})).layer.weight.any()


def test_a_copy_of_a_parametrized_layer_has_weights_of_its_own() -> None:
    made = lowered(parametrized(), features())
    twin = copy.deepcopy(made)
    with torch.no_grad():
        twin.layer.parametrizations.weight.original.zero_()
    assert made.layer.weight.any() and not twin.layer.weight.any()


def test_a_users_subclass_keeps_its_attributes_and_its_own_state_functions_unasked() -> None:
    layer = lowered(Wrap(Tagged(3, 3)), features()).layer
    assert (type(layer), layer.tag, hasattr(layer, "restored")) == (Tagged, "mine", False)


def test_a_second_reference_to_a_weight_follows_it() -> None:
    graph = trace(Wrap(Tagged(3, 3)).double(), features())
    new = nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))
    made = lower(replace(graph, state={**graph.state, "layer.weight": new}))
    assert made.layer.again[0] is new


def reshelled() -> tuple[Tagged, Graph, nn.Parameter]:
    """Return a layer, a graph with another template for it, twice removed, and its new weight."""
    model = Wrap(Tagged(3, 3)).double()
    graph = trace(model, features())
    again = shell(shell(model.layer, keep_class=True), keep_class=True)
    new = nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))
    state = {**graph.state, "layer.weight": new}
    return model.layer, replace(graph, modules={**graph.modules, "layer": again}, state=state), new


def test_a_second_reference_survives_a_changed_template() -> None:
    _, graph, new = reshelled()
    assert lower(graph).layer.again[0] is new


def test_a_hook_bound_to_the_layer_survives_a_changed_template() -> None:
    layer, graph, _ = reshelled()
    before = len(layer.calls)
    lower(graph)(features())
    assert len(layer.calls) == before


def test_a_hook_bound_to_the_layer_is_bound_to_its_copy() -> None:
    model = Wrap(Tagged(3, 3))
    made = lowered(model, features())
    before = len(model.layer.calls)
    made(features())
    assert len(model.layer.calls) == before


def test_a_layer_that_is_never_called_keeps_its_class() -> None:
    model = Mlp()
    model.spare = nn.Sequential(nn.Linear(2, 2))
    assert type(lowered(model, features()).get_submodule("spare.0")) is nn.Linear


def test_a_compiled_layer_does_not_run_the_users_tensors() -> None:
    model = Mlp()
    model.up._compiled_call_impl = lambda x: x * torch.nan
    made = assemble({"": model, "up": model.up}, frozenset({"up"}), {})
    assert made.up._compiled_call_impl is None


def test_a_parameter_that_became_a_buffer_is_read_and_saved() -> None:
    layer = shell(nn.Linear(3, 2), keep_class=True)
    place(layer, "weight", torch.ones(2, 3))
    assert layer.weight is layer.state_dict(keep_vars=True)["weight"]


def test_new_modules_come_in_the_order_given() -> None:
    made = assemble({"": nn.Module(), "b": nn.ReLU(), "a": nn.ReLU()}, frozenset("ab"), {})
    assert list(made._modules) == ["b", "a"]


def test_a_module_that_is_gone_leaves_no_name_behind() -> None:
    made = assemble({"": Mlp(), "up": nn.Identity()}, frozenset({"up"}), {})
    assert list(made._modules) == ["up"]


def test_a_leaf_may_be_called_at_its_second_path_alone() -> None:
    layer = nn.ReLU()
    made = assemble({"": nn.Module(), "a": layer, "b": layer}, frozenset("b"), {})
    assert isinstance(made.a, nn.ReLU)


# ----------------------------------------------------------------------- what torch does with it


def test_a_copy_is_independent_and_of_the_same_class() -> None:
    made = lowered(net(), images())
    twin = copy.deepcopy(made)
    with torch.no_grad():
        twin.stem.weight.zero_()
    assert type(twin) is type(made) and made.stem.weight.any()


def test_a_pickle_holds_no_code_objects_and_comes_back_the_same() -> None:
    made = lowered(net(), images()).eval()
    assert same(made, pickle.loads(pickle.dumps(made)), images())


def test_a_pickle_names_only_what_the_forward_uses() -> None:
    assert b"pytree" not in pickle.dumps(lowered(net(), images()))


def test_a_pickle_loads_in_a_fresh_process(tmp_path: Path) -> None:
    made, x = lowered(net(), images()).eval(), images()
    (tmp_path / "model").write_bytes(pickle.dumps((made, x, made(x))))
    code = (
        "import pickle; m, x, y = pickle.load(open('model', 'rb')); print(bool((m(x) == y).all()))"
    )
    command = [sys.executable, "-c", code]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run(command, capture_output=True, env=env, cwd=tmp_path, text=True)
    assert out.stdout.strip() == "True", out.stderr


def test_a_class_derived_from_a_lowered_one_copies_as_itself() -> None:
    made = lowered(Mlp(), features())
    made.__class__ = type("Derived", (type(made),), {})
    assert type(copy.deepcopy(made)) is type(made)


def test_a_saved_state_loads_into_the_users_model() -> None:
    model, file = Mlp(), io.BytesIO()
    torch.save(lowered(model, features()).state_dict(), file)
    file.seek(0)
    fresh = Mlp().double()
    fresh.load_state_dict(torch.load(file))
    assert same(model, fresh, features())


def test_a_traceback_shows_the_generated_line() -> None:
    made = lowered(Mlp(), features())
    with pytest.raises(RuntimeError) as caught:
        made(torch.ones(2, 4, dtype=torch.float64))
    assert "up = self.up(x)" in "".join(traceback.format_tb(caught.value.__traceback__))


def test_the_source_goes_when_the_class_goes() -> None:
    file = type(lowered(Mlp(), features())).forward.__code__.co_filename
    gc.collect()
    assert file not in linecache.cache


def test_a_lowered_model_compiles_as_one_graph() -> None:
    made, x = lowered(net(), images()).eval(), images()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), made(x), rtol=0, atol=1e-12)


def test_a_lowered_model_exports() -> None:
    made, x = lowered(net(), images()).eval(), images()
    exported = torch.export.export(made, (x,))
    torch.testing.assert_close(exported.module()(x), made(x), rtol=0, atol=1e-12)


def test_onnxruntime_computes_the_same(tmp_path: Path) -> None:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason="exporting to ONNX needs the test extra")
    runtime = pytest.importorskip("onnxruntime", reason="running ONNX needs the test extra")
    made, x = lowered(net(), images()).float().eval(), images().float()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*LeafSpec", FutureWarning)  # inside the exporter
        torch.onnx.export(made, (x,), tmp_path / "net.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), made(x).detach(), rtol=0, atol=1e-5)


def one_rank(rank: int, store: str, model: nn.Module, x: Tensor, out: str) -> None:
    """Save the gradients that process `rank` of two holds after its half of the batch."""
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    parallel = nn.parallel.DistributedDataParallel(model)
    parallel(x.chunk(2)[rank]).square().mean().backward()
    torch.save([p.grad for p in model.parameters()], f"{out}/{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_get_the_gradients_of_one(tmp_path: Path) -> None:
    made, x = lowered(Mlp(), features()), features(8)
    args = (str(tmp_path / "store"), copy.deepcopy(made), x, str(tmp_path))
    torch.multiprocessing.spawn(one_rank, args, nprocs=2)
    made(x).square().mean().backward()
    for rank in "01":
        found = torch.load(tmp_path / rank)
        torch.testing.assert_close(found, [p.grad for p in made.parameters()], rtol=0, atol=1e-12)


def test_a_lowered_model_runs_in_bfloat16_as_the_users_does() -> None:
    model = net().eval()
    made = copy.deepcopy(lowered(model, images())).bfloat16()
    assert same(copy.deepcopy(model).bfloat16(), made, images().bfloat16())


def test_a_lowered_model_runs_channels_last_as_the_users_does() -> None:
    model = net().eval()
    made = copy.deepcopy(lowered(model, images())).to(memory_format=torch.channels_last)
    x = images().to(memory_format=torch.channels_last)
    torch.testing.assert_close(made(x), model(x), rtol=0, atol=1e-12)


def test_a_lowered_model_can_be_traced_and_lowered_again() -> None:
    made = lowered(net(), images())
    assert same(made, lowered(made, images()), images())


# --------------------------------------------------------------------------- into the user's model


def test_writing_back_gives_the_users_own_object() -> None:
    model = Mlp().double()
    assert lower(trace(model, features()), into=model) is model


def test_writing_back_a_wider_layer_computes_what_the_graph_does() -> None:
    model = Mlp().double()
    graph = widened(trace(model, features()))
    assert same(lower(graph, into=model), lower(graph), features())


def test_writing_back_keeps_attributes_truthful() -> None:
    model = Mlp().double()
    lower(widened(trace(model, features())), into=model)
    assert (model.up.out_features, model.down.in_features) == (6, 6)


def test_writing_back_leaves_tensors_that_are_the_same_alone() -> None:
    model = Mlp().double()
    bias = model.down.bias
    lower(widened(trace(model, features())), into=model)
    assert model.down.bias is bias


def test_writing_back_leaves_the_mode_alone() -> None:
    model = Mlp().double()
    graph = widened(trace(model, features()))
    assert not lower(graph, into=model.eval()).up.training


def test_writing_back_updates_the_flat_weights_of_an_lstm() -> None:
    model = Wrap(nn.LSTM(3, 4)).double()
    graph = trace(model, torch.randn(2, 5, 3, dtype=torch.float64))
    new = nn.Parameter(torch.randn(16, 3, dtype=torch.float64))
    lower(replace(graph, state={**graph.state, "layer.weight_ih_l0": new}), into=model)
    assert model.layer._flat_weights[0] is new


def test_writing_back_reaches_below_a_parametrization() -> None:
    model = parametrized()
    path = "layer.parametrizations.weight.original"
    graph = trace(model, features())
    new = nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))
    lower(replace(graph, state={**graph.state, path: new}), into=model)
    assert not model.layer.weight.any()


def test_writing_back_updates_second_references_to_a_weight() -> None:
    model = Wrap(Tagged(3, 3)).double()
    graph = trace(model, features())
    new = nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))
    lower(replace(graph, state={**graph.state, "layer.weight": new}), into=model)
    assert model.layer.again[0] is new


def test_a_constant_in_the_users_code_is_no_obstacle_to_writing_back() -> None:
    class Shifted(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.plain = torch.ones(2, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.plain

    model = Shifted().double()
    assert lower(trace(model, features()), into=model) is model


def more(table: Mapping[str, Any], **items: Any) -> dict[str, Any]:
    return {**table, **items}


def less(table: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {path: value for path, value in table.items() if path != name}


MISFITS = {
    "it has no module 'new'": lambda g: replace(g, modules=more(g.modules, new=nn.ReLU())),
    "the graph has no module 'up'": lambda g: replace(g, modules=less(g.modules, "up")),
    "it has no tensor 'gain'": lambda g: replace(
        g, state=more(g.state, gain=nn.Parameter(torch.ones(2)))
    ),
    "the graph has no tensor 'up.bias'": lambda g: replace(g, state=less(g.state, "up.bias")),
    "module 'up' is a Linear": lambda g: replace(g, modules=more(g.modules, up=nn.Identity())),
    "tensor 'up.weight' is a parameter": lambda g: replace(
        g, state=more(g.state, **{"up.weight": torch.ones(4, 3)})
    ),
    "view literal 64 -> 72": lambda g: edited(g, "view literal 64 -> 72"),
}


@pytest.mark.parametrize("sentence", MISFITS)
def test_a_graph_that_does_not_fit_is_refused_with_the_place(sentence: str) -> None:
    model = Mlp().double()
    with pytest.raises(NotApplicable, match=sentence):
        lower(MISFITS[sentence](trace(model, features())), into=model)


@pytest.mark.parametrize("sentence", MISFITS)
def test_a_refusal_leaves_the_model_as_it_was(sentence: str) -> None:
    model = Mlp().double()
    before, graph = dict(tensors(model)), widened(trace(model, features()))
    with pytest.raises(NotApplicable):
        lower(MISFITS[sentence](graph), into=model)
    assert (model.up.out_features, before) == (4, dict(tensors(model)))


def test_layers_that_the_graph_no_longer_shares_are_refused() -> None:
    layer = nn.Linear(3, 3)
    model = Wrap(nn.Sequential(layer, layer)).double()
    graph = trace(model, features())
    split = {**graph.modules, "layer.1": shell(layer, keep_class=True)}
    with pytest.raises(NotApplicable, match="shares a module"):
        lower(replace(graph, modules=split), into=model)
