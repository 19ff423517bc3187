"""Widen a stage of torchvision's ResNet-18 in the middle of training with momentum SGD.

    python examples/resnet.py

The stage's channels are written by three convolutions, carried by three batch norms, added up by
the shortcuts, and read by three more: the analysis finds them, and all of them widen together.
"""

import sys

import torch
import torch.nn.functional as F

import graphgrow as gg

try:
    from torchvision.models import resnet18
except (ImportError, RuntimeError) as error:  # not installed, or built for another torch
    print(f"skipped: this example needs torchvision ({error})")
    sys.exit()

torch.manual_seed(0)
images, labels = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
model = resnet18(num_classes=10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def loss():
    return F.cross_entropy(model(images), labels)


def step():
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


for _ in range(3):
    step()
before = loss().item()
graph = gg.trace(model, images)
stage = graph.axis("layer2.0.conv2")
momentum = optimizer.state[model.layer2[0].conv2.weight]["momentum_buffer"].clone()

grown = gg.apply(graph, gg.Widen(stage.name, units=32))
difference = gg.compare(graph, grown.graph, images)
gg.migrate(optimizer, grown)
gg.lower(grown.graph, into=model)  # still torchvision's own class

after = loss().item()
moved = optimizer.state[model.layer2[0].conv2.weight]["momentum_buffer"].clone()
print("written by", *(at.path for at in stage.producers))
print("read by", *(at.path for at in stage.consumers))
print(f"{stage.width} → {model.layer2[0].conv2.out_channels} channels in {type(model).__name__}")
print(f"loss before {before:.6f}, after {after:.6f}")
step()
print(f"one step later {loss().item():.6f}")

assert abs(before - after) < 1e-5
assert difference.relative < 1e-10
assert torch.equal(moved[: stage.width], momentum)
