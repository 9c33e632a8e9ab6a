"""Whole models through the Triton kernels, in Triton's interpreter. On a GPU, tests/gpu does the same without it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comparison import all_fast, build, check_model, contestants, inputs, judge, judge_gradients, real
from test_graphs import Rerun
from torch import Tensor, nn

import fastbert
from fastbert.graphs import EncoderGraphs

pytest.importorskip("triton")
OPS = ("attention", "embedding", "ffn", "layernorm", "linear", "mlm_loss")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which tests/gpu runs the kernels")

# Several layers are for the test that says so: the interpreter takes a second for each.
SIZES: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 1}
DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}


@pytest.fixture(autouse=True)
def triton_for_every_op(monkeypatch: pytest.MonkeyPatch, memory_watch: object) -> Iterator[None]:
    """Forces the backend, watches memory, and fills it with NaN, so that what a kernel forgets to write shows."""
    monkeypatch.setenv("FASTBERT_BACKEND", "triton")
    assert os.environ["TRITON_INTERPRET"] == "1"
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def small(head: str = "Model", **changes: Any) -> Any:
    return build(head=head, **SIZES | changes)


def batch_of(mask: str = "right") -> dict[str, Tensor]:
    return inputs(mask, batch=3, seqlen=11)


def labelled(mask: str = "right") -> dict[str, Tensor]:
    batch = batch_of(mask)
    labels = batch["input_ids"].masked_fill(~real(batch), -100)
    labels[:, ::2] = -100
    return batch | {"labels": labels}


def gradients(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, list[Tensor | None]]:
    loss = model(**batch).loss
    return loss, list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))


def assert_close(ours: list[Tensor | None], theirs: list[Tensor | None]) -> None:
    """The gradients of two backends, which draw the same dropout masks."""
    largest = max(float(gradient.abs().max()) for gradient in theirs if gradient is not None)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5 * largest, rtol=1e-4)


def test_every_op_runs_on_triton() -> None:
    """But for linear, for a part of whose calls Triton is meant, in 16 bits."""
    model = fastbert.optimize(small())
    ops = fastbert.report(model).ops
    assert {op: ops[op]["backend"] for op in OPS if op != "linear"} == dict.fromkeys(set(OPS) - {"linear"}, "triton")
    assert "16-bit numbers only" in ops["linear"]["rejected"]["triton"]
    report = fastbert.report(model.to(torch.bfloat16))
    assert report.ops["linear"]["backend"] == "triton"
    assert f"; else {report.ops['linear']['otherwise']}" in str(report)


@pytest.mark.parametrize("mask", ["none", "left", "holes", "empty row"])
def test_outputs_and_gradients(mask: str) -> None:
    check_model(small(), batch_of(mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    check_model(small(), batch_of(), dtype)


def test_a_dtype_without_kernels_raises() -> None:
    model = fastbert.optimize(small()).double()
    with pytest.raises(RuntimeError, match=r"FASTBERT_BACKEND=triton forces \w+:triton, .*, not torch.float64"):
        model(**batch_of())


def test_long_sequences_and_a_4d_mask() -> None:
    ours, eager, truth = contestants(small(max_position_embeddings=160))
    ids = torch.randint(2, 100, (1, 140))
    bias = torch.randn(1, 2, 140, 140)
    with torch.no_grad():
        judge("long", *(m(ids)[0] for m in (ours, eager, truth)))
        judge("4-D mask", *(m(ids, attention_mask=bias.to(m.dtype))[0] for m in (ours, eager, truth)))
    assert all_fast(ours)


def test_masked_language_model() -> None:
    ours, eager, truth = contestants(small("ForMaskedLM"))
    batch = labelled()
    results = [gradients(model, batch) for model in (ours, eager, truth)]
    assert all_fast(ours)
    torch.testing.assert_close(results[0][0], results[1][0])
    judge_gradients([name for name, _ in eager.named_parameters()], *(gradient for _, gradient in results))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_draws_what_the_reference_draws(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastbert.optimize(small("ForMaskedLM", train=True, **DROPOUT, num_hidden_layers=1 if checkpointing else 2))
    batch = labelled("holes")
    monkeypatch.setenv("FASTBERT_BACKEND", "reference")
    torch.manual_seed(7)
    expected_loss, expected = gradients(model, batch)
    monkeypatch.setenv("FASTBERT_BACKEND", "triton")
    if checkpointing:
        model.gradient_checkpointing_enable()
    torch.manual_seed(7)
    loss, ours = gradients(model, batch)
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)
    assert_close(ours, expected)


def test_rows_to_spare() -> None:
    """The kernels write every row, and the gradients see none of the spare ones."""
    model = fastbert.optimize(small("ForMaskedLM", train=True, **DROPOUT))
    batch = labelled("right")
    torch.manual_seed(7)
    _, expected = gradients(model, batch)
    with fastbert.token_bound(30):
        torch.manual_seed(7)
        _, ours = gradients(model, batch)
    assert_close(ours, expected)


def test_rows_to_spare_of_a_graph() -> None:
    model = fastbert.optimize(small())
    batches = [inputs(mask, batch=2, seqlen=9) for mask in ("right", "none")]
    with torch.no_grad():
        plain = [model(**batch)[0] for batch in batches]
        graphs = model.encoder._fastbert.graphs = EncoderGraphs(2, Rerun())
        for batch, y in zip(batches, plain, strict=True):
            torch.testing.assert_close(model(**batch)[0], y, atol=1e-5, rtol=1e-5)
    assert graphs.replayed == 2


def test_compiled() -> None:
    torch.compiler.reset()
    model = fastbert.optimize(small("ForTokenClassification"))
    batch = batch_of() | {"labels": torch.zeros(3, 11, dtype=torch.long)}
    loss, expected = gradients(model, batch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss_compiled, ours = gradients(compiled, batch)
    torch.testing.assert_close(loss_compiled, loss, atol=1e-5, rtol=1e-5)
    assert_close(ours, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of infinite gradients, in the interpreter
def test_gradient_scaler() -> None:
    """float16 autocast: the unscaled gradients are right, and of a scale that makes them infinite the weights stay."""
    ours, eager, truth = contestants(small("ForMaskedLM"))
    batch = labelled()

    def step(model: Any, scale: float) -> tuple[list[Tensor | None], float]:
        """The gradients that are stepped along, and the next scale."""
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=model is not truth):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        return [parameter.grad for parameter in model.parameters()], scaler.get_scale()

    names = [name for name, _ in eager.named_parameters()]
    weights = [parameter.detach().clone() for parameter in ours.parameters()]
    assert step(ours, 2.0**40)[1] == 2.0**39
    assert all(map(torch.equal, weights, ours.parameters()))
    judge_gradients(names, *(step(model, 2.0**10)[0] for model in (ours, eager, truth)))
    assert all_fast(ours)
    assert not any(map(torch.equal, weights, ours.parameters()))


def test_autocast() -> None:
    ours, eager, truth = contestants(small("ForMaskedLM"))
    batch = labelled()
    results = []
    for model in (ours, eager, truth):
        with torch.autocast("cpu", torch.bfloat16, enabled=model is not truth):
            results.append(gradients(model, batch)[1])
    judge_gradients([name for name, _ in eager.named_parameters()], *results)
    assert all_fast(ours)
