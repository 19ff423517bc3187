"""The value that every pass reads and returns: a recorded model with its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn


@dataclass(frozen=True, eq=False)
class Graph:
    """A traced model: structure (nodes, module paths, literals) and state (tensors by path).

    `train` and `eval` are the structures recorded in the two modes; they are one object where one
    structure serves both, its mode-dependent arguments read from `training` attributes. Neither is
    ever changed in place. `modules` holds every module of the model by path ("" is the root) as a
    template: class, attributes, hooks; `leaves` are the paths called as one node. `state` holds
    every parameter and buffer at each of its paths: the very tensors that `lower` will use.
    `example` has one value for each placeholder.
    """

    train: fx.Graph
    eval: fx.Graph
    modules: Mapping[str, nn.Module]
    leaves: frozenset[str]
    state: Mapping[str, Tensor]
    example: tuple[Any, ...]
    journal: tuple[Any, ...] = ()
