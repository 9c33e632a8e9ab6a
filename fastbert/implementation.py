"""The attention implementation "fastbert": its 2-D mask, and what stock attention modules run under it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastbert import internals
from fastbert.guards import IMPLEMENTATION, captured
from fastbert.packing import PackedBatch, additive


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What a stock attention module runs under the implementation "fastbert": SDPA, with the 2-D mask expanded.

    Gives attention weights if they are asked for, which SDPA does not.
    """
    if attention_mask is None and kwargs.get("cu_seq_lens_q") is not None:
        names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        batch = PackedBatch.from_cu_seqlens(
            query.shape[0], query.shape[2], query.device, *(kwargs.get(name) for name in names)
        )
        attention_mask = batch.stock_mask(query.dtype)
    if attention_mask is not None and attention_mask.dim() == 2:
        attention_mask = attention_mask.to(torch.bool)[:, None, None, :]
        attention_mask = attention_mask.expand(-1, 1, query.shape[2], -1)
    wanted = kwargs.get("output_attentions") or captured("attentions") or captured("cross_attentions")
    if wanted or isinstance(scaling, Tensor) or internals.forward_mode():  # SDPA takes a float, and has no tangent
        return _eager(module, query, key, value, attention_mask, dropout, scaling)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
) -> tuple[Tensor, Tensor]:
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is None and getattr(module, "is_causal", False) and query.shape[2] > 1:
        ones = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        attention_mask = ones.tril(key.shape[2] - query.shape[2])[None, None]
    if attention_mask is not None:
        is_bool = attention_mask.dtype is torch.bool
        scores = scores + (additive(attention_mask, scores.dtype) if is_bool else attention_mask)
    weights = nn.functional.softmax(scores, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def attention_mask_2d(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = bidirectional_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of the implementation "fastbert": the 2-D mask itself where attention is bidirectional, else SDPA's."""
    if mask_function is bidirectional_mask_function:
        return attention_mask
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, attention_mask_2d)
