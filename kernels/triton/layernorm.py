"""LayerNorm(dropout(x + x_bias) + residual): a program holds whole rows in registers, so that each value is read once.

The gradients of weight, bias and x_bias are sums over all rows: each of a fixed number of programs sums its own rows,
and a second kernel sums the programs. Beside rows of more than 4096 columns, registers have room for two of the three:
PyTorch sums x_bias's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import configs, dropout, rows


@triton.jit(do_not_specialize=("num_rows", "threshold"))
def _layernorm_fwd_kernel(
    x,  # [num_rows, HIDDEN]
    x_bias,  # [HIDDEN] or None
    residual,  # [num_rows, HIDDEN] or None
    weight,  # [HIDDEN]
    bias,  # [HIDDEN]
    y,  # [num_rows, HIDDEN]
    z,  # [num_rows, HIDDEN], the sum before the norm, or None
    mean,  # float32 [num_rows] or None
    rstd,  # float32 [num_rows] or None
    seed,  # int64 [1], or None without dropout
    num_rows,
    eps,
    threshold,
    keep_scale,
    HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    offset = row.to(tl.int64)[:, None] * HIDDEN + column[None, :]
    inside = (row < num_rows)[:, None] & (column < HIDDEN)[None, :]
    v = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    if x_bias is not None:
        v += tl.load(x_bias + column, mask=column < HIDDEN, other=0.0).to(tl.float32)[None, :]
    if seed is not None:
        v = tl.where(dropout.keep_rows(seed, threshold, row, BLOCK_M, BLOCK_N), v * keep_scale, 0.0)
    if residual is not None:
        v += tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
    # The statistics are those of the sum as the backward will find it: in a row that is constant but for rounding,
    # other ones would be far off.
    v = v.to(y.dtype.element_ty).to(tl.float32)
    if z is not None:
        tl.store(z + offset, v, mask=inside)
    average, inverse, centred = rows.standardize(v, column, eps, HIDDEN, y.dtype.element_ty != tl.float32)
    if mean is not None:
        tl.store(mean + row, average, mask=row < num_rows)
        tl.store(rstd + row, inverse, mask=row < num_rows)
    w = tl.load(weight + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
    tl.store(y + offset, centred * inverse[:, None] * w[None, :] + b[None, :], mask=inside)


@triton.jit(do_not_specialize=("num_rows", "threshold"))
def _layernorm_bwd_kernel(
    dy,  # [num_rows, HIDDEN]
    z,  # [num_rows, HIDDEN]
    weight,  # [HIDDEN]
    mean,  # float32 [num_rows]
    rstd,  # float32 [num_rows]
    dz,  # [num_rows, HIDDEN]
    dx,  # [num_rows, HIDDEN], or None without dropout
    partials,  # float32 [2 or 3, programs, HIDDEN]: of dweight, dbias, dx_bias
    seed,  # int64 [1], or None without dropout
    num_rows,
    threshold,
    keep_scale,
    X_BIAS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    column = tl.arange(0, BLOCK_N)
    w = tl.load(weight + column, mask=column < HIDDEN, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dx_bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in tl.range(program, tl.cdiv(num_rows, BLOCK_M), programs, num_stages=STAGES):
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        offset = row.to(tl.int64)[:, None] * HIDDEN + column[None, :]
        inside = (row < num_rows)[:, None] & (column < HIDDEN)[None, :]
        g = tl.load(dy + offset, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(z + offset, mask=inside, other=0.0).to(tl.float32)
        average = tl.load(mean + row, mask=row < num_rows, other=0.0)
        inverse = tl.load(rstd + row, mask=row < num_rows, other=0.0)[:, None]
        xhat = (v - average[:, None]) * inverse
        dbias += g
        dweight += g * xhat
        g *= w  # zero outside, whatever xhat is there
        d = rows.standardize_bwd(g, xhat, inverse, HIDDEN)
        tl.store(dz + offset, d, mask=inside)
        if seed is not None:
            d = tl.where(dropout.keep_rows(seed, threshold, row, BLOCK_M, BLOCK_N), d * keep_scale, 0.0)
            tl.store(dx + offset, d, mask=inside)
        if X_BIAS:
            dx_bias += d
    out = partials + program * HIDDEN + column
    part = programs.to(tl.int64) * HIDDEN
    tl.store(out, tl.sum(dweight, 0), mask=column < HIDDEN)
    tl.store(out + part, tl.sum(dbias, 0), mask=column < HIDDEN)
    if X_BIAS:
        tl.store(out + 2 * part, tl.sum(dx_bias, 0), mask=column < HIDDEN)


_SUMS_X_BIAS = 4096  # columns at most


def shape_class(hidden: int) -> str:
    """Rows as long as registers hold them: padded to a power of two, the short ones together."""
    return str(max(256, configs.next_power_of_2(hidden)))


def shape_class_bwd(hidden: int, dtype: torch.dtype) -> str:
    """The same of backwards, whose loads in float32 take twice the room."""
    return shape_class(hidden) + "-fp32" * (dtype is torch.float32)


def layernorm_fwd(
    x: Tensor,
    x_bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual [T, H]; weight, bias, x_bias [H]; all contiguous. H may be at most 8192.

    Returns y [T, H], z [T, H] (the sum before the norm, where save is set and it is not x), mean and rstd float32 [T]
    (where save is set); what is not asked for is empty.
    """
    num_rows, hidden = x.shape
    y = x.new_empty(x.shape, dtype=x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))
    changed = x_bias is not None or residual is not None or dropout_p > 0.0
    z = torch.empty_like(y) if save and changed else None
    mean = x.new_empty(num_rows if save else 0, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if num_rows > 0:
        config = configs.choose("layernorm_fwd", shape_class(hidden), x.device)
        with torch.cuda.device_of(x):
            _layernorm_fwd_kernel[(configs.cdiv(num_rows, config["BLOCK_M"]),)](
                x,
                x_bias,
                residual,
                weight,
                bias,
                y,
                z,
                mean if save else None,
                rstd if save else None,
                seed if dropout_p > 0.0 else None,
                num_rows,
                eps,
                *dropout.scalars(dropout_p),
                HIDDEN=hidden,
                BLOCK_N=rows.block_columns(hidden),
                **config,
            )
    return y, y.new_empty(0) if z is None else z, mean, rstd


def layernorm_bwd(
    dy: Tensor,
    z: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    need_x_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dy, z [T, H]; the rest as `layernorm_fwd` takes and gives it.

    Returns dz [T, H], dx [T, H] (empty without dropout, when it is dz), dweight and dbias [H] in weight's dtype,
    dx_bias float32 [H] (if asked for).
    """
    num_rows, hidden = z.shape
    dz = torch.empty_like(z)
    dx = torch.empty_like(z) if dropout_p > 0.0 else None
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    sum_x_bias = need_x_bias and hidden <= _SUMS_X_BIAS
    dx_bias = mean.new_empty(hidden if sum_x_bias else 0)
    most, config = rows.launch(configs.choose("layernorm_bwd", shape_class_bwd(hidden, z.dtype), z.device))
    block_n = rows.block_columns(hidden)
    programs = max(1, min(configs.cdiv(num_rows, config["BLOCK_M"]), most * rows.processors(z.device)))
    partials = mean.new_empty(3 if sum_x_bias else 2, programs, hidden)
    with torch.cuda.device_of(z):
        _layernorm_bwd_kernel[(programs,)](
            dy,
            z,
            weight,
            mean,
            rstd,
            dz,
            dx,
            partials,
            seed if dropout_p > 0.0 else None,
            num_rows,
            *dropout.scalars(dropout_p),
            X_BIAS=sum_x_bias,
            HIDDEN=hidden,
            BLOCK_N=block_n,
            STAGES=rows.stages(config["BLOCK_M"], hidden, z.dtype),
            **config,
        )
        rows.sum_partials(partials, (dweight, dbias, dx_bias)[: len(partials)])
    if need_x_bias and not sum_x_bias:
        dx_bias = torch.sum(dz if dx is None else dx, 0, dtype=torch.float32)
    return dz, z.new_empty(0) if dx is None else dx, dweight, dbias, dx_bias


def cases(arch: int) -> Iterator[configs.Case]:
    table = configs.table(arch)
    plain = {"num_rows": "i32", "eps": "fp32", "threshold": "i32", "keep_scale": "fp32", "seed": "*i64"}
    plain |= dict.fromkeys(("weight", "bias", "mean", "rstd", "partials"), "*fp32")

    def case(
        kernel: triton.JITFunction,
        name: str,
        hidden: int,
        dtype: torch.dtype,
        types: Mapping[str, str],
        **constants: Any,
    ) -> configs.Case:
        """Tensors are of dtype, but for those that `types` names."""
        if kernel is _layernorm_fwd_kernel:
            config = table["layernorm_fwd"][shape_class(hidden)]
        else:
            config = table["layernorm_bwd"][shape_class_bwd(hidden, dtype)]
            constants |= {"X_BIAS": hidden <= _SUMS_X_BIAS, "STAGES": rows.stages(config["BLOCK_M"], hidden, dtype)}
            constants |= {"dx": None} if "seed" in constants else {}
        states = dict.fromkeys(("x", "x_bias", "residual", "y", "z", "dy", "dz", "dx"), f"*{rows.NAMES[dtype]}")
        known = states | plain | types
        together, config = rows.launch(config)
        launch = configs.split({"HIDDEN": hidden, "BLOCK_N": rows.block_columns(hidden)} | constants | config)
        signature = {argument: known[argument] for argument in kernel.arg_names if argument in known}
        return configs.Case(name, kernel, signature, *launch, False, together)

    both = _layernorm_fwd_kernel, _layernorm_bwd_kernel
    for hidden, dtype in rows.WIDTHS:
        for kind, off in (("dropout", {}), ("plain", {"seed": None})):
            for kernel in both:
                yield case(kernel, rows.label(kind, hidden, dtype), hidden, dtype, {}, **off)
    for hidden in (384, 768, 1024, 8192):
        for kernel in both:
            weights = dict.fromkeys(("weight", "bias"), "*bf16")
            yield case(kernel, f"weights-{hidden}", hidden, torch.bfloat16, weights)
        yield case(_layernorm_fwd_kernel, f"autocast-{hidden}", hidden, torch.float32, {"x": "*bf16"})
        unsaved = dict.fromkeys(("z", "mean", "rstd", "seed"))
        yield case(_layernorm_fwd_kernel, f"inference-{hidden}", hidden, torch.bfloat16, {}, **unsaved)
