"""graphgrow: grow a PyTorch model in the middle of training, with the same outputs."""

from graphgrow import scores
from graphgrow.errors import NotApplicable, NotEquivalent, UnsupportedOp
from graphgrow.grow import Grower
from graphgrow.io import load, save
from graphgrow.ir.analyse import Axis
from graphgrow.ir.graph import Graph
from graphgrow.ir.lower import lower
from graphgrow.ir.trace import trace
from graphgrow.moments import moments
from graphgrow.nonparametric import Progress, Protocol, Snapshot, Turnover, turn_over, zero_units
from graphgrow.optim.adarad import AdaRad, AdaRadM
from graphgrow.optim.clocks import resume
from graphgrow.optim.fans import Fans, fan_ins, fan_outs
from graphgrow.optim.migrate import migrate
from graphgrow.optim.natural import KroneckerGradient, NaturalGradient
from graphgrow.optim.penalties import penalty, shrink
from graphgrow.passes.apply import apply
from graphgrow.passes.branch import Branch
from graphgrow.passes.branch_layers import Residual, Skip, TransformerBlock
from graphgrow.passes.candidates import candidates
from graphgrow.passes.cap import Cap
from graphgrow.passes.deepen import Deepen
from graphgrow.passes.fold import Fold
from graphgrow.passes.fresh import UnitLength
from graphgrow.passes.identity import Identity
from graphgrow.passes.layers import Factor, Split
from graphgrow.passes.merge import Merge
from graphgrow.passes.remove import Absorb, Remove
from graphgrow.passes.rewrite import Grown
from graphgrow.passes.weights import Copy, Given, MeanFill, Pairs, ZeroIncoming, ZeroOutgoing
from graphgrow.passes.widen import Widen
from graphgrow.verify import compare
from graphgrow.version import __version__
from graphgrow.when import Bottleneck, Every, Plateau
from graphgrow.where import Budget, Doubling, Quota, Where

__all__ = [
    "Absorb",
    "AdaRad",
    "AdaRadM",
    "Axis",
    "Bottleneck",
    "Branch",
    "Budget",
    "Cap",
    "Copy",
    "Deepen",
    "Doubling",
    "Every",
    "Factor",
    "Fans",
    "Fold",
    "Given",
    "Graph",
    "Grower",
    "Grown",
    "Identity",
    "KroneckerGradient",
    "MeanFill",
    "Merge",
    "NaturalGradient",
    "NotApplicable",
    "NotEquivalent",
    "Pairs",
    "Plateau",
    "Progress",
    "Protocol",
    "Quota",
    "Remove",
    "Residual",
    "Skip",
    "Snapshot",
    "Split",
    "TransformerBlock",
    "Turnover",
    "UnitLength",
    "UnsupportedOp",
    "Where",
    "Widen",
    "ZeroIncoming",
    "ZeroOutgoing",
    "__version__",
    "apply",
    "candidates",
    "compare",
    "fan_ins",
    "fan_outs",
    "load",
    "lower",
    "migrate",
    "moments",
    "penalty",
    "resume",
    "save",
    "scores",
    "shrink",
    "trace",
    "turn_over",
    "zero_units",
]
