"""Runs a workload: one process a contestant, correctness first, then interleaved rounds; Ctrl-C keeps what there is."""

import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file

from . import contestants
from .workloads import Workload

TOLERANCE = {"outputs": 1e-4, "gradients": 1e-3}
"""Largest error allowed, relative to the tensor's largest true value. Sound fp32 stays ten times below it."""
REST_S = 0.05
"""Pause between turns, so that a finished contestant's threads stop spinning before the next one starts."""
MEMORY_STEPS = 3

Progress = Callable[[str], None]


class WorkerError(RuntimeError):
    """A contestant's process failed: it said why, it died, or it did not answer in time."""


class LateError(WorkerError):
    """It did not answer in time."""


class WorkerProcess:
    """The parent's end of a process that runs ``module`` of this package, which serves as ``worker`` does."""

    def __init__(self, threads: int, timeout: float = 900.0, module: str = "worker") -> None:
        self.timeout = timeout
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - close() closes it
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        env |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        # a session of its own: Ctrl-C reaches the parent only, which ends the round and writes what there is
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.{module}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=env,
            start_new_session=True,
        )
        self.silent = False
        """Whether an answer failed to come: there will be none any more."""
        self._unread = b""

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends one command and waits for its answer. Raises WorkerError."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        reply = json.loads(self._line(do))
        if not reply.pop("ok"):
            raise WorkerError(reply["error"])
        return reply

    def _line(self, do: str) -> bytes:
        assert self.process.stdout is not None
        end = time.monotonic() + self.timeout
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                self.silent = True
                raise LateError(f"no answer to '{do}' in {self.timeout:.0f} s")
            read = os.read(self.process.stdout.fileno(), 1 << 16)
            if not read:
                self.silent = True
                raise WorkerError(
                    f"the process ended with status {self.process.wait()} during '{do}'{self._last_words()}"
                )
            self._unread += read
        line, self._unread = self._unread.split(b"\n", 1)
        return line

    def _last_words(self) -> str:
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1][:300]}" if lines else ""

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            if stream is not None:
                stream.close()


def turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """The order of measuring: A B C, A B C, ... as (round, name)."""
    for number in range(rounds):
        for name in names:
            yield number, name


def relative_errors(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> dict[str, float]:
    """``max|found - truth| / max|truth|`` of each tensor.

    A tensor whose true values are all tiny (a key bias has gradient 0) is held to a thousandth of the largest tensor.
    NaN, a missing tensor or another shape is an infinite error.
    """
    if not truth:
        raise ValueError("truth is empty")
    floor = 1e-3 * max(float(t.abs().max()) for t in truth.values() if t.numel())
    errors = {}
    for name, true in truth.items():
        mine = found.get(name)
        errors[name] = float("inf")
        if mine is not None and mine.shape == true.shape:
            error = float((mine.double() - true.double()).abs().max()) / max(float(true.abs().max()), floor)
            errors[name] = error if error == error else float("inf")
    return errors


def relative_error(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest of the ``relative_errors``, and the name of the tensor."""
    errors = relative_errors(found, truth)
    where = max(errors, key=lambda name: errors[name])
    return errors[where], where


def run(
    workload: Workload,
    names: Sequence[str],
    threads: int,
    repeats: int,
    seconds: float = 0.5,
    memory: bool = False,
    progress: Progress = lambda text: None,
) -> dict[str, Any]:
    """Measures ``workload`` with each contestant and returns the record of the row (JSON-ready, see report.SCHEMA).

    ``repeats`` rounds, in each of which every contestant has one turn of about ``seconds`` (at least one call).
    ``memory`` adds the peak resident memory of a fresh process over a few calls. A contestant that is not installed,
    fails or is wrong gets a status and a reason, and no speed. Ctrl-C ends it early with ``complete: false``.
    """
    record: dict[str, Any] = {
        "row": workload.name,
        "title": workload.title,
        "kind": workload.kind,
        "unit": workload.unit,
        "work": workload.work,
        "facts": workload.facts,
        "threads": threads,
        "rounds": 0,
        "complete": False,
        "others": None,
        "peak": {"rate": None, "how": None, "samples": []},
        "contestants": {name: {"status": "not run", "reason": None} for name in names},
    }
    with tempfile.TemporaryDirectory(prefix="fastbert-bench-") as scratch:
        folder = Path(scratch)
        workload.save(folder)
        workers: dict[str, WorkerProcess] = {}
        try:
            _prepare(workload, record, folder, workers, threads, progress)
            if memory:
                _measure_memory(workload, record, folder, threads, progress)
            _rounds(record, workers, repeats, seconds, progress)
            record["complete"] = True
        except KeyboardInterrupt:
            progress("interrupted: keeping what was measured")
        finally:
            for worker in workers.values():
                worker.close()
    _summarise(record)
    return record


def _start(workload_folder: Path, name: str, threads: int) -> WorkerProcess:
    worker = WorkerProcess(threads)
    try:
        worker.ask("setup", folder=str(workload_folder), name=name, threads=threads)
    except BaseException:
        worker.close()
        raise
    return worker


def _prepare(
    workload: Workload,
    record: dict[str, Any],
    folder: Path,
    workers: dict[str, WorkerProcess],
    threads: int,
    progress: Progress,
) -> None:
    """Starts the workers, holds their outputs to the truth, and leaves those that are right in ``workers``."""
    progress("the truth in float64")
    truth_worker = _start(folder, contestants.TRUTH, threads)
    try:
        truth_worker.ask("check", path=str(folder / "truth.safetensors"))
    finally:
        truth_worker.close()
    truth = load_file(folder / "truth.safetensors")
    tolerance = TOLERANCE["outputs" if workload.kind == "inference" else "gradients"]
    for name, item in record["contestants"].items():
        missing = contestants.entry(workload.kind, name).missing()
        if missing:
            item.update(status="unavailable", reason=missing)
            continue
        progress(f"{name}: starting, checking outputs")
        path = folder / "outputs.safetensors"
        try:
            worker = _start(folder, name, threads)
            workers[name] = worker
            details = worker.ask("check", path=str(path))["details"]
        except WorkerError as error:
            item.update(status="failed", reason=str(error))
            _drop(workers, name)
            continue
        off, where = relative_error(load_file(path), truth)
        item.update(error=off if off < float("inf") else None, error_at=where, tolerance=tolerance, details=details)
        if off <= tolerance:
            item["status"] = "ok"
        else:
            item.update(status="wrong", reason=f"error {off:.1e} of {where} is above {tolerance:.0e}")
            _drop(workers, name)
    workers["peak"] = _start(folder, "peak", threads)


def _drop(workers: dict[str, WorkerProcess], name: str) -> None:
    if name in workers:
        workers.pop(name).close()


def _measure_memory(workload: Workload, record: dict[str, Any], folder: Path, threads: int, progress: Progress) -> None:
    for name, item in record["contestants"].items():
        if item["status"] != "ok":
            continue
        progress(f"{name}: peak memory")
        try:
            worker = _start(folder, name, threads)
            try:
                item["memory"] = worker.ask("memory", calls=MEMORY_STEPS)["memory"]
            finally:
                worker.close()
        except WorkerError as error:
            item["memory"] = None
            item["memory_reason"] = str(error)


def _rounds(
    record: dict[str, Any], workers: dict[str, WorkerProcess], repeats: int, seconds: float, progress: Progress
) -> None:
    for item in record["contestants"].values():
        if item["status"] == "ok":
            item["turns"] = []
    order = ["peak", *(name for name in workers if name != "peak")]
    for number, name in turns(order, repeats):
        if name not in workers:
            continue
        time.sleep(REST_S)
        if name == "peak":
            measured = workers["peak"].ask("measure", seconds=min(seconds, 0.3))
            record["peak"]["how"] = measured["how"]
            record["peak"]["samples"].append(measured["rate"])
            continue
        item = record["contestants"][name]
        try:
            item["turns"].append(workers[name].ask("time", seconds=seconds))
        except WorkerError as error:
            item.update(status="failed", reason=str(error))
            item.pop("turns")
            _drop(workers, name)
            continue
        record["rounds"] = number + 1
        progress(f"round {number + 1}/{repeats} {name} {item['turns'][-1]['median_s'] * 1e3:.2f} ms")


def _summarise(record: dict[str, Any]) -> None:
    """Medians, rates and shares of peak from the turns. Only a contestant that was right and timed gets any."""
    others = [
        t["others"] for c in record["contestants"].values() for t in c.get("turns", []) if t["others"] is not None
    ]
    record["others"] = statistics.mean(others) if others else None
    samples = record["peak"]["samples"]
    peak = record["peak"]["rate"] = statistics.median(samples) if samples else None
    for item in record["contestants"].values():
        taken = item.get("turns")
        if item["status"] != "ok" or not taken:
            if item["status"] == "ok":
                item.update(status="not run", reason="interrupted before its first turn")
            item.pop("turns", None)
            continue
        item["median_s"] = statistics.median(t["median_s"] for t in taken)
        item["min_s"] = min(t["min_s"] for t in taken)
        item["rate"] = record["work"] / item["median_s"] / 1e9
        item["share_of_peak"] = item["rate"] / peak if peak else None
