"""The labelled rows of the hidden states, and the product with bias and GELU that the masked language model's head
begins with, for these alone.

How many rows are labelled only the device knows. They come first in what this makes, in their order, and programs for
rows beyond ask the count and have little to do, as in mlm_loss.py, whose products the backward has, too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import configs, ffn, matmul, mlm_loss, rows

_COMPACT = configs.fixed("mlm_transform_compact", BLOCK=4096, num_warps=8)
_GATHER = configs.fixed("mlm_transform_gather", BLOCK_M=8, num_warps=4)
_DPRE = configs.fixed("mlm_transform_dpre", BLOCK_M=32, BLOCK_N=128, num_warps=4)


@triton.jit(do_not_specialize=("num_rows", "ignore_index"))
def _mlm_transform_compact_kernel(
    labels,  # int64 [num_rows]
    index,  # int32 [num_rows]: the labelled rows first, in their order; 0 behind them
    front,  # int64 [num_rows]: their labels; ignore_index behind them
    count,  # int32 [1]: how many there are
    num_rows,
    ignore_index,
    BLOCK: tl.constexpr,
):
    total = 0
    for first in range(0, num_rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        label = tl.load(labels + row, mask=row < num_rows, other=0)
        labelled = (row < num_rows) & (label != ignore_index)
        place = total + tl.cumsum(labelled.to(tl.int32), 0) - 1
        place = tl.where(labelled, place, num_rows - row + place)  # the others from the end on, backwards
        tl.store(index + place, tl.where(labelled, row, 0), mask=row < num_rows)
        tl.store(front + place, label, mask=row < num_rows)
        total += tl.sum(labelled.to(tl.int32), 0)
    tl.store(count, total)


@triton.jit
def _mlm_transform_gather_kernel(
    h,  # [num_rows, HIDDEN]
    index,  # int32 [num_rows]
    count,  # int32 [1]
    out,  # [num_rows, HIDDEN]: the labelled rows of h
    HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = row < tl.load(count)
    source = tl.load(index + row, mask=live, other=0).to(tl.int64)
    inside = live[:, None] & (column < HIDDEN)[None, :]
    values = tl.load(h + source[:, None] * HIDDEN + column[None, :], mask=inside, other=0.0)
    tl.store(out + row.to(tl.int64)[:, None] * HIDDEN + column[None, :], values, mask=inside)


@triton.jit(do_not_specialize=("num_rows", "steps"))
def _mlm_transform_fwd_kernel(
    h,  # [num_rows, HIDDEN]
    weight,  # [HIDDEN, HIDDEN]
    bias,  # [HIDDEN]
    index,  # int32 [num_rows]
    count,  # int32 [1]
    pre,  # [num_rows, HIDDEN] or None
    act,  # [num_rows, HIDDEN]
    num_rows,
    steps,  # HIDDEN / BLOCK_K, rounded up
    HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile_m, tile_n = matmul.tile_of(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), tl.cdiv(HIDDEN, BLOCK_N), GROUP_M)
    m, n = tile_m * BLOCK_M, tile_n * BLOCK_N
    column = n + tl.arange(0, BLOCK_N)
    number = tl.load(count)
    if m < number:
        a_row = tl.load(index + tl.minimum(m + tl.arange(0, BLOCK_M), number - 1))
        b_row = tl.minimum(column, HIDDEN - 1)
        v = matmul.multiply_rows(h, a_row, weight, b_row, steps, HIDDEN, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    else:  # LayerNorm goes over these rows, too: of equal numbers, with an eps of 0, it would make NaN
        v = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) + (column % 2 * 2048).to(tl.float32)[None, :]
    left, right = matmul.halves(v, BLOCK_M, BLOCK_N)
    ffn._ffn_fwd_epilogue(left, m, n, bias, pre, act, num_rows, HIDDEN, BLOCK_M, BLOCK_N // 2)
    ffn._ffn_fwd_epilogue(right, m, n + BLOCK_N // 2, bias, pre, act, num_rows, HIDDEN, BLOCK_M, BLOCK_N // 2)


@triton.jit(do_not_specialize=("num_rows",))
def _mlm_transform_dpre_kernel(
    dact,  # [num_rows, HIDDEN]
    pre,  # [num_rows, HIDDEN]
    count,  # int32 [1]
    dpre,  # [num_rows, WIDTH], of which the labelled rows are written, with 0 from HIDDEN on
    partials,  # float32 [tiles of rows, HIDDEN], of the bias's gradient
    num_rows,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = row < tl.minimum(tl.load(count), num_rows)
    inside = live[:, None] & (column < HIDDEN)[None, :]
    offset = row.to(tl.int64)[:, None] * HIDDEN + column[None, :]
    v = tl.load(pre + offset, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dact + offset, mask=inside, other=0.0).to(tl.float32)
    below, power = ffn._normal(v, pre.dtype.element_ty == tl.float32)
    d *= below + v * power * ffn.INVERSE_SQRT_2PI
    to = dpre + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(to, d, mask=live[:, None] & (column < WIDTH)[None, :])
    tl.store(partials + tl.program_id(0).to(tl.int64) * HIDDEN + column, tl.sum(d, 0), mask=column < HIDDEN)


def mlm_transform_fwd(
    hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, ignore_index: int, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden [N, H]; labels int64 [N]; weight [H, H]; bias [H]; contiguous, and of one dtype but for the labels.

    Returns, the labelled rows first: act [N, H], the other rows of which mean nothing; labels int64 [N], the others
    ignore_index; index int32 [N], which rows of hidden they are; count int32 [1]; and, like act, the pre-activation
    (empty unless save is set).
    """
    num_rows, features = hidden.shape
    index, front = torch.empty_like(labels, dtype=torch.int32), torch.empty_like(labels)
    count = index.new_empty(1)
    act = torch.empty_like(hidden)
    pre = torch.empty_like(hidden) if save else None
    if num_rows == 0:
        count.zero_()
    else:
        config = mlm_loss.config("mlm_transform_fwd", hidden)
        with torch.cuda.device_of(hidden):
            _mlm_transform_compact_kernel[(1,)](labels, index, front, count, num_rows, ignore_index, **_COMPACT)
            _mlm_transform_fwd_kernel[matmul.tiles(config, num_rows, features),](
                hidden,
                weight,
                bias,
                index,
                count,
                pre,
                act,
                num_rows,
                configs.cdiv(features, config["BLOCK_K"]),
                HIDDEN=features,
                PRECISION=matmul.precision(hidden.dtype),
                **config,
            )
    return act, front, index, count, hidden.new_empty(0) if pre is None else pre


def mlm_transform_bwd(
    dact: Tensor,
    hidden: Tensor,
    pre: Tensor,
    index: Tensor,
    count: Tensor,
    weight: Tensor,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dact [N, H], the rest as `mlm_transform_fwd` takes and gives it. Rows of dact from count on are not read.

    Returns dhidden, dweight, dbias; those not needed are empty.
    """
    num_rows, features = hidden.shape
    dhidden = torch.zeros_like(hidden) if need_dhidden else hidden.new_empty(0)
    dbias = hidden.new_empty(features if need_dbias else 0)
    if num_rows == 0:
        return dhidden, torch.zeros_like(weight) if need_dweight else hidden.new_empty(0), dbias.zero_()
    dweight = torch.empty_like(weight) if need_dweight else hidden.new_empty(0)
    dh_config = mlm_loss.config("mlm_loss_dh", hidden)
    dweight_config = mlm_loss.config("mlm_transform_dweight", hidden)
    width = mlm_loss.padded(features, dh_config["BLOCK_K"], dweight_config["BLOCK_M"])
    dpre = hidden.new_empty(num_rows, width)
    grid = configs.cdiv(num_rows, _DPRE["BLOCK_M"]), configs.cdiv(width, _DPRE["BLOCK_N"])
    partials = hidden.new_empty(1, grid[0], features, dtype=torch.float32)
    product = {"PRECISION": matmul.precision(hidden.dtype), "SCALE": 1.0}
    with torch.cuda.device_of(hidden):
        _mlm_transform_dpre_kernel[grid](
            dact, pre, count, dpre, partials, num_rows, HIDDEN=features, WIDTH=width, **_DPRE
        )
        if need_dbias:
            rows.sum_partials(partials, (dbias,))
        if need_dhidden:
            mlm_loss._mlm_loss_dh_kernel[matmul.tiles(dh_config, num_rows, features),](
                dpre, weight, index, count, dhidden, 0, num_rows, features, width,
                HIDDEN=features, **product, **dh_config,
            )  # fmt: skip
        if need_dweight:
            labelled = torch.empty_like(hidden)
            block = min(512, configs.next_power_of_2(features))
            _mlm_transform_gather_kernel[configs.cdiv(num_rows, _GATHER["BLOCK_M"]), configs.cdiv(features, block)](
                hidden, index, count, labelled, HIDDEN=features, BLOCK_N=block, **_GATHER
            )
            mlm_loss._mlm_loss_dweight_kernel[matmul.tiles(dweight_config, features, features),](
                dpre, labelled, count, dweight, 0, num_rows, features,
                WIDTH=width, HIDDEN=features, **product, **dweight_config,
            )  # fmt: skip
    return dhidden, dweight, dbias


def cases(arch: int) -> Iterator[configs.Case]:
    yield mlm_loss.case(_mlm_transform_compact_kernel, "bf16", _COMPACT)
    for hidden in (768, 312):
        sizes = {"HIDDEN": hidden}
        for kind in ("fp32", "fp16", "bf16"):
            yield mlm_loss.case(_mlm_transform_gather_kernel, kind, sizes | {"BLOCK_N": 512} | _GATHER, f"-{hidden}")
            launch = sizes | {"WIDTH": mlm_loss.padded(hidden)} | _DPRE
            yield mlm_loss.case(_mlm_transform_dpre_kernel, kind, launch, f"-{hidden}")
        for shape_class, config in configs.table(arch)["mlm_transform_dweight"].items():
            for kind in mlm_loss.kinds(shape_class):
                launch = sizes | {"WIDTH": mlm_loss.padded(hidden), "SCALE": 1.0} | config
                yield mlm_loss.case(mlm_loss._mlm_loss_dweight_kernel, kind, launch, f"-{hidden}", True)
        for shape_class, config in configs.table(arch)["mlm_transform_fwd"].items():
            for kind in mlm_loss.kinds(shape_class):
                launch = sizes | config
                yield mlm_loss.case(_mlm_transform_fwd_kernel, kind, launch, f"-{hidden}", True)
                without = launch | {"pre": None}
                yield mlm_loss.case(_mlm_transform_fwd_kernel, kind, without, f"-{hidden}-inference", True)
