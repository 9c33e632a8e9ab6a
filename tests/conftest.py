from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of the real checkpoint all-MiniLM-L6-v2: $FASTBERT_TEST_DATA has it, or it is fetched once."""
    given = os.environ.get("FASTBERT_TEST_DATA")
    if given and Path(given, "all-MiniLM-L6-v2").is_dir():
        return Path(given, "all-MiniLM-L6-v2")
    spec = importlib.util.spec_from_file_location("fetch", ROOT / "examples" / "fetch.py")
    assert spec is not None
    assert spec.loader is not None
    fetch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fetch)
    return fetch.minilm(fetch.default_cache())
