"""Train a masked language model with FSDP2: weights, gradients and optimizer state are split over the processes.

    torchrun --nproc_per_node 2 examples/fsdp2.py --model bert-base-uncased --train text.txt --output out

The file has a text a line. Without a GPU the processes talk over gloo.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling

import fastbert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint of a BERT: a folder or a name on the hub")
    parser.add_argument("--train", required=True, type=Path, help="file with a text a line")
    parser.add_argument("--output", required=True, type=Path, help="folder for the trained model")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16, help="of each process")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    torch.manual_seed(args.seed + dist.get_rank())  # other masks and other dropout in each process

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    lines = [line for line in args.train.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [tokenizer(line, truncation=True, max_length=args.max_length) for line in lines]
    sampler = DistributedSampler(rows, seed=args.seed)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    loader = DataLoader(rows, args.batch_size, sampler=sampler, collate_fn=collate)

    model = fastbert.optimize(AutoModelForMaskedLM.from_pretrained(args.model).to(device))  # optimized, then sharded
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    model.train()
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        losses = []
        for batch in loader:
            # FSDP looks at all that a model returns, and so would have the logits of every token computed.
            loss = model(**batch.to(device), skip_logits=True).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        mean = torch.stack(losses).mean() / dist.get_world_size()
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"epoch {epoch + 1}: loss {mean.item():.4f}")

    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        model.save_pretrained(args.output, state_dict=weights)  # an ordinary Hugging Face folder
        tokenizer.save_pretrained(args.output)
        print(fastbert.report(model))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
