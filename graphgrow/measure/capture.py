"""Running a graph forward and backward while its contractions are watched.

Parameters take part as they are, but detached: no gradient of theirs is computed or written. What
is watched is what each weight reads, and the gradient of the loss at what it writes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from graphgrow.dispatch import Dispatch
from graphgrow.ir.assemble import assemble
from graphgrow.ir.graph import Graph
from graphgrow.ir.outcome import Kind
from graphgrow.ir.rows import RowInterpreter
from graphgrow.ir.rules import row_of
from graphgrow.measure.routes import Mix, Product

Attended = Mapping[Mix, list[Tensor]]
"""What each use of attention takes beside values."""
Desired = Callable[[Product, Mapping[Product, Tensor], Attended, Tensor], None]
"""Takes a use of a weight, what all uses read and attended, and its output's desired update."""


class Capture:
    """One graph in one mode, ready to be run over batches."""

    def __init__(self, graph: Graph, mode: str, watched: Collection[Product | Mix]) -> None:
        self.structure = graph.train if mode == "train" else graph.eval
        self.tree = assemble(graph.modules, graph.leaves, apart(graph.state))
        self.tree.train(mode == "train")
        self.devices = {t.device for t in graph.state.values() if t.device.type != "cpu"}
        self.calls: dict[str, list[tuple[Any, Product | Mix | None]]] = {}
        known = {id(one.step): one for one in watched}
        for step in graph.analysis.steps:
            if step.mode == mode and step.row.kind in _WATCHED:
                call = step.func.overloadpacket, known.get(id(step))
                self.calls.setdefault(step.node, []).append(call)

    def run(
        self,
        inputs: tuple[Any, ...],
        target: Any,
        loss: Callable[[Any, Any], Tensor],
        wanted: Collection[Product],
        desired: Desired,
        examples: int,
    ) -> float:
        """Return the loss of a batch; `desired` is called in the backward pass for `wanted`.

        The loss is a mean over examples; desired updates are those of their sum.
        """
        run = _Run(self, wanted, desired)
        with torch.random.fork_rng([d.index or 0 for d in self.devices]), torch.enable_grad():
            try:
                value = loss(run.run(*tree_map(_plain, inputs)), target)
                if run.anchors and value.requires_grad:
                    # a start of one, since for another torch loads sympy, which takes 50 MiB
                    falls = value.sum() * -examples
                    torch.autograd.grad(falls, run.anchors, allow_unused=True)
            finally:
                run.forget()
        return float(value.detach())


def apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without gradients, buffers copied, tied ones still one tensor."""
    made: dict[int, Tensor] = {}
    for tensor in state.values():
        if id(tensor) not in made:
            own = tensor.detach()
            made[id(tensor)] = (
                nn.Parameter(own, requires_grad=False)
                if isinstance(tensor, nn.Parameter)
                else own.clone()
            )
    return {path: made[id(tensor)] for path, tensor in state.items()}


_WATCHED = (Kind.CONTRACT, Kind.GATHER, Kind.ATTEND)


def _plain(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


class _Run(RowInterpreter):
    """One forward pass: knows which node runs and taps the outputs that gradients are wanted of."""

    def __init__(self, capture: Capture, wanted: Collection[Product], desired: Desired) -> None:
        super().__init__(capture.tree, graph=capture.structure)
        self.extra_traceback = False
        self.calls, self.desired = capture.calls, desired
        self.wanted = {product.step.node: product for product in wanted}
        self.read: dict[Product, Tensor] = {}
        self.attended: dict[Mix, list[Tensor]] = {}
        self.anchors: list[Tensor] = []
        self.hooks: list[Any] = []

    def run_node(self, n: fx.Node) -> Any:
        """Return the value of a node, its contractions watched."""
        expected = self.calls.get(n.name)
        # how recurrent layers multiply depends on the batch, and no route goes through them
        recurrent = n.op == "call_module" and isinstance(self.submodules[str(n.target)], nn.RNNBase)
        if expected is None or (recurrent and n.name not in self.wanted):
            return super().run_node(n)
        with _Watch(n.name, expected, self.read, self.attended) as watch:
            result = super().run_node(n)
        watch.finish()
        product = self.wanted.get(n.name)
        return result if product is None else self._tapped(product, result)

    def _tapped(self, product: Product, result: Tensor) -> Tensor:
        if not result.requires_grad:
            anchor = torch.zeros((), dtype=result.dtype, device=result.device, requires_grad=True)
            self.anchors.append(anchor)
            result = result + anchor

        def desired(found: Tensor) -> None:
            self.desired(product, self.read, self.attended, found.detach())

        self.hooks.append(result.register_hook(desired))
        return result

    def forget(self) -> None:
        """Let go of all tensors: hooks refer to this run and values of it to the hooks."""
        for hook in self.hooks:
            hook.remove()
        self.read.clear()
        self.attended.clear()
        self.anchors.clear()
        self.env.clear()


class _Watch(Dispatch):
    """Notes what the contractions of one node read, in the order that the analysis saw them."""

    def __init__(
        self,
        node: str,
        expected: list[Any],
        read: dict[Product, Tensor],
        attended: dict[Mix, list[Tensor]],
    ) -> None:
        super().__init__()
        self.node, self.expected, self.count = node, expected, 0
        self.read, self.attended = read, attended

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        row = row_of(func)
        if row is not None and row.kind in _WATCHED:
            self._note(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self.count >= len(self.expected) or self.expected[self.count][0] != func.overloadpacket:
            raise self._surprise(f"it calls '{func.overloadpacket}'")
        product = self.expected[self.count][1]
        self.count += 1
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if isinstance(product, Mix):
            del tensors[product.slot]
            if product.step.row.kind is Kind.ATTEND:  # a mask may be the same for all examples
                count = len(tensors[0])
                tensors = [t[(None,) * (4 - t.dim())].expand(count, -1, -1, -1) for t in tensors]
            self.attended[product] = [t.detach() for t in tensors]
        elif product is not None:
            others = [s for s, _ in product.step.contracted if s != product.slot]
            self.read[product] = tensors[1 if product.embeds else others[0]].detach()

    def finish(self) -> None:
        """Check that every contraction that the analysis saw was seen."""
        if self.count != len(self.expected):
            raise self._surprise(f"it makes {self.count} contractions of {len(self.expected)}")

    def _surprise(self, fact: str) -> RuntimeError:
        return RuntimeError(
            f"cannot measure '{self.node}': {fact} on this batch, unlike on the example inputs; "
            "trace with example inputs like the batches, and renew a graph that has grown"
        )
