"""The library of the CUDA kernels, where no GPU is needed: it loads, and its ops are those of the other backends."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastbert import dispatch

HAS_CUTLASS = importlib.util.find_spec("cutlass_library") is not None
OPS = ("layernorm", "attention", *(("ffn",) if HAS_CUTLASS else ()))
built = pytest.mark.skipif(dispatch.cuda_error is not None, reason=str(dispatch.cuda_error))


def test_built_where_there_is_nvcc() -> None:
    """So that the skips of the other tests cannot hide it."""
    if shutil.which("nvcc") is None:
        assert dispatch.cuda_error is not None
        assert "nvcc was not found" in dispatch.cuda_error or "FASTBERT_BUILD_CUDA=0" in dispatch.cuda_error
    else:
        assert dispatch.cuda_error is None


@built
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_schema_is_that_of_the_cpu_op(op: str, direction: str) -> None:
    cuda, cpu = (dispatch.leaf(f"{op}_{direction}_{backend}") for backend in ("cuda", "cpu"))
    assert cuda is not None
    assert cpu is not None
    found = str(cuda._schema).replace("_cuda(", "(").replace(", bool deterministic", "")  # cpu always repeats
    assert found == str(cpu._schema).replace("_cpu(", "(")


@built
@pytest.mark.parametrize("op", OPS)
def test_refuses_tensors_on_the_cpu(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastbert::{op}_fwd_cuda", "CUDA")
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastbert::{op}_fwd_cuda", "CPU")
    with pytest.raises(RuntimeError, match="cannot run"):
        dispatch.select(op, device="cpu", dtype=torch.bfloat16, backend="cuda")


@pytest.mark.parametrize("op", OPS)
def test_off_unless_forced(op: str) -> None:
    """No device has run these kernels."""
    assert dispatch._candidates(op)["cuda"].off == dispatch.NEVER_RUN


def test_says_why_an_op_was_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_build.json").write_text(json.dumps({"cutlass_reason": "no headers"}))
    monkeypatch.setattr(dispatch, "cuda_error", None)
    monkeypatch.setattr(dispatch, "__file__", str(tmp_path / "dispatch.py"))
    dispatch._build_note.cache_clear()
    try:
        assert dispatch.missing_leaf("ffn_fwd_nowhere_cuda") == "not built (no headers)"
    finally:
        dispatch._build_note.cache_clear()


def test_says_when_the_driver_is_too_old() -> None:
    """PyTorch runs on it, if it was built for an older CUDA than the kernels."""
    assert dispatch._driver_reason(13000, 13010) is None
    assert dispatch._driver_reason(13000, 12080) is None
    reason = dispatch._driver_reason(12080, 13000)
    assert reason is not None
    assert "CUDA 13" in reason
    assert "12.8" in reason


@pytest.mark.parametrize(
    ("archs", "capability", "driver", "words"),
    [
        (("80", "90", "100"), (8, 0), 13000, None),
        (("80", "90", "100"), (8, 9), 13000, None),
        (("80", "90", "100"), (9, 0), 13000, None),
        (("80", "90", "100"), (10, 3), 13000, None),
        (("80", "90", "100"), (12, 0), 13000, None),  # from PTX
        (("80", "90", "100"), (12, 0), 12090, ["80, 90, 100", "has 120", "13.0"]),
        (("86",), (8, 0), 13000, ["86", "has 80"]),
        (("90",), (8, 0), 13000, ["90", "has 80"]),
        (("80", "100"), (9, 0), 13000, ["80, 100", "has 90"]),
        (("90a",), (9, 0), 13000, None),
        (("90a",), (10, 0), 13000, ["90a", "has 100"]),
        (("100f",), (10, 3), 13000, None),
    ],
)
def test_says_which_gpus_it_was_compiled_for(
    archs: tuple[str, ...], capability: tuple[int, int], driver: int, words: list[str] | None
) -> None:
    reason = dispatch._arch_reason(archs, capability, driver, 13000)
    assert reason is None if words is None else all(word in reason for word in words), reason


@pytest.mark.parametrize(
    ("op", "capability", "note", "same"),
    [
        ("attention", (9, 0), {"cutlass": "4.2.0", "cuda_archs": ["80", "90"]}, True),
        ("attention", (9, 0), {"cutlass": None, "cuda_archs": ["80", "90"]}, False),
        ("attention", (9, 0), {"cutlass": "4.2.0", "cuda_archs": ["80"]}, False),
        ("attention", (8, 0), {"cutlass": None, "cuda_archs": ["80"]}, True),
        ("layernorm", (9, 0), {"cutlass": None, "cuda_archs": ["90"]}, True),
    ],
)
def test_a_measurement_is_of_the_kernels_that_were_built(
    op: str, capability: tuple[int, int], note: dict, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_build_note", lambda: note)
    assert dispatch._as_measured(op, capability) is same


@built
def test_knows_its_cuda_and_the_drivers() -> None:
    driver, needed = dispatch._cuda_versions()
    note = json.loads(Path(dispatch.__file__).with_name("_build.json").read_text(encoding="utf-8"))
    assert needed // 1000 == int(note["nvcc"].split(".")[0])
    assert driver == 0 or driver >= 11000


@pytest.mark.parametrize(
    ("dtype", "in_eights", "words"),
    [(torch.float32, True, "16-bit"), (torch.bfloat16, False, "multiple of 8"), (torch.bfloat16, True, None)],
)
def test_ffn_says_what_it_cannot_take(
    dtype: torch.dtype, in_eights: bool, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "cuda_reason", lambda *_: None)
    reason = dispatch._candidates("ffn")["cuda"].supports("cuda", dtype, in_eights)
    assert reason is None if words is None else words in reason


@pytest.mark.parametrize(
    ("dtype", "head_dim", "words"),
    [
        (torch.float32, 64, "fp32 attention runs on triton or the reference"),
        (torch.bfloat16, 40, "head"),
        (torch.float16, 129, "head"),
        *((torch.bfloat16, size, None) for size in (None, 32, 64, 128)),
    ],
)
def test_attention_says_what_it_cannot_take(
    dtype: torch.dtype, head_dim: int | None, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "cuda_reason", lambda *_: None)
    reason = dispatch._candidates("attention")["cuda"].supports("cuda", dtype, head_dim)
    assert reason is None if words is None else words in reason


@built
@pytest.mark.skipif(not shutil.which("nm") or sys.platform != "linux", reason="nm is not there")
def test_needs_no_library_of_cuda() -> None:
    needed = subprocess.run(
        ["nm", "-D", "--undefined-only", dispatch.CUDA_LIBRARY], capture_output=True, text=True, check=True
    )
    symbols = [line.split()[-1] for line in needed.stdout.splitlines()]
    assert not [symbol for symbol in symbols if symbol.startswith(("cu", "_ZN3c10", "_ZN2at"))]
    assert [symbol for symbol in symbols if symbol.startswith("aoti_torch")]


def test_the_cpu_ops_survive_a_library_that_does_not_load(tmp_path: Path) -> None:
    package = Path(dispatch.__file__).parent
    shutil.copytree(package, tmp_path / "fastbert", ignore=shutil.ignore_patterns("__pycache__", "_C_cuda.*"))
    (tmp_path / "fastbert" / dispatch.CUDA_LIBRARY.name).write_bytes(b"not a library")
    program = "from fastbert import dispatch; print(dispatch.extension_error, dispatch.cuda_error, sep='|')"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    extension, cuda = done.stdout.strip().split("|")
    assert extension == str(dispatch.extension_error)
    assert "does not load" in cuda
