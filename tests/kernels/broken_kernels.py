"""Kernels for the check to find fault with, as a file of fastbert.kernels would have them; one of them is sound."""

import os
from collections.abc import Iterator

import triton
import triton.language as tl

from fastbert.kernels.configs import Case


class TakesTheCompilerDown:
    def keys(self):  # as a mapping has
        os._exit(9)


@triton.jit
def _matmul_kernel(
    a_ptr,  # [BLOCK, K]
    b_ptr,  # [K, BLOCK]
    c_ptr,  # [BLOCK, BLOCK]
    K,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows, inner = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    c = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + rows[:, None] * K + start + inner[None, :])
        b = tl.load(b_ptr + (start + inner)[:, None] * BLOCK + rows[None, :])
        c = tl.dot(a, b, c)
    tl.store(c_ptr + rows[:, None] * BLOCK + rows[None, :], c)


def cases(arch: int) -> Iterator[Case]:
    signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "K": "i32:16"}
    sound = {"BLOCK": 64, "BLOCK_K": 64}
    warps = {"num_warps": 4, "num_stages": 2}
    for label, constants, options in (
        ("sound", {}, {}),
        ("spills", {"BLOCK": 128}, {"maxnreg": 96}),
        ("two-warps", {}, {"num_warps": 2}),
        ("too-much-shared", {"BLOCK": 128, "BLOCK_K": 128}, {"num_warps": 8, "num_stages": 6}),
        ("no-power-of-two", {"BLOCK": 65}, {}),
    ):
        yield Case(label, _matmul_kernel, signature, sound | constants, warps | options, matrix=True)
    yield Case("crashes", _matmul_kernel, signature, sound, TakesTheCompilerDown(), matrix=True)
