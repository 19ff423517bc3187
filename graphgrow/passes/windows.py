"""What new units do to others beside them where an operator goes over neighbouring units.

Old units keep their sums if each still has the same old units in its window, and beside these only
new ones that are zero, as the padding was that they stand in for: new units that are zero, at an
end of the dim. New units that no old one has in its window may hold anything.
"""

from __future__ import annotations

import numpy as np

from graphgrow.ir.analyse import Step
from graphgrow.ir.layout import Layout
from graphgrow.ir.outcome import Window, aten
from graphgrow.passes.units import Resized


def disturbance(
    resized: Resized, step: Step, window: Window, zero: np.ndarray
) -> tuple[str | None, np.ndarray]:
    """Return why old units get other sums, None where they do not, and which new ones get zero.

    `zero` says which new units are zero where the windows read them.
    """
    layout = resized.analysis.values[step.outputs[0]][window.dim]
    if not _pads_with_zeros(resized, step, window, layout):
        return _reason(step, "what lies beyond their ends is not known to be zero"), zero & False
    place, units = _places(resized, layout)
    old = place >= 0
    empty = np.zeros(len(resized.units), dtype=bool)
    empty[resized.new] = zero
    filled = ~old & ~empty[units]
    alone = _inside(old | filled, window) == 0
    nothing = np.array([alone[units == u].all() for u in resized.new], dtype=bool)
    before = _inside(np.ones(old.sum(), dtype=bool), window)[place[old]]
    if (_inside(old, window)[old] != before).any():
        return _reason(step, "new ones stand between others, not at an end"), nothing
    if (_inside(filled, window)[old] > 0).any():
        return _reason(step, "new ones beside others are not zero"), nothing
    return None, nothing


def _reason(step: Step, fact: str) -> str:
    return f"{step.where} goes over neighbouring units in {step.mode} mode, and {fact}"


def _places(resized: Resized, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Return the narrow position and the unit at each position of the wider dim, −1 for none."""
    narrow = {**resized.widths(), resized.axis: len(resized.old)}
    place = layout.origin(narrow, {resized.axis: resized.units})
    return place, layout.units(resized.widths(), resized.axis)


def _inside(flags: np.ndarray, window: Window) -> np.ndarray:
    """Return how many of the flagged positions are in the window of each position."""
    total, at = np.concatenate([[0], np.cumsum(flags)]), np.arange(len(flags))
    first = np.maximum(at - window.before, 0)
    return total[np.minimum(at + window.after + 1, len(flags))] - total[first]


def _pads_with_zeros(resized: Resized, step: Step, window: Window, inside: Layout) -> bool:
    """Return whether all that the windows reach beyond the dim's ends is zero."""
    analysis = resized.analysis
    read = step.inputs[0]
    if analysis.values[read][window.dim] == inside:
        return True  # the operator's own padding
    maker = next((s for s in analysis.touching(resized.axis) if read in s.outputs), None)
    if maker is None or maker.func.overloadpacket is not aten.constant_pad_nd:
        return False
    return analysis.values[maker.inputs[0]][window.dim] == inside
