#!/usr/bin/env python3
"""Write the benchmark tables of README.md from the newest results in bench/results: `make results`.

Each table stands between two markers; everything in it, the machine included, comes from the result files.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from fastbert.bench.pretraining import LAST, last_loss, tokens_per_second
from fastbert.bench.report import milliseconds

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
SDPA = ("flash", "cudnn", "efficient", "math")


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
        device = content["machine"]["device"]
        for row in content["rows"]:
            if row["kind"] != "op" and row["complete"] and "median_s" in row["contestants"].get("fastbert", {}):
                rows = found.pop(device, {})
                found[device] = rows | {row["row"]: Measured(row, content, path)}
    return dict(reversed(found.items()))


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
        machine, versions = content["machine"], content["machine"]["versions"]
        peak = f"peak {row['peak']['rate']:.0f} {row['unit']}" if row["peak"]["rate"] else "peak not measured"
        isa = machine["extension"].get("isa", "no extension")
        commit = machine["commit"] or {"hash": "unknown", "dirty": False}
        sources[row["row"]] = (
            f"{machine['device']} ({isa}), {content['threads']} threads, {peak}, "
            + ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions)
            + f", commit {commit['hash'][:12]}{' with changes' if commit['dirty'] else ''}, {content['time'][:10]}"
        )
    for text in dict.fromkeys(sources.values()):
        names = ", ".join(name for name, source in sources.items() if source == text)
        lines += ["", f"{names}: {text}."]
    for picture in dict.fromkeys(item.path.with_suffix(".png") for item in rows.values()):
        if picture.exists():
            lines += ["", f"![The same rows as shares of the machine's peak]({picture.relative_to(ROOT)})"]
    return "\n".join(lines)


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
    """The fastest of the contestants whose names begin so, and its time."""
    timed = {name: item for name, item in row["contestants"].items() if "median_s" in item and name.startswith(names)}
    name = min(timed, key=lambda name: timed[name]["median_s"], default=None)
    return None if name is None else (name, timed[name]["median_s"])


def gpu_table(folder: Path) -> str:
    """The models of the newest GPU result; Hugging Face's sdpa with the fastest of its backends."""
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("gpu-*.json")]
    if not contents:
        return "not yet measured"
    content = max(contents, key=lambda c: c["time"])
    head = ["work", "HF eager", "HF sdpa, best", "torch.compile", "unpadded stack", "fastbert", "tokens/s", "MFU"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in content["rows"]:
        own = {name: item for name, item in row["contestants"].items() if name in ("fastbert", "fastbert-graphs")}
        ours = best({"contestants": own}, ("fastbert",))
        if row["kind"] == "op" or ours is None:
            continue
        item = row["contestants"][ours[0]]
        cells = [row["title"]]
        for names in (("hf-eager",), tuple(f"hf-sdpa-{b}" for b in SDPA), ("hf-compile",), ("varlen", "flash-attn")):
            found = best(row, names)
            cells.append(f"{milliseconds(found[1])} ({found[1] / ours[1]:.2f}x)" if found else "-")
        mfu = f"{item['mfu']:.0%}" if item["mfu"] is not None else "-"
        lines.append("| " + " | ".join([*cells, milliseconds(ours[1]), f"{item['tokens_per_s']:.0f}", mfu]) + " |")
    machine, rates = content["machine"], content.get("ceilings") or {}
    commit = machine["commit"] or {"hash": "unknown", "dirty": False}
    measured = f", copy {rates['copy']:.0f} GB/s, bf16 product {rates['matmul'] / 1e3:.0f} TFLOP/s" if rates else ""
    versions = ", ".join(f"{n} {machine['versions'][n]}" for n in ("torch", "triton", "transformers"))
    changes = " with changes" if commit["dirty"] else ""
    source = (
        f"{machine['device']}{measured}, {versions}, commit {commit['hash'][:12]}{changes}, {content['time'][:10]}."
    )
    return "\n".join([*lines, "", source])


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    folder = ROOT / "bench" / "results"
    blocks = (
        (BEGIN, END, tables(newest(folder))),
        (QUALITY_BEGIN, QUALITY_END, quality_table(folder)),
        (PRETRAINING_BEGIN, PRETRAINING_END, pretraining_table(folder)),
        (GPU_BEGIN, GPU_END, gpu_table(folder)),
    )
    for begin, end, content in blocks:
        if begin not in text or end not in text:
            sys.exit(f"README.md has no markers {begin} and {end}")
        filled = f"{begin}\n{content}\n{end}"
        text = re.sub(re.escape(begin) + ".*" + re.escape(end), lambda _, filled=filled: filled, text, flags=re.S)
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
