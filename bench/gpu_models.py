"""Model contestants on a GPU: Hugging Face with each attention, torch.compile, unpadded stacks, and fastbert."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from . import models, training
from .workloads import Workload

BACKENDS = {
    "math": "MATH",
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
}
"""The last word of a contestant's name -> PyTorch's name of the backend of scaled_dot_product_attention."""


class HuggingFace(models.HuggingFace):
    """Eager attention, and the truth: with an attention that has the memory for it, and of 16-bit rows in float32, as
    float64 would take minutes."""

    @property
    def exact(self) -> tuple[torch.dtype, str]:
        return (torch.float64 if self.workload.facts["dtype"] == "float32" else torch.float32), "sdpa"


class Sdpa(models.HuggingFace):
    """scaled_dot_product_attention with the one backend that the name ends with."""

    def __init__(self, name: str, workload: Workload) -> None:
        super().__init__(name, workload)
        backend = getattr(torch.nn.attention.SDPBackend, BACKENDS[name.split("-")[-1]])

        def within(function: Callable[[], Any]) -> Callable[[], Any]:
            def run() -> Any:
                with torch.nn.attention.sdpa_kernel(backend):
                    return function()

            return run

        # of the object, so that they hold for a training step as well
        self.run, self.outputs = within(self.run), within(self.outputs)


class Compiled(models.Compiled):
    """torch.compile at its most thorough, which includes CUDA graphs."""

    mode = "max-autotune"


class FastBert(models.FastBert):
    """fastbert as it chooses for itself."""


class FastBertCuda(models.FastBert):
    """fastbert with its CUDA C++ kernels wherever it has them."""

    def optimize(self) -> torch.nn.Module:
        from fastbert import dispatch

        built = [op for op in dispatch.OPS if dispatch.leaf(f"{op}_fwd_cuda") is not None]
        if not built:
            raise NotImplementedError("no CUDA C++ kernels are built")
        os.environ["FASTBERT_BACKEND"] = ",".join(f"{op}:cuda" for op in built)
        return super().optimize()


class FastBertGraphs(models.FastBert):
    """fastbert with CUDA graphs."""

    def optimize(self) -> torch.nn.Module:
        import fastbert

        return fastbert.optimize(self.model, cuda_graphs=True)


class Unpadded(models.HuggingFace):
    """What one would write around a variable-length attention: padding is dropped once, all else is plain PyTorch on
    the stock weights. Masked-language-model logits are computed where there is a label."""

    def __init__(self, name: str, workload: Workload) -> None:
        super().__init__("hf-sdpa", workload)
        self.attention = self.load()
        self.call = self.forward

    def load(self) -> Callable[..., torch.Tensor]:
        """attention(q, k, v [T, h, d], cu_seqlens, max_seqlen, dropout_p) -> [T, h, d]."""
        raise NotImplementedError

    @torch.inference_mode()
    def run(self) -> Any:
        return self.encode()[0]

    def outputs(self) -> dict[str, torch.Tensor]:
        return {"last_hidden_state": self.run()}

    def encode(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden states of the real tokens [T, H], and the places [T] that they have in the padded batch."""
        stack = self.model.base_model
        config = stack.config
        ids = self.inputs["input_ids"]
        mask = self.inputs.get("attention_mask")
        hidden = stack.embeddings(ids).flatten(0, 1)
        if mask is None:
            places = torch.arange(ids.numel(), device=ids.device)
            lengths = torch.full((len(ids),), ids.shape[1], device=ids.device)
        else:
            places = mask.flatten().nonzero().flatten()
            lengths = mask.sum(1)
        starts = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        longest = int(lengths.max())
        hidden = hidden[places]
        shape = (-1, config.num_attention_heads, config.hidden_size // config.num_attention_heads)
        dropout = config.attention_probs_dropout_prob if stack.training else 0.0
        for layer in stack.encoder.layer:
            own = layer.attention.self
            q, k, v = (part(hidden).view(shape) for part in (own.query, own.key, own.value))
            mixed = self.attention(q, k, v, starts, longest, dropout).flatten(1)
            attended = layer.attention.output(mixed, hidden)
            hidden = layer.output(layer.intermediate(attended), attended)
        return hidden, places

    def forward(self, labels: torch.Tensor, **inputs: torch.Tensor) -> Any:
        """A training forward: its loss."""
        hidden, places = self.encode()
        wanted = labels.flatten()[places]
        labelled = wanted != -100
        logits = self.model.cls(hidden[labelled])
        return F.cross_entropy(logits.float(), wanted[labelled])


def flash2(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int, dropout: float
) -> torch.Tensor:
    """FlashAttention-2 as PyTorch ships it, for packed sequences: the op under varlen_attn, which takes a dropout."""
    found = torch.ops.aten._flash_attention_forward(
        q, k, v, starts, starts, longest, longest, dropout, is_causal=False, return_debug_mask=False
    )
    return found[0]


class Flash2(Unpadded):
    """PyTorch's FlashAttention-2, dropout included."""

    def load(self) -> Callable[..., torch.Tensor]:
        return flash2


class Varlen(Unpadded):
    """torch.nn.attention.varlen_attn, which has no dropout."""

    def load(self) -> Callable[..., torch.Tensor]:
        from torch.nn.attention.varlen import varlen_attn

        return lambda q, k, v, starts, longest, dropout: varlen_attn(q, k, v, starts, starts, longest, longest)

    def details(self) -> dict[str, Any]:
        return {"note": "no attention dropout" if self.workload.kind == "training" else ""}


class FlashAttention(Unpadded):
    """The package flash-attn."""

    def load(self) -> Callable[..., torch.Tensor]:
        from flash_attn import flash_attn_varlen_func

        return lambda q, k, v, starts, longest, dropout: flash_attn_varlen_func(
            q, k, v, starts, starts, longest, longest, dropout_p=dropout
        )


class Training(training.Training):
    """A step of masked language modelling."""

    cls_name = "BertForMaskedLM"


class TrainingHuggingFace(Training, HuggingFace):
    """Eager attention, and the truth."""


class TrainingSdpa(Training, Sdpa):
    """One backend of scaled_dot_product_attention, forward and backward."""


class TrainingCompiled(Training, Compiled):
    """Forward and backward compiled; the optimizer stays as it is."""


class TrainingFastBert(Training, FastBert):
    """fastbert as it chooses for itself."""


class TrainingFastBertCuda(Training, FastBertCuda):
    """fastbert with its CUDA C++ kernels."""


class TrainingUnpadded(Training):
    """The loss of an unpadded stack."""

    encode: Any
    forward: Any

    def loss(self, call: Any) -> torch.Tensor:
        return self.forward(**self.inputs)

    def hidden(self) -> torch.Tensor:
        return self.encode()[0]


class TrainingFlash2(TrainingUnpadded, Flash2):
    """PyTorch's FlashAttention-2."""


class TrainingVarlen(TrainingUnpadded, Varlen):
    """torch.nn.attention.varlen_attn."""


class TrainingFlashAttention(TrainingUnpadded, FlashAttention):
    """The package flash-attn."""


class TrainingSparseHead(Training, models.HuggingFace):
    """Hugging Face's sdpa, PyTorch's choice of backend, granted logits at the labelled tokens only."""

    def loss(self, call: Any) -> torch.Tensor:
        inputs = dict(self.inputs)
        labels = inputs.pop("labels")
        labelled = labels != -100
        logits = call.cls(call.base_model(**inputs).last_hidden_state[labelled])
        return F.cross_entropy(logits.float(), labels[labelled])
