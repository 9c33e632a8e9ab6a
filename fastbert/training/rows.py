"""Streaming readers for CSV, TSV, JSONL, Parquet and saved dataset folders.

A reader yields one :class:`Row` at a time, in file order, with its line number, and never holds more than a buffer of
the file. A row that cannot be read is yielded too, with ``error`` set, so that one bad line does not lose the rest.
Every row carries the position behind it, from which reading can start again.
"""

from __future__ import annotations

import codecs
import csv
import json
import os
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .errors import CommandError, first_line

if TYPE_CHECKING:
    import pyarrow as pa

# A quoted CSV field may contain line breaks; beyond this many lines an opening quote counts as never closed.
MAX_RECORD_LINES = 10_000
FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".conll": "conll",
    ".bio": "conll",
    ".iob": "conll",
}
FORMATS_TEXT = ".csv, .tsv, .jsonl, .parquet or .conll"

csv.field_size_limit(2**31 - 1)


@dataclass(slots=True)
class Position:
    """Where a row ends: byte offset (text files) or row index (Parquet, dataset folders), and lines read so far."""

    offset: int = 0
    line: int = 0


@dataclass(slots=True)
class Row:
    """One record. ``line`` counts from 1, header included (text files), or is the row's number (Parquet, folders)."""

    line: int
    values: dict[str, Any]
    end: Position
    error: str | None = None


@dataclass
class RowFile:
    """A file of rows. Iterate with :meth:`rows`."""

    path: Path
    columns: list[str] | None = None  # None: known only row by row (JSONL)
    size: int = 0  # what Position.offset runs up to
    unit: str = "B"  # of size
    schema: pa.Schema | None = None
    label_names: dict[str, list[str]] = field(default_factory=dict)  # of columns that carry names for their numbers

    def rows(self, start: Position | None = None) -> Iterator[Row]:
        """Yield the rows behind ``start`` (default: all)."""
        raise NotImplementedError


def format_of(path: str | os.PathLike[str], argument: str) -> str:
    """``csv``, ``tsv``, ``jsonl``, ``parquet`` or ``conll`` by the file's ending. Raises CommandError for another."""
    ending = Path(path).suffix.lower()
    if ending not in FORMATS:
        raise CommandError(f"{argument} {path}: unknown file ending {ending!r}; allowed are {FORMATS_TEXT}")
    return FORMATS[ending]


def open_rows(path: str | os.PathLike[str], argument: str, split: str | None = None) -> RowFile:
    """Open a file of rows, or a folder written by ``datasets``' ``save_to_disk``.

    ``argument`` is the flag to name in errors; ``split`` picks one of a folder with several splits. Raises CommandError
    if the file is missing, unreadable, empty, or of a kind that is not supported.
    """
    path = Path(path)
    if str(path) == "-":
        return JsonLinesFile(path, unit="B")
    if not path.exists():
        raise CommandError(f"{argument} {path}: no such file or folder")
    if path.is_dir():
        return _open_folder(path, argument, split)
    kind = format_of(path, argument)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(4096).removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise CommandError(f"{argument} {path}: cannot be read: {error.strerror}") from error
    if path.is_file() and not head.strip():
        raise CommandError(f"{argument} {path}: the file is empty")
    if kind == "parquet":
        return _open_parquet(path, argument)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\x00" in head:
        raise CommandError(f"{argument} {path}: not UTF-8 text (it contains zero bytes); convert it to UTF-8")
    if kind == "conll":
        from .conll import open_conll

        return open_conll(path, argument, size)
    if kind == "jsonl":
        if path.suffix.lower() == ".json" and path.is_file():
            from .squad import open_squad

            if (questions := open_squad(path, argument)) is not None:
                return questions
        if head.lstrip()[:1] == b"[":
            raise CommandError(f"{argument} {path}: a JSON array; write one JSON object a line instead (JSONL)")
        return JsonLinesFile(path, size=size)
    reader = _DelimitedFile(path, size=size, delimiter="\t" if kind == "tsv" else ",")
    reader.read_header(argument)
    return reader


def decode(raw: bytes) -> tuple[str, str | None]:
    """Text of a line without its line break, and what is wrong with it."""
    raw = raw.removesuffix(b"\n").removesuffix(b"\r")
    try:
        return raw.decode("utf-8"), None
    except UnicodeDecodeError as error:
        return raw.decode("utf-8", errors="replace"), f"invalid UTF-8 at byte {error.start + 1} of the line"


class TextLines:
    """Lines of a binary file with a push-back, tracking line number and byte offset.

    The byte order mark that the first line may begin with is no part of it.
    """

    def __init__(self, file: BinaryIO, start: Position) -> None:
        self.file = file
        self.position = Position(start.offset, start.line)
        self.waiting: deque[bytes] = deque()

    def next(self) -> bytes:
        """The next line with its line break; empty at the end of the file."""
        raw = self.waiting.popleft() if self.waiting else self.file.readline()
        if raw:
            self.position.offset += len(raw)
            self.position.line += 1
            if self.position.line == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
        return raw

    def push_back(self, lines: list[bytes]) -> None:
        self.waiting.extendleft(reversed(lines))
        self.position.offset -= sum(map(len, lines))
        self.position.line -= len(lines)

    def here(self) -> Position:
        return Position(self.position.offset, self.position.line)


@dataclass
class _DelimitedFile(RowFile):
    """CSV (RFC 4180) or TSV (one line a record; a field in proper quotes is unquoted, any other quote is literal)."""

    delimiter: str = ","
    body: Position = field(default_factory=Position)

    def read_header(self, argument: str) -> None:
        with open(self.path, "rb") as file:
            lines = TextLines(file, Position())
            fields, error = self._record(lines)
            while fields == [""]:
                fields, error = self._record(lines)
            if fields is None or error:
                raise CommandError(f"{argument} {self.path}: the header line cannot be read: {error}")
        doubled = sorted({name for name in fields if fields.count(name) > 1})
        if doubled:
            raise CommandError(f"{argument} {self.path}: columns that occur twice in the header: {doubled}")
        self.columns = fields
        self.body = lines.here()

    def rows(self, start: Position | None = None) -> Iterator[Row]:
        assert self.columns is not None
        width = len(self.columns)
        with open(self.path, "rb") as file:
            begin = start if start is not None and start.offset else self.body
            file.seek(begin.offset)
            lines = TextLines(file, begin)
            blank: list[Row] = []
            while True:
                line = lines.position.line + 1
                fields, error = self._record(lines)
                if fields is None:
                    return
                end = lines.here()
                if not error and fields == [""]:
                    # Only where a row is one field can an empty line be a row; at the end of the file it is none.
                    if width == 1:
                        blank.append(Row(line, {self.columns[0]: ""}, end))
                    continue
                yield from blank
                blank.clear()
                if not error and len(fields) != width:
                    error = f"{len(fields)} fields where the header has {width}"
                yield Row(line, {} if error else dict(zip(self.columns, fields, strict=True)), end, error)

    def _record(self, lines: TextLines) -> tuple[list[str] | None, str | None]:
        """Fields of the next record and what is wrong with it; (None, None) at the end of the file."""
        raw = lines.next()
        if not raw:
            return None, None
        text, error = decode(raw)
        if error or '"' not in text:
            return text.split(self.delimiter), error
        taken: list[bytes] = []
        while True:
            try:
                return next(csv.reader([text], delimiter=self.delimiter, strict=True)), None
            except csv.Error as problem:
                if self.delimiter == "\t":
                    return text.split("\t"), None
                if "unexpected end of data" not in str(problem):
                    lines.push_back(taken)
                    return [], f"malformed quoting ({problem})"
            while True:
                more = lines.next()
                if not more or len(taken) >= MAX_RECORD_LINES:
                    lines.push_back(taken + ([more] if more else []))
                    return [], "a quote is opened and never closed"
                taken.append(more)
                addition, error = decode(more)
                text += "\n" + addition
                if error:
                    lines.push_back(taken)
                    return [], "a quote is opened and not closed before a line of " + error
                if '"' in addition:
                    break


@dataclass
class JsonLinesFile(RowFile):
    """One JSON object a line. ``-`` reads standard input."""

    def rows(self, start: Position | None = None) -> Iterator[Row]:
        begin = start or Position()
        if str(self.path) == "-":
            file = sys.stdin.buffer
            left = begin.offset
            while left and (done := file.read(min(left, 1 << 20))):
                left -= len(done)
            if left:
                raise CommandError(
                    f"--input -: standard input ends {left} bytes before the place to go on from; a resumed run needs "
                    "all of it again"
                )
            yield from self._read(file, begin)
            return
        with open(self.path, "rb") as file:
            file.seek(begin.offset)
            yield from self._read(file, begin)

    def _read(self, file: BinaryIO, begin: Position) -> Iterator[Row]:
        lines = TextLines(file, begin)
        while raw := lines.next():
            text, error = decode(raw)
            if not text.strip():
                continue
            values: Any = {}
            if error is None:
                try:
                    values = json.loads(text)
                except (ValueError, RecursionError) as problem:
                    error = f"broken JSON ({first_line(problem)})"
                else:
                    if not isinstance(values, dict):
                        error = f"a JSON {type(values).__name__} where an object is wanted"
            yield Row(lines.position.line, {} if error else values, lines.here(), error)


@dataclass
class _ArrowRows(RowFile):
    """Parquet or a dataset folder: record batches turned into rows."""

    open_batches: Any = None  # callable(first row) -> iterator of (index of first row, pa.RecordBatch)

    def rows(self, start: Position | None = None) -> Iterator[Row]:
        first = start.offset if start else 0
        try:
            for index, batch in self.open_batches(first):
                for number, values in enumerate(batch.to_pylist(), start=index + 1):
                    for column, names in self.label_names.items():
                        values[column] = _name_of(values[column], names)
                    yield Row(number, values, Position(number, number))
        except (OSError, ValueError) as error:
            raise CommandError(f"{self.path}: cannot be read: {first_line(error)}") from error


def _name_of(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_name_of(item, names) for item in value]
    if value is None or not 0 <= value < len(names):
        return None
    return names[value]


def _open_parquet(path: Path, argument: str) -> RowFile:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema, size = file.schema_arrow, file.metadata.num_rows
    except (OSError, pa.ArrowException) as error:
        raise CommandError(f"{argument} {path}: not a readable Parquet file: {first_line(error)}") from error
    if size == 0:
        raise CommandError(f"{argument} {path}: the file has no rows")
    if doubled := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise CommandError(f"{argument} {path}: columns that occur twice: {doubled}")

    def batches(first: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        with pq.ParquetFile(path) as file:
            index = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if index + count <= first:
                    index += count
                    continue
                for batch in file.iter_batches(batch_size=1024, row_groups=[group]):
                    skip = min(max(first - index, 0), batch.num_rows)
                    if skip < batch.num_rows:
                        yield index + skip, batch.slice(skip)
                    index += batch.num_rows

    return _ArrowRows(path, schema.names, size, "rows", schema, open_batches=batches)


def splits_of(path: str | os.PathLike[str]) -> list[str]:
    """Names of the splits of a folder written by ``DatasetDict.save_to_disk``; empty for anything else."""
    try:
        return list(json.loads((Path(path) / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
    except (OSError, ValueError, KeyError):
        return []


def _open_folder(path: Path, argument: str, split: str | None) -> RowFile:
    names = splits_of(path)
    if names:
        split = split or ("train" if "train" in names else names[0])
        if split not in names:
            raise CommandError(f"{argument} {path}: the saved dataset has no split {split!r}, but {names}")
        path = path / split
    if not (path / "dataset_info.json").is_file():
        raise CommandError(f"{argument} {path}: not a dataset folder (written by datasets' save_to_disk)")
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise CommandError(f"{argument} {path}: cannot be read as a dataset folder: {first_line(error)}") from error
    if len(data) == 0:
        raise CommandError(f"{argument} {path}: the dataset has no rows")

    def batches(first: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        arrow = data.with_format("arrow")
        for index in range(first, len(data), 1024):
            for batch in arrow[index : index + 1024].to_batches():
                yield index, batch
                index += batch.num_rows

    label_names = {}
    for name, feature in data.features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, datasets.ClassLabel):
            label_names[name] = list(inner.names)
    # The numbers of such columns become names on reading, so the stored types no longer hold.
    schema = None if label_names else data.features.arrow_schema
    return _ArrowRows(path, data.column_names, len(data), "rows", schema, label_names, open_batches=batches)
