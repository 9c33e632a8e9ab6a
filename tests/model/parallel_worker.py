"""One of two processes that train together: ``python parallel_worker.py RANK FOLDER``.

FOLDER/given.pt holds a configuration, weights and a batch for DDP and for FSDP2, and which of DDP_SETTINGS to run; the
gradients go to FOLDER/RANK.pt. A process of its own, because a fork of one that has computed inherits OpenMP's locks
without the threads that hold them.
"""

from __future__ import annotations

import datetime
import itertools
import sys
from collections.abc import Callable
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


def of_logits(outputs: Any, batch: dict[str, Tensor]) -> Tensor:
    return outputs.logits[real(batch)].square().mean()


LOSSES: dict[str, Callable[[Any, dict[str, Tensor]], Tensor]] = {
    "loss": lambda outputs, batch: outputs.loss,
    "logits": of_logits,
    "both": lambda outputs, batch: outputs.loss + of_logits(outputs, batch),
}
# One of them, find_unused_parameters, static_graph.
DDP_SETTINGS = list(itertools.product(LOSSES, (False, True), (False, True)))


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def replicated(
    rank: int, config: Any, state: dict[str, Tensor], batch: dict[str, Tensor], settings: list[Any]
) -> dict[Any, Any]:
    """Gradients of two steps of a masked language model under DDP, each process with its half of the rows."""
    found = {}
    rows = {name: value[2 * rank : 2 * rank + 2] for name, value in batch.items()}
    for loss, find_unused_parameters, static_graph in settings:
        model = fastbert.BertForMaskedLM(config)
        model.load_state_dict(state)
        parallel = nn.parallel.DistributedDataParallel(
            model.train(), find_unused_parameters=find_unused_parameters, static_graph=static_graph
        )
        for step in (0, 1):
            model.zero_grad()
            LOSSES[loss](parallel(**rows), rows).backward()
            found[loss, find_unused_parameters, static_graph, step] = gradients_of(model)
        assert all_fast(model), str(fastbert.report(model))
    return found


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
    found = {name: gradient.full_tensor() for name, gradient in gradients_of(model).items()}
    report = fastbert.report(model)
    assert all_fast(model), str(report)
    assert all(entry["path"] == "fast" for entry in report.embeddings), str(report)
    return found


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
    found = replicated(rank, **given["ddp"]) | {"fsdp": sharded(rank, **given["fsdp"])}
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
