"""The check sees what differs, in both modes, and leaves no trace."""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections import namedtuple
from dataclasses import dataclass

import numpy
import pytest
import torch
from torch import Tensor, nn

from graphgrow.errors import NotEquivalent
from graphgrow.verify import Difference, compare


class Gives(nn.Module):
    """A module whose output is a function of its input."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )


X = torch.linspace(-1, 1, 3 * 2 * 4 * 4).reshape(3, 2, 4, 4).sin()


def test_a_model_does_not_differ_from_itself():
    difference = compare(network(), network(), X)
    assert (difference.absolute, difference.relative) == (0.0, 0.0)


def test_a_difference_is_measured_against_the_largest_entry_of_the_output():
    difference = compare(Gives(lambda x: x), Gives(lambda x: x + 0.5), torch.tensor([1e-9, -4.0]))
    assert difference.absolute == 0.5
    assert difference.relative == 0.125


def test_a_difference_in_one_mode_is_found_and_named():
    after = network()
    after[1].running_mean += 1
    difference = compare(network(), after, X)
    assert difference.train.absolute == 0.0
    assert difference.eval.absolute == difference.absolute > 0.1


def test_differences_below_single_precision_are_seen():
    difference = compare(Gives(lambda x: x / 3), Gives(lambda x: x / (3 + 1e-8)), X)
    assert 1e-9 < difference.relative < 1e-7


def test_code_that_casts_to_less_runs_in_double_precision_too():
    def norm(x, scale):
        y = (scale * x).to(torch.float32)
        y = y / y.pow(2).mean(-1, keepdim=True, dtype=torch.float32).sqrt()
        return torch.ones(4, dtype=torch.float16) * y

    one, other = Gives(lambda x: norm(x, 1)), Gives(lambda x: norm(x, 3))
    assert compare(one, other, X).relative < 1e-15
    assert compare(one, other, X, double=False).relative > 1e-9


class Writes(nn.Module):
    """A model whose forward writes to its parameters, three ways, or reads where they are."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.full((2,), 3.0, dtype=torch.float64))
        self.mean = nn.Parameter(torch.zeros(2, dtype=torch.float64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "in place":
            self.weight.data[:1].mul_(0.5)
        elif self.how == "quietly":
            with contextlib.suppress(Exception):
                self.weight.clamp_(max=1.0)
        elif self.how == "statistics":
            torch.batch_norm(x, None, None, self.mean, self.weight, True, 0.1, 1e-5, False)
        return x * self.weight + self.mean


@pytest.mark.parametrize("how", ["in place", "quietly", "statistics"])
def test_a_forward_that_writes_to_parameters_writes_to_copies(how):
    model, x = Writes(how), torch.arange(6.0).reshape(3, 2)
    was = copy.deepcopy(model.state_dict())
    reads = Gives(copy.deepcopy(model).train())  # runs once, on the copies that are compared
    assert compare(model, reads, x).absolute == 0.0
    assert compare(Writes("not"), model, x).absolute > 0.1
    assert all(torch.equal(was[name], tensor) for name, tensor in model.state_dict().items())


def test_parameters_that_need_no_cast_and_are_not_written_to_are_not_copied():
    places = list[int]()
    model = Writes("not")
    model.register_forward_hook(lambda self, *_: places.append(self.weight.data_ptr()))
    compare(model, model, torch.ones(1, 2))
    assert set(places) == {model.weight.data_ptr()}


def test_without_double_the_models_run_as_they_are():
    dtypes = []
    model = Gives(lambda x: (dtypes.append(x.dtype), x)[1])
    compare(model, model, torch.ones(2), double=False)
    compare(model, model, torch.ones(2))
    assert set(dtypes[:4]) == {torch.float32}
    assert set(dtypes[4:]) == {torch.float64}


def test_complex_and_integer_inputs_pass():
    model = Gives(lambda x, i: (x * 2, i + 1))
    assert (
        compare(model, model, torch.ones(2, dtype=torch.complex64), torch.ones(2).int()).relative
        == 0
    )


def test_keyword_arguments_reach_the_model():
    one = Gives(lambda x, *, scale: x * scale)
    assert compare(one, one, torch.ones(2), scale=torch.tensor(2.0)).absolute == 0.0


def test_shared_tensors_stay_shared_in_the_copy():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    model[1].running_mean = model[0].running_mean
    seen = []
    hook = lambda m, x: seen.append(m[0].running_mean is m[1].running_mean)  # noqa: E731
    model.register_forward_pre_hook(hook)
    compare(model, model, torch.ones(4, 2))
    assert seen == [True] * 4


def test_nothing_is_left_behind():
    model = network().eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state, inputs = copy.deepcopy(model.state_dict()), X.clone()
    generators = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    compare(model, nn.Sequential(model, nn.Dropout(), Gives(lambda x: x.mul_(random.random()))), X)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert torch.equal(inputs, X)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert numpy.random.get_state()[1].tolist() == generators[2]


class StochasticDepth(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * x.new_empty(len(x), 1).bernoulli_(0.8).div_(0.8)


class Keeps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (0.8 + torch.rand(len(x), 1, dtype=x.dtype)).floor()


DROPS = {
    "dropout": nn.Dropout(0.3),
    "dropout of channels": nn.Dropout1d(0.3),
    "stochastic depth": StochasticDepth(),
    "stochastic depth by rand": Keeps(),
    "bernoulli": Gives(lambda x: x + torch.bernoulli(torch.full_like(x, 0.3)) - 0.3),
    "uniform noise": Gives(lambda x: x + torch.rand_like(x) - 0.5),
    "normal noise": Gives(lambda x: x + torch.randn_like(x) + torch.randn(x.shape)),
    "normal noise of a mean": Gives(lambda x: torch.normal(x, 1.0) + torch.normal(0.0, 1.0, (4,))),
    "uniform in place": Gives(lambda x: x + torch.empty_like(x).uniform_(-1, 1)),
    "integers": Gives(lambda x: x + 0 * torch.randint(5, x.shape) * torch.randint(1, 5, x.shape)),
    "permutation": Gives(lambda x: x[torch.randperm(len(x))]),
}  # fmt: skip


@pytest.mark.parametrize("module", DROPS.values(), ids=DROPS)
def test_random_draws_are_replaced_by_their_mean(module):
    x = torch.randn(6, 4)
    if isinstance(module, nn.Dropout1d):
        x = x[None]
    assert compare(nn.Identity(), module, x).relative < 1e-15


def test_dropout_between_layers_of_different_width_can_be_compared():
    narrow = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 2))
    wide = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 2))
    with torch.no_grad():
        wide[0].weight[:3], wide[0].bias[:3] = narrow[0].weight, narrow[0].bias
        wide[2].weight[:, :3], wide[2].weight[:, 3:] = narrow[2].weight, 0
        wide[2].bias.copy_(narrow[2].bias)
    assert compare(narrow, wide, torch.randn(6, 4)).relative < 1e-15


def test_dropout_inside_recurrent_and_attention_layers_is_replaced_too():
    lstm = nn.LSTM(3, 4, num_layers=2, dropout=0.5)
    assert compare(lstm, lstm, torch.randn(5, 2, 3)).absolute == 0.0
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5)
    difference = compare(layer, layer, torch.randn(5, 2, 8))
    assert difference.absolute == 0.0


def test_attention_dropout_has_no_effect():
    with_dropout = nn.MultiheadAttention(8, 2, dropout=0.5)
    without = copy.deepcopy(with_dropout)
    without.dropout = 0.0
    x = torch.randn(5, 2, 8)
    assert compare(with_dropout, without, x, x, x).relative < 1e-14


def test_draws_without_a_mean_come_from_one_seed():
    model = Gives(lambda x: x[torch.multinomial(torch.ones(len(x)), 3)])
    assert compare(model, copy.deepcopy(model), torch.arange(1000.0)).absolute == 0.0


@dataclass
class Output:
    logits: Tensor
    rest: dict


Pair = namedtuple("Pair", "mean scale")


def test_nested_outputs_are_compared_leaf_by_leaf():
    one = Gives(lambda x: Output(x, {"a": [x, Pair(x, None)], "b": 3}))
    two = Gives(lambda x: Output(x, {"a": [x, Pair(x * 1.5, None)], "b": 3}))
    difference = compare(one, two, torch.ones(2))
    assert difference.relative == 0.5
    assert difference.train.output == "output.rest['a'][1].mean"


DIFFERENT = {
    "missing": (lambda x: {"a": x, "b": x}, lambda x: {"a": x}, r"'output\['b'\]' is .* before"),
    "additional": (lambda x: (x,), lambda x: (x, x), r"'output\[1\]' is only .* after"),
    "kind": (lambda x: x, lambda x: {"a": x}, "'output' is only"),
    "shape": (lambda x: x, lambda x: x[:1], r"'output' has shape \(2,\) before, \(1,\) after"),
    "dtype": (lambda x: x, lambda x: x.int(), "'output' has dtype"),
    "none": (lambda x: (x, None), lambda x: (x, x), r"\[1\]' is None before, a Tensor after"),
    "text": (lambda x: "a", lambda x: "b", "'output' is 'a' before, 'b' after"),
    "object": (lambda x: nn.Identity(), lambda x: nn.Identity(), "cannot compare 'output'"),
}  # fmt: skip


@pytest.mark.parametrize(("before", "after", "sentence"), DIFFERENT.values(), ids=DIFFERENT)
def test_another_structure_is_not_equivalent(before, after, sentence):
    with pytest.raises(NotEquivalent, match=sentence):
        compare(Gives(before), Gives(after), torch.ones(2))


NUMBERS = {
    "nan appears": ([1.0, 2.0], [1.0, math.nan], math.inf),
    "nan disappears": ([1.0, math.nan], [1.0, 2.0], math.inf),
    "both nan": ([1.0, math.nan], [1.0, math.nan], 0.0),
    "both infinite": ([1.0, math.inf], [1.0, math.inf], 0.0),
    "opposite infinities": ([1.0, math.inf], [1.0, -math.inf], math.inf),
    "infinite on one side": ([1.0, math.inf], [1.0, 1.0], math.inf),
    "zero before": ([0.0, 0.0], [0.0, 1e-300], math.inf),
    "empty": ([], [], 0.0),
}


@pytest.mark.parametrize(("before", "after", "relative"), NUMBERS.values(), ids=NUMBERS)
def test_what_is_no_number_counts(before, after, relative):
    one, two = (Gives(lambda x, v=v: x.new_tensor(v)) for v in (before, after))
    assert compare(one, two, torch.ones(1)).relative == relative


def test_an_error_says_in_which_mode_and_precision_it_came():
    model = nn.Sequential(nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match="more than 1 value") as caught:
        compare(model, model, torch.ones(1, 2))
    assert "in train mode, in float64" in caught.value.__notes__[0]


def test_a_difference_prints_both_modes():
    difference = compare(Gives(lambda x: x), Gives(lambda x: x * 2), torch.ones(2))
    assert isinstance(difference, Difference)
    assert str(difference).splitlines() == [
        "train: 1.0e+00 absolute, 1.0e+00 relative at 'output'",
        "eval:  1.0e+00 absolute, 1.0e+00 relative at 'output'",
    ]
