"""Which checkpoints of a run are complete.

HF Trainer writes a checkpoint file by file into its final folder, ``trainer_state.json`` last, so a process that is
killed leaves a folder that looks like a checkpoint. The checks here read only file headers and directories.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

_NAME = re.compile(r"^checkpoint-(\d+)$")
TRAINER_STATE = "trainer_state.json"
MAX_HEADER = 100_000_000  # safetensors' own limit


def safetensors_problem(path: Path) -> str | None:
    """What is wrong with a safetensors file as far as its header and size tell; None if nothing."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                return f"{path.name} is truncated or not a safetensors file"
            header = json.loads(file.read(length))
        wanted = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{path.name} has a broken header"
    if size != 8 + length + wanted:
        return f"{path.name} is truncated ({size} bytes where its header says {8 + length + wanted})"
    return None


def _torch_file_problem(path: Path) -> str | None:
    # torch.save writes a zip archive, whose directory comes last.
    if not path.is_file():
        return f"{path.name} is missing"
    if not zipfile.is_zipfile(path):
        return f"{path.name} is truncated"
    return None


def checkpoint_problem(folder: str | os.PathLike[str], *, resumable: bool = True) -> str | None:
    """Why a checkpoint folder cannot be used, or None if it is complete.

    ``resumable`` asks for optimizer, scheduler and random state too, as written unless ``--save_only_model`` is given.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return "no such folder"
    try:
        state = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
        if not isinstance(state, dict) or "global_step" not in state:
            return f"{TRAINER_STATE} is incomplete"
    except FileNotFoundError:
        return f"{TRAINER_STATE}, which is written last, is missing"
    except (OSError, ValueError):
        return f"{TRAINER_STATE} is truncated"
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weights = {folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (ValueError, KeyError, AttributeError):
            return f"{index.name} is truncated"
    else:
        weights = {folder / "model.safetensors"}
    for path in sorted(weights):
        if not path.is_file():
            return f"{path.name} is missing"
        if problem := safetensors_problem(path):
            return problem
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "config.json is missing or truncated"
    if resumable:
        rng_states = sorted(folder.glob("rng_state*.pth")) or [folder / "rng_state.pth"]
        # accelerate gathers sharded weights and optimizers (FSDP) into files of its own.
        sharded = ["pytorch_model_fsdp.bin", "optimizer.bin"]
        training = sharded if any((folder / name).exists() for name in sharded) else ["optimizer.pt"]
        for path in [*(folder / name for name in training), folder / "scheduler.pt", *rng_states]:
            if problem := _torch_file_problem(path):
                return problem
    return None


def checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The checkpoint folders of a run, complete or not, oldest first."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.match(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found)]


def last_complete(output_dir: str | os.PathLike[str], *, resumable: bool = True, remove: bool = True) -> Path | None:
    """The newest complete checkpoint, or None.

    With ``remove``, incomplete ones are named on stderr and removed: HF Trainer would count them among those to keep.
    """
    best = None
    for path in checkpoints(output_dir):
        if problem := checkpoint_problem(path, resumable=resumable):
            if remove:
                print(f"{path}: incomplete checkpoint removed: {problem}", file=sys.stderr)
                shutil.rmtree(path, ignore_errors=True)
        else:
            best = path
    return best
