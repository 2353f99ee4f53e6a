"""The engine's requests behind one HTTP request: submitted together, heard in one place, cancelled when nobody listens."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

from dspark.engine.request import Event, Failed, Finished, Tokens
from dspark.server.answers import Answer, Delta
from dspark.server.refusal import Refusal, busy

QUIET_SECONDS = 15.0  # proxies close connections on which nothing is said


class Exchange:
    """Answers, one engine request each. `metrics` and `canary` may be None.

    Call it from the event loop; `submit` raises `Busy` and the request's own errors, and leaves nothing behind then."""

    def __init__(self, engine: Any, answers: Sequence[Answer], seconds: float, metrics: Any = None, canary: Any = None):
        self.engine, self.answers, self.metrics, self.canary = engine, answers, metrics, canary
        self.loop = asyncio.get_running_loop()
        self.seconds, self.deadline = seconds, self.loop.time() + seconds
        self.heard: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.numbers: dict[int, int] = {}  # answer -> the engine's number of its request, while it runs
        self.last_tokens: dict[int, float] = {}

    def submit(self) -> None:
        try:
            for index, answer in enumerate(self.answers):
                self.numbers[index] = self.engine.submit(answer.ask.request, self.listener(index))
        except BaseException:
            self.cancel()
            raise

    def listener(self, index: int) -> Callable[[Event], None]:
        def listen(event: Event) -> None:  # in the engine's thread
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody listens
                self.loop.call_soon_threadsafe(self.hear, index, event)

        return listen

    def hear(self, index: int, event: Event) -> None:
        """Also called when the client is gone: the metrics count these requests too."""
        if isinstance(event, Tokens):
            self.measure_tokens(index, event)
        else:
            self.numbers.pop(index, None)
            self.measure_end(index, event)
        self.heard.put_nowait((index, event))

    def cancel(self) -> None:
        """End what still runs."""
        for index in list(self.numbers):
            self.engine.cancel(self.numbers.pop(index))

    async def deltas(self) -> AsyncIterator[tuple[int, Delta] | None]:
        """What each event adds to which answer, until all have ended; None when nothing was heard for a while.

        Raises the error that a request failed with, and `Refusal` when the time is over or the engine closed."""
        running = len(self.answers)
        while running:
            left = self.deadline - self.loop.time()
            try:
                async with asyncio.timeout(min(max(left, 0), QUIET_SECONDS)):
                    index, event = await self.heard.get()
            except TimeoutError:
                if left <= QUIET_SECONDS:
                    self.cancel()
                    message = f"the answer was not finished within {self.seconds:g} seconds, the limit of this server"
                    raise Refusal(504, message, code="timeout") from None
                yield None
                continue
            if isinstance(event, Failed):
                raise event.error
            answer = self.answers[index]
            delta = answer.hear(event)
            if isinstance(event, Finished):
                running -= 1
                if answer.reason == "cancelled":
                    raise busy(closing=True)
                if self.canary is not None:
                    self.canary.offer(answer.ask.request, answer.ids)
            elif answer.reason is not None and index in self.numbers:  # ended here before the engine noticed
                self.engine.cancel(self.numbers[index])
            yield index, delta

    def measure_tokens(self, index: int, event: Tokens) -> None:
        now = time.monotonic()
        since = now - self.last_tokens[index] if index in self.last_tokens else None
        self.last_tokens[index] = now
        if self.metrics is not None:
            self.metrics.on_tokens(len(event.ids), since)

    def measure_end(self, index: int, event: Finished | Failed) -> None:
        if self.metrics is None:
            return
        if isinstance(event, Failed):
            self.metrics.on_failed(event)
        else:
            self.metrics.on_finished(replace(event, reason="stop") if self.answers[index].reason else event)
