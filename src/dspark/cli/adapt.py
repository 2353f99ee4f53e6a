"""`dspark adapt HEAD --target TARGET --out DIR`"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from dspark.cli.options import add_target, open_target, say
from dspark.cli.train import (
    DATA,
    STEPS,
    add_data,
    add_run,
    add_steps,
    command_of,
    open_server,
    reuse_settings,
    training,
)
from dspark.config import ADAPT, LOW_RANK_RATE
from dspark.errors import SettingError

DEFAULTS: dict[str, Any] = {
    **DATA, "low_rank": 0, **STEPS, "num_prompts": ADAPT.num_prompts, "steps": ADAPT.steps, "lr": ADAPT.learning_rate, "loss": "distil",
}  # fmt: skip
NOT_BETTER = 3  # exit code: all was done as asked, and the head is no better (1 is for what broke, 2 for mistakes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("head", metavar="HEAD", help="folder, hub id, or the name of a shipped head: where to start from")
    add_target(parser, dtype="bfloat16", name="--target")
    add_run(parser)
    add_data(parser, DEFAULTS)
    steps = add_steps(parser, DEFAULTS)
    steps.add_argument(
        "--low-rank", type=int, metavar="R",
        help=f"learn updates of rank R beside the matrices, merged at the end (default: all weights); --lr is then {LOW_RANK_RATE} by default",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SettingError("`dspark adapt` runs in one process", "start it without torchrun")
    from dspark.train.run import check_folder, check_settings

    check_folder(Path(options.out), options.resume)
    if options.resume:
        reuse_settings(options, DEFAULTS, add_arguments)
    command = command_of(options, ["adapt", options.head, "--target", options.target], DEFAULTS)
    if options.low_rank is not None and options.low_rank < 0:
        raise SettingError(f"--low-rank is {options.low_rank}", "use a rank from 1 on, or leave it out")
    if options.low_rank and options.lr is None:
        options.lr = LOW_RANK_RATE
    config, prompts = training(options, DEFAULTS)
    check_settings(config, {}, None if options.answers else len(prompts or ()))
    from dspark.head.folder import named_head, read_config

    source = named_head(options.head)
    read_config(source)
    server = open_server(options)
    target = open_target(options)
    from dspark.train.adapt import adapt, gain_report

    report = adapt(
        target, Path(options.out), config, source, options.low_rank, prompts, [Path(a) for a in options.answers], options.resume, command, server
    )  # fmt: skip
    written = report["adapted"]["written"]
    print(json.dumps(report) if options.json else gain_report(report))
    if not written:
        say(not_written(options.out, report))
        return NOT_BETTER
    if not options.json:
        print(f"head saved in {options.out}")
    if not report.get("finished_before"):
        say(f"{options.out}/progress may be deleted now")
    return 0


def not_written(out: str, report: dict) -> str:
    found, work = report["adapted"], Path(out) / "progress"
    answers = f" --answers {work}/answers.jsonl" if (work / "answers.jsonl").exists() else ""
    return (
        f"not written: on held-out rounds the adapted head is not better than the one it came from, beyond chance ({found['gain']:+.3f} tokens "
        f"a round, standard error {found['standard_error']:.3f}); {work} is kept\n"
        f"hint: the head as it is may serve this target well enough; else try more --num-prompts and --steps, or another --lr: "
        f"--out OTHER{answers}"
    )
