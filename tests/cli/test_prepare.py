"""``fastbert prepare`` and ``fastbert tokenizer``: the same bytes however they were made, and no finished work lost."""

from __future__ import annotations

import codecs
import collections
import gzip
import hashlib
import json
import math
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastbert.cli import main
from fastbert.training.documents import Document
from fastbert.training.prepare import cut_into_shards

Texts = list[list[str]]  # paragraphs by document


@pytest.fixture(scope="module")
def texts(kit: Any) -> Texts:
    """400 documents of 1 to 3 paragraphs of 2 to 5 sentences."""
    rng = random.Random(0)
    found = []
    for _ in range(400):
        topic = rng.choice(["animal", "food", "space"])
        paragraphs = [
            " ".join(kit.sentence(rng, topic).capitalize() + "." for _ in range(rng.randint(2, 5)))
            for _ in range(rng.randint(1, 3))
        ]
        found.append(paragraphs)
    return found


def as_text(texts: Texts) -> str:
    return "\n\n".join("\n".join(document) for document in texts) + "\n"


@pytest.fixture(scope="module")
def corpus(texts: Texts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(as_text(texts), encoding="utf-8")
    return path


def flags(source: Path | list[Path], model: Path, output: Path, **more: Any) -> list[str]:
    sources = source if isinstance(source, list) else [source]
    given = {"tokenizer_name": model, "output": output, "max_seq_length": 64, "workers": 1, "shard_megabytes": 0.01}
    given |= more
    named = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    return ["prepare", "--input", *map(str, sources), *named, "--quiet"]


def content(folder: Path) -> dict[str, str]:
    """A checksum of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module", autouse=True)
def pictures(kit: Any) -> Iterator[None]:
    """Every byte is compared, with those of other processes too."""
    with kit.pictures():
        yield


@pytest.fixture(scope="module")
def prepared(corpus: Path, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "out"
    assert main(flags(corpus, base_model, folder)) == 0
    return folder


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_a_dataset_that_datasets_opens(prepared: Path, base_model: Path) -> None:
    import datasets
    from transformers import AutoTokenizer

    data = datasets.load_from_disk(str(prepared))
    assert data.column_names == ["input_ids", "token_type_ids", "special_tokens_mask", "next_sentence_label"]
    assert data.cache_files, "the rows are memory-mapped"
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    found = report(prepared)
    assert len(data) == found["counts"]["sequences"]
    assert found["counts"]["documents"] == 400
    lengths = [0] * 65
    tokens: list[int] = []
    for row in data:
        ids, types, special = row["input_ids"], row["token_type_ids"], row["special_tokens_mask"]
        lengths[len(ids)] += 1
        tokens += [token for token, mark in zip(ids, special, strict=True) if not mark]
        separators = [place for place, token in enumerate(ids) if token == tokenizer.sep_token_id]
        assert ids[0] == tokenizer.cls_token_id
        assert len(separators) == 2
        assert separators[1] == len(ids) - 1
        assert types == [0] * (separators[0] + 1) + [1] * (separators[1] - separators[0])
        assert [place for place, mark in enumerate(special) if mark] == [0, *separators]
    assert lengths == found["lengths"]
    shares = [count / len(tokens) for count in collections.Counter(tokens).values()]
    assert found["unigram_entropy"] == pytest.approx(-sum(share * math.log(share) for share in shares))
    assert sum(lengths[-4:]) > 0.4 * len(data), "sequences are filled"


def test_the_report_has_the_figures_of_the_paper(prepared: Path) -> None:
    found = report(prepared)
    count = found["counts"]["sequences"]
    assert count > 500
    assert abs(found["shares"]["next"] - 0.5) < 4 * (0.25 / count) ** 0.5
    assert abs(found["shares"]["short"] - 0.1) < 4 * (0.09 / count) ** 0.5
    assert found["shares"]["next"] + found["shares"]["random"] == 1
    assert found["shares"]["forced_random"] == 0
    assert (prepared / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_the_number_of_workers_does_not_matter(prepared: Path, corpus: Path, base_model: Path, tmp_path: Path) -> None:
    assert report(prepared)["counts"]["shards"] >= 5
    assert main(flags(corpus, base_model, tmp_path / "two", workers=2)) == 0
    assert content(tmp_path / "two") == content(prepared)
    assert main(flags(corpus, base_model, tmp_path / "seed", seed=1)) == 0
    assert content(tmp_path / "seed")["data-00000.arrow"] != content(prepared)["data-00000.arrow"]


def rows(folder: Path) -> list[dict[str, Any]]:
    import datasets

    return datasets.load_from_disk(str(folder)).to_list()


@pytest.mark.parametrize("kind", ["gz", "zst", "jsonl", "jsonl.gz", "parquet", "dataset", "folder"])
def test_every_kind_of_input(
    kit: Any, texts: Texts, corpus: Path, prepared: Path, base_model: Path, tmp_path: Path, kind: str
) -> None:
    import pyarrow as pa

    plain = corpus.read_bytes()
    records = [{"text": "\n".join(document), "other": 1} for document in texts]
    source = tmp_path / f"in.{kind}"
    if kind == "gz":
        half = plain.index(b"\n", len(plain) // 2) + 1
        source.write_bytes(gzip.compress(plain[:half]) + gzip.compress(plain[half:]))
    elif kind == "zst":
        source.write_bytes(pa.Codec("zstd").compress(codecs.BOM_UTF8 + plain, asbytes=True))
    elif kind == "jsonl.gz":
        source.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode()))
    elif kind == "folder":
        (source / "b").mkdir(parents=True)
        (source / "a.txt").write_text(as_text(texts[:100]), encoding="utf-8-sig")
        (source / "b" / "c").write_text(as_text(texts[100:]), encoding="utf-8")
    else:
        kit.write_rows(source if kind != "dataset" else tmp_path / "in", records)
        source = source if kind != "dataset" else tmp_path / "in"
    assert main(flags(source, base_model, tmp_path / "out")) == 0
    assert rows(tmp_path / "out") == rows(prepared)


def test_lines_as_sentences_full_sentences_and_duplicates(
    corpus: Path, prepared: Path, base_model: Path, tmp_path: Path
) -> None:
    more: dict[str, Any] = {"format": "full_sentences"}
    assert main(flags(corpus, base_model, tmp_path / "full", **more)) == 0
    found = report(tmp_path / "full")
    assert found["shares"] == {}
    data = rows(tmp_path / "full")
    assert set(data[0]) == {"input_ids", "special_tokens_mask"}
    kept = sum(row["special_tokens_mask"].count(0) for row in data)
    assert kept == found["counts"]["tokens"], "no token is lost"
    assert main(flags(corpus, base_model, tmp_path / "lines", sentences="lines", max_seq_length=128)) == 0
    text = corpus.read_text(encoding="utf-8")
    assert report(tmp_path / "lines")["counts"]["sentences"] == sum(1 for line in text.splitlines() if line)
    assert main(flags(corpus, base_model, tmp_path / "twice", duplicates=2)) == 0
    once, twice = rows(prepared), rows(tmp_path / "twice")
    assert 1.9 * len(once) < len(twice) < 2.1 * len(once)
    assert sum(row in once for row in twice[:100]) < 90, "the second time through, pairs are others"


def test_special_tokens_in_a_text_are_text(base_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("The dog [MASK] barks. [SEP] [CLS] runs.\n\nA cat [SEP] sleeps. It hunts.\n", encoding="utf-8")
    assert main(flags(source, base_model, tmp_path / "out")) == 0
    for row in rows(tmp_path / "out"):
        assert sum(row["special_tokens_mask"]) == 3


def test_killed_and_gone_on_with(kit: Any, corpus: Path, prepared: Path, base_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = [out / "progress" / name for name in ("00000.json", "00001.json")]
    process = kit.start(flags(corpus, base_model, out, workers=2))
    kit.signal_when(process, lambda: all(path.exists() for path in first), signal.SIGKILL)
    assert not (out / "state.json").exists()
    before = (out / "data-00000.arrow").stat().st_mtime_ns
    (out / "data-00001.arrow").write_bytes(b"half")
    (out / "data-00007.arrow.part").write_bytes(b"half")
    assert main(flags(corpus, base_model, out)) == 0
    assert (out / "data-00000.arrow").stat().st_mtime_ns == before, "a finished shard is not made again"
    assert content(out) == content(prepared)


def test_other_settings_or_text(
    corpus: Path, texts: Texts, prepared: Path, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    assert main(flags(corpus, base_model, out)) == 0
    assert "complete already" in capsys.readouterr().err
    assert main(flags(corpus, base_model, out, seed=7)) == 1
    error = capsys.readouterr().err
    assert "made with another seed (42, now 7)" in error
    assert "--overwrite" in error
    assert content(out) == content(prepared)
    assert main([*flags(corpus, base_model, out, seed=7), "--overwrite"]) == 0
    assert report(out)["settings"]["seed"] == 7

    # The same name and size, another text: seen where a finished shard would be taken for one of it.
    unfinished = tmp_path / "unfinished"
    changed = tmp_path / "corpus.txt"
    changed.write_text(as_text(texts).replace("dog", "cat"), encoding="utf-8")
    shutil.copytree(prepared, unfinished)
    (unfinished / "state.json").unlink()
    (unfinished / "progress").mkdir()
    counts = {"digest": "0", "bytes": (unfinished / "data-00000.arrow").stat().st_size, "counts": {}}
    (unfinished / "progress" / "00000.json").write_text(json.dumps(counts))
    assert main(flags(changed, base_model, unfinished)) == 1
    assert "the text of data-00000.arrow has changed" in capsys.readouterr().err


def test_full_disk(
    corpus: Path,
    prepared: Path,
    base_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file_size_limit: Callable[[int], None],
) -> None:
    out = tmp_path / "out"
    sizes = sorted(path.stat().st_size for path in prepared.glob("data-*.arrow"))
    assert sizes[0] < sizes[-1]
    first = (prepared / "data-00000.arrow").stat().st_size
    assert first < sizes[-1]
    file_size_limit(sizes[-1] - 1)
    status = main(flags(corpus, base_model, out))
    file_size_limit(-1)
    assert status == 1
    error = capsys.readouterr().err
    assert "no space left" in error
    assert "finished shards are kept" in error
    assert (out / "progress" / "00000.json").exists()
    assert not list(out.glob("*.part"))
    assert main(flags(corpus, base_model, out)) == 0
    assert content(out) == content(prepared)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("no.txt", None, "no such file"),
        ("empty.txt", b" \n\n", "the file is empty"),
        ("a.jsonl", b'{"text": "A dog. A cat."}\n{"text": "A d\n', "line 2: broken JSON"),
        ("a.jsonl", b'{"text": "A dog."}\n{"words": "x"}\n', "line 2: no field 'text'"),
        ("a.txt", b"A dog.\n\nA c\xe9t.\n", "line 3: invalid UTF-8 at byte 4"),
        ("a.txt", b"A dog.\n\nA \0cat.\n", "line 3: a zero byte"),
        ("a.txt.gz", gzip.compress(b"A dog.\n\nA cat.\n" * 99, mtime=0)[:-20], "cannot be read"),
        ("a.txt.zst", b"\x28\xb5\x2f\xfd" + bytes(range(200)), "cannot be read"),
        ("a.parquet", b"PAR1 no", "not a readable Parquet file"),
        ("a.jsonl", bytes(range(256)), "not UTF-8 text"),
        ("a.csv.gz", gzip.compress(b"text\nA dog.\n", mtime=0), "only text and JSONL may be compressed"),
        ("one.txt", b"A dog. It barks.\nAnd runs.\n", "holds one document"),
    ],
)
def test_bad_input(
    base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, data: bytes | None, message: str
) -> None:
    source = tmp_path / name
    if data is not None:
        source.write_bytes(data)
    assert main(flags(source, base_model, tmp_path / "out")) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "--input" in error
    assert "Traceback" not in error


def test_bad_lines_can_be_left_out(base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "A dog. It runs."}\n{"text"\n{"text": "A cat. It sleeps."}\n', encoding="utf-8")
    assert main(flags(source, base_model, tmp_path / "out", on_bad_row="skip")) == 0
    assert f"{source}:2: broken JSON" in capsys.readouterr().err
    assert report(tmp_path / "out")["counts"]["documents"] == 2


def test_bad_flags_and_tokenizers(
    corpus: Path, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, message in (
        ({"max_seq_length": 4}, "--max_seq_length must be at least 5, got 4"),
        ({"workers": 0}, "--workers must be at least 1, got 0"),
        ({"colour": "red"}, "--colour"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(flags(corpus, base_model, tmp_path / "out", **more))
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
    assert main(flags(corpus, tmp_path, tmp_path / "out")) == 1
    assert f"--tokenizer_name {tmp_path}: cannot load a tokenizer" in capsys.readouterr().err
    assert main(flags(corpus, corpus, tmp_path / "out")) == 1
    assert f"--tokenizer_name {corpus}: a file; the folder that holds the tokenizer" in capsys.readouterr().err
    assert main(flags(corpus, tmp_path / "nope", tmp_path / "out")) == 1
    assert f"--tokenizer_name {tmp_path / 'nope'}: no such folder\n" in capsys.readouterr().err
    from transformers import PreTrainedTokenizerFast

    without = PreTrainedTokenizerFast(tokenizer_file=str(base_model / "tokenizer.json"), pad_token="[PAD]")
    without.save_pretrained(tmp_path / "without")
    assert main(flags(corpus, tmp_path / "without", tmp_path / "out")) == 1
    assert "the tokenizer has no cls_token" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("x")
    assert main([*flags(corpus, base_model, tmp_path / "mine"), "--overwrite"]) == 1
    assert "not made by fastbert prepare" in capsys.readouterr().err


def test_shards_have_company() -> None:
    """No shard is left with a single document, of which no random segment could be drawn."""
    texts = [Document(["x" * 10]) for _ in range(100)]
    for count in range(1, 100):
        shards = list(cut_into_shards(iter(texts[:count]), 160))
        assert sum(map(len, shards)) == count
        assert min(map(len, shards)) >= min(count, 2)


def test_tokenizer(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer, BertTokenizerFast

    arguments = ["tokenizer", "--input", str(corpus), "--vocab_size", "200", "--lowercase", "--quiet", "--output"]
    assert main([*arguments, str(tmp_path / "one")]) == 0
    assert main([*arguments, str(tmp_path / "one")]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "two")]) == 0
    # The hash tables of the trainer are in another order each time, the vocabulary is not.
    assert content(tmp_path / "one") == content(tmp_path / "two")
    for kind in (AutoTokenizer, BertTokenizerFast):
        tokenizer = kind.from_pretrained(tmp_path / "one")
        encoded = tokenizer("The DOG barks.", "A whale.")
        tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
        assert tokens[0] == "[CLS]"
        assert tokens[1:3] == ["the", "dog"]
        assert encoded["token_type_ids"].count(1) == len(tokenizer.tokenize("a whale.")) + 1
        assert tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) == "the dog barks. a whale."
        assert tokenizer.mask_token_id == 4
        assert tokenizer.model_max_length == 512
        assert not [token for token in tokenizer.all_special_tokens if token.startswith("##")]
    assert len((tmp_path / "one" / "vocab.txt").read_text(encoding="utf-8").splitlines()) == len(tokenizer) <= 200
    assert main(flags(corpus, tmp_path / "one", tmp_path / "data")) == 0


def test_where_a_tokenizer_is_written(
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    file_size_limit: Callable[[int], None],
) -> None:
    arguments = ["tokenizer", "--input", str(corpus), "--vocab_size", "100", "--quiet", "--output"]
    (tmp_path / "keep.part").mkdir()
    mine = tmp_path / "keep.part" / "mine"
    mine.touch()
    assert main([*arguments, str(tmp_path / "keep")]) == 0
    assert mine.exists()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main([*arguments, "."]) == 0
    assert content(tmp_path / "here") == content(tmp_path / "keep")

    file_size_limit(100)
    status = main([*arguments, str(tmp_path / "full")])
    file_size_limit(-1)
    assert status == 1
    assert f"--output {tmp_path / 'full'}: no space left" in capsys.readouterr().err
    assert not any((tmp_path / "full").iterdir())

    def learn(args: Any) -> list[str]:
        raise AssertionError("the output is looked at first")

    monkeypatch.setattr("fastbert.training.vocabulary.learn", learn)
    for output in (f"{mine}/x", "/proc/nope/x", "x" * 300):
        capsys.readouterr()
        assert main([*arguments, output]) == 1
        assert f"--output {output}: no folder can be written there: " in capsys.readouterr().err
