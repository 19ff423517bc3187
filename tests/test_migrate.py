"""An optimizer carried over: old entries as before, newborn ones as in a fresh optimizer."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, fx, nn, optim

from graphgrow.ir.graph import Graph
from graphgrow.optim.clocks import resume
from graphgrow.optim.migrate import migrate
from graphgrow.passes.rewrite import Grown, TensorOrigin

ROWS = torch.tensor([0, -1, 1, 2, -1])
OLD, NEW = ROWS >= 0, ROWS < 0
SETTINGS = {
    "SGD": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "Nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: optim.Adam(p, lr=0.01),
    "Adam, weight decay": lambda p: optim.Adam(p, lr=0.01, weight_decay=0.1),
    "Adam, maximize": lambda p: optim.Adam(p, lr=0.01, maximize=True, weight_decay=0.1),
    "Adam, amsgrad": lambda p: optim.Adam(p, lr=0.01, amsgrad=True),
    "Adam, foreach": lambda p: optim.Adam(p, lr=0.01, foreach=True),
    "Adam, fused": lambda p: optim.Adam(p, lr=0.01, fused=True),
    "AdamW": lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "AdamW, amsgrad": lambda p: optim.AdamW(p, lr=0.01, amsgrad=True, betas=(0.8, 0.95)),
    "NAdam": lambda p: optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: optim.RAdam(p, lr=0.01, betas=(0.9, 0.95)),
    "Adamax": lambda p: optim.Adamax(p, lr=0.01),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.01, centered=True, momentum=0.9),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5),
    "Adadelta": lambda p: optim.Adadelta(p, lr=1.0),
    "Rprop": lambda p: optim.Rprop(p, lr=0.01),
}
CLOCKED = [name for name in SETTINGS if "Ada" in name and name not in ("Adagrad", "Adadelta")]
every_optimizer = pytest.mark.parametrize("make", SETTINGS.values(), ids=SETTINGS)
every_clocked = pytest.mark.parametrize("make", [SETTINGS[n] for n in CLOCKED], ids=CLOCKED)


def graph_of(state: dict[str, Tensor]) -> Graph:
    """Return a graph that holds `state` and nothing else."""
    return Graph(fx.Graph(), fx.Graph(), {}, frozenset(), state, ())


def grow(before: Graph, rows: dict[str, Tensor], **inserted: Tensor) -> Grown:
    """Return `before` with the first dim of each tensor in `rows` indexed, new entries random."""
    state, origin = dict(before.state), {}
    for path, index in rows.items():
        values = before.state[path].detach()[index.clamp(min=0)]
        values[index < 0] = random(int((index < 0).sum()), *values.shape[1:]).to(values.dtype)
        state[path] = nn.Parameter(values)
        origin[path] = TensorOrigin((index, *[None] * (values.dim() - 1)))
    state.update({path.replace("__", "."): tensor for path, tensor in inserted.items()})
    return Grown(before, graph_of(state), origin, None, ())


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(random(*shape))


def twin(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().clone())


def step(optimizer: optim.Optimizer, *pairs: tuple[Tensor, Tensor]) -> None:
    """Take one step with the given gradients."""
    for tensor, gradient in pairs:
        tensor.grad = gradient.clone()
    optimizer.step()


def trained(make, steps: int = 30) -> tuple[optim.Optimizer, Graph]:
    """Return an optimizer that has stepped a (3, 4) weight and a bias, and their graph."""
    weight, bias = parameter(3, 4), parameter(3)
    optimizer = make([weight, bias])
    for _ in range(steps):
        step(optimizer, (weight, random(3, 4)), (bias, random(3)))
    return optimizer, graph_of({"fc.weight": weight, "fc.bias": bias})


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@every_optimizer
def test_old_entries_step_as_they_would_have(make):
    optimizer, graph = trained(make)
    control = copy.deepcopy(optimizer)
    expected = control.param_groups[0]["params"][0]
    grown = grow(graph, {"fc.weight": ROWS})
    migrate(optimizer, grown)
    weight = grown.graph.state["fc.weight"]
    for _ in range(50):
        gradient = random(5, 4)
        step(optimizer, (weight, gradient))
        step(control, (expected, gradient[OLD]))
        assert torch.equal(weight[OLD], expected)


@every_optimizer
def test_newborn_entries_step_as_in_a_fresh_optimizer(make):
    optimizer, graph = trained(make)
    grown = grow(graph, {"fc.weight": ROWS})
    migrate(optimizer, grown)
    weight = grown.graph.state["fc.weight"]
    expected = twin(weight[NEW])
    fresh = make([expected])
    for _ in range(50):
        gradient = random(5, 4)
        step(optimizer, (weight, gradient))
        step(fresh, (expected, gradient[NEW]))
        assert torch.equal(weight[NEW], expected)


def trajectory(optimizer: optim.Optimizer, weight: Tensor, steps: int) -> Tensor:
    """Return the length of each step of newborn entries under the gradient 1, in units of lr."""
    lengths = []
    for _ in range(steps):
        before = weight[NEW].detach().clone()
        step(optimizer, (weight, torch.ones_like(weight)))
        lengths.append((before - weight[NEW]).abs().max().item())
    return torch.tensor(lengths) / optimizer.param_groups[0]["lr"]


def test_zero_padded_adam_state_alone_overshoots_and_ours_does_not():
    optimizer, graph = trained(lambda p: optim.Adam(p, lr=1e-3), steps=20_000)
    grown = grow(graph, {"fc.weight": ROWS})
    padded = twin(grown.graph.state["fc.weight"])
    naive = optim.Adam([padded], lr=1e-3)
    old = optimizer.state[graph.state["fc.weight"]]
    naive.state[padded] = {"step": old["step"].clone()} | {
        name: torch.zeros_like(padded) for name in ("exp_avg", "exp_avg_sq")
    }
    migrate(optimizer, grown)
    overshoot = trajectory(naive, padded, 50)
    ours = trajectory(optimizer, grown.graph.state["fc.weight"], 50)
    assert overshoot.argmax() == 11  # the 12th step
    assert overshoot.max().item() == pytest.approx(6.57, abs=0.005)
    assert overshoot[0].item() == pytest.approx(3.16, abs=0.005)
    assert ours.max() <= 1.0
    assert ours.min() >= 1.0 - 1e-7  # eps beside a gradient of one


@every_clocked
def test_a_second_growth_leaves_three_ages_apart(make):
    optimizer, graph = trained(make)
    grown = grow(graph, {"fc.weight": ROWS})
    migrate(optimizer, grown)
    first = twin(grown.graph.state["fc.weight"][NEW])
    fresh = make([first])
    for _ in range(7):
        gradient = random(5, 4)
        step(optimizer, (grown.graph.state["fc.weight"], gradient))
        step(fresh, (first, gradient[NEW]))
    again = grow(grown.graph, {"fc.weight": torch.tensor([-1, 0, 1, 2, 3, 4])})
    migrate(optimizer, again)
    weight = again.graph.state["fc.weight"]
    second = twin(weight[:1])
    fresher = make([second])
    for _ in range(20):
        gradient = random(6, 4)
        step(optimizer, (weight, gradient))
        step(fresh, (first, gradient[1:][NEW]))
        step(fresher, (second, gradient[:1]))
    assert optimizer.state[weight]["step"][:, 0].tolist() == [20, 57, 27, 57, 57, 27]
    assert torch.allclose(weight[1:][NEW], first, rtol=1e-15, atol=1e-15)
    assert torch.allclose(weight[:1], second, rtol=1e-15, atol=1e-15)


@every_clocked
def test_a_state_dict_carries_the_ages_into_a_fresh_process(make):
    weight = nn.Parameter(torch.randn(3, 4))
    optimizer = make([weight])
    step(optimizer, (weight, torch.randn(3, 4)))
    grown = grow(graph_of({"fc.weight": weight}), {"fc.weight": ROWS})
    migrate(optimizer, grown)
    weight = grown.graph.state["fc.weight"]
    step(optimizer, (weight, torch.randn(5, 4)))
    loaded = twin(weight)
    reader = make([loaded])
    reader.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resume(reader)
    for _ in range(5):
        gradient = torch.randn(5, 4)
        step(optimizer, (weight, gradient))
        step(reader, (loaded, gradient))
    assert torch.equal(weight, loaded)


def test_ages_survive_a_state_dict_in_half_precision():
    weight = nn.Parameter(torch.ones(3, 4, dtype=torch.bfloat16))
    optimizer = optim.Adam([weight])
    for _ in range(1001):  # bfloat16 cannot hold 1001
        step(optimizer, (weight, torch.ones_like(weight)))
    grown = grow(graph_of({"w": weight}), {"w": ROWS})
    migrate(optimizer, grown)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(optimizer, (grown.graph.state["w"], torch.ones(5, 4, dtype=torch.bfloat16)))
    assert optimizer.state[grown.graph.state["w"]]["step"][:, 0].tolist() == [
        1002,
        1,
        1002,
        1002,
        1,
    ]


@every_clocked
def test_a_process_that_forgets_to_resume_fails_instead_of_overshooting(make):
    optimizer, graph = trained(make)
    migrate(optimizer, grow(graph, {"fc.weight": ROWS}))
    forgetful = copy.deepcopy(optimizer)  # torch copies no hooks
    weight = forgetful.param_groups[0]["params"][0]
    with pytest.raises(RuntimeError, match="20 elements cannot be converted to Scalar"):
        step(forgetful, (weight, random(5, 4)))


def test_hooks_are_registered_once():
    optimizer, graph = trained(SETTINGS["Adam"])
    for _ in range(3):
        grown = grow(graph, {"fc.weight": torch.tensor([0, -1])})
        migrate(optimizer, grown)
        resume(optimizer)
        graph = grown.graph
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    assert len(optimizer._optimizer_step_post_hooks) == 1


def test_an_optimizer_without_clocks_gets_no_hooks():
    optimizer, graph = trained(SETTINGS["SGD"])
    migrate(optimizer, grow(graph, {"fc.weight": ROWS}))
    assert not optimizer._optimizer_step_pre_hooks


def test_ages_become_one_number_again_when_the_corrections_agree():
    optimizer, graph = trained(lambda p: optim.Adam(p, betas=(0.5, 0.6)), steps=100)
    grown = grow(graph, {"fc.weight": ROWS})
    migrate(optimizer, grown)
    weight = grown.graph.state["fc.weight"]
    ages = []
    for _ in range(80):
        step(optimizer, (weight, random(5, 4)))
        ages.append(optimizer.state[weight]["step"].shape)
    assert ages[70] == (5, 4)  # 1 − 0.6^71 is not yet 1 in float64
    assert ages[-1] == ()
    assert optimizer.state[weight]["step"] == 180


def test_ages_become_one_number_when_the_difference_rounds_away_in_the_parameter_s_precision():
    weight = nn.Parameter(torch.randn(3, 4))
    optimizer = optim.Adam([weight], betas=(0.5, 0.6))
    for _ in range(100):
        step(optimizer, (weight, torch.randn(3, 4)))
    grown = grow(graph_of({"w": weight}), {"w": ROWS})
    migrate(optimizer, grown)
    weight = grown.graph.state["w"]
    expected = twin(weight[NEW])
    fresh = optim.Adam([expected], betas=(0.5, 0.6))
    while optimizer.state[weight]["step"].dim():
        gradient = torch.randn(5, 4)
        step(optimizer, (weight, gradient))
        step(fresh, (expected, gradient[NEW]))
    assert fresh.state[expected]["step"] == 34  # 0.6^34 = 2.9e-8 is a quarter of float32's eps
    assert torch.equal(weight[NEW], expected)


def test_a_hook_of_the_user_sees_the_final_values():
    optimizer, graph = trained(SETTINGS["Adam"])
    seen = []
    optimizer.register_step_post_hook(
        lambda o, *_: seen.append(o.param_groups[0]["params"][0].detach().clone())
    )
    grown = grow(graph, {"fc.weight": ROWS})
    migrate(optimizer, grown)
    step(optimizer, (grown.graph.state["fc.weight"], random(5, 4)))
    assert torch.equal(seen[-1], grown.graph.state["fc.weight"])


@every_optimizer
def test_a_learning_rate_schedule_goes_on(make):
    optimizer, graph = trained(make)
    schedule = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    rate = optimizer.param_groups[0]["lr"]
    migrate(optimizer, grow(graph, {"fc.weight": ROWS}))
    weight, bias = optimizer.param_groups[0]["params"]
    step(optimizer, (weight, random(5, 4)), (bias, random(3)))
    schedule.step()
    assert schedule.get_last_lr() == [rate * 0.5] == [optimizer.param_groups[0]["lr"]]
    moved = twin(weight)
    step(optimizer, (weight, random(5, 4)))
    assert not torch.equal(weight, moved)


def test_newborn_entries_follow_the_schedule_too():
    optimizer, graph = trained(SETTINGS["Adam"])
    grown = grow(graph, {"fc.weight": ROWS})
    migrate(optimizer, grown)
    schedule = optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    weight = grown.graph.state["fc.weight"]
    steps = []
    for _ in range(3):
        steps += [trajectory(optimizer, weight, 1).item() * optimizer.param_groups[0]["lr"]]
        schedule.step()
    assert steps == pytest.approx([1e-2, 1e-3, 1e-4], rel=1e-6)


def test_a_step_that_a_gradient_scaler_skips_does_not_age_anything():
    optimizer, graph = trained(SETTINGS["Adam"])
    grown = grow(graph, {"fc.weight": ROWS})
    migrate(optimizer, grown)
    weight = grown.graph.state["fc.weight"]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (1.0, math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(weight.sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.state[weight]["step"][:, 0].tolist() == [32, 2, 32, 32, 2]


def test_a_parameter_without_gradient_does_not_age():
    optimizer, graph = trained(SETTINGS["Adam"])
    grown = grow(graph, {"fc.weight": ROWS})
    migrate(optimizer, grown)
    weight = grown.graph.state["fc.weight"]
    optimizer.zero_grad()
    before = twin(weight)
    optimizer.step()
    assert torch.equal(weight, before)
    assert optimizer.state[weight]["step"][:, 0].tolist() == [30, 0, 30, 30, 0]


def test_a_closure_is_evaluated_once_and_its_gradient_used():
    optimizer, graph = trained(SETTINGS["Adam"])
    grown = grow(graph, {"fc.weight": ROWS})
    migrate(optimizer, grown)
    weight = grown.graph.state["fc.weight"]
    before, calls = twin(weight), []

    def closure() -> Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = weight.sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert calls == [1]
    assert torch.allclose(before[NEW] - weight[NEW], torch.full((2, 4), 0.01).double(), atol=1e-9)


def test_a_step_that_raises_loses_no_age():
    optimizer, graph = trained(SETTINGS["Adam"])
    grown = grow(graph, {"fc.weight": ROWS})
    migrate(optimizer, grown)
    weight = grown.graph.state["fc.weight"]

    def closure() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert optimizer.state_dict()["state"][0]["step"][:, 0].tolist() == [30, 0, 30, 30, 0]
    step(optimizer, (weight, random(5, 4)))
    assert optimizer.state[weight]["step"][:, 0].tolist() == [31, 1, 31, 31, 1]


def test_groups_keep_their_settings_and_their_order():
    a, b, c = parameter(3, 4), parameter(3), parameter(2, 2)
    optimizer = optim.Adam([{"params": [a, c], "lr": 0.1}, {"params": [b], "weight_decay": 0.3}])
    groups = list(optimizer.param_groups)
    grown = grow(graph_of({"a": a, "b": b, "c": c}), {"a": ROWS, "b": ROWS})
    migrate(optimizer, grown)
    state = grown.graph.state
    assert all(x is y for x, y in zip(groups, optimizer.param_groups, strict=True))
    assert [id(p) for p in groups[0]["params"]] == [id(state["a"]), id(c)]
    assert groups[1]["params"][0] is state["b"]
    assert (groups[0]["lr"], groups[1]["weight_decay"]) == (0.1, 0.3)


def test_an_untouched_parameter_keeps_its_very_state():
    optimizer, graph = trained(SETTINGS["Adam"])
    state = optimizer.state[graph.state["fc.bias"]]
    migrate(optimizer, grow(graph, {"fc.weight": ROWS}))
    assert optimizer.state[graph.state["fc.bias"]] is state


def test_the_old_parameter_is_forgotten():
    optimizer, graph = trained(SETTINGS["Adam"])
    migrate(optimizer, grow(graph, {"fc.weight": ROWS}))
    assert graph.state["fc.weight"] not in optimizer.state
    assert len(optimizer.state) == 2


@every_optimizer
def test_a_new_parameter_joins_the_group_of_its_nearest_relative_and_is_stepped(make):
    weight, bias, other = parameter(2, 2), parameter(2), parameter(2, 2)
    optimizer = make([{"params": [other]}, {"params": [weight]}, {"params": [bias]}])
    step(optimizer, (weight, random(2, 2)), (bias, random(2)), (other, random(2, 2)))
    graph = graph_of({"b1.fc.weight": weight, "b1.fc.bias": bias, "b2.fc.weight": other})
    new, new_bias = parameter(2, 2), parameter(2)
    migrate(optimizer, grow(graph, {}, b1__new__weight=new, b1__new__bias=new_bias))
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 2, 2]
    assert optimizer.param_groups[1]["params"][1] is new
    assert optimizer.param_groups[2]["params"][1] is new_bias
    expected, gradient = twin(new), random(2, 2)
    step(optimizer, (new, gradient))
    step(make([expected]), (expected, gradient))
    assert torch.equal(new, expected)


def test_a_new_parameter_among_frozen_relatives_stays_out():
    body, head = parameter(2, 2), parameter(2, 2)
    optimizer = optim.Adam([head])
    graph = graph_of({"body.0.weight": body, "head.weight": head})
    migrate(optimizer, grow(graph, {}, body__1__weight=parameter(2, 2)))
    assert optimizer.param_groups[0]["params"] == [head]


def test_a_new_parameter_that_needs_no_gradient_stays_out():
    optimizer, graph = trained(SETTINGS["Adam"])
    frozen = nn.Parameter(random(2), requires_grad=False)
    migrate(optimizer, grow(graph, {}, fc__scale=frozen))
    assert len(optimizer.param_groups[0]["params"]) == 2


def test_a_parameter_whose_path_vanished_is_dropped():
    optimizer, graph = trained(SETTINGS["Adam"])
    left = graph_of({"fc.weight": graph.state["fc.weight"]})
    migrate(optimizer, Grown(graph, left, {}, None, ()))
    assert optimizer.param_groups[0]["params"] == [graph.state["fc.weight"]]
    assert graph.state["fc.bias"] not in optimizer.state


def test_removing_the_old_entries_leaves_one_clock():
    optimizer, graph = trained(SETTINGS["Adam"])
    grown = grow(graph, {"fc.weight": ROWS})
    migrate(optimizer, grown)
    step(optimizer, (grown.graph.state["fc.weight"], random(5, 4)))
    fewer = grow(grown.graph, {"fc.weight": torch.tensor([1, 4])})
    migrate(optimizer, fewer)
    assert optimizer.state[fewer.graph.state["fc.weight"]]["step"].shape == ()
    assert optimizer.state[fewer.graph.state["fc.weight"]]["step"] == 1


def test_a_tied_parameter_is_moved_once():
    weight = parameter(3, 4)
    optimizer = optim.Adam([weight])
    step(optimizer, (weight, random(3, 4)))
    grown = grow(graph_of({"a.weight": weight, "b.weight": weight}), {"a.weight": ROWS})
    grown.graph.state["b.weight"] = grown.graph.state["a.weight"]
    migrate(optimizer, grown)
    assert optimizer.param_groups[0]["params"] == [grown.graph.state["a.weight"]]


def test_names_of_parameters_follow():
    weight = parameter(3, 4)
    optimizer = optim.Adam([("mine.weight", weight)])
    grown = grow(graph_of({"weight": weight}), {"weight": ROWS}, new=parameter(2))
    migrate(optimizer, grown)
    assert optimizer.param_groups[0]["param_names"] == ["mine.weight", "new"]
    assert len(optimizer.param_groups[0]["params"]) == 2


def test_waiting_gradients_move_along():
    optimizer, graph = trained(SETTINGS["Adam"])
    gradient = graph.state["fc.weight"].grad
    grown = grow(graph, {"fc.weight": ROWS})
    migrate(optimizer, grown)
    moved = grown.graph.state["fc.weight"].grad
    assert torch.equal(moved[OLD], gradient)
    assert not moved[NEW].any()


def test_both_dims_of_a_weight_can_have_grown():
    weight = parameter(3, 4)
    optimizer = optim.Adam([weight])
    step(optimizer, (weight, random(3, 4)))
    columns = torch.tensor([-1, 3, 2, 1, 0])
    state = {"w": nn.Parameter(random(5, 5))}
    grown = Grown(
        graph_of({"w": weight}), graph_of(state), {"w": TensorOrigin((ROWS, columns))}, None, ()
    )
    average = optimizer.state[weight]["exp_avg"]
    migrate(optimizer, grown)
    moved = optimizer.state[state["w"]]["exp_avg"]
    assert torch.equal(moved[OLD][:, 1:], average.flip(1))
    assert not moved[NEW].any() and not moved[:, 0].any()
    assert (optimizer.state[state["w"]]["step"] == 0).equal(moved == 0)


def test_channels_last_weights_keep_their_layout():
    weight = nn.Parameter(random(3, 4, 3, 3).to(memory_format=torch.channels_last))
    optimizer = optim.Adam([weight])
    step(optimizer, (weight, random(3, 4, 3, 3)))
    grown = grow(graph_of({"w": weight}), {"w": ROWS})
    new = nn.Parameter(grown.graph.state["w"].detach().to(memory_format=torch.channels_last))
    grown.graph.state["w"] = new
    migrate(optimizer, grown)
    expected, gradient = twin(new[NEW]), random(5, 4, 3, 3)
    step(optimizer, (new, gradient))
    step(optim.Adam([expected]), (expected, gradient[NEW]))
    assert torch.equal(new[NEW], expected)
    assert optimizer.state[new]["exp_avg"].is_contiguous(memory_format=torch.channels_last)


def snapshot(optimizer: optim.Optimizer) -> tuple:
    """Return everything that a refused migration must not change."""
    groups = [(id(group), *map(id, group["params"])) for group in optimizer.param_groups]
    return groups, {id(p): id(state) for p, state in optimizer.state.items()}


class Forgetful(optim.Adam):
    """An optimizer whose step is its own."""

    def step(self, closure=None):
        return super().step(closure)


REFUSED = {
    "history of all parameters": (lambda p: optim.LBFGS(p), "LBFGS: its history"),
    "a step of its own": (lambda p: Forgetful(p), "Forgetful: it counts in state 'step'"),
    "a counter": (lambda p: optim.ASGD(p), "ASGD: it counts in state 'step' of 'fc.weight'"),
    "factored state": (lambda p: optim.Adafactor(p), "Adafactor: it counts in state 'step'"),
}


@pytest.mark.parametrize(("make", "sentence"), REFUSED.values(), ids=REFUSED)
def test_an_optimizer_that_cannot_be_moved_is_refused_and_unchanged(make, sentence):
    weight = parameter(3, 4)
    optimizer = make([weight])
    weight.grad = random(3, 4)
    optimizer.step(lambda: torch.zeros(()))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=sentence):
        migrate(optimizer, grow(graph_of({"fc.weight": weight}), {"fc.weight": ROWS}))
    assert snapshot(optimizer) == before


def test_a_state_of_unknown_shape_is_refused_and_nothing_has_changed():
    optimizer, graph = trained(SETTINGS["SGD"])
    optimizer.state[graph.state["fc.bias"]]["momentum_buffer"] = random(7)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"'momentum_buffer' of 'fc.bias' has shape \(7,\)"):
        migrate(optimizer, grow(graph, {"fc.weight": ROWS, "fc.bias": ROWS}))
    assert snapshot(optimizer) == before


def test_a_parameter_that_is_not_in_the_graph_is_refused_and_nothing_has_changed():
    optimizer, graph = trained(SETTINGS["Adam"])
    optimizer.add_param_group({"params": [parameter(2), parameter(6)]})
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"parameter 0 of group 1, of shape \(2,\)"):
        migrate(optimizer, grow(graph, {"fc.weight": ROWS}))
    assert snapshot(optimizer) == before


def test_an_origin_that_does_not_fit_is_refused_and_nothing_has_changed():
    optimizer, graph = trained(SETTINGS["Adam"])
    grown = grow(graph, {"fc.weight": ROWS})
    grown.origin["fc.weight"] = TensorOrigin((torch.tensor([0, 1, 2, -1]), None))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"'fc.weight' from shape \(3, 4\) to \(5, 4\)"):
        migrate(optimizer, grown)
    assert snapshot(optimizer) == before


def test_an_optimizer_of_another_class_moves_if_it_counts_nothing():
    class Signs(optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                p.sub_(average.lerp_(p.grad, 0.1).sign(), alpha=0.1)

    optimizer, graph = trained(Signs)
    average = optimizer.state[graph.state["fc.weight"]]["average"].clone()
    grown = grow(graph, {"fc.weight": ROWS})
    migrate(optimizer, grown)
    moved = optimizer.state[grown.graph.state["fc.weight"]]["average"]
    assert torch.equal(moved[OLD], average)
    assert not moved[NEW].any()


def test_an_optimizer_that_has_not_stepped_yet_moves():
    weight = parameter(3, 4)
    optimizer = optim.Adam([weight])
    grown = grow(graph_of({"w": weight}), {"w": ROWS})
    migrate(optimizer, grown)
    step(optimizer, (grown.graph.state["w"], random(5, 4)))
    assert optimizer.state[grown.graph.state["w"]]["step"] == 1
