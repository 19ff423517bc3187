"""Ways to look for the candidates with the largest score: by ascent, or by drawing from it.

A score is a function from candidates, `(k, d)`, to one number for each, `(k,)`, that autograd
follows. Candidates are in coordinates in which each is like a standard normal number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Score = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Ascent:
    """Gradient ascent on the logarithm of the score, each candidate with a step size of its own.

    Where a step does not raise the score it is not taken, and the step size of that candidate is
    divided by 3; where it does, it is multiplied by `faster`. The candidate with the largest score
    is chosen.

    Source: Mitchell et al. (2023), appendix C; the logarithm, which makes step sizes independent of
    the loss, and `faster` are ours: their steps do not become longer again.
    """

    steps: int = 300
    rate: float = 0.3
    faster: float = 1.5

    def run(self, score: Score, start: Tensor, generator: torch.Generator) -> Tensor:
        """Return the candidates after the last step."""
        here, rate = start, torch.full_like(start[:, :1], self.rate)
        value, slope = _slope(score, here)
        for _ in range(self.steps):
            there = here + rate * slope / value.clamp(min=_tiny(value))[:, None]
            value_there, slope_there = _slope(score, there)
            better = value_there > value
            here, slope = (torch.where(better[:, None], a, b)
                           for a, b in ((there, here), (slope_there, slope)))  # fmt: skip
            value = torch.where(better, value_there, value)
            rate = torch.where(better[:, None], rate * self.faster, rate / 3)
        return here

    def choose(self, values: Tensor, generator: torch.Generator) -> int:
        """Return the number of the candidate with the largest score."""
        return int(values.argmax())


@dataclass(frozen=True)
class Mala:
    """The Metropolis-adjusted Langevin algorithm: candidates are drawn with density
    exp(score / temperature) times that of standard normal numbers.

    Every `adapt` steps the step size is multiplied or divided by 3 where the share of accepted
    steps was more than 0.2 away from `accept`; with `adapt` 0 it stays. In the end one candidate is
    drawn with probabilities softmax(score / temperature), or with `best` the largest is taken.

    Source: Mitchell et al. (2023), appendix C; Girolami and Calderhead (2011). Their score is Δη′/η
    here. They give neither the scale of their temperature, 10, nor the tolerance of the share.
    """

    steps: int = 3000
    temperature: float = 0.1
    rate: float = 0.3
    accept: float = 0.6
    adapt: int = 10
    best: bool = False

    def run(self, score: Score, start: Tensor, generator: torch.Generator) -> Tensor:
        """Return the candidates after the last step."""
        here, rate, taken = start, self.rate, 0.0
        value, slope = self._density(score, here)
        for step in range(1, self.steps + 1):
            noise = torch.randn(here.shape, generator=generator, dtype=torch.double).to(here)
            there = here + rate * slope + (2 * rate) ** 0.5 * noise
            value_there, slope_there = self._density(score, there)
            back = (here - there - rate * slope_there).square().sum(1) / (4 * rate)
            forth = (there - here - rate * slope).square().sum(1) / (4 * rate)
            chance = (value_there - back - value + forth).clamp(max=0).exp()
            draw = torch.rand(chance.shape, generator=generator, dtype=torch.double).to(chance)
            accepted = draw < chance
            here, slope = (torch.where(accepted[:, None], a, b)
                           for a, b in ((there, here), (slope_there, slope)))  # fmt: skip
            value = torch.where(accepted, value_there, value)
            taken += float(accepted.double().mean())
            if self.adapt and step % self.adapt == 0:
                gap, taken = taken / self.adapt - self.accept, 0.0
                rate *= 1 if abs(gap) <= 0.2 else 3 if gap > 0 else 1 / 3
        return here

    def _density(self, score: Score, here: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithm of the density up to a constant, and its gradient."""
        value, slope = _slope(score, here)
        value = value / self.temperature - here.square().sum(1) / 2
        return value, slope / self.temperature - here

    def choose(self, values: Tensor, generator: torch.Generator) -> int:
        """Return the number of one candidate: drawn by its score, or the best."""
        if self.best:
            return int(values.argmax())
        chances = (values.double().cpu() / self.temperature).softmax(0)
        return int(torch.multinomial(chances, 1, generator=generator))


def _slope(score: Score, here: Tensor) -> tuple[Tensor, Tensor]:
    """Return the score of each candidate and its gradient."""
    leaf = here.detach().requires_grad_()
    with torch.enable_grad():
        values = score(leaf)
        (found,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), found


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny
