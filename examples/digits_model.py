"""A small residual network for 8×8 images, in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions whose result is added to their input."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, hidden, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(y)))


class DigitNet(nn.Module):
    """Stem, two residual blocks of one stage, and a classifier with a hidden layer."""

    def __init__(self, width: int = 4, hidden: int = 4, features: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.block1 = Block(width, hidden)
        self.block2 = Block(width, hidden)
        self.features = nn.Linear(width * 2 * 2, features)
        self.classes = nn.Linear(features, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.max_pool2d(self.block1(x), 2)  # 8×8 → 4×4
        x = F.max_pool2d(self.block2(x), 2)  # 4×4 → 2×2
        return self.classes(F.relu(self.features(x.flatten(1))))
