"""The paths under which a graph knows the tensors that runs do not compute."""

from __future__ import annotations

from itertools import count

import torch
from torch import Tensor, fx


class Names:
    """The model's tensors by path, and the constants that runs come upon."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state
        self._constants: dict[str, Tensor] = {}
        self._strangers: dict[int, str] = {}  # by the order in which a run meets them
        self._paths: dict[int, str] = {}
        for path, tensor in state.items():
            self._paths.setdefault(id(tensor), path)

    def of(self, tensor: Tensor) -> str:
        """Return the path of `tensor`, a new one if it has none."""
        if id(tensor) not in self._paths:
            self._paths[id(tensor)] = self._new(tensor)
        return self._paths[id(tensor)]

    def of_stranger(self, tensor: Tensor, order: int) -> str:
        """Return a path for the `order`-th tensor that a run finds outside the model.

        Code that makes a constant anew in each run finds it under the same path in each.
        """
        if id(tensor) in self._paths:
            return self._paths[id(tensor)]
        known = self._constants.get(self._strangers.get(order, ""))
        if known is None or not _equal(known, tensor):
            self._strangers[order] = self.of(tensor)
        return self._strangers[order]

    def state_of(self, *graphs: fx.Graph) -> dict[str, Tensor]:
        """Return the tensors by path, the constants only if one of `graphs` reads them."""
        read = {node.target for graph in graphs for node in graph.nodes if node.op == "get_attr"}
        found = {path: t for path, t in self._constants.items() if path in read}
        return self.state | {p: t.detach() if t.requires_grad else t for p, t in found.items()}

    def _new(self, tensor: Tensor) -> str:
        paths = map("_constant{}".format, count(len(self._constants)))
        path = next(p for p in paths if p not in self.state and p not in self._constants)
        self._constants[path] = tensor  # kept alive: its id stays its own
        return path


def _equal(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)
