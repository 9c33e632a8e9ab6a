"""LayerNorm with what precedes it in BERT: bias, dropout and residual."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastbert import dispatch
from fastbert.ops import checks, leaf, philox


def layernorm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-12,
    seed: Tensor | None = None,
) -> Tensor:
    """The specification, in plain PyTorch: computes in float32 (float64 for float64). Shapes as in `layernorm`."""
    out_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    accumulate = torch.promote_types(out_dtype, torch.float32)
    z = x.to(accumulate)
    if x_bias is not None:
        z = z + x_bias.to(accumulate)
    if dropout_p > 0.0:
        assert seed is not None
        columns = x.size(-1)
        keep = philox.keep_rows(seed, dropout_p, x.numel() // columns, columns)
        z = philox.drop(z, keep.view(x.shape), dropout_p)
    if residual is not None:
        z = z + residual.to(accumulate)
    centred = z - z.mean(-1, keepdim=True)
    centred = centred - centred.mean(-1, keepdim=True)  # the mean's rounding would make a constant row steep
    normalised = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (normalised * weight.to(accumulate) + bias.to(accumulate)).to(out_dtype)


def layernorm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-12,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm(dropout(x + x_bias) + residual) over the last dimension.

    x: [..., H]. weight, bias, x_bias: [H]. residual: of x's shape. The dtypes may differ, as under autocast.
    dropout_p: probability of dropping an element. seed: int64, one element, on x's device; drawn from PyTorch's
        default generator if None.
    eps: added to the variance; finite, and not negative.
    backend: forces an implementation (see `fastbert.dispatch`).

    Returns [..., H] in the promoted dtype of x and residual; statistics are float32 (float64 for float64).
    Differentiable once. Raises ValueError or TypeError for wrong shapes, dtypes, devices or numbers.
    """
    checks.tensor("layernorm", "x", x)
    dropout_p = checks.number("layernorm", "dropout_p", dropout_p)
    eps = checks.finite("layernorm", "eps", eps, negative=False)
    if dropout_p == 0.0 and seed is None and x.dim() == 2 and leaf.direct(_cpu, x, backend):
        done = _cpu.attempt(x, x_bias, residual, weight, bias, eps, 0.0, None, False)
        if done is not None:
            return done[0]
    _check(x, weight, bias, x_bias, residual, dropout_p, seed)
    weight, bias = leaf.in_one_dtype(weight, bias)
    others = (weight.dtype, None if residual is None else residual.dtype, operator.index(weight.size(0)))
    chosen = dispatch.select("layernorm", device=x.device, dtype=x.dtype, requires=others, backend=backend)
    if dropout_p > 0.0 and seed is None:
        seed = philox.draw_seed(x.device)
    return chosen.run(x, weight, bias, x_bias, residual, dropout_p, eps, seed)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    residual: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    checks.floating("layernorm", "x", x)
    if x.dim() == 0 or x.size(-1) == 0:
        raise ValueError(f"layernorm: x must have shape [..., hidden] with hidden > 0, got {list(x.shape)}")
    for name, value in (("weight", weight), ("bias", bias), ("x_bias", x_bias)):
        if value is not None or name != "x_bias":
            value = checks.operand("layernorm", name, value, x, "x", same_dtype=False)
            checks.shape("layernorm", name, value, (x.size(-1),), "[hidden]")
    if residual is not None:
        checks.operand("layernorm", "residual", residual, x, "x", same_dtype=False)
        checks.shape("layernorm", "residual", residual, tuple(x.shape), "that of x")
    if dropout_p != 0.0:
        checks.probability("layernorm", "dropout_p", dropout_p)
    if seed is not None:
        checks.seed("layernorm", seed, x)


_cpu = leaf.Leaf("layernorm", "cpu")
_cuda = leaf.Leaf("layernorm", "cuda")
_triton = leaf.define_triton(
    "layernorm",
    "(Tensor x, Tensor? x_bias, Tensor? residual, Tensor weight, Tensor bias, float eps, float dropout_p, "
    "Tensor? seed, bool save) -> (Tensor, Tensor, Tensor, Tensor)",
    "(Tensor dy, Tensor z, Tensor weight, Tensor mean, Tensor rstd, float dropout_p, Tensor? seed, "
    "bool need_x_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _run(
    kernels: leaf.Leaf,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    residual: Tensor | None,
    dropout_p: float,
    eps: float,
    seed: Tensor | None,
) -> Tensor:
    rows, weight, bias = leaf.as_rows(x).contiguous(), weight.contiguous(), bias.contiguous()
    if x_bias is not None:
        x_bias = x_bias.contiguous()
    if residual is not None:
        residual = leaf.as_rows(residual).contiguous()
    save = leaf.needs_grad(rows, x_bias, residual, weight, bias)
    y = kernels.call(save, rows, x_bias, residual, weight, bias, eps, dropout_p, seed, save)[0]
    return y if x.dim() == 2 else y.view(x.shape)


def _supports_cpu(device_type: str, dtype: torch.dtype, requires: Any) -> str | None:
    return dispatch.cpu_reason(_cpu.missing, device_type, (dtype, *_given(requires)))


def _supports_triton(device_type: str, dtype: torch.dtype, requires: Any) -> str | None:
    columns = requires[2] if requires else 0
    return dispatch.triton_rows_reason(device_type, (dtype, *_given(requires)), columns)


def _given(requires: tuple[torch.dtype, torch.dtype | None, int] | None) -> Iterator[torch.dtype]:
    return (other for other in requires or () if isinstance(other, torch.dtype))


def _supports_cuda(device_type: str, dtype: torch.dtype, requires: Any) -> str | None:
    reason = dispatch.cuda_reason(_cuda.missing, device_type, (dtype, *_given(requires)))
    residual = requires[1] if requires else None
    if reason is None and {dtype, residual} == {torch.bfloat16, torch.float16}:
        return "has no kernel for x in one and residual in the other of torch.bfloat16 and torch.float16"
    return reason


def _saves_sum(x_bias: Tensor | None, residual: Tensor | None, dropout_p: float) -> bool:
    """Whether the pre-norm sum differs from x, so that the forward has to save it."""
    return x_bias is not None or residual is not None or dropout_p > 0.0


def _forward_fake(
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
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty(x.shape, dtype=dtype)
    z = torch.empty_like(y) if save and _saves_sum(x_bias, residual, dropout_p) else y.new_empty(0)
    rows = x.size(0) if save else 0
    return y, z, x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


def _backward_fake(
    dy: Tensor,
    z: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    need_x_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(z),
        torch.empty_like(z) if dropout_p > 0.0 else z.new_empty(0),
        torch.empty_like(weight),
        torch.empty_like(weight),
        mean.new_empty(z.size(1) if need_x_bias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, x_bias, residual, weight, _, _, ctx.dropout_p, seed, ctx.saved = inputs
    _, z, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(z, mean, rstd)
    ctx.save_for_backward(z if _saves_sum(x_bias, residual, ctx.dropout_p) else x, weight, mean, rstd, seed)
    ctx.dtypes = [None if value is None else value.dtype for value in (x, x_bias, residual)]


def _autograd(kernels: leaf.Leaf, ctx: Any, dy: Tensor | None, dz: None, dmean: None, drstd: None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 9
    if not ctx.saved:
        raise RuntimeError(leaf.unsaved_message("layernorm"))
    z, weight, mean, rstd, seed = ctx.saved_tensors
    need_x, need_x_bias, need_residual = ctx.needs_input_grad[:3]
    dsum, dx, dweight, dbias, dx_bias = kernels.backward(
        dy.contiguous(), z, weight, mean, rstd, ctx.dropout_p, seed, need_x_bias
    )
    if ctx.dropout_p == 0.0:
        dx = dsum
    x_dtype, x_bias_dtype, residual_dtype = ctx.dtypes
    return (
        dx.to(x_dtype) if need_x else None,
        dx_bias.to(x_bias_dtype) if need_x_bias else None,
        dsum.to(residual_dtype) if need_residual else None,
        dweight,
        dbias,
        None,
        None,
        None,
        None,
    )


for _kernels in (_cpu, _cuda, _triton):
    leaf.register(
        _kernels,
        forward_fake=_forward_fake,
        setup_context=_setup_context,
        backward=_autograd,
        backward_fake=_backward_fake,
    )

implementations = dispatch.register(
    "layernorm",
    (
        dispatch.Implementation("cpu", functools.partial(_run, _cpu), _supports_cpu),
        dispatch.Implementation("cuda", functools.partial(_run, _cuda), _supports_cuda, dispatch.NEVER_RUN),
        dispatch.Implementation("triton", functools.partial(_run, _triton), _supports_triton),
        dispatch.Implementation("reference", layernorm_ref, dispatch.always),
    ),
)
