"""A graph on tensors of its own: run, differentiated and changed without touching the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from graphgrow.ir.analyse import without_kernels
from graphgrow.ir.assemble import assemble
from graphgrow.ir.graph import Graph
from graphgrow.ir.lower import lower

Batches = Iterable[tuple[Any, Any]]


class Replica:
    """A graph in eval mode and double precision; `tensors` are its own, by path.

    Gradients flow to the tensors at `paths`; those of one tensor at several paths are one. The
    other tensors take part as they are.
    """

    def __init__(self, graph: Graph, paths: Collection[str] = ()) -> None:
        free = {id(graph.state[path]) for path in paths}
        made: dict[int, Tensor] = {}
        for tensor in graph.state.values():
            if id(tensor) not in made:
                made[id(tensor)] = _own(tensor, id(tensor) in free)
        self.tensors = {path: made[id(tensor)] for path, tensor in graph.state.items()}
        alone = replace(graph, train=graph.eval, state=self.tensors)
        self.model = lower(alone).eval()
        self.graph = graph

    def output(self, inputs: Any) -> Any:
        """Return the output for a batch; several inputs are a tuple."""
        with _twice_differentiable():
            return self.model(*_given(inputs))

    def values(self, inputs: Any, nodes: Collection[str]) -> dict[str, Any]:
        """Return the values of some nodes by name."""
        graph = self.graph
        tree = assemble(graph.modules, graph.leaves, self.tensors).eval()
        run = _Run(tree, graph.eval, nodes)
        with _twice_differentiable():
            run.run(*_given(inputs))
        return run.seen

    def loss(self, batches: Batches, loss: Callable[[Any, Any], Tensor]) -> Tensor:
        """Return the mean of a loss over the examples of batches, ready to be differentiated."""
        total, count = torch.zeros((), dtype=torch.double), 0
        for inputs, target in batches:
            examples = size(inputs)
            total = total + loss(self.output(inputs), tree_map(doubled, target)) * examples
            count += examples
        return total / max(count, 1)


def _twice_differentiable() -> AbstractContextManager[Any]:
    """Let attention and recurrent layers run as operators whose gradients have gradients."""
    stack = ExitStack()
    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    stack.enter_context(without_kernels())
    return stack


class _Run(fx.Interpreter):
    """One pass, values of the nodes that are asked for kept."""

    def __init__(self, tree: nn.Module, structure: fx.Graph, nodes: Collection[str]) -> None:
        super().__init__(tree, graph=structure)
        self.extra_traceback = False
        self.wanted, self.seen = frozenset(nodes), {}

    def run_node(self, n: fx.Node) -> Any:
        """Return the value of a node."""
        value = super().run_node(n)
        if n.name in self.wanted:
            self.seen[n.name] = value
        return value


def _own(tensor: Tensor, free: bool) -> Tensor:
    """Return a copy in double precision, a leaf that gets gradients where it is free."""
    values = doubled(tensor.detach())
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(values.clone() if free else values, requires_grad=free)
    return values.clone()


def _given(inputs: Any) -> tuple[Any, ...]:
    return tree_map(_apart, inputs if isinstance(inputs, tuple) else (inputs,))


def _apart(value: Any) -> Any:
    """Return a copy in double precision, which operators in place may change."""
    return doubled(value).clone() if isinstance(value, Tensor) else value


def doubled(value: Any) -> Any:
    """Return a tensor of real numbers in double precision, anything else as it is."""
    real = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if real else value


def size(inputs: Any) -> int:
    """Return the number of examples of a batch's inputs."""
    return len(inputs[0] if isinstance(inputs, tuple) else inputs)
