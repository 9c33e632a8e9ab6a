"""Op contestants on a GPU: fastbert's backends one by one, plain PyTorch, and variable-length attention of others."""

import os
from typing import Any

import torch
import torch.nn.functional as F

from . import ops
from .gpu_models import BACKENDS, flash2
from .workloads import Workload


class Torch(ops.Torch):
    """The plain PyTorch formula; also the truth, in float32: float64 would take minutes on a GPU."""

    exact = torch.float32


class Sdpa(Torch):
    """scaled_dot_product_attention on padded tensors, with the one backend that the name ends with."""

    def __init__(self, name: str, workload: Workload) -> None:
        super().__init__(name, workload)
        self.sdpa = getattr(torch.nn.attention.SDPBackend, BACKENDS[name.split("-")[-1]])

    def forward(self, dropout: float) -> torch.Tensor:
        with torch.nn.attention.sdpa_kernel(self.sdpa):
            return super().forward(dropout)


class Triton(ops.FastBert):
    """fastbert's Triton kernel."""

    backend = "triton"

    def __init__(self, name: str, workload: Workload) -> None:
        from fastbert import dispatch

        facts = workload.facts
        os.environ["FASTBERT_BACKEND"] = f"{facts['op']}:{self.backend}"
        (choice,) = dispatch.describe(facts["device"], getattr(torch, facts["dtype"]), ops=(facts["op"],)).values()
        if choice["backend"] != self.backend:
            raise NotImplementedError(choice["rejected"][self.backend])
        super().__init__(name, workload)

    def details(self) -> dict[str, Any]:
        return {"backend": self.backend}


class Cuda(Triton):
    """fastbert's CUDA C++ kernel."""

    backend = "cuda"


class Packed(ops.Torch):
    """Attention of others on the packed layout, of three tensors as in `ops.Attention`."""

    plain = False

    def __init__(self, name: str, workload: Workload) -> None:
        super().__init__(name, workload)
        parts = self.tensors.pop("qkv").detach().unbind(1)
        self.tensors |= {
            n: part.contiguous().requires_grad_(self.backward) for n, part in zip("qkv", parts, strict=True)
        }
        self.leaves = list("qkv") if self.backward else []

    def forward(self, dropout: float) -> torch.Tensor:
        q, k, v, starts = (self.tensors[name] for name in ("q", "k", "v", "cu_seqlens"))
        return self.attention(q, k, v, starts, self.case.width, dropout).flatten(1)

    def outputs(self) -> dict[str, torch.Tensor]:
        found = super().outputs()
        return {"qkv": torch.stack([found.pop(n) for n in "qkv"], 1), **found} if self.backward else found

    def attention(self, q: Any, k: Any, v: Any, starts: Any, longest: int, dropout: float) -> torch.Tensor:
        raise NotImplementedError


class Flash2(Packed):
    """PyTorch's FlashAttention-2."""

    def attention(self, q: Any, k: Any, v: Any, starts: Any, longest: int, dropout: float) -> torch.Tensor:
        return flash2(q, k, v, starts, longest, dropout)


class Varlen(Packed):
    """torch.nn.attention.varlen_attn."""

    def attention(self, q: Any, k: Any, v: Any, starts: Any, longest: int, dropout: float) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        if self.dropout:
            raise NotImplementedError("varlen_attn has no dropout")
        return varlen_attn(q, k, v, starts, starts, longest, longest)


class FlashAttention(Packed):
    """The package flash-attn."""

    def attention(self, q: Any, k: Any, v: Any, starts: Any, longest: int, dropout: float) -> torch.Tensor:
        from flash_attn import flash_attn_varlen_func

        deterministic = bool(self.facts.get("deterministic"))
        return flash_attn_varlen_func(
            q, k, v, starts, starts, longest, longest, dropout_p=dropout, deterministic=deterministic
        )


class BareGemm(ops.Torch):
    """The two matrix products of the feed-forward block, without bias and GELU: the rate that GELU-FFN is held to."""

    def forward(self, dropout: float) -> torch.Tensor:
        t = self.tensors
        return F.linear(F.linear(t["x"], t["w1"]), t["w2"])

    def _gradients(self, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, [self.tensors[k] for k in ("x", "w1", "w2")], self.upstream)
