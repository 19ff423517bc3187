"""The ResNet-18 of TINY's table 3: blocks whose middle starts narrow and grows."""

import torch
from torch import nn


class Block(nn.Module):
    """Two convolutions beside an identity shortcut; `middle` is the axis that grows."""

    def __init__(self, width, middle):
        super().__init__()
        self.first = nn.Conv2d(width, middle, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(middle)
        self.second = nn.Conv2d(middle, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x):
        # max(x, 0) with slope one at zero: GradMax's units start there
        y = self.norm1(self.first(x)).clamp(min=0)
        return (x + self.norm2(self.second(y))).clamp(min=0)


class Entry(nn.Module):
    """The convolution before a stage."""

    def __init__(self, before, width):
        super().__init__()
        stride = 1 if before == 3 else 2
        self.conv = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        return self.norm(self.conv(x)).clamp(min=0)


class Net(nn.Module):
    """Four stages of two blocks each, their widths 1, 2, 4 and 8 times `base`.

    The middle of a block has the width of its stage divided by `part`: 64 and 4 in the paper.
    """

    def __init__(self, base=64, part=64, classes=100):
        super().__init__()
        stages, before = [], 3
        for width in stage_widths(base):
            middle = max(width // part, 1)
            stages.append(nn.Sequential(Entry(before, width), Block(width, middle),
                                        Block(width, middle)))  # fmt: skip
            before = width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(before, classes)

    def forward(self, x):
        return self.head(self.stages(x).mean((2, 3)))


def stage_widths(base):
    """Return the widths of the four stages."""
    return [base, 2 * base, 4 * base, 8 * base]


def axes(base):
    """Return the growing axes in the order of depth, with their final widths."""
    return {f"stages.{i}.{j}.first": w for i, w in enumerate(stage_widths(base)) for j in (1, 2)}


def crops(images, draws):
    """Return images shifted by up to four pixels, half of them turned over."""
    count, _, size, _ = images.shape
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    shift = torch.randint(9, (2, count), generator=draws).to(images.device)
    turned = (torch.rand(count, generator=draws) < 0.5).to(images.device)
    pixels = torch.arange(size, device=images.device)
    columns = torch.where(turned[:, None], pixels.flip(0), pixels) + shift[1, :, None]
    rows = pixels + shift[0, :, None]
    number = torch.arange(count, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[number, rows[:, :, None], columns[:, None, :]].movedim(3, 1)
