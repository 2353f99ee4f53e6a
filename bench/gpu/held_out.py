"""The prompts of the answers that `dspark train` and train_pair.py keep from training, as a prompts file on stdout.

    python bench/gpu/held_out.py ANSWERS.jsonl --target TARGET [--held-out N] [--seed S] [--limit N]

Which answers these are depends on the file, the number and the seed. A prompt that the chat template does not give back as it
was is left out, and so is one that was seen before."""

import argparse
import json
from pathlib import Path

from dspark.config import TrainConfig
from dspark.target.load import load_target
from dspark.train.answers import read_answers, turn_template
from dspark.train.run import usable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--target", required=True)
    parser.add_argument("--held-out", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=None)
    options = parser.parse_args()
    target = load_target(options.target, dtype="bfloat16", runtime="eager")
    before, after = turn_template(target)
    records = usable(
        read_answers(options.answers, target.vocab_size, target.max_context), TrainConfig(held_out=options.held_out, seed=options.seed)
    )
    prompts: dict[str, str] = {}
    for record in records[: options.held_out]:
        text = target.tokenizer.decode(record["prompt_ids"]).removeprefix(before).removesuffix(after)
        if target.prompt_ids(text) == record["prompt_ids"]:
            prompts.setdefault(text, record["kind"])
    for text, kind in list(prompts.items())[: options.limit]:
        print(json.dumps({"prompt": text, "set": kind}))


if __name__ == "__main__":
    main()
