"""The leaf ops of a backend, and what PyTorch needs to know of them besides their kernels: shapes for tracing, and the
backward.

All backends of an op share one schema (or nearly so), so that one fake kernel and one autograd formula serve them all.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastbert import dispatch
from fastbert.internals import (
    below_autograd,
    dispatch_modes,
    forward_mode,
    func_transform,
    profiling,
    tracing,
    tree_leaves,
)

# What arguments of an op may be for its kernel to be called past PyTorch's dispatcher.
_PLAIN = {Tensor, Parameter, type(None), int, float, bool}


class Leaf:
    """The leaf ops of one backend: `fastbert::<op>_fwd_<backend>` and, where there is one, `<op>_bwd_<backend>`.

    missing: why they cannot be called, or None. function: what records a call of the forward.
    """

    __slots__ = ("backend", "backward_op", "forward_op", "function", "missing", "op")

    def __init__(self, op: str, backend: str, *, backward: bool = True) -> None:
        names = [f"{op}_fwd_{backend}"] + [f"{op}_bwd_{backend}"] * backward
        self.op, self.backend = op, backend
        self.missing = next(filter(None, map(dispatch.missing_leaf, names)), None)
        self.forward_op: Any = dispatch.leaf(names[0])
        self.backward_op: Any = dispatch.leaf(names[-1]) if backward else None
        self.function: Any = None

    def call(self, recorded: bool, *arguments: Any) -> Any:
        """The forward. recorded: whether autograd has to record the call.

        The op that is registered does for every call, and tracing wants to see it; but its way through the dispatcher
        and autograd takes longer than a kernel on a small batch, and where nobody looks there are shorter ones.
        """
        if watched():
            return self.forward_op(*arguments)
        if not recorded:
            return self.run(self.forward_op, "fwd", arguments)
        if self.function is not None and _PLAIN.issuperset(map(type, arguments)):
            return self.function.apply(*arguments)
        return self.forward_op(*arguments)

    def backward(self, *arguments: Any) -> Any:
        """The backward, called from what `register` was given for it."""
        if torch.is_grad_enabled() or watched():
            return self.backward_op(*arguments)
        return self.run(self.backward_op, "bwd", arguments)

    def run(self, op: Any, name: str, arguments: tuple[Any, ...]) -> Any:
        """One of the ops below autograd, or its kernel itself if that is a Python function."""
        if self.backend == "triton" and all(
            type(value) in _PLAIN or (type(value) is list and _PLAIN.issuperset(map(type, value)))
            for value in arguments
        ):
            return _kernel(self.op, f"{self.op}_{name}")(*arguments)
        with below_autograd():
            return op(*arguments)

    def attempt(self, *arguments: Any) -> Any:
        """The forward op below autograd, where `direct` allows it; None if it refuses these arguments."""
        try:
            with below_autograd():
                return self.forward_op(*arguments)
        except RuntimeError:
            return None


def watched() -> bool:
    """Whether somebody follows the calls of ops: torch.compile, torch.jit.trace, a dispatch mode (as for fake tensors),
    a torch.func transform or the profiler."""
    return bool(
        torch.compiler.is_compiling()  # comes first, for nothing behind it can be traced
        or dispatch_modes()
        or func_transform() is not None
        or tracing() is not None
        or profiling()
    )


def define_triton(op: str, forward: str, backward: str | None = None) -> Leaf:
    """Define the Triton leaf ops by their schemas, "(Tensor x, ...) -> (Tensor, ...)".

    Their kernels are `<op>_fwd` and `<op>_bwd` of `fastbert.kernels.<op>`, which is imported at the first call, and
    Triton with it.
    """
    for name, schema in (("fwd", forward), ("bwd", backward)):
        if schema is None:
            continue

        def run(*args: Any, _name: str = f"{op}_{name}") -> Any:
            return _kernel(op, _name)(*args)

        _library.define(f"{op}_{name}_triton{schema}")
        for key in ("CUDA", "CPU"):  # CPU: for Triton's interpreter
            _library.impl(f"{op}_{name}_triton", run, key)
    return Leaf(op, "triton", backward=backward is not None)


@functools.cache
def _kernel(op: str, name: str) -> Callable[..., Any]:
    """A function of `fastbert.kernels.<op>`, which is imported when it is first asked for."""
    return getattr(importlib.import_module(f"fastbert.kernels.{op}"), name)


_library = torch.library.Library("fastbert", "FRAGMENT")


def register(
    leaf: Leaf,
    *,
    forward_fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    backward_fake: Callable[..., Any] | None = None,
) -> None:
    """Register fake kernels and autograd for a backend's ops, if they are there.

    backward: called as backward(leaf, ctx, *grads).
    """
    if leaf.missing is not None:
        return
    name = f"fastbert::{leaf.op}_fwd_{leaf.backend}"
    torch.library.register_fake(name, _guarded(leaf.op, forward_fake))
    torch.library.register_autograd(name, functools.partial(backward, leaf), setup_context=setup_context)
    leaf.function = _function(leaf, setup_context, backward)
    if backward_fake is None:
        return

    def second_order(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(second_order_message(leaf))

    name = f"fastbert::{leaf.op}_bwd_{leaf.backend}"
    torch.library.register_fake(name, _guarded(leaf.op, backward_fake))
    torch.library.register_autograd(name, second_order)


def _function(leaf: Leaf, setup_context: Callable[..., None], backward: Callable[..., Any]) -> type:
    """An autograd.Function that does what is registered for a forward op, for arguments that are no lists."""

    def run_forward(ctx: Any, *arguments: Any) -> Any:
        output = leaf.run(leaf.forward_op, "fwd", arguments)
        setup_context(ctx, arguments, output)
        return output

    def run_backward(ctx: Any, *gradients: Any) -> Any:
        return backward(leaf, ctx, *gradients)

    members = {"forward": staticmethod(run_forward), "backward": staticmethod(run_backward)}
    return type(f"fastbert_{leaf.op}_{leaf.backend}_", (torch.autograd.Function,), members)


def _guarded(op: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch calls a fake kernel for real tensors too if one of them is on the meta device. Its answer would then be
    memory that nobody wrote.
    """

    @functools.wraps(fake)
    def checked(*args: Any) -> Any:
        tensors = [arg for arg in tree_leaves(args) if isinstance(arg, Tensor)]
        if any(type(value) in (Tensor, Parameter) and not value.is_meta for value in tensors):
            raise RuntimeError(f"{op}: some tensors are on the meta device and others are not; they must agree")
        return fake(*args)

    return checked


def second_order_message(leaf: Leaf) -> str:
    return f'{leaf.op}: the {leaf.backend} backend has no second-order gradients; use backend="reference" for them'


def direct(kernels: Leaf, x: Tensor, backend: str | None) -> bool:
    """Whether an op may call its C++ op at once and leave the checks to it: the path of inference, where a microsecond
    an op counts. If the C++ op refuses, the op goes its full way: argument checks, and the choice of implementation.
    """
    return (
        kernels.missing is None
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and backend is None
        and x.is_cpu
        and not torch.is_autocast_enabled("cpu")
        and not dispatch.forced()
        and not forward_mode()
    )


def unsaved_message(op: str) -> str:
    return f"{op}: this call was made without saving what the backward needs"


def as_rows(x: Tensor) -> Tensor:
    """x [..., K] as [rows, K], K being perhaps 0."""
    if x.dim() == 2:
        return x
    return x.flatten(0, -2) if x.dim() > 2 else x[None]


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record a call with these arguments."""
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def in_one_dtype(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A norm's parameters in the wider of their dtypes: kernels give both gradients in one."""
    if weight.dtype == bias.dtype:
        return weight, bias
    dtype = torch.promote_types(weight.dtype, bias.dtype)
    return weight.to(dtype), bias.to(dtype)
