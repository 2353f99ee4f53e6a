"""The decoding loop: draft, plan, score, verify, commit.

It knows the target and the drafter by what they do only, so the tests run it on tables. `judge_by_law` is
the reference; `judge_fast` skips what cannot matter, and must say the same."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dspark.core.planner import Always, Planner
from dspark.core.sampling import Coupled, Law, Streams, best, probs
from dspark.core.verifier import Draft, Verdict, verify, verify_greedy


@dataclass(frozen=True)
class Scored:
    """One target pass: `logits_TV` in float32, the tapped states `features_TMD`, and each row's best token, the first
    of equals, if the runtime has found them on its way."""

    logits_TV: torch.Tensor
    features_TMD: torch.Tensor
    best_T: list[int] | None = None


class Scorer(Protocol):
    """What decoding needs of a target."""

    def start(self) -> Any: ...
    def prefill(self, state: Any, tokens: Sequence[int]) -> torch.Tensor: ...
    def score(self, state: Any, tokens: Sequence[int]) -> Scored: ...
    def rollback(self, state: Any, num_rejected: int) -> None: ...


class Drafter(Protocol):
    """Whatever proposes tokens. `draft` may return none; `commit` hands over the features of
    tokens that are now final, in order, the anchor not among them."""

    block_size: int

    def start(self) -> None: ...
    def draft(self, ids: Sequence[int], limit: int, law: Law, noise: torch.Generator | Coupled) -> Draft: ...
    def commit(self, features_TMD: torch.Tensor) -> None: ...


@dataclass(frozen=True)
class Round:
    """What one round did. `tokens` are its new tokens: accepted ones, then the target's own.

    `confidences`, `margins` and `uncalibrated` are the draft's, one a drafted token; None where the drafter has no opinion."""

    tokens: list[int]
    num_drafted: int
    num_planned: int
    num_accepted: int
    confidences: list[float] | None = None
    margins: list[float] | None = None
    uncalibrated: list[float] | None = None


# (law, ids, draft, num_planned, scored, streams) -> what stands, and the token after it
Judge = Callable[[Law, list[int], Draft, int, Scored, Any], Verdict]


def judge_by_law(law: Law, ids: list[int], draft: Draft, num_planned: int, scored: Scored, streams: Streams) -> Verdict:
    """What stands of the first `num_planned` drafted tokens after `ids`, given the target's pass over them. The reference."""
    target_probs = row_laws(law, ids, draft.tokens[:num_planned], scored.logits_TV)
    accept = Streams.uniforms(streams.accept, num_planned)
    return verify(target_probs, draft, accept, *Streams.uniforms(streams.recover, 1))


def judge_fast(law: Law, ids: list[int], draft: Draft, num_planned: int, scored: Scored, streams: Streams) -> Verdict:
    """The verdict of `judge_by_law`. Where the law is a plain argmax it is not formed; where processors make it, row by row as it is read."""
    drafted = draft.tokens[:num_planned]
    if law.greedy and not law.processors:
        return verify_greedy(scored.best_T or best(scored.logits_TV), drafted)
    if not law.processors:
        return judge_by_law(law, ids, draft, num_planned, scored, streams)
    accept = Streams.uniforms(streams.accept, num_planned)
    return verify(LawsWhenRead(law, ids, drafted, scored.logits_TV), draft, accept, *Streams.uniforms(streams.recover, 1))


def judge_coupled(law: Law, ids: list[int], draft: Draft, num_planned: int, scored: Scored, streams: Coupled) -> Verdict:
    """The verdict when each token depends on the seed and its position alone: a drafted token stands iff it is the target's."""
    drafted = draft.tokens[:num_planned]
    if law.greedy and not law.processors:
        return verify_greedy(scored.best_T or best(scored.logits_TV), drafted)
    rows = LawsWhenRead(law, ids, drafted, scored.logits_TV)
    for k in range(num_planned + 1):
        token = streams.choose(rows[k], len(ids) + k, scored.logits_TV.shape[-1])
        if k == num_planned or token != drafted[k]:
            break
    return Verdict(k, token)


@dataclass(frozen=True)
class LawsWhenRead:
    """The rows of `row_laws`, each formed when it is read."""

    law: Law
    ids: list[int]
    drafted: list[int]
    logits_TV: torch.Tensor

    def __len__(self) -> int:
        return len(self.logits_TV)

    def __getitem__(self, k: int) -> torch.Tensor:
        return probs(self.law, [self.ids + self.drafted[:k] if self.law.processors else ()], self.logits_TV[k : k + 1])[0]


def decode(
    target: Scorer,
    drafter: Drafter,
    prompt_ids: Sequence[int],
    law: Law,
    streams: Streams | Coupled,
    max_new_tokens: int,
    stop: Callable[[list[int]], bool] = lambda new_ids: False,
    planner: Planner = Always(),  # noqa: B008  frozen, without state
    judge: Judge = judge_fast,
) -> Iterator[Round]:
    """Yield rounds until `max_new_tokens` or until `stop(new_ids)` says that the last token ends the text.

    The last prompt token is the first anchor, so that every new token comes from a round. The
    new tokens have exactly the law of sampling the target one by one (T = 0: are the same)."""
    ids, num_prompt = list(prompt_ids), len(prompt_ids)
    state = target.start()
    drafter.start()
    drafter.commit(target.prefill(state, ids[:-1]))
    finished = False
    while not finished and len(ids) - num_prompt < max_new_tokens:
        # The round yields at least one token besides the accepted ones: more would never be used.
        limit = min(drafter.block_size, num_prompt + max_new_tokens - len(ids) - 1)
        draft = drafter.draft(ids, planner.ask(limit, len(ids)), law, streams.draft)
        num_planned = draft.planned(planner.plan)
        scored = target.score(state, [ids[-1], *draft.tokens[:num_planned]])
        verdict = judge(law, ids, draft, num_planned, scored, streams)
        target.rollback(state, num_planned - verdict.num_accepted)
        drafter.commit(scored.features_TMD[: verdict.num_accepted + 1])
        planner.learn(len(draft.tokens), num_planned, verdict.num_accepted)
        new = []
        for token in [*draft.tokens[: verdict.num_accepted], verdict.next_token]:
            ids.append(token)
            new.append(token)
            finished = stop(ids[num_prompt:])
            if finished:
                break
        yield Round(new, len(draft.tokens), num_planned, verdict.num_accepted, draft.confidences, draft.margins, draft.uncalibrated)


def row_laws(law: Law, ids: list[int], drafted: list[int], logits_TV: torch.Tensor) -> torch.Tensor:
    """The target's law in each row of a pass over the anchor and `drafted` tokens [T, V].

    Processors (a grammar, say) see only texts that can exist: after a drafted token of probability 0,
    which is rejected for certain, the remaining rows are never read and repeat the last law."""
    if not law.processors:
        return probs(law, [()] * len(logits_TV), logits_TV)
    rows: list[torch.Tensor] = []
    for k in range(len(logits_TV)):
        rows.append(probs(law, [ids + drafted[:k]], logits_TV[k : k + 1]))
        if k < len(drafted) and rows[k][0, drafted[k]] == 0:
            break
    return torch.cat([*rows, *[rows[-1]] * (len(logits_TV) - len(rows))])
