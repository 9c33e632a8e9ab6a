"""The process that measures on the GPU (``python -m fastbert.bench.gpu_worker``): one contestant of one row at a time.

A kernel that goes wrong spoils the process it runs in; the parent then starts another one and goes on.
"""

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from . import contestants, gpu_rows, runner, worker
from .workloads import Workload

MILLISECONDS = 150
"""Length of a timing, do_bench's `rep`; its warm-up is a third of it."""
SAMPLES = 5
"""How many calls a timing has at least, however long they take."""
WARM_UP = 3
"""Calls before memory is measured or a graph recorded: what is made once, an optimizer's state or the graphs of
torch.compile, belongs to the weights."""
LATENCY_CALLS = 200
FACTOR = {"outputs": 2.0, "gradients": 3.0}
"""How far from the truth a contestant may be, in units of what plain PyTorch's own error is, besides one rounding."""


class Ready(NamedTuple):
    """A contestant that can be timed, by calling `call`; clock: see `Gpu.measure`; backend: its FASTBERT_BACKEND."""

    contestant: Any
    call: Callable[[], Any]
    clock: str
    backend: str | None


class NotCapturedError(RuntimeError):
    """Recording a graph has failed, after which a process cannot be trusted with any other."""


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
        self.ready: dict[str, Ready] = {}
        """Contestants of the row that are timed again."""
        self.kept: dict[str, tuple[dict[str, torch.Tensor], dict[str, float]]] = {}
        """Truth, on the CPU, and what is allowed, of rows that come again."""

    def ceilings(self) -> dict[str, Any]:
        """What the card can do: GB/s of a large copy, read and written, and GFLOP/s of large products by dtype."""
        shapes = ((8192, 8192, 8192), (gpu_rows.TOKENS, 1024, 4096), (gpu_rows.TOKENS, 4096, 1024))
        rates = {"x".join(map(str, shape)): self._matmul(*shape, torch.bfloat16) for shape in shapes}
        single = self._matmul(4096, 4096, 4096, torch.float32)
        return {"copy": self._copy(1 << 30), "bfloat16": max(rates.values()), "float32": single, "matmuls": rates}

    def _copy(self, size: int) -> float:
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / self.median(lambda: target.copy_(source)) / 1e9

    def _matmul(self, rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
        x = torch.randn(rows, inner, dtype=dtype, device=self.device)
        weight = torch.randn(columns, inner, dtype=dtype, device=self.device)
        return 2 * rows * inner * columns / self.median(lambda: x @ weight.t()) / 1e9

    def alive(self) -> dict[str, Any]:
        """Raises if an earlier failure has left the device unusable for this process."""
        torch.ones(1, device=self.device).add_(1).cpu()
        return {}

    def prepare(self, row: str, keep: bool = False) -> dict[str, Any]:
        """Make a row's workload and its truth, and see how far from it the plain formula is, unless that is done.

        keep: the row comes again, after others.
        """
        if row == self.row:
            return {}
        self._forget()
        workload = self.rows[row]()
        if row in self.kept:
            truth, self.allowed = self.kept.pop(row)
            self.truth = {name: tensor.to(self.device) for name, tensor in truth.items()}
        else:
            self._find_truth(workload)
        if keep:
            self.kept[row] = {name: tensor.cpu() for name, tensor in self.truth.items()}, self.allowed
        self.row, self.workload = row, workload
        return {}

    def _find_truth(self, workload: Workload) -> None:
        entry = gpu_rows.plain(workload)
        self.contestant = entry.load()(contestants.TRUTH, workload)
        self.truth = _own(self.contestant.outputs())
        self._drop()
        self.contestant = entry.load()("plain", workload)
        errors = runner.relative_errors(self.contestant.outputs(), self.truth)
        self._drop()
        if bad := [name for name, error in errors.items() if error == float("inf")]:
            raise RuntimeError(f"plain PyTorch gives no numbers for {', '.join(bad)}: nothing can be held to that")
        training = workload.kind == "training" or workload.facts.get("backward")
        factor = FACTOR["gradients" if training else "outputs"]
        rounding = torch.finfo(getattr(torch, workload.facts["dtype"])).eps
        self.allowed = {name: factor * error + rounding for name, error in errors.items()}

    def measure(self, row: str, name: str, graph: bool = True, keep: bool = False) -> dict[str, Any]:
        """Check a contestant, then time it.

        graph: an operation is timed as a CUDA graph of it, or Python's time would be in the figure. keep: it is timed
        again. "clock" says what a figure is: "graph", of the replays of a graph; "stream", of calls, by the device's
        events, with gaps where Python is slower than the device; "host", from the call to the answer. With the status
        "not captured" this process is spoilt, and another one has to measure with graph=False.
        """
        self.prepare(row)
        try:
            return self._measure(name, graph, keep)
        except torch.OutOfMemoryError:
            if not self.ready:
                raise
        except NotImplementedError as error:
            return {"status": "unavailable", "reason": str(error)}
        except NotCapturedError as error:
            return {"status": "not captured", "reason": str(error)}
        finally:
            self._drop()
        self.ready.clear()  # they are made anew where they are timed again
        self._collect()
        return self.measure(row, name, graph, keep)

    def again(self, row: str, name: str, graph: bool) -> dict[str, Any]:
        """Time a contestant that `measure` found to be right once more: seconds."""
        self.prepare(row)
        try:
            if name not in self.ready:
                with self._as_it_was(None):
                    self.contestant = self._load(name)
                    self._warm_up()
                    self.ready[name] = self._timed(graph)
            ready = self.ready[name]
            with self._as_it_was(ready.backend):
                return {"median_s": self._time(ready)}
        finally:
            self._drop()

    def release(self, name: str) -> dict[str, Any]:
        """Give up what `measure` kept of a contestant."""
        self.ready.pop(name, None)
        self._collect()
        return {}

    @contextlib.contextmanager
    def _as_it_was(self, backend: str | None) -> Iterator[None]:
        """What a contestant is made and called under."""
        torch.use_deterministic_algorithms(bool(self.workload.facts.get("deterministic")))
        torch.utils.deterministic.fill_uninitialized_memory = False
        if backend is not None:
            os.environ["FASTBERT_BACKEND"] = backend
        try:
            yield
        finally:
            self._as_usual()

    def _as_usual(self) -> None:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
        os.environ.pop("FASTBERT_BACKEND", None)

    def _load(self, name: str) -> Any:
        return gpu_rows.entries(self.workload)[name].load()(name, self.workload)

    def _measure(self, name: str, graph: bool, keep: bool) -> dict[str, Any]:
        with self._as_it_was(None):
            found = self._checked(name)
            if found.get("status") == "wrong":
                return found
            ready = self._timed(graph)
            if keep:
                self.ready[name] = ready
            median = self._time(ready)
        return {**found, "status": "ok", "reason": None, "clock": ready.clock, "median_s": median}

    def _checked(self, name: str) -> dict[str, Any]:
        """How far a contestant is from the truth, what it says of itself, and its memory; it is warm then."""
        before, graphs = self._memory(), self._held_by_graphs()
        self.contestant = self._load(name)
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
        self._warm_up()
        if self.device == "cuda":
            self._collect()
            torch.cuda.reset_peak_memory_stats()
            held = self._memory()
            self.contestant.run()
            # a replay allocates nothing: what it works in was put aside when the graph was recorded
            graphs = self._held_by_graphs() - graphs
            peak = torch.cuda.max_memory_allocated() - before + graphs
            found["memory"] = {"before": held - before, "peak": peak, "graphs": graphs}
        return found

    def _warm_up(self) -> None:
        for _ in range(WARM_UP):
            self.contestant.run()

    def _timed(self, graph: bool) -> Ready:
        """What to call to time the contestant, which is warm: of an operation the replay of its graph, if it has one.

        Raises NotCapturedError.
        """
        call, clock = self.contestant.run, "stream"
        if self.device == "cpu" or self.workload.facts.get("latency"):
            clock = "host"
        elif graph and self.workload.kind == "op" and not _waits(call):
            call, clock = _captured(call), "graph"
        return Ready(self.contestant, call, clock, os.environ.get("FASTBERT_BACKEND"))

    def _time(self, ready: Ready) -> float:
        return self._latency(ready.call) if self.workload.facts.get("latency") else self.median(ready.call)

    def median(self, run: Callable[[], Any]) -> float:
        """Seconds of a call, the caches cold, by the device's own clock."""
        if self.device == "cpu":
            return statistics.median(worker.turn(run, 0.01))
        import triton.testing

        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        length = max(MILLISECONDS, (SAMPLES + 1) * start.elapsed_time(end))
        return triton.testing.do_bench(run, warmup=MILLISECONDS // 3, rep=length, return_mode="median") / 1e3

    def _latency(self, run: Callable[[], Any]) -> float:
        """Seconds from the call until the answer is there: for so small a batch mostly the CPU's."""
        samples = []
        for number in range(LATENCY_CALLS + 20):
            start = time.perf_counter()
            run()
            if self.device == "cuda":
                torch.cuda.synchronize()
            if number >= 20:
                samples.append(time.perf_counter() - start)
        return statistics.median(samples)

    def _memory(self) -> int:
        return torch.cuda.memory_allocated() if self.device == "cuda" else 0

    def _held_by_graphs(self) -> int:
        """Bytes in the pools of CUDA graphs that no tensor has."""
        if self.device == "cpu":
            return 0
        pools = [part for part in torch.cuda.memory_snapshot() if tuple(part["segment_pool_id"]) != (0, 0)]
        return sum(part["total_size"] - part["allocated_size"] for part in pools)

    def _drop(self) -> None:
        """Make room for the next one."""
        self.contestant = None
        self._collect()

    def _forget(self) -> None:
        self.row, self.workload, self.truth = None, None, {}
        self.ready.clear()
        self.contestant = None
        self._as_usual()
        torch._dynamo.reset()
        self._collect()

    def _collect(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def _waits(run: Callable[[], Any]) -> bool:
    """Whether a call waits for the device, which cannot be recorded."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """The replay of a call's CUDA graph. Raises NotCapturedError."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries make what they need for a stream at the first calls on it
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    try:
        with torch.cuda.graph(graph):
            run()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise NotCapturedError(str(error)) from error
    return graph.replay


def _own(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies that hold on to no model."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


if __name__ == "__main__":
    worker.serve(Gpu())
