"""Launch configurations: the tile sizes, warps and stages that a Triton kernel runs with.

They come from calibrated tables, one JSON file an architecture beside this module, and are never searched for at import
or in a user's first step:

    {"attention_fwd": {"d64-long": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}, ...}, ...}

The inner key is the shape class, which each kernel's file names from the sizes at hand.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

ARCHITECTURES = (80, 90, 100)  # compute capabilities, times ten, that have a table


class Case(NamedTuple):
    """One way in which a kernel can be launched, as `triton.compile` wants it.

    label: names it in tables. signature: argument name -> type ("*bf16", "i32", ...; "i32:16": a multiple of 16, as
    a stride is). constants: the constexpr arguments. options: num_warps, num_stages. matrix: whether it multiplies
    matrices in 16 bit, so that its code for sm_90 has to use wgmma.
    """

    label: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    matrix: bool


def architecture(device: torch.device) -> int:
    """The table that serves a device: of its compute capability, or the nearest below. The interpreter: the first."""
    if device.type != "cuda":
        return ARCHITECTURES[0]
    major, minor = torch.cuda.get_device_capability(device)
    return max((arch for arch in ARCHITECTURES if arch <= 10 * major + minor), default=ARCHITECTURES[0])


@functools.cache
def table(arch: int) -> dict[str, dict[str, dict[str, int]]]:
    """The whole table of an architecture: {kernel: {shape class: configuration}}."""
    return json.loads(Path(__file__).with_name(f"sm_{arch}.json").read_text(encoding="utf-8"))


def choose(kernel: str, shape_class: str, arch: int) -> dict[str, int]:
    """The configuration to launch with, as keyword arguments of the kernel."""
    return table(arch)[kernel][shape_class]
