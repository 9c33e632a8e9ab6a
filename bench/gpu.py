"""``fastbert bench gpu``: the GPU table. Models and single operations, next to what the card can do.

Everything happens in another process (`gpu_worker`), which is started again when something spoils it, so that one
failure costs one figure. Figures come in the order of importance until the time is used up, and a later run can go on.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import gpu_rows, machine, report, runner

BF16_PEAK = {
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
}
"""TFLOP/s in bfloat16 without sparsity, by the data sheets: what `mfu` is a share of."""

START_S = 60.0
"""How long a contestant may take."""
COMPILING_S = 150.0
"""The same for fastbert's, which may compile Triton kernels, and for what comes first in a process."""
SLOW_S = 240.0
"""The same for those that are slow to start (torch.compile)."""
SLOW_LEAST_S = 90.0
"""With less time than this left, none of these is begun."""
GRACE_S = 15.0
"""How much longer than the time that there is a contestant may take, once it has begun."""

PLOTTED = 12
"""How many rows of models and of operations a plot shows, the first ones: a full table would be metres long."""

ROUNDS = 2
"""How often those that a row is about are timed again at its end, in turn: a figure is the median of all."""
AGAIN = ("fastbert", "triton", "cuda", "hf-compile", "fa2", "varlen", "flash-attn")
"""How the names of these begin; of scaled_dot_product_attention the fastest backend is one more."""

OURS = ("triton", "cuda")
CUTLASS = ("attention", "ffn")
"""Whose CUDA C++ kernels for sm_90 are there only if CUTLASS was when fastbert was built."""
COMPILING = ("fastbert", "fastbert-graphs", "triton")
"""Those of fastbert that may compile Triton kernels."""
NO_TRUTH = "there is nothing to compare with: "
"""How the reason of failures begins that are not the contestant's own."""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="fastbert bench gpu",
        description="Models and single operations on an NVIDIA GPU, against Hugging Face, torch.compile "
        "and unpadded stacks, and against what the card can do, measured in the same run.",
    )
    top.add_argument("--list", action="store_true", help="list rows and contestants, measure nothing")
    top.add_argument("--row", default=None, metavar="A,B", help="rows, or how their names begin (default: all)")
    top.add_argument("--contestants", default=None, metavar="A,B", help="who takes part (default: all)")
    top.add_argument(
        "--budget", type=float, default=300.0, help="seconds, after which nothing new is begun (default: 300)"
    )
    top.add_argument("--output", type=Path, default=Path("bench/results"), metavar="DIR", help="for JSON and plot")
    top.add_argument(
        "--resume",
        type=Path,
        default=None,
        metavar="PATH",
        help="a result to go on with, of the same device, commit and versions; of a folder the newest such, if any",
    )
    top.add_argument(
        "--preferred-from",
        type=Path,
        default=None,
        metavar="FILE",
        help="measure nothing, write which of Triton and CUDA C++ each op prefers by this result; needs no GPU",
    )
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
        if arguments.preferred_from is not None:
            path, unknown = write_preferred(_result(arguments.preferred_from))
            print(f"preferred: {path}")
            if unknown:
                said = f"{' and '.join(unknown)} left as they were: not known to be measured with a build with CUTLASS"
                print(f"fastbert bench gpu: {said}", file=sys.stderr)
            return 1 if unknown else 0
        if not arguments.budget > 0:
            raise ValueError(f"--budget is {arguments.budget}; it must be more than 0 seconds")
        if reason := machine.no_gpu():
            raise ValueError(f"{reason}; this benchmark needs an NVIDIA GPU")
        content = report.result("gpu", machine.describe_gpu(), None, None, [])
        path = arguments.output / f"{report.stem(content)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        if arguments.resume is not None:
            content, path = _resumed(arguments.resume, content, path)
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
    if not arguments.no_plot:
        draw(content, path)
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
    """Fills the rows of `content`, and writes it to `path` after each figure. What is there already stays."""

    def __init__(self, content: dict[str, Any], path: Path, names: list[str] | None, budget: float) -> None:
        self.content, self.path, self.names, self.budget = content, path, names, budget
        self.worker = Worker("gpu_worker")
        self.ceilings: dict[str, Any] = {}
        self.silent: dict[tuple[str, str], str] = {}
        """Contestants, and the beginnings of rows, with the row in which no answer came: a kernel may hang."""
        self.start = time.monotonic()
        self.stopped = True
        self.progress = report.progress("gpu")

    def everything(self, wanted: Sequence[str]) -> None:
        """Measure rows, in the order of `gpu_rows.plan`."""
        try:
            self.ceilings = self.worker.ask("ceilings", COMPILING_S)
        except runner.WorkerError as error:
            print(f"fastbert bench gpu: the card's own rates were not measured: {error}", file=sys.stderr)
        self.content["ceilings"] = self.ceilings or self.content.get("ceilings", {})
        records = {record["row"]: record for record in self.content["rows"]}
        plan = gpu_rows.plan(wanted)
        for place, (name, slow) in enumerate(plan):
            fresh = self.begin(name)
            if name not in records:
                records[name] = fresh
                self.content["rows"].append(fresh)
            there = records[name]["contestants"]
            for contestant, item in fresh["contestants"].items():
                if there.setdefault(contestant, item)["status"] == "not run":
                    there[contestant]["reason"] = None
            self.row(records[name], slow, later=(name, True) in plan[place + 1 :])
            taken_up = (item["status"] != "not run" or item["reason"] for item in records[name]["contestants"].values())
            records[name]["complete"] = all(taken_up)
            report.write(self.content, self.path)
        self.progress("")
        report.write(self.content, self.path)
        self.stopped = False

    def begin(self, name: str) -> dict[str, Any]:
        """The record of a row in which nobody has been measured yet."""
        workload = gpu_rows.rows()[name]()
        dtype = workload.facts["dtype"]
        ceiling, how = ("copy", report.COPY) if workload.unit == "GB/s" else (dtype, report.MATMUL[dtype])
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

    def left(self) -> float:
        """Seconds that may still be used."""
        return self.budget - (time.monotonic() - self.start)

    def row(self, record: dict[str, Any], slow: bool, later: bool = False) -> None:
        """Measure those contestants of a row that are (not) slow to start and have not been measured.

        later: the row comes again.
        """
        table = gpu_rows.entries(gpu_rows.rows()[record["row"]]())
        due = {
            name: item
            for name, item in record["contestants"].items()
            if name in table and table[name].optional == slow and item["status"] == "not run"
        }
        for name, item in list(due.items()):
            if missing := table[name].missing():
                item.update(status="unavailable", reason=missing)
                del due[name]
        for name, item in due.items():
            left = self.left()
            if where := self.silent.get((name, record["row"].partition("[")[0])):
                item["reason"] = f"not begun: it gave no answer in {where}"
                continue
            if left <= (SLOW_LEAST_S if slow else 0.0):
                item["reason"] = (
                    f"not begun with {left:.0f} s left: it may take minutes"
                    if left > 0
                    else f"the {self.budget:.0f} s were used up"
                )
                continue
            self.progress(f"{record['row']} {name} ({left:.0f} s left)")
            try:
                self.worker.ask("prepare", self.allowed(COMPILING_S), row=record["row"], keep=later)
            except runner.WorkerError as error:
                for other in due.values():
                    if other["status"] == "not run":
                        other.update(self.failure(error, NO_TRUTH))
                break
            item.update(self.measured(record["row"], name, slow))
            if item["status"] == "ok":
                item["turns"] = [{"median_s": item["median_s"]}]
                self.rate(record, item)
            report.write(self.content, self.path)
        if fresh := [name for name, item in due.items() if item["status"] == "ok"]:
            self.again(record, fresh if slow else list(record["contestants"]))

    def measured(self, row: str, name: str, slow: bool) -> dict[str, Any]:
        """What the worker found of a contestant, or why it found nothing."""
        limit = SLOW_S if slow else COMPILING_S if name in COMPILING else START_S
        arguments = {"row": row, "name": name, "keep": name.startswith(AGAIN) or _is_backend(name)}
        try:
            found = self.worker.ask("measure", self.allowed(limit), **arguments)
            if found["status"] == "not captured":
                self.worker.close()
                reason = found["reason"]
                found = self.worker.ask("measure", self.allowed(COMPILING_S), graph=False, **arguments)
                found["not_captured"] = reason
            return found
        except runner.WorkerError as error:
            if isinstance(error, runner.LateError) and self.left() > 0:
                self.silent[name, row.partition("[")[0]] = row
            return self.failure(error)

    def allowed(self, limit: float) -> float:
        """Seconds that something may take that is begun now."""
        return max(GRACE_S, min(limit, self.left() + GRACE_S))

    def failure(self, error: runner.WorkerError, what: str = "") -> dict[str, Any]:
        """What becomes of a contestant: it has failed, unless it was the time that ended, and it may be tried again."""
        if isinstance(error, runner.LateError) and self.left() <= 0:
            return {"status": "not run", "reason": f"stopped when the {self.budget:.0f} s were used up"}
        return {"status": "failed", "reason": f"{what}{error}"}

    def again(self, record: dict[str, Any], names: Sequence[str]) -> None:
        """Time those of these that the row is about again, in turn, and with them fastbert and the fastest sdpa."""
        timed = {name: item for name, item in record["contestants"].items() if item["status"] == "ok"}
        backends = [name for name in timed if _is_backend(name)]
        fastest = [
            min(group, key=lambda name: timed[name]["median_s"])
            for group in (backends, [name for name in timed if name.startswith("fastbert")])
            if group
        ]
        names = [name for name in timed if (name in names and name.startswith(AGAIN)) or name in fastest]
        try:
            for name in set(backends) - set(names):
                self.worker.ask("release", START_S, name=name)
            for _ in range(ROUNDS):
                for name in names:
                    if self.left() <= 0:
                        return
                    graph = timed[name]["clock"] == "graph"
                    limit = self.allowed(COMPILING_S)
                    turn = self.worker.ask("again", limit, row=record["row"], name=name, graph=graph)
                    timed[name]["turns"].append(turn)
        except runner.WorkerError as error:
            print(f"fastbert bench gpu: {record['row']}: not timed again: {error}", file=sys.stderr)
        finally:
            for item in timed.values():
                item["median_s"] = statistics.median(turn["median_s"] for turn in item["turns"])
                self.rate(record, item)

    def rate(self, record: dict[str, Any], item: dict[str, Any]) -> None:
        """Rates and shares from the time."""
        item["rate"] = record["work"] / item["median_s"] / 1e9
        peak = record["peak"]["rate"]
        item["share_of_peak"] = item["rate"] / peak if peak else None
        if record["kind"] != "op":
            item["tokens_per_s"] = record["facts"]["tokens"] / item["median_s"]
            is_bf16 = record["facts"]["dtype"] == "bfloat16"
            sheet = BF16_PEAK.get(self.content["machine"]["device"]) if is_bf16 else None
            item["mfu"] = item["rate"] / (sheet * 1e3) if sheet else None


def _is_backend(name: str) -> bool:
    """Whether a contestant is scaled_dot_product_attention with one of its backends."""
    return name.removeprefix("hf-").removeprefix("sdpa-") in gpu_rows.SDPA


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


def _result(path: Path) -> dict[str, Any]:
    """A result of this benchmark. Raises ValueError if the file is none, OSError if it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict) or (content.get("schema"), content.get("command")) != (report.SCHEMA, "gpu"):
        raise ValueError(f"{path} is no result of fastbert bench gpu")
    return content


def _resumed(given: Path, new: dict[str, Any], path: Path) -> tuple[dict[str, Any], Path]:
    """The result to go on with, and its file: `given`, or the newest in it that `new` may be added to, or `new`.

    Raises ValueError if `given` is a result that may not be gone on with here.
    """
    fit = []
    for file in given.glob("gpu-*.json") if given.is_dir() else [given]:
        try:
            content = _result(file)
            if reason := apart(content["machine"], new["machine"]):
                raise ValueError(f"--resume {file}: {reason}")
        except ValueError:
            if not given.is_dir():
                raise
        else:
            content["resumed"] = [*content.get("resumed", []), new["time"]]
            fit.append((content, file))
    return max(fit, key=lambda item: item[0]["time"], default=(new, path))


def apart(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Why figures of two machines do not belong together, or None."""
    for key in ("device", "arch", "cuda", "cudnn", "cuda_kernels", "versions", "commit"):
        if then.get(key) != now.get(key):
            return f"its {key} is {then.get(key)}, here it is {now.get(key)}"
    if now["commit"] is None:
        return "no commit is known, and the code may be another (FASTBERT_COMMIT names it)"
    return "the code differs from its commit, and may be another by now" if now["commit"]["dirty"] else None


def draw(content: dict[str, Any], path: Path) -> list[Path]:
    """The plots of a result: models as `path` with the ending png, operations beside it with "-ops" before that."""
    drawn = []
    for ops, ending in ((False, ".png"), (True, "-ops.png")):
        rows = [row for row in content["rows"] if (row["kind"] == "op") == ops and _has_speed(row)][:PLOTTED]
        if rows:
            drawn.append(path.with_name(path.stem + ending))
            report.plot({**content, "rows": rows}, drawn[-1])
    return drawn


def _has_speed(row: dict[str, Any]) -> bool:
    return any("median_s" in item for item in row["contestants"].values())


def preferred(content: dict[str, Any]) -> dict[str, list[str]]:
    """Of each op that has both, Triton and CUDA C++ from fast to slow, over all its rows that have both times.

    A CUDA C++ kernel that was wrong or failed in any row is not in the list: it stays off. A figure that is not a
    graph's counts for nothing: it may be Python's time.
    """
    found: dict[str, list[str]] = {}
    ratios: dict[str, list[float]] = {}
    bad: set[str] = set()
    for row in content["rows"]:
        both = [row["contestants"].get(name, {}) for name in OURS]
        if row["kind"] != "op" or len(both[1]) == 0:
            continue
        op = row["facts"]["op"]
        if both[1]["status"] in ("wrong", "failed") and not both[1]["reason"].startswith(NO_TRUTH):
            bad.add(op)
        if all(item.get("clock") == "graph" for item in both):
            ratios.setdefault(op, []).append(math.log(both[0]["median_s"] / both[1]["median_s"]))
    for op, logs in ratios.items():
        found[op] = ["triton"] if op in bad else list(OURS) if sum(logs) <= 0 else list(reversed(OURS))
    return found


def write_preferred(content: dict[str, Any]) -> tuple[Path, list[str]]:
    """Note in the package what `preferred` says of this architecture. Raises OSError if it cannot be written.

    Returns the file, and the ops whose best kernels of CUDA C++ the build did not have, as far as the result tells:
    these are left as they were.
    """
    from fastbert import dispatch

    machine, found = content["machine"], preferred(content)
    lacking = machine["arch"] == "sm_90" and not machine.get("cuda_kernels", {}).get("cutlass")
    unknown = [op for op in CUTLASS if lacking and found.pop(op, None)]
    path = dispatch.PREFERRED
    table = json.loads(path.read_text(encoding="utf-8"))
    table[machine["arch"]] = table.get(machine["arch"], {}) | found
    report.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", path)
    return path, unknown
