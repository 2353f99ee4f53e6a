"""A DSpark head and a DFlash head (rank 0) from nothing on one GPU, within a given time, alike in data, steps, seed and batch.

    python bench/gpu/train_pair.py TARGET --out DIR [--prompts FILE.jsonl] [--seconds N] [--device cuda] ...

Stages: instructions that the target invents (`--num-prompts` of all kinds, half as many more of code, and half as many of structured
text and chat); its answers to them and, twice, at different temperatures, to the given prompts; features; two trainings of as many
steps as the time allows, DSpark first; acceptance by position on held-out answers. DIR holds answers.jsonl, the heads `dspark` and
`dflash`, and report.json, which is written anew after each stage: what is done when the time ends early is kept."""

import argparse
import copy
import json
import shlex
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from dspark.config import TrainConfig
from dspark.head.folder import save_head
from dspark.prompts import read_prompts
from dspark.target.load import load_target
from dspark.target.target import Target
from dspark.train.answers import answer_prompts, invent_prompts
from dspark.train.card import write_card
from dspark.train.features import FeatureStore
from dspark.train.run import choose_shape, origin, usable
from dspark.train.trainer import measure, train_steps
from dspark.train.warmstart import new_head

SAVING = 22.0  # seconds kept back for measuring and saving each head
TRIED = 14  # steps timed to choose how many there will be


class Clock:
    """Seconds since the start, and a report on disk after each stage."""

    def __init__(self, out: Path, target: Target):
        self.begin, self.out, self.report, self.device = time.perf_counter(), out, {}, target.device

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self.begin

    def note(self, stage: str, found: dict) -> None:
        self.report[stage] = {"at_seconds": round(self.now(), 1), **found}
        (self.out / "report.json").write_text(json.dumps(self.report, indent=2) + "\n")
        print(stage, json.dumps(self.report[stage]), flush=True)


def silent(*args) -> None:
    pass


def sample(target: Target, options: argparse.Namespace, clock: Clock) -> list[dict]:
    """Answers to the given prompts, twice, among answers to invented ones."""
    n, invented = options.num_prompts, []
    for seed, (count, kinds) in enumerate(((n, ()), (n // 2, ("code",)), (n // 2, ("structured", "chat")))):
        if count:
            invented += invent_prompts(target, count, 1000 * (seed + 1), options.out / f"prompts-{seed}.jsonl", silent, kinds)
    invented = [record for part in (invented[i::7] for i in range(7)) for record in part]  # any window is a mix
    clock.note("prompts", {"invented": len(invented)})
    given = [{"prompt": p.content, **p.extra} for p in read_prompts(options.prompts)] if options.prompts else []
    # Temperatures go by index modulo three: the second copy begins one later, and so meets another one.
    twice = [*given, *given[1 + len(given) % 3 :], *given[: 1 + len(given) % 3]]
    records = answer_prompts(target, [*twice, *invented], options.max_answer_tokens, 5000, options.out / "answers.jsonl", silent)
    tokens = sum(len(r["answer_ids"]) for r in records)
    clock.note("answers", {"answers": len(records), "answer_tokens": tokens})
    return records


def step_time(target: Target, store: FeatureStore, head, config: TrainConfig) -> float:
    """Seconds of a step once warm, on a copy that is thrown away."""
    head, ends = copy.deepcopy(head), []
    train_steps(head, target, store, replace(config, steps=TRIED), None, lambda step, result: ends.append(time.perf_counter()))
    if target.device.type == "cuda":
        torch.cuda.synchronize(target.device)
    return (time.perf_counter() - ends[3]) / (TRIED - 4)


def train_one(name: str, head, target: Target, store: FeatureStore, config: TrainConfig, options: argparse.Namespace, clock: Clock) -> None:
    begin, curve = clock.now(), []

    def on_step(step: int, result) -> None:
        if step % max(1, config.steps // 8) == 0 or step == config.steps:
            curve.append({"step": step, "seconds": round(clock.now() - begin, 1), **measure(head, target, store, config, 48)})
            print(name, json.dumps(curve[-1]), flush=True)

    train_steps(head, target, store, config, None, on_step)
    seconds = clock.now() - begin
    teacher_forced = measure(head, target, store, config, config.held_out)
    provenance = origin(target, config, store.records, shlex.join(["python", *sys.argv])) | {
        "seconds_of_steps": round(seconds, 1), "curve": curve, "held_out_teacher_forced": teacher_forced,
    }  # fmt: skip
    golden_ids = (store.records[0]["prompt_ids"] + store.records[0]["answer_ids"])[:64]
    save_head(head, target, options.out / name, golden_ids, provenance, write_card(head, target, provenance, None))
    clock.note(name, {"steps": config.steps, "seconds_of_steps": round(seconds, 1), **teacher_forced})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", metavar="TARGET")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", help="your own prompts, answered twice")
    parser.add_argument("--num-prompts", type=int, default=10_000)
    parser.add_argument("--max-answer-tokens", type=int, default=384)
    parser.add_argument("--seconds", type=float, default=480.0, help="for everything; the steps get what sampling leaves")
    parser.add_argument("--most-steps", type=int, default=20_000, help="of each head")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--anchors", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--block-size", type=int, default=7)
    parser.add_argument("--rank", type=int, default=160)
    parser.add_argument("--draft-vocab", type=int, default=8192)
    parser.add_argument("--held-out", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    target = load_target(options.target, dtype=options.dtype, device=options.device)
    clock = Clock(options.out, target)
    config = TrainConfig(
        seed=options.seed, steps=options.most_steps, sequences_per_step=options.sequences, anchors_per_sequence=options.anchors,
        learning_rate=options.lr, held_out=options.held_out, num_prompts=2 * options.num_prompts, max_answer_tokens=options.max_answer_tokens,
        teacher_ce=True, ce_weight=1.0, l1_weight=0.5,
    )  # fmt: skip
    records = usable(sample(target, options, clock), config)
    heads = {}
    for name, rank in (("dspark", options.rank), ("dflash", 0)):
        asked = {"block_size": options.block_size, "markov_rank": rank, "draft_vocab_size": options.draft_vocab}
        heads[name] = new_head(target, *choose_shape(target, records, asked), options.seed).requires_grad_(True)
    target.tap(heads["dspark"].config.target_layer_ids)
    store = FeatureStore(target, records, options.out / "cache", config.teacher_tokens, config.cache_gigabytes)
    if store.resident:
        store.fill(range(len(store)))
    clock.note("features", {"resident": store.resident, "rows": sum(store.lengths)})
    seconds = {name: step_time(target, store, head, config) for name, head in heads.items()}
    left = options.seconds - clock.now() - 2 * SAVING
    config = replace(config, steps=max(1, min(options.most_steps, int(left / sum(seconds.values())))))
    clock.note("plan", {"seconds_a_step": seconds, "config": asdict(config)})
    for name, head in heads.items():
        train_one(name, head, target, store, config, options, clock)


if __name__ == "__main__":
    main()
