"""The kind of task, the label set, and the metrics that go with it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import CommandError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
_WHOLE = re.compile(r"-?\d{1,640}")  # of more digits int() may refuse to make a number
_TRUE, _FALSE = {"1", "1.0", "true", "True"}, {"0", "0.0", "false", "False"}

# metric -> whether greater is better; the first one of each kind chooses the best checkpoint
METRICS: dict[str, dict[str, bool]] = {
    SINGLE: {"accuracy": True, "f1_macro": True, "f1_weighted": True, "loss": False},
    MULTI: {"f1_micro": True, "f1_macro": True, "accuracy": True, "loss": False},
    REGRESSION: {
        "rmse": False,
        "mse": False,
        "mae": False,
        "r2": True,
        "pearson": True,
        "spearman": True,
        "loss": False,
    },
}


@dataclass
class UnknownLabels:
    """Collects labels that the training data does not have, for one error about all of them."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, line: int) -> None:
        self.counts[name] += 1
        self.first.setdefault(name, line)

    def check(self, known: Sequence[str], source: str, argument: str, what: str = "labels", unit: str = "row") -> None:
        """Raise CommandError if any was added."""
        if self.counts:
            raise CommandError(self.told(known, source, argument, what, unit))

    def told(self, known: Sequence[str], source: str, argument: str, what: str, unit: str) -> str:
        """Which labels were added, how often and where first, and which are known."""
        listed = ", ".join(
            f"{name!r} ({count} {unit}{'s' if count > 1 else ''}, first at line {self.first[name]})"
            for name, count in self.counts.most_common(20)
        )
        return (
            f"{argument} {source}: {what} that the training data does not have: {listed}"
            f"{' …' if len(self.counts) > 20 else ''}. The training data has: {_shortened(known)}"
        )


@dataclass
class Labels:
    """How raw labels become numbers.

    ``names`` are the classes, or, for regression, the names of the targets.
    """

    kind: str
    names: list[str]
    columns: Sequence[str]
    delimiter: str = ","
    index: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.index = {name: i for i, name in enumerate(self.names)}

    @property
    def num_labels(self) -> int:
        return len(self.names)

    def name_outputs(self, config: PreTrainedConfig) -> None:
        """Give a model's outputs their number and names."""
        config.num_labels = self.num_labels
        config.id2label = dict(enumerate(self.names))
        config.label2id = dict(self.index)

    def encode(self, labels: list[Any], lines: list[int], source: str, argument: str) -> list[Any]:
        """Class numbers, 0/1 vectors or floats. Raises CommandError for labels that the training data does not have."""
        if self.kind == REGRESSION:
            return [self._numbers(label, line, source, argument) for label, line in zip(labels, lines, strict=True)]
        unknown = UnknownLabels()
        encoded: list[Any] = []
        for label, line in zip(labels, lines, strict=True):
            if self.kind == SINGLE:
                names = [label_name(label)]
            elif len(self.columns) > 1:
                encoded.append([_indicator(value, line, source, argument) for value in label])
                continue
            else:
                names = split_labels(label, self.delimiter)
            for name in names:
                if name not in self.index:
                    unknown.add(name, line)
            if not unknown.counts:
                numbers = {self.index[name] for name in names}
                encoded.append(
                    numbers.pop() if self.kind == SINGLE else [float(i in numbers) for i in range(self.num_labels)]
                )
        unknown.check(self.names, source, argument)
        return encoded

    def _numbers(self, label: Any, line: int, source: str, argument: str) -> float | list[float]:
        several = isinstance(label, (list, tuple))
        if several != (len(self.names) > 1) or (several and len(label) != len(self.names)):
            raise CommandError(f"{argument} {source}:{line}: {len(self.names)} number(s) wanted, got {label!r}")
        values = [_number(value) for value in label] if several else [_number(label)]
        for value, raw in zip(values, label if several else [label], strict=True):
            if value is None:
                raise CommandError(f"{argument} {source}:{line}: {raw!r} is not a finite number, as regression needs")
        return values if several else values[0]  # type: ignore[return-value]


def label_name(label: Any) -> str:
    """The name of a class as text: 1.0 (a whole number in a float column) and 1 are the same class."""
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return str(label).strip() if isinstance(label, str) else str(label)


def sorted_names(names: set[str]) -> list[str]:
    """Names of classes in order; whole numbers as numbers."""
    ordered = sorted(names)
    return sorted(ordered, key=int) if all(map(_WHOLE.fullmatch, names)) else ordered


def split_labels(label: Any, delimiter: str) -> list[str]:
    """The class names of one multi-label cell: a list, or text with a delimiter. Empty means none applies."""
    parts = label if isinstance(label, (list, tuple)) else str(label).split(delimiter)
    return [name for name in map(label_name, parts) if name]


def _indicator(value: Any, line: int, source: str, argument: str) -> float:
    text = str(value).strip()
    if text in _TRUE:
        return 1.0
    if text in _FALSE:
        return 0.0
    raise CommandError(f"{argument} {source}:{line}: {value!r} where a label column must hold 0 or 1")


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _shortened(names: Sequence[str], limit: int = 30) -> str:
    return ", ".join(map(repr, names[:limit])) + (f" … ({len(names)} in all)" if len(names) > limit else "")


def find_labels(
    labels: list[Any],
    columns: Sequence[str],
    problem_type: str | None,
    delimiter: str,
    known_names: Sequence[str] | None = None,
) -> Labels:
    """The kind of task and the label set of the training data.

    ``known_names`` are the names that a saved dataset gives its classes. Raises CommandError where the labels do not
    fit ``problem_type``, or where there is only one class.
    """
    kind = problem_type or _kind_of(labels, columns, bool(known_names))
    if kind == REGRESSION:
        width = len(labels[0]) if isinstance(labels[0], (list, tuple)) else 1
        names = list(columns) if len(columns) == width else [f"{columns[0]}_{i}" for i in range(width)]
        return Labels(REGRESSION, names, columns, delimiter)
    if kind == MULTI and len(columns) > 1:
        return Labels(MULTI, list(columns), columns, delimiter)
    if kind == SINGLE and (len(columns) > 1 or any(isinstance(label, (list, dict)) for label in labels)):
        raise CommandError(f"--problem_type {SINGLE}: the labels are lists; use {MULTI}")
    if known_names:
        names = list(known_names)
    else:
        found: set[str] = set()
        for label in labels:
            found.update([label_name(label)] if kind == SINGLE else split_labels(label, delimiter))
        names = sorted_names(found)
    if kind == SINGLE and len(names) < 2:
        raise CommandError(f"--label_column_name {columns[0]}: the training data has only one label, {names[0]!r}")
    if kind == MULTI and not names:
        raise CommandError(f"--label_column_name {columns[0]}: no row of the training data has a label")
    if len(names) == 1 and kind == MULTI:
        raise CommandError(f"--label_column_name {columns[0]}: the training data has only one label, {names[0]!r}")
    return Labels(kind, names, columns, delimiter)


def _kind_of(labels: list[Any], columns: Sequence[str], named: bool) -> str:
    """Lists or several columns are multi-label; numbers with a fraction are regression; all else is single-label."""
    if len(columns) > 1 or any(isinstance(label, list) for label in labels):
        return MULTI
    if named:
        return SINGLE
    numbers = [_number(label) if not isinstance(label, bool) else None for label in labels]
    if all(number is not None for number in numbers) and any(not number.is_integer() for number in numbers):  # type: ignore[union-attr]
        return REGRESSION
    return SINGLE


def compute_metrics(kind: str, logits: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Metrics of logits [N, labels] against class numbers [N], 0/1 vectors [N, labels] or numbers [N(, targets)]."""
    from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, mean_squared_error, r2_score

    if kind == SINGLE:
        guess = logits.argmax(-1)
        return {
            "accuracy": float(accuracy_score(truth, guess)),
            "f1_macro": float(f1_score(truth, guess, average="macro", zero_division=0)),
            "f1_weighted": float(f1_score(truth, guess, average="weighted", zero_division=0)),
        }
    if kind == MULTI:
        chosen, wanted = logits > 0, truth > 0.5  # a probability above one half
        return {
            "f1_micro": float(f1_score(wanted, chosen, average="micro", zero_division=0)),
            "f1_macro": float(f1_score(wanted, chosen, average="macro", zero_division=0)),
            "accuracy": float((wanted == chosen).all(-1).mean()),
        }
    guess, truth = logits.reshape(len(truth), -1), truth.reshape(len(truth), -1)
    mse = float(mean_squared_error(truth, guess))
    scores = {"rmse": mse**0.5, "mse": mse, "mae": float(mean_absolute_error(truth, guess))}
    scores["r2"] = float(r2_score(truth, guess)) if len(truth) > 1 else math.nan
    scores["pearson"] = correlation(truth, guess)
    scores["spearman"] = correlation(ranks(truth), ranks(guess))
    return scores


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the first axis, ties averaged."""
    from scipy.stats import rankdata  # type: ignore[import-untyped]

    return rankdata(values, axis=0)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation, averaged over columns; NaN where a column is constant."""
    with np.errstate(invalid="ignore", divide="ignore"):
        a, b = a - a.mean(0), b - b.mean(0)
        return float(((a * b).sum(0) / np.sqrt((a * a).sum(0) * (b * b).sum(0))).mean())


def per_label(labels: Labels, logits: np.ndarray, truth: np.ndarray) -> dict[str, Any] | None:
    """Precision, recall, F1 and support of each class; None for regression."""
    from sklearn.metrics import classification_report

    if labels.kind == REGRESSION:
        return None
    guess = logits.argmax(-1) if labels.kind == SINGLE else (logits > 0).astype(int)
    wanted = truth if labels.kind == SINGLE else (truth > 0.5).astype(int)
    report = classification_report(wanted, guess, labels=range(labels.num_labels), output_dict=True, zero_division=0)
    return {name: report[str(i)] for i, name in enumerate(labels.names)}
