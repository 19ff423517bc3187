"""A grown graph goes into the user's own object where attributes can tell its forward new sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphgrow as gg


class Attention(nn.Module):
    """Attention written as libraries do: the sizes of heads are attributes."""

    def __init__(self, heads: int = 2, features: int = 4) -> None:
        super().__init__()
        self.heads, self.features = heads, features
        self.whole = heads * features
        self.query = nn.Linear(6, self.whole)
        self.value = nn.Linear(6, self.whole)
        self.out = nn.Linear(self.whole, 6)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query = self.query(x).view(batch, length, self.heads, self.features).transpose(1, 2)
        value = self.value(x).view(batch, length, self.heads, -1).transpose(1, 2)
        mixed = F.softmax(query @ query.mT, -1) @ value
        return self.out(mixed.transpose(1, 2).reshape(batch, length, self.whole))


class Literal(Attention):
    """The same with a number in the code."""

    def forward(self, x: Tensor) -> Tensor:
        return (
            super().forward(x) + self.query(x).view(*x.shape[:-1], 2, -1).sum((-1, -2))[..., None]
        )


class Misled(Attention):
    """The same with an attribute that states two sizes, of which one grows."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.new_ones(self.heads, 6)
        return super().forward(x) + rows.sum(0)


def rows() -> Tensor:
    return torch.randn(3, 5, 6, dtype=torch.double)


def grown(model: nn.Module, *axes: str) -> gg.Graph:
    graph = gg.trace(model, rows())
    return gg.apply(graph, *(gg.Widen(axis, 3) for axis in axes)).graph


def heads(model: nn.Module) -> gg.Graph:
    return grown(model, "query[0]")


@pytest.mark.parametrize("sizes", [(2, 4), (4, 4), (3, 8)])
def test_heads_go_into_a_model_whose_attributes_state_them(sizes: tuple[int, int]) -> None:
    model = Attention(*sizes).double()
    graph = heads(model)
    mine = gg.lower(graph, into=model)
    assert mine is model and (model.heads, model.features) == (sizes[0] + 3, sizes[1])
    assert model.whole == model.heads * model.features
    assert gg.compare(graph, model, rows()).relative == 0


def test_what_went_into_a_model_can_grow_again() -> None:
    model = Attention().double()
    gg.lower(heads(model), into=model)
    graph = heads(model)
    assert gg.compare(graph, gg.lower(graph, into=model), rows()).relative == 0
    assert model.heads == 8


def test_two_growths_go_in_together() -> None:
    model = Attention().double()
    graph = grown(model, "query[0]", "value[1]")
    assert gg.compare(graph, gg.lower(graph, into=model), rows()).relative == 0
    assert (model.heads, model.features, model.whole) == (5, 4, 35)


@pytest.mark.parametrize("kind", [Literal, Misled])
def test_a_model_whose_code_would_compute_something_else_is_refused(kind: type[Attention]) -> None:
    model = kind().double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(gg.NotApplicable, match="its forward would need another literal at"):
        gg.lower(heads(model), into=model)
    assert (model.heads, model.features, model.whole) == (2, 4, 8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
