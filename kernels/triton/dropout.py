"""Dropout's masks, as fastbert/ops/philox.py defines them."""

from __future__ import annotations

import triton
import triton.language as tl

from fastbert.ops import philox


def scalars(p: float) -> tuple[int, float]:
    """The smallest number that is kept, as the upper half of an int32's bits, and the factor of what is kept."""
    threshold = philox.threshold(p) << 16
    return threshold - ((threshold >> 31) << 32), 1.0 / (1.0 - p) if p < 1.0 else 0.0


@triton.jit
def _philox(seed, c0, c1, c2, c3):
    """The words of the counters c0 to c3, uint32 of one shape.

    The Philox of fastbert/ops/philox.py; products are formed in 64 bits, which is one instruction, not one a half.
    """
    seed = tl.load(seed).to(tl.uint64, bitcast=True)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def keep_rows(seed, threshold, row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Keep-mask [ROWS, COLUMNS] of fastbert/ops/philox.py for rows `row` [ROWS]: a call's halves serve eight columns.

    seed: int64 [1]. threshold: as in `scalars`.
    """
    column = tl.arange(0, COLUMNS // 8).to(tl.uint32)[None, :]
    zero = tl.zeros([ROWS, COLUMNS // 8], tl.uint32)
    w0, w1, w2, w3 = _philox(seed, column + zero, row[:, None].to(tl.uint32) + zero, zero, zero + 1)
    least = threshold.to(tl.uint32, bitcast=True)
    # Joined before they are compared, the words take more registers than there are.
    lower = tl.join(tl.join(w0 << 16 >= least, w2 << 16 >= least), tl.join(w1 << 16 >= least, w3 << 16 >= least))
    upper = tl.join(tl.join(w0 >= least, w2 >= least), tl.join(w1 >= least, w3 >= least))
    return tl.reshape(tl.join(lower, upper), (ROWS, COLUMNS))


@triton.jit
def _kept_halves(word, least):
    """Bits 15 and 31: whether the halves of a word are at least those of `least` (csrc/philox.h)."""
    rest = (word | 0x80008000) - (least & 0x7FFF7FFF)
    below = least ^ 0xFFFFFFFF
    return (word & rest) | (word & below) | (rest & below)


@triton.jit
def _kept(seed, threshold, c0, c1, head):
    """Which of the eight elements of a call are kept: bits i and 16 + i for the halves of its i-th word."""
    zero = tl.zeros_like(c0)
    w0, w1, w2, w3 = _philox(seed, c0, c1, tl.cast(head, tl.uint32) + zero, zero)
    least = threshold.to(tl.uint32, bitcast=True)
    least = least | least >> 16
    kept = _kept_halves(w0, least) >> 15 & 0x00010001
    kept |= _kept_halves(w1, least) >> 14 & 0x00020002
    kept |= _kept_halves(w2, least) >> 13 & 0x00040004
    return kept | _kept_halves(w3, least) >> 12 & 0x00080008


@triton.jit
def keep_attention(seed, threshold, head, start, first, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Dropout's mask [ROWS, COLUMNS] for queries first, first + 1, ... and keys n, n + 1, ... of a sequence.

    start: of the sequence in the packed batch. first and n are multiples of 16. A call decides about eight elements, as
    fastbert/ops/philox.py says: its bits are handed to their places by shape alone, so that the compiler draws them
    where tensor cores leave the scores.
    """
    c0 = (tl.arange(0, COLUMNS // 4) + (n >> 2)).to(tl.uint32)[None, :]
    c1 = (tl.arange(0, ROWS // 2) + (start + (first >> 1))).to(tl.uint32)[:, None]
    c0, c1 = tl.broadcast(c0, c1)
    kept = tl.reshape(_kept(seed, threshold, c0, c1, head), (ROWS // 16, 1, 8, COLUMNS // 16, 1, 4, 1))
    kept = tl.reshape(tl.broadcast_to(kept, (ROWS // 16, 2, 8, COLUMNS // 16, 2, 4, 2)), (ROWS, COLUMNS))
    return _bit_of(kept, tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :])


@triton.jit
def keep_attention_transposed(seed, threshold, head, start, first, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The same, [COLUMNS, ROWS]."""
    c0 = (tl.arange(0, COLUMNS // 4) + (n >> 2)).to(tl.uint32)[:, None]
    c1 = (tl.arange(0, ROWS // 2) + (start + (first >> 1))).to(tl.uint32)[None, :]
    c0, c1 = tl.broadcast(c0, c1)
    # The sum of one, which the compiler does not form twice: threads share calls here, and each would draw for itself.
    kept = tl.xor_sum(tl.expand_dims(_kept(seed, threshold, c0, c1, head), 2), 2)
    kept = tl.reshape(kept, (COLUMNS // 16, 1, 4, 1, ROWS // 16, 1, 8))
    kept = tl.reshape(tl.broadcast_to(kept, (COLUMNS // 16, 2, 4, 2, ROWS // 16, 2, 8)), (COLUMNS, ROWS))
    return _bit_of(kept, tl.arange(0, ROWS)[None, :], tl.arange(0, COLUMNS)[:, None])


@triton.jit
def _bit_of(kept, query, key):
    place = (query >> 3 & 1) + (key >> 3 & 1) * 2 + (key & 1) * 16
    return kept >> place.to(tl.uint32) & 1 != 0


@triton.jit
def dropped(length):
    """0.0, length being no less than 0, which the compiler does not know: it would drop the halves of packed numbers
    instead, after taking them out one by one.
    """
    return (length >> 31).to(tl.float32)
