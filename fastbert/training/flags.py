"""Flags of the pretraining commands, from dataclasses."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import Any, cast

from .arguments import ArgumentParser, HelpFormatter
from .errors import CommandError, first_line


def parse_flags(
    kinds: tuple[type, ...], argv: list[str], *, shown: Collection[str] | None = None, **parser_arguments: Any
) -> tuple[Any, ...]:
    """An instance of each dataclass in ``kinds`` from flags. Exits with status 2 on a wrong flag.

    With ``shown``, --help shows the flags of these names and --help_all every one.
    """
    parser = ArgumentParser(cast(Any, kinds), formatter_class=HelpFormatter, allow_abbrev=False, **parser_arguments)
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
