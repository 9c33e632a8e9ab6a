"""The command itself: its commands, help, exit status, and ``fastbert info``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastbert
from fastbert.cli import main


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in ("info", "tokenizer", "prepare", "pretrain", "finetune", "predict", "bench"):
        assert command in shown
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert fastbert.__version__ in capsys.readouterr().out
    assert main(["train"]) == 2
    assert (
        "unknown command 'train'; allowed are info, tokenizer, prepare, pretrain, finetune, predict, bench"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("command", ["info", "tokenizer", "prepare", "pretrain", "finetune", "predict", "bench"])
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"fastbert {command}" in capsys.readouterr().out


def test_finetune_takes_the_flags_of_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import fields

    from transformers import TrainingArguments

    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit):
            main(["finetune", flag])
        shown = capsys.readouterr().out
        assert "--learning_rate" in shown
        assert max(map(len, shown.splitlines())) < 140
        missing = [field.name for field in fields(TrainingArguments) if f"--{field.name} " not in shown]
        assert bool(missing) == (flag == "--help")


@pytest.mark.parametrize("command", ["finetune", "predict"])
def test_help_says_what_becomes_of_long_texts(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "onger texts are cut to this many tokens (sequences, choices) or read in overlapping windows" in shown


@pytest.mark.parametrize("command", ["info", "predict"])
def test_unknown_flags(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--model_name_or_path", "x", "--input", "y", "--output", "z", "--colour", "red"])
    assert caught.value.code == 2
    assert "--colour" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["FASTBERT_BACKEND", "FASTBERT_CPU_ISA"])
def test_a_wrong_environment_stops_a_command_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str
) -> None:
    pytest.importorskip("fastbert._C")

    def wrong() -> str:
        raise RuntimeError("FASTBERT_CPU_ISA is 'foo'")

    monkeypatch.setenv(variable, "foo")
    monkeypatch.setattr("fastbert._C.isa", wrong)  # what it chose when it was loaded is kept
    for command in ("info", "predict"):
        assert main([command]) == 1
        assert f"fastbert {command}: error: {variable}" in capsys.readouterr().err


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["version"] == fastbert.__version__
    assert set(found["ops"]["float32"]) >= {"attention", "embedding", "ffn", "layernorm", "mlm_loss"}
    for choice in found["ops"]["float32"].values():
        assert choice["backend"] not in choice["rejected"]
        assert all(choice["rejected"].values())
    assert found["cpu"]["threads"] >= 1
    assert found["versions"]["torch"]
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "attention" in text
    assert f"fastbert {fastbert.__version__}" in text
    threads = next(line for line in text.splitlines() if "threads" in line)
    assert threads.split()[-1] == str(found["cpu"]["threads"])
    if found["build"]["cuda"] is True:
        archs = next(line for line in text.splitlines() if "cuda_archs" in line)
        assert archs.split()[1:] == found["build"]["cuda_archs"]


def test_info_imports_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys; from fastbert.cli import main; main(['info']); "
        "heavy = {'transformers', 'datasets', 'pandas', 'pyarrow', 'matplotlib', 'sklearn', 'accelerate'}; "
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
