"""Where to grow and with which weights: one paper, one file."""

from graphgrow.scores.amplitude import Amplified, amplify
from graphgrow.scores.departure import Departure
from graphgrow.scores.firefly import Firefly
from graphgrow.scores.fold import Fold
from graphgrow.scores.gradmax import GradMax
from graphgrow.scores.north import North, Orthogonality
from graphgrow.scores.proposal import Proposal
from graphgrow.scores.random import Random
from graphgrow.scores.splitting import Splitting
from graphgrow.scores.tiny import Tiny, bottleneck

__all__ = [
    "Amplified",
    "Departure",
    "Firefly",
    "Fold",
    "GradMax",
    "North",
    "Orthogonality",
    "Proposal",
    "Random",
    "Splitting",
    "Tiny",
    "amplify",
    "bottleneck",
]
