"""Which modules are swapped in place, and how a call goes through them.

A swapped module keeps its object, its parameters and its place: only its `__class__` becomes a subclass of the stock
class, with the stock class's own name, whose forward takes the packed path when nothing in `guards.py` speaks against
it.
"""

from __future__ import annotations

import atexit
import contextlib
import copyreg
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import PreTrainedModel

import fastbert.implementation  # noqa: F401  (registers the attention implementation)
from fastbert import encoder, graphs
from fastbert.guards import (
    HOOKS,
    IMPLEMENTATION,
    PACKABLE,
    ResolvedEmbeddings,
    ResolvedLayer,
    ResolvedStack,
    call_reason,
    captured,
    foreign_hook,
    wrong_weights,
)
from fastbert.packing import PackedBatch, batch_of

KEEP_PADDING = "fastbert_keep_padding"  # a keyword argument on its way from a head to the encoder

Model = TypeVar("Model", bound=nn.Module)


class Family(NamedTuple):
    """Where transformers keeps a family: its module, the prefix of its class names, and what departs from BERT's."""

    name: str
    module: str
    prefix: str
    layer_class: str = ""
    encoder_class: str = ""
    embeddings_class: str = ""
    names: encoder.LayerNames = encoder.BERT


_FAMILIES = (
    Family("bert", "bert.modeling_bert", "Bert", embeddings_class="BertEmbeddings"),
    Family("roberta", "roberta.modeling_roberta", "Roberta", embeddings_class="RobertaEmbeddings"),
    Family("xlm_roberta", "xlm_roberta.modeling_xlm_roberta", "XLMRoberta", embeddings_class="XLMRobertaEmbeddings"),
    Family("camembert", "camembert.modeling_camembert", "Camembert", embeddings_class="CamembertEmbeddings"),
    Family("electra", "electra.modeling_electra", "Electra", embeddings_class="ElectraEmbeddings"),
    Family("ernie", "ernie.modeling_ernie", "Ernie"),
    Family(
        "data2vec_text", "data2vec.modeling_data2vec_text", "Data2VecText", embeddings_class="Data2VecTextEmbeddings"
    ),
    Family("roc_bert", "roc_bert.modeling_roc_bert", "RoCBert"),
    Family(
        "bert_generation", "bert_generation.modeling_bert_generation", "BertGeneration", encoder_class="BertEncoder"
    ),
    Family(
        "distilbert",
        "distilbert.modeling_distilbert",
        "DistilBert",
        layer_class="TransformerBlock",
        encoder_class="Transformer",
        names=encoder.DISTILBERT,
    ),
)
FAMILIES = {family.name: family for family in _FAMILIES}
HEADS = (
    "MaskedLM",
    "PreTraining",
    "SequenceClassification",
    "TokenClassification",
    "MultipleChoice",
    "NextSentencePrediction",
    "QuestionAnswering",
)
ROLES: dict[tuple[str, str], tuple[str, Family]] = {}
for _family in FAMILIES.values():
    _path = f"transformers.models.{_family.module}"
    ROLES[_path, _family.layer_class or f"{_family.prefix}Layer"] = ("layer", _family)
    ROLES[_path, _family.encoder_class or f"{_family.prefix}Encoder"] = ("encoder", _family)
    if _family.embeddings_class:
        ROLES[_path, _family.embeddings_class] = ("embeddings", _family)
    for _head in HEADS:
        ROLES[_path, f"{_family.prefix}For{_head}"] = (_head, _family)
    for _role in ("Model", "LMHeadModel"):
        ROLES[_path, f"{_family.prefix}{_role}"] = (_role, _family)

calls = {"fast": 0, "stock": 0}  # layer calls in this process, without those traced by torch.compile


class State:
    """What fastbert keeps on a swapped module. Copies and pickles start afresh, apart from what was asked for."""

    __slots__ = ("config", "fast", "graphs", "implementation", "reason", "resolved", "stock")

    def __init__(self, config: Any = None, implementation: str | None = None, graphs_held: int = 0) -> None:
        self.config = config
        self.implementation = implementation  # of the configuration before optimize; on an encoder
        self.resolved: Any = None  # the parts as last found: a guards.Resolved
        self.graphs = graphs.EncoderGraphs(graphs_held) if graphs_held else None  # of an encoder
        self.fast = 0
        self.stock = 0
        self.reason: str | None = None  # why the last call was stock; None if it was fast, or if there was none

    def __reduce__(self) -> tuple[Any, ...]:
        return State, (self.config, self.implementation, 0 if self.graphs is None else self.graphs.limit)

    def count(self, reason: str | None) -> None:
        self.reason = reason
        if reason is None:
            self.fast += 1
            calls["fast"] += 1
        else:
            self.stock += 1
            calls["stock"] += 1


# --- the swapped classes ------------------------------------------------------------------------------------


class FastMeta(type):
    """The type of the swapped classes, by which pickle knows them: it could not find them under their stock names."""


class Fast:
    """What the swapped classes have in common. `stock` is the class that was there before."""

    stock: type[nn.Module]
    family: Family

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # By the stock class: a copy starts with the swapped class made anew where it is loaded.
        return _rebuild, (self.stock,), self.__getstate__()


def _class_of(stock: type[nn.Module]) -> Any:
    return fast_class(stock)


def _rebuild(stock: type[nn.Module]) -> Any:
    cls = _class_of(stock)
    return cls.__new__(cls)


def restored_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The stock forward of a module that was restored while somebody (accelerate) still held our forward."""
    return type(module).forward(module, *args, **kwargs)


class FastLayer(Fast):
    """A transformer layer. Takes [T, H] with a PackedBatch, or, like the stock one, [B, S, H] with any mask."""

    _fastbert: State

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, FastLayer):
            return restored_forward(self, hidden_states, attention_mask, *args, **kwargs)
        reason, weights, settings = self._readiness(hidden_states, args, kwargs)
        batch = attention_mask
        if reason is None and not isinstance(batch, PackedBatch):
            batch = batch_of(hidden_states, attention_mask, kwargs)
            if isinstance(batch, str):
                reason, batch = batch, attention_mask
        if not torch.compiler.is_compiling():
            self._fastbert.count(reason)
        if reason is None:
            if hidden_states.dim() == 2:
                return encoder.layer(hidden_states, batch, weights, settings)
            return batch.unpack(encoder.layer(batch.pack(hidden_states), batch, weights, settings))
        if not isinstance(batch, PackedBatch):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        padded = batch.unpack(hidden_states) if hidden_states.dim() == 2 else hidden_states
        padded = super().forward(padded, batch.stock_mask(padded.dtype), *args, **kwargs)
        return batch.pack(padded) if hidden_states.dim() == 2 else padded

    def _readiness(self, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
        """(why this call is stock, or None; the weights; the settings)."""
        state = self._fastbert
        if hidden_states.dim() != 2:  # else the encoder has looked at the call
            reason = call_reason(state.config, kwargs)
            if reason is None and any(arg is not None for arg in args):
                reason = "a cache or cross-attention is in use"
            if reason is not None:
                return reason, None, None
        return self.ready_parts(hidden_states)

    def ready_parts(self, hidden_states: Tensor | None) -> tuple[Any, Any, Any]:
        """(why the layer's parts cannot take these states, or None; the weights; the settings)."""
        resolved = self.resolve()
        if resolved.reason is not None:
            return resolved.reason, None, None
        if getattr(resolved.chunked, "chunk_size_feed_forward", 0):
            return "chunk_size_feed_forward is set", None, None
        weights = resolved.weights.read()
        reason = "a weight is no parameter" if weights is None else wrong_weights(weights, hidden_states)
        return reason, weights, None if reason else resolved.settings()

    def static_reason(self) -> str | None:
        """Why the layer could not take the fast path whatever the call, or None."""
        config = self._fastbert.config
        if config is not None and config._attn_implementation not in PACKABLE:
            return f"the attention implementation was set to {config._attn_implementation!r}"
        return self.ready_parts(None)[0]

    def resolve(self) -> ResolvedLayer:
        """The layer's parts, looked up anew only if something changed."""
        state = self._fastbert
        if torch.compiler.is_compiling():
            return ResolvedLayer(self, self.family.names, self.stock.__module__)
        if state.resolved is None or not state.resolved.current(self):
            state.resolved = ResolvedLayer(self, self.family.names, self.stock.__module__)
        return state.resolved


class FastEncoder(Fast):
    """The stack of layers, of a family that has BERT's signature. Packs once, and unpacks at the end."""

    _fastbert: State

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if not isinstance(self, FastEncoder):
            kwargs |= {"encoder_attention_mask": encoder_attention_mask, "use_cache": use_cache}
            return restored_forward(
                self, hidden_states, attention_mask, encoder_hidden_states, past_key_values=past_key_values, **kwargs
            )
        crossing = {"encoder_hidden_states": encoder_hidden_states, "past_key_values": past_key_values}
        batch = encoder_batch(self, hidden_states, attention_mask, kwargs, crossing)
        if batch is None or all_stock(self):
            crossing["encoder_attention_mask"] = encoder_attention_mask
            return cleared(
                super().forward(hidden_states, attention_mask, **crossing, use_cache=use_cache, **kwargs), batch
            )
        watched = kwargs | {"encoder_attention_mask": encoder_attention_mask, "past_key_values": None}
        x = encode(self, hidden_states, batch, None, **watched)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=x)


class FastDistilBertEncoder(Fast):
    """DistilBERT's stack of layers."""

    _fastbert: State

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        if not isinstance(self, FastDistilBertEncoder):
            return restored_forward(self, hidden_states, attention_mask, **kwargs)
        batch = encoder_batch(self, hidden_states, attention_mask, kwargs, {})
        if batch is None or all_stock(self):
            return cleared(super().forward(hidden_states, attention_mask, **kwargs), batch)
        return BaseModelOutput(last_hidden_state=encode(self, hidden_states, batch, **kwargs))


def encoder_batch(
    module: Any, hidden_states: Tensor, attention_mask: Any, kwargs: dict[str, Any], crossing: dict[str, Any]
) -> PackedBatch | None:
    """The packed batch of an encoder's call, or None if the stock forward has to run it."""
    keep_padding = kwargs.pop(KEEP_PADDING, False)
    reason = call_reason(module._fastbert.config, kwargs | crossing)
    if reason is not None:
        if module._fastbert.graphs is not None:
            module._fastbert.graphs.reason = reason
        return None
    batch = batch_of(hidden_states, attention_mask, kwargs, keep_padding=keep_padding)
    return batch if isinstance(batch, PackedBatch) else None


def cleared(outputs: Any, batch: PackedBatch | None) -> Any:
    """The outputs of stock layers with zeros at the masked places, as the packed path leaves them."""
    if batch is not None:
        outputs.last_hidden_state = batch.unpack(batch.pack(outputs.last_hidden_state))
    return outputs


def all_stock(module: Any) -> bool:
    """Whether no layer of an encoder could use packed tokens, so that packing them would be for nothing."""
    if torch.compiler.is_compiling():
        return False
    for layer in module.layer:
        if isinstance(layer, FastLayer):
            state = layer._fastbert
            if (state.fast and state.reason is None) or layer.static_reason() is None:
                return False
    if module._fastbert.graphs is not None:
        module._fastbert.graphs.reason = "no layer takes the fast path"
    return True


def encode(module: Any, hidden_states: Tensor, batch: PackedBatch, *args: Any, **kwargs: Any) -> Tensor:
    """All layers of an encoder. args, kwargs: what the stock encoder hands its layers besides states and mask."""
    if module._fastbert.graphs is not None and not torch.compiler.is_compiling():
        y = replay(module.layer, module._fastbert.graphs, hidden_states, batch)
        if y is not None:
            return y
    watched = captured("hidden_states")
    if not watched and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        y = encode_at_once(module, hidden_states, batch)
        if y is not None:
            return y
    return encoder.encode(
        module.layer,
        hidden_states,
        batch,
        lambda layer: not watched and takes_packed(layer, batch),
        lambda: linked_mask(batch, hidden_states.dtype),
        *args,
        **kwargs,
    )


def replay(
    layers: nn.ModuleList, held: graphs.EncoderGraphs, hidden_states: Tensor, batch: PackedBatch
) -> Tensor | None:
    """All layers of an encoder by a CUDA graph, or None, with the reason in `held`, if none may serve this call."""
    for layer in layers:
        if not isinstance(layer, FastLayer) or "stock" not in vars(type(layer)):  # or of a class on top of ours
            held.reason = f"a layer is a {type(layer).__qualname__} of {type(layer).__module__}"
            return None
    y = held.encode(layers, hidden_states, batch)
    if y is not None:
        for layer in layers:
            layer._fastbert.count(None)
    return y


def encode_at_once(module: Any, hidden_states: Tensor, batch: PackedBatch) -> Tensor | None:
    """All layers of an encoder in one op, or None if they have to be called one by one."""
    state = module._fastbert
    weights = None if state.resolved is None else state.resolved.weights(module.layer)
    if weights is None:
        state.resolved = stack_of(module.layer, hidden_states, batch)
        if state.resolved is None:
            return None
        weights = state.resolved.parameters
    y = encoder.layers_at_once(batch.pack(hidden_states), batch, weights, state.resolved.settings)
    if y is None:
        return None
    for layer in module.layer:
        layer._fastbert.count(None)
    return batch.unpack(y)


def stack_of(layers: nn.ModuleList, hidden_states: Tensor, batch: PackedBatch) -> ResolvedStack | None:
    """The layers as one, or None if one of them would not run like the others, or has to be called."""
    shared = None
    for layer in layers:
        if not takes_packed(layer, batch) or "stock" not in vars(type(layer)):
            return None
        if any(getattr(layer, name) for name in HOOKS):
            return None
        reason, _, settings = layer.ready_parts(hidden_states)
        if reason is not None or settings.dropout or (shared is not None and settings != shared):
            return None
        shared = settings
    return None if shared is None else ResolvedStack(layers, shared)


def takes_packed(layer: nn.Module, batch: PackedBatch) -> bool:
    """Whether a layer may be handed packed tensors: it is one of ours, and nobody watches it."""
    if not isinstance(layer, FastLayer) or "forward" in vars(layer) or foreign_hook(layer) is not None:
        return False
    # A checkpointed layer has to get a mask with a gradient as a tensor, or the recomputation would miss it.
    return not (batch.bias is not None and batch.bias.requires_grad and layer.gradient_checkpointing)


def linked_mask(batch: PackedBatch, dtype: torch.dtype) -> Tensor | None:
    """The stock mask for a watched layer. If made here, it carries the batch, so that the layer need not look at it."""
    mask = batch.stock_mask(dtype)
    if mask is not None and batch.source is None and not torch.compiler.is_compiling():
        mask = mask.view(mask.shape)  # so that the batch, which keeps the mask, is not in a cycle with it
        mask._fastbert_batch = batch
    return mask


class FastEmbeddings(Fast):
    """Word, position and token type embedding with LayerNorm and dropout, in one op."""

    _fastbert: State

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> Tensor:
        arguments = input_ids, token_type_ids, position_ids, inputs_embeds, past_key_values_length
        if not isinstance(self, FastEmbeddings):
            return restored_forward(self, *arguments)
        reason = call_reason(self._fastbert.config, {}) or self.static_reason()
        if input_ids is None or inputs_embeds is not None:
            reason = "inputs_embeds were given"
        if not torch.compiler.is_compiling():
            self._fastbert.reason = reason
        if reason is not None:
            return super().forward(*arguments)
        y = encoder.embed(self, input_ids, token_type_ids, position_ids, past_key_values_length)
        if self.resolve().requires_grad and torch.is_grad_enabled() and not y.requires_grad:
            y.requires_grad_()
        return y

    def resolve(self) -> ResolvedEmbeddings:
        """The module's parts, looked up anew only if something changed."""
        state = self._fastbert
        if torch.compiler.is_compiling():
            return ResolvedEmbeddings(self)
        if state.resolved is None or not state.resolved.current(self):
            state.resolved = ResolvedEmbeddings(self)
        return state.resolved

    def static_reason(self) -> str | None:
        """Why the module could not take the fast path whatever the call, or None."""
        resolved = self.resolve()
        if resolved.reason is not None:
            return resolved.reason
        weights = resolved.weights.read()
        return "a weight is no parameter" if weights is None else wrong_weights(weights)


def fast_class(stock: type[nn.Module]) -> type[nn.Module] | None:
    """The subclass that stands in for a stock class, or None if there is none."""
    role, family = ROLES.get((stock.__module__, stock.__name__), (None, None))
    if role is None or family is None:
        return None
    importlib.import_module("fastbert.models")  # which makes some of the classes itself
    return _fast_class(stock, role, family)


@functools.cache
def _fast_class(stock: type[nn.Module], role: str, family: Family) -> Any:
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    names |= {"stock": stock, "family": family}
    mixins: dict[str, type] = {"layer": FastLayer, "encoder": FastEncoder, "embeddings": FastEmbeddings}
    if role == "encoder" and family.name == "distilbert":
        mixin: type = FastDistilBertEncoder
    elif role in mixins:
        mixin = mixins[role]
    else:
        from fastbert import models

        mixin = models.mixin(role, family)
        if hasattr(mixin, "head_forward"):
            names["forward"] = models.forward_of(stock)
    return FastMeta(stock.__name__, (mixin, stock), names)


copyreg.pickle(FastMeta, lambda cls: (_class_of, (cls.stock,)))


# --- optimize and restore ------------------------------------------------------------------------------------


def optimize(model: Model, *, cuda_graphs: bool | int = False) -> Model:
    """Make every BERT inside `model` a fast one, in place.

    model: a transformers model of a family of `FAMILIES`, or any nn.Module that holds some (a sentence-transformers
    SentenceTransformer or CrossEncoder, a PEFT model, your own). Weights, keys and outputs stay what they are. Calling
    it again does no harm; `restore` undoes it.

    cuda_graphs: run the layers by CUDA graphs where no gradient is recorded, which makes small batches faster. A graph
    serves batches of about one size (`graphs.Bucket`) and is recorded at the first of them; each encoder holds 32 of
    them, or as many as are given here, and drops the one that was not used for longest. `report` says whether the last
    call used one, and if not, why. The last call of `optimize` decides. See docs/cuda_graphs.md.

    Returns the model. Raises TypeError if it is no nn.Module, ValueError if there is nothing in it to optimize, if
    cuda_graphs is neither a bool nor at least 1, or if it asks for graphs of an encoder that is not on a CUDA device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize: model must be a torch.nn.Module, got {type(model).__qualname__}")
    if not isinstance(cuda_graphs, int) or cuda_graphs < (not isinstance(cuda_graphs, bool)):
        raise ValueError(
            "optimize: cuda_graphs must be True, False, or the number of graphs to hold, at least 1; "
            f"got {cuda_graphs!r}"
        )
    encoders = [module for module in model.modules() if role_of(module) == "encoder"]
    if cuda_graphs:
        devices = {str(parameter.device) for module in encoders for parameter in module.parameters()}
        if not encoders or not all(device.startswith("cuda") for device in devices):
            what = f"its weights are on {', '.join(sorted(devices))}" if encoders else "there is no encoder in it"
            raise ValueError(
                f"optimize: cuda_graphs={cuda_graphs} needs a model whose encoder is on a CUDA device, but {what}; "
                "optimize(model.cuda(), cuda_graphs=True) moves it first"
            )
    if not swap(model):
        raise ValueError(
            f"optimize: nothing to optimize in model, a {type(model).__qualname__} of {type(model).__module__}; "
            f"allowed are models of the families {', '.join(FAMILIES)}, and modules that hold one"
        )
    limit = graphs.DEFAULT_LIMIT if cuda_graphs is True else int(cuda_graphs)
    for module in encoders:
        module._fastbert.graphs = graphs.EncoderGraphs(limit) if limit else None
    return model


def role_of(module: nn.Module) -> str | None:
    """What a stock or swapped module is in its family: "layer", "encoder", "embeddings", a head's name, or None."""
    return ROLES.get((type(module).__module__, type(module).__name__), (None,))[0]


def swap(model: nn.Module, *, replace: tuple[str | None, ...] | None = None) -> bool:
    """Swap what can be swapped. replace: the attention implementations to put ours in place of; None: any.

    Returns whether anything in the model is swapped now.
    """
    found = False
    for module in model.modules():
        if not isinstance(module, Fast):
            role = role_of(module)
            cls = None if role in (None, "Model", "LMHeadModel") else fast_class(type(module))
            if cls is None:
                continue
            module.__class__ = cls
        module.__dict__.setdefault("_fastbert", State())
        found = True
    for module in model.modules():
        _adopt(module, replace)
    return found


def _adopt(module: nn.Module, replace: tuple[str | None, ...] | None) -> None:
    """Give a base model's swapped parts its configuration, and make that ask for 2-D masks."""
    if isinstance(module, (FastEncoder, FastDistilBertEncoder)):
        state = module._fastbert
        if state.config is None:
            first = next((layer for layer in module.modules() if hasattr(layer, "attention_head_size")), None)
            state.config = getattr(first, "config", None)
        config = state.config
        for layer in module.modules():
            if isinstance(layer, FastLayer) and layer._fastbert.config is None:
                layer._fastbert.config = config
        if config is None or config.output_attentions or config._attn_implementation == IMPLEMENTATION:
            return
        if replace is not None and config._attn_implementation not in replace:
            return
        state.implementation = config._attn_implementation or "sdpa"
        config._attn_implementation = IMPLEMENTATION
    elif isinstance(module, PreTrainedModel):
        embeddings = getattr(module, "embeddings", None)
        if isinstance(embeddings, FastEmbeddings) and embeddings._fastbert.config is None:
            embeddings._fastbert.config = module.config


def restore(model: Model) -> Model:
    """Put back exactly what `optimize` changed: the classes and the attention implementation.

    Returns the model. Raises TypeError if it is no nn.Module, RuntimeError if somebody has subclassed a swapped module
    since (as FSDP does), naming it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model must be a torch.nn.Module, got {type(model).__qualname__}")
    swapped = [(name, module) for name, module in model.named_modules() if isinstance(module, Fast)]
    for name, module in swapped:
        if type(module) is not fast_class(module.stock) and not isinstance(module, PreTrainedModel):
            raise RuntimeError(f"restore: {name or 'model'} has become a {type(module).__qualname__} since optimize")
    for _, module in swapped:
        state = module.__dict__.pop("_fastbert", None)
        if (
            state is not None
            and state.implementation is not None
            and state.config._attn_implementation == IMPLEMENTATION
        ):
            state.config._attn_implementation = state.implementation
        if type(module) is fast_class(module.stock):
            module.__class__ = module.stock
    return model


# --- every model built from now on ------------------------------------------------------------------------------------

_enabled = 0
_stock_post_init: Callable[..., None] | None = None


def enable() -> None:
    """Make every BERT that is built from now on a fast one, however it is built.

    Their attention implementation stays what was asked for: under SDPA, the default, they are fast, under any other,
    "eager" say, their layers stay stock. Calls nest: as many calls of `disable` undo it.
    """
    global _enabled, _stock_post_init
    _enabled += 1
    if _enabled > 1:
        return
    stock = _stock_post_init = PreTrainedModel.post_init

    @functools.wraps(stock)
    def post_init(self: PreTrainedModel) -> None:
        stock(self)
        if _enabled:
            swap(self, replace=())

    PreTrainedModel.post_init = post_init
    if os.environ.get("FASTBERT_PATCH"):
        print_calls_at_exit()


def disable() -> None:
    """Undo `enable`. Models built in between stay fast. Raises RuntimeError if `enable` was not called before."""
    global _enabled
    if not _enabled:
        raise RuntimeError("disable: fastbert is not enabled")
    _enabled -= 1
    if not _enabled and getattr(PreTrainedModel.post_init, "__wrapped__", None) is _stock_post_init:
        PreTrainedModel.post_init = _stock_post_init


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """`enable` and `disable` around a block of code."""
    enable()
    try:
        yield
    finally:
        disable()


@functools.cache
def print_calls_at_exit() -> None:
    """Print, when the process ends, how many layer calls were fast. FASTBERT_PRINT_CALLS=1 asks for it, too."""
    atexit.register(lambda: print(f"fastbert: {calls['fast']} fast layer calls, {calls['stock']} stock", flush=True))


if os.environ.get("FASTBERT_PRINT_CALLS", "0") not in ("", "0"):
    print_calls_at_exit()
