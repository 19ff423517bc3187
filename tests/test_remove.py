"""Units that others or constants stand in for are removed exactly, the rest by least squares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from strategies import Tied, fill
from torch import Tensor, nn

import graphgrow as gg


def network(kind: str, activation: nn.Module) -> nn.Module:
    """Return three layers with a norm, linear or convolutional."""
    if kind == "linear":
        layers = nn.Linear(3, 6), nn.BatchNorm1d(6), activation, nn.Linear(6, 4)
    elif kind == "grouped":
        layers = nn.Conv2d(3, 6, 3), activation, nn.Conv2d(6, 4, 3, groups=2), nn.Conv2d(4, 2, 1)
    else:
        layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), activation, nn.Conv2d(6, 4, 3)
    return fill(nn.Sequential(*layers).double(), 3)


def inputs(kind: str, batch: int = 8) -> Tensor:
    shape = (batch, 3) if kind == "linear" else (batch, 3, 7, 7)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)


@torch.no_grad()
def planted(model: Any, what: str) -> nn.Module:
    """Give unit 4 of the first layer incoming or outgoing weights that make it superfluous."""
    first, norm, last = model[0], model[1], model[3]
    if what == "zero outgoing":
        last.weight[:, 4] = 0
    elif what == "zero incoming":
        first.weight[4] = 0
        norm.running_mean[4] = first.bias[4]  # the same constant in both modes
    elif what == "equal":
        for tensor in (first.weight, first.bias, *norm.parameters(), *norm.buffers()):
            if tensor.dim():
                tensor[4] = tensor[1]
    elif what == "multiple":  # the norm's scale and shift are what a ReLU passes on
        for tensor in (first.weight, first.bias, norm.running_mean, norm.running_var):
            tensor[4] = tensor[1]
        norm.weight[4], norm.bias[4] = 2 * norm.weight[1], 2 * norm.bias[1]
    return model


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("what", ["zero outgoing", "zero incoming", "equal", "multiple"])
def test_a_superfluous_unit_goes_without_a_trace(kind: str, what: str) -> None:
    activation = nn.ReLU() if what == "multiple" else nn.GELU()
    model = planted(network(kind, activation), what)
    graph = gg.trace(model, inputs(kind))
    grown = gg.apply(graph, gg.Remove("0", (4,)))
    assert grown.proof.exact and grown.proof.modes == ("train", "eval")
    assert grown.graph.axes["0"].width == 5
    assert gg.compare(model, grown.graph, inputs(kind, 5)).relative <= 1e-12


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_unit_that_does_something_is_refused_with_what_would_work(kind: str) -> None:
    graph = gg.trace(network(kind, nn.GELU()), inputs(kind))
    said = gg.Remove("0", (4,)).obstacle(graph)
    assert said is not None
    assert said.startswith("cannot remove 1 of the 6 units of axis '0' exactly: ")
    assert "'3'" in said and said.endswith("give absorb= for least squares")


def test_a_constant_at_a_zero_padded_border_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Sigmoid(), nn.Conv2d(6, 4, 3, padding=1)).double()
    with torch.no_grad():
        model[0].weight[2] = 0
    said = gg.Remove("0", (2,)).obstacle(gg.trace(model, inputs("convolution")))
    assert said is not None and "pads with zeros" in said


@pytest.mark.parametrize(
    ("units", "reason"),
    [
        ((), "give different units"),
        ((6,), "from 0 to 5"),
        ((1, 1), "different"),
        ((-1,), "0 to 5"),
        ((0, 1, 2, 3, 4, 5), "leave at least one"),
    ],
)
def test_units_that_are_not_there_are_refused(units: tuple[int, ...], reason: str) -> None:
    graph = gg.trace(network("linear", nn.GELU()), inputs("linear"))
    said = gg.Remove("0", units).obstacle(graph)
    assert said is not None and reason in said
    with pytest.raises(gg.NotApplicable) as raised:
        gg.apply(graph, gg.Remove("0", units))
    assert str(raised.value) == said


def test_axes_that_cannot_change_say_so_of_removal() -> None:
    graph = gg.trace(network("linear", nn.GELU()), inputs("linear"))
    assert gg.Remove("3", (0,)).obstacle(graph) == (
        "cannot remove units of axis '3' (4 units): it is dim 1 of the model's output"
    )


def test_a_pair_that_cancels_goes_together_only() -> None:
    graph = gg.trace(network("convolution", nn.ReLU()), inputs("convolution"))
    grown = gg.apply(graph, gg.Widen("0", 2, weights=gg.Pairs()))
    assert gg.Remove("0", (7,)).obstacle(grown.graph) is None  # its column goes to its twin
    assert gg.apply(grown.graph, gg.Remove("0", (6, 7))).graph.axes["0"].width == 6


@pytest.mark.parametrize("kind", ["linear", "convolution", "grouped"])
def test_least_squares_absorbs_what_the_others_span(kind: str) -> None:
    """Without an activation, units of a layer with fewer inputs than units are sums of others."""
    model = network(kind, nn.Identity())
    axis, unit = ("0[1]", 2) if kind == "grouped" else ("0", 4)
    x = inputs(kind, 60)
    if kind == "linear":  # six units of three inputs; the other kinds have more inputs than units
        rewrite = gg.Remove(axis, (unit,), absorb=x)
        grown = gg.apply(gg.trace(model, x), rewrite)
        assert grown.proof.error is not None
        assert gg.compare(model, grown.graph, inputs(kind, 7)).eval.relative <= 1e-10
    graph = gg.trace(network(kind, nn.GELU()), x)
    grown = gg.apply(graph, gg.Remove(axis, (unit,), absorb=x))
    assert not grown.proof.exact and grown.proof.modes == ()
    assert grown.proof.error == gg.compare(graph, grown.graph, x).relative > 0
    assert "not exact" in str(grown.proof) and "measured change" in str(grown.proof)


def test_no_other_coefficients_beat_least_squares() -> None:
    x = inputs("linear", 60)
    graph = gg.trace(network("linear", nn.GELU()), x)
    fitted = gg.Absorb.fit(graph, "0", (4,), x)

    def error(absorb: gg.Absorb) -> float:
        after = gg.apply(graph, gg.Remove("0", (4,), absorb=absorb)).graph
        models = [gg.lower(g).eval() for g in (graph, after)]
        with torch.no_grad():
            return float((models[0](x) - models[1](x)).square().sum())

    ((path, (row,)),) = fitted.coefficients
    best = error(fitted)
    for k in range(len(row)):
        for step in (-1e-3, 1e-3):
            moved = (*row[:k], row[k] + step, *row[k + 1 :])
            assert best < error(gg.Absorb(((path, (moved,)),)))


def test_a_constant_that_differs_between_the_modes_is_refused() -> None:
    model = planted(network("linear", nn.GELU()), "zero incoming")
    model[1].running_mean[4] += 1
    said = gg.Remove("0", (4,)).obstacle(gg.trace(model, inputs("linear")))
    assert (
        said is not None and "that removed units add at Linear '3' is not the same in both" in said
    )


def test_what_was_fitted_comes_back_from_the_journal() -> None:
    x = inputs("linear", 60)
    graph = gg.trace(network("linear", nn.GELU()), x)
    grown = gg.apply(graph, gg.Remove("0", (4,), absorb=x)).graph
    again = gg.apply(graph, *grown.journal).graph
    assert all(torch.equal(t, again.state[p]) for p, t in grown.state.items())


def test_coefficients_of_another_size_are_refused() -> None:
    graph = gg.trace(network("linear", nn.GELU()), inputs("linear"))
    wrong = gg.Absorb((("3.weight", ((0.5, 0.5),)),))
    said = gg.Remove("0", (4,), absorb=wrong).obstacle(graph)
    assert said is not None and "shape (1, 2), not (1, 6)" in said


def test_equal_units_of_a_tied_weight_stay_for_it_writes_them_too() -> None:
    """The column of the one that is left would have to become twice its row."""
    model = fill(Tied(5, 4).double(), 0)
    with torch.no_grad():
        for tensor in (model.encoder.weight, model.encoder.bias):
            tensor[3] = tensor[0]
    graph = gg.trace(model, torch.randn(3, 5).double())
    with pytest.raises(gg.NotApplicable) as raised:
        gg.apply(graph, gg.Remove("encoder", (3,)), verify=False)
    assert str(raised.value) == (
        "cannot remove 1 of the 4 units of axis 'encoder' exactly: 'encoder.weight[0]' would have "
        "to change where it is read but not where it writes; give absorb= for least squares"
    )
