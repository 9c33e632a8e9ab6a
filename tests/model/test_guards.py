"""Whatever the packed path cannot do goes to the stock forward, layer by layer, with a reason, and is right."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import pytest
import torch
from comparison import all_fast, build, inputs, real, reasons
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune
from transformers.models.bert import modeling_bert

import fastbert
from fastbert import guards, swapped


def check_same(model: nn.Module, expected: str, *, layers: slice = slice(0, 1), **extra: Any) -> None:
    """`model` is fast but for the layers given, which say why, and gives what it gives after `restore`."""
    batch: dict[str, Any] = inputs("holes") | extra
    ours = model(**batch)[0]
    found = reasons(model)
    assert all(expected in (reason or "fast") for reason in found[layers]), found
    for reason in found[: layers.start or 0] + (found[layers.stop :] if layers.stop else []):
        assert reason is None, found
    stock = fastbert.restore(model)(**batch)[0]
    keep = real(batch)
    torch.testing.assert_close(ours[keep], stock[keep], atol=2e-5, rtol=2e-5)


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def first(model: Any) -> Any:
    return model.encoder.layer[0]


def subclass(model: Any) -> None:
    first(model).attention.self.query.__class__ = Doubled


def replace(model: Any) -> None:
    first(model).output.dense = Doubled(96, 48)


def hook(model: Any) -> None:
    first(model).intermediate.register_forward_hook(lambda module, args, output: output * 2)


def pre_hook(model: Any) -> None:
    first(model).attention.self.value.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def own_forward(model: Any) -> None:
    linear = first(model).output.dense
    stock = linear.forward
    linear.forward = lambda x: 2 * stock(x)


def pruned(model: Any) -> None:
    prune.l1_unstructured(first(model).attention.self.query, "weight", amount=0.5)


def reparametrized(model: Any) -> None:
    parametrizations.weight_norm(first(model).attention.self.query)


def old_weight_norm(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(first(model).attention.self.query)


def chunked(model: Any) -> None:
    first(model).chunk_size_feed_forward = 7


def no_bias(model: Any) -> None:
    first(model).attention.self.query.bias = None


def other_dropout(model: Any) -> None:
    first(model).output.dropout = nn.AlphaDropout(0.0)


def other_norm(model: Any) -> None:
    first(model).output.LayerNorm = nn.RMSNorm(48)


def other_activation(model: Any) -> None:
    del first(model).intermediate.intermediate_act_fn
    first(model).intermediate.intermediate_act_fn = nn.functional.relu


def plain_weight(model: Any) -> None:
    linear = first(model).attention.self.query
    weight = linear.weight.detach() * 2
    del linear.weight
    linear.weight = weight


class Marked(torch.Tensor):
    pass


def tensor_subclass(model: Any) -> None:
    linear = first(model).output.dense
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Marked))


def one_bias(model: Any) -> None:
    first(model).output.dense.bias = nn.Parameter(torch.ones(1))


def one_bias_through_data(model: Any) -> None:
    first(model).output.dense.bias.data = torch.ones(1)


CHANGES = [
    (subclass, "attention.self.query is a Doubled, not exactly nn.Linear"),
    (replace, "output.dense is a Doubled"),
    (hook, "sits on intermediate"),
    (pre_hook, "sits on attention.self.value"),
    (own_forward, "the forward of output.dense is replaced"),
    (pruned, "sits on attention.self.query"),
    (reparametrized, "attention.self.query is a ParametrizedLinear"),
    (old_weight_norm, "sits on attention.self.query"),
    (chunked, "chunk_size_feed_forward is set"),
    (no_bias, "a bias is missing"),
    (other_dropout, "output.dropout is a AlphaDropout"),
    (other_norm, "output.LayerNorm is a RMSNorm"),
    (other_activation, "the activation is relu"),
    (plain_weight, "a weight is no parameter"),
    (tensor_subclass, "a weight is a"),
    (one_bias, "output.dense.bias has shape [1], not [48]"),
    (one_bias_through_data, "output.dense.bias has shape [1], not [48]"),
]


@pytest.mark.parametrize(("change", "reason"), CHANGES, ids=[change.__name__ for change, _ in CHANGES])
@pytest.mark.parametrize("when", ["before", "after", "after a call"])
def test_changed_layer(change: Callable[[Any], None], reason: str, when: str) -> None:
    model = build()
    if when == "before":
        change(model)
    fastbert.optimize(model)
    if when == "after a call":
        model(**inputs())
    if when != "before":
        change(model)
    check_same(model, reason)


@pytest.mark.parametrize(("change", "reason"), CHANGES, ids=[change.__name__ for change, _ in CHANGES])
def test_changed_layer_after_all_layers_ran_in_one_op(change: Callable[[Any], None], reason: str) -> None:
    model = fastbert.optimize(build())
    with torch.no_grad():
        model(**inputs())
        model(**inputs())
        assert model.encoder._fastbert.resolved is not None
        change(model)
        check_same(model, reason)


def changed_eps(model: Any) -> None:
    model.encoder.layer[1].output.LayerNorm.eps = 0.5


def changed_scaling(model: Any) -> None:
    model.encoder.layer[1].attention.self.scaling *= 2


def weight_in_place(model: Any) -> None:
    first(model).output.dense.weight.data.mul_(2)


def new_weight(model: Any) -> None:
    model.encoder.layer[1].output.dense.weight = nn.Parameter(torch.ones(48, 96))


def fewer_layers(model: Any) -> None:
    del model.encoder.layer[1]


def layers_swapped(model: Any) -> None:
    layers = model.encoder.layer
    layers[0], layers[1] = layers[1], layers[0]


def other_part(model: Any) -> None:
    model.encoder.layer[1].attention.output = copy.deepcopy(first(model).attention.output)


def a_forward_hook(model: Any) -> None:
    first(model).register_forward_hook(lambda module, args, output: output * 2)


@pytest.mark.parametrize(
    "change",
    [
        changed_eps,
        changed_scaling,
        weight_in_place,
        new_weight,
        fewer_layers,
        layers_swapped,
        other_part,
        a_forward_hook,
        lambda model: fewer_heads_in_one_layer(model),
    ],
)
@pytest.mark.parametrize("backend", ["", "ffn:reference"], ids=["one op", "in turn"])
def test_changes_between_calls_that_go_past_the_layers(
    backend: str, change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which are all in one op, or, where that cannot run, the ops of one after another."""
    monkeypatch.setenv("FASTBERT_BACKEND", backend)
    model, batch = fastbert.optimize(build()), inputs("holes")
    with torch.no_grad():
        before = model(**batch)[0]
        assert model.encoder._fastbert.resolved is not None
        change(model)
        ours = model(**batch)[0]
        stock = fastbert.restore(model)(**batch)[0]
    keep = real(batch)
    torch.testing.assert_close(ours[keep], stock[keep], atol=2e-5, rtol=2e-5)
    assert not torch.allclose(before[keep], ours[keep], atol=1e-3)


def test_dropout_switched_on_after_all_layers_ran_in_one_op() -> None:
    model, batch = fastbert.optimize(build(hidden_dropout_prob=0.5)), inputs()
    with torch.no_grad():
        assert torch.equal(model(**batch)[0], model(**batch)[0])
        model.train()
        assert not torch.equal(model(**batch)[0], model(**batch)[0])


def test_layer_comes_back_to_the_fast_path() -> None:
    model = fastbert.optimize(build())
    handle = first(model).intermediate.register_forward_hook(lambda *args: None)
    model(**inputs())
    assert reasons(model)[0] is not None
    handle.remove()
    model(**inputs())
    assert all_fast(model)


def test_attention_replaced_by_somebody() -> None:
    class Attention(nn.Module):
        def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
            return hidden_states.flip(-1), None

    model = fastbert.optimize(build())
    model.encoder.layer[1].attention = Attention()
    check_same(model, "attention", layers=slice(1, 2))


@pytest.mark.parametrize("activation", ["relu", "gelu_new", "silu"])
def test_activation(activation: str) -> None:
    check_same(fastbert.optimize(build(hidden_act=activation)), "not exact GELU", layers=slice(0, None))


@pytest.mark.parametrize("activation", ["gelu", "gelu_python"])
def test_exact_gelu_is_fast(activation: str) -> None:
    model = fastbert.optimize(build(hidden_act=activation))
    model(**inputs())
    assert all_fast(model)


def test_chunking() -> None:
    model = fastbert.optimize(build(chunk_size_feed_forward=7))
    check_same(model, "chunk_size_feed_forward is set", layers=slice(0, None))


def test_decoder() -> None:
    stock = build(is_decoder=True)
    batch = inputs("right")
    expected = stock(**batch)[0]
    model = fastbert.optimize(copy.deepcopy(stock))
    torch.testing.assert_close(model(**batch)[0], expected)
    assert all("causal" in (reason or "") for reason in reasons(model))
    past = stock(input_ids=batch["input_ids"][:, :8], use_cache=True).past_key_values
    ours = model(input_ids=batch["input_ids"][:, :8], use_cache=True).past_key_values
    after = stock(input_ids=batch["input_ids"][:, 8:9], past_key_values=past)[0]
    torch.testing.assert_close(model(input_ids=batch["input_ids"][:, 8:9], past_key_values=ours)[0], after)


def test_cross_attention() -> None:
    stock = build(is_decoder=True, add_cross_attention=True)
    batch = inputs("right")
    extra = {"encoder_hidden_states": torch.randn(4, 9, 48), "encoder_attention_mask": torch.ones(4, 9).long()}
    extra["encoder_attention_mask"][1, 4:] = 0
    expected = stock(**batch, **extra)[0]
    model = fastbert.optimize(copy.deepcopy(stock))
    torch.testing.assert_close(model(**batch, **extra)[0], expected)
    assert None not in reasons(model)


@pytest.mark.parametrize("mask", ["none", "holes"])
def test_attentions(mask: str) -> None:
    stock = build(attn_implementation="eager")
    batch = inputs(mask)
    expected = stock(**batch, output_attentions=True)
    model = fastbert.optimize(copy.deepcopy(stock))
    assert model.config._attn_implementation == "fastbert"
    outputs = model(**batch, output_attentions=True)
    keep = real(batch)
    assert len(outputs.attentions) == 2
    for ours, theirs in zip(outputs.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(ours.transpose(1, 2)[keep], theirs.transpose(1, 2)[keep])
    torch.testing.assert_close(outputs[0][keep], expected[0][keep], atol=2e-5, rtol=2e-5)
    assert reasons(model) == ["attentions were asked for"] * 2
    model(**batch)
    assert all_fast(model)  # although the hooks that record attentions stay


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtype_without_kernels(dtype: torch.dtype) -> None:
    model = fastbert.optimize(build()).to(dtype)
    stock = build().to(dtype)
    stock.load_state_dict(model.state_dict())
    batch = inputs("right")
    torch.testing.assert_close(model(**batch)[0][real(batch)], stock(**batch)[0][real(batch)])
    assert reasons(model) == [f"no kernels for {dtype} on cpu"] * 2


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_forced_backend_that_cannot_run_raises(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fastbert.optimize(build()).to(dtype)
    monkeypatch.setenv("FASTBERT_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=r"FASTBERT_BACKEND=triton forces \w+:triton, which cannot run: "):
        model(**inputs())


def test_what_may_be_done_past_a_layers_own_call() -> None:
    model = fastbert.optimize(build())

    def reason() -> str | None:
        return guards.bypass_reason(first(model), "a layer")

    def hook(*_: Any) -> None: ...

    model(**inputs(), output_hidden_states=True)
    assert any(getattr(first(model), name) for name in guards.HOOKS)  # transformers' own, which stays
    assert reason() is None
    hook.__module__ = "torch.distributed.fsdp"  # may change what lies in the layer: harmless only where it is called
    with first(model).register_forward_pre_hook(hook):
        assert guards.foreign_hook(first(model)) is None
        assert reason() == f"a hook ({hook.__qualname__}) sits on a layer"
    first(model).forward = first(model).forward
    assert reason() == "the forward of a layer is replaced"
    del first(model).forward
    first(model).__class__ = type("Above", (type(first(model)),), {})
    assert "a layer is a Above of" in str(reason())


def test_layers_of_several_dtypes() -> None:
    model = fastbert.optimize(build())
    first(model).attention.self.query.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):
        model(**inputs())
    assert "weights of several dtypes" in (reasons(model)[0] or "")


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "fastbert"])
def test_attention_implementation_set_later(implementation: str) -> None:
    model = fastbert.optimize(build())
    batch = inputs("holes")
    expected = model(**batch)[0]
    model.set_attn_implementation(implementation)
    y = model(**batch)[0]
    keep = real(batch)
    torch.testing.assert_close(y[keep], expected[keep], atol=2e-5, rtol=2e-5)
    if implementation == "eager":
        assert reasons(model) == ["the attention implementation was set to 'eager'"] * 2
        gradient = torch.autograd.grad(y[keep].square().sum(), model.embeddings.LayerNorm.weight, create_graph=True)[0]
        torch.autograd.grad(gradient.square().sum(), model.embeddings.LayerNorm.weight)  # a second derivative
    else:
        assert all_fast(model)
    assert fastbert.restore(model).config._attn_implementation == (
        "sdpa" if implementation == "fastbert" else implementation
    )


def test_stock_layer_between_fast_ones() -> None:
    model = fastbert.optimize(build(num_hidden_layers=3))
    model.encoder.layer[1].intermediate.register_forward_hook(lambda module, args, output: output + 1)
    check_same(model, "sits on intermediate", layers=slice(1, 2))


def test_global_hooks() -> None:
    model = fastbert.optimize(build())
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        model(**inputs())
        assert first(model).attention.self.query in seen
        assert "hooks on every module" in (reasons(model)[0] or "")
    finally:
        handle.remove()
    model(**inputs())
    assert all_fast(model)


@pytest.mark.filterwarnings("ignore")
def test_quantized_submodules() -> None:
    stock = build()
    quantized = torch.ao.quantization.quantize_dynamic(stock, {nn.Linear}, torch.qint8)
    batch = inputs("right")
    expected = quantized(**batch)[0]
    fastbert.optimize(quantized)
    torch.testing.assert_close(quantized(**batch)[0][real(batch)], expected[real(batch)])
    assert all("not exactly nn.Linear" in (reason or "") for reason in reasons(quantized))


def test_transforms_of_torch_func() -> None:
    model = fastbert.optimize(build())
    batch = inputs("right")
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (), batch)[0][real(batch)].square().sum()

    gradients = torch.func.grad(loss)(weights)
    loss_now = model(**batch)[0][real(batch)].square().sum()
    expected = torch.autograd.grad(loss_now, model.embeddings.word_embeddings.weight)[0]
    torch.testing.assert_close(gradients["embeddings.word_embeddings.weight"], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_traced_by_jit() -> None:
    model = fastbert.optimize(build()).eval()
    batch = inputs("holes")
    traced = torch.jit.trace(model, (batch["input_ids"], batch["attention_mask"]), strict=False, check_trace=False)
    assert reasons(model) == ["torch.jit.trace is running"] * 2
    other = inputs("right", batch=2, seqlen=9)
    y = traced(other["input_ids"], other["attention_mask"])["last_hidden_state"]
    torch.testing.assert_close(y[real(other)], model(**other)[0][real(other)], atol=2e-5, rtol=2e-5)


def test_offloaded_by_accelerate() -> None:
    stock = build()
    batch = inputs("holes")
    expected = stock(**batch)[0]
    model = accelerate.cpu_offload(fastbert.optimize(stock), execution_device=torch.device("cpu"))
    torch.testing.assert_close(model(**batch)[0][real(batch)], expected[real(batch)], atol=2e-5, rtol=2e-5)
    assert all("is replaced" in (reason or "") for reason in reasons(model))
    torch.testing.assert_close(fastbert.restore(model)(**batch)[0][real(batch)], expected[real(batch)])


def test_forward_replaced_on_a_layer() -> None:
    model = build()
    layer = model.encoder.layer[0]
    layer.forward = functools.partial(type(layer).forward, layer)
    check_same(fastbert.optimize(model), "its forward was replaced before")


# --- methods and attributes that the fast path stands in for ---

METHODS = [
    ("BertSelfAttention", "forward"),
    ("BertOutput", "forward"),
    ("BertLayer", "feed_forward_chunk"),
    ("BertLayer", "forward"),
    ("BertEncoder", "forward"),
    ("BertEmbeddings", "forward"),
    ("BertModel", "forward"),
    ("BertModel", "_create_attention_masks"),
    ("Linear", "forward"),
    ("LayerNorm", "forward"),
]


@pytest.mark.parametrize(("name", "method"), METHODS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_method_replaced_on_a_class(name: str, method: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = getattr(modeling_bert, name, None) or getattr(nn, name)
    stock = getattr(cls, method)
    called: list[str] = []

    @functools.wraps(stock)
    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(name)
        return stock(self, *args, **kwargs)

    batch = inputs("right")
    with torch.no_grad():
        if when == "before":
            monkeypatch.setattr(cls, method, patched)
        model = fastbert.optimize(build())
        if when == "after":
            model(**batch)
            model(**batch)
            monkeypatch.setattr(cls, method, patched)
        called.clear()
        ours = model(**batch)[0]
        assert called
        if method != "_create_attention_masks":
            assert f"{name}.{method} is replaced" in str(fastbert.report(model))
        monkeypatch.undo()
        torch.testing.assert_close(model(**batch)[0][real(batch)], ours[real(batch)], atol=2e-5, rtol=2e-5)
        assert all_fast(model)


def chunk_replaced(model: Any) -> None:
    first(model).feed_forward_chunk = lambda attention_output: attention_output


def masks_replaced(model: Any) -> None:
    stock = model._create_attention_masks
    model._create_attention_masks = lambda **kwargs: stock(**kwargs | {"attention_mask": None})


def causal(model: Any) -> None:
    first(model).attention.self.is_causal = True


def smaller_heads(model: Any) -> None:
    first(model).attention.self.attention_head_size = 8
    first(model).attention.self.num_attention_heads = 6


def tanh(model: Any) -> None:
    first(model).intermediate.intermediate_act_fn.approximate = "tanh"


def short_words(model: Any) -> None:
    model.embeddings.word_embeddings.max_norm = 0.5


def type_buffer(model: Any) -> None:
    model.embeddings.token_type_ids.fill_(1)


def position_buffer(model: Any) -> None:
    model.embeddings.position_ids = model.embeddings.position_ids.flip(1).contiguous()


def no_type_buffer(model: Any) -> None:
    del model.embeddings.token_type_ids


def position_buffer_through_data(model: Any) -> None:
    model.embeddings.position_ids.data.copy_(model.embeddings.position_ids.flip(1))


def type_buffer_through_data(model: Any) -> None:
    model.embeddings.token_type_ids.data.fill_(1)


def one_column_of_types(model: Any) -> None:
    table = model.embeddings.token_type_embeddings
    table.weight = nn.Parameter(table.weight[:, :1].detach().clone())


def kept(layer: Any, width: int = 32) -> Iterator[tuple[Any, str, torch.Tensor]]:
    """What a layer keeps if so much is left of its three heads, 48 wide: module, name, numbers."""
    for name in ("query", "key", "value"):
        linear = getattr(layer.attention.self, name)
        yield linear, "weight", linear.weight[:width].detach().clone()
        yield linear, "bias", linear.bias[:width].detach().clone()
    out = layer.attention.output.dense
    yield out, "weight", out.weight[:, :width].detach().clone()


def fewer_heads(model: Any) -> None:
    for layer in model.encoder.layer:
        for module, name, numbers in kept(layer):
            setattr(module, name, nn.Parameter(numbers))  # `out_features` stays what it was


def fewer_heads_in_one_layer(model: Any) -> None:
    for module, name, numbers in kept(model.encoder.layer[1]):
        setattr(module, name, nn.Parameter(numbers))


def fewer_heads_through_data(model: Any) -> None:
    for layer in model.encoder.layer:
        for module, name, numbers in kept(layer):
            getattr(module, name).data = numbers


@pytest.mark.parametrize(
    "change",
    [
        chunk_replaced,
        masks_replaced,
        causal,
        smaller_heads,
        tanh,
        short_words,
        type_buffer,
        position_buffer,
        no_type_buffer,
        position_buffer_through_data,
        type_buffer_through_data,
        one_column_of_types,
        fewer_heads,
        fewer_heads_in_one_layer,
        fewer_heads_through_data,
    ],
)
@pytest.mark.parametrize("calls", [0, 2])
@pytest.mark.parametrize("grad", [False, True])
def test_attributes_changed_at_any_time(change: Callable[[Any], None], calls: int, grad: bool) -> None:
    stock = build()
    for layer in stock.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.GELU()
    ours, batch = fastbert.optimize(copy.deepcopy(stock)), inputs("right")
    with torch.set_grad_enabled(grad):
        for _ in range(calls):
            ours(**batch)
        change(ours)
        change(stock)
        y, expected = ours(**batch)[0], stock(**batch)[0]
    keep = real(batch)
    torch.testing.assert_close(y[keep], expected[keep], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("path", ["embeddings.LayerNorm", "encoder.layer.1.output.LayerNorm"])
def test_what_stock_refuses_is_refused(path: str) -> None:
    model = fastbert.optimize(build())
    with torch.no_grad():
        model(**inputs())
        model.get_submodule(path).normalized_shape = (24,)
        with pytest.raises(RuntimeError, match="normalized_shape"):
            model(**inputs())
    assert "LayerNorm.normalized_shape is (24,), not (48,)" in str(fastbert.report(model))


def test_fewer_heads_are_fast() -> None:
    model = fastbert.optimize(build())
    model(**inputs())
    fewer_heads_in_one_layer(model)
    model(**inputs())
    assert all_fast(model)


def test_half_a_head() -> None:
    model = fastbert.optimize(build())
    model(**inputs())
    for module, name, numbers in kept(first(model), 24):
        getattr(module, name).data = numbers
    with pytest.raises(RuntimeError, match="shape"):
        model(**inputs())
    assert "query, key and value have width 24, not 16 times the number of heads" in str(reasons(model)[0])


def test_new_table_without_the_padding_index() -> None:
    stock, batch = build("roberta"), inputs("right")
    table = stock.embeddings.position_embeddings
    stock.embeddings.position_embeddings = nn.Embedding(72, 48, _weight=table.weight.detach().clone())
    model = fastbert.optimize(copy.deepcopy(stock))
    torch.testing.assert_close(model(**batch)[0][real(batch)], stock(**batch)[0][real(batch)], atol=2e-5, rtol=2e-5)


def test_padding_index_of_the_types() -> None:
    stock, batch = build(), inputs("none")
    stock.embeddings.token_type_embeddings.padding_idx = 1
    batch["token_type_ids"] = batch["input_ids"] % 2
    upstream = torch.randn(4, 21, 48)
    ours, expected = (
        torch.autograd.grad(model(**batch)[0], model.embeddings.token_type_embeddings.weight, upstream)[0]
        for model in (fastbert.optimize(copy.deepcopy(stock)), stock)
    )
    assert not expected[1].any()
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("calls", [0, 1])
def test_fake_tensors(calls: int) -> None:
    model, batch = fastbert.optimize(build()), inputs("none")
    for _ in range(calls):
        model(**batch)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(**batch)[0].shape == (4, 21, 48)


def test_replaced_chunk_is_reported() -> None:
    model = fastbert.optimize(build())
    chunk_replaced(model)
    check_same(model, "feed_forward_chunk is replaced")


def test_all_layers_in_one_op_after_hidden_states_were_asked_for_once() -> None:
    model, batch = fastbert.optimize(build()), inputs("right")
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
        y = model(**batch)[0]
        assert model.encoder._fastbert.resolved is not None
        model(**batch)
        again = model(**batch, output_hidden_states=True).hidden_states
    assert len(again) == len(states) == 3
    torch.testing.assert_close(again[-1], y)


def test_threads_that_share_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = fastbert.optimize(build()), inputs("right")
    stock = swapped.unchanged_stack

    def unchanged_stack(module: Any) -> Any:
        found = stock(module)
        module._fastbert.resolved = None  # as another thread does at this moment
        return found

    with torch.no_grad():
        expected = model(**batch)[0]
        model(**batch)
        monkeypatch.setattr(swapped, "unchanged_stack", unchanged_stack)
        torch.testing.assert_close(model(**batch)[0], expected)


@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode_differentiation(grad: bool) -> None:
    stock = build(attn_implementation="eager")
    model = fastbert.optimize(copy.deepcopy(stock))
    primal, tangent = torch.randn(2, 4, 5, 48)
    with forward_ad.dual_level(), torch.set_grad_enabled(grad):
        dual = forward_ad.make_dual(primal, tangent)
        found, expected = (forward_ad.unpack_dual(m(inputs_embeds=dual)[0]).tangent for m in (model, stock))
        assert found is not None
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
    assert reasons(model) == ["forward-mode differentiation is running"] * 2
