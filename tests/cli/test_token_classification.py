"""Token classification: CoNLL files, alignment of words, windows of long sentences, entity scores, predictions."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from fastbert.cli import main
from fastbert.training.conll import ConllFile
from fastbert.training.rows import open_rows
from fastbert.training.token_classification import entities, score_entities, word_windows

NAMES = {"animal": "ANI", "food": "FOO"}
WORDS = {
    "animal": ["dog", "cat", "horse", "whale", "sparrow"],
    "food": ["bread", "cheese", "soup", "apple", "salt"],
}
SECOND = {"animal": ["tail", "barks"], "food": ["plate", "spicy"]}
FILLER = ["the", "a", "very", "often", "never", "my", "old", "some", "with", "under"]


def sentences(count: int, seed: int = 0, words: int | None = None) -> list[dict[str, Any]]:
    """Sentences in which names of one or two words are tagged."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        tokens: list[str] = []
        tags: list[str] = []
        length = words or rng.randint(3, 12)
        while len(tokens) < length:
            topic = rng.choice(["animal", "food", ""])
            chosen = [rng.choice(WORDS[topic] if topic else FILLER)]
            if topic and rng.random() < 0.5:
                chosen.append(rng.choice(SECOND[topic]))
            tokens += chosen
            tags += [f"B-{NAMES[topic]}", f"I-{NAMES[topic]}"][: len(chosen)] if topic else ["O"]
        found.append({"tokens": tokens, "tags": tags})
    return found


def write_conll(path: Path, rows: list[dict[str, Any]], columns: tuple[str, ...] = ("tokens", "tags")) -> Path:
    blocks = ["\n".join("\t".join(cells) for cells in zip(*(row[c] for c in columns), strict=True)) for row in rows]
    path.write_text("-DOCSTART- -X- O\n\n" + "\n\n".join(blocks) + "\n", encoding="utf-8")
    return path


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tagger(kit: Any, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tuned from a CoNLL file; nothing names the task."""
    folder = tmp_path_factory.mktemp("tagger")
    train = write_conll(folder / "train.conll", sentences(150))
    test = write_conll(folder / "test.conll", sentences(30, seed=1))
    flags = kit.finetune_flags(base_model, train, folder / "out", test_file=test, learning_rate=5e-3)
    assert main([*flags, "--num_train_epochs", "6", "--per_device_train_batch_size", "8"]) == 0
    return folder / "out"


def test_it_learns_and_reports_entities(tagger: Path) -> None:
    from transformers import pipeline

    found = report(tagger)
    assert found["task"] == {"name": "token_classification", "labels": ["B-ANI", "B-FOO", "I-ANI", "I-FOO", "O"]}
    assert found["best"]["metric"] == "f1"
    assert found["test"]["f1"] > 0.8
    assert found["test"].keys() >= {"f1", "precision", "recall", "accuracy", "loss"}
    assert set(found["test_per_label"]) == {"ANI", "FOO"}
    assert found["data"]["train"]["rows"] + found["data"]["validation"]["rows"] == 150
    assert [layer["path"] for layer in found["fastbert"]["layers"]] == ["fast", "fast"]
    config = json.loads((tagger / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["BertForTokenClassification"]
    tags = pipeline("token-classification", model=str(tagger), device="cpu")("the old dog")
    assert [entity["entity"] for entity in tags] == ["B-ANI"]


def test_entities_by_the_rules_of_conlleval() -> None:
    assert entities(["B-PER", "I-PER", "O", "B-LOC"]) == {("PER", 0, 2), ("LOC", 3, 4)}
    assert entities(["I-PER", "I-PER", "B-PER"]) == {("PER", 0, 2), ("PER", 2, 3)}  # IOB1
    assert entities(["B-PER", "I-LOC", "I-LOC"]) == {("PER", 0, 1), ("LOC", 1, 3)}
    assert entities(["S-PER", "B-PER", "E-PER", "E-PER"]) == {("PER", 0, 1), ("PER", 1, 3), ("PER", 3, 4)}
    assert entities(["O", "O"]) == set()
    # Two spans wanted, one found with its exact borders, one with wrong ones.
    truth, guess = [["B-PER", "I-PER", "O", "B-LOC"]], [["B-PER", "O", "O", "B-LOC"]]
    assert score_entities(truth, guess)[""] == {"precision": 0.5, "recall": 0.5, "f1-score": 0.5, "support": 2}
    assert score_entities(truth, guess)["LOC"]["f1-score"] == 1.0


@pytest.mark.parametrize("overlap", [0, 1, 3])
def test_windows_hold_every_word_once(base_model: Path, overlap: int) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_model)
    rng = random.Random(overlap)
    texts = [
        [rng.choice(["dog", "the", "unseenly", "xylophonedog", "\u200b"]) for _ in range(rng.randint(1, 40))]
        for _ in range(20)
    ]
    encoded, windows = word_windows(tokenizer, texts, 12, overlap)
    assert max(map(len, encoded["input_ids"])) <= 12
    assert len(windows) > len(texts)
    for row, words in enumerate(texts):
        parts = [(window, ids) for window, ids in zip(windows, encoded["input_ids"], strict=True) if window.row == row]
        pieces = tokenizer(words, is_split_into_words=True)
        firsts = {}
        for word, token in zip(pieces.word_ids(), pieces["input_ids"], strict=True):
            if word is not None:
                firsts.setdefault(word, token)
        owned = [
            (word, ids[place]) for window, ids in parts for word, place in zip(window.words, window.places, strict=True)
        ]
        assert owned == sorted(firsts.items())  # each once, in order, at its first piece


def test_conll_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_bytes(
        b"\xef\xbb\xbf-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n\nbroken NNP\n. . O O\n\n"
        b"caf\xe9 NN B-NP O\n\nlast NN B-NP O"
    )
    rows = open_rows(path, "--train_file")
    assert isinstance(rows, ConllFile)
    assert rows.columns == ["tokens", "column_2", "column_3", "tags"]
    found = list(rows.rows())
    assert [row.line for row in found] == [3, 7, 10, 12]
    assert found[0].values == {
        "tokens": ["EU", "rejects"],
        "column_2": ["NNP", "VBZ"],
        "column_3": ["B-NP", "B-VP"],
        "tags": ["B-ORG", "O"],
    }
    assert found[1].error == "2 columns in line 7 where the file has 4"
    assert "UTF-8" in (found[2].error or "")
    assert found[3].values["tokens"] == ["last"]
    for row, rest in zip(found, (3, 2, 1, 0), strict=True):
        assert len(list(rows.rows(row.end))) == rest


def test_documents_part_sentences(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_text("EU B-ORG\nrejects O\n-DOCSTART- O\nPeter B-PER\n", encoding="utf-8")
    assert [row.values["tokens"] for row in open_rows(path, "--train_file").rows()] == [["EU", "rejects"], ["Peter"]]


@pytest.mark.parametrize("start", ["-DOCSTART-\n\n", "\n", ""])
def test_a_byte_order_mark(tmp_path: Path, start: str) -> None:
    path = tmp_path / "a.conll"
    path.write_text(f"\ufeff{start}EU B-ORG\nrejects O\n", encoding="utf-8")
    (row,) = open_rows(path, "--train_file").rows()
    assert row.error is None
    assert row.values == {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}


@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".csv", ""])
def test_other_files_and_windows(kit: Any, base_model: Path, tmp_path: Path, ending: str) -> None:
    """Long sentences are trained on in windows; tags need not be entities; a CSV's cells are split at white space."""
    plural = {"B-ANI": "noun", "I-ANI": "noun", "B-FOO": "noun", "I-FOO": "noun", "O": "other"}
    rows = [{"words": row["tokens"], "ner_tags": [plural[t] for t in row["tags"]]} for row in sentences(20, words=30)]
    if ending == ".csv":
        rows = [{name: " ".join(value) for name, value in row.items()} for row in rows]
    train = kit.write_rows(tmp_path / f"train{ending}", rows)
    flags = kit.finetune_flags(base_model, train, tmp_path / "out", max_seq_length=16, num_train_epochs=1)
    assert main([*flags, "--label_all_tokens", "true", "--doc_stride", "4"]) == 0
    found = report(tmp_path / "out")
    assert found["task"]["labels"] == ["noun", "other"]
    assert found["best"]["metric"] == "accuracy"
    assert found["data"]["train"]["windows"] > 2 * found["data"]["train"]["rows"]
    assert found["data"]["train"]["words_without_tokens"] == 0


def test_names_of_a_saved_dataset(kit: Any, base_model: Path, tmp_path: Path) -> None:
    import datasets

    names = ["O", "B-ANI", "I-ANI", "B-FOO", "I-FOO"]
    rows = [{"tokens": r["tokens"], "ner_tags": [names.index(t) for t in r["tags"]]} for r in sentences(20)]
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(datasets.ClassLabel(names=names))}
    )
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "data"))
    flags = kit.finetune_flags(base_model, tmp_path / "data", tmp_path / "out", num_train_epochs=1)
    assert main(flags) == 0
    assert report(tmp_path / "out")["task"]["labels"] == names


def test_bad_sentences(kit: Any, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = sentences(20)
    rows[2]["tags"] = rows[2]["tags"][1:]
    rows[4]["tokens"] = []
    rows[6]["tags"][0] = None
    rows[8]["tokens"][1] = 7
    train = kit.write_rows(tmp_path / "train.jsonl", rows)
    flags = kit.finetune_flags(base_model, train, tmp_path / "out", num_train_epochs=1)
    assert main(flags) == 1
    errors = capsys.readouterr().err
    for line, words in ((3, "tags in 'tags'"), (5, "nothing in 'tokens'"), (7, "tag 1 of 'tags' is missing")):
        assert f"train.jsonl:{line}: " in errors
        assert words in errors
    assert "train.jsonl:9: word 2 of 'tokens' is not a text but 7" in errors
    assert main([*flags, "--on_bad_row", "skip"]) == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"problem_type": "regression"}, "--problem_type: not a flag of --task token_classification"),
        ({"n_best_size": 3}, "--n_best_size: not a flag of --task token_classification"),
        ({"text_column_name": "word"}, "has no column 'word'; its columns are: 'tokens', 'tags'"),
        ({"doc_stride": 62}, "--doc_stride 62: must be less than the 62 tokens of a window"),
        ({"max_seq_length": 3}, "--max_seq_length 3: no room for a word"),
        ({"metric_for_best_model": "f1_macro"}, "token_classification has f1, precision, recall, accuracy"),
    ],
)
def test_wrong_flags(
    kit: Any, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: dict[str, Any], words: str
) -> None:
    train = write_conll(tmp_path / "train.conll", sentences(8))
    flags = kit.finetune_flags(base_model, train, tmp_path / "out", task="token_classification", **more)
    assert main(flags) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tags_that_training_lacks(
    kit: Any, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They count as missed and are reported; only a file in which no tag is known is an error."""
    train = write_conll(tmp_path / "train.conll", sentences(60))
    rows = sentences(10, seed=1)
    strange = [*rows, {"tokens": ["a", "b"], "tags": ["B-MUS", "I-MUS"]}]
    reports = []
    for name, data, more in (
        ("known", rows, {}),
        ("strange", strange, {}),
        ("all", strange, {"label_all_tokens": True}),
    ):
        test = write_conll(tmp_path / f"{name}.conll", data)
        flags = kit.finetune_flags(base_model, train, tmp_path / name, test_file=test, validation_file=test, **more)
        assert main([*flags, "--num_train_epochs", "2", "--learning_rate", "5e-3"]) == 0
        reports.append(report(tmp_path / name))
    errors = capsys.readouterr().err
    for flag in ("--validation_file", "--test_file"):
        assert (
            f"{flag} {tmp_path / 'strange.conll'}: tags that the training data does not have: 'B-MUS' (1 word" in errors
        )
    assert "they count as missed" in errors
    known, found, _ = reports
    assert found["task"]["labels"] == known["task"]["labels"]
    assert found["data"]["test"]["words_with_unseen_tags"] == 2
    assert "words_with_unseen_tags" not in known["data"]["test"]
    entities_known = sum(kind["support"] for kind in known["test_per_label"].values())
    assert found["test_per_label"]["MUS"] == {"precision": 0.0, "recall": 0.0, "f1-score": 0.0, "support": 1}
    recall = known["test"]["recall"] * entities_known / (entities_known + 1)
    assert abs(found["test"]["recall"] - recall) < 1e-6
    assert math.isfinite(found["test"]["loss"])

    other = write_conll(tmp_path / "other.conll", [{"tokens": ["a", "b"], "tags": ["DET", "NOUN"]}])
    assert main(kit.finetune_flags(base_model, train, tmp_path / "out", validation_file=other)) == 1
    error = capsys.readouterr().err
    assert "--validation_file" in error
    assert "tags that the training data does not have: 'DET' (1 word, first at line" in error
    assert "'B-ANI'" in error


def test_predicted_word_by_word(kit: Any, tagger: Path, tmp_path: Path) -> None:
    rows = sentences(25, seed=2) + sentences(2, seed=3, words=150)
    columns = ["tokens", "tags"]
    given = write_conll(tmp_path / "in.conll", rows)
    flags = kit.predict_flags(tagger, given, tmp_path / "out.conll", window_rows=8)
    position = flags.index("--text_column_name")
    flags = [*flags[:position], *flags[position + 2 :]]
    assert main(flags) == 0
    blocks = (tmp_path / "out.conll").read_text(encoding="utf-8").strip().split("\n\n")
    found = [list(zip(*(line.split("\t") for line in block.split("\n")), strict=True)) for block in blocks]
    assert [[list(column) for column in block[:2]] for block in found] == [[row[c] for c in columns] for row in rows]
    right = sum(a == b for block in found for a, b in zip(block[1], block[2], strict=True))
    assert right > 0.9 * sum(len(block[1]) for block in found)

    flags[flags.index("--output") + 1] = str(tmp_path / "out.jsonl")
    assert main(flags) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [tuple(line["predicted_tags"]) for line in lines] == [block[2] for block in found]
    assert all(0 < score <= 1 for line in lines for score in line["scores"])


def test_bad_sentences_keep_their_place(kit: Any, tagger: Path, tmp_path: Path) -> None:
    given = tmp_path / "in.jsonl"
    given.write_text('{"tokens": ["a", "dog"]}\n{"tokens": 5}\n{"words": []}\n{"tokens": "the cheese"}\n', "utf-8")
    for ending in (".conll", ".csv", ".jsonl"):
        flags = kit.predict_flags(tagger, given, tmp_path / f"out{ending}", text_column_name="tokens")
        assert main(flags) == 3
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["predicted_tags"] for line in lines] == [["O", "B-ANI"], None, None, ["O", "B-FOO"]]
    blocks = (tmp_path / "out.conll").read_text(encoding="utf-8").split("\n\n")
    assert blocks[0] == "a\tO\ndog\tB-ANI"
    assert blocks[1].startswith("-ERROR-\tline 2: 'tokens' is no list but 5")
    assert blocks[3] == "the\tO\ncheese\tB-FOO"
    assert "O B-FOO" in (tmp_path / "out.csv").read_text(encoding="utf-8")


def test_flags_that_do_not_fit_the_model(
    kit: Any, tagger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = write_conll(tmp_path / "in.conll", sentences(2))
    flags = kit.predict_flags(tagger, given, tmp_path / "out.jsonl", text_column_name="tokens", all_scores=True)
    assert main(flags) == 1
    assert "--all_scores: not a flag for a token classifier" in capsys.readouterr().err
