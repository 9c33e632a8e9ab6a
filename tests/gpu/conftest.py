from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# pytest's importlib mode does not put a test's folder on the path; comparison.py is that of the model tests.
sys.path.insert(0, str(Path(__file__).parent.parent / "model"))
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def repeatable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FASTBERT_BACKEND", raising=False)
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    torch.cuda.empty_cache()


@pytest.fixture
def given_minilm() -> Path:
    """Folder of all-MiniLM-L6-v2 in $FASTBERT_TEST_DATA; nothing is fetched."""
    given = os.environ.get("FASTBERT_TEST_DATA")
    if not given or not Path(given, "all-MiniLM-L6-v2").is_dir():
        pytest.skip("FASTBERT_TEST_DATA names no folder with all-MiniLM-L6-v2")
    return Path(given, "all-MiniLM-L6-v2")
