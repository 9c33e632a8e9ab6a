"""Whole models on the device give what the stock model gives there, forward and backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import device
import pytest
import torch
import transformers
from comparison import MASKS, all_fast, check_model, contestants, judge, judge_gradients, real
from device import BASE, DEVICE, DROPOUT, DTYPES, HEADS, LARGE, build, gradients, inputs, labelled, ragged

import fastbert

pytestmark = device.needed
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=device.dtype_name)


def test_kernels_are_used() -> None:
    ops = fastbert.report(fastbert.optimize(build(**HEADS[64]))).ops
    assert all(run["backend"] not in (None, "reference") for run in ops.values()), ops


@dtypes
@pytest.mark.parametrize("mask", MASKS)
def test_mask(mask: str, dtype: torch.dtype) -> None:
    check_model(build(**HEADS[64]), inputs(mask), dtype)


@dtypes
@pytest.mark.parametrize("head_dim", HEADS)
@pytest.mark.parametrize("seqlen", [1, 127, 129, 512])
def test_head_sizes_and_lengths(head_dim: int, seqlen: int, dtype: torch.dtype) -> None:
    check_model(build(**HEADS[head_dim], max_position_embeddings=512), ragged(5, seqlen), dtype)


@dtypes
@pytest.mark.parametrize("family", ["roberta", "distilbert", "electra"])
def test_family(family: str, dtype: torch.dtype) -> None:
    with DEVICE:
        stock = device.comparison.build(family)
    check_model(stock, inputs("right"), dtype)


@dtypes
@pytest.mark.parametrize("sizes", [BASE, LARGE], ids=["base", "large"])
@pytest.mark.parametrize("full", [True, False], ids=["full", "ragged"])
def test_real_sizes(sizes: dict[str, Any], full: bool, dtype: torch.dtype) -> None:
    check_model(build(**sizes), inputs("none", 4, 128) if full else ragged(6, 256), dtype)


@dtypes
def test_real_weights(given_minilm: Path, dtype: torch.dtype) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(given_minilm)
    texts = ["How far is it from Denver to Aspen ?", "What is an atom ?", "Who , after all , painted it ?" * 30]
    batch = {name: value.to(DEVICE) for name, value in tokenizer(texts, return_tensors="pt", padding=True).items()}
    ours, eager, truth = contestants(transformers.AutoModel.from_pretrained(given_minilm).eval().to(DEVICE), dtype)
    with torch.no_grad():
        outputs = [model(**batch) for model in (ours, eager, truth)]
    judge("last_hidden_state", *(o.last_hidden_state[real(batch)] for o in outputs))
    judge("pooler_output", *(o.pooler_output for o in outputs))
    assert all_fast(ours)


@dtypes
@pytest.mark.parametrize("shape", [(4, 1, 21, 21), (4, 2, 21, 21), (1, 2, 21, 21), (4, 1, 1, 21)])
def test_additive_4d_mask(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ours, eager, truth = contestants(build(**HEADS[64]), dtype)
    ids = inputs("none")["input_ids"]
    bias = torch.randn(shape, device=DEVICE).to(dtype)
    upstream = torch.randn(4, 21, 128, device=DEVICE)
    outputs, biases = [], []
    for model in (ours, eager, truth):
        leaf = bias.to(model.dtype).requires_grad_()
        y = model(ids, attention_mask=leaf)[0]
        outputs.append(y.detach())
        biases.append(torch.autograd.grad(y, leaf, upstream.to(y.dtype))[0])
    judge("last_hidden_state", *outputs)
    judge("gradient of the bias", *biases, 3.0)
    assert all_fast(ours)


@dtypes
@pytest.mark.parametrize("sizes", [HEADS[64], BASE], ids=["small", "base"])
def test_masked_language_model(sizes: dict[str, Any], dtype: torch.dtype) -> None:
    ours, eager, truth = contestants(build("ForMaskedLM", **sizes), dtype)
    batch = labelled(inputs("holes", 4, 64) if sizes is not BASE else ragged(8, 128))
    results = []
    for model in (ours, eager, truth):
        outputs = model(**batch)
        results.append((outputs.loss.detach(), gradients(outputs.loss, model), outputs.logits[real(batch)].detach()))
    torch.testing.assert_close(results[0][0].to(dtype), results[1][0].to(dtype))
    judge_gradients([name for name, _ in eager.named_parameters()], *(r[1] for r in results))
    judge("logits", *(r[2] for r in results))
    assert all_fast(ours)


def test_no_label_at_all() -> None:
    model = fastbert.optimize(build("ForMaskedLM", train=True))
    batch = inputs("right")
    outputs = model(**batch, labels=torch.full_like(batch["input_ids"], -100), num_items_in_batch=5)
    assert outputs.loss == 0
    outputs.loss.backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


# --- training ------------------------------------------------------------------------------------


def seeded(model: torch.nn.Module, batch: dict[str, Any]) -> list[Any]:
    torch.manual_seed(11)
    return gradients(model(**batch).loss, model)


def test_dropout_draws_what_the_reference_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastbert.optimize(build("ForMaskedLM", train=True, **HEADS[64], **DROPOUT))
    batch = labelled(inputs("holes"))
    monkeypatch.setenv("FASTBERT_BACKEND", "reference")
    expected = seeded(model, batch)
    monkeypatch.delenv("FASTBERT_BACKEND")
    device.assert_close(seeded(model, batch), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_replays_dropout(reentrant: bool) -> None:
    model = fastbert.optimize(build("ForMaskedLM", train=True, **HEADS[64], **DROPOUT))
    batch = labelled(inputs("right"))
    expected = seeded(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    device.assert_close(seeded(model, batch), expected)
    assert all_fast(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=device.dtype_name)
def test_autocast_and_grad_scaler(dtype: torch.dtype) -> None:
    stock = build("ForMaskedLM", **HEADS[64])
    ours, eager, truth = contestants(stock)
    batch = labelled(inputs("right"))
    results = []
    for model in (ours, eager, truth):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0, enabled=model is not truth)
        with torch.autocast(DEVICE.type, dtype, enabled=model is not truth):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        results.append([p.grad for p in model.parameters()])
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    # The gradients are float32, but made of products in `dtype`, whose rounding is the floor.
    names = [name for name, _ in eager.named_parameters()]
    judge_gradients(names, *([None if g is None else g.to(dtype) for g in r] for r in results[:2]), results[2])
    assert all_fast(ours)


@pytest.mark.parametrize("head_dim", HEADS)
@pytest.mark.parametrize("seqlen", [60, 300])
def test_repeats_bit_for_bit(seqlen: int, head_dim: int) -> None:
    sizes = HEADS[head_dim] | {"max_position_embeddings": 512}
    model = fastbert.optimize(build("ForMaskedLM", train=True, **sizes, **DROPOUT)).to(torch.bfloat16)
    batch = labelled(ragged(6, seqlen))
    torch.use_deterministic_algorithms(True)
    try:
        one, other = seeded(model, batch), seeded(model, batch)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(one, other, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_compiled() -> None:
    model = fastbert.optimize(build("ForMaskedLM", train=True, **HEADS[64]))
    batch = labelled(inputs("right"))
    expected = gradients(model(**batch).loss, model)
    compiled = torch.compile(model, fullgraph=True)
    device.assert_close(gradients(compiled(**batch).loss, model), expected)


def test_compiled_with_a_bound() -> None:
    """The documented training mode: torch.compile makes the CUDA graphs."""
    model = fastbert.optimize(build("ForMaskedLM", train=True, **HEADS[64]))
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for mask in ("right", "left", "holes", "right"):
        batch = labelled(inputs(mask))
        expected = gradients(model(**batch).loss, model)
        torch.compiler.cudagraph_mark_step_begin()
        with fastbert.token_bound(84):
            loss = compiled(**batch).loss
        device.assert_close(gradients(loss, model), expected)


# --- several processes, one device ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_distributed(how: str, tmp_path: Path) -> None:
    if not torch.distributed.is_nccl_available():
        pytest.skip("PyTorch was built without NCCL")
    stock = build("ForMaskedLM", train=True, **HEADS[64])
    batch = labelled(inputs("holes"))
    expected = gradients(stock(**batch).loss, stock)
    model: Any = fastbert.optimize(stock)
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        if how == "ddp":
            wrapped = torch.nn.parallel.DistributedDataParallel(model, device_ids=[0])
        else:
            from torch.distributed.fsdp import fully_shard

            for layer in model.bert.encoder.layer:
                fully_shard(layer)
            wrapped = fully_shard(model)
        wrapped(**batch).loss.backward()
        grads = [p.grad.full_tensor() if how == "fsdp2" else p.grad for p in model.parameters() if p.grad is not None]
        device.assert_close(grads, [g for g in expected if g is not None])
        assert all_fast(model), str(fastbert.report(model))
    finally:
        torch.distributed.destroy_process_group()
