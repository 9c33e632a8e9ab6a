"""What ``fastbert pretrain`` refuses, before it has written anything."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastbert.cli import main


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"config_overrides": "hidden_size=33"}, "--config_overrides hidden_size=33: "),
        ({"config_overrides": "hidden_sise=32"}, "--config_overrides hidden_sise=32: "),
        ({"config_overrides": "hidden_size=-32"}, "hidden_size=-32: hidden_size must be at least 1, got -32"),
        ({"config_overrides": "num_attention_heads=-4"}, "num_attention_heads must be at least 1, got -4"),
        ({"config_overrides": "num_hidden_layers=0"}, "num_hidden_layers must be at least 1, got 0"),
        ({"config_overrides": "type_vocab_size=1"}, "type_vocab_size must be at least 2, got 1"),
        ({"config_overrides": "initializer_range=-1"}, "initializer_range must be above 0, got -1"),
        ({"config_overrides": "layer_norm_eps=nan"}, "layer_norm_eps must be above 0, got nan"),
        ({"config_overrides": "hidden_act=foo"}, "hidden_act 'foo' is unknown; allowed are gelu, "),
        ({"config_overrides": "pad_token_id=999999"}, "pad_token_id 999999 is not the tokenizer's 0"),
        ({"config_overrides": "hidden_size"}, "--config_overrides hidden_size: 'hidden_size' is not NAME=VALUE"),
        ({"config_overrides": "hidden_size=32,"}, "--config_overrides hidden_size=32,: '' is not NAME=VALUE"),
        ({"config_overrides": "vocab_size=20"}, "vocab_size 20 is less than the tokenizer's"),
        ({"config_overrides": "max_position_embeddings=16"}, "the model has 16 positions"),
        ({"tokens_per_batch": 20}, "--tokens_per_batch 20: --dataset"),
        ({"model_type": "roberta"}, "roberta has no next sentence prediction"),
        ({"model_type": "nobert"}, "--model_type"),
        ({"report_to": "tensorbored"}, "--report_to tensorbored: "),
        ({"push_to_hub": True, "hub_token": "hf_wrong"}, "--push_to_hub: "),
        ({"fsdp": "full_shard"}, "--fsdp: this is one process"),
    ],
)
def test_bad_settings(
    kit: Any,
    pairs: Path,
    base_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: dict[str, Any],
    message: str,
) -> None:
    assert main(kit.pretrain_flags(pairs, base_model, tmp_path / "out", **more)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_processes_that_do_not_know_of_each_other(
    kit: Any,
    pairs: Path,
    base_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As torchrun starts them where there is no GPU: they would all write the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(kit.pretrain_flags(pairs, base_model, tmp_path / "out", use_cpu=None)) == 1
    assert "2 processes were started" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"eval_strategy": "steps"}, "pretraining has no validation data"),
        ({"phase_steps": [3, 4]}, "--phase_steps"),
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor: not in pretraining"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps must be at least 1, got 0"),
        ({"mlm_probability": 1.5}, "--mlm_probability must be between 0 and 1, got 1.5"),
        ({"tokenizer_name": None}, "--tokenizer_name is needed for a new model"),
        ({"model_name_or_path": "x"}, "--config_overrides and --config_name are for a new model"),
    ],
)
def test_bad_flags(
    kit: Any,
    pairs: Path,
    base_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(kit.pretrain_flags(pairs, base_model, tmp_path / "out", **more))
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_broken_models(
    kit: Any, pairs: Path, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"tokenizer_name": None, "config_overrides": None}
    for name, words in (
        ("pickled", "transformers.AutoModelForPreTraining.from_pretrained(FOLDER, use_safetensors=False)"),
        ("nan", "the weights hold NaN or infinite numbers, first in bert.encoder.layer.1.output.dense.weight"),
        ("missing", "the checkpoint lacks encoder weights: bert.encoder.layer.1.output.dense.weight"),
    ):
        folder = tmp_path / name
        shutil.copytree(base_model, folder)
        tensors = load_file(folder / "model.safetensors")
        if name == "pickled":
            (folder / "model.safetensors").unlink()
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            weight = tensors.pop("encoder.layer.1.output.dense.weight")
            weight[3, 4] = torch.nan
            more_tensors = {"encoder.layer.1.output.dense.weight": weight} if name == "nan" else {}
            save_file(tensors | more_tensors, folder / "model.safetensors", metadata={"format": "pt"})
        arguments = kit.pretrain_flags(pairs, base_model, tmp_path / "out", **more, model_name_or_path=folder)
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert f"--model_name_or_path {folder}: " in error
        assert words in error
    assert not (tmp_path / "out").exists()


def test_bad_data(
    kit: Any, pairs: Path, corpus: Path, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(kit.pretrain_flags(tmp_path, base_model, tmp_path / "out")) == 1
    assert "not a folder made by fastbert prepare" in capsys.readouterr().err
    broken = tmp_path / "broken"
    shutil.copytree(pairs, broken)
    shard = sorted(broken.glob("data-*.arrow"))[-1]
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    assert main(kit.pretrain_flags(broken, base_model, tmp_path / "out")) == 1
    assert f"--dataset {broken}: cannot be read" in capsys.readouterr().err
    for content in ("{", "{}", "[]"):
        (broken / "prepare.json").write_text(content, encoding="utf-8")
        assert main(kit.pretrain_flags(broken, base_model, tmp_path / "out")) == 1
        assert f"--dataset {broken}: cannot be read" in capsys.readouterr().err
    (broken / "state.json").unlink()
    assert main(kit.pretrain_flags(broken, base_model, tmp_path / "out")) == 1
    assert "unfinished" in capsys.readouterr().err
    arguments = ["tokenizer", "--input", str(corpus), "--vocab_size", "90", "--quiet", "--output", str(tmp_path / "t")]
    assert main(arguments) == 0
    assert main(kit.pretrain_flags(pairs, tmp_path / "t", tmp_path / "out")) == 1
    assert "was prepared with another tokenizer" in capsys.readouterr().err
    shutil.copytree(base_model, tmp_path / "model")
    shutil.copytree(tmp_path / "t", tmp_path / "model", dirs_exist_ok=True)
    more = {"tokenizer_name": None, "config_overrides": None, "model_name_or_path": tmp_path / "model"}
    assert main(kit.pretrain_flags(pairs, base_model, tmp_path / "out", **more)) == 1
    errors = capsys.readouterr().err
    assert "--model_name_or_path has" in errors
    assert "--tokenizer_name" not in errors
    assert not (tmp_path / "out").exists()
