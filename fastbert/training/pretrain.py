"""``fastbert pretrain``: HF Trainer over prepared data, to an ordinary Hugging Face model folder."""

from __future__ import annotations

import inspect
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import transformers
from transformers import AutoConfig
from transformers.activations import ACT2FN

from fastbert.flops import peak_flops

from .batching import Batches, Masking, Phase, TokenBudget, row_lengths
from .errors import CommandError, first_line
from .loading import (
    LOAD_ERRORS,
    check_family,
    check_vocabulary,
    load_config,
    load_model,
    load_tokenizer,
    sequence_limit,
)
from .prepare import SETTINGS, tokenizer_digest
from .pretraining_arguments import PretrainArguments, PretrainDataArguments, PretrainModelArguments, parse
from .pretraining_trainer import PretrainingTrainer, TimingCallback
from .report import REPORT, picture
from .runs import Run, say
from .shards import PAIRS
from .throughput import Work

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def main(argv: list[str]) -> int:
    """Run ``fastbert pretrain``; returns the exit status. Raises CommandError for what the user can mend."""
    return PretrainRun(*parse(argv), argv).main()


class PretrainRun(Run):
    """A run of ``fastbert pretrain``."""

    command = "pretrain"
    prepared: list[tuple[Any, dict[str, Any]]]  # each dataset, and how it was made
    pairs: bool
    phases: list[Phase]
    masking: Masking

    def open(self) -> None:
        model_args, data_args = self.model_args, self.data_args
        self.tokenizer = load_tokenizer(self.tokenizer_name, self.tokenizer_flag, **self.hub)
        self.prepared = [_open_dataset(path, self.tokenizer, self.tokenizer_flag) for path in data_args.dataset]
        self.pairs = _same_format(data_args, [settings for _, settings in self.prepared])
        self.config = _config(model_args, self.tokenizer, **self.hub)
        if model_args.optimize:
            check_family(self.config, *_source(model_args))
        positions = sequence_limit(self.config, self.tokenizer, None)
        for path, (_, settings) in zip(data_args.dataset, self.prepared, strict=True):
            if settings["max_seq_length"] > positions:
                raise CommandError(
                    f"--dataset {path}: rows have up to {settings['max_seq_length']} tokens, the model has "
                    f"{positions} positions"
                )
        self.max_seq_length = max(settings["max_seq_length"] for _, settings in self.prepared)
        fixed = bool(self.args.torch_compile and model_args.optimize)
        self.phases = _phases(data_args, self.args, self.prepared, fixed)
        self.masking = Masking(self.tokenizer, data_args.mlm_probability, data_args.whole_word_mask)

    def identity(self) -> dict[str, Any]:
        return {
            "model_type": self.config.model_type,
            "config_overrides": self.model_args.config_overrides,
            "data_seed": self.args.data_seed,
            "data": [data._fingerprint for data, _ in self.prepared],
            "phase_batches": [phase.batches for phase in self.phases],
            "tokens_per_batch": self.phases[0].budget.tokens,
            "processes": self.args.world_size,
            "mlm_probability": self.data_args.mlm_probability,
            "whole_word_mask": self.data_args.whole_word_mask,
        }

    def load(self) -> PreTrainedModel:
        model = _model(self.model_args, self.config, self.pairs, **self.hub)
        check_vocabulary(self.tokenizer, model, self.tokenizer_name, self.tokenizer_flag)
        return model

    def make_trainer(self, callbacks: list[Any]) -> PretrainingTrainer:
        args = self.args
        batches = Batches(
            self.phases,
            self.masking,
            args.data_seed if args.data_seed is not None else args.seed,
            self.config.vocab_size,
            cast(int, self.tokenizer.pad_token_id),
            rank=args.process_index,
            ranks=args.world_size,
        )
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        self.peak, self.peak_kind = peak_flops(args.device, dtype)
        timing = TimingCallback()
        timing.trainer = PretrainingTrainer(
            model=self.model,
            args=args,
            processing_class=self.tokenizer,
            callbacks=[*callbacks, timing],
            batches=batches,
            work=Work(self.config),
            peak=self.peak,
            bound=self.phases[0].budget.tokens if self.model_args.optimize else None,
        )
        return timing.trainer

    @property
    def tokens_per_step(self) -> int:
        """Real tokens of a step of all processes, at most."""
        return self.phases[0].budget.tokens * self.args.gradient_accumulation_steps * self.args.world_size

    def headline(self) -> str:
        args = self.args
        how = "fastbert" if self.model_args.optimize else "stock Hugging Face"
        what = ", then ".join(
            f"{phase.batches // args.gradient_accumulation_steps} steps of {phase.name}" for phase in self.phases
        )
        parameters = sum(p.numel() for p in self.model.parameters())
        return (
            f"{what}; {self.tokens_per_step} tokens a step; {type(self.model).__name__} of {parameters:,} parameters "
            f"on {args.device}, {args.world_size} process(es) of {torch.get_num_threads()} threads, {how}"
        )

    def report(self) -> dict[str, Any]:
        args = self.args
        return {
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
                for phase, (_, settings) in zip(self.phases, self.prepared, strict=True)
            ],
            "tokens_per_step": self.tokens_per_step,
            "peak": {"flops": self.peak, "how": self.peak_kind, "processes": args.world_size},
            "history": [entry for entry in self.trainer.state.log_history if "loss" in entry],
        }

    def plot(self, path: Path, report: dict[str, Any]) -> None:
        title = Path(self.data_args.dataset[0]).name
        plot(path, report["history"], title, report["data"][0]["unigram_entropy"])

    def summary(self, report: dict[str, Any]) -> list[str]:
        return [_summary(report["history"][-1])] if report["history"] else []


def _open_dataset(path: str, tokenizer: PreTrainedTokenizerBase, argument: str) -> tuple[Any, dict[str, Any]]:
    """A prepared dataset and how it was made: with the tokenizer that ``argument`` named.

    Raises CommandError for anything else.
    """
    import datasets
    import pyarrow as pa

    folder = Path(path)
    if not (folder / SETTINGS).is_file():
        raise CommandError(f"--dataset {path}: not a folder made by fastbert prepare (it has no {SETTINGS})")
    if not (folder / "state.json").is_file():
        raise CommandError(f"--dataset {path}: unfinished; run the same fastbert prepare again, it goes on")
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        digest, tokens = settings["tokenizer"]["digest"], settings["tokenizer"]["tokens"]
        found = {name: settings[name] for name in ("format", "max_seq_length")}
        data = datasets.load_from_disk(path)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise CommandError(
            f"--dataset {path}: cannot be read ({first_line(error)}); make it anew with the same fastbert prepare "
            "and --overwrite"
        ) from error
    if digest != tokenizer_digest(tokenizer):
        raise CommandError(
            f"--dataset {path}: was prepared with another tokenizer (of {tokens} tokens; {argument} has "
            f"{len(tokenizer)})"
        )
    return data, found


def _same_format(data_args: PretrainDataArguments, settings: list[dict[str, Any]]) -> bool:
    """Whether the data are pairs. Raises CommandError if only some are."""
    formats = [found["format"] for found in settings]
    if len(set(formats)) > 1:
        raise CommandError(f"--dataset {' '.join(data_args.dataset)}: have different formats: {', '.join(formats)}")
    return formats[0] == PAIRS


def _source(model_args: PretrainModelArguments) -> tuple[str, str]:
    """What says of which kind the model is, and by which flag."""
    flags = ("model_name_or_path", "config_name", "model_type")
    return next((value, f"--{flag}") for flag in flags if (value := getattr(model_args, flag)) is not None)


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
        where = f"--config_overrides {model_args.config_overrides}"
        for part in model_args.config_overrides.split(","):
            if not re.fullmatch("[^=]+=[^=]+", part):
                raise CommandError(f"{where}: {part!r} is not NAME=VALUE")
        try:
            config.update_from_string(model_args.config_overrides)
        except (ValueError, KeyError, TypeError) as error:
            raise CommandError(f"{where}: {first_line(error)}") from error
    if config.vocab_size < len(tokenizer):
        raise CommandError(
            f"--config_overrides: vocab_size {config.vocab_size} is less than the tokenizer's {len(tokenizer)} tokens"
        )
    if config.pad_token_id != tokenizer.pad_token_id:
        raise CommandError(
            f"--config_overrides: pad_token_id {config.pad_token_id} is not the tokenizer's {tokenizer.pad_token_id}"
        )
    return config


def _check_numbers(config: PreTrainedConfig, pairs: bool, where: str) -> None:
    """Raise CommandError for a configuration of which no model can be made, or none for data in ``pairs``."""
    least = dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"), 1)
    if pairs:
        least["type_vocab_size"] = 2
    for name, low in least.items():
        if (value := getattr(config, name, low)) < low:
            raise CommandError(f"{where}: {name} must be at least {low}, got {value}")
    for name in ("initializer_range", "layer_norm_eps"):
        if not 0 < (value := getattr(config, name, 1)) < math.inf:
            raise CommandError(f"{where}: {name} must be above 0, got {value}")
    if (activation := getattr(config, "hidden_act", "gelu")) not in ACT2FN:
        raise CommandError(f"{where}: hidden_act {activation!r} is unknown; allowed are {', '.join(ACT2FN)}")


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
    name = model_args.model_name_or_path
    new = f"--config_overrides {model_args.config_overrides}"
    _check_numbers(config, pairs, new if name is None else f"--model_name_or_path {name}")
    if name is None:
        try:
            return cls(config)
        except LOAD_ERRORS as error:
            raise CommandError(f"{new}: {first_line(error)}") from error
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
