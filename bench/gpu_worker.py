"""The process that measures on the GPU (``python -m fastbert.bench.gpu_worker``): one contestant of one row at a time.

A kernel that goes wrong spoils the process it runs in; the parent then starts another one and goes on.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from . import contestants, gpu_rows, runner, worker
from .workloads import Workload

MILLISECONDS = 150
"""Length of a timing, do_bench's `rep`; its warm-up is a third of it."""
LATENCY_CALLS = 200
FACTOR = {"outputs": 2.0, "gradients": 3.0}
"""How far from the truth a contestant may be, in units of what plain PyTorch's own error is, besides one rounding."""


class Gpu:
    """Answers the parent. device "cpu" is for tests: it goes the same way, with another clock."""

    def __init__(self, device: str = "cuda", rows: dict[str, Callable[[], Workload]] | None = None) -> None:
        self.device = device
        self.rows = gpu_rows.rows() if rows is None else rows
        self.row: str | None = None
        self.workload: Any = None
        self.truth: dict[str, torch.Tensor] = {}
        self.allowed: dict[str, float] = {}
        self.contestant: Any = None

    def ceilings(self) -> dict[str, Any]:
        """What the card can do: GB/s of a large copy, read and written, and GFLOP/s of large bf16 products."""
        shapes = ((8192, 8192, 8192), (gpu_rows.TOKENS, 1024, 4096), (gpu_rows.TOKENS, 4096, 1024))
        rates = {"x".join(map(str, shape)): self._matmul(*shape) for shape in shapes}
        return {"copy": self._copy(1 << 30), "matmul": max(rates.values()), "matmuls": rates}

    def _copy(self, size: int) -> float:
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / self.median(lambda: target.copy_(source)) / 1e9

    def _matmul(self, rows: int, inner: int, columns: int) -> float:
        x = torch.randn(rows, inner, dtype=torch.bfloat16, device=self.device)
        weight = torch.randn(columns, inner, dtype=torch.bfloat16, device=self.device)
        return 2 * rows * inner * columns / self.median(lambda: x @ weight.t()) / 1e9

    def alive(self) -> dict[str, Any]:
        """Raises if an earlier failure has left the device unusable for this process."""
        torch.ones(1, device=self.device).add_(1).cpu()
        return {}

    def prepare(self, row: str) -> dict[str, Any]:
        """Make a row's workload and its truth, and see how far from it the plain formula is."""
        self._forget()
        self.row, self.workload = row, self.rows[row]()
        entry = gpu_rows.plain(self.workload)
        self.contestant = entry.load()(contestants.TRUTH, self.workload)
        self.truth = _own(self.contestant.outputs())
        self._drop()
        self.contestant = entry.load()("plain", self.workload)
        errors = runner.relative_errors(self.contestant.outputs(), self.truth)
        self._drop()
        if bad := [name for name, error in errors.items() if error == float("inf")]:
            raise RuntimeError(f"plain PyTorch gives no numbers for {', '.join(bad)}: nothing can be held to that")
        training = self.workload.kind == "training" or self.workload.facts.get("backward")
        factor = FACTOR["gradients" if training else "outputs"]
        rounding = torch.finfo(getattr(torch, self.workload.facts["dtype"])).eps
        self.allowed = {name: factor * error + rounding for name, error in errors.items()}
        keys = ("name", "title", "kind", "unit", "work", "facts")
        return {key: getattr(self.workload, key) for key in keys}

    def measure(self, row: str, name: str) -> dict[str, Any]:
        """Check a contestant, then time it."""
        if row != self.row:
            self.prepare(row)
        try:
            return self._measure(name)
        except NotImplementedError as error:
            return {"status": "unavailable", "reason": str(error)}
        finally:
            self._drop()

    def _measure(self, name: str) -> dict[str, Any]:
        torch.use_deterministic_algorithms(bool(self.workload.facts.get("deterministic")))
        torch.utils.deterministic.fill_uninitialized_memory = False
        before = self._memory()
        self.contestant = gpu_rows.entries(self.workload)[name].load()(name, self.workload)
        found: dict[str, Any] = {}
        if name not in gpu_rows.YARDSTICKS:
            errors = runner.relative_errors(self.contestant.outputs(), self.truth)
            where = max(errors, key=lambda tensor: errors[tensor] / self.allowed[tensor])
            error, allowed = errors[where], self.allowed[where]
            found = {"error": error if error < float("inf") else None, "error_at": where, "tolerance": allowed}
            if not error <= allowed:
                return {**found, "status": "wrong", "reason": f"error {error:.1e} of {where} is above {allowed:.1e}"}
        self._collect()
        found["details"] = self.contestant.details()
        self.contestant.run()  # what is made once, an optimizer's state for one, belongs to the weights
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            held = self._memory()
            self.contestant.run()
            found["memory"] = {"before": held - before, "peak": torch.cuda.max_memory_allocated() - before}
        median = self._latency() if self.workload.facts.get("latency") else self.median(self.contestant.run)
        return {**found, "status": "ok", "reason": None, "median_s": median}

    def median(self, run: Callable[[], Any]) -> float:
        """Seconds of a call, the caches cold, by the device's own clock."""
        if self.device == "cpu":
            return statistics.median(worker.turn(run, 0.01))
        import triton.testing

        return triton.testing.do_bench(run, warmup=MILLISECONDS // 3, rep=MILLISECONDS, return_mode="median") / 1e3

    def _latency(self) -> float:
        """Seconds from the call until the answer is there: for so small a batch mostly the CPU's."""
        samples = []
        for number in range(LATENCY_CALLS + 20):
            start = time.perf_counter()
            self.contestant.run()
            if self.device == "cuda":
                torch.cuda.synchronize()
            if number >= 20:
                samples.append(time.perf_counter() - start)
        return statistics.median(samples)

    def _memory(self) -> int:
        return torch.cuda.memory_allocated() if self.device == "cuda" else 0

    def _drop(self) -> None:
        """Make room for the next one."""
        self.contestant = None
        torch.use_deterministic_algorithms(False)
        os.environ.pop("FASTBERT_BACKEND", None)
        torch._dynamo.reset()
        self._collect()

    def _forget(self) -> None:
        self.row, self.workload, self.truth = None, None, {}
        self._drop()

    def _collect(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def _own(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies that hold on to no model."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


if __name__ == "__main__":
    worker.serve(Gpu())
