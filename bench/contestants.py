"""Who takes part: the names, what each needs, and the class that runs it (imported in the contestant's own process)."""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .workloads import Workload

TRUTH = "truth"
"""Not a contestant: Hugging Face's eager model (or an op's plain formula) in float64, which outputs are held to."""


class Contestant(Protocol):
    """One way to do a workload's work. Built once in its own process, then checked, then timed in turns."""

    def __init__(self, name: str, workload: Workload) -> None: ...

    def run(self) -> Any:
        """The timed call: one forward, or one training step."""

    def outputs(self) -> dict[str, torch.Tensor]:
        """What is compared with the truth: hidden states at real tokens, or loss and gradients (dropout off)."""

    def details(self) -> dict[str, Any]:
        """What goes into the record: versions, backends, notes."""


@dataclass(frozen=True)
class Entry:
    """A contestant's class as ``module:class`` (with a leading dot: of this package), and the modules that it needs."""

    target: str
    needs: tuple[str, ...] = ()
    optional: bool = False

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        absent = [name for name in self.needs if not _installed(name)]
        return f"not installed: {', '.join(absent)}" if absent else None

    def load(self) -> type[Contestant]:
        module, name = self.target.split(":")
        return getattr(importlib.import_module(module, __package__), name)


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


INFERENCE: Mapping[str, Entry] = {
    "hf-eager": Entry(".models:HuggingFace"),
    "hf-sdpa": Entry(".models:HuggingFace"),
    "hf-compile": Entry(".models:Compiled", optional=True),
    "onnxruntime": Entry(".peers:OnnxRuntime", ("onnxruntime", "onnx")),
    "openvino": Entry(".peers:OpenVino", ("openvino",)),
    "ctranslate2": Entry(".peers:CTranslate2", ("ctranslate2",)),
    "fastbert": Entry(".models:FastBert", ("fastbert",)),
}
TRAINING: Mapping[str, Entry] = {
    "hf-eager": Entry(".training:HuggingFace"),
    "hf-sdpa": Entry(".training:HuggingFace"),
    "hf-compile": Entry(".training:Compiled", optional=True),
    "fastbert": Entry(".training:FastBert", ("fastbert",)),
}
OPS: Mapping[str, Entry] = {
    "pytorch": Entry(".ops:Torch"),
    "fastbert": Entry(".ops:FastBert", ("fastbert",)),
}
BY_KIND: Mapping[str, Mapping[str, Entry]] = {"inference": INFERENCE, "training": TRAINING, "op": OPS}


def entry(kind: str, name: str) -> Entry:
    """The entry of contestant ``name`` for workloads of ``kind``; the truth is the stock one in float64.

    A name like ``package.module:Class`` is that class: anyone's own contestant.
    """
    if ":" in name:
        return Entry(name)
    if name == TRUTH:
        name = {"inference": "hf-eager", "training": "hf-eager", "op": "pytorch"}[kind]
    return BY_KIND[kind][name]


def choose(kinds: Sequence[str], names: str | None) -> dict[str, list[str]]:
    """The contestants of each kind out of a comma-separated list; "all" is every one, None all but the optional ones.

    Raises ValueError for a name that none of the kinds has.
    """
    if names is None:
        return {kind: [name for name, item in BY_KIND[kind].items() if not item.optional] for kind in kinds}
    if names == "all":
        return {kind: list(BY_KIND[kind]) for kind in kinds}
    chosen = dict.fromkeys(name.strip() for name in names.split(",") if name.strip())
    known = dict.fromkeys(name for kind in kinds for name in BY_KIND[kind])
    unknown = [name for name in chosen if name not in known and ":" not in name]
    if unknown or not chosen:
        raise ValueError(
            f"--contestants has {', '.join(unknown) or 'no name'}; it may have: {', '.join(known)}, or all"
        )
    return {kind: [name for name in chosen if name in BY_KIND[kind] or ":" in name] for kind in kinds}
