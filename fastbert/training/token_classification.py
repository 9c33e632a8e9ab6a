"""A tag for every word: named entities, chunks, parts of speech.

Words are aligned with the tokenizer's pieces by ``word_ids``; the first piece of a word carries its tag. A sentence
that is longer than the model takes is read in overlapping windows, and each word belongs to the one in which it has
most context, so that none is lost and none is counted twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import DataCollatorForTokenClassification

from .data import BadRowError, Split, check_columns, checked_text, known_columns, token_table
from .errors import CommandError
from .labels import Labels, UnknownLabels, label_name, sorted_names
from .runs import say
from .task import Task
from .trainer import IGNORED

if TYPE_CHECKING:
    import torch
    from transformers import EvalPrediction, PreTrainedConfig, PreTrainedTokenizerBase

    from .rows import RowFile

OUTSIDE = "O"
DEFAULT_OVERLAP = 128  # tokens that two windows of a long sentence share
KIND = "token_classification"
ENTITY_METRICS = {"f1": True, "precision": True, "recall": True, "accuracy": True, "loss": False}
TAG_METRICS = {"accuracy": True, "f1_macro": True, "loss": False}

Entity = tuple[str, int, int]  # type, first word, word behind the last


def is_entity_scheme(names: Iterable[str]) -> bool:
    """Whether tags are those of spans: O, or a type behind B-, I-, E- (L-) or S- (U-)."""
    return all(name == OUTSIDE or (name[:1] in "BIELSU" and name[1:2] == "-" and len(name) > 2) for name in names)


def entities(tags: Sequence[str]) -> set[Entity]:
    """The spans that a sentence's tags describe, by the rules of the CoNLL shared tasks' scorer (conlleval).

    A span goes on over an I- or E- tag of its type; any other tag but O begins a new one. So IOB1, IOB2 and IOBES are
    read alike, and a stray I- begins a span.
    """
    found: set[Entity] = set()
    kind, start, ended = "", 0, True
    for place, tag in enumerate([*tags, OUTSIDE]):
        prefix, _, new = tag.partition("-")
        goes_on = not ended and prefix in ("I", "E", "L") and new == kind
        if not goes_on:
            if kind:
                found.add((kind, start, place))
            kind, start = ("", 0) if tag == OUTSIDE else (new, place)
        ended = tag == OUTSIDE or prefix in ("E", "L", "S", "U")
    return found


def score_entities(truth: list[Sequence[str]], guess: list[Sequence[str]]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and support of each entity type, and of all together under "" (micro average)."""
    right: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    given: Counter[str] = Counter()
    for one, other in zip(truth, guess, strict=True):
        true_spans, guessed_spans = entities(one), entities(other)
        for counter, spans in ((right, true_spans & guessed_spans), (wanted, true_spans), (given, guessed_spans)):
            for kind, _, _ in spans:
                counter[kind] += 1
                counter[""] += 1
    scores = {}
    for kind in ["", *sorted((wanted | given).keys() - {""})]:
        precision = right[kind] / given[kind] if given[kind] else 0.0
        recall = right[kind] / wanted[kind] if wanted[kind] else 0.0
        f1 = 2 * precision * recall / (precision + recall) if right[kind] else 0.0
        scores[kind] = {"precision": precision, "recall": recall, "f1-score": f1, "support": wanted[kind]}
    return scores


@dataclass
class Window:
    """A stretch of one sentence, and the words that take their tag from it."""

    row: int
    words: list[int]
    places: list[int]  # of each word's first piece
    pieces: list[int | None] = field(repr=False)  # word of each place, None for special tokens


def word_windows(
    tokenizer: PreTrainedTokenizerBase, sentences: list[list[str]], max_length: int, overlap: int
) -> tuple[dict[str, list[list[int]]], list[Window]]:
    """Token ids (and token types, where the model has them) of every window, and what stands in it.

    ``overlap`` counts the tokens that two windows of a sentence share. A word without a piece (a character that the
    tokenizer drops) is in no window.
    """
    tokenizer.truncation_side = "right"  # nothing is cut: this is the order of the windows
    encoded = tokenizer(
        sentences,
        is_split_into_words=True,
        truncation=True,
        max_length=max_length,
        stride=overlap,
        return_overflowing_tokens=True,
        return_attention_mask=False,
        verbose=False,
    )
    rows = encoded.pop("overflow_to_sample_mapping")
    step = max_length - tokenizer.num_special_tokens_to_add() - overlap
    windows: list[Window] = []
    first_of_row: dict[int, int] = {}
    # Of each word of a row: where its first piece stands in the whole sentence, and its best (context, window, place).
    begins: dict[tuple[int, int], int] = {}
    best: dict[tuple[int, int], tuple[float, int, int]] = {}
    last_of_row = {row: index for index, row in enumerate(rows)}
    for index, row in enumerate(rows):
        pieces = encoded.word_ids(index)
        windows.append(Window(row, [], [], pieces))
        number = index - first_of_row.setdefault(row, index)
        inner = [place for place, word in enumerate(pieces) if word is not None]
        for place in inner:
            key = (row, pieces[place])
            position = number * step + place - inner[0]
            if begins.setdefault(key, position) != position:
                continue  # not the word's first piece
            left = float("inf") if number == 0 else place - inner[0]
            right = float("inf") if index == last_of_row[row] else inner[-1] - place
            if key not in best or min(left, right) > best[key][0]:
                best[key] = (min(left, right), index, place)
    for (_, word), (_, index, place) in sorted(best.items()):
        windows[index].words.append(word)
        windows[index].places.append(place)
    return dict(encoded), windows


def tokenizer_options(config: PreTrainedConfig) -> dict[str, Any]:
    """Byte-level tokenizers take words that are split already only with a space before each."""
    return {"add_prefix_space": True} if config.model_type in ("roberta", "data2vec-text") else {}


def overlap_of(asked: int | None, tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """The overlap of windows. Raises CommandError if ``asked`` (``--doc_stride``) leaves no room for new tokens."""
    room = max_length - tokenizer.num_special_tokens_to_add()
    if room < 2:
        raise CommandError(f"--max_seq_length {max_length}: no room for a word between the special tokens")
    if asked is not None and asked >= room:
        raise CommandError(f"--doc_stride {asked}: must be less than the {room} tokens of a window (--max_seq_length)")
    return asked if asked is not None else min(DEFAULT_OVERLAP, room // 4)


def words_of(values: dict[str, Any], name: str) -> list[str]:
    """The words of a row: a list of texts, or a text that is split at white space. Raises BadRowError."""
    found = listed(values, name)
    for place, word in enumerate(found, start=1):
        if not isinstance(word, str):
            raise BadRowError(f"word {place} of {name!r} is not a text but {word!r}")
        checked_text(word, name)
    return found


def listed(values: dict[str, Any], name: str) -> list[Any]:
    """A list in column ``name``, or the parts of a text. Raises BadRowError if there is neither, or it is empty."""
    if name not in values:
        raise BadRowError(f"no field {name!r}")
    value = values[name]
    found = value.split() if isinstance(value, str) else value
    if found is not None and not isinstance(found, list):
        raise BadRowError(f"{name!r} is no list but {value!r}")
    if not found:
        raise BadRowError(f"nothing in {name!r}")
    return found


def word_column(columns: Sequence[str], asked: Sequence[str] | None, path: Any) -> str:
    """The column with the words: the one asked for, or ``tokens`` or ``words``. Raises CommandError."""
    return _one_column(columns, asked, ("tokens", "words"), "--text_column_name", path)


def _one_column(
    columns: Sequence[str], asked: Sequence[str] | None, usual: Sequence[str], argument: str, path: Any
) -> str:
    if asked and len(asked) > 1:
        raise CommandError(f"{argument} {' '.join(asked)}: token classification takes one column")
    if asked:
        return asked[0]
    for name in usual:
        if name in columns:
            return name
    raise CommandError(
        f"{argument} is needed: {path} has the columns {', '.join(map(repr, columns))}, and none is called "
        f"{' or '.join(map(repr, usual))}"
    )


@dataclass
class SentenceSplit(Split):
    """Sentences in windows; ``tags`` are the numbers of each sentence's tags, those that training lacks at the end."""

    windows: list[Window] = field(default_factory=list)
    tags: list[list[int]] = field(default_factory=list)

    def take(self, indices: Sequence[int]) -> SentenceSplit:
        of_row: dict[int, list[int]] = {}
        for index, window in enumerate(self.windows):
            of_row.setdefault(window.row, []).append(index)
        kept = [(new, index) for new, row in enumerate(indices) for index in of_row[row]]
        return SentenceSplit(
            self.source,
            [self.lines[i] for i in indices],
            self.features.take([index for _, index in kept]),
            windows=[replace(self.windows[index], row=new) for new, index in kept],
            tags=[self.tags[i] for i in indices],
        ).counted()

    def counted(self) -> SentenceSplit:
        """Itself, with its counts for the report."""
        words = sum(map(len, self.tags))
        found = sum(len(window.words) for window in self.windows)
        self.counts = {"words": words, "words_without_tokens": words - found, "windows": len(self.windows)}
        return self


class TokenClassification(Task):
    """Token classification."""

    name = KIND
    head = "AutoModelForTokenClassification"
    flags = frozenset(("text_column_name", "label_column_name", "label_all_tokens", "doc_stride"))
    label_smoothing = True
    in_order = True
    labels: Labels | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.unseen: list[str] = []  # tags of validation and test data that the training data lacks

    @classmethod
    def tokenizer_options(cls, config: PreTrainedConfig) -> dict[str, Any]:
        return tokenizer_options(config)

    @property
    def metrics(self) -> dict[str, bool]:  # type: ignore[override]
        """Those of entities, where the tags describe some; of single tags otherwise."""
        return ENTITY_METRICS if self._spans else TAG_METRICS

    @property
    def _names(self) -> list[str]:
        assert self.labels is not None
        return self.labels.names

    @property
    def _spans(self) -> bool:
        return is_entity_scheme(self._names)

    def choose_columns(self, train: RowFile) -> None:
        columns, flags = known_columns(train), self.data_args
        self.words = word_column(columns, flags.text_column_name, train.path)
        self.tags = _one_column(
            columns, flags.label_column_name, ("tags", "ner_tags", "labels"), "--label_column_name", train.path
        )
        self.check_file(train, "--train_file")
        self.overlap = overlap_of(flags.doc_stride, self.tokenizer, self.max_length)

    def check_file(self, rows: RowFile, argument: str) -> None:
        check_columns([self.words], rows, f"--text_column_name, for {argument}")
        check_columns([self.tags], rows, f"--label_column_name, for {argument}")

    def _parse(self, values: dict[str, Any]) -> tuple[list[str], list[str]]:
        words, tags = words_of(values, self.words), listed(values, self.tags)
        if len(words) != len(tags):
            raise BadRowError(f"{len(words)} words in {self.words!r} but {len(tags)} tags in {self.tags!r}")
        for place, tag in enumerate(tags, start=1):
            if tag is None or isinstance(tag, (list, dict, bytes)) or not label_name(tag):
                raise BadRowError(f"tag {place} of {self.tags!r} is missing or no tag: {tag!r}")
        return words, [label_name(tag) for tag in tags]

    def read_file(self, name: str, rows: RowFile, argument: str) -> SentenceSplit:
        import pyarrow as pa

        reader = self.reader(name, rows, argument, self._parse)
        tables: list[pa.Table] = []
        windows: list[Window] = []
        tags: list[list[str]] = []
        for items in reader.windows():
            encoded, found = word_windows(self.tokenizer, [words for words, _ in items], self.max_length, self.overlap)
            tables.append(token_table(encoded))
            for window in found:
                window.row += len(tags)
            windows += found
            tags += [given for _, given in items]
        if self.labels is None:
            self.labels = Labels(
                KIND, rows.label_names.get(self.tags) or sorted_names({t for s in tags for t in s}), []
            )
            if len(self._names) < 2:
                raise CommandError(f"{argument} {reader.source}: only one tag in {self.tags!r}, {self._names[0]!r}")
        unknown = self._unseen_tags(tags, reader.lines, reader.source, argument)
        index = {tag: number for number, tag in enumerate([*self._names, *self.unseen])}
        numbers = [[index[tag] for tag in sentence] for sentence in tags]
        labels = [self._labels(window, numbers[window.row]) for window in windows]
        features = pa.concat_tables(tables).append_column("labels", pa.array(labels, type=pa.list_(pa.int64())))
        split = SentenceSplit(reader.source, reader.lines, features, reader.bad, windows=windows, tags=numbers)
        split.counted()
        if unknown:
            split.counts["words_with_unseen_tags"] = unknown
        return split

    def _unseen_tags(self, tags: list[list[str]], lines: list[int], source: str, argument: str) -> int:
        """Note the tags that the training data lacks, and say so; how many words have one.

        A test is not lost for them: they count as missed, as in the scorers of the shared tasks. Raises CommandError
        where no tag is known, which is another file or column.
        """
        assert self.labels is not None
        unknown = UnknownLabels()
        for sentence, line in zip(tags, lines, strict=True):
            for tag in sentence:
                if tag not in self.labels.index:
                    unknown.add(tag, line)
        words = unknown.counts.total()
        if words == sum(map(len, tags)):
            unknown.check(self._names, source, argument, "tags", "word")
        if words:
            told = unknown.told(self._names, source, argument, "tags", "word")
            say(f"{told}. The model cannot give the others: they count as missed")
            self.unseen += sorted(unknown.counts.keys() - set(self.unseen))
        return words

    def _labels(self, window: Window, tags: list[int]) -> list[int]:
        found = [IGNORED] * len(window.pieces)
        for word, place in zip(window.words, window.places, strict=True):
            if tags[word] >= len(self._names):
                continue  # no output stands for it
            found[place] = tags[word]
            if self.data_args.label_all_tokens:
                rest = place + 1
                while rest < len(found) and window.pieces[rest] == word:
                    found[rest] = self._inside(tags[word])
                    rest += 1
        return found

    def _inside(self, tag: int) -> int:
        """The tag of a word's further pieces: B-X goes on as I-X."""
        assert self.labels is not None
        name = self._names[tag]
        return self.labels.index.get("I-" + name[2:], tag) if self._spans and name.startswith("B-") else tag

    def remark(self, name: str, split: Split) -> None:
        if split.counts["windows"] > len(split):
            say(
                f"{name}: sentences longer than {self.max_length} tokens are read in overlapping windows "
                f"({split.counts['windows']} windows of {len(split)} sentences)"
            )
        if lost := split.counts["words_without_tokens"]:
            say(f"{name}: {lost} words have no token in this vocabulary; they count as {OUTSIDE}")

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"labels": self._names}

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"labels": self._names}

    def headline(self) -> str:
        return f"token classification, {len(self._names)} tags"

    def configure(self, config: PreTrainedConfig) -> None:
        assert self.labels is not None
        self.labels.name_outputs(config)

    def collator(self) -> DataCollatorForTokenClassification:
        return DataCollatorForTokenClassification(self.tokenizer)

    @staticmethod
    def reduce_logits(logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """The best tag of each place: the logits of a whole file would not fit into memory."""
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)

    def _tags(self, name: str, predictions: Any) -> tuple[list[Sequence[str]], list[Sequence[str]]]:
        """(truth, guess) of every sentence."""
        split = self.splits[name]
        assert isinstance(split, SentenceSplit)
        outside = self.labels.index.get(OUTSIDE, 0) if self.labels else 0
        guess = [[outside] * len(sentence) for sentence in split.tags]
        for window, best in zip(split.windows, np.asarray(predictions), strict=True):
            for word, place in zip(window.words, window.places, strict=True):
                guess[window.row][word] = int(best[place])
        names = [*self._names, *self.unseen]
        return tuple([[names[i] for i in sentence] for sentence in side] for side in (split.tags, guess))  # type: ignore[return-value]

    def compute_metrics(self, name: str, prediction: EvalPrediction) -> dict[str, float]:
        truth, guess = self._tags(name, prediction.predictions)
        pairs = [pair for one, other in zip(truth, guess, strict=True) for pair in zip(one, other, strict=True)]
        accuracy = sum(one == other for one, other in pairs) / len(pairs)
        if not self._spans:
            from sklearn.metrics import f1_score

            wanted, given = zip(*pairs, strict=True)
            return {
                "accuracy": accuracy,
                "f1_macro": float(f1_score(wanted, given, average="macro", zero_division=0)),
            }
        scores = score_entities(truth, guess)[""]
        return {
            "f1": scores["f1-score"],
            "precision": scores["precision"],
            "recall": scores["recall"],
            "accuracy": accuracy,
        }

    def details(self, name: str, predictions: Any, label_ids: Any) -> dict[str, Any] | None:
        if not self._spans:
            return None
        scores = score_entities(*self._tags(name, predictions))
        return {kind: values for kind, values in scores.items() if kind}
