"""Registers, spills, stack and shared memory of every CUDA kernel, as the assembler reported them when it was built.

`make kernel-tables` writes the table to bench/results/kernels-cuda.json.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "bench" / "results" / "kernels-cuda.json"
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>sm_\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)


def reports() -> list[Path]:
    """What the assembler said, a file for each source."""
    return sorted((ROOT / "build").glob("ext-*/cuda/*.ptxas"))


def collect(files: list[Path]) -> dict[str, Any]:
    """{"nvcc": version, "kernels": {name: {arch: {"registers": ..., ...}}}}, in the order of the names."""
    found = [match for file in files for match in ENTRY.finditer(file.read_text())]
    names = sorted({match["name"] for match in found})
    filtered = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    readable = {name: short(text) for name, text in zip(names, filtered.stdout.splitlines(), strict=True)}
    kernels: dict[str, dict[str, Any]] = {}
    for match in found:
        entry = {key: int(match[key]) for key in ("registers", "stack")}
        entry |= {"spills": int(match["stores"]) + int(match["loads"])}
        kernels.setdefault(readable[match["name"]], {})[match["arch"]] = entry
    note = json.loads((ROOT / "fastbert" / "_build.json").read_text(encoding="utf-8"))
    ordered = {name: dict(sorted(kernels[name].items())) for name in sorted(kernels)}
    return {"nvcc": note.get("nvcc"), "kernels": ordered}


def short(name: str) -> str:
    """`void fastbert::cuda::(anonymous namespace)::kernel<(int)8>(arguments)` -> `kernel<8>`."""
    name = re.sub(r"void |fastbert::cuda::|\(anonymous namespace\)::|\((int|bool)\)", "", name)
    depth = 0
    for place, letter in enumerate(name):
        if letter == "(" and depth == 0:
            return name[:place]
        depth += {"<": 1, ">": -1}.get(letter, 0)
    return name


def main() -> None:
    table = collect(reports())
    if not table["kernels"]:
        raise SystemExit("no report of a build of the CUDA kernels is there: `fastbert info` says why")
    TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(f"{TABLE.relative_to(ROOT)}: {len(table['kernels'])} kernels")


if __name__ == "__main__":
    main()
