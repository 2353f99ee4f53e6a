"""The head and prompt lookup together: in each round the one that is expected to gain more time, or neither.

Expected from rounds that are over: for the head from its own, for a proposal of the lookup from those made after an
ending of the same size was found again. No token of the coming block is looked at, so the output's law is kept."""

from collections.abc import Sequence

import torch

from dspark.core.calibration import OnlineCalibration
from dspark.core.planner import Adaptive, Costs, CostTable, Pace, Planner, Table, WithoutDrafts
from dspark.core.sampling import Coupled, Law
from dspark.core.verifier import Draft
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.lookup import Found, PromptLookup

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


class Arbiter:
    """A drafter that is its own planner; `lengths`, if given, decides how many drafted tokens to verify instead.

    Without a head there is the lookup alone. `expected` is the head's usual acceptance by position, worth `trust` rounds."""

    EXPLORE = 32  # in one of so many rounds with a choice the second best is taken, so that its estimate stays fresh

    def __init__(self, head: DSparkDrafter | None, lookup: PromptLookup, expected: Sequence[float], trust: float):
        self.head, self.lookup, self.expected, self.trust = head, lookup, expected, trust
        self.block_size = max(head.block_size if head else 0, lookup.block_size)
        self.plan_with(NOMINAL)

    def plan_with(self, table: Table, lengths: Planner | None = None, online: bool = False) -> "Arbiter":
        """Forget what was learned, and go by these costs; `online`: and correct the head's confidences on the way."""
        self.lengths, self.pace = lengths, Pace()
        free = WithoutDrafts(table)
        corrected = OnlineCalibration(self.block_size) if online else None
        self.head_planner = Adaptive(table, self.expected, self.trust, self.pace, corrected)
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
        if self.head is not None:
            self.head.start()
        self.lookup.start()

    def commit(self, features_TMD: torch.Tensor) -> None:
        if self.head is not None:
            self.head.commit(features_TMD)

    def draft(self, ids: Sequence[int], limit: int, law: Law, noise: torch.Generator | Coupled) -> Draft:
        proposal = self.propose(ids, limit)
        if proposal is None:
            assert self.head is not None
            return self.head.draft(ids, limit, law, noise)
        return proposal

    def propose(self, ids: Sequence[int], limit: int) -> Draft | None:
        """Choose who drafts: the lookup's proposal, an empty one if nobody shall; None: the head, which is for the caller to ask."""
        if self.head is not None:
            self.head.tap()  # its context follows every round, whoever drafts
        tokens, found = self.lookup.follow(ids, min(limit, self.lookup.block_size))
        choices = [self.head_planner] if self.head is not None and limit else []
        choices += [self.found_planners[found]] if tokens and found else []
        self.found = tokens
        self.awake = self.choose(choices, limit, len(ids))
        return self.take_turn(self.awake)

    def take_turn(self, order: list[Adaptive]) -> Draft | None:
        self.chosen = order[0] if order else None
        if self.chosen is None:
            return Draft([], torch.empty(0, 0))
        return None if self.chosen is self.head_planner else self.lookup.proposal(self.found)

    def without_head(self) -> Draft:
        """In place of the head's draft that `propose` asked for: the lookup's proposal, or nothing."""
        draft = self.take_turn([planner for planner in self.awake if planner is not self.head_planner])
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
        awake.sort(key=lambda planner: planner.lately.value, reverse=True)
        self.num_choices += len(awake) > 1
        return awake[::-1] if len(awake) > 1 and self.num_choices % self.EXPLORE == 0 else awake

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
        for planner in (self.head_planner, *self.found_planners.values()):
            planner.costs_changed()
