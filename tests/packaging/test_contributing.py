"""CONTRIBUTING.md's list of where things are, held against the tree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = {"__init__", "__pycache__", "_version"}


def listed() -> dict[str, str]:
    """{path: what is said of it} of the list under "Where things are"."""
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Where things are\n")[1].split("\n## ")[0]
    found: dict[str, str] = {}
    top = ""
    for line in section.splitlines():
        entry = re.fullmatch(r" {4}( *)(\S+) +(.+)", line)
        if entry is None:
            assert not line.strip(), line
            continue
        indent, name, text = entry.groups()
        if indent:
            name = top + name
        else:
            top = name
        found[name] = text
    return found


LISTED = listed()


@pytest.mark.parametrize("path", LISTED)
def test_what_is_listed_is_there(path: str) -> None:
    assert list(ROOT.glob(re.sub("<.*?>", "*", path).rstrip("/"))), path


def test_every_module_of_the_package_is_listed() -> None:
    package = ROOT / "fastbert"
    modules = {f"fastbert/{p.name}" for p in package.glob("*.py") if p.stem not in SKIPPED}
    folders = {f"fastbert/{p.name}/" for p in package.iterdir() if (p / "__init__.py").is_file()}
    assert modules | folders - {"fastbert/ops/"} == {p for p in LISTED if p.startswith("fastbert/")} - {
        "fastbert/",
        "fastbert/ops/<op>.py",
    }


def test_every_folder_of_tests_is_listed() -> None:
    folders = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and p.name not in SKIPPED}
    assert folders == {p.removeprefix("tests/").rstrip("/") for p in LISTED if p.startswith("tests/")} - {""}


def test_every_folder_at_the_top_is_listed() -> None:
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    assert folders - {"build", "dist", "output"} <= {p.split("/")[0] for p in LISTED} | {"requirements"}
