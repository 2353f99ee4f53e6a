"""`dspark calibrate HEAD --target TARGET`"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from dspark.cli.options import add_target, flag, open_prompts, open_target, say
from dspark.errors import SettingError
from dspark.limits import check_law

INVENTED = 128
# Training begins at multiples of 100,000 and goes up by one a batch: no head saw what this seed invents.
SEED = 90_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("head", metavar="HEAD", help="folder, hub id, or the name of a shipped head; calibration.json is written there")
    add_target(parser, name="--target")
    parser.add_argument(
        "--prompts", action="append", default=[], metavar="FILE.jsonl",
        help="may be given again; a line's `set` key groups the figures (default: instructions the target invents)",
    )  # fmt: skip
    parser.add_argument("--num-prompts", type=int, default=None, metavar="N", help=f"instructions the target invents (default {INVENTED})")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens a prompt (default %(default)s)")
    parser.add_argument(
        "--temperature", type=float, action="append", default=[], metavar="T", help="sampling law to fit for; may be given again (default: 0 and 1)"
    )  # fmt: skip
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="of the laws above T=0: keep the K best tokens (0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="of the laws above T=0: keep this mass (1: all)")
    fit = parser.add_mutually_exclusive_group()
    fit.add_argument("--bias", action="store_true", help="fit a bias beside each temperature (default: temperatures alone, as the paper)")
    fit.add_argument("--margin", action="store_true", help="fit a bias, and a weight of the margin between the two best draft logits")
    parser.add_argument("--json", action="store_true", help="end with one JSON document on the last line")


def run(options: argparse.Namespace) -> int:
    if options.prompts and options.num_prompts is not None:
        raise SettingError("--num-prompts cannot take effect beside --prompts", "leave one of them out")
    for name in ("num_prompts", "max_new_tokens"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise SettingError(f"{flag(name)} is {getattr(options, name)}", "use 1 or more")
    for temperature in options.temperature or [0.0]:  # at 0 the other two are left out, but must have a meaning
        check_law(temperature, options.top_k, options.top_p, called=flag)
    prompts = [(p, str(p.extra.get("set") or Path(file).stem)) for file in options.prompts for p in open_prompts([], file)]
    from dspark.head.calibration import beside_kept, doubts, refuse_unwritable, write_calibration
    from dspark.head.folder import dspark_only, load_head, named_head, read_config

    folder = named_head(options.head)
    read_config(folder)
    refuse_unwritable(folder)
    target = open_target(options)
    head = dspark_only(load_head(folder, target, calibrated=False), folder)
    from dspark.measure.bench import machine
    from dspark.measure.calibrate import Settings, calibrate, table
    from dspark.train.run import Bar

    temperatures = dict.fromkeys(options.temperature or [0.0, 1.0])
    laws = [Settings(T, options.top_k, options.top_p) if T else Settings() for T in temperatures]
    bar = Bar()
    if prompts:
        ids = [(target.prompt_ids(p.content), name) for p, name in prompts]
    else:
        ids = invented(target, options.num_prompts or INVENTED, bar)
    curve = "margin" if options.margin else "bias" if options.bias else "temperatures"
    found, reports = calibrate(target, head, ids, laws, options.max_new_tokens, bar, curve)
    write_calibration(beside_kept(found, folder, head.config.block_size), folder)
    print(table(reports))
    print(f"\nwritten to {folder / 'calibration.json'}")
    for doubt in doubts(found):
        say(doubt)
    if options.json:
        print(
            json.dumps({"machine": machine(target.device), "calibration": asdict(found), "reports": [asdict(report) for report in reports]})
        )
    return 0


def invented(target, count: int, bar) -> list[tuple[list[int], str]]:
    """Prompt ids and kind of instructions that the target makes up."""
    from dspark.train.answers import invent_prompts

    if target.tokenizer is None:
        raise SettingError(f"target {target.name} has no tokenizer to invent prompts with", "pass --prompts FILE.jsonl")
    with tempfile.TemporaryDirectory() as work:
        records = invent_prompts(target, count, SEED, Path(work) / "prompts.jsonl", bar)
    return [(target.prompt_ids(record["prompt"]), record["kind"]) for record in records]
