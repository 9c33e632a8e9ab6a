"""SQuAD's JSON: articles of paragraphs, each with a context and its questions (Rajpurkar et al. 2016, 2018).

A question is one row with ``id``, ``title``, ``context``, ``question`` and ``answers`` (a list of objects with ``text``
and ``answer_start``). The flat form, a list of such rows under ``data``, is read too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import CommandError
from .rows import Position, Row, RowFile

COLUMNS = ["id", "title", "context", "question", "answers"]


@dataclass
class SquadFile(RowFile):
    """A SQuAD file, question by question; a row's line is the question's number."""

    articles: list[Any] = field(default_factory=list)

    def rows(self, start: Position | None = None) -> Iterator[Row]:
        first = start.offset if start else 0
        for number, (values, error) in enumerate(self._questions(), start=1):
            if number > first:
                yield Row(number, values, Position(number, number), error)

    def _questions(self) -> Iterator[tuple[dict[str, Any], str | None]]:
        for number, article in enumerate(self.articles, start=1):
            if not isinstance(article, dict):
                yield {}, f"entry {number} of 'data' is no object but a {type(article).__name__}"
            elif "paragraphs" not in article:
                yield article, None
            else:
                yield from self._of_article(article, number)

    def _of_article(self, article: dict[str, Any], number: int) -> Iterator[tuple[dict[str, Any], str | None]]:
        for place, paragraph in enumerate(_objects(article["paragraphs"]), start=1):
            where = f"paragraph {place} of article {number}"
            if paragraph is None or "context" not in paragraph or not isinstance(paragraph.get("qas"), list):
                yield {}, f"{where} is no object with 'context' and 'qas'"
                continue
            for question in _objects(paragraph["qas"]):
                if question is None:
                    yield {}, f"a question of {where} is no object"
                    continue
                impossible = question.get("is_impossible", False)
                yield (
                    {
                        "id": question.get("id"),
                        "title": article.get("title"),
                        "context": paragraph["context"],
                        "question": question.get("question"),
                        "answers": [] if impossible else question.get("answers", []),
                    },
                    None,
                )


def _objects(values: Any) -> list[dict[str, Any] | None]:
    """The objects of a list, None for what is none."""
    return [value if isinstance(value, dict) else None for value in values] if isinstance(values, list) else [None]


def _of_lines(path: Path) -> bool:
    """Whether a file is one of JSON lines, which need not fit into memory. Raises ValueError if it is not UTF-8."""
    with open(path, encoding="utf-8-sig") as file:
        lines = (line for line in file if not line.isspace())
        first = next(lines, "")
        if next(lines, None) is None:
            return False
    try:
        return isinstance(json.loads(first), dict)
    except ValueError:
        return False


def open_squad(path: Path, argument: str) -> SquadFile | None:
    """Open a file in SQuAD's form; None if it has another. Raises CommandError for one without a question."""
    try:
        if _of_lines(path):
            return None
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        return None
    found = SquadFile(path, list(COLUMNS), unit="rows", articles=content["data"])
    first = next(found._questions(), None)
    if first is None:
        raise CommandError(f"{argument} {path}: no question under 'data'")
    if not any("paragraphs" in article for article in content["data"] if isinstance(article, dict)):
        found.columns = list(dict.fromkeys(name for row in found.rows() for name in row.values))
    found.size = sum(1 for _ in found._questions())
    return found
