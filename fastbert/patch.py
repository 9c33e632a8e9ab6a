"""Which modules are swapped in place, and the guards that send a call back to the stock forward.

A swapped module keeps its object, its parameters and its place: only its `__class__` becomes a subclass of the stock
class, with the stock class's own name, whose forward takes the packed path when nothing speaks against it.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import operator
import os
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import Parameter
from transformers.activations import GELUActivation
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, sdpa_mask
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.output_capturing import _active_collector

from fastbert import dispatch, encoder
from fastbert.packing import PackedBatch, additive

IMPLEMENTATION = "fastbert"
PACKABLE = (IMPLEMENTATION, "sdpa")  # attention implementations under which the packed path may stand in
KEEP_PADDING = "fastbert_keep_padding"  # a keyword argument on its way from a head to the encoder
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}

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
_ROLES: dict[tuple[str, str], tuple[str, Family]] = {}
for _family in FAMILIES.values():
    _path = f"transformers.models.{_family.module}"
    _ROLES[_path, _family.layer_class or f"{_family.prefix}Layer"] = ("layer", _family)
    _ROLES[_path, _family.encoder_class or f"{_family.prefix}Encoder"] = ("encoder", _family)
    if _family.embeddings_class:
        _ROLES[_path, _family.embeddings_class] = ("embeddings", _family)
    for _head in HEADS:
        _ROLES[_path, f"{_family.prefix}For{_head}"] = (_head, _family)
    for _role in ("Model", "LMHeadModel"):
        _ROLES[_path, f"{_family.prefix}{_role}"] = (_role, _family)

calls = {"fast": 0, "stock": 0}  # layer calls in this process, without those traced by torch.compile


class State:
    """What fastbert keeps on a swapped module. Copies and pickles start afresh, apart from the configuration."""

    __slots__ = ("config", "fast", "implementation", "reason", "resolved", "stock")

    def __init__(self, config: Any = None, implementation: str | None = None) -> None:
        self.config = config
        self.implementation = implementation  # of the configuration before optimize; on an encoder
        self.resolved: Resolved | None = None
        self.fast = 0
        self.stock = 0
        self.reason: str | None = None  # why the last call was stock; None if it was fast, or if there was none

    def __reduce__(self) -> tuple[Any, ...]:
        return State, (self.config, self.implementation)

    def count(self, reason: str | None) -> None:
        self.reason = reason
        if reason is None:
            self.fast += 1
            calls["fast"] += 1
        else:
            self.stock += 1
            calls["stock"] += 1


# --- guards: what a module's parts are ---------------------------------------------------------------------------------

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(getattr(torch_module, f"_global{name}") for name in _HOOKS)
_HARMLESS_HOOKS = ("transformers.utils.output_capturing", "torch.distributed")


def foreign_hook(module: nn.Module) -> str | None:
    """The name of a hook on the module that is neither transformers' own capture of outputs nor FSDP's, if any."""
    for hooks in _HOOKS:
        for hook in getattr(module, hooks).values():
            if not (getattr(hook, "__module__", None) or "").startswith(_HARMLESS_HOOKS):
                return getattr(hook, "__qualname__", type(hook).__qualname__)
    return None


class Resolved:
    """The parts of one module as they were last found, with the reason against the fast path that lies in them.

    `current` tells in a few microseconds whether they still are what they were.
    """

    def __init__(self, module: nn.Module, paths: tuple[str, ...], check: Callable[[dict[str, nn.Module]], str | None]):
        every = dict.fromkeys(chain.from_iterable(_prefixes(path) for path in paths))
        parts: dict[str, nn.Module] = {"": module}
        self.missing: str | None = None
        for path in every:
            parent, _, name = path.rpartition(".")
            if parent in parts and name in parts[parent]._modules:
                parts[path] = parts[parent]._modules[name]
            else:
                self.missing = self.missing or f"{path} is not there"
        del parts[""]
        found = list(parts)
        parents = [parts[path.rpartition(".")[0]] if "." in path else module for path in found]
        self.parts = parts
        self.dicts = [parent._modules for parent in parents]
        self.names = [path.rpartition(".")[2] for path in found]
        self.modules = tuple(parts.values())
        self.types = tuple(map(type, self.modules))
        self.instances = [vars(part) for part in self.modules]
        self.hooks = [*_GLOBAL_HOOKS, *(getattr(part, name) for part in self.modules for name in _HOOKS)]
        self.hook_ids = tuple(chain.from_iterable(self.hooks))
        self.replaced = tuple(map(operator.contains, self.instances, repeat("forward")))
        self.reason = self.missing or self._common() or check(parts)

    def current(self) -> bool:
        try:
            return (
                tuple(map(operator.getitem, self.dicts, self.names)) == self.modules
                and tuple(map(type, self.modules)) == self.types
                and tuple(chain.from_iterable(self.hooks)) == self.hook_ids
                and tuple(map(operator.contains, self.instances, repeat("forward"))) == self.replaced
            )
        except KeyError:
            return False

    def _common(self) -> str | None:
        for hooks in _GLOBAL_HOOKS:
            if hooks:
                return "hooks on every module (torch.nn.modules.module.register_module_*_hook) are installed"
        for path, part in self.parts.items():
            hook = foreign_hook(part)
            if hook is not None:
                return f"a hook ({hook}) sits on {path}"
            if "forward" in vars(part):
                return f"the forward of {path} is replaced"
        return None


def _prefixes(path: str) -> Iterator[str]:
    names = path.split(".")
    return (".".join(names[: i + 1]) for i in range(len(names)))


def wrong_type(parts: dict[str, nn.Module], paths: dict[str, type], home: str) -> str | None:
    """A part that is not exactly of its type, or a container that is not transformers' own."""
    for path, part in parts.items():
        expected = paths.get(path)
        if expected is None:
            if type(part).__module__ != home:
                return f"{path} is a {type(part).__qualname__} of {type(part).__module__}"
        elif type(part) is not expected:
            return f"{path} is a {type(part).__qualname__}, not exactly nn.{expected.__name__}"
    return None


def is_gelu(activation: Any) -> bool:
    """Whether an activation is the exact GELU (erf)."""
    if type(activation) is GELUActivation:
        return True
    if type(activation) is nn.GELU:
        return activation.approximate == "none"
    return activation is nn.functional.gelu


def wrong_weights(weights: tuple[Tensor, ...], autocast_x: Tensor | None = None) -> str | None:
    """Why these parameters cannot be handed to the kernels, or None."""
    for kind in set(map(type, weights)):
        if kind is not Parameter:
            if kind is type(None):
                return "a bias is missing"
            if not (torch.compiler.is_compiling() and issubclass(kind, Tensor)):
                return f"a weight is a {kind.__qualname__}, not a plain nn.Parameter"
    dtypes = {weight.dtype for weight in weights}
    first = weights[0]
    if len(dtypes) > 1:
        return f"weights of several dtypes ({', '.join(sorted(map(str, dtypes)))})"
    device = first.device.type
    if first.dtype not in DTYPES.get(device, (first.dtype,)):
        return f"no kernels for {first.dtype} on {device}"
    x = autocast_x
    if x is not None and x.dtype is not first.dtype and not torch.is_autocast_enabled(device):
        return f"hidden_states are {x.dtype}, the weights {first.dtype}"
    return None


class Weights(NamedTuple):
    """Where to read weight and bias of some modules anew at each call."""

    dicts: tuple[dict[str, Any], ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, modules: list[nn.Module]) -> Weights:
        return cls(tuple(m._parameters for m in modules for _ in range(2)), ("weight", "bias") * len(modules))

    def read(self) -> tuple[Tensor, ...] | None:
        try:
            return tuple(map(operator.getitem, self.dicts, self.names))
        except KeyError:
            return None


class ResolvedLayer(Resolved):
    """The parts of a transformer layer."""

    def __init__(self, module: nn.Module, family: Family) -> None:
        names = family.names
        paths = {names.query: nn.Linear, names.key: nn.Linear, names.value: nn.Linear}
        paths |= {names.attention_out: nn.Linear, names.up: nn.Linear, names.down: nn.Linear}
        paths |= {names.attention_norm: nn.LayerNorm, names.norm: nn.LayerNorm}
        paths |= {names.attention_dropout: nn.Dropout, names.down_dropout: nn.Dropout}
        if names.attention_out_dropout is not None:
            paths[names.attention_out_dropout] = nn.Dropout
        owner, _, activation_name = names.activation.rpartition(".")
        optional = (names.activation,) if activation_name in module.get_submodule(owner)._modules else ()

        def check(parts: dict[str, nn.Module]) -> str | None:
            plain = {path: part for path, part in parts.items() if path != names.activation}
            return wrong_type(plain, paths, type(module).__module__) or self._check(module, names, parts)

        super().__init__(module, (*paths, *optional), check)
        if self.reason is not None:
            return
        parts = self.parts
        self.weights = Weights.of([parts[getattr(names, name)] for name in encoder.WEIGHTED])
        self.norms = parts[names.attention_norm], parts[names.norm]
        self.attention = parts[names.query.rpartition(".")[0]]
        self.chunked = parts.get("ffn", module)
        self.attention_dropout = parts[names.attention_dropout]
        self.hidden_dropout = None if names.attention_out_dropout is None else parts[names.attention_out_dropout]
        self.ffn_dropout = parts[names.down_dropout]

    def _check(self, module: nn.Module, names: encoder.LayerNames, parts: dict[str, nn.Module]) -> str | None:
        attention = parts[names.query.rpartition(".")[0]]
        if getattr(module, "is_decoder", False) or getattr(attention, "is_causal", False):
            return "the layer is a decoder's (causal attention)"
        if getattr(module, "add_cross_attention", False):
            return "the layer has cross-attention"
        owner, _, activation = names.activation.rpartition(".")
        act = getattr(parts[owner], activation, None)
        if not is_gelu(act):
            return f"the activation is {getattr(act, '__name__', type(act).__name__)}, not exact GELU"
        head_dim = attention.attention_head_size
        self.heads = parts[names.query].out_features // head_dim
        self.head_dim = head_dim
        widths = {parts[path].out_features for path in (names.query, names.key, names.value)}
        if len(widths) > 1 or self.heads * head_dim not in widths:
            return f"query, key and value have widths {sorted(widths)}, not {head_dim} times the number of heads"
        return None

    def settings(self) -> encoder.LayerSettings:
        dropouts = self.attention_dropout, self.hidden_dropout, self.ffn_dropout
        p = [d.p if d is not None and d.training else 0.0 for d in dropouts]
        if not self.attention.training:
            p[0] = 0.0
        elif not self.attention_dropout.training:
            p[0] = self.attention_dropout.p  # stock reads p and the attention's own mode
        norm1, norm2 = self.norms
        return encoder.LayerSettings(
            self.heads,
            self.attention.scaling,
            norm1.eps,
            norm2.eps,
            *p,
            torch.are_deterministic_algorithms_enabled(),
        )


class ResolvedEmbeddings(Resolved):
    """The parts of an embeddings module."""

    def __init__(self, module: nn.Module) -> None:
        tables = ("word_embeddings", "position_embeddings", "token_type_embeddings")
        paths: dict[str, type] = dict.fromkeys(tables, nn.Embedding)
        paths |= {"LayerNorm": nn.LayerNorm, "dropout": nn.Dropout}

        def check(parts: dict[str, nn.Module]) -> str | None:
            reason = wrong_type(parts, paths, "")
            if reason is not None:
                return reason
            for path in tables:
                table = parts[path]
                if table.max_norm is not None or table.sparse or table.scale_grad_by_freq:
                    return f"{path} uses max_norm, sparse or scale_grad_by_freq"
            return None

        super().__init__(module, tuple(paths), check)
        if self.reason is None:
            modules = [self.parts[path]._parameters for path in tables]
            norm = self.parts["LayerNorm"]._parameters
            self.weights = Weights((*modules, norm, norm), ("weight",) * 4 + ("bias",))


# --- guards: what a call asks for --------------------------------------------------------------------------------------


def captured(what: str) -> bool:
    """Whether transformers is recording "hidden_states" or "attentions" in the call that runs now."""
    collected = _active_collector.get()
    return collected is not None and what in collected


def call_reason(config: Any, kwargs: dict[str, Any]) -> str | None:
    """Why the call that runs now has to take the stock forward, or None."""
    implementation = None if config is None else config._attn_implementation
    if config is not None and implementation not in PACKABLE:
        return f"the attention implementation was set to {implementation!r}"
    if kwargs.get("output_attentions") or captured("attentions"):
        return "attentions were asked for"
    if kwargs.get("past_key_values") is not None or kwargs.get("encoder_hidden_states") is not None:
        return "a cache or cross-attention is in use"
    if kwargs.get("is_causal"):
        return "causal attention was asked for"
    if torch.compiler.is_compiling():
        return None
    if torch.jit.is_tracing():
        return "torch.jit.trace is running"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is running"
    return None


def batch_of(
    hidden_states: Tensor, attention_mask: Any, kwargs: dict[str, Any], *, keep_padding: bool = False
) -> PackedBatch | str:
    """The batch of padded hidden_states [B, S, H] under a mask as the encoder or a layer gets it, or why there is none.

    keep_padding: compute the masked places too, as stock does.
    """
    if isinstance(attention_mask, PackedBatch):
        return attention_mask
    batch, seqlen = hidden_states.shape[:2]
    if not torch.compiler.is_compiling() and hidden_states.numel() == 0:
        return "the batch is empty"
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        return f"the attention mask is a {type(attention_mask).__name__}"
    if kwargs.get("cu_seq_lens_q") is not None or kwargs.get("cu_seq_lens_k") is not None:
        names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        if attention_mask is not None:
            raise ValueError("attention_mask must be None when cu_seq_lens_q is given")
        return PackedBatch.from_cu_seqlens(batch, seqlen, hidden_states.device, *(kwargs.get(name) for name in names))
    if attention_mask is None:
        return PackedBatch.full(batch, seqlen, hidden_states.device)
    made_here = getattr(attention_mask, "_fastbert_batch", None)
    if made_here is not None:
        return made_here
    if attention_mask.dim() == 4:
        if not keep_padding and not unreadable(attention_mask) and (mask := _same_rows(attention_mask)) is not None:
            return PackedBatch.from_mask(mask.expand(batch, seqlen), batch, seqlen)
        return PackedBatch.from_bias(attention_mask, batch, seqlen, hidden_states.dtype)
    if keep_padding or unreadable(attention_mask):
        return PackedBatch.padded(attention_mask, batch, seqlen, hidden_states.dtype, zero=not keep_padding)
    return PackedBatch.from_mask(attention_mask, batch, seqlen)


def _same_rows(mask: Tensor) -> Tensor | None:
    """The 2-D mask [B|1, S] that a bool mask [B|1, 1, S|1, S] repeats for every query, as SDPA's does, or None."""
    if mask.dtype is not torch.bool or mask.shape[1] != 1:
        return None
    rows = mask[:, 0, :1]
    return rows[:, 0] if torch.equal(mask[:, 0], rows.expand_as(mask[:, 0])) else None


def unreadable(mask: Tensor) -> bool:
    """Whether the values of a mask cannot be read now: while tracing, on meta or fake tensors."""
    return torch.compiler.is_compiling() or mask.is_meta or type(mask) is not Tensor


# --- the swapped classes -----------------------------------------------------------------------------------------------


class Fast:
    """What the swapped classes have in common. `stock` is the class that was there before."""

    stock: type[nn.Module]
    family: Family

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # By the stock class: the swapped one carries its name, so pickle could not find it.
        return _rebuild, (self.stock,), self.__getstate__()


def _rebuild(stock: type[nn.Module]) -> nn.Module:
    cls = fast_class(stock)
    assert cls is not None
    return cls.__new__(cls)


class FastLayer(Fast):
    """A transformer layer. Takes [T, H] with a PackedBatch, or, like the stock one, [B, S, H] with any mask."""

    _fastbert: State

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
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
        return self._parts_reason(hidden_states)

    def _parts_reason(self, hidden_states: Tensor | None) -> tuple[Any, Any, Any]:
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
        return self._parts_reason(None)[0]

    def resolve(self) -> ResolvedLayer:
        """The layer's parts, looked up anew only if something changed."""
        state = self._fastbert
        if torch.compiler.is_compiling():
            return ResolvedLayer(self, self.family)
        if state.resolved is None or not state.resolved.current():
            state.resolved = ResolvedLayer(self, self.family)
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
        crossing = {"encoder_hidden_states": encoder_hidden_states, "past_key_values": past_key_values}
        batch = encoder_batch(self, hidden_states, attention_mask, kwargs, crossing)
        if batch is None:
            crossing["encoder_attention_mask"] = encoder_attention_mask
            return super().forward(hidden_states, attention_mask, **crossing, use_cache=use_cache, **kwargs)
        watched = kwargs | {"encoder_attention_mask": encoder_attention_mask, "past_key_values": None}
        x = encode(self, hidden_states, batch, None, **watched)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=x)


class FastDistilBertEncoder(Fast):
    """DistilBERT's stack of layers."""

    _fastbert: State

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        batch = encoder_batch(self, hidden_states, attention_mask, kwargs, {})
        if batch is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=encode(self, hidden_states, batch, **kwargs))


def encoder_batch(
    module: Any, hidden_states: Tensor, attention_mask: Any, kwargs: dict[str, Any], crossing: dict[str, Any]
) -> PackedBatch | None:
    """The packed batch of an encoder's call, or None if the stock forward has to run it."""
    keep_padding = kwargs.pop(KEEP_PADDING, False)
    if call_reason(module._fastbert.config, kwargs | crossing) is not None:
        return None
    batch = batch_of(hidden_states, attention_mask, kwargs, keep_padding=keep_padding)
    return batch if isinstance(batch, PackedBatch) else None


def encode(module: Any, hidden_states: Tensor, batch: PackedBatch, *args: Any, **kwargs: Any) -> Tensor:
    """All layers of an encoder. args, kwargs: what the stock encoder hands its layers besides states and mask."""
    watched = captured("hidden_states")
    return encoder.encode(
        module.layer,
        hidden_states,
        batch,
        lambda layer: not watched and takes_packed(layer, batch),
        lambda: linked_mask(batch, hidden_states.dtype),
        *args,
        **kwargs,
    )


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
        mask._fastbert_batch = batch  # type: ignore[attr-defined]
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
        reason = call_reason(self._fastbert.config, {}) or self.static_reason()
        if input_ids is None or inputs_embeds is not None:
            reason = "inputs_embeds were given"
        if not torch.compiler.is_compiling():
            self._fastbert.reason = reason
        if reason is not None:
            return super().forward(input_ids, token_type_ids, position_ids, inputs_embeds, past_key_values_length)
        return encoder.embed(self, input_ids, token_type_ids, position_ids, past_key_values_length)

    def static_reason(self) -> str | None:
        """Why the module could not take the fast path whatever the call, or None."""
        state = self._fastbert
        if torch.compiler.is_compiling():
            resolved = ResolvedEmbeddings(self)
        elif state.resolved is None or not state.resolved.current():
            resolved = state.resolved = ResolvedEmbeddings(self)
        else:
            resolved = state.resolved
        if resolved.reason is not None:
            return resolved.reason
        weights = resolved.weights.read()
        return "a weight is no parameter" if weights is None else wrong_weights(weights)


@functools.cache
def fast_class(stock: type[nn.Module]) -> type[nn.Module] | None:
    """The subclass that stands in for a stock class, or None if there is none."""
    role, family = _ROLES.get((stock.__module__, stock.__name__), (None, None))
    if role is None:
        return None
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
    return type(stock.__name__, (mixin, stock), names)


# --- the attention implementation "fastbert", for stock layers ---------------------------------------------------------


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What a stock attention module runs under the implementation "fastbert": SDPA, with the 2-D mask expanded.

    Gives attention weights if they are asked for, which SDPA does not.
    """
    if attention_mask is None and kwargs.get("cu_seq_lens_q") is not None:
        names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        batch = PackedBatch.from_cu_seqlens(
            query.shape[0], query.shape[2], query.device, *(kwargs.get(name) for name in names)
        )
        attention_mask = batch.stock_mask(query.dtype)
    if attention_mask is not None and attention_mask.dim() == 2:
        attention_mask = attention_mask.to(torch.bool)[:, None, None, :]
        attention_mask = attention_mask.expand(-1, 1, query.shape[2], -1)
    if kwargs.get("output_attentions") or captured("attentions") or captured("cross_attentions"):
        return _eager(module, query, key, value, attention_mask, dropout, scaling)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
) -> tuple[Tensor, Tensor]:
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is None and getattr(module, "is_causal", False) and query.shape[2] > 1:
        ones = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        attention_mask = ones.tril(key.shape[2] - query.shape[2])[None, None]
    if attention_mask is not None:
        is_bool = attention_mask.dtype is torch.bool
        scores = scores + (additive(attention_mask, scores.dtype) if is_bool else attention_mask)
    weights = nn.functional.softmax(scores, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def attention_mask_2d(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = bidirectional_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of the implementation "fastbert": the 2-D mask itself where attention is bidirectional, else SDPA's."""
    if mask_function is bidirectional_mask_function and q_length == kv_length:
        return attention_mask
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, attention_mask_2d)


# --- optimize and restore ----------------------------------------------------------------------------------------------


def optimize(model: Model) -> Model:
    """Make every BERT inside `model` a fast one, in place.

    model: a transformers model of a family of `FAMILIES`, or any nn.Module that holds some (a sentence-transformers
    SentenceTransformer or CrossEncoder, a PEFT model, your own). Weights, keys and outputs stay what they are. Calling
    it again does no harm; `restore` undoes it.

    Returns the model. Raises TypeError if it is no nn.Module, ValueError if there is nothing in it to optimize.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize: model must be a torch.nn.Module, got {type(model).__qualname__}")
    if not swap(model):
        raise ValueError(
            f"optimize: nothing to optimize in model, a {type(model).__qualname__} of {type(model).__module__}; "
            f"allowed are models of the families {', '.join(FAMILIES)}, and modules that hold one"
        )
    return model


def swap(model: nn.Module, *, replace: tuple[str | None, ...] | None = None) -> bool:
    """Swap what can be swapped. replace: the attention implementations to put ours in place of; None: any.

    Returns whether anything in the model is swapped now.
    """
    found = False
    for module in model.modules():
        if not isinstance(module, Fast):
            role = _ROLES.get((type(module).__module__, type(module).__name__), (None,))[0]
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
        if state is not None and state.implementation is not None:
            if state.config._attn_implementation == IMPLEMENTATION:
                state.config._attn_implementation = state.implementation
        if type(module) is fast_class(module.stock):
            module.__class__ = module.stock
    return model


# --- report ------------------------------------------------------------------------------------------------------------


class Report:
    """What runs in a model, and why the rest does not. Prints as text.

    layers: [{"name", "path": "fast" | "stock", "reason"}], one entry a transformer layer; reason is None if fast.
    ops: {op: {"backend", "rejected": {backend: reason}}}, for the device and dtype of the model's weights.
    calls: {"fast", "stock"}, the layer calls since `optimize`, without those inside torch.compile.
    """

    def __init__(self, layers: list[dict[str, Any]], ops: dict[str, Any], others: list[dict[str, Any]], count: Any):
        self.layers = layers
        self.ops = ops
        self.others = others
        self.calls = count

    def as_dict(self) -> dict[str, Any]:
        """{"layers": [...], "ops": {...}}: only what JSON can hold."""
        return {"layers": [dict(layer) for layer in self.layers], "ops": copy.deepcopy(self.ops)}

    def __str__(self) -> str:
        fast = sum(layer["path"] == "fast" for layer in self.layers)
        lines = [f"{fast} of {len(self.layers)} layers fast; calls so far: {self.calls['fast']} fast"]
        lines[0] += f", {self.calls['stock']} stock"
        for entry in (*self.layers, *self.others):
            lines.append(f"  {entry['name']}: {entry['path']}" + (f", {entry['reason']}" if entry["reason"] else ""))
        for op, run in self.ops.items():
            lines.append(f"{op}: {run['backend'] or 'nothing can run'}")
            lines += [f"  not {backend}: {reason}" for backend, reason in run["rejected"].items()]
        return "\n".join(lines)

    __repr__ = __str__


def report(model: nn.Module) -> Report:
    """What runs in `model`: per layer the fast path or the stock one and why, per op the implementation.

    A layer counts as stock if something in it speaks against the fast path now, or if its last call was stock.
    Raises TypeError if model is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: model must be a torch.nn.Module, got {type(model).__qualname__}")
    layers, others, count = [], [], {"fast": 0, "stock": 0}
    head_dim, like = None, None
    for name, module in model.named_modules():
        role = _ROLES.get((type(module).__module__, type(module).__name__), (None,))[0]
        if isinstance(module, FastLayer):
            role = "layer"  # whatever the name of a class on top of ours
        if role not in ("layer", "embeddings"):
            continue
        if not isinstance(module, Fast):
            reason: str | None = "fastbert.optimize has not been called"
        else:
            reason = module.static_reason() or module._fastbert.reason
        entry = {"name": name, "path": "fast" if reason is None else "stock", "reason": reason}
        (layers if role == "layer" else others).append(entry)
        if isinstance(module, FastLayer):
            count["fast"] += module._fastbert.fast
            count["stock"] += module._fastbert.stock
            like = like if like is not None else next(module.parameters(), None)
            head_dim = head_dim or getattr(module.resolve(), "head_dim", None)
    like = like if like is not None else next(model.parameters(), None)
    device, dtype = ("cpu", torch.float32) if like is None else (like.device, like.dtype)
    return Report(layers, dispatch.describe(device, dtype, head_dim=head_dim), others, count)


# --- every model built from now on -------------------------------------------------------------------------------------

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
