"""A field of a model's output that is computed when it is first read: the logits of a masked language model."""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import ModelOutput

from fastbert import guards, packing


def logits_later(field: str, hidden: Tensor, weights: tuple[Tensor, ...], eps: float) -> Callable[[], Tensor]:
    """What computes the logits of hidden states [B, S, H] later, as they would have been computed now.

    field: their name. weights: those of `ops.mlm_loss`, as the modules hold them now. They are kept as views, which go
    on to show the same memory after `parameter.data = ...` or `model.to(...)`, and lead to the parameters' gradients.
    What is returned raises RuntimeError if the numbers that it needs have been overwritten since, as far as PyTorch's
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

    return compute


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


class Deferred(NamedTuple):
    """What stands for a field that is not computed yet, while accelerate rebuilds the output around it."""

    compute: Callable[[], Tensor]

    def as_float(self) -> Tensor:
        return self.compute().float()


def _is_converted_to_fp32() -> bool:
    """Whether the items are being read by accelerate's mixed precision, which makes every output float32.

    It would compute the logits of every training step, although nobody has asked for them.
    """
    caller = sys._getframe(2)
    return caller.f_code.co_name == "recursively_apply" and (
        caller.f_back is not None and caller.f_back.f_code.co_name == "convert_to_fp32"
    )


class LazyField(OrderedDict[str, Any]):
    """Mixin for a ModelOutput: one field, named `lazy`, is computed when it is first read, in whatever way."""

    lazy: str

    def defer(self, compute: Callable[[], Tensor]) -> None:
        """Let `compute` make the field's value later."""
        self.__dict__["_compute"] = compute
        names = list(self.__dataclass_fields__)
        OrderedDict.__setitem__(self, self.lazy, None)
        for name in names[names.index(self.lazy) + 1 :]:
            if name in self.keys():
                self.move_to_end(name)

    def _compute_now(self) -> None:
        compute = self.__dict__.get("_compute")
        if compute is not None:
            self[self.lazy] = compute()

    def _get(self) -> Any:
        self._compute_now()
        return self.__dict__.get(self.lazy)

    def _set(self, value: Any) -> None:
        self.__dict__.pop("_compute", None)
        if isinstance(value, Deferred):
            self.__dict__["_compute"] = value.as_float
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
        compute = self.__dict__.get("_compute")
        if compute is not None and _is_converted_to_fp32():
            return (OrderedDict(self._without_computing()) | {self.lazy: Deferred(compute)}).items()
        self._compute_now()
        return super().items()

    def _without_computing(self) -> list[tuple[str, Any]]:
        return [(name, OrderedDict.__getitem__(self, name)) for name in self.keys()]

    def values(self) -> Any:
        self._compute_now()
        return super().values()

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


def lazy_output(stock: type[ModelOutput], field: str, compute: Callable[[], Tensor], loss: Tensor, *rest: Any) -> Any:
    """An output of type `stock` whose second field, `field`, is computed when it is first read.

    rest: the values of the fields that follow it.
    """
    names = list(stock.__dataclass_fields__)
    outputs = _lazy_class(stock, field)(loss=loss, **dict(zip(names[2:], rest, strict=True)))
    outputs.defer(compute)
    return outputs
