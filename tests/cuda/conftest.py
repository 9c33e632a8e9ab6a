"""The kernels of csrc/cuda, run on the host: a library that tests/cuda/emulator.h turns them into, and the ops in it,
`fastbert::<op>_fwd_emulated`, which take tensors on the CPU.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastbert.ops import leaf

ROOT = Path(__file__).resolve().parents[2]
CSRC, HERE, OBJECTS = ROOT / "csrc", ROOT / "tests" / "cuda", ROOT / "build" / "emulated"
sys.path.insert(0, str(ROOT / "tests" / "ops"))  # the table of cases


@pytest.fixture(scope="session")
def compiler() -> str:
    found = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        pytest.skip("there is no C++ compiler")
    return found


def compile_emulated(compiler: str) -> Path:
    """The library, compiled again where a source or a header is newer."""
    torch_folder = Path(torch.__file__).parent
    flags = [
        "-std=c++17",
        "-O2",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-unknown-pragmas",
        "-DFASTBERT_EMULATED",
        "-DFASTBERT_CUTLASS",
        "-DFASTBERT_SM90",
    ]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{CSRC}", f"-I{HERE}", "-isystem"]
    flags.append(str(torch_folder / "include"))
    OBJECTS.mkdir(parents=True, exist_ok=True)
    cuda = CSRC / "cuda"
    headers = [*CSRC.glob("*.h"), *cuda.rglob("*.h"), HERE / "emulator.h", Path(__file__)]
    newest = max(header.stat().st_mtime for header in headers)
    sources = [*cuda.glob("*.cu"), *cuda.glob("*.cpp"), *HERE.glob("*.cpp")]
    sources += [cuda / "cutlass" / f"{name}.cu" for name in ("ffn", "attention_fwd_sm90", "attention_bwd_sm90")]
    objects = {source: OBJECTS / f"{source.name}.o" for source in sorted(sources)}
    library = OBJECTS / "libemulated.so"
    stale = [s for s, o in objects.items() if not o.exists() or o.stat().st_mtime < max(newest, s.stat().st_mtime)]

    def build(source: Path) -> None:
        partial = objects[source].with_suffix(".partial")
        subprocess.run([compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(partial)], check=True)
        partial.replace(objects[source])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(build, stale))
    if stale or not library.exists():
        link = ["-shared", f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-ldl", "-o", str(library)]
        subprocess.run([compiler, *map(str, objects.values()), *link], check=True)
    return library


class Emulated:
    """The ops, and what the emulator has seen."""

    def __init__(self, library: Path) -> None:
        torch.ops.load_library(library)
        self.library = ctypes.CDLL(str(library))
        self.library.fastbert_take_bank_conflicts.restype = ctypes.c_int64
        self.library.fastbert_take_boxes.restype = ctypes.c_int64
        self.leaves = {op: self.register(op) for op in ("layernorm", "attention", "ffn")}

    @staticmethod
    def register(op: str) -> leaf.Leaf:
        """With the fake kernels and the autograd formula that every backend has."""
        module = importlib.import_module(f"fastbert.ops.{op}")
        emulated = leaf.Leaf(op, "emulated")
        leaf.register(
            emulated,
            forward_fake=module._forward_fake,
            setup_context=module._setup_context,
            backward=module._autograd,
            backward_fake=module._backward_fake,
        )
        return emulated

    def bank_conflicts(self) -> int:
        """Those that ldmatrix met since the last call."""
        return int(self.library.fastbert_take_bank_conflicts())

    def boxes(self) -> int:
        """Those that TMA has brought since the last call."""
        return int(self.library.fastbert_take_boxes())


@pytest.fixture(scope="session")
def emulated(compiler: str) -> Emulated:
    return Emulated(compile_emulated(compiler))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every torch.empty comes filled with NaN: what a kernel forgets to write shows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
