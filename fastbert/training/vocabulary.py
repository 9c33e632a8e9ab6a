"""``fastbert tokenizer``: a WordPiece vocabulary from text, as an ordinary Hugging Face tokenizer folder."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from .documents import DocumentReader, open_sources
from .errors import CommandError, first_line, is_disk_full
from .flags import parse_flags
from .loading import quiet_transformers

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # in the order of their ids
ALPHABET = 1000  # single characters kept at most, the most frequent ones; words with others are [UNK]


@dataclass
class TokenizerArguments:
    """From text to a vocabulary."""

    _argument_group_name = "tokenizer"

    input: list[str] = field(metadata={"help": "Files and folders, as for `fastbert prepare`."})
    output: str = field(metadata={"help": "Folder to write."})
    vocab_size: int = field(default=30522, metadata={"help": "Tokens, special ones included."})
    lowercase: bool = field(default=False, metadata={"help": "Lower-case the text and strip accents, as uncased BERT."})
    min_frequency: int = field(default=2, metadata={"help": "A pair of pieces that is rarer is not joined."})
    max_seq_length: int = field(default=512, metadata={"help": "The tokenizer's model_max_length."})
    text_column_name: list[str] | None = field(
        default=None, metadata={"help": "Column with the text, where rows are documents."}
    )
    on_bad_row: str = field(
        default="error",
        metadata={"help": "Lines or rows that cannot be read: stop, or leave them out.", "choices": ["error", "skip"]},
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an earlier tokenizer in --output."})
    quiet: bool = field(default=False, metadata={"help": "No progress bar."})

    def __post_init__(self) -> None:
        for name, least in (("vocab_size", len(SPECIAL) + 1), ("min_frequency", 1), ("max_seq_length", 5)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")


def main(argv: list[str]) -> int:
    """Run ``fastbert tokenizer``; returns the exit status. Raises CommandError for what the user can mend."""
    (args,) = parse_flags(
        (TokenizerArguments,),
        argv,
        prog="fastbert tokenizer",
        usage="fastbert tokenizer --input PATH... --output DIR [--vocab_size N] [flags]\n"
        "       fastbert tokenizer FLAGS.json",
        description="Learn a WordPiece vocabulary, as BERT's, from text.",
    )
    quiet_transformers()
    output = Path(args.output)
    with _output_errors(output):
        _check_output(output, args.overwrite)
    vocabulary = learn(args)
    with _output_errors(output):
        _save(args, vocabulary, output)
    if len(vocabulary) < args.vocab_size:
        print(
            f"--vocab_size {args.vocab_size}: the text has only {len(vocabulary)} pieces that occur at least "
            f"{args.min_frequency} times (--min_frequency)",
            file=sys.stderr,
        )
    print(f"{len(vocabulary)} tokens; the tokenizer is in {output}")
    return 0


@contextmanager
def _output_errors(output: Path) -> Iterator[None]:
    """What keeps ``output`` from being written in here is a CommandError."""
    try:
        yield
    except CommandError:
        raise
    except Exception as error:  # tokenizers raises nothing more special
        if is_disk_full(error):
            raise CommandError(f"--output {output}: no space left ({first_line(error)})") from error
        if isinstance(error, OSError):
            problem = error.strerror or first_line(error)
            raise CommandError(f"--output {output}: no folder can be written there: {problem}") from error
        raise


def _check_output(output: Path, overwrite: bool) -> None:
    """Raise CommandError or OSError, before the work, if ``output`` is occupied or cannot be written."""
    if output.exists() and not output.is_dir():
        raise CommandError(f"--output {output}: a file is in the way")
    content = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    if content and not (overwrite and "tokenizer.json" in content):
        hint = "; replace it with --overwrite" if "tokenizer.json" in content else ""
        raise CommandError(f"--output {output}: not empty (it holds {content[0]!r}){hint}")
    # Permissions do not tell it all, to root least of all: a folder is made, and goes again.
    nearest = next((path for path in (output, *output.parents) if path.exists()), Path())
    tempfile.TemporaryDirectory(dir=nearest).cleanup()


def learn(args: TokenizerArguments) -> list[str]:
    """The vocabulary in the order of its ids. Goes through the text twice; the same text gives the same vocabulary."""
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = _text_rules(args.lowercase)
    normalize = tokenizer.normalizer.normalize_str
    characters: Counter[str] = Counter()
    for paragraph in _paragraphs(args, "counting characters"):
        characters.update(normalize(paragraph))
    ranked = sorted((c for c in characters if not c.isspace()), key=lambda c: (-characters[c], c))
    if not ranked:
        raise CommandError("--input: holds no text")
    alphabet = sorted(ranked[: min(ALPHABET, (args.vocab_size - len(SPECIAL)) // 2)])
    # The trainer numbers pieces inside words in the order of a hash table that is different each time, and breaks ties
    # by number. Named as special tokens they have their numbers from the start.
    inside = [f"##{c}" for c in alphabet if len(tokenizer.pre_tokenizer.pre_tokenize_str(normalize(f"a{c}a"))) == 1]
    trainer = trainers.WordPieceTrainer(
        vocab_size=args.vocab_size,
        min_frequency=args.min_frequency,
        special_tokens=[*SPECIAL, *inside],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_paragraphs(args, "learning the vocabulary"), trainer)
    found = tokenizer.get_vocab()
    return sorted(found, key=lambda token: found[token])


def _text_rules(lowercase: bool) -> tuple[Any, Any]:
    from tokenizers import normalizers, pre_tokenizers

    return normalizers.BertNormalizer(lowercase=lowercase), pre_tokenizers.BertPreTokenizer()


def _paragraphs(args: TokenizerArguments, title: str) -> Iterator[str]:
    sources = open_sources(args.input, args.text_column_name)
    reader = DocumentReader(sources, args.on_bad_row)
    total = sum(source.size for source in sources)
    with tqdm(total=total, unit="B", unit_scale=True, desc=title, disable=args.quiet, leave=False) as bar:
        for document in reader.documents():
            yield from document.paragraphs
            bar.update(reader.done - bar.n)


def _save(args: TokenizerArguments, vocabulary: list[str], output: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import BertTokenizerFast  # type: ignore[attr-defined]  # an alias made at run time

    numbers = {token: number for number, token in enumerate(vocabulary)}
    backend = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = _text_rules(args.lowercase)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, numbers[name]) for name in ("[CLS]", "[SEP]")],
    )
    backend.decoder = decoders.WordPiece()
    tokenizer = BertTokenizerFast(
        tokenizer_object=backend, do_lower_case=args.lowercase, model_max_length=args.max_seq_length
    )
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=output) as partial:
        tokenizer.save_pretrained(partial)
        Path(partial, "vocab.txt").write_text("".join(f"{token}\n" for token in vocabulary), encoding="utf-8")
        for path in sorted(Path(partial).iterdir()):
            path.replace(output / path.name)
