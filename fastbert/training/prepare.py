"""``fastbert prepare``: text in, a memory-mapped dataset of pretraining sequences out."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from .documents import Document, DocumentReader, Source, input_names, open_sources
from .errors import CommandError, first_line, is_disk_full
from .flags import parse_flags
from .loading import load_tokenizer, quiet_transformers
from .report import picture, write_json
from .sequences import PAIR_SPECIAL, Counts
from .shards import (
    FULL_SENTENCES,
    LINES,
    PAIRS,
    PROGRESS,
    SPLIT,
    Builder,
    Job,
    Recipe,
    build,
    data_name,
    finished,
    start_worker,
)
from .shards import schema as columns_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAYOUT = 1  # goes up when the same text and settings make other sequences
SETTINGS, REPORT, PICTURE = "prepare.json", "report.json", "lengths.png"
STATE, INFO = "state.json", "dataset_info.json"  # of a dataset folder; the state is written last
FEWEST_DOCUMENTS = 16  # of a shard, however large they are, so that a random one is random


@dataclass
class PrepareArguments:
    """From text to sequences."""

    _argument_group_name = "prepare"

    input: list[str] = field(
        metadata={
            "help": "Text, plain or compressed by gzip or zstd, with a paragraph a line and a blank line between "
            "documents; .jsonl (also compressed), .parquet, .csv, .tsv or a saved dataset folder with a document a "
            "row; or folders of such files."
        }
    )
    tokenizer_name: str = field(metadata={"help": "Folder with a Hugging Face tokenizer, or a name on the hub."})
    output: str = field(metadata={"help": "Folder to write; an unfinished one is gone on with."})
    max_seq_length: int = field(default=128, metadata={"help": "Tokens of a sequence at most, special ones included."})
    seed: int = field(default=42, metadata={"help": "What is drawn at random is drawn from it."})
    workers: int = field(
        default_factory=lambda: len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
        metadata={"help": "Processes. The result does not depend on it. Default: one for each core."},
    )
    format: str = field(
        default=PAIRS,
        metadata={
            "help": "pairs: two segments for masked language modelling and next sentence prediction, as BERT; "
            "full_sentences: whole sentences across documents, for masked language modelling alone, as RoBERTa.",
            "choices": [PAIRS, FULL_SENTENCES],
        },
    )
    sentences: str = field(
        default=SPLIT,
        metadata={
            "help": "split: find the sentences in each line; lines: every line is a sentence.",
            "choices": [SPLIT, LINES],
        },
    )
    duplicates: int = field(
        default=1, metadata={"help": "Times the text is gone through, each time with other pairs and lengths."}
    )
    text_column_name: list[str] | None = field(
        default=None,
        metadata={
            "help": "Column with the text, where rows are documents; several are joined by line breaks. Default: "
            "'text' or 'sentence', whichever there is."
        },
    )
    on_bad_row: str = field(
        default="error",
        metadata={
            "help": "What to do with lines or rows that cannot be read: stop, or leave them out. They are reported "
            "by line either way.",
            "choices": ["error", "skip"],
        },
    )
    shard_megabytes: float = field(
        default=8, metadata={"help": "Text that goes into one file of the result, in millions of characters."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace what an earlier run left in --output."})
    quiet: bool = field(default=False, metadata={"help": "No progress bar."})

    def __post_init__(self) -> None:
        for name in ("workers", "duplicates"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.max_seq_length < PAIR_SPECIAL + 2:
            raise ValueError(f"--max_seq_length must be at least {PAIR_SPECIAL + 2}, got {self.max_seq_length}")
        if not self.shard_megabytes > 0:
            raise ValueError(f"--shard_megabytes must be more than 0, got {self.shard_megabytes}")


def parse(argv: list[str]) -> PrepareArguments:
    """Parse the flags. Exits with status 2 on a wrong one."""
    (parsed,) = parse_flags(
        (PrepareArguments,),
        argv,
        prog="fastbert prepare",
        usage="fastbert prepare --input PATH... --tokenizer_name DIR --output DIR [flags]\n"
        "       fastbert prepare FLAGS.json",
        description="Make pretraining data: documents into sequences, in a dataset folder that datasets.load_from_disk "
        "opens. Sentence pairs as in Devlin et al. 2019, A.2, or RoBERTa's full sentences.",
    )
    return parsed


def main(argv: list[str]) -> int:
    """Run ``fastbert prepare``; returns the exit status. Raises CommandError for what the user can mend."""
    args = parse(argv)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _run(args)
    except (OSError, BrokenProcessPool) as error:
        kept = len(list((Path(args.output) / PROGRESS).glob("*.json")))
        again = f"{kept} finished shards are kept; run the same command again to go on"
        if isinstance(error, BrokenProcessPool):
            raise CommandError(f"a worker process was killed (out of memory?). {again}") from error
        if not is_disk_full(error):
            name = str(error.filename or args.output)
            where = f"--output {name}" if Path(name).is_relative_to(args.output) else name
            raise CommandError(f"{where}: {error.strerror or first_line(error)}") from error
        raise CommandError(f"--output {args.output}: no space left. Free some; {again}") from error
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _run(args: PrepareArguments) -> int:
    quiet_transformers()
    started = time.perf_counter()
    sources = open_sources(args.input, args.text_column_name)
    tokenizer = load_tokenizer(args.tokenizer_name, "--tokenizer_name")
    recipe = _recipe(args, tokenizer)
    settings = _settings(args, recipe, tokenizer, sources)
    output = Path(args.output)
    if _prepare_output(output, settings, args.overwrite):
        print(f"--output {output}: complete already", file=sys.stderr)
        return 0
    (output / PROGRESS).mkdir(parents=True, exist_ok=True)
    write_json(output / SETTINGS, settings)
    reader = DocumentReader(sources, args.on_bad_row)
    shards = _build_all(reader, recipe, args, output)
    if not any(counts.sequences for counts in shards):
        if args.format == PAIRS and sum(counts.documents for counts in shards) == 1:
            raise CommandError(
                "--input: holds one document, and the second segment of a pair must come from another one; separate "
                f"documents by blank lines, or give --format {FULL_SENTENCES}"
            )
        raise CommandError("--input: holds no text that the tokenizer makes tokens of")
    report = _report(settings, shards)
    _finish(output, recipe, shards, report)
    seconds = time.perf_counter() - started
    print(_summary(report, seconds, output))
    return 0


def _recipe(args: PrepareArguments, tokenizer: PreTrainedTokenizerBase) -> Recipe:
    for name in ("cls_token", "sep_token", "mask_token"):
        if getattr(tokenizer, name) is None:
            raise CommandError(
                f"--tokenizer_name {args.tokenizer_name}: the tokenizer has no {name}; pretraining needs cls_token, "
                "sep_token and mask_token ([CLS], [SEP] and [MASK] in BERT's)"
            )
    return Recipe(
        tokenizer=cast(Any, tokenizer).backend_tokenizer.to_str(),
        cls=cast(int, tokenizer.cls_token_id),
        sep=cast(int, tokenizer.sep_token_id),
        format=args.format,
        max_length=args.max_seq_length,
        sentences=args.sentences,
        duplicates=args.duplicates,
        seed=args.seed,
    )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A checksum of what text a tokenizer makes which ids of."""
    backend = json.loads(cast(Any, tokenizer).backend_tokenizer.to_str())
    for setting in ("truncation", "padding", "version"):
        backend.pop(setting, None)
    return hashlib.blake2b(json.dumps(backend, sort_keys=True).encode("utf-8"), digest_size=16).hexdigest()


def _settings(
    args: PrepareArguments, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, sources: list[Source]
) -> dict[str, Any]:
    """What the result depends on, and nothing else: neither paths nor the number of workers."""
    return {
        "layout": LAYOUT,
        "format": recipe.format,
        "max_seq_length": recipe.max_length,
        "seed": recipe.seed,
        "sentences": recipe.sentences,
        "duplicates": recipe.duplicates,
        "shard_megabytes": args.shard_megabytes,
        "text_column_name": args.text_column_name,
        "on_bad_row": args.on_bad_row,
        "tokenizer": {"digest": tokenizer_digest(tokenizer), "tokens": len(tokenizer)},
        "input": input_names(sources),
    }


def _prepare_output(output: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Check that ``output`` may be written to, or gone on with; whether it is complete. Raises CommandError."""
    if output.exists() and not output.is_dir():
        raise CommandError(f"--output {output}: a file is in the way")
    content = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    if not content:
        return False
    if SETTINGS not in content:
        raise CommandError(f"--output {output}: not empty and not made by fastbert prepare (it holds {content[0]!r})")
    if overwrite:
        _clear(output)
        return False
    try:
        before = json.loads((output / SETTINGS).read_text(encoding="utf-8"))
    except ValueError:
        before = None
    if not isinstance(before, dict):
        before = {}
    for key, value in settings.items():
        if before.get(key) != value:
            raise CommandError(
                f"--output {output}: made with another {key} ({before.get(key)}, now {value}); choose another folder, "
                "or replace it with --overwrite"
            )
    return STATE in content


def _clear(output: Path) -> None:
    (output / STATE).unlink(missing_ok=True)
    shutil.rmtree(output / PROGRESS, ignore_errors=True)
    for path in [*output.glob("data-*.arrow*"), *(output / name for name in (SETTINGS, INFO, REPORT, PICTURE))]:
        path.unlink(missing_ok=True)


def cut_into_shards(documents: Iterator[Document], size: float) -> Iterator[list[list[str]]]:
    """Runs of documents of about ``size`` characters, cut by the order of the input alone.

    A rest that is less than half as large, or of a single document, goes with the run before it.
    """
    ready: list[list[str]] = []
    current: list[list[str]] = []
    characters = 0
    for document in documents:
        current.append(document.paragraphs)
        characters += document.size
        if characters >= size and len(current) >= FEWEST_DOCUMENTS:
            if ready:
                yield ready
            ready, current, characters = current, [], 0
    if ready and (characters < size / 2 or len(current) < 2):
        ready, current = ready + current, []
    yield from (shard for shard in (ready, current) if shard)


def _build_all(reader: DocumentReader, recipe: Recipe, args: PrepareArguments, output: Path) -> list[Counts]:
    """Build every shard that is not finished; their counts in order."""
    total = sum(source.size for source in reader.sources)
    found: dict[int, Counts] = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="preparing", disable=args.quiet, leave=False) as bar:
        jobs = _unfinished(reader, args, output, found)
        for number, counts in _results(jobs, recipe, args.workers):
            found[number] = counts
            bar.update(reader.done - bar.n)
    return [found[number] for number in sorted(found)]


def _unfinished(
    reader: DocumentReader, args: PrepareArguments, output: Path, found: dict[int, Counts]
) -> Iterator[Job]:
    shards = cut_into_shards(reader.documents(), args.shard_megabytes * 1e6)
    for number, documents in enumerate(shards):
        job = Job(number, documents, output)
        counts = finished(job)
        if isinstance(counts, str):
            raise CommandError(
                f"--output {output}: the text of {job.data.name} has changed since the run that is gone on with; "
                "start anew with --overwrite"
            )
        if counts is None:
            yield job
        else:
            found[number] = counts


def _results(jobs: Iterator[Job], recipe: Recipe, workers: int) -> Iterator[tuple[int, Counts]]:
    """Number and counts of each shard, as they get ready."""
    if workers == 1:
        builder = Builder(recipe)
        for job in jobs:
            yield job.number, builder.build(job)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, start_worker, (recipe,)) as pool:
        running: dict[Future[Counts], int] = {}
        try:
            for job in jobs:
                running[pool.submit(build, job)] = job.number
                while len(running) >= 2 * workers:  # so that the text of a few shards is in memory, not all of it
                    yield from _ready(running)
            while running:
                yield from _ready(running)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _ready(running: dict[Future[Counts], int]) -> Iterator[tuple[int, Counts]]:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        yield running.pop(future), future.result()


def _report(settings: dict[str, Any], shards: list[Counts]) -> dict[str, Any]:
    total = Counts()
    for counts in shards:
        total.add(counts)
    kept = sum(length * count for length, count in enumerate(total.lengths))
    found = asdict(total)
    lengths, vocabulary = found.pop("lengths"), np.array(found.pop("vocabulary"), np.float64)
    sequences = max(1, total.sequences)
    if settings["format"] == PAIRS:
        shares = {name: found[name] / sequences for name in ("next", "random", "forced_random", "short")}
    else:
        shares = {}
        for name in ("next", "random", "forced_random", "short", "unpaired_documents"):
            del found[name]
    return {
        "settings": settings,
        "counts": found | {"shards": len(shards), "sequence_tokens": kept},
        "shares": shares,
        "mean_length": kept / sequences,
        "unigram_entropy": _entropy(vocabulary),
        "lengths": lengths,
    }


def _entropy(counts: np.ndarray) -> float:
    """Entropy in nats of a draw by these counts: of tokens, the loss of guessing them by their frequency alone."""
    shares = counts[counts > 0] / max(1.0, counts.sum())
    return float(-(shares * np.log(shares)).sum())


def _finish(output: Path, recipe: Recipe, shards: list[Counts], report: dict[str, Any]) -> None:
    """Write what makes the shards one dataset; the state last, so that a folder with it is complete."""
    from datasets import DatasetInfo, Features

    for path in output.glob("data-*.arrow*"):
        if path.name not in {data_name(number) for number in range(len(shards))}:
            path.unlink()
    info = DatasetInfo(features=Features.from_arrow_schema(columns_of(recipe.format)))
    write_json(output / INFO, asdict(info))
    write_json(output / REPORT, report)
    _plot(output / PICTURE, report)
    fingerprint = hashlib.blake2b(json.dumps(report, sort_keys=True).encode("utf-8"), digest_size=8).hexdigest()
    names = [data_name(number) for number, counts in enumerate(shards) if counts.sequences]
    write_json(
        output / STATE,
        {
            "_data_files": [{"filename": name} for name in names],
            "_fingerprint": fingerprint,
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        },
    )
    shutil.rmtree(output / PROGRESS)


def _plot(path: Path, report: dict[str, Any]) -> None:
    """How long the sequences are and what shares they have."""
    counts, lengths, shares = report["counts"], report["lengths"], report["shares"]
    title = f"{counts['sequences']} sequences of {counts['documents']} documents"
    with picture(path, title, 9, 2, width_ratios=(2, 1)) as (left, right):
        left.bar(range(len(lengths)), lengths, width=1.0)
        left.set(xlabel="tokens of a sequence", ylabel="sequences", yscale="log")
        right.bar(list(shares), list(shares.values()), color="C1")
        right.set(ylabel="share of the sequences", ylim=(0, 1))
        right.tick_params(axis="x", labelrotation=20)
        if not shares:
            right.remove()


def _summary(report: dict[str, Any], seconds: float, output: Path) -> str:
    counts, shares = report["counts"], report["shares"]
    lines = [
        f"{counts['documents']} documents, {counts['sentences']} sentences, {counts['tokens']} tokens",
        f"{counts['sequences']} sequences, {report['mean_length']:.1f} tokens on average, in {counts['shards']} files",
    ]
    if shares:
        lines.append(
            f"next {shares['next']:.1%}, random {shares['random']:.1%} "
            f"({shares['forced_random']:.1%} for want of a next), short {shares['short']:.1%}"
        )
    if counts.get("unpaired_documents"):
        lines.append(f"{counts['unpaired_documents']} documents had no other beside them and were left out")
    lines.append(f"{seconds:.0f} s; {REPORT} and {PICTURE} are in {output}")
    return "\n".join(lines)
