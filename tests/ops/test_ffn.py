from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import accuracy
import pytest
import torch
import torch.nn.functional as F
from properties import given, settings, st
from torch import Tensor

from fastbert import ops
from fastbert.ops.ffn import ffn_ref

# rows, features, intermediate, features out
CASES = [
    (1, 8, 32, 8),
    (1, 384, 1536, 384),
    (3, 100, 300, 100),
    (15, 312, 1200, 312),
    (16, 64, 256, 64),
    (17, 64, 255, 63),
    (33, 384, 1536, 384),
    (64, 768, 3072, 768),
    (129, 96, 17, 40),
    (512, 48, 96, 48),
    (0, 8, 32, 8),
]


def tensors_for(
    rows: int, features: int, inner: int, outer: int, dtype: torch.dtype, backend: str | None = None
) -> dict[str, Tensor]:
    random = accuracy.generator(rows + features)
    tensors = {
        "x": torch.randn(rows, features, generator=random),
        "weight1": torch.randn(inner, features, generator=random) * 2 * max(features, 1) ** -0.5,
        "bias1": torch.randn(inner, generator=random),
        "weight2": torch.randn(outer, inner, generator=random) * max(inner, 1) ** -0.5,
    }
    return {name: value.to(accuracy.device(backend), dtype) for name, value in tensors.items()}


def in_eights(case: tuple[int, ...]) -> bool:
    """Whether all sizes of the weights are multiples of 8, as the CUDA C++ kernels want them."""
    return all(size % 8 == 0 for size in case[1:])


def ours(backend: str) -> Callable[..., Tensor]:
    return lambda **tensors: ops.ffn(**tensors, backend=backend)


def eager(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> Tensor:
    return F.gelu(x @ weight1.T + bias1) @ weight2.T


table = accuracy.table(
    "ffn",
    CASES,
    cost=lambda case: case[0] * case[2] * (case[1] + case[3]) / 3e7,
    ids=lambda case: "x".join(map(str, case)),
)
typed = accuracy.typed("ffn")
backends = accuracy.backends("ffn")


@table
def test_ffn_fwd(backend: str, dtype: torch.dtype, case: tuple[int, ...]) -> None:
    accuracy.require("ffn", backend, dtype, in_eights(case))
    accuracy.check_forward(ours(backend), eager, ffn_ref, tensors_for(*case, dtype, backend))


@table
def test_ffn_bwd(backend: str, dtype: torch.dtype, case: tuple[int, ...]) -> None:
    accuracy.require("ffn", backend, dtype, in_eights(case))
    accuracy.check_backward(ours(backend), eager, ffn_ref, tensors_for(*case, dtype, backend))


@backends
@pytest.mark.parametrize("sizes", [(0, 8, 16), (8, 0, 16), (8, 16, 0)], ids=str)
@pytest.mark.parametrize("lead", [(3,), (200,), (2, 3)], ids=str)
def test_ffn_with_a_size_of_zero(lead: tuple[int, ...], sizes: tuple[int, int, int], backend: str) -> None:
    rows = math.prod(lead)
    accuracy.require("ffn", backend, torch.float32, in_eights((rows, *sizes)))
    tensors = tensors_for(rows, *sizes, torch.float32, backend)
    tensors["x"] = tensors["x"].view(*lead, sizes[0])
    upstream = torch.ones(*lead, sizes[2], device=tensors["x"].device)
    expected = accuracy.evaluate(eager, tensors, upstream)
    spoilt = [torch.full((rows, sizes[1]), torch.nan, device=upstream.device) for _ in range(50)]
    del spoilt  # what nobody writes comes to lie there
    torch.testing.assert_close(accuracy.evaluate(ours(backend), tensors, upstream), expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def tf32() -> Iterator[None]:
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, "tf32"
    yield
    settings.fp32_precision = before


@pytest.mark.usefixtures("tf32")
def test_ffn_where_tf32_is_allowed() -> None:
    """Triton then has the products of float32, too, which otherwise are the vendor's."""
    accuracy.require("ffn", "triton", torch.float32)
    tensors = tensors_for(17, 64, 255, 63, torch.float32, "triton")
    accuracy.check_forward(ours("triton"), eager, ffn_ref, tensors)
    accuracy.check_backward(ours("triton"), eager, ffn_ref, tensors)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    # Of a handful of numbers it is chance how near eager comes to the truth; the table has the small shapes.
    rows=st.integers(8, 70),
    features=st.integers(2, 130),
    inner=st.integers(8, 260),
    outer=st.integers(2, 130),
    dtype=st.sampled_from(accuracy.DTYPES),
)
def test_ffn_any_shape(rows: int, features: int, inner: int, outer: int, dtype: torch.dtype) -> None:
    accuracy.require("ffn", "cpu", dtype)
    accuracy.check_backward(ours("cpu"), eager, ffn_ref, tensors_for(rows, features, inner, outer, dtype))


@typed
def test_ffn_gelu_everywhere(backend: str, dtype: torch.dtype) -> None:
    """The activation alone, from deep in the left tail over the zero to far right, and its derivative."""
    accuracy.require("ffn", backend, dtype, in_eights((1, 1, 1, 1)))
    one = torch.ones(1, 1, dtype=dtype)
    values = torch.cat([torch.linspace(-14, 14, 4001), torch.tensor([-1e4, -88.0, -0.0, 1e-30, 88.0, 1e4])])
    tensors = {
        "x": values.to(dtype)[:, None],
        "weight1": one,
        "bias1": torch.zeros(1, dtype=dtype),
        "weight2": one,
    }
    tensors = accuracy.to_device(backend, tensors)
    accuracy.check_forward(ours(backend), eager, ffn_ref, tensors)
    accuracy.check_backward(ours(backend), eager, ffn_ref, tensors)


def test_ffn_leading_dimensions() -> None:
    tensors = tensors_for(6, 16, 32, 8, torch.float32)
    expected = ops.ffn(**tensors)
    x = tensors.pop("x")
    assert torch.equal(ops.ffn(x.view(2, 3, 16), **tensors), expected.view(2, 3, 8))
    torch.testing.assert_close(ops.ffn(x[0], **tensors), expected[0])


@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.randn(4, 15)}, ValueError, ["weight1", "15", "[32, 16]"]),
        ({"x": None}, TypeError, ["x", "NoneType"]),
        ({"x": torch.tensor(1.0)}, ValueError, ["x", "[..., features]"]),
        ({"x": torch.ones(4, 16, dtype=torch.int32)}, TypeError, ["x", "int32"]),
        ({"weight1": torch.randn(32, 16).half()}, TypeError, ["weight1", "float16", "float32"]),
        ({"weight1": torch.randn(32, 16, device="meta")}, ValueError, ["weight1", "meta"]),
        ({"bias1": torch.randn(16)}, ValueError, ["bias1", "[32]", "[16]"]),
        ({"weight2": torch.randn(16, 16)}, ValueError, ["weight2", "32", "[16, 16]"]),
        ({"weight2": torch.randn(32)}, ValueError, ["weight2", "[32]"]),
    ],
)
def test_ffn_errors(change: dict, error: type[Exception], words: list[str], gradients: bool) -> None:
    arguments = tensors_for(4, 16, 32, 16, torch.float32) | change
    with torch.set_grad_enabled(gradients), pytest.raises(error) as caught:
        ops.ffn(**arguments)
    assert str(caught.value).startswith("ffn: ")
    assert all(word in str(caught.value) for word in words), str(caught.value)
