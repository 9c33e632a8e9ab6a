"""Classes, several labels or numbers for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from transformers import DataCollatorWithPadding

from .data import (
    Split,
    check_columns,
    choose_text_columns,
    known_columns,
    raw_label,
    split_names,
    token_table,
    tokenize,
)
from .labels import METRICS, MULTI, REGRESSION, SINGLE, Labels, compute_metrics, find_labels, per_label
from .task import Task, first_output

if TYPE_CHECKING:
    from transformers import EvalPrediction, PreTrainedConfig

    from .rows import RowFile


class SequenceClassification(Task):
    """Sequence classification; the kind of problem is told from the labels, or by ``--problem_type``."""

    name = "sequence_classification"
    head = "AutoModelForSequenceClassification"
    flags = frozenset(
        (
            "text_column_name",
            "text_column_delimiter",
            "text_pair_column_name",
            "label_column_name",
            "label_delimiter",
            "problem_type",
            "do_regression",
        )
    )
    labels: Labels | None = None

    @property
    def kind(self) -> str:
        """The problem type."""
        assert self.labels is not None
        return self.labels.kind

    @property
    def label_smoothing(self) -> bool:  # type: ignore[override]
        """Smoothed are the classes of a single-label problem."""
        return self.kind == SINGLE

    @property
    def metrics(self) -> dict[str, bool]:  # type: ignore[override]
        """Those of the problem type."""
        return METRICS[self.kind]

    def choose_columns(self, train: RowFile) -> None:
        flags = self.data_args
        self.columns = split_names(flags.label_column_name or ["label"], known_columns(train))
        check_columns(self.columns, train, "--label_column_name")
        self.text = choose_text_columns(
            train, flags.text_column_name, flags.text_column_delimiter, flags.text_pair_column_name, self.columns
        )

    def check_file(self, rows: RowFile, argument: str) -> None:
        check_columns(self.columns, rows, f"--label_column_name, for {argument}")
        check_columns(self.text.all, rows, f"--text_column_name, for {argument}")

    def read_file(self, name: str, rows: RowFile, argument: str) -> Split:
        import pyarrow as pa

        # An empty cell is a row without a label, or, where a row may have several labels, one to which none applies.
        empty_label = (self.kind if self.labels else self.data_args.problem_type) == MULTI
        reader = self.reader(name, rows, argument, lambda v: (self.text.of(v), raw_label(v, self.columns, empty_label)))
        tables: list[pa.Table] = []
        labels: list[Any] = []
        truncated = 0
        for window in reader.windows():
            pairs = [pair or "" for (_, pair), _ in window] if self.text.pair else None
            encoded, cut = tokenize(self.tokenizer, [text for (text, _), _ in window], pairs, self.max_length)
            tables.append(token_table(encoded))
            labels += [label for _, label in window]
            truncated += cut
        if self.labels is None:
            known = rows.label_names.get(self.columns[0]) if len(self.columns) == 1 else None
            flags = self.data_args
            self.labels = find_labels(labels, self.columns, flags.problem_type, flags.label_delimiter, known)
        numbers = self.labels.encode(labels, reader.lines, reader.source, argument)
        several = isinstance(numbers[0], list)
        kind = pa.int64() if self.kind == SINGLE else pa.list_(pa.float32()) if several else pa.float32()
        features = pa.concat_tables(tables).append_column("labels", pa.array(numbers, type=kind))
        return Split(reader.source, reader.lines, features, reader.bad, {"truncated_texts": truncated})

    def strata(self, split: Split) -> Sequence[Any] | None:
        return split.features["labels"].to_pylist() if self.kind == SINGLE else None

    def identity(self) -> dict[str, Any]:
        assert self.labels is not None
        return super().identity() | {"labels": self.labels.names, "problem_type": self.kind}

    def describe(self) -> dict[str, Any]:
        assert self.labels is not None
        return super().describe() | {"problem_type": self.kind, "labels": self.labels.names}

    def headline(self) -> str:
        assert self.labels is not None
        unit = "target(s)" if self.kind == REGRESSION else "labels"
        return f"{self.kind.replace('_', ' ')}, {self.labels.num_labels} {unit}"

    def configure(self, config: PreTrainedConfig) -> None:
        assert self.labels is not None
        config.problem_type = cast(Any, self.kind)
        self.labels.name_outputs(config)

    def collator(self) -> DataCollatorWithPadding:
        return DataCollatorWithPadding(self.tokenizer)

    def compute_metrics(self, name: str, prediction: EvalPrediction) -> dict[str, float]:
        return compute_metrics(self.kind, first_output(prediction.predictions), np.asarray(prediction.label_ids))

    def details(self, name: str, predictions: Any, label_ids: Any) -> dict[str, Any] | None:
        assert self.labels is not None
        return per_label(self.labels, first_output(predictions), np.asarray(label_ids))
