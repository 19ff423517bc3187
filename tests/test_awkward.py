"""Awkward modules: the right axes, exact growth of each that can grow, reasons for the others."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
from awkward import CASES, Case
from strategies import fill
from torch import nn
from torch.utils._pytree import tree_leaves

import graphgrow as gg

BY_THE_MODEL = ("is fixed by dim", "of the model's output")


def traced(case: Case) -> tuple[nn.Module, gg.Graph]:
    torch.manual_seed(0)
    model = fill(case.module().double(), 1)
    return model, gg.trace(model, case.inputs(2))


def free(graph: gg.Graph) -> dict[str, gg.Widen]:
    widened = {name: gg.Widen(name, 3 * axis.multiple) for name, axis in graph.axes.items()}
    return {n: rewrite for n, rewrite in widened.items() if rewrite.obstacle(graph) is None}


@pytest.mark.parametrize("name", CASES)
def test_the_axes_are_those_stated(name: str) -> None:
    case = CASES[name]
    _, graph = traced(case)
    can = free(graph)
    assert {f"{n}({graph.axes[n].width})" for n in can} == case.grows
    said = {n: str(gg.Widen(n, 3).obstacle(graph)) for n in graph.axes if n not in can}
    said = {n: s for n, s in said.items() if not any(reason in s for reason in BY_THE_MODEL)}
    assert said.keys() == case.fixed.keys()
    for axis, reason in case.fixed.items():
        assert reason in said[axis]


@pytest.mark.parametrize(
    ("name", "rewrite"),
    [
        ("AveragedHeads", gg.Widen("v[0]", 2, weights=gg.Copy())),
        ("MessagePassing", gg.Widen("a", 3, 2, gg.ZeroIncoming())),
        ("MessagePassing", gg.Widen("b", 4, weights=gg.Copy())),
        ("GraphAttention", gg.Widen("v[1]", 4, weights=gg.ZeroIncoming())),
    ],
)
def test_what_units_hold_is_followed_through_lists(name: str, rewrite: gg.Widen) -> None:
    case = CASES[name]
    model, graph = traced(case)
    grown = gg.apply(graph, rewrite).graph
    assert gg.compare(model, grown, case.inputs(4)).relative <= 1e-10


@pytest.mark.parametrize("name", CASES)
def test_each_axis_that_can_grow_grows_alone_and_with_the_others(name: str) -> None:
    case = CASES[name]
    model, graph = traced(case)
    can = free(graph)
    for rewrite in can.values():
        grown = gg.apply(graph, rewrite)
        assert gg.compare(model, grown.graph, case.inputs(3)).relative <= 1e-10
    if can:
        all_grown = gg.apply(graph, *can.values())
        assert gg.compare(model, all_grown.graph, case.inputs(3)).relative <= 1e-10


def test_heads_multiplied_with_a_size_of_the_run_follow_again_and_in_the_users_model() -> None:
    case = CASES["AttentionHeadsInTheBatch"]
    model, graph = traced(case)
    before = copy.deepcopy(model)
    grown = gg.apply(graph, gg.Widen("q[0]", 3), gg.Widen("q[0]", 2), gg.Widen("q[1]", 3)).graph
    assert gg.compare(model, grown, case.inputs(5)).relative <= 1e-12
    nodes = [sum(node.target is operator.mul for node in g.eval.nodes) for g in (graph, grown)]
    assert nodes == [1, 1]
    back = gg.apply(grown, gg.Remove("q[0]", (2, 3, 4, 5, 6))).graph
    assert gg.compare(model, back, case.inputs(5)).relative <= 1e-12
    gg.lower(grown, into=model)
    assert model.heads == 7
    assert gg.compare(before, model, case.inputs(5)).relative <= 1e-12


def test_removing_units_where_only_eps_follows_is_held_to_rounding_in_single_precision() -> None:
    case = CASES["StandardisedWithoutGain"]
    torch.manual_seed(0)
    model = fill(case.module(), 1).float()
    grown = gg.apply(gg.trace(model, case.inputs(2).float()), gg.Widen("a[0]", 3)).graph
    back = gg.apply(grown, gg.Remove("a[0]", (2, 3, 4)))
    assert 0 < back.proof.rounding < 1e-4
    assert gg.compare(model, back.graph, case.inputs(3).float()).relative <= back.proof.rounding


# A softmax over keys does not see a key's bias; a unit that is not the largest does not learn.
BLIND = {
    ("AttentionManual", "k.bias"),
    ("AttentionHeadsInTheBatch", "k.bias"),
    ("Mha", "a.in_proj_bias"),
    ("EncoderLayer", "a.self_attn.in_proj_bias"),
    ("MaxoutFirst", "a.weight"),
    ("MaxoutFirst", "a.bias"),
}


@pytest.mark.parametrize("name", CASES)
def test_new_units_learn_within_two_steps(name: str) -> None:
    case = CASES[name]
    _, graph = traced(case)
    for rewrite in free(graph).values():
        grown = gg.apply(graph, rewrite)
        before, after = touched(graph, case), touched(grown.graph, case)
        for path, origin in grown.origin.items():
            for dim, index in enumerate(origin.dims):
                unseen = path not in before or not before[path].any() or (name, path) in BLIND
                if index is None or unseen:
                    continue
                new = after[path].index_select(dim, (index < 0).nonzero().flatten())
                assert new.movedim(dim, 0).reshape(new.shape[dim], -1).any(1).all(), (
                    f"{rewrite}: {path}"
                )


def touched(graph: gg.Graph, case: Case) -> dict[str, torch.Tensor]:
    """Return which entries of each parameter get a gradient within two steps of SGD."""
    torch.manual_seed(0)
    model = gg.lower(graph).train()
    found: dict[str, torch.Tensor] = {}
    kept = {p: t.detach().clone() for p, t in model.state_dict().items()}
    for step in range(2):
        model.zero_grad()
        sum(leaf.sin().sum() for leaf in tree_leaves(model(case.inputs(64 + step)))).backward()
        with torch.no_grad():
            for path, parameter in model.named_parameters(remove_duplicate=False):
                if parameter.grad is not None:
                    found[path] = found.get(path, False) | (parameter.grad != 0)
            for parameter in model.parameters():
                parameter -= 1e-2 * (0 if parameter.grad is None else parameter.grad)
    model.load_state_dict(kept)
    model.zero_grad()
    return found
