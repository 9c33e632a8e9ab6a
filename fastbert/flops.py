"""Useful work: the floating-point operations and bytes that an answer needs, whatever a contestant spends on padding.

A multiply-add counts as 2. Only matrix products are counted (2 x weights x real tokens, and attention's two products
over the real lengths); softmax, GELU, LayerNorm and heads are not, and neither is anything recomputed. A backward pass
counts twice its forward, so a training step counts 3 times. `peak_flops` is what the device could do at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

TRAINING_FACTOR = 3


def linear_flops(tokens: int, in_features: int, out_features: int) -> int:
    """FLOPs of ``[tokens, in_features] x [out_features, in_features]^T``."""
    return 2 * tokens * in_features * out_features


def attention_flops(lengths: Sequence[int], hidden_size: int) -> int:
    """FLOPs of ``q k^T`` and ``p v`` over all heads, each sequence attending to its own real tokens only."""
    return sum(4 * n * n * hidden_size for n in lengths)


def layer_flops(lengths: Sequence[int], hidden_size: int, intermediate_size: int) -> int:
    """FLOPs of the forward of one encoder layer: query, key, value, output, the two of the FFN, and attention."""
    tokens = sum(lengths)
    weights = 4 * hidden_size * hidden_size + 2 * hidden_size * intermediate_size
    return 2 * tokens * weights + attention_flops(lengths, hidden_size)


def encoder_flops(
    lengths: Sequence[int], hidden_size: int, intermediate_size: int, num_layers: int, training: bool = False
) -> int:
    """FLOPs of the encoder for sequences of these real lengths; three times the forward if ``training``."""
    forward = num_layers * layer_flops(lengths, hidden_size, intermediate_size)
    return forward * TRAINING_FACTOR if training else forward


def peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> tuple[float, str]:
    """FLOP/s that this process's device can do, measured over about ``seconds``, and how.

    CPU: a loop of fp32 multiply-adds on all threads, or the rate of a matrix product, which is not the machine's peak,
    where the extension is not built. GPU: the rate of a large matrix product in ``dtype``.
    """
    if device.type != "cpu":
        name = str(dtype).removeprefix("torch.")
        return _product_rate(8192, device, dtype, seconds), f"{name} matrix product"
    try:
        from fastbert import _C
    except ImportError:
        return _product_rate(2048, device, torch.float32, seconds), "fp32 matrix product (the extension is not built)"
    return 1e9 * _C.peak_gflops(torch.get_num_threads(), seconds), "fp32 multiply-add loop"


def _product_rate(size: int, device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    x, weight = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    calls: list[Callable[[], object]] = [lambda: torch.mm(x, weight)]
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        # BLAS and oneDNN differ up to twofold on one machine; the higher one is the nearer to the peak
        calls.append(lambda: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""))
    return max(2 * size**3 / best_time(call, seconds / len(calls), device) for call in calls)


def best_time(call: Callable[[], object], seconds: float, device: torch.device) -> float:
    """The shortest time in seconds of ``call``, of as many as fit into about ``seconds``, after one that warms up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        wait()
        start = time.perf_counter()
        call()
        wait()
        best = min(best, time.perf_counter() - start)
    return best
