"""What a result was measured on: processor, ISA, versions, commit. Nothing that names the host or its user."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("fastbert", "torch", "triton", "transformers", "onnxruntime", "openvino", "ctranslate2", "numpy")


def describe() -> dict[str, Any]:
    """Device, ISA, versions and commit, as they go into every result file."""
    return {
        "device": processor(),
        "cores": cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "extension": _extension(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": _commit(),
    }


def describe_gpu() -> dict[str, Any]:
    """The same of the GPU that PyTorch would use: its name, architecture, and the CUDA that PyTorch was built with."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    about = {
        "device": properties.name,
        "arch": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "processor": processor(),
        "cuda_kernels": _cuda_kernels(),
    }
    return describe() | about


def no_gpu() -> str | None:
    """Why nothing can be measured on a GPU here, or None."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else "there is no CUDA device"


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _extension() -> dict[str, Any]:
    try:
        from fastbert import _C
    except ImportError as error:
        return {"built": False, "reason": str(error)}
    found: dict[str, Any] = {"built": True}
    for name in ("isa", "cpu_features", "build_info"):
        if hasattr(_C, name):
            found[name] = getattr(_C, name)()
    return found


def _cuda_kernels() -> dict[str, Any]:
    """Whether there are CUDA C++ kernels, and what they were built with: some are there only with CUTLASS."""
    from fastbert import dispatch

    return {"built": dispatch.cuda_error is None, "reason": dispatch.cuda_error} | dispatch.cuda_build()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> dict[str, Any] | None:
    """The commit of the checkout that this file lies in, and whether tracked files differ from it; None elsewhere.

    FASTBERT_COMMIT names it where the files are a copy.
    """
    if given := os.environ.get("FASTBERT_COMMIT"):
        return {"hash": given.removesuffix("-dirty"), "dirty": given.endswith("-dirty")}
    home = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(home), *arguments], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not git("ls-files", "--error-unmatch", Path(__file__).name):
        return None
    status = git("status", "--porcelain", "--untracked-files=no")
    return {"hash": git("rev-parse", "HEAD"), "dirty": bool(status)}
