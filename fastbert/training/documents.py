"""Documents out of text files (plain, gzip, zstd), JSONL, Parquet, CSV and saved dataset folders, as a stream.

A text file has a paragraph a line and a blank line between documents; in the other formats a row is a document. Nothing
but the document at hand is held in memory.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from .data import BadRowError, TextColumns, choose_text_columns
from .errors import CommandError, first_line
from .rows import FORMATS, JsonLinesFile, Position, Row, RowFile, TextLines, decode, open_rows

COMPRESSION = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # by a file's first bytes
_COMPRESSED_ENDINGS = (".gz", ".zst", ".zstd")
SHOWN = 10  # bad lines printed in full


@dataclass(slots=True)
class Document:
    """The paragraphs of a document, none of them empty."""

    paragraphs: list[str]

    @property
    def size(self) -> int:
        """Its length in characters."""
        return sum(map(len, self.paragraphs))


@dataclass
class Source:
    """One input file or dataset folder."""

    path: Path
    size: int  # bytes on disk

    def documents(self, reader: DocumentReader) -> Iterator[Document]:
        """Yield the documents in order. Raises CommandError for what cannot be read."""
        raise NotImplementedError


@dataclass
class DocumentReader:
    """Reads sources one after the other.

    ``on_bad_row`` is ``error`` or ``skip``; ``done`` is how many bytes of the input have been read, for a progress bar.
    """

    sources: Sequence[Source]
    on_bad_row: str = "error"
    done: int = 0
    bad: int = 0

    def documents(self) -> Iterator[Document]:
        """Yield the documents of all sources in order. Raises CommandError for what cannot be read."""
        read = 0
        for source in self.sources:
            for document in source.documents(self):
                self.done = min(read + self.done_here, read + source.size)
                if document.paragraphs:
                    yield document
            read += source.size
            self.done = read
        if self.bad:
            print(f"--input: {self.bad} bad line{'s' if self.bad > 1 else ''} left out", file=sys.stderr)

    done_here: int = field(default=0, init=False)  # the same of the source at hand

    def reject(self, path: Path, line: int, problem: str) -> None:
        """A line or row that cannot be used. Raises CommandError unless bad ones are skipped."""
        if self.on_bad_row == "error":
            raise CommandError(
                f"--input {path}, line {line}: {problem}; mend it, or leave such lines out with --on_bad_row skip"
            )
        self.bad += 1
        if self.bad <= SHOWN:
            print(f"{path}:{line}: {problem}", file=sys.stderr)


def compression_of(head: bytes) -> str | None:
    """``gzip``, ``zstd`` or None by the first bytes of a file."""
    return next((name for magic, name in COMPRESSION.items() if head.startswith(magic)), None)


def _opened(file: BinaryIO) -> BinaryIO:
    """The content of a file, decompressed if it is compressed."""
    kind = compression_of(file.read(4))
    file.seek(0)
    if kind is None:
        return file
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(file, kind), 1 << 20)


class _TextFile(Source):
    """A paragraph a line, a blank line between documents."""

    def documents(self, reader: DocumentReader) -> Iterator[Document]:
        paragraphs: list[str] = []
        line = 0
        try:
            with open(self.path, "rb") as file:
                lines = TextLines(_opened(file), Position())
                while raw := lines.next():
                    line = lines.position.line
                    text, error = decode(raw)
                    if error is None and "\0" in text:
                        error = "a zero byte: not UTF-8 text"
                    if error is not None:
                        reader.reject(self.path, line, error)
                        continue
                    if text := text.strip():
                        paragraphs.append(text)
                    elif paragraphs:
                        reader.done_here = file.tell()
                        yield Document(paragraphs)
                        paragraphs = []
        except OSError as error:
            where = f" behind line {line}" if line else ""
            raise CommandError(f"--input {self.path}: cannot be read{where}: {first_line(error)}") from error
        yield Document(paragraphs)


@dataclass
class _RowSource(Source):
    """A row is a document; line breaks in its text separate paragraphs."""

    rows: RowFile
    text: TextColumns

    def documents(self, reader: DocumentReader) -> Iterator[Document]:
        for row in self._rows():
            try:
                if row.error:
                    raise BadRowError(row.error)
                text, _ = self.text.of(row.values)
            except BadRowError as problem:
                reader.reject(self.path, row.line, str(problem))
                continue
            reader.done_here = int(row.end.offset / max(1, self.rows.size) * self.size)
            yield Document([part for line in text.splitlines() if (part := line.strip())])

    def _rows(self) -> Iterator[Row]:
        try:
            yield from self.rows.rows()
        except OSError as error:
            raise CommandError(f"--input {self.path}: cannot be read: {first_line(error)}") from error


class _CompressedJsonLines(JsonLinesFile):
    """One JSON object a line, compressed."""

    def rows(self, start: Position | None = None) -> Iterator[Row]:
        with open(self.path, "rb") as file:
            yield from self._read(_opened(file), Position())


def open_sources(paths: Sequence[str], text_column_name: Sequence[str] | None = None) -> list[Source]:
    """The files that ``--input`` names, in order; a folder stands for the files below it, sorted by name.

    Raises CommandError for what is missing, empty or unreadable, before anything of it is used.
    """
    found: list[Source] = []
    for name in paths:
        path = Path(name)
        if not path.exists():
            raise CommandError(f"--input {name}: no such file or folder")
        if path.is_dir() and not _is_dataset(path):
            inside = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
            if not inside:
                raise CommandError(f"--input {name}: the folder holds no files")
            found += [_open(p, text_column_name) for p in inside]
        else:
            found.append(_open(path, text_column_name))
    return found


def _is_dataset(path: Path) -> bool:
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def _open(path: Path, text_column_name: Sequence[str] | None) -> Source:
    if path.is_dir():
        size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
        return _row_source(path, size, open_rows(path, "--input"), text_column_name)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(4)
            first = _opened_head(file)
    except OSError as error:
        raise CommandError(f"--input {path}: cannot be read: {first_line(error)}") from error
    if not first.strip():
        raise CommandError(f"--input {path}: the file is empty")
    if not _is_rows(path):
        return _TextFile(path, size)
    if compression_of(head) is None:
        return _row_source(path, size, open_rows(path, "--input"), text_column_name)
    if FORMATS[_bare(path).suffix.lower()] != "jsonl":
        raise CommandError(f"--input {path}: only text and JSONL may be compressed")
    return _row_source(path, size, _CompressedJsonLines(path), text_column_name)


def _opened_head(file: BinaryIO) -> bytes:
    file.seek(0)
    return _opened(file).read(4096)


def _bare(path: Path) -> Path:
    """The path without the ending of its compression."""
    return path.with_suffix("") if path.suffix.lower() in _COMPRESSED_ENDINGS else path


def _is_rows(path: Path) -> bool:
    return _bare(path).suffix.lower() in FORMATS


def _row_source(path: Path, size: int, rows: RowFile, text_column_name: Sequence[str] | None) -> Source:
    return _RowSource(path, size, rows, choose_text_columns(rows, text_column_name, "\n", None))


def input_names(sources: Sequence[Source]) -> list[dict[str, str | int]]:
    """Name and size of each source: what a resumed run must find again."""
    return [{"name": os.path.basename(source.path), "bytes": source.size} for source in sources]
