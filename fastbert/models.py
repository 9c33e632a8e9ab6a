"""BertModel and the eight heads, as subclasses that keep transformers' own class names.

What the heads add to transformers' own: the masked language model's loss is computed at the labelled positions only,
its logits when somebody asks for them; `num_items_in_batch` counts, which the stock heads take and drop, so that
gradient accumulation gives the gradient of the whole batch; masked places are computed where a softmax, a summary or a
loss reads them; checkpoints are read as safetensors only.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
    MaskedLMOutput,
)
from transformers.models.bert import modeling_bert
from transformers.utils import ModelOutput

from fastbert import deferred, families, guards, ops, packing, patch, swapped
from fastbert.weights import load_safetensors


class FastModel(swapped.Fast):
    """What every model of ours adds to its stock class, heads or not."""

    def post_init(self) -> None:
        super().post_init()
        patch.swap(self, replace=("sdpa", None))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but from safetensors only: a pickled checkpoint (.bin) can run any code.

        Raises ValueError for use_safetensors=False, OSError for a checkpoint that is missing, pickled, truncated or
        corrupt.
        """
        if (given := kwargs.pop("use_safetensors", None)) not in (True, None):
            raise ValueError(
                f"from_pretrained: use_safetensors must be True or None, got {given!r}: pickled weights are not loaded"
            )
        return load_safetensors(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)


class FastBaseModel(FastModel):
    """A base model of embeddings, encoder and perhaps a pooler. Packs before it embeds where that changes nothing."""

    def forward_by_name(self, stock: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """The forward, all arguments by name. stock: the stock class's own."""
        y = None if torch.compiler.is_compiling() else swapped.encode_ids(self, kwargs)
        if y is None:
            return stock(self, **kwargs)
        outputs: ModelOutput
        if hasattr(self, "pooler"):
            pooled = None if self.pooler is None else self.pooler(y)
            outputs = BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=y, pooler_output=pooled)
        else:  # ELECTRA
            outputs = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=y)
        return_dict = kwargs.get("return_dict", self.config.return_dict)
        return outputs.to_tuple() if return_dict is False else outputs


class FastHead(FastModel):
    """A head whose loss is a mean over its labels."""

    def forward_by_name(self, stock: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """The forward, all arguments by name. stock: the stock class's own."""
        num_items = kwargs.pop("num_items_in_batch", None)
        return rescaled(stock(self, **kwargs), kwargs.get("labels"), num_items)


class FastTokenClassification(FastHead):
    """A head with a label for each token."""

    def forward_by_name(self, stock: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """The forward, all arguments by name. stock: the stock class's own."""
        return super().forward_by_name(stock, with_padding(self, kwargs, kwargs.get("labels")))


class FastSummary(FastHead):
    """ELECTRA's multiple choice, whose summary of a text may be its last place, or the mean of all."""

    def forward_by_name(self, stock: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """The forward, all arguments by name. stock: the stock class's own."""
        if getattr(self.sequence_summary, "summary_type", None) != "first":
            kwargs = kwargs | {swapped.KEEP_PADDING: True}
        return super().forward_by_name(stock, kwargs)


class FastUnscaledHead(FastModel):
    """A head whose loss is no mean over labels that a trainer could count: it must divide the loss itself."""

    accepts_loss_kwargs = False

    def forward_by_name(self, stock: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """The forward, all arguments by name. stock: the stock class's own."""
        if self.family.name != "electra":  # whose discriminator leaves out the labels of masked places itself
            kwargs = with_padding(self, kwargs, kwargs.get("labels", kwargs.get("labels_input_ids")))
        return stock(self, **kwargs)


class FastQuestionAnswering(FastModel):
    """Question answering: its softmax runs over all places, so the padded ones have to hold what stock computes."""

    def forward_by_name(self, stock: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """The forward, all arguments by name. stock: the stock class's own."""
        return stock(self, **kwargs | {swapped.KEEP_PADDING: True})


class FastCausalLM(FastModel):
    """A causal language model. The place before a token predicts it, and its loss reads that even if it is masked."""

    def forward_by_name(self, stock: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """The forward, all arguments by name. stock: the stock class's own."""
        if self._reads_masked_places(kwargs):
            # Not by KEEP_PADDING: the loss function gets all further arguments, too, and may be anybody's.
            visible = kwargs["attention_mask"].bool()
            visible = visible if visible.dim() == 4 else visible[:, None, None, :]
            kwargs = kwargs | {"attention_mask": packing.additive(visible, self.dtype, -torch.inf)}
        return stock(self, **kwargs)

    def _reads_masked_places(self, kwargs: dict[str, Any]) -> bool:
        """Whether the loss reads a place that the encoder would leave out, or may do so where values cannot be read."""
        labels, mask = kwargs.get("labels"), kwargs.get("attention_mask")
        if packing.bounded() or not isinstance(labels, Tensor) or not isinstance(mask, Tensor):
            return False
        if mask.dim() != 2 and (mask.dim() != 4 or mask.dtype is not torch.bool):
            return False
        if self.config.is_decoder or getattr(self.config, "is_causal", False):  # no place is left out
            return False
        if torch.compiler.is_compiling():
            return True
        if guards.call_reason(self.config, kwargs) is not None:
            return False
        if self.loss_function is not ForCausalLMLoss:
            labels = torch.zeros_like(labels)  # it may read any place
        elif kwargs.get("shift_labels") is not None:
            labels = kwargs["shift_labels"]
        else:
            labels = F.pad(labels, (0, 1), value=-100)[..., 1:]
        return labels_masked_places(labels, mask) is not False


def with_padding(model: Any, kwargs: dict[str, Any], labels: Tensor | None) -> dict[str, Any]:
    """The arguments of a head with tokens' labels, by which the encoder keeps masked places if one of them has a label.

    Stock's loss counts them. Only on the CPU: elsewhere the host would have to wait for the labels. Compiled code
    cannot look at them, but keeps its padding anyway, unless a `token_bound` asks for a number of rows.
    """
    mask = kwargs.get("attention_mask")
    if packing.bounded() or not isinstance(labels, Tensor) or not isinstance(mask, Tensor):
        return kwargs
    if torch.compiler.is_compiling() or (
        guards.call_reason(model.config, {}) is None and labels_masked_places(labels, mask)
    ):
        return kwargs | {swapped.KEEP_PADDING: True}
    return kwargs


def labels_masked_places(labels: Tensor, mask: Tensor) -> bool | None:
    """Whether one of the labels, [B, S] in any shape, stands at a place that a mask, 2-D or 4-D, leaves out.

    None if they do not match, or are not on the CPU to be read.
    """
    if not (mask.is_cpu and labels.is_cpu) or packing.unreadable(mask) or packing.unreadable(labels):
        return None
    mask = packing.packing_mask(mask)
    if mask is None:
        return False
    if len(mask) == 1:
        mask = mask.expand(labels.numel() // max(mask.shape[1], 1), -1)
    if mask.numel() != labels.numel():
        return None
    return bool(((labels.reshape(mask.shape) != -100) & (mask == 0)).any())


def rescaled(outputs: Any, labels: Tensor | None, num_items: Any) -> Any:
    """The outputs with their loss, a mean over the labels, as a sum over num_items instead, if that is given."""
    if num_items is None or labels is None:
        return outputs
    count = (labels != -100).sum()

    def summed(loss: Tensor) -> Tensor:
        return torch.where(count > 0, loss * (count / num_items), 0.0)  # a mean over nothing is NaN, its sum is not

    if isinstance(outputs, tuple):
        return (summed(outputs[0]), *outputs[1:])
    if outputs.loss is not None:
        outputs.loss = summed(outputs.loss)
    return outputs


# --- the masked language model ------------------------------------------------------------------------------------


class MlmNames(NamedTuple):
    """Where a family keeps the parts of its masked language model head."""

    dense: str
    activation: str | None
    norm: str
    decoder: str
    loss: str | None = None


_BERT = "cls.predictions.transform"
_BERT_MLM = MlmNames(f"{_BERT}.dense", f"{_BERT}.transform_act_fn", f"{_BERT}.LayerNorm", "cls.predictions.decoder")
_ROBERTA_MLM = MlmNames("lm_head.dense", None, "lm_head.layer_norm", "lm_head.decoder")
_ELECTRA_MLM = MlmNames(
    "generator_predictions.dense",
    "generator_predictions.activation",
    "generator_predictions.LayerNorm",
    "generator_lm_head",
)
MLM_HEADS = {
    "bert": _BERT_MLM,
    "ernie": _BERT_MLM,
    "roberta": _ROBERTA_MLM,
    "xlm_roberta": _ROBERTA_MLM,
    "camembert": _ROBERTA_MLM,
    "data2vec_text": _ROBERTA_MLM,
    "electra": _ELECTRA_MLM,
    "distilbert": MlmNames("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector", "mlm_loss_fct"),
}


class ResolvedMlm(guards.Resolved):
    """The parts of a masked language model head."""

    def __init__(self, module: nn.Module, names: MlmNames) -> None:
        paths: dict[str, type] = {names.dense: nn.Linear, names.norm: nn.LayerNorm, names.decoder: nn.Linear}
        optional = [path for path in (names.activation, names.loss) if path is not None]
        types = paths if names.loss is None else paths | {names.loss: nn.CrossEntropyLoss}

        def check(parts: dict[str, nn.Module]) -> str | None:
            plain = {path: part for path, part in parts.items() if path != names.activation}
            reason = guards.wrong_type(plain, types, module.stock.__module__)
            if reason is None and names.activation is not None and not guards.is_gelu(parts[names.activation]):
                reason = "the activation of the head is not exact GELU"
            return reason

        self.mlm_names = names
        super().__init__(module, (*paths, *optional), check)
        if self.reason is None:
            self.weights = guards.Weights.of(self.parts, *itertools.product(paths, ("weight", "bias")))
            self.norm = self.parts[names.norm]

    def attributes(self, module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        names = self.mlm_names
        for path, name in ((names.activation, "approximate"), (names.norm, "normalized_shape")):
            if path in self.parts:
                yield self.parts[path], name

    def expected(self, shapes: list[torch.Size]) -> list[tuple[int, ...]]:
        hidden, vocabulary = shapes[2][0], shapes[4][0]
        return [(hidden, hidden), (hidden,), (hidden,), (hidden,), (vocabulary, hidden), (vocabulary,)]


def is_mean(loss: Any) -> bool:
    """Whether a model's own part that makes its loss, or None, gives what others do: a mean over labels but -100."""
    if loss is None:
        return True
    plain = type(loss) is nn.CrossEntropyLoss and loss.weight is None
    return plain and loss.reduction == "mean" and loss.ignore_index == -100


class FastMaskedLM(FastModel):
    """The masked language model: with labels, loss at the labelled positions, and logits on demand.

    Compiled code cannot compute logits on demand: there they are made of every token, and so is the loss, unless
    `skip_logits=True` says that nobody wants them.
    """

    _fastbert: swapped.State
    logits_field = "logits"
    output = MaskedLMOutput

    def forward_by_name(self, stock: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """The forward, all arguments by name. stock: the stock class's own."""
        num_items = kwargs.pop("num_items_in_batch", None)
        num_items = num_items if is_mean(self._loss) else None
        skip_logits = kwargs.pop("skip_logits", False)
        labels = kwargs.get("labels")
        kwargs = with_padding(self, kwargs, labels)
        return_dict = kwargs.get("return_dict")
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if labels is None or not return_dict or (torch.compiler.is_compiling() and not skip_logits):
            return rescaled(stock(self, **kwargs), labels, num_items)
        weights, eps = self._head_weights()
        if weights is None:
            return rescaled(stock(self, **kwargs), labels, num_items)
        outputs = self._encode(kwargs, "labels", "return_dict")
        loss, _ = self._mlm_loss(outputs[0], labels, weights, eps, num_items)
        if skip_logits:
            return self.output(loss=loss, hidden_states=outputs.hidden_states, attentions=outputs.attentions)
        return deferred.lazy_output(
            self.output,
            self.logits_field,
            deferred.logits_later(self.logits_field, outputs[0], weights, eps),
            loss,
            outputs.hidden_states,
            outputs.attentions,
        )

    @property
    def _loss(self) -> Any:
        """What makes the loss, if it is a part of the model, as DistilBERT's is."""
        name = MLM_HEADS[self.family.name].loss
        return None if name is None else getattr(self, name, None)

    def _encode(self, kwargs: dict[str, Any], *dropped: str) -> Any:
        """What the base model gives, called as the stock head calls it: hooks see the ids where it hands them over."""
        kwargs = {name: value for name, value in kwargs.items() if name not in dropped}
        if self.family.name == "distilbert":
            return self.base_model(**kwargs, return_dict=True)
        return self.base_model(kwargs.pop("input_ids", None), **kwargs, return_dict=True)

    def _mlm_loss(
        self, hidden: Tensor, labels: Tensor, weights: tuple[Tensor, ...], eps: float, num_items: Any
    ) -> tuple[Tensor, Tensor]:
        dense, dense_bias, norm, norm_bias, decoder, decoder_bias = weights
        if labels.numel() == hidden.shape[:-1].numel():
            labels = labels.view(hidden.shape[:-1])
        if labels.dtype is torch.uint8:  # the other type that PyTorch's cross-entropy takes
            labels = labels.long()
        loss, count = ops.mlm_loss(
            hidden, labels, decoder, decoder_bias, dense, dense_bias, norm, norm_bias, eps=eps, num_items=num_items
        )
        # Stock's cross-entropy has the dtype of the logits, but for autocast.
        return (loss if torch.is_autocast_enabled(hidden.device.type) else loss.to(hidden.dtype)), count

    def _head_weights(self) -> tuple[tuple[Tensor, ...] | None, float]:
        """The weights for ops.mlm_loss, or None if something speaks against it."""
        # Compiled code cannot see yet what transformers records; where a loss alone is wanted, nothing.
        if not torch.compiler.is_compiling() and guards.call_reason(self.config, {}) is not None:
            return None, 0.0
        if not is_mean(self._loss) or getattr(self._loss, "label_smoothing", 0.0):
            return None, 0.0
        state = self._fastbert
        resolved = state.resolved
        if torch.compiler.is_compiling():
            resolved = ResolvedMlm(self, MLM_HEADS[self.family.name])
        elif resolved is None or not resolved.current(self):
            resolved = state.resolved = ResolvedMlm(self, MLM_HEADS[self.family.name])
        weights = None if resolved.reason is not None else resolved.weights.read()
        if weights is None or (guards.wrong_weights(weights) or resolved.misfit(weights)) is not None:
            return None, 0.0
        if weights[4].shape[0] != self.config.vocab_size:  # by which stock reshapes the logits for its loss
            return None, 0.0
        if guards.wrong_settings((resolved.norm.eps,), "LayerNorm.eps") is not None:
            return None, 0.0
        return weights, resolved.norm.eps


class FastPreTraining(FastMaskedLM):
    """Masked language model and next sentence prediction."""

    logits_field = "prediction_logits"

    def forward_by_name(self, stock: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """The forward, all arguments by name. stock: the stock class's own."""
        num_items = kwargs.pop("num_items_in_batch", None)
        skip_logits = kwargs.pop("skip_logits", False)
        labels, next_sentence_label = kwargs.get("labels"), kwargs.get("next_sentence_label")
        kwargs = with_padding(self, kwargs, labels)
        return_dict = kwargs.get("return_dict")
        return_dict = self.config.return_dict if return_dict is None else return_dict
        weights = None
        wanted = labels is not None and next_sentence_label is not None and return_dict
        compiled = torch.compiler.is_compiling() and not skip_logits
        if wanted and not compiled and guards.foreign_hook(self.cls) is None:
            weights, eps = self._head_weights()
        if weights is None:
            return rescaled(stock(self, **kwargs), labels, num_items)
        outputs = self._encode(kwargs, "labels", "next_sentence_label", "return_dict")
        loss, count = self._mlm_loss(outputs[0], labels, weights, eps, num_items)
        scores = self.cls.seq_relationship(outputs[1])
        nsp = nn.functional.cross_entropy(scores.view(-1, 2), next_sentence_label.view(-1))
        if num_items is not None:  # how many sequences there are in all nobody says: weigh them like the labels
            nsp = nsp * (count / num_items)
        if skip_logits:
            return self.output(
                loss=loss + nsp,
                seq_relationship_logits=scores,
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
            )
        return deferred.lazy_output(
            self.output,
            self.logits_field,
            deferred.logits_later(self.logits_field, outputs[0], weights, eps),
            loss + nsp,
            scores,
            outputs.hidden_states,
            outputs.attentions,
        )

    @property
    def output(self) -> type[ModelOutput]:  # type: ignore[override]
        return getattr(sys.modules[self.stock.__module__], f"{self.stock.__name__}Output")


# --- the classes ------------------------------------------------------------------------------------

_HEADS: dict[str, type[FastModel]] = {
    "base": FastBaseModel,
    "Model": FastModel,
    "CausalLM": FastCausalLM,
    "MaskedLM": FastMaskedLM,
    "PreTraining": FastPreTraining,
    "QuestionAnswering": FastQuestionAnswering,
    "TokenClassification": FastTokenClassification,
}


def mixin(role: str, family: families.Family) -> type[FastModel]:
    """The class to put before a stock model class."""
    if role in ("MaskedLM", "PreTraining") and family.name not in MLM_HEADS:
        return FastUnscaledHead
    if role == "PreTraining" and family.name not in ("bert", "ernie"):
        return FastUnscaledHead
    if role == "MultipleChoice" and family.name == "electra":
        return FastSummary
    return _HEADS.get(role, FastHead)


def forward_of(stock: type[nn.Module]) -> Callable[..., Any]:
    """A forward with the stock class's signature that calls `forward_by_name` with all arguments by name."""
    parameters = list(inspect.signature(stock.forward).parameters.values())[1:]
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]

    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = names[: len(args)]
        # Wrong arguments go to the stock forward for the usual TypeError; so does a model that was restored while
        # somebody (accelerate) still holds this forward, and any call while another forward is in its place.
        wrong = len(args) > len(names) or any(name in kwargs for name in given)
        if wrong or not isinstance(self, FastModel) or guards.replaced_method(stock) is not None:
            return stock.forward(self, *args, **kwargs)
        return self.forward_by_name(stock.forward, dict(zip(given, args, strict=True)) | kwargs)

    return forward


def _model(name: str) -> Any:
    return patch.fast_class(getattr(modeling_bert, name))


BertModel = _model("BertModel")
BertForPreTraining = _model("BertForPreTraining")
BertLMHeadModel = _model("BertLMHeadModel")
BertForMaskedLM = _model("BertForMaskedLM")
BertForNextSentencePrediction = _model("BertForNextSentencePrediction")
BertForSequenceClassification = _model("BertForSequenceClassification")
BertForTokenClassification = _model("BertForTokenClassification")
BertForQuestionAnswering = _model("BertForQuestionAnswering")
BertForMultipleChoice = _model("BertForMultipleChoice")
