"""Train sentence embeddings on pairs with sentence-transformers.

    python examples/sentence_transformers_training.py --model all-MiniLM-L6-v2 --train pairs.tsv --output out

The file has two columns, anchor and positive, separated by a tab, under a header line: texts that belong together. The
other texts of a batch are the wrong ones. `fastbert finetune --task sentence_embeddings` does the same, and resumes.
"""

import argparse
from pathlib import Path

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.training_args import BatchSamplers

import fastbert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint: a folder or a name on the hub")
    parser.add_argument("--train", required=True, type=Path, help="file with the columns anchor and positive")
    parser.add_argument("--output", required=True, type=Path, help="folder for the trained model")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model = SentenceTransformer(args.model, device="cpu" if args.cpu else None)
    fastbert.optimize(model)  # the one line that makes it fast
    data = Dataset.from_csv(str(args.train), delimiter="\t").select_columns(["anchor", "positive"])
    training = SentenceTransformerTrainingArguments(
        output_dir=str(args.output / "checkpoints"),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        warmup_steps=0.1,
        batch_sampler=BatchSamplers.NO_DUPLICATES,  # a positive that is there twice would count as wrong once
        logging_steps=0.1,
        save_strategy="no",
        report_to="none",
        use_cpu=args.cpu,
        seed=args.seed,
    )
    trainer = SentenceTransformerTrainer(
        model=model, args=training, train_dataset=data, loss=MultipleNegativesRankingLoss(model)
    )
    trainer.train()
    model.save_pretrained(str(args.output))  # SentenceTransformer(output) opens it, with fastbert or without
    print(fastbert.report(model))


if __name__ == "__main__":
    main()
