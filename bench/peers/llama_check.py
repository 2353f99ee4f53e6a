"""Does llama.cpp draft from an exported head as dspark does? `llama_check.py HEAD.gguf --head HEAD --target TARGET --model TARGET.gguf`

Starts llama-server with the draft file, decodes the prompts that come with dspark greedily, and prints its tokens a round
beside those of dspark with the same block, all of it verified. `--model` is the target as GGUF. setup.sh compiles the server."""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.resources import files
from pathlib import Path

import dspark
from dspark.prompts import read_prompts

HOME = Path(os.environ.get("DSPARK_PEERS", Path.home() / ".cache/dspark/peers"))
NUM_TOKENS, SECONDS = 64, 240


def ask(port: int, path: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=SECONDS) as reply:
        return json.load(reply)


def wait_until_ready(server: subprocess.Popen, port: int) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            if ask(port, "/health")["status"] == "ok":
                return
        except OSError:
            time.sleep(0.3)
    sys.exit("llama-server did not start; its log says why")


def llama_rounds(draft: Path, model: Path, build: Path, prompts: list[list[int]], block: int, threads: int, log: Path) -> tuple[int, int]:
    """Tokens and rounds of llama.cpp."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [build / "bin/llama-server", "-m", model, "-md", draft, "--spec-type", "draft-dspark", "--spec-draft-n-max", block,
               "-c", 2048, "-np", 1, "-t", threads, "-tb", threads, "--host", "127.0.0.1", "--port", port]  # fmt: skip
    with log.open("w") as out, subprocess.Popen([str(part) for part in command], stdout=out, stderr=subprocess.STDOUT) as server:
        try:
            wait_until_ready(server, port)
            tokens = accepted = 0
            for ids in prompts:
                timings = ask(port, "/completion", {"prompt": ids, "n_predict": NUM_TOKENS, "temperature": 0, "cache_prompt": False})[
                    "timings"
                ]
                tokens, accepted = tokens + timings["predicted_n"], accepted + timings.get("draft_n_accepted", 0)
        except OSError as error:
            sys.exit(f"llama-server does not answer ({error}); {log} says why")
        finally:
            server.terminate()
    return tokens, tokens - accepted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("draft", metavar="HEAD.gguf", type=Path)
    parser.add_argument("--head", required=True, help="the head it was made from")
    parser.add_argument("--target", required=True)
    parser.add_argument("--model", required=True, type=Path, metavar="TARGET.gguf")
    parser.add_argument("--build", type=Path, default=HOME / "llama.cpp/build", metavar="FOLDER")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--log", type=Path, default=Path("llama-server.log"), metavar="FILE")
    options = parser.parse_args()
    target = dspark.load_target(options.target, dtype="bfloat16")
    head = dspark.load_head(options.head, target)
    prompts = [target.prompt_ids(p.content) for p in read_prompts(str(files("dspark") / "demo_prompts.jsonl"))]
    results = [dspark.generate(target, head, ids, max_new_tokens=NUM_TOKENS, drafter="dspark", plan="fixed") for ids in prompts]
    ours = sum(len(r.token_ids) for r in results), sum(r.rounds for r in results)
    theirs = llama_rounds(options.draft, options.model, options.build, prompts, head.config.block_size, options.threads, options.log)
    for name, (tokens, rounds) in (("dspark", ours), ("llama.cpp", theirs)):
        print(f"{name}: {tokens} tokens in {rounds} rounds, {tokens / rounds:.2f} a round")
    return 0 if theirs[0] / theirs[1] > 0.9 * ours[0] / ours[1] else 1


if __name__ == "__main__":
    sys.exit(main())
