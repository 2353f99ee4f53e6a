"""Several drafters together: in each round the one that is expected to gain most time, or none.

They are the head, the target's multi-token-prediction modules, and prompt lookup, a predicted text among what it looks in. What is
expected comes from rounds that are over: for a model from its own, for a proposal of the lookup from those made after an
ending of the same size, that had gone on alike or not, was found again. No token of the coming block is looked at, so the output's law is kept. What models know of the
text follows every round, whoever drafts."""

from collections.abc import Sequence

import torch

from dspark.core.calibration import OnlineCalibration
from dspark.core.planner import Adaptive, Costs, CostTable, Pace, Planner, Table, WithoutDrafts
from dspark.core.sampling import Coupled, Law
from dspark.core.verifier import Draft
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.lookup import Found, PromptLookup
from dspark.drafters.mtp import MtpDrafter

# What to expect of a proposal before any was seen: the chance of its first token and of each after, as in 1,500 sampled answers of the demo target.
FOUND_AGAIN = {
    Found(2, False): (0.54, 0.7),
    Found(3, False): (0.63, 0.75),
    Found(4, False): (0.74, 0.8),
    Found(8, False): (0.86, 0.88),
    Found(16, False): (0.97, 0.96),
    Found(2, True): (0.27, 0.65),
    Found(3, True): (0.29, 0.7),
    Found(4, True): (0.37, 0.75),
    Found(8, True): (0.45, 0.85),
    Found(16, True): (0.71, 0.96),
}
LOOKUP_TOKENS = 15
# Costs of nobody's machine, for plans that do not ask what a round costs.
NOMINAL = CostTable((0,), (Costs(0.2, tuple(1 + 0.05 * k for k in range(LOOKUP_TOKENS + 1))),))
GUESSED, GUESS_TRUST = 0.5, 8.0  # chance of a token of a drafter that nobody has measured, and for how many rounds that counts


class Arbiter:
    """A drafter that is its own planner; `lengths`, if given, decides how many drafted tokens to verify instead.

    Without a head and modules there is the lookup alone. `expected` is the head's usual acceptance by position, worth `trust` rounds."""

    EXPLORE = 32  # in one of so many rounds with a choice another than the best is taken, in turn, so that estimates stay fresh

    def __init__(
        self, head: DSparkDrafter | None, lookup: PromptLookup, expected: Sequence[float], trust: float, mtp: MtpDrafter | None = None
    ):
        self.head, self.mtp, self.lookup, self.expected, self.trust = head, mtp, lookup, expected, trust
        self.block_size = max(drafter.block_size for drafter in (lookup, *self.models))
        self.plan_with(NOMINAL)

    @property
    def models(self) -> list[DSparkDrafter | MtpDrafter]:
        return [drafter for drafter in (self.head, self.mtp) if drafter is not None]

    def plan_with(self, table: Table, lengths: Planner | None = None, online: bool = False, mtp_table: Table | None = None) -> "Arbiter":
        """Forget what was learned, and go by these costs, the modules by `mtp_table` if it is given; `online`: and correct the head's
        confidences on the way."""
        self.lengths, self.pace = lengths, Pace()
        free = WithoutDrafts(table)
        corrected = OnlineCalibration(self.block_size) if online else None
        self.head_planner = Adaptive(table, self.expected, self.trust, self.pace, corrected)
        guess = [GUESSED] * (self.mtp.block_size if self.mtp else 1)
        self.mtp_planner = Adaptive(mtp_table or table, guess, GUESS_TRUST, self.pace)
        self.found_planners = {
            found: Adaptive(free, [first, *[later] * (self.lookup.block_size - 1)], trust=4, pace=self.pace)
            for found, (first, later) in FOUND_AGAIN.items()
        }
        self.chosen: Adaptive | None = None
        self.awake: list[Adaptive] = []
        self.found: list[int] = []
        self.num_choices = 0
        return self

    # As a drafter

    def start(self) -> None:
        self.tap()
        for drafter in (*self.models, self.lookup):
            drafter.start()

    def tap(self) -> None:
        """Have the target record what any of the models reads, in all rounds: their state follows every one, whoever drafts."""
        if self.mtp is None and self.head is not None:
            self.head.tap()
        elif self.mtp is not None:
            self.mtp.target.need(sorted({layer_id for drafter in self.models for layer_id in drafter.layer_ids}))

    def commit(self, features_TMD: torch.Tensor) -> None:
        for drafter in self.models:
            drafter.commit(features_TMD)

    def draft(self, ids: Sequence[int], limit: int, law: Law, noise: torch.Generator | Coupled) -> Draft:
        proposal = self.propose(ids, limit)
        if proposal is None:
            drafter = self.drafting
            assert drafter is not None
            return drafter.draft(ids, self.to_draft(limit), law, noise)
        return proposal

    def to_draft(self, limit: int) -> int:
        """How many tokens `drafting` is to draft."""
        return limit if self.lengths is not None or self.chosen is None else min(limit, self.chosen.asked)

    @property
    def drafting(self) -> DSparkDrafter | MtpDrafter | None:
        """The model whose turn it is."""
        return self.head if self.chosen is self.head_planner else self.mtp if self.chosen is self.mtp_planner else None

    def propose(self, ids: Sequence[int], limit: int) -> Draft | None:
        """Choose who drafts: the lookup's proposal, an empty one if nobody shall; None: `drafting`, which is for the caller to ask."""
        self.tap()
        tokens, found = self.lookup.follow(ids, min(limit, self.lookup.block_size))
        choices = [self.head_planner] if self.head is not None and limit else []
        # Modules have nothing to read before the last token of a prompt of one.
        choices += [self.mtp_planner] if self.mtp is not None and limit and len(ids) > 1 else []
        choices += [self.found_planners[found]] if tokens and found else []
        self.found = tokens
        self.awake = self.choose(choices, limit, len(ids))
        return self.take_turn(self.awake)

    def take_turn(self, order: list[Adaptive]) -> Draft | None:
        self.chosen = order[0] if order else None
        if self.chosen is None:
            return Draft([], torch.empty(0, 0))
        return None if self.drafting is not None else self.lookup.proposal(self.found)

    def without_head(self) -> Draft | None:
        """In place of the head's draft that `propose` asked for: what comes next, as from `propose`."""
        self.awake = [planner for planner in self.awake if planner is not self.head_planner]
        return self.take_turn(self.awake)

    def without_models(self) -> Draft:
        """In place of a model's draft: the lookup's proposal, or nothing."""
        self.awake = [planner for planner in self.awake if planner not in (self.head_planner, self.mtp_planner)]
        draft = self.take_turn(self.awake)
        assert draft is not None
        return draft

    def choose(self, choices: list[Adaptive], limit: int, num_tokens: int) -> list[Adaptive]:
        """Those that are not parked (none is while a rule decides lengths), the one that gains most first."""
        awake = []
        for planner in choices:
            if planner.ask(limit, num_tokens) or self.lengths is not None:
                awake.append(planner)
            else:
                planner.wait -= 1
        awake.sort(key=lambda planner: planner.advantage, reverse=True)
        self.num_choices += len(awake) > 1
        turn, rest = divmod(self.num_choices, self.EXPLORE)
        if len(awake) > 1 and not rest:
            awake.insert(0, awake.pop(1 + turn % (len(awake) - 1)))
        return awake

    # As a planner

    def ask(self, limit: int, num_tokens: int) -> int:
        return limit if self.lengths is None else self.lengths.ask(limit, num_tokens)

    def plan(self, confidences: Sequence[float] | None, limit: int) -> int:
        planner = self.lengths or self.chosen
        return 0 if planner is None else planner.plan(confidences, limit)

    def learn(self, num_drafted: int, num_planned: int, num_accepted: int) -> None:
        if self.chosen is None:
            self.pace.add(1, 1.0)
        else:
            self.chosen.learn(num_drafted, num_planned, num_accepted)

    def costs_changed(self) -> None:
        """The machine's load is another: what was gained under the last one says nothing about this one."""
        self.pace.forget()
        for planner in (self.head_planner, self.mtp_planner, *self.found_planners.values()):
            planner.costs_changed()
