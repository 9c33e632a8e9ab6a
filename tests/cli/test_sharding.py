"""Several processes: DistributedDataParallel, and FSDP2 with weights in pieces."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastbert.cli import main
from fastbert.training.checkpoints import last_complete


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_micro_batches(
    kit: Any, pairs: Path, base_model: Path, tmp_path: Path
) -> None:
    """DistributedDataParallel over gloo: at each step both have the micro-batches that one alone would accumulate."""
    more = {"dropout": False, "max_steps": 4, "save_steps": 2}
    assert main(kit.pretrain_flags(pairs, base_model, tmp_path / "one", **more, gradient_accumulation_steps=2)) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    command = [*launch, "-m", "fastbert.cli", *kit.pretrain_flags(pairs, base_model, tmp_path / "two", **more)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for one, two in zip(kit.curve(tmp_path / "one"), kit.curve(tmp_path / "two"), strict=True):
        assert one["tokens"] == two["tokens"]
        for name in ("loss", "mlm_loss", "nsp_loss", "nsp_accuracy"):
            assert abs(one[name] - two[name]) < 1e-4 * max(1, abs(one[name])), name
    assert last_complete(tmp_path / "two") == tmp_path / "two" / "checkpoint-4"


WORKER = Path(__file__).with_name("sharding_worker.py")
SHARDED = {"dropout": False, "max_steps": 4, "save_steps": 2, "max_grad_norm": 0.5}
REFUSED = {
    "version 1": ({"version": 1, "sync_module_states": False}, "version must be 2"),
    "ram": ({"cpu_ram_efficient_loading": True}, "cpu_ram_efficient_loading must be off"),
    "checkpointing": ({"activation_checkpointing": True}, "--gradient_checkpointing does it"),
    "wrap": ({"auto_wrap_policy": "SIZE_BASED_WRAP"}, "every layer is wrapped"),
    "embeddings": ({"transformer_layer_cls_to_wrap": ["BertLayer", "BertEmbeddings"]}, "BertEmbeddings: layers are"),
    "pieces": ({"state_dict_type": "SHARDED_STATE_DICT"}, "state_dict_type must be FULL_STATE_DICT"),
}


@pytest.fixture(scope="module")
def sharded(
    kit: Any, pairs: Path, base_model: Path, run_commands: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """Runs under FSDP2 in two processes over gloo, and what each process saw of them; NAME is in the folder NAME."""
    folder = tmp_path_factory.mktemp("sharded")
    more = SHARDED | {"gradient_accumulation_steps": 2, "fsdp": []}  # --fsdp, without a value
    resuming = {"resume_from_checkpoint": folder / "whole" / "checkpoint-2"}
    half = {"bf16": True, "gradient_checkpointing": True, "max_steps": 2, "fsdp": "full_shard"}
    commands = {
        "whole": kit.pretrain_flags(pairs, base_model, folder / "whole", **more),
        "resumed": kit.pretrain_flags(pairs, base_model, folder / "resumed", **more, **resuming),
        "bf16": kit.pretrain_flags(pairs, base_model, folder / "bf16", **more | half),
    }
    for name, (config, _) in REFUSED.items():
        (folder / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
        commands[name] = kit.pretrain_flags(
            pairs, base_model, folder / name, **more, fsdp_config=folder / f"{name}.json"
        )
    (folder / "layers.json").write_text(
        json.dumps({"reshard_after_forward": False, "transformer_layer_cls_to_wrap": ["BertLayer"]}), encoding="utf-8"
    )
    commands["finetuned"] = finetuning(kit, base_model, folder, fsdp="full_shard", fsdp_config=folder / "layers.json")
    (folder / "commands.json").write_text(json.dumps(commands), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run_commands([[sys.executable, str(WORKER), str(folder), str(port)]], seconds=800, CUDA_VISIBLE_DEVICES="")
    return folder, [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


def finetuning(kit: Any, base_model: Path, folder: Path, **more: Any) -> list[str]:
    """Fine-tuning of a model without dropout, in whole steps: a process that is short of rows would repeat some."""
    model = folder / "model"
    if not model.exists():
        shutil.copytree(base_model, model)
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
        kit.write_rows(folder / "train.csv", kit.examples(64))
    more = {
        "validation_split_percentage": 25,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
    } | more
    return kit.finetune_flags(model, folder / "train.csv", folder / "finetuned", **more)


def test_sharded_processes_have_the_losses_of_one(
    kit: Any, sharded: tuple[Path, list[dict[str, Any]]], pairs: Path, base_model: Path, tmp_path: Path
) -> None:
    """FSDP2, with accumulated and clipped gradients: every weight in pieces, everything on the fast path."""
    folder, seen = sharded
    assert main(kit.pretrain_flags(pairs, base_model, tmp_path / "one", **SHARDED, gradient_accumulation_steps=4)) == 0
    one, two = kit.curve(tmp_path / "one"), kit.curve(folder / "whole")
    assert min(entry["grad_norm"] for entry in one) > SHARDED["max_grad_norm"], "else nothing is clipped"
    for one_step, two_steps in zip(one, two, strict=True):
        assert one_step["tokens"] == two_steps["tokens"]
        for name in ("loss", "mlm_loss", "nsp_loss", "nsp_accuracy", "grad_norm"):
            assert abs(one_step[name] - two_steps[name]) < 1e-6 * max(1, abs(one_step[name])), name
    weights, pieces = (load_file(path / "model.safetensors") for path in (tmp_path / "one", folder / "whole"))
    assert pieces.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(pieces[name], weight, rtol=1e-5, atol=1e-6, msg=name)
    for process in (own["whole"] for own in seen):
        assert process["status"] == 0, process["errors"]
        assert process["sharded"]
        assert process["own"] < 0.55 * process["all"]
        assert process["calls"] == {"fast": 4 * 2 * 2, "stock": 0}
        assert process["losses"] == 4 * 2
        assert process["decoder"] == ["Parameter", weights["bert.embeddings.word_embeddings.weight"].shape[0], 32]
    assert sum(own["whole"]["own"] for own in seen) == seen[0]["whole"]["all"]
    assert all(layer["path"] == "fast" for layer in kit.report(folder / "whole")["fastbert"]["layers"])


def test_sharded_checkpoints_are_whole(kit: Any, sharded: tuple[Path, list[dict[str, Any]]]) -> None:
    import transformers

    folder = sharded[0] / "whole"
    last = last_complete(folder)
    assert last == folder / "checkpoint-4"
    ids = torch.randint(5, 100, (2, 20), generator=torch.Generator().manual_seed(0))
    outputs = []
    for path in (folder, last):
        model, info = transformers.BertForPreTraining.from_pretrained(path, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
        with torch.no_grad():
            outputs.append(model.eval()(ids).prediction_logits)
    assert torch.equal(*outputs)
    assert kit.report(folder)["model"]["class"] == "BertForPreTraining"


def test_sharded_runs_resume_to_the_bit(kit: Any, sharded: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, seen = sharded
    assert [own["resumed"]["status"] for own in seen] == [0, 0], seen[0]["resumed"]["errors"]
    assert kit.report(folder / "resumed")["resumed_from"] == "checkpoint-2"
    assert kit.curve(folder / "resumed") == kit.curve(folder / "whole")
    whole, resumed = (folder / name / "model.safetensors" for name in ("whole", "resumed"))
    assert resumed.read_bytes() == whole.read_bytes()


def test_sharded_in_bf16(kit: Any, sharded: tuple[Path, list[dict[str, Any]]]) -> None:
    """Layers compute in bf16, from weights and with sums in float32; here each of them twice."""
    folder, seen = sharded
    assert [own["bf16"]["status"] for own in seen] == [0, 0], seen[0]["bf16"]["errors"]
    assert seen[0]["bf16"]["calls"] == {"fast": 2 * 2 * 2 * 2, "stock": 0}
    for full, half in zip(kit.curve(folder / "whole"), kit.curve(folder / "bf16"), strict=False):
        assert 0 < abs(full["loss"] - half["loss"]) < 0.02
        assert abs(full["grad_norm"] - half["grad_norm"]) < 0.02 * full["grad_norm"]
    dtypes = {tensor.dtype for tensor in load_file(folder / "bf16" / "model.safetensors").values()}
    assert dtypes == {torch.float32}


def test_sharded_finetuning(
    kit: Any, sharded: tuple[Path, list[dict[str, Any]]], base_model: Path, tmp_path: Path
) -> None:
    """The best checkpoint is found and loaded in pieces, too."""
    folder, seen = sharded
    assert [own["finetuned"]["status"] for own in seen] == [0, 0], seen[0]["finetuned"]["errors"]
    assert main(finetuning(kit, base_model, tmp_path, gradient_accumulation_steps=2)) == 0
    one, two = (kit.report(path / "finetuned") for path in (tmp_path, folder))
    assert seen[0]["finetuned"]["sharded"]
    assert seen[0]["finetuned"]["calls"]["stock"] == 0
    assert two["model"]["class"] == "BertForSequenceClassification"
    assert two["best"]["step"] == one["best"]["step"]
    for name in ("train", "eval"):
        assert len(one["history"][name]) == len(two["history"][name]) > 0
        for ones, twos in zip(one["history"][name], two["history"][name], strict=True):
            assert abs(ones["loss"] - twos["loss"]) < 1e-5 * max(1, abs(ones["loss"]))
    weights, pieces = (load_file(path / "finetuned" / "model.safetensors") for path in (tmp_path, folder))
    assert pieces.keys() == weights.keys()
    for key, weight in weights.items():
        if key.endswith("key.bias"):
            continue  # shifts all scores of a query: its gradient is rounding, which Adam makes whole steps
        torch.testing.assert_close(pieces[key], weight, rtol=1e-4, atol=1e-5, msg=key)


def test_sharding_that_is_not_possible(sharded: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (first, _) = sharded
    assert first["on CPUs"]["status"] == 1
    assert "--fsdp: accelerate shards a model on GPUs only" in first["on CPUs"]["errors"]
    for name, (_, message) in REFUSED.items():
        assert first[name]["status"] == 1, name
        assert message in first[name]["errors"]
        assert not (folder / name).exists()
