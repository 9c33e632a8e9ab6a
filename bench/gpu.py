"""``fastbert bench gpu``: the GPU table. Models and single operations in bfloat16, next to what the card can do.

Everything happens in another process (`gpu_worker`), which is started again when something spoils it, so that one
failure costs one figure. Figures come in the order of importance until the time is used up.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import gpu_rows, machine, report, runner

BF16_PEAK = {"NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H200": 989.4, "NVIDIA A100-SXM4-80GB": 312.0}
"""TFLOP/s in bfloat16 without sparsity, by the data sheets: what `mfu` is a share of."""

START_S = 60.0
"""How long a contestant may take; the slow ones (torch.compile) four times as long."""

PLOTTED = 9
"""How many rows the plot shows, the first ones: a full table would be metres long."""

OURS = ("triton", "cuda")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="fastbert bench gpu",
        description="Models and single operations on an NVIDIA GPU in bfloat16, against Hugging Face, torch.compile "
        "and unpadded stacks, and against what the card can do, measured in the same run.",
    )
    top.add_argument("--list", action="store_true", help="list rows and contestants, measure nothing")
    top.add_argument("--row", default=None, metavar="A,B", help="rows, or how their names begin (default: all)")
    top.add_argument("--contestants", default=None, metavar="A,B", help="who takes part (default: all)")
    top.add_argument("--budget", type=float, default=300.0, help="seconds, after which nothing new is begun")
    top.add_argument("--output", type=Path, default=Path("bench/results"), metavar="DIR", help="for JSON and plot")
    top.add_argument("--preferred", action="store_true", help="write which of Triton and CUDA C++ each op prefers")
    top.add_argument("--no-plot", action="store_true", help="write no plot")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Status: 0 if every figure that was wanted is there, 1 if some failed or were wrong, 2 for wrong usage."""
    arguments = parser().parse_args(argv)
    try:
        chosen = _chosen_rows(arguments.row, list(gpu_rows.rows()))
        names = _chosen_names(arguments.contestants)
        if arguments.list:
            for name in chosen:
                workload = gpu_rows.rows()[name]()
                print(f"{name}: {workload.title}\n    {', '.join(gpu_rows.entries(workload))}")
            return 0
        if not arguments.budget > 0:
            raise ValueError(f"--budget is {arguments.budget}; it must be more than 0 seconds")
        if reason := machine.no_gpu():
            raise ValueError(f"{reason}; this benchmark needs an NVIDIA GPU")
        content = report.result("gpu", machine.describe_gpu(), None, None, [])
        path = arguments.output / f"{report.stem(content)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"fastbert bench gpu: {error}", file=sys.stderr)
        return 2
    run = Run(content, path, names, arguments.budget)
    try:
        run.everything(chosen)
    except KeyboardInterrupt:
        print("interrupted: keeping what was measured", file=sys.stderr)
    finally:
        run.worker.close()
    for row in content["rows"]:
        print(report.table(row) + "\n")
    print(f"results: {path}")
    if arguments.preferred:
        print(f"preferred: {write_preferred(content)}")
    if not arguments.no_plot and content["rows"]:
        models = [row for row in content["rows"] if row["kind"] != "op"]
        report.plot({**content, "rows": (models or content["rows"])[:PLOTTED]}, path.with_suffix(".png"))
    states = [item["status"] for row in content["rows"] for item in row["contestants"].values()]
    ours = [
        item["status"]
        for row in content["rows"]
        for name, item in row["contestants"].items()
        if name in OURS or name.startswith("fastbert")
    ]
    if run.stopped or "ok" not in states:
        return 130 if run.stopped else 1
    return 1 if {"failed", "wrong"} & set(ours) else 0


class Worker:
    """A process that uses the GPU, started when it is needed and again after something has spoilt it."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.process: runner.WorkerProcess | None = None

    def ask(self, do: str, seconds: float, **arguments: Any) -> dict[str, Any]:
        """The answer of `module`. Raises runner.WorkerError if there is none in time, or it says what failed."""
        if self.process is None:
            self.process = runner.WorkerProcess(machine.cores(), module=self.module)
        self.process.timeout = seconds
        try:
            return self.process.ask(do, **arguments)
        except runner.WorkerError:
            if self.process.silent or not self.alive():
                self.close()
            raise

    def alive(self) -> bool:
        """Whether the process can still use the device."""
        assert self.process is not None
        self.process.timeout = 20.0
        try:
            self.process.ask("alive")
        except runner.WorkerError:
            return False
        return True

    def close(self) -> None:
        if self.process is not None:
            self.process.close()
            self.process = None


class Run:
    """Fills the rows of `content`, and writes it to `path` after each figure."""

    def __init__(self, content: dict[str, Any], path: Path, names: list[str] | None, budget: float) -> None:
        self.content, self.path, self.names, self.budget = content, path, names, budget
        self.worker = Worker("gpu_worker")
        self.ceilings: dict[str, Any] = {}
        self.start = time.monotonic()
        self.stopped = True
        self.progress = report.progress("gpu")

    def everything(self, wanted: Sequence[str]) -> None:
        """Measure rows, in the order of `gpu_rows.plan`."""
        try:
            self.ceilings = self.worker.ask("ceilings", START_S)
        except runner.WorkerError as error:
            print(f"fastbert bench gpu: the card's own rates were not measured: {error}", file=sys.stderr)
        self.content["ceilings"] = self.ceilings
        records: dict[str, dict[str, Any]] = {}
        for name, slow in gpu_rows.plan(wanted):
            if name not in records:
                records[name] = self.begin(name)
                self.content["rows"].append(records[name])
            self.row(records[name], slow)
            taken_up = (item["status"] != "not run" or item["reason"] for item in records[name]["contestants"].values())
            records[name]["complete"] = all(taken_up)
            report.write(self.content, self.path)
        self.progress("")
        report.write(self.content, self.path)
        self.stopped = False

    def begin(self, name: str) -> dict[str, Any]:
        """The record of a row in which nobody has been measured yet."""
        workload = gpu_rows.rows()[name]()
        ceiling, how = ("copy", report.COPY) if workload.unit == "GB/s" else ("matmul", report.MATMUL)
        table = gpu_rows.entries(workload)
        return {
            "row": name,
            **{key: getattr(workload, key) for key in ("title", "kind", "unit", "work", "facts")},
            "complete": False,
            "others": None,
            "peak": {"rate": self.ceilings.get(ceiling), "how": how},
            "contestants": {
                contestant: {"status": "not run", "reason": None}
                for contestant in table
                if self.names is None or contestant in self.names
            },
        }

    def row(self, record: dict[str, Any], slow: bool) -> None:
        """Measure those contestants of a row that are (not) slow to start."""
        table = gpu_rows.entries(gpu_rows.rows()[record["row"]]())
        due = {name: item for name, item in record["contestants"].items() if table[name].optional == slow}
        try:
            if due and time.monotonic() - self.start < self.budget:
                self.worker.ask("prepare", START_S, row=record["row"])
        except runner.WorkerError as error:
            for item in due.values():
                item.update(status="failed", reason=f"there is nothing to compare with: {error}")
            return
        for name, item in due.items():
            if missing := table[name].missing():
                item.update(status="unavailable", reason=missing)
                continue
            left = self.budget - (time.monotonic() - self.start)
            if left <= 0:
                item.update(reason=f"the {self.budget:.0f} s were used up")
                continue
            self.progress(f"{record['row']} {name} ({left:.0f} s left)")
            try:
                item.update(self.worker.ask("measure", START_S * (4 if slow else 1), row=record["row"], name=name))
            except runner.WorkerError as error:
                item.update(status="failed", reason=str(error))
            if "median_s" in item:
                self.rate(record, item)
            report.write(self.content, self.path)

    def rate(self, record: dict[str, Any], item: dict[str, Any]) -> None:
        """Rates and shares from the time."""
        item["rate"] = record["work"] / item["median_s"] / 1e9
        peak = record["peak"]["rate"]
        item["share_of_peak"] = item["rate"] / peak if peak else None
        if record["kind"] != "op":
            item["tokens_per_s"] = record["facts"]["tokens"] / item["median_s"]
            sheet = BF16_PEAK.get(self.content["machine"]["device"])
            item["mfu"] = item["rate"] / (sheet * 1e3) if sheet else None


def _chosen_rows(given: str | None, rows: list[str]) -> list[str]:
    """The rows whose names begin with one of the comma-separated texts, in the order of the table."""
    if given is None:
        return rows
    wanted = [part.strip() for part in given.split(",") if part.strip()]
    for part in wanted:
        if not any(name.startswith(part) for name in rows):
            raise ValueError(f"--row has {part!r}; it may have, or begin as: {', '.join(rows)}")
    chosen = [name for name in rows if name.startswith(tuple(wanted))] if wanted else []
    if not chosen:
        raise ValueError(f"--row has no name; it may have: {', '.join(rows)}")
    return chosen


def _chosen_names(given: str | None) -> list[str] | None:
    if given is None:
        return None
    known = dict.fromkeys(name for make in gpu_rows.rows().values() for name in gpu_rows.entries(make()))
    chosen = [part.strip() for part in given.split(",") if part.strip()]
    if not chosen or set(chosen) - set(known):
        raise ValueError(f"--contestants has {given!r}; it may have: {', '.join(known)}")
    return chosen


def preferred(content: dict[str, Any]) -> dict[str, list[str]]:
    """Of each op that has both, Triton and CUDA C++ from fast to slow, over all its rows that have both times.

    A CUDA C++ kernel that was wrong or failed in any row is not in the list: it stays off.
    """
    found: dict[str, list[str]] = {}
    ratios: dict[str, list[float]] = {}
    bad: set[str] = set()
    for row in content["rows"]:
        both = [row["contestants"].get(name, {}) for name in OURS]
        if row["kind"] != "op" or len(both[1]) == 0:
            continue
        op = row["facts"]["op"]
        if both[1]["status"] in ("wrong", "failed"):
            bad.add(op)
        if all("median_s" in item for item in both):
            ratios.setdefault(op, []).append(math.log(both[0]["median_s"] / both[1]["median_s"]))
    for op, logs in ratios.items():
        found[op] = ["triton"] if op in bad else list(OURS) if sum(logs) <= 0 else list(reversed(OURS))
    return found


def write_preferred(content: dict[str, Any]) -> Path:
    """Note in the package what `preferred` says of this architecture. Raises OSError if it cannot be written."""
    from fastbert import dispatch

    path = dispatch.PREFERRED
    table = json.loads(path.read_text(encoding="utf-8"))
    table[content["machine"]["arch"]] = table.get(content["machine"]["arch"], {}) | preferred(content)
    report.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", path)
    return path
