"""Which modules are swapped in place: `optimize`, `restore`, and `enable` for every model built from now on.

A swapped module keeps its object, its parameters and its place: only its `__class__` becomes a subclass of the stock
class, with the stock class's own name and the forward of its counterpart in `swapped.py` or `models.py`.
"""

from __future__ import annotations

import atexit
import contextlib
import copyreg
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import nn
from transformers.modeling_utils import PreTrainedModel

import fastbert.implementation  # noqa: F401  (registers the attention implementation)
from fastbert import graphs
from fastbert.families import FAMILIES, ROLES, Family, role_of
from fastbert.guards import IMPLEMENTATION, is_stock_attention
from fastbert.swapped import Fast, FastDistilBertEncoder, FastEmbeddings, FastEncoder, FastLayer, State, calls

Model = TypeVar("Model", bound=nn.Module)


class FastMeta(type):
    """The type of the swapped classes, by which pickle knows them: it could not find them under their stock names."""


def rebuild(stock: type[nn.Module]) -> Any:
    """A swapped module without content, which is what unpickling begins with."""
    cls = fast_class(stock)
    return cls.__new__(cls)


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
        if hasattr(mixin, "forward_by_name"):
            names["forward"] = models.forward_of(stock)
    return FastMeta(stock.__name__, (mixin, stock), names)


copyreg.pickle(FastMeta, lambda cls: (fast_class, (cls.stock,)))  # type: ignore[return-value]


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
    if not isinstance(cuda_graphs, bool) and not (isinstance(cuda_graphs, int) and cuda_graphs >= 1):
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


def swap(model: nn.Module, *, replace: tuple[str | None, ...] | None = None) -> bool:
    """Swap what can be swapped.

    replace: the attention implementations to put ours in place of; None: those that are transformers' own.

    Returns whether anything in the model is swapped now.
    """
    found = False
    for module in model.modules():
        if not isinstance(module, Fast):
            role = role_of(module)
            cls = None if role in (None, "Model") else fast_class(type(module))
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
        implementation = config._attn_implementation
        replaceable = is_stock_attention(implementation) if replace is None else implementation in replace
        if not replaceable:
            return
        for swapped in module.modules():
            if isinstance(swapped, Fast):
                swapped._fastbert.implementation = implementation or "sdpa"
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
        state = module.__dict__.get("_fastbert")
        if (
            state is not None
            and state.implementation is not None
            and state.config._attn_implementation == IMPLEMENTATION
        ):
            state.config._attn_implementation = state.implementation
        if type(module) is fast_class(module.stock):  # a user's subclass of one stays what it is
            module.__dict__.pop("_fastbert", None)
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


def _print_calls() -> None:
    print(f"fastbert: {calls['fast']} fast layer calls, {calls['stock']} stock", flush=True)


if os.environ.get("FASTBERT_PRINT_CALLS", "0") not in ("", "0"):
    atexit.register(_print_calls)
