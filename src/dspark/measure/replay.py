"""Planners at work on a recorded trace: what they would have done there, and what that would have cost. No model is run.

A draft's first n tokens are accepted as the recorded draft's were: min(n, accepted) of them. Where a plan verifies less
than was recorded, or skips a draft, the text goes on from a place where nothing was recorded. The approximation: rounds
of one text are taken as exchangeable. A draft takes the next recorded round not used yet, or the first that began at or
after the text's present length if that is further on; when a text runs out of rounds they begin again. No round's
outcome decides whether it is used, so none is favoured. Every planner writes the same texts, of the same lengths."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, islice, pairwise
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Protocol

from dspark.core.planner import Adaptive, Always, Costs, CostTable, admit, always, budget, cut, survivals_of
from dspark.errors import SettingError, TraceError
from dspark.limits import check_length
from dspark.measure.trace import Drafted, Request, Trace, number, whole
from dspark.prompts import read_json

PLANS = ("plain", "fixed", "length:N", "threshold:P", "early-stop", "lagged", "auto")
COMPARED = ("plain", "fixed", "early-stop", "lagged", "auto")
CONCURRENCY = (1, 4, 16, 64, 256)
EXAMPLE_COSTS = Path(__file__).parents[1] / "example_costs.json"
PLACE_TOKENS = 2000  # at least so many for each place of a batch, so that what a planner loses while it learns weighs little


# What a step costs -----------------------------------------------------------------------


@dataclass(frozen=True)
class StepCosts:
    """Milliseconds of a target pass by its rows, those of all requests, and of drafting by the number of requests drafted for.

    Points (count, milliseconds), ascending: linear between them, level before the first, in proportion past the last."""

    rows: tuple[tuple[int, float], ...]
    drafts: tuple[tuple[int, float], ...]

    def step(self, num_rows: int, num_drafted: int) -> float:
        return between(self.rows, num_rows) + (between(self.drafts, num_drafted) if num_drafted else 0.0)


# tokens before the step, the mean over requests -> its costs
CostsAt = Callable[[float], StepCosts]


def between(points: Sequence[tuple[int, float]], count: int) -> float:
    above = bisect_left(points, count, key=lambda point: point[0])
    if above == len(points):
        return points[-1][1] * count / points[-1][0]
    if above == 0 or points[above][0] == count:
        return points[above][1]
    (low, cost), (high, more) = points[above - 1], points[above]
    return cost + (more - cost) * (count - low) / (high - low)


def measured(table: CostTable) -> CostsAt:
    """The costs of a trace's machine. They were measured for one request: drafts for several are taken to run one by one."""

    def at(num_tokens: float) -> StepCosts:
        costs = table.at(int(num_tokens))
        return StepCosts(tuple(enumerate(costs.rows, 1)), ((1, costs.draft),))

    return at


def read_costs(path: Path) -> tuple[str, StepCosts]:
    """What a file of costs says about itself, and the costs: `{"about": text, "rows": [[count, ms], ...], "drafts": [...]}`.

    Raises `TraceError`."""
    hint = 'it holds {"about": "...", "rows": [[1, 10.0], [200, 10.0]], "drafts": [[1, 1.0]]}: counts ascending, milliseconds'
    record = read_json(path, TraceError, hint)
    try:
        if not isinstance(record["about"], str):
            raise ValueError("`about` is no text")
        return record["about"], StepCosts(as_points(record["rows"], 1e-9), as_points(record["drafts"], 0))
    except (KeyError, TypeError, ValueError) as error:
        raise TraceError(f"costs {path}: {f'no {error}' if isinstance(error, KeyError) else error}", hint) from error


def as_points(pairs: list, least: float) -> tuple[tuple[int, float], ...]:
    points = tuple((whole(count, 1), number(milliseconds, least)) for count, milliseconds in pairs)
    if not points or any(a[0] >= b[0] for a, b in pairwise(points)):
        raise ValueError("points need ascending counts")
    return points


# Planners of a step ----------------------------------------------------------------------


class StepPlanner(Protocol):
    """A planner of requests that share steps. Lists are by request."""

    def ask(self, limit: int, costs: StepCosts, num_requests: int, num_tokens: float) -> int:
        """How many tokens to draft for each request, at most `limit`; 0 skips the draft pass."""
        ...

    def plan(self, confidences: Sequence[Sequence[float]]) -> list[int]:
        """How many of each request's drafted tokens to verify."""
        ...

    def learn(self, planned: Sequence[int], accepted: Sequence[int]) -> None:
        """What came of the step; nothing in the lists when no draft was asked for."""
        ...


@dataclass
class Alike:
    """Every request by itself, by one planner without memory."""

    planner: Always

    def ask(self, limit: int, costs: StepCosts, num_requests: int, num_tokens: float) -> int:
        return self.planner.ask(limit, int(num_tokens))

    def plan(self, confidences: Sequence[Sequence[float]]) -> list[int]:
        return [self.planner.plan(each, len(each)) for each in confidences]

    def learn(self, planned: Sequence[int], accepted: Sequence[int]) -> None:
        pass


class Admitting:
    """The paper's Algorithm 1 over all requests of a step."""

    def ask(self, limit: int, costs: StepCosts, num_requests: int, num_tokens: float) -> int:
        self.steps_per_second = lambda num_rows: 1e3 / costs.step(num_rows, num_requests)
        return limit

    def plan(self, confidences: Sequence[Sequence[float]]) -> list[int]:
        return admit([survivals_of(each) for each in confidences], self.steps_per_second)

    def learn(self, planned: Sequence[int], accepted: Sequence[int]) -> None:
        pass


class Budgeted(Admitting):
    """The paper's section 5.2: the total is the best by the confidences of two steps ago (until there are any, that of
    Algorithm 1) and what the pass then holds for nothing, and the likeliest tokens get it."""

    DELAY = 2

    def __init__(self) -> None:
        self.seen: list[list[list[float]]] = []

    def plan(self, confidences: Sequence[Sequence[float]]) -> list[int]:
        old = self.seen[0] if len(self.seen) == self.DELAY else None
        survivals = [survivals_of(each) for each in confidences]
        self.seen = [*self.seen, survivals][-self.DELAY :]
        planned = admit(survivals, self.steps_per_second) if old is None else cut(survivals, budget(old, self.steps_per_second))
        return self.filled(planned, survivals)

    def filled(self, planned: list[int], survivals: Sequence[Sequence[float]]) -> list[int]:
        """With the tokens more that cost nothing."""
        total, rows = sum(planned), len(planned)
        most = sum(map(len, survivals))
        free = total
        while free < most and self.steps_per_second(rows + free + 1) >= self.steps_per_second(rows + total):
            free += 1
        return planned if free == total else cut(survivals, free)


class Alone:
    """One request by `Adaptive`, as it decodes."""

    def __init__(self, limit: int, costs: StepCosts):
        self.adaptive = Adaptive.untaught(share(costs, 1, limit), limit)

    def ask(self, limit: int, costs: StepCosts, num_requests: int, num_tokens: float) -> int:
        self.adaptive.table, self.limit = share(costs, 1, limit), limit
        return self.adaptive.ask(limit, int(num_tokens))

    def plan(self, confidences: Sequence[Sequence[float]]) -> list[int]:
        return [self.adaptive.plan(each, len(each)) for each in confidences]

    def learn(self, planned: Sequence[int], accepted: Sequence[int]) -> None:
        self.adaptive.learn(self.limit * bool(planned), sum(planned), sum(accepted))


class Together:
    """`Budgeted` where it gains time. Requests that share steps park and probe together, by `Adaptive`'s rule; what a step
    gained is told it as so many rounds as there are requests. A probe that lost much is not soon followed by another, and there is
    none where not even drafts that all stand would gain."""

    PROBING = 0.002  # of the time at most is lost by probing

    def __init__(self, limit: int, costs: StepCosts, num_requests: int):
        self.gate, self.budgeted = Adaptive.untaught(share(costs, num_requests, limit), limit), Budgeted()

    def ask(self, limit: int, costs: StepCosts, num_requests: int, num_tokens: float) -> int:
        self.costs, self.gate.table = costs, share(costs, num_requests, limit)
        self.budgeted.ask(limit, costs, num_requests, num_tokens)
        asked = self.gate.ask(limit, int(num_tokens))
        return asked if self.gate.best_round([1.0] * limit)[0] > 0 else 0

    def plan(self, confidences: Sequence[Sequence[float]]) -> list[int]:
        return self.budgeted.plan(confidences)

    def learn(self, planned: Sequence[int], accepted: Sequence[int]) -> None:
        num_requests = len(planned)
        if num_requests == 0:
            self.gate.wait -= 1
            return
        cost = self.costs.step(num_requests + sum(planned), num_requests) / self.costs.step(num_requests, 0)
        gain = fmean(accepted) + 1 - cost
        self.gate.settle(gain, num_requests)
        if self.gate.parked and gain < 0:
            self.gate.wait = max(self.gate.wait, ceil(-gain / self.PROBING))


def share(costs: StepCosts, num_requests: int, limit: int) -> CostTable:
    """What one of so many requests pays when each verifies 0 to `limit` tokens."""
    rows = tuple(costs.step(num_requests * (n + 1), 0) / num_requests for n in range(limit + 1))
    return CostTable((0,), (Costs(between(costs.drafts, num_requests) / num_requests, rows),))


def make_step_planner(name: str, limit: int, costs: StepCosts, num_requests: int) -> StepPlanner:
    """The planner that `name` says, one of `PLANS`. Raises `SettingError` for another, and for a length above `limit`."""
    simple = Always(length=0) if name == "plain" else always(name)
    if simple is not None:
        check_length(name, limit)
        return Alike(simple)
    if name == "early-stop":
        return Admitting()
    if name == "lagged":
        return Budgeted()
    if name == "auto":
        return Alone(limit, costs) if num_requests == 1 else Together(limit, costs, num_requests)
    raise SettingError(f"unknown plan {name!r}", f"choose from {', '.join(PLANS)}; N is a number of tokens, P a chance of survival")


# The replay ------------------------------------------------------------------------------


@dataclass
class Text:
    """A request on its way: how long its text is, and how many recorded rounds it has taken."""

    request: Request
    length: int = 0
    taken: int = 0

    def __post_init__(self) -> None:
        self.starts = list(accumulate((r.num_accepted + 1 for r in self.request.rounds[:-1]), initial=0))

    def begin_at(self, place: int, num_places: int) -> "Text":
        """Part of the way already, so that the first texts of a batch are not all at their beginning."""
        self.taken = len(self.starts) * place // num_places
        self.length = self.starts[self.taken]
        return self

    def draft(self) -> Drafted:
        """The next round not used yet, or the first that began no earlier than here; from the first again after the last."""
        rounds = self.request.rounds
        if self.taken < len(rounds):
            self.taken = max(self.taken, bisect_left(self.starts, self.length))
        self.taken += 1
        return rounds[(self.taken - 1) % len(rounds)]

    def grow(self, num_tokens: int) -> int:
        """Add these tokens, as far as the text goes; how many were added."""
        new = min(num_tokens, self.request.num_tokens - self.length)
        self.length += new
        return new


@dataclass
class Outcome:
    """Totals of a replay; steps count a draft and a target pass for all requests."""

    plan: str
    num_requests: int
    milliseconds: float = 0.0
    num_steps: int = 0
    num_drafted: int = 0  # steps with a draft pass
    num_planned: int = 0
    num_accepted: int = 0
    num_tokens: int = 0

    def figures(self) -> dict:
        """Tokens a second of all requests; by request and step, tokens (tau) and verified drafts (budget); the share of
        verified drafts accepted; the share of steps with a draft pass."""
        places = self.num_steps * self.num_requests
        return {
            "plan": self.plan,
            "requests": self.num_requests,
            "tokens_per_second": round(1e3 * self.num_tokens / self.milliseconds, 2),
            "tau": round(self.num_tokens / places, 3),
            "budget": round(self.num_planned / places, 3),
            "acceptance": round(self.num_accepted / self.num_planned, 3) if self.num_planned else None,
            "drafted": round(self.num_drafted / self.num_steps, 3),
        }


def replay(trace: Trace, plan: str, num_requests: int = 1, costs_at: CostsAt | None = None) -> Outcome:
    """Write the trace's texts by `plan`, so many at a time; when one is finished the next one takes its place.

    The clock stops when no text is left to take a place, so all steps are of full batches. Without `costs_at`, the costs
    are those of the trace's machine."""
    costs_at = measured(trace.costs) if costs_at is None else costs_at
    planner = make_step_planner(plan, trace.block_size, costs_at(0), num_requests)
    needed = num_requests * max(1, PLACE_TOKENS / fmean(request.num_tokens for request in trace.requests))
    queue = islice(cycle(trace.requests), len(trace.requests) * ceil(needed / len(trace.requests)))  # whole passes
    texts = [Text(request).begin_at(place, num_requests) for place, request in enumerate(islice(queue, num_requests))]
    outcome = Outcome(plan, num_requests)
    while True:
        step(texts, planner, trace.block_size, costs_at, outcome)
        for place, text in enumerate(texts):
            if text.length == text.request.num_tokens:
                following = next(queue, None)
                if following is None:
                    return outcome
                texts[place] = Text(following)


def step(texts: Sequence[Text], planner: StepPlanner, block_size: int, costs_at: CostsAt, outcome: Outcome) -> None:
    """One step of all texts, added to `outcome`."""
    context = fmean(text.request.num_prompt + text.length for text in texts)
    costs = costs_at(context)
    asked = planner.ask(block_size, costs, len(texts), context)
    drafts = [text.draft() for text in texts] if asked else []
    planned = planner.plan([draft.confidences[:asked] for draft in drafts]) if drafts else []
    accepted = [min(n, draft.num_accepted) for n, draft in zip(planned, drafts, strict=True)]
    planner.learn(planned, accepted)
    outcome.milliseconds += costs.step(len(texts) + sum(planned), len(drafts))
    outcome.num_steps += 1
    outcome.num_drafted += bool(drafts)
    outcome.num_planned += sum(planned)
    outcome.num_accepted += sum(accepted)
    outcome.num_tokens += sum(text.grow(n + 1) for text, n in zip(texts, accepted or [0] * len(texts), strict=True))


def table(outcomes: Sequence[Outcome]) -> str:
    """The figures for people, each plan beside plain decoding of as many requests where that was replayed."""
    lines = [f"{'requests':>8} {'plan':<14} {'tokens/s':>10} {'ratio':>6} {'tau':>6} {'budget':>7} {'accepted':>9} {'drafted':>8}"]
    figures = [outcome.figures() for outcome in outcomes]
    plain = {f["requests"]: f["tokens_per_second"] for f in figures if f["plan"] == "plain"}
    for f in figures:
        ratio = f"{f['tokens_per_second'] / plain[f['requests']]:.2f}" if f["requests"] in plain else "-"
        accepted = "-" if f["acceptance"] is None else f"{f['acceptance']:.0%}"
        lines.append(
            f"{f['requests']:>8} {f['plan']:<14} {f['tokens_per_second']:>10.1f} {ratio:>6} {f['tau']:>6.2f} {f['budget']:>7.2f} {accepted:>9} {f['drafted']:>8.0%}"
        )
    return "\n".join(lines)
