"""Does dspark say what transformers says? Greedy tokens of both on the same prompts.

    python bench/tokens.py reference TARGET --prompts FILE.jsonl ... --out REF.jsonl [--dtype D] [--batch N]
    dspark generate TARGET --prompts FILE.jsonl --json --drafter NAME > OURS.jsonl
    dspark bench TARGET --prompts FILE.jsonl ... --json > OURS.json
    python bench/tokens.py engine TARGET --prompts FILE.jsonl ... --out OURS.jsonl [--plan PLAN|plain] [--dtype D] [--running N]
    python bench/tokens.py compare REF.jsonl OURS ... [--ties TARGET --dtype D]

`reference` runs transformers' own `generate`, left-padded in batches; prompts go through the chat template as
`dspark generate` puts them. `engine` decodes them many at a time, with the shipped head. `compare` prints how many texts are the same and where the others first differ; exits 1
if any differ. With --ties it asks the target, run by transformers, how far apart the logits of the two tokens are
at each first difference, and exits 1 only if one of them is no near-tie for the precision: neither there nor, where
rounding has drawn the two apart, between the same two logits in float32."""

import argparse
import functools
import json
import sys
from pathlib import Path

import torch

from dspark.engine.engine import Engine
from dspark.engine.request import Event, Failed, Request, Tokens
from dspark.head.folder import find_head, load_head
from dspark.measure.lossless import TIE, first_difference, logit_gap
from dspark.prompts import read_prompts
from dspark.target.load import load_target


def reference(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    target = load_target(options.target, options.dtype, runtime="eager")
    prompts = [target.prompt_ids(p.content) for file in options.prompts for p in read_prompts(file)]
    eos = min(target.eos_ids)
    answers: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    for start in range(0, len(order), options.batch):
        batch = order[start : start + options.batch]
        longest = max(len(prompts[i]) for i in batch)
        ids = torch.tensor([[eos] * (longest - len(prompts[i])) + prompts[i] for i in batch])
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
        output = target.model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=options.max_new_tokens, pad_token_id=eos
        )  # fmt: skip
        for i, row in zip(batch, output[:, longest:].tolist(), strict=True):
            end = next((n + 1 for n, token in enumerate(row) if token in target.eos_ids), len(row))
            answers[i] = row[:end]
        print(f"{len(answers)} of {len(prompts)}", file=sys.stderr, flush=True)
    lines = [json.dumps({"index": i, "prompt_ids": prompts[i], "token_ids": answers[i]}) for i in range(len(prompts))]
    options.out.write_text("\n".join(lines) + "\n")
    return 0


def engine(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    target = load_target(options.target, options.dtype)
    head = load_head(find_head(None, options.target), target)
    prompts = [target.prompt_ids(p.content) for file in options.prompts for p in read_prompts(file)]
    answers: list[list[int]] = [[] for _ in prompts]
    plain = options.plan == "plain"
    many = Engine(
        target, head, max_running=options.running, max_waiting=len(prompts), speculate=not plain, plan="auto" if plain else options.plan
    )

    def heard(index: int, event: Event) -> None:
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Tokens):
            answers[index] += event.ids

    for index, ids in enumerate(prompts):
        many.submit(Request(ids, options.max_new_tokens), functools.partial(heard, index))
    while many.running or many.waiting:
        many.step()
    lines = [json.dumps({"index": i, "token_ids": ids}) for i, ids in enumerate(answers)]
    options.out.write_text("\n".join(lines) + "\n")
    return 0


def compare(options: argparse.Namespace) -> int:
    expected = [json.loads(line) for line in options.reference.read_text().splitlines()]
    target = load_target(options.ties, options.dtype, runtime="eager") if options.ties else None
    exact = functools.cache(lambda: load_target(options.ties, "float32", runtime="eager"))
    failed = False
    for name, found in [pair for file in options.results for pair in texts(file)]:
        if len(found) != len(expected):
            print(f"error: {name} has {len(found)} answers, {options.reference} {len(expected)}", file=sys.stderr)
            return 2
        pairs = [(record, ours, first_difference(ours, record["token_ids"])) for record, ours in zip(expected, found, strict=True)]
        differing = [(record, ours, at) for record, ours, at in pairs if at is not None]
        print(f"{name}: {len(found) - len(differing)} of {len(found)} texts are the same, {sum(map(len, found))} tokens")
        gaps = []
        for record, ours, at in differing:
            where, theirs = f"  prompt {record['index']} from token {at}", record["token_ids"]
            if target is None:
                print(where)
                continue
            pair = (theirs[at] if at < len(theirs) else None, ours[at] if at < len(ours) else None)
            prefix, tie = record["prompt_ids"] + theirs[:at], TIE[target.model.dtype]
            gap = logit_gap(target, prefix, *pair)
            says = f"{where}: logits {gap:.3g} apart"
            if gap > tie:
                gap = logit_gap(exact(), prefix, *pair)
                says += f", in float32 {gap:.3g}"
            print(says)
            gaps.append(gap)
        if target is not None and gaps:
            tie = TIE[target.model.dtype]
            print(f"  a tie is {tie:g}: {sum(gap <= tie for gap in gaps)} of {len(gaps)} differences are ties")
            failed |= any(gap > tie for gap in gaps)
        elif target is None:
            failed |= bool(differing)
    return int(failed)


def texts(file: Path) -> list[tuple[str, list[list[int]]]]:
    """(name, token ids by prompt) of a file that `dspark generate --json` wrote, or of each mode of `dspark bench --json`."""
    last = json.loads(file.read_text().strip().splitlines()[-1])
    if "modes" not in last:
        return [(file.stem, [json.loads(line)["token_ids"] for line in file.read_text().splitlines()])]
    runs = sorted(last["prompts"], key=lambda run: run["index"])
    return [(f"{file.stem}, {mode}", [run["token_ids"] for run in runs if run["mode"] == mode]) for mode in last["modes"]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("reference")
    one.add_argument("target")
    one.add_argument("--prompts", action="append", required=True)
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--dtype", default="float32")
    one.add_argument("--batch", type=int, default=20)
    one.add_argument("--max-new-tokens", type=int, default=128)
    one.add_argument("--threads", type=int, default=torch.get_num_threads())
    one.set_defaults(run=reference)
    many = verbs.add_parser("engine")
    many.add_argument("target")
    many.add_argument("--prompts", action="append", required=True)
    many.add_argument("--out", type=Path, required=True)
    many.add_argument("--plan", default="auto")
    many.add_argument("--dtype", default="float32")
    many.add_argument("--running", type=int, default=16, metavar="N")
    many.add_argument("--max-new-tokens", type=int, default=128)
    many.add_argument("--threads", type=int, default=torch.get_num_threads())
    many.set_defaults(run=engine)
    two = verbs.add_parser("compare")
    two.add_argument("reference", type=Path)
    two.add_argument("results", type=Path, nargs="+")
    two.add_argument("--ties", metavar="TARGET")
    two.add_argument("--dtype", default="float32")
    two.set_defaults(run=compare)
    options = parser.parse_args()
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
