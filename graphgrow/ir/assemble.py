"""A fresh tree of modules from templates and tensors: same paths, same keys, no user code but leaves."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

from torch import Tensor, nn


def assemble(
    modules: Mapping[str, nn.Module], leaves: frozenset[str], state: Mapping[str, Tensor]
) -> nn.Module:
    """Return a module tree with the paths of `modules` whose parameters and buffers are `state`.

    A path in `leaves` becomes a shallow copy of its template: class, attributes and hooks stay.
    Every other path becomes a plain container. A template that occurs at several paths becomes one
    module at all of them, and a tensor that occurs at several paths stays tied.
    """
    built: dict[int, nn.Module] = {}
    tree: dict[str, nn.Module] = {}
    for path in sorted(modules, key=lambda p: (p.count(".") if p else -1, p)):
        template = modules[path]
        if id(template) not in built:
            built[id(template)] = shell(template, keep_class=path in leaves)
        tree[path] = built[id(template)]
        if path:
            owner, _, name = path.rpartition(".")
            tree[owner]._modules[name] = tree[path]
    for path, tensor in state.items():
        owner, _, name = path.rpartition(".")
        place(tree[owner], name, tensor)
    return tree[""]


def shell(template: nn.Module, *, keep_class: bool) -> nn.Module:
    """Return a copy of `template` without tensors and children: its own class, or a container."""
    if keep_class:
        made = template.__class__.__new__(template.__class__)
        made.__dict__.update(template.__dict__)
        for table in _TABLES_OF_HOOKS:
            if table in made.__dict__:
                made.__dict__[table] = copy.copy(made.__dict__[table])
    else:
        made = nn.Module()
        made.training = template.training
    made._parameters = {name: None for name in template._parameters}
    made._buffers = {name: None for name in template._buffers}
    made._non_persistent_buffers_set = set(template._non_persistent_buffers_set)
    made._modules = {name: None for name in template._modules}
    return made


_TABLES_OF_HOOKS = tuple(name for name in nn.Module().__dict__ if name.endswith("_hooks"))


def place(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put `tensor` into `module` under `name`, as a parameter or as a buffer."""
    if isinstance(tensor, nn.Parameter):
        module._buffers.pop(name, None)
        module._parameters[name] = tensor
    else:
        if name not in module._buffers:
            module._non_persistent_buffers_set.add(name)
        module._buffers[name] = tensor


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
    """Return whether `module` is one of torch's own layers, or a user's subclass of one."""
    return isinstance(module, _LEAVES)


def _torch_layers() -> tuple[type[nn.Module], ...]:
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
    composed = (
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


_LEAVES = _torch_layers()
