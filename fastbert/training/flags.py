"""Flags of the commands that train and prepare, from dataclasses."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from transformers import HfArgumentParser

from .errors import CommandError, first_line

# What a number may be, in words, and for which flags. NaN is in no range.
RANGES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    (
        "at least 1",
        lambda x: x >= 1,
        (
            "max_train_samples",
            "max_eval_samples",
            "max_predict_samples",
            "doc_stride",
            "n_best_size",
            "max_answer_length",
            "early_stopping_patience",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "eval_accumulation_steps",
            "dataloader_prefetch_factor",
            "tokens_per_batch",
        ),
    ),
    ("at least 1, or -1 for --num_train_epochs", lambda x: x >= 1 or x == -1, ("max_steps",)),
    ("at least 3", lambda x: x >= 3, ("max_seq_length",)),
    (
        "a finite number of at least 0",
        lambda x: 0 <= x < math.inf,
        ("learning_rate", "warmup_steps", "weight_decay", "adam_epsilon", "eval_delay", "dataloader_num_workers"),
    ),
    ("at least 0, or inf", lambda x: x >= 0, ("max_grad_norm",)),
    (
        "a finite number above 0",
        lambda x: 0 < x < math.inf,
        ("num_train_epochs", "eval_steps", "save_steps", "logging_steps"),
    ),
    ("from 0 to 1", lambda x: 0 <= x <= 1, ("label_smoothing_factor",)),
    ("at least 0 and below 1", lambda x: 0 <= x < 1, ("adam_beta1", "adam_beta2")),
    ("at least 0 and below 100", lambda x: 0 <= x < 100, ("validation_split_percentage",)),
    ("between 0 and 1", lambda x: 0 < x < 1, ("mlm_probability",)),
    ("from 0 to 4294967295", lambda x: 0 <= x < 2**32, ("seed", "data_seed")),
    ("a finite number", math.isfinite, ("null_score_diff_threshold", "early_stopping_threshold")),
)


def check_ranges(given: Any) -> None:
    """Raise ValueError for a number in a dataclass of flags that is out of its range."""
    for words, allowed, names in RANGES:
        for name in names:
            value = getattr(given, name, None)
            if value is not None and not allowed(value):
                raise ValueError(f"--{name} must be {words}, got {value}")


class ArgumentParser(HfArgumentParser):
    """HfArgumentParser that rejects unknown flags and whose help is short."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n(see {self.prog} --help)\n")


MAX_CHOICES_WIDTH = 80  # beyond it, choices stand in the help text, which is wrapped


class HelpFormatter(argparse.HelpFormatter):
    """One spelling a flag, defaults only where they say something."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        spelling = action.option_strings[0] if action.dest != "help" else ", ".join(action.option_strings)
        if action.nargs == 0:
            return spelling
        if (choices := _choices(action)) and len(choices) <= MAX_CHOICES_WIDTH:
            return f"{spelling} {{{choices}}}"
        return f"{spelling} {'true|false' if action.nargs == '?' and action.const is True else 'X'}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if len(choices := _choices(action)) > MAX_CHOICES_WIDTH:
            text += f" One of: {choices.replace(',', ', ')}."
        if action.default in (None, False, argparse.SUPPRESS) or "default:" in text.lower():
            return text
        return f"{text} (default: %(default)s)"


def _choices(action: argparse.Action) -> str:
    return ",".join(map(str, action.choices or ()))


def own_flags(kinds: Sequence[type]) -> set[str]:
    """The flags that these dataclasses, and those of ours that they inherit from, add to transformers' or change."""
    classes = {base for kind in kinds for base in kind.__mro__ if base.__module__.startswith(__package__)}
    return {name for base in classes for name in base.__annotations__}


def parse_flags(
    kinds: tuple[type, ...], argv: list[str], *, shown: Collection[str] | None = None, **parser_arguments: Any
) -> tuple[Any, ...]:
    """An instance of each dataclass in ``kinds`` from flags, or from one .json file of flags.

    Exits with status 2 on a wrong flag. With ``shown``, --help shows the flags of these names and --help_all every one.
    """
    parser = ArgumentParser(cast(Any, kinds), formatter_class=HelpFormatter, allow_abbrev=False, **parser_arguments)
    if argv and argv[0].endswith(".json"):
        if len(argv) > 1:
            parser.error(f"{argv[0]}: a file of flags stands alone, without {' '.join(argv[1:])}; put all into it")
        argv = _read(argv[0])
    if shown is not None:
        parser.add_argument("--help_all", action="store_true", help="Show every flag of TrainingArguments too.")
        for action in parser._actions:
            hidden = "--help_all" not in argv and action.dest not in {*shown, "help", "help_all"}
            if hidden or isinstance(action, argparse._StoreFalseAction):
                action.help = argparse.SUPPRESS
        if "--help_all" in argv:
            parser.print_help()
            raise SystemExit(0)
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError) as error:
        parser.error(first_line(error))
    except ImportError as error:
        raise CommandError(f"{first_line(error)} (fastbert[train] brings what training needs)") from error
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return tuple(parsed[: len(kinds)])


def _read(path: str) -> list[str]:
    """The flags in a file: a JSON object of their names and values. Raises CommandError."""
    try:
        flags = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CommandError(f"{path}: cannot be read as JSON: {first_line(error)}") from error
    if not isinstance(flags, dict):
        raise CommandError(f"{path}: a JSON {type(flags).__name__} where an object of flags and values is wanted")
    argv: list[str] = []
    for name, value in flags.items():
        if isinstance(value, list):
            argv += [f"--{name}", *map(_text, value)]
        elif value is not None:
            argv.append(f"--{name}={_text(value)}")
    return argv


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
