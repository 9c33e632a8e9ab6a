"""The tasks of ``fastbert finetune``, and how one is told from flags and data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .arguments import DataArguments
from .conll import ConllFile
from .data import known_columns
from .multiple_choice import MultipleChoice
from .question_answering import QuestionAnswering
from .rows import RowFile
from .sentence_embeddings import SentenceEmbeddings
from .sequence_classification import SequenceClassification
from .token_classification import TokenClassification

if TYPE_CHECKING:
    from .task import Task

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (SequenceClassification, TokenClassification, QuestionAnswering, MultipleChoice, SentenceEmbeddings)
}

# Columns that only one task's files have. Every other file, and every file whose columns the flags name, is taken for
# sequence classification.
_TELLING: list[tuple[type[Task], Callable[[set[str]], bool]]] = [
    (QuestionAnswering, lambda c: {"context", "question", "answers"} <= c),
    (TokenClassification, lambda c: bool({"tokens", "words"} & c) and bool({"tags", "ner_tags"} & c)),
    (MultipleChoice, lambda c: {"sent1", "sent2", "ending0", "ending1"} <= c),
    (SentenceEmbeddings, lambda c: {"anchor", "positive"} <= c),
]


def choose_task(data_args: DataArguments, train: RowFile) -> type[Task]:
    """The task that ``--task`` names, or the one that flags and the training file leave no doubt about."""
    if data_args.task is not None:
        return TASKS[data_args.task]
    if isinstance(train, ConllFile):
        return TokenClassification
    if data_args.choice_column_names:
        return MultipleChoice
    named = (
        data_args.text_column_name,
        data_args.text_pair_column_name,
        data_args.label_column_name,
        data_args.problem_type,
    )
    if not any(named):
        columns = set(known_columns(train))
        for task, tells in _TELLING:
            if tells(columns):
                return task
    return SequenceClassification
