"""Load a tokenizer and a model with a head, with the errors a user can act on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging

from fastbert.weights import load_safetensors

from .errors import CommandError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

LOAD_ERRORS = (OSError, ValueError, RuntimeError, LookupError, TypeError)  # what transformers raises for a bad folder
# These families number positions from padding_idx + 1, so that many of their position embeddings are never used.
_OFFSET_POSITIONS = {"roberta", "xlm-roberta", "camembert", "data2vec-text", "xlm-roberta-xl", "mpnet", "longformer"}


def quiet_transformers() -> None:
    """No bars for loading and saving, no table of new weights: the commands say in one line what matters."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _check_place(name: str, argument: str, what: str) -> None:
    if os.path.isdir(name):
        return
    if os.path.exists(name):
        raise CommandError(f"{argument} {name}: a file; the folder that holds the {what} is wanted")
    if os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1:
        raise CommandError(f"{argument} {name}: no such folder")


def _not_loaded(name: str, argument: str, what: str, error: Exception) -> CommandError:
    where = "" if os.path.isdir(name) else "no such folder here; from the hub: "
    return CommandError(f"{argument} {name}: {where}cannot load {what}: {first_line(error)}")


def load_config(name: str, **hub: Any) -> PreTrainedConfig:
    """The model's configuration. Raises CommandError."""
    argument = "--model_name_or_path"
    _check_place(name, argument, "model")
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise CommandError(f"{argument} {name}: no Hugging Face model: the folder has no config.json")
    try:
        return AutoConfig.from_pretrained(name, **hub)
    except LOAD_ERRORS as error:
        raise _not_loaded(name, argument, "config.json", error) from error


def load_tokenizer(name: str, argument: str = "--model_name_or_path", **options: Any) -> PreTrainedTokenizerBase:
    """The model's fast tokenizer. Raises CommandError."""
    _check_place(name, argument, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True, **options)
    except LOAD_ERRORS as error:
        raise _not_loaded(name, argument, "a tokenizer", error) from error
    if not tokenizer.is_fast:
        raise CommandError(f"{argument} {name}: has no fast tokenizer (tokenizer.json)")
    # Where a tokenizer's files are missing, transformers makes one of special tokens, to which every word is unknown.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise CommandError(
            f"{argument} {name}: has no tokenizer, or one that knows no word; put the files of the one that belongs to "
            "the model there (tokenizer.json, tokenizer_config.json)"
        )
    if tokenizer.pad_token is None:
        raise CommandError(f"{argument} {name}: the tokenizer has no padding token")
    return tokenizer


def load_model(
    head: str,
    name: str,
    config: PreTrainedConfig,
    *,
    trained: str | None = None,
    ignore_mismatched_sizes: bool = False,
    **hub: Any,
) -> tuple[PreTrainedModel, list[str]]:
    """A model in float32, and which of its weights are not in the checkpoint; ``head`` is an Auto class's name.

    ``trained`` (what such a model is called) insists that every weight is there; otherwise the pooler and the head may
    be new (they are drawn from torch's generator). Raises CommandError for weights that are pickled or corrupt, of
    another shape, NaN or infinite.
    """
    try:
        model, loaded = load_safetensors(
            getattr(transformers, head).from_pretrained,
            name,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            **hub,
        )
    except LOAD_ERRORS as error:
        hint = ""
        if "mismatch" in str(error):
            hint = " (its head has another number of labels? --ignore_mismatched_sizes starts with a new head)"
        raise CommandError(f"--model_name_or_path {name}: cannot load weights: {first_line(error)}{hint}") from error
    # Those of another shape are drawn anew as well.
    missing = sorted({*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])})
    if missing and trained:
        raise CommandError(
            f"--model_name_or_path {name}: not a trained {trained}: the checkpoint lacks {', '.join(missing[:4])}"
            f"{' …' if len(missing) > 4 else ''}; fine-tune it first"
        )
    encoder = f"{model.base_model_prefix}." if model.base_model is not model else ""
    if lost := [key for key in missing if key.startswith(encoder) and "pooler" not in key.split(".")]:
        raise CommandError(
            f"--model_name_or_path {name}: the checkpoint lacks encoder weights: {', '.join(lost[:4])}"
            f"{' …' if len(lost) > 4 else ''}"
        )
    for key, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise CommandError(f"--model_name_or_path {name}: the weights hold NaN or infinite numbers, first in {key}")
    return model, missing


def check_family(config: PreTrainedConfig, name: str, argument: str = "--model_name_or_path") -> None:
    """Raise CommandError if ``optimize`` knows no model of this configuration, which ``argument`` named."""
    from fastbert.families import FAMILIES

    if config.model_type.replace("-", "_") not in FAMILIES:
        raise CommandError(
            f"{argument} {name}: a model of the family {config.model_type!r}, which fastbert has no layers for (it has "
            f"for {', '.join(FAMILIES)}); --optimize false runs it as it is"
        )


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str, argument: str = "--model_name_or_path"
) -> None:
    """Raise CommandError if the tokenizer, which ``argument`` named, gives ids that the model has no embedding for."""
    rows = len(cast(torch.Tensor, model.get_input_embeddings().weight))
    if len(tokenizer) > rows:
        raise CommandError(
            f"{argument} {name}: the tokenizer has {len(tokenizer)} tokens but the model embeds only {rows}; "
            "they do not belong together"
        )


def sequence_limit(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, asked: int | None) -> int:
    """The number of tokens a text is cut to. Raises CommandError if ``asked`` is more than the model has positions."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type in _OFFSET_POSITIONS:
        positions -= (config.pad_token_id or 0) + 1
    if asked is not None:
        if positions is not None and asked > positions:
            raise CommandError(f"--max_seq_length {asked}: the model has {positions} positions")
        return asked
    return min(limit for limit in (positions, tokenizer.model_max_length, 8192) if limit is not None)
