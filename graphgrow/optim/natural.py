"""Natural gradient descent: by conjugate gradients, or layer by layer with Kronecker factors.

Source: Amari (1998); Martens (2010), Deep learning via Hessian-free optimization; Martens and
Grosse (2015), K-FAC; as used by Mitchell, Mundt, Kersting (2023), Self-Expanding Neural Networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from graphgrow.measure.patches import Window, channels, gram, patches, rows, summable

Closure = Callable[[], tuple[Tensor, Any]]
"""Returns the mean loss over a batch and the model's outputs, with the graph of both."""


class NaturalGradient(Optimizer):
    """Steps along (F + damping)⁻¹ g, found by conjugate gradients with Fisher-vector products.

    `step(closure)` wants a closure that returns the loss, a mean over the batch, and the outputs
    that it is of, with the batch in their first dim; it needs no `backward()`. F is the mean over
    examples of Jᵀ H J, J the derivative of an example's outputs: H is the identity with the
    "euclidean" `metric` of the paper, and with "loss" the Hessian of the example's loss with
    respect to outputs, which for cross-entropy makes F the Fisher matrix of the predicted classes.
    Conjugate gradients end after `iterations`, or where the residual is `tolerance` times the
    gradient. `weight_decay` shrinks parameters by `lr` times as much, apart from the gradient.
    `score` is then η = gᵀ(F + damping)⁻¹g of the last step; its learning rate is `radius`/√η at
    most, so that no step is longer than `radius` in the metric that it is natural in (the norm
    constraint of Ba, Grosse and Martens 2017). There is no state, so that the optimizer follows any
    rewrite.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        damping: float = 0.1,
        *,
        iterations: int = 100,
        tolerance: float = 1e-4,
        weight_decay: float = 0.0,
        metric: str = "euclidean",
        radius: float = math.inf,
    ) -> None:
        if metric not in ("euclidean", "loss"):
            raise ValueError(
                f"cannot make {type(self).__name__}: the metric is '{metric}'; give 'euclidean' "
                "or 'loss'"
            )
        settings = {"lr": lr, "damping": damping, "weight_decay": weight_decay}
        for name, value in (settings | {"radius": radius}).items():
            if not value >= 0 or (name in ("damping", "radius") and value == 0):
                raise ValueError(
                    f"cannot make {type(self).__name__}: {name} is {value}; give a positive number"
                )
        self.iterations, self.tolerance = iterations, tolerance
        self.metric, self.radius = metric, radius
        self.score = 0.0
        super().__init__(params, settings)

    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]
        """Take one step and return the loss before it."""
        with torch.enable_grad():
            loss, outputs = closure()
        params = [p for group in self.param_groups for p in group["params"]]
        gradient = [g.detach() for g in _grads(loss, params)]
        self._move(self._direction(loss, outputs, params, gradient), params, gradient)
        return loss.detach()

    def _direction(
        self, loss: Tensor, outputs: Any, params: list[Tensor], gradient: list[Tensor]
    ) -> list[Tensor]:
        fisher = Fisher(loss, outputs, params, self.metric)
        return conjugate(
            self._damped(fisher.times, params), gradient, self.iterations, self.tolerance
        )

    def _damped(
        self, times: Callable[[list[Tensor]], list[Tensor]], params: Sequence[Tensor]
    ) -> Callable[[list[Tensor]], list[Tensor]]:
        amount = {id(p): group["damping"] for group in self.param_groups for p in group["params"]}
        weights = [amount[id(p)] for p in params]

        def damped(v: list[Tensor]) -> list[Tensor]:
            return [f + w * x for f, w, x in zip(times(v), weights, v, strict=True)]

        return damped

    @torch.no_grad()
    def _move(self, step: list[Tensor], params: list[Tensor], gradient: list[Tensor]) -> None:
        self.score = float(_dot(step, gradient))
        longest = self.radius / math.sqrt(max(self.score, 1e-300))
        steps = {id(p): d for p, d in zip(params, step, strict=True)}
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(steps[id(p)], alpha=-min(group["lr"], longest))


class KroneckerGradient(NaturalGradient):
    """Steps along the natural gradient with the Kronecker approximation of F for each layer.

    Weights that are read by linear and convolution layers, with their biases, take the step
    A⁻¹ G S⁻¹ of their gradient G; A is the covariance of what the layer reads in this batch, S that
    of the derivatives of outputs, in a random direction for each example, with respect to what it
    writes. Both are damped by √damping, as much as their sizes ask for. All other parameters are
    one block, for which `iterations` conjugate gradients are taken.

    Source: Martens and Grosse (2015), sections 2 to 6.3, without running means, which would have to
    follow rewrites. Layers that are called several times or on several positions are taken for
    independent.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        damping: float = 0.1,
        *,
        iterations: int = 10,
        tolerance: float = 1e-2,
        weight_decay: float = 0.0,
        metric: str = "euclidean",
        radius: float = math.inf,
        seed: int = 0,
    ) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        super().__init__(
            params,
            lr,
            damping,
            iterations=iterations,
            tolerance=tolerance,
            weight_decay=weight_decay,
            metric=metric,
            radius=radius,
        )

    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]
        """Take one step and return the loss before it."""
        self._layers = _Layers(p for group in self.param_groups for p in group["params"])
        with self._layers:
            return super().step(closure)

    def _direction(
        self, loss: Tensor, outputs: Any, params: list[Tensor], gradient: list[Tensor]
    ) -> list[Tensor]:
        layers = list(self._layers.found.values())
        fisher = Fisher(loss, outputs, params, self.metric)
        wrote = [y for layer in layers for y in layer.wrote]
        slopes = iter(_grads(fisher.outputs, wrote, fisher.drawn(self._generator)))
        of = {id(p): g for p, g in zip(params, gradient, strict=True)}
        amount = {id(p): g["damping"] for g in self.param_groups for p in g["params"]}
        found: dict[int, Tensor] = {}
        for layer in layers:
            v = [next(slopes) * fisher.examples**0.5 for _ in layer.wrote]
            found |= layer.step(v, of, amount[id(layer.weight)], fisher.examples)
        rest = [p for p in params if id(p) not in found]
        if rest:
            fisher = Fisher(loss, outputs, rest, self.metric)
            left = [of[id(p)] for p in rest]
            times = self._damped(fisher.times, rest)
            block = conjugate(times, left, self.iterations, self.tolerance)
            found |= {id(p): d for p, d in zip(rest, block, strict=True)}
        return [found[id(p)] for p in params]


# ------------------------------------------------------------------------------ the Fisher matrix


class Fisher:
    """The matrix E[Jᵀ H J] of some parameters at a batch, as what it does to vectors."""

    def __init__(self, loss: Tensor, outputs: Any, params: Iterable[Tensor], metric: str) -> None:
        self.loss, self.params, self.metric = loss, list(params), metric
        found = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
        self.outputs, self.examples = found, len(found[0])
        self._transposed: tuple[list[Tensor], list[Tensor]] | None = None
        self._slopes: list[Tensor] | None = None

    def times(self, v: list[Tensor]) -> list[Tensor]:
        """Return the product with a vector."""
        return [t.detach() for t in _grads(self.outputs, self.params, self.bent(self.along(v)))]

    def along(self, v: list[Tensor]) -> list[Tensor]:
        """Return J v: how outputs change along a vector, by going backward twice."""
        if self._transposed is None:
            u = [torch.zeros_like(o, requires_grad=True) for o in self.outputs]
            self._transposed = _grads(self.outputs, self.params, u, create_graph=True), u
        transposed, u = self._transposed
        return _grads(transposed, u, v)

    def bent(self, change: list[Tensor]) -> list[Tensor]:
        """Return H times a change of outputs, divided by the number of examples."""
        if self.metric == "euclidean":
            return [c / self.examples for c in change]
        if self._slopes is None:
            self._slopes = _grads(self.loss, self.outputs, create_graph=True)
        return _grads(self._slopes, self.outputs, change)

    def drawn(self, generator: torch.Generator) -> list[Tensor]:
        """Return random changes of outputs whose covariance is H, over the root of the examples."""
        signs = [torch.randint(2, o.shape, generator=generator) * 2.0 - 1 for o in self.outputs]
        drawn = [s.to(o) / self.examples**0.5 for s, o in zip(signs, self.outputs, strict=True)]
        if self.metric == "euclidean":
            return drawn
        flat = torch.cat([d.reshape(self.examples, -1) for d in drawn], 1)
        values, vectors = torch.linalg.eigh(self._hessians(flat.shape[1]))
        root = (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.mT
        sizes = [o[0].numel() for o in self.outputs]
        parts = (root @ flat[:, :, None])[..., 0].split(sizes, 1)
        return [p.reshape(o.shape) for p, o in zip(parts, self.outputs, strict=True)]

    def _hessians(self, size: int) -> Tensor:
        """Return H of every example, `(n, outputs, outputs)`."""
        columns = []
        for k in range(size):
            one = torch.zeros(self.examples, size).to(self.outputs[0])
            one[:, k] = self.examples
            parts = one.split([o[0].numel() for o in self.outputs], 1)
            change = [p.reshape(o.shape) for p, o in zip(parts, self.outputs, strict=True)]
            found = [b.reshape(self.examples, -1) for b in self.bent(change)]
            columns.append(torch.cat(found, 1))
        return torch.stack(columns, 2).detach()


def conjugate(
    times: Callable[[list[Tensor]], list[Tensor]],
    right: list[Tensor],
    iterations: int,
    tolerance: float,
) -> list[Tensor]:
    """Return the solution of `times(x) = right` by conjugate gradients, started at zero.

    `times` is symmetric and positive definite. It ends where the residual's norm is `tolerance`
    times that of `right`.
    """
    x = [torch.zeros_like(b) for b in right]
    residual, along = [b.clone() for b in right], [b.clone() for b in right]
    size = _dot(residual, residual)
    least = tolerance**2 * size
    for _ in range(iterations):
        if not size > least:
            break
        moved = times(along)
        rate = size / _dot(along, moved)
        for entry, left, a, m in zip(x, residual, along, moved, strict=True):
            entry.add_(rate * a)
            left.sub_(rate * m)
        before, size = size, _dot(residual, residual)
        along = [r + size / before * a for r, a in zip(residual, along, strict=True)]
    return x


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def _grads(
    of: Any, at: list[Tensor], along: Any = None, create_graph: bool = False
) -> list[Tensor]:
    """Return gradients, zero where there is none, and keep the graph."""
    found = torch.autograd.grad(
        of, at, along, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, at, strict=True)]


# ------------------------------------------------------------------------------ Kronecker factors


@dataclass(eq=False)
class _Layer:
    """A weight that is multiplied, with all that its calls read and wrote."""

    weight: Tensor
    bias: Tensor | None
    window: Window | None
    read: list[Tensor] = field(default_factory=list)
    wrote: list[Tensor] = field(default_factory=list)

    def step(
        self, slopes: list[Tensor], gradient: Mapping[int, Tensor], damping: float, examples: int
    ) -> dict[int, Tensor]:
        """Return the steps of weight and bias by id, S from the slopes of what was written."""
        bias, kernel = self.bias is not None, tuple(self.weight.shape[2:])
        groups = self.window.groups if self.window else 1
        a = s = torch.zeros(())
        positions = 0
        for x, v in zip(self.read, slopes, strict=True):
            x = summable(x.detach())
            if self.window is None:
                found = rows(x.flatten(0, -2), examples, bias)
            else:
                found = patches(x, self.window, kernel, bias)
            v = channels(_flat(summable(v), self.window), groups, examples, self.window is not None)
            a, s = a + gram(found, found) / examples, s + gram(v, v) / examples
            positions += v[0, 0, 0].numel()
        whole = gradient[id(self.weight)].reshape(groups, -1, self.weight[0].numel()).mT
        if self.bias is not None:
            own = gradient[id(self.bias)].reshape(groups, 1, -1)
            whole = torch.cat([whole, own], 1)
        found = _solved(a, s / positions, whole, damping)
        steps = {id(self.weight): found[:, : self.weight[0].numel()].mT.reshape(self.weight.shape)}
        if self.bias is not None:
            steps[id(self.bias)] = found[:, -1].reshape(-1)
        return steps


def _flat(v: Tensor, window: Window | None) -> Tensor:
    return v if window is not None else v.flatten(0, -2)


def _solved(a: Tensor, s: Tensor, gradient: Tensor, damping: float) -> Tensor:
    """Return (A + π√λ)⁻¹ G (S + √λ/π)⁻¹, π² the ratio of the mean sizes of A and S."""
    sizes = [float(m.diagonal(dim1=1, dim2=2).mean()) for m in (a, s)]
    ratio = (sizes[0] / sizes[1]) ** 0.5 if min(sizes) > 0 else 1.0
    for matrix, amount in ((a, ratio * damping**0.5), (s, damping**0.5 / ratio)):
        matrix.diagonal(dim1=1, dim2=2).add_(amount)
    left = torch.cholesky_solve(gradient, _factor(a, "inputs"))
    return torch.cholesky_solve(left.mT, _factor(s, "outputs' slopes")).mT


def _factor(matrix: Tensor, of: str) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed.any():
        size = matrix.shape[-1]
        raise ValueError(
            f"cannot step KroneckerGradient: the damped covariance of a layer's {of} ({size} × "
            f"{size}) is not positive definite, so steps diverged or damping is lost in rounding; "
            "give a smaller lr, a radius or more damping"
        )
    return factor


class _Layers(TorchFunctionMode):
    """Notes the calls of linear and convolution functions with parameters as their weights."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__()
        self.params = {id(p) for p in params}
        self.found: dict[int, _Layer] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _ARGUMENTS and isinstance(out, Tensor) and out.requires_grad:
            self._note(name, dict(zip(_ARGUMENTS[name], args, strict=False)) | (kwargs or {}), out)
        return out

    def _note(self, name: str, given: dict[str, Any], out: Tensor) -> None:
        weight, bias = given["weight"], given.get("bias")
        if id(weight) not in self.params or (bias is not None and id(bias) not in self.params):
            return
        window = None
        if name != "linear":
            spatial = weight.dim() - 2
            sizes = [given.get(n, d) for n, d in (("stride", 1), ("padding", 0), ("dilation", 1))]
            if isinstance(sizes[1], str):
                return
            each = [tuple(s) if isinstance(s, (tuple, list)) else (s,) for s in sizes]
            each = [s * (spatial // len(s)) for s in each]
            window = Window(*each, groups=given.get("groups", 1))
        layer = self.found.setdefault(id(weight), _Layer(weight, bias, window))
        layer.read.append(given["input"])
        layer.wrote.append(out)


_SPACE = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_ARGUMENTS = {"linear": _SPACE[:3], "conv1d": _SPACE, "conv2d": _SPACE, "conv3d": _SPACE}
