"""Which dims of a recording's tensors have sizes that the values of tensors decide.

Each such dim has a mark: the node of the number that its size is, or an object of its own. Dims
with one mark have one size. Where no rule says more, all dims of what is computed are marked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graphgrow.ir import calls
from graphgrow.ir.sizes import DataNumber

Marks = Mapping[int, Any]
_STATED = frozenset(  # calls that state the sizes of what they return, those of a tensor or not
    "view reshape expand broadcast_to new_zeros new_ones new_empty new_full zeros ones empty full "
    "rand randn".split()
)
_OF_A_TENSOR = frozenset({"view", "reshape", "expand", "broadcast_to"})
_LIKE_SECOND = frozenset({"expand_as", "view_as", "reshape_as"})
_SAME_SHAPE = frozenset(
    "dropout softmax log_softmax cumsum cumprod sort zeros_like ones_like full_like empty_like "
    "rand_like randn_like clone detach contiguous to double float long layer_norm batch_norm "
    "LeakyReLU PReLU Dropout BatchNorm1d LayerNorm Identity".split()
)
_DROP = frozenset("sum mean amax amin prod std var any all argmax argmin unbind".split())


class DataSizes:
    """The marks of the nodes so far. `node_of` gives the node of a tensor."""

    def __init__(self, node_of: Callable[[Tensor], fx.Node]) -> None:
        self._node_of = node_of
        self._marks: dict[fx.Node, Marks] = {}
        self._calls: dict[fx.Node, tuple[str, Any, Any]] = {}
        self._filled: set[Any] = set()

    def of(self, node: Any) -> Marks:
        """Return the mark of each dim of a node whose size tensor values decide."""
        return self._marks.get(node, {})

    def is_filled(self, marks: Marks) -> bool:
        """Return whether the sizes of marked dims are not zero, whatever the values are."""
        return all(mark in self._filled for mark in marks.values())

    def note(self, node: fx.Node, name: str, args: Any, kwargs: Any, out: Any) -> None:
        """Note the marks of what a call of `name` gave, and how to mark its parts."""
        marked = any(map(self._of, _inside(Tensor, (args, kwargs))))
        states = name == "arange" or name in _STATED
        if marked or states or _by_values(name, args, kwargs):
            self._calls[node] = name, args, kwargs
            self.note_part(node, node, out)

    def note_part(self, node: fx.Node, item: fx.Node, part: Any) -> None:
        """Note the marks of a part of what `node` gave, which `item` takes out of it."""
        if node not in self._calls:
            return
        self._calls[item] = self._calls[node]
        if isinstance(part, Tensor) and (marks := self._found(part, *self._calls[node])):
            self._marks[item] = marks

    def _found(self, out: Tensor, name: str, args: Any, kwargs: Any) -> Marks:
        tensors = list(_inside(Tensor, (args, kwargs)))
        if name == "__getitem__":
            return self._taken(args[0], args[1], out)
        if calls.writes(name, kwargs):
            return self._of(args[0])
        if name in _LIKE_SECOND:
            return self._of(args[1])
        if calls.sized_by_first(name):
            return self._of(args[0])
        if name in _STATED:
            return self._stated(out, name, args, kwargs)
        if name == "arange":
            if (
                len(args) == 1
                and isinstance(args[0], DataNumber)
                and not {*kwargs} & {"start", "step"}
            ):
                return {0: args[0].node()}
            return _every(out) if tensors or _by_values(name, args, kwargs) else {}
        if _by_values(name, args, kwargs):
            return _every(out)
        return self._computed(out, name, args, kwargs, tensors)

    def _computed(
        self, out: Tensor, name: str, args: Any, kwargs: Any, tensors: list[Tensor]
    ) -> Marks:
        """Return the marks of what is computed from tensors, and no number that values decide."""
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        x = tensors[0]
        if name in ("linear", "Linear"):
            rows = self._of(args[1]) if name == "linear" and len(args) > 1 else {}
            last = {out.dim() - 1: rows[0]} if 0 in rows else {}
            return {d: mark for d, mark in self._of(x).items() if d < x.dim() - 1} | last
        if name == "index_select":
            listed = self._of(args[2] if len(args) > 2 else kwargs["index"])
            return {**_without(self._of(x), {dim % x.dim()}), **_moved(listed, dim % x.dim())}
        if name in ("cat", "concat", "concatenate"):
            return self._joined(tensors, (dim or 0) % out.dim())
        if name == "unsqueeze":
            at = dim % out.dim()
            return {d + (d >= at): mark for d, mark in self._of(x).items()}
        if name == "stack":
            at = (dim or 0) % out.dim()
            return {d + (d >= at): mark for d, mark in self._aligned(out, tensors, 1).items()}
        dropped = _dims(0 if dim is None and name == "unbind" else dim, x.dim())
        if name in _DROP and dropped and out.dim() == x.dim() - len(dropped):
            kept = [d for d in range(x.dim()) if d not in dropped]
            return {kept.index(d): mark for d, mark in self._of(x).items() if d in kept}
        if name in _DROP and dropped and out.dim() == x.dim():
            return _without(self._of(x), dropped)
        if _is_pointwise(name) and out.dim() == max(t.dim() for t in tensors):
            return self._aligned(out, tensors)
        return _every(out)

    def _of(self, tensor: Tensor) -> Marks:
        return self.of(self._node_of(tensor))

    def _taken(self, x: Tensor, index: Any, out: Tensor) -> Marks:
        """Return the marks of `x[index]`."""
        items = index if isinstance(index, tuple) else (index,)
        listed = [i for i in items if isinstance(i, Tensor | list | bool)]
        if len(listed) > 1 or any(isinstance(i, list | bool) for i in listed):
            return _every(out)
        marks, found, d, o = self._of(x), dict[int, Any](), 0, 0
        for k, item in enumerate((*items, ...)):
            if item is None:
                o += 1
            elif item is ...:
                rest = x.dim() - d - sum(map(_span, items[k + 1 :]))
                found |= {e - d + o: marks[e] for e in range(d, d + rest) if e in marks}
                d, o = d + rest, o + rest
            elif isinstance(item, slice):
                if item.start is item.stop is item.step is None:
                    found |= {o: marks[d]} if d in marks else {}
                elif d in marks or list(_inside(DataNumber, item)):
                    found[o] = object()
                d, o = d + 1, o + 1
            elif isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8):
                found[o] = object()
                d, o = d + item.dim(), o + 1
            elif isinstance(item, Tensor):
                found |= _moved(self._of(item), o)
                d, o = d + 1, o + item.dim()
            else:
                d += 1
        return found

    def _stated(self, out: Tensor, name: str, args: Any, kwargs: Any) -> Marks:
        """Return the marks of a tensor of which a call states all sizes."""
        before = self._of(args[0]) if name in _OF_A_TENSOR else {}
        given = kwargs.get("size", kwargs.get("shape"))
        if given is None:
            first = 1 if name in _OF_A_TENSOR or name.startswith("new_") else 0
            is_list = len(args) > first and isinstance(args[first], tuple | list)
            given = args[first] if is_list else args[first:]
        if len(given) != out.dim():
            return _every(out)
        found = {}
        for d, size in enumerate(given):
            if isinstance(size, DataNumber):
                found[d] = size.node()
            elif isinstance(size, Tensor) or (isinstance(size, int) and size == -1 and before):
                found[d] = object()
        return found

    def _joined(self, tensors: list[Tensor], at: int) -> Marks:
        """Return the marks of a concatenation: as long as any part that is known to have a size."""
        tensors = [t for t in tensors if t.dim() > at]
        found = dict(_without(self._aligned(tensors[0], tensors[:1]), {at}))
        if any(at in self._of(t) for t in tensors):
            found[at] = object()
            marks = [self._of(t).get(at) for t in tensors if t.shape[at]]
            if any(mark is None or mark in self._filled for mark in marks):
                self._filled.add(found[at])
        return found

    def _aligned(self, out: Tensor, tensors: list[Tensor], less: int = 0) -> Marks:
        """Return the marks of dims aligned from the last; one that has a known size has it."""
        found: dict[int, Any] = {}
        count = out.dim() - less
        for d in range(count):
            here = [(t, d - count + t.dim()) for t in tensors if t.dim() >= count - d]
            here = [(t, e) for t, e in here if t.shape[e] != 1 or e in self._of(t)]
            marks = [self._of(t).get(e) for t, e in here]
            if marks and None not in marks:
                found[d] = marks[0]
        return found


def _inside(kind: type, value: Any) -> Iterator[Any]:
    """Yield what is of a class in nested containers and slices."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, slice):
        yield from _inside(kind, (value.start, value.stop, value.step))
    elif isinstance(value, dict):
        yield from _inside(kind, tuple(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _inside(kind, part)


def _by_values(name: str, args: Any, kwargs: Any) -> bool:
    """Return whether a call itself makes sizes of values, or is given such numbers."""
    return calls.sized_by_values(name, args, kwargs) or bool(
        list(map(id, _inside(DataNumber, (args, kwargs))))
    )


def _every(out: Tensor) -> Marks:
    return {d: object() for d in range(out.dim())}


def _without(marks: Marks, dims: set[int]) -> Marks:
    return {d: mark for d, mark in marks.items() if d not in dims}


def _moved(marks: Marks, by: int) -> Marks:
    return {d + by: mark for d, mark in marks.items()}


def _dims(given: Any, count: int) -> set[int]:
    listed = given if isinstance(given, tuple | list) else (given,)
    return {d % count for d in listed if isinstance(d, int) and count}


def _span(item: Any) -> int:
    """Return how many dims one part of an index takes."""
    if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8):
        return item.dim()
    return 0 if item is None or item is ... else 1


@functools.cache
def _is_pointwise(name: str) -> bool:
    """Return whether a call of `name` gives a tensor of the shape that its tensors broadcast to.

    Those of `max` and `min` that do not have fewer dims.
    """
    plain = name.strip("_")
    packets = (getattr(torch.ops.aten, n, None) for n in (plain, plain[1:], plain.lower()))
    overloads = (getattr(p, o) for p in packets if p is not None for o in p.overloads())
    return name in _SAME_SHAPE or any(torch.Tag.pointwise in o.tags for o in overloads)
