"""Extractive question answering: SQuAD's files, windows, the choice of answers, its metrics, predictions."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastbert.cli import main
from fastbert.training.question_answering import (
    AnswerSearch,
    Question,
    QuestionEncoder,
    Window,
    answer_scores,
    positions_of,
)

ANIMALS = ["dog", "cat", "horse", "whale", "sparrow"]
FOODS = ["bread", "cheese", "soup", "apple", "salt"]
FILLER = ["the", "very", "often", "never", "my", "old", "some", "with", "under", "near"]
ASKED = {"animal": ("barks runs", ANIMALS), "food": ("cooks tastes", FOODS)}


def questions(count: int, seed: int = 0, words: int = 8, negative: bool = False) -> list[dict[str, Any]]:
    """Contexts that name an animal or a food, and questions for it (or, with ``negative``, for either)."""
    rng = random.Random(seed)
    found: list[dict[str, Any]] = []
    while len(found) < count:
        tokens = [rng.choice(FILLER) for _ in range(words)]
        kind = rng.choice(["animal", "food"])
        tokens[rng.randrange(words)] = rng.choice(ASKED[kind][1])
        context = " ".join(tokens)
        kind = rng.choice(["animal", "food"]) if negative else kind
        named = [name for name in ASKED[kind][1] if name in tokens]
        answers = {"text": named, "answer_start": [context.index(name) for name in named]}
        found.append({"id": str(len(found)), "context": context, "question": ASKED[kind][0], "answers": answers})
    return found


def as_squad(rows: list[dict[str, Any]]) -> dict[str, Any]:
    paragraphs = [
        {
            "context": row["context"],
            "qas": [
                {
                    "id": row["id"],
                    "question": row["question"],
                    "is_impossible": not row["answers"]["text"],
                    "answers": [
                        {"text": text, "answer_start": start}
                        for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
                    ],
                }
            ],
        }
        for row in rows
    ]
    return {"version": "x", "data": [{"title": "one", "paragraphs": paragraphs}]}


def write_squad(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(as_squad(rows)), encoding="utf-8")
    return path


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def flags_for(flags: list[str]) -> list[str]:
    """Without the text column that the other tests' models need."""
    position = flags.index("--text_column_name")
    return [*flags[:position], *flags[position + 2 :]]


@pytest.fixture(scope="module")
def reader(kit: Any, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tuned from SQuAD's JSON; nothing names the task."""
    folder = tmp_path_factory.mktemp("reader")
    train = write_squad(folder / "train.json", questions(240))
    test = write_squad(folder / "test.json", questions(40, seed=1))
    flags = kit.finetune_flags(base_model, train, folder / "out", test_file=test, learning_rate=5e-3)
    assert main([*flags, "--num_train_epochs", "6", "--per_device_train_batch_size", "16"]) == 0
    return folder / "out"


def test_it_learns(reader: Path) -> None:
    found = report(reader)
    assert found["task"]["name"] == "question_answering"
    assert found["best"]["metric"] == "f1"
    assert found["test"]["exact_match"] > 0.8
    assert found["test"]["f1"] >= found["test"]["exact_match"]
    assert [layer["path"] for layer in found["fastbert"]["layers"]] == ["fast", "fast"]
    config = json.loads((reader / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["BertForQuestionAnswering"]


def test_answers_are_scored_as_by_squads_script() -> None:
    assert answer_scores("The Eiffel-Tower!", ["eiffeltower"]) == (1, 1)
    assert answer_scores("in the old town", ["old town", "paris"]) == (0, pytest.approx(2 * 2 / (3 + 2)))
    assert answer_scores("", []) == (1, 1)
    assert answer_scores("", ["a"]) == (1, 1)  # an answer that is nothing but an article is none
    assert answer_scores("paris", []) == (0, 0)
    assert answer_scores("", ["paris"]) == (0, 0)


def test_windows_cover_the_context_and_place_the_answer(base_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_model)
    encoding = QuestionEncoder.of(tokenizer, 20, 4)
    rng = random.Random(0)
    for _ in range(30):
        words = [rng.choice([*FILLER, *FOODS, "unseen-word"]) for _ in range(rng.randint(1, 60))]
        place = rng.randrange(len(words))
        context, start = " ".join(words), len(" ".join(words[:place])) + (place > 0)
        question = encoding.check(Question("cooks tastes", context, [words[place]], start))
        encoded, windows = encoding.windows([question])
        assert max(map(len, encoded["input_ids"])) <= 20
        assert windows[0].offsets[0, 0] == 0
        assert windows[-1].offsets[-1, 1] == len(context)
        found = 0
        for ids, window in zip(encoded["input_ids"], windows, strict=True):
            first, last = positions_of(question, window)
            inside = window.offsets[0, 0] <= start and start + len(words[place]) <= window.offsets[-1, 1]
            assert (first > 0) == inside
            if inside:
                found += 1
                spans = window.offsets[first - window.first], window.offsets[last - window.first]
                assert context[spans[0][0] : spans[1][1]] == words[place]
                assert first < len(ids)
        pieces = len(tokenizer(words[place], add_special_tokens=False)["input_ids"])
        assert found or pieces > encoding.overlap + 1


def test_choice_of_answers() -> None:
    context = "aa bb cc dd"
    window = Window(0, 2, np.array([[0, 2], [3, 5], [6, 8], [9, 11]]))
    start, end = np.full(7, -9.0), np.full(7, -9.0)  # [CLS] question context [SEP]
    start[3], end[4] = 5, 5
    start[5], end[2] = 6, 5.5  # an end before the start
    assert AnswerSearch().best(context, [(window, start, end)]).text == "bb cc"
    assert AnswerSearch(max_answer_length=1).best(context, [(window, start, end)]).text == "dd"
    other = Window(0, 2, window.offsets)
    better = end.copy()
    better[3] = 20
    assert AnswerSearch().best(context, [(window, start, end), (other, start, better)]).text == "bb"
    start[0], end[0] = 5, 5.5
    assert AnswerSearch(negative=False).best(context, [(window, start, end)]).text == "bb cc"
    none = AnswerSearch(negative=True).best(context, [(window, start, end)])
    assert (none.text, none.start) == ("", -1)
    assert AnswerSearch(negative=True, null_score_diff_threshold=1).best(context, [(window, start, end)]).start == 3


@pytest.mark.parametrize("form", ["jsonl", "parquet", "folder"])
def test_unanswerable_questions_and_windows(kit: Any, base_model: Path, tmp_path: Path, form: str) -> None:
    rows = questions(24, words=60, negative=True)
    assert {bool(row["answers"]["text"]) for row in rows} == {True, False}
    rows[1]["answers"] = {"text": [], "answer_start": []}
    train = kit.write_rows(tmp_path / ("data" if form == "folder" else f"data.{form}"), rows)
    flags = kit.finetune_flags(base_model, train, tmp_path / "out", max_seq_length=32, num_train_epochs=1)
    flags += ["--validation_split_percentage", "25"]
    assert main([*flags, "--version_2_with_negative", "true", "--doc_stride", "8"]) == 0
    found = report(tmp_path / "out")
    assert found["data"]["train"]["windows"] > 2 * found["data"]["train"]["rows"]
    assert {"f1", "exact_match", "f1_has_answer", "f1_no_answer", "loss"} <= found["history"]["eval"][0].keys()


def test_bad_questions(kit: Any, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = questions(20)
    rows[1]["answers"] = {"text": ["dog"], "answer_start": [1]}
    rows[3]["question"] = " "
    rows[5]["answers"] = {"text": [], "answer_start": []}
    rows[7]["answers"] = {"text": ["dog"], "answer_start": []}
    rows[9]["question"] = "barks " * 60
    train = kit.write_rows(tmp_path / "train.jsonl", rows)
    flags = kit.finetune_flags(base_model, train, tmp_path / "out", num_train_epochs=1)
    assert main(flags) == 1
    errors = capsys.readouterr().err
    for line, words in (
        (2, "'answers': 'dog' does not stand at 1 of the context"),
        (4, "no text in 'question'"),
        (6, "--version_2_with_negative allows questions without"),
        (8, "'answers' needs as many 'text' as 'answer_start'"),
        (10, "the question has 60 tokens; with 64 a window"),
    ):
        assert f"train.jsonl:{line}: {words}" in errors or (f"train.jsonl:{line}: " in errors and words in errors)
    assert main([*flags, "--on_bad_row", "skip"]) == 0
    assert report(tmp_path / "out")["data"]["train"]["bad_row_lines"] == [2, 4, 6, 8, 10]


def test_wrong_flags(kit: Any, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write_squad(tmp_path / "train.json", questions(8))
    for more, words in (
        ({"doc_stride": 60}, "--doc_stride 60: must be less than the 60 tokens"),
        ({"null_score_diff_threshold": 1}, "--null_score_diff_threshold: only with --version_2_with_negative"),
        ({"context_column_name": "text"}, "has no column 'text'"),
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor: only for classes"),
        ({"label_all_tokens": True}, "--label_all_tokens: not a flag of --task question_answering"),
    ):
        flags = kit.finetune_flags(base_model, train, tmp_path / "out", task="question_answering", **more)
        assert main(flags) == 1
        assert words in capsys.readouterr().err
    (tmp_path / "empty.json").write_text('{"data": []}', encoding="utf-8")
    assert main(kit.finetune_flags(base_model, tmp_path / "empty.json", tmp_path / "out")) == 1
    assert "no question under 'data'" in capsys.readouterr().err


def test_predicted_answers(kit: Any, reader: Path, tmp_path: Path) -> None:
    rows = questions(30, seed=2) + questions(3, seed=3, words=150)
    given = write_squad(tmp_path / "in.json", rows)
    flags = flags_for(kit.predict_flags(reader, given, tmp_path / "out.jsonl", window_rows=8))
    assert main(flags) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    for line in lines:
        start = line["predicted_start"]
        assert line["context"][start : start + len(line["predicted_answer"])] == line["predicted_answer"]
        assert 0 < line["score"] <= 1
    right = [line["predicted_answer"] == line["answers"][0]["text"] for line in lines[:30]]
    assert sum(right) > 24
    more = ["--version_2_with_negative", "--null_score_diff_threshold", "-1000", "--overwrite"]
    assert main([*flags, *more]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {(line["predicted_answer"], line["predicted_start"]) for line in lines} == {("", None)}


def test_bad_questions_keep_their_place(kit: Any, reader: Path, tmp_path: Path) -> None:
    given = tmp_path / "in.jsonl"
    good = {"question": "barks runs", "context": "the dog"}
    lines = [good, {"question": "barks"}, {"question": "barks " * 60, "context": "the dog"}, good]
    given.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert main(flags_for(kit.predict_flags(reader, given, tmp_path / "out.jsonl"))) == 3
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line.get("error") is None for line in found] == [True, False, False, True]
    assert "line 2: no field 'context'" in found[1]["error"]
    assert found[0]["predicted_answer"] == found[3]["predicted_answer"]
