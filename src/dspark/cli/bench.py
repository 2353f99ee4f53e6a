"""`dspark bench TARGET --prompts FILE.jsonl`"""

import argparse
import json
import random
import re
from dataclasses import asdict
from datetime import date
from pathlib import Path

from dspark.cli.options import (
    add_head,
    add_modules,
    add_target,
    check_file,
    check_folder,
    flag,
    open_head,
    open_prompts,
    open_target,
    say,
    say_calibration,
    say_unfinished,
)
from dspark.errors import HeadError, SettingError
from dspark.limits import check_law, check_settings

RECORDED = "dspark@fixed"  # the mode whose rounds a trace holds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument(
        "--prompts", action="append", required=True, metavar="FILE.jsonl", help="may be given again; a line's `set` key groups the figures"
    )
    add_head(parser)
    add_modules(parser)
    parser.add_argument("--dflash-head", default=None, metavar="HEAD", help="a head of rank 0 for the mode dflash")
    parser.add_argument(
        "--other", action="append", default=[], metavar="NAME=HEAD", help="another head, a mode of this name; may be given again"
    )
    parser.add_argument(
        "--compare",
        default="plain,dspark",
        metavar="LIST",
        help="of plain, auto, dspark, dflash, mtp, mtp+dspark, lookup, hf, hf-lookup and the names of --other; @PLAN behind one that drafts chooses its plan, as in dspark@fixed (default %(default)s)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="exact limit (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="above T=0: keep this mass (1: all, the default)")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument(
        "--repeats", type=int, default=1, metavar="N", help="times each prompt is decoded in each mode (default %(default)s)"
    )
    parser.add_argument("--limit", type=int, default=None, metavar="N", help="prompts of each set, the first ones (default: all)")
    parser.add_argument(
        "--contexts",
        default=None,
        metavar="LIST",
        help="measure nothing but the head's tau in contexts of about these lengths, as in 256,1024,4096: the --limit prompts of each set, "
        "behind the others, which the target answers",
    )
    parser.add_argument(
        "--card", action="store_true", help="with --contexts: also write the table into the head's card and provenance.json"
    )
    parser.add_argument(
        "--trace", default=None, metavar="FILE", help=f"write the rounds of {RECORDED}, a mode of its own, for `dspark replay`"
    )
    parser.add_argument(
        "--report",
        default=None,
        metavar="DIR",
        help="write a page of plots there, and its data as JSON (pip install 'dspark[report]'); records a trace as --trace does",
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON document on the last line")


def run(options: argparse.Namespace) -> int:
    for name in ("max_new_tokens", "repeats", "limit"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise SettingError(f"{flag(name)} is {getattr(options, name)}", "use 1 or more")
    check_settings(options.max_new_tokens, options.seed, (), flag)
    check_law(options.temperature, top_p=options.top_p, called=flag)
    prompts = [(p, str(p.extra.get("set") or Path(file).stem)) for file in options.prompts for p in open_prompts([], file)]
    lengths, given = context_lengths(options), prompts
    prompts = first_of_each_set(prompts, options.limit)
    if lengths and options.mtp is not None:
        raise SettingError("--mtp cannot take effect with --contexts", "to measure that head, give it as --head")
    if lengths and options.top_p != 1:
        raise SettingError("--top-p cannot take effect with --contexts", "leave one of them out")
    if lengths:
        asked = [prompt for prompt, _ in prompts]
        return bench_contexts(options, lengths, asked, [prompt for prompt, _ in given if prompt not in asked])
    from dspark.head.folder import find_head, kind_in, load_head, named_head
    from dspark.head.mtp import own_mtp
    from dspark.measure.bench import Mode, aggregate, bench, check_modes, identical_to_plain, machine, table
    from dspark.measure.report import figures, write_report
    from dspark.measure.trace import Trace, as_request, write_trace
    from dspark.profiling import device_name, planning_costs, read_bandwidth, weight_bytes

    names = [name.strip() for name in options.compare.split(",") if name.strip()]
    others = dict(named(other) for other in options.other)
    check_modes(names, list(others))
    recorded = options.trace is not None or options.report is not None
    if options.trace is not None:
        check_file("--trace", options.trace)
    if options.report is not None:
        check_report(options.report, names)
    if recorded:
        names += [RECORDED] if RECORDED not in names else []
    kinds = {name.partition("@")[0] for name in names}
    if options.mtp is not None and not kinds & {"auto", "mtp", "mtp+dspark"}:
        raise SettingError("--mtp cannot take effect: no mode drafts with it", "name auto, mtp or mtp+dspark in --compare, or leave it out")
    wants_head = bool(kinds & {"dspark", "auto", "mtp+dspark"})
    no_head = options.head == "none" or find_head(options.head, options.target) is None
    if no_head and kinds & {"dspark", "mtp+dspark"}:
        raise HeadError(
            f"mode dspark needs a head, and none is known for {options.target}", "pass --head DIR, or leave it out of --compare"
        )
    if "dflash" in kinds and options.dflash_head is None:
        raise HeadError("mode dflash needs --dflash-head", "train one with `dspark train TARGET --rank 0 --out DIR`")
    for folder in [options.dflash_head] * ("dflash" in kinds) + [folder for name, folder in others.items() if name in kinds]:
        kind_in(named_head(folder))
        say_unfinished(named_head(folder))
    target = open_target(options)
    if no_head and "auto" in kinds and own_mtp(target, say) is None:
        raise HeadError(
            f"mode auto needs a head or multi-token-prediction modules, and {options.target} has neither",
            "pass --head DIR, or leave it out of --compare",
        )
    own = open_head(options, target) if wants_head and not no_head else None
    if recorded and own is not None and own.confidence_head is None:
        raise HeadError(
            f"the head of {options.target} has no confidences to record", "leave --trace and --report out, or train one with them"
        )
    heads = {"dspark": own, "auto": own, "mtp+dspark": own, "dflash": load_head(options.dflash_head, target) if "dflash" in kinds else None}
    heads |= {name: load_head(named_head(folder), target) for name, folder in others.items() if name in kinds}
    modes = [Mode(name, heads.get(name.partition("@")[0])) for name in names]
    for head in {id(head): head for head in heads.values() if head is not None}.values():
        say_calibration(head, options.temperature)
    ids = [(target.prompt_ids(p.content), name) for p, name in prompts]
    from tqdm import tqdm

    requests = []

    def watch(mode: str, index: int, result) -> None:
        if mode == RECORDED:
            requests.append(as_request(index, ids[index][1], len(ids[index][0]), result.rounds_log))

    with tqdm(total=len(ids), desc="prompts", mininterval=1.0) as bar:
        runs = bench(
            target,
            modes,
            ids,
            options.max_new_tokens,
            options.temperature,
            options.seed,
            options.repeats,
            lambda done, total: bar.update(done - bar.n),
            watch,
            options.top_p,
        )
    made_by = {"machine": machine(target.device), "arguments": {k: v for k, v in vars(options).items() if k not in ("run", "verb")}}
    report = aggregate(runs)
    law = f"T={options.temperature:g}" + (f", top-p {options.top_p:g}" if options.top_p < 1 and options.temperature else "")
    say(
        f"{device_name(target.device)}, {machine()['threads']} threads, {options.dtype}, batch 1, {law}, {options.max_new_tokens} new tokens, interleaved"
    )
    print(table(report), flush=True)
    if "plain" in report:
        report["plain"]["reading"] = {"weight_bytes": weight_bytes(target), "bandwidth": read_bandwidth(device=str(target.device))}
        print(reading(report["plain"]["tokens_per_second"], **report["plain"]["reading"]))
    if options.temperature == 0:
        same = identical_to_plain(runs)
        for name, count in same.items():
            report[name]["identical_to_plain"] = count
        if same:
            print(f"texts identical to plain's: {', '.join(f'{name} {count} of {len(ids)}' for name, count in same.items())}")
    if options.json:
        document = {**made_by, "modes": report, "prompts": [asdict(r) for r in runs]}
        print(json.dumps(document), flush=True)
    if recorded:  # last: what fails here takes no figure along
        assert own is not None  # the recorded mode wants it
        costs = planning_costs(target, own, 1 + own.config.block_size, say)
        trace = Trace(own.config.block_size, costs, tuple(requests), made_by)
    if options.trace is not None:
        write_trace(trace, Path(options.trace))
        say(f"trace in {options.trace}: `dspark replay {options.trace}`")
    if options.report is not None:
        drafting = {mode.name: mode.head.config for mode in modes if mode.head is not None and mode.kind != "auto"}
        shapes = {
            name: {
                "layers": getattr(config, "num_hidden_layers", 1),
                "block_size": config.block_size,
                "rank": getattr(config, "markov_rank", 0),
            }
            for name, config in drafting.items()
        }
        write_report(figures(report, trace, made_by, shapes), table(report), Path(options.report))
        say(f"report in {Path(options.report) / 'index.html'}")
    return 0


def named(other: str) -> tuple[str, str]:
    """The name and the head of an --other."""
    from dspark.measure.bench import MODES

    name, _, head = other.partition("=")
    if not re.fullmatch(r"[\w.-]+", name) or not head or name in MODES:
        raise SettingError(f"--other is {other!r}", f"write NAME=HEAD, the name a word other than {', '.join(MODES)}")
    return name, head


def context_lengths(options: argparse.Namespace) -> list[int]:
    """The lengths of --contexts, ascending; none where it is not given. Raises `SettingError`."""
    if options.contexts is None:
        if options.card:
            raise SettingError("--card cannot take effect without --contexts", "name lengths, as in --contexts 256,1024,4096")
        return []
    lengths = [part.strip() for part in options.contexts.split(",")]
    if not all(part.isdecimal() and int(part) for part in lengths):
        raise SettingError(f"--contexts is {options.contexts!r}", "give numbers of tokens, as in 256,1024,4096")
    if options.limit is None:
        raise SettingError(
            "--contexts needs --limit: which prompts are asked, and which make the turns before them", "ask a few, as in --limit 1"
        )
    beside = [name for name in ("trace", "report") if getattr(options, name) is not None]
    if beside:
        raise SettingError(f"--{beside[0]} cannot take effect beside --contexts", "leave one of them out")
    return sorted({int(part) for part in lengths})


def bench_contexts(options: argparse.Namespace, lengths: list[int], asked: list, earlier: list) -> int:
    from tqdm import tqdm

    from dspark.drafters import DSparkDrafter, MtpDrafter
    from dspark.head.folder import find_head
    from dspark.head.head import Head
    from dspark.measure.bench import machine
    from dspark.measure.contexts import answered, by_context, check_lengths, context_table
    from dspark.train.card import add_contexts, check_card

    folder = None if options.head == "none" else find_head(options.head, options.target)
    if options.card and folder is not None:
        check_card(folder)
    target = open_target(options)
    check_lengths(target, asked, lengths, options.max_new_tokens)
    head = open_head(options, target)
    if head is None:
        raise HeadError(f"--contexts needs a head, and none is known for {options.target}", "pass --head DIR")
    random.Random(options.seed).shuffle(earlier)
    with tqdm(total=0, mininterval=1.0) as bar:

        def progress(stage: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_description(stage, refresh=False)
            bar.update(done - bar.n)

        turns = answered(target, head, earlier, lengths[-1], progress)
        drafter = DSparkDrafter(head, target) if isinstance(head, Head) else MtpDrafter(head, target)
        rows = by_context(target, drafter, asked, turns, lengths, options.max_new_tokens, options.temperature, progress)
    print(context_table(rows))
    if options.card and folder is not None:
        settings = {name: getattr(options, name) for name in ("temperature", "max_new_tokens", "seed", "dtype")}
        measured = {**settings, "date": str(date.today()), "prompts": len(asked), "machine": machine(target.device), "rows": rows}
        add_contexts(folder, measured)
        say(f"written to {folder / 'README.md'} and provenance.json")
    if options.json:
        arguments = {k: v for k, v in vars(options).items() if k not in ("run", "verb")}
        print(json.dumps({"machine": machine(target.device), "arguments": arguments, "contexts": rows}))
    return 0


def check_report(folder: str, names: list[str]) -> None:
    from dspark.measure.plots import need_matplotlib
    from dspark.measure.report import REPORT_FILES

    need_matplotlib()
    if "plain" not in names:
        raise SettingError(f"--report compares with plain, and --compare is {','.join(names)}", "add plain to --compare")
    check_folder("--report", folder, REPORT_FILES)


def reading(tokens_per_second: float, weight_bytes: int, bandwidth: float) -> str:
    """How near plain decoding comes to what the memory can deliver; its prefill counts against it."""
    rate = weight_bytes * tokens_per_second
    return f"plain reads {weight_bytes / 1e6:.0f} MB of weights a token: {rate / 1e9:.1f} GB/s, {rate / bandwidth:.0%} of the {bandwidth / 1e9:.1f} GB/s this machine reads"


def first_of_each_set(prompts: list, limit: int | None) -> list:
    seen: dict[str, int] = {}
    chosen = []
    for prompt, name in prompts:
        seen[name] = seen.get(name, 0) + 1
        if limit is None or seen[name] <= limit:
            chosen.append((prompt, name))
    return chosen
