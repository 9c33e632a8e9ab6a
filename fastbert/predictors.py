"""What ``fastbert predict`` does with a window of rows: one class for each kind of fine-tuned model."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from .training.data import TextColumns, check_columns, choose_text_columns, known_columns, tokenize
from .training.errors import CommandError
from .training.labels import MULTI, REGRESSION, SINGLE
from .training.multiple_choice import ChoiceColumns, encode_choices
from .training.question_answering import AnswerSearch, Question, QuestionColumns, QuestionEncoder
from .training.token_classification import OUTSIDE, overlap_of, tokenizer_options, word_column, word_windows, words_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from .training.rows import RowFile

NOT_FINITE = "the model gave NaN or infinite numbers"
Prediction = list[Any] | str  # the values of the added columns, or what went wrong


def batches(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Indices sorted by length, in batches whose padded size is at most ``budget`` tokens (or one row)."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


class Predictor(ABC):
    """From rows to the values of the added columns. :meth:`choose_columns`, then :meth:`attach`, then the rest."""

    head: ClassVar[str]  # transformers' Auto class of the model
    what: ClassVar[str]  # such a model in words
    flags: frozenset[str]  # those that not every kind of model has
    kind: str = ""  # of the head, where its class leaves that open
    pairs: bool = False  # whether two texts make a sequence
    delimiter: str | None = None  # joins lists in a table; None: --label_delimiter does

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def __init__(self, config: PreTrainedConfig, given: argparse.Namespace) -> None:
        self.config = config
        self.given = given
        self.tokens = 0
        self.truncated = 0

    def tokenizer_options(self) -> dict[str, Any]:
        """What the tokenizer must be loaded with."""
        return {}

    @abstractmethod
    def choose_columns(self, rows: RowFile) -> None:
        """Settle which of the input's columns are read. Raises CommandError where they are missing."""

    @abstractmethod
    def reads(self) -> Any:
        """Which columns are read, for a resumed run to compare."""

    @property
    @abstractmethod
    def columns(self) -> list[str]:
        """Names of the added columns."""

    def attach(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        """Get ready to predict. Raises CommandError for flags that do not go with the model."""
        special = tokenizer.num_special_tokens_to_add(pair=self.pairs)
        if max_length <= special:
            raise CommandError(
                f"--max_seq_length {max_length}: must be at least {special + 1}, for {special} special tokens and one "
                "of the text"
            )
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length

    @abstractmethod
    def parse(self, values: dict[str, Any]) -> Any:
        """What a row brings. Raises BadRowError."""

    @abstractmethod
    def predict(self, items: list[Any]) -> list[Prediction]:
        """The predictions of some rows, in their order."""

    def outputs(self, encoded: dict[str, list[Any]], count: int = 1) -> Iterator[tuple[list[int], Any]]:
        """Run features of token ids in batches of alike lengths; yields their indices and the model's outputs.

        With ``count`` each feature is as many neighbours in ``encoded``, which the model takes as [batch, count, S].
        """
        lengths = [len(ids) for ids in encoded["input_ids"]]
        self.tokens += sum(lengths)
        longest = [max(lengths[i : i + count]) for i in range(0, len(lengths), count)]
        for batch in batches(longest, max(self.given.max_tokens_per_batch // count, 1)):
            places = [index * count + i for index in batch for i in range(count)]
            inputs = self.tokenizer.pad(
                {name: [values[i] for i in places] for name, values in encoded.items()}, return_tensors="pt"
            ).to(self.model.device)
            if count > 1:
                shaped = {name: value.view(len(batch), count, -1) for name, value in inputs.items()}
            else:
                shaped = dict(inputs)
            with torch.inference_mode():
                yield batch, self.model(**shaped)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis, in float64."""
    exponents = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return exponents / exponents.sum(-1, keepdims=True)


def label_names(config: PreTrainedConfig) -> list[str]:
    """Names of a classifier's outputs."""
    names = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    return [names[number] for number in range(len(names))]


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()


class SequencePredictor(Predictor):
    """Classes, several labels or numbers of a text or a pair of texts."""

    head = "AutoModelForSequenceClassification"
    what = "classifier"
    flags = frozenset(
        (
            "text_column_name",
            "text_column_delimiter",
            "text_pair_column_name",
            "all_scores",
            "threshold",
            "label_delimiter",
        )
    )

    def __init__(self, config: PreTrainedConfig, given: argparse.Namespace) -> None:
        super().__init__(config, given)
        self.kind = config.problem_type or (REGRESSION if config.num_labels == 1 else SINGLE)
        self.names = label_names(config)
        if self.kind != MULTI:
            self.flags -= {"threshold", "label_delimiter"}
        if self.kind == REGRESSION:
            self.flags -= {"all_scores"}

    def choose_columns(self, rows: RowFile) -> None:
        names, given = self.given.text_column_name, self.given
        if str(rows.path) == "-":
            if not names:
                raise CommandError("--text_column_name is needed with --input -")
            self.text = TextColumns(tuple(names), given.text_column_delimiter, given.text_pair_column_name)
        else:
            self.text = choose_text_columns(rows, names, given.text_column_delimiter, given.text_pair_column_name)
        self.pairs = self.text.pair is not None

    def reads(self) -> Any:
        return [list(self.text.names), self.text.delimiter, self.text.pair]

    @property
    def columns(self) -> list[str]:
        if self.kind == REGRESSION:
            single = len(self.names) == 1
            return ["predicted_value"] if single else [f"predicted_value_{name}" for name in self.names]
        found = ["predicted_label"] if self.kind == MULTI else ["predicted_label", "score"]
        if self.given.all_scores or self.kind == MULTI:
            found += [f"score_{name}" for name in self.names]
        return found

    def parse(self, values: dict[str, Any]) -> tuple[str, str | None]:
        return self.text.of(values)

    def predict(self, items: list[tuple[str, str | None]]) -> list[Prediction]:
        pairs = [pair or "" for _, pair in items] if self.pairs else None
        encoded, cut = tokenize(self.tokenizer, [text for text, _ in items], pairs, self.max_length)
        self.truncated += cut
        found: list[Prediction] = [NOT_FINITE] * len(items)
        for batch, output in self.outputs(encoded):
            for index, logits in zip(batch, _numpy(output.logits).reshape(len(batch), -1), strict=True):
                if np.isfinite(logits).all():
                    found[index] = self.values(logits)
        return found

    def values(self, logits: np.ndarray) -> list[Any]:
        """The values of :attr:`columns` for one row's logits [labels]."""
        if self.kind == REGRESSION:
            return [float(f"{x:.7g}") for x in logits]
        if self.kind == MULTI:
            scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
            chosen = [name for name, score in zip(self.names, scores, strict=True) if score > self.given.threshold]
            return [chosen, *(round(float(score), 6) for score in scores)]
        scores = softmax(logits)
        best = int(scores.argmax())
        every = [round(float(score), 6) for score in scores] if self.given.all_scores else []
        return [self.names[best], round(float(scores[best]), 6), *every]


class TokenPredictor(Predictor):
    """A tag for every word."""

    head = "AutoModelForTokenClassification"
    what = "token classifier"
    flags = frozenset(("text_column_name", "doc_stride"))
    delimiter = " "  # as the words of a table are separated

    def tokenizer_options(self) -> dict[str, Any]:
        return tokenizer_options(self.config)

    def choose_columns(self, rows: RowFile) -> None:
        names = self.given.text_column_name
        columns = [] if str(rows.path) == "-" else known_columns(rows)
        self.words = word_column(columns, names, rows.path)
        if str(rows.path) != "-":
            check_columns([self.words], rows, "--text_column_name")

    def reads(self) -> Any:
        return [self.words]

    @property
    def columns(self) -> list[str]:
        return ["predicted_tags", "scores"]

    def attach(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        super().attach(model, tokenizer, max_length)
        self.overlap = overlap_of(self.given.doc_stride, tokenizer, max_length)

    def parse(self, values: dict[str, Any]) -> list[str]:
        return words_of(values, self.words)

    def predict(self, items: list[list[str]]) -> list[Prediction]:
        encoded, windows = word_windows(self.tokenizer, items, self.max_length, self.overlap)
        names = label_names(self.config)
        # A word without a token in this vocabulary is outside of everything, with no score.
        tags = [[OUTSIDE] * len(words) for words in items]
        scores: list[list[float | None]] = [[None] * len(words) for words in items]
        broken: set[int] = set()
        for batch, output in self.outputs(encoded):
            for index, logits in zip(batch, _numpy(output.logits), strict=True):
                window = windows[index]
                if not np.isfinite(logits[window.places]).all():
                    broken.add(window.row)
                    continue
                chances = softmax(logits[window.places])
                for word, chance in zip(window.words, chances, strict=True):
                    best = int(chance.argmax())
                    tags[window.row][word] = names[best]
                    scores[window.row][word] = round(float(chance[best]), 6)
        return [NOT_FINITE if i in broken else [tags[i], scores[i]] for i in range(len(items))]


class AnswerPredictor(Predictor):
    """The stretch of a context that answers a question."""

    head = "AutoModelForQuestionAnswering"
    what = "question answering model"
    pairs = True
    flags = frozenset(
        (
            "question_column_name",
            "context_column_name",
            "doc_stride",
            "n_best_size",
            "max_answer_length",
            "version_2_with_negative",
            "null_score_diff_threshold",
        )
    )

    def choose_columns(self, rows: RowFile) -> None:
        self.names = QuestionColumns(self.given.question_column_name, self.given.context_column_name)
        if str(rows.path) != "-":
            for name in ("question", "context"):
                check_columns([getattr(self.names, name)], rows, f"--{name}_column_name")
        if self.given.null_score_diff_threshold and not self.given.version_2_with_negative:
            raise CommandError("--null_score_diff_threshold: only with --version_2_with_negative")
        self.search = AnswerSearch.of(self.given)

    def reads(self) -> Any:
        return [self.names.question, self.names.context]

    @property
    def columns(self) -> list[str]:
        return ["predicted_answer", "predicted_start", "score"]

    def attach(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        super().attach(model, tokenizer, max_length)
        self.encoding = QuestionEncoder.of(tokenizer, max_length, self.given.doc_stride)

    def parse(self, values: dict[str, Any]) -> Question:
        return self.encoding.check(self.names.of(values))

    def predict(self, items: list[Question]) -> list[Prediction]:
        encoded, windows = self.encoding.windows(items)
        found: list[list[Any]] = [[] for _ in items]
        broken: set[int] = set()
        for batch, output in self.outputs(encoded):
            for index, start, end in zip(batch, _numpy(output.start_logits), _numpy(output.end_logits), strict=True):
                window, length = windows[index], len(encoded["input_ids"][index])
                if not (np.isfinite(start[:length]).all() and np.isfinite(end[:length]).all()):
                    broken.add(window.row)
                found[window.row].append((index, window, start, end))
        results: list[Prediction] = []
        for row, (question, parts) in enumerate(zip(items, found, strict=True)):
            if row in broken:
                results.append(NOT_FINITE)
                continue
            ordered = [part[1:] for part in sorted(parts, key=lambda part: part[0])]
            answer = self.search.best(question.context, ordered)
            start = answer.start if answer.start >= 0 else None
            results.append([answer.text, start, round(answer.score, 6)])
        return results


class ChoicePredictor(Predictor):
    """Which of several endings goes with a beginning."""

    head = "AutoModelForMultipleChoice"
    what = "multiple choice model"
    pairs = True
    flags = frozenset(("text_column_name", "text_column_delimiter", "text_pair_column_name", "choice_column_names"))

    def choose_columns(self, rows: RowFile) -> None:
        given = self.given
        columns: Sequence[str] = [] if str(rows.path) == "-" else known_columns(rows)
        self.names = ChoiceColumns.choose(
            columns,
            given.text_column_name,
            given.text_column_delimiter,
            given.text_pair_column_name,
            given.choice_column_names,
            rows.path,
        )
        if str(rows.path) != "-":
            check_columns(self.names.all, rows, "--text_column_name, --choice_column_names")

    def reads(self) -> Any:
        return [*self.names.all, self.names.delimiter]

    @property
    def columns(self) -> list[str]:
        return ["predicted_choice", "score"]

    def parse(self, values: dict[str, Any]) -> tuple[str, list[str]]:
        return self.names.of(values)

    def predict(self, items: list[tuple[str, list[str]]]) -> list[Prediction]:
        found: list[Prediction] = [NOT_FINITE] * len(items)
        same: dict[int, list[int]] = {}  # number of choices -> items with as many
        for place, (_, choices) in enumerate(items):
            same.setdefault(len(choices), []).append(place)
        for count, places in same.items():
            encoded, cut = encode_choices(self.tokenizer, [items[place] for place in places], self.max_length)
            self.truncated += cut
            flat = {name: [ids for choices in values for ids in choices] for name, values in encoded.items()}
            for batch, output in self.outputs(flat, count):
                for index, logits in zip(batch, _numpy(output.logits), strict=True):
                    if np.isfinite(logits).all():
                        chances = softmax(logits)
                        best = int(chances.argmax())
                        found[places[index]] = [best, round(float(chances[best]), 6)]
        return found


PREDICTORS: tuple[type[Predictor], ...] = (SequencePredictor, TokenPredictor, AnswerPredictor, ChoicePredictor)


def predictor_for(config: PreTrainedConfig, given: argparse.Namespace, defaults: dict[str, Any]) -> Predictor:
    """The predictor of a checkpoint, by the class that it was saved from; else a classifier of sequences.

    Raises CommandError for a flag, other than its default, that this kind of model has no use for.
    """
    names = config.architectures or [""]
    found: type[Predictor] = SequencePredictor
    for kind in PREDICTORS:
        if names[0].endswith(kind.head.removeprefix("AutoModel")):
            found = kind
    predictor = found(config, given)
    others = frozenset().union(*(kind.flags for kind in PREDICTORS)) - predictor.flags
    for flag in sorted(others):
        if getattr(given, flag) != defaults[flag]:
            head = f" ({predictor.kind})" if predictor.kind else ""
            raise CommandError(f"--{flag}: not a flag for a {predictor.what}{head}")
    return predictor
