"""``fastbert bench kernels``: what the GPU kernels become, without a GPU.

Every way in which a Triton kernel can be launched (`cases(arch)` of each file of fastbert.kernels) is compiled to
machine code, which is read: registers, stack, local memory, shared memory, matrix instructions, and from that how many
programs a multiprocessor holds. A kernel that spills, that asks for more shared memory than the GPU has, that leaves no
room for the programs which are to work beside it, or that multiplies matrices on sm_90 without wgmma (HGMMA in
machine code), or elsewhere without any matrix instruction, is an error, and so is machine code that touches a running
wgmma's registers (`wgmma`). Where the assembler makes such products wait for one another, the table says so:
`serialized`.
"""

import argparse
import contextlib
import functools
import importlib
import io
import itertools
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from . import report, wgmma

SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a block can have where a table is used (CUDA C++ Programming Guide).

8.0 has 163 KiB, but its table serves 8.6, 8.9 and 12.x too.
"""

PROCESSOR = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
"""Bytes of shared memory that the blocks on one multiprocessor of that compute capability have together."""

MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "IMMA", "QGMMA", "UTCQMMA", "DMMA")
"""Matrix instructions in machine code: mma.sync, wgmma (sm_90), tcgen05 (sm_100), and those of other types."""

FILE = "kernels-triton.json"

JOBS = 2
"""Compilers at once; each needs up to a GB of memory."""


class Code(NamedTuple):
    """One function of machine code. stack: bytes a thread. shared: bytes a block that are fixed in the code.

    Counts of instructions: local: reads and writes of local memory. loads, stores: of global memory, loads_128 and
    stores_128 of them sixteen bytes a thread. matrix: by their kind. serialized: whether every wgmma is waited for
    before the next one, as the assembler has it where it cannot tell what becomes of their registers. touched: what
    `wgmma.problems` says.
    """

    registers: int
    stack: int
    shared: int
    local: int
    matrix: dict[str, int]
    loads: int
    loads_128: int
    stores: int
    stores_128: int
    serialized: bool
    touched: list[str]


class Task(NamedTuple):
    """Case number `index` of `cases(arch)` of a module; JIT functions themselves do not go into another process."""

    module: str
    arch: int
    index: int


def dump(what: str, binary: Path, tools: Path) -> str:
    """What cuobjdump tells of a cubin, object or library. tools: the folder of cuobjdump and nvdisasm."""
    command = [str(tools / "cuobjdump"), what, str(binary)]
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def listings(binary: Path, tools: Path) -> dict[str, str]:
    """The machine code of every function, as text."""
    bodies = re.split(r"Function : (\S+)", dump("--dump-sass", binary, tools))
    return dict(zip(bodies[1::2], bodies[2::2], strict=True))


def instructions(listing: str) -> list[str]:
    """The instructions of a function, without their operands, in order."""
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", listing)


def read(binary: Path, tools: Path) -> dict[str, Code]:
    """Every function in a cubin, object or library. tools: the folder of cuobjdump and nvdisasm."""
    usage = re.findall(
        r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", dump("--dump-resource-usage", binary, tools)
    )
    bodies = listings(binary, tools)
    found = {}
    for name, registers, stack, shared in usage:
        opcodes = instructions(bodies[name])
        kinds = [opcode.split(".")[0] for opcode in opcodes]
        loads = [opcode for opcode, kind in zip(opcodes, kinds, strict=True) if kind in ("LDG", "LDGSTS")]
        stores = [opcode for opcode, kind in zip(opcodes, kinds, strict=True) if kind == "STG"]
        found[name] = Code(
            registers=int(registers),
            stack=int(stack),
            shared=int(shared),
            local=kinds.count("LDL") + kinds.count("STL"),
            matrix={kind: kinds.count(kind) for kind in MATRIX if kind in kinds},
            loads=len(loads),
            loads_128=sum(".128" in opcode for opcode in loads),
            stores=len(stores),
            stores_128=sum(".128" in opcode for opcode in stores),
            serialized=_serialized(opcodes),
            touched=wgmma.problems(bodies[name]),
        )
    return found


def _serialized(opcodes: Sequence[str]) -> bool:
    steps = [opcode for opcode in opcodes if opcode.startswith(("HGMMA", "WARPGROUP.DEPBAR"))]
    products = [place for place, opcode in enumerate(steps) if opcode.startswith("HGMMA")]
    return len(products) > 1 and all(after - before > 1 for before, after in itertools.pairwise(products))


def resident(code: Code, arch: int, shared: int, warps: int) -> int:
    """How many programs of `warps` warps and `shared` bytes of shared memory one multiprocessor holds at once."""
    registers = -(-code.registers // 8) * 8 * 32 * warps  # handed out by eight a thread
    return min(65536 // registers, PROCESSOR[arch] // (shared + 1024), 64 // warps)  # CUDA keeps 1 KiB a program


def problems(code: Code, arch: int, shared: int, warps: int, matrix: bool, together: int = 1) -> list[str]:
    """What is wrong with a kernel that launches with `warps` warps and `shared` bytes of shared memory.

    matrix, together: see `configs.Case`.
    """
    found = []
    if code.stack or code.local:
        found.append(f"spills: {code.stack} bytes of stack, {code.local} reads and writes of local memory")
    if shared > SHARED_LIMIT[arch]:
        found.append(f"needs {shared} bytes of shared memory, sm_{arch} has {SHARED_LIMIT[arch]}")
    elif (held := resident(code, arch, shared, warps)) < together:
        found.append(f"a multiprocessor holds {held} of the {together} programs that work side by side")
    if matrix and arch == 90 and "HGMMA" not in code.matrix:
        found.append("multiplies matrices without HGMMA")
    elif matrix and not code.matrix:  # as where more than the 512 columns of tensor memory of sm_100 are needed
        found.append("multiplies matrices without matrix instructions: the compiler has put a trap in its place")
    return found + code.touched


def modules() -> list[Any]:
    """The files of fastbert.kernels."""
    import fastbert.kernels

    found = pkgutil.iter_modules(fastbert.kernels.__path__, "fastbert.kernels.")
    return [importlib.import_module(item.name) for item in found if not item.ispkg]


@functools.cache
def cases(module: str, arch: int) -> list[Any]:
    """The cases that a module offers. Raises ValueError if two of them have one name."""
    found = list(importlib.import_module(module).cases(arch))
    counts = Counter((case.kernel.__name__, case.label) for case in found)
    if doubled := [" ".join(pair) for pair, count in counts.items() if count > 1]:
        raise ValueError(f"{module}: cases({arch}) has more than one {', '.join(doubled)}")
    return found


def tasks(module: str, arch: int) -> list[Task]:
    """The cases of a module that are compiled: one in float16 only if the same in bfloat16 is not there.

    The two become the same code but for the type in the names of instructions, and they are half of the work.
    """
    chosen: dict[str, int] = {}
    for wanted in ("*bf16", "*fp16", None):
        for index, case in enumerate(cases(module, arch)):
            types = set(case.signature.values())
            if wanted in types or (wanted is None and not types & {"*bf16", "*fp16"}):
                same = {name: kind.replace("*fp16", "*bf16") for name, kind in case.signature.items()}
                chosen.setdefault(repr((case.kernel.__name__, same, case.constants, case.options)), index)
    return [Task(module, arch, index) for index in sorted(chosen.values())]


def without_cases(arch: int) -> list[str]:
    """The kernels (jitted functions called ``_..._kernel``) that no file has a case for."""
    from triton.runtime.jit import JITFunction

    files = modules()
    offered = {case.kernel.fn for file in files if hasattr(file, "cases") for case in cases(file.__name__, arch)}
    return sorted(
        {
            f"{value.fn.__module__}.{name}"
            for file in files
            for name, value in vars(file).items()
            if isinstance(value, JITFunction) and name.endswith("_kernel") and value.fn not in offered
        }
    )


def specialised(signature: dict[str, str]) -> tuple[dict[str, str], dict[tuple[int, ...], list[list[Any]]]]:
    """Types without their hints, and the hints as the compiler wants them, by the argument's place.

    "i32:16" is a number that 16 divides. Pointers are taken to be aligned to 16 bytes, as those of tensors are.
    """
    types, hints = {}, {}
    for place, (name, text) in enumerate(signature.items()):
        kind, _, divisor = text.partition(":")
        if divisor not in ("", "16"):
            raise ValueError(f"{name} has the type {text!r}: after the colon only 16 is allowed")
        types[name] = kind
        if divisor or kind.startswith("*"):
            hints[(place,)] = [["tt.divisibility", 16]]
    return types, hints


def compile_case(task: Task) -> dict[str, Any]:
    """Compile one case and read what it became. If it does not compile, the row says so in `problems`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastbert.kernels import configs

    case = cases(task.module, task.arch)[task.index]
    op, kernel = task.module.rpartition(".")[2], case.kernel.__name__
    places = {name: "constexpr" if name in case.constants else case.signature[name] for name in case.kernel.arg_names}
    types, hints = specialised(places)
    source = ASTSource(case.kernel, types, dict(case.constants), hints)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # where Triton prints a whole program that ptxas refuses
            options = configs.FUSED | dict(case.options)
            done = triton.compile(source, target=GPUTarget("cuda", task.arch, 32), options=options)
    except Exception as error:  # whatever the compiler raises
        text = f"does not compile: {type(error).__name__}: {str(error)[-600:]}"
        return {"op": op, "kernel": kernel, "case": case.label, "arch": task.arch, "problems": [text]}
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(done.asm["cubin"])
        code = read(cubin, triton_tools())[kernel]
    shared, warps = done.metadata.shared, case.options["num_warps"]
    counts = {key: value for key, value in code._asdict().items() if key != "touched"}  # which is in `problems`
    return {
        "op": op,
        "kernel": kernel,
        "case": case.label,
        "arch": task.arch,
        **counts,
        "shared": shared,
        "resident": resident(code, task.arch, shared, warps),
        "problems": problems(code, task.arch, shared, warps, case.matrix, case.together),
    }


def compile_all(
    wanted: Sequence[Task], jobs: int = JOBS, progress: Callable[[str], None] = lambda text: None
) -> list[dict[str, Any]]:
    """The rows of these tasks, in their order. A compiler that crashes takes its process down and nothing else."""
    rows: dict[Task, dict[str, Any]] = {}
    crashed: list[Task] = []
    context = multiprocessing.get_context("spawn")

    def collect(pool: ProcessPoolExecutor, some: Iterable[Task], broken: Callable[[Task], None]) -> None:
        running: dict[Future[dict[str, Any]], Task] = {pool.submit(compile_case, task): task for task in some}
        for future in as_completed(running):
            task = running[future]
            try:
                rows[task] = future.result()
            except BrokenProcessPool:
                broken(task)
                continue
            progress(f"{len(rows)}/{len(wanted)} {rows[task]['kernel']} {rows[task]['case']} sm_{task.arch}")

    def give_up(task: Task) -> None:
        case = cases(task.module, task.arch)[task.index]
        op, kernel = task.module.rpartition(".")[2], case.kernel.__name__
        text = "does not compile: the compiler crashed"
        rows[task] = {"op": op, "kernel": kernel, "case": case.label, "arch": task.arch, "problems": [text]}

    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        collect(pool, wanted, crashed.append)
    for task in crashed:  # all that were waiting when one of them crashed: each in a process of its own
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            collect(pool, [task], give_up)
    return [rows[task] for task in wanted]


def triton_tools() -> Path:
    """The folder of the cuobjdump and nvdisasm that come with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def versions() -> dict[str, str]:
    """Of Triton and its assemblers: what the numbers depend on besides the kernels."""
    import triton

    found = {"triton": triton.__version__}
    for name in ("ptxas", "ptxas-blackwell"):
        told = subprocess.run([str(triton_tools() / name), "--version"], capture_output=True, text=True).stdout
        release = re.search(r"V(\d[\d.]*)", told)
        found[name] = release[1] if release else "unknown"
    return found


def result(command: str, tools: dict[str, str], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of a file: no time and no commit, so that it changes only where a kernel does."""
    return {"schema": report.SCHEMA, "command": command, "versions": tools, "rows": rows}


def write(content: dict[str, Any], path: Path) -> None:
    """Writes JSON with one line a row."""
    rows = ",\n".join("  " + json.dumps(item) for item in content["rows"])
    head = json.dumps({**content, "rows": None}, indent=1)
    report.write_text(head.replace('"rows": null', f'"rows": [\n{rows}\n ]' if rows else '"rows": []') + "\n", path)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text, problems below."""
    head = ["kernel", "case", "sm", "registers", "stack", "local", "shared", "resident"]
    head += ["128-bit loads", "128-bit stores", "matrix instructions"]
    body = []
    for item in rows:
        cells = [item["kernel"].strip("_").removesuffix("_kernel"), item["case"], str(item["arch"])]
        if "registers" in item:
            cells += [str(item[key]) for key in ("registers", "stack", "local", "shared", "resident")]
            cells += [f"{item[f'{kind}_128']}/{item[kind]}" for kind in ("loads", "stores")]
            matrix = " ".join(f"{count} {name}" for name, count in item["matrix"].items()) or "-"
            cells.append(matrix + " serialized" * item["serialized"])
        else:
            cells += ["-"] * 8
        body.append(cells)
    lines = report.columns([head, *body], left=2)
    bad = [item for item in rows if item["problems"]]
    lines += [f"{len(rows)} compiled" if not bad else f"{len(bad)} of {len(rows)} are not as they should be:"]
    lines += [f"  {name(item)}: {problem}" for item in bad for problem in item["problems"]]
    return "\n".join(lines)


def name(item: dict[str, Any]) -> str:
    """A row in one phrase."""
    return f"{item['kernel']} {item['case']} sm_{item['arch']}"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="fastbert bench kernels",
        description="Compiles every Triton kernel in every configuration that can be chosen, needs no GPU, and shows "
        "registers, spills, shared memory and matrix instructions. Status 1 if a kernel is not as it should be.",
    )
    top.add_argument("--op", default=None, metavar="A,B", help="files of fastbert.kernels (default: all)")
    top.add_argument("--arch", default=None, metavar="A,B", help="e.g. 80,90 (default: all that have a table)")
    top.add_argument("--jobs", type=int, default=JOBS, help=f"compilers at once (default: {JOBS})")
    top.add_argument(
        "--output",
        type=Path,
        default=Path("bench/results"),
        metavar="DIR",
        help=f"for {FILE}, unless only some are compiled",
    )
    return top


def _chosen(given: str | None, allowed: Sequence[str], flag: str) -> list[str]:
    if given is None:
        return list(allowed)
    wanted = [part.strip() for part in given.split(",") if part.strip()]
    if not wanted or set(wanted) - set(allowed):
        raise ValueError(f"{flag} has {given!r}; it may have: {', '.join(allowed) or 'nothing, there are no kernels'}")
    return wanted


def main(argv: Sequence[str] | None = None) -> int:
    """Status: 0 all well, 1 a kernel is not as it should be, 2 wrong usage."""
    arguments = parser().parse_args(argv)
    try:
        if os.environ.get("TRITON_INTERPRET", "0") == "1":
            raise ValueError("TRITON_INTERPRET=1 is set: nothing is compiled then; unset it")
        if arguments.jobs < 1:
            raise ValueError(f"--jobs is {arguments.jobs}; it must be 1 or more")
        try:
            from fastbert.kernels import configs
        except ModuleNotFoundError as error:
            raise ValueError(f"{error} (pip install triton)") from None
        known = {file.__name__.rpartition(".")[2]: file.__name__ for file in modules() if hasattr(file, "cases")}
        chosen = [known[op] for op in _chosen(arguments.op, list(known), "--op")]
        arches = [int(arch) for arch in _chosen(arguments.arch, [str(a) for a in configs.ARCHITECTURES], "--arch")]
        wanted = [task for module in chosen for arch in arches for task in tasks(module, arch)]
        for arch in arches:
            if missing := without_cases(arch):
                raise ValueError(f"no file of fastbert.kernels has cases({arch}) for {', '.join(missing)}")
    except ValueError as error:
        print(f"fastbert bench kernels: {error}", file=sys.stderr)
        return 2
    progress = report.progress("kernels")
    rows = compile_all(wanted, arguments.jobs, progress)
    progress("")
    print(table(rows))
    if arguments.op is None and arguments.arch is None:
        write(result("kernels", versions(), rows), arguments.output / FILE)
        print(f"results: {arguments.output / FILE}")
    return 1 if any(item["problems"] for item in rows) else 0
