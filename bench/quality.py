"""``fastbert bench quality``: does fine-tuning end where stock Hugging Face code ends, and how much sooner?

Every cell of a matrix (data set, contestant, seed) is a run of ``fastbert finetune`` in a process of its own, with the
same flags but ``--optimize``. A finished cell is a JSON file and is not run again, so that a matrix of hours can be
stopped and taken up. Contestants take turns, so that both meet the same machine.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import machine, report
from .cli import positive


@dataclass(frozen=True)
class DataSet:
    """Where a data set is below ``--data``, and how it is trained on, within minutes on two cores."""

    train: str
    test: str
    metric: str
    epochs: int
    flags: tuple[str, ...]


SEQUENCES = ("--text_column_name", "text", "--label_column_name", "label")
DATA_SETS = {
    "trec": DataSet("trec/train.tsv", "trec/test.tsv", "accuracy", 3, (*SEQUENCES, "--max_seq_length", "128")),
    "r52": DataSet("r52/train.tsv", "r52/test.tsv", "accuracy", 1, (*SEQUENCES, "--max_seq_length", "64")),
    "mr": DataSet("mr/train.tsv", "mr/test.tsv", "accuracy", 1, (*SEQUENCES, "--max_seq_length", "128")),
    "wnut16": DataSet("wnut16/train.conll", "wnut16/test.conll", "f1", 3, ("--max_seq_length", "128")),
}
CONTESTANTS = {"hf": "false", "fastbert": "true"}  # contestant -> --optimize


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    top = argparse.ArgumentParser(
        prog="fastbert bench quality",
        description="Fine-tunes on labelled data with stock Hugging Face code and with fastbert, several seeds each, "
        "and compares test scores and training time. What is finished is not run again.",
        allow_abbrev=False,
    )
    add = top.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="holds trec/, r52/, mr/ and wnut16/")
    add("--model", type=Path, default=None, metavar="DIR", help="checkpoint (default: all-MiniLM-L6-v2 below --data)")
    add("--sets", default=",".join(DATA_SETS), metavar="A,B", help=f"data sets (default: {','.join(DATA_SETS)})")
    add("--contestants", default=",".join(CONTESTANTS), metavar="A,B", help="hf, fastbert (default: both)")
    add("--seeds", default="1,2,3", metavar="A,B", help="(default: 1,2,3)")
    add("--epochs", type=float, default=None, metavar="N", help="(default: 3 on small sets, 1 on large ones)")
    add("--learning-rate", type=float, default=1e-4, metavar="X", help="(default: 1e-4)")
    add("--batch-size", type=positive, default=16, metavar="N", help="(default: 16)")
    add("--limit", type=positive, default=None, metavar="N", help="only the first rows of each file, for a quick look")
    add("--threads", type=positive, default=machine.cores(), metavar="N", help="of each run (default: all cores)")
    add(
        "--cells",
        type=Path,
        default=Path("output/quality"),
        metavar="DIR",
        help="finished cells and runs under way (default: %(default)s)",
    )
    add(
        "--output",
        type=Path,
        default=Path("bench/results"),
        metavar="DIR",
        help="for the result (default: %(default)s)",
    )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing of the matrix, print the table and write the result; 130 after Ctrl-C, 1 if a run failed."""
    arguments = parser().parse_args(argv)
    try:
        chosen = {name: DATA_SETS[name] for name in arguments.sets.split(",")}
        contestants = {name: CONTESTANTS[name] for name in arguments.contestants.split(",")}
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
    except (KeyError, ValueError) as error:
        known = f"--sets {','.join(DATA_SETS)}; --contestants {','.join(CONTESTANTS)}; --seeds are numbers"
        print(f"fastbert bench quality: {error} is not known; allowed are {known}", file=sys.stderr)
        return 2
    model = arguments.model or arguments.data / "all-MiniLM-L6-v2"
    wanted = [model, *(arguments.data / path for data in chosen.values() for path in (data.train, data.test))]
    if missing := [str(path) for path in wanted if not path.exists()]:
        print(f"fastbert bench quality: not there: {', '.join(missing)}", file=sys.stderr)
        return 2
    cells: list[dict[str, Any]] = []
    failed = False
    try:
        for name, data in chosen.items():
            for seed in seeds:
                for contestant, optimize in contestants.items():
                    cell = _cell(name, data, contestant, optimize, seed, model, arguments)
                    failed |= cell is None
                    cells += [cell] if cell else []
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130
    if not cells:
        return 1
    content = report.result("quality", machine.describe(), arguments.threads, len(seeds), rows(cells))
    print(table(content["rows"]))
    path = arguments.output / f"{report.stem(content)}.json"
    report.write(content | {"cells": cells}, path)
    print(f"results: {path}")
    return int(failed)


def _cell(
    name: str, data: DataSet, contestant: str, optimize: str, seed: int, model: Path, arguments: argparse.Namespace
) -> dict[str, Any] | None:
    """One run, or what is left of an earlier one with the same flags; None if it failed."""
    epochs = data.epochs if arguments.epochs is None else arguments.epochs
    flags = [
        *("--num_train_epochs", f"{epochs:g}", "--learning_rate", f"{arguments.learning_rate:g}"),
        *("--per_device_train_batch_size", str(arguments.batch_size), "--warmup_steps", "0.1"),
        *("--seed", str(seed), "--save_total_limit", "1", "--optimize", optimize, *data.flags),
    ]
    if arguments.limit is not None:
        flags += ["--max_train_samples", str(arguments.limit), "--max_predict_samples", str(arguments.limit)]
    same = {"flags": flags, "model": model.name, "threads": arguments.threads}
    folder = arguments.cells / f"{name}-{contestant}-{seed}"
    finished = folder.with_suffix(".json")
    if finished.is_file():
        found: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
        if {key: found[key] for key in same} == same:
            return found
        print(f"{finished}: of another model, other flags or threads; run again", file=sys.stderr)
    files = ["--train_file", str(arguments.data / data.train), "--test_file", str(arguments.data / data.test)]
    where = ["--model_name_or_path", str(model), "--output_dir", str(folder), "--overwrite_output_dir"]
    arguments.cells.mkdir(parents=True, exist_ok=True)
    print(f"{name}, {contestant}, seed {seed}", file=sys.stderr, flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    command = [sys.executable, "-m", "fastbert.cli", "finetune", *where, *files, *flags, "--disable_tqdm", "true"]
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        print(f"{name}, {contestant}, seed {seed}: {last[0]}", file=sys.stderr)
        if done.returncode in (130, -2):
            raise KeyboardInterrupt
        return None
    run = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    cell = {
        "set": name,
        "contestant": contestant,
        "seed": seed,
        "metric": data.metric,
        "value": run["test"][data.metric],
        "test": run["test"],
        "best": run["best"],
        "steps": run["steps"],
        "rows": {split: run["data"][split]["rows"] for split in run["data"]},
        "seconds": run["seconds"] | {"process": time.perf_counter() - began},
        **same,
    }
    report.write(cell, finished)
    shutil.rmtree(folder)
    return cell


def rows(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a data set: of each contestant the scores with their spread and the median time of training."""
    found = []
    for name in dict.fromkeys(cell["set"] for cell in cells):
        own = [cell for cell in cells if cell["set"] == name]
        contestants = {}
        for contestant in dict.fromkeys(cell["contestant"] for cell in own):
            runs = [cell for cell in own if cell["contestant"] == contestant]
            values = [cell["value"] for cell in runs]
            contestants[contestant] = {
                "seeds": [cell["seed"] for cell in runs],
                "values": values,
                "mean": statistics.mean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
                "train_s": statistics.median(cell["seconds"]["train"] for cell in runs),
            }
        row: dict[str, Any] = {
            "row": name,
            "metric": own[0]["metric"],
            "rows": own[0]["rows"],
            "contestants": contestants,
        }
        if contestants.keys() >= CONTESTANTS.keys():
            row["times_faster"] = contestants["hf"]["train_s"] / contestants["fastbert"]["train_s"]
        found.append(row)
    return found


def table(found: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = ["data set   score      contestant  mean ± deviation (least to most)      training"]
    for row in found:
        for contestant, item in row["contestants"].items():
            spread = f"± {item['deviation']:.4f}" if item["deviation"] is not None else "(one seed)"
            values = f"{item['mean']:.4f} {spread} ({min(item['values']):.4f} to {max(item['values']):.4f})"
            faster = f"  {row['times_faster']:.2f}x" if contestant == "fastbert" and "times_faster" in row else ""
            lines.append(
                f"{row['row']:<10} {row['metric']:<10} {contestant:<11} {values:<37} {item['train_s']:>7.1f} s{faster}"
            )
    return "\n".join(lines)
