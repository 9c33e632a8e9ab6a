"""Small random models of every family, and the rule by which a fast model's numbers are right.

The truth is the stock model in float64. With err(y) = max|y - truth| over real tokens, and eager the stock model with
eager attention in the dtype under test: err(ours) <= 2 err(eager) + floor forward, 3 err(eager) + floor for gradients,
RMS at most 1.5 times eager's; the floor is one rounding of the largest value.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import fastbert

VOCABULARY = 120
MASKS = ("none", "full", "right", "left", "holes", "empty row")

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "max_position_embeddings": 72,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
    "pad_token_id": 1,
}
DISTIL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "dim": 48,
    "n_layers": 2,
    "n_heads": 3,
    "hidden_dim": 96,
    "max_position_embeddings": 72,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "seq_classif_dropout": 0.0,
    "qa_dropout": 0.0,
    "initializer_range": 0.2,
    "pad_token_id": 1,
}
PREFIXES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm_roberta": "XLMRoberta",
    "camembert": "Camembert",
    "electra": "Electra",
    "ernie": "Ernie",
    "data2vec_text": "Data2VecText",
    "distilbert": "DistilBert",
    "roc_bert": "RoCBert",
}


def config(family: str = "bert", **changes: Any) -> Any:
    """A small configuration. The names of BERT's dropouts and sizes work for distilbert, too."""
    if family == "distilbert":
        names = {"hidden_dropout_prob": "dropout", "attention_probs_dropout_prob": "attention_dropout"}
        names |= {"num_hidden_layers": "n_layers", "hidden_act": "activation"}
        return transformers.DistilBertConfig(**DISTIL | {names.get(k, k): v for k, v in changes.items()})
    extra: dict[str, Any] = {"embedding_size": 32} if family == "electra" else {}
    if family == "roc_bert":
        extra = {"pronunciation_vocab_size": 10, "shape_vocab_size": 10, "enable_pronunciation": False}
        extra |= {"enable_shape": False, "concat_input": False}
    return getattr(transformers, f"{PREFIXES[family]}Config")(**SMALL | extra | changes)


def build(family: str = "bert", head: str = "Model", *, train: bool = False, **changes: Any) -> Any:
    """A stock model with random weights, biases and norms included."""
    model = getattr(transformers, PREFIXES[family] + head)(config(family, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, mean=1.0 if name.lower().endswith("norm.weight") else 0.0, std=0.2)
    return model.train(train)


def inputs(mask: str = "right", batch: int = 4, seqlen: int = 21) -> dict[str, Tensor]:
    """input_ids, and an attention_mask of one of MASKS. Padded places hold the padding token."""
    result = {"input_ids": torch.randint(2, VOCABULARY, (batch, seqlen))}
    if mask == "none":
        return result
    attention_mask = torch.ones(batch, seqlen, dtype=torch.long)
    for row in range(1, batch):
        if mask in ("right", "empty row"):
            attention_mask[row, seqlen - 5 * row :] = 0
        elif mask == "left":
            attention_mask[row, : 4 * row] = 0
        elif mask == "holes":
            attention_mask[row, 1::row] = 0
    if mask == "empty row":
        attention_mask[1] = 0
    result["input_ids"][attention_mask == 0] = 1
    result["attention_mask"] = attention_mask
    return result


def real(batch: dict[str, Tensor]) -> Tensor:
    """Bool [B, S]: the real tokens."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def judge(name: str, ours: Tensor, eager: Tensor, truth: Tensor, factor: float = 2.0) -> None:
    """Assert the rule for one tensor."""
    assert ours.shape == truth.shape, f"{name}: shape {list(ours.shape)}, should be {list(truth.shape)}"
    assert ours.dtype == eager.dtype, f"{name}: {ours.dtype}, should be {eager.dtype}"
    assert torch.isfinite(ours).all(), f"{name}: not finite"
    truth = truth.detach().double()
    error, error_eager = (ours.detach().double() - truth).abs(), (eager.detach().double() - truth).abs()
    rounding = torch.finfo(ours.dtype).eps
    allowed = factor * error_eager.max() + rounding * truth.abs().max()
    assert error.max() <= allowed, f"{name}: error {error.max():.3g}, allowed {allowed:.3g}"
    if truth.numel() < 100:  # too few to compare their RMS
        return
    rms, rms_eager, rms_truth = (value.square().mean().sqrt() for value in (error, error_eager, truth))
    allowed = 1.5 * rms_eager + rounding * rms_truth
    assert rms <= allowed, f"{name}: RMS error {rms:.3g}, allowed {allowed:.3g}"


def judge_gradients(names: Any, ours: Any, eager: Any, truth: Any) -> None:
    """Assert the rule for the gradients of all parameters.

    They are one vector, the gradient of the model: the floor is one rounding of its largest element, and the RMS is
    taken over all of it; the largest error is judged tensor by tensor.
    """
    rounding = torch.finfo(next(gradient for gradient in eager if gradient is not None).dtype).eps
    largest = max(gradient.abs().max() for gradient in truth if gradient is not None)
    squares, squares_eager = [], []
    for name, one, one_eager, one_truth in zip(names, ours, eager, truth, strict=True):
        assert (one is None) == (one_truth is None), name
        if one_truth is None:
            continue
        assert torch.isfinite(one).all(), name
        error, error_eager = (gradient.double() - one_truth for gradient in (one, one_eager))
        allowed = 3.0 * error_eager.abs().max() + rounding * largest
        assert error.abs().max() <= allowed, f"{name}: error {error.abs().max():.3g}, allowed {allowed:.3g}"
        squares.append(error.square().flatten())
        squares_eager.append(error_eager.square().flatten())
    rms, rms_eager = (torch.cat(values).mean().sqrt() for values in (squares, squares_eager))
    assert rms <= 1.5 * rms_eager + rounding * largest, f"gradients: RMS error {rms:.3g}, eager {rms_eager:.3g}"


def contestants(stock: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any]:
    """(ours, eager, truth): three copies of a stock model."""
    truth, eager, ours = (copy.deepcopy(stock) for _ in range(3))
    truth.double().set_attn_implementation("eager")
    eager.to(dtype).set_attn_implementation("eager")
    return fastbert.optimize(ours.to(dtype)), eager, truth


def all_fast(model: nn.Module) -> bool:
    """Whether every layer reports the fast path, and at least one layer call was fast."""
    report = fastbert.report(model)
    return report.calls["fast"] > 0 and all(layer["path"] == "fast" for layer in report.as_dict()["layers"])


def reasons(model: nn.Module) -> list[str | None]:
    """The reason of every layer."""
    return [layer["reason"] for layer in fastbert.report(model).as_dict()["layers"]]


def check_model(
    stock: nn.Module, batch: dict[str, Any], dtype: torch.dtype = torch.float32, *, fast: bool = True
) -> None:
    """Output and all gradients of a base model, by the rule, over the real tokens."""
    keep = real(batch)
    results = []
    upstream = None
    for model in contestants(stock, dtype):
        y = model(**batch)[0][keep]
        if upstream is None:
            assert all_fast(model) == fast, str(fastbert.report(model))
            upstream = torch.randn(y.shape, device=y.device)
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(y, parameters, upstream.to(y.dtype), allow_unused=True)
        results.append((y, gradients))
    judge("last_hidden_state", *(y for y, _ in results))
    judge_gradients([name for name, _ in stock.named_parameters()], *(gradients for _, gradients in results))
