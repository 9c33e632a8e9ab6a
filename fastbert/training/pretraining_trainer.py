"""The trainer of ``fastbert pretrain``: batches by number, both losses apart, tokens a second."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from fastbert.models import FastMaskedLM
from fastbert.packing import token_bound

from .batching import Batches
from .throughput import Work
from .trainer import IGNORED, Resumable


class PretrainingTrainer(Resumable):
    """Trainer over :class:`Batches`; ``peak`` is what one process can do, in FLOP/s.

    ``bound`` is the number of tokens that no micro-batch exceeds: a model of ours packs each into as many rows. None
    for a stock model.

    One pass over the batches is the whole run, so that its number tells the trainer which micro-batch comes next, and a
    resumed run skips the others without making them.
    """

    def __init__(self, *args: Any, batches: Batches, work: Work, peak: float, bound: int | None, **kwargs: Any) -> None:
        super().__init__(*args, train_dataset=batches, train_lengths=[], **kwargs)
        self.batches = batches
        self.work = work
        self.peak = peak
        self.bound = bound
        # Else a compiled model would hand out the logits of every token, [B, S, vocabulary], which nobody reads.
        self.skip_logits = isinstance(self.accelerator.unwrap_model(self.model), FastMaskedLM)
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens = self._flops = 0
        self._since = time.perf_counter()

    def get_train_dataloader(self) -> DataLoader:
        """The micro-batches of this process. Nothing is left for accelerate to share out."""
        return DataLoader(
            self.batches,
            batch_size=1,
            shuffle=False,
            collate_fn=_only,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),  # else iterating would draw from the generator that dropout draws from
        )

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        lengths = inputs["attention_mask"].sum(1).tolist()
        self._tokens += sum(lengths)
        self._flops += self.work.of(lengths, int((inputs["labels"] != IGNORED).sum()))
        return super().training_step(model, inputs, *args, **kwargs)

    def items(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Labelled tokens and, where they are pairs, sequences."""
        counts = [(inputs["labels"] != IGNORED).sum()]
        if "next_sentence_label" in inputs:
            counts.append((inputs["next_sentence_label"] != IGNORED).sum())
        return torch.stack(counts)

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """The loss of a micro-batch; in training, its share of the step's, each of both losses by its own items."""
        items = self.items(inputs)
        if self.skip_logits:
            inputs = inputs | {"skip_logits": True}
        with token_bound(self.bound) if self.bound else contextlib.nullcontext():
            loss, outputs = super().compute_loss(model, inputs, True, *args, **kwargs)
        if model.training:
            losses = self._losses(loss, outputs, inputs, items)
            loss = (losses * self.weights(items)).sum()
            self._count(losses.detach(), outputs, inputs, items)
        return (loss, outputs) if return_outputs else loss

    def _losses(self, loss: torch.Tensor, outputs: Any, inputs: dict[str, Any], items: torch.Tensor) -> torch.Tensor:
        """The model's loss in its terms, each a mean over its items: masked tokens and, if there, next sentence."""
        terms = [loss.mean()]  # of several GPUs, where one process has them
        if "next_sentence_label" in inputs:
            scores = outputs["seq_relationship_logits"].float().view(-1, 2)
            nsp = F.cross_entropy(scores, inputs["next_sentence_label"].view(-1))
            terms = [terms[0] - nsp, nsp]
        return torch.where(items > 0, torch.stack(terms), 0.0)  # a mean over nothing is NaN

    def _count(self, losses: torch.Tensor, outputs: Any, inputs: dict[str, Any], items: torch.Tensor) -> None:
        """Add up both losses of a micro-batch, on the device: they are read when they are logged."""
        sums = losses * items
        found = {"labels": items[0], "mlm_loss": sums[0]}
        if "next_sentence_label" in inputs:
            guess = outputs["seq_relationship_logits"].detach().view(-1, 2).argmax(1)
            right = (guess == inputs["next_sentence_label"].view(-1)).sum()
            found |= {"sequences": items[1], "nsp_loss": sums[1], "nsp_right": right}
        for name, value in found.items():
            value = value.double() if value.device.type != "mps" else value.float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._sums:
            logs |= self._measured()
        super().log(logs, *args, **kwargs)

    def _measured(self) -> dict[str, float]:
        """Losses, tokens a second and share of the peak since the last call, over all processes."""
        now = time.perf_counter()
        names = sorted(self._sums)
        own = [float(self._sums[name]) for name in names] + [self._tokens, self._flops, self.peak]
        summed = torch.tensor(own, dtype=torch.float64, device=self.args.device)
        total: list[float] = self.accelerator.reduce(summed, "sum").tolist()
        sums = dict(zip(names, total, strict=False))
        tokens, flops, peak = total[-3:]
        seconds = now - self._since
        found = {"mlm_loss": sums["mlm_loss"] / max(1, sums["labels"])}
        if "sequences" in sums:
            found["nsp_loss"] = sums["nsp_loss"] / sums["sequences"]
            found["nsp_accuracy"] = sums["nsp_right"] / sums["sequences"]
        found |= {
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "tflops": flops / seconds / 1e12,
            "mfu": flops / seconds / peak,
        }
        self._sums.clear()
        self._tokens = self._flops = 0
        self._since = now
        return found

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        super()._save_checkpoint(*args, **kwargs)
        self._since += time.perf_counter() - start

    def begin_timing(self) -> None:
        """Start the clock: what came before is no training."""
        self._since = time.perf_counter()


def _only(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return batches[0]


class TimingCallback(TrainerCallback):
    """Starts the trainer's clock, and logs whenever a checkpoint is written.

    Else a loss that is logged after a resume would be the mean of fewer steps than in a run that was never stopped.
    """

    trainer: PretrainingTrainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin_timing()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            control.should_log = True
