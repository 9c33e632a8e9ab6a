"""``fastbert predict``: a trained classifier over a file of any size.

Rows are read in windows; a window is tokenised, sorted by length into batches of a token budget, and written in input
order to a part file, which takes the output's name at the end. A journal next to it says what is complete, so that a
run that was killed goes on from there and ends with the same bytes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from .training.data import BadRowError, TextColumns, choose_text_columns, tokenize
from .training.errors import CommandError, first_line, is_disk_full
from .training.loading import (
    check_vocabulary,
    load_classifier,
    load_config,
    load_tokenizer,
    quiet_transformers,
    sequence_limit,
)
from .training.output import Output, open_output, output_format
from .training.rows import Position, Row, RowFile, open_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
BAD_ROWS_STATUS = 3  # the exit status of a run that is complete but for rows that it could not predict
SHOWN = 20  # bad rows printed in full


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``fastbert predict``."""
    parser = argparse.ArgumentParser(
        prog="fastbert predict",
        description="Predict with a fine-tuned classifier over a CSV, TSV, JSONL or Parquet file. The output keeps the "
        "input's columns and order and adds predicted_label and score (or predicted_value), and error.",
        epilog=f"Exit status: 0 all rows predicted, {BAD_ROWS_STATUS} done but for rows with an error, 1 failed, "
        "2 wrong flags, 130 interrupted.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model_name_or_path", required=True, metavar="DIR", help="folder that fastbert finetune or HF Trainer wrote")
    add("--input", required=True, metavar="FILE", help="file or saved dataset folder; - for JSONL from standard input")
    add(
        "--output", required=True, metavar="FILE", help=".csv, .tsv, .jsonl or .parquet; - for JSONL on standard output"
    )
    add("--text_column_name", nargs="+", metavar="NAME", help="column with the text; several are joined")
    add("--text_column_delimiter", default=" ", metavar="X", help="joins several text columns (default: a space)")
    add("--text_pair_column_name", metavar="NAME", help="column with the second sentence of a pair")
    add("--max_seq_length", type=_positive, metavar="N", help="longer texts are cut (default: what the model allows)")
    add("--max_tokens_per_batch", type=_positive, default=8192, metavar="N", help="tokens in a batch (default: 8192)")
    add("--window_rows", type=_positive, default=4096, metavar="N", help="rows in memory at a time (default: 4096)")
    add("--all_scores", action="store_true", help="add a column score_<label> for every label")
    add("--threshold", type=float, default=0.5, metavar="P", help="multi-label: labels above it apply (default: 0.5)")
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
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text.lower() == "true"


@dataclass
class Head:
    """What the model's outputs mean, and the columns that they fill."""

    kind: str
    names: list[str]
    all_scores: bool
    threshold: float
    prefix: str

    @classmethod
    def of(cls, config: Any, flags: argparse.Namespace) -> Head:
        kind = config.problem_type or (REGRESSION if config.num_labels == 1 else SINGLE)
        names = [str(config.id2label[i]) for i in range(config.num_labels)]
        return cls(kind, names, flags.all_scores, flags.threshold, flags.column_prefix)

    @property
    def columns(self) -> list[str]:
        """Names of the added columns but ``error``."""
        if self.kind == REGRESSION:
            single = len(self.names) == 1
            found = ["predicted_value"] if single else [f"predicted_value_{name}" for name in self.names]
        else:
            found = ["predicted_label"] if self.kind == MULTI else ["predicted_label", "score"]
            if self.all_scores or self.kind == MULTI:
                found += [f"score_{name}" for name in self.names]
        return [self.prefix + name for name in found]

    @property
    def error_column(self) -> str:
        return self.prefix + "error"

    def values(self, logits: np.ndarray) -> list[Any]:
        """The values of :attr:`columns` for one row's logits [labels]."""
        if self.kind == REGRESSION:
            return [float(f"{x:.7g}") for x in logits]
        if self.kind == MULTI:
            scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
            chosen = [name for name, score in zip(self.names, scores, strict=True) if score > self.threshold]
            return [chosen, *(round(float(score), 6) for score in scores)]
        exponents = np.exp(logits.astype(np.float64) - logits.max())
        scores = exponents / exponents.sum()
        best = int(scores.argmax())
        every = [round(float(score), 6) for score in scores] if self.all_scores else []
        return [self.names[best], round(float(scores[best]), 6), *every]


def batches(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Indices sorted by length, in batches whose padded size is at most ``budget`` tokens (or one row)."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@dataclass
class Predictor:
    """A model with its tokenizer, from texts to logits."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    budget: int
    tokens: int = 0
    truncated: int = 0

    @torch.inference_mode()
    def logits(self, texts: list[str], pairs: list[str] | None) -> np.ndarray:
        """Logits [len(texts), labels] in float32, in the order of the texts."""
        encoded, cut = tokenize(self.tokenizer, texts, pairs, self.max_length)
        self.truncated += cut
        lengths = [len(ids) for ids in encoded["input_ids"]]
        self.tokens += sum(lengths)
        result = np.full((len(texts), int(self.model.config.num_labels or 1)), np.nan, dtype=np.float32)
        for batch in batches(lengths, self.budget):
            inputs = self.tokenizer.pad(
                {name: [values[i] for i in batch] for name, values in encoded.items()}, return_tensors="pt"
            )
            logits = self.model(**inputs.to(self.model.device)).logits
            result[batch] = logits.float().cpu().numpy().reshape(len(batch), -1)
        return result


def predict_window(
    rows: list[Row], text: TextColumns, predictor: Predictor, head: Head
) -> list[tuple[dict[str, Any], list[Any] | None, str | None]]:
    """(original values, prediction or None, error or None) of each row, in order."""
    found: list[tuple[dict[str, Any], list[Any] | None, str | None]] = []
    places: list[int] = []
    texts: list[str] = []
    pairs: list[str] = []
    added = {*head.columns, head.error_column}
    for row in rows:
        if clash := added & row.values.keys():
            raise CommandError(
                f"--input has a column {min(clash)!r} already (line {row.line}); "
                "rename the added ones with --column_prefix"
            )
        error = row.error
        if error is None:
            try:
                first, second = text.of(row.values)
            except BadRowError as problem:
                error = str(problem)
            else:
                places.append(len(found))
                texts.append(first)
                pairs.append(second or "")
        found.append((row.values, None, error))
    if texts:
        logits = predictor.logits(texts, pairs if text.pair else None)
        for place, values in zip(places, logits, strict=True):
            if np.isfinite(values).all():
                found[place] = (found[place][0], head.values(values), None)
            else:
                found[place] = (found[place][0], None, "the model gave NaN or infinite numbers")
    return found


def main(argv: list[str]) -> int:
    """Run ``fastbert predict``; returns the exit status. Raises CommandError for what the user can mend."""
    flags = build_parser().parse_args(argv)
    quiet_transformers()
    rows = open_rows(flags.input, "--input")
    text = _text_columns(rows, flags)
    config = load_config(flags.model_name_or_path)
    head = Head.of(config, flags)
    output = open_output(
        flags.output,
        _own_columns(rows, head, flags),
        [*head.columns, head.error_column],
        rows.schema,
        flags.label_delimiter,
    )
    start = output.begin(_fingerprint(flags, text), resume=flags.resume, overwrite=flags.overwrite)
    if start is None:
        print(f"{flags.output} is complete already", file=sys.stderr)
        return 0

    tokenizer = load_tokenizer(flags.model_name_or_path)
    max_length = sequence_limit(config, tokenizer, flags.max_seq_length)
    model = load_classifier(flags.model_name_or_path, config, trained=True)
    check_vocabulary(tokenizer, model, flags.model_name_or_path)
    model = _place(model.eval(), flags.device)
    if flags.optimize:
        from fastbert import optimize

        optimize(model)
    predictor = Predictor(model, tokenizer, max_length, flags.max_tokens_per_batch)
    output.open()
    try:
        return _run(rows, start, text, predictor, head, output, flags)
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
    text: TextColumns,
    predictor: Predictor,
    head: Head,
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
            results = predict_window(window, text, predictor, head)
            bad = 0
            lines = []
            for row, (values, prediction, error) in zip(window, results, strict=True):
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


def _text_columns(rows: RowFile, flags: argparse.Namespace) -> TextColumns:
    names = flags.text_column_name
    if str(rows.path) == "-":
        if not names:
            raise CommandError("--text_column_name is needed with --input -")
        return TextColumns(tuple(names), flags.text_column_delimiter, flags.text_pair_column_name)
    return choose_text_columns(rows, names, flags.text_column_delimiter, flags.text_pair_column_name)


def _own_columns(rows: RowFile, head: Head, flags: argparse.Namespace) -> list[str]:
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
    for name in [*head.columns, head.error_column]:
        if name in known:
            raise CommandError(
                f"--input {rows.path} has a column {name!r} already; rename the added ones with --column_prefix"
            )
    return known


def _fingerprint(flags: argparse.Namespace, text: TextColumns) -> dict[str, Any]:
    """What a resumed run must agree with for its bytes to be those of an uninterrupted one."""

    def identity(path: Path) -> list[int] | None:
        return [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else None

    same = ("max_seq_length", "max_tokens_per_batch", "window_rows", "all_scores", "threshold", "label_delimiter")
    return {
        "--model_name_or_path": [
            os.path.abspath(flags.model_name_or_path),
            identity(Path(flags.model_name_or_path) / "model.safetensors"),
        ],
        "--input": [os.path.abspath(flags.input), identity(Path(flags.input))],
        "text columns": [list(text.names), text.delimiter, text.pair],
        **{f"--{name}": getattr(flags, name) for name in (*same, "column_prefix", "optimize")},
    }


def _place(model: PreTrainedModel, device: str | None) -> PreTrainedModel:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(torch.device(device))  # type: ignore[arg-type]
    except (RuntimeError, AssertionError, ValueError) as error:
        raise CommandError(f"--device {device}: {first_line(error)}") from error
