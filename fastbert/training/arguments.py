"""Flags of ``fastbert finetune``: transformers' ``TrainingArguments`` and the names of its example scripts."""

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import SchedulerType, TrainingArguments, get_scheduler

from .errors import first_line
from .flags import check_ranges, own_flags, parse_flags

TASK_NAMES = (
    "sequence_classification",
    "token_classification",
    "question_answering",
    "multiple_choice",
    "sentence_embeddings",
)
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")

# TrainingArguments has more than a hundred flags; --help shows these, --help_all every one.
COMMON_TRAINING_FLAGS = {
    "output_dir",
    "do_train",
    "do_eval",
    "do_predict",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "max_grad_norm",
    "label_smoothing_factor",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "logging_steps",
    "train_sampling_strategy",
    "seed",
    "data_seed",
    "full_determinism",
    "bf16",
    "use_cpu",
    "torch_compile",
    "disable_tqdm",
    "report_to",
    "resume_from_checkpoint",
}
HIDDEN_FLAGS = {"logging_nan_inf_filter", "dataloader_pin_memory"}  # nobody needs to change ours


@dataclass
class DataArguments:
    """What to train on."""

    _argument_group_name = "data"

    task: str | None = field(
        default=None,
        metadata={
            "help": "What to train. Default: told from the training file where its form or columns leave no doubt "
            "(CoNLL; context, question, answers; sent1, sent2, ending0, …; anchor, positive) and no flag names the "
            "columns, else sequence_classification.",
            "choices": list(TASK_NAMES),
        },
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Training data: .csv, .tsv, .jsonl, .parquet, .conll (tokens with tags), .json in SQuAD's form, "
            "or a folder saved by datasets' save_to_disk."
        },
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Validation data. Without it a seeded part of the training data is held out."}
    )
    test_file: str | None = field(default=None, metadata={"help": "Labelled data to test the best model on."})
    text_column_name: list[str] | None = field(
        default=None,
        metadata={
            "aliases": ["--text_column_names"],
            "help": "Column with the text; several columns are joined by --text_column_delimiter. "
            "Default: 'text' or 'sentence', whichever the file has. Token classification: the list of words (default: "
            "'tokens' or 'words'). Multiple choice: what comes before each choice (default: 'sent1'). Sentence "
            "embeddings: the two or three texts of a row (default: anchor, positive and, if there, negative).",
        },
    )
    text_column_delimiter: str = field(default=" ", metadata={"help": "Joins several text columns."})
    text_pair_column_name: str | None = field(
        default=None,
        metadata={
            "help": "Column with the second sentence of a pair. Multiple choice: what begins each choice "
            "(default: 'sent2')."
        },
    )
    label_column_name: list[str] | None = field(
        default=None,
        metadata={
            "aliases": ["--label_column_names"],
            "help": "Column with the label (default: 'label'). Several columns: one 0/1 column per label "
            "(multi-label), or one number each (regression). Token classification: the list of tags (default: 'tags' "
            "or 'ner_tags'). Sentence embeddings: how alike the texts of a pair are, -1 to 1.",
        },
    )
    label_delimiter: str = field(
        default=",", metadata={"help": "Separates the labels in a cell of a multi-label CSV or TSV file."}
    )
    problem_type: str | None = field(
        default=None,
        metadata={"help": "Kind of task. Default: told from the labels.", "choices": list(PROBLEM_TYPES)},
    )
    do_regression: bool = field(default=False, metadata={"help": "Same as --problem_type regression."})
    max_seq_length: int | None = field(
        default=None,
        metadata={
            "help": "Longer texts are cut to this many tokens (sequences, choices) or read in overlapping windows of "
            "them (words, questions). Default: what the model allows."
        },
    )
    doc_stride: int | None = field(
        default=None,
        metadata={
            "help": "Tokens that two windows of a long text share (token classification, question answering). Default: "
            "128, or a quarter of the window where that is less."
        },
    )
    label_all_tokens: bool = field(
        default=False, metadata={"help": "Token classification: train on every piece of a word, not only on the first."}
    )
    question_column_name: str = field(default="question", metadata={"help": "Question answering: the question."})
    context_column_name: str = field(default="context", metadata={"help": "Question answering: the text to search."})
    answer_column_name: str = field(
        default="answers",
        metadata={"help": "Question answering: the answers, lists of text and answer_start under these names."},
    )
    version_2_with_negative: bool = field(
        default=False, metadata={"help": "Question answering: some questions have no answer."}
    )
    null_score_diff_threshold: float = field(
        default=0.0,
        metadata={
            "help": "Question answering: no answer is given where its score is above the best answer's by more than "
            "this."
        },
    )
    n_best_size: int = field(default=20, metadata={"help": "Question answering: starts and ends to consider."})
    max_answer_length: int = field(default=30, metadata={"help": "Question answering: most tokens of an answer."})
    choice_column_names: list[str] | None = field(
        default=None,
        metadata={
            "help": "Multiple choice: a column for each choice, or one with a list of them. Default: ending0, "
            "ending1, …"
        },
    )
    validation_split_percentage: float = field(
        default=10.0, metadata={"help": "Share of the training data held out when there is no validation data."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first rows of the file."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first rows of the file."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only the first rows of the file."})
    on_bad_row: str = field(
        default="error",
        metadata={
            "help": "What to do with rows that cannot be read or have no text or label: stop, or leave them out. "
            "They are reported by line either way.",
            "choices": ["error", "skip"],
        },
    )

    def __post_init__(self) -> None:
        if self.do_regression:
            if self.problem_type not in (None, "regression"):
                raise ValueError(f"--do_regression contradicts --problem_type {self.problem_type}")
            self.problem_type = "regression"
        check_ranges(self)


@dataclass
class ModelArguments:
    """Which model to start from."""

    _argument_group_name = "model"

    model_name_or_path: str = field(metadata={"help": "Folder with a Hugging Face checkpoint, or a name on the hub."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if not the model's own."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads from the hub are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the hub."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Accept a checkpoint whose head has another number of labels."}
    )
    optimize: bool = field(
        default=True, metadata={"help": "Train with fastbert.optimize(model); false trains stock Hugging Face code."}
    )


@dataclass
class RunArguments(TrainingArguments):
    """What every training command adds to transformers' TrainingArguments, or has another default of."""

    _argument_group_name = "training (transformers' TrainingArguments; --help_all shows every flag)"

    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave NaN and infinite losses out of logs."})
    report_to: str = field(
        default="none", metadata={"help": "Loggers to report to besides report.json: tensorboard, wandb, …"}
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Pin memory in the data loaders."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "'true': go on from the last complete checkpoint in --output_dir (from the start, if there is none "
            "yet); or the folder of a checkpoint.",
            "nargs": "?",
            "const": "true",
        },
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start anew in an --output_dir that holds an earlier run, replacing it."}
    )

    def __post_init__(self) -> None:
        if not self.output_dir:  # transformers would make one up
            raise ValueError("--output_dir is needed")
        check_ranges(self)
        # transformers insists on being told, where it takes the CPU for any other dtype by itself.
        self.use_cpu = self.use_cpu or ((self.bf16 or self.bf16_full_eval) and not torch.accelerator.is_available())
        super().__post_init__()
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("--fp16: not on a CPU; it has --bf16")
        _check_schedule(self)


def _check_schedule(args: TrainingArguments) -> None:
    """Raise ValueError for a schedule that cannot be made, which the trainer would notice when it has begun."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 1000, cast(dict[str, Any], args.lr_scheduler_kwargs))
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(
            f"--lr_scheduler_type {SchedulerType(args.lr_scheduler_type).value} with --lr_scheduler_kwargs "
            f"{args.lr_scheduler_kwargs}: {first_line(error)}"
        ) from error


@dataclass
class FinetuneArguments(RunArguments):
    """The training of ``fastbert finetune``; defaults that differ from transformers' are repeated here."""

    do_train: bool = field(default=True, metadata={"help": "Train; false evaluates and tests the model as it is."})
    do_eval: bool = field(default=True, metadata={"help": "Evaluate on the validation data."})
    do_predict: bool = field(default=True, metadata={"help": "Test the best model, if there is a --test_file."})
    eval_strategy: str = field(
        default="epoch", metadata={"help": "When to evaluate.", "choices": ["no", "steps", "epoch"]}
    )
    eval_steps: float | None = field(
        default=None,
        metadata={
            "help": "Steps between evaluations; below 1 a share of all. Default: 0.2 with --eval_strategy steps."
        },
    )
    save_strategy: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "When to save. Default: --eval_strategy, or epoch without it.",
            "choices": ["no", "steps", "epoch", "best"],
        },
    )
    save_steps: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Steps between checkpoints; below 1 a share of all. Default: --eval_steps, or 500."},
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep; the best is always kept."})
    load_best_model_at_end: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "End with the best checkpoint. Default: true if there is evaluation.",
            "nargs": "?",
            "const": True,
        },
    )
    metric_for_best_model: str | None = field(
        default=None,
        metadata={
            "help": "What the best checkpoint is best at. Default: accuracy (single-label, multiple choice), "
            "f1_micro (multi-label), rmse (regression), f1 (entities, answers), spearman or accuracy (embeddings)."
        },
    )
    logging_steps: float = field(
        default=0.02, metadata={"help": "Steps between two points of the loss curve; below 1 a share of all steps."}
    )
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "Order of the training data: group_by_length (least padding), random, sequential or "
            "batch_rebalance (as transformers has it).",
            "choices": ["random", "sequential", "group_by_length", "batch_rebalance"],
        },
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations without a new best."}
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "How much better an evaluation must be to count as a new best."}
    )

    def __post_init__(self) -> None:
        self.default_metric = self.metric_for_best_model is None
        self.default_direction = self.greater_is_better is None
        if not self.do_eval:
            self.eval_strategy = "no"
        evaluates = getattr(self.eval_strategy, "value", self.eval_strategy) != "no"
        if getattr(self.eval_strategy, "value", self.eval_strategy) == "steps" and self.eval_steps is None:
            self.eval_steps = 0.2
        if self.save_strategy is None:
            self.save_strategy = self.eval_strategy if evaluates else "epoch"
        if self.save_steps is None:
            self.save_steps = self.eval_steps or 500
        if self.load_best_model_at_end is None:
            self.load_best_model_at_end = evaluates and self.save_strategy != "no"
        if getattr(self.save_strategy, "value", self.save_strategy) == "best":
            if not evaluates:
                raise ValueError("--save_strategy best needs --eval_strategy, which tells what is best")
            self.metric_for_best_model = self.metric_for_best_model or "loss"  # until the task is known
        if self.early_stopping_patience is not None and not self.load_best_model_at_end:
            raise ValueError("--early_stopping_patience needs --eval_strategy and --save_strategy")
        super().__post_init__()


Parsed = tuple[ModelArguments, DataArguments, FinetuneArguments]


def parse(argv: list[str]) -> Parsed:
    """Parse the flags of ``fastbert finetune``. Exits with status 2 on a wrong one."""
    kinds = (ModelArguments, DataArguments, FinetuneArguments)
    parsed = parse_flags(
        kinds,
        argv,
        shown=(own_flags(kinds) | COMMON_TRAINING_FLAGS) - HIDDEN_FLAGS,
        prog="fastbert finetune",
        usage="fastbert finetune --model_name_or_path MODEL --train_file FILE --output_dir DIR [flags]\n"
        "       fastbert finetune FLAGS.json",
        description="Fine-tune a BERT: sequence classification (single-label, multi-label, regression, pairs), token "
        "classification, question answering, multiple choice, sentence embeddings.",
    )
    return cast(Parsed, parsed)
