"""Tokens a second and the share of the machine's peak that a training run makes use of."""

from __future__ import annotations

import time
from typing import Any

import torch

from fastbert.bench.flops import TRAINING_FACTOR, encoder_flops, linear_flops  # type: ignore[import-not-found]

PEAK_SECONDS = 0.5  # spent on measuring the peak
GEMM_SIZE = 8192  # of the matrices that a GPU's is measured with


class Work:
    """Useful floating-point operations of training steps, in which padding and anything recomputed do not count.

    Matrix products of the encoder over the real tokens, attention over the real lengths, and the transform and decoder
    of the masked language model at labelled positions only; a backward counts twice its forward.
    """

    def __init__(self, config: Any) -> None:
        self.hidden = config.hidden_size
        self.shape = (config.hidden_size, config.intermediate_size, config.num_hidden_layers)
        self.vocabulary = config.vocab_size

    def of(self, lengths: list[int], labels: int) -> int:
        """FLOPs of forward and backward of sequences of these lengths with as many labels."""
        head = linear_flops(labels, self.hidden, self.hidden) + linear_flops(labels, self.hidden, self.vocabulary)
        return encoder_flops(lengths, *self.shape, training=True) + TRAINING_FACTOR * head


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that this process's device can do, measured, and how.

    CPU: a loop of fp32 multiply-adds on all threads, or the rate of a matrix product where the extension is not built.
    GPU: the rate of a large matrix product in ``dtype``.
    """
    if device.type == "cpu":
        try:
            from fastbert import _C

            return 1e9 * _C.peak_gflops(torch.get_num_threads(), PEAK_SECONDS), "fp32 multiply-add loop"
        except ImportError:
            return _gemm_rate(device, torch.float32, 2048), "fp32 matrix product"
    return _gemm_rate(device, dtype, GEMM_SIZE), f"{str(dtype).removeprefix('torch.')} matrix product"


def _gemm_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    x = torch.randn(size, size, device=device, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + PEAK_SECONDS
    torch.mm(x, x)
    while best == float("inf") or time.perf_counter() < end:
        _wait(device)
        start = time.perf_counter()
        torch.mm(x, x)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
