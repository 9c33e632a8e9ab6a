"""Cross-entropy of the masked language model's decoder, and its gradients, at the labelled rows.

The rows come from mlm_transform.py, those with a label first, and how many these are only the device knows: a chunk
beyond the last of them ends at once. A chunk's logits are kept in a scratch of bounded size, in the dtype of the hidden
states, and are turned into their own gradients there:

    logits = h W^T + b; per tile of the vocabulary: maximum, sum of exponentials, sum of logits (float32)
    log-sum-exp and loss of each row, of the logits as they are kept: others would not sum up to 1 with these, and where
        a label's probability is near 1 the gradient is what it lacks of 1
    gradient of the logits in place, and that of the bias
    dh = dlogits W;  dW += dlogits^T h

The chunks follow one another in order and nothing is added atomically: results repeat bit for bit. A label that is
no row of the decoder makes the loss NaN, and the gradients with it.

Gradients are formed before the factor of the loss is known, by which GradScaler keeps those of float16 from becoming 0.
So in float16 those of the logits are kept GAIN times as large, and all others in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import configs, matmul, rows

SCRATCH_BYTES = 256 * 1024 * 1024  # for the logits of a chunk
GAIN = tl.constexpr(32768.0)
ROW_MULTIPLE = 128  # of rows in a chunk, and of columns in the scratch, which tiles of BLOCK_K and of dW read whole

_LSE = configs.fixed("mlm_loss_lse", BLOCK_M=32, BLOCK_B=64, num_warps=4)
_DLOGITS = configs.fixed("mlm_loss_dlogits", BLOCK_M=32, BLOCK_N=128, num_warps=4)


@triton.jit
def _logits_epilogue(
    v, m, labels, number, tile, tiles, bias, logits, stats, label_logit, chunk, vocabulary,
    DTYPE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """v: float32 [BLOCK_M, BLOCK_N], the product's rows from m and columns from tile * BLOCK_N on, of `tiles` tiles.
    labels: of this chunk, the first `number` of which are looked at. The rest as the kernel has it. Rows without a
    label are written, too: nobody reads them, and whole tiles need fewer registers."""
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    n = tile * BLOCK_N
    word = column < vocabulary - n
    if bias is not None:
        v += tl.load(bias + n + column, mask=word, other=0.0).to(tl.float32)[None, :]
    v = v.to(DTYPE).to(tl.float32)
    if logits is not None:
        pointer = logits + (m.to(tl.int64) * WIDTH + n) + (row[:, None] * WIDTH + column[None, :])
        tl.store(pointer, v, mask=(column < WIDTH - n)[None, :])
    out = stats + (tile.to(tl.int64) * chunk + m) + row
    part = tiles.to(tl.int64) * chunk
    tl.store(out + 2 * part, tl.sum(tl.where(word[None, :], v, 0.0), 1))
    v = tl.where(word[None, :], v, float("-inf"))
    maximum = tl.max(v, 1)
    tl.store(out, maximum)
    base = tl.where(maximum == float("-inf"), 0.0, maximum)
    tl.store(out + part, tl.sum(tl.exp(v - base[:, None]), 1))
    # Last and in each half, for a label in hand takes registers from the product: some of them spilt.
    own = (tl.load(labels + m + row, mask=row < number - m, other=-1) - n).to(tl.int32)
    on_label = tl.sum(tl.where(column[None, :] == own[:, None], v, 0.0), 1)
    tl.store(label_logit + m + row, on_label, mask=(own >= 0) & (own < tl.minimum(BLOCK_N, vocabulary - n)))


@triton.jit(do_not_specialize=("begin", "chunk", "steps"))
def _mlm_loss_logits_kernel(
    h,  # [num_rows, HIDDEN], the labelled rows
    weight,  # [vocabulary, HIDDEN]
    bias,  # [vocabulary] or None
    labels,  # int64 [num_rows], of the labelled rows
    count,  # int32 [1]
    logits,  # [chunk, WIDTH], or None if there is no backward
    stats,  # float32 [3, halves of tiles, chunk]: maximum, sum of exponentials less it, sum of logits
    label_logit,  # float32 [chunk]
    begin,
    chunk,
    vocabulary,
    steps,  # HIDDEN / BLOCK_K, rounded up
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    number = tl.minimum(tl.load(count) - begin, chunk)
    tiles_n = tl.cdiv(vocabulary, BLOCK_N)
    tile_m, tile_n = matmul.tile_of(tl.program_id(0), tl.cdiv(chunk, BLOCK_M), tiles_n, GROUP_M)
    if tile_m * BLOCK_M < number:
        row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # of the chunk
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        a_row, b_row = begin + tl.minimum(row, number - 1), tl.minimum(column, vocabulary - 1)
        v = matmul.multiply_rows(h, a_row, weight, b_row, steps, HIDDEN, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        left, right = matmul.halves(v, BLOCK_M, BLOCK_N)
        _logits_epilogue(
            left, tile_m * BLOCK_M, labels + begin, number, 2 * tile_n, 2 * tiles_n, bias, logits, stats, label_logit,
            chunk, vocabulary, h.dtype.element_ty, WIDTH, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
        _logits_epilogue(
            right, tile_m * BLOCK_M, labels + begin, number, 2 * tile_n + 1, 2 * tiles_n, bias, logits, stats,
            label_logit, chunk, vocabulary, h.dtype.element_ty, WIDTH, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip


@triton.jit(do_not_specialize=("begin", "chunk", "tiles"))
def _mlm_loss_lse_kernel(
    stats,  # float32 [3, tiles, chunk], of what `_logits_epilogue` calls a tile
    label_logit,  # float32 [chunk]
    labels,  # int64 [num_rows], of the labelled rows
    count,  # int32 [1]
    lse,  # float32 [2, chunk]: the maximum, and the log-sum-exp less it, which has more digits apart
    losses,  # float32 [num_rows], of the labelled rows in their order
    begin,
    chunk,
    tiles,
    vocabulary,
    smoothing,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < tl.minimum(tl.load(count) - begin, chunk)
    part = tiles.to(tl.int64) * chunk
    maximum = tl.full([BLOCK_M], -3.0e38, tl.float32)
    powers = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, tiles, BLOCK_B):
        tile = first + tl.arange(0, BLOCK_B)
        pointer = stats + tile.to(tl.int64)[:, None] * chunk + row[None, :]
        inside = (tile < tiles)[:, None] & live[None, :]
        m = tl.load(pointer, mask=inside, other=-3.0e38)
        s = tl.load(pointer + part, mask=inside, other=0.0)
        highest = tl.maximum(maximum, tl.max(m, 0))
        powers = powers * tl.exp(maximum - highest) + tl.sum(s * tl.exp(m - highest[None, :]), 0)
        total += tl.sum(tl.load(pointer + 2 * part, mask=inside, other=0.0), 0)
        maximum = highest
    label = tl.load(labels + begin + row, mask=live, other=0)
    above = tl.where((label >= 0) & (label < vocabulary), tl.log(powers), float("nan"))
    on_label = tl.load(label_logit + row, mask=live, other=0.0)
    loss = maximum - on_label + above
    if smoothing > 0.0:
        loss += smoothing * (on_label - total / vocabulary)
    tl.store(lse + row, maximum, mask=live)
    tl.store(lse + chunk + row, above, mask=live)
    tl.store(losses + begin + row, loss, mask=live)


@triton.jit(do_not_specialize=("begin", "chunk"))
def _mlm_loss_dlogits_kernel(
    logits,  # [chunk, width], replaced by their gradients (GAIN); zero in the columns beyond the vocabulary
    lse,  # float32 [2, chunk]
    labels,  # int64 [num_rows], of the labelled rows
    count,  # int32 [1]
    dbias,  # float32 [vocabulary], to which this chunk's sums are added, or None
    begin,
    chunk,
    vocabulary,
    width,
    smoothing,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    number = tl.minimum(tl.load(count) - begin, chunk)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    word = column < vocabulary
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.range(0, number, BLOCK_M, num_stages=rows.STAGES):
        row = first + tl.arange(0, BLOCK_M)
        live = row < number
        pointer = logits + row.to(tl.int64)[:, None] * width + column[None, :]
        v = tl.load(pointer, mask=live[:, None] & (column < width)[None, :], other=float("-inf")).to(tl.float32)
        maximum = tl.load(lse + row, mask=live, other=0.0)
        above = tl.load(lse + chunk + row, mask=live, other=0.0)
        label = tl.load(labels + begin + row, mask=live, other=0)
        d = tl.exp(v - maximum[:, None] - above[:, None]) - smoothing / vocabulary
        d -= tl.where(column[None, :] == label[:, None], 1.0 - smoothing, 0.0)
        d = tl.where(live[:, None] & word[None, :], d, 0.0)
        kept = d * GAIN if logits.dtype.element_ty == tl.float16 else d
        tl.store(pointer, kept, mask=live[:, None] & (column < width)[None, :])
        sums += d
    if dbias is not None:
        before = tl.load(dbias + column, mask=word, other=0.0)
        tl.store(dbias + column, before + tl.sum(sums, 0), mask=word)


@triton.jit(do_not_specialize=("begin", "chunk"))
def _mlm_loss_dh_kernel(
    dlogits,  # [chunk, width], SCALE times as large as they are
    weight,  # [vocabulary, HIDDEN]
    index,  # int32 [num_rows]: which row of dh each is, or None: they lie alike
    count,  # int32 [1]
    dh,  # [num_rows, HIDDEN], of which the labelled rows are written
    begin,
    chunk,
    vocabulary,
    width,
    HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE: tl.constexpr,
):
    number = tl.minimum(tl.load(count) - begin, chunk)
    tile_m, tile_n = matmul.tile_of(tl.program_id(0), tl.cdiv(chunk, BLOCK_M), tl.cdiv(HIDDEN, BLOCK_N), GROUP_M)
    if tile_m * BLOCK_M < number:
        row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        a_offset = tl.minimum(row, number - 1).to(tl.int64) * width
        inside = None if HIDDEN % BLOCK_N == 0 else column < HIDDEN
        d = matmul.multiply(
            dlogits,
            a_offset,
            weight,
            column.to(tl.int64),
            inside,
            width,
            vocabulary,
            width // BLOCK_K,
            1,
            HIDDEN,
            True,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            PRECISION,
        )
        if SCALE != 1.0:
            d *= 1.0 / SCALE
        to = (begin + row).to(tl.int64)
        if index is not None:
            to = tl.load(index + to, mask=row < number, other=0).to(tl.int64)
        live = (row < number)[:, None] & (column < HIDDEN)[None, :]
        tl.store(dh + to[:, None] * HIDDEN + column[None, :], d, mask=live)


@triton.jit(do_not_specialize=("begin", "chunk"))
def _mlm_loss_dweight_kernel(
    dlogits,  # [chunk, WIDTH], SCALE times as large as they are
    h,  # [num_rows, HIDDEN], the labelled rows
    count,  # int32 [1]
    dweight,  # [vocabulary, HIDDEN], written by the first chunk and added to by the others
    begin,
    chunk,
    vocabulary,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALE: tl.constexpr,
):
    number = tl.maximum(tl.minimum(tl.load(count) - begin, chunk), 0)
    if (number > 0) | (begin == 0):
        tile_m, tile_n = matmul.tile_of(
            tl.program_id(0), tl.cdiv(vocabulary, BLOCK_M), tl.cdiv(HIDDEN, BLOCK_N), GROUP_M
        )
        row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # of the vocabulary
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = None if HIDDEN % BLOCK_N == 0 else column < HIDDEN
        d = matmul.multiply(
            dlogits,
            row.to(tl.int64),
            h + begin.to(tl.int64) * HIDDEN,
            column.to(tl.int64),
            inside,
            number,
            None,
            tl.cdiv(number, BLOCK_K),
            WIDTH,
            HIDDEN,
            False,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            PRECISION,
        )
        if SCALE != 1.0:
            d *= 1.0 / SCALE
        pointer = dweight + row.to(tl.int64)[:, None] * HIDDEN + column[None, :]
        live = (row < vocabulary)[:, None] & (column < HIDDEN)[None, :]
        if begin > 0:
            d += tl.load(pointer, mask=live, other=0.0).to(tl.float32)
        tl.store(pointer, d, mask=live)


def mlm_loss_fwd(
    h: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    count: Tensor,
    label_smoothing: float,
    need_dh: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h [N, H]; labels int64 [N]; weight [V, H]; bias [V]; contiguous. count int32 [1]: how many rows are labelled,
    which come first; the others are not looked at.

    Returns the sum of the losses (float32), and the gradients of h, weight and bias, in float32 if these are float16;
    those not needed are empty.
    """
    num_rows, hidden = h.shape
    vocabulary = weight.size(0)
    stored = torch.float32 if h.dtype is torch.float16 else h.dtype
    none = functools.partial(h.new_empty, 0, dtype=stored)
    dh = torch.zeros_like(h, dtype=stored) if need_dh else none()
    if num_rows == 0:
        dweight = torch.zeros_like(weight, dtype=stored) if need_dweight else none()
        dbias = h.new_zeros(vocabulary if need_dbias else 0, dtype=stored)
        return h.new_zeros((), dtype=torch.float32), dh, dweight, dbias
    forward, dh_config, dweight_config = (config(f"mlm_loss_{name}", h) for name in ("fwd", "dh", "dweight"))
    width = padded(
        vocabulary, forward["BLOCK_M"], dh_config["BLOCK_K"], dweight_config["BLOCK_M"], dweight_config["BLOCK_K"]
    )
    chunk = _chunk_rows(num_rows, width * h.element_size())
    one = num_rows <= chunk
    losses = h.new_zeros(num_rows, dtype=torch.float32)
    lse, label_logit = losses.new_empty(2, chunk), losses.new_empty(chunk)
    logits = h.new_empty(chunk, width) if need_dh or need_dweight or need_dbias else None
    dweight = torch.empty_like(weight, dtype=stored if one else torch.float32) if need_dweight else None
    # Summed wherever there is a bias, so that none is left out by a kernel of its own.
    dbias = None if logits is None or bias is None else losses.new_zeros(vocabulary)
    tiles = configs.cdiv(vocabulary, forward["BLOCK_N"])
    stats = losses.new_empty(3, 2 * tiles, chunk)
    precision = {"PRECISION": matmul.precision(h.dtype)}
    product = precision | {"SCALE": GAIN.value if h.dtype is torch.float16 else 1.0}
    with torch.cuda.device_of(h):
        for begin in range(0, num_rows, chunk):
            _mlm_loss_logits_kernel[(configs.cdiv(chunk, forward["BLOCK_M"]) * tiles,)](
                h,
                weight,
                bias,
                labels,
                count,
                logits,
                stats,
                label_logit,
                begin,
                chunk,
                vocabulary,
                configs.cdiv(hidden, forward["BLOCK_K"]),
                HIDDEN=hidden,
                WIDTH=width,
                **precision,
                **forward,
            )
            _mlm_loss_lse_kernel[(configs.cdiv(chunk, _LSE["BLOCK_M"]),)](
                stats,
                label_logit,
                labels,
                count,
                lse,
                losses,
                begin,
                chunk,
                2 * tiles,
                vocabulary,
                label_smoothing,
                **_LSE,
            )
            if logits is None:
                continue
            _mlm_loss_dlogits_kernel[(configs.cdiv(width, _DLOGITS["BLOCK_N"]),)](
                logits, lse, labels, count, dbias, begin, chunk, vocabulary, width, label_smoothing, **_DLOGITS
            )
            if need_dh:
                _mlm_loss_dh_kernel[matmul.tiles(dh_config, chunk, hidden),](
                    logits,
                    weight,
                    None,
                    count,
                    dh,
                    begin,
                    chunk,
                    vocabulary,
                    width,
                    HIDDEN=hidden,
                    **product,
                    **dh_config,
                )
            if dweight is not None:
                _mlm_loss_dweight_kernel[matmul.tiles(dweight_config, vocabulary, hidden),](
                    logits,
                    h,
                    count,
                    dweight,
                    begin,
                    chunk,
                    vocabulary,
                    WIDTH=width,
                    HIDDEN=hidden,
                    **product,
                    **dweight_config,
                )
    return (
        losses.sum(),
        dh,
        none() if dweight is None else dweight.to(stored),
        dbias.to(stored) if dbias is not None and need_dbias else none(),
    )


def _chunk_rows(num_rows: int, row_bytes: int) -> int:
    """Rows in a chunk: as many as the scratch holds, and no more than there are."""
    most = max(1, SCRATCH_BYTES // row_bytes // ROW_MULTIPLE)
    return min(most, configs.cdiv(num_rows, ROW_MULTIPLE)) * ROW_MULTIPLE


def padded(columns: int, *tiles: int) -> int:
    """The columns of a scratch for so many, which tiles of these sizes read whole."""
    if any(ROW_MULTIPLE % size for size in tiles):
        read = sorted(set(tiles))
        raise ValueError(f"mlm_loss: the configured tiles read {read} at once; these must divide {ROW_MULTIPLE}")
    return configs.cdiv(columns, ROW_MULTIPLE) * ROW_MULTIPLE


def config(kernel: str, h: Tensor) -> dict[str, int]:
    """The launch configuration of one of the products."""
    return configs.choose(kernel, "fp32" if h.dtype is torch.float32 else "half", h.device)


_TYPES = dict.fromkeys(("stats", "label_logit", "lse", "losses", "dbias", "partials"), "*fp32")
_TYPES |= {"labels": "*i64", "front": "*i64", "index": "*i32", "count": "*i32", "vocabulary": "i32", "width": "i32:16"}
_TYPES |= {"smoothing": "fp32"}
_TYPES |= dict.fromkeys(("num_rows", "ignore_index", "begin", "chunk", "tiles", "steps"), "i32")


def case(
    kernel: triton.JITFunction,
    kind: str,
    launch: Mapping[str, Any],
    label: str = "",
    matrix: bool = False,
    **types: str,
) -> configs.Case:
    """One launch of a kernel of the head, whose tensors are of `kind` but for those that `types` names; fp32 may be
    called tf32, where it is multiplied so."""
    stored = "fp32" if kind == "tf32" else kind
    constants, options = configs.split(launch)
    if "PRECISION" in kernel.arg_names:
        constants["PRECISION"] = "tf32" if kind == "tf32" else "ieee"
    signature = {
        name: types.get(name) or _TYPES.get(name, f"*{stored}") for name in kernel.arg_names if name not in constants
    }
    together = 2 if options.get("maxnreg", 256) <= 128 else 1  # of 8 warps each
    return configs.Case(kind + label, kernel, signature, constants, options, matrix and kind != "fp32", together)


def kinds(shape_class: str) -> tuple[str, str]:
    """What a shape class serves, as `case` calls it."""
    return ("fp32", "tf32") if shape_class == "fp32" else ("fp16", "bf16")


def cases(arch: int) -> Iterator[configs.Case]:
    table = configs.table(arch)
    width = 30592  # of BERT's vocabulary of 30522
    yield case(_mlm_loss_lse_kernel, "bf16", _LSE)
    for kind in ("bf16", "fp16", "fp32"):
        yield case(_mlm_loss_dlogits_kernel, kind, _DLOGITS)
    for hidden in (768, 312):
        for shape_class, config in table["mlm_loss_fwd"].items():
            for kind in kinds(shape_class):
                launch = {"HIDDEN": hidden, "WIDTH": width} | config
                yield case(_mlm_loss_logits_kernel, kind, launch, f"-{hidden}", True)
                if kind == "bf16":
                    yield case(_mlm_loss_logits_kernel, kind, launch | {"logits": None}, f"-{hidden}-inference", True)
                    yield case(_mlm_loss_logits_kernel, kind, launch | {"bias": None}, f"-{hidden}-no-bias", True)
        for shape_class, config in table["mlm_loss_dh"].items():
            for kind in kinds(shape_class):
                launch = {"HIDDEN": hidden} | config
                # In float16 the loss keeps its gradients in float32, and those of the logits larger than they are.
                loss = {"dh": "*fp32"} if kind == "fp16" else {}
                scale = {"SCALE": GAIN.value if kind == "fp16" else 1.0}
                yield case(_mlm_loss_dh_kernel, kind, launch | scale | {"index": None}, f"-{hidden}", True, **loss)
                yield case(_mlm_loss_dh_kernel, kind, launch | {"SCALE": 1.0}, f"-{hidden}-transform", True)
        for shape_class, config in table["mlm_loss_dweight"].items():
            for kind in kinds(shape_class):
                loss = {"dweight": "*fp32"} if kind == "fp16" else {}
                scale = {"SCALE": GAIN.value if kind == "fp16" else 1.0}
                launch = {"HIDDEN": hidden, "WIDTH": width} | config
                yield case(_mlm_loss_dweight_kernel, kind, launch | scale, f"-{hidden}", True, **loss)
                if kind == "bf16":  # in several chunks
                    yield case(_mlm_loss_dweight_kernel, kind, launch | scale, f"-{hidden}-sum", True, dweight="*fp32")
