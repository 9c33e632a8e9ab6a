"""Flags of the commands that train and prepare, from dataclasses."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from transformers import HfArgumentParser

from .errors import CommandError, first_line


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
    if len(argv) == 1 and argv[0].endswith(".json"):
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
