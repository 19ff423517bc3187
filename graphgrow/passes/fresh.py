"""New units with incoming weights of a given length, as nonparametric networks start them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from graphgrow.errors import NotApplicable
from graphgrow.passes.units import Resized
from graphgrow.passes.weights import ZeroOutgoing


@dataclass(frozen=True)
class UnitLength:
    """New units whose incoming weights have the expected length `length`; nothing reads them yet.

    All d incoming weights of a unit, of all layers that write it, are drawn from N(0, s²) with
    s = length/√d. The rest is as in `ZeroOutgoing`.

    Source: Philipp and Carbonell (2017), table 3, where N(0, 1/√d) names the standard deviation.
    """

    length: float = 1.0
    seed: int = 0

    def fill(self, resized: Resized, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the changed tensors, outgoing weights zero."""
        if not self.length > 0:
            raise NotApplicable(
                f"cannot widen axis '{resized.axis}' with incoming weights of length "
                f"{self.length}: they would never learn; give a positive length"
            )
        tensors = ZeroOutgoing(self.seed).fill(resized, state)
        producers = resized.analysis.axes[resized.axis].producers
        places = [torch.from_numpy(resized.at(p.path, p.dim)[resized.new]) for p in producers]
        rows = [tensors[p.path].movedim(p.dim, 0) for p in producers]
        each = [at.shape[1] * row[0].numel() for at, row in zip(places, rows, strict=True)]
        for p, at, row in zip(producers, places, rows, strict=True):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{p}:{self.seed}".encode()))
            shape = (at.numel(), *row.shape[1:])
            drawn = torch.randn(shape, generator=generator, dtype=torch.double)
            row[at.reshape(-1).to(row.device)] = (drawn * self.length / sum(each) ** 0.5).to(row)
        return tensors
