"""The rows of the GPU table: models and single operations, who takes part in each, and in which order.

In bfloat16, but for two models in float32, which is what transformers gives who asks for nothing.

A row is a `Workload` like those of the CPU table. `plan` has the order of measuring, which is that of importance.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from . import ops
from .contestants import Entry
from .workloads import SEED, Workload, model_workload

FACTS = {"device": "cuda", "dtype": "bfloat16"}
TOKENS = 16384
"""Places in a batch, padding included: enough to fill any GPU."""
MEMORY_TOKENS = 65536
"""The same where memory is the limit: each tensor is far larger than a GPU's L2."""
VOCABULARY = 30522
SIZES: dict[str, dict[str, int]] = {
    "base": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "large": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
}

SDPA = {name: f"hf-sdpa-{name}" for name in ("flash", "cudnn", "efficient", "math")}
EVERY_SDPA = ("inference[base-512]", "training[base-512]")
"""The rows that show every backend of scaled_dot_product_attention."""

INFERENCE = {
    "fastbert": Entry(".gpu_models:FastBert"),
    "fastbert-graphs": Entry(".gpu_models:FastBertGraphs"),
    "fastbert-cuda": Entry(".gpu_models:FastBertCuda"),
    **{name: Entry(".gpu_models:Sdpa") for name in SDPA.values()},
    "hf-eager": Entry(".gpu_models:HuggingFace"),
    "fa2": Entry(".gpu_models:Flash2"),
    "varlen": Entry(".gpu_models:Varlen"),
    "flash-attn": Entry(".gpu_models:FlashAttention", ("flash_attn",)),
    "hf-compile": Entry(".gpu_models:Compiled", optional=True),
}
TRAINING = {
    **{
        name: Entry(item.target.replace(":", ":Training"), item.needs, item.optional)
        for name, item in INFERENCE.items()
        if name != "fastbert-graphs"
    },
    "hf-sdpa-sparse-head": Entry(".gpu_models:TrainingSparseHead"),
}
OPS = {
    "triton": Entry(".gpu_ops:Triton"),
    "cuda": Entry(".gpu_ops:Cuda"),
    "pytorch": Entry(".gpu_ops:Torch"),
}
ATTENTION = {
    "triton": Entry(".gpu_ops:Triton"),
    "cuda": Entry(".gpu_ops:Cuda"),
    **{f"sdpa-{backend}": Entry(".gpu_ops:Sdpa") for backend in SDPA},
    "fa2": Entry(".gpu_ops:Flash2"),
    "varlen": Entry(".gpu_ops:Varlen"),
    "flash-attn": Entry(".gpu_ops:FlashAttention", ("flash_attn",)),
}
HALF = ("fastbert-cuda", SDPA["flash"], SDPA["cudnn"], "fa2", "varlen", "flash-attn")
"""Models whose attention takes 16-bit types alone."""
FFN = {**OPS, "bare-gemm": Entry(".gpu_ops:BareGemm")}
"""bare-gemm is the measure of the others, not one of them: the two matrix products and nothing else."""

CUDA = ("attention", "ffn", "layernorm")
"""The ops that have a CUDA C++ kernel."""

YARDSTICKS = ("bare-gemm",)


def entries(workload: Workload) -> dict[str, Entry]:
    """Who takes part in a row."""
    op = workload.facts.get("op")
    if op is None:
        table, masked = (TRAINING if workload.kind == "training" else INFERENCE), "attention_mask" in workload.inputs
    else:
        table = {"attention": ATTENTION, "ffn": FFN}.get(op, OPS)
        masked = len(set(workload.facts["shape"]["lengths"])) > 1
    left_out = set() if op in CUDA else {"cuda"}
    if workload.facts["dtype"] == "float32":
        left_out |= {*HALF, SDPA["math"]}
    elif workload.name not in EVERY_SDPA:  # the others show those that may be the fastest; flash takes no mask
        left_out |= {name for backend in ("math", "flash" if masked else "efficient") for name in _sdpa(backend)}
    return {name: item for name, item in table.items() if name not in left_out}


def _sdpa(backend: str) -> tuple[str, str]:
    """What a backend of scaled_dot_product_attention is called in rows of models and of ops."""
    return SDPA[backend], f"sdpa-{backend}"


def plain(workload: Workload) -> Entry:
    """Whose error the others' is held against, and who computes the truth."""
    return OPS["pytorch"] if workload.kind == "op" else entries(workload)["hf-eager"]


def half_full(count: int, width: int) -> list[int]:
    """``count`` lengths from 1 to ``width``, evenly spread: half of the places are real tokens."""
    if count == 1:
        return [width]
    return [1 + round(i * (width - 1) / (count - 1)) for i in range(count)]


def model_row(
    name: str,
    size: str,
    batch: int,
    width: int,
    *,
    ragged: bool = False,
    training: bool = False,
    config: dict[str, int] | None = None,
    **more: Any,
) -> Workload:
    """BERT with random weights on random tokens. Training has labels at 15 % of the real tokens and dropout 0.1."""
    config = config or SIZES[size]
    generator = torch.Generator().manual_seed(SEED)
    vocabulary = config.get("vocab_size", VOCABULARY)
    inputs = {"input_ids": torch.randint(min(1000, vocabulary // 2), vocabulary, (batch, width), generator=generator)}
    real = torch.ones(batch, width, dtype=torch.bool)
    if ragged:
        real = torch.arange(width) < torch.tensor(half_full(batch, width))[:, None]
        inputs["attention_mask"] = real.long()
    facts = FACTS | more
    if training:
        labelled = real & (torch.rand(batch, width, generator=generator) < ops.LABELLED)
        labelled[0, 0] = True
        inputs["labels"] = inputs["input_ids"].masked_fill(~labelled, -100)
        facts |= {"dropout": ops.DROPOUT, "optimizer": "torch.optim.AdamW(fused=True)"}
    what = "training, dropout 0.1, MLM loss" if training else "inference"
    dtype = "" if facts["dtype"] == FACTS["dtype"] else f", {facts['dtype']}"
    title = f"BERT-{size}, {batch} x {width}, {'half full' if ragged else 'full'}, {what}{dtype}"
    return model_workload(name, title, {"config": config}, config, inputs, training, facts)


def op_row(op: str, direction: str, label: str, shape: dict[str, Any], **more: Any) -> Workload:
    return ops.workload(op, direction, label, shape, **{**FACTS, "dropout": 0.0, **more})


def attention_shape(lengths: list[int], heads: int = 16, head_dim: int = 64) -> dict[str, Any]:
    return {"hidden": heads * head_dim, "intermediate": 0, "heads": heads, "vocab": 0, "lengths": lengths}


def rows() -> dict[str, Callable[[], Workload]]:
    """Every row: name -> what makes its workload."""
    return dict(_rows())


COMPILED_FIRST = ("inference[base-512]", "inference[base-1x128]", "training[base-512]")
TELLING = (
    "attention_fwd[d64-512]",
    "attention_fwd_bwd[d64-512]",
    "attention_fwd_bwd[d64-512-dropout]",
    "attention_fwd[d64-4096]",
    "attention_fwd_bwd[d64-4096]",
    "attention_fwd[d64-128]",
    "attention_fwd_bwd[d64-128]",
    "ffn_fwd[large]",
    "ffn_fwd_bwd[large]",
    "layernorm_fwd[large]",
    "layernorm_fwd_bwd[large]",
    "embedding_fwd_bwd[large]",
    "mlm_loss_fwd_bwd[large]",
    "linear_fwd[base-1x128]",
)
"""The operations that say most about the kernels."""


def plan(wanted: Sequence[str]) -> list[tuple[str, bool]]:
    """In which order to measure these rows: (row, False), and (row, True) for its contestants that are slow to start.

    The important comes first: BERT-base of 512 tokens and one sequence; torch.compile beside these; BERT-large; the
    telling operations; what is left, with what takes minutes to compile at the end.
    """
    models = [name for name in wanted if name.startswith(("inference", "training"))]
    first = [name for name in models if "[base-512" in name] + ["inference[base-1x128]"]
    order = [(name, False) for name in first] + [(name, True) for name in COMPILED_FIRST]
    order += [(name, False) for name in models if "[large-512" in name]
    order += [(name, False) for name in TELLING] + [(name, False) for name in wanted]
    order += [(name, True) for name in models]
    return [step for step in dict.fromkeys(order) if step[0] in wanted]


def _rows() -> Iterator[tuple[str, Callable[[], Workload]]]:
    yield from _model_rows("base", 512)
    yield "inference[base-1x128]", partial(model_row, "inference[base-1x128]", "base", 1, 128, latency=True)
    yield from _model_rows("large", 512)
    yield from _attention_rows()
    yield from _other_rows()
    yield from _model_rows("base", 128)
    yield from _model_rows("large", 128)
    for kind in ("inference", "training"):
        name, batch = f"{kind}[base-128-ragged-float32]", TOKENS // 128
        more = {"ragged": True, "training": kind == "training", "dtype": "float32"}
        yield name, partial(model_row, name, "base", batch, 128, **more)


def _model_rows(size: str, width: int) -> Iterator[tuple[str, Callable[[], Workload]]]:
    for training in (False, True):
        for ragged in (False, True):
            kind = "training" if training else "inference"
            name = f"{kind}[{size}-{width}{'-ragged' if ragged else ''}]"
            yield name, partial(model_row, name, size, TOKENS // width, width, ragged=ragged, training=training)


def _attention_rows() -> Iterator[tuple[str, Callable[[], Workload]]]:
    def row(label: str, direction: str, shape: dict[str, Any], **more: Any) -> tuple[str, Callable[[], Workload]]:
        return f"attention_{direction}[{label}]", partial(op_row, "attention", direction, label, shape, **more)

    full = {f"d64-{s}": attention_shape([s] * (TOKENS // s)) for s in (512, 1024, 2048, 4096, 128, 64)}
    ragged = {f"d64-{s}-ragged": attention_shape(half_full(TOKENS // s, s)) for s in (512, 128)}
    for direction in ("fwd", "fwd_bwd"):
        for label, shape in (full | ragged).items():
            yield row(label, direction, shape)
    for label in ("d64-512", "d64-128", "d64-512-ragged"):
        yield row(f"{label}-dropout", "fwd_bwd", (full | ragged)[label], dropout=ops.DROPOUT)
    yield row("d64-512-deterministic", "fwd_bwd", full["d64-512"], deterministic=True)
    for head_dim in (32, 128):
        shape = attention_shape([512] * (TOKENS // 512), 1024 // head_dim, head_dim)
        for direction in ("fwd", "fwd_bwd"):
            yield row(f"d{head_dim}-512", direction, shape)


def _other_rows() -> Iterator[tuple[str, Callable[[], Workload]]]:
    shape = {"hidden": 1024, "intermediate": 4096, "heads": 16, "vocab": VOCABULARY, "lengths": [512] * (TOKENS // 512)}
    base = {**shape, "hidden": 768, "intermediate": 3072, "heads": 12}
    for op in ("layernorm", "ffn", "embedding", "mlm_loss"):
        for label, at in (("large", shape), ("base", base)):
            if ops.OPS[op].unit == "GB/s":
                at = at | {"lengths": [512] * (MEMORY_TOKENS // 512)}
            for direction in ("fwd", "fwd_bwd"):
                if op == "mlm_loss" and direction == "fwd":
                    continue
                dropout = ops.DROPOUT if ops.OPS[op].drops and direction == "fwd_bwd" else 0.0
                name = f"{op}_{direction}[{label}]"
                yield name, partial(op_row, op, direction, label, at, dropout=dropout)
    name = "linear_fwd[base-1x128]"  # with more tokens it is the vendor's
    yield name, partial(op_row, "linear", "fwd", "base-1x128", base | {"lengths": [128]})
