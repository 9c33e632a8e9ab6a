"""What is used from inside PyTorch and transformers, and which releases it was tested with."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

from fastbert import internals

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", internals._PLACES)
def test_is_there(name: str) -> None:
    assert getattr(internals, name) is not None


@pytest.mark.parametrize(
    ("place", "package"),
    [(("torch", "_C._gone"), "torch"), (("transformers.utils.gone", "_collector"), "transformers")],
)
def test_one_that_is_missing_is_named_with_the_versions(
    place: tuple[str, str], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = importlib.metadata.version(package)
    monkeypatch.setitem(internals._PLACES, "gone", place)
    with pytest.raises(ImportError, match="is tested with") as caught:
        from fastbert.internals import gone  # noqa: F401
    for words in (".".join(place), f"{package} {version}", f"{package} {internals.TESTED[package]}"):
        assert words in str(caught.value)


def test_nothing_else_is_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = internals.nothing


def test_the_versions_are_those_that_are_written_elsewhere() -> None:
    floor = (ROOT / "requirements" / "floor.txt").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for package, tested in internals.TESTED.items():
        assert f"{package} {tested}" in readme
        oldest, newest = tested.split(" to ")
        assert f"{package}=={oldest}.0\n" in floor
        pinned = re.search(rf"^{package}==([\d.]+)", _constraints(), re.MULTILINE)
        assert pinned is not None
        assert pinned[1].startswith(f"{newest}.")
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    oldest, newest = (version.split(".") for version in internals.TESTED["transformers"].split(" to "))
    assert f"transformers>={'.'.join(oldest)},<{int(newest[0]) + 1}" in wanted


def _constraints() -> str:
    return (ROOT / "requirements" / "constraints.txt").read_text(encoding="utf-8")
