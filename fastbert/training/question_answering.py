"""Extractive question answering: the stretch of a context that answers a question (SQuAD).

A context that is longer than the model takes is read in overlapping windows, each with the whole question. The answer
is the best stretch of all windows; in SQuAD 2.0, none, if the score of "no answer" is higher still (Devlin et al. 2019,
4.2-4.3).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import DataCollatorWithPadding

from .data import BadRowError, Split, as_text, check_columns, checked_text, token_table
from .errors import CommandError
from .runs import say
from .task import Task

if TYPE_CHECKING:
    from transformers import EvalPrediction, PreTrainedTokenizerBase

    from .arguments import DataArguments
    from .rows import RowFile

DEFAULT_OVERLAP = 128
METRICS = {"f1": True, "exact_match": True, "loss": False}
NEGATIVE_METRICS = {"f1": True, "exact_match": True, "f1_has_answer": True, "f1_no_answer": True, "loss": False}

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalized(answer: str) -> str:
    """An answer as SQuAD's evaluation compares it: lower case, without punctuation, articles and extra white space."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def answer_scores(guess: str, answers: Sequence[str]) -> tuple[float, float]:
    """(exact match, F1 over words) of a guess: the best over the given answers (Rajpurkar et al. 2016, 6.1).

    No answer, or none with a word in it, means that "" is right (Rajpurkar et al. 2018).
    """
    given = normalized(guess)
    wanted = [text for answer in answers if (text := normalized(answer))] or [""]
    exact = float(any(given == text for text in wanted))
    return exact, max(_word_f1(given.split(), text.split()) for text in wanted)


def _word_f1(guess: list[str], truth: list[str]) -> float:
    if not guess or not truth:
        return float(guess == truth)
    shared = sum((Counter(guess) & Counter(truth)).values())
    return 2 * shared / (len(guess) + len(truth))


@dataclass
class Question:
    """A question with its context, the answers that count as right, and where the first of them begins."""

    question: str
    context: str
    answers: list[str] = field(default_factory=list)
    start: int = 0


@dataclass
class Window:
    """A stretch of a context: which characters of it each token stands for."""

    row: int
    first: int  # place of the context's first token
    offsets: np.ndarray  # [tokens of the context, 2], from and to


@dataclass(frozen=True)
class QuestionColumns:
    """Where question and context are."""

    question: str
    context: str

    def of(self, values: dict[str, Any]) -> Question:
        """The question of a row. Raises BadRowError if it or its context is missing."""
        texts = [as_text(values, name) for name in (self.question, self.context)]
        for text, name in zip(texts, (self.question, self.context), strict=True):
            if not text.strip():
                raise BadRowError(f"no text in {name!r}")
        return Question(texts[0], texts[1])


@dataclass
class QuestionEncoder:
    """Cuts questions with their contexts into windows."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    overlap: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, max_length: int, asked: int | None) -> QuestionEncoder:
        """Raises CommandError if ``asked`` (``--doc_stride``) leaves no room."""
        room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
        if asked is not None and asked >= room - 1:
            raise CommandError(
                f"--doc_stride {asked}: must be less than the {max(room - 1, 0)} tokens that a window has beside "
                "a question (--max_seq_length)"
            )
        return cls(tokenizer, max_length, asked if asked is not None else min(DEFAULT_OVERLAP, max_length // 4))

    def check(self, question: Question) -> Question:
        """The question itself. Raises BadRowError if it leaves no room for its context."""
        length = len(self.tokenizer(question.question, add_special_tokens=False, verbose=False)["input_ids"])
        room = self.max_length - self.tokenizer.num_special_tokens_to_add(pair=True) - self.overlap
        if length >= room:
            raise BadRowError(
                f"the question has {length} tokens; with {self.max_length} a window (--max_seq_length), of which two "
                f"share {self.overlap} (--doc_stride), it may have {room - 1}"
            )
        return question

    def windows(self, questions: list[Question]) -> tuple[dict[str, list[list[int]]], list[Window]]:
        """Token ids (and token types, where the model has them) of every window, and what stands in it."""
        self.tokenizer.truncation_side = "right"  # nothing is cut: this is the order of the windows
        encoded = self.tokenizer(
            [question.question for question in questions],
            [question.context for question in questions],
            truncation="only_second",
            max_length=self.max_length,
            stride=self.overlap,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        rows, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
        windows = []
        for index, row in enumerate(rows):
            places = [place for place, part in enumerate(encoded.sequence_ids(index)) if part == 1]
            first = places[0] if places else 0
            spans = offsets[index][first : first + len(places)]
            windows.append(Window(row, first, np.array(spans, dtype=np.int64).reshape(-1, 2)))
        return dict(encoded), windows


@dataclass(frozen=True)
class Answer:
    """What a model answers: ``text`` is "" and ``start`` -1 where it says that there is no answer."""

    text: str
    score: float  # share of the probability among the candidates
    start: int


@dataclass(frozen=True)
class AnswerSearch:
    """How an answer is chosen from the scores of starts and ends."""

    n_best_size: int = 20
    max_answer_length: int = 30
    negative: bool = False
    null_score_diff_threshold: float = 0.0

    @classmethod
    def of(cls, flags: Any) -> AnswerSearch:
        """By the flags of these names."""
        return cls(
            flags.n_best_size,
            flags.max_answer_length,
            flags.version_2_with_negative,
            flags.null_score_diff_threshold,
        )

    def best(self, context: str, windows: Sequence[tuple[Window, np.ndarray, np.ndarray]]) -> Answer:
        """The answer of one question.

        With each window come the logits [tokens] of starts and of ends; those of place 0 speak for "no answer".
        """
        candidates: list[tuple[float, int, int]] = []  # score, first character, character behind the last
        null = np.inf
        for window, start, end in windows:
            null = min(null, float(start[0] + end[0]))
            inner = slice(window.first, window.first + len(window.offsets))
            candidates += self._candidates(window, start[inner], end[inner])
        candidates = sorted(candidates, key=lambda c: (-c[0], c[1], c[2]))[: self.n_best_size]
        scores = np.array([c[0] for c in candidates] + ([null] if self.negative or not candidates else []))
        shares = np.exp(scores - scores.max())
        shares /= shares.sum()
        if not candidates or (self.negative and null - candidates[0][0] > self.null_score_diff_threshold):
            return Answer("", float(shares[-1]), -1)
        _, first, last = candidates[0]
        return Answer(context[first:last], float(shares[0]), first)

    def _candidates(self, window: Window, start: np.ndarray, end: np.ndarray) -> list[tuple[float, int, int]]:
        starts, ends = (np.argsort(-side, kind="stable")[: self.n_best_size] for side in (start, end))
        length = ends[None] - starts[:, None] + 1
        fits = (length >= 1) & (length <= self.max_answer_length)
        # Tokens without a character (some tokenizers have them) can neither begin nor end an answer.
        characters = window.offsets[ends, 1][None] - window.offsets[starts, 0][:, None]
        rows, columns = np.nonzero(fits & (characters > 0))
        return [
            (
                float(start[starts[i]] + end[ends[j]]),
                int(window.offsets[starts[i], 0]),
                int(window.offsets[ends[j], 1]),
            )
            for i, j in zip(rows, columns, strict=True)
        ]


def answers_of(values: dict[str, Any], name: str, context: str) -> tuple[list[str], int]:
    """The texts of a row's answers and where the first begins; ([], 0) if there is none. Raises BadRowError."""
    given = values.get(name)
    texts: Any
    starts: Any
    if isinstance(given, list):
        if not all(isinstance(answer, dict) for answer in given):
            raise BadRowError(f"{name!r} is no list of objects with 'text' and 'answer_start'")
        texts, starts = [a.get("text") for a in given], [a.get("answer_start") for a in given]
    elif isinstance(given, dict):
        texts, starts = given.get("text"), given.get("answer_start")
    elif given is None:
        return [], 0
    else:
        raise BadRowError(f"{name!r} has no answers with 'text' and 'answer_start' but {given!r}")
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise BadRowError(f"{name!r} needs as many 'text' as 'answer_start', got {texts!r} and {starts!r}")
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text or not isinstance(start, int) or isinstance(start, bool):
            raise BadRowError(f"{name!r}: an answer is a text and a number, got {text!r} at {start!r}")
        checked_text(text, name)
        found = context[max(start, 0) : max(start, 0) + len(text)]
        if start < 0 or found != text:
            raise BadRowError(f"{name!r}: {text!r} does not stand at {start} of the context, but {found!r}")
    return list(texts), starts[0] if starts else 0


@dataclass
class QuestionSplit(Split):
    """Questions in windows, with what is needed to judge the answers."""

    windows: list[Window] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)

    def take(self, indices: Sequence[int]) -> QuestionSplit:
        of_row: dict[int, list[int]] = {}
        for index, window in enumerate(self.windows):
            of_row.setdefault(window.row, []).append(index)
        kept = [(new, index) for new, row in enumerate(indices) for index in of_row[row]]
        return QuestionSplit(
            self.source,
            [self.lines[i] for i in indices],
            self.features.take([index for _, index in kept]),
            windows=[replace(self.windows[index], row=new) for new, index in kept],
            questions=[self.questions[i] for i in indices],
        ).counted()

    def counted(self) -> QuestionSplit:
        """Itself, with its counts for the report."""
        without = sum(not question.answers for question in self.questions)
        self.counts = {"windows": len(self.windows), "questions_without_answer": without}
        return self


class QuestionAnswering(Task):
    """Extractive question answering."""

    name = "question_answering"
    head = "AutoModelForQuestionAnswering"
    in_order = True
    flags = frozenset(
        (
            "question_column_name",
            "context_column_name",
            "answer_column_name",
            "doc_stride",
            "version_2_with_negative",
            "null_score_diff_threshold",
            "n_best_size",
            "max_answer_length",
        )
    )

    @property
    def metrics(self) -> dict[str, bool]:  # type: ignore[override]
        """In SQuAD 2.0 also apart for questions with and without an answer."""
        return NEGATIVE_METRICS if self.data_args.version_2_with_negative else METRICS

    def choose_columns(self, train: RowFile) -> None:
        flags: DataArguments = self.data_args
        if flags.null_score_diff_threshold and not flags.version_2_with_negative:
            raise CommandError("--null_score_diff_threshold: only with --version_2_with_negative")
        self.columns = QuestionColumns(flags.question_column_name, flags.context_column_name)
        self.encoding = QuestionEncoder.of(self.tokenizer, self.max_length, flags.doc_stride)
        self.search = AnswerSearch.of(flags)
        self.check_file(train, "--train_file")

    def check_file(self, rows: RowFile, argument: str) -> None:
        for name in ("question", "context", "answer"):
            column = getattr(self.data_args, f"{name}_column_name")
            check_columns([column], rows, f"--{name}_column_name, for {argument}")

    def _parse(self, values: dict[str, Any]) -> Question:
        found = self.columns.of(values)
        found.answers, found.start = answers_of(values, self.data_args.answer_column_name, found.context)
        if not found.answers and not self.data_args.version_2_with_negative:
            raise BadRowError(
                f"no answer in {self.data_args.answer_column_name!r} "
                "(--version_2_with_negative allows questions without)"
            )
        return self.encoding.check(found)

    def read_file(self, name: str, rows: RowFile, argument: str) -> QuestionSplit:
        import pyarrow as pa

        reader = self.reader(name, rows, argument, self._parse)
        tables: list[pa.Table] = []
        windows: list[Window] = []
        questions: list[Question] = []
        for items in reader.windows():
            encoded, found = self.encoding.windows(items)
            positions = [positions_of(items[window.row], window) for window in found]
            table = token_table(encoded)
            for index, column in enumerate(("start_positions", "end_positions")):
                table = table.append_column(column, pa.array([p[index] for p in positions], type=pa.int64()))
            tables.append(table)
            for window in found:
                window.row += len(questions)
            windows += found
            questions += items
        split = QuestionSplit(
            reader.source, reader.lines, pa.concat_tables(tables), reader.bad, windows=windows, questions=questions
        )
        return split.counted()

    def groups(self, split: Split) -> Sequence[Hashable]:
        """Questions of one context stay together: it would be known from training."""
        assert isinstance(split, QuestionSplit)
        return [question.context for question in split.questions]

    def remark(self, name: str, split: Split) -> None:
        if split.counts["windows"] > len(split):
            say(
                f"{name}: contexts longer than {self.max_length} tokens are read in overlapping windows "
                f"({split.counts['windows']} windows of {len(split)} questions)"
            )

    def describe(self) -> dict[str, Any]:
        return super().describe() | {
            "version_2_with_negative": self.data_args.version_2_with_negative,
            "doc_stride": self.encoding.overlap,
        }

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"version_2_with_negative": self.data_args.version_2_with_negative}

    def collator(self) -> DataCollatorWithPadding:
        return DataCollatorWithPadding(self.tokenizer)

    def compute_metrics(self, name: str, prediction: EvalPrediction) -> dict[str, float]:
        split = self.splits[name]
        assert isinstance(split, QuestionSplit)
        starts, ends = tuple(prediction.predictions)[:2]
        of_row: list[list[tuple[Window, np.ndarray, np.ndarray]]] = [[] for _ in split.questions]
        for window, start, end in zip(split.windows, starts, ends, strict=True):
            of_row[window.row].append((window, start, end))
        scores: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for question, found in zip(split.questions, of_row, strict=True):
            answer = self.search.best(question.context, found)
            scores[bool(question.answers)].append(answer_scores(answer.text, question.answers))
        every = np.array(scores[True] + scores[False])
        metrics = {"f1": float(every[:, 1].mean()), "exact_match": float(every[:, 0].mean())}
        if self.data_args.version_2_with_negative:
            for key, answered in (("f1_has_answer", True), ("f1_no_answer", False)):
                metrics[key] = float(np.mean([score for _, score in scores[answered]])) if scores[answered] else np.nan
        return metrics


def positions_of(question: Question, window: Window) -> tuple[int, int]:
    """Places of the first answer's first and last token; (0, 0), no answer, where it is not wholly in the window."""
    if not question.answers or not len(window.offsets):
        return 0, 0
    begin, end = question.start, question.start + len(question.answers[0])
    starts, ends = window.offsets[:, 0], window.offsets[:, 1]
    if starts[0] > begin or ends[-1] < end:
        return 0, 0
    first = int(np.searchsorted(starts, begin, side="right")) - 1
    last = int(np.searchsorted(ends, end, side="left"))
    return window.first + first, window.first + max(first, last)
