"""The streaming readers: every format, every kind of damage, every starting point."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastbert.training.errors import CommandError
from fastbert.training.rows import Position, open_rows

CELL = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), max_size=12)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet", ""])
def test_formats_agree(kit: Any, tmp_path: Path, ending: str) -> None:
    rows = kit.examples(7)
    found = list(open_rows(kit.write_rows(tmp_path / f"data{ending}", rows), "--input").rows())
    assert [row.values for row in found] == rows
    assert all(row.error is None for row in found)
    header = ending in (".csv", ".tsv")
    assert [row.line for row in found] == list(range(1 + header, 8 + header))


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet", ""])
def test_any_row_is_a_starting_point(kit: Any, tmp_path: Path, ending: str) -> None:
    reader = open_rows(kit.write_rows(tmp_path / f"data{ending}", kit.examples(9)), "--input")
    found = list(reader.rows())
    for index, row in enumerate(found):
        assert list(reader.rows(row.end)) == found[index + 1 :]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=st.lists(st.tuples(CELL, CELL), min_size=1, max_size=8))
def test_csv_round_trip(tmp_path: Path, table: list[tuple[str, str]]) -> None:
    buffer = io.StringIO()
    csv.writer(buffer).writerows([("a", "b"), *table])
    path = tmp_path / "data.csv"
    path.write_bytes(buffer.getvalue().encode())
    found = list(open_rows(path, "--input").rows())
    assert [(row.values["a"], row.values["b"]) for row in found] == table
    assert all(row.error is None for row in found)


def test_bad_lines_do_not_lose_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(
        b"text,label\r\n"
        b"one,1\r\n"
        b"two\r\n"  # line 3: too few
        b"three,3,3\r\n"  # line 4: too many
        b"caf\xe9,4\r\n"  # line 5: not UTF-8
        b'"five\nlines",5\r\n'  # lines 6 and 7
        b'"six" x,6\r\n'  # line 8: text behind a quoted field
        b'"seven,7\r\n'  # line 9: never closed
        b"eight,8"
    )
    found = list(open_rows(path, "--input").rows())
    assert {row.line: row.values.get("text") for row in found if row.error is None} == {
        2: "one",
        6: "five\nlines",
        10: "eight",
    }
    errors = {row.line: row.error or "" for row in found if row.error}
    assert list(errors) == [3, 4, 5, 8, 9]
    for line, words in ((3, "1 fields"), (4, "3 fields"), (5, "UTF-8"), (8, "quoting"), (9, "never closed")):
        assert words in errors[line]


def test_tsv_takes_quotes_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "data.tsv"
    path.write_text(
        'label\ttext\nA\t"Hello" he said\nB\t5" disk\nC\t"open\nD\t"quoted ""properly"""\n', encoding="utf-8"
    )
    found = [row.values["text"] for row in open_rows(path, "--input").rows()]
    assert found == ['"Hello" he said', '5" disk', '"open', 'quoted "properly"']


def test_bad_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n{"text": \n[1]\n"b"\n{"text": "\xff"}\n{"text": "c"}')
    found = list(open_rows(path, "--input").rows())
    assert [(row.line, row.values, bool(row.error)) for row in found] == [
        (1, {"text": "a"}, False),
        (3, {}, True),
        (4, {}, True),
        (5, {}, True),
        (6, {}, True),
        (7, {"text": "c"}, False),
    ]


def test_empty_lines_of_a_single_column_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("text\none\n\nthree\n\n", encoding="utf-8")
    assert [(row.line, row.values["text"]) for row in open_rows(path, "--input").rows()] == [
        (2, "one"),
        (3, ""),
        (4, "three"),
    ]


@pytest.mark.parametrize(
    ("header", "columns"), [("text,label", ["text", "label"]), ('"te,xt","label"', ["te,xt", "label"])]
)
def test_header_with_byte_order_mark(tmp_path: Path, header: str, columns: list[str]) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(header.encode("utf-8-sig") + b"\na,b\n")
    rows = open_rows(path, "--input")
    assert rows.columns == columns
    (row,) = rows.rows()
    assert (row.line, list(row.values.values())) == (2, ["a", "b"])


def test_json_lines_called_json(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(b'\xef\xbb\xbf\n{"data": [1]}\n{"data": [2]}\n')
    assert [row.values for row in open_rows(path, "--input").rows()] == [{"data": [1]}, {"data": [2]}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data.csv", b"", "empty"),
        ("data.jsonl", b" \n\n", "empty"),
        ("data.parquet", b"", "empty"),
        ("data.parquet", b"PAR1 nonsense", "not a readable Parquet file"),
        ("data.csv", "text,label\na,b\n".encode("utf-16"), "UTF-8"),
        ("data.csv", b"a,b,a\n1,2,3\n", "twice"),
        ("data.csv", b"caf\xe9\nx\n", "header"),
        ("data.jsonl", b'[{"text": "a"}]', "JSON array"),
        ("data.xlsx", b"PK", ".csv"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CommandError, match="--input") as caught:
        open_rows(tmp_path / name, "--input")
    assert words in str(caught.value)


def test_missing_file_and_other_folder(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="no such file"):
        open_rows(tmp_path / "none.csv", "--input")
    with pytest.raises(CommandError, match="save_to_disk"):
        open_rows(tmp_path, "--input")


def test_parquet_row_groups(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"n": list(range(5000))}), tmp_path / "data.parquet", row_group_size=1100)
    reader = open_rows(tmp_path / "data.parquet", "--input")
    for first in (0, 1, 1100, 2147, 4999, 5000):
        assert [row.values["n"] for row in reader.rows(Position(first, first))] == list(range(first, 5000))


def test_class_labels_of_a_dataset_folder_become_names(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, None]}, features=features)
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "data"))
    reader = open_rows(tmp_path / "data", "--train_file", "train")
    assert [row.values["label"] for row in reader.rows()] == ["yes", "no", None]
    assert reader.label_names == {"label": ["no", "yes"]}
    with pytest.raises(CommandError, match="no split 'test'"):
        open_rows(tmp_path / "data", "--test_file", "test")


def test_a_file_is_never_held_whole(tmp_path: Path) -> None:
    """Reading one row of a large file takes the memory of one row."""
    import tracemalloc

    path = tmp_path / "data.jsonl"
    line = json.dumps({"text": "x" * 1000}) + "\n"
    path.write_text(line * 20_000, encoding="utf-8")
    tracemalloc.start()
    count = sum(1 for _ in open_rows(path, "--input").rows())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 1_000_000
