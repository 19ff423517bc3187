"""What a graph costs: parameters, multiplications with additions for one example, time."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import torch
from torch import nn

from graphgrow.ir.analyse import Step
from graphgrow.ir.graph import Graph
from graphgrow.ir.lower import lower
from graphgrow.ir.outcome import Kind, aten

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


def latency(graph: Graph, repeats: int = 20) -> float:
    """Return the seconds that a forward pass of the example inputs takes in eval mode.

    It is the shortest of `repeats` runs after a first one, which others on the machine disturb
    least.
    """
    model, times = lower(graph).eval(), []
    for _ in range(repeats + 1):
        _wait(graph)
        start = time.perf_counter()
        with torch.no_grad():
            model(*graph.example)
        _wait(graph)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _wait(graph: Graph) -> None:
    """Wait until an accelerator that holds the graph has done its work."""
    if any(tensor.is_cuda for tensor in graph.state.values()):
        torch.cuda.synchronize()
