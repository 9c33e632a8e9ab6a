from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# pytest's importlib mode does not put a test's folder on the path; the files here share comparison.py.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTBERT_BACKEND", raising=False)
    torch.manual_seed(0)
