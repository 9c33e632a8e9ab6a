"""Errors of the command line: one sentence for the user instead of a traceback."""

from __future__ import annotations

import errno

_NO_SPACE = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
# torch.save and safetensors report a full disk in words of their own, not as an OSError with an errno.
_NO_SPACE_WORDS = (
    "no space left",
    "file too large",
    "disk quota",
    "pytorchstreamwriter",
    "inline_container",
    "iostream",
)


class CommandError(Exception):
    """A failure the user can act on. The text names the argument or file, what is wrong and what is allowed."""


def is_disk_full(error: BaseException) -> bool:
    """Whether ``error``, or what it was raised from, says that the disk (or quota, or file size) is exhausted."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, OSError) and current.errno in _NO_SPACE:
            return True
        if any(words in str(current).lower() for words in _NO_SPACE_WORDS):
            return True
        current = current.__cause__ or current.__context__
    return False


def first_line(error: BaseException) -> str:
    """The first non-empty line of an exception's text, or its type where it has none."""
    for line in str(error).splitlines():
        if line.strip():
            return line.strip()
    return type(error).__name__
