"""Flags of ``fastbert pretrain``: transformers' ``TrainingArguments`` and the names of its example scripts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from .arguments import COMMON_TRAINING_FLAGS, HIDDEN_FLAGS, RunArguments
from .flags import check_ranges, own_flags, parse_flags


@dataclass
class PretrainDataArguments:
    """What to train on."""

    _argument_group_name = "data"

    dataset: list[str] = field(
        metadata={
            "help": "Folder made by `fastbert prepare`; several, one for each phase: say one of 128 tokens, then one "
            "of 512."
        }
    )
    phase_steps: list[int] | None = field(
        default=None,
        metadata={"help": "Steps of each phase, where there are several; together they are --max_steps."},
    )
    tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Real tokens of a batch of one process; rows are chosen to come close to it, in every phase. "
            "Default: --per_device_train_batch_size times the longest row of the first phase."
        },
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens to predict."})
    whole_word_mask: bool = field(
        default=False, metadata={"help": "Mask all pieces of a word together (WordPiece only)."}
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if len(self.dataset) > 1 and len(self.phase_steps or ()) != len(self.dataset):
            raise ValueError(
                f"--phase_steps must give the steps of each --dataset ({len(self.dataset)} are given), got "
                f"{self.phase_steps}"
            )
        if self.phase_steps is not None and (len(self.dataset) != len(self.phase_steps) or min(self.phase_steps) < 1):
            raise ValueError(f"--phase_steps must be at least 1 for each --dataset, got {self.phase_steps}")


@dataclass
class PretrainModelArguments:
    """What to train: a new model, or a checkpoint to go on from."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to go on from. Default: a new model, from --config_overrides."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "The tokenizer that the data were prepared with. Default: the model's own."}
    )
    model_type: str = field(default="bert", metadata={"help": "Kind of a new model."})
    config_name: str | None = field(
        default=None, metadata={"help": "Folder or name on the hub whose config.json a new model begins with."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": 'What differs in a new model: "num_hidden_layers=4,hidden_size=256,…".'}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads from the hub are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the hub."})
    optimize: bool = field(
        default=True, metadata={"help": "Train with fastbert.optimize(model); false trains stock Hugging Face code."}
    )

    def __post_init__(self) -> None:
        if self.model_name_or_path is not None and (self.config_overrides or self.config_name):
            raise ValueError("--config_overrides and --config_name are for a new model, without --model_name_or_path")
        if self.model_name_or_path is None and self.tokenizer_name is None:
            raise ValueError("--tokenizer_name is needed for a new model")


@dataclass
class PretrainArguments(RunArguments):
    """The training of ``fastbert pretrain``; defaults that differ are repeated here: those of Devlin et al. 2019."""

    learning_rate: float = field(default=1e-4, metadata={"help": "Highest learning rate."})
    warmup_steps: float = field(
        default=0.01, metadata={"help": "Steps in which the learning rate rises; below 1 a share of all."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay, not on biases and LayerNorm."})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "AdamW's epsilon."})
    per_device_train_batch_size: int = field(
        default=32, metadata={"help": "Rows of full length that a batch of one process has room for."}
    )
    save_strategy: str = field(default="steps", metadata={"help": "When to save: no or steps."})
    save_steps: float = field(default=0.1, metadata={"help": "Steps between checkpoints; below 1 a share of all."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    logging_steps: float = field(
        default=0.005, metadata={"help": "Steps between two points of the curves; below 1 a share of all steps."}
    )

    def __post_init__(self) -> None:
        if getattr(self.eval_strategy, "value", self.eval_strategy) != "no" or self.do_eval:
            raise ValueError("--eval_strategy and --do_eval: pretraining has no validation data")
        if self.label_smoothing_factor:
            raise ValueError("--label_smoothing_factor: not in pretraining")
        if getattr(self.save_strategy, "value", self.save_strategy) not in ("no", "steps"):
            raise ValueError(f"--save_strategy must be no or steps, got {self.save_strategy}")
        super().__post_init__()


_EVALUATION = {
    "do_train",
    "do_eval",
    "do_predict",
    "eval_strategy",
    "eval_steps",
    "per_device_eval_batch_size",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "train_sampling_strategy",
    "label_smoothing_factor",
}
_SHOWN = (COMMON_TRAINING_FLAGS - _EVALUATION) | {
    "fp16",
    "gradient_checkpointing",
    "activation_checkpointing",  # its name from transformers 5.23 on
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "fsdp",
    "fsdp_config",
    "dataloader_num_workers",
}

Parsed = tuple[PretrainModelArguments, PretrainDataArguments, PretrainArguments]


def parse(argv: list[str]) -> Parsed:
    """Parse the flags of ``fastbert pretrain``. Exits with status 2 on a wrong one."""
    kinds = (PretrainModelArguments, PretrainDataArguments, PretrainArguments)
    parsed = parse_flags(
        kinds,
        argv,
        shown=(own_flags(kinds) | _SHOWN) - HIDDEN_FLAGS,
        prog="fastbert pretrain",
        usage="fastbert pretrain --dataset DIR... --tokenizer_name DIR --config_overrides SETTINGS --output_dir DIR "
        "[--max_steps N | --num_train_epochs N] [flags]\n"
        "       fastbert pretrain --dataset DIR... --model_name_or_path MODEL --output_dir DIR "
        "[--max_steps N | --num_train_epochs N] [flags]\n"
        "       fastbert pretrain FLAGS.json",
        description="Train a BERT on data that `fastbert prepare` made: masked language modelling, and next sentence "
        "prediction where the data have pairs.",
    )
    return cast(Parsed, parsed)
