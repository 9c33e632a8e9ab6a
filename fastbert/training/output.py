"""Files of predictions: written to a part file, journalled window by window, renamed when complete."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any

from .errors import CommandError
from .report import write_json
from .rows import Position, format_of

if TYPE_CHECKING:
    import pyarrow as pa

Line = tuple[dict[str, Any], list[Any] | None, str | None]  # original values, prediction, error

_LINE_BREAK = re.compile(r"[\n\r]")


def output_format(path: str) -> str:
    """``csv``, ``tsv``, ``jsonl``, ``parquet`` or ``conll``; standard output and devices take JSONL."""
    if path == "-" or _is_device(Path(path)):
        return "jsonl"
    return format_of(path, "--output")


def _is_device(path: Path) -> bool:
    return path.exists() and not stat.S_ISREG(path.stat().st_mode) and not path.is_dir()


def open_output(path: str, own: list[str], added: list[str], schema: pa.Schema | None, label_delimiter: str) -> Output:
    """The output for a path.

    ``own`` are the input's columns (ignored by JSONL, where each row brings its keys), ``added`` the new ones, of
    which the last is for the error. ``schema`` has the types of the input's columns, where they are known. Raises
    CommandError.
    """
    kind = output_format(path)
    if path != "-" and Path(path).is_dir():
        raise CommandError(f"--output {path}: a folder; a file is wanted")
    if path != "-" and not Path(path).absolute().parent.is_dir():
        raise CommandError(f"--output {path}: the folder {Path(path).absolute().parent} does not exist")
    if path == "-" or _is_device(Path(path)):
        return StreamOutput(Path(path), own, added, schema, label_delimiter, kind)
    if kind == "parquet":
        return ParquetOutput(Path(path), own, added, schema, label_delimiter, kind)
    if kind == "conll":
        if not added[0].endswith("predicted_tags"):
            raise CommandError(
                f"--output {path}: .conll is for models that tag words; allowed are .csv, .tsv, .jsonl, .parquet"
            )
        return ConllOutput(Path(path), own, added, schema, label_delimiter, kind)
    if kind == "tsv" and (broken := [name for name in own + added if _LINE_BREAK.search(name)]):
        raise CommandError(
            f"--output {path}: the column {broken[0]!r} has a line break in its name, which .tsv cannot hold; allowed "
            "are .csv, .jsonl, .parquet"
        )
    return TextOutput(Path(path), own, added, schema, label_delimiter, kind)


class Output:
    """An output file under way: :meth:`begin`, :meth:`open`, :meth:`write` window by window, :meth:`finish`."""

    def __init__(
        self, path: Path, own: list[str], added: list[str], schema: pa.Schema | None, label_delimiter: str, kind: str
    ) -> None:
        self.path = path
        self.own = own
        self.added = added
        self.schema = schema
        self.label_delimiter = label_delimiter
        self.kind = kind
        self.part = path.with_name(path.name + ".part")
        self.journal = path.with_name(path.name + ".part.json")
        self.rows = 0
        self.bad_rows = 0
        self.windows = 0
        self.bytes = 0
        self.fingerprint: dict[str, Any] = {}
        self.overwrite = False
        self._resumed = False

    def begin(self, fingerprint: dict[str, Any], *, resume: bool, overwrite: bool) -> Position | None:
        """Where in the input to start; None if the output is complete. Raises CommandError rather than overwrite.

        Writes nothing yet: :meth:`open` does.
        """
        self.fingerprint = {**fingerprint, "--output": self.kind}
        self.overwrite = overwrite
        state = self._read_journal()
        if resume and state is not None:
            self._resumed = True
            return self._resume(state)
        if not overwrite:
            if self.path.exists():
                # A finished run leaves no journal: nothing tells its output from any other file.
                unknown = " and no unfinished run is there to go on with" if resume else ""
                raise CommandError(f"--output {self.path}: exists already{unknown}; replace it with --overwrite")
            if state is not None and state["rows"]:
                raise CommandError(
                    f"--output {self.path}: an unfinished run is there ({state['rows']} rows are complete); "
                    "go on with --resume, or start anew with --overwrite"
                )
        return Position()

    def open(self) -> None:
        """Make the part file, or cut it back to its complete windows. Raises CommandError."""
        try:
            if self._resumed:
                self._open(fresh=False)
                return
            self.discard()
            self._open(fresh=True)
            self._write_journal(Position())
        except OSError as error:
            raise CommandError(f"--output {self.path}: cannot be written: {error.strerror or error}") from error

    def _resume(self, state: dict[str, Any]) -> Position | None:
        for key, value in self.fingerprint.items():
            if state["fingerprint"].get(key) != value:
                raise CommandError(
                    f"--resume: the unfinished run had another {key} ({state['fingerprint'].get(key)}, now {value}); "
                    "use the same, or start anew with --overwrite"
                )
        self.overwrite |= state.get("overwrite", False)
        published = state["complete"] and not self.part.exists()
        if self.path.exists() and not published and not self.overwrite:
            raise CommandError(
                f"--resume: {self.path} is a file that the unfinished run has not written; replace it with --overwrite "
                "too"
            )
        self.rows, self.bad_rows, self.windows, self.bytes = (
            state[key] for key in ("rows", "bad_rows", "windows", "bytes")
        )
        if state["complete"]:
            self._publish()
            return None
        print(f"{self.path}: {self.rows} rows are complete, going on", file=sys.stderr)
        return Position(state["offset"], state["line"])

    def problem(self, values: dict[str, Any], prediction: list[Any] | None) -> str | None:
        """Why a row cannot stand in a file of this kind, or None."""
        return None

    def write(self, lines: list[Line], end: Position, bad: int) -> None:
        """Append a window of rows and make it durable. ``end`` is where the window ends in the input."""
        self._append(lines)
        self.rows += len(lines)
        self.bad_rows += bad
        self.windows += 1
        self._write_journal(end)

    def finish(self) -> None:
        """Give the complete file its name."""
        self.close()
        self._write_journal(Position(), complete=True)
        self._publish()

    def discard(self) -> None:
        """Remove what an unfinished run left."""
        self.close()
        for path in (self.journal, self.part, self.journal.with_name(self.journal.name + ".part")):
            path.unlink(missing_ok=True)

    def describe(self) -> str:
        """What has become of the rows so far, for messages about an interruption."""
        rows = (self._read_journal() or {"rows": 0})["rows"]
        return f"{rows} rows are complete in {self.part}; go on with the same command and --resume"

    def close(self) -> None:
        """Close the part file."""

    def _open(self, fresh: bool) -> None:
        raise NotImplementedError

    def _append(self, lines: list[Line]) -> None:
        raise NotImplementedError

    def _publish(self) -> None:
        if self.part.exists():
            os.replace(self.part, self.path)
        self.journal.unlink(missing_ok=True)

    def _read_journal(self) -> dict[str, Any] | None:
        try:
            state = json.loads(self.journal.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return state if isinstance(state, dict) and "complete" in state else None

    def _write_journal(self, end: Position, complete: bool = False) -> None:
        write_json(
            self.journal,
            {
                "complete": complete,
                "rows": self.rows,
                "bad_rows": self.bad_rows,
                "windows": self.windows,
                "bytes": self.bytes,
                "offset": end.offset,
                "line": end.line,
                "overwrite": self.overwrite,
                "fingerprint": self.fingerprint,
            },
        )


class TextOutput(Output):
    """CSV, TSV or JSONL."""

    file: IO[bytes] | None = None  # unbuffered: what fails to be written fails at once, not when it is closed

    def _open(self, fresh: bool) -> None:
        if fresh:
            self.file = open(self.part, "wb", buffering=0)  # noqa: SIM115 - stays open over many windows
            if self.kind in ("csv", "tsv"):
                self._put(self._table([self.own + self.added]))
            return
        self.file = open(self.part, "r+b", buffering=0)  # noqa: SIM115
        if self.file.seek(0, os.SEEK_END) < self.bytes:
            raise CommandError(f"--resume: {self.part} is shorter than its journal says; start anew with --overwrite")
        # Behind the last complete window there may be a part of the next one.
        self.file.truncate(self.bytes)
        self.file.seek(self.bytes)

    def _append(self, lines: list[Line]) -> None:
        self._put(self.text(lines))

    def _put(self, text: str) -> None:
        assert self.file is not None
        # A lone surrogate (from a JSON escape) has no UTF-8; as \udxxx it is the same JSON again.
        data = text.encode("utf-8", errors="backslashreplace")
        _write_all(self.file, data)
        os.fsync(self.file.fileno())
        self.bytes += len(data)

    def problem(self, values: dict[str, Any], prediction: list[Any] | None) -> str | None:
        if self.kind != "tsv":
            return None
        # A TSV record is one line, also where it is quoted.
        for name, cell in zip(self.own + self.added, self._cells((values, prediction, None)), strict=True):
            if isinstance(cell, str) and _LINE_BREAK.search(cell):
                return f"{name!r} has a line break, which .tsv cannot hold; write .csv, .jsonl or .parquet"
        return None

    def text(self, lines: list[Line]) -> str:
        """The lines of a window as they stand in the file."""
        if self.kind != "jsonl":
            return self._table([self._cells(line) for line in lines])
        found = []
        for values, prediction, error in lines:
            record = values | dict(zip(self.added, prediction or [None] * (len(self.added) - 1), strict=False))
            if error is not None:
                record[self.added[-1]] = error
            found.append(json.dumps(record, ensure_ascii=False, default=str))
        return "\n".join(found) + "\n"

    def _cells(self, line: Line) -> list[Any]:
        values, prediction, error = line
        predicted = prediction or [None] * (len(self.added) - 1)
        return [
            *(_cell(values.get(name), None) for name in self.own),
            *(_cell(value, self.label_delimiter) for value in predicted),
            error or "",
        ]

    def _table(self, rows: list[list[Any]]) -> str:
        lines: list[str] = []
        delimiter = "\t" if self.kind == "tsv" else ","
        # Only with \r in the line's end does every version of Python quote a cell that has one.
        csv.writer(SimpleNamespace(write=lines.append), delimiter=delimiter, lineterminator="\r\n").writerows(rows)
        return "".join(f"{line[:-2]}\n" for line in lines)

    def close(self) -> None:
        if self.file is not None:
            file, self.file = self.file, None
            file.close()


def _write_all(file: IO[bytes], data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _cell(value: Any, delimiter: str | None) -> Any:
    if value is None:
        return ""
    if isinstance(value, list) and delimiter is not None:
        return delimiter.join("" if item is None else str(item) for item in value)
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return value


class ConllOutput(TextOutput):
    """CoNLL: a word a line with the input's columns and the predicted tag, a blank line behind each sentence.

    A sentence that could not be tagged keeps its place as one line, ``-ERROR-`` and what was wrong.
    """

    def text(self, lines: list[Line]) -> str:
        return "".join(f"{self._sentence(line)}\n\n" for line in lines)

    def _sentence(self, line: Line) -> str:
        values, prediction, error = line
        if prediction is None:
            return f"-ERROR-\t{(error or '').replace(chr(9), ' ').replace(chr(10), ' ')}"
        columns = self._columns(values, prediction)
        return "\n".join("\t".join(cells) for cells in zip(*columns.values(), strict=True))

    def _columns(self, values: dict[str, Any], prediction: list[Any]) -> dict[str, list[str]]:
        """The columns with a cell for every word, and the tags."""
        tags: list[str] = prediction[0]
        columns = {}
        for name in self.own:
            value = values.get(name)
            cells = value.split() if isinstance(value, str) else value
            if isinstance(cells, list) and len(cells) == len(tags):
                columns[name] = [str(cell) for cell in cells]
        return columns | {self.added[0]: tags}

    def problem(self, values: dict[str, Any], prediction: list[Any] | None) -> str | None:
        for name, cells in self._columns(values, prediction).items() if prediction else ():
            for cell in cells:
                if not cell or "\t" in cell or _LINE_BREAK.search(cell):
                    return f"{name!r} has the word {cell!r}, which .conll cannot hold; write .jsonl or .parquet"
        return None


class StreamOutput(TextOutput):
    """Standard output or a device: JSONL, without a part file or a journal."""

    def begin(self, fingerprint: dict[str, Any], *, resume: bool, overwrite: bool) -> Position | None:
        if resume:
            raise CommandError(f"--resume: {self.path} cannot be resumed; give --output a file")
        self.file = sys.stdout.buffer if str(self.path) == "-" else open(self.path, "wb", buffering=0)  # noqa: SIM115
        return Position()

    def open(self) -> None:
        pass

    def _put(self, text: str) -> None:
        assert self.file is not None
        _write_all(self.file, text.encode("utf-8", errors="backslashreplace"))
        self.file.flush()

    def _write_journal(self, end: Position, complete: bool = False) -> None:
        pass

    def _publish(self) -> None:
        pass

    def discard(self) -> None:
        self.close()

    def close(self) -> None:
        if str(self.path) != "-":
            super().close()

    def describe(self) -> str:
        return f"{self.rows} rows were written"


class ParquetOutput(Output):
    """Parquet: one small file a window, merged in the end into one file with a row group for each."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.parts = self.path.with_name(self.path.name + ".part.d")

    def _open(self, fresh: bool) -> None:
        self.parts.mkdir(exist_ok=not fresh)

    def _append(self, lines: list[Line]) -> None:
        import pyarrow as pa

        own = list(self.own) or list(dict.fromkeys(name for values, _, _ in lines for name in values))
        columns: dict[str, pa.Array] = {}
        for name in own:
            kind = self.schema.field(name).type if self.schema is not None else None
            columns[name] = _array([values.get(name) for values, _, _ in lines], kind)
        for index, name in enumerate(self.added[:-1]):
            columns[name] = _array([prediction[index] if prediction else None for _, prediction, _ in lines], None)
        columns[self.added[-1]] = pa.array([error for _, _, error in lines], type=pa.string())
        self._write(pa.table(columns), self.parts / f"{self.windows:08d}.parquet")

    def _write(self, table: pa.Table, path: Path) -> None:
        import pyarrow.parquet as pq

        with open(path, "wb") as file:
            pq.write_table(table, file)
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Merge the parts, then give the file its name."""
        self._merge()
        super().finish()

    def _merge(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        paths = [self.parts / f"{index:08d}.parquet" for index in range(self.windows)]
        schema = _unified([pq.read_schema(path) for path in paths], self.added)
        with open(self.part, "wb") as file, pq.ParquetWriter(file, schema) as writer:
            for path in paths:
                table = pq.read_table(path, partitioning=None)
                columns = [
                    _cast(table.column(field.name), field.type)
                    if field.name in table.column_names
                    else pa.nulls(len(table), field.type)
                    for field in schema
                ]
                writer.write_table(pa.table(columns, schema=schema))

    def _publish(self) -> None:
        super()._publish()
        shutil.rmtree(self.parts, ignore_errors=True)

    def discard(self) -> None:
        super().discard()
        shutil.rmtree(self.parts, ignore_errors=True)


def _array(values: list[Any], kind: pa.DataType | None) -> pa.Array:
    """An Arrow array; values of mixed kinds become text."""
    import pyarrow as pa

    try:
        return pa.array(values, type=kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return pa.array([None if value is None else _as_text(value) for value in values], type=pa.string())


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value.encode("utf-8", errors="backslashreplace").decode("utf-8")
    return json.dumps(value, ensure_ascii=False, default=str)


def _unified(schemas: list[pa.Schema], last: list[str]) -> pa.Schema:
    """One schema for all windows: the wider type of each column, text where the types do not go together."""
    import pyarrow as pa

    fields: dict[str, pa.Field] = {}
    for schema in schemas:
        for field in schema:
            if field.name in fields:
                try:
                    merged = pa.unify_schemas(
                        [pa.schema([fields[field.name]]), pa.schema([field])], promote_options="permissive"
                    )
                    fields[field.name] = merged.field(0)
                except pa.ArrowException:
                    fields[field.name] = pa.field(field.name, pa.string())
            else:
                fields[field.name] = field
    ordered = [name for name in fields if name not in last] + last
    return pa.schema([fields[name].remove_metadata() for name in ordered])


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    import pyarrow as pa

    try:
        return column.cast(kind)
    except pa.ArrowException:
        return pa.chunked_array([_array([None if v is None else _as_text(v) for v in column.to_pylist()], pa.string())])
