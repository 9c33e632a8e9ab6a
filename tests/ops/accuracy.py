"""The rule that decides whether numbers are right, and the machinery that runs a case by it.

The truth is the reference in float64 on the same inputs. With err(y) = max|y - truth| and eager the plain PyTorch
formula in the dtype under test:

    forward     err(ours) <= 2 err(eager) + floor
    gradients   err(ours) <= 3 err(eager) + floor
    both        rms(ours) <= 1.5 rms(eager) + rms floor

The floor is one rounding of the largest value, of the root mean square for the RMS.

One table of cases drives every backend. Backends for GPUs take their tensors on one where there is one. Elsewhere the
Triton kernels run in Triton's interpreter, on the CPU, with those cases that are quick there.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import dispatch

BACKENDS = ("cpu", *(("cuda", "vendor") if torch.cuda.is_available() else ()), "triton", "reference")
GPU_BACKENDS = ("cuda", "triton", "vendor")
DTYPES = (torch.float32, torch.bfloat16)
GPU_DTYPES = (*DTYPES, torch.float16)
INTERPRETER_LIMIT = 1.0  # of a case's cost
SEED = 0x1234_5678_9ABC_DEF1

Tensors = dict[str, Tensor]


def name_of(value: object) -> str | None:
    """Test ids: dtypes without their module."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def backends_of(op: str) -> list[str]:
    """The backends under test that an op has."""
    dispatch.select(op, device="cpu", dtype=torch.float32, backend="reference")  # registers the implementations
    return [backend for backend in BACKENDS if backend in dispatch._implementations[op]]


def dtypes_of(backend: str) -> tuple[torch.dtype, ...]:
    return GPU_DTYPES if backend in GPU_BACKENDS else DTYPES


def backends(op: str) -> pytest.MarkDecorator:
    """Parametrizes `backend`."""
    return pytest.mark.parametrize("backend", backends_of(op))


def typed(op: str) -> pytest.MarkDecorator:
    """Parametrizes `backend` and `dtype`, with what the backend has kernels for."""
    pairs = [(backend, dtype) for backend in backends_of(op) for dtype in dtypes_of(backend)]
    return pytest.mark.parametrize(("backend", "dtype"), pairs, ids=name_of)


def table(
    op: str,
    cases: Sequence[Any],
    *,
    ids: Callable[[Any], str],
    cost: Callable[[Any], float] = lambda case: 0.0,
    dropouts: Sequence[float] = (),
) -> pytest.MarkDecorator:
    """Parametrizes `backend`, `dtype` and `case`, and `p` if there are `dropouts`: every case on every backend.

    cost: about how many seconds the interpreter takes for a case, forward and backward. There, a case runs if that is
    no more than INTERPRETER_LIMIT; not in every combination, but in float32 and in one of the 16-bit formats, with one
    dropout and with the other. The backward's table, in which the output is judged, too, has `dropouts` in the other
    order: between them, forwards run with both.
    """
    parameters = []
    for backend in backends_of(op):
        chosen = [case for case in cases if not interpreted(backend) or cost(case) <= INTERPRETER_LIMIT]
        assert chosen, f"{op}: no case is quick enough for the interpreter"
        for i, case in enumerate(chosen):
            ps = dropouts or (0.0,)
            if interpreted(backend):
                half = (torch.bfloat16, torch.float16)[i // 2 % 2]
                combinations = [(torch.float32, ps[i % len(ps)]), (half, ps[(i + 1) % len(ps)])]
            else:
                combinations = list(itertools.product(dtypes_of(backend), ps))
            for dtype, p in combinations:
                name = "-".join(filter(None, (backend, name_of(dtype), ids(case), "dropout" if p > 0 else "")))
                parameters.append(pytest.param(backend, dtype, case, *([p] if dropouts else []), id=name))
    return pytest.mark.parametrize(("backend", "dtype", "case", *(["p"] if dropouts else [])), parameters)


def device(backend: str | None) -> str:
    """Where a backend's tensors live here. None: where none is forced."""
    return "cuda" if backend in GPU_BACKENDS and torch.cuda.is_available() else "cpu"


def interpreted(backend: str | None) -> bool:
    """Whether a backend's kernels run in Triton's interpreter here, where small sizes are a must."""
    return backend in GPU_BACKENDS and device(backend) == "cpu"


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """PyTorch's, which on a GPU takes one dtype alone; where they differ, as on the CPU: rounded once, to x's."""
    if weight.dtype == bias.dtype == x.dtype:
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)
    return F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), 1e-5).to(x.dtype)


def to_device(backend: str | None, tensors: Tensors) -> Tensors:
    return {name: value.to(device(backend)) for name, value in tensors.items()}


def require(op: str, backend: str, dtype: torch.dtype, requires: Hashable = None) -> None:
    """Skip the test, with the reason that dispatch gives, if this backend cannot run here.

    Triton, where it is installed, runs what it has kernels for, on a GPU or in the interpreter, so it is not skipped;
    but for an op of whose calls a part is meant for it alone.
    """
    try:
        dispatch.select(op, device=device(backend), dtype=dtype, requires=requires, backend=backend)
    except RuntimeError as error:
        if (
            backend == "triton"
            and dispatch.leaf(f"{op}_fwd_triton") is not None
            and dispatch._implementations[op]["triton"].part is None
            and importlib.util.find_spec("triton") is not None
        ):
            raise
        pytest.skip(str(error))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seed_tensor(device: str | torch.device = "cpu") -> Tensor:
    return torch.tensor([SEED], device=device)


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
    upstream = torch.randn(shape, generator=generator(99)).to(value.device, dtype)
    # The gradients of a single number are all rounded alike: with one upstream gradient, too much would be chance.
    upstreams = [upstream * scale for scale in ((1.0, 0.7, 1.1, 1.3) if upstream.numel() == 1 else (1.0,))]
    contestants = ((ours, tensors), (eager, tensors), (reference, double(tensors)))
    results = [[evaluate(function, given, each) for each in upstreams] for function, given in contestants]
    judge("output", *(drawn[0][0] for drawn in results), 2.0)
    for name, gradient in results[0][0][1].items():
        count = len(upstreams) if gradient.numel() > 1 else 1
        stacked = (torch.stack([gradients[name] for _, gradients in drawn[:count]]) for drawn in results)
        judge(f"gradient of {name}", *stacked, 3.0)
