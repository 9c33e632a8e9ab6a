"""The results as table and as JSON."""

import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastbert.files import replacing

SCHEMA = 1
"""Version of the JSON layout, see bench/README.md."""

OURS = ("fastbert", "triton", "cuda")
"""Whom the others are compared with: the first of these that got a speed."""

BUSY = 0.05
"""Share of the cores' time that other processes may take before the table warns that its figures mean little."""


COPY = "copy of a GiB"
MATMUL = {"bfloat16": "largest of three bf16 matrix products", "float32": "a float32 matrix product"}
"""What GPU rows are held to."""


def result(
    command: str, machine: dict[str, Any], threads: int | None, repeats: int | None, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """The content of a result file: where, how and what was measured. threads, repeats: None on a GPU."""
    return {
        "schema": SCHEMA,
        "command": command,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine,
        "threads": threads,
        "repeats": repeats,
        "rows": rows,
    }


def stem(content: dict[str, Any]) -> str:
    """File name without ending: command, device, threads of a processor, time."""
    stamp = re.sub(r"[-:Z]", "", content["time"]).replace("T", "-")
    threads = f"-{content['threads']}t" if content["threads"] else ""
    return f"{content['command']}-{slug(content['machine']['device'])}{threads}-{stamp}"


def slug(device: str) -> str:
    """A device's name in the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write(content: dict[str, Any], path: Path) -> None:
    """Writes JSON whole or not at all. Raises OSError (disk full, no permission) with the path in it."""
    write_text(json.dumps(content, indent=1) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def table(row: dict[str, Any]) -> str:
    """One row's record as text: contestants from slow to fast, then those without a speed and why."""
    unit, peak = row["unit"], row["peak"]
    facts = row["facts"]
    fill = f", {facts['fill']:.1%} full, {facts['tokens']} tokens" if "fill" in facts else ""
    amount = f"{row['work'] / 1e9:.4g} {'GB moved' if unit == 'GB/s' else 'GFLOP useful'}"
    lines = [f"{row['row']}: {row['title']}{fill}"]
    held = f"peak {peak['rate']:.0f} {unit} ({peak['how']})" if peak["rate"] else "peak not measured"
    if "rounds" in row:
        state = "" if row["complete"] else f", INTERRUPTED after {row['rounds']} rounds"
        lines.append(f"  {amount}, {row['threads']} threads, {held}, {row['rounds']} interleaved rounds{state}")
    else:
        lines.append(f"  {amount}, {held}{'' if row['complete'] else ', INTERRUPTED'}")
    if (row["others"] or 0) > BUSY:
        lines.append(f"  NOT A QUIET MACHINE: other processes took {row['others']:.0%} of the cores during the turns")
    timed = {n: c for n, c in row["contestants"].items() if "median_s" in c}
    first = next((name for name in OURS if name in timed), "")
    ours = timed[first]["median_s"] if first else None
    head = ["contestant", "median"]
    fastest, tokens = (any(key in c for c in timed.values()) for key in ("min_s", "tokens_per_s"))
    head += ["min"] * fastest + ["tokens/s", "MFU"] * tokens + [unit, "of peak", "error"]
    memory = any(c.get("memory") for c in timed.values())
    head += ["peak memory", "above start"] if memory else []
    head += [f"{first} is"] if ours else []
    body = []
    for name, item in sorted(timed.items(), key=lambda pair: -pair[1]["median_s"]):
        share = item["share_of_peak"]
        cells = [name, milliseconds(item["median_s"])]
        cells += [milliseconds(item["min_s"])] if fastest else []
        if tokens:
            cells += [f"{item['tokens_per_s']:.0f}", f"{item['mfu']:.0%}" if item["mfu"] is not None else "-"]
        cells += [f"{item['rate']:.1f}", f"{share:.0%}" if share is not None else "-"]
        cells.append(f"{item['error']:.0e}" if "error" in item else "-")
        if memory:
            used = item.get("memory")
            cells += [mebibytes(used["peak"]), mebibytes(used["peak"] - used["before"])] if used else ["-", "-"]
        cells += [f"{item['median_s'] / ours:.2f}x" if name != first else ""] if ours else []
        body.append(cells)
    if body:
        lines += [f"  {line}" for line in columns([head, *body])]
    for name, item in row["contestants"].items():
        if name not in timed:
            lines.append(f"  {name}: no speed, {item['status']}{': ' + item['reason'] if item['reason'] else ''}")
            continue
        notes = [note] if (note := item.get("details", {}).get("note")) else []
        if row["kind"] == "op" and item.get("clock") == "stream":
            notes.append("launched by Python call by call, whose time may be in the figure, not from a CUDA graph")
        if notes:
            lines.append(f"  {name}: {'; '.join(notes)}")
    return "\n".join(lines)


def plot(content: dict[str, Any], path: Path) -> None:
    """Draws the plot of a result, or says why it cannot be drawn."""
    try:
        from . import plots

        plots.bars(content, path)
    except ImportError as error:
        print(f"no plot: {error} (pip install 'fastbert[bench]')", file=sys.stderr)
    except OSError as error:
        print(f"no plot: {error}", file=sys.stderr)
    else:
        print(f"plot:    {path}")


def milliseconds(seconds: float) -> str:
    """Three significant digits in ms."""
    value = seconds * 1e3
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def mebibytes(count: int) -> str:
    """Whole MiB."""
    return f"{count / 2**20:.0f} MiB"


def columns(rows: list[list[str]], left: int = 1) -> list[str]:
    """Cells in columns, the first ``left`` of them flush left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def progress(what: str) -> Callable[[str], None]:
    """One line on a terminal that is written over; a line a message elsewhere. An empty text clears it."""
    terminal = sys.stderr.isatty()

    def show(text: str) -> None:
        if terminal:
            line = f"{what}: {text}" if text else ""
            sys.stderr.write("\r\033[K" + line[: shutil.get_terminal_size().columns - 1])
        elif text:
            sys.stderr.write(f"{what}: {text}\n")
        sys.stderr.flush()

    return show
