"""What people do with a model works on a fast one as on a stock one."""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings
from typing import Any

import pytest
import torch
import transformers
from comparison import PREFIXES, all_fast, build, contestants, inputs, judge, real, reasons
from torch import nn

import fastbert


def snapshot(model: nn.Module) -> list[Any]:
    """Every module's class and what its __dict__ holds, by identity where identity matters."""
    result: list[Any] = []
    for name, module in model.named_modules():
        members = {key: id(value) for key, value in vars(module).items()}
        result.append((name, id(module), type(module), members, {k: id(v) for k, v in module._parameters.items()}))
    result.append(dict(vars(model.config)))
    return result


@pytest.mark.parametrize("family", PREFIXES)
def test_restore_puts_everything_back(family: str) -> None:
    model = build(family, "ForMaskedLM" if family != "roc_bert" else "Model")
    before = snapshot(model)
    text = repr(model)
    keys = list(model.state_dict())
    assert fastbert.optimize(model) is model
    assert fastbert.optimize(model) is model
    assert snapshot(model) != before
    assert repr(model) == text
    assert list(model.state_dict()) == keys
    model(**inputs())
    assert fastbert.restore(model) is model
    assert snapshot(model) == before
    assert snapshot(fastbert.restore(model)) == before


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementation_before_and_after(implementation: str) -> None:
    model = build(attn_implementation=implementation)
    fastbert.optimize(model)
    assert model.config._attn_implementation == "fastbert"
    assert "fastbert" not in model.config.to_json_string()
    fastbert.restore(model)
    assert model.config._attn_implementation == implementation


def test_names_stay() -> None:
    model = fastbert.optimize(build(head="ForMaskedLM"))
    assert type(model).__name__ == "BertForMaskedLM"
    assert isinstance(model, transformers.BertForMaskedLM)
    assert isinstance(model, fastbert.BertForMaskedLM)
    layer = model.bert.encoder.layer[0]
    assert type(layer).__name__ == "BertLayer"
    assert type(layer).__module__ == "transformers.models.bert.modeling_bert"


def test_hidden_states() -> None:
    ours, eager, truth = contestants(build())
    batch = inputs("holes")
    outputs = [m(**batch, output_hidden_states=True) for m in (ours, eager, truth)]
    assert all(len(o.hidden_states) == 3 for o in outputs)
    for i, states in enumerate(zip(*(o.hidden_states for o in outputs), strict=True)):
        assert states[0].shape == (4, 21, 48)
        judge(f"hidden_states[{i}]", *(s[real(batch)] for s in states))
    calls = fastbert.report(ours).calls
    assert calls == {"fast": 2, "stock": 0}
    ours(**batch)
    assert all_fast(ours)


def test_hidden_states_recorded_before_optimize() -> None:
    model = build()
    batch = inputs()
    model(**batch, output_hidden_states=True)  # installs transformers' hooks for good
    fastbert.optimize(model)
    assert len(model(**batch, output_hidden_states=True).hidden_states) == 3
    assert all_fast(model)


@pytest.mark.parametrize("mask", ["none", "holes"])
def test_hooks_on_a_layer_see_stock_shapes(mask: str) -> None:
    model = fastbert.optimize(build(num_hidden_layers=3))
    batch = inputs(mask)
    expected = model(**batch)[0]
    seen: list[tuple[Any, ...]] = []
    layer = model.encoder.layer[1]
    handles = [
        layer.register_forward_hook(lambda module, args, output: seen.append((args[0].shape, output.shape))),
        layer.register_forward_pre_hook(lambda module, args: seen.append((type(args[1]), args[0].shape))),
    ]
    torch.testing.assert_close(model(**batch)[0], expected)
    kind = type(None) if mask == "none" else torch.Tensor
    assert seen == [(kind, (4, 21, 48)), ((4, 21, 48), (4, 21, 48))]
    assert all_fast(model)
    handles[0].remove()
    handles[1].remove()
    layer.register_forward_hook(lambda module, args, output: output * 0)
    assert not torch.allclose(model(**batch)[0], expected)


def test_hooks_around_the_encoder() -> None:
    model = fastbert.optimize(build())
    shapes = []
    model.encoder.register_forward_hook(lambda module, args, output: shapes.append(output[0].shape))
    model.embeddings.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    model(**inputs())
    assert shapes == [(4, 21, 48)] * 2
    assert all_fast(model)


def test_backward_hook_on_a_layer() -> None:
    model = fastbert.optimize(build())
    seen = []
    model.encoder.layer[0].register_full_backward_hook(lambda module, gin, gout: seen.append(gout[0].shape))
    model(**inputs())[0].sum().backward()
    assert seen == [(4, 21, 48)]
    assert all_fast(model)


def checkpoint(model: nn.Module, reentrant: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older name is there in every supported version
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mask", ["none", "holes"])
def test_gradient_checkpointing_replays_dropout(reentrant: bool, mask: str) -> None:
    changes = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    model = fastbert.optimize(build(train=True, **changes))
    batch = inputs(mask)

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(7)
        y = model(**batch)[0]
        y.square().sum().backward()
        return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    plain = run()
    fast = fastbert.report(model).calls["fast"]
    checkpoint(model, reentrant)
    checkpointed = run()
    assert fastbert.report(model).calls["fast"] == fast + 4  # each of 2 layers forward, and again in backward
    for one, other in zip(plain, checkpointed, strict=True):
        assert torch.equal(one, other)
    assert all_fast(model)


def test_gradient_checkpointing_of_a_frozen_model_with_an_adapter() -> None:
    model = fastbert.optimize(build(train=True))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    weight = model.encoder.layer[0].output.dense.weight.requires_grad_()
    batch = inputs()
    expected = torch.autograd.grad(model(**batch)[0].square().sum(), weight)[0]
    checkpoint(model, True)
    model(**batch)[0].square().sum().backward()
    torch.testing.assert_close(weight.grad, expected)
    assert all_fast(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_a_bias_with_gradient(reentrant: bool) -> None:
    model = fastbert.optimize(build(train=True))
    batch = inputs("none")
    bias = torch.randn(1, 3, 21, 21, requires_grad=True)
    expected = torch.autograd.grad(model(**batch, attention_mask=bias)[0].square().sum(), bias)[0]
    checkpoint(model, reentrant)
    model(**batch, attention_mask=bias)[0].square().sum().backward()
    torch.testing.assert_close(bias.grad, expected, atol=1e-4, rtol=1e-4)
    assert all_fast(model)


def test_dropout_repeats_from_its_seed_and_is_off_in_eval() -> None:
    model = fastbert.optimize(build(train=True, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3))
    batch = inputs()
    torch.manual_seed(1)
    one = model(**batch)[0]
    other = model(**batch)[0]
    torch.manual_seed(1)
    assert torch.equal(model(**batch)[0], one)
    assert not torch.equal(one, other)
    model.eval()
    assert torch.equal(model(**batch)[0], model(**batch)[0])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    stock = fastbert.restore(copy.deepcopy(model))
    model.train()
    torch.testing.assert_close(model(**batch)[0][real(batch)], stock(**batch)[0][real(batch)], atol=1e-5, rtol=1e-5)


def test_dropout_keeps_the_mean() -> None:
    model = fastbert.optimize(build(train=True, num_hidden_layers=1, hidden_dropout_prob=0.1))
    batch = inputs(batch=1, seqlen=8)
    rows = {name: value.expand(512, -1) for name, value in batch.items()}
    with torch.no_grad():
        ours = model(**rows)[0].mean(0)
        stock = fastbert.restore(model)(**rows)[0].mean(0)
    assert (ours - stock).abs().mean() < 0.05 * stock.abs().mean()


def test_autocast() -> None:
    stock = build(train=True)
    ours = fastbert.optimize(copy.deepcopy(stock))
    batch = inputs("right")
    keep = real(batch)
    truth = copy.deepcopy(stock).double()
    with torch.autocast("cpu", torch.bfloat16):
        results = [m(**batch)[0] for m in (ours, stock)]
    assert results[0].dtype == results[1].dtype
    judge("last_hidden_state", results[0][keep], results[1][keep], truth(**batch)[0][keep])
    results[0][keep].float().square().sum().backward()
    gradient = ours.encoder.layer[0].output.dense.weight.grad
    assert gradient.dtype is torch.float32
    assert torch.isfinite(gradient).all()
    assert all_fast(ours)


def test_deepcopy_and_pickle() -> None:
    model = fastbert.optimize(build(head="ForMaskedLM"))
    batch = inputs()
    expected = model(**batch).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert torch.equal(other(**batch).logits, expected)
        assert type(other) is type(model)
        assert all_fast(other)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.bert.encoder.layer[0].output.dense.weight.zero_()
    assert torch.equal(model(**batch).logits, expected)
    assert not torch.equal(twin(**batch).logits, expected)
    assert fastbert.restore(twin).config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "fastbert"
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(**batch).logits, expected)


def test_classes_are_pickled() -> None:
    assert pickle.loads(pickle.dumps(fastbert.BertForMaskedLM)) is fastbert.BertForMaskedLM
    layer = type(fastbert.optimize(build()).encoder.layer[0])
    assert pickle.loads(pickle.dumps(layer)) is layer


def test_state_dict_goes_both_ways() -> None:
    stock = build(head="ForMaskedLM")
    ours = fastbert.optimize(build(head="ForMaskedLM"))
    batch = inputs()
    ours(**batch)
    assert ours.load_state_dict(stock.state_dict()) is not None
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    third = build(head="ForMaskedLM")
    third.load_state_dict(torch.load(buffer))
    keep = real(batch)
    torch.testing.assert_close(ours(**batch).logits[keep], third(**batch).logits[keep], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("write", ["data.mul_", "copy_", "data =", "parameter ="])
def test_weights_written_after_a_call(write: str) -> None:
    model = fastbert.optimize(build())
    batch = inputs()
    model(**batch)
    with torch.no_grad():
        for linear in (m for m in model.modules() if isinstance(m, nn.Linear)):
            if write == "data.mul_":
                linear.weight.data.mul_(2)
            elif write == "copy_":
                linear.weight.copy_(linear.weight * 2)
            elif write == "data =":
                linear.weight.data = linear.weight * 2
            else:
                linear.weight = nn.Parameter(linear.weight * 2)
    ours = model(**batch)[0]
    keep = real(batch)
    torch.testing.assert_close(ours[keep], fastbert.restore(model)(**batch)[0][keep], atol=2e-5, rtol=2e-5)


def test_moved_to_meta_and_back() -> None:
    model = fastbert.optimize(build())
    batch = inputs()
    model(**batch)
    model.to("meta")
    y = model(**{name: value.to("meta") for name, value in batch.items()})[0]
    assert y.is_meta
    assert y.shape == (4, 21, 48)
    model.to_empty(device="cpu")
    model.load_state_dict(build().state_dict())
    model.embeddings.position_ids = torch.arange(72)[None]
    model.embeddings.token_type_ids = torch.zeros(1, 72, dtype=torch.long)
    assert torch.isfinite(model(**batch)[0]).all()
    assert all_fast(model)


def test_resized_embeddings_and_tied_weights() -> None:
    model = fastbert.optimize(build(head="ForMaskedLM"))
    model(**inputs())
    model.resize_token_embeddings(131)
    decoder = model.cls.predictions.decoder
    assert decoder.weight is model.bert.embeddings.word_embeddings.weight
    batch = inputs()
    labels = batch["input_ids"] + 10
    outputs = model(**batch, labels=labels)
    assert outputs.logits.shape == (4, 21, 131)
    logits = outputs.logits.flatten(0, 1)
    torch.testing.assert_close(outputs.loss, nn.functional.cross_entropy(logits, labels.flatten()))
    outputs.loss.backward()
    assert decoder.weight.grad.shape == (131, 48)


def test_half_of_a_model_frozen() -> None:
    model = fastbert.optimize(build())
    for parameter in model.embeddings.parameters():
        parameter.requires_grad_(False)
    for parameter in model.encoder.layer[0].parameters():
        parameter.requires_grad_(False)
    model(**inputs())[0].sum().backward()
    assert all(p.grad is None for p in model.encoder.layer[0].parameters())
    assert all(p.grad is not None for p in model.encoder.layer[1].parameters())
    assert all_fast(model)


def test_inference_mode_and_no_grad() -> None:
    model = fastbert.optimize(build())
    batch = inputs()
    expected = model(**batch)[0]
    with torch.inference_mode():
        assert torch.equal(model(**batch)[0], expected)
    with torch.no_grad():
        assert torch.equal(model(**batch)[0], expected)


def test_threads_share_a_model() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = fastbert.optimize(build())
    batches = [inputs(mask) for mask in ("right", "holes", "none", "left") for _ in range(3)]
    with torch.no_grad():
        expected = [model(**batch)[0] for batch in batches]
    fresh = fastbert.optimize(fastbert.restore(model))

    def run(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return fresh(**batch)[0]

    with ThreadPoolExecutor(4) as pool:
        for ours, theirs in zip(pool.map(run, batches), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_report() -> None:
    model = build(head="ForSequenceClassification")
    assert set(reasons(model)) == {"fastbert.optimize has not been called"}
    fastbert.optimize(model)
    model.bert.encoder.layer[1].chunk_size_feed_forward = 7
    model(**inputs())
    report = fastbert.report(model)
    told = report.as_dict()
    assert told["layers"] == [
        {"name": "bert.encoder.layer.0", "path": "fast", "reason": None},
        {"name": "bert.encoder.layer.1", "path": "stock", "reason": "chunk_size_feed_forward is set"},
    ]
    assert told["embeddings"] == [{"name": "bert.embeddings", "path": "fast", "reason": None}]
    assert told["calls"] == {"fast": 1, "stock": 1}
    assert set(told) == {"layers", "ops", "embeddings", "others", "calls"}
    assert json.loads(json.dumps(told)) == told
    assert set(told["ops"]) == {"attention", "ffn", "layernorm", "embedding", "mlm_loss", "linear"}
    for op in told["ops"].values():
        assert op["backend"] not in op["rejected"]
        assert all(isinstance(reason, str) and reason for reason in op["rejected"].values())
    assert report.calls == {"fast": 1, "stock": 1}
    assert "1 of 2 layers fast" in str(report)
    assert "chunk_size_feed_forward is set" in str(report)


def test_nothing_to_optimize() -> None:
    with pytest.raises(ValueError, match=r"nothing to optimize in model, a Linear .* families bert, roberta"):
        fastbert.optimize(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
        fastbert.optimize({})
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        fastbert.restore("bert")
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got NoneType"):
        fastbert.report(None)


def test_any_module_that_holds_a_model() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.towers = nn.ModuleList([build(), build("distilbert")])

        def forward(self, **batch: torch.Tensor) -> torch.Tensor:
            return torch.cat([tower(**batch)[0] for tower in self.towers])

    model = Siamese()
    batch = inputs()
    keep = real(batch).repeat(2, 1)
    expected = model(**batch)
    fastbert.optimize(model)
    torch.testing.assert_close(model(**batch)[keep], expected[keep], atol=2e-5, rtol=2e-5)
    assert all_fast(model)
    assert len(reasons(model)) == 4


def test_double_dispatch_of_a_subclass() -> None:
    class Mine(transformers.BertModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)[0] + 1

    model = Mine(build().config)
    expected = model(**inputs("none", batch=1))
    fastbert.optimize(model)
    assert type(model) is Mine
    assert expected.shape == model(**inputs("none", batch=1)).shape
    assert all_fast(model)
