"""Sentence embeddings, trained by sentence-transformers on pairs, triplets or scored pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .data import BadRowError, Split, as_text, check_columns, known_columns, split_names
from .errors import CommandError, first_line
from .labels import correlation, ranks
from .loading import load_model
from .task import Task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from .arguments import ModelArguments
    from .rows import RowFile
    from .trainer import Resumable

PAIR_METRICS = {"accuracy": True, "mrr": True, "loss": False}
SCORE_METRICS = {"spearman": True, "pearson": True, "loss": False}
TEXTS = ("anchor", "positive", "negative")  # what the columns are called inside
_USUAL = (TEXTS, ("sentence1", "sentence2"), ("sentence_a", "sentence_b"))


def retrieval_scores(anchors: np.ndarray, positives: np.ndarray, others: np.ndarray | None) -> dict[str, float]:
    """Accuracy and mean reciprocal rank of finding each anchor's positive among those of all rows, and ``others``.

    All are normalized [rows, dimension]. Texts that are as near as the right one count as right.
    """
    candidates = positives if others is None else np.concatenate([positives, others])
    ranked: list[np.ndarray] = []
    for start in range(0, len(anchors), 1024):
        part = slice(start, start + 1024)
        similarity = anchors[part] @ candidates.T
        own = (anchors[part] * positives[part]).sum(-1, keepdims=True)
        ranked.append(1 + (similarity > own + 1e-6).sum(-1))
    rank = np.concatenate(ranked)
    return {"accuracy": float((rank == 1).mean()), "mrr": float((1 / rank).mean())}


class SentenceEmbeddings(Task):
    """Sentence embeddings.

    Two or three texts a row (a third is a hard negative) are trained with in-batch negatives
    (MultipleNegativesRankingLoss), two with a score so that their cosine is the score (CosineSimilarityLoss).
    """

    name = "sentence_embeddings"
    head = "AutoModel"
    flags = frozenset(("text_column_name", "label_column_name"))
    sharding = False  # its metrics and its loss call the model past the hooks that gather the weights

    @property
    def metrics(self) -> dict[str, bool]:  # type: ignore[override]
        """Of scores, or of finding the positive."""
        return SCORE_METRICS if self.score else PAIR_METRICS

    def choose_columns(self, train: RowFile) -> None:
        flags, columns = self.data_args, known_columns(train)
        names = split_names(flags.text_column_name or (), columns)
        if not names:
            usual = [tuple(name for name in group if name in columns) for group in _USUAL]
            names = list(next((found for found in usual if len(found) > 1), ()))
        if not names:
            raise CommandError(
                f"--text_column_name is needed, with two or three columns: {train.path} has "
                f"{', '.join(map(repr, columns))}"
            )
        labels = flags.label_column_name or [name for name in ("score",) if name in columns and len(names) == 2]
        if len(labels) > 1:
            raise CommandError(f"--label_column_name {' '.join(labels)}: sentence embeddings take one")
        self.score = labels[0] if labels else None
        allowed = (2,) if self.score else (2, 3)
        if len(names) not in allowed:
            with_score = f" with the score in {self.score!r}" if self.score else ""
            raise CommandError(
                f"--text_column_name {' '.join(names)}: {' or '.join(map(str, allowed))} columns are wanted{with_score}"
            )
        if self.args.train_sampling_strategy not in ("group_by_length", "random"):
            raise CommandError(
                f"--train_sampling_strategy {self.args.train_sampling_strategy}: "
                "sentence embeddings are drawn at random"
            )
        self.texts = tuple(names)
        self.check_file(train, "--train_file")

    def check_file(self, rows: RowFile, argument: str) -> None:
        check_columns(self.texts, rows, f"--text_column_name, for {argument}")
        check_columns([self.score] if self.score else [], rows, f"--label_column_name, for {argument}")

    def _parse(self, values: dict[str, Any]) -> tuple[list[str], float | None]:
        texts = [as_text(values, name) for name in self.texts]
        for text, name in zip(texts, self.texts, strict=True):
            if not text.strip():
                raise BadRowError(f"no text in {name!r}")
        if self.score is None:
            return texts, None
        try:
            score = float(values.get(self.score))  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise BadRowError(f"{self.score!r} is no number but {values.get(self.score)!r}") from None
        if not -1 <= score <= 1:
            raise BadRowError(f"{self.score!r} is {score:g}; a cosine is wanted, from -1 to 1")
        return texts, score

    def read_file(self, name: str, rows: RowFile, argument: str) -> Split:
        import pyarrow as pa

        reader = self.reader(name, rows, argument, self._parse)
        columns: dict[str, list[Any]] = {TEXTS[i]: [] for i in range(len(self.texts))}
        scores: list[float | None] = []
        truncated = 0
        for window in reader.windows():
            for index, column in enumerate(columns.values()):
                texts = [texts[index] for texts, _ in window]
                column += texts
                lengths = self.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
                truncated += sum(len(ids) > self.max_length for ids in lengths)
            scores += [score for _, score in window]
        features = pa.table({key: pa.array(texts, type=pa.string()) for key, texts in columns.items()})
        if self.score:
            features = features.append_column("label", pa.array(scores, type=pa.float32()))
        return Split(reader.source, reader.lines, features, reader.bad, {"truncated_texts": truncated})

    def describe(self) -> dict[str, Any]:
        loss = "CosineSimilarityLoss" if self.score else "MultipleNegativesRankingLoss"
        return super().describe() | {"texts": list(self.texts), "score": self.score, "loss": loss}

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"texts": list(self.texts), "score": self.score}

    def headline(self) -> str:
        return f"sentence embeddings, {' '.join(self.texts)}{f' with {self.score}' if self.score else ''}"

    def load(self, model_args: ModelArguments, config: PreTrainedConfig, *, trained: bool = False, **hub: Any) -> Any:
        """A SentenceTransformer: the folder's own, or the encoder with mean pooling, which uses no new weights."""
        from sentence_transformers import SentenceTransformer

        name = model_args.model_name_or_path
        # sentence-transformers draws what a checkpoint lacks without a word: this looks at it first.
        load_model(self.head, name, config, **hub)
        # It reads pickled weights of the modules behind the encoder, too, where there are no others.
        for path in sorted(Path(name).glob("*/pytorch_model.bin")):
            if not path.with_name("model.safetensors").is_file():
                raise CommandError(
                    f"--model_name_or_path {name}: pickled weights ({path.parent.name}/{path.name}) are not loaded; to "
                    "convert those that you trust: SentenceTransformer(FOLDER).save_pretrained(FOLDER)"
                )
        try:
            model = SentenceTransformer(
                name,
                device="cpu",
                cache_folder=hub.get("cache_dir"),
                revision=hub.get("revision"),
                model_kwargs={"use_safetensors": True},
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise CommandError(
                f"--model_name_or_path {name}: cannot be loaded by sentence-transformers: {first_line(error)}"
            ) from error
        model.max_seq_length = self.max_length
        return model

    def encoder(self, model: Any) -> Any:
        return model[0].auto_model

    def trainer(self, model: Any, callbacks: list[Any]) -> Resumable:
        from .embedding_trainer import EmbeddingTrainer

        return EmbeddingTrainer(
            model=model,
            args=self.args,
            datasets={name: split.dataset() for name, split in self.splits.items()},
            scored=self.score is not None,
            scores_of=self.scores,
            callbacks=callbacks,
        )

    def scores(self, name: str, model: Any) -> dict[str, float]:
        """The metrics of split ``name``."""
        features = self.splits[name].features
        parts: dict[str, torch.Tensor | np.ndarray] = {
            column: model.encode(
                features[column].to_pylist(),
                batch_size=self.args.eval_batch_size,
                normalize_embeddings=True,
                show_progress_bar=False,
            )
            for column in TEXTS[: len(self.texts)]
        }
        anchors, positives = np.asarray(parts["anchor"]), np.asarray(parts["positive"])
        if self.score is None:
            negatives = np.asarray(parts["negative"]) if "negative" in parts else None
            return retrieval_scores(anchors, positives, negatives)
        cosine = (anchors * positives).sum(-1)
        truth = features["label"].to_numpy()
        return {"spearman": correlation(ranks(truth), ranks(cosine)), "pearson": correlation(truth, cosine)}
