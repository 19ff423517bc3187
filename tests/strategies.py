"""Hypothesis strategies: random networks as anyone would write them, and rewrites of their graphs.

Shapes and wiring are drawn by hypothesis, so that they shrink; numbers come from a drawn seed.
A layer, an operator or a rewrite is not done until it can be drawn here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import graphgrow as gg
from graphgrow.nn import CapNorm

# ------------------------------------------------------------------------------ ordinary PyTorch


class Residual(nn.Module):
    """A branch added to its input, or to a projection of it."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.branch(x)


class Concat(nn.Module):
    """Branches side by side in the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class Gate(nn.Module):
    """A layer whose first half is gated by its second, as in GLU."""

    def __init__(self, layer: nn.Module, cut: str) -> None:
        super().__init__()
        self.layer, self.cut = layer, cut

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        half = x.shape[1] // 2
        if self.cut == "chunk":
            value, gate = x.chunk(2, dim=1)
        elif self.cut == "split":
            value, gate = torch.split(x, half, dim=1)
        elif self.cut == "glu":
            return F.glu(x, dim=1)
        else:
            value, gate = x[:, :half], x[:, half:]
        return value * torch.sigmoid(gate)


class Shuffle(nn.Module):
    """Channel shuffle, written out as in ShuffleNet."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.size()
        x = x.view(n, self.groups, c // self.groups, h, w)
        return x.transpose(1, 2).contiguous().view(n, c, h, w)


class Squeeze(nn.Module):
    """Squeeze and excitation: every channel is scaled by what the means of all say."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, hidden, 1)
        self.up = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.up(F.silu(self.down(scale))))


class Slide(nn.Module):
    """Efficient channel attention: a filter over the means of neighbouring channels."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.filter = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.filter(x.mean((2, 3)).unsqueeze(1)).squeeze(1)
        return x * torch.sigmoid(gate)[:, :, None, None]


class Scale(nn.Module):
    """A number for each feature, as LayerScale has it."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Standardised(nn.Conv2d):
    """A convolution whose weight has mean zero and variance one in each row, as in BiT and NFNets.

    `gain` multiplies rows; without it what reads the layer must make up for the number of columns.
    """

    def __init__(self, *sizes: Any, gain: bool = False, **kwargs: Any) -> None:
        super().__init__(*sizes, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1)) if gain else None
        self.eps, self.scale = 1e-3, self.weight[0].numel() ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        gain = None if self.gain is None else (self.gain * self.scale).view(-1)
        rows = F.batch_norm(rows, None, None, gain, training=True, momentum=0.0, eps=self.eps)
        return F.conv2d(x, rows.reshape_as(self.weight), self.bias, self.stride, self.padding)


class Twice(nn.Module):
    """A module that is called two times."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.inner(x)))


class Tied(nn.Module):
    """An autoencoder whose decoder is the encoder's weight, transposed."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(features, hidden)
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.t(), self.bias)


class Siblings(nn.Module):
    """Two layers that hold one parameter."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(features, features), nn.Linear(features, features)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Lookup(nn.Module):
    """Tokens as sequences of vectors, channels first."""

    def __init__(self, words: int, features: int) -> None:
        super().__init__()
        self.table = nn.Embedding(words, features)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens).transpose(1, 2)


class Drop(nn.Module):
    """Dropout as a functional call that follows the mode."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, training=self.training)


class Attend(nn.Module):
    """Attention among the positions, channels first, added to its input or not."""

    def __init__(self, width: int, heads: int, residual: bool, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, **options)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        first = self.attention.batch_first
        rows = x.transpose(1, 2) if first else x.permute(2, 0, 1)
        rows = self.attention(rows, rows, rows, need_weights=self.residual)[0]
        made = rows.transpose(1, 2) if first else rows.permute(1, 2, 0)
        return x + made if self.residual else made


class Recur(nn.Module):
    """What a recurrent layer gives at each position, channels first."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        first = self.layer.batch_first
        rows = self.layer(x.transpose(1, 2) if first else x.permute(2, 0, 1))[0]
        return rows.transpose(1, 2) if first else rows.permute(1, 2, 0)


class Mean(nn.Module):
    """The mean over all positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(-1)


class Flatten(nn.Module):
    """Channels and positions as one vector, however that is written."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "view":
            return x.contiguous().view(x.size(0), -1)
        return torch.flatten(x, 1) if self.how == "flatten" else x.reshape(len(x), -1)


class Network(nn.Module):
    """Blocks in a row."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


# ------------------------------------------------------------------------------ what is drawn


@dataclass(frozen=True)
class Drawn:
    """A network in float64, and the means to make inputs for it."""

    model: nn.Module
    shape: tuple[int, ...]
    words: int = 0
    numbers: str = ""

    def inputs(self, batch: int = 3, seed: int = 0) -> Tensor:
        """Return a batch of inputs that depends on the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        if self.words:
            return torch.randint(self.words, (batch, *self.shape), generator=generator)
        return torch.randn(batch, *self.shape, generator=generator, dtype=torch.double)

    def trace(self) -> gg.Graph:
        """Return the graph of the model."""
        return gg.trace(self.model, self.inputs())

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(f"{self.model}\ncalled with {self.shape}, {self.numbers}")


@dataclass(frozen=True)
class _Taste:
    """Which networks are wanted: `smooth` ones have gradients everywhere, `random` ones dropout.

    `planted` ones have units that can be removed, whose weights may never get a gradient.
    """

    smooth: bool = False
    random: bool = True
    planted: bool = True
    awkward: bool = True


SMOOTH = (nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus)
KINKED = (
    lambda: nn.LeakyReLU(0.1),
    nn.ReLU,
    nn.Hardswish,
    nn.ReLU6,
    nn.ELU,
)
widths = st.integers(1, 6)
seeds = st.integers(0, 2**16)


@st.composite
def networks(draw: st.DrawFn, **taste: bool) -> Drawn:
    """Return random networks: images, sequences, vectors or tokens in, two blocks or more."""
    wanted = _Taste(**taste)
    kind = draw(st.sampled_from(["image", "image", "vector", "sequence", "tokens"]))
    first: list[nn.Module] = []
    words = 0
    if kind == "image":
        shape = (draw(st.integers(1, 3)), *draw(st.tuples(st.integers(4, 6), st.integers(4, 6))))
    elif kind == "sequence":
        shape = (draw(st.integers(1, 3)), draw(st.integers(4, 6)))
    elif kind == "vector":
        shape = (draw(widths),)
    else:
        shape, words = (draw(st.integers(4, 6)),), draw(st.integers(2, 5))
        first = [Lookup(words, draw(widths))]
    blocks = _blocks(draw, wanted, (first[0].table.embedding_dim, *shape) if first else shape, 6)
    seed = draw(seeds)
    model = fill(Network([*first, *blocks]).double(), seed)
    plants = draw(st.lists(st.sampled_from(PLANTS), max_size=4 * wanted.planted))
    plant(model, plants)
    return Drawn(model, shape, words, f"numbers from seed {seed}, planted {plants}")


PLANTS = ("nothing", "nothing", "zero column", "zero row", "equal rows", "multiple row")


def plant(model: nn.Module, what: list[str]) -> None:
    """Give the layers of a model, in turn, units that can be removed without a loss."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    with torch.no_grad():
        for layer, kind in zip(layers, what, strict=False):
            tensors = [layer.weight, *([] if layer.bias is None else [layer.bias])]
            if kind == "zero column":
                layer.weight[:, -1] = 0
            elif kind == "zero row":
                layer.weight[-1] = 0
            elif kind.endswith(("rows", "row")):
                for tensor in tensors:
                    tensor[-1] = tensor[0] * (0.5 if kind == "multiple row" else 1)


def fill(model: nn.Module, seed: int) -> nn.Module:
    """Return the model with random numbers everywhere, in norms and running statistics too."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.double)

    with torch.no_grad():
        for module in model.modules():
            for name, tensor in module.named_parameters(recurse=False):
                fan = tensor[0].numel() if tensor.dim() > 1 else 1
                tensor.copy_(drawn(tensor) * fan**-0.5 if fan > 1 else drawn(tensor) * 0.5 + 0.3)
                if isinstance(module, nn.PReLU) and name == "weight":
                    tensor.abs_()
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    values = drawn(buffer)
                    buffer.copy_(values.abs() + 0.5 if "var" in name else values)
    return model


Shape = tuple[int, ...]


def _blocks(draw: st.DrawFn, taste: _Taste, shape: Shape, most: int) -> list[nn.Module]:
    """Return up to `most` blocks and a head, each fitted to what the one before it gives."""
    made: list[nn.Module] = []
    for _ in range(draw(st.integers(1, most))):
        kinds = [k for k, (dims, _) in BLOCKS.items() if len(shape) in dims and _fits(k, taste)]
        block = BLOCKS[draw(st.sampled_from(kinds))][1](draw, taste, shape)
        made.append(block)
        shape = _after(block, shape)
    return [*made, _layer(draw, shape, draw(st.integers(1, 3)), kernel=1)]


def _fits(kind: str, taste: _Taste) -> bool:
    if kind == "awkward":
        return taste.awkward
    return taste.random or kind != "dropout"


def _after(block: nn.Module, shape: Shape) -> Shape:
    with torch.no_grad():
        return tuple(block.eval()(torch.zeros(2, *shape)).shape[1:])


def _layer(
    draw: st.DrawFn, shape: Shape, out: int, *, kernel: int = 0, same: bool = False, groups: int = 1
) -> nn.Module:
    """Return a linear or convolution layer; `same` keeps the positions."""
    bias = draw(st.booleans()) or kernel == 1
    if len(shape) == 1:
        return nn.Linear(shape[0], out, bias)
    kind = nn.Conv1d if len(shape) == 2 else nn.Conv2d
    size = kernel or draw(st.sampled_from([3, 1] if same else [3, 2, 1]))
    room = min(shape[1:])
    padding = size // 2 if same or size > room else draw(st.integers(0, size // 2))
    dilation = 1 if same or 2 * (size - 1) >= room + 2 * padding else draw(st.integers(1, 2))
    stride = 1 if same or size == 1 else draw(st.integers(1, 2))
    mode = draw(st.sampled_from(["zeros", "zeros", "circular"])) if padding < room else "zeros"
    return kind(
        shape[0], out, size, stride, padding, dilation, groups, bias, mode if padding else "zeros"
    )


def _activation(
    draw: st.DrawFn, taste: _Taste, shape: Shape, after_layer: bool = False
) -> nn.Module:
    if taste.smooth:
        return draw(st.sampled_from(SMOOTH))()
    kinds = (*SMOOTH, *KINKED, lambda: nn.PReLU(shape[0]))
    if after_layer:  # other activations need what they gave as it was
        kinds = (*kinds, lambda: nn.ReLU(inplace=True))
    return draw(st.sampled_from(kinds))()


def _norm(draw: st.DrawFn, taste: _Taste, shape: Shape) -> nn.Module:
    if draw(st.integers(0, 3)) == 3:
        return CapNorm(shape[0])
    kind = nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d
    eps = draw(st.sampled_from([1e-5, 1e-3]))
    return kind(shape[0], eps=eps, affine=draw(st.integers(0, 3)) > 0)


def _unit(
    draw: st.DrawFn, taste: _Taste, shape: Shape, out: int, same: bool = True
) -> nn.Sequential:
    """Return the usual triple of layer, norm and activation, some of them left out."""
    layer = _layer(draw, shape, out, same=same)
    parts, now = [layer], _after(layer, shape)
    if draw(st.booleans()):
        parts.append(_norm(draw, taste, now))
    if draw(st.booleans()):
        parts.append(_activation(draw, taste, now, after_layer=True))
    return nn.Sequential(*parts)


def _plain(draw: st.DrawFn, taste: _Taste, shape: Shape) -> nn.Module:
    unit = _unit(draw, taste, shape, draw(widths), same=False)
    how = draw(st.integers(0, 5))
    if how == 5:
        weight_norm(unit[0])
    elif how == 4 and len(shape) == 3:
        gain, bias = draw(st.tuples(st.booleans(), st.booleans()))
        unit[0] = Standardised(shape[0], unit[0].out_channels, 3, padding=1, gain=gain, bias=bias)
    return unit


def _branch(draw: st.DrawFn, taste: _Taste, shape: Shape, out: int) -> nn.Module:
    hidden = draw(widths)
    first = _unit(draw, taste, shape, hidden)
    return nn.Sequential(first, _unit(draw, taste, (hidden, *shape[1:]), out))


def _residual(draw: st.DrawFn, taste: _Taste, shape: Shape) -> nn.Module:
    if draw(st.booleans()):
        return Residual(_branch(draw, taste, shape, shape[0]), nn.Identity())
    out = draw(widths)
    return Residual(_branch(draw, taste, shape, out), _layer(draw, shape, out, kernel=1))


def _stream(draw: st.DrawFn, taste: _Taste, shape: Shape) -> nn.Module:
    """Return a pre-norm residual block and the norm that ends the stream."""
    branch = nn.Sequential(nn.LayerNorm(shape[0]), _branch(draw, taste, shape, shape[0]))
    if draw(st.booleans()):
        branch.append(Scale(shape[0]))
    return nn.Sequential(Residual(branch, nn.Identity()), nn.LayerNorm(shape[0], eps=1e-3))


def _concat(draw: st.DrawFn, taste: _Taste, shape: Shape) -> nn.Module:
    branches = [_unit(draw, taste, shape, draw(st.integers(1, 3))) for _ in range(2)]
    return Concat(nn.Identity(), branches[0]) if draw(st.booleans()) else Concat(*branches)


def _gate(draw: st.DrawFn, taste: _Taste, shape: Shape) -> nn.Module:
    layer = _layer(draw, shape, 2 * draw(st.integers(1, 3)), same=True)
    return Gate(layer, draw(st.sampled_from(["chunk", "split", "slice", "glu"])))


def _grouped(draw: st.DrawFn, taste: _Taste, shape: Shape) -> nn.Module:
    """Return a grouped convolution, its input made a multiple of the groups first."""
    groups, inside, out = draw(st.tuples(st.integers(2, 3), st.integers(1, 2), st.integers(1, 2)))
    first = _layer(draw, shape, groups * inside, kernel=1)
    grouped = _layer(draw, (groups * inside, *shape[1:]), groups * out, same=True, groups=groups)
    parts = [first, grouped]
    if len(shape) == 3 and draw(st.booleans()):
        parts.append(nn.ChannelShuffle(groups) if draw(st.booleans()) else Shuffle(groups))
    return nn.Sequential(*parts)


def _depthwise(draw: st.DrawFn, taste: _Taste, shape: Shape) -> nn.Module:
    out = shape[0] * draw(st.integers(1, 2))
    return nn.Sequential(
        _layer(draw, shape, out, same=True, groups=shape[0]), _activation(draw, taste, (out,))
    )


def _attention(draw: st.DrawFn, taste: _Taste, shape: Shape) -> nn.Module:
    """Return attention, the width of its input made a multiple of the heads first."""
    heads, features = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    options = {
        "bias": not taste.smooth and draw(st.booleans()),  # softmax does not see a key's bias
        "add_bias_kv": draw(st.booleans()),
        "add_zero_attn": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "dropout": draw(st.sampled_from([0.0, 0.3])) if taste.random else 0.0,
    }
    width = heads * features
    attend = Attend(width, heads, draw(st.booleans()), **options)
    return nn.Sequential(_layer(draw, shape, width, kernel=1), attend)


def _recurrent(draw: st.DrawFn, taste: _Taste, shape: Shape) -> nn.Module:
    """Return a recurrent layer of any kind that goes along the positions."""
    kind = draw(st.sampled_from([nn.RNN, nn.GRU, nn.LSTM]))
    layers = draw(st.integers(1, 2))
    options: dict[str, Any] = {
        "num_layers": layers,
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
        "dropout": draw(st.sampled_from([0.0, 0.3])) if taste.random and layers == 2 else 0.0,
    }
    if kind is nn.RNN and not taste.smooth:
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    return Recur(kind(shape[0], draw(st.integers(1, 4)), **options))


def _pool(draw: st.DrawFn, taste: _Taste, shape: Shape) -> nn.Module:
    flat = len(shape) == 2
    kinds: list[Callable[[], nn.Module]] = [
        lambda: (nn.AvgPool1d if flat else nn.AvgPool2d)(2, 1, 1),
        lambda: (nn.AdaptiveAvgPool1d if flat else nn.AdaptiveAvgPool2d)(2),
        lambda: _local(draw),
    ]
    if not taste.smooth:
        kinds.append(lambda: (nn.MaxPool1d if flat else nn.MaxPool2d)(2, 1, 1))
        kinds.append(lambda: (nn.AdaptiveMaxPool1d if flat else nn.AdaptiveMaxPool2d)(1))
    return draw(st.sampled_from(kinds))()


def _local(draw: st.DrawFn) -> nn.Module:
    """Return a norm over neighbouring channels, strong enough to show."""
    size, beta = draw(st.integers(1, 4)), draw(st.sampled_from([0.75, 0.5]))
    return nn.LocalResponseNorm(size, alpha=2.0, beta=beta, k=draw(st.sampled_from([1.0, 1.5])))


def _pixels(draw: st.DrawFn, taste: _Taste, shape: Shape) -> nn.Module:
    return nn.Sequential(
        _layer(draw, shape, 4 * draw(st.integers(1, 2)), kernel=1), nn.PixelShuffle(2)
    )


def _upward(draw: st.DrawFn, taste: _Taste, shape: Shape) -> nn.Module:
    groups = draw(st.sampled_from([1, 1, shape[0]]))
    out = groups * draw(st.integers(1, 2 if groups > 1 else 4))
    return nn.ConvTranspose2d(shape[0], out, 2, draw(st.integers(1, 2)), groups=groups)


def _dense(draw: st.DrawFn, taste: _Taste, shape: Shape) -> nn.Module:
    return nn.Sequential(Flatten(draw(st.sampled_from(["flatten", "view", "reshape"]))))


def _awkward(draw: st.DrawFn, taste: _Taste, shape: Shape) -> nn.Module:
    """Return an operator that mixes units, so that some axes are frozen."""
    return draw(
        st.sampled_from(
            [
                nn.GroupNorm(1, shape[0]),
                nn.LayerNorm(shape[-1]),
                nn.Softmax(1),
                nn.Softmax(-1),
            ]
        )
    )


ANY, SPACE = (1, 2, 3), (2, 3)
Builder = Callable[[st.DrawFn, _Taste, Shape], nn.Module]
BLOCKS: dict[str, tuple[tuple[int, ...], Builder]] = {
    "unit": (ANY, _plain),
    "residual": (ANY, _residual),
    "concat": (ANY, _concat),
    "gate": (ANY, _gate),
    "activation": (ANY, _activation),
    "norm": (ANY, _norm),
    "twice": (ANY, lambda d, t, s: Twice(_unit(d, t, s, s[0]))),
    "dropout": (ANY, lambda d, t, s: d(st.sampled_from([nn.Dropout(0.3), Drop()]))),
    "pool": (SPACE, _pool),
    "grouped": (SPACE, _grouped),
    "depthwise": (SPACE, _depthwise),
    "attention": ((2,), _attention),
    "recurrent": ((2,), _recurrent),
    "flatten": (SPACE, _dense),
    "mean": (SPACE, lambda d, t, s: Mean()),
    "squeeze": ((3,), lambda d, t, s: Squeeze(s[0], d(st.integers(1, 3)))),
    "slide": ((3,), lambda d, t, s: Slide(d(st.sampled_from([1, 3])))),
    "pixels": ((3,), _pixels),
    "upward": ((3,), _upward),
    "tied": ((1,), lambda d, t, s: Tied(s[0], d(widths))),
    "stream": ((1,), _stream),
    "siblings": ((1,), lambda d, t, s: Siblings(s[0])),
    "awkward": (ANY, _awkward),
}


# ------------------------------------------------------------------------------ rewrites

schemes = st.one_of(
    st.none(),
    st.builds(gg.ZeroOutgoing, seeds),
    st.builds(gg.ZeroIncoming, st.sampled_from([None, 0.7]), seeds),
    st.builds(gg.Pairs, seeds),
    st.builds(gg.Copy, st.none(), seeds, st.booleans()),
    st.builds(gg.MeanFill, seeds),
)


def axes(graph: gg.Graph) -> st.SearchStrategy[str]:
    """Return axes of a graph by name, mostly such as can change."""
    free = [name for name, axis in graph.axes.items() if axis.obstacle is None]
    every = st.sampled_from(list(graph.axes))
    return st.one_of(st.sampled_from(free), st.sampled_from(free), every) if free else every


@st.composite
def widenings(draw: st.DrawFn, graph: gg.Graph, weights: Any = None, axis: str = "") -> gg.Widen:
    """Return any request to widen an axis of a graph, one that has an obstacle too."""
    name = axis or draw(axes(graph))
    scheme = draw(schemes if weights is None else st.just(weights))
    at = draw(st.none() | st.integers(0, graph.axes[name].width))
    multiple = graph.axes[name].multiple
    count = multiple * draw(st.sampled_from([2, 4] if isinstance(scheme, gg.Pairs) else [1, 2, 3]))
    return gg.Widen(name, count, at, scheme)


@st.composite
def given_widenings(draw: st.DrawFn, graph: gg.Graph) -> gg.Widen:
    """Return a request to widen by given incoming weights."""
    axis = graph.axes[draw(axes(graph))]
    plain = gg.Widen(axis.name, axis.multiple)
    at = next((p for p in axis.producers if graph.state[p.path].dim() == 2 and p.dim == 0), None)
    if at is None or plain.obstacle(graph) is not None:
        return plain
    generator = torch.Generator().manual_seed(draw(seeds))
    new = gg.apply(graph, plain, verify=False).origin[at.path].dims[0]
    units = axis.multiple * int((new < 0).sum()) // axis.multiple
    numbers = torch.randn(units, graph.state[at.path].shape[1], generator=generator)
    return replace(plain, weights=gg.Given.of({at.path: numbers}))


@st.composite
def removals(draw: st.DrawFn, graph: gg.Graph) -> gg.Remove:
    """Return any request to remove units, most of them impossible without a loss."""
    axis = graph.axes[draw(axes(graph))]
    units = draw(st.sets(st.integers(0, axis.width - 1), min_size=1, max_size=2))
    return gg.Remove(axis.name, tuple(sorted(units)))


ACTIVATIONS = ("relu", "leaky_relu", "gelu", "silu", "softplus", "hardswish")


@st.composite
def deepenings(draw: st.DrawFn, graph: gg.Graph, both: bool = True, at: str = "") -> gg.Deepen:
    """Return any request to insert a layer; exact in `both` modes, else also with batch norm."""
    places = gg.Deepen.places(graph) or [""]
    path = at or draw(st.one_of(*[st.sampled_from(places)] * 4, st.sampled_from([*graph.modules])))
    scheme = draw(st.sampled_from(["none", "identity", "factor", "factor", "split", "split"]))
    if scheme == "none":
        return gg.Deepen(path)
    if scheme == "identity":
        norm = not both and draw(st.booleans())
        kernel, groups = draw(st.sampled_from([3, 1, 2])), draw(st.sampled_from([1, 1, 2]))
        return gg.Deepen(path, gg.Identity(kernel, groups, norm))
    matrix, bias = draw(factors(graph.modules[path]))
    if scheme == "factor":
        name = draw(st.sampled_from(["rational", "prelu"]))
        return gg.Deepen(path, gg.Factor(matrix, name, bias, draw(seeds)))
    return gg.Deepen(path, gg.Split(draw(st.sampled_from(ACTIVATIONS)), matrix, bias, draw(seeds)))


@st.composite
def factors(draw: st.DrawFn, module: Any) -> tuple[Any, Any]:
    """Return a matrix and a bias that mostly fit a layer, or None for either."""
    groups = getattr(module, "groups", 1)
    width = getattr(module, "in_features", getattr(module, "in_channels", groups)) // groups
    rows = width + draw(st.sampled_from([0, 0, 1]))
    generator = torch.Generator().manual_seed(draw(seeds))
    numbers = torch.randn(rows, width, generator=generator, dtype=torch.double)
    matrix = draw(st.sampled_from(["none", "random", "scaled", "wrong"]))
    if matrix == "random":
        numbers = torch.linalg.qr(numbers)[0] + 0.3 * torch.eye(rows, width, dtype=torch.double)
    elif matrix == "scaled":
        numbers = torch.diag(numbers[0].sign() * 2.0 ** torch.arange(width).remainder(3))
    elif matrix == "wrong":
        numbers = numbers[:, 1:]
    units = width if matrix == "none" else len(numbers)
    bias = tuple(0.5 - k % 2 for k in range(groups * units))
    table = None if matrix == "none" else tuple(map(tuple, numbers.tolist()))
    return table, draw(st.sampled_from([None, None, bias]))


def mean_square(output: Tensor, target: None) -> Tensor:
    """Return a loss of a drawn network, a mean over the examples."""
    return output.square().flatten(1).sum(1).mean()


@st.composite
def branched(draw: st.DrawFn) -> tuple[Any, gg.Graph, gg.Branch]:
    """Draw a network, its graph and a branch that fits."""
    net = draw(networks())
    graph = net.trace()
    rewrite = draw(branchings(graph).filter(lambda rewrite: rewrite.obstacle(graph) is None))
    return net, graph, rewrite


@st.composite
def branchings(draw: st.DrawFn, graph: gg.Graph) -> gg.Branch:
    """Draw a skip or a residual branch between two places, sometimes two that do not fit."""
    source, target = draw(st.sampled_from(gg.Branch.places(graph) or [("", "")]))
    if draw(st.integers(0, 9)) == 0:
        source = draw(st.sampled_from([pair[0] for pair in gg.Branch.places(graph)] or [""]))
    kernel = draw(st.sampled_from([1, 1, 3]))
    activation = draw(st.sampled_from(["relu", "gelu", "silu", "tanh"]))
    residual = gg.Residual(draw(st.integers(1, 3)), kernel, activation, draw(seeds))
    return gg.Branch(source, target, draw(st.sampled_from([gg.Skip(), residual])))


def cappings(graph: gg.Graph) -> st.SearchStrategy[gg.Cap]:
    """Return requests to put CapNorm for a module, mostly for a batch norm."""
    places = gg.Cap.places(graph) or [""]
    return st.builds(gg.Cap, st.sampled_from(places * 3 + list(graph.modules)))


def requests(graph: gg.Graph, both: bool = True, exact: bool = True) -> st.SearchStrategy[Any]:
    """Return requests for any rewrite of a graph, also such as have an obstacle."""
    wider = st.one_of(widenings(graph), given_widenings(graph))
    fewer = st.one_of(removals(graph), st.builds(gg.Merge, axes(graph)))
    kinds = [wider, deepenings(graph, both), fewer, branchings(graph)]
    return st.one_of(*kinds) if exact else st.one_of(*kinds, cappings(graph))


def rewrites(graph: gg.Graph, both: bool = True, exact: bool = True) -> st.SearchStrategy[Any]:
    """Return rewrites that are applicable to a graph, exact in `both` modes or in one at least.

    Without `exact`, also such as change what the graph computes.
    """

    def applicable(asked: list[Any]) -> Any:
        return next((rewrite for rewrite in asked if rewrite.obstacle(graph) is None), None)

    several = st.lists(requests(graph, both, exact), min_size=4, max_size=4)
    return several.map(applicable).filter(lambda rewrite: rewrite is not None)


@st.composite
def sequences(draw: st.DrawFn, graph: gg.Graph) -> tuple[Any, ...]:
    """Return two to four rewrites, each applicable after those before it, not all of them exact."""
    made: list[Any] = []
    for _ in range(draw(st.integers(2, 4))):
        made.append(draw(rewrites(graph, exact=False)))
        graph = gg.apply(graph, made[-1], verify=False).graph
    return tuple(made)
