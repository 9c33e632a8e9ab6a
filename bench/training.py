"""Training contestants: those of models.py, one step a call: forward, backward, AdamW's step, with dropout."""

from typing import Any

import torch

from . import models
from .workloads import SEED


class Training:
    """Put in front of a contestant of models.py: a step of sequence classification on the same batch."""

    workload: Any
    inputs: dict[str, torch.Tensor]
    model: Any
    call: Any

    cls_name = "BertForSequenceClassification"

    def build(self, attention: str) -> torch.nn.Module:
        facts = self.workload.facts
        config = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), facts["dropout"])
        config |= {name: facts[name] for name in ("num_labels",) if name in facts}
        return models.build_model(self.cls_name, self.workload, attention, **config).train()

    def prepare(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-5, fused=True)  # the default of HF Trainer
        torch.manual_seed(SEED)

    def loss(self, call: Any) -> torch.Tensor:
        return call(**self.inputs).loss

    def run(self) -> torch.Tensor:
        loss = self.loss(self.call)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def outputs(self) -> dict[str, torch.Tensor]:
        """Loss and every gradient with dropout off (masks differ between implementations), weights untouched.

        Raises RuntimeError if, in training mode, two draws of dropout give the same hidden states: then none was
        applied.
        """
        with torch.no_grad():
            first, second = (self.hidden() for _ in range(2))
        if torch.equal(first, second):
            raise RuntimeError("two training forwards gave the same hidden states: dropout was not applied")
        self.model.eval()
        loss = self.loss(self.model)
        loss.backward()
        found = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.detach(), **found}

    def hidden(self) -> torch.Tensor:
        """The last hidden states, dropout applied."""
        inputs = {name: value for name, value in self.inputs.items() if name != "labels"}
        return self.model.base_model(**inputs).last_hidden_state


class HuggingFace(Training, models.HuggingFace):
    """transformers' model with eager or sdpa attention."""


class Compiled(Training, models.Compiled):
    """torch.compile of the sdpa model."""


class FastBert(Training, models.FastBert):
    """The same model after ``fastbert.optimize``, the same optimizer."""
