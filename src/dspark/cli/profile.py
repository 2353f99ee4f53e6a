"""`dspark profile TARGET`"""

import argparse
import json
from dataclasses import asdict
from datetime import date
from pathlib import Path

from dspark.cli.options import add_head, add_target, check_file, open_head, open_target, say
from dspark.errors import SettingError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    add_head(parser)
    parser.add_argument("--context", type=int, default=300, metavar="N", help="tokens before the measured rows (default %(default)s)")
    parser.add_argument(
        "--costs",
        default=None,
        metavar="FILE",
        help="also write what several requests cost together here, for `dspark replay --costs FILE`",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    if options.costs is not None:
        check_file("--costs", options.costs)
    target = open_target(options)
    from dspark.drafters.arbiter import LOOKUP_TOKENS
    from dspark.head.folder import dspark_only
    from dspark.measure.bench import machine
    from dspark.profiling import REPEATS, ROWS, device_name, planning_costs, profile

    if not 1 <= options.context <= target.max_context - max(ROWS) - 1:
        raise SettingError(f"--context is {options.context}", f"use 1 to {target.max_context - max(ROWS) - 1} for this target")
    head = open_head(options, target)
    if options.costs is not None:
        if head is None:
            raise SettingError("--costs needs a head, whose drafts are measured too", "pass --head DIR")
        dspark_only(head, options.head or options.target)
    from tqdm import tqdm

    with tqdm(desc="measuring", total=REPEATS + 1, mininterval=1.0) as bar:
        found = profile(target, head, options.context, progress=lambda done: bar.update(done - bar.n))
    for most_rows in () if head is None else (1 + head.config.block_size, 1 + LOOKUP_TOKENS):
        planning_costs(target, head, most_rows, again=True)  # kept for the planner of the head alone, and of head and lookup
    if options.costs is not None and head is not None:
        write_costs(target, head, options)
    if options.json:
        derived = {"share_of_bandwidth": found.share_of_bandwidth, "break_even": found.break_even}
        print(
            json.dumps(
                {"machine": machine(target.device), "dtype": options.dtype, "runtime": target.runtime_name, **asdict(found), **derived}
            )
        )
        return 0
    say(
        f"{device_name(target.device)}, {machine()['threads']} threads, {options.dtype}, {target.runtime_name}, {found.context} tokens of context"
    )
    print(f"{'rows':>4} {'ms':>7} {'times one row':>14}")
    for n, milliseconds in found.rows.items():
        print(f"{n:>4} {milliseconds:>7.2f} {milliseconds / found.rows[1]:>14.2f}")
    if found.draft is not None:
        each = f", {found.draft_each:.2f} of them for each token behind the first" if found.draft_each else ""
        print(f"draft of {found.block_size} tokens: {found.draft:.2f} ms{each}; the head pays above {found.break_even:.2f} tokens a round")
    print(
        f"one row reads {found.weight_bytes / 1e6:.0f} MB of weights at {found.weight_bytes / found.rows[1] / 1e6:.1f} GB/s, "
        f"{found.share_of_bandwidth:.0%} of the {found.bandwidth / 1e9:.1f} GB/s this machine reads"
    )
    if found.share_of_bandwidth > DISTURBED:
        say("more than the memory gave when it was measured: something else was running, measure again")
    return 0


DISTURBED = 1.2  # of the memory's rate: past what two measurements of a quiet machine differ by


MOST_REQUESTS = 32  # measured together; a replay goes on from there in proportion


def write_costs(target, head, options: argparse.Namespace) -> None:
    """A file of costs for `dspark replay`: what the engine measures before it plans for several requests."""
    from dspark.drafters.arbiter import LOOKUP_TOKENS
    from dspark.engine.load import CONTEXT, measured_load
    from dspark.measure.bench import machine
    from dspark.measure.fleet import as_curve
    from dspark.profiling import device_name

    load = measured_load(target, head, MOST_REQUESTS, 1 + max(head.config.block_size, LOOKUP_TOKENS), say)  # as `dspark serve` measures
    about = (
        f"measured by `dspark profile`, {date.today()}: {target.name}, {options.dtype}, {device_name(target.device)}, "
        f"{machine()['threads']} threads, {CONTEXT} tokens of context, 1 to {MOST_REQUESTS} requests together"
    )
    try:
        Path(options.costs).write_text(json.dumps({"about": about, **as_curve(load.alone.at(CONTEXT), load.together)}) + "\n")
    except OSError as error:
        raise SettingError(
            f"cannot write costs {options.costs}: {error.strerror}", "name another file; what was measured is kept"
        ) from error
    say(f"costs in {options.costs}: `dspark replay TRACE --costs {options.costs}`")
