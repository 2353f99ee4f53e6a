"""Counting rounds: what came of them second by second, and the figures that say whether speculation works.

Pure functions and records; no clock, no lock, no Prometheus."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from dspark.engine.request import Round, Step

BINS = 20  # of equal width, as in the calibration of a head
LAST_POSITION = 16  # positions beyond it are counted as one, "17+": predicted text may draft far
SPECULATED = ("drafted", "verified", "judged", "accepted")

# (drafter, drafted, verified, accepted) -> rounds that went so. One entry a round is cheap, and all figures by position follow.
Outcomes = Counter[tuple[str, int, int, int]]


@dataclass
class Second:
    """What the steps of one second did. `running` and `waiting` are as at its end."""

    outcomes: Outcomes = field(default_factory=Counter)
    steps: int = 0
    rows: int = 0
    prompt_rows: int = 0
    milliseconds: float = 0.0
    plain_milliseconds: float = 0.0
    request_steps: int = 0
    parked_steps: int = 0
    running: int = 0
    waiting: int = 0

    def add(self, step: Step) -> None:
        for r in step.rounds:
            self.outcomes[r.drafter, r.drafted, r.verified, r.accepted] += 1
        self.steps += 1
        self.rows += step.rows
        self.prompt_rows += step.prompt_rows
        self.milliseconds += step.milliseconds
        self.plain_milliseconds += step.plain_milliseconds
        self.request_steps += step.running
        self.parked_steps += step.parked
        self.running, self.waiting = step.running, step.waiting

    def merge(self, other: "Second") -> None:
        """Add what `other` counted; its queues are the newer ones."""
        self.outcomes.update(other.outcomes)
        for name in ("steps", "rows", "prompt_rows", "milliseconds", "plain_milliseconds", "request_steps", "parked_steps"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.running, self.waiting = other.running, other.waiting

    @property
    def saved_milliseconds(self) -> float:
        return self.plain_milliseconds - self.milliseconds


def total(seconds: Iterable[Second]) -> Second:
    whole = Second()
    for second in seconds:
        whole.merge(second)
    return whole


def num_judged(verified: int, accepted: int) -> int:
    """Drafted tokens that acceptance was decided for: those that stood and the one that did not. Tokens after a rejected
    one were verified in vain and say nothing."""
    return min(accepted + 1, verified)


def tau(outcomes: Outcomes) -> float | None:
    """Tokens per round, the target's own included; None before the first."""
    rounds = outcomes.total()
    return 1 + sum(accepted * n for (_, _, _, accepted), n in outcomes.items()) / rounds if rounds else None


def by_source(outcomes: Outcomes) -> dict[str, int]:
    """Tokens by how they came (`SOURCES`)."""
    found = dict.fromkeys(("accepted", "corrected", "bonus", "plain"), 0)
    for (_, _, verified, accepted), n in outcomes.items():
        found["accepted"] += accepted * n
        found["plain" if verified == 0 else "bonus" if accepted == verified else "corrected"] += n
    return found


def by_drafter(outcomes: Outcomes) -> dict[str, int]:
    found: Counter[str] = Counter()
    for (drafter, _, _, _), n in outcomes.items():
        found[drafter or "none"] += n
    return found


def by_position(outcomes: Outcomes) -> dict[str, dict[int, dict[str, int]]]:
    """drafter -> position from 1 -> tokens drafted, verified, judged, accepted there."""
    found: dict[str, dict[int, dict[str, int]]] = {}
    for (drafter, drafted, verified, accepted), n in outcomes.items():
        positions = found.setdefault(drafter or "none", {}) if drafted else {}
        for name, count in zip(SPECULATED, (drafted, verified, num_judged(verified, accepted), accepted), strict=True):
            for position in range(1, count + 1):
                positions.setdefault(min(position, LAST_POSITION + 1), dict.fromkeys(SPECULATED, 0))[name] += n
    return {drafter: dict(sorted(positions.items())) for drafter, positions in found.items()}


def judgements(r: Round) -> Iterable[tuple[float, bool]]:
    """(confidence, accepted) of each judged token of a round; of those with a confidence from 0 to 1."""
    judged = islice(r.confidences or (), num_judged(r.verified, r.accepted))
    return ((c, k < r.accepted) for k, c in enumerate(judged) if 0 <= c <= 1)


def calibration_error(judged: Sequence[tuple[float, bool]]) -> float | None:
    """Expected calibration error: mean confidence and share accepted differ by so much in a bin, weighted by its tokens."""
    off = [0.0] * BINS
    for confidence, accepted in judged:
        off[min(int(confidence * BINS), BINS - 1)] += confidence - accepted
    return sum(map(abs, off)) / len(judged) if judged else None


def chance_of_so_few(accepted: int, judged: int, acceptance: float) -> float:
    """P(X <= accepted), X binomial: how likely so few tokens are accepted where each has this chance (at most 0.5)."""
    term = (1 - acceptance) ** judged
    found = 0.0
    for k in range(accepted + 1):
        found += term
        term *= (judged - k) / (k + 1) * acceptance / (1 - acceptance)
    return min(found, 1.0)
