"""The feed-forward block of BERT: two linear layers with an exact (erf) GELU between."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import dispatch
from fastbert.ops import checks


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
    if torch.is_autocast_enabled(x.device.type):
        x, weight1, bias1, weight2 = (checks.autocast(value) for value in (x, weight1, bias1, weight2))
    _check(x, weight1, bias1, weight2)
    chosen = dispatch.select("ffn", device=x.device, dtype=x.dtype, backend=backend)
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


implementations = dispatch.register(
    "ffn",
    (
        dispatch.not_built("cuda"),
        dispatch.not_built("triton"),
        dispatch.Implementation("reference", ffn_ref, dispatch.always),
    ),
)
