"""A field of a model's output that is computed when it is first read: the logits of a masked language model."""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import ModelOutput

from fastbert import guards, packing


def logits_later(field: str, hidden: Tensor, weights: tuple[Tensor, ...], eps: float) -> Deferred:
    """What computes the logits of hidden states [B, S, H] later, as they would have been computed now.

    field: their name. weights: those of `ops.mlm_loss`, as the modules hold them now. They are kept as views, which go
    on to show the same memory after `parameter.data = ...` or `model.to(...)`, and lead to the parameters' gradients.
    Reading them raises RuntimeError if the numbers that it needs have been overwritten since, as far as PyTorch's
    count of writes and `sample` can tell.
    """
    grad = torch.is_grad_enabled()
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device)
    views = [weight.view_as(weight) for weight in weights]

    def state() -> list[tuple[int | None, int]]:
        return [(guards.version(tensor), tensor.untyped_storage().nbytes()) for tensor in (hidden, *views)]

    before = state()
    numbers = sample(hidden, views)

    def compute() -> Tensor:
        if state() != before or not _same(numbers, hidden, views):
            raise RuntimeError(
                f"{field} are computed when first read, and the weights or the hidden states have been overwritten "
                "since the forward; read them before optimizer.step()"
            )
        dense, dense_bias, norm, norm_bias, decoder, decoder_bias = views
        with torch.set_grad_enabled(grad), torch.autocast(device, dtype, enabled=autocast):
            x = F.gelu(F.linear(hidden, dense, dense_bias))
            return F.linear(F.layer_norm(x, norm.shape, norm, norm_bias, eps), decoder, decoder_bias)

    return Deferred(compute, lambda: _Linked.apply(hidden.new_empty(0), hidden, *views))


SAMPLED = 16  # rows of a matrix at equal distances, besides the last one


def sample(hidden: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A copy of numbers that show whether these were overwritten: some rows of the states and matrices, all vectors.

    Fused optimizers, and whatever writes through `.data`, leave PyTorch's count of writes as it was.
    """
    dense, dense_bias, norm, norm_bias, decoder, decoder_bias = weights
    rows = []
    with torch.no_grad():
        for matrix in (hidden.flatten(0, -2), dense, decoder):
            rows += [matrix[:: -(-matrix.shape[0] // SAMPLED) or 1], matrix[-1:]]
        rows.append(torch.stack((dense_bias, norm, norm_bias)))
        return torch.cat(rows), decoder_bias.clone()


def _same(before: tuple[Tensor, Tensor], hidden: Tensor, weights: list[Tensor]) -> bool:
    """Whether `sample` still gives these numbers, bit by bit, where they can be read."""
    return packing.unreadable(before[0]) or all(
        torch.equal(old.view(torch.uint8), new.view(torch.uint8))
        for old, new in zip(before, sample(hidden, weights), strict=True)
    )


class _Linked(torch.autograd.Function):
    """A copy of x, whose backward also goes through the graphs of others, without a gradient for them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.others = len(others)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (grad, *[None] * ctx.others)


class Deferred(NamedTuple):
    """A field that is not computed yet. It takes the field's place while somebody rebuilds the output around it.

    stand_in: makes an empty tensor that depends on what the field will depend on. link: one that somebody has put
    between the output and his caller; the field will depend on it, as it would if it had been put there itself.
    """

    compute: Callable[[], Tensor]
    stand_in: Callable[[], Tensor]
    link: Tensor | None = None

    def value(self) -> Tensor:
        value = self.compute()
        if self.link is None or not value.requires_grad:
            return value
        with torch.enable_grad():
            linked: Tensor = _Linked.apply(value, self.link)
        return linked

    def as_float(self) -> Deferred:
        return self._replace(compute=lambda: self.compute().float())

    def with_link(self) -> Deferred:
        return self._replace(link=self.stand_in())


# Who passes all fields on at every training step without a look at them, and what he gets for one not computed yet.
_PASS_ON: dict[str, Callable[[Deferred], Deferred]] = {
    "convert_to_fp32": Deferred.as_float,  # accelerate's mixed precision, which makes every output float32
    "_find_tensors": Deferred.with_link,  # DDP, which looks for the parameters that take part
    "_tree_flatten_with_rref": Deferred.with_link,  # DDP, which puts a node of its own between output and loss
}
_ON_THE_WAY = {  # the modules through which they read
    "accelerate.utils.operations",
    "torch.nn.parallel.distributed",
    "torch.utils._pytree",
    "transformers.utils.generic",
    __name__,
}


def _handed(deferred: Deferred) -> Deferred | None:
    """What the reader of the fields gets for this one, if he is one of `_PASS_ON`; None for all others."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") in _ON_THE_WAY:
        hand = _PASS_ON.get(frame.f_code.co_name)
        if hand is not None:
            return hand(deferred)
        frame = frame.f_back
    return None


class LazyField(OrderedDict[str, Any]):
    """Mixin for a ModelOutput: one field, named `lazy`, is computed when it is first read, in whatever way."""

    lazy: str

    def defer(self, deferred: Deferred) -> None:
        """Let the field's value be made later."""
        self.__dict__["_deferred"] = deferred
        names = list(self.__dataclass_fields__)
        OrderedDict.__setitem__(self, self.lazy, None)
        for name in names[names.index(self.lazy) + 1 :]:
            if name in self.keys():
                self.move_to_end(name)

    def _compute_now(self) -> None:
        deferred = self.__dict__.get("_deferred")
        if deferred is not None:
            self[self.lazy] = deferred.value()

    def _get(self) -> Any:
        self._compute_now()
        return self.__dict__.get(self.lazy)

    def _set(self, value: Any) -> None:
        self.__dict__.pop("_deferred", None)
        if isinstance(value, Deferred):
            self.__dict__["_deferred"] = value
            value = None
        self.__dict__[self.lazy] = value

    def __getitem__(self, key: Any) -> Any:
        if key == 0 or (isinstance(key, str) and key != self.lazy):
            return OrderedDict.__getitem__(self, next(iter(self)) if key == 0 else key)
        self._compute_now()
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self.keys() else default

    def items(self) -> Any:
        passed_on = self._passed_on()
        return super().items() if passed_on is None else passed_on.items()

    def values(self) -> Any:
        passed_on = self._passed_on()
        return super().values() if passed_on is None else passed_on.values()

    def _passed_on(self) -> OrderedDict[str, Any] | None:
        """The fields for those who pass them on without a look; for all others None, and the field is computed."""
        deferred = self.__dict__.get("_deferred")
        handed = None if deferred is None else _handed(deferred)
        if handed is None:
            self._compute_now()
            return None
        return OrderedDict((k, handed if k == self.lazy else OrderedDict.__getitem__(self, k)) for k in self.keys())

    def copy(self) -> Any:
        self._compute_now()
        return super().copy()

    def __reduce__(self) -> tuple[Any, ...]:
        stock = type(self).__mro__[2]
        return stock, tuple(getattr(self, name) for name in stock.__dataclass_fields__)


@functools.cache
def _lazy_class(stock: type[ModelOutput], field: str) -> Any:
    members = {"__module__": __name__, "lazy": field, field: property(LazyField._get, LazyField._set)}
    return dataclass(type(stock.__name__, (LazyField, stock), members))


def lazy_output(stock: type[ModelOutput], field: str, value: Deferred, loss: Tensor, *rest: Any) -> Any:
    """An output of type `stock` whose second field, `field`, has this value, which is computed when it is first read.

    rest: the values of the fields that follow it.
    """
    names = list(stock.__dataclass_fields__)
    outputs = _lazy_class(stock, field)(loss=loss, **dict(zip(names[2:], rest, strict=True)))
    outputs.defer(value)
    return outputs
