"""How much to speculate: whether to draft at all, and how many drafted tokens to verify.

A plan is exact when the decision to verify x_k depends on nothing drawn at or after x_k.
`confidences[k]` looks at x_1..x_{k-1} only (paper eq. 7), so any rule that walks the block from
the front and stops at the first position it dislikes is exact. A rule that looks ahead and
then cuts is not: its bias is the failing control of our tests (paper, appendix A). Costs, and
what earlier rounds gave, may enter anywhere: no token of this block decides them.
This module imports no torch."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, takewhile
from operator import mul
from typing import Protocol

from dspark.core.calibration import OnlineCalibration

# (confidences, limit) -> number of tokens to verify, 0..limit
Plan = Callable[[Sequence[float], int], int]


class Planner(Protocol):
    """What the decoding loop asks in each round. `num_tokens` is the length of the text so far; `confidences` is None
    for a drafter that has no opinion."""

    def ask(self, limit: int, num_tokens: int) -> int:
        """How many tokens to draft, at most `limit`; 0 skips the draft pass."""
        ...

    def plan(self, confidences: Sequence[float] | None, limit: int) -> int:
        """How many of the first `limit` drafted tokens to verify."""
        ...

    def learn(self, num_drafted: int, num_planned: int, num_accepted: int) -> None:
        """What came of the round."""
        ...


# Costs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """Milliseconds on this machine: of a whole draft, and of a target pass of 1, 2, ... rows; and how much less a draft takes for each
    token that it leaves out: nothing, where a draft is one pass."""

    draft: float
    rows: tuple[float, ...]
    each: float = 0.0

    def score(self, num_planned: int) -> float:
        """A target pass over the anchor and so many tokens; past the last measured count, in proportion to it."""
        last = len(self.rows) - 1
        return self.rows[num_planned] if num_planned <= last else self.rows[last] * (num_planned + 1) / (last + 1)

    @property
    def plain(self) -> float:
        """One step of plain decoding."""
        return self.rows[0]


@dataclass(frozen=True)
class CostTable:
    """Costs measured after contexts of these lengths, ascending; between them, linear."""

    contexts: tuple[int, ...]
    costs: tuple[Costs, ...]

    def at(self, context: int) -> Costs:
        context = min(max(context, self.contexts[0]), self.contexts[-1])
        above = next(i for i, length in enumerate(self.contexts) if length >= context)
        if self.contexts[above] == context:
            return self.costs[above]
        low, high = self.costs[above - 1], self.costs[above]
        share = (context - self.contexts[above - 1]) / (self.contexts[above] - self.contexts[above - 1])
        return Costs(
            low.draft + share * (high.draft - low.draft),
            tuple(a + share * (b - a) for a, b in zip(low.rows, high.rows, strict=True)),
            low.each + share * (high.each - low.each),
        )


class Table(Protocol):
    """Where planners read what a round costs now."""

    def at(self, context: int) -> Costs:
        """After so many tokens."""
        ...


@dataclass(frozen=True)
class DraftedBy:
    """The costs of a table's passes beside the draft of another one: of several drafters on one target."""

    table: Table
    drafts: Table

    def at(self, context: int) -> Costs:
        drafts = self.drafts.at(context)
        return replace(self.table.at(context), draft=drafts.draft, each=drafts.each)


@dataclass(frozen=True)
class Seeded:
    """The costs of a table whose drafts begin with the first token of another one's, which could have so many more."""

    table: Table
    seeds: Table
    num_more: int

    def at(self, context: int) -> Costs:
        costs, seeds = self.table.at(context), self.seeds.at(context)
        return replace(costs, draft=costs.draft + seeds.draft - self.num_more * seeds.each)


@dataclass(frozen=True)
class WithoutDrafts:
    """The costs of proposals that no model makes."""

    table: Table

    def at(self, context: int) -> Costs:
        return replace(self.table.at(context), draft=0.0, each=0.0)


# Plans of one block ----------------------------------------------------------------------


def fixed(confidences: Sequence[float], limit: int) -> int:
    """Verify everything that was drafted and may still be used."""
    return limit


def threshold(least: float) -> Plan:
    """Stop in front of the first token whose survival, the product of confidences, is below `least`."""

    def plan(confidences: Sequence[float], limit: int) -> int:
        survival = 1.0
        for k in range(limit):
            survival *= confidences[k]
            if survival < least:
                return k
        return limit

    return plan


def early_stop(costs: Costs) -> Plan:
    """The paper's Algorithm 1 for one request: verify one token more while that raises tokens per millisecond of the round."""

    def plan(confidences: Sequence[float], limit: int) -> int:
        survival, tau, best = 1.0, 1.0, 1 / (costs.draft + costs.score(0))
        for k in range(limit):
            survival *= confidences[k]
            tau += survival
            rate = tau / (costs.draft + costs.score(k + 1))
            if rate <= best:
                return k
            best = rate
        return limit

    return plan


def worth(costs: Costs, rate: float, later: Sequence[float]) -> Plan:
    """Verify on while some longer prefix is expected to bring more tokens than its milliseconds are worth at `rate`.

    `rate` (tokens a millisecond) is what the time would bring otherwise: the draft is paid already, so the round's
    own average is not what counts. Chances of tokens past the next one are its survival times `later`, the usual
    acceptance by position: their own confidences depend on tokens not yet decided. So a stair in the costs, where the
    next token alone does not pay but the next four do, is no trap, and the plan stays exact."""

    def plan(confidences: Sequence[float], limit: int) -> int:
        survival = 1.0
        for k in range(limit):
            survival *= confidences[k]
            chance, gain = survival, 0.0
            for end in range(k + 1, limit + 1):
                gain += chance
                if gain > rate * (costs.score(end) - costs.score(k)):
                    break
                chance *= later[end] if end < limit else 0.0
            else:
                return k
        return limit

    return plan


# Plans of many requests that share a target pass --------------------------------------------
#
# `survivals[r][k]` is the chance that the first k+1 drafted tokens of request r all stand, a product of confidences, so it
# never rises along k. A decision about a token reads only candidates ranked before it: of its own request those are
# earlier positions, and other requests' tokens are independent of it. So both plans keep the joint law of all outputs.


def survivals_of(confidences: Sequence[float]) -> list[float]:
    """The chance that the first 1, 2, ... tokens all stand."""
    return list(accumulate(confidences, mul))


# rows of the pass, each request's anchor among them -> steps a second
Speed = Callable[[int], float]


def ranked(survivals: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """(request, position) of every drafted token, the likeliest first; of equals the first request's, from its front."""
    everything = [(r, k) for r, chances in enumerate(survivals) for k in range(len(chances))]
    return sorted(everything, key=lambda candidate: -survivals[candidate[0]][candidate[1]])


def throughputs(survivals: Sequence[Sequence[float]], steps_per_second: Speed) -> Iterator[float]:
    """Expected tokens a second (the paper's Theta) when none, the best one, the best two, ... tokens are verified."""
    tau, num_rows = float(len(survivals)), len(survivals)
    yield tau * steps_per_second(num_rows)
    for r, k in ranked(survivals):
        tau, num_rows = tau + survivals[r][k], num_rows + 1
        yield tau * steps_per_second(num_rows)


def admit(survivals: Sequence[Sequence[float]], steps_per_second: Speed) -> list[int]:
    """Tokens to verify by request: the paper's Algorithm 1, which stops at the first token that does not raise Theta."""
    rising = takewhile(lambda pair: pair[1] > pair[0], pairwise(throughputs(survivals, steps_per_second)))
    return cut(survivals, sum(1 for _ in rising))


def budget(survivals: Sequence[Sequence[float]], steps_per_second: Speed) -> int:
    """How many tokens to verify in all for the highest Theta, the least of equals. It looks at every survival, so they must
    be those of steps that are over (paper, section 5.2: two steps old)."""
    thetas = list(throughputs(survivals, steps_per_second))
    return thetas.index(max(thetas))


def cut(survivals: Sequence[Sequence[float]], num_tokens: int) -> list[int]:
    """Tokens to verify by request: the likeliest `num_tokens` of all."""
    chosen = Counter(r for r, _ in ranked(survivals)[:num_tokens])
    return [chosen[r] for r in range(len(survivals))]


# Planners --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Always:
    """Draft in every round, `length` tokens at most, and verify by one plan."""

    rule: Plan = fixed
    length: int | None = None

    def ask(self, limit: int, num_tokens: int) -> int:
        return limit if self.length is None else min(limit, self.length)

    def plan(self, confidences: Sequence[float] | None, limit: int) -> int:
        return self.rule([1.0] * limit if confidences is None else confidences, limit)

    def learn(self, num_drafted: int, num_planned: int, num_accepted: int) -> None:
        pass


def always(spec: str) -> Always | None:
    """The planner without memory or costs that `spec` names: fixed, length:N or threshold:P; None if it names no such."""
    name, _, value = spec.partition(":")
    try:
        if name == "length" and int(value) >= 0:
            return Always(length=int(value))
        if name == "threshold" and 0 <= float(value) <= 1:
            return Always(threshold(float(value)))
    except ValueError:
        return None
    return Always() if spec == "fixed" else None


class Costed:
    """Drafts in every round; `costs` are those of the text's present length."""

    def __init__(self, table: Table):
        self.table = table
        self.costs = table.at(0)

    def ask(self, limit: int, num_tokens: int) -> int:
        self.costs = self.table.at(num_tokens)
        return limit

    def learn(self, num_drafted: int, num_planned: int, num_accepted: int) -> None:
        pass


class EarlyStop(Costed):
    """The paper's Algorithm 1 in every round."""

    def plan(self, confidences: Sequence[float] | None, limit: int) -> int:
        return early_stop(self.costs)([1.0] * limit if confidences is None else confidences, limit)


class Lagged(Costed):
    """The paper's section 5.2 for one request: this round's budget is the best length by the confidences of two rounds ago.

    They cannot depend on the tokens being decided, so all of them may be looked at: no stair in the costs is a trap."""

    DELAY = 2

    def __init__(self, table: Table):
        super().__init__(table)
        self.seen: list[Sequence[float]] = []

    def plan(self, confidences: Sequence[float] | None, limit: int) -> int:
        old = self.seen[0] if len(self.seen) == self.DELAY else None
        self.seen = [*self.seen, [1.0] * limit if confidences is None else confidences][-self.DELAY :]
        return limit if old is None else min(limit, budget([survivals_of(old)], self.steps_per_second))

    def steps_per_second(self, num_rows: int) -> float:
        return 1e3 / (self.costs.draft + self.costs.score(num_rows - 1))


@dataclass
class Mean:
    """A running mean in which a new value weighs `newest` once there are many; `weight` is what it has seen so far."""

    newest: float
    value: float
    weight: float

    def add(self, value: float) -> None:
        self.weight = (1 - self.newest) * self.weight + 1
        self.value += (value - self.value) / self.weight


class Pace:
    """Tokens per plain step's time, over the last few hundred rounds: what time is worth; at least 1, which plain decoding gives."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.tokens, self.cost = Mean(Adaptive.LONG, 1.0, 1.0), Mean(Adaptive.LONG, 1.0, 1.0)

    def add(self, num_tokens: int, cost: float) -> None:
        self.tokens.add(num_tokens)
        self.cost.add(cost)

    @property
    def value(self) -> float:
        return max(1.0, self.tokens.value / self.cost.value)


class Adaptive:
    """Speculate while it gains time, as much as gains most; else park, and probe now and then whether it pays again.

    A drafted round's gain is its tokens less its cost in plain steps. Requests park when it has lost clearly of late, or
    at all over long. While parked, one round is drafted after a pause, which doubles with every probe that lost; after
    one that gained, the next round is drafted too.
    Every decision rests on rounds that are over, on costs, and within a block on `worth`: the law of the output is kept.

    `expected` is the acceptance by position to start from, worth `trust` rounds; `pace` is shared by planners that take turns;
    `online`, if given, corrects confidences by what was accepted so far."""

    LATELY, LONG = 1 / 64, 1 / 512
    CLEARLY = -0.1  # plain steps a round: one deviation of the mean of 64 rounds that break even
    HOPE = 0.1  # at least expected of a head at first, so that it is tried
    BORROWED = 8.0  # rounds' worth of trust in a position's neighbour
    LONGER = 16  # in one of so many drafted rounds a draft of several passes has one more than pays, so that its chance stays known
    PAUSES = (2, 256)  # rounds between probes: at first, at most

    def __init__(
        self,
        table: Table,
        expected: Sequence[float],
        trust: float = 16.0,
        pace: Pace | None = None,
        online: OnlineCalibration | None = None,
    ):
        self.table, self.costs, self.pace, self.online = table, table.at(0), pace or Pace(), online
        self.num_tokens = self.asked = self.num_drafts = 0
        self.confidences: Sequence[float] | None = None  # of this round's draft, as the drafter gave them
        self.usual = [Mean(self.LATELY, chance, trust if k == 0 else 1.0) for k, chance in enumerate(expected)]
        self.trust = trust
        gain, cost, _ = self.best_round(expected)
        self.hope_for(max(gain, self.HOPE), cost)

    def best_round(self, acceptance: Sequence[float], pace: float = 1.0) -> tuple[float, float, int]:
        """Of the best number of verified tokens, with this acceptance by position: what it gains beyond what its time brings at this pace,
        what it costs, in plain steps, and how many they are."""
        survival, tau, best = 1.0, 1.0, (-math.inf, 0.0, 0)
        for k, chance in enumerate(acceptance, 1):
            survival *= chance
            tau += survival
            best = max(best, (tau - pace * self.cost(k, k), self.cost(k, k), -k))
        return best[0], best[1], -best[2]

    def hope_for(self, gain: float, cost: float) -> None:
        """Begin with these as the gain and cost of rounds so far."""
        self.lately, self.long = (Mean(newest, gain, self.trust) for newest in (self.LATELY, self.LONG))
        self.spent = Mean(self.LATELY, cost, self.trust)
        self.pause, self.wait = self.PAUSES[0], 0

    def costs_changed(self) -> None:
        """Drafting pays or not at the new costs; the acceptance that was seen says what to expect."""
        self.costs = self.table.at(self.num_tokens)
        gain, cost, _ = self.best_round(self.acceptance())
        self.hope_for(gain, cost)
        if self.parked:
            self.wait = self.pause = self.PAUSES[1] // 8

    @classmethod
    def untaught(cls, table: Table, block_size: int) -> "Adaptive":
        """For a drafter nobody has measured yet: a guess, worth a few rounds only."""
        return cls(table, [0.5] * block_size, trust=8)

    def cost(self, num_planned: int, num_drafted: int) -> float:
        """Of a drafted round, in plain steps."""
        left_out = max(0, len(self.usual) - num_drafted)
        return (self.costs.draft - self.costs.each * left_out + self.costs.score(num_planned)) / self.costs.plain

    @property
    def parked(self) -> bool:
        return self.lately.value < self.CLEARLY or self.long.value < 0

    @property
    def advantage(self) -> float:
        """Tokens that a drafted round brings beyond what its time brings at the present pace: the drafter with the most of it gives
        the most tokens a millisecond over all rounds."""
        return self.lately.value - (self.pace.value - 1) * self.spent.value

    def ask(self, limit: int, num_tokens: int) -> int:
        self.num_tokens, self.costs = num_tokens, self.table.at(num_tokens)
        self.asked = 0 if self.parked and self.wait > 0 else self.num_to_draft(limit)
        return self.asked

    def num_to_draft(self, limit: int) -> int:
        """All, where a draft is one pass; else as many as usually gain most."""
        if not self.costs.each or limit < 1:
            return limit
        _, _, num = self.best_round(self.acceptance()[:limit], self.pace.value)
        return min(limit, num + (self.num_drafts % self.LONGER == self.LONGER - 1))

    def plan(self, confidences: Sequence[float] | None, limit: int) -> int:
        if confidences is None and self.costs.each:
            return limit  # no more than these was asked for
        usual = self.acceptance()
        usual += usual[-1:] * (limit - len(usual))
        self.confidences = confidences
        if confidences is None:
            confidences = usual
        elif self.online is not None:
            confidences = self.online.adjust(confidences)
        planned = worth(self.costs, self.pace.value / self.costs.plain, usual)(confidences, limit)
        return max(planned, min(limit, 1)) if self.parked else planned  # a probe that verifies nothing teaches nothing

    def acceptance(self) -> list[float]:
        """The usual acceptance by position. One that short plans seldom reach is taken to be like the one before it."""
        chances = [self.usual[0].value]
        for mean in self.usual[1:]:
            chances.append((mean.weight * mean.value + self.BORROWED * chances[-1]) / (mean.weight + self.BORROWED))
        return chances

    def learn(self, num_drafted: int, num_planned: int, num_accepted: int) -> None:
        if num_drafted == 0:
            self.wait -= 1
            self.pace.add(1, 1.0)
            return
        self.num_drafts += 1
        cost = self.cost(num_planned, num_drafted)
        self.pace.add(num_accepted + 1, cost)
        self.spent.add(cost)
        self.judge(num_planned, num_accepted)
        self.settle(num_accepted + 1 - cost)

    def judge(self, num_planned: int, num_accepted: int) -> None:
        """Learn from what stood of a draft."""
        for k in range(min(num_planned, num_accepted + 1, len(self.usual))):
            self.usual[k].add(float(k < num_accepted))
        if self.online is not None and self.confidences is not None:
            self.online.learn(self.confidences, num_planned, num_accepted)

    def settle(self, gain: float, num_rounds: int = 1) -> None:
        """Learn from what so many drafted rounds gained on average, in plain steps: park or not, and how long until the
        next probe."""
        for mean in (self.lately, self.long):
            for _ in range(num_rounds):
                mean.add(gain)
        if gain > 0:
            self.pause, self.wait = self.PAUSES[0], 0
        else:
            self.wait = self.pause
            self.pause = min(2**num_rounds * self.pause, self.PAUSES[1]) if self.parked else self.PAUSES[0]
