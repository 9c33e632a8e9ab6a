"""A fine-tuning run that is killed, interrupted or out of disk goes on where it was and ends where it would have."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastbert.cli import main
from fastbert.training.checkpoints import checkpoint_problem, checkpoints, last_complete
from fastbert.training.trainer import EpochLengthGroupedSampler

STEPS = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
BY_STEPS = {"eval_strategy": "steps", "eval_steps": 4, "save_total_limit": 3}


@pytest.fixture(scope="module")
def train(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kit.write_rows(tmp_path_factory.mktemp("data") / "train.csv", kit.examples(60))


@pytest.fixture(scope="module")
def uninterrupted(kit: Any, base_model: Path, train: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert main(kit.finetune_flags(base_model, train, folder, **STEPS, **BY_STEPS)) == 0
    return folder


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def same_result(folder: Path, whole: Path) -> None:
    """The same weights to the last bit, and the same curve."""
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    found, wanted = report(folder), report(whole)
    assert found["best"]["value"] == wanted["best"]["value"]
    assert [e["accuracy"] for e in found["history"]["eval"]] == [e["accuracy"] for e in wanted["history"]["eval"]]
    assert [e["loss"] for e in found["history"]["eval"]] == [e["loss"] for e in wanted["history"]["eval"]]


def test_killed_while_writing_a_checkpoint(
    kit: Any, base_model: Path, train: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = kit.finetune_flags(base_model, train, out, **STEPS, **BY_STEPS)

    def writing() -> bool:
        # The third checkpoint has begun: its folder is there, its last file is not.
        return any(int(path.name.split("-")[1]) >= 12 for path in checkpoints(out))

    kit.signal_when(kit.start(flags), writing, signal.SIGKILL)
    assert not (out / "report.json").exists()
    # Whatever the moment of the kill left, one more half-written checkpoint must not matter.
    half = out / "checkpoint-999"
    shutil.copytree(checkpoints(out)[0], half)
    (half / "trainer_state.json").unlink()
    assert main(flags) == 1
    assert "--resume_from_checkpoint true" in capsys.readouterr().err
    assert main([*flags, "--resume_from_checkpoint", "true"]) == 0
    errors = capsys.readouterr().err
    assert "checkpoint-999: incomplete checkpoint removed: trainer_state.json" in errors
    assert report(out)["resumed_from"] in ("checkpoint-4", "checkpoint-8", "checkpoint-12", "checkpoint-16")
    same_result(out, uninterrupted)


def test_killed_before_the_first_checkpoint(
    kit: Any, base_model: Path, train: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text('{"labels"', encoding="utf-8")
    (out / "checkpoint-4").mkdir()
    (out / "checkpoint-4" / "model.safetensors").write_bytes(b"")
    flags = kit.finetune_flags(base_model, train, out, **STEPS, **BY_STEPS)
    assert main([*flags, "--resume_from_checkpoint"]) == 0
    assert "starting anew" in capsys.readouterr().err
    same_result(out, uninterrupted)


def test_interrupted_in_the_middle_of_an_epoch(
    kit: Any,
    base_model: Path,
    train: Path,
    uninterrupted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file_size_limit: Callable[[int], None],
) -> None:
    """Then out of disk, which the finished checkpoints survive."""
    out = tmp_path / "out"
    flags = kit.finetune_flags(base_model, train, out, **STEPS, **BY_STEPS)
    process = kit.start(flags)
    errors = kit.signal_when(process, lambda: (out / "checkpoint-4" / "trainer_state.json").exists(), signal.SIGINT)
    assert process.returncode == 130, errors
    assert "--resume_from_checkpoint true" in errors
    assert "Traceback" not in errors
    last = last_complete(out)
    assert last is not None
    step = int(last.name.split("-")[1])
    assert f"stopped at step {step} of 42" in errors
    file_size_limit(1000)  # not even the weights
    status = main([*flags, "--resume_from_checkpoint", "true"])
    file_size_limit(-1)
    assert status == 1
    assert "no space left" in capsys.readouterr().err
    assert last_complete(out) == last
    assert main([*flags, "--resume_from_checkpoint", "true"]) == 0
    found = report(out)
    assert found["resumed_from"] == last.name
    assert found["steps"] == 42
    same_result(out, uninterrupted)


def test_a_finished_run_can_be_resumed(
    kit: Any, base_model: Path, train: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "moved"
    shutil.copytree(uninterrupted, out)
    (out / "model.safetensors").unlink()
    flags = kit.finetune_flags(base_model, train, out, **STEPS, **BY_STEPS)
    assert main([*flags, "--resume_from_checkpoint", "true"]) == 0
    same_result(out, uninterrupted)


def test_resuming_by_name_and_with_other_data(
    kit: Any,
    base_model: Path,
    train: Path,
    uninterrupted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = checkpoints(uninterrupted)[-1]
    flags = kit.finetune_flags(base_model, train, tmp_path / "new", **STEPS, **BY_STEPS)
    assert main([*flags, "--resume_from_checkpoint", str(checkpoint)]) == 0
    assert (tmp_path / "new" / "model.safetensors").is_file()
    other = kit.write_rows(tmp_path / "other.csv", [row | {"label": row["label"] + "s"} for row in kit.examples(60)])
    flags = kit.finetune_flags(base_model, other, tmp_path / "third", **STEPS, **BY_STEPS)
    assert main([*flags, "--resume_from_checkpoint", str(checkpoint)]) == 1
    assert "other labels (['animal', 'food', 'space'])" in capsys.readouterr().err
    changed = [row | {"text": row["text"] + " dog"} for row in kit.examples(60)]
    flags = kit.finetune_flags(base_model, kit.write_rows(other, changed), tmp_path / "third", **STEPS, **BY_STEPS)
    assert main([*flags, "--resume_from_checkpoint", str(checkpoint)]) == 1
    assert "other data" in capsys.readouterr().err
    flags = kit.finetune_flags(base_model, train, tmp_path / "third", seed=7, **STEPS, **BY_STEPS)
    assert main([*flags, "--resume_from_checkpoint", str(checkpoint)]) == 1
    assert "other seed (42) than this one (7)" in capsys.readouterr().err
    flags = kit.finetune_flags(base_model, train, tmp_path / "third", optim="sgd", **STEPS, **BY_STEPS)
    assert main([*flags, "--resume_from_checkpoint", str(checkpoint)]) == 1
    assert "other optim (adamw_torch_fused) than this one (sgd)" in capsys.readouterr().err


def test_resuming_into_an_occupied_folder(
    kit: Any, base_model: Path, train: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint that is named says nothing about a folder that it does not lie in."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    shutil.copytree(uninterrupted, whole)
    out.mkdir()
    (out / "config.json").write_text("mine", encoding="utf-8")
    (out / "checkpoint-1").mkdir()
    flags = kit.finetune_flags(base_model, train, out, **STEPS, **BY_STEPS)
    resuming = ["--resume_from_checkpoint", str(checkpoints(whole)[-1])]
    assert main([*flags, *resuming]) == 1
    assert f"--output_dir {out}: not empty (it holds 'checkpoint-1', 'config.json')" in capsys.readouterr().err
    assert (out / "config.json").read_text(encoding="utf-8") == "mine"
    assert main([*flags, *resuming, "--overwrite_output_dir"]) == 0
    assert not (out / "checkpoint-1").exists()
    assert report(out)["resumed_from"] == checkpoints(whole)[-1].name
    (tmp_path / "link").symlink_to(whole)
    flags = kit.finetune_flags(base_model, train, tmp_path / "link", **STEPS, **BY_STEPS)
    assert main([*flags, *resuming]) == 0
    same_result(whole, uninterrupted)


def test_resuming_with_a_model_of_another_size(
    kit: Any, base_model: Path, train: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(base_model, model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}), encoding="utf-8")
    flags = kit.finetune_flags(model, train, tmp_path / "out", **STEPS, **BY_STEPS)
    assert main([*flags, "--resume_from_checkpoint", str(checkpoints(uninterrupted)[-1])]) == 1
    assert "that run had other num_hidden_layers (2) than this one (1)" in capsys.readouterr().err


def test_resuming_with_another_learning_rate_says_so(
    kit: Any, base_model: Path, train: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    settings = {**STEPS, **BY_STEPS, "learning_rate": 0.5, "warmup_steps": 3}
    for _ in range(2):  # what the optimizer has is told of as often as it is another
        assert main([*kit.finetune_flags(base_model, train, out, **settings), "--resume_from_checkpoint"]) == 0
        errors = capsys.readouterr().err
        assert "--learning_rate 0.5: the run that is resumed had 0.001; the optimizer goes on with that" in errors
    assert "--warmup_steps" not in errors


def test_resuming_for_another_length_says_so(
    kit: Any, base_model: Path, train: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    settings = {**STEPS, **BY_STEPS, "num_train_epochs": 4, "max_steps": 43}
    assert main([*kit.finetune_flags(base_model, train, out, **settings), "--resume_from_checkpoint"]) == 0
    errors = capsys.readouterr().err
    assert "--num_train_epochs 4.0: the run that is resumed had 3.0\n" in errors
    assert "--max_steps 43: the run that is resumed had -1\n" in errors
    assert report(out)["steps"] == 43


def test_early_stopping_survives_a_resume(kit: Any, base_model: Path, train: Path, tmp_path: Path) -> None:
    """A learning rate of nothing never improves: patience 3 ends after four evaluations, resumed or not."""
    out = tmp_path / "out"
    settings = {
        **STEPS,
        "learning_rate": 0,
        "num_train_epochs": 20,
        "early_stopping_patience": 3,
        "save_total_limit": 9,
    }
    flags = kit.finetune_flags(base_model, train, out, **settings)
    assert main(flags) == 0
    steps = report(out)["steps"]
    assert len(report(out)["history"]["eval"]) == 4
    for path in checkpoints(out)[-2:]:
        shutil.rmtree(path)
    assert main([*flags, "--resume_from_checkpoint", "true"]) == 0
    assert (report(out)["steps"], len(report(out)["history"]["eval"])) == (steps, 4)
    (out / "report.json").unlink()  # killed after the last checkpoint, before the end
    assert main([*flags, "--resume_from_checkpoint", "true"]) == 0
    assert (report(out)["steps"], len(report(out)["history"]["eval"])) == (steps, 4)


def test_full_disk(
    kit: Any,
    base_model: Path,
    train: Path,
    uninterrupted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file_size_limit: Callable[[int], None],
) -> None:
    out = tmp_path / "out"
    flags = kit.finetune_flags(base_model, train, out, **STEPS, **BY_STEPS)
    weights = (uninterrupted / "model.safetensors").stat().st_size
    file_size_limit(weights + 10_000)  # the weights fit, the optimizer's state does not
    status = main(flags)
    file_size_limit(-1)
    assert status == 1
    error = capsys.readouterr().err
    assert f"--output_dir {out}: no space left for checkpoint-4" in error
    assert "none yet" in error
    assert not checkpoints(out)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json"]
)
@pytest.mark.parametrize("share", [None, 0.0, 0.5, 0.99])
def test_damaged_checkpoints_are_seen(uninterrupted: Path, tmp_path: Path, name: str, share: float | None) -> None:
    folder = tmp_path / "checkpoint-8"
    shutil.copytree(checkpoints(uninterrupted)[-1], folder)
    shutil.copytree(folder, tmp_path / "checkpoint-4")
    assert checkpoint_problem(folder) is None
    path = folder / name
    content = path.read_bytes()
    if share is None:
        path.unlink()
    else:
        path.write_bytes(content[: int(share * len(content))])
    problem = checkpoint_problem(folder)
    assert problem is not None
    assert name in problem
    assert last_complete(tmp_path) == tmp_path / "checkpoint-4"
    assert not folder.exists()


def test_every_epoch_has_its_order_whatever_came_before() -> None:
    def orders(epochs: list[int]) -> list[list[int]]:
        sampler = EpochLengthGroupedSampler(4, list(range(50, 150)), seed=3)
        found = []
        for epoch in epochs:
            sampler.set_epoch(epoch)
            found.append(list(sampler))
        return found

    first, second, third = orders([0, 1, 2])
    assert sorted(first) == list(range(100))
    assert first != second
    assert orders([2]) == [third]
    assert orders([1, 0]) == [second, first]
