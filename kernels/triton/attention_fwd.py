"""The forward of attention, with the online softmax of FlashAttention (Dao et al. 2022).

A program of the long kernel owns a tile of queries of one head of one sequence and walks over the keys; one of the
short kernel holds the whole head of a sequence. attention_tiles.py says what the arguments are.
"""

import triton
import triton.language as tl

from fastbert.kernels import attention_tiles as tiles
from fastbert.kernels.dropout import dropped, keep_attention

# What keeps float32's accuracy on tensor cores: three products in TF32 of its upper and lower parts, summed up outside
# (Ootomo and Yokota, 2022, https://doi.org/10.1177/10943420221090256). Without tensor cores Triton's code waits for
# shared memory, where the elements of a column are all in one bank. For 16-bit numbers it changes nothing.
ACCURATE = tl.constexpr("tf32x3")


@triton.jit
def _dot(a, b, total, BLOCK_D: tl.constexpr):
    """a b, added to `total` if that is not None, in a forward.

    Large heads leave no registers for the parts that float32 is cut into.
    """
    return tl.dot(a, b, total, input_precision=ACCURATE if BLOCK_D <= 64 else "ieee")


@triton.jit
def _softmax_block(
    scores, top, scale, first_key, length, COLUMNS: tl.constexpr, SCALED: tl.constexpr, MASKED: tl.constexpr
):
    """The new maximum of each row, exp(score - maximum), and what earlier sums shrink by.

    scores [rows, COLUMNS], keys from first_key on; top [rows], the maximum so far.
    """
    if MASKED:
        scores = tl.where(tl.arange(0, COLUMNS)[None, :] < length - first_key, scores, -tiles.INFINITY)
    new_top = tl.maximum(top, tl.max(scores, 1))
    if SCALED:
        base = tl.where(new_top == -tiles.INFINITY, 0.0, new_top)  # a row of nothing but -inf: exp gives 0, not NaN
        p = tl.exp2((scores - base[:, None]) * tiles.LOG2E)
        shrink = tl.exp2((top - base) * tiles.LOG2E)
    else:
        factor = scale * tiles.LOG2E
        base = new_top * factor
        p = tl.exp2(scores * factor - base[:, None])
        shrink = tl.exp2(top * factor - base)
    return new_top, p, shrink


@triton.jit
def _log_sum_exp(top, total, scale, SCALED: tl.constexpr):
    if SCALED:
        return top + tl.log(total)
    else:
        return top * scale + tl.log(total)


@triton.jit
def _attend(
    acc, top, total, q, k_head, v_head, first, n, length, head, start, row_stride, scale, seed, threshold,
    bias, bias_query, bias_width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, SCALED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: the queries q (first, first + 1, ...) meet the keys n, n + 1, ..."""
    k = tiles.load_rows(k_head, n, length, row_stride, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
    scores = _dot(q, tl.trans(k), None, BLOCK_D)
    scores = tiles.finish_scores(
        scores, scale, bias, first, n, length, bias_query, bias_width, BLOCK_M, BLOCK_N, SCALED, MASKED,
        q.dtype == tl.float32, False,
    )  # fmt: skip
    top, p, shrink = _softmax_block(scores, top, scale, n, length, BLOCK_N, SCALED, MASKED)
    total = total * shrink + tl.sum(p, 1)
    if seed is not None:
        p = tl.where(keep_attention(seed, threshold, head, start, first, n, BLOCK_M, BLOCK_N), p, dropped(length))
    v = tiles.load_rows(v_head, n, length, row_stride, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
    acc = _dot(p.to(v.dtype), v, acc * shrink[:, None], BLOCK_D)
    return acc, top, total


@triton.jit(do_not_specialize=tiles.UNSPECIALIZED)
def _attention_fwd_kernel(
    qkv, out, lse, cu_seqlens, seed, bias,
    batch, total, heads, scale, threshold, keep_scale, bias_batch, bias_head, bias_query, bias_width,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK_M queries. Grid: (tile slots, heads)."""
    sequence, start, length, first = tiles.find_tile(cu_seqlens, batch, BLOCK_M)
    if first >= length:
        return
    head = tl.program_id(1)
    q_head, k_head, v_head, row_stride = tiles.find_head(qkv, start, head, heads, HEAD_DIM)
    if bias is not None:
        bias = tiles.find_bias(bias, sequence, head, bias_batch, bias_head)
    query = first + tl.arange(0, BLOCK_M)
    q = tiles.load_rows(q_head, first, length, row_stride, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), -tiles.INFINITY, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)

    full = length // BLOCK_N * BLOCK_N
    for n in tl.range(0, full, BLOCK_N):
        acc, top, row_sum = _attend(
            acc, top, row_sum, q, k_head, v_head, first, n, length, head, start, row_stride, scale, seed,
            threshold, bias, bias_query, bias_width, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, SCALED, False,
        )  # fmt: skip
    for n in tl.range(full, length, BLOCK_N, num_stages=1):
        acc, top, row_sum = _attend(
            acc, top, row_sum, q, k_head, v_head, first, n, length, head, start, row_stride, scale, seed,
            threshold, bias, bias_query, bias_width, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, SCALED, True,
        )  # fmt: skip

    acc *= tl.where(row_sum == 0.0, 0.0, keep_scale / row_sum)[:, None]
    out_head = out + start * heads * HEAD_DIM + head * HEAD_DIM
    tiles.store_rows(out_head, acc, first, length, heads * HEAD_DIM, BLOCK_M, HEAD_DIM, BLOCK_D)
    lse += tl.cast(head, tl.int64) * total + start
    tl.store(lse + query, _log_sum_exp(top, row_sum, scale, SCALED), mask=query < length)


@triton.jit(do_not_specialize=tiles.UNSPECIALIZED)
def _attention_fwd_short_kernel(
    qkv, out, lse, cu_seqlens, seed, bias,
    batch, total, heads, scale, threshold, keep_scale, bias_batch, bias_head, bias_query, bias_width,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A head of a sequence of at most BLOCK_S tokens. Grid: (B * heads,)."""
    sequence = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    start, length = tiles.find_sequence(cu_seqlens, sequence)
    if length == 0:
        return
    q_head, k_head, v_head, row_stride = tiles.find_head(qkv, start, head, heads, HEAD_DIM)
    if bias is not None:
        bias = tiles.find_bias(bias, sequence, head, bias_batch, bias_head)
    query = tl.arange(0, BLOCK_S)
    q = tiles.load_rows(q_head, 0, length, row_stride, BLOCK_S, HEAD_DIM, BLOCK_D, True)
    k = tiles.load_rows(k_head, 0, length, row_stride, BLOCK_S, HEAD_DIM, BLOCK_D, True)
    v = tiles.load_rows(v_head, 0, length, row_stride, BLOCK_S, HEAD_DIM, BLOCK_D, True)

    scores = _dot(q, tl.trans(k), None, BLOCK_D)
    top = tl.full((BLOCK_S,), -tiles.INFINITY, tl.float32)
    scores = tiles.finish_scores(
        scores, scale, bias, 0, 0, length, bias_query, bias_width, BLOCK_S, BLOCK_S, SCALED, True,
        q.dtype == tl.float32, False,
    )  # fmt: skip
    top, p, _ = _softmax_block(scores, top, scale, 0, length, BLOCK_S, SCALED, True)
    row_sum = tl.sum(p, 1)
    if seed is not None:
        p = tl.where(keep_attention(seed, threshold, head, start, 0, 0, BLOCK_S, BLOCK_S), p, dropped(length))
    acc = _dot(p.to(v.dtype), v, None, BLOCK_D)
    acc *= tl.where(row_sum == 0.0, 0.0, keep_scale / row_sum)[:, None]
    out_head = out + start * heads * HEAD_DIM + head * HEAD_DIM
    tiles.store_rows(out_head, acc, 0, length, heads * HEAD_DIM, BLOCK_S, HEAD_DIM, BLOCK_D)
    lse += tl.cast(head, tl.int64) * total + start
    tl.store(lse + query, _log_sum_exp(top, row_sum, scale, SCALED), mask=query < length)
