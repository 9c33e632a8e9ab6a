"""The packed forward of the encoder, of one layer, and of the embeddings.

Plain functions over tensors and the stock modules' parts; which calls come here, and which go to the stock forward, is
decided in `swapped.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.ops.embedding import like_input
from fastbert.ops.layers import layers as layers_op
from fastbert.packing import PackedBatch


class LayerNames(NamedTuple):
    """Where a family keeps the parts of a layer, as paths below it."""

    query: str
    key: str
    value: str
    attention_dropout: str
    attention_out: str
    attention_out_dropout: str | None
    attention_norm: str
    up: str
    activation: str
    down: str
    down_dropout: str
    norm: str
    feed_forward: str  # a method


BERT = LayerNames(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_dropout="attention.self.dropout",
    attention_out="attention.output.dense",
    attention_out_dropout="attention.output.dropout",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    down="output.dense",
    down_dropout="output.dropout",
    norm="output.LayerNorm",
    feed_forward="feed_forward_chunk",
)
DISTILBERT = LayerNames(
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attention_dropout="attention.dropout",
    attention_out="attention.out_lin",
    attention_out_dropout=None,
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    activation="ffn.activation",
    down="ffn.lin2",
    down_dropout="ffn.dropout",
    norm="output_layer_norm",
    feed_forward="ffn.ff_chunk",
)

# The modules with weights, in the order in which `layer` takes them.
WEIGHTED = ("query", "key", "value", "attention_out", "attention_norm", "up", "down", "norm")


class LayerSettings(NamedTuple):
    """What a layer needs besides x and its weights. The dropout probabilities are 0 outside training."""

    heads: int
    scale: float
    eps1: float
    eps2: float
    attention_dropout: float
    hidden_dropout: float
    ffn_dropout: float
    deterministic: bool

    @property
    def dropout(self) -> bool:
        return bool(self.attention_dropout or self.hidden_dropout or self.ffn_dropout)


def layer(x: Tensor, batch: PackedBatch, weights: tuple[Tensor, ...], settings: LayerSettings) -> Tensor:
    """One post-norm transformer layer on packed tokens: x [T, H] -> [T, H].

    weights: weight and bias of each module of WEIGHTED.
    """
    y = layers_at_once(x, batch, weights, settings)
    if y is not None:
        return y
    wq, bq, wk, bk, wv, bv, wo, bo, g1, b1, w_up, b_up, w_down, b_down, g2, b2 = weights
    heads, scale, eps1, eps2, attention_dropout, hidden_dropout, ffn_dropout, deterministic = settings

    qkv = ops.linear(x, (wq, wk, wv), (bq, bk, bv))
    qkv = qkv.view(x.shape[0], 3, heads, qkv.shape[1] // (3 * heads))
    a = ops.attention(
        qkv,
        batch.cu_seqlens,
        batch.max_seqlen,
        scale,
        attention_dropout,
        batch.bias,
        deterministic=deterministic,
    )
    a = ops.linear(a, wo)
    x = ops.layernorm(a, g1, b1, x_bias=bo, residual=x, dropout_p=hidden_dropout, eps=eps1)
    f = ops.ffn(x, w_up, b_up, w_down)
    return ops.layernorm(f, g2, b2, x_bias=b_down, residual=x, dropout_p=ffn_dropout, eps=eps2)


def layers_at_once(
    x: Tensor, batch: PackedBatch, weights: tuple[Tensor, ...], settings: LayerSettings
) -> Tensor | None:
    """Layers that share their settings, in one op: x [T, H] -> [T, H]; or None if they have to run op by op.

    weights: as `layer` takes them, layer after layer.
    """
    if settings.dropout:
        return None
    heads, scale, eps1, eps2 = settings[:4]
    return layers_op(x, batch.cu_seqlens, batch.max_seqlen, heads, scale, batch.bias, weights, eps1, eps2)


def layers_in_turn(x: Tensor, batch: PackedBatch, weights: tuple[Tensor, ...], settings: LayerSettings) -> Tensor:
    """The same op by op, without a look at the modules between them."""
    count = 2 * len(WEIGHTED)
    for start in range(0, len(weights), count):
        x = layer(x, batch, weights[start : start + count], settings)
    return x


def encode(
    layers: nn.ModuleList,
    hidden_states: Tensor,
    batch: PackedBatch,
    takes_packed: Callable[[nn.Module], bool],
    stock_mask: Callable[[], Tensor | None],
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """All layers: hidden_states [B, S, H], packed once, or [T, H] -> [B, S, H].

    A layer that somebody watches (takes_packed is False) gets and gives padded tensors and the stock mask, with the
    further arguments that the stock encoder would hand it; the others exchange packed tensors.
    """
    x, packed = hidden_states, hidden_states.dim() == 2
    for module in layers:
        if takes_packed(module):
            x = module(x if packed else batch.pack(x), batch, *args, **kwargs)
            packed = True
        else:
            x = module(batch.unpack(x) if packed else x, stock_mask(), *args, **kwargs)
            packed = False
    return batch.unpack(x) if packed else x


class TokenIds(NamedTuple):
    """What embeddings look up: [B, S], or [T] of packed tokens. None stands for type 0 and for positions 0, 1, ..."""

    input_ids: Tensor
    token_type_ids: Tensor | None
    position_ids: Tensor | None


def token_ids(
    module: Any,
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    past_key_values_length: int = 0,
    batch: PackedBatch | None = None,
    *,
    plain_buffers: bool,
) -> TokenIds:
    """The ids of a call [B, S], with the positions that BERT or RoBERTa counts; of the tokens of a batch that packs.

    plain_buffers: whether the module's buffers hold nothing but positions 0, 1, ... and type 0; else they are read.
    """
    if position_ids is None:
        # RoBERTa: positions start after the padding index, which pads keep
        if hasattr(type(module), "create_position_ids_from_input_ids"):
            position_ids = module.create_position_ids_from_input_ids(
                input_ids, module.padding_idx, past_key_values_length
            )
        elif past_key_values_length or not plain_buffers:
            start = past_key_values_length
            position_ids = module.position_ids[:, start : start + input_ids.shape[1]]
    if token_type_ids is None and not plain_buffers and hasattr(module, "token_type_ids"):
        types = module.token_type_ids.expand(position_ids.shape[0], -1)
        token_type_ids = torch.gather(types, 1, position_ids)
    if batch is not None and batch.indices is not None:
        if position_ids is None:
            position_ids = torch.arange(batch.seqlen, device=input_ids.device)
        position_ids = batch.pack(like_input(position_ids, "position_ids", input_ids))
        if token_type_ids is not None:
            token_type_ids = batch.pack(like_input(token_type_ids, "token_type_ids", input_ids))
        input_ids = batch.pack(input_ids)
    return TokenIds(input_ids, token_type_ids, position_ids)


def embed(module: nn.Module, ids: TokenIds) -> Tensor:
    """The embeddings of BERT and of RoBERTa: three lookups, LayerNorm and dropout in one op.

    ids [B, S] -> [B, S, H], or [T] -> [T, H].
    """
    word, position, token_type = module.word_embeddings, module.position_embeddings, module.token_type_embeddings
    norm = module.LayerNorm
    return ops.embedding(
        ids.input_ids,
        word.weight,
        _table(position),
        _table(token_type),
        norm.weight,
        norm.bias,
        position_ids=ids.position_ids,
        token_type_ids=ids.token_type_ids,
        padding_idx=word.padding_idx,
        dropout_p=module.dropout.p if module.dropout.training else 0.0,
        eps=norm.eps,
    )


def _table(embedding: nn.Embedding) -> Tensor:
    """The weight of an embedding whose padding_idx the op does not take."""
    weight = embedding.weight
    if embedding.padding_idx is not None and weight.requires_grad and torch.is_grad_enabled():
        weight = _FrozenRow.apply(weight, embedding.padding_idx)
    return weight


class _FrozenRow(torch.autograd.Function):
    """A table [P, H] of which one row gets no gradient, as nn.Embedding does for its padding_idx."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, row: int) -> Tensor:
        ctx.row = row
        return table.view_as(table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        grad[ctx.row] = 0
        return grad, None
