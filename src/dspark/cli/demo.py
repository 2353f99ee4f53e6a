"""`dspark demo`: text, tau, and the measured ratio to plain decoding, on the demo target."""

import argparse
from importlib.resources import files

from dspark.cli.generate import write
from dspark.cli.options import open_head, open_target, say, threads_help
from dspark.prompts import read_prompts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(target="smollm2-135m", head=None, device="cpu", runtime="auto", rollback="auto")
    parser.add_argument("--dtype", default="bfloat16", help="precision of the target: float32, bfloat16 or int8 weights (default bfloat16)")
    parser.add_argument("--threads", type=int, default=None, metavar="N", help=threads_help())


def run(options: argparse.Namespace) -> int:
    target = open_target(options)
    head = open_head(options, target)
    from dspark.generation import generate, make_drafter, make_planner
    from dspark.measure.bench import Mode, aggregate, bench, identical_to_plain, machine, table

    prompts = read_prompts(str(files("dspark") / "demo_prompts.jsonl"))
    ids = [target.prompt_ids(p.content) for p in prompts]
    drafter = make_drafter(None, target, head)
    plan = make_planner(None, target, drafter, say)
    say(f"> {prompts[0].content}")
    result = generate(target, head, ids[0], max_new_tokens=128, drafter=drafter, plan=plan, on_text=write)
    print(flush=True)
    say("measuring plain decoding, the head, and the head with prompt lookup on the same prompts, taking turns ...")
    modes = [Mode("plain"), Mode("dspark", head), Mode("auto", head)]
    runs = bench(target, modes, [(i, p.extra["set"]) for i, p in zip(ids, prompts, strict=True)], max_new_tokens=64)
    report = aggregate(runs)
    say(table(report))
    ours, same = report["auto"], identical_to_plain(runs)
    print(
        f"\ntau {ours['tau']:.2f} tokens per round; {ours['ratio_to_plain']['median']:.2f} times the speed of plain decoding "
        f"({ours['tokens_per_second']:.1f} against {report['plain']['tokens_per_second']:.1f} tokens/s; {machine()['threads']} threads, {options.dtype}; "
        f"the head alone: tau {report['dspark']['tau']:.2f}, {report['dspark']['ratio_to_plain']['median']:.2f} times); "
        f"{same['auto']} and {same['dspark']} of {len(ids)} greedy texts identical"
    )
    return 0 if result.num_tokens else 1
