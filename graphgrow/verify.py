"""The check: two models run on the same inputs, in both modes, and the largest difference."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from graphgrow.dispatch import Dispatch
from graphgrow.draws import Mean
from graphgrow.errors import NotEquivalent
from graphgrow.ir.analyse import tensors_given, written_arguments
from graphgrow.ir.graph import Graph
from graphgrow.ir.lower import lower


@dataclass(frozen=True)
class ModeDifference:
    """The largest difference in one mode, and the output that has the largest relative one."""

    absolute: float
    relative: float
    output: str

    def __str__(self) -> str:
        """Return both figures and the place on one line."""
        return f"{self.absolute:.1e} absolute, {self.relative:.1e} relative at '{self.output}'"


@dataclass(frozen=True)
class Difference:
    """How far the outputs of two models are apart, at most, over all outputs and both modes.

    `relative` is measured against the largest entry of each output of the first model.
    """

    absolute: float
    relative: float
    train: ModeDifference
    eval: ModeDifference

    def __str__(self) -> str:
        """Return the figures, one line for each mode."""
        return f"train: {self.train}\neval:  {self.eval}"


def compare(
    before: nn.Module | Graph,
    after: nn.Module | Graph,
    *inputs: Any,
    double: bool = True,
    **kwargs: Any,
) -> Difference:
    """Return how far the outputs of `after` are from those of `before` on the given inputs.

    Copies run, in float64 with their inputs unless `double` is off, also where their code casts to
    less (norms of transformers' models do); the models, their tensors,
    modes and gradients, and the states of the random number generators stay as they are. Random
    numbers are replaced by their mean, because what dropout draws depends on the widths: dropout
    and stochastic depth keep everything, uniform numbers are a half, normal ones zero. What has no
    mean (multinomial) is drawn from the same seed for both.

    Raises NotEquivalent where outputs differ in structure, shape, dtype or in what is no number.
    """
    modes = {
        training: _largest(
            _outputs(before, training, double, inputs, kwargs),
            _outputs(after, training, double, inputs, kwargs),
        )
        for training in (True, False)
    }
    absolute = max(mode.absolute for mode in modes.values())
    relative = max(mode.relative for mode in modes.values())
    return Difference(absolute, relative, train=modes[True], eval=modes[False])


# --------------------------------------------------------------------------- running a copy


def _outputs(
    model: nn.Module | Graph, training: bool, double: bool, inputs: tuple, kwargs: dict
) -> Any:
    """Return what a copy of `model` makes of a copy of the inputs in the given mode.

    The copy has the model's own parameters where these need no cast; if its code asks to write to
    one, which hardly any does, it runs again on copies of them all.
    """
    for parameters in (_parameters(model, double), {}):
        kept = _Kept(parameters.values())
        try:
            outputs = _ran(_copied(model, parameters), training, double, inputs, kwargs, kept)
        except Exception as error:
            if kept.asked_for:
                continue
            error.add_note(
                f"while comparing: {_class(model)} in {'train' if training else 'eval'} mode"
                + (", in float64 (double=False runs it as it is)" if double else "")
            )
            raise
        if not kept.asked_for:
            return outputs
    raise AssertionError("a run on copies alone asks for nothing")


def _ran(
    module: nn.Module, training: bool, double: bool, inputs: tuple, kwargs: dict, kept: _Kept
) -> Any:
    """Return what `module` itself makes of a copy of the inputs, random numbers being means."""
    module.train(training)
    args, named = tree_map_only(Tensor, lambda t: t.detach().clone(), (inputs, kwargs))
    if double:
        args, named = tree_map_only(Tensor, _doubled, (args, named))
        _double(module)
    with _same_random_numbers(module), torch.no_grad(), kept, Mean(), _precision(double):
        return module(*args, **named)


def _class(model: nn.Module | Graph) -> str:
    return type(model.modules[""] if isinstance(model, Graph) else model).__name__


def _parameters(model: nn.Module | Graph, double: bool) -> dict[int, nn.Parameter]:
    """Return for the id of each plain parameter another one of the same numbers, cast if asked."""
    tensors = model.state.values() if isinstance(model, Graph) else model.parameters()
    plain = [t for t in tensors if type(t) is nn.Parameter and t.layout is torch.strided]
    numbers = [_doubled(tensor.data) if double else tensor.data for tensor in plain]
    return {
        id(tensor): nn.Parameter(number, tensor.requires_grad)
        for tensor, number in zip(plain, numbers, strict=True)
    }


def _copied(model: nn.Module | Graph, parameters: dict[int, nn.Parameter]) -> nn.Module:
    """Return a copy of a model with these parameters, or of a graph's tensors in its lowering."""
    memo: dict[int, Any] = {**parameters}
    if not isinstance(model, Graph):
        return copy.deepcopy(model, memo)
    return lower(replace(model, state=copy.deepcopy(dict(model.state), memo)))


class _Kept(Dispatch):
    """Within it, no operator writes to the given tensors; it is asked for, if one would."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.storages = {_storage(tensor) for tensor in tensors} - {None}
        self.asked_for = False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return what `func` returns, if it keeps the tensors as they are."""
        named = {**(kwargs or {})}
        if any(_storage(t) in self.storages for t in tensors_given(_at_risk(func), args, named)):
            self.asked_for = True
            raise RuntimeError(f"'{func}' would write to a parameter")
        return func(*args, **named)


@cache
def _at_risk(func: Any) -> tuple[tuple[int, str], ...]:
    """Return the arguments that an operator may write to: norms do not say it of statistics."""
    names = [argument.name for argument in func._schema.arguments]
    unsaid = [n for n in ("running_mean", "running_var") if n in names]
    return (*written_arguments(func), *((names.index(n), n) for n in unsaid))


def _storage(tensor: Tensor) -> int | None:
    """Return what tells whether two tensors share memory, None where there is none to share."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None


def _precision(double: bool) -> AbstractContextManager[Any]:
    return _Double() if double else nullcontext()


_DOUBLE = {
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64),
    torch.complex64: torch.complex128,
}


class _Double(Dispatch):
    """Within it, what code asks for in lower precision, or in none, is in double precision."""

    def __enter__(self) -> _Double:
        self._usual = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        torch.set_default_dtype(self._usual)
        super().__exit__(*raised)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if func.overloadpacket is not torch.ops.aten.view:  # reads the same bits as others
            args = tuple(map(self._wider, args))
            named = {name: self._wider(value) for name, value in named.items()}
        return func(*args, **named)

    def _wider(self, value: Any) -> Any:
        return _DOUBLE.get(value, value) if isinstance(value, torch.dtype) else value


def _doubled(tensor: Tensor) -> Tensor:
    """Return `tensor` in double precision if it holds real or complex numbers."""
    if tensor.is_floating_point():
        return tensor.double()
    return tensor.to(torch.complex128) if tensor.is_complex() else tensor


def _double(module: nn.Module) -> None:
    """Cast every tensor of `module`, keeping tensors that are shared shared."""
    cast: dict[int, tuple[Tensor, Tensor]] = {}  # with the key's tensor, so that its id stays taken

    def shared(tensor: Tensor) -> Tensor:
        if id(tensor) not in cast:
            cast[id(tensor)] = (tensor, _doubled(tensor))
        return cast[id(tensor)][1]

    module._apply(shared)
    for part in module.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, Tensor):
                vars(part)[name] = shared(value)


@contextmanager
def _same_random_numbers(module: nn.Module) -> Iterator[None]:
    """Seed every generator for the time of the block and restore all of them after it."""
    tensors = (*module.parameters(), *module.buffers())
    devices = {t.device for t in tensors if t.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    python, arrays = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng([d.index or 0 for d in devices], device_type=kind):
            torch.manual_seed(0)
            random.seed(0)
            numpy.random.seed(0)
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)


# --------------------------------------------------------------------------- comparing outputs


def _largest(before: Any, after: Any) -> ModeDifference:
    """Return the largest differences of two outputs, leaf by leaf."""
    first, second = dict(_leaves(before, "output")), dict(_leaves(after, "output"))
    for path in (*first, *second):
        if path not in first or path not in second:
            side = "before" if path in first else "after"
            raise NotEquivalent(
                f"not equivalent: '{path}' is only in the output of the model {side}"
            )
    worst = ModeDifference(0.0, 0.0, next(iter(first), "output"))
    for path, value in first.items():
        absolute, relative = _difference(value, second[path], path)
        place = path if relative > worst.relative else worst.output
        worst = ModeDifference(max(absolute, worst.absolute), max(relative, worst.relative), place)
    return worst


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield every tensor and every other value of an output with its path."""
    parts: Iterator[tuple[str, Any]]
    if isinstance(value, Mapping):
        parts = ((f"{path}[{key!r}]", part) for key, part in value.items())
    elif hasattr(value, "_fields"):  # a named tuple
        parts = ((f"{path}.{name}", getattr(value, name)) for name in value._fields)
    elif isinstance(value, (list, tuple)):
        parts = ((f"{path}[{index}]", part) for index, part in enumerate(value))
    elif is_dataclass(value) and not isinstance(value, type):
        parts = ((f"{path}.{f.name}", getattr(value, f.name)) for f in fields(value))
    else:
        yield path, value
        return
    for name, part in parts:
        yield from _leaves(part, name)


def _difference(a: Any, b: Any, path: str) -> tuple[float, float]:
    """Return the largest difference of two leaves: absolute, and relative to the largest |a|."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return _difference_of_others(a, b, path)
    for name in ("shape", "dtype"):
        was, now = getattr(a, name), getattr(b, name)
        if was != now:
            was, now = (tuple(was), tuple(now)) if name == "shape" else (was, now)
            raise NotEquivalent(f"not equivalent: '{path}' has {name} {was} before, {now} after")
    if not a.numel():
        return 0.0, 0.0
    wide = torch.complex128 if a.is_complex() else torch.float64
    a, b = (t.to_dense().to(a.device, wide) for t in (a, b))
    same = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    size = torch.where(a.isfinite(), a.abs(), 0.0)
    absolute, scale = gap.max().item(), size.max().item()
    if absolute == 0.0:
        return 0.0, 0.0
    return absolute, absolute / scale if scale else math.inf


def _difference_of_others(a: Any, b: Any, path: str) -> tuple[float, float]:
    """Return the difference of two leaves of which one at least is no tensor."""
    if isinstance(a, (bool, str, bytes, type(None))) or type(a) is not type(b):
        if type(a) is type(b) and a == b:
            return 0.0, 0.0
        raise NotEquivalent(f"not equivalent: '{path}' is {_named(a)} before, {_named(b)} after")
    if isinstance(a, (int, float, complex)):
        return _difference(torch.as_tensor(a), torch.as_tensor(b), path)
    raise NotEquivalent(
        f"cannot compare '{path}': it is {_named(a)}; return tensors, numbers, or tuples, "
        "dictionaries and dataclasses of these"
    )


def _named(value: Any) -> str:
    """Return `value` in few words."""
    plain = isinstance(value, (bool, int, float, str, type(None)))
    return repr(value) if plain else f"a {type(value).__name__}"
