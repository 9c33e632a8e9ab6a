"""dropout(LayerNorm(word + position + token type)), and its backward into the tables.

The tables' gradients repeat bit for bit: the tokens are sorted by their id, and one program sums all tokens of a row,
in their order; so the rows that no token uses are written in the same pass, too. Tables of few rows (the token types),
whose rows have very many tokens each, are summed part by part of the tokens instead, without sorting. Atomic additions
would need a float32 copy of the whole table, cleared and converted at every step, and would not repeat.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels import configs, dropout, rows
from fastbert.kernels.layernorm import shape_class, shape_class_bwd

SMALL_TABLE = 16  # rows
_GATHER = configs.fixed("embedding_bwd_table", PIECE=64, BLOCK_T=16, BLOCK_N=256, num_warps=4)
_FEW = configs.fixed("embedding_bwd_few_rows", PART=256, BLOCK_T=16, BLOCK_N=128, num_warps=4)


@triton.jit
def _table_rows(table, id, size, column, inside, HIDDEN: tl.constexpr):
    """Float32 [BLOCK_M, BLOCK_N]: the rows `id` of table [size, HIDDEN]; NaN for an id that has no row there."""
    exists = (id >= 0) & (id < size)
    pointer = table + tl.where(exists, id, 0)[:, None] * HIDDEN + column[None, :]
    values = tl.load(pointer, mask=inside & exists[:, None], other=0.0).to(tl.float32)
    return tl.where(exists[:, None], values, float("nan"))


@triton.jit(do_not_specialize=("num_tokens", "num_words", "num_positions", "num_types", "threshold"))
def _embedding_fwd_kernel(
    input_ids,  # int64 [num_tokens], as the two that follow
    position_ids,
    token_type_ids,
    word,  # [num_words, HIDDEN]
    position,  # [num_positions, HIDDEN]
    token_type,  # [num_types, HIDDEN]
    weight,  # [HIDDEN]
    bias,  # [HIDDEN]
    y,  # [num_tokens, HIDDEN]
    xhat,  # [num_tokens, HIDDEN], the normalised rows, or None
    rstd,  # float32 [num_tokens] or None
    seed,  # int64 [1], or None without dropout
    num_tokens,
    num_words,
    num_positions,
    num_types,
    eps,
    threshold,
    keep_scale,
    HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    live = row < num_tokens
    inside = live[:, None] & (column < HIDDEN)[None, :]
    word_id = tl.load(input_ids + row, mask=live, other=0)
    position_id = tl.load(position_ids + row, mask=live, other=0)
    type_id = tl.load(token_type_ids + row, mask=live, other=0)
    v = _table_rows(word, word_id, num_words, column, inside, HIDDEN)
    v += _table_rows(token_type, type_id, num_types, column, inside, HIDDEN)
    v += _table_rows(position, position_id, num_positions, column, inside, HIDDEN)
    _, inverse, centred = rows.standardize(v, column, eps, HIDDEN, y.dtype.element_ty != tl.float32)
    normal = centred * inverse[:, None]
    offset = row.to(tl.int64)[:, None] * HIDDEN + column[None, :]
    if xhat is not None:
        tl.store(xhat + offset, normal, mask=inside)
        tl.store(rstd + row, inverse, mask=live)
    w = tl.load(weight + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
    out = normal * w[None, :] + b[None, :]
    if seed is not None:
        out = tl.where(dropout.keep_rows(seed, threshold, row, BLOCK_M, BLOCK_N), out * keep_scale, 0.0)
    tl.store(y + offset, out, mask=inside)


@triton.jit(do_not_specialize=("num_tokens", "threshold"))
def _embedding_bwd_kernel(
    dy,  # [num_tokens, HIDDEN]
    xhat,  # [num_tokens, HIDDEN]
    weight,  # [HIDDEN]
    rstd,  # float32 [num_tokens]
    dz,  # [num_tokens, HIDDEN], the gradient of the sum of the three rows
    partials,  # float32 [2, programs, HIDDEN]: of dweight, dbias
    seed,  # int64 [1], or None without dropout
    num_tokens,
    threshold,
    keep_scale,
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
    for block in tl.range(program, tl.cdiv(num_tokens, BLOCK_M), programs, num_stages=STAGES):
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        offset = row.to(tl.int64)[:, None] * HIDDEN + column[None, :]
        inside = (row < num_tokens)[:, None] & (column < HIDDEN)[None, :]
        g = tl.load(dy + offset, mask=inside, other=0.0).to(tl.float32)
        if seed is not None:
            g = tl.where(dropout.keep_rows(seed, threshold, row, BLOCK_M, BLOCK_N), g * keep_scale, 0.0)
        normal = tl.load(xhat + offset, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + row, mask=row < num_tokens, other=0.0)[:, None]
        dbias += g
        dweight += g * normal
        g *= w
        tl.store(dz + offset, rows.standardize_bwd(g, normal, inverse, HIDDEN), mask=inside)
    out = partials + program * HIDDEN + column
    tl.store(out, tl.sum(dweight, 0), mask=column < HIDDEN)
    tl.store(out + programs.to(tl.int64) * HIDDEN, tl.sum(dbias, 0), mask=column < HIDDEN)


@triton.jit
def _add_tokens(total, dz, token, begin, end, column, HIDDEN: tl.constexpr, BLOCK_T: tl.constexpr):
    """total [BLOCK_T, columns] and what the tokens at places begin to end of the order add to it."""
    for start in tl.range(begin, end, BLOCK_T, num_stages=rows.STAGES):
        place = start + tl.arange(0, BLOCK_T)
        source = tl.load(token + place, mask=place < end, other=0)
        inside = (place < end)[:, None] & (column < HIDDEN)[None, :]
        total += tl.load(dz + source[:, None] * HIDDEN + column[None, :], mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=("padding_idx",))
def _embedding_bwd_pieces_kernel(
    dz,  # [tokens, HIDDEN]
    ordered,  # int64 [tokens], the ids in order
    token,  # int64 [tokens], the tokens in that order
    pieces,  # float32 [tokens // PIECE, HIDDEN], written where all PIECE tokens have one id
    padding_idx,
    HIDDEN: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    piece = tl.program_id(0)
    begin = piece * PIECE
    id = tl.load(ordered + begin)
    if (id == tl.load(ordered + begin + PIECE - 1)) & (id != padding_idx):
        column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        total = _add_tokens(total, dz, token, begin, begin + PIECE, column, HIDDEN, BLOCK_T)
        tl.store(pieces + piece.to(tl.int64) * HIDDEN + column, tl.sum(total, 0), mask=column < HIDDEN)


@triton.jit(do_not_specialize=("padding_idx",))
def _embedding_bwd_table_kernel(
    dz,  # [tokens, HIDDEN]
    token,  # int64 [tokens], the tokens ordered by their id
    first,  # int64 [table rows + 1]: row r has the tokens first[r] to first[r + 1] of that order
    pieces,  # float32 [tokens // PIECE, HIDDEN]: sums of PIECE tokens in that order, where they have one id
    dtable,  # [table rows, HIDDEN]
    padding_idx,
    HIDDEN: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program sums what it finds no sum of: else the whole GPU would wait for the one of [MASK] or of a comma."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.load(first + row).to(tl.int32)
    end = tl.load(first + row + 1).to(tl.int32)
    end = tl.where(row == padding_idx, begin, end)
    first_piece, last_piece = tl.cdiv(begin, PIECE), end // PIECE
    pieced = first_piece < last_piece
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    total = _add_tokens(total, dz, token, begin, tl.where(pieced, first_piece * PIECE, end), column, HIDDEN, BLOCK_T)
    for start in range(first_piece, last_piece, BLOCK_T):
        piece = start + tl.arange(0, BLOCK_T)
        inside = (piece < last_piece)[:, None] & (column < HIDDEN)[None, :]
        total += tl.load(pieces + piece.to(tl.int64)[:, None] * HIDDEN + column[None, :], mask=inside, other=0.0)
    total = _add_tokens(total, dz, token, tl.where(pieced, last_piece * PIECE, end), end, column, HIDDEN, BLOCK_T)
    tl.store(dtable + row.to(tl.int64) * HIDDEN + column, tl.sum(total, 0), mask=column < HIDDEN)


@triton.jit(do_not_specialize=("num_tokens", "padding_idx"))
def _embedding_bwd_few_rows_kernel(
    dz,  # [num_tokens, HIDDEN]
    ids,  # int64 [num_tokens]
    partials,  # float32 [1, parts, table rows * HIDDEN]
    num_tokens,
    padding_idx,
    HIDDEN: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    part = tl.program_id(0)
    row = tl.program_id(2)
    wanted = tl.where(row == padding_idx, -2, row)  # of no token
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for start in range(part * PART, tl.minimum(part * PART + PART, num_tokens), BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        id = tl.load(ids + token, mask=token < num_tokens, other=-1)
        inside = (id == wanted)[:, None] & (column < HIDDEN)[None, :]
        offset = token.to(tl.int64)[:, None] * HIDDEN + column[None, :]
        total += tl.load(dz + offset, mask=inside, other=0.0).to(tl.float32)
    out = partials + (part.to(tl.int64) * tl.num_programs(2) + row) * HIDDEN + column
    tl.store(out, tl.sum(total, 0), mask=column < HIDDEN)


def embedding_fwd(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding_idx: int,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids int64 [T]; tables [rows, H]; weight, bias [H]; all contiguous. H may be at most 8192.

    Returns y [T, H], the normalised rows [T, H] and rstd float32 [T] (both empty unless save is set). The host does
    not look at the ids: a token with an id that has no row in its table gets NaN.
    """
    num_tokens, hidden = input_ids.numel(), word.size(1)
    y = word.new_empty(num_tokens, hidden)
    xhat = torch.empty_like(y) if save else None
    rstd = word.new_empty(num_tokens if save else 0, dtype=torch.float32)
    if num_tokens > 0:
        config = configs.choose("embedding_fwd", shape_class(hidden), word.device)
        with torch.cuda.device_of(word):
            _embedding_fwd_kernel[(configs.cdiv(num_tokens, config["BLOCK_M"]),)](
                input_ids,
                position_ids,
                token_type_ids,
                word,
                position,
                token_type,
                weight,
                bias,
                y,
                xhat,
                rstd if save else None,
                seed if dropout_p > 0.0 else None,
                num_tokens,
                word.size(0),
                position.size(0),
                token_type.size(0),
                eps,
                *dropout.scalars(dropout_p),
                HIDDEN=hidden,
                BLOCK_N=rows.block_columns(hidden),
                **config,
            )
    return y, y.new_empty(0) if xhat is None else xhat, rstd


def embedding_bwd(
    dy: Tensor,
    xhat: Tensor,
    rstd: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    weight: Tensor,
    num_words: int,
    num_positions: int,
    num_types: int,
    padding_idx: int,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dy [T, H]; the rest as `embedding_fwd` takes and gives it. padding_idx: the word without a gradient, or -1.

    Returns the gradients of the three tables [rows, H] in dy's dtype, dweight and dbias [H] in weight's.
    """
    num_tokens, hidden = dy.shape
    dz = torch.empty_like(dy)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    most, config = rows.launch(configs.choose("embedding_bwd", shape_class_bwd(hidden, dy.dtype), dy.device))
    block_n = rows.block_columns(hidden)
    programs = max(1, min(configs.cdiv(num_tokens, config["BLOCK_M"]), most * rows.processors(dy.device)))
    partials = rstd.new_empty(2, programs, hidden)
    with torch.cuda.device_of(dy):
        _embedding_bwd_kernel[(programs,)](
            dy,
            xhat,
            weight,
            rstd,
            dz,
            partials,
            seed if dropout_p > 0.0 else None,
            num_tokens,
            *dropout.scalars(dropout_p),
            HIDDEN=hidden,
            BLOCK_N=block_n,
            STAGES=rows.stages(config["BLOCK_M"], hidden, dy.dtype),
            **config,
        )
        rows.sum_partials(partials, (dweight, dbias))
        tables = (
            _table_gradient(dz, input_ids, num_words, padding_idx),
            _table_gradient(dz, position_ids, num_positions, -1),
            _table_gradient(dz, token_type_ids, num_types, -1),
        )
    return *tables, dweight, dbias


def _table_gradient(dz: Tensor, ids: Tensor, size: int, padding_idx: int) -> Tensor:
    """[size, H]: the sums of dz [T, H] over the tokens of each id."""
    num_tokens, hidden = dz.shape
    dtable = dz.new_empty(size, hidden)
    if size == 0:
        return dtable
    if size <= SMALL_TABLE:
        parts = max(1, configs.cdiv(num_tokens, _FEW["PART"]))
        partials = dz.new_empty(1, parts, size * hidden, dtype=torch.float32)
        grid = parts, configs.cdiv(hidden, _FEW["BLOCK_N"]), size
        _embedding_bwd_few_rows_kernel[grid](dz, ids, partials, num_tokens, padding_idx, HIDDEN=hidden, **_FEW)
        rows.sum_partials(partials, (dtable,))
        return dtable
    ordered, token = torch.sort(ids, stable=True)
    first = torch.searchsorted(ordered, torch.arange(size + 1, device=ids.device))
    columns, whole = configs.cdiv(hidden, _GATHER["BLOCK_N"]), num_tokens // _GATHER["PIECE"]
    pieces = dz.new_empty(whole, hidden, dtype=torch.float32)
    if whole > 0:
        _embedding_bwd_pieces_kernel[whole, columns](dz, ordered, token, pieces, padding_idx, HIDDEN=hidden, **_GATHER)
    _embedding_bwd_table_kernel[size, columns](dz, token, first, pieces, dtable, padding_idx, HIDDEN=hidden, **_GATHER)
    return dtable


def cases(arch: int) -> Iterator[configs.Case]:
    table = configs.table(arch)
    scalars = {"eps": "fp32", "threshold": "i32", "keep_scale": "fp32"}
    ids = dict.fromkeys(
        ("input_ids", "position_ids", "token_type_ids", "seed", "ids", "ordered", "token", "first"), "*i64"
    )
    counts = dict.fromkeys(("num_tokens", "num_words", "num_positions", "num_types", "padding_idx"), "i32")
    floats = dict.fromkeys(("rstd", "partials", "pieces"), "*fp32")
    tensors = ("word", "position", "token_type", "weight", "bias", "y", "xhat", "dy", "dz", "dtable")

    def case(
        label: str,
        kernel: triton.JITFunction,
        constants: dict[str, object],
        launch: dict[str, int],
        dtype: torch.dtype = torch.bfloat16,
    ) -> configs.Case:
        signature = dict.fromkeys(tensors, f"*{rows.NAMES[dtype]}") | floats | ids | counts | scalars
        together, launch = rows.launch(launch)
        types = {name: signature[name] for name in kernel.arg_names if name in signature}
        return configs.Case(label, kernel, types, *configs.split(constants | launch), False, together)

    for hidden, dtype in rows.WIDTHS:
        sizes = {"HIDDEN": hidden, "BLOCK_N": rows.block_columns(hidden)}
        for kind, off in (("dropout", {}), ("plain", {"seed": None})):
            label, constants = rows.label(kind, hidden, dtype), sizes | off
            yield case(label, _embedding_fwd_kernel, constants, table["embedding_fwd"][shape_class(hidden)], dtype)
            launch = table["embedding_bwd"][shape_class_bwd(hidden, dtype)]
            constants |= {"STAGES": rows.stages(launch["BLOCK_M"], hidden, dtype)}
            yield case(label, _embedding_bwd_kernel, constants, launch, dtype)
    unsaved = dict.fromkeys(("xhat", "rstd", "seed"))
    for hidden in (384, 768, 1024, 8192):
        sizes = {"HIDDEN": hidden, "BLOCK_N": rows.block_columns(hidden)}
        launch = table["embedding_fwd"][shape_class(hidden)]
        yield case(f"inference-{hidden}", _embedding_fwd_kernel, sizes | unsaved, launch)
    for hidden, dtype in ((312, torch.bfloat16), (768, torch.bfloat16), (768, torch.float32)):
        label = rows.label("table", hidden, dtype)
        yield case(label, _embedding_bwd_pieces_kernel, {"HIDDEN": hidden}, _GATHER, dtype)
        yield case(label, _embedding_bwd_table_kernel, {"HIDDEN": hidden}, _GATHER, dtype)
        yield case(label, _embedding_bwd_few_rows_kernel, {"HIDDEN": hidden}, _FEW, dtype)
