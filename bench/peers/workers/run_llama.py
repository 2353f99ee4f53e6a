"""llama.cpp: `llama-server` on loopback, plainly or with one of its `--spec-type`s at their default settings; draft-dspark-N drafts N tokens."""

import argparse
import atexit
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from serve import Answer, serve

START_S = 120
EXPORTED = "draft-dspark"  # drafts with an exported head; -N behind it: N tokens
LOOPBACK = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy that the environment names


def load(options: argparse.Namespace) -> tuple[Answer, dict]:
    binary = Path(options.home, "llama.cpp/build/bin/llama-server")
    threads, port = str(options.threads), free_port()
    more = [] if options.method == "none" else ["--spec-type", options.method]
    if options.method.startswith(EXPORTED):
        num = options.method.removeprefix(EXPORTED).removeprefix("-")
        more = ["--spec-type", EXPORTED, "-md", options.draft, "--spec-draft-n-max", num or options.block]
    settings = ["-t", threads, "-tb", threads, "--threads-http", "1", "-np", "1", "-c", str(options.context), "--cache-ram", "0", *more]
    server = subprocess.Popen([binary, "-m", options.model, "--host", "127.0.0.1", "--port", str(port), "--no-ui", *settings], stdout=2)
    atexit.register(end, server)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server ends too
    await_health(server, port)

    def answer(ids: list[int], n: int) -> dict:
        request = {"prompt": ids, "n_predict": n, "temperature": 0, "cache_prompt": False, "return_tokens": True}
        reply = fetch(port, "/completion", request)
        assert reply["tokens_evaluated"] == len(ids), "the server must not add tokens to the prompt"
        tokens, timings = reply["tokens"], reply["timings"]
        if reply["stop_type"] == "eos" and tokens[-1:] != [options.eos]:
            tokens.append(options.eos)
        # The first token comes from the pass over the prompt, and the server counts its time there.
        times = {"first": 1, "prompt_s": timings["prompt_ms"] / 1e3, "decode_s": timings["predicted_ms"] / 1e3}
        return {"tokens": tokens, **times, "drafted": timings.get("draft_n"), "accepted": timings.get("draft_n_accepted")}

    return answer, {"version": fetch(port, "/props")["build_info"], "arguments": settings}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fetch(port: int, path: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with LOOPBACK.open(request) as reply:  # the driver bounds the time
        return json.load(reply)


def await_health(server: subprocess.Popen, port: int) -> None:
    deadline = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            fetch(port, "/health")
            return
        except urllib.error.URLError:  # not listening yet, or 503 while it loads
            time.sleep(0.05)
    raise SystemExit(f"llama-server did not start (exit status {server.poll()})")


def end(server: subprocess.Popen) -> None:
    server.terminate()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()


serve(load)
