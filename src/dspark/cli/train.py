"""`dspark train TARGET --out DIR`"""

import argparse
import json
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from dspark.cli.options import add_target, open_target
from dspark.config import SEQUENTIAL_HEADS, TrainConfig
from dspark.errors import SettingError
from dspark.prompts import read_prompts
from dspark.train.openers import OPENERS

DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(TrainConfig)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser, dtype="bfloat16")
    parser.add_argument("--out", required=True, metavar="DIR", help="the head's folder; work in progress lies in DIR/progress")
    parser.add_argument("--resume", action="store_true", help="continue the run in DIR")
    data = parser.add_argument_group("data")
    data.add_argument("--prompts", metavar="FILE.jsonl", help="your own prompts, mixed with those the target invents")
    data.add_argument(
        "--num-prompts",
        type=int,
        default=None,
        metavar="N",
        help=f"instructions the target invents (default {DEFAULTS['num_prompts']})",
    )
    data.add_argument(
        "--kinds", default="", metavar="LIST", help=f"kinds of instructions to invent, of {', '.join(OPENERS)} (default: all)"
    )
    data.add_argument(
        "--answers", action="append", default=[], metavar="FILE", help="answers sampled earlier, used as they are; may be given again"
    )
    data.add_argument("--only-answers", action="store_true", help="stop when the answers are sampled (DIR/progress/answers.jsonl)")
    data.add_argument(
        "--max-answer-tokens", type=int, default=DEFAULTS["max_answer_tokens"], metavar="N", help="longest answer (default %(default)s)"
    )
    data.add_argument(
        "--held-out", type=int, default=DEFAULTS["held_out"], metavar="N", help="answers kept for measuring (default %(default)s)"
    )
    data.add_argument(
        "--cache-gb",
        type=float,
        default=DEFAULTS["cache_gigabytes"],
        metavar="G",
        help="bound of the feature cache on disk (default %(default)s)",
    )
    shape = parser.add_argument_group("head")
    shape.add_argument(
        "--start-from", default=None, metavar="HEAD", help="go on training this head, which brings its own shape; only --rank may grow it"
    )
    shape.add_argument("--layers", type=int, metavar="L", help="draft layers (default 2)")
    shape.add_argument("--kv-heads", type=int, metavar="K", help="key heads of the draft layers (default: as many as query heads)")
    shape.add_argument("--block-size", type=int, metavar="G", help="tokens drafted a round, gamma (default 5)")
    shape.add_argument("--rank", type=int, metavar="R", help="rank of the sequential head; 0 is DFlash (default 96)")
    shape.add_argument("--sequential", choices=SEQUENTIAL_HEADS, help="kind of sequential head (default vanilla)")
    shape.add_argument("--draft-vocab", type=int, metavar="N", help="tokens the head can propose; 0 for all (default 8192)")
    shape.add_argument("--taps", metavar="I,J,..", help="target layers whose outputs feed the head (default: five, spread)")
    steps = parser.add_argument_group("steps")
    steps.add_argument("--steps", type=int, default=DEFAULTS["steps"], metavar="N", help="optimiser steps (default %(default)s)")
    steps.add_argument(
        "--sequences", type=int, default=DEFAULTS["sequences_per_step"], metavar="N", help="answers a step (default %(default)s)"
    )
    steps.add_argument(
        "--anchors", type=int, default=DEFAULTS["anchors_per_sequence"], metavar="N", help="anchors an answer (default %(default)s)"
    )
    steps.add_argument(
        "--optimizer", default=DEFAULTS["optimizer"], choices=("adamw", "muon"), help="muon: for matrices only (default %(default)s)"
    )
    steps.add_argument(
        "--lr", type=float, default=DEFAULTS["learning_rate"], metavar="R", help="peak learning rate of AdamW (default %(default)s)"
    )
    steps.add_argument(
        "--muon-lr",
        type=float,
        default=DEFAULTS["muon_learning_rate"],
        metavar="R",
        help="peak learning rate of Muon (default %(default)s)",
    )
    steps.add_argument("--loss", default="paper", choices=LOSSES, help=LOSS_HELP)
    steps.add_argument("--seed", type=int, default=0, metavar="S", help="the same seed and threads give the same head (default 0)")
    parser.add_argument("--json", action="store_true", help="print the provenance record as JSON at the end")


# option -> (the head's own name for it, what is chosen when nothing is said)
SHAPE = {
    "layers": ("num_hidden_layers", 2), "kv_heads": ("num_key_value_heads", None), "block_size": ("block_size", 5), "rank": ("markov_rank", 96),
    "sequential": ("markov_head_type", "vanilla"), "draft_vocab": ("draft_vocab_size", 8192), "taps": ("target_layer_ids", None),
}  # fmt: skip
LOSSES = ("paper", "distil")
LOSS_HELP = (
    "paper: 0.1 cross entropy with the sampled token + 0.9 L1; distil: cross entropy with the target's law + 0.5 L1 (default %(default)s)"
)
LOSS_SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {"teacher_ce": False, "ce_weight": 0.1, "l1_weight": 0.9},
    "distil": {"teacher_ce": True, "ce_weight": 1.0, "l1_weight": 0.5},
}


def run(options: argparse.Namespace) -> int:
    for name in ("steps", "sequences", "anchors", "layers", "block_size", "max_answer_tokens", "held_out"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise SettingError(f"--{name.replace('_', '-')} is {getattr(options, name)}", "use 1 or more")
    if min(options.rank or 0, options.draft_vocab or 0, options.num_prompts or 0) < 0:
        raise SettingError("--rank, --draft-vocab and --num-prompts cannot be negative")
    if not 0 <= options.seed < 2**32:
        raise SettingError(f"--seed is {options.seed}", "seeds of a training run are whole numbers from 0 to 2**32 - 1")
    if options.device != "cpu":
        raise SettingError(f"--device is {options.device}", "training runs on the CPU; the trained head serves on any device")
    shape = head_shape(options)
    kinds = tuple(kind.strip() for kind in options.kinds.split(",") if kind.strip())
    unknown = [kind for kind in kinds if kind not in OPENERS]
    if unknown:
        raise SettingError(f"--kinds names {unknown[0]!r}", f"choose from {', '.join(OPENERS)}")
    if options.answers and (options.prompts or options.only_answers or options.num_prompts is not None or kinds):
        raise SettingError(
            "--answers brings finished answers; --prompts, --num-prompts, --kinds and --only-answers cannot take effect beside it",
            "leave one of them out",
        )
    num_prompts = DEFAULTS["num_prompts"] if options.num_prompts is None else options.num_prompts
    prompts = read_prompts(options.prompts) if options.prompts else None
    missing = [path for path in options.answers if not Path(path).is_file()]
    if missing:
        raise SettingError(f"no answers file {missing[0]}", "sample some: `dspark train TARGET --out DIR --only-answers`")
    config = TrainConfig(
        seed=options.seed, num_prompts=num_prompts, kinds=kinds, max_answer_tokens=options.max_answer_tokens, steps=options.steps,
        sequences_per_step=options.sequences, anchors_per_sequence=options.anchors, optimizer=options.optimizer, learning_rate=options.lr,
        muon_learning_rate=options.muon_lr, held_out=options.held_out, cache_gigabytes=options.cache_gb, **LOSS_SETTINGS[options.loss],
    )  # fmt: skip
    target = open_target(options)
    from dspark.head.folder import named_head
    from dspark.train.run import train

    start_from = None if options.start_from is None else named_head(options.start_from)
    command = shlex.join(["dspark", *(a for a in sys.argv[1:] if a != "--resume")])
    report = train(
        target, Path(options.out), config, shape, prompts, [Path(a) for a in options.answers], options.resume, options.only_answers, command,
        start_from,
    )  # fmt: skip
    if options.only_answers:
        print(f"{report['answers']} answers in {options.out}/progress/answers.jsonl")
    elif options.json:
        print(json.dumps(report))
    else:
        rounds = report["held_out_rounds"]
        print(
            f"head saved in {options.out}: tau {rounds['tau_t0']} at T=0, {rounds['tau_t1']} at T=1 on {rounds['prompts']} held-out prompts"
        )
    return 0


def head_shape(options: argparse.Namespace) -> dict:
    """The shape asked for; beside --start-from, whose head has one, at most a larger rank."""
    given = [name for name in SHAPE if getattr(options, name) is not None]
    if options.start_from is not None:
        other = [name for name in given if name != "rank"]
        if other:
            raise SettingError(f"--{other[0].replace('_', '-')} cannot take effect beside --start-from", "the head brings its own shape")
        return {} if options.rank is None else {"markov_rank": options.rank}
    shape = {name: default if getattr(options, option) is None else getattr(options, option) for option, (name, default) in SHAPE.items()}
    shape["draft_vocab_size"] = shape["draft_vocab_size"] or None
    try:
        shape["target_layer_ids"] = [int(i) for i in options.taps.split(",")] if options.taps is not None else None
    except ValueError as error:
        raise SettingError(f"--taps is {options.taps!r}", "give layer numbers with commas, like 1,8,15,22,29") from error
    return shape
