"""The attributes of torch's layers that state a size, so that a resized layer tells the truth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from graphgrow.errors import NotApplicable
from graphgrow.ir.layout import Layout
from graphgrow.nn import CapNorm, Rational


@dataclass(frozen=True)
class Sizes:
    """The layouts of a leaf's tensors by name and of its first input, and the widths after."""

    tensors: Mapping[str, Sequence[Layout]]
    input: Sequence[Layout]
    before: Mapping[str, int]
    after: Mapping[str, int]

    def __call__(self, name: str, dim: int) -> int:
        """Return the new size of one dim of a tensor."""
        return self.tensors[name][dim].size(self.after)

    def lead(self, layout: Layout, lead: int) -> int:
        """Return the new size of the leading part of a dim, which was `lead` (groups, say)."""
        tail = layout.size(self.before) // lead
        for term in layout.terms:
            old = new = 1
            for factor in reversed(term):
                if old == tail:
                    break
                part = Layout(((factor,),))
                old, new = old * part.size(self.before), new * part.size(self.after)
            if old == tail:
                return layout.size(self.after) // new
        return lead


def _linear(m: Any, s: Sizes) -> dict[str, Any]:
    return {"out_features": s("weight", 0), "in_features": s("weight", 1)}


def _bilinear(m: Any, s: Sizes) -> dict[str, Any]:
    names = ("out_features", "in1_features", "in2_features")
    return {name: s("weight", d) for d, name in enumerate(names)}


def _conv(m: Any, s: Sizes) -> dict[str, Any]:
    groups = 1 if m.groups == 1 else s.lead(s.tensors["weight"][0], m.groups)
    first, second = s("weight", 0), s("weight", 1) * groups
    if isinstance(m, _ConvTransposeNd):
        first, second = second, first
    return {"out_channels": first, "in_channels": second, "groups": groups}


def _norm(m: Any, s: Sizes) -> dict[str, Any]:
    named = [n for n in ("weight", "running_mean") if n in s.tensors]
    return {"num_features": s(named[0], 0)} if named else {}


def _group_norm(m: Any, s: Sizes) -> dict[str, Any]:
    channels = s.input[1]
    return {
        "num_channels": channels.size(s.after),
        "num_groups": s.lead(channels, m.num_groups),
    }


def _shuffle(m: Any, s: Sizes) -> dict[str, Any]:
    return {"groups": s.lead(s.input[1], m.groups)}


def _embedding(m: Any, s: Sizes) -> dict[str, Any]:
    return {"num_embeddings": s("weight", 0), "embedding_dim": s("weight", 1)}


def _prelu(m: Any, s: Sizes) -> dict[str, Any]:
    return {"num_parameters": s("weight", 0)}


def _layer_norm(m: Any, s: Sizes) -> dict[str, Any]:
    last = s.tensors.get("weight") or s.input[-len(m.normalized_shape) :]
    return {"normalized_shape": tuple(layout.size(s.after) for layout in last)}


def _recurrent(m: Any, s: Sizes) -> dict[str, Any]:
    """A projection of the state has its own width; layers and directions share theirs."""
    sizes = {"input_size": s("weight_ih_l0", 1), "hidden_size": s("weight_hh_l0", 1)}
    if not m.proj_size:
        return sizes
    hidden, projected = s("weight_hr_l0", 1), s("weight_hr_l0", 0)
    if projected >= hidden:
        raise NotApplicable(
            f"torch projects {hidden} units to fewer only, not to {projected}; widen those first"
        )
    return sizes | {"hidden_size": hidden, "proj_size": projected}


def _cell(m: Any, s: Sizes) -> dict[str, Any]:
    return {"input_size": s("weight_ih", 1), "hidden_size": s("weight_hh", 1)}


def _fixed(m: Any, s: Sizes) -> dict[str, Any]:
    return {}


_ROWS: tuple[tuple[type | tuple[type, ...], Callable[[Any, Sizes], dict[str, Any]]], ...] = (
    (nn.Linear, _linear),
    (nn.Bilinear, _bilinear),
    (_ConvNd, _conv),
    ((_NormBase, CapNorm), _norm),
    (nn.GroupNorm, _group_norm),
    (nn.ChannelShuffle, _shuffle),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    (nn.PReLU, _prelu),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, _cell),
    (Rational, _fixed),
)


def resized(module: nn.Module, sizes: Sizes) -> dict[str, Any]:
    """Return the attributes of a leaf that change, with their new values.

    Raises:
        NotApplicable: where the layer takes no such sizes.
    """
    row = next((row for kind, row in _ROWS if isinstance(module, kind)), _fixed)
    new = row(module, sizes)
    return {name: value for name, value in new.items() if getattr(module, name) != value}


def fixed(path: str, modules: Mapping[str, nn.Module], tensors: Iterable[str]) -> str | None:
    """Return what keeps a leaf's sizes as they are, None where they can be told.

    They can where it has a row here, or no tensors. A parametrization may compute its tensors if it
    has none of its own, which would have to follow. `tensors` are the paths of all tensors.
    """
    module, kind = modules[path], type(modules[path]).__name__
    inside = f"{path}.parametrizations"
    for at in tensors if inside in modules else ():
        owner, _, name = at.rpartition(".")
        if at.startswith(f"{inside}.") and "." in owner.removeprefix(f"{inside}."):
            own = type(modules[owner]).__name__
            return f"{own}, which keeps '{name}' of the whole weight, in {kind}"
    if not any(True for _ in (*module.parameters(), *module.buffers())):
        return None
    if not isinstance(module, tuple(k for kind, _ in _ROWS for k in _flat(kind))):
        return f"the attributes of {kind}"
    hooked = any(isinstance(value, Tensor) for value in vars(module).values())
    return f"a hook that computes a tensor of {kind}" if hooked else None


def _flat(kind: type | tuple[type, ...]) -> tuple[type, ...]:
    return kind if isinstance(kind, tuple) else (kind,)
