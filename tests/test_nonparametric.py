"""Units come and go: exactly, in one rewrite, with the optimizer, by a protocol that resumes."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import fill, networks
from torch import Tensor, nn

import graphgrow as gg
from graphgrow.nn import CapNorm

seeds = st.integers(0, 2**16)


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.double)


NORMS = {"none": lambda n: nn.Identity(), "batch": nn.BatchNorm1d, "cap": CapNorm}
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "sigmoid": nn.Sigmoid}


def network(norm: str = "cap", activation: str = "relu", bias: bool = True) -> nn.Sequential:
    """Return two hidden layers with random numbers, in running statistics too."""
    act, make = ACTIVATIONS[activation], NORMS[norm]
    layers = [nn.Linear(4, 6, bias), make(6), act(), nn.Linear(6, 5, bias), make(5), act()]
    return fill(nn.Sequential(*layers, nn.Linear(5, 3)).double(), 4)


@torch.no_grad()
def zeroed(model: nn.Sequential, first: list[int], second: list[int]) -> nn.Sequential:
    """Give some units of the hidden layers zero incoming weights, with their biases."""
    for layer, units in ((model[0], first), (model[3], second)):
        layer.weight[units] = 0
        if layer.bias is not None:
            layer.bias[units] = 0
    return model


units = st.lists(st.integers(0, 4), max_size=5, unique=True)


@given(norm=st.sampled_from(list(NORMS)), act=st.sampled_from(list(ACTIVATIONS)), f=units, s=units)
@settings(max_examples=30)
def test_zero_units_go_without_a_trace(norm: str, act: str, f: list[int], s: list[int]) -> None:
    """In train mode beside the model, in eval mode beside the one whose norms know of them."""
    model, x = zeroed(network(norm, act), f, s), noise(9, 4)
    graph = gg.trace(model, x)
    change = gg.turn_over(graph)
    if change is None:
        assert not f and not s
        return
    assert {a: len(u) for a, u in change.removed.items()} == {
        a: n for a, n in (("0", min(len(f), 4)), ("3", min(len(s), 3))) if n
    }
    assert len(change.grown.rewrites) == len(change.removed)  # one each, however many units
    assert gg.compare(model, change.grown.graph, x).train.relative <= 1e-10
    assert gg.compare(change.grown.before, change.grown.graph, x).relative <= 1e-10
    assert gg.turn_over(change.grown.graph) is None


@given(net=networks(), seed=seeds)
@settings(max_examples=25)
def test_any_network_turns_over_exactly(net, seed: int) -> None:
    graph = net.trace()
    generator = torch.Generator().manual_seed(seed)
    change = gg.turn_over(graph, add=0.7, generator=generator, skip=True)
    if change is not None:
        x = net.inputs(4, seed)
        assert gg.compare(change.grown.before, change.grown.graph, x).relative <= 1e-10


def test_all_units_zero_leave_two_that_can_grow_again() -> None:
    model = zeroed(network(), list(range(6)), [])
    change = gg.turn_over(gg.trace(model, noise(9, 4)))
    assert change is not None and change.grown.graph.axes["0"].width == 2
    assert gg.turn_over(change.grown.graph) is None
    again = gg.turn_over(change.grown.graph, add=1)
    assert again is not None and again.grown.graph.axes["0"].width == 3


def test_a_unit_that_nothing_reads_stays_for_it_may_be_new() -> None:
    graph = gg.trace(network(), noise(9, 4))
    change = gg.turn_over(graph, add=2)
    assert change is not None and change.added == {"0": 2, "3": 2}
    assert gg.turn_over(change.grown.graph) is None


def test_new_units_have_incoming_weights_of_the_expected_length() -> None:
    model = nn.Sequential(nn.Linear(50, 2, bias=False), nn.ReLU(), nn.Linear(2, 3)).double()
    grown = gg.apply(gg.trace(model, noise(2, 50)), gg.Widen("0", 400, weights=gg.UnitLength(3.0)))
    squares = grown.graph.state["0.weight"][2:].square().sum(1)
    assert squares.mean().item() == pytest.approx(9.0, rel=0.05)
    said = gg.Widen("0", 1, weights=gg.UnitLength(0.0)).obstacle(grown.graph)
    assert said is not None and said.endswith("they would never learn; give a positive length")


def test_the_length_is_that_of_all_layers_that_write_a_unit() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(30, 2), nn.Linear(10, 2), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.a(x) + self.b(x[:, :10])))

    graph = gg.trace(Sum().double(), noise(2, 30))
    grown = gg.apply(graph, gg.Widen("a", 500, weights=gg.UnitLength())).graph
    squares = [grown.state[f"{n}.weight"][2:].square().sum(1).mean().item() for n in "ab"]
    assert squares == pytest.approx([0.75, 0.25], rel=0.06)


def test_a_fractional_rate_is_met_on_average() -> None:
    graph = gg.trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)), torch.zeros(2, 2))
    generator, total = torch.Generator().manual_seed(0), 0
    for _ in range(300):
        change = gg.turn_over(graph, add=0.4, generator=generator)
        total += 0 if change is None else change.added["0"]
    assert total / 300 == pytest.approx(0.4, abs=0.1)


def test_with_one_unit_an_axis_under_capnorm_could_not_grow_again() -> None:
    """Which is why two stay."""
    layers = nn.Linear(4, 1), CapNorm(1), nn.ReLU(), nn.Linear(1, 3)
    assert "0" not in gg.trace(nn.Sequential(*layers).double(), noise(9, 4)).axes


def test_the_same_generator_adds_the_same_units() -> None:
    graph = gg.trace(network(), noise(9, 4))

    def added(seed: int) -> Tensor:
        change = gg.turn_over(graph, add=2, generator=torch.Generator().manual_seed(seed))
        assert change is not None
        return change.grown.graph.state["0.weight"]

    assert torch.equal(added(1), added(1))
    assert not torch.equal(added(1)[-1], added(3)[-1])


def test_what_cannot_turn_over_is_refused_or_skipped_with_the_sentence() -> None:
    graph = gg.trace(network(), noise(9, 4))
    sentence = "cannot widen axis '6' (3 units): it is dim 1 of the model's output"
    with pytest.raises(gg.NotApplicable) as raised:
        gg.turn_over(graph, add=1, axes=["0", "6"])
    assert str(raised.value) == sentence
    change = gg.turn_over(graph, add=1, axes=["0", "6"], skip=True)
    assert change is not None
    assert change.added == {"0": 1} and change.skipped == {"6": sentence}
    with pytest.raises(ValueError, match="cannot add -1 units: the number is negative"):
        gg.turn_over(graph, add=-1)


def test_a_constant_beside_a_padded_border_is_refused_or_skipped() -> None:
    """σ(0) of a sigmoid is no constant for a convolution that pads with zeros."""
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 1, 3, padding=1)).double()
    with torch.no_grad():
        model[0].weight[[1, 2]] = 0
    graph = gg.trace(model, noise(2, 2, 4, 4))
    with pytest.raises(gg.NotApplicable, match=r"cannot remove 2 of the 4 units of axis '0' exac"):
        gg.turn_over(graph)
    assert gg.turn_over(graph, skip=True) is None
    change = gg.turn_over(graph, add=1, skip=True)
    assert change is not None and "pads with zeros" in change.skipped["0"]


# ------------------------------------------------------------------------------------- training


DATA = noise(60, 4, seed=7)
LABELS = (DATA[:, 0] * DATA[:, 1] > 0).long() + (DATA[:, 2] > 0.5).long()
SETTINGS = {"lr": 3.0, "radial_lr": 2.0, "penalty": 0.05, "share": 0.5}


class Run:
    """A small training run that anything can interrupt."""

    def __init__(self, kind=gg.AdaRad) -> None:
        self.graph = gg.trace(network(bias=False), DATA[:5])
        self.optimizer = kind(self.graph, **SETTINGS)
        self.generator = torch.Generator().manual_seed(0)
        self.removed = 0

    def epoch(self, add: float = 1.0) -> float:
        model = gg.lower(self.graph).train()
        for half in torch.randperm(60, generator=self.generator).split(30):
            loss = F.cross_entropy(model(DATA[half]), LABELS[half])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        change = gg.turn_over(self.graph, add=add, generator=self.generator)
        if change is not None:
            gg.migrate(self.optimizer, change.grown)
            self.change, self.graph = change, change.grown.graph
            self.removed += sum(map(len, change.removed.values()))
        return float(loss.detach())

    def numbers(self) -> list[Tensor]:
        return [t.detach().clone() for t in self.graph.state.values()]


@pytest.mark.parametrize("kind", [gg.AdaRad, gg.AdaRadM])
def test_training_turns_over_exactly_again_and_again(kind) -> None:
    run = Run(kind)
    losses = []
    for _ in range(30):
        before = run.graph
        losses.append(run.epoch())
        after = run.change.grown
        assert gg.compare(before, after.graph, DATA).train.relative <= 1e-10
        assert gg.compare(after.before, after.graph, DATA).relative <= 1e-10
    assert run.removed > 5
    assert sum(losses[-5:]) < sum(losses[:5])


def test_other_optimizers_go_on_with_a_proximal_step() -> None:
    graph = gg.trace(network(bias=False), DATA[:5])
    optimizer = torch.optim.Adam([t for t in graph.state.values() if t.requires_grad], lr=0.01)
    removed = 0
    for _ in range(30):
        model = gg.lower(graph).train()
        loss = F.cross_entropy(model(DATA), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gg.shrink(gg.fan_ins(graph), graph.state, 0.05)
        change = gg.turn_over(graph)
        if change is not None:
            gg.migrate(optimizer, change.grown)
            graph, removed = change.grown.graph, removed + sum(map(len, change.removed.values()))
    assert removed > 0


def test_a_snapshot_is_left_alone_and_goes_on_in_the_same_way() -> None:
    run = Run()
    for _ in range(3):
        run.epoch()
    kept, state = gg.Snapshot.of(run.graph, run.optimizer), run.generator.get_state()
    expected = [run.epoch() for _ in range(3)], run.numbers()
    for _ in range(2):
        run.graph, run.optimizer = kept.restored()
        run.generator.set_state(state)
        found = [run.epoch() for _ in range(3)], run.numbers()
        assert found[0] == expected[0]
        assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


def test_a_run_goes_on_from_files_as_if_it_had_not_stopped(tmp_path) -> None:
    run = Run()
    model = copy.deepcopy(network(bias=False))
    for _ in range(4):
        run.epoch()
    gg.save(tmp_path / "model", run.graph)
    torch.save(run.optimizer.state_dict(), tmp_path / "optimizer")
    state = run.generator.get_state()
    expected = [run.epoch() for _ in range(3)], run.numbers()
    loaded = gg.load(tmp_path / "model", model)
    again = Run()
    again.graph = gg.trace(loaded, DATA[:5])
    again.optimizer = gg.AdaRad(again.graph, **SETTINGS)
    again.optimizer.load_state_dict(torch.load(tmp_path / "optimizer"))
    again.generator.set_state(state)
    assert [again.epoch() for _ in range(3)] == expected[0]
    assert all(torch.equal(a, b) for a, b in zip(again.numbers(), expected[1], strict=True))


class Protocolled(Run):
    """A run by the protocol, which can be put into files and read from them."""

    protocol = gg.Protocol(patience=2, fine_patience=1, longest=4)

    def __init__(self) -> None:
        super().__init__()
        self.progress, self.kept = gg.Progress(), gg.Snapshot.of(self.graph, self.optimizer)

    def evaluation(self) -> gg.Progress:
        for group in self.optimizer.param_groups:
            group.update(self.protocol.settings(self.progress, SETTINGS["lr"], SETTINGS["penalty"]))
        gone = self.removed
        self.epoch(add=0.7 * self.progress.adding)
        with torch.no_grad():
            wrong = (gg.lower(self.graph).eval()(DATA).argmax(1) != LABELS).double().mean().item()
        self.progress = self.protocol.after(self.progress, wrong, removed=self.removed - gone)
        if self.progress.keep:
            self.kept = gg.Snapshot.of(self.graph, self.optimizer)
        if self.progress.rewind:
            self.graph, self.optimizer = self.kept.restored()
        return self.progress

    def save(self, folder: Path) -> None:
        for name, graph, optimizer in (
            ("now", self.graph, self.optimizer),
            ("kept", self.kept.graph, self.kept.optimizer),
        ):
            gg.save(folder / name, graph)
            torch.save(optimizer.state_dict(), folder / f"{name} optimizer")
        torch.save(self.generator.get_state(), folder / "draws")
        (folder / "progress").write_text(json.dumps(asdict(self.progress)))

    def load(self, folder: Path) -> None:
        found = []
        for name in ("now", "kept"):
            graph = gg.trace(gg.load(folder / name, network(bias=False)), DATA[:5])
            found.append((graph, gg.AdaRad(graph, **SETTINGS)))
            found[-1][1].load_state_dict(torch.load(folder / f"{name} optimizer"))
        (self.graph, self.optimizer), (kept, optimizer) = found
        self.kept = gg.Snapshot.of(kept, optimizer)
        self.generator.set_state(torch.load(folder / "draws"))
        self.progress = gg.Progress(**json.loads((folder / "progress").read_text()))


def test_a_run_by_the_protocol_goes_on_from_files_in_any_phase(tmp_path: Path) -> None:
    """Stopped once in each phase; each time the rest is as if it had not stopped."""
    run, seen, followers = Protocolled(), set(), []
    for number in range(40):
        if run.progress.phase == "done":
            break
        if run.progress.phase not in seen and number % 2:
            seen.add(run.progress.phase)
            folder = tmp_path / run.progress.phase
            folder.mkdir()
            run.save(folder)
            followers.append(Protocolled())
            followers[-1].load(folder)
        expected = run.evaluation()
        for other in followers:
            assert other.evaluation() == expected
            pairs = zip(other.numbers(), run.numbers(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    assert seen >= {"grow", "settle", "free", "anneal"} and run.removed > 0


# ------------------------------------------------------------------------------------- protocol


def followed(protocol: gg.Protocol, errors: list[float], removed: dict[int, int]) -> list[str]:
    """Return phase, divisions and what is to be done after each evaluation, in short."""
    progress, said = gg.Progress(), []
    for number, error in enumerate(errors):
        progress = protocol.after(progress, error, removed=removed.get(number, 0))
        what = "keep" if progress.keep else "rewind" if progress.rewind else "on"
        said.append(f"{progress.phase}{progress.divisions} {what}")
        if progress.phase == "done":
            break
    return said


def test_the_protocol_is_that_of_section_7_4() -> None:
    protocol = gg.Protocol(patience=3, fine_patience=2)
    errors = [5, 4, 4, 6, 4, 4, 3, 4, 4, 4, 3, 3, 3, 2, 2, 2, 2, 2, 1, 1, 2, 1, 1]
    assert followed(protocol, errors, {7: 1}) == [
        "grow0 keep",
        "grow0 keep",
        "grow0 on",
        "grow0 on",
        "settle0 rewind",  # not better three times: back, and add no more
        "settle0 on",
        "settle0 keep",
        "settle0 keep",  # a unit went
        "settle0 on",
        "settle0 on",
        "free0 rewind",  # no unit went and it got no better than 3
        "free0 keep",
        "free0 on",
        "free0 keep",
        "free0 on",
        "free0 on",
        "anneal1 rewind",
        "anneal1 on",
        "anneal1 keep",
        "anneal1 on",
        "anneal2 rewind",
        "anneal2 on",
        "done2 rewind",  # the steps are too small to change the error
    ]


def test_no_phase_is_longer_than_it_may_be() -> None:
    protocol, progress, phases = (
        gg.Protocol(patience=9, fine_patience=9, longest=3),
        gg.Progress(),
        [],
    )
    for error in range(100, 85, -1):  # always better
        progress = protocol.after(progress, error)
        assert progress.keep
        phases.append(f"{progress.phase}{progress.divisions} {progress.rewind}")
    assert phases[2::3] == [
        "settle0 True",
        "free0 True",
        "anneal1 True",
        "anneal2 True",
        "anneal3 True",
    ]
    assert not any("True" in phase for k, phase in enumerate(phases) if k % 3 < 2)


def test_the_settings_follow_the_phase() -> None:
    protocol = gg.Protocol()
    assert protocol.settings(gg.Progress(), 30.0, 0.1) == {"lr": 30.0, "penalty": 0.1}
    settle = gg.Progress(phase="settle")
    assert settle.penalised and not settle.adding
    late = gg.Progress(phase="anneal", divisions=2)
    assert protocol.settings(late, 27.0, 0.1) == {"lr": 3.0, "penalty": 0.0}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 39))
def test_progress_goes_through_json_in_the_middle(errors: list[int], cut: int) -> None:
    protocol, progress, other = gg.Protocol(2, 1), gg.Progress(), gg.Progress()
    for number, error in enumerate(errors):
        if progress.phase == "done":
            with pytest.raises(ValueError, match="cannot go on after phase 'done'"):
                protocol.after(progress, error)
            return
        if number == cut:
            other = gg.Progress(**json.loads(json.dumps(asdict(other))))
        progress, other = protocol.after(progress, error), protocol.after(other, error)
        assert progress == other


def test_the_protocol_ends() -> None:
    errors = iter([0.5] * 1000)
    protocol, progress = gg.Protocol(4, 2), gg.Progress()
    while progress.phase != "done":
        progress = protocol.after(progress, next(errors))
    assert progress.evaluations < 30
