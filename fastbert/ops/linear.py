"""Linear layer, or several on the same input in one pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import dispatch
from fastbert.ops import checks, leaf

MAX_WEIGHTS = 4  # of one call; the C++ op has room for no more
FEW_TOKENS = 512  # up to here putting weights together on a GPU would take about as long as the product


def linear_ref(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """The specification, in plain PyTorch. weights: [Ni, K] each; biases: [Ni] each, or none. Returns [..., sum Ni]."""
    outputs = [F.linear(x, weight, biases[i] if biases else None) for i, weight in enumerate(weights)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def linear_vendor(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """One product of the vendor's library, with the weights side by side: put together at each call, no copy is stale.

    Query, key and value of BERT-large are 6 MiB in bfloat16, some microseconds to copy, where the reference copies the
    output of every token; for few tokens, Triton's kernel reads the weights where they lie. The backward is one product
    for dx and one for all weights, through PyTorch's own autograd.
    """
    if len(weights) == 1:
        return F.linear(x, weights[0], biases[0] if biases else None)
    return F.linear(x, torch.cat(list(weights)), torch.cat(list(biases)) if biases else None)


def linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor] | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """x @ weight^T + bias.

    x: [..., K]. weight: [N, K], or a sequence of 1 to 4 [Ni, K] whose outputs are concatenated (query, key and value in
    one pass). bias: [N], or a sequence of [Ni] if the weight is one, or None. All of one dtype and device.
    backend: forces an implementation (see `fastbert.dispatch`).

    Returns [..., N or sum of Ni]. Differentiable once. Under autocast, casts as nn.Linear would.
    Raises ValueError or TypeError for wrong shapes, dtypes or devices.
    """
    weights = _listed("weight", weight)
    biases = [] if bias is None else _listed("bias", bias)
    checks.tensor("linear", "x", x)
    if x.dim() == 2 and leaf.direct(_cpu, x, backend):
        y = _cpu.attempt(x, weights, biases)
        if y is not None:
            return y
    if checks.autocasting(x):
        x = checks.autocast(x)
        weights = [checks.autocast(w) for w in weights]
        biases = [checks.autocast(b) for b in biases]
    _check(x, weights, biases)
    unfit = _unfit_for_triton(x, weights)
    chosen = dispatch.select("linear", device=x.device, dtype=x.dtype, requires=unfit, backend=backend)
    return chosen.run(x, weights, biases)


def _listed(name: str, value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, (Sequence, torch.nn.ParameterList)):
        raise TypeError(f"linear: {name} must be a tensor or a sequence of tensors, got {type(value).__name__}")
    return list(value)


def _check(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> None:
    checks.floating("linear", "x", x)
    if x.dim() == 0:
        raise ValueError("linear: x must have shape [..., in_features], got []")
    if not 1 <= len(weights) <= MAX_WEIGHTS:
        raise ValueError(f"linear: weight must be a tensor or a sequence of 1 to {MAX_WEIGHTS}, got {len(weights)}")
    if biases and len(biases) != len(weights):
        raise ValueError(f"linear: got {len(weights)} weights but {len(biases)} biases; they must agree")
    for i, w in enumerate(weights):
        name = "weight" if len(weights) == 1 else f"weight[{i}]"
        checks.operand("linear", name, w, x, "x")
        if w.dim() != 2 or w.size(1) != x.size(-1):
            raise ValueError(
                f"linear: {name} must have shape [out_features, {x.size(-1)}] for an x of shape {list(x.shape)}, "
                f"got {list(w.shape)}"
            )
        if biases:
            name = name.replace("weight", "bias")
            checks.operand("linear", name, biases[i], x, "x")
            checks.shape("linear", name, biases[i], (w.size(0),), "[out_features]")


_cpu = leaf.Leaf("linear", "cpu")
_triton = leaf.define_triton(
    "linear",
    "(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor",
    "(Tensor dy, Tensor x, Tensor[] weights, bool need_dx, bool need_dw, bool need_db) -> (Tensor, Tensor, Tensor)",
)
_TRITON_PART = f"several weights of one size on up to {FEW_TOKENS} rows, outside torch.compile"


def _run(kernels: leaf.Leaf, x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    rows = leaf.as_rows(x).contiguous()
    weights = [weight.contiguous() for weight in weights]
    biases = [bias.contiguous() for bias in biases]
    if not biases and torch.compiler.is_exporting():  # AOTInductor's programs hand an empty list over as None
        biases = [weight.new_zeros(weight.size(0)) for weight in weights]
    y = kernels.call(leaf.needs_grad(rows, *weights, *biases), rows, weights, biases)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.size(1))


def _unfit_for_triton(x: Tensor, weights: list[Tensor]) -> str | None:
    """Why a product is not what the Triton kernel is for, whatever the dtype, or None."""
    if len(weights) == 1:
        return "multiplies several weights at once: a single one is the vendor's"
    if torch.compiler.is_compiling():
        return f"is for up to {FEW_TOKENS} rows, whose number must not shape a compiled graph"
    if x.numel() > FEW_TOKENS * x.size(-1):
        return f"is for up to {FEW_TOKENS} rows: more are the vendor's"
    if any(weight.shape != weights[0].shape for weight in weights):
        return "multiplies weights of one size"
    return None


def _supports_cpu(device_type: str, dtype: torch.dtype, requires: Any) -> str | None:
    return dispatch.cpu_reason(_cpu.missing, device_type, (dtype,))


def _supports_triton(device_type: str, dtype: torch.dtype, requires: Any) -> str | None:
    reason = dispatch.triton_reason(device_type, (dtype,))
    if reason is None and dtype is torch.float32:
        return "multiplies 16-bit numbers only: fp32 products are the vendor's"
    return reason or requires


def _supports_vendor(device_type: str, dtype: torch.dtype, requires: Any) -> str | None:
    return None if device_type == "cuda" else f"needs a tensor on cuda, this one is on {device_type}"


def _forward_fake(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    return x.new_empty(x.size(0), sum(weight.size(0) for weight in weights))


def _backward_fake(
    dy: Tensor, x: Tensor, weights: list[Tensor], need_dx: bool, need_dw: bool, need_db: bool
) -> tuple[Tensor, Tensor, Tensor]:
    columns = sum(weight.size(0) for weight in weights)
    return (
        torch.empty_like(x) if need_dx else x.new_empty(0),
        x.new_empty(columns, x.size(1)) if need_dw else x.new_empty(0),
        x.new_empty(columns) if need_db else x.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, biases = inputs
    ctx.save_for_backward(x, *weights)
    ctx.num_biases = len(biases)


def _autograd(kernels: leaf.Leaf, ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, *weights = ctx.saved_tensors
    need_dx, need_dw, need_db = ctx.needs_input_grad
    dx, dw, db = kernels.backward(dy.contiguous(), x, weights, need_dx, any(need_dw), any(need_db))
    dweights: list[Tensor | None] = []
    dbiases: list[Tensor | None] = []
    start = 0
    for i, weight in enumerate(weights):
        size = weight.size(0)
        dweights.append(dw.narrow(0, start, size) if need_dw[i] else None)
        if ctx.num_biases:
            dbiases.append(db.narrow(0, start, size) if need_db[i] else None)
        start += size
    return dx if need_dx else None, dweights, dbiases


for _kernels in (_cpu, _triton):
    leaf.register(
        _kernels,
        forward_fake=_forward_fake,
        setup_context=_setup_context,
        backward=_autograd,
        backward_fake=_backward_fake,
    )

implementations = dispatch.register(
    "linear",
    (
        dispatch.Implementation("cpu", functools.partial(_run, _cpu), _supports_cpu),
        dispatch.Implementation("triton", functools.partial(_run, _triton), _supports_triton, part=_TRITON_PART),
        dispatch.Implementation("vendor", linear_vendor, _supports_vendor),
        dispatch.Implementation("reference", linear_ref, dispatch.always),
    ),
)
