from __future__ import annotations

from collections.abc import Callable

import accuracy
import pytest
import torch
import torch.nn.functional as F
from properties import given, settings, st
from torch import Tensor

from fastbert import ops
from fastbert.ops import philox
from fastbert.ops.embedding import embedding_ref

# batch (None: packed), tokens, hidden, padding_idx, ids of positions and types given
CASES = [
    (1, 1, 8, None, False),
    (1, 32, 384, 0, False),
    (2, 7, 312, 0, True),
    (3, 5, 100, 1, True),
    (2, 33, 768, None, True),
    (4, 128, 40, -1, True),
    (1, 512, 384, 0, False),
    (2, 3, 13, None, True),
    (0, 4, 16, 0, False),
    (3, 0, 16, 0, True),
    (None, 37, 384, 0, True),
    (None, 1, 13, None, True),
    (None, 0, 16, 1, True),
]
VOCABULARY, POSITIONS, TYPES = 61, 512, 2


def positions(backend: str | None) -> int:
    """Rows of the position table: each is a program of the backward, for which the interpreter takes milliseconds."""
    return 40 if accuracy.interpreted(backend) else POSITIONS


def ids_for(batch: int | None, tokens: int, given: bool, backend: str | None = None) -> dict[str, Tensor]:
    random = accuracy.generator((batch or 0) + tokens)
    shape = (tokens,) if batch is None else (batch, tokens)
    ids = {"input_ids": torch.randint(VOCABULARY, shape, generator=random)}
    if given:
        ids["position_ids"] = torch.randint(positions(backend), shape, generator=random)
        ids["token_type_ids"] = torch.randint(TYPES, shape, generator=random)
    return accuracy.to_device(backend, ids)


def tensors_for(hidden: int, dtype: torch.dtype, backend: str | None = None) -> dict[str, Tensor]:
    random = accuracy.generator(hidden)
    shapes = {"word": (VOCABULARY, hidden), "position": (positions(backend), hidden), "token_type": (TYPES, hidden)}
    tensors = {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}
    tensors["weight"] = (torch.rand(hidden, generator=random) + 0.5).to(dtype)
    tensors["bias"] = torch.randn(hidden, generator=random).to(dtype)
    return accuracy.to_device(backend, tensors)


def ours(backend: str, ids: dict[str, Tensor], padding_idx: int | None, p: float = 0.0) -> Callable[..., Tensor]:
    seed = accuracy.seed_tensor(accuracy.device(backend)) if p > 0 else None
    return lambda **tensors: ops.embedding(
        **ids, **tensors, padding_idx=padding_idx, dropout_p=p, seed=seed, eps=1e-5, backend=backend
    )


def full(ids: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    input_ids = ids["input_ids"]
    positions = torch.arange(input_ids.size(-1), device=input_ids.device).expand_as(input_ids)
    return input_ids, ids.get("position_ids", positions), ids.get("token_type_ids", torch.zeros_like(input_ids))


def eager(ids: dict[str, Tensor], padding_idx: int | None, p: float = 0.0) -> Callable[..., Tensor]:
    input_ids, position_ids, token_type_ids = full(ids)

    def run(word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = F.embedding(input_ids, word, padding_idx) + F.embedding(token_type_ids, token_type)
        z = z + F.embedding(position_ids, position)
        y = accuracy.layer_norm(z, weight, bias)
        if p > 0:
            keep = philox.keep_rows(accuracy.seed_tensor(y.device), p, input_ids.numel(), y.size(-1))
            y = y * keep.view(y.shape) / (1 - p)
        return y

    return run


def reference(ids: dict[str, Tensor], padding_idx: int | None, p: float = 0.0) -> Callable[..., Tensor]:
    seed = accuracy.seed_tensor(ids["input_ids"].device)
    return lambda **tensors: embedding_ref(
        *full(ids), **tensors, padding_idx=padding_idx, dropout_p=p, eps=1e-5, seed=seed
    )


def case_id(case: tuple) -> str:
    batch, tokens, hidden, padding_idx, given = case
    batch = "packed" if batch is None else batch
    return f"{batch}x{tokens}x{hidden}{'' if padding_idx is None else f'-pad{padding_idx}'}{'-ids' if given else ''}"


table = accuracy.table(
    "embedding",
    CASES,
    cost=lambda case: case[1] / 40 if case[2] < 300 else (case[0] or 1) * case[1] * case[2] / 13000,
    ids=case_id,
)
typed = accuracy.typed("embedding")
dropouts = pytest.mark.parametrize("p", [0.0, 0.1], ids=["", "dropout"])
backends = accuracy.backends("embedding")


@dropouts
@table
def test_embedding_fwd(backend: str, dtype: torch.dtype, p: float, case: tuple) -> None:
    accuracy.require("embedding", backend, dtype)
    batch, tokens, hidden, padding_idx, given = case
    ids = ids_for(batch, tokens, given, backend)
    accuracy.check_forward(
        ours(backend, ids, padding_idx, p),
        eager(ids, padding_idx, p),
        reference(ids, padding_idx, p),
        tensors_for(hidden, dtype, backend),
    )


@dropouts
@table
def test_embedding_bwd(backend: str, dtype: torch.dtype, p: float, case: tuple) -> None:
    accuracy.require("embedding", backend, dtype)
    batch, tokens, hidden, padding_idx, given = case
    ids = ids_for(batch, tokens, given, backend)
    accuracy.check_backward(
        ours(backend, ids, padding_idx, p),
        eager(ids, padding_idx, p),
        reference(ids, padding_idx, p),
        tensors_for(hidden, dtype, backend),
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 5),
    tokens=st.integers(0, 40),
    hidden=st.integers(8, 200),
    padding_idx=st.sampled_from([None, 0, 7]),
    given_ids=st.booleans(),
    p=st.sampled_from([0.0, 0.3]),
    dtype=st.sampled_from(accuracy.DTYPES),
)
def test_embedding_any_shape(
    batch: int, tokens: int, hidden: int, padding_idx: int | None, given_ids: bool, p: float, dtype: torch.dtype
) -> None:
    accuracy.require("embedding", "cpu", dtype)
    ids = ids_for(batch, tokens, given_ids)
    accuracy.check_backward(
        ours("cpu", ids, padding_idx, p),
        eager(ids, padding_idx, p),
        reference(ids, padding_idx, p),
        tensors_for(hidden, dtype),
    )


@pytest.mark.parametrize("padding_idx", [None, 5])
@typed
def test_embedding_frequent_ids(backend: str, dtype: torch.dtype, padding_idx: int | None) -> None:
    """As [MASK] is in pretraining: runs that begin and end within, at and beyond a piece that they may be cut into."""
    accuracy.require("embedding", backend, dtype)
    counts = {4: 64, 5: 200, 6: 63, 7: 65, 8: 1, 9: 128, 10: 31, 60: 90}
    ids = torch.cat([torch.full((count,), id) for id, count in counts.items()])
    ids = ids[torch.randperm(len(ids), generator=accuracy.generator())]
    given = accuracy.to_device(backend, {"input_ids": ids, "position_ids": (ids % 3).clone()})
    tensors = tensors_for(24, dtype, backend)
    accuracy.check_backward(
        ours(backend, given, padding_idx), eager(given, padding_idx), reference(given, padding_idx), tensors
    )


@backends
def test_embedding_bias_wider_than_the_weight(backend: str) -> None:
    accuracy.require("embedding", backend, torch.bfloat16)
    ids = ids_for(3, 5, True, backend)
    tensors = tensors_for(100, torch.bfloat16, backend)
    tensors["bias"] = tensors["bias"].float() + 1e-4
    accuracy.check_backward(ours(backend, ids, None), eager(ids, None), reference(ids, None), tensors)


@pytest.mark.parametrize(("vocabulary", "padding_idx"), [(VOCABULARY, 3), (VOCABULARY, 3 - VOCABULARY), (10, 3)])
@backends
def test_embedding_padding_row_gets_no_gradient(backend: str, vocabulary: int, padding_idx: int) -> None:
    """Whichever way a table's gradient is summed, of which there is one for few rows."""
    accuracy.require("embedding", backend, torch.float32)
    tensors = tensors_for(16, torch.float32, backend)
    tensors["word"] = tensors["word"][:vocabulary].clone()
    tensors = {name: value.requires_grad_() for name, value in tensors.items()}
    ids = accuracy.to_device(backend, {"input_ids": torch.tensor([[3, 4, 3]])})
    y = ours(backend, ids, padding_idx)(**tensors)
    y.square().sum().backward()
    assert (tensors["word"].grad[3] == 0).all()
    assert (tensors["word"].grad[4] != 0).any()
    assert (tensors["word"].grad[5:] == 0).all()


@backends
def test_embedding_ids_broadcast_and_int32(backend: str) -> None:
    accuracy.require("embedding", backend, torch.float32)
    tensors, ids = tensors_for(16, torch.float32, backend), ids_for(3, 5, True, backend)
    ids["position_ids"] = ids["position_ids"][:1]
    expected = ops.embedding(**ids | {"position_ids": ids["position_ids"].repeat(3, 1)}, **tensors, backend=backend)
    short = {name: value.int() for name, value in ids.items()}
    assert torch.equal(ops.embedding(**ids, **tensors, backend=backend), expected)
    assert torch.equal(ops.embedding(**short, **tensors, backend=backend), expected)


@backends
def test_embedding_float32_norm_over_bfloat16_tables(backend: str) -> None:
    accuracy.require("embedding", backend, torch.bfloat16, (torch.float32, 40))
    tensors, ids = tensors_for(40, torch.bfloat16, backend), ids_for(2, 9, True, backend)
    for name in ("weight", "bias"):
        tensors[name] = tensors[name].float()
    accuracy.check_backward(ours(backend, ids, 0), eager(ids, 0), reference(ids, 0), tensors)


def test_embedding_triton_gives_nan_for_ids_without_a_row() -> None:
    """The host does not look at the ids, and nothing outside the tables is read or written."""
    accuracy.require("embedding", "triton", torch.float32)
    tensors = tensors_for(16, torch.float32, "triton")
    ids = {"input_ids": [[1, 61, -1, 2**40, 3]], "token_type_ids": [[0, 0, 1, 1, 1]], "position_ids": [[0, 1, 2, 3, 9]]}
    given = accuracy.to_device("triton", {name: torch.tensor(values) for name, values in ids.items()})
    leaves = {name: value.requires_grad_() for name, value in tensors.items()}
    y = ours("triton", given, 0)(**leaves)
    assert torch.isfinite(y[0, [0, 4]]).all()
    assert torch.isnan(y[0, 1:4]).all()
    y[0, [0, 4]].sum().backward()
    assert torch.isfinite(leaves["word"].grad).all()


@backends
def test_embedding_padding_idx_is_an_integer_on_every_backend(backend: str) -> None:
    accuracy.require("embedding", backend, torch.float32)
    for bad in (1.5, torch.tensor(1)):
        with pytest.raises(TypeError, match=f"embedding: padding_idx must be an integer, got {type(bad).__name__}"):
            ours(backend, ids_for(1, 3, False, backend), bad)(**tensors_for(16, torch.float32, backend))


@pytest.mark.parametrize("types", [True, False], ids=["types", ""])
@dropouts
@backends
def test_embedding_of_packed_ids(backend: str, p: float, types: bool) -> None:
    """They give the rows that a batch without padding gives, dropout included; token types may be left out."""
    accuracy.require("embedding", backend, torch.float32)
    tensors, ids = tensors_for(16, torch.float32, backend), ids_for(2, 9, True, backend)
    if not types:
        ids["token_type_ids"].zero_()
    expected = ours(backend, ids, 0, p)(**tensors).flatten(0, 1)
    packed = {name: value.flatten() for name, value in ids.items() if types or name != "token_type_ids"}
    assert torch.equal(ours(backend, packed, 0, p)(**tensors), expected)
    with torch.no_grad():  # the short way of inference
        direct = ops.embedding(**packed, **tensors, eps=1e-5)
    if p == 0.0:
        torch.testing.assert_close(direct, expected)


GOOD = {"input_ids": torch.tensor([[1, 2], [3, 4]])} | tensors_for(16, torch.float32)
PACKED = {"input_ids": torch.tensor([1, 2]), "position_ids": torch.tensor([0, 1])}


@pytest.mark.parametrize("backend", [None, "reference"], ids=["any", "reference"])
@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"input_ids": torch.tensor([[1, 61]])}, IndexError, ["input_ids", "61", "word", "0 to 60"]),
        ({"input_ids": torch.tensor([[-1, 2]])}, IndexError, ["input_ids", "-1"]),
        ({"input_ids": torch.tensor([[2**40, 2]])}, IndexError, ["input_ids", str(2**40)]),
        ({"position_ids": torch.tensor([[0, 512]])}, IndexError, ["position_ids", "512", "position"]),
        ({"token_type_ids": torch.tensor([[2, 0]])}, IndexError, ["token_type_ids", "2", "0 to 1"]),
        ({"input_ids": torch.zeros(1, 513, dtype=torch.int64)}, IndexError, ["513", "position", "512"]),
        (
            {"input_ids": torch.ones(1, 1, 2, dtype=torch.int64)},
            ValueError,
            ["[batch, tokens] or [tokens]", "[1, 1, 2]"],
        ),
        ({"input_ids": torch.tensor([1, 2])}, ValueError, ["position_ids", "[tokens]", "None", "[2]"]),
        ({"input_ids": torch.tensor([[1.0]])}, TypeError, ["input_ids", "float32", "int64"]),
        ({"input_ids": [[1]]}, TypeError, ["input_ids", "list"]),
        ({"input_ids": torch.zeros(1, 1, dtype=torch.int64, device="meta")}, ValueError, ["input_ids", "meta"]),
        ({"position_ids": [[0, 1]]}, TypeError, ["position_ids", "list"]),
        ({"position_ids": torch.tensor([[0, 1, 2]])}, ValueError, ["position_ids", "[2, 2]", "[1, 3]"]),
        (PACKED | {"position_ids": torch.tensor([[0, 1]])}, ValueError, ["position_ids", "[2]", "[1, 2]"]),
        (PACKED | {"position_ids": torch.tensor([0, 512])}, IndexError, ["position_ids", "512", "position"]),
        (PACKED | {"token_type_ids": torch.tensor([0, 1, 1])}, ValueError, ["token_type_ids", "[2]", "[3]"]),
        ({"token_type_ids": torch.tensor([[True, False]])}, TypeError, ["token_type_ids", "bool"]),
        ({"word": [1.0]}, TypeError, ["word", "list"]),
        ({"word": torch.randn(61)}, ValueError, ["word", "[61]"]),
        ({"word": torch.ones(61, 16, dtype=torch.int64)}, TypeError, ["word", "int64"]),
        ({"position": torch.randn(512, 8)}, ValueError, ["position", "16", "[512, 8]"]),
        ({"token_type": torch.randn(2, 16).bfloat16()}, TypeError, ["token_type", "bfloat16", "float32"]),
        ({"weight": torch.randn(8)}, ValueError, ["weight", "[16]", "[8]"]),
        ({"bias": None}, TypeError, ["bias", "NoneType"]),
        ({"padding_idx": 61}, ValueError, ["padding_idx", "61"]),
        ({"padding_idx": 1.5}, TypeError, ["padding_idx", "integer", "float"]),
        ({"padding_idx": "0"}, TypeError, ["padding_idx", "integer", "str"]),
        ({"dropout_p": 2.0}, ValueError, ["dropout_p", "2.0"]),
        ({"eps": None}, TypeError, ["eps", "number", "NoneType"]),
        ({"eps": -1.0}, ValueError, ["eps", "finite and not negative", "-1.0"]),
        ({"eps": float("inf")}, ValueError, ["eps", "finite and not negative", "inf"]),
        ({"seed": torch.tensor([1], dtype=torch.int32)}, ValueError, ["seed", "int32"]),
    ],
)
def test_embedding_errors(
    change: dict, error: type[Exception], words: list[str], gradients: bool, backend: str | None
) -> None:
    with torch.set_grad_enabled(gradients), pytest.raises(error) as caught:
        ops.embedding(**GOOD | change, backend=backend)
    assert str(caught.value).startswith("embedding: ")
    assert all(word in str(caught.value) for word in words), str(caught.value)
