"""The package as people get it: editable, wheel, sdist, without a compiler; each in a clean environment."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERSION = re.search(r'"(.+)"', (ROOT / "fastbert" / "_version.py").read_text().split("__version__")[1])[1]
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
# Where the package lies, and an op through the public function against PyTorch's own, on the backends named: how far
# it is off, or why it cannot run.
TRY = """
import torch, fastbert, fastbert.bench
from fastbert import ops
x, weight, bias = torch.randn(5, 40), torch.randn(40), torch.randn(40)
result = [fastbert.__file__, fastbert.bench.__file__, fastbert.__version__]
for backend in {backends!r}:
    try:
        y = ops.layernorm(x, weight, bias, eps=1e-12, backend=backend)
    except RuntimeError as error:
        result.append(str(error))
    else:
        result.append((y - torch.nn.functional.layer_norm(x, (40,), weight, bias, 1e-12)).abs().max().item())
"""


def assert_works(environment: Any, package: Path, bench: Path, backend: str) -> tuple[str, Any]:
    """What is imported is what was installed, an op runs on ``backend``, and on one that is chosen.

    Returns what ``fastbert info`` prints, and what became of the op on the backend ``cpu``.
    """
    where, bench_where, version, error, chosen, on_cpu = environment.evaluate(
        TRY.format(backends=[backend, None, "cpu"])
    )
    assert Path(where).parent == package
    assert Path(bench_where).parent == bench
    assert version == VERSION
    assert error < 1e-5
    assert chosen < 1e-5
    info = environment.run("info", program="fastbert").stdout
    assert VERSION in info
    return info, on_cpu


@needs_compiler
def test_editable(environment: Any, source_tree: Any) -> None:
    tree = source_tree(built=True)
    environment.install("-e", str(tree))
    assert_works(environment, tree / "fastbert", tree / "bench", "cpu")
    (tree / "fastbert" / "added.py").write_text("result = 1\n")
    assert environment.evaluate("from fastbert.added import result") == 1
    (tree / "bench" / "added.py").write_text("result = 2\n")
    assert environment.evaluate("from fastbert.bench.added import result") == 2


@needs_compiler
def test_wheel(environment: Any, source_tree: Any, tmp_path: Path) -> None:
    tree = source_tree(built=True)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path)]
    environment.run("-m", "pip", "wheel", *options, str(tree))
    (wheel,) = tmp_path.glob("fastbert-*.whl")
    assert f"cp{sys.version_info.major}{sys.version_info.minor}" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert [n for n in names if re.fullmatch(r"fastbert/_C\..*so", n)]
    assert {"fastbert/py.typed", "fastbert/ops/attention.py", "fastbert/bench/__init__.py"} <= set(names)
    tops = {n.split("/")[0] for n in names}
    assert tops == {"fastbert", f"fastbert-{VERSION}.dist-info"}
    environment.install(str(wheel))
    assert_works(environment, environment.site / "fastbert", environment.site / "fastbert" / "bench", "cpu")
    metadata = environment.evaluate("import importlib.metadata as m; result = m.requires('fastbert')")
    assert "torch>=2.11" in metadata
    (transformers,) = (requirement for requirement in metadata if requirement.startswith("transformers"))
    assert {">=5.17", "<6"} == set(transformers.removeprefix("transformers").split(","))


@needs_compiler
def test_sdist(environment: Any, source_tree: Any, tmp_path: Path) -> None:
    """The archive alone is enough to build from; unoptimised and for the baseline, so that it is quick."""
    tree = source_tree()
    environment.run(str(tree / "setup.py"), "-q", "sdist", "--dist-dir", str(tmp_path))
    (archive,) = tmp_path.glob("fastbert-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {n.split("/", 1)[1] for n in tar.getnames() if "/" in n}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu", ".h")}
    assert sources <= names
    assert {"LICENSE", "README.md", "Makefile", "setup.py", "pyproject.toml", "fastbert/py.typed", ".ci/gpu"} <= names
    assert not [n for n in names if n.endswith((".so", ".o")) or n.startswith(("build/", ".venv"))]
    quick = {"FASTBERT_BUILD_ISAS": "baseline", "CXXFLAGS": "-O0", "FASTBERT_BUILD_CUDA": "0"}
    environment.install(str(archive), FASTBERT_BUILD_EXTENSION="1", **quick)
    package = environment.site / "fastbert"
    info, _ = assert_works(environment, package, package / "bench", "cpu")
    assert "baseline" in info


def test_without_a_compiler(environment: Any, source_tree: Any) -> None:
    said = environment.install(str(source_tree()), CXX="/nonexistent/c++")
    reason = "CXX=/nonexistent/c++ was not found"
    assert "LEFT OUT" in said.stdout + said.stderr
    assert reason in said.stdout + said.stderr
    package = environment.site / "fastbert"
    assert not list(package.glob("_C*"))
    info, forced = assert_works(environment, package, package / "bench", "reference")
    assert reason in info, "fastbert info says why there are no kernels"
    assert reason in forced


def test_a_compile_error_fails_the_installation(environment: Any, source_tree: Any) -> None:
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    tree = source_tree()
    for source in [*tree.glob("csrc/*.cpp"), *tree.glob("csrc/cpu/*.cpp")]:
        source.write_text("this is not C++\n")
    said = environment.install(str(tree), check=False)
    assert said.returncode != 0
    assert "this is not C++" in said.stdout + said.stderr
    assert not (environment.site / "fastbert").exists()


@needs_compiler
@pytest.mark.skipif(not shutil.which("nm") or sys.platform != "linux", reason="nm is not there")
def test_the_binary_keeps_to_the_stable_abi() -> None:
    """No C++ symbol of torch: one binary serves every torch from the oldest that it was built for."""
    library = ROOT / "fastbert" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    listed = subprocess.run(
        ["nm", "-D", "-C", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    )
    symbols = [line.split(maxsplit=1)[1] for line in listed.stdout.splitlines()]
    assert not [s for s in symbols if s.startswith(("c10::", "at::", "torch::"))]
    assert [s for s in symbols if s.startswith(("aoti_torch", "torch_"))]


@needs_compiler
@pytest.mark.skipif(not shutil.which("nm") or sys.platform != "linux", reason="nm is not there")
def test_no_instruction_set_leaks_through_a_shared_symbol() -> None:
    """The linker keeps one copy of a weak symbol. Were one compiled for AVX-512, the baseline would run it too: a weak
    symbol of a kernel's object must carry its instruction set in its name."""
    kernels = {p.stem for p in (ROOT / "csrc" / "cpu").glob("*.cpp")}
    objects = [
        o
        for o in (ROOT / "build").glob("ext-linux*/*/*.o")
        if o.stem in kernels and o.parent.name not in ("baseline", "cuda")
    ]
    if not objects:
        pytest.skip("only the baseline was built")
    leaks = []
    for o in objects:
        listed = subprocess.run(["nm", "-C", "--defined-only", str(o)], capture_output=True, text=True, check=True)
        for line in listed.stdout.splitlines():
            kind, name = line.split(maxsplit=2)[1:]
            if kind in "WVu" and o.parent.name not in name:
                leaks.append(f"{o.parent.name}/{o.name}: {name}")
    assert not leaks, "\n".join(leaks)
