"""Every example runs as it says, on a tiny model and a few texts, and leaves a model that stock code opens."""

from __future__ import annotations

import contextlib
import io
import random
import runpy
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TOPICS = {"animal": ["dog", "cat", "horse", "whale"], "food": ["bread", "cheese", "soup", "salt"]}
FILLER = ["the", "a", "very", "often", "my", "old"]


def sentence(rng: random.Random, topic: str) -> str:
    return " ".join(rng.choice(TOPICS[topic] if rng.random() < 0.5 else FILLER) for _ in range(rng.randint(3, 9)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a masked language model's head and a tokenizer."""
    import torch
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer

    folder = tmp_path_factory.mktemp("model")
    words = [word for topic in TOPICS.values() for word in topic] + FILLER
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    BertTokenizer(vocab=vocabulary, model_max_length=32).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    labelled, texts, pairs = folder / "labelled.tsv", folder / "texts.txt", folder / "pairs.tsv"
    topics = [rng.choice(sorted(TOPICS)) for _ in range(40)]
    labelled.write_text("label\ttext\n" + "".join(f"{t}\t{sentence(rng, t)}\n" for t in topics), encoding="utf-8")
    texts.write_text("".join(f"{sentence(rng, t)}\n" for t in topics), encoding="utf-8")
    pairs.write_text(
        "anchor\tpositive\n" + "".join(f"{sentence(rng, t)}\t{sentence(rng, t)}\n" for t in topics), encoding="utf-8"
    )
    return {"labelled": labelled, "texts": texts, "pairs": pairs}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def two_processes() -> list[str]:
    """torchrun on this machine alone."""
    where = ["--nnodes=1", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    return ["-m", "torch.distributed.run", *where]


def opens_in_stock(folder: Path, kind: str, layers: int = 2) -> Any:
    """The folder opens in plain transformers, nothing missing."""
    import transformers

    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert type(model).__module__.startswith("transformers.")
    assert len(model.base_model.encoder.layer) == layers
    return model


# name -> data, further flags, Auto class of what it leaves
ALONE = {
    "pytorch_loop": ("labelled", [], "AutoModelForSequenceClassification"),
    "accelerate_loop": ("texts", ["--accumulate", "2", "--cpu"], "AutoModelForMaskedLM"),
    "peft_lora": ("labelled", ["--epochs", "1"], "AutoModelForSequenceClassification"),
    "trainer": ("labelled", ["--num_train_epochs", "1", "--report_to", "none"], "AutoModelForSequenceClassification"),
    "sentence_transformers_training": ("pairs", ["--batch-size", "8", "--cpu"], "AutoModel"),
}
TOGETHER: dict[str, tuple[str, list[str], str]] = {
    "ddp": ("texts", [], "AutoModelForMaskedLM"),
    "fsdp2": ("texts", [], "AutoModelForMaskedLM"),
}


def in_this_process(command: list[str]) -> str:
    """What a script prints. On a CPU, as in processes that see no GPU."""
    import torch

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as shown:
        patch.setattr(sys, "argv", command)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        runpy.run_path(command[0], run_name="__main__")
    return shown.getvalue()


@pytest.fixture(scope="module")
def ran(
    run_commands: Any, model: Path, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[str, Path]]:
    """What every example has printed, and where its model is. Those of one process run in this one: no imports anew."""
    commands, folders = {}, {}
    for name, (data, flags, _) in (ALONE | TOGETHER).items():
        folders[name] = tmp_path_factory.mktemp(name) / "out"
        output = "--output_dir" if name == "trainer" else "--output"
        where = ["--model", str(model), "--train", str(files[data]), output, str(folders[name])]
        commands[name] = [str(EXAMPLES / f"{name}.py"), *where, *flags]
    shown = {name: in_this_process(commands[name]) for name in ALONE}
    together = [[sys.executable, *two_processes(), *commands[name]] for name in TOGETHER]
    shown |= zip(TOGETHER, run_commands(together, seconds=420, CUDA_VISIBLE_DEVICES=""), strict=True)
    return {name: (shown[name], folders[name]) for name in commands}


@pytest.mark.parametrize("name", ALONE | TOGETHER)
def test_example(ran: dict[str, tuple[str, Path]], name: str) -> None:
    shown, folder = ran[name]
    words = {"trainer": "eval_accuracy", "sentence_transformers_training": "train_loss"}.get(name, "epoch 1: loss ")
    assert words in shown
    assert "fast" in shown
    assert opens_in_stock(folder, (ALONE | TOGETHER)[name][2])


def test_trained_embeddings(ran: dict[str, tuple[str, Path]]) -> None:
    from sentence_transformers import SentenceTransformer

    _, folder = ran["sentence_transformers_training"]
    assert SentenceTransformer(str(folder), device="cpu").encode(["a dog"]).shape == (1, 32)


@pytest.mark.parametrize("name", ALONE | TOGETHER)
def test_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [f"examples/{name}.py", "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"examples/{name}.py --model" in shown
    assert "--train" in shown
