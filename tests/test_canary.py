"""The canary against an engine that answers as told."""

import json
import threading
import time
from collections import Counter

import pytest

from dspark.core.sampling import GREEDY, Law
from dspark.engine.request import Failed, Finished, Request, Tokens
from dspark.errors import Busy, SettingError
from dspark.server.canary import MISMATCHES, Canary, first_difference

IDS = [5, 6, 7, 8]


class FakeEngine:
    """Answers a request with `says`, two tokens at a time, from another thread; an exception is what it fails with."""

    def __init__(self, says=IDS):
        self.says, self.running, self.waiting, self.requests, self.refusal, self.cancelled = says, [], [], [], None, []

    def submit(self, request, listen):
        if self.refusal:
            raise self.refusal
        self.requests.append(request)
        threading.Thread(target=self.answer, args=(request, listen)).start()
        return len(self.requests)

    def cancel(self, number):
        self.cancelled.append(number)

    def answer(self, request, listen):
        if isinstance(self.says, Exception):
            return listen(Failed(self.says))
        ids = self.says[: request.max_new_tokens]
        for k in range(0, len(ids), 2):
            listen(Tokens(ids[k : k + 2], ["plain"] * len(ids[k : k + 2])))
        listen(Finished("length", 3, 0, len(ids), len(ids), 0, 0, 0, 0.1, 0.2, 0.0))


class Results(Counter):
    def __call__(self, result: str) -> None:
        self[result] += 1

    def wait(self, num: int) -> dict:
        deadline = time.monotonic() + 10
        while self.total() < num:
            assert time.monotonic() < deadline, dict(self)
            time.sleep(0.01)
        return dict(self)


@pytest.fixture
def results():
    return Results()


@pytest.fixture
def started():
    """Canaries to close."""
    canaries = []
    yield canaries
    for canary in canaries:
        canary.close()
        assert not canary.thread.is_alive()


def start(started, *args, **settings) -> Canary:
    started.append(Canary(*args, **settings))
    return started[-1]


def request(**changes) -> Request:
    return Request(**{"prompt_ids": [1, 2, 3], "max_new_tokens": 99, "predicted_ids": [4], "logprobs": 2, "stop": ("x",), **changes})


def test_the_same_answer_matches_and_is_decoded_plainly(started, results):
    engine = FakeEngine()
    canary = start(started, engine, 1.0, results)
    canary.offer(request(propose=lambda ids: [1]), IDS)
    assert results.wait(1) == {"match": 1}
    again = engine.requests[0]
    assert (again.speculate, again.predicted_ids, again.propose, again.logprobs) == (False, (), None, None)
    assert (again.prompt_ids, again.stop, again.law, again.max_new_tokens) == ([1, 2, 3], ("x",), GREEDY, len(IDS))


def test_a_cancelled_answer_is_compared_as_far_as_it_went(started, results):
    start(started, FakeEngine(), 1.0, results).offer(request(), IDS[:3])
    assert results.wait(1) == {"match": 1}


@pytest.mark.parametrize(("says", "first"), [([5, 6, 9, 8], 2), ([5, 6], 2), ([9], 0)])
def test_another_answer_is_a_mismatch_and_written_down(started, results, tmp_path, caplog, says, first):
    canary = start(started, FakeEngine(says), 1.0, results, directory=tmp_path / "new")
    canary.offer(request(), IDS)
    assert results.wait(1) == {"mismatch": 1}
    lines = [json.loads(line) for line in (tmp_path / "new" / MISMATCHES).read_text().splitlines()]
    assert [(x["prompt_ids"], x["answer_ids"], x["plain_ids"], x["first_difference"]) for x in lines] == [([1, 2, 3], IDS, says, first)]
    assert f"at token {first} of 4" in caplog.text


def test_what_cannot_be_compared_is_left_alone(started, results):
    engine = FakeEngine()
    canary = start(started, engine, 1.0, results)
    canary.offer(request(law=Law()), IDS)
    canary.offer(request(speculate=False), IDS)
    canary.offer(request(), [])
    canary.offer(request(), IDS)  # the queue keeps its order, so by now the others would have been heard of
    assert results.wait(1) == {"match": 1} and len(engine.requests) == 1


def test_off_by_share_zero(results):
    canary = Canary(FakeEngine(), 0.0, results)
    for _ in range(200):
        canary.offer(request(), IDS)
    assert canary.waiting.empty() and not canary.thread.is_alive() and not results
    canary.close()


def test_the_share_is_kept(started, results):
    engine = FakeEngine()
    canary = start(started, engine, 0.25, results, size=1000)
    for _ in range(400):
        canary.offer(request(), IDS)
    num = canary.waiting.qsize() + results.total()
    assert 55 <= num <= 146  # 100 expected; five deviations of 8.7, and one being checked


def test_it_waits_for_a_quiet_engine(started, results):
    engine = FakeEngine()
    engine.running, engine.waiting = [1], [2]
    canary = start(started, engine, 1.0, results)
    canary.offer(request(), IDS)
    time.sleep(0.3)
    assert not engine.requests
    engine.waiting = []
    assert results.wait(1) == {"match": 1}


def test_it_drops_what_finds_no_room(started, results):
    engine = FakeEngine()
    engine.running = [1, 2]
    canary = start(started, engine, 1.0, results, patience=0.2, size=2)
    for _ in range(10):
        canary.offer(request(), IDS)
    assert results["dropped"] >= 7  # two wait, one may be held by the thread
    assert results.wait(10) == {"dropped": 10} and not engine.requests


def test_errors_are_counted_and_survived(started, results):
    engine = FakeEngine(RuntimeError("oh"))
    canary = start(started, engine, 1.0, results)
    canary.offer(request(), IDS)
    assert results.wait(1) == {"failed": 1}
    engine.refusal = Busy("full")
    canary.offer(request(), IDS)
    assert results.wait(2) == {"failed": 1, "dropped": 1}
    engine.refusal, engine.says = None, IDS
    canary.offer(request(), IDS)
    assert results.wait(3) == {"failed": 1, "dropped": 1, "match": 1}


def test_it_makes_room_for_those_who_wait(started, results):
    engine = FakeEngine()
    engine.answer = lambda request, listen: engine.waiting.append(2)
    start(started, engine, 1.0, results).offer(request(), IDS)
    assert results.wait(1) == {"dropped": 1} and engine.cancelled == [1]


def test_closing_does_not_wait_for_an_answer_that_never_comes(results):
    engine = FakeEngine()
    engine.answer = lambda request, listen: None
    canary = Canary(engine, 1.0, results)
    canary.offer(request(), IDS)
    deadline = time.monotonic() + 5
    while not engine.requests:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    canary.close()
    assert not canary.thread.is_alive() and engine.cancelled == [1]
    canary.offer(request(), IDS)
    assert canary.waiting.empty() and not results


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_other_shares_are_refused(results, share):
    with pytest.raises(SettingError, match="share"):
        Canary(FakeEngine(), share, results)


def test_a_folder_that_cannot_be_written_to_is_refused(results, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SettingError, match="cannot write to"):
        Canary(FakeEngine(), 1.0, results, directory=tmp_path / "file" / "in")


def test_first_difference():
    assert [first_difference([1, 2], other) for other in ([1, 2], [1, 2, 3], [1], [3, 2])] == [2, 2, 1, 0]
