"""fastbert: a drop-in BERT that is faster.

import fastbert

fastbert.optimize(model)            # any Hugging Face BERT, in place
print(fastbert.report(model))       # what runs, what fell back, and why
fastbert.restore(model)             # exactly back

from fastbert import BertForMaskedLM    # in place of `from transformers import ...`
fastbert.enable()                   # every BERT that is built from now on
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastbert._version import __version__

if TYPE_CHECKING:
    from fastbert.patch import disable, enable, enabled, optimize, report, restore

_PATCH = ("disable", "enable", "enabled", "optimize", "report", "restore")
_MODELS = (
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertLMHeadModel",
    "BertModel",
)

__all__ = ["__version__", *_MODELS, *_PATCH]


def __getattr__(name: str) -> Any:
    """Import what needs transformers only when it is asked for."""
    home = "fastbert.patch" if name in _PATCH else "fastbert.models" if name in _MODELS else None
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
