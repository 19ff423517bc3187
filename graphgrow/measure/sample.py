"""One batch as layers see it: what they read, what the loss wants there, how outputs depend on it.

Scores that try out activations which are not there yet need the examples themselves, and not only
sums over them. A sample keeps what the weights that matter read, and the gradients at what they
write.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from graphgrow.errors import NotApplicable
from graphgrow.ir.graph import Graph
from graphgrow.measure.capture import Capture
from graphgrow.measure.patches import channels, chunks, gram, patches, rows, summable
from graphgrow.measure.routes import Product, products
from graphgrow.moments import Loss

PROBES = 32  # outputs of an example up to which each one is followed back


@dataclass(frozen=True, eq=False)
class Reader:
    """A weight with what its uses read and the gradient of each example's loss at their output.

    For each of g groups, with `b` entries read for a position (a last one of ones where there is a
    bias) and `o` outputs, means over examples of sums over positions: `inputs` `(g, b, b)` is the
    covariance of what is read (A), `cross` `(g, b, o)` its moment with the gradient, which is the
    gradient of the weight. `metric` `(g, o, o)` is the mean over examples and positions of the sum
    over outputs y of ∂y/∂z (∂y/∂z)ᵀ, z what the layer writes (S). By use, `reads` are the tensors
    read, as they come, and `gradients` are `(g, o, n, *positions)`.
    """

    path: str
    inputs: Tensor
    cross: Tensor
    metric: Tensor
    reads: Mapping[Product, Tensor]
    gradients: Mapping[Product, Tensor]


@dataclass(frozen=True, eq=False)
class Sample:
    """The readers of a batch by their weight's path, and what the batch says on the whole.

    `limit` is the mean over examples of the squared norm of the gradient at the model's outputs: no
    change of parameters can make the loss fall faster, for one unit of natural-gradient learning
    rate.
    """

    graph: Graph
    examples: int
    loss: float
    limit: float
    readers: Mapping[str, Reader]

    def pieces(self, use: Product, *tensors: Tensor) -> Iterator[list[Tensor]]:
        """Yield, a few examples at a time, what a use reads, then tensors given by example.

        What is read is `(g, b, n, *positions)`; tensors have the examples in their first dim.
        """
        weight, x = self.graph.state[use.weight], self.readers[use.weight].reads[use]
        kernel, bias = tuple(weight.shape[2:]), use.bias is not None
        size = x.numel() * math.prod(kernel)
        for examples, (part, *rest) in chunks([x, *tensors], self.examples, size):
            part = summable(part)
            if use.window is None:
                yield [rows(part, examples, bias), *rest]
            else:
                yield [patches(part, use.window, kernel, bias), *rest]


def uses_of(graph: Graph, weights: Collection[str]) -> list[Product]:
    """Return the uses of some weights in eval mode."""
    return [p for p in products(graph.analysis, "eval").values() if p.weight in weights]


def reading(graph: Graph, axis: str) -> list[Product]:
    """Return the uses of weights that read an axis in eval mode, in the order of the steps.

    Raises:
        NotApplicable: where something else than a linear or convolution layer reads it.
    """
    known = products(graph.analysis, "eval")
    found: list[Product] = []
    for index, step in enumerate(graph.analysis.steps):
        if step.mode == "eval" and any(axis in over for over in step.contracted.values()):
            product = known.get(index)
            if product is None or product.embeds:
                raise NotApplicable(
                    f"cannot sample axis '{axis}': {step.where} reads it with something else than "
                    "a plain weight"
                )
            found.append(product)
    if not found:
        raise NotApplicable(f"cannot sample axis '{axis}': no layer reads it")
    return found


def sample(
    graph: Graph,
    batch: tuple[Any, Any],
    loss: Loss,
    uses: Collection[Product],
    probes: int = PROBES,
) -> Sample:
    """Return what uses of weights read of one batch in eval mode, with gradients of its losses.

    `batch` is `(inputs, target)` and `loss` a mean over the batch, as in `moments`. Outputs that
    the loss does not depend on do not count. Where an example has more than `probes` outputs,
    `metric` is a mean over so many random combinations of them with signs, drawn from a fixed seed,
    which has the right expectation.
    """
    inputs, target = batch
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    uses = list(dict.fromkeys(uses))
    run = _Sampling(Capture(graph, "eval", uses), given, uses)
    value = run.gradients(target, loss)
    run.metrics(target, probes)
    readers = {path: run.reader(path) for path in dict.fromkeys(use.weight for use in uses)}
    bare = Sample(graph, run.examples, value, run.limit, readers)
    return replace(bare, readers={path: _summed(bare, r) for path, r in readers.items()})


def _summed(found: Sample, reader: Reader) -> Reader:
    """Return a reader with its covariance and cross moment."""
    inputs = cross = 0.0
    for use, gradient in reader.gradients.items():
        for present, piece in found.pieces(use, gradient.movedim(2, 0)):
            x = present.flatten(2)
            inputs = inputs + (x @ x.mT).double()
            cross = cross + (x @ piece.movedim(0, 2).flatten(2).mT).double()
    return replace(reader, inputs=inputs / found.examples, cross=cross / found.examples)


class _Sampling:
    """The passes over one batch."""

    def __init__(self, capture: Capture, given: tuple[Any, ...], uses: list[Product]) -> None:
        self.capture, self.given, self.uses = capture, given, uses
        self.examples, self.limit = len(given[0]), 0.0
        self.reads: dict[Product, Tensor] = {}
        self.slopes: dict[Product, Tensor] = {}
        self.metric: dict[Product, Tensor] = {}
        self.live: list[bool] = []

    def gradients(self, target: Any, loss: Loss) -> float:
        """Run forward and backward and keep what is read and wanted; return the loss."""

        def kept(output: Any, target: Any) -> Tensor:
            # a copy: the gradient at outputs themselves would call what watches the last layer
            leaves = {id(t): t.detach().requires_grad_() for t in _outputs(output)}
            found = loss(tree_map(lambda t: leaves.get(id(t), t), output), target)
            grads = torch.autograd.grad(found, list(leaves.values()), allow_unused=True)
            self.live = [g is not None for g in grads]
            squares = [g.double().square().sum() for g in grads if g is not None]
            self.limit = float(sum(squares)) * self.examples
            return loss(output, target)

        def note(use: Product, read: Mapping[Product, Tensor], _: Any, desired: Tensor) -> None:
            self.reads[use] = read[use]
            self.slopes[use] = self._by_group(use, desired)

        return self.capture.run(self.given, target, kept, self.uses, note, self.examples)

    def metrics(self, target: Any, probes: int) -> None:
        """Run backward from outputs, one by one or from random sums of them with signs."""
        generator, number, count = torch.Generator().manual_seed(0), 0, 1

        def probe(output: Any, target: Any) -> Tensor:
            nonlocal count
            leaves = [t for t, live in zip(_outputs(output), self.live, strict=True) if live]
            flat = torch.cat([t.reshape(self.examples, -1) for t in leaves], 1)
            count = min(flat.shape[1], probes)
            if count == flat.shape[1]:
                return flat[:, number].sum() / self.examples
            signs = torch.randint(2, flat.shape, generator=generator) * 2.0 - 1
            return (flat * signs.to(flat)).sum() / (self.examples * probes**0.5)

        def note(use: Product, read: Mapping[Product, Tensor], _: Any, desired: Tensor) -> None:
            v = self._by_group(use, desired)
            found = gram(v, v).double() / self.examples
            self.metric[use] = self.metric.get(use, torch.zeros_like(found)) + found

        while number < count:
            self.capture.run(self.given, target, probe, self.uses, note, self.examples)
            number += 1

    def _by_group(self, use: Product, desired: Tensor) -> Tensor:
        """Return the gradient of each example's own loss: `(g, o, n, *positions)`."""
        groups = use.window.groups if use.window else 1
        v = -summable(desired)
        return channels(v, groups, self.examples, use.window is not None).contiguous()

    def reader(self, path: str) -> Reader:
        """Return what was found of a weight, its uses together, without sums over examples."""
        reads = {u: self.reads[u] for u in self.uses if u.weight == path and u in self.reads}
        slopes = {use: self.slopes[use] for use in reads}
        positions = sum(v[0, 0, 0].numel() for v in slopes.values())
        none = torch.empty(0)
        metric = sum((self.metric[use] for use in reads), none.new_zeros(())) / positions
        return Reader(path, none, none, metric, reads, slopes)


def _outputs(output: Any) -> list[Tensor]:
    """Return the tensors of a model's output that depend on what it computes."""
    found = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    return list({id(t): t for t in found}.values())
