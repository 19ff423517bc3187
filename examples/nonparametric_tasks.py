"""Nonparametric networks by the protocol of the paper, beside parametric ones of the same size.

    python examples/nonparametric_tasks.py [poker convex rectangles mnist] [--full]
        [--penalty 1e-3 1e-5] [--figure tasks.png]

For each λ a network grows from ten units a layer until its validation error stops improving, loses
what it does not need, and is trained on without penalty and with smaller and smaller steps (section
7.4 of Philipp and Carbonell, 2017). Then networks of the size that came out are trained by RMSprop
and by SGD for as long. Poker hands, convex and rectangles-images are re-generated (see
generated_data.py); MNIST is read from the directory that GRAPHGROW_DATA names. Inputs are
standardised, which the paper does not say; with other scales the lengths that λ is on have other
meanings.

A tick is what is trained between two evaluations and turnovers: 50 batches of 1000 in short. There
a fan-in of length 1 left to itself is gone after 12 ticks, for poker after 36, since units that go
before the first ones have learned anything take the network with them; in this time 100 units come
to each layer. Growing, losing what is not needed and training without penalty take 1.2 such lives
each, so that the last units to come have gone, and a run a little more than four; 100,000 hands. In
full a tick is an epoch (for poker the tenth of one), one unit comes each tick, a fan-in is gone
after 50, and patience and 800,000 hands are those of the paper. In both, the gradient may change a
length by ten times what the penalty takes off it, and by less when angular steps are smaller: the
radial step size of the paper is 1 / (50 λ), and for λ below 1e-4 its steps jump over the length
they aim at, until nothing is learned. The four tasks take 20 minutes of one core in short, and
nonparametric_mnist.py another two or three.

Measured in short, test errors in per cent, beside networks of that size trained by RMSprop and SGD;
the paper's sizes and errors of table 2 in brackets:

    poker       1e-3   39-35-31-18   0.16   0.17   0.44    (23-24-15-4, 0.62; parametric 0.20)
                1e-5   54-60-68-57   0.27   0.18   0.22    (94-135-105-35, 0.022; 0.003)
                1e-6   49-65-73-46   0.29   0.16   0.22    (210-251-224-104, 0.001; 0.003)
                1e-7   71-82-81-65   0.28   0.12   0.25    (299-258-259-129, 0.000; 0.002)
    convex      1e-5   29-17         25.3   26.0   26.5
                1e-8   31-14         25.0   26.0   27.0
    rectangles  3e-5   68-36         41.1   41.4   41.3
                1e-6   93-55         42.2   40.3   40.5
    mnist       3e-3   103-51        1.82   2.02   6.13
                1e-3   98-36         1.66   2.06   2.41
                3e-4   107-69        1.68   1.97   2.07

An eighth of the hands is the likely cause of the larger errors at poker; that no more than 100
units come to a layer is why networks for small λ stay small.
"""

import argparse
import time
from dataclasses import dataclass, replace
from itertools import islice

import torch
import torch.nn.functional as F
from generated_data import convex, poker, rectangles
from nonparametric_mnist import error, network
from nonparametric_report import mnist, save_tasks, standardised
from torch import nn

import graphgrow as gg
from graphgrow.nn import CapNorm

BATCH, LIMIT = 1000, 10


@dataclass(frozen=True)
class Task:
    """A task of the paper: hidden layers, angular step size by epoch, values of λ, and results.

    `batch` is the angular step size by batch of a short run, which has far fewer of them, `life`
    the ticks that a fan-in of length 1 has there, and `most` the error that no short run may reach.
    Results are sizes and errors of the nonparametric network and of a parametric one of its size.
    """

    hidden: int
    angular: float
    batch: float
    life: int
    penalties: tuple[float, ...]
    sizes: tuple[int, ...]
    most: float
    paper: dict[float, tuple[str, float, float]]


TASKS = {
    "poker": Task(
        4,
        10.0,
        0.5,
        36,
        (1e-3, 1e-5, 1e-6, 1e-7),
        (100_000, 20_000, 20_000),
        0.01,
        {
            1e-3: ("23-24-15-4", 0.0062, 0.0020),
            1e-5: ("94-135-105-35", 0.00022, 0.00003),
            1e-6: ("210-251-224-104", 0.00001, 0.00003),
            1e-7: ("299-258-259-129", 0.0, 0.00002),
        },
    ),
    "convex": Task(2, 30.0, 0.1, 12, (1e-5, 1e-8), (7000, 1000, 10_000), 0.3, {}),
    "rectangles": Task(2, 30.0, 0.1, 12, (3e-5, 1e-6), (10_000, 2000, 10_000), 0.45, {}),
    "mnist": Task(2, 30.0, 0.6, 12, (3e-3, 1e-3, 3e-4), (50_000, 10_000, 10_000), 0.08, {}),
}


@dataclass(frozen=True)
class Pace:
    """How long a tick and a run are, and how fast units come and go."""

    tick: int
    add: float
    life: int
    most: int
    protocol: gg.Protocol


def short(life):
    """Return the pace of a run of a few minutes."""
    phase = life * 6 // 5
    protocol = gg.Protocol(patience=phase, fine_patience=2, longest=phase)
    return Pace(50, 100 / life, life, 4 * life + 12, protocol)


def full(name, share):
    """Return the pace of the paper."""
    tick = round(1 / share) // (10 if name == "poker" else 1)
    return Pace(max(1, tick), 1.0, 50, 10**9, gg.Protocol())


def data_of(name, sizes):
    """Return training, validation and test data of a task, None where there are none."""
    if name == "mnist":
        found = mnist()
        if found is None:
            return None
        (x, y), test = found
        return (x[:50_000], y[:50_000]), (x[50_000:], y[50_000:]), test
    made = {"poker": poker, "convex": convex, "rectangles": rectangles}[name](sum(sizes))
    x, y = map(torch.from_numpy, made)
    x = standardised(x, x[: sizes[0]], dim=0 if name == "poker" else None)
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def batches(data, draws):
    """Yield batches without replacement, epoch after epoch, whole ones only."""
    x, y = data
    while True:
        for batch in torch.randperm(len(x), generator=draws).split(BATCH):
            if len(batch) == min(BATCH, len(x)):
                yield x[batch], y[batch]


def train(model, optimizer, data, count, after=lambda: None):
    """Take steps on `count` batches of `data`."""
    model.train()
    for x, y in islice(data, count):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after()


def grown(angular, penalty, widths, data, pace):
    """Return the graph that the protocol leads to, and how far it came."""
    draws, share = torch.Generator().manual_seed(0), BATCH / len(data[0][0])
    graph = gg.trace(network(widths, CapNorm), data[0][0][:BATCH])
    lr, lost = angular / share, 1 / (pace.tick * pace.life)  # what a length loses in a step
    rates = {"lr": lr, "radial_lr": lost / (share * penalty), "radial_limit": LIMIT * lost}
    optimizer = gg.AdaRad(graph, **rates, penalty=penalty, share=share)
    progress, kept, drawn = gg.Progress(), gg.Snapshot.of(graph, optimizer), batches(data[0], draws)
    while progress.phase != "done" and progress.evaluations < pace.most:
        for group in optimizer.param_groups:
            group.update(pace.protocol.settings(progress, lr, penalty))
            group["radial_limit"] = LIMIT * lost * group["lr"] / lr
        train(gg.lower(graph), optimizer, drawn, pace.tick)
        change = gg.turn_over(graph, add=pace.add * progress.adding, generator=draws)
        if change is not None:
            gg.migrate(optimizer, change.grown)
            graph = change.grown.graph
        gone = 0 if change is None else sum(map(len, change.removed.values()))
        wrong = error(gg.lower(graph), data[1])
        progress = pace.protocol.after(progress, wrong, removed=gone)
        if progress.keep:
            kept = gg.Snapshot.of(graph, optimizer)
        if progress.rewind:
            graph, optimizer = kept.restored()
    return kept.graph, progress


def parametric(kind, rate, penalty, widths, data, pace, ticks):
    """Return a network of these widths, trained for as many ticks; the last quarter in small steps.

    SGD has the steps and the penalty of the nonparametric network, on CapNorm; RMSprop has none.
    """
    draws, amount = torch.Generator().manual_seed(0), 0.0
    if kind == "RMSprop":
        model = network(widths, lambda n: nn.BatchNorm1d(n, affine=False))
        optimizer = torch.optim.RMSprop(model.parameters(), lr=3e-3)
    else:
        model, amount = network(widths, CapNorm), rate * penalty
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    graph, drawn = gg.trace(model, data[0][0][:BATCH]), batches(data[0], draws)
    fans = gg.fan_ins(graph)
    for number in range(ticks):
        if number == ticks * 3 // 4:
            optimizer.param_groups[0]["lr"] /= 10
        train(model, optimizer, drawn, pace.tick, lambda: gg.shrink(fans, graph.state, amount))
    return model


def compared(task, angular, penalty, data, pace):
    """Return the widths of a nonparametric network and the errors by kind, and print both."""
    torch.manual_seed(0)
    (x, y), _, test = data
    start = x.shape[1], *[10] * task.hidden, int(y.max()) + 1
    graph, progress = grown(angular, penalty, start, data, pace)
    widths = start[0], *(len(w) for p, w in graph.state.items() if p.endswith(".weight"))
    found = {"nonparametric": error(gg.lower(graph), test)}
    size = "-".join(map(str, widths[1:-1]))
    print(f"λ = {penalty:g}, {progress.evaluations} ticks ({progress.phase}):")
    print(f"  nonparametric, {size}: {100 * found['nonparametric']:.2f} %", flush=True)
    for kind in ("RMSprop", "SGD"):
        model = parametric(kind, angular, penalty, widths, data, pace, progress.evaluations)
        found[kind] = error(model, test)
        print(f"  {kind} of that size: {100 * found[kind]:.2f} %", flush=True)
    return widths, found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", help=f"some of {', '.join(TASKS)}; left out, all")
    parser.add_argument("--full", action="store_true", help="the pace and the hands of the paper")
    parser.add_argument("--penalty", type=float, nargs="+", help="the values of λ")
    parser.add_argument("--hands", type=int, help="to train on: 100,000, in full 800,000")
    parser.add_argument("--ticks", type=int, help="at most: four lives and 12, in full no limit")
    parser.add_argument("--figure", help="where to draw errors over sizes")
    options = parser.parse_args()
    torch.set_num_threads(1)  # networks as small as these gain nothing from more
    results, began = {}, time.process_time()
    for name in options.tasks or TASKS:
        task, sizes = TASKS[name], TASKS[name].sizes
        if name == "poker":
            hands = options.hands or (800_000 if options.full else sizes[0])
            sizes = (
                (800_000, 125_010, 100_000) if hands == 800_000 else (hands, hands // 5, hands // 5)
            )
        data = data_of(name, sizes)
        if data is None:
            continue
        print(f"{name}: {sizes[0]} to train on, {sizes[1]} to choose by, {sizes[2]} to test on")
        share = BATCH / sizes[0]
        pace = full(name, share) if options.full else short(task.life)
        if options.ticks:
            pace = replace(pace, most=options.ticks)
        angular = task.angular * share if options.full else task.batch
        results[name] = {}
        for penalty in options.penalty or task.penalties:
            start = time.process_time()
            widths, found = compared(task, angular, penalty, data, pace)
            results[name][penalty] = widths, found
            if penalty in task.paper:
                size, one, two = task.paper[penalty]
                print(f"  paper: {size}: {100 * one:g} %, parametric {100 * two:g} % (RMSprop)")
            else:
                print("  paper: in figure 2 only, no numbers in the text")
            print(f"  {time.process_time() - start:.0f} s", flush=True)
            if not (options.full or options.ticks or options.hands):
                assert found["nonparametric"] < task.most, found
    print(f"in all {time.process_time() - began:.0f} s")
    if options.figure:
        save_tasks(results, TASKS, options.figure)


if __name__ == "__main__":
    main()
