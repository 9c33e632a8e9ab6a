#!/usr/bin/env python3
"""Write the benchmark tables of README.md from the newest results in bench/results: `make results`.

Each table stands between two markers; everything in it, the machine included, comes from the result files.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from fastbert.bench import gpu, gpu_rows, report
from fastbert.bench.pretraining import LAST, last_loss, tokens_per_second
from fastbert.bench.report import mebibytes, milliseconds

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: begin (make results) -->", "<!-- results: end -->"
QUALITY_BEGIN, QUALITY_END = "<!-- quality: begin (make results) -->", "<!-- quality: end -->"
PRETRAINING_BEGIN, PRETRAINING_END = "<!-- pretraining: begin (make results) -->", "<!-- pretraining: end -->"
GPU_BEGIN, GPU_END = "<!-- gpu: begin (make results) -->", "<!-- gpu: end -->"
HUGGING_FACE = "hf-sdpa"
PRETRAINING = {
    "hf": "Hugging Face, padded",
    "hf-packed": "Hugging Face, one row with a 4-D mask",
    "hf-rounding": "Hugging Face, weights moved by one rounding",
    "fastbert": "fastbert",
}
GPU_OURS = (("fastbert", "fastbert-graphs"), ("triton", "cuda"))
"""Our contestants in rows of models, and of operations."""
GPU_PEERS = {
    "HF eager": ("hf-eager",),
    "HF sdpa, fastest backend": tuple(gpu_rows.SDPA.values()),
    "HF sdpa, logits at labels only": ("hf-sdpa-sparse-head",),
    "torch.compile": ("hf-compile",),
    "unpadded FlashAttention-2": ("fa2", "flash-attn"),
    "unpadded varlen_attn": ("varlen",),
}


class Measured(NamedTuple):
    """A row of a result file, with the file that it is from."""

    row: dict[str, Any]
    content: dict[str, Any]
    path: Path


def newest(folder: Path) -> dict[str, dict[str, Measured]]:
    """The latest complete measurement of each row of the model and training tables, by machine, latest first."""
    found: dict[str, dict[str, Measured]] = {}
    contents = [(json.loads(path.read_text(encoding="utf-8")), path) for path in folder.glob("*.json")]
    measured = [item for item in contents if item[0].get("command") in ("table", "model", "training", "op")]
    for content, path in sorted(measured, key=lambda item: item[0]["time"]):
        device = processor(content)
        for row in content["rows"]:
            if row["kind"] != "op" and row["complete"] and "median_s" in row["contestants"].get("fastbert", {}):
                rows = found.pop(device, {})
                found[device] = rows | {row["row"]: Measured(row, content, path)}
    return dict(reversed(found.items()))


def processor(content: dict[str, Any]) -> str:
    """Its name, and the instruction set that was used: virtual machines call several generations by one name."""
    machine = content["machine"]
    return f"{machine['device']} ({machine['extension'].get('isa', 'no extension')})"


def line(row: dict[str, Any]) -> str:
    timed = {name: item for name, item in row["contestants"].items() if "median_s" in item}
    ours = timed["fastbert"]
    cells = [row["title"]]
    peers = {name: item for name, item in timed.items() if name != "fastbert" and not name.startswith("hf-")}
    best = min(peers, key=lambda name: peers[name]["median_s"], default=None)
    for name in (HUGGING_FACE, best):
        time = milliseconds(timed[name]["median_s"]) if name in timed else "-"
        cells.append(f"{time} ({name})" if name == best and best else time)
    share = ours["share_of_peak"]
    cells += [milliseconds(ours["median_s"]), f"{share:.0%}" if share is not None else "-"]
    for name in (HUGGING_FACE, best):
        cells.append(f"{timed[name]['median_s'] / ours['median_s']:.2f}x" if name in timed else "-")
    return "| " + " | ".join(cells) + " |"


def tables(machines: dict[str, dict[str, Measured]]) -> str:
    if not machines:
        return "Not yet measured: `make bench` measures, `make results` fills in this table."
    return "\n\n".join(table(rows) for rows in machines.values())


def table(rows: dict[str, Measured]) -> str:
    """The rows of one machine, what they were measured on, and their picture."""
    head = ["work", "Hugging Face sdpa", "fastest other", "fastbert", "share of peak", "vs Hugging Face", "vs other"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *(line(item.row) for item in rows.values())]
    sources = {}
    for row, content, _ in rows.values():
        peak = f"peak {row['peak']['rate']:.0f} {row['unit']}" if row["peak"]["rate"] else "peak not measured"
        sources[row["row"]] = f"{processor(content)}, {content['threads']} threads, {peak}, {code(content)}"
    for text in dict.fromkeys(sources.values()):
        names = ", ".join(name for name, source in sources.items() if source == text)
        lines += ["", f"{names}: {text}."]
    for picture in dict.fromkeys(item.path.with_suffix(".png") for item in rows.values()):
        if picture.exists():
            lines += ["", f"![The same rows as shares of the machine's peak]({picture.relative_to(ROOT)})"]
    return "\n".join(lines)


def code(content: dict[str, Any]) -> str:
    """What was measured: versions, commit, date."""
    versions, commit = (
        content["machine"]["versions"],
        content["machine"]["commit"] or {"hash": "unknown", "dirty": False},
    )
    names = ("torch", *(("triton",) if content["command"] == "gpu" else ()), "transformers")
    found = [f"{name} {versions[name]}" for name in names if name in versions]
    found += [f"commit {commit['hash'][:12]}{' with changes' if commit['dirty'] else ''}", content["time"][:10]]
    return ", ".join(found)


def quality_table(folder: Path) -> str:
    """Scores after fine-tuning: of each data set the newest run."""
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("quality-*.json")]
    for content in sorted(contents, key=lambda c: c["time"]):
        found |= {row["row"]: (row, content) for row in content["rows"]}
    if not found:
        return "not yet measured"
    head = ["data set", "score", "seeds", "Hugging Face", "fastbert", "training", "threads"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, (row, content) in found.items():
        ours, stock = row["contestants"]["fastbert"], row["contestants"]["hf"]
        scores = [f"{100 * side['mean']:.1f} ± {100 * (side['deviation'] or 0.0):.1f}" for side in (stock, ours)]
        seconds = f"{stock['train_s']:.0f} s, {ours['train_s']:.0f} s ({row['times_faster']:.2f}x)"
        cells = [name, row["metric"], str(len(ours["seeds"])), *scores, seconds, str(content["threads"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pretraining_table(folder: Path) -> str:
    """Pretraining beside stock Hugging Face: of each machine, vocabulary, batch and dropout the newest run."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("pretraining-*.json")]
    for content in sorted(contents, key=lambda c: c["time"]):
        first = content["rows"][0]
        device = content["machine"]["device"]
        found[device, first["vocabulary"], first["tokens_per_batch"], first["dropout"]] = content
    if not found:
        return "not yet measured"
    head = ["machine", "vocabulary", "tokens a step", "dropout", "", "tokens/s", "peak memory"]
    head += [f"mean loss of the last {LAST} steps", "furthest from Hugging Face's loss"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for (device, vocabulary, tokens, dropout), content in sorted(found.items()):
        rates = {name: pretraining_rate(content, name) for name in contestants(content)}
        stock = {row["seed"]: row["losses"] for row in content["rows"] if row["contestant"] == "hf"}
        for name, rate in rates.items():
            rows = [row for row in content["rows"] if row["contestant"] == name]
            last = [last_loss(row) for row in rows]
            spread = f" ± {statistics.stdev(last):.3f} ({len(last)} seeds)" if len(last) > 1 else ""
            apart = max(abs(a - b) for row in rows for a, b in zip(row["losses"], stock[row["seed"]], strict=True))
            machine = f"{device}, {content['threads']} thread{'s' * (content['threads'] > 1)}"
            cells = [machine, f"{vocabulary}", f"{tokens}", f"{dropout:g}", PRETRAINING[name]]
            # Runs over seeds are long, and made where other work shares the machine: they say nothing of speed.
            cells += ["-" if dropout else f"{rate:.0f}" + (f" ({rate / rates['hf']:.2f}x)" if name != "hf" else "")]
            cells += [f"{max(row['memory']['peak'] for row in rows) / 2**20:.0f} MiB"]
            cells += [f"{statistics.mean(last):.3f}{spread}", f"{apart:.1e}" if name != "hf" and not dropout else "-"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def contestants(content: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["contestant"] for row in content["rows"]))


def pretraining_rate(content: dict[str, Any], name: str) -> float:
    """Tokens a second, the median over seeds."""
    return statistics.median(tokens_per_second(row) for row in content["rows"] if row["contestant"] == name)


def best(row: dict[str, Any], names: tuple[str, ...]) -> tuple[str, float] | None:
    """The fastest of these contestants, and its time."""
    timed = {name: item for name, item in row["contestants"].items() if "median_s" in item and name in names}
    name = min(timed, key=lambda name: timed[name]["median_s"], default=None)
    return None if name is None else (name, timed[name]["median_s"])


def newest_gpu(folder: Path) -> dict[str, list[Measured]]:
    """By device the latest measurement of each row in which we have a speed, in the order of the benchmark's rows.

    One that was cut short, or left contestants out, does not take the place of another with them.
    """
    contents = [(json.loads(path.read_text(encoding="utf-8")), path) for path in folder.glob("gpu-*.json")]
    found: dict[str, dict[str, Measured]] = {}
    for content, path in sorted(contents, key=lambda item: item[0]["time"]):
        rows = found.setdefault(content["machine"]["device"], {})
        for row in content["rows"]:
            before = rows[row["row"]].row["contestants"] if row["row"] in rows else {}
            whole = row["complete"] and row["contestants"].keys() >= before.keys()
            if best(row, GPU_OURS[row["kind"] == "op"]) and (whole or not before):
                rows[row["row"]] = Measured(row, content, path)
    order = {name: place for place, name in enumerate(gpu_rows.rows())}
    return {
        device: sorted(rows.values(), key=lambda item: order.get(item.row["row"], len(order)))
        for device, rows in found.items()
        if rows
    }


def gpu_tables(folder: Path) -> str:
    """Models and operations of each GPU, what they were measured on, and their plots, which are drawn anew."""
    blocks = []
    for device, measured in newest_gpu(folder).items():
        rows = [item.row for item in measured]
        blocks += [gpu_model_table([row for row in rows if row["kind"] != "op"])]
        blocks += [gpu_op_table([row for row in rows if row["kind"] == "op"])]
        sources = dict.fromkeys(gpu_source(item.content) for item in measured)
        blocks += sources
        merged = {**measured[-1].content, "rows": rows}
        for picture in gpu.draw(merged, folder / f"gpu-{report.slug(device)}.json"):
            if picture.exists():
                what = "operations" if picture.stem.endswith("-ops") else "models"
                blocks.append(f"![Rows of {what} as shares of what the card does]({os.path.relpath(picture, ROOT)})")
    return "\n\n".join(blocks) or "not yet measured"


def gpu_model_table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "Models: not yet measured."
    head = ["work", *GPU_PEERS, "fastbert", "tokens/s", "MFU", "peak memory, sdpa to fastbert"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        ours, _ = best(row, GPU_OURS[False])
        item = row["contestants"][ours]
        cells = [row["title"]]
        for names in GPU_PEERS.values():
            cells.append("-")
            if found := best(row, names):
                note = row["contestants"][found[0]].get("details", {}).get("note")
                cells[-1] = f"{milliseconds(found[1])} ({found[1] / item['median_s']:.2f}x)" + (
                    f", {note}" if note else ""
                )
        graphs = ", with CUDA graphs" if ours == "fastbert-graphs" else ""
        cells += [milliseconds(item["median_s"]) + graphs, f"{item['tokens_per_s']:.0f}"]
        cells += [f"{item['mfu']:.0%}" if item["mfu"] is not None else "-"]
        sdpa = best(row, GPU_PEERS["HF sdpa, fastest backend"])
        used = [part.get("memory") for part in (row["contestants"][sdpa[0]] if sdpa else {}, item)]
        cells += [" to ".join(mebibytes(part["peak"]) if part else "-" for part in used)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gpu_op_table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "Operations: not yet measured."
    head = ["operation", "Triton", "CUDA C++", "fastest other", "rate", "share of what the card does"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    by_python = False
    for row in rows:
        names = tuple(name for name in row["contestants"] if name not in (*GPU_OURS[True], *gpu_rows.YARDSTICKS))
        cells = [row["title"]]
        for group in (("triton",), ("cuda",), names):
            cells.append("-")
            if found := best(row, group):
                star = " *" * (row["contestants"][found[0]].get("clock") == "stream")
                by_python = by_python or bool(star)
                cells[-1] = milliseconds(found[1]) + star + (f" ({found[0]})" if group is names else "")
        item = row["contestants"][best(row, GPU_OURS[True])[0]]
        memory = row["unit"] == "GB/s"
        cells.append(f"{item['rate']:.0f} GB/s" if memory else f"{item['rate'] / 1e3:.0f} TFLOP/s")
        share = item["share_of_peak"]
        cells.append(f"{share:.0%}" if share is not None else "-")
        if bare := best(row, gpu_rows.YARDSTICKS):
            cells[-1] += f", {bare[1] / item['median_s']:.0%} of the bare products"
        lines.append("| " + " | ".join(cells) + " |")
    if by_python:
        lines += [
            "",
            "\\* launched call by call: Python's time may be in the figure. All others are CUDA graphs' replays.",
        ]
    return "\n".join(lines)


def gpu_source(content: dict[str, Any]) -> str:
    rates = content.get("ceilings")
    rates = f", copy {rates['copy']:.0f} GB/s, bf16 product {rates['bfloat16'] / 1e3:.0f} TFLOP/s" if rates else ""
    return f"{content['machine']['device']}{rates}, {code(content)}."


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    folder = ROOT / "bench" / "results"
    blocks = (
        (BEGIN, END, tables(newest(folder))),
        (QUALITY_BEGIN, QUALITY_END, quality_table(folder)),
        (PRETRAINING_BEGIN, PRETRAINING_END, pretraining_table(folder)),
        (GPU_BEGIN, GPU_END, gpu_tables(folder)),
    )
    for begin, end, content in blocks:
        if begin not in text or end not in text:
            sys.exit(f"README.md has no markers {begin} and {end}")
        filled = f"{begin}\n{content}\n{end}"
        text = re.sub(re.escape(begin) + ".*" + re.escape(end), lambda _, filled=filled: filled, text, flags=re.S)
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
