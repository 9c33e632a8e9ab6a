"""Inference contestants that run in PyTorch: Hugging Face with its attentions, torch.compile of it, and fastbert."""

from typing import Any

import torch

from .contestants import TRUTH
from .workloads import SEED, Workload


def build_model(cls_name: str, workload: Workload, attention: str, **config: Any) -> torch.nn.Module:
    """A transformers class with the workload's weights; what the checkpoint lacks is drawn from ``SEED``."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cls = getattr(transformers, cls_name)
    torch.manual_seed(SEED)
    if "path" in workload.model:
        return cls.from_pretrained(workload.model["path"], attn_implementation=attention, **config)
    return cls(transformers.BertConfig(**workload.model["config"], attn_implementation=attention, **config))


def real_tokens(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """``hidden`` [B, S, H] at the places where ``mask`` [B, S] is 1: [T, H]."""
    return hidden.reshape(-1, hidden.shape[-1]) if mask is None else hidden[mask.bool()]


class HuggingFace:
    """transformers' BertModel with eager or sdpa attention; gets no mask when the batch is full."""

    def __init__(self, name: str, workload: Workload) -> None:
        attention = "sdpa" if name.endswith("sdpa") else "eager"
        self.inputs = dict(workload.inputs)
        self.model = build_model("BertModel", workload, attention).eval()
        if name == TRUTH:
            self.model.double()
        self.call: Any = self.model

    @torch.inference_mode()
    def run(self) -> torch.Tensor:
        return self.call(**self.inputs).last_hidden_state

    def outputs(self) -> dict[str, torch.Tensor]:
        return {"last_hidden_state": real_tokens(self.run(), self.inputs.get("attention_mask"))}

    def details(self) -> dict[str, Any]:
        return {}


class Compiled(HuggingFace):
    """torch.compile (Inductor, static shapes) of the sdpa model. Compiling is not timed."""

    def __init__(self, name: str, workload: Workload) -> None:
        super().__init__("hf-sdpa", workload)
        self.call = torch.compile(self.model, dynamic=False)


class FastBert(HuggingFace):
    """The same model after ``fastbert.optimize``."""

    def __init__(self, name: str, workload: Workload) -> None:
        import fastbert

        super().__init__("hf-sdpa", workload)
        self.call = self.model = fastbert.optimize(self.model)

    def details(self) -> dict[str, Any]:
        return fastbert_details(self.model)


def fastbert_details(model: torch.nn.Module) -> dict[str, Any]:
    """Which paths and backends ran, and a note if any layer or op did not take the fast one."""
    import fastbert

    report = fastbert.report(model).as_dict()
    stock = [layer for layer in report["layers"] if layer["path"] != "fast"]
    slow = sorted(op for op, item in report["ops"].items() if item["backend"] == "reference")
    notes = []
    if stock:
        notes.append(f"{len(stock)} of {len(report['layers'])} layers on the stock path ({stock[0]['reason']})")
    if slow:
        notes.append(f"on the reference: {', '.join(slow)}")
    return {"report": report, "note": "; ".join(notes)}
