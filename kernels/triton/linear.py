"""x [W1 W2 ...]^T + [b1 b2 ...]: weights of one size side by side, read where each lies, for few rows.

There the vendor's product would be less work than to put the weights together for it; where there are more rows it is
the other way round, and a single weight is the vendor's anyway (`fastbert/ops/linear.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import configs, matmul


@triton.jit
def _chosen(number, one, two, three, four, COUNT: tl.constexpr):
    """The one of COUNT pointers that has this number."""
    found = tl.where(number == 1, two, one)
    if COUNT > 2:
        found = tl.where(number == 2, three, found)
    if COUNT > 3:
        found = tl.where(number == 3, four, found)
    return found


@triton.jit(do_not_specialize=("num_rows", "steps"))
def _linear_fwd_kernel(
    x,  # [num_rows, K]
    weight1,  # [N, K] each; the COUNT first count
    weight2,
    weight3,
    weight4,
    bias1,  # [N] each, or None
    bias2,
    bias3,
    bias4,
    y,  # [num_rows, COUNT * N]
    num_rows,
    steps,  # K / BLOCK_K, rounded up
    K: tl.constexpr,
    N: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_m, tile = matmul.tile_of(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), COUNT * tiles_n, GROUP_M)
    number = tile // tiles_n
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    weight = _chosen(number, weight1, weight2, weight3, weight4, COUNT)
    a_row, b_row = tl.minimum(row, num_rows - 1), tl.minimum(column, N - 1)
    v = matmul.multiply_rows(x, a_row, weight, b_row, steps, K, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    if bias1 is not None:
        bias = _chosen(number, bias1, bias2, bias3, bias4, COUNT)
        v += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    offset = row.to(tl.int64)[:, None] * (COUNT * N) + (number * N + column)[None, :]
    tl.store(y + offset, v, mask=(row < num_rows)[:, None] & (column < N)[None, :])


def linear_fwd(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """x [T, K]; weights: two to four of [N, K]; biases: as many of [N], or none; contiguous and of one dtype.

    Returns y [T, len(weights) * N].
    """
    num_rows, features = x.shape
    size, count = weights[0].size(0), len(weights)
    y = x.new_empty(num_rows, count * size)
    if y.numel() > 0:
        config = configs.choose("linear_fwd", "small", x.device)
        with torch.cuda.device_of(x):
            _linear_fwd_kernel[count * matmul.tiles(config, num_rows, size),](
                x,
                *(weights + weights[:1] * (4 - count)),
                *(biases + biases[:1] * (4 - count) if biases else (None,) * 4),
                y,
                num_rows,
                configs.cdiv(features, config["BLOCK_K"]),
                K=features,
                N=size,
                COUNT=count,
                PRECISION=matmul.precision(x.dtype),
                **config,
            )
    return y


def linear_bwd(
    dy: Tensor, x: Tensor, weights: list[Tensor], need_dx: bool, need_dw: bool, need_db: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dy [T, sum of N]; the rest as `linear_fwd` takes it. Returns dx, dw [sum of N, K], db; empty where not needed."""
    return (
        torch.mm(dy, torch.cat(weights)) if need_dx else x.new_empty(0),
        torch.mm(dy.t(), x) if need_dw else x.new_empty(0),
        dy.sum(0) if need_db else x.new_empty(0),
    )


def cases(arch: int) -> Iterator[configs.Case]:
    config = configs.table(arch)["linear_fwd"]["small"]
    tensors = ("x", *(f"{kind}{number}" for kind in ("weight", "bias") for number in range(1, 5)), "y")
    for kind in ("fp16", "bf16"):
        for features, size, count in ((768, 768, 3), (312, 312, 3), (768, 768, 2), (768, 768, 4), (37, 37, 3)):
            signature = dict.fromkeys(tensors, f"*{kind}") | {"num_rows": "i32", "steps": "i32"}
            sizes = {"K": features, "N": size, "COUNT": count, "PRECISION": "ieee"}
            label = f"{kind}-{count}x{features}x{size}"
            yield configs.Case(label, _linear_fwd_kernel, signature, *configs.split(sizes | config), True)
        sizes |= dict.fromkeys(tensor for tensor in tensors if tensor.startswith("bias"))
        label += "-no-bias"
        yield configs.Case(label, _linear_fwd_kernel, signature, *configs.split(sizes | config), True)
