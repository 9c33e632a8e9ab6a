"""What a training run has in common with others: its output folder, what a resumed one must agree with, its end."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from .checkpoints import checkpoint_problem, checkpoints, last_complete
from .errors import CommandError, first_line, is_disk_full
from .report import CURVES, REPORT

if TYPE_CHECKING:
    from .arguments import FinetuneArguments
    from .pretraining_arguments import PretrainArguments
    from .trainer import Resumable

    Arguments = FinetuneArguments | PretrainArguments

RUN = "run.json"  # marks a folder as one of ours, and says what a resumed run must agree with


def guarded(command: str, args: Arguments, run: Callable[[], int]) -> int:
    """The exit status of ``run``, with a full disk and Ctrl-C told in one sentence. Raises CommandError."""
    try:
        return run()
    except (OSError, RuntimeError) as error:
        if not is_disk_full(error):
            if isinstance(error, OSError) and error.filename:
                raise CommandError(f"{error.filename}: {error.strerror}") from error
            raise
        raise CommandError(
            f"--output_dir {args.output_dir}: no space left ({first_line(error)}). Finished checkpoints are intact; "
            "free some space and go on with --resume_from_checkpoint true"
        ) from error
    except KeyboardInterrupt:
        say(f"\nstopped. Go on from the last complete checkpoint with: {resume_command(command, args)}")
        return 130


def resume_command(command: str, args: Arguments) -> str:
    """What to type to go on."""
    return f"fastbert {command} … --output_dir {args.output_dir} --resume_from_checkpoint true"


def say(text: str) -> None:
    """One line on stderr, of the first process."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, file=sys.stderr, flush=True)


def check_processes(args: Arguments) -> None:
    """Raise CommandError where several processes are to train, and each would do it alone, into the same folder."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and args.world_size == 1:
        raise CommandError(
            f"{started} processes were started, but they train on {args.device} and accelerate has not connected them; "
            "on CPUs it does with --use_cpu"
        )


def check_loggers(args: Arguments) -> None:
    """Raise CommandError for a logger of ``--report_to`` that is not known, or not installed."""
    for name in args.report_to or ():
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (ValueError, RuntimeError, ImportError) as error:
            raise CommandError(f"--report_to {name}: {first_line(error)}") from error


def prepare_output(output: Path, args: Arguments) -> Path | None:
    """Check that ``output`` may be written to; returns the checkpoint to resume from, or None to start anew."""
    resume = args.resume_from_checkpoint
    if output.exists() and not output.is_dir():
        raise CommandError(f"--output_dir {output}: a file is in the way")
    resumable = not args.save_only_model
    if resume is not None and resume.lower() not in ("true", "false", "1", "0"):
        if problem := checkpoint_problem(resume, resumable=resumable):
            raise CommandError(f"--resume_from_checkpoint {resume}: not a complete checkpoint: {problem}")
        return Path(resume)
    content = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    ours = RUN in content or any(checkpoints(output))
    if resume is not None and resume.lower() in ("true", "1"):
        if content and not ours:
            raise CommandError(f"--output_dir {output}: holds no run to resume (but {content[0]!r})")
        found = last_complete(output, resumable=resumable, remove=args.process_index == 0)
        say(f"resuming from {found}" if found else f"no complete checkpoint in {output} yet: starting anew")
        return found
    if not content:
        return None
    if not args.overwrite_output_dir:
        hint = "go on with --resume_from_checkpoint true, or " if ours else ""
        raise CommandError(
            f"--output_dir {output}: not empty (it holds {', '.join(map(repr, content[:3]))}"
            f"{' …' if len(content) > 3 else ''}); choose another, {hint}start anew with --overwrite_output_dir"
        )
    if args.process_index != 0:
        return None
    for path in checkpoints(output):
        shutil.rmtree(path)
    for name in (RUN, REPORT, CURVES):
        (output / name).unlink(missing_ok=True)
    return None


def check_same_run(run: dict[str, Any], checkpoint: Path | None) -> None:
    """Refuse to resume with other labels or data, which would go wrong late or, worse, unnoticed."""
    if checkpoint is None:
        return
    try:
        before = json.loads((checkpoint.parent / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    before.setdefault("labels", list((config.get("id2label") or {}).values()))
    for key, value in run.items():
        if key in before and before[key] != value and key != "model_name_or_path":
            raise CommandError(
                f"--resume_from_checkpoint {checkpoint}: that run had other {key} ({_short(before[key])}) "
                f"than this one ({_short(value)}); resume with the same data and flags, or start anew"
            )


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


def fastbert_report(model: Any) -> dict[str, Any]:
    """What ``fastbert.report`` says of a model, for a report file."""
    from fastbert import report

    return report(model).as_dict()
