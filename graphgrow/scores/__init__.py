"""Where to grow and with which weights: one paper, one file."""

from graphgrow.scores.amplitude import Amplified, amplify
from graphgrow.scores.departure import Departure
from graphgrow.scores.fold import Fold
from graphgrow.scores.gradmax import GradMax
from graphgrow.scores.proposal import Proposal
from graphgrow.scores.random import Random
from graphgrow.scores.tiny import Tiny, bottleneck

__all__ = [
    "Amplified",
    "Departure",
    "Fold",
    "GradMax",
    "Proposal",
    "Random",
    "Tiny",
    "amplify",
    "bottleneck",
]
