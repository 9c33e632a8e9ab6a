"""Which implementation runs an op, and why the others did not.

Every op has a list of implementations under one signature (`fastbert.ops.<op>.implementations`), the preferred one
first. The first one that gives no reason against runs. FASTBERT_BACKEND, or an op's `backend` argument, forces one:

    FASTBERT_BACKEND=reference                      every op that has this implementation
    FASTBERT_BACKEND=attention:cpu,ffn:reference    these ops; the others choose for themselves

What is forced and cannot run raises. With a name for every op, an op that lacks this implementation chooses for itself,
and so does one that has it for a part of its calls (`Implementation.part`), in the rest of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import json
import os
import sysconfig
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastbert.internals import forward_mode

BACKENDS = ("cpu", "cuda", "triton", "vendor", "reference")
OPS = ("attention", "embedding", "ffn", "layernorm", "linear", "mlm_loss")


class Implementation(NamedTuple):
    """One way to run an op.

    name: one of BACKENDS. run: takes the op's checked arguments.
    supports(device_type, dtype, requires) gives None, or the reason why it cannot run these.
    off: why it runs only where it is forced, until `preferred` has a measurement of it, or None.
    part: what it is for, if that is but a part of the op's calls, or None.
    """

    name: str
    run: Callable[..., Any]
    supports: Callable[[str, torch.dtype, Any], str | None]
    off: str | None = None
    part: str | None = None


# A kernel that was compiled, and tested by running its source on the host, but that no GPU has run.
NEVER_RUN = "off unless forced: no GPU has run this kernel yet"

# Columns that the registers of a GPU's multiprocessor hold.
WIDEST = 8192

# What `fastbert bench gpu --preferred-from` read off a measurement: {"sm_90": {op: its backends, from fast to slow}}.
PREFERRED = Path(__file__).with_name("preferred.json")


_implementations: dict[str, dict[str, Implementation]] = {}
_selected: dict[tuple[Hashable, ...], Implementation] = {}

# os.environ.get encodes and decodes on every call, which is most of what a selection would cost.
_environment: Any = getattr(os.environ, "_data", os.environ)
_VARIABLE: Any = os.environ.encodekey("FASTBERT_BACKEND") if hasattr(os.environ, "_data") else "FASTBERT_BACKEND"


CUDA_LIBRARY = Path(__file__).with_name(f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}")
"""The CUDA kernels that this Python has built: a folder of sources may hold those of others too."""


def _load_extension() -> str | None:
    """Import `fastbert._C`, which registers the C++ ops. Gives the reason if that fails."""
    try:
        importlib.import_module("fastbert._C")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "fastbert._C":
            return f"not built ({_build_reason()})"
        return f"the C++ extension does not load: {error}"
    return None


def _load_cuda() -> str | None:
    """Load the library of the CUDA ops, which is apart from `fastbert._C`: no CPU op is lost if it fails."""
    if not CUDA_LIBRARY.exists():
        return f"not built ({_build_reason('cuda_reason')})"
    try:
        torch.ops.load_library(CUDA_LIBRARY)
    except OSError as error:
        return f"the library of the CUDA kernels does not load: {error}"
    return None


@functools.cache
def _build_note() -> dict[str, Any]:
    """What `setup.py` noted down of the build; {} where it left no note."""
    try:
        note: dict[str, Any] = json.loads(Path(__file__).with_name("_build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note


def cuda_build() -> dict[str, Any]:
    """What the CUDA kernels were built with: nvcc's version, the compute capabilities, CUTLASS's version or None."""
    return {name: _build_note().get(name) for name in ("nvcc", "cuda_archs", "cutlass")}


def _build_reason(key: str = "reason", unknown: str = "fastbert was installed without its C++ extension") -> str:
    """Why the build left the extension, or the CUDA kernels, out."""
    return _build_note().get(key) or unknown


def _settle_vector_math() -> None:
    """Have MKL choose its kernels of a BERT's and an optimizer's functions before two threads ask it at once.

    PyTorch's oneMKL chooses each function's kernel in its first call, and while one thread chooses, another may run
    one of low accuracy (1e-4) over its part: in about one process of a hundred, once (pytorch/pytorch#188792).
    """
    one = torch.ones(1, dtype=torch.float32, device="cpu")
    for function in (torch.tanh, torch.sqrt, torch.exp, torch.log, torch.erf):
        function(one)


extension_error: str | None = _load_extension()
cuda_error: str | None = _load_cuda()
_settle_vector_math()


def leaf(name: str) -> torch._ops.OpOverload | None:
    """The op `fastbert::<name>`, or None if nobody has registered it."""
    packet = getattr(torch.ops.fastbert, name, None)
    return None if packet is None else packet.default


def missing_leaf(name: str) -> str | None:
    """Why the op `fastbert::<name>` cannot be called, or None if it can."""
    if leaf(name) is not None:
        return None
    if not name.endswith("_cuda"):
        return extension_error or f"not built (the C++ extension has no op {name})"
    return (
        cuda_error or f"not built ({_build_reason('cutlass_reason', f'the library of CUDA kernels has no op {name}')})"
    )


def cpu_reason(missing: str | None, device_type: str, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the C++ kernels cannot run, for what is common to all ops: the device, the build, the dtypes."""
    if device_type != "cpu":
        return f"needs a tensor on cpu, this one is on {device_type}"
    if missing is not None:
        return missing
    for dtype in dtypes:
        if dtype is not torch.float32 and dtype is not torch.bfloat16:
            return f"has kernels for torch.float32 and torch.bfloat16, not {dtype}"
    return None


def cuda_reason(missing: str | None, device_type: str, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the CUDA kernels cannot run, for what is common to all ops: the build, the device, the dtypes."""
    if missing is not None:
        return missing
    if device_type != "cuda":
        where = f"needs a tensor on cuda, this one is on {device_type}"
        return where if torch.cuda.is_available() else "no CUDA device"
    archs = tuple(_build_note().get("cuda_archs", ()))
    return (
        _nvidia_reason()
        or _driver_reason(*_cuda_versions())
        or _arch_reason(archs, torch.cuda.get_device_capability(), *_cuda_versions())
        or _float_reason(dtypes)
    )


def triton_reason(device_type: str, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the Triton kernels cannot run, for what is common to all ops: the device, Triton, the dtypes."""
    if device_type == "cpu":
        if os.environ.get("TRITON_INTERPRET", "0") != "1":
            return "needs a tensor on cuda, this one is on cpu (TRITON_INTERPRET=1 interprets the kernels there)"
    elif device_type != "cuda":
        return f"needs a tensor on cuda, this one is on {device_type}"
    elif (reason := _nvidia_reason()) is not None:
        return reason
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return _float_reason(dtypes)


def triton_rows_reason(device_type: str, dtypes: tuple[torch.dtype, ...], columns: int) -> str | None:
    """`triton_reason` for the ops whose programs hold whole rows, of so many columns."""
    reason = triton_reason(device_type, dtypes)
    if reason is None and columns > WIDEST:
        return f"has kernels for rows of up to {WIDEST} columns, not {columns}"
    return reason


def _nvidia_reason() -> str | None:
    if torch.version.hip is not None or torch.cuda.get_device_capability() < (8, 0):
        return "needs an NVIDIA GPU of compute capability 8.0 or more"
    return None


@functools.cache
def _cuda_versions() -> tuple[int, int]:
    """Of CUDA, 13000 for 13.0: what the driver offers (0 without one), and what is linked into the kernels' library."""
    library = ctypes.CDLL(str(CUDA_LIBRARY))
    return library.fastbert_cuda_of_driver(), library.fastbert_cuda_of_library()


def _driver_reason(driver: int, needed: int) -> str | None:
    """Against the CUDA kernels: PyTorch's own CUDA may be older. A driver serves every release of its major version."""
    if driver // 1000 < needed // 1000:
        return f"was built for CUDA {needed // 1000}, the driver offers {driver // 1000}.{driver % 1000 // 10}"
    return None


def _arch_reason(archs: tuple[str, ...], capability: tuple[int, int], driver: int, library: int) -> str | None:
    """Against CUDA kernels that were compiled for none but `archs`, as FASTBERT_CUDA_ARCHS names them.

    Machine code serves GPUs of its major version from its minor one on, that of "90a" 9.0 alone. A driver compiles
    the last one's PTX for later GPUs, if it knows the CUDA that it came from.
    """
    here = 10 * capability[0] + capability[1]
    for arch in archs:
        number = int(arch.rstrip("af"))
        if number // 10 == capability[0] and (number == here if arch.endswith("a") else number <= here):
            return None
    built = f"was compiled for compute capability {', '.join(archs)}, this GPU has {here}"
    if archs and archs[-1].isdigit() and int(archs[-1]) <= here:
        if driver >= library:
            return None
        built += f", for which only a driver of CUDA {library // 1000}.{library % 1000 // 10} could compile it"
    return built if archs else None


def _float_reason(dtypes: tuple[torch.dtype, ...]) -> str | None:
    for dtype in dtypes:
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"has kernels for torch.float32, torch.bfloat16 and torch.float16, not {dtype}"
    return None


def always(device_type: str, dtype: torch.dtype, requires: Any) -> str | None:
    """`supports` of the reference."""
    return None


def register(op: str, implementations: tuple[Implementation, ...]) -> tuple[Implementation, ...]:
    """Make an op's implementations, the preferred first, known here."""
    _implementations[op] = {implementation.name: implementation for implementation in implementations}
    return implementations


def select(
    op: str, *, device: str | torch.device, dtype: torch.dtype, requires: Hashable = None, backend: str | None = None
) -> Implementation:
    """The implementation that runs `op`.

    device: the type of the inputs' device ("cpu", "cuda", ...), or the device. dtype: of the first input.
    requires: what else decides; attention: head_dim; ffn: whether all sizes are multiples of 8; layernorm and
        embedding: a tuple of the further operands' dtypes and the length of a row; linear: why Triton has no kernel.
    backend: forces one, before FASTBERT_BACKEND does.

    Raises ValueError if a name is unknown, RuntimeError with the reason if a forced backend cannot run.
    """
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"{op}: backend must be a string, got {type(backend).__name__}")
    if torch.compiler.is_compiling():  # which cannot trace a look at the environment
        return _implementations[op][_selected_name(op, device, dtype, requires, backend)]
    if forward_mode():  # autograd asks a kernel without a formula for it nothing, and the tangent would be 0
        if backend is None and not forced():
            backend = "reference"
        asked = _select(op, device, dtype, requires, backend)
        if asked.name != "reference":
            raise RuntimeError(f"{op}: the {asked.name} backend has no forward-mode differentiation; the reference has")
        return asked
    key = (op, device, dtype, requires, backend, _environment.get(_VARIABLE))
    found = _selected.get(key)
    if found is None:
        found = _selected[key] = _select(op, device, dtype, requires, backend)
    return found


@torch.compiler.assume_constant_result
def _selected_name(op: str, device: str | torch.device, dtype: torch.dtype, requires: Any, backend: str | None) -> str:
    return _select(op, device, dtype, requires, backend).name


def forced() -> bool:
    """Whether FASTBERT_BACKEND is set."""
    return bool(_environment.get(_VARIABLE))


def _device_type(device: str | torch.device) -> str:
    return device.type if isinstance(device, torch.device) else device.split(":")[0]


def _current(device: str | torch.device) -> contextlib.AbstractContextManager[object]:
    """In it this GPU is the current one, whose kind decides: a machine may have several kinds."""
    device = torch.device(device)
    here = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.device(device) if here else contextlib.nullcontext()


def _select(
    op: str, device: str | torch.device, dtype: torch.dtype, requires: Any, backend: str | None
) -> Implementation:
    with _current(device):
        return _select_on(op, _device_type(device), dtype, requires, backend)


def _select_on(op: str, device_type: str, dtype: torch.dtype, requires: Any, backend: str | None) -> Implementation:
    candidates = _candidates(op)
    forced, origin, alone = (backend, "the backend argument", True) if backend is not None else _forced(op)
    if forced is not None:
        if forced not in candidates:
            raise ValueError(f"{origin} asks for {op}:{forced}, allowed are {', '.join(candidates)}")
        reason = candidates[forced].supports(device_type, dtype, requires)
        if reason is None:
            return candidates[forced]
        if alone or candidates[forced].part is None:
            raise RuntimeError(f"{origin} forces {op}:{forced}, which cannot run: {reason}")
    for implementation in _ordered(op, device_type):
        off = _off(op, implementation, device_type)
        if off is None and implementation.supports(device_type, dtype, requires) is None:
            return implementation
    raise RuntimeError(f"{op}: no implementation runs on {device_type} in {dtype}")


@functools.cache
def _measured() -> dict[str, dict[str, list[str]]]:
    table: dict[str, dict[str, list[str]]] = json.loads(PREFERRED.read_text(encoding="utf-8"))
    return table


def preferred(op: str, device_type: str) -> list[str]:
    """The backends of an op that were measured on this kind of GPU, from fast to slow; [] if none was."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return []
    major, minor = torch.cuda.get_device_capability()
    measured = _measured().get(f"sm_{major}{minor}", {}).get(op, [])
    return [name for name in measured if name != "cuda" or _as_measured(op, (major, minor))]


def _as_measured(op: str, capability: tuple[int, int]) -> bool:
    """Whether the CUDA kernels here are those that a measurement is of: attention on 9.0 has others without CUTLASS."""
    if op != "attention" or capability != (9, 0):
        return True
    note = _build_note()
    return bool(note.get("cutlass")) and any(arch.startswith("90") for arch in note.get("cuda_archs", ()))


def _ordered(op: str, device_type: str) -> list[Implementation]:
    """Those that were measured come in the order of their speed, where the first of them would be."""
    found = _candidates(op)
    measured = [name for name in preferred(op, device_type) if name in found]
    order = iter(measured)
    return [found[next(order)] if name in measured else implementation for name, implementation in found.items()]


def _off(op: str, implementation: Implementation, device_type: str) -> str | None:
    """Why an implementation runs only where it is forced, or None."""
    return None if implementation.name in preferred(op, device_type) else implementation.off


def _candidates(op: str) -> dict[str, Implementation]:
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}, allowed are {', '.join(OPS)}")
    if op not in _implementations:
        importlib.import_module(f"fastbert.ops.{op}")
    return _implementations[op]


def _forced(op: str) -> tuple[str | None, str, bool]:
    """The backend that FASTBERT_BACKEND forces on an op, how to speak of it, and whether it names the op."""
    setting = os.environ.get("FASTBERT_BACKEND", "").strip()
    origin = f"FASTBERT_BACKEND={setting}"
    everywhere, single = parse(setting)
    if op in single:
        return single[op], origin, True
    return (everywhere if everywhere in _candidates(op) else None), origin, False


def parse(setting: str) -> tuple[str | None, dict[str, str]]:
    """Parse a value of FASTBERT_BACKEND into the backend for every op (or None) and those for single ops.

    Raises ValueError, naming what is allowed, if it is malformed or a name is unknown.
    """
    everywhere: str | None = None
    single: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in setting.split(","))):
        op, colon, backend = (text.strip() for text in part.partition(":"))
        if not colon:
            op, backend = "", op
        if op and op not in OPS:
            raise ValueError(f"FASTBERT_BACKEND={setting}: unknown op {op!r}, allowed are {', '.join(OPS)}")
        allowed = tuple(_candidates(op)) if op else BACKENDS
        if backend not in allowed:
            raise ValueError(
                f"FASTBERT_BACKEND={setting}: unknown backend {backend!r}{' for ' + op if op else ''}, "
                f"allowed are {', '.join(allowed)}"
            )
        if (op in single) if op else (everywhere is not None):
            raise ValueError(f"FASTBERT_BACKEND={setting}: {op or 'the backend for every op'} is given twice")
        if op:
            single[op] = backend
        else:
            everywhere = backend
    return everywhere, single


def _launches(op: str, device: str | torch.device) -> dict[str, Any]:
    from fastbert.kernels import configs  # type: ignore[import-not-found]

    told = configs.describe(device)
    kernels = (op, "mlm_transform") if op == "mlm_loss" else (op,)
    launched, fixed = ({k: v for k, v in told[kind].items() if k.startswith(kernels)} for kind in ("used", "fixed"))
    return {"tables": told["tables"], "launched": launched, "fixed": fixed}


def details_as_text(entry: dict[str, Any]) -> list[str]:
    """What an entry of `describe` says of the backend that runs, as lines."""
    lines = [f"for {entry['part']} alone; else {entry['otherwise'] or 'it raises'}"] if "part" in entry else []
    lines += [f"launch configurations from {', then '.join(entry['tables'])}"] if "tables" in entry else []
    for what, kind in (("launched", "launched"), ("on every card", "fixed")):
        for name, config in entry.get(kind, {}).items():
            lines.append(f"{what} {name}: " + ", ".join(f"{key} {value}" for key, value in config.items()))
    return lines


def describe(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    head_dim: int | None = None,
    ops: tuple[str, ...] = OPS,
) -> dict[str, dict[str, Any]]:
    """What each op would run on this device in this dtype: {op: {"backend": name, "rejected": {backend: reason}}}.

    Where the backend is for a part of the op's calls alone also "part", what that is, and "otherwise", the backend that
    runs the rest, or None if the rest raises because it is forced. Where the backend is triton also "tables", the files
    that launch configurations come from, the first of them going before the next, "launched": what this process has
    launched kernels of the op with, and "fixed": what small ones are launched with on every card.
    head_dim: the attention's head size, where it is known. Does not raise if a forced backend cannot run: then
    "backend" is None and "rejected" holds the reason. An invalid FASTBERT_BACKEND does raise ValueError.
    """
    with _current(device):
        return {op: _description(op, device, dtype, head_dim if op == "attention" else None) for op in ops}


def _description(op: str, device: str | torch.device, dtype: torch.dtype, requires: Any) -> dict[str, Any]:
    device_type = _device_type(device)
    forced, origin, alone = _forced(op)
    strict = forced is not None and (alone or _candidates(op)[forced].part is None)
    chosen: list[Implementation] = []
    rejected: dict[str, str] = {}
    for implementation in sorted(_ordered(op, device_type), key=lambda found: found.name != forced):
        name = implementation.name
        reason = implementation.supports(device_type, dtype, requires)
        if reason is not None:
            rejected[name] = reason
        elif strict and name != forced:
            rejected[name] = f"{origin} forces {forced}"
        elif name != forced and (off := _off(op, implementation, device_type)) is not None:
            rejected[name] = off
        elif chosen and chosen[-1].part is None:
            rejected[name] = f"not needed, {chosen[-1].name} comes first"
        else:
            chosen.append(implementation)
    backend, otherwise = [*(implementation.name for implementation in chosen), None, None][:2]
    described: dict[str, Any] = {"backend": backend, "rejected": rejected}
    if chosen and chosen[0].part is not None:
        described |= {"part": chosen[0].part, "otherwise": otherwise}
    if backend == "triton":
        described |= _launches(op, device)
    return described
