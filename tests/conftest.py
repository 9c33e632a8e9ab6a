from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton looks when it is imported
else:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats bit for bit only so
if not torch.cuda.is_available():
    # Inductor would start processes that import torch, for the little that is compiled here.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.fixture(scope="module", autouse=True)
def frozen_garbage() -> None:
    """What is there before a module's tests, torch and thousands of tests, garbage collections need not go through.

    transformers and others ask for one at every turn, each of them a tenth of a second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def _watch(load_script: Callable[[str], ModuleType]) -> Iterator[Any]:
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield None
        return
    watch = load_script("tests/interpreted_memory.py").Watch()
    with pytest.MonkeyPatch.context() as patch:
        watch.install(patch)
        yield watch


@pytest.fixture
def memory_watch(_watch: Any) -> Iterator[Callable[[], list[str]]]:
    """Fails a test whose Triton kernels are interpreted and use memory as no GPU could bear.

    A function that gives the errors so far and takes them away.
    """

    def take() -> list[str]:
        errors = [] if _watch is None else sorted(_watch.errors)
        if _watch is not None:
            _watch.errors.clear()
        return errors

    take()
    yield take
    errors = take()
    assert not errors, "\n".join(errors)


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what is chosen without Triton's interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("fastbert.dispatch._selected", {})


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """A function that gives a Python file of the repository, outside of its packages, as a module."""

    def load(place: str) -> ModuleType:
        path = ROOT / place
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def fetch(load_script: Callable[[str], ModuleType]) -> ModuleType:
    """What brings real weights and real text."""
    return load_script("examples/fetch.py")


@pytest.fixture(scope="session")
def minilm(fetch: ModuleType) -> Path:
    """Folder of the real checkpoint all-MiniLM-L6-v2: $FASTBERT_TEST_DATA has it, or it is fetched once."""
    given = os.environ.get("FASTBERT_TEST_DATA")
    if given and Path(given, "all-MiniLM-L6-v2").is_dir():
        return Path(given, "all-MiniLM-L6-v2")
    return fetch.minilm(fetch.default_cache())


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill processes with all that they started, sessions of their own (torchrun's workers) included."""
    import psutil  # tests on a GPU, where it may not be, start none

    alive = [psutil.Process(process.pid) for process in processes if process.poll() is None]
    family = [member for process in alive for member in [process, *process.children(recursive=True)]]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    for process in processes:
        process.wait()
    psutil.wait_procs(family, timeout=10)


@pytest.fixture(scope="session")
def run_commands() -> Callable[..., list[str]]:
    """Run commands at the same time, one thread each, and return what each has written (stdout and stderr).

    The test fails with their outputs, and nothing stays behind, if one of them fails or they take more than
    ``seconds``. Outputs go to files: a pipe would be held open by a grandchild.
    """

    def run(commands: Sequence[Sequence[str]], seconds: float = 120, status: int = 0, **variables: str) -> list[str]:
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
        files = [tempfile.TemporaryFile() for _ in commands]  # noqa: SIM115 - read after the processes have ended
        processes: list[subprocess.Popen[bytes]] = []
        deadline = time.monotonic() + seconds
        try:
            for command, file in zip(commands, files, strict=True):
                processes.append(
                    subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment
                    )
                )
            # One that fails ends the wait: the others would only wait for it.
            while any(p.poll() is None for p in processes) and not any(
                p.poll() not in (None, status) for p in processes
            ):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.02)
            codes = [process.poll() for process in processes]
        finally:
            _end(processes)
        outputs = []
        for file in files:
            with file:
                file.seek(0)
                outputs.append(file.read().decode(errors="replace"))
        for command, code, output in zip(commands, codes, outputs, strict=True):
            if code not in (None, status):
                pytest.fail(f"{' '.join(command)}: status {code}, should be {status}\n{output}")
        if None in codes:
            shown = "\n".join(f"{' '.join(c)}:\n{text}" for c, text in zip(commands, outputs, strict=True))
            pytest.fail(f"not finished after {seconds:g} s\n{shown}")
        return outputs

    return run
