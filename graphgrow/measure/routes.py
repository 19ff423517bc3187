"""How the units of an axis get from the layers that write them to the layers that read them.

Moments join what producers read with what consumers want, position by position. That is possible
where units keep their positions on the way, or are flattened into a linear layer, and where what
happens to them is linear up to the slope of activations: no product of two of them, no maximum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from graphgrow.errors import NotApplicable
from graphgrow.ir.analyse import Analysis, Axis, Slot, Step
from graphgrow.ir.graph import Graph
from graphgrow.ir.outcome import Kind, aten
from graphgrow.measure.patches import Pool, Window, centred, in_place


@dataclass(frozen=True)
class Product:
    """One use of a weight: its step, its slot there, its dim of outputs, and how it reads space.

    `window` is None for linear layers and embeddings. `bias` is the path of what is added.
    """

    step: Step
    weight: str
    slot: int
    out: int
    window: Window | None = None
    bias: str | None = None

    @property
    def embeds(self) -> bool:
        """Whether it looks up rows."""
        return self.step.row.kind is Kind.GATHER


@dataclass(frozen=True, eq=False)
class Mix:
    """One use of attention: its values are summed over positions, all features of a head alike.

    `slot` is that of the values among the step's inputs; `heads` are the parts of a unit, each
    with weights of attention of its own.
    """

    step: Step
    slot: int
    heads: int


@dataclass(frozen=True)
class Feed:
    """One way from a producer to a consumer: the producer's use and what sums positions between."""

    product: Product
    pools: tuple[Pool | Mix, ...] = ()

    @property
    def mixes(self) -> tuple[Mix, ...]:
        """The uses of attention on the way."""
        return tuple(pool for pool in self.pools if isinstance(pool, Mix))


@dataclass(frozen=True, eq=False)
class Read:
    """One use of a consumer and what feeds it.

    `flat` is the number of positions that were flattened into the units' dim, 0 where none were.
    """

    product: Product
    feeds: frozenset[Feed]
    flat: int = 0


@dataclass(frozen=True, eq=False)
class Route:
    """All ways of one axis in one mode, by producers and consumers in the order of the axis.

    Producers of gates alone are left out. `parts` is the number of channels that one unit has, each
    with weights of its own: above 1 inside the groups of a convolution.
    """

    axis: str
    parts: int
    writes: Mapping[str, tuple[Product, ...]]
    reads: Mapping[str, tuple[Read, ...]]


def route(graph: Graph, name: str, mode: str = "eval") -> Route:
    """Return how the units of an axis get from its producers to its consumers.

    Raises:
        NotApplicable: where they do not keep their positions, or meet one another on the way.
    """
    axis = graph.axis(name)
    if axis.obstacle is not None:
        raise NotApplicable(axis.obstacle.replace("cannot widen", "cannot measure", 1))
    return _Walk(graph.analysis, axis, mode).run()


def products(analysis: Analysis, mode: str) -> dict[int, Product]:
    """Return every use of a weight in one mode, by the index of its step."""
    found = {i: _product(analysis, s) for i, s in enumerate(analysis.steps) if s.mode == mode}
    return {i: product for i, product in found.items() if product is not None}


def _product(analysis: Analysis, step: Step) -> Product | None:
    kind, name = step.row.kind, step.func.overloadpacket
    if name is aten.embedding:
        source = analysis.sources.get(step.inputs[0])
        return Product(step, source.path, 0, 1) if source and source.dims else None
    if kind is not Kind.CONTRACT:
        return None
    slots = [slot for slot in {s for s, _ in step.contracted} if slot != step.bias]
    weights = [s for s in slots if step.inputs[s] in analysis.sources]
    if len(slots) != 2 or len(weights) != 1:
        return None
    (slot,) = weights
    source = analysis.sources[step.inputs[slot]]
    added = None if step.bias is None else analysis.sources.get(step.inputs[step.bias])
    bias = None if added is None else added.path
    if name in _CONVOLUTIONS and not step.args[6]:
        space = len(analysis.values[step.inputs[slot]]) - 2  # one number may stand for all dims
        sides = (tuple(n) * (space if len(n) == 1 else 1) for n in step.args[3:6])
        window = Window(*sides, groups=_groups(analysis, step, slot))
        return Product(step, source.path, slot, 0, window, bias)
    if name not in _MATRICES or slot != max(slots) or not source.dims or len(source.dims) != 2:
        return None
    read = next(source.dims[dim] for s, dim in step.contracted if s == slot)
    return Product(step, source.path, slot, 1 - read, None, bias)


def _groups(analysis: Analysis, step: Step, slot: int) -> int:
    """Return a convolution's number of groups for the widths of now, which its call may not say."""
    x, weight = (analysis.values[step.inputs[s]] for s in (1 - slot, slot))
    widths, channels = analysis.widths(), x[-len(weight) + 1]
    return channels.size(widths) // weight[1].size(widths)


_CONVOLUTIONS = {aten.convolution, aten._convolution}
_MATRICES = {aten.mm, aten.addmm, aten.linear}


@dataclass(frozen=True, eq=False)
class _Carried:
    """What one value carries of an axis: which feeds, and how many positions in the units' dim.

    `rest` is what a new unit with zero incoming weights and neutral norms holds there, None where
    that is not known. Between layers and attention, heads move to a dim of their own and back:
    `codes` then are the places of all entries in the value that they come from, `origin`.
    """

    feeds: frozenset[Feed]
    flat: int = 0
    rest: float | None = 0.0
    codes: Tensor | None = None
    origin: int = -1


@dataclass(eq=False)
class _Walk:
    """Follows the units of an axis through the steps of one mode."""

    analysis: Analysis
    axis: Axis
    mode: str
    carried: dict[int, _Carried] = field(default_factory=dict)
    writes: dict[str, list[Product]] = field(default_factory=dict)
    reads: dict[str, list[Read]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.held = self.analysis.holding[self.axis.name]
        self.products = products(self.analysis, self.mode)

    def run(self) -> Route:
        for index, step in enumerate(self.analysis.steps):
            if step.mode == self.mode:
                self._step(step, self.products.get(index))
        if not self.reads:
            raise self._refusal("no layer reads what it writes")
        fed = {f.product for reads in self.reads.values() for r in reads for f in r.feeds}
        self.writes = {path: ps for path, ps in self.writes.items() if fed.intersection(ps)}
        parts = {self._parts(p.step.outputs[0]) for ps in self.writes.values() for p in ps}
        if len(parts) != 1:
            raise self._refusal("its producers write different numbers of channels for a unit")
        writes = {path: tuple(self.writes[path]) for path in self._ordered(self.writes)}
        reads = {path: tuple(self.reads[path]) for path in self._ordered(self.reads)}
        return Route(self.axis.name, parts.pop(), writes, reads)

    def _ordered(self, found: Mapping[str, Any]) -> list[str]:
        order = [at.path for at in (*self.axis.producers, *self.axis.consumers)]
        return sorted(found, key=lambda path: order.index(path) if path in order else len(order))

    def _refusal(self, fact: str) -> NotApplicable:
        name, width = self.axis.name, self.axis.width
        return NotApplicable(f"cannot measure axis '{name}' ({width} units): {fact}")

    def _step(self, step: Step, product: Product | None) -> None:
        incoming = [s for s, number in enumerate(step.inputs) if number in self.carried]
        meets = any(self.axis.name in over for over in step.contracted.values())
        if incoming and meets:
            self._read(step, product, incoming)
        elif incoming and any(o in self.held for o in step.outputs):
            self._pass(step, incoming)
        elif incoming:
            raise self._refusal(f"it is lost in {step.where}")
        if step.row.kind is Kind.CONTRACT and any(
            n in self.analysis.computed and n in self.held for n in step.inputs
        ):
            raise self._refusal(f"{step.where} writes it with a weight that is computed")
        if product is not None and step.outputs[0] in self.held and self._writes(step, product):
            self._write(step, product)

    def _writes(self, step: Step, product: Product) -> bool:
        """Return whether the weight, not the activation alone, gives the output its units."""
        weight = self.analysis.values[step.inputs[product.slot]]
        if self.axis.name in step.batched:
            if any(number in self.carried for number in step.inputs):
                return False
            raise self._refusal(f"{step.where} has filters of its own for each unit")
        dims = {dim for slot, dim in step.contracted if slot == product.slot}
        return any(
            self.axis.name in layout.axes() for d, layout in enumerate(weight) if d not in dims
        )

    def _write(self, step: Step, product: Product) -> None:
        self._grouped(product, step.outputs[0])
        self.writes.setdefault(product.weight, []).append(product)
        self.carried[step.outputs[0]] = _Carried(frozenset([Feed(product)]))

    def _read(self, step: Step, product: Product | None, incoming: list[int]) -> None:
        if product is None or len(incoming) != 1:
            raise self._refusal(f"{step.where} reads it with something else than a plain weight")
        carried = self.carried[step.inputs[incoming[0]]]
        if carried.codes is not None:
            carried = self._returned(step, step.inputs[incoming[0]], carried)
        if carried.flat and product.window is not None:
            raise self._refusal(f"{step.where} convolves positions that were flattened")
        self._grouped(product, step.inputs[incoming[0]])
        self._hooked(step)
        read = Read(product, carried.feeds, carried.flat)
        self.reads.setdefault(product.weight, []).append(read)

    def _grouped(self, product: Product, number: int) -> None:
        """Refuse groups that are not the parts of each unit."""
        if product.window and product.window.groups not in (1, self._parts(number)):
            raise self._refusal(f"{product.step.where} has groups that cut through its units")

    def _hooked(self, step: Step) -> None:
        """Refuse a layer whose output is not that of its node up to a view and a bias."""
        value = self.analysis.nodes.get((step.mode, step.node))
        reached = set(step.outputs)
        for later in self.analysis.steps:
            same = later.mode == step.mode and later.node == step.node
            if same and reached & set(later.inputs) and later.func.overloadpacket in _LAST:
                reached.update(later.outputs)
        if not isinstance(value, Slot) or value.number not in reached:
            raise self._refusal(f"{step.where} computes more than one layer in one call")

    def _pass(self, step: Step, incoming: list[int]) -> None:
        """Note what the outputs of a step carry that neither writes nor reads the units."""
        carried = [self.carried[step.inputs[s]] for s in incoming]
        for number in step.outputs:
            if number in self.held:
                found = self._passed(step, step.inputs[incoming[0]], number, carried)
                self.carried[number] = replace(found, rest=self._rest(step))

    def _passed(self, step: Step, before: int, after: int, carried: list[_Carried]) -> _Carried:
        kind, name, first = step.row.kind, step.func.overloadpacket, carried[0]
        if name is aten.bmm or kind is Kind.ATTEND:
            if len(carried) > 1:
                raise self._refusal(f"{step.where} weighs positions with it")
            return self._mixed(step, before, first)
        if first.codes is not None and kind is not Kind.MOVE:
            raise self._refusal(f"{step.where} comes where its positions are at other places")
        if self.analysis.windows(step, self.axis.name):
            raise self._refusal(f"{step.where} goes over neighbouring units")
        if kind is Kind.POINTWISE:
            gated = self._gated(step)
            return gated or _Carried(self._joined(step, carried), first.flat)
        if kind is Kind.NORM or name is aten.native_dropout:
            return first
        if kind in (Kind.SEPARATE, Kind.SUM) and name in _POOLS and not first.flat:
            return _Carried(self._pooled(step, before, first))
        if kind is Kind.MOVE and name in _MOVES and len(carried) == 1:
            return self._moved(step, before, after, first)
        if kind is Kind.CONTRACT and name in _CONVOLUTIONS and len(carried) == 1:
            return self._filtered(step, before, first)
        why = _LARGEST if name in _MAXIMA else _WHY
        raise self._refusal(f"{step.where} ('{name.__name__}') {why}")

    def _rest(self, step: Step) -> float | None:
        """Return what a new unit holds after a step where it starts with zero incoming weights."""
        rests = {n: self.carried[n].rest for n in step.inputs if n in self.carried}
        if step.row.kind is not Kind.POINTWISE or not set(step.inputs) <= set(rests):
            return 0.0 if set(rests.values()) == {0.0} and self._scales(step) else None
        if None in rests.values():
            return None

        def operand(a: Any) -> Any:
            return torch.tensor(rests[step.inputs[a.number]]) if isinstance(a, Slot) else a

        args, kwargs = tree_map(operand, (step.args, dict(step.kwargs)))
        return float(step.func(*args, **kwargs))

    def _scales(self, step: Step) -> bool:
        """Return whether a step keeps zeros: all but sums with something else do."""
        return step.func.overloadpacket not in _SUMS or step.row.kind is not Kind.POINTWISE

    def _gated(self, step: Step) -> _Carried | None:
        """Return what a product of units and their gates passes on, None where it is none."""
        inside = [n for n in step.inputs if n in self.carried]
        units = [n for n in inside if self.carried[n].rest == 0.0]
        if step.func.overloadpacket not in _PRODUCTS or len(inside) != 2 or len(units) != 1:
            return None
        (gate,) = set(inside) - set(units)
        whole = self._lattice(units[0]) == self._lattice(step.outputs[0])
        if self.carried[gate].rest is None or not whole:
            return None
        return self.carried[units[0]]

    def _filtered(self, step: Step, number: int, carried: _Carried) -> _Carried:
        """Return what filters of each unit's own pass on if those of new ones have a centre alone.

        Then a unit keeps its positions, or every so many of them.
        """
        product = _product(self.analysis, step)
        if product is None or product.window is None or self.axis.name not in step.batched:
            raise self._refusal(f"{step.where} ('convolution') {_WHY}")
        widths, weight = self.analysis.widths(), self.analysis.values[step.inputs[product.slot]]
        out, inside, *kernel = (layout.size(widths) for layout in weight)
        if inside != 1 or out != product.window.groups or carried.flat:
            raise self._refusal(f"{step.where} mixes the channels of each unit")
        if in_place(product.window, tuple(kernel)):
            return carried
        args = (tuple(kernel), product.window)
        dims, positions = self._dim(number), self._lattice(number)[1:]
        pool = Pool(centred, args, {}, dims, self._dim(step.outputs[0]), positions)
        return _Carried(frozenset(Feed(f.product, (*f.pools, pool)) for f in carried.feeds))

    def _pooled(self, step: Step, number: int, carried: _Carried) -> frozenset[Feed]:
        """Return the feeds after a linear pooling, which patches can go through as units do."""
        before, after = self._dim(number), self._dim(step.outputs[0])
        if before == 0:
            raise self._refusal(f"{step.where} pools it with its units first")
        positions = self._lattice(number)[1:]
        pool = Pool(step.func, step.args[1:], step.kwargs, before, after, positions)
        return frozenset(Feed(f.product, (*f.pools, pool)) for f in carried.feeds)

    def _joined(self, step: Step, carried: list[_Carried]) -> frozenset[Feed]:
        """Return what a pointwise operator passes on: one input's units, or the sum of several."""
        name = step.func.overloadpacket
        added = name in _SUMS and "alpha" not in step.kwargs
        if len(carried) > 1 and not added:
            raise self._refusal(f"{step.where} ('{name.__name__}') multiplies it with itself")
        shapes = {self._lattice(n) for n in step.inputs if n in self.carried}
        ways = [f.product for c in carried for f in c.feeds]
        if (
            len(shapes) > 1
            or len({c.flat for c in carried}) > 1
            or len({*map(id, ways)}) < len(ways)
        ):
            raise self._refusal(f"{step.where} adds it to itself at another place")
        for number in step.inputs:
            plain = number in self.carried or number in self.analysis.sources
            if not plain and name not in _SUMS and self.analysis.values[number]:
                raise self._refusal(f"{step.where} ('{name.__name__}') multiplies it with data")
        return frozenset(f for c in carried for f in c.feeds)

    def _moved(self, step: Step, number: int, out: int, carried: _Carried) -> _Carried:
        """Return what a move keeps: positions in their order, or flattened into the units' dim."""
        if carried.codes is not None and len(step.inputs) == 1:
            return self._coded(step, out, carried)
        if carried.codes is not None:
            raise self._refusal(f"{step.where} joins it where its positions are at other places")
        before, after = self._lattice(number), self._lattice(out)
        parts, places = self._parts(number), self._parts(out)
        if parts == places and math.prod(before) == math.prod(after):
            if self._in_order(step, number):
                return carried
        elif parts == 1 and before[:1] == after and places == math.prod(before[1:]):
            layout = self.analysis.values[out][self._dim(out)]
            first = next(t for t in layout.terms if self.axis.name in t)[0]
            if first == self.axis.name and not carried.flat:
                return _Carried(carried.feeds, places)
        if carried.flat or len(step.outputs) > 1 or len(step.inputs) > 1:
            raise self._refusal(f"{step.where} moves its positions to other places")
        return self._coded(step, out, self._placed(number, carried.feeds))

    # ------------------------------------------------------------ attention

    def _placed(self, number: int, feeds: frozenset[Feed]) -> _Carried:
        """Return what a value carries, with codes of where its entries are."""
        shape = self._shape(number)
        codes = torch.arange(math.prod(shape)).reshape(shape)
        return _Carried(feeds, codes=codes, origin=number)

    def _coded(self, step: Step, out: int, carried: _Carried) -> _Carried:
        """Return where a move takes every entry of the value that is carried."""
        args: list[Any] = [carried.codes if isinstance(a, Slot) else a for a in step.args]
        shape = self._shape(out)  # of the widths of now; a call may state those of before
        if step.func.overloadpacket in _VIEWS:  # of the strides that the real value has
            found = args[0].reshape(shape)
        elif step.func.overloadpacket is aten.expand:
            found = args[0].expand(shape)
        else:
            found = step.func(*args, **step.kwargs)
        found = found if isinstance(found, Tensor) else found[step.outputs.index(out)]
        if list(found.shape) != shape:
            raise self._refusal(f"{step.where} states sizes of before it grew; trace it anew")
        return replace(carried, codes=found)

    def _mixed(self, step: Step, number: int, carried: _Carried) -> _Carried:
        """Return what attention passes on of its values, heads being the parts of each unit."""
        if carried.codes is None:
            carried = self._placed(number, carried.feeds)
        slot, codes = step.inputs.index(number), carried.codes
        attends = step.row.kind is Kind.ATTEND
        if slot != (2 if attends else 1) or carried.flat or codes is None:
            raise self._refusal(f"{step.where} weighs positions with it")
        if attends and (codes.dim() != 4 or argument(step, "dropout_p", 0.0)):
            raise self._refusal(f"{step.where} attends without heads, or with dropout")
        units, columns = self._units(number), self._columns(carried.origin)
        heads, (places, size) = columns.shape[1], codes.shape[-2:]
        found = codes.reshape(-1, heads, places, size)
        rows = torch.arange(len(found) * places).reshape(-1, 1, places, 1)
        mine = columns[units].T[:, None]  # (heads, 1, size)
        if not torch.equal(found, rows * self._shape(carried.origin)[-1] + mine):
            raise self._refusal(f"{step.where} attends to it in another order")
        mix = Mix(step, slot, heads)
        feeds = frozenset(Feed(f.product, (*f.pools, mix)) for f in carried.feeds)
        return self._placed(step.outputs[0], feeds)

    def _returned(self, step: Step, number: int, carried: _Carried) -> _Carried:
        """Return what a layer reads of attention's output, if it comes back in its order."""
        codes, mixes = carried.codes, {f.mixes[-1:] for f in carried.feeds}
        if codes is None or len(mixes) != 1 or mixes == {()}:
            raise self._refusal(f"{step.where} reads positions that were moved to other places")
        ((mix,),) = mixes
        columns, units = self._columns(number), self._units(carried.origin)
        places, size = self._shape(carried.origin)[-2:]
        rows = torch.arange(codes.numel() // codes.shape[-1]).reshape(-1, 1, 1)
        heads = rows // places * mix.heads + torch.arange(mix.heads)
        expected = (heads * places + rows % places) * size + torch.arange(size)[:, None]
        if columns.shape[1] == mix.heads:
            here = codes.reshape(len(rows), -1)[:, columns[units]]  # (rows, size, heads)
            if torch.equal(here, expected):
                return _Carried(carried.feeds)
        raise self._refusal(f"{step.where} reads what attention gives in another order")

    def _units(self, number: int) -> Tensor:
        """Return which unit each position of the last dim belongs to."""
        layout = self.analysis.values[number][-1]
        units = torch.as_tensor(layout.units(self.analysis.widths(), self.axis.name))
        if (units < 0).any():
            raise self._refusal("it is not alone in the last dim of what attention sums or gives")
        return units

    def _columns(self, number: int) -> Tensor:
        """Return the positions of each unit's parts in a value's last dim, `(units, parts)`."""
        units = self._units(number)
        return torch.argsort(units, stable=True).reshape(self.axis.width, -1)

    def _shape(self, number: int) -> list[int]:
        widths = self.analysis.widths()
        return [layout.size(widths) for layout in self.analysis.values[number]]

    def _in_order(self, step: Step, number: int) -> bool:
        """Return whether a move keeps the order of all dims but the units'."""
        dims = list(range(len(self.analysis.values[number])))
        name = step.func.overloadpacket.__name__
        if name in ("transpose", "t", "transpose_"):
            i, j = (0, 1) if name == "t" else step.args[1:3]
            dims[i], dims[j] = dims[j], dims[i]
        elif name == "permute":
            dims = [d % len(dims) for d in step.args[1]]
        kept = [d for d in dims if d != self._dim(number)]
        return kept == sorted(kept)

    def _dim(self, number: int) -> int:
        dims = [d for d, x in enumerate(self.analysis.values[number]) if self.axis.name in x.axes()]
        if len(dims) != 1:
            raise self._refusal("one value has it in two dims")
        return dims[0]

    def _parts(self, number: int) -> int:
        layout = self.analysis.values[number][self._dim(number)]
        units = layout.units(self.analysis.widths(), self.axis.name)
        return int((units == 0).sum())

    def _lattice(self, number: int) -> tuple[int, ...]:
        """Return the sizes of all dims of a value but the units', ones left out."""
        at, widths = self._dim(number), self.analysis.widths()
        sizes = [x.size(widths) for d, x in enumerate(self.analysis.values[number]) if d != at]
        return tuple(sizes)


def argument(step: Step, name: str, default: Any) -> Any:
    """Return an argument of a step's operator by its name."""
    names = [a.name for a in step.func._schema.arguments]
    return {**dict(zip(names, step.args, strict=False)), **step.kwargs}.get(name, default)


_LARGEST = "takes the largest of a new unit's own values, which depends on its weights"
_WHY = "does not pass each unit on at its place and in proportion"
_LAST = {aten.view, aten._unsafe_view, aten.add, aten.add_}
_SUMS = {aten.add, aten.add_}
_VIEWS = {aten.view, aten._unsafe_view, aten._reshape_alias}
_PRODUCTS = {aten.mul, aten.mul_}
_MOVES = {
    getattr(aten, name)
    for name in (
        "view _unsafe_view reshape _reshape_alias transpose t permute unsqueeze squeeze expand cat "
        "split split_with_sizes chunk unbind select slice _to_copy clone detach alias contiguous "
        "lift_fresh"
    ).split()
}
_POOLS = {
    getattr(aten, name)
    for name in (
        "avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d "
        "adaptive_avg_pool1d mean upsample_nearest1d upsample_nearest2d upsample_nearest3d "
        "upsample_linear1d upsample_bilinear2d upsample_trilinear3d"
    ).split()
}
_MAXIMA = {
    getattr(aten, name)
    for name in (
        "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices "
        "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d amax max"
    ).split()
}
