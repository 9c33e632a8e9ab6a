"""A contestant's process: reads one JSON command a line, answers one JSON line (``python -m fastbert.bench.worker``).

Two thread pools in one process spoil each other, so nobody shares a process. Whatever libraries print goes to stderr.
"""

import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHORT_CALL = 0.1
"""Calls shorter than this (seconds) get one untimed call at the start of a turn, as the others cooled the caches."""


def turn(run: Callable[[], Any], seconds: float) -> list[float]:
    """Seconds of each call of one turn: as many calls as fit into ``seconds``, at least one."""
    end = time.perf_counter() + seconds
    samples: list[float] = []
    first = True
    while not samples or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        took = time.perf_counter() - start
        if not first or took >= SHORT_CALL:
            samples.append(took)
        first = False
    return samples


class Others:
    """How much of the cores' time went to other processes (and the hypervisor): what makes a timing worthless."""

    def __init__(self) -> None:
        self.start = self._now()

    def share(self) -> float | None:
        """Between 0 and 1 since the object was made; None where the system does not tell (not Linux)."""
        now = self._now()
        if now is None or self.start is None:
            return None
        wall, busy, own = (after - before for after, before in zip(now, self.start, strict=True))
        return min(1.0, max(0.0, busy - own) / wall) if wall else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds on all cores that we may use: elapsed, busy, and busy for this process."""
        try:
            cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
            lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        except (OSError, AttributeError):
            return None
        # user nice system idle iowait irq softirq steal
        ticks = [[int(value) for value in fields[1:9]] for fields in lines if fields and fields[0] in cores]
        busy = sum(sum(core) - core[3] - core[4] for core in ticks) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter() * len(cores), busy, time.process_time()


def peak_memory(run: Callable[[], Any], calls: int) -> dict[str, int] | None:
    """Resident memory (bytes) before the first and at its highest during ``calls`` calls; None if not on Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        for _ in range(calls):
            run()
        return {"before": before, "peak": _status("VmHWM")}
    except OSError:
        return None


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


class Worker:
    """Holds one contestant (or the peak measurement) between commands."""

    def __init__(self) -> None:
        self.contestant: Any = None

    def setup(self, folder: str, name: str, threads: int) -> dict[str, Any]:
        import torch

        from . import contestants, peak
        from .workloads import Workload

        torch.set_num_threads(threads)
        workload = Workload.load(Path(folder))
        start = time.perf_counter()
        if name == "peak":
            self.contestant = peak.Peak(workload)
        else:
            self.contestant = contestants.entry(workload.kind, name).load()(name, workload)
        return {"setup_s": time.perf_counter() - start}

    def check(self, path: str) -> dict[str, Any]:
        from safetensors.torch import save_file

        found = self.contestant.outputs()
        save_file({k: v.detach().contiguous().clone() for k, v in found.items()}, path)
        return {"details": self.contestant.details()}

    def time(self, seconds: float) -> dict[str, Any]:
        others = Others()
        samples = turn(self.contestant.run, seconds)
        times = {"median_s": statistics.median(samples), "min_s": min(samples), "calls": len(samples)}
        return {**times, "others": others.share()}

    def memory(self, calls: int) -> dict[str, Any]:
        return {"memory": peak_memory(self.contestant.run, calls)}

    def measure(self, seconds: float) -> dict[str, Any]:
        return self.contestant.measure(seconds)


def serve(worker: Any) -> None:
    """Answer every line of stdin with what the method it names gives."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            reply = {"ok": True, **getattr(worker, command.pop("do"))(**command)}
        except Exception as error:
            traceback.print_exc()
            reply = {"ok": False, "error": f"{type(error).__name__}: {error}".strip()[:1000]}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(Worker())
