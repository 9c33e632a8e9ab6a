"""Weights are read from safetensors only: a pickled checkpoint (pytorch_model.bin) can run any code when it is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from safetensors import SafetensorError


def load_safetensors(from_pretrained: Callable[..., Any], name: Any, *args: Any, **options: Any) -> Any:
    """``from_pretrained(name, ...)`` of a class of transformers, from safetensors only.

    Raises OSError for weights that are missing, pickled, truncated or corrupt.
    """
    try:
        return from_pretrained(name, *args, use_safetensors=True, **options)
    except SafetensorError as error:
        raise OSError(f"a weight file of {name!s} is truncated or corrupt: {error}") from error
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        kind = getattr(getattr(from_pretrained, "__self__", None), "__name__", "AutoModel")
        raise OSError(
            f"{str(error).splitlines()[0]} (pickled weights, pytorch_model.bin, are not loaded; to convert those that "
            f"you trust: transformers.{kind}.from_pretrained(FOLDER, use_safetensors=False).save_pretrained(FOLDER))"
        ) from error
