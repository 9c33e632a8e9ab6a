#!/usr/bin/env python3
"""The whole way on real data, as `make demo` runs it: fetch, fine-tune, predict, compare with Hugging Face.

    python examples/demo.py [--output output/demo]

Takes a few minutes on two cores. The data are TREC's questions (what kind of thing does a question ask for?), the model
starts from all-MiniLM-L6-v2. Everything is done by the commands that a user would type; they are printed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fetch

KINDS = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "human",
    "LOC": "location",
    "NUM": "number",
}
NEW_QUESTIONS = [
    "Who wrote the first program for Babbage's analytical engine ?",
    "How many strings does a cello have ?",
    "Where do polar bears live ?",
    "What does GPU stand for ?",
    "What is the difference between weather and climate ?",
    "What colour is a Hugging Face ?",
]
BATCH = 32
ROUNDS = 5


def heading(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def command(*words: str | Path) -> None:
    """Run the fastbert command of this environment, after showing it."""
    print("$ fastbert", shlex.join(map(str, words)), flush=True)
    done = subprocess.run([Path(sys.executable).with_name("fastbert"), *map(str, words)], check=False)
    if done.returncode:
        sys.exit(f"fastbert {words[0]} failed with exit status {done.returncode}")


def read(path: Path, column: str) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        return [row[column] for row in csv.DictReader(file, delimiter="\t")]


def contestant(name: str, model_folder: Path, test_file: Path) -> None:
    """One side of the comparison, in a process of its own; does what it is told on standard input, a word a line."""
    import numpy as np
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForSequenceClassification.from_pretrained(model_folder, dtype=torch.float32)
    if name == "fastbert":
        import fastbert

        fastbert.optimize(model)
    elif name == "float64":
        model.double()
    texts = read(test_file, "text")
    batches = [tokenizer(texts[i : i + BATCH], padding=True, return_tensors="pt") for i in range(0, len(texts), BATCH)]
    labels = torch.tensor([model.config.label2id[label] for label in read(test_file, "label")[:BATCH]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def predict() -> torch.Tensor:
        model.eval()
        with torch.inference_mode():
            return torch.cat([model(**batch).logits for batch in batches])

    def train() -> None:
        model.train()
        model(**batches[0], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    print("ready", flush=True)
    for line in sys.stdin:
        word, *rest = line.split(maxsplit=1)
        start = time.perf_counter()
        if word == "logits":
            np.save(rest[0].strip(), predict().numpy())
        else:
            {"predict": predict, "train": train}[word]()
        print(time.perf_counter() - start, flush=True)


class Process:
    """The near end of a contestant."""

    def __init__(self, name: str, model_folder: Path, test_file: Path) -> None:
        arguments = [sys.executable, __file__, "--contestant", name, str(model_folder), str(test_file)]
        environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        self.process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.answer()

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a contestant of the comparison ended with status {self.process.wait()}")
        return line

    def do(self, words: str) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(words + "\n")
        self.process.stdin.flush()
        return float(self.answer())

    def close(self) -> None:
        self.process.communicate()


def compare(model_folder: Path, test_file: Path, scratch: Path) -> dict[str, Any]:
    """Same weights, same batches, same threads; the contestants take turns, the median of the rounds counts."""
    import numpy as np

    names = ("Hugging Face", "fastbert")
    logits = {}
    times: dict[tuple[str, str], list[float]] = {}
    contestants = {}
    for name in ("float64", *names):
        process = Process(name, model_folder, test_file)
        process.do(f"logits {scratch / name}.npy")
        logits[name] = np.load(scratch / f"{name}.npy").astype(np.float64)
        if name in names:
            contestants[name] = process
        else:
            process.close()
    for work in ("predict", "train"):
        for number in range(-1, ROUNDS):  # the first round warms up
            for name, process in contestants.items():
                seconds = process.do(work)
                if number >= 0:
                    times.setdefault((work, name), []).append(seconds)
    for process in contestants.values():
        process.close()
    config = json.loads((model_folder / "config.json").read_text())
    truth = np.array([config["label2id"][label] for label in read(test_file, "label")])
    return {
        "seconds": {work: [statistics.median(times[work, name]) for name in names] for work in ("predict", "train")},
        "accuracy": [float((logits[name].argmax(1) == truth).mean()) for name in names],
        "error": [float(abs(logits[name] - logits["float64"]).max()) for name in names],
        "difference": float(abs(logits[names[0]] - logits[names[1]]).max()),
        "largest": float(abs(logits["float64"]).max()),
        "agree": int((logits[names[0]].argmax(1) == logits[names[1]].argmax(1)).sum()),
        "questions": len(truth),
    }


def show(result: dict[str, Any]) -> None:
    def row(what: str, hf: str, ours: str, note: str = "") -> None:
        print(f"  {what:<44}{hf:>14}{ours:>12}{note:>10}")

    row("", "Hugging Face", "fastbert")
    for work, what in (
        ("predict", f"predict {result['questions']} questions"),
        ("train", f"training step on {BATCH} questions"),
    ):
        hf, ours = result["seconds"][work]
        row(what, f"{1000 * hf:.0f} ms", f"{1000 * ours:.0f} ms", f"{hf / ours:.2f}x")
    row("accuracy on the test questions", *(f"{100 * a:.2f} %" for a in result["accuracy"]))
    row("largest error of a logit, against float64", *(f"{e:.1e}" for e in result["error"]))
    difference, largest = result["difference"], result["largest"]
    print(f"\n  Largest difference between the two: {difference:.1e} (the largest logit is {largest:.1f});")
    print(f"  same answer to {result['agree']} of {result['questions']} questions.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="folder for what it makes")
    parser.add_argument("--cache", type=Path, default=fetch.default_cache(), help="folder for what it downloads")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--contestant", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contestant:
        name, model_folder, test_file = args.contestant
        return contestant(name, Path(model_folder), Path(test_file))

    args.cache = Path(os.path.relpath(args.cache))
    began = time.perf_counter()
    heading("1. What is installed")
    command("info")

    heading("2. Real weights and real text, by pinned version and checksum")
    weights = fetch.minilm(args.cache)
    train_file, test_file = fetch.trec(args.cache)
    print(f"{weights}\n{train_file}: {len(read(train_file, 'label'))} questions to train on")
    print(
        f"{test_file}: {len(read(test_file, 'label'))} questions to test on, of {len(KINDS)} kinds: {', '.join(KINDS)}"
    )

    heading("3. Fine-tune a classifier")
    model = args.output / "model"
    files = ["--train_file", train_file, "--test_file", test_file]
    columns = ["--text_column_name", "text", "--label_column_name", "label", "--max_seq_length", "128"]
    recipe = [
        "--num_train_epochs",
        f"{args.epochs:g}",
        "--per_device_train_batch_size",
        str(BATCH),
        "--learning_rate",
        "2e-4",
    ]
    where = ["--output_dir", model, "--overwrite_output_dir", "--seed", "1"]
    command("finetune", "--model_name_or_path", weights, *files, *columns, *recipe, *where)
    report = json.loads((model / "report.json").read_text())

    heading("4. Predict on new sentences")
    args.output.mkdir(parents=True, exist_ok=True)
    new, predicted = args.output / "new.csv", args.output / "predicted.csv"
    with new.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text"], *([question] for question in NEW_QUESTIONS)])
    command(
        "predict",
        "--model_name_or_path",
        model,
        "--input",
        new,
        "--output",
        predicted,
        "--text_column_name",
        "text",
        "--overwrite",
    )
    with predicted.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            kind = KINDS[line["predicted_label"]]
            print(f"  {line['text']:<64}{kind:<14}{float(line['score']):.3f}")

    heading("5. Side by side with Hugging Face: same weights, same batches, same threads, a process each, in turn")
    result = compare(model, test_file, args.output)
    show(result)
    (args.output / "comparison.json").write_text(json.dumps(result, indent=2) + "\n")

    heading("Done")
    accuracy, seconds = 100 * report["test"]["accuracy"], report["seconds"]["train"]
    print(f"Test accuracy {accuracy:.2f} % after {seconds:.0f} s of training.")
    print(f"Everything took {time.perf_counter() - began:.0f} s.")
    print(f"The model is an ordinary Hugging Face folder, {model}; its curves are beside it, in curves.png.")
    return None


if __name__ == "__main__":
    main()
