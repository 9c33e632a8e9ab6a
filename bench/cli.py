"""``fastbert bench``: arguments, progress, and where results go."""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import machine, report

KINDS = {"table": ("inference", "training"), "model": ("inference",), "training": ("training",), "op": ("op",)}
"""What each command measures."""

OTHERS = {
    "gpu": "models and operations on an NVIDIA GPU",
    "tune": "which launch configurations are fastest on this GPU",
    "kernels": "what the GPU kernels are compiled to; needs no GPU",
    "quality": "scores after fine-tuning, against stock code",
    "pretraining": "losses, speed and memory of pretraining, against stock code",
}
"""Commands with flags of their own, each a module of this package: ``fastbert bench kernels --help``."""


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    top = argparse.ArgumentParser(
        prog="fastbert bench",
        description="Measures against Hugging Face, ONNX Runtime, OpenVINO and CTranslate2, in turn and each in a\n"
        "process of its own, and against the machine's peak. Results go to the screen, to JSON and to a plot.",
        epilog="further commands, each with its own --help:\n"
        + "\n".join(f"  {name:<12} {what}" for name, what in OTHERS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = "model: inference; training: a training step; op: single operations; table (default): model and training"
    top.add_argument("command", nargs="?", type=_command, metavar="COMMAND", default="table", help=what)
    top.add_argument("--list", action="store_true", help="list rows and contestants, measure nothing")
    top.add_argument("--row", default=None, metavar="A,B", help="rows to run (default: all)")
    top.add_argument("--contestants", default=None, metavar="A,B", help="who takes part; 'all' includes hf-compile")
    top.add_argument("--threads", type=positive, default=machine.cores(), help="threads of each (default: all cores)")
    top.add_argument("--repeats", type=positive, default=7, help="interleaved rounds (default: 7)")
    top.add_argument("--seconds", type=float, default=0.5, help="length of a turn, at least one call (default: 0.5)")
    top.add_argument("--output", type=Path, default=Path("bench/results"), metavar="DIR", help="for JSON and plot")
    top.add_argument("--data", type=Path, default=None, metavar="DIR", help="cache of real weights and texts")
    top.add_argument("--no-plot", action="store_true", help="write no plot")
    top.add_argument("--no-memory", action="store_true", help="skip the peak memory of a training step")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark named by ``argv`` and returns the exit status (130 after Ctrl-C, 1 if nothing got a speed)."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0] in OTHERS:
        return importlib.import_module(f".{given[0]}", __package__).main(given[1:])
    arguments = parser().parse_args(given)
    from . import contestants, runner

    try:
        rows = _rows(arguments)
        names = contestants.choose(KINDS[arguments.command], arguments.contestants)
        if arguments.list:
            print("rows:        " + ", ".join(rows))
            for kind in names:
                print(f"contestants: {', '.join(contestants.BY_KIND[kind])} ({kind})")
            return 0
        content = report.result(arguments.command, machine.describe(), arguments.threads, arguments.repeats, [])
        path = arguments.output / f"{report.stem(content)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"fastbert bench: {error}", file=sys.stderr)
        return 2
    stopped = False
    for row in rows:
        progress = report.progress(row)
        try:
            progress("preparing the batch")
            workload = rows[row]()
            record = runner.run(
                workload,
                names[workload.kind],
                arguments.threads,
                arguments.repeats,
                arguments.seconds,
                memory=workload.kind == "training" and not arguments.no_memory,
                progress=progress,
            )
        except KeyboardInterrupt:
            stopped = True
            break
        except (runner.WorkerError, RuntimeError, OSError) as error:
            progress("")
            print(f"fastbert bench: row {row}: {error}", file=sys.stderr)
            continue
        progress("")
        content["rows"].append(record)
        report.write(content, path)
        print(report.table(record) + "\n", flush=True)
        stopped = not record["complete"]
        if stopped:
            break
    if not content["rows"]:
        return 130 if stopped else 1
    print(f"results: {path}")
    if not arguments.no_plot:
        report.plot(content, path.with_suffix(".png"))
    if stopped:
        return 130
    return 0 if any("median_s" in c for r in content["rows"] for c in r["contestants"].values()) else 1


def _rows(arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """The chosen rows: name -> what makes the workload."""
    from . import data, ops, workloads

    if arguments.command == "op":
        table = ops.workloads()
    else:
        cache = arguments.data or data.default_cache()
        known = {"inference": workloads.INFERENCE_ROWS, "training": workloads.TRAINING_ROWS}
        names = [name for kind in KINDS[arguments.command] for name in known[kind]]
        table = {name: lambda name=name: workloads.build(name, cache) for name in names}
    if arguments.row is None:
        return table
    chosen: dict[str, Callable[[], Any]] = {}
    for wanted in (name.strip() for name in arguments.row.split(",")):
        found = {name: make for name, make in table.items() if name == wanted or _is_op(name, wanted)}
        if not found:
            raise ValueError(f"--row has {wanted!r}; it may have: {', '.join(table)}")
        chosen |= found
    return chosen


def _is_op(name: str, wanted: str) -> bool:
    """Whether ``wanted`` ("attention", "attention_fwd") names the op row ``name`` ("attention_fwd[minilm]") in part."""
    return name.startswith((wanted + "_", wanted + "["))


def _command(text: str) -> str:
    """The type of the command."""
    if text in OTHERS:
        raise argparse.ArgumentTypeError(f"{text} comes first, before the flags")
    if text not in KINDS:
        raise argparse.ArgumentTypeError(f"unknown {text!r}; allowed are {', '.join([*KINDS, *OTHERS])}")
    return text


def positive(text: str) -> int:
    """The type of flags that take a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)
