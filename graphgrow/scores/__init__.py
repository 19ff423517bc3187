"""Where to grow and with which weights: one paper, one file."""

from graphgrow.scores.amplitude import Amplified, amplify
from graphgrow.scores.gradmax import GradMax
from graphgrow.scores.proposal import Proposal
from graphgrow.scores.random import Random
from graphgrow.scores.search import Ascent, Mala
from graphgrow.scores.senn import Senn
from graphgrow.scores.tiny import Tiny, bottleneck

__all__ = [
    "Amplified",
    "Ascent",
    "GradMax",
    "Mala",
    "Proposal",
    "Random",
    "Senn",
    "Tiny",
    "amplify",
    "bottleneck",
]
