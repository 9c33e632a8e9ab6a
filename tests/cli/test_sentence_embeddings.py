"""Sentence embeddings: pairs, triplets and scores through sentence-transformers' trainer."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastbert.cli import main
from fastbert.training.checkpoints import checkpoints
from fastbert.training.sentence_embeddings import retrieval_scores

TOPICS = ["animal", "food", "space"]


def pairs(kit: Any, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs of sentences of one topic, with a third of another."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        topic, other = rng.sample(TOPICS, 2)
        texts = [kit.sentence(rng, kind, 8) for kind in (topic, topic, other)]
        rows.append(dict(zip(("anchor", "positive", "negative"), texts, strict=True)))
    return rows


def scored(kit: Any, count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        one, other = rng.choice(TOPICS), rng.choice(TOPICS)
        rows.append({"sentence1": kit.sentence(rng, one, 8), "sentence2": kit.sentence(rng, other, 8)})
        rows[-1]["score"] = float(one == other)
    return rows


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_scores_train_a_sentence_transformer(kit: Any, base_model: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    train = kit.write_rows(tmp_path / "train.csv", scored(kit, 90))
    test = kit.write_rows(tmp_path / "test.csv", scored(kit, 30, seed=1))
    flags = kit.finetune_flags(
        base_model, train, tmp_path / "out", task="sentence_embeddings", test_file=test, learning_rate=3e-3
    )
    assert main([*flags, "--num_train_epochs", "4", "--per_device_train_batch_size", "16"]) == 0
    found = report(tmp_path / "out")
    assert found["task"]["loss"] == "CosineSimilarityLoss"
    assert found["best"]["metric"] == "spearman"
    assert found["test"]["spearman"] > 0.3
    assert found["model"]["class"] == "SentenceTransformer"
    assert [layer["path"] for layer in found["fastbert"]["layers"]] == ["fast", "fast"]
    assert (tmp_path / "out" / "curves.png").is_file()
    model = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    rows = scored(kit, 40, seed=2)
    one, other = (model.encode([row[f"sentence{i}"] for row in rows], normalize_embeddings=True) for i in (1, 2))
    same = np.array([row["score"] for row in rows]) == 1
    cosine = (one * other).sum(-1)
    assert cosine[same].mean() > cosine[~same].mean()


def test_a_resumed_run_ends_with_the_same_weights(kit: Any, base_model: Path, tmp_path: Path) -> None:
    """Triplets, with in-batch negatives; the order of the batches is repeated in the middle of an epoch."""
    train = kit.write_rows(tmp_path / "train.jsonl", pairs(kit, 40))
    out = tmp_path / "out"
    steps = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 4}
    flags = kit.finetune_flags(base_model, train, out, **steps, save_total_limit=9)
    assert main(flags) == 0
    found = report(out)
    assert found["task"] == {
        "name": "sentence_embeddings",
        "texts": ["anchor", "positive", "negative"],
        "score": None,
        "loss": "MultipleNegativesRankingLoss",
    }
    assert found["best"]["metric"] == "accuracy"
    assert {"accuracy", "mrr", "loss"} <= found["history"]["eval"][0].keys()
    whole = (out / "checkpoint-18" / "model.safetensors").read_bytes()
    (out / "model.safetensors").unlink()
    for path in checkpoints(out)[-2:]:
        shutil.rmtree(path)
    assert main([*flags, "--resume_from_checkpoint", "true"]) == 0
    assert report(out)["resumed_from"] == "checkpoint-12"  # of 18
    assert (out / "checkpoint-18" / "model.safetensors").read_bytes() == whole
    assert (out / "model.safetensors").is_file()


def test_a_checkpoint_without_a_pooler(
    kit: Any, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a masked language model leaves it; then with a module behind the encoder whose weights are pickled."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(base_model, folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    train = kit.write_rows(tmp_path / "train.csv", scored(kit, 20))
    flags = kit.finetune_flags(folder, train, tmp_path / "out", task="sentence_embeddings", max_steps=1)
    assert main(flags) == 0
    assert report(tmp_path / "out")["steps"] == 1
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "pytorch_model.bin").write_bytes(b"")
    assert main([*flags, "--overwrite_output_dir"]) == 1
    assert "pickled weights (2_Dense/pytorch_model.bin) are not loaded" in capsys.readouterr().err


def test_retrieval_scores() -> None:
    anchors = np.eye(3)
    assert retrieval_scores(anchors, anchors, None) == {"accuracy": 1.0, "mrr": 1.0}
    positives = np.eye(3)[[1, 0, 2]]
    assert retrieval_scores(anchors, positives, None)["accuracy"] == pytest.approx(1 / 3)
    far = anchors * 0.5
    assert retrieval_scores(anchors, far, anchors) == {"accuracy": 0.0, "mrr": 0.5}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"text_column_name": "anchor"}, "--text_column_name anchor: 2 or 3 columns are wanted"),
        ({"text_column_name": "anchor,none"}, "has no column 'none'"),
        ({"text_column_name": "anchor,positive", "label_column_name": "number"}, "'number' is 5; a cosine is wanted"),
        ({"train_sampling_strategy": "sequential"}, "--train_sampling_strategy sequential"),
        ({"label_delimiter": "|"}, "--label_delimiter: not a flag of --task sentence_embeddings"),
        ({"metric_for_best_model": "spearman"}, "sentence_embeddings has accuracy, mrr, loss"),
    ],
)
def test_wrong_flags(
    kit: Any, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: dict[str, Any], words: str
) -> None:
    train = kit.write_rows(tmp_path / "train.csv", [row | {"number": 5} for row in pairs(kit, 8)])
    flags = kit.finetune_flags(base_model, train, tmp_path / "out", task="sentence_embeddings", **more)
    assert main(flags) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
