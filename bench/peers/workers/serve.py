"""The peers' side of compare.py: a worker answers one line of JSON with one line of JSON.

    {"ids": [prompt tokens], "n": 128}  ->  {"tokens": [...], "first": 1, "prompt_s": 0.02, "decode_s": 1.1, "drafted": 60, "accepted": 31}

`first` tokens came with the first round, `prompt_s` seconds after the request; the others took `decode_s`. The token that
ends the text is among `tokens`. `drafted` and `accepted` are null where the peer does not tell. Standard library only:
every peer's own Python runs it."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable

Answer = Callable[[list[int], int], dict]


def serve(load: Callable[[argparse.Namespace], tuple[Answer, dict]]) -> None:
    """Call `load(options)` for the function that answers and what it says of itself; then answer until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="folder of the target, or GGUF file")
    parser.add_argument("--precision", required=True)
    parser.add_argument("--method", required=True, help="of speculation; `none` decodes plainly")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True, help="tokens of the longest request, answer included")
    parser.add_argument("--eos", type=int, required=True)
    parser.add_argument("--home", required=True, help="folder of the installed peers")
    parser.add_argument("--head", default="", help="folder of a dspark head; the shipped one by default")
    parser.add_argument("--draft", default="", help="the same as a GGUF file")
    parser.add_argument("--block", default="", help="tokens that it drafts")
    # Libraries print on stdout too; the driver reads nothing but replies.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answer, about = load(parser.parse_args())
    print(json.dumps(about), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(answer(request["ids"], request["n"])), file=replies, flush=True)


def timed(rounds: Iterable[list[int]]) -> dict:
    """A reply from an iterator that yields the new tokens of each round when they are known."""
    begin = time.perf_counter()
    first, tokens = 0, []
    for new in rounds:
        if not tokens:
            first, prompt_end = len(new), time.perf_counter()
        tokens += new
    return {"tokens": tokens, "first": first, "prompt_s": prompt_end - begin, "decode_s": time.perf_counter() - prompt_end}
