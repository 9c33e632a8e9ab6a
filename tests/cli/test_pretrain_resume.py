"""``fastbert pretrain`` where it was killed, or ran out of disk, or met broken data: it goes on to the bit."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastbert.cli import main
from fastbert.training.checkpoints import checkpoint_problem, checkpoints, last_complete

TWO_PHASES = {"phase_steps": [9, 5], "max_steps": 14, "save_steps": 4, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def uninterrupted(
    kit: Any, pairs: Path, long_pairs: Path, base_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Two phases, with dropout."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert main(kit.pretrain_flags([pairs, long_pairs], base_model, folder, **TWO_PHASES)) == 0
    return folder


def test_phases(kit: Any, uninterrupted: Path) -> None:
    found = kit.report(uninterrupted)
    assert [part["steps"] for part in found["data"]] == [9, 5]
    assert [part["max_seq_length"] for part in found["data"]] == [32, 64]
    assert all(0.9 * 512 < entry["tokens"] <= 512 for entry in found["history"]), "every step costs the same"


@pytest.mark.parametrize("step", [8, 12])
def test_killed_and_resumed_to_the_bit(
    kit: Any, pairs: Path, long_pairs: Path, base_model: Path, uninterrupted: Path, tmp_path: Path, step: int
) -> None:
    """kill -9 while a checkpoint is being written in the first phase, and in the middle of the second."""
    out = tmp_path / "out"
    arguments = kit.pretrain_flags([pairs, long_pairs], base_model, out, **TWO_PHASES)
    folder = out / f"checkpoint-{step}"

    def ready() -> bool:
        return folder.exists() and (step == 8 or checkpoint_problem(folder) is None)

    kit.signal_when(kit.start(arguments), ready, signal.SIGKILL)
    assert not (out / "report.json").exists()
    assert main([*arguments, "--resume_from_checkpoint", "true"]) == 0
    assert kit.report(out)["resumed_from"] in (("checkpoint-4", "checkpoint-8") if step == 8 else ("checkpoint-12",))
    assert kit.curve(out) == kit.curve(uninterrupted)
    assert len(kit.curve(out)) == 14
    assert (out / "model.safetensors").read_bytes() == (uninterrupted / "model.safetensors").read_bytes()


def test_a_gathered_optimizer_makes_a_checkpoint_complete(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-14"
    shutil.copytree(uninterrupted / folder.name, folder)
    content = (folder / "optimizer.pt").read_bytes()
    (folder / "optimizer.pt").rename(folder / "optimizer.bin")
    assert checkpoint_problem(folder) == "pytorch_model_fsdp.bin is missing"
    torch.save({}, folder / "pytorch_model_fsdp.bin")
    assert checkpoint_problem(folder) is None
    (folder / "optimizer.bin").write_bytes(content[:-99])
    assert checkpoint_problem(folder) == "optimizer.bin is truncated"


def test_resuming_with_other_flags(
    kit: Any, pairs: Path, long_pairs: Path, base_model: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = kit.pretrain_flags([pairs, long_pairs], base_model, uninterrupted, **TWO_PHASES)
    assert main(arguments) == 1
    assert "--resume_from_checkpoint true" in capsys.readouterr().err
    for name, value in (("seed", 7), ("mlm_probability", 0.2), ("tokens_per_batch", 300)):
        assert main([*arguments, "--resume_from_checkpoint", "true", f"--{name}", str(value)]) == 1
        assert f"that run had other {name}" in capsys.readouterr().err


def test_full_disk(
    kit: Any,
    pairs: Path,
    long_pairs: Path,
    base_model: Path,
    uninterrupted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file_size_limit: Callable[[int], None],
) -> None:
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    shutil.rmtree(checkpoints(out)[-1])
    for name in ("report.json", "curves.png", "model.safetensors"):
        (out / name).unlink()
    before = last_complete(out)
    assert before is not None
    arguments = [
        *kit.pretrain_flags([pairs, long_pairs], base_model, out, **TWO_PHASES),
        "--resume_from_checkpoint",
        "true",
    ]
    file_size_limit(1000)
    status = main(arguments)
    file_size_limit(-1)
    assert status == 1
    error = capsys.readouterr().err
    assert "no space left" in error
    assert before.name in error
    assert last_complete(out) == before
    assert main(arguments) == 0
    assert kit.curve(out) == kit.curve(uninterrupted)


def damaged(pairs: Path, folder: Path, row: int, name: str, values: list[int]) -> Path:
    """A copy of prepared data in which a column of one row is another, in a file that opens as ever."""
    import pyarrow as pa

    shutil.copytree(pairs, folder)
    for path in sorted(folder.glob("data-*.arrow")):
        with pa.memory_map(str(path)) as file:
            rows = pa.ipc.open_stream(file).read_all().to_pylist()
            schema = pa.ipc.open_stream(path.read_bytes()).schema
        if 0 <= row < len(rows):
            rows[row][name] = values
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        row -= len(rows)
    return folder


def test_a_broken_shard_loses_no_checkpoint(
    kit: Any, pairs: Path, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A token that no tokenizer gives, in a row of the sixth step."""
    import datasets

    from fastbert.training.batching import TokenBudget, row_lengths

    row = int(TokenBudget(row_lengths(datasets.load_from_disk(str(pairs))), 8 * 32, 42).rows(5)[0])
    used, out, more = tmp_path / "data", tmp_path / "out", {"max_steps": 8, "save_steps": 2}
    damaged(pairs, used, row, "input_ids", [10**6] * 5)
    assert main(kit.pretrain_flags(used, base_model, out, **more)) == 1
    assert f"--dataset {used}: holds the token id 1000000" in capsys.readouterr().err
    assert last_complete(out) == out / "checkpoint-4"
    shutil.rmtree(used)
    shutil.copytree(pairs, used)
    assert main([*kit.pretrain_flags(used, base_model, out, **more), "--resume_from_checkpoint", "true"]) == 0
    assert main(kit.pretrain_flags(pairs, base_model, tmp_path / "whole", **more)) == 0
    assert kit.curve(out) == kit.curve(tmp_path / "whole")

    long = damaged(pairs, tmp_path / "long", 7, "input_ids", [5] * 33)
    assert main(kit.pretrain_flags(long, base_model, tmp_path / "other", **more)) == 1
    assert f"--dataset {long}: row 7 has 33 tokens, allowed are 1 to 32" in capsys.readouterr().err
