"""Where Torch-Pruning removes a unit of a model: whether that axis grows here, and why it may not.

    python benchmarks/pruning_peer.py [PATTERN ...] [--layers N] [--cache FILE] [--only-table]

Of each model of the zoo that reads one image and matches a pattern (left out, all of torchvision),
up to N layers (8), from all over it, lose one unit by Torch-Pruning 1.6.1 (`pip install
torch-pruning`), each in a copy of the model: one per group where a convolution has groups. It can
remove a unit if that returns and the model then runs with outputs of the same shapes. Then the axes
that this layer writes are looked up here. Models are processes of their own with LIMIT seconds.
Prints a line for each model, and at the end the layers whose units it removes and none can be added
to here, with the sentence.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import importlib
import json
import multiprocessing
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import architectures
import vision
from zoo import stir

import graphgrow as gg

LIMIT = 150  # seconds for each of the two on one model
Found = dict[str, Any]


def main() -> None:
    """Print what each finds on every model, and where they differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("patterns", nargs="*", default=["torchvision/*"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--cache", type=Path, default=Path("pruning_peer.jsonl"))
    parser.add_argument("--only-table", action="store_true")
    options = parser.parse_args()
    lines = options.cache.read_text().splitlines() if options.cache.exists() else []
    cached = {found["name"]: found for found in map(json.loads, lines)}
    with vision.silenced():
        names = list(architectures.architectures())
    for name in () if options.only_table else names:
        if name in cached or not any(fnmatch.fnmatch(name, p) for p in options.patterns):
            continue
        cached[name] = found = {"name": name, **in_a_process(name, options.layers)}
        print(line(found), flush=True)
        with options.cache.open("a") as file:
            file.write(json.dumps(found) + "\n")
    print(summary(list(cached.values())))


def in_a_process(name: str, layers: int) -> Found:
    """Return what `both` sends until it ends, or its time is over."""
    end, given = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=both, args=(given, name, layers))
    process.start()
    given.close()
    found: Found = {}
    for part in ("removed", "grown"):
        try:
            sent = end.recv() if end.poll(LIMIT) else f"not done after {LIMIT} s"
        except EOFError:
            sent = "its process ended"
        found[part] = sent
        if isinstance(sent, str):
            break
    process.kill()
    process.join()
    return found


def both(given: Connection, name: str, layers: int) -> None:
    """Send which layers Torch-Pruning removes units of, then what is said of their axes here."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with vision.silenced():
        model, inputs = architectures.architectures()[name]()
        stir(model)
        try:
            tried = removed(model.eval(), inputs, layers)
        except Exception as error:
            given.send(f"{type(error).__name__}: {error}".splitlines()[0])
            return
        given.send(tried)
        given.send(grown(gg.trace(model, **inputs), [path for path, runs in tried if runs]))


def removed(model: nn.Module, inputs: architectures.Inputs, layers: int) -> list[tuple[str, bool]]:
    """Return layers that write units, and whether Torch-Pruning can remove one of them."""
    peer = importlib.import_module("torch_pruning")

    def built(copied: nn.Module) -> Any:
        return peer.DependencyGraph().build_dependency(copied, example_inputs=inputs)

    kinds = [nn.Conv2d, nn.ConvTranspose2d, nn.Linear]
    groups = list(built(copy.deepcopy(model)).get_all_groups(root_module_types=kinds))
    paths = [str(group[0].dep.target.name).split(" ")[0] for group in groups]
    return [(path, loses_one(model, path, inputs, built)) for path in spread(paths, layers)]


def loses_one(model: nn.Module, path: str, inputs: architectures.Inputs, built: Any) -> bool:
    """Return whether a copy of a model runs as before once a layer has lost a unit."""
    pruned = copy.deepcopy(model)
    layer: Any = pruned.get_submodule(path)
    groups = getattr(layer, "groups", 1)
    width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    try:
        whole = [tuple(t.shape) for t in outputs(model, inputs)]
        each = groups if groups < width else 1
        units = [group * (width // groups) for group in range(each)]
        dependencies = built(pruned)
        function = dependencies.get_pruner_of_module(layer).prune_out_channels
        dependencies.get_pruning_group(layer, function, idxs=units).prune()
        return [tuple(t.shape) for t in outputs(pruned, inputs)] == whole
    except Exception:  # whatever it or the model raises, the unit is not removed
        return False


def outputs(model: nn.Module, inputs: architectures.Inputs) -> list[Tensor]:
    """Return the tensors that a model gives."""
    with torch.no_grad():
        return [t for t in tree_leaves(model(**inputs)) if isinstance(t, Tensor)]


def spread(paths: list[str], most: int) -> list[str]:
    """Return at most so many of some paths, from all over the list."""
    return paths[:: max(1, -(-len(paths) // most))]


def grown(graph: gg.Graph, paths: list[str]) -> dict[str, str | None]:
    """Return for each layer why none of the axes that it writes grows, None where one does."""
    return {path: next(obstacles(graph, path), None) for path in paths}


def obstacles(graph: gg.Graph, path: str) -> Iterator[str]:
    """Yield why the axes of a layer do not grow, nothing where one does."""
    layer = graph.modules[path]
    dim = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    axes = dict.fromkeys(graph.analysis.state[f"{path}.weight"][dim].axes())
    said = []
    for name in axes:
        width = graph.axes[name].width
        choices = (gg.Widen(name, 1), gg.Widen(name, width, weights=gg.Copy()))
        refusals = [choice.obstacle(graph) for choice in choices]
        if None in refusals:
            return
        said.append(str(refusals[0]))
    yield said[0] if said else f"'{path}' writes no axis"


def line(found: Found) -> str:
    """Return a line on one model."""
    removed_, grown_ = found.get("removed"), found.get("grown")
    if not isinstance(removed_, list):
        return f"{found['name']}: Torch-Pruning: {removed_}"
    runs = sum(runs for _, runs in removed_)
    text = f"{found['name']}: Torch-Pruning removes a unit of {runs} of {len(removed_)} layers"
    if not isinstance(grown_, dict):
        return f"{text}; here: {grown_}"
    return f"{text}; {sum(said is None for said in grown_.values())} of these grow here"


def summary(results: list[Found]) -> str:
    """Return the sums, and the layers that only Torch-Pruning has an answer for."""
    ran = [found for found in results if isinstance(found.get("grown"), dict)]
    tried = [runs for found in ran for _, runs in found["removed"]]
    said = [(f["name"], path, text) for f in ran for path, text in f["grown"].items()]
    refused = [f"{name}: {text}" for name, _, text in said if text is not None]
    head = (
        f"{len(results)} models, {len(ran)} of them built by Torch-Pruning; of {len(tried)} layers "
        f"it removes a unit of {sum(tried)}, and {len(said) - len(refused)} of these grow here"
    )
    return "\n".join([head, *refused])


if __name__ == "__main__":
    main()
