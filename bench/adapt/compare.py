"""Heads for one target, measured by real rounds on the same held-out prompts; a table.

    python bench/adapt/compare.py TARGET ANSWERS.jsonl HEAD ... [--held-out 64] [--prompts 32]

ANSWERS.jsonl is what the heads were trained on: with the same `--held-out` and `--seed` as then, the prompts are those that no training
saw. A HEAD may have been made for another target of the same shape."""

import argparse
import json
from pathlib import Path

import torch

from dspark.config import TrainConfig
from dspark.head.folder import load_head, named_head
from dspark.target.load import load_target
from dspark.train.answers import read_answers
from dspark.train.run import Bar, count_rounds, round_figures, usable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", metavar="TARGET")
    parser.add_argument("answers", metavar="ANSWERS.jsonl", type=Path)
    parser.add_argument("heads", metavar="HEAD", nargs="+")
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    target = load_target(options.target, dtype=options.dtype)
    config = TrainConfig(held_out=options.held_out, seed=options.seed)
    records = usable(read_answers(options.answers, target.vocab_size, target.max_context), config)[: min(options.held_out, options.prompts)]
    print("| head | steps | seconds of training | tau T = 0 | tau T = 1 | prompts |\n|---|---|---|---|---|---|")
    for name in options.heads:
        folder = named_head(name)
        head = load_head(folder, target, calibrated=False, same_target=False)
        found = round_figures(count_rounds(target, head, records, Bar(), f" of {folder.name}"))
        record = folder / "provenance.json"
        made = json.loads(record.read_text()) if record.exists() else {}
        steps, seconds = made.get("train", {}).get("steps", ""), made.get("seconds_last_start", "")
        print(
            f"| {name} | {steps} | {seconds} | {found['tau_t0']:.2f} | {found['tau_t1']:.2f} | {found['prompts']} |", flush=True
        )  # fmt: skip


if __name__ == "__main__":
    main()
