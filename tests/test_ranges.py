"""Ranges of values, and units and activations that are shown to be idle by them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import Drawn, fill, networks, plant
from torch import Tensor, fx, nn

import graphgrow as gg
from graphgrow.ir.assemble import assemble
from graphgrow.passes.ranges import inside, ranges

BOXES = [(-1.0, 1.0), (0.0, 1.0), (0.25, 0.25), (-3.0, 0.5)]


class Stack(nn.Module):
    """A layer, a norm over its units, a layer with a ReLU, and a layer."""

    def __init__(self, norm: nn.Module, clip: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(5, 8), norm, nn.Linear(8, 6)
        self.clip, self.last = clip or nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.clip(self.second(self.norm(self.first(x)))))


class Seen(fx.Interpreter):
    """Runs a graph and keeps what each clipping module reads and gives."""

    def __init__(self, graph: gg.Graph, mode: str) -> None:
        own = {path: tensor.detach().clone() for path, tensor in graph.state.items()}
        tree = assemble(graph.modules, graph.leaves, own).train(mode == "train")
        super().__init__(tree, graph=graph.train if mode == "train" else graph.eval)
        self.seen: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        self.mode = mode

    def run_node(self, n: fx.Node) -> Any:
        before = [a.detach().clone() for a in self.fetch_args_kwargs_from_env(n)[0] if _is_real(a)]
        result = super().run_node(n)
        if _is_real(result) and before:
            self.seen[self.mode, n.name] = before[0], result.detach().clone()
        return result


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@given(st.data())
def test_what_is_clipped_lies_within_its_range(data: st.DataObject) -> None:
    net: Drawn = data.draw(networks(random=False))
    assume(not net.words)
    graph = net.trace()
    box = data.draw(st.sampled_from([None, *BOXES]))
    before = {path: tensor.clone() for path, tensor in graph.state.items()}
    found = ranges(graph, box)
    assert all(torch.equal(tensor, before[path]) for path, tensor in graph.state.items())
    for mode in ("train", "eval"):
        seen = Seen(graph, mode)
        with torch.no_grad():
            seen.run(*inside(box, (net.inputs(3, data.draw(st.integers(0, 9))) * 3,)))
        for (at, node), clips in found.clips.items():
            if at == mode and len(clips) == 1:
                for real, known in zip(seen.seen[at, node], clips[0], strict=True):
                    if real.shape == known.low.shape:
                        assert (real >= known.low).all() and (real <= known.high).all(), node


NORMS = {
    "layer norm": nn.LayerNorm,
    "RMS norm": lambda n: nn.RMSNorm(n, eps=1e-6),
    "tanh": lambda n: nn.Tanh(),
    "ReLU6 in place": lambda n: nn.ReLU6(inplace=True),
}


@pytest.mark.parametrize("name", ["layer norm", "RMS norm"])
def test_the_bound_of_a_norm_is_reached_by_some_input(name: str) -> None:
    """Along the weights, centred behind a LayerNorm, and nowhere further out."""
    torch.manual_seed(3)
    model = fill(nn.Sequential(NORMS[name](8), nn.Linear(8, 6), nn.ReLU()).double(), 0)
    graph = gg.trace(model, torch.randn(4, 8, dtype=torch.double))
    (before, _) = ranges(graph).clips["eval", "_2"][0]
    towards = model[1].weight * model[0].weight
    if name == "layer norm":
        towards = towards - towards.mean(1, keepdim=True)
    for sign, end in ((1, before.high), (-1, before.low)):
        reached = model[1](model[0](sign * 1e6 * towards)).diagonal()
        assert torch.allclose(reached, end[0], rtol=0, atol=1e-4)
        assert (sign * (end[0] - reached) >= 0).all()


def planted(norm: nn.Module, least: float, dtype: torch.dtype = torch.double) -> Stack:
    """Return a stack of which the ReLU of unit 2 is never on, that of unit 4 never off."""
    torch.manual_seed(0)
    model = fill(Stack(norm).double(), 0).to(dtype)
    with torch.no_grad():
        model.second.bias[2], model.second.bias[4] = -least, least
    return model


@pytest.mark.parametrize("dtype", [torch.float, torch.double], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_a_unit_behind_a_norm_that_is_never_on_goes_for_all_inputs(name: str, dtype) -> None:
    model = planted(NORMS[name](8), 20, dtype)
    graph = gg.trace(model, torch.randn(4, 5, dtype=dtype))
    grown = gg.apply(graph, gg.Remove("second", (2,)))
    assert grown.proof.exact and grown.proof.box is None
    assert "all inputs, of the sizes of the example" in str(grown.proof)
    far = 1e3 * torch.randn(64, 5, dtype=dtype)
    assert gg.compare(model, grown.graph, far).relative <= 1e-10
    assert gg.Remove("second", (4,)).obstacle(graph) is not None
    nearly = planted(NORMS[name](8), 0.5, dtype)
    assert gg.Remove("second", (2,)).obstacle(gg.trace(nearly, torch.randn(4, 5, dtype=dtype)))


def test_a_unit_that_a_box_keeps_off_goes_and_the_proof_names_the_box() -> None:
    model = planted(nn.Identity(), 30)
    graph = gg.trace(model, 100 * torch.randn(4, 5, dtype=torch.double))
    assert gg.Remove("second", (2,)).obstacle(graph) is not None
    grown = gg.apply(graph, gg.Remove("second", (2,), box=(-1, 1)))
    assert "inputs from -1 to 1" in str(grown.proof) and grown.proof.box == (-1, 1)
    x = torch.rand(99, 5, dtype=torch.double) * 2 - 1
    assert gg.compare(model, grown.graph, x).relative <= 1e-10
    assert gg.compare(model, grown.graph, *graph.example).relative > 1e-3
    both = gg.apply(graph, gg.Widen("first", 2), gg.Remove("second", (2,), box=(-1, 1)))
    assert both.proof.box == (-1, 1)


def test_words_are_bounded_by_their_table() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    with torch.no_grad():
        model[1].bias[2] = -50
    graph = gg.trace(model, torch.randint(5, (3, 4)))
    grown = gg.apply(graph, gg.Remove("1", (2,)))
    assert gg.compare(model, grown.graph, torch.arange(5)[None]).relative <= 1e-10


def test_batch_norm_in_train_mode_bounds_nothing() -> None:
    model = planted(nn.BatchNorm1d(8), 99)
    graph = gg.trace(model, torch.randn(4, 5, dtype=torch.double))
    said = gg.Remove("second", (2,), box=(-1, 1)).obstacle(graph)
    assert said is not None and "in train mode" in said


@pytest.mark.parametrize(
    "clip", [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(-9, 99)]
)
def test_an_activation_that_changes_nothing_folds_away(clip: nn.Module) -> None:
    model = fill(Stack(nn.Tanh(), clip).double(), 1)
    with torch.no_grad():
        model.second.bias.fill_(3.0 if isinstance(clip, nn.ReLU6) else 20.0)
        model.second.weight.mul_(0.3)
    graph = gg.trace(model, torch.randn(4, 5, dtype=torch.double))
    grown = gg.apply(graph, gg.Fold("clip"))
    assert "clips nothing" in str(grown.proof)
    assert gg.compare(model, grown.graph, 9 * torch.randn(9, 5, dtype=torch.double)).absolute == 0
    assert gg.apply(grown.graph, gg.Fold("last")).graph.axis("second").width == 3
    with torch.no_grad():
        model.second.bias[0] = -50
    refused = gg.Fold("clip").obstacle(gg.trace(model, torch.randn(4, 5, dtype=torch.double)))
    assert refused is not None and "cannot fold 'clip'" in refused


def test_units_that_are_always_on_merge_where_one_is_the_negative_of_the_other() -> None:
    model = planted(nn.Tanh(), 20)
    with torch.no_grad():
        model.second.weight[1] = -model.second.weight[4]
        model.second.bias[1] = -20
    x = torch.randn(4, 5, dtype=torch.double)
    assert gg.Remove("second", (1,)).obstacle(gg.trace(model, x)) is None  # never on
    model.clip = nn.Hardtanh(-1e3, 1e3)
    grown = gg.apply(gg.trace(model, x), gg.Merge("second"))
    assert grown.graph.axis("second").width == 5
    assert gg.compare(model, grown.graph, 9 * x).relative <= 1e-10


@settings(max_examples=20)
@given(st.data())
def test_merging_takes_all_that_others_stand_in_for(data: st.DataObject) -> None:
    net: Drawn = data.draw(networks(random=False))
    plant(net.model, ["equal rows", "multiple row", "zero column", "zero row"])
    graph = net.trace()
    free = [name for name, axis in graph.axes.items() if axis.obstacle is None]
    box = data.draw(st.sampled_from([None, *BOXES]))
    merges = [gg.Merge(name, box) for name in free]
    merges = [merge for merge in merges if merge.obstacle(graph) is None]
    assume(merges)
    grown = gg.apply(graph, merges[0])
    x = inside(grown.proof.box, (net.inputs(4, 5),))
    assert gg.compare(net.model, grown.graph, *x).relative <= 1e-10
    (done,) = grown.graph.journal
    assert isinstance(done, gg.Remove) and len(done.units) < graph.axis(merges[0].axis).width
    assert gg.Merge(merges[0].axis, box).obstacle(grown.graph) is not None
