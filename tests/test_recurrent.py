"""Recurrent layers: which axes they have, and that these grow and shrink exactly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import fill
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import graphgrow as gg


def words(*shape: int) -> Tensor:
    return torch.randint(7, shape, generator=torch.Generator().manual_seed(len(shape)))


def numbers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, dtype=torch.double, generator=generator)


class Classifier(nn.Module):
    """A bidirectional LSTM of two layers, read at each position and at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.lstm = nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True, dropout=0.3)
        self.head = nn.Linear(20, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        rows, (last, _) = self.lstm(self.table(tokens))
        return self.head(torch.cat([rows.mean(1), last[-1], last[-2]], 1))


class Translator(nn.Module):
    """A decoder that starts at the state in which an encoder ended."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.encoder = nn.GRU(6, 5, batch_first=True)
        self.decoder = nn.GRU(6, 5, batch_first=True)
        self.head = nn.Linear(5, 7)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        _, state = self.encoder(self.table(source))
        return self.head(self.decoder(self.table(target), state)[0])


class Projected(nn.Module):
    """An LSTM whose state is projected to fewer units."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, 2, proj_size=4, bidirectional=True, bias=False)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


class Cells(nn.Module):
    """One cell of each kind, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(3, 5), nn.GRUCell(5, 4)
        self.rnn, self.head = nn.RNNCell(4, 6, nonlinearity="relu"), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        long = short = last = None
        for step in x.unbind(1):
            long = self.lstm(step, long)
            short = self.gru(long[0], short)
            last = self.rnn(short, last)
        return self.head(last)


class Started(nn.Module):
    """A layer whose first state is computed from its input."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.start, self.layer, self.head = nn.Linear(3, 5), layer, nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        start = self.start(x[0]).tanh().unsqueeze(0)
        return self.head(self.layer(x, start)[0])


class Packed(nn.Module):
    """Sequences of several lengths, packed and unpacked."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lstm = nn.Embedding(7, 6), nn.LSTM(6, 5, batch_first=True)
        self.head = nn.Linear(10, 3)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        rows = pack_padded_sequence(self.table(tokens), lengths, True, enforce_sorted=False)
        made, (last, _) = self.lstm(rows)
        rows, _ = pad_packed_sequence(made, True)
        return self.head(torch.cat([rows.amax(1), last[0]], 1))


MODELS: dict[str, tuple[nn.Module, tuple[Any, ...], set[str]]] = {
    "classifier": (Classifier(), (words(2, 4),), {"table(6)", "lstm[0](5)"}),
    "translator": (Translator(), (words(2, 3), words(2, 4)), {"table(6)", "encoder[0](5)"}),
    "projected": (Projected(), (numbers(4, 2, 3),), {"lstm[0](5)", "lstm(4)"}),
    "cells": (Cells(), (numbers(2, 3, 3),), {"lstm[0](5)", "gru[0](4)", "rnn(6)"}),
    "packed": (Packed(), (words(3, 4), torch.tensor([2, 4, 3])), {"table(6)", "lstm[0](5)"}),
    "tanh": (Started(nn.RNN(3, 5)), (numbers(4, 2, 3),), {"start(5)"}),
    "relu": (Started(nn.RNN(3, 5, nonlinearity="relu")), (numbers(4, 2, 3),), {"start(5)"}),
}
# the scheme that is taken unasked, and the others that are exact somewhere
SCHEMES = (None, gg.ZeroIncoming(), gg.Pairs(), gg.Copy())


def traced(name: str) -> tuple[nn.Module, tuple[Any, ...], gg.Graph]:
    model, inputs, _ = MODELS[name]
    model = fill(copy.deepcopy(model).double(), 1)
    return model, inputs, gg.trace(model, *inputs)


def free(graph: gg.Graph) -> list[gg.Axis]:
    return [axis for axis in graph.axes.values() if axis.obstacle is None]


@pytest.mark.parametrize("name", MODELS)
def test_hidden_units_grow_and_come_back(name: str) -> None:
    _, _, graph = traced(name)
    assert {f"{axis.name}({axis.width})" for axis in free(graph)} == MODELS[name][2]
    assert not graph.analysis.unknown
    for axis in free(graph):
        graph = gg.apply(graph, gg.Widen("lstm[0]", 4)).graph if axis.name == "lstm" else graph
        for scheme in SCHEMES:
            rewrite = gg.Widen(axis.name, 2, at=1, weights=scheme)
            if scheme is not None and rewrite.obstacle(graph) is not None:
                continue
            grown = gg.apply(graph, rewrite)  # which compares
            back = gg.apply(grown.graph, gg.Remove(axis.name, (1, 2))).graph
            assert all(torch.equal(back.state[path], t) for path, t in graph.state.items())
            assert str(back) == str(graph)


@pytest.mark.parametrize("name", MODELS)
def test_a_grown_layer_says_its_sizes_and_goes_back_into_its_model(name: str) -> None:
    model, inputs, graph = traced(name)
    grown = gg.apply(graph, *(gg.Widen(axis.name, 3 - k) for k, axis in enumerate(free(graph))))
    mine = copy.deepcopy(model)
    for made in (gg.lower(grown.graph), gg.lower(grown.graph, into=mine)):
        assert gg.compare(model, made, *inputs).relative <= 1e-10
        for layer in made.modules():
            if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
                check_sizes(layer)
    assert type(mine) is type(model)


def check_sizes(layer: Any) -> None:
    """Assert that a layer made with the attributes of this one has tensors of the same shapes."""
    if isinstance(layer, nn.RNNCellBase):
        made: nn.Module = type(layer)(layer.input_size, layer.hidden_size, layer.bias)
    else:
        named = {"proj_size": layer.proj_size} if layer.proj_size else {}
        made = type(layer)(
            layer.input_size,
            layer.hidden_size,
            layer.num_layers,
            bias=layer.bias,
            bidirectional=layer.bidirectional,
            **named,
        )
    theirs = made.state_dict()
    assert {k: t.shape for k, t in layer.state_dict().items()} == {
        k: t.shape for k, t in theirs.items()
    }


def test_the_units_of_all_gates_layers_and_directions_are_one_axis() -> None:
    _, _, graph = traced("classifier")
    axis = graph.axes["lstm[0]"]
    assert {at.path.removeprefix("lstm.") for at in axis.producers} == {
        f"weight_{kind}_l{layer}{reverse}"
        for kind in ("ih", "hh")
        for layer in (0, 1)
        for reverse in ("", "_reverse")
    }
    grown = gg.apply(graph, gg.Widen("lstm[0]", 1, at=2)).graph
    old, new = graph.state["lstm.weight_hh_l0"], grown.state["lstm.weight_hh_l0"]
    kept = [gate * 6 + unit for gate in range(4) for unit in (0, 1, 3, 4, 5)]
    assert new.shape == (24, 6) and not new[:, 2].any()
    assert torch.equal(new[kept][:, [0, 1, 3, 4, 5]], old)


def test_a_projection_stays_narrower_than_what_it_projects() -> None:
    _, _, graph = traced("projected")
    gg.apply(graph, gg.Widen("lstm[0]", 1), gg.Widen("lstm", 1))
    assert gg.Widen("lstm", 1).obstacle(graph) == (
        "cannot resize LSTM 'lstm': torch projects 5 units to fewer only, not to 5; "
        "widen those first"
    )


def test_longer_sequences_run_on_the_grown_layer() -> None:
    model, _, graph = traced("classifier")
    grown = gg.apply(graph, gg.Widen("lstm[0]", 3)).graph
    assert gg.compare(model, grown, words(5, 11)).relative <= 1e-10


def test_packed_sequences_of_other_lengths_run_on_the_grown_layer() -> None:
    model, _, graph = traced("packed")
    grown = gg.apply(graph, gg.Widen("lstm[0]", 3)).graph
    lengths = torch.tensor([6, 1, 2, 5])
    assert gg.compare(model, grown, words(4, 6), lengths).relative <= 1e-10


def test_how_many_positions_are_packed_is_for_no_branch_to_ask() -> None:
    class Asks(Packed):
        def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
            rows = pack_padded_sequence(self.table(tokens), lengths, True, enforce_sorted=False)
            return self.table(tokens) if rows.data.size(0) > 5 else rows.data

    with pytest.raises(gg.UnsupportedOp, match="depends on a tensor's value"):
        gg.trace(Asks(), *MODELS["packed"][1])


def test_single_precision_has_the_same_axes() -> None:
    model, inputs, graph = traced("classifier")
    single = gg.trace(copy.deepcopy(model).float(), *inputs)
    assert str(single) == str(graph) and not single.analysis.unknown


def test_an_optimizer_follows_a_grown_layer() -> None:
    model, inputs, graph = traced("translator")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(*inputs).square().mean().backward()
        optimizer.step()
    grown = gg.apply(graph, gg.Widen("encoder[0]", 2))
    wider = gg.lower(grown.graph)
    gg.migrate(optimizer, grown)
    wider(*inputs).square().mean().backward()
    optimizer.step()
    assert optimizer.state[wider.encoder.weight_hh_l0]["exp_avg"].shape == (3 * 7, 7)


def test_a_grown_layer_is_saved_and_loaded(tmp_path: Path) -> None:
    _, inputs, graph = traced("classifier")
    grown = gg.apply(graph, gg.Widen("lstm[0]", 2), gg.Widen("table", 1))
    gg.save(tmp_path / "grown", grown)
    again = gg.load(tmp_path / "grown", Classifier().double())
    assert isinstance(again, Classifier) and again.lstm.hidden_size == 7
    assert torch.equal(again.eval()(*inputs), gg.lower(grown.graph).eval()(*inputs))


def test_a_state_of_stated_width_is_written_anew() -> None:
    model = fill(Fresh().double(), 1)
    grown = gg.apply(gg.trace(model, numbers(4, 2, 3)), gg.Widen("layer[0]", 3)).graph
    assert gg.compare(model, grown, numbers(6, 3, 3)).relative <= 1e-10
    with pytest.raises(gg.NotApplicable, match="would need another literal at 'new_zeros'"):
        gg.lower(grown, into=model)


class Fresh(nn.Module):
    """A layer that starts at zeros of a stated width."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(1, x.size(1), 5), torch.zeros(1, x.size(1), 5, dtype=x.dtype)
        return self.head(self.layer(x, state)[0])


def test_a_state_that_the_model_returns_is_fixed() -> None:
    graph = gg.trace(nn.GRU(3, 5), torch.randn(4, 2, 3))
    assert not free(graph)
    assert any("of the model's output" in str(axis.obstacle) for axis in graph.axes.values())
