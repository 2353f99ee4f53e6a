"""A server that says what the page expects of the real one, with made-up tokens and metrics."""

import asyncio
import json
import random
import threading
import time

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from dspark.engine.request import Finished, Round, Step
from dspark.server.metrics import Metrics
from dspark.server.mount import mount

CARD = {"acceptance": [0.56, 0.52, 0.5, 0.48, 0.45]}
MARKUP = "<img src=x onerror=alert(1)><b>not bold</b>"
TEXT = (
    "Speculative decoding lets a small draft head propose several tokens, which the large model then checks in one pass. "
    "Tokens it agrees with are kept; the first it disagrees with is replaced by its own.\n\n"
    "Naïve? Ça va 🙂.\n\ndef greet(name):\n    return f'Hello, {name}!'\n\n" + MARKUP + "\n"
)


def make_step(rng: random.Random, running: int = 2, waiting: int = 0, acceptance: float = 0.6) -> Step:
    rounds = []
    for _ in range(running):
        drafted = rng.choice((0, 5, 5, 5))
        verified = rng.randint(1, drafted) if drafted else 0
        confidences = [min(1.0, max(0.0, rng.gauss(acceptance, 0.15))) for _ in range(drafted)]
        accepted = 0
        while accepted < verified and rng.random() < confidences[accepted]:
            accepted += 1
        rounds.append(Round("dspark" if drafted else "", drafted, verified, accepted, confidences if drafted else None))
    rows = sum(1 + r.verified for r in rounds)
    tokens = sum(1 + r.accepted for r in rounds)
    return Step(rows, 0, 30.0 + rows, 24.0 * tokens / max(1, running), rounds, running, waiting, rng.random() < 0.2, 900, 4096)


def two_minutes(metrics: Metrics, clock: list[float], acceptance: float = 0.6) -> None:
    """A past with a pause in it."""
    rng = random.Random(0)
    start = clock[0]
    for second in range(118):
        for n in range(0 if 50 < second < 70 else 6):
            clock[0] = start + second + n / 7
            metrics.on_step(make_step(rng, 1 + second // 30, max(0, second // 20 - 3), acceptance))
    metrics.on_finished(Finished("stop", 40, 16, 120, 55, 200, 150, 65, 0.21, 2.8, 1.1))
    metrics.on_canary("match")
    clock[0] = start + 119


class Server:
    """Listens on the loopback interface until `close`. `asked` holds the bodies of chat requests."""

    def __init__(self, key: str | None = None, acceptance: float = 0.6, pause: float = 0.01, text: str = TEXT):
        self.key, self.pause, self.text = key, pause, text
        self.asked: list[dict] = []
        self.answer_with: tuple[int, dict] | None = None  # status and body instead of an answer
        self.cut_after: int | None = None  # rounds after which the stream ends without a word
        self.stop = ""  # the text ends before it, in the middle of a token or not; tokens are shown whole
        self.with_sources = True
        self.disconnected = 0
        clock = [0.0]
        self.metrics = Metrics(CARD, clock=lambda: clock[0])
        two_minutes(self.metrics, clock, acceptance)
        began = time.monotonic()
        self.metrics.clock = lambda: 119 + time.monotonic() - began
        self.server = uvicorn.Server(uvicorn.Config(self.app(), host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=1))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        deadline = time.monotonic() + 10
        while not self.server.started:
            assert time.monotonic() < deadline and self.thread.is_alive()
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}/"

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)

    def app(self) -> FastAPI:
        app = FastAPI()
        mount(app, self.metrics)

        @app.middleware("http")
        async def ask_for_key(request: Request, call_next):
            if self.key and request.url.path != "/" and request.headers.get("Authorization") != f"Bearer {self.key}":
                return JSONResponse({"error": {"message": "no"}}, 401)
            return await call_next(request)

        @app.get("/v1/models")
        def models() -> dict:
            return {"object": "list", "data": [{"id": "smollm2-135m", "object": "model"}]}

        @app.post("/v1/chat/completions")
        async def chat(request: Request):
            body = await request.json()
            self.asked.append(body)
            if self.answer_with:
                return JSONResponse(self.answer_with[1], self.answer_with[0])
            return StreamingResponse(self.chunks(body), media_type="text/event-stream")

        return app

    async def chunks(self, body: dict):
        rng, words, rounds = random.Random(1), [w for w in self.text.replace(" ", " \0").split("\0") if w], 0
        speculates = body["speculation"] == "auto"
        left = self.text.index(self.stop) if self.stop else len(self.text)
        tokens, start, drafted, accepted_all = 0, time.monotonic(), 0, 0

        def line(**more) -> str:
            return f"data: {json.dumps({'id': 'c', 'object': 'chat.completion.chunk', 'model': 'smollm2-135m', **more}, ensure_ascii=False)}\r\n\r\n"

        try:
            while words and tokens < body["max_tokens"]:
                if self.cut_after == rounds:
                    return
                accepted = rng.choice((0, 1, 1, 2, 3, 5)) if speculates else 0
                piece, words = words[: accepted + 1], words[accepted + 1 :]
                last = "plain" if not speculates else "bonus" if accepted == 5 else "corrected"
                sources = ["accepted"] * (len(piece) - 1) + [last]
                rounds, tokens, drafted, accepted_all = rounds + 1, tokens + len(piece), drafted + 5 * speculates, accepted_all + accepted
                said = "".join(piece)[:left]
                left -= len(said)
                told = {"dspark": {"tokens": [{"text": t, "source": s} for t, s in zip(piece, sources, strict=True)]}}
                yield line(choices=[{"index": 0, "delta": {"content": said}, "finish_reason": None}], **(told if self.with_sources else {}))
                if not left:
                    words = []
                await asyncio.sleep(self.pause)
            yield line(choices=[{"index": 0, "delta": {}, "finish_reason": "length" if words else "stop"}])
            seconds = time.monotonic() - start
            spent = {"rounds": rounds, "drafted": drafted, "verified": drafted, "accepted": accepted_all}
            spent |= {"seconds": seconds, "saved_seconds": 0.4 * seconds if speculates else 0.0}
            yield line(choices=[], usage={"prompt_tokens": 9, "completion_tokens": tokens, "total_tokens": 9 + tokens, "dspark": spent})
            yield "data: [DONE]\r\n\r\n"
        except asyncio.CancelledError:
            self.disconnected += 1
            raise
