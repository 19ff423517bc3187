"""A graph with one axis resized: tensors, module attributes and stated sizes all follow."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from graphgrow.errors import NotApplicable
from graphgrow.ir.analyse import Slot
from graphgrow.ir.assemble import shell, twin
from graphgrow.ir.attributes import Sizes, resized
from graphgrow.ir.graph import Graph
from graphgrow.ir.layout import Layout
from graphgrow.passes import literals
from graphgrow.passes.units import Resized


def resize(
    graph: Graph,
    change: Resized,
    tensors: Mapping[str, Tensor],
    rewrite: Any,
) -> Graph:
    """Return `graph` with an axis resized, `tensors` by path in place of the old ones.

    `rewrite` joins the journal; its `numbers` have factors for what calls add to statistics. What
    is known of axes carries over with the new widths, so that many rewrites in a row need one
    analysis; it is derived anew where one unit is left.

    Raises:
        NotApplicable: where a size stated in a call cannot be stated anew.
    """
    widths = change.widths()
    scaled = {(mode, node): factor for mode, node, factor in rewrite.numbers}
    among = graph.concerned[change.axis].nodes | scaled.keys()
    train, numbers = literals.resize(graph.train, graph.analysis, "train", among, widths, scaled)
    same = graph.eval is graph.train
    eval_, more = literals.resize(graph.eval, graph.analysis, "eval", among, widths, scaled)
    made = {id(graph.state[path]): twin(graph.state[path], t) for path, t in tensors.items()}
    grown = replace(
        graph,
        train=train,
        eval=train if same else eval_,
        state={path: made.get(id(tensor), tensor) for path, tensor in graph.state.items()},
        modules=_retold(graph, change.axis, widths, _scaled_leaves(graph, scaled)),
        journal=(*graph.journal, rewrite),
    )
    # the last of several groups is no group: the layer is an ordinary one from then on
    if widths[change.axis] > 1 or graph.axes[change.axis].width == 1:
        grown.__dict__["analysis"] = graph.analysis.resized(widths, {**numbers, **more})
        grown.__dict__["concerned"] = graph.concerned
    return grown


def _scaled_leaves(graph: Graph, scaled: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """Return the factor for the eps of each leaf module that has one, by path."""
    found: dict[str, float] = {}
    for mode, structure in (("train", graph.train), ("eval", graph.eval)):
        for node in structure.nodes if scaled else ():
            factor = scaled.get((mode, node.name))
            if node.op != "call_module" or factor is None:
                continue
            path = str(node.target)
            if not hasattr(graph.modules[path], "eps") or found.setdefault(path, factor) != factor:
                raise NotApplicable(
                    f"cannot resize '{path}': it adds a number that would have to be multiplied by "
                    f"{factor:.6g}, and has no eps of its own to hold it"
                )
    return found


def _retold(
    graph: Graph, axis: str, widths: Mapping[str, int], scaled: Mapping[str, float]
) -> dict[str, nn.Module]:
    """Return the module templates with their attributes true again; untouched ones are shared."""
    inputs = _inputs(graph, graph.concerned[axis].nodes)
    fresh: dict[int, nn.Module] = {}
    changed = graph.concerned[axis].leaves
    for path in changed | dict.fromkeys(scaled):
        module = graph.modules[path]
        sizes = _sizes(graph, path, inputs.get(path, ()), widths)
        try:
            told = resized(module, sizes) if path in changed else {}
        except NotApplicable as error:
            name = type(module).__name__
            raise NotApplicable(f"cannot resize {name} '{path}': {error}") from None
        if path in scaled:
            told = {**told, "eps": _eps(path, module) * scaled[path]}
        if told and id(module) not in fresh:
            fresh[id(module)] = _with(module, told)
    return {path: fresh.get(id(module), module) for path, module in graph.modules.items()}


def _eps(path: str, module: Any) -> float:
    """Return the eps of a norm; torch takes the precision of the numbers where none is given."""
    weight = module._parameters.get("weight")
    if module.eps is not None or weight is not None:
        return torch.finfo(weight.dtype).eps if module.eps is None else module.eps
    raise NotApplicable(
        f"cannot resize '{path}': its eps is not given, so it depends on the precision; give one"
    )


def _with(module: nn.Module, attributes: dict[str, Any]) -> nn.Module:
    made = shell(module, keep_class=True)
    made.__dict__.update(attributes)
    return made


def _sizes(graph: Graph, path: str, inputs: tuple[Layout, ...], widths: Mapping[str, int]) -> Sizes:
    module, analysis = graph.modules[path], graph.analysis
    names = [*module._parameters, *module._buffers]
    found = {n: analysis.state[f"{path}.{n}"] for n in names if f"{path}.{n}" in analysis.state}
    inside = f"{path}.parametrizations"
    state = graph.state if inside in graph.modules else {}
    originals = [at for at in state if at.startswith(f"{inside}.")]
    for at in sorted(originals, key=lambda at: state[at].numel()):
        # of what a weight is computed from, the largest has its sizes
        found[at.removeprefix(f"{inside}.").partition(".")[0]] = analysis.state[at]
    return Sizes(found, inputs, analysis.widths(), widths)


def _inputs(graph: Graph, among: Container[tuple[str, str]]) -> dict[str, tuple[Layout, ...]]:
    """Return the layouts of the first input of leaf modules that are called at nodes `among`."""
    found: dict[str, tuple[Layout, ...]] = {}
    for mode, structure in (("train", graph.train), ("eval", graph.eval)):
        for node in structure.nodes:
            if (mode, node.name) in among and node.op == "call_module" and node.target not in found:
                arg = next((a for a in tree_leaves(node.args) if isinstance(a, fx.Node)), None)
                value = graph.analysis.nodes.get((mode, arg.name)) if arg is not None else None
                if isinstance(value, Slot):
                    found[str(node.target)] = graph.analysis.values[value.number]
    return found
