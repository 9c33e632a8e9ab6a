"""The trainer of sentence embeddings; apart, because it needs sentence-transformers when it is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import DefaultBatchSampler, NoDuplicatesBatchSampler
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss, MultipleNegativesRankingLoss
from torch.utils.data import RandomSampler

from .trainer import Resumable

if TYPE_CHECKING:
    from .arguments import FinetuneArguments


class EpochBatchSampler(DefaultBatchSampler):
    """Random batches whose order depends on the seed and the epoch only, so that a resumed epoch repeats it."""

    def __iter__(self) -> Iterator[list[int]]:
        assert self.generator is not None
        self.generator.manual_seed(self.seed + self.epoch)
        yield from super().__iter__()


class EmbeddingTrainer(Resumable, SentenceTransformerTrainer):
    """sentence-transformers' trainer; ``scores_of(split, model)`` are the metrics of a split."""

    def __init__(
        self,
        *,
        model: Any,
        args: FinetuneArguments,
        datasets: dict[str, Any],
        scored: bool,
        scores_of: Callable[[str, Any], dict[str, float]],
        callbacks: list[Any],
    ) -> None:
        self.scores_of = scores_of
        self.scored = scored
        self.test_dataset = datasets.get("test")
        own = {field.name for field in fields(SentenceTransformerTrainingArguments) if field.init}
        given = {name: getattr(args, name) for name in own if hasattr(args, name)}
        super().__init__(
            model=model,
            args=SentenceTransformerTrainingArguments(**given | {"train_sampling_strategy": "random"}),
            train_dataset=datasets["train"],
            eval_dataset=datasets.get("validation"),
            loss=(CosineSimilarityLoss if scored else MultipleNegativesRankingLoss)(model),
            callbacks=callbacks,
            train_lengths=[],
        )

    def items(self, inputs: dict[str, Any]) -> torch.Tensor:
        """The rows."""
        rows = next(value for value in inputs.values() if isinstance(value, torch.Tensor))
        return torch.tensor([len(rows)], device=rows.device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """The loss of a micro-batch; in training, its share of the step's."""
        items = self.items(inputs)
        loss, outputs = super().compute_loss(model, inputs, True, *args, **kwargs)
        if model.training:
            loss = loss * self.weights(items)[0]
        return (loss, outputs) if return_outputs else loss

    def get_batch_sampler(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Random batches; without duplicates where every other text of a batch counts as wrong."""
        if self.scored:
            sampler: Any = EpochBatchSampler(RandomSampler(dataset, generator=kwargs["generator"]), *args, **kwargs)
        else:
            sampler = NoDuplicatesBatchSampler(dataset, *args, **kwargs)
        if dataset is self.train_dataset:
            self.train_sampler = sampler
        return sampler

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The loss, and the metrics of the embeddings."""
        found = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        scores = self.scores_of("test" if prefix == "test" else "validation", self.model)
        metrics = (found.metrics or {}) | {f"{prefix}_{name}": value for name, value in scores.items()}
        return found._replace(metrics=metrics)

    def test(self) -> tuple[dict[str, float], Any, Any] | None:
        if self.test_dataset is None:
            return None
        found = self.evaluate(self.test_dataset, metric_key_prefix="test")
        return {key.removeprefix("test_"): value for key, value in found.items()}, None, None
