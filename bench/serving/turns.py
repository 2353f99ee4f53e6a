"""What the prefix cache is worth: the second turn of a long conversation, warm and cold.

    python bench/serving/turns.py smollm2-135m --dtype bfloat16 --tokens 7000 --repeats 3 --json OUT.json

An engine answers a long first turn; then the second turn, which it has the beginning of, beside an engine that has never seen
the conversation. Seconds to the first token of both, and whether their tokens are the same. Exits 1 if they are not."""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

from dspark.engine.engine import Engine
from dspark.engine.request import Request
from dspark.head.folder import load_head
from dspark.target.load import load_target

TEXT = (
    "The harbour town had two bridges, seven mills and a clock that was always {} minutes late. On market day number {} the "
    "baker sold {} loaves before noon, and the ferry carried {} carts across the river. "
)


def long_text(target, num_tokens: int, start: int) -> str:
    text, n = "", start
    while len(target.tokenizer(text).input_ids) < num_tokens:
        for _ in range(20):
            text += TEXT.format(n % 60, n, 3 * n % 97, 7 * n % 41)
            n += 1
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--head", help="default: the shipped one")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=7000, help="of the first turn (default 7000)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    target = load_target(options.target, options.dtype)
    head = load_head(options.head or options.target, target)
    warm = Engine(target, head, max_running=2, say=lambda text: print(text, file=sys.stderr))
    runs = []
    for repeat in range(options.repeats):
        chat = [{"role": "user", "content": long_text(target, options.tokens, 1000 * repeat) + "Summarise this."}]
        first_ids, first = warm.generate(Request(target.prompt_ids(chat), 64))
        chat += [
            {"role": "assistant", "content": target.tokenizer.decode(first_ids, skip_special_tokens=True)},
            {"role": "user", "content": "How many bridges does the town have?"},
        ]
        second = Request(target.prompt_ids(chat), 64)
        cold_ids, cold = Engine(target, head, max_running=2).generate(second)
        warm_ids, told = warm.generate(second)
        runs.append({
            "prompt_tokens": told.prompt_tokens, "cached_tokens": told.cached_tokens, "first_turn_seconds": first.first_token_seconds,
            "cold_seconds": cold.first_token_seconds, "warm_seconds": told.first_token_seconds,
            "ratio": cold.first_token_seconds / told.first_token_seconds, "same": cold_ids == warm_ids,
        })  # fmt: skip
        print(
            f"{told.prompt_tokens} tokens, {told.cached_tokens} cached: first token after {told.first_token_seconds:.3f} s warm, "
            f"{cold.first_token_seconds:.3f} s cold, {runs[-1]['ratio']:.1f} times; tokens {'the same' if cold_ids == warm_ids else 'DIFFER'}",
            flush=True,
        )
    print(f"median {statistics.median(run['ratio'] for run in runs):.1f} times sooner")
    if options.json:
        options.json.write_text(json.dumps(runs, indent=1) + "\n")
    return 0 if all(run["same"] for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
