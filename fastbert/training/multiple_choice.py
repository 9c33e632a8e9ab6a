"""Multiple choice: which of several endings goes with a beginning (SWAG)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import DataCollatorForMultipleChoice

from .data import (
    BadRowError,
    Split,
    as_text,
    check_columns,
    checked_text,
    known_columns,
    raw_label,
    split_names,
    token_table,
    tokenize,
)
from .errors import CommandError
from .labels import label_name
from .task import Task, first_output

if TYPE_CHECKING:
    from transformers import EvalPrediction, PreTrainedTokenizerBase

    from .rows import RowFile

METRICS = {"accuracy": True, "loss": False}
_ENDING = re.compile(r"^ending\d+$")


@dataclass
class ChoiceColumns:
    """Where beginning and choices are: the context, what begins every choice, and a column each or one with a list."""

    context: tuple[str, ...]
    prefix: str | None
    choices: tuple[str, ...]
    delimiter: str = " "
    count: int | None = None  # of choices; None, where they are in a list, takes any

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.context, *((self.prefix,) if self.prefix else ()), *self.choices)

    @classmethod
    def choose(
        cls,
        columns: Sequence[str],
        context: Sequence[str] | None,
        delimiter: str,
        prefix: str | None,
        choices: Sequence[str] | None,
        path: Any,
    ) -> ChoiceColumns:
        """Those that the flags name, or SWAG's. Raises CommandError where there are none."""
        contexts = tuple(split_names(context or (), columns))
        if not contexts and "sent1" not in columns:
            raise CommandError(f"--text_column_name is needed: {path} has the columns {', '.join(map(repr, columns))}")
        if prefix is None and not contexts and "sent2" in columns:
            prefix = "sent2"
        named = tuple(split_names(choices or (), columns))
        named = named or tuple(sorted((c for c in columns if _ENDING.match(c)), key=lambda c: int(c[6:])))
        if not named:
            raise CommandError(
                f"--choice_column_names is needed: {path} has the columns {', '.join(map(repr, columns))}"
            )
        return cls(contexts or ("sent1",), prefix, named, delimiter, len(named) if len(named) > 1 else None)

    def of(self, values: dict[str, Any]) -> tuple[str, list[str]]:
        """The beginning and the choices of a row. Raises BadRowError."""
        context = self.delimiter.join(as_text(values, name) for name in self.context)
        if not context.strip():
            raise BadRowError(f"no text in {' + '.join(map(repr, self.context))}")
        prefix = as_text(values, self.prefix) if self.prefix else ""
        if len(self.choices) > 1:
            choices = [as_text(values, name) for name in self.choices]
            names: Sequence[Any] = self.choices
        else:
            choices, names = self._listed(values)
        for name, choice in zip(names, choices, strict=True):
            if not choice.strip():
                raise BadRowError(f"no text in {name!r}")
        return context, [f"{prefix} {choice}" if prefix else choice for choice in choices]

    def _listed(self, values: dict[str, Any]) -> tuple[list[str], list[str]]:
        (name,) = self.choices
        found = values.get(name)
        if not isinstance(found, list) or not all(isinstance(choice, str) for choice in found):
            raise BadRowError(f"{name!r} is no list of texts but {found!r}")
        if len(found) < 2 or self.count not in (None, len(found)):
            raise BadRowError(f"{len(found)} choices in {name!r} where {self.count or 'at least 2'} are wanted")
        return [checked_text(choice, name) for choice in found], [f"{name}[{i}]" for i in range(len(found))]


def encode_choices(
    tokenizer: PreTrainedTokenizerBase, items: list[tuple[str, list[str]]], max_length: int
) -> tuple[dict[str, list[list[list[int]]]], int]:
    """Token ids (and token types, where the model has them) of every choice of every item; how many texts were cut."""
    contexts = [context for context, choices in items for _ in choices]
    encoded, cut = tokenize(tokenizer, contexts, [choice for _, choices in items for choice in choices], max_length)
    count = len(items[0][1])
    nested = {name: [values[i : i + count] for i in range(0, len(values), count)] for name, values in encoded.items()}
    return nested, cut


class MultipleChoice(Task):
    """Multiple choice."""

    name = "multiple_choice"
    head = "AutoModelForMultipleChoice"
    flags = frozenset(
        (
            "text_column_name",
            "text_column_delimiter",
            "text_pair_column_name",
            "choice_column_names",
            "label_column_name",
        )
    )
    metrics = METRICS
    label_smoothing = True

    def choose_columns(self, train: RowFile) -> None:
        flags, columns = self.data_args, known_columns(train)
        if flags.label_column_name and len(flags.label_column_name) > 1:
            raise CommandError(f"--label_column_name {' '.join(flags.label_column_name)}: multiple choice takes one")
        self.label = flags.label_column_name[0] if flags.label_column_name else "label"
        self.columns = ChoiceColumns.choose(
            columns,
            flags.text_column_name,
            flags.text_column_delimiter,
            flags.text_pair_column_name,
            flags.choice_column_names,
            train.path,
        )
        self.check_file(train, "--train_file")

    def check_file(self, rows: RowFile, argument: str) -> None:
        columns = self.columns
        check_columns(columns.context, rows, f"--text_column_name, for {argument}")
        check_columns([columns.prefix] if columns.prefix else [], rows, f"--text_pair_column_name, for {argument}")
        check_columns(columns.choices, rows, f"--choice_column_names, for {argument}")
        check_columns([self.label], rows, f"--label_column_name, for {argument}")

    def _parse(self, values: dict[str, Any]) -> tuple[tuple[str, list[str]], int]:
        item = self.columns.of(values)
        label = self._label(values, len(item[1]))
        self.columns.count = len(item[1])  # told by the first row that is good in all
        return item, label

    def _label(self, values: dict[str, Any], count: int) -> int:
        label = label_name(raw_label(values, [self.label]))
        if label in self.columns.choices and len(self.columns.choices) > 1:
            return self.columns.choices.index(label)
        if label not in map(str, range(count)):
            names = f" or {', '.join(self.columns.choices)}" if len(self.columns.choices) > 1 else ""
            raise BadRowError(f"{self.label!r} is {label!r}; allowed are 0 to {count - 1}{names}")
        return int(label)

    def read_file(self, name: str, rows: RowFile, argument: str) -> Split:
        import pyarrow as pa

        reader = self.reader(name, rows, argument, self._parse)
        tables: list[pa.Table] = []
        truncated = 0
        for window in reader.windows():
            encoded, cut = encode_choices(self.tokenizer, [item for item, _ in window], self.max_length)
            labels = pa.array([label for _, label in window], type=pa.int64())
            tables.append(token_table(encoded).append_column("labels", labels))
            truncated += cut
        return Split(reader.source, reader.lines, pa.concat_tables(tables), reader.bad, {"truncated_texts": truncated})

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"choices": self.columns.count}

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"choices": self.columns.count}

    def headline(self) -> str:
        return f"multiple choice of {self.columns.count}"

    def collator(self) -> DataCollatorForMultipleChoice:
        return DataCollatorForMultipleChoice(self.tokenizer)

    def compute_metrics(self, name: str, prediction: EvalPrediction) -> dict[str, float]:
        guess = first_output(prediction.predictions).argmax(-1)
        return {"accuracy": float((guess == np.asarray(prediction.label_ids)).mean())}
