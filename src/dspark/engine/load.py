"""What a step costs while several requests run, as each request's planner sees it: its share of the step.

A pass over B requests with k drafted tokens each costs S(B, k) milliseconds, their drafts D(B) in one pass. A request's
share is the B-th part of both, so that one plain step of it costs S(B, 0) / B, and k tokens more are worth what they add to
everybody's step. With one request this is the table that planners go by anyway."""

import statistics
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial

import torch

from dspark.core.planner import Costs, CostTable, Mean
from dspark.core.sampling import GREEDY
from dspark.drafters.dspark import Ask, DSparkDrafter, draft_many
from dspark.head.context import make_runner
from dspark.head.head import Head
from dspark.profiling import ascending, cached_costs, forget, planning_costs
from dspark.target.native.cache import Cache
from dspark.target.target import Target

REQUESTS = (2, 3, 4, 6, 8, 12, 16, 24, 32)  # running together; between them the cost is taken to be linear
DRAFTED = (0, 1, 2, 3, 5, 7)  # tokens verified of each
MOST_ROWS = 96  # of a measured pass; past it each row costs what the last ones did
CONTEXT = 256
REPEATS = 3


class Load:
    """A planners' table that follows the number of running requests: `set_running` before each step."""

    CAUTION = 1.15  # times what drafts and their rows were measured to cost: gains are small here, and losses are everybody's
    LEAST = 0.5  # of a measured cost, whatever the context: a line through two points is not to be trusted far below them

    def __init__(self, alone: CostTable, together: dict[int, Costs]):
        self.alone, self.together = alone, dict(sorted(together.items()))
        self.counts = list(self.together)
        self.running = 1
        self.shares: Costs | None = None
        first, last = alone.contexts[0], alone.contexts[-1]
        # Milliseconds that one token more of a text adds to each of its passes.
        self.per_token = (alone.at(last).plain - alone.at(first).plain) / (last - first) if last > first else 0.0

    def set_running(self, running: int) -> bool:
        """True if planners have to think again: twice as many requests, or half."""
        before, self.running = self.running, max(1, running)
        if self.running != before:
            self.shares = self._shares(self.running) if self.running > 1 and self.counts else None
        return self.running.bit_length() != before.bit_length()

    def at(self, context: int) -> Costs:
        if self.shares is None:
            return self.alone.at(context)
        longer = self.per_token * (context - CONTEXT)  # its own keys and values, however many rows read them
        return Costs(self.shares.draft, tuple(max(cost + longer, self.LEAST * cost) for cost in self.shares.rows))

    def plain(self, context: int) -> float:
        """Milliseconds of a step that gives every running request one token."""
        return self.at(context).plain * (self.running if self.shares else 1)

    def _shares(self, running: int) -> Costs:
        one = self.alone.at(CONTEXT)
        counts = [1, *self.counts]
        above = min(bisect_right(counts, running), len(counts) - 1)
        low, high = counts[above - 1], counts[above]
        first, second = (one if n == 1 else self.together[n] for n in (low, high))
        share = (running - low) / (high - low)  # beyond the last count too

        def between(a: float, b: float) -> float:
            return (a + share * (b - a)) / running

        rows = [between(first.score(k), second.score(k)) for k in range(len(one.rows))]
        rows = [rows[0] + self.CAUTION * (cost - rows[0]) for cost in ascending(rows)]
        return Costs(self.CAUTION * between(first.draft, second.draft), tuple(rows))


class Guard:
    """Whether drafting pays while several requests run, by the clock: what one step brought in each of two modes, drafting as
    planned and plainly, in plain steps' worth. The better one is in force; now and then the other is looked at for a few steps,
    ever more seldom while the verdict stays. One guard for each doubling of the load.

    Planners go by costs that were measured once; this is for what they do not know, the rest of the machine among it. Steps that
    are over decide, so the law of no answer is touched."""

    LOOK, STAYS = 6, (48, 1536)  # steps: in the mode that is not in force; in the other one between two looks, at first and at most

    def __init__(self, drafting: bool = True) -> None:
        self.worth = {True: Mean(1 / 64, 1.0, 0.0), False: Mean(1 / 64, 1.0, 0.0)}
        self.in_force, self.looking = drafting, False
        self.stay = self.left = self.STAYS[0]

    @property
    def drafting(self) -> bool:
        return self.in_force != self.looking

    def learn(self, worth: float) -> None:
        """Of the step that is over, in the present mode."""
        self.worth[self.drafting].add(worth)
        self.left -= 1
        if self.left > 0:
            return
        if not self.looking:
            self.looking, self.left = True, self.LOOK
            return
        self.looking = False
        better = self.worth[True].value > self.worth[False].value
        self.stay = min(4 * self.stay, self.STAYS[1]) if better == self.in_force else self.STAYS[0]
        self.in_force, self.left = better, self.stay


def measured_load(target: Target, head: Head | None, most_running: int, most_rows: int, say: Callable[[str], None]) -> Load:
    """The load's costs on this machine: from the user's cache, or measured now (seconds, once)."""
    alone = planning_costs(target, head, most_rows, say)
    counts = [n for n in REQUESTS if n < most_running] + ([most_running] if most_running > 1 else [])
    if not counts:
        return Load(alone, {})

    def measure() -> CostTable:
        say("measuring what requests cost together on this machine (once for each pair of target and head, a few seconds)")
        return CostTable(tuple(counts), tuple(measure_together(target, head, counts, most_rows)))

    table = cached_costs(target, head, {"requests": counts, "rows": most_rows}, measure)
    return Load(alone, dict(zip(table.contexts, table.costs, strict=True)))


def measure_together(target: Target, head: Head | None, counts: Sequence[int], most_rows: int) -> list[Costs]:
    """Milliseconds of a pass over so many requests, by tokens verified of each, and of their drafts in one pass."""
    context = max(1, min(CONTEXT, target.max_context - most_rows - 1))
    ids = torch.randint(target.vocab_size, (context + 1,), generator=torch.Generator().manual_seed(0)).tolist()
    runner = None if head is None else make_runner(head, target)
    if head is not None:
        target.need(head.config.target_layer_ids)
    first = target.start()
    features = target.prefill(first, ids[:-1])
    forks = [target.fork(first, context) for _ in range(counts[-1])]
    states = [first if fork is None else fork for fork in forks]
    for state in states:
        unshared(state.cache, context)
    drafters: list[DSparkDrafter] = []
    if head is not None and runner is not None:
        drafters = [DSparkDrafter(head, target, runner=runner)]
        drafters[0].commit(features)
        drafters[0].flush()
        for _ in states[1:]:
            drafters.append(DSparkDrafter(head, target, runner=runner))
            drafters[-1].context = drafters[0].context.fork(context)
            unshared(drafters[-1].context.kv, context)
    found = []
    for count in counts:
        drafted = [k for k in DRAFTED if k < most_rows and (k == 0 or count * (k + 1) <= MOST_ROWS)]
        rows = {k: timed(partial(one_pass, target, states[:count], ids, k)) for k in drafted}
        rate = (rows[drafted[-1]] - rows[drafted[0]]) / max(1, drafted[-1]) if len(drafted) > 1 else rows[0]
        cost_of = [extended(rows, drafted, k, rate) for k in range(most_rows)]
        draft = timed(partial(one_draft, drafters[:count], ids)) if drafters else 0.0
        found.append(Costs(draft, ascending(cost_of)))
    return found


def unshared(cache: object, num_tokens: int) -> None:
    """Requests seldom read the same keys and values: a copy of its own, if it shares pages."""
    if isinstance(cache, Cache):
        cache.reserve(0, num_tokens)


def extended(rows: dict[int, float], drafted: Sequence[int], k: int, rate: float) -> float:
    """Between measured counts linear; past the last one, at its rate."""
    if k >= drafted[-1]:
        return rows[drafted[-1]] + rate * (k - drafted[-1])
    above = next(i for i, n in enumerate(drafted) if n > k)
    low, high = drafted[above - 1], drafted[above]
    return rows[low] + (rows[high] - rows[low]) * (k - low) / (high - low)


def timed(run: Callable[[], None]) -> float:
    times = []
    for repeat in range(REPEATS + 1):  # the first one warms up
        begin = time.perf_counter()
        run()
        if repeat:
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def one_pass(target: Target, states: Sequence, ids: Sequence[int], drafted: int) -> None:
    target.score_many([(state, ids[: drafted + 1], drafted + 1) for state in states])
    for state in states:
        forget(target, state, ids[: drafted + 1])


def one_draft(drafters: Sequence[DSparkDrafter], ids: Sequence[int]) -> None:
    generator = torch.Generator()
    draft_many([Ask(drafter, ids, drafter.block_size, GREEDY, generator) for drafter in drafters])
