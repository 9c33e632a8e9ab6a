"""Registers what PyTorch needs to know of a C++ op besides its kernel: shapes for tracing, and the backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.nn import Parameter

from fastbert import dispatch

# Below autograd an op costs a few microseconds less. Only for calls that need no gradient, and not while compiling.
below_autograd = torch._C._AutoDispatchBelowAutograd


def register(
    op: str,
    *,
    forward_fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    backward_fake: Callable[..., Any] | None = None,
) -> None:
    """Register fake kernels and autograd for `fastbert::<op>_fwd_cpu` and, if it has a fake, `<op>_bwd_cpu`."""
    name = f"fastbert::{op}_fwd_cpu"
    torch.library.register_fake(name, _guarded(op, forward_fake))
    torch.library.register_autograd(name, backward, setup_context=setup_context)
    if backward_fake is None:
        return

    def second_order(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(second_order_message(op))

    name = f"fastbert::{op}_bwd_cpu"
    torch.library.register_fake(name, _guarded(op, backward_fake))
    torch.library.register_autograd(name, second_order)


def _guarded(op: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch calls a fake kernel for real tensors too if one of them is on the meta device. Its answer would then be
    memory that nobody wrote.
    """

    @functools.wraps(fake)
    def checked(*args: Any) -> Any:
        tensors = [arg for arg in pytree.tree_leaves(args) if isinstance(arg, Tensor)]
        if any(type(value) in (Tensor, Parameter) and not value.is_meta for value in tensors):
            raise RuntimeError(f"{op}: some tensors are on the meta device and others are not; they must agree")
        return fake(*args)

    return checked


def second_order_message(op: str) -> str:
    return f'{op}: the cpu backend has no second-order gradients; use backend="reference" for them'


def direct(x: Tensor, backend: str | None) -> bool:
    """Whether an op may call its C++ op at once and leave the checks to it: the path of inference, where a microsecond
    an op counts. If the C++ op refuses, the op goes its full way: argument checks, and the choice of implementation.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and backend is None
        and x.is_cpu
        and not torch.is_autocast_enabled("cpu")
        and not dispatch.forced()
    )


def unsaved_message(op: str) -> str:
    return f"{op}: this call was made without saving what the backward needs"


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record a call with these arguments."""
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)
