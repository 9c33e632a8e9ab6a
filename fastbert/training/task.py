"""What every task of ``fastbert finetune`` shares: from files to splits, and what the trainer asks of a task."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .arguments import DataArguments, FinetuneArguments, ModelArguments
from .data import Item, RowReader, Split, hold_out
from .errors import CommandError
from .loading import load_model
from .rows import RowFile
from .runs import say
from .trainer import FinetuneTrainer, Resumable

if TYPE_CHECKING:
    from transformers import EvalPrediction, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Files = dict[str, tuple[RowFile, str]]  # split -> file, and the flag that named it

# Flags of DataArguments that every task has; the others belong to the tasks that list them.
SHARED_FLAGS = {
    "task",
    "train_file",
    "validation_file",
    "test_file",
    "max_seq_length",
    "validation_split_percentage",
    "max_train_samples",
    "max_eval_samples",
    "max_predict_samples",
    "on_bad_row",
}


def check_flags(name: str, own: frozenset[str], data_args: DataArguments) -> None:
    """Raise CommandError for a flag that the task would ignore."""
    for flag in fields(data_args):
        if flag.name in SHARED_FLAGS | own or getattr(data_args, flag.name) == flag.default:
            continue
        raise CommandError(f"--{flag.name}: not a flag of --task {name}")


class Task:
    """A kind of fine-tuning. :meth:`read` comes first; all else speaks of what it has read."""

    name: ClassVar[str]
    head: ClassVar[str]  # transformers' Auto class of the model
    flags: ClassVar[frozenset[str]]  # of DataArguments, besides SHARED_FLAGS
    label_smoothing: ClassVar[bool] = False  # whether --label_smoothing_factor means something
    sharding: ClassVar[bool] = True  # whether --fsdp can be used
    in_order: ClassVar[bool] = False  # whether compute_metrics needs predictions in the order of the features
    metrics: dict[str, bool]  # metric -> whether greater is better; the first one chooses the best checkpoint

    def __init__(
        self,
        data_args: DataArguments,
        args: FinetuneArguments,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
    ) -> None:
        self.data_args = data_args
        self.args = args
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.splits: dict[str, Split] = {}
        check_flags(self.name, self.flags, data_args)

    @classmethod
    def tokenizer_options(cls, config: PreTrainedConfig) -> dict[str, Any]:
        """What the tokenizer must be loaded with."""
        return {}

    # Reading

    def read(self, files: Files) -> dict[str, Split]:
        """Read every file; a part of the training data is held out if there is no validation file."""
        self.choose_columns(files["train"][0])
        for name, (rows, argument) in files.items():
            if name != "train":
                self.check_file(rows, argument)
            self.splits[name] = self.read_file(name, rows, argument)
        if self.args.eval_strategy != "no" and "validation" not in self.splits:
            self._hold_out()
        for name, split in self.splits.items():
            self.remark(name, split)
        return self.splits

    def choose_columns(self, train: RowFile) -> None:
        """Settle which columns of the training file are used. Raises CommandError where they are missing."""
        raise NotImplementedError

    def check_file(self, rows: RowFile, argument: str) -> None:
        """Raise CommandError if a validation or test file lacks the columns."""
        raise NotImplementedError

    def read_file(self, name: str, rows: RowFile, argument: str) -> Split:
        """Read and encode one file. Raises CommandError."""
        raise NotImplementedError

    def reader(
        self, name: str, rows: RowFile, argument: str, parse: Callable[[dict[str, Any]], Item]
    ) -> RowReader[Item]:
        """A reader that keeps to the flags about rows."""
        limits = {
            "train": self.data_args.max_train_samples,
            "validation": self.data_args.max_eval_samples,
            "test": self.data_args.max_predict_samples,
        }
        return RowReader(rows, argument, parse, limits[name], self.data_args.on_bad_row, bool(self.args.disable_tqdm))

    def strata(self, split: Split) -> Sequence[Any] | None:
        """What a held-out part should have in the same shares as the rest."""
        return None

    def groups(self, split: Split) -> Sequence[Hashable] | None:
        """What rows must not be parted by holding some of them out."""
        return None

    def _hold_out(self) -> None:
        share = self.data_args.validation_split_percentage / 100
        if share == 0:
            raise CommandError("no --validation_file and --validation_split_percentage 0: give --eval_strategy no too")
        whole = self.splits["train"]
        kept, held = hold_out(len(whole), share, self.args.seed, strata=self.strata(whole), groups=self.groups(whole))
        say(
            f"no validation file: {len(held)} of {len(whole)} training rows are held out for it "
            f"(--validation_split_percentage {self.data_args.validation_split_percentage:g}, --seed {self.args.seed})"
        )
        self.splits["validation"] = whole.take(held)
        self.splits["train"] = whole.take(kept)
        self.splits["train"].bad = whole.bad
        self.splits["train"].counts = whole.counts | self.splits["train"].counts

    def remark(self, name: str, split: Split) -> None:
        """Tell the user what was done to long rows, and the like."""
        if cut := split.counts.get("truncated_texts"):
            say(f"{name}: {cut} texts are longer than {self.max_length} tokens and were cut (--max_seq_length)")

    # What a run is known by

    def identity(self) -> dict[str, Any]:
        """What a resumed run must agree with, besides its data."""
        return {"task": self.name}

    def describe(self) -> dict[str, Any]:
        """For the report."""
        return {"name": self.name}

    def headline(self) -> str:
        """The kind of task in a few words."""
        return self.name.replace("_", " ")

    # Training

    def configure(self, config: PreTrainedConfig) -> None:
        """Set what the head needs."""

    def load(
        self, model_args: ModelArguments, config: PreTrainedConfig, *, trained: bool = False, **hub: Any
    ) -> PreTrainedModel:
        """The model to train, or one that is ``trained`` and has no new weights. Raises CommandError."""
        model, _ = load_model(
            self.head,
            model_args.model_name_or_path,
            config,
            trained=f"model for {self.name}" if trained else None,
            ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
            **hub,
        )
        return model

    def encoder(self, model: Any) -> PreTrainedModel:
        """The part of the model that has the word embeddings."""
        return model

    def collator(self) -> Any:
        """Makes a batch of features."""
        raise NotImplementedError

    def compute_metrics(self, name: str, prediction: EvalPrediction) -> dict[str, float]:
        """The metrics of split ``name``; keys are those of :attr:`metrics` but ``loss``."""
        raise NotImplementedError

    reduce_logits: Callable[[Any, Any], Any] | None = None  # what of a batch's logits is kept for the metrics

    def details(self, name: str, predictions: Any, label_ids: Any) -> dict[str, Any] | None:
        """Figures of each class, for the report."""
        return None

    def trainer(self, model: Any, callbacks: list[Any]) -> Resumable:
        """The trainer of this task."""
        datasets = {name: split.dataset() for name, split in self.splits.items()}
        return FinetuneTrainer(
            model=model,
            args=self.args,
            train_dataset=datasets["train"],
            eval_dataset=datasets.get("validation"),
            test_dataset=datasets.get("test"),
            processing_class=self.tokenizer,
            data_collator=self.collator(),
            metrics_of=self.compute_metrics,
            in_order=self.in_order,
            preprocess_logits_for_metrics=self.reduce_logits,
            callbacks=callbacks,
            train_lengths=self.splits["train"].lengths(),
        )


def first_output(predictions: Any) -> np.ndarray:
    """The logits among what the trainer gathered."""
    return np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)
