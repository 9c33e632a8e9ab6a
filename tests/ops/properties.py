"""hypothesis, or, where it is not installed, what skips its tests: a machine with a GPU may have torch alone."""

from __future__ import annotations

from typing import Any

import pytest

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:

    class _Anything:
        """Takes the place of every strategy."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self

    st: Any = _Anything()  # type: ignore[no-redef]

    def given(*args: Any, **kwargs: Any) -> Any:
        return pytest.mark.skip(reason="hypothesis is not installed")

    def settings(*args: Any, **kwargs: Any) -> Any:  # type: ignore[no-redef]
        return lambda test: test


__all__ = ["given", "settings", "st"]
