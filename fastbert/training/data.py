"""From rows to tokenised datasets: texts, labels, bad rows, and the split for validation."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from .errors import CommandError
from .rows import RowFile, open_rows

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

WINDOW = 2048  # rows tokenised at a time
SHOWN = 10  # bad rows printed in full
Item = TypeVar("Item")


class BadRowError(ValueError):
    """A row that lacks a text or a usable label."""


@dataclass(frozen=True)
class TextColumns:
    """Where the text is: one or more columns joined by ``delimiter``, and an optional second sentence."""

    names: tuple[str, ...]
    delimiter: str = " "
    pair: str | None = None

    @property
    def all(self) -> tuple[str, ...]:
        return self.names + ((self.pair,) if self.pair else ())

    def of(self, values: dict[str, Any]) -> tuple[str, str | None]:
        """The text, and the second sentence or None, of one row. Raises BadRowError if either is missing or empty."""
        text = self.delimiter.join(as_text(values, name) for name in self.names)
        if not text.strip():
            raise BadRowError(f"no text in {' + '.join(map(repr, self.names))}")
        if self.pair is None:
            return text, None
        pair = as_text(values, self.pair)
        if not pair.strip():
            raise BadRowError(f"no text in {self.pair!r}")
        return text, pair


def as_text(values: dict[str, Any], name: str) -> str:
    """The text in column ``name``, "" where it is empty. Raises BadRowError where there is no text."""
    if name not in values:
        raise BadRowError(f"no field {name!r}")
    value = values[name]
    if _missing(value):
        return ""
    _refuse_bytes(value, name)
    if isinstance(value, (list, dict, bool)):
        raise BadRowError(f"{name!r} is not a text but a {type(value).__name__}")
    return checked_text(str(value), name)


def _missing(value: Any) -> bool:
    return value is None or value != value  # pandas writes what is missing as NaN


def _refuse_bytes(value: Any, name: str) -> None:
    # Columns of Parquet's type binary, of which nothing says how they are encoded.
    if isinstance(value, bytes):
        raise BadRowError(f"{name!r} is not a text but bytes; convert the column to text")


def checked_text(text: str, name: str) -> str:
    """``text`` itself. Raises BadRowError, naming the column, if it is nothing that a tokenizer takes."""
    # JSON can hold half of a surrogate pair, which no UTF-8 has and the tokenizer cannot take.
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise BadRowError(f"{name!r} has a lone surrogate character")
    return text


def known_columns(rows: RowFile) -> list[str]:
    """The columns of a file; for JSONL those of its first rows."""
    if rows.columns is not None:
        return rows.columns
    found: dict[str, None] = {}
    for index, row in enumerate(rows.rows()):
        found.update(dict.fromkeys(row.values))
        if index >= 1000:
            break
    return list(found)


def split_names(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Column names given as ``a b`` or, as in transformers' example scripts, as ``a,b``."""
    return [part for name in names for part in ([name] if name in columns else name.split(",")) if part]


def check_columns(wanted: Sequence[str], rows: RowFile, argument: str) -> None:
    """Raise CommandError naming ``argument`` if the file has no such column, with those it has."""
    columns = known_columns(rows)
    missing = [name for name in wanted if name not in columns]
    if missing:
        which = f"no column {missing[0]!r}" if len(missing) == 1 else f"no columns {missing}"
        raise CommandError(f"{argument}: {rows.path} has {which}; its columns are: {', '.join(map(repr, columns))}")


def choose_text_columns(
    rows: RowFile, names: Sequence[str] | None, delimiter: str, pair: str | None, labels: Sequence[str] = ()
) -> TextColumns:
    """The columns the flags name, or the one that is obvious. Raises CommandError where there is none."""
    columns = known_columns(rows)
    names = split_names(names or (), columns)
    if not names:
        others = [name for name in columns if name not in labels and name != pair]
        obvious = [name for name in ("text", "sentence") if name in others] or (others if len(others) == 1 else [])
        if not obvious:
            raise CommandError(
                f"--text_column_name is needed: {rows.path} has the columns {', '.join(map(repr, columns))}"
            )
        names = obvious[:1]
    check_columns(names, rows, "--text_column_name")
    if pair is not None:
        check_columns([pair], rows, "--text_pair_column_name")
    return TextColumns(tuple(names), delimiter, pair)


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], pairs: list[str] | None, max_length: int
) -> tuple[dict[str, list[list[int]]], int]:
    """Token ids (and token types, where the model has them) of a list of texts, and how many texts were cut."""
    encoded = tokenizer(
        texts,
        pairs,
        truncation="longest_first",
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        verbose=False,
    )
    cut = sum(1 for encoding in encoded.encodings if encoding.overflowing) if encoded.encodings else 0
    return dict(encoded), cut


@dataclass
class Split:
    """One file, ready for the trainer.

    ``features`` has one row for each thing that the model is called with, in the order of the file: a row of the file,
    or a window of a long one.
    """

    source: str
    lines: list[int]  # of the rows of the file
    features: pa.Table
    bad: list[tuple[int, str]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)  # further counts for the report

    def __len__(self) -> int:
        return len(self.lines)

    def take(self, indices: Sequence[int]) -> Split:
        """The rows of the file at ``indices``, in that order, with their features."""
        return replace(
            self,
            lines=[self.lines[i] for i in indices],
            features=self.features.take(list(indices)),
            bad=[],
            counts={},
        )

    def lengths(self) -> list[int]:
        """Tokens of each feature; of all choices together where it has several."""
        import pyarrow as pa

        column = self.features["input_ids"].combine_chunks()
        if pa.types.is_list(column.type.value_type):
            return [sum(map(len, choices)) for choices in column.to_pylist()]
        return column.value_lengths().to_pylist()

    def dataset(self) -> Dataset:
        """What the trainer iterates over."""
        from datasets import Dataset

        return Dataset(self.features)

    def digest(self) -> str:
        """A checksum of the features."""
        import pyarrow as pa

        found = hashlib.blake2b(digest_size=8)
        for name in self.features.column_names:
            column = self.features.column(name).combine_chunks()
            while pa.types.is_list(column.type):
                column = column.flatten()
            found.update(name.encode())
            if pa.types.is_string(column.type):
                found.update(repr(column.to_pylist()).encode("utf-8", errors="backslashreplace"))
            else:
                found.update(np.ascontiguousarray(column.to_numpy(zero_copy_only=False)).tobytes())
        return found.hexdigest()

    def summary(self) -> dict[str, Any]:
        """For the report."""
        return {
            "file": self.source,
            "rows": len(self),
            "bad_rows": len(self.bad),
            "bad_row_lines": [line for line, _ in self.bad[:1000]],
            **self.counts,
        }


@dataclass
class RowReader(Generic[Item]):
    """Reads a file in windows of parsed rows, and reports the rows that cannot be used.

    ``parse`` makes an item of a row's values, or raises BadRowError. Rows that cannot be read or parsed are named on
    stderr by line; with ``on_bad_row="error"`` they end the run with CommandError, and so does a file without a row.
    """

    rows: RowFile
    argument: str
    parse: Callable[[dict[str, Any]], Item]
    max_rows: int | None = None
    on_bad_row: str = "error"
    quiet: bool = False
    lines: list[int] = field(default_factory=list)  # of the good rows so far
    bad: list[tuple[int, str]] = field(default_factory=list)

    @property
    def source(self) -> str:
        return str(self.rows.path)

    def windows(self) -> Iterator[list[Item]]:
        """The items of the file, at most WINDOW at a time."""
        window: list[Item] = []
        title = f"reading {self.rows.path.name}"
        with tqdm(
            total=self.rows.size, unit=self.rows.unit, unit_scale=True, desc=title, disable=self.quiet, leave=False
        ) as bar:
            for row in islice(self.rows.rows(), self.max_rows):
                try:
                    if row.error:
                        raise BadRowError(row.error)
                    window.append(self.parse(row.values))
                except BadRowError as problem:
                    self.bad.append((row.line, str(problem)))
                    continue
                self.lines.append(row.line)
                if len(window) == WINDOW:
                    yield window
                    window = []
                    bar.update(row.end.offset - bar.n)
            if window:
                yield window
        self._report()
        if not self.lines:
            raise CommandError(f"{self.argument} {self.source}: no usable row")

    def _report(self) -> None:
        if not self.bad:
            return
        for line, problem in self.bad[:SHOWN]:
            print(f"{self.source}:{line}: {problem}", file=sys.stderr)
        if len(self.bad) > SHOWN:
            print(f"{self.source}: … and {len(self.bad) - SHOWN} more", file=sys.stderr)
        count = f"{len(self.bad)} bad row{'s' if len(self.bad) > 1 else ''} (of {len(self.bad) + len(self.lines)})"
        if self.on_bad_row == "error":
            line, problem = self.bad[0]
            raise CommandError(
                f"{self.argument} {self.source}: {count}, the first at line {line}: {problem}; "
                "mend them, or leave them out with --on_bad_row skip"
            )
        print(f"{self.source}: {count} left out", file=sys.stderr)


def token_table(encoded: dict[str, list[Any]]) -> pa.Table:
    """An Arrow table of token ids and what goes with them: lists of numbers, or of lists of numbers."""
    import pyarrow as pa

    def kind(values: list[Any]) -> pa.DataType:
        nested = bool(values) and bool(values[0]) and isinstance(values[0][0], list)
        return pa.list_(pa.list_(pa.int32())) if nested else pa.list_(pa.int32())

    return pa.table({name: pa.array(values, type=kind(values)) for name, values in encoded.items()})


def raw_label(values: dict[str, Any], columns: Sequence[str], empty_label: bool = False) -> Any:
    """The label of a row: a value, or a list of values where several columns hold it.

    An empty cell is a missing label (BadRowError), or, with ``empty_label`` (multi-label), a row to which none applies.
    """
    found = []
    for name in columns:
        value = values.get(name)
        empty = isinstance(value, str) and not value.strip() and (len(columns) > 1 or not empty_label)
        if empty or _missing(value):
            raise BadRowError(f"no label in {name!r}")
        for part in value if isinstance(value, list) else [value]:
            if _missing(part):
                raise BadRowError(f"a label is missing in the list in {name!r}")
            _refuse_bytes(part, name)
        found.append(value)
    return found[0] if len(columns) == 1 else found


def label_counts(labels: list[Any]) -> Counter[Any]:
    """How often each label (or, multi-label, each combination) occurs."""
    return Counter(tuple(label) if isinstance(label, list) else label for label in labels)


def hold_out(
    count: int,
    share: float,
    seed: int,
    *,
    strata: Sequence[Any] | None = None,
    groups: Sequence[Hashable] | None = None,
) -> tuple[list[int], list[int]]:
    """Seeded split of ``count`` rows into (training, validation) indices.

    ``strata`` (a label a row) keep their shares where possible; rows of the same of ``groups`` stay together.
    """
    from sklearn.model_selection import train_test_split

    if groups is not None:
        members: dict[Hashable, list[int]] = {}
        for index, group in enumerate(groups):
            members.setdefault(group, []).append(index)
        if len(members) > 1:
            parts = hold_out(len(members), share, seed)
            rows = list(members.values())
            train, validation = (sorted(index for part in parts[side] for index in rows[part]) for side in (0, 1))
            return train, validation
    if count < 2:
        raise CommandError("--train_file: one row is too few to hold out a part for validation; give --validation_file")
    held_out = max(1, round(share * count))
    if strata is not None:
        counts = label_counts(list(strata))
        if min(counts.values()) < 2 or held_out < len(counts) or count - held_out < len(counts):
            strata = None
    kept, held = train_test_split(np.arange(count), test_size=held_out, random_state=seed, stratify=strata)
    return sorted(kept.tolist()), sorted(held.tolist())


def open_split(path: str, argument: str, split: str | None = None) -> RowFile:
    """:func:`open_rows` for a training, validation or test file (standard input cannot be read twice)."""
    if path == "-":
        raise CommandError(f"{argument} -: training data cannot come from standard input")
    return open_rows(path, argument, split)
