"""What a graph says of its axes: names, layouts, obstacles, and the dataflow."""

from __future__ import annotations

import networkx as nx
import pytest
import torch
from strategies import Concat, Flatten, Gate, Residual
from torch import Tensor, nn

import graphgrow as gg


class Between(nn.Module):
    """Two layers with any function between them."""

    def __init__(self, function, hidden: int = 4) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(hidden, 2)
        self.side, self.sum, self.function = nn.Linear(3, 6), nn.Linear(6, 2), function

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.last(self.function(self.first(x))), self.sum(torch.relu(self.side(x)))


def graph_of(*layers: nn.Module, shape: tuple[int, ...] = (2, 3)) -> gg.Graph:
    return gg.trace(nn.Sequential(*layers), torch.randn(shape))


def test_an_operator_without_a_row_freezes_what_it_touches_and_nothing_else() -> None:
    graph = gg.trace(Between(lambda x: torch.logcumsumexp(x, 1), 5), torch.randn(2, 3))
    said = graph.axis("first").obstacle
    assert said is not None and "no rule is known for the operator 'aten.logcumsumexp'" in said
    assert gg.apply(graph, gg.Widen("side", 2)).graph.axes["side"].width == 8
    assert "aten.logcumsumexp" in graph.analysis.unknown


@pytest.mark.parametrize(
    ("function", "hidden", "reason"),
    [
        (lambda x: torch.softmax(x, -1), 5, "mixes its units"),
        (lambda x: x.flip(1), 5, "changes its order"),
        (lambda x: x[:, ::2], 3, "is sliced with a step"),
        (lambda x: x[:, torch.tensor([0, 1, 4])], 3, "is indexed by a tensor"),
        (lambda x: torch.cumsum(x, 1), 5, "mixes its units"),
        (lambda x: x * torch.arange(5.0), 5, "is a size computed by the model"),
    ],
)
def test_what_mixes_or_counts_units_is_an_obstacle(function, hidden: int, reason: str) -> None:
    axis = gg.trace(Between(function, hidden), torch.randn(2, 3)).axes
    said = [a.obstacle for a in axis.values() if a.name.startswith("first") and "." not in a.name]
    assert reason in " ".join(filter(None, said))


def test_inputs_and_outputs_are_fixed_and_say_so() -> None:
    graph = graph_of(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert {name: axis.obstacle for name, axis in graph.axes.items()} == {
        "0": None,
        "0.weight.1": "cannot widen axis '0.weight.1' (3 units): it is fixed by dim 1 of the "
        "input 'input'",
        "2": "cannot widen axis '2' (2 units): it is dim 1 of the model's output",
    }


def test_an_axis_is_found_by_every_module_that_writes_it() -> None:
    graph = graph_of(nn.Linear(3, 4), Residual(nn.Linear(4, 4), nn.Identity()), nn.Linear(4, 2))
    axis = graph.axis("0")
    assert [str(at) for at in axis.producers] == ["0.weight[0]", "1.branch.weight[0]"]
    assert [str(at) for at in axis.consumers] == ["1.branch.weight[1]", "2.weight[1]"]
    assert [str(at) for at in axis.carriers] == ["0.bias[0]", "1.branch.bias[0]"]
    assert graph.axis("1.branch") is axis and graph.axis("0.weight") is axis
    with pytest.raises(gg.NotApplicable, match=r"cannot find axis '7': no module"):
        graph.axis("7")


def test_a_path_that_writes_several_axes_lists_them() -> None:
    graph = graph_of(Gate(nn.Linear(3, 8), "chunk"), nn.Linear(4, 2))
    assert graph.axis("0.layer").name == "0.layer[0]"  # both halves are one axis
    graph = gg.trace(Two(), torch.randn(2, 3))
    with pytest.raises(gg.NotApplicable, match=r"'both\[0\]' \(2 units\), 'both\[1\]' \(3 units\)"):
        graph.axis("both")


class Two(nn.Module):
    """One layer whose parts go different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.left, self.right = nn.Linear(3, 5), nn.Linear(2, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.both(x).split([2, 3], dim=1)
        return self.left(left) + self.right(torch.relu(right))


def test_the_graph_prints_like_code_with_layouts() -> None:
    graph = graph_of(
        Concat(nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 1)),
        nn.MaxPool2d(2),
        Flatten("flatten"),
        nn.Linear(36, 2),
        shape=(2, 3, 4, 4),
    )
    text = str(graph)
    assert "cat = cat" in text
    assert "# [2, (0.branches.0 + 0.branches.1), 4, 4]" in text
    assert "# [2, (0.branches.0 2 2 + 0.branches.1 2 2)]" in text
    assert text.splitlines()[-1].startswith("return ")


def test_the_dataflow_answers_questions_of_reachability() -> None:
    graph = graph_of(nn.Linear(3, 4), Residual(nn.Linear(4, 4), nn.Identity()), nn.Linear(4, 2))
    flow = graph.to_networkx()
    assert nx.is_directed_acyclic_graph(flow)
    branch = next(n for n, d in flow.nodes(data=True) if d["target"] == "1.branch")
    last = next(n for n, d in flow.nodes(data=True) if d["target"] == "2")
    assert nx.has_path(flow, branch, last) and flow.nodes[last]["layouts"] == ["[2, 2]"]


def test_candidates_are_the_rewrites_that_apply() -> None:
    graph = graph_of(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert gg.candidates(graph, gg.Widen, units=2) == [gg.Widen("0", 2)]
    assert gg.candidates(graph, gg.Remove, units=(0,)) == []
    assert [rewrite.at for rewrite in gg.candidates(graph, gg.Deepen)] == ["0", "1", "2"]


def test_a_layer_from_an_axis_to_itself_grows_both_ways() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.again, self.out = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.into(x)
            for _ in range(3):
                x = torch.tanh(self.again(x)) + x
            return self.out(x)

    model = Recurrent().double()
    x = torch.randn(2, 3, dtype=torch.double)
    graph = gg.trace(model, x)
    grown = gg.apply(graph, gg.Widen("into", 3, at=1))
    assert grown.graph.state["again.weight"].shape == (7, 7)
    assert gg.compare(model, grown.graph, x).relative <= 1e-10
