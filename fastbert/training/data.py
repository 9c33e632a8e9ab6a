"""From rows to tokenised datasets: texts, labels, bad rows, and the split for validation."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from .errors import CommandError
from .rows import Row, RowFile, open_rows

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

WINDOW = 2048  # rows tokenised at a time
SHOWN = 10  # bad rows printed in full


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
        text = self.delimiter.join(_as_text(values, name) for name in self.names)
        if not text.strip():
            raise BadRowError(f"no text in {' + '.join(map(repr, self.names))}")
        if self.pair is None:
            return text, None
        pair = _as_text(values, self.pair)
        if not pair.strip():
            raise BadRowError(f"no text in {self.pair!r}")
        return text, pair


def _as_text(values: dict[str, Any], name: str) -> str:
    if name not in values:
        raise BadRowError(f"no field {name!r}")
    value = values[name]
    if value is None or value != value:  # pandas writes what is missing as NaN
        return ""
    if isinstance(value, (list, dict, bool)):
        raise BadRowError(f"{name!r} is not a text but a {type(value).__name__}")
    text = str(value)
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
    """One tokenised file. ``labels`` are raw until :class:`Labels` encodes them."""

    source: str
    tokens: pa.Table
    labels: list[Any]
    lines: list[int]
    bad: list[tuple[int, str]] = field(default_factory=list)
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.lines)

    def take(self, indices: Sequence[int]) -> Split:
        """The rows at ``indices``, in that order."""
        return Split(
            self.source,
            self.tokens.take(list(indices)),
            [self.labels[i] for i in indices],
            [self.lines[i] for i in indices],
        )

    def dataset(self, encoded: list[Any], regression_or_multi: bool) -> Dataset:
        """A ``datasets.Dataset`` with the tokens and the encoded labels."""
        import pyarrow as pa
        from datasets import Dataset

        if regression_or_multi:
            kind = pa.list_(pa.float32()) if encoded and isinstance(encoded[0], list) else pa.float32()
        else:
            kind = pa.int64()
        return Dataset(self.tokens.append_column("labels", pa.array(encoded, type=kind)))

    def digest(self) -> str:
        """A checksum of the tokens and labels."""
        found = hashlib.blake2b(repr(self.labels).encode("utf-8", errors="backslashreplace"), digest_size=8)
        for name in self.tokens.column_names:
            column = self.tokens.column(name).combine_chunks().flatten()
            found.update(column.to_numpy(zero_copy_only=False))
        return found.hexdigest()

    def summary(self) -> dict[str, Any]:
        """For the report."""
        return {
            "file": self.source,
            "rows": len(self),
            "bad_rows": len(self.bad),
            "bad_row_lines": [line for line, _ in self.bad[:1000]],
            "truncated_texts": self.truncated,
        }


def read_split(
    rows: RowFile,
    argument: str,
    text: TextColumns,
    label_columns: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    max_rows: int | None = None,
    on_bad_row: str = "error",
    empty_label: bool = False,
    quiet: bool = False,
) -> Split:
    """Read and tokenise a file.

    An empty label cell is a missing label, or, with ``empty_label`` (multi-label), a row to which none applies. Rows
    that cannot be read or have no text or label are reported on stderr by line; with ``on_bad_row="error"`` they end
    the run. Raises CommandError then, and where no row is left.
    """
    import pyarrow as pa

    tables: list[pa.Table] = []
    split = Split(str(rows.path), pa.table({}), [], [])
    window: list[tuple[str, str | None]] = []

    def flush() -> None:
        if window:
            pairs = [pair or "" for _, pair in window] if text.pair else None
            encoded, cut = tokenize(tokenizer, [first for first, _ in window], pairs, max_length)
            tables.append(
                pa.table({name: pa.array(value, type=pa.list_(pa.int32())) for name, value in encoded.items()})
            )
            split.truncated += cut
            window.clear()

    title = f"reading {rows.path.name}"
    with tqdm(total=rows.size, unit=rows.unit, unit_scale=True, desc=title, disable=quiet, leave=False) as bar:
        for row in _limited(rows.rows(), max_rows):
            try:
                if row.error:
                    raise BadRowError(row.error)
                texts = text.of(row.values)
                label = _raw_label(row.values, label_columns, empty_label)
            except BadRowError as problem:
                split.bad.append((row.line, str(problem)))
                continue
            window.append(texts)
            split.labels.append(label)
            split.lines.append(row.line)
            if len(window) == WINDOW:
                flush()
                bar.update(row.end.offset - bar.n)
        flush()
    _report_bad_rows(split, argument, on_bad_row)
    if not split.lines:
        raise CommandError(f"{argument} {rows.path}: no usable row")
    split.tokens = pa.concat_tables(tables)
    return split


def _limited(rows: Iterator[Row], limit: int | None) -> Iterator[Row]:
    for index, row in enumerate(rows):
        if limit is not None and index >= limit:
            return
        yield row


def _report_bad_rows(split: Split, argument: str, on_bad_row: str) -> None:
    if not split.bad:
        return
    for line, problem in split.bad[:SHOWN]:
        print(f"{split.source}:{line}: {problem}", file=sys.stderr)
    if len(split.bad) > SHOWN:
        print(f"{split.source}: … and {len(split.bad) - SHOWN} more", file=sys.stderr)
    count = f"{len(split.bad)} bad row{'s' if len(split.bad) > 1 else ''} (of {len(split.bad) + len(split)})"
    if on_bad_row == "error":
        raise CommandError(
            f"{argument} {split.source}: {count}, the first at line {split.bad[0][0]}: {split.bad[0][1]}; "
            "mend them, or leave them out with --on_bad_row skip"
        )
    print(f"{split.source}: {count} left out", file=sys.stderr)


def _raw_label(values: dict[str, Any], columns: Sequence[str], empty_label: bool) -> Any:
    """The label of a row: a value, or a list of values where several columns hold it."""
    found = []
    for name in columns:
        value = values.get(name)
        empty = isinstance(value, str) and not value.strip() and (len(columns) > 1 or not empty_label)
        if value is None or empty or value != value:  # NaN is missing
            raise BadRowError(f"no label in {name!r}")
        found.append(value)
    return found[0] if len(columns) == 1 else found


def label_counts(labels: list[Any]) -> Counter[Any]:
    """How often each label (or, multi-label, each combination) occurs."""
    return Counter(tuple(label) if isinstance(label, list) else label for label in labels)


def hold_out(labels: list[Any], share: float, seed: int, stratify: bool) -> tuple[list[int], list[int]]:
    """Seeded split into (training, validation) row indices; ``stratify`` keeps each label's share, where possible."""
    from sklearn.model_selection import train_test_split

    indices = np.arange(len(labels))
    held_out = max(1, round(share * len(labels)))
    if len(labels) < 2:
        raise CommandError("--train_file: one row is too few to hold out a part for validation; give --validation_file")
    if stratify:
        counts = label_counts(labels)
        stratify = min(counts.values()) >= 2 and held_out >= len(counts) and len(labels) - held_out >= len(counts)
    train, validation = train_test_split(
        indices, test_size=held_out, random_state=seed, stratify=labels if stratify else None
    )
    return sorted(train.tolist()), sorted(validation.tolist())


def open_split(path: str, argument: str, split: str | None = None) -> RowFile:
    """:func:`open_rows` for a training, validation or test file (standard input cannot be read twice)."""
    if path == "-":
        raise CommandError(f"{argument} -: training data cannot come from standard input")
    return open_rows(path, argument, split)
