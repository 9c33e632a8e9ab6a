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
    from fastbert.packing import token_bound
    from fastbert.patch import disable, enable, enabled, optimize, restore
    from fastbert.reporting import report

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

_HOMES = dict.fromkeys(("disable", "enable", "enabled", "optimize", "restore"), "fastbert.patch")
_HOMES |= {"report": "fastbert.reporting", "token_bound": "fastbert.packing"} | dict.fromkeys(
    _MODELS, "fastbert.models"
)

__all__ = ["__version__", *_MODELS, "disable", "enable", "enabled", "optimize", "report", "restore", "token_bound"]


def __getattr__(name: str) -> Any:
    """Import what needs transformers only when it is asked for."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
