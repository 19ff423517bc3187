"""Between which numbers the values of a graph lie, for all inputs or for those within a box."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from graphgrow.dispatch import Dispatch
from graphgrow.ir.analyse import Analysis, Step, run_watched, with_own_buffers, written
from graphgrow.ir.graph import Graph
from graphgrow.ir.outcome import aten
from graphgrow.ir.rules import row_of
from graphgrow.passes.intervals import BOUNDED, Operation, Range, anything, point, through

Box = tuple[float, float]

# operators that give each entry as it is, or the end of a range that it is beyond
CLIPS = {aten.relu, aten.hardtanh, aten.clamp, aten.clamp_min, aten.clamp_max}
CLIPS |= {aten.relu_, aten.hardtanh_, aten.clamp_, aten.clamp_min_, aten.clamp_max_}


@dataclass(frozen=True, eq=False)
class Clip:
    """What clipping does to the units of an axis: `held` is the one number each gives, or NaN.

    `kept`: units that no clipping ever changes. Both have shape `(width,)`.
    """

    held: np.ndarray
    kept: np.ndarray


@dataclass(frozen=True, eq=False)
class Ranges:
    """The ranges of what each clipping call of a graph reads and gives, by mode and node."""

    clips: Mapping[tuple[str, str], tuple[tuple[Range, Range], ...]]

    def of(self, analysis: Analysis, step: Step, axis: str) -> Clip | None:
        """Return what a step does to the units of an axis, None where it clips nothing."""
        if step.func.overloadpacket not in CLIPS:
            return None
        calls = [s for s in analysis.steps if (s.mode, s.node) == (step.mode, step.node)]
        calls = [s for s in calls if s.func.overloadpacket in CLIPS]
        found = self.clips.get((step.mode, step.node), ())
        if len(found) != len(calls):
            return None
        before, after = found[next(k for k, s in enumerate(calls) if s is step)]
        layouts, widths = analysis.values[step.outputs[0]], analysis.widths()
        dim = next((d for d, la in enumerate(layouts) if axis in la.axes()), None)
        if dim is None or after.low.dim() != len(layouts):
            return None
        units = layouts[dim].units(widths, axis)
        if len(units) != after.low.shape[dim]:
            return None
        low, high = (_ends(end, dim, units, widths[axis]) for end in (after.low, after.high))
        same = (before.low == after.low) & (before.high == after.high)
        kept = _ends(same.double(), dim, units, widths[axis])[0] == 1
        return Clip(np.where(low[0] == high[1], low[0], np.nan), kept)

    def is_identity(self, mode: str, node: str) -> bool:
        """Return whether clipping at a node never changes anything."""
        found = self.clips.get((mode, node), ())
        same = ((b.low == a.low).all() & (b.high == a.high).all() for b, a in found)
        return bool(found) and all(map(bool, same))


def _ends(
    entries: Tensor, dim: int, units: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the largest entry of each unit."""
    rows = entries.movedim(dim, 0).reshape(len(units), -1)
    index = torch.from_numpy(units)
    least, most = (
        torch.full((width,), sign * torch.inf, dtype=torch.double).scatter_reduce(
            0, index[index >= 0], end[index >= 0], how
        )
        for sign, end, how in ((1, rows.amin(1), "amin"), (-1, rows.amax(1), "amax"))
    )
    return least.numpy(), most.numpy()


def is_bounded(graph: Graph) -> bool:
    """Return whether some operator of a graph gives bounded numbers, whatever goes in."""
    names = {step.func.overloadpacket.__name__.removesuffix("_") for step in graph.analysis.steps}
    return not names.isdisjoint(BOUNDED)


def ranges(graph: Graph, box: Box | None = None) -> Ranges:
    """Return the ranges of a graph's clipped values, its inputs' entries in `box` or any numbers.

    Raises UnsupportedOp where the graph does not run on its example inputs.
    """
    watch = _RangeWatch(graph.state, box)
    for mode in ("train", "eval"):
        run_watched(watch, graph, mode)
    return Ranges({key: tuple(found) for key, found in watch.clips.items()})


class _RangeWatch(Dispatch):
    """Sees every ATen call of a run and follows the ranges of what goes in and comes out."""

    def __init__(self, state: Mapping[str, Tensor], box: Box | None) -> None:
        super().__init__()
        self.stored, self.box = state, box
        self.mode = self.node = ""
        self.clips: dict[tuple[str, str], list[tuple[Range, Range]]] = {}
        self.known: dict[int, tuple[weakref.ref[Tensor], Range | None]] = {}

    def start(self, mode: str) -> None:
        """Begin a run, of which nothing is known but the stored tensors."""
        self.mode = mode
        self.known.clear()
        self.state = with_own_buffers(self.stored)

    def enter(self, n: fx.Node, module: Any) -> None:
        """Note which node runs."""
        self.node = n.name

    def leave(self, n: fx.Node, result: Any) -> None:
        """Note nothing: what a node gives has been seen."""

    def input(self, n: fx.Node, result: Any) -> None:
        """Note that an input lies in the box."""
        for tensor in _tensors(result):
            self.note(tensor, self._of_input(tensor))

    def _of_input(self, tensor: Tensor) -> Range | None:
        if not tensor.is_floating_point():
            return None
        if self.box is None:
            return anything(tensor.shape)
        low, high = (torch.full(tensor.shape, end, dtype=torch.double) for end in self.box)
        return Range(low, high)

    def output(self, result: Any) -> None:
        """Note nothing of outputs."""

    def note(self, tensor: Tensor, found: Range | None) -> None:
        """Remember the range of a tensor as it is now."""
        self.known[id(tensor)] = weakref.ref(tensor), found

    def of(self, tensor: Tensor) -> Range | None:
        """Return the range of a tensor, None for one that holds no real numbers; a point if new."""
        reference, found = self.known.get(id(tensor), (None, None))
        if reference is None or reference() is not tensor:
            is_real = tensor.is_floating_point() and tensor.layout is torch.strided
            found = point(tensor) if is_real else None
            self.note(tensor, found)
        return found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        positional, named = tree_map(self._ranged, (args, kwargs))
        changed = written(func, args, kwargs)
        out = func(*args, **kwargs)
        outs = _tensors(out)
        row = row_of(func)
        for tensor in outs:
            self.note(tensor, anything(tensor.shape) if tensor.is_floating_point() else None)
        for tensor in changed:
            self._overwritten(tensor)
        if row is not None and outs and outs[0].is_floating_point():
            eps = torch.finfo(outs[0].dtype).eps
            found = through(Operation(func, row, positional, named, outs[0], eps))
            self.note(outs[0], found)
            if func.overloadpacket in CLIPS and isinstance(positional[0], Range):
                key = self.mode, self.node
                self.clips.setdefault(key, []).append((positional[0], found))
        return out

    def _ranged(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        found = self.of(value)
        return value.detach().cpu().clone() if found is None else found

    def _overwritten(self, tensor: Tensor) -> None:
        """Forget what was known of all tensors that share memory with one that is written."""
        key = tensor.untyped_storage()._cdata
        for reference, _ in list(self.known.values()):
            other = reference()
            if other is None or other.layout is not torch.strided:
                continue
            if other.untyped_storage()._cdata == key:
                real = other.is_floating_point()
                self.note(other, anything(other.shape) if real else None)


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def domain(box: Box | None) -> str:
    """Return for which inputs ranges hold: other sizes have other borders and other positions."""
    numbers = "all inputs" if box is None else "inputs from {:g} to {:g}".format(*box)
    return f"{numbers}, of the sizes of the example"


def inside(box: Box | None, inputs: Iterable[Any]) -> Any:
    """Return inputs with every entry moved into a box."""
    if box is None:
        return inputs
    low, high = box
    return tree_map(
        lambda t: t.clamp(low, high) if isinstance(t, Tensor) and t.is_floating_point() else t,
        inputs,
    )
