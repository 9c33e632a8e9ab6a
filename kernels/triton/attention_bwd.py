"""The backward of attention, whose probabilities are formed again from the forward's log-sum-exp.

A program of a long kernel owns a tile of queries (or of keys) of one head of one sequence and walks over the other
side; one of the short kernel holds the whole head of a sequence. Nothing is added to memory that another program also
adds to, so results repeat bit for bit; but where `dq_sum` is given. attention_tiles.py says what the arguments are.
"""

import triton
import triton.language as tl

from fastbert.kernels import attention_tiles as tiles
from fastbert.kernels.dropout import dropped, keep_attention, keep_attention_transposed


@triton.jit
def _dot_bwd(a, b, total):
    """The same in a backward, whose kernels form a product twice and need the same bits: where all weight is on one
    key, P dP is equal to its sum and the gradient of the score is 0."""
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _dot_transposed(a, b):
    """b^T a^T. In float32 formed as a b is: not every library has the same bits for exchanged operands."""
    if a.dtype == tl.float32:
        return tl.trans(_dot_bwd(a, b, None))
    else:
        return _dot_bwd(tl.trans(b), tl.trans(a), None)


@triton.jit
def _drop(dp, keep, keep_scale):
    """dp where it is kept, times keep_scale, rounded before anything is taken from it: see `_dot_bwd`."""
    return tl.fma(tl.where(keep, dp, 0.0), keep_scale, 0.0)


@triton.jit
def _load_lse(lse, query, length, SCALED: tl.constexpr):
    """lse of the queries for `_probabilities`; +inf, which makes them 0, outside the sequence or without a key."""
    value = tl.load(lse + query, mask=query < length, other=tiles.INFINITY)
    value = tl.where(value == -tiles.INFINITY, tiles.INFINITY, value)
    if SCALED:
        return value
    else:
        return value * tiles.LOG2E


@triton.jit
def _load_mass(lse, rows, query, heads, total, length):
    """What `_probabilities` takes besides in float32."""
    return tl.load(lse + tl.cast(heads, tl.int64) * total + rows + query, mask=query < length, other=0.0)


@triton.jit
def _probabilities(scores, lse, mass, scale, SCALED: tl.constexpr):
    """softmax again, from lse, which broadcasts against the scores and unless SCALED is in units of log(2).

    In float32 lse is the highest score alone, from which the others' distance is exact, and mass the rest, in units of
    log(2); otherwise mass is None.
    """
    if mass is not None:
        return tl.exp2((scores - lse) * tiles.LOG2E - mass)
    elif SCALED:
        return tl.exp2((scores - lse) * tiles.LOG2E)
    else:
        return tl.exp2(scores * (scale * tiles.LOG2E) - lse)


@triton.jit
def _scores(
    q, k, first, n, length, scale, bias, bias_query, bias_width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SCALED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Of the queries from `first` on and the keys from n on, [BLOCK_M, BLOCK_N], as `_probabilities` takes them."""
    return tiles.finish_scores(
        _dot_bwd(q, tl.trans(k), None), scale, bias, first, n, length, bias_query, bias_width, BLOCK_M, BLOCK_N,
        SCALED, MASKED, q.dtype == tl.float32, False,
    )  # fmt: skip


@triton.jit
def _dprobabilities(
    dout, v, first, n, head, start, seed, threshold, keep_scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Gradients of the probabilities, [BLOCK_M, BLOCK_N]."""
    dp = _dot_bwd(dout, tl.trans(v), None)
    if seed is not None:
        keep = keep_attention(seed, threshold, head, start, first, n, BLOCK_M, BLOCK_N)
        dp = _drop(dp, keep, keep_scale)
    return dp


@triton.jit
def _meet_keys(
    q, dout, lse, mass, k_head, v_head, first, n, length, head, start, row_stride, scale, seed, threshold, keep_scale,
    bias, bias_query, bias_width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, SCALED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys n, n + 1, ..., and the probabilities and their gradients, both [BLOCK_M, BLOCK_N], of the queries q."""
    k = tiles.load_rows(k_head, n, length, row_stride, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
    v = tiles.load_rows(v_head, n, length, row_stride, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
    scores = _scores(q, k, first, n, length, scale, bias, bias_query, bias_width, BLOCK_M, BLOCK_N, SCALED, MASKED)
    p = _probabilities(scores, lse[:, None], None if mass is None else mass[:, None], scale, SCALED)
    if MASKED:
        p = tl.where(tl.arange(0, BLOCK_N)[None, :] < length - n, p, 0.0)
    dp = _dprobabilities(dout, v, first, n, head, start, seed, threshold, keep_scale, BLOCK_M, BLOCK_N)
    return k, p, dp


@triton.jit(do_not_specialize=tiles.UNSPECIALIZED)
def _attention_bwd_dq_kernel(
    dout, qkv, lse, delta, dqkv, cu_seqlens, seed, bias,
    batch, total, heads, scale, threshold, keep_scale, bias_batch, bias_head, bias_query, bias_width,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of BLOCK_M queries. In float32 it forms and writes their delta, sum(P * dP), and their lse, as that
    of the forward is of scores with other roundings; in two parts (`_probabilities`): lse [2, heads, T].
    Grid: (tile slots, heads)."""
    sequence, start, length, first = tiles.find_tile(cu_seqlens, batch, BLOCK_M)
    if first >= length:
        return
    head = tl.program_id(1)
    q_head, k_head, v_head, row_stride = tiles.find_head(qkv, start, head, heads, HEAD_DIM)
    out_stride = heads * HEAD_DIM
    dq_head = dqkv + start * row_stride + head * HEAD_DIM
    out_head = start * out_stride + head * HEAD_DIM
    if bias is not None:
        bias = tiles.find_bias(bias, sequence, head, bias_batch, bias_head)
    query = first + tl.arange(0, BLOCK_M)
    rows = tl.cast(head, tl.int64) * total + start
    do = tiles.load_rows(dout + out_head, first, length, out_stride, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    q = tiles.load_rows(q_head, first, length, row_stride, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    if qkv.dtype.element_ty == tl.float32:  # where one key has nearly all the weight, only this sum is exact enough
        top = tl.full((BLOCK_M,), -tiles.INFINITY, tl.float32)
        mass = tl.zeros((BLOCK_M,), tl.float32)
        weighted = tl.zeros((BLOCK_M,), tl.float32)
        for n in tl.range(0, length, BLOCK_N, num_stages=1):
            k = tiles.load_rows(k_head, n, length, row_stride, BLOCK_N, HEAD_DIM, BLOCK_D, True)
            v = tiles.load_rows(v_head, n, length, row_stride, BLOCK_N, HEAD_DIM, BLOCK_D, True)
            scores = _scores(
                q, k, first, n, length, scale, bias, bias_query, bias_width, BLOCK_M, BLOCK_N, SCALED, True
            )
            scores = tl.where(tl.arange(0, BLOCK_N)[None, :] < length - n, scores, -tiles.INFINITY)
            dp = _dprobabilities(do, v, first, n, head, start, seed, threshold, keep_scale, BLOCK_M, BLOCK_N)
            higher = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(higher == -tiles.INFINITY, 0.0, higher)
            p = tl.exp2((scores - base[:, None]) * tiles.LOG2E)
            shrink = tl.exp2((top - base) * tiles.LOG2E)
            mass = mass * shrink + tl.sum(p, 1)
            weighted = weighted * shrink + tl.sum(p * dp, 1)
            top = higher
        row_lse = tl.where(mass == 0.0, tiles.INFINITY, top)
        row_mass = tl.where(mass == 0.0, 0.0, tl.log2(mass))
        row_delta = tl.where(mass == 0.0, 0.0, weighted / mass)
        tl.store(lse + rows + query, row_lse, mask=query < length)
        tl.store(lse + tl.cast(heads, tl.int64) * total + rows + query, row_mass, mask=query < length)
        tl.store(delta + rows + query, row_delta, mask=query < length)
    else:
        row_lse = _load_lse(lse + rows, query, length, SCALED)
        row_mass = None
        row_delta = tl.load(delta + rows + query, mask=query < length, other=0.0)
    full = length // BLOCK_N * BLOCK_N
    for n in tl.range(0, full, BLOCK_N):
        k, p, dp = _meet_keys(
            q, do, row_lse, row_mass, k_head, v_head, first, n, length, head, start, row_stride, scale, seed,
            threshold, keep_scale, bias, bias_query, bias_width, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D,
            SCALED, False,
        )  # fmt: skip
        dq = _dot_bwd((p * (dp - row_delta[:, None])).to(k.dtype), k, dq)
    for n in tl.range(full, length, BLOCK_N, num_stages=1):
        k, p, dp = _meet_keys(
            q, do, row_lse, row_mass, k_head, v_head, first, n, length, head, start, row_stride, scale, seed,
            threshold, keep_scale, bias, bias_query, bias_width, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D,
            SCALED, True,
        )  # fmt: skip
        dq = _dot_bwd((p * (dp - row_delta[:, None])).to(k.dtype), k, dq)
    tiles.store_rows(dq_head, dq * scale, first, length, row_stride, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=("batch", "total", "heads"))
def _attention_bwd_begin_kernel(
    dout, out, lse, delta, stats, dq_sum, cu_seqlens, batch, total, heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SCALED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta of a tile of queries, sum(P * dP) = sum(dout * out); lse and delta of the tile with all its rows; 0 where
    its dQ is going to be summed. Grid: (tile slots, heads)."""
    _, start, length, first = tiles.find_tile(cu_seqlens, batch, BLOCK_M)
    if first >= length:
        return
    head = tl.program_id(1)
    stride = heads * HEAD_DIM
    offset = start * stride + head * HEAD_DIM
    do = tiles.load_rows(dout + offset, first, length, stride, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    o = tiles.load_rows(out + offset, first, length, stride, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    row_delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    row = tl.arange(0, BLOCK_M)
    query = first + row
    rows = tl.cast(head, tl.int64) * total + start
    tl.store(delta + rows + query, row_delta, mask=query < length)
    tile = tl.cast(head * tl.num_programs(0) + tl.program_id(0), tl.int64) * BLOCK_M
    tl.store(stats + 2 * tile + row, _load_lse(lse + rows, query, length, SCALED))
    tl.store(stats + 2 * tile + BLOCK_M + row, row_delta)
    if dq_sum is not None:
        tl.store(tiles.rows(dq_sum, tile, BLOCK_D, BLOCK_M, BLOCK_D), tl.zeros((BLOCK_M, BLOCK_D), tl.float32))


@triton.jit(do_not_specialize=("batch", "heads"))
def _attention_bwd_end_kernel(
    dq_sum, dqkv, cu_seqlens, batch, heads, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of queries from its sum. Grid: (tile slots, heads)."""
    _, start, length, first = tiles.find_tile(cu_seqlens, batch, BLOCK_M)
    if first >= length:
        return
    head = tl.program_id(1)
    tile = tl.cast(head * tl.num_programs(0) + tl.program_id(0), tl.int64) * BLOCK_M
    dq = tl.load(tiles.rows(dq_sum, tile, BLOCK_D, BLOCK_M, BLOCK_D))
    row_stride = 3 * heads * HEAD_DIM
    dq_head = dqkv + start * row_stride + head * HEAD_DIM
    tiles.store_rows(dq_head, dq * scale, first, length, row_stride, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=tiles.UNSPECIALIZED)
def _attention_bwd_dkdv_kernel(
    dout, qkv, lse, delta, stats, dqkv, dq_sum, cu_seqlens, seed, bias,
    batch, total, heads, scale, threshold, keep_scale, bias_batch, bias_head, bias_query, bias_width,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of a tile of BLOCK_N keys, and with dq_sum what these keys contribute to dQ, added to it in an order
    that differs from run to run (FlashAttention-2, Dao 2023, algorithm 2). Grid: (tile slots, heads).

    Scores are held transposed, [BLOCK_N, BLOCK_M], so that both products that follow take them as their left operand.
    Rows of keys outside the sequence hold anything, where only dQ would see them.
    """
    sequence, start, length, first = tiles.find_tile(cu_seqlens, batch, BLOCK_N)
    if first >= length:
        return
    head = tl.program_id(1)
    q_head, k_head, v_head, row_stride = tiles.find_head(qkv, start, head, heads, HEAD_DIM)
    out_stride = heads * HEAD_DIM
    dk_head = dqkv + start * row_stride + (heads + head) * HEAD_DIM
    do_offset = start * out_stride + head * HEAD_DIM
    if bias is not None:
        bias = tiles.find_bias(bias, sequence, head, bias_batch, bias_head)
    rows = tl.cast(head, tl.int64) * total + start
    tile = tl.cast(head * (total // BLOCK_M + batch) + sequence, tl.int64) + start // BLOCK_M
    if stats is not None:
        stats += tile * (2 * BLOCK_M)
    if dq_sum is not None:
        dq_sum += tile * (BLOCK_M * BLOCK_D)
    key = first + tl.arange(0, BLOCK_N)[:, None]
    k = tiles.load_rows(k_head, first, length, row_stride, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    v = tiles.load_rows(v_head, first, length, row_stride, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)

    for m in tl.range(0, length, BLOCK_M):
        q = tiles.load_rows(q_head, m, length, row_stride, BLOCK_M, HEAD_DIM, BLOCK_D, True)
        do = tiles.load_rows(dout + do_offset, m, length, out_stride, BLOCK_M, HEAD_DIM, BLOCK_D, True)
        if stats is None:
            query = m + tl.arange(0, BLOCK_M)
            row_lse = _load_lse(lse + rows, query, length, SCALED)
            row_mass = _load_mass(lse, rows, query, heads, total, length)[None, :]
            row_delta = tl.load(delta + rows + query, mask=query < length, other=0.0)
        else:
            row_mass = None
            row_lse = tl.load(stats + 2 * m + tl.arange(0, BLOCK_M))
            row_delta = tl.load(stats + 2 * m + BLOCK_M + tl.arange(0, BLOCK_M))
        scores = tiles.finish_scores(
            _dot_transposed(q, tl.trans(k)), scale, bias, m, first, length, bias_query, bias_width, BLOCK_M, BLOCK_N,
            SCALED, True, q.dtype == tl.float32, True,
        )  # fmt: skip
        p = _probabilities(scores, row_lse[None, :], row_mass, scale, SCALED)
        if dq_sum is not None:
            p = tl.where(key < length, p, 0.0)
        dp = _dot_transposed(do, tl.trans(v))
        kept = p
        if seed is not None:
            keep = keep_attention_transposed(seed, threshold, head, start, m, first, BLOCK_M, BLOCK_N)
            kept = tl.where(keep, p, dropped(length))
            dp = _drop(dp, keep, keep_scale)
        dv = _dot_bwd(kept.to(do.dtype), do, dv)
        ds = (p * (dp - row_delta[None, :])).to(q.dtype)
        dk = _dot_bwd(ds, q, dk)
        if dq_sum is not None:
            dq = _dot_bwd(tl.trans(ds), k, None)
            tl.atomic_add(tiles.rows(dq_sum, m, BLOCK_D, BLOCK_M, BLOCK_D), dq, sem="relaxed")

    tiles.store_rows(dk_head, dk * scale, first, length, row_stride, BLOCK_N, HEAD_DIM, BLOCK_D)
    dv_head = dk_head + heads * HEAD_DIM
    tiles.store_rows(dv_head, dv * keep_scale, first, length, row_stride, BLOCK_N, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=tiles.UNSPECIALIZED)
def _attention_bwd_short_kernel(
    dout, qkv, lse, delta, dqkv, cu_seqlens, seed, bias,
    batch, total, heads, scale, threshold, keep_scale, bias_batch, bias_head, bias_query, bias_width,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dQ, dK and dV of a head of a sequence of at most BLOCK_S tokens. Grid: (B * heads,).

    Scores are held transposed, [keys, queries]. delta comes from them: all keys are at hand, `out` need not be read. It
    is written if it is wanted, for the gradient of the bias.
    """
    sequence = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    start, length = tiles.find_sequence(cu_seqlens, sequence)
    if length == 0:
        return
    q_head, k_head, v_head, row_stride = tiles.find_head(qkv, start, head, heads, HEAD_DIM)
    out_stride = heads * HEAD_DIM
    dq_head = dqkv + start * row_stride + head * HEAD_DIM
    do_head = dout + start * out_stride + head * HEAD_DIM
    if bias is not None:
        bias = tiles.find_bias(bias, sequence, head, bias_batch, bias_head)
    query = tl.arange(0, BLOCK_S)
    rows = tl.cast(head, tl.int64) * total + start
    row_lse = _load_lse(lse + rows, query, length, SCALED)
    q = tiles.load_rows(q_head, 0, length, row_stride, BLOCK_S, HEAD_DIM, BLOCK_D, True)
    k = tiles.load_rows(k_head, 0, length, row_stride, BLOCK_S, HEAD_DIM, BLOCK_D, True)
    v = tiles.load_rows(v_head, 0, length, row_stride, BLOCK_S, HEAD_DIM, BLOCK_D, True)
    do = tiles.load_rows(do_head, 0, length, out_stride, BLOCK_S, HEAD_DIM, BLOCK_D, True)

    scores = tiles.finish_scores(
        _dot_bwd(k, tl.trans(q), None), scale, bias, 0, 0, length, bias_query, bias_width, BLOCK_S, BLOCK_S,
        SCALED, True, q.dtype == tl.float32, True,
    )  # fmt: skip
    p = tl.where(query[:, None] < length, _probabilities(scores, row_lse[None, :], None, scale, SCALED), 0.0)
    dp = _dot_bwd(v, tl.trans(do), None)
    kept = p
    if seed is not None:
        keep = keep_attention_transposed(seed, threshold, head, start, 0, 0, BLOCK_S, BLOCK_S)
        kept = tl.where(keep, p, dropped(length))
        dp = _drop(dp, keep, keep_scale)
    dv = _dot_bwd(kept.to(do.dtype), do, None)
    tiles.store_rows(dq_head + 2 * heads * HEAD_DIM, dv * keep_scale, 0, length, row_stride, BLOCK_S, HEAD_DIM, BLOCK_D)
    row_delta = tl.sum(p * dp, 0)
    if delta is not None:
        tl.store(delta + rows + query, row_delta, mask=query < length)
    ds = (p * (dp - row_delta[None, :])).to(q.dtype)
    dk = _dot_bwd(ds, q, None)
    tiles.store_rows(dq_head + heads * HEAD_DIM, dk * scale, 0, length, row_stride, BLOCK_S, HEAD_DIM, BLOCK_D)
    dq = _dot_bwd(tl.trans(ds), k, None)
    tiles.store_rows(dq_head, dq * scale, 0, length, row_stride, BLOCK_S, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=(*tiles.UNSPECIALIZED, "bias_batches", "bias_heads", "queries", "keys", "parts"))
def _attention_bwd_dbias_kernel(
    dout, qkv, lse, delta, dbias, cu_seqlens, seed, bias,
    batch, total, heads, scale, threshold, keep_scale, bias_batch, bias_head, bias_query, bias_width,
    bias_batches, bias_heads, queries, keys, parts,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient of a bias [bias_batches, bias_heads, queries or 1, keys]: its sum over one part of the
    sequences and heads that share it and, if the bias has ONE_ROW for all queries, over the tile's queries.
    dbias float32 [parts, bias_batches, bias_heads, queries, keys]; queries: with ONE_ROW, tiles of them.
    Grid: (parts * bias_batches * bias_heads, tiles of queries, tiles of keys).
    """
    part = tl.program_id(0) // (bias_batches * bias_heads)
    which = tl.program_id(0) % (bias_batches * bias_heads)
    which_batch = which // bias_heads
    which_head = which % bias_heads
    first_query = tl.program_id(1) * BLOCK_M
    first_key = tl.program_id(2) * BLOCK_N
    out_stride = heads * HEAD_DIM
    bias = tiles.find_bias(bias, which_batch, which_head, bias_batch, bias_head)
    dbias += tl.cast(tl.program_id(0), tl.int64) * queries * keys
    query = first_query + tl.arange(0, BLOCK_M)
    key = first_key + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    sequences = batch // bias_batches
    shared_heads = heads // bias_heads
    for shared in tl.range(part, sequences * shared_heads, parts, num_stages=1):
        sequence = which_batch * sequences + shared // shared_heads
        head = which_head * shared_heads + shared % shared_heads
        start, length = tiles.find_sequence(cu_seqlens, sequence)
        if tl.maximum(first_query, first_key) < length:
            q_head, k_head, v_head, row_stride = tiles.find_head(qkv, start, head, heads, HEAD_DIM)
            do_head = dout + start * out_stride + head * HEAD_DIM
            rows = tl.cast(head, tl.int64) * total + start
            q = tiles.load_rows(q_head, first_query, length, row_stride, BLOCK_M, HEAD_DIM, BLOCK_D, True)
            do = tiles.load_rows(do_head, first_query, length, out_stride, BLOCK_M, HEAD_DIM, BLOCK_D, True)
            k = tiles.load_rows(k_head, first_key, length, row_stride, BLOCK_N, HEAD_DIM, BLOCK_D, True)
            v = tiles.load_rows(v_head, first_key, length, row_stride, BLOCK_N, HEAD_DIM, BLOCK_D, True)
            row_lse = _load_lse(lse + rows, query, length, SCALED)
            row_mass = None
            if qkv.dtype.element_ty == tl.float32:
                row_mass = _load_mass(lse, rows, query, heads, total, length)[:, None]
            row_delta = tl.load(delta + rows + query, mask=query < length, other=0.0)
            scores = _scores(
                q, k, first_query, first_key, length, scale, bias, bias_query, bias_width, BLOCK_M, BLOCK_N,
                SCALED, True,
            )  # fmt: skip
            p = tl.where(key < length, _probabilities(scores, row_lse[:, None], row_mass, scale, SCALED), 0.0)
            dp = _dprobabilities(
                do, v, first_query, first_key, head, start, seed, threshold, keep_scale, BLOCK_M, BLOCK_N
            )
            acc += p * (dp - row_delta[:, None])

    if ONE_ROW:
        column = first_key + tl.arange(0, BLOCK_N)
        tl.store(dbias + tl.program_id(1) * keys + column, tl.sum(acc, 0), mask=column < keys)
    else:
        inside = (query < queries)[:, None] & (key < keys)
        tl.store(dbias + (query.to(tl.int64)[:, None] * keys + key), acc, mask=inside)
