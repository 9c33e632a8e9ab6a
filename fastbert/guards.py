"""What sends a call back to the stock forward, with the reason: a module's parts, its weights, and the call itself."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from transformers.activations import GELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastbert import dispatch, encoder, internals
from fastbert.internals import active_collector, func_transform
from fastbert.packing import unreadable

IMPLEMENTATION = "fastbert"
PACKABLE = (IMPLEMENTATION, "sdpa")  # attention implementations under which the packed path may stand in
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(getattr(internals, f"global{name}") for name in HOOKS)
_CAPTURE = "transformers.utils.output_capturing"  # whose hooks do nothing but in a call that is `recording`
_HARMLESS_HOOKS = (_CAPTURE, "torch.distributed")
_REQUIRE_GRADS = "make_inputs_require_grad"  # transformers' and PEFT's hook on the word embeddings, for checkpointing


def foreign_hook(module: nn.Module) -> str | None:
    """The name of a hook on the module that somebody put there to look or to change something, if any.

    Transformers' own capture of outputs and FSDP's hooks do not count.
    """
    for hooks in HOOKS:
        for hook in getattr(module, hooks).values():
            harmless = (getattr(hook, "__module__", None) or "").startswith(_HARMLESS_HOOKS)
            if not harmless and not getattr(hook, "__name__", "").startswith(_REQUIRE_GRADS):
                return getattr(hook, "__qualname__", type(hook).__qualname__)
    return None


def bypass_reason(module: nn.Module, name: str) -> str | None:
    """Why a swapped module has to be called itself, or None if what it does may be done past its call.

    name: what to call it in the reason. More speaks against going past a module than against what `foreign_hook` is
    about, a part or a layer that is called as ever: a class on top of ours, and every hook but those that transformers
    captures outputs with.
    """
    cls = type(module)
    if "stock" not in vars(cls):  # none of `swapped`'s classes, or one on top of them
        return f"{name} is a {cls.__qualname__} of {cls.__module__}"
    for hooks in HOOKS:
        for hook in getattr(module, hooks).values():
            if getattr(hook, "__module__", None) != _CAPTURE:
                return f"a hook ({getattr(hook, '__qualname__', type(hook).__qualname__)}) sits on {name}"
    return f"the forward of {name} is replaced" if "forward" in vars(module) else None


def replaced_method(cls: type, name: str = "forward") -> str | None:
    """The reason that lies in a method of a stock class, if somebody has put another one in its place.

    The class's own come from its Python module or, as decorators do, from transformers.
    """
    method = getattr(cls, name, None)
    home = getattr(method, "__globals__", {}).get("__name__", "")  # functools.wraps leaves it, unlike __module__
    if method is None or home == cls.__module__ or home.startswith("transformers."):
        return None
    return f"{cls.__qualname__}.{name} is replaced"


class Resolved:
    """The parts of one module as they were last found, with the reason against the fast path that lies in them.

    paths: of the parts, below the module. check: gives that reason, from the parts by path. methods: what the fast path
    stands in for besides the parts' forwards: the path of a part, "" for the module itself, and the name of its method.
    `current` tells in a few microseconds whether everything still is what it was. weights: where those of the parts
    are, if nothing speaks against the fast path; `misfit` looks at their shapes. Nothing here leads to the module
    itself, which holds this: a cycle would keep its weights in memory after `del model`.
    """

    weights: Weights

    def __init__(
        self,
        module: nn.Module,
        paths: tuple[str, ...],
        check: Callable[[dict[str, nn.Module]], str | None],
        methods: tuple[tuple[str, str], ...] = (),
    ) -> None:
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
        self.known: tuple[list[torch.Size], str | None] | None = None  # the last shapes, and what `misfit` said
        found = list(parts)
        parents = [parts[path.rpartition(".")[0]] if "." in path else module for path in found]
        self.root = module._modules
        self.parts = parts
        self.modules = tuple(parts.values())
        self.types = tuple(map(type, self.modules))
        self.hooks = [*_GLOBAL_HOOKS, *(getattr(part, name) for part in self.modules for name in HOOKS)]
        self.hook_ids = tuple(chain.from_iterable(self.hooks))
        owned = [(part, "forward") for part in self.modules]
        owned += [(parts[path], name) for path, name in methods if path in parts]
        self.instances = [vars(part) for part, _ in owned]
        self.methods = [name for _, name in owned]
        self.own_methods = [name for path, name in methods if not path]
        self.replaced = self._replaced(module)
        functions = [(type(part), name) for part, name in owned]
        functions += [(module.stock, name) for name in self.own_methods]
        self.functions = dict.fromkeys(its for its in ((module.stock, "forward"), *functions) if hasattr(*its))
        self.reason = self.missing or self._common() or check(parts)
        for its, name in self.functions:
            self.reason = self.reason or replaced_method(its, name)
        if torch.compiler.is_compiling():  # then nobody asks whether it is current
            return
        self.watched = [(its._modules, path.rpartition(".")[2]) for its, path in zip(parents, found, strict=True)]
        attributes = [(its, name) for its, name in self.attributes(module) if name in vars(its)]
        self.watched += [(vars(its), name) for its, name in attributes if its is not module]
        self.own = [name for its, name in attributes if its is module]
        self.own_values = [vars(module)[name] for name in self.own]
        self.dicts, self.names = zip(*self.watched, *_definitions(self.functions), strict=True)
        self.values = tuple(map(operator.getitem, self.dicts, self.names))

    def attributes(self, module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        """The attributes on which the reason depends, each with a module that may have it."""
        yield from ()

    def current(self, module: nn.Module) -> bool:
        """Whether the parts of `module` are still these. Also False for a replica that shares them."""
        try:
            return (
                module._modules is self.root
                and tuple(map(operator.getitem, self.dicts, self.names)) == self.values
                and tuple(map(type, self.modules)) == self.types
                and (tuple(chain.from_iterable(self.hooks)) == self.hook_ids if any(self.hooks) else not self.hook_ids)
                and self._replaced(module) == self.replaced
                and list(map(vars(module).__getitem__, self.own)) == self.own_values
            )
        except KeyError:
            return False

    def _replaced(self, module: nn.Module) -> tuple[bool, ...]:
        """Which of the methods an object has of its own, in place of its class's."""
        return (
            *map(operator.contains, self.instances, self.methods),
            *map(vars(module).__contains__, self.own_methods),
        )

    def expected(self, shapes: list[torch.Size]) -> list[tuple[int, ...]]:
        """The shapes that the weights must have, by the sizes that some of them do have."""
        raise NotImplementedError

    def misfit(self, weights: tuple[Tensor, ...]) -> str | None:
        """The reason against the fast path that lies in the weights' shapes, if any.

        Stock takes sizes from there, too, and not from `out_features` and the like. Parameters may be replaced, or get
        other `.data`, between any two calls.
        """
        shapes = [weight.shape for weight in weights]
        known = self.known  # read once: other threads share it
        if known is None or known[0] != shapes:
            known = self.known = shapes, self._misfit(shapes)
        return known[1]

    def _misfit(self, shapes: list[torch.Size]) -> str | None:
        expected = self.expected(shapes)
        for path, name, found, wanted in zip(self.weights.paths, self.weights.names, shapes, expected, strict=True):
            if found != wanted:
                return f"{path}.{name} has shape {list(found)}, not {list(wanted)}"
            normalized = vars(self.parts[path]).get("normalized_shape", wanted)
            if normalized != wanted:
                return f"{path}.normalized_shape is {normalized}, not {wanted}"
        return None

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
        methods = [*self.methods, *self.own_methods]
        replaced = [name for name, found in zip(methods, self.replaced, strict=True) if found]
        return f"{replaced[0]} is replaced" if replaced else None


def _definitions(functions: Iterable[tuple[type, str]]) -> Iterator[tuple[Any, str]]:
    """Where methods are defined: the namespace of a class, and the name."""
    for cls, name in functions:
        yield next(vars(base) for base in cls.__mro__ if name in vars(base)), name


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


def wrong_weights(weights: tuple[Tensor, ...], x: Tensor | None = None) -> str | None:
    """Why these parameters, with an input x, cannot be handed to the kernels, or None."""
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
    # What the environment forces runs, or raises the reason why it cannot.
    if first.dtype not in DTYPES.get(device, (first.dtype,)) and not dispatch.forced():
        return f"no kernels for {first.dtype} on {device}"
    if x is not None and x.dtype is not first.dtype and not torch.is_autocast_enabled(device):
        return f"hidden_states are {x.dtype}, the weights {first.dtype}"
    return None


def wrong_settings(settings: Iterable[Any], what: str) -> str | None:
    """Why these numbers (``what`` names them), which kernels take as they are, cannot be handed to them, or None."""
    return f"{what} is a tensor" if any(isinstance(value, Tensor) for value in settings) else None


def sharded(weights: tuple[Tensor, ...] | None) -> bool:
    """Whether these weights lie in pieces. FSDP leaves them so between calls: what they are, a call has to tell."""
    return any(type(weight).__name__ == "DTensor" for weight in weights or ())


class Weights(NamedTuple):
    """Where to read the weights of some parts anew at each call. paths, names: of each one's module, and in it."""

    paths: tuple[str, ...]
    names: tuple[str, ...]
    dicts: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, parts: dict[str, nn.Module], *where: tuple[str, str]) -> Weights:
        """where: path and name of each."""
        paths, names = zip(*where, strict=True)
        return cls(paths, names, tuple(parts[path]._parameters for path in paths))

    def read(self) -> tuple[Tensor, ...] | None:
        try:
            return tuple(map(operator.getitem, self.dicts, self.names))
        except KeyError:
            return None


class ResolvedLayer(Resolved):
    """The parts of a transformer layer. home: the Python module that its containers' classes come from."""

    def __init__(self, module: nn.Module, names: encoder.LayerNames, home: str) -> None:
        paths = {names.query: nn.Linear, names.key: nn.Linear, names.value: nn.Linear}
        paths |= {names.attention_out: nn.Linear, names.up: nn.Linear, names.down: nn.Linear}
        paths |= {names.attention_norm: nn.LayerNorm, names.norm: nn.LayerNorm}
        paths |= {names.attention_dropout: nn.Dropout, names.down_dropout: nn.Dropout}
        if names.attention_out_dropout is not None:
            paths[names.attention_out_dropout] = nn.Dropout
        activation_owner, _, activation_name = names.activation.rpartition(".")
        optional = (names.activation,) if activation_name in module.get_submodule(activation_owner)._modules else ()

        def check(parts: dict[str, nn.Module]) -> str | None:
            plain = {path: part for path, part in parts.items() if path != names.activation}
            return wrong_type(plain, paths, home) or self._check(module, names, parts)

        self.layer_names = names
        owner, _, method = names.feed_forward.rpartition(".")
        super().__init__(module, (*paths, *optional), check, ((owner, method),))
        if self.reason is not None:
            return
        parts = self.parts
        weighted = [getattr(names, name) for name in encoder.WEIGHTED]
        self.weights = Weights.of(parts, *product(weighted, ("weight", "bias")))
        self.norms = parts[names.attention_norm], parts[names.norm]
        self.attention = parts[names.query.rpartition(".")[0]]
        self.chunked = parts[owner] if owner else None
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
        self.head_dim = attention.attention_head_size
        return None

    def expected(self, shapes: list[torch.Size]) -> list[tuple[int, ...]]:
        inner, hidden, wide = shapes[0][0], shapes[8][0], shapes[10][0]
        norm: list[tuple[int, ...]] = [(hidden,), (hidden,)]
        found: list[tuple[int, ...]] = [(inner, hidden), (inner,)] * 3
        found += [(hidden, inner), (hidden,), *norm, (wide, hidden), (wide,), (hidden, wide), (hidden,), *norm]
        return found

    def _misfit(self, shapes: list[torch.Size]) -> str | None:
        inner = shapes[0][0]
        if not inner or inner % self.head_dim:
            return f"query, key and value have width {inner}, not {self.head_dim} times the number of heads"
        return super()._misfit(shapes)

    def attributes(self, module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        yield from ((module, name) for name in ("is_decoder", "add_cross_attention"))
        names = self.layer_names
        activation_owner, _, activation_name = names.activation.rpartition(".")
        looked_at = {
            names.query.rpartition(".")[0]: ("is_causal", "attention_head_size"),
            activation_owner: (activation_name,),
            names.activation: ("approximate",),
            names.attention_norm: ("normalized_shape",),
            names.norm: ("normalized_shape",),
        }
        for path, attributes in looked_at.items():
            yield from ((self.parts[path], name) for name in attributes if path in self.parts)

    def chunking(self, module: nn.Module) -> nn.Module:
        """What `chunk_size_feed_forward` is an attribute of: the layer itself, or its feed-forward part."""
        return module if self.chunked is None else self.chunked

    def settings_from(self, module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        """The attributes on which `settings` depends."""
        yield from ((norm, "eps") for norm in self.norms)
        yield self.attention, "scaling"
        yield self.attention, "training"
        yield self.attention_dropout, "p"
        for dropout in (self.hidden_dropout, self.ffn_dropout):
            if dropout is not None:
                yield from ((dropout, name) for name in ("p", "training"))
        if "chunk_size_feed_forward" in vars(self.chunking(module)):
            yield self.chunking(module), "chunk_size_feed_forward"

    def settings(self, weights: tuple[Tensor, ...]) -> encoder.LayerSettings:
        """What the packed layer needs besides its weights, read anew at each call."""
        hidden, ffn = self.hidden_dropout, self.ffn_dropout
        norm1, norm2 = self.norms
        return encoder.LayerSettings(
            heads=weights[0].shape[0] // self.head_dim,
            scale=self.attention.scaling,
            eps1=norm1.eps,
            eps2=norm2.eps,
            attention_dropout=self.attention_dropout.p if self.attention.training else 0.0,
            hidden_dropout=hidden.p if hidden is not None and hidden.training else 0.0,
            ffn_dropout=ffn.p if ffn.training else 0.0,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )


class ResolvedStack:
    """The layers of an encoder as they were last found, to be looked at in one go.

    layers: each with `resolve` and ready for the fast path. settings: theirs, if they share them.
    """

    def __init__(self, layers: nn.ModuleList, settings: encoder.LayerSettings | None = None) -> None:
        resolved = [layer.resolve() for layer in layers]
        self.settings = settings
        self.layers = tuple(layers)
        self.roots = tuple(layer._modules for layer in layers)
        self.modules = (*layers, *(part for its in resolved for part in its.modules))
        self.types = tuple(map(type, self.modules))
        owned = [(vars(layer), name) for layer, its in zip(layers, resolved, strict=True) for name in its.own_methods]
        owned += [(vars(layer), "forward") for layer in layers]
        self.instances = [*(instance for instance, _ in owned), *(one for its in resolved for one in its.instances)]
        self.methods = [*(name for _, name in owned), *(name for its in resolved for name in its.methods)]
        self.hooks = [*_GLOBAL_HOOKS, *(getattr(module, name) for module in self.modules for name in HOOKS)]
        self.hook_ids = tuple(chain.from_iterable(self.hooks))
        watched = list(_definitions(dict.fromkeys(function for its in resolved for function in its.functions)))
        for layer, its in zip(layers, resolved, strict=True):
            watched += its.watched
            watched += ((vars(layer), name) for name in its.own)
            watched += ((vars(module), name) for module, name in its.settings_from(layer))
        self.dicts, self.names = zip(*watched, strict=True)
        self.values = tuple(map(operator.getitem, self.dicts, self.names))
        self.parameter_dicts = [parameters for its in resolved for parameters in its.weights.dicts]
        self.parameter_names = [name for its in resolved for name in its.weights.names]
        self.parameters: tuple[Tensor, ...] = tuple(map(operator.getitem, self.parameter_dicts, self.parameter_names))
        self.shapes = [parameter.shape for parameter in self.parameters]

    def fits(self, x: Tensor) -> bool:
        """Whether layers of these shapes may take the states x one after another."""
        return wrong_weights(self.parameters, x) is None and [weight.shape for weight in self.parameters] == self.shapes

    def current(self, layers: nn.ModuleList) -> bool:
        """Whether everything is what it was, `parameters` among it."""
        try:
            if (
                tuple(layers._modules.values()) == self.layers
                and all(map(operator.is_, map(operator.attrgetter("_modules"), layers), self.roots))
                and tuple(map(operator.getitem, self.dicts, self.names)) == self.values
                and tuple(map(type, self.modules)) == self.types
                and (tuple(chain.from_iterable(self.hooks)) == self.hook_ids if any(self.hooks) else not self.hook_ids)
                and not any(map(operator.contains, self.instances, self.methods))
            ):
                found: tuple[Any, ...] = tuple(map(operator.getitem, self.parameter_dicts, self.parameter_names))
                # The first is a query's; the op holds all other shapes against it, or `fits` does.
                return all(map(operator.is_, found, self.parameters)) and found[0].shape == self.shapes[0]
        except KeyError:
            pass
        return False


_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")


class ResolvedEmbeddings(Resolved):
    """The parts of an embeddings module."""

    def __init__(self, module: nn.Module) -> None:
        paths: dict[str, type] = dict.fromkeys(_TABLES, nn.Embedding)
        paths |= {"LayerNorm": nn.LayerNorm, "dropout": nn.Dropout}

        def check(parts: dict[str, nn.Module]) -> str | None:
            reason = wrong_type(parts, paths, "")
            if reason is not None:
                return reason
            for path in _TABLES:
                table = parts[path]
                if table.max_norm is not None or table.sparse or table.scale_grad_by_freq:
                    return f"{path} uses max_norm, sparse or scale_grad_by_freq"
            return None

        super().__init__(module, tuple(paths), check)
        if self.reason is None:
            tables = [(path, "weight") for path in _TABLES]
            self.weights = Weights.of(self.parts, *tables, ("LayerNorm", "weight"), ("LayerNorm", "bias"))
            hooks = self.parts["word_embeddings"]._forward_hooks.values()
            self.requires_grad = any(getattr(hook, "__name__", "").startswith(_REQUIRE_GRADS) for hook in hooks)

    def attributes(self, module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        tables = [self.parts[path] for path in _TABLES if path in self.parts]
        yield from ((table, name) for table in tables for name in ("max_norm", "sparse", "scale_grad_by_freq"))
        if "LayerNorm" in self.parts:
            yield self.parts["LayerNorm"], "normalized_shape"

    def expected(self, shapes: list[torch.Size]) -> list[tuple[int, ...]]:
        hidden = shapes[3][0]
        return [*((table[0], hidden) for table in shapes[:3]), (hidden,), (hidden,)]


def plain_buffers(module: Any) -> bool:
    """Whether embeddings' buffers, which stock takes for ids that nobody gives, hold positions 0, 1, ... and type 0.

    Looks at their numbers at each call on the CPU. Elsewhere the host would have to wait for them: there only when they
    are others or PyTorch has counted a write to them, which it does not through `.data`.
    """
    positions, types = map(module._buffers.get, ("position_ids", "token_type_ids"))
    if positions is None or types is None or torch.compiler.is_compiling():
        return False
    known = module._fastbert.buffers
    if known is not None and positions is known[0] and types is known[1]:
        if positions.is_cpu:
            return _equal(positions, known[4]) and _equal(types, known[5])
        if version(positions) == known[2] and version(types) == known[3]:
            return True
    if unreadable(positions) or unreadable(types):
        return False
    versions = version(positions), version(types)
    counted = torch.arange(positions.shape[-1], dtype=positions.dtype, device=positions.device).expand_as(positions)
    zeros = torch.zeros_like(types)
    if not (_equal(positions, counted) and _equal(types, zeros)):
        return False
    module._fastbert.buffers = positions, types, *versions, counted, zeros
    return True


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same. False under FakeTensorMode, where nobody can tell."""
    try:
        return torch.equal(a, b)
    except RuntimeError:
        return False


def version(tensor: Tensor) -> int | None:
    """The number of writes to a tensor, or None for one of inference mode, whose writes are not counted."""
    try:
        return tensor._version
    except RuntimeError:
        return None


def captured(what: str | None = None) -> bool:
    """Whether transformers is recording "hidden_states", "attentions" or anything in the call that runs now."""
    collected = active_collector.get()
    return collected is not None and (what is None or what in collected)


def recording(config: Any) -> bool:
    """Whether outputs of single modules are recorded in the call that begins now, or by somebody around it."""
    return config.output_hidden_states or config.output_attentions or captured()


def is_stock_attention(implementation: str | None) -> bool:
    """Whether an attention implementation is transformers' own: somebody else's may compute something else."""
    if implementation in (None, "eager"):
        return True
    function = ALL_ATTENTION_FUNCTIONS.get(implementation)
    return (getattr(getattr(function, "func", function), "__module__", None) or "").startswith("transformers.")


def call_reason(config: Any, kwargs: dict[str, Any]) -> str | None:
    """Why the call that runs now has to take the stock forward, or None."""
    implementation = None if config is None else config._attn_implementation
    if config is not None and implementation not in PACKABLE:
        return f"the attention implementation was set to {implementation!r}"
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward:
        return "another function was registered for the attention implementation 'sdpa'"
    if kwargs.get("output_attentions") or captured("attentions"):
        return "attentions were asked for"
    if kwargs.get("past_key_values") is not None or kwargs.get("encoder_hidden_states") is not None:
        return "a cache or cross-attention is in use"
    if kwargs.get("is_causal"):
        return "causal attention was asked for"
    if torch.compiler.is_compiling():
        return "the model is being exported to ONNX" if torch.onnx.is_in_onnx_export() else None
    if torch.jit.is_tracing():
        return "torch.jit.trace is running"
    if internals.forward_mode():
        return "forward-mode differentiation is running"
    if func_transform() is not None:
        return "a torch.func transform is running"
    return None
