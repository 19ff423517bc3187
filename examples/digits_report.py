"""What examples/digits.py measures and prints: a line per rewrite, and the comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, stdev

import torch
from rich.console import Group
from rich.live import Live
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import graphgrow as gg

Part = tuple[Tensor, Tensor]  # images `(n, 1, 8, 8)` and labels `(n,)`

LEGEND = """\
units, parameters, validation: before → after the rewrite; validation: accuracy on held-out images
change: largest difference of the outputs at that moment, in float64, in train and in eval mode
"""


def size(model: nn.Module) -> int:
    """Return how many parameters a model has."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def accuracy(model: nn.Module, part: Part) -> float:
    """Return the share of images that a model reads correctly."""
    images, labels = part
    return (model.eval()(images).argmax(1) == labels).double().mean().item()


@dataclass(frozen=True)
class Event:
    """One rewrite and what it changed: pairs hold the values before and after."""

    step: int
    rewrite: str
    axis: str
    exact: bool
    width: tuple[int, int]
    parameters: tuple[int, int]
    change: float
    accuracy: tuple[float, float]

    @staticmethod
    def of(grown: gg.Grown, step: int, validation: Part) -> Event:
        """Measure one rewrite that was just applied."""
        graphs = grown.before, grown.graph
        models = [gg.lower(graph) for graph in graphs]
        (rewrite,) = grown.rewrites
        # a layer inserted at a place brings an axis of its own, named after that place
        axis = f"{rewrite.at}_in" if isinstance(rewrite, gg.Deepen) else rewrite.axis
        return Event(
            step=step,
            rewrite=type(rewrite).__name__,
            axis=axis,
            exact=grown.proof.exact,
            width=tuple(graph.axes[axis].width if axis in graph.axes else 0 for graph in graphs),
            parameters=tuple(map(size, models)),
            change=gg.compare(*models, validation[0]).absolute,
            accuracy=tuple(accuracy(model, validation) for model in models),
        )

    def cells(self) -> list[str]:
        """Return the line of the table."""
        pairs = ["{:,} → {:,}".format(*pair) for pair in (self.width, self.parameters)]
        accuracies = " → ".join(map(_percent, self.accuracy))
        exact = "yes" if self.exact else "no"
        change = f"{self.change:.1e}"
        return [f"{self.step}", self.rewrite, exact, self.axis, *pairs, change, accuracies]


@dataclass(frozen=True)
class Result:
    """A seed's two networks of one architecture: accuracy on the test images, and size."""

    seed: int
    parameters: int
    grown: float
    scratch: float


class Display:
    """The table of one network's rewrites, which fills while it trains, over progress bars."""

    def __init__(self, title: str) -> None:
        columns = ("step", "rewrite", "exact", "axis", "units", "parameters", "change")
        self.table = _table(*columns, "validation %", title=title)
        self.bars = Progress()
        self.live = Live(Group(self.table, self.bars))

    def __enter__(self) -> Display:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.update(self.table)  # without the bars
        self.live.stop()
        print()

    def report(self, event: Event) -> None:
        """Add a line."""
        self.table.add_row(*event.cells())

    def task(self, what: str, steps: int) -> Callable[[], None]:
        """Add a progress bar, and return what moves it on by one step."""
        task = self.bars.add_task(what, total=steps)
        return lambda: self.bars.advance(task)


def summary(results: list[Result]) -> Table:
    """Return the table of grown networks against the same ones trained from scratch."""
    table = _table("seed", "parameters", "grown %", "from scratch %")
    for r in results:
        table.add_row(f"{r.seed}", f"{r.parameters:,}", *map(_percent, (r.grown, r.scratch)))
    if len(results) > 1:
        columns = [[r.grown for r in results], [r.scratch for r in results]]
        cells = (f"{_percent(mean(c))} ± {_percent(stdev(c))}" for c in columns)
        table.add_row("mean", f"{mean(r.parameters for r in results):,.0f}", *cells)
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, no_wrap=True)
    return table
