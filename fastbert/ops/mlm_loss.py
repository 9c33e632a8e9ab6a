"""Masked language model loss at the labelled positions only: transform, decoder and cross-entropy."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import dispatch
from fastbert.ops import checks, leaf
from fastbert.ops.layernorm import layernorm
from fastbert.ops.linear import linear
from fastbert.ops.mlm_transform import mlm_transform, spare_features


def mlm_loss_ref(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The specification, in plain PyTorch, of what follows the transform: the sum of the cross-entropies.

    hidden: [N, H]. labels: int64 [N]. weight: [V, H]. bias: [V] or None. Returns a scalar, float32 (float64 for
    float64).
    """
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)),
        labels,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="sum",
    )


def mlm_loss(
    hidden: Tensor,
    labels: Tensor,
    decoder_weight: Tensor,
    decoder_bias: Tensor | None,
    transform_weight: Tensor,
    transform_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float = 1e-12,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    num_items: float | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of BERT's masked language model head, computed only where there is a label.

    hidden: [..., H]. labels: int64 [...], in [0, V) or ignore_index. decoder_weight: [V, H]. decoder_bias: [V], or None
        for a decoder without one. transform_weight: [H, H]. transform_bias, norm_weight, norm_bias: [H].
        hidden and the transform's weight and bias have one dtype, outside of autocast also that of decoder_weight;
        decoder_bias has decoder_weight's. Under autocast, the products cast as nn.Linear would.
    label_smoothing: in [0, 1]: the share of each target that is spread over the whole vocabulary, as
        F.cross_entropy does it.
    num_items: what the sum is divided by, in place of the number of labels (gradient accumulation): a number, or a
        tensor of one.
    backend: forces an implementation (see `fastbert.dispatch`) of the loss and of its transform. Triton's kernels have
        the transform's product in them, and no `linear` is chosen.

    Returns (loss, count): a float32 scalar (float64 for float64), and the number of labels, int64. Without any
    label the loss is NaN, as PyTorch's own mean is, or with num_items 0, and the gradients are 0. Differentiable once.
    Raises IndexError if a label has no row in decoder_weight, ValueError or TypeError for wrong shapes, dtypes or
    devices. The Triton kernels, for which the host does not wait, give NaN for such a label.
    """
    checks.floating("mlm_loss", "hidden", hidden)
    label_smoothing = checks.number("mlm_loss", "label_smoothing", label_smoothing)
    ignore_index = checks.integer("mlm_loss", "ignore_index", ignore_index)
    _check(hidden, labels, decoder_weight, decoder_bias, label_smoothing)
    _check_transform(hidden, transform_weight, transform_bias)
    num_items = _check_items(num_items)
    hidden = leaf.as_rows(hidden)
    labels = labels.reshape(-1)
    autocasting = checks.autocasting(hidden)
    dtype = checks.autocast(hidden.new_empty(0)).dtype if autocasting else hidden.dtype
    chosen = dispatch.select("mlm_loss", device=hidden.device, dtype=dtype, backend=backend)
    labelled: int | Tensor = ignore_index
    if chosen.name == "triton":  # which gathers for itself, without making the host wait for how many rows there are
        x, weight, bias = hidden, transform_weight, transform_bias
        if autocasting:
            x, weight, bias = checks.autocast(x), checks.autocast(weight), checks.autocast(bias)
        activation, labels, labelled = mlm_transform(x, labels, weight, bias, ignore_index)
        count = labelled[0].long()
    else:
        chosen_rows = labels != ignore_index
        count = chosen_rows.sum()
        if not torch.compiler.is_compiling():  # where a shape that depends on the data would break the graph
            index = chosen_rows.nonzero().squeeze(1)
            hidden, labels = hidden[index], labels[index]
        activation = F.gelu(linear(hidden, transform_weight, transform_bias, backend=backend))
    transformed = layernorm(activation, norm_weight, norm_bias, eps=eps, backend=backend)
    if autocasting:
        transformed, decoder_weight = checks.autocast(transformed), checks.autocast(decoder_weight)
        decoder_bias = None if decoder_bias is None else checks.autocast(decoder_bias)
    total = chosen.run(transformed, labels, decoder_weight, decoder_bias, labelled, label_smoothing)
    if num_items is not None:
        return total / (num_items.to(total.dtype) if isinstance(num_items, Tensor) else num_items), count
    # 0 / 0 would make the gradients NaN where PyTorch's are 0.
    return total / count.clamp(min=1) + torch.where(count == 0, torch.nan, 0.0).to(total.dtype), count


def _check_items(num_items: float | Tensor | None) -> float | Tensor | None:
    """num_items as a number or a tensor without dimensions, if there is one."""
    if num_items is None:
        return None
    if not isinstance(num_items, Tensor):
        return checks.finite("mlm_loss", "num_items", num_items, negative=False)
    if num_items.numel() != 1 or num_items.is_complex():
        given = f"a tensor of {num_items.dtype} of shape {list(num_items.shape)}"
        raise ValueError(f"mlm_loss: num_items must be a number or a tensor of one real number, got {given}")
    return num_items.reshape(())


def _check(
    hidden: Tensor, labels: Tensor, decoder_weight: Tensor, decoder_bias: Tensor | None, label_smoothing: float
) -> None:
    """Checks all but the transform."""
    checks.tensor("mlm_loss", "labels", labels)
    if labels.dtype is not torch.int64:
        raise TypeError(f"mlm_loss: labels must be torch.int64, got {labels.dtype}")
    if labels.device != hidden.device:
        raise ValueError(f"mlm_loss: labels is on {labels.device} but hidden is on {hidden.device}; they must agree")
    if hidden.dim() == 0 or tuple(labels.shape) != tuple(hidden.shape[:-1]):
        raise ValueError(
            f"mlm_loss: hidden must have shape [..., features] and labels [...], got {list(hidden.shape)} and "
            f"{list(labels.shape)}"
        )
    same = not checks.autocasting(hidden)
    checks.operand("mlm_loss", "decoder_weight", decoder_weight, hidden, "hidden", same_dtype=same)
    if decoder_weight.dim() != 2 or decoder_weight.size(0) == 0 or decoder_weight.size(1) != hidden.size(-1):
        raise ValueError(
            f"mlm_loss: decoder_weight must have shape [vocabulary, {hidden.size(-1)}], got "
            f"{list(decoder_weight.shape)}"
        )
    if decoder_bias is not None:
        checks.operand("mlm_loss", "decoder_bias", decoder_bias, decoder_weight, "decoder_weight")
        checks.shape("mlm_loss", "decoder_bias", decoder_bias, (decoder_weight.size(0),), "[vocabulary]")
    checks.probability("mlm_loss", "label_smoothing", label_smoothing)


def _check_transform(hidden: Tensor, weight: Tensor, bias: Tensor) -> None:
    """All but the norm, which `layernorm` checks."""
    features, same = hidden.size(-1), not checks.autocasting(hidden)
    checks.operand("mlm_loss", "transform_weight", weight, hidden, "hidden", same_dtype=same)
    checks.shape("mlm_loss", "transform_weight", weight, (features, features), "[features, features]")
    checks.operand("mlm_loss", "transform_bias", bias, hidden, "hidden", same_dtype=same)
    checks.shape("mlm_loss", "transform_bias", bias, (features,), "[features]")


def check_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raises IndexError if a label is neither ignore_index nor a row of the decoder. Reads the data."""
    checks.in_range("mlm_loss", "labels", labels[labels != ignore_index], vocabulary, "decoder_weight")


def _run_reference(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    if hidden.is_cpu and not torch.compiler.is_compiling():
        check_labels(labels, weight.size(0), ignore_index)
    return mlm_loss_ref(hidden, labels, weight, bias, ignore_index, label_smoothing)


_cpu = leaf.Leaf("mlm_loss", "cpu", backward=False)
_triton = leaf.define_triton(
    "mlm_loss",
    "(Tensor h, Tensor labels, Tensor weight, Tensor? bias, Tensor count, float label_smoothing, bool need_dh, "
    "bool need_dweight, bool need_dbias) -> (Tensor, Tensor, Tensor, Tensor)",
)


def _run(
    kernels: leaf.Leaf,
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labelled: int | Tensor,
    label_smoothing: float,
) -> Tensor:
    """labelled: which rows are: those whose label is not this one or, for Triton, so many of the first, int32 [1]."""
    if kernels is _triton and (spare := spare_features(hidden)):
        hidden, weight = F.pad(hidden, (0, spare)), F.pad(weight, (0, spare))
    hidden, labels, weight = hidden.contiguous(), labels.contiguous(), weight.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    needed = [leaf.needs_grad(tensor) for tensor in (hidden, weight, bias)]
    try:
        return kernels.call(any(needed), hidden, labels, weight, bias, labelled, label_smoothing, *needed)[0]
    except RuntimeError:
        if isinstance(labelled, int):  # the kernel checks the labels too, but can raise nothing else
            check_labels(labels, weight.size(0), labelled)
        raise


def _supports_cpu(device_type: str, dtype: torch.dtype, requires: Any) -> str | None:
    return dispatch.cpu_reason(_cpu.missing, device_type, (dtype,))


def _supports_triton(device_type: str, dtype: torch.dtype, requires: Any) -> str | None:
    return dispatch.triton_reason(device_type, (dtype,))


def _forward_fake(
    h: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labelled: int | Tensor,
    label_smoothing: float,
    need_dh: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stored = torch.float32 if h.dtype is torch.float16 else h.dtype  # until `_autograd` multiplies them
    return (
        h.new_empty((), dtype=torch.float32),
        h.new_empty(h.shape if need_dh else (0,), dtype=stored),
        h.new_empty(weight.shape if need_dweight else (0,), dtype=stored),
        h.new_empty(weight.size(0) if need_dbias else 0, dtype=stored),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.saved, ctx.dtype = inputs[6:], inputs[0].dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _autograd(kernels: leaf.Leaf, ctx: Any, dloss: Tensor | None, *unused: None) -> tuple[Any, ...]:
    if dloss is None:
        return (None,) * 9
    if not any(ctx.saved):
        raise RuntimeError(leaf.unsaved_message("mlm_loss"))
    if torch.is_grad_enabled():  # the saved gradients are constants: a second derivative would silently lack them
        raise RuntimeError(leaf.second_order_message(kernels))
    dh, dweight, dbias = (  # the factor is one over a count, which 16 bits would round: all gradients alike
        (gradient.float() * dloss.float()).to(ctx.dtype) if needed else None
        for gradient, needed in zip(ctx.saved_tensors, ctx.saved, strict=True)
    )
    return dh, None, dweight, dbias, *(None,) * 5


for _kernels in (_cpu, _triton):
    leaf.register(_kernels, forward_fake=_forward_fake, setup_context=_setup_context, backward=_autograd)

implementations = dispatch.register(
    "mlm_loss",
    (
        dispatch.Implementation("cpu", functools.partial(_run, _cpu), _supports_cpu),
        dispatch.Implementation("triton", functools.partial(_run, _triton), _supports_triton),
        dispatch.Implementation("reference", _run_reference, dispatch.always),
    ),
)
