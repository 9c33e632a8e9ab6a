"""What the machine can do, measured in turn with the contestants: a plain FMA loop on every thread, or a copy."""

from typing import Any

import torch

from fastbert.flops import best_time, peak_flops

from .workloads import Workload

CPU = torch.device("cpu")
COPY = "copy of as many bytes"


class Peak:
    """Measures what ``workload`` is held to: GFLOP/s, or GB/s of a copy that moves as many bytes as the op."""

    def __init__(self, workload: Workload) -> None:
        self.copies = workload.unit == "GB/s"
        if self.copies:
            half = torch.zeros(max(1, int(workload.work) // 8))
            self.source, self.target = half, torch.empty_like(half)

    def measure(self, seconds: float) -> dict[str, Any]:
        """``{"rate": GFLOP/s or GB/s, "how": ...}`` over about ``seconds``."""
        if self.copies:
            moved = 2 * self.source.numel() * self.source.element_size()
            return {"rate": moved / best_time(lambda: self.target.copy_(self.source), seconds, CPU) / 1e9, "how": COPY}
        rate, how = peak_flops(CPU, torch.float32, seconds)
        return {"rate": rate / 1e9, "how": how}
