"""Multiple choice: SWAG's columns, lists of choices, labels, predictions."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from fastbert.cli import main
from fastbert.training.output import Output

TOPICS = ["animal", "food", "space"]


def choices(kit: Any, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Beginnings with four endings, one of which is of the same topic (and two are of the same other one)."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        topic, *others = rng.sample(TOPICS, 3)
        label = rng.randrange(4)
        endings = [kit.sentence(rng, rng.choice(others), 4) for _ in range(4)]
        endings[label] = kit.sentence(rng, topic, 4)
        row = {"sent1": kit.sentence(rng, topic, 6), "sent2": "the old", "label": label}
        rows.append(row | {f"ending{i}": ending for i, ending in enumerate(endings)})
    return rows


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def flags_for(flags: list[str]) -> list[str]:
    """Without the text column that the other tests' models need."""
    position = flags.index("--text_column_name")
    return [*flags[:position], *flags[position + 2 :]]


@pytest.fixture(scope="module")
def chooser(kit: Any, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chooser")
    train = kit.write_rows(folder / "train.csv", choices(kit, 40))
    flags = kit.finetune_flags(base_model, train, folder / "out", num_train_epochs=2)
    assert main(flags) == 0
    return folder / "out"


def test_swag_columns(chooser: Path) -> None:
    found = report(chooser)
    assert found["task"] == {"name": "multiple_choice", "choices": 4}
    assert found["best"]["metric"] == "accuracy"
    assert found["best"]["value"] == max(e["accuracy"] for e in found["history"]["eval"])
    assert [layer["path"] for layer in found["fastbert"]["layers"]] == ["fast", "fast"]
    config = json.loads((chooser / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["BertForMultipleChoice"]


def test_fast_and_stock_train_alike_from_other_columns(kit: Any, base_model: Path, tmp_path: Path) -> None:
    """Without dropout; a list of choices and named columns are the same data."""
    model = tmp_path / "model"
    import transformers

    encoder = transformers.AutoModel.from_pretrained(base_model)
    encoder.config.hidden_dropout_prob = encoder.config.attention_probs_dropout_prob = 0.0
    encoder.save_pretrained(model)
    transformers.AutoTokenizer.from_pretrained(base_model).save_pretrained(model)
    rows = choices(kit, 24)
    lists = [
        {"start": r["sent1"], "options": [f"the old {r[f'ending{i}']}" for i in range(4)], "label": r["label"]}
        for r in rows
    ]
    named = [
        {"start": r["sent1"], "b": "the old", "right": f"e{r['label']}"} | {f"e{i}": r[f"ending{i}"] for i in range(4)}
        for r in rows
    ]
    losses = []
    common = {"num_train_epochs": 1, "logging_steps": 1, "learning_rate": 1e-3, "text_column_name": "start"}
    train = kit.write_rows(tmp_path / "lists.jsonl", lists)
    flags = kit.finetune_flags(model, train, tmp_path / "a", choice_column_names="options", **common)
    assert main(flags) == 0
    train = kit.write_rows(tmp_path / "named.parquet", named)
    more = {"text_pair_column_name": "b", "label_column_name": "right", "optimize": False}
    flags = kit.finetune_flags(model, train, tmp_path / "b", **common, **more)
    assert main([*flags, "--choice_column_names", "e0", "e1", "e2", "e3"]) == 0
    losses = [[e["loss"] for e in report(tmp_path / name)["history"]["train"]] for name in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_bad_choices(kit: Any, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = choices(kit, 12)
    rows[1]["label"] = 4
    rows[3]["ending2"] = " "
    rows[5]["label"] = None
    train = kit.write_rows(tmp_path / "train.csv", rows)
    assert main(kit.finetune_flags(base_model, train, tmp_path / "out")) == 1
    errors = capsys.readouterr().err
    assert "train.csv:3: 'label' is '4'; allowed are 0 to 3 or ending0, ending1, ending2, ending3" in errors
    assert "train.csv:5: no text in 'ending2'" in errors
    assert "train.csv:7: no label in 'label'" in errors
    lists = [{"text": "a", "options": ["b", "c"], "label": 0}, {"text": "a", "options": ["b"], "label": 0}]
    train = kit.write_rows(tmp_path / "train.jsonl", lists)
    flags = kit.finetune_flags(base_model, train, tmp_path / "out", choice_column_names="options")
    assert main([*flags, "--text_column_name", "text"]) == 1
    assert "train.jsonl:2: 1 choices in 'options' where 2 are wanted" in capsys.readouterr().err
    assert main(flags) == 1
    assert "--text_column_name is needed" in capsys.readouterr().err
    assert main([*flags, "--text_column_name", "text", "--doc_stride", "3"]) == 1
    assert "--doc_stride: not a flag of --task multiple_choice" in capsys.readouterr().err


def listed(kit: Any, count: int) -> list[dict[str, Any]]:
    """Rows with two choices in a list."""
    found = [{"sent1": row["sent1"], "options": [row["ending0"], row["ending1"]]} for row in choices(kit, count)]
    return [row | {"label": i % 2} for i, row in enumerate(found)]


def test_a_bad_row_does_not_tell_how_many_choices_there_are(kit: Any, base_model: Path, tmp_path: Path) -> None:
    rows = listed(kit, 10)
    rows[0] |= {"options": ["a", "b", "c"], "label": 3}
    train = kit.write_rows(tmp_path / "train.jsonl", rows)
    flags = kit.finetune_flags(base_model, train, tmp_path / "out", choice_column_names="options", max_steps=1)
    assert main([*flags, "--on_bad_row", "skip", "--eval_strategy", "no"]) == 0
    found = report(tmp_path / "out")
    assert found["task"]["choices"] == 2
    assert found["data"]["train"]["bad_row_lines"] == [1]


def test_lists_of_different_lengths_are_predicted_and_resumed(
    kit: Any, chooser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = listed(kit, 9)
    rows[4]["options"] += ["the moon"]
    rows[6]["options"] = ["the moon"]
    given = kit.write_rows(tmp_path / "in.jsonl", rows)
    settings = {"choice_column_names": "options", "window_rows": 2}
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert main(flags_for(kit.predict_flags(chooser, given, whole, **settings))) == 3
    found = [json.loads(line) for line in whole.read_text(encoding="utf-8").splitlines()]
    assert [line.get("error") for line in found if "error" in line] == [
        "line 7: 1 choices in 'options' where at least 2 are wanted"
    ]
    assert found[4]["predicted_choice"] in (0, 1, 2)
    flags = flags_for(kit.predict_flags(chooser, given, output, **settings))
    write = Output.write

    def stopped(self: Output, *arguments: Any) -> None:
        write(self, *arguments)
        if self.rows == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Output, "write", stopped)
        assert main(flags) == 130
    assert main([*flags, "--resume"]) == 3
    assert output.read_bytes() == whole.read_bytes()


def test_predicted_choices(kit: Any, chooser: Path, tmp_path: Path) -> None:
    """As stock code predicts row by row; a bad row keeps its place."""
    import torch
    from transformers import AutoModelForMultipleChoice, AutoTokenizer

    rows = choices(kit, 20, seed=1)
    rows[7]["ending3"] = ""
    given = kit.write_rows(tmp_path / "in.csv", rows)
    assert main(flags_for(kit.predict_flags(chooser, given, tmp_path / "out.jsonl", window_rows=6))) == 3
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    tokenizer, model = (
        AutoTokenizer.from_pretrained(chooser),
        AutoModelForMultipleChoice.from_pretrained(chooser).eval(),
    )
    for index, (row, line) in enumerate(zip(rows, found, strict=True)):
        if index == 7:
            assert line["error"] == "line 9: no text in 'ending3'"
            continue
        pairs = [f"{row['sent2']} {row[f'ending{i}']}" for i in range(4)]
        inputs = tokenizer([row["sent1"]] * 4, pairs, return_tensors="pt", padding=True)
        with torch.inference_mode():
            chances = model(**{name: value[None] for name, value in inputs.items()}).logits.softmax(-1)[0]
        assert line["predicted_choice"] == int(chances.argmax())
        assert line["score"] == pytest.approx(float(chances.max()), abs=2e-5)
