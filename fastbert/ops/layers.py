"""Whole transformer layers in one op, for inference on a CPU, where a microsecond an op counts.

The C++ op runs the kernels of the single ops, so that results are the same to the last digit. It is a shortcut, no
further op to choose an implementation for: whatever it does not take goes through the single ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.ops import leaf

_cpu = leaf.Leaf("layers", "cpu", backward=False)


def layers(
    x: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    heads: int,
    scale: float,
    bias: Tensor | None,
    weights: tuple[Tensor, ...],
    eps1: float,
    eps2: float,
) -> Tensor | None:
    """Post-norm layers without dropout on packed tokens, one after another: x [T, H] -> [T, H]. None if the single ops
    have to run: gradients are on, a backend is forced, or the arguments are not what the C++ op takes.

    cu_seqlens, max_seqlen, scale, bias: as in `attention`. weights: of each layer weight and bias of query, key, value,
    attention output, first norm, up, down, second norm. eps1, eps2: of the norms.
    """
    if not leaf.direct(_cpu, x, None):
        return None
    return _cpu.attempt(x, cu_seqlens, max_seqlen, heads, scale, bias, weights, eps1, eps2)


def _forward_fake(x: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _autograd(kernels: leaf.Leaf, ctx: Any, dy: Tensor) -> Any:
    raise RuntimeError("layers: whole layers in one op are for inference; the single ops have gradients")


leaf.register(_cpu, forward_fake=_forward_fake, setup_context=_setup_context, backward=_autograd)
