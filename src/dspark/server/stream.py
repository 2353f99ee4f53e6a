"""Answers as server-sent events, in OpenAI's chunks."""

import json
from collections.abc import AsyncIterator, Sequence

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from dspark.server.answers import Answer, Delta, chat_delta, completion_choice, usage
from dspark.server.exchange import Exchange
from dspark.server.refusal import refusal
from dspark.server.schemas import ChatRequest, CompletionRequest
from dspark.server.service import Service


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


class Chunks:
    """The events of one streamed answer; what differs between chats and completions is in `choice`."""

    def __init__(self, service: Service, exchange: Exchange, body: ChatRequest | CompletionRequest, head: dict):
        self.service, self.exchange, self.body, self.head = service, exchange, body, head
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
            self.service.learn(self.exchange)
            if self.with_usage:
                yield sse(self.head | {"choices": [], "usage": usage(self.exchange.answers)})
        except Exception as error:  # the status is sent: the error has to come as an event
            yield sse(refusal(error, self.service.closing.is_set()).body)
        yield "data: [DONE]\n\n"

    def choice(self, index: int, answer: Answer, delta: Delta) -> dict:
        if self.chat:
            return chat_delta(index, answer, delta, self.service.vocabulary)
        choice = completion_choice(index, answer, delta, self.service.vocabulary, self.offsets[index], last=False)
        self.offsets[index] += sum(map(len, choice["logprobs"]["tokens"])) if choice["logprobs"] else 0
        return choice

    def chunk(self, choice: dict, sources: Sequence[dict] | None = None) -> str:
        chunk = self.head | {"choices": [choice]}
        if self.with_usage:
            chunk["usage"] = None
        if sources is not None:
            chunk["dspark"] = {"tokens": sources}
        return sse(chunk)


def sse(value: dict) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def chat_part(index: int, delta: dict) -> dict:
    """A choice of a chat's chunk that says no text."""
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
