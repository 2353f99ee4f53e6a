"""`dspark serve [TARGET]`"""

import argparse
import os
from pathlib import Path

from dspark.cli.options import add_head, add_modules, add_target, flag, open_head, open_target, say, starting
from dspark.errors import SettingError

KEY = "DSPARK_API_KEY"
DRAFTERS = ("auto", "dspark", "mtp", "lookup")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser, dtype="bfloat16", default="smollm2-135m")
    add_head(parser)
    add_modules(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is every network (default 127.0.0.1: this machine)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes any free one (default 8000)")
    parser.add_argument("--name", default=None, metavar="NAME", help="what clients call the model (default: the target's name)")
    parser.add_argument("--api-key", default=None, metavar="KEY", help=f"clients must send it (default: ${KEY}; else none is needed)")
    parser.add_argument("--speculation", choices=("auto", "off"), default="auto", help="for requests that do not say (default auto)")
    parser.add_argument(
        "--drafter",
        choices=DRAFTERS,
        default="auto",
        help="who drafts, besides prompt lookup: dspark (the head), mtp (a head of that kind, or the target's own multi-token-prediction "
        "modules), lookup (nobody) (default auto: head and modules, where there are some, by round)",
    )
    parser.add_argument(
        "--plan",
        choices=("auto", "online", "fixed"),
        default="auto",
        help="how much to speculate (default auto: what gains most time; online: and confidences are corrected on the way)",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-running", type=int, default=32, metavar="N", help="answers decoded together (default 32)")
    limits.add_argument(
        "--max-waiting", type=int, default=256, metavar="N", help="requests in the queue; more are refused, 429 (default 256)"
    )
    limits.add_argument(
        "--cache-gb", type=float, default=None, metavar="GB", help="memory for cached tokens (default: half of what is free)"
    )
    limits.add_argument(
        "--max-request-kb", type=int, default=4096, metavar="KB", help="size of a request; more is refused, 413 (default 4096)"
    )
    limits.add_argument("--request-seconds", type=float, default=600.0, metavar="S", help="time for an answer; then 504 (default 600)")
    limits.add_argument(
        "--drain-seconds", type=float, default=30.0, metavar="S", help="for answers that run at SIGTERM or Ctrl-C (default 30)"
    )
    checks = parser.add_argument_group("checks")
    checks.add_argument(
        "--canary", type=float, default=0.0, metavar="SHARE", help="share of greedy answers to decode again without drafts (default 0)"
    )
    checks.add_argument(
        "--canary-dir", type=Path, default=None, metavar="DIR", help="where to log answers that differ, with their texts as ids"
    )


def run(options: argparse.Namespace) -> int:
    check(options)
    try:
        with starting():
            from dspark.server.run import listen, serve
    except ImportError as error:
        raise SettingError(
            f"the server needs {error.name}, which is not installed", "pip install 'dspark[serve]', in a checkout '.[serve]'"
        ) from error
    listener = listen(options.host, options.port)  # before the target is loaded: a port in use is said at once
    target = open_target(options)
    mtp = open_modules(options, target)
    beside = "multi-token-prediction modules and prompt lookup" if mtp else "prompt lookup alone"
    head = None if options.drafter == "lookup" else open_head(options, target, f"drafting with {beside}")
    if head is not None and options.drafter in ("dspark", "mtp") and options.drafter != head.kind.replace("dflash", "dspark"):
        raise SettingError(f"--drafter is {options.drafter}, and the head is of the kind {head.kind}", "leave --drafter or --head out")
    if head is not None and head.self_test is not None:
        say(f"{head.self_test}")
    with starting():
        from dspark.engine.engine import Engine
        from dspark.server.api import Options, make_app
        from dspark.server.canary import Canary
        from dspark.server.metrics import Metrics, card_of

    metrics = Metrics(card_of(head.calibration) if head is not None else None)
    engine = Engine(
        target, head, max_running=options.max_running, max_waiting=options.max_waiting,
        cache_bytes=None if options.cache_gb is None else int(options.cache_gb * 1e9), plan=options.plan, say=say, on_step=metrics.on_step,
        mtp=mtp,
    ).start()  # fmt: skip
    for note in engine.notes():
        say(note)
    canary = Canary(engine, options.canary, metrics.on_canary, options.canary_dir)
    settings = Options(
        model=options.name or model_name(options.target), api_key=options.api_key or os.environ.get(KEY),
        max_request_bytes=options.max_request_kb * 1024, request_seconds=options.request_seconds, speculation=options.speculation,
    )  # fmt: skip
    app = make_app(engine, settings, metrics, canary)
    if settings.api_key is None and options.host not in ("127.0.0.1", "localhost", "::1"):
        say("everyone who reaches this address can use the server: `--api-key` asks for a key")
    serve(app, listener, options.drain_seconds, lambda url: greet(url, settings.model, settings.api_key is not None), say)
    canary.close()
    return 0


def open_modules(options: argparse.Namespace, target):
    """The target's own multi-token-prediction modules, where they shall draft. Raises `HeadError` where they are asked for and missing."""
    from dspark.head.mtp import load_mtp, own_mtp

    if options.drafter == "mtp" and options.head in (None, "none"):
        return load_mtp(target)
    return own_mtp(target, say) if options.drafter == "auto" else None


def check(options: argparse.Namespace) -> None:
    """Raises `SettingError` for numbers without meaning, and for a key that is none."""
    if options.api_key is None and os.environ.get(KEY) == "":
        raise SettingError(f"${KEY} is set and empty", f"give it a key, or `unset {KEY}` for a server that needs none")
    for name, least in (("max_running", 1), ("max_waiting", 0), ("max_request_kb", 1)):
        if getattr(options, name) < least:
            raise SettingError(f"{flag(name)} is {getattr(options, name)}", f"give at least {least}")
    for name in ("cache_gb", "request_seconds", "drain_seconds"):
        value = getattr(options, name)
        if value is not None and not (0 < value < float("inf") or (name == "drain_seconds" and value == 0)):
            raise SettingError(f"{flag(name)} is {value:g}", "give a number above 0")


def model_name(target: str) -> str:
    """Of a folder, its own name; of a hub id, the id."""
    path = Path(target).expanduser()
    return path.resolve().name if path.is_dir() else target


def greet(url: str, model: str, key: bool) -> None:
    header = f' -H "Authorization: Bearer ${KEY}"' if key else ""
    export = f" (set ${KEY} to the key before you try this)" if key and not os.environ.get(KEY) else ""
    say(f"{model} answers at {url}, to OpenAI's clients at {url}/v1; a page to try it is at {url}/{export}\n")
    print(
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{header} \\\n"
        f'  -d \'{{"messages": [{{"role": "user", "content": "Explain why the sky is blue."}}], "max_tokens": 64}}\'',
        flush=True,
    )
