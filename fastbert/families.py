"""The families of models that fastbert knows, and what each of their classes is in them."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from fastbert import encoder


class Family(NamedTuple):
    """Where transformers keeps a family: its module, the prefix of its class names, and what departs from BERT's."""

    name: str
    module: str
    prefix: str
    layer_class: str = ""
    encoder_class: str = ""
    embeddings_class: str = ""
    names: encoder.LayerNames = encoder.BERT


_FAMILIES = (
    Family("bert", "bert.modeling_bert", "Bert", embeddings_class="BertEmbeddings"),
    Family("roberta", "roberta.modeling_roberta", "Roberta", embeddings_class="RobertaEmbeddings"),
    Family("xlm_roberta", "xlm_roberta.modeling_xlm_roberta", "XLMRoberta", embeddings_class="XLMRobertaEmbeddings"),
    Family("camembert", "camembert.modeling_camembert", "Camembert", embeddings_class="CamembertEmbeddings"),
    Family("electra", "electra.modeling_electra", "Electra", embeddings_class="ElectraEmbeddings"),
    Family("ernie", "ernie.modeling_ernie", "Ernie"),
    Family(
        "data2vec_text", "data2vec.modeling_data2vec_text", "Data2VecText", embeddings_class="Data2VecTextEmbeddings"
    ),
    Family("roc_bert", "roc_bert.modeling_roc_bert", "RoCBert"),
    Family(
        "bert_generation", "bert_generation.modeling_bert_generation", "BertGeneration", encoder_class="BertEncoder"
    ),
    Family(
        "distilbert",
        "distilbert.modeling_distilbert",
        "DistilBert",
        layer_class="TransformerBlock",
        encoder_class="Transformer",
        names=encoder.DISTILBERT,
    ),
)
FAMILIES = {family.name: family for family in _FAMILIES}
HEADS = (
    "MaskedLM",
    "PreTraining",
    "SequenceClassification",
    "TokenClassification",
    "MultipleChoice",
    "NextSentencePrediction",
    "QuestionAnswering",
)
ROLES: dict[tuple[str, str], tuple[str, Family]] = {}
for _family in FAMILIES.values():
    _path = f"transformers.models.{_family.module}"
    ROLES[_path, _family.layer_class or f"{_family.prefix}Layer"] = ("layer", _family)
    ROLES[_path, _family.encoder_class or f"{_family.prefix}Encoder"] = ("encoder", _family)
    if _family.embeddings_class:
        ROLES[_path, _family.embeddings_class] = ("embeddings", _family)
    for _head in HEADS:
        ROLES[_path, f"{_family.prefix}For{_head}"] = (_head, _family)
    ROLES[_path, f"{_family.prefix}Model"] = ("base" if _family.embeddings_class else "Model", _family)
    for _name in ("LMHeadModel", "ForCausalLM", "Decoder"):
        ROLES[_path, f"{_family.prefix}{_name}"] = ("CausalLM", _family)


def role_of(module: nn.Module) -> str | None:
    """What a stock or swapped module is in its family: "layer", "encoder", "embeddings", a head's name,
    "base" or "Model" (with a fast embeddings class and without), or None.
    """
    return ROLES.get((type(module).__module__, type(module).__name__), (None,))[0]
