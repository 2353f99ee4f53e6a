"""The law of a whole round, enumerated in float64, is the law of the target alone.

Shapes: K verified tokens, V vocabulary. A joint law over L tokens is a tensor of L axes of size V."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise, product
from math import nextafter, prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark.core.decode import Scored, judge_by_law, judge_fast
from dspark.core.planner import Costs, admit, budget, cut, early_stop, fixed, survivals_of, threshold, worth
from dspark.core.sampling import Law, Streams, draw, probs
from dspark.core.verifier import Draft, FewTokens, Verdict, acceptance, ending, residual, verify
from dspark.errors import LogitsError
from dspark.generation import make_law
from dspark.measure.lossless import law_error

VOCABULARY = 5
PROMPT = (2, 0)
ALMOST_ONE = 1 - 2**-53
Tokens = tuple[int, ...]
RowLaw = Callable[[Tokens], torch.Tensor]

LAWS = {
    "greedy": make_law(0),
    "T=0.3": make_law(0.3),
    "T=0.7": make_law(0.7),
    "T=1": make_law(1.0),
    "T=1.5": make_law(1.5),
    "top-k": make_law(1.0, top_k=2),
    "top-p": make_law(0.7, top_p=0.8),
    "min-p": make_law(1.5, min_p=0.2),
    "all warpers": make_law(1.5, top_k=4, top_p=0.9, min_p=0.05),
    "repetition": make_law(0.9, repetition_penalty=1.7),
    "greedy repetition": make_law(0, repetition_penalty=2.0),
}
STAIRS = Costs(0.5, (1.0, 1.5, 1.55, 1.8))
PLANS = {
    "fixed": fixed,
    "threshold": threshold(0.4),
    "early stop": early_stop(Costs(0.1, (1.0, 1.2, 1.65, 2.4))),
    "worth": worth(STAIRS, 1.4, (0.6, 0.5, 0.4)),
}


@dataclass(frozen=True)
class Case:
    """Row laws of target `p` and draft `q` and a confidence, each a function of the tokens before it."""

    p: RowLaw
    q: RowLaw
    confidence: Callable[[Tokens], float]
    prompt: Tokens = PROMPT


def markov_target(law: Law, seed: int, num_allowed: int | None = None) -> RowLaw:
    """Random logits by the last two tokens; `num_allowed` masks all but so many tokens of a row, and of some all but one."""
    rng = torch.Generator().manual_seed(seed)
    table = torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=rng, dtype=torch.float64) * 2
    if num_allowed:
        order = torch.rand(table.shape, generator=rng).argsort(-1).argsort(-1)
        allowed = torch.where(torch.rand(table.shape[:2], generator=rng) < 0.3, 1, num_allowed)
        table = table.masked_fill(order >= allowed[..., None], float("-inf"))

    @cache
    def row(tokens: Tokens) -> torch.Tensor:
        return probs(law, [tokens], table[tokens[-2:]][None])[0]

    return row


def normalised(weights_V: torch.Tensor) -> torch.Tensor:
    return weights_V / weights_V.sum()


def one_hot(token: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(token), VOCABULARY).double()


def dirichlet(rng: torch.Generator) -> torch.Tensor:
    return normalised(-torch.rand(VOCABULARY, generator=rng, dtype=torch.float64).log())


def without_overlap(p_V: torch.Tensor) -> torch.Tensor:
    """Uniform on what the target never says; on its least likely token where it may say anything."""
    return normalised((p_V == 0).double()) if (p_V == 0).any() else one_hot(int(p_V.argmin()))


# name -> (law of the target's row, randomness) -> law of the draft's row
DRAFTS: dict[str, Callable[[torch.Tensor, torch.Generator], torch.Tensor]] = {
    "random": lambda p, rng: dirichlet(rng),
    "sparse": lambda p, rng: normalised(dirichlet(rng) * (torch.rand(VOCABULARY, generator=rng).argsort() < 2)),
    "single token": lambda p, rng: one_hot(int(torch.randint(VOCABULARY, (1,), generator=rng))),
    "without overlap": lambda p, rng: without_overlap(p),
    "equal": lambda p, rng: p,
    "equal but for rounding": lambda p, rng: normalised(p.float().double()),
}


def make_case(law: Law, draft: str, num_allowed: int | None = None, seed: int = 0) -> Case:
    rng = torch.Generator().manual_seed(seed + 1)
    p = markov_target(law, seed, num_allowed)
    q = cache(lambda tokens: DRAFTS[draft](p(tokens), rng))
    confidence = cache(lambda tokens: 0.3 + 0.7 * torch.rand(1, generator=rng).item())
    return Case(p, q, confidence)


def target_joint(p: RowLaw, tokens: Tokens, length: int) -> torch.Tensor:
    """The joint law of the `length` tokens the target says after `tokens`."""
    if length == 0:
        return torch.ones((), dtype=torch.float64)
    row = p(tokens)
    return torch.stack([row[x] * target_joint(p, (*tokens, x), length - 1) for x in range(len(row))])


def blocks(case: Case, block_size: int):
    """Every block that can be drafted, with its probability."""
    for block in product(range(len(case.q(case.prompt))), repeat=block_size):
        chance = 1.0
        for k in range(block_size):
            chance *= case.q(case.prompt + block[:k])[block[k]].item()
            if chance == 0:
                break
        else:
            yield block, chance


def confidences_of(case: Case, block: Tokens) -> list[float]:
    return [case.confidence(case.prompt + block[:k]) for k in range(len(block))]


def block_law(
    case: Case, block_size: int, acceptance=acceptance, ending=ending, residual=residual
) -> Callable[[Tokens, int], torch.Tensor]:
    """(drafted block, tokens to verify) -> the joint law of the next `block_size + 1` tokens, of which this round says the
    first and the target the rest."""
    judged = cache(lambda tokens, x, standing: acceptance(case.p(tokens), case.q(tokens), x, standing))
    ended = cache(lambda tokens, standing: ending(case.p(tokens), case.q(tokens), standing))
    recovered = cache(lambda tokens, standing: residual(case.p(tokens), case.q(tokens), standing))
    finished = cache(lambda said: target_joint(case.p, case.prompt + said, block_size + 1 - len(said)))

    def law(block: Tokens, num_planned: int) -> torch.Tensor:
        joint = torch.zeros((len(case.p(case.prompt)),) * (block_size + 1), dtype=torch.float64)

        def commit(accepted: Tokens, next_V: torch.Tensor, chance: float) -> None:
            for x, p in enumerate(next_V.tolist()):
                if chance * p != 0:
                    joint[(*accepted, x)] += chance * p * finished((*accepted, x))

        before = [case.prompt + block[:k] for k in range(num_planned + 1)]
        standing = [1.0]
        for k in range(num_planned):
            standing.append(judged(before[k], block[k], standing[k]))
        commit(block[:num_planned], case.p(before[num_planned]), standing[num_planned])
        shorter = 1 - standing[num_planned]
        for k in reversed(range(num_planned)):
            ends = ended(before[k], standing[k]) if k else 1.0
            if shorter * ends > 0:
                commit(block[:k], recovered(before[k], standing[k]), shorter * ends)
            shorter *= 1 - ends
        return joint

    return law


def round_joint(case: Case, plan, block_size: int, **mutant) -> torch.Tensor:
    """The joint law of the next `block_size + 1` tokens when one round says the first and the target the rest."""
    law = block_law(case, block_size, **mutant)
    return sum(
        (chance * law(block, plan(confidences_of(case, block), block_size)) for block, chance in blocks(case, block_size)),
        start=torch.zeros((), dtype=torch.float64),
    )


def bias(case: Case, plan, block_size: int, **mutant) -> float:
    """Largest difference of any sequence's probability."""
    expected = target_joint(case.p, case.prompt, block_size + 1)
    return (round_joint(case, plan, block_size, **mutant) - expected).abs().max().item()


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("law", LAWS)
def test_round_has_the_law_of_the_target(law, draft):
    for num_allowed in (None, 3):
        case = make_case(LAWS[law], draft, num_allowed)
        for block_size, plan in product((1, 2, 3), PLANS.values()):
            assert bias(case, plan, block_size) < 1e-12


def test_cases_differ_as_they_claim():
    """Overlap, plan and masks take effect, so that the law above was no foregone conclusion."""
    masked = make_case(LAWS["T=1"], "without overlap", num_allowed=3)
    assert max(acceptance(masked.p(PROMPT), masked.q(PROMPT), x) for x in range(VOCABULARY) if masked.q(PROMPT)[x] > 0) == 0
    case = make_case(LAWS["T=1"], "random")
    for plan in PLANS.keys() - {"fixed"}:
        assert len({PLANS[plan](confidences_of(case, block), 3) for block, _ in blocks(case, 3)}) > 1, plan
    rows = torch.stack([masked.p(pair) for pair in product(range(VOCABULARY), repeat=2)])
    assert set((rows > 0).sum(-1).tolist()) == {1, 3}


# What verify itself says -----------------------------------------------------------------


def cells(edges: Sequence[float]) -> list[tuple[float, float]]:
    """(middle, width) of the pieces that `edges` cut [0, 1) into."""
    inner = sorted({0.0, 1.0, *(edge for edge in edges if 0 < edge < 1)})
    return [((low + high) / 2, high - low) for low, high in pairwise(inner)]


def drafted(case: Case, block: Tokens) -> tuple[torch.Tensor, Draft]:
    """The target's rows [K+1, V] along a block, and the block as a draft."""
    before = [case.prompt + block[:k] for k in range(len(block) + 1)]
    return torch.stack([case.p(t) for t in before]), Draft(list(block), torch.stack([case.q(t) for t in before[:-1]]))


def standing_of(p_KV: torch.Tensor, draft: Draft) -> list[float]:
    """The chance that the block stands up to each of its tokens, from none of it on."""
    standing = [1.0]
    for k in range(len(p_KV) - 1):
        standing.append(acceptance(p_KV[k], draft.probs_KV[k], draft.tokens[k], standing[k]))
    return standing


def verify_joint(case: Case, plan, block_size: int) -> torch.Tensor:
    """As `round_joint`, by calling `verify` in every piece of the cube of uniforms where it is constant."""
    joint = torch.zeros((VOCABULARY,) * (block_size + 1), dtype=torch.float64)
    for block, chance in blocks(case, block_size):
        num_planned = plan(confidences_of(case, block), block_size)
        p_KV, draft = drafted(case, block)
        p_KV = p_KV[: num_planned + 1]
        standing = standing_of(p_KV, draft)
        ends = [*(ending(p_KV[k], draft.probs_KV[k], standing[k]) for k in range(num_planned)), standing[num_planned]]
        keep = [cells([chance]) for chance in ends[1:]]
        next_laws = [*(residual(p_KV[k], draft.probs_KV[k], standing[k]) for k in range(num_planned)), p_KV[num_planned]]
        recover = cells(torch.cat([row.cumsum(-1) for row in next_laws]).tolist())
        for piece in product(*keep, recover):
            *accept, last = (middle for middle, _ in piece)
            verdict = verify(p_KV, draft, accept, last)
            volume = prod(width for _, width in piece)
            said = (*block[: verdict.num_accepted], verdict.next_token)
            joint[said] += chance * volume * target_joint(case.p, case.prompt + said, block_size + 1 - len(said))
    return joint


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("law", "draft"), [("greedy", "sparse"), ("T=1.5", "sparse"), ("T=1.5", "random"), ("top-p", "sparse"), ("repetition", "random")]
)
def test_verify_has_the_law_of_the_target(law, draft, plan):
    case = make_case(LAWS[law], draft)
    for block_size in (1, 2):
        expected = target_joint(case.p, PROMPT, block_size + 1)
        assert (verify_joint(case, PLANS[plan], block_size) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("draft", ["random", "without overlap", "equal"])
def test_verify_turns_at_the_chance_of_an_end(draft):
    """A uniform just below it lets that part of the block stand, the chance itself does not."""
    case = make_case(LAWS["T=1"], draft, num_allowed=3)
    for block, _ in blocks(case, 3):
        p_KV, proposal = drafted(case, block)
        standing = standing_of(p_KV, proposal)
        possible = next((k for k in range(4) if standing[k] == 0), 4)
        ends = [ending(p_KV[k], proposal.probs_KV[k], standing[k]) for k in range(min(possible, 3))] + standing[3:possible]
        for recover in (0.0, 0.5, ALMOST_ONE):
            for k in range(possible):
                next_law = p_KV[3] if k == 3 else residual(p_KV[k], proposal.probs_KV[k], standing[k])
                verdict = Verdict(k, draw(next_law, recover))
                if k == 0:
                    refused = ends
                elif ends[k] == 0:
                    continue
                else:
                    refused = [*ends[:k], nextafter(ends[k], 0), *ends[k + 1 :]]
                if all(chance < 1 for chance in refused[k + 1 :]):
                    assert verify(p_KV, proposal, [*refused[1:], *[0.0] * (4 - possible)], recover) == verdict


def expected_to_stand(case: Case, block_size: int) -> tuple[float, float]:
    """Tokens of a block that stand on average: by this rule, and by keeping each token on its own account."""
    by_block = by_token = 0.0
    for block, chance in blocks(case, block_size):
        p_KV, draft = drafted(case, block)
        by_block += chance * sum(standing_of(p_KV, draft)[1:])
        alone = [acceptance(p_KV[k], draft.probs_KV[k], block[k]) for k in range(block_size)]
        by_token += chance * sum(prod(alone[: k + 1]) for k in range(block_size))
    return by_block, by_token


@pytest.mark.parametrize("law", LAWS)
def test_a_block_stands_longer_than_its_tokens_would_one_by_one(law):
    for draft in DRAFTS:
        case = make_case(LAWS[law], draft)
        by_block, by_token = expected_to_stand(case, 1)
        assert by_block == pytest.approx(by_token, abs=1e-12)
        by_block, by_token = expected_to_stand(case, 3)
        assert by_block > by_token - 1e-12
        if draft == "random" and law in ("T=1", "T=1.5", "repetition"):
            assert by_block > 1.01 * by_token


def test_residual_of_equal_laws_is_that_law():
    p_V = torch.tensor([0.25, 0.75, 0.0])
    assert torch.equal(residual(p_V, p_V), p_V)


# The draw --------------------------------------------------------------------------------


def slice_holds(probs_V: torch.Tensor, uniform: float) -> bool:
    """Whether the drawn token has mass and its slice of the cumulative law holds `uniform`."""
    token, cdf = draw(probs_V, uniform), probs_V.double().cumsum(-1)
    begin = cdf[token - 1].item() if token else 0.0
    point = uniform * cdf[-1].item()
    return probs_V[token].item() > 0 and begin <= point and (point < cdf[token].item() or cdf[token] == cdf[-1])


@settings(max_examples=300, deadline=None)
@given(
    weights=st.lists(st.one_of(st.just(0.0), st.floats(2.0**-40, 1.0)), min_size=1, max_size=9).filter(any),
    uniform=st.one_of(st.sampled_from([0.0, ALMOST_ONE]), st.floats(0.0, ALMOST_ONE)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_draw_inverts_the_cumulative_law(weights, uniform, dtype):
    assert slice_holds(normalised(torch.tensor(weights, dtype=torch.float64)).to(dtype), uniform)


def test_draw_at_the_edges_of_every_slice():
    probs_V = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0, 0.0])
    uniforms = (0.0, nextafter(0.25, 0), 0.25, nextafter(0.75, 0), 0.75, ALMOST_ONE)
    assert [draw(probs_V, uniform) for uniform in uniforms] == [1, 1, 3, 3, 4, 4]


@pytest.mark.parametrize("seed", range(3))
def test_draw_never_meets_a_masked_token_of_a_large_vocabulary(seed):
    rng = torch.Generator().manual_seed(seed)
    logits_V = torch.randn(50_000, generator=rng) * 4
    logits_V[torch.rand(50_000, generator=rng) < 0.9] = float("-inf")
    logits_V[-1000:] = float("-inf")
    probs_V = logits_V.softmax(-1)
    for uniform in (0.0, 2.0**-53, 0.5, 1 - 2**-30, ALMOST_ONE, *torch.rand(50, generator=rng, dtype=torch.float64).tolist()):
        assert slice_holds(probs_V, uniform)


# The failing controls --------------------------------------------------------------------


def looking_ahead(steps_per_second: Sequence[float]):
    """The prefix of best theta = tau * SPS, chosen after looking at the confidences of the whole block (paper, appendix A)."""

    def plan(confidences: Sequence[float], limit: int) -> int:
        survivals = [prod(confidences[:k]) for k in range(limit + 1)]
        thetas = [sum(survivals[: k + 1]) * steps_per_second[k] for k in range(limit + 1)]
        return thetas.index(max(thetas))

    return plan


A, B = 0, 1
APPENDIX_SPS = (1.0, 0.5, 0.45)


def appendix_case() -> Case:
    """The counter-example of appendix A; its second rows are such that c_2 = 0.9 and 0 are the true chances."""
    p = {(): (0.7, 0.3), (A,): (0.9, 0.1), (B,): (0.0, 1.0)}
    q = {(): (0.5, 0.5), (A,): (1.0, 0.0), (B,): (1.0, 0.0)}
    confidence = {(): 0.8, (A,): 0.9, (B,): 0.0}

    def row(laws):
        return cache(lambda tokens: torch.tensor(laws.get(tokens, (0.6, 0.4)), dtype=torch.float64))

    return Case(row(p), row(q), confidence.__getitem__, prompt=())


def first_token(joint: torch.Tensor) -> list[float]:
    return joint.flatten(1).sum(-1).tolist()


def test_looking_ahead_changes_the_law():
    joint = round_joint(appendix_case(), looking_ahead(APPENDIX_SPS), 2)
    assert first_token(joint) == pytest.approx([0.85, 0.15], abs=1e-12)


@pytest.mark.parametrize("steps_per_second", [APPENDIX_SPS, (1.0, 0.6, 0.5)])
def test_stopping_at_once_keeps_the_law(steps_per_second):
    """The second speeds make x_1 decide how much of x_2 is verified, which is allowed."""
    plan = early_stop(Costs(0.0, tuple(1 / speed for speed in steps_per_second)))
    assert first_token(round_joint(appendix_case(), plan, 2)) == pytest.approx([0.7, 0.3], abs=1e-12)
    assert bias(appendix_case(), plan, 2) < 1e-12


# Drafts that end for what they drew, and what a later round knows --------------------------


def ends_after(tokens: Tokens) -> bool:
    """Where a draft ends: after about every third text."""
    return (7 * tokens[-1] + 3 * tokens[-2] + len(tokens)) % 3 == 0


def ended_drafts(case: Case, block_size: int, begun: Tokens = ()):
    """Every draft of up to `block_size` tokens of a drafter that may end behind any of them, with its probability."""
    for x, chance in enumerate(case.q(case.prompt + begun).tolist()):
        block = (*begun, x)
        ended = len(block) < block_size and ends_after(case.prompt + block)
        if chance == 0:
            continue
        if len(block) < block_size and not ended:
            for draft, rest in ended_drafts(case, block_size, block):
                yield draft, chance * rest
        else:
            rows = torch.stack([case.q(case.prompt + block[:k]) for k in range(len(block))])
            yield Draft(list(block), rows, confidences_of(case, block), num_asked=block_size if ended else 0), chance


def bias_of_ended(case: Case, plan, block_size: int) -> float:
    law = block_law(case, block_size)
    joint = sum(
        (chance * law(tuple(draft.tokens), draft.planned(plan)) for draft, chance in ended_drafts(case, block_size)),
        start=torch.zeros((), dtype=torch.float64),
    )
    return (joint - target_joint(case.p, case.prompt, block_size + 1)).abs().max().item()


@pytest.mark.parametrize("plan", PLANS)
def test_drafts_that_end_for_what_they_drew_keep_the_law(plan):
    for draft, seed in product(("random", "sparse"), range(2)):
        case = make_case(LAWS["T=1"], draft, seed=seed)
        assert len({len(made.tokens) for made, _ in ended_drafts(case, 3)}) > 1
        assert bias_of_ended(case, PLANS[plan], 3) < 1e-12


def test_a_plan_that_sees_that_a_draft_ended_changes_the_law(monkeypatch):
    monkeypatch.setattr(Draft, "planned", lambda draft, plan: plan(draft.confidences, len(draft.tokens)))
    assert max(bias_of_ended(make_case(LAWS["T=1"], "random", seed=seed), PLANS["worth"], 3) for seed in range(4)) > 1e-3


def test_what_was_refused_may_decide_who_drafts_next():
    """The next round's drafter and plan go by the whole draft before, its refused tokens too, and by how many of it stood."""
    cases = [make_case(LAWS["T=1"], draft, seed=5) for draft in ("random", "sparse", "single token")]
    assert all(torch.equal(case.p(PROMPT), cases[0].p(PROMPT)) for case in cases)

    @cache
    def second_round(turn: int, said: Tokens) -> torch.Tensor:
        case = replace(cases[turn], prompt=PROMPT + said)
        joint = round_joint(case, (fixed, PLANS["threshold"], fixed)[turn], 1)
        return joint if len(said) == 1 else joint.sum(-1)

    joint, turns = torch.zeros((VOCABULARY,) * 3, dtype=torch.float64), {}
    for block, chance in blocks(cases[0], 2):
        p_KV, draft = drafted(cases[0], block)
        standing = standing_of(p_KV, draft)
        ends = [*(ending(p_KV[k], draft.probs_KV[k], standing[k]) for k in range(2)), standing[2]]
        laws = [*(residual(p_KV[k], draft.probs_KV[k], standing[k]) for k in range(2)), p_KV[2]]
        recover = cells(torch.cat([row.cumsum(-1) for row in laws]).tolist())
        for piece in product(cells(ends[1:2]), cells(ends[2:]), recover):
            (first, _), (second, _), (last, _) = piece
            verdict = verify(p_KV, draft, [first, second], last)
            said = (*block[: verdict.num_accepted], verdict.next_token)
            turn = (sum(block) + verdict.num_accepted) % 3
            turns.setdefault(said, set()).add(turn)
            rest = 1.0 if len(said) == 3 else second_round(turn, said)
            joint[said] += chance * prod(width for _, width in piece) * rest
    assert any(len(taken) == 3 for said, taken in turns.items() if len(said) < 3)  # after one text, by what was refused
    assert (joint - target_joint(cases[0].p, PROMPT, 3)).abs().max() < 1e-12


# Rounding --------------------------------------------------------------------------------


@pytest.mark.parametrize("off", [0.0, 1e-6, -1e-6])
def test_rounding_of_the_rows_is_not_amplified(off):
    """Rows in float32 whose sums are off, and drafts whose laws are the target's but for rounding: the law is off by no more."""
    exact = make_case(LAWS["T=1"], "equal")
    rng = torch.Generator().manual_seed(0)
    p = cache(lambda tokens: exact.p(tokens).float() * (1 + off))
    q = cache(lambda tokens: normalised(exact.p(tokens) * (1 + 1e-6 * torch.randn(VOCABULARY, generator=rng))).float())
    rounded = Case(p, q, exact.confidence)
    joint = round_joint(rounded, fixed, 3)
    assert (joint / joint.sum() - target_joint(exact.p, PROMPT, 4)).abs().max() < 2e-6
    assert abs(joint.sum() - 1) < 1e-5


def test_uniforms_at_their_ends_and_parts_that_cannot_stand():
    """A token that the target all but never says: its part of the block stands for the uniform 0 alone."""
    p_KV, q_KV = torch.tensor([[1e-30, 1.0]]).repeat(17, 1), torch.tensor([[1.0, 0.0]]).repeat(16, 1)
    draft = Draft([0] * 16, q_KV)
    assert verify(p_KV, draft, [ALMOST_ONE] * 16, 0.5) == Verdict(0, 1)
    assert verify(p_KV, draft, [nextafter(0, 1)] * 16, 0.5).next_token == 1
    impossible = torch.tensor([[0.0, 1.0]]).repeat(17, 1)
    assert verify(impossible, draft, [0.0] * 16, 0.0) == Verdict(0, 1)
    only = torch.ones(3, 1)
    assert verify(only, Draft([0, 0], only[:2]), [ALMOST_ONE] * 2, ALMOST_ONE) == Verdict(2, 0)
    assert verify(p_KV[:1], draft, [], 0.5) == Verdict(0, 1)  # nothing was planned


# Two requests planned together ------------------------------------------------------------


def joint_of_two(cases: Sequence[Case], plan, block_size: int) -> torch.Tensor:
    """The joint law of the next tokens of both requests, first those of one, then those of the other."""
    laws = [cache(block_law(case, block_size)) for case in cases]
    joint = torch.zeros((), dtype=torch.float64)
    for drawn in product(*(blocks(case, block_size) for case in cases)):
        survivals = [survivals_of(confidences_of(case, block)) for case, (block, _) in zip(cases, drawn, strict=True)]
        planned = plan(survivals)
        first, second = (laws[r](drawn[r][0], planned[r]) for r in (0, 1))
        joint = joint + drawn[0][1] * drawn[1][1] * torch.tensordot(first, second, 0)
    return joint


def bias_of_two(cases: Sequence[Case], plan, block_size: int) -> float:
    """Largest difference from two requests that know nothing of each other."""
    first, second = (target_joint(case.p, case.prompt, block_size + 1) for case in cases)
    return (joint_of_two(cases, plan, block_size) - torch.tensordot(first, second, 0)).abs().max().item()


def best_together(steps_per_second):
    """The best total chosen after looking at every survival of this step: `budget` without its delay."""
    return lambda survivals: cut(survivals, budget(survivals, steps_per_second))


def speed_of(times: Sequence[float]):
    return lambda num_rows: 1 / times[num_rows]


PLANS_OF_TWO = {
    "Algorithm 1": lambda survivals: admit(survivals, speed_of([0, 0, 1.0, 1.25, 1.5, 1.7, 2.0])),
    "lagged budget": lambda survivals: cut(survivals, 3),
}


@pytest.mark.parametrize("plan", PLANS_OF_TWO)
@pytest.mark.parametrize("draft", ["random", "equal"])
def test_two_requests_planned_together_keep_the_law_of_both(plan, draft):
    cases = [make_case(LAWS["T=1"], draft, seed=3), make_case(LAWS["top-k"], draft, seed=4)]
    survivals = [[survivals_of(confidences_of(case, block)) for block, _ in blocks(case, 2)] for case in cases]
    # what one request drew decides about the other
    assert any(len({PLANS_OF_TWO[plan]([mine, other])[0] for other in survivals[1]}) > 1 for mine in survivals[0])
    assert bias_of_two(cases, PLANS_OF_TWO[plan], 2) < 1e-12


def test_looking_ahead_over_two_requests_changes_their_law():
    """The speeds make one token a loss and two a gain, as appendix A does for one request."""
    cases = [appendix_case(), replace(appendix_case(), confidence=lambda tokens: 0.0)]
    steps_per_second = speed_of([0, 0, 1.0, 1.45, 1.5, 2.5, 2.6])
    assert bias_of_two(cases, best_together(steps_per_second), 2) > 1e-2
    assert bias_of_two(cases, lambda survivals: admit(survivals, steps_per_second), 2) < 1e-12


MUTANTS = {
    "target law after a rejection": {"residual": lambda p, q, s: p},
    "residual without clamp": {"residual": lambda p, q, s: normalised((s * p - q).abs())},
    "residual not normalised": {"residual": lambda p, q, s: (s * p - q).clamp_min(0)},
    "residual as if all before it stood for certain": {"residual": lambda p, q, s: residual(p, q)},
    "ratio upside down": {"acceptance": lambda p, q, x, s: min(1.0, s * (q[x] / p[x]).item())},
    "everything accepted": {"acceptance": lambda p, q, x, s: 1.0},
    "target probability alone": {"acceptance": lambda p, q, x, s: s * p[x].item()},
    "each token on its own account": {"acceptance": lambda p, q, x, s: s * acceptance(p, q, x)},
    "a part ends as the whole block does": {"ending": lambda p, q, s: s},
    "no part ends before the whole": {"ending": lambda p, q, s: 0.0},
    "a part's end forgets what was refused": {"ending": lambda p, q, s: (s * p - q).clamp_min(0).sum().item()},
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_enumeration_rejects_a_wrong_rule(mutant):
    assert max(bias(make_case(LAWS["T=1.5"], "random", seed=seed), fixed, 2, **MUTANTS[mutant]) for seed in range(6)) > 1e-3


def test_enumeration_rejects_the_draft_law_of_another_row():
    case = make_case(LAWS["T=1.5"], "random")
    anchor_row = case.q(PROMPT)
    assert bias(case, fixed, 2, acceptance=lambda p, q, x, s: acceptance(p, anchor_row, x, s)) > 1e-3
    assert bias(case, fixed, 2, residual=lambda p, q, s: residual(p, anchor_row, s)) > 1e-3
    assert bias(case, fixed, 2, ending=lambda p, q, s: ending(p, anchor_row, s)) > 1e-3


@pytest.mark.parametrize("name", ["greedy", "greedy with a processor", "T=1"])
def test_the_fast_judge_says_what_the_reference_says(name):
    halve_first = lambda ids, logits: logits / torch.tensor([2.0, *[1.0] * (VOCABULARY - 1)])  # noqa: E731
    law = {"greedy": Law(greedy=True), "greedy with a processor": Law((halve_first,), greedy=True), "T=1": Law()}[name]
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for trial in range(200):
        logits = torch.randint(-2, 3, (4, VOCABULARY), generator=generator).float()  # ties among the best, too
        tokens = torch.randint(VOCABULARY, (3,), generator=generator).tolist()
        if trial % 2:
            tokens = logits.argmax(-1).tolist()[:3]
        draft = Draft(tokens, FewTokens.certain(tokens, VOCABULARY, "cpu"))
        scored = Scored(logits, logits[:, :0])
        verdict = judge_by_law(law, [0], draft, 3, scored, Streams(trial))
        assert judge_fast(law, [0], draft, 3, scored, Streams(trial)) == verdict
        seen.add(verdict.num_accepted)
    assert seen == {0, 1, 2, 3}
    for bad in (float("nan"), float("-inf")):
        rows = torch.stack([torch.arange(VOCABULARY) * 1.0, torch.full((VOCABULARY,), bad)])
        with pytest.raises(LogitsError):
            judge_fast(law, [0], Draft([4], FewTokens.certain([4], VOCABULARY, "cpu")), 1, Scored(rows, rows[:, :0]), Streams(0))


def test_laws_of_few_tokens_are_dense_rows():
    law = FewTokens(torch.tensor([[3, 1], [0, 4]]), torch.tensor([[0.25, 0.75], [1.0, 0.0]]), VOCABULARY)
    assert [law[k].tolist() for k in range(len(law))] == [[0, 0.75, 0, 0.25, 0], [1, 0, 0, 0, 0]]


@pytest.mark.parametrize("standing", [1.0, 0.6])
def test_the_law_check_of_verify_sees_a_wrong_rule(standing, monkeypatch):
    case = make_case(LAWS["T=1"], "random")
    p_V, q_V = case.p(PROMPT), case.q(PROMPT)
    assert law_error(p_V, q_V, standing) < 1e-15
    for rule, wrong in (("stands", lambda p, q, s: torch.ones_like(p)), ("residual", lambda p, q, s: p)):
        with monkeypatch.context() as patch:
            patch.setattr(f"dspark.measure.lossless.{rule}", wrong)
            assert law_error(p_V, q_V, standing) > 1e-3
