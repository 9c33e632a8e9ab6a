"""gelu(x W1^T + b1) W2^T. The first product has bias and exact GELU in its epilogue; in the backward, the product that
gives the gradient of the activation turns it into that of the pre-activation, sums the bias's, and recomputes the
activation. The products without an epilogue of their own belong to the vendor's library.

So do all products of float32 where TF32 is not allowed, which have no tensor cores: a thread of Triton's product reads
columns of the weight that lie in the same banks of shared memory, one after another. And those of sizes that are no
multiples of 8, whose rows begin where no vector may. What the epilogues do is then one pass over the product.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import configs, matmul, rows

SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2PI = tl.constexpr(0.3989422804014327)
MINUS_HALF_LOG2_E = tl.constexpr(-0.7213475204444817)
# erfc(x / sqrt(2)) / 2 = t (A1 + t (A2 + ... + t A6)) exp(-x * x / 2), t = 1 / (1 + P x), for x >= 0: the form of
# Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26, with one term more, fitted for the least of the
# largest error over the value plus 1e-5.
P = tl.constexpr(0.2875)
A1 = tl.constexpr(0.11727868)
A2 = tl.constexpr(0.088711655)
A3 = tl.constexpr(0.21260244)
A4 = tl.constexpr(-0.14439103)
A5 = tl.constexpr(0.3221214)
A6 = tl.constexpr(-0.096323112)
# The passes over what the vendor's library multiplied.
_GELU_FWD = configs.fixed("ffn_gelu_fwd", BLOCK_M=8, BLOCK_N=256, num_warps=4)
_GELU_BWD = configs.fixed("ffn_gelu_bwd", BLOCK_M=32, BLOCK_N=128, num_warps=8)
SMALL_ROWS = 512  # up to here large tiles would leave processors idle


@triton.jit
def _normal(v, FP32: tl.constexpr):
    """The normal distribution's share below v, and exp(-v * v / 2).

    Where v is not kept in float32, the share has an error of up to 5e-7, and in the left tail of up to 7e-6 of itself:
    fewer 16-bit numbers get a GELU that is not the exact one, rounded, than by PyTorch's. With erf the epilogue would
    take twice the instructions, and as long as the product before it.
    """
    if FP32:
        below, power = 0.5 * (1.0 + tl.erf(v * SQRT_HALF)), tl.exp(-0.5 * v * v)
    else:
        root = tl.rsqrt(tl.abs(v) * P + 1.0)  # one instruction, where a division takes nine
        t = root * root
        power = tl.exp2(v * v * MINUS_HALF_LOG2_E)
        above = (((((A6 * t + A5) * t + A4) * t + A3) * t + A2) * t + A1) * t * power  # the share above |v|
        below = tl.where(v < 0.0, above, 1.0 - above)
    return below, power


@triton.jit
def _place(m, n, num_rows, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a tile of a [num_rows, N], rows from m and columns from n: where it starts, where its elements lie from there,
    and which of them exist."""
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    offset = row[:, None] * N + column[None, :]
    inside = (row < num_rows - m)[:, None] & (column < N - n)[None, :]
    return m.to(tl.int64) * N + n, offset, inside


@triton.jit
def _ffn_fwd_epilogue(v, m, n, bias, pre, act, num_rows, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """v: float32 [BLOCK_M, BLOCK_N], the product's rows from m and columns from n. The rest as the kernel has it."""
    start, offset, inside = _place(m, n, num_rows, N, BLOCK_M, BLOCK_N)
    column = tl.arange(0, BLOCK_N)
    v += tl.load(bias + n + column, mask=column < N - n, other=0.0).to(tl.float32)[None, :]
    if pre is not None:
        tl.store(pre + start + offset, v, mask=inside)
    below, _ = _normal(v, act.dtype.element_ty == tl.float32)
    tl.store(act + start + offset, v * below, mask=inside)


@triton.jit(do_not_specialize=("num_rows", "steps"))
def _ffn_fwd_kernel(
    x,  # [num_rows, K]
    weight,  # [N, K]
    bias,  # [N]
    pre,  # [num_rows, N] or None
    act,  # [num_rows, N]
    num_rows,
    steps,  # K / BLOCK_K, rounded up
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile_m, tile_n = matmul.tile_of(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    a_row, b_row = tl.minimum(row, num_rows - 1), tl.minimum(column, N - 1)
    v = matmul.multiply_rows(x, a_row, weight, b_row, steps, K, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    left, right = matmul.halves(v, BLOCK_M, BLOCK_N)
    m, n = tile_m * BLOCK_M, tile_n * BLOCK_N
    _ffn_fwd_epilogue(left, m, n, bias, pre, act, num_rows, N, BLOCK_M, BLOCK_N // 2)
    _ffn_fwd_epilogue(right, m, n + BLOCK_N // 2, bias, pre, act, num_rows, N, BLOCK_M, BLOCK_N // 2)


@triton.jit
def _ffn_bwd_epilogue(
    d, m, n, pre, dpre, act, partials, num_rows, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """As `_ffn_fwd_epilogue`; d: of the gradient of the activation."""
    start, offset, inside = _place(m, n, num_rows, N, BLOCK_M, BLOCK_N)
    v = tl.load(pre + start + offset, mask=inside, other=0.0).to(tl.float32)
    below, power = _normal(v, act.dtype.element_ty == tl.float32)
    tl.store(act + start + offset, v * below, mask=inside)
    d *= below + v * power * INVERSE_SQRT_2PI
    tl.store(dpre + start + offset, d, mask=inside)
    sums = tl.sum(tl.where(inside, d, 0.0), 0)
    column = tl.arange(0, BLOCK_N)
    tl.store(partials + (m // BLOCK_M).to(tl.int64) * N + n + column, sums, mask=column < N - n)


@triton.jit(do_not_specialize=("num_rows", "steps"))
def _ffn_bwd_kernel(
    dy,  # [num_rows, K]
    weight,  # [K, N]
    pre,  # [num_rows, N]
    dpre,  # [num_rows, N]
    act,  # [num_rows, N]
    partials,  # float32 [tiles of rows, N], of the bias's gradient
    num_rows,
    steps,  # K / BLOCK_K, rounded up
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile_m, tile_n = matmul.tile_of(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    a_offset = tl.minimum(row, num_rows - 1).to(tl.int64) * K
    b_inside = None if N % BLOCK_N == 0 else column < N
    d = matmul.multiply(
        dy,
        a_offset,
        weight,
        column.to(tl.int64),
        b_inside,
        K,
        None,
        steps,
        1,
        N,
        K % BLOCK_K == 0,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        PRECISION,
    )
    left, right = matmul.halves(d, BLOCK_M, BLOCK_N)
    m, n = tile_m * BLOCK_M, tile_n * BLOCK_N
    _ffn_bwd_epilogue(left, m, n, pre, dpre, act, partials, num_rows, N, BLOCK_M, BLOCK_N // 2)
    _ffn_bwd_epilogue(right, m, n + BLOCK_N // 2, pre, dpre, act, partials, num_rows, N, BLOCK_M, BLOCK_N // 2)


@triton.jit(do_not_specialize=("num_rows",))
def _ffn_gelu_fwd_kernel(
    bias,  # [N]
    pre,  # [num_rows, N] or None
    act,  # [num_rows, N], which holds the product until it is replaced
    num_rows,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    start, offset, inside = _place(m, n, num_rows, N, BLOCK_M, BLOCK_N)
    v = tl.load(act + start + offset, mask=inside, other=0.0).to(tl.float32)
    _ffn_fwd_epilogue(v, m, n, bias, pre, act, num_rows, N, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=("num_rows",))
def _ffn_gelu_bwd_kernel(
    pre,  # [num_rows, N]
    dpre,  # [num_rows, N], which holds the gradient of the activation until it is replaced
    act,  # [num_rows, N]
    partials,  # float32 [tiles of rows, N], of the bias's gradient
    num_rows,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    start, offset, inside = _place(m, n, num_rows, N, BLOCK_M, BLOCK_N)
    d = tl.load(dpre + start + offset, mask=inside, other=0.0).to(tl.float32)
    _ffn_bwd_epilogue(d, m, n, pre, dpre, act, partials, num_rows, N, BLOCK_M, BLOCK_N)


def _by_vendor(x: Tensor, inner: int) -> bool:
    """Whether the vendor's library multiplies x [T, K] by a weight [inner, K], or [K, inner], too: see the top of this
    file."""
    exact = x.dtype is torch.float32 and matmul.precision(x.dtype) == "ieee"
    return exact or x.size(1) % 8 != 0 or inner % 8 != 0


def _blocks(config: dict[str, int], result: Tensor) -> tuple[int, int]:
    """The grid of a pass over a matrix."""
    return configs.cdiv(result.size(0), config["BLOCK_M"]), configs.cdiv(result.size(1), config["BLOCK_N"])


def _config(kernel: str, x: Tensor) -> dict[str, int]:
    if x.dtype is torch.float32:
        shape_class = "tf32"
    else:
        shape_class = "small" if x.size(0) <= SMALL_ROWS else "large"
    return configs.choose(kernel, shape_class, x.device)


def ffn_fwd(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """x [T, K]; w1 [N, K]; b1 [N]; w2 [M, N]; contiguous and of one dtype.

    Returns y [T, M] and the pre-activation [T, N] (empty unless save is set).
    """
    num_rows, features = x.shape
    inner = w1.size(0)
    by_vendor = _by_vendor(x, inner)
    act = torch.mm(x, w1.t()) if by_vendor else x.new_empty(num_rows, inner)
    pre = torch.empty_like(act) if save else None
    if act.numel() > 0:
        with torch.cuda.device_of(x):
            if by_vendor:
                _ffn_gelu_fwd_kernel[_blocks(_GELU_FWD, act)](b1, pre, act, num_rows, N=inner, **_GELU_FWD)
            else:
                config = _config("ffn_fwd", x)
                _ffn_fwd_kernel[matmul.tiles(config, num_rows, inner),](
                    x,
                    w1,
                    b1,
                    pre,
                    act,
                    num_rows,
                    configs.cdiv(features, config["BLOCK_K"]),
                    K=features,
                    N=inner,
                    PRECISION=matmul.precision(x.dtype),
                    **config,
                )
    return torch.mm(act, w2.t()), x.new_empty(0) if pre is None else pre


def ffn_bwd(
    dy: Tensor,
    x: Tensor,
    pre: Tensor,
    w1: Tensor,
    w2: Tensor,
    need_dx: bool,
    need_dw1: bool,
    need_db1: bool,
    need_dw2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dy [T, M]; the rest as `ffn_fwd` takes and gives it. Returns dx, dw1, db1, dw2; those not needed are empty."""
    num_rows, inner = pre.shape
    db1 = w1.new_empty(inner if need_db1 else 0)
    if pre.numel() == 0:
        dx, dw1, dw2 = (
            torch.zeros_like(value) if need else value.new_empty(0)
            for value, need in ((x, need_dx), (w1, need_dw1), (w2, need_dw2))
        )
        return dx, dw1, db1.zero_(), dw2
    by_vendor = _by_vendor(dy, inner)
    dpre, act = torch.mm(dy, w2) if by_vendor else torch.empty_like(pre), torch.empty_like(pre)
    config = _GELU_BWD if by_vendor else _config("ffn_bwd", x)
    partials = pre.new_empty(1, configs.cdiv(num_rows, config["BLOCK_M"]), inner, dtype=torch.float32)
    with torch.cuda.device_of(x):
        if by_vendor:
            _ffn_gelu_bwd_kernel[_blocks(config, pre)](pre, dpre, act, partials, num_rows, N=inner, **config)
        else:
            _ffn_bwd_kernel[matmul.tiles(config, num_rows, inner),](
                dy,
                w2,
                pre,
                dpre,
                act,
                partials,
                num_rows,
                configs.cdiv(dy.size(1), config["BLOCK_K"]),
                K=dy.size(1),
                N=inner,
                PRECISION=matmul.precision(x.dtype),
                **config,
            )
        if need_db1:
            rows.sum_partials(partials, (db1,))
    return (
        torch.mm(dpre, w1) if need_dx else x.new_empty(0),
        torch.mm(dpre.t(), x) if need_dw1 else x.new_empty(0),
        db1,
        torch.mm(dy.t(), act) if need_dw2 else x.new_empty(0),
    )


def cases(arch: int) -> Iterator[configs.Case]:
    table = configs.table(arch)
    tensors = {"ffn_fwd": ("x", "weight", "bias", "pre", "act"), "ffn_bwd": ("dy", "weight", "pre", "dpre", "act")}
    for name, kernel in (("ffn_fwd", _ffn_fwd_kernel), ("ffn_bwd", _ffn_bwd_kernel)):
        for shape_class, config in table[name].items():
            for kind in ("fp32",) if shape_class == "tf32" else ("fp16", "bf16"):
                for hidden, inner in ((768, 3072), (312, 1200)):
                    sizes = {"K": hidden, "N": inner, "PRECISION": "tf32" if kind == "fp32" else "ieee"}
                    signature = dict.fromkeys(tensors[name], f"*{kind}") | {"num_rows": "i32", "steps": "i32"}
                    signature |= {"partials": "*fp32"} if name == "ffn_bwd" else {}
                    label = f"{kind}-{shape_class}-{hidden}x{inner}"
                    together = 1 if shape_class == "small" else 2
                    yield configs.Case(label, kernel, signature, *configs.split(sizes | config), True, together)
                    if name == "ffn_fwd":
                        launch = configs.split(sizes | config | {"pre": None})
                        yield configs.Case(f"{label}-inference", kernel, signature, *launch, True, together)
    for kernel, config, names in (
        (_ffn_gelu_fwd_kernel, _GELU_FWD, ("bias", "pre", "act")),
        (_ffn_gelu_bwd_kernel, _GELU_BWD, ("pre", "dpre", "act", "partials")),
    ):
        for kind, inner in (("fp32", 3072), ("fp32", 1200), *((kind, 255) for kind in ("fp32", "fp16", "bf16"))):
            signature = dict.fromkeys(names, f"*{kind}") | {"num_rows": "i32"}
            signature |= {"partials": "*fp32"} if "partials" in names else {}
            yield configs.Case(f"{kind}-{inner}", kernel, signature, *configs.split(config | {"N": inner}), False)
            if kernel is _ffn_gelu_fwd_kernel:
                launch = configs.split(config | {"N": inner, "pre": None})
                yield configs.Case(f"{kind}-{inner}-inference", kernel, signature, *launch, False)
