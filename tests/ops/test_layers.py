"""Whole layers in one op: the single ops' digits, or none at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accuracy
import pytest
import torch
from torch import Tensor

from fastbert import dispatch, encoder
from fastbert.ops import layers as layers_module
from fastbert.packing import PackedBatch

pytestmark = pytest.mark.skipif(dispatch.extension_error is not None, reason="the C++ extension is not built")

# lengths of the sequences, hidden, heads, intermediate
CASES = [
    ((1,), 32, 1, 64),
    ((32,), 384, 12, 1536),
    ((17, 3, 40), 96, 3, 200),
    ((70, 0, 61, 33), 312, 13, 1200),
    ((129, 128), 64, 2, 256),
    ((40, 41), 64, 1, 100),
]


def tensors_for(lengths: tuple[int, ...], hidden: int, heads: int, intermediate: int, dtype: torch.dtype) -> Any:
    random = accuracy.generator(sum(lengths))

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=random) * scale).to(dtype)

    square = [normal(hidden, hidden, scale=hidden**-0.5) for _ in range(4)]
    weights = [tensor for weight in square for tensor in (weight, normal(hidden))]
    weights += [normal(hidden), normal(hidden)]
    weights += [normal(intermediate, hidden, scale=hidden**-0.5), normal(intermediate)]
    weights += [normal(hidden, intermediate, scale=intermediate**-0.5), normal(hidden), normal(hidden), normal(hidden)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return normal(sum(lengths), hidden), cu_seqlens, max(lengths), tuple(weights)


def batch_of(cu_seqlens: Tensor, longest: int, bias: Tensor | None = None) -> PackedBatch:
    return PackedBatch(1, int(cu_seqlens[-1]), cu_seqlens, longest, bias=bias)


def settings_for(heads: int, dropout: float = 0.0) -> encoder.LayerSettings:
    return encoder.LayerSettings(heads, 0.2, 1e-12, 1e-5, dropout, dropout, dropout, False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """What `layers` gave to each call of the encoder's."""
    given: list[Tensor | None] = []
    monkeypatch.setattr(encoder, "layers_op", recorded(layers_module.layers, given))
    return given


def recorded(function: Callable[..., Tensor | None], given: list[Tensor | None]) -> Callable[..., Tensor | None]:
    def call(*arguments: Any) -> Tensor | None:
        given.append(function(*arguments))
        return given[-1]

    return call


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{'+'.join(map(str, case[0]))}x{case[1]}")
def test_layer_gives_the_digits_of_the_single_ops(
    case: Any, dtype: torch.dtype, biased: bool, threads: int, calls: list[Tensor | None], monkeypatch: Any
) -> None:
    x, cu_seqlens, longest, weights = tensors_for(*case, dtype)
    heads = case[2]
    bias = torch.randn(len(case[0]), heads, 1, longest, generator=accuracy.generator(3)) if biased else None
    batch, settings = batch_of(cu_seqlens, longest, bias), settings_for(heads)
    torch.set_num_threads(threads)
    with torch.no_grad():
        whole = encoder.layer(x, batch, weights, settings)
        assert calls[-1] is whole
        monkeypatch.setattr(encoder, "layers_op", lambda *arguments: None)
        single = encoder.layer(x, batch, weights, settings)
    assert torch.equal(whole, single)
    assert not whole.isnan().any()


def test_several_layers_give_what_they_give_one_by_one() -> None:
    x, cu_seqlens, longest, first = tensors_for((17, 3, 40), 96, 3, 200, torch.float32)
    second = tuple(weight.flip(0).contiguous() for weight in first)
    batch, settings = batch_of(cu_seqlens, longest), settings_for(3)
    kept = x.clone()
    with torch.no_grad():
        at_once = encoder.layers_at_once(x, batch, (*first, *second, *first), settings)
        for weights in (first, second, first):
            x = encoder.layer(x, batch, weights, settings)
    assert torch.equal(at_once, x)
    assert not torch.equal(kept, x)


def test_layer_leaves_the_rest_to_the_single_ops(calls: list[Tensor | None], monkeypatch: pytest.MonkeyPatch) -> None:
    x, cu_seqlens, longest, weights = tensors_for((9, 4), 32, 2, 64, torch.float32)
    batch, settings = batch_of(cu_seqlens, longest), settings_for(2)
    y = encoder.layer(x, batch, weights, settings)
    assert calls == [None]  # gradients are on
    with torch.no_grad():
        encoder.layer(x, batch, weights, settings_for(2, dropout=0.5))
        assert calls == [None]  # dropout: it was not even asked
        with torch.autocast("cpu", torch.bfloat16):
            encoder.layer(x, batch, weights, settings)
        wide = [weight.double() for weight in weights]
        torch.testing.assert_close(encoder.layer(x.double(), batch, tuple(wide), settings).float(), y)
        monkeypatch.setenv("FASTBERT_BACKEND", "reference")
        encoder.layer(x, batch, weights, settings)
    assert calls == [None] * 4


def arguments(**changed: Any) -> tuple[Any, ...]:
    x, cu_seqlens, longest, weights = tensors_for((9, 4), 32, 2, 64, torch.float32)
    given = {"x": x, "cu_seqlens": cu_seqlens, "max_seqlen": longest, "heads": 2, "scale": 0.25, "bias": None}
    given |= {"weights": list(weights), "eps1": 1e-12, "eps2": 1e-12}
    for name, value in changed.items():
        if name[1:].isdigit():
            given["weights"][int(name[1:])] = value
        else:
            given[name] = value
    return tuple(given.values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(13)}, r"x has shape \[13\]; it must be \[any, any\]"),
        ({"x": torch.zeros(13, 32).double()}, "x is Double; the CPU kernel takes float32 and bfloat16"),
        ({"x": torch.zeros(32, 13).t()}, r"x of shape \[13, 32\] is not contiguous"),
        ({"x": torch.zeros(12, 32)}, "cu_seqlens ends with 13; x has 12 tokens"),
        ({"max_seqlen": 8}, "cu_seqlens holds a sequence of 9 tokens; max_seqlen is 8"),
        ({"heads": 0}, "heads is 0; it must be positive"),
        ({"heads": 3}, "query.weight has 32 rows; it must be a multiple of heads = 3"),
        ({"heads": 8}, "x has head_dim 4; it must be a positive multiple of 8"),
        ({"bias": torch.zeros(3, 1, 1, 9)}, r"bias has shape \[3, 1, 1, 9\]; it must be \[2 or 1"),
        ({"w2": torch.zeros(32, 31)}, r"key.weight has shape \[32, 31\]; it must be \[32, 32\]"),
        ({"w9": torch.zeros(31)}, r"attention_norm.bias has shape \[31\]; it must be \[32\]"),
        ({"w12": torch.zeros(32, 60)}, r"down.weight has shape \[32, 60\]; it must be \[32, 64\]"),
        ({"w15": torch.zeros(32).bfloat16()}, "norm.bias is BFloat16; it must be Float"),
        ({"weights": []}, "weights has 0 entries"),
        ({"weights": [torch.zeros(32, 32)] * 17}, "weights has 17 entries"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_layer_names_what_is_wrong(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"layers_fwd_cpu: .*{message}"):
        torch.ops.fastbert.layers_fwd_cpu.default(*arguments(**changed))


def test_layer_opcheck() -> None:
    torch.library.opcheck(torch.ops.fastbert.layers_fwd_cpu.default, arguments())


def test_layer_has_no_gradient() -> None:
    x = torch.zeros(13, 32, requires_grad=True)
    y = torch.ops.fastbert.layers_fwd_cpu.default(*arguments(x=x))
    with pytest.raises(RuntimeError, match="for inference"):
        y.sum().backward()
