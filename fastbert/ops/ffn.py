"""The feed-forward block of BERT: two linear layers with an exact (erf) GELU between."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import dispatch
from fastbert.ops import checks, leaf


def ffn_ref(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> Tensor:
    """The specification, in plain PyTorch. Shapes as in `ffn`."""
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2)


def ffn(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, *, backend: str | None = None) -> Tensor:
    """gelu(x @ weight1^T + bias1) @ weight2^T, with the exact GELU x * (1 + erf(x / sqrt(2))) / 2.

    x: [..., K]. weight1: [N, K]. bias1: [N]. weight2: [M, N]. All of one dtype and device. The second bias belongs
    to the `layernorm` that follows (its x_bias). backend: forces an implementation (see `fastbert.dispatch`).

    Returns [..., M]. Differentiable once. Under autocast, casts as nn.Linear would.
    Raises ValueError or TypeError for wrong shapes, dtypes or devices.
    """
    checks.tensor("ffn", "x", x)
    if x.dim() == 2 and leaf.direct(_cpu, x, backend):
        done = _cpu.attempt(x, weight1, bias1, weight2, False)
        if done is not None:
            return done[0]
    if checks.autocasting(x):
        x, weight1, bias1, weight2 = (checks.autocast(value) for value in (x, weight1, bias1, weight2))
    _check(x, weight1, bias1, weight2)
    sizes = (*weight1.shape, weight2.size(0))
    in_eights = all(size > 0 and size % 8 == 0 for size in sizes)
    chosen = dispatch.select("ffn", device=x.device, dtype=x.dtype, requires=in_eights, backend=backend)
    return chosen.run(x, weight1, bias1, weight2)


def _check(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> None:
    checks.floating("ffn", "x", x)
    for name, value in (("weight1", weight1), ("bias1", bias1), ("weight2", weight2)):
        checks.operand("ffn", name, value, x, "x")
    if x.dim() == 0:
        raise ValueError("ffn: x must have shape [..., features], got []")
    if weight1.dim() != 2 or weight1.size(1) != x.size(-1):
        raise ValueError(
            f"ffn: weight1 must have shape [intermediate, {x.size(-1)}] for an x of shape {list(x.shape)}, "
            f"got {list(weight1.shape)}"
        )
    checks.shape("ffn", "bias1", bias1, (weight1.size(0),), "[intermediate]")
    if weight2.dim() != 2 or weight2.size(1) != weight1.size(0):
        raise ValueError(
            f"ffn: weight2 must have shape [features, {weight1.size(0)}] for a weight1 of shape "
            f"{list(weight1.shape)}, got {list(weight2.shape)}"
        )


_cpu = leaf.Leaf("ffn", "cpu")
_cuda = leaf.Leaf("ffn", "cuda")
_triton = leaf.define_triton(
    "ffn",
    "(Tensor x, Tensor w1, Tensor b1, Tensor w2, bool save) -> (Tensor, Tensor)",
    "(Tensor dy, Tensor x, Tensor pre, Tensor w1, Tensor w2, bool need_dx, bool need_dw1, bool need_db1, "
    "bool need_dw2) -> (Tensor, Tensor, Tensor, Tensor)",
)


def _run(kernels: leaf.Leaf, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> Tensor:
    rows = leaf.as_rows(x).contiguous()
    weight1, bias1, weight2 = weight1.contiguous(), bias1.contiguous(), weight2.contiguous()
    save = leaf.needs_grad(rows, weight1, bias1, weight2)
    y = kernels.call(save, rows, weight1, bias1, weight2, save)[0]
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.size(1))


def _supports_cpu(device_type: str, dtype: torch.dtype, requires: Any) -> str | None:
    return dispatch.cpu_reason(_cpu.missing, device_type, (dtype,))


def _supports_cuda(device_type: str, dtype: torch.dtype, requires: Any) -> str | None:
    reason = dispatch.cuda_reason(_cuda.missing, device_type, (dtype,))
    if reason is None and dtype is torch.float32:
        return "multiplies 16-bit numbers only: fp32 feed-forward runs on triton or the reference"
    if reason is None and requires is False:
        return "reads eight numbers at a time: every size of the weights must be a multiple of 8"
    return reason


def _supports_triton(device_type: str, dtype: torch.dtype, requires: Any) -> str | None:
    return dispatch.triton_reason(device_type, (dtype,))


def _forward_fake(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.size(0), w2.size(0)), x.new_empty(x.size(0), w1.size(0)) if save else x.new_empty(0)


def _backward_fake(
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
    return (
        torch.empty_like(x) if need_dx else x.new_empty(0),
        torch.empty_like(w1) if need_dw1 else x.new_empty(0),
        w1.new_empty(w1.size(0) if need_db1 else 0),
        torch.empty_like(w2) if need_dw2 else x.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w1, _, w2, save = inputs
    pre = output[1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(pre)
    ctx.saved = save
    ctx.save_for_backward(x, pre, w1, w2)


def _autograd(kernels: leaf.Leaf, ctx: Any, dy: Tensor | None, dpre: None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 5
    if not ctx.saved:
        raise RuntimeError(leaf.unsaved_message("ffn"))
    needed = ctx.needs_input_grad[:4]
    gradients = kernels.backward(dy.contiguous(), *ctx.saved_tensors, *needed)
    return *(gradient if need else None for gradient, need in zip(gradients, needed, strict=True)), None


for _kernels in (_cpu, _cuda, _triton):
    leaf.register(
        _kernels,
        forward_fake=_forward_fake,
        setup_context=_setup_context,
        backward=_autograd,
        backward_fake=_backward_fake,
    )

implementations = dispatch.register(
    "ffn",
    (
        dispatch.Implementation("cpu", functools.partial(_run, _cpu), _supports_cpu),
        dispatch.Implementation("cuda", functools.partial(_run, _cuda), _supports_cuda, dispatch.NEVER_RUN),
        dispatch.Implementation("triton", functools.partial(_run, _triton), _supports_triton),
        dispatch.Implementation("reference", ffn_ref, dispatch.always),
    ),
)
