"""Capping: a batch norm becomes one that never makes its units larger."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from graphgrow.errors import NotApplicable
from graphgrow.ir.graph import Graph
from graphgrow.nn import CapNorm
from graphgrow.passes.prove import Proof
from graphgrow.passes.rewrite import Edit

DROPPED = ("weight", "bias", "num_batches_tracked")


@dataclass(frozen=True)
class Cap:
    """Replace the batch norm at a path by `nn.CapNorm`, which takes its running statistics over.

    Not exact: scale and shift of the norm are dropped, and units whose standard deviation is below
    one are no longer made larger. The proof has the measured change, which is zero in eval mode
    where the norm had scale √(σ² + eps) / max(σ, 1) and shift zero. The parameters that are dropped
    leave an optimizer with `gg.migrate`.

    Source: Philipp and Carbonell (2017), section 3.2.
    """

    at: str

    @staticmethod
    def places(graph: Graph) -> list[str]:
        """Return the paths of the batch norms that the graph calls as modules."""
        return [path for path in sorted(graph.leaves) if _is_norm(graph.modules[path])]

    def obstacle(self, graph: Graph) -> str | None:
        """Return the sentence that says why this norm cannot be capped, None where it can."""
        try:
            self._norm(graph)
        except NotApplicable as error:
            return str(error)
        return None

    def edit(self, graph: Graph) -> Edit:
        """Return the edit of `graph`. Raises NotApplicable with the obstacle's sentence."""
        norm = self._norm(graph)
        capped = CapNorm(norm.num_features, norm.momentum or 0.1, device="meta")
        capped.training = norm.training
        capped.running_mean = capped.running_var = None  # type: ignore[assignment]
        paths = [path for path, module in graph.modules.items() if module is norm]
        gone = {f"{path}.{name}" for path in paths for name in DROPPED}
        grown = replace(
            graph,
            modules={p: capped if m is norm else m for p, m in graph.modules.items()},
            state={path: tensor for path, tensor in graph.state.items() if path not in gone},
            journal=(*graph.journal, self),
        )
        line = f"the norm '{self.at}' is capped, its scale and shift are dropped"
        return Edit(grown, Proof(str(self), exact=False, modes=(), lines=(line,)))

    def _norm(self, graph: Graph) -> _BatchNorm:
        norm = graph.modules.get(self.at)
        if norm is None or self.at not in graph.leaves or not isinstance(norm, _BatchNorm):
            found = "there is no such module" if norm is None else f"it is a {type(norm).__name__}"
            raise NotApplicable(f"cannot cap '{self.at}': {found}; give a batch norm")
        if not _is_norm(norm):
            raise NotApplicable(
                f"cannot cap '{self.at}': it keeps no running statistics; make the norm with "
                "track_running_stats=True"
            )
        return norm


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.track_running_stats
