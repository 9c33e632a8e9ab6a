"""setup.py itself, on a toy source tree that compiles in a second."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BINDING = """
#include <Python.h>
#include "answer.h"
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, ANSWER, nullptr, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC __attribute__((visibility("default"))) PyInit__C() { return PyModule_Create(&module); }
"""
KERNEL = """
#define CAT2(a, b) a##b
#define CAT(a, b) CAT2(a, b)
int CAT(scale_, FASTBERT_ISA)() { return 2; }
"""
NO_TORCH = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find_spec(name, *rest)
"""
pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler"
)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name, text in {
        "fastbert/__init__.py": "",
        "fastbert/_version.py": '__version__ = "1.2.3"\n',
        "bench/__init__.py": "",
        "kernels/triton/__init__.py": "",
        "kernels/triton/configs/__init__.py": "",
        "csrc/answer.h": "#define ANSWER 42\n",
        "csrc/binding.cpp": BINDING,
        "csrc/other.cpp": "int other() { return 1; }\n",
        "csrc/cpu/scale.cpp": '#include "cpu/scale.h"\n',
        "csrc/cpu/scale.h": KERNEL,
    }.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path


def build(tree: Path, *command: str, check: bool = True, **env: str) -> Any:
    """Run setup.py; what was compiled and linked comes back as ``.made``."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("FASTBERT_", "CXX", "PYTHONPATH"))} | env
    command = command or ("build_ext", "--inplace")
    done: Any = subprocess.run(
        [sys.executable, "setup.py", "-q", *command], cwd=tree, env=environment, capture_output=True, text=True
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    made = [line.split() for line in done.stdout.splitlines() if line.startswith(("compiling ", "linking "))]
    done.made = sorted({f"{words[0]} {Path(words[1]).name.split('.cpython')[0]}" for words in made})
    return done


def later(file: Path, text: str) -> None:
    """Write ``text`` with a time stamp after everything that the build has made."""
    file.write_text(text)
    stamp = file.stat().st_mtime_ns + 2_000_000_000
    os.utime(file, ns=(stamp, stamp))


def test_only_what_changed_is_compiled_again(toy: Path) -> None:
    everything = ["compiling binding.cpp", "compiling other.cpp", "compiling scale.cpp", "linking _C"]
    assert sorted(build(toy).made) == everything
    assert sorted(build(toy).made) == []
    later(toy / "csrc" / "answer.h", "#define ANSWER 43\n")
    assert sorted(build(toy).made) == ["compiling binding.cpp", "linking _C"]
    os.utime(toy / "csrc" / "answer.h", (0, 0))
    later(toy / "csrc" / "cpu" / "scale.h", (toy / "csrc" / "cpu" / "scale.h").read_text())
    assert sorted(build(toy).made) == ["compiling scale.cpp", "linking _C"]
    os.utime(toy / "csrc" / "cpu" / "scale.h", (0, 0))
    assert sorted(build(toy, CXXFLAGS="-DOTHER").made) == everything, "other flags make other objects"
    (toy / "fastbert" / "_version.py").write_text('__version__ = "1.2.4"\n')
    assert sorted(build(toy, CXXFLAGS="-DOTHER").made) == ["compiling binding.cpp", "compiling other.cpp", "linking _C"]


def test_kernels_are_compiled_per_instruction_set(toy: Path) -> None:
    build(toy, FASTBERT_BUILD_ISAS="baseline")
    objects = sorted(p.parent.name for p in (toy / "build").glob("ext-*/*/scale.o"))
    assert objects == ["baseline"]
    build(toy)
    objects = sorted(p.parent.name for p in (toy / "build").glob("ext-*/*/scale.o"))
    if platform.machine() == "x86_64":
        assert {"baseline", "avx2"} <= set(objects)
    refused = build(toy, check=False, FASTBERT_BUILD_ISAS="sse9")
    assert refused.returncode != 0
    assert "sse9" in refused.stderr
    assert "baseline" in refused.stderr


@pytest.mark.parametrize(
    ("env", "allowed"),
    [
        ({"MAX_JOBS": "0"}, "MAX_JOBS=0: allowed are whole numbers from 1 on"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS=many: allowed are whole numbers from 1 on"),
        ({"FASTBERT_BUILD_EXTENSION": "yes"}, "FASTBERT_BUILD_EXTENSION=yes: allowed are 0, 1 and auto"),
    ],
)
def test_a_wrong_setting_is_named(toy: Path, env: dict[str, str], allowed: str) -> None:
    refused = build(toy, check=False, **env)
    assert refused.returncode != 0
    assert allowed in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not list((toy / "fastbert").glob("_C.*"))


@pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc")
def test_cuda_kernels_are_compiled_file_by_file_for_the_archs_that_are_named(toy: Path) -> None:
    cuda = toy / "csrc" / "cuda"
    cuda.mkdir()
    for name in ("first", "second"):
        (cuda / f"{name}.cu").write_text(f"__global__ void {name}(int* place) {{ *place = 1; }}\n")
    for wrong in ("75", "8.0", "hopper", "90;1", "80a", "90f"):
        refused = build(toy, check=False, FASTBERT_CUDA_ARCHS=wrong)
        assert refused.returncode != 0
        assert f"FASTBERT_CUDA_ARCHS={wrong}: allowed with nvcc" in refused.stderr
    both = {"FASTBERT_CUDA_ARCHS": "80;90", "MAX_JOBS": "1"}
    assert {"compiling first.cu", "compiling second.cu", "linking _C_cuda"} <= set(build(toy, **both).made)
    reports = sorted(toy.glob("build/ext-*/cuda/*.ptxas"))
    assert [path.stem for path in reports] == ["first", "second"]
    assert all(f"sm_{arch}" in path.read_text() for path in reports for arch in (80, 90))
    assert build(toy, **both).made == []
    later(cuda / "first.cu", "__global__ void first(int* place) { *place = 2; }\n")
    assert build(toy, **both).made == ["compiling first.cu", "linking _C_cuda"]
    assert json.loads((toy / "fastbert" / "_build.json").read_text())["cuda_archs"] == ["80", "90"]


def test_a_compile_error_fails_the_build(toy: Path) -> None:
    later(toy / "csrc" / "other.cpp", 'int other() { return "no number"; }\n')
    done = build(toy, check=False)
    assert done.returncode != 0
    assert "other.cpp:1:" in done.stdout, "the compiler's own message"
    assert "compiling csrc/other.cpp failed" in done.stderr
    assert not list((toy / "fastbert").glob("_C.*"))


def test_a_missing_function_fails_the_build(toy: Path) -> None:
    later(toy / "csrc" / "other.cpp", "int nowhere();\nint other() { return nowhere(); }\n")
    done = build(toy, check=False)
    assert done.returncode != 0
    assert "nowhere" in done.stdout, "the loader's own message"
    assert not list((toy / "fastbert").glob("_C.*"))


def test_a_source_tree_without_sources_is_refused(toy: Path) -> None:
    shutil.rmtree(toy / "csrc")
    done = build(toy, check=False)
    assert done.returncode != 0
    assert "csrc/" in done.stderr


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"CXX": "/nonexistent/c++"}, "CXX=/nonexistent/c++ was not found"),
        ({"CXX": "false"}, "false cannot compile a small C++17 program"),
        ({"FASTBERT_BUILD_EXTENSION": "0"}, "FASTBERT_BUILD_EXTENSION=0 was set"),
    ],
)
def test_left_out_with_a_reason(toy: Path, env: dict[str, str], reason: str) -> None:
    done = build(toy, "build", **env)
    assert "LEFT OUT" in done.stderr
    assert reason in done.stderr
    assert not list(toy.glob("build/lib*/fastbert/_C*"))
    assert reason in next(toy.glob("build/lib*/fastbert/_build.json")).read_text()
    if "CXX" in env:
        must = build(toy, "build", check=False, FASTBERT_BUILD_EXTENSION="1", **env)
        assert must.returncode != 0
        assert reason in must.stderr


def test_left_out_without_torch(toy: Path) -> None:
    (toy / "sitecustomize.py").write_text(NO_TORCH)
    done = build(toy, "build", PYTHONPATH=str(toy))
    assert "torch is not installed in the environment that builds" in done.stderr


def test_a_sanitized_build_keeps_away_from_the_normal_one(toy: Path) -> None:
    build(toy)
    before = next((toy / "fastbert").glob("_C.*")).stat().st_mtime_ns
    refused = build(toy, check=False, FASTBERT_SANITIZE="undefined")
    assert refused.returncode != 0
    assert "make sanitize" in refused.stderr
    assert next((toy / "fastbert").glob("_C.*")).stat().st_mtime_ns == before


def test_a_removed_module_is_not_packaged(toy: Path) -> None:
    (toy / "fastbert" / "gone.py").write_text("")
    build(toy, "build", FASTBERT_BUILD_EXTENSION="0")
    (toy / "fastbert" / "gone.py").unlink()
    build(toy, "build", FASTBERT_BUILD_EXTENSION="0")
    assert not list(toy.glob("build/lib*/fastbert/gone.py"))


WITHOUT_TORCH = """
import ctypes, sys
CDLL = ctypes.CDLL

def load(name, *rest, **more):
    if str(name).endswith("libtorch_cpu.so") and "torch" not in sys.modules:
        raise OSError("libcudart.so.13: cannot open shared object file")
    return CDLL(name, *rest, **more)

ctypes.CDLL = load
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="there is no CUDA elsewhere")
def test_libraries_that_only_torch_itself_finds(toy: Path) -> None:
    """As those of a CUDA wheel in other folders than its own."""
    (toy / "sitecustomize.py").write_text(WITHOUT_TORCH)
    assert "linking _C" in build(toy, PYTHONPATH=str(toy)).made
    later(toy / "csrc" / "other.cpp", "int nowhere();\nint other() { return nowhere(); }\n")
    done = build(toy, check=False, PYTHONPATH=str(toy))
    assert done.returncode != 0
    assert "nowhere" in done.stdout, "the loader's own message"
