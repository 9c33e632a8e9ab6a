"""``fastbert bench tune``: the launch configurations of the Triton kernels that are fastest on this card.

For each shape class that the operations below ask for, the configuration in the table is varied one argument at a time,
or a tile and the warps together, and the operation is timed; what gives wrong numbers, does not compile or does not fit
is passed over. Nothing of this happens when fastbert is imported or used: it only reads the table.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import gpu, gpu_rows, gpu_worker, machine, ops, report, runner, worker
from .workloads import Workload

WORTH = 0.98
"""A configuration has to take less than this share of the time of the best one so far; the rest is noise."""
ATTEMPT_S = 60.0
OPS = ("attention", "linear", "ffn", "layernorm", "embedding", "mlm_loss")
MOST = {"num_stages": 7, "num_warps": 32, "maxnreg": 256}
"""What is tried at most; of tiles 4096. As many registers as 256 a thread has without a bound, too."""
TOGETHER = ("BLOCK_M", "BLOCK_N")
"""Tiles whose sizes are changed together with the number of warps, too."""
Config = dict[str, int]


def rows() -> dict[str, Callable[[], Workload]]:
    """Operations that between them ask for the usual shape classes: name -> what makes the workload."""
    found: dict[str, Callable[[], Workload]] = {}

    def add(op: str, label: str, shape: dict[str, Any], **more: Any) -> None:
        for direction in ("fwd", "fwd_bwd"):
            found[f"{op}_{direction}[{label}]"] = partial(gpu_rows.op_row, op, direction, label, shape, **more)

    for head_dim in (64, 32, 128):
        for width in (512, 128, 64):
            lengths = [width] * (gpu_rows.TOKENS // width)
            shape = gpu_rows.attention_shape(lengths, 1024 // head_dim, head_dim)
            add("attention", f"d{head_dim}-{width}", shape)
            add("attention", f"d{head_dim}-{width}-dropout", shape, dropout=ops.DROPOUT)
            if width == 512:  # the backward has kernels of its own then
                add("attention", f"d{head_dim}-{width}-deterministic", shape, deterministic=True)
                add("attention", f"d{head_dim}-{width}-fp32", shape, dtype="float32")
    for head_dim in (24, 40, 80):  # which the kernels pad to 32, 64 and 128
        shape = gpu_rows.attention_shape([512] * (gpu_rows.TOKENS // 512), 1024 // head_dim, head_dim)
        add("attention", f"d{head_dim}-512", shape)
        add("attention", f"d{head_dim}-512-dropout", shape, dropout=ops.DROPOUT)
    sizes = {"base": (768, 3072), "large": (1024, 4096), "minilm": (384, 1536)}
    for op in OPS[1:]:
        for label, (hidden, intermediate) in sizes.items():
            for tokens in (gpu_rows.TOKENS, 128):
                shape = {"hidden": hidden, "intermediate": intermediate, "heads": hidden // 64}
                shape |= {"vocab": gpu_rows.VOCABULARY, "lengths": [128] * (tokens // 128)}
                add(op, f"{label}-{tokens}", shape)
                if op not in ("linear", "ffn"):  # whose float32 is the vendor's
                    add(op, f"{label}-{tokens}-fp32", shape, dtype="float32")
    return found


def neighbours(config: Config) -> list[Config]:
    """The configurations that differ in one argument: stages by one, all else (tiles, warps) by a factor of two.

    And those of which a tile and the warps that share it are halved or doubled together: each step alone may be slower
    than where it began, as registers run out, or warps have too little to do.
    """
    found = []
    for key, value in config.items():
        values = (value - 1, value + 1) if key == "num_stages" else (value // 2, value * 2)
        found += [config | {key: other} for other in values]
    for tile in TOGETHER:
        if tile in config and "num_warps" in config:
            found += [config | {key: config[key] // 2 for key in (tile, "num_warps")}]
            found += [config | {key: config[key] * 2 for key in (tile, "num_warps")}]
    return [candidate for candidate in found if all(1 <= candidate[key] <= MOST.get(key, 4096) for key in candidate)]


class Tuner(gpu_worker.Gpu):
    """Times an operation with one configuration or another, in a process of its own."""

    def asked(self, row: str) -> dict[str, Any]:
        """Which configurations the kernels of an operation ask for, as [kernel, shape class, configuration]."""
        from fastbert.kernels import configs

        self._start(row)
        configs.used.clear()
        configs.choose.cache_clear()
        self.contestant.outputs()
        return {"asked": [[*key, config] for key, config in configs.used.items()]}

    def attempt(self, row: str, kernel: str, shape_class: str, config: Config) -> dict[str, Any]:
        """Seconds that the operation takes with this configuration, which from now on is the kernel's."""
        from fastbert.kernels import configs

        self._start(row)
        self._table()[kernel][shape_class] = config
        configs.choose.cache_clear()
        errors = runner.relative_errors(self.contestant.outputs(), self.truth)
        if bad := [name for name, error in errors.items() if not error <= self.allowed[name]]:
            raise RuntimeError(f"wrong: {', '.join(bad)}")
        self._warm_up()
        return {"seconds": self._time(self._timed(graph=True))}

    def _start(self, row: str) -> None:
        import torch

        from fastbert.kernels import configs

        if self.row != row:
            self.prepare(row)
        if self.contestant is None:
            configs.tuned(self._device()).clear()  # what was tuned before does not count
            torch.use_deterministic_algorithms(bool(self.workload.facts.get("deterministic")))
            torch.utils.deterministic.fill_uninitialized_memory = False
            self.contestant = gpu_rows.entries(self.workload)["triton"].load()("triton", self.workload)

    def _table(self) -> dict[str, dict[str, Config]]:
        from fastbert.kernels import configs

        return configs.table(configs.architecture(self._device()))

    def _device(self) -> Any:
        import torch

        return torch.device(self.device)


def search(
    ask: Callable[..., dict[str, Any]], row: str, kernel: str, shape_class: str, config: Config
) -> dict[str, Any]:
    """Goes from a configuration to the best one next to it, until none is better.

    ask: as `gpu.Worker.ask`. Returns {"config", "seconds", "before": seconds of the one it began with, "tried"}.
    Raises runner.WorkerError if that one does not run.
    """

    def attempt(candidate: Config) -> float:
        arguments = {"row": row, "kernel": kernel, "shape_class": shape_class, "config": candidate}
        return ask("attempt", ATTEMPT_S, **arguments)["seconds"]

    best, seconds = config, attempt(config)
    before, tried = seconds, {json.dumps(config, sort_keys=True)}
    while True:
        start = best
        for candidate in neighbours(start):
            name = json.dumps(candidate, sort_keys=True)
            if name in tried:
                continue
            tried.add(name)
            try:
                took = attempt(candidate)
            except runner.WorkerError:
                continue  # it does not compile, does not fit, or is wrong
            if took < WORTH * seconds:
                best, seconds = candidate, took
        if best is start:
            break
    attempt(best)  # so that the others are tuned beside it
    return {"config": best, "seconds": seconds, "before": before, "tried": len(tried)}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="fastbert bench tune",
        description="Finds the launch configurations of the Triton kernels that are fastest on this GPU and writes "
        "them where fastbert looks first ($FASTBERT_CONFIGS or ~/.cache/fastbert/configs). Those of attention with a "
        "bias, of TF32 and of rows wider than 1024 stay as they are shipped.",
    )
    top.add_argument("--op", default=None, metavar="A,B", help=f"of {', '.join(OPS)} (default: all)")
    top.add_argument("--budget", type=float, default=900.0, help="seconds, after which no further kernel is begun")
    top.add_argument(
        "--output", type=Path, default=None, metavar="FILE", help="a table of the package to bring up to date"
    )
    top.add_argument("--list", action="store_true", help="list the operations that are timed, measure nothing")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Status: 0 if a table was written, 1 if nothing could be measured, 2 for wrong usage."""
    arguments = parser().parse_args(argv)
    try:
        ops = list(OPS) if arguments.op is None else [part.strip() for part in arguments.op.split(",") if part.strip()]
        if not ops or set(ops) - set(OPS):
            raise ValueError(f"--op has {arguments.op!r}; it may have: {', '.join(OPS)}")
        if not arguments.budget > 0:
            raise ValueError(f"--budget is {arguments.budget}; it must be more than 0 seconds")
        chosen = [name for name in rows() if name.startswith(tuple(f"{op}_" for op in ops))]
        if arguments.list:
            print("\n".join(chosen))
            return 0
        table = None if arguments.output is None else _package_table(arguments.output)
        if reason := machine.no_gpu():
            raise ValueError(f"{reason}; there is nothing to tune for")
    except (ValueError, OSError) as error:
        print(f"fastbert bench tune: {error}", file=sys.stderr)
        return 2
    found = tune(chosen, arguments.budget)
    if not found:
        print("fastbert bench tune: nothing could be measured", file=sys.stderr)
        return 1
    print(text(found))
    print(f"written: {_write(found, arguments.output, table)}")
    return 0


def tune(chosen: Sequence[str], budget: float) -> dict[tuple[str, str], dict[str, Any]]:
    """By kernel and shape class, what `search` found. Ctrl-C keeps what there is."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    progress, device = report.progress("tune"), gpu.Worker("tune")
    end = time.monotonic() + budget
    try:
        for row in chosen:
            try:
                wanted = device.ask("asked", ATTEMPT_S, row=row)["asked"]
            except runner.WorkerError as error:
                print(f"\nfastbert bench tune: {row}: {error}", file=sys.stderr)
                continue
            for kernel, shape_class, config in wanted:
                if (kernel, shape_class) in found or time.monotonic() > end:
                    continue
                progress(f"{row} {kernel} {shape_class}")
                try:
                    best = search(device.ask, row, kernel, shape_class, config)
                except runner.WorkerError as error:
                    print(f"\nfastbert bench tune: {kernel} {shape_class}: {error}", file=sys.stderr)
                    continue
                found[kernel, shape_class] = {**best, "row": row}
    except KeyboardInterrupt:
        print("\ninterrupted: keeping what was measured", file=sys.stderr)
    finally:
        device.close()
        progress("")
    return found


def text(found: dict[tuple[str, str], dict[str, Any]]) -> str:
    """What was found, as a table."""
    body = [["kernel", "shape class", "configuration", "before", "now", "tried"]]
    for (kernel, shape_class), best in sorted(found.items()):
        config = ", ".join(f"{key} {value}" for key, value in best["config"].items())
        times = [report.milliseconds(best[key]) for key in ("before", "seconds")]
        body.append([kernel, shape_class, config, *times, str(best["tried"])])
    return "\n".join(report.columns(body, left=3))


def _package_table(path: Path) -> dict[str, Any]:
    """The table of an architecture in a file. Raises ValueError if the file is none."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"--output {path} is no JSON: {error}") from None
    if not isinstance(table, dict) or not all(isinstance(classes, dict) for classes in table.values()):
        raise ValueError(f"--output {path} is no table of launch configurations")
    return table


def _write(found: dict[tuple[str, str], dict[str, Any]], output: Path | None, table: dict[str, Any] | None) -> Path:
    """Into the file of the user, whole and new, or into the table of an architecture, beside what is there."""
    import torch

    from fastbert import __version__
    from fastbert.kernels import configs

    kernels: dict[str, Any] = {} if table is None else table
    for (kernel, shape_class), best in found.items():
        kernels.setdefault(kernel, {})[shape_class] = best["config"]
    if output is not None:
        report.write_text(json.dumps(kernels, indent=2) + "\n", output)
        return output
    path = configs.user_file(torch.cuda.get_device_name())
    measured = {f"{kernel} {shape_class}": best for (kernel, shape_class), best in found.items()}
    content = {"fastbert": __version__, "machine": machine.describe_gpu(), "kernels": kernels, "measured": measured}
    report.write(content, path)
    return path


if __name__ == "__main__":
    worker.serve(Tuner(rows=rows()))
