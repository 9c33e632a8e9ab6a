"""Fine-tune a classifier with Hugging Face Trainer.

    python examples/trainer.py --model bert-base-uncased --train train.tsv --output_dir out --num_train_epochs 3

The file has two columns, label and text, separated by a tab, under a header line. Every flag of TrainingArguments
works, and so do torchrun and accelerate launch.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

import fastbert


@dataclass
class Arguments:
    """What to train, on what."""

    model: str = field(metadata={"help": "Checkpoint: a folder or a name on the hub."})
    train: str = field(metadata={"help": "File with the columns label and text, separated by a tab."})
    max_length: int = field(default=128, metadata={"help": "Longer texts are cut to this many tokens."})


def main() -> None:
    parser = HfArgumentParser((Arguments, TrainingArguments), description=__doc__)
    arguments, training = parser.parse_args_into_dataclasses()
    set_seed(training.seed)
    data = Dataset.from_csv(arguments.train, delimiter="\t").class_encode_column("label")
    names = data.features["label"].names
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)

    def tokenize(rows: dict[str, Any]) -> dict[str, Any]:
        return tokenizer(rows["text"], truncation=True, max_length=arguments.max_length)

    parts = data.map(tokenize, batched=True, remove_columns=["text"]).train_test_split(0.1, seed=training.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        arguments.model,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={n: i for i, n in enumerate(names)},
    )
    trainer = Trainer(
        fastbert.optimize(model),  # the one line that makes it fast
        training,
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=lambda p: {"accuracy": float(np.mean(p.predictions.argmax(-1) == p.label_ids))},
    )
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model()  # an ordinary Hugging Face folder
    print(fastbert.report(model))


if __name__ == "__main__":
    main()
