"""Whole models through Triton's own runtime where there is no GPU: everything but the launches themselves.

    TRITON_INTERPRET=0 python launch_without_gpu.py ARCH

A launch on a GPU is not what it is in the interpreter: arguments are bound, specialised by their values (1, multiples
of 16), typed by them, and compiled for. Here that is done for compute capability ARCH / 10; a launch then checks what
it is given and does nothing, so that numbers mean nothing. Prints as JSON, by the kernel that was launched, what is
wrong with the machine code that it became.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from fastbert.bench import kernels as table
from transformers import BertConfig, BertForMaskedLM
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import fastbert
from fastbert import ops
from fastbert.kernels import configs

ARCH = int(sys.argv[1])
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "i32": torch.int32, "i64": torch.int64}
INTEGERS = {"i32": 1 << 31, "i64": 1 << 63}
GRID = (1 << 31, 1 << 16, 1 << 16)
found: dict[str, list[str]] = {}


class Launcher:
    """Of one compiled kernel. Triton calls it with the grid, six things for the driver, and the kernel's arguments."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.kernel, self.types = source.fn.__name__, source.signature
        found.setdefault(self.kernel, [])

    def __call__(self, *everything: Any) -> None:
        grid, arguments = everything[:3], everything[9:]
        assert all(0 < size < limit for size, limit in zip(grid, GRID, strict=True)), f"{self.kernel}: grid {grid}"
        for (name, kind), value in zip(self.types.items(), arguments, strict=True):
            if kind == "constexpr":
                continue
            if kind.startswith("*"):
                right = isinstance(value, torch.Tensor) and value.dtype is DTYPES[kind[1:]]
            elif kind in INTEGERS:
                right = type(value) is int and -INTEGERS[kind] <= value < INTEGERS[kind]
            else:
                right = kind == "fp32" and isinstance(value, float)
            assert right, f"{self.kernel}: {name} is {value!r}, compiled for {kind}"


class Driver:
    """What Triton's runtime asks a driver for."""

    launcher_cls = Launcher

    @property
    def utils(self) -> Driver:
        return self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": table.SHARED_LIMIT[ARCH]}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024


def checked(compile_it: Any) -> Any:
    """JITFunction's compiling, and a look at the machine code."""

    def run(self: JITFunction, *arguments: Any) -> Any:
        kernel = compile_it(self, *arguments)
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kernel.cubin")
            cubin.write_bytes(kernel.asm["cubin"])
            (code,) = table.read(cubin, table.triton_tools()).values()
        assert kernel.metadata.enable_fp_fusion, f"{self.__name__} is launched without configs.FUSED"
        problems = table.problems(code, ARCH, kernel.metadata.shared, kernel.metadata.num_warps, matrix=False)
        found.setdefault(self.__name__, []).extend(
            f"{problem} ({arguments[1]}, {arguments[3]})" for problem in problems
        )
        return kernel

    return run


def models(dtype: torch.dtype) -> None:
    """Inference and a training step, on few tokens and on many, one sequence and several."""
    config = BertConfig(
        hidden_size=256, num_attention_heads=4, intermediate_size=512, num_hidden_layers=1, vocab_size=1000
    )
    model = fastbert.optimize(BertForMaskedLM(config).to(dtype))
    for batch, width in ((1, 1), (3, 77), (2, 300)):
        ids = torch.randint(1, 1000, (batch, width))
        mask = (torch.arange(width) < torch.linspace(width, 1, batch)[:, None]).long()
        model.eval()
        with torch.no_grad():
            model(ids, attention_mask=mask).logits  # noqa: B018, computed when it is read
        model.train()
        model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    assert fastbert.report(model).calls["stock"] == 0, fastbert.report(model)


def attentions(dtype: torch.dtype) -> None:
    """Biases with a gradient, for all queries and for each, and the same bits every time."""
    for (length, queries), deterministic in itertools.product(
        [(40, 0), (40, 1), (40, 40), (200, 0), (200, 1), (200, 200)], (False, True)
    ):
        qkv = torch.zeros(2 * length, 3, 4, 64, dtype=dtype, requires_grad=True)
        bias = torch.zeros(1, 4, queries, length, requires_grad=True) if queries else None
        bounds = torch.tensor([0, length, 2 * length], dtype=torch.int32)
        ops.attention(qkv, bounds, length, bias=bias, deterministic=deterministic).sum().backward()


if __name__ == "__main__":
    table.modules()  # decorated without the interpreter, in which they run for everybody else from now on
    # TRITON_DEFAULT_FP_FUSION: as it will be with Triton 3.10, for launches that do not ask.
    os.environ |= {"TRITON_INTERPRET": "1", "FASTBERT_BACKEND": "triton", "TRITON_DEFAULT_FP_FUSION": "0"}
    driver.set_active(Driver())
    JITFunction._do_compile = checked(JITFunction._do_compile)
    configs.architecture = lambda device: ARCH  # for the CPU it would be that of the interpreter
    for dtype in (torch.bfloat16, torch.float32):
        models(dtype)
        attentions(dtype)
    print(json.dumps(found))
