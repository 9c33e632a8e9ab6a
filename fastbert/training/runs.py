"""What training runs have in common: the way from flags to a report, their output folder, how they are resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import huggingface_hub
import torch
from transformers import ProgressCallback, set_seed
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback

from .checkpoints import checkpoint_problem, checkpoints, last_complete
from .errors import CommandError, first_line, is_disk_full
from .loading import quiet_transformers
from .report import CURVES, REPORT, versions, write_json
from .sharding import check_sharding, wants_sharding
from .trainer import LossProgressCallback, NanCallback, Resumable, StopOnSignal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from .arguments import RunArguments

RUN = "run.json"  # marks a folder as one of ours, and says what a resumed run must agree with
# Of a model's configuration: what the shapes of its weights depend on.
SIZES = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "type_vocab_size",
)
# Flags that a resumed run may have other values of; those of the optimizer are kept with its state.
OPTIMIZER_FLAGS = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
NOTED_FLAGS = (
    *OPTIMIZER_FLAGS,
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "max_grad_norm",
    "label_smoothing_factor",
)


class Run(ABC):
    """A training run. A command fills in the steps, which are taken in this order: :meth:`open`, :meth:`identity`,
    :meth:`load`, :meth:`make_trainer`, :meth:`headline`, :meth:`train`, :meth:`test`, :meth:`report`, :meth:`plot`,
    :meth:`summary`; the last three in the first process only.
    """

    command: ClassVar[str]
    config: PreTrainedConfig  # this and the next two are set by open
    tokenizer: PreTrainedTokenizerBase
    max_seq_length: int
    model: Any
    trainer: Resumable

    def __init__(self, model_args: Any, data_args: Any, args: RunArguments, argv: list[str]) -> None:
        self.model_args = model_args
        self.data_args = data_args
        self.args: Any = args
        self.argv = argv
        self.output = Path(str(args.output_dir))
        self.hub = {"cache_dir": model_args.cache_dir, "revision": model_args.model_revision}
        self.tokenizer_name: str = model_args.tokenizer_name or model_args.model_name_or_path
        self.tokenizer_flag = "--tokenizer_name" if model_args.tokenizer_name else "--model_name_or_path"
        self.checkpoint: Path | None = None  # that it goes on from
        self.seconds: dict[str, float] = {}

    @abstractmethod
    def open(self) -> None:
        """Open and check what the flags name, before anything is written. Raises CommandError."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What a resumed run must agree with, besides seed and sharding. Raises CommandError for data that are bad."""

    @abstractmethod
    def load(self) -> Any:
        """The model to train. Raises CommandError."""

    @abstractmethod
    def make_trainer(self, callbacks: list[Any]) -> Resumable:
        """The trainer of :attr:`model`."""

    @abstractmethod
    def headline(self) -> str:
        """What is going to be done, in a line."""

    def train(self, stop: StopOnSignal) -> None:
        """Train to the end, or until a signal."""
        with stop:
            self.trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)

    def test(self) -> None:  # noqa: B027 - pretraining has no test
        """Measure the trained model before it is saved."""

    @abstractmethod
    def report(self) -> dict[str, Any]:
        """What the report says besides what every run's does."""

    @abstractmethod
    def plot(self, path: Path, report: dict[str, Any]) -> None:
        """Draw the curves."""

    @abstractmethod
    def summary(self, report: dict[str, Any]) -> list[str]:
        """The last lines on standard output."""

    def main(self) -> int:
        """The exit status, with a full disk and Ctrl-C told in one sentence. Raises CommandError."""
        try:
            return self._run()
        except (OSError, RuntimeError) as error:
            if not is_disk_full(error):
                if isinstance(error, OSError) and error.filename:
                    raise CommandError(f"{error.filename}: {error.strerror}") from error
                raise
            raise CommandError(
                f"--output_dir {self.output}: no space left ({first_line(error)}). Finished checkpoints are intact; "
                "free some space and go on with --resume_from_checkpoint true"
            ) from error
        except KeyboardInterrupt:
            say(f"\nstopped. Go on from the last complete checkpoint with: {self._resume_command()}")
            return 130

    def _run(self) -> int:
        started, args = time.perf_counter(), self.args
        quiet_transformers()
        check_loggers(args)
        check_hub(args)
        check_processes(args)
        check_sharding(args)
        self.open()
        self.checkpoint = prepare_output(self.output, args)
        if args.distributed_state is not None:
            args.distributed_state.wait_for_everyone()  # else one process could find what another has written
        identity = {"seed": args.seed, "fsdp": wants_sharding(args), "optim": str(args.optim.value)} | self.identity()
        noted = check_same_run(identity, self.config, args, self.checkpoint)

        set_seed(args.seed)
        self.model = self.load()
        if self.model_args.optimize:
            from fastbert import optimize

            optimize(self.model)
        # With --enable_jit_checkpoint transformers handles SIGTERM itself.
        stop = StopOnSignal((signal.SIGINT,)) if args.enable_jit_checkpoint else StopOnSignal()
        self.trainer = self.make_trainer([NanCallback(), stop])
        self.trainer.remove_callback(PrinterCallback)
        if self.trainer.pop_callback(ProgressCallback) is not None:
            self.trainer.add_callback(LossProgressCallback())
        check_batches(self.trainer)
        if args.process_index == 0:
            self.output.mkdir(parents=True, exist_ok=True)
            run = identity | {"model_name_or_path": self.model_args.model_name_or_path, "flags": noted}
            write_json(self.output / RUN, run)
        say(self.headline())

        prepared = time.perf_counter()
        self.train(stop)
        self.seconds = {"prepare": prepared - started, "train": time.perf_counter() - prepared}
        state = self.trainer.state
        if stop.caught is not None and state.global_step < state.max_steps:
            say(f"stopped at step {state.global_step} of {state.max_steps}. Go on with: {self._resume_command()}")
            return 128 + stop.caught
        self.test()
        save_model(self.trainer, self.output)
        if self.trainer.is_world_process_zero():
            self._write_report(started)
        return 0

    def _resume_command(self) -> str:
        return f"fastbert {self.command} … --output_dir {self.args.output_dir} --resume_from_checkpoint true"

    def _write_report(self, started: float) -> None:
        report = {
            "command": ["fastbert", self.command, *self.argv],
            "model": {
                "name_or_path": self.model_args.model_name_or_path,
                "class": type(self.model).__name__.removeprefix("FSDP"),
                "model_type": self.config.model_type,
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "max_seq_length": self.max_seq_length,
                "optimize": self.model_args.optimize,
            },
            **self.report(),
            "resumed_from": self.checkpoint.name if self.checkpoint else None,
            "steps": self.trainer.state.global_step,
            "seconds": self.seconds | {"total": time.perf_counter() - started},
            "threads": torch.get_num_threads(),
            "device": str(self.args.device),
            "versions": versions(),
            "arguments": self.args.to_dict() | {"data": asdict(self.data_args), "model": asdict(self.model_args)},
            "fastbert": _decisions(self.model) if self.model_args.optimize else None,
        }
        write_json(self.output / REPORT, report)
        self.plot(self.output / CURVES, report)
        say(f"model, {REPORT} and {CURVES} are in {self.output}")
        for line in self.summary(report):
            print(line)


def say(text: str) -> None:
    """One line on stderr, of the first process."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, file=sys.stderr, flush=True)


def check_processes(args: RunArguments) -> None:
    """Raise CommandError where several processes are to train, and each would do it alone, into the same folder."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and args.world_size == 1:
        raise CommandError(
            f"{started} processes were started, but they train on {args.device} and accelerate has not connected them; "
            "on CPUs it does with --use_cpu"
        )


def check_loggers(args: RunArguments) -> None:
    """Raise CommandError for a logger of ``--report_to`` that is not known, or not installed."""
    for name in args.report_to or ():
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (ValueError, RuntimeError, ImportError) as error:
            raise CommandError(f"--report_to {name}: {first_line(error)}") from error


def check_hub(args: RunArguments) -> None:
    """Raise CommandError where ``--push_to_hub`` could not push: no network, no token or a wrong one."""
    if not args.push_to_hub:
        return
    try:
        huggingface_hub.whoami(token=args.hub_token)
    except Exception as error:  # of what HTTP library they are depends on huggingface_hub's version
        raise CommandError(f"--push_to_hub: the Hub does not know who you are: {first_line(error)}") from error


def check_batches(trainer: Resumable) -> None:
    """Raise CommandError for data that ``--dataloader_drop_last`` leaves nothing of."""
    args = trainer.args
    if not args.dataloader_drop_last:
        return
    loaders = {"training": trainer.get_train_dataloader} if args.do_train else {}
    if trainer.eval_dataset is not None:
        loaders["validation"] = trainer.get_eval_dataloader
    if (test := getattr(trainer, "test_dataset", None)) is not None:
        loaders["test"] = partial(trainer.get_test_dataloader, test)
    for name, loader in loaders.items():
        if len(loader()) == 0:
            raise CommandError(f"--dataloader_drop_last: the {name} data have fewer rows than a batch")


def prepare_output(output: Path, args: RunArguments) -> Path | None:
    """Check that ``output`` may be written to; returns the checkpoint to resume from, or None to start anew."""
    resume = args.resume_from_checkpoint
    if output.exists() and not output.is_dir():
        raise CommandError(f"--output_dir {output}: a file is in the way")
    resumable = not args.save_only_model
    start: Path | None = None
    if resume is not None and resume.lower() not in ("true", "false", "1", "0"):
        if problem := checkpoint_problem(resume, resumable=resumable):
            raise CommandError(f"--resume_from_checkpoint {resume}: not a complete checkpoint: {problem}")
        start = Path(resume)
        if start.parent.resolve() == output.resolve():
            return start
    content = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    ours = RUN in content or any(checkpoints(output))
    if resume is not None and resume.lower() in ("true", "1"):
        if content and not ours:
            raise CommandError(f"--output_dir {output}: holds no run to resume (but {content[0]!r})")
        found = last_complete(output, resumable=resumable, remove=args.process_index == 0)
        say(f"resuming from {found}" if found else f"no complete checkpoint in {output} yet: starting anew")
        return found
    if not content:
        return start
    if not args.overwrite_output_dir:
        hint = "go on with --resume_from_checkpoint true, or " if ours else ""
        raise CommandError(
            f"--output_dir {output}: not empty (it holds {', '.join(map(repr, content[:3]))}"
            f"{' …' if len(content) > 3 else ''}); choose another, {hint}start anew with --overwrite_output_dir"
        )
    if args.process_index != 0:
        return start
    for path in checkpoints(output):
        shutil.rmtree(path)
    for name in (RUN, REPORT, CURVES):
        (output / name).unlink(missing_ok=True)
    return start


def check_same_run(
    run: dict[str, Any], config: PreTrainedConfig, args: RunArguments, checkpoint: Path | None
) -> dict[str, Any]:
    """Refuse to resume with another model, labels or data, which would go wrong late or, worse, unnoticed.

    Says which of NOTED_FLAGS have changed, and returns what holds of them.
    """
    noted = {name: getattr(value := getattr(args, name), "value", value) for name in NOTED_FLAGS}
    if checkpoint is None:
        return noted
    try:
        before = json.loads((checkpoint.parent / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    saved = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    before.setdefault("labels", list((saved.get("id2label") or {}).values()))
    before |= _sizes(type(config).from_dict(saved)) | {"model_type": saved.get("model_type")}
    for key, value in (_sizes(config) | run).items():
        if key in before and before[key] != value:
            raise CommandError(
                f"--resume_from_checkpoint {checkpoint}: that run had other {key} ({_short(before[key])}) "
                f"than this one ({_short(value)}); resume with the same data and flags, or start anew"
            )
    for name, old in before.get("flags", {}).items():
        if name in noted and noted[name] != old:
            kept = "; the optimizer goes on with that" if name in OPTIMIZER_FLAGS else ""
            say(f"--{name} {noted[name]}: the run that is resumed had {old}{kept}")
            noted[name] = old if kept else noted[name]
    return noted


def _sizes(config: PreTrainedConfig) -> dict[str, Any]:
    return {name: getattr(config, name, None) for name in SIZES}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "…"


def save_model(trainer: Resumable, output: Path) -> None:
    """Write the final model next to its place, then move it there file by file.

    Every process calls this and the first one writes; the others have a part in it where weights are in pieces (FSDP).
    """
    partial = output / ".model.part"
    if not trainer.is_world_process_zero():
        if trainer.is_fsdp_enabled:
            trainer.save_model(str(partial), _internal_call=True)
        return
    shutil.rmtree(partial, ignore_errors=True)
    try:
        trainer.save_model(str(partial), _internal_call=True)
        # It unpickles only where fastbert is installed; report.json has the same flags.
        (partial / "training_args.bin").unlink(missing_ok=True)
        for path in sorted(partial.iterdir()):
            if path.is_dir():  # a module of a SentenceTransformer; a folder that is there cannot be replaced
                shutil.rmtree(output / path.name, ignore_errors=True)
            os.replace(path, output / path.name)
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise CommandError(
            f"--output_dir {output}: no space left for the final model ({first_line(error)}). The checkpoints are "
            "intact; free some space and finish with --resume_from_checkpoint true"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _decisions(model: Any) -> dict[str, Any]:
    """What ``fastbert.report`` says of a model."""
    from fastbert import report

    return report(model).as_dict()
