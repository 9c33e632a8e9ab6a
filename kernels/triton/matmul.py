"""The tile product that the kernels with matrix products share, and how they walk over the tiles."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastbert.kernels import configs


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as PyTorch's own products are, in TF32 only if that is allowed."""
    return "tf32" if dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def tiles(config: dict[str, int], rows: int, columns: int) -> int:
    """How many tiles of a configuration cover a result."""
    return configs.cdiv(rows, config["BLOCK_M"]) * configs.cdiv(columns, config["BLOCK_N"])


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a program's tile. GROUP_M rows of tiles are walked down before the next column, so that the
    operands of programs that run side by side are in L2."""
    group = program // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    inner = program - group * GROUP_M * tiles_n
    return first + inner % height, inner // height


@triton.jit
def multiply(
    a,
    a_offset,
    b,
    b_offset,
    b_inside,
    depth,
    b_depth,
    steps,
    A_STEP: tl.constexpr,
    B_STEP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Float32 [BLOCK_M, BLOCK_N]: sum over k < depth of a[a_offset[m] + k * A_STEP] * b[b_offset[n] + k * B_STEP].

    a_offset: int64 [BLOCK_M], b_offset: int64 [BLOCK_N]; what they point to must exist, but for the n outside b_inside
    (a mask [BLOCK_N], or None) and, if b_depth is given, for the k of b from there on. EVEN: BLOCK_K divides depth.
    steps: depth / BLOCK_K, rounded up. A number of steps that the compiler knows makes it unroll the loop, until
    registers run out.
    """
    k = tl.arange(0, BLOCK_K)
    a_pointer = a + (a_offset[:, None] + (k.to(tl.int64) * A_STEP)[None, :])
    b_pointer = b + ((k.to(tl.int64) * B_STEP)[:, None] + b_offset[None, :])
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(steps):
        first = step * BLOCK_K
        if EVEN:
            a_tile = tl.load(a_pointer)
        else:
            a_tile = tl.load(a_pointer, mask=(k < depth - first)[None, :], other=0.0)
        if EVEN and b_depth is None:
            if b_inside is None:
                b_tile = tl.load(b_pointer)
            else:
                b_tile = tl.load(b_pointer, mask=b_inside[None, :], other=0.0)
        else:
            if b_depth is None:
                deep = k < depth - first
            else:
                deep = k < b_depth - first
            if b_inside is None:
                b_tile = tl.load(b_pointer, mask=deep[:, None], other=0.0)
            else:
                b_tile = tl.load(b_pointer, mask=deep[:, None] & b_inside[None, :], other=0.0)
        total = tl.dot(a_tile, b_tile, total, input_precision=PRECISION)
        a_pointer += BLOCK_K * A_STEP
        b_pointer += BLOCK_K * B_STEP
    return total


@triton.jit
def multiply_rows(
    a,
    a_row,
    b,
    b_row,
    steps,
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Float32 [BLOCK_M, BLOCK_N]: the products of the rows a_row of a [.., DEPTH] with the rows b_row of b [.., DEPTH].

    All of these rows must exist. steps: as `multiply` takes them.
    """
    return multiply(
        a,
        a_row.to(tl.int64) * DEPTH,
        b,
        b_row.to(tl.int64) * DEPTH,
        None,
        DEPTH,
        None,
        steps,
        1,
        1,
        DEPTH % BLOCK_K == 0,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        PRECISION,
    )


@triton.jit
def halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile [BLOCK_M, BLOCK_N].

    An epilogue in two halves takes few enough registers for two programs a processor, of which one multiplies while the
    other is in its epilogue.
    """
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
