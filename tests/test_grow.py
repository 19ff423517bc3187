"""The Grower in a training loop: when, where, how much, and nothing lost on the way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphgrow as gg
from graphgrow.measure.cost import latency
from graphgrow.moments import ALL, moments
from graphgrow.scores.amplitude import mean_loss
from graphgrow.scores.carry import carried
from graphgrow.when import Clock


class Digits(nn.Module):
    """A small convolutional network with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 2, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(2)
        self.second = nn.Conv2d(2, 3, 3, padding=1)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.second(F.silu(self.norm(self.first(x)))))
        return self.head(x.mean((2, 3)))


def examples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 5, 5, generator=generator)
    return x, x[:, 0, :, :3].square().sum(1).argmax(1)


BATCHES = [examples(16, seed) for seed in range(2)]
SCORES: dict[str, Callable[[], Any]] = {
    "tiny": lambda: gg.scores.Tiny(1),
    "random": lambda: gg.scores.Random(1),
    "gradmax": lambda: gg.scores.GradMax(1),
}


def grower(model: nn.Module, optimizer: Any, **options: Any) -> gg.Grower:
    options = {"score": gg.scores.Tiny(1), "when": gg.Every(5), **options}
    return gg.Grower(model, BATCHES[0][0][:2], loss=F.cross_entropy, optimizer=optimizer, **options)


def trained(steps: range, found: gg.Grower) -> None:
    for step in steps:
        x, y = examples(16, 100 + step)
        found.model.train()
        found.optimizer.zero_grad()
        value = F.cross_entropy(found.model(x), y)
        value.backward()
        found.optimizer.step()
        found.step(BATCHES, float(value.detach()))


def fresh(seed: int = 0, rate: float = 1e-2) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Digits()
    return model, torch.optim.Adam(model.parameters(), rate)


@pytest.mark.parametrize("name", SCORES)
def test_a_model_grows_in_its_own_loop_and_no_loss_jumps(name: str) -> None:
    model, optimizer = fresh()
    found = grower(model, optimizer, score=SCORES[name]())
    trained(range(20), found)
    assert found.model is model and found.optimizer is optimizer
    assert [event["step"] for event in found.record] == [5, 10, 15, 20]
    for event in found.record:
        assert event["loss_after"] == pytest.approx(event["loss_before"], rel=1e-5)
    assert found.record[-1]["parameters"] == sum(p.numel() for p in model.parameters())
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in model.parameters()
    }
    assert [json.loads(line) for line in found.lines().splitlines()] == found.record
    assert len(found.journal) == 4
    assert all(r.weights == gg.Given() for r in found.journal)  # a long run's journal stays short


def test_nothing_is_grown_before_its_time_or_beyond_the_budget() -> None:
    found = grower(*fresh(), when=gg.Every(3), budget=gg.Budget(units=2))
    trained(range(2), found)
    assert found.record == []
    trained(range(12), found)
    assert sum(g["units"] for e in found.record for g in e["growths"]) == 2
    found = grower(*fresh(), where=gg.Where(least=1e9))
    trained(range(5), found)
    assert found.record == [] and found.journal == ()
    found = grower(*fresh(), budget=gg.Budget(parameters=1))
    trained(range(5), found)
    assert found.record == []


def test_axes_places_and_widths_are_those_asked_for() -> None:
    where = gg.Where(axes=("second",), most=(("second", 5),))
    found = grower(*fresh(), when=gg.Every(1), where=where)
    trained(range(5), found)
    assert found.graph.axes["second"].width == 5 and found.graph.axes["first"].width == 2
    found = grower(*fresh(), when=gg.Every(1), where=gg.Where(places=2))
    trained(range(1), found)
    widths = found.record[0]["widths"]
    assert sum(widths.values()) == 5 + len(found.record[0]["growths"])


def test_the_best_gain_for_its_cost_is_taken() -> None:
    model, optimizer = fresh()
    found = grower(model, optimizer, when=gg.Every(1), where=gg.Where(per="parameters"))
    graph = gg.trace(model, BATCHES[0][0][:2])
    measured = moments(graph, BATCHES, F.cross_entropy, project=True)
    proposals = gg.scores.Tiny(1).proposals(graph, measured)
    best = max(proposals, key=lambda p: p.gain / p.parameters)
    event = found.step(BATCHES)
    assert event is not None and event["growths"][0]["axis"] == best.rewrite.axis
    assert event["growths"][0]["gain"] == pytest.approx(best.gain, rel=1e-9)


def test_a_plateau_is_where_the_loss_has_not_fallen_for_so_long() -> None:
    found = grower(*fresh(), when=gg.Plateau(3))
    values = [5.0, 4.0, 3.0, 3.5, 3.2, 3.1, 9.0, 8.0, 8.5, 8.5, 8.5]
    grown = [found.step(BATCHES, value) is not None for value in values]
    assert [k + 1 for k, g in enumerate(grown) if g] == [6, 11]


def test_the_loss_a_hundred_steps_later_is_in_the_record() -> None:
    found = grower(*fresh(), when=gg.Every(60))
    for _ in range(161):
        found.step(BATCHES)
    first, second = found.record
    assert first["loss_100_later"] == pytest.approx(
        mean_loss(found.graph, BATCHES[:1], F.cross_entropy), rel=1e-5
    )
    assert second["loss_100_later"] is None


def test_the_amplitude_is_a_step_of_its_own_that_lowers_the_loss() -> None:
    found = grower(*fresh(), amplitude=True)
    trained(range(5), found)
    (growth,) = found.record[0]["growths"]
    assert growth["loss_after"] == pytest.approx(growth["loss_before"], rel=1e-5)
    assert growth["gain_measured"] > 0 and growth["amplitude"] != 0
    before = mean_loss(found.graph, BATCHES, F.cross_entropy)
    found.model.eval()
    losses = [F.cross_entropy(found.model(x), y).item() for x, y in BATCHES]
    assert sum(losses) / 2 == pytest.approx(before, rel=1e-5)


def test_an_epoch_is_a_number_of_steps() -> None:
    assert gg.Every.epochs(0.25, 391) == gg.Every(98) and gg.Every.epochs(2, 10) == gg.Every(20)
    assert gg.Every.epochs(0.01, 10) == gg.Every(1)


def test_axes_take_turns_by_their_quotas_and_end_at_their_most() -> None:
    where = gg.Where(axes=("first", "second"), turns=True, most=(("first", 4), ("second", 9)))
    many = gg.Quota((("first", 2), ("second", 4)))
    found = grower(*fresh(), when=gg.Every(1), where=where, many=many, score=gg.scores.Random())
    for _ in range(5):
        found.step(BATCHES)
    grown = [(g["axis"], g["units"]) for e in found.record for g in e["growths"]]
    assert grown == [("first", 2), ("second", 4), ("second", 2)]
    assert found.record[-1]["widths"] == {"first": 4, "second": 9}


def test_a_turn_without_a_proposal_is_over() -> None:
    where = gg.Where(axes=("first", "second"), turns=True, least=0.0)
    found = grower(*fresh(), when=gg.Every(1), where=where, score=Nothing("first"))
    assert [found.step(BATCHES) is not None for _ in range(4)] == [False, True, False, True]


class Nothing:
    """Random units, but none for one axis."""

    project = False

    def __init__(self, axis: str) -> None:
        self.axis = axis

    def proposals(self, graph: gg.Graph, found: Any) -> list[Any]:
        proposals = gg.scores.Random(1).proposals(graph, found)
        return [p for p in proposals if p.rewrite.axis != self.axis]


def test_widths_double() -> None:
    found = grower(*fresh(), when=gg.Every(1), many=gg.Doubling(), score=gg.scores.Random())
    found.where = gg.Where(axes=("second",), most=(("second", 10),))
    events = [found.step(BATCHES) for _ in range(3)]
    assert [event["widths"]["second"] for event in events if event] == [6, 10]


def test_only_axes_whose_bottleneck_is_a_share_of_what_is_desired_grow() -> None:
    graph = gg.trace(fresh()[0], BATCHES[0][0][:2])
    found = moments(graph, BATCHES, F.cross_entropy)
    shares = {}
    for name, axis in found.items():
        every = sum(float(c.gradient.diagonal(dim1=1, dim2=2).sum()) for c in axis.consumers)
        shares[name] = gg.scores.bottleneck(axis) / every
    low, high = sorted(shares.values())
    assert 0 < low < high < 1
    grown = []
    for share in (low * 0.99, (low + high) / 2, high * 1.01):
        when, where = gg.Bottleneck(share), gg.Where(places=2)
        event = grower(*fresh(), when=when, where=where, score=gg.scores.Random()).step(BATCHES)
        grown.append([] if event is None else sorted(g["axis"] for g in event["growths"]))
    assert grown == [sorted(shares), [n for n, s in shares.items() if s == high], []]
    assert [gg.Bottleneck(0.1, 3).due(Clock(steps=n)) for n in (2, 3)] == [False, True]


@pytest.mark.parametrize(
    "score",
    [
        gg.scores.Tiny(1), gg.scores.Tiny(), gg.scores.Tiny(1, joint=True),
        gg.scores.Tiny(joint=True), gg.scores.GradMax(2), gg.scores.Random(1),
    ],
    ids=repr,
)  # fmt: skip
def test_what_a_score_needs_is_enough_and_not_too_much(score: Any) -> None:
    graph = gg.trace(fresh()[0], BATCHES[0][0][:2])
    project, overlap = (getattr(score, name, False) for name in ("project", "overlap"))

    def proposals(of: Any) -> Any:
        found = moments(
            graph, BATCHES, F.cross_entropy, ["second"], project=project, overlap=overlap, of=of
        )
        return [(p.gain, p.rewrite, p.target) for p in score.proposals(graph, found)]

    assert proposals(score.needs) == proposals(ALL)
    implied = ("present", "desired") if project else ()
    for name in set(score.needs) - set(implied):
        with pytest.raises(ValueError, match=f"cannot give '{name}'"):
            proposals([n for n in score.needs if n != name])


def test_no_more_is_measured_than_score_and_schedule_need(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[str]] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        asked.append(set(kwargs["of"]))
        return moments(*args, **kwargs)

    monkeypatch.setattr("graphgrow.grow.moments", noted)
    share = gg.Bottleneck(0.0)
    for score, when in (
        (gg.scores.GradMax(2), gg.Every(1)),
        (gg.scores.GradMax(2), share),
        (gg.scores.Senn(search=gg.scores.Ascent(steps=1), candidates=2), share),
        (NoNeeds(), gg.Every(1)),
    ):
        grower(*fresh(), score=score, when=when).step(BATCHES)
    assert asked == [{"cross"}, {"cross", *share.needs}, {*share.needs}, {*ALL}]


class NoNeeds:
    """A score that does not say what it needs."""

    project = False

    def proposals(self, graph: Any, found: Any) -> list[Any]:
        return []


def test_growth_stops_where_the_measured_latency_would_be_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slow(graph: gg.Graph) -> float:
        return 1e-3 * graph.axes["second"].width

    monkeypatch.setattr("graphgrow.grow.latency", slow)
    where = gg.Where(axes=("first", "second"), places=2)
    budget, score = gg.Budget(latency=4e-3), gg.scores.Random()
    found = grower(*fresh(), when=gg.Every(1), budget=budget, where=where, score=score)
    events = [found.step(BATCHES) for _ in range(3)]
    assert found.graph.axes["second"].width == 4 and found.graph.axes["first"].width == 5
    assert events[2] is not None
    (why,) = events[2]["refused"]
    assert (
        "cannot grow 'second' by 1: the example inputs would take 5 ms, and the budget is 4 ms"
        in why
    )


def test_latency_is_the_shortest_of_several_runs_without_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = gg.trace(nn.Linear(2, 2), torch.ones(1, 2))
    assert 0 < latency(graph) < 10
    times = iter([0.0, 1.0, 5.0, 9.0, 9.0, 12.0, 20.0, 25.0])
    monkeypatch.setattr("graphgrow.measure.cost.time.perf_counter", lambda: next(times))
    assert latency(graph, 3) == 3.0


class Chain(nn.Module):
    """Three layers in a row, and a stage that one of them joins with itself."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 4)
        self.head, self.activation = nn.Linear(4, 3), activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.a(x))
        return self.head(x + self.activation(self.c(self.activation(self.b(x)))))


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU()], ids=["tanh", "relu"])
@pytest.mark.parametrize(
    "score", [gg.scores.Tiny(2), gg.scores.Tiny(2, joint=True), gg.scores.GradMax(2)]
)
def test_axes_that_share_a_tensor_grow_at_once_as_they_would_alone(
    activation: nn.Module, score: Any
) -> None:
    torch.manual_seed(0)
    model = Chain(activation).double()
    x = torch.randn(40, 3, dtype=torch.double)
    batches = [(x, x.square().cumsum(1).argmax(1))]
    graph = gg.trace(model, x[:2])
    options = {"project": score.project, "overlap": getattr(score, "overlap", False)}
    alone = score.proposals(graph, moments(graph, batches, F.cross_entropy, **options))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found = gg.Grower(
        model, x[:2], loss=F.cross_entropy, optimizer=optimizer, score=score,
        where=gg.Where(places=9, least=-math.inf), amplitude=isinstance(score, gg.scores.Tiny),
    )  # fmt: skip
    event = found.step(batches)
    assert event is not None and event["refused"] == []
    assert {g["axis"] for g in event["growths"]} == {p.rewrite.axis for p in alone}
    assert len(alone) == 2
    for growth in event["growths"]:
        (same,) = [p for p in alone if p.rewrite.axis == growth["axis"]]
        assert growth["gain"] == pytest.approx(same.gain, rel=1e-9)
    if not isinstance(score, gg.scores.Tiny):
        assert event["loss_after"] == pytest.approx(event["loss_before"], rel=1e-12)


def test_pairs_of_units_of_two_axes_cannot_be_given_at_once() -> None:
    class Grid(nn.Module):
        """One position for each pair of units of two axes."""

        def __init__(self) -> None:
            super().__init__()
            self.rows, self.columns = nn.Conv2d(1, 2, 1), nn.Linear(4, 3)
            self.head = nn.Linear(2 * 5 * 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.columns(self.rows(x)).flatten(1))

    graph = gg.trace(Grid(), torch.randn(2, 1, 5, 4))
    scheme = gg.Given.of(None, {"head.weight": torch.zeros(1, 30)})
    proposal = gg.scores.Proposal(gg.Widen("rows", 1, weights=scheme), 0.0, "", 0, 0)
    grown = gg.apply(graph, gg.Widen("columns", 1))
    with pytest.raises(gg.NotApplicable, match=r"'rows' in one growth with 'columns': dim 1 of"):
        carried(proposal, grown)


def test_the_gain_measured_is_the_gradient_of_the_new_entries() -> None:
    found = grower(*fresh(), when=gg.Every(1), score=gg.scores.Random(2))
    event = found.step(BATCHES)
    assert event is not None
    (growth,) = event["growths"]
    assert growth["rewrite"] == "Widen" and growth["units"] == 2
    model = found.model.eval()
    value = sum(F.cross_entropy(model(x), y) for x, y in BATCHES) / len(BATCHES)
    reader = {"first": "second", "second": "head"}[growth["axis"]]
    (slope,) = torch.autograd.grad(value, [model.get_submodule(reader).weight])
    # what writes the new units has no gradient yet
    assert growth["gain_measured"] == pytest.approx(float(slope[:, -2:].square().sum()), rel=1e-4)


def test_units_settle_at_weights_of_a_given_size() -> None:
    found = grower(*fresh(), when=gg.Every(1), score=gg.scores.Tiny(2), amplitude=1e-3)
    event = found.step(BATCHES)
    assert event is not None
    (growth,) = event["growths"]
    writer, reader = {"first": ("first", "second"), "second": ("second", "head")}[growth["axis"]]
    model = found.model
    incoming = model.get_submodule(writer).weight[-2:].flatten(1).square().sum(1)
    bias = model.get_submodule(writer).bias
    incoming = incoming if bias is None else incoming + bias[-2:].square()
    outgoing = model.get_submodule(reader).weight[:, -2:].transpose(0, 1).flatten(1)
    assert float(incoming.mean().detach()) == pytest.approx(1e-3, rel=1e-4)
    assert float(outgoing.square().sum(1).mean().detach()) == pytest.approx(1e-3, rel=1e-4)
    assert growth["amplitude"] == 1e-3 and growth["gain_measured"] != 0


def test_a_growth_that_changes_the_loss_is_refused_and_leaves_all_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, optimizer = fresh()
    found = grower(model, optimizer, when=gg.Every(1))
    before = {path: t.clone() for path, t in model.state_dict().items()}
    losses = iter([1.0, 1.1])
    monkeypatch.setattr("graphgrow.grow.mean_loss", lambda *args: next(losses))
    with pytest.raises(gg.NotEquivalent, match=r"the loss went from 1 to 1\.1"):
        found.step(BATCHES)
    assert all(torch.equal(t, before[path]) for path, t in model.state_dict().items())
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {*map(id, model.parameters())}


@pytest.mark.parametrize("amplitude", [False, True])
def test_stopped_and_resumed_a_run_goes_on_bit_for_bit(tmp_path: Path, amplitude: bool) -> None:
    options = {"amplitude": amplitude, "where": gg.Where(turns=amplitude)}
    whole = grower(*fresh(), **options)
    trained(range(24), whole)

    half = grower(*fresh(), **options)
    trained(range(12), half)
    gg.save(tmp_path / "model", half.model, journal=half.journal)
    torch.save(
        {"optimizer": half.optimizer.state_dict(), "grower": half.state()}, tmp_path / "rest"
    )

    rest = torch.load(tmp_path / "rest")
    model = gg.load(tmp_path / "model", Digits(), BATCHES[0][0][:2])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    optimizer.load_state_dict(rest["optimizer"])
    gg.resume(optimizer)
    again = grower(model, optimizer, **options)
    again.resume(rest["grower"])
    trained(range(12, 24), again)

    after = again.model.state_dict()
    assert all(torch.equal(t, after[path]) for path, t in whole.model.state_dict().items())
    assert again.journal == whole.journal
    drop = [{k: v for k, v in e.items() if k != "seconds"} for e in whole.record]
    assert [{k: v for k, v in e.items() if k != "seconds"} for e in again.record] == drop


class Mixed(nn.Module):
    """A network for a score that adds units and layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def vectors(seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, :3] * x[:, 1:]).argmax(1)


def test_units_and_layers_are_grown_where_a_threshold_is_passed(tmp_path: Path) -> None:
    def run(found: gg.Grower, steps: range) -> None:
        for step in steps:
            x, y = vectors(step)
            found.optimizer.zero_grad()
            F.cross_entropy(found.model(x), y).backward()
            found.optimizer.step()
            found.step([vectors(1000), vectors(1001)])

    def made(model: nn.Module, optimizer: Any, tau: float = 1.01) -> gg.Grower:
        search = gg.scores.Ascent(steps=5)
        score = gg.scores.Senn(layers=True, candidates=8, search=search, tau=tau, alpha=0.0)
        return gg.Grower(
            model,
            vectors(0)[0],
            loss=F.cross_entropy,
            optimizer=optimizer,
            score=score,
            when=gg.Every(2),
            where=gg.Where(per=None, places=2),
        )

    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = Mixed()
        return model, torch.optim.Adam(model.parameters(), 1e-2)

    whole = made(*start())
    run(whole, range(8))
    kinds = {growth["rewrite"] for event in whole.record for growth in event["growths"]}
    assert kinds == {"Widen", "Deepen"}
    for growth in (growth for event in whole.record for growth in event["growths"]):
        assert (growth["gain_measured"] is None) == (growth["rewrite"] == "Deepen")
    for event in whole.record:
        assert event["loss_after"] == pytest.approx(event["loss_before"], rel=1e-4)
    quiet = made(*start(), tau=1e9)
    run(quiet, range(4))
    assert quiet.record == []

    half = made(*start())
    run(half, range(4))
    gg.save(tmp_path / "model", half.model, journal=half.journal)
    rest = {"optimizer": half.optimizer.state_dict(), "grower": half.state()}
    model = gg.load(tmp_path / "model", Mixed(), vectors(0)[0])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    optimizer.load_state_dict(rest["optimizer"])
    gg.resume(optimizer)
    again = made(model, optimizer)
    again.resume(rest["grower"])
    run(again, range(4, 8))
    after = again.model.state_dict()
    assert all(torch.equal(t, after[path]) for path, t in whole.model.state_dict().items())
