"""The rule that decides whether numbers are right, and the machinery that runs a case by it.

The truth is the reference in float64 on the same inputs. With err(y) = max|y - truth| and eager the plain PyTorch
formula in the dtype under test:

    forward     err(ours) <= 2 err(eager) + floor
    gradients   err(ours) <= 3 err(eager) + floor
    both        rms(ours) <= 1.5 rms(eager) + rms floor

The floor is one rounding of the largest value, of the root mean square for the RMS.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import pytest
import torch
from torch import Tensor

from fastbert import dispatch

BACKENDS = ("cpu", "reference")
DTYPES = (torch.float32, torch.bfloat16)
SEED = 0x1234_5678_9ABC_DEF1

Tensors = dict[str, Tensor]


def name_of(value: object) -> str | None:
    """Test ids: dtypes without their module."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def require(op: str, backend: str, dtype: torch.dtype, requires: Hashable = None) -> None:
    """Skip the test, with the reason that dispatch gives, if this backend cannot run here."""
    try:
        dispatch.select(op, device="cpu", dtype=dtype, requires=requires, backend=backend)
    except RuntimeError as error:
        pytest.skip(str(error))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seed_tensor() -> Tensor:
    return torch.tensor([SEED])


def judge(name: str, ours: Tensor, eager: Tensor, truth: Tensor, factor: float) -> None:
    """Assert the rule for one tensor."""
    assert ours.shape == truth.shape, f"{name}: shape {list(ours.shape)}, should be {list(truth.shape)}"
    assert ours.dtype == eager.dtype, f"{name}: {ours.dtype}, should be {eager.dtype}"
    if truth.numel() == 0:
        return
    assert torch.isfinite(ours).all(), f"{name}: {int((~torch.isfinite(ours)).sum())} values are not finite"
    if truth.numel() == 1:  # how near eager comes to one single number is chance
        return
    truth = truth.double()
    error, error_eager = (ours.double() - truth).abs(), (eager.double() - truth).abs()
    rounding = torch.finfo(ours.dtype).eps
    allowed = factor * error_eager.max() + rounding * truth.abs().max()
    assert error.max() <= allowed, (
        f"{name}: error {error.max():.3g} at {_place(error)}, allowed {allowed:.3g} (eager {error_eager.max():.3g})"
    )
    rms, rms_eager, rms_truth = (value.square().mean().sqrt() for value in (error, error_eager, truth))
    allowed = 1.5 * rms_eager + rounding * rms_truth
    assert rms <= allowed, f"{name}: RMS error {rms:.3g}, allowed {allowed:.3g} (eager {rms_eager:.3g})"


def _place(error: Tensor) -> list[int]:
    return [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]


def evaluate(function: Callable[..., Tensor], tensors: Tensors, upstream: Tensor) -> tuple[Tensor, Tensors]:
    """The output of `function` and the gradients of its floating point arguments for a given upstream gradient."""
    leaves = {
        name: tensor.detach().clone().requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    y = function(**leaves)
    gradients = torch.autograd.grad(y, list(wanted.values()), upstream.to(y.dtype))
    return y.detach(), dict(zip(wanted, gradients, strict=True))


def double(tensors: Tensors) -> Tensors:
    return {name: value.double() if value.is_floating_point() else value for name, value in tensors.items()}


def check_forward(
    ours: Callable[..., Tensor], eager: Callable[..., Tensor], reference: Callable[..., Tensor], tensors: Tensors
) -> None:
    """The output, without autograd, as in inference."""
    with torch.no_grad():
        judge("output", ours(**tensors), eager(**tensors), reference(**double(tensors)), 2.0)


def check_backward(
    ours: Callable[..., Tensor], eager: Callable[..., Tensor], reference: Callable[..., Tensor], tensors: Tensors
) -> None:
    """Output and gradients, for a random upstream gradient."""
    with torch.no_grad():
        shape, dtype = (value := eager(**tensors)).shape, value.dtype
    upstream = torch.randn(shape, generator=generator(99)).to(dtype)
    y, gradients = evaluate(ours, tensors, upstream)
    y_eager, gradients_eager = evaluate(eager, tensors, upstream)
    y_truth, gradients_truth = evaluate(reference, double(tensors), upstream.double())
    judge("output", y, y_eager, y_truth, 2.0)
    for name, gradient in gradients.items():
        judge(f"gradient of {name}", gradient, gradients_eager[name], gradients_truth[name], 3.0)
