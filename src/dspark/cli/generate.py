"""`dspark generate TARGET [PROMPT ...]`"""

import argparse
import json
import sys

from dspark.cli.options import (
    add_drafter,
    add_head,
    add_modules,
    add_plan,
    add_sampling,
    add_target,
    check_sampling,
    open_head,
    open_prompts,
    open_target,
    sampling_options,
    say,
    say_calibration,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="text of one user turn")
    parser.add_argument("--prompts", metavar="FILE.jsonl", help='one object a line: {"prompt": ...} or {"messages": [...]}')
    add_head(parser)
    add_drafter(parser)
    add_modules(parser)
    parser.add_argument("--raw", action="store_true", help="continue the text itself, without the chat template")
    parser.add_argument("--json", action="store_true", help="one JSON object per prompt")
    add_plan(parser)
    add_sampling(parser)


def run(options: argparse.Namespace) -> int:
    check_sampling(options)
    prompts = open_prompts(options.prompt, options.prompts)
    target = open_target(options)
    if not options.raw and target.tokenizer is not None and target.tokenizer.chat_template is None:
        say(f"{target.name} has no chat template: the prompt goes in as it stands, as with --raw")
    head = open_head(options, target, *["drafting with what else there is"] * (options.drafter == "auto"))
    say_calibration(head, options.temperature)
    from dspark.generation import generate, make_drafter, make_planner

    drafter = make_drafter(options.drafter, target, head)
    plan = make_planner(options.plan, target, drafter, say)
    if options.temperature > 0:  # greedy planners learn from all prompts; here each begins alike, so that its seed replays
        drafter, plan = options.drafter, options.plan
    for index, prompt in enumerate(prompts):
        ids = target.prompt_ids(prompt.content, raw=options.raw)
        show = None if options.json else write
        result = generate(target, head, ids, drafter=drafter, plan=plan, on_text=show, **sampling_options(options))
        if options.json:
            figures = {
                "index": index, "text": result.text, "token_ids": result.token_ids, "num_tokens": result.num_tokens,
                "rounds": result.rounds, "tau": round(result.tau, 4), "seconds": round(result.seconds, 4),
                "tokens_per_second": round(result.tokens_per_second, 2), "finish_reason": result.finish_reason,
            }  # fmt: skip
            print(json.dumps({**prompt.extra, **figures}, ensure_ascii=not writes_utf8()), flush=True)
        else:
            print(flush=True)
            say(
                f"[{result.num_tokens} tokens in {result.seconds:.2f} s, tau {result.tau:.2f}, {result.tokens_per_second:.1f} tokens/s, {result.finish_reason}]"
            )
    return 0


def writes_utf8() -> bool:
    """Whether stdout takes every character; where it does not, JSON has escapes for them."""
    return getattr(sys.stdout, "encoding", None) in (None, "utf-8", "UTF-8")


def write(text: str) -> None:
    print(text, end="", flush=True, file=sys.stdout)
