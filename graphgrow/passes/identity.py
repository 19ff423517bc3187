"""The identity after an idempotent activation: a layer of ones, then the same activation again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map_only

from graphgrow.ir.analyse import Slot
from graphgrow.ir.assemble import assemble
from graphgrow.ir.graph import Graph
from graphgrow.passes.place import (
    CONVOLUTIONS,
    Insertion,
    Part,
    Place,
    first_input,
    is_layer,
    width,
)

# s(s(x)) = s(x). With what keeps a value where s leaves it: moving and selecting entries for all,
# averaging and scaling up for those that leave every value from zero on.
_IDEMPOTENT = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
_IDEMPOTENT_CALLS = frozenset(
    "relu relu6 hardtanh abs absolute clamp clip clamp_min clamp_max".split()
)
_POSITIVE = (nn.ReLU,)
_POSITIVE_CALLS = frozenset({"relu", "abs", "absolute"})
_MOVES = (
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
_MOVING_CALLS = frozenset(
    "flatten reshape view permute transpose contiguous squeeze unsqueeze max_pool1d max_pool2d "
    "max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d".split()
)
_MEANS = (
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.Dropout, nn.Dropout1d, nn.Dropout2d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.Dropout3d),
)
_MEAN_CALLS = frozenset(
    "mean avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d dropout "
    "adaptive_avg_pool3d dropout1d dropout2d dropout3d".split()
)
_OTHERS = tuple(
    getattr(nn, name)
    for name in "CELU ELU GELU GLU Hardshrink Hardsigmoid Hardswish LeakyReLU LogSigmoid Mish "
    "PReLU RReLU SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink Threshold".split()
)


def is_activation(module: nn.Module) -> bool:
    """Return whether a module is an activation after which the identity can be inserted."""
    return type(module) in _IDEMPOTENT


@dataclass(frozen=True)
class Identity:
    """A layer of ones and zeros after an idempotent activation, then that activation.

    Behind ReLU, ReLU6, Hardtanh, abs or clamp, or where only reshapes and poolings stand between;
    the activation may be a module or a function. At a layer, the new one reads what that layer
    read: a linear layer, or a convolution of an odd `kernel` size, stride 1, in `groups`. After an
    activation, it is of the kind that the values have the shape for.

    With `norm`, a batch norm stands before the activation, its weight and bias those that undo it:
    exact in eval mode. In train mode it uses each batch's own statistics; it starts from those of
    the example inputs, the one batch for which nothing changes.
    """

    kernel: int = 3
    groups: int = 1
    norm: bool = False

    def insertion(self, place: Place) -> Insertion:
        """Return the layer and the activation; before a layer, after an activation."""
        values, activation = _sources(place)
        channels, spatial = _extent(place, values)
        like, after = _like(place, values), is_activation(place.module)
        kernel = self._kernel(place, channels, spatial).to(like.dtype)
        tensors = {"weight": kernel}
        if not self.norm:
            tensors["bias"] = torch.zeros(channels, dtype=torch.double)
        layer = _layer(kernel, self.groups, bias=not self.norm)
        parts = (Part("out" if after else "in", layer, tensors),)
        again = _again(place, activation)
        lines = (f"{_name(place.graph, activation)} leaves what it gave as it is",)
        if not self.norm:
            return Insertion((*parts, again), like, after, lines=lines)
        return Insertion(
            (*parts, _norm(place, values, channels, spatial), again),
            like,
            after,
            modes=("eval",),
            lines=(*lines, "[eval] '{norm}' undoes itself; in train mode it normalises each batch"),
            rounding=100 * torch.finfo(like.dtype).eps,
        )

    def _kernel(self, place: Place, channels: int, spatial: int) -> Tensor:
        """Return the weight of the layer: every channel's own entry one, at the kernel's centre."""
        if self.kernel < 1 or self.kernel % 2 == 0:
            place.refuse(f"a kernel of size {self.kernel} has no centre; give an odd one")
        if self.groups < 1 or channels % self.groups or (self.groups > 1 and not spatial):
            place.refuse(
                f"{channels} units do not make a layer in {self.groups} groups; "
                "give a divisor, and for a linear layer 1"
            )
        width = channels // self.groups
        kernel = torch.zeros(self.groups, width, width, *(self.kernel,) * spatial)
        centre = (slice(None), slice(None), slice(None), *(self.kernel // 2,) * spatial)
        kernel[centre] = torch.eye(width)
        return kernel.flatten(0, 1)


# ------------------------------------------------------------------------------ what is read


def _sources(place: Place) -> tuple[list[tuple[str, fx.Node]], fx.Node]:
    """Return the values that the new layer reads, one for each call, and their activation."""
    if isinstance(place.module, _OTHERS):
        place.refuse(
            f"{place.kind} is not idempotent, so it would change what it gave before; "
            "give the path of the layer that reads it, with Split() or Factor()"
        )
    if is_activation(place.module):
        return list(place.calls), place.calls[0][1]
    if not is_layer(place.module):
        place.refuse(
            f"{place.kind} is neither a linear nor a convolution layer nor an idempotent "
            "activation; give the path of one"
        )
    values = [(mode, first_input(node)) for mode, node in place.calls]
    found = [_activation(place, value) for _, value in values]
    if len({_key(place.graph, node) for node in found}) > 1:
        names = " and ".join(sorted({_name(place.graph, node) for node in found}))
        place.refuse(f"its calls read what different activations give, {names}; use Factor()")
    return values, found[0]


def _activation(place: Place, value: fx.Node) -> fx.Node:
    """Return the idempotent activation that gave a value, entries moved or averaged since."""
    node, averaged = value, False
    while not _is(place.graph, node, _IDEMPOTENT, _IDEMPOTENT_CALLS):
        averages = _is(place.graph, node, _MEANS, _MEAN_CALLS)
        if not averages and not _is(place.graph, node, _MOVES, _MOVING_CALLS):
            break
        node, averaged = first_input(node), averaged or averages
    else:
        positive = _is(place.graph, node, _POSITIVE, _POSITIVE_CALLS)
        if (positive or not averaged) and len(node.all_input_nodes) == 1:
            return node
    place.refuse(
        f"its input comes from {_name(place.graph, node)}, which is not an idempotent activation; "
        "use Factor() or Split()"
    )


def _is(graph: Graph, node: fx.Node, kinds: tuple[Any, ...], calls: frozenset[str]) -> bool:
    if node.op == "call_module":
        return type(graph.modules[str(node.target)]) in kinds
    return node.op in ("call_function", "call_method") and _called(node) in calls


def _called(node: fx.Node) -> str:
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    return name.strip("_")


def _key(graph: Graph, node: fx.Node) -> str:
    """Return what tells one activation from another, as text."""
    if node.op == "call_module":
        return repr(graph.modules[str(node.target)])
    return f"{node.target}{node.args[1:]}{node.kwargs}"


def _name(graph: Graph, node: fx.Node) -> str:
    if node.op == "call_module":
        return f"{type(graph.modules[str(node.target)]).__name__} '{node.target}'"
    return f"'{node.name}'"


def _extent(place: Place, values: list[tuple[str, fx.Node]]) -> tuple[int, int]:
    """Return how many units the new layer has, and over how many dims it is to convolve."""
    module = place.module
    if is_layer(module):
        return width(module), len(getattr(module, "kernel_size", ()))
    found = {_shape(place, mode, node) for mode, node in values}
    if len(found) > 1:
        place.refuse(
            f"its calls give values of different shapes, (units, dims of space) {sorted(found)}; "
            "give the path of a layer that reads one of them"
        )
    return found.pop()


def _shape(place: Place, mode: str, node: fx.Node) -> tuple[int, int]:
    """Return channels and number of spatial dims of a value, told by the dim that has an axis."""
    analysis = place.graph.analysis
    slot = analysis.nodes[mode, node.name]
    layouts = [*analysis.values[slot.number]] if isinstance(slot, Slot) else []
    dims = [d for d, layout in enumerate(layouts) if any(True for _ in layout.axes())]
    last = len(layouts) - 1
    if dims == [last] and last >= 1:
        return layouts[last].size(analysis.widths()), 0
    if dims == [1] and last - 1 in CONVOLUTIONS:
        return layouts[1].size(analysis.widths()), last - 1
    shape = ", ".join(map(str, layouts))
    place.refuse(
        f"its values, [{shape}], are neither features in the last dim nor channels in dim 1; "
        "give the path of the layer that reads them"
    )


def _like(place: Place, values: list[tuple[str, fx.Node]]) -> Tensor:
    """Return the weight whose type and device the new tensors get: the nearest one."""
    state = place.graph.state
    if is_layer(place.module):
        return next(t for path, t in state.items() if path.startswith(f"{place.path}."))
    for node in _upstream(values[0][1]):
        for path, tensor in state.items():
            owner = path.rpartition(".")[0]
            here = node.target in ((owner,) if node.op == "call_module" else (path,))
            if here and isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                return tensor
    place.refuse(
        "no weight stands before it, whose type a new layer could have; "
        "give the path of the layer that reads it"
    )


def _upstream(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes that a value is computed from, the nearest first."""
    left, seen = [node], {node}
    while left:
        node = left.pop(0)
        yield node
        left += [source for source in node.all_input_nodes if source not in seen]
        seen.update(node.all_input_nodes)


# ------------------------------------------------------------------------------ what is inserted


def _layer(weight: Tensor, groups: int, *, bias: bool) -> nn.Linear | _ConvNd:
    """Return a layer without values for a weight: it keeps the shape of what it reads."""
    like: dict[str, Any] = {"device": "meta", "dtype": weight.dtype}
    channels, spatial = weight.shape[0], weight.dim() - 2
    if not spatial:
        return nn.Linear(channels, channels, bias, **like)
    size = weight.shape[2]
    kind = CONVOLUTIONS[spatial]
    return kind(channels, channels, size, padding=size // 2, groups=groups, bias=bias, **like)


def _again(place: Place, activation: fx.Node) -> Part:
    """Return the part that calls an activation once more: a module of its own, without hooks."""
    if activation.op != "call_module":
        return Part("act", call=activation)
    module: Any = place.graph.modules[str(activation.target)]
    if type(module) is nn.Hardtanh:
        return Part("act", nn.Hardtanh(module.min_val, module.max_val, module.inplace))
    return Part("act", type(module)(module.inplace))


_NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def _norm(place: Place, values: list[tuple[str, fx.Node]], channels: int, spatial: int) -> Part:
    """Return a batch norm with the statistics of the values on the example inputs, undone."""
    mode, _ = values[0]
    found = _on_examples(place, mode, [node for m, node in values if m == mode])
    if any(value.dim() != spatial + 2 for value in found):
        place.refuse(
            f"batch norm needs values of {spatial + 2} dims, (batch, units, ...); give norm=False"
        )
    entries = torch.cat([value.double().movedim(1, 0).flatten(1) for value in found], 1).cpu()
    if entries.shape[1] < 2:
        place.refuse("batch norm needs more than one value of each unit; trace with a larger batch")
    norm = _NORMS[spatial](channels, device="meta")
    mean, variance = entries.mean(1), entries.var(1, correction=0)
    tensors = {
        "weight": (variance + norm.eps).sqrt(),
        "bias": mean,
        "running_mean": mean.clone(),
        "running_var": variance,
        "num_batches_tracked": torch.tensor(0),
    }
    return Part("norm", norm, tensors)


def _on_examples(place: Place, mode: str, nodes: list[fx.Node]) -> list[Tensor]:
    """Return the values of nodes on the example inputs, computed in train mode."""
    graph = place.graph
    copied = {
        path: tensor if isinstance(tensor, nn.Parameter) else tensor.detach().clone()
        for path, tensor in graph.state.items()
    }
    tree = assemble(graph.modules, graph.leaves, copied).train()
    structure = graph.train if mode == "train" else graph.eval
    run = _Run(tree, structure, {node.name for node in nodes})
    with torch.no_grad(), torch.random.fork_rng():
        run.run(*tree_map_only(Tensor, torch.clone, graph.example))
    return run.found


class _Run(fx.Interpreter):
    """Runs a structure and keeps the values of some nodes."""

    def __init__(self, tree: nn.Module, structure: fx.Graph, names: set[str]) -> None:
        super().__init__(tree, graph=structure)
        self.names, self.found = names, []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.found.append(value.clone())
        return value
