from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import accuracy
import pytest
import torch
import torch.nn.functional as F
from properties import given, settings, st
from torch import Tensor

from fastbert import dispatch, ops
from fastbert.ops.layernorm import layernorm_ref
from fastbert.ops.mlm_loss import mlm_loss_ref

# shape of the labels, hidden, vocabulary, share labelled, label smoothing, bias
CASES = [
    ((120,), 24, 33, 1.0, 0.0, True),
    ((2, 9), 16, 31, 0.5, 0.0, True),
    ((3, 33), 40, 1000, 0.2, 0.0, True),
    ((4, 64), 100, 257, 1.0, 0.0, False),
    ((2, 128), 312, 2111, 0.15, 0.0, True),
    ((129,), 64, 64, 1.0, 0.1, True),
    ((2, 17), 24, 50, 0.4, 0.2, False),
    ((512,), 32, 97, 0.9, 0.0, True),
    ((5, 19), 37, 45, 0.6, 0.1, True),
]


def tensors_for(
    hidden: int, vocabulary: int, biased: bool, dtype: torch.dtype, rows: tuple[int, ...], backend: str | None = None
) -> dict[str, Tensor]:
    random = accuracy.generator(hidden + vocabulary)
    tensors = {
        "hidden": torch.randn(*rows, hidden, generator=random),
        "decoder_weight": torch.randn(vocabulary, hidden, generator=random) * 2 * hidden**-0.5,
        "transform_weight": torch.randn(hidden, hidden, generator=random) * hidden**-0.5,
        "transform_bias": torch.randn(hidden, generator=random),
        "norm_weight": torch.rand(hidden, generator=random) + 0.5,
        "norm_bias": torch.randn(hidden, generator=random),
    }
    if biased:
        tensors["decoder_bias"] = torch.randn(vocabulary, generator=random)
    return {name: value.to(accuracy.device(backend), dtype) for name, value in tensors.items()}


def labels_for(shape: tuple[int, ...], vocabulary: int, share: float, backend: str | None = None) -> Tensor:
    random = accuracy.generator(7)
    labels = torch.randint(vocabulary, shape, generator=random)
    labels = labels.masked_fill(torch.rand(shape, generator=random) > share, -100)
    labels.view(-1)[0] = 1
    return labels.to(accuracy.device(backend))


def ours(backend: str, labels: Tensor, smoothing: float) -> Callable[..., Tensor]:
    return lambda decoder_bias=None, **tensors: ops.mlm_loss(
        labels=labels, decoder_bias=decoder_bias, **tensors, eps=1e-5, label_smoothing=smoothing, backend=backend
    )[0]


def formula(
    labels: Tensor, smoothing: float, norm: Callable[..., Tensor], loss: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    def run(
        hidden: Tensor,
        decoder_weight: Tensor,
        transform_weight: Tensor,
        transform_bias: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        decoder_bias: Tensor | None = None,
    ) -> Tensor:
        transformed = norm(F.gelu(F.linear(hidden, transform_weight, transform_bias)), norm_weight, norm_bias)
        return loss(transformed.flatten(0, -2), labels.flatten(), decoder_weight, decoder_bias, -100, smoothing)

    return run


def eager(labels: Tensor, smoothing: float) -> Callable[..., Tensor]:
    def loss(
        hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, ignored: int, smooth: float
    ) -> Tensor:
        logits = F.linear(hidden, weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, labels, ignore_index=ignored, label_smoothing=smooth)

    return formula(labels, smoothing, lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, 1e-5), loss)


def reference(labels: Tensor, smoothing: float) -> Callable[..., Tensor]:
    count = (labels != -100).sum()
    return formula(
        labels, smoothing, lambda x, w, b: layernorm_ref(x, w, b, eps=1e-5), lambda *a: mlm_loss_ref(*a) / count
    )


def case_id(case: tuple) -> str:
    shape, hidden, vocabulary, share, smoothing, biased = case
    text = f"{'x'.join(map(str, shape))}-{hidden}-{vocabulary}-{share}"
    return text + (f"-smooth{smoothing}" if smoothing else "") + ("-bias" if biased else "")


table = accuracy.table(
    "mlm_loss",
    CASES,
    cost=lambda case: math.prod(case[0]) * case[2] / 9000,
    ids=case_id,
)
typed = accuracy.typed("mlm_loss")
backends = accuracy.backends("mlm_loss")


def check(
    backend: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    hidden: int,
    vocabulary: int,
    share: float,
    smoothing: float,
    biased: bool,
    backward: bool,
) -> None:
    accuracy.require("mlm_loss", backend, dtype)
    labels = labels_for(shape, vocabulary, share, backend)
    tensors = tensors_for(hidden, vocabulary, biased, dtype, shape, backend)
    if backward:
        accuracy.check_backward(
            ours(backend, labels, smoothing), eager(labels, smoothing), reference(labels, smoothing), tensors
        )
        return
    # One loss is one number, and an error of one number is chance: judge the losses of the labels one by one, and where
    # there are few, of other labels in their places.
    places = (labels.view(-1) != -100).nonzero()
    singles = []
    for i in range(48 if accuracy.interpreted(backend) else max(48, min(120, len(places)))):
        turn, place = i // len(places), places[i % len(places)]
        single = torch.full_like(labels, -100)
        single.view(-1)[place] = (labels.view(-1)[place] + 5 * turn) % vocabulary
        singles.append(single)

    def each(of: Callable[[Tensor], Callable[..., Tensor]]) -> Callable[..., Tensor]:
        return lambda **tensors: torch.stack([of(single)(**tensors) for single in singles])

    accuracy.check_forward(
        each(lambda single: ours(backend, single, smoothing)),
        each(lambda single: eager(single, smoothing)),
        each(lambda single: reference(single, smoothing)),
        tensors,
    )


@table
def test_mlm_loss_fwd(backend: str, dtype: torch.dtype, case: tuple) -> None:
    check(backend, dtype, *case, backward=False)


@table
def test_mlm_loss_bwd(backend: str, dtype: torch.dtype, case: tuple) -> None:
    check(backend, dtype, *case, backward=True)


@pytest.mark.parametrize("spread", [4.5, 8.0, 16.0])
@typed
def test_mlm_loss_of_a_confident_model(backend: str, dtype: torch.dtype, spread: float) -> None:
    """Gradients are what the probabilities of the labels lack of 1, which here is little, under GradScaler's factor."""
    accuracy.require("mlm_loss", backend, dtype)
    rows = 160  # of which few, of a label that is not so probable, have most of the gradient
    tensors = tensors_for(64, 96, True, dtype, (rows,), backend)
    tensors["decoder_weight"] = F.normalize(tensors["decoder_weight"].float()).to(dtype)
    tensors["norm_weight"] = torch.full_like(tensors["norm_weight"], spread)
    logits: list[Tensor] = []

    def keep(hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, *_: object) -> Tensor:
        logits.append(F.linear(hidden, weight, bias))
        return logits[0].sum()

    guess = torch.zeros(rows, dtype=torch.int64, device=accuracy.device(backend))
    formula(guess, 0.0, lambda x, w, b: layernorm_ref(x, w, b, eps=1e-5), keep)(**accuracy.double(tensors))
    labels = logits[0].argmax(1)
    probability = torch.softmax(logits[0], 1).amax(1)
    assert probability.mean() > 0.6

    def scaled(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda **tensors: loss(**tensors) * 65536

    accuracy.check_backward(
        scaled(ours(backend, labels, 0.0)), scaled(eager(labels, 0.0)), scaled(reference(labels, 0.0)), tensors
    )


@backends
def test_mlm_loss_bias_of_a_frequent_word(backend: str) -> None:
    """Its gradient is little of what the probabilities, and so the labels, sum up to."""
    accuracy.require("mlm_loss", backend, torch.float32)
    tensors = tensors_for(24, 5, True, torch.float32, (600,), backend)
    tensors["decoder_bias"] = torch.tensor([8.0, 0, 0, 0, 0], device=accuracy.device(backend))
    labels = torch.zeros(600, dtype=torch.int64, device=accuracy.device(backend))
    labels[::50] = 3
    accuracy.check_backward(ours(backend, labels, 0.1), eager(labels, 0.1), reference(labels, 0.1), tensors)


@pytest.mark.parametrize("items", [257, 513, 1028])  # one over them is just below a power of two
@backends
def test_mlm_loss_divided_by(backend: str, items: int) -> None:
    """All gradients have the factor: in 16 bits its rounding would be an error of all of them, to one side."""
    accuracy.require("mlm_loss", backend, torch.bfloat16)
    tensors = tensors_for(64, 31, True, torch.bfloat16, (128,), backend)
    tensors |= {name: tensors[name].float() for name in ("norm_weight", "norm_bias")}
    labels = labels_for((128,), 31, 1.0, backend)
    count = (labels != -100).sum()

    def loss(**tensors: Tensor) -> Tensor:
        bias = tensors.pop("decoder_bias")
        return ops.mlm_loss(labels=labels, decoder_bias=bias, **tensors, eps=1e-5, num_items=items, backend=backend)[0]

    def scaled(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda **tensors: run(**tensors) * (count / items)

    plain = formula(labels, 0.0, accuracy.layer_norm, lambda *a: mlm_loss_ref(*a) / count)
    accuracy.check_backward(loss, scaled(plain), scaled(reference(labels, 0.0)), tensors)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    rows=st.integers(8, 70),  # the error of one row is that of one probability, and chance
    hidden=st.integers(8, 90),
    vocabulary=st.integers(8, 300),
    share=st.floats(0.0, 1.0),
    smoothing=st.sampled_from([0.0, 0.1]),
    biased=st.booleans(),
    dtype=st.sampled_from(accuracy.DTYPES),
)
def test_mlm_loss_any_shape(
    rows: int, hidden: int, vocabulary: int, share: float, smoothing: float, biased: bool, dtype: torch.dtype
) -> None:
    check("cpu", dtype, (rows,), hidden, vocabulary, share, smoothing, biased, backward=True)


@typed
def test_mlm_loss_is_the_mean_over_the_labels(backend: str, dtype: torch.dtype) -> None:
    accuracy.require("mlm_loss", backend, dtype)
    labels = labels_for((4, 33), 50, 0.5, backend)
    tensors = tensors_for(24, 50, True, dtype, (4, 33), backend)
    expected = eager(labels, 0.1)(**accuracy.double(tensors))
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(
        ours(backend, labels, 0.1)(**tensors), expected.float(), rtol=8 * rounding, atol=8 * rounding
    )


@backends
def test_mlm_loss_without_labels(backend: str) -> None:
    """As in PyTorch: the mean over nothing is NaN, and the gradients are zero."""
    accuracy.require("mlm_loss", backend, torch.float32)
    tensors = tensors_for(16, 9, True, torch.float32, (2, 3), backend)
    tensors = {name: value.requires_grad_() for name, value in tensors.items()}
    labels = torch.full((2, 3), -100, device=accuracy.device(backend))
    loss, count = ops.mlm_loss(labels=labels, **tensors, backend=backend)
    assert torch.isnan(loss)
    assert count == 0
    loss.backward()
    assert all((value.grad == 0).all() for value in tensors.values())


@backends
def test_mlm_loss_num_items_and_ignore_index(backend: str) -> None:
    accuracy.require("mlm_loss", backend, torch.float32)
    tensors = tensors_for(16, 9, True, torch.float32, (2, 3), backend)
    labels = torch.tensor([[1, -100, 3], [-100, 8, 0]], device=accuracy.device(backend))
    mean, count = ops.mlm_loss(labels=labels, **tensors, backend=backend)
    assert count == 4
    for number in (10, torch.tensor(10, device=labels.device)):
        loss, _ = ops.mlm_loss(labels=labels, **tensors, num_items=number, backend=backend)
        torch.testing.assert_close(loss, mean * 4 / 10)
    other, count = ops.mlm_loss(labels=labels.where(labels >= 0, 5), ignore_index=5, **tensors, backend=backend)
    assert count == 4
    torch.testing.assert_close(other, mean)


@backends
def test_mlm_loss_frozen_decoder(backend: str) -> None:
    accuracy.require("mlm_loss", backend, torch.float32)
    labels = torch.tensor([[1, -100, 3], [-100, 8, 0]], device=accuracy.device(backend))
    tensors = tensors_for(16, 9, True, torch.float32, (2, 3), backend)
    hidden = tensors.pop("hidden")
    gradients = []
    for run in (ours(backend, labels, 0.0), reference(labels, 0.0)):
        leaf = hidden.clone().requires_grad_()
        run(hidden=leaf, **tensors).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("transform_bias", [None, 0.0, -20.0, 600.0])
@typed
def test_mlm_loss_looks_at_labelled_rows_alone(backend: str, dtype: torch.dtype, transform_bias: float | None) -> None:
    """Also where nobody could say how many they are without reading them. An eps of 0 does no harm to the others, which
    have something for LayerNorm to read: not equal numbers, whatever the bias."""
    accuracy.require("mlm_loss", backend, dtype)
    labels = labels_for((3, 131), 50, 0.3, backend)
    given = tensors_for(24, 50, True, dtype, (3, 131), backend)
    if transform_bias is not None:
        given["transform_bias"] = torch.full_like(given["transform_bias"], transform_bias)
        given["hidden"] = given["hidden"] * 100  # or their activations are equal
    unlabelled = labels == -100
    results = []
    for hidden in (given["hidden"], given["hidden"].masked_fill(unlabelled[..., None], math.nan)):
        leaves = {name: value.clone().requires_grad_() for name, value in (given | {"hidden": hidden}).items()}
        loss, count = ops.mlm_loss(labels=labels, **leaves, eps=0.0, backend=backend)
        loss.backward()
        assert count == (~unlabelled).sum()
        results.append((loss.detach(), *(leaf.grad for leaf in leaves.values())))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.isfinite(clean).all()
        assert torch.equal(clean, poisoned)
    assert (results[0][1][unlabelled] == 0).all()


def transform_calls() -> list[tuple[str, tuple]]:
    """Arguments of the leaf ops of Triton's transform, forward and backward."""
    labels = labels_for((2, 67), 50, 0.4, "triton").view(-1)
    tensors = tensors_for(24, 50, True, torch.float32, (134,), "triton")
    hidden, weight = tensors["hidden"], tensors["transform_weight"]
    forward = (hidden, labels, weight, tensors["transform_bias"], -100, True)
    act, _, index, count, pre = torch.ops.fastbert.mlm_transform_fwd_triton(*forward)
    backward = (torch.randn_like(act), hidden, pre, index, count, weight, True, True, True)
    return [("mlm_transform_fwd_triton", forward), ("mlm_transform_bwd_triton", backward)]


def test_mlm_transform_opcheck() -> None:
    accuracy.require("mlm_loss", "triton", torch.float32)
    (forward, arguments), (backward, given) = transform_calls()
    trainable = [a.clone().requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments]
    torch.library.opcheck(getattr(torch.ops.fastbert, forward).default, tuple(trainable))
    torch.library.opcheck(getattr(torch.ops.fastbert, backward).default, given)


def test_mlm_transform_moves_the_labelled_rows_to_the_front(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy.require("mlm_loss", "triton", torch.float32)
    transform = importlib.import_module("fastbert.kernels.mlm_transform")
    monkeypatch.setitem(transform._COMPACT, "BLOCK", 32)  # for several turns
    (name, (hidden, labels, weight, bias, *rest)), _ = transform_calls()
    act, front, index, count, pre = getattr(torch.ops.fastbert, name)(hidden, labels, weight, bias, *rest)
    places = (labels != -100).nonzero().squeeze(1)
    assert count.item() == len(places) < len(labels)
    assert torch.equal(index.long(), F.pad(places, (0, len(labels) - len(places))))
    assert torch.equal(front, F.pad(labels[places], (0, len(labels) - len(places)), value=-100))
    expected = F.linear(hidden[places], weight, bias)
    torch.testing.assert_close(pre[: len(places)], expected)
    torch.testing.assert_close(act[: len(places)], F.gelu(expected))


@backends
def test_mlm_loss_casts_its_transform_under_autocast(backend: str) -> None:
    """To the last bit what it gives for tensors of that dtype; but the norm's, which stay, as stock's do."""
    accuracy.require("mlm_loss", backend, torch.bfloat16)
    labels = labels_for((2, 9), 31, 0.5, backend)
    given = tensors_for(16, 31, True, torch.float32, (2, 9), backend)
    cast = {name: value if name.startswith("norm") else value.bfloat16() for name, value in given.items()}
    with torch.autocast(accuracy.device(backend), torch.bfloat16):
        ours_cast, ours_given = (ours(backend, labels, 0.0)(**tensors) for tensors in (cast, given))
    assert torch.equal(ours_cast, ours_given)
    exact = ours(backend, labels, 0.0)(**given) if backend != "cpu" else reference(labels, 0.0)(**given)
    assert not torch.equal(ours_given, exact)


def test_mlm_loss_of_float64_under_autocast() -> None:
    """Which autocast leaves as it is."""
    labels = labels_for((2, 9), 31, 0.5)
    given = tensors_for(16, 31, True, torch.float64, (2, 9))
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.mlm_loss(labels=labels, **given, eps=1e-5)[0]
    torch.testing.assert_close(loss, reference(labels, 0.0)(**given))


def test_mlm_transform_needs_what_was_saved() -> None:
    accuracy.require("mlm_loss", "triton", torch.float32)
    (name, (hidden, *rest, save)), _ = transform_calls()
    act, *_ = getattr(torch.ops.fastbert, name)(hidden.requires_grad_(), *rest, not save)
    with pytest.raises(RuntimeError, match="without saving"):
        act.sum().backward()


def test_report_shows_what_was_launched_of_the_transform() -> None:
    accuracy.require("mlm_loss", "triton", torch.float32)
    tensors = tensors_for(16, 9, True, torch.float32, (2, 3), "triton")
    ours("triton", labels_for((2, 3), 9, 0.5, "triton"), 0.0)(**tensors)
    device = accuracy.device("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTBERT_BACKEND", "triton")
        told = dispatch.describe(device, torch.float32, ops=("mlm_loss",))["mlm_loss"]
    assert {"mlm_loss_fwd fp32", "mlm_transform_fwd fp32"} <= told["launched"].keys()
    assert {"mlm_loss_lse", "mlm_loss_dlogits", "mlm_transform_compact"} <= told["fixed"].keys()
    assert "on every card mlm_loss_lse: BLOCK_M 32, BLOCK_B 64, num_warps 4" in dispatch.details_as_text(told)


def test_mlm_loss_triton_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of the decoder are summed over the chunks; the last ones have nothing to do."""
    accuracy.require("mlm_loss", "triton", torch.bfloat16)
    monkeypatch.setattr("fastbert.kernels.mlm_loss.SCRATCH_BYTES", 1)  # 128 rows a chunk, the smallest
    labels = labels_for((4, 100), 40, 0.5, "triton")
    tensors = tensors_for(24, 40, True, torch.bfloat16, (4, 100), "triton")
    accuracy.check_backward(ours("triton", labels, 0.1), eager(labels, 0.1), reference(labels, 0.1), tensors)


def test_mlm_loss_triton_gives_nan_for_a_label_without_a_row() -> None:
    """The host does not look at the labels, and nothing outside the decoder is read or written."""
    accuracy.require("mlm_loss", "triton", torch.float32)
    tensors = tensors_for(16, 9, True, torch.float32, (2, 3), "triton")
    for label in (9, -1, 2**40):
        labels = torch.tensor([[1, -100, 3], [-100, label, 0]], device=accuracy.device("triton"))
        assert torch.isnan(ours("triton", labels, 0.0)(**tensors))


GOOD = {"labels": torch.tensor([[1, -100], [0, 8]])} | tensors_for(16, 9, True, torch.float32, (2, 2))


@pytest.mark.parametrize("backend", [None, "reference", "triton"], ids=["any", "reference", "triton"])
@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"labels": torch.tensor([[1, 9], [0, 8]])}, IndexError, ["labels", "9", "0 to 8"]),
        ({"labels": torch.tensor([[1, -1], [0, 8]])}, IndexError, ["labels", "-1"]),
        ({"labels": torch.tensor([1, 2])}, ValueError, ["labels", "[2]", "[2, 2, 16]"]),
        ({"labels": torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)}, TypeError, ["labels", "int32", "int64"]),
        ({"labels": [1]}, TypeError, ["labels", "list"]),
        ({"labels": torch.zeros(2, 2, dtype=torch.int64, device="meta")}, ValueError, ["labels", "meta"]),
        ({"hidden": torch.zeros(2, 2, 16, dtype=torch.int64)}, TypeError, ["hidden", "int64"]),
        ({"decoder_weight": torch.randn(9, 8)}, ValueError, ["decoder_weight", "16", "[9, 8]"]),
        ({"decoder_bias": torch.randn(8)}, ValueError, ["decoder_bias", "[9]", "[8]"]),
        ({"label_smoothing": 1.5}, ValueError, ["label_smoothing", "1.5"]),
        ({"transform_weight": torch.randn(16, 8)}, ValueError, ["transform_weight", "[16, 16]", "[16, 8]"]),
        ({"transform_weight": torch.randn(8, 16)}, ValueError, ["transform_weight", "[16, 16]", "[8, 16]"]),
        ({"transform_weight": torch.randn(16, 16).half()}, TypeError, ["transform_weight", "float16", "float32"]),
        ({"transform_weight": None}, TypeError, ["transform_weight", "NoneType"]),
        ({"transform_bias": torch.randn(8)}, ValueError, ["transform_bias", "[16]", "[8]"]),
        ({"transform_bias": None}, TypeError, ["transform_bias", "NoneType"]),
        ({"norm_weight": torch.randn(8)}, ValueError, ["weight", "[16]", "[8]"]),
        ({"decoder_weight": torch.randn(9, 16).bfloat16()}, TypeError, ["decoder_weight", "bfloat16", "float32"]),
        ({"ignore_index": None}, TypeError, ["ignore_index", "integer", "NoneType"]),
        ({"ignore_index": -100.0}, TypeError, ["ignore_index", "integer", "float"]),
        ({"num_items": "3"}, TypeError, ["num_items", "number", "str"]),
        ({"num_items": float("nan")}, ValueError, ["num_items", "finite", "nan"]),
        ({"num_items": -3}, ValueError, ["num_items", "not negative", "-3"]),
        ({"num_items": torch.tensor([2, 3])}, ValueError, ["num_items", "one real number", "[2]"]),
    ],
)
def test_mlm_loss_errors(
    change: dict, error: type[Exception], words: list[str], gradients: bool, backend: str | None
) -> None:
    if backend == "triton":
        accuracy.require("mlm_loss", backend, torch.float32)
        if error is IndexError or not accuracy.interpreted(backend):
            pytest.skip("Triton gives NaN for a label without a row; the tensors are on the CPU")
    with torch.set_grad_enabled(gradients), pytest.raises(error) as caught:
        ops.mlm_loss(**GOOD | change, backend=backend)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("backend", accuracy.BACKENDS)
def test_mlm_loss_forces_the_ops_of_its_transform(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend not in accuracy.backends_of("mlm_loss"):
        pytest.skip("mlm_loss lacks this backend")
    accuracy.require("mlm_loss", backend, torch.float32)
    chosen: dict[str, str] = {}
    monkeypatch.setattr("fastbert.ops.leaf.direct", lambda *_: False)  # a shortcut around the choice
    select = dispatch.select

    def recorded(op: str, **given: Any) -> dispatch.Implementation:
        found = select(op, **given)
        chosen[op] = found.name
        return found

    monkeypatch.setattr(dispatch, "select", recorded)
    tensors = tensors_for(16, 9, True, torch.float32, (2, 3), backend)
    ours(backend, labels_for((2, 3), 9, 0.5, backend), 0.0)(**tensors)
    assert chosen == dict.fromkeys(("mlm_loss", "layernorm", *["linear"] * (backend != "triton")), backend)
