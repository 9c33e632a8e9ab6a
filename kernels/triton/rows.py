"""What kernels that work on rows of a matrix share: LayerNorm, their shapes, and sums down the rows without atomics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import configs

STAGES = tl.constexpr(3)  # of loops over rows: two turns' loads are under way, as much as fills the memory's latency
_WIDE = 16384  # bytes of a turn, of which one under way is as much, and two more than some GPUs have room for
_SUM = configs.fixed("sum_partials", BLOCK_P=128, BLOCK_N=32, num_warps=4)
_INTERPRETER_PROCESSORS = 2
_REGISTERS = 65536  # of a multiprocessor, handed out by eight a thread
# What kernels for whole rows are compiled for without a GPU: BERT's widths, of each shape class one that is no power of
# two, whose masks take registers, and odd ones, which are read number by number.
_HALVES = (128, 192, 312, 384, 512, 768, 1024, 1536, 2001, 2048, 2560, 4096, 5120, 8191, 8192)
_FLOATS = (192, 256, 384, 768, 1001, 1024, 1536, 2001, 2560, 4095, 5120, 8191, 8192)
WIDTHS = [(hidden, torch.bfloat16) for hidden in _HALVES] + [(hidden, torch.float32) for hidden in _FLOATS]
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def processors(device: torch.device) -> int:
    """Streaming multiprocessors: how many programs sum side by side depends on the device, never on timing."""
    if device.type != "cuda":
        return _INTERPRETER_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def stages(block_m: int, hidden: int, dtype: torch.dtype) -> int:
    """STAGES, or one less where a turn's rows [block_m, hidden] of this dtype are wide.

    1 where rows begin elsewhere than at 16 bytes: copies number by number keep an address for each, in registers.
    """
    if hidden * dtype.itemsize % 16:
        return 1
    return STAGES.value - (block_m * block_columns(hidden) * dtype.itemsize > _WIDE)


def launch(config: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """How many programs a multiprocessor has to hold, and what to launch a kernel with: the configuration and, where
    its programs stay for many rows, a bound on registers, so that they fit in together.
    """
    arguments = dict(config)
    programs = arguments.pop("PROGRAMS_PER_PROCESSOR", None)
    if programs is None:
        return 1, arguments
    threads = 32 * arguments["num_warps"] * programs
    return programs, arguments | {"maxnreg": _REGISTERS // threads // 8 * 8}


def block_columns(columns: int) -> int:
    """The power of two that a program which holds whole rows pads them to."""
    return max(16, configs.next_power_of_2(columns))


@triton.jit
def standardize(v, column, eps, HIDDEN: tl.constexpr, EXACT: tl.constexpr):
    """Of whole rows v [BLOCK_M, BLOCK_N]: their mean, 1 / their standard deviation, and v - mean, 0 from HIDDEN on.

    EXACT: the numbers of v have 16 bits, whose sums have no rounding that would make a constant row steep.
    """
    average = tl.sum(v, 1) / HIDDEN
    centred = tl.where((column < HIDDEN)[None, :], v - average[:, None], 0.0)
    if not EXACT:
        rest = tl.sum(centred, 1) / HIDDEN
        average += rest
        centred = tl.where((column < HIDDEN)[None, :], centred - rest[:, None], 0.0)
    return average, tl.rsqrt(tl.sum(centred * centred, 1) / HIDDEN + eps), centred


@triton.jit
def standardize_bwd(g, xhat, inverse, HIDDEN: tl.constexpr):
    """The gradient of v, from that of xhat = (v - mean) * inverse: g, 0 from HIDDEN on, xhat [BLOCK_M, BLOCK_N].

    inverse: [BLOCK_M, 1].
    """
    mean_g = tl.sum(g, 1)[:, None] * (inverse / HIDDEN)
    mean_gx = tl.sum(g * xhat, 1)[:, None] * (inverse / HIDDEN)
    return g * inverse - (xhat * mean_gx + mean_g)


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
    grid = configs.cdiv(columns, _SUM["BLOCK_N"]), parts
    _sum_partials_kernel[grid](partials, out0, out1, out2, programs, columns, **_SUM)


def label(kind: str, hidden: int, dtype: torch.dtype) -> str:
    """What a case of WIDTHS is called."""
    return f"{kind}-{hidden}" + "-fp32" * (dtype is torch.float32)


def cases(arch: int) -> Iterator[configs.Case]:
    signature = {"partials": "*fp32", "out0": "*bf16", "out1": "*bf16", "out2": "*fp32"}
    signature |= {"programs": "i32", "columns": "i32:16"}
    yield configs.Case("bf16", _sum_partials_kernel, signature, *configs.split(_SUM), False)
