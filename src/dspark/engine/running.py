"""A request under way: its text, its state in the target and the head, and how it has fared."""

import time
from collections.abc import Callable, Sequence
from secrets import randbits

import torch

from dspark.core.decode import Judge, Scored, judge_coupled
from dspark.core.sampling import Coupled, Streams
from dspark.core.verifier import Draft, FewTokens, Verdict
from dspark.drafters import Arbiter, DSparkDrafter, MtpDrafter, PromptLookup
from dspark.drafters.arbiter import LOOKUP_TOKENS
from dspark.engine.request import Event, Finished, Logprob, Request
from dspark.generation import stopping_rule
from dspark.target.target import State, Target

FORCED_BEFORE_HEAD = 3  # forced tokens that are drafted instead of a block of the head (measured: bench/log.md)
NOTHING = Draft([], torch.empty(0, 0))


class Running:
    """`ids` is prompt and answer so far; the target's state holds all of them but the last, once the prompt is in.

    A request that is preempted loses its state and nothing else: the same tokens follow."""

    def __init__(self, number: int, request: Request, on_event: Callable[[Event], None], target: Target):
        self.number, self.request, self.on_event, self.target = number, request, on_event, target
        self.ids, self.num_prompt = list(request.prompt_ids), len(request.prompt_ids)
        self.state: State | None = None
        self.head: DSparkDrafter | None = None
        self.mtp: MtpDrafter | None = None
        self.arbiter: Arbiter | None = None
        self.loads_seen = -1  # the change of load that its planner was last told of
        self.noise: Streams | Coupled = Streams(randbits(32)) if request.seed is None else Coupled(request.seed)
        self.judge: Judge = target.judge if request.seed is None else judge_coupled
        self.ends = stopping_rule(target, target.eos_ids if request.eos_ids is None else request.eos_ids, request.stop)
        self.cancelled = False
        self.stopped = False
        self.cached_tokens = self.rounds = self.drafted = self.verified = self.accepted = 0
        self.submitted = time.perf_counter()
        self.first_token: float | None = None
        self.saved_seconds = 0.0
        self.source = ""  # who made the draft of the present round
        self.planning = False  # did its planner have a say in it

    @property
    def num_new(self) -> int:
        return len(self.ids) - self.num_prompt

    @property
    def left(self) -> int:
        """Tokens that it may still get."""
        return self.request.max_new_tokens - self.num_new

    @property
    def missing(self) -> int:
        """Tokens that the target has yet to see before the next round."""
        return len(self.ids) - 1 - (0 if self.state is None else self.state.num_tokens)

    @property
    def models(self) -> list[DSparkDrafter | MtpDrafter]:
        return [drafter for drafter in (self.head, self.mtp) if drafter is not None]

    def lookup(self) -> PromptLookup:
        """Prompt lookup, for which an expected answer stands before the prompt, behind the prompt's own ending."""
        predicted = self.request.predicted_ids
        before = [*self.request.prompt_ids[-16:], *predicted] if predicted else ()
        return PromptLookup(self.target.vocab_size, LOOKUP_TOKENS, self.target.device, before)

    def propose(self, freely: bool = True) -> Draft | None:
        """A draft that costs nothing, an empty one if nobody shall draft; None: the model that `source` names shall. Not `freely`: what
        a grammar forces, and nothing else."""
        # The round yields at least one token besides the accepted ones: more would never be used.
        limit = self.left - 1
        self.source, self.planning = "", False
        if limit <= 0 or not self.request.speculate:
            return NOTHING
        forced = self.request.propose(self.ids)[: min(limit, LOOKUP_TOKENS)] if self.request.propose else []
        # Models draft under the grammar too, and go on where it leaves a choice.
        if len(forced) >= (FORCED_BEFORE_HEAD if self.models else 1):
            self.source = "grammar"
            return Draft(forced, FewTokens.certain(forced, self.target.vocab_size, self.target.device))
        if self.arbiter is None or not freely:
            return NOTHING
        self.planning = True
        return self.noted(self.arbiter.propose(self.ids, min(limit, self.arbiter.block_size)))

    def without_head(self) -> Draft | None:
        """What it proposes if its head shall not draft, as from `propose`."""
        return self.noted(NOTHING if self.arbiter is None else self.arbiter.without_head())

    def without_models(self) -> Draft:
        """What it proposes if no model shall draft."""
        draft = NOTHING if self.arbiter is None else self.arbiter.without_models()
        self.noted(draft)
        return draft

    def noted(self, draft: Draft | None) -> Draft | None:
        """This proposal; `source` says whose it is."""
        if draft is None:
            assert self.arbiter is not None
            self.source = "dspark" if self.arbiter.drafting is self.head else "mtp"
        else:
            self.source = self.lookup_name if draft.tokens else ""
        return draft

    @property
    def lookup_name(self) -> str:
        return "prediction" if self.request.predicted_ids else "lookup"

    def plan(self, draft: Draft) -> int:
        """How many of its tokens to verify."""
        if self.source in ("", "grammar") or self.arbiter is None:
            return len(draft.tokens)
        return draft.planned(self.arbiter.plan)

    def take(self, draft: Draft, num_planned: int, scored: Scored) -> tuple[list[int], list[str], Verdict]:
        """Verify, commit and learn; the new tokens and how each came."""
        state = self.state
        assert state is not None
        self.target.refuse_broken(scored, len(self.ids) - 1)
        verdict = self.judge(self.request.law, self.ids, draft, num_planned, scored, self.noise)
        new: list[int] = []
        for token in [*draft.tokens[: verdict.num_accepted], verdict.next_token]:
            self.ids.append(token)
            new.append(token)
            self.stopped = self.ends(self.ids[self.num_prompt :])
            if self.stopped:
                break
        # Once, to where the text ends, which may be within the draft: a sliding window cannot be rolled back again later.
        kept = min(verdict.num_accepted, len(new))
        self.target.rollback(state, num_planned - kept)
        for drafter in self.models:
            drafter.commit(scored.features_TMD[: kept + 1])
        if self.arbiter is not None and self.planning:
            self.arbiter.learn(len(draft.tokens), num_planned, verdict.num_accepted)
        last = "plain" if num_planned == 0 else "bonus" if verdict.num_accepted == num_planned else "corrected"
        sources = [*["accepted"] * verdict.num_accepted, last][: len(new)]
        self.rounds += 1
        self.drafted += len(draft.tokens)
        self.verified += num_planned
        self.accepted += verdict.num_accepted
        if self.first_token is None:
            self.first_token = time.perf_counter()
        return new, sources, verdict

    def logprobs(self, new: Sequence[int], scored: Scored) -> list[Logprob] | None:
        """Of the new tokens, under the target's own law."""
        count = self.request.logprobs
        if count is None:
            return None
        log_TV = scored.logits_TV[: len(new)].log_softmax(-1)
        found = []
        for row_V, token in zip(log_TV, new, strict=True):
            top = row_V.topk(count) if count else None
            best = [] if top is None else list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            found.append(Logprob(float(row_V[token]), best))
        return found

    def finished(self, reason: str) -> Finished:
        now = time.perf_counter()
        return Finished(
            reason, self.num_prompt, self.cached_tokens, self.num_new, self.rounds, self.drafted, self.verified, self.accepted,
            (self.first_token or now) - self.submitted, now - self.submitted, self.saved_seconds,
        )  # fmt: skip
