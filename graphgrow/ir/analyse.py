"""Axis analysis: run a graph once in each mode, node by node, and relate every dim to axes.

The run happens under a dispatch mode, so every module and function is seen as the ATen operators it
decomposes into; `rules` has a row for each. What comes out is an `Analysis`: the layouts of all
tensors over named axes, and the `Step`s that a proof follows.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

from graphgrow.dispatch import Dispatch
from graphgrow.ir import layout
from graphgrow.ir.assemble import assemble
from graphgrow.ir.attributes import fixed
from graphgrow.ir.layout import ONE, Atom, Composition, Layout, Misaligned, freeze, fresh, settle
from graphgrow.ir.outcome import KERNEL, OVER, SPATIAL, Call, Dims, Kind, Outcome, Row, Window
from graphgrow.ir.rows import RowInterpreter
from graphgrow.ir.rules import TAKEN_APART, row_of


@dataclass(frozen=True)
class Slot:
    """Stands for the input tensor with this number in a step's arguments."""

    number: int


@dataclass(frozen=True)
class Source:
    """The parameter or buffer whose entries a value holds, moved but not computed with.

    `dims` has the dim of the tensor for each dim of the value, None where a reshape mixed them.
    """

    path: str
    dims: tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class Step:
    """One ATen call of a run: operator, values in and out, and what it does with axes.

    `contracted` maps an input slot and dim to the axes that are summed over there; `batched` are
    axes that both factors of a contraction keep, `mixed` those whose units a norm compares,
    `standardised` those whose units' entries in a parameter it does, and `windows` the dims along
    which units are added to those beside them.
    """

    mode: str
    node: str
    where: str
    func: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    row: Row
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    contracted: Mapping[tuple[int, int], frozenset[str]] = field(default_factory=dict)
    batched: frozenset[str] = frozenset()
    mixed: frozenset[str] = frozenset()
    standardised: frozenset[str] = frozenset()
    bias: int | None = None
    border: bool = False
    windows: tuple[Window, ...] = ()


@dataclass(frozen=True)
class ParameterDim:
    """One dim of a parameter or buffer."""

    path: str
    dim: int

    def __str__(self) -> str:
        return f"{self.path}[{self.dim}]"


@dataclass(frozen=True)
class Axis:
    """A set of units that is indexed together wherever it appears.

    `producers` are parameter dims that write it, `consumers` those contracted over it, `carriers`
    per-unit parameters and buffers (bias, normalisation, depthwise filters). New units come in
    multiples of `multiple`. `obstacle` says why the width cannot change, None where it can.
    """

    name: str
    width: int
    multiple: int
    producers: tuple[ParameterDim, ...]
    consumers: tuple[ParameterDim, ...]
    carriers: tuple[ParameterDim, ...]
    obstacle: str | None


@dataclass(frozen=True, eq=False)
class Analysis:
    """The layouts of a graph's tensors, its axes in topological order, and its steps.

    `tied` has the first path of each tensor for every path; axes name tensors by first paths.
    `holding` has, for each axis, the numbers of the values in which it takes part. `computed` has
    the paths of the parameters that a value is computed from, if from nothing else. `current`: the
    steps state the sizes of now; in a graph that has grown they may state those of before.
    """

    axes: Mapping[str, Axis]
    state: Mapping[str, tuple[Layout, ...]]
    tied: Mapping[str, str]
    nodes: Mapping[tuple[str, str], Any]
    values: tuple[tuple[Layout, ...], ...]
    holding: Mapping[str, frozenset[int]]
    sources: Mapping[int, Source]
    steps: tuple[Step, ...]
    unknown: Mapping[str, int]
    computed: Mapping[int, frozenset[str]] = field(default_factory=dict)
    current: bool = True

    def widths(self) -> dict[str, int]:
        """Return the width of every axis by name."""
        return self._widths

    def touching(self, axis: str) -> tuple[Step, ...]:
        """Return the steps that read or compute values in which an axis takes part."""
        return self._touching.get(axis, ())

    def tensors(self, axis: str) -> tuple[str, ...]:
        """Return the parameters and buffers in which an axis takes part, by their first paths."""
        return self._tensors.get(axis, ())

    def windows(self, step: Step, axis: str) -> tuple[Window, ...]:
        """Return the windows that a step takes over units of an axis, and what is beside them."""
        dims = self.values[step.outputs[0]] if step.windows else ()
        return tuple(w for w in step.windows if axis in dims[w.dim].axes())

    def resized(
        self, widths: Mapping[str, int], numbers: Mapping[tuple[str, str], Any]
    ) -> Analysis:
        """Return the analysis with other widths, and other `numbers` that nodes compute."""
        changed = {n: w for n, w in widths.items() if w != self.axes[n].width}
        axes = {**self.axes, **{n: replace(self.axes[n], width=w) for n, w in changed.items()}}
        made = replace(self, axes=axes, nodes={**self.nodes, **numbers}, current=False)
        made.__dict__.update(_touching=self._touching, _tensors=self._tensors)
        return made

    @cached_property
    def _touching(self) -> dict[str, tuple[Step, ...]]:
        """The steps by axis; widths do not matter for it."""
        axes: dict[int, list[str]] = {}
        for axis, numbers in self.holding.items():
            for number in numbers:
                axes.setdefault(number, []).append(axis)
        found: dict[str, list[Step]] = {}
        for step in self.steps:
            values = dict.fromkeys(step.inputs + step.outputs)
            for axis in dict.fromkeys(a for number in values for a in axes.get(number, ())):
                found.setdefault(axis, []).append(step)
        return {axis: tuple(steps) for axis, steps in found.items()}

    @cached_property
    def _tensors(self) -> dict[str, tuple[str, ...]]:
        """The first paths of tensors by axis; widths do not matter for it."""
        found: dict[str, dict[str, None]] = {}
        for path in dict.fromkeys(self.tied.values()):
            for axis in (axis for dim in self.state[path] for axis in dim.axes()):
                found.setdefault(axis, {})[path] = None
        return {axis: tuple(paths) for axis, paths in found.items()}

    @cached_property
    def _widths(self) -> dict[str, int]:
        return {name: axis.width for name, axis in self.axes.items()}


def analyse(graph: Any) -> Analysis:
    """Return the analysis of a graph: one run in each mode on its example inputs.

    Raises:
        UnsupportedOp: where the graph does not run on its example inputs.
    """
    watch = _Watch(graph.state)
    _freeze_unknown_leaves(watch, graph)
    for mode in ("train", "eval"):
        run_watched(watch, graph, mode)
    return _Settled(watch, graph).analysis()


def _freeze_unknown_leaves(watch: _Watch, graph: Any) -> None:
    """Freeze the tensors of leaves whose attributes could not be made to tell new sizes."""
    for path in graph.leaves:
        by = fixed(path, graph.modules, graph.state)
        if by is not None:
            reason = f"is fixed by {by} '{path}'"
            for name, tensor in watch.state.items():
                if name.startswith(f"{path}."):
                    for parts in watch.of(tensor):
                        freeze(parts, reason)


def run_watched(watch: Any, graph: Any, mode: str) -> None:
    """Run a graph on its example inputs under a watch, a dispatch mode that is told what runs.

    It has `state`, `start`, `enter`, `leave`, `input` and `output`, as `_Watch` below.
    """
    watch.start(mode)
    tree = assemble(graph.modules, graph.leaves, watch.state)
    tree.train(mode == "train")
    structure = graph.train if mode == "train" else graph.eval
    interpreter = _Interpreter(tree, structure, watch)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            interpreter.run(*tree_map(_copied, graph.example))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


class _Interpreter(RowInterpreter):
    """Runs a graph node by node and tells the watch which node runs."""

    def __init__(self, tree: nn.Module, structure: fx.Graph, watch: Any) -> None:
        super().__init__(tree, graph=structure)
        self.extra_traceback = False
        self.watch = watch

    def run_node(self, n: fx.Node) -> Any:
        self.watch.enter(n, self.submodules.get(str(n.target)) if n.op == "call_module" else None)
        if n.op == "placeholder":
            result = super().run_node(n)
            self.watch.input(n, result)
        elif n.op == "output":
            result = super().run_node(n)
            self.watch.output(result)
        else:
            with self.watch:
                result = super().run_node(n)
        self.watch.leave(n, result)
        return result

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        recurrent = isinstance(self.submodules[target], nn.RNNBase)
        with without_kernels() if recurrent else nullcontext():
            return super().call_module(target, args, kwargs)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Run recurrent layers as the operators that a step consists of, not as one of a library."""
    before = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before[0])
        torch._C._set_cudnn_enabled(before[1])


class _Watch(Dispatch):
    """Sees every ATen call of a run and relates the layouts of what goes in and comes out."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.mode = self.where = self.node = ""
        self.dims: list[Dims] = []
        self.steps: list[tuple[Step, Outcome]] = []
        self.sources: dict[int, Source] = {}
        self.computed: dict[int, frozenset[str]] = {}
        self.nodes: dict[tuple[str, str], Any] = {}
        self.unknown: dict[str, int] = {}
        self.numbers: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.storages: dict[int, list[weakref.ref[Tensor]]] = {}
        self.state = with_own_buffers(state)
        for path, tensor in self.state.items():
            if id(tensor) not in self.numbers:
                number = self.see(tensor, [fresh(n) for n in tensor.shape])
                self.sources[number] = Source(path, tuple(range(tensor.dim())))
        self.stored = dict(self.numbers)

    def start(self, mode: str) -> None:
        """Begin a run: what an earlier one wrote into the stored tensors is not seen in it."""
        self.mode = mode
        self.numbers.update(self.stored)

    # values

    def see(self, tensor: Tensor, dims: Dims) -> int:
        """Give `tensor` the next number as its present value."""
        self.dims.append(dims)
        self.numbers[id(tensor)] = weakref.ref(tensor), len(self.dims) - 1
        if tensor.layout is torch.strided and id(tensor) not in self._aliases(tensor):
            key = tensor.untyped_storage()._cdata
            self.storages[key] = [*self._live(key), weakref.ref(tensor)]
        return len(self.dims) - 1

    def _live(self, key: int) -> list[weakref.ref[Tensor]]:
        return [r for r in self.storages.get(key, []) if r() is not None]

    def _aliases(self, tensor: Tensor) -> dict[int, Tensor]:
        refs = self._live(tensor.untyped_storage()._cdata)
        return {id(t): t for r in refs if (t := r()) is not None}

    def number(self, tensor: Tensor) -> int:
        """Return the present value's number; a tensor never seen has fixed dims."""
        found = self.numbers.get(id(tensor))
        if found is None or found[0]() is not tensor:
            return self.see(tensor, [fresh(n, "is fixed by a constant") for n in tensor.shape])
        return found[1]

    def of(self, tensor: Tensor) -> Dims:
        """Return the layouts of the dims of a tensor."""
        return self.dims[self.number(tensor)]

    # nodes

    def enter(self, n: fx.Node, module: nn.Module | None) -> None:
        """Note which node runs, in words."""
        self.node = n.name
        if module is not None:
            self.where = f"{type(module).__name__} '{n.target}'"
        else:
            name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "?")
            owner = n.meta.get("module")
            self.where = f"{name} in '{owner}'" if owner else f"'{name}'"

    def leave(self, n: fx.Node, result: Any) -> None:
        """Note the value of a node that ran: numbers for tensors, plain values for the rest."""
        self.nodes[self.mode, n.name] = tree_map(self._noted, result, is_leaf=_is_packed)

    def _noted(self, value: Any) -> Any:
        if _is_packed(value):  # its class takes nothing but tensors
            return tuple(map(self._noted, value))
        if isinstance(value, Tensor):
            return Slot(self.number(value))
        return value

    def input(self, n: fx.Node, result: Any) -> None:
        """Freeze the dims of the graph's inputs."""
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                for d, parts in enumerate(self.of(tensor)):
                    freeze(parts, f"is fixed by dim {d} of the input '{n.target}'")
                    for atom in layout.leaves(parts):
                        atom.frozen = f"is fixed by dim {d} of the input '{n.target}'"

    def output(self, result: Any) -> None:
        """Freeze the dims of the graph's outputs."""
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                for d, parts in enumerate(self.of(tensor)):
                    freeze(parts, f"is dim {d} of the model's output")

    # calls

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in TAKEN_APART:
            with self:
                return TAKEN_APART[func](*args, **kwargs)
        changed = written(func, args, kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        numbers = tuple(self.number(t) for t in inputs)
        strides = tuple(t.stride() if t.layout is torch.strided else () for t in inputs)
        out = func(*args, **kwargs)
        outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        row = row_of(func)
        outcome = self._relate(Call(func, args, kwargs, outs, self.of, strides), row)
        made = tuple(self.see(t, d) for t, d in zip(outs, outcome.outs, strict=True))
        self._step(func, args, kwargs, row, outcome, numbers, made)
        for tensor in changed:
            self._rewritten(func, tensor)
        return out

    def _relate(self, call: Call, row: Row | None) -> Outcome:
        try:
            if row is None:
                name = str(call.func.overloadpacket)
                self.unknown[name] = self.unknown.get(name, 0) + bool(call.tensors())
                raise Misaligned(f"no rule is known for the operator '{name}'")
            return self._checked(call, row.relate(call))
        except Misaligned as error:
            return self._opaque(call, str(error))

    def _checked(self, call: Call, outcome: Outcome) -> Outcome:
        for out, dims in zip(call.outs, outcome.outs, strict=True):
            sizes = [layout.size_of(parts) for parts in dims]
            if sizes != list(out.shape):
                raise Misaligned(f"the rule of '{call.func}' gives sizes {sizes}")
        return outcome

    def _opaque(self, call: Call, reason: str) -> Outcome:
        for tensor in call.tensors():
            for parts in self.of(tensor):
                freeze(parts, f"cannot be followed through {self.where}: {reason}")
        why = f"comes out of {self.where}"
        return Outcome([[fresh(n, why) if n != 1 else ONE for n in o.shape] for o in call.outs])

    def _step(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        row: Row | None,
        outcome: Outcome,
        inputs: tuple[int, ...],
        made: tuple[int, ...],
    ) -> None:
        if row is None:
            return
        counter = iter(range(len(inputs)))
        positional, named = tree_map(
            lambda t: Slot(next(counter)) if isinstance(t, Tensor) else t, (args, kwargs)
        )
        step = Step(
            self.mode,
            self.node,
            self.where,
            func,
            positional,
            named,
            row,
            inputs,
            made,
            bias=outcome.bias,
            border=outcome.border,
            windows=outcome.windows,
        )
        self.steps.append((step, outcome))
        if row.kind is Kind.MOVE and len(inputs) == 1:
            self._follow_source(func, step)
        self._follow_computed(step)

    def _follow_computed(self, step: Step) -> None:
        """Note which parameters a value is computed from, if from nothing else."""
        if step.row.kind not in _ENTRYWISE or not step.inputs:
            return
        paths: set[str] = set()
        for number in step.inputs:
            source = self.sources.get(number)
            if source is None and number not in self.computed:
                return
            paths.update(self.computed.get(number, ()) if source is None else [source.path])
        made = frozenset(p for p in paths if isinstance(self.state[p], nn.Parameter))
        self.computed.update(dict.fromkeys(set(step.outputs) - self.sources.keys(), made))

    def _follow_source(self, func: Any, step: Step) -> None:
        source = self.sources.get(step.inputs[0])
        if source is None or step.row.keeps != "any":
            return
        before, name = self.dims[step.inputs[0]], func.overloadpacket.__name__
        for made in step.outputs:
            self.sources[made] = Source(source.path, _moved(source, name, step.args, len(before)))

    def _rewritten(self, func: Any, tensor: Tensor) -> None:
        """Give every other live view of what was written in place a value of its own."""
        for other in self._aliases(tensor).values():
            if other is not tensor:
                before = self.number(other)
                after = self.see(other, self.dims[before])
                row = Row(_no_relation, Kind.OVERWRITTEN)
                inputs = (before, self.number(tensor))
                step = Step(self.mode, self.node, self.where, func, (), {}, row, inputs, (after,))
                self.steps.append((step, Outcome([self.dims[before]])))


# what makes weights of parameters, entry by entry or row by row
_ENTRYWISE = (Kind.POINTWISE, Kind.MOVE, Kind.SUM, Kind.NORM)


def _is_packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)


def _no_relation(c: Call) -> Outcome:
    raise AssertionError("a rewritten view is related to nothing anew")


def _moved(source: Source, name: str, args: tuple[Any, ...], count: int) -> tuple[int, ...] | None:
    """Return the tensor's dim for each dim of a moved value, None where that is not known."""
    dims = source.dims
    if dims is None or len(dims) != count:
        return None
    if name in ("t", "transpose") and count > 1:
        swapped, (i, j) = list(dims), (0, 1) if name == "t" else args[1:3]
        swapped[i], swapped[j] = swapped[j], swapped[i]
        return tuple(swapped)
    if name == "permute":
        return tuple(dims[i] for i in args[1])
    return dims if name in ("detach", "alias", "clone", "_to_copy", "lift_fresh", "t") else None


def with_own_buffers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state with buffers copied, since a run in train mode writes to them."""
    copies: dict[int, Tensor] = {}
    out: dict[str, Tensor] = {}
    for path, tensor in state.items():
        if isinstance(tensor, nn.Parameter):
            out[path] = tensor
        else:
            out[path] = copies.setdefault(id(tensor), tensor.detach().clone())
    return out


def written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors that an operator writes in place, by its schema."""
    return tensors_given(written_arguments(func), args, kwargs)


@cache
def written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Return place and name of the arguments that an operator writes in place, by its schema."""
    return tuple(
        (i, argument.name)
        for i, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def tensors_given(
    arguments: tuple[tuple[int, str], ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Tensor]:
    """Return the tensors that a call gives for some arguments."""
    values = [args[i] if i < len(args) else kwargs.get(name) for i, name in arguments]
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)] if values else []


class _Settled:
    """Names the axes of a finished watch and writes its facts as values."""

    def __init__(self, watch: _Watch, graph: Any) -> None:
        self.watch, self.graph = watch, graph
        self.roles: dict[Atom, dict[ParameterDim, set[str]]] = {}
        self.written_by: dict[Atom, ParameterDim] = {}
        self.names: dict[Atom, str] = {}
        self.taken: set[str] = set()
        first: dict[int, str] = {}
        state = watch.state.items()
        self.tied = {path: first.setdefault(id(tensor), path) for path, tensor in state}

    def analysis(self) -> Analysis:
        self._collect_roles()
        self._name_axes()
        settled: dict[int, Layout] = {}

        def value(parts: Composition) -> Layout:
            if id(parts) not in settled:
                settled[id(parts)] = settle(parts, self._label)
            return settled[id(parts)]

        values = tuple(tuple(value(p) for p in dims) for dims in self.watch.dims)
        state = {
            path: values[self.watch.number(tensor)] if tensor.dim() else ()
            for path, tensor in self.watch.state.items()
        }
        steps = tuple(self._step(step, outcome) for step, outcome in self.watch.steps)
        summed = frozenset(a for step in steps for over in step.contracted.values() for a in over)
        return Analysis(
            axes={name: self._axis(atom, name, summed) for atom, name in self.names.items()},
            state=state,
            tied=self.tied,
            nodes=self.watch.nodes,
            values=values,
            holding=_holding(values),
            sources=self.watch.sources,
            steps=steps,
            unknown=self.watch.unknown,
            computed=self.watch.computed,
        )

    def _label(self, atom: Atom) -> str | int:
        return self.names.get(atom, atom.size)

    def _collect_roles(self) -> None:
        for step, outcome in self.watch.steps:
            # units that are not in all of what is compared would weigh more as they get more
            shared = set.intersection(*map(set, layout.expand(outcome.mixed)))
            others = [(atom,) for atom in layout.leaves(outcome.mixed) if atom not in shared]
            freeze(tuple(others), f"is normalised together with other axes by {step.where}")
            if not step.inputs or step.inputs[0] not in self.watch.sources:
                freeze(outcome.standardised, OVER)
            for slot, number in enumerate(step.inputs):
                source = self.watch.sources.get(number)
                if source is not None and step.row.kind is not Kind.MOVE:
                    if self.watch.computed.keys().isdisjoint(step.outputs):
                        self._add_roles(step, outcome, slot, source)
                elif step.row.kind is Kind.CONTRACT and slot != step.bias:
                    self._add_computed_roles(step, outcome, slot)
        for path in dict.fromkeys(self.tied.values()):
            for d, parts in enumerate(self.watch.of(self.watch.state[path])):
                self._refuse_powers(parts)
                for atom in layout.leaves(parts):
                    self.roles.setdefault(atom, {}).setdefault(ParameterDim(path, d), set())

    def _refuse_powers(self, parts: Composition) -> None:
        """Freeze axes that a dim multiplies with themselves: their units have no slices."""
        for term in layout.expand(parts):
            factors = [set(layout.leaves(((atom,),))) for atom in term]
            for i, factor in enumerate(factors):
                for atom in factor.intersection(*[set().union(*factors[:i])]):
                    freeze(((atom,),), "is multiplied with itself in one dim")

    def _add_roles(self, step: Step, outcome: Outcome, slot: int, source: Source) -> None:
        tensor = self.watch.state[source.path]
        over = {c.dim: set(layout.leaves(c.over)) for c in outcome.contracted if c.slot == slot}
        # of two parameters that meet, the first is what the second reads
        met = any(
            c.slot > slot and step.inputs[c.slot] in self.watch.sources for c in outcome.contracted
        )
        summed = set().union(*over.values()) if over else set()
        batched = set(layout.leaves(outcome.batched))
        first = self.watch.of(tensor)
        for d, parts in enumerate(first):
            for atom in layout.leaves(parts):
                at = source.dims.index(d) if source.dims and d in source.dims else None
                here = over.get(at, set()) if at is not None else summed
                role = _role(step, slot, d, atom in here and not met, atom in batched)
                key = ParameterDim(source.path, d)
                if role == "producer":
                    self.written_by.setdefault(atom, key)
                self.roles.setdefault(atom, {}).setdefault(key, set()).add(role)

    def _add_computed_roles(self, step: Step, outcome: Outcome, slot: int) -> None:
        """Give parameters the roles of the weight that is computed from them."""
        over = [c.over for c in outcome.contracted if c.slot == slot]
        summed = {atom for parts in over for atom in layout.leaves(parts)}
        batched = set(layout.leaves(outcome.batched))
        for path in sorted(self.watch.computed.get(step.inputs[slot], ())):
            for d, parts in enumerate(self.watch.of(self.watch.state[path])):
                for atom in layout.leaves(parts):
                    key = ParameterDim(self.tied[path], d)
                    role = _role(step, slot, d, atom in summed, atom in batched)
                    if role == "producer":
                        self.written_by.setdefault(atom, key)
                    self.roles.setdefault(atom, {}).setdefault(key, set()).add(role)

    def _name_axes(self) -> None:
        """Name each axis after what first writes it, else after what reads or carries it."""
        for atom, key in self.written_by.items():
            if self._is_axis(atom):
                self.names[atom] = self._name(atom, key, "producer")
        for wanted in ("consumer", "carrier"):
            for atom, roles in self.roles.items():
                key = next((k for k, found in roles.items() if _is(wanted, found)), None)
                if key is not None and atom not in self.names and self._is_axis(atom):
                    self.names[atom] = self._name(atom, key, wanted)
        order = {atom: i for i, atom in enumerate(self.roles)}
        self.names = dict(sorted(self.names.items(), key=lambda item: order[item[0]]))

    def _is_axis(self, atom: Atom) -> bool:
        """Return whether an atom is a set of units, not a size that is only part of a shape."""
        if atom.frozen == SPATIAL:
            return atom in self.written_by
        return atom.frozen not in (KERNEL, layout.ONE_ONLY) and atom.size > 0

    def _name(self, atom: Atom, key: ParameterDim, role: str) -> str:
        owner = self._leaf(key.path)
        taken = self.taken
        parts = self.watch.of(self.watch.state[key.path])[key.dim]
        inside = list(layout.leaves(parts))
        place = "" if inside == [atom] else f"[{inside.index(atom)}]"
        base = owner if role == "producer" and owner in self.graph.leaves else key.path
        choices = [f"{base}{place}", f"{key.path}{place}", f"{key.path}.{key.dim}{place}"]
        if role != "producer":
            choices = choices[2:]
        name = next((c for c in choices if c not in taken), f"{key.path}.{key.dim}:{len(taken)}")
        taken.add(name)
        return name

    def _leaf(self, path: str) -> str:
        """Return the leaf module that holds a tensor, the module right above it where none does."""
        above = path.rpartition(".")[0]
        while above and above not in self.graph.leaves:
            above = above.rpartition(".")[0]
        return above or path.rpartition(".")[0]

    def _axis(self, atom: Atom, name: str, summed: frozenset[str]) -> Axis:
        def of(role: str) -> tuple[ParameterDim, ...]:
            return tuple(k for k, found in self.roles[atom].items() if _is(role, found))

        producers, consumers, carriers = of("producer"), of("consumer"), of("carrier")
        reason = atom.frozen
        if reason is None and not any(self.roles[atom].values()):
            reason = "is of a tensor that the model does not read"
        if reason is None and not self._learns(producers + carriers):
            reason = "is written by no parameter"
        if reason is None and name not in summed:
            reason = "is summed over nowhere"
        obstacle = reason and f"cannot widen axis '{name}' ({atom.size} units): it {reason}"
        return Axis(name, atom.size, 1, producers, consumers, carriers, obstacle)

    def _learns(self, written: tuple[ParameterDim, ...]) -> bool:
        return any(isinstance(self.watch.state[at.path], nn.Parameter) for at in written)

    def _step(self, step: Step, outcome: Outcome) -> Step:
        contracted = {(c.slot, c.dim): self._named(c.over) for c in outcome.contracted}
        return replace(
            step,
            contracted=contracted,
            batched=self._named(outcome.batched),
            mixed=self._named(outcome.mixed),
            standardised=self._named(outcome.standardised),
        )

    def _named(self, parts: Composition) -> frozenset[str]:
        return frozenset(self.names[a] for a in layout.leaves(parts) if a in self.names)


def _holding(values: tuple[tuple[Layout, ...], ...]) -> dict[str, frozenset[int]]:
    found: dict[str, set[int]] = {}
    for number, dims in enumerate(values):
        for layout_ in dims:
            for axis in layout_.axes():
                found.setdefault(axis, set()).add(number)
    return {axis: frozenset(numbers) for axis, numbers in found.items()}


def _is(role: str, found: set[str]) -> bool:
    """Return whether a dim has a role; it carries an axis that it neither writes nor reads."""
    return role in found or (role == "carrier" and not found & {"producer", "consumer"})


def _role(step: Step, slot: int, dim: int, contracted: bool, batched: bool) -> str:
    if step.row.kind is Kind.GATHER and slot == 0:
        return "producer" if dim else "carrier"
    if step.row.kind is not Kind.CONTRACT or slot == step.bias:
        return "carrier"
    if contracted:
        return "consumer"
    return "carrier" if batched else "producer"
