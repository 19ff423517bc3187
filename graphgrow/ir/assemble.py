"""A fresh tree of modules from templates and tensors: same paths and keys, user code in leaves."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn

from graphgrow.nn import CapNorm, Rational


def assemble(
    modules: Mapping[str, nn.Module], leaves: frozenset[str], state: Mapping[str, Tensor]
) -> nn.Module:
    """Return a module tree with the paths of `modules` whose parameters and buffers are `state`.

    A path in `leaves` or below one becomes a shallow copy of its template: class, attributes and
    hooks stay. Every other path becomes a plain container. A template that occurs at several paths
    becomes one module at all of them, and a tensor that occurs at several paths stays tied.
    """
    kept = _kept(modules, leaves)
    built: dict[int, nn.Module] = {}
    tree: dict[str, nn.Module] = {}
    for path in sorted(modules, key=_depth):  # parents first; siblings in the order given
        template = modules[path]
        if id(template) not in built:
            built[id(template)] = shell(template, keep_class=id(template) in kept)
        tree[path] = built[id(template)]
        if path:
            owner, _, name = path.rpartition(".")
            tree[owner]._modules[name] = tree[path]
    for path, tensor in state.items():
        owner, _, name = path.rpartition(".")
        place(tree[owner], name, tensor)
    for key, module in built.items():
        if key in kept:
            redirect(module, {_Own(name): part for name, part in _parts(module)})
        else:
            _drop_missing(module)
    return tree[""]


def _kept(modules: Mapping[str, nn.Module], leaves: frozenset[str]) -> set[int]:
    """Return the templates, by id, that keep their class: at one of their paths suffices."""
    return {id(module) for path, module in modules.items() if not leaves.isdisjoint(_above(path))}


def _above(path: str) -> Iterator[str]:
    """Yield `path` and the paths of all modules that hold it, the root's "" last."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _depth(path: str) -> int:
    return path.count(".") + 1 if path else 0


def shell(template: nn.Module, *, keep_class: bool) -> nn.Module:
    """Return a copy of `template` without tensors and children: its own class, or a container.

    Where else it refers to them, in a list say, it has their names until `assemble` knows better.
    """
    if keep_class:
        made = object.__new__(type(template))
        made.__dict__.update({name: _unshared(value) for name, value in vars(template).items()})
        # a compiled call is bound to the template and would run its tensors
        made.__dict__.pop("_compiled_call_impl", None)
        names = {id(part): _Own(name) for name, part in _parts(template)}
        _redirect_attributes(made, {id(template): made, **names})
    else:
        made = nn.Module()
        made.training = template.training
    made._parameters = {name: None for name in template._parameters}
    made._buffers = {name: None for name in template._buffers}
    made._non_persistent_buffers_set = set(template._non_persistent_buffers_set)
    made._modules = {name: None for name in template._modules}
    return made


def _unshared(value: Any) -> Any:
    """Return `value`, copied one level deep where it is a table that could be written to."""
    if type(value) in (list, dict, OrderedDict, set):  # a module has a dozen, so without ado
        return value.copy()
    return copy.copy(value) if isinstance(value, (list, dict, set)) else value


def _drop_missing(container: nn.Module) -> None:
    """Take out the names whose modules are gone: only a leaf's own code could ask for them."""
    for name in [name for name, child in container._modules.items() if child is None]:
        del container._modules[name]


def place(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put `tensor` into `module` under `name`, as a parameter or as a buffer."""
    module.__dict__.pop(name, None)  # a plain attribute would hide it
    if isinstance(tensor, nn.Parameter):
        module._buffers.pop(name, None)
        module._non_persistent_buffers_set.discard(name)
        module._parameters[name] = tensor
        return
    if name in module._parameters:
        del module._parameters[name]
    elif name not in module._buffers:
        module._non_persistent_buffers_set.add(name)
    module._buffers[name] = tensor


def redirect(module: nn.Module, fresh: _Fresh) -> None:
    """Let attributes of `module` that refer to an object of `fresh`, by id, refer to its value.

    Layers keep such references beside their tables: a list of flat weights, a hook bound to them.
    """
    _redirect_attributes(module, fresh)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()  # holds weak references, too


@dataclass(frozen=True)
class _Own:
    """Stands in a shell for the parameter, buffer or child of its own that has this name."""

    name: str


_Fresh = Mapping[Any, Any]  # by id, or by _Own


def _parts(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for table in (module._parameters, module._buffers, module._modules):
        yield from ((name, part) for name, part in table.items() if part is not None)


def _redirect_attributes(module: nn.Module, fresh: _Fresh) -> None:
    for name, value in vars(module).items():
        if name not in ("_parameters", "_buffers", "_modules"):
            module.__dict__[name] = _moved(value, fresh)


def _moved(value: Any, fresh: _Fresh) -> Any:
    """Return `value` with what it refers to replaced, or `value` itself if nothing is."""
    if value is None or isinstance(value, (bool, int, float, str)):  # most are, so first
        return value
    if isinstance(value, _Own):
        return fresh.get(value, value)
    if id(value) in fresh:
        return fresh[id(value)]
    if isinstance(value, MethodType) and id(value.__self__) in fresh:
        return MethodType(value.__func__, fresh[id(value.__self__)])
    if isinstance(value, (list, tuple, dict)) and not value:
        return value
    if type(value) is list or type(value) is tuple:
        items = [_moved(item, fresh) for item in value]
        return value if _same(items, value) else type(value)(items)
    if isinstance(value, dict):
        items = {key: _moved(item, fresh) for key, item in value.items()}
        return value if _same(items.values(), value.values()) else _updated(value, items)
    return value


def _same(new: Iterable[Any], old: Iterable[Any]) -> bool:
    return all(a is b for a, b in zip(new, old, strict=True))


def _updated(table: dict[Any, Any], items: dict[Any, Any]) -> dict[Any, Any]:
    made = copy.copy(table)
    made.update(items)
    return made


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield path and tensor of every parameter and buffer, tied ones at each of their paths."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def twin(tensor: Tensor, values: Tensor) -> Tensor:
    """Return `values` as what `tensor` is: a parameter that needs gradients or not, or a buffer."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(values, requires_grad=tensor.requires_grad)
    return values.detach()


def is_torch_leaf(module: nn.Module) -> bool:
    """Return whether `module` is one of torch's own layers or ours, or a subclass of one."""
    return isinstance(module, _LEAVES)


def _torch_layers() -> tuple[type[nn.Module], ...]:
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
    composed = (
        nn.MultiheadAttention,
        nn.Transformer,
        nn.TransformerEncoder,
        nn.TransformerDecoder,
        nn.TransformerEncoderLayer,
        nn.TransformerDecoderLayer,
    )
    found = (getattr(nn, name) for name in dir(nn))
    return tuple(
        layer
        for layer in found
        if isinstance(layer, type)
        and issubclass(layer, nn.Module)
        and layer is not nn.Module
        and not issubclass(layer, (*containers, *composed))
    )


_LEAVES = (*_torch_layers(), Rational, CapNorm)
