"""torch's multi-head attention, written out in operators that state each size on its own.

`F.multi_head_attention_forward` takes the width of the stream for the heads' features all together.
Here heads, features of queries and keys, features of values and the stream are sizes of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return what `F.multi_head_attention_forward` gives for the same arguments."""
    is_batched = query.dim() == 3
    if not is_batched:
        query, key, value = _batched(query, key, value)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    parts = [embed_dim_to_check] * 3
    apart = (q_proj_weight, k_proj_weight, v_proj_weight)
    weights: tuple[Any, ...] = apart if use_separate_proj_weight else (in_proj_weight,)
    q, k, v = _projected((query, key, value), weights, in_proj_bias, parts)
    extra = add_zero_attn + (bias_k is not None)
    k, v = _extended(k, bias_k), _extended(v, bias_v)
    q, k, v = (x.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for x in (q, k, v))
    k = k if static_k is None else static_k.unflatten(0, (-1, num_heads))
    v = v if static_v is None else static_v.unflatten(0, (-1, num_heads))
    if add_zero_attn:
        k, v = (torch.cat([x, torch.zeros_like(x[:, :, :1])], 2) for x in (k, v))
    hinted = is_causal and key_padding_mask is None and not need_weights
    mask = None if hinted else _mask(attn_mask, key_padding_mask, num_heads, extra, query)
    if need_weights:
        scores = (q * (embed_dim_to_check // num_heads) ** -0.5) @ k.transpose(-2, -1)
        weight = F.softmax(scores if mask is None else scores + mask, -1)
        weight = F.dropout(weight, dropout_p, training) if dropout_p > 0 else weight
        out = weight @ v
        weight = weight.mean(1) if average_attn_weights else weight
        weight = weight if is_batched else weight.squeeze(0)
    else:
        dropped = dropout_p if training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, mask, dropped, hinted)
        weight = None
    out = F.linear(out.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    return out if is_batched else out.squeeze(1), weight


def _batched(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return unbatched inputs as batches of one; those that are one tensor stay one."""
    q = query.unsqueeze(1)
    k = q if key is query else key.unsqueeze(1)
    return q, k, k if value is key else value.unsqueeze(1)


def _projected(
    inputs: tuple[Tensor, ...],
    weights: tuple[Any, ...],
    bias: Tensor | None,
    parts: list[int],
) -> tuple[Tensor, ...]:
    """Return queries, keys and values: by three weights, or by the three parts of one."""
    if len(weights) == 1 and inputs[0] is inputs[1] is inputs[2]:
        # of a view, torch would add the bias apart from the product
        return F.linear(inputs[0].contiguous(), weights[0], bias).split(parts, -1)
    if len(weights) == 1:
        weights = weights[0].split(parts, 0)
    biases = (None,) * 3 if bias is None else bias.split(parts, 0)
    products = zip(inputs, weights, biases, strict=True)
    return tuple(F.linear(x.contiguous(), w, b) for x, w, b in products)


def _extended(x: Tensor, position: Tensor | None) -> Tensor:
    """Return keys or values with a learned one behind the last position."""
    return x if position is None else torch.cat([x, position.expand(-1, x.size(1), -1)])


def _mask(
    attn_mask: Tensor | None, padding: Tensor | None, heads: int, extra: int, query: Tensor
) -> Tensor | None:
    """Return what is added to the scores `(batch, heads, targets, sources)`, both masks in one."""
    if attn_mask is not None:
        attn_mask = _padded(_added(attn_mask, query), extra)
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (-1, heads))
    if padding is None:
        return attn_mask
    padding = _padded(_added(padding, query), extra).unsqueeze(1).unsqueeze(1)
    return padding if attn_mask is None else attn_mask + padding


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask as numbers to add: minus infinity where a boolean one is true."""
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def _padded(mask: Tensor, extra: int) -> Tensor:
    """Return a mask that lets the last `extra` positions be seen."""
    return F.pad(mask, (0, extra)) if extra else mask
