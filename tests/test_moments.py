"""Moments against naive formulas: every geometry, every way from producers to consumers."""

from __future__ import annotations

import copy
import gc
import itertools
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    Attend,
    Concat,
    Flatten,
    Gate,
    Mean,
    Residual,
    Shuffle,
    Siblings,
    Squeeze,
    Tied,
    Twice,
)
from strategies import fill as filled
from test_widen import Words
from torch import Tensor, nn

import graphgrow as gg
from graphgrow.measure.distances import through_units
from graphgrow.measure.image import Image
from graphgrow.measure.spectrum import cheaper, lags
from graphgrow.moments import moments, obstacle
from graphgrow.passes.prove import old_entries
from graphgrow.passes.units import Resized, inserted

EXACT = 1e-10


def row(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


def norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels)


class Stage(nn.Module):
    """A residual stage with a projection shortcut, then an identity one, all smooth."""

    def __init__(self) -> None:
        super().__init__()
        shortcut = row(nn.Conv2d(2, 4, 1), norm(4))
        self.first = Residual(self.block(2, 3, 4), shortcut)
        self.second = Residual(self.block(4, 5, 4), nn.Identity())
        self.head = nn.Conv2d(4, 2, 1)

    def block(self, before: int, hidden: int, after: int) -> nn.Module:
        first = nn.Conv2d(before, hidden, 3, padding=1, bias=False)
        return row(
            first, norm(hidden), nn.Tanh(), nn.Conv2d(hidden, after, 3, padding=1), norm(after)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


IMAGE, VECTOR = (2, 6, 6), (3,)
Case = tuple[Callable[[], nn.Module], str, tuple[int, ...]]
CASES: dict[str, Case] = {
    "hidden units": (lambda: row(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), "0", VECTOR),
    "without bias": (
        lambda: row(nn.Linear(3, 4, False), nn.Tanh(), nn.Linear(4, 2, False)),
        "0",
        VECTOR,
    ),
    "tokens": (lambda: row(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), "0", (5, 3)),
    "tokens averaged": (
        lambda: row(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), Along(), nn.Linear(4, 2)),
        "2",
        (5, 3),
    ),
    "channels": (
        lambda: row(nn.Conv2d(2, 4, 3), norm(4), nn.Tanh(), nn.Conv2d(4, 2, 3)),
        "0",
        IMAGE,
    ),
    "strides and borders": (
        lambda: row(nn.Conv2d(2, 4, 3, 2, 2), nn.Tanh(), nn.Conv2d(4, 2, 2, 2, 1, 2)),
        "0",
        IMAGE,
    ),
    "in one dimension": (
        lambda: row(nn.Conv1d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv1d(4, 2, 3, 2, 1)),
        "0",
        (2, 6),
    ),
    "in three dimensions": (
        lambda: row(nn.Conv3d(1, 3, 2), nn.Tanh(), nn.Conv3d(3, 2, 2, padding=1)),
        "0",
        (1, 4, 3, 3),
    ),
    "padded in a circle": (
        lambda: row(
            nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.Tanh(), nn.Conv2d(4, 2, 1)
        ),
        "0",
        IMAGE,
    ),
    "residual stage": (Stage, "first.branch.3", IMAGE),
    "inside a residual block": (Stage, "second.branch.0", IMAGE),
    "inside the groups": (
        lambda: row(nn.Conv2d(2, 6, 3), nn.Tanh(), nn.Conv2d(6, 4, 3, groups=2)),
        "0[1]",
        IMAGE,
    ),
    "written by groups": (
        lambda: row(
            nn.Conv2d(2, 4, 1),
            nn.Conv2d(4, 6, 3, groups=2),
            nn.Tanh(),
            nn.Conv2d(6, 4, 3, groups=2),
        ),
        "1[1]",
        IMAGE,
    ),
    "written by groups, read by all": (
        lambda: row(
            nn.Conv2d(2, 4, 1), nn.Conv2d(4, 6, 3, groups=2), nn.Tanh(), nn.Conv2d(6, 2, 3)
        ),
        "1[1]",
        IMAGE,
    ),
    "a branch": (
        lambda: row(
            Concat(nn.Conv2d(2, 3, 1), nn.Conv2d(2, 4, 3, padding=1)),
            norm(7),
            nn.Tanh(),
            nn.Conv2d(7, 2, 1),
        ),
        "0.branches.1",
        IMAGE,
    ),
    "densely connected": (
        lambda: row(
            nn.Conv2d(2, 3, 1),
            Concat(nn.Identity(), nn.Conv2d(3, 2, 1)),
            Concat(nn.Identity(), nn.Conv2d(5, 2, 3, padding=1)),
            nn.Conv2d(7, 2, 1),
        ),
        "1.branches.1",
        IMAGE,
    ),
    "flattened": (
        lambda: row(nn.Conv2d(2, 4, 3), nn.Tanh(), Flatten("view"), nn.Linear(64, 3)),
        "0",
        IMAGE,
    ),
    "averaged over space": (
        lambda: row(nn.Conv2d(2, 4, 3), nn.Tanh(), Mean(), nn.Linear(4, 3)),
        "0",
        IMAGE,
    ),
    "pooled by averages": (
        lambda: row(nn.Conv2d(2, 4, 3), nn.AvgPool2d(2), nn.Conv2d(4, 3, 2, padding=1)),
        "0",
        IMAGE,
    ),
    "the middle of a squeeze": (
        lambda: row(nn.Conv2d(2, 4, 1), Squeeze(4, 3), nn.Conv2d(4, 2, 1)),
        "1.down",
        IMAGE,
    ),
    "filters of their own": (
        lambda: row(
            nn.Conv2d(2, 4, 3, padding=1, bias=False),
            norm(4),
            nn.Tanh(),
            nn.Conv2d(4, 4, 3, padding=1, groups=4),
            nn.Tanh(),
            nn.Conv2d(4, 2, 3),
        ),
        "0",
        IMAGE,
    ),
    "filters with strides": (
        lambda: row(
            nn.Conv2d(2, 4, 2),
            nn.Conv2d(4, 4, (3, 2), (2, 1), (2, 1), (1, 2), groups=4),
            nn.Tanh(),
            nn.Conv2d(4, 2, 2, padding=1),
        ),
        "0",
        IMAGE,
    ),
    "channels with gates": (
        lambda: row(nn.Conv2d(2, 4, 3), Squeeze(4, 3), nn.Conv2d(4, 2, 1)),
        "0",
        IMAGE,
    ),
    "values of attention": (
        lambda: row(nn.Linear(3, 6), Attention(6, 2, 3, "written"), nn.Linear(6, 2)),
        "1.v[1]",
        (5, 3),
    ),
    "values of masked attention": (
        lambda: row(nn.Linear(3, 6), Attention(6, 2, 3, "masked"), nn.Linear(6, 2)),
        "1.v[1]",
        (5, 3),
    ),
    "values of causal attention": (
        lambda: row(nn.Linear(3, 6), Attention(6, 2, 3, "causal"), nn.Linear(6, 2)),
        "1.v[1]",
        (5, 3),
    ),
    "word vectors": (Words, "table", (5,)),
    "called twice": (
        lambda: row(nn.Linear(3, 4), Twice(nn.Linear(4, 4)), nn.Linear(4, 2)),
        "0",
        VECTOR,
    ),
    "inside a module called twice": (
        lambda: row(Twice(row(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))), nn.Linear(3, 2)),
        "0.inner.0",
        VECTOR,
    ),
    "one weight in two layers": (
        lambda: row(nn.Linear(3, 4), Siblings(4), nn.Linear(4, 2)),
        "0",
        VECTOR,
    ),
}
REFUSED: dict[str, Case] = {
    "weighs positions with it": (
        lambda: row(nn.Linear(3, 6), Attention(6, 2, 3, "written"), nn.Linear(6, 2)),
        "1.q[0]",
        (5, 3),
    ),
    "multiplies it with itself": (
        lambda: row(Times(nn.Linear(3, 4), nn.Linear(3, 4)), nn.Linear(4, 2)),
        "0.a",
        VECTOR,
    ),
    "chunk in '0' moves its positions": (
        lambda: row(Gate(nn.Linear(3, 8), "chunk"), nn.Linear(4, 2)),
        "0.layer",
        VECTOR,
    ),
    "takes the largest of a new unit's own values": (
        lambda: row(nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 3, 1)),
        "0",
        IMAGE,
    ),
    "mixes the channels of each unit": (
        lambda: row(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 2, 1)),
        "0",
        IMAGE,
    ),
    "to other places": (
        lambda: row(
            nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 3, groups=2), Shuffle(2), nn.Conv2d(6, 2, 1)
        ),
        "1[1]",
        IMAGE,
    ),
}


class Times(nn.Module):
    """The product of two layers."""

    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x)


class Attention(nn.Module):
    """Attention with layers of its own for queries, keys and values, written out or fused."""

    def __init__(self, features: int, heads: int, size: int, way: str) -> None:
        super().__init__()
        inner = size if way == "causal" else 4  # kernels want values of the queries' size
        self.q, self.k = nn.Linear(features, inner * heads), nn.Linear(features, inner * heads)
        self.v, self.out = nn.Linear(features, size * heads), nn.Linear(size * heads, features)
        self.heads, self.size, self.way = heads, size, way

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.q(x).reshape(n, t, self.heads, -1).transpose(1, 2)
        k = self.k(x).reshape(n, t, self.heads, -1).transpose(1, 2)
        v = self.v(x).reshape(n, t, self.heads, self.size).transpose(1, 2)
        if self.way == "written":
            y = (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v
        elif self.way == "causal":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mask = torch.ones(t, t, dtype=torch.bool).tril()
            y = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3)
        return self.out(y.transpose(1, 2).reshape(n, t, self.heads * self.size))


class Along(nn.Module):
    """The mean over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def batch(case: Case, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if case[0] is Words:
        return torch.randint(7, (count, *case[2]), generator=generator)
    return torch.randn(count, *case[2], generator=generator, dtype=torch.double)


def loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).flatten(1).square().sum(1).mean()


def data(model: nn.Module, case: Case, counts: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    found = []
    for seed, count in enumerate(counts):
        x = batch(case, count, seed)
        with torch.no_grad():
            found.append((x, torch.cos(3 * copy.deepcopy(model).eval()(x) + seed)))
    return found


def traced(case: Case) -> tuple[nn.Module, gg.Graph]:
    model = filled(case[0]().double(), 1).eval()
    return model, gg.trace(model, batch(case, 2))


def close(a: Tensor, b: Tensor) -> bool:
    b = b.detach()
    return float((a - b).abs().max()) <= EXACT * max(float(b.abs().max()), 1e-3)


@pytest.mark.parametrize("name", CASES)
def test_cross_moments_are_how_the_loss_bends_with_a_small_unit(name: str) -> None:
    """d²L/dα dω at zero is −N for a unit whose activation has slope one there.

    Its filter, where it has one of its own, passes on its centre; its gate has no weights.
    """
    model, graph = traced(CASES[name])
    axis, batches = graph.axis(CASES[name][1]).name, data(model, CASES[name], (3, 2))
    found = moments(graph, batches, loss, [axis])[axis]
    unit = _Unit(graph, axis, found)
    total = torch.zeros_like(found.cross)
    for x, y in batches:
        total += len(x) / 5 * unit.bend(x, y)
    slope = torch.ones_like(found.cross)
    for consumer in found.consumers:
        half = ("the middle of a squeeze", "1.up"), ("channels with gates", "2")
        if (name, consumer.path.removesuffix(".weight")) in half:
            slope[..., consumer.columns] = 0.5  # that of SiLU, and what a gate without weights is
    assert close(slope * found.cross, -total)


class _Unit:
    """A wider model whose new unit's weights are variables."""

    def __init__(self, graph: gg.Graph, axis: str, found: Any) -> None:
        self.found = found
        width = graph.axes[axis].width
        self.change = Resized(graph.analysis, axis, inserted(width, 1, None))
        grown = gg.apply(graph, gg.Widen(axis, 1), verify=False).graph
        self.model = gg.lower(grown).eval()
        self.state = {**grown.state}
        self.tied = graph.analysis.tied
        ones = ("scale", "1.weight", "4.weight")
        for at in {*graph.axes[axis].carriers, *graph.axes[axis].producers}:
            value = 1 - 1e-5 if "var" in at.path else 0.0
            if at in graph.axes[axis].carriers and graph.state[at.path].dim() == 1:
                value = 1.0 if at.path.endswith(ones) else value
            self.state[at.path] = self.put(at.path, at.dim, value)
            if at in graph.axes[axis].carriers and graph.state[at.path].dim() > 2:
                kernel = torch.zeros(graph.state[at.path].shape[2:], dtype=torch.double)
                kernel[tuple((k - 1) // 2 for k in kernel.shape)] = 1
                self.state[at.path] = self.put(at.path, at.dim, kernel.flatten())

    def put(self, path: str, dim: int, values: Any, part: int | None = None) -> Tensor:
        """Return a tensor with new numbers in the new unit's entries of one dim."""
        places = torch.from_numpy(self.change.at(path, dim)[-1])
        moved = self.state[path].detach() if not isinstance(values, Tensor) else self.state[path]
        moved = moved.movedim(dim, 0).clone()
        shape = moved[places].shape
        if isinstance(values, Tensor):
            at = next(a for a in self._dims() if (a.path, a.dim) == (path, dim))
            filled_ = torch.zeros(moved[places].numel(), dtype=torch.double)
            filled_[old_entries(self.change, at)] = 1
            values = torch.zeros_like(filled_).masked_scatter(filled_ > 0, values).reshape(shape)
            moved = moved.index_add(0, places, values)
        else:
            moved[places] = values
        return moved.movedim(0, dim)

    def _dims(self) -> list[Any]:
        axis = self.change.analysis.axes[self.change.axis]
        return [*axis.producers, *axis.consumers, *axis.carriers]

    def bend(self, x: Tensor, y: Tensor) -> Tensor:
        parts, rows, columns = self.found.cross.shape
        alpha = torch.zeros(parts, rows, dtype=torch.double, requires_grad=True)
        omega = torch.zeros(parts, columns, dtype=torch.double, requires_grad=True)
        kept = dict(self.state)
        axis = self.change.analysis.axes[self.change.axis]
        dims = {at.path: at.dim for at in axis.producers}
        biases = {at.path: at.dim for at in axis.carriers}
        for p in self.found.producers:
            mine = alpha[:, p.rows]
            self.state[p.path] = self.put(p.path, dims[p.path], mine[:, : p.entries].reshape(-1))
            if p.bias:
                self.state[p.bias] = self.put(
                    p.bias, biases[p.bias], mine[:, p.entries].reshape(-1)
                )
        reading = {at.path: at.dim for at in axis.consumers}
        for c in self.found.consumers:
            self.state[c.path] = self.put(c.path, reading[c.path], omega[:, c.columns].reshape(-1))
        state, self.state = self.state, kept
        state = {path: state[self.tied[path]] for path in state}
        value = loss(torch.func.functional_call(self.model, state, (x,), strict=False), y)
        (slope,) = torch.autograd.grad(value, omega, create_graph=True)
        bends = [torch.autograd.grad(s, alpha, retain_graph=True)[0] for s in slope.flatten()]
        found = torch.stack(bends).reshape(parts, columns, parts, rows)
        return torch.stack([found[g, :, g].T for g in range(parts)])


@pytest.mark.parametrize("fact", REFUSED)
def test_what_cannot_be_joined_is_refused(fact: str) -> None:
    _, graph = traced(REFUSED[fact])
    axis = graph.axis(REFUSED[fact][1]).name
    assert fact in str(obstacle(graph, axis))
    assert axis not in moments(graph, [(batch(REFUSED[fact], 2), None)], _mean)
    with pytest.raises(gg.NotApplicable, match=re.escape(fact)):
        moments(graph, [], loss, [axis])


def _mean(output: Tensor, target: None) -> Tensor:
    return output.sin().flatten(1).mean()


# ------------------------------------------------------------------------------ naive formulas

windows = st.builds(
    dict,
    kernel_size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)


def fits(window: dict[str, Any], space: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, k, t, p, d in zip(
            space,
            *(window[name] for name in ("kernel_size", "stride", "padding", "dilation")),
            strict=True,
        )
    )


@st.composite
def two_layers(draw: st.DrawFn) -> tuple[nn.Module, dict[str, Any], dict[str, Any], int, int]:
    space = (5, 6)
    first = draw(windows.filter(lambda w: min(fits(w, space)) > 0))
    second = draw(windows.filter(lambda w: min(fits(w, fits(first, space))) > 0))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    g1, g2 = draw(st.sampled_from([(1, groups), (groups, groups), (groups, 1)]))
    width, out = groups * draw(st.integers(2, 3)), g2 * draw(st.integers(1, 2))
    one = nn.Conv2d(2 * g1, width, groups=g1, bias=draw(st.booleans()), **first)
    two = nn.Conv2d(width, out, groups=g2, bias=draw(st.booleans()), **second)
    return row(nn.Conv2d(2, 2 * g1, 1), one, nn.Tanh(), two), first, second, g1, g2


def unfolded(x: Tensor, window: dict[str, Any], groups: int, bias: bool) -> Tensor:
    """What a convolution reads: `(n, groups, entries, positions)`."""
    made = F.unfold(x, **window).unflatten(1, (groups, -1))
    return torch.cat([made, torch.ones_like(made[:, :, :1])], 2) if bias else made


@pytest.mark.parametrize("spectra", [True, False])
@given(drawn=two_layers(), seed=st.integers(0, 9))
def test_moments_are_those_of_unfolded_inputs(spectra: bool, drawn: Any, seed: int) -> None:
    model, first, second, g1, g2 = drawn
    model = filled(model.double(), seed).eval()
    x = torch.randn(3, 2, 5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    y = torch.cos(3 * model(x)).detach()
    graph = gg.trace(model, x[:2])
    wanted = {"1.weight[0]", "3.weight[1]"}
    axes = [
        a.name
        for a in graph.axes.values()
        if a.obstacle is None and wanted <= {*map(str, (*a.producers, *a.consumers))}
    ]
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    with pytest.MonkeyPatch.context() as patch:
        way = "graphgrow.measure.correlate.cheaper"
        patch.setattr(way, lambda x, y, along, wanted: spectra and bool(wanted))
        measured = moments(graph, batches, loss, axes, overlap=True)
    for found in measured.values():
        before = model[0](x)
        hidden = model[2](model[1](before))
        output = model[3](hidden)
        (v,) = torch.autograd.grad(loss(output, y), output)
        v = -v.flatten(2).unflatten(1, (g2, -1))  # (n, g2, out, positions)
        u = unfolded(before, first, g1, model[1].bias is not None)
        b = unfolded(hidden, second, g2, model[3].bias is not None)
        space = u.unflatten(3, hidden.shape[2:])
        far = F.unfold(space.flatten(0, 2)[:, None], **second).unflatten(0, space.shape[:3])
        cross = torch.einsum("ngetj,nhoj->ngheto", far, v).sum(0)
        overlap = torch.einsum("ngetj,nhoj->ngheto", far, b).sum(0) / 3
        parts = found.parts
        pairs = [(g % g1, g % g2) for g in range(parts)]
        want = torch.stack([cross[g, h].transpose(1, 2).flatten(1) for g, h in pairs])
        both = torch.stack([overlap[g, h].transpose(1, 2).flatten(1) for g, h in pairs])
        inputs = torch.einsum("ngep,ngfp->gef", u, u).expand(parts, -1, -1) / 3
        (consumer,) = found.consumers
        assert close(found.cross, want)
        assert close(found.inputs, inputs)
        assert consumer.overlap is not None and close(consumer.overlap, both)
        assert close(consumer.present, torch.einsum("ngep,ngfp->gef", b, b) / 3)
        assert close(consumer.desired, torch.einsum("ngep,ngop->geo", b, v))
        assert close(consumer.gradient, torch.einsum("ngep,ngop->geo", v, v) * 3)


@pytest.mark.parametrize("name", CASES)
def test_moments_do_not_depend_on_batches_and_leave_the_model_alone(name: str) -> None:
    model, graph = traced(CASES[name])
    axis, before = graph.axis(CASES[name][1]).name, copy.deepcopy(model.state_dict())
    (x, y), *_ = data(model, CASES[name], (6,))
    random = torch.get_rng_state()
    whole = moments(graph, [(x, y)], loss, [axis], project=True)[axis]
    split = [(x[:1], y[:1]), (x[1:4], y[1:4]), (x[4:], y[4:])]
    parts = moments(graph, iter(split), loss, [axis], project=True)[axis]
    assert close(whole.inputs, parts.inputs) and close(whole.cross, parts.cross)
    assert whole.projected is not None and parts.projected is not None
    assert (whole.projected - parts.projected).abs().max() < 1e-8 * whole.cross.abs().max() + 1e-12
    assert torch.equal(random, torch.get_rng_state()) and not model.training
    assert all(torch.equal(t, before[p]) for p, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", CASES)
def test_a_grown_graph_is_measured_as_its_model_traced_anew(name: str) -> None:
    """Numbers in calls, such as groups, are those of the widths of now."""
    model, graph = traced(CASES[name])
    axis = graph.axis(CASES[name][1]).name
    grown = gg.apply(graph, gg.Widen(axis, 3, weights=gg.ZeroOutgoing())).graph
    batches = data(model, CASES[name], (4,))
    anew = gg.trace(gg.lower(grown), batch(CASES[name], 2))
    (expected,) = moments(anew, batches, loss, [anew.axis(CASES[name][1]).name]).values()
    assert not grown.analysis.current and grown.renewed().analysis.current
    fused = name == "values of causal attention"  # by another operator than before it grew
    for measured in [grown.renewed()] if fused else [grown, grown.renewed()]:
        found = moments(measured, batches, loss, [axis])[axis]
        assert close(found.inputs, expected.inputs) and close(found.cross, expected.cross)


def test_rows_that_lie_apart_are_multiplied_in_every_batch_as_when_traced() -> None:
    """Attention of one feature: whether its rows lie in one piece depends on the batch."""
    model = filled(row(nn.Conv1d(1, 1, 1), Attend(1, 1, False, bias=False), nn.Conv1d(1, 1, 1)), 0)
    model = model.double().eval()
    graph = gg.trace(model, torch.randn(3, 1, 3, dtype=torch.double))
    x = torch.randn(4, 1, 3, dtype=torch.double)
    assert all(m.examples == 4 for m in moments(graph, [(x, 0 * x)], loss).values())


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_layers_written_over_in_place_and_norms_by_batch_are_measured(mode: str) -> None:
    model = row(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(True), nn.Linear(4, 2), nn.ReLU(True))
    model = filled(model.double(), 0)
    x, y = torch.randn(6, 3, dtype=torch.double), torch.zeros(6, 2, dtype=torch.double)
    (consumer,) = moments(gg.trace(model, x), [(x, y)], loss, ["0"], mode=mode)["0"].consumers
    loss(model.train(mode == "train")(x), y).backward()
    assert close(consumer.desired[0, :4].T, -model[3].weight.grad)
    assert close(consumer.desired[0, 4], -model[3].bias.grad)


def test_large_batches_are_cut_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    _, graph = traced(CASES["strides and borders"])
    x = batch(CASES["strides and borders"], 8)
    whole = moments(graph, [(x, None)], _mean, ["0"])["0"]
    monkeypatch.setattr("graphgrow.measure.patches.ENTRIES", 100)
    cut = moments(graph, [(x, None)], _mean, ["0"])["0"]
    assert close(cut.inputs, whole.inputs) and close(cut.cross, whole.cross)


def test_products_in_blocks_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for case in (CASES["tokens"], CASES["residual stage"]):
        model, graph = traced(case)
        axis, batches = graph.axis(case[1]).name, data(model, case, (4,))

        def made() -> list[Tensor]:
            found = moments(graph, batches, loss, [axis])[axis]  # noqa: B023
            own = [t for c in found.consumers for t in (c.present, c.gradient)]
            return [found.inputs, found.cross, *own]

        whole = made()
        with monkeypatch.context() as patch:
            patch.setattr("graphgrow.measure.sums.BLOCK", 2)
            patch.setattr("graphgrow.measure.correlate.BLOCK", 1)
            assert all(close(one, other) for one, other in zip(made(), whole, strict=True))


def test_attention_in_pieces_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for case in (CASES["values of attention"], CASES["values of masked attention"]):
        _, graph = traced(case)
        x = batch(case, 8)
        whole = moments(graph, [(x, None)], _mean, [case[1]])[case[1]]
        with monkeypatch.context() as patch:
            patch.setattr("graphgrow.measure.patches.ENTRIES", 100)
            cut = moments(graph, [(x, None)], _mean, [case[1]])[case[1]]
        assert close(cut.inputs, whole.inputs) and close(cut.cross, whole.cross)


def test_float32_sums_lose_nothing_from_batch_to_batch() -> None:
    model = row(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1))
    graph = gg.trace(model, torch.ones(2, 1))
    x, y = torch.full((4096, 1), 1.1), torch.ones(4096, 1)
    once, often = (moments(graph, [(x, y)] * n, loss, ["0"])["0"] for n in (1, 20))
    assert often.inputs.dtype is torch.double and often.examples == 81920
    assert (often.inputs / once.inputs - 1).abs().max() < 1e-12


def test_two_ranks_on_halves_of_the_data_measure_the_whole(tmp_path: Any) -> None:
    case = CASES["channels"]
    _, graph = traced(case)
    x = batch(case, 4)
    whole = moments(graph, [(x, None)], _mean, ["0"], project=True)["0"]
    torch.multiprocessing.spawn(_rank, (str(tmp_path), x), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["examples"] == 4 and abs(found["loss"] - whole.loss) < 1e-12
        assert close(found["inputs"], whole.inputs) and close(found["cross"], whole.cross)
        assert (found["projected"] - whole.projected).abs().max() < 1e-8 * whole.cross.abs().max()


def _rank(rank: int, path: str, x: Tensor) -> None:
    torch.set_num_threads(1)
    store = f"file://{path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    _, graph = traced(CASES["channels"])
    found = moments(graph, [(x[2 * rank : 2 * rank + 2], None)], _mean, ["0"], project=True)["0"]
    kept = {name: getattr(found, name) for name in ("inputs", "cross", "projected", "examples")}
    torch.save({**kept, "loss": found.loss}, f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_tied_weight_is_measured_on_both_of_its_sides() -> None:
    model = filled(row(Tied(3, 4)).double(), 2)
    x = torch.randn(5, 3, dtype=torch.double)
    found = moments(gg.trace(model, x), [(x, 0 * x)], loss, ["0.encoder"])["0.encoder"]
    assert found.producers[0].path == found.consumers[0].path == "0.encoder.weight"
    joined = torch.cat([x, torch.ones(5, 1, dtype=torch.double)], 1)
    assert close(found.inputs[0], joined.T @ joined / 5)
    assert close(found.cross[0], -joined.T @ (2 * model(x)) / 5)


def test_all_axes_at_once_are_measured_as_each_alone() -> None:
    for name in ("inside the groups", "residual stage", "densely connected", "called twice"):
        model, graph = traced(CASES[name])
        batches = data(model, CASES[name], (3, 2))
        for axis, found in moments(graph, batches, loss, project=True).items():
            alone = moments(graph, batches, loss, [axis], project=True)[axis]
            assert close(found.inputs, alone.inputs) and close(found.cross, alone.cross)
            for one, other in zip(found.consumers, alone.consumers, strict=True):
                assert one.columns == other.columns and close(one.present, other.present)


def test_only_what_is_named_is_measured() -> None:
    model, graph = traced(CASES["residual stage"])
    batches = data(model, CASES["residual stage"], (3,))
    axis = graph.axis(CASES["residual stage"][1]).name
    whole = moments(graph, batches, loss, [axis])[axis]
    for name in ("inputs", "cross"):
        alone = moments(graph, batches, loss, [axis], of=[name])[axis]
        assert close(getattr(alone, name), getattr(whole, name))
        other = "cross" if name == "inputs" else "inputs"
        with pytest.raises(ValueError, match=f"cannot give '{other}' of .* ask for it with of="):
            getattr(alone, other)
        with pytest.raises(ValueError, match="cannot give 'gradient'"):
            _ = alone.consumers[0].gradient
    for one, other in zip(
        moments(graph, batches, loss, [axis], of=["desired"])[axis].consumers,
        whole.consumers,
        strict=True,
    ):
        assert close(one.desired, other.desired)
    with pytest.raises(ValueError, match=r"cannot measure .*'wishes'"):
        moments(graph, batches, loss, [axis], of=["wishes"])


def test_batches_of_images_of_different_sizes_are_added() -> None:
    case = CASES["strides and borders"]
    model, graph = traced(case)
    generator = torch.Generator().manual_seed(0)
    found = []
    for sizes in ((6, 6), (7, 5), (9, 6)):
        x = torch.randn(4, 2, *sizes, generator=generator, dtype=torch.double)
        with torch.no_grad():
            found.append((x, torch.cos(3 * model(x))))
    whole = moments(graph, found, loss, ["0"])["0"]
    parts = [moments(graph, [batch_], loss, ["0"])["0"] for batch_ in found]
    assert close(whole.inputs, torch.stack([p.inputs for p in parts]).mean(0))
    assert close(whole.cross, torch.stack([p.cross for p in parts]).mean(0))
    present = torch.stack([p.consumers[0].present for p in parts]).mean(0)
    assert close(whole.consumers[0].present, present)


def test_spectra_are_taken_where_they_are_cheaper_and_give_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    images = (torch.randn(16, 64, 12, 12, generator=generator) for _ in range(2))
    x, y = (Image(image.double()) for image in images)
    along = [through_units((3, 1, 1, 1), (3, 1, 1, 1), (12, 12, 12))] * 2
    whole = [
        (i, j)
        for i, j in itertools.product(range(len(along[0].stretches)), repeat=2)
        if along[0].stretches[i].whole and along[1].stretches[j].whole
    ]
    assert cheaper(x, y, along, whole) and not cheaper(x, y, along, whole[:1])
    for numbers, rows, found in lags(x, y, along, whole):
        stretches = zip(along, numbers, strict=True)
        places = [a.stretches[n].places(a.steps) for a, n in stretches]
        read, wanted = zip(*places, strict=True)
        assert close(found, (x.rows(read) @ y.rows(wanted).mT)[:, rows])


def test_nothing_of_a_batch_is_kept_after_it() -> None:
    """Without the help of the garbage collector: what a batch read is gone with its pass."""
    _, graph = traced(CASES["channels"])
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def noted(output: Tensor, target: None) -> Tensor:
        alive.append(sum(ref() is not None for ref in seen))
        seen.append(weakref.ref(output))
        return _mean(output, target)

    gc.disable()
    try:
        moments(graph, [(batch(CASES["channels"], 2), None)] * 4, noted, ["0"])
    finally:
        gc.enable()
    assert alive == [0, 0, 0, 0]


def test_measuring_loads_none_of_what_takes_more_memory_than_small_models() -> None:
    script = (
        "import sys, torch, graphgrow as gg\n"
        "x = torch.randn(4, 3)\n"
        "from torch import nn\n"
        "model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))\n"
        "gg.moments(gg.trace(model, x), [(x, x[:, :2])], torch.nn.functional.mse_loss)\n"
        "print(sorted({'torch._dynamo', 'sympy', 'networkx', 'sklearn'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout == "[]\n", found
