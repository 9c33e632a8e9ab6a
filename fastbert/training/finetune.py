"""``fastbert finetune``: HF Trainer on a file, from raw rows to an ordinary Hugging Face model folder."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch

from .arguments import DataArguments, FinetuneArguments, parse
from .data import Split, open_split
from .errors import CommandError
from .loading import check_family, check_vocabulary, load_config, load_tokenizer, sequence_limit
from .report import history, picture
from .rows import RowFile, splits_of
from .runs import Run, say
from .sharding import wants_sharding
from .task import Task
from .tasks import choose_task
from .trainer import (
    EvaluationLineCallback,
    PatienceCallback,
    ReplayCallback,
    Resumable,
    StopOnSignal,
    saved_patience,
)


def main(argv: list[str]) -> int:
    """Run ``fastbert finetune``; returns the exit status. Raises CommandError for what the user can mend."""
    return FinetuneRun(*parse(argv), argv).main()


class FinetuneRun(Run):
    """A run of ``fastbert finetune``."""

    command = "finetune"
    files: dict[str, tuple[RowFile, str]]
    task: Task
    splits: dict[str, Split]

    def open(self) -> None:
        args, data_args = self.args, self.data_args
        if not data_args.train_file:
            raise CommandError("--train_file is needed")
        if wants_sharding(args) and not args.do_train:
            raise CommandError("--fsdp: only for training; a whole model predicts faster than one in pieces")
        self.config = load_config(self.model_args.model_name_or_path, **self.hub)
        if self.model_args.optimize:
            check_family(self.config, self.model_args.model_name_or_path)
        self.files = _open_files(data_args, args)
        kind = choose_task(data_args, self.files["train"][0])
        if wants_sharding(args) and not kind.sharding:
            raise CommandError(f"--fsdp: not with --task {kind.name}")
        options = kind.tokenizer_options(self.config)
        self.tokenizer = load_tokenizer(self.tokenizer_name, self.tokenizer_flag, **options, **self.hub)
        self.max_seq_length = sequence_limit(self.config, self.tokenizer, data_args.max_seq_length)
        self.task = kind(data_args, args, self.tokenizer, self.max_seq_length)

    def identity(self) -> dict[str, Any]:
        self.splits = self.task.read(self.files)
        _check_metric(self.args, self.task)
        names = [name for name in self.splits if name != "test"]
        return {
            **self.task.identity(),
            "rows": {name: len(self.splits[name]) for name in names},
            "data": {name: self.splits[name].digest() for name in names},
        }

    def load(self) -> Any:
        self.task.configure(self.config)
        # A new head that is not trained would be random.
        trained = not self.args.do_train and self.checkpoint is None
        model = self.task.load(self.model_args, self.config, trained=trained, **self.hub)
        check_vocabulary(self.tokenizer, self.task.encoder(model), self.tokenizer_name, self.tokenizer_flag)
        if self.data_args.max_seq_length is not None:
            self.tokenizer.model_max_length = self.max_seq_length
        return model

    @property
    def metric(self) -> str:
        """What the best checkpoint is best at."""
        return (self.args.metric_for_best_model or next(iter(self.task.metrics))).removeprefix("eval_")

    def make_trainer(self, callbacks: list[Any]) -> Resumable:
        replay = ReplayCallback()
        callbacks = [replay, *callbacks]
        if self.args.early_stopping_patience is not None:
            callbacks.append(PatienceCallback(self.args.early_stopping_patience, self.args.early_stopping_threshold))
        replay.trainer = self.task.trainer(self.model, callbacks)
        return replay.trainer

    def headline(self) -> str:
        sizes = ", ".join(f"{len(split)} {name}" for name, split in self.splits.items())
        how = "fastbert" if self.model_args.optimize else "stock Hugging Face"
        return (
            f"{self.task.headline()}; rows: {sizes}; up to {self.max_seq_length} tokens; "
            f"{type(self.model).__name__} on {self.model.device}, {torch.get_num_threads()} threads, {how}"
        )

    def train(self, stop: StopOnSignal) -> None:
        args, trainer = self.args, self.trainer
        trainer.add_callback(EvaluationLineCallback(self.metric))
        if not args.do_train:
            if self.checkpoint is not None:
                trainer._load_from_checkpoint(str(self.checkpoint))
            if trainer.eval_dataset is not None:
                trainer.evaluate()
            return
        if self.checkpoint is not None and args.early_stopping_patience is not None:
            state = json.loads((self.checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            if saved_patience(state.get("stateful_callbacks", {})) >= args.early_stopping_patience:
                # It had stopped early and was killed before the end: one more epoch would be a different result.
                trainer.args.num_train_epochs, trainer.args.max_steps = state["epoch"], state["global_step"]
        super().train(stop)

    def test(self) -> None:
        started = time.perf_counter()
        self.tested: dict[str, Any] = {"test": None, "test_per_label": None}
        if (found := self.trainer.test()) is not None:
            self.tested = {"test": found[0], "test_per_label": self.task.details("test", *found[1:])}
        self.seconds["test"] = time.perf_counter() - started

    def report(self) -> dict[str, Any]:
        return {
            "task": self.task.describe(),
            "data": {name: split.summary() for name, split in self.splits.items()},
            "history": history(self.trainer.state.log_history),
            "best": _best(self.trainer, self.args),
            **self.tested,
        }

    def plot(self, path: Path, report: dict[str, Any]) -> None:
        plot(path, report["history"], self.metric, Path(self.data_args.train_file).stem)

    def summary(self, report: dict[str, Any]) -> list[str]:
        best, test, lines = report["best"], report["test"], []
        if not self.args.do_train:
            lines += [f"validation {self.metric} {e[self.metric]:.4f}" for e in report["history"]["eval"]]
        if best and best["value"] is None:
            problem = "undefined (NaN) in every evaluation; the model is that of the last step"
            lines.append(f"validation {best['metric']} {problem}")
        elif best:
            lines.append(f"validation {best['metric']} {best['value']:.4f} (epoch {best['epoch']:.3g})")
        if test:
            shown = [name for name in self.task.metrics if name in test]
            lines.append("test " + "  ".join(f"{name} {test[name]:.4f}" for name in shown))
        return lines


def _open_files(data_args: DataArguments, args: FinetuneArguments) -> dict[str, tuple[RowFile, str]]:
    """The training, validation and test files, with the flag each came from."""
    assert data_args.train_file is not None
    splits = splits_of(data_args.train_file)
    files = {"train": (open_split(data_args.train_file, "--train_file", "train" if splits else None), "--train_file")}
    for name, path, wanted, without in (
        ("validation", data_args.validation_file, args.eval_strategy != "no", "nothing is evaluated in training"),
        ("test", data_args.test_file, args.do_predict, "--do_predict is false"),
    ):
        if not wanted:
            if path:
                say(f"--{name}_file {path} is not read: {without}")
            continue
        if path:
            own = splits_of(path)
            part = name if name in own else None
            files[name] = (open_split(path, f"--{name}_file", part), f"--{name}_file")
        elif name in splits:
            files[name] = (open_split(data_args.train_file, "--train_file", name), f"--train_file ({name} split)")
    return files


def _check_metric(args: FinetuneArguments, task: Task) -> None:
    """Fill in, or check, what the best checkpoint is best at."""
    known, what = task.metrics, task.describe().get("problem_type", task.name)
    if args.label_smoothing_factor and not task.label_smoothing:
        raise CommandError(f"--label_smoothing_factor: only for classes, this is {what}")
    if args.metric_for_best_model is None:
        return
    if args.default_metric:
        args.metric_for_best_model = next(iter(known))
    name = args.metric_for_best_model.removeprefix("eval_")
    if name not in known:
        raise CommandError(f"--metric_for_best_model {name}: {what} has {', '.join(known)}")
    if args.default_direction:
        args.greater_is_better = known[name]


def _best(trainer: Resumable, args: FinetuneArguments) -> dict[str, Any] | None:
    state, metric = trainer.state, (args.metric_for_best_model or "").removeprefix("eval_")
    if state.best_metric is None:
        return None
    # The step is kept only with a checkpoint. Where every evaluation gave NaN, the value is infinite and none is found.
    at_best = [
        entry
        for entry in state.log_history
        if entry.get(f"eval_{metric}") == state.best_metric and state.best_global_step in (None, entry["step"])
    ]
    best = at_best[0] if at_best else {}
    return {
        "metric": metric,
        "value": best.get(f"eval_{metric}"),
        "step": best.get("step"),
        "epoch": best.get("epoch"),
        "checkpoint": os.path.basename(state.best_model_checkpoint or "") or None,
    }


def plot(path: Path, curves: dict[str, list[dict[str, Any]]], metric: str, title: str) -> None:
    """Losses and the chosen metric over epochs."""
    train, evaluations = curves["train"], curves["eval"]
    with picture(path, title, 9, 2) as (left, right):
        left.plot([e["epoch"] for e in train], [e["loss"] for e in train], label="training", linewidth=1)
        if evaluations:
            epochs = [e["epoch"] for e in evaluations]
            left.plot(epochs, [e["loss"] for e in evaluations], "o-", label="validation")
            right.plot(epochs, [e.get(metric, math.nan) for e in evaluations], "o-", color="C1", label="validation")
        left.set(xlabel="epoch", ylabel="loss")
        right.set(xlabel="epoch", ylabel=metric)
