"""Launch configurations: the tile sizes, warps and stages that a Triton kernel runs with.

They come from tables, one JSON file an architecture beside this module, and are never searched for at import or in a
user's first step:

    {"attention_fwd": {"d64": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}, ...}, ...}

The inner key is the shape class, which each kernel's file names from the sizes at hand.

`fastbert bench tune` measures a table for one card, in a file of the user's ($FASTBERT_CONFIGS or
~/.cache/fastbert/configs). What is in it goes before the table of the architecture.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastbert._version import __version__

ARCHITECTURES = (80, 90, 100)  # compute capabilities, times ten, that have a table


class Case(NamedTuple):
    """One way in which a kernel can be launched, as `triton.compile` wants it.

    label: names it in tables. signature: argument name -> type ("*bf16", "i32", ...; "i32:16": a multiple of 16, as
    a stride is). constants: the constexpr arguments. options: those of OPTIONS. matrix: whether it
    multiplies matrices on tensor cores, for which its code for sm_90 has to use wgmma. together: how many programs a
    multiprocessor has to hold at once, for one to do its arithmetic while another multiplies matrices.
    """

    label: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    matrix: bool
    together: int = 1


FUSED = {"enable_fp_fusion": True}
"""A product and a sum become one instruction, unless a kernel writes tl.fma to keep a rounding. Every launch asks for
it by name: Triton 3.9 warns where none does, and later ones will not fuse then."""
OPTIONS = ("num_warps", "num_stages", "maxnreg", *FUSED)


def split(launch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The constexpr arguments and the options among what a kernel is launched with by name."""
    constants = {name: value for name, value in launch.items() if name not in OPTIONS}
    return constants, {name: value for name, value in launch.items() if name in OPTIONS}


def cdiv(number: int, divisor: int) -> int:
    """The quotient, rounded up. Triton's own takes microseconds, at every launch."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The least power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


@functools.cache
def architecture(device: torch.device) -> int:
    """The table that serves a device: of its compute capability, or the nearest below. The interpreter: the first.

    12.x gets that of 8.0: it has neither the tensor memory nor the shared memory of 10.0.
    """
    if device.type != "cuda":
        return ARCHITECTURES[0]
    major, minor = torch.cuda.get_device_capability(device)
    if major == 12:
        return 80
    return max((arch for arch in ARCHITECTURES if arch <= 10 * major + minor), default=ARCHITECTURES[0])


@functools.cache
def table(arch: int) -> dict[str, dict[str, dict[str, int]]]:
    """The whole table of an architecture: {kernel: {shape class: configuration}}."""
    return json.loads(Path(__file__).with_name(f"sm_{arch}.json").read_text(encoding="utf-8"))


def user_file(device_name: str) -> Path:
    """Where the measured table of a card is, if there is one."""
    folder = os.environ.get("FASTBERT_CONFIGS")
    if not folder:  # expanduser, as Path.home raises an error where nobody's home is known
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = os.path.join(cache, "fastbert", "configs")
    return Path(folder) / f"{re.sub('[^a-z0-9]+', '-', device_name.lower()).strip('-')}.json"


def read_user_file(path: Path) -> dict[str, dict[str, dict[str, int]]]:
    """The table that `fastbert bench tune` wrote, {} if there is none or another version of fastbert wrote it.

    Raises ValueError if the file is not such a table.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kernels, version = content["kernels"], content["fastbert"]
        for kernel, classes in kernels.items():
            for shape_class, config in classes.items():
                if not config or not all(type(value) is int and value > 0 for value in config.values()):
                    raise ValueError(f"{kernel}, {shape_class}: {config} is no launch configuration")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        advice = "delete it, or let `fastbert bench tune` write it again"
        raise ValueError(f"{path} holds no table of launch configurations ({error}); {advice}") from None
    return kernels if version == __version__ else {}


def tuned(device: torch.device) -> dict[str, dict[str, dict[str, int]]]:
    """The measured table of a card, {} if there is none or the device is no card."""
    return _tuned(torch.cuda.get_device_name(device)) if device.type == "cuda" else {}


@functools.cache
def _tuned(device_name: str) -> dict[str, dict[str, dict[str, int]]]:
    return read_user_file(user_file(device_name))


@functools.cache
def choose(kernel: str, shape_class: str, device: torch.device) -> dict[str, int]:
    """The configuration to launch with on this device, as keyword arguments of the kernel."""
    shipped = table(architecture(device))[kernel][shape_class]
    config = tuned(device).get(kernel, {}).get(shape_class, shipped)
    if config.keys() != shipped.keys():
        raise ValueError(
            f"the measured table gives {kernel}, {shape_class} the arguments {', '.join(config)}, "
            f"it takes {', '.join(shipped)}: let `fastbert bench tune` write it again"
        )
    used[kernel, shape_class] = config
    return config | FUSED


def fixed(kernels: str, **launch: int) -> dict[str, int]:
    """What small kernels are launched with on every card: they wait for memory, which few programs fill."""
    passes[kernels] = launch
    return launch | FUSED


passes: dict[str, dict[str, int]] = {}
"""What was given to `fixed`."""

used: dict[tuple[str, str], dict[str, int]] = {}
"""What this process has launched kernels with, by kernel and shape class."""


def describe(device: str | torch.device) -> dict[str, Any]:
    """{"tables": the files that serve a device, the first that has a kernel wins; "used": what was launched so far;
    "fixed": what small kernels are launched with on every card}."""
    device = torch.device(device)
    files = [f"sm_{architecture(device)}.json of fastbert {__version__}"]
    if tuned(device):
        files.insert(0, str(user_file(torch.cuda.get_device_name(device))))
    launched = {f"{kernel} {shape_class}": dict(config) for (kernel, shape_class), config in sorted(used.items())}
    return {"tables": files, "used": launched, "fixed": passes}
