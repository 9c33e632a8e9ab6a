"""Losses, logits on demand, gradient accumulation, Trainer, several processes."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import psutil
import pytest
import torch
import transformers
from comparison import SMALL, all_fast, build, inputs, judge_gradients, real
from parallel_worker import DDP_SETTINGS, LOSSES, gradients_of
from torch import nn
from torch.overrides import TorchFunctionMode

import fastbert
from fastbert import ops


def mlm_batch(share: float = 0.3) -> dict[str, torch.Tensor]:
    batch = inputs("right")
    labels = batch["input_ids"].clone()
    labels[(torch.rand(labels.shape) > share) | ~real(batch)] = -100
    return batch | {"labels": labels}


def shapes_seen(model: nn.Module, **batch: Any) -> tuple[Any, list[torch.Size]]:
    """The output, and the shapes of the padded states that the decoder's weight was multiplied with."""
    seen: list[torch.Size] = []
    decoder = getattr(model, "module", model).cls.predictions.decoder

    class Spy(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            of_decoder = function is nn.functional.linear and args[1].data_ptr() == decoder.weight.data_ptr()
            if of_decoder and args[0].dim() == 3:
                seen.append(args[0].shape)
            return function(*args, **(kwargs or {}))

    with Spy():
        return model(**batch), seen


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForPreTraining"])
def test_logits_only_when_asked_for(head: str) -> None:
    model = fastbert.optimize(build(head=head, train=True))
    batch = mlm_batch()
    if head == "ForPreTraining":
        batch["next_sentence_label"] = torch.tensor([0, 1, 0, 1])
    field = "logits" if head == "ForMaskedLM" else "prediction_logits"
    outputs, seen = shapes_seen(model, **batch)
    assert outputs.loss is outputs["loss"]
    assert outputs.loss is outputs[0]
    assert next(iter(outputs)) == "loss"
    assert list(outputs.keys())[1] == field
    assert field in outputs
    assert seen == []
    assert shapes_seen(model, **inputs("right"))[1] == [torch.Size([4, 21, 48])]
    assert getattr(outputs, field).shape == (4, 21, 120)
    stock = fastbert.restore(copy.deepcopy(model))(**batch)
    assert list(stock.keys()) == list(outputs.keys())
    readers = (
        lambda o: getattr(o, field),
        lambda o: o[field],
        lambda o: o[1],
        lambda o: o[1:][0],
        lambda o: o.to_tuple()[1],
        lambda o: dict(o.items())[field],
        lambda o: list(o.values())[1],
        lambda o: {**o}[field],
        lambda o: dict(o)[field],
        lambda o: o.get(field),
        lambda o: copy.copy(o)[field],
        lambda o: pickle.loads(pickle.dumps(type(o)(**{k: v.detach() for k, v in o.items()})))[field],
        lambda o: torch.utils._pytree.tree_map(lambda x: x, o)[field],
    )
    keep = real(batch)
    for read in readers:
        torch.testing.assert_close(read(model(**batch))[keep], stock[1][keep], atol=2e-5, rtol=2e-5)
    assert isinstance(outputs, type(stock))
    outputs = model(**batch)
    setattr(outputs, field, torch.ones(2))
    assert outputs[field].shape == (2,)
    assert outputs[1].shape == (2,)


def test_gradients_through_loss_and_logits_together() -> None:
    batch = mlm_batch()
    stock = build(head="ForMaskedLM", train=True)
    results = []
    for model in (fastbert.optimize(copy.deepcopy(stock)), stock, copy.deepcopy(stock).double()):
        outputs = model(**batch)
        total = outputs.loss + outputs.logits[real(batch)].square().mean()
        results.append(torch.autograd.grad(total, list(model.parameters()), allow_unused=True))
    judge_gradients([name for name, _ in stock.named_parameters()], *results)


def test_logits_keep_the_state_of_the_forward() -> None:
    model = fastbert.optimize(build(head="ForMaskedLM", train=True))
    batch = mlm_batch()
    outputs = model(**batch)
    with torch.no_grad():
        assert outputs.logits.requires_grad
    with torch.no_grad():
        outputs = model(**batch)
    assert not outputs.logits.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**batch)
    assert outputs.logits.dtype is torch.bfloat16
    outputs = model(**batch)
    outputs.loss.backward()
    with torch.no_grad():
        model.cls.predictions.decoder.weight.add_(1)
    with pytest.raises(RuntimeError, match=r"read them before optimizer.step\(\)"):
        outputs.logits  # noqa: B018


def swapped_data(model: Any, other: Any) -> None:
    for parameter, new in zip(model.parameters(), other.parameters(), strict=True):
        parameter.data = new.data


def assigned(model: Any, other: Any) -> None:
    model.load_state_dict(other.state_dict(), assign=True)


def hooked(model: Any, other: Any) -> None:
    model.cls.register_forward_hook(lambda module, args, output: output * 0)


def converted(model: Any, other: Any) -> None:
    model.bfloat16()


def moved(model: Any, other: Any) -> None:
    model.to("meta")


@pytest.mark.parametrize("change", [swapped_data, assigned, hooked, converted, moved])
@pytest.mark.parametrize("grad", [False, True])
def test_logits_are_those_of_the_forward_whatever_becomes_of_the_model(
    change: Callable[[Any, Any], None], grad: bool
) -> None:
    model, batch = fastbert.optimize(build(head="ForMaskedLM")), mlm_batch()
    expected = fastbert.restore(copy.deepcopy(model))(**batch).logits
    with torch.set_grad_enabled(grad):
        outputs = model(**batch)
    change(model, build(head="ForMaskedLM"))
    torch.testing.assert_close(outputs.logits[real(batch)], expected[real(batch)], atol=2e-5, rtol=2e-5)


def test_logits_of_a_functional_call() -> None:
    model, other, batch = fastbert.optimize(build(head="ForMaskedLM")), build(head="ForMaskedLM"), mlm_batch()
    with torch.no_grad():
        ours = torch.func.functional_call(model, dict(other.named_parameters()), (), batch)
        expected = other(**batch)
    torch.testing.assert_close(ours.loss, expected.loss)
    torch.testing.assert_close(ours.logits[real(batch)], expected.logits[real(batch)], atol=2e-5, rtol=2e-5)


def through_data(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(0.5)


def by_a_fused_optimizer(model: Any, part: str) -> None:
    """Writes that PyTorch does not count."""
    parameters = [parameter for name, parameter in model.named_parameters() if part in name]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(parameters, lr=0.1, fused=True).step()


def all_biases(model: Any) -> None:
    by_a_fused_optimizer(model, "bias")


def norm_alone(model: Any) -> None:
    by_a_fused_optimizer(model, "predictions.transform.LayerNorm.weight")


def decoder_bias_alone(model: Any) -> None:
    by_a_fused_optimizer(model, "cls.predictions.bias")


def dense_bias_through_data(model: Any) -> None:
    model.cls.predictions.transform.dense.bias.data[7] += 1


def last_words_through_data(model: Any) -> None:
    model.cls.predictions.decoder.weight.data[-1:] += 1


def most_words_through_data(model: Any) -> None:
    model.cls.predictions.decoder.weight.data[1:-1] += 1


def states_through_data(model: Any) -> None:
    model.seen.data.mul_(2)


def states_in_place(model: Any) -> None:
    model.seen.add_(1)


@pytest.mark.parametrize(
    "change",
    [
        through_data,
        all_biases,
        norm_alone,
        decoder_bias_alone,
        dense_bias_through_data,
        last_words_through_data,
        most_words_through_data,
        states_through_data,
        states_in_place,
    ],
)
def test_logits_of_overwritten_numbers_are_an_error(change: Callable[[Any], None]) -> None:
    model = fastbert.optimize(build(head="ForMaskedLM"))
    with torch.no_grad():
        outputs = model(**mlm_batch(), output_hidden_states=True)
        model.seen = outputs.hidden_states[-1]
        change(model)
    with pytest.raises(RuntimeError, match=r"overwritten since the forward; read them before optimizer.step\(\)"):
        outputs.logits  # noqa: B018


def test_model_built_in_inference_mode() -> None:
    with torch.inference_mode():
        model = fastbert.optimize(build(head="ForMaskedLM"))
    batch = mlm_batch()
    with torch.no_grad():
        ours, expected = model(**batch), fastbert.restore(copy.deepcopy(model))(**batch)
        torch.testing.assert_close(ours.loss, expected.loss)
        torch.testing.assert_close(ours.logits[real(batch)], expected.logits[real(batch)], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForPreTraining"])
@pytest.mark.parametrize("autocast", [False, True])
def test_dtype_of_the_loss(head: str, autocast: bool) -> None:
    model, batch = fastbert.optimize(build(head=head).bfloat16()), mlm_batch()
    if head == "ForPreTraining":
        batch["next_sentence_label"] = torch.tensor([0, 1, 0, 1])
    stock = fastbert.restore(copy.deepcopy(model))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, expected = model(**batch).loss, stock(**batch).loss
    assert ours.dtype is expected.dtype
    torch.testing.assert_close(ours, expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForPreTraining", "ForSequenceClassification"])
def test_hook_on_the_base_model_sees_the_ids(head: str) -> None:
    model, batch = fastbert.optimize(build(head=head)), mlm_batch()
    if head == "ForPreTraining":
        batch["next_sentence_label"] = torch.tensor([0, 1, 0, 1])
    if head == "ForSequenceClassification":
        batch["labels"] = torch.tensor([0, 1, 0, 1])
    seen: list[torch.Tensor] = []
    model.bert.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**batch)
    assert len(seen) == 1
    assert seen[0] is batch["input_ids"]


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForPreTraining", "ForTokenClassification"])
@pytest.mark.parametrize("family", ["bert", "roc_bert"])
def test_labels_at_masked_places_count_as_in_stock(head: str, family: str) -> None:
    if (head, family) == ("ForPreTraining", "roc_bert"):
        pytest.skip("it takes other labels")
    model, batch = fastbert.optimize(build(family, head)), inputs("right")
    batch["labels"] = batch["input_ids"] % 2
    if head == "ForPreTraining":
        batch["next_sentence_label"] = torch.tensor([0, 1, 0, 1])
    ours = model(**batch)
    assert all_fast(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")(**batch)
    expected = fastbert.restore(model)(**batch)
    for outputs in (ours, compiled):
        torch.testing.assert_close(outputs.loss, expected.loss)
        torch.testing.assert_close(outputs[1], expected[1], atol=2e-5, rtol=2e-5)


def check_loss(stock: Any, batch: dict[str, Any]) -> Any:
    """Loss and gradients, all of them, are those of stock. Returns the optimized model."""
    ours = fastbert.optimize(copy.deepcopy(stock))
    results = []
    for model in (ours, stock):
        loss = model(**batch).loss
        results.append((loss.detach(), torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)))
    torch.testing.assert_close(results[0][0], results[1][0])
    largest = max(gradient.abs().max() for gradient in results[1][1] if gradient is not None)
    for one, expected in zip(*(gradients for _, gradients in results), strict=True):
        assert (one is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(one, expected, atol=float(largest) * 1e-5, rtol=1e-4)
    return ours


MASK_FORMS = {
    "2-D": lambda mask: mask,
    "one row": lambda mask: mask.bool()[:, None, None, :],
    "every row": lambda mask: mask.bool()[:, None, None, :].expand(-1, 1, mask.shape[1], -1),
}


@pytest.mark.parametrize("form", MASK_FORMS)
@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("bert", "ForPreTraining"),
        ("roberta", "ForTokenClassification"),
        ("distilbert", "ForMaskedLM"),
        ("electra", "ForMaskedLM"),
        ("roc_bert", "ForPreTraining"),
    ],
)
def test_labels_at_masked_places_count_in_any_shape_under_any_mask(family: str, head: str, form: str) -> None:
    stock, batch = build(family, head), inputs("right")
    labels = batch["input_ids"] % 2
    batch["attention_mask"] = MASK_FORMS[form](batch["attention_mask"])
    name = "labels_input_ids" if (family, head) == ("roc_bert", "ForPreTraining") else "labels"
    if (family, head) == ("bert", "ForPreTraining"):
        batch["next_sentence_label"] = torch.tensor([0, 1, 0, 1])
    for given in (labels, labels.view(-1)):
        assert all_fast(check_loss(stock, batch | {name: given}))


def test_one_4d_mask_for_all_rows() -> None:
    batch = inputs("none")
    batch["attention_mask"] = (torch.arange(21) < 15)[None, None, None]
    check_loss(build(head="ForTokenClassification"), batch | {"labels": batch["input_ids"] % 2})


@pytest.mark.parametrize("form", MASK_FORMS)
def test_padding_without_labels_is_not_computed(form: str) -> None:
    batch = inputs("right")
    keep = real(batch)
    batch["attention_mask"] = MASK_FORMS[form](batch["attention_mask"])
    labels = (batch["input_ids"] % 2).masked_fill(~keep, -100)
    for given in (labels, labels.view(-1)):
        model = check_loss(build(head="ForTokenClassification"), batch | {"labels": given})
        logits = model(**batch, labels=given).logits[~keep]
        torch.testing.assert_close(logits, model.classifier.bias.expand_as(logits))  # of states that are zero
    model = check_loss(build(head="LMHeadModel", tie_word_embeddings=False), batch | {"labels": labels})
    logits = model(**batch, labels=labels).logits[~keep]
    assert torch.equal(logits, logits[:1].expand_as(logits))


def test_electra_leaves_out_the_labels_of_masked_places_itself() -> None:
    batch = inputs("holes")
    keep = real(batch)
    batch["labels"] = batch["input_ids"] % 2
    logits = check_loss(build("electra", "ForPreTraining"), batch)(**batch).logits[~keep]
    assert torch.equal(logits, logits[:1].expand_as(logits))


@pytest.mark.parametrize("form", MASK_FORMS)
@pytest.mark.parametrize("mask", ["left", "holes"])
@pytest.mark.parametrize("decoder", [False, True])
def test_masked_places_that_predict_the_next_token(decoder: bool, mask: str, form: str) -> None:
    batch = inputs(mask)
    batch["labels"] = batch["input_ids"].masked_fill(~real(batch), -100)
    batch["attention_mask"] = MASK_FORMS[form](batch["attention_mask"])
    for stock in (build(head="LMHeadModel", is_decoder=decoder), build("roberta", "ForCausalLM", is_decoder=decoder)):
        model = check_loss(stock, batch)
        assert all_fast(model) is not decoder
        assert type(fastbert.restore(model)) is type(stock)


def test_bert_generation_predicts_from_masked_places() -> None:
    config = transformers.BertGenerationConfig(**SMALL)
    batch = inputs("left")
    check_loss(transformers.BertGenerationDecoder(config).eval(), batch | {"labels": batch["input_ids"]})


def test_places_that_another_causal_loss_reads() -> None:
    stock, batch = build(head="LMHeadModel"), inputs("left")
    labels = batch["input_ids"].masked_fill(~real(batch), -100)
    first = torch.where(real(batch), -100, batch["input_ids"])
    check_loss(stock, batch | {"labels": labels, "shift_labels": first})
    stock.loss_function = lambda logits, labels, vocab_size: logits.square().mean()
    check_loss(stock, batch | {"labels": labels})


def test_compiled_causal_loss() -> None:
    torch.compiler.reset()
    model, batch = fastbert.optimize(build("roberta", "ForCausalLM", num_hidden_layers=1)), inputs("left")
    batch["labels"] = batch["input_ids"].masked_fill(~real(batch), -100)
    compiled = torch.compile(model, fullgraph=True, backend="eager")(**batch)
    torch.testing.assert_close(compiled.loss, fastbert.restore(model)(**batch).loss)


def loss_forward(model: Any) -> None:
    forward = model.mlm_loss_fct.forward
    model.mlm_loss_fct.forward = lambda *args: forward(*args) * 2


def loss_hook(model: Any) -> None:
    model.mlm_loss_fct.register_forward_hook(lambda module, args, output: output * 3)


def loss_weight(model: Any) -> None:
    model.mlm_loss_fct.weight = torch.linspace(0.1, 2.0, 120)


def loss_attribute(**changes: Any) -> Callable[[Any], None]:
    return lambda model: vars(model.mlm_loss_fct).update(changes)


class Squared(nn.Module):
    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return logits[labels >= 0].square().mean()


def another_loss(model: Any) -> None:
    model.mlm_loss_fct = Squared()


@pytest.mark.parametrize(
    "change",
    [
        loss_forward,
        loss_hook,
        loss_weight,
        another_loss,
        loss_attribute(label_smoothing=0.2),
        loss_attribute(reduction="sum"),
        loss_attribute(ignore_index=7),
    ],
)
def test_loss_that_is_a_part_of_distilbert(change: Callable[[Any], None]) -> None:
    stock, batch = build("distilbert", "ForMaskedLM"), mlm_batch()
    batch["labels"][batch["labels"] == -100] = 7
    ours = check_loss(stock, batch)
    for model in (stock, ours):
        change(model)
    expected = stock(**batch).loss
    torch.testing.assert_close(ours(**batch).loss, expected)  # after a call without
    check_loss(stock, batch)


def test_a_loss_that_is_no_mean_is_not_rescaled() -> None:
    model, batch = fastbert.optimize(build("distilbert", "ForMaskedLM")), mlm_batch()
    smoothed, total = nn.CrossEntropyLoss(label_smoothing=0.2), nn.CrossEntropyLoss(reduction="sum")
    count = (batch["labels"] != -100).sum()
    model.mlm_loss_fct = smoothed
    torch.testing.assert_close(model(**batch, num_items_in_batch=count * 2).loss, model(**batch).loss / 2)
    model.mlm_loss_fct = total
    torch.testing.assert_close(model(**batch, num_items_in_batch=count * 2).loss, model(**batch).loss)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its settings for the whole process, and those of another test would be in the way."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
def test_logits_stay_deferred_in_mixed_precision() -> None:
    model = fastbert.optimize(build(head="ForMaskedLM", train=True))
    batch = mlm_batch()
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare_model(model)
    outputs, seen = shapes_seen(prepared, **batch)
    assert seen == []
    assert outputs.loss.dtype is torch.float32
    assert list(outputs) == ["loss", "logits"]
    assert outputs.logits.dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        expected = fastbert.restore(copy.deepcopy(model))(**batch).logits.float()
    keep = real(batch)
    torch.testing.assert_close(outputs.logits[keep], expected[keep], atol=0.1, rtol=0.1)
    outputs.loss.backward()


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:You passed find_unused_parameters=true:UserWarning")
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("static_graph", [False, True])
@pytest.mark.parametrize("find_unused_parameters", [False, True])
@pytest.mark.parametrize("head", ["ForMaskedLM", "ForPreTraining"])
def test_logits_stay_deferred_under_ddp(head: str, find_unused_parameters: bool, static_graph: bool) -> None:
    batch = mlm_batch()
    if head == "ForPreTraining":
        batch["next_sentence_label"] = torch.tensor([0, 1, 0, 1])
    stock = build(head=head, train=True)
    ours, eager, truth = fastbert.optimize(copy.deepcopy(stock)), stock, copy.deepcopy(stock).double()
    parallel = nn.parallel.DistributedDataParallel(
        ours, find_unused_parameters=find_unused_parameters, static_graph=static_graph
    )
    for _ in range(2):  # the first step of a static graph goes another way than later ones
        outputs, seen = shapes_seen(parallel, **batch)
        assert seen == []
        assert all_fast(ours), str(fastbert.report(ours))
        given = [outputs, eager(**batch), truth(**batch)]
        assert list(outputs.keys()) == list(given[1].keys())
        assert isinstance(outputs, type(given[1]))
        torch.testing.assert_close(outputs[1][real(batch)], given[1][1][real(batch)], atol=2e-5, rtol=2e-5)
        results = []
        for model, one in zip((ours, eager, truth), given, strict=True):
            model.zero_grad()
            (one.loss + one[1][real(batch)].square().mean()).backward()
            results.append([p.grad for p in model.parameters()])
        judge_gradients([name for name, _ in stock.named_parameters()], *results)
        with torch.no_grad():
            assert not parallel(**batch)[1].requires_grad


@pytest.mark.usefixtures("fresh_accelerate", "one_process")
def test_logits_stay_deferred_under_ddp_in_mixed_precision() -> None:
    batch, keep = mlm_batch(), real(mlm_batch())
    model = fastbert.optimize(build(head="ForMaskedLM", train=True))
    prepared = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    parallel = nn.parallel.DistributedDataParallel(prepared, find_unused_parameters=True)
    outputs, seen = shapes_seen(parallel, **batch)
    assert seen == []
    assert outputs.logits.dtype is torch.float32
    outputs.logits[keep].square().mean().backward()  # DDP waits for every parameter
    with torch.autocast("cpu", torch.bfloat16):
        expected = fastbert.restore(copy.deepcopy(model))(**batch).logits.float()
    torch.testing.assert_close(outputs.logits[keep], expected[keep], atol=0.1, rtol=0.1)


def test_tuple_output() -> None:
    model = fastbert.optimize(build(head="ForMaskedLM", train=True))
    batch = mlm_batch()
    loss, logits = model(**batch, return_dict=False)
    torch.testing.assert_close(loss, model(**batch).loss)
    assert logits.shape == (4, 21, 120)
    positional = model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"])
    torch.testing.assert_close(positional.loss, loss)
    with pytest.raises(TypeError):
        model(batch["input_ids"], input_ids=batch["input_ids"])


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForPreTraining"])
def test_labels_of_bytes(head: str) -> None:
    """The other type that PyTorch's cross-entropy takes."""
    model = build("bert", head, vocab_size=200)
    batch = inputs("none") | {"labels": torch.randint(200, inputs("none")["input_ids"].shape, dtype=torch.uint8)}
    if head == "ForPreTraining":
        batch["next_sentence_label"] = torch.tensor([0, 1] * 8)[: len(batch["input_ids"])]
    expected = model(**batch).loss
    torch.testing.assert_close(fastbert.optimize(model)(**batch).loss, expected)
    assert fastbert.report(model).calls["fast"] > 0


def test_no_label_at_all() -> None:
    batch = mlm_batch(share=0.0)
    model = fastbert.optimize(build(head="ForMaskedLM", train=True))
    loss = model(**batch).loss
    assert loss.isnan() == fastbert.restore(copy.deepcopy(model))(**batch).loss.isnan()
    model(**batch, num_items_in_batch=5).loss.backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_a_micro_batch_without_labels_adds_nothing_to_a_sum() -> None:
    batch = inputs("right")
    model = fastbert.optimize(build(head="ForTokenClassification", train=True))
    loss = model(**batch, labels=torch.full_like(batch["input_ids"], -100), num_items_in_batch=5).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_a_changed_head_falls_back() -> None:
    batch = mlm_batch()
    model = fastbert.optimize(build(head="ForMaskedLM", train=True))
    model.cls.predictions.transform.register_forward_hook(lambda module, args, output: output * 2)
    loss = model(**batch).loss
    torch.testing.assert_close(loss, fastbert.restore(model)(**batch).loss)


def one_bias(head: Any) -> None:
    head.transform.dense.bias.data = torch.ones(1)


def narrow(head: Any) -> None:
    dense, decoder = head.transform.dense, head.decoder
    dense.weight, dense.bias = (nn.Parameter(p[:16].detach().clone()) for p in (dense.weight, dense.bias))
    decoder.weight = nn.Parameter(decoder.weight[:, :16].detach().clone())
    head.transform.LayerNorm = nn.LayerNorm(16)


def other_eps(head: Any) -> None:
    head.transform.LayerNorm.eps = 0.5


def wrong_norm(head: Any) -> None:
    head.transform.LayerNorm.normalized_shape = (24,)


def fewer_words(head: Any) -> None:
    decoder = head.decoder
    decoder.weight, decoder.bias = (nn.Parameter(p[:60].detach().clone()) for p in (decoder.weight, decoder.bias))


@pytest.mark.parametrize("change", [one_bias, narrow, other_eps])
def test_numbers_of_the_head_changed_after_a_call(change: Callable[[Any], None]) -> None:
    model, batch = fastbert.optimize(build(head="ForMaskedLM")), mlm_batch()
    model(**batch)
    change(model.cls.predictions)
    loss = model(**batch).loss
    torch.testing.assert_close(loss, fastbert.restore(model)(**batch).loss)


@pytest.mark.parametrize(("change", "error"), [(wrong_norm, RuntimeError), (fewer_words, ValueError)])
def test_a_head_that_stock_refuses(change: Callable[[Any], None], error: type[Exception]) -> None:
    model, batch = fastbert.optimize(build(head="ForMaskedLM")), mlm_batch()
    model(**batch)
    change(model.cls.predictions)
    with pytest.raises(error, match="normalized_shape|batch_size"):
        model(**batch)


ACCUMULATED = {
    "ForMaskedLM": lambda b: {"labels": b["labels"]},
    "ForTokenClassification": lambda b: {"labels": torch.where(b["labels"] < 0, b["labels"], b["labels"] % 2)},
    "ForSequenceClassification": lambda b: {"labels": torch.arange(4) % 2},
    "ForNextSentencePrediction": lambda b: {"labels": torch.arange(4) % 2},
}


@pytest.mark.parametrize("head", ACCUMULATED)
def test_accumulated_batches_make_one_big_batch(head: str) -> None:
    model = fastbert.optimize(build(head=head, train=True))
    batch = mlm_batch()
    batch |= ACCUMULATED[head](batch)
    model(**batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    num_items = (batch["labels"] != -100).sum()
    for rows in (slice(0, 1), slice(1, 4)):
        model(**{name: value[rows] for name, value in batch.items()}, num_items_in_batch=num_items).loss.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-5, rtol=1e-4, msg=name)


class Rows(torch.utils.data.Dataset):
    def __init__(self, batch: dict[str, torch.Tensor]) -> None:
        self.rows = [{name: value[i] for name, value in batch.items()} for i in range(4)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return self.rows[i]


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForSequenceClassification", "ForQuestionAnswering"])
def test_trainer_accumulates_to_the_gradient_of_one_batch(head: str, tmp_path: Path) -> None:
    stock = build(head=head, num_labels=2)
    batch = mlm_batch()
    if head == "ForSequenceClassification":
        batch["labels"] = torch.arange(4) % 2
    elif head == "ForQuestionAnswering":
        del batch["labels"]
        batch |= {"start_positions": torch.arange(4), "end_positions": torch.arange(4) + 2}
    weights = []
    for size, steps in ((4, 1), (1, 4)):
        model = fastbert.optimize(copy.deepcopy(stock))
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=2,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=Rows(batch))
        result = trainer.train()
        weights.append((result.training_loss, copy.deepcopy(model.state_dict())))
        assert all_fast(model)
    assert weights[0][0] == pytest.approx(weights[1][0], rel=1e-3)
    for name, value in weights[0][1].items():
        if value.is_floating_point():
            torch.testing.assert_close(weights[1][1][name], value, atol=2e-4, rtol=2e-3, msg=name)


def test_trainer_evaluates_and_saves(tmp_path: Path) -> None:
    model = fastbert.BertForSequenceClassification(build(head="ForSequenceClassification").config)
    batch = mlm_batch()
    batch["labels"] = torch.arange(4) % 2
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=Rows(batch),
        eval_dataset=Rows(batch),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    trainer.train()
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1
    trainer.save_model(str(tmp_path / "saved"))
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert type(again) is transformers.BertForSequenceClassification
    assert again.config.architectures == ["BertForSequenceClassification"]
    del batch["labels"]
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**batch).logits, model.eval()(**batch).logits)


def test_mlm_loss_counts_as_the_op_says() -> None:
    model = fastbert.optimize(build(head="ForMaskedLM"))
    batch = mlm_batch()
    head = model.cls.predictions
    norm = head.transform.LayerNorm
    dense = head.transform.dense
    hidden = model.bert(batch["input_ids"], batch["attention_mask"])[0]
    loss, count = ops.mlm_loss(
        hidden,
        batch["labels"],
        head.decoder.weight,
        head.decoder.bias,
        dense.weight,
        dense.bias,
        norm.weight,
        norm.bias,
    )
    assert count == (batch["labels"] != -100).sum()
    torch.testing.assert_close(model(**batch).loss, loss)


@pytest.mark.parametrize("backend", [None, "triton"], ids=["any", "triton"])
def test_two_processes(backend: str | None, tmp_path: Path, run_commands: Any) -> None:
    """DDP and FSDP2 (layer by layer) have the gradients of one process, DDP also of losses made of the logits."""
    settings, changes, variables = DDP_SETTINGS, {}, {}
    if backend == "triton":
        pytest.importorskip("triton")
        settings, changes = [("both", False, False)], {"num_hidden_layers": 1}  # the interpreter takes its time
        variables = {"FASTBERT_BACKEND": "triton", "TRITON_INTERPRET": "1"}
    replicated, batch = build(head="ForMaskedLM", train=True, **changes), mlm_batch()
    sharded, holes = build(train=True, **changes), inputs("holes")
    given: dict[str, dict[str, Any]] = {
        kind: {"config": stock.config, "state": stock.state_dict(), "batch": rows}
        for kind, stock, rows in (("ddp", replicated, batch), ("fsdp", sharded, holes))
    }
    given["ddp"]["settings"] = settings
    torch.save(given, tmp_path / "given.pt")
    worker = str(Path(__file__).with_name("parallel_worker.py"))
    run_commands([[sys.executable, worker, str(rank), str(tmp_path)] for rank in (0, 1)], **variables)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))

    halves = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 2), slice(2, 4))]
    expected = {}
    for kind, loss in LOSSES.items():
        replicated.zero_grad()
        (sum(loss(replicated(**half), half) for half in halves) / 2).backward()
        expected[kind] = gradients_of(replicated)
    sharded(**holes)[0][real(holes)].square().sum().backward()
    expected["fsdp"] = gradients_of(sharded)
    assert one.keys() == other.keys() == {(*setting, step) for setting in settings for step in (0, 1)} | {"fsdp"}
    for case in one:
        kind, tolerance = ("fsdp", 1e-4) if case == "fsdp" else (case[0], 1e-5)
        assert one[case].keys() == other[case].keys() == expected[kind].keys()
        for name, gradient in expected[kind].items():
            assert torch.equal(one[case][name], other[case][name])
            torch.testing.assert_close(one[case][name], gradient, atol=tolerance, rtol=1e-4, msg=f"{case} {name}")


def test_a_hanging_command_is_ended_with_its_children(run_commands: Any) -> None:
    """What keeps the test above from holding up the suite."""
    child = "import time; print('waiting', flush=True); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    before = set(psutil.Process().children(recursive=True))  # of other tests: a compiler's workers, say
    with pytest.raises(pytest.fail.Exception, match="not finished after 3 s.*\n(.|\n)*waiting"):
        run_commands([[sys.executable, "-c", parent]], seconds=3)
    left = set(psutil.Process().children(recursive=True)) - before
    assert not [p for p in left if p.status() != psutil.STATUS_ZOMBIE]
