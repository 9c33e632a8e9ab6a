"""The plot of a result file: per row, a bar a contestant, with its time and its share of the machine's peak."""

from pathlib import Path
from typing import Any

from .report import BUSY, milliseconds
from .report import OURS as FASTBERT

OURS, OTHERS = "#c8501e", "#8a99a8"


def bars(content: dict[str, Any], path: Path) -> None:
    """Draws the rows of ``content`` (a result as ``report.result`` makes it) into ``path`` (png). Needs matplotlib.

    Bars are shares of the measured peak; a contestant that has no speed is named with the reason instead of a bar.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = content["rows"]
    counts = [len(row["contestants"]) for row in rows]
    figure = Figure(figsize=(9, sum(0.32 * n + 0.95 for n in counts) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), 1, squeeze=False, gridspec_kw={"height_ratios": [n + 1.2 for n in counts]})[:, 0]
    for axis, row in zip(axes, rows, strict=True):
        _row(axis, row)
    machine = content["machine"]
    how = "bf16"
    if content["threads"]:
        how = f"{content['threads']} threads, {machine['extension'].get('isa', 'no extension')}"
    figure.suptitle(f"{machine['device']}, {how}", fontsize=9, color="#444444")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _row(axis: Any, row: dict[str, Any]) -> None:
    entries = sorted(row["contestants"].items(), key=lambda pair: pair[1].get("median_s", 0.0), reverse=True)
    peak = row["peak"]["rate"] or max((c["rate"] for _, c in entries if "rate" in c), default=1.0)
    for place, (name, item) in enumerate(entries):
        if "median_s" in item:
            share = item["rate"] / peak
            axis.barh(place, share, height=0.7, color=OURS if name.startswith(FASTBERT) else OTHERS)
            axis.text(share + 0.01, place, f"{milliseconds(item['median_s'])}, {share:.0%}", va="center", fontsize=8)
        else:
            axis.text(0.01, place, f"no speed: {item['status']}", va="center", fontsize=8, color="#999999")
    axis.set_yticks(range(len(entries)), [name for name, _ in entries], fontsize=8)
    axis.set_ylim(len(entries) - 0.5, -0.5)  # names without a bar need their room, too
    axis.set_xlim(0, max(1.0, *(c["rate"] / peak for _, c in entries if "rate" in c), 1.0) * 1.2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.tick_params(axis="x", labelsize=7)
    held = f"{row['peak']['how']}, {peak:.0f} {row['unit']}" if row["peak"]["rate"] else "the fastest"
    doubt = f", machine not quiet ({row['others']:.0%} taken by others)" if (row["others"] or 0) > BUSY else ""
    doubt += "" if row["complete"] else ", interrupted"
    axis.set_title(f"{row['title']}\nshare of {held}{doubt}", fontsize=8.5, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
