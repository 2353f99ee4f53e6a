"""What the endpoints share: the engine, the operator's options, and the way of a request from its body to its answers."""

import asyncio
import contextlib
import hashlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from dspark import __version__
from dspark.server.answers import Answer, Vocabulary
from dspark.server.asks import Ask
from dspark.server.exchange import Exchange
from dspark.server.refusal import Refusal, busy, refusal
from dspark.server.schemas import ChatRequest, CompletionRequest


@dataclass(frozen=True)
class Options:
    """What an operator sets."""

    model: str  # the name clients see
    api_key: str | None = None  # None: none is asked for
    max_request_bytes: int = 4096 * 1024  # the text of a context of 131,072 tokens takes half a megabyte in most languages
    request_seconds: float = 600.0  # what OpenAI's clients wait by default
    speculation: str = "auto"  # of requests that do not say


class Service:
    """An engine and how it is offered. `metrics` and `canary` may be None."""

    def __init__(self, engine: Any, options: Options, metrics: Any, canary: Any):
        self.engine, self.options, self.metrics, self.canary = engine, options, metrics, canary
        self.closing = threading.Event()
        self.created = int(time.time())
        self.fingerprint = "dspark_" + hashlib.sha256(json.dumps([__version__, *engine.target.fingerprint()]).encode()).hexdigest()[:10]
        self.vocabulary = Vocabulary(engine.target.tokenizer)
        self.preparing = threading.Lock()  # tokenizers are not made for several threads
        self.usual_seconds = 1.0  # of recent answers

    def close(self, drain_seconds: float) -> None:
        """Blocks until the engine has closed."""
        self.closing.set()
        self.engine.close(drain_seconds)

    def retry_seconds(self) -> float:
        """When a place may be free, roughly."""
        return min(60.0, self.usual_seconds * (1 + len(self.engine.waiting)) / max(1, len(self.engine.running)))

    @property
    def model(self) -> dict:
        return {"id": self.options.model, "object": "model", "created": self.created, "owned_by": "dspark"}

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.options.model:
            raise Refusal(404, f"there is no model {name!r} here; this server has {self.options.model!r}", "model", "model_not_found")

    async def begin(self, prepare: Callable[..., list[Ask]], body: ChatRequest | CompletionRequest, header: str | None) -> Exchange:
        """The exchange for a request, submitted."""
        self.check_model(body.model)
        speculate = (body.speculation or header or self.options.speculation) == "auto"
        target = self.engine.target

        def answers() -> list[Answer]:
            with self.preparing:
                asks: list[Ask] = prepare(target, body, speculate)
            return [Answer(ask, target.tokenizer, target.eos_ids) for ask in asks]

        with self.told():
            exchange = Exchange(self.engine, await run_in_threadpool(answers), self.options.request_seconds, self.metrics, self.canary)
            if self.closing.is_set():
                raise busy(closing=True)
            exchange.submit()
        return exchange

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Every error as what the client is told. (One that reached Starlette's own handler would cost the connection.)"""
        try:
            yield
        except Exception as error:
            raise refusal(error, self.closing.is_set(), self.retry_seconds()) from error

    def head(self, kind: str, prefix: str) -> dict:
        """How every answer and chunk begins."""
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()),
            "model": self.options.model, "system_fingerprint": self.fingerprint,
        }  # fmt: skip

    async def whole(self, exchange: Exchange, request: Request) -> None:
        """Hear an exchange to its end, or until the client is gone."""
        hearing = asyncio.ensure_future(self.hear(exchange))
        leaving = asyncio.ensure_future(gone(request))
        try:
            await asyncio.wait((hearing, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not hearing.done():
                raise Refusal(499, "the client is gone")
            with self.told():
                hearing.result()
        finally:
            exchange.cancel()
            hearing.cancel()
            leaving.cancel()

    async def hear(self, exchange: Exchange) -> None:
        async for _ in exchange.deltas():
            pass
        self.learn(exchange)

    def learn(self, exchange: Exchange) -> None:
        seconds = max((answer.finished.seconds for answer in exchange.answers if answer.finished), default=0.0)
        self.usual_seconds += 0.2 * (seconds - self.usual_seconds)


async def gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
