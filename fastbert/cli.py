"""The command ``fastbert``: info, tokenizer, prepare, pretrain, finetune, predict, bench."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from ._version import __version__

USAGE = f"""\
fastbert {__version__}: Hugging Face BERT, faster

usage: fastbert COMMAND [flags]

  info      what is built, which device and instruction set, and which implementation each op would use
  tokenizer learn a WordPiece vocabulary from text
  prepare   make pretraining data from text
  pretrain  train a BERT on prepared data, from scratch or from a checkpoint
  finetune  fine-tune for classes, numbers, tags, answers, choices or embeddings on a file of rows
  predict   predict with a fine-tuned model over a file of any size
  bench     measure ops, models and training steps on this machine, against the alternatives

fastbert COMMAND --help shows the flags of a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its status: 0 done, 1 failed, 2 wrong usage, 3 done with bad rows, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    if command in ("-V", "--version", "version"):
        print(__version__)
        return 0
    if command not in _COMMANDS:
        print(f"fastbert: error: unknown command {command!r}; allowed are {', '.join(_COMMANDS)}", file=sys.stderr)
        return 2
    from .training.errors import CommandError

    try:
        _check_environment()
        return _COMMANDS[command](rest)
    except CommandError as error:
        print(f"fastbert {command}: error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in _EXTRAS:
            raise
        extra = _EXTRAS[error.name.split(".")[0]]
        print(f"fastbert {command}: error: needs {error.name}: pip install 'fastbert[{extra}]'", file=sys.stderr)
        return 1
    except BrokenPipeError:
        sys.stderr.close()  # else Python complains about the pipe once more at exit
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def _check_environment() -> None:
    """Raise CommandError for a variable that the first op would choke on, when files have been begun."""
    from .training.errors import CommandError

    if not {"FASTBERT_BACKEND", "FASTBERT_CPU_ISA"} & os.environ.keys():
        return
    from . import dispatch

    try:
        dispatch.parse(os.environ.get("FASTBERT_BACKEND", ""))
        if dispatch.extension_error is None:
            from . import _C

            _C.isa()
    except (ValueError, RuntimeError) as error:
        raise CommandError(str(error)) from error


# Each command imports what it needs only when it runs: `fastbert info` must not wait for datasets or matplotlib.
def _info(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fastbert info",
        description="What is built, what it runs on, and which implementation each op would use.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    flags = parser.parse_args(argv)
    found = information()
    print(json.dumps(found, indent=2) if flags.json else _as_text(found))
    return 0


def information() -> dict[str, Any]:
    """What ``fastbert info --json`` prints."""
    import torch

    from . import dispatch
    from .training.report import versions

    build: dict[str, Any] = {"extension": dispatch.extension_error is None, "reason": dispatch.extension_error}
    cpu: dict[str, Any] = {"threads": torch.get_num_threads()}
    if dispatch.extension_error is None:
        from . import _C

        build |= _C.build_info()
        cpu |= {
            "isa": _C.isa(),
            "isa_limit": os.environ.get("FASTBERT_CPU_ISA"),
            "supported_isas": list(_C.supported_isas()),
            "features": list(_C.cpu_features()),
        }
    build["cuda"] = dispatch.cuda_error or True
    if dispatch.cuda_error is None:
        build |= dispatch.cuda_build()
    devices = ["cpu", *(f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count()))]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "version": __version__,
        "build": build,
        "cpu": cpu,
        "devices": devices,
        "versions": versions(),
        "ops": {
            "device": device,
            "float32": dispatch.describe(device),
            "bfloat16": dispatch.describe(device, torch.bfloat16),
        },
    }


def _as_text(found: dict[str, Any]) -> str:
    from . import dispatch

    lines = [f"fastbert {found['version']}", "", "build"]
    lines += [f"  {key:<14} {_value(value)}" for key, value in found["build"].items() if value not in (None, "")]
    lines += ["", "cpu", *(f"  {key:<14} {_value(value)}" for key, value in found["cpu"].items())]
    lines += ["", "devices", *(f"  {name}" for name in found["devices"])]
    lines += ["", "versions"]
    lines += [f"  {name:<14} {version or 'not installed'}" for name, version in found["versions"].items()]
    for dtype in ("float32", "bfloat16"):
        lines += ["", f"ops on {found['ops']['device']}, {dtype}"]
        for op, choice in found["ops"][dtype].items():
            lines.append(f"  {op:<12} {choice['backend'] or 'none'}")
            lines += [f"    {line}" for line in dispatch.details_as_text(choice)]
            lines += [f"    not {backend}: {reason}" for backend, reason in choice["rejected"].items()]
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _tokenizer(argv: list[str]) -> int:
    from .training.vocabulary import main as run

    return run(argv)


def _prepare(argv: list[str]) -> int:
    from .training.prepare import main as run

    return run(argv)


def _pretrain(argv: list[str]) -> int:
    from .training.pretrain import main as run

    return run(argv)


def _finetune(argv: list[str]) -> int:
    from .training.finetune import main as run

    return run(argv)


def _predict(argv: list[str]) -> int:
    from .predict import main as run

    return run(argv)


def _bench(argv: list[str]) -> int:
    from fastbert.bench.cli import main as run  # type: ignore[import-not-found]

    return run(argv) or 0


_COMMANDS = {
    "info": _info,
    "tokenizer": _tokenizer,
    "prepare": _prepare,
    "pretrain": _pretrain,
    "finetune": _finetune,
    "predict": _predict,
    "bench": _bench,
}
_EXTRAS = dict.fromkeys(("accelerate", "datasets", "pandas", "pyarrow", "sklearn", "scipy", "matplotlib"), "train")
_EXTRAS["sentence_transformers"] = "embeddings"


if __name__ == "__main__":
    sys.exit(main())
