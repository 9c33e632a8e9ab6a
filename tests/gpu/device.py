"""What the tests on a device share: models and batches there."""

from __future__ import annotations

from typing import Any

import comparison
import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda")
needed = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BASE: dict[str, Any] = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
BASE |= {"max_position_embeddings": 512, "initializer_range": 0.02, "vocab_size": 30522}
LARGE = BASE | {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "num_hidden_layers": 24}
BASE["num_hidden_layers"] = 12
# Head sizes 32, 64 and 128.
HEADS: dict[int, dict[str, Any]] = {
    size: {"hidden_size": 128, "num_attention_heads": 128 // size, "intermediate_size": 256} for size in (32, 64, 128)
}
DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


def dtype_name(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def build(head: str = "Model", **changes: Any) -> Any:
    """A stock BERT with random weights, made on the device."""
    with DEVICE:
        return comparison.build(head=head, **changes)


def inputs(mask: str = "right", batch: int = 4, seqlen: int = 21) -> dict[str, Tensor]:
    return {name: value.to(DEVICE) for name, value in comparison.inputs(mask, batch, seqlen).items()}


def ragged(batch: int, seqlen: int) -> dict[str, Tensor]:
    """Lengths from 1 to seqlen, half of it on average."""
    lengths = torch.linspace(1, seqlen, batch, device=DEVICE).long().flip(0)
    mask = (torch.arange(seqlen, device=DEVICE) < lengths[:, None]).long()
    ids = torch.randint(2, comparison.VOCABULARY, (batch, seqlen), device=DEVICE)
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def labelled(batch: dict[str, Tensor], share: float = 0.15) -> dict[str, Tensor]:
    """With labels for the masked language model at a share of the tokens."""
    nowhere = (torch.rand(batch["input_ids"].shape, device=DEVICE) > share) | ~comparison.real(batch)
    nowhere[0, 0] = False
    return batch | {"labels": batch["input_ids"].masked_fill(nowhere, -100)}


def gradients(loss: Tensor, model: torch.nn.Module) -> list[Tensor | None]:
    """By backward(), which reentrant checkpointing insists on."""
    model.zero_grad()
    loss.backward()
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return found


def assert_close(ours: list[Tensor | None], theirs: list[Tensor | None]) -> None:
    """Gradients of one model computed in two ways that differ in rounding alone: a last digit of the weights changes
    those of the small models here by some 1e-5 of the largest."""
    largest = max(float(gradient.abs().max()) for gradient in theirs if gradient is not None)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4 * largest, rtol=1e-3)
