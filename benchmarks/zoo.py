"""Models of six libraries, whole: what traces, which axes widen, why others can't, how exactly.

    python benchmarks/zoo.py [PATTERN ...] [--alone N] [--cache FILE] [--table FILE] [--again]

Runs each model whose name matches a pattern (`timm/*`, `*/resnet*`; left out, all) and is not in
the cache yet, in a process of its own, with random weights, stirred as by training, and small
inputs, in float64; then writes the table of all that is in the cache. `--again` runs what is in the
cache once more, `--only-table` nothing. A run that was stopped goes on where it was. Needs
torchvision, timm, transformers, segmentation_models_pytorch and torch_geometric
(requirements/zoo.txt); the two largest need 20 GB, with MALLOC_MMAP_THRESHOLD_=1048576 where glibc
would keep what is freed.

Of each model: every axis without an obstacle is widened by the smallest prime from 3 on that
divides no width in it, all of them at once, and up to N of them each alone (1000); where that is
refused (streams with norms behind them, or dropout), by a copy of all its units; the new units are
removed again; so are zero units put among the old ones; layers that are the identity are
inserted at up to LAYERS places. Outputs are compared in train and in eval mode.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import fnmatch
import importlib
import json
import multiprocessing
import random
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import architectures
import vision

import graphgrow as gg

ALONE, ZEROS, LAYERS = 1000, 3, 5
LIBRARIES = ("timm", "transformers", "segmentation_models_pytorch", "torch_geometric")
ROUNDED = 1e-10  # a difference above which it is asked what rounding alone does
SETTLE = 50  # passes in train mode that make running statistics those of the weights
MOST = 8  # times the parameters of a model, above which an axis is widened alone
WHOLE = "grows by whole copies only:"
ANALYSIS_LIMIT, LIMIT = 60, 7200  # seconds of CPU to trace and analyse, and of time for all

Found = dict[str, Any]


def main() -> None:
    """Run what the cache lacks and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("patterns", nargs="*", default=["*"])
    parser.add_argument("--alone", type=int, default=ALONE)
    parser.add_argument("--cache", type=Path, default=Path("zoo.jsonl"))
    parser.add_argument("--table", type=Path, default=Path("docs/zoo.md"))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--only-table", action="store_true")
    options = parser.parse_args()
    with vision.silenced():
        names = list(architectures.architectures())
        for library in LIBRARIES:  # once, not in each process
            importlib.import_module(library)
    cached = read(options.cache)
    order = random.Random(0).sample(names, len(names))  # so that half a run is a fair sample
    for name in () if options.only_table else order:
        asked = any(fnmatch.fnmatch(name, pattern) for pattern in options.patterns)
        if asked and (options.again or name not in cached):
            found = in_a_process(name, options.alone)
            print(line(found, {}), flush=True)
            with options.cache.open("a") as file:
                file.write(json.dumps(found) + "\n")
    cached = read(options.cache)
    options.table.write_text(table([cached[name] for name in names if name in cached], len(names)))


def read(cache: Path) -> dict[str, Found]:
    """Return the last result for each model."""
    lines = cache.read_text().splitlines() if cache.exists() else []
    return {found["name"]: found for found in map(json.loads, lines)}


# --------------------------------------------------------------------------- one model


def in_a_process(name: str, alone: int) -> Found:
    """Return what `one` finds in a process of its own, or how that ended."""
    end, given = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_send, args=(given, name, alone))
    start = time.monotonic()
    process.start()
    given.close()
    found: Found = {"name": name, "failed": f"not done after {LIMIT} s"}
    if end.poll(LIMIT):
        try:
            found = end.recv()
        except EOFError:
            process.join()
            found = {"name": name, "failed": f"its process ended with {process.exitcode}"}
    process.kill()
    process.join()
    return {"total": time.monotonic() - start, **found}


def _send(given: Connection, name: str, alone: int) -> None:
    try:
        given.send(one(name, alone))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        given.send({"name": name, "failed": f"{type(error).__name__} at {place}: {error}"})


class Overtime(BaseException):
    """Tracing and analysis took longer than they may."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise Overtime when the block has used that many seconds of CPU."""

    def stop(*_: Any) -> None:
        raise Overtime

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def one(name: str, alone: int) -> Found:
    """Return what is found on one model; `refused` or `failed` says why there is no more."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.process_time()
    with vision.silenced():
        model, inputs = architectures.architectures()[name]()
        stir(model)
        inputs = conditioned(model, inputs)
        found: Found = {"name": name, "parameters": sum(p.numel() for p in model.parameters())}
        began = time.process_time()
        try:
            with limited(ANALYSIS_LIMIT):
                graph = gg.trace(model, **inputs)
                found |= axes(graph)
        except gg.UnsupportedOp as error:
            return found | {"refused": str(error)}
        except Overtime:
            return found | {"failed": f"not analysed after {ANALYSIS_LIMIT} s"}
        found["seconds"] = time.process_time() - began
        found |= widened(model, graph, inputs, alone)
        found |= deepened(graph, inputs)
    found["total"] = time.process_time() - start
    found["gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return found


def stir(model: nn.Module) -> None:
    """Move all weights and statistics from where they start, as training would.

    Heads that start at zero, scales that start equal and norms without an effect hide errors.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter += 0.02 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer += 0.1 * torch.randn_like(buffer)
            elif name.endswith("running_var"):
                buffer *= 0.5 + torch.rand_like(buffer)


def conditioned(model: nn.Module, inputs: architectures.Inputs) -> architectures.Inputs:
    """Return a model's inputs; where it magnifies rounding, more of them.

    Norms over a few numbers do, and running statistics that do not fit the weights: those are
    first made to, by passes in train mode.
    """
    if gg.compare(model, Nudged(model), **inputs).relative <= ROUNDED:
        return inputs
    if not all(isinstance(x, torch.Tensor) and x.is_floating_point() for x in inputs.values()):
        return inputs

    def drawn() -> architectures.Inputs:
        return {name: torch.randn_like(x.repeat_interleave(4, 0)) for name, x in inputs.items()}

    with torch.no_grad():
        for _ in range(SETTLE):
            model.train()(**drawn())
    return drawn()


def axes(graph: gg.Graph) -> Found:
    """Return the number of axes, and how often each obstacle and unknown operator came."""
    return {
        "structures": 1 if graph.train is graph.eval else 2,
        "axes": len(graph.axes),
        "obstacles": counted(said(axis) for axis in graph.axes.values() if axis.obstacle),
        "unknown": dict(graph.analysis.unknown),
    }


def said(axis: gg.Axis) -> str:
    """Return why an axis does not grow; channels that a convolution goes over are no space."""
    sentence = str(axis.obstacle).split("units): it ", 1)[1]
    is_space = sentence.startswith("is space") and axis.producers
    return f"has channels, but {sentence}" if is_space else sentence


def counted(sentences: Iterable[str]) -> dict[str, int]:
    """Return how often each sentence comes, apart from the names and sizes in it."""
    plain = (re.sub(r"(?<!operator)(?<!goes into) '[^']*'", "", sentence) for sentence in sentences)
    return dict(
        collections.Counter(re.sub(r"(?<!dim )\b\d[\d.]*", "N", sentence) for sentence in plain)
    )


def widened(model: nn.Module, graph: gg.Graph, inputs: architectures.Inputs, most: int) -> Found:
    """Return what widening did, at once and `most` axes alone, and removing after it.

    Of the graphs that come about on the way, each as large as the model, no more than two are held
    at a time beside the first.
    """
    remembered = Remembered(model)
    found: Found = {"traced": gg.compare(remembered, graph, **inputs).relative}
    more, apart, at_once = all_at_once(remembered, graph, inputs)
    fits = [name for name, count in more.items() if count == at_once["units"]]
    found |= at_once | {"widened": len(fits + apart), "copied": len(more) - len(fits)}
    names = [*apart, *sampled(list(more), most)]
    moved = [alone(remembered, graph, inputs, name, more.get(name)) for name in names]
    found |= {"alone": len(names), "alone_difference": max(moved, default=0.0)}
    zeros = [among(graph, name) for name in [*apart, *sampled(fits, ZEROS)]]
    done = [same for same in zeros if same is not None]
    found |= {"zeros": len(done), "back": max([found["back"], *done])}
    if difference(found) > ROUNDED:
        found["rounding"] = gg.compare(model, Nudged(model), **inputs).relative
    return found


def all_at_once(
    remembered: Remembered, graph: gg.Graph, inputs: architectures.Inputs
) -> tuple[dict[str, int], list[str], Found]:
    """Return how many units came to axes, which are too large together, and what was found."""
    units, together = odd_number(graph), graph
    more, refused, apart = dict[str, int](), list[str](), list[str]()
    for name in (axis.name for axis in graph.axes.values() if axis.obstacle is None):
        try:
            wider = gg.apply(together, gg.Widen(name, units), verify=False).graph
            if size(wider) > MOST * size(graph):  # axes inside axes, whose widths multiply
                apart.append(name)
            else:
                together, more[name] = wider, units
            del wider
        except gg.NotApplicable as error:
            width, sentence = together.axes[name].width, str(error).split(": ", 1)[1]
            copies = gg.Widen(name, width, weights=gg.Copy())
            if copies.obstacle(together) is None:
                together = gg.apply(together, copies, verify=False).graph
                more[name], sentence = width, f"{WHOLE} {sentence}"
            refused.append(sentence)
    found: Found = {"units": units, "refused_axes": counted(refused)}
    found["together"] = gg.compare(remembered, together, **inputs).relative
    for name, count in reversed(more.items()):
        together = without(together, name, graph.axes[name].width, count)
    return more, apart, found | {"back": gap(graph, together)}


def alone(
    remembered: Remembered,
    graph: gg.Graph,
    inputs: architectures.Inputs,
    name: str,
    count: int | None,
) -> float:
    """Return the difference that one axis makes that grows, by what it grew among all others."""
    units = odd_number(graph)
    weights = None if count in (None, units) else gg.Copy()
    wider = gg.apply(graph, gg.Widen(name, count or units, weights=weights), verify=False).graph
    return gg.compare(remembered, wider, **inputs).relative


def among(graph: gg.Graph, name: str) -> float | None:
    """Return the gap that zero units before the others leave when they are gone; None: refused."""
    units = odd_number(graph)
    try:
        zeros = gg.Widen(name, units, 0, gg.ZeroIncoming())
        wider = gg.apply(graph, zeros, verify=False).graph
        return gap(graph, without(wider, name, 0, units))
    except gg.NotApplicable:
        return None


def without(grown: gg.Graph, name: str, first: int, count: int) -> gg.Graph:
    """Return the grown graph without so many units of an axis, from the first on."""
    removal = gg.Remove(name, tuple(range(first, first + count)))
    return gg.apply(grown, removal, verify=False).graph


def sampled(names: list[str], most: int) -> list[str]:
    """Return at most so many of some names, from all over the list."""
    return names[:: max(1, -(-len(names) // most))]


class Remembered(nn.Module):
    """A model that runs once in each mode, and then gives the same outputs again."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.outputs = model, dict[bool, Any]()

    def __deepcopy__(self, memo: Any) -> Remembered:
        return self  # of all copies one has run

    def forward(self, **inputs: Any) -> Any:
        """Return what the model made of its first inputs in this mode."""
        if self.training not in self.outputs:
            self.outputs[self.training] = copy.deepcopy(self.model)(**inputs)
        return self.outputs[self.training]


class Nudged(nn.Module):
    """A model that gets its inputs with every entry moved by two units of rounding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        """Return what the model makes of the moved inputs."""
        return self.model(**{name: self.moved(value) for name, value in inputs.items()})

    def moved(self, value: Any) -> Any:
        """Return a tensor of real numbers with every other entry larger, and smaller, by a bit."""
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        order = torch.arange(value.numel(), dtype=value.dtype).reshape(value.shape)
        signs = 1 - 2 * (order % 2)
        return value * (1 + 2 * torch.finfo(value.dtype).eps * signs)


def size(graph: gg.Graph) -> int:
    """Return the number of entries of all tensors."""
    return sum(tensor.numel() for tensor in graph.state.values())


def odd_number(graph: gg.Graph) -> int:
    """Return the smallest prime from 3 on that divides no width."""
    widths = [axis.width for axis in graph.axes.values()]
    return next(p for p in (3, 5, 7, 11, 13, 17, 19, 23) if all(w % p for w in widths))


def gap(before: gg.Graph, after: gg.Graph) -> float:
    """Return the largest difference of the tensors, relative to the largest entry of each."""
    worst = 0.0
    for path, tensor in before.state.items():
        other = after.state[path]
        if tensor is not other and not torch.equal(tensor, other):
            worst = max(worst, ((tensor - other).abs().max() / tensor.abs().max()).item())
    return worst


def deepened(graph: gg.Graph, inputs: architectures.Inputs) -> Found:
    """Return how many layers were inserted, and what that changed."""
    places = gg.Deepen.places(graph)
    turns = [places[i :: max(len(places) // LAYERS, 1)] for i in range(len(places))]
    chosen: list[gg.Deepen] = []
    for place in dict.fromkeys(place for turn in turns for place in turn):
        if len(chosen) < LAYERS and gg.Deepen(place).obstacle(graph) is None:
            chosen.append(gg.Deepen(place))
    deeper = gg.apply(graph, *chosen, verify=False)
    difference = gg.compare(graph, deeper.graph, **inputs).relative if chosen else 0.0
    return {"layers": len(chosen), "deeper": difference, "deeper_bound": deeper.proof.rounding}


# --------------------------------------------------------------------------- the table

HEAD = """# The zoo

`{command}`: {count} of {of} models, torch {torch}, random weights, all of them stirred,
float64, one thread, {minutes:.0f} minutes of CPU in all. Every axis without an obstacle is widened
by a prime that divides no width in the model, or else by a copy of all its units: all at once (but
for axes inside others that would make the model {most} times as large), and {alone} of them each
alone; the new units, and zero units put among the old, are removed again; identity layers are
inserted at up to {layers} places.

{sums}

*of the possible*: widened by the prime or by copies, without the axes whose sentence below has
no number in *possible*: sizes of inputs and outputs, places in space and time, tables by place,
dims of one, tensors that are never read, and what a softmax goes over, where a new unit would take
its share. Axes that norms or dropout keep from growing count as possible, although some of them are
not.

*recorded*: there is one front end, which records a model once for both modes, or twice where they
run different code; *widened*: axes, of all, and by copies; *alone*: of these, each by itself;
*zeros*: zero units put in and removed; *back*: by how much the tensors differ after removing, 0 is
bit for bit; *layers*: inserted;
*difference*: of the outputs, the largest of all, relative, in train and eval mode, in brackets what
the model itself does when its inputs move by two units of rounding, where more than {rounded:.0e};
not of inserted layers (*deeper*; their factors are inverted, and the proof bounds that); *time*: of
CPU, seconds to trace and analyse; *others*: the numbers of the sentences about the other axes.

## Why axes do not widen

| | axes | possible | models | sentence |
|---|---|---|---|---|
{sentences}

## Models

| model | recorded | widened | alone | zeros | back | layers | difference | deeper | time | others |
|---|---|---|---|---|---|---|---|---|---|---|
{lines}
"""


def table(results: list[Found], of: int) -> str:
    """Return the page: sums, sentences by how many axes they cost, a line for each model."""
    counts: collections.Counter[str] = collections.Counter()
    models: collections.Counter[str] = collections.Counter()
    for found in results:
        counts.update(others(found))
        models.update(others(found).keys())
    numbers = {sentence: i for i, (sentence, _) in enumerate(counts.most_common(), 1)}
    return HEAD.format(
        command="python benchmarks/zoo.py",
        count=len(results),
        of=of,
        torch=torch.__version__,
        minutes=sum(found["total"] for found in results) / 60,
        alone=sum(found.get("alone", 0) for found in results),
        most=MOST,
        rounded=ROUNDED,
        layers=LAYERS,
        sums=sums(results),
        sentences="\n".join(
            f"| {i} | {counts[said]} "
            f"| {'' if said.startswith((*NEVER, WHOLE)) else counts[said]} "
            f"| {models[said]} | {said} |"
            for said, i in numbers.items()
        ),
        lines="\n".join(line(found, numbers) for found in results),
    )


def others(found: Found) -> collections.Counter[str]:
    """Return how often each sentence comes about the axes of a model that do not widen."""
    counts = collections.Counter(found.get("obstacles", {}))
    counts.update(found.get("refused_axes", {}))
    return counts


def sums(results: list[Found]) -> str:
    """Return the rows of sums, by library and of all."""
    rows = [
        "| library | models | trace | axes | widened | by copies | of the possible | difference |"
    ]
    rows += ["|---|---|---|---|---|---|---|---|"]
    libraries = dict.fromkeys(found["name"].partition("/")[0] for found in results)
    for library in (*libraries, "all"):
        here = [f for f in results if library in ("all", f["name"].partition("/")[0])]
        done = [found for found in here if "total" in found and "axes" in found]
        axes_, wide, copied = (
            sum(found.get(key, 0) for found in here) for key in ("axes", "widened", "copied")
        )
        never = sum(n for f in here for s, n in others(f).items() if s.startswith(NEVER))
        worst = max((difference(found) for found in done), default=0.0)
        share = 100 * (wide + copied) / max(axes_ - never, 1)
        traced = sum("axes" in found for found in here)
        rows.append(
            f"| {library} | {len(here)} | {traced} | {axes_} | {wide} | {copied} "
            f"| {share:.1f} % of {axes_ - never} | {worst:.0e} |"
        )
    return "\n".join(rows)


# Axes that cannot grow in any way that keeps the function: sizes of inputs and outputs, places in
# space and time and what is listed by them, dims of one, what no one reads or learns, and what a
# softmax goes over, of which a finite new one would take its share. All others count as possible.
NEVER = (
    "is fixed by dim",
    "is dim",
    "is fixed by a constant",
    "is written by no parameter",
    "is indexed by a tensor",
    "lists positions of another tensor",
    "is picked from by position",
    "is attended over",
    "is cut into windows",
    "is read at the places",
    "is space that",
    "is the side of a block",
    "is padding",
    "is a size computed",
    "is of a tensor that the model does not read",
    "has width one",
    "goes into 'softmax'",
    "goes into 'log_softmax'",
    "goes into 'safe_softmax'",
)


def difference(found: Found) -> float:
    """Return the largest relative difference of the outputs after widening."""
    return max(found.get(key, 0.0) for key in ("traced", "together", "alone_difference"))


def exactness(found: Found) -> str:
    """Return the difference, and beside a large one what rounding alone does."""
    alone = f" ({found['rounding']:.0e})" if "rounding" in found else ""
    return f"{difference(found):.0e}{alone}"


def line(found: Found, numbers: dict[str, int]) -> str:
    """Return one row of the table."""
    failed = found.get("refused") or found.get("failed")
    if "axes" not in found or failed:
        return f"| {found['name']} | {failed} |"
    said = ", ".join(f"{n} × {numbers.get(s, '?')}" for s, n in others(found).most_common())
    return (
        f"| {found['name']} | {'once' if found['structures'] == 1 else 'twice'} "
        f"| {found['widened']} + {found['copied']} of {found['axes']} "
        f"| {found['alone']} "
        f"| {found['zeros']} | {found['back']:.0e} | {found['layers']} | {exactness(found)} "
        f"| {found['deeper']:.0e} | {found['seconds']:.1f} | {said} |"
    )


if __name__ == "__main__":
    main()
