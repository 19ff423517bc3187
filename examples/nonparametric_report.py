"""MNIST's files, and what there is to say and draw of nonparametric training runs."""

import gzip
import os
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

import graphgrow as gg

FILES = [
    f"mnist-{part}-{kind}.gz"
    for part in ("train", "t10k")
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
]
CHECK_EVERY = 20  # epochs between two checks that a turnover keeps the outputs


def standardised(x, seen, dim=None):
    """Return inputs less the mean of those `seen`, over their deviation, by feature for dim 0."""
    mean, deviation = (seen.mean(), seen.std()) if dim is None else (seen.mean(dim), seen.std(dim))
    return (x - mean) / deviation


def mnist(standardise=True):
    """Return images and labels for training and test, None where there are none.

    Without `standardise`, pixels are from 0 to 1.
    """
    folder = os.environ.get("GRAPHGROW_DATA")
    if not folder or not all((Path(folder) / name).exists() for name in FILES):
        print(f"skipped: set GRAPHGROW_DATA to a directory with {', '.join(FILES)}")
        return None
    found = []
    for name in FILES:
        raw = gzip.decompress((Path(folder) / name).read_bytes())
        found.append(
            torch.frombuffer(bytearray(raw), dtype=torch.uint8)[16 if "images" in name else 8 :]
        )
    images = [t.reshape(-1, 784).float() / 255 for t in found[::2]]
    if standardise:
        images = [standardised(x, images[0][:50_000]) for x in images]
    return (images[0], found[1].long()), (images[1], found[3].long())


class Run:
    """What happened in a run: sizes by epoch, births of units, lives of those that went."""

    def __init__(self, graph, sizes):
        self.graph, self.sizes, self.change = graph, [sizes], 0.0
        self.births = {"0": [0] * sizes[0], "3": [0] * sizes[1]}
        self.gone, self.lengths, self.losses, self.errors = {"0": [], "3": []}, [], [], []
        self.beside = {}  # losses and errors of parametric networks by kind

    @property
    def lives(self):
        """The numbers of epochs for which units that went had been there."""
        return [last - first for gone in self.gone.values() for first, last in gone]

    def follow(self, epoch, change, loss, error):
        """Note an epoch and the turnover after it."""
        self.losses.append(loss)
        self.errors.append(error)
        if change is not None:
            if epoch % CHECK_EVERY == 0:
                found = gg.compare(change.grown.before, change.grown.graph, *self.graph.example)
                self.change = max(self.change, found.relative)
            for axis, units in change.removed.items():
                self.gone[axis] += [(self.births[axis][u], epoch + 1) for u in units]
                self.births[axis] = [b for u, b in enumerate(self.births[axis]) if u not in units]
            for axis, count in change.added.items():
                self.births[axis] += [epoch + 1] * count
            self.graph = change.grown.graph
        state = self.graph.state
        self.sizes.append(tuple(self.graph.axes[axis].width for axis in self.births))
        pairs = (
            ("0", state["0.weight"], state["3.weight"]),
            ("3", state["3.weight"], state["6.weight"]),
        )
        self.lengths.append(
            {
                axis: (
                    list(self.births[axis]),
                    reads.detach().norm(dim=1),
                    read.detach().norm(dim=0),
                )
                for axis, reads, read in pairs
            }
        )


def report(run, options, errors, seconds):
    """Print what came out beside what the paper has of its run of figure 3."""
    most = tuple(max(sizes[k] for sizes in run.sizes) for k in range(2))
    first = min((last for gone in run.gone.values() for _, last in gone), default="(none)")
    life = f"{median(run.lives):.0f} epochs" if run.lives else "none went"
    wrong = errors["nonparametric"][0] * options.images
    rows = [
        (
            "λ, epochs growing + settling",
            "3e-4, 1000 + 1000",
            f"{options.penalty:g}, {options.grow} + {options.settle}",
        ),
        ("life of a unit of length 1", "50 epochs", f"{options.life} epochs"),
        ("first unit gone after", "≈ 50 epochs", f"{first} epochs"),
        ("life of units that went (median)", "≈ 50 epochs", life),
        ("most units", "", f"{most[0]} and {most[1]}"),
        ("units at the end", "193 and 36", f"{run.sizes[-1][0]} and {run.sizes[-1][1]}"),
        ("training images wrong at the end", "≈ 30 of 50000", f"{wrong:.0f} of {options.images}"),
    ]
    print(f"{'':<36}{'paper':<22}here")
    for row in rows:
        print(f"{row[0]:<36}{row[1]:<22}{row[2]}")
    print(f"largest change of outputs by a turnover, in float64: {run.change:.1e}")
    print("error on test images, one size (the paper has it in figure 2 only):")
    for kind, (_, test) in errors.items():
        print(f"  {kind:<16}{100 * test:.2f} %")
    print(f"{seconds:.0f} s")


def save_figure(run, path):
    """Draw the panels of figure 3: errors, loss, sizes, lives and lengths, by epoch."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print(f"cannot draw '{path}': matplotlib is not installed")
        return
    figure, ((errors, losses, sizes, _), below) = plt.subplots(2, 4, figsize=(17, 8))
    curves = {"nonparametric": (run.losses, run.errors), **run.beside}
    for (kind, pair), color in zip(curves.items(), ("black", "red", "blue"), strict=False):
        for panel, values in zip((losses, errors), pair, strict=True):
            panel.semilogy(values, color=color, label=kind, lw=0.8)
    errors.set_title("validation error")
    errors.legend()
    losses.set_title("training cross-entropy")
    sizes.plot(run.sizes, label=["first layer", "second layer"])
    sizes.legend()
    sizes.set_title("units")
    for k, axis in enumerate(run.births):
        draw_lives(below[k], run, axis)
        draw_lengths(below[2 + k], run, axis)
    figure.axes[3].axis("off")
    figure.tight_layout()
    figure.savefig(path)


def draw_lives(panel, run, axis):
    """Draw for how long units were there, over the epoch that they came."""
    panel.set_title(f"life of units of axis '{axis}' (green: still there)")
    left = [(birth, len(run.losses)) for birth in run.births[axis]]
    for color, lives in (("black", run.gone[axis]), ("green", left)):
        panel.vlines([b for b, _ in lives], 0, [last - b for b, last in lives], color, lw=0.7)


def draw_lengths(panel, run, axis):
    """Draw the lengths of fan-in and fan-out of the first unit of some epochs."""
    panel.set_title(f"fan-in (blue) and fan-out (red), axis '{axis}'")
    births = sorted({birth for lengths in run.lengths for birth in lengths[axis][0]})
    for birth in births[:: max(1, len(births) // 12)]:
        for k, color in ((1, "tab:blue"), (2, "tab:red")):
            points = [
                (epoch, lengths[axis][k][lengths[axis][0].index(birth)])
                for epoch, lengths in enumerate(run.lengths)
                if birth in lengths[axis][0]
            ]
            panel.plot(*zip(*points, strict=True), color, lw=0.8)


def save_tasks(results, tasks, path):
    """Draw the test errors over the numbers of weights, one panel a task, as in figure 2."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print(f"cannot draw '{path}': matplotlib is not installed")
        return
    figure, panels = plt.subplots(1, len(results), figsize=(5 * len(results), 4.5), squeeze=False)
    for panel, (name, found) in zip(panels[0], results.items(), strict=True):
        for kind, color in (("nonparametric", "black"), ("RMSprop", "red"), ("SGD", "blue")):
            points = [(weights(widths), 100 * errors[kind]) for widths, errors in found.values()]
            panel.plot(*zip(*points, strict=True), "s", color=color, label=kind)
        ends = next(iter(found.values()))[0]
        ours = {p: (size, one) for p, (size, one, _) in tasks[name].paper.items() if p in found}
        points = [
            (weights((ends[0], *map(int, size.split("-")), ends[-1])), 100 * one)
            for size, one in ours.values()
        ]
        if points:
            panel.plot(*zip(*points, strict=True), "x", color="grey", label="paper, nonparametric")
        for penalty, (widths, errors) in found.items():
            at = weights(widths), 100 * errors["nonparametric"]
            said = f"λ = {penalty:g}\n" + "-".join(map(str, widths[1:-1]))
            panel.annotate(said, at, (6, 4), textcoords="offset points", fontsize=7)
        panel.margins(0.2)
        panel.locator_params(axis="x", nbins=5)
        panel.set(title=name, xlabel="weights", ylabel="test error, %")
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def weights(widths):
    """Return the number of weights of layers from one of these widths to the next."""
    return sum(a * b for a, b in pairwise(widths))
