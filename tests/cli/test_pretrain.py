"""``fastbert pretrain``: it learns, what its flags do, and what plain transformers makes of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastbert.cli import main


@pytest.fixture(scope="module")
def trained(kit: Any, pairs: Path, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is long enough to learn something."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    more = {"max_steps": 120, "learning_rate": 5e-3, "per_device_train_batch_size": 16, "logging_steps": 10}
    more |= {"save_steps": 60}
    with kit.pictures():
        assert main(kit.pretrain_flags(pairs, base_model, folder, **more)) == 0
    return folder


def test_it_learns(kit: Any, trained: Path, pairs: Path) -> None:
    found = kit.report(trained)
    first, last = found["history"][0], found["history"][-1]
    vocabulary = json.loads((trained / "config.json").read_text())["vocab_size"]
    assert abs(first["mlm_loss"] - math.log(vocabulary)) < 1.0
    assert found["data"][0]["unigram_entropy"] == kit.report(pairs)["unigram_entropy"]
    # How frequent each word is, at least: whether 120 steps get below that hangs on the numbering of the vocabulary.
    assert last["mlm_loss"] < found["data"][0]["unigram_entropy"] + 0.1 < first["mlm_loss"] - 0.5
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
    kit: Any, trained: Path, pairs: Path, base_model: Path, tmp_path: Path
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
    assert main(kit.pretrain_flags(pairs, base_model, tmp_path / "on", max_steps=2, **more)) == 0
    assert kit.curve(tmp_path / "on")[0]["mlm_loss"] < kit.report(trained)["history"][1]["mlm_loss"], (
        "it goes on, not anew"
    )
    found = transformers.BertForPreTraining.from_pretrained(tmp_path / "on")
    assert set(found.state_dict()) == set(stock.state_dict())


def test_the_same_losses_as_stock(kit: Any, pairs: Path, base_model: Path, tmp_path: Path) -> None:
    more = {"dropout": False, "max_steps": 6, "optimize": "false"}
    assert main(kit.pretrain_flags(pairs, base_model, tmp_path / "stock", **more)) == 0
    assert main(kit.pretrain_flags(pairs, base_model, tmp_path / "fast", **more | {"optimize": "true"})) == 0
    stock, fast = kit.curve(tmp_path / "stock"), kit.curve(tmp_path / "fast")
    assert kit.report(tmp_path / "stock")["fastbert"] is None
    for one, two in zip(stock, fast, strict=True):
        assert one["tokens"] == two["tokens"]
        for name in ("loss", "mlm_loss", "nsp_loss", "grad_norm"):
            assert abs(one[name] - two[name]) < 1e-4 * abs(one[name]), name


@pytest.mark.parametrize("optimize", ["true", "false"])
def test_accumulation_is_the_gradient_of_the_whole_batch(
    kit: Any, pairs: Path, base_model: Path, tmp_path: Path, optimize: str
) -> None:
    """One step of plain gradient descent over three micro-batches, against the formula on all together."""
    import datasets
    import transformers

    from fastbert.training.batching import Batches, Masking, Phase, TokenBudget, row_lengths

    more = {"dropout": False, "max_steps": 1, "gradient_accumulation_steps": 3, "warmup_steps": 0}
    more |= {"optim": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "max_grad_norm": 0}
    more |= {"optimize": optimize, "tokens_per_batch": 1000}
    assert main(kit.pretrain_flags(pairs, base_model, tmp_path / "out", **more)) == 0

    tokenizer = transformers.AutoTokenizer.from_pretrained(base_model)
    rows = datasets.load_from_disk(str(pairs))
    phase = Phase("data", rows, TokenBudget(row_lengths(rows), 1000, 42), 3)
    batches = Batches([phase], Masking(tokenizer, 0.15, False), 42, len(tokenizer), tokenizer.pad_token_id)
    transformers.set_seed(42)
    config = transformers.BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    config.update_from_string(kit.NO_DROPOUT)
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
    logged = kit.curve(tmp_path / "out")[0]
    for name, loss in zip(("loss", "mlm_loss", "nsp_loss"), (found[0] + found[1], *found), strict=True):
        assert abs(logged[name] - loss.item()) < 1e-5 * loss.item(), name
    trained = transformers.BertForPreTraining.from_pretrained(tmp_path / "out").state_dict()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(trained[name], (weight - weight.grad).detach(), rtol=1e-4, atol=1e-5, msg=name)


def test_full_sentences_and_whole_words(kit: Any, corpus: Path, base_model: Path, tmp_path: Path) -> None:
    """Without pairs there is the masked language model alone; also in bf16, with activation checkpointing."""
    import transformers

    folder = kit.prepare(corpus, base_model, tmp_path / "data", format="full_sentences")
    more = {"whole_word_mask": True, "bf16": True, "gradient_checkpointing": True, "lr_scheduler_type": "cosine"}
    assert main(kit.pretrain_flags(folder, base_model, tmp_path / "out", **more)) == 0
    found = kit.curve(tmp_path / "out")
    assert "nsp_loss" not in found[0]
    assert found[-1]["loss"] < found[0]["loss"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]
    transformers.BertForMaskedLM.from_pretrained(tmp_path / "out")
    roberta = more | {"model_type": "roberta", "whole_word_mask": False, "bf16": False, "max_steps": 2}
    assert main(kit.pretrain_flags(folder, base_model, tmp_path / "roberta", **roberta)) == 0
    assert kit.curve(tmp_path / "roberta")[-1]["loss"] > 0


def test_flags_do_what_they_say(
    kit: Any, pairs: Path, base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        assert main(kit.pretrain_flags(pairs, base_model, tmp_path / name, max_steps=3, **more)) == 0
        seen[name] = list(calls)
        calls.clear()
    assert seen["plain"] == [torch.float32] * 3 * 2
    assert seen["checkpointing"] == [torch.float32] * 3 * 2 * 2
    assert seen["bf16"] == [torch.bfloat16] * 3 * 2
    assert kit.curve(tmp_path / "checkpointing") == kit.curve(tmp_path / "plain")
    for one, two in zip(kit.curve(tmp_path / "plain"), kit.curve(tmp_path / "bf16"), strict=True):
        assert 0 < abs(one["loss"] - two["loss"]) < 0.02
    states = [torch.load(tmp_path / name / "checkpoint-3" / "optimizer.pt") for name in ("plain", "bf16")]
    assert [bool(state["param_groups"][0]["fused"]) for state in states] == [True, False]


def test_every_step_has_the_same_shapes(
    kit: Any, pairs: Path, long_pairs: Path, base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder's rows are the budget, whatever a batch holds; compiled, the padded tensors keep their shape, too."""
    from fastbert import encoder

    seen: set[int] = set()
    layer = encoder.layer

    def watched(x: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.add(x.shape[0])
        return layer(x, *args)

    monkeypatch.setattr(encoder, "layer", watched)
    more = {"dropout": False, "max_steps": 5, "phase_steps": [3, 2], "save_strategy": "no"}
    assert main(kit.pretrain_flags([pairs, long_pairs], base_model, tmp_path / "eager", **more)) == 0
    assert seen == {8 * 32}
    monkeypatch.undo()
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    more |= {"torch_compile": True, "torch_compile_backend": "eager"}
    assert main(kit.pretrain_flags([pairs, long_pairs], base_model, tmp_path / "compiled", **more)) == 0
    assert counters["stats"]["unique_graphs"] == 2, "one for each phase"
    assert not counters["graph_break"]
    eager, compiled = kit.curve(tmp_path / "eager"), kit.curve(tmp_path / "compiled")
    assert len({entry["tokens"] for entry in eager}) > 1
    for one, two in zip(eager, compiled, strict=True):
        for name in ("tokens", "loss", "mlm_loss", "nsp_loss", "nsp_accuracy", "grad_norm"):
            assert abs(one[name] - two[name]) < 1e-4 * abs(one[name]), name


def test_epochs_instead_of_steps(kit: Any, pairs: Path, base_model: Path, tmp_path: Path) -> None:
    more = {"max_steps": -1, "num_train_epochs": 0.5, "per_device_train_batch_size": 64}
    assert main(kit.pretrain_flags(pairs, base_model, tmp_path / "out", **more)) == 0
    found = kit.report(tmp_path / "out")
    assert abs(found["data"][0]["epochs"] - 0.5) < 0.51 / found["steps"]
