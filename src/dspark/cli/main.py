"""Entry point: find the verb, run it, print a user's mistake once."""

import argparse
import contextlib
import difflib
import errno
import importlib
import io
import os
import sys

from dspark import __version__
from dspark.cli.parser import Parser
from dspark.errors import SettingError, UserError

VERBS = {
    "generate": "continue prompts, speculating losslessly",
    "chat": "talk to the target",
    "serve": "answer many clients over OpenAI's API",
    "train": "train a head for a target from the target's own words",
    "adapt": "warm-start a head for a fine-tuned or quantised target",
    "calibrate": "fit a head's confidences to what is accepted",
    "bench": "measure speed and tau against plain decoding",
    "replay": "try planners and cost curves on recorded rounds",
    "profile": "measure what a round costs on this machine, by rows",
    "verify": "prove that output is unchanged for this target and head, here",
    "convert": "write a head in another project's format, or read one",
    "inspect": "show what a head is and how it was made",
    "demo": "the whole promise on the demo target, in a minute",
}

FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would be larger than is allowed here (ulimit -f)",
}


def build_parser() -> Parser:
    """What stands before a verb, and the list of them; their own options are `verb_parser`'s, so no verb is imported for it."""
    parser = Parser(
        prog="dspark",
        description="Makes a language model you already have answer faster and say exactly what it would have said.",
        epilog="DSpark is a decoding method (speculative decoding); the DGX Spark is a computer.",
    )
    parser.add_argument("--version", action="version", version=f"dspark {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for verb, summary in VERBS.items():
        verbs.add_parser(verb, help=summary)
    return parser


def verb_parser(verb: str) -> Parser:
    summary = VERBS[verb]
    parser = Parser(prog=f"dspark {verb}", description=summary[0].upper() + summary[1:] + ".")
    module = importlib.import_module(f"dspark.cli.{verb}")
    module.add_arguments(parser)
    parser.set_defaults(verb=verb, run=module.run)
    parser.having = lambda name: [other for other in VERBS if other != verb and name in verb_parser(other)._option_string_actions]
    return parser


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a verb: in any order, prompts between them. Raises `SettingError`."""
    if not arguments or arguments[0].startswith("-"):  # shows help or the version
        parser = build_parser()
        parser.refuse_unknown(arguments[:1])
        return parser.parse_args(arguments[:1] or ["--help"])
    if arguments[0] in VERBS:
        return verb_parser(arguments[0]).parse(arguments[1:])
    near = difflib.get_close_matches(arguments[0], VERBS, n=1)
    raise SettingError(f"there is no verb {arguments[0]!r}", f"{f'the nearest is {near[0]}; ' if near else ''}see `dspark --help`")


def open_closed_streams() -> None:
    """What the caller closed points to nowhere: the next files that are opened would get the numbers of those streams, and `print` writes
    to stdout what is for a stderr that is not there."""
    if None not in (sys.stdin, sys.stdout, sys.stderr):
        return
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    sys.stdout, sys.stderr = (open(os.devnull, "w") if stream is None else stream for stream in (sys.stdout, sys.stderr))  # noqa: SIM115  until the end


def let_go_of_output() -> None:
    """What nobody takes any more is not written again when the process ends."""
    with contextlib.suppress(OSError, ValueError):  # a stdout that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: list[str] | None = None) -> int:
    verb = None
    open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that the terminal cannot show must not end the answer
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            options = parse(sys.argv[1:] if arguments is None else arguments)
            verb = options.verb
            return options.run(options) or 0
        finally:
            sys.stdout.flush()  # now, while it can be told that it fails
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        let_go_of_output()
        return 1
    except OSError as error:
        if error.errno not in FULL:
            raise
        where = f" ({error.filename})" if error.filename else ""
        more = "; the run continues with --resume" if verb in ("train", "adapt") else ""
        print(f"error: {FULL[error.errno]}{where}\nhint: free some space{more}", file=sys.stderr)
        let_go_of_output()
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
