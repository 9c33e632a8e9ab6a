"""``fastbert bench pretraining``: a small BERT pretrained by stock Hugging Face and by fastbert.

The same weights to begin with, the same batches and masks, the same optimizer; each contestant in a process of its own.
Shown are the losses step by step, tokens a second and peak memory. What rounding alone does to a run is measured beside
it: `hf-rounding` is stock Hugging Face with each weight moved by one rounding before the first step. With dropout,
where masks differ, `--seeds` says how far runs of one implementation are apart.

Needs a folder made by `fastbert prepare` (pairs) and its tokenizer.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import machine, report
from .cli import positive

CONTESTANTS = {
    "hf": "stock, padded, sdpa",
    "hf-packed": "stock, the rows of a batch in one row, with a 4-D mask",
    "hf-rounding": "stock, weights moved by one rounding at the start",
    "fastbert": "fastbert.optimize, padded",
}
MODEL = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-3, 0.01, 1.0
WARM_UP_SHARE = 0.05
SLOW_START = 5  # steps that count for losses and not for speed
LAST = 20  # steps over which the loss that a run ends with is averaged: single ones vary with their batches


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    top = argparse.ArgumentParser(
        prog="fastbert bench pretraining",
        description="Pretrains a small BERT with stock Hugging Face code and with fastbert, from the same weights, on "
        "the same batches and masks, and compares losses, tokens a second and peak memory.",
    )
    top.add_argument("--dataset", type=Path, required=True, help="folder made by fastbert prepare")
    top.add_argument("--tokenizer_name", type=Path, required=True, help="the tokenizer it was made with")
    everyone = ",".join(CONTESTANTS)
    top.add_argument("--contestants", default=everyone, metavar="A,B", help=f"who takes part (default: {everyone})")
    top.add_argument("--steps", type=positive, default=200, help="of each run (default: 200)")
    top.add_argument("--tokens_per_batch", type=positive, default=4096, help="a step works on (default: 4096)")
    top.add_argument("--dropout", type=float, default=0.0, help="in hidden states and attention (default: 0)")
    top.add_argument("--seeds", type=positive, default=1, help="runs of each, with seeds 0, 1, … (default: 1)")
    top.add_argument("--threads", type=positive, default=machine.cores(), help="of each run (default: all cores)")
    top.add_argument(
        "--output",
        type=Path,
        default=Path("bench/results"),
        metavar="DIR",
        help="for JSON and plot (default: %(default)s)",
    )
    top.add_argument("--worker", nargs=2, metavar=("NAME", "SEED"), help=argparse.SUPPRESS)
    return top


def main(argv: Sequence[str]) -> int:
    """Run every contestant, print the table, write JSON and plot; returns the exit status."""
    arguments = parser().parse_args(argv)
    if arguments.worker:
        print(json.dumps(train(arguments, arguments.worker[0], int(arguments.worker[1]))))
        return 0
    names = arguments.contestants.split(",")
    if unknown := set(names) - set(CONTESTANTS):
        message = f"--contestants has {', '.join(sorted(unknown))}; it may have: {', '.join(CONTESTANTS)}"
        print(f"fastbert bench pretraining: {message}", file=sys.stderr)
        return 2
    content = report.result("pretraining", machine.describe(), arguments.threads, arguments.seeds, [])
    facts = {"model": MODEL, "steps": arguments.steps, "tokens_per_batch": arguments.tokens_per_batch}
    facts |= {"dropout": arguments.dropout}
    path = arguments.output / f"{report.stem(content)}.json"
    for seed in range(arguments.seeds):  # contestants take turns
        for name in names:
            print(f"{name}, seed {seed}", file=sys.stderr)
            command = [sys.executable, "-m", __package__, "pretraining", *argv, "--worker", name, str(seed)]
            environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
            if done.returncode:
                print(f"{name}, seed {seed}: failed with status {done.returncode}", file=sys.stderr)
                return 1
            content["rows"].append({"contestant": name, "seed": seed, **facts, **json.loads(done.stdout)})
            report.write(content, path)
    print(table(content["rows"]))
    print(f"results: {path}")
    plot(content["rows"], path.with_suffix(".png"))
    return 0


def train(arguments: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """One run in this process: losses and seconds of each step, tokens, and peak memory in bytes."""
    import datasets
    from transformers import AutoTokenizer, BertConfig, BertForPreTraining, get_linear_schedule_with_warmup

    from fastbert.training.batching import Batches, Masking, Phase, TokenBudget, row_lengths

    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer_name)
    data = datasets.load_from_disk(str(arguments.dataset))
    phase = Phase("data", data, TokenBudget(row_lengths(data), arguments.tokens_per_batch, 0), arguments.steps)
    batches = Batches([phase], Masking(tokenizer, 0.15, False), 0, len(tokenizer), tokenizer.pad_token_id)
    torch.manual_seed(seed)
    p = arguments.dropout
    config = BertConfig(vocab_size=len(tokenizer), **MODEL, hidden_dropout_prob=p, attention_probs_dropout_prob=p)
    model = BertForPreTraining(config).train()
    if name == "hf-rounding":
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(torch.nextafter(weight, torch.full_like(weight, torch.inf)))
    if name == "fastbert":
        import fastbert

        fastbert.optimize(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    warm_up = int(WARM_UP_SHARE * arguments.steps)
    schedule = get_linear_schedule_with_warmup(optimizer, warm_up, arguments.steps)
    losses, seconds, tokens = [], [], []
    loaded = _peak_memory()
    for step in range(arguments.steps):
        batch = batches[step]
        start = time.perf_counter()
        loss = packed_loss(model, batch) if name == "hf-packed" else model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        tokens.append(int(batch["attention_mask"].sum()))
    memory = {"peak": _peak_memory(), "before": loaded}
    found = {"losses": losses, "seconds": seconds, "tokens": tokens, "memory": memory}
    return found | {"vocabulary": len(tokenizer), "parameters": sum(p.numel() for p in model.parameters())}


def packed_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of a stock BertForPreTraining on the real tokens of a batch, as one row [1, T] with a 4-D mask."""
    real = batch["attention_mask"].bool()
    lengths = real.sum(1)
    number = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    positions = torch.arange(real.shape[1]).expand(real.shape)[real]
    hidden = model.bert(
        input_ids=batch["input_ids"][real][None],
        token_type_ids=batch["token_type_ids"][real][None],
        position_ids=positions[None],
        attention_mask=(number[:, None] == number[None, :])[None, None],
    ).last_hidden_state
    firsts = hidden[0, lengths.cumsum(0) - lengths]
    scores = model.cls.predictions(hidden)
    mlm = torch.nn.functional.cross_entropy(scores[0], batch["labels"][real])
    next_sentence = model.cls.seq_relationship(model.bert.pooler(firsts[:, None]))
    return mlm + torch.nn.functional.cross_entropy(next_sentence, batch["next_sentence_label"])


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def tokens_per_second(row: dict[str, Any]) -> float:
    """Real tokens a second, over the median of the steps behind the slow start."""
    rates = [t / s for t, s in zip(row["tokens"], row["seconds"], strict=True)]
    return statistics.median(rates[SLOW_START:] or rates)


def last_loss(row: dict[str, Any]) -> float:
    """The mean loss of a run's last `LAST` steps."""
    return statistics.mean(row["losses"][-LAST:])


def table(rows: list[dict[str, Any]]) -> str:
    """Speed, memory, the loss at the end, and how far from stock's the losses are, by contestant and seed."""
    stock = {row["seed"]: row["losses"] for row in rows if row["contestant"] == "hf"}
    lines = [f"{'contestant':<12} seed  tokens/s  peak MiB  loss, end  largest difference from hf, first and all steps"]
    for row in rows:
        line = f"{row['contestant']:<12} {row['seed']:>4} {tokens_per_second(row):>9.0f}"
        line += f" {row['memory']['peak'] / 2**20:>9.0f} {last_loss(row):>10.4f}"
        if row["contestant"] != "hf" and row["seed"] in stock:
            apart = [abs(a - b) for a, b in zip(row["losses"], stock[row["seed"]], strict=True)]
            line += f"  {apart[0]:.1e} {max(apart):.1e}"
        lines.append(line)
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Losses, their distance from stock's, and speed, as PNG. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    stock = {row["seed"]: row["losses"] for row in rows if row["contestant"] == "hf"}
    colors = {name: f"C{number}" for number, name in enumerate(CONTESTANTS)}
    for row in rows:
        name, label = row["contestant"], row["contestant"] if row["seed"] == 0 else None
        left.plot(row["losses"], label=label, color=colors[name], linewidth=1, alpha=0.8)
        if name != "hf" and row["seed"] in stock:
            apart = [max(abs(a - b), 1e-8) for a, b in zip(row["losses"], stock[row["seed"]], strict=True)]
            middle.plot(apart, label=label, color=colors[name], linewidth=1)
    left.set(xlabel="step", ylabel="loss, masked tokens + next sentence")
    middle.set(xlabel="step", ylabel="distance from hf's loss", yscale="log")
    for axes in (left, middle):
        axes.grid(alpha=0.3)
        axes.legend()
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    rates = [statistics.median(tokens_per_second(row) for row in rows if row["contestant"] == name) for name in names]
    right.bar(names, rates, color=[colors[name] for name in names])
    right.set(ylabel="tokens/s")
    right.tick_params(axis="x", labelrotation=20)
    figure.savefig(path, dpi=120)
