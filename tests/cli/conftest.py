"""A tiny random BERT with a tokenizer of its own, small data, and the command in this or another process."""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from fastbert.cli import main

TOPICS = {
    "animal": ["dog", "cat", "horse", "whale", "sparrow", "barks", "runs", "sleeps", "hunts", "tail"],
    "food": ["bread", "cheese", "soup", "apple", "salt", "cooks", "tastes", "bakes", "spicy", "plate"],
    "space": ["star", "planet", "orbit", "rocket", "moon", "shines", "lands", "launches", "crater", "dust"],
}
FILLER = ["the", "a", "very", "often", "never", "my", "old", "some", "with", "under", "near", "today"]

SAVEFIG = Figure.savefig
MEASURED = {"tokens_per_second", "tflops", "mfu"}  # what no two runs have in common


# Imports are most of the time that a short command takes: they are made once, and each process is a fork of this one.
NURSERY = """
import json, os, sys
import accelerate, datasets, matplotlib.pyplot, pyarrow.parquet, scipy.stats, sklearn.metrics, transformers
import fastbert.training.finetune, fastbert.predict, fastbert.training.prepare, fastbert.training.pretrain
from fastbert.cli import main

while line := sys.stdin.readline():
    arguments, errors = json.loads(line)
    errors, nothing = os.open(errors, os.O_WRONLY), os.open(os.devnull, os.O_RDWR)
    child = os.fork()
    if child == 0:
        os.setsid()
        for target, source in enumerate((nothing, nothing, errors)):
            os.dup2(source, target)
    os.close(errors), os.close(nothing)
    if child == 0:
        sys.exit(main(arguments))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def nursery() -> subprocess.Popen[bytes]:
    """It ends with the tests, when its standard input does."""
    return subprocess.Popen(
        [sys.executable, "-c", NURSERY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


class Started:
    """A command that runs in a process of its own."""

    def __init__(self, parent: subprocess.Popen[bytes], arguments: list[str]) -> None:
        assert parent.stdin is not None
        assert parent.stdout is not None
        self.told = parent.stdout
        self.returncode: int | None = None
        with tempfile.TemporaryDirectory() as folder:
            pipe = os.path.join(folder, "stderr")
            os.mkfifo(pipe)
            self.errors = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
            parent.stdin.write(f"{json.dumps([arguments, pipe])}\n".encode())
            self.pid = int(self.told.readline())

    def poll(self, seconds: float = 0) -> int | None:
        if self.returncode is None and select.select([self.told], [], [], seconds)[0]:
            self.returncode = int(self.told.readline())
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> str:
        """What it has written to stderr, when it and all that it started have ended."""
        written = b""
        while select.select([self.errors], [], [], 120)[0]:
            if not (part := os.read(self.errors, 1 << 16)):
                os.close(self.errors)
                assert self.poll(120) is not None
                return written.decode()
            written += part
        self.send_signal(signal.SIGKILL)
        pytest.fail(f"has not ended: {written.decode()}")


class Kit:
    """Helpers of these tests. Importing them from a module is not possible in pytest's importlib mode."""

    @staticmethod
    def sentence(rng: random.Random, topic: str, words: int | None = None) -> str:
        """A sentence whose words tell its topic."""
        count = words or rng.randint(3, 14)
        return " ".join(rng.choice(TOPICS[topic] if rng.random() < 0.6 else FILLER) for _ in range(count))

    @staticmethod
    def examples(count: int, seed: int = 0) -> list[dict[str, Any]]:
        """``count`` rows with a text and its topic as label."""
        rng = random.Random(seed)
        topics = [sorted(TOPICS)[i % 3] for i in range(count)]
        return [{"text": Kit.sentence(rng, topic), "label": topic} for topic in topics]

    @staticmethod
    def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
        """Write rows as CSV, TSV, JSONL or Parquet by the path's ending, or as a saved dataset if it has none."""
        if path.suffix in (".csv", ".tsv"):
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if path.suffix == ".tsv" else ",")
                writer.writeheader()
                writer.writerows(rows)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        elif path.suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            import datasets

            datasets.Dataset.from_list(rows).save_to_disk(str(path))
        return path

    @staticmethod
    def finetune_flags(model: Path, train: Path, output: Path, **more: Any) -> list[str]:
        """``finetune`` with the flags that every test gives, and ``more``."""
        flags = {
            "model_name_or_path": model,
            "train_file": train,
            "output_dir": output,
            "disable_tqdm": True,
            "use_cpu": True,
            **more,
        }
        return ["finetune", *(text for name, value in flags.items() for text in (f"--{name}", str(value)))]

    @staticmethod
    def predict_flags(model: Path, source: Path | str, output: Path | str, **more: Any) -> list[str]:
        """``predict`` with the flags that every test gives, and ``more``; True stands for a flag without a value."""
        flags = {
            "model_name_or_path": model,
            "input": source,
            "output": output,
            "text_column_name": "text",
            "device": "cpu",
            "quiet": True,
            **more,
        }
        return [
            "predict",
            *(
                text
                for name, value in flags.items()
                for text in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
            ),
        ]

    TINY = "num_hidden_layers=2,hidden_size=32,num_attention_heads=2,intermediate_size=64,max_position_embeddings=64"
    NO_DROPOUT = f"{TINY},hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"

    @staticmethod
    def prepare(corpus: Path, model: Path, output: Path, **more: Any) -> Path:
        """Pretraining data of a text."""
        flags = {"tokenizer_name": model, "output": output, "max_seq_length": 32, "workers": 1, "shard_megabytes": 0.05}
        named = [text for name, value in (flags | more).items() for text in (f"--{name}", str(value))]
        assert main(["prepare", "--input", str(corpus), "--quiet", *named]) == 0
        return output

    @staticmethod
    def pretrain_flags(
        data: Path | list[Path], tokenizer: Path, output: Path, *, dropout: bool = True, **more: Any
    ) -> list[str]:
        """``pretrain`` with the flags that every test gives, and ``more``; None takes one away."""
        given = {
            "tokenizer_name": tokenizer,
            "config_overrides": Kit.TINY if dropout else Kit.NO_DROPOUT,
            "output_dir": output,
            "max_steps": 8,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
        } | more
        folders = data if isinstance(data, list) else [data]
        flags = ["pretrain", "--dataset", *map(str, folders)]
        for name, value in given.items():
            if value is not None:
                flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return flags

    @staticmethod
    def report(folder: Path) -> dict[str, Any]:
        """What a run has reported."""
        return json.loads((folder / "report.json").read_text(encoding="utf-8"))

    @staticmethod
    def curve(folder: Path) -> list[dict[str, Any]]:
        """What a pretraining run has logged, but for what depends on the clock."""
        history = Kit.report(folder)["history"]
        return [{k: v for k, v in entry.items() if k not in MEASURED} for entry in history]

    @staticmethod
    @contextlib.contextmanager
    def pictures() -> Iterator[None]:
        """Pictures are drawn in here."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Figure, "savefig", SAVEFIG)
            yield

    @staticmethod
    def start(arguments: list[str]) -> Started:
        """The command in a process of its own."""
        return Started(nursery(), arguments)

    @staticmethod
    def signal_when(process: Started, ready: Callable[[], bool], number: int = signal.SIGKILL) -> str:
        """Send a signal as soon as ``ready`` says so; returns what the process wrote to stderr."""
        deadline = time.monotonic() + 120
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                process.send_signal(signal.SIGKILL)
                pytest.fail(f"ended before it could be interrupted: {process.wait()}")
            time.sleep(0.002)
        process.send_signal(number)
        return process.wait()


@pytest.fixture(scope="session", autouse=True)
def imported() -> None:
    """What the commands import is there before the fixture `frozen_garbage` of the first module runs."""
    import fastbert.predict
    import fastbert.training.finetune
    import fastbert.training.pretrain  # noqa: F401


@pytest.fixture(scope="module", autouse=True)
def blank_pictures() -> Iterator[None]:
    """Drawing its curves is half of a short run, and few tests here look at them: they do with `Kit.pictures`."""

    def blank(figure: Figure, path: Path, **options: Any) -> None:
        path.touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", blank)
        yield


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A shell that starts tests in the background has them, and all that they start, ignore SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in the processes that `Kit.start` makes: runs that are compared to the bit take the same number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as it comes before fine-tuning: an encoder and no head."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("model") / "tiny"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    corpus = [" ".join([*words, *FILLER]) for words in TOPICS.values()]
    tokenizer.train_from_iterator(corpus, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", tokenizer.token_to_id("[CLS]")), ("[SEP]", tokenizer.token_to_id("[SEP]"))],
    )
    BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.1,  # at this width the usual 0.02 makes all sentences look alike, and training gets stuck
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def classifier(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned classifier of the three topics."""
    folder = tmp_path_factory.mktemp("classifier")
    train = Kit.write_rows(folder / "train.csv", Kit.examples(240))
    flags = ["--num_train_epochs", "6", "--learning_rate", "3e-3", "--per_device_train_batch_size", "16"]
    with Kit.pictures():
        assert main(Kit.finetune_flags(base_model, train, folder / "out") + flags) == 0
    return folder / "out"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to pretrain on."""
    rng = random.Random(1)
    documents = []
    for number in range(300):
        topic = ["animal", "food", "space"][number % 3]
        documents.append(" ".join(Kit.sentence(rng, topic).capitalize() + "." for _ in range(rng.randint(3, 12))))
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def pairs(corpus: Path, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pretraining data: sentence pairs of at most 32 tokens."""
    return Kit.prepare(corpus, base_model, tmp_path_factory.mktemp("prepared") / "short")


@pytest.fixture(scope="session")
def long_pairs(corpus: Path, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of at most 64 tokens."""
    return Kit.prepare(corpus, base_model, tmp_path_factory.mktemp("prepared") / "long", max_seq_length=64)


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int], None]]:
    """Limits the size of any file written, which fails as a full disk does."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size if size >= 0 else before[0], before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
