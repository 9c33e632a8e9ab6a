#!/usr/bin/env python3
"""Write the benchmark table of README.md from the newest results in bench/results: `make results`.

The table stands between two markers; everything in it, the machine included, comes from the result files.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: begin (make results) -->", "<!-- results: end -->"
HUGGING_FACE = "hf-sdpa"


def milliseconds(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def newest(folder: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """The latest complete measurement of each row of the model and training tables, with the file that it is from."""
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    measured = [content for content in contents if "time" in content]  # what kernels compile to was not timed
    for content in sorted(measured, key=lambda c: c["time"]):
        for row in content["rows"]:
            if row["kind"] != "op" and row["complete"] and "median_s" in row["contestants"].get("fastbert", {}):
                found[row["row"]] = row, content
    return found


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


def table(rows: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> str:
    if not rows:
        return "Not yet measured: `make bench` measures, `make results` fills in this table."
    head = ["work", "Hugging Face sdpa", "fastest other", "fastbert", "share of peak", "vs Hugging Face", "vs other"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *(line(row) for row, _ in rows.values())]
    sources = {}
    for row, content in rows.values():
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
    return "\n".join(lines)


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        sys.exit(f"README.md has no markers {BEGIN} and {END}")
    filled = f"{BEGIN}\n{table(newest(ROOT / 'bench' / 'results'))}\n{END}"
    readme.write_text(
        re.sub(re.escape(BEGIN) + ".*" + re.escape(END), lambda _: filled, text, flags=re.S), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
