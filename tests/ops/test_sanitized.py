"""Few and small cases of every op with GPU kernels, for compute-sanitizer, which slows kernels down (`make gpu`).

Forward and backward: short and long sequences, ragged, with and without dropout and bias, in bfloat16, and in float32
where its kernels are others. What comes out is judged elsewhere; here it has to be finite.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import accuracy
import pytest
import torch
from torch import Tensor

from fastbert import dispatch, ops

CASES: dict[str, list[tuple[Any, ...]]] = {
    # lengths, heads, head_dim, dropout, whether there is a bias, whether the backward has to repeat bit for bit
    "attention": [
        ((15, 1, 17), 2, 32, 0.1, False, False),
        ((9, 4), 1, 64, 0.0, True, False),
        ((129, 3), 1, 64, 0.1, False, False),
        ((129, 3), 1, 64, 0.0, False, True),
        ((130, 7), 1, 32, 0.1, True, False),
        ((65, 3), 1, 64, 0.1, False, False),
        ((70, 2), 1, 128, 0.0, True, False),
        ((129, 1), 1, 128, 0.1, False, False),
    ],
    # rows, features, intermediate, features out
    "ffn": [(17, 64, 256, 64), (130, 32, 96, 40)],
    # rows, hidden, dropout
    "layernorm": [(17, 384, 0.1), (5, 1032, 0.1), (2, 4099, 0.0)],
    # sequences, length, hidden, dropout
    "embedding": [(2, 5, 40, 0.1)],
    # rows, hidden, vocabulary
    "mlm_loss": [(9, 32, 50)],
    # rows, features
    "linear": [(17, 64)],
}
HALF_ALONE = {(torch.float32, op, "cuda") for op in ("attention", "ffn")}
FLOAT_CASES: dict[str, list[tuple[Any, ...]]] = {
    "attention": [((9, 70), 1, 64, 0.1, True, False)],
    "ffn": [(17, 37, 50, 9)],
    "layernorm": [(5, 100, 0.1)],
    "mlm_loss": [(9, 37, 50)],
}
PARAMETERS = [
    pytest.param(op, backend, dtype, case, id=f"{op}-{backend}-{accuracy.name_of(dtype)}-{number}")
    for table, dtype in ((CASES, torch.bfloat16), (FLOAT_CASES, torch.float32))
    for op, values in table.items()
    for backend in accuracy.GPU_BACKENDS
    if backend in dispatch._candidates(op) and (dtype, op, backend) not in HALF_ALONE
    for number, case in enumerate(values)
]


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """None: what is filled beforehand is initialised to initcheck."""


class Inputs:
    """Random tensors on a backend's device, brought there by copies: the tools know of those whatever they look at."""

    def __init__(self, backend: str, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.device, self.random, self.leaves = accuracy.device(backend), accuracy.generator(), list[Tensor]()

    def __call__(self, *shape: int) -> Tensor:
        tensor = torch.randn(shape, generator=self.random).to(self.dtype).to(self.device).requires_grad_()
        self.leaves.append(tensor)
        return tensor

    def ids(self, most: int, *shape: int) -> Tensor:
        return torch.randint(most, shape, generator=self.random).to(self.device)


def attention(given: Inputs, more: dict[str, Any], lengths: Any, heads: int, size: int, p: float, *how: bool) -> Tensor:
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(given.device)
    longest, (biased, deterministic) = max(lengths), how
    bias = given(len(lengths), heads, longest, longest) if biased else None
    qkv = given(sum(lengths), 3, heads, size)
    return ops.attention(qkv, starts, longest, dropout_p=p, bias=bias, deterministic=deterministic, **more)


def ffn(given: Inputs, more: dict[str, Any], rows: int, features: int, inner: int, outer: int) -> Tensor:
    return ops.ffn(given(rows, features), given(inner, features), given(inner), given(outer, inner), **more)


def layernorm(given: Inputs, more: dict[str, Any], rows: int, hidden: int, p: float) -> Tensor:
    extra = {"x_bias": given(hidden), "residual": given(rows, hidden)} if p else {}
    return ops.layernorm(given(rows, hidden), given(hidden), given(hidden), dropout_p=p, **extra, **more)


def embedding(given: Inputs, more: dict[str, Any], rows: int, length: int, hidden: int, p: float) -> Tensor:
    tables = given(20, hidden), given(8, hidden), given(2, hidden)
    return ops.embedding(given.ids(20, rows, length), *tables, given(hidden), given(hidden), dropout_p=p, **more)


def mlm_loss(given: Inputs, more: dict[str, Any], rows: int, hidden: int, vocabulary: int) -> Tensor:
    head = given(vocabulary, hidden), given(vocabulary), given(hidden, hidden), given(hidden), given(hidden)
    return ops.mlm_loss(given(rows, hidden), given.ids(vocabulary, rows), *head, given(hidden), **more)[0]


def linear(given: Inputs, more: dict[str, Any], rows: int, features: int) -> Tensor:
    weights, biases = zip(*((given(features, features), given(features)) for _ in range(3)), strict=True)
    return ops.linear(given(rows, features), weights, biases, **more)


RUN: dict[str, Callable[..., Tensor]] = {run.__name__: run for run in (attention, ffn, layernorm)}
RUN |= {run.__name__: run for run in (embedding, mlm_loss, linear)}


def both_ways(out: Tensor, given: Inputs) -> Iterator[Tensor]:
    yield out.detach()
    upstream = torch.randn(out.shape, generator=given.random).to(out.dtype).to(out.device)
    yield from torch.autograd.grad(out, given.leaves, upstream)


@pytest.mark.parametrize(("op", "backend", "dtype", "case"), PARAMETERS)
def test_sanitized(op: str, backend: str, dtype: torch.dtype, case: tuple[Any, ...]) -> None:
    requires = {"attention": case[2] if op == "attention" else None, "ffn": True}
    accuracy.require(op, backend, dtype, requires.get(op))
    given = Inputs(backend, dtype)
    with torch.set_grad_enabled(op != "linear"):  # whose backward is the vendor's
        out = RUN[op](given, {"backend": backend}, *case)
    found = both_ways(out, given) if op != "linear" else [out]
    assert all(torch.isfinite(tensor.cpu()).all() for tensor in found)


def test_few_of_every_kernel() -> None:
    """The tools have seconds; what has kernels has to be there all the same."""
    counts = Counter(tuple(parameter.values[:2]) for parameter in PARAMETERS)
    assert set(counts) == {
        (op, backend) for op in dispatch.OPS for backend in accuracy.GPU_BACKENDS if backend in dispatch._candidates(op)
    }
    assert sum(counts.values()) <= 35
