"""What the kernels that work on rows of a matrix share: dropout masks, and sums down the rows without atomics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import configs, interpreter
from fastbert.ops import philox

interpreter.install()

_SUM = {"BLOCK_P": 128, "BLOCK_N": 32, "num_warps": 4}
_INTERPRETER_PROCESSORS = 2


def dropout_scalars(p: float) -> tuple[int, float]:
    """The smallest number that is kept, as the upper half of an int32's bits, and the factor of what is kept."""
    threshold = philox.threshold(p) << 16
    return threshold - ((threshold >> 31) << 32), 1.0 / (1.0 - p) if p < 1.0 else 0.0


def processors(device: torch.device) -> int:
    """Streaming multiprocessors: how many programs sum side by side depends on the device, never on timing."""
    if device.type != "cuda":
        return _INTERPRETER_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def block_columns(columns: int) -> int:
    """The power of two that a program which holds whole rows pads them to."""
    return max(16, triton.next_power_of_2(columns))


@triton.jit
def keep_rows(seed, threshold, row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Keep-mask [ROWS, COLUMNS] of fastbert/ops/philox.py for rows `row` [ROWS]: a call's halves serve eight columns.

    seed: int64 [1]. threshold: as in dropout_scalars.
    """
    column = tl.arange(0, COLUMNS // 8).to(tl.uint32)[None, :]
    zero = tl.zeros([ROWS, COLUMNS // 8], tl.uint32)
    return keep(seed, threshold, column + zero, row[:, None].to(tl.uint32) + zero, zero, zero + 1, ROWS, COLUMNS)


@triton.jit
def keep(seed, threshold, c0, c1, c2, c3, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The mask [ROWS, COLUMNS] for counters c0 to c3, uint32, that broadcast to [ROWS, COLUMNS / 8].

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
    least = threshold.to(tl.uint32, bitcast=True)
    # Joined before they are compared, the words take more registers than there are.
    lower = tl.join(tl.join(c0 << 16 >= least, c2 << 16 >= least), tl.join(c1 << 16 >= least, c3 << 16 >= least))
    upper = tl.join(tl.join(c0 >= least, c2 >= least), tl.join(c1 >= least, c3 >= least))
    return tl.reshape(tl.join(lower, upper), (ROWS, COLUMNS))


@triton.jit(do_not_specialize=("programs",))
def _sum_partials_kernel(
    partials,  # float32 [parts, programs, columns]
    out0,  # [columns], of any dtype, one for each part
    out1,
    out2,
    programs,
    columns,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    part = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = partials + part.to(tl.int64) * programs * columns
    total = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for first in range(0, programs, BLOCK_P):
        program = first + tl.arange(0, BLOCK_P)
        inside = (program < programs)[:, None] & (column < columns)[None, :]
        total += tl.load(start + program[:, None] * columns + column[None, :], mask=inside, other=0.0)
    sums = tl.sum(total, 0)
    if part == 0:
        tl.store(out0 + column, sums, mask=column < columns)
    if out1 is not None:
        if part == 1:
            tl.store(out1 + column, sums, mask=column < columns)
    if out2 is not None:
        if part == 2:
            tl.store(out2 + column, sums, mask=column < columns)


def sum_partials(partials: Tensor, outs: Sequence[Tensor]) -> None:
    """Write the sum over the programs of each part of partials, float32 [parts, programs, columns], into its out."""
    parts, programs, columns = partials.shape
    out0, out1, out2 = (*outs, None, None)[:3]
    grid = triton.cdiv(columns, _SUM["BLOCK_N"]), parts
    _sum_partials_kernel[grid](partials, out0, out1, out2, programs, columns, **_SUM)


def cases(arch: int) -> Iterator[configs.Case]:
    signature = {"partials": "*fp32", "out0": "*bf16", "out1": "*bf16", "out2": "*fp32"}
    signature |= {"programs": "i32", "columns": "i32:16"}
    constants = {name: value for name, value in _SUM.items() if name != "num_warps"}
    options = {"num_warps": _SUM["num_warps"]}
    yield configs.Case("bf16", _sum_partials_kernel, signature, constants, options, False)
