"""torch's multi-head attention written out: the same numbers, and what of it can grow."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import fill
from torch import Tensor, nn
from torch.nn import functional as F

import graphgrow as gg
from graphgrow.ir.attention import attend

torch_attend = F.multi_head_attention_forward


@pytest.fixture(autouse=True)
def unfused():
    """Without torch's fused layers for inference, which leave out what a mask hides."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.double)


@st.composite
def calls(draw: st.DrawFn) -> tuple[nn.MultiheadAttention, tuple[Tensor, ...], dict[str, Any]]:
    """Return an attention layer and arguments for it, with masks of every kind."""
    yes, heads, batch = st.booleans(), 2, 3
    own_sizes = draw(yes)
    layer = nn.MultiheadAttention(
        8,
        heads,
        dropout=draw(st.sampled_from([0.0, 0.5])),
        bias=draw(yes),
        add_bias_kv=draw(yes),
        add_zero_attn=draw(yes),
        kdim=5 if own_sizes else None,
        vdim=7 if own_sizes else None,
        batch_first=draw(yes),
    )
    fill(layer.double().train(draw(yes)), 0)
    batched, alike = draw(yes), draw(st.sampled_from(["none", "key and value", "all"]))
    targets, sources = 4, 4 if alike == "all" and not own_sizes else 6

    def sequence(length: int, width: int) -> Tensor:
        shape = (batch, length) if layer.batch_first else (length, batch)
        return drawn(*(shape if batched else (length,)), width)

    query = sequence(targets, 8)
    if own_sizes:
        inputs = query, sequence(sources, 5), sequence(sources, 7)
    elif alike == "all":
        inputs = query, query, query
    else:
        key = sequence(sources, 8)
        inputs = query, key, key if alike == "key and value" else sequence(sources, 8)
    named: dict[str, Any] = {"need_weights": draw(yes), "average_attn_weights": draw(yes)}
    mask = draw(st.sampled_from(["none", "boolean", "numbers", "of each head", "causal"]))
    count = batch if batched else 1
    if mask == "boolean":
        named["attn_mask"] = drawn(targets, sources) > 0.5
        named["attn_mask"][:, 0] = False
    elif mask == "causal":
        named["attn_mask"] = torch.ones(targets, sources, dtype=torch.bool).triu(1)
        named["is_causal"] = True
    elif mask != "none":
        named["attn_mask"] = drawn(*([count * heads] * (mask != "numbers")), targets, sources)
    if draw(yes):
        hidden = drawn(*([count] * batched), sources) > 0.5
        hidden[..., 0] = False
        numbers = torch.zeros(hidden.shape, dtype=torch.double).masked_fill(hidden, -torch.inf)
        named["key_padding_mask"] = hidden if mask in ("none", "boolean", "causal") else numbers
    return layer, inputs, named


@settings(max_examples=150)
@given(calls(), st.integers(0, 99))
def test_it_gives_what_torchs_own_function_gives(call: Any, seed: int) -> None:
    layer, inputs, named = call
    torch.manual_seed(seed)
    wanted, weights = layer(*inputs, **named)
    torch.manual_seed(seed)
    with mock.patch.object(F, "multi_head_attention_forward", attend):
        found, given_weights = layer(*inputs, **named)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(given_weights, weights, rtol=1e-12, atol=1e-12)


def test_static_keys_and_values_are_taken() -> None:
    x, static = drawn(4, 3, 8), drawn(6, 5, 4)
    weights = drawn(24, 8), drawn(24), None, None, False, 0.0, drawn(8, 8), drawn(8)
    wanted, found = (
        f(x, x, x, 8, 2, *weights, static_k=static, static_v=-static)[0]
        for f in (torch_attend, attend)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------- models


class Around(nn.Module):
    """A layer between two others, so that its axes are no input's and no output's."""

    def __init__(self, layer: nn.Module, memory: bool = False) -> None:
        super().__init__()
        self.before, self.layer, self.after = nn.Linear(6, 8), layer, nn.Linear(8, 3)
        self.memory = nn.Linear(5, 8) if memory else None

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        if self.memory is not None:
            rest = (self.memory(rest[0]), *rest[1:])
        return self.after(self.layer(self.before(x), *rest))


def encoder(norm_first: bool, **named: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, norm_first=norm_first, batch_first=True, **named)
    norm = nn.LayerNorm(8) if norm_first else None
    return nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)


def decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12, batch_first=True), 1)


class Cross(nn.Module):
    """Attention to a memory of other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=5, vdim=5, add_bias_kv=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x, memory = x.transpose(0, 1), memory.transpose(0, 1)
        return x + self.attention(x, memory, memory, need_weights=False)[0]


causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.double)
x, memory = drawn(2, 4, 6), drawn(2, 5, 5)
hidden = torch.zeros(2, 4, dtype=torch.double)
hidden[0, 3] = -torch.inf
POST_NORM = "normalises over units, and new ones are neither the mean of the others nor copies"
MODELS: dict[str, tuple[nn.Module, tuple[Any, ...], str]] = {
    "encoder": (Around(encoder(False)), (x,), POST_NORM),
    "pre-norm encoder": (Around(encoder(True, dropout=0.0)), (x,), ""),
    "masked encoder": (Around(encoder(False)), (x, causal, hidden), POST_NORM),
    "decoder": (Around(decoder(), True), (x, memory, causal), POST_NORM),
    "transformer": (
        Around(nn.Transformer(8, 2, 1, 1, 12, batch_first=True), True),
        (x, memory, None, nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.double)),
        POST_NORM,
    ),
    "cross attention": (Around(Cross()), (x, memory), ""),
}
ANYWHERE = ("of the input", "of the model's output", "has width one", "mixes its units")


@pytest.mark.parametrize("name", MODELS)
def test_heads_features_and_streams_grow(name: str) -> None:
    model, inputs, reason = MODELS[name]
    fill(model.double(), 1)
    graph = gg.trace(model, *inputs)
    asked = [gg.Widen(axis, 3) for axis in graph.axes]
    said = {rewrite: rewrite.obstacle(graph) for rewrite in asked}
    for rewrite, sentence in said.items():
        if sentence is None:
            gg.apply(graph, rewrite)  # which compares
    expected = (*ANYWHERE, reason) if reason else ANYWHERE
    assert all(any(part in s for part in expected) for s in said.values() if s)
    grown = gg.apply(graph, *(rewrite for rewrite, sentence in said.items() if sentence is None))
    layers = [path for path, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    for path in layers:
        assert sizes(grown.graph, path) == (2 + 3, 4 + 3, 4 + 3)


def sizes(graph: gg.Graph, path: str) -> tuple[int, ...]:
    """Return the heads of an attention layer, its features of queries and keys, and of values."""
    packed = "in_proj_weight[0] in_proj_weight[1] in_proj_weight[5]"
    apart = "q_proj_weight[0] q_proj_weight[1] v_proj_weight[1]"
    names = packed if f"{path}.in_proj_weight" in graph.state else apart
    return tuple(graph.axes[f"{path}.{name}"].width for name in names.split())


def test_heads_whose_mean_weights_are_the_models_output_grow_by_whole_copies() -> None:
    inputs = [drawn(4, 3, 8)] * 3
    graph = gg.trace(fill(nn.MultiheadAttention(8, 2).double(), 1), *inputs)
    gg.apply(graph, gg.Widen("in_proj_weight[0]", 2, weights=gg.Copy((0, 1))))
    obstacle = gg.Widen("in_proj_weight[0]", 1).obstacle(graph)
    assert obstacle is not None and "'mean'" in obstacle


def test_heads_whose_queries_and_keys_are_both_zero_are_refused() -> None:
    for need_weights in (False, True):
        model = fill(Around(Plain(need_weights)).double(), 1)
        graph = gg.trace(model, x)
        heads = "layer.attention.in_proj_weight[0]"
        obstacle = gg.Widen(heads, 1, weights=gg.ZeroIncoming()).obstacle(graph)
        assert obstacle is not None and "would get no gradient for ever" in obstacle


class Plain(nn.Module):
    """Attention alone, without biases, of which new heads could get constants."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


def test_the_stream_behind_norms_grows_by_whole_copies() -> None:
    model = fill(Around(encoder(False, dropout=0.0)).double(), 1)
    graph = gg.trace(model, x)
    grown = gg.apply(graph, gg.Widen("before", 16, weights=gg.Copy(tuple(range(8)))))
    assert gg.compare(model, grown.graph, x).relative <= 1e-10
    for units in (3, 12):
        obstacle = gg.Widen("before", units).obstacle(graph)
        assert obstacle is not None and POST_NORM in obstacle


def test_a_mask_for_each_head_fixes_the_heads() -> None:
    model = Around(Masked()).double()
    axis = gg.trace(model, x, drawn(2 * 2, 4, 4)).axes["layer.attention.in_proj_weight[0]"]
    assert axis.obstacle is not None and "of the input 'rest_0'" in axis.obstacle


class Masked(nn.Module):
    """Attention under a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.attention(x, x, x, attn_mask=mask)[0]


def test_grown_attention_goes_back_into_its_model_only_where_torchs_own_code_takes_it() -> None:
    model = fill(Around(encoder(True, dropout=0.0)).double(), 1)
    graph = gg.trace(model, x)
    first = "layer.layers.0"
    shapes = {
        f"{first}.self_attn.in_proj_weight[0]": (60, 8),
        f"{first}.self_attn.in_proj_weight[5]": (30, 8),
        "before": (24, 11),
    }
    for axis, shape in shapes.items():
        grown = gg.apply(graph, gg.Widen(axis, 3))
        with pytest.raises(gg.NotApplicable) as error:
            gg.lower(grown.graph, into=model)
        assert str(error.value) == (
            "cannot lower into 'Around': its forward calls 'multi_head_attention_forward' with "
            f"'{first}.self_attn.in_proj_weight' of (24, 8), which becomes {shape}; "
            "lower without into"
        )
    wanted = model(x)
    heads = (f"layer.layers.{layer}.self_attn.in_proj_weight[0]" for layer in (0, 1))
    fitting = [gg.Widen("before", 4), *(gg.Widen(axis, 1) for axis in heads)]
    twin = gg.lower(gg.apply(graph, *fitting).graph, into=copy.deepcopy(model))
    attention = twin.get_submodule(f"{first}.self_attn")
    assert (attention.embed_dim, attention.num_heads, attention.head_dim) == (12, 3, 4)
    torch.testing.assert_close(twin(x), wanted, rtol=1e-12, atol=1e-12)
    grown = gg.apply(graph, gg.Widen(f"{first}.linear1", 3))
    assert gg.lower(grown.graph, into=model) is model
    assert model.get_submodule(first).linear1.out_features == 15
    torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)


def test_grown_heads_are_saved_and_loaded(tmp_path: Path) -> None:
    model = fill(Around(encoder(False)).double(), 1)
    graph = gg.trace(model, x)
    heads, values = ("layer.layers.1.self_attn.in_proj_weight" + part for part in ("[0]", "[5]"))
    grown = gg.apply(graph, gg.Widen(heads, 2, at=1), gg.Widen(values, 3))
    gg.save(tmp_path / "grown", grown)
    again = gg.load(tmp_path / "grown", Around(encoder(False)).double())
    assert torch.equal(again.eval()(x), gg.lower(grown.graph).eval()(x))


def test_what_a_mask_hints_is_asked_outside_of_recordings_as_before() -> None:
    layer = encoder(False).eval()
    with mock.patch.object(F, "multi_head_attention_forward", wraps=torch_attend) as called:
        layer(drawn(2, 4, 8).float(), causal.float())
    assert called.call_args.kwargs["is_causal"]
