"""What one request asks of the engine, and what it hears back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dspark.core.sampling import GREEDY, Law

# Where a token came from: a draft that stood, the target's own instead of a rejected one, the target's own after a
# draft that stood entirely, or a round without a draft.
SOURCES = ("accepted", "corrected", "bonus", "plain")


@dataclass(frozen=True)
class Request:
    """One text to continue.

    With a `seed` the answer depends on nothing but the request: not on other requests, plans or drafts; without one it
    is drawn anew each time. `predicted_ids` is what the answer is expected to resemble, proposed where it fits.
    `propose(ids)` names tokens that a grammar expects after `ids` (prompt and answer so far); like all
    drafts they are verified. `logprobs` asks for that many alternatives beside each token's own (0: none but its own)."""

    prompt_ids: Sequence[int]
    max_new_tokens: int
    law: Law = GREEDY
    seed: int | None = None
    stop: tuple[str, ...] = ()
    eos_ids: frozenset[int] | None = None  # None: the target's
    speculate: bool = True
    predicted_ids: Sequence[int] = ()
    propose: Callable[[Sequence[int]], list[int]] | None = None
    logprobs: int | None = None


@dataclass(frozen=True)
class Logprob:
    """Natural log-probability of a token under the target's softmax, before any sampling setting, and the best alternatives'
    (id, log-probability), best first."""

    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Tokens:
    """New tokens of one step, final, in order; the end token included. One of `SOURCES` for each, and its `Logprob` if asked."""

    ids: list[int]
    sources: list[str]
    logprobs: list[Logprob] | None = None


@dataclass(frozen=True)
class Finished:
    """The last thing heard of a request. `reason`: stop (end token or stop string), length, cancelled.

    Counts of tokens: of the prompt, of those found in the prefix cache, of the answer, drafted, verified, accepted;
    `rounds` is target passes that decoded; seconds until the first token and in all, from `submit`; `saved_seconds` is what
    the answer's tokens would have cost one by one at this load, less what they did."""

    reason: str
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    rounds: int
    drafted: int
    verified: int
    accepted: int
    first_token_seconds: float
    seconds: float
    saved_seconds: float


@dataclass(frozen=True)
class Failed:
    """The request ended in an error, which is `UserError` if it is the request's own."""

    error: Exception


Event = Tokens | Finished | Failed


@dataclass(frozen=True)
class Round:
    """One request's part in a step, for metrics: what was drafted by whom ("dspark", "mtp", "lookup", "prediction", "grammar", ""), how
    much was verified and accepted, and the calibrated confidences of the drafted tokens (None: no opinion)."""

    drafter: str
    drafted: int
    verified: int
    accepted: int
    confidences: list[float] | None


@dataclass(frozen=True)
class Step:
    """One target pass: rows in it, of which prompt rows; milliseconds it took with its drafts, and what the same tokens were
    expected to cost without drafts; requests running and waiting; cached tokens held, and how many fit."""

    rows: int
    prompt_rows: int
    milliseconds: float
    plain_milliseconds: float
    rounds: list[Round]
    running: int
    waiting: int
    parked: int
    cache_tokens: int
    cache_capacity: int
