"""Grow a model of your own between two steps of training: its loss stays what it was.

python examples/own_model.py
"""

import torch
import torch.nn.functional as F
from torch import nn

import graphgrow as gg


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.LayerNorm(4), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(F.gelu(self.first(self.norm(x))))


torch.manual_seed(0)
x, y = torch.randn(64, 4), torch.randint(3, (64,))
model = Net()
optimizer = torch.optim.Adam(model.parameters())
F.cross_entropy(model(x), y).backward()
optimizer.step()
before = F.cross_entropy(model(x), y)

graph = gg.trace(model, x)  # recorded while it runs
grown = gg.apply(graph, gg.Widen("first", units=4))  # 8 → 12 hidden units, proved and checked
model = gg.lower(grown.graph, into=model)  # the same object, with wider layers
gg.migrate(optimizer, grown)  # Adam's moments go along

after = F.cross_entropy(model(x), y)
print(f"loss before {before:.6f}, after {after:.6f}, with {model.first.out_features} hidden units")
print(grown.proof)
assert torch.isclose(before, after, rtol=0, atol=1e-6)
