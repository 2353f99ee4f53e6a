"""`dspark chat TARGET`: turns on stdin, answers on stdout, the whole conversation as context."""

import argparse
import sys

from dspark.cli.generate import write
from dspark.cli.options import (
    add_drafter,
    add_head,
    add_modules,
    add_plan,
    add_sampling,
    add_target,
    check_sampling,
    check_text,
    open_head,
    open_target,
    sampling_options,
    say,
    say_calibration,
)
from dspark.errors import PromptError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    add_head(parser)
    add_drafter(parser)
    add_modules(parser)
    parser.add_argument("--system", default=None, metavar="TEXT", help="a system message to start with")
    add_plan(parser)
    add_sampling(parser)


def run(options: argparse.Namespace) -> int:
    if sys.stdin is None:
        raise PromptError("the input is closed", "chat reads its turns from stdin")
    check_sampling(options)
    check_text("--system", options.system or "")
    target = open_target(options)
    head = open_head(options, target)
    say_calibration(head, options.temperature)
    from dspark.generation import generate, make_drafter, make_planner

    if target.tokenizer is None or target.tokenizer.chat_template is None:
        raise PromptError(f"{target.name} has no chat template", "use `dspark generate --raw`")

    def fresh() -> tuple:
        drafter = make_drafter(options.drafter, target, head)
        plan = make_planner(options.plan, target, drafter, say)
        # above T = 0 each turn begins alike, so that its seed replays
        return (options.drafter, options.plan) if options.temperature > 0 else (drafter, plan)

    drafter, plan = fresh()
    start = [{"role": "system", "content": options.system}] if options.system else []
    messages = list(start)
    say("type a message; an empty line or Ctrl-D ends, /new starts over, Ctrl-C stops an answer")
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        try:
            text = sys.stdin.readline().strip()
        except UnicodeDecodeError as error:
            raise PromptError(f"the input is not {sys.stdin.encoding} text", "set the terminal, or the input, to UTF-8") from error
        except OSError as error:
            raise PromptError(f"cannot read the input: {error}", "chat reads its turns from stdin") from error
        if not text:
            return 0
        if text == "/new":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": text})
        said: list[str] = []

        def show(piece: str, said: list[str] = said) -> None:
            said.append(piece)
            write(piece)

        try:
            check_text("the message", text)
            ids = target.prompt_ids(messages)
            result = generate(target, head, ids, drafter=drafter, plan=plan, on_text=show, **sampling_options(options))
        except PromptError as error:  # no text, or the conversation has outgrown the context; it is not lost
            say(f"error: {error}\nhint: /new starts a new conversation")
            messages.pop()
            continue
        except KeyboardInterrupt:
            print(flush=True)
            say("[stopped]")
            messages.append({"role": "assistant", "content": "".join(said)})
            drafter, plan = fresh()  # the round that was stopped may have left these half told
            continue
        print(flush=True)
        say(f"[{result.num_tokens} tokens, tau {result.tau:.2f}, {result.tokens_per_second:.1f} tokens/s, {result.finish_reason}]")
        messages.append({"role": "assistant", "content": result.text})
