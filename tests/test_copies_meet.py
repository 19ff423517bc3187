"""Whole copies of features that meet: sums, lengths and products of queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from strategies import fill
from torch import Tensor, nn

import graphgrow as gg

Meet = Callable[["Attention", Tensor, Tensor, Tensor], Tensor]
EPS = 0.7  # so large that it matters


class Attention(nn.Module):
    """Two heads whose queries and keys are normalised, and meet in one way."""

    def __init__(self, meet: str, norm: str, biased: bool) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, 8, bias=biased), nn.Linear(6, 8, bias=biased)
        self.v, self.o = nn.Linear(6, 6), nn.Linear(6, 2)
        self.norms = nn.ModuleList(NORMS[norm]() for _ in range(2))
        self.temperature = nn.Parameter(torch.tensor([[[2.0]], [[3.0]]]))
        self.meet, self.dropped = MEETS[meet], 0.3 if "dropped" in meet else 0.0

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (2, -1)).transpose(1, 2) for w in (self.q, self.k, self.v))
        y = self.meet(self, self.norms[0](q), self.norms[1](k), v)
        return self.o(y.transpose(1, 2).flatten(2))


class Unit(nn.Module):
    """A length of one, by a function."""

    def __init__(self, divided: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.divided = divided

    def forward(self, x: Tensor) -> Tensor:
        return self.divided(x)


def squares(x: Tensor) -> Tensor:
    return (x * x).sum(-1, keepdim=True)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "layer": lambda: nn.LayerNorm(4, eps=EPS),
    "rms": lambda: nn.RMSNorm(4, eps=EPS),
    "normalize": lambda: Unit(lambda x: F.normalize(x, dim=-1, eps=EPS)),
    "normalize, by position": lambda: Unit(lambda x: F.normalize(x, 2.0, -1, EPS)),
    "largest": lambda: Unit(lambda x: F.normalize(x, float("inf"), -1, EPS)),
    "cubes": lambda: Unit(lambda x: x / torch.norm(x, 3, -1, True).clamp(EPS)),
    "norm": lambda: Unit(lambda x: x / x.norm(dim=-1, keepdim=True).clamp_min(EPS)),
    "between": lambda: Unit(lambda x: x / x.norm(dim=-1, keepdim=True).clip(min=EPS, max=1.0)),
    "norm plus": lambda: Unit(lambda x: x / (torch.linalg.norm(x, dim=-1, keepdim=True) + EPS)),
    "sum": lambda: Unit(lambda x: x * torch.rsqrt(squares(x) + EPS)),
    "floored": lambda: Unit(
        lambda x: torch.div(x, x.norm(dim=-1, keepdim=True), rounding_mode="floor")
    ),
    "sum of lengths": lambda: Unit(lambda x: x / x.abs().sum(-1, keepdim=True)),
}

MEETS: dict[str, Meet] = {
    "attention": lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v),
    "attention, scale": lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3),
    "attention, dropped": lambda m, q, k, v: F.scaled_dot_product_attention(
        q, k, v, dropout_p=m.dropped if m.training else 0.0
    ),
    "attention, values alike": lambda m, q, k, v: F.scaled_dot_product_attention(
        q, k, torch.cat([v, v[..., :1]], -1)
    )[..., :3],
    "after": lambda m, q, k, v: ((q @ k.transpose(-2, -1)) * 0.3).softmax(-1) @ v,
    "after, first": lambda m, q, k, v: (0.3 * (q @ k.transpose(-2, -1))).softmax(-1) @ v,
    "after, divided": lambda m, q, k, v: (
        (torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5).softmax(-1) @ v
    ),
    "before": lambda m, q, k, v: ((q * 0.3) @ k.transpose(-2, -1)).softmax(-1) @ v,
    "before, keys": lambda m, q, k, v: (q @ (k.transpose(-2, -1) / 3)).softmax(-1) @ v,
    "both": lambda m, q, k, v: ((0.5 * q) @ (0.7 * k).transpose(-2, -1)).softmax(-1) @ v,
    "temperature": lambda m, q, k, v: ((q @ k.transpose(-2, -1)) * m.temperature).softmax(-1) @ v,
    "added": lambda m, q, k, v: (
        torch.baddbmm(
            m.temperature[:1],
            *(t.flatten(0, 1) for t in (q, k.transpose(-2, -1))),
        )
        .unflatten(0, (-1, 2))
        .softmax(-1)
        @ v
    ),
    "tokens": lambda m, q, k, v: ((q @ k.transpose(-2, -1)) / q.shape[-2]).softmax(-1) @ v,
    "floored": lambda m, q, k, v: (
        torch.div(q @ k.transpose(-2, -1), 0.3, rounding_mode="floor").softmax(-1) @ v
    ),
    "nothing": lambda m, q, k, v: (q @ k.transpose(-2, -1)).softmax(-1) @ v,
}
LENGTHS = {"normalize", "normalize, by position", "norm", "between", "norm plus", "sum"}
# where nothing takes a factor back
LEFT = {"nothing", "added", "tokens", "floored"}


def tokens(batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 5, 6, dtype=torch.double, generator=generator)


def built(meet: str, norm: str, biased: bool = True) -> tuple[nn.Module, gg.Graph]:
    model = fill(Attention(meet, norm, biased).double(), 1)
    return model, gg.trace(model, tokens(3))


@pytest.mark.parametrize("meet", MEETS)
def test_whole_copies_of_features_keep_attention(meet: str) -> None:
    for k, norm in enumerate(NORMS):
        model, graph = built(meet, norm, k % 3 > 0)
        units, at = (4, 8)[k % 2], (None, 0, 1, 4)[k % 4]
        rewrite = gg.Widen("q[1]", units, at, gg.Copy())
        # the product of two lengths is as many times smaller as the sum is larger
        if norm == "floored" or (norm not in LENGTHS and meet in LEFT):
            assert rewrite.obstacle(graph) is not None, norm
            continue
        assert gg.Widen("q[1]", 3, at, gg.Copy()).obstacle(graph) is not None, norm
        grown = gg.apply(graph, rewrite, verify=False).graph
        assert gg.compare(model, grown, tokens(4)).relative <= 1e-12, norm
        first = 4 if at is None else at
        copies = gg.Remove("q[1]", tuple(range(first, first + units)))
        back = gg.apply(grown, copies, verify=False).graph
        assert gg.compare(model, back, tokens(4)).relative <= 1e-12, norm


@pytest.mark.parametrize(("meet", "norm"), [("attention", "rms"), ("before", "normalize")])
def test_copies_of_features_learn_and_come_back_from_a_file(
    meet: str, norm: str, tmp_path: Path
) -> None:
    model, graph = built(meet, norm)
    grown = gg.apply(graph, gg.Widen("q[1]", 8, weights=gg.Copy())).graph
    gg.save(tmp_path / "grown", grown)
    loaded = gg.load(tmp_path / "grown", Attention(meet, norm, True).double())
    assert gg.compare(gg.lower(grown), loaded, tokens(4)).absolute == 0
    assert gg.compare(model, loaded, tokens(4)).relative <= 1e-12
    wider = gg.lower(grown).train()
    wider(tokens(4)).sin().sum().backward()
    for path in ("q.weight", "k.weight"):
        assert (wider.get_parameter(path).grad != 0).all(), path


def test_the_proof_says_what_the_product_is_multiplied_with() -> None:
    _, graph = built("attention", "rms")
    grown = gg.apply(graph, gg.Widen("q[1]", 8, weights=gg.Copy()))
    said = str(grown.proof)
    assert (
        "copies, of each as many as of any other, in both factors: the sum is multiplied by 3"
        in said
    )
    assert "multiplies it with is multiplied by 0.333333" in said
    _, graph = built("nothing", "norm")
    said = str(gg.apply(graph, gg.Widen("q[1]", 12, weights=gg.Copy())).proof)
    assert "what clamp_min in 'norms.0' bounds it by is multiplied by 2" in said


# --------------------------------------------------------------------------- what is refused


class Twice(Attention):
    """Scaled queries are read by another layer too, so that their scale may not change."""

    def __init__(self) -> None:
        super().__init__("nothing", "none", True)
        self.p = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (2, -1)).transpose(1, 2) for w in (self.q, self.k, self.v))
        q = 0.3 * q
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(2)) + self.p(q.transpose(1, 2).flatten(2))


class Dropped(Attention):
    """Keys are dropped, each feature for itself."""

    def __init__(self) -> None:
        super().__init__("nothing", "none", True)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (2, -1)).transpose(1, 2) for w in (self.q, self.k, self.v))
        k = F.dropout(k, 0.5, self.training)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).flatten(2))


class Halves(nn.Module):
    """Two layers' units side by side, summed in one way."""

    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(6, 4), nn.Linear(6, 3), nn.Linear(1, 2)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.way(torch.cat([self.a(x), self.b(x)], -1)))


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean(-1, keepdim=True),
    "sum": lambda x: x.sum(-1, keepdim=True),
    "norm": lambda x: x.norm(dim=-1, keepdim=True),
    "product": lambda x: (x[..., None, :] @ x.tanh()[..., None])[..., 0],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("weights", [gg.Copy(), gg.MeanFill()])
def test_copies_of_some_of_the_units_summed_are_refused(
    way: str, weights: gg.Copy | gg.MeanFill
) -> None:
    graph = gg.trace(fill(Halves(WAYS[way]).double(), 1), tokens(3))
    said = gg.Widen("a", 4, weights=weights).obstacle(graph)
    assert said is not None and "sums over its units with no weight that could be zero" in said


@pytest.mark.parametrize("kind", [Twice, Dropped])
def test_what_cannot_be_taken_back_is_refused(kind: type[Twice] | type[Dropped]) -> None:
    graph = gg.trace(fill(kind().double(), 1), tokens(3))
    assert gg.Widen("q[1]", 4, weights=gg.Copy()).obstacle(graph) is not None


@pytest.mark.parametrize("order", ["0123", "1230", "0011"])
def test_copies_go_where_both_factors_copy_the_same_units(order: str) -> None:
    model = Attention("attention", "none", True).double()
    model.q, model.k = nn.Linear(6, 16).double(), nn.Linear(6, 16).double()
    fill(model, 1)
    with torch.no_grad():
        for layer, units in ((model.q, order), (model.k, "0123")):
            for tensor in (layer.weight, layer.bias):
                heads = tensor.unflatten(0, (2, 8))
                heads[:, 4:] = heads[:, [int(u) for u in units]].clone()
    graph = gg.trace(model, tokens(3))
    rewrite = gg.Remove("q[1]", (4, 5, 6, 7))
    if order != "0123":
        assert rewrite.obstacle(graph) is not None
        return
    back = gg.apply(graph, rewrite).graph
    assert gg.compare(model, back, tokens(4)).relative <= 1e-12


# --------------------------------------------------------------------------- beside attention


class Similar(nn.Module):
    """How like two layers' outputs are: their cosine, a sum of products, or of lengths."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(1, 2)
        self.layer, self.way = nn.CosineSimilarity(-1, eps=EPS), way

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        if self.way == "sum":
            return self.o((a * b).sum(-1, keepdim=True))
        if self.way == "lengths":
            return self.o(a.norm(dim=-1, keepdim=True) + (a - b).norm(dim=-1, keepdim=True))
        if self.way == "layer":
            return self.o(self.layer(a, b)[..., None])
        return self.o(F.cosine_similarity(a, b, dim=-1, eps=EPS)[..., None])


@pytest.mark.parametrize("way", ["layer", "function", "sum", "lengths"])
def test_similarities_are_those_of_the_narrower_layers(way: str) -> None:
    model = fill(Similar(way).double(), 1)
    graph = gg.trace(model, tokens(3))
    grown = gg.apply(graph, gg.Widen("a", 8, weights=gg.Copy())).graph
    assert gg.compare(model, grown, tokens(4)).relative <= 1e-12
    back = gg.apply(grown, gg.Remove("a", tuple(range(4, 12)))).graph
    assert gg.compare(model, back, tokens(4)).relative <= 1e-12


class Packed(nn.Module):
    """Packed rows with a bias that is computed, whose part for keys is zero."""

    def __init__(self, masked: bool, normed: bool = True) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(6, 24), nn.Linear(8, 2)
        self.q_bias, self.v_bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
        self.register_buffer("k_bias", torch.zeros(8))
        self.masked, self.normed = masked, normed

    def forward(self, x: Tensor) -> Tensor:
        if self.masked:
            bias = self.qkv.bias.clone()
            width = bias.numel() // 3
            bias[:width] = self.q_bias
            bias[width : 2 * width].zero_()
        else:
            bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        rows = F.linear(x, self.qkv.weight, bias).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in rows)
        if self.normed:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("at", [None, 1])
def test_copies_are_followed_through_biases_that_are_computed(masked: bool, at: int | None) -> None:
    model = fill(Packed(masked).double(), 1)
    graph = gg.trace(model, tokens(3))
    name = next(n for n, axis in graph.axes.items() if axis.width == 4)
    assert gg.Widen(name, 3, weights=gg.Copy()).obstacle(graph) is not None
    grown = gg.apply(graph, gg.Widen(name, 4, at, gg.Copy())).graph
    assert gg.compare(model, grown, tokens(4)).relative <= 1e-12
    first = 4 if at is None else at
    back = gg.apply(grown, gg.Remove(name, tuple(range(first, first + 4)))).graph
    assert gg.compare(model, back, tokens(4)).relative <= 1e-12
    loaded = gg.lower(grown)
    with torch.no_grad():
        loaded.get_parameter("q_bias")[first] += 1  # a copy no longer
    other = gg.Remove(name, tuple(range(first, first + 4)))
    assert other.obstacle(gg.trace(loaded, tokens(3))) is not None


@pytest.mark.parametrize("masked", [False, True])
def test_parts_of_packed_rows_are_not_zero_where_a_computed_bias_is_not(masked: bool) -> None:
    model = fill(Packed(masked, normed=False).double(), 1)
    graph = gg.trace(model, tokens(3))
    rewrite = gg.Widen(next(n for n, axis in graph.axes.items() if axis.width == 4), 3)
    if rewrite.obstacle(graph) is None:
        grown = gg.apply(graph, rewrite, verify=False).graph
        assert gg.compare(model, grown, tokens(4)).relative <= 1e-12


class Shifted(nn.Module):
    """Units to each of which the same number is added."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.t = nn.Linear(6, 4, bias=False), nn.Linear(6, 1)
        self.o = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.a(x) + self.t(x).expand(-1, -1, 4))


@pytest.mark.parametrize("multiple", [1.0, 2.0])
def test_multiples_are_none_beside_what_is_added_to_all_units(multiple: float) -> None:
    model = fill(Shifted().double(), 1)
    with torch.no_grad():
        model.a.weight[1] = multiple * model.a.weight[0]
    graph, rewrite = gg.trace(model, tokens(3)), gg.Remove("a", (1,))
    assert (rewrite.obstacle(graph) is None) == (multiple == 1)
    if multiple == 1:
        back = gg.apply(graph, rewrite).graph
        assert gg.compare(model, back, tokens(4)).relative <= 1e-12
