"""What kernels rely on, and Triton's interpreter has only as it was repaired."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="there are no Triton kernels without triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

import triton
import triton.language as tl

import fastbert.kernels.attention  # noqa: F401 - repairs the interpreter


@triton.jit
def _product_kernel(a, b, c, M, N, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, K)
    left = tl.load(a + row[:, None] * K + inner[None, :])
    right = tl.load(b + column[:, None] * K + inner[None, :])
    product = tl.dot(left, tl.trans(right), input_precision="ieee")
    tl.store(c + row[:, None] * N + column[None, :], product)


@pytest.mark.parametrize("depth", [16, 32, 64, 128])
def test_bits_of_a_product_do_not_depend_on_the_tile(depth: int) -> None:
    """Kernels of attention's backward form the same scores in float32, in tiles of different shapes."""
    a, b = torch.randn(64, depth), torch.randn(64, depth)
    results = []
    for block_m, block_n in ((16, 16), (16, 32), (32, 16), (64, 32), (32, 64), (64, 64)):
        c = torch.full((64, 64), torch.nan)
        _product_kernel[64 // block_m, 64 // block_n](a, b, c, 64, 64, K=depth, BLOCK_M=block_m, BLOCK_N=block_n)
        results.append(c)
    torch.testing.assert_close(results[0], a @ b.t(), atol=1e-4, rtol=1e-5)
    assert all(torch.equal(result, results[0]) for result in results)
