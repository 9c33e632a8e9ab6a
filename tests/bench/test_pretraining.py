"""The pretraining benchmark: its contestants compute one and the same loss."""

from __future__ import annotations

import pytest
import torch
from fastbert.bench import cli
from fastbert.bench.pretraining import CONTESTANTS, LAST, last_loss, packed_loss, table


def test_packed_is_the_same_loss() -> None:
    from transformers import BertConfig, BertForPreTraining

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=50, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
    model = BertForPreTraining(config).train()
    lengths = torch.tensor([7, 3, 12, 1])
    real = (torch.arange(12) < lengths[:, None]).long()
    ids = torch.randint(5, 50, real.shape) * real
    labels = torch.where((torch.rand(real.shape) < 0.4) & real.bool(), ids, -100)
    batch = {
        "input_ids": ids,
        "attention_mask": real,
        "token_type_ids": (torch.arange(12) > 2).long() * real,
        "labels": labels,
        "next_sentence_label": torch.tensor([0, 1, 1, 0]),
    }
    found, wanted = packed_loss(model, batch), model(**batch).loss
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(loss, model.bert.pooler.dense.weight) for loss in (found, wanted)))


def test_table() -> None:
    rows = [
        {"contestant": name, "seed": 0, "losses": [2.0, 1.0 + number], "seconds": [1.0, 1.0], "tokens": [10, 10]}
        | {"memory": {"peak": 2**20, "before": 0}}
        for number, name in enumerate(CONTESTANTS)
    ]
    lines = table(rows).splitlines()
    assert len(lines) == 1 + len(CONTESTANTS)
    assert lines[1].split() == ["hf", "0", "10", "1", "1.5000"]
    assert lines[2].split()[-2:] == ["0.0e+00", "1.0e+00"]


def test_loss_at_the_end() -> None:
    assert last_loss({"losses": [9.0] * 5 + [1.0, 3.0] * (LAST // 2)}) == 2.0


def test_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["--dataset", "none", "--tokenizer_name", "none"]
    assert cli.main(["pretraining", *folders, "--contestants", "hf,nobody"]) == 2
    assert "fastbert bench pretraining: --contestants has nobody; it may have: hf, " in capsys.readouterr().err
