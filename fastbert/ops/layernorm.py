"""LayerNorm with what precedes it in BERT: bias, dropout and residual."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbert import dispatch
from fastbert.ops import checks, philox


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
    backend: forces an implementation (see `fastbert.dispatch`).

    Returns [..., H] in the promoted dtype of x and residual; statistics are float32 (float64 for float64).
    Differentiable once. Raises ValueError or TypeError for wrong shapes, dtypes or devices.
    """
    _check(x, weight, bias, x_bias, residual, dropout_p, seed)
    others = (weight.dtype, None if residual is None else residual.dtype)
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


implementations = dispatch.register(
    "layernorm",
    (
        dispatch.not_built("cuda"),
        dispatch.not_built("triton"),
        dispatch.Implementation("reference", layernorm_ref, dispatch.always),
    ),
)
