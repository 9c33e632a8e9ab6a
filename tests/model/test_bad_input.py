"""Bad input gives a clear error that names the argument, or the right result; never a crash or garbage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import build, inputs, real

import fastbert


def fast(**changes: Any) -> Any:
    return fastbert.optimize(build(**changes))


BAD_IDS = [
    (torch.full((2, 5), 120), IndexError, "input_ids"),
    (torch.full((2, 5), -1), IndexError, "input_ids"),
    (torch.full((2, 5), 2**40), IndexError, "input_ids"),
    (torch.ones(2, 5), TypeError, "input_ids"),
    (torch.ones(2, 5, dtype=torch.bool), TypeError, "input_ids"),
    (torch.ones(2, 73, dtype=torch.long), IndexError, "input_ids has sequences of 73 tokens, but position has only 72"),
]


@pytest.mark.parametrize(("ids", "error", "message"), BAD_IDS)
def test_bad_ids(ids: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fast()(input_ids=ids)


def test_other_bad_ids() -> None:
    ids = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(IndexError, match="token_type_ids"):
        fast()(input_ids=ids, token_type_ids=ids + 1)
    with pytest.raises(IndexError, match="position_ids"):
        fast()(input_ids=ids, position_ids=ids + 72)
    with pytest.raises(ValueError, match="token_type_ids"):
        fast()(input_ids=ids, token_type_ids=ids[:, :4])
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        fast()()


def test_length_of_another_family() -> None:
    model = fastbert.optimize(build("roberta"))
    with pytest.raises(IndexError, match="position"):
        model(input_ids=torch.full((2, 72), 5))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4, 20), r"attention_mask has shape \[4, 20\], the input needs \[4, 21\]"),
        (torch.ones(3, 21), r"attention_mask has shape \[3, 21\]"),
        (torch.ones(4, 21, 21), r"attention_mask has shape \[4, 21, 21\]"),
        (torch.zeros(4, 2, 21, 21), r"bias must have shape \[4 or 1, 3 or 1"),
        (torch.zeros(4, 1, 20, 21), r"attention_mask has shape \[4, 1, 20, 21\]"),
        (torch.ones(4, 1, 1, 20, dtype=torch.bool), r"attention_mask has shape \[4, 1, 1, 20\]"),
        (torch.zeros(4, 1, 21, 21, dtype=torch.long), "attention_mask with 4 dimensions has dtype torch.int64"),
    ],
)
def test_bad_masks(mask: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fast()(input_ids=inputs()["input_ids"], attention_mask=mask)


@pytest.mark.parametrize("training", [False, True])
def test_every_token_masked(training: bool) -> None:
    model = fast(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).train(training)
    batch = inputs()
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    y = model(**batch)[0]
    assert y.shape == (4, 21, 48)
    assert (y == 0).all()
    y.sum().backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_batch(shape: tuple[int, int]) -> None:
    model = fast()
    model.pooler = None  # which needs a first token
    y = model(input_ids=torch.empty(shape, dtype=torch.long))[0]
    assert y.shape == (*shape, 48)
    mask = torch.ones(shape, dtype=torch.long)
    assert model(input_ids=torch.empty(shape, dtype=torch.long), attention_mask=mask)[0].shape == (*shape, 48)


def test_non_contiguous_input() -> None:
    model = fast()
    batch = inputs("right")
    expected = model(**batch)[0]
    turned = {name: value.T.contiguous().T for name, value in batch.items()}
    assert not turned["input_ids"].is_contiguous()
    assert torch.equal(model(**turned)[0], expected)
    wide = {name: value.repeat_interleave(2, 1)[:, ::2] for name, value in batch.items()}
    assert torch.equal(model(**wide)[0], expected)
    small = {name: value.int() for name, value in batch.items()}
    assert torch.equal(model(**small)[0], expected)


def test_non_contiguous_weights() -> None:
    model = fast()
    batch = inputs("right")
    expected = model(**batch)[0]
    with torch.no_grad():
        for linear in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
            linear.weight = torch.nn.Parameter(linear.weight.T.contiguous().T)
            assert not linear.weight.is_contiguous() or 1 in linear.weight.shape
    torch.testing.assert_close(model(**batch)[0], expected, atol=1e-5, rtol=1e-5)


def test_nan_in_weights_stays_visible() -> None:
    for name in ("attention.self.query.weight", "output.LayerNorm.bias", "intermediate.dense.bias"):
        model = fast()
        with torch.no_grad():
            model.encoder.layer[0].get_parameter(name).view(-1)[3] = float("nan")
        batch = inputs("right")
        assert model(**batch)[0][real(batch)].isnan().any()
    model = fast()
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[7] = float("inf")
    assert not torch.isfinite(model(input_ids=torch.full((1, 3), 7))[0]).all()


def test_nan_at_masked_places_does_not_leak() -> None:
    model = fast()
    batch = inputs("right")
    embeds = torch.randn(4, 21, 48)
    expected = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])[0]
    embeds[~real(batch)] = float("nan")
    assert torch.equal(model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])[0], expected)


def test_labels_out_of_range() -> None:
    model = fast(head="ForMaskedLM")
    for label in (120, -1):
        with pytest.raises(IndexError, match="labels"):
            model(**inputs("none"), labels=torch.full((4, 21), label))
    with pytest.raises(ValueError, match="labels"):
        model(**inputs("none"), labels=torch.zeros(4, 20, dtype=torch.long))


def test_wrong_device() -> None:
    model = fast()
    with pytest.raises((ValueError, RuntimeError, NotImplementedError), match="input_ids|device|meta"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long, device="meta"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    build(head="ForMaskedLM").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("keep", [0, 7, 1000, -1])
def test_truncated_checkpoint(checkpoint: Path, keep: int) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(OSError, match="truncated or corrupt"):
        fastbert.BertForMaskedLM.from_pretrained(checkpoint)


def test_corrupt_checkpoint(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[:16] = b"\xff" * 16
    file.write_bytes(content)
    with pytest.raises(OSError, match="truncated or corrupt"):
        fastbert.BertModel.from_pretrained(checkpoint)


def test_corrupt_configuration(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"hidden_size": ')
    with pytest.raises(OSError, match=r"config.json"):
        fastbert.BertModel.from_pretrained(checkpoint)


def test_pickled_weights_are_refused(checkpoint: Path) -> None:
    model = fastbert.BertModel.from_pretrained(checkpoint, use_safetensors=None)  # transformers' own default
    (checkpoint / "model.safetensors").unlink()
    torch.save(model.state_dict(), checkpoint / "pytorch_model.bin")
    with pytest.raises(OSError, match="pickled weights"):
        fastbert.BertModel.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="use_safetensors must be True"):
        fastbert.BertModel.from_pretrained(checkpoint, use_safetensors=False)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=str(tmp_path.name)):
        fastbert.BertModel.from_pretrained(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(OSError, match=str(tmp_path.name)):
        fastbert.BertModel.from_pretrained(tmp_path, local_files_only=True)


@pytest.mark.parametrize(("head", "most"), [("Model", 9), ("ForMaskedLM", 8), ("ForSequenceClassification", 6)])
def test_one_positional_argument_too_many(head: str, most: int) -> None:
    ids = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(TypeError):
        fast(head=head)(ids, torch.ones_like(ids), *[None] * (most - 2), True)
