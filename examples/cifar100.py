"""CIFAR-100 as tensors, read from lossless packs of 10,000 images each.

A pack is an .npz file: `z` is an xz stream of what predictions from neighbours leave of the planes
green, red − green and blue − green, image by image; `shape` is (n, 32, 32, 3), `y` has the classes.
"""

import lzma
import os
from pathlib import Path

import numpy as np
import torch

MEAN, STD = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)
TRAIN = [f"cifar100_train{part}.med.npz" for part in range(5)]
TEST = ["cifar100_test.med.npz"]


def cifar100(names=TRAIN, count=None):
    """Return normalised images `(n, 3, 32, 32)` and classes, None without GRAPHGROW_DATA.

    `names` are packs in the directory that GRAPHGROW_DATA names; of each, `count` images are read.
    """
    folder = os.environ.get("GRAPHGROW_DATA")
    if folder is None or not all((Path(folder) / name).exists() for name in names):
        print("skipped: GRAPHGROW_DATA names no directory with CIFAR-100")
        return None
    parts = [np.load(Path(folder) / name) for name in names]
    images = np.concatenate([decoded(p["z"], p["shape"], count) for p in parts])
    classes = np.concatenate([p["y"][:count] for p in parts])
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return x.sub_(mean).div_(std).contiguous(), torch.from_numpy(classes).long()


def decoded(packed, shape, count=None):
    """Return the first images of a pack as `uint8` `(n, height, width, 3)`."""
    n, height, width, _ = (int(size) for size in shape)
    raw = lzma.decompress(packed.tobytes())
    codes = np.frombuffer(raw, np.uint8).reshape(n, 3, height, width)[:count]
    left = np.where(codes & 1, -(codes.astype(np.int16) + 1) // 2, codes // 2).astype(np.int16)
    planes = np.zeros((3, height, width, len(codes)), np.int16)
    for c in range(3):
        for i, j in np.ndindex(height, width):
            base = planes[0, i, j] if c else 0  # a byte again once green is added
            found = left[:, c, i, j] + _predicted(planes[c], i, j) + base
            planes[c, i, j] = (found & 255) - base
    green, red, blue = planes
    return np.stack([red + green, green, blue + green], -1).transpose(2, 0, 1, 3).astype(np.uint8)


def _predicted(plane, i, j):
    """Return the median edge prediction of one pixel of all images."""
    if not (i and j):
        return plane[i, j - 1] if j else plane[i - 1, j] if i else 0
    west, north, corner = plane[i, j - 1], plane[i - 1, j], plane[i - 1, j - 1]
    low, high = np.minimum(west, north), np.maximum(west, north)
    return np.where(corner >= high, low, np.where(corner <= low, high, west + north - corner))
