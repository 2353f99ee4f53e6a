"""Sampled continuations of a tiny real model, through the whole loop, have the joint law of the target.

Pure functions of tensors (the target's rows, the head's passes, `probs`) are remembered by their
inputs, which makes a continuation cost about a millisecond; `decode`, `verify` and the drafters run as they are."""

from collections import Counter
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import product

import pytest
import torch
from transformers.modeling_layers import MtpModel

from chances import p_value
from dspark.core import sampling, verifier
from dspark.core.calibration import OnlineCalibration
from dspark.core.decode import Drafter, Scored, decode
from dspark.core.planner import Adaptive, Always, Costs, CostTable, Lagged, threshold
from dspark.core.sampling import Streams
from dspark.drafters import Arbiter, DSparkDrafter, MtpDrafter, NoDrafter, PromptLookup, SeededDrafter
from dspark.generation import generate, make_law
from dspark.head.mtp import MtpHead
from dspark.head.recurrent import RecurrentHead
from dspark.target.target import Target
from tiny import randomized, tiny_head, tiny_model, tiny_recurrent

VOCABULARY = 12
NUM_NEW = 3
PROMPT = (4, 0, 1, 4, 0)  # the lookup proposes 1, which this target says about a quarter of the time
LAWS = {
    "T=1": make_law(1.0),
    "top-p": make_law(0.8, top_p=0.9),
    "lagged": make_law(1.0),
    "adaptive": make_law(1.0),
    "online": make_law(1.0),
}
# A round that costs about what it brings, so that the adaptive planner parks and starts again many times.
TABLE = CostTable((0, 8), (Costs(0.1, (1.0, 1.3, 1.5, 1.9, 2.0)), Costs(0.2, (1.1, 1.4, 1.5, 1.9, 2.0))))
# So dear that drafters in turns are parked in some rounds and draft in others.
IN_TURNS = CostTable((0,), (Costs(0.1, tuple(1 + 0.25 * k for k in range(17))),))
PLANNERS = {
    "T=1": Always,
    # With the vanilla head's confidences this cuts x_2 or keeps it, by what x_1 is.
    "top-p": lambda: Always(threshold(0.0082)),
    # The confidences of this head are small: rows that cost less make it verify in about a quarter of the rounds.
    "lagged": lambda: Lagged(CostTable((0,), (Costs(0.1, (1.0, 1.08, 1.18, 1.38, 1.58)),))),
    "adaptive": lambda: Adaptive(TABLE, [0.3] * 4, trust=2),
    # Steps so large that a few rounds move the shifts to their bound and back.
    "online": lambda: Adaptive(TABLE, [0.3] * 4, trust=2, online=OnlineCalibration(4, step=2.0)),
}
DRAFTERS = ("vanilla", "gated", "rnn", "dflash", "mtp", "trained mtp", "eagle3", "mtp+dspark", "lookup", "none")


class Remembered:
    """A target whose every row is computed once; a state is the list of its tokens."""

    def __init__(self, target: Target):
        self.target = target
        self.rows = cache(self.fresh_row)

    def __getattr__(self, name: str):
        return getattr(self.target, name)

    def row(self, tokens: tuple[int, ...]) -> Scored:
        return self.rows(tokens, self.target.layer_ids)

    def fresh_row(self, tokens: tuple[int, ...], layer_ids: tuple[int, ...]) -> Scored:
        scored = self.target.score(self.target.start(), tokens)
        return Scored(scored.logits_TV[-1], scored.features_TMD[-1])

    def start(self) -> list[int]:
        return []

    def score(self, state: list[int], tokens: Sequence[int]) -> Scored:
        rows = []
        for token in tokens:
            state.append(token)
            rows.append(self.row(tuple(state)))
        return Scored(torch.stack([row.logits_TV for row in rows]), torch.stack([row.features_TMD for row in rows]))

    def prefill(self, state: list[int], tokens: Sequence[int]) -> torch.Tensor:
        return self.score(state, tokens).features_TMD

    def rollback(self, state: list[int], num_rejected: int) -> None:
        del state[len(state) - num_rejected :]


def remembered(function):
    """A pure function of tensors, each result kept under the bytes of its arguments."""
    results = {}

    def content(value):
        if isinstance(value, torch.Tensor):
            return tuple(value.shape), value.numpy().tobytes()
        return tuple(map(content, value)) if isinstance(value, (list, tuple)) else value

    def call(*arguments):
        key = content(arguments)
        if key not in results:
            results[key] = function(*arguments)
        return results[key]

    return call


@lru_cache(maxsize=1)
def tiny_target() -> Remembered:
    return Remembered(Target(tiny_model("llama", vocab_size=VOCABULARY, num_hidden_layers=2)))


class RememberedModules(MtpHead):
    """Modules whose every pass is computed once; a cache is the list of what each module read."""

    def start(self) -> list[list[tuple[bytes, int]]]:
        return [[] for _ in self.norms]

    def run(self, k: int, hidden_TD, tokens, slot: int, cache):
        assert slot == len(cache[k])
        cache[k] += [(row.numpy().tobytes(), token) for row, token in zip(hidden_TD, tokens, strict=True)]
        if not hasattr(self, "passes"):
            self.passes = {}
        key = (k, tuple(cache[k]))
        if key not in self.passes:
            rows = torch.stack([torch.frombuffer(bytearray(row), dtype=torch.float32) for row, _ in cache[k]])
            self.passes[key] = super().run(k, rows, [token for _, token in cache[k]], 0, super().start())
        handed_TD, logits_V = self.passes[key]
        return handed_TD[slot:], logits_V

    def forget(self, k: int, num_slots: int, cache) -> None:
        del cache[k][len(cache[k]) - num_slots :]


class RememberedChain:
    """A head of one recurrent layer whose every pass is computed once; a cache is the list of what it read."""

    def __init__(self, head: RecurrentHead):
        self.head, self.passes = head, {}

    def __getattr__(self, name: str):
        return getattr(self.head, name)

    def start(self) -> list[tuple[bytes, int]]:
        return []

    def run(self, k: int, hidden_TD, tokens, slot: int, cache):
        assert slot == len(cache)
        cache += [(row.numpy().tobytes(), token) for row, token in zip(hidden_TD, tokens, strict=True)]
        if tuple(cache) not in self.passes:
            rows = torch.stack([torch.frombuffer(bytearray(row), dtype=torch.float32) for row, _ in cache])
            self.passes[tuple(cache)] = self.head.run(k, rows, [token for _, token in cache], 0, self.head.start())
        handed_TD, logits_C = self.passes[tuple(cache)]
        return handed_TD[slot:], logits_C

    def forget(self, k: int, num_slots: int, cache) -> None:
        del cache[len(cache) - num_slots :]


def tiny_modules(target, num: int) -> tuple[MtpModel, list[None]]:
    """Random modules for any tiny target, in DeepSeek-V3's style."""
    config = target.model.config
    config.num_mtp_layers = num
    with torch.random.fork_rng():
        torch.manual_seed(4)  # its drafts are accepted often enough under both laws
        modules = MtpModel(target.model, num).float().eval()
        randomized(modules.layers)
    return modules, [None] * num


class ByText(Arbiter):
    """Another drafter, or nobody, in every round, by what the text is so far, and all of its draft verified: the worst that may be done."""

    def plan_with(self, table, *settings, **more):
        return super().plan_with(table, Always())

    def propose(self, ids, limit):
        self.turn = (ids[-1] + len(ids)) % 4
        return super().propose(ids, limit)

    def choose(self, choices, limit, num_tokens):
        return [] if self.turn == 3 or not choices else [choices[self.turn % len(choices)]]


class Peeking(ByText):
    """Looks at what the head has drafted, and has the modules draft in its place where the first token is a low one."""

    def draft(self, ids, limit, law, noise):
        self.tap()
        made = self.head.draft(ids, limit, law, noise)
        self.chosen = self.head_planner
        if not made.tokens or made.tokens[0] >= VOCABULARY / 2:
            return made
        self.chosen = self.mtp_planner
        return self.mtp.draft(ids, limit, law, noise)


TOGETHER = {"together": Arbiter, "by text": ByText, "peeking": Peeking}


def make_drafter(name: str, target: Remembered) -> Drafter:
    if name == "mtp":
        modules, outputs = tiny_modules(target, 1)
        return MtpDrafter((RememberedModules if isinstance(target, Remembered) else MtpHead)(modules, target, outputs), target, 2)
    if name in ("trained mtp", "eagle3"):
        recurrent = tiny_recurrent(target, name.rsplit(maxsplit=1)[-1], block_size=2, draft_vocab=9, seed=4)
        return MtpDrafter(RememberedChain(recurrent) if isinstance(target, Remembered) else recurrent, target)
    if name == "none":
        return NoDrafter()
    if name == "lookup":
        return PromptLookup(VOCABULARY)
    if name in TOGETHER:
        return TOGETHER[name](make_drafter("vanilla", target), PromptLookup(VOCABULARY), [0.3] * 4, 2, make_drafter("mtp", target))
    if name == "mtp+dspark":
        return SeededDrafter(make_drafter("mtp", target), make_drafter("rnn", target))
    if name == "auto":
        return Arbiter(make_drafter("vanilla", target), PromptLookup(VOCABULARY), [0.3] * 4, trust=2)
    head = tiny_head(target, "vanilla" if name == "dflash" else name, rank=0 if name == "dflash" else 8)
    for module, method in ((head, "hidden"), (head, "context_kv"), (head, "base_logits"), (head.confidence_head, "forward")):
        setattr(module, method, remembered(getattr(module, method)))
    return DSparkDrafter(head, target)


@pytest.fixture(autouse=True)
def probs_are_remembered(monkeypatch):
    probs = remembered(sampling.probs)
    for module in ("core.decode", "drafters.dspark"):
        monkeypatch.setattr(f"dspark.{module}.probs", probs)


def sample(drafter: str, law: str, num_samples: int, seed: int = 0) -> tuple[Counter, Counter]:
    """How often each continuation came, and each number of accepted tokens in its first round."""
    target, streams = tiny_target(), Streams(seed)
    chosen = make_drafter(drafter, target)
    said, accepted, planner = Counter(), Counter(), PLANNERS[law]()
    for done_before in range(num_samples):
        if isinstance(chosen, Arbiter) and done_before % 500 == 0:  # before it is parked nearly all of the time
            planner = chosen.plan_with(IN_TURNS)
        rounds = list(decode(target, chosen, PROMPT, LAWS[law], streams, NUM_NEW, planner=planner))
        said[tuple(token for done in rounds for token in done.tokens)] += 1
        accepted[rounds[0].num_accepted if rounds[0].num_planned else "parked"] += 1
    return said, accepted


@lru_cache(maxsize=len(LAWS))
def exact_law(name: str) -> dict[tuple[int, ...], float]:
    """Every continuation's probability under the target alone."""
    target = tiny_target()
    row = cache(lambda tokens: sampling.probs(LAWS[name], [()], target.row(PROMPT + tokens).logits_TV[None].double())[0].tolist())
    chances = {}
    for tokens in product(range(VOCABULARY), repeat=NUM_NEW):
        chance = 1.0
        for k in range(NUM_NEW):
            chance *= row(tokens[:k])[tokens[k]]
        chances[tokens] = chance
    return chances


@pytest.mark.parametrize(("law", "num_samples"), [("T=1", 2_000), ("top-p", 2_000), pytest.param("T=1", 200_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_continuations_have_the_law_of_the_target(drafter, law, num_samples):
    said, accepted = sample(drafter, law, num_samples)
    assert p_value(said, exact_law(law)) > 1e-4
    # Rejections and acceptances both took part.
    assert drafter == "none" or min(accepted[0], num_samples - accepted[0]) > num_samples / 100


@pytest.mark.parametrize("num_samples", [2_000, pytest.param(200_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("drafter", "planner"),
    [("vanilla", "lagged"), ("vanilla", "adaptive"), ("auto", "adaptive"), ("together", "adaptive"), ("vanilla", "online")],
)
def test_continuations_have_the_law_of_the_target_under_planners_that_remember(drafter, planner, num_samples):
    said, accepted = sample(drafter, planner, num_samples)
    assert p_value(said, exact_law(planner)) > 1e-4
    # Rounds with and without verified tokens, rejections and acceptances all took part.
    assert min(accepted["parked"], accepted[0], accepted[1]) > num_samples / 100


@pytest.mark.parametrize("num_samples", [4_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_whoever_drafts_in_whatever_round_keeps_the_law(num_samples):
    said, accepted = sample("by text", "T=1", num_samples)
    assert p_value(said, exact_law("T=1")) > 1e-4
    assert min(accepted[0], num_samples - accepted[0]) > num_samples / 100


def test_a_choice_that_looks_at_what_was_drafted_changes_the_law():
    said, _ = sample("peeking", "T=1", 4_000)
    assert p_value(said, exact_law("T=1")) < 1e-6


WRONG_RULES = {
    "residual": lambda p_V, q_V, standing: p_V,
    "acceptance": lambda p_V, q_V, token, standing: 1.0,
    "ending": lambda p_V, q_V, standing: 1.0,
}


@pytest.mark.parametrize("rule", WRONG_RULES)
def test_chi_square_rejects_a_wrong_rule(rule, monkeypatch):
    monkeypatch.setattr(verifier, rule, WRONG_RULES[rule])
    said, _ = sample("vanilla", "T=1", 1_500)
    assert p_value(said, exact_law("T=1")) < 1e-6


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_seed_replays_the_tokens(drafter):
    target = Target(tiny_model("llama", vocab_size=VOCABULARY, num_hidden_layers=2))

    def tokens(seed: int) -> tuple[int, ...]:
        return tuple(generate(target, None, PROMPT, 16, temperature=1.0, seed=seed, drafter=make_drafter(drafter, target)).token_ids)

    first = [tokens(seed) for seed in range(3)]
    assert [tokens(seed) for seed in range(3)] == first
    assert len(set(first)) == 3
