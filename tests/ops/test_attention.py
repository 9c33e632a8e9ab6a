from __future__ import annotations

import functools
import importlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable

import accuracy
import pytest
import torch
from properties import given, settings, st
from torch import Tensor

from fastbert import dispatch, ops
from fastbert.ops import philox
from fastbert.ops.attention import attention_ref

# lengths, heads, head_dim, bias shape: B, h, S as in the op's docstring, 1 where it broadcasts
CASES = [
    ((1,), 4, 8, None),
    ((1, 1, 1), 2, 32, None),
    ((7,), 3, 40, None),
    ((13, 1, 30), 2, 64, None),
    ((5, 0, 9), 2, 32, None),
    ((0, 3, 0), 1, 64, None),
    ((15, 16, 17), 2, 32, None),
    ((31, 32, 33), 1, 128, None),
    ((63, 64, 65), 2, 32, None),
    ((63, 64, 65), 1, 64, None),
    ((127, 128, 129), 1, 32, None),
    ((512,), 1, 64, None),
    ((511, 2), 2, 32, None),
    ((), 2, 32, None),
    ((0,), 2, 32, None),
    ((9, 4), 2, 32, "BhSS"),
    ((9, 4), 2, 32, "11SS"),
    ((5, 0, 17), 3, 8, "B11S"),
    ((33, 65), 2, 64, "1h1S"),
    ((70, 3), 2, 40, "1hSS"),
    ((64, 130), 1, 32, "B1SS"),
    ((131, 37), 1, 32, "B1SS"),
    ((70, 5), 1, 128, "1hSS"),
    ((70, 67), 1, 72, None),
    ((20, 131), 1, 26, "B11S"),
    ((9, 70), 2, 13, None),
]


def cumulative(lengths: tuple[int, ...], device: str | torch.device = "cpu") -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def tensors_for(
    lengths: tuple[int, ...],
    heads: int,
    head_dim: int,
    bias: str | None,
    dtype: torch.dtype,
    backend: str | None = None,
    spare: int = 0,
) -> dict[str, Tensor]:
    random = accuracy.generator(sum(lengths) + head_dim)
    tensors = {"qkv": (torch.randn(sum(lengths), 3, heads, head_dim, generator=random) * 1.5).to(dtype)}
    if bias is not None:
        size = {"B": len(lengths), "h": heads, "S": max(lengths) + spare, "1": 1}
        tensors["bias"] = torch.randn([size[letter] for letter in bias], generator=random)
    return accuracy.to_device(backend, tensors)


def ours(backend: str, lengths: tuple[int, ...], p: float = 0.0) -> Callable[..., Tensor]:
    seed = accuracy.seed_tensor(accuracy.device(backend)) if p > 0 else None
    return lambda qkv, bias=None, **more: ops.attention(
        qkv,
        cumulative(lengths, qkv.device),
        max(lengths, default=0),
        bias=bias,
        dropout_p=p,
        seed=seed,
        backend=backend,
        **more,
    )


def eager(lengths: tuple[int, ...], p: float = 0.0) -> Callable[..., Tensor]:
    """The formula, sequence by sequence, in the dtype of qkv."""

    def run(qkv: Tensor, bias: Tensor | None = None) -> Tensor:
        outputs = [qkv[:0, 0].flatten(1)]
        for i, (start, end) in enumerate(itertools.pairwise(cumulative(lengths).tolist())):
            length = end - start
            query, key, value = qkv[start:end].permute(1, 2, 0, 3)  # [h, S, d]
            scores = query @ key.transpose(1, 2) * qkv.size(3) ** -0.5
            if bias is not None:
                scores = scores + bias[i if bias.size(0) > 1 else 0, :, :length, :length].to(qkv.dtype)
            probabilities = torch.softmax(scores, -1)
            if p > 0:
                token = torch.arange(start, end, device=qkv.device)[None]
                keep = philox.keep_attention(accuracy.seed_tensor(qkv.device), p, token, qkv.size(2), length)[0]
                probabilities = probabilities * keep / (1 - p)
            outputs.append((probabilities @ value).transpose(0, 1).flatten(1))
        return torch.cat(outputs)

    return run


def reference(lengths: tuple[int, ...], p: float = 0.0) -> Callable[..., Tensor]:
    def run(qkv: Tensor, bias: Tensor | None = None) -> Tensor:
        cu_seqlens, seed = cumulative(lengths, qkv.device), accuracy.seed_tensor(qkv.device)
        return attention_ref(qkv, cu_seqlens, max(lengths, default=0), bias=bias, dropout_p=p, seed=seed)

    return run


def case_id(case: tuple) -> str:
    lengths, heads, head_dim, bias = case
    return f"{'+'.join(map(str, lengths)) or 'none'}-{heads}x{head_dim}{'-' + bias if bias else ''}"


table = functools.partial(
    accuracy.table,
    "attention",
    CASES,
    cost=lambda case: sum(n * n for n in case[0]) * case[1] * case[2] * 1e-6,
    ids=case_id,
)
typed = accuracy.typed("attention")
backends = accuracy.backends("attention")


def test_attention_compiled_for_any_batch_takes_a_bias_of_each_sequence() -> None:
    run = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    for batch, biased in ((3, False), (5, False), (3, True), (4, True)):
        qkv = torch.randn(batch * 8, 3, 2, 16, generator=accuracy.generator())
        bias = torch.randn(batch, 1, 1, 8, generator=accuracy.generator()) if biased else None
        given = qkv, cumulative((8,) * batch), 8, None, 0.0, bias
        torch.testing.assert_close(run(*given), ops.attention(*given))


@pytest.fixture
def any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """`poisoned_memory` asks for a deterministic backward, too. Here nothing does, and memory stays poisoned."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)


@table(dropouts=(0.0, 0.1))
def test_attention_fwd(backend: str, dtype: torch.dtype, p: float, case: tuple) -> None:
    accuracy.require("attention", backend, dtype, case[2])
    lengths = case[0]
    accuracy.check_forward(
        ours(backend, lengths, p), eager(lengths, p), reference(lengths, p), tensors_for(*case, dtype, backend)
    )


@table(dropouts=(0.1, 0.0))
@pytest.mark.usefixtures("any_order")
def test_attention_bwd(backend: str, dtype: torch.dtype, p: float, case: tuple) -> None:
    accuracy.require("attention", backend, dtype, case[2])
    lengths = case[0]
    accuracy.check_backward(
        ours(backend, lengths, p), eager(lengths, p), reference(lengths, p), tensors_for(*case, dtype, backend)
    )


@pytest.mark.usefixtures("any_order")
@pytest.mark.parametrize(
    ("dtype", "how"), [(torch.bfloat16, "argument"), (torch.float16, "setting")], ids=["argument", "setting"]
)
@pytest.mark.parametrize(
    "backend", [name for name in accuracy.backends_of("attention") if name in accuracy.GPU_BACKENDS]
)
@pytest.mark.parametrize(("head_dim", "bias"), [(32, None), (32, "1hSS"), (128, "B11S")], ids=["", "bias", "128-bias"])
def test_attention_bwd_deterministic(
    backend: str, dtype: torch.dtype, how: str, head_dim: int, bias: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right, the same bits every time, and on triton without the kernel that adds in any order."""
    accuracy.require("attention", backend, dtype, head_dim)
    lengths = (130 if bias is None else 70,) if accuracy.interpreted(backend) else (130, 700)
    tensors = tensors_for(lengths, 1, head_dim, bias, dtype, backend)
    run = ours(backend, lengths, 0.1)
    if how == "argument":
        run = functools.partial(run, deterministic=True)
    else:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    if backend == "triton":
        configs = importlib.import_module("fastbert.kernels.configs")
        configs.choose.cache_clear()
        configs.used.clear()
    accuracy.check_backward(run, eager(lengths, 0.1), reference(lengths, 0.1), tensors)
    if backend == "triton":
        kernels = {kernel for kernel, _ in configs.used} - {"attention_bwd_dbias"}
        assert kernels == {"attention_fwd", "attention_bwd_dq", "attention_bwd_dkdv"}
    upstream = torch.randn(sum(lengths), head_dim, generator=accuracy.generator(1)).to(tensors["qkv"])
    one, other = (accuracy.evaluate(run, tensors, upstream)[1]["qkv"] for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.skipif(not accuracy.interpreted("triton"), reason="a GPU has the tiles of its own architecture")
@pytest.mark.usefixtures("any_order")
@pytest.mark.parametrize("head_dim", [64, 40])
@pytest.mark.parametrize("arch", [90, 100])
def test_attention_tiles_of_other_architectures(
    arch: int, head_dim: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter takes those of sm_80."""
    pytest.importorskip("triton")
    dtype, lengths = torch.bfloat16, (131, 37)
    accuracy.require("attention", "triton", dtype, head_dim)
    configs = importlib.import_module("fastbert.kernels.configs")
    monkeypatch.setattr(configs, "architecture", lambda device: arch)
    request.addfinalizer(configs.choose.cache_clear)
    configs.used.clear()
    configs.choose.cache_clear()
    accuracy.check_backward(
        ours("triton", lengths, 0.1),
        eager(lengths, 0.1),
        reference(lengths, 0.1),
        tensors_for(lengths, 1, head_dim, None, dtype, "triton"),
    )
    shape_class = "d64" if head_dim == 64 else "d64-padded"
    assert configs.used["attention_bwd", shape_class] == configs.table(arch)["attention_bwd"][shape_class]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 80), max_size=5).map(tuple),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 18).map(lambda n: 8 * n),
    bias=st.sampled_from([None, None, "BhSS", "1h1S", "B11S", "11SS"]),
    p=st.sampled_from([0.0, 0.1, 0.6]),
    dtype=st.sampled_from(accuracy.DTYPES),
)
def test_attention_any_shape(
    lengths: tuple[int, ...], heads: int, head_dim: int, bias: str | None, p: float, dtype: torch.dtype
) -> None:
    accuracy.require("attention", "cpu", dtype, head_dim)
    tensors = tensors_for(lengths, heads, head_dim, bias if any(lengths) else None, dtype)
    accuracy.check_backward(ours("cpu", lengths, p), eager(lengths, p), reference(lengths, p), tensors)


@backends
def test_attention_bias_larger_than_needed(backend: str) -> None:
    """Rows and columns of the bias past the longest sequence are not looked at, and get a zero gradient."""
    accuracy.require("attention", backend, torch.float32, 32)
    lengths = (9, 4)
    tensors = tensors_for(lengths, 2, 32, "BhSS", torch.float32, backend, spare=3)
    accuracy.check_backward(ours(backend, lengths), eager(lengths), reference(lengths), tensors)


@pytest.mark.parametrize(
    "backend", [name for name in accuracy.backends_of("attention") if not accuracy.interpreted(name)]
)
def test_attention_bias_of_many_queries(backend: str) -> None:
    """Its gradient is a sum of so many numbers that their order, and what rounding takes from it, tell."""
    accuracy.require("attention", backend, torch.float32, 8)
    lengths = (32,) * 64
    tensors = tensors_for(lengths, 12, 8, "111S", torch.float32, backend)

    def eager_(qkv: Tensor, bias: Tensor) -> Tensor:
        query, key, value = qkv.view(64, 32, 3, 12, 8).permute(2, 0, 3, 1, 4)
        probabilities = torch.softmax(query @ key.transpose(2, 3) * 8**-0.5 + bias, -1)
        return (probabilities @ value).transpose(1, 2).flatten(2).flatten(0, 1)

    accuracy.check_backward(ours(backend, lengths), eager_, reference(lengths), tensors)


@backends
def test_attention_bias_without_tokens(backend: str) -> None:
    accuracy.require("attention", backend, torch.float32, 32)
    bias = torch.randn(1, 2, 1, 1, device=accuracy.device(backend), requires_grad=True)
    qkv = torch.randn(0, 3, 2, 32, device=bias.device)
    (gradient,) = torch.autograd.grad(ours(backend, (0, 0))(qkv, bias).sum(), bias)
    assert torch.equal(gradient, torch.zeros_like(bias))


@backends
def test_attention_expanded_bias(backend: str) -> None:
    """A mask as Hugging Face expands it, [B, 1, S, S] with strides of 0, gives the same, gradient included."""
    accuracy.require("attention", backend, torch.float32, 32)
    lengths = (9, 4)
    tensors = tensors_for(lengths, 2, 32, "B11S", torch.float32, backend)
    ours_, reference_ = ours(backend, lengths), reference(lengths)
    expand = lambda bias: bias.expand(-1, 2, 9, -1)  # noqa: E731
    accuracy.check_backward(
        lambda qkv, bias: ours_(qkv, expand(bias)), eager(lengths), lambda qkv, bias: reference_(qkv, bias), tensors
    )


@backends
@pytest.mark.parametrize("is_leaf", [False, True])
def test_attention_gradient_of_the_expanded_bias(is_leaf: bool, backend: str) -> None:
    """Not of what it was expanded from: each place has its own."""
    accuracy.require("attention", backend, torch.float32, 32)
    lengths = (9, 4)
    tensors = tensors_for(lengths, 2, 32, "11SS", torch.float32, backend)
    gradients = []
    for run in (ours(backend, lengths), reference(lengths)):
        bias = tensors["bias"].requires_grad_(not is_leaf).expand(2, 2, -1, -1).requires_grad_()
        gradients.append(torch.autograd.grad(run(tensors["qkv"], bias).square().sum(), bias)[0])
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@backends
def test_attention_of_a_low_bias(backend: str) -> None:
    """A softmax does not change if all scores fall alike, as far as float32 can tell them apart."""
    accuracy.require("attention", backend, torch.float32, 32)
    lengths = (20, 12)
    tensors = tensors_for(lengths, 2, 32, None, torch.float32, backend)
    bias = torch.full((2, 1, 20, 20), -(2.0**18), device=accuracy.device(backend))

    def with_bias(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda qkv: run(qkv, bias)

    accuracy.check_backward(
        with_bias(ours(backend, lengths)), with_bias(eager(lengths)), with_bias(reference(lengths)), tensors
    )


@typed
@pytest.mark.parametrize("length", [12, 600], ids=["short", "long"])
def test_attention_masking_bias(backend: str, dtype: torch.dtype, length: int) -> None:
    """-inf and the lowest float both forbid keys. Where all are, by the lowest float they share the weight alike, by
    -inf the query gives 0 and passes no gradient on."""
    accuracy.require("attention", backend, dtype, 32)
    lengths = (20, min(length, 140) if accuracy.interpreted(backend) else length)  # by tiles in any case
    tensors = tensors_for(lengths, 2, 32, None, dtype, backend)
    bias = torch.zeros(2, 1, max(lengths), max(lengths), device=accuracy.device(backend))
    bias[0, :, :, 5:9] = -torch.inf
    bias[1, :, :, 3:] = torch.finfo(torch.float32).min
    bias[1, :, 5] = torch.finfo(dtype).min
    run, eager_, reference_ = ours(backend, lengths), eager(lengths), reference(lengths)
    accuracy.check_backward(
        lambda qkv: run(qkv, bias), lambda qkv: eager_(qkv, bias), lambda qkv: reference_(qkv, bias.double()), tensors
    )

    bias[0, :, 4] = -torch.inf
    qkv = tensors["qkv"].clone().requires_grad_()
    out = run(qkv, bias)
    out.float().square().sum().backward()
    assert (out[4] == 0).all()
    assert torch.isfinite(out).all()
    assert torch.isfinite(qkv.grad).all()
    assert (qkv.grad[4, 0] == 0).all()


@backends
def test_attention_large_scores(backend: str) -> None:
    """Scores far beyond what exp can take."""
    accuracy.require("attention", backend, torch.float32, 32)
    tensors = tensors_for((33,), 2, 32, None, torch.float32, backend)
    tensors["qkv"] = tensors["qkv"] * 40
    accuracy.check_backward(ours(backend, (33,)), eager((33,)), reference((33,)), tensors)


def test_attention_few_tokens_with_a_sharp_softmax() -> None:
    """PyTorch sums the scores of so few in several chains, whose rounding errors are those of shorter sums."""
    accuracy.require("attention", "cpu", torch.float32, 64)
    lengths = (7,) * 60
    tensors = tensors_for(lengths, 1, 64, None, torch.float32, "cpu")
    tensors["qkv"] = tensors["qkv"] * 3
    accuracy.check_backward(ours("cpu", lengths), eager(lengths), reference(lengths), tensors)


@pytest.mark.parametrize("lengths", [(3,), (2, 0), (1, 40, 1)], ids=lambda lengths: "+".join(map(str, lengths)))
@pytest.mark.parametrize("bias", [None, "B11S", "1hSS"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=accuracy.name_of)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_attention_few_tokens(backend: str, dtype: torch.dtype, bias: str | None, lengths: tuple[int, ...]) -> None:
    """Gradients of scores that are 0, or next to it, as few keys share the weight: with dropout and each one by itself.

    CUDA C++ takes their sums from the rounded output.
    """
    accuracy.require("attention", backend, dtype, 32)
    tensors = tensors_for(lengths, 2, 32, bias, dtype, backend)
    query, key, value = tensors.pop("qkv").unbind(1)

    def apart(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda query, key, value, **more: run(torch.stack([query, key, value], 1), **more)

    runs = (apart(run(lengths, 0.1)) for run in (functools.partial(ours, backend), eager, reference))
    accuracy.check_backward(*runs, {"query": query, "key": key, "value": value} | tensors)


@pytest.mark.usefixtures("any_order")
@pytest.mark.parametrize(
    ("lengths", "score", "deterministic"),
    [
        ((131, 5), -1e4, False),
        ((131, 5), -3e4, False),
        ((131, 5), -3e4, True),
        ((33, 7), -1e4, False),
        ((33, 7), -3e4, False),
    ],
    ids=["long-1e4", "long-3e4", "deterministic", "short-1e4", "short-3e4"],
)
@typed
def test_attention_very_negative_scores(
    backend: str, dtype: torch.dtype, lengths: tuple[int, ...], score: float, deterministic: bool
) -> None:
    """A tile of keys that reaches past the sequence has scores of 0 there, far above those of the keys there are.

    A score in common to all keys changes neither the output nor, but for the place that it comes from, the gradients:
    eager is given the tensors without it, so that only what it costs a float32 score in digits is allowed for.
    """
    accuracy.require("attention", backend, dtype, 32)
    tensors = tensors_for(lengths, 1, 32, None, dtype, backend)
    tensors["qkv"][:, :2, :, 0] = 0
    shifted = {"qkv": tensors["qkv"].clone()}
    shifted["qkv"][:, 0, :, 0] = 512
    shifted["qkv"][:, 1, :, 0] = score * 32**0.5 / 512
    run = functools.partial(ours(backend, lengths), deterministic=deterministic)
    upstream = torch.randn(sum(lengths), 32, generator=accuracy.generator(99)).to(tensors["qkv"])
    y, gradients = accuracy.evaluate(run, shifted, upstream)
    y_eager, gradients_eager = accuracy.evaluate(eager(lengths), tensors, upstream)
    y_truth, gradients_truth = accuracy.evaluate(reference(lengths), accuracy.double(shifted), upstream.double())
    everything = (gradients["qkv"], gradients_eager["qkv"], gradients_truth["qkv"])
    assert torch.isfinite(everything[0]).all()
    for name, result, plain, truth in (
        ("output", y, y_eager, y_truth),
        ("gradient", *(gradient[..., 1:] for gradient in everything)),
    ):
        error, error_eager = ((value.double() - truth).abs().max() for value in (result, plain))
        digits = torch.finfo(dtype).eps - score * 2 * torch.finfo(torch.float32).eps
        allowed = 3 * error_eager + digits * truth.abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.usefixtures("any_order")
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("longest", [65, 129], ids=["short", "long"])
@backends
def test_attention_keeps_sequences_apart(backend: str, longest: int, deterministic: bool) -> None:
    """What overflows in one sequence leaves its neighbours as they are, though their tiles overlap."""
    dtype, lengths = torch.bfloat16, (65, 9, 33)
    accuracy.require("attention", backend, dtype, 32)
    qkv = tensors_for(lengths, 2, 32, None, dtype, backend)["qkv"]
    upstream = torch.randn(sum(lengths), 64, generator=accuracy.generator(99)).to(qkv)
    cu_seqlens = cumulative(lengths, qkv.device)

    def run(qkv: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        more = {"backend": backend, "deterministic": deterministic}
        y, gradients = accuracy.evaluate(
            lambda qkv: ops.attention(qkv, cu_seqlens, longest, **more), {"qkv": qkv}, upstream
        )
        return y, gradients["qkv"]

    expected = run(qkv, upstream)
    bad, others = slice(65, 74), [*range(65), *range(74, 107)]
    qkv[bad], upstream[bad] = torch.nan, torch.inf
    for name, result, wanted in zip(("output", "gradient"), run(qkv, upstream), expected, strict=True):
        torch.testing.assert_close(result[others], wanted[others], msg=lambda text, name=name: f"{name}: {text}")


def test_attention_bwd_sharp_softmax() -> None:
    """Where one key has nearly all the weight, P - sum(P) is what is left of digits that a log-sum-exp has lost."""
    accuracy.require("attention", "cpu", torch.float32, 32)
    lengths = (5, 2, 9) * 160  # so many that a largest error is no chance
    tensors = tensors_for(lengths, 2, 32, None, torch.float32)
    tensors["qkv"] = tensors["qkv"] * 4
    accuracy.check_backward(ours("cpu", lengths), eager(lengths), reference(lengths), tensors)


@typed
@pytest.mark.parametrize("length", [6, 140], ids=["short", "long"])
def test_attention_scale_of_zero(backend: str, dtype: torch.dtype, length: int) -> None:
    """Every key has the same weight."""
    accuracy.require("attention", backend, dtype, 32)
    qkv = tensors_for((length,), 2, 32, None, dtype, backend)["qkv"]
    y = ops.attention(qkv, cumulative((length,)).to(qkv.device), length, 0.0, backend=backend)
    expected = qkv[:, 2].flatten(1).float().mean(0).expand(length, -1)
    torch.testing.assert_close(y.float(), expected, atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)


@backends
def test_attention_scale(backend: str) -> None:
    accuracy.require("attention", backend, torch.float32, 32)
    qkv = tensors_for((6,), 2, 32, None, torch.float32, backend)["qkv"]
    scaled = qkv.clone()
    scaled[:, 0] *= 0.3 * 32**0.5
    cu_seqlens = cumulative((6,), qkv.device)
    torch.testing.assert_close(
        ops.attention(qkv, cu_seqlens, 6, 0.3, backend=backend), ops.attention(scaled, cu_seqlens, 6, backend=backend)
    )


@backends
def test_attention_all_dropped(backend: str) -> None:
    accuracy.require("attention", backend, torch.float32, 32)
    qkv = tensors_for((6, 3), 2, 32, None, torch.float32, backend)["qkv"].requires_grad_()
    out = ours(backend, (6, 3), 1.0)(qkv)
    out.sum().backward()
    assert (out == 0).all()
    assert (qkv.grad == 0).all()


def test_attention_dropout_rate() -> None:
    keep = philox.keep_attention(accuracy.seed_tensor(), 0.1, torch.arange(512)[None], 4, 512)
    assert abs(1 - keep.double().mean() - 0.1) < 4 * (0.09 / keep.numel()) ** 0.5


@pytest.mark.parametrize("head_dim", [1, 12, 26, 125])
@backends
def test_attention_kernels_take_any_head_dim(backend: str, head_dim: int) -> None:
    """Padded to a multiple of 8, of which the result shows nothing, its gradient's layout included."""
    accuracy.require("attention", backend, torch.float32, head_dim)
    tensors = tensors_for((5, 9), 2, head_dim, "B11S", torch.float32, backend)
    accuracy.check_backward(ours(backend, (5, 9)), eager((5, 9)), reference((5, 9)), tensors)
    out = ours(backend, (5, 9))(**tensors)
    assert out.shape == (14, 2 * head_dim)
    assert out.is_contiguous()


def test_attention_of_large_heads_is_not_for_triton() -> None:
    accuracy.require("attention", "triton", torch.float32, 128)
    for head_dim in (129, 136):
        with pytest.raises(RuntimeError, match=f"head sizes up to 128, not {head_dim}"):
            dispatch.select(
                "attention",
                device=accuracy.device("triton"),
                dtype=torch.float32,
                requires=head_dim,
                backend="triton",
            )


PEAK = """
import resource, torch
from fastbert import ops
for S in (64, 2048, 4096):
    qkv = torch.randn(S, 3, 1, 32, requires_grad=True)
    ops.attention(qkv, torch.tensor([0, S], dtype=torch.int32), S, dropout_p=0.1, backend="cpu").sum().backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_attention_memory_grows_with_the_length() -> None:
    accuracy.require("attention", "cpu", torch.float32, 32)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    printed = subprocess.check_output([sys.executable, "-c", PEAK], env=environment, text=True)
    base, short, long = map(int, printed.split())
    tensors = 4096 * 32 * 4 * (3 + 1 + 1 + 3)  # qkv, out, dout, dqkv
    assert long - base < 2.5 * max(short - base, tensors) < 4096 * 4096 * 4


GOOD = {"qkv": torch.randn(7, 3, 2, 16), "cu_seqlens": cumulative((3, 4)), "max_seqlen": 4}


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize("backend", [None, "reference"], ids=["any", "reference"])
@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"qkv": torch.randn(7, 96)}, ValueError, ["qkv", "[7, 96]", "head_dim"]),
        ({"qkv": torch.randn(7, 2, 2, 16)}, ValueError, ["qkv", "[7, 2, 2, 16]"]),
        ({"qkv": torch.randn(7, 3, 2, 0)}, ValueError, ["qkv", "[7, 3, 2, 0]"]),
        ({"qkv": torch.randn(7, 3, 0, 16)}, ValueError, ["qkv", "[7, 3, 0, 16]"]),
        ({"qkv": torch.ones(7, 3, 2, 16, dtype=torch.int8)}, TypeError, ["qkv", "int8", "float32"]),
        ({"qkv": 1}, TypeError, ["qkv", "int"]),
        ({"cu_seqlens": [0, 7]}, TypeError, ["cu_seqlens", "list"]),
        ({"cu_seqlens": torch.tensor([0, 7])}, TypeError, ["cu_seqlens", "int64", "int32"]),
        ({"cu_seqlens": torch.tensor([[0, 7]], dtype=torch.int32)}, ValueError, ["cu_seqlens", "[1, 2]"]),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int32)}, ValueError, ["cu_seqlens", "[0]"]),
        ({"cu_seqlens": torch.zeros(3, dtype=torch.int32, device="meta")}, ValueError, ["cu_seqlens", "meta"]),
        ({"cu_seqlens": torch.tensor([1, 3, 7], dtype=torch.int32)}, ValueError, ["cu_seqlens", "start at 0", "1"]),
        ({"cu_seqlens": torch.tensor([0, 3, 6], dtype=torch.int32)}, ValueError, ["cu_seqlens", "7", "6"]),
        ({"cu_seqlens": torch.tensor([0, 3, 9], dtype=torch.int32)}, ValueError, ["cu_seqlens", "7", "9"]),
        (
            {"cu_seqlens": torch.tensor([0, 5, 3, 7], dtype=torch.int32), "max_seqlen": 7},
            ValueError,
            ["cu_seqlens", "decrease"],
        ),
        ({"cu_seqlens": torch.tensor([0, -5, 7], dtype=torch.int32)}, ValueError, ["cu_seqlens", "decrease"]),
        ({"max_seqlen": 3}, ValueError, ["max_seqlen", "3", "4"]),
        ({"max_seqlen": -1}, ValueError, ["max_seqlen", "-1"]),
        ({"max_seqlen": None}, TypeError, ["attention: max_seqlen", "integer", "NoneType"]),
        ({"max_seqlen": "4"}, TypeError, ["attention: max_seqlen", "integer", "str"]),
        ({"max_seqlen": 4.0}, TypeError, ["attention: max_seqlen", "integer", "float"]),
        ({"max_seqlen": torch.tensor(4)}, TypeError, ["attention: max_seqlen", "integer", "Tensor"]),
        ({"dropout_p": -0.1}, ValueError, ["dropout_p", "-0.1"]),
        ({"dropout_p": "x"}, TypeError, ["attention: dropout_p", "number", "str"]),
        ({"scale": torch.tensor(0.1)}, TypeError, ["scale", "number", "Tensor"]),
        ({"scale": "0.1"}, TypeError, ["attention: scale", "number", "str"]),
        ({"scale": float("nan")}, ValueError, ["attention: scale", "finite", "nan"]),
        ({"scale": -float("inf")}, ValueError, ["attention: scale", "finite", "-inf"]),
        ({"dropout_p": 0.1, "seed": torch.tensor([1], dtype=torch.int32)}, ValueError, ["seed", "int32", "int64"]),
        ({"bias": torch.zeros(2, 2, 4)}, ValueError, ["bias", "[2, 2, 4]"]),
        ({"bias": torch.zeros(3, 1, 4, 4)}, ValueError, ["bias", "2 or 1", "[3, 1, 4, 4]"]),
        ({"bias": torch.zeros(1, 1, 3, 4)}, ValueError, ["bias", "max_seqlen", "[1, 1, 3, 4]"]),
        ({"bias": torch.zeros(1, 1, 1, 3)}, ValueError, ["bias", "[1, 1, 1, 3]"]),
        ({"bias": torch.zeros(1, 1, 4, 4, dtype=torch.bool)}, TypeError, ["bias", "bool"]),
        ({"bias": torch.zeros(1, 1, 4, 4, device="meta")}, ValueError, ["bias", "meta"]),
        ({"max_seqlen": 2**40}, ValueError, ["max_seqlen", "from 0 to 2147483647"]),
        ({"deterministic": "yes"}, TypeError, ["attention: deterministic", "True or False", "'yes'"]),
        ({"backend": ["cpu"]}, TypeError, ["attention: backend", "string", "list"]),
        ({"backend": "quick"}, ValueError, ["quick", "cpu, cuda, triton, reference"]),
        ({"backend": "triton"}, RuntimeError, ["attention:triton", "cannot run: "]),
    ],
)
def test_attention_errors(
    change: dict, error: type[Exception], words: list[str], gradients: bool, backend: str | None
) -> None:
    with torch.set_grad_enabled(gradients), pytest.raises(error) as caught:
        ops.attention(**GOOD | {"backend": backend} | change)
    assert all(word in str(caught.value) for word in words), str(caught.value)
