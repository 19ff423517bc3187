"""Where to grow and with which weights: one paper, one file."""

from graphgrow.scores.amplitude import Amplified, advance, amplify
from graphgrow.scores.departure import Departure
from graphgrow.scores.firefly import Firefly
from graphgrow.scores.fold import Fold
from graphgrow.scores.gradmax import GradMax
from graphgrow.scores.north import North, Orthogonality
from graphgrow.scores.proposal import Proposal
from graphgrow.scores.random import Random
from graphgrow.scores.search import Ascent, Mala
from graphgrow.scores.senn import Senn
from graphgrow.scores.splitting import Splitting
from graphgrow.scores.tangent import Reach, output_bottleneck
from graphgrow.scores.tiny import Tiny, best_step, bottleneck

__all__ = [
    "Amplified",
    "Ascent",
    "Departure",
    "Firefly",
    "Fold",
    "GradMax",
    "Mala",
    "North",
    "Orthogonality",
    "Proposal",
    "Random",
    "Reach",
    "Senn",
    "Splitting",
    "Tiny",
    "advance",
    "amplify",
    "best_step",
    "bottleneck",
    "output_bottleneck",
]
