"""Models of other libraries, built small, and inputs for them.

timm, Hugging Face's transformers, segmentation_models_pytorch and torch_geometric.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import vision
from torch import Tensor, nn

Inputs = Mapping[str, Any]

# --------------------------------------------------------------------------- torch

TORCH = ("transformer", "transformer_norm_first")


def torch_model(name: str) -> tuple[nn.Module, Inputs]:
    """Return torch's own transformer with random weights, and two pairs of sequences."""
    first = name.endswith("norm_first")
    model = nn.Transformer(32, 4, 2, 2, 56, batch_first=True, norm_first=first).double()
    source, target = (torch.randn(2, length, 32, dtype=torch.double) for length in (10, 7))
    return model, {"src": source, "tgt": target}


# --------------------------------------------------------------------------- transformers

TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
FEED = TEXT | {"intermediate_size": 56, "max_position_embeddings": 40}
GROUPED = FEED | {"num_key_value_heads": 2}
OPEN = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
IMAGE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 10}
PATCHES = IMAGE | {"image_size": 64, "patch_size": 16, "intermediate_size": 56}
STAGES = {"depths": [2, 2], "num_labels": 10, "image_size": 64}
PAIR = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 56,
    "decoder_ffn_dim": 56,
    "decoder_start_token_id": 1,
}

# A class, what its configuration says, and what it reads.
HUGGING_FACE: dict[str, tuple[str, dict[str, Any], str]] = {
    "albert": ("AlbertForSequenceClassification", FEED | {"embedding_size": 16}, "ids"),
    "bart": ("BartForConditionalGeneration", PAIR | OPEN, "pair"),
    "beit": ("BeitForImageClassification", PATCHES, "image"),
    "bert": ("BertForSequenceClassification", FEED, "ids"),
    "bloom": ("BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4} | OPEN, "ids"),
    "clip": ("CLIPModel", {}, "clip"),
    "convnextv2": (
        "ConvNextV2ForImageClassification",
        STAGES | {"hidden_sizes": [16, 24], "num_stages": 2},
        "image",
    ),
    "deberta-v2": ("DebertaV2ForSequenceClassification", FEED, "ids"),
    "deit": ("DeiTForImageClassification", PATCHES, "image"),
    "dinov2": (
        "Dinov2ForImageClassification",
        IMAGE | {"image_size": 64, "patch_size": 16},
        "image",
    ),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"dim": 32, "hidden_dim": 56, "n_layers": 2, "n_heads": 4, "vocab_size": 99},
        "ids",
    ),
    "electra": ("ElectraForSequenceClassification", FEED | {"embedding_size": 16}, "ids"),
    "falcon": ("FalconForCausalLM", TEXT | OPEN, "ids"),
    "gemma": ("GemmaForCausalLM", GROUPED | OPEN | {"head_dim": 8}, "ids"),
    "gemma2": ("Gemma2ForCausalLM", GROUPED | OPEN | {"head_dim": 8}, "ids"),
    "gpt-neox": ("GPTNeoXForCausalLM", FEED | OPEN, "ids"),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "vocab_size": 99} | OPEN,
        "ids",
    ),
    "llama": ("LlamaForCausalLM", GROUPED | OPEN, "ids"),
    "mamba": ("MambaForCausalLM", TEXT | OPEN | {"state_size": 5}, "ids"),
    "mistral": ("MistralForCausalLM", GROUPED | OPEN, "ids"),
    "mixtral": (
        "MixtralForCausalLM",
        GROUPED | OPEN | {"num_local_experts": 3, "experts_implementation": "batched_mm"},
        "ids",
    ),
    "mpnet": ("MPNetForSequenceClassification", FEED, "ids"),
    "olmo": ("OlmoForCausalLM", GROUPED | OPEN, "ids"),
    "opt": (
        "OPTForCausalLM",
        TEXT | OPEN | {"ffn_dim": 56, "max_position_embeddings": 40, "word_embed_proj_dim": 32},
        "ids",
    ),
    "phi": ("PhiForCausalLM", FEED | OPEN, "ids"),
    "qwen2": ("Qwen2ForCausalLM", GROUPED | OPEN, "ids"),
    "qwen3": ("Qwen3ForCausalLM", GROUPED | OPEN | {"head_dim": 8}, "ids"),
    "resnet": (
        "ResNetForImageClassification",
        {"hidden_sizes": [16, 24], "depths": [2, 2], "embedding_size": 8, "num_labels": 10},
        "image",
    ),
    "roberta": ("RobertaForSequenceClassification", FEED, "ids"),
    "segformer": ("SegformerForImageClassification", {"num_labels": 10}, "image"),
    "siglip": ("SiglipForImageClassification", {}, "siglip"),
    "swin": (
        "SwinForImageClassification",
        STAGES | {"embed_dim": 16, "num_heads": [2, 4], "window_size": 4},
        "image",
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 56, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
        | {"decoder_start_token_id": 0, "use_cache": False},
        "pair",
    ),
    "vit": ("ViTForImageClassification", PATCHES, "image"),
    "wav2vec2": (
        "Wav2Vec2ForSequenceClassification",
        FEED
        | {"conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2)}
        | {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "apply_spec_augment": False}
        | {"num_conv_pos_embedding_groups": 4, "num_labels": 10, "layerdrop": 0.0},
        "sound",
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        PAIR | OPEN | {"num_mel_bins": 16, "max_source_positions": 30, "max_target_positions": 40},
        "spectrum",
    ),
}


def hugging_face(name: str) -> tuple[nn.Module, Inputs]:
    """Return the model `name` of `HUGGING_FACE` with random weights, and inputs for it."""
    transformers = importlib.import_module("transformers")
    kind, stated, reads = HUGGING_FACE[name]
    config = getattr(transformers, kind).config_class(**stated, **_towers(reads))
    return getattr(transformers, kind)(config).double(), _READS[reads]()


def _towers(reads: str) -> dict[str, Any]:
    """Return what the configuration of a model of two towers says of each."""
    text = {k: v for k, v in FEED.items() if k != "vocab_size"}
    image = {k: v for k, v in PATCHES.items() if k != "num_labels"}
    ends = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
    if reads == "clip":
        return {"text_config": text | ends, "vision_config": image, "projection_dim": 24}
    return {"vision_config": image, "num_labels": 10} if reads == "siglip" else {}


def _ids(length: int = 10) -> Tensor:
    """Return token ids of two texts, without those that mark padding."""
    return torch.randint(3, 99, (2, length))


def _text() -> dict[str, Any]:
    return {"input_ids": _ids(), "attention_mask": torch.ones(2, 10, dtype=torch.long)}


def _image(size: int = 64) -> Tensor:
    return torch.randn(2, 3, size, size, dtype=torch.double)


_READS: dict[str, Callable[[], Inputs]] = {
    "ids": lambda: _text(),
    "pair": lambda: _text() | {"decoder_input_ids": _ids(7)},
    "image": lambda: {"pixel_values": _image()},
    "siglip": lambda: {"pixel_values": _image()},
    "clip": lambda: _text() | {"pixel_values": _image()},
    "sound": lambda: {"input_values": torch.randn(2, 400, dtype=torch.double)},
    "spectrum": lambda: {
        "input_features": torch.randn(2, 16, 60, dtype=torch.double),
        "decoder_input_ids": _ids(7),
    },
}

# --------------------------------------------------------------------------- timm

# The smallest variant of each family, of up to 25 million parameters; a family is a file of timm
# and the first word of a name.
TIMM = tuple(
    """
    bat_resnext26ts botnet26t_256 cait_xxs24_224 coat_tiny coatnet_pico_rw_224
    coatnext_nano_rw_224 convit_tiny convmixer_768_32 convnext_zepto_rms convnextv2_atto
    cpubone_nano crossvit_tiny_240 cs3darknet_focus_s csatv2 cspnext_tiny cspresnet50
    cspresnext50 darknet17 deit_tiny_patch16_224 densenet121 densenetblur121d dla46x_c dpn48b
    eca_botnext26ts_256 eca_nfnet_l0 eca_resnext26ts eca_vovnet39b ecaresnet26t
    ecaresnext26t_32x4d edgenext_xx_small efficientformer_l1 efficientformerv2_s0
    efficientnet_b0 efficientnetv2_rw_t efficientvim_m1 efficientvit_b0 efficientvit_m0
    ese_vovnet19b_slim_dw eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 fbnetc_100 fbnetv3_b
    flexivit_small gc_efficientnetv2_rw_t gcresnet33ts gcresnext26ts gcvit_xxtiny gernet_s
    ghostnet_050 ghostnetv3_050 gmixer_12_224 gmlp_ti16_224 halo2botnet50ts_256 halonet_h1
    haloregnetz_b hardcorenas_b hgnet_tiny hgnetv2_b0 hrnet_w18_small iformer_t
    inception_next_atto inception_v3 lambda_resnet26t lamhalobotnet50ts_256 lcnet_035
    lcnetv2_small legacy_seresnet18 legacy_xception levit_128s lowformer_b0 mambaout_femto
    maxvit_pico_rw_256 maxxvit_rmlp_nano_rw_256 maxxvitv2_nano_rw_256 mixer_s16_224 mixnet_s
    mnasnet_small mobilenet_edgetpu_100 mobilenetv2_035 mobilenetv3_small_050 mobileone_s1
    mobilevit_xxs mobilevitv2_050 mvitv2_tiny nest_tiny nf_regnet_b0 pit_ti_224 poolformer_s12
    poolformerv2_s12 pvt_v2_b0 rdnet_tiny regnetv_040 regnetx_002 regnety_002 regnetz_005
    regnetz_b16 repghostnet_050 repvgg_a0 repvit_m1 res2next50 resmlp_12_224 resnest14d
    resnet10t resnet32ts resnetaa34d resnetblur18 resnetv2_18 resnext26ts rexnet_100 rexnetr_100
    sebotnet33ts_256 sedarknet21 sehalonet33ts semnasnet_050 seresnet18 seresnet33ts
    seresnext26t_32x4d seresnext26ts shvit_s1 skresnet18 spnasnet_100 starnet_s050
    swiftformer_xs tf_efficientnet_lite0 tf_mobilenetv3_small_075 tiny_vit_5m_224 tinynet_e
    tnt_s_legacy_patch16_224 twins_svt_small visformer_tiny vit_srelpos_small_patch16_224
    vit_tiny_patch16_224 vit_tiny_patch16_dinov3_qkvb vit_tiny_r_s16_p8_224 vitamin_small_224
    vovnet39a xcit_nano_12_p8_224
    """.split()
)


def timm_model(name: str) -> tuple[nn.Module, Inputs]:
    """Return timm's model `name` with random weights and 10 classes, and images for it.

    The images are of the first of a few sizes at which it runs in both modes, built for that size
    where it can be.
    """
    vision.torchvision()
    timm = importlib.import_module("timm")
    create = functools.partial(timm.create_model, name, num_classes=10)
    own = timm.models.get_pretrained_cfg(name, allow_unregistered=True).input_size
    usual, last = create().double(), None
    for size in (64, 96, 128, 192, 224, own[-1]):
        images = torch.randn(2, own[0], size, size, dtype=torch.double)
        for model in itertools.chain([usual], _built_for(create, size)):
            try:
                with torch.no_grad():
                    model.eval()(images)
                    model.train()(images)
            except Exception as error:  # whatever its code says of a size that does not fit
                last = error
                continue
            return model, {_first_argument(model): images}
    raise RuntimeError(f"'{name}' runs at no size that was tried: {last}") from last


def _built_for(create: Callable[..., nn.Module], size: int) -> Iterator[nn.Module]:
    """Yield a model for images of a size, where its class can be told one."""
    with contextlib.suppress(Exception):  # most have no such argument, and some not that size
        yield create(img_size=size).double()


def _first_argument(model: nn.Module) -> str:
    return next(iter(inspect.signature(model.forward).parameters))


# --------------------------------------------------------------------------- segmentation_models

# Every decoder with a residual encoder, and others with encoders of other families.
SEGMENTATION = tuple(
    """
    unet-resnet18 unet-efficientnet-b0 unet-mit_b0 unet-timm-mobilenetv3_small_075
    unetplusplus-resnet18 manet-resnet18 manet-mobilenet_v2 linknet-resnet18 linknet-mobilenet_v2
    fpn-resnet18 fpn-mit_b0 pspnet-resnet18 pspnet-efficientnet-b0 pan-resnet18
    deeplabv3-resnet18 deeplabv3plus-resnet18 deeplabv3plus-mobilenet_v2 upernet-resnet18
    upernet-mit_b0 segformer-mit_b0 dpt-tu-vit_tiny_patch16_224
    """.split()
)


def segmentation_model(name: str) -> tuple[nn.Module, Inputs]:
    """Return the decoder and encoder `name` with random weights, for 5 classes, and images."""
    vision.torchvision()
    library = importlib.import_module("segmentation_models_pytorch")
    decoder, _, encoder = name.partition("-")
    stated = {"img_size": 64, "dynamic_img_size": False} if decoder == "dpt" else {}
    model = library.create_model(decoder, encoder, None, classes=5, **stated).double()
    return model, {_first_argument(model): _image(128 if decoder == "pan" else 64)}


# --------------------------------------------------------------------------- torch_geometric

NODES, EDGES, GRAPHS = 14, 40, 2
DEGREES = torch.tensor([1, 4, 5, 3, 1])  # of how many nodes have how many edges
BASIC = {"in_channels": 6, "hidden_channels": 16, "num_layers": 3, "out_channels": 5}

# What `torch_geometric.nn` has under a name, and how it is made; then what it reads beside x and
# edge_index.
WHOLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "gcn": ("GCN", BASIC, ""),
    "gcn-jumping": ("GCN", BASIC | {"jk": "cat", "norm": "batch_norm"}, ""),
    "gcn-lstm": ("GCN", BASIC | {"jk": "lstm"}, ""),
    "graphsage": ("GraphSAGE", BASIC, ""),
    "graphsage-max": ("GraphSAGE", BASIC | {"aggr": "max", "norm": "layer_norm"}, ""),
    "graphsage-project": ("GraphSAGE", BASIC | {"project": True, "norm": "graph_norm"}, ""),
    "gin": ("GIN", BASIC, ""),
    "gat": ("GAT", BASIC | {"heads": 4}, ""),
    "gatv2": ("GAT", BASIC | {"heads": 4, "v2": True}, ""),
    "edgecnn": ("EdgeCNN", BASIC, ""),
    "pna": (
        "PNA",
        BASIC
        | {"aggregators": ["mean", "min", "max", "std"], "deg": DEGREES}
        | {"scalers": ["identity", "amplification", "attenuation"]},
        "",
    ),
    "graphunet": (
        "GraphUNet",
        {"in_channels": 6, "hidden_channels": 16, "out_channels": 5, "depth": 2},
        "",
    ),
    "attentivefp": (
        "AttentiveFP",
        BASIC | {"edge_dim": 4, "num_timesteps": 2},
        "edge_attr batch",
    ),
    "linkx": ("LINKX", BASIC | {"num_nodes": NODES}, ""),
    "pmlp": ("PMLP", BASIC, ""),
}

# Layers of `torch_geometric.nn`, two of which and a pooling make a classifier of graphs.
LAYERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "transformer": ("TransformerConv", {"heads": 4, "concat": False, "beta": True}, "global_add"),
    "graph": ("GraphConv", {}, "global_mean"),
    "resgated": ("ResGatedGraphConv", {}, "global_max"),
    "cheb": ("ChebConv", {"K": 3}, "global_mean"),
    "tag": ("TAGConv", {"K": 2}, "global_add"),
    "arma": ("ARMAConv", {"num_stacks": 2, "num_layers": 2}, "global_mean"),
    "sg": ("SGConv", {"K": 2}, "global_mean"),
    "le": ("LEConv", {}, "global_mean"),
    "gen": ("GENConv", {}, "global_mean"),
    "cluster": ("ClusterGCNConv", {}, "global_mean"),
    "film": ("FiLMConv", {}, "global_mean"),
    "mf": ("MFConv", {"max_degree": 4}, "global_mean"),
    "eg": ("EGConv", {"num_heads": 4, "num_bases": 2}, "global_mean"),
    "general": ("GeneralConv", {"heads": 2, "attention": True}, "global_mean"),
    "supergat": (
        "SuperGATConv",
        {"heads": 2, "concat": False, "is_undirected": True},
        "global_mean",
    ),
    "gat-topk": ("GATConv", {"heads": 2, "concat": False}, "topk"),
    "gcn-sag": ("GCNConv", {}, "sag"),
    "gine": ("GINEConv", {"edge_dim": 4}, "global_add"),
    "nn": ("NNConv", {}, "global_mean"),
}


class OfGraphs(nn.Module):
    """Two graph layers, a pooling over each graph and a classifier."""

    def __init__(self, kind: str, stated: Mapping[str, Any], pooling: str) -> None:
        super().__init__()
        library = importlib.import_module("torch_geometric.nn")
        self.reads_edges = kind in ("GINEConv", "NNConv")
        self.layers = nn.ModuleList(
            getattr(library, kind)(*sizes(kind, before), **stated) for before in (6, 16)
        )
        picked = {"topk": "TopKPooling", "sag": "SAGPooling"}.get(pooling)
        self.picked = getattr(library, picked)(16, ratio=0.5) if picked else None
        self.pooled = getattr(library, f"{pooling}_pool", library.global_mean_pool)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, edge_attr: Tensor) -> Tensor:
        """Return a score for each graph and class."""
        rest = (edge_attr,) if self.reads_edges else ()
        for layer in self.layers:
            x = layer(x, edge_index, *rest).relu()
        graphs = None
        if self.picked is not None:
            graphs = int(batch.max()) + 1
            x, _, _, batch, *_ = self.picked(x, edge_index, None, batch)
        return self.head(self.pooled(x, batch, graphs))


def sizes(kind: str, before: int) -> tuple[Any, ...]:
    """Return what the constructor of a graph layer takes first."""
    if kind == "GINEConv":
        return (nn.Sequential(nn.Linear(before, 24), nn.ReLU(), nn.Linear(24, 16)),)
    if kind == "NNConv":
        edges = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, before * 16))
        return before, 16, edges
    return before, 16


def geometric_model(name: str) -> tuple[nn.Module, Inputs]:
    """Return a model of graphs with random weights, and two graphs."""
    library = importlib.import_module("torch_geometric.nn")
    graphs = {
        "x": torch.randn(NODES, 6, dtype=torch.double),
        "edge_index": torch.randint(NODES // 2, (2, EDGES)) + (torch.arange(EDGES) % 2 * 7),
        "batch": torch.arange(NODES) // (NODES // GRAPHS),
        "edge_attr": torch.randn(EDGES, 4, dtype=torch.double),
    }
    if name in WHOLE:
        kind, stated, reads = WHOLE[name]
        model = getattr(library, kind)(**stated).double()
        return model, {k: graphs[k] for k in ("x", "edge_index", *reads.split())}
    return OfGraphs(*LAYERS[name]).double(), graphs


# --------------------------------------------------------------------------- all


def architectures() -> dict[str, Callable[[], tuple[nn.Module, Inputs]]]:
    """Return how to build each model in float64, with inputs for it, by library and name."""
    found: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {}
    for name in TORCH:
        found[f"torch/{name}"] = functools.partial(torch_model, name)
    for name in HUGGING_FACE:
        found[f"transformers/{name}"] = functools.partial(hugging_face, name)
    for name in TIMM:
        found[f"timm/{name}"] = functools.partial(timm_model, name)
    for name in SEGMENTATION:
        found[f"segmentation_models_pytorch/{name}"] = functools.partial(segmentation_model, name)
    for name in (*WHOLE, *LAYERS):
        found[f"torch_geometric/{name}"] = functools.partial(geometric_model, name)
    for name, build, size in vision.zoo():
        found[f"torchvision/{name}"] = functools.partial(_torchvision, build, size)
    return found


def _torchvision(build: vision.Build, size: int) -> tuple[nn.Module, Inputs]:
    model = build().double()
    return model, {_first_argument(model): torch.randn(2, 3, size, size, dtype=torch.double)}
