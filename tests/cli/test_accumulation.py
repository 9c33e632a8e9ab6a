"""Micro-batches that are accumulated give the loss and the gradient of the whole batch, in every task."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastbert.cli import main

WORDS = ["dog", "cat", "soup", "salt", "moon", "the", "very"]


def rows_of(task: str) -> list[dict[str, Any]]:
    """Seven rows, so that the last micro-batch has fewer.

    Each of both has a longest one: the softmax of question answering runs over the padding, too.
    """
    texts = [" ".join(WORDS[: 1 + 3 * (i % 3)]) for i in range(7)]
    if task == "tokens":
        return [{"tokens": t.split(), "tags": ["B-ANI" if w == "dog" else "O" for w in t.split()]} for t in texts]
    if task == "questions":
        answer = {"text": ["dog"], "answer_start": [0]}
        return [{"context": t, "question": "the cat", "answers": answer} for t in texts]
    if task == "choices":
        return [
            {"sent1": t, "sent2": "the", "ending0": "dog", "ending1": "moon", "label": i % 2}
            for i, t in enumerate(texts)
        ]
    if task == "pairs":
        return [{"anchor": t, "positive": "the moon", "score": i / 7} for i, t in enumerate(texts)]
    labels: dict[str, Any] = {"classes": ["b", "a"], "several": [["a", "b"], ["b"]], "numbers": [0.5, -100.0]}
    return [{"text": t, "label": labels[task][i % 2]} for i, t in enumerate(texts)]


@pytest.fixture(scope="module")
def without_dropout(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("without") / "dropout"
    shutil.copytree(base_model, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("task", "more"),
    [
        ("classes", {}),
        ("several", {}),
        ("numbers", {"problem_type": "regression"}),
        ("tokens", {}),
        ("tokens", {"label_smoothing_factor": 0.1}),
        ("tokens", {"optimize": "false"}),
        ("questions", {}),
        ("choices", {}),
        (
            "pairs",
            {"task": "sentence_embeddings", "label_column_name": "score", "train_sampling_strategy": "random"},
        ),
    ],
)
def test_the_gradient_of_the_whole_batch(
    kit: Any, without_dropout: Path, tmp_path: Path, task: str, more: dict[str, Any]
) -> None:
    """One step of plain gradient descent: 4 + 3 rows, against 7 at once."""
    train = kit.write_rows(tmp_path / "train.jsonl", rows_of(task))
    flags = {"max_steps": 1, "eval_strategy": "no", "train_sampling_strategy": "sequential", "logging_steps": 1} | more
    flags |= {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0, "lr_scheduler_type": "constant"}
    results = []
    for size, steps in ((7, 1), (4, 2)):
        out = tmp_path / f"by-{size}"
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        assert main(kit.finetune_flags(without_dropout, train, out, **flags, **sizes)) == 0
        loss = json.loads((out / "report.json").read_text(encoding="utf-8"))["history"]["train"][0]["loss"]
        results.append((loss, load_file(out / "model.safetensors")))
    (loss, whole), (loss_in_parts, in_parts) = results
    assert abs(loss - loss_in_parts) < 1e-5 * abs(loss)
    for name, weight in whole.items():
        torch.testing.assert_close(in_parts[name], weight, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["tokens", "choices"])
def test_two_processes_have_one_loss(
    kit: Any, run_commands: Any, without_dropout: Path, tmp_path: Path, task: str
) -> None:
    """Over gloo, 4 + 4 rows, against 8 at once: the processes have other numbers of labels."""
    rows = rows_of(task)
    train = kit.write_rows(tmp_path / "train.jsonl", [*rows, rows[2]])
    flags = {"max_steps": 1, "eval_strategy": "no", "train_sampling_strategy": "sequential", "logging_steps": 1}
    flags |= {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0, "lr_scheduler_type": "constant"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), "-m"]
    results = []
    for size in (8, 4):
        out = tmp_path / f"by-{size}"
        command = kit.finetune_flags(without_dropout, train, out, **flags, per_device_train_batch_size=size)
        if size == 4:
            run_commands([[*launch, "fastbert.cli", *command]], seconds=400)
        else:
            assert main(command) == 0
        loss = json.loads((out / "report.json").read_text(encoding="utf-8"))["history"]["train"][0]["loss"]
        results.append((loss, load_file(out / "model.safetensors")))
    (loss, whole), (loss_in_parts, in_parts) = results
    assert abs(loss - loss_in_parts) < 1e-5 * abs(loss)
    for name, weight in whole.items():
        torch.testing.assert_close(in_parts[name], weight, rtol=1e-4, atol=1e-6, msg=name)
