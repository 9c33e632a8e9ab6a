"""The descriptors by which wgmma reads a tile are those of CuTe, bit for bit."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def include_folders() -> list[Path]:
    """CUTLASS's headers, and those of CUDA that they include."""
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None or spec.origin is None:
        pytest.skip("the headers of CUTLASS are not installed")
    homes = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
    if nvcc := shutil.which("nvcc"):
        homes.append(Path(nvcc).resolve().parents[1])
    cuda = next((home / "include" for home in homes if (home / "include" / "cuda_runtime.h").exists()), None)
    if cuda is None:
        pytest.skip("the headers of CUDA are not there")
    return [Path(spec.origin).parent / "source" / "include", cuda, cuda / "cccl"]


def test_descriptors_are_those_of_cute(compiler: str, tmp_path: Path) -> None:
    theirs = [word for folder in include_folders() for word in ("-isystem", str(folder))]
    ours = [f"-I{HERE.parents[1] / 'csrc'}", f"-I{HERE}"]
    for name, flags in (("ours", [*ours, "-Wno-unknown-pragmas"]), ("theirs", theirs)):
        source, target = HERE / "descriptors" / f"{name}.cpp", tmp_path / f"{name}.o"
        subprocess.run([compiler, "-std=c++17", *flags, "-c", str(source), "-o", str(target)], check=True)
    program = tmp_path / "descriptors"
    subprocess.run([compiler, str(tmp_path / "ours.o"), str(tmp_path / "theirs.o"), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout == "208 compared\n"
