"""BERT's embeddings: the sum of word, position and token type embedding, then LayerNorm and dropout."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import dispatch
from fastbert.ops import checks, leaf, philox
from fastbert.ops.layernorm import layernorm_ref


def embedding_ref(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-12,
    seed: Tensor | None = None,
) -> Tensor:
    """The specification, in plain PyTorch: sums and normalises in float32 (float64 for float64).

    The three id tensors have one shape; the other shapes as in `embedding`.
    """
    accumulate = torch.promote_types(word.dtype, torch.float32)
    z = F.embedding(input_ids, word, padding_idx).to(accumulate)
    z = z + F.embedding(token_type_ids, token_type).to(accumulate)
    z = z + F.embedding(position_ids, position).to(accumulate)
    y = layernorm_ref(z, weight, bias, eps=eps)
    if dropout_p > 0.0:
        assert seed is not None
        keep = philox.keep_rows(seed, dropout_p, input_ids.numel(), word.size(1))
        y = philox.drop(y, keep.view(y.shape), dropout_p)
    return y.to(word.dtype)


def embedding(
    input_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-12,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """dropout(LayerNorm(word[input_ids] + position[position_ids] + token_type[token_type_ids])).

    input_ids: [B, S], or [T] where sequences are packed; int64 or int32. position_ids, token_type_ids: of a shape that
        broadcasts to that of input_ids; by default 0, 1, ... S - 1 and 0. Packed ids need their positions.
    word: [V, H]. position: [P, H]. token_type: [Y, H]. weight, bias: [H], of the LayerNorm. One dtype and device.
    padding_idx: the row of `word` that gets no gradient, an int; counted from the end if negative.
    dropout_p: probability of dropping an element. seed: int64, one element, on word's device; drawn from PyTorch's
        default generator if None.
    eps: added to the variance; finite, and not negative.
    backend: forces an implementation (see `fastbert.dispatch`).

    Returns [B, S, H], or [T, H]. Differentiable once. Raises IndexError if an id has no row in its table, ValueError or
    TypeError for wrong shapes, dtypes, devices or numbers, ValueError for packed ids without positions. The Triton
    kernels, for which the host does not wait, give NaN where an id has no row.
    """
    dropout_p = checks.number("embedding", "dropout_p", dropout_p)
    eps = checks.finite("embedding", "eps", eps, negative=False)
    if padding_idx is not None:
        padding_idx = checks.integer("embedding", "padding_idx", padding_idx)
    checks.tensor("embedding", "word", word)
    if dropout_p == 0.0 and seed is None and leaf.direct(_cpu, word, backend):
        y = _direct(input_ids, position_ids, token_type_ids, word, position, token_type, weight, bias, padding_idx, eps)
        if y is not None:
            return y
    padding_idx = _check(input_ids, word, position, token_type, weight, bias, padding_idx, dropout_p, seed)
    if position_ids is None:
        if input_ids.dim() == 1:
            raise ValueError(
                "embedding: position_ids must be given with input_ids of shape [tokens], which do not tell where a "
                f"sequence begins; got None with {list(input_ids.shape)}"
            )
        if input_ids.size(1) > position.size(0):
            raise IndexError(
                f"embedding: input_ids has sequences of {input_ids.size(1)} tokens, but position has only "
                f"{position.size(0)} rows"
            )
        position_ids = torch.arange(input_ids.size(1), device=input_ids.device)
    if token_type_ids is None:
        token_type_ids = torch.zeros((), dtype=torch.int64, device=input_ids.device)
    position_ids = like_input(position_ids, "position_ids", input_ids)
    token_type_ids = like_input(token_type_ids, "token_type_ids", input_ids)
    weight, bias = leaf.in_one_dtype(weight, bias)
    others = (weight.dtype, operator.index(weight.size(0)))
    chosen = dispatch.select("embedding", device=word.device, dtype=word.dtype, requires=others, backend=backend)
    if dropout_p > 0.0 and seed is None:
        seed = philox.draw_seed(word.device)
    return chosen.run(
        input_ids.long(),
        position_ids,
        token_type_ids,
        word,
        position,
        token_type,
        weight,
        bias,
        padding_idx,
        dropout_p,
        eps,
        seed,
    )


def _check(
    input_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding_idx: int | None,
    dropout_p: float,
    seed: Tensor | None,
) -> int | None:
    """Checks all but the other ids. Returns padding_idx counted from 0."""
    checks.floating("embedding", "word", word)
    checks.integer_ids("embedding", "input_ids", input_ids, word.device)
    if input_ids.dim() not in (1, 2):
        raise ValueError(
            f"embedding: input_ids must have shape [batch, tokens] or [tokens], got {list(input_ids.shape)}"
        )
    if word.dim() != 2 or word.size(1) == 0:
        raise ValueError(f"embedding: word must have shape [rows, hidden] with hidden > 0, got {list(word.shape)}")
    hidden = word.size(1)
    for name, table in (("position", position), ("token_type", token_type)):
        checks.operand("embedding", name, table, word, "word")
        if table.dim() != 2 or table.size(1) != hidden:
            raise ValueError(f"embedding: {name} must have shape [rows, {hidden}], got {list(table.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        checks.operand("embedding", name, value, word, "word", same_dtype=False)
        checks.shape("embedding", name, value, (hidden,), "[hidden]")
    if dropout_p != 0.0:
        checks.probability("embedding", "dropout_p", dropout_p)
    if seed is not None:
        checks.seed("embedding", seed, word)
    if padding_idx is None:
        return None
    rows = word.size(0)
    if not -rows <= padding_idx < rows:
        raise ValueError(f"embedding: padding_idx must lie in [-{rows}, {rows}), the rows of word; got {padding_idx}")
    return padding_idx % rows


def like_input(ids: Tensor, name: str, input_ids: Tensor) -> Tensor:
    """The ids called `name` as int64, in the shape of input_ids. Raises TypeError or ValueError if they are not fit."""
    checks.integer_ids("embedding", name, ids, input_ids.device)
    try:
        return ids.long().expand(input_ids.shape)
    except RuntimeError:
        raise ValueError(
            f"embedding: {name} must have a shape that broadcasts to that of input_ids, {list(input_ids.shape)}; "
            f"got {list(ids.shape)}"
        ) from None


def check_ids(
    input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor, word: Tensor, position: Tensor, token_type: Tensor
) -> None:
    """Raises IndexError if an id has no row in its table. Reads the data."""
    checks.in_range("embedding", "input_ids", input_ids, word.size(0), "word")
    checks.in_range("embedding", "position_ids", position_ids, position.size(0), "position")
    checks.in_range("embedding", "token_type_ids", token_type_ids, token_type.size(0), "token_type")


def _run_reference(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding_idx: int | None,
    dropout_p: float,
    eps: float,
    seed: Tensor | None,
) -> Tensor:
    if word.is_cpu and not torch.compiler.is_compiling():
        check_ids(input_ids, position_ids, token_type_ids, word, position, token_type)
    return embedding_ref(
        input_ids,
        position_ids,
        token_type_ids,
        word,
        position,
        token_type,
        weight,
        bias,
        padding_idx,
        dropout_p,
        eps,
        seed,
    )


_cpu = leaf.Leaf("embedding", "cpu")
_triton = leaf.define_triton(
    "embedding",
    "(Tensor input_ids, Tensor position_ids, Tensor token_type_ids, Tensor word, Tensor position, Tensor token_type, "
    "Tensor weight, Tensor bias, int padding_idx, float eps, float dropout_p, Tensor? seed, bool save) -> "
    "(Tensor, Tensor, Tensor)",
    "(Tensor dy, Tensor xhat, Tensor rstd, Tensor input_ids, Tensor position_ids, Tensor token_type_ids, "
    "Tensor weight, int num_words, int num_positions, int num_types, int padding_idx, float dropout_p, Tensor? seed) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _run(
    kernels: leaf.Leaf,
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding_idx: int | None,
    dropout_p: float,
    eps: float,
    seed: Tensor | None,
) -> Tensor:
    arguments = (
        input_ids.reshape(-1).contiguous(),
        position_ids.reshape(-1).contiguous(),
        token_type_ids.reshape(-1).contiguous(),
        word.contiguous(),
        position.contiguous(),
        token_type.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        -1 if padding_idx is None else padding_idx,
        eps,
        dropout_p,
        seed,
    )
    save = leaf.needs_grad(word, position, token_type, weight, bias)
    try:
        y = kernels.call(save, *arguments, save)[0]
    except RuntimeError:  # the kernel checks the ids too, but can raise nothing else
        check_ids(input_ids, position_ids, token_type_ids, word, position, token_type)
        raise
    return y.view(*input_ids.shape, y.size(1))


def _direct(
    input_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding_idx: int | None,
    eps: float,
) -> Tensor | None:
    """The C++ op at once (see `leaf.direct`), which repeats the ids of one sequence itself; None if it refuses."""
    try:
        shape = input_ids.shape
        if len(shape) not in (1, 2) or (padding_idx is not None and not 0 <= padding_idx < word.shape[0]):
            return None
        if position_ids is None:
            position_ids = torch.arange(shape[1])
        elif position_ids.shape not in (shape, shape[1:], (1, *shape[1:])):
            return None
        if token_type_ids is None:
            token_type_ids = torch.zeros(1, dtype=torch.int64)
        elif token_type_ids.shape != shape:
            return None
        ids = (input_ids.reshape(-1), position_ids.reshape(-1), token_type_ids.reshape(-1))
        done = _cpu.attempt(*ids, word, position, token_type, weight, bias, -1, eps, 0.0, None, False)
    except (AttributeError, IndexError, RuntimeError, TypeError):  # the full way says what is wrong
        return None
    return None if done is None else done[0].view(*shape, word.size(1))


def _supports_cpu(device_type: str, dtype: torch.dtype, requires: Any) -> str | None:
    return dispatch.cpu_reason(_cpu.missing, device_type, (dtype, *(requires or ())[:1]))


def _supports_triton(device_type: str, dtype: torch.dtype, requires: Any) -> str | None:
    weight_dtype, columns = requires or (dtype, 0)
    return dispatch.triton_rows_reason(device_type, (dtype, weight_dtype), columns)


def _forward_fake(
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
    y = word.new_empty(input_ids.size(0), word.size(1))
    rows = input_ids.size(0) if save else 0
    return y, torch.empty_like(y) if save else y.new_empty(0), word.new_empty(rows, dtype=torch.float32)


def _backward_fake(
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
    hidden = dy.size(1)
    return (
        dy.new_empty(num_words, hidden),
        dy.new_empty(num_positions, hidden),
        dy.new_empty(num_types, hidden),
        torch.empty_like(weight),
        torch.empty_like(weight),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input_ids, position_ids, token_type_ids, word, position, token_type, weight, _ = inputs[:8]
    ctx.padding_idx, _, ctx.dropout_p, seed, ctx.saved = inputs[8:]
    _, xhat, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(xhat, rstd)
    ctx.save_for_backward(xhat, rstd, input_ids, position_ids, token_type_ids, weight, seed)
    ctx.rows = word.size(0), position.size(0), token_type.size(0)


def _autograd(kernels: leaf.Leaf, ctx: Any, dy: Tensor | None, dxhat: None, drstd: None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 13
    if not ctx.saved:
        raise RuntimeError(leaf.unsaved_message("embedding"))
    *tensors, seed = ctx.saved_tensors
    dword, dposition, dtoken_type, dweight, dbias = kernels.backward(
        dy.contiguous(), *tensors, *ctx.rows, ctx.padding_idx, ctx.dropout_p, seed
    )
    gradients = dword, dposition, dtoken_type, dweight, dbias
    return (None, None, None, *gradients, None, None, None, None, None)


for _kernels in (_cpu, _triton):
    leaf.register(
        _kernels,
        forward_fake=_forward_fake,
        setup_context=_setup_context,
        backward=_autograd,
        backward_fake=_backward_fake,
    )

implementations = dispatch.register(
    "embedding",
    (
        dispatch.Implementation("cpu", functools.partial(_run, _cpu), _supports_cpu),
        dispatch.Implementation("triton", functools.partial(_run, _triton), _supports_triton),
        dispatch.Implementation("reference", _run_reference, dispatch.always),
    ),
)
