"""What all tasks of ``fastbert finetune`` have in common: how they are told apart, and that they resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

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
    kit.write_rows(train, [*rows, row])
    assert main([*flags, "--resume_from_checkpoint", "true"]) == 1
    assert "that run had other" in capsys.readouterr().err
