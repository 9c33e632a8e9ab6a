"""Packing into a number of rows that is known beforehand: the same results, and nothing read back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from comparison import MASKS, all_fast, build, inputs, real
from torch.utils.checkpoint import checkpoint

import fastbert
from fastbert.packing import PackedBatch, batch_of

DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


def test_what_a_mask_becomes() -> None:
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]])
    batch = PackedBatch.bounded(mask, 3, 4, 10)
    assert batch.indices is not None
    assert batch.indices.tolist() == [0, 2, 3, 9, 12, 12, 12, 12, 12, 12]
    assert batch.cu_seqlens.tolist() == [0, 3, 3, 4, 8, 10, 10]  # no sequence is longer than max_seqlen
    assert batch.cu_seqlens.dtype is torch.int32
    assert batch.max_seqlen == 4
    x = torch.arange(1.0, 25.0).view(3, 4, 2)
    assert batch.pack(x)[:, 0].tolist() == [1, 5, 7, 19, 0, 0, 0, 0, 0, 0]
    assert torch.equal(batch.unpack(batch.pack(x)), x * mask[..., None])
    assert torch.equal(batch.unpack(torch.full((10, 2), 3.0)), 3.0 * mask[..., None].expand(3, 4, 2))


def test_no_token_and_every_token() -> None:
    assert PackedBatch.bounded(torch.zeros(2, 3), 2, 3, 5).cu_seqlens.tolist() == [0, 0, 0, 3, 5]
    assert PackedBatch.bounded(torch.ones(2, 3), 2, 3, 6).cu_seqlens.tolist() == [0, 3, 6, 6, 6]


def test_rows_to_spare_get_and_give_nothing() -> None:
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    batch = PackedBatch.bounded(mask, 2, 3, 7)
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    t = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(batch.pack, x)
    assert torch.autograd.gradcheck(batch.unpack, t)
    assert torch.autograd.gradgradcheck(batch.pack, x)
    assert torch.autograd.gradgradcheck(batch.unpack, t)
    poisoned = torch.where(mask[..., None].bool(), torch.ones(2, 3, 2), torch.nan)
    assert torch.isfinite(batch.pack(poisoned)).all()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("surplus", [0, 1, 50])
def test_same_outputs(mask: str, surplus: int) -> None:
    batch = inputs(mask)
    model = fastbert.optimize(build())
    with torch.no_grad():
        expected = model(**batch)[0]
        with fastbert.token_bound(int(real(batch).sum()) + surplus):
            y = model(**batch)[0]
    keep = real(batch)
    torch.testing.assert_close(y[keep], expected[keep], atol=1e-6, rtol=1e-6)
    assert (y[~keep] == 0).all()
    assert all_fast(model)


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    model(**batch, labels=batch["input_ids"].masked_fill(~real(batch), -100)).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("how", ["plain", "checkpointing", "watched", "stock layer"])
def test_same_gradients_with_dropout(how: str) -> None:
    model = fastbert.optimize(build(head="ForMaskedLM", train=True, **DROPOUT))
    if how == "checkpointing":
        model.gradient_checkpointing_enable()
    elif how == "watched":
        model.bert.encoder.layer[1].register_forward_hook(lambda module, args, output: None)
    elif how == "stock layer":
        model.bert.encoder.layer[0].chunk_size_feed_forward = 1
        for dropout in (m for m in model.bert.encoder.layer[0].modules() if isinstance(m, torch.nn.Dropout)):
            dropout.p = 0.0
    batch = inputs("holes")
    expected = gradients(model, batch)
    with fastbert.token_bound(71):
        ours = gradients(model, batch)
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-6, rtol=1e-5, msg=name)


def test_recomputed_as_a_whole() -> None:
    batch = inputs("right")
    model = fastbert.optimize(build(train=True))
    results = []
    for bounded in (False, True):
        model.zero_grad()
        if bounded:
            with fastbert.token_bound(60):
                y = checkpoint(lambda **b: model(**b)[0], use_reentrant=False, **batch)
                y.square().sum().backward()
        else:
            model(**batch)[0].square().sum().backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)


def test_nothing_is_read_back() -> None:
    """On the meta device there are no values: whatever would wait for some raises."""
    model = fastbert.optimize(build(head="ForSequenceClassification", train=True, **DROPOUT)).to("meta")
    batch = {name: value.to("meta") for name, value in inputs("right").items()}
    with fastbert.token_bound(50):
        loss = model(**batch, labels=torch.zeros(4, dtype=torch.long, device="meta")).loss
        loss.backward()
    assert all_fast(model)
    packed = batch_of(torch.zeros(4, 21, 8, device="meta"), batch["attention_mask"], {})
    assert isinstance(packed, PackedBatch)
    assert packed.indices is None  # without a bound, the padded layout
    with pytest.raises(NotImplementedError):
        PackedBatch.from_mask(batch["attention_mask"], 4, 21, torch.device("cpu"))


def test_compiled() -> None:
    torch.compiler.reset()
    model = fastbert.optimize(build(num_hidden_layers=1))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    batch = inputs("left")
    with torch.no_grad():
        expected = model(**batch)[0]
        for bound in (84, 70):
            with fastbert.token_bound(bound):
                bounded = compiled(**batch)[0][real(batch)]
            torch.testing.assert_close(bounded, expected[real(batch)], atol=1e-5, rtol=1e-5)


def test_compiled_gradients() -> None:
    torch.compiler.reset()
    model = fastbert.optimize(build(train=True, num_hidden_layers=1))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    batch = inputs("right")
    results = []
    for run, bound in ((model, 84), (compiled, 84), (compiled, 70)):
        model.zero_grad()
        with fastbert.token_bound(bound):
            run(**batch)[0].square().sum().backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], atol=1e-4, rtol=1e-4)


def test_four_dimensional_masks_keep_their_layout() -> None:
    model = fastbert.optimize(build())
    batch = inputs("none")
    visible = torch.ones(4, 1, 21, 21, dtype=torch.bool).tril()
    with torch.no_grad():
        expected = model(**batch, attention_mask=visible)[0]
        with fastbert.token_bound(1):
            torch.testing.assert_close(model(**batch, attention_mask=visible)[0], expected, atol=1e-5, rtol=1e-5)


def test_too_many_tokens() -> None:
    model = fastbert.optimize(build())
    batch = inputs("right")
    count = int(real(batch).sum())
    with torch.no_grad(), fastbert.token_bound(count - 1):
        with pytest.raises(RuntimeError, match=f"more than {count - 1} tokens"):
            model(**batch)
        with pytest.raises(ValueError, match=rf"tokens is {count - 1}, but the batch has no mask and 84 tokens"):
            model(batch["input_ids"])


@pytest.mark.parametrize("tokens", [0, -3, 2.0, True, None])
def test_bad_bounds(tokens: Any) -> None:
    with pytest.raises(ValueError, match="tokens must be an integer of at least 1"), fastbert.token_bound(tokens):
        pass


def test_bounds_nest() -> None:
    model = fastbert.optimize(build())
    batch = inputs("right")
    with torch.no_grad():
        expected = model(**batch)[0]
        with fastbert.token_bound(84):
            with pytest.raises(RuntimeError, match="more than 1 tokens"), fastbert.token_bound(1):
                model(**batch)
            torch.testing.assert_close(model(**batch)[0], expected)
        torch.testing.assert_close(copy.deepcopy(model)(**batch)[0], expected)
