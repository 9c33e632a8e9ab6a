"""Commands of fastbert one after the other, in two processes, sharded, on a CPU: ``sharding_worker.py FOLDER PORT``.

FOLDER/commands.json holds them by name. What each process saw of each goes to FOLDER/RANK.json. The second process is a
fork of the first, as most of the time that they take is imports.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from matplotlib.figure import Figure
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fastbert.training.finetune
import fastbert.training.pretrain  # noqa: F401 - both before gc.freeze
from fastbert import ops, swapped
from fastbert.cli import main

seen: dict[str, Any] = {}


def watch_optimizer(optimizer: torch.optim.Optimizer, *unused: Any) -> None:
    """How many numbers this process updates, of how many, and whether every one of them is in a sharded tensor."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    seen["sharded"] = all(isinstance(weight, DTensor) and isinstance(weight.grad, DTensor) for weight in weights)
    seen["own"] = sum(weight.to_local().numel() for weight in weights if isinstance(weight, DTensor))
    seen["all"] = sum(weight.numel() for weight in weights)


mlm_loss = ops.mlm_loss


def watched_loss(hidden: torch.Tensor, labels: torch.Tensor, decoder: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    seen["losses"] += 1
    seen["decoder"] = [type(decoder).__name__, *decoder.shape]
    return mlm_loss(hidden, labels, decoder, *args, **kwargs)


def run(command: list[str]) -> dict[str, Any]:
    seen.clear()
    seen.update(losses=0)
    swapped.calls.update(fast=0, stock=0)
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            status: Any = main(command)
        except SystemExit as stopped:
            status = stopped.code
    return seen | {"status": status, "errors": errors.getvalue(), "calls": dict(swapped.calls)}


if __name__ == "__main__":
    folder, port = Path(sys.argv[1]), sys.argv[2]
    gc.freeze()
    other = os.fork()
    rank = "0" if other else "1"
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
    commands = json.loads((folder / "commands.json").read_text())
    torch.distributed.init_process_group("gloo")
    register_optimizer_step_pre_hook(watch_optimizer)
    ops.mlm_loss = watched_loss
    Figure.savefig = lambda figure, path, **options: path.touch()  # as in the tests' own process
    found = {"on CPUs": run(commands["whole"])}
    # accelerate shards where its backend is a GPU's, and FSDP2 itself works with any: here it gets gloo under the name
    # of a GPU's, and the device that would follow from the name.
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    for name, command in commands.items():
        found[name] = run(command)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
    if other:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
