"""`dspark replay TRACE`"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from dspark.cli.options import say
from dspark.errors import SettingError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", metavar="TRACE", help="a file that `dspark bench --trace FILE` wrote")
    parser.add_argument(
        "--costs",
        default=None,
        metavar="FILE",
        help="milliseconds by rows and by drafts, as JSON; `example` is the shipped one, made of a formula (default: those of the trace's machine)",
    )
    parser.add_argument("--requests", default="1,4,16,64,256", metavar="LIST", help="how many share a step (default %(default)s)")
    parser.add_argument(
        "--plans",
        default="plain,fixed,early-stop,lagged,auto",
        metavar="LIST",
        help="of plain, fixed, length:N, threshold:P, early-stop (the paper's Algorithm 1), lagged, auto (default %(default)s)",
    )
    parser.add_argument(
        "--load", type=float, default=None, metavar="R", help="answers a second: how many machines would give them, in a second table"
    )
    parser.add_argument(
        "--pace", type=float, default=0.0, metavar="T", help="with --load: tokens a second that each request is to get at least (default 0)"
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON document on the last line")


def run(options: argparse.Namespace) -> int:
    from dspark.measure.fleet import fleet_table, machines
    from dspark.measure.replay import EXAMPLE_COSTS, make_step_planner, measured, read_costs, replay, table
    from dspark.measure.trace import read_trace

    plans = [name.strip() for name in options.plans.split(",") if name.strip()]
    if not plans:
        raise SettingError("--plans names no plan", "give some of plain, fixed, length:N, threshold:P, early-stop, lagged, auto")
    requests = as_counts(options.requests)
    check_load(options.load, options.pace)
    trace = read_trace(Path(options.trace))
    about, costs_at = (
        "costs of the trace's machine; several drafts one by one, rows past the last measured in proportion",
        measured(trace.costs),
    )
    if options.costs is not None:
        about, costs = read_costs(EXAMPLE_COSTS if options.costs == "example" else Path(options.costs))
        costs_at = lambda num_tokens: costs  # noqa: E731
    for plan in plans:
        make_step_planner(plan, trace.block_size, costs_at(0), 1)  # all names are known before anything is replayed
    say(f"replayed, not measured: {len(trace.requests)} recorded requests; {about}")
    outcomes = [replay(trace, plan, number, costs_at) for number in requests for plan in plans]
    print(table(outcomes))
    document = {"costs": about, "made_by": trace.made_by, "replays": [outcome.figures() for outcome in outcomes]}
    if options.load is not None:
        found = [machines(trace, outcome, costs_at, options.load, options.pace) for outcome in outcomes]
        document["machines"] = [asdict(each) for each in found]
        print(f"\n{fleet_table(found, options.load, options.pace)}")
    if options.json:
        print(json.dumps(document))
    return 0


def check_load(load: float | None, pace: float) -> None:
    if load is None:
        if pace:
            raise SettingError("--pace cannot take effect without --load", "give the answers a second as --load")
        return
    if not 0 < load < float("inf") or not 0 <= pace < float("inf"):
        raise SettingError(f"--load is {load} and --pace {pace}", "give answers a second above 0, and tokens a second from 0")


def as_counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if not all(1 <= count <= 4096 for count in counts):
        raise SettingError(f"--requests is {text!r}", "give whole numbers from 1 to 4096, as in 1,16,256")
    return counts
