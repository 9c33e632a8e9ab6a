"""``fastbert finetune``: HF Trainer on a file, from raw rows to an ordinary Hugging Face model folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import DataCollatorWithPadding, ProgressCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from .arguments import DataArguments, FinetuneArguments, ModelArguments, Parsed
from .checkpoints import checkpoint_problem, checkpoints, last_complete
from .data import (
    Split,
    check_columns,
    choose_text_columns,
    hold_out,
    known_columns,
    open_split,
    read_split,
    split_names,
)
from .errors import CommandError, first_line, is_disk_full
from .labels import METRICS, MULTI, REGRESSION, SINGLE, Labels, find_labels, metrics_for, per_label
from .loading import check_vocabulary, load_classifier, load_config, load_tokenizer, quiet_transformers, sequence_limit
from .report import CURVES, REPORT, history, plot, versions, write_json
from .rows import RowFile, splits_of
from .trainer import (
    EvaluationLineCallback,
    FinetuneTrainer,
    LossProgressCallback,
    NanCallback,
    PatienceCallback,
    ReplayCallback,
    StopOnSignal,
    saved_patience,
)

RUN = "run.json"  # marks a folder as one of ours, and says what a resumed run must agree with


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(parsed: Parsed, argv: list[str]) -> int:
    """Run ``fastbert finetune``; returns the exit status. Raises CommandError for what the user can mend."""
    model_args, data_args, args = parsed
    try:
        return _run(model_args, data_args, args, argv)
    except (OSError, RuntimeError) as error:
        if not is_disk_full(error):
            if isinstance(error, OSError) and error.filename:
                raise CommandError(f"{error.filename}: {error.strerror}") from error
            raise
        raise CommandError(
            f"--output_dir {args.output_dir}: no space left ({first_line(error)}). Finished checkpoints are intact; "
            "free some space and go on with --resume_from_checkpoint true"
        ) from error
    except KeyboardInterrupt:
        _say(f"\nstopped. Go on from the last complete checkpoint with: {_resume_command(args)}")
        return 130


def _resume_command(args: FinetuneArguments) -> str:
    return f"fastbert finetune … --output_dir {args.output_dir} --resume_from_checkpoint true"


def _run(model_args: ModelArguments, data_args: DataArguments, args: FinetuneArguments, argv: list[str]) -> int:
    quiet_transformers()
    started = time.perf_counter()
    if not data_args.train_file:
        raise CommandError("--train_file is needed")
    output = Path(str(args.output_dir))
    hub = {"cache_dir": model_args.cache_dir, "revision": model_args.model_revision}
    tokenizer_name = model_args.tokenizer_name or model_args.model_name_or_path

    config = load_config(model_args.model_name_or_path, **hub)
    tokenizer = load_tokenizer(
        tokenizer_name, "--tokenizer_name" if model_args.tokenizer_name else "--model_name_or_path", **hub
    )
    max_length = sequence_limit(config, tokenizer, data_args.max_seq_length)
    files = _open_files(data_args, args)
    checkpoint = _prepare_output(output, args)
    if args.distributed_state is not None:
        args.distributed_state.wait_for_everyone()  # else one process could find what another has written

    splits, labels, encoded = _read(files, data_args, args, tokenizer, max_length)
    _check_metric(args, labels)
    run = {
        "labels": labels.names,
        "problem_type": labels.kind,
        "seed": args.seed,
        "rows": {name: len(split) for name, split in splits.items() if name != "test"},
        "data": {name: split.digest() for name, split in splits.items() if name != "test"},
        "model_name_or_path": model_args.model_name_or_path,
    }
    _check_same_run(output, run, checkpoint)

    set_seed(args.seed)
    config.problem_type = cast(Any, labels.kind)
    config.num_labels = labels.num_labels
    config.id2label = dict(enumerate(labels.names))
    config.label2id = {name: i for i, name in enumerate(labels.names)}
    model = load_classifier(
        model_args.model_name_or_path,
        config,
        trained=False,
        ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
        **hub,
    )
    check_vocabulary(tokenizer, model, tokenizer_name)
    if data_args.max_seq_length is not None:
        tokenizer.model_max_length = max_length
    if model_args.optimize:
        from fastbert import optimize

        optimize(model)
    if args.process_index == 0:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / RUN, run)

    datasets = {name: split.dataset(encoded[name], labels.kind != SINGLE) for name, split in splits.items()}
    lengths = splits["train"].tokens["input_ids"].combine_chunks().value_lengths().to_pylist()
    # With --enable_jit_checkpoint transformers handles SIGTERM itself.
    stop = StopOnSignal((signal.SIGINT,)) if args.enable_jit_checkpoint else StopOnSignal()
    replay = ReplayCallback()
    callbacks: list[Any] = [replay, NanCallback(), stop]
    if args.early_stopping_patience is not None:
        callbacks.append(PatienceCallback(args.early_stopping_patience, args.early_stopping_threshold))
    trainer = FinetuneTrainer(
        model=model,
        args=args,
        train_dataset=datasets["train"],
        eval_dataset=datasets.get("validation"),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=metrics_for(labels),
        callbacks=callbacks,
        train_lengths=lengths,
    )
    replay.trainer = trainer
    metric = (args.metric_for_best_model or next(iter(METRICS[labels.kind]))).removeprefix("eval_")
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(LossProgressCallback())
    trainer.add_callback(EvaluationLineCallback(metric))
    _say(_headline(model, labels, splits, max_length, model_args.optimize))

    prepared = time.perf_counter()
    stopped = _train(trainer, args, checkpoint, stop)
    trained = time.perf_counter()
    if stopped is not None:
        return stopped

    best = _best(trainer, args)
    test = per_class = None
    if "test" in datasets:
        predicted = trainer.predict(datasets["test"], metric_key_prefix="test")
        test = {key.removeprefix("test_"): value for key, value in (predicted.metrics or {}).items()}
        logits = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
        per_class = per_label(labels, np.asarray(logits), np.asarray(predicted.label_ids))
    tested = time.perf_counter()
    if not trainer.is_world_process_zero():
        return 0
    _save_model(trainer, output)
    curves = history(trainer.state.log_history)
    report = {
        "command": ["fastbert", "finetune", *argv],
        "model": {
            "name_or_path": model_args.model_name_or_path,
            "class": type(model).__name__,
            "model_type": config.model_type,
            "parameters": sum(p.numel() for p in model.parameters()),
            "max_seq_length": max_length,
            "optimize": model_args.optimize,
        },
        "task": {"problem_type": labels.kind, "labels": labels.names},
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
        "fastbert": _fastbert_report(model) if model_args.optimize else None,
    }
    write_json(output / REPORT, report)
    plot(output / CURVES, curves, metric, Path(data_args.train_file).stem)
    _say(f"model, {REPORT} and {CURVES} are in {output}")
    if best and best["value"] is not None:
        print(f"validation {best['metric']} {best['value']:.4f} (epoch {best['epoch']:.3g})")
    if test:
        shown = [name for name in METRICS[labels.kind] if name in test]
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


def _read(
    files: dict[str, tuple[RowFile, str]],
    data_args: DataArguments,
    args: FinetuneArguments,
    tokenizer: Any,
    max_length: int,
) -> tuple[dict[str, Split], Labels, dict[str, list[Any]]]:
    """Read and encode every file; hold out a part of the training data if there is no validation file."""
    train_rows = files["train"][0]
    columns = split_names(data_args.label_column_name or ["label"], known_columns(train_rows))
    check_columns(columns, train_rows, "--label_column_name")
    text = choose_text_columns(
        train_rows,
        data_args.text_column_name,
        data_args.text_column_delimiter,
        data_args.text_pair_column_name,
        columns,
    )
    splits: dict[str, Split] = {}
    labels: Labels | None = None
    encoded: dict[str, list[Any]] = {}
    limits = {
        "train": data_args.max_train_samples,
        "validation": data_args.max_eval_samples,
        "test": data_args.max_predict_samples,
    }
    for name, (rows, argument) in files.items():
        if name != "train":
            check_columns(columns, rows, f"--label_column_name, for {argument}")
            check_columns(text.all, rows, f"--text_column_name, for {argument}")
        kind = labels.kind if labels else data_args.problem_type
        split = read_split(
            rows,
            argument,
            text,
            columns,
            tokenizer,
            max_length,
            max_rows=limits[name],
            on_bad_row=data_args.on_bad_row,
            empty_label=kind == MULTI,
            quiet=bool(args.disable_tqdm),
        )
        if labels is None:
            known = rows.label_names.get(columns[0]) if len(columns) == 1 else None
            labels = find_labels(split.labels, columns, data_args.problem_type, data_args.label_delimiter, known)
        encoded[name] = labels.encode(split.labels, split.lines, split.source, argument)
        splits[name] = split
    assert labels is not None
    if args.eval_strategy != "no" and "validation" not in splits:
        share = data_args.validation_split_percentage / 100
        if share == 0:
            raise CommandError("no --validation_file and --validation_split_percentage 0: give --eval_strategy no too")
        whole = splits["train"]
        kept, held = hold_out(encoded["train"], share, args.seed, labels.kind == SINGLE)
        _say(
            f"no validation file: {len(held)} of {len(whole)} training rows are held out for it "
            f"(--validation_split_percentage {data_args.validation_split_percentage:g}, --seed {args.seed})"
        )
        parts = {"train": whole.take(kept), "validation": whole.take(held)}
        parts["train"].bad, parts["train"].truncated = whole.bad, whole.truncated
        encoded |= {"train": [encoded["train"][i] for i in kept], "validation": [encoded["train"][i] for i in held]}
        splits |= parts
    for name, split in splits.items():
        if split.truncated:
            _say(f"{name}: {split.truncated} texts are longer than {max_length} tokens and were cut (--max_seq_length)")
    return splits, labels, encoded


def _check_metric(args: FinetuneArguments, labels: Labels) -> None:
    """Fill in, or check, what the best checkpoint is best at."""
    known = METRICS[labels.kind]
    if args.label_smoothing_factor and labels.kind != SINGLE:
        raise CommandError(f"--label_smoothing_factor: only for {SINGLE}, this is {labels.kind}")
    if args.metric_for_best_model is None:
        return
    if args.default_metric:
        args.metric_for_best_model = next(iter(known))
    name = args.metric_for_best_model.removeprefix("eval_")
    if name not in known:
        raise CommandError(f"--metric_for_best_model {name}: {labels.kind} has {', '.join(known)}")
    if args.default_direction:
        args.greater_is_better = known[name]


def _prepare_output(output: Path, args: FinetuneArguments) -> Path | None:
    """Check that ``output`` may be written to; returns the checkpoint to resume from, or None to start anew."""
    resume = args.resume_from_checkpoint
    if output.exists() and not output.is_dir():
        raise CommandError(f"--output_dir {output}: a file is in the way")
    resumable = not args.save_only_model
    if resume is not None and resume.lower() not in ("true", "false", "1", "0"):
        if problem := checkpoint_problem(resume, resumable=resumable):
            raise CommandError(f"--resume_from_checkpoint {resume}: not a complete checkpoint: {problem}")
        return Path(resume)
    content = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    ours = RUN in content or any(checkpoints(output))
    if resume is not None and resume.lower() in ("true", "1"):
        if content and not ours:
            raise CommandError(f"--output_dir {output}: holds no run to resume (but {content[0]!r})")
        found = last_complete(output, resumable=resumable, remove=args.process_index == 0)
        _say(f"resuming from {found}" if found else f"no complete checkpoint in {output} yet: starting anew")
        return found
    if not content:
        return None
    if not args.overwrite_output_dir:
        hint = "go on with --resume_from_checkpoint true, or " if ours else ""
        raise CommandError(
            f"--output_dir {output}: not empty (it holds {', '.join(map(repr, content[:3]))}"
            f"{' …' if len(content) > 3 else ''}); choose another, {hint}start anew with --overwrite_output_dir"
        )
    if args.process_index != 0:
        return None
    for path in checkpoints(output):
        shutil.rmtree(path)
    for name in (RUN, REPORT, CURVES):
        (output / name).unlink(missing_ok=True)
    return None


def _check_same_run(output: Path, run: dict[str, Any], checkpoint: Path | None) -> None:
    """Refuse to resume with other labels or data, which would go wrong late or, worse, unnoticed."""
    if checkpoint is None:
        return
    try:
        before = json.loads((checkpoint.parent / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    before.setdefault("labels", list((config.get("id2label") or {}).values()))
    for key, value in run.items():
        if key in before and before[key] != value and key != "model_name_or_path":
            raise CommandError(
                f"--resume_from_checkpoint {checkpoint}: that run had other {key} ({_short(before[key])}) "
                f"than this one ({_short(value)}); resume with the same data and flags, or start anew"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "…"


def _headline(model: Any, labels: Labels, splits: dict[str, Split], max_length: int, optimized: bool) -> str:
    sizes = ", ".join(f"{len(split)} {name}" for name, split in splits.items())
    what = f"{labels.num_labels} target(s)" if labels.kind == REGRESSION else f"{labels.num_labels} labels"
    how = "fastbert" if optimized else "stock Hugging Face"
    return (
        f"{labels.kind.replace('_', ' ')}, {what}; rows: {sizes}; up to {max_length} tokens; "
        f"{type(model).__name__} on {model.device}, {torch.get_num_threads()} threads, {how}"
    )


def _train(
    trainer: FinetuneTrainer, args: FinetuneArguments, checkpoint: Path | None, stop: StopOnSignal
) -> int | None:
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
        _say(f"stopped at step {steps}. Go on with: {_resume_command(args)}")
        return 128 + stop.caught
    return None


def _best(trainer: FinetuneTrainer, args: FinetuneArguments) -> dict[str, Any] | None:
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


def _save_model(trainer: FinetuneTrainer, output: Path) -> None:
    """Write the final model next to its place, then move it there file by file."""
    partial = output / ".model.part"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        trainer.save_model(str(partial), _internal_call=True)
        # It unpickles only where fastbert is installed; report.json has the same flags.
        (partial / "training_args.bin").unlink(missing_ok=True)
        for path in sorted(partial.iterdir()):
            os.replace(path, output / path.name)
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise CommandError(
            f"--output_dir {output}: no space left for the final model ({first_line(error)}). The checkpoints are "
            "intact; free some space and finish with --resume_from_checkpoint true"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fastbert_report(model: Any) -> dict[str, Any]:
    from fastbert import report

    return report(model).as_dict()
