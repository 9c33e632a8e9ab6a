"""Who builds, wraps or loads a model: the classes of fastbert, enable(), PEFT, sentence-transformers, pipelines."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from comparison import SMALL, all_fast, build, config, inputs, judge, real, reasons
from torch import nn
from transformers.modeling_utils import PreTrainedModel

import fastbert
from fastbert import swapped

CLASSES = (
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertLMHeadModel",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
    "BertForMultipleChoice",
)


@pytest.mark.parametrize("name", CLASSES)
def test_class(name: str, tmp_path: Path) -> None:
    stock_class = getattr(transformers, name)
    cls = getattr(fastbert, name)
    assert issubclass(cls, stock_class)
    assert cls.__name__ == name
    model = cls(config()).eval()
    model.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    assert told["architectures"] == [name]
    assert "fastbert" not in json.dumps(told)
    batch = inputs("right")
    if name == "BertForMultipleChoice":
        batch = {key: value[:, None] for key, value in batch.items()}
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True)
        stock = stock_class.from_pretrained(tmp_path).eval()
        again = cls.from_pretrained(tmp_path).eval()
        assert type(again) is cls
        assert type(stock) is stock_class
        outputs = again(**batch, output_hidden_states=True)
        assert len(outputs.hidden_states) == 3
        assert torch.equal(outputs[0], expected[0])
        keep = real(batch) if outputs[0].dim() == 3 else slice(None)
        torch.testing.assert_close(outputs[0][keep], stock(**batch)[0][keep], atol=2e-5, rtol=2e-5)
    assert all_fast(again)
    assert type(fastbert.restore(again)) is stock_class


def test_auto_classes_are_not_touched(tmp_path: Path) -> None:
    fastbert.BertForMaskedLM(config()).save_pretrained(tmp_path)
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(model) is transformers.BertForMaskedLM
    assert set(reasons(model)) == {"fastbert.optimize has not been called"}


def test_pipeline_without_warning(minilm: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    model = fastbert.BertForSequenceClassification.from_pretrained(minilm, num_labels=2)
    caplog.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classify = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
        answers = classify(["a fine day", "and a longer one , it seems , with rain"], batch_size=2)
    assert len(answers) == 2
    assert not [record for record in caplog.records if "not supported" in record.getMessage()]
    assert all_fast(model)


def test_enable_reaches_every_way_of_building(tmp_path: Path) -> None:
    stock_init = PreTrainedModel.post_init
    build(head="ForMaskedLM").save_pretrained(tmp_path)

    class Mine(transformers.BertPreTrainedModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.tower = transformers.BertModel(config)
            self.post_init()

        def forward(self, **batch: torch.Tensor) -> Any:
            return self.tower(**batch)

    with fastbert.enabled():
        models = [
            transformers.BertModel(config()),
            transformers.AutoModel.from_config(config("roberta")),
            transformers.AutoModel.from_pretrained(tmp_path),
            transformers.BertForMaskedLM.from_pretrained(tmp_path),
            transformers.DistilBertForSequenceClassification(config("distilbert")),
            Mine(config()),
        ]
        with fastbert.enabled():
            pass
        fastbert.enable()
        fastbert.disable()
        models.append(transformers.BertModel(config()))
    assert PreTrainedModel.post_init is stock_init
    for model in models:
        model.eval()(**inputs())
        assert all_fast(model), type(model)
        assert model.config._attn_implementation == "sdpa"
    later = transformers.BertModel(config())
    assert set(reasons(later)) == {"fastbert.optimize has not been called"}


def test_enabled_models_give_the_same_numbers() -> None:
    stock = build()
    with fastbert.enabled():
        ours = transformers.BertModel(stock.config)
    ours.load_state_dict(stock.state_dict())
    ours.eval()
    truth = copy.deepcopy(stock).double()
    for mask in ("holes", "none"):
        batch = inputs(mask)
        judge(mask, *(m(**batch)[0][real(batch)] for m in (ours, stock, truth)))


def test_enable_keeps_an_implementation_that_was_asked_for() -> None:
    with fastbert.enabled():
        model = transformers.BertModel(config(attn_implementation="eager"))
    assert model.config._attn_implementation == "eager"
    outputs = model(**inputs(), output_attentions=True)
    assert len(outputs.attentions) == 2
    model.set_attn_implementation("sdpa")
    model(**inputs())
    assert all_fast(model)


def test_enable_survives_exceptions() -> None:
    stock_init = PreTrainedModel.post_init
    with pytest.raises(ZeroDivisionError), fastbert.enabled():
        raise ZeroDivisionError
    with pytest.raises(TypeError), fastbert.enabled():
        transformers.BertModel(None)
    assert PreTrainedModel.post_init is stock_init
    with pytest.raises(RuntimeError, match="not enabled"):
        fastbert.disable()


def test_enable_when_somebody_else_patches_too() -> None:
    stock_init = PreTrainedModel.post_init
    fastbert.enable()
    ours = PreTrainedModel.post_init

    def theirs(self: Any) -> None:
        ours(self)

    PreTrainedModel.post_init = theirs  # type: ignore[method-assign]
    try:
        fastbert.disable()
        assert PreTrainedModel.post_init is theirs
        assert set(reasons(transformers.BertModel(config()))) == {"fastbert.optimize has not been called"}
    finally:
        PreTrainedModel.post_init = stock_init  # type: ignore[method-assign]


def lora(model: nn.Module, *, dropout: float = 0.0) -> Any:
    settings = peft.LoraConfig(target_modules=["query", "value"], lora_dropout=dropout, init_lora_weights=False)
    return peft.get_peft_model(model, settings).eval()


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(when: str) -> None:
    stock = build(head="ForSequenceClassification")
    batch = inputs("right")
    torch.manual_seed(3)
    expected_model = lora(copy.deepcopy(stock))
    expected = expected_model(**batch).logits
    plain = stock(**batch).logits
    assert not torch.allclose(expected, plain, atol=1e-3)
    torch.manual_seed(3)
    model = fastbert.optimize(lora(stock)) if when == "before" else lora(fastbert.optimize(stock))
    torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    assert all("attention.self.query" in (reason or "") for reason in reasons(model))
    model.train()
    model(**batch, labels=torch.arange(4) % 2).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)
    model.eval()
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch).logits, plain, atol=1e-5, rtol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    assert reasons(merged) == [None, None]
    assert all_fast(merged)


def test_prompt_tuning() -> None:
    stock = build(head="ForSequenceClassification")
    settings = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    torch.manual_seed(3)
    expected = peft.get_peft_model(copy.deepcopy(stock), settings).eval()
    torch.manual_seed(3)
    model = peft.get_peft_model(fastbert.optimize(stock), settings).eval()
    model.load_state_dict(expected.state_dict())
    batch = inputs("right")
    torch.testing.assert_close(model(**batch).logits, expected(**batch).logits, atol=1e-5, rtol=1e-5)


def test_sentence_transformer(minilm: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    transformer = Transformer(str(minilm))
    model = SentenceTransformer(modules=[transformer, Pooling(384)], device="cpu")
    texts = ["A short one.", "And a sentence that is rather longer than the first one was.", "Three."]
    expected = model.encode(texts)
    assert fastbert.optimize(model) is model
    ours = model.encode(texts)
    assert abs(ours - expected).max() < 1e-5
    assert all_fast(model)
    fastbert.restore(model)
    assert abs(model.encode(texts) - expected).max() < 1e-6


def test_cross_encoder(minilm: Path, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    torch.manual_seed(0)
    transformers.BertForSequenceClassification.from_pretrained(minilm, num_labels=1).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(minilm).save_pretrained(tmp_path)
    model = CrossEncoder(str(tmp_path), device="cpu")
    pairs = [("What is an atom?", "An atom is small."), ("Who?", "Nobody knows who painted it, after all.")]
    expected = model.predict(pairs)
    fastbert.optimize(model)
    assert abs(model.predict(pairs) - expected).max() < 1e-5
    assert all_fast(model)


def test_import_is_light() -> None:
    code = (
        "import sys, fastbert; heavy = {'transformers', 'datasets', 'peft', 'sentence_transformers', 'matplotlib'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "from fastbert import BertModel, optimize, report;"
        "assert not {'datasets', 'peft', 'sentence_transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(CLASSES) <= set(dir(fastbert))
    with pytest.raises(AttributeError, match="no attribute 'BertLayers'"):
        fastbert.BertLayers  # noqa: B018


def test_calls_are_printed_at_exit() -> None:
    code = (
        "import fastbert, torch, transformers\n"
        "with fastbert.enabled():\n"
        f"    model = transformers.BertModel(transformers.BertConfig(**{SMALL!r}))\n"
        "model(torch.ones(1, 4, dtype=torch.long))\n"
    )
    environment = os.environ | {"FASTBERT_PRINT_CALLS": "1"}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert "fastbert: 2 fast layer calls, 0 stock" in done.stdout


def test_a_subclass_of_ours_survives_restore() -> None:
    class Mine(fastbert.BertForMaskedLM):
        pass

    model = Mine(config()).eval()
    batch = inputs("right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = model(**batch, labels=labels).loss
    assert fastbert.restore(model) is model
    assert not any(isinstance(module, swapped.Fast) for module in model.modules() if module is not model)
    torch.testing.assert_close(model(**batch, labels=labels).loss, expected)
    torch.testing.assert_close(fastbert.optimize(model)(**batch, labels=labels).loss, expected)
    assert all_fast(model)
