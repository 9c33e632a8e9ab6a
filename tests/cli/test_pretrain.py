"""``fastbert pretrain``: learns, goes on to the bit where it was killed, and leaves ordinary Hugging Face folders."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastbert.cli import main
from fastbert.training.checkpoints import checkpoint_problem, checkpoints, last_complete

TINY = "num_hidden_layers=2,hidden_size=32,num_attention_heads=2,intermediate_size=64,max_position_embeddings=64"
NO_DROPOUT = f"{TINY},hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"
MEASURED = {"tokens_per_second", "tflops", "mfu"}  # what no two runs have in common


@pytest.fixture(scope="module")
def corpus(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(1)
    documents = []
    for number in range(300):
        topic = ["animal", "food", "space"][number % 3]
        documents.append(" ".join(kit.sentence(rng, topic).capitalize() + "." for _ in range(rng.randint(3, 12))))
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return path


def prepare(corpus: Path, model: Path, output: Path, **more: Any) -> Path:
    flags = {"tokenizer_name": model, "output": output, "max_seq_length": 32, "workers": 1, "shard_megabytes": 0.05}
    named = [text for name, value in (flags | more).items() for text in (f"--{name}", str(value))]
    assert main(["prepare", "--input", str(corpus), "--quiet", *named]) == 0
    return output


@pytest.fixture(scope="module")
def data(corpus: Path, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(corpus, base_model, tmp_path_factory.mktemp("prepared") / "short")


@pytest.fixture(scope="module")
def long_data(corpus: Path, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(corpus, base_model, tmp_path_factory.mktemp("prepared") / "long", max_seq_length=64)


def flags(data: Path | list[Path], tokenizer: Path, output: Path, **more: Any) -> list[str]:
    given = {
        "tokenizer_name": tokenizer,
        "config_overrides": TINY,
        "output_dir": output,
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    } | more
    folders = data if isinstance(data, list) else [data]
    named = [text for name, value in given.items() if value is not None for text in (f"--{name}", *_texts(value))]
    return ["pretrain", "--dataset", *map(str, folders), *named]


def _texts(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def curve(folder: Path) -> list[dict[str, Any]]:
    """What was logged, but for what depends on the clock."""
    return [{k: v for k, v in entry.items() if k not in MEASURED} for entry in report(folder)["history"]]


@pytest.fixture(scope="module")
def trained(data: Path, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is long enough to learn something."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    more = {"max_steps": 120, "learning_rate": 5e-3, "per_device_train_batch_size": 16, "logging_steps": 10}
    more |= {"save_steps": 60}
    assert main(flags(data, base_model, folder, **more)) == 0
    return folder


def test_it_learns(trained: Path, data: Path) -> None:
    found = report(trained)
    first, last = found["history"][0], found["history"][-1]
    vocabulary = json.loads((trained / "config.json").read_text())["vocab_size"]
    assert abs(first["mlm_loss"] - math.log(vocabulary)) < 1.0
    assert found["data"][0]["unigram_entropy"] == report(data)["unigram_entropy"]
    assert last["mlm_loss"] < found["data"][0]["unigram_entropy"]
    assert abs(first["nsp_loss"] - math.log(2)) < 0.2
    for entry in found["history"]:
        assert abs(entry["loss"] - entry["mlm_loss"] - entry["nsp_loss"]) < 0.02, "the loss is the sum of both"
        assert entry["tokens_per_second"] > 0
        assert 0 < entry["mfu"] < 1.05
        assert 0.9 * 512 * 10 < entry["tokens"] <= 512 * 10
    assert found["steps"] == 120
    assert found["data"][0]["steps"] == 120
    assert found["fastbert"]
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (trained / "training_args.bin").exists()


def test_plain_transformers_opens_it_and_the_other_way_round(
    trained: Path, data: Path, base_model: Path, tmp_path: Path
) -> None:
    import transformers

    import fastbert

    ids = torch.randint(5, 100, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    for name, fields in (
        ("BertForPreTraining", ("prediction_logits", "seq_relationship_logits")),
        ("BertForMaskedLM", ("logits",)),
        ("BertForNextSentencePrediction", ("logits",)),
    ):
        stock = getattr(transformers, name).from_pretrained(trained).eval()
        stock.save_pretrained(tmp_path / name)
        with torch.no_grad():
            one = stock(ids, attention_mask=mask)
            for folder in (trained, tmp_path / name):
                two = getattr(fastbert, name).from_pretrained(folder).eval()(ids, attention_mask=mask)
                for field in fields:
                    keep = mask.bool() if one[field].dim() == 3 else slice(None)
                    torch.testing.assert_close(two[field][keep], one[field][keep])
    assert (
        load_file(trained / "model.safetensors").keys()
        == load_file(tmp_path / "BertForPreTraining" / "model.safetensors").keys()
    )
    assert transformers.AutoTokenizer.from_pretrained(trained).mask_token == "[MASK]"

    stock = transformers.BertForPreTraining.from_pretrained(trained)
    more = {"tokenizer_name": base_model, "config_overrides": None}
    more |= {"model_name_or_path": tmp_path / "BertForPreTraining"}
    assert main(flags(data, base_model, tmp_path / "on", max_steps=2, **more)) == 0
    assert curve(tmp_path / "on")[0]["mlm_loss"] < report(trained)["history"][1]["mlm_loss"], "it goes on, not anew"
    found = transformers.BertForPreTraining.from_pretrained(tmp_path / "on")
    assert set(found.state_dict()) == set(stock.state_dict())


def test_the_same_losses_as_stock(data: Path, base_model: Path, tmp_path: Path) -> None:
    more = {"config_overrides": NO_DROPOUT, "max_steps": 6, "optimize": "false"}
    assert main(flags(data, base_model, tmp_path / "stock", **more)) == 0
    assert main(flags(data, base_model, tmp_path / "fast", **more | {"optimize": "true"})) == 0
    stock, fast = curve(tmp_path / "stock"), curve(tmp_path / "fast")
    assert report(tmp_path / "stock")["fastbert"] is None
    for one, two in zip(stock, fast, strict=True):
        assert one["tokens"] == two["tokens"]
        for name in ("loss", "mlm_loss", "nsp_loss", "grad_norm"):
            assert abs(one[name] - two[name]) < 1e-4 * abs(one[name]), name


@pytest.mark.parametrize("optimize", ["true", "false"])
def test_accumulation_is_the_gradient_of_the_whole_batch(
    data: Path, base_model: Path, tmp_path: Path, optimize: str
) -> None:
    """One step of plain gradient descent over three micro-batches, against the formula on all together."""
    import datasets
    import transformers

    from fastbert.training.batching import Batches, Masking, Phase, TokenBudget, row_lengths

    more = {"config_overrides": NO_DROPOUT, "max_steps": 1, "gradient_accumulation_steps": 3, "warmup_steps": 0}
    more |= {"optim": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "max_grad_norm": 0}
    more |= {"optimize": optimize, "tokens_per_batch": 1000}
    assert main(flags(data, base_model, tmp_path / "out", **more)) == 0

    tokenizer = transformers.AutoTokenizer.from_pretrained(base_model)
    rows = datasets.load_from_disk(str(data))
    phase = Phase("data", rows, TokenBudget(row_lengths(rows), 1000, 42), 3)
    batches = Batches([phase], Masking(tokenizer, 0.15, False), 42, len(tokenizer), tokenizer.pad_token_id)
    transformers.set_seed(42)
    config = transformers.BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    config.update_from_string(NO_DROPOUT)
    model = transformers.BertForPreTraining(config).train()
    found: list[torch.Tensor] = []
    for name in ("labels", "next_sentence_label"):
        logits, labels = [], []
        for batch in (batches[i] for i in range(3)):
            outputs = model(**batch)
            output = outputs.prediction_logits if name == "labels" else outputs.seq_relationship_logits
            logits.append(output.view(-1, output.shape[-1]))
            labels.append(batch[name].view(-1))
        counts = [int((part != -100).sum()) for part in labels]
        assert len(set(counts)) > 1, "else a mean of means would pass too"
        found.append(torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels)))
    (found[0] + found[1]).backward()
    logged = curve(tmp_path / "out")[0]
    for name, loss in zip(("loss", "mlm_loss", "nsp_loss"), (found[0] + found[1], *found), strict=True):
        assert abs(logged[name] - loss.item()) < 1e-5 * loss.item(), name
    trained = transformers.BertForPreTraining.from_pretrained(tmp_path / "out").state_dict()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(trained[name], (weight - weight.grad).detach(), rtol=1e-4, atol=1e-5, msg=name)


TWO_PHASES = {"phase_steps": [9, 5], "max_steps": 14, "save_steps": 4, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def uninterrupted(data: Path, long_data: Path, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two phases, with dropout."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert main(flags([data, long_data], base_model, folder, **TWO_PHASES)) == 0
    return folder


def test_phases(uninterrupted: Path) -> None:
    found = report(uninterrupted)
    assert [part["steps"] for part in found["data"]] == [9, 5]
    assert [part["max_seq_length"] for part in found["data"]] == [32, 64]
    assert all(0.9 * 512 < entry["tokens"] <= 512 for entry in found["history"]), "every step costs the same"


@pytest.mark.parametrize("step", [8, 12])
def test_killed_and_resumed_to_the_bit(
    kit: Any, data: Path, long_data: Path, base_model: Path, uninterrupted: Path, tmp_path: Path, step: int
) -> None:
    """kill -9 while a checkpoint is being written in the first phase, and in the middle of the second."""
    out = tmp_path / "out"
    arguments = flags([data, long_data], base_model, out, **TWO_PHASES)
    folder = out / f"checkpoint-{step}"
    ready = folder if step == 8 else folder / "trainer_state.json"  # which is written last
    kit.signal_when(kit.start(arguments), ready.exists, signal.SIGKILL)
    assert not (out / "report.json").exists()
    assert main([*arguments, "--resume_from_checkpoint", "true"]) == 0
    assert report(out)["resumed_from"] in (("checkpoint-4", "checkpoint-8") if step == 8 else ("checkpoint-12",))
    assert curve(out) == curve(uninterrupted)
    assert len(curve(out)) == 14
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
    data: Path, long_data: Path, base_model: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = flags([data, long_data], base_model, uninterrupted, **TWO_PHASES)
    assert main(arguments) == 1
    assert "--resume_from_checkpoint true" in capsys.readouterr().err
    for name, value in (("seed", 7), ("mlm_probability", 0.2), ("tokens_per_batch", 300)):
        assert main([*arguments, "--resume_from_checkpoint", "true", f"--{name}", str(value)]) == 1
        assert f"that run had other {name}" in capsys.readouterr().err


def test_full_disk(
    data: Path,
    long_data: Path,
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
    arguments = [*flags([data, long_data], base_model, out, **TWO_PHASES), "--resume_from_checkpoint", "true"]
    file_size_limit(1000)
    status = main(arguments)
    file_size_limit(-1)
    assert status == 1
    error = capsys.readouterr().err
    assert "no space left" in error
    assert before.name in error
    assert last_complete(out) == before
    assert main(arguments) == 0
    assert curve(out) == curve(uninterrupted)


def test_full_sentences_and_whole_words(corpus: Path, base_model: Path, tmp_path: Path) -> None:
    """Without pairs there is the masked language model alone; also in bf16, with activation checkpointing."""
    import transformers

    folder = prepare(corpus, base_model, tmp_path / "data", format="full_sentences")
    more = {"whole_word_mask": True, "bf16": True, "gradient_checkpointing": True, "lr_scheduler_type": "cosine"}
    assert main(flags(folder, base_model, tmp_path / "out", **more)) == 0
    found = curve(tmp_path / "out")
    assert "nsp_loss" not in found[0]
    assert found[-1]["loss"] < found[0]["loss"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]
    transformers.BertForMaskedLM.from_pretrained(tmp_path / "out")
    roberta = more | {"model_type": "roberta", "whole_word_mask": False, "bf16": False, "max_steps": 2}
    assert main(flags(folder, base_model, tmp_path / "roberta", **roberta)) == 0
    assert curve(tmp_path / "roberta")[-1]["loss"] > 0


def test_flags_do_what_they_say(data: Path, base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputing gives the same bits, with dropout, bf16 others that are close; the optimizer is the fused one."""
    from fastbert import encoder

    calls: list[torch.dtype] = []
    attention = encoder.ops.attention

    def watched(qkv: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(qkv.dtype)
        return attention(qkv, *args, **kwargs)

    monkeypatch.setattr(encoder.ops, "attention", watched)
    seen = {}
    for name, more in (
        ("plain", {}),
        ("checkpointing", {"gradient_checkpointing": True}),
        ("bf16", {"bf16": True, "max_grad_norm": 0.1, "optim": "adamw_torch"}),
    ):
        assert main(flags(data, base_model, tmp_path / name, max_steps=3, **more)) == 0
        seen[name] = list(calls)
        calls.clear()
    assert seen["plain"] == [torch.float32] * 3 * 2
    assert seen["checkpointing"] == [torch.float32] * 3 * 2 * 2
    assert seen["bf16"] == [torch.bfloat16] * 3 * 2
    assert curve(tmp_path / "checkpointing") == curve(tmp_path / "plain")
    for one, two in zip(curve(tmp_path / "plain"), curve(tmp_path / "bf16"), strict=True):
        assert 0 < abs(one["loss"] - two["loss"]) < 0.02
    states = [torch.load(tmp_path / name / "checkpoint-3" / "optimizer.pt") for name in ("plain", "bf16")]
    assert [bool(state["param_groups"][0]["fused"]) for state in states] == [True, False]


def test_every_step_has_the_same_shapes(
    data: Path, long_data: Path, base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder's rows are the budget, whatever a batch holds; compiled, the padded tensors keep their shape, too."""
    from fastbert import encoder

    seen: set[int] = set()
    layer = encoder.layer

    def watched(x: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.add(x.shape[0])
        return layer(x, *args)

    monkeypatch.setattr(encoder, "layer", watched)
    more = {"config_overrides": NO_DROPOUT, "max_steps": 5, "phase_steps": [3, 2], "save_strategy": "no"}
    assert main(flags([data, long_data], base_model, tmp_path / "eager", **more)) == 0
    assert seen == {8 * 32}
    monkeypatch.undo()
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    more |= {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    assert main(flags([data, long_data], base_model, tmp_path / "compiled", **more)) == 0
    assert counters["stats"]["unique_graphs"] == 2, "one for each phase"
    assert not counters["graph_break"]
    eager, compiled = curve(tmp_path / "eager"), curve(tmp_path / "compiled")
    assert len({entry["tokens"] for entry in eager}) > 1
    for one, two in zip(eager, compiled, strict=True):
        for name in ("tokens", "loss", "mlm_loss", "nsp_loss", "nsp_accuracy", "grad_norm"):
            assert abs(one[name] - two[name]) < 1e-4 * abs(one[name]), name


def test_epochs_instead_of_steps(data: Path, base_model: Path, tmp_path: Path) -> None:
    more = {"max_steps": -1, "num_train_epochs": 0.5, "per_device_train_batch_size": 64}
    assert main(flags(data, base_model, tmp_path / "out", **more)) == 0
    found = report(tmp_path / "out")
    assert abs(found["data"][0]["epochs"] - 0.5) < 0.51 / found["steps"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"config_overrides": "hidden_size=33"}, "--config_overrides hidden_size=33: "),
        ({"config_overrides": "hidden_sise=32"}, "--config_overrides hidden_sise=32: "),
        ({"config_overrides": f"{TINY},vocab_size=20"}, "vocab_size 20 is less than the tokenizer's"),
        ({"config_overrides": f"{TINY},max_position_embeddings=16"}, "the model has 16 positions"),
        ({"tokens_per_batch": 20}, "--tokens_per_batch 20: --dataset"),
        ({"model_type": "roberta"}, "roberta has no next sentence prediction"),
        ({"model_type": "nobert"}, "--model_type"),
        ({"report_to": "tensorbored"}, "--report_to tensorbored: "),
        ({"fsdp": "full_shard"}, "--fsdp: this is one process"),
    ],
)
def test_bad_settings(
    data: Path, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: dict[str, Any], message: str
) -> None:
    assert main(flags(data, base_model, tmp_path / "out", **more)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_processes_that_do_not_know_of_each_other(
    data: Path, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchrun starts them where there is no GPU: they would all write the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(flags(data, base_model, tmp_path / "out", use_cpu=None)) == 1
    assert "2 processes were started" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"eval_strategy": "steps"}, "pretraining has no validation data"),
        ({"phase_steps": [3, 4]}, "--phase_steps"),
        ({"mlm_probability": 1.5}, "--mlm_probability must be between 0 and 1, got 1.5"),
        ({"tokenizer_name": None}, "--tokenizer_name is needed for a new model"),
        ({"model_name_or_path": "x"}, "--config_overrides and --config_name are for a new model"),
    ],
)
def test_bad_flags(
    data: Path, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(flags(data, base_model, tmp_path / "out", **more))
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_bad_data(
    data: Path, corpus: Path, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(tmp_path, base_model, tmp_path / "out")) == 1
    assert "not a folder made by fastbert prepare" in capsys.readouterr().err
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    shard = sorted(broken.glob("data-*.arrow"))[-1]
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    assert main(flags(broken, base_model, tmp_path / "out")) == 1
    assert f"--dataset {broken}: cannot be read" in capsys.readouterr().err
    (broken / "state.json").unlink()
    assert main(flags(broken, base_model, tmp_path / "out")) == 1
    assert "unfinished" in capsys.readouterr().err
    arguments = ["tokenizer", "--input", str(corpus), "--vocab_size", "90", "--quiet", "--output", str(tmp_path / "t")]
    assert main(arguments) == 0
    assert main(flags(data, tmp_path / "t", tmp_path / "out")) == 1
    assert "was prepared with another tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def damaged(data: Path, folder: Path, row: int, name: str, values: list[int]) -> Path:
    """A copy of prepared data in which a column of one row is another, in a file that opens as ever."""
    import pyarrow as pa

    shutil.copytree(data, folder)
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
    data: Path, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A token that no tokenizer gives, in a row of the sixth step."""
    import datasets

    from fastbert.training.batching import TokenBudget, row_lengths

    row = int(TokenBudget(row_lengths(datasets.load_from_disk(str(data))), 8 * 32, 42).rows(5)[0])
    used, out, more = tmp_path / "data", tmp_path / "out", {"max_steps": 8, "save_steps": 2}
    damaged(data, used, row, "input_ids", [10**6] * 5)
    assert main(flags(used, base_model, out, **more)) == 1
    assert f"--dataset {used}: holds the token id 1000000" in capsys.readouterr().err
    assert last_complete(out) == out / "checkpoint-4"
    shutil.rmtree(used)
    shutil.copytree(data, used)
    assert main([*flags(used, base_model, out, **more), "--resume_from_checkpoint", "true"]) == 0
    assert main(flags(data, base_model, tmp_path / "whole", **more)) == 0
    assert curve(out) == curve(tmp_path / "whole")

    long = damaged(data, tmp_path / "long", 7, "input_ids", [5] * 33)
    assert main(flags(long, base_model, tmp_path / "other", **more)) == 1
    assert f"--dataset {long}: row 7 has 33 tokens, allowed are 1 to 32" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_micro_batches(data: Path, base_model: Path, tmp_path: Path) -> None:
    """DistributedDataParallel over gloo: at each step both have the micro-batches that one alone would accumulate."""
    more = {"config_overrides": NO_DROPOUT, "max_steps": 4, "save_steps": 2}
    assert main(flags(data, base_model, tmp_path / "one", **more, gradient_accumulation_steps=2)) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    command = [*launch, "-m", "fastbert.cli", *flags(data, base_model, tmp_path / "two", **more)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for one, two in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert one["tokens"] == two["tokens"]
        for name in ("loss", "mlm_loss", "nsp_loss", "nsp_accuracy"):
            assert abs(one[name] - two[name]) < 1e-4 * max(1, abs(one[name])), name
    assert last_complete(tmp_path / "two") == tmp_path / "two" / "checkpoint-4"


WORKER = Path(__file__).with_name("sharding_worker.py")
SHARDED = {"config_overrides": NO_DROPOUT, "max_steps": 4, "save_steps": 2, "max_grad_norm": 0.5}
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
    kit: Any, data: Path, base_model: Path, run_commands: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """Runs under FSDP2 in two processes over gloo, and what each process saw of them; NAME is in the folder NAME."""
    folder = tmp_path_factory.mktemp("sharded")
    more = SHARDED | {"gradient_accumulation_steps": 2, "fsdp": []}  # --fsdp, without a value
    resuming = {"resume_from_checkpoint": folder / "whole" / "checkpoint-2"}
    half = {"bf16": True, "gradient_checkpointing": True, "max_steps": 2, "fsdp": "full_shard"}
    commands = {
        "whole": flags(data, base_model, folder / "whole", **more),
        "resumed": flags(data, base_model, folder / "resumed", **more, **resuming),
        "bf16": flags(data, base_model, folder / "bf16", **more | half),
    }
    for name, (config, _) in REFUSED.items():
        (folder / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
        commands[name] = flags(data, base_model, folder / name, **more, fsdp_config=folder / f"{name}.json")
    (folder / "layers.json").write_text(
        json.dumps({"reshard_after_forward": False, "transformer_layer_cls_to_wrap": ["BertLayer"]}), encoding="utf-8"
    )
    commands["finetuned"] = finetuning(kit, base_model, folder, fsdp="full_shard", fsdp_config=folder / "layers.json")
    (folder / "commands.json").write_text(json.dumps(commands), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    run_commands([[sys.executable, *launch, str(WORKER), str(folder)]], seconds=800, CUDA_VISIBLE_DEVICES="")
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
    sharded: tuple[Path, list[dict[str, Any]]], data: Path, base_model: Path, tmp_path: Path
) -> None:
    """FSDP2, with accumulated and clipped gradients: every weight in pieces, everything on the fast path."""
    folder, seen = sharded
    assert main(flags(data, base_model, tmp_path / "one", **SHARDED, gradient_accumulation_steps=4)) == 0
    one, two = curve(tmp_path / "one"), curve(folder / "whole")
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
    assert all(layer["path"] == "fast" for layer in report(folder / "whole")["fastbert"]["layers"])


def test_sharded_checkpoints_are_whole(sharded: tuple[Path, list[dict[str, Any]]]) -> None:
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
    assert report(folder)["model"]["class"] == "BertForPreTraining"


def test_sharded_runs_resume_to_the_bit(sharded: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, seen = sharded
    assert [own["resumed"]["status"] for own in seen] == [0, 0], seen[0]["resumed"]["errors"]
    assert report(folder / "resumed")["resumed_from"] == "checkpoint-2"
    assert curve(folder / "resumed") == curve(folder / "whole")
    whole, resumed = (folder / name / "model.safetensors" for name in ("whole", "resumed"))
    assert resumed.read_bytes() == whole.read_bytes()


def test_sharded_in_bf16(sharded: tuple[Path, list[dict[str, Any]]]) -> None:
    """Layers compute in bf16, from weights and with sums in float32; here each of them twice."""
    folder, seen = sharded
    assert [own["bf16"]["status"] for own in seen] == [0, 0], seen[0]["bf16"]["errors"]
    assert seen[0]["bf16"]["calls"] == {"fast": 2 * 2 * 2 * 2, "stock": 0}
    for full, half in zip(curve(folder / "whole"), curve(folder / "bf16"), strict=False):
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
    one, two = (report(path / "finetuned") for path in (tmp_path, folder))
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
