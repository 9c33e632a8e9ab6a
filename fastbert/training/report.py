"""``report.json`` and ``curves.png`` of a fine-tuning run."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

REPORT, CURVES = "report.json", "curves.png"


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages a run depends on; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("fastbert", "torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy", "scikit-learn"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def history(log: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Split HF Trainer's log history into the training curve and the evaluations."""
    train = [dict(entry) for entry in log if "loss" in entry]
    evaluations = [
        {key.removeprefix("eval_"): value for key, value in entry.items()} for entry in log if "eval_loss" in entry
    ]
    return {"train": train, "eval": evaluations}


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON so that the file is either the old or the new one, never half of it. NaN becomes null."""
    path = Path(path)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(_plain(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "item"):
        return _plain(value.item())
    return str(value)


def plot(path: str | os.PathLike[str], curves: dict[str, list[dict[str, Any]]], metric: str, title: str) -> None:
    """Losses and the chosen metric over epochs, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    train, evaluations = curves["train"], curves["eval"]
    left.plot([e["epoch"] for e in train], [e["loss"] for e in train], label="training", linewidth=1)
    if evaluations:
        epochs = [e["epoch"] for e in evaluations]
        left.plot(epochs, [e["loss"] for e in evaluations], "o-", label="validation")
        right.plot(epochs, [e.get(metric, math.nan) for e in evaluations], "o-", color="C1", label="validation")
    left.set(xlabel="epoch", ylabel="loss")
    right.set(xlabel="epoch", ylabel=metric)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.suptitle(title)
    path = Path(path)
    partial = path.with_name(path.name + ".part")
    figure.savefig(partial, dpi=120, format="png")
    pyplot.close(figure)
    os.replace(partial, path)
