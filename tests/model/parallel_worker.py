"""One of two processes that train together: ``python parallel_worker.py RANK FOLDER``.

FOLDER/given.pt holds a configuration, weights and a batch for DDP and for FSDP2; the gradients go to FOLDER/RANK.pt. A
process of its own, because a fork of one that has computed inherits OpenMP's locks without the threads that hold them.
"""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Any

import torch
from comparison import all_fast, real
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastbert
from fastbert import swapped

PROCESSES = 2


def replicated(rank: int, config: Any, state: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the mean MLM loss under DDP, each process with its half of the rows."""
    model = fastbert.BertForMaskedLM(config)
    model.load_state_dict(state)
    parallel = nn.parallel.DistributedDataParallel(model.train())
    rows = slice(2 * rank, 2 * rank + 2)
    parallel(**{name: value[rows] for name, value in batch.items()}).loss.backward()
    assert all_fast(model), str(fastbert.report(model))
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def sharded(rank: int, config: Any, state: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the hidden states' sum of squares under FSDP2, both processes with all of the rows."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    model = fastbert.BertModel(config)
    model.load_state_dict(state)
    for layer in model.train().encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert not swapped.all_stock(model.encoder), "else the first call would not be packed"
    model(**batch)[0][real(batch)].square().sum().backward()
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    report = fastbert.report(model)
    assert all_fast(model), str(report)
    assert all(entry["path"] == "fast" for entry in report.embeddings), str(report)
    return gradients


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    given = torch.load(folder / "given.pt", weights_only=False)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=60),
    )
    found = {"ddp": replicated(rank, **given["ddp"]), "fsdp": sharded(rank, **given["fsdp"])}
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
