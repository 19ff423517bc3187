"""Folding: layers that add nothing of their own go, with what only they needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from graphgrow.errors import NotApplicable
from graphgrow.ir.analyse import Slot
from graphgrow.ir.assemble import shell, twin
from graphgrow.ir.graph import Graph
from graphgrow.passes.identity import is_activation
from graphgrow.passes.place import first_input, is_layer
from graphgrow.passes.prove import Proof, rounding
from graphgrow.passes.ranges import Box, domain, ranges
from graphgrow.passes.rewrite import Edit, Rewrite, TensorOrigin

_SUMS = ("add", "iadd", "add_", "__add__")
_QUIET = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.ReLU, nn.GELU)


@dataclass(frozen=True)
class Fold(Rewrite):
    """Take the module at a path out of the graph, where what it does can be done without.

    A layer of zeros goes together with the branch that it ends; an identity layer, a dropout that
    drops nothing, an idempotent activation that is repeated, and a ReLU or other clipping that
    changes nothing, for all inputs or for those with entries in the `box` `(least, largest)`, go
    alone; a linear layer or 1×1
    convolution without an activation before it is multiplied into the layer that it reads; a batch
    norm is folded into the layer before it, which is exact in eval mode alone.

    Parameters that are gone leave an optimizer with `gg.migrate`. `how` is filled by `apply`, for
    the journal: which of these it was.
    """

    at: str
    box: Box | None = None
    how: str | None = field(default=None, repr=False)

    @staticmethod
    def places(graph: Graph) -> list[str]:
        """Return the paths of the modules that are called once in each mode."""
        return [path for path in sorted(graph.leaves) if len(_calls(graph, path)) == 2]

    def edit(self, graph: Graph) -> Edit:
        """Return the edit of `graph`. Raises NotApplicable with the obstacle's sentence."""
        if self.at not in graph.leaves or len(calls := _calls(graph, self.at)) != 2:
            raise NotApplicable(
                f"cannot fold '{self.at}': it is no module that is called once in each mode; give "
                "one that Fold.places lists"
            )
        place = _Place(graph, self.at, graph.modules[self.at], calls, box=self.box)
        if (tensor := place.read_elsewhere()) is not None:
            place.refuse(f"'{tensor}' is read outside of it too, where it would be missing")
        tried = ((how, rule(place)) for how, rule in _RULES.items())
        how, found = next(((h, f) for h, f in tried if f is not None), ("", None))
        if found is None:
            place.refuse(
                f"this {type(place.module).__name__} is neither zero, nor the identity, nor linear "
                "behind a linear layer"
            )
        grown = _without(place, found)
        inexact = rounding([path for path in found.tensors if path in graph.state], graph.state)
        exact = found.modes == ("train", "eval")
        clips = how == "clip"
        box, where = (self.box, domain(self.box)) if clips else (None, "all finite values")
        proof = Proof(str(self), exact, found.modes, where, (found.line,), inexact, box=box)
        done = replace(self, how=how)
        return Edit(replace(grown, journal=(*graph.journal, done)), proof, found.origin(graph))


def refold(graph: Graph, rewrite: Fold) -> Graph:
    """Return what a fold of a journal makes of the structure, whatever the numbers are.

    Raises NotApplicable where there is no such module, or one that cannot go so.
    """
    calls = _calls(graph, rewrite.at)
    place = _Place(graph, rewrite.at, graph.modules.get(rewrite.at), calls, trusted=True)
    found = _RULES[rewrite.how or ""](place) if len(calls) == 2 and rewrite.how in _RULES else None
    if found is None:
        place.refuse(f"there is nothing like what the journal has ('{rewrite.how}')")
    return replace(_without(place, found), journal=(*graph.journal, rewrite))


@dataclass(frozen=True, eq=False)
class _Place:
    """A module that may go, and its call in each mode; a `trusted` one has the right numbers."""

    graph: Graph
    path: str
    module: Any
    calls: Mapping[str, fx.Node]
    trusted: bool = False
    box: Box | None = None

    def refuse(self, fact: str) -> NoReturn:
        """Raise that the module cannot be folded, with the fact."""
        raise NotApplicable(f"cannot fold '{self.path}': {fact}")

    def tensor(self, name: str) -> Tensor | None:
        """Return a tensor of the module by its own name, None where it has none."""
        found = self.graph.state.get(f"{self.path}.{name}")
        return None if found is None else found.detach()

    def before(self) -> _Place | None:
        """Return the place of the layer that this module alone reads, None where there is none."""
        found = {mode: first_input(node) for mode, node in self.calls.items()}
        paths = {
            str(n.target) for n in found.values() if n.op == "call_module" and len(n.users) == 1
        }
        if len(paths) != 1 or len(calls := _calls(self.graph, path := paths.pop())) != 2:
            return None
        layer = _Place(self.graph, path, self.graph.modules[path], calls)
        return layer if layer.read_elsewhere() is None else None

    def read_elsewhere(self) -> str | None:
        """Return a tensor of the module that is read by other means than its call, if one is."""
        paths = [path for path in self.graph.state if path.startswith(f"{self.path}.")]
        read = [n for s in (self.graph.train, self.graph.eval) for n in s.nodes]
        found = {str(node.target) for node in read if node.op == "get_attr"}
        tied = self.graph.analysis.tied
        others = {tied[path] for path in self.graph.state if path not in paths or path in found}
        return next((path for path in paths if tied[path] in others), None)


@dataclass(frozen=True, eq=False)
class _Folded:
    """What goes: nodes by what stands in for them, by mode; and new values of what stays."""

    instead: Mapping[str, Mapping[fx.Node, fx.Node]]
    line: str
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    modes: tuple[str, ...] = ("train", "eval")

    def origin(self, graph: Graph) -> dict[str, TensorOrigin]:
        """Return the origins of the layers that changed: none of their entries is an old one."""
        old = {path: graph.state[path] for path in self.tensors if path in graph.state}
        new = {path: torch.full((self.tensors[path].shape[0],), -1) for path in old}
        return {p: TensorOrigin((new[p], *(None,) * (t.dim() - 1))) for p, t in old.items()}


# ------------------------------------------------------------------------------ what may go


def _zero(place: _Place) -> _Folded | None:
    """A layer of zeros whose readers add it to something else, and the branch that it ends."""
    values = [place.tensor(name) for name in ("weight", "bias")]
    layer = is_layer(place.module) or isinstance(place.module, _BatchNorm)
    zero = place.trusted or not any(v is not None and v.any() for v in values)
    if not layer or values[0] is None or not zero:
        return None
    instead = {}
    for mode, node in place.calls.items():
        found = _added_to(place, mode, node)
        if found is None:
            return None
        instead[mode] = found
    return _Folded(instead, f"'{place.path}' is zero, and so is what it adds")


def _added_to(place: _Place, mode: str, node: fx.Node) -> dict[fx.Node, fx.Node] | None:
    """Return the sums that read a zero, with their other summands; None if anything else does."""
    found: dict[fx.Node, fx.Node] = {}
    for user in node.users:
        called = user.target if isinstance(user.target, str) else user.target.__name__
        if user.op == "call_module" and isinstance(place.graph.modules[called], _QUIET):
            inner = _added_to(place, mode, user)
            if inner is None:
                return None
            found.update(inner)
            continue
        others = [a for a in user.args if a is not node]
        summed = called in _SUMS and len(user.args) == 2 and len(others) == 1 and not user.kwargs
        if not summed or not isinstance(others[0], fx.Node):
            return None
        if _layouts(place.graph, mode, others[0]) != _layouts(place.graph, mode, user):
            return None
        found[user] = others[0]
    return found or None


def _identity(place: _Place) -> _Folded | None:
    """A layer that gives what it reads, or an idempotent activation behind its like."""
    if not (place.trusted or _is_identity(place) or _is_repeated(place)):
        return None
    instead = {mode: {node: first_input(node)} for mode, node in place.calls.items()}
    return _Folded(instead, f"'{place.path}' gives what it reads")


def _unclipped(place: _Place) -> _Folded | None:
    """A ReLU or other clipping of numbers that are all within what it leaves alone."""
    if not place.trusted:
        if not isinstance(place.module, nn.ReLU | nn.Hardtanh):  # a ReLU6 is a hardtanh
            return None
        bounds = ranges(place.graph, place.box)
        if not all(bounds.is_identity(mode, node.name) for mode, node in place.calls.items()):
            return None
    instead = {mode: {node: first_input(node)} for mode, node in place.calls.items()}
    return _Folded(instead, f"'{place.path}' clips nothing")


def _is_identity(place: _Place) -> bool:
    module: Any = place.module
    weight, bias = place.tensor("weight"), place.tensor("bias")
    if isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0):
        return True
    if not is_layer(module) or isinstance(module, _ConvTransposeNd) or weight is None:
        return False
    if bias is not None and bias.any():
        return False
    if isinstance(module, nn.Linear):
        return weight.shape[0] == weight.shape[1] and torch.equal(
            weight, torch.eye(len(weight)).to(weight)
        )
    return _is_dirac(module, weight)


def _is_dirac(module: Any, weight: Tensor) -> bool:
    """Return whether a convolution gives each place what it reads there."""
    kept = module.in_channels == module.out_channels and set(module.stride) == {1}
    same = all(
        d * (k - 1) == 2 * p if isinstance(p, int) else False
        for k, d, p in zip(module.kernel_size, module.dilation, module.padding, strict=False)
    )
    if not kept or not same or any(k % 2 == 0 for k in module.kernel_size):
        return False
    return torch.equal(weight, nn.init.dirac_(torch.empty_like(weight), module.groups))


def _is_repeated(place: _Place) -> bool:
    if not is_activation(place.module):
        return False
    read = [first_input(node) for node in place.calls.values()]
    modules = [place.graph.modules[str(n.target)] for n in read if n.op == "call_module"]
    same = [
        type(m) is type(place.module) and _settings(m) == _settings(place.module) for m in modules
    ]
    return len(same) == len(read) and all(same)


def _settings(module: nn.Module) -> str:
    """Return the settings of an activation, in words: all but whether it works in place."""
    return ", ".join(p for p in module.extra_repr().split(", ") if not p.startswith("inplace"))


def _product(place: _Place) -> _Folded | None:
    """A linear layer or 1×1 convolution that is multiplied into the layer that it reads."""
    before = place.before() if _is_pointwise(place.module) else None
    if before is None or not _is_plain(before) or type(before.module) is not type(place.module):
        return None
    weight, outer = before.tensor("weight"), place.tensor("weight")
    assert weight is not None and outer is not None
    matrix = outer.double().flatten(1)
    tensors = {"weight": torch.tensordot(matrix, weight.double(), dims=1)}
    inner_bias, bias = before.tensor("bias"), place.tensor("bias")
    if inner_bias is not None or bias is not None:
        moved = 0.0 if inner_bias is None else matrix @ inner_bias.double()
        tensors["bias"] = moved + (0.0 if bias is None else bias.double())
    width = "out_features" if isinstance(place.module, nn.Linear) else "out_channels"
    return _into(
        place,
        before,
        tensors,
        {width: len(matrix)},
        f"'{place.path}' is multiplied into '{before.path}'",
    )


def _is_pointwise(module: nn.Module) -> bool:
    if not is_layer(module) or isinstance(module, _ConvTransposeNd):
        return False
    if isinstance(module, nn.Linear):
        return True
    assert isinstance(module, _ConvNd)
    ones = {*module.kernel_size, *module.stride, module.groups}
    return ones == {1} and not any(module.padding if not isinstance(module.padding, str) else ())


def _is_plain(place: _Place) -> bool:
    """Return whether a layer's tensors are its own and may be changed."""
    module, state = place.module, place.graph.state
    if not is_layer(module) or isinstance(module, _ConvTransposeNd):
        return False
    own = [state.get(f"{place.path}.{name}") for name in ("weight", "bias")]
    paths = [p for p, t in state.items() if any(t is mine for mine in own if mine is not None)]
    hooked = (
        hasattr(module, "parametrizations") or module._forward_pre_hooks or module._forward_hooks
    )
    single = getattr(module, "groups", 1) == 1
    return not hooked and single and all(p.rpartition(".")[0] == place.path for p in paths)


def _normed(place: _Place) -> _Folded | None:
    """A batch norm that is folded into the layer that it reads, for eval mode."""
    module = place.module
    before = place.before() if isinstance(module, _BatchNorm) else None
    mean, var = place.tensor("running_mean"), place.tensor("running_var")
    if before is None or not _is_plain(before) or mean is None or var is None:
        return None
    weight, inner = before.tensor("weight"), before.tensor("bias")
    scale, shift = place.tensor("weight"), place.tensor("bias")
    assert weight is not None
    factor = (var.double() + module.eps).rsqrt() * (1.0 if scale is None else scale.double())
    centred = (0.0 if inner is None else inner.double()) - mean.double()
    rows = factor.reshape(-1, *[1] * (weight.dim() - 1))
    tensors = {
        "weight": weight.double() * rows,
        "bias": centred * factor + (0.0 if shift is None else shift.double()),
    }
    line = f"[eval] '{place.path}' is folded into '{before.path}'; in train mode it would normalise"
    return replace(_into(place, before, tensors, {}, line), modes=("eval",))


def _into(
    place: _Place,
    before: _Place,
    tensors: Mapping[str, Tensor],
    attributes: Mapping[str, Any],
    line: str,
) -> _Folded:
    like = before.graph.state[f"{before.path}.weight"]
    typed = {f"{before.path}.{n}": t.to(like.dtype).contiguous() for n, t in tensors.items()}
    instead = {mode: {node: first_input(node)} for mode, node in place.calls.items()}
    return _Folded(instead, line, typed, {before.path: attributes})


_RULES: dict[str, Callable[[_Place], _Folded | None]] = {
    "zero": _zero,
    "identity": _identity,
    "clip": _unclipped,
    "product": _product,
    "norm": _normed,
}


# ------------------------------------------------------------------------------ the new graph


def _calls(graph: Graph, path: str) -> dict[str, fx.Node]:
    """Return the call of a module in each mode in which it is called just once."""
    module, found = graph.modules.get(path), {}
    for mode, structure in (("train", graph.train), ("eval", graph.eval)):
        calls = [n for n in structure.nodes if n.op == "call_module"]
        calls = [n for n in calls if graph.modules[str(n.target)] is module]
        if len(calls) == 1:
            found[mode] = calls[0]
    return found


def _layouts(graph: Graph, mode: str, node: fx.Node) -> Any:
    value = graph.analysis.nodes.get((mode, node.name))
    return graph.analysis.values[value.number] if isinstance(value, Slot) else None


def _without(place: _Place, found: _Folded) -> Graph:
    """Return the graph without the nodes that go, and without what only they needed."""
    graph = place.graph
    train = _pruned(graph.train, found.instead["train"])
    same = graph.eval is graph.train
    eval_ = train if same else _pruned(graph.eval, found.instead["eval"])
    gone = _used(graph.train, graph.eval) - _used(train, eval_)
    owners = {path for path in gone if path in graph.modules}
    inside = tuple(f"{path}." for path in owners)

    def stays(path: str) -> bool:
        return path not in gone and not path.startswith(inside)

    modules = {path: m for path, m in graph.modules.items() if stays(path)}
    state = {path: tensor for path, tensor in graph.state.items() if stays(path)}
    for path, tensor in found.tensors.items():
        like = graph.state[f"{path.rpartition('.')[0]}.weight"]
        state[path] = twin(graph.state.get(path, like), tensor.to(like.device))
    for path, told in found.attributes.items():
        fresh = shell(graph.modules[path], keep_class=True)
        fresh.__dict__.update(told)
        modules = {p: fresh if m is graph.modules[path] else m for p, m in modules.items()}
    leaves = graph.leaves - owners
    return replace(graph, train=train, eval=eval_, modules=modules, leaves=leaves, state=state)


def _used(*structures: fx.Graph) -> set[str]:
    called = [n for s in structures for n in s.nodes if n.op in ("call_module", "get_attr")]
    return {str(node.target) for node in called}


def _pruned(structure: fx.Graph, instead: Mapping[fx.Node, fx.Node]) -> fx.Graph:
    """Return a copy of a structure with nodes replaced, and what they alone needed taken out."""
    made, copies = fx.Graph(), {}
    made.output(made.graph_copy(structure, copies))
    loose = []
    for node, other in instead.items():
        copies[node].replace_all_uses_with(copies[other])
        loose.append(copies[node])
    while loose:
        node = loose.pop()
        name = node.target if isinstance(node.target, str) else node.target.__name__
        writes = node.op == "call_method" and name.endswith("_") and not name.endswith("__")
        if node.users or node.op in ("placeholder", "output") or writes or name == "__setitem__":
            continue
        needed = node.all_input_nodes
        made.erase_node(node)
        loose.extend(needed)
    return made
