"""A grown model comes back from its file bit for bit, or not at all."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import graphgrow as gg
from graphgrow.io import load, save


class Net(nn.Module):
    """A network of a user who never heard of graphgrow."""

    def __init__(self, hidden: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.fc1 = nn.Linear(2, hidden)
        self.fc2 = nn.Linear(hidden, classes)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor, *, gain: float = 1.0) -> Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.fc2(self.fc1(x * self.scale).relu()) * gain


def inputs(batch: int = 4) -> Tensor:
    return torch.randn(batch, 1, 6, 6)


def stirred(model: nn.Module) -> nn.Module:
    """Return `model` with every tensor changed, as training changes it."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor))
            else:
                tensor.add_(3)
    return model


def grown_net() -> tuple[gg.Grown, nn.Module]:
    """Return a network widened twice and trained, as graph and as module."""
    graph = gg.trace(Net(), inputs())
    rewrites = gg.Widen("fc1", units=3), gg.Widen("conv", units=2)
    grown = gg.apply(graph, *rewrites)
    return grown, stirred(gg.lower(grown.graph))


def same(a: nn.Module, b: nn.Module) -> bool:
    """Return whether two models have the same state and the same outputs in both modes."""
    state, x = b.state_dict(), inputs()
    a, b = copy.deepcopy(a), copy.deepcopy(b)
    return all(
        value.dtype == state[key].dtype and torch.equal(value, state[key])
        for key, value in a.state_dict().items()
    ) and all(torch.equal(a.train(mode)(x), b.train(mode)(x)) for mode in (True, False))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_a_grown_model_comes_back_onto_the_user_s_own_class(path):
    grown, model = grown_net()
    save(path, grown)
    fresh = Net()
    loaded = load(path, fresh)
    assert loaded is fresh
    assert type(loaded) is Net
    assert loaded.fc1.out_features == 7
    assert same(loaded, model)


def test_a_module_is_saved_with_the_journal_of_its_graph(path):
    grown, model = grown_net()
    save(path, copy.deepcopy(model), journal=grown)
    assert same(load(path, Net()), model)


def test_the_user_s_own_grown_module_is_saved_too(path):
    user = Net()
    grown = gg.apply(gg.trace(user, inputs()), gg.Widen("fc1", units=3))
    stirred(gg.lower(grown.graph, into=user))
    save(path, user, journal=grown.graph)
    assert same(load(path, Net()), user)


def test_with_a_plain_journal_load_is_given_the_example(path):
    grown, model = grown_net()
    save(path, model, journal=grown.rewrites)
    with pytest.raises(ValueError, match="holds no example inputs"):
        load(path, Net())
    assert same(load(path, Net(), inputs()), model)


def test_a_model_that_never_grew_comes_back_without_tracing(path):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x):
            return self.fc(x) if x.sum() > 0 else x

    model = stirred(Branches())
    save(path, model, journal=())
    assert torch.equal(load(path, Branches()).fc.weight, model.fc.weight)


def test_a_recurrent_model_that_never_grew_runs_with_the_loaded_weights(path):
    model, x = stirred(nn.LSTM(2, 3)), torch.randn(4, 2)
    save(path, model, journal=())
    assert torch.equal(load(path, nn.LSTM(2, 3))(x)[0], model(x)[0])


def test_a_model_comes_back_in_a_fresh_process(path, tmp_path):
    grown, model = grown_net()
    save(path, grown)
    x = inputs()
    save_file({"x": x, "y": model.eval()(x)}, tmp_path / "expected.safetensors")
    script = f"""
import sys
import torch
from safetensors.torch import load_file
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_io import Net
from graphgrow.io import load
expected = load_file({str(tmp_path / "expected.safetensors")!r})
torch.set_num_threads(1)
sys.exit(not torch.equal(load({str(path)!r}, Net()).eval()(expected["x"]), expected["y"]))
"""
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", script], cwd=root, timeout=120).returncode == 0


class Shared(nn.Module):
    """Two layers with one weight, and a buffer that is not saved by torch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 2)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.register_buffer("mask", torch.ones(2), persistent=False)

    def forward(self, x: Tensor, *rest: Tensor, flag: bool) -> Tensor:
        x = self.first(self.b(self.a(x).relu())).relu()
        return self.last(x) * self.mask + sum(part.mean() for part in rest) * flag


def test_tied_tensors_are_stored_once_and_come_back_tied(path):
    graph = gg.trace(Shared(), torch.randn(5, 4), torch.randn(2), torch.randn(2), flag=True)
    grown = gg.apply(graph, gg.Widen("first", units=2))
    save(path, grown)
    assert ("state.a.weight" in load_file(path)) != ("state.b.weight" in load_file(path))
    loaded = load(path, Shared())
    assert loaded.a.weight is loaded.b.weight
    assert torch.equal(loaded.a.weight, grown.graph.state["b.weight"])


def test_tensors_that_torch_does_not_save_come_back_too(path):
    model = Shared()
    graph = gg.trace(model, torch.randn(5, 4), torch.randn(2), flag=True)
    model.mask.fill_(0.25)
    save(path, graph)
    assert load(path, Shared()).mask.tolist() == [0.25, 0.25]


def test_double_precision_comes_back_onto_a_single_precision_model(path):
    grown = gg.apply(gg.trace(Net().double(), inputs().double()), gg.Widen("fc1", units=3))
    save(path, grown)
    assert load(path, Net()).fc1.weight.dtype == torch.float64


def test_frozen_parameters_stay_frozen_as_the_user_s_model_has_them(path):
    grown, _ = grown_net()
    save(path, grown)
    fresh = Net()
    fresh.fc1.requires_grad_(False)
    loaded = load(path, fresh)
    assert not loaded.fc1.weight.requires_grad
    assert loaded.fc2.weight.requires_grad


def test_the_saved_model_is_not_changed(path):
    grown, _ = grown_net()
    before = {name: (id(t), t.clone()) for name, t in grown.graph.state.items()}
    save(path, grown)
    assert all(id(t) == before[n][0] for n, t in grown.graph.state.items())
    assert all(torch.equal(t, before[n][1]) for n, t in grown.graph.state.items())


def test_nothing_in_the_file_is_a_pickle(path):
    save(path, grown_net()[0])
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["graphgrow"])
    assert header["format"] == 1
    assert header["version"] == gg.__version__
    assert header["model"] == "Net"
    assert [rewrite["kind"] for rewrite in header["journal"]] == ["Widen", "Widen"]


def test_an_interrupted_save_leaves_the_old_file(path, monkeypatch):
    grown, model = grown_net()
    save(path, grown)

    def full(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("graphgrow.io.save_file", full)
    with pytest.raises(OSError, match="no space"):
        save(path, grown)
    assert same(load(path, Net()), model)
    assert list(path.parent.iterdir()) == [path]


def test_a_removal_that_trained_weights_allow_is_replayed_on_fresh_ones(path):
    model = stirred(Net())
    with torch.no_grad():
        model.fc2.weight[:, 1] = 0
    grown = gg.apply(gg.trace(model, inputs()), gg.Remove("fc1", (1,)))
    save(path, grown)
    assert same(load(path, Net()), gg.lower(grown.graph))


# --------------------------------------------------------------------------- refusals


def snapshot(model: nn.Module) -> tuple:
    """Return everything of a model that a refused load must not change."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {name: (id(t), t._version, t.tolist()) for name, t in tensors.items()}
    return values, {path: repr(module) for path, module in model.named_modules()}


def refused(path: Path, model: nn.Module, sentence: str) -> None:
    """Assert that loading fails with `sentence` and leaves `model` alone."""
    before = snapshot(model)
    with pytest.raises(ValueError, match=sentence):
        load(path, model)
    assert snapshot(model) == before


def edited(path: Path, **changes: object) -> None:
    """Change entries of the header of a saved file."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["graphgrow"])
    save_file(load_file(path), path, {"graphgrow": json.dumps(header | changes)})


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(path, share):
    save(path, grown_net()[0])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    refused(path, Net(), "is damaged or cut short")


def test_a_file_of_another_program_is_refused(path):
    save_file({"fc1.weight": torch.ones(2)}, path)
    refused(path, Net(), "not written by graphgrow")


@pytest.mark.parametrize("header", ["{", "[]", "{}"])
def test_a_damaged_header_is_refused(path, header):
    save_file({"state.fc1.weight": torch.ones(2)}, path, {"graphgrow": header})
    refused(path, Net(), "its header is damaged")


def test_a_newer_format_is_refused_and_the_sentence_says_who_reads_it(path):
    save(path, grown_net()[0])
    edited(path, format=2, version="9.1.0")
    refused(path, Net(), r"format 2 .* reads formats up to 1; graphgrow 9.1.0 wrote it")


def test_a_journal_with_an_unknown_rewrite_is_refused(path):
    save(path, grown_net()[0])
    edited(path, version="9.1.0", journal=[{"kind": "Knit", "axis": "fc1"}])
    refused(path, Net(), "journal was written by graphgrow 9.1.0 .*'Knit'")


def test_a_model_of_other_widths_is_refused(path):
    save(path, grown_net()[0])
    refused(path, Net(classes=5), r"saved from Net.*'fc2.weight' has shape \(3, 7\) in the file")


def test_a_model_without_the_grown_axis_is_refused(path):
    save(path, grown_net()[0])
    refused(path, nn.Sequential(nn.Conv2d(1, 2, 3)), r"into Sequential: ")


def test_a_model_with_another_layer_is_refused(path):
    save(path, grown_net()[0])

    class More(Net):
        def __init__(self):
            super().__init__()
            self.more = nn.Linear(3, 3)

        def forward(self, x, *, gain=1.0):
            return self.more(super().forward(x))

    refused(path, More(), "the model has 'more.weight', which the file lacks")


def test_a_model_with_a_layer_less_is_refused(path):
    save(path, nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), journal=())
    refused(path, nn.Sequential(nn.Linear(2, 2)), "the file has '1.bias', which the model lacks")


def test_weights_that_differ_where_the_model_ties_them_are_refused(path):
    untied = Shared()
    untied.b.weight = nn.Parameter(torch.randn(4, 4))
    save(path, untied, journal=())
    refused(
        path, Shared(), "'a.weight' and 'b.weight' are one tensor in the model, two in the file"
    )


def test_a_missing_file_is_missing(path):
    with pytest.raises(FileNotFoundError):
        load(path, Net())


def test_a_module_without_journal_is_not_saved(path):
    with pytest.raises(ValueError, match="cannot save Net without its journal"):
        save(path, Net())
    assert not path.exists()


def test_a_tensor_that_the_format_has_no_place_for_is_named(path):
    model = nn.Linear(2, 2)
    model.register_buffer("table", torch.eye(2).to_sparse())
    with pytest.raises(ValueError, match=r"cannot save 'table': .* torch.sparse_coo"):
        save(path, model, journal=())
    assert not path.exists()
