"""What a run leaves besides a model: JSON, and pictures as PNG."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastbert.files import replacing

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
    with replacing(path) as partial:
        partial.write_text(json.dumps(_plain(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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


@contextmanager
def picture(path: str | os.PathLike[str], title: str, width: float, columns: int, **options: Any) -> Iterator[Any]:
    """Axes side by side to draw on, with a grid and the legends that they need; saved as PNG at the end.

    ``width`` is in inches; ``options`` are those of matplotlib's ``Figure.subplots``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.5), layout="constrained")
    axes = figure.subplots(1, columns, **options)
    yield axes
    for one in axes:
        one.grid(alpha=0.3)
        if one.get_legend_handles_labels()[0]:
            one.legend()
    figure.suptitle(title)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png", metadata={"Software": None})
