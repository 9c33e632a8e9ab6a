"""Self-attention over packed sequences: softmax(scale * Q K^T + bias) V within each sequence, with dropout."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastbert import dispatch
from fastbert.ops import checks, philox


def attention_ref(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None = None,
    dropout_p: float = 0.0,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """The specification, in plain PyTorch: pads, and computes in float32 (float64 for float64).

    A query whose every key has a bias of -inf gives 0. Shapes as in `attention`.
    """
    total, _, heads, head_dim = qkv.shape
    if total == 0:
        return qkv[:, 0].flatten(1)
    if scale is None:
        scale = 1.0 / math.sqrt(head_dim)
    starts = cu_seqlens.long()
    position = torch.arange(max_seqlen, device=qkv.device)
    token = starts[:-1, None] + position  # [B, S]
    is_key = position < (starts[1:] - starts[:-1])[:, None]

    accumulate = torch.promote_types(qkv.dtype, torch.float32)
    padded = qkv[token.clamp(max=total - 1)].to(accumulate)  # [B, S, 3, h, d]
    query, key, value = padded.permute(2, 0, 3, 1, 4)
    scores = query @ key.transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias[..., :max_seqlen, :max_seqlen].to(accumulate)
    scores = scores.masked_fill(~is_key[:, None, None, :], -math.inf)
    dead = (scores == -math.inf).all(-1, keepdim=True)
    probabilities = torch.softmax(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
    if dropout_p > 0.0:
        assert seed is not None
        keep = philox.keep_attention(seed, dropout_p, token, heads, max_seqlen)
        probabilities = philox.drop(probabilities, keep, dropout_p)
    out = (probabilities @ value).transpose(1, 2)  # [B, S, h, d]

    index = torch.arange(total, device=qkv.device)
    sequence = torch.searchsorted(starts[1:], index, right=True)
    return out[sequence, index - starts[sequence]].flatten(1).to(qkv.dtype)


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None = None,
    dropout_p: float = 0.0,
    bias: Tensor | None = None,
    *,
    seed: Tensor | None = None,
    deterministic: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Self-attention within each sequence of a packed batch.

    qkv: [T, 3, heads, head_dim], the T tokens of all sequences one after another.
    cu_seqlens: int32 [B + 1], from 0 to T, not decreasing; sequence b is cu_seqlens[b] to cu_seqlens[b + 1].
    max_seqlen: at least the length of the longest sequence.
    scale: of the scores; 1 / sqrt(head_dim) by default.
    bias: added to the scaled scores, [B or 1, heads or 1, S or 1, S], S >= max_seqlen, by position within the
        sequence. -inf forbids a key; a query with no key left gives 0. Gets a gradient if it requires one.
    dropout_p: probability of dropping an attention weight. seed: int64, one element, on qkv's device; drawn from
        PyTorch's default generator if None.
    deterministic: asks for a backward that repeats bit for bit. The backends there are today always do.
    backend: forces an implementation (see `fastbert.dispatch`).

    Returns [T, heads * head_dim]. Differentiable once. Under autocast, qkv is cast as a stock module would.
    Raises ValueError or TypeError for wrong shapes, dtypes, devices or lengths.
    """
    if torch.is_autocast_enabled(qkv.device.type):
        qkv = checks.autocast(qkv)
    _check(qkv, cu_seqlens, max_seqlen, bias, dropout_p, seed)
    head_dim = qkv.size(3)
    chosen = dispatch.select("attention", device=qkv.device, dtype=qkv.dtype, requires=head_dim, backend=backend)
    if dropout_p > 0.0 and seed is None:
        seed = philox.draw_seed(qkv.device)
    if scale is None:
        scale = 1.0 / math.sqrt(head_dim)
    return chosen.run(qkv, cu_seqlens, max_seqlen, scale, dropout_p, bias, seed)


def _check(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, bias: Tensor | None, dropout_p: float, seed: Tensor | None
) -> None:
    checks.floating("attention", "qkv", qkv)
    if qkv.dim() != 4 or qkv.size(1) != 3 or qkv.size(2) == 0 or qkv.size(3) == 0:
        raise ValueError(f"attention: qkv must have shape [tokens, 3, heads, head_dim], got {list(qkv.shape)}")
    checks.tensor("attention", "cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype is not torch.int32:
        raise TypeError(f"attention: cu_seqlens must be torch.int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.size(0) == 0:
        raise ValueError(f"attention: cu_seqlens must have shape [sequences + 1], got {list(cu_seqlens.shape)}")
    if cu_seqlens.device != qkv.device:
        raise ValueError(f"attention: cu_seqlens is on {cu_seqlens.device} but qkv is on {qkv.device}; they must agree")
    if max_seqlen < 0:
        raise ValueError(f"attention: max_seqlen must not be negative, got {max_seqlen}")
    if dropout_p != 0.0:
        checks.probability("attention", "dropout_p", dropout_p)
    if seed is not None:
        checks.seed("attention", seed, qkv)
    if bias is not None:
        _check_bias(bias, qkv, cu_seqlens.size(0) - 1, max_seqlen)


def _check_bias(bias: Tensor, qkv: Tensor, batch: int, max_seqlen: int) -> None:
    checks.operand("attention", "bias", bias, qkv, "qkv", same_dtype=False)
    heads = qkv.size(2)
    if not (
        bias.dim() == 4
        and bias.size(0) in (1, batch)
        and bias.size(1) in (1, heads)
        and (bias.size(2) == 1 or bias.size(2) >= max_seqlen)
        and bias.size(3) >= max_seqlen
    ):
        raise ValueError(
            f"attention: bias must have shape [{batch} or 1, {heads} or 1, S or 1, S] with S >= max_seqlen = "
            f"{max_seqlen}, got {list(bias.shape)}"
        )


def check_lengths(cu_seqlens: Tensor, total: int, max_seqlen: int) -> None:
    """Raises ValueError unless cu_seqlens rises from 0 to `total` by at most `max_seqlen`. Reads the data."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != total:
        raise ValueError(
            f"attention: cu_seqlens must start at 0 and end at the number of tokens {total}, "
            f"got {bounds[0]} and {bounds[-1]}"
        )
    for sequence, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if end < start:
            raise ValueError(f"attention: cu_seqlens must not decrease, but sequence {sequence} has {start} to {end}")
        if end - start > max_seqlen:
            raise ValueError(
                f"attention: max_seqlen is {max_seqlen}, but sequence {sequence} of cu_seqlens has {end - start} tokens"
            )


def _run_reference(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    dropout_p: float,
    bias: Tensor | None,
    seed: Tensor | None,
) -> Tensor:
    if qkv.is_cpu and not torch.compiler.is_compiling():
        check_lengths(cu_seqlens, qkv.size(0), max_seqlen)
    return attention_ref(qkv, cu_seqlens, max_seqlen, scale, dropout_p, bias, seed)


implementations = dispatch.register(
    "attention",
    (
        dispatch.not_built("cuda"),
        dispatch.not_built("triton"),
        dispatch.Implementation("reference", _run_reference, dispatch.always),
    ),
)
