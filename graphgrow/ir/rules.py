"""What is known of each ATen operator: one row each.

A row relates the layouts of an operator's inputs to those of its outputs (`relate`) and says how it
treats the units of an axis (`kind`), so that a proof can follow new units through it. An operator
without a row freezes what it touches. All pointwise operators share one row, by `torch.Tag`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphgrow.ir import movements, reductions
from graphgrow.ir.layout import ONE, fresh
from graphgrow.ir.outcome import Call, Kind, Outcome, Row, aten, computed


def made(c: Call) -> Outcome:
    """Give a uniformly filled tensor axes that may become any others."""
    return Outcome([[ONE if s == 1 else fresh(s) for s in out.shape] for out in c.outs])


def counted(c: Call) -> Outcome:
    """Give a tensor whose content depends on the position fixed axes."""
    return Outcome([[computed(s) for s in out.shape] for out in c.outs])


POINTWISE = Row(movements.broadcast, Kind.POINTWISE)
HOMOGENEOUS = Row(movements.broadcast, Kind.POINTWISE, homogeneous=True)
LIKE = Row(movements.same, Kind.MOVE, "any", True)
MOVE = {"kind": Kind.MOVE, "keeps": "any", "homogeneous": True}
POOL = Row(reductions.spatial, Kind.SEPARATE, "any", True)
REDUCE = Row(reductions.reduce, Kind.SEPARATE, "any", True)
MIX = Row(reductions.along, Kind.SEPARATE)
FILL = Row(made, Kind.FILL)
RANDOM = Row(made, Kind.RANDOM)
DRAWN = Row(movements.broadcast, Kind.RANDOM)
COUNT = Row(counted, Kind.FILL)
NORM = Row(reductions.batch_norm, Kind.NORM)


def _table(*groups: tuple[Row, str]) -> dict[Any, Row]:
    return {
        getattr(aten, name): row
        for row, names in groups
        for name in names.split()
        if hasattr(aten, name)
    }


ROWS: dict[Any, Row] = _table(
    # units move, nothing is computed
    (Row(movements.view, **MOVE), "view _unsafe_view reshape _reshape_alias unflatten"),
    (Row(movements.transpose, **MOVE), "t transpose t_ transpose_"),
    (Row(movements.permute, **MOVE), "permute"),
    (Row(movements.unsqueeze, **MOVE), "unsqueeze unsqueeze_"),
    (Row(movements.squeeze, **MOVE), "squeeze squeeze_"),
    (Row(movements.expand, **MOVE), "expand"),
    (Row(movements.repeat, **MOVE), "repeat"),
    (Row(movements.cat, **MOVE), "cat"),
    (Row(movements.stack, **MOVE), "stack"),
    (Row(movements.split, **MOVE), "split split_with_sizes chunk"),
    (Row(movements.split, **MOVE), "unsafe_split unsafe_split_with_sizes unsafe_chunk"),
    (Row(movements.pick, **MOVE), "select unbind"),
    (Row(movements.slice_, **MOVE), "slice"),
    (Row(movements.reorder, **MOVE), "flip roll"),
    (Row(movements.index, **MOVE), "index _unsafe_index"),
    (Row(movements.index_select, **MOVE), "index_select"),
    (Row(movements.gather, **MOVE), "gather"),
    (Row(movements.found, Kind.SEPARATE), "nonzero bincount"),
    (Row(movements.pack, **MOVE), "_pack_padded_sequence"),
    (Row(movements.pixel_shuffle, **MOVE), "pixel_shuffle"),
    (Row(movements.pixel_unshuffle, **MOVE), "pixel_unshuffle"),
    (Row(movements.channel_shuffle, **MOVE), "channel_shuffle native_channel_shuffle"),
    (Row(movements.convert, **MOVE), "_to_copy"),
    (LIKE, "clone detach detach_ alias contiguous lift_fresh lift_fresh_copy"),
    (LIKE, "_conj _conj_physical resolve_conj resolve_neg"),
    (Row(movements.view_as_real, Kind.MOVE, "zero", True), "view_as_real"),
    (Row(movements.view_as_complex, Kind.MOVE, "zero", True), "view_as_complex"),
    (Row(movements.restride, **MOVE), "as_strided as_strided_"),
    (Row(movements.pad, Kind.MOVE, "zero", True), "constant_pad_nd"),
    (Row(movements.im2col, Kind.MOVE, "zero", True), "im2col"),
    (Row(movements.unfold, **MOVE), "unfold"),
    # each entry from the entries at its place
    (HOMOGENEOUS, "relu relu_ leaky_relu leaky_relu_ neg _neg_view abs add add_ sub sub_ copy_"),
    (
        Row(movements.broadcast, Kind.POINTWISE, odd=True),
        "tanh tanh_ sin erf atan asinh sinh tan softshrink",
    ),
    (POINTWISE, "fill_ masked_fill masked_fill_ _prelu_kernel where hardswish hardswish_"),
    (Row(movements.broadcast, Kind.SEPARATE), "log_sigmoid_forward"),
    (Row(movements.glu, Kind.SEPARATE, "zero"), "glu"),
    (Row(movements.broadcast, Kind.FILL), "zero_"),
    # each unit from the same unit
    (POOL, "_adaptive_avg_pool1d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d"),
    (POOL, "max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d"),
    (POOL, "adaptive_max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d"),
    (POOL, "upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d"),
    (POOL, "_upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_nearest_exact2d"),
    (POOL, "reflection_pad1d reflection_pad2d reflection_pad3d"),
    (POOL, "replication_pad1d replication_pad2d replication_pad3d"),
    (Row(reductions.averaged, Kind.SEPARATE, "zero", True), "avg_pool1d avg_pool2d avg_pool3d"),
    (Row(reductions.sampled, Kind.SEPARATE, "zero", True), "grid_sampler_2d grid_sampler_3d"),
    (Row(reductions.transformed, Kind.SEPARATE, "zero", True), "_fft_r2c _fft_c2r _fft_c2c"),
    (Row(reductions.cornered, Kind.SEPARATE, "zero", True), "tril triu"),
    (Row(movements.col2im, Kind.SEPARATE, "zero", True), "col2im"),
    (Row(movements.broadcast, Kind.SEPARATE), "complex polar"),
    (REDUCE, "amax amin max min"),
    (Row(reductions.reduce, Kind.SEPARATE, "zero", True), "std"),
    (Row(movements.scatter, Kind.SEPARATE), "scatter"),
    (Row(movements.scatter, Kind.SEPARATE, "zero", True), "scatter_add"),
    (Row(movements.scatter, Kind.SEPARATE, "zero"), "scatter_reduce"),
    (Row(movements.index_add, Kind.SEPARATE, "zero", True), "index_add"),
    (Row(movements.index_add, Kind.SEPARATE, "zero"), "index_reduce"),
    (Row(movements.index_add, Kind.SEPARATE, "any", True), "index_copy"),
    (Row(movements.index_put, Kind.SEPARATE), "index_put"),
    (Row(reductions.norm, Kind.SUM, "zero", True), "linalg_vector_norm norm"),
    (Row(reductions.reduce, Kind.SEPARATE, "zero"), "var prod"),
    (
        Row(reductions.reduce, Kind.SEPARATE),
        "any all argmax argmin logsumexp var_mean std_mean median",
    ),
    (Row(reductions.sum_, Kind.SUM, "zero", True), "sum"),
    (Row(reductions.sum_, Kind.SUM, "any", True), "mean"),
    (MIX, "_softmax _log_softmax _safe_softmax cumsum sort topk cumprod argsort"),
    (DRAWN, "native_dropout bernoulli bernoulli_ rand_like randn_like randint_like"),
    (DRAWN, "uniform_ normal_ rrelu_with_noise rrelu_with_noise_"),
    # norms
    (NORM, "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training"),
    (NORM, "cudnn_batch_norm miopen_batch_norm _batch_norm_with_update batch_norm_with_update"),
    (NORM, "_batch_norm_no_update"),
    (Row(reductions.layer_norm, Kind.CENTER), "native_layer_norm"),
    (Row(reductions.group_norm, Kind.CENTER), "native_group_norm"),
    # sums of products
    (Row(reductions.mm, Kind.CONTRACT), "mm bmm"),
    (Row(reductions.addmm, Kind.CONTRACT), "addmm baddbmm"),
    (Row(reductions.mv, Kind.CONTRACT), "mv dot"),
    (Row(reductions.linear, Kind.CONTRACT), "linear"),
    (Row(reductions.trilinear, Kind.CONTRACT), "_trilinear"),
    (Row(reductions.convolution, Kind.CONTRACT), "convolution _convolution"),
    (Row(reductions.attention, Kind.ATTEND), "_scaled_dot_product_flash_attention_for_cpu"),
    (Row(reductions.attention, Kind.ATTEND), "_scaled_dot_product_flash_attention"),
    (Row(reductions.attention, Kind.ATTEND), "_scaled_dot_product_efficient_attention"),
    (Row(reductions.attention, Kind.ATTEND), "_scaled_dot_product_cudnn_attention"),
    (Row(reductions.attention, Kind.ATTEND), "_scaled_dot_product_attention_math"),
    (Row(reductions.embedding, Kind.GATHER, "any", True), "embedding"),
    (Row(reductions.embedding_bag, Kind.GATHER, "zero", True), "_embedding_bag"),
    (Row(reductions.embedding_bag, Kind.GATHER, "zero", True), "_embedding_bag_forward_only"),
    # new tensors
    (FILL, "zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones"),
    (FILL, "new_full new_empty empty_strided new_empty_strided empty_permuted scalar_tensor"),
    (RANDOM, "rand randn"),
    (COUNT, "_local_scalar_dense"),
    (COUNT, "arange linspace eye tril_indices triu_indices randint randperm"),
)
for _name in ("zeros_like", "ones_like", "full_like", "empty_like"):
    ROWS[getattr(aten, _name)] = Row(movements.same, Kind.FILL)


def row_of(func: torch._ops.OpOverload) -> Row | None:
    """Return the row of an operator, None where none is known.

    An operator that writes in place has the row of the one that does not.
    """
    packet = func.overloadpacket
    if packet not in ROWS and packet.__name__.endswith("_"):
        packet = getattr(aten, packet.__name__[:-1], packet)
    if packet in ROWS:
        return ROWS[packet]
    overloads = [func, *(getattr(packet, name) for name in packet.overloads())]
    return POINTWISE if any(torch.Tag.pointwise in f.tags for f in overloads) else None


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """Return what weight norm makes of direction and length: a weight, and its norms."""
    norm = v.norm(2, [d for d in range(v.dim()) if d != dim], keepdim=True)
    return v * (g / norm), norm


# fused operators that are seen as those they consist of
TAKEN_APART: dict[torch._ops.OpOverload, Callable[..., Any]] = {
    aten._weight_norm_interface.default: _weight_norm
}
