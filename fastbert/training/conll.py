"""CoNLL files: a token a line with its tags beside it, a blank line between sentences.

That of the CoNLL-2003 shared task (Tjong Kim Sang and De Meulder 2003). A sentence is one row. Its first column is
``tokens``, the last one ``tags``, and those between ``column_2`` and so on. Columns are separated by tabs, or by spaces
in a line without a tab. ``-DOCSTART-`` lines part documents and are no sentences.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CommandError
from .rows import Position, Row, RowFile, TextLines, decode

TOKENS, TAGS = "tokens", "tags"
DOCUMENT_START = "-DOCSTART-"
_SPACES = re.compile(r"[ \t]+")


def cells(line: str) -> list[str]:
    """The columns of a line."""
    return line.split("\t") if "\t" in line else _SPACES.split(line.strip(" "))


@dataclass
class ConllFile(RowFile):
    """A CoNLL file, sentence by sentence; a row's line is that of its first token."""

    def read_columns(self, argument: str) -> None:
        """Find the columns by the first token. Raises CommandError if there is none."""
        self.columns = [TOKENS]
        with open(self.path, "rb") as file:
            lines = TextLines(file, Position())
            while raw := lines.next():
                text, error = decode(raw)
                if error is None and text.strip(" \t") and not text.startswith(DOCUMENT_START):
                    width = len(cells(text))
                    middle = [f"column_{i}" for i in range(2, width)]
                    self.columns = [TOKENS, *middle, TAGS][: max(width, 1)]
                    return
        raise CommandError(f"{argument} {self.path}: no sentence in the file")

    def rows(self, start: Position | None = None) -> Iterator[Row]:
        begin = start or Position()
        with open(self.path, "rb") as file:
            file.seek(begin.offset)
            lines = TextLines(file, begin)
            sentence: list[list[str]] = []
            first, error = 0, None
            while True:
                raw = lines.next()
                text, problem = decode(raw)
                blank = problem is None and (not text.strip(" \t") or text.startswith(DOCUMENT_START))
                if sentence and (blank or not raw):
                    yield Row(first, {} if error else self._values(sentence), lines.here(), error)
                    sentence, error = [], None
                if not raw:
                    return
                if blank:
                    continue
                if not sentence:
                    first = lines.position.line
                sentence.append(cells(text))
                error = error or problem or self._problem(sentence[-1], lines.position.line)

    def _problem(self, found: list[str], line: int) -> str | None:
        assert self.columns is not None
        if len(found) != len(self.columns):
            return f"{len(found)} columns in line {line} where the file has {len(self.columns)}"
        if "" in found:
            return f"an empty column in line {line}"
        return None

    def _values(self, sentence: list[list[str]]) -> dict[str, Any]:
        assert self.columns is not None
        return {name: list(column) for name, column in zip(self.columns, zip(*sentence, strict=True), strict=True)}


def open_conll(path: Path, argument: str, size: int) -> ConllFile:
    """Open a CoNLL file. Raises CommandError if it has no sentence."""
    found = ConllFile(path, size=size)
    found.read_columns(argument)
    return found
