"""``fastbert predict``: a fine-tuned model over a file of any size.

Rows are read in windows; a window is tokenised, sorted by length into batches of a token budget, and written in input
order to a part file, which takes the output's name at the end. A journal next to it says what is complete, so that a
run that was killed goes on from there and ends with the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import sys
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from .predictors import Predictor, predictor_for
from .training.data import BadRowError
from .training.errors import CommandError, first_line, is_disk_full
from .training.loading import (
    check_family,
    check_vocabulary,
    load_config,
    load_model,
    load_tokenizer,
    quiet_transformers,
    sequence_limit,
)
from .training.output import Output, open_output, output_format
from .training.rows import Position, Row, RowFile, open_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BAD_ROWS_STATUS = 3  # the exit status of a run that is complete but for rows that it could not predict
SHOWN = 20  # bad rows printed in full
_NEEDED = ["--model_name_or_path", "", "--input", "", "--output", ""]  # flags without a default


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``fastbert predict``."""
    parser = argparse.ArgumentParser(
        prog="fastbert predict",
        description="Predict with a fine-tuned model over a CSV, TSV, JSONL, Parquet or CoNLL file, or SQuAD's JSON. "
        "The output keeps the input's columns and order and adds what fits the model, and error: predicted_label and "
        "score (or predicted_value); predicted_tags and scores, a tag a word; predicted_answer, predicted_start and "
        "score; predicted_choice and score.",
        epilog=f"Exit status: 0 all rows predicted, {BAD_ROWS_STATUS} done but for rows with an error, 1 failed, "
        "2 wrong flags, 130 interrupted.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model_name_or_path", required=True, metavar="DIR", help="folder that fastbert finetune or HF Trainer wrote")
    add("--input", required=True, metavar="FILE", help="file or saved dataset folder; - for JSONL from standard input")
    add(
        "--output",
        required=True,
        metavar="FILE",
        help=".csv, .tsv, .jsonl or .parquet; .conll for tags (a word a line, the predicted tag last); - for JSONL on "
        "standard output",
    )
    add(
        "--text_column_name",
        nargs="+",
        metavar="NAME",
        help="column with the text; several are joined (default: as in finetune)",
    )
    add("--text_column_delimiter", default=" ", metavar="X", help="joins several text columns (default: a space)")
    add("--text_pair_column_name", metavar="NAME", help="column with the second sentence of a pair")
    add("--choice_column_names", nargs="+", metavar="NAME", help="multiple choice: as in finetune")
    add(
        "--question_column_name",
        default="question",
        metavar="NAME",
        help="question answering: the question (default: question)",
    )
    add(
        "--context_column_name",
        default="context",
        metavar="NAME",
        help="question answering: the text to search (default: context)",
    )
    add(
        "--doc_stride",
        type=_positive,
        metavar="N",
        help="tokens that two windows of a long text share (default: as in finetune)",
    )
    add(
        "--n_best_size",
        type=_positive,
        default=20,
        metavar="N",
        help="question answering: as in finetune (default: 20)",
    )
    add("--max_answer_length", type=_positive, default=30, metavar="N", help="question answering: tokens (default: 30)")
    add("--version_2_with_negative", action="store_true", help="question answering: there may be no answer")
    add(
        "--null_score_diff_threshold",
        type=_finite,
        default=0.0,
        metavar="X",
        help="question answering: as in finetune (default: 0)",
    )
    add(
        "--max_seq_length",
        type=_positive,
        metavar="N",
        help="longer texts are cut to this many tokens (sequences, choices) or read in overlapping windows of them "
        "(words, questions; default: what the model allows)",
    )
    add("--max_tokens_per_batch", type=_positive, default=8192, metavar="N", help="tokens in a batch (default: 8192)")
    add("--window_rows", type=_positive, default=4096, metavar="N", help="rows in memory at a time (default: 4096)")
    add("--all_scores", action="store_true", help="add a column score_<label> for every label")
    add("--threshold", type=_share, default=0.5, metavar="P", help="multi-label: labels above it apply (default: 0.5)")
    add("--label_delimiter", default=",", metavar="X", help="multi-label: joins the labels in CSV and TSV (default: ,)")
    add("--column_prefix", default="", metavar="X", help="put before the names of the added columns")
    add(
        "--on_bad_row",
        choices=("skip", "error"),
        default="skip",
        help="skip: a bad row gets an error and the rest goes on (default); error: stop at it",
    )
    add("--resume", action="store_true", help="go on with an unfinished output")
    add("--overwrite", action="store_true", help="replace an existing or unfinished output")
    add("--device", default=None, metavar="D", help="cpu, cuda, … (default: cuda if there is one)")
    add("--optimize", type=_boolean, default=True, metavar="true|false", help="use fastbert.optimize (default: true)")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    return value


def _share(text: str) -> float:
    value = _finite(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {text!r}")
    return value


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text.lower() == "true"


def predict_window(
    rows: list[Row], predictor: Predictor, added: list[str]
) -> list[tuple[dict[str, Any], list[Any] | None, str | None]]:
    """(original values, prediction or None, error or None) of each row, in order."""
    found: list[tuple[dict[str, Any], list[Any] | None, str | None]] = []
    places: list[int] = []
    items: list[Any] = []
    for row in rows:
        if clash := set(added) & row.values.keys():
            raise CommandError(
                f"--input has a column {min(clash)!r} already (line {row.line}); "
                "rename the added ones with --column_prefix"
            )
        error = row.error
        if error is None:
            try:
                items.append(predictor.parse(row.values))
                places.append(len(found))
            except BadRowError as problem:
                error = str(problem)
        found.append((row.values, None, error))
    for place, prediction in zip(places, predictor.predict(items) if items else [], strict=True):
        if isinstance(prediction, str):
            found[place] = (found[place][0], None, prediction)
        else:
            found[place] = (found[place][0], prediction, None)
    return found


def main(argv: list[str]) -> int:
    """Run ``fastbert predict``; returns the exit status. Raises CommandError for what the user can mend."""
    parser = build_parser()
    flags = parser.parse_args(argv)
    quiet_transformers()
    if flags.output != "-" and os.path.realpath(flags.output) == os.path.realpath(flags.input):
        raise CommandError(f"--output {flags.output}: is the --input; choose another")
    rows = open_rows(flags.input, "--input")
    config = load_config(flags.model_name_or_path)
    if flags.optimize:
        check_family(config, flags.model_name_or_path)
    predictor = predictor_for(config, flags, vars(parser.parse_args(_NEEDED)))
    predictor.choose_columns(rows)
    added = [flags.column_prefix + name for name in (*predictor.columns, "error")]
    output = open_output(
        flags.output,
        _own_columns(rows, added, flags),
        added,
        rows.schema,
        predictor.delimiter or flags.label_delimiter,
    )
    start = output.begin(_fingerprint(flags, predictor), resume=flags.resume, overwrite=flags.overwrite)
    if start is None:
        print(f"{flags.output} is complete already", file=sys.stderr)
        return 0

    tokenizer = load_tokenizer(flags.model_name_or_path, **predictor.tokenizer_options())
    max_length = sequence_limit(config, tokenizer, flags.max_seq_length)
    model, _ = load_model(predictor.head, flags.model_name_or_path, config, trained=predictor.what)
    check_vocabulary(tokenizer, model, flags.model_name_or_path)
    model = _place(model.eval(), flags.device)
    if flags.optimize:
        from fastbert import optimize

        optimize(model)
    predictor.attach(model, tokenizer, max_length)
    output.open()
    try:
        return _run(rows, start, predictor, added, output, flags)
    except KeyboardInterrupt:
        output.close()
        print(f"\nstopped: {output.describe()}", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        output.close()
        raise CommandError(
            f"--max_tokens_per_batch {flags.max_tokens_per_batch}: out of memory; try less. {output.describe()}"
        ) from error
    except BrokenPipeError:
        raise
    except OSError as error:
        output.close()
        if not is_disk_full(error):
            raise CommandError(f"--output {flags.output}: {first_line(error)}. {output.describe()}") from error
        raise CommandError(
            f"--output {flags.output}: no space left ({first_line(error)}). {output.describe()}"
        ) from error


def _run(
    rows: RowFile,
    start: Position,
    predictor: Predictor,
    added: list[str],
    output: Output,
    flags: argparse.Namespace,
) -> int:
    began, done_before = time.perf_counter(), output.rows
    reader = rows.rows(start)
    with tqdm(
        total=rows.size or None,
        initial=start.offset,
        unit=rows.unit,
        unit_scale=True,
        desc="predicting",
        disable=flags.quiet,
    ) as bar:
        while window := list(islice(reader, flags.window_rows)):
            results = predict_window(window, predictor, added)
            bad = 0
            lines = []
            for row, (values, prediction, error) in zip(window, results, strict=True):
                if problem := output.problem(values, prediction):
                    values, prediction, error = {}, None, error or problem
                if error is not None:
                    bad += 1
                    if flags.on_bad_row == "error":
                        if output.rows == 0:
                            output.discard()
                        raise CommandError(f"--input {flags.input}:{row.line}: {error} (--on_bad_row error)")
                    if output.bad_rows + bad <= SHOWN:
                        bar.write(f"{flags.input}:{row.line}: {error}", file=sys.stderr)
                    error = f"line {row.line}: {error}"
                lines.append((values, prediction, error))
            output.write(lines, window[-1].end, bad)
            bar.update(window[-1].end.offset - bar.n)
            rate = (output.rows - done_before) / (time.perf_counter() - began)
            bar.set_postfix_str(f"{output.rows} rows, {rate:.0f} rows/s")
    if output.rows == 0:
        output.discard()
        raise CommandError(f"--input {flags.input}: no rows")
    output.finish()
    seconds = time.perf_counter() - began
    count = output.rows - done_before
    print(
        f"{flags.output}: {output.rows} rows, {output.bad_rows} with an error; {count} in {seconds:.1f} s, "
        f"{count / seconds:.0f} rows/s, {predictor.tokens / seconds:.0f} tokens/s",
        file=sys.stderr,
    )
    if predictor.truncated:
        print(f"{predictor.truncated} texts were cut to {predictor.max_length} tokens", file=sys.stderr)
    return BAD_ROWS_STATUS if output.bad_rows else 0


def _own_columns(rows: RowFile, added: list[str], flags: argparse.Namespace) -> list[str]:
    """The input's columns; from JSONL to JSONL none need be known."""
    known = rows.columns
    if known is None:
        if output_format(flags.output) == "jsonl":
            return []
        if str(rows.path) == "-":
            raise CommandError("--input - needs a JSONL output: a table's columns must be known before its first row")
        names: dict[str, None] = {}
        for row in rows.rows():
            names.update(dict.fromkeys(row.values))
        known = list(names)
    for name in added:
        if name in known:
            raise CommandError(
                f"--input {rows.path} has a column {name!r} already; rename the added ones with --column_prefix"
            )
    return known


def _fingerprint(flags: argparse.Namespace, predictor: Predictor) -> dict[str, Any]:
    """What a resumed run must agree with for its bytes to be those of an uninterrupted one."""

    def identity(path: Path, *patterns: str) -> str:
        """Of names, sizes and times of a file, or of the files of a folder that match a pattern."""
        files = [path] if path.is_file() else sorted({file for pattern in patterns for file in path.glob(pattern)})
        states = [(os.path.relpath(file, path), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(repr(states).encode()).hexdigest()[:16]

    model, data = Path(flags.model_name_or_path), Path(flags.input)
    same = ("max_seq_length", "max_tokens_per_batch", "window_rows", "column_prefix", "optimize")
    return {
        "--model_name_or_path": [
            os.path.abspath(flags.model_name_or_path),
            identity(model, "*.safetensors", "*config.json", "tokenizer.json", "vocab*", "merges.txt", "*.model"),
        ],
        "--input": [os.path.abspath(flags.input), identity(data, "**/*.arrow", "**/*.json")],
        "columns": predictor.reads(),
        **{f"--{name}": getattr(flags, name) for name in (*same, *sorted(predictor.flags))},
    }


def _place(model: PreTrainedModel, device: str | None) -> PreTrainedModel:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(torch.device(device))  # type: ignore[arg-type]
    except (RuntimeError, AssertionError, ValueError) as error:
        raise CommandError(f"--device {device}: {first_line(error)}") from error
