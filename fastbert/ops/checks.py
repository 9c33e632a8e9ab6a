"""Argument checks that the ops share. Each error names the argument, what was given and what is allowed."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from fastbert.internals import tracing

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(op: str, name: str, value: object) -> Tensor:
    """Raises TypeError if an argument is no tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    return value


def floating(op: str, name: str, value: object) -> Tensor:
    """Raises TypeError if an argument is no tensor of one of FLOAT_DTYPES."""
    value = tensor(op, name, value)
    if value.dtype not in FLOAT_DTYPES:
        allowed = ", ".join(str(dtype) for dtype in FLOAT_DTYPES)
        raise TypeError(f"{op}: {name} must have one of the dtypes {allowed}; got {value.dtype}")
    return value


def operand(op: str, name: str, value: object, like: Tensor, like_name: str, *, same_dtype: bool = True) -> Tensor:
    """A floating point tensor on the device (and by default in the dtype) of another argument, or ValueError for the
    device and TypeError for the rest.
    """
    value = floating(op, name, value)
    if value.device != like.device:
        raise ValueError(f"{op}: {name} is on {value.device} but {like_name} is on {like.device}; they must agree")
    if same_dtype and value.dtype != like.dtype:
        raise TypeError(f"{op}: {name} is {value.dtype} but {like_name} is {like.dtype}; they must agree")
    return value


def shape(op: str, name: str, value: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Raises ValueError unless a tensor has this shape. meaning: the same in words, "[hidden]"."""
    if tuple(value.shape) != expected:
        raise ValueError(f"{op}: {name} must have shape {meaning} = {list(expected)}, got {list(value.shape)}")


def number(op: str, name: str, value: object) -> float:
    """An argument as a float. Raises TypeError if it is no number, which neither a string nor a tensor is: a tensor's
    gradient would be lost, and reading it would wait.
    """
    if type(value) is float:
        return value
    if not isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    return value if torch.compiler.is_compiling() else float(value)  # type: ignore[return-value]


def finite(op: str, name: str, value: object, *, negative: bool = True) -> float:
    """An argument as a float. Raises TypeError if it is no number, ValueError unless it is finite and, without
    `negative`, at least 0. Of compiled code only the type is asked: a comparison would become a guard.
    """
    value = number(op, name, value)
    if not torch.compiler.is_compiling() and not (math.isfinite(value) and (negative or value >= 0.0)):
        raise ValueError(f"{op}: {name} must be finite{'' if negative else ' and not negative'}, got {value}")
    return value


def integer(op: str, name: str, value: object) -> int:
    """An argument as an int. Raises TypeError if it is none, which neither 1.0 nor a tensor is, but for the sizes that
    torch.jit.trace makes tensors of.
    """
    if type(value) is int:
        return value
    if isinstance(value, torch.SymInt) or (isinstance(value, Tensor) and tracing() is not None):
        return value  # type: ignore[return-value]
    if not isinstance(value, numbers.Integral):
        raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}")
    return int(value)


def probability(op: str, name: str, value: float) -> float:
    """Raises ValueError unless an argument lies in [0, 1], which NaN does not."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{op}: {name} must be between 0 and 1, got {value}")
    return value


def seed(op: str, value: object, like: Tensor) -> None:
    """Raises unless the argument `seed` is one int64 on the device of `like`: TypeError if it is no tensor, else
    ValueError.
    """
    value = tensor(op, "seed", value)
    if value.dtype != torch.int64 or value.numel() != 1:
        raise ValueError(
            f"{op}: seed must be an int64 tensor of one element, got {value.dtype} of shape {list(value.shape)}"
        )
    if value.device != like.device:
        raise ValueError(f"{op}: seed is on {value.device} but the input is on {like.device}; they must agree")


def integer_ids(op: str, name: str, value: object, device: torch.device) -> Tensor:
    """Raises TypeError if an argument is no int64 or int32 tensor, ValueError if it is not on the weights' device."""
    value = tensor(op, name, value)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: {name} must be torch.int64 or torch.int32, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{op}: {name} is on {value.device} but the weights are on {device}; they must agree")
    return value


def in_range(op: str, name: str, value: Tensor, limit: int, what: str) -> None:
    """Raises IndexError if an id lies outside [0, limit). Reads the data: not for compiled code."""
    if value.numel() == 0 or value.is_meta:
        return
    low, high = (int(bound) for bound in torch.aminmax(value))
    if low < 0 or high >= limit:
        raise IndexError(f"{op}: {name} has values from {low} to {high}, but {what} has only rows 0 to {limit - 1}")


def autocasting(value: Tensor) -> bool:
    """Whether autocast is on for the device of a tensor (the meta device has none, and raises when asked)."""
    return value.device.type != "meta" and torch.is_autocast_enabled(value.device.type)


def autocast(value: Tensor) -> Tensor:
    """Cast as autocast casts the input of a matrix product: float64 and integers stay."""
    if value.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return value.to(torch.get_autocast_dtype(value.device.type))
    return value
