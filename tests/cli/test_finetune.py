"""``fastbert finetune``: formats, kinds of task, what it writes, and what it refuses."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastbert.cli import main
from fastbert.training.labels import sorted_names

FAST = ["--num_train_epochs", "6", "--learning_rate", "5e-3", "--per_device_train_batch_size", "16"]
SHORT = ["--num_train_epochs", "1", "--per_device_train_batch_size", "16"]


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet", ""])
def test_formats(kit: Any, base_model: Path, tmp_path: Path, ending: str) -> None:
    train = kit.write_rows(tmp_path / f"train{ending}", kit.examples(60))
    test = kit.write_rows(tmp_path / f"test{ending}", kit.examples(30, seed=1))
    assert main(kit.finetune_flags(base_model, train, tmp_path / "out", test_file=test) + SHORT) == 0
    found = report(tmp_path / "out")
    assert found["task"] == {
        "name": "sequence_classification",
        "problem_type": "single_label_classification",
        "labels": ["animal", "food", "space"],
    }
    assert {name: split["rows"] for name, split in found["data"].items()} == {"train": 54, "validation": 6, "test": 30}


def test_it_learns_and_leaves_an_ordinary_folder(classifier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import pipeline

    found = report(classifier)
    assert found["best"]["metric"] == "accuracy"
    assert found["best"]["value"] > 0.9
    assert len(found["history"]["eval"]) == 6
    assert [e["epoch"] for e in found["history"]["eval"]] == [1, 2, 3, 4, 5, 6]
    assert all("loss" in e and "accuracy" in e and "f1_macro" in e for e in found["history"]["eval"])
    assert len(found["history"]["train"]) > 10
    assert [layer["path"] for layer in found["fastbert"]["layers"]] == ["fast", "fast"]
    assert found["versions"]["transformers"]
    assert (classifier / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in classifier.iterdir()}
    assert not list(classifier.glob("*.part"))
    config = json.loads((classifier / "config.json").read_text(encoding="utf-8"))
    assert config["id2label"] == {"0": "animal", "1": "food", "2": "space"}
    assert config["architectures"] == ["BertForSequenceClassification"]
    found = pipeline("text-classification", model=str(classifier))("the old cat often hunts a sparrow")
    assert found[0]["label"] == "animal"


def test_stock_and_fast_give_the_same_curve(kit: Any, base_model: Path, tmp_path: Path) -> None:
    """Without dropout the two must agree step by step; with it they draw different masks."""
    import transformers

    still = tmp_path / "model"
    model = transformers.AutoModel.from_pretrained(base_model)
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    model.save_pretrained(still)
    transformers.AutoTokenizer.from_pretrained(base_model).save_pretrained(still)
    train = kit.write_rows(tmp_path / "train.csv", kit.examples(64))
    losses = {}
    for optimize in (True, False):
        out = tmp_path / f"out-{optimize}"
        flags = kit.finetune_flags(still, train, out, optimize=optimize, learning_rate=1e-3, logging_steps=1)
        assert main(flags + SHORT) == 0
        losses[optimize] = [e["loss"] for e in report(out)["history"]["train"]]
        assert (report(out)["fastbert"] is not None) == optimize
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)


def test_multi_label_in_a_list_and_in_a_cell(kit: Any, base_model: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = []
    for _ in range(60):
        topics = rng.sample(["animal", "food", "space"], rng.randint(0, 3))
        text = " ".join(kit.sentence(rng, topic, 4) for topic in topics) or "the very old"
        rows.append({"text": text, "label": topics})
    lists = kit.write_rows(tmp_path / "train.jsonl", rows)
    cells = kit.write_rows(tmp_path / "train.csv", [row | {"label": "|".join(row["label"])} for row in rows])
    assert main(kit.finetune_flags(base_model, lists, tmp_path / "a") + FAST) == 0
    more = ["--problem_type", "multi_label_classification", "--label_delimiter", "|"]
    assert main(kit.finetune_flags(base_model, cells, tmp_path / "b") + FAST + more) == 0
    first, second = report(tmp_path / "a"), report(tmp_path / "b")
    assert first["task"] == second["task"]
    assert first["task"]["problem_type"] == "multi_label_classification"
    assert first["history"]["eval"][-1]["f1_micro"] == second["history"]["eval"][-1]["f1_micro"]
    assert first["best"]["metric"] == "f1_micro"
    assert first["best"]["value"] > 0.7


def test_multi_label_in_columns(kit: Any, base_model: Path, tmp_path: Path) -> None:
    rows = [row | {name: int(row["label"] == name) for name in ("animal", "food")} for row in kit.examples(40)]
    train = kit.write_rows(tmp_path / "train.csv", rows)
    flags = kit.finetune_flags(base_model, train, tmp_path / "out", label_column_name="animal,food")
    assert main(flags + SHORT) == 0
    assert report(tmp_path / "out")["task"] == {
        "name": "sequence_classification",
        "problem_type": "multi_label_classification",
        "labels": ["animal", "food"],
    }


def test_regression_and_pairs(kit: Any, base_model: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = []
    for i in range(80):
        one, other = rng.choices(["animal", "food", "space"], k=2)
        rows.append({"a": kit.sentence(rng, one), "b": kit.sentence(rng, other), "label": 0.25 + 0.5 * (one == other)})
        assert i < 80
    train = kit.write_rows(tmp_path / "train.parquet", rows)
    flags = kit.finetune_flags(base_model, train, tmp_path / "out", text_column_name="a", text_pair_column_name="b")
    assert main(flags + SHORT) == 0
    found = report(tmp_path / "out")
    assert found["task"]["problem_type"] == "regression"
    assert found["best"]["metric"] == "rmse"
    assert found["best"]["value"] == min(e["rmse"] for e in found["history"]["eval"])
    assert {"mae", "r2", "pearson", "spearman"} <= found["history"]["eval"][0].keys()


def test_whole_numbers_are_classes_unless_told_otherwise(kit: Any, base_model: Path, tmp_path: Path) -> None:
    rows = [row | {"label": {"animal": 2, "food": 10, "space": 1}[row["label"]]} for row in kit.examples(40)]
    train = kit.write_rows(tmp_path / "train.csv", rows)
    assert main(kit.finetune_flags(base_model, train, tmp_path / "a") + SHORT) == 0
    assert report(tmp_path / "a")["task"]["labels"] == ["1", "2", "10"]
    assert main([*kit.finetune_flags(base_model, train, tmp_path / "b"), *SHORT, "--do_regression"]) == 0
    assert report(tmp_path / "b")["task"]["problem_type"] == "regression"


def test_order_of_names() -> None:
    assert sorted_names({"10", "9", "-1"}) == ["-1", "9", "10"]
    assert sorted_names({"1", "01", "0"}) == ["0", "01", "1"]
    assert sorted_names({"10", "9", "²"}) == ["10", "9", "²"]
    assert sorted_names({"10", "9", "--1"}) == ["--1", "10", "9"]
    assert sorted_names({"1", "1" * 5000}) == ["1", "1" * 5000]


@pytest.mark.parametrize(
    ("metric", "save_strategy", "words"),
    [
        ("pearson", "epoch", "validation pearson undefined (NaN) in every evaluation"),
        ("rmse", "no", "(epoch 1)"),
    ],
)
def test_no_best_checkpoint(
    kit: Any,
    base_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    metric: str,
    save_strategy: str,
    words: str,
) -> None:
    train = kit.write_rows(tmp_path / "train.csv", [{"text": "dog", "label": i + 0.5} for i in range(8)])
    constant = kit.write_rows(tmp_path / "validation.csv", [{"text": "dog", "label": 0.5}] * 4)
    more = {"validation_file": constant, "metric_for_best_model": metric, "save_strategy": save_strategy}
    assert main(kit.finetune_flags(base_model, train, tmp_path / "out", **more) + SHORT) == 0
    assert words in capsys.readouterr().out
    found = report(tmp_path / "out")
    assert found["best"]["metric"] == metric
    assert found["best"]["value"] == found["history"]["eval"][0][metric]
    assert found["best"]["checkpoint"] is None


def test_several_text_columns_and_a_saved_dataset_dict(kit: Any, base_model: Path, tmp_path: Path) -> None:
    import datasets

    rows = [{"title": "the old", "body": row["text"], "label": row["label"]} for row in kit.examples(30)]
    whole = datasets.Dataset.from_list(rows).class_encode_column("label")
    data = datasets.DatasetDict({"train": whole, "validation": whole.select(range(9)), "test": whole.select(range(6))})
    data.save_to_disk(str(tmp_path / "data"))
    flags = kit.finetune_flags(base_model, tmp_path / "data", tmp_path / "out", text_column_name="title,body")
    assert main(flags + SHORT) == 0
    found = report(tmp_path / "out")
    assert {name: split["rows"] for name, split in found["data"].items()} == {"train": 30, "validation": 9, "test": 6}
    assert found["task"]["labels"] == ["animal", "food", "space"]


def test_early_stopping_ends_with_the_best(kit: Any, base_model: Path, tmp_path: Path) -> None:
    train = kit.write_rows(tmp_path / "train.csv", kit.examples(90))
    flags = kit.finetune_flags(base_model, train, tmp_path / "out", early_stopping_patience=2)
    assert main(flags + FAST[2:] + ["--num_train_epochs", "60"]) == 0
    found = report(tmp_path / "out")
    evaluations = found["history"]["eval"]
    assert len(evaluations) < 60
    best = max(range(len(evaluations)), key=lambda i: evaluations[i]["accuracy"])
    assert found["best"]["epoch"] == evaluations[best]["epoch"]
    assert len(evaluations) == best + 3


def test_a_seed_repeats_a_run(kit: Any, base_model: Path, tmp_path: Path) -> None:
    train = kit.write_rows(tmp_path / "train.csv", kit.examples(48))
    weights = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert main(kit.finetune_flags(base_model, train, tmp_path / name, seed=seed) + SHORT) == 0
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert weights["a"] == weights["b"] != weights["c"]


def test_gradient_accumulation_averages(kit: Any, base_model: Path, tmp_path: Path) -> None:
    """Four micro-batches of 4 train as one batch of 16 (without clipping a factor of four would go unnoticed)."""
    train = kit.write_rows(tmp_path / "train.csv", kit.examples(60))
    losses = {}
    for size, steps in ((16, 1), (4, 4)):
        more = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "logging_steps": 1}
        flags = kit.finetune_flags(base_model, train, tmp_path / str(size), max_grad_norm=0, optim="sgd", **more)
        assert main([*flags, "--num_train_epochs", "1", "--learning_rate", "0.2", "--eval_strategy", "no"]) == 0
        losses[size] = report(tmp_path / str(size))["history"]["train"]
    assert losses[4][0]["grad_norm"] == pytest.approx(losses[16][0]["grad_norm"], rel=0.35)


def test_files_that_are_not_read_are_told(
    kit: Any, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = kit.write_rows(tmp_path / "train.csv", kit.examples(20))
    more = {"validation_file": train, "eval_strategy": "no", "test_file": train, "do_predict": False, "max_steps": 1}
    assert main(kit.finetune_flags(base_model, train, tmp_path / "out", **more)) == 0
    said = capsys.readouterr().err
    assert f"--validation_file {train} is not read: nothing is evaluated in training" in said
    assert f"--test_file {train} is not read: --do_predict is false" in said
    assert report(tmp_path / "out")["history"]["eval"] == []


def test_bad_rows(kit: Any, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = kit.examples(30)
    rows[3]["text"] = "  "
    rows[7]["label"] = None
    train = kit.write_rows(tmp_path / "train.jsonl", rows)
    with train.open("a", encoding="utf-8") as file:
        file.write('{"text": broken\n{"label": "food"}\n')
    flags = kit.finetune_flags(base_model, train, tmp_path / "out")
    assert main(flags + SHORT) == 1
    errors = capsys.readouterr().err
    for line in (4, 8, 31, 32):
        assert f"train.jsonl:{line}:" in errors
    assert "4 bad rows (of 32)" in errors
    assert "--on_bad_row skip" in errors
    assert not (tmp_path / "out").exists()
    assert main([*flags, *SHORT, "--on_bad_row", "skip"]) == 0
    found = report(tmp_path / "out")["data"]
    assert found["train"]["bad_row_lines"] == [4, 8, 31, 32]
    assert found["train"]["rows"] + found["validation"]["rows"] == 28


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"label": ["animal", None]}, "a label is missing in the list in 'label'"),
        ({"text": b"dog"}, "'text' is not a text but bytes"),
        ({"label": b"animal"}, "'label' is not a text but bytes"),
    ],
)
def test_bad_cells_of_parquet(
    kit: Any,
    base_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    row: dict[str, Any],
    words: str,
) -> None:
    train = kit.write_rows(tmp_path / "train.parquet", [{"text": "dog", "label": "animal"} | row])
    assert main(kit.finetune_flags(base_model, train, tmp_path / "out")) == 1
    assert f"train.parquet: 1 bad row (of 1), the first at line 1: {words}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unknown_labels(kit: Any, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = kit.write_rows(tmp_path / "train.csv", kit.examples(30))
    strange = [*kit.examples(6), {"text": "a", "label": "music"}, {"text": "b", "label": "music"}]
    for flag in ("validation_file", "test_file"):
        other = kit.write_rows(tmp_path / f"{flag}.csv", strange)
        assert main(kit.finetune_flags(base_model, train, tmp_path / "out", **{flag: other}) + SHORT) == 1
        error = capsys.readouterr().err
        assert f"--{flag}" in error
        assert "'music' (2 rows, first at line 8)" in error
        assert "'animal', 'food', 'space'" in error


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            {"text_column_name": "texts"},
            "--text_column_name: {train} has no column 'texts'; its columns are: 'text', 'la",
        ),
        ({"label_column_name": "class"}, "--label_column_name: {train} has no column 'class'"),
        ({"text_pair_column_name": "other"}, "--text_pair_column_name: {train} has no column 'other'"),
        ({"max_seq_length": 65}, "--max_seq_length 65: the model has 64 positions"),
        ({"metric_for_best_model": "bleu"}, "--metric_for_best_model bleu: single_label_classification has accuracy"),
        ({"problem_type": "regression"}, "'animal' is not a finite number"),
        ({"max_train_samples": 1}, "only one label"),
        ({"resume_from_checkpoint": "nowhere"}, "--resume_from_checkpoint nowhere: not a complete checkpoint: no such"),
        ({"model_name_or_path": "/no/such/folder"}, "--model_name_or_path /no/such/folder: no such folder"),
        ({"validation_file": "none.csv"}, "--validation_file none.csv: no such file"),
    ],
)
def test_wrong_flags(
    kit: Any,
    base_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: dict[str, Any],
    words: str,
) -> None:
    train = kit.write_rows(tmp_path / "train.csv", kit.examples(12))
    flags = kit.finetune_flags(more.pop("model_name_or_path", base_model), train, tmp_path / "out", **more)
    assert main(flags) == 1
    assert words.format(train=train) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--epochs", "3"], "unrecognized arguments: --epochs 3"),
        (["--num_train_epoch", "3"], "unrecognized arguments"),
        (["--seed", "x"], "invalid int value"),
        (["--problem_type", "other"], "invalid choice"),
        (["--eval_strategy", "best"], "--eval_strategy/--eval-strategy: invalid choice: 'best'"),
        (["--save_strategy", "never"], "--save_strategy/--save-strategy: invalid choice: 'never'"),
        (["--early_stopping_patience", "0"], "--early_stopping_patience must be at least 1"),
        (["--max_train_samples", "0"], "--max_train_samples must be at least 1"),
        (["--learning_rate", "nan"], "--learning_rate must be a finite number of at least 0, got nan"),
        (["--weight_decay", "-1"], "--weight_decay must be a finite number of at least 0, got -1"),
        (["--num_train_epochs", "inf"], "--num_train_epochs must be a finite number above 0, got inf"),
        (["--eval_strategy", "steps", "--eval_steps", "-5"], "--eval_steps must be a finite number above 0"),
        (["--per_device_eval_batch_size", "0"], "--per_device_eval_batch_size must be at least 1, got 0"),
        (["--max_steps", "0"], "--max_steps must be at least 1, or -1 for --num_train_epochs, got 0"),
        (["--seed", "-1"], "--seed must be from 0 to 4294967295, got -1"),
        (["--adam_beta1", "1.5"], "--adam_beta1 must be at least 0 and below 1, got 1.5"),
        (["--label_smoothing_factor", "2"], "--label_smoothing_factor must be from 0 to 1, got 2.0"),
        (["--null_score_diff_threshold", "nan"], "--null_score_diff_threshold must be a finite number, got nan"),
        (["--save_strategy", "best", "--eval_strategy", "no"], "--save_strategy best needs --eval_strategy"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "--lr_scheduler_type cosine_with_min_lr with --lr_scheduler_k"),
        (["--lr_scheduler_type", "warmup_stable_decay"], "--lr_scheduler_type warmup_stable_decay with --lr_schedule"),
        (["--use_cpu", "--fp16"], "--fp16: not on a CPU"),
        (["--do_regression", "--problem_type", "single_label_classification"], "--do_regression contradicts"),
    ],
)
def test_usage_errors(capsys: pytest.CaptureFixture[str], flags: list[str], words: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["finetune", "--model_name_or_path", "x", "--train_file", "y", "--output_dir", "z", *flags])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_without_training_the_model_is_evaluated(
    kit: Any, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = kit.write_rows(tmp_path / "train.csv", kit.examples(30))
    more = {"do_train": False, "validation_file": kit.write_rows(tmp_path / "validation.csv", kit.examples(15, seed=1))}
    assert main(kit.finetune_flags(classifier, train, tmp_path / "out", **more)) == 0
    (evaluation,) = report(tmp_path / "out")["history"]["eval"]
    assert evaluation["accuracy"] > 0.9
    assert capsys.readouterr().out == f"validation accuracy {evaluation['accuracy']:.4f}\n"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (classifier / "model.safetensors").read_bytes()
    assert main(kit.finetune_flags(classifier, train, tmp_path / "other", **more, do_eval=False)) == 0
    assert report(tmp_path / "other")["history"]["eval"] == []
    assert capsys.readouterr().out == ""


def test_a_head_that_is_new_must_be_trained(
    kit: Any, base_model: Path, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = kit.write_rows(tmp_path / "train.csv", kit.examples(30))
    two = kit.write_rows(tmp_path / "two.csv", [row for row in kit.examples(30) if row["label"] != "food"])
    for model, rows in ((base_model, train), (classifier, two)):
        more = {"do_train": False, "ignore_mismatched_sizes": True}
        assert main(kit.finetune_flags(model, rows, tmp_path / "out", **more)) == 1
        errors = capsys.readouterr().err
        assert f"--model_name_or_path {model}: not a trained model for sequence_classification" in errors
        assert "lacks classifier.bias, classifier.weight" in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [[], ["--output_dir", ""]])
@pytest.mark.parametrize(
    "command", [["finetune", "--model_name_or_path", "x"], ["pretrain", "--dataset", "x", "--tokenizer_name", "y"]]
)
def test_an_output_folder_is_needed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    given: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main([*command, *given])
    assert caught.value.code == 2
    assert f"fastbert {command[0]}: error: --output_dir is needed\n" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.accelerator.is_available(), reason="bf16 is about the GPU here")
def test_bf16_needs_no_flag_more_without_a_gpu(kit: Any, base_model: Path, tmp_path: Path) -> None:
    train = kit.write_rows(tmp_path / "train.csv", kit.examples(30))
    flags = kit.finetune_flags(base_model, train, tmp_path / "out", bf16=True, max_steps=1, use_cpu=False)
    assert main(flags) == 0
    assert report(tmp_path / "out")["arguments"]["use_cpu"]


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_batches_that_are_all_dropped(
    kit: Any, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    files = {
        f"{part}_file": kit.write_rows(tmp_path / f"{part}.csv", kit.examples(6 if part == name else 9))
        for part in ("train", "validation", "test")
    }
    flags = kit.finetune_flags(base_model, files.pop("train_file"), tmp_path / "out", **files)
    assert main([*flags, *SHORT, "--dataloader_drop_last", "true", "--per_device_train_batch_size", "8"]) == 1
    what = "training" if name == "train" else name
    assert f"--dataloader_drop_last: the {what} data have fewer rows than a batch" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir()), "the mended command is not refused"


def test_an_occupied_folder_is_refused(
    kit: Any, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = kit.write_rows(tmp_path / "train.csv", kit.examples(30))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine", encoding="utf-8")
    flags = kit.finetune_flags(base_model, train, tmp_path / "out")
    assert main(flags + SHORT) == 1
    assert "thesis.txt" in capsys.readouterr().err
    assert main([*flags, *SHORT, "--resume_from_checkpoint", "true"]) == 1
    assert "holds no run to resume" in capsys.readouterr().err
    assert main([*flags, *SHORT, "--overwrite_output_dir"]) == 0
    assert (tmp_path / "out" / "thesis.txt").read_text(encoding="utf-8") == "mine"


def test_flags_from_a_file(kit: Any, base_model: Path, tmp_path: Path) -> None:
    flags = {
        "model_name_or_path": str(base_model),
        "train_file": str(kit.write_rows(tmp_path / "train.csv", kit.examples(30))),
        "output_dir": str(tmp_path / "out"),
        "num_train_epochs": 1,
        "disable_tqdm": True,
    }
    (tmp_path / "flags.json").write_text(json.dumps(flags), encoding="utf-8")
    assert main(["finetune", str(tmp_path / "flags.json")]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("command", ["finetune", "pretrain", "prepare", "tokenizer"])
def test_wrong_flags_in_a_file(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "flags.json"
    file.write_text('{"max_steps": 2, "shards": ["a", "b"]}', encoding="utf-8")
    with pytest.raises(SystemExit) as caught:
        main([command, str(file)])
    assert caught.value.code == 2
    assert "the following arguments are required" in capsys.readouterr().err
    for content, words in (("[1]", "a JSON list where an object of flags and values"), ("{", "cannot be read as JSON")):
        file.write_text(content, encoding="utf-8")
        assert main([command, str(file)]) == 1
        assert f"{file}: {words}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["finetune", "pretrain", "prepare", "tokenizer"])
def test_a_file_of_flags_stands_alone(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "flags.json", "--max_steps", "3"])
    assert caught.value.code == 2
    assert "flags.json: a file of flags stands alone, without --max_steps 3" in capsys.readouterr().err


def test_a_diverging_run_stops(kit: Any, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = kit.write_rows(tmp_path / "train.csv", kit.examples(60))
    flags = kit.finetune_flags(base_model, train, tmp_path / "out", optim="sgd", learning_rate=1e38, logging_steps=1)
    assert main([*flags, *SHORT, "--max_grad_norm", "0"]) == 1
    assert "training diverged; try a smaller --learning_rate" in capsys.readouterr().err


def test_broken_models(kit: Any, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    train = kit.write_rows(tmp_path / "train.csv", kit.examples(12))
    weights = base_model / "model.safetensors"

    def attempt(name: str, change: Any) -> str:
        folder = tmp_path / name
        shutil.copytree(base_model, folder)
        change(folder)
        assert main(kit.finetune_flags(folder, train, tmp_path / "out") + SHORT) == 1
        error = capsys.readouterr().err
        assert f"--model_name_or_path {folder}" in error
        assert "Traceback" not in error
        return error

    def truncate(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(weights.read_bytes()[:-1000])

    def garbage(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"\xff" * 5000)

    def nan(folder: Path) -> None:
        tensors = load_file(weights)
        tensors["encoder.layer.1.output.dense.weight"][3, 4] = torch.nan
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def pickled(folder: Path) -> None:
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    def no_tokenizer(folder: Path) -> None:
        for path in folder.glob("tokenizer*"):
            path.unlink()

    def missing(folder: Path) -> None:
        tensors = load_file(weights)
        del tensors["encoder.layer.0.output.dense.bias"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    assert "cannot load weights" in attempt("truncated", truncate)
    assert "cannot load weights" in attempt("garbage", garbage)
    assert "layer.1.output.dense.weight" in attempt("nan", nan)
    convert = "transformers.AutoModelForSequenceClassification.from_pretrained(FOLDER, use_safetensors=False)"
    assert f"pickled weights, pytorch_model.bin, are not loaded; to convert those that you trust: {convert}" in attempt(
        "pickled", pickled
    )
    assert "lacks encoder weights: bert.encoder.layer.0.output.dense.bias" in attempt("missing", missing)
    assert "config.json" in attempt("no-config", lambda folder: (folder / "config.json").unlink())
    assert "config.json" in attempt("bad-config", lambda folder: (folder / "config.json").write_text("{"))
    assert "has no tokenizer" in attempt("no-tokenizer", no_tokenizer)
    assert "tokenizer" in attempt("bad-tokenizer", lambda folder: (folder / "tokenizer.json").write_text("{"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["finetune", "predict", "pretrain", "prepare"])
def test_a_name_that_is_no_folder_and_not_on_the_hub(
    kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    def unreachable(*args: Any, **options: Any) -> None:
        raise OSError("the hub cannot be reached")

    for loader in ("AutoConfig", "AutoTokenizer"):
        monkeypatch.setattr(f"transformers.{loader}.from_pretrained", unreachable)
    monkeypatch.chdir(tmp_path)
    rows, name = kit.write_rows(tmp_path / "rows.csv", kit.examples(12)), Path("nope")
    flags = {
        "finetune": kit.finetune_flags(name, rows, tmp_path / "out"),
        "predict": kit.predict_flags(name, rows, tmp_path / "out.csv"),
        "pretrain": kit.pretrain_flags(tmp_path, name, tmp_path / "out"),
        "prepare": ["prepare", "--input", str(rows), "--tokenizer_name", "nope", "--output", "out"],
    }
    assert main(flags[command]) == 1
    errors = capsys.readouterr().err
    assert "nope: no such folder here; from the hub: cannot load " in errors
    assert "the hub cannot be reached" in errors
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("command", ["finetune", "predict", "pretrain"])
def test_a_family_that_fastbert_does_not_know(
    kit: Any, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    from transformers import AlbertConfig

    folder = shutil.copytree(base_model, tmp_path / "albert")
    AlbertConfig().save_pretrained(folder)
    rows = kit.write_rows(tmp_path / "rows.csv", kit.examples(12))
    output = tmp_path / "out"
    if command == "finetune":
        flags = kit.finetune_flags(folder, rows, output)
    elif command == "predict":
        flags = kit.predict_flags(folder, rows, output.with_suffix(".csv"))
    else:
        corpus = tmp_path / "corpus.txt"
        corpus.write_text("a first sentence.\na second one.\n\nanother text.\nand its end.\n", encoding="utf-8")
        data = kit.prepare(corpus, base_model, tmp_path / "data")
        flags = kit.pretrain_flags(data, base_model, output, config_overrides=None, model_name_or_path=folder)
    assert main(flags) == 1
    errors = capsys.readouterr().err
    assert f"--model_name_or_path {folder}: a model of the family 'albert', which fastbert has no layers" in errors
    assert "--optimize false" in errors
    assert not list(tmp_path.glob("out*"))


def test_a_tokenizer_of_another_model(
    kit: Any, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_model)
    tokenizer.add_tokens(["more", "words"])
    tokenizer.save_pretrained(tmp_path / "larger")
    train = kit.write_rows(tmp_path / "train.csv", kit.examples(12))
    flags = kit.finetune_flags(base_model, train, tmp_path / "out", tokenizer_name=tmp_path / "larger")
    assert main(flags + SHORT) == 1
    assert f"--tokenizer_name {tmp_path / 'larger'}: the tokenizer has {len(tokenizer)}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
