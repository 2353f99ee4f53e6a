"""`dspark verify TARGET`"""

import argparse
import json
from dataclasses import asdict
from importlib.resources import files

from dspark.cli.options import add_head, add_target, flag, open_head, open_prompts, open_target
from dspark.limits import check_names, check_settings
from dspark.prompts import read_prompts

OUTCOMES = {True: "ok  ", False: "FAIL", None: "skip"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    add_head(parser)
    parser.add_argument(
        "--prompts", default=None, metavar="FILE.jsonl", help="prompts to compare on (default: eight that come with dspark)"
    )
    parser.add_argument(
        "--drafter",
        action="append",
        default=[],
        metavar="NAME",
        help="check this drafter; may be given again (default: the head and lookup)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="tokens a prompt (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")


def run(options: argparse.Namespace) -> int:
    check_settings(options.max_new_tokens, 0, (), flag)
    for name in options.drafter:
        check_names(name)
    prompts = open_prompts([], options.prompts) if options.prompts else read_prompts(str(files("dspark") / "demo_prompts.jsonl"))
    target = open_target(options)
    head = open_head(options, target)
    from dspark.measure.lossless import verify_pair
    from dspark.train.run import Bar

    ids = [target.prompt_ids(p.content) for p in prompts]
    checks = verify_pair(target, head, ids, options.max_new_tokens, options.drafter, Bar())
    passed = all(check.passed is not False for check in checks)
    if options.json:
        print(json.dumps({"passed": passed, "checks": [asdict(check) for check in checks]}))
    else:
        for check in checks:
            print(f"{OUTCOMES[check.passed]} {check.name}: {check.detail}")
    return 0 if passed else 1
