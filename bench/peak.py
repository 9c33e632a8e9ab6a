"""What the machine can do, measured in turn with the contestants: a plain FMA loop on every thread, or a copy."""

import time
from typing import Any

import torch

from .workloads import Workload

FMA = "FMA loop"
GEMM = "largest GEMM rate of torch (not the machine's peak: the extension is not built)"
COPY = "copy of as many bytes"


class Peak:
    """Measures what ``workload`` is held to: GFLOP/s, or GB/s of a copy that moves as many bytes as the op."""

    def __init__(self, workload: Workload) -> None:
        self.copies = workload.unit == "GB/s"
        if self.copies:
            half = torch.zeros(max(1, int(workload.work) // 8))
            self.source, self.target = half, torch.empty_like(half)
        self.fma = _fma_loop()

    def measure(self, seconds: float) -> dict[str, Any]:
        """``{"rate": GFLOP/s or GB/s, "how": ...}`` over about ``seconds``."""
        if self.copies:
            moved = 2 * self.source.numel() * self.source.element_size()
            return {"rate": moved / _best(lambda: self.target.copy_(self.source), seconds) / 1e9, "how": COPY}
        if self.fma is not None:
            return {"rate": self.fma(torch.get_num_threads(), seconds), "how": FMA}
        return {"rate": _gemm_rate(seconds), "how": GEMM}


def _fma_loop() -> Any:
    try:
        from fastbert import _C
    except ImportError:
        return None
    return getattr(_C, "peak_gflops", None)


def _gemm_rate(seconds: float) -> float:
    size = 2048
    x, weight, bias = torch.randn(size, size), torch.randn(size, size), torch.zeros(size)
    calls = [lambda: torch.mm(x, weight)]
    if torch.backends.mkldnn.is_available():
        # BLAS and oneDNN differ up to twofold on one machine; the higher one is the nearer to the peak
        calls.append(lambda: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))
    return max(2 * size**3 / _best(call, seconds / len(calls)) / 1e9 for call in calls)


def _best(call: Any, seconds: float) -> float:
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
