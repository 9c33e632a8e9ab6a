from __future__ import annotations

import functools
from collections.abc import Callable

import accuracy
import pytest
import torch
import torch.nn.functional as F
from properties import given, settings, st
from torch import Tensor

from fastbert import ops
from fastbert.ops import philox
from fastbert.ops.layernorm import layernorm_ref

# rows, hidden, what else there is: b = x_bias, r = residual
CASES = [
    (1, 8, ""),
    (1, 384, "br"),
    (2, 312, "b"),
    (3, 100, "br"),
    (5, 8, "b"),
    (7, 13, "r"),
    (15, 768, "br"),
    (16, 384, "r"),
    (17, 384, "br"),
    (33, 1024, ""),
    (63, 40, "br"),
    (65, 312, "br"),
    (512, 384, "br"),
    (3, 1000, "br"),
    (2, 8192, "b"),
    (3, 4099, "br"),
    (2, 2048, "br"),
    (2, 3000, "r"),
    (0, 384, "br"),
]
# x, residual, weight, bias, x_bias
MIXED = [
    (torch.bfloat16, torch.float32, torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32, torch.float32, torch.bfloat16),
    (torch.bfloat16, None, torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16),
]


def tensors_for(
    rows: int, hidden: int, parts: str, dtype: torch.dtype, backend: str | None = None
) -> dict[str, Tensor]:
    random = accuracy.generator(rows + hidden)
    tensors = {
        "x": torch.randn(rows, hidden, generator=random) * 2 + 1,
        "weight": torch.rand(hidden, generator=random) + 0.5,
        "bias": torch.randn(hidden, generator=random),
    }
    if "b" in parts:
        tensors["x_bias"] = torch.randn(hidden, generator=random)
    if "r" in parts:
        tensors["residual"] = torch.randn(rows, hidden, generator=random)
    return {name: value.to(accuracy.device(backend), dtype) for name, value in tensors.items()}


def constant_but_for_rounding(dtype: torch.dtype, backend: str | None = None) -> dict[str, Tensor]:
    """A sum of x, x_bias and residual that is no number of 16 bits, the same in all places."""
    tensors = tensors_for(5, 384, "br", dtype, backend)
    values = {"x": 1.0, "x_bias": 2.0**-7, "residual": 2.0**-12}
    return tensors | {name: torch.full_like(tensors[name], value) for name, value in values.items()}


def ours(backend: str, p: float = 0.0) -> Callable[..., Tensor]:
    seed = accuracy.seed_tensor(accuracy.device(backend)) if p > 0 else None
    return lambda **tensors: ops.layernorm(**tensors, dropout_p=p, seed=seed, eps=1e-5, backend=backend)


def eager(p: float = 0.0) -> Callable[..., Tensor]:
    def run(
        x: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        z = x if x_bias is None else x + x_bias.to(x.dtype)
        if p > 0:
            z = z * philox.keep_rows(accuracy.seed_tensor(x.device), p, *x.shape) / (1 - p)
        if residual is not None:
            z = z + residual
        return accuracy.layer_norm(z, weight, bias)

    return run


def reference(p: float = 0.0) -> Callable[..., Tensor]:
    return lambda x, **rest: layernorm_ref(x, **rest, dropout_p=p, seed=accuracy.seed_tensor(x.device), eps=1e-5)


table = functools.partial(
    accuracy.table,
    "layernorm",
    CASES,
    cost=lambda case: case[0] * case[1] / 17000,
    ids=lambda case: f"{case[0]}x{case[1]}{'-' + case[2] if case[2] else ''}",
)
typed = accuracy.typed("layernorm")
dropouts = pytest.mark.parametrize("p", [0.0, 0.1], ids=["", "dropout"])
backends = accuracy.backends("layernorm")


@table(dropouts=(0.0, 0.1))
def test_layernorm_fwd(backend: str, dtype: torch.dtype, p: float, case: tuple) -> None:
    accuracy.require("layernorm", backend, dtype)
    accuracy.check_forward(ours(backend, p), eager(p), reference(p), tensors_for(*case, dtype, backend))


@table(dropouts=(0.1, 0.0))
def test_layernorm_bwd(backend: str, dtype: torch.dtype, p: float, case: tuple) -> None:
    accuracy.require("layernorm", backend, dtype)
    accuracy.check_backward(ours(backend, p), eager(p), reference(p), tensors_for(*case, dtype, backend))


@pytest.mark.parametrize("mixed", MIXED, ids=lambda mixed: "-".join(str(accuracy.name_of(dtype)) for dtype in mixed))
@dropouts
@backends
def test_layernorm_mixed_dtypes(backend: str, p: float, mixed: tuple) -> None:
    accuracy.require("layernorm", backend, mixed[0], (mixed[2], mixed[1], 384))
    of = dict(zip(("x", "residual", "weight", "bias", "x_bias"), mixed, strict=True))
    tensors = tensors_for(19, 384, "b" if mixed[1] is None else "br", torch.float32, backend)
    tensors = {name: value.to(of[name]) for name, value in tensors.items()}
    accuracy.check_forward(ours(backend, p), eager(p), reference(p), tensors)
    accuracy.check_backward(ours(backend, p), eager(p), reference(p), tensors)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 40),
    hidden=st.integers(8, 300),
    parts=st.sampled_from(["", "b", "r", "br"]),
    p=st.sampled_from([0.0, 0.1, 0.5]),
    dtype=st.sampled_from(accuracy.DTYPES),
)
def test_layernorm_any_shape(rows: int, hidden: int, parts: str, p: float, dtype: torch.dtype) -> None:
    accuracy.require("layernorm", "cpu", dtype)
    accuracy.check_backward(ours("cpu", p), eager(p), reference(p), tensors_for(rows, hidden, parts, dtype))


@backends
def test_layernorm_dropout_one_keeps_the_residual(backend: str) -> None:
    accuracy.require("layernorm", backend, torch.float32)
    tensors = tensors_for(5, 24, "br", torch.float32, backend)
    expected = F.layer_norm(tensors["residual"], (24,), tensors["weight"], tensors["bias"], eps=1e-5)
    torch.testing.assert_close(ours(backend, 1.0)(**tensors), expected)


@typed
def test_layernorm_rows_constant_but_for_rounding(backend: str, dtype: torch.dtype) -> None:
    """A mean of other values than those that the backward finds would be off by a rounding times 1 / sqrt(eps)."""
    accuracy.require("layernorm", backend, dtype)
    accuracy.check_backward(ours(backend), eager(), reference(), constant_but_for_rounding(dtype, backend))


@backends
@pytest.mark.parametrize("hidden", [64, 312, 384, 768, 1000])
def test_layernorm_constant_rows(backend: str, hidden: int) -> None:
    """With BERT's eps, a mean that is off by its rounding would give the bias plus or minus the weight."""
    accuracy.require("layernorm", backend, torch.float32)
    tensors = tensors_for(50, hidden, "", torch.float32, backend)
    tensors["x"] = (tensors["x"][:, :1] * 100).expand(50, hidden).contiguous()
    y = ops.layernorm(**tensors, eps=1e-12, backend=backend)
    torch.testing.assert_close(y, tensors["bias"].expand_as(y), atol=1e-6, rtol=1e-6)


@backends
def test_layernorm_large_mean(backend: str) -> None:
    """A variance taken as E[x^2] - E[x]^2 has no correct digit here."""
    accuracy.require("layernorm", backend, torch.float32)
    tensors = tensors_for(5, 384, "", torch.float32, backend)
    tensors["x"] = tensors["x"] + 10000.0
    accuracy.check_forward(ours(backend), eager(), reference(), tensors)


@backends
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_layernorm_constant_row(backend: str, grad: bool) -> None:
    accuracy.require("layernorm", backend, torch.float32)
    tensors = tensors_for(4, 40, "", torch.float32, backend)
    tensors["x"] = torch.full((4, 40), 3.0, device=accuracy.device(backend), requires_grad=grad)
    torch.testing.assert_close(ops.layernorm(**tensors, backend=backend), tensors["bias"].expand(4, 40))


def test_layernorm_leading_dimensions() -> None:
    tensors = tensors_for(6, 16, "br", torch.float32)
    expected = ops.layernorm(**tensors)
    tensors["x"], tensors["residual"] = tensors["x"].view(2, 3, 16), tensors["residual"].view(2, 3, 16)
    assert torch.equal(ops.layernorm(**tensors), expected.view(2, 3, 16))


@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.randn(4, 15)}, ValueError, ["weight", "[15]", "[16]"]),
        ({"x": torch.randn(4, 0)}, ValueError, ["x", "hidden > 0"]),
        ({"x": torch.tensor(1.0)}, ValueError, ["x", "[..., hidden]"]),
        ({"x": torch.ones(4, 16, dtype=torch.int64)}, TypeError, ["x", "int64"]),
        ({"x": "text"}, TypeError, ["x", "str"]),
        ({"weight": torch.randn(16, device="meta")}, ValueError, ["weight", "meta"]),
        ({"weight": None}, TypeError, ["weight", "NoneType"]),
        ({"bias": torch.randn(1, 16)}, ValueError, ["bias", "[1, 16]"]),
        ({"x_bias": torch.randn(4, 16)}, ValueError, ["x_bias", "[4, 16]"]),
        ({"residual": torch.randn(16)}, ValueError, ["residual", "[4, 16]", "[16]"]),
        ({"residual": torch.ones(4, 16, dtype=torch.bool)}, TypeError, ["residual", "bool"]),
        ({"dropout_p": 1.5}, ValueError, ["dropout_p", "1.5"]),
        ({"dropout_p": float("nan")}, ValueError, ["dropout_p", "nan"]),
        ({"dropout_p": "0"}, TypeError, ["dropout_p", "number", "str"]),
        ({"eps": None}, TypeError, ["eps", "number", "NoneType"]),
        ({"eps": torch.tensor(1e-5)}, TypeError, ["eps", "number", "Tensor"]),
        ({"eps": -1.0}, ValueError, ["eps", "finite and not negative", "-1.0"]),
        ({"eps": float("nan")}, ValueError, ["eps", "finite and not negative", "nan"]),
        ({"dropout_p": 0.1, "seed": torch.tensor([1.0])}, ValueError, ["seed", "float32", "int64"]),
        ({"seed": torch.tensor([1, 2])}, ValueError, ["seed", "one element", "[2]"]),
        ({"seed": 3}, TypeError, ["seed", "int"]),
    ],
)
def test_layernorm_errors(change: dict, error: type[Exception], words: list[str], gradients: bool) -> None:
    arguments = tensors_for(4, 16, "br", torch.float32) | change
    with torch.set_grad_enabled(gradients), pytest.raises(error) as caught:
        ops.layernorm(**arguments)
    assert str(caught.value).startswith("layernorm: ")
    assert all(word in str(caught.value) for word in words), str(caught.value)
