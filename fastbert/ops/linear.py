"""Linear layer, or several on the same input in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import dispatch
from fastbert.ops import checks


def linear_ref(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """The specification, in plain PyTorch. weights: [Ni, K] each; biases: [Ni] each, or none. Returns [..., sum Ni]."""
    outputs = [F.linear(x, weight, biases[i] if biases else None) for i, weight in enumerate(weights)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor] | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """x @ weight^T + bias.

    x: [..., K]. weight: [N, K], or a sequence of [Ni, K] whose outputs are concatenated (query, key and value in
    one pass). bias: [N], or a sequence of [Ni] if the weight is one, or None. All of one dtype and device.
    backend: forces an implementation (see `fastbert.dispatch`).

    Returns [..., N or sum of Ni]. Differentiable once. Under autocast, casts as nn.Linear would.
    Raises ValueError or TypeError for wrong shapes, dtypes or devices.
    """
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    biases = [] if bias is None else [bias] if isinstance(bias, Tensor) else list(bias)
    if torch.is_autocast_enabled(x.device.type):
        x = checks.autocast(x)
        weights = [checks.autocast(w) for w in weights]
        biases = [checks.autocast(b) for b in biases]
    _check(x, weights, biases)
    chosen = dispatch.select("linear", device=x.device, dtype=x.dtype, backend=backend)
    return chosen.run(x, weights, biases)


def _check(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> None:
    checks.floating("linear", "x", x)
    if x.dim() == 0:
        raise ValueError("linear: x must have shape [..., in_features], got []")
    if not weights:
        raise ValueError("linear: weight must be a tensor or a sequence of at least one, got none")
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


implementations = dispatch.register("linear", (dispatch.Implementation("reference", linear_ref, dispatch.always),))
