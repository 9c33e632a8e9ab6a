"""Train low-rank adapters (LoRA) with PEFT, then merge them.

    python examples/peft_lora.py --model bert-base-uncased --train train.tsv --output out

The file has two columns, label and text, separated by a tab, under a header line. A layer whose query and value carry
an adapter runs the stock code, so that the adapter counts; once merged, every layer is fast.
"""

import argparse
import csv
from pathlib import Path

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fastbert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint: a folder or a name on the hub")
    parser.add_argument("--train", required=True, type=Path, help="file with the columns label and text")
    parser.add_argument("--output", required=True, type=Path, help="folder for the merged model")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    with args.train.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    labels = sorted({row["label"] for row in rows})
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(labels))
    fastbert.optimize(base)  # the one line that makes it fast
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=args.rank, lora_alpha=2 * args.rank, target_modules=["query", "value"]
    )
    model = get_peft_model(base, lora)
    model.print_trainable_parameters()

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate)
    model.train()
    for epoch in range(args.epochs):
        losses = []
        order = torch.randperm(len(rows)).tolist()
        for start in range(0, len(order), args.batch_size):
            part = [rows[i] for i in order[start : start + args.batch_size]]
            batch = tokenizer([row["text"] for row in part], truncation=True, padding=True, return_tensors="pt")
            loss = model(**batch, labels=torch.tensor([labels.index(row["label"]) for row in part])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.4f}")

    merged = model.merge_and_unload().eval()
    with torch.inference_mode():
        merged(**tokenizer([row["text"] for row in rows[:8]], truncation=True, padding=True, return_tensors="pt"))
    print(fastbert.report(merged))
    merged.save_pretrained(args.output)  # an ordinary Hugging Face folder, adapters merged
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
