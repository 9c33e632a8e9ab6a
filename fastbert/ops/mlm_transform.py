"""The first step of the masked language model's head, at the labelled positions only: gather, product, bias and GELU.

Where the host may wait for how many these are, it gathers them, and the step is `linear` and F.gelu. The Triton kernels
do not make it wait, and gather for themselves.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.ops import leaf

_triton = leaf.define_triton(
    "mlm_transform",
    "(Tensor hidden, Tensor labels, Tensor weight, Tensor bias, int ignore_index, bool save) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "(Tensor dact, Tensor hidden, Tensor pre, Tensor index, Tensor count, Tensor weight, bool need_dhidden, "
    "bool need_dweight, bool need_dbias) -> (Tensor, Tensor, Tensor)",
)

_MULTIPLE = 8  # of the features that Triton's products read: others are padded with zeros, which change no result


def spare_features(hidden: Tensor) -> int:
    """How many features of zeros Triton's products want behind those of hidden [N, H]."""
    return -hidden.size(1) % _MULTIPLE


def mlm_transform(
    hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """gelu(hidden weight^T + bias) of the labelled rows, by Triton's kernels.

    hidden: [N, H]. labels: int64 [N]; a row is labelled if its label is not ignore_index. weight: [H, H]. bias: [H].

    Returns act [N, H] and the labels, int64 [N], both with the labelled rows first, in their order, and count, int32
    [1], how many these are. The other rows of act mean nothing and have no gradient. Differentiable once.
    """
    features, spare = hidden.size(1), spare_features(hidden)
    if spare:
        hidden, weight, bias = F.pad(hidden, (0, spare)), F.pad(weight, (0, spare, 0, spare)), F.pad(bias, (0, spare))
    save = leaf.needs_grad(hidden, weight, bias)
    arguments = (hidden.contiguous(), labels.contiguous(), weight.contiguous(), bias.contiguous(), ignore_index, save)
    act, labels, _, count, _ = _triton.call(save, *arguments)
    return act[:, :features] if spare else act, labels, count


def _forward_fake(
    hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, ignore_index: int, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(hidden),
        torch.empty_like(labels),
        labels.new_empty(labels.shape, dtype=torch.int32),
        labels.new_empty(1, dtype=torch.int32),
        hidden.new_empty(hidden.shape if save else (0,)),
    )


def _backward_fake(
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
    return (
        hidden.new_empty(hidden.shape if need_dhidden else (0,)),
        hidden.new_empty(weight.shape if need_dweight else (0,)),
        hidden.new_empty(weight.size(0) if need_dbias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, _, weight, _, _, ctx.saved = inputs
    _, labels, index, count, pre = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(labels, index, count, pre)
    ctx.save_for_backward(hidden, pre, index, count, weight)


def _autograd(kernels: leaf.Leaf, ctx: Any, dact: Tensor | None, *unused: None) -> tuple[Any, ...]:
    if dact is None:
        return (None,) * 6
    if not ctx.saved:
        raise RuntimeError(leaf.unsaved_message("mlm_transform"))
    needed = [ctx.needs_input_grad[place] for place in (0, 2, 3)]
    gradients = kernels.backward(dact.contiguous(), *ctx.saved_tensors, *needed)
    dhidden, dweight, dbias = (gradient if need else None for gradient, need in zip(gradients, needed, strict=True))
    return dhidden, None, dweight, dbias, None, None


leaf.register(
    _triton,
    forward_fake=_forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
    backward_fake=_backward_fake,
)
