"""The engine: every request gets the reference loop's answer, whoever runs beside it, whatever the load and the memory."""

import random
import threading
import time
from dataclasses import replace

import pytest
import torch

from dspark.core.decode import decode, judge_coupled
from dspark.core.sampling import GREEDY, Coupled, Streams
from dspark.drafters import NoDrafter
from dspark.drafters.arbiter import NOMINAL
from dspark.engine.engine import Engine
from dspark.engine.load import Guard, Load
from dspark.engine.request import SOURCES, Failed, Finished, Request, Tokens
from dspark.errors import Busy, LogitsError, PromptError, SettingError
from dspark.generation import make_law, stopping_rule
from dspark.target.native.runtime import NativeRuntime
from dspark.target.target import Target
from tiny import NATIVE_SHAPE, tiny_head, tiny_model

SAMPLED = make_law(1.0)
PENALISED = make_law(0.8, top_k=20, repetition_penalty=1.3)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSPARK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def make_target(runtime: str = "native", family: str = "llama") -> Target:
    model = tiny_model(family, **(NATIVE_SHAPE if family == "llama" else {}))
    return Target(model, name=f"tiny {family}", runtime=NativeRuntime(model) if runtime == "native" else None)


def make_engine(runtime: str = "native", head: bool = True, family: str = "llama", **options) -> Engine:
    target = make_target(runtime, family)
    return Engine(target, tiny_head(target, head_dim=16, block_size=5) if head else None, **({"max_running": 6} | options))


def reference(target: Target, request: Request) -> list[int]:
    noise = Streams(0) if request.seed is None else Coupled(request.seed)
    eos = target.eos_ids if request.eos_ids is None else request.eos_ids
    judge = {} if request.seed is None else {"judge": judge_coupled}
    ends = stopping_rule(target, eos, request.stop)
    rounds = decode(target, NoDrafter(), request.prompt_ids, request.law, noise, request.max_new_tokens, ends, **judge)
    return [token for done in rounds for token in done.tokens]


def mixed_requests(count: int, seed: int = 0) -> list[Request]:
    """Greedy and seeded, short and long, some that repeat themselves, some that share a beginning."""
    rng = random.Random(seed)
    shared = [rng.randrange(128) for _ in range(40)]
    requests = []
    for i in range(count):
        prompt = [rng.randrange(128) for _ in range(rng.choice((1, 2, 5, 17, 70)))]
        prompt = shared[: rng.randrange(41)] + prompt if i % 3 == 0 else prompt * 3 if i % 5 == 0 else prompt
        law = (GREEDY, SAMPLED, PENALISED)[i % 3]
        seeded = None if law is GREEDY else rng.randrange(1000)
        eos = frozenset([rng.randrange(128)]) if i % 4 == 0 else frozenset()
        requests.append(Request(prompt, rng.choice((1, 2, 9, 30)), law, seeded, eos_ids=eos, speculate=i % 7 != 0))
    return requests


def test_the_guard_keeps_to_the_better_mode_and_looks_at_the_other_seldom():
    for better in (True, False):
        guard = Guard(drafting=not better)
        modes = []
        for step in range(6000):
            modes.append(guard.drafting)
            guard.learn((1.1 if guard.drafting == better else 1.0) + 0.05 * (-1) ** step)
        assert modes[200:].count(not better) < 0.02 * len(modes)
        assert modes[3000:].count(not better) >= 2 * Guard.LOOK  # it goes on looking
        for _ in range(6000):
            guard.learn(1.0 if guard.drafting == better else 1.1)
        assert guard.in_force != better


class Ear:
    def __init__(self):
        self.ids, self.sources, self.logprobs, self.last = [], [], [], None
        self.over = threading.Event()

    def __call__(self, event):
        assert self.last is None, "nothing is heard after the end"
        if isinstance(event, Tokens):
            self.ids += event.ids
            self.sources += event.sources
            self.logprobs += event.logprobs or []
            assert len(event.ids) == len(event.sources) > 0
        else:
            self.last = event
            self.over.set()


def serve(engine: Engine, requests: list[Request], all_at_once: bool = True) -> list[Ear]:
    ears = [Ear() for _ in requests]
    for request, ear in zip(requests, ears, strict=True):
        engine.submit(request, ear)
        if not all_at_once:
            engine.step()
    for _ in range(10_000):
        if all(ear.last for ear in ears):
            break
        engine.step()
    assert all(isinstance(ear.last, Finished) for ear in ears), [ear.last for ear in ears]
    return ears


@pytest.mark.parametrize(("all_at_once", "plan"), [(True, "auto"), (False, "auto"), (True, "fixed"), (False, "length:3")])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("runtime", ["native", "eager"])
def test_every_answer_is_the_reference_loops(runtime, head, all_at_once, plan):
    requests = mixed_requests(24)
    engine = make_engine(runtime, head, plan=plan)
    ears = serve(engine, requests, all_at_once)
    alone = make_target(runtime)
    for request, ear in zip(requests, ears, strict=True):
        assert ear.ids == reference(alone, request)
        assert ear.last.new_tokens == len(ear.ids) <= request.max_new_tokens
        assert ear.last.reason == ("stop" if ear.ids[-1] in (request.eos_ids or ()) else "length")
        assert set(ear.sources) <= (set(SOURCES) if request.speculate else {"plain"})
    assert any("accepted" in ear.sources for ear in ears) or plan == "auto"
    assert any("corrected" in ear.sources for ear in ears) or plan == "auto"
    assert any(ear.last.cached_tokens for ear in ears)
    assert not engine.running
    assert not engine.waiting


# One family of each kind of cache that is not cut back to an earlier token: windows, recurrent states, compressed keys.
WHOLE_ONLY = ("gemma3", "qwen3_5", "deepseek_v4", "nemotron_h")


@pytest.fixture
def unmeasured(monkeypatch):
    """Costs from a table: here nothing depends on them, and to measure each family takes long."""
    monkeypatch.setattr("dspark.engine.engine.measured_load", lambda *measured: Load(NOMINAL, {}))


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("family", WHOLE_ONLY)
def test_every_answer_is_the_reference_loops_whatever_the_cache(family):
    requests = [replace(request, max_new_tokens=min(request.max_new_tokens, 12)) for request in mixed_requests(7)]
    ears = serve(make_engine("eager", family=family, plan="fixed"), requests, all_at_once=False)
    alone = make_target("eager", family)
    assert [ear.ids for ear in ears] == [reference(alone, request) for request in requests]
    assert any("accepted" in ear.sources for ear in ears)
    assert any("corrected" in ear.sources for ear in ears)


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("family", ["qwen3_5", pytest.param("deepseek_v4", marks=pytest.mark.slow)])
def test_little_memory_preempts_and_changes_nothing_whatever_the_cache(family):
    requests = [Request([i, *range(30 + i, 50)], 16, eos_ids=frozenset()) for i in range(6)]
    roomy = make_engine("eager", family=family, plan="fixed")
    assert roomy.fixed_bytes > roomy.state_bytes  # what a request holds however short it is
    tight = make_engine("eager", family=family, cache_bytes=int(1.2 * roomy._most_bytes(64)), plan="fixed")
    released = []
    release = tight._release
    tight._release = lambda r: (released.append(r.number), release(r))
    assert [ear.ids for ear in serve(tight, requests)] == [ear.ids for ear in serve(roomy, requests)]
    assert len(released) > len(requests)


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(
    "family", [family if family == "qwen3_5" else pytest.param(family, marks=pytest.mark.slow) for family in WHOLE_ONLY]
)
def test_a_prefix_that_cannot_be_cut_is_taken_whole_or_not_at_all(family):
    engine, alone = make_engine("eager", family=family, plan="fixed"), make_target("eager", family)

    def ask(prompt: list[int]) -> tuple[list[int], int]:
        request = Request(prompt, 12, eos_ids=frozenset())
        (ear,) = serve(engine, [request])
        assert ear.ids == reference(alone, request)
        return ear.ids, ear.last.cached_tokens

    first = list(range(40))
    answer, cached = ask(first)
    assert cached == 0
    whole = [*first, *answer]
    assert ask([*first, 99, 98])[1] == 0  # begins alike, and goes on otherwise
    assert ask([*whole, 77, 78])[1] == len(whole) - 1
    assert ask([*whole, 79])[1] == 0  # the entry was handed over, and what it became is longer
    assert ask([*first, 99, 98])[1] == 0


@pytest.mark.parametrize("runtime", ["native", "eager"])
def test_little_memory_preempts_and_changes_nothing(runtime):
    requests = [r for r in mixed_requests(30, seed=1) if len(r.prompt_ids) + r.max_new_tokens < 200]
    roomy = make_engine(runtime)
    tight = make_engine(runtime, cache_bytes=roomy.token_bytes * 350, plan="fixed")
    released = []
    release = tight._release
    tight._release = lambda r: (released.append(r.number), release(r))
    ears = serve(tight, requests)
    assert len(released) > len(requests)  # each once at its end, and some before
    for ear, other in zip(ears, serve(roomy, requests), strict=True):
        assert ear.ids == other.ids
    assert tight.held_bytes <= tight.cache_bytes


def test_what_memory_has_no_place_for_is_not_begun_again_in_each_step():
    steps = []
    engine = make_engine(head=False, speculate=False, on_step=steps.append)
    engine.cache_bytes = engine.token_bytes * 520
    requests = [Request([*range(i, i + 100), i], 100, eos_ids=frozenset()) for i in range(5)]
    ears = serve(engine, requests)
    assert [ear.ids for ear in ears] == [reference(make_target(), request) for request in requests]
    assert sum(step.prompt_rows for step in steps) < 2 * 5 * 200  # prompts, and answers that were begun


def test_unseeded_requests_have_the_laws_frequencies():
    """The first two tokens of many requests that run together, against the law enumerated."""
    engine = make_engine(max_running=32, max_waiting=2000, plan="fixed")
    prompt = [5, 9, 5, 9, 5]
    law = make_law(1.0, top_k=3)
    likely = tuple(reference(make_target(), Request(prompt, 3)))
    # a third of them is drafted by the head, which proposes in vain, a third gets a proposal that often stands
    predicted = [(), likely, likely[:1]]
    ears = serve(engine, [Request(prompt, 3, law, predicted_ids=predicted[i % 3]) for i in range(1500)])
    counts: dict[tuple[int, ...], int] = {}
    for ear in ears:
        counts[tuple(ear.ids[:2])] = counts.get(tuple(ear.ids[:2]), 0) + 1
    target = make_target()
    chi_square, cells = 0.0, 0
    first = top_chances(target, prompt)
    for a, chance_a in first.items():
        for b, chance_b in top_chances(target, [*prompt, a]).items():
            expected = chance_a * chance_b * len(ears)
            chi_square += (counts.pop((a, b), 0) - expected) ** 2 / expected
            cells += 1
    assert not counts
    assert cells == 9
    assert chi_square < 26.1  # 8 degrees of freedom, one in a thousand
    assert any("accepted" in ear.sources for ear in ears)


def top_chances(target: Target, ids: list[int]) -> dict[int, float]:
    row_V = target.score(target.start(), ids).logits_TV[-1]
    top = row_V.topk(3)
    return dict(zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True))


def test_the_second_turn_takes_the_first_ones_cache_and_says_what_a_cold_start_says():
    engine = make_engine()
    first = Request(list(range(100)), 20, eos_ids=frozenset())
    ids = engine.generate(first)[0]
    second = Request([*range(100), *ids, 7, 8, 9], 20, eos_ids=frozenset())
    warm, finished = engine.generate(second)
    assert finished.cached_tokens == 119  # the last token of the first answer was never fed
    assert warm == make_engine().generate(second)[0] == reference(make_target(), second)
    elsewhere = Request([*range(60), 3, 3, 3], 20, eos_ids=frozenset())
    forked, finished = engine.generate(elsewhere)
    assert finished.cached_tokens == 60
    assert forked == reference(make_target(), elsewhere)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("head", [True, False])
def test_a_turn_after_an_answer_that_ended_within_its_draft(family, head):
    """What a sliding window has forgotten cannot be brought back: the state is rolled back once, to where the answer ends."""
    target = make_target("eager", family)
    prompt = list(range(30))
    told = reference(target, Request(prompt, 30, eos_ids=frozenset()))
    for last in (3, 7, 9):
        served = make_target("eager", family)
        engine = Engine(served, tiny_head(served, head_dim=16) if head else None, max_running=2, plan="fixed")
        first = Request(prompt, 30, eos_ids=frozenset([told[last]]), propose=lambda ids: told[len(ids) - 30 :][:8])
        ids, finished = engine.generate(first)
        assert ids == reference(target, first)
        assert finished.accepted >= len(ids)  # the draft went on
        second = Request([*prompt, *ids, 5, 6], 12, eos_ids=frozenset())
        found, finished = engine.generate(second)
        assert found == reference(target, second)
        assert finished.cached_tokens >= 30


def test_an_entry_within_a_longer_one_is_not_kept_twice():
    engine = make_engine()
    for length in (60, 100, 80):
        engine.generate(Request(list(range(length)), 1))
    assert [len(entry.ids) for entry in engine.prefixes.entries] == [100]  # the prompt; the answer was never fed


def test_requests_with_one_prompt_share_it():
    engine = make_engine()
    ears = serve(engine, [Request(list(range(90)), 8, SAMPLED, seed) for seed in range(4)])
    assert [ear.last.cached_tokens for ear in ears][1:] == [89, 89, 89]


def test_logprobs_are_the_targets_own():
    engine = make_engine()
    request = Request([1, 2, 3, 1, 2, 3], 12, make_law(0.7, top_k=5), 3, logprobs=4)
    ear = serve(engine, [request])[0]
    scored = make_target().score(make_target().start(), [*request.prompt_ids, *ear.ids]).logits_TV.log_softmax(-1)
    for i, (token, found) in enumerate(zip(ear.ids, ear.logprobs, strict=True)):
        row_V = scored[len(request.prompt_ids) - 1 + i]
        assert found.logprob == pytest.approx(float(row_V[token]), abs=1e-5)
        assert [t for t, _ in found.top] == row_V.topk(4).indices.tolist()


def test_a_predicted_answer_is_drafted_from_the_start():
    engine = make_engine(head=False)
    request = Request([9, 8, 7], 40, eos_ids=frozenset())
    ids, plain = engine.generate(request)
    again, told = make_engine(head=False).generate(Request([9, 8, 7], 40, eos_ids=frozenset(), predicted_ids=ids))
    assert again == ids
    assert told.accepted > 30 > plain.accepted
    wrong, _ = make_engine(head=False).generate(Request([9, 8, 7], 40, eos_ids=frozenset(), predicted_ids=ids[::-1]))
    assert wrong == ids


def test_a_forced_proposal_is_verified_like_any_other():
    request = Request([9, 8, 7], 20, eos_ids=frozenset())
    ids = reference(make_target(), request)
    proposals = {"right": lambda seen: ids[len(seen) - 3 :][:4], "wrong": lambda seen: [0, 1], "broken": lambda seen: 1 / 0}
    for name, propose in proposals.items():
        found, told = make_engine(head=False).generate(Request([9, 8, 7], 20, eos_ids=frozenset(), propose=propose))
        assert found == ids
        assert (told.accepted >= 15) == (name == "right")


def test_cancelled_requests_end_and_free_what_they_held():
    engine = make_engine(max_running=2)
    ears = [Ear() for _ in range(5)]
    numbers = [engine.submit(Request([i, 2, 3], 100, eos_ids=frozenset()), ear) for i, ear in enumerate(ears)]
    engine.step()
    engine.step()
    for number in (numbers[0], numbers[4], 999):
        engine.cancel(number)
    engine.step()
    assert ears[0].last.reason == ears[4].last.reason == "cancelled"
    assert 0 < len(ears[0].ids) < 100
    assert ears[4].ids == []
    assert len(engine.running) == 2
    for _ in range(1000):
        engine.step()
    assert [ear.last.reason for ear in ears] == ["cancelled", "length", "length", "length", "cancelled"]


def test_a_request_is_cancelled_even_while_it_goes_back_to_the_queue():
    engine = make_engine(head=False)
    engine.cache_bytes = engine.token_bytes * 400

    class Watched(list):
        def remove(self, r):
            super().remove(r)
            cancels.append(threading.Thread(target=engine.cancel, args=(r.number,)))
            cancels[-1].start()
            cancels[-1].join(0.1)

    cancels: list[threading.Thread] = []
    ears = [Ear() for _ in range(3)]
    for i, ear in enumerate(ears):
        engine.submit(Request([i, 2, 3], 240, eos_ids=frozenset()), ear)
    engine.running = Watched()
    for _ in range(1000):
        engine.step()
    for thread in cancels:
        thread.join(5)
    assert [ear.last.reason for ear in ears] == ["length", "cancelled", "cancelled"]


def test_prefixes_that_cannot_be_kept_or_copied_cost_time_only(monkeypatch):
    engine = make_engine()
    requests = [Request([*range(60), i], 5, eos_ids=frozenset()) for i in range(3)]
    answers = [reference(make_target(), request) for request in requests]
    monkeypatch.setattr(engine.target, "fork", lambda state, num_tokens: 1 / 0)
    assert [ear.ids for ear in serve(engine, requests)] == answers
    monkeypatch.setattr(engine.prefixes, "add", lambda *entry: 1 / 0)
    assert [ear.ids for ear in serve(engine, requests)] == answers
    assert not engine.running


def test_a_full_queue_and_a_closing_engine_are_busy():
    engine = make_engine(max_running=1, max_waiting=2)
    for _ in range(3):
        engine.submit(Request([1], 50), Ear())
    with pytest.raises(Busy, match="waiting"):
        engine.submit(Request([1], 50), Ear())
    engine.close()
    with pytest.raises(Busy, match="closing"):
        engine.submit(Request([1], 50), Ear())


def test_bad_requests_are_refused_at_once():
    engine = make_engine(cache_bytes=make_engine().token_bytes * 120)
    with pytest.raises(PromptError):
        engine.submit(Request([], 5), Ear())
    with pytest.raises(PromptError):
        engine.submit(Request([128], 5), Ear())
    with pytest.raises(PromptError):
        engine.submit(Request([1], 256), Ear())
    with pytest.raises(SettingError, match="more cache"):
        engine.submit(Request([1], 110), Ear())
    with pytest.raises(SettingError):
        engine.submit(Request([1], 5, logprobs=-1), Ear())
    with pytest.raises(SettingError, match="MB of cache"):
        make_engine(cache_bytes=1000)
    with pytest.raises(SettingError, match="max_running"):
        make_engine(max_running=0)
    with pytest.raises(SettingError, match="unknown plan"):
        make_engine(plan="lagged")


def test_a_request_that_fails_fails_alone():
    engine = make_engine()

    def broken(ids, logits):
        return logits * float("nan") if ids.shape[1] > 8 else logits

    good = Request([1, 2, 3], 20, eos_ids=frozenset())
    ears = [Ear() for _ in range(3)]
    for request, ear in zip((good, Request([4, 5, 6], 20, make_law(1.0, logits_processors=[broken]), 1), good), ears, strict=True):
        engine.submit(request, ear)
    for _ in range(100):
        engine.step()
    assert isinstance(ears[1].last, Failed)
    assert isinstance(ears[1].last.error, LogitsError)
    assert ears[0].ids == ears[2].ids == reference(make_target(), good)


def test_a_listener_that_raises_ends_its_own_request_only():
    engine = make_engine()

    def deaf(event):
        raise RuntimeError

    ear = Ear()
    engine.submit(Request([1, 2, 3], 50, eos_ids=frozenset()), deaf)
    engine.submit(Request([1, 2, 3], 50, eos_ids=frozenset()), ear)
    for _ in range(200):
        engine.step()
    assert not engine.running
    assert len(ear.ids) == 50


def test_a_head_of_broken_numbers_costs_speed_only():
    target = make_target()
    head = tiny_head(target, head_dim=16)
    engine = Engine(target, head, max_running=2, plan="fixed")
    head.fc.weight.fill_(float("nan"))
    request = Request([1, 2, 3], 30, eos_ids=frozenset())
    ids, told = engine.generate(request)
    assert ids == reference(make_target(), request)
    assert told.rounds == 30 > told.drafted


def test_a_draft_that_breaks_after_its_own_token_keeps_the_law():
    """The head breaks after one token only, which it often draws: drafts that hold it must not be dropped for that."""
    prompt, token, law = [13, 112], 9, make_law(1.0)
    target = make_target()
    head = tiny_head(target, head_dim=16, block_size=3)
    engine = Engine(target, head, max_running=32, max_waiting=2000, plan="fixed")
    head.markov_head.markov_w1.weight[token] = float("nan")
    ears = serve(engine, [Request(prompt, 4, law, eos_ids=frozenset()) for _ in range(500)])
    chance = float(make_target().score(make_target().start(), prompt).logits_TV[-1].softmax(-1)[token])
    count = sum(ear.ids[0] == token for ear in ears)
    assert abs(count - chance * len(ears)) < 3.9 * (chance * (1 - chance) * len(ears)) ** 0.5  # one in ten thousand
    assert any(ear.last.accepted for ear in ears)


def test_a_pass_that_fails_fails_its_requests_and_the_next_are_served():
    engine = make_engine()
    score_many, engine.target.score_many = engine.target.score_many, lambda pieces: 1 / 0
    with pytest.raises(ZeroDivisionError):
        engine.generate(Request([1, 2, 3], 5))
    engine.target.score_many = score_many
    assert len(engine.generate(Request([1, 2, 3], 5, eos_ids=frozenset()))[0]) == 5


def test_threads_of_clients_get_the_reference_answers_and_close_drains():
    requests = mixed_requests(30, seed=2)
    expected = [reference(make_target(), request) for request in requests]
    steps = []
    engine = make_engine(on_step=steps.append).start()
    ears = [Ear() for _ in requests]

    def client(part):
        for i in part:
            engine.submit(requests[i], ears[i])
            ears[i].over.wait(60)

    clients = [threading.Thread(target=client, args=(range(k, 30, 10),)) for k in range(10)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(120)
    late = Ear()
    engine.submit(Request([5, 6], 100, eos_ids=frozenset()), late)
    engine.close(drain_seconds=60)
    assert len(late.ids) == 100
    assert [ear.ids for ear in ears] == expected
    assert max(step.running for step in steps) > 1
    assert any(step.prompt_rows for step in steps)
    assert all(step.rows >= step.prompt_rows and step.milliseconds > 0 for step in steps)


def test_close_cancels_what_does_not_finish_in_time():
    engine = make_engine().start()
    ear = Ear()
    engine.submit(Request([5, 6], 240, eos_ids=frozenset(), propose=lambda ids: time.sleep(0.05) or []), ear)
    began = time.monotonic()
    engine.close(drain_seconds=0.3)
    assert time.monotonic() - began < 5
    assert ear.last.reason == "cancelled"


def test_torch_threads_are_the_callers():
    before = torch.get_num_threads()
    seen = []
    engine = make_engine().start()
    ear = Ear()
    engine.submit(Request([5, 6], 3, propose=lambda ids: seen.append(torch.get_num_threads()) or []), ear)
    assert ear.over.wait(30)
    engine.close()
    assert set(seen) == {before}


def test_a_step_listener_that_raises_costs_nobody_an_answer():
    request = Request([5, 6], 9, eos_ids=frozenset())
    engine = make_engine(on_step=lambda step: 1 / 0)
    assert engine.generate(request)[0] == reference(make_target(), request)


def test_an_engine_has_one_thread():
    engine = make_engine().start()
    thread = engine.thread
    assert engine.start().thread is thread
    engine.close()


def test_plain_steps_save_nothing_and_lose_nothing():
    steps = []
    engine = make_engine(on_step=steps.append)
    ears = serve(engine, [Request([i, 2, 3], 12, eos_ids=frozenset(), speculate=False) for i in range(4)])
    assert [ear.last.saved_seconds for ear in ears] == [0.0] * 4
    assert all(step.plain_milliseconds == pytest.approx(step.milliseconds) for step in steps if step.rounds)
