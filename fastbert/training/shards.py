"""One shard of prepared data: a run of documents, tokenised, made into sequences, and written as an Arrow file.

A shard depends on its documents, the settings and its number alone, so that any process may build it. What worker
processes import is here, and is little.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastbert.files import replacing

from .report import write_json
from .sentences import split_sentences
from .sequences import (
    IS_NEXT,
    PAIR_SPECIAL,
    SINGLE_SPECIAL,
    Counts,
    Draw,
    Pair,
    Sentence,
    cut_sentences,
    full_sentences,
    pairs,
)

if TYPE_CHECKING:
    import pyarrow as pa

PAIRS, FULL_SENTENCES = "pairs", "full_sentences"
SPLIT, LINES = "split", "lines"
ROWS_PER_BATCH = 1000  # of a record batch in the file, as datasets writes them
PROGRESS = "progress"  # folder with the counts of finished shards, gone in the end


@dataclass(frozen=True)
class Recipe:
    """How documents become sequences."""

    tokenizer: str  # as JSON, for tokenizers.Tokenizer.from_str
    cls: int
    sep: int
    format: str  # PAIRS or FULL_SENTENCES
    max_length: int
    sentences: str  # SPLIT or LINES
    duplicates: int
    seed: int


@dataclass(frozen=True)
class Job:
    """Paragraphs by document, and the number of the shard."""

    number: int
    documents: list[list[str]]
    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / data_name(self.number)

    @property
    def counts(self) -> Path:
        return self.folder / PROGRESS / f"{self.number:05d}.json"

    def digest(self) -> str:
        """A checksum of the text."""
        found = hashlib.blake2b(digest_size=16)
        for document in self.documents:
            found.update("\n".join([*document, "", ""]).encode("utf-8"))
        return found.hexdigest()


def data_name(number: int) -> str:
    """The name of a shard's file."""
    return f"data-{number:05d}.arrow"


def schema(kind: str) -> pa.Schema:
    """The columns of a format."""
    import pyarrow as pa

    columns = [("input_ids", pa.list_(pa.int32())), ("special_tokens_mask", pa.list_(pa.int8()))]
    if kind == PAIRS:
        columns.insert(1, ("token_type_ids", pa.list_(pa.int8())))
        columns.append(("next_sentence_label", pa.int64()))
    return pa.schema(columns)


class Builder:
    """Builds shards by a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        from tokenizers import Tokenizer

        self.recipe = recipe
        self.tokenizer = Tokenizer.from_str(recipe.tokenizer)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # "[MASK]" in a text is text
        special = PAIR_SPECIAL if recipe.format == PAIRS else SINGLE_SPECIAL
        self.room = recipe.max_length - special

    def build(self, job: Job) -> Counts:
        """Write a shard and, when it is complete, its counts. Raises OSError for a disk that is full."""
        documents = [found for document in job.documents if (found := self._encode(document))]
        counts = Counts(documents=len(documents))
        counts.sentences = sum(map(len, documents))
        counts.tokens = sum(len(sentence) for document in documents for sentence in document)
        rows = self._rows(job.number, documents, counts)
        _write_arrow(job.data, rows)
        write_json(job.counts, {"digest": job.digest(), "bytes": job.data.stat().st_size, "counts": asdict(counts)})
        return counts

    def _encode(self, paragraphs: Sequence[str]) -> list[Sentence]:
        sentences = list(paragraphs)
        if self.recipe.sentences == SPLIT:
            sentences = [sentence for paragraph in paragraphs for sentence in split_sentences(paragraph)]
        encoded = self.tokenizer.encode_batch_fast(sentences, add_special_tokens=False)
        return cut_sentences([encoding.ids for encoding in encoded], self.room)

    def _rows(self, number: int, documents: list[list[Sentence]], counts: Counts) -> pa.Table:
        recipe = self.recipe
        columns: dict[str, Any] = {}
        if recipe.format == FULL_SENTENCES:
            ids = [
                [recipe.cls, *tokens, recipe.sep]
                for _ in range(recipe.duplicates)
                for tokens in full_sentences(documents, recipe.max_length, recipe.sep)
            ]
        else:
            made: list[Pair] = []
            for duplicate in range(recipe.duplicates if len(documents) > 1 else 0):
                made += pairs(documents, recipe.max_length, Draw(recipe.seed, number, duplicate))
            counts.unpaired_documents = len(documents) if not made else 0
            counts.next = sum(pair.label == IS_NEXT for pair in made)
            counts.random = len(made) - counts.next
            counts.forced_random = sum(pair.forced for pair in made)
            counts.short = sum(pair.short for pair in made)
            ids = [[recipe.cls, *pair.first, recipe.sep, *pair.second, recipe.sep] for pair in made]
            types = [np.repeat(np.array([0, 1], np.int8), (len(p.first) + 2, len(p.second) + 1)) for p in made]
            columns["token_type_ids"] = np.concatenate([np.zeros(0, np.int8), *types])
            columns["next_sentence_label"] = [pair.label for pair in made]
        lengths = np.array([len(row) for row in ids], np.int64)
        counts.sequences = len(ids)
        counts.lengths = np.bincount(lengths, minlength=recipe.max_length + 1).tolist()
        flat = np.fromiter((token for row in ids for token in row), np.int32, int(lengths.sum()))
        columns["input_ids"] = flat
        special = (flat == recipe.cls) | (flat == recipe.sep)
        columns["special_tokens_mask"] = special.astype(np.int8)
        counts.vocabulary = np.bincount(flat[~special]).tolist()
        return _table(columns, lengths, schema(recipe.format))


def _table(columns: dict[str, Any], lengths: np.ndarray, schema: pa.Schema) -> pa.Table:
    """Columns of lists, given flat with the lengths of the rows, and of single values."""
    import pyarrow as pa

    offsets = pa.array(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))
    arrays = []
    for item in schema:
        values = pa.array(columns[item.name], type=getattr(item.type, "value_type", item.type))
        arrays.append(pa.ListArray.from_arrays(offsets, values) if pa.types.is_list(item.type) else values)
    return pa.table(arrays, schema=schema)


def _write_arrow(path: Path, table: pa.Table) -> None:
    """Write the file next to its place and move it there when it is on the disk."""
    import pyarrow as pa

    with replacing(path) as partial, open(partial, "wb") as file:
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=ROWS_PER_BATCH)
        file.flush()
        os.fsync(file.fileno())


def finished(job: Job) -> Counts | str | None:
    """The counts of a shard that is complete, what is wrong with it if its text was another, or None."""
    try:
        found = json.loads(job.counts.read_text(encoding="utf-8"))
        if job.data.stat().st_size != found["bytes"]:
            return None
    except (OSError, ValueError, KeyError):
        return None
    return Counts(**found["counts"]) if found["digest"] == job.digest() else "other text"


# --- worker processes ------------------------------------------------------------------------------------

_builder: Builder | None = None


def start_worker(recipe: Recipe) -> None:
    """Make this process a worker: it builds by ``recipe``, and ends when the process that started it does."""
    global _builder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is one core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _builder = Builder(recipe)


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def build(job: Job) -> Counts:
    """Build a shard in a worker."""
    assert _builder is not None
    return _builder.build(job)
