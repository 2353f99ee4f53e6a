"""`dspark convert SRC DST --to FORMAT`"""

import argparse
import difflib
import shlex
import sys
from pathlib import Path

from dspark.cli.options import say, set_threads
from dspark.errors import SettingError

FORMATS = {
    "speculators": "vLLM",
    "specforge": "SGLang",
    "gguf": "llama.cpp",
    "deepspec": "",
    "dspark": "",
}  # and the engine that each is for
READ = {**FORMATS, "eagle3": ""}  # the last one is not written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="head: a folder, a GGUF file, a hub id, or the name of a shipped head")
    parser.add_argument("out", metavar="DST", nargs="?", type=Path, help="folder, or GGUF file, to write")
    parser.add_argument("--out", dest="out_option", metavar="DST", type=Path, help="the same")
    parser.add_argument("--to", default="dspark", metavar="FORMAT", help=f"format to write: {listed(FORMATS)} (default dspark)")
    parser.add_argument(
        "--from", dest="kind", default=None, metavar="FORMAT", help=f"format of SRC: {', '.join(READ)} (default: what its files say)"
    )
    parser.add_argument(
        "--taps", type=layers, default=None, metavar="I,J,..",
        help="target layers that the converted head reads in the place of its own, one for each, like 1,8,15,22,28 where the last one is not to be had; costs acceptance",
    )  # fmt: skip
    parser.add_argument("--target", default=None, metavar="TARGET", help="target of the head (default: the one that it names)")
    parser.add_argument("--dtype", default="bfloat16", help="precision of the target (default bfloat16)")
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="CPU threads (default: all cores)")


def layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layers: give numbers with commas, like 1,8,15,22,28") from None


def listed(formats: dict[str, str]) -> str:
    return ", ".join(f"{name} ({engine})" if engine else name for name, engine in formats.items())


def check_format(option: str, given: str, formats: dict[str, str]) -> None:
    """Raises `SettingError` for what is no format, naming the one that may be meant: many think of the engine."""
    if given in formats:
        return
    meant = {name: name for name in formats} | {engine.lower(): name for name, engine in formats.items() if engine}
    told = ""
    for near in difflib.get_close_matches(given.lower(), meant, n=1):
        name = meant[near]
        told = f"use {option} {name}, for {formats[name]}; " if formats[name] else f"use {option} {name}; "
    if given in READ:
        raise SettingError(f"{option} is {given!r}, a format that is only read", f"formats to write: {listed(formats)}")
    raise SettingError(f"{option} is {given!r}, which is no format", f"{told}all formats: {listed(formats)}")


def run(options: argparse.Namespace) -> int:
    check_format("--to", options.to, FORMATS)
    if options.kind is not None:
        check_format("--from", options.kind, READ)
    path = options.out or options.out_option
    if path is None or (options.out and options.out_option):
        raise SettingError("one place to write is needed", "dspark convert SRC DST --to FORMAT")
    set_threads(options)
    from dspark.formats.convert import convert, detect, layers_read, named_target, refuse_existing, refuse_only_read, refuse_taps
    from dspark.head.folder import named_head
    from dspark.target.load import load_target

    source = Path(options.source).expanduser()
    if not source.is_file():
        source = named_head(options.source)
    kind = options.kind or detect(source)
    if kind == options.to and options.taps is None:
        raise SettingError(f"{source} is in the format {kind} already", "choose another with --to")
    refuse_existing(path)
    refuse_only_read(kind, options.to, options.taps)
    own, num_layers = layers_read(source, kind)
    if options.taps is not None:
        refuse_taps(options.taps, own, num_layers)
    name = options.target or named_target(source, kind)
    if name is None:
        raise SettingError(f"{source} does not name its target", "give it: `--target TARGET`")
    target = load_target(name, dtype=options.dtype)
    command = shlex.join(["dspark", *sys.argv[1:]])
    test = convert(source, kind, options.to, path, target, command, say, options.taps)
    if test is not None:
        say(str(test))
        if test.accepted == 0:
            say("warning: the head drafts nothing that the target says: is it for this target, and in the convention of its format?")
    print(path)
    return 0
