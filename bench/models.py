"""Inference contestants that run in PyTorch: Hugging Face with its attentions, torch.compile of it, and fastbert."""

from typing import Any

import torch

from .contestants import TRUTH
from .workloads import SEED, Workload


def build_model(cls_name: str, workload: Workload, attention: str, **config: Any) -> torch.nn.Module:
    """A transformers class with the workload's weights; what the checkpoint lacks is drawn from ``SEED``.

    On the device and in the dtype of the workload's facts: the CPU and float32 unless they say otherwise.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cls = getattr(transformers, cls_name)
    device, dtype = workload.facts.get("device", "cpu"), getattr(torch, workload.facts.get("dtype", "float32"))
    torch.manual_seed(SEED)
    if "path" in workload.model:
        model = cls.from_pretrained(workload.model["path"], attn_implementation=attention, **config)
    else:
        with torch.device(device):  # large random weights are drawn where they are needed
            model = cls(transformers.BertConfig(**workload.model["config"], attn_implementation=attention, **config))
    return model.to(device, dtype)


def real_tokens(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """``hidden`` [B, S, H] at the places where ``mask`` [B, S] is 1: [T, H]."""
    return hidden.reshape(-1, hidden.shape[-1]) if mask is None else hidden[mask.bool()]


class HuggingFace:
    """transformers' BertModel with eager or sdpa attention; gets no mask when the batch is full.

    ``training.Training`` over it makes it a training step, as it does with those below.
    """

    @property
    def exact(self) -> tuple[torch.dtype, str]:
        """The dtype and the attention of the truth, which has the same weights as the others."""
        return torch.float64, "eager"

    def __init__(self, name: str, workload: Workload) -> None:
        self.workload = workload
        device = workload.facts.get("device", "cpu")
        self.inputs = {key: value.to(device) for key, value in workload.inputs.items()}
        exact = name == TRUTH
        self.model = self.build(self.exact[1] if exact else "sdpa" if "sdpa" in name else "eager")
        if exact:
            self.model.to(self.exact[0])
        self.prepare()
        self.call: Any = self.model

    def build(self, attention: str) -> torch.nn.Module:
        return build_model("BertModel", self.workload, attention).eval()

    def prepare(self) -> None:
        """What else a run needs, once the model has its dtype."""

    @torch.inference_mode()
    def run(self) -> Any:
        return self.call(**self.inputs).last_hidden_state

    def outputs(self) -> dict[str, torch.Tensor]:
        return {"last_hidden_state": real_tokens(self.run(), self.inputs.get("attention_mask"))}

    def details(self) -> dict[str, Any]:
        return {}


class Compiled(HuggingFace):
    """torch.compile (Inductor, static shapes) of the sdpa model: its forward, and in training its backward. The
    optimizer stays as it is; compiling is not timed."""

    mode: str | None = None

    def __init__(self, name: str, workload: Workload) -> None:
        super().__init__("hf-sdpa", workload)
        self.call = torch.compile(self.model, dynamic=False, mode=self.mode)


class FastBert(HuggingFace):
    """The same model after ``fastbert.optimize``."""

    def __init__(self, name: str, workload: Workload) -> None:
        super().__init__("hf-sdpa", workload)
        self.call = self.model = self.optimize()

    def optimize(self) -> torch.nn.Module:
        import fastbert

        return fastbert.optimize(self.model)

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
