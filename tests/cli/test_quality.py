"""Fine-tuning on real data ends where stock Hugging Face code ends."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastbert.cli import main

SEEDS = (1, 2, 3)


@pytest.fixture(scope="session")
def trec(fetch: ModuleType) -> Path:
    """Folder of the TREC questions: $FASTBERT_TEST_DATA has it, or they are fetched once."""
    given = os.environ.get("FASTBERT_TEST_DATA")
    if given and Path(given, "trec").is_dir():
        return Path(given, "trec")
    train_file, _ = fetch.trec(fetch.default_cache())
    return train_file.parent


@pytest.mark.slow
def test_trec_is_no_worse_than_stock(kit: Any, minilm: Path, trec: Path, tmp_path: Path) -> None:
    """Three epochs on TREC with real weights: the mean of three fast runs is not below the worst stock one."""
    accuracy: dict[bool, list[float]] = {True: [], False: []}
    for seed in SEEDS:
        for optimize in (True, False):
            out = tmp_path / f"{optimize}-{seed}"
            flags = kit.finetune_flags(
                minilm,
                trec / "train.tsv",
                out,
                test_file=trec / "test.tsv",
                optimize=optimize,
                seed=seed,
                num_train_epochs=3,
                learning_rate=1e-4,
                warmup_steps=0.1,
                per_device_train_batch_size=16,
                save_total_limit=1,
            )
            assert main(flags) == 0
            accuracy[optimize].append(json.loads((out / "report.json").read_text(encoding="utf-8"))["test"]["accuracy"])
    mean = sum(accuracy[True]) / len(SEEDS)
    assert mean >= min(accuracy[False]), accuracy
    assert mean > 0.94


@pytest.mark.slow
def test_without_dropout_every_step_is_the_same(kit: Any, minilm: Path, trec: Path, tmp_path: Path) -> None:
    """With dropout the two draw different masks; without it nothing but rounding may differ, step after step."""
    model = tmp_path / "model"
    shutil.copytree(minilm, model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    losses = {}
    for optimize in (True, False):
        out = tmp_path / str(optimize)
        more = {"max_train_samples": 300, "logging_steps": 1, "learning_rate": 1e-4, "eval_strategy": "no"}
        flags = kit.finetune_flags(model, trec / "train.tsv", out, optimize=optimize, num_train_epochs=1, **more)
        assert main(flags) == 0
        history = json.loads((out / "report.json").read_text(encoding="utf-8"))["history"]
        losses[optimize] = [entry["loss"] for entry in history["train"]]
    assert len(losses[True]) == 38
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
