"""What the kernels of attention_fwd.py and attention_bwd.py share: the tiles of a packed batch, and scores.

Arguments that recur, T tokens in B sequences:
    qkv, dqkv [T, 3, heads, HEAD_DIM]; out, dout [T, heads, HEAD_DIM]; lse, delta float32 [heads, T]
    stats float32 [heads, slots, 2, BLOCK_M], lse and delta; dq_sum float32 [heads, slots, BLOCK_M, BLOCK_D], dQ / scale
        as it is summed; or None. By the slot of a tile of BLOCK_M queries (`find_tile`), its rows outside the sequence
        included, so that it begins where a vector may, and needs no mask
    cu_seqlens int32 [B + 1]
    bias float32 [B or 1, heads or 1, S or 1, S] or None; bias_batch, bias_head, bias_query: its strides, 0 where it
        broadcasts, and bias_width: its row's allocated length, all in units of 4 elements, to which rows are aligned
    seed int64 [1] or None; threshold, keep_scale: as in dropout.scalars
HEAD_DIM is padded to the power of two BLOCK_D with zeros.
SCALED: Q K^T is multiplied by scale before anything else, as a bias, a scale that is not positive, and float32's
accuracy want it; otherwise exp takes the scale in, in one fused operation.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))
LOWEST = tl.constexpr(-65536.0)
"""A bias of the lowest float forbids a key. Where it forbids all of a row, they share the weight alike (as in PyTorch),
and of so large a number the log-sum-exp could not tell how many they are; of this one it can, to a quarter of a
percent. In float32 the backward has it in two parts (attention_bwd.py), and needs no bound."""
UNSPECIALIZED = ("batch", "total", "heads", "threshold", "bias_batch", "bias_head", "bias_query", "bias_width")


@triton.jit
def find_tile(cu_seqlens, batch, BLOCK: tl.constexpr):
    """Sequence of this program's tile, where it starts and ends, and the tile's first row in it.

    Sequence b owns the program ids from cu_seqlens[b] // BLOCK + b on. That is room enough for its tiles, needs no
    table of tiles, and leaves at most B ids without one.
    """
    slot = tl.program_id(0)
    low = 0
    high = batch
    while high - low > 1:
        middle = (low + high) // 2
        reached = tl.load(cu_seqlens + middle) // BLOCK + middle <= slot
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    start = tl.load(cu_seqlens + low)
    length = tl.load(cu_seqlens + low + 1) - start
    return low, start.to(tl.int64), length, (slot - start // BLOCK - low) * BLOCK


@triton.jit
def find_sequence(cu_seqlens, sequence):
    """Where a sequence starts, and its length."""
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    return start, (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32)


@triton.jit
def find_head(qkv, start, head, heads, HEAD_DIM: tl.constexpr):
    """Pointers to a head's query, key and value of the token `start`, and how far the next token's are from them."""
    stride = 3 * heads * HEAD_DIM
    query = qkv + start * stride + head * HEAD_DIM
    key = query + heads * HEAD_DIM
    return query, key, key + heads * HEAD_DIM, stride


@triton.jit
def find_bias(bias, sequence, head, bias_batch, bias_head):
    """A pointer to the bias of a head of a sequence."""
    return bias + 4 * (tl.cast(sequence, tl.int64) * bias_batch + tl.cast(head, tl.int64) * bias_head)


@triton.jit
def rows(x, first, stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers [ROWS, BLOCK_D] to rows first, first + 1, ... of x."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    return x + tl.cast(first, tl.int64) * stride + (row * stride + column)


@triton.jit
def _inside(first, length, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which of these pointers are inside x [length, HEAD_DIM]."""
    inside = tl.arange(0, ROWS)[:, None] < length - first
    if HEAD_DIM < BLOCK_D:
        inside = inside & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    return inside


@triton.jit
def load_rows(
    x, first, length, stride, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
):
    """[ROWS, BLOCK_D]: rows first, first + 1, ... of x [length, HEAD_DIM], 0 outside. MASKED: some may lie outside."""
    pointers = rows(x, first, stride, ROWS, BLOCK_D)
    if MASKED:
        return tl.load(pointers, mask=_inside(first, length, ROWS, HEAD_DIM, BLOCK_D), other=0.0)
    elif HEAD_DIM < BLOCK_D:
        return tl.load(pointers, mask=tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_rows(x, value, first, length, stride, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    inside = _inside(first, length, ROWS, HEAD_DIM, BLOCK_D)
    tl.store(rows(x, first, stride, ROWS, BLOCK_D), value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def load_bias(
    bias, first_query, first_key, length, bias_query, bias_width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] of the bias of one head of one sequence, from (first_query, first_key) on.

    0 for queries outside the sequence; anything for keys outside. MASKED: some keys may lie outside.
    """
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    pointers = (
        bias + (tl.cast(first_query, tl.int64) * (4 * bias_query) + first_key) + (row * (4 * bias_query) + column)
    )
    inside = row < length - first_query
    if MASKED:
        inside = inside & (column < 4 * bias_width - first_key)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def finish_scores(
    scores, scale, bias, first_query, first_key, length, bias_query, bias_width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCALED: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Products of ROWS queries and COLUMNS keys, if SCALED times scale, plus the bias if it is not None: rounded once,
    in every kernel alike. With a bias and unless EXACT, what is finite is no lower than LOWEST. TRANSPOSED: scores are
    held [COLUMNS, ROWS].

    Left to itself the compiler fuses this product with whatever follows: with - lse in the backward, so that exp takes
    the rounding error of large scores for a difference.
    """
    if bias is not None:
        added = load_bias(bias, first_query, first_key, length, bias_query, bias_width, ROWS, COLUMNS, MASKED)
        if TRANSPOSED:
            added = tl.trans(added)
        scores = tl.fma(scores, scale, added)
        if not EXACT:
            scores = tl.where((scores < LOWEST) & (scores > -INFINITY), LOWEST, scores)
    elif SCALED:
        scores = tl.fma(scores, scale, 0.0)
    return scores
