"""Applying rewrites: all of them or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from graphgrow.errors import NotEquivalent
from graphgrow.ir.graph import Graph
from graphgrow.passes.prove import Proof
from graphgrow.passes.ranges import inside
from graphgrow.passes.rewrite import Grown, Rewrite, TensorOrigin
from graphgrow.passes.units import gather
from graphgrow.verify import Difference, compare

TOLERANCE = 1e-10


def apply(graph: Graph, *rewrites: Rewrite, verify: bool = True) -> Grown:
    """Return the graph with all rewrites applied in turn, with origin and proof.

    With `verify`, both graphs are run on the example inputs in float64 and in both modes, and an
    exact rewrite must agree to 1e-10 of the output, or to what rounding its new numbers to the
    model's own precision may cost. On any failure nothing has changed.

    Raises:
        NotApplicable: with the sentence that the rewrite's `obstacle` returns.
        NotEquivalent: where verification finds a larger difference.
    """
    now, origin, proofs = graph, {}, []
    for rewrite in rewrites:
        edit = rewrite.edit(now)
        found = _at_all_paths(now, edit.origin)
        origin = chained(origin, {p: o for p, o in found.items() if p in graph.state})
        proofs.append(edit.proof)
        now = edit.graph
    proof = _joined(proofs)
    if verify and rewrites:
        proof = _verified(proof, compare(graph, now, *inside(proof.box, graph.example)))
    return Grown(graph, now, origin, proof, rewrites)


def _at_all_paths(graph: Graph, origin: Mapping[str, TensorOrigin]) -> dict[str, TensorOrigin]:
    """Return origins by every path of each tensor, for those known by one."""
    by_id = {id(graph.state[path]): found for path, found in origin.items() if path in graph.state}
    every = {p: by_id[id(tensor)] for p, tensor in graph.state.items() if id(tensor) in by_id}
    return {**origin, **every}


def chained(
    first: Mapping[str, TensorOrigin], second: Mapping[str, TensorOrigin]
) -> dict[str, TensorOrigin]:
    """Return the origins of two edits made one after the other."""
    out = dict(first)
    for path, origin in second.items():
        out[path] = _chain(first[path], origin) if path in first else origin
    return out


def _chain(first: TensorOrigin, second: TensorOrigin) -> TensorOrigin:
    dims = tuple(_through(a, b) for a, b in zip(first.dims, second.dims, strict=True))
    if first.scale is None:
        return TensorOrigin(dims, second.scale)
    moved = gather(first.scale, TensorOrigin(second.dims))
    return TensorOrigin(dims, moved if second.scale is None else moved * second.scale)


def _through(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return torch.where(second < 0, second, first[second.clamp(min=0)])


def _joined(proofs: list[Proof]) -> Proof:
    """Return one proof for rewrites applied in turn."""
    if len(proofs) == 1:
        return proofs[0]
    lines = tuple(line for proof in proofs for line in str(proof).splitlines())
    modes = tuple(m for m in ("train", "eval") if all(m in proof.modes for proof in proofs))
    exact = all(proof.exact for proof in proofs)
    domain = "; ".join(dict.fromkeys(proof.domain for proof in proofs)) or "all inputs"
    rounding = sum(proof.rounding for proof in proofs)
    boxes = [proof.box for proof in proofs if proof.box is not None]
    box = (max(low for low, _ in boxes), min(high for _, high in boxes)) if boxes else None
    return Proof(f"{len(proofs)} rewrites", exact, modes, domain, lines, rounding, box=box)


def _verified(proof: Proof, found: Difference) -> Proof:
    """Return the proof with what was measured, if that is what it promises."""
    promised = [getattr(found, mode).relative for mode in proof.modes]
    if not all(worst <= max(TOLERANCE, proof.rounding) for worst in promised):
        raise NotEquivalent(
            f"not equivalent after {proof.rewrite}: relative difference {max(promised):.1e} "
            f"of the outputs on the example inputs"
        )
    return proof if proof.exact else replace(proof, error=found.relative)
