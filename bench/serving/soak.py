"""Many clients for a long time: does every greedy answer stay the sequential one, and the memory steady?

    dspark serve smollm2-135m --dtype bfloat16 --port 8101 &
    python bench/serving/soak.py --url http://127.0.0.1:8101/v1 --pid $! --target smollm2-135m --dtype bfloat16 \\
        --prompts FILE.jsonl ... --clients 64 --minutes 15 --json OUT.json

Clients send, each one after the other: greedy requests of mixed lengths (streamed or not), seeded ones at temperature 1, which
must replay, JSON schemas, requests that are dropped midway, and bad ones, which must be refused with a 4xx. The expected
greedy answers are decoded beforehand, plainly and one by one, in this process. Exits 1 on any difference or server error."""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import torch

from dspark.generation import generate
from dspark.prompts import read_prompts
from dspark.target.load import load_target

LENGTHS = (1, 8, 32, 96, 160)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
BAD = [
    {"messages": []},
    {"messages": [{"role": "user", "content": "x"}], "temperature": -1},
    {"messages": [{"role": "user", "content": "x " * 20000}]},
    {"messages": [{"role": "user", "content": "x"}], "max_tokens": 0},
    {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": 5}}}},
    {"messages": "x"},
]  # fmt: skip


class Soak:
    def __init__(self, options: argparse.Namespace, expected: list[tuple[str, dict[int, str]]]):
        self.url, self.pid, self.expected = options.url, options.pid, expected
        self.end = time.monotonic() + 60 * options.minutes
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.replays: dict[tuple[int, int, int], str] = {}
        self.memory: list[tuple[float, float]] = []
        self.tokens = 0

    async def client(self, number: int, http: httpx.AsyncClient) -> None:
        rng = random.Random(number)
        while time.monotonic() < self.end:
            kind = rng.choices(("greedy", "seeded", "schema", "dropped", "bad"), (60, 12, 6, 12, 10))[0]
            try:
                await getattr(self, kind)(rng, http)
                self.counts[kind] += 1
            except httpx.HTTPError as error:
                self.wrong.append(f"{kind}: {type(error).__name__} {error}")

    def body(self, rng: random.Random) -> tuple[int, int, dict]:
        which, length = rng.randrange(len(self.expected)), rng.choice(LENGTHS)
        messages = [{"role": "user", "content": self.expected[which][0]}]
        return which, length, {"model": self.model, "messages": messages, "max_tokens": length, "temperature": 0}

    async def post(self, http: httpx.AsyncClient, body: dict) -> str | None:
        """The text; None when the server was too busy to take it."""
        for _ in range(1000):
            response = await http.post(f"{self.url}/chat/completions", json=body)
            if response.status_code != 429:
                break
            self.counts["told to come back later"] += 1
            await asyncio.sleep(1)
        if response.status_code != 200:
            self.wrong.append(f"{response.status_code}: {response.text[:300]}")
            return None
        self.tokens += response.json()["usage"]["completion_tokens"]
        self.reason = response.json()["choices"][0]["finish_reason"]
        return response.json()["choices"][0]["message"]["content"]

    async def greedy(self, rng: random.Random, http: httpx.AsyncClient) -> None:
        which, length, body = self.body(rng)
        if rng.random() < 0.5:
            text = await self.post(http, body)
        else:
            text = await self.streamed(http, body)
        wanted = self.expected[which][1][length]
        if text is not None and text != wanted:
            self.wrong.append(f"prompt {which}, {length} tokens: {text!r} is not {wanted!r}")

    async def streamed(self, http: httpx.AsyncClient, body: dict, stop_after: int | None = None) -> str | None:
        text: list[str] = []
        async with http.stream("POST", f"{self.url}/chat/completions", json={**body, "stream": True}) as response:
            if response.status_code == 429:
                self.counts["told to come back later"] += 1
                await asyncio.sleep(1)
                return None
            if response.status_code != 200:
                self.wrong.append(f"{response.status_code} to a stream")
                return None
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        self.wrong.append(str(chunk["error"]))
                    text += [choice["delta"].get("content") or "" for choice in chunk.get("choices", ())]
                    if stop_after is not None and len(text) > stop_after:
                        return None
        return "".join(text)

    async def seeded(self, rng: random.Random, http: httpx.AsyncClient) -> None:
        which, length, body = self.body(rng)
        seed = rng.randrange(3)
        text = await self.post(http, body | {"temperature": 1, "seed": seed})
        if text is not None and text != self.replays.setdefault((which, length, seed), text):
            self.wrong.append(f"seed {seed} of prompt {which} gave another answer")

    async def schema(self, rng: random.Random, http: httpx.AsyncClient) -> None:
        _, _, body = self.body(rng)
        form = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": SCHEMA}}
        text = await self.post(http, body | {"max_tokens": 100, "response_format": form, "temperature": rng.choice((0, 1))})
        if text is not None and self.reason == "stop":  # set without a pause in between
            try:
                json.loads(text)
            except ValueError:
                self.wrong.append(f"not JSON: {text!r}")

    async def dropped(self, rng: random.Random, http: httpx.AsyncClient) -> None:
        _, _, body = self.body(rng)
        await self.streamed(http, body | {"max_tokens": 160}, stop_after=rng.randrange(12))

    async def bad(self, rng: random.Random, http: httpx.AsyncClient) -> None:
        response = await http.post(f"{self.url}/chat/completions", json={"model": self.model} | rng.choice(BAD))
        if not 400 <= response.status_code < 500 or "error" not in response.json():
            self.wrong.append(f"a bad request got {response.status_code}: {response.text[:200]}")

    async def watch(self) -> None:
        began = time.monotonic()
        while time.monotonic() < self.end:
            status = Path(f"/proc/{self.pid}/status").read_text()
            resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024
            self.memory.append((round(time.monotonic() - began), resident))
            print(
                f"{self.memory[-1][0]:5.0f} s, {resident:.0f} MB, {sum(self.counts.values())} requests, {len(self.wrong)} wrong",
                file=sys.stderr,
                flush=True,
            )
            await asyncio.sleep(15)

    async def run(self, clients: int) -> None:
        limits, timeout = httpx.Limits(max_connections=None), httpx.Timeout(600)
        async with httpx.AsyncClient(limits=limits, timeout=timeout) as http:
            self.model = (await http.get(f"{self.url}/models")).json()["data"][0]["id"]
            await asyncio.gather(self.watch(), *[self.client(number, http) for number in range(clients)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--pid", type=int, required=True, help="of the server, whose memory is watched")
    parser.add_argument("--target", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", action="append", required=True, type=Path, metavar="FILE.jsonl")
    parser.add_argument("--limit", type=int, default=6, metavar="N", help="prompts of each file (default 6)")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    target = load_target(options.target, options.dtype)
    prompts = [p for file in options.prompts for p in read_prompts(file)[: options.limit]]
    contents = [p.content if isinstance(p.content, str) else p.content[-1]["content"] for p in prompts]
    contents += [" ".join(contents[i : i + 5]) for i in range(0, len(contents), 5)]  # long ones
    expected = []
    for content in contents:
        ids = generate(target, None, target.prompt_ids(content), max(LENGTHS)).token_ids
        expected.append((content, {n: target.tokenizer.decode(ids[:n], skip_special_tokens=True).rstrip("\ufffd") for n in LENGTHS}))
    soak = Soak(options, expected)
    torch.set_num_threads(1)
    del target
    asyncio.run(soak.run(options.clients))
    settled = [mb for second, mb in soak.memory if second > 0.3 * soak.memory[-1][0]]
    document = {
        "clients": options.clients, "minutes": options.minutes, "requests": dict(soak.counts), "tokens": soak.tokens,
        "wrong": soak.wrong[:50], "num_wrong": len(soak.wrong), "memory_mb": soak.memory,
    }  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{sum(soak.counts.values())} requests: {dict(soak.counts)}")
    print(f"wrong: {len(soak.wrong)}", *soak.wrong[:10], sep="\n  ")
    print(f"memory after the first third: {min(settled):.0f} to {max(settled):.0f} MB, last {settled[-1]:.0f}")
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
