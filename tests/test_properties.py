"""What holds for every rewrite of every network: one test for each property."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from strategies import (
    Drawn,
    Network,
    axes,
    deepenings,
    fill,
    networks,
    requests,
    sequences,
    widenings,
)
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import graphgrow as gg
from graphgrow.nn import CapNorm
from graphgrow.passes.apply import chained
from graphgrow.passes.journal import rewrite_from_json, rewrites_to_json
from graphgrow.passes.rewrite import Edit, TensorOrigin
from graphgrow.passes.units import gather, is_new

EXACT = 1e-10
few = settings(max_examples=max(25, settings().max_examples // 2))

# A gradient that is zero but for rounding, as before a batch norm, is divided by its own size: eps
# is large enough that the step of such an entry is rounding as well.
ENTRYWISE: dict[str, Callable[[gg.Graph], torch.optim.Optimizer]] = {
    "SGD": lambda g: torch.optim.SGD(learned(g), 0.01, momentum=0.9, weight_decay=0.01),
    "Adam": lambda g: torch.optim.Adam(learned(g), 1e-3, eps=1e-3),
    "AdamW": lambda g: torch.optim.AdamW(learned(g), 1e-3, eps=1e-3, weight_decay=0.1),
    "RMSprop": lambda g: torch.optim.RMSprop(learned(g), 1e-3, eps=1e-3),
}
RADIAL = {"lr": 0.1, "radial_lr": 0.01, "penalty": 0.1, "eps": 1e-4, "rest_lr": 1e-3}
FANWISE: dict[str, Callable[[gg.Graph], gg.AdaRad]] = {
    "AdaRad": lambda g: gg.AdaRad(g, **RADIAL),
    "AdaRadM": lambda g: gg.AdaRadM(g, **RADIAL),
}
OPTIMIZERS = {**ENTRYWISE, **FANWISE}


def learned(graph: gg.Graph) -> list[nn.Parameter]:
    """Return the parameters of a graph, tied ones once."""
    return list(gg.lower(graph).parameters())


def anything(graph: gg.Graph) -> Any:
    """Return requests for any rewrite, also for such as change what the graph computes."""
    return requests(graph, exact=False)


@dataclass(frozen=True)
class Growth:
    """A network, its graph, and a rewrite applicable to it."""

    net: Drawn
    graph: gg.Graph
    rewrite: Any

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(f"{self.net}\n{self.graph}\n{self.rewrite}")


@st.composite
def growths(draw: st.DrawFn, kind: Callable[[gg.Graph], Any] = requests, **taste: bool) -> Growth:
    """Return networks with their graphs and applicable rewrites."""
    net = draw(networks(**taste))
    graph = net.trace()
    rewrite = draw(kind(graph).filter(lambda rewrite: rewrite.obstacle(graph) is None))
    return Growth(net, graph, rewrite)


@st.composite
def widened(draw: st.DrawFn, scheme: Any, **taste: bool) -> Growth:
    """Return networks with their graphs and applicable widenings by one scheme."""
    net = draw(networks(**taste))
    graph = net.trace()
    free = [name for name, axis in graph.axes.items() if axis.obstacle is None]
    assume(free)
    rewrite = draw(widenings(graph, scheme, draw(st.sampled_from(free))))
    assume(rewrite.obstacle(graph) is None)
    return Growth(net, graph, rewrite)


def entries(grown: gg.Grown, path: str, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Return old values and the new ones that come from them, at the places they have now."""
    origin = grown.origin.get(path, TensorOrigin((None,) * old.dim()))
    kept = ~is_new(origin, new.shape)
    return gather(old, origin)[kept], new.detach()[kept]


def gradients(graph: gg.Graph, x: Tensor, training: bool) -> dict[str, Tensor]:
    """Return the gradients of a fixed function of the outputs, by path."""
    model = copy.deepcopy(gg.lower(graph)).train(training)
    out = model(x)
    (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).reshape(out.shape)).sum().backward()
    return {
        p: t.grad if t.grad is not None else torch.zeros_like(t)
        for p, t in model.named_parameters(remove_duplicate=False)
    }


def largest(tensors: Iterable[Tensor]) -> float:
    return max((float(t.abs().max()) for t in tensors if t.numel()), default=0.0)


def closeness(pairs: Iterator[tuple[Tensor, Tensor]], size: float = 0.0) -> float:
    """Return the largest difference in pairs relative to the largest first one, or to `size`."""
    listed = [(a, b) for a, b in pairs if a.numel() and a.is_floating_point()]
    size = size or largest(a for a, _ in listed)
    gap = max((float((a - b).abs().max()) for a, b in listed), default=0.0)
    return gap / size if gap else 0.0


# ------------------------------------------------------------------------------ the function


def check_function(
    net: Drawn, before: Any, after: Any, modes: tuple[str, ...] = ("train", "eval")
) -> None:
    for batch, seed in ((3, 0), (5, 1)):
        found = gg.compare(before, after, net.inputs(batch, seed))
        assert all(getattr(found, mode).relative <= EXACT for mode in modes), f"{found}"


@given(growths(lambda graph: requests(graph, both=False)))
def test_a_rewrite_preserves_the_function_in_the_modes_of_its_proof(growth: Growth) -> None:
    grown = gg.apply(growth.graph, growth.rewrite)
    layer = getattr(growth.rewrite, "layer", None)
    both = not (isinstance(layer, gg.Identity) and layer.norm)
    assert grown.proof.modes == (("train", "eval") if both else ("eval",))
    check_function(growth.net, growth.net.model, grown.graph, grown.proof.modes)


def check_sequence(net: Drawn, graph: gg.Graph, steps: tuple[Any, ...]) -> None:
    """Assert that rewrites applied together are those applied in turn, in tensors and origin."""
    once, now, origin = gg.apply(graph, *steps), graph, {}
    for step in steps:
        grown = gg.apply(now, step)
        now, origin = grown.graph, chained(origin, grown.origin)
    if not any(isinstance(step, gg.Cap) for step in steps):
        check_function(net, net.model, once.graph)
    assert str(now) == str(once.graph) and now.journal == once.graph.journal
    assert list(now.state) == list(once.graph.state)
    assert all(torch.equal(t, once.graph.state[p]) for p, t in now.state.items())
    assert once.origin.keys() <= graph.state.keys()
    for path in graph.state:
        assert (path in origin) == (path in once.origin)
        if path in origin and path in once.graph.state:  # a norm that is capped has no weight left
            check_same_origin(origin[path], once.origin[path], once.graph.state[path].shape)


def test_the_last_of_several_groups_is_an_ordinary_layer() -> None:
    layers = [nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 3, groups=3, bias=False), nn.Conv2d(3, 1, 1)]
    net = Drawn(fill(Network(layers).double(), 0), (2, 4, 4))
    with torch.no_grad():
        layers[2].weight[:, :2] = 0
    steps = gg.Remove("blocks.0", (0, 1)), gg.Widen("blocks.0", 2), gg.Widen("blocks.1", 1)
    check_sequence(net, net.trace(), steps)


def check_same_origin(one: TensorOrigin, two: TensorOrigin, shape: torch.Size) -> None:
    places = torch.arange(shape.numel()).reshape(shape)
    assert torch.equal(is_new(one, shape), is_new(two, shape))
    for a, b, size in zip(one.dims, two.dims, places.shape, strict=True):
        whole = torch.arange(size)
        assert torch.equal(whole if a is None else a, whole if b is None else b)
    for a, b in ((one.scale, two.scale), (two.scale, one.scale)):
        assert a is None or torch.equal(a, torch.ones_like(a) if b is None else b)


@few
@given(networks(), st.data())
def test_rewrites_in_one_go_are_those_one_by_one(net: Drawn, data: st.DataObject) -> None:
    graph = net.trace()
    check_sequence(net, graph, data.draw(sequences(graph)))


def check_gradients(net: Drawn, grown: gg.Grown) -> None:
    for training in (True, False):
        x = net.inputs(5, 1)
        old, new = (gradients(g, x, training) for g in (grown.before, grown.graph))
        pairs = (entries(grown, p, old[p], new[p]) for p in old)
        assert closeness(pairs, largest(old.values())) <= EXACT


@given(widened(gg.ZeroOutgoing(), random=False))
def test_gradients_of_old_parameters_do_not_change_under_zero_outgoing(growth: Growth) -> None:
    net, graph, rewrite = growth.net, growth.graph, growth.rewrite
    check_gradients(net, gg.apply(graph, rewrite))


# ------------------------------------------------------------------------------ liveness


def loss_of(out: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return (out * weights + 0.1 * out.square()).sum()


def touched(graph: gg.Graph, net: Drawn, steps: int) -> dict[str, Tensor]:
    """Return how large the gradient of each entry got within some steps of SGD, by path."""
    model = copy.deepcopy(gg.lower(graph)).train()
    found: dict[str, Tensor] = {}
    for step in range(steps):
        model.zero_grad()
        loss_of(model(net.inputs(6, 7 + step))).backward()
        for path, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.grad is not None:
                found[path] = found.get(path, 0) + parameter.grad.abs()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-2 * (0 if parameter.grad is None else parameter.grad)
    return found


def check_liveness(net: Drawn, grown: gg.Grown) -> None:
    """Assert that a new unit gets gradients at every place where some old unit does."""
    before, after = touched(grown.before, net, 1), touched(grown.graph, net, 2)
    size = max(float(g.max()) for g in before.values())
    for path, origin in grown.origin.items():
        for dim, index in enumerate(origin.dims):
            if index is None or path not in before:
                continue
            live = (before[path] > 1e-6 * size).any(dim)
            rest = replace(origin, dims=tuple(i for d, i in enumerate(origin.dims) if d != dim))
            wanted = gather(live.int(), rest).bool()
            for unit in (index < 0).nonzero().flatten().tolist():
                assert (after[path].select(dim, unit)[wanted] != 0).all(), f"{path} unit {unit}"


CENTRING = nn.BatchNorm1d | nn.BatchNorm2d | CapNorm


def is_saddle(growth: Growth) -> bool:
    """Return whether new units start at a saddle: constant over the batch, and read by zeros.

    So do those of a tied weight, which writes and reads the same axis: no scheme that is exact can
    avoid it; and the odd one of units that hold constants. Batch norm takes constants away.
    """
    axis = growth.graph.axis(growth.rewrite.axis)
    tied = {at.path for at in axis.producers} & {at.path for at in axis.consumers}
    norms = any(isinstance(m, CENTRING) for m in growth.net.model.modules())
    scheme = growth.rewrite.weights
    constant = isinstance(scheme, gg.ZeroIncoming) and scheme.constant is not None
    odd = constant and growth.rewrite.units % 2 == 1
    return (bool(tied) or odd) and norms


@given(growths(widenings, smooth=True, random=False, planted=False, awkward=False))
def test_new_units_get_gradients_where_old_ones_do_within_two_steps(growth: Growth) -> None:
    assume(not is_saddle(growth))
    check_liveness(growth.net, gg.apply(growth.graph, growth.rewrite))


def arriving(net: Drawn, graph: gg.Graph, at: str) -> list[tuple[Tensor, Tensor]]:
    """Return values and their gradients where a layer is inserted at `at`, one for each call."""
    model = copy.deepcopy(gg.lower(graph)).train()
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        value = inputs[0] if gg.Deepen(at, gg.Factor()).obstacle(graph) is None else output
        if value.requires_grad:
            value.retain_grad()
            found.append(value)

    model.get_submodule(at).register_forward_hook(keep)
    loss_of(model(net.inputs(6, 7))).backward()
    return [(value, value.grad) for value in found if value.grad is not None]


def check_deeper_liveness(net: Drawn, grown: gg.Grown, at: str) -> None:
    """Assert that each new tensor gets a gradient if a value that is not zero does where it is.

    A PReLU's slope learns from negative values alone, so it needs one of these on some sample.
    """
    old, after = touched(grown.before, net, 1), touched(grown.graph, net, 2)
    size = max(float(g.max()) for g in old.values())
    here = [v.detach().abs() * g.abs() for v, g in arriving(net, grown.before, at)]
    if not any(bool((both > 1e-6 * size).any()) for both in here):
        return
    for path, tensor in grown.graph.state.items():
        module = grown.graph.modules[path.rpartition(".")[0]]
        if not isinstance(tensor, nn.Parameter) or path in grown.before.state:
            continue
        if not isinstance(module, nn.PReLU) or reads_negative(net, grown.graph, path):
            assert bool(after[path].any()), path


def reads_negative(net: Drawn, graph: gg.Graph, path: str) -> bool:
    """Return whether the module of a parameter reads a negative value at the first step."""
    model, least = copy.deepcopy(gg.lower(graph)).train(), []
    module = model.get_submodule(path.rpartition(".")[0])
    module.register_forward_pre_hook(lambda _, inputs: least.append(inputs[0].min().item()))
    model(net.inputs(6, 7))
    return min(least) < 0


@given(growths(deepenings, random=False, awkward=False))
def test_each_new_tensor_of_a_new_layer_gets_a_gradient_within_two_steps(growth: Growth) -> None:
    grown = gg.apply(growth.graph, growth.rewrite)
    check_deeper_liveness(growth.net, grown, growth.rewrite.at)


@given(growths(deepenings, random=False))
def test_gradients_of_untouched_parameters_do_not_change_under_deepening(growth: Growth) -> None:
    check_gradients(growth.net, gg.apply(growth.graph, growth.rewrite))


# ------------------------------------------------------------------------------ training goes on


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model.train()(x).square().sum().backward()
    optimizer.step()


def trained(net: Drawn, make: Any) -> tuple[nn.Module, gg.Graph, Any]:
    """Return a copy of the model after two steps of training, its graph and its optimizer."""
    model = copy.deepcopy(net.model)
    graph = gg.trace(model, net.inputs())
    optimizer = make(graph)
    for seed in (1, 2):
        train(model, optimizer, net.inputs(4, seed))
    return model, graph, optimizer


def stepped(net: Drawn, rewrite: Any, make: Any, grow: bool) -> tuple[gg.Grown | None, gg.Graph]:
    """Return the graph after three steps of training, grown before the third or not."""
    (model, graph, optimizer), grown = trained(net, make), None
    if grow:
        grown = gg.apply(graph, rewrite)
        graph, model = grown.graph, gg.lower(grown.graph)
        gg.migrate(optimizer, grown)
    train(model, optimizer, net.inputs(4, 3))
    return grown, graph


def check_next_step(net: Drawn, rewrite: Any, make: Any) -> None:
    _, alone = stepped(net, rewrite, make, grow=False)
    grown, graph = stepped(net, rewrite, make, grow=True)
    assert grown is not None
    pairs = (entries(grown, p, t.detach(), graph.state[p]) for p, t in alone.state.items())
    assert closeness(pairs) <= EXACT


@pytest.mark.parametrize("name", ENTRYWISE)
@few
@given(widened(gg.ZeroOutgoing(), random=False))
def test_the_next_step_moves_old_entries_as_it_would_have(name: str, growth: Growth) -> None:
    check_next_step(growth.net, growth.rewrite, ENTRYWISE[name])


@pytest.mark.parametrize("name", ENTRYWISE)
@settings(max_examples=25)
@given(growths(deepenings, random=False))
def test_the_next_step_moves_all_but_the_factored_weight_as_it_would_have(
    name: str, growth: Growth
) -> None:
    assume(getattr(growth.rewrite.layer, "bias", None) is None)  # it moves what the layer adds
    check_next_step(growth.net, growth.rewrite, ENTRYWISE[name])


@pytest.mark.parametrize("name", FANWISE)
@settings(max_examples=25)
@given(widened(gg.ZeroOutgoing(), random=False, smooth=True))
def test_the_next_step_of_a_fan_in_is_as_before_where_new_entries_have_no_gradient(
    name: str, growth: Growth
) -> None:
    """What new entries get changes the direction of the whole fan-in, so they get nothing here.

    Training that diverged turns fan-ins round and round, and where they stop is rounding.
    """
    net, (model, graph, optimizer) = growth.net, trained(growth.net, FANWISE[name])
    assume(all(parameter.abs().max() < 1e3 for parameter in model.parameters()))
    model.train()(net.inputs(4, 3)).square().sum().backward()
    assume(not nearly_parallel(optimizer, graph))
    alone, other = copy.deepcopy((model, optimizer))
    for mine, theirs in zip(alone.parameters(), model.parameters(), strict=True):
        mine.grad = theirs.grad  # a copy has none
    grown = gg.apply(graph, growth.rewrite)
    gg.migrate(optimizer, grown)  # gradients move along, with zeros
    optimizer.step()
    other.step()
    before, after = dict(alone.named_parameters()), grown.graph.state
    pairs = (entries(grown, p, t.detach(), after[p]) for p, t in before.items())
    assert closeness(pairs) <= EXACT


def nearly_parallel(optimizer: Any, graph: gg.Graph) -> bool:
    """Return whether what is left across some fan-in, of gradient or mean, is mostly rounding."""
    mixing = optimizer.param_groups[0].get("momentum_mixing", 1.0)
    return any(_nearly_parallel(optimizer, graph, share) for share in {1.0, mixing})


def _nearly_parallel(optimizer: Any, graph: gg.Graph, share: float) -> bool:
    inner, length, square, count = torch.zeros(4, optimizer.fans.count, dtype=torch.double)
    for part in optimizer.fans.parts:
        held = graph.state[part.path]
        if held.grad is not None:
            mean = optimizer.state[held].get("mean", torch.zeros_like(held))
            weight, step = held.detach(), mean.lerp(held.grad, share)
            numbers = (weight * step, weight**2, step**2, torch.ones_like(weight))
            for total, entries_ in zip((inner, length, square, count), numbers, strict=True):
                total.index_add_(0, part.units, part.rows(entries_).sum(1))
    whole = length * square
    return bool(((whole - inner**2 < 1e-4 * whole) & (count > 1)).any())


@pytest.mark.parametrize("name", FANWISE)
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(networks(random=False, smooth=True), st.data())
def test_groups_and_fan_ins_follow_any_rewrites(name: str, net: Drawn, data: st.DataObject) -> None:
    _, graph, optimizer = trained(net, FANWISE[name])
    before, running = optimizer.fans, optimizer.state["fans"]["running"].clone()
    grown = gg.apply(graph, *data.draw(sequences(graph)))
    gg.migrate(optimizer, grown)
    fresh = FANWISE[name](grown.graph)
    for one, two in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        assert one["name"] == two["name"] and one["param_names"] == two["param_names"]
        assert [*map(id, one["params"])] == [*map(id, two["params"])]
    expected = expected_of_fans(grown, before, running, fresh.fans)
    assert torch.equal(optimizer.state["fans"]["running"], expected)
    fresh.load_state_dict(optimizer.state_dict())
    inner, size = torch.zeros(2, fresh.fans.count, dtype=torch.double)
    for part in fresh.fans.parts:
        weight = grown.graph.state[part.path]
        mean = optimizer.state[weight].get("mean", torch.zeros_like(weight))
        products = part.rows(mean * weight.detach())
        inner.index_add_(0, part.units, products.sum(1))
        size.index_add_(0, part.units, products.abs().sum(1))
    assert (inner.abs() <= 1e-12 * (1 + size)).all()  # of one entry there is only rounding


def expected_of_fans(grown: gg.Grown, before: Any, numbers: Tensor, after: Any) -> Tensor:
    """Return numbers of fans as they must be in the grown graph, entry by entry."""
    old = {part.path: part for part in before.parts}
    expected = torch.zeros(len(numbers), after.count, dtype=numbers.dtype)
    for part in (part for part in after.parts if part.path in old):
        shape, was = grown.graph.state[part.path].shape, old[part.path]
        origin = grown.origin.get(part.path, TensorOrigin((None,) * len(shape)))
        fans = spread_over(grown.before.state[part.path], was.dims, was.units)
        index = [
            i if i is not None else torch.arange(n) for i, n in zip(origin.dims, shape, strict=True)
        ]
        for place in torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, len(shape)):
            source = [int(index[d][i]) for d, i in enumerate(place.tolist())]
            if all(source[d] >= 0 for d in part.dims):
                at = [n if n >= 0 else 0 for n in source]
                fan = spread_over(grown.graph.state[part.path], part.dims, part.units)
                expected[:, fan[tuple(place)]] = numbers[:, fans[tuple(at)]]
    return expected


def spread_over(like: Tensor, dims: tuple[int, ...], units: Tensor) -> Tensor:
    """Return the fan of each entry of a tensor."""
    sizes = [n if d in dims else 1 for d, n in enumerate(like.shape)]
    return units.reshape(sizes).expand(like.shape)


@few
@given(networks(random=False), st.sampled_from(sorted(OPTIMIZERS)), st.data())
def test_an_optimizer_takes_several_rewrites_in_one_go(
    net: Drawn, name: str, data: st.DataObject
) -> None:
    _, graph, optimizer = trained(net, OPTIMIZERS[name])
    other = OPTIMIZERS[name](graph)
    other.load_state_dict(optimizer.state_dict())
    steps, now = data.draw(sequences(graph)), graph
    once = gg.apply(graph, *steps)
    gg.migrate(optimizer, once)
    for step in steps:
        grown = gg.apply(now, step)
        gg.migrate(other, grown)
        now = grown.graph
    held = [states_by_path(o, g) for o, g in ((optimizer, once.graph), (other, now))]
    names = {p for p, _ in gg.lower(now).named_parameters()}
    assert held[0].keys() - {"fans"} == held[1].keys() - {"fans"} == names
    for path, state in held[0].items():
        assert state.keys() == held[1][path].keys(), path
        for key, value in state.items():
            one, two = torch.as_tensor(value), torch.as_tensor(held[1][path][key])
            if name == "AdaRadM" and key == "mean":
                # it is made to stand at right angles once, or after each rewrite, which is the same
                # where all that was there stays as it was
                assert one.shape == two.shape, path
                assert not only_more(once) or torch.allclose(one, two, 0, 1e-12), path
            else:
                assert torch.equal(one, two), path


def only_more(grown: gg.Grown) -> bool:
    """Return whether a growth left all old weights as they were."""
    schemes = [getattr(rewrite, "weights", None) for rewrite in grown.graph.journal]
    return all(isinstance(scheme, gg.ZeroOutgoing) for scheme in schemes)


def states_by_path(optimizer: torch.optim.Optimizer, graph: gg.Graph) -> dict[str, Any]:
    """Return the state of each parameter that an optimizer holds."""
    names = {id(p): path for path, p in gg.lower(graph).named_parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    shared = {"fans": optimizer.state["fans"]} if "fans" in optimizer.state else {}  # type: ignore
    return {names[id(p)]: optimizer.state.get(p, {}) for p in held} | shared


# ------------------------------------------------------------------------------ algebra of rewrites


def check_undone(graph: gg.Graph, rewrite: gg.Widen) -> None:
    grown = gg.apply(graph, rewrite)
    axis, width = graph.axis(rewrite.axis).name, graph.axis(rewrite.axis).width
    first = width if rewrite.at is None else rewrite.at
    added = grown.graph.axes[axis].width - width
    back = gg.apply(grown.graph, gg.Remove(axis, tuple(range(first, first + added)))).graph
    assert str(back) == str(graph)
    for path, tensor in graph.state.items():
        if not torch.equal(back.state[path], tensor):
            # the weight of a norm over the units is multiplied twice, each time rounded once
            assert isinstance(grown.graph.journal[-1].weights, gg.MeanFill)
            size = tensor.abs() + (grown.graph.state[path] - tensor).abs()
            assert (
                (back.state[path] - tensor).abs() <= 2 * torch.finfo(tensor.dtype).eps * size
            ).all()


@given(growths(widenings))
def test_removing_what_was_added_returns_the_old_tensors(growth: Growth) -> None:
    check_undone(growth.graph, growth.rewrite)


def check_commuting(net: Drawn, graph: gg.Graph, a: gg.Widen, b: gg.Widen) -> None:
    """Assert that two orders agree: wholly where no tensor has both axes, else in the old."""
    one, two = gg.apply(graph, a, b), gg.apply(graph, b, a)
    check_function(net, one.graph, two.graph)
    assert str(one.graph) == str(two.graph)
    names = {graph.axis(a.axis).name, graph.axis(b.axis).name}
    apart = not any(
        names <= {n for layout in dims for n in layout.axes()}
        for dims in graph.analysis.state.values()
    )
    for path, tensor in one.graph.state.items():
        if path in one.origin:
            first, second = one.origin[path].dims, two.origin[path].dims
            assert all(x is y or torch.equal(x, y) for x, y in zip(first, second, strict=True))
        assert not apart or torch.equal(tensor, two.graph.state[path])


@few
@given(st.data())
def test_rewrites_of_different_axes_commute(data: st.DataObject) -> None:
    net = data.draw(networks())
    graph = net.trace()
    free = [name for name, axis in graph.axes.items() if axis.obstacle is None]
    assume(len(free) > 1)
    first, second = data.draw(st.permutations(free))[:2]
    a, b = (data.draw(widenings(graph, axis=name)) for name in (first, second))
    assume(a.obstacle(graph) is None and b.obstacle(graph) is None)
    check_commuting(net, graph, a, b)


@given(st.data())
def test_the_obstacle_is_none_exactly_where_apply_succeeds(data: st.DataObject) -> None:
    graph = data.draw(networks()).trace()
    request = data.draw(anything(graph))
    try:
        gg.apply(graph, request)
        said = None
    except gg.NotApplicable as error:
        said = str(error)
    assert request.obstacle(graph) == said


@few
@given(growths(widenings))
def test_a_grown_graph_analysed_anew_has_the_same_axes(growth: Growth) -> None:
    grown = gg.apply(growth.graph, growth.rewrite).graph
    anew = grown.renewed()
    assert anew.analysis.current
    assert {n: a.width for n, a in anew.axes.items()} == {n: a.width for n, a in grown.axes.items()}


@few
@given(networks())
def test_an_axis_with_an_obstacle_is_refused_in_its_words(net: Drawn) -> None:
    graph = net.trace()
    for name, axis in graph.axes.items():
        if axis.obstacle is not None:
            assert gg.Widen(name, 1).obstacle(graph) == axis.obstacle


# ------------------------------------------------------------------------------ what stays


@few
@given(growths())
def test_the_keys_of_the_state_dict_survive(growth: Growth) -> None:
    check_keys(growth.net.model, gg.apply(growth.graph, growth.rewrite).graph)


def check_keys(before: nn.Module, after: gg.Graph) -> None:
    """Assert that all old keys are there in their order, with others where layers were inserted."""
    old, new = list(before.state_dict()), list(gg.lower(after).state_dict())
    assert [key for key in new if key in set(old)] == old
    deeper = any(isinstance(rewrite, gg.Deepen | gg.Branch) for rewrite in after.journal)
    assert deeper or new == old


def snapshot(graph: gg.Graph, model: nn.Module) -> tuple[Any, ...]:
    """Return all that a failure may not change: text, identity of tensors, and their values."""
    tensors = {**graph.state, **model.state_dict(keep_vars=True)}
    return (
        str(graph),
        str(model),
        graph.journal,
        [(p, id(t), t.tolist(), t.grad) for p, t in tensors.items()],
    )


class Wrong(gg.Widen):
    """Claims to be exact and is not."""

    def edit(self, graph: gg.Graph) -> Edit:
        edit = super().edit(graph)
        path = next(p for p in reversed(edit.graph.state) if p.endswith("bias"))
        moved = {**edit.graph.state, path: nn.Parameter(edit.graph.state[path] + 1)}
        return replace(edit, graph=replace(edit.graph, state=moved))


@few
@given(growths(anything), st.data())
def test_a_failure_changes_nothing(growth: Growth, data: Any) -> None:
    net, graph, rewrite = growth.net, growth.graph, growth.rewrite
    before = snapshot(graph, net.model)
    axis = data.draw(axes(graph))
    with pytest.raises(gg.NotApplicable):
        gg.apply(graph, rewrite, gg.Remove(axis, (99,)))
    if isinstance(rewrite, gg.Widen):
        with pytest.raises(gg.NotEquivalent):
            gg.apply(graph, rewrite, Wrong(rewrite.axis, graph.axis(rewrite.axis).multiple))
    assert snapshot(graph, net.model) == before


def check_origin(grown: gg.Grown) -> None:
    """Assert that entries moved as the origin says; only splits and norms rescale."""
    scheme = getattr(grown.graph.journal[-1], "weights", None)
    copied = isinstance(scheme, gg.Copy | gg.MeanFill)
    folded = [line for line in str(grown.proof).splitlines() if "folded" in line]
    for path, old in grown.before.state.items():
        new, origin = grown.graph.state[path], grown.origin.get(path)
        if any(f"'{path}'" in line for line in folded):
            continue
        if origin is None:
            assert new is old
            continue
        kept = ~is_new(origin, new.shape)
        assert origin.scale is None or copied
        moved = gather(old, origin) * (1 if origin.scale is None else origin.scale)
        assert torch.allclose(new[kept].double(), moved[kept].double(), 1e-15, 0)


@given(growths(lambda graph: widenings(graph) | deepenings(graph)))
def test_every_old_entry_is_where_the_origin_says(growth: Growth) -> None:
    check_origin(gg.apply(growth.graph, growth.rewrite))


@few
@given(growths(anything))
def test_rewrites_and_journals_come_back_from_json(growth: Growth) -> None:
    graph, rewrite = growth.graph, growth.rewrite
    grown = gg.apply(graph, rewrite).graph
    read = [rewrite_from_json(d) for d in json.loads(json.dumps(rewrites_to_json([rewrite])))]
    assert read == [rewrite]
    journal = json.loads(json.dumps(rewrites_to_json(grown.journal)))
    again = gg.apply(graph, *map(rewrite_from_json, journal)).graph
    assert all(torch.equal(t, again.state[p]) for p, t in grown.state.items())


# ------------------------------------------------------------------------------ long sequences


class Growing(RuleBasedStateMachine):
    """Rewrites one after the other, as they come, of a network that computes the same all along."""

    @initialize(net=networks())
    def start(self, net: Drawn) -> None:
        self.net, self.graph, self.model = net, net.trace(), net.model
        self.added: list[tuple[str, tuple[int, ...], bool]] = []

    def room(self) -> list[str]:
        return [n for n, a in self.graph.axes.items() if a.obstacle is None and a.width < 10]

    @precondition(lambda self: self.room())
    @rule(data=st.data())
    def widen(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.room()))
        rewrite = data.draw(widenings(self.graph, axis=name))
        if rewrite.obstacle(self.graph) is None:
            width = self.graph.axes[name].width
            self.graph = gg.apply(self.graph, rewrite).graph
            first = width if rewrite.at is None else rewrite.at
            count = self.graph.axes[name].width - width
            unread = isinstance(self.graph.journal[-1].weights, gg.ZeroOutgoing)
            # columns drawn for units of another axis make the rows of copies and pairs differ
            self.added = [a for a in self.added if a[0] != name and (unread or a[2])]
            self.added.append((name, tuple(range(first, first + count)), unread))

    @precondition(lambda self: self.added)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        name, units, _ = self.added.pop(data.draw(st.integers(0, len(self.added) - 1)))
        self.graph = gg.apply(self.graph, gg.Remove(name, units)).graph

    @precondition(lambda self: len(self.graph.modules) < 40)
    @rule(data=st.data())
    def deepen(self, data: st.DataObject) -> None:
        rewrite = data.draw(deepenings(self.graph))
        if rewrite.obstacle(self.graph) is None and self.small():
            self.graph = gg.apply(self.graph, rewrite).graph
            self.added = []

    @precondition(lambda self: gg.Cap.places(self.graph))
    @rule(data=st.data())
    def cap(self, data: st.DataObject) -> None:
        """From here on the function is that of the model with CapNorm put in by hand."""
        at = data.draw(st.sampled_from(gg.Cap.places(self.graph)))
        self.model = capped_by_hand(gg.lower(self.graph), at)
        self.graph = gg.apply(self.graph, gg.Cap(at)).graph
        self.added = []

    def small(self) -> bool:
        return sum(a.width for a in self.graph.axes.values()) < 60

    @rule(data=st.data())
    def change(self, data: st.DataObject) -> None:
        rewrite = data.draw(requests(self.graph))
        if rewrite.obstacle(self.graph) is None and self.small():
            self.graph = gg.apply(self.graph, rewrite).graph
            self.added = []

    @invariant()
    def same_function(self) -> None:
        found = gg.compare(self.model, self.graph, self.net.inputs(4, 5))
        assert found.relative <= EXACT, f"{found}"

    @invariant()
    def well_formed(self) -> None:
        check_keys(self.model, self.graph)
        for module in gg.lower(self.graph).modules():
            check_attributes(module)


def capped_by_hand(model: nn.Module, at: str) -> nn.Module:
    """Return a copy of a model with CapNorm in place of the batch norm at a path."""
    model = copy.deepcopy(model)
    norm = model.get_submodule(at)
    made = CapNorm(norm.num_features, norm.momentum).double()
    made.running_mean, made.running_var = norm.running_mean, norm.running_var
    for path in [p for p, m in model.named_modules(remove_duplicate=False) if m is norm]:
        model.set_submodule(path, made)
    return model


def check_attributes(module: nn.Module) -> None:
    """Assert that a layer's attributes say what its tensors are."""
    made = None
    computed = hasattr(module, "parametrizations")
    kind: Any = type(module).__base__ if computed else type(module)
    if isinstance(module, nn.Linear):
        made = nn.Linear(module.in_features, module.out_features, module.bias is not None)
    elif isinstance(module, nn.modules.conv._ConvNd):
        made = kind(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            groups=module.groups,
            bias=module.bias is not None,
        )
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        made = type(module)(module.num_features, affine=module.affine)
    elif isinstance(module, CapNorm):
        made = CapNorm(module.num_features)
    elif isinstance(module, nn.PReLU):
        made = nn.PReLU(module.num_parameters)
    elif isinstance(module, nn.Embedding):
        made = nn.Embedding(module.num_embeddings, module.embedding_dim)
    elif isinstance(module, nn.RNNBase):
        made = type(module)(
            module.input_size,
            module.hidden_size,
            module.num_layers,
            bias=module.bias,
            bidirectional=module.bidirectional,
        )
    if made is not None:
        made = weight_norm(made) if computed else made
        mine, theirs = module.state_dict(), made.state_dict()
        assert {k: t.shape for k, t in mine.items()} == {k: t.shape for k, t in theirs.items()}


class TestGrowing(Growing.TestCase):
    settings = settings(max_examples=25, stateful_step_count=8)
