"""Train a masked language model with Accelerate: on one device, or on many with `accelerate launch`.

    python examples/accelerate_loop.py --model bert-base-uncased --train text.txt --output out
    accelerate launch --num_processes 8 examples/accelerate_loop.py --model bert-base-uncased --train text.txt ...

The file has a text a line.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling

import fastbert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint: a folder or a name on the hub")
    parser.add_argument("--train", required=True, type=Path, help="file with a text a line")
    parser.add_argument("--output", required=True, type=Path, help="folder for the trained model")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--accumulate", type=int, default=1, help="batches that make one step")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.accumulate, cpu=args.cpu
    )
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    lines = [line for line in args.train.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [tokenizer(line, truncation=True, max_length=args.max_length) for line in lines]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    loader = torch.utils.data.DataLoader(rows, args.batch_size, shuffle=True, collate_fn=collate)

    # Optimized before it is prepared. Logits are computed only if somebody reads them: here nobody does.
    model = fastbert.optimize(AutoModelForMaskedLM.from_pretrained(args.model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    for epoch in range(args.epochs):
        losses = []
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        mean = accelerator.gather(torch.stack(losses).mean()).mean().item()
        accelerator.print(f"epoch {epoch + 1}: loss {mean:.4f}")

    accelerator.wait_for_everyone()
    plain = accelerator.unwrap_model(model)
    if accelerator.is_main_process:
        plain.save_pretrained(args.output)  # an ordinary Hugging Face folder
        tokenizer.save_pretrained(args.output)
        print(fastbert.report(plain))
    accelerator.end_training()


if __name__ == "__main__":
    main()
