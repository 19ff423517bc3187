"""The Grower in a training loop: when, where, how much, and nothing lost on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphgrow as gg
from graphgrow.moments import moments
from graphgrow.scores.amplitude import mean_loss


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
    whole = grower(*fresh(), amplitude=amplitude)
    trained(range(24), whole)

    half = grower(*fresh(), amplitude=amplitude)
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
    again = grower(model, optimizer, amplitude=amplitude)
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
