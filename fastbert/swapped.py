"""The swapped classes: how a call goes through a layer, an encoder or an embeddings module that became a fast one.

Each takes the packed path when nothing in `guards.py` speaks against it, and the stock forward otherwise. A base model
goes past the calls of embeddings and encoder where nobody could tell (`encode_ids`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, bidirectional_mask_function, sdpa_mask
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions

from fastbert import encoder, graphs
from fastbert.families import Family
from fastbert.guards import (
    PACKABLE,
    ResolvedEmbeddings,
    ResolvedLayer,
    ResolvedStack,
    bypass_reason,
    call_reason,
    captured,
    foreign_hook,
    plain_buffers,
    recording,
    replaced_method,
    sharded,
    wrong_settings,
    wrong_weights,
)
from fastbert.packing import PackedBatch, batch_of, batch_of_ids, countable

KEEP_PADDING = "fastbert_keep_padding"  # a keyword argument on its way from a head to the encoder

# What a base model may be given and still pack before it embeds; anything else has to be None or False.
PLAIN = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "use_cache", "return_dict"}
PLAIN |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}

calls = {"fast": 0, "stock": 0}  # layer calls in this process, without those traced by torch.compile


class State:
    """What fastbert keeps on a swapped module. Copies and pickles start afresh, apart from what was asked for."""

    __slots__ = ("buffers", "config", "fast", "graphs", "implementation", "reason", "resolved", "stock")

    def __init__(self, config: Any = None, implementation: str | None = None, graphs_held: int = 0) -> None:
        self.config = config
        self.implementation = implementation  # of the configuration before optimize; on an encoder and its layers
        self.resolved: Any = None  # as last found: a guards.Resolved; on an encoder a guards.ResolvedStack
        self.buffers: Any = None  # of embeddings, as guards.plain_buffers found them
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


class Fast:
    """What the swapped classes have in common. `stock` is the class that was there before."""

    stock: type[nn.Module]
    family: Family

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # By the stock class: a copy starts with the swapped class made anew where it is loaded.
        from fastbert.patch import rebuild

        return rebuild, (self.stock,), self.__getstate__()


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
            # A token that one layer does not attend to has hidden states all the same, unlike one that the encoder's
            # mask leaves out.
            alone = isinstance(attention_mask, Tensor) and attention_mask.dim() == 4
            batch = batch_of(hidden_states, attention_mask, kwargs, keep_padding=alone)
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
        padded = super().forward(padded, stock_mask(self, batch, padded.dtype), *args, **kwargs)
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
        if getattr(resolved.chunking(self), "chunk_size_feed_forward", 0):
            return "chunk_size_feed_forward is set", None, None
        weights = resolved.weights.read()
        if weights is None:
            return "a weight is no parameter", None, None
        reason = wrong_weights(weights, hidden_states) or resolved.misfit(weights)
        settings = None if reason else resolved.settings(weights)
        return reason or wrong_settings(settings, "scaling, an eps or a dropout's p"), weights, settings

    def static_reason(self) -> str | None:
        """Why the layer could not take the fast path whatever the call, or None."""
        config = self._fastbert.config
        if config is not None and config._attn_implementation not in PACKABLE:
            return f"the attention implementation was set to {config._attn_implementation!r}"
        reason, weights, _ = self.ready_parts(None)
        return None if sharded(weights) else reason

    def resolve(self) -> ResolvedLayer:
        """The layer's parts, looked up anew only if something changed."""
        if torch.compiler.is_compiling():
            return ResolvedLayer(self, self.family.names, self.stock.__module__)
        resolved = self._fastbert.resolved  # read once: other threads share it
        if resolved is None or not resolved.current(self):
            resolved = self._fastbert.resolved = ResolvedLayer(self, self.family.names, self.stock.__module__)
        return resolved


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
            mask = expanded_mask(self, attention_mask, hidden_states)
            return cleared(super().forward(hidden_states, mask, **crossing, use_cache=use_cache, **kwargs), batch)
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
            mask = expanded_mask(self, attention_mask, hidden_states)
            return cleared(super().forward(hidden_states, mask, **kwargs), batch)
        return BaseModelOutput(last_hidden_state=encode(self, hidden_states, batch, **kwargs))


def encoder_batch(
    module: Any, hidden_states: Tensor, attention_mask: Any, kwargs: dict[str, Any], crossing: dict[str, Any]
) -> PackedBatch | None:
    """The packed batch of an encoder's call, or None if the stock forward has to run it."""
    keep_padding = kwargs.pop(KEEP_PADDING, False)
    config = module._fastbert.config
    reason = call_reason(config, kwargs | crossing) or replaced_method(module.stock)
    if reason is None and getattr(config, "is_decoder", False):  # a masked place predicts the token after it
        reason = "the layers are a decoder's (causal attention)"
    if reason is not None:
        if module._fastbert.graphs is not None:
            module._fastbert.graphs.reason = reason
        return None
    batch = batch_of(hidden_states, attention_mask, kwargs, keep_padding=keep_padding)
    return batch if isinstance(batch, PackedBatch) else None


def expanded_mask(module: Any, attention_mask: Any, hidden_states: Tensor) -> Any:
    """A mask as the stock layers of an encoder get it: what transformers makes of a 2-D one for their attention."""
    implementation = module._fastbert.implementation
    if implementation is None or not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return attention_mask
    batch, seqlen = hidden_states.shape[:2]
    make = ALL_MASK_ATTENTION_FUNCTIONS.get(implementation, sdpa_mask)
    return make(
        batch_size=batch,
        q_length=seqlen,
        kv_length=attention_mask.shape[1],  # with a cache, more than the states
        q_offset=0,
        kv_offset=0,
        mask_function=bidirectional_mask_function,
        attention_mask=attention_mask.to(hidden_states.device, torch.bool),
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=True,
        dtype=hidden_states.dtype,
        config=module._fastbert.config,
        use_vmap=False,
        device=hidden_states.device,
    )


def stock_mask(module: Any, batch: PackedBatch, dtype: torch.dtype) -> Tensor | None:
    """The mask of a batch for stock code in a swapped encoder or layer: additive if its attention was the eager one."""
    return batch.stock_mask(dtype, as_bias=module._fastbert.implementation == "eager")


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


def packable(module: Any) -> bool:
    """Whether the states before an encoder may be packed: nobody looks at a layer, and some layer can use it."""
    return not any(map(watched, module.layer)) and not all_stock(module)


def encode(module: Any, hidden_states: Tensor, batch: PackedBatch, *args: Any, **kwargs: Any) -> Tensor:
    """All layers of an encoder: hidden_states [B, S, H] or [T, H] -> [B, S, H].

    args, kwargs: what the stock encoder hands its layers besides states and mask.
    """
    if module._fastbert.graphs is not None and not torch.compiler.is_compiling():
        y = replay(module.layer, module._fastbert.graphs, hidden_states, batch)
        if y is not None:
            return y
    recorded = captured("hidden_states")
    if torch.is_grad_enabled():
        module._fastbert.resolved = None  # or weights that were replaced stay in memory while the model trains
    elif not torch.compiler.is_compiling() and not captured():
        y = encode_at_once(module, hidden_states, batch)
        if y is not None:
            return y
    return encoder.encode(
        module.layer,
        hidden_states,
        batch,
        lambda layer: not recorded and takes_packed(layer, batch),
        lambda: linked_mask(module, batch, hidden_states.dtype),
        *args,
        **kwargs,
    )


def replay(
    layers: nn.ModuleList,
    held: graphs.EncoderGraphs,
    source: Tensor | encoder.TokenIds,
    batch: PackedBatch,
    embeddings: nn.Module | None = None,
) -> Tensor | None:
    """All layers of an encoder by a CUDA graph, or None, with the reason in `held`, if none may serve this call.

    source: hidden states, or, with embeddings to begin with, ids.
    """
    y = held.encode(layers, source, batch, embeddings)
    if y is not None:
        for layer in layers:
            layer._fastbert.count(None)
    return y


def encode_at_once(
    module: Any, hidden_states: Tensor, batch: PackedBatch, stack: ResolvedStack | None = None
) -> Tensor | None:
    """All layers of an encoder past their modules, on a CPU in one op; None if they have to be called one by one.

    stack: `unchanged_stack`, if that has been asked.
    """
    stack = unchanged_stack(module) if stack is None else stack
    if stack is None:
        stack = module._fastbert.resolved = stack_of(module.layer, hidden_states, batch)
        if stack is None:
            return None
    x = batch.rows(hidden_states)
    y = encoder.layers_at_once(x, batch, stack.parameters, stack.settings)
    if y is None:
        if not stack.fits(x):
            return None
        y = encoder.layers_in_turn(x, batch, stack.parameters, stack.settings)
    for layer in module.layer:
        layer._fastbert.count(None)
    return batch.unpack(y)


def unchanged_stack(module: Any) -> ResolvedStack | None:
    """The layers of an encoder that ran as one before, if nothing about them has changed since."""
    stack = module._fastbert.resolved  # read once: other threads share it
    if stack is not None and not stack.current(module.layer):
        stack = module._fastbert.resolved = None
    return stack


def stack_of(layers: nn.ModuleList, hidden_states: Tensor, batch: PackedBatch) -> ResolvedStack | None:
    """The layers as one, or None if one of them would not run like the others, or has to be called."""
    shared = None
    for layer in layers:
        if not takes_packed(layer, batch) or bypass_reason(layer, "a layer") is not None:
            return None
        reason, _, settings = layer.ready_parts(hidden_states)
        if reason is not None or settings.dropout or (shared is not None and settings != shared):
            return None
        shared = settings
    return None if shared is None else ResolvedStack(layers, shared)


def watched(layer: nn.Module) -> bool:
    """Whether a layer has to be handed padded tensors: it is none of ours, or somebody looks at it."""
    return not isinstance(layer, FastLayer) or "forward" in vars(layer) or foreign_hook(layer) is not None


def takes_packed(layer: nn.Module, batch: PackedBatch) -> bool:
    """Whether a layer may be handed packed tensors."""
    if watched(layer):
        return False
    # A checkpointed layer has to get a mask with a gradient as a tensor, or the recomputation would miss it.
    return not (batch.bias is not None and batch.bias.requires_grad and layer.gradient_checkpointing)


def linked_mask(module: Any, batch: PackedBatch, dtype: torch.dtype) -> Tensor | None:
    """An encoder's mask for a watched layer. If made here, it carries the batch, so that the layer need not look."""
    mask = stock_mask(module, batch, dtype)
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
        reason = call_reason(self._fastbert.config, {}) or self.ready_parts()[0]
        if input_ids is None or inputs_embeds is not None:
            reason = "inputs_embeds were given"
        if not torch.compiler.is_compiling():
            self._fastbert.reason = reason
        if reason is not None:
            return super().forward(*arguments)
        plain = plain_buffers(self)
        ids = input_ids, token_type_ids, position_ids, past_key_values_length
        return self.embed(encoder.token_ids(self, *ids, plain_buffers=plain))

    def embed(self, ids: encoder.TokenIds) -> Tensor:
        """The fast path: `encoder.embed` of this module."""
        y = encoder.embed(self, ids)
        if torch.is_grad_enabled() and not y.requires_grad and self.resolve().requires_grad:
            y.requires_grad_()
        return y

    def resolve(self) -> ResolvedEmbeddings:
        """The module's parts, looked up anew only if something changed."""
        if torch.compiler.is_compiling():
            return ResolvedEmbeddings(self)
        resolved = self._fastbert.resolved
        if resolved is None or not resolved.current(self):
            resolved = self._fastbert.resolved = ResolvedEmbeddings(self)
        return resolved

    def ready_parts(self) -> tuple[str | None, tuple[Tensor, ...] | None]:
        """(why the module's parts speak against the fast path, or None; the weights)."""
        resolved = self.resolve()
        if resolved.reason is not None:
            return resolved.reason, None
        weights = resolved.weights.read()
        if weights is None:
            return "a weight is no parameter", None
        settings = (self.LayerNorm.eps, self.dropout.p)
        reason = (
            wrong_weights(weights) or resolved.misfit(weights) or wrong_settings(settings, "LayerNorm.eps or dropout.p")
        )
        return reason, weights

    def static_reason(self) -> str | None:
        """Why the module could not take the fast path whatever the call, or None."""
        reason, weights = self.ready_parts()
        return None if sharded(weights) else reason


def encode_ids(model: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """The last hidden states [B, S, H] of a base model, packed before they are embedded; None if stock has to run.

    kwargs: the arguments of the call, all by name.
    """
    if not packs_first(model, kwargs):
        return None
    embeddings, stack = model.embeddings, model.encoder
    held = stack._fastbert.graphs
    layers = None if torch.is_grad_enabled() else unchanged_stack(stack)
    later = held is not None and held.last_served  # graphs look at the layers themselves
    if layers is None and not later and not packable(stack):
        return None
    input_ids, mask, position_ids = map(kwargs.get, ("input_ids", "attention_mask", "position_ids"))
    batch = batch_of_ids(input_ids, mask, kwargs)
    plain = plain_buffers(embeddings)
    types = kwargs.get("token_type_ids")
    ids = encoder.token_ids(embeddings, input_ids, types, position_ids, batch=batch, plain_buffers=plain)
    embeddings._fastbert.reason = None
    if held is not None:
        y = replay(stack.layer, held, ids, batch, embeddings)
        if y is not None:
            return y
        if layers is None and later and not packable(stack):
            return None
    x = batch.rows(embeddings.embed(ids))
    if layers is not None:
        y = encode_at_once(stack, x, batch, layers)
        if y is not None:
            return y
    rest = {"encoder_attention_mask": None, "past_key_values": None, "position_ids": position_ids}
    rest |= {name: kwargs[name] for name in kwargs if name.startswith(("cu_seq_lens", "max_length"))}
    return encode(stack, x, batch, None, **rest)


def packs_first(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a base model's call may be packed before it is embedded: nobody wants to see or to give padded states."""
    input_ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    config, parts = model.config, model._modules
    embeddings, stack = parts.get("embeddings"), parts.get("encoder")
    return (
        type(input_ids) is Tensor
        and input_ids.dim() == 2
        and (mask is None or countable(mask))
        and all(value is None or value is False for name, value in kwargs.items() if name not in PLAIN)
        and not recording(config)
        and not config.is_decoder
        and getattr(config, "is_causal", None) is None
        and call_reason(config, {}) is None
        and "_create_attention_masks" not in vars(model)
        and replaced_method(model.stock, "_create_attention_masks") is None
        and isinstance(embeddings, FastEmbeddings)
        and bypass_reason(embeddings, "embeddings") is None
        and isinstance(stack, FastEncoder)
        and replaced_method(stack.stock) is None
        and bypass_reason(stack, "encoder") is None
        and "embeddings_project" not in parts  # ELECTRA's, where embeddings are narrower than the layers
        and embeddings.ready_parts()[0] is None
    )
