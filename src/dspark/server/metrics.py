"""What a server measures: Prometheus text for operators, JSON for the page. docs/metrics.md says what the numbers mean."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from statistics import median

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dspark.core.calibration import Calibration
from dspark.engine.request import Failed, Finished, Step
from dspark.errors import UserError
from dspark.server import tally
from dspark.server.canary import RESULTS
from dspark.server.tally import SPECULATED, Second

log = logging.getLogger(__name__)

POINTS = 120  # whole seconds kept
RECENT = 10  # of them, for what the page shows as "now"
JUDGED = 4096  # tokens the calibration error is measured on
FIRST = 512  # first tokens the alarm looks at
# The alarm rings when so few accepted first tokens would be a one-in-a-million event if the head had half its card's
# acceptance. Half, because texts differ; a million, because it is asked each second, and rounds of one text are alike.
FAR_BELOW = 0.5
ALARM_CHANCE = 1e-6

ENDS = ("stop", "length", "cancelled", "refused", "failed")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
REQUEST_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


def card_of(calibration: Calibration | None, provenance: dict | None = None) -> dict | None:
    """A head's card for `Metrics`: {"acceptance": [by position]}, of the law with the lowest. From its calibration, which was
    measured by real decoding; else from its provenance.json; None without either."""
    if calibration is not None:
        laws = [list(fit.acceptance) for fit in calibration.fits]
    else:
        held_out = (provenance or {}).get("held_out_teacher_forced", {})
        laws = [found for name, found in held_out.items() if name.startswith("acceptance_")]
    return {"acceptance": [min(position) for position in zip(*laws, strict=True)]} if laws else None


class Metrics(Collector):
    """Listens to an engine and its requests; safe to call from any thread. `card` is that of the head (`card_of`); without
    one there is no collapse alarm. `clock` gives seconds.

    Of one step `on_step` is to be called before the `on_finished` of requests that it ended, so that an idle engine, which makes no
    steps, is not shown with its last requests."""

    def __init__(self, card: dict | None, clock: Callable[[], float] = time.monotonic):
        self.card, self.clock, self.start = card, clock, clock()
        self.lock = threading.Lock()
        self.past = Second()  # all whole seconds so far
        self.seconds: deque[tuple[Second, float]] = deque(maxlen=POINTS)  # each with the milliseconds saved since the start
        self.second, self.index = Second(), 0
        self.step: Step | None = None  # the last one
        self.judged: deque[tuple[float, bool]] = deque(maxlen=JUDGED)
        self.firsts: deque[bool] = deque(maxlen=FIRST)
        self.first_token_seconds: deque[float] = deque(maxlen=256)
        self.ringing = False

        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        self.rows = self.histogram("decode_rows_per_step", "Rows of a target pass that decode: anchors and drafted tokens.", ROWS)
        self.first_token = self.histogram("time_to_first_token_seconds", "From submission to the first token.", FIRST_TOKEN_SECONDS)
        self.between_tokens = self.histogram(
            "inter_token_seconds", "Between tokens of an answer; those of one step share its time.", TOKEN_SECONDS
        )
        self.request = self.histogram("request_seconds", "From submission to the end.", REQUEST_SECONDS)
        self.ends = self.counter("requests", "Requests by how they ended.", "end", ENDS)
        self.prompts = self.counter("prompt_tokens", "Prompt tokens, and whether the prefix cache held them.", "cached", ("true", "false"))
        self.canary = self.counter("canary_checks", "Greedy answers decoded again without drafts.", "result", RESULTS)

    def histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"dspark_{name}", text, buckets=buckets, registry=self.registry)

    def counter(self, name: str, text: str, label: str, values: tuple[str, ...]) -> Counter:
        """A counter that is 0 for every value of its label from the start, so that a first event is seen as an increase."""
        counter = Counter(f"dspark_{name}", text, [label], registry=self.registry)
        for value in values:
            counter.labels(value)
        return counter

    # -- what is heard

    def on_step(self, step: Step) -> None:
        with self.lock:
            self.advance()
            self.second.add(step)
            self.step = step
            for r in step.rounds:
                if r.drafter == "dspark" and r.verified:
                    self.firsts.append(r.accepted > 0)
                    self.judged.extend(tally.judgements(r))
        if step.rows > step.prompt_rows:
            self.rows.observe(step.rows - step.prompt_rows)

    def on_tokens(self, count: int, seconds_since_last: float | None) -> None:
        """`count` tokens of an answer came so long after the ones before; None for its first ones, which have a metric of their own."""
        if seconds_since_last is not None:
            for _ in range(count):
                self.between_tokens.observe(seconds_since_last / count)

    def on_finished(self, finished: Finished) -> None:
        self.ends.labels(finished.reason).inc()
        self.prompts.labels("true").inc(finished.cached_tokens)
        self.prompts.labels("false").inc(finished.prompt_tokens - finished.cached_tokens)
        self.request.observe(finished.seconds)
        if finished.new_tokens:
            self.first_token.observe(finished.first_token_seconds)
        with self.lock:
            self.left()
            if finished.new_tokens:
                self.first_token_seconds.append(finished.first_token_seconds)

    def on_failed(self, failed: Failed) -> None:
        self.ends.labels("refused" if isinstance(failed.error, UserError) else "failed").inc()
        with self.lock:
            self.left()

    def on_canary(self, result: str) -> None:
        """One of `canary.RESULTS`."""
        self.canary.labels(result).inc()

    def left(self) -> None:
        """A request is gone: correct the last step's count, which no step may follow. Holds the lock."""
        self.advance()
        self.second.running = max(0, self.second.running - 1)

    def advance(self) -> None:
        """Close the seconds that are over. Holds the lock."""
        index = int(self.clock() - self.start)
        if index == self.index:
            return
        self.past.merge(self.second)
        for n in range(min(index - self.index, POINTS + 1)):
            self.seconds.append((self.second if n == 0 else self.quiet(), self.past.saved_milliseconds))
        self.second, self.index = self.quiet(), index
        self.look_for_collapse()

    def quiet(self) -> Second:
        """A second without steps, as busy as the last one was left."""
        return Second(running=self.second.running, waiting=self.second.waiting)

    # -- the alarm

    def look_for_collapse(self) -> None:
        """Compare the head's first tokens with its card; say so in the log when that changes. Holds the lock."""
        if self.card is None:
            return
        expected, accepted, judged = self.card["acceptance"][0], sum(self.firsts), len(self.firsts)
        ringing = tally.chance_of_so_few(accepted, judged, FAR_BELOW * expected) < ALARM_CHANCE
        if ringing != self.ringing:
            found = f"{accepted} of the head's last {judged} first tokens were accepted; its card says {expected:.0%}"
            if ringing:
                log.warning("drafts have collapsed: %s. docs/metrics.md says what to do", found)
            else:
                log.info("drafts have recovered: %s", found)
        self.ringing = ringing

    # -- what is told

    def render(self) -> bytes:
        """Prometheus text."""
        return generate_latest(self.registry)

    def state(self) -> tuple[Second, list[tuple[Second, float]], list[tuple[float, bool]]]:
        """All so far, the last whole seconds each with the milliseconds saved until its end, judged tokens."""
        with self.lock:
            self.advance()
            return tally.total((self.past, self.second)), list(self.seconds), list(self.judged)

    def collect(self) -> Iterator[Metric]:
        """What is counted here rather than by the library, whose counters would cost more a step than they may."""
        whole, seconds, judged = self.state()

        def gauge(name: str, text: str, value: float | None) -> Metric:
            return GaugeMetricFamily(f"dspark_{name}", text, value=math.nan if value is None else value)

        def counter(name: str, text: str, values: Mapping[str, float], label: str = "") -> Metric:
            family = CounterMetricFamily(f"dspark_{name}", text, labels=[label] if label else [])
            for key, value in values.items():
                family.add_metric([key] if label else [], value)
            return family

        yield counter("steps", "Target passes.", {"": whole.steps})
        yield counter("rows", "Rows of target passes.", {"prompt": whole.prompt_rows, "decode": whole.rows - whole.prompt_rows}, "kind")
        yield counter("step_seconds", "Time of target passes and their drafts.", {"": whole.milliseconds / 1000})
        yield counter("plain_step_seconds", "What the same tokens were expected to cost plainly.", {"": whole.plain_milliseconds / 1000})
        yield gauge("saved_seconds", "Plain time less time taken; negative where speculation lost.", whole.saved_milliseconds / 1000)
        yield counter("rounds", "Rounds by who drafted.", tally.by_drafter(whole.outcomes), "drafter")
        yield counter("tokens", "New tokens by how they came.", tally.by_source(whole.outcomes), "source")
        yield from self.positions(whole)
        minute = tally.total(second for second, _ in seconds[-60:])
        yield gauge("tokens_per_round", "Tau of the last minute.", tally.tau(minute.outcomes))
        steps = {"true": whole.parked_steps, "false": whole.request_steps - whole.parked_steps}
        yield counter("request_steps", "Requests summed over steps, and whether speculation was parked for them.", steps, "parked")
        yield gauge("calibration_error_ratio", f"Expected calibration error, last {JUDGED} tokens.", tally.calibration_error(judged))
        yield gauge("first_token_acceptance_ratio", f"Of the head's last {FIRST} first tokens.", self.acceptance())
        if self.card is not None:
            yield gauge("card_first_token_acceptance_ratio", "What the head's card says.", self.card["acceptance"][0])
            yield gauge("collapse_alarm", "1 while acceptance is far below the card.", float(self.ringing))
        yield gauge("requests_running", "Requests that decode.", whole.running)
        yield gauge("requests_waiting", "Requests that wait for a place.", whole.waiting)
        step = self.step
        yield gauge("requests_parked", "Requests of the last step without speculation.", min(step.parked, whole.running) if step else 0)
        yield gauge("cache_tokens", "Cached tokens held.", step.cache_tokens if step else 0)
        yield gauge("cache_capacity_tokens", "Cached tokens that fit.", step.cache_capacity if step else None)

    def positions(self, whole: Second) -> Iterator[Metric]:
        texts = ("Tokens drafted.", "Tokens verified.", "Verified tokens up to the first rejected one.", "Tokens that stood.")
        found = tally.by_position(whole.outcomes)
        for name, text in zip(SPECULATED, texts, strict=True):
            family = CounterMetricFamily(f"dspark_{name}_tokens", text, labels=["drafter", "position"])
            for drafter, positions in found.items():
                for position, counts in positions.items():
                    family.add_metric([drafter, label(position)], counts[name])
            yield family

    def acceptance(self) -> float | None:
        with self.lock:
            return sum(self.firsts) / len(self.firsts) if self.firsts else None

    def snapshot(self) -> dict:
        """For the page, JSON: `now` (means of the last 10 whole seconds), `totals` (since the start), `positions` (by
        drafter, last 120 seconds), `series` (the last 120 whole seconds, oldest first; null where nothing happened), `alarm`, `canary`."""
        whole, seconds, judged = self.state()
        recent = tally.total(second for second, _ in seconds[-RECENT:])
        step = self.step
        return {
            "now": {
                "tau": rounded(tally.tau(recent.outcomes)),
                "tokens_per_second": rounded(tokens(recent) / max(1, len(seconds[-RECENT:]))),
                "rows_per_step": rounded(rows_per_step(recent)),
                "parked_share": rounded(recent.parked_steps / recent.request_steps if recent.request_steps else None),
                "running": whole.running,
                "waiting": whole.waiting,
                "cache_tokens": step.cache_tokens if step else 0,
                "cache_capacity": step.cache_capacity if step else None,
                "calibration_error": rounded(tally.calibration_error(judged)),
                "first_token_seconds": rounded(self.first_token_median()),
            },
            "totals": {
                "saved_milliseconds": rounded(whole.saved_milliseconds),
                "tau": rounded(tally.tau(whole.outcomes)),
                "rounds": tally.by_drafter(whole.outcomes),
                "tokens": tally.by_source(whole.outcomes),
                "requests": counts(self.ends),
            },
            "positions": self.acceptance_by_position(tally.total(second for second, _ in seconds)),
            "series": {
                "tau": [rounded(tally.tau(second.outcomes)) for second, _ in seconds],
                "tokens_per_second": [tokens(second) for second, _ in seconds],
                "saved_milliseconds": [rounded(saved) for _, saved in seconds],
                "rows_per_step": [rounded(rows_per_step(second)) for second, _ in seconds],
                "running": [second.running for second, _ in seconds],
                "waiting": [second.waiting for second, _ in seconds],
            },
            "points": POINTS,
            "spacing_seconds": 1,
            "alarm": None if self.card is None else {
                "ringing": self.ringing,
                "acceptance": rounded(self.acceptance()),
                "card": rounded(self.card["acceptance"][0]),
                "judged": len(self.firsts),
            },
            "canary": counts(self.canary),
        }  # fmt: skip

    def acceptance_by_position(self, seconds: Second) -> dict[str, list[dict]]:
        """drafter -> [{position, drafted, verified, judged, accepted, acceptance, card}]; acceptance given that all before were
        accepted, and what the card says of it (null but for the head)."""
        return {
            drafter: [
                {
                    "position": label(position),
                    **found,
                    "acceptance": rounded(found["accepted"] / found["judged"] if found["judged"] else None),
                    "card": rounded(self.expected(drafter, position)),
                }
                for position, found in positions.items()
            ]
            for drafter, positions in tally.by_position(seconds.outcomes).items()
        }

    def expected(self, drafter: str, position: int) -> float | None:
        card = self.card["acceptance"] if self.card and drafter == "dspark" else []
        return card[position - 1] if position <= len(card) else None

    def first_token_median(self) -> float | None:
        with self.lock:
            return median(self.first_token_seconds) if self.first_token_seconds else None


def label(position: int) -> str:
    return str(position) if position <= tally.LAST_POSITION else f"{position}+"


def tokens(second: Second) -> int:
    return sum((accepted + 1) * n for (_, _, _, accepted), n in second.outcomes.items())


def rows_per_step(second: Second) -> float | None:
    """Decoding rows; None without a step."""
    return (second.rows - second.prompt_rows) / second.steps if second.steps else None


def counts(counter: Counter) -> dict[str, int]:
    return {
        next(iter(sample.labels.values())): int(sample.value)
        for family in counter.collect()
        for sample in family.samples
        if sample.name.endswith("_total")
    }


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
