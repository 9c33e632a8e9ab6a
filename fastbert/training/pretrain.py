"""``fastbert pretrain``: HF Trainer over prepared data, to an ordinary Hugging Face model folder."""

from __future__ import annotations

import inspect
import json
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import transformers
from transformers import AutoConfig, ProgressCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from .batching import Batches, Masking, Phase, TokenBudget, row_lengths
from .errors import CommandError, first_line
from .loading import (
    LOAD_ERRORS,
    check_vocabulary,
    load_config,
    load_model,
    load_tokenizer,
    quiet_transformers,
    sequence_limit,
)
from .prepare import SETTINGS, tokenizer_digest
from .pretraining_arguments import Parsed, PretrainArguments, PretrainDataArguments, PretrainModelArguments, parse
from .pretraining_trainer import PretrainingTrainer, TimingCallback
from .report import CURVES, REPORT, picture, versions, write_json
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
from .shards import PAIRS
from .throughput import Work, peak_flops
from .trainer import LossProgressCallback, NanCallback, StopOnSignal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def main(argv: list[str]) -> int:
    """Run ``fastbert pretrain``; returns the exit status. Raises CommandError for what the user can mend."""
    parsed = parse(argv)
    return guarded("pretrain", parsed[2], lambda: _run(parsed, argv))


def _run(parsed: Parsed, argv: list[str]) -> int:
    model_args, data_args, args = parsed
    quiet_transformers()
    check_loggers(args)
    check_processes(args)
    check_sharding(args)
    started = time.perf_counter()
    output = Path(str(args.output_dir))
    name = model_args.tokenizer_name or cast(str, model_args.model_name_or_path)
    hub = {"cache_dir": model_args.cache_dir, "revision": model_args.model_revision}
    flag = "--tokenizer_name" if model_args.tokenizer_name else "--model_name_or_path"
    tokenizer = load_tokenizer(name, flag, **hub)
    prepared = [_open_dataset(path, tokenizer) for path in data_args.dataset]
    pairs = _same_format(data_args, [settings for _, settings in prepared])
    config = _config(model_args, tokenizer, **hub)
    for path, (_, settings) in zip(data_args.dataset, prepared, strict=True):
        if settings["max_seq_length"] > sequence_limit(config, tokenizer, None):
            raise CommandError(
                f"--dataset {path}: rows have up to {settings['max_seq_length']} tokens, the model has "
                f"{sequence_limit(config, tokenizer, None)} positions"
            )
    phases = _phases(data_args, args, prepared, fixed=bool(args.torch_compile and model_args.optimize))
    masking = Masking(tokenizer, data_args.mlm_probability, data_args.whole_word_mask)
    checkpoint = prepare_output(output, args)
    if args.distributed_state is not None:
        args.distributed_state.wait_for_everyone()  # else one process could find what another has written
    run = _identity(model_args, data_args, args, phases, prepared, config)
    check_same_run(run, checkpoint)

    set_seed(args.seed)
    model = _model(model_args, config, pairs, **hub)
    check_vocabulary(tokenizer, model, name, flag)
    if model_args.optimize:
        from fastbert import optimize

        optimize(model)
    if args.process_index == 0:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / RUN, run)

    batches = Batches(
        phases,
        masking,
        args.data_seed if args.data_seed is not None else args.seed,
        config.vocab_size,
        cast(int, tokenizer.pad_token_id),
        rank=args.process_index,
        ranks=args.world_size,
    )
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    peak, peak_kind = peak_flops(args.device, dtype)
    stop = StopOnSignal((signal.SIGINT,)) if args.enable_jit_checkpoint else StopOnSignal()
    timing = TimingCallback()
    trainer = PretrainingTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        callbacks=[NanCallback(), stop, timing],
        batches=batches,
        work=Work(config),
        peak=peak,
        bound=phases[0].budget.tokens if model_args.optimize else None,
    )
    timing.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(LossProgressCallback())
    say(_headline(model, phases, args, model_args.optimize))

    begun = time.perf_counter()
    with stop:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.caught is not None and trainer.state.global_step < trainer.state.max_steps:
        steps = f"{trainer.state.global_step} of {trainer.state.max_steps}"
        say(f"stopped at step {steps}. Go on with: {resume_command('pretrain', args)}")
        return 128 + stop.caught
    trained = time.perf_counter()
    save_model(trainer, output)
    if not trainer.is_world_process_zero():
        return 0
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    report = {
        "command": ["fastbert", "pretrain", *argv],
        "model": {
            "name_or_path": model_args.model_name_or_path,
            "class": type(model).__name__.removeprefix("FSDP"),
            "model_type": config.model_type,
            "parameters": sum(p.numel() for p in model.parameters()),
            "optimize": model_args.optimize,
        },
        "data": [
            {
                "folder": phase.name,
                "rows": len(phase.dataset),
                "max_seq_length": settings["max_seq_length"],
                "format": settings["format"],
                "unigram_entropy": unigram_entropy(Path(phase.name)),
                "epochs": phase.batches * args.world_size / phase.budget.per_epoch(),
                "steps": phase.batches // args.gradient_accumulation_steps,
            }
            for phase, (_, settings) in zip(phases, prepared, strict=True)
        ],
        "tokens_per_step": phases[0].budget.tokens * args.world_size * args.gradient_accumulation_steps,
        "peak": {"flops": peak, "how": peak_kind, "processes": args.world_size},
        "history": log,
        "resumed_from": checkpoint.name if checkpoint else None,
        "steps": trainer.state.global_step,
        "seconds": {"prepare": begun - started, "train": trained - begun, "total": time.perf_counter() - started},
        "threads": torch.get_num_threads(),
        "device": str(args.device),
        "versions": versions(),
        "arguments": args.to_dict() | {"data": asdict(data_args), "model": asdict(model_args)},
        "fastbert": fastbert_report(model) if model_args.optimize else None,
    }
    write_json(output / REPORT, report)
    plot(output / CURVES, log, Path(data_args.dataset[0]).name, report["data"][0]["unigram_entropy"])
    say(f"model, {REPORT} and {CURVES} are in {output}")
    if log:
        print(_summary(log[-1]))
    return 0


def _open_dataset(path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, dict[str, Any]]:
    """A prepared dataset and how it was made. Raises CommandError for anything else."""
    import datasets
    import pyarrow as pa

    folder = Path(path)
    if not (folder / SETTINGS).is_file():
        raise CommandError(f"--dataset {path}: not a folder made by fastbert prepare (it has no {SETTINGS})")
    if not (folder / "state.json").is_file():
        raise CommandError(f"--dataset {path}: unfinished; run the same fastbert prepare again, it goes on")
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    if settings["tokenizer"]["digest"] != tokenizer_digest(tokenizer):
        raise CommandError(
            f"--dataset {path}: was prepared with another tokenizer (of {settings['tokenizer']['tokens']} tokens; "
            f"--tokenizer_name has {len(tokenizer)})"
        )
    try:
        data = datasets.load_from_disk(path)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise CommandError(
            f"--dataset {path}: cannot be read ({first_line(error)}); make it anew with the same fastbert prepare "
            "and --overwrite"
        ) from error
    return data, settings


def _same_format(data_args: PretrainDataArguments, settings: list[dict[str, Any]]) -> bool:
    """Whether the data are pairs. Raises CommandError if only some are."""
    formats = [found["format"] for found in settings]
    if len(set(formats)) > 1:
        raise CommandError(f"--dataset {' '.join(data_args.dataset)}: have different formats: {', '.join(formats)}")
    return formats[0] == PAIRS


def _config(model_args: PretrainModelArguments, tokenizer: PreTrainedTokenizerBase, **hub: Any) -> PreTrainedConfig:
    if model_args.model_name_or_path is not None:
        return load_config(model_args.model_name_or_path, **hub)
    try:
        if model_args.config_name is not None:
            config = AutoConfig.from_pretrained(model_args.config_name, **hub)
        else:
            config = AutoConfig.for_model(model_args.model_type)
    except LOAD_ERRORS as error:
        where = f"--config_name {model_args.config_name}" if model_args.config_name else "--model_type"
        raise CommandError(f"{where}: {first_line(error)}") from error
    config.vocab_size = len(tokenizer)
    config.pad_token_id = tokenizer.pad_token_id
    if model_args.config_overrides:
        try:
            config.update_from_string(model_args.config_overrides)
        except (ValueError, KeyError) as error:
            raise CommandError(f"--config_overrides {model_args.config_overrides}: {first_line(error)}") from error
    if config.vocab_size < len(tokenizer):
        raise CommandError(
            f"--config_overrides: vocab_size {config.vocab_size} is less than the tokenizer's {len(tokenizer)} tokens"
        )
    return config


def _model(model_args: PretrainModelArguments, config: PreTrainedConfig, pairs: bool, **hub: Any) -> PreTrainedModel:
    """The model with the heads that the data ask for, in float32. Raises CommandError."""
    head = "AutoModelForPreTraining" if pairs else "AutoModelForMaskedLM"
    try:
        cls = getattr(transformers, head)._model_mapping[type(config)]
    except KeyError as error:
        raise CommandError(f"--model_type: {config.model_type} has no masked language model") from error
    if pairs and "next_sentence_label" not in inspect.signature(cls.forward).parameters:
        raise CommandError(
            f"--dataset: has sentence pairs, but {config.model_type} has no next sentence prediction; prepare the data "
            "with --format full_sentences"
        )
    if model_args.model_name_or_path is None:
        try:
            return cls(config)
        except (ValueError, ZeroDivisionError) as error:
            raise CommandError(f"--config_overrides {model_args.config_overrides}: {first_line(error)}") from error
    name = model_args.model_name_or_path
    model, missing = load_model(head, name, config, **hub)
    if missing:
        say(f"{name}: {len(missing)} weights of the heads are new: {', '.join(missing[:3])} …")
    return model


def _phases(
    data_args: PretrainDataArguments,
    args: PretrainArguments,
    prepared: list[tuple[Any, dict[str, Any]]],
    fixed: bool,
) -> list[Phase]:
    """Datasets with their number of micro-batches, of a ``fixed`` shape or not; sets args.max_steps.

    Raises CommandError.
    """
    tokens = data_args.tokens_per_batch or args.per_device_train_batch_size * prepared[0][1]["max_seq_length"]
    seed = args.data_seed if args.data_seed is not None else args.seed
    budgets = []
    for path, (data, settings) in zip(data_args.dataset, prepared, strict=True):
        lengths = row_lengths(data)
        longest = settings["max_seq_length"]
        if lengths.min() < 1 or lengths.max() > longest:
            row = int(np.argmax((lengths < 1) | (lengths > longest)))
            raise CommandError(
                f"--dataset {path}: row {row} has {lengths[row]} tokens, allowed are 1 to {longest}; "
                "the data are broken, make them anew with the same fastbert prepare and --overwrite"
            )
        if tokens < lengths.max():
            raise CommandError(f"--tokens_per_batch {tokens}: --dataset {path} has a row of {lengths.max()} tokens")
        budgets.append(TokenBudget(lengths, tokens, seed))
    accumulate = args.gradient_accumulation_steps
    if data_args.phase_steps is not None:
        steps = data_args.phase_steps
        if args.max_steps > 0 and args.max_steps != sum(steps):
            raise CommandError(f"--max_steps {args.max_steps}: --phase_steps are {sum(steps)} together")
    elif args.max_steps > 0:
        steps = [args.max_steps]
    else:
        micro_batches = args.num_train_epochs * budgets[0].per_epoch() / args.world_size
        steps = [max(1, int(np.ceil(micro_batches / accumulate)))]
    args.max_steps = sum(steps)
    return [
        Phase(path, data, budget, count * accumulate, settings["max_seq_length"] if fixed else None)
        for path, (data, settings), budget, count in zip(data_args.dataset, prepared, budgets, steps, strict=True)
    ]


def _identity(
    model_args: PretrainModelArguments,
    data_args: PretrainDataArguments,
    args: PretrainArguments,
    phases: list[Phase],
    prepared: list[tuple[Any, dict[str, Any]]],
    config: PreTrainedConfig,
) -> dict[str, Any]:
    """What a resumed run must agree with."""
    return {
        "model_type": config.model_type,
        "config_overrides": model_args.config_overrides,
        "seed": args.seed,
        "data_seed": args.data_seed,
        "data": [data._fingerprint for data, _ in prepared],
        "phase_batches": [phase.batches for phase in phases],
        "tokens_per_batch": phases[0].budget.tokens,
        "processes": args.world_size,
        "fsdp": wants_sharding(args),
        "mlm_probability": data_args.mlm_probability,
        "whole_word_mask": data_args.whole_word_mask,
        "model_name_or_path": model_args.model_name_or_path,
    }


def _headline(model: Any, phases: list[Phase], args: PretrainArguments, optimized: bool) -> str:
    how = "fastbert" if optimized else "stock Hugging Face"
    what = ", then ".join(
        f"{phase.batches // args.gradient_accumulation_steps} steps of {phase.name}" for phase in phases
    )
    tokens = phases[0].budget.tokens * args.gradient_accumulation_steps * args.world_size
    return (
        f"{what}; {tokens} tokens a step; {type(model).__name__} of {sum(p.numel() for p in model.parameters()):,} "
        f"parameters on {args.device}, {args.world_size} process(es) of {torch.get_num_threads()} threads, {how}"
    )


def _summary(last: dict[str, Any]) -> str:
    text = f"step {last['step']}: loss {last['loss']:.4f}, masked tokens {last['mlm_loss']:.4f}"
    if "nsp_loss" in last:
        text += f", next sentence {last['nsp_loss']:.4f} ({last['nsp_accuracy']:.1%} right)"
    return f"{text}; {last['tokens_per_second']:.0f} tokens/s, {last['mfu']:.0%} of the peak"


def unigram_entropy(dataset: Path) -> float | None:
    """What `fastbert prepare` found for its tokens, in nats; None if the folder's report is gone or older."""
    try:
        found: float = json.loads((dataset / REPORT).read_text(encoding="utf-8"))["unigram_entropy"]
    except (OSError, ValueError, KeyError):
        return None
    return found


def plot(path: Path, log: list[dict[str, Any]], title: str, entropy: float | None) -> None:
    """Losses, accuracy and throughput over the steps, beside what guessing gives (``entropy``: of tokens)."""
    steps = [entry["step"] for entry in log]
    with picture(path, title, 12, 3) as (losses, accuracy, speed):
        for name, label in (("mlm_loss", "masked tokens"), ("nsp_loss", "next sentence")):
            if log and name in log[0]:
                losses.plot(steps, [entry[name] for entry in log], label=label, linewidth=1)
        if entropy is not None:
            losses.axhline(entropy, color="C0", linestyle=":", label="tokens guessed by frequency")
        losses.set(xlabel="step", ylabel="loss", yscale="log")
        if log and "nsp_accuracy" in log[0]:
            accuracy.plot(steps, [entry["nsp_accuracy"] for entry in log], color="C1", linewidth=1)
            accuracy.axhline(0.5, color="C1", linestyle=":", label="guessed")
        accuracy.set(xlabel="step", ylabel="accuracy of next sentence", ylim=(0.4, 1))
        speed.plot(steps, [entry["tokens_per_second"] for entry in log], color="C2", linewidth=1)
        speed.set(xlabel="step", ylabel="tokens/s", ylim=(0, None))
