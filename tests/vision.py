"""torchvision's classification and segmentation models, built small."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType

from torch import library, nn

# One model of every family whose code takes a path of its own; the others repeat these. MaxViT is
# drawn small by `small_maxvit`, and Inception, for large images only, has auxiliary heads as
# GoogLeNet has.
SAMPLE = tuple(
    "alexnet convnext_tiny densenet121 efficientnet_b0 googlenet mnasnet0_5 mobilenet_v2 "
    "mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d "
    "shufflenet_v2_x0_5 squeezenet1_0 swin_t swin_v2_t vit_b_32 "
    "deeplabv3_mobilenet_v3_large fcn_resnet50 lraspp_mobilenet_v3_large".split()
)

Build = Callable[[], nn.Module]


def zoo() -> Iterator[tuple[str, Build, int]]:
    """Yield name, constructor and image size of every model, with random weights."""
    models = torchvision().models
    for module in (models, models.segmentation):
        for name in sorted(models.list_models(module=module)):
            yield name, functools.partial(build, name), image_size(name)


def build(name: str) -> nn.Module:
    """Return the model `name` with 10 classes, for images of its `image_size`."""
    arguments: dict[str, object] = {"weights": None, "num_classes": 10}
    models = torchvision().models
    if name in models.list_models(module=models.segmentation):
        arguments |= {"weights_backbone": None}
        if not name.startswith("lraspp"):
            arguments |= {"aux_loss": True}
    if name in ("googlenet", "inception_v3"):
        arguments |= {"init_weights": False, "aux_logits": True}
    if name.startswith("vit"):
        arguments |= {"image_size": image_size(name)}
    if name.startswith("maxvit"):
        arguments |= {"input_size": (image_size(name), image_size(name))}
    return models.get_model(name, **arguments)


def small_maxvit() -> nn.Module:
    """Return a MaxViT for images of 32 by 32 pixels."""
    return torchvision().models.MaxVit(
        input_size=(32, 32),
        stem_channels=8,
        partition_size=4,
        block_channels=[8, 16],
        block_layers=[1, 2],
        head_dim=4,
        stochastic_depth_prob=0.2,
        num_classes=10,
    )


def small_vit() -> nn.Module:
    """Return a vision transformer for images of 64 by 64 pixels, its head not zero."""
    model = torchvision().models.VisionTransformer(64, 16, 3, 4, 64, 128, num_classes=10)
    nn.init.normal_(model.heads[0].weight)
    return model


def image_size(name: str) -> int:
    """Return an image size that `name` accepts, as small as its strides allow."""
    family = name.split("_")[0]
    sizes = {"inception": 299, "maxvit": 224, "fcn": 32, "deeplabv3": 32, "vit": 64}
    return 56 if name == "vit_h_14" else sizes.get(family, 64)


@functools.cache
def torchvision() -> ModuleType:
    """Return torchvision, which expects the schemas of its compiled operators to be there."""
    try:
        import torchvision
    except RuntimeError:  # the build for another kind of torch: no compiled operators
        for operator in ("nms", "qnms"):
            arguments = "(Tensor dets, Tensor scores, float threshold) -> Tensor"
            library.define(f"torchvision::{operator}", arguments)
        import torchvision
    return torchvision


def silenced() -> warnings.catch_warnings:
    """Return a context in which building a model warns of nothing."""
    return warnings.catch_warnings(action="ignore")
