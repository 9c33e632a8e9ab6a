"""``fastbert finetune``: HF Trainer on a file, from raw rows to an ordinary Hugging Face model folder."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from .arguments import DataArguments, FinetuneArguments, ModelArguments, Parsed
from .data import open_split
from .errors import CommandError
from .loading import check_vocabulary, load_config, load_tokenizer, quiet_transformers, sequence_limit
from .report import CURVES, REPORT, history, picture, versions, write_json
from .rows import RowFile, splits_of
from .runs import (
    RUN,
    check_loggers,
    check_processes,
    check_same_run,
    fastbert_report,
    guarded,
    prepare_output,
    resume_command,
    save_model,
    say,
)
from .sharding import check_sharding, wants_sharding
from .task import Task
from .tasks import choose_task
from .trainer import (
    EvaluationLineCallback,
    LossProgressCallback,
    NanCallback,
    PatienceCallback,
    ReplayCallback,
    Resumable,
    StopOnSignal,
    saved_patience,
)


def main(parsed: Parsed, argv: list[str]) -> int:
    """Run ``fastbert finetune``; returns the exit status. Raises CommandError for what the user can mend."""
    model_args, data_args, args = parsed
    return guarded("finetune", args, lambda: _run(model_args, data_args, args, argv))


def _run(model_args: ModelArguments, data_args: DataArguments, args: FinetuneArguments, argv: list[str]) -> int:
    quiet_transformers()
    started = time.perf_counter()
    if not data_args.train_file:
        raise CommandError("--train_file is needed")
    check_loggers(args)
    check_processes(args)
    check_sharding(args)
    if wants_sharding(args) and not args.do_train:
        raise CommandError("--fsdp: only for training; a whole model predicts faster than one in pieces")
    output = Path(str(args.output_dir))
    hub = {"cache_dir": model_args.cache_dir, "revision": model_args.model_revision}
    tokenizer_name = model_args.tokenizer_name or model_args.model_name_or_path
    tokenizer_flag = "--tokenizer_name" if model_args.tokenizer_name else "--model_name_or_path"

    config = load_config(model_args.model_name_or_path, **hub)
    files = _open_files(data_args, args)
    kind = choose_task(data_args, files["train"][0])
    if wants_sharding(args) and not kind.sharding:
        raise CommandError(f"--fsdp: not with --task {kind.name}")
    tokenizer = load_tokenizer(
        tokenizer_name,
        tokenizer_flag,
        **kind.tokenizer_options(config),
        **hub,
    )
    max_length = sequence_limit(config, tokenizer, data_args.max_seq_length)
    task = kind(data_args, args, tokenizer, max_length)
    checkpoint = prepare_output(output, args)
    if args.distributed_state is not None:
        args.distributed_state.wait_for_everyone()  # else one process could find what another has written

    splits = task.read(files)
    _check_metric(args, task)
    run = {
        **task.identity(),
        "seed": args.seed,
        "fsdp": wants_sharding(args),
        "rows": {name: len(split) for name, split in splits.items() if name != "test"},
        "data": {name: split.digest() for name, split in splits.items() if name != "test"},
        "model_name_or_path": model_args.model_name_or_path,
    }
    check_same_run(run, checkpoint)

    set_seed(args.seed)
    task.configure(config)
    model = task.load(model_args, config, **hub)
    check_vocabulary(tokenizer, task.encoder(model), tokenizer_name, tokenizer_flag)
    if data_args.max_seq_length is not None:
        tokenizer.model_max_length = max_length
    if model_args.optimize:
        from fastbert import optimize

        optimize(model)
    if args.process_index == 0:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / RUN, run)

    # With --enable_jit_checkpoint transformers handles SIGTERM itself.
    stop = StopOnSignal((signal.SIGINT,)) if args.enable_jit_checkpoint else StopOnSignal()
    replay = ReplayCallback()
    callbacks: list[Any] = [replay, NanCallback(), stop]
    if args.early_stopping_patience is not None:
        callbacks.append(PatienceCallback(args.early_stopping_patience, args.early_stopping_threshold))
    trainer = task.trainer(model, callbacks)
    replay.trainer = trainer
    metric = (args.metric_for_best_model or next(iter(task.metrics))).removeprefix("eval_")
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(LossProgressCallback())
    trainer.add_callback(EvaluationLineCallback(metric))
    say(_headline(model, task, max_length, model_args.optimize))

    prepared = time.perf_counter()
    stopped = _train(trainer, args, checkpoint, stop)
    trained = time.perf_counter()
    if stopped is not None:
        return stopped

    best = _best(trainer, args)
    test = per_class = None
    if (found := trainer.test()) is not None:
        test = found[0]
        per_class = task.details("test", *found[1:])
    tested = time.perf_counter()
    save_model(trainer, output)
    if not trainer.is_world_process_zero():
        return 0
    curves = history(trainer.state.log_history)
    report = {
        "command": ["fastbert", "finetune", *argv],
        "model": {
            "name_or_path": model_args.model_name_or_path,
            "class": type(model).__name__.removeprefix("FSDP"),
            "model_type": config.model_type,
            "parameters": sum(p.numel() for p in model.parameters()),
            "max_seq_length": max_length,
            "optimize": model_args.optimize,
        },
        "task": task.describe(),
        "data": {name: split.summary() for name, split in splits.items()},
        "history": curves,
        "best": best,
        "test": test,
        "test_per_label": per_class,
        "resumed_from": checkpoint.name if checkpoint else None,
        "steps": trainer.state.global_step,
        "seconds": {
            "prepare": prepared - started,
            "train": trained - prepared,
            "test": tested - trained,
            "total": time.perf_counter() - started,
        },
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "versions": versions(),
        "arguments": args.to_dict() | {"data": asdict(data_args)},
        "fastbert": fastbert_report(model) if model_args.optimize else None,
    }
    write_json(output / REPORT, report)
    plot(output / CURVES, curves, metric, Path(data_args.train_file).stem)
    say(f"model, {REPORT} and {CURVES} are in {output}")
    if best and best["value"] is not None:
        print(f"validation {best['metric']} {best['value']:.4f} (epoch {best['epoch']:.3g})")
    if test:
        shown = [name for name in task.metrics if name in test]
        print("test " + "  ".join(f"{name} {test[name]:.4f}" for name in shown))
    return 0


def _open_files(data_args: DataArguments, args: FinetuneArguments) -> dict[str, tuple[RowFile, str]]:
    """The training, validation and test files, with the flag each came from."""
    assert data_args.train_file is not None
    splits = splits_of(data_args.train_file)
    files = {"train": (open_split(data_args.train_file, "--train_file", "train" if splits else None), "--train_file")}
    for name, path, wanted in (
        ("validation", data_args.validation_file, args.eval_strategy != "no"),
        ("test", data_args.test_file, args.do_predict),
    ):
        if not wanted:
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


def _headline(model: Any, task: Task, max_length: int, optimized: bool) -> str:
    sizes = ", ".join(f"{len(split)} {name}" for name, split in task.splits.items())
    how = "fastbert" if optimized else "stock Hugging Face"
    return (
        f"{task.headline()}; rows: {sizes}; up to {max_length} tokens; "
        f"{type(model).__name__} on {model.device}, {torch.get_num_threads()} threads, {how}"
    )


def _train(trainer: Resumable, args: FinetuneArguments, checkpoint: Path | None, stop: StopOnSignal) -> int | None:
    """Train; returns an exit status if the run was stopped by a signal, else None."""
    if not args.do_train:
        if checkpoint is not None:
            trainer._load_from_checkpoint(str(checkpoint))
        return None
    if checkpoint is not None and args.early_stopping_patience is not None:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if saved_patience(state.get("stateful_callbacks", {})) >= args.early_stopping_patience:
            # It had stopped early and was killed before the end: one more epoch would be a different result.
            trainer.args.num_train_epochs, trainer.args.max_steps = state["epoch"], state["global_step"]
    with stop:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.caught is not None and trainer.state.global_step < trainer.state.max_steps:
        steps = f"{trainer.state.global_step} of {trainer.state.max_steps}"
        say(f"stopped at step {steps}. Go on with: {resume_command('finetune', args)}")
        return 128 + stop.caught
    return None


def _best(trainer: Resumable, args: FinetuneArguments) -> dict[str, Any] | None:
    state = trainer.state
    if state.best_metric is None:
        return None
    at_best = [e for e in state.log_history if e.get("step") == state.best_global_step and "eval_loss" in e]
    return {
        "metric": (args.metric_for_best_model or "").removeprefix("eval_"),
        "value": state.best_metric,
        "step": state.best_global_step,
        "epoch": at_best[0]["epoch"] if at_best else None,
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
