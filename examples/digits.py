"""A small residual network grows and shrinks while it learns to read handwritten digits.

    python examples/digits.py [--steps 1000] [--seeds 3]

The residual stage, the inside of a block and the classifier are widened, a layer is inserted, and
units are removed: those that a group lasso made exactly zero, and those that contribute least, by
least squares. Adam and its schedule go on throughout. Then the architecture that came out is
trained from scratch, for as many steps on the same batches.
"""

import argparse
import copy
import time
from statistics import mean

import torch
import torch.nn.functional as F
from digits_model import DigitNet
from digits_report import LEGEND, Display, Event, Result, accuracy, size, summary
from rich import print
from sklearn.datasets import load_digits

import graphgrow as gg

STEPS, BATCH, LEARNING_RATE = 1000, 32, 4e-3
LASSO, LASSO_FROM, LASSO_TO = 1.5, 0.4, 0.7  # strength by learning rate; parts of all steps
FLOOR = 0.96  # the accuracy on the test images that growing must reach

# What happens when: the part of all steps, and what finds the rewrite for a graph and images.
PLAN = (
    (0.10, lambda graph, images: gg.Widen("stem", units=8)),  # the residual stage, all of it
    (0.20, lambda graph, images: gg.Widen("block1.conv1", units=12)),
    (0.25, lambda graph, images: gg.Widen("features", units=16)),
    (0.35, lambda graph, images: gg.Deepen("block2.conv2")),
    (LASSO_TO, lambda graph, images: gg.Remove("features", zeros(graph, "features"))),
    (0.80, lambda graph, images: gg.Remove("block1.conv1", weakest(graph, images), absorb=images)),
)


def digits():
    """Return images and labels for training, validation and test, always the same ones."""
    bunch = load_digits()
    images = torch.tensor(bunch.images / 16, dtype=torch.float32)[:, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = order.split([897, 450, 450])
    return [(images[part], torch.tensor(bunch.target)[part]) for part in parts]


def shrink(graph, axis, amount):
    """Shorten what reads each unit by `amount`, to zero at most: a group lasso's proximal step."""
    for at in graph.axis(axis).consumers:
        columns = graph.state[at.path].detach().movedim(at.dim, 0)
        norms = columns.flatten(1).norm(dim=1).clamp(min=1e-12)
        columns *= (1 - amount / norms).clamp(min=0).reshape(-1, *[1] * (columns.dim() - 1))


def zeros(graph, axis):
    """Return the units of an axis that nothing reads any more."""
    readers = [graph.state[at.path].movedim(at.dim, 0) for at in graph.axis(axis).consumers]
    read = torch.stack([columns.flatten(1).any(dim=1) for columns in readers]).any(dim=0)
    return tuple((~read).nonzero().flatten().tolist())[: len(read) - 1]  # one has to stay


@torch.no_grad()
def weakest(graph, images):
    """Return the quarter of the first block's inner channels that varies least in what is read."""
    model, seen = gg.lower(graph).eval(), []
    reader = model.block1.conv2
    reader.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(images)
    contribution = seen[0].std((0, 2, 3)) * reader.weight.transpose(0, 1).flatten(1).norm(dim=1)
    return tuple(contribution.argsort()[: len(contribution) // 4].tolist())


def train(model, data, seed, steps, tick, between=lambda step, model, optimizer: model):
    """Train a model with Adam and return it; `between` may replace it before each step."""
    images, labels = data
    draws = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    for step in range(steps):
        model = between(step, model, optimizer).train()
        batch = torch.randint(len(images), (BATCH,), generator=draws)
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        tick()
    return model


def train_growing(model, data, validation, seed, steps, tick, report):
    """Train a model that PLAN rewrites on the way; `report` is told of each rewrite."""
    plan = {round(part * steps): find for part, find in PLAN}
    graph = gg.trace(model, data[0][:BATCH])

    def between(step, model, optimizer):
        nonlocal graph
        if LASSO_FROM * steps < step <= LASSO_TO * steps:
            shrink(graph, "features", LASSO * optimizer.param_groups[0]["lr"])
        rewrite = plan[step](graph, data[0]) if step in plan else None
        if rewrite is None or rewrite.obstacle(graph):  # few steps leave no unit at zero
            return model
        grown = gg.apply(graph, rewrite)
        gg.migrate(optimizer, grown)
        report(Event.of(grown, step, validation))
        graph = grown.graph
        return gg.lower(graph)

    return train(model, data, seed, steps, tick, between)


def from_scratch(model, seed):
    """Return a copy of a model with every layer initialised anew."""
    fresh = copy.deepcopy(model)
    torch.manual_seed(seed)
    for module in fresh.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.reset_parameters()
    return fresh


def run(seed, steps):
    """Train one network that grows, then its last architecture from scratch."""
    data, validation, test = digits()
    events = []

    def report(event):
        events.append(event)
        display.report(event)

    with Display(f"seed {seed}") as display:
        torch.manual_seed(seed)
        tick = display.task("growing", steps)
        grown = train_growing(DigitNet(), data, validation, seed, steps, tick, report)
        tick = display.task("from scratch", steps)
        scratch = train(from_scratch(grown, seed), data, seed, steps, tick)
    return events, Result(seed, size(grown), accuracy(grown, test), accuracy(scratch, test))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)  # networks as small as these gain nothing from more
    began = time.perf_counter()
    print(LEGEND)
    runs = [run(seed, options.steps) for seed in range(options.seeds)]
    results = [result for _, result in runs]
    print("Accuracy on test images, one architecture, number of steps, batches and optimizer:")
    print(summary(results), f"\n{time.perf_counter() - began:.0f} s")
    for event in (event for events, _ in runs for event in events):
        if event.exact:
            assert event.change < 1e-10, event
            assert event.accuracy[0] == event.accuracy[1], event
    if options.steps >= STEPS:
        assert all(len(events) == len(PLAN) for events, _ in runs), "some units should become zero"
        assert mean(result.grown for result in results) > FLOOR, results


if __name__ == "__main__":
    main()
