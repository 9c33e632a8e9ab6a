"""GELU as the epilogues of ffn compute it, and in what precision its products are formed."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="there are no Triton kernels without triton")

import triton
import triton.language as tl

from fastbert.kernels import ffn, matmul

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
normal = ffn._normal


@triton.jit
def _gelu_kernel(x, y, derivative, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + place).to(tl.float32)
    below, power = normal(v, False)
    tl.store(y + place, v * below)
    tl.store(derivative + place, below + v * power * 0.3989422804014327)


def gelu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In x's dtype, and its derivative in float32."""
    x = x.to(DEVICE)
    y, derivative = torch.empty_like(x), torch.empty_like(x, dtype=torch.float32)
    _gelu_kernel[len(x) // 4096,](x, y, derivative, BLOCK=4096)
    return y.cpu(), derivative.cpu()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_of_every_number(dtype: torch.dtype) -> None:
    """Fewer than from PyTorch's GELU in that dtype get another value than the exact one, rounded."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values, derivative = gelu(numbers)
    x = numbers.double()
    below = torch.special.erfc(-x / math.sqrt(2.0)) / 2  # exact in the left tail, where 1 + erf is not
    exact = (x * below).to(dtype)
    judged = x.abs() < 1e4
    ours, theirs = (((y != exact) & judged).sum() for y in (values, F.gelu(numbers)))
    assert ours < theirs / 2
    slope = below + x * torch.exp(-x * x / 2) / math.sqrt(2.0 * math.pi)
    assert (derivative - slope)[judged].abs().max() < 1e-6


def test_at_the_ends() -> None:
    """As PyTorch has them, but for inf, of which its vectorised GELU in float16 makes NaN."""
    numbers = torch.tensor([math.inf, -math.inf, math.nan, -0.0, 6e4, -6e4], dtype=torch.float16)
    values, _ = gelu(torch.nn.functional.pad(numbers, (0, 4090)))
    assert repr(values[:6].tolist()) == repr([math.inf, math.nan, math.nan, -0.0, float(numbers[4]), -0.0])


def test_tf32_by_either_of_its_names() -> None:
    """Where the new one is set, reading the old one, `allow_tf32`, raises."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        for value in ("tf32", "ieee"):
            settings.fp32_precision = value
            assert matmul.precision(torch.float32) == value
            assert matmul.precision(torch.bfloat16) == "ieee"
    finally:
        settings.fp32_precision = before
