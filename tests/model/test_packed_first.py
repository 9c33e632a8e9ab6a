"""Base models pack before they embed, unless somebody could tell: then embeddings and encoder see padded tensors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from comparison import MASKS, all_fast, build, check_model, inputs, real
from torch import Tensor
from transformers.utils.output_capturing import _active_collector

import fastbert
from fastbert import dispatch, encoder, ops, swapped

FAMILIES = ("bert", "roberta", "xlm_roberta", "camembert", "data2vec_text", "electra")
PADDED = (4, 21)  # the shape of the ids that `inputs` makes


def base(family: str = "bert", **changes: Any) -> Any:
    return build(family, **({"embedding_size": 48} if family == "electra" else {}) | changes)


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the ids that the embedding op got."""
    shapes = []

    def embedding(input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shapes.append(tuple(input_ids.shape))
        return ops.embedding(input_ids, *args, **kwargs)

    class Ops:
        def __getattr__(self, name: str) -> Any:
            return embedding if name == "embedding" else getattr(ops, name)

    monkeypatch.setattr(encoder, "ops", Ops())
    return shapes


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients(family: str, mask: str, embedded: list[tuple[int, ...]]) -> None:
    batch = inputs(mask)
    if "roberta" not in family and family not in ("camembert", "data2vec_text"):
        batch["token_type_ids"] = torch.randint(2, PADDED)
    check_model(base(family), batch)
    keep = real(batch)
    keep[:, 0] |= keep.any(1)  # what poolers read
    assert embedded == [PADDED if keep.all() else (int(keep.sum()),)]


@pytest.mark.parametrize("rows", [1, 4])
def test_given_positions(rows: int, embedded: list[tuple[int, ...]]) -> None:
    batch = inputs("left") | {"position_ids": torch.randint(72, (rows, 21))}
    check_model(base(), batch)
    assert len(embedded[0]) == 1


@pytest.mark.parametrize("family", ["bert", "electra"])
@pytest.mark.parametrize("pooled", [True, False])
def test_output_classes(family: str, pooled: bool) -> None:
    stock = base(family)
    if not pooled and family == "bert":
        stock.pooler = None
    batch = inputs("right")
    model = fastbert.optimize(copy.deepcopy(stock))
    keep = real(batch)
    with torch.no_grad():
        ours, theirs = model(**batch), stock(**batch)
        assert type(ours) is type(theirs)
        assert list(ours) == list(theirs)
        torch.testing.assert_close(ours[0][keep], theirs[0][keep], atol=2e-5, rtol=2e-5)
        if "pooler_output" in ours:
            torch.testing.assert_close(ours.pooler_output, theirs.pooler_output, atol=2e-5, rtol=2e-5)
        for one in (model, stock):
            assert type(one(**batch, return_dict=False)) is tuple
            one.config.return_dict = False
        assert len(model(*batch.values())) == len(stock(*batch.values()))


def test_with_a_token_bound(embedded: list[tuple[int, ...]]) -> None:
    model = fastbert.optimize(base())
    batch = inputs("holes")
    expected = model(**batch)[0]
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()), allow_unused=True)
    with fastbert.token_bound(70):
        y = model(**batch)[0]
    again = torch.autograd.grad(y.square().sum(), list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(y, expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(again, gradients, atol=1e-4, rtol=1e-4)
    assert embedded[1] == (70,)


def test_packed_input(embedded: list[tuple[int, ...]]) -> None:
    model = fastbert.optimize(base()).eval()
    batch = inputs("right")
    keep = real(batch)
    ends = torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0))
    positions = torch.arange(21).expand(PADDED)[keep]
    with torch.no_grad():
        y = model(batch["input_ids"][keep][None], position_ids=positions[None], cu_seq_lens_q=ends)[0][0]
        torch.testing.assert_close(y, model(**batch)[0][keep], atol=2e-5, rtol=2e-5)
    assert embedded == [(1, int(keep.sum())), (int(keep.sum()),)]


def test_dropout_repeats_from_its_seed(embedded: list[tuple[int, ...]]) -> None:
    model = fastbert.optimize(base(train=True, hidden_dropout_prob=0.1))
    batch = inputs("right")
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        y = model(**batch)[0]
        results.append((y, *torch.autograd.grad(y.square().sum(), list(model.parameters()), allow_unused=True)))
    torch.testing.assert_close(results[1], results[0])
    assert all(len(shape) == 1 for shape in embedded)


def test_inputs_that_have_to_require_a_gradient(embedded: list[tuple[int, ...]]) -> None:
    """A hook of transformers on the word embeddings asks for it, where all parameters are frozen."""
    model = fastbert.optimize(base()).requires_grad_(False)
    batch = inputs("right")
    assert not model(**batch)[0].requires_grad
    model.enable_input_require_grads()
    assert model(**batch)[0].requires_grad
    assert all(len(shape) == 1 for shape in embedded)


@pytest.mark.parametrize("name", ["token_type_ids", "position_ids"])
def test_bad_ids(name: str) -> None:
    model = fastbert.optimize(base())
    batch = inputs("right")
    with pytest.raises(ValueError, match=rf"embedding: {name} must have a shape that broadcasts .*\[4, 21\]"):
        model(**batch, **{name: torch.zeros(4, 20, dtype=torch.long)})
    with pytest.raises(TypeError, match=f"embedding: {name} must be torch.int64"):
        model(**batch, **{name: torch.zeros(4, 21)})
    with pytest.raises(IndexError, match=f"embedding: {name} has values"):
        model(**batch, **{name: torch.full((4, 21), 72)})
    with pytest.raises(TypeError, match="embedding: input_ids must be torch.int64"):
        model(**batch | {"input_ids": torch.rand(4, 21)})


# --- what has to see padded tensors -----------------------------------------------------------------------------------


def hooked_embeddings(model: Any) -> None:
    model.embeddings.register_forward_hook(lambda module, args, output: output * 1.5)


def pre_hooked_embeddings(model: Any) -> None:
    model.embeddings.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs), with_kwargs=True)


def backward_hook(model: Any) -> None:
    model.embeddings.register_full_backward_hook(lambda module, gradients, outputs: None)


def hooked_encoder(model: Any) -> None:
    model.encoder.register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))


def hooked_layer(model: Any) -> None:
    model.encoder.layer[1].register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))


def new_forward(part: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        module = model.get_submodule(part)
        module.forward = lambda *args, stock=module.forward, **kwargs: stock(*args, **kwargs)

    change.__name__ = f"forward of {part}"
    return change


def subclass(part: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        module = model.get_submodule(part)

        class Mine(type(module)):  # type: ignore[misc]
            pass

        module.__class__ = Mine

    change.__name__ = f"subclass of {part}"
    return change


def foreign_layer(model: Any) -> None:
    model.encoder.layer[1].__class__ = transformers.models.bert.modeling_bert.BertLayer


def all_stock(model: Any) -> None:
    for layer in model.encoder.layer:
        layer.chunk_size_feed_forward = 7


def records_hidden_states(model: Any) -> None:
    model.config.output_hidden_states = True


def eager(model: Any) -> None:
    model.set_attn_implementation("eager")


CHANGES = [hooked_embeddings, pre_hooked_embeddings, backward_hook, hooked_encoder, hooked_layer, foreign_layer]
CHANGES += [all_stock, records_hidden_states, eager]
CHANGES += [new_forward("embeddings"), new_forward("encoder"), new_forward("encoder.layer.0")]
CHANGES += [subclass("embeddings"), subclass("encoder")]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model(change: Callable[[Any], None], embedded: list[tuple[int, ...]]) -> None:
    stock, batch = base(), inputs("right")
    model = fastbert.optimize(copy.deepcopy(stock))
    model(**batch)
    change(model)
    if change is not foreign_layer and "subclass" not in change.__name__:
        change(stock)
    keep = real(batch)
    model(**batch)  # in which layers find that they are not fast any more
    del embedded[:]
    y = model(**batch)[0]
    torch.testing.assert_close(y[keep], stock(**batch)[0][keep], atol=2e-5, rtol=2e-5)
    assert embedded == ([] if change is eager else [PADDED])


CALLS: dict[str, dict[str, Any]] = {
    "hidden states": {"output_hidden_states": True},
    "attentions": {"output_attentions": True},
    "4-D mask": {"attention_mask": real(inputs("right"))[:, None, None, :]},
    "additive mask": {"attention_mask": torch.zeros(4, 1, 21, 21)},
    "padding kept": {swapped.KEEP_PADDING: True},
    "an argument for the attention": {"sliding": 3},
}


@pytest.mark.parametrize("extra", CALLS.values(), ids=CALLS)
def test_a_call_that_wants_more(extra: dict[str, Any], embedded: list[tuple[int, ...]]) -> None:
    stock = base()
    model = fastbert.optimize(copy.deepcopy(stock))
    batch = inputs("right") | extra
    y = model(**batch)[0]
    assert embedded == ([] if "output_attentions" in extra else [PADDED])
    keep = real(inputs("right"))
    torch.testing.assert_close(y[keep], stock(**batch)[0][keep], atol=2e-5, rtol=2e-5)


def test_embeddings_given(embedded: list[tuple[int, ...]]) -> None:
    model = fastbert.optimize(base())
    batch = inputs("right")
    embeds = model.embeddings.word_embeddings(batch.pop("input_ids"))
    model(inputs_embeds=embeds, **batch)
    assert embedded == []
    embeddings = fastbert.report(model).embeddings
    assert [(entry["path"], entry["reason"]) for entry in embeddings] == [("stock", "inputs_embeds were given")]
    model(**inputs("right"))
    assert fastbert.report(model).embeddings[0]["path"] == "fast"


def test_a_call_that_captured_outputs_leaves_nothing_behind(
    embedded: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers never takes its hooks away again."""
    if dispatch.extension_error is not None:
        pytest.skip(dispatch.extension_error)
    model, batch = fastbert.optimize(base()), inputs("right")
    layers: list[int] = []
    at_once = encoder.layers_op

    def counted(*arguments: Any) -> Tensor | None:
        layers.append(len(arguments[6]) // 16)
        return at_once(*arguments)

    monkeypatch.setattr(encoder, "layers_op", counted)
    with torch.no_grad():
        expected = model(**batch)[0]
        assert len(model(**batch, output_hidden_states=True).hidden_states) == 3
        assert torch.equal(model(**batch)[0], expected)
    assert layers == [2, 1, 1, 2]
    assert embedded[0] == embedded[-1] != PADDED


def test_stock_embeddings(embedded: list[tuple[int, ...]]) -> None:
    stock, batch = base(), inputs("right")
    for model in (fastbert.optimize(copy.deepcopy(stock)), stock):
        model.embeddings.word_embeddings.register_forward_hook(lambda module, args, output: output * 2)
        y = model(**batch)[0][real(batch)]
        if model is not stock:
            assert all_fast(model)
            assert "a hook" in fastbert.report(model).embeddings[0]["reason"]
            ours = y
    torch.testing.assert_close(ours, y, atol=2e-5, rtol=2e-5)
    assert embedded == []


def test_a_decoder(embedded: list[tuple[int, ...]]) -> None:
    fastbert.optimize(base(is_decoder=True))(**inputs("right"))
    assert embedded == [PADDED]


def test_narrow_embeddings(embedded: list[tuple[int, ...]]) -> None:
    check_model(build("electra"), inputs("right"))
    assert embedded == [PADDED]


def test_somebody_around_records() -> None:
    """The recorder of a model around this one gets nothing of it, as with transformers' own."""
    model = fastbert.optimize(base())
    batch = inputs("right")
    model(**batch, output_hidden_states=True)
    outer: dict[str, list[Tensor]] = {"hidden_states": []}
    token = _active_collector.set(outer)
    try:
        model(**batch)
    finally:
        _active_collector.reset(token)
    assert outer["hidden_states"] == []


def test_the_class() -> None:
    model, batch = fastbert.optimize(base()), inputs("right")
    expected = model(**batch)[0]
    assert type(model) is fastbert.BertModel
    assert isinstance(model, transformers.BertModel)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied) is fastbert.BertModel
        assert torch.equal(copied(**batch)[0], expected)
    assert type(fastbert.restore(model)) is transformers.BertModel
    assert type(fastbert.optimize(build("distilbert"))) is transformers.DistilBertModel  # its embeddings are stock


def test_restored_while_somebody_holds_the_forward() -> None:
    model = fastbert.optimize(base())
    batch = inputs("right")
    forward = model.forward
    expected = fastbert.restore(model)(**batch)[0]
    assert torch.equal(forward(**batch)[0], expected)
