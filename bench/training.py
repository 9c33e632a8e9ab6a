"""Training contestants: sequence classification with dropout, forward + backward + AdamW step."""

from typing import Any

import torch

from .contestants import TRUTH
from .models import build_model, fastbert_details
from .workloads import SEED, Workload


class HuggingFace:
    """BertForSequenceClassification in training mode, one optimizer step a call, on the same batch."""

    def __init__(self, name: str, workload: Workload) -> None:
        attention = "sdpa" if name.endswith("sdpa") else "eager"
        dropout = workload.facts["dropout"]
        self.inputs = dict(workload.inputs)
        self.model = build_model(
            "BertForSequenceClassification",
            workload,
            attention,
            num_labels=workload.facts["num_labels"],
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        ).train()
        if name == TRUTH:
            self.model.double()
        self.call: Any = self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-5)
        torch.manual_seed(SEED)

    def run(self) -> float:
        loss = self.call(**self.inputs).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def outputs(self) -> dict[str, torch.Tensor]:
        """Loss and every gradient with dropout off (masks differ between implementations), weights untouched.

        Raises RuntimeError if, in training mode, two draws of dropout give the same loss: then none was applied.
        """
        with torch.no_grad():
            drawn = {self.model(**self.inputs).loss.item() for _ in range(2)}
        if len(drawn) == 1:
            raise RuntimeError("two training forwards gave the same loss: dropout was not applied")
        self.model.eval()
        loss = self.model(**self.inputs).loss
        loss.backward()
        found = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.detach(), **found}

    def details(self) -> dict[str, Any]:
        return {}


class Compiled(HuggingFace):
    """torch.compile of the sdpa model's forward and backward; the optimizer stays as it is. Compiling is not timed."""

    def __init__(self, name: str, workload: Workload) -> None:
        super().__init__("hf-sdpa", workload)
        self.call = torch.compile(self.model, dynamic=False)


class FastBert(HuggingFace):
    """The same model after ``fastbert.optimize``, the same optimizer."""

    def __init__(self, name: str, workload: Workload) -> None:
        import fastbert

        super().__init__("hf-sdpa", workload)
        self.call = self.model = fastbert.optimize(self.model)

    def details(self) -> dict[str, Any]:
        return fastbert_details(self.model)
