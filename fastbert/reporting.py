"""What runs in a model, and why the rest does not."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fastbert import dispatch, families, guards, swapped


class Report:
    """What runs in a model, and why the rest does not. Prints as text.

    layers: [{"name", "path": "fast" | "stock", "reason"}], one entry a transformer layer; reason is None if fast.
    embeddings: the same, one entry an embeddings module of a family whose embeddings fastbert has.
    others: the same, one entry any other module (encoder, base model, head) that is stock because of a replaced method.
    ops: {op: {"backend", "rejected": {backend: reason}}}, for the device and dtype of the model's weights; see
        `fastbert.dispatch.describe`.
    calls: {"fast", "stock"}, the layer calls since `optimize`, without those inside torch.compile.
    cuda_graphs: [{"name", "reason", "held", "limit", "captured", "replayed", "dropped"}], one entry an encoder that was
        to use them; reason: why its last call did not, or None.
    """

    def __init__(
        self,
        layers: list[dict[str, Any]],
        ops: dict[str, Any],
        embeddings: list[dict[str, Any]],
        others: list[dict[str, Any]],
        cuda_graphs: list[dict[str, Any]],
        calls: dict[str, int],
    ):
        self.layers = layers
        self.ops = ops
        self.embeddings = embeddings
        self.others = others
        self.cuda_graphs = cuda_graphs
        self.calls = calls

    def as_dict(self) -> dict[str, Any]:
        """The attributes by name, "cuda_graphs" only where they were asked for: only what JSON can hold."""
        told = {name: value for name, value in vars(self).items() if value or name != "cuda_graphs"}
        return copy.deepcopy(told)

    def __str__(self) -> str:
        fast = sum(layer["path"] == "fast" for layer in self.layers)
        lines = [f"{fast} of {len(self.layers)} layers fast; calls so far: {self.calls['fast']} fast"]
        lines[0] += f", {self.calls['stock']} stock"
        for entry in (*self.layers, *self.embeddings, *self.others):
            lines.append(f"  {entry['name']}: {entry['path']}" + (f", {entry['reason']}" if entry["reason"] else ""))
        for graphs in self.cuda_graphs:
            lines.append(
                f"{graphs['name']}: {graphs['replayed']} calls by CUDA graphs, {graphs['captured']} captured, "
            )
            lines[-1] += f"{graphs['held']} of {graphs['limit']} held, {graphs['dropped']} dropped to make room"
            lines += [f"  not the last call: {graphs['reason']}"] if graphs["reason"] else []
        for op, run in self.ops.items():
            lines.append(f"{op}: {run['backend'] or 'nothing can run'}")
            lines += [f"  {line}" for line in dispatch.details_as_text(run)]
            lines += [f"  not {backend}: {reason}" for backend, reason in run["rejected"].items()]
        return "\n".join(lines)

    __repr__ = __str__


def report(model: nn.Module) -> Report:
    """What runs in `model`: per layer the fast path or the stock one and why, per op the implementation.

    A layer counts as stock if something in it speaks against the fast path now, or if its last call was stock.
    Raises TypeError if model is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: model must be a torch.nn.Module, got {type(model).__qualname__}")
    layers: list[dict[str, Any]] = []
    embeddings: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    cuda_graphs: list[dict[str, Any]] = []
    calls = {"fast": 0, "stock": 0}
    head_dim, like = None, None
    for name, module in model.named_modules():
        role = families.role_of(module)
        if isinstance(module, swapped.FastLayer):
            role = "layer"  # whatever the name of a class on top of ours
        if role == "encoder" and isinstance(module, swapped.Fast) and module._fastbert.graphs is not None:
            cuda_graphs.append({"name": name, **module._fastbert.graphs.as_dict()})
        if role not in ("layer", "embeddings"):
            reason = guards.replaced_method(module.stock) if isinstance(module, swapped.Fast) else None
            others += [{"name": name or "model", "path": "stock", "reason": reason}] if reason else []
            continue
        if not isinstance(module, swapped.Fast):
            reason = "fastbert.optimize has not been called"
        else:
            state = module._fastbert
            reason = module.static_reason() or state.reason
            if reason is None and "forward" in vars(module) and not state.fast:
                reason = "its forward was replaced before fastbert.optimize was called"
        entry = {"name": name, "path": "fast" if reason is None else "stock", "reason": reason}
        (layers if role == "layer" else embeddings).append(entry)
        if isinstance(module, swapped.FastLayer):
            calls["fast"] += module._fastbert.fast
            calls["stock"] += module._fastbert.stock
            like = like if like is not None else next(module.parameters(), None)
            head_dim = head_dim or getattr(module.resolve(), "head_dim", None)
    like = like if like is not None else next(model.parameters(), None)
    device, dtype = ("cpu", torch.float32) if like is None else (like.device, like.dtype)
    return Report(layers, dispatch.describe(device, dtype, head_dim=head_dim), embeddings, others, cuda_graphs, calls)
