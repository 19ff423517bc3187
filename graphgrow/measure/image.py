"""A tensor over space, with the forms of it that sums of products are taken of."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(eq=False)
class Image:
    """What a layer reads or wants, `(n, groups · channels, *space)`, without space for rows.

    Each form is made once, however many products it takes part in.
    """

    values: Tensor
    groups: int = 1
    _spread: Tensor | None = None
    _totals: Tensor | None = None
    _spectra: dict[tuple[tuple[int, ...], ...], Tensor] = field(default_factory=dict)

    @property
    def examples(self) -> int:
        """The number of examples."""
        return self.values.shape[0]

    @property
    def channels(self) -> int:
        """The number of channels in one group."""
        return self.values.shape[1] // self.groups

    @property
    def space(self) -> tuple[int, ...]:
        """The sizes of the spatial dims."""
        return tuple(self.values.shape[2:])

    def rows(self, places: tuple[slice, ...] = ()) -> Tensor:
        """Return what is at some places, or at all: `(groups, channels, places · examples)`."""
        if self._spread is None:
            n, c, *space = self.values.shape
            flat = self.values.reshape(n * c, -1)
            turned = flat.t().contiguous() if space else flat
            self._spread = turned.view(*space, n, c)
        chosen = self._spread[places]
        return chosen.reshape(-1, self.groups, self.channels).permute(1, 2, 0)

    def totals(self) -> Tensor:
        """Return the sums over all places and examples, `(groups, channels)`."""
        if self._totals is None:
            self._totals = self.rows().sum(2)
        return self._totals

    def spectrum(
        self, phase: tuple[int, ...], steps: tuple[int, ...], lengths: tuple[int, ...]
    ) -> Tensor:
        """Return the Fourier transform of every `steps`-th place from `phase` on.

        It is zero-padded to `lengths`: `(frequencies, groups, n, channels)`, half of those of the
        last dim.
        """
        key = phase, steps, lengths
        if key not in self._spectra:
            at = tuple(slice(p, None, s) for p, s in zip(phase, steps, strict=True))
            dims = tuple(range(2, 2 + len(lengths)))
            found = torch.fft.rfftn(self.values[(..., *at)], lengths, dims)
            n, c = found.shape[:2]
            turned = found.reshape(n * c, -1).t().contiguous()  # (frequencies, n·c)
            split = turned.view(len(turned), self.examples, self.groups, self.channels)
            self._spectra[key] = split.transpose(1, 2)
        return self._spectra[key]
