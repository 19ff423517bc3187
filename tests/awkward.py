"""Small modules, each with one awkward pattern, and the answer stated by hand.

`case` gives the shape of the input, the axes that can be widened with their widths, and for the
others what the obstacle says; axes fixed by the model's input or output are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from strategies import Standardised
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A module, an input of a shape for it, and what is known of its axes."""

    module: type[nn.Module]
    shape: tuple[int, ...]
    grows: frozenset[str]
    fixed: Mapping[str, str]
    words: int

    def inputs(self, batch: int) -> Tensor:
        """Return a batch that depends on its size alone."""
        generator = torch.Generator().manual_seed(batch)
        shape = (batch, *self.shape[1:])
        if self.words:
            return torch.randint(self.words, shape, generator=generator)
        return torch.randn(shape, generator=generator, dtype=torch.double)


CASES: dict[str, Case] = {}


def case(
    shape: tuple[int, ...], grows: str, fixed: Mapping[str, str] | None = None, words: int = 0
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Return a decorator that registers a module with its answer."""

    def register(module: type[nn.Module]) -> type[nn.Module]:
        CASES[module.__name__] = Case(module, shape, frozenset(grows.split()), fixed or {}, words)
        return module

    return register


@case((2, 3), "w(6)")
class AddmmFn(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 6))
        self.b = nn.Parameter(torch.randn(6))
        self.o = nn.Linear(6, 2)

    def forward(self, x):
        return self.o(torch.addmm(self.b, x, self.w).tanh())


@case((2, 5, 3), "w(6)")
class MatmulParam3d(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 6))
        self.o = nn.Linear(6, 2)

    def forward(self, x):
        return self.o((x @ self.w).tanh())


@case((2, 3), "w(6)")
class EinsumLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 3))
        self.v = nn.Parameter(torch.randn(2, 6))

    def forward(self, x):
        return torch.einsum("oh,bh->bo", self.v, torch.einsum("hi,bi->bh", self.w, x).sigmoid())


@case((2, 5, 3), "w(4) w.2(6)")
class EinsumHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4, 6))
        self.v = nn.Parameter(torch.randn(4, 6, 2))

    def forward(self, x):
        return torch.einsum(
            "bnhd,hdo->bno", torch.einsum("bni,ihd->bnhd", x, self.w).sigmoid(), self.v
        )


@case(
    (2, 5, 8),
    "qkv[1](2) qkv[2](4)",
    fixed={"qkv[0]": "is picked from by position"},
)
class AttentionSdpa(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.o = nn.Linear(8, 8)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C))


@case((2, 5, 8), "q[0](2) q[1](4) v[1](4)")
class AttentionManual(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.k = nn.Linear(8, 8)
        self.v = nn.Linear(8, 8)
        self.o = nn.Linear(8, 8)

    def forward(self, x):
        B, N, _ = x.shape

        def h(t):
            return t.view(B, N, 2, 4).transpose(1, 2)

        q, k, v = h(self.q(x)), h(self.k(x)), h(self.v(x))
        a = (q @ k.transpose(-2, -1) / 4**0.5).softmax(-1)
        return self.o((a @ v).transpose(1, 2).flatten(2))


@case((2, 5, 8), "qkv[0](2) qkv[1](4) qkv[5](4)")
class AttentionChunks(nn.Module):
    """Queries and keys are parts of one weight, and their scale comes from a size."""

    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (t.reshape(b, n, 2, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        weights = (q @ k.transpose(-2, -1) / q.size(-1) ** 0.5).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


@case((2, 5, 8), "layers.0.0(4) layers.0.2(6) layers.0.3(8) layers.1.2(6) layers.1.3(8)")
class AttentionSharedTable(nn.Module):
    """Two layers multiply their queries and keys with one table: one factor of each is zero."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 6), nn.Linear(6, 8)])
            for _ in range(2)
        )
        self.register_buffer("table", torch.arange(4.0) / 4 + 0.5)
        self.o = nn.Linear(8, 3)

    def forward(self, x):
        for q, k, v, o in self.layers:
            weights = (q(x) * self.table) @ (k(x) * self.table).transpose(-2, -1)
            x = o(weights.softmax(-1) @ v(x))
        return self.o(x)


@case((2, 5, 8), "q[0](2) q[1](4) v[1](4)")
class AttentionHeadsInTheBatch(nn.Module):
    """The number of heads is multiplied with a size of the run, before bmm."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.o, self.heads = nn.Linear(8, 8), 2

    def forward(self, x):
        b, n, _ = x.shape
        whole = b * self.heads

        def alone(t):
            return t.view(b, n, self.heads, -1).transpose(1, 2).reshape(whole, n, -1)

        weights = torch.bmm(alone(self.q(x)), alone(self.k(x)).transpose(1, 2)) / 2
        y = torch.bmm(weights.softmax(-1), alone(self.v(x)))
        return self.o(y.view(b, self.heads, n, -1).transpose(1, 2).flatten(2))


@case((2, 5, 8), "qkv[0](2) qkv[2](4)", fixed={"qkv[1]": "is picked from by position"})
class AttentionHeadsFirst(nn.Module):
    """Each head has its query, key and value side by side, as in Bloom."""

    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x):
        b, n, _ = x.shape
        packed = self.qkv(x).view(b, n, 2, 3, 4)
        q, k, v = (packed[..., i, :].transpose(1, 2) for i in range(3))
        weights = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).reshape(b, n, -1))


@case((2, 5, 8), "qkv[0](2) qkv[1](4) qkv[3](5)")
class AttentionPackedInHeads(nn.Module):
    """Each head has its query, key and value one after the other, as in MaxViT."""

    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(8, 26), nn.Linear(10, 3)

    def forward(self, x):
        b, n, _ = x.shape
        packed = self.qkv(x).view(b, n, 2, 13).transpose(1, 2)
        q, k, v = packed.split([4, 4, 5], -1)
        weights = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).reshape(b, n, -1))


@case((2, 5, 8), "qkv[0](2) qkv[3](2) qkv[7](4)")
class AttentionPackedInHeadsPartlyTurned(nn.Module):
    """The same, and the first features of queries and keys are turned, as in GPT-NeoX."""

    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 2, 12).transpose(1, 2).chunk(3, -1)
        angles = torch.arange(n, dtype=x.dtype)[:, None]

        def turned(t):
            first, second, rest = t[..., :1], t[..., 1:2], t[..., 2:]
            cos, sin = angles.cos(), angles.sin()
            return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)

        y = F.scaled_dot_product_attention(turned(q), turned(k), v)
        return self.o(y.transpose(1, 2).reshape(b, n, -1))


@case(
    (2, 3, 5, 5),
    "b(4)",
    fixed={"a": "would get no gradient for ever", "filter": "has width one"},
)
class EcaOfDeadUnits(nn.Module):
    """torch's ReLU gives units that have to be zero no gradient."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Conv2d(3, 6, 3), nn.Linear(6, 4), nn.Linear(4, 3)
        self.filter = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x):
        x = self.a(x).relu()
        gate = self.filter(x.mean((2, 3)).unsqueeze(1)).sigmoid().reshape(x.shape[0], -1, 1, 1)
        return self.o(self.b((x * gate).mean((2, 3))).tanh())


@case(
    (2, 3, 6, 6),
    "layers.0(6) layers.1(4)",
    fixed={
        f"layers.{i}.gain{dim}": "has width one and is reshaped"
        for i in range(2)
        for dim in ("", ".2", ".3")
    },
)
class StandardisedWithGain(nn.Module):
    def __init__(self):
        super().__init__()
        first, second = (
            Standardised(3, 6, 3, padding=1, gain=True),
            Standardised(6, 4, 3, gain=True),
        )
        self.layers, self.o = nn.ModuleList([first, second]), nn.Linear(4, 3)

    def forward(self, x):
        for layer in self.layers:
            x = F.silu(layer(x))
        return self.o(x.mean((2, 3)))


@case(
    (2, 3, 6, 6),
    "a[0](2) b[0](2)",
    fixed={"a[1]": "no copies of each as often", "b[1]": "no copies of each as often"},
)
class StandardisedWithoutGain(nn.Module):
    """The next norm over units takes the factor, and its eps follows."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Standardised(3, 6, 3, bias=False), Standardised(6, 4, 3, bias=False)
        self.n, self.m, self.o = nn.GroupNorm(2, 6), nn.GroupNorm(2, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.o(self.m(self.b(F.silu(self.n(self.a(x))))).tanh().mean((2, 3)))


@case((2, 3, 6, 6), "", fixed={"a": "'add' does not pass on the factor"})
class StandardisedBeforeASum(nn.Module):
    """Where the factor of the second layer meets a skip, nothing can take it back."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), Standardised(6, 6, 3, bias=False, padding=1)
        self.o = nn.Linear(6, 3)

    def forward(self, x):
        x = self.a(x)
        return self.o((x + self.b(x)).tanh().mean((2, 3)))


@case((2, 5, 8), "q[0](2) q[1](2) q[2](4) v[1](4)")
class AttentionGqa(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 16)
        self.k = nn.Linear(8, 8)
        self.v = nn.Linear(8, 8)
        self.o = nn.Linear(16, 8)

    def forward(self, x):
        B, N, _ = x.shape
        q = self.q(x).view(B, N, 4, 4).transpose(1, 2)
        k = self.k(x).view(B, N, 2, 4).transpose(1, 2)
        v = self.v(x).view(B, N, 2, 4).transpose(1, 2)
        k = k.repeat_interleave(2, 1)
        v = v.repeat_interleave(2, 1)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, 16))


@case(
    (2, 5, 8),
    "a.in_proj_weight[0](2) a.in_proj_weight[1](4) a.in_proj_weight[5](4) a.out_proj(8)",
)
class Mha(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.MultiheadAttention(8, 2, batch_first=True)
        self.o = nn.Linear(8, 2)

    def forward(self, x):
        return self.o(self.a(x, x, x)[0])


@case(
    (2, 5, 8),
    "a.linear1(16) a.self_attn.in_proj_weight[0](2) a.self_attn.in_proj_weight[1](4) "
    "a.self_attn.in_proj_weight[5](4)",
)
class EncoderLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.TransformerEncoderLayer(
            8, 2, 16, batch_first=True, dropout=0.1, norm_first=True
        )
        self.o = nn.Linear(8, 2)

    def forward(self, x):
        return self.o(self.a(x))


@case(
    (2, 5, 4),
    "a[0](6) h(5)",
)
class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.LSTM(4, 6, batch_first=True)
        self.h = nn.Linear(6, 5)
        self.o = nn.Linear(5, 2)

    def forward(self, x):
        return self.o(self.h(self.a(x)[0][:, -1]).tanh())


@case(
    (2, 5, 4),
    "i(6) c[0](5)",
)
class GruCell(nn.Module):
    def __init__(self):
        super().__init__()
        self.i = nn.Linear(4, 6)
        self.c = nn.GRUCell(6, 5)
        self.o = nn.Linear(5, 2)

    def forward(self, x):
        h = torch.zeros(x.size(0), 5, dtype=x.dtype, device=x.device)
        for t in range(x.size(1)):
            h = self.c(self.i(x[:, t]), h)
        return self.o(h)


@case((2, 5, 4), "i(6)")
class RnnByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.i = nn.Linear(4, 6)
        self.r = nn.Linear(6, 6, bias=False)
        self.o = nn.Linear(6, 2)

    def forward(self, x):
        h = x.new_zeros(x.size(0), 6)
        for t in range(x.size(1)):
            h = torch.tanh(self.i(x[:, t]) + self.r(h))
        return self.o(h)


@case((2, 6), "a[0](4)")
class GluF(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.o = nn.Linear(4, 2)

    def forward(self, x):
        return self.o(F.glu(self.a(x)))


@case((2, 6), "g(8)")
class Swiglu(nn.Module):
    def __init__(self):
        super().__init__()
        self.g = nn.Linear(6, 8, bias=False)
        self.u = nn.Linear(6, 8, bias=False)
        self.o = nn.Linear(8, 2, bias=False)

    def forward(self, x):
        return self.o(F.silu(self.g(x)) * self.u(x))


@case((2, 6), "gu[0](8)")
class SwigluPacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.gu = nn.Linear(6, 16)
        self.o = nn.Linear(8, 2)

    def forward(self, x):
        g, u = self.gu(x).chunk(2, -1)
        return self.o(F.silu(g) * u)


@case((2, 6), "a[0](4)", fixed={"a[1]": "mixes its units"})
class Maxout(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 12)
        self.o = nn.Linear(4, 2)

    def forward(self, x):
        return self.o(self.a(x).view(-1, 4, 3).max(-1).values)


@case((2, 6), "a[1](4)", fixed={"a[0]": "mixes its units"})
class MaxoutFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 12)
        self.o = nn.Linear(4, 2)

    def forward(self, x):
        return self.o(self.a(x).view(-1, 3, 4).amax(1))


@case((2, 6), "a(4) b(5) m(3)")
class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 4)
        self.b = nn.Linear(6, 5)
        self.m = nn.Bilinear(4, 5, 3)
        self.o = nn.Linear(3, 2)

    def forward(self, x):
        return self.o(self.m(self.a(x).tanh(), self.b(x).tanh()))


@case((2, 6), "a(4) b(5)")
class OuterProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 4)
        self.b = nn.Linear(6, 5)
        self.o = nn.Linear(20, 2)

    def forward(self, x):
        return self.o((self.a(x)[:, :, None] * self.b(x)[:, None, :]).flatten(1))


@case((2, 6), "e.0.0(5) e.0.2(4) e.1.0(5) e.2.0(5)", fixed={"g": "is a size computed by the model"})
class MoeDense(nn.Module):
    def __init__(self):
        super().__init__()
        self.g = nn.Linear(6, 3)
        self.e = nn.ModuleList(
            [nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)) for _ in range(3)]
        )
        self.o = nn.Linear(4, 2)

    def forward(self, x):
        g = self.g(x).softmax(-1)
        y = torch.stack([e(x) for e in self.e], 1)
        return self.o((g[:, :, None] * y).sum(1))


@case((2, 6), "w1(5) w2(4)", fixed={"g": "mixes its units"})
class MoeBatched(nn.Module):
    def __init__(self):
        super().__init__()
        self.g = nn.Linear(6, 3)
        self.w1 = nn.Parameter(torch.randn(3, 6, 5))
        self.w2 = nn.Parameter(torch.randn(3, 5, 4))
        self.o = nn.Linear(4, 2)

    def forward(self, x):
        g = self.g(x).softmax(-1)
        h = torch.einsum("bi,eih->beh", x, self.w1).tanh()
        y = torch.einsum("beh,eho->beo", h, self.w2)
        return self.o(torch.einsum("be,beo->bo", g, y))


@case((2, 3, 8, 8), "a(4) b(6)")
class WeightNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
        self.b = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3))
        self.o = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.o(self.b(self.a(x).tanh()).tanh())


@case(
    (2, 3, 8, 8),
    "m(5)",
    fixed={
        "a": "is fixed by _SpectralNorm, which keeps '_u' of the whole weight",
        "a.parametrizations.weight.original": "is fixed by _SpectralNorm",
    },
)
class SpectralNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
        self.m = nn.Conv2d(4, 5, 1)
        self.o = nn.Conv2d(5, 2, 1)

    def forward(self, x):
        return self.o(self.m(self.a(x).tanh()).tanh())


@case((2, 3, 8, 8), "a[0](4)", fixed={"a[1]": "no copies of each as often as of any other"})
class Groupnorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.n = nn.GroupNorm(4, 8)
        self.o = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.o(self.n(self.a(x)).tanh())


@case((2, 3, 8, 8), "a(8)")
class Instancenorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.n = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
        self.o = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.o(self.n(self.a(x)).tanh())


@case((2, 3, 8, 8), "a(8)")
class InstancenormF(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.o = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.o(F.instance_norm(self.a(x)).tanh())


@case((2, 3, 8, 8), "a(8)")
class Lrn(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.n = nn.LocalResponseNorm(3)
        self.o = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.o(self.n(self.a(x)).tanh())


# New units have to be zero, and there a ReLU passes on no gradient.
@case((2, 3, 8, 8), "", fixed={"a": "would get no gradient for ever"})
class LrnRelu(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.n = nn.LocalResponseNorm(5)
        self.o = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.o(F.max_pool2d(self.n(self.a(x).relu()), 2))


@case((2, 3, 8, 8), "b(4)", fixed={"a": "stand between others, not at an end"})
class LrnConcat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 3, 3)
        self.b = nn.Conv2d(3, 4, 3)
        self.o = nn.Conv2d(7, 2, 1)

    def forward(self, x):
        return self.o(F.local_response_norm(torch.cat([self.a(x), self.b(x)], 1), 3, alpha=0.5))


# The first new unit would be a mean of old ones, and is read.
@case((2, 3, 9), "", fixed={"a": "through weights that are not zero"})
class AverageOverUnits(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv1d(3, 8, 3)
        self.o = nn.Conv1d(8, 2, 1)

    def forward(self, x):
        x = self.a(x).sigmoid() - 0.5
        return self.o(F.avg_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2))


@case(
    (2, 3, 9),
    "",
    fixed={
        "a": "is space that 'avg_pool2d' goes over",
        "o.weight.1": "is space that 'avg_pool2d' goes over",
    },
)
class AverageOverUnitsThatAreThere(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv1d(3, 8, 3)
        self.o = nn.Conv1d(8, 2, 1)

    def forward(self, x):
        x = self.a(x).tanh().transpose(1, 2)
        return self.o(F.avg_pool1d(x, 3, 1, 1, count_include_pad=False).transpose(1, 2))


@case((2, 3, 8, 8), "", fixed={"a": "is space that 'max_pool3d_with_indices' goes over"})
class MaxOverUnits(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.o = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.a(x).exp()
        return self.o(x / F.max_pool3d(x[:, None], (3, 1, 1), 1, (1, 0, 0))[:, 0])


@case((2, 3), "g(6)")
class WeightNormByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.g = nn.Parameter(torch.randn(6, 1))
        self.v = nn.Parameter(torch.randn(6, 3))
        self.w = nn.Parameter(torch.randn(2, 6))

    def forward(self, x):
        x = F.linear(x, self.v * (self.g / self.v.norm(dim=1, keepdim=True)))
        return F.linear(x.tanh(), F.normalize(self.w, dim=1))


@case((2, 3), "w(6)")
class HalvedWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 3))
        self.v = nn.Parameter(torch.randn(2, 6))

    def forward(self, x):
        return F.linear(F.linear(x, self.w / 2).tanh(), self.v / 2)


@case((2, 6), "a(8) e(4)")
class RmsnormStream(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Linear(6, 4)
        self.n = nn.RMSNorm(4)
        self.a = nn.Linear(4, 8)
        self.b = nn.Linear(8, 4)
        self.f = nn.RMSNorm(4)
        self.o = nn.Linear(4, 2)

    def forward(self, x):
        x = self.e(x)
        x = x + self.b(self.a(self.n(x)).tanh())
        return self.o(self.f(x))


@case((2, 6), "e(4)")
class RmsnormHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Linear(6, 4)
        self.g = nn.Parameter(torch.ones(4))
        self.o = nn.Linear(4, 2)

    def forward(self, x):
        x = self.e(x)
        return self.o(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.g)


@case((2, 6), "e(4)")
class RmsnormPlusOne(RmsnormHand):
    """No weight of the norm itself can be rescaled: what reads it is."""

    def forward(self, x):
        x = self.e(x)
        return self.o(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * (1 + self.g))


@case((2, 6), "e(4)")
class LayernormHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Linear(6, 4)
        self.g, self.b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
        self.o = nn.Linear(4, 2)

    def forward(self, x):
        x = self.e(x)
        mean = x.mean(-1, keepdim=True)
        spread = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.o((x - mean) / torch.sqrt(spread + 1e-3) * self.g + self.b)


@case((2, 6), "", fixed={"e": "the model's output would be multiplied by"})
class MeanReturned(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Linear(6, 4)

    def forward(self, x):
        return self.e(x).relu().mean(-1)


@case((2, 6), "e(4)")
class MeanRead(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Linear(6, 4)
        self.o = nn.Linear(1, 2)

    def forward(self, x):
        return self.o(self.e(x).tanh().mean(-1, keepdim=True))


@case((2, 6), "", fixed={"e": "does not pass on the factor"})
class MeanSquashed(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Linear(6, 4)
        self.o = nn.Linear(1, 2)

    def forward(self, x):
        return self.o(self.e(x).tanh().mean(-1, keepdim=True).sigmoid())


@case((2, 6), "a(8) e(4)")
class LayernormStream(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Linear(6, 4)
        self.n = nn.LayerNorm(4)
        self.a = nn.Linear(4, 8)
        self.b = nn.Linear(8, 4)
        self.f = nn.LayerNorm(4)
        self.o = nn.Linear(4, 2)

    def forward(self, x):
        x = self.e(x)
        x = x + self.b(self.a(self.n(x)).tanh())
        return self.o(self.f(x))


@case((2, 6), "e(4)")
class L2norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Linear(6, 4)
        self.o = nn.Linear(4, 2)

    def forward(self, x):
        return self.o(F.normalize(self.e(x), dim=-1))


@case((2, 6), "", fixed={"a": "sums over its units with no weight that could be zero"})
class Cosine(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 4)
        self.b = nn.Linear(6, 4)

    def forward(self, x):
        return F.cosine_similarity(self.a(x), self.b(x))


@case((2, 3, 8, 8), "a(4) d(6) u(5)")
class Unet(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.d = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.u = nn.ConvTranspose2d(6, 5, 2, 2)
        self.o = nn.Conv2d(9, 2, 1)

    def forward(self, x):
        a = self.a(x).tanh()
        return self.o(torch.cat([a, self.u(self.d(a).tanh())], 1))


@case((2, 3, 8, 8), "a(4) d(6)")
class UpsampleCat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.d = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.o = nn.Conv2d(10, 2, 1)

    def forward(self, x):
        a = self.a(x).tanh()
        return self.o(
            torch.cat([F.interpolate(self.d(a), size=a.shape[2:], mode="bilinear"), a], 1)
        )


@case((2, 3, 8, 8), "a[0](5) a[1](3)")
class SliceChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.o = nn.Conv2d(5, 2, 1)
        self.p = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        a = self.a(x)
        return self.o(a[:, :5].tanh()) + self.p(a[:, 5:].tanh())


@case((2, 3, 8, 8), "", fixed={"a": "is sliced with a step"})
class StrideSlice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.o = nn.Conv2d(4, 2, 1)
        self.p = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        a = self.a(x)
        return self.o(a[:, ::2].tanh()) + self.p(a[:, 1::2].tanh())


@case((2, 3, 8, 8), "a[0](2) a[1](6) c(2)")
class PartialConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.c = nn.Conv2d(2, 2, 3, padding=1)
        self.o = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        a = self.a(x)
        x1, x2 = torch.split(a, [2, 6], 1)
        return self.o(torch.cat([self.c(x1), x2], 1).tanh())


@case((2, 3, 8, 8), "a(4)", fixed={"b[0]": "is padding", "b[2]": "is padding"})
class ZeroPadShortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 6, 3, padding=1, stride=2)
        self.o = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.a(x).tanh()
        y = self.b(x)
        x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))
        return self.o((x + y).tanh())


@case((2, 3, 8, 8), "a(4) r(8)")
class PatchMerge(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.r = nn.Linear(16, 8)
        self.o = nn.Linear(8, 2)

    def forward(self, x):
        x = self.a(x).permute(0, 2, 3, 1)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.o(self.r(x).tanh())


@case((2, 3, 8, 8), "a(4)")
class SpaceToDepth(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.o = nn.Conv2d(16, 2, 1)

    def forward(self, x):
        return self.o(F.pixel_unshuffle(self.a(x), 2))


@case((2, 3, 8, 8), "a(4)")
class UnfoldConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.o = nn.Linear(36, 2)

    def forward(self, x):
        return self.o(F.unfold(self.a(x), 3).transpose(1, 2))


@case((2, 3, 8, 8), "f.0(2)", fixed={"a": "mixes its units"})
class Cbam(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.f = nn.Sequential(nn.Conv2d(8, 2, 1), nn.Tanh(), nn.Conv2d(2, 8, 1))
        self.s = nn.Conv2d(2, 1, 3, padding=1)
        self.o = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.a(x)
        x = x * torch.sigmoid(
            self.f(F.adaptive_avg_pool2d(x, 1)) + self.f(F.adaptive_max_pool2d(x, 1))
        )
        m = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return self.o(x * torch.sigmoid(self.s(m)))


@case((2, 3, 8, 8), "a(8)")
class Eca(nn.Module):
    """A filter slides over the units: new ones at their end are zero, like its padding."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.c = nn.Conv1d(1, 1, 3, padding=1)
        self.o = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.a(x)
        y = x.mean((2, 3), keepdim=True)
        y = self.c(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return self.o(x * y.sigmoid())


@case((2, 3, 8, 8), "a(8)")
class LayerscaleBn(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.g = nn.Parameter(torch.ones(8) * 0.1)
        self.b = nn.Conv2d(8, 8, 1)
        self.o = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.a(x)
        return self.o(x + self.g[:, None, None] * self.b(x))


@case((2, 3, 8, 8), "", fixed={"a": "mixes its units"})
class ChannelAttentionSoftmax(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.k = nn.Linear(8, 8)
        self.o = nn.Linear(8, 2)

    def forward(self, x):
        v = self.a(x).mean((2, 3))
        return self.o(v * self.k(v).softmax(1))


@case((2, 3, 8, 8), "a(4) z(3)", fixed={"f[0]": "mixes its units"})
class SkNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.b = nn.Conv2d(3, 4, 3, padding=1)
        self.z = nn.Linear(4, 3)
        self.f = nn.Linear(3, 8)
        self.o = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        u = torch.stack([self.a(x), self.b(x)], 1)
        w = self.f(self.z(u.sum(1).mean((2, 3))).tanh()).view(-1, 2, 4).softmax(1)
        return self.o((u * w[..., None, None]).sum(1))


@case((2, 3, 8, 8), "t(4) g(5)")
class NonlocalBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.t = nn.Conv2d(3, 4, 1)
        self.p = nn.Conv2d(3, 4, 1)
        self.g = nn.Conv2d(3, 5, 1)
        self.o = nn.Conv2d(5, 3, 1)

    def forward(self, x):
        B, _, H, W = x.shape
        t = self.t(x).flatten(2).transpose(1, 2)
        p = self.p(x).flatten(2)
        g = self.g(x).flatten(2).transpose(1, 2)
        y = ((t @ p).softmax(-1) @ g).transpose(1, 2).reshape(B, -1, H, W)
        return x + self.o(y)


@case((2, 4), "e(6) h(8)", fixed={"e.weight": "is indexed by a tensor"}, words=7)
class TiedLm(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(7, 6)
        self.h = nn.Linear(6, 8)
        self.p = nn.Linear(8, 6)
        self.o = nn.Linear(6, 7, bias=False)
        self.o.weight = self.e.weight

    def forward(self, x):
        return self.o(self.p(self.h(self.e(x)).tanh()))


@case(
    (2, 4),
    "e(6)",
    fixed={"e.weight.0": "is indexed by a tensor", "q.weight.0": "is indexed by a tensor"},
    words=7,
)
class PosEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(7, 6)
        self.q = nn.Embedding(4, 6)
        self.o = nn.Linear(6, 3)

    def forward(self, x):
        return self.o((self.e(x) + self.q(torch.arange(x.shape[1], device=x.device))).tanh())


@case(
    (2, 4),
    "e(6)",
    fixed={"e.weight.0": "is indexed by a tensor"},
    words=7,
)
class EmbeddingBag(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.EmbeddingBag(7, 6)
        self.o = nn.Linear(6, 3)

    def forward(self, x):
        return self.o(self.e(x).tanh())


@case((2, 3, 8, 8), "p(6) h(4)", fixed={"q.1[0]": "is picked from by position"})
class ClsToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Conv2d(3, 6, 4, 4)
        self.c = nn.Parameter(torch.randn(1, 1, 6))
        self.q = nn.Parameter(torch.randn(1, 5, 6))
        self.h = nn.Linear(6, 4)
        self.o = nn.Linear(4, 2)

    def forward(self, x):
        x = self.p(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.c.expand(x.shape[0], -1, -1), x], 1) + self.q
        return self.o(self.h(x)[:, 0].tanh())


@case(
    (2, 3, 8, 8),
    "p(6) t1(5) h(8)",
    fixed={"t2[0]": "is a size computed by the model", "t2[1]": "is a size computed by the model"},
)
class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Conv2d(3, 6, 4, 4)
        self.t1 = nn.Linear(4, 5)
        self.t2 = nn.Linear(5, 4)
        self.h = nn.Linear(6, 8)
        self.g = nn.Linear(8, 6)
        self.o = nn.Linear(6, 2)

    def forward(self, x):
        x = self.p(x).flatten(2)
        x = x + self.t2(self.t1(x).tanh())
        x = x.transpose(1, 2)
        x = x + self.g(self.h(x).tanh())
        return self.o(x.mean(1))


@case((2, 3, 8, 8), "a[0](2) a[1](4)")
class TwiceView(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.o = nn.Linear(8 * 64, 2)

    def forward(self, x):
        x = self.a(x)
        return self.o(x.view(x.shape[0], 2, 4, -1).reshape(x.shape[0], -1))


@case((2, 3, 8, 8), "a(8)")
class InplaceOps(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.b = nn.Conv2d(3, 8, 1)
        self.o = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        y = self.a(x)
        y += self.b(x)
        y.mul_(2).add_(1)
        y.tanh_()
        return self.o(y)


@case((2, 3, 8, 8), "a(4) b(4)")
class Setitem(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.b = nn.Conv2d(3, 4, 1)
        self.o = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        y = x.new_zeros(x.shape[0], 8, x.shape[2], x.shape[3])
        y[:, :4] = self.a(x)
        y[:, 4:] = self.b(x)
        return self.o(y)


@case((2, 3, 8, 8), "a(8)")
class DictOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.o = nn.Conv2d(8, 2, 1)
        self.p = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        y = self.a(x).tanh()
        return {"m": self.o(y), "aux": self.p(y)}


@case((2, 3, 8, 8), "")
class ReturnsHidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.o = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        y = self.a(x)
        return self.o(y.tanh()), y


@case((2, 6), "a(8)")
class StochasticDepth(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.b = nn.Linear(8, 8)
        self.o = nn.Linear(8, 2)

    def forward(self, x):
        x = self.a(x)
        y = self.b(x).tanh()
        if self.training:
            y = y * (torch.rand(x.shape[0], 1, dtype=x.dtype, device=x.device) < 0.8) / 0.8
        return self.o(x + y)


@case((2, 6), "a(8)")
class ScalarParams(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.s = nn.Parameter(torch.tensor(0.3))
        self.o = nn.Linear(8, 2)
        self.t = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.o(self.a(x).tanh() * self.s + self.t)


@case((2, 6), "a(8)")
class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.o = nn.Linear(8, 2)
        self.register_buffer("m", torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1]))

    def forward(self, x):
        return self.o(self.a(x).tanh() * self.m)


@case((2, 6), "a(1)")
class LinearWidthOne(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 1)
        self.o = nn.Linear(1, 2)

    def forward(self, x):
        return self.o(self.a(x).tanh())


@case((2, 1, 8, 8), "a(1) b(1)")
class OneChannel(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(1, 1, 3)
        self.b = nn.Conv2d(1, 1, 3)
        self.o = nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return self.o(self.b(self.a(x).tanh()).tanh())


@case((2, 6), "a[0](2) a[1](6)")
class BatchFirstView(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 12)
        self.o = nn.Linear(12, 2)

    def forward(self, x):
        h = self.a(x)
        h = h.view(-1, 2, 6).transpose(1, 2).reshape(-1, 12)
        return self.o(h.tanh())


@case((2, 6), "a(4)")
class CatSameTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 4)
        self.o = nn.Linear(8, 2)

    def forward(self, x):
        h = self.a(x)
        return self.o(torch.cat([h, -h], 1).tanh())


@case((2, 6), "a(4)")
class CatBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 4)
        self.b = nn.Linear(6, 4)
        self.o = nn.Linear(4, 2)

    def forward(self, x):
        h = torch.cat([self.a(x), self.b(x)], 0).tanh()
        p, q = h.chunk(2, 0)
        return self.o(p) + self.o(q)


@case((2, 6), "", fixed={"a": "mixes its units"})
class Topk(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.o = nn.Linear(3, 2)

    def forward(self, x):
        return self.o(self.a(x).topk(3, 1).values)


@case((2, 6), "a(8)")
class WhereOp(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.b = nn.Linear(6, 8)
        self.o = nn.Linear(8, 2)

    def forward(self, x):
        p, q = self.a(x), self.b(x)
        return self.o(torch.where(p > 0, p, q))


@case((2, 6), "h(5)", fixed={"a": "goes into 'fft_r2c', which mixes its units"})
class FftMix(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.h = nn.Linear(8, 5)
        self.o = nn.Linear(5, 2)

    def forward(self, x):
        return self.o(self.h(torch.fft.fft(self.a(x)).real).tanh())


@case((2, 5, 6), "a(8)")
class Conv1dSeq(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv1d(5, 8, 3, padding="same")
        self.b = nn.Conv1d(8, 8, 3, groups=8, padding=1, padding_mode="reflect")
        self.o = nn.Conv1d(8, 2, 1)

    def forward(self, x):
        return self.o(F.gelu(self.b(self.a(x))))


@case((2, 3, 4, 4, 4), "a(4)")
class Conv3d(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv3d(3, 4, 3, padding=1)
        self.n = nn.BatchNorm3d(4)
        self.o = nn.Conv3d(4, 2, 1)

    def forward(self, x):
        return self.o(F.max_pool3d(self.n(self.a(x)).tanh(), 2))


@case((2, 6, 3), "a(4)")
class Bn1d3d(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv1d(6, 4, 1)
        self.n = nn.BatchNorm1d(4, affine=False, track_running_stats=False)
        self.o = nn.Conv1d(4, 2, 1)

    def forward(self, x):
        return self.o(self.n(self.a(x)))


@case((2, 6), "h[0](4)")
class FunctionalWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.h = nn.Linear(6, 12)
        self.o = nn.Linear(4, 2)

    def forward(self, x):
        w = self.h(x).view(x.shape[0], 4, 3)
        return self.o(torch.bmm(w, x[:, :3, None]).squeeze(-1).tanh())


@case((2, 6), "g[0](8)")
class HyperScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.g = nn.Linear(6, 16)
        self.o = nn.Linear(8, 2)

    def forward(self, x):
        ga, be = self.g(x).chunk(2, 1)
        return self.o((self.a(x) * (1 + ga) + be).tanh())


@case((2, 6), "a(8)")
class PreluShared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.p = nn.PReLU()
        self.q = nn.PReLU(8)
        self.o = nn.Linear(8, 2)

    def forward(self, x):
        return self.o(self.q(self.p(self.a(x))))


@case((2, 6), "")
class DoubleUse(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.o = nn.Linear(6, 2)

    def forward(self, x):
        return self.o(self.a(self.a(x).tanh()).tanh())


@case((2, 6), "", fixed={"w": "3 of the new units would get no gradient for ever"})
class WeightSharedTranspose(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 6))
        self.o = nn.Linear(6, 2)

    def forward(self, x):
        return self.o(F.linear(F.linear(x, self.w).tanh(), self.w.t()))


@case((2, 3, 8, 8), "q[0](4)")
class RopeLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(3, 8)
        self.o = nn.Linear(8, 2)
        self.register_buffer("cos", torch.randn(64, 8))
        self.register_buffer("sin", torch.randn(64, 8))

    def forward(self, x):
        x = self.q(x.flatten(2).transpose(1, 2))
        a, b = x.chunk(2, -1)
        r = torch.cat([-b, a], -1)
        return self.o(x * self.cos + r * self.sin)


@case((2, 5, 6), "i(4) B(3)")
class SsmScan(nn.Module):
    def __init__(self):
        super().__init__()
        self.i = nn.Linear(6, 4)
        self.A = nn.Parameter(-torch.rand(4, 3))
        self.B = nn.Linear(4, 3)
        self.C = nn.Linear(4, 3)
        self.o = nn.Linear(4, 2)

    def forward(self, x):
        u = self.i(x)
        B = self.B(u)
        C = self.C(u)
        h = x.new_zeros(x.shape[0], 4, 3)
        ys = []
        for t in range(x.shape[1]):
            h = h * torch.exp(self.A) + u[:, t, :, None] * B[:, t, None, :]
            ys.append((h * C[:, t, None, :]).sum(-1))
        return self.o(torch.stack(ys, 1))


@case(
    (2, 3),
    "l(5) z.1(4)",
    fixed={"z": "'sum' sums over its units with no weight that could be zero"},
)
class Latents(nn.Module):
    def __init__(self):
        super().__init__()
        self.z = nn.Parameter(torch.randn(3, 4))
        self.l = nn.Linear(4, 5)
        self.o = nn.Linear(5, 2)

    def forward(self, x):
        return self.o(self.l(self.z).sum(0) + x.sum(1, keepdim=True))


@case(
    (2, 5, 8),
    "q[0](2) q[1](4) z.2(8) kv[3](4) o(8)",
    fixed={"z": "has width one and is flattened into another dim"},
)
class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.z = nn.Parameter(torch.randn(1, 3, 8))
        self.q = nn.Linear(8, 8)
        self.kv = nn.Linear(8, 16)
        self.o = nn.Linear(8, 8)
        self.h = nn.Linear(8, 2)

    def forward(self, x):
        B = x.shape[0]

        def h(t):
            return t.unflatten(-1, (2, 4)).transpose(1, 2)

        q = h(self.q(self.z).expand(B, -1, -1))
        k, v = map(h, self.kv(x).chunk(2, -1))
        a = torch.softmax(q @ k.mT * 4**-0.5, -1)
        return self.h(self.o((a @ v).transpose(1, 2).flatten(2)))


@case((2, 5, 3), "q(4) v(6)")
class ScaleFromSize(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(3, 4)
        self.k = nn.Linear(3, 4)
        self.v = nn.Linear(3, 6)
        self.o = nn.Linear(6, 2)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        scale = torch.full((1,), k.size(-1), dtype=x.dtype).sqrt() + q.size(-1) ** 0.5
        return self.o((q / scale @ k.transpose(1, 2)).softmax(-1) @ v)


@case((2, 3), "", fixed={"a": "mixes the width with other sizes"})
class NumberFromAllSizes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.o = nn.Linear(4, 2)

    def forward(self, x):
        h = self.a(x)
        return self.o(h / h.numel())


@case((2, 4, 3), "a(5) b(4)")
class QuadraticForm(nn.Module):
    """A bilinear layer that reads one axis twice."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 5)
        self.b = nn.Bilinear(5, 5, 4)
        self.o = nn.Linear(4, 2)

    def forward(self, x):
        x = self.a(x).tanh()
        return self.o(self.b(x, x))


def ring(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return from which row to which each edge of a graph goes; the rows are its nodes."""
    source = torch.arange(x.size(0)).repeat(2)
    return source, (source * 3 + 1) % x.size(0)


@case((5, 3), "a(6) b(4)")
class MessagePassing(nn.Module):
    """Rows get the sums of others' rows, by a list of edges, divided by how many they are."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 6)
        self.b = nn.Linear(6, 4)
        self.o = nn.Linear(4, 2)

    def summed(self, x):
        source, target = ring(x)
        messages = x.index_select(0, source)
        index = target.view(-1, 1).expand_as(messages)
        sums = x.new_zeros(x.size(0), messages.size(1)).scatter_add_(0, index, messages)
        degree = torch.zeros(x.size(0)).index_add(0, target, torch.ones(target.size(0)))
        return sums / degree.clamp(min=1)[:, None]

    def forward(self, x):
        return self.o(self.summed(self.b(self.summed(self.a(x)).tanh()).tanh()))


@case((5, 3), "v[0](2) v[1](4)")
class GraphAttention(nn.Module):
    """Heads weigh messages by a softmax over those that go to one target."""

    def __init__(self):
        super().__init__()
        self.v = nn.Linear(3, 8)
        self.into = nn.Parameter(torch.randn(1, 2, 4))
        self.by = nn.Parameter(torch.randn(1, 2, 4))
        self.o = nn.Linear(8, 2)

    def forward(self, x):
        source, target = ring(x)
        v = self.v(x).view(-1, 2, 4)
        score = (v * self.by).sum(-1)[source] + (v * self.into).sum(-1)[target]
        score = F.leaky_relu(score, 0.2)
        index = target.view(-1, 1).expand_as(score)
        none = score.new_zeros((x.size(0), score.size(1)))
        least = torch.full_like(none, -100.0)
        top = least.scatter_reduce(0, index, score.detach(), "amax")
        score = (score - top.index_select(0, target)).exp()
        score = score / none.scatter_add(0, index, score)[target]
        out = torch.zeros_like(v).index_add(0, target, v[source] * score[..., None])
        return self.read(out)

    def read(self, out):
        return self.o(out.flatten(1))


@case(
    (5, 3),
    "v[1](4)",
    fixed={"v[0]": "does not pass on the factor by which 3 units change what is averaged"},
)
class AveragedHeads(GraphAttention):
    """The heads' sums are averaged, and a bias is added: only copies of all heads keep the mean."""

    def __init__(self):
        super().__init__()
        self.o = nn.Linear(4, 2)
        self.b = nn.Parameter(torch.randn(4))

    def read(self, out):
        return self.o(out.mean(1) + self.b)


@case((5, 3), "a(6)")
class Readout(nn.Module):
    """Rows are summed by a class of theirs; how many classes there are is read off them."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 6)
        self.o = nn.Linear(6, 2)

    def forward(self, x):
        kind = (x[:, 0] > 0).long()
        h = self.a(x).relu()
        sums = h.new_zeros((int(kind.max()) + 1, h.size(1))).index_add(0, kind, h)
        return self.o(h + sums[kind])


@case((5, 3), "a(6)")
class MaskedRows(nn.Module):
    """Rows that a mask picks are written anew."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 6)
        self.o = nn.Linear(6, 2)

    def forward(self, x):
        h = self.a(x)
        h[x[:, 0] > 0] = h[0] * 2
        return self.o(h)


@case((2, 5, 3), "e(6) f(8)")
class ReadBeforeNorms(nn.Module):
    """A stream under LayerNorm that is also read as it is, and behind a ReLU, by zero columns."""

    def __init__(self):
        super().__init__()
        self.e = nn.Linear(3, 6)
        self.n = nn.LayerNorm(6)
        self.f = nn.Linear(6, 8)
        self.g = nn.Linear(8, 6)
        self.o = nn.Linear(6, 2)
        self.p = nn.Linear(6, 2)

    def forward(self, x):
        x = self.e(x)
        x = x + self.g(self.f(self.n(x)).relu())
        return self.o(x) + self.p(x.relu())


@case(
    (2, 5, 6),
    "q[0](3) q[1](2) v[1](4)",
    fixed={
        "q[2]": "is the real and the imaginary part of a number",
        "k[2]": "is the real and the imaginary part of a number",
        "turns.0": "is space that 'triu' goes over",
    },
)
class ComplexRotation(nn.Module):
    """Queries and keys are rotated as complex numbers; a new pair of features turns anyhow."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(6, 12)
        self.k = nn.Linear(6, 12)
        self.v = nn.Linear(6, 12)
        self.o = nn.Linear(12, 2)
        angles = torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.1]))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def turned(self, x):
        pairs = torch.view_as_complex(x.unflatten(-1, (3, -1)).unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self.turns[:, None]).flatten(3).transpose(1, 2)

    def forward(self, x):
        hidden = torch.triu(x.new_full((5, 5), float("-inf")), diagonal=1)
        scores = self.turned(self.q(x)) @ self.turned(self.k(x)).mT / 2 + hidden
        v = self.v(x).unflatten(-1, (3, -1)).transpose(1, 2)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@case((2, 3, 8), "i(4) w(4)")
class FourierLayer(nn.Module):
    """Low frequencies are mixed by complex weights, and come back beside a skip."""

    def __init__(self):
        super().__init__()
        self.i = nn.Conv1d(3, 4, 1)
        self.w = nn.Parameter(torch.randn(4, 4, 3, dtype=torch.complex128))
        self.s = nn.Conv1d(4, 4, 1)
        self.o = nn.Conv1d(4, 2, 1)

    def forward(self, x):
        x = self.i(x)
        low = torch.fft.rfft(x)[..., :3]
        y = torch.fft.irfft(torch.einsum("bim,iom->bom", low, self.w), n=8)
        return self.o((y + self.s(x)).tanh())


@case((2, 3, 4, 4), "i(5)", fixed={"f.3": "is the real and the imaginary part of a number"})
class GlobalFilter(nn.Module):
    """Each channel's frequencies are scaled by complex numbers, kept as pairs of real ones."""

    def __init__(self):
        super().__init__()
        self.i = nn.Conv2d(3, 5, 1)
        self.f = nn.Parameter(torch.randn(5, 4, 3, 2))
        self.o = nn.Conv2d(5, 2, 1)

    def forward(self, x):
        x = self.i(x)
        y = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(self.f)
        return self.o(torch.fft.irfft2(y, s=(4, 4), norm="ortho") + x)


@case((2, 3, 4, 4), "i(5)")
class FoldedPatches(nn.Module):
    """Patches are taken apart, changed and laid together again."""

    def __init__(self):
        super().__init__()
        self.i = nn.Conv2d(3, 5, 1)
        self.u = nn.Unfold(2, stride=2)
        self.f = nn.Fold((4, 4), 2, stride=2)
        self.o = nn.Conv2d(5, 2, 1)

    def forward(self, x):
        x = self.i(x)
        return self.o(self.f(self.u(x).tanh()) + x)


@case((2, 4), "", fixed={"e.weight.0": "is indexed", "e": "the largest of some rows"}, words=7)
class LargestOfWords(EmbeddingBag):
    def __init__(self):
        super().__init__()
        self.e.mode = "max"


@case((2, 4, 4, 3), "r(5)", fixed={"e": "no copies of each as often as of any other"})
class MergedPatches(nn.Module):
    """A norm goes over four neighbours at once, as in Swin: only copies of all units keep it."""

    def __init__(self):
        super().__init__()
        self.e = nn.Linear(3, 6)
        self.n = nn.LayerNorm(24)
        self.r = nn.Linear(24, 5)
        self.o = nn.Linear(5, 2)

    def forward(self, x):
        x = self.e(x)
        corners = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return self.o(self.r(self.n(torch.cat(corners, -1))).relu())


@case(
    (2, 5, 6),
    "q[1](3)",
    fixed={"q[0]": "no copies of each as often as of any other", "v[1]": "no copies of each as"},
)
class NormedHeads(nn.Module):
    """A norm goes over all features of all heads, which are copied, heads or features, together."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(6, 6)
        self.k = nn.Linear(6, 6)
        self.v = nn.Linear(6, 8)
        self.n = nn.LayerNorm(8)
        self.o = nn.Linear(8, 2)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        heads = (q @ k.mT).softmax(-1) @ v
        return self.o(self.n(heads.transpose(1, 2).flatten(2)))


@case((2, 3, 6, 6), "a(4) b(5)")
class PaddingByName(nn.Module):
    """Padding by name is one number for all dims to the operator."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding="valid")
        self.b = nn.Conv2d(4, 5, 3, padding="same")
        self.o = nn.Conv2d(5, 2, 1)

    def forward(self, x):
        return self.o(self.b(self.a(x).relu()).relu())


@case(
    (2, 3),
    "",
    fixed={
        "a": "is normalised together with other axes",
        "b": "is normalised together with other axes",
    },
)
class NormedConcat(nn.Module):
    """A norm goes over two layers' units: copies of one would outweigh the other."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.b = nn.Linear(3, 5)
        self.n = nn.LayerNorm(9)
        self.o = nn.Linear(9, 2)

    def forward(self, x):
        return self.o(self.n(torch.cat([self.a(x), self.b(x)], -1)))
