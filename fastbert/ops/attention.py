"""Self-attention over packed sequences: softmax(scale * Q K^T + bias) V within each sequence, with dropout."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import dispatch
from fastbert.ops import checks, leaf, philox


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
        nothing = qkv[:, 0].flatten(1)
        return nothing if bias is None else nothing + bias[:0].sum()  # whose gradient is 0
    if scale is None:
        scale = 1.0 / math.sqrt(head_dim)
    starts = cu_seqlens.long()
    position = torch.arange(max_seqlen, device=qkv.device)
    token = starts[:-1, None] + position  # [B, S]
    is_key = position < (starts[1:] - starts[:-1])[:, None]

    accumulate = torch.promote_types(qkv.dtype, torch.float32)
    padded = qkv[token.clamp(max=total - 1)].to(accumulate)  # [B, S, 3, h, d]
    padded = padded.masked_fill(~is_key[:, :, None, None, None], 0.0)  # or a NaN of the sequence behind would get in
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


_MOST_TOKENS = 2**31 - 1  # that cu_seqlens can tell


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
    max_seqlen: an int, at least the length of the longest sequence.
    scale: of the scores, finite; 1 / sqrt(head_dim) by default.
    bias: added to the scaled scores, [B or 1, heads or 1, S or 1, S], S >= max_seqlen, by position within the
        sequence. -inf forbids a key; a query with no key left gives 0. Gets a gradient if it requires one. With 16-bit
        inputs, triton takes lower finite scores for -65536, and cuda for -45426 (-65536 in units of log(2)), which
        matters where a query has no others.
    dropout_p: probability of dropping an attention weight. seed: int64, one element, on qkv's device; drawn from
        PyTorch's default generator if None.
    deterministic: asks for a backward that repeats bit for bit, as torch.use_deterministic_algorithms does. Without
        either, triton, and cuda on compute capability 9.0, add up the gradient of the queries of long sequences in any
        order; cpu always repeats.
    backend: forces an implementation (see `fastbert.dispatch`).

    Returns [T, heads * head_dim]. Differentiable once. Under autocast, qkv is cast as a stock module would.
    Raises ValueError or TypeError for wrong shapes, dtypes, devices, lengths or numbers.
    """
    checks.tensor("attention", "qkv", qkv)
    if scale is None and qkv.dim() == 4 and qkv.size(3) > 0:
        scale = 1.0 / math.sqrt(qkv.size(3))
    elif scale is not None:
        scale = checks.finite("attention", "scale", scale)
    dropout_p = checks.number("attention", "dropout_p", dropout_p)
    max_seqlen = checks.integer("attention", "max_seqlen", max_seqlen)
    if type(max_seqlen) is int and max_seqlen > _MOST_TOKENS:
        raise ValueError(f"attention: max_seqlen must be from 0 to {_MOST_TOKENS}, got {max_seqlen}")
    if type(deterministic) is not bool:
        raise TypeError(f"attention: deterministic must be True or False, got {deterministic!r}")
    if dropout_p == 0.0 and seed is None and bias is None and leaf.direct(_cpu, qkv, backend):
        done = _cpu.attempt(qkv, cu_seqlens, max_seqlen, scale, 0.0, None, None)
        if done is not None:
            return done[0]
    if checks.autocasting(qkv):
        qkv = checks.autocast(qkv)
    _check(qkv, cu_seqlens, max_seqlen, bias, dropout_p, seed)
    head_dim = operator.index(qkv.size(3))  # compiled code is made for one head size, which the choice depends on
    chosen = dispatch.select("attention", device=qkv.device, dtype=qkv.dtype, requires=head_dim, backend=backend)
    if dropout_p > 0.0 and seed is None:
        seed = philox.draw_seed(qkv.device)
    return chosen.run(qkv, cu_seqlens, max_seqlen, scale, dropout_p, bias, seed, deterministic)


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
        # Not `in`, of which compiled code takes another size for no size at all.
        and (bias.size(0) == 1 or bias.size(0) == batch)
        and (bias.size(1) == 1 or bias.size(1) == heads)
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
    for sequence, (start, end) in enumerate(itertools.pairwise(bounds)):
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
    deterministic: bool,
) -> Tensor:
    if qkv.is_cpu and not torch.compiler.is_compiling():
        check_lengths(cu_seqlens, qkv.size(0), max_seqlen)
    if not checks.autocasting(qkv):
        return attention_ref(qkv, cu_seqlens, max_seqlen, scale, dropout_p, bias, seed)
    with torch.autocast(qkv.device.type, enabled=False):  # it would cast what is computed in float32 on purpose
        return attention_ref(qkv, cu_seqlens, max_seqlen, scale, dropout_p, bias, seed)


_cpu = leaf.Leaf("attention", "cpu")
_cuda = leaf.Leaf("attention", "cuda")
_triton = leaf.define_triton(
    "attention",
    "(Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen, float scale, float dropout_p, Tensor? seed, Tensor? bias, "
    "bool deterministic) -> (Tensor, Tensor)",
    "(Tensor dout, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens, SymInt max_seqlen, float scale, "
    "float dropout_p, Tensor? seed, Tensor? bias, bool need_dbias, bool deterministic) -> (Tensor, Tensor)",
)
_TRITON_HEAD_DIM = 128  # the largest
_HEAD_MULTIPLE = 8  # of the kernels' head sizes: heads are padded with zeros to it, which change no result


def _run(
    kernels: leaf.Leaf,
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    dropout_p: float,
    bias: Tensor | None,
    seed: Tensor | None,
    deterministic: bool,
) -> Tensor:
    qkv, cu_seqlens = qkv.contiguous(), cu_seqlens.contiguous()
    if bias is not None:
        bias = _dense_bias(bias)
    if kernels is _triton and qkv.is_cpu and not torch.compiler.is_compiling():  # on a GPU, reading them would wait
        check_lengths(cu_seqlens, qkv.size(0), max_seqlen)
    choice = () if kernels is _cpu else (deterministic,)  # it always repeats
    heads, head_dim = qkv.shape[2:]
    spare = _padded(head_dim) - head_dim
    if spare:
        qkv = F.pad(qkv, (0, spare))
    save = leaf.needs_grad(qkv, bias)
    try:
        out = kernels.call(save, qkv, cu_seqlens, max_seqlen, scale, dropout_p, seed, bias, *choice)[0]
    except RuntimeError:
        if kernels is _cpu:  # it checks the lengths too, but can raise nothing else
            check_lengths(cu_seqlens, qkv.size(0), max_seqlen)
        raise
    return out.unflatten(1, (heads, -1))[..., :head_dim].flatten(1).contiguous() if spare else out


def _padded(head_dim: int | None) -> int:
    """The head size that the kernels see; 0 if it is not known."""
    return 0 if head_dim is None else head_dim + -head_dim % _HEAD_MULTIPLE


def _dense_bias(bias: Tensor) -> Tensor:
    """The bias as the kernels want it, float32 and contiguous.

    Dimensions that were expanded are not written out, unless a gradient of the expanded shape is wanted.
    """
    if not bias.is_contiguous() and not leaf.needs_grad(bias):
        for dim in range(3):
            if bias.stride(dim) == 0 and bias.size(dim) > 1:
                bias = bias.narrow(dim, 0, 1)
    return bias.to(torch.float32).contiguous()


def _supports_cpu(device_type: str, dtype: torch.dtype, requires: Any) -> str | None:
    return dispatch.cpu_reason(_cpu.missing, device_type, (dtype,))


def _supports_triton(device_type: str, dtype: torch.dtype, requires: Any) -> str | None:
    reason = dispatch.triton_reason(device_type, (dtype,))
    if reason is None and _padded(requires) > _TRITON_HEAD_DIM:
        return f"has kernels for head sizes up to {_TRITON_HEAD_DIM}, not {requires}"
    return reason


def _supports_cuda(device_type: str, dtype: torch.dtype, requires: Any) -> str | None:
    reason = dispatch.cuda_reason(_cuda.missing, device_type, (dtype,))
    if reason is None and dtype is torch.float32:
        return "multiplies 16-bit numbers only: fp32 attention runs on triton or the reference"
    if reason is None and _padded(requires) not in (0, 32, 64, 128):
        return f"has kernels for head sizes 32, 64 and 128, not {requires}"
    return reason


def _forward_fake(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    bias: Tensor | None,
    *deterministic: bool,
) -> tuple[Tensor, Tensor]:
    total, _, heads, head_dim = qkv.shape
    return qkv.new_empty(total, heads * head_dim), qkv.new_empty(heads, total, dtype=torch.float32)


def _backward_fake(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    bias: Tensor | None,
    need_dbias: bool,
    *deterministic: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(qkv), torch.empty_like(bias) if need_dbias and bias is not None else lse.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cu_seqlens, ctx.max_seqlen, ctx.scale, ctx.dropout_p, seed, bias, *ctx.deterministic = inputs
    out, lse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse, cu_seqlens, seed, bias)


def _autograd(kernels: leaf.Leaf, ctx: Any, dout: Tensor | None, dlse: None) -> tuple[Any, ...]:
    if dout is None:
        return (None,) * (7 + len(ctx.deterministic))
    qkv, out, lse, cu_seqlens, seed, bias = ctx.saved_tensors
    need_dbias = ctx.needs_input_grad[6]
    deterministic = [asked or torch.are_deterministic_algorithms_enabled() for asked in ctx.deterministic]
    dqkv, dbias = kernels.backward(
        dout.contiguous(),
        qkv,
        out,
        lse,
        cu_seqlens,
        ctx.max_seqlen,
        ctx.scale,
        ctx.dropout_p,
        seed,
        bias,
        need_dbias,
        *deterministic,
    )
    return dqkv, None, None, None, None, None, dbias if need_dbias else None, *[None for _ in ctx.deterministic]


for _kernels in (_cpu, _cuda, _triton):
    leaf.register(
        _kernels,
        forward_fake=_forward_fake,
        setup_context=_setup_context,
        backward=_autograd,
        backward_fake=_backward_fake,
    )

implementations = dispatch.register(
    "attention",
    (
        dispatch.Implementation("cpu", functools.partial(_run, _cpu), _supports_cpu),
        dispatch.Implementation("cuda", functools.partial(_run, _cuda), _supports_cuda, dispatch.NEVER_RUN),
        dispatch.Implementation("triton", functools.partial(_run, _triton), _supports_triton),
        dispatch.Implementation("reference", _run_reference, dispatch.always),
    ),
)
