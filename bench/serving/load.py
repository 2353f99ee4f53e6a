"""Tokens a second of OpenAI-compatible servers by number of clients, taking turns in one run.

    python bench/serving/load.py --prompts FILE.jsonl ... --clients 1,2,4,8,16,32 --json OUT.json \\
        --server on='dspark serve --port 8101' --server off='dspark serve --port 8102 --speculation off' [--server NAME=COMMAND ...]

Every server is started by its command, which names its port, and stopped (SIGSTOP) while another one is measured. For
each number of clients the servers take turns, `--rounds` times; a client sends one greedy chat request after another. Ratios
are to the last server named. A server whose texts differ from the last one's is told apart in the report."""

import argparse
import asyncio
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from dspark.prompts import read_prompts

READY_SECONDS = 900
REQUEST_SECONDS = 600


@dataclass
class Answer:
    text: str
    num_tokens: int
    first: float  # seconds until the first piece
    seconds: float


@dataclass
class Server:
    name: str
    command: list[str]
    process: subprocess.Popen | None = None
    model: str = ""
    # clients -> tokens a second, one a turn; and all answers of the last turn
    speeds: dict[int, list[float]] = field(default_factory=dict)
    answers: dict[int, list[Answer]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        port = next(m[1] for m in (re.match(r"(?:--port=)?(\d{4,5})$", word) for word in self.command) if m)
        return f"http://127.0.0.1:{port}/v1"

    def start(self, log: Path) -> None:
        self.process = subprocess.Popen(self.command, stdout=log.open("wb"), stderr=subprocess.STDOUT, start_new_session=True)
        for _ in range(READY_SECONDS):
            if self.process.poll() is not None:
                raise SystemExit(f"{self.name} ended: see {log}")
            try:
                models = httpx.get(f"{self.url}/models", timeout=5).raise_for_status().json()
                self.model = models["data"][0]["id"]
                return
            except (httpx.HTTPError, KeyError, ValueError):
                time.sleep(1)
        raise SystemExit(f"{self.name} did not answer: see {log}")

    def send(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, number)


async def ask(client: httpx.AsyncClient, server: Server, content: str, num_tokens: int) -> Answer:
    body = {
        "model": server.model, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": num_tokens,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    began, first, text, count = time.perf_counter(), None, [], 0
    async with client.stream("POST", f"{server.url}/chat/completions", json=body, timeout=REQUEST_SECONDS) as response:
        if response.status_code != 200:
            raise SystemExit(f"{server.name}: {response.status_code} {(await response.aread())[:500]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            count = (chunk.get("usage") or {}).get("completion_tokens", count)
            for choice in chunk.get("choices", ()):
                piece = choice["delta"].get("content")
                if piece:
                    first = first or time.perf_counter() - began
                    text.append(piece)
    seconds = time.perf_counter() - began
    return Answer("".join(text), count, first or seconds, seconds)


async def turn(server: Server, prompts: list[str], clients: int, num_tokens: int) -> tuple[float, list[Answer]]:
    answers: dict[int, Answer] = {}
    todo = list(enumerate(prompts))

    async def one(client: httpx.AsyncClient) -> None:
        while todo:
            i, content = todo.pop(0)
            try:
                answers[i] = await ask(client, server, content, num_tokens)
            except httpx.RemoteProtocolError:  # uvicorn closes a connection that came while it was stopped: once more
                answers[i] = await ask(client, server, content, num_tokens)

    began = time.perf_counter()
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None)) as client:
        await asyncio.gather(*[one(client) for _ in range(clients)])
    seconds = time.perf_counter() - began
    return sum(a.num_tokens for a in answers.values()) / seconds, [answers[i] for i in range(len(prompts))]


def report(servers: list[Server], clients: list[int]) -> dict:
    base = servers[-1]
    rows = []
    for count in clients:
        for server in servers:
            speeds, answers = server.speeds[count], server.answers[count]
            ratios = [a / b for a, b in zip(speeds, base.speeds[count], strict=True)]
            same = sum(a.text == b.text for a, b in zip(answers, base.answers[count], strict=True))
            rows.append({
                "clients": count, "server": server.name, "tokens_per_second": statistics.median(speeds), "speeds": speeds,
                "ratio": statistics.median(ratios), "ratios": ratios, "first_token_seconds": statistics.median(a.first for a in answers),
                "requests": len(answers), "same_texts": same,
            })  # fmt: skip
    print(
        f"| clients | server | tokens/s | ratio to {base.name} (least to most) | first token, s | texts as {base.name}'s |\n|---|---|---|---|---|---|"
    )
    for row in rows:
        print(
            f"| {row['clients']} | {row['server']} | {row['tokens_per_second']:.0f} | {row['ratio']:.2f} ({min(row['ratios']):.2f} to "
            f"{max(row['ratios']):.2f}) | {row['first_token_seconds']:.2f} | {row['same_texts']} of {row['requests']} |"
        )
    return {"rows": rows, "commands": {server.name: shlex.join(server.command) for server in servers}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", action="append", required=True, metavar="NAME=COMMAND")
    parser.add_argument("--prompts", action="append", required=True, type=Path, metavar="FILE.jsonl", help="may be given again")
    parser.add_argument("--limit", type=int, default=8, metavar="N", help="prompts of each file (default 8)")
    parser.add_argument("--clients", default="1,2,4,8,16,32")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each server (default 3)")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--least-requests", type=int, default=8, help="of a turn (default 8)")
    parser.add_argument("--requests-per-client", type=int, default=4, help="of a turn (default 4)")
    parser.add_argument("--logs", type=Path, default=Path("."), help="folder for the servers' output")
    parser.add_argument("--json", type=Path, metavar="OUT.json")
    options = parser.parse_args()
    prompts = [p for file in options.prompts for p in read_prompts(file)[: options.limit]]
    texts = [p.content if isinstance(p.content, str) else p.content[-1]["content"] for p in prompts]
    texts = [text for i in range(options.limit) for text in texts[i :: options.limit]]  # sets take turns
    clients = [int(count) for count in options.clients.split(",")]
    servers = [Server(name, shlex.split(command)) for name, _, command in (each.partition("=") for each in options.server)]
    options.logs.mkdir(parents=True, exist_ok=True)
    try:
        for server in servers:
            server.start(options.logs / f"{server.name}.log")
            asyncio.run(turn(server, texts[:2], 2, 16))
            server.send(signal.SIGSTOP)
        for count in clients:
            size = max(options.least_requests, options.requests_per_client * count)
            for number in range(options.rounds):
                chosen = [texts[(number * size + i) % len(texts)] for i in range(size)]
                for server in servers:
                    server.send(signal.SIGCONT)
                    speed, server.answers[count] = asyncio.run(turn(server, chosen, count, options.max_tokens))
                    server.speeds.setdefault(count, []).append(speed)
                    server.send(signal.SIGSTOP)
                    print(f"{count} clients, turn {number + 1}: {server.name} {speed:.0f} tokens/s", file=sys.stderr, flush=True)
        document = report(servers, clients)
        if options.json:
            options.json.write_text(json.dumps(document, indent=1) + "\n")
    finally:
        for server in servers:
            server.send(signal.SIGCONT)
            server.send(signal.SIGTERM)
            if server.process is not None:
                try:
                    server.process.wait(30)
                except subprocess.TimeoutExpired:
                    server.send(signal.SIGKILL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
