"""What all tasks of ``fastbert finetune`` have in common: how they are told apart, and that they resume."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fastbert
from fastbert.cli import main
from fastbert.training.arguments import TASK_NAMES, parse
from fastbert.training.checkpoints import checkpoints
from fastbert.training.rows import open_rows
from fastbert.training.tasks import TASKS, choose_task

TOKENS = {"tokens": ["the", "dog", "barks"], "tags": ["O", "B-ANI", "O"]}
QUESTION = {"context": "the dog barks", "question": "barks", "answers": {"text": ["dog"], "answer_start": [4]}}
CHOICE = {"sent1": "a dog", "sent2": "often", "ending0": "barks", "ending1": "shines", "label": 0}
PAIR = {"anchor": "a dog", "positive": "the cat"}


@pytest.mark.parametrize(
    ("row", "flags", "task"),
    [
        (TOKENS, [], "token_classification"),
        (QUESTION, [], "question_answering"),
        (CHOICE, [], "multiple_choice"),
        (PAIR, [], "sentence_embeddings"),
        ({"text": "a", "label": "b"}, [], "sequence_classification"),
        # Named columns are what they were before there were other tasks.
        (QUESTION, ["--text_column_name", "question"], "sequence_classification"),
        (CHOICE, ["--label_column_name", "label"], "sequence_classification"),
        (CHOICE, ["--label_column_name", "label", "--task", "multiple_choice"], "multiple_choice"),
        ({"q": "a", "options": ["b", "c"], "label": 0}, ["--choice_column_names", "options"], "multiple_choice"),
        (TOKENS, ["--task", "sequence_classification"], "sequence_classification"),
    ],
)
def test_the_task_is_told_from_the_data(
    kit: Any, tmp_path: Path, row: dict[str, Any], flags: list[str], task: str
) -> None:
    train = kit.write_rows(tmp_path / "train.jsonl", [row])
    argv = ["--model_name_or_path", "x", "--train_file", str(train), "--output_dir", str(tmp_path), "--use_cpu"]
    _, data_args, _ = parse([*argv, *flags])
    assert choose_task(data_args, open_rows(train, "--train_file")).name == task


def test_every_task_can_be_named() -> None:
    assert tuple(TASKS) == TASK_NAMES


def opens_in_stock(folder: Path) -> None:
    """Plain transformers finds every weight in its place, and computes what fastbert does."""
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    stock, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.randint(5, 60, (2, 3, 12) if "Choice" in name else (6, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, ..., 7:] = 0
    with torch.no_grad():
        found, wanted = (
            model.eval()(ids, attention_mask=mask).to_tuple()
            for model in (getattr(fastbert, name).from_pretrained(folder), stock)
        )
    for one, two in zip(found, wanted, strict=True):
        keep = mask.bool() if one.shape[:2] == mask.shape else slice(None)
        torch.testing.assert_close(one[keep], two[keep])


@pytest.mark.parametrize("row", [TOKENS, QUESTION, CHOICE], ids=["tokens", "questions", "choices"])
def test_a_resumed_run_ends_with_the_same_weights(
    kit: Any, base_model: Path, tmp_path: Path, row: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Taken up in the middle of an epoch, with dropout; with other data, or as another task, it is refused."""
    rows = [row for _ in range(20)]
    train = kit.write_rows(tmp_path / "train.jsonl", rows)
    out = tmp_path / "out"
    steps = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 3}
    flags = kit.finetune_flags(base_model, train, out, **steps, save_total_limit=9, learning_rate=1e-3)
    assert main(flags) == 0
    last = checkpoints(out)[-1] / "model.safetensors"
    whole = last.read_bytes()
    for path in checkpoints(out)[1:]:
        shutil.rmtree(path)
    assert main([*flags, "--resume_from_checkpoint", "true"]) == 0
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["resumed_from"] == "checkpoint-3"
    assert last.read_bytes() == whole
    opens_in_stock(out)
    kit.write_rows(train, [*rows, row])
    assert main([*flags, "--resume_from_checkpoint", "true"]) == 1
    assert "that run had other" in capsys.readouterr().err


def random_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Questions with something to learn."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        words = [rng.choice(["dog", "cat", "soup", "the", "a", "very"]) for _ in range(rng.randint(4, 10))]
        animal = rng.randrange(len(words))
        words[animal] = rng.choice(["horse", "whale"])
        text = " ".join(words)
        answer = {"text": [words[animal]], "answer_start": [text.index(words[animal])]}
        found.append({"context": text, "question": "the animal", "answers": answer})
    return found


def test_killed_and_resumed_to_the_bit(kit: Any, base_model: Path, tmp_path: Path) -> None:
    """kill -9 while a checkpoint is being written. The best one, by the highest loss, is from before."""
    train = kit.write_rows(tmp_path / "train.jsonl", random_rows(24, seed=0))
    test = kit.write_rows(tmp_path / "test.jsonl", random_rows(8, seed=1))
    steps = {"num_train_epochs": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    steps |= {"eval_strategy": "steps", "eval_steps": 3, "save_total_limit": 2, "learning_rate": 1e-3}
    steps |= {
        "metric_for_best_model": "loss",
        "greater_is_better": True,
        "test_file": test,
    }
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(kit.finetune_flags(base_model, train, whole, **steps)) == 0
    flags = kit.finetune_flags(base_model, train, out, **steps)
    kit.signal_when(kit.start(flags), lambda: (out / "checkpoint-9").exists(), signal.SIGKILL)
    assert not (out / "report.json").exists()
    assert main([*flags, "--resume_from_checkpoint", "true"]) == 0
    found, wanted = (json.loads((f / "report.json").read_text(encoding="utf-8")) for f in (out, whole))
    assert found["resumed_from"] in ("checkpoint-6", "checkpoint-9")
    assert found["best"] == wanted["best"]
    assert found["best"]["step"] <= 6
    assert {n: found["test"][n] for n in ("loss", "f1")} == {n: wanted["test"][n] for n in ("loss", "f1")}
    for name in ("train", "eval"):
        assert [e["loss"] for e in found["history"][name]] == [e["loss"] for e in wanted["history"][name]]
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
