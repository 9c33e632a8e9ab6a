"""Attention over packed sequences: launches the kernels of attention_fwd.py and attention_bwd.py.

Up to 128 tokens a sequence, a program holds a whole head, where its registers have room. Otherwise the forward has a
program for each tile of queries, and the backward one for each tile of keys, which forms the scores once (five matrix
products) and adds what it has for dQ to a float32 copy by atomics. A deterministic backward, and that of float32, is
two passes (seven products), dQ by tiles of queries and dK, dV by tiles of keys, without atomics. What a backward in 16
bits reads and adds in every step lies in tiles of its own, padded at the end of a sequence: loads are vectors, and
nothing is masked. The tiles of a ragged batch are found from cu_seqlens on the device
(`attention_tiles.find_tile`), so that the host never waits. The gradient of a bias is a pass of its own.

The forward of heads up to 64 in 16 bits, without a bias, has four warps a program and two programs a multiprocessor,
one of which multiplies while the other is in its softmax (as FlashAttention-2 and PyTorch's FlexAttention have it, by
measurements on A100 and H100).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastbert.kernels import attention_bwd as bwd
from fastbert.kernels import attention_fwd as fwd
from fastbert.kernels import configs, dropout, rows

_PADDED, _DROPOUT = "-padded", "-dropout"  # what a shape class of their own is called after
_PADDED_SIZES = {32: 24, 64: 40, 128: 80}  # one head size of all that are padded to the key: code for others is alike
_TILE = configs.fixed("attention_bwd_tiles", num_warps=4)  # before and after the backward, once over the tokens
_BIAS_PROGRAMS = 4  # a multiprocessor, for the gradient of a bias
_BIAS_SUMMANDS = 64  # that one of them adds up in turn: rounding errors of long sums in float32 are worse than eager's


def attention_fwd(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    bias: Tensor | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """qkv [T, 3, h, d], contiguous; the rest as in `fastbert.ops.attention`, bias in float32 and contiguous.
    deterministic: for the backward alone.

    Returns out [T, h * d] and lse float32 [h, T], the log-sum-exp of each query's scores.
    """
    total, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(total, heads * head_dim)
    lse = qkv.new_empty(heads, total, dtype=torch.float32)
    if total == 0:
        return out, lse
    if bias is not None:
        bias = _aligned(bias)
    batch = cu_seqlens.numel() - 1
    scalars = _scalars(qkv, batch, scale, dropout_p, bias)
    constants = _constants(qkv, scale, bias)
    block_s = _short("attention_fwd_short", qkv, max_seqlen, bias)
    with torch.cuda.device_of(qkv):
        if block_s:
            config = _config("attention_fwd_short", qkv, bias, seed, block_s)
            fwd._attention_fwd_short_kernel[batch * heads,](
                qkv, out, lse, cu_seqlens, seed, bias, *scalars, **constants, BLOCK_S=block_s, **config
            )
        else:
            config = _config("attention_fwd", qkv, bias, seed)
            fwd._attention_fwd_kernel[total // config["BLOCK_M"] + batch, heads](
                qkv, out, lse, cu_seqlens, seed, bias, *scalars, **constants, **config
            )
    return out, lse


def attention_bwd(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    bias: Tensor | None,
    need_dbias: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """dout, out [T, h * d] and qkv contiguous; lse of the forward.

    Returns dqkv [T, 3, h, d] and dbias, shaped like bias (empty unless need_dbias). Repeats bit for bit if
    deterministic.
    """
    total, _, heads, _ = qkv.shape
    dqkv = torch.empty_like(qkv)
    dbias = torch.zeros_like(bias) if need_dbias and bias is not None else lse.new_empty(0)
    if total == 0:
        return dqkv, dbias
    if bias is not None:
        bias = _aligned(bias)
    batch = cu_seqlens.numel() - 1
    scalars = _scalars(qkv, batch, scale, dropout_p, bias)
    constants = _constants(qkv, scale, bias)
    block_s = _short("attention_bwd_short", qkv, max_seqlen, bias)
    with torch.cuda.device_of(qkv):
        if block_s:
            delta = torch.empty_like(lse) if need_dbias else None
            config = _config("attention_bwd_short", qkv, bias, seed, block_s)
            bwd._attention_bwd_short_kernel[batch * heads,](
                dout, qkv, lse, delta, dqkv, cu_seqlens, seed, bias, *scalars, **constants, BLOCK_S=block_s, **config
            )
        else:
            delta = torch.empty_like(lse)
            if qkv.dtype is torch.float32:
                lse = lse.new_empty(2, heads, total)  # which attention_bwd_dq writes
            _bwd_long(dout, qkv, out, lse, delta, dqkv, cu_seqlens, seed, bias, scalars, constants, deterministic)
        if need_dbias:
            config = _config("attention_bwd_dbias", qkv, bias, seed)
            one_row = dbias.size(2) == 1
            tiles = configs.cdiv(max_seqlen if one_row else dbias.size(2), config["BLOCK_M"])
            grid = dbias.size(0) * dbias.size(1), tiles, configs.cdiv(dbias.size(3), config["BLOCK_N"])
            parts = _bias_parts(batch * heads // grid[0], math.prod(grid), qkv.device)
            partials = dbias[None]
            if parts > 1 or one_row:
                partials = dbias.new_empty(parts, *dbias.shape[:2], tiles if one_row else dbias.size(2), dbias.size(3))
            bwd._attention_bwd_dbias_kernel[parts * grid[0], *grid[1:]](
                dout, qkv, lse, delta, partials, cu_seqlens, seed, bias, *scalars, *partials.shape[1:], parts,
                **constants, ONE_ROW=one_row, **config,
            )  # fmt: skip
            if partials.data_ptr() != dbias.data_ptr():
                torch.sum(partials.sum(3, keepdim=True) if one_row else partials, 0, out=dbias)
    return dqkv, dbias


def _bwd_long(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    delta: Tensor,
    dqkv: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    bias: Tensor | None,
    scalars: tuple[int | float, ...],
    constants: dict[str, Any],
    deterministic: bool,
) -> None:
    """Writes dqkv and delta, float32 [h, T]; in float32 lse, [2, h, T], too."""
    batch, total, heads, scale = scalars[:4]
    head_dim = qkv.size(3)
    two_passes = qkv.dtype is torch.float32 or deterministic
    config = _config("attention_bwd_dkdv" if two_passes else "attention_bwd", qkv, bias, seed)
    slots = total // config["BLOCK_M"] + batch
    stats = dq_sum = None
    if qkv.dtype is not torch.float32:
        stats = lse.new_empty(heads, slots, 2, config["BLOCK_M"])
        dq_sum = None if two_passes else lse.new_empty(heads, slots, config["BLOCK_M"], _block_d(head_dim))
        bwd._attention_bwd_begin_kernel[slots, heads](
            dout, out, lse, delta, stats, dq_sum, cu_seqlens, batch, total, heads,
            **constants, BLOCK_M=config["BLOCK_M"], **_TILE,
        )  # fmt: skip
    if two_passes:
        dq_config = _config("attention_bwd_dq", qkv, bias, seed)
        bwd._attention_bwd_dq_kernel[total // dq_config["BLOCK_M"] + batch, heads](
            dout, qkv, lse, delta, dqkv, cu_seqlens, seed, bias, *scalars, **constants, **dq_config
        )
    bwd._attention_bwd_dkdv_kernel[total // config["BLOCK_N"] + batch, heads](
        dout, qkv, lse, delta, stats, dqkv, dq_sum, cu_seqlens, seed, bias,
        *scalars, **constants, **config,
    )  # fmt: skip
    if dq_sum is not None:
        bwd._attention_bwd_end_kernel[slots, heads](
            dq_sum, dqkv, cu_seqlens, batch, heads, scale,
            HEAD_DIM=head_dim, BLOCK_D=_block_d(head_dim), BLOCK_M=config["BLOCK_M"], **_TILE,
        )  # fmt: skip


def _bias_parts(shared: int, programs: int, device: torch.device) -> int:
    """In how many parts the gradient of a bias is summed that as many sequences and heads share, and that takes as many
    programs as one part: enough to fill the GPU, and for short sums."""
    filled = configs.cdiv(_BIAS_PROGRAMS * rows.processors(device), programs)
    return min(shared, max(filled, configs.cdiv(shared, _BIAS_SUMMANDS)))


def _scalars(qkv: Tensor, batch: int, scale: float, dropout_p: float, bias: Tensor | None) -> tuple[int | float, ...]:
    """What every kernel takes after its pointers, from `batch` to `bias_width`."""
    total, _, heads, _ = qkv.shape
    threshold, keep_scale = dropout.scalars(dropout_p)
    quads = (0, 0, 0, 0)
    if bias is not None:
        strides = (bias.stride(dim) if bias.size(dim) > 1 else 0 for dim in range(3))
        quads = tuple(size // 4 for size in (*strides, bias.size(3)))
    return batch, total, heads, scale, threshold, keep_scale, *quads


def _aligned(bias: Tensor) -> Tensor:
    """The bias with rows that begin at multiples of 16 bytes, so that loads are vectors."""
    if bias.size(3) % 4 or bias.data_ptr() % 16:
        return torch.nn.functional.pad(bias, (0, -bias.size(3) % 4))
    return bias


def _constants(qkv: Tensor, scale: float, bias: Tensor | None) -> dict[str, Any]:
    head_dim = qkv.size(3)
    scaled = bias is not None or scale <= 0 or qkv.dtype is torch.float32
    return {"HEAD_DIM": head_dim, "BLOCK_D": _block_d(head_dim), "SCALED": scaled}


def _block_d(head_dim: int) -> int:
    return max(32, configs.next_power_of_2(head_dim))


def _short(kernel: str, qkv: Tensor, max_seqlen: int, bias: Tensor | None) -> int:
    """Tokens that a program of a short kernel has room for, or 0 if a long one has to run.

    The table has short kernels where their registers hold a whole head.
    """
    if qkv.dtype is torch.float32 or max_seqlen > 128:
        return 0
    block_s = 64 if max_seqlen <= 64 else 128
    offered = configs.table(configs.architecture(qkv.device))[kernel]
    return block_s if _shape_class(qkv, bias, block_s) in offered else 0


def _shape_class(qkv: Tensor, bias: Tensor | None, block_s: int = 0) -> str:
    """By the head size, the tokens of a short kernel, float32 or 16 bit, and whether there is a bias."""
    name = f"d{_block_d(qkv.size(3))}"
    if block_s:
        name += f"-s{block_s}"
    elif qkv.dtype is torch.float32:
        name += "-fp32"
    return name + "-bias" * (bias is not None)


def _config(kernel: str, qkv: Tensor, bias: Tensor | None, seed: Tensor | None, block_s: int = 0) -> dict[str, int]:
    """Padded head sizes and dropout need registers: some kernels have a shape class of their own for them."""
    name = _shape_class(qkv, bias, block_s)
    offered = configs.table(configs.architecture(qkv.device))[kernel]
    if qkv.size(3) < _block_d(qkv.size(3)) and name + _PADDED in offered:
        name += _PADDED
    if seed is not None and name + _DROPOUT in offered:
        name += _DROPOUT
    return configs.choose(kernel, name, qkv.device)


# For the compile-time table: the kernels with a configuration, by its name, and their pointers. What else they take,
# all take alike.
_KERNELS = {
    "attention_fwd": (fwd._attention_fwd_kernel, "qkv out lse cu_seqlens seed bias"),
    "attention_fwd_short": (fwd._attention_fwd_short_kernel, "qkv out lse cu_seqlens seed bias"),
    "attention_bwd": (bwd._attention_bwd_dkdv_kernel, "dout qkv lse delta stats dqkv dq_sum cu_seqlens seed bias"),
    "attention_bwd_dq": (bwd._attention_bwd_dq_kernel, "dout qkv lse delta dqkv cu_seqlens seed bias"),
    "attention_bwd_dkdv": (
        bwd._attention_bwd_dkdv_kernel,
        "dout qkv lse delta stats dqkv dq_sum cu_seqlens seed bias",
    ),
    "attention_bwd_short": (bwd._attention_bwd_short_kernel, "dout qkv lse delta dqkv cu_seqlens seed bias"),
    "attention_bwd_dbias": (bwd._attention_bwd_dbias_kernel, "dout qkv lse delta dbias cu_seqlens seed bias"),
}
_FLOATS = ("lse", "delta", "stats", "dq_sum", "bias", "dbias")
_TYPES = dict.fromkeys(_FLOATS, "*fp32") | {"cu_seqlens": "*i32", "seed": "*i64"}


def cases(arch: int) -> Iterator[configs.Case]:
    """Every kernel in every configuration of the table: each dtype, with and without dropout.

    One head size a shape class, and 40 for those that are not a power of two.
    """
    for op, (kernel, pointers) in _KERNELS.items():
        offered = configs.table(arch)[op]
        for name, config in offered.items():
            block_d = int(name.split("-")[0][1:])
            dtypes = ("fp32",) if "-fp32" in name else ("bf16", "fp16")
            bias = "-bias" in name
            dropouts = (True,) if name.endswith(_DROPOUT) else (False,) if name + _DROPOUT in offered else (False, True)
            # Of the gradient of a bias: whether it is wanted, or whether the bias has one row for all queries.
            of_bias = (False, True) if op.endswith("dbias") or (op == "attention_bwd_short" and bias) else (False,)
            for head_dim, dtype, drops, this in itertools.product(_head_dims(offered, name), dtypes, dropouts, of_bias):
                constants: dict[str, Any] = {"HEAD_DIM": head_dim, "BLOCK_D": block_d}
                constants["SCALED"] = bias or dtype == "fp32"
                blocks, options = configs.split(config)
                constants |= blocks
                if "-s" in name:
                    constants["BLOCK_S"] = int(name.split("-")[1][1:])
                if op.endswith("dbias"):
                    constants["ONE_ROW"] = this
                if op == "attention_bwd_short" and not this:
                    constants["delta"] = None
                if op.endswith("dkdv"):
                    constants["dq_sum"] = None
                    constants |= {} if dtype != "fp32" else {"stats": None}
                constants |= {} if drops else {"seed": None}
                constants |= {} if bias else {"bias": None}
                signature = {
                    argument: "constexpr"
                    if argument in constants
                    else _TYPES.get(argument, f"*{dtype}")
                    if argument in pointers.split()
                    else "fp32"
                    if argument in ("scale", "keep_scale")
                    else "i32"
                    for argument in kernel.arg_names
                }
                label = (
                    f"{op}/{name}/{dtype}-{head_dim}"
                    + "-dropout" * drops
                    + ("-row" if op.endswith("dbias") else "-delta") * this
                )
                narrow = block_d <= 64 and op == "attention_fwd"
                matrix = dtype != "fp32" or narrow
                together = 2 if narrow and dtype != "fp32" and not bias else 1
                yield configs.Case(label, kernel, signature, constants, options, matrix, together)
    yield from _tile_cases(arch)


def _head_dims(offered: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """The head sizes that a shape class of those offered is compiled for: its own, and one that is padded to it."""
    block_d = int(name.split("-")[0][1:])
    padded = _PADDED_SIZES[block_d]
    if _PADDED in name:
        return (padded,)
    return (block_d,) if name.removesuffix(_DROPOUT) + _PADDED in offered else (padded, block_d)


def _tile_cases(arch: int) -> Iterator[configs.Case]:
    """The kernels before and after the backward, which take their tiles from its configuration."""
    types = dict.fromkeys(("dout", "out", "dqkv"), "*bf16") | _TYPES
    types |= dict.fromkeys(("batch", "total", "heads"), "i32") | {"scale": "fp32"}
    found: dict[tuple[Any, str], dict[str, Any]] = {}
    for op, summed in (("attention_bwd", True), ("attention_bwd_dkdv", False)):
        offered = configs.table(arch)[op]
        for name, config in offered.items():
            if "-fp32" in name:
                continue
            block_d, scaled = int(name.split("-")[0][1:]), "-bias" in name
            for head_dim in _head_dims(offered, name):
                constants: dict[str, Any] = {"HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_M": config["BLOCK_M"]}
                label = f"bf16-{head_dim}-m{config['BLOCK_M']}"
                if summed:
                    found[bwd._attention_bwd_end_kernel, label] = constants
                begin = constants | {"SCALED": scaled} | ({} if summed else {"dq_sum": None})
                found[bwd._attention_bwd_begin_kernel, label + "-sum" * summed + "-bias" * scaled] = begin
    for (kernel, label), constants in found.items():
        signature = {argument: types[argument] for argument in kernel.arg_names if argument not in constants}
        yield configs.Case(label, kernel, signature, constants, _TILE, matrix=False)
