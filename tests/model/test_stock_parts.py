"""Stock code inside an optimized model, and what else a user put there, meets what it meets in a stock model."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comparison import all_fast, build, inputs, real, reasons
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.distilbert.modeling_distilbert import DistilBertSelfAttention

import fastbert


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """With a scale that nobody else has, and the mask as classic code takes it: added, unless it is bool."""
    scores = query @ key.transpose(-1, -2) * 0.1
    if mask is not None and mask.dtype is torch.bool:
        scores = scores.masked_fill(~mask, -1e9)
    elif mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ value).transpose(1, 2)


def own_attention(module: Any, parts: tuple[nn.Module, ...], hidden_states: Tensor, mask: Tensor | None) -> Any:
    assert mask is None or mask.dim() == 4
    shape = (*hidden_states.shape[:2], -1, module.attention_head_size)
    return attend(*(part(hidden_states).view(shape).transpose(1, 2) for part in parts), mask).flatten(2), None


class OwnAttention(BertSelfAttention):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **rest: Any) -> Any:
        return own_attention(self, (self.query, self.key, self.value), hidden_states, attention_mask)


class AddingAttention(OwnAttention):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **rest: Any) -> Any:
        assert attention_mask is None or attention_mask.dtype is hidden_states.dtype
        return super().forward(hidden_states, attention_mask, **rest)


class OwnDistilAttention(DistilBertSelfAttention):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **rest: Any) -> Any:
        return own_attention(self, (self.q_lin, self.k_lin, self.v_lin), hidden_states, attention_mask)


def check(stock: Any, batch: dict[str, Tensor], keep: Tensor | None = None) -> Any:
    """That the stock model and an optimized copy give the same. Returns the copy."""
    expected = stock(**batch)[0]
    ours = fastbert.optimize(copy.deepcopy(stock))
    keep = real(batch) if keep is None else keep
    torch.testing.assert_close(ours(**batch)[0][keep], expected[keep], atol=2e-5, rtol=2e-5)
    return ours


@pytest.mark.parametrize("seqlen", [21, 4], ids=["", "as long as the batch"])  # where a mask [B, S] would broadcast
@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize(
    ("implementation", "own"),
    [("sdpa", OwnAttention), ("eager", OwnAttention), ("eager", AddingAttention)],
    ids=["sdpa", "eager", "eager-adding"],
)
def test_attention_of_ones_own(implementation: str, own: type, layers: tuple[int, ...], seqlen: int) -> None:
    stock = build()
    stock.set_attn_implementation(implementation)
    for layer in layers:
        stock.encoder.layer[layer].attention.self.__class__ = own
    for mask in ("right", "none"):
        ours = check(stock, inputs(mask, seqlen=seqlen))
    assert [reason is not None for reason in reasons(ours)] == [layer in layers for layer in range(2)]


@pytest.mark.parametrize("layers", [(0,), (0, 1)], ids=str)
def test_attention_of_ones_own_in_distilbert(layers: tuple[int, ...]) -> None:
    stock = build("distilbert")
    for layer in layers:
        stock.transformer.layer[layer].attention.__class__ = OwnDistilAttention
    check(stock, inputs("holes"))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("where", ["attention", ""], ids=["attention", "layer"])
@pytest.mark.parametrize("layers", [(1,), (0, 1)], ids=str)
def test_hook_that_hides_a_token(implementation: str, where: str, layers: tuple[int, ...]) -> None:
    """A token that a layer may not look at still has hidden states, which the next layer looks at."""

    def hide(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        mask = args[1].clone()
        mask[:, :, :, 2] = False if mask.dtype is torch.bool else torch.finfo(mask.dtype).min
        return (args[0], mask, *args[2:])

    stock = build()
    stock.set_attn_implementation(implementation)
    for layer in layers:
        stock.encoder.layer[layer].get_submodule(where).register_forward_pre_hook(hide)
    check(stock, inputs("right"))


def test_other_masks_for_each_layer() -> None:
    stock, batch = build(num_hidden_layers=3), inputs("none")
    ours = fastbert.optimize(copy.deepcopy(stock))
    masks = [torch.ones(4, 1, 21, 21, dtype=torch.bool) for _ in range(3)]
    masks[0][:2, :, :, 15:] = masks[1][1, :, :, :4] = masks[2][3, :, :, 7] = False
    states = [model.embeddings(**batch) for model in (stock, ours)]
    for i, mask in enumerate(masks):
        states = [model.encoder.layer[i](x, mask) for model, x in zip((stock, ours), states, strict=True)]
    torch.testing.assert_close(states[1], states[0], atol=2e-5, rtol=2e-5)
    assert all_fast(ours)


def own_implementation(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **rest: Any
) -> tuple[Tensor, None]:
    return attend(query, key, value, mask), None


@pytest.fixture
def registered() -> Iterator[None]:
    AttentionInterface.register("one's own", own_implementation)
    AttentionMaskInterface.register("one's own", sdpa_mask)
    yield
    del AttentionInterface._global_mapping["one's own"], AttentionMaskInterface._global_mapping["one's own"]


@pytest.mark.usefixtures("registered")
def test_attention_implementation_of_ones_own() -> None:
    stock = build()
    stock.set_attn_implementation("one's own")
    ours = check(stock, inputs("right"))
    assert all("one's own" in str(reason) for reason in reasons(ours))
    assert fastbert.restore(ours).config._attn_implementation == "one's own"


def test_sdpa_registered_anew() -> None:
    AttentionInterface.register("sdpa", own_implementation)
    try:
        ours = check(build(), inputs("right"))
        assert all("another function" in str(reason) for reason in reasons(ours))
    finally:
        AttentionInterface.register("sdpa", sdpa_attention_forward)
    ours(**inputs("right"))
    assert all_fast(ours)


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    ("family", "head"),
    [("bert", "Model"), ("bert", "ForMaskedLM"), ("roberta", "Model"), ("distilbert", "Model"), ("electra", "Model")],
)
def test_memory_is_freed_with_the_model(family: str, head: str, train: bool) -> None:
    model = fastbert.optimize(build(family, head, train=train))
    batch = inputs("right") | ({"labels": inputs("none")["input_ids"]} if head != "Model" else {})
    if train:
        model(**batch)[0].square().sum().backward()
    else:
        with torch.no_grad():
            model(**batch)
    left = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    assert not any(parameter() is not None for parameter in left)


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_replaced_weights_are_freed_at_the_next_call(grad: bool) -> None:
    model, batch = fastbert.optimize(build()), inputs("right")
    with torch.no_grad():
        model(**batch)
    query = model.encoder.layer[0].attention.self.query
    left = [weakref.ref(query.weight), *map(weakref.ref, model.encoder.layer[1].parameters())]
    query.weight = nn.Parameter(torch.randn(48, 48))
    model.encoder.layer = model.encoder.layer[:1]
    with torch.set_grad_enabled(grad):
        model(**batch)
    assert not any(parameter() is not None for parameter in left)


class Wrapped(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.inner = encoder

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("grad", [False, True])
def test_encoder_in_a_wrapper(grad: bool) -> None:
    stock, batch = build(), inputs("right")
    ours = fastbert.optimize(copy.deepcopy(stock))
    with torch.set_grad_enabled(grad):
        ours(**batch)
        ours.encoder = Wrapped(ours.encoder)
        found, expected = (model(**batch)[0][real(batch)] for model in (ours, stock))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    assert all_fast(ours)


@pytest.mark.parametrize(
    ("path", "name", "learns"),
    [
        ("encoder.layer.1.attention.self", "scaling", True),
        ("encoder.layer.1.attention.self", "scaling", False),
        ("encoder.layer.1.output.LayerNorm", "eps", False),
        ("embeddings.LayerNorm", "eps", False),
    ],
)
def test_a_setting_that_is_a_tensor(path: str, name: str, learns: bool) -> None:
    """As in a model that learns the temperature of its attention."""
    stock, batch = build(attn_implementation="eager"), inputs("right")
    module, value = stock.get_submodule(path), torch.tensor(0.3)
    delattr(module, name)
    setattr(module, name, nn.Parameter(value) if learns else value)
    ours = fastbert.optimize(copy.deepcopy(stock))
    with torch.no_grad():
        ours(**batch)
        torch.testing.assert_close(ours(**batch)[0][real(batch)], stock(**batch)[0][real(batch)], atol=2e-5, rtol=2e-5)
    gradients = []
    for model in (stock, ours):
        model(**batch)[0][real(batch)].square().sum().backward()
        gradients.append(getattr(model.get_submodule(path), name).grad)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-3, rtol=1e-3)
    assert (gradients[1] is not None) == learns
    assert "tensor" in str(fastbert.report(ours))
