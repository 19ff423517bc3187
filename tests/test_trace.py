"""A traced model runs again as the model does, bit for bit, in both modes and at other sizes."""

from __future__ import annotations

import contextlib
import copy
import random
import threading
import warnings
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import vision
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from graphgrow.errors import UnsupportedOp
from graphgrow.ir.assemble import assemble
from graphgrow.ir.graph import Graph
from graphgrow.ir.sizes import DataNumber
from graphgrow.ir.trace import trace


def images(batch: int = 2, size: int = 8) -> Tensor:
    return torch.randn(batch, 3, size, size, dtype=torch.float64)


def rows(batch: int = 2, width: int = 6) -> Tensor:
    return torch.randn(batch, width, dtype=torch.float64)


def runnable(graph: Graph, training: bool) -> fx.GraphModule:
    """Return a module that runs the structure of a mode on copies of the state's buffers."""
    copies: dict[int, Tensor] = {}
    for tensor in graph.state.values():
        is_parameter = isinstance(tensor, nn.Parameter)
        copies[id(tensor)] = tensor if is_parameter else tensor.detach().clone()
    state = {path: copies[id(tensor)] for path, tensor in graph.state.items()}
    root = assemble(graph.modules, graph.leaves, state)
    return fx.GraphModule(root, graph.train if training else graph.eval).train(training)


def same(one: Any, other: Any) -> bool:
    """Return whether two results have the same types and bits."""
    if type(one) is not type(other) and not isinstance(one, dict | list):
        return False
    pairs = zip(parts(one), parts(other), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def parts(result: Any) -> list[Any]:
    return tree_leaves(vars(result) if hasattr(result, "__dataclass_fields__") else result)


def differences(model: nn.Module, graph: Graph, *inputs: Any, **kwargs: Any) -> list[str]:
    """Return in which modes the graph gives another result, or leaves other buffers."""
    found = []
    for training in (True, False):
        reference, again = copy.deepcopy(model).train(training), runnable(graph, training)
        with torch.no_grad():
            torch.manual_seed(0)
            expected = reference(*copy.deepcopy(inputs), **copy.deepcopy(kwargs))
            torch.manual_seed(0)
            given = again(*copy.deepcopy(inputs), **copy.deepcopy(kwargs))
        state = again.state_dict()
        buffers = {path: t for path, t in reference.state_dict().items() if path in state}
        kept = all(torch.equal(t, state[path]) for path, t in buffers.items())
        if not (same(expected, given) and kept):
            found.append("train" if training else "eval")
    return found


def check(model: nn.Module, make=rows, **kwargs: Any) -> Graph:
    """Trace `model` and check that the graph is exact at three batch sizes; return the graph."""
    model = model.double()
    graph = trace(model, make(2), **kwargs)
    assert [differences(model, graph, make(batch), **kwargs) for batch in (2, 3, 5)] == [[]] * 3
    return graph


def targets(graph: fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes]


class Module(nn.Module):
    """A module whose forward is a function of itself and the inputs."""

    def __init__(self, forward, **parts: nn.Module | Tensor) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._function = forward

    def forward(self, x):
        return self._function(self, x)


# What models do


def dropped(m, x):
    return F.dropout(m.a(x), 0.5, m.training) + F.dropout(x, training=not m.training)


def normalised(m, x):
    return F.batch_norm(x, m.mean, m.var, training=m.training)


def overwritten(m, x):
    y = m.a(x).relu_()
    y += x
    y *= 2
    y[:, 0] = x[:, 1]
    y[1:].neg_()
    torch.add(x, 1, out=y[:, :6])
    return y


def reshaped(m, x):
    n = len(x)
    y = m.a(x).view(x.size(0), 2, -1).transpose(1, 2).reshape(n * 3, x.shape[1] // 3)
    return y.unflatten(0, (n, -1)).flatten(1) / x.shape[0] ** 0.5 + x.numel() % 7


def chunked(m, x):
    a, b, c = x.chunk(3, dim=1)
    d, e = torch.split(x, [2, x.size(1) - 2], dim=1)
    return torch.cat([c, b, a, e, d], dim=-1)


def with_class_token(m, x):
    token = m.token.expand(x.shape[0], -1, -1)
    return torch.cat([token, x.unsqueeze(1)], 1) + torch.zeros(x.shape[0], 1, 1, dtype=x.dtype)


def wrapped_methods(m, x):
    y = x**2 + 2**x + (1 - x) / 2 + x.T.mT.norm(dim=0) + x.data * m.a.weight.T[0, 0]
    y = torch.einsum("bi,bi->b", x, y)[:, None] + x.new_zeros(len(x), 1) + F.gelu(x)
    return y @ torch.arange(6, dtype=x.dtype, device=x.device) + torch.tensor(float(x.size(1)))


def mixed_sizes(m, x):
    halves, rest = divmod(x.size(1), 4)
    return x[:, : max(halves, rest)] * (-x.size(0) + 2 * x.size(0)) + round(x.size(0) / 2)


def unused(m, x):
    x * 3
    x.size(0) + 1
    m.a(x)
    return m.a(x)


def identities(m, x):
    y = m.same(x)
    return x.contiguous() + y + m.same(y).double()


def fixed_reads(m, x):
    for rate in torch.linspace(0, 1, 3).tolist():
        x = x * rate + 1
    assert (x == x).all()
    positions = torch.arange(x.size(1))
    if (positions.diff() != 1).any():
        return None
    return x if torch.rand([]) < 0.0 else x + torch.tensor(2).item()


def with_numpy(m, x):
    return x * torch.from_numpy(np.arange(6.0)) + m.plain + CLOSED


CLOSED = torch.full((6,), 0.5, dtype=torch.float64)

PROGRAMS = [
    Module(dropped, a=nn.Linear(6, 6)),
    Module(normalised, mean=torch.zeros(6), var=torch.ones(6)),
    Module(overwritten, a=nn.Linear(6, 6)),
    Module(reshaped, a=nn.Linear(6, 6)),
    Module(chunked),
    Module(with_class_token, token=nn.Parameter(torch.randn(1, 1, 6))),
    Module(wrapped_methods, a=nn.Linear(6, 6)),
    Module(mixed_sizes),
    Module(unused, a=nn.BatchNorm1d(6)),
    Module(identities, same=nn.Identity()),
    Module(fixed_reads),
    Module(with_numpy, plain=torch.ones(6)),
]


@pytest.mark.parametrize("model", PROGRAMS, ids=lambda model: model._function.__name__)
def test_a_graph_runs_as_its_model_does(model):
    for name in ("mean", "var"):
        if hasattr(model, name):
            model.register_buffer(name, model.__dict__.pop(name))
    check(model)


def test_a_flag_that_follows_the_mode_becomes_a_node():
    graph = check(Module(lambda m, x: m.inner(x), inner=Module(dropped, a=nn.Linear(6, 6))))
    assert graph.train is graph.eval
    assert targets(graph.eval).count("inner.training") == 1


def test_a_rate_that_a_mode_switches_off_becomes_a_product():
    def forward(m, x):
        rate = 0.5 if m.training else 0.0
        return F.scaled_dot_product_attention(x, x, x, dropout_p=rate)

    graph = check(Module(forward))
    assert graph.train is graph.eval and "training" in targets(graph.eval)


def test_nodes_know_the_module_whose_code_they_run():
    graph = check(Module(lambda m, x: m.inner(x) + 1, inner=Module(lambda m, x: x * 2)))
    assert [node.meta["module"] for node in graph.eval.nodes] == ["", "inner", "", ""]


def test_structures_that_differ_are_both_kept():
    def forward(m, x):
        return (m.a(x), m.b(x)) if m.training else m.a(x)

    graph = check(Module(forward, a=nn.Linear(6, 2), b=nn.Linear(6, 2)))
    assert "b" in targets(graph.train) and "b" not in targets(graph.eval)


def test_pure_dead_nodes_are_gone_and_the_others_stay():
    graph = check(Module(unused, a=nn.BatchNorm1d(6)))
    assert targets(graph.train) == ["x", "a", "a", "output"]


def test_a_module_called_twice_and_a_tied_weight_keep_one_path():
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(inplace=True), shared, nn.Linear(6, 6))
    model[3].weight = shared.weight
    graph = check(model)
    assert targets(graph.eval)[1:5] == ["0", "1", "0", "3"]
    assert graph.state["3.weight"] is graph.state["0.weight"] is shared.weight


def test_a_layer_as_the_model_itself_is_followed_inside():
    for layer in (nn.Linear(6, 4), nn.BatchNorm1d(6), nn.LSTM(6, 4)):
        check(layer)


def test_constants_are_one_buffer_and_no_new_key():
    model = Module(with_numpy, plain=torch.ones(6).double())
    graph = check(model)
    assert [k for k in graph.state if k.startswith("_constant")] == [
        f"_constant{i}" for i in range(3)
    ]
    assert graph.state["_constant1"] is model.plain and graph.state["_constant2"] is CLOSED
    assert not assemble(graph.modules, graph.leaves, graph.state).state_dict()


def test_a_buffer_that_forward_replaces_is_updated():
    def forward(m, x):
        if m.training:
            m.mean = 0.9 * m.mean + 0.1 * x.mean(0)
        m.steps += 1
        return x - m.mean

    model = Module(forward)
    model.register_buffer("mean", torch.zeros(6))
    model.register_buffer("steps", torch.zeros(()))
    check(model)


def test_arguments_keep_their_names_and_defaults():
    class Net(nn.Module):
        def forward(self, x, *more, scale=1.0, inputs, **rest):
            return (x + sum(more)) * scale + inputs["a"] * inputs["b"][0] - rest["last"]

    x, y = rows(), rows()
    kwargs = {"scale": 2.0, "inputs": {"a": y, "b": [x, 3]}, "last": y}
    graph = trace(Net(), x, x, y, **kwargs)
    names = [node.target for node in graph.eval.nodes if node.op == "placeholder"]
    assert names == ["x", "more_0", "more_1", "scale", "inputs", "last"]
    assert same(list(graph.example), [x, x, y, 2.0, kwargs["inputs"], y])
    given = runnable(graph, False)(x, x, y, 2.0, kwargs["inputs"], y)
    assert torch.equal(given, Net()(x, x, y, **kwargs))


def test_one_tensor_passed_twice_is_two_inputs():
    class Net(nn.Module):
        def forward(self, x, y, flag=True):
            return x - 2 * y if flag else None

    x, y = rows(), rows()
    graph = trace(Net(), x, x, True)
    assert torch.equal(runnable(graph, False)(x, y), x - 2 * y)


@dataclass
class Pair:
    first: Tensor
    second: Any = None


Named = namedtuple("Named", "first second")


@pytest.mark.parametrize(
    "result",
    [
        lambda x: {"a": x, "b": [x, (x + 1, None)]},
        lambda x: OrderedDict(out=x, size=x.size(0)),
        lambda x: Named(x, x * 2),
        lambda x: Pair(x, x.shape),
        lambda x: [x, 3, 0.5, "text"],
    ],
    ids="dict OrderedDict namedtuple dataclass list".split(),
)
def test_results_keep_their_structure(result):
    check(Module(lambda m, x: result(x * 1)))


def test_a_dataclass_of_tensors_is_an_input():
    graph = trace(Module(lambda m, pair: pair.first + pair.second), Pair(rows(), rows()))
    x = Pair(rows(3), rows(3))
    assert torch.equal(runnable(graph, False)(x), x.first + x.second)


def test_sizes_that_values_decide_stay_sizes():
    def forward(m, x):
        kept = x[x[:, 0] > 0]
        return kept.view(kept.shape[0], 2, 3).sum(0) / (kept.size(0) + 1)

    check(Module(forward))


def counted(m, x):
    """Sum rows by a class that their values decide, as layers of graphs do."""
    index = (x[:, 0] > 0).long()
    sums = x.new_zeros((int(index.max()) + 1, *x.shape[1:])).index_add(0, index, x)
    means = sums / index.bincount(minlength=sums.size(0)).clamp(min=1)[:, None]
    return x * means[index].sum() + isinstance(index.max().item(), int) * means[0]


def with_loops(m, x):
    """Branch on sizes that values decide where the outcome is known for all of them."""
    ends = torch.stack([x.argmax(1), x.argmin(1)])
    ends = ends[:, ends[0] != ends[1]]
    count = x.size(0)
    ends = torch.cat([ends, torch.arange(count).repeat(2, 1)], 1)
    if ends[0].numel() == 0:
        return x
    taken = x.index_select(0, ends[0] % count) * 2
    assert taken.size(1) == 6
    if taken.size(0) != ends[1].size(0) or taken.size(1) > 6:
        return -x
    return torch.zeros_like(x).index_add(0, ends[1] % count, taken)


@pytest.mark.parametrize("forward", [counted, with_loops])
def test_whole_numbers_that_values_decide_are_read_anew(forward):
    check(Module(forward))


def zeros_of(x: Tensor) -> Tensor:
    return x[:, 0].mul(0).long()


LAYER = "a layer"
# what becomes of rows that a mask picks from x
SIZED = {
    "unsqueeze": lambda k, x: k.unsqueeze(-1),
    "none": lambda k, x: k[None, :, None],
    "column": lambda k, x: k[:, 1],
    "ends": lambda k, x: k[..., 1:],
    "later rows": lambda k, x: k[1:],
    "sum": lambda k, x: k.sum(1),
    "sum of rows": lambda k, x: k.sum(0),
    "sum kept": lambda k, x: k.sum(-1, keepdim=True),
    "mean": lambda k, x: k.mean((0,)),
    "transpose": lambda k, x: k.t(),
    "permute": lambda k, x: k[:, :, None].permute(2, 1, 0),
    "product": lambda k, x: k @ k.t(),
    "square": lambda k, x: k.t() @ k,
    "outer": lambda k, x: torch.outer(k[:, 0], k[:, 0]),
    "pairs": lambda k, x: k[:, None] * k[None],
    "cat": lambda k, x: torch.cat([x, k]),
    "cat of columns": lambda k, x: torch.cat([k, k], 1),
    "stack": lambda k, x: torch.stack([k, k], 1),
    "stack last": lambda k, x: torch.stack([k, k], -1),
    "flat": lambda k, x: k.flatten(),
    "view": lambda k, x: k.view(-1, 2, 3),
    "reshape": lambda k, x: k.reshape(2, k.size(0), -1),
    "linear": lambda k, x: F.linear(k, x),
    "bilinear": lambda k, x: F.linear(x, k),
    "layer": LAYER,
    "selected": lambda k, x: x.index_select(0, zeros_of(k)),
    "selected from it": lambda k, x: k.index_select(0, zeros_of(x)),
    "selected columns": lambda k, x: k.index_select(1, zeros_of(x)),
    "taken": lambda k, x: x[zeros_of(k)],
    "taken twice": lambda k, x: x[:, zeros_of(k)][zeros_of(k)],
    "taken by two": lambda k, x: x[zeros_of(k), zeros_of(k)],
    "masked": lambda k, x: x[:, x.sum(0) > 0],
    "like": lambda k, x: torch.zeros_like(k),
    "new": lambda k, x: k.new_zeros(k.size(0), 3),
    "new of one": lambda k, x: k.new_zeros((3, k.size(1))),
    "zeros": lambda k, x: torch.zeros(2, k.size(0) + 1),
    "expanded": lambda k, x: x[0].expand(k.size(0), 6),
    "expanded as": lambda k, x: x[:1].expand_as(k),
    "arange": lambda k, x: torch.arange(k.size(0)),
    "longer arange": lambda k, x: torch.arange(1, k.size(0) * 2),
    "repeated": lambda k, x: x.repeat(k.size(0), 1),
    "tiled": lambda k, x: k.repeat(2, 1),
    "softmax": lambda k, x: k.softmax(0),
    "sorted": lambda k, x: k.sort(0)[1],
    "largest": lambda k, x: k.max(1)[0],
    "largest rows": lambda k, x: k.max(0).values,
    "unbind": lambda k, x: k.unbind(1)[0],
    "split": lambda k, x: k.split(2, 1)[0],
    "nonzero": lambda k, x: k.nonzero(),
    "added": lambda k, x: x.index_add(0, zeros_of(k), k),
    "filled": lambda k, x: k.masked_fill(k > 0, 1.0),
    "first rows": lambda k, x: x[: k.size(0)],
    "narrow": lambda k, x: x.narrow(0, 0, k.size(0)),
    "gathered": lambda k, x: x.gather(0, k.mul(0).long()),
    "padded": lambda k, x: F.pad(k, (1, 1)),
    "differences": lambda k, x: k.diff(dim=0),
    "one hot": lambda k, x: F.one_hot(zeros_of(k), 3),
    "windows": lambda k, x: k.unfold(0, 1, 1),
    "distances": lambda k, x: torch.cdist(k, x),
    "mixed": lambda k, x: torch.einsum("ni,mi->mn", k, x),
    "counted": lambda k, x: x.new_zeros(int((x > 0).sum()), 2),
}


@pytest.mark.parametrize("op", SIZED.values(), ids=SIZED)
def test_sizes_that_values_change_are_known_to(op):
    sizes: dict[int, list[list[int]]] = {1: [], 3: [], 6: []}  # of six rows

    def forward(m, x):
        kept = x[x[:, 0] > 0]
        sizes[count].append(list((m.a(kept).relu() if op is LAYER else op(kept, x)).shape))
        return x

    generator = torch.Generator().manual_seed(0)
    for count in sizes:
        x = torch.randn(6, 6, generator=generator, dtype=torch.double).abs()
        x[count:] *= -1
        model = Module(forward, a=nn.Linear(6, 2).double())
        trace(model, x)
        model(x)
    plain = [shapes[-1] for shapes in sizes.values()]
    for d in range(len(plain[0])):
        if len({shape[d] for shape in plain}) > 1:
            recorded = [shape[d] for shapes in sizes.values() for shape in shapes[:-1]]
            assert all(isinstance(size, DataNumber) for size in recorded)


def test_leaves_are_chosen_by_class_or_by_path():
    model = Module(lambda m, x: m.b(m.a(x)), a=nn.Sequential(nn.ReLU()), b=Module(chunked))
    graph = check(model)
    assert graph.leaves == {"a.0"}
    assert targets(trace(model, rows(), leaves=["a", Module]).eval) == ["x", "a", "b", "output"]


def test_a_users_subclass_of_a_layer_is_a_leaf():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    assert targets(check(nn.Sequential(Scaled(6, 6))).eval) == ["input", "0", "output"]


@pytest.fixture
def unfused():
    """Without torch's fused layers for inference, which round otherwise."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.usefixtures("unfused")
def test_transformer_layers_are_followed_inside():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    graph = check(model, make=lambda batch: torch.randn(batch, 5, 8, dtype=torch.float64))
    assert "layers.1.self_attn.in_proj_weight" in targets(graph.eval)


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
    ],
)
def test_parametrized_layers_run_as_leaves(wrap):
    graph = check(nn.Sequential(wrap(nn.Linear(6, 6).double()), nn.ReLU()))
    assert targets(graph.eval) == ["input", "0", "1", "output"]


def test_old_weight_norm_can_be_traced_after_a_step():
    with warnings.catch_warnings(action="ignore"):
        layer = nn.utils.weight_norm(nn.Linear(6, 6).double())
    layer(rows()).sum().backward()
    assert layer.weight.grad_fn is not None
    graph = trace(nn.Sequential(layer), rows())
    x = rows(3)
    assert torch.equal(runnable(graph, False)(x), layer(x))


# Gradients


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 100


def with_gradients(forward) -> tuple[Tensor, Tensor]:
    """Return the gradients of the weight by the model and by its graph."""
    model = Module(forward, a=nn.Linear(6, 6)).double()
    x = rows()
    graph = trace(model, x)
    found = []
    for run in (model, runnable(graph, True)):
        model.zero_grad()
        run(x).pow(2).sum().backward()
        found.append(model.a.weight.grad)
    return found[0], found[1]


def partly_without_gradients(m, x):
    with torch.no_grad():
        y = m.a(x) * 2
        z = y.exp().add_(m.a.bias)
    return m.a(x + y) * z.detach()


@pytest.mark.parametrize(
    "forward",
    [
        partly_without_gradients,
        lambda m, x: Doubled.apply(m.a(x)),
        lambda m, x: checkpoint(m.a, x, use_reentrant=False),
        lambda m, x: m.a(x).detach() * m.a(x),
        lambda m, x: m.a(x) + m.a.weight.data.sum(),
    ],
    ids="no_grad autograd_function checkpoint detach data".split(),
)
def test_gradients_flow_as_in_the_model(forward):
    expected, given = with_gradients(forward)
    assert torch.equal(expected, given)


# The model and its surroundings are left alone


def test_the_model_is_untouched():
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 6)).double()
    model[1].eval()
    before, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    graph = trace(model, rows())
    assert all(torch.equal(t, before[path]) for path, t in model.state_dict().items())
    assert flags == [m.training for m in model.modules()]
    assert all(graph.state[path] is p for path, p in model.named_parameters())


def test_example_inputs_are_untouched():
    x = rows()
    before = x.clone()
    trace(Module(lambda m, x: x.add_(1)), x)
    assert torch.equal(x, before)


def test_random_states_are_untouched():
    x = rows()
    states = (torch.get_rng_state, random.getstate, lambda: np.random.get_state()[2])
    before = [state() for state in states]
    trace(Module(lambda m, x: x * random.random() * np.random.rand() + torch.rand_like(x)), x)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == [state() for state in states[1:]]


@pytest.mark.parametrize("forward", [lambda m, x: x + 1, lambda m, x: x.item()])
def test_torch_and_python_are_put_back(forward):
    before = nn.Module.__call__, len, torch.autograd.Function.apply, torch.jit.is_tracing
    with contextlib.suppress(UnsupportedOp):
        trace(Module(forward), rows())
    after = nn.Module.__call__, len, torch.autograd.Function.apply, torch.jit.is_tracing
    assert before == after
    assert torch.backends.mha.get_fastpath_enabled()


def test_other_threads_are_not_recorded():
    other = nn.Linear(6, 6).double()

    def forward(m, x):
        thread = threading.Thread(target=lambda: other(rows()) + len(rows()))
        thread.start()
        thread.join()
        return x * 2

    assert targets(check(Module(forward)).eval) == ["x", "mul", "output"]


def test_code_that_asks_whether_it_is_traced_is_told_so():
    def forward(m, x):
        masked = torch.jit.is_tracing() or not bool((x > 0).all())
        return m.a(x) * (x > 0) if masked else m.a(x)

    assert "mul" in targets(check(Module(forward, a=nn.Linear(6, 6))).eval)


def test_a_model_may_trace_another():
    inner, example = nn.Sequential(nn.Linear(6, 6)).double(), rows()

    def forward(m, x):
        assert len(trace(inner, example).eval.nodes) == 3
        return m.a(x)

    assert targets(check(Module(forward, a=nn.Linear(6, 6))).eval) == ["x", "a", "output"]


# Wrapped and refused models

compiling = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@compiling
def test_wrapped_models_are_unwrapped():
    model = nn.Sequential(nn.Linear(6, 6)).double()
    for wrapped in (
        torch.compile(model),
        nn.DataParallel(model),
        torch.compile(nn.DataParallel(model)),
    ):
        assert list(trace(wrapped, rows()).state) == ["0.weight", "0.bias"]


@compiling
def test_a_compiled_part_is_followed_inside():
    model = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(6, 6))), nn.ReLU()).double()
    assert targets(trace(model, rows()).eval) == ["input", "0._orig_mod.0", "1", "output"]


def refusal(model: Any, *inputs: Any, **kwargs: Any) -> str:
    """Return the sentence with which tracing refuses, as one line."""
    with pytest.raises(UnsupportedOp) as caught:
        trace(model, *inputs, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def filled(table, x):
    table.T[0].copy_(x[0])
    return table


BRANCHES = {
    "bool": lambda m, x: x if x.sum() > 0 else -x,
    "item": lambda m, x: x * x.sum().item(),
    "int": lambda m, x: x * int(x.sum()),
    "float": lambda m, x: x * float(m.a.weight.sum()),
    "index": lambda m, x: x[range(10)[x.argmax()]],
    "tolist": lambda m, x: x.argmax(0).tolist(),
    "numpy": lambda m, x: torch.from_numpy(x.detach().numpy() + 1),
    "contains": lambda m, x: x if 0 in x else -x,
    "equal": lambda m, x: x if torch.equal(x, -x) else -x,
    "nonzero": lambda m, x: [x[i] for i in (x > 0).nonzero()],
    "size": lambda m, x: x if (x > 0).nonzero().size(0) > 3 else -x,
    "emptiness": lambda m, x: x if x[x > 0].numel() else -x,
    "random": lambda m, x: x if torch.rand(()) < 0.5 else -x,
    "written": lambda m, x: filled(torch.zeros(6, 2).double(), x).any() and x,
    "listed": lambda m, x: x * [1, 2, 3, 4, 5, 6][x[0].argmax().item()],
    "repeated": lambda m, x: x * len([0] * int(x[0].argmax())),
    "looped": lambda m, x: [x for _ in range(int(x[0].argmax()))],
    "compared": lambda m, x: x if x.argmax().item() > 2 else -x,
    "half": lambda m, x: x if (x > 0).nonzero().size(0) / 2 > 1.5 else -x,
    "bits": lambda m, x: x * (int(x.argmax()) & 1),
    "other sizes": lambda m, x: x if x[x > 0].size(0) == x[x > 1].size(0) else -x,
}


@pytest.mark.parametrize("forward", BRANCHES.values(), ids=BRANCHES)
def test_a_branch_on_values_is_refused_with_its_line(forward):
    inner = Module(forward, a=nn.Linear(6, 6)).double()
    model = Module(lambda m, x: m.router(x), router=inner)
    line = forward.__code__.co_firstlineno
    expected = (
        f"cannot trace 'router': the branch at test_trace.py:{line} depends on a tensor's value"
    )
    assert refusal(model, rows()).startswith(expected)


def test_a_list_is_not_cut_at_a_number_that_values_decide():
    def forward(m, x):
        for factor in [1, 2, 3, 4, 5, 6][: int(x[0].argmax())]:
            x = x * factor
        return x

    assert "its code takes a number that a tensor's values decide for a bare one" in refusal(
        Module(forward), rows()
    )


def test_a_refusal_that_the_model_catches_still_refuses():
    def forward(m, x):
        try:
            return x * x.sum().item()
        except ValueError:
            return x

    assert "depends on a tensor's value" in refusal(Module(forward), rows())


def test_inputs_that_do_not_fit_name_the_module_that_failed():
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(5, 6))).double()
    assert "in train mode, '1.0' raises RuntimeError: mat1 and mat2 shapes" in refusal(
        model, rows()
    )
    assert "do not fit forward(input): too many positional" in refusal(model, rows(), rows())


def scripted(thing: Any) -> Any:
    with warnings.catch_warnings(action="ignore"):
        return torch.jit.script(thing)


def double(x: Tensor) -> Tensor:
    return x * 2


def on_two_devices() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6, device="meta"))


def quantized() -> nn.Module:
    with warnings.catch_warnings(action="ignore"):
        return nn.Sequential(
            torch.ao.nn.quantized.FloatFunctional(), torch.ao.nn.quantized.Linear(6, 6)
        )


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: double, "cannot trace a function: it is not an nn.Module"),
        (lambda: scripted(nn.Sequential(nn.Linear(6, 6))), "it is scripted"),
        (lambda: nn.Sequential(nn.LazyLinear(4)), "cannot trace '0.weight': its sizes"),
        (on_two_devices, "2 devices: '0.weight' is on cpu, '1.weight' is on meta"),
        (quantized, "it is quantized"),
    ],
    ids="function scripted lazy devices quantized".split(),
)
def test_models_of_other_kinds_are_refused(make, sentence):
    assert sentence in refusal(make(), rows())


def under_autocast(m, x):
    with torch.autocast("cpu"):
        return m.a(x)


def with_growing_buffer(m, x):
    m.seen = torch.cat([m.seen, x])
    return x


SCRIPTED = scripted(double)


@pytest.mark.parametrize(
    ("forward", "sentence"),
    [
        (lambda m, x: {1, 2}, "it returns a set"),
        (lambda m, x: SCRIPTED(x) + 1, "out of Python's sight"),
        (under_autocast, "runs under autocast"),
        (lambda m, x: torch.func.vmap(torch.sin)(x), "torch.func"),
        (with_growing_buffer, "replaces buffer 'seen'"),
        (lambda m, x: m.lock and x, "cannot be copied"),
    ],
    ids="result scripted autocast vmap buffer lock".split(),
)
def test_code_that_no_graph_holds_is_refused(forward, sentence):
    model = Module(forward, a=nn.Linear(6, 6))
    model.register_buffer("seen", torch.zeros(0, 6))
    model.lock = threading.Lock() if "copied" in sentence else None
    assert sentence in refusal(model, rows().float())


def test_tensors_hidden_in_an_object_are_refused():
    class Box:
        def __init__(self, **tensors):
            self.inside = tensors

    model = Module(lambda m, box: box.inside["x"] + 1)
    assert "argument 'x' hides tensors in an object" in refusal(model, Box(x=rows()))


def test_an_unknown_leaf_is_refused():
    assert "no such module" in refusal(nn.Sequential(), rows(), leaves=["head"])


# torchvision


@pytest.mark.parametrize("name", vision.SAMPLE)
def test_models_of_torchvision_run_again_exactly(name):
    with vision.silenced():
        model = vision.build(name).double()
    size = vision.image_size(name)
    graph = trace(model, images(2, size))
    for batch in (2, 3, 5):
        assert differences(model, graph, images(batch, size)) == [], batch


def test_a_maxvit_runs_again_exactly():
    model = vision.small_maxvit().double()
    assert differences(model, trace(model, images(2, 32)), images(3, 32)) == []


def test_masks_written_by_slices_follow_the_batch():
    with vision.silenced():
        model = vision.build("swin_t").double()
    graph = trace(model, images(2, 40))
    assert [differences(model, graph, images(batch, 40)) for batch in (2, 5)] == [[]] * 2
