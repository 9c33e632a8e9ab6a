"""What is measured: the rows of the CPU table, each as a model, a batch and the useful work in it.

A workload is written to a folder (``workload.json``, ``inputs.safetensors``) so that every contestant's process reads
exactly the same batch.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fastbert import flops

from . import data

INFERENCE_ROWS = ("ragged", "latency", "base")
TRAINING_ROWS = ("training",)
SEED = 0


@dataclass
class Workload:
    """One row: ``kind`` is "inference", "training" or "op"; ``work`` is FLOPs (or bytes, if ``unit`` is "GB/s").

    ``model`` names the weights: ``{"path": folder}`` or ``{"config": {...}}`` for random weights from ``SEED``.
    ``inputs`` holds ``input_ids`` [B, S], ``attention_mask`` [B, S] if anything is padded, ``labels`` [B] if it trains.
    """

    name: str
    title: str
    kind: str
    work: float
    model: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    unit: str = "GFLOP/s"
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        record = {k: v for k, v in asdict(self).items() if k != "inputs"}
        (folder / "workload.json").write_text(json.dumps(record))
        save_file({k: v.contiguous() for k, v in self.inputs.items()}, folder / "inputs.safetensors")

    @classmethod
    def load(cls, folder: Path) -> "Workload":
        record = json.loads((folder / "workload.json").read_text())
        return cls(**record, inputs=load_file(folder / "inputs.safetensors"))


def model_workload(
    name: str,
    title: str,
    model: dict[str, Any],
    config: dict[str, Any],
    inputs: dict[str, torch.Tensor],
    training: bool = False,
    facts: dict[str, Any] | None = None,
) -> Workload:
    """A workload of one model and one batch; its useful FLOPs follow from ``config`` and the real lengths."""
    rows, width = inputs["input_ids"].shape
    mask = inputs.get("attention_mask")
    lengths = [width] * rows if mask is None else mask.sum(1).tolist()
    work = flops.encoder_flops(
        lengths, config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"], training
    )
    shape = {"batch": rows, "width": width, "tokens": sum(lengths), "fill": sum(lengths) / (rows * width)}
    kind = "training" if training else "inference"
    return Workload(name, title, kind, work, model, {**shape, **(facts or {})}, inputs=inputs)


def build(row: str, cache: Path) -> Workload:
    """The workload of one row of the CPU table, its real weights and texts below ``cache``."""
    if row == "base":
        return _bert_base()
    folder = data.minilm(cache)
    config = json.loads((folder / "config.json").read_text())
    model = {"path": str(folder)}
    source = f"{data.REUTERS_PIN}, R8 official test split, in its order; weights {data.MINILM_PIN}"
    if row == "ragged":
        inputs, _ = _news(folder, cache, 32)
        title = "MiniLM-L6, 32 real news texts <= 256 tokens"
        return model_workload(row, title, model, config, inputs, facts={"source": source})
    if row == "latency":
        inputs, _ = _news(folder, cache, 1)
        inputs = {"input_ids": inputs["input_ids"][:, :32]}
        return model_workload(
            row, "MiniLM-L6, 1 x 32 tokens (latency)", model, config, inputs, facts={"source": source}
        )
    if row == "training":
        inputs, labels = _news(folder, cache, 16)
        kinds = sorted({label for label, _ in data.reuters(cache)})
        inputs["labels"] = torch.tensor([kinds.index(label) for label in labels])
        title = "MiniLM-L6 training step, 16 real texts <= 256 tokens, dropout 0.1"
        facts = {
            "source": source,
            "num_labels": len(kinds),
            "dropout": 0.1,
            "optimizer": "torch.optim.AdamW(fused=True)",
        }
        return model_workload(row, title, model, config, inputs, training=True, facts=facts)
    raise ValueError(f"row is {row!r}; it must be one of {', '.join(INFERENCE_ROWS + TRAINING_ROWS)}")


def _news(folder: Path, cache: Path, count: int) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The first ``count`` texts of R8's test split, at most 256 tokens, padded to the longest; and their labels."""
    from transformers import AutoTokenizer

    texts = data.reuters(cache)[:count]
    batch = AutoTokenizer.from_pretrained(folder)(
        [text for _, text in texts], truncation=True, max_length=256, padding=True, return_tensors="pt"
    )
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    return inputs, [label for label, _ in texts]


def _bert_base() -> Workload:
    config = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    generator = torch.Generator().manual_seed(SEED)
    inputs = {"input_ids": torch.randint(1000, 30522, (8, 128), generator=generator)}
    facts = {"source": "random weights (speed does not depend on them) and random token ids"}
    return model_workload("base", "BERT-base, 8 x 128 tokens, full", {"config": config}, config, inputs, facts=facts)
