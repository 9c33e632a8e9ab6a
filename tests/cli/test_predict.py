"""``fastbert predict``: order, formats, kinds of model, bad rows, interruption, a full disk."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastbert.cli import main
from fastbert.predictors import batches
from fastbert.training.output import Output, open_output
from fastbert.training.rows import open_rows


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


def data(kit: Any, count: int) -> list[dict[str, Any]]:
    """Rows with a number, a text of very varied length, and a topic."""
    rng = random.Random(5)
    rows = []
    for i in range(count):
        topic = rng.choice(["animal", "food", "space"])
        rows.append({"id": i, "text": kit.sentence(rng, topic, rng.choice([1, 2, 5, 20, 55])), "topic": topic})
    return rows


def expected(model: Path, texts: list[str]) -> tuple[list[str], np.ndarray]:
    """Labels and scores of stock Hugging Face code, one text at a time."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    classifier = AutoModelForSequenceClassification.from_pretrained(model).eval()
    with torch.inference_mode():
        logits = torch.cat([classifier(**tokenizer(t, return_tensors="pt", truncation=True)).logits for t in texts])
    scores, best = logits.softmax(-1).max(-1)
    return [classifier.config.id2label[int(i)] for i in best], scores.numpy()


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("source", [".csv", ".jsonl", ".parquet"])
def test_formats_and_order(kit: Any, classifier: Path, tmp_path: Path, source: str, ending: str) -> None:
    rows = data(kit, 50)
    given = kit.write_rows(tmp_path / f"in{source}", rows)
    output = tmp_path / f"out{ending}"
    flags = kit.predict_flags(classifier, given, output, window_rows=16, max_tokens_per_batch=200)
    assert main(flags) == 0
    found = read(output)
    assert [(str(row["id"]), row["text"], row["topic"]) for row in found] == [
        (str(row["id"]), row["text"], row["topic"]) for row in rows
    ]
    labels, scores = expected(classifier, [row["text"] for row in rows])
    assert [row["predicted_label"] for row in found] == labels
    np.testing.assert_allclose([float(row["score"]) for row in found], scores, atol=2e-5)
    assert not any(row.get("error") for row in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([given.name, output.name])
    if ending == ".parquet" and source != ".csv":
        assert found[0]["id"] == 0  # a number stays a number


def test_stock_model_agrees(kit: Any, classifier: Path, tmp_path: Path) -> None:
    given = kit.write_rows(tmp_path / "in.csv", data(kit, 30))
    for optimize in ("true", "false"):
        assert main(kit.predict_flags(classifier, given, tmp_path / f"{optimize}.csv", optimize=optimize)) == 0
    fast, stock = read(tmp_path / "true.csv"), read(tmp_path / "false.csv")
    assert [row["predicted_label"] for row in fast] == [row["predicted_label"] for row in stock]
    np.testing.assert_allclose([float(r["score"]) for r in fast], [float(r["score"]) for r in stock], atol=2e-5)


def test_batches_hold_every_row_once_within_the_budget() -> None:
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randint(1, 60) for _ in range(rng.randint(1, 80))]
        budget = rng.randint(1, 300)
        found = list(batches(lengths, budget))
        assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
        for batch in found:
            assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


def test_bad_rows(kit: Any, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = tmp_path / "in.jsonl"
    given.write_bytes(
        b'{"text": "a dog barks"}\n{"text": \n{"words": "x"}\n{"text": "caf\xe9"}\n{"text": null}\n{"text": ["a"]}\n'
        b'{"text": "a \\ud800 surrogate"}\n{"text": "the rocket lands"}\n'
    )
    for ending in (".jsonl", ".csv", ".parquet"):
        output = tmp_path / f"out{ending}"
        assert main(kit.predict_flags(classifier, given, output)) == 3
        found = read(output)
        assert len(found) == 8
        assert [i for i, row in enumerate(found, start=1) if row.get("error")] == [2, 3, 4, 5, 6, 7]
        assert [row["predicted_label"] or None for row in found][1:7] == [None] * 6
        assert found[0]["predicted_label"] == "animal"
        assert found[7]["predicted_label"] == "space"
        errors = capsys.readouterr().err
        for line, words in ((2, "JSON"), (3, "no field 'text'"), (4, "UTF-8"), (5, "no text"), (6, "list")):
            assert f"in.jsonl:{line}: " in errors
            assert words in found[line - 1]["error"]
            assert found[line - 1]["error"].startswith(f"line {line}: ")
    flags = kit.predict_flags(classifier, given, tmp_path / "strict.csv", on_bad_row="error")
    assert main(flags) == 1
    assert "in.jsonl:2: broken JSON" in capsys.readouterr().err
    assert not (tmp_path / "strict.csv").exists()


def test_bad_csv_rows_keep_their_place(kit: Any, classifier: Path, tmp_path: Path) -> None:
    given = tmp_path / "in.csv"
    given.write_bytes(b"id,text\n1,a dog\n2\n3,bread,4\n5,\xff\n6,a moon\n")
    assert main(kit.predict_flags(classifier, given, tmp_path / "out.csv")) == 3
    found = read(tmp_path / "out.csv")
    assert [row["id"] for row in found] == ["1", "", "", "", "6"]
    assert [bool(row["error"]) for row in found] == [False, True, True, True, False]


def test_multi_label_and_regression(kit: Any, base_model: Path, tmp_path: Path) -> None:
    rows = kit.examples(40)
    lists = kit.write_rows(tmp_path / "lists.jsonl", [row | {"label": [row["label"], "any"]} for row in rows])
    numbers = kit.write_rows(
        tmp_path / "numbers.csv", [row | {"label": 0.5 * len(row["text"].split())} for row in rows]
    )
    short = ["--num_train_epochs", "4", "--learning_rate", "5e-3", "--per_device_train_batch_size", "16"]
    assert main(kit.finetune_flags(base_model, lists, tmp_path / "multi") + short) == 0
    assert main(kit.finetune_flags(base_model, numbers, tmp_path / "value") + short) == 0
    given = kit.write_rows(tmp_path / "in.csv", [{"text": row["text"]} for row in rows])

    assert main(kit.predict_flags(tmp_path / "multi", given, tmp_path / "multi.jsonl")) == 0
    assert main(kit.predict_flags(tmp_path / "multi", given, tmp_path / "multi.csv", label_delimiter="|")) == 0
    for row, line in zip(read(tmp_path / "multi.jsonl"), read(tmp_path / "multi.csv"), strict=True):
        chosen = [name for name in ("animal", "any", "food", "space") if row[f"score_{name}"] > 0.5]
        assert row["predicted_label"] == chosen
        assert line["predicted_label"] == "|".join(chosen)
        assert "any" in chosen

    assert main(kit.predict_flags(tmp_path / "value", given, tmp_path / "value.parquet")) == 0
    values = [row["predicted_value"] for row in read(tmp_path / "value.parquet")]
    assert all(isinstance(value, float) for value in values)
    assert len(set(values)) > 20


def test_pairs_and_several_columns(kit: Any, classifier: Path, tmp_path: Path) -> None:
    given = kit.write_rows(tmp_path / "in.csv", [{"a": "the dog", "b": "barks", "c": "a horse"}])
    flags = kit.predict_flags(classifier, given, tmp_path / "out.csv", text_pair_column_name="c", all_scores=True)
    position = flags.index("--text_column_name")
    assert main([*flags[:position], *flags[position + 2 :], "--text_column_name", "a", "b"]) == 0
    assert main([*flags[:position], *flags[position + 2 :], "--text_column_name", "a,b", "--overwrite"]) == 0
    (row,) = read(tmp_path / "out.csv")
    scores = [float(row[f"score_{name}"]) for name in ("animal", "food", "space")]
    assert sum(scores) == pytest.approx(1, abs=1e-5)
    assert float(row["score"]) == max(scores)


def test_columns_of_the_same_name(
    kit: Any, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = kit.write_rows(tmp_path / "in.csv", [{"text": "a dog", "score": 7}])
    assert main(kit.predict_flags(classifier, given, tmp_path / "out.csv")) == 1
    assert "'score'" in capsys.readouterr().err
    assert main(kit.predict_flags(classifier, given, tmp_path / "out.csv", column_prefix="new_")) == 0
    assert read(tmp_path / "out.csv")[0]["score"] == "7"
    late = kit.write_rows(tmp_path / "in.jsonl", [{"text": "a dog"}, {"text": "a cat", "error": 1}])
    assert main(kit.predict_flags(classifier, late, tmp_path / "out.jsonl")) == 1
    assert "'error' already (line 2)" in capsys.readouterr().err


def test_later_fields_of_jsonl_have_their_column(kit: Any, classifier: Path, tmp_path: Path) -> None:
    rows = [{"text": "a dog", "n": 1}, {"text": "a cat", "n": "two"}, {"text": "soup", "more": [1, 2]}]
    given = kit.write_rows(tmp_path / "in.jsonl", rows)
    for ending in (".csv", ".parquet"):
        assert main(kit.predict_flags(classifier, given, tmp_path / f"out{ending}", window_rows=1)) == 0
    assert [row["n"] for row in read(tmp_path / "out.csv")] == ["1", "two", ""]
    assert [row["more"] for row in read(tmp_path / "out.csv")] == ["", "", "[1, 2]"]
    found = read(tmp_path / "out.parquet")
    assert [row["n"] for row in found] == ["1", "two", None]
    assert [row["more"] for row in found] == [None, None, [1, 2]]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"input": "none.csv"}, "--input none.csv: no such file"),
        ({"output": "no/such/out.csv"}, "--output no/such/out.csv: the folder"),
        ({"output": "out.xlsx"}, "--output out.xlsx: unknown file ending"),
        ({"text_column_name": "words"}, "its columns are: 'text'"),
        ({"model_name_or_path": "/no/such/model"}, "--model_name_or_path /no/such/model: no such folder"),
        ({"max_seq_length": 65}, "--max_seq_length 65: the model has 64 positions"),
        ({"max_seq_length": 2}, "--max_seq_length 2: must be at least 3"),
        ({"max_seq_length": 3, "text_pair_column_name": "text"}, "--max_seq_length 3: must be at least 4"),
        ({"threshold": 0.2}, "--threshold: not a flag for a classifier (single_label_classification)"),
        ({"label_delimiter": ";"}, "--label_delimiter: not a flag for a classifier (single_label_classification)"),
        ({"device": "quantum"}, "--device quantum"),
    ],
)
def test_wrong_flags(
    kit: Any,
    classifier: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: dict[str, Any],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    kit.write_rows(Path("in.csv"), [{"text": "a dog"}])
    values = {"model_name_or_path": classifier, "input": "in.csv", "output": "out.csv"} | more
    flags = kit.predict_flags(values.pop("model_name_or_path"), values.pop("input"), values.pop("output"), **values)
    assert main(flags) == 1
    assert words in capsys.readouterr().err
    assert os.listdir() == ["in.csv"]


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("threshold", "2", "must be from 0 to 1, got '2'"),
        ("threshold", "nan", "must be a finite number, got 'nan'"),
        ("null_score_diff_threshold", "nan", "must be a finite number, got 'nan'"),
        ("window_rows", "abc", "must be a whole number of at least 1, got 'abc'"),
    ],
)
def test_numbers_out_of_range(capsys: pytest.CaptureFixture[str], flag: str, value: str, words: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["predict", "--model_name_or_path", "x", "--input", "y", "--output", "z", f"--{flag}", value])
    assert caught.value.code == 2
    assert f"argument --{flag}: {words}" in capsys.readouterr().err


def test_what_a_table_cannot_hold_is_an_error_of_its_row(
    kit: Any, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["a\tdog", "a\ndog", "the\rmoon", 'my "old" star']
    given = kit.write_rows(tmp_path / "in.jsonl", [{"text": text, "id": i} for i, text in enumerate(texts)])
    assert main(kit.predict_flags(classifier, given, tmp_path / "out.tsv")) == 3
    assert "in.jsonl:2: 'text' has a line break, which .tsv cannot hold; write .csv" in capsys.readouterr().err
    found = [row.values for row in open_rows(tmp_path / "out.tsv", "--input").rows()]
    assert [row["text"] for row in found] == [texts[0], "", "", texts[3]]
    assert [bool(row["error"]) for row in found] == [False, True, True, False]
    assert main(kit.predict_flags(classifier, given, tmp_path / "out.csv")) == 0
    assert [row["text"] for row in read(tmp_path / "out.csv")] == texts
    (tmp_path / "wide.jsonl").write_text('{"text": "a", "b\\nc": 1}\n', encoding="utf-8")
    assert main(kit.predict_flags(classifier, tmp_path / "wide.jsonl", tmp_path / "wide.tsv")) == 1
    assert "the column 'b\\nc' has a line break in its name" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["a\tb", "a\nb", ""])
def test_words_that_conll_cannot_hold(tmp_path: Path, word: str) -> None:
    output = open_output(str(tmp_path / "out.conll"), ["words"], ["predicted_tags", "scores", "error"], None, " ")
    assert output.problem({"words": ["dog", "c d"]}, [["O", "O"], [1, 1]]) is None
    assert f"'words' has the word {word!r}" in str(output.problem({"words": ["dog", word]}, [["O", "O"], [1, 1]]))


def test_unusable_models_and_inputs(
    kit: Any, classifier: Path, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    given = kit.write_rows(tmp_path / "in.csv", [{"text": "a dog"}])
    assert main(kit.predict_flags(base_model, given, tmp_path / "out.csv")) == 1
    assert "not a trained classifier" in capsys.readouterr().err
    broken = tmp_path / "broken"
    shutil.copytree(classifier, broken, ignore=shutil.ignore_patterns("checkpoint-*"))
    (broken / "model.safetensors").write_bytes((classifier / "model.safetensors").read_bytes()[:-500])
    assert main(kit.predict_flags(broken, given, tmp_path / "out.csv")) == 1
    assert "cannot load weights" in capsys.readouterr().err
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    assert main(kit.predict_flags(broken, given, tmp_path / "out.csv")) == 1
    assert "pickled weights, pytorch_model.bin, are not loaded" in capsys.readouterr().err
    (tmp_path / "empty.csv").write_text("text\n", encoding="utf-8")
    assert main(kit.predict_flags(classifier, tmp_path / "empty.csv", tmp_path / "out.csv")) == 1
    assert "no rows" in capsys.readouterr().err
    doubled = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(doubled, tmp_path / "doubled.parquet")
    assert main(kit.predict_flags(classifier, tmp_path / "doubled.parquet", tmp_path / "out.csv")) == 1
    assert "columns that occur twice: ['text']" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "doubled.parquet", "empty.csv", "in.csv"]


def test_an_existing_output_is_not_replaced_unasked(
    kit: Any, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = kit.write_rows(tmp_path / "in.csv", [{"text": "a dog"}])
    output = tmp_path / "out.csv"
    output.write_text("mine", encoding="utf-8")
    assert main(kit.predict_flags(classifier, given, output)) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert output.read_text(encoding="utf-8") == "mine"
    assert main(kit.predict_flags(classifier, given, output, resume=True)) == 1
    assert "exists already and no unfinished run is there to go on with" in capsys.readouterr().err
    assert output.read_text(encoding="utf-8") == "mine"
    assert main(kit.predict_flags(classifier, given, output, overwrite=True)) == 0
    assert read(output)[0]["predicted_label"] == "animal"


def test_the_input_is_never_replaced(
    kit: Any, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = kit.write_rows(tmp_path / "in.csv", data(kit, 3))
    before, link = given.read_bytes(), tmp_path / "link.csv"
    link.symlink_to(given)
    for source, output in ((given, given), (link, given), (given, link)):
        assert main(kit.predict_flags(classifier, source, output, overwrite=True)) == 1
        assert f"--output {output}: is the --input" in capsys.readouterr().err
    assert given.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [given, link]


def test_a_resumed_run_replaces_no_file_that_has_come_meanwhile(
    kit: Any,
    classifier: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = kit.write_rows(tmp_path / "in.csv", data(kit, 20))
    output = tmp_path / "out.csv"
    flags = kit.predict_flags(classifier, given, output, window_rows=5)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Output, "finish", stop)
        assert main(flags) == 130
    output.write_text("mine", encoding="utf-8")
    assert main([*flags, "--resume"]) == 1
    assert f"{output} is a file that the unfinished run has not written" in capsys.readouterr().err
    assert output.read_text(encoding="utf-8") == "mine"
    assert main([*flags, "--resume", "--overwrite"]) == 0
    assert len(read(output)) == 20


def windows(output: Path) -> int:
    try:
        return int(json.loads(output.with_name(output.name + ".part.json").read_text(encoding="utf-8"))["windows"])
    except (OSError, ValueError):
        return 0


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_killed_and_resumed(
    kit: Any, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    rows = data(kit, 320)
    rows[77]["text"] = ""
    given = kit.write_rows(tmp_path / f"in{ending}", rows)
    whole, output = tmp_path / f"whole{ending}", tmp_path / f"out{ending}"
    settings = {"window_rows": 8, "max_tokens_per_batch": 128}
    assert main(kit.predict_flags(classifier, given, whole, **settings)) == 3
    flags = kit.predict_flags(classifier, given, output, **settings)
    kit.signal_when(kit.start(flags), lambda: windows(output) >= 6, signal.SIGKILL)
    assert not output.exists()
    done = windows(output)
    assert 6 <= done < 40
    assert main(flags) == 1
    assert "--resume" in capsys.readouterr().err
    assert main([*flags, "--window_rows", "9", "--resume"]) == 1
    assert "--window_rows" in capsys.readouterr().err
    assert main([*flags, "--resume"]) == 3
    assert f"{8 * done} rows are complete, going on" in capsys.readouterr().err
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([given.name, whole.name, output.name])


def test_standard_input_resumed(
    kit: Any,
    classifier: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [{"text": row["text"], "label": row["label"]} for row in kit.examples(24)]
    rows[15]["text"] = ""
    given = kit.write_rows(tmp_path / "in.jsonl", rows).read_bytes()
    output = tmp_path / "out.jsonl"
    flags = kit.predict_flags(classifier, "-", output, window_rows=8)

    def run(text: bytes, *more: str) -> int:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
        return main([*flags, *more])

    assert run(given, "--on_bad_row", "error") == 1
    assert "-:16:" in capsys.readouterr().err
    assert run(given[:100], "--resume") == 1
    assert "standard input ends" in capsys.readouterr().err
    assert run(given, "--resume") == 3
    found = [json.loads(line)["text"] for line in output.read_text(encoding="utf-8").splitlines()]
    assert found == [row["text"] for row in rows]


def test_resumed_with_another_tokenizer(
    kit: Any, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(classifier, tmp_path / "model")
    rows = kit.examples(24)
    rows[15]["text"] = ""
    given = kit.write_rows(tmp_path / "in.csv", rows)
    flags = kit.predict_flags(folder, given, folder / "out.json.csv", window_rows=8)
    assert main([*flags, "--on_bad_row", "error"]) == 1
    content = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(content + "\n", encoding="utf-8")
    assert main([*flags, "--resume"]) == 1
    assert "had another --model_name_or_path" in capsys.readouterr().err


def test_interrupted_and_resumed(kit: Any, classifier: Path, tmp_path: Path) -> None:
    given = kit.write_rows(tmp_path / "in.csv", data(kit, 400))
    output = tmp_path / "out.csv"
    flags = kit.predict_flags(classifier, given, output, window_rows=8)
    process = kit.start(flags)
    errors = kit.signal_when(process, lambda: windows(output) >= 5, signal.SIGINT)
    assert process.returncode == 130
    assert "--resume" in errors
    assert "Traceback" not in errors
    assert main([*flags, "--resume"]) == 0
    assert [int(row["id"]) for row in read(output)] == list(range(400))


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_full_disk(
    kit: Any,
    classifier: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file_size_limit: Any,
    ending: str,
) -> None:
    given = kit.write_rows(tmp_path / "in.csv", data(kit, 300))
    whole, output = tmp_path / f"whole{ending}", tmp_path / f"out{ending}"
    assert main(kit.predict_flags(classifier, given, whole, window_rows=32)) == 0
    flags = kit.predict_flags(classifier, given, output, window_rows=32)
    file_size_limit(whole.stat().st_size // 2)
    status = main(flags)
    file_size_limit(-1)
    assert status == 1
    errors = capsys.readouterr().err
    assert "no space left" in errors
    assert "--resume" in errors
    assert not output.exists()
    assert main([*flags, "--resume"]) == 0
    assert output.read_bytes() == whole.read_bytes()


def test_full_device(kit: Any, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    given = kit.write_rows(tmp_path / "in.csv", data(kit, 3))
    assert main(kit.predict_flags(classifier, given, "/dev/full")) == 1
    assert "no space left" in capsys.readouterr().err.lower()


def test_standard_input_and_output(
    kit: Any, classifier: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    text = '{"text": "a dog barks"}\n{"text": "the rocket lands", "n": 2}\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert main(kit.predict_flags(classifier, "-", "-")) == 0
    lines = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert [line["predicted_label"] for line in lines] == ["animal", "space"]
    assert lines[1]["n"] == 2


def test_text_files_need_no_extra_package(kit: Any, classifier: Path, tmp_path: Path) -> None:
    """A machine that only predicts has no need of datasets, pyarrow or scikit-learn."""
    given = kit.write_rows(tmp_path / "in.csv", [{"text": "a dog"}])
    script = (
        "import sys; sys.modules.update(dict.fromkeys(('pyarrow', 'datasets', 'sklearn', 'pandas', 'matplotlib')));"
        f"from fastbert.cli import main; sys.exit(main({kit.predict_flags(classifier, given, tmp_path / 'out.csv')!r}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "out.csv")[0]["predicted_label"] == "animal"


def test_cut_texts_are_counted(kit: Any, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = kit.write_rows(tmp_path / "in.csv", [{"text": "dog " * 90}, {"text": "dog"}, {"text": "cat " * 70}])
    assert main(kit.predict_flags(classifier, given, tmp_path / "out.csv")) == 0
    assert "2 texts were cut to 64 tokens" in capsys.readouterr().err
