"""Numbers in calls that state a size: the ones that an edit of an axis must change."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch.fx.node import map_aggregate

from graphgrow.errors import NotApplicable
from graphgrow.ir.analyse import Analysis, Slot
from graphgrow.ir.attributes import Sizes
from graphgrow.ir.layout import Layout

Numbers = dict[tuple[str, str], Any]


def resize(
    structure: fx.Graph,
    analysis: Analysis,
    mode: str,
    among: Container[tuple[str, str]],
    widths: Mapping[str, int],
    scaled: Mapping[tuple[str, str], float],
) -> tuple[fx.Graph, Numbers]:
    """Return `structure` with the sizes stated in calls changed to what `widths` make them.

    `among` has the nodes to look at, by mode and name, `scaled` a factor for the number in a call
    that is no size: what it adds to a statistic, or multiplies with. The same graph comes back
    where nothing changes; a changed node's meta says so in `edited`. The second part has the new
    value of each of these nodes that computes a number.

    Raises:
        NotApplicable: where a size cannot be stated anew.
    """
    edits = _Edits(analysis, mode, widths, scaled)
    nodes = [node for node in structure.nodes if (mode, node.name) in among]
    found = dict(_changed(edits, nodes))
    numbers = {
        (mode, node.name): edits.number(node)
        for node in nodes
        if type(edits.number_before(node)) in (int, float)
    }
    if not found:
        return structure, numbers
    made, copies = fx.Graph(), {}
    made.output(made.graph_copy(structure, copies))
    products = _Products(made, copies)
    for node, (target, args, kwargs) in found.items():
        copy = copies[node]
        copy.target = target
        copy.args, copy.kwargs = (map_aggregate(a, products.argument) for a in (args, kwargs))
        copy.meta["edited"] = f"{_called(node)}{_said(node.args)} becomes {_said(copy.args)}"
    for product, node in products.written.items():
        numbers[mode, node.name] = edits.number(product)
        if not copies[product.size].users:
            made.erase_node(copies[product.size])
    return made, numbers


@dataclass(frozen=True)
class _Product:
    """The product of sizes of the run and one number, which is to be another: `units`."""

    size: fx.Node
    units: int


class _Products:
    """What stands in a new graph for the arguments of the old one: products are written anew."""

    def __init__(self, graph: fx.Graph, copies: Mapping[fx.Node, fx.Node]) -> None:
        self.graph, self.copies = graph, copies
        self.written: dict[_Product, fx.Node] = {}

    def argument(self, given: Any) -> Any:
        """Return an argument of the new graph."""
        if isinstance(given, fx.Node):
            return self.copies[given]
        if not isinstance(given, _Product):
            return given
        if given not in self.written:
            old = self.copies[given.size]
            with self.graph.inserting_before(old):
                new = self.graph.node_copy(old, lambda n: n)
            new.args = tuple(given.units if isinstance(a, int) else a for a in old.args)
            self.written[given] = new
        return self.written[given]


def _changed(edits: _Edits, nodes: Sequence[fx.Node]) -> Iterator[tuple[fx.Node, Call]]:
    for node in nodes:
        try:
            new = edits.of(node)
        except NotApplicable as error:
            where = node.meta.get("module") or "the model"
            raise NotApplicable(f"cannot resize {_called(node)} in '{where}': {error}") from None
        if new is not None:
            yield node, new


def _called(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else node.target.__name__


def _said(args: Any) -> str:
    return str(fx.map_arg(args, lambda n: n.name)).replace("'", "")


Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


class _Edits:
    """The calls of one structure, seen with the widths before and after."""

    def __init__(
        self,
        analysis: Analysis,
        mode: str,
        widths: Mapping[str, int],
        scaled: Mapping[tuple[str, str], float],
    ) -> None:
        self.analysis, self.mode, self.scaled = analysis, mode, scaled
        self.before, self.after = analysis.widths(), widths
        self.numbers: dict[fx.Node, Any] = {}

    def of(self, node: fx.Node) -> Call | None:
        """Return target and arguments of a call that must change, None for all others."""
        if node.op not in ("call_function", "call_method"):
            return None
        as_it_is = _call(node)
        rule = _RULES.get(_called(node))
        changed = (rule(self, node) if rule is not None else None) or as_it_is
        factor = self.scaled.get((self.mode, node.name))
        if factor is not None:
            changed = _with_number(self, changed, factor)
        if type(self.number_before(node)) not in (int, float):
            changed = self._with_values_kept(node, changed)
        return None if changed == as_it_is else changed

    def _with_values_kept(self, node: fx.Node, call: Call) -> Call:
        """Return a call in which a size that serves as a number stays the number that it was."""
        target, args, named = call
        first = _TAKE_SIZES.get(_called(node), 0)
        if first is None:
            return call
        rest = fx.map_arg(tuple(args[first:]), self._value)
        sizes = {name: named[name] for name in ("size", "shape") if first and name in named}
        return target, (*args[:first], *rest), {**fx.map_arg(named, self._value), **sizes}

    def _value(self, arg: fx.Node) -> Any:
        """Return the number that `arg` was before the edit where it would be another one now."""
        before = self.number_before(arg)
        if type(before) not in (int, float) or before == self.number(arg):
            return arg
        if not self._is_of_axes(arg):
            raise NotApplicable(
                f"the number '{arg.name}' mixes the width with other sizes, and should not change"
            )
        return before

    def constant(self, arg: Any) -> Any:
        """Return a number as it was, if it is stated or computed from the width that is edited."""
        before = self.number_before(arg)
        computed = isinstance(arg, fx.Node)
        if computed and (before == self.number(arg) or not self._is_of_axes(arg)):
            raise NotApplicable(
                f"the number '{arg.name}' would have to be another one, and it is computed"
            )
        return before

    def _is_of_axes(self, node: fx.Node) -> bool:
        """Return whether a number is computed from widths of axes and literals alone."""
        if node.op == "call_method" and node.target in ("size", "numel"):
            dims = self.dims(node.args[0])
            if dims is None:
                return False
            asked = dims if node.target == "numel" else [dims[self.number(node.args[1])]]
            return not any(map(_has_free_sizes, asked))
        return all(map(self._is_of_axes, node.all_input_nodes))

    def dims(self, node: Any, part: int | None = None) -> Sequence[Layout] | None:
        """Return the layouts of a node's tensor, None where it is not one tensor."""
        value = (
            self.analysis.nodes.get((self.mode, node.name)) if isinstance(node, fx.Node) else None
        )
        if part is not None and isinstance(value, tuple | list):
            value = value[part]
        return self.analysis.values[value.number] if isinstance(value, Slot) else None

    def moves(self, layout: Layout) -> bool:
        """Return whether an edit changes a layout's size."""
        return layout.size(self.before) != layout.size(self.after)

    def number(self, arg: Any) -> Any:
        """Return what an int argument will be when the edited graph runs."""
        if isinstance(arg, _Product):
            return self.number(_factor(arg.size)) * arg.units
        if not isinstance(arg, fx.Node):
            return arg
        if arg not in self.numbers:
            self.numbers[arg] = self._computed(arg)
        return self.numbers[arg]

    def _computed(self, node: fx.Node) -> Any:
        value = self.analysis.nodes.get((self.mode, node.name))
        if node.op == "call_method" and node.target == "size" and len(node.args) == 2:
            dims = self.dims(node.args[0])
            return value if dims is None else dims[self.number(node.args[1])].size(self.after)
        if node.op == "call_method" and node.target == "numel":
            dims = self.dims(node.args[0])
            return value if dims is None else math.prod(d.size(self.after) for d in dims)
        if node.op == "call_function" and getattr(node.target, "__module__", "") in _ARITHMETIC:
            args = [self.number(a) for a in node.args]
            if isinstance(value, int | float) and all(isinstance(a, int | float) for a in args):
                return cast(Callable[..., Any], node.target)(*args)
        return value

    def stated(self, arg: Any, layout: Layout) -> Any:
        """Return the argument that states a dim's size: as it is where it comes out right."""
        new, now = layout.size(self.after), self.number(arg)
        if now in (new, -1) or layout.size(self.before) != self.number_before(arg):
            return arg
        if isinstance(arg, fx.Node) and _has_free_sizes(layout):
            factor = _factor(arg)
            if factor is not None and self.number_before(factor) == _free_size(layout):
                return _Product(arg, new // self.number(factor))
            raise NotApplicable(
                f"the size '{arg.name}' is computed in a way that does not follow the new width"
            )
        return new

    def number_before(self, arg: Any) -> Any:
        """Return what an int argument was in the recorded run."""
        return self.analysis.nodes.get((self.mode, arg.name)) if isinstance(arg, fx.Node) else arg


_ARITHMETIC = ("_operator", "operator", "math", "builtins")


def _has_free_sizes(layout: Layout) -> bool:
    return any(
        _has_free_sizes(f) if isinstance(f, Layout) else isinstance(f, int) and f > 1
        for term in layout.terms
        for f in term
    )


def _free_size(layout: Layout) -> int | None:
    """Return what the sizes in a layout that are no axes multiply to, None where terms differ."""
    found = {math.prod(f for f in term if isinstance(f, int)) for term in layout.apart()}
    return found.pop() if len(found) == 1 else None


def _factor(size: fx.Node) -> fx.Node | None:
    """Return the size that a size is a multiple of by a number in the code, None if it is none."""
    if size.target is not operator.mul or sorted(isinstance(a, int) for a in size.args) != [0, 1]:
        return None
    return size.all_input_nodes[0]


def _arguments(node: fx.Node) -> list[Any]:
    return list(node.args)


def _sizes(first: int) -> Callable[[_Edits, fx.Node], Call | None]:
    """Return the rule of a call whose sizes, spread or in one list, begin at argument `first`."""

    def rule(edits: _Edits, node: fx.Node) -> Call | None:
        dims, args, named = edits.dims(node), _arguments(node), dict(node.kwargs)
        by_name = next((name for name in ("size", "shape") if name in named), None)
        given: Any = args[first:] if by_name is None else [named[by_name]]
        listed = len(given) > 0 and isinstance(given[0], list | tuple)
        stated = list(given[0]) if listed else given
        if dims is None or len(stated) != len(dims):
            return None
        new = [
            edits.stated(a, d) if isinstance(a, int | fx.Node) else a
            for a, d in zip(stated, dims, strict=True)
        ]
        if by_name is not None:
            return node.target, tuple(args), {**named, by_name: tuple(new)}
        tail = [tuple(new), *args[first + 1 :]] if listed else new
        return node.target, (*args[:first], *tail), named

    return rule


def _repeat_interleave(edits: _Edits, node: fx.Node) -> Call | None:
    """Repeat as often as there are units in the axis that the repeats became."""
    x, repeats, *rest = _arguments(node)
    dim = rest[0] if rest else node.kwargs.get("dim")
    before, after = edits.dims(x), edits.dims(node)
    if before is None or after is None or not isinstance(dim, int) or not isinstance(repeats, int):
        return None
    new = after[dim].size(edits.after) // before[dim].size(edits.after)
    return node.target, (x, new, *rest), dict(node.kwargs)


def _unflatten(edits: _Edits, node: fx.Node) -> Call | None:
    dims = edits.dims(node)
    if dims is None or len(node.args) != 3:
        return None
    x, dim, sizes = _arguments(node)
    before = edits.dims(x)
    at = dim % len(before) if before is not None and isinstance(dim, int) else 0
    stated = [edits.stated(a, d) for a, d in zip(sizes, dims[at : at + len(sizes)], strict=True)]
    return node.target, (x, dim, tuple(stated)), dict(node.kwargs)


def _split(edits: _Edits, node: fx.Node) -> Call | None:
    """Split by the pieces' own sizes where one size, or a count, would give others."""
    x, sizes, *rest = _arguments(node)
    at = rest[0] if rest else node.kwargs.get("dim", 0)
    pieces = _pieces(edits, node, at)
    if pieces is None or not any(edits.moves(p) for p in pieces):
        return None
    wanted = [p.size(edits.after) for p in pieces]
    if _called(node) in ("chunk", "tensor_split") or not isinstance(sizes, list | tuple):
        whole = sum(wanted)
        if _called(node) == "split":
            step = edits.number(sizes)
            usual = [min(step, whole - start) for start in range(0, whole, step)]
        else:
            step = -(-whole // edits.number(sizes))
            usual = [min(step, whole - start) for start in range(0, whole, step)]
        if usual == wanted:
            return None
        if _called(node) == "split" and len({*wanted}) == 1:
            return node.target, (x, wanted[0], *rest), dict(node.kwargs)
    elif [edits.number(s) for s in sizes] == wanted:
        return None
    target = "split" if node.op == "call_method" else torch.split
    return target, (x, wanted, *rest), dict(node.kwargs)


def _pieces(edits: _Edits, node: fx.Node, at: Any) -> list[Layout] | None:
    value = edits.analysis.nodes.get((edits.mode, node.name))
    if not isinstance(value, tuple | list) or not all(isinstance(v, Slot) for v in value):
        return None
    return [edits.analysis.values[v.number][at] for v in value]


def _indexed(edits: _Edits, node: fx.Node) -> Call | None:
    """Read or write between the same boundaries, wherever they are now."""
    x, index, *value = _arguments(node)
    before = edits.dims(x)
    items = index if isinstance(index, tuple) else (index,)
    if before is None or not any(isinstance(i, slice) for i in items):
        return None
    after: list[Any] = []
    d = 0
    for i, item in enumerate(items):
        if item is Ellipsis:
            d = len(before) - sum(o is not None for o in items[i + 1 :])
        elif item is not None:
            if isinstance(item, slice) and edits.moves(before[d]):
                item = _bounds(edits, item, before[d])
            d += 1
        after.append(item)
    new = tuple(after) if isinstance(index, tuple) else after[0]
    return node.target, (x, new, *value), dict(node.kwargs)


def _bounds(edits: _Edits, item: slice, layout: Layout) -> slice:
    if item.step not in (None, 1):
        raise NotApplicable("a slice with a step has no new bounds")
    return slice(_bound(edits, item.start, layout), _bound(edits, item.stop, layout), item.step)


def _bound(edits: _Edits, bound: Any, layout: Layout) -> Any:
    """Return a slice's bound moved to where the same boundary between parts is now."""
    old = edits.number_before(bound)
    if old is None or not isinstance(old, int):
        return bound
    whole, new_whole = layout.size(edits.before), layout.size(edits.after)
    from_end = old < 0
    place = old + whole if from_end else min(old, whole)
    passed = new = 0
    for term in layout.terms:
        if passed == place:
            break
        part = Layout((term,))
        passed, new = passed + part.size(edits.before), new + part.size(edits.after)
    if old > whole:
        return bound
    wanted = new - new_whole if from_end else new
    if wanted == edits.number(bound):
        return bound
    if passed != place:
        raise NotApplicable(f"the slice bound {old} falls inside the axis that is edited")
    return wanted


def _narrow(edits: _Edits, node: fx.Node) -> Call | None:
    given: list[Any] = [*_arguments(node), *node.kwargs.values()]
    x, dim, start, length = given
    before, out = edits.dims(x), edits.dims(node)
    if before is None or out is None or not edits.moves(before[dim]):
        return None
    start = _bound(edits, start, before[dim])
    return node.target, (x, dim, start, edits.stated(length, out[dim])), {}


def _layer_norm(edits: _Edits, node: fx.Node) -> Call | None:
    """State the new width."""
    dims, args, named = edits.dims(node), _arguments(node), dict(node.kwargs)
    if dims is None or not edits.moves(dims[-1]):
        return None
    new = (dims[-1].size(edits.after),)
    if len(args) > 1:
        return node.target, (args[0], new, *args[2:]), named
    return node.target, tuple(args), {**named, "normalized_shape": new}


def _grouped(position: int, name: str) -> Callable[[_Edits, fx.Node], Call | None]:
    """Return the rule of a call on channels that states a number of groups."""

    def rule(edits: _Edits, node: fx.Node) -> Call | None:
        dims, args, named = edits.dims(node.args[0]), _arguments(node), dict(node.kwargs)
        at: Any = position if len(args) > position else name
        holder: Any = args if at == position else named
        groups = holder[at] if at == position or name in named else None
        old = edits.number_before(groups)
        if dims is None or not isinstance(old, int) or old == 1:
            return None
        new = Sizes({}, dims, edits.before, edits.after).lead(dims[1], old)
        if new == edits.number(groups):
            return None
        holder[at] = new
        return node.target, tuple(args), named

    return rule


def _attention(edits: _Edits, node: fx.Node) -> Call | None:
    """Keep the scale where the features of queries and keys change their number."""
    target, args, named = _call(node)
    dims = edits.dims(args[0] if args else named["query"])
    if dims is None:
        return None
    old, new = (1 / math.sqrt(dims[-1].size(w)) for w in (edits.before, edits.after))
    scale = edits.number_before(named.pop("scale", None))
    scale = old if scale is None else scale
    return target, args, named if scale == new else {**named, "scale": scale}


def _call(node: fx.Node) -> Call:
    return node.target, tuple(node.args), dict(node.kwargs)


# position and default of the number that a norm adds to a spread, or bounds a length by
_EPS = {
    "layer_norm": (4, 1e-5),
    "rms_norm": (3, None),
    "group_norm": (4, 1e-5),
    "normalize": (3, 1e-12),
    "cosine_similarity": (3, 1e-8),
}
_BOUNDED = {"clamp", "clip", "clamp_min", "clamp_max"}
_ONE_NUMBER = {"add", "iadd", "radd", "sub", "isub", "mul", "imul", "rmul", "multiply"}
_ONE_NUMBER |= {"div", "truediv", "itruediv", "divide", "true_divide"}


def _with_number(edits: _Edits, call: Call, factor: float) -> Call:
    """Return a call with the number that it adds, or multiplies with, multiplied by `factor`."""
    target, args, named = call
    name = target if isinstance(target, str) else target.__name__
    if name in _EPS:
        at, usual = _EPS[name]
        eps = named.get("eps", args[at] if len(args) > at else usual)
        eps = edits.number_before(eps)
        if eps is not None:
            return target, args[:at], {**named, "eps": eps * factor}
        raise NotApplicable("its eps is not given, so it depends on the precision; give one")
    if name == "scaled_dot_product_attention":
        return target, args, {**named, "scale": _stated_scale(edits, call) * factor}
    places = [i for i, a in enumerate(args) if type(edits.number_before(a)) in (int, float)]
    by_name = [n for n, a in named.items() if type(edits.number_before(a)) in (int, float)]
    bounded, count = name.strip("_") in _BOUNDED, len(places) + len(by_name)
    if not (bounded and count) and not (name.strip("_") in _ONE_NUMBER and count == 1):
        raise NotApplicable(f"its number would have to be multiplied by {factor:.6g}")
    new = [edits.constant(a) * factor if i in places else a for i, a in enumerate(args)]
    more = {n: edits.constant(named[n]) * factor for n in by_name}
    return target, tuple(new), {**named, **more}


def _stated_scale(edits: _Edits, call: Call) -> float:
    """Return the scale of an attention, torch's own where none is stated."""
    _, args, named = call
    scale, dims = named.get("scale"), edits.dims(args[0] if args else named["query"])
    if scale is not None:
        return edits.number_before(scale)
    if dims is None:
        raise NotApplicable("its scale is not known")
    return dims[-1].size(edits.after) ** -0.5


# Calls whose numbers are sizes or positions: all of them, or those before an argument.
_TAKE_SIZES: dict[str, int | None] = {
    **dict.fromkeys(
        "__getitem__ __setitem__ arange as_strided broadcast_to channel_shuffle chunk conv1d "
        "conv2d conv3d diagonal empty expand eye flatten getitem group_norm index_select "
        "interpolate layer_norm linspace narrow new_empty new_ones new_zeros one_hot ones pad "
        "pixel_shuffle rand randint randn randperm repeat repeat_interleave reshape rms_norm "
        "roll select split split_with_sizes tensor_split tile topk tril tril_indices triu "
        "triu_indices unflatten unfold view zeros".split()
    ),
    "full": 1,
    "new_full": 2,
}

_RULES: dict[str, Callable[[_Edits, fx.Node], Call | None]] = {
    **dict.fromkeys(("view", "reshape", "expand", "broadcast_to"), _sizes(1)),
    "repeat_interleave": _repeat_interleave,
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty", "new_full"), _sizes(1)),
    **dict.fromkeys(("zeros", "ones", "empty", "full", "rand", "randn"), _sizes(0)),
    "unflatten": _unflatten,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), _split),
    **dict.fromkeys(("getitem", "__getitem__", "__setitem__"), _indexed),
    "narrow": _narrow,
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    "group_norm": _grouped(1, "num_groups"),
    "channel_shuffle": _grouped(1, "groups"),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _grouped(6, "groups")),
    "scaled_dot_product_attention": _attention,
}
