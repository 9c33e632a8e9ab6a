"""The kernels of csrc/cuda, run on the host: by the table of cases and the rule for numbers that every backend has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import accuracy
import pytest
import test_attention as attention_cases
import test_ffn as ffn_cases
import test_layernorm as layernorm_cases
import torch
from torch import Tensor

from fastbert.ops import layernorm as public_layernorm
from fastbert.ops import leaf
from fastbert.ops.attention import _run as run_attention
from fastbert.ops.attention import attention_ref
from fastbert.ops.ffn import _run as run_ffn
from fastbert.ops.ffn import ffn_ref
from fastbert.ops.layernorm import _run as run_layernorm

# Every format, with and without dropout, but not every pair: the cases run thread by thread.
LAYERNORM_VARIANTS = [(torch.float32, 0.0), (torch.float32, 0.1), (torch.bfloat16, 0.1), (torch.float16, 0.0)]
MIXED = ["wide residual", "half", "wide x", "no residual", "wide bias"]
ORDERS = pytest.mark.parametrize("order", ["reverse", "ahead", "priority"])
ATTENTION_VARIANTS = [(torch.bfloat16, 0.0), (torch.float16, 0.1)]
# Every number of warps to a row and of accesses to a thread, whole and in part; with and without eights.
LAYERNORM_CASES = [
    *(case for case in layernorm_cases.CASES if case[0] * case[1] <= 30000),
    (5, 264, "br"),
    (9, 520, "r"),
    (3, 776, "br"),
    (13, 1000, "br"),
    (3, 1032, "br"),
    (2, 1501, "br"),
    (2, 2048, "b"),
    (2, 4095, "r"),
    (1, 8192, "br"),
    # more than registers hold
    (5, 4099, "br"),
    (2, 4097, ""),
    (4, 8200, "br"),
    (2, 9001, "r"),
]


def layernorm(emulated: Any, p: float = 0.0) -> Callable[..., Tensor]:
    seed = accuracy.seed_tensor() if p > 0 else None

    def run(
        x: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        weight, bias = leaf.in_one_dtype(weight, bias)
        return run_layernorm(emulated.leaves["layernorm"], x, weight, bias, x_bias, residual, p, 1e-5, seed)

    return run


@pytest.mark.parametrize("case", LAYERNORM_CASES, ids=lambda case: f"{case[0]}x{case[1]}-{case[2]}")
@pytest.mark.parametrize(("dtype", "p"), LAYERNORM_VARIANTS, ids=accuracy.name_of)
def test_layernorm(emulated: Any, dtype: torch.dtype, p: float, case: tuple) -> None:
    tensors = layernorm_cases.tensors_for(*case, dtype)
    references = layernorm_cases.eager(p), layernorm_cases.reference(p)
    accuracy.check_forward(layernorm(emulated, p), *references, tensors)
    accuracy.check_backward(layernorm(emulated, p), *references, tensors)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=accuracy.name_of)
@pytest.mark.parametrize("mixed", layernorm_cases.MIXED, ids=MIXED)
def test_layernorm_mixed_dtypes(emulated: Any, mixed: tuple, half: torch.dtype) -> None:
    dtypes = (half if dtype is torch.bfloat16 else dtype for dtype in mixed)
    of = dict(zip(("x", "residual", "weight", "bias", "x_bias"), dtypes, strict=True))
    residual = of["residual"]
    tensors = layernorm_cases.tensors_for(19, 384, "b" if residual is None else "br", torch.float32)
    tensors = {name: value.to(of[name]) for name, value in tensors.items()}
    references = layernorm_cases.eager(0.1), layernorm_cases.reference(0.1)
    accuracy.check_forward(layernorm(emulated, 0.1), *references, tensors)
    accuracy.check_backward(layernorm(emulated, 0.1), *references, tensors)


def test_layernorm_constant_rows(emulated: Any) -> None:
    x = (torch.randn(20, 1, generator=accuracy.generator()) * 100).expand(20, 312).contiguous()
    weight, bias = torch.ones(312), torch.randn(312, generator=accuracy.generator())
    y = run_layernorm(emulated.leaves["layernorm"], x, weight, bias, None, None, 0.0, 1e-12, None)
    torch.testing.assert_close(y, bias.expand_as(y), atol=1e-6, rtol=1e-6)


def test_layernorm_rows_constant_but_for_rounding(emulated: Any) -> None:
    tensors = layernorm_cases.constant_but_for_rounding(torch.bfloat16)
    accuracy.check_backward(layernorm(emulated), layernorm_cases.eager(), layernorm_cases.reference(), tensors)


def test_layernorm_long_constant_rows(emulated: Any) -> None:
    """In float32 a sum of so many 16-bit numbers is rounded."""
    x, weight, bias = torch.full((2, 12001), 1.999).half(), torch.ones(12001).half(), torch.zeros(12001).half()
    y = run_layernorm(emulated.leaves["layernorm"], x, weight, bias, None, None, 0.0, 1e-12, None)
    assert (y == 0).all()


@pytest.mark.parametrize(("columns", "dtype"), [(64, torch.bfloat16), (4104, torch.float32)], ids=accuracy.name_of)
def test_layernorm_where_rows_do_not_lie_on_16_bytes(emulated: Any, columns: int, dtype: torch.dtype) -> None:
    def moved(value: torch.Tensor) -> torch.Tensor:
        return torch.empty(value.numel() + 1, dtype=value.dtype)[1:].view(value.shape).copy_(value)

    def evaluate(tensors: dict[str, torch.Tensor], dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [value.requires_grad_() for value in tensors.values()]
        y = layernorm(emulated)(**tensors)
        return y, *torch.autograd.grad(y, leaves, dy)

    tensors = layernorm_cases.tensors_for(5, columns, "br", dtype)
    dy = torch.randn(5, columns, generator=accuracy.generator(3)).to(dtype)
    elsewhere = {name: moved(value) for name, value in tensors.items()}
    assert all(value.data_ptr() % 16 != 0 for value in elsewhere.values())
    torch.testing.assert_close(evaluate(elsewhere, moved(dy)), evaluate(tensors, dy))


def test_layernorm_draws_the_mask_of_the_reference(emulated: Any) -> None:
    tensors = layernorm_cases.tensors_for(6, 312, "br", torch.float32)
    ones = {"x": torch.ones(6, 312), "weight": torch.ones(312), "bias": torch.zeros(312)}
    for p in (0.1, 0.5):
        for given in (tensors, ones):
            ours = layernorm(emulated, p)(**given)
            reference = public_layernorm(
                **given, dropout_p=p, seed=accuracy.seed_tensor(), eps=1e-5, backend="reference"
            )
            torch.testing.assert_close(ours, reference)


def test_layernorm_dropout_one_keeps_the_residual(emulated: Any) -> None:
    tensors = layernorm_cases.tensors_for(5, 24, "br", torch.float32)
    alone = tensors | {"x": tensors["residual"]}
    expected = torch.nn.functional.layer_norm(alone["x"], (24,), tensors["weight"], tensors["bias"], eps=1e-5)
    torch.testing.assert_close(layernorm(emulated, 1.0)(**tensors), expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.randn(4, 16, dtype=torch.float64)}, ["x is", "float32, bfloat16 and float16"]),
        ({"weight": torch.randn(15)}, ["weight", "[15]", "[16]"]),
        ({"residual": torch.randn(3, 16)}, ["residual", "[3, 16]", "[4, 16]"]),
        ({"x": torch.randn(2, 0)}, ["x has", "[2, 0]", "1 to"]),
        ({"x": torch.randn(4, 16).bfloat16(), "residual": torch.randn(4, 16).half()}, ["bfloat16", "float16"]),
    ],
)
def test_layernorm_refuses(emulated: Any, change: dict, words: list[str]) -> None:
    given = layernorm_cases.tensors_for(4, 16, "r", torch.float32) | change
    with pytest.raises(RuntimeError) as caught:
        layernorm(emulated)(**given)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@ORDERS
@pytest.mark.parametrize(("rows", "columns"), [(17, 312), (60, 1032), (17, 4099)])
def test_layernorm_does_not_depend_on_the_order_of_threads(
    emulated: Any, rows: int, columns: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A barrier that is missing between a write and a read shows in one of the orders.

    Of 60 rows a block has several, which several warps share.
    """
    tensors = layernorm_cases.tensors_for(rows, columns, "br", torch.float32)
    upstream = torch.randn(rows, columns, generator=accuracy.generator(3))
    y, gradients = accuracy.evaluate(layernorm(emulated, 0.1), tensors, upstream)
    monkeypatch.setenv("FASTBERT_EMULATOR_ORDER", order)
    y_other, gradients_other = accuracy.evaluate(layernorm(emulated, 0.1), tensors, upstream)
    assert torch.equal(y, y_other)
    assert all(torch.equal(gradients[name], gradients_other[name]) for name in gradients)


# lengths, heads, head_dim, bias. Short sequences, which a block holds whole, and longer ones, which it shares.
ATTENTION_CASES = [
    *(case for case in attention_cases.CASES if case[2] in (32, 64, 128) and sum(case[0]) <= 200),
    ((5, 0, 17), 3, 64, "BhSS"),
    ((70, 3), 1, 128, "1hSS"),
    ((96, 40), 1, 64, "B1SS"),
    ((128,), 1, 128, None),
    ((1, 113), 2, 32, "11SS"),
    ((5, 0, 17, 9), 3, 64, "11SS"),
    ((5, 0, 17, 9), 3, 32, "111S"),
    ((140, 9), 1, 32, "B11S"),
    ((3, 129, 0, 64), 2, 64, None),
    ((130,), 1, 128, None),
]


def attention(
    emulated: Any, lengths: tuple[int, ...], p: float = 0.0, scale: float | None = None
) -> Callable[..., Tensor]:
    """The backward repeats bit for bit, unless a test runs `in_any_order`."""
    seed = accuracy.seed_tensor() if p > 0 else None

    def run(qkv: Tensor, bias: Tensor | None = None) -> Tensor:
        longest, offsets = max(lengths, default=0), attention_cases.cumulative(lengths)
        factor = qkv.size(3) ** -0.5 if scale is None else scale
        return run_attention(emulated.leaves["attention"], qkv, offsets, longest, factor, p, bias, seed, False)

    return run


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=attention_cases.case_id)
@pytest.mark.parametrize(("dtype", "p"), ATTENTION_VARIANTS, ids=accuracy.name_of)
def test_attention(emulated: Any, dtype: torch.dtype, p: float, case: tuple) -> None:
    lengths = case[0]
    tensors = attention_cases.tensors_for(*case, dtype)
    references = attention_cases.eager(lengths, p), attention_cases.reference(lengths, p)
    accuracy.check_backward(attention(emulated, lengths, p), *references, tensors)  # with the output of the one forward
    assert emulated.bank_conflicts() == 0


def test_attention_draws_the_mask_of_the_reference(emulated: Any) -> None:
    """With equal scores and one value that counts, an output tells whether one weight was dropped."""
    lengths, p = (21, 9, 130), 0.4
    for hit in (0, 3, 8, 20):
        qkv = torch.zeros(sum(lengths), 3, 2, 32, dtype=torch.bfloat16)
        for start, length in zip(attention_cases.cumulative(lengths).tolist(), lengths, strict=False):
            qkv[start + min(hit, length - 1), 2] = 1
        ours = attention(emulated, lengths, p)(qkv)
        reference = attention_cases.reference(lengths, p)(qkv)
        assert 0 < int((reference == 0).sum()) < reference.numel()
        assert torch.equal(ours == 0, reference == 0)


def test_attention_many_sequences(emulated: Any) -> None:
    """The search for a block's sequence takes more than one round beyond 32."""
    lengths = (*([1, 0, 2] * 30), 129, *([3] * 40))
    tensors = attention_cases.tensors_for(lengths, 1, 32, None, torch.bfloat16)
    references = attention_cases.eager(lengths), attention_cases.reference(lengths)
    accuracy.check_backward(attention(emulated, lengths), *references, tensors)


def test_attention_forbidden_keys(emulated: Any) -> None:
    """A query that may see no key gives 0, and no gradient is NaN."""
    lengths = (6, 70)
    tensors = attention_cases.tensors_for(lengths, 2, 32, None, torch.bfloat16)
    bias = torch.zeros(2, 1, 70, 70)
    bias[0, :, 2] = -torch.inf
    bias[1, :, :, 64:] = -torch.inf
    bias[1, :, 69, :] = -torch.inf
    qkv = tensors["qkv"].requires_grad_()
    y = attention(emulated, lengths)(qkv, bias.requires_grad_())
    expected = attention_cases.reference(lengths)(qkv, bias)
    torch.testing.assert_close(y, expected, atol=2e-2, rtol=2e-2)
    assert (y[[2, 75]] == 0).all()
    gradients = torch.autograd.grad(y.sum(), [qkv, bias])
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("lengths", [(17, 40), (130, 9)], ids=["short", "long"])
def test_attention_keys_forbidden_by_the_lowest_float(emulated: Any, lengths: tuple[int, int]) -> None:
    """Where all keys are, they share the weight alike."""
    tensors = attention_cases.tensors_for(lengths, 2, 64, None, torch.bfloat16)
    bias = torch.zeros(2, 1, max(lengths), max(lengths))
    bias[:, :, :, 5:] = torch.finfo(torch.float32).min
    bias[1, :, 3] = torch.finfo(torch.bfloat16).min
    bias[0, :, 7] = bias[0, :, 7].clamp(min=-1e4)
    run, eager = attention(emulated, lengths), attention_cases.eager(lengths)
    reference = attention_cases.reference(lengths)
    accuracy.check_backward(
        lambda qkv: run(qkv, bias), lambda qkv: eager(qkv, bias), lambda qkv: reference(qkv, bias.double()), tensors
    )


@pytest.mark.usefixtures("hopper")
def test_attention_hopper_keys_forbidden_by_the_lowest_float(emulated: Any) -> None:
    test_attention_keys_forbidden_by_the_lowest_float(emulated, (130, 9))


@functools.cache
def attention_in_order(
    emulated: Any, lengths: tuple[int, ...], head_dim: int, bias: str | None, order: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and the gradients that a kernel has when its threads run in some order."""
    tensors = attention_cases.tensors_for(lengths, 2, head_dim, bias, torch.bfloat16)
    upstream = torch.randn(sum(lengths), 2 * head_dim, generator=accuracy.generator(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTBERT_EMULATOR_ORDER", order)
        return accuracy.evaluate(attention(emulated, lengths, 0.1), tensors, upstream)


@ORDERS
@pytest.mark.parametrize(
    ("lengths", "bias"), [((17, 40), "111S"), ((128, 70), "11SS"), ((130, 3), "11SS")], ids=["short", "full", "long"]
)
def test_attention_does_not_depend_on_the_order_of_threads(
    emulated: Any, lengths: tuple[int, ...], bias: str, order: str
) -> None:
    y, gradients = attention_in_order(emulated, lengths, 64, bias, "forward")
    y_other, gradients_other = attention_in_order(emulated, lengths, 64, bias, order)
    assert torch.equal(y, y_other)
    assert all(torch.equal(gradients[name], gradients_other[name]) for name in gradients)


@pytest.mark.parametrize("capability", ["80", "90"])
@pytest.mark.parametrize(("longest", "promised"), [(30, 20), (150, 140)], ids=["short", "long"])
def test_attention_cuts_what_is_longer_than_promised(
    emulated: Any, longest: int, promised: int, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it would look past a row of the bias, and past its end, and write past the gradients of the scores."""
    monkeypatch.setenv("FASTBERT_EMULATOR_CAPABILITY", capability)
    qkv = attention_cases.tensors_for((longest, 5), 1, 32, None, torch.bfloat16)["qkv"]
    kept = torch.arange(longest + 5) % longest < promised
    behind = torch.full((2 * promised + longest, promised), torch.nan)
    behind[: 2 * promised] = torch.randn(2 * promised, promised, generator=accuracy.generator(1))
    bias = behind[: 2 * promised].view(2, 1, promised, promised)

    def results(qkv: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
        leaves, offsets = [qkv.requires_grad_(), bias.requires_grad_()], attention_cases.cumulative(lengths)
        y = run_attention(emulated.leaves["attention"], qkv, offsets, promised, 0.2, 0.0, bias, None, False)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    y, dqkv, dbias = results(qkv.clone(), (longest, 5))
    expected = results(qkv[kept], (promised, 5))
    assert torch.equal(y[kept], expected[0])
    assert torch.equal(dqkv[kept], expected[1])
    assert torch.equal(dbias, expected[2])


@pytest.mark.parametrize("capability", ["80", "90"])
@pytest.mark.parametrize("total", [60, 200], ids=["short", "long"])
def test_attention_stays_inside_whatever_the_offsets_are(
    emulated: Any, total: int, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is read before the offsets, and none that lies beyond the tokens leads there."""
    monkeypatch.setenv("FASTBERT_EMULATOR_CAPABILITY", capability)
    qkv = attention_cases.tensors_for((total,), 1, 32, None, torch.bfloat16)["qkv"]

    def results(offsets: list[int], before: int = -7) -> tuple[Tensor, ...]:
        given = torch.tensor([before, *offsets], dtype=torch.int32)[1:]
        leaf_qkv = qkv.clone().requires_grad_()
        y = run_attention(emulated.leaves["attention"], leaf_qkv, given, total, 0.2, 0.0, None, None, True)
        return y, *torch.autograd.grad(y, leaf_qkv, torch.ones_like(y))

    def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...], first: int = 0) -> bool:
        return all(torch.equal(a[first:], b[first:]) for a, b in zip(one, other, strict=True))

    assert same(results([0, 40, total + 1000]), results([0, 40, total]))
    assert same(results([-50, 40, total]), results([0, 40, total]))
    late = [total // 2, total - 10, total]
    assert same(results(late), results(late, before=10), first=late[0])  # nobody writes the tokens before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"qkv": torch.randn(9, 3, 1, 32)}, ["Float", "bfloat16 and float16"]),
        ({"qkv": torch.randn(9, 3, 1, 40).bfloat16()}, ["head_dim 40", "32, 64 or 128"]),
        ({"bias": torch.zeros(1, 1, 1, 8)}, ["bias", "[1, 1, 1, 8]", "9 or more"]),
    ],
)
def test_attention_refuses(emulated: Any, change: dict, words: list[str]) -> None:
    given = {"qkv": torch.randn(9, 3, 1, 32).bfloat16()} | change
    with pytest.raises(RuntimeError) as caught:
        attention(emulated, (9,))(**given)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(("offsets", "longest"), [([0], 9), ([0, 9], 0)])
def test_attention_refuses_tokens_outside_all_sequences(emulated: Any, offsets: list[int], longest: int) -> None:
    qkv, cu_seqlens = torch.randn(9, 3, 1, 32).bfloat16(), torch.tensor(offsets, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=f"max_seqlen is {longest}, which leaves no room for the 9 tokens"):
        run_attention(emulated.leaves["attention"], qkv, cu_seqlens, longest, 1.0, 0.0, None, None, False)


# For compute capability 9.0: tiles of keys that fill the rings of buffers several times or never, sequences that end
# in the first half of a tile, in the second or with it, and more to do than there are blocks (the emulator has three).
HOPPER_CASES = [
    *(case for case in ATTENTION_CASES if max(case[0], default=0) > 128),
    ((512,), 1, 64, None),
    ((70, 257, 1, 0, 128), 2, 32, "1h1S"),
    ((130, 200, 5), 2, 128, "BhSS"),
    ((385, 129, 256), 2, 64, None),
    ((600,), 1, 128, None),
    ((650, 3), 1, 64, "B1SS"),
    ((257, 70, 1, 0, 128), 2, 32, None),
    ((130, 200, 5), 2, 128, None),
    ((401,), 1, 64, None),
]


@pytest.fixture
def hopper(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU of compute capability 9.0; and it was not another kernel that ran."""
    monkeypatch.setenv("FASTBERT_EMULATOR_CAPABILITY", "90")
    emulated.boxes()
    yield
    assert emulated.boxes() > 0


@pytest.fixture
def in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """`poisoned_memory` asks for a deterministic backward, too. Here nothing does, and memory stays poisoned."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)


@pytest.mark.usefixtures("hopper", "in_any_order")
@pytest.mark.parametrize("case", HOPPER_CASES, ids=attention_cases.case_id)
@pytest.mark.parametrize(("dtype", "p"), ATTENTION_VARIANTS, ids=accuracy.name_of)
def test_attention_hopper(emulated: Any, dtype: torch.dtype, p: float, case: tuple) -> None:
    test_attention(emulated, dtype, p, case)


@pytest.mark.usefixtures("hopper")
def test_attention_hopper_draws_the_mask_of_the_reference(emulated: Any) -> None:
    test_attention_draws_the_mask_of_the_reference(emulated)


@pytest.mark.parametrize("how", ["", "deterministic", "bias"])
def test_attention_hopper_backward(emulated: Any, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It adds in any order: another one runs where bits are to repeat. That one takes a bias, too."""
    monkeypatch.setenv("FASTBERT_EMULATOR_CAPABILITY", "90")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: how == "deterministic")
    lengths = (160, 9)
    tensors = attention_cases.tensors_for(lengths, 1, 32, "11SS" if how == "bias" else None, torch.bfloat16)
    references = attention_cases.eager(lengths), attention_cases.reference(lengths)
    run = attention(emulated, lengths)
    emulated.boxes()
    run(**tensors)
    forward = emulated.boxes()
    accuracy.check_backward(run, *references, tensors)
    assert (emulated.boxes() > forward) == (how == "")


@pytest.mark.usefixtures("hopper", "in_any_order")
def test_attention_hopper_many_sequences(emulated: Any) -> None:
    test_attention_many_sequences(emulated)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("head_dim", [32, 128])
def test_attention_hopper_forbidden_keys(emulated: Any, head_dim: int) -> None:
    """Of a whole tile, and all keys of a query."""
    lengths = (300, 40)
    tensors = attention_cases.tensors_for(lengths, 1, head_dim, None, torch.float16)
    bias = torch.zeros(2, 1, 300, 300)
    bias[0, :, :, :130] = -torch.inf
    bias[:, :, 33] = -torch.inf
    y = attention(emulated, lengths)(tensors["qkv"], bias)
    expected = attention_cases.reference(lengths)(tensors["qkv"], bias)
    torch.testing.assert_close(y, expected, atol=5e-3, rtol=5e-3)
    assert (y[[33, 333]] == 0).all()


@pytest.mark.usefixtures("hopper", "in_any_order")
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("order", ["forward", "priority", "late1", "late2"])
def test_attention_hopper_does_not_look_at_other_sequences(
    emulated: Any, head_dim: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the boxes that bring rows reach into them, and buffers keep what they had before.

    The first sequence that is good has what is infinite behind it, the other one what is not a number, or it is the
    other way round.
    """
    lengths = (130, 9, 300, 90)
    bad = (torch.inf, torch.nan) if order in ("forward", "late1") else (torch.nan, torch.inf)
    tensors = attention_cases.tensors_for(lengths, 2, head_dim, None, torch.float16)
    upstream = torch.randn(529, 2 * head_dim, generator=accuracy.generator(3)).half()
    monkeypatch.setenv("FASTBERT_EMULATOR_ORDER", order)
    expected, gradients = accuracy.evaluate(attention(emulated, lengths), tensors, upstream)
    spoilt, spoilt_upstream = tensors["qkv"].clone(), upstream.clone()
    for rows in (spoilt, spoilt_upstream):
        rows[130:139], rows[439:] = bad
    y, spoilt_gradients = accuracy.evaluate(attention(emulated, lengths), {"qkv": spoilt}, spoilt_upstream)
    for ours, good in ((y, expected), (spoilt_gradients["qkv"], gradients["qkv"])):
        assert torch.equal(ours[:130], good[:130])
        assert torch.equal(ours[139:439], good[139:439])
        assert ours[130:139].isnan().all()


@pytest.mark.usefixtures("hopper", "in_any_order")
@pytest.mark.parametrize("scale", [0.3, 0.0, -0.2])
def test_attention_hopper_scale(emulated: Any, scale: float) -> None:
    lengths = (150, 7)
    tensors = attention_cases.tensors_for(lengths, 2, 64, None, torch.bfloat16)
    offsets, stock = attention_cases.cumulative(lengths), attention_cases.eager(lengths)  # whose scale is 1/8

    def eager(qkv: Tensor) -> Tensor:
        return stock(torch.cat([qkv[:, :1] * (8 * scale), qkv[:, 1:]], 1))

    def reference(qkv: Tensor) -> Tensor:
        return attention_ref(qkv, offsets, 150, scale)

    accuracy.check_backward(attention(emulated, lengths, scale=scale), eager, reference, tensors)


LATE = [f"late{warp}" for warp in (0, 1, 2, 4, 9)]  # those that load and prepare, one of each group that multiplies


@pytest.mark.usefixtures("hopper", "in_any_order")
@pytest.mark.parametrize("order", ["reverse", "ahead", "priority", *LATE])
@pytest.mark.parametrize(("lengths", "head_dim"), [((130, 3, 250), 64), ((256, 200), 128)])
def test_attention_hopper_does_not_depend_on_the_order_of_threads(
    emulated: Any, lengths: tuple[int, ...], head_dim: int, order: str
) -> None:
    """Two blocks add up the gradient of a query, and two numbers have one sum in either order."""
    y, gradients = attention_in_order(emulated, lengths, head_dim, None, "forward")
    y_other, gradients_other = attention_in_order(emulated, lengths, head_dim, None, order)
    assert torch.equal(y, y_other)
    assert torch.equal(gradients["qkv"], gradients_other["qkv"])


# Rows in one tile and in several, whole and in part; CUTLASS's own product is a plain loop here.
FFN_CASES = [
    *(case for case in ffn_cases.CASES if ffn_cases.in_eights(case) and case[0] * case[1] * case[2] <= 3_000_000),
    (129, 96, 16, 40),
    (300, 16, 136, 8),
]


def ffn(emulated: Any) -> Callable[..., Tensor]:
    return lambda x, weight1, bias1, weight2: run_ffn(emulated.leaves["ffn"], x, weight1, bias1, weight2)


@pytest.mark.parametrize("case", FFN_CASES, ids=lambda case: "x".join(map(str, case)))
@pytest.mark.parametrize(
    ("dtype", "capability"),
    [(torch.bfloat16, "80"), (torch.float16, "80"), (torch.bfloat16, "90")],
    ids=accuracy.name_of,
)
def test_ffn(emulated: Any, dtype: torch.dtype, capability: str, case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTBERT_EMULATOR_CAPABILITY", capability)
    tensors = ffn_cases.tensors_for(*case, dtype)
    accuracy.check_forward(ffn(emulated), ffn_cases.eager, ffn_ref, tensors)
    accuracy.check_backward(ffn(emulated), ffn_cases.eager, ffn_ref, tensors)


def test_ffn_gelu_everywhere(emulated: Any) -> None:
    """The epilogues, from deep in the left tail over the zero to far right: a product with one in place of a matrix."""
    values = torch.cat([torch.linspace(-14, 14, 2000), torch.tensor([-1e4, -88.0, -0.0, 1e-30, 88.0, 1e4, 1.0, 2.0])])
    x = torch.zeros(values.numel(), 8, dtype=torch.bfloat16)
    x[:, 0] = values
    one = torch.zeros(8, 8, dtype=torch.bfloat16)
    one[0, 0] = 1
    tensors = {"x": x, "weight1": one, "bias1": torch.zeros(8, dtype=torch.bfloat16), "weight2": one}
    accuracy.check_forward(ffn(emulated), ffn_cases.eager, ffn_ref, tensors)
    accuracy.check_backward(ffn(emulated), ffn_cases.eager, ffn_ref, tensors)


@ORDERS
@pytest.mark.parametrize("capability", ["80", "90"])
def test_ffn_does_not_depend_on_the_order_of_threads(
    emulated: Any, capability: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTBERT_EMULATOR_CAPABILITY", capability)
    tensors = ffn_cases.tensors_for(1300, 8, 40, 8, torch.bfloat16)
    upstream = torch.randn(1300, 8, generator=accuracy.generator(3))
    _, gradients = accuracy.evaluate(ffn(emulated), tensors, upstream)
    monkeypatch.setenv("FASTBERT_EMULATOR_ORDER", order)
    _, other = accuracy.evaluate(ffn(emulated), tensors, upstream)
    assert torch.equal(gradients["bias1"], other["bias1"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.randn(4, 16)}, ["Float", "bfloat16 and float16"]),
        (
            {"x": torch.randn(4, 12).bfloat16(), "weight1": torch.randn(32, 12).bfloat16()},
            ["[4, 12]", "multiples of 8"],
        ),
        ({"weight1": torch.randn(32, 24).bfloat16()}, ["w1", "[32, 24]"]),
        ({"bias1": torch.randn(24).bfloat16()}, ["b1", "[24]", "[32]"]),
    ],
)
def test_ffn_refuses(emulated: Any, change: dict, words: list[str]) -> None:
    with pytest.raises(RuntimeError) as caught:
        ffn(emulated)(**(ffn_cases.tensors_for(4, 16, 32, 16, torch.bfloat16) | change))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("op", ["attention", "ffn"])
def test_any_address(emulated: Any, op: str) -> None:
    """Parts of larger tensors, which do not begin at a multiple of 16 bytes."""
    tensors = {"qkv": torch.randn(9, 3, 1, 32).bfloat16()}
    if op == "ffn":
        tensors = ffn_cases.tensors_for(4, 16, 32, 16, torch.bfloat16)
    run = attention(emulated, (9,)) if op == "attention" else ffn(emulated)

    def results(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = {name: place(value).requires_grad_() for name, value in tensors.items()}
        y = run(**leaves)
        return [y, *torch.autograd.grad(y, list(leaves.values()), place(torch.ones_like(y)))]

    def behind_one(value: Tensor) -> Tensor:
        return torch.cat([value.new_zeros(1), value.flatten()])[1:].view(value.shape)

    for one, other in zip(results(behind_one), results(torch.clone), strict=True):
        assert torch.equal(one, other)
