"""What watches the interpreter's memory finds errors that the interpreter itself does not see."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="there are no Triton kernels without triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter: on a GPU compute-sanitizer watches", allow_module_level=True)

import triton
import triton.language as tl

SIZE = 16


@triton.jit
def _copy_kernel(x, y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < size), mask=at < size)


@triton.jit
def _past_the_end_kernel(x, y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at + 1), mask=at < size)


@triton.jit
def _overlap_kernel(x, y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * (BLOCK // 2) + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < size), mask=at < size)


@triton.jit
def _twice_kernel(x, y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + tl.program_id(0) * BLOCK + at % 2, tl.load(x + at, mask=at < size), mask=at < size)


@triton.jit
def _neighbour_kernel(x, y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(y + (at + BLOCK) % size), mask=at < size)


@triton.jit
def _own_kernel(x, y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at), mask=at < size)
    tl.store(x + at, tl.load(y + at), mask=at < size)


@triton.jit
def _atomic_kernel(x, y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y, tl.sum(tl.load(x + at, mask=at < size, other=0.0)))
    tl.store(x + at, tl.load(y) + 0.0 * at, mask=at < size)


@triton.jit
def _masked_kernel(x, y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + tl.program_id(0), tl.sum(tl.load(x + at, mask=at < size - 1).to(tl.float32)))


@triton.jit
def _integer_mask_kernel(x, y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at), mask=(at < size) & (tl.program_id(0) != size))


def run(kernel: object, x: Tensor, y: Tensor) -> None:
    kernel[(x.numel() // 8,)](x, y, x.numel(), BLOCK=8)  # type: ignore[index]


@pytest.fixture
def errors(memory_watch: Callable[[], list[str]]) -> Callable[..., list[str]]:
    """Runs a kernel and takes the errors away, or they would be this test's."""

    def run_and_take(kernel: object) -> list[str]:
        run(kernel, torch.ones(SIZE), torch.zeros(SIZE))
        return memory_watch()

    return run_and_take


def test_a_sound_kernel_passes(errors: Callable[..., list[str]]) -> None:
    assert errors(_copy_kernel) == []


def test_an_update_in_place_passes(memory_watch: Callable[[], list[str]]) -> None:
    x = torch.ones(SIZE)
    run(_copy_kernel, x, x)
    assert memory_watch() == []


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (_past_the_end_kernel, "outside of the launch's tensors"),
        (_overlap_kernel, "writes what another program writes"),
        (_twice_kernel, "writes a place twice"),
        (_neighbour_kernel, "reads what another program writes"),
        (_neighbour_kernel, "writes what another program reads"),
        (_own_kernel, "reads what it wrote"),
        (_integer_mask_kernel, "a mask that is not of booleans"),
        (_atomic_kernel, "reads what atomics change"),
        (_atomic_kernel, "changes by atomics what is read or written"),
    ],
    ids=lambda value: value.fn.__name__ if hasattr(value, "fn") else value.replace(" ", "-"),
)
def test_errors_are_found(kernel: object, said: str, errors: Callable[..., list[str]]) -> None:
    found = errors(kernel)
    assert any(error.startswith(said) for error in found), found
    assert all("test_interpreted_memory.py" in error for error in found)


def test_a_tensor_off_its_alignment_is_found(memory_watch: Callable[[], list[str]]) -> None:
    class Shifted(Tensor):
        def data_ptr(self) -> int:
            return super().data_ptr() + 1

    run(_copy_kernel, torch.ones(SIZE), torch.zeros(SIZE + 1)[:SIZE].as_subclass(Shifted))
    assert any(error.startswith("not aligned") for error in memory_watch())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_a_mask_hides_is_poisoned(dtype: torch.dtype, memory_watch: Callable[[], list[str]]) -> None:
    y = torch.zeros(2)
    run(_masked_kernel, torch.ones(SIZE, dtype=dtype), y)
    assert y[0] == 8
    assert y[1].isnan()
    assert memory_watch() == []
