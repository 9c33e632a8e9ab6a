"""The descriptors by which wgmma reads a tile are those of CuTe, bit for bit."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OBJECTS = HERE.parents[1] / "build" / "emulated"


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


def theirs(compiler: str) -> Path:
    """The object of CuTe's side. Its templates take long to compile, so that it is kept while nothing of it changes."""
    cutlass, *cuda = include_folders()
    source = HERE / "descriptors" / "theirs.cpp"
    folders = [word for folder in (cutlass, *cuda) for word in ("-isystem", str(folder.resolve()))]
    command = [compiler, "-std=c++17", *folders, "-c", str(source)]
    told = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = [*command, told, source.read_text(), (cutlass / "cutlass" / "version.h").read_text()]
    target = OBJECTS / f"descriptors-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}.o"
    if not target.exists():
        OBJECTS.mkdir(parents=True, exist_ok=True)
        subprocess.run([*command, "-o", str(target.with_suffix(".partial"))], check=True)
        target.with_suffix(".partial").replace(target)
    return target


def test_descriptors_are_those_of_cute(compiler: str, tmp_path: Path) -> None:
    program, ours = tmp_path / "descriptors", HERE / "descriptors" / "ours.cpp"
    flags = ["-std=c++17", "-Wno-unknown-pragmas", f"-I{HERE.parents[1] / 'csrc'}", f"-I{HERE}"]
    subprocess.run([compiler, *flags, str(ours), str(theirs(compiler)), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout == "208 compared\n"
