"""Libraries' models, unchanged: which axes they have, and all that can grow grown at once."""

from __future__ import annotations

import copy
import functools

import architectures
import pytest
import torch
import vision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import graphgrow as gg

# Axes, and how many of them can be widened. What cannot is fixed by the input, the output, or by
# what the sentence says; `benchmarks/zoo.py` prints it, and has all the other models.
AXES = {
    "convnext_tiny": (24, 18),
    "densenet121": (122, 120),
    "efficientnet_b0": (42, 40),
    "googlenet": (65, 61),
    "lraspp_mobilenet_v3_large": (32, 30),
    "mobilenet_v3_small": (29, 27),
    "regnet_y_400mf": (71, 69),
    "resnet18": (14, 12),
    "shufflenet_v2_x0_5": (35, 30),
    "squeezenet1_0": (27, 25),
    "swin_t": (78, 37),
    "small_vit": (16, 13),
}


@functools.cache
def drawn(name: str) -> tuple[nn.Module, Tensor]:
    with vision.silenced():
        vision.torchvision()
        small = {"small_vit": (vision.small_vit, 64)}
        build, size = small.get(name) or next((b, s) for n, b, s in vision.zoo() if n == name)
        torch.manual_seed(0)
        model = build().double()
    return model, torch.randn(2, 3, size, size, dtype=torch.double)


def free(graph: gg.Graph) -> list[gg.Axis]:
    return [axis for axis in graph.axes.values() if axis.obstacle is None]


@pytest.mark.parametrize("name", AXES)
def test_all_that_can_grow_grows_at_once(name: str) -> None:
    model, images = drawn(name)
    graph = gg.trace(model, images)
    assert not graph.analysis.unknown
    rewrites = gg.candidates(graph, gg.Widen, units=3)
    assert (len(graph.axes), len(rewrites)) == AXES[name]
    grown = gg.apply(graph, *rewrites, verify=False)
    for rewrite in rewrites:
        assert grown.graph.axes[rewrite.axis].width == graph.axes[rewrite.axis].width + 3
    assert gg.compare(model, grown.graph, images).relative <= 1e-10
    assert list(gg.lower(grown.graph).state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("name", [n for n in AXES if n != "swin_t"])
def test_every_axis_that_cannot_grow_says_why(name: str) -> None:
    model, images = drawn(name)
    for axis in gg.trace(model, images).axes.values():
        if axis.obstacle is not None:
            head = f"cannot widen axis '{axis.name}' ({axis.width} units): it "
            assert axis.obstacle.startswith(head)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "swin_t", "lraspp_mobilenet_v3_large"])
def test_a_widened_model_takes_images_of_another_size_and_dtype(name: str) -> None:
    model, images = drawn(name)
    graph = gg.trace(model, images)
    middle = free(graph)[len(free(graph)) // 2]
    grown = gg.apply(graph, gg.Widen(middle.name, 3)).graph
    larger = torch.randn(3, 3, 96, 96, dtype=torch.double)
    assert gg.compare(model, grown, larger).relative <= 1e-10
    for dtype in (torch.float32, torch.bfloat16):
        before, after = (copy.deepcopy(m).to(dtype).eval() for m in (model, gg.lower(grown)))
        with torch.no_grad():
            found, wanted = (tree_leaves(m(larger.to(dtype)))[0] for m in (after, before))
        assert found.dtype == dtype
        assert (found - wanted).abs().max() <= 100 * torch.finfo(dtype).eps * wanted.abs().max()


def test_a_stage_of_a_residual_network_is_one_axis() -> None:
    model, images = drawn("resnet18")
    axis = gg.trace(model, images).axis("layer2.1.conv2")
    assert axis.width == 128
    assert {at.path for at in axis.producers} == {
        "layer2.0.conv2.weight",
        "layer2.0.downsample.0.weight",
        "layer2.1.conv2.weight",
    }
    assert {at.path for at in axis.consumers} == {
        "layer2.1.conv1.weight",
        "layer3.0.conv1.weight",
        "layer3.0.downsample.0.weight",
    }


def test_a_widened_resnet_is_still_torchvisions() -> None:
    model, images = drawn("resnet18")
    graph = gg.trace(model, images)
    wider = gg.apply(graph, gg.Widen("layer3.0.conv2", 5, at=7)).graph
    mine = gg.lower(wider, into=drawn.__wrapped__("resnet18")[0])
    assert type(mine) is type(model) and mine.layer3[1].bn1.num_features == 256
    assert mine.layer3[0].downsample[0].out_channels == 261
    assert gg.compare(model, mine, images).relative <= 1e-10


# --------------------------------------------------------------------------- other libraries

# How many axes can be widened, at least.
MORE = {
    "timm/test_byobnet": 6,
    "timm/test_vit": 10,
    "timm/test_convnext": 6,
    "transformers/bert": 7,
    "transformers/gpt2": 6,
    "transformers/llama": 10,
    "transformers/t5": 13,
    "transformers/vit": 7,
    "segmentation_models_pytorch/pspnet-resnet18": 11,
    "torch_geometric/gcn-jumping": 3,
    "torch_geometric/gat": 4,
    "torch_geometric/pna": 8,
    "torch_geometric/attentivefp": 6,
    "torch_geometric/gcn-sag": 2,
}
BUILD = {
    "timm": architectures.timm_model,
    "transformers": architectures.hugging_face,
    "segmentation_models_pytorch": architectures.segmentation_model,
    "torch_geometric": architectures.geometric_model,
}


@functools.cache
def built(name: str) -> tuple[nn.Module, architectures.Inputs]:
    library, _, short = name.partition("/")
    vision.torchvision()
    pytest.importorskip(library, reason=f"{library} comes with requirements/zoo.txt")
    torch.manual_seed(0)
    with vision.silenced():
        return BUILD[library](short)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MORE)
def test_models_of_other_libraries_grow_all_at_once(name: str) -> None:
    model, inputs = built(name)
    graph = gg.trace(model, **inputs)
    assert not graph.analysis.unknown
    rewrites = gg.candidates(graph, gg.Widen, units=5)
    assert len(rewrites) >= MORE[name]
    grown = gg.apply(graph, *rewrites, verify=False).graph
    assert gg.compare(model, grown, **inputs).relative <= 1e-10


@pytest.mark.filterwarnings("ignore")
def test_frequencies_of_normalised_queries_and_keys_grow_by_whole_copies() -> None:
    model, inputs = built("transformers/qwen3")
    graph = gg.trace(model, **inputs)
    frequencies = graph.axis("model.layers.0.self_attn.q_proj[2]")
    rewrite = gg.Widen(frequencies.name, frequencies.width, weights=gg.Copy())
    grown = gg.apply(graph, rewrite, verify=False).graph
    assert gg.compare(model, grown, **inputs).relative <= 1e-10
    copies = tuple(range(frequencies.width, 2 * frequencies.width))
    back = gg.apply(grown, gg.Remove(frequencies.name, copies), verify=False).graph
    assert gg.compare(model, back, **inputs).relative <= 1e-10


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "axis", "attribute"),
    [
        ("timm/test_vit", "blocks.0.attn.qkv[1]", "blocks.0.attn.num_heads"),
        ("transformers/gpt2", "transformer.h.1.mlp.c_fc.weight", "transformer.h.1.mlp.c_fc.nf"),
        (
            "transformers/t5",
            "decoder.block.0.layer.1.EncDecAttention.q[0]",
            "decoder.block.0.layer.1.EncDecAttention.n_heads",
        ),
    ],
)
def test_other_libraries_models_stay_themselves(name: str, axis: str, attribute: str) -> None:
    model, inputs = copy.deepcopy(built(name))
    owner, _, number = attribute.rpartition(".")
    before = getattr(model.get_submodule(owner), number)
    graph = gg.trace(model, **inputs)
    grown = gg.apply(graph, gg.Widen(axis, 5), verify=False).graph
    assert gg.lower(grown, into=model) is model
    assert getattr(model.get_submodule(owner), number) == before + 5
    assert gg.compare(built(name)[0], model, **inputs).relative <= 1e-10


@pytest.mark.filterwarnings("ignore")
def test_a_growth_that_a_librarys_code_cannot_follow_is_refused() -> None:
    model, inputs = built("transformers/bert")
    grown = gg.apply(
        gg.trace(model, **inputs),
        gg.Widen("bert.encoder.layer.0.attention.self.value[1]", 5),
        verify=False,
    )
    with pytest.raises(gg.NotApplicable, match="would need another literal at"):
        gg.lower(grown.graph, into=model)
