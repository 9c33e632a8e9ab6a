"""Clean virtual environments that borrow the outer one's dependencies, so that an install takes seconds and no network.

A borrowed folder is only a path: its .pth files are not run, so an editable fastbert of the outer environment is not
seen in the inner one, and what is imported there is what was installed there.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
OUTER = [Path(p) for p in dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))]
# What is in the tree but not part of the project: the rules of .gitignore, without needing git.
NOT_OURS = shutil.ignore_patterns(
    *(".git", ".venv*", ".cache", ".*_cache", ".hypothesis", "__pycache__", "output"),
    *("build", "dist", "*.egg-info", "*.so", "_build.json"),
)


class Environment:
    """A virtual environment at ``folder`` and what is run in it, from a directory that is not the repository."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        venv.create(folder, with_pip=False, symlinks=True)
        self.site = Path(self.run("-c", "import sysconfig; print(sysconfig.get_path('platlib'))").stdout.strip())
        (self.site / "outer.pth").write_text("\n".join(map(str, OUTER)) + "\n")

    def run(self, *arguments: str, program: str = "python", check: bool = True, **env: str) -> Any:
        dropped = ("PYTHONPATH", "FASTBERT_", "CXX", "PIP_REQUIRE", "LD_PRELOAD", "TRITON_")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(dropped)} | env
        command = [str(self.folder / "bin" / program), *arguments]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        if check and done.returncode:
            pytest.fail(f"{' '.join(command)}\nexit status {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def install(self, *what: str, check: bool = True, **env: str) -> Any:
        pip = ["-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--no-index", "--ignore-installed"]
        return self.run(*pip, *what, check=check, **env)

    def evaluate(self, code: str, **env: str) -> Any:
        """What ``code`` leaves in ``result``, run in this environment."""
        done = self.run("-c", f"{code}\nimport json; print(json.dumps(result))", **env)
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def source_tree(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that copies the project; with ``built=True`` its objects too, so that nothing is compiled anew."""

    def copy(built: bool = False) -> Path:
        tree = tmp_path_factory.mktemp("tree") / "fastbert-source"
        shutil.copytree(ROOT, tree, ignore=NOT_OURS)
        for folder in (ROOT / "build").glob(f"ext-{sysconfig.get_platform()}-*") if built else ():
            with (folder / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # setup.py's: not in the middle of a build
                shutil.copytree(folder, tree / "build" / folder.name)
        return tree

    return copy


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    # Not by importlib.util.find_spec: setuptools takes a search for pip as a sign that distutils must not be its own.
    if not any((folder / "pip").is_dir() for folder in OUTER):
        pytest.skip("pip is not installed")
    return Environment(tmp_path / "venv")
