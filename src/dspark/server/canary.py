"""The canary: some finished greedy answers are decoded again without drafts, and the tokens compared."""

import json
import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from dspark.engine.request import Event, Failed, Finished, Request, Tokens
from dspark.errors import Busy, SettingError

log = logging.getLogger(__name__)

# What comes of an answer that was chosen: the same tokens, others, never checked because the engine had no room, an error.
RESULTS = ("match", "mismatch", "dropped", "failed")
MISMATCHES = "canary-mismatches.jsonl"
MOST_MISMATCHES = 1000  # lines written by one process: a broken server must not fill the disk


class Engine(Protocol):
    """As much of the engine as a canary takes."""

    def submit(self, request: Request, listen: Callable[[Event], None]) -> int:
        """Start the request and return its number; `listen` hears its events, from any thread. Raises `Busy` where it takes no more."""

    def cancel(self, number: int) -> None: ...
    @property
    def running(self) -> Sized: ...
    @property
    def waiting(self) -> Sized: ...


@dataclass(frozen=True)
class Answer:
    request: Request
    ids: list[int]


class Canary:
    """Checks a `share` (0 to 1) of the answers offered, one at a time and only beside at most `quiet` other requests; says one of
    `RESULTS` to `on_result` for each. An answer that finds the queue full or no quiet moment within `patience` seconds is dropped,
    and so is one during whose check other requests begin to wait.
    With a `directory`, mismatches are appended to canary-mismatches.jsonl there: prompt, both answers and the first place where
    they differ, as token ids, which hold what users wrote.

    Share 0 starts nothing. Raises `SettingError` for another share, or a directory that cannot be written to."""

    def __init__(
        self,
        engine: Engine,
        share: float,
        on_result: Callable[[str], None],
        directory: Path | None = None,
        quiet: int = 1,
        patience: float = 60.0,
        size: int = 16,
    ):
        if not 0 <= share <= 1:
            raise SettingError(f"the canary's share is {share}", "give a number from 0 (off) to 1 (every greedy answer)")
        if directory is not None:
            refuse_unwritable(directory)
        self.engine, self.share, self.on_result, self.directory = engine, share, on_result, directory
        self.quiet, self.patience = quiet, patience
        self.waiting: queue.Queue[Answer] = queue.Queue(size)
        self.closing = threading.Event()
        self.written = 0
        self.thread = threading.Thread(target=self.work, name="canary", daemon=True)
        if share:
            self.thread.start()

    def offer(self, request: Request, ids: Sequence[int]) -> None:
        """A request that ended, in whatever way, and all ids of its answer. Returns at once; leaves alone what it cannot check: answers
        that are drawn, of plain requests, or empty."""
        if self.closing.is_set() or not (ids and request.law.greedy and request.speculate) or random.random() >= self.share:
            return
        try:
            self.waiting.put_nowait(Answer(request, list(ids)))
        except queue.Full:
            self.on_result("dropped")

    def close(self) -> None:
        """Take no more; what waits is forgotten."""
        self.closing.set()
        if self.thread.is_alive() and self.thread is not threading.current_thread():
            self.thread.join(5)

    def work(self) -> None:
        while not self.closing.is_set():
            try:
                answer = self.waiting.get(timeout=0.2)
            except queue.Empty:
                continue
            result = self.check(answer) if self.wait_for_quiet() else "dropped"
            if not self.closing.is_set():
                self.on_result(result)

    def wait_for_quiet(self) -> bool:
        give_up = time.monotonic() + self.patience
        while len(self.engine.running) + len(self.engine.waiting) > self.quiet:
            if time.monotonic() > give_up or self.closing.wait(0.05):
                return False
        return True

    def check(self, answer: Answer) -> str:
        try:
            ids = self.decode_plainly(answer)
        except Busy:
            return "dropped"
        except Exception as error:
            log.warning("the canary could not decode an answer again: %s", error)
            return "failed"
        if ids == answer.ids:
            return "match"
        self.report(answer, ids)
        return "mismatch"

    def decode_plainly(self, answer: Answer) -> list[int]:
        """The answer without drafts; as long as the first one, so that one that was cancelled can be checked too. Raises what the
        request failed with."""
        plain = replace(answer.request, speculate=False, predicted_ids=(), propose=None, logprobs=None, max_new_tokens=len(answer.ids))
        ids: list[int] = []
        failures: list[Exception] = []
        done = threading.Event()

        def listen(event: Event) -> None:
            match event:
                case Tokens():
                    ids.extend(event.ids)
                case Finished():
                    done.set()
                case Failed():
                    failures.append(event.error)
                    done.set()

        number = self.engine.submit(plain, listen)
        while not done.wait(0.1):
            if self.engine.waiting or self.closing.is_set():
                self.engine.cancel(number)
                raise Busy("others wait for the place of the canary")
        if failures:
            raise failures[0]
        return ids

    def report(self, answer: Answer, plain_ids: list[int]) -> None:
        first = first_difference(answer.ids, plain_ids)
        log.warning(
            "canary: an answer differs from plain decoding at token %d of %d. docs/metrics.md says what to do", first, len(answer.ids)
        )
        if self.directory is None or self.written >= MOST_MISMATCHES:
            return
        line = {
            "time": time.time(),
            "first_difference": first,
            "prompt_ids": list(answer.request.prompt_ids),
            "answer_ids": answer.ids,
            "plain_ids": plain_ids,
        }
        try:
            with (self.directory / MISMATCHES).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.written += 1
        except OSError as error:
            log.warning("canary: cannot write to %s: %s", self.directory, error.strerror)


def first_difference(left: Sequence[int], right: Sequence[int]) -> int:
    """Index of the first token that differs; the shorter length where one continues the other."""
    return next((k for k, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def refuse_unwritable(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / MISMATCHES).touch()
    except OSError as error:
        raise SettingError(f"cannot write to {directory}: {error.strerror}", "name a folder that can be written to") from error
