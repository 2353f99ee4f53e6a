"""The app: OpenAI's endpoints over an engine."""

import asyncio
import contextlib
import hashlib
import json
import secrets
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Header, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dspark import __version__
from dspark.errors import TargetError
from dspark.server import schemas
from dspark.server.answers import Answer, Vocabulary, chat_choice, chat_delta, completion_choice, usage
from dspark.server.asks import Ask, chat_asks, completion_asks
from dspark.server.exchange import Exchange
from dspark.server.refusal import Refusal, busy, install, refusal
from dspark.server.schemas import ChatRequest, CompletionRequest


@dataclass(frozen=True)
class Options:
    """What an operator sets."""

    model: str  # the name clients see
    api_key: str | None = None  # None: none is asked for
    max_request_bytes: int = 4096 * 1024  # four times the text of the longest contexts served here
    request_seconds: float = 600.0  # what OpenAI's clients wait by default
    speculation: str = "auto"  # of requests that do not say


def make_app(engine: Any, options: Options, metrics: Any = None, canary: Any = None) -> FastAPI:
    """An app that answers from `engine` (dspark.engine.request says what that is). `app.state.close(seconds)` refuses new
    requests and lets those running finish within that time; a `metrics` (server/metrics.py) gets its pages.

    Raises `TargetError` for a target without a tokenizer."""
    if engine.target.tokenizer is None:
        raise TargetError("this target has no tokenizer, so its answers would have no text", "put tokenizer files into its folder")
    app = FastAPI(title="dspark", version=__version__, docs_url=None, redoc_url=None)  # those pages load scripts from elsewhere
    server = Server(engine, options, metrics, canary)
    app.state.closing, app.state.close, app.state.retry_seconds = server.closing, server.close, server.retry_seconds
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    app.add_middleware(Gate, server=server)
    install(app)
    add_endpoints(app, server)
    if metrics is not None:
        from dspark.server.mount import mount

        mount(app, metrics)
    return app


class Server:
    """What the endpoints share."""

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

    async def begin(self, prepare: Any, body: ChatRequest | CompletionRequest, header: str | None) -> Exchange:
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


class Stream(StreamingResponse):
    """Server-sent events of an exchange, which is cancelled when the client goes or the server ends it."""

    def __init__(self, exchange: Exchange, events: AsyncIterator[str]):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.exchange.cancel()


def sse(value: dict) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


class Chunks:
    """The events of one streamed answer; what differs between chats and completions is in `choice`."""

    def __init__(self, server: Server, exchange: Exchange, body: ChatRequest | CompletionRequest, head: dict):
        self.server, self.exchange, self.body, self.head = server, exchange, body, head
        self.chat = isinstance(body, ChatRequest)
        self.with_usage = bool(body.stream_options and body.stream_options.include_usage)
        self.with_sources = bool(body.dspark and body.dspark.sources)
        self.offsets = [0] * len(exchange.answers)

    async def events(self) -> AsyncIterator[str]:
        try:
            for index, answer in enumerate(self.exchange.answers):
                if self.chat:
                    yield self.chunk(chat_part(index, {"role": "assistant", "content": ""}))
                elif answer.ask.begin:
                    yield self.chunk({"index": index, "text": answer.ask.begin, "logprobs": None, "finish_reason": None})
            async for heard in self.exchange.deltas():
                if heard is None:
                    yield ": still at it\n\n"
                    continue
                index, delta = heard
                answer = self.exchange.answers[index]
                if delta or (self.with_sources and delta.sources):
                    yield self.chunk(self.choice(index, answer, delta), delta.sources if self.with_sources else None)
                if answer.finished is not None:
                    last = chat_part(index, {}) if self.chat else {"index": index, "text": "", "logprobs": None}
                    yield self.chunk(last | {"finish_reason": answer.reason})
            self.server.learn(self.exchange)
            if self.with_usage:
                yield sse(self.head | {"choices": [], "usage": usage(self.exchange.answers)})
        except Exception as error:  # the status is sent: the error has to come as an event
            yield sse(refusal(error, self.server.closing.is_set()).body)
        yield "data: [DONE]\n\n"

    def choice(self, index: int, answer: Answer, delta: Any) -> dict:
        if self.chat:
            return chat_delta(index, answer, delta, self.server.vocabulary)
        choice = completion_choice(index, answer, delta, self.server.vocabulary, self.offsets[index], last=False)
        self.offsets[index] += sum(map(len, choice["logprobs"]["tokens"])) if choice["logprobs"] else 0
        return choice

    def chunk(self, choice: dict, sources: Sequence[dict] | None = None) -> str:
        chunk = self.head | {"choices": [choice]}
        if self.with_usage:
            chunk["usage"] = None
        if sources is not None:
            chunk["dspark"] = {"tokens": sources}
        return sse(chunk)


def chat_part(index: int, delta: dict) -> dict:
    """A choice of a chat's chunk that says no text."""
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


# ---- endpoints

SPECULATION = Annotated[Literal["auto", "off"] | None, Header(description="as the field `speculation`, which wins")]
ERRORS = {
    400: {"description": "the request has a fault, which `error.message` names"},
    401: {"description": "the API key is missing or wrong"},
    404: {"description": "no such model"},
    413: {"description": "the request is too large"},
    429: {"description": "all places are taken; Retry-After says when to try again"},
    500: {"description": "the server failed"},
    503: {"description": "the server is closing"},
    504: {"description": "the answer took longer than this server allows"},
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: ERRORS[status] | {"model": schemas.Error} for status in statuses}


def answered(model: type, *statuses: int) -> dict[int | str, dict[str, Any]]:
    events = {"text/event-stream": {"schema": {"type": "string"}}}
    return {200: {"model": model, "content": events, "description": "the answer; with `stream`, its chunks"}, **errors(*statuses)}


def add_endpoints(app: FastAPI, server: Server) -> None:
    key = [Depends(HTTPBearer(auto_error=False, scheme_name="key"))] if server.options.api_key else []  # documents it; the gate checks it
    every = tuple(ERRORS) if key else tuple(status for status in ERRORS if status != 401)
    reading = tuple(status for status in every if status in (401, 503))

    @app.post("/v1/chat/completions", dependencies=key, responses=answered(schemas.ChatCompletion, *every))
    async def chat(body: ChatRequest, request: Request, x_dspark_speculation: SPECULATION = None) -> Response:
        """Answer a conversation."""
        exchange = await server.begin(chat_asks, body, x_dspark_speculation)
        if body.stream:
            return Stream(exchange, Chunks(server, exchange, body, server.head("chat.completion.chunk", "chatcmpl")).events())
        await server.whole(exchange, request)
        choices = [chat_choice(index, answer, server.vocabulary) for index, answer in enumerate(exchange.answers)]
        return JSONResponse(server.head("chat.completion", "chatcmpl") | {"choices": choices, "usage": usage(exchange.answers)})

    @app.post("/v1/completions", dependencies=key, responses=answered(schemas.Completion, *every))
    async def complete(body: CompletionRequest, request: Request, x_dspark_speculation: SPECULATION = None) -> Response:
        """Continue a text."""
        exchange = await server.begin(completion_asks, body, x_dspark_speculation)
        if body.stream:
            return Stream(exchange, Chunks(server, exchange, body, server.head("text_completion", "cmpl")).events())
        await server.whole(exchange, request)
        choices = [completion_choice(index, answer, answer.whole, server.vocabulary) for index, answer in enumerate(exchange.answers)]
        return JSONResponse(server.head("text_completion", "cmpl") | {"choices": choices, "usage": usage(exchange.answers)})

    @app.get("/v1/models", dependencies=key, response_model=schemas.Models, responses=errors(*reading))
    async def models() -> dict:
        """The model this server has."""
        return {"object": "list", "data": [server.model]}

    @app.get("/v1/models/{model:path}", dependencies=key, response_model=schemas.Model, responses=errors(404, *reading))
    async def model_named(model: str) -> dict:
        server.check_model(model)
        return server.model

    @app.get("/health", responses={200: {"model": schemas.Health}, 503: {"model": schemas.Health}})
    async def health() -> JSONResponse:
        """200, or 503 while the server closes."""
        closing = server.closing.is_set()
        state = {
            "status": "closing" if closing else "ok", "model": server.options.model,
            "running": len(server.engine.running), "waiting": len(server.engine.waiting),
        }  # fmt: skip
        return JSONResponse(state, 503 if closing else 200)


def document(app: FastAPI) -> dict:
    """The OpenAPI document, without the status FastAPI adds for what is a 400 here."""
    if app.openapi_schema is None:
        app.openapi_schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path in app.openapi_schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
    return app.openapi_schema


class Gate:
    """What is checked before a request is read: the key, the size, and that the server is open."""

    def __init__(self, app: ASGIApp, server: Server):
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refused = self.refuse(scope["path"], headers)
        if refused is not None:
            await refused.response()(scope, receive, send)
            return
        await self.app(scope, self.counted(receive), send)

    def refuse(self, path: str, headers: Headers) -> Refusal | None:
        options = self.server.options
        if path.startswith("/v1/"):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            given = given.strip() if scheme.lower() == "bearer" else ""
            # headers are bytes that were read as latin-1
            if options.api_key and not secrets.compare_digest(given.encode("latin-1"), options.api_key.encode()):
                message = "send the server's API key: Authorization: Bearer KEY" if not given else "this is not the server's API key"
                return Refusal(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
            if self.server.closing.is_set():
                return busy(closing=True)
        size = headers.get("content-length", "")
        return self.too_large() if size.isdecimal() and int(size) > options.max_request_bytes else None

    def too_large(self) -> Refusal:
        return Refusal(413, f"the request is larger than {self.server.options.max_request_bytes} bytes", code="request_too_large")

    def counted(self, receive: Receive) -> Receive:
        """For bodies that come in chunks and do not say their size."""
        size = 0

        async def counting() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.server.options.max_request_bytes:
                raise HTTPException(413, self.too_large().message)
            return message

        return counting
