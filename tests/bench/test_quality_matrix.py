"""``fastbert bench quality``: a tiny matrix, run once, taken up, and put into a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fastbert.bench import quality

from fastbert.cli import main


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A model without training, and a data set of two kinds of sentences."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    words = ["dog", "cat", "bread", "soup", "the", "old"]
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    model = tmp_path / "all-MiniLM-L6-v2"
    BertTokenizer(vocab=vocabulary).save_pretrained(model)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(model)
    (tmp_path / "trec").mkdir()
    rows = [f"{'animal' if i % 2 else 'food'}\tthe {words[i % 2 * -2 + 2]}\n" for i in range(30)]
    for part in ("train", "test"):
        (tmp_path / "trec" / f"{part}.tsv").write_text("label\ttext\n" + "".join(rows), encoding="utf-8")
    return tmp_path


def test_a_matrix_is_run_once(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    where = ["--data", str(data), "--cells", str(tmp_path / "cells"), "--output", str(tmp_path / "results")]
    flags = ["bench", "quality", *where, "--sets", "trec", "--seeds", "1", "--epochs", "1", "--threads", "1"]
    assert main([*flags, "--contestants", "fastbert"]) == 0
    assert "trec, fastbert, seed 1" in capfd.readouterr().err
    assert main(flags) == 0
    again = capfd.readouterr().err
    assert "trec, hf, seed 1" in again
    assert "fastbert, seed 1" not in again
    path = max((tmp_path / "results").glob("quality-*.json"))
    found = json.loads(path.read_text(encoding="utf-8"))
    (row,) = found["rows"]
    assert row["contestants"].keys() == {"hf", "fastbert"}
    assert row["rows"]["test"] == 30
    assert row["times_faster"] > 0
    assert [cell["contestant"] for cell in found["cells"]] == ["hf", "fastbert"]
    assert main([*flags, "--sets", "trec,none"]) == 2
    assert "'none' is not known; allowed are --sets trec,r52,mr,wnut16" in capfd.readouterr().err
    assert main([*flags, "--sets", "mr"]) == 2
    assert "not there: " in capfd.readouterr().err


def test_table() -> None:
    def cell(contestant: str, seed: int, value: float, seconds: float) -> dict[str, object]:
        base = {"set": "mr", "metric": "accuracy", "rows": {"train": 9}, "seconds": {"train": seconds}}
        return base | {"contestant": contestant, "seed": seed, "value": value}

    cells = [cell("hf", 1, 0.8, 30), cell("fastbert", 1, 0.9, 10), cell("hf", 2, 0.9, 50), cell("fastbert", 2, 0.9, 20)]
    (row,) = quality.rows(cells)
    assert row["contestants"]["hf"]["mean"] == pytest.approx(0.85)
    assert row["contestants"]["hf"]["deviation"] == pytest.approx(0.0707, abs=1e-4)
    assert row["times_faster"] == pytest.approx(40 / 15)
    text = quality.table([row])
    assert "0.8500 ± 0.0707 (0.8000 to 0.9000)" in text
    assert "2.67x" in text
