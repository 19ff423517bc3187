"""What a graph costs: parameters, and multiplications with additions for one example."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from graphgrow.ir.analyse import Step
from graphgrow.ir.graph import Graph
from graphgrow.ir.rules import Kind, aten

Widths = Mapping[str, int]


def parameters(graph: Graph, widths: Widths | None = None) -> int:
    """Return how many parameters a graph has, or would have with other widths; tied ones once."""
    analysis, total = graph.analysis, 0
    widths = widths or analysis.widths()
    for path in dict.fromkeys(analysis.tied.values()):
        if isinstance(graph.state[path], nn.Parameter):
            total += math.prod(layout.size(widths) for layout in analysis.state[path])
    return total


def flops(graph: Graph, widths: Widths | None = None) -> int:
    """Return the FLOPs of all contractions of the forward pass in eval mode, for one example.

    A multiplication with its addition is two. `widths` are other widths than the graph has.
    """
    widths = widths or graph.analysis.widths()
    steps = [s for s in graph.analysis.steps if s.mode == "eval" and s.row.kind is Kind.CONTRACT]
    examples = next((t.shape[0] for t in graph.example if getattr(t, "ndim", 0)), 1)
    return sum(_flops(graph, step, widths) for step in steps) // max(examples, 1)


def _flops(graph: Graph, step: Step, widths: Widths) -> int:
    def sizes(number: int) -> list[int]:
        return [layout.size(widths) for layout in graph.analysis.values[number]]

    if step.func.overloadpacket in (aten.convolution, aten._convolution):
        x, weight = sizes(step.inputs[0]), sizes(step.inputs[1])
        moved = x if step.args[6] else sizes(step.outputs[0])
        return 2 * math.prod(moved) * math.prod(weight[1:])
    slot, dim = next(iter(step.contracted), (0, 0))
    summed = sizes(step.inputs[slot])[dim] if step.contracted else 1
    return 2 * math.prod(sizes(step.outputs[0])) * summed
