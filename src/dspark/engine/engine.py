"""Many requests at once: each step drafts, plans, scores, verifies and commits for all of them, in one target pass.

A step also takes a piece of one new prompt along. What a request says never depends on who runs beside it: natively its
rows have the same bits in any company, its randomness is its own, and its plan decides about its own tokens only. With a
seed the answer does not depend on plans and drafts either (`Coupled`), so it replays whatever the load."""

import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from dspark.core.planner import DraftedBy, always
from dspark.core.sampling import GREEDY
from dspark.core.verifier import Draft
from dspark.drafters import Arbiter, DSparkDrafter, MtpDrafter
from dspark.drafters.arbiter import GUESS_TRUST, GUESSED, LOOKUP_TOKENS
from dspark.drafters.dspark import Ask, draft_many
from dspark.engine.load import Guard, Load, measured_load
from dspark.engine.prefix import Entry, PrefixCache
from dspark.engine.request import Event, Failed, Finished, Request, Round, Step, Tokens
from dspark.engine.running import NOTHING, Running
from dspark.errors import Busy, SettingError
from dspark.generation import check_request, usual_acceptance
from dspark.head.chain import NativeChain, make_modules
from dspark.head.context import feature_pool, make_runner
from dspark.head.mtp import MtpHead
from dspark.head.recurrent import AnyHead, RecurrentHead
from dspark.profiling import planning_costs
from dspark.target.native.cache import PAGE_TOKENS, Cache, pages_for
from dspark.target.target import State, Target

log = logging.getLogger(__name__)

# Prompt tokens of a step: beside others few enough that their next tokens come soon, alone enough for one large product.
CHUNK_BESIDE, CHUNK_ALONE = 64, 512
LEAST_TOKENS = 64  # of a request that there must be memory for
PENDING_TOKENS = 1024  # tokens of a request whose features wait, at most, to become the head's context keys
SHARE_OF_MEMORY = 0.5  # of what is free at the start, for caches
PROBE_STEPS = 32  # steps from one draft pass of few requests to the next
SURELY_PAYS = 8  # requests: fewer draft until it is known not to pay, more do not until it is known to pay
NEWEST = 1 / 32  # weight of the newest step in the running mean of measured over expected time


class Engine:
    """Serves requests from a thread of its own (`start`); `step` does one by hand.

    `head` and `mtp`, multi-token-prediction modules (`load_mtp`), draft in turns with prompt lookup, by what each is expected to gain. A head of
    the kind mtp or eagle3 takes the modules' place.
    `speculate=False` decodes everything plainly; `plan` is auto or online (`make_planner`), or for study fixed, length:N or threshold:P.
    `cache_bytes` bounds keys and values of running requests and of the prefix cache together, the head's and its features among them
    (None: half of the memory that is free now). They are never more; a request that could not be served within is refused. `on_step`
    hears of every step."""

    def __init__(
        self,
        target: Target,
        head: AnyHead | None = None,
        *,
        max_running: int = 32,
        max_waiting: int = 256,
        cache_bytes: int | None = None,
        speculate: bool = True,
        plan: str = "auto",
        say: Callable[[str], None] = lambda text: None,
        on_step: Callable[[Step], None] | None = None,
        mtp: MtpHead | RecurrentHead | None = None,
    ):
        for name, value, least in (("max_running", max_running, 1), ("max_waiting", max_waiting, 0)):
            if value < least:
                raise SettingError(f"{name} is {value}", f"give at least {least}")
        self.lengths, self.online = always(plan), plan == "online"
        if self.lengths is None and plan not in ("auto", "online"):
            raise SettingError(f"unknown plan {plan!r}", "choose auto, online, fixed, length:N or threshold:P")
        self.target, self.speculate = target, speculate
        if isinstance(head, RecurrentHead):  # it drafts as modules do, and in their place
            head, mtp = None, head
        self.head, self.mtp = (head, mtp) if speculate else (None, None)
        self.max_running, self.max_waiting, self.on_step = max_running, max_waiting, on_step
        self.runner = None if self.head is None else make_runner(self.head, target)
        self.modules = None if self.mtp is None else make_modules(self.mtp, target)
        target.untap()
        layers = {*(self.head.config.target_layer_ids if self.head else ()), *(self.mtp.layer_ids if self.mtp else ())}
        if layers:
            target.tap(sorted(layers))
        drafted = [self.head.config.block_size if self.head else 0, self.mtp.block_size if self.mtp else 0]
        block = max(*drafted, LOOKUP_TOKENS) if speculate else 0
        self.load: Load | None = measured_load(target, self.head, max_running, block + 1, say) if speculate else None
        # Modules draft for one request after the other, so that a draft costs the same whoever else runs.
        costs = planning_costs(target, self.mtp, block + 1, say) if self.mtp else None
        self.mtp_costs = DraftedBy(self.load, costs) if self.load and costs else None
        self.most_rows = max(block, LOOKUP_TOKENS) + 1  # of one request in a step
        self.fixed_bytes, self.state_bytes, self.token_bytes = self._measured_bytes()
        self.hidden_bytes, self.slot_bytes = self._measured_mtp_bytes()
        self.token_bytes += self.slot_bytes
        self.cache_bytes = int(SHARE_OF_MEMORY * free_memory()) if cache_bytes is None else cache_bytes
        self.reserved = 0  # bytes that the present step will take
        least = self._most_bytes(LEAST_TOKENS)
        if least > self.cache_bytes:
            raise SettingError(
                f"{self.cache_bytes / 1e6:.1f} MB of cache are too few for one request of {LEAST_TOKENS} tokens",
                f"give at least {least / 1e6:.1f} MB",
            )
        self.prefixes = PrefixCache(target)
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []
        self.numbers = itertools.count(1)
        self.full = False  # a request went back to the queue, and none has left since
        self.steps = 0
        self.loads = 0  # how often planners had to think again
        self.guards: dict[int, Guard] = {}  # by the number of requests, in doublings
        self.drift = 1.0  # measured over expected time of late
        self.changed = threading.Condition()
        self.threads = torch.get_num_threads()
        self.thread: threading.Thread | None = None
        self.closing = False

    # From any thread ---------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Tokens whose keys and values fit, about."""
        return max(0, self.cache_bytes - self.fixed_bytes) // self.token_bytes

    def notes(self) -> list[str]:
        """What whoever runs it may want to know: who drafts, and what this target's caches and runtime do not allow."""
        modules = f"the target's multi-token-prediction modules ({self.mtp.num_modules})" if self.mtp else ""
        modules = f"the head ({self.mtp.kind})" if isinstance(self.mtp, RecurrentHead) else modules
        drafters = [name for name in ("the head" if self.head else "", modules, "prompt lookup") if name]
        said = [f"drafting by round: {', '.join(drafters)}" if self.speculate else "drafting is off"]
        if self.target.runtime is None:
            said.append("eager runtime: requests that run together go through the model one after the other, each with its own cache")
        if not self.target.can_shorten(self.target.start()):
            said.append("prefix cache: whole texts only, as the next turn of a chat has them; this target's cache cannot be cut back")
        return said

    def start(self) -> "Engine":
        """Serve from now on; once is enough."""
        if self.thread is not None:
            return self
        self.thread = threading.Thread(target=self._serve, name="dspark-engine", daemon=True)
        self.thread.start()
        return self

    def __enter__(self) -> "Engine":
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.close(0.0)

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> int:
        """Queue a request; its number. `on_event` is called from the engine's thread: `Tokens`, and at last `Finished` or `Failed`.

        Raises `UserError` for a request that cannot be served, `Busy` when the queue is full or the engine closing."""
        seed = 0 if request.seed is None else request.seed
        check_request(self.target, request.prompt_ids, request.max_new_tokens, seed, request.stop)
        if request.logprobs is not None and not 0 <= request.logprobs <= self.target.vocab_size:
            raise SettingError(f"logprobs is {request.logprobs}", f"ask for 0 to {self.target.vocab_size} alternatives")
        num_tokens = len(request.prompt_ids) + request.max_new_tokens
        needed = self._most_bytes(num_tokens)
        if needed > self.cache_bytes:
            raise SettingError(
                f"{num_tokens} tokens of prompt and answer take up to {needed / 1e6:.1f} MB of cache; {self.cache_bytes / 1e6:.1f} MB are allowed",
                "ask for fewer tokens, or start with more cache (--cache-gb)",
            )
        with self.changed:
            if self.closing:
                raise Busy("the engine is closing", "send the request to another one")
            if len(self.waiting) >= self.max_waiting + max(0, self.max_running - len(self.running)):
                raise Busy(f"{len(self.waiting)} requests are waiting", "try again a little later")
            new = Running(next(self.numbers), request, on_event, self.target)
            self.waiting.append(new)
            self.changed.notify()
        return new.number

    def cancel(self, number: int) -> None:
        """End a request; it hears `Finished` with reason cancelled. One that is over, or unknown, is left alone."""
        with self.changed:
            for running in [*self.waiting, *self.running]:
                if running.number == number:
                    running.cancelled = True
            self.changed.notify()

    def generate(self, request: Request) -> tuple[list[int], Finished]:
        """Serve one request and wait for it. Raises its error."""
        done, ids, last = threading.Event(), [], []  # type: tuple[threading.Event, list[int], list[Finished | Failed]]

        def hear(event: Event) -> None:
            if isinstance(event, Tokens):
                ids.extend(event.ids)
            else:
                last.append(event)
                done.set()

        self.submit(request, hear)
        while not done.is_set():
            if self.thread is None:
                self.step()
            else:
                done.wait(1.0)
        if isinstance(last[0], Failed):
            raise last[0].error
        return ids, last[0]

    def close(self, drain_seconds: float = 0.0) -> None:
        """Take no more requests; let those that are here finish for so long, cancel the rest."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        if self.thread is None:
            return
        self.thread.join(drain_seconds)
        with self.changed:
            for running in [*self.waiting, *self.running]:
                running.cancelled = True
            self.changed.notify()
        self.thread.join()

    # From the engine's thread ------------------------------------------------------------

    def _serve(self) -> None:
        torch.set_num_threads(self.threads)  # OpenMP keeps that number by thread
        while True:
            with self.changed:
                while not (self.waiting or self.running or self.closing):
                    self.changed.wait()
                if self.closing and not (self.waiting or self.running):
                    return
            try:
                self.step()
            except Exception as error:  # a mistake of ours: whoever was here hears of it, and the next are served
                for r in list(self.running):
                    self._fail(r, error)

    @torch.inference_mode()
    def step(self) -> None:
        """One target pass for everybody, if there is anything to do."""
        self.reserved = 0
        self._admit()
        if not self.running:
            return
        began = time.perf_counter()
        filling = self._start_prompt()
        beside = sum(1 for r in self.running if r.missing == 0)
        chunk = 0 if filling is None else min(filling.missing, CHUNK_BESIDE if beside else CHUNK_ALONE)
        self._make_room(filling, chunk)
        decoding = [r for r in self.running if r.state is not None and r.missing == 0]
        if filling is not None and filling not in self.running:
            filling = None  # preempted
        if self.load is not None:
            self.loads += self.load.set_running(len(decoding))
        guard = self._guard(len(decoding))
        # The mode that is not in force is looked at in steps that can be compared: those without a piece of a prompt.
        drafts = self._draft(decoding, guard is None or (guard.in_force if chunk else guard.drafting))
        planned = [r.plan(draft) for r, draft in zip(decoding, drafts, strict=True)]
        pieces: list[tuple[Any, Sequence[int], int]] = [
            (r.state, [r.ids[-1], *draft.tokens[:count]], count + 1) for r, draft, count in zip(decoding, drafts, planned, strict=True)
        ]
        if filling is not None and filling.state is not None and chunk:
            begin = filling.state.num_tokens
            pieces.append((filling.state, filling.ids[begin : begin + chunk], 0))
        if not pieces:
            return
        try:
            scored = self.target.score_many(pieces)
        except Exception as error:  # memory, or a broken model: nobody's state can be trusted
            for r in [*decoding, *([filling] if filling else [])]:
                self._fail(r, error)
            return
        if filling is not None and chunk:
            self._take_prompt(filling, scored[-1].features_TMD)
        rounds = [self._take(*each) for each in zip(decoding, drafts, planned, scored[: len(decoding)], strict=True)]
        elapsed = 1e3 * (time.perf_counter() - began)
        self._tell(elapsed, decoding, rounds, planned, chunk, guard)
        for r in decoding:
            if r in self.running and (r.stopped or r.left <= 0):
                self._finish(r, "stop" if r.stopped else "length")

    def _admit(self) -> None:
        """Cancelled requests end; waiting ones come in while there is place, not to be sent back at once for want of memory."""
        with self.changed:
            gone = [r for r in [*self.waiting, *self.running] if r.cancelled]
            self.waiting = deque(r for r in self.waiting if not r.cancelled)
            while self.waiting and not self.full and len(self.running) - sum(r.cancelled for r in self.running) < self.max_running:
                self.running.append(self.waiting.popleft())
        for r in gone:
            self._finish(r, "cancelled")

    def _start_prompt(self) -> Running | None:
        """The first request whose prompt is not all in; if none of it is, it begins with what is known of its beginning."""
        filling = next((r for r in self.running if r.state is None or r.missing), None)
        if filling is None or filling.state is not None:
            return filling
        filling.state, filling.head, filling.mtp = self._known_beginning(filling) or (self.target.start(), None, None)
        if not filling.num_new:
            filling.cached_tokens = filling.state.num_tokens
        if self.head is not None and filling.head is None:
            filling.head = DSparkDrafter(self.head, self.target, runner=self.runner)
        if self.mtp is not None and not filling.state.num_tokens:
            filling.mtp = MtpDrafter(self.mtp, self.target, modules=self.modules)
        if filling.arbiter is not None:
            filling.arbiter.head, filling.arbiter.mtp = filling.head, filling.mtp  # a preempted request has new ones
        return filling

    def _known_beginning(self, r: Running) -> tuple[State, DSparkDrafter | None, MtpDrafter | None] | None:
        """What a prefix or a running request knows of this text, if there is room for it."""
        others = [other for other in self.running if other.state is not None]
        beside = [Entry(np.asarray(o.ids[: o.state.num_tokens]), o.state, o.head, mtp=o.mtp) for o in others if o.state]
        found = self.prefixes.find(r.ids[:-1], beside)
        if found is None:
            return None
        entry, size = found
        kept = self.prefixes.holds(entry)
        if not (kept and size == len(entry.ids)) and not (self._free(self._fork_bytes(entry)) and kept == self.prefixes.holds(entry)):
            return None
        try:
            return self.prefixes.take(entry, size)
        except Exception:  # memory, say: the prompt is computed anew
            log.warning("a known beginning cannot be copied", exc_info=True)
            return None

    def _prepare(self, r: Running) -> None:
        """Its planner and lookup, made when it first may draft, and told when the load has changed since it last did."""
        if self.load is None or not r.request.speculate:
            return
        if r.arbiter is None:
            acceptance, trust = usual_acceptance(r.head) if r.head else ([GUESSED], GUESS_TRUST)
            r.arbiter = Arbiter(r.head, r.lookup(), acceptance, trust, r.mtp)
            r.arbiter.plan_with(self.load, self.lengths, self.online, self.mtp_costs)
            r.arbiter.lookup.start()
            r.loads_seen = self.loads if self.load.running == 1 else -1
        if r.loads_seen != self.loads:
            r.arbiter.costs_changed()
            r.loads_seen = self.loads

    @property
    def held_bytes(self) -> int:
        """Keys, values and features of running requests and prefixes, each counted once. Pages of others that use this target count too."""
        pools = [] if self.target.runtime is None else [self.target.runtime.pool]
        pools += [] if self.runner is None else [pool for pool in (self.runner.pool, self.runner.feature_pool) if pool]
        pools += [self.modules.pool] if isinstance(self.modules, NativeChain) else []
        holders: list[Entry | Running] = [*self.prefixes.entries, *self.running]
        eager = [h.state for h in holders if h.state is not None and not isinstance(h.state.cache, Cache)]
        own = [h.head.context.own for h in holders if h.head is not None]
        contexts = {id(tensors[0]): tensors for tensors in own if tensors}  # forks borrow them
        return (
            sum(h.mtp.num_bytes for h in holders if h.mtp is not None)
            + sum(pool.used_bytes for pool in pools)
            + sum(state.num_bytes for state in eager)
            + sum(tensor.nbytes for tensors in contexts.values() for tensor in tensors)
        )

    def _free(self, needed: int) -> bool:
        """Are so many bytes free, beside what this step will take? Prefixes go for them, those unused for longest first."""
        while self.held_bytes + self.reserved + needed > self.cache_bytes:
            if not self.prefixes.drop_oldest():
                return False
        return True

    def _make_room(self, filling: Running | None, chunk: int) -> None:
        """For all that this step's pass will add: old prefixes go, then the newest request goes back to the queue."""
        while True:
            holding = [r for r in self.running if r.state is not None]
            # One whose prompt is known already, or is one token, decodes in the step that it comes in.
            growth = sum(self._growth(r, chunk if r is filling and r.missing else self.most_rows) for r in holding)
            if self._free(growth) or len(holding) <= 1:  # alone it fits: `submit` has seen to that
                self.reserved = growth
                return
            newest = max(holding, key=lambda r: r.number)
            self._release(newest)
            self.full = True
            with self.changed:  # in one of the two whenever `cancel` looks
                self.running.remove(newest)
                self.waiting.appendleft(newest)

    def _growth(self, r: Running, rows: int) -> int:
        """Bytes that a pass with so many rows of it takes, at most, and their features, which go into the context when they are many."""
        state, head = r.state, r.head
        assert state is not None
        size = self.state_bytes * rows + (0 if state.num_tokens else self.fixed_bytes)
        if isinstance(state.cache, Cache):
            size = state.cache.growth(state.num_tokens, state.num_tokens + rows)
        if head is not None:
            size += head.commit_bytes(rows)
            size += head.draft_bytes(rows) if head.pending.num_tokens + rows > PENDING_TOKENS else 0
        return size + (self.hidden_bytes * rows if r.mtp is not None else 0)

    def _fork_bytes(self, entry: Entry) -> int:
        """Bytes that a fork of it takes: a page that was begun, natively; eagerly all of it."""
        size = entry.state.cache.pool.page_bytes if isinstance(entry.state.cache, Cache) else entry.state.num_bytes
        if self.runner is not None:
            size += sum(pool.page_bytes for pool in (self.runner.pool, self.runner.feature_pool) if pool)
        size += self.modules.pool.page_bytes if isinstance(self.modules, NativeChain) else 0
        return size + (0 if entry.mtp is None else entry.mtp.num_bytes)

    def _most_bytes(self, num_tokens: int) -> int:
        """Bytes that one request of so many tokens takes at most, while it runs alone."""
        rows = num_tokens + self.most_rows
        size = self.fixed_bytes + self.state_bytes * (rows if self.target.runtime is None else PAGE_TOKENS * pages_for(rows))
        if self.runner is not None:
            empty = self.runner.start()
            size += self.runner.growth(empty, num_tokens) * (2 if self.runner.pool is None else 1)  # old and new while it is copied
            pending = min(num_tokens, PENDING_TOKENS + CHUNK_ALONE) + self.most_rows
            size += pages_for(pending) * (0 if self.runner.feature_pool is None else self.runner.feature_pool.page_bytes)
        # all hidden states of a text may wait for the first draft
        slots = PAGE_TOKENS * pages_for(rows) if isinstance(self.modules, NativeChain) else rows
        return size + self.hidden_bytes * rows + self.slot_bytes * slots

    def _guard(self, num_decoding: int) -> Guard | None:
        """Of this load. One request alone has its planner, which knows what it gained."""
        if num_decoding < 2 or self.lengths is not None or not self.speculate:
            return None
        return self.guards.setdefault(num_decoding.bit_length(), Guard(drafting=num_decoding < SURELY_PAYS))

    def _draft(self, decoding: Sequence[Running], freely: bool) -> list[Draft]:
        """Of every request: what it proposes itself, its modules' draft, or its head's, those of all in one pass.

        A head's pass for few costs nearly what one for all does: unless half of them want it, they wait for the next common probe."""
        drafts: list[Draft | None] = []
        for r in decoding:
            try:
                if freely:
                    self._prepare(r)
                drafts.append(r.propose(freely))
            except Exception:  # a draft may fail; the answer goes on without
                r.source = ""
                drafts.append(NOTHING)
        self.steps += 1
        wanting = sum(draft is None and r.source == "dspark" for r, draft in zip(decoding, drafts, strict=True))
        if self.lengths is None and 2 * wanting < len(decoding) and self.steps % PROBE_STEPS:
            few = [draft is None and r.source == "dspark" for r, draft in zip(decoding, drafts, strict=True)]
            drafts = [r.without_head() if wants else draft for r, draft, wants in zip(decoding, drafts, few, strict=True)]
        asks, needed = {}, 0
        for i, r in enumerate(decoding):
            if drafts[i] is not None:
                continue
            by_head = r.source == "dspark"
            more = r.head.draft_bytes() if by_head and r.head else r.mtp.draft_bytes(self.slot_bytes) if r.mtp else 0
            if not self._free(needed + more):
                drafts[i] = r.without_models()
            elif by_head and r.head is not None:
                asks[i], needed = Ask(r.head, r.ids, min(r.left - 1, r.head.block_size), r.request.law, r.noise.draft), needed + more
            else:
                drafts[i] = self._draft_with_modules(r)
        try:
            found = draft_many(list(asks.values()))
        except Exception:  # one of them: each for itself then
            found = [self._draft_alone(decoding[i], ask) for i, ask in asks.items()]
        by_request = dict(zip(asks, found, strict=True))
        return [by_request.get(i, NOTHING) if draft is None else draft for i, draft in enumerate(drafts)]

    def _draft_alone(self, r: Running, ask: Ask) -> Draft:
        try:
            return draft_many([ask])[0]
        except Exception:  # broken numbers in the head, say
            return NOTHING

    def _draft_with_modules(self, r: Running) -> Draft:
        assert r.mtp is not None and r.arbiter is not None
        try:
            return r.mtp.draft(r.ids, r.arbiter.to_draft(r.left - 1), r.request.law, r.noise.draft)
        except Exception:  # memory, say, or broken numbers
            if not r.mtp.whole:
                r.mtp = r.arbiter.mtp = None
            return NOTHING

    def _take_prompt(self, filling: Running, features_TMD: torch.Tensor) -> None:
        assert filling.state is not None
        self.target.rollback(filling.state, 0)
        for drafter in filling.models:
            drafter.commit(features_TMD)
        if filling.head is not None:
            self._bound_pending(filling.head)

    def _bound_pending(self, head: DSparkDrafter) -> None:
        """A head that does not draft costs nothing but the memory of features, up to a bound."""
        if head.pending.num_tokens > PENDING_TOKENS:
            head.flush()

    def _take(self, r: Running, draft: Draft, num_planned: int, scored: Any) -> Round | None:
        """One request's verdict; what its tokens are goes out. An error is its own."""
        try:
            new, sources, verdict = r.take(draft, num_planned, scored)
            self._emit(r, Tokens(new, sources, r.logprobs(new, scored)))
        except Exception as error:
            self._fail(r, error)
            return None
        if r.head is not None:
            self._bound_pending(r.head)
        return Round(r.source, len(draft.tokens), num_planned, verdict.num_accepted, draft.confidences)

    def _finish(self, r: Running, reason: str) -> None:
        """What is known of its text stays as a prefix for others."""
        if r.state is not None and r.state.num_tokens:
            try:
                self.prefixes.add(r.ids[: r.state.num_tokens], r.state, r.head, r.mtp)
            except Exception:  # memory, say: the answer is whole all the same
                log.warning("a finished text is not kept as a prefix", exc_info=True)
        self._leave(r)
        self._emit(r, r.finished(reason))

    def _fail(self, r: Running, error: Exception) -> None:
        self._leave(r)
        self._emit(r, Failed(error))

    def _leave(self, r: Running) -> None:
        if r in self.running:
            self.running.remove(r)
            self.full = False
        self._release(r)

    def _release(self, r: Running) -> None:
        r.state = r.head = r.mtp = None
        if r.arbiter is not None:
            r.arbiter.head = r.arbiter.mtp = None

    def _emit(self, r: Running, event: Event) -> None:
        try:
            r.on_event(event)
        except Exception:  # the listener's trouble; it will hear nothing more
            r.cancelled = True

    def _tell(
        self, elapsed: float, decoding: Sequence[Running], rounds: Sequence[Round | None], planned: Sequence[int], chunk: int,
        guard: Guard | None,
    ) -> None:  # fmt: skip
        """Account for the step: time saved against a plain step of the same load, as this machine runs now."""
        plain = 0.0
        num_new = sum(1 + done.accepted for done in rounds if done is not None)
        if self.load is not None and decoding:
            context = sum(len(r.ids) for r in decoding) // len(decoding)
            costs, one = self.load.at(context), self.load.plain(context)
            drafted = sum(costs.draft for done in rounds if done is not None and done.drafter == "dspark")
            if self.mtp_costs is not None:
                whole, most = self.mtp_costs.at(context), self.mtp.block_size if self.mtp else 0
                lengths = [done.drafted for done in rounds if done is not None and done.drafter == "mtp"]
                drafted += sum(whole.draft - whole.each * (most - length) for length in lengths)
            if not chunk:
                self.drift += NEWEST * (elapsed / (sum(costs.score(count) for count in planned) + drafted) - self.drift)
                if guard is not None:
                    guard.learn(num_new / len(decoding) * one / elapsed)
            one = one * self.drift if guard is None or guard.worth[False].weight == 0 else one / guard.worth[False].value
            if not any(done is not None and done.drafted for done in rounds):
                one = elapsed  # a plain step saves nothing, however long it took
            plain = one * num_new / len(decoding)
            for r, done in zip(decoding, rounds, strict=True):
                if done is not None and not chunk:
                    r.saved_seconds += 1e-3 * (one * (1 + done.accepted) - elapsed)
        if self.on_step is not None:
            known = [done for done in rounds if done is not None]
            tokens = self.held_bytes // self.token_bytes
            step = Step(
                sum(planned) + len(decoding) + chunk, chunk, elapsed, plain if not chunk else elapsed, known, len(self.running),
                len(self.waiting), sum(done.drafted == 0 for done in known), tokens, self.capacity,
            )  # fmt: skip
            try:
                self.on_step(step)
            except Exception:  # a listener's mistake is nobody's answer
                log.exception("on_step failed")

    def _measured_bytes(self) -> tuple[int, int, int]:
        """Of a request whatever its length (recurrent states, full windows); of a token's keys and values; and with the head's."""
        state, sizes = self.target.start(), []
        for _ in range(2):
            features = self.target.score(state, [0] * PAGE_TOKENS, num_logits=1).features_TMD
            self.target.rollback(state, 0)
            sizes.append(state.num_bytes)
        size = max(1, (sizes[1] - sizes[0]) // PAGE_TOKENS)
        fixed = max(0, sizes[0] - PAGE_TOKENS * size)
        if self.runner is None:
            return fixed, size, size
        assert self.head is not None
        feature_pool(self.runner, self.target.of_layers(features, self.head.config.target_layer_ids))
        return fixed, size, size + self.runner.token_bytes

    def _measured_mtp_bytes(self) -> tuple[int, int]:
        """Of a hidden state that waits for the modules, and of a slot in all their caches."""
        if self.mtp is None:
            return 0, 0
        drafter, ids = MtpDrafter(self.mtp, self.target, modules=self.modules), [0] * PAGE_TOKENS
        drafter.commit(self.target.prefill(self.target.start(), ids[:-1]))
        hidden = drafter.num_bytes // (PAGE_TOKENS - 1)
        drafter.draft(ids, drafter.block_size, GREEDY, torch.Generator())
        return hidden, drafter.slot_bytes


def free_memory() -> int:
    """Bytes that programs can have now."""
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError, IndexError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
