from __future__ import annotations

from collections.abc import Callable

import accuracy
import pytest
import torch
import torch.nn.functional as F
from properties import given, settings, st
from torch import Tensor

from fastbert import ops
from fastbert.ops.linear import FEW_TOKENS, linear_ref, linear_vendor

# rows, in features, out features of each weight, whether there are biases
CASES = [
    (1, 8, (8,), True),
    (1, 384, (384,), True),
    (2, 384, (1536,), False),
    (5, 312, (312, 312, 312), True),
    (7, 100, (36, 20), False),
    (15, 384, (384, 384, 384), True),
    (16, 1536, (384,), True),
    (70, 40, (72, 72), False),
    (3, 16, (8, 8, 8, 8), True),
    (513, 24, (16, 16), True),
    (17, 768, (768,), True),
    (31, 13, (3,), True),
    (33, 1, (1,), True),
    (48, 100, (101,), True),
    (65, 384, (100,), False),
    (129, 768, (384, 8), True),
    (512, 384, (384,), True),
    (0, 16, (8,), True),
]


def tensors_for(
    rows: int, features: int, outputs: tuple[int, ...], biased: bool, dtype: torch.dtype
) -> dict[str, Tensor]:
    random = accuracy.generator(rows + features)
    tensors = {"x": torch.randn(rows, features, generator=random).to(dtype)}
    for i, size in enumerate(outputs):
        tensors[f"weight{i}"] = (torch.randn(size, features, generator=random) * features**-0.5).to(dtype)
        if biased:
            tensors[f"bias{i}"] = torch.randn(size, generator=random).to(dtype)
    return tensors


def lists(tensors: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return tuple([value for name, value in tensors.items() if name.startswith(stem)] for stem in ("weight", "bias"))


def ours(backend: str) -> Callable[..., Tensor]:
    def run(x: Tensor, **rest: Tensor) -> Tensor:
        weights, biases = lists(rest)
        if len(weights) == 1:
            return ops.linear(x, weights[0], biases[0] if biases else None, backend=backend)
        return ops.linear(x, weights, biases or None, backend=backend)

    return run


def eager(x: Tensor, **rest: Tensor) -> Tensor:
    weights, biases = lists(rest)
    return F.linear(x, torch.cat(weights), torch.cat(biases) if biases else None)


def unfit(case: tuple) -> str | None:
    """Triton is for several weights of one size on few rows."""
    rows, _, outputs, _ = case
    return None if rows <= FEW_TOKENS and len(outputs) > 1 and len(set(outputs)) == 1 else "unfit"


def reference(x: Tensor, **rest: Tensor) -> Tensor:
    return linear_ref(x, *lists(rest))


def name_of(case: tuple) -> str:
    return f"{case[0]}x{case[1]}-{'+'.join(map(str, case[2]))}{'-bias' if case[3] else ''}"


table = accuracy.table("linear", CASES, ids=name_of)
typed = accuracy.typed("linear")
backends = accuracy.backends("linear")


@table
def test_linear_fwd(backend: str, dtype: torch.dtype, case: tuple) -> None:
    accuracy.require("linear", backend, dtype, unfit(case))
    tensors = accuracy.to_device(backend, tensors_for(*case, dtype))
    accuracy.check_forward(ours(backend), eager, reference, tensors)


@table
def test_linear_bwd(backend: str, dtype: torch.dtype, case: tuple) -> None:
    accuracy.require("linear", backend, dtype, unfit(case))
    tensors = accuracy.to_device(backend, tensors_for(*case, dtype))
    accuracy.check_backward(ours(backend), eager, reference, tensors)


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize("dtype", accuracy.DTYPES, ids=accuracy.name_of)
def test_linear_vendor_formula(dtype: torch.dtype, case: tuple) -> None:
    """The vendor's library is called by plain PyTorch, whose numbers can be judged anywhere."""

    def vendor(x: Tensor, **rest: Tensor) -> Tensor:
        return linear_vendor(x, *lists(rest))

    accuracy.check_backward(vendor, eager, reference, tensors_for(*case, dtype))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 70),
    features=st.integers(1, 200),
    outputs=st.lists(st.integers(1, 90), min_size=1, max_size=4).map(tuple),
    biased=st.booleans(),
    dtype=st.sampled_from(accuracy.DTYPES),
)
def test_linear_any_shape(rows: int, features: int, outputs: tuple[int, ...], biased: bool, dtype: torch.dtype) -> None:
    accuracy.require("linear", "cpu", dtype)
    accuracy.check_backward(ours("cpu"), eager, reference, tensors_for(rows, features, outputs, biased, dtype))


@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "second weight"])
@backends
def test_linear_partial_gradients(backend: str, frozen: str) -> None:
    accuracy.require("linear", backend, torch.float32)
    tensors = accuracy.to_device(backend, tensors_for(9, 24, (8, 16), True, torch.float32))
    for name in {"x": ["x"], "weight": ["weight0", "weight1"], "bias": ["bias0", "bias1"]}.get(frozen, ["weight1"]):
        tensors[name].requires_grad_(False)
        frozen_names = [name]
    leaves = {name: value.requires_grad_(name not in frozen_names) for name, value in tensors.items()}
    ours(backend)(**leaves).square().sum().backward()
    expected = {name: value.detach().clone().requires_grad_(value.requires_grad) for name, value in leaves.items()}
    reference(**expected).square().sum().backward()
    for name, value in leaves.items():
        assert (value.grad is None) == (name in frozen_names)
        if value.grad is not None:
            torch.testing.assert_close(value.grad, expected[name].grad)


def test_linear_leading_dimensions() -> None:
    x, weight = torch.randn(2, 3, 16), torch.randn(8, 16)
    torch.testing.assert_close(ops.linear(x, weight), F.linear(x, weight))
    torch.testing.assert_close(ops.linear(x[0, 0], weight), F.linear(x[0, 0], weight))
    x, weight = torch.empty(2, 3, 0), torch.empty(8, 0)
    assert torch.equal(ops.linear(x, weight), torch.zeros(2, 3, 8))


@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.randn(4, 15)}, ValueError, ["weight", "[8, 16]", "15"]),
        ({"x": torch.randint(9, (4, 16))}, TypeError, ["x", "int64", "float32"]),
        ({"x": [1.0]}, TypeError, ["x", "list"]),
        ({"x": torch.tensor(1.0)}, ValueError, ["x", "in_features"]),
        ({"weight": torch.randn(8, 16, dtype=torch.float64)}, TypeError, ["weight", "float64", "float32"]),
        ({"weight": torch.randn(8, 16, device="meta")}, ValueError, ["weight", "meta", "cpu"]),
        ({"weight": torch.randn(16)}, ValueError, ["weight", "[out_features, 16]", "[16]"]),
        ({"weight": None}, TypeError, ["weight", "sequence of tensors", "NoneType"]),
        ({"bias": {}}, TypeError, ["bias", "sequence of tensors", "dict"]),
        ({"weight": []}, ValueError, ["weight", "1 to 4", "0"]),
        ({"weight": [torch.randn(8, 16)] * 2}, ValueError, ["2 weights", "1 biases"]),
        ({"bias": torch.randn(7)}, ValueError, ["bias", "[8]", "[7]"]),
        ({"bias": torch.randn(8).bfloat16()}, TypeError, ["bias", "bfloat16", "float32"]),
    ],
)
def test_linear_errors(change: dict, error: type[Exception], words: list[str], gradients: bool) -> None:
    arguments = {"x": torch.randn(4, 16), "weight": torch.randn(8, 16), "bias": torch.randn(8)} | change
    with torch.set_grad_enabled(gradients), pytest.raises(error) as caught:
        ops.linear(**arguments)
    assert str(caught.value).startswith("linear: ")
    assert all(word in str(caught.value) for word in words), str(caught.value)
