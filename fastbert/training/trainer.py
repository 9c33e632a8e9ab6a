"""HF Trainer with what a run that may be killed needs: safe checkpoints, a replayable data order, a clean Ctrl-C."""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import EarlyStoppingCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from .checkpoints import checkpoints
from .errors import CommandError, first_line, is_disk_full
from .sharding import save_whole, shard

if TYPE_CHECKING:
    from transformers import EvalPrediction

IGNORED = -100  # a label that is of no account in the loss


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """LengthGroupedSampler whose order depends on the seed and the epoch only, so that a resumed epoch repeats it."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class Resumable(Trainer):
    """Trainer whose checkpoints are whole or not there, and whose order of the data a resumed run repeats.

    The loss of a step is a mean over the items of all its micro-batches, those of other processes included unless
    ``--average_tokens_across_devices false``: the mean of the micro-batches' means would give the tokens of a small
    one more weight. ``train_lengths`` are the token counts of the training features.
    """

    def __init__(self, *args: Any, train_lengths: list[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.train_lengths = train_lengths
        self.train_sampler: Any = None  # has set_epoch, and an order that depends on seed and epoch only
        # The losses are weighed here: the stock heads swallow num_items_in_batch, and those of ours that heed it know
        # of one count only.
        self.model_accepts_loss_kwargs = False
        self._step_items: Any = None
        if self.is_fsdp_enabled:
            save_whole(self.accelerator.state.fsdp_plugin)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The optimizer, of weights that are sharded by then if they are to be."""
        if self.is_fsdp_enabled:
            shard(self.model, self.accelerator.state.fsdp_plugin)
        return super().create_optimizer(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if state_dict is not None:  # gathered from pieces name by name, so that tied weights have become several
            tied = getattr(self.model, "all_tied_weights_keys", {})
            state_dict |= {name: state_dict[source] for name, source in tied.items() if source in state_dict}
        super()._save(output_dir, state_dict)

    def test(self) -> tuple[dict[str, float], Any, Any] | None:
        """Metrics, predictions and labels of the test data; None if there is none."""
        raise NotImplementedError

    def items(self, inputs: dict[str, Any]) -> torch.Tensor:
        """What each term of the loss of a micro-batch is a mean over, counted: int64 [terms]."""
        raise NotImplementedError

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of a step, whose items are counted."""
        samples, num_items = super().get_batch_samples(*args, **kwargs)
        if samples:
            self._step_items = sum(self.items(inputs).to(self.args.device) for inputs in samples)
            if self.args.average_tokens_across_devices:
                self._step_items = self.accelerator.reduce(self._step_items, "sum")
        return samples, num_items

    def weights(self, items: torch.Tensor) -> torch.Tensor:
        """What the means of a micro-batch with these ``items`` count for in the loss of the step: float32 [terms]."""
        weights = items / self._step_items.clamp(min=1)
        if self.args.average_tokens_across_devices:
            weights = weights * self.accelerator.num_processes  # over which the gradients are averaged
        return weights * self.current_gradient_accumulation_steps  # by which training_step divides

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        # Of a whole step: the rows of a step are the same however they are shared out to micro-batches and processes.
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self.train_sampler = EpochLengthGroupedSampler(batch, self.train_lengths, seed)
        return self.train_sampler

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        output = Path(str(self.args.output_dir))
        folder = output / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero() and folder.exists():
            # Written over in place, a folder could hold files of two runs when the process is killed.
            shutil.rmtree(folder)
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            if not is_disk_full(error):
                raise
            shutil.rmtree(folder, ignore_errors=True)
            kept = [path.name for path in checkpoints(output)]
            raise CommandError(
                f"--output_dir {output}: no space left for {folder.name} ({first_line(error)}). "
                f"Finished checkpoints, intact: {', '.join(kept) or 'none yet'}. "
                "Free some space and go on with --resume_from_checkpoint true"
            ) from error


class FinetuneTrainer(Resumable):
    """The trainer of all tasks that have labels.

    ``metrics_of(split, prediction)`` are a split's metrics; with ``in_order`` it gets predictions in the order of the
    features, otherwise in the one that has least padding.
    """

    def __init__(
        self,
        *args: Any,
        metrics_of: Callable[[str, EvalPrediction], dict[str, float]],
        in_order: bool = False,
        test_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, compute_metrics=partial(metrics_of, "validation"), **kwargs)
        self.metrics_of = metrics_of
        self.in_order = in_order
        self.test_dataset = test_dataset

    def items(self, inputs: dict[str, Any]) -> torch.Tensor:
        """The labels; of questions, the rows."""
        labels = inputs["labels"] if "labels" in inputs else inputs["start_positions"]
        if labels.is_floating_point():  # -100 is a number like any other
            return torch.tensor([labels.numel()], device=labels.device)
        return (labels != IGNORED).sum().view(1)

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """The loss of a micro-batch; in training, its share of the step's."""
        items = self.items(inputs)
        loss, outputs = super().compute_loss(model, inputs, True, *args, **kwargs)
        if model.training:
            loss = loss * self.weights(items)[0]
        loss = torch.where(items[0] > 0, loss, 0.0)  # words without a token: a mean over nothing is NaN
        return (loss, outputs) if return_outputs else loss

    def _get_eval_sampler(self, eval_dataset: Any) -> torch.utils.data.Sampler | None:
        return (
            torch.utils.data.SequentialSampler(eval_dataset)
            if self.in_order
            else super()._get_eval_sampler(eval_dataset)
        )

    def test(self) -> tuple[dict[str, float], Any, Any] | None:
        if self.test_dataset is None:
            return None
        self.compute_metrics = partial(self.metrics_of, "test")
        found = self.predict(self.test_dataset, metric_key_prefix="test")
        metrics = {key.removeprefix("test_"): value for key, value in (found.metrics or {}).items()}
        return metrics, found.predictions, found.label_ids


class ReplayCallback(TrainerCallback):
    """Tells the sampler its epoch, also where the trainer starts in the middle of one; finds the best checkpoint."""

    trainer: Resumable

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A folder that was moved, or named in another way, since the checkpoint was written.
        if state.best_model_checkpoint is None and state.best_global_step:
            folder = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
            if folder.is_dir():
                state.best_model_checkpoint = str(folder)
            else:
                print(f"{folder}, the best so far, is gone: the best is chosen among what follows", file=sys.stderr)
                state.best_metric = state.best_global_step = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.train_sampler is not None:
            self.trainer.train_sampler.set_epoch(int((state.epoch or 0) + 1e-6))


class PatienceCallback(EarlyStoppingCallback):
    """EarlyStoppingCallback that takes its count up again from a checkpoint."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.early_stopping_patience_counter = saved_patience(state.stateful_callbacks)


def saved_patience(callbacks: dict[str, Any]) -> int:
    """Evaluations without a new best that a checkpoint's state has counted."""
    saved = callbacks.get(PatienceCallback.__name__) or {}
    if isinstance(saved, list):
        saved = saved[-1] if saved else {}
    return int(saved.get("attributes", {}).get("early_stopping_patience_counter", 0))


class NanCallback(TrainerCallback):
    """Stops a run whose loss is no number, before it costs more time or a good checkpoint."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        for name in ("loss", "eval_loss"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                raise CommandError(
                    f"{name} is {value} at step {state.global_step}: training diverged; "
                    f"try a smaller --learning_rate (now {args.learning_rate:g}) or more --warmup_steps"
                )


class LossProgressCallback(ProgressCallback):
    """The progress bar with the loss in it, instead of a line of numbers each time it is logged."""

    training_bar: Any  # a tqdm bar while training, else None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4f}")


class EvaluationLineCallback(TrainerCallback):
    """One line an evaluation, on stderr."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.started = time.perf_counter()

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not metrics:
            return
        names = [name for name in ("loss", self.metric) if f"eval_{name}" in metrics]
        text = "  ".join(f"{name} {metrics[f'eval_{name}']:.4f}" for name in dict.fromkeys(names))
        seconds = time.perf_counter() - self.started
        tqdm.write(
            f"epoch {state.epoch or 0:.3g}  step {state.global_step}  {text}  ({seconds:.0f} s)", file=sys.stderr
        )


class StopOnSignal(TrainerCallback):
    """Turns the first SIGINT or SIGTERM into: finish the step, write a checkpoint, stop. The second one kills.

    Use as a context manager around ``Trainer.train``; ``caught`` is the signal, or None.
    """

    def __init__(self, numbers: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)) -> None:
        self.numbers = numbers
        self.process = os.getpid()
        self.caught: int | None = None
        self.saved = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            for number in self.numbers:
                self._previous[number] = signal.signal(number, self._catch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return  # a data loader's worker; the trainer ends it
        if self.caught is not None:
            raise KeyboardInterrupt
        self.caught = number
        print("\nstopping after this step, then writing a checkpoint (once more: stop now)", file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.caught is None:
            return
        control.should_training_stop = True
        # At the end of an epoch the trainer evaluates and saves by itself, right after this.
        if not float(state.epoch).is_integer():
            control.should_evaluate = False
            control.should_save = self.saved = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.caught is None:
            return
        control.should_training_stop = True
        if self.saved:
            control.should_evaluate = control.should_save = False
        else:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A signal that came during the evaluation or the writing before.
        if self.caught is not None:
            control.should_training_stop = True
