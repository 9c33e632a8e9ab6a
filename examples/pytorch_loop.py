"""Fine-tune a classifier with a plain PyTorch loop.

    python examples/pytorch_loop.py --model bert-base-uncased --train train.tsv --output out

The file has two columns, label and text, separated by a tab, under a header line.
"""

import argparse
import csv
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fastbert


def read(path: Path) -> tuple[list[str], list[str]]:
    """Texts and labels of a file."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return [row["text"] for row in rows], [row["label"] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint: a folder or a name on the hub")
    parser.add_argument("--train", required=True, type=Path, help="file with the columns label and text")
    parser.add_argument("--output", required=True, type=Path, help="folder for the trained model")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    texts, names = read(args.train)
    labels = sorted(set(names))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={n: i for i, n in enumerate(labels)},
    )
    model = fastbert.optimize(model.to(device))  # the one line that makes it fast

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    for epoch in range(args.epochs):
        model.train()
        total = 0.0
        order = torch.randperm(len(texts)).tolist()
        for start in range(0, len(order), args.batch_size):
            rows = order[start : start + args.batch_size]
            batch = tokenizer([texts[i] for i in rows], truncation=True, padding=True, return_tensors="pt").to(device)
            target = torch.tensor([labels.index(names[i]) for i in rows], device=device)
            loss = model(**batch, labels=target).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item() * len(rows)
        print(f"epoch {epoch + 1}: loss {total / len(texts):.4f}")

    model.save_pretrained(args.output)  # an ordinary Hugging Face folder
    tokenizer.save_pretrained(args.output)
    print(fastbert.report(model))


if __name__ == "__main__":
    main()
