"""Op rows: each op at the shapes of MiniLM and BERT-base, forward, and forward + backward, against plain PyTorch.

Rows are called ``attention_fwd[minilm]`` or ``attention_fwd_bwd[bert-base]``. GEMM-like ops count useful FLOPs and are
held to the FMA peak; layernorm and embedding count the bytes that must be moved and are held to a copy of as many.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from fastbert import flops

from .contestants import TRUTH
from .workloads import SEED, Workload

MINILM = {"hidden": 384, "intermediate": 1536, "heads": 12, "vocab": 30522}
BASE = {"hidden": 768, "intermediate": 3072, "heads": 12, "vocab": 30522}
SHAPES: dict[str, dict[str, Any]] = {
    # as full as the real texts of the row "ragged": 60 %
    "minilm": {**MINILM, "lengths": [256 - round(i * 204 / 31) for i in range(32)]},
    "minilm-1x32": {**MINILM, "lengths": [32]},
    "bert-base": {**BASE, "lengths": [128] * 8},
}
DROPOUT = 0.1
LABELLED = 0.15
EPS = 1e-12

Tensors = dict[str, torch.Tensor]


def workloads() -> dict[str, Callable[[], Workload]]:
    """Every op row: name -> what makes its workload. Single short sequences (latency) are measured forward only."""
    return {
        f"{op}_{direction}[{shape}]": partial(workload, op, direction, shape, SHAPES[shape])
        for op in OPS
        for shape in SHAPES
        for direction in ("fwd", "fwd_bwd")
        if not (direction == "fwd_bwd" and len(SHAPES[shape]["lengths"]) == 1)
    }


def workload(op: str, direction: str, label: str, shape: dict[str, Any], **more: Any) -> Workload:
    """The workload of ``op`` ("attention", ...), ``direction`` "fwd" or "fwd_bwd", at ``shape`` (as in ``SHAPES``).

    more: further facts, "device", "dtype" and "dropout" among them: otherwise the CPU, float32, and BERT's dropout
    where there is a backward.
    """
    backward = direction == "fwd_bwd"
    case = OPS[op](shape, getattr(torch, more.get("dtype", "float32")).itemsize)
    facts = {"op": op, "backward": backward, "dropout": DROPOUT if backward and case.drops else 0.0, "shape": shape}
    facts |= more
    title = f"{op}, {label}: {case.describe()}, forward{' + backward' if backward else ''}"
    title += f", dropout {DROPOUT}" if facts["dropout"] else ""
    return Workload(f"{op}_{direction}[{label}]", title, "op", case.work(backward), facts=facts, unit=case.unit)


class Case:
    """One op at one shape: its tensors, the plain PyTorch way, our way, and the work in it.

    Every floating-point tensor gets a gradient; ``upstream`` is the gradient of the output. ``plain`` may use another
    layout, which ``to_plain`` makes beforehand (untimed) and ``from_plain`` takes back for the comparison.
    """

    unit = "GFLOP/s"
    drops = False

    def __init__(self, shape: dict[str, Any], float_bytes: int = 4) -> None:
        self.float_bytes = float_bytes
        self.lengths: list[int] = shape["lengths"]
        self.hidden, self.intermediate = shape["hidden"], shape["intermediate"]
        self.heads, self.vocab = shape["heads"], shape["vocab"]
        self.tokens, self.width = sum(self.lengths), max(self.lengths)

    def describe(self) -> str:
        return f"{self.tokens} tokens x {self.hidden}"

    def work(self, backward: bool) -> float:
        raise NotImplementedError

    def tensors(self) -> Tensors:
        raise NotImplementedError

    def upstream(self) -> torch.Tensor:
        return torch.randn(self.tokens, self.hidden)

    def plain(self, t: Tensors, dropout: float) -> torch.Tensor:
        raise NotImplementedError

    def ours(self, t: Tensors, dropout: float) -> torch.Tensor:
        raise NotImplementedError

    def to_plain(self, t: Tensors) -> Tensors:
        return t

    def from_plain(self, found: Tensors) -> Tensors:
        return found


class Linear(Case):
    """Query, key and value from the same input."""

    def describe(self) -> str:
        return f"query, key, value of {self.tokens} tokens x {self.hidden}"

    def work(self, backward: bool) -> float:
        forward = flops.linear_flops(self.tokens, self.hidden, 3 * self.hidden)
        return forward * (flops.TRAINING_FACTOR if backward else 1)

    def tensors(self) -> Tensors:
        h = self.hidden
        weights = {f"w{n}": torch.randn(h, h) * 0.02 for n in "qkv"}
        return {"x": torch.randn(self.tokens, h), **weights, **{f"b{n}": torch.randn(h) for n in "qkv"}}

    def upstream(self) -> torch.Tensor:
        return torch.randn(self.tokens, 3 * self.hidden)

    def plain(self, t: Tensors, dropout: float) -> torch.Tensor:
        return F.linear(t["x"], t["w"], t["b"])

    def to_plain(self, t: Tensors) -> Tensors:
        # one product of concatenated weights: the faster of the plain ways
        return {"x": t["x"], "w": torch.cat([t["wq"], t["wk"], t["wv"]]), "b": torch.cat([t["bq"], t["bk"], t["bv"]])}

    def from_plain(self, found: Tensors) -> Tensors:
        rest = {k: v for k, v in found.items() if k not in ("w", "b")}
        for kind in ("w", "b"):
            if kind in found:
                rest |= {kind + n: part for n, part in zip("qkv", found[kind].chunk(3), strict=True)}
        return rest

    def ours(self, t: Tensors, dropout: float) -> torch.Tensor:
        from fastbert import ops

        return ops.linear(t["x"], [t["wq"], t["wk"], t["wv"]], [t["bq"], t["bk"], t["bv"]])


class Ffn(Case):
    """Linear, exact GELU, linear."""

    def describe(self) -> str:
        return f"{self.tokens} tokens x {self.hidden} x {self.intermediate}"

    def work(self, backward: bool) -> float:
        forward = 2 * flops.linear_flops(self.tokens, self.hidden, self.intermediate)
        return forward * (flops.TRAINING_FACTOR if backward else 1)

    def tensors(self) -> Tensors:
        h, i = self.hidden, self.intermediate
        x, w1, w2 = torch.randn(self.tokens, h), torch.randn(i, h) * 0.05, torch.randn(h, i) * 0.05
        return {"x": x, "w1": w1, "b1": torch.randn(i) * 0.1, "w2": w2}

    def plain(self, t: Tensors, dropout: float) -> torch.Tensor:
        return F.linear(F.gelu(F.linear(t["x"], t["w1"], t["b1"])), t["w2"])

    def ours(self, t: Tensors, dropout: float) -> torch.Tensor:
        from fastbert import ops

        return ops.ffn(t["x"], t["w1"], t["b1"], t["w2"])


class Attention(Case):
    """Self-attention within each sequence. Plain PyTorch is sdpa on padded queries, keys and values with a mask.

    They are three tensors there, as three linear layers make them: the gradients of parts of one would be copied
    together.
    """

    drops = True

    def describe(self) -> str:
        return f"{len(self.lengths)} sequences of up to {self.width}, {self.heads} heads of {self.hidden // self.heads}"

    def work(self, backward: bool) -> float:
        forward = flops.attention_flops(self.lengths, self.hidden)
        return forward * (flops.TRAINING_FACTOR if backward else 1)

    def tensors(self) -> Tensors:
        starts = torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32)
        return {"qkv": torch.randn(self.tokens, 3, self.heads, self.hidden // self.heads), "cu_seqlens": starts}

    def mask(self, device: torch.device) -> torch.Tensor:
        return torch.arange(self.width, device=device) < torch.tensor(self.lengths, device=device)[:, None]

    def plain(self, t: Tensors, dropout: float) -> torch.Tensor:
        return F.scaled_dot_product_attention(t["q"], t["k"], t["v"], t.get("mask"), dropout)

    def to_plain(self, t: Tensors) -> Tensors:
        mask = self.mask(t["qkv"].device)
        padded = t["qkv"].new_zeros(*mask.shape, *t["qkv"].shape[1:])
        padded[mask] = t["qkv"]
        moved = {name: part.transpose(1, 2).contiguous() for name, part in zip("qkv", padded.unbind(2), strict=True)}
        return moved if bool(mask.all()) else {**moved, "mask": mask[:, None, None, :]}

    def from_plain(self, found: Tensors) -> Tensors:
        mask = self.mask(found["out"].device)
        back = {"out": found["out"].transpose(1, 2)[mask].flatten(1)}
        if "q" in found:
            back["qkv"] = torch.stack([found[name].transpose(1, 2)[mask] for name in "qkv"], 1)
        return back

    def ours(self, t: Tensors, dropout: float) -> torch.Tensor:
        from fastbert import ops

        return ops.attention(t["qkv"], t["cu_seqlens"], self.width, dropout_p=dropout)


class LayerNorm(Case):
    """Bias, dropout, residual and LayerNorm.

    Bytes, each tensor [tokens, hidden] read once and written once: x, residual and y; with a backward also the sum that
    is normalised, written and read again, dy, dx and dresidual. Vectors and rows' statistics are not counted.
    """

    unit = "GB/s"
    drops = True

    def work(self, backward: bool) -> float:
        return (8 if backward else 3) * self.tokens * self.hidden * self.float_bytes

    def tensors(self) -> Tensors:
        h = self.hidden
        big = {"x": torch.randn(self.tokens, h), "residual": torch.randn(self.tokens, h)}
        return {**big, "x_bias": torch.randn(h), "weight": torch.rand(h) + 0.5, "bias": torch.randn(h)}

    def plain(self, t: Tensors, dropout: float) -> torch.Tensor:
        x = F.dropout(t["x"] + t["x_bias"], dropout, training=dropout > 0)
        return F.layer_norm(x + t["residual"], (self.hidden,), t["weight"], t["bias"], EPS)

    def ours(self, t: Tensors, dropout: float) -> torch.Tensor:
        from fastbert import ops

        return ops.layernorm(
            t["x"], t["weight"], t["bias"], x_bias=t["x_bias"], residual=t["residual"], dropout_p=dropout, eps=EPS
        )


class Embedding(Case):
    """Word, position and type, LayerNorm, dropout, for the padded ids.

    Bytes, each tensor read once and written once: the tokens' rows of the word table and y; with a backward also the
    normalised rows, written and read again, dy, and the gradient of the whole word table. The other tables, of which a
    row serves many tokens, and ids are not counted.
    """

    unit = "GB/s"
    drops = True

    def __init__(self, shape: dict[str, Any], float_bytes: int = 4) -> None:
        super().__init__(shape, float_bytes)
        self.tokens = len(self.lengths) * self.width

    def work(self, backward: bool) -> float:
        rows = (5 if backward else 2) * self.tokens + (self.vocab if backward else 0)
        return rows * self.hidden * self.float_bytes

    def tensors(self) -> Tensors:
        h = self.hidden
        ids = torch.randint(0, self.vocab, (len(self.lengths), self.width))
        tables = {"word": torch.randn(self.vocab, h), "position": torch.randn(512, h), "token_type": torch.randn(2, h)}
        return {"ids": ids, **tables, "weight": torch.rand(h) + 0.5, "bias": torch.randn(h)}

    def upstream(self) -> torch.Tensor:
        return torch.randn(len(self.lengths), self.width, self.hidden)

    def plain(self, t: Tensors, dropout: float) -> torch.Tensor:
        x = F.embedding(t["ids"], t["word"]) + t["token_type"][0] + t["position"][: self.width]
        return F.dropout(F.layer_norm(x, (self.hidden,), t["weight"], t["bias"], EPS), dropout, training=dropout > 0)

    def ours(self, t: Tensors, dropout: float) -> torch.Tensor:
        from fastbert import ops

        tables = (t["word"], t["position"], t["token_type"])
        return ops.embedding(t["ids"], *tables, t["weight"], t["bias"], dropout_p=dropout, eps=EPS)


class MlmLoss(Case):
    """The MLM head and its loss at the labelled 15 % of the tokens; plain PyTorch is granted the gathering too."""

    @property
    def labelled(self) -> int:
        return max(1, round(LABELLED * self.tokens))

    def describe(self) -> str:
        return f"{self.labelled} of {self.tokens} tokens labelled, {self.hidden} x {self.vocab}"

    def work(self, backward: bool) -> float:
        forward = flops.linear_flops(self.labelled, self.hidden, self.hidden + self.vocab)
        return forward * (flops.TRAINING_FACTOR if backward else 1)

    def tensors(self) -> Tensors:
        h = self.hidden
        labels = torch.full((self.tokens,), -100)
        labels[torch.randperm(self.tokens)[: self.labelled]] = torch.randint(0, self.vocab, (self.labelled,))
        head = {"decoder": torch.randn(self.vocab, h) * 0.05, "decoder_bias": torch.randn(self.vocab) * 0.1}
        transform = {"transform": torch.randn(h, h) * 0.05, "transform_bias": torch.randn(h) * 0.1}
        norm = {"weight": torch.rand(h) + 0.5, "bias": torch.randn(h)}
        return {"hidden": torch.randn(self.tokens, h), "labels": labels, **head, **transform, **norm}

    def upstream(self) -> torch.Tensor:
        return torch.ones(())

    def plain(self, t: Tensors, dropout: float) -> torch.Tensor:
        chosen = t["labels"] != -100
        x = F.gelu(F.linear(t["hidden"][chosen], t["transform"], t["transform_bias"]))
        x = F.layer_norm(x, (self.hidden,), t["weight"], t["bias"], EPS)
        return F.cross_entropy(F.linear(x, t["decoder"], t["decoder_bias"]), t["labels"][chosen])

    def ours(self, t: Tensors, dropout: float) -> torch.Tensor:
        from fastbert import ops

        head = (t["decoder"], t["decoder_bias"], t["transform"], t["transform_bias"], t["weight"], t["bias"])
        return ops.mlm_loss(t["hidden"], t["labels"], *head, eps=EPS)[0]


OPS: dict[str, type[Case]] = {
    "linear": Linear,
    "ffn": Ffn,
    "attention": Attention,
    "layernorm": LayerNorm,
    "embedding": Embedding,
    "mlm_loss": MlmLoss,
}


class Torch:
    """The plain PyTorch formula."""

    plain = True
    exact = torch.float64
    """The dtype of the truth, which has the same inputs as the others."""

    def __init__(self, name: str, workload: Workload) -> None:
        self.facts = facts = workload.facts
        self.op = facts["op"]
        self.case = OPS[self.op](facts["shape"])
        self.backward, self.dropout = facts["backward"], facts["dropout"]
        dtype = getattr(torch, facts.get("dtype", "float32"))
        torch.manual_seed(SEED)
        with torch.device(facts.get("device", "cpu")):
            tensors, upstream = self.case.tensors(), self.case.upstream().to(dtype)
        if self.plain:
            # the upstream gradient goes the way of the output: into whatever layout the plain formula has
            tensors = self.case.to_plain(tensors)
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
        if name == TRUTH:
            tensors = {k: v.to(self.exact) if v.is_floating_point() else v for k, v in tensors.items()}
        self.tensors = {k: v.requires_grad_(self.backward and v.is_floating_point()) for k, v in tensors.items()}
        self.leaves = [k for k, v in self.tensors.items() if v.requires_grad]
        self.upstream = self._fitted(upstream)

    def _fitted(self, upstream: torch.Tensor) -> torch.Tensor:
        if self.plain and isinstance(self.case, Attention):
            mask = self.case.mask(upstream.device)
            padded = upstream.new_zeros(*mask.shape, upstream.shape[-1])
            padded[mask] = upstream
            return padded.unflatten(-1, (self.case.heads, -1)).transpose(1, 2).contiguous()
        return upstream

    def forward(self, dropout: float) -> torch.Tensor:
        return self.case.plain(self.tensors, dropout)

    def run(self) -> Any:
        if not self.backward:
            with torch.inference_mode():
                return self.forward(self.dropout)
        return self._gradients(self.forward(self.dropout))

    def _gradients(self, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, [self.tensors[k] for k in self.leaves], self.upstream.to(out.dtype))

    def outputs(self) -> dict[str, torch.Tensor]:
        """The output and, in rows with a backward, all gradients, with dropout off."""
        if not self.backward:
            with torch.inference_mode():
                found = {"out": self.forward(0.0)}
        else:
            out = self.forward(0.0)
            found = {"out": out.detach(), **dict(zip(self.leaves, self._gradients(out), strict=True))}
        return self.case.from_plain(found) if self.plain else found

    def details(self) -> dict[str, Any]:
        return {}


class FastBert(Torch):
    """fastbert's op, whichever backend it chooses here."""

    plain = False

    def forward(self, dropout: float) -> torch.Tensor:
        return self.case.ours(self.tensors, dropout)

    def details(self) -> dict[str, Any]:
        from fastbert import dispatch

        chosen = dispatch.describe(head_dim=self.case.hidden // self.case.heads, ops=(self.op,))[self.op]
        backend = chosen["backend"]
        return {"backend": backend, "note": "on the reference" if backend == "reference" else ""}
