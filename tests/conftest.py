from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton looks when it is imported
else:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats bit for bit only so


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what is chosen without Triton's interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("fastbert.dispatch._selected", {})


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
