"""The residual width of networks with layer norms: new units are the mean of the old ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from strategies import fill
from torch import Tensor, nn

import graphgrow as gg


class Block(nn.Module):
    """A pre-norm transformer block, its attention written out."""

    def __init__(self, width: int, dropout: float, scale: float | None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width, eps=1e-3)
        self.qkv, self.out = nn.Linear(width, 24), nn.Linear(8, width)
        self.up, self.down = nn.Linear(width, 10), nn.Linear(10, width)
        self.dropout = nn.Dropout(dropout)
        self.scale = None if scale is None else nn.Parameter(torch.full((width,), scale))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(y))
        y = self.down(F.gelu(self.up(self.norm2(x))))
        return x + (y if self.scale is None else y * self.scale)


class Transformer(nn.Module):
    """Patches, a class token and positions through blocks to a head."""

    def __init__(self, width: int = 6, dropout: float = 0.0, scale: float | None = None) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.Sequential(*(Block(width, dropout, scale) for _ in range(2)))
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        x = self.blocks(x)
        return self.head(F.layer_norm(x, x.shape[-1:], self.weight, self.bias, eps=1e-5)[:, 0])


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch)).double()


@pytest.mark.parametrize("at", [None, 0, 2])
@pytest.mark.parametrize("units", [1, 5])
def test_the_residual_width_of_a_transformer_grows(at: int | None, units: int) -> None:
    model = fill(Transformer().double(), 1)
    grown = gg.apply(gg.trace(model, images()), gg.Widen("patches", units, at))
    assert gg.compare(model, grown.graph, images(5)).relative <= 1e-12
    wider = gg.lower(grown.graph)
    norm = wider.get_submodule("blocks.1.norm2")
    assert norm.normalized_shape == (6 + units,) and norm.eps == pytest.approx(6e-3 / (6 + units))
    assert "new units are the mean of the others" in str(grown.proof)
    assert "'blocks.1.norm2.weight' is multiplied by" in str(grown.proof)
    first = 6 if at is None else at
    back = gg.apply(grown.graph, gg.Remove("patches", tuple(range(first, first + units)))).graph
    assert gg.compare(model, back, images(5)).relative <= 1e-12


def test_a_single_precision_transformer_is_held_to_its_rounding() -> None:
    model = Transformer()
    grown = gg.apply(gg.trace(model, images().float()), gg.Widen("patches", 3))
    assert 0 < grown.proof.rounding < 1e-4
    assert gg.compare(model, grown.graph, images().float()).relative <= grown.proof.rounding


def test_new_units_of_the_stream_learn_each_its_own_way() -> None:
    model = fill(Transformer().double(), 1)
    wider = gg.lower(gg.apply(gg.trace(model, images()), gg.Widen("patches", 3)).graph)
    optimizer = torch.optim.SGD(wider.parameters(), 0.1)
    for step in range(2):
        optimizer.zero_grad()
        wider(images(4 + step)).square().sum().backward()
        optimizer.step()
    for path, parameter in wider.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any(), path
    new = wider.get_parameter("patches.weight")[6:].flatten(1)
    assert torch.pdist(new).min() > 1e-6


def test_dropout_in_the_stream_is_refused() -> None:
    graph = gg.trace(Transformer(dropout=0.1).double(), images())
    said = gg.Widen("patches", 3).obstacle(graph)
    assert said is not None and "new ones are neither the mean of the others nor copies" in said
    assert "LayerNorm 'blocks.0.norm2'" in said and "train mode" in said


@pytest.mark.parametrize("units", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("zero", [False, True])
def test_what_a_trained_layer_scale_multiplies_is_the_mean_with_its_weights(
    units: int, dtype: torch.dtype, zero: bool
) -> None:
    model = fill(Transformer(scale=0.1), 1).to(dtype)
    if zero:
        with torch.no_grad():
            model.get_parameter("blocks.0.scale")[2] = 0
    graph = gg.trace(model, images().to(dtype))
    grown = gg.apply(graph, gg.Widen("patches", units))
    most = 1e-12 if dtype == torch.float64 else grown.proof.rounding
    assert most < 1e-4
    assert gg.compare(model, grown.graph, images(5).to(dtype)).relative <= most
    scale = gg.lower(grown.graph).get_parameter("blocks.0.scale")
    assert torch.allclose(scale[6:], scale[:6].square().mean().sqrt())
    back = gg.apply(grown.graph, gg.Remove("patches", tuple(range(6, 6 + units)))).graph
    assert gg.compare(model, back, images(5).to(dtype)).relative <= most


def test_a_unit_that_is_another_mean_than_its_scale_asks_for_is_not_removed() -> None:
    model = fill(Transformer(scale=0.1).double(), 1)
    grown = gg.apply(gg.trace(model, images()), gg.Widen("patches", 2)).graph
    wider = gg.lower(grown)
    with torch.no_grad():
        wider.get_parameter("blocks.0.scale")[6:] *= 1.5
    said = gg.Remove("patches", (6, 7)).obstacle(gg.trace(wider, images()))
    assert said is not None and "removed ones are neither the mean of the others nor" in said


def test_an_even_layer_scale_needs_no_other_weights() -> None:
    model = fill(Transformer(scale=0.1).double(), 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scale"):
                parameter.fill_(-0.1)
    grown = gg.apply(gg.trace(model, images()), gg.Widen("patches", 3)).graph
    assert gg.compare(model, grown, images(5)).relative <= 1e-12
    assert gg.lower(grown).get_parameter("blocks.0.scale").unique().numel() == 1


def test_units_that_are_not_the_mean_are_not_removed() -> None:
    graph = gg.trace(fill(Transformer().double(), 1), images())
    said = gg.Remove("patches", (1,)).obstacle(graph)
    assert said is not None and "removed ones are neither the mean of the others nor" in said


def test_a_norm_over_several_dims_is_an_obstacle() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm([4, 6]), nn.Linear(6, 2))
    said = gg.Widen("0", 2).obstacle(gg.trace(model, torch.randn(2, 4, 3)))
    assert said is not None and said.endswith("which mixes its units")


def test_what_reads_a_norm_without_weight_is_rescaled() -> None:
    model = nn.Sequential(
        nn.Linear(3, 6), nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 2)
    ).double()
    x = torch.randn(4, 3).double()
    grown = gg.apply(gg.trace(model, x), gg.Widen("0", 2))
    assert gg.compare(model, grown.graph, x).relative <= 1e-12
    wider = gg.lower(grown.graph)
    norm, head = wider.get_submodule("1"), wider.get_submodule("2")
    assert norm.normalized_shape == (8,) and norm.eps == pytest.approx(6 / 8 * 1e-5)
    assert torch.allclose(head.weight[:, :6], (6 / 8) ** 0.5 * model[2].weight)
    back = gg.apply(grown.graph, gg.Remove("0", (6, 7))).graph
    assert gg.compare(model, back, x).relative <= 1e-12
