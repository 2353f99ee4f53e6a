"""Machines for a load, from replays: arithmetic on a cost curve, no measurement.

A machine always has so many requests at work. A request takes its share of the steps that write its answer, and its prompt costs a pass of
as many rows as it has tokens, during which nobody else's answer goes on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil
from statistics import fmean, median

from dspark.core.planner import Costs
from dspark.measure.replay import CostsAt, Outcome, StepCosts, between
from dspark.measure.trace import Trace


def as_curve(alone: Costs, together: Mapping[int, Costs]) -> dict[str, list]:
    """What one request and several together cost, as the points of a file of costs: passes by all their rows (the median where several
    splits give as many), drafts by requests."""
    all_costs = {1: alone, **together}
    found: dict[int, list[float]] = {}
    for count, costs in all_costs.items():
        for k, milliseconds in enumerate(costs.rows):
            found.setdefault(count * (k + 1), []).append(milliseconds)
    rows = sorted((count, median(each)) for count, each in found.items())
    level = accumulate((milliseconds for _, milliseconds in rows), max)
    return {
        "rows": [[count, round(milliseconds, 3)] for (count, _), milliseconds in zip(rows, level, strict=True)],
        "drafts": [[count, round(costs.draft, 3)] for count, costs in sorted(all_costs.items())],
    }


@dataclass(frozen=True)
class Machines:
    """Of one replay: answers a second of one machine, tokens a second that each request gets, machines for the load (None: each
    request would get fewer tokens a second than asked for)."""

    plan: str
    num_requests: int
    answers_per_second: float
    pace: float
    machines: int | None


def machines(trace: Trace, outcome: Outcome, costs_at: CostsAt, load: float, least_pace: float = 0.0) -> Machines:
    """For `load` answers a second, of the lengths in the trace."""
    answer_tokens = fmean(request.num_tokens for request in trace.requests)
    decoding = outcome.milliseconds / outcome.num_tokens * answer_tokens
    prompt = fmean(reading(costs_at(request.num_prompt), request.num_prompt) for request in trace.requests)
    rate = 1e3 / (decoding + prompt)
    pace = rate * answer_tokens / outcome.num_requests
    return Machines(outcome.plan, outcome.num_requests, rate, pace, ceil(load / rate) if pace >= least_pace else None)


def reading(costs: StepCosts, num_prompt: int) -> float:
    """Milliseconds of a prompt's pass; its last token is the first step's."""
    return between(costs.rows, num_prompt - 1) if num_prompt > 1 else 0.0


def fleet_table(found: Sequence[Machines], load: float, least_pace: float) -> str:
    lines = [f"{'requests':>8} {'plan':<14} {'answers/s':>10} {'tokens/s each':>14} {'machines':>9}"]
    for f in found:
        count = "too slow" if f.machines is None else f"{f.machines}"
        lines.append(f"{f.num_requests:>8} {f.plan:<14} {f.answers_per_second:>10.3f} {f.pace:>14.1f} {count:>9}")
    for name, replayed, missing in (
        ("without drafts", [f for f in found if f.plan == "plain"], "plain decoding was not replayed"),
        ("with drafts", [f for f in found if f.plan != "plain"], "no plan that drafts was replayed"),
    ):
        fitting = [f for f in replayed if f.machines is not None]
        if fitting:
            best = best_of(fitting)
            said = f"{best[0].machines} machine{'' if best[0].machines == 1 else 's'} ({'; or '.join(ways(best))})"
        else:
            said = f"no batch of these gives each request {least_pace:g} tokens/s" if replayed else f"{missing} (--plans)"
        lines.append(f"{load:g} answers/s {name}: {said}")
    return "\n".join(lines)


def best_of(fitting: Sequence[Machines]) -> list[Machines]:
    """Those that need the fewest machines and, of these, give each request the most tokens a second: all that the table shows alike."""
    ranks = [(f.machines, -round(f.pace, 1)) for f in fitting if f.machines is not None]
    return [f for f in fitting if (f.machines, -round(f.pace, 1)) == min(ranks)]


def ways(best: Sequence[Machines]) -> list[str]:
    """The plans, those of one number of requests together."""
    plans: dict[int, list[str]] = {}
    for f in best:
        plans.setdefault(f.num_requests, []).append(f.plan)
    return [f"{' = '.join(names)}, {count} requests at once" for count, names in plans.items()]
