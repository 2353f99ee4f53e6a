"""Memory of keys, values and features: an engine's bound holds at every moment, and what is shared between requests stays what it was."""

import ctypes
import gc
import mmap
import random
import subprocess
import sys
import weakref

import pytest
import torch
from transformers import DynamicCache

from dspark.core.sampling import GREEDY, Streams
from dspark.drafters import DSparkDrafter
from dspark.engine import engine as engine_module
from dspark.engine.engine import Engine
from dspark.engine.request import Request
from dspark.errors import SettingError
from dspark.head.chain import NativeChain
from dspark.head.context import Context
from dspark.target.native.cache import PAGE_TOKENS, SLAB_BYTES, Cache, Pool
from test_engine import Ear, make_engine, make_target, own_cache, reference, serve  # noqa: F401  own_cache is a fixture
from tiny import tiny_head, tiny_recurrent

EDGES = (1, PAGE_TOKENS - 1, PAGE_TOKENS, PAGE_TOKENS + 1, 2 * PAGE_TOKENS, 100, 150)
MOST = 200  # tokens of the longest request


def pools_of(engine: Engine) -> list[Pool]:
    runtime = engine.target.runtime
    pools = [None if runtime is None else runtime.pool]
    pools += [] if engine.runner is None else [engine.runner.pool, engine.runner.feature_pool]
    pools += [engine.modules.pool] if isinstance(engine.modules, NativeChain) else []
    return [pool for pool in pools if pool is not None]


class Watch:
    """Counts pages in use, and every tensor that a cache or context holds while it lives, whoever holds that; without the engine's help."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch):
        self.engine, self.seen, self.things = engine, [], []
        take, init = Pool.take, Context.__init__
        start, fork, score = engine.target.start, engine.target.fork, engine.target.score_many

        def known(state):
            self.things += [] if state is None else [weakref.ref(state.cache)]
            return state

        def noted(made):
            self.seen.append(self.live_bytes())
            return made

        def noted_context(context, *args, **options):
            init(context, *args, **options)
            self.things.append(weakref.ref(context))

        monkeypatch.setattr(Pool, "take", lambda pool: noted(take(pool)))
        monkeypatch.setattr(Context, "__init__", noted_context)
        monkeypatch.setattr(engine.target, "start", lambda: known(start()))
        monkeypatch.setattr(engine.target, "fork", lambda state, num_tokens: noted(known(fork(state, num_tokens))))
        monkeypatch.setattr(engine.target, "score_many", lambda pieces: noted(score(pieces)))

    def live_bytes(self) -> int:
        alive = [thing for thing in (ref() for ref in self.things) if thing is not None]
        lists = [vars(layer).values() for thing in alive if isinstance(thing, DynamicCache) for layer in thing.layers]
        lists += [thing.own for thing in alive if isinstance(thing, Context)]
        storages = [t.untyped_storage() for each in lists for t in each if isinstance(t, torch.Tensor)]
        distinct = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(distinct.values()) + sum(pool.page_bytes * in_use(pool) for pool in pools_of(self.engine))


def in_use(pool: Pool) -> int:
    return sum(slab.num_pages - len(slab.free) for slab in pool.slabs)


def adversarial(count: int, seed: int) -> list[Request]:
    """Lengths at the edges of pages, beginnings that are shared, and requests that take all there is."""
    rng = random.Random(seed)
    shared = [rng.randrange(128) for _ in range(MOST)]
    requests = []
    for i in range(count):
        kept = rng.choice((0, 16, *EDGES)) if i % 2 else 0
        prompt = [*shared[:kept], *(rng.randrange(128) for _ in range(rng.choice(EDGES)))][: MOST - 1]
        new = MOST - len(prompt) if i % 5 == 0 else rng.choice((1, 2, 20))
        requests.append(Request(prompt, min(new, MOST - len(prompt)), GREEDY, eos_ids=frozenset(), speculate=i % 7 != 0))
    return requests


@pytest.mark.parametrize(("plan", "times"), [("fixed", 1), ("fixed", 2), ("auto", 3)])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("runtime", ["native", "eager"])
def test_an_engine_never_holds_more_than_its_bound(runtime, head, plan, times, monkeypatch):
    monkeypatch.setattr(engine_module, "PENDING_TOKENS", 40)  # features become keys within these prompts
    engine = make_engine(runtime, head, plan=plan, max_running=6)
    engine.cache_bytes = times * engine._most_bytes(MOST)
    requests = adversarial(14, seed=3)
    with monkeypatch.context() as patch:
        watch = Watch(engine, patch)
        engine.on_step = lambda step: watch.seen.extend([watch.live_bytes(), engine.held_bytes])
        ears = serve(engine, requests)
    alone = make_target(runtime)
    assert [ear.ids for ear in ears] == [reference(alone, request) for request in requests]
    assert 0.6 * engine.cache_bytes < max(watch.seen) <= engine.cache_bytes
    assert times < 3 or any(ear.last.cached_tokens for ear in ears)
    engine.prefixes.entries.clear()
    gc.collect()
    assert engine.held_bytes == watch.live_bytes() == 0


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(("kind", "draft_vocab"), [("mtp", None), ("eagle3", 64), ("eagle3", 100)])
def test_the_slots_of_a_chain_are_within_the_bound(kind, draft_vocab, times):
    target = make_target()
    head = tiny_recurrent(target, kind, 5, draft_vocab, head_dim=16)
    engine = Engine(target, head, max_running=6, plan="fixed", cache_bytes=10**9)
    assert isinstance(engine.modules, NativeChain) == (draft_vocab != 100)
    engine.cache_bytes = times * engine._most_bytes(MOST)
    seen, drafted = [], []

    def note(step):
        seen.append(engine.held_bytes)
        drafted.extend(done.drafted for done in step.rounds if done.drafter == "mtp")

    engine.on_step = note
    requests = adversarial(12, seed=times)
    ears = serve(engine, requests, all_at_once=times == 1)
    assert [ear.ids for ear in ears] == [reference(target, request) for request in requests]
    assert 0.6 * engine.cache_bytes < max(seen) <= engine.cache_bytes and sum(drafted)
    engine.prefixes.entries.clear()
    gc.collect()
    assert engine.held_bytes == 0


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("runtime", ["native", "eager"])
def test_room_is_made_for_the_first_round_of_a_prompt_that_is_all_in(runtime, head, monkeypatch):
    """Of one token, or one that a finished text knows."""
    engine = make_engine(runtime, head, plan="fixed")
    score, calls = engine.target.score_many, []

    def watched(pieces):
        allowed = engine.held_bytes + engine.reserved
        scored = score(pieces)
        calls.append(engine.held_bytes <= allowed)
        return scored

    monkeypatch.setattr(engine.target, "score_many", watched)
    first = Request([5], 2 * PAGE_TOKENS, eos_ids=frozenset())
    answer = serve(engine, [first])[0].ids
    following = serve(engine, [Request([5, *answer], PAGE_TOKENS, eos_ids=frozenset())])[0]
    assert following.last.cached_tokens == 2 * PAGE_TOKENS and all(calls)


@pytest.mark.parametrize("runtime", ["native", "eager"])
def test_a_request_that_can_never_fit_is_refused_and_one_that_just_fits_is_served(runtime):
    engine = make_engine(runtime, plan="fixed")
    engine.cache_bytes = engine._most_bytes(2 * PAGE_TOKENS)
    fits, too_long = Request([5] * 34, 30, eos_ids=frozenset()), Request([5] * 34, 30 + PAGE_TOKENS)
    with pytest.raises(SettingError, match=r"take up to 0\.\d MB of cache; 0\.\d MB are allowed") as refused:
        engine.submit(too_long, Ear())
    assert "fewer tokens" in refused.value.hint
    assert "--cache-gb" in refused.value.hint
    assert engine.generate(fits)[0] == reference(make_target(runtime), fits)


def test_a_preempted_request_keeps_no_memory():
    engine = make_engine(plan="fixed", max_running=2)
    for i in range(2):
        engine.submit(Request([i, 2, 3], 60, eos_ids=frozenset()), Ear())
    for _ in range(4):
        engine.step()
    newest = engine.running[-1]
    context = weakref.ref(newest.head.context)
    assert newest.rounds
    engine.cache_bytes = engine.held_bytes - 1
    engine._make_room(None, 0)
    gc.collect()
    assert newest.state is None
    assert context() is None
    assert engine.held_bytes <= engine.cache_bytes


@pytest.mark.parametrize(("size", "flushed"), [(100, 0), (100, 40), (100, 100), (PAGE_TOKENS, 64), (33, 0), (64, 40), (5, 100), (1, 0)])
@pytest.mark.parametrize("runtime", ["native", "eager"])
def test_a_forked_drafter_drafts_what_a_new_one_does_and_the_other_is_not_changed(runtime, flushed, size):
    target = make_target(runtime)
    head = tiny_head(target, head_dim=16)
    first, ids = DSparkDrafter(head, target), torch.randint(128, (121,), generator=torch.Generator().manual_seed(1)).tolist()
    features = target.prefill(target.start(), ids[:120])
    first.commit(features[:flushed])
    first.flush()
    first.commit(features[flushed:100])

    def draft(drafter, num_tokens):
        made = drafter.draft(ids[: num_tokens + 1], 4, GREEDY, Streams(0).draft)
        return made.tokens, made.confidences

    def fresh(*parts):
        drafter = DSparkDrafter(head, target, runner=first.runner)
        for part in parts:
            drafter.commit(part)
        return drafter

    forked = first.fork(size)
    again = forked.fork(size)
    first.commit(features[100:110])
    before = draft(first, 110)
    forked.commit(features[size : size + 7].flip(1))  # another text goes on otherwise
    assert draft(forked, size + 7) == draft(fresh(features[:size], features[size : size + 7].flip(1)), size + 7)
    assert draft(again, size) == draft(fresh(features[:size]), size)
    assert draft(first, 110) == before == draft(fresh(features[:110]), 110)


def test_features_on_their_way_do_not_keep_a_pass_alive():
    target = make_target()
    drafter = DSparkDrafter(tiny_head(target, head_dim=16), target)
    features = target.prefill(target.start(), [1] * 50)
    ended = weakref.ref(features.untyped_storage())
    drafter.commit(features[10:12])
    del features
    assert ended() is None


def test_a_fork_stands_when_the_first_goes_back_behind_it():
    target = make_target()
    ids = list(range(100))
    expected = target.score(target.start(), ids).logits_TV[70:]
    state = target.start()
    target.prefill(state, ids)
    fork = target.fork(state, 70)
    shared = target.runtime.pool.num_used
    assert shared == 4 + 1  # the page begun is copied
    target.rollback(state, 60)
    target.prefill(state, [5] * 60)
    assert torch.equal(target.score(fork, ids[70:]).logits_TV, expected)
    del state, fork
    assert target.runtime.pool.num_used == 0


def test_pages_are_zero_apart_from_each_other_and_go_back_to_the_system():
    pool = Pool(SLAB_BYTES // 3 - 64)
    pages = [pool.take() for _ in range(5)]
    assert len({page.memory.data_ptr() for page in pages}) == 5
    assert all(page.memory.data_ptr() % 64 == 0 and page.memory.numel() == pool.page_bytes for page in pages)
    for i, page in enumerate(pages):
        page.memory.fill_(i + 1)
    assert [int(page.memory.max()) for page in pages] == [1, 2, 3, 4, 5]
    assert (len(pool.slabs), pool.used_bytes) == (2, 5 * pool.page_bytes)
    del page, pages[0]
    assert not pool.take().memory.any()
    del pages[:]
    assert (len(pool.slabs), pool.used_bytes) == (1, 0)  # one stays, for what comes next
    again = [pool.take() for _ in range(3)]
    assert len(pool.slabs) == 1 and not any(page.memory.any() for page in again)


def test_what_a_cache_says_it_will_take_is_what_it_takes():
    pool, rng = Pool(640), random.Random(0)
    caches = [(Cache(pool), 0)]
    for _ in range(300):
        cache, held = rng.choice(caches)
        past = rng.randrange(held + 1)
        until = past + rng.randrange(1, 80)
        lent = any(page.shared for page in cache.pages[past // PAGE_TOKENS :])
        before, grows = pool.used_bytes, cache.growth(past, until)
        cache.reserve(past, until)
        taken = pool.used_bytes - before
        assert taken == grows or (lent and 0 <= taken < grows)  # the other holder of a page may be gone
        assert cache.growth(past, until) == 0
        assert list(cache.addresses) == [page.memory.data_ptr() for page in cache.pages]
        caches = [(c, until if c is cache else n) for c, n in caches][-6:]
        caches.append((cache.fork(rng.randrange(until + 1)), 0))
        caches[-1] = (caches[-1][0], len(caches[-1][0].pages) * PAGE_TOKENS)


FAULTS = """
import resource, torch
from dspark.target.native.pages import freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**24)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1])

given_back, before = faults(), resident()
with freed_memory_kept():
    kept, held = min(faults() for _ in range(20)), resident()  # a small thing may settle in what was freed, now and then
print(given_back, kept, held - before, resident() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another malloc than glibc's")
def test_freed_memory_is_kept_for_as_long_as_it_is_asked_for():
    """In a process of its own: what tests before have freed is there to be had again."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, timeout=120)
    given_back, kept, held, after = map(int, done.stdout.split())
    pages = 2**26 // mmap.PAGESIZE
    assert kept < given_back / 50 and held > 0.9 * pages and after < 0.1 * pages
