"""A fast model gives what the stock model gives, in every family, head and kind of mask."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from comparison import MASKS, PREFIXES, all_fast, build, check_model, contestants, inputs, judge, judge_gradients, real

import fastbert


@pytest.mark.parametrize("family", PREFIXES)
def test_family(family: str) -> None:
    check_model(build(family), inputs("right"))


@pytest.mark.parametrize("mask", MASKS)
def test_mask(mask: str) -> None:
    check_model(build(), inputs(mask))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_mask_of_another_dtype(dtype: torch.dtype) -> None:
    batch = inputs("holes")
    batch["attention_mask"] = batch["attention_mask"].to(dtype)
    check_model(build(), batch)


def test_bfloat16() -> None:
    check_model(build(), inputs("right"), torch.bfloat16)


@pytest.mark.parametrize("heads", [1, 2, 6, 12])
def test_head_sizes(heads: int) -> None:
    check_model(build(hidden_size=96, num_attention_heads=heads), inputs("holes", batch=2))


def test_masked_places_are_zero() -> None:
    batch = inputs("holes")
    y = fastbert.optimize(build())(**batch)[0]
    assert (y[~real(batch)] == 0).all()
    assert (y[real(batch)] != 0).any()


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification", "ForPreTraining"])
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_pooled_outputs_of_left_padding(head: str, compiled: bool) -> None:
    """They read the first place, though it is masked: stock computes it, and so do we, gradients included."""
    stock = build(head=head)
    batch = inputs("left")
    results = []
    for model in contestants(stock):
        call = model
        if compiled and not results:
            torch.compiler.reset()
            call = torch.compile(model, fullgraph=True, backend="eager")
        outputs = call(**batch)
        pooled = outputs["pooler_output" if head == "Model" else list(outputs)[-1]]
        gradients = torch.autograd.grad(pooled.square().sum(), list(model.parameters()), allow_unused=True)
        if not results and not compiled:
            assert all_fast(model), str(fastbert.report(model))
        results.append((pooled, gradients))
    judge("pooled", *(pooled for pooled, _ in results))
    judge_gradients([name for name, _ in stock.named_parameters()], *(gradients for _, gradients in results))


def test_sequences_of_one_token_and_one_sequence() -> None:
    check_model(build(), inputs("none", batch=3, seqlen=1))
    check_model(build(), inputs("none", batch=1, seqlen=17))


@pytest.mark.parametrize("shape", [(4, 1, 21, 21), (4, 3, 21, 21), (1, 3, 21, 21), (4, 1, 1, 21)])
def test_additive_4d_mask(shape: tuple[int, ...]) -> None:
    batch: dict[str, Any] = inputs("none") | {"attention_mask": None}
    bias = torch.randn(shape)
    ours, eager, truth = contestants(build())
    mask = batch.pop("attention_mask")
    assert mask is None
    result = [m(**batch, attention_mask=bias.to(m.dtype))[0] for m in (ours, eager, truth)]
    judge("last_hidden_state", *result)
    assert all_fast(ours)


def test_bool_4d_mask_per_head() -> None:
    batch = inputs("none")
    visible = torch.rand(4, 3, 21, 21) < 0.6
    visible |= torch.eye(21, dtype=torch.bool)
    additive = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, torch.finfo(torch.float32).min)
    ours, eager, truth = contestants(build())
    result = [ours(**batch, attention_mask=visible)[0]]
    result += [m(**batch, attention_mask=additive.to(m.dtype))[0] for m in (eager, truth)]
    judge("last_hidden_state", *result)
    assert all_fast(ours)


def test_a_query_that_a_bool_4d_mask_forbids_everything() -> None:
    """Its attention is 0, as SDPA has it, and it learns nothing of what it may not see."""
    batch = inputs("none")
    visible = torch.ones(4, 1, 21, 21, dtype=torch.bool)
    visible[1, :, 4] = visible[2, :, 7:9] = False
    ours, _, truth = contestants(build())
    truth.set_attn_implementation("sdpa")
    found, expected = (m(**batch, attention_mask=visible)[0] for m in (ours, truth))
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    assert all_fast(ours)


def test_gradient_of_a_4d_bias() -> None:
    batch = inputs("none")
    gradients = []
    bias = torch.randn(4, 3, 21, 21)
    upstream = torch.randn(4, 21, 48)
    for model in contestants(build()):
        leaf = bias.to(model.dtype).requires_grad_()
        y = model(**batch, attention_mask=leaf)[0]
        gradients.append(torch.autograd.grad(y, leaf, upstream.to(y.dtype))[0])
    judge("gradient of the bias", *gradients, 3.0)


def test_packed_input_equals_each_sequence_alone() -> None:
    lengths = [5, 1, 12, 3]
    model = fastbert.optimize(build())
    sequences = [torch.randint(2, 100, (1, n)) for n in lengths]
    alone = torch.cat([model(input_ids=ids)[0] for ids in sequences], 1)
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    together = model(
        input_ids=torch.cat(sequences, 1),
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        cu_seq_lens_q=cu_seqlens,
        cu_seq_lens_k=cu_seqlens,
        max_length_q=12,
        max_length_k=12,
    )[0]
    torch.testing.assert_close(together, alone)
    assert all_fast(model)


@pytest.mark.parametrize("watched", ["hidden states", "a hook"])
def test_packed_input_that_somebody_watches(watched: str) -> None:
    model = fastbert.optimize(build())
    cu_seqlens = torch.tensor([0, 5, 6], dtype=torch.int32)
    packed = {"input_ids": torch.randint(2, 100, (1, 6)), "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0]])}
    expected = model(**packed, cu_seq_lens_q=cu_seqlens)[0]
    if watched == "a hook":
        model.encoder.layer[0].register_forward_hook(lambda *_: None)
    found = model(**packed, cu_seq_lens_q=cu_seqlens, output_hidden_states=watched == "hidden states")
    torch.testing.assert_close(found[0], expected)
    if watched == "hidden states":
        torch.testing.assert_close(found.hidden_states[-1], expected)


def test_packed_input_in_stock_layers() -> None:
    lengths = [5, 12, 3]
    model = fastbert.optimize(build(hidden_act="relu"))
    sequences = [torch.randint(2, 100, (1, n)) for n in lengths]
    alone = torch.cat([model(input_ids=ids)[0] for ids in sequences], 1)
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = {"input_ids": torch.cat(sequences, 1), "position_ids": positions, "cu_seq_lens_q": cu_seqlens}
    torch.testing.assert_close(model(**packed)[0], alone)
    stock = fastbert.restore(copy.deepcopy(model))
    stock.set_attn_implementation("fastbert")  # without swapped modules, the attention function alone has to do it
    torch.testing.assert_close(stock(**packed)[0], alone)


def test_inputs_embeds_and_token_types() -> None:
    batch = inputs("right")
    ours, eager, truth = contestants(build())
    kinds = torch.randint(0, 2, batch["input_ids"].shape)
    keep = real(batch)
    judge("token types", *(m(**batch, token_type_ids=kinds)[0][keep] for m in (ours, eager, truth)))
    embeds = torch.randn(4, 21, 48)
    mask = batch["attention_mask"]
    results = (m(inputs_embeds=embeds.to(m.dtype), attention_mask=mask)[0][keep] for m in (ours, eager, truth))
    judge("inputs_embeds", *results)
    positions = torch.randperm(70)[:21][None]
    judge("position_ids", *(m(**batch, position_ids=positions)[0][keep] for m in (ours, eager, truth)))


HEADS = {
    "ForPreTraining": {"labels": "tokens", "next_sentence_label": "pairs"},
    "ForMaskedLM": {"labels": "tokens"},
    "LMHeadModel": {"labels": "tokens"},
    "ForNextSentencePrediction": {"labels": "pairs"},
    "ForSequenceClassification": {"labels": "classes"},
    "ForTokenClassification": {"labels": "tags"},
    "ForQuestionAnswering": {"start_positions": "places", "end_positions": "places"},
    "ForMultipleChoice": {"labels": "pairs"},
}


def labels_of(kind: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    ids = batch["input_ids"]
    rows = ids.shape[0]
    tokens = ids.masked_fill((torch.rand(ids.shape) > 0.3) | ~real(batch), -100)
    return {
        "tokens": tokens,
        "tags": torch.where(tokens >= 0, tokens % 3, tokens),
        "pairs": torch.arange(rows) % 2,
        "classes": torch.arange(rows) % 3,
        "places": torch.arange(rows),
    }[kind]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("imported", [False, True], ids=["optimize", "import"])
def test_head(head: str, imported: bool) -> None:
    stock = build(head=head, num_labels=3 if head != "ForQuestionAnswering" else 2)
    ours, eager, truth = contestants(stock)
    if imported:
        ours = getattr(fastbert, f"Bert{head}")(copy.deepcopy(stock.config))
        ours.load_state_dict(stock.state_dict())
        ours.eval()
    per_token = head in ("ForMaskedLM", "ForPreTraining", "LMHeadModel", "ForTokenClassification")
    parameters = [list(model.parameters()) for model in (ours, eager, truth)]
    collected: list[dict[str, list[torch.Tensor]]] = [{}, {}, {}]
    gradients: list[list[tuple[torch.Tensor | None, ...]]] = [[], [], []]
    for _ in range(16):  # a loss is a single number, the gradient of some biases a few: the error of one says little
        batch = inputs("right")
        extra = {name: labels_of(kind, batch) for name, kind in HEADS[head].items()}
        keep = real(batch)
        if head == "ForMultipleChoice":
            batch = {name: value[:, None].repeat(1, 2, 1) for name, value in batch.items()}
            batch["input_ids"][:, 1] = batch["input_ids"][:, 1].flip(0)
        for model, values, leaves, found in zip((ours, eager, truth), collected, parameters, gradients, strict=True):
            outputs = model(**batch, **extra)
            for name, value in outputs.items():
                values.setdefault(name, []).append((value[keep] if per_token and value.dim() == 3 else value).detach())
            found.append(torch.autograd.grad(outputs.loss, leaves, allow_unused=True))
    names = [name for name, _ in stock.named_parameters()]
    judge_gradients(names, *([sample(each) for each in zip(*found, strict=True)] for found in gradients))
    assert list(collected[0]) == list(collected[1])
    for name in collected[0]:
        judge(name, *(torch.cat([value.reshape(-1) for value in values[name]]) for values in collected))
    assert all_fast(ours)


def sample(gradients: tuple[torch.Tensor | None, ...]) -> torch.Tensor | None:
    """Of a parameter's gradients for several batches the first, or all of them where each has a few elements only."""
    found = [gradient for gradient in gradients if gradient is not None]
    if not found:
        return None
    return torch.stack(found) if found[0].numel() < 10 else found[0]


@pytest.mark.parametrize("family", ["roberta", "electra", "distilbert", "ernie", "data2vec_text"])
def test_masked_language_model_of_another_family(family: str) -> None:
    batch = inputs("right")
    labels = labels_of("tokens", batch)
    results = []
    stock = build(family, "ForMaskedLM")
    for model in contestants(stock):
        outputs = model(**batch, labels=labels)
        gradients = torch.autograd.grad(outputs.loss, list(model.parameters()), allow_unused=True)
        results.append((outputs.loss.detach(), outputs.logits[real(batch)], gradients))
    torch.testing.assert_close(results[0][0], results[1][0])
    judge("logits", *(r[1] for r in results))
    judge_gradients([name for name, _ in stock.named_parameters()], *(r[2] for r in results))


def test_question_answering_keeps_the_padded_places() -> None:
    batch = inputs("right")
    ours, eager, truth = contestants(build(head="ForQuestionAnswering"))
    judge("start_logits", *(m(**batch).start_logits for m in (ours, eager, truth)))


@pytest.mark.parametrize("summary", ["first", "last", "mean", "cls_index"])
def test_summaries_of_electra(summary: str) -> None:
    batch = {name: value.view(2, 2, 21) for name, value in inputs("right").items()}
    stock = build("electra", "ForMultipleChoice", summary_type=summary)
    results = []
    for model in contestants(stock):
        outputs = model(**batch, labels=torch.tensor([0, 1]))
        gradients = torch.autograd.grad(outputs.loss, list(model.parameters()), allow_unused=True)
        results.append((outputs.logits, gradients))
        assert results[1:] or all_fast(model)
    judge("logits", *(logits for logits, _ in results))
    judge_gradients([name for name, _ in stock.named_parameters()], *(gradients for _, gradients in results))


def test_real_weights(minilm: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    texts = ["How far is it from Denver to Aspen ?", "What is an atom ?", "Who , after all , painted it ?" * 3]
    batch = dict(tokenizer(texts, return_tensors="pt", padding=True))
    stock = transformers.AutoModel.from_pretrained(minilm).eval()
    ours, eager, truth = contestants(stock)
    with torch.no_grad():
        outputs = [m(**batch) for m in (ours, eager, truth)]
    judge("last_hidden_state", *(o.last_hidden_state[real(batch)] for o in outputs))
    judge("pooler_output", *(o.pooler_output for o in outputs))
    assert all_fast(ours)
