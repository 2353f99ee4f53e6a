"""Randomness that makes an answer a matter of the seed alone: exact law, and no word from the drafter or the plan."""

import math

import pytest
import torch

from dspark.core.decode import decode, judge_coupled
from dspark.core.planner import Always
from dspark.core.sampling import Coupled, probs
from dspark.drafters import DSparkDrafter, NoDrafter, PromptLookup
from dspark.generation import make_law
from dspark.target.target import Target
from tiny import tiny_head, tiny_model

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def answer(target, drafter, seed, law, plan=Always(), count=24):  # noqa: B008  frozen
    rounds = list(decode(target, drafter, PROMPT, law, Coupled(seed), count, planner=plan, judge=judge_coupled))
    return [token for done in rounds for token in done.tokens], rounds


@pytest.mark.parametrize(
    "law", [make_law(1.0), make_law(0.7, top_k=9), make_law(1.3, top_p=0.8, repetition_penalty=1.2)], ids=["T=1", "top-k", "top-p"]
)
@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_the_answer_depends_on_the_seed_alone(law, kind):
    target = Target(tiny_model("llama"), name="tiny")
    head = tiny_head(target, kind=kind)
    plain = [answer(target, NoDrafter(), seed, law)[0] for seed in range(4)]
    assert len(set(map(tuple, plain))) == 4
    for drafter in (DSparkDrafter(head, target), PromptLookup(target.vocab_size)):
        for plan in (Always(), Always(length=2)):
            found = [answer(target, drafter, seed, law, plan) for seed in range(4)]
            assert [ids for ids, _ in found] == plain
            assert drafter.block_size == 8 or any(done.num_accepted for _, rounds in found for done in rounds)


def test_a_choice_has_the_law_it_is_made_from():
    chances = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    counts = torch.zeros(5)
    for seed in range(200):
        noise = Coupled(seed)
        for position in range(100):
            counts[noise.choose(chances, position, 5)] += 1
    assert counts[1] == 0
    expected = chances * counts.sum()
    seen = chances > 0
    chi_square = ((counts - expected)[seen] ** 2 / expected[seen]).sum().item()
    assert chi_square < 16.3  # 3 degrees of freedom, one in a thousand


def test_what_is_next_to_impossible_is_not_said():
    """Among so many numbers one would be 0 if they lay on a grid of 2^-23, and its token win whatever its chance."""
    size = 2**19
    chances = torch.full((size,), 1e-15)
    chances[5] = 1.0
    noise = Coupled(0)
    assert [noise.choose(chances, position, size) for position in range(30)] == [5] * 30


def test_neighbouring_positions_and_seeds_are_independent():
    firsts = torch.stack([Coupled(seed).exponentials(position, 4000, torch.device("cpu")) for seed in (0, 1) for position in (7, 8)])
    assert (torch.corrcoef(firsts) - torch.eye(4)).abs().max() < 5 / math.sqrt(4000)


def test_a_draft_of_its_own_law_always_stands_and_others_agree_as_far_as_they_must():
    p, q = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.3, 0.5, 0.2])
    distance = float((p - q).clamp_min(0).sum())
    noises = [Coupled(seed) for seed in range(4000)]
    assert all(noise.choose(p, 3, 3) == noise.choose(p, 3, 3, torch.arange(3)) for noise in noises[:50])
    agreed = sum(noise.choose(p, 3, 3) == noise.choose(q, 3, 3) for noise in noises) / len(noises)
    assert (1 - distance) / (1 + distance) - 0.03 < agreed < 1 - distance + 0.03


def test_numbers_are_the_same_after_they_were_dropped():
    noise, cpu = Coupled(5), torch.device("cpu")
    first = noise.exponentials(0, 10, cpu).clone()
    for position in range(1, 2 * Coupled.KEPT):
        noise.exponentials(position, 10, cpu)
    assert len(noise.kept) <= Coupled.KEPT
    assert torch.equal(noise.exponentials(0, 10, cpu), first)


def test_greedy_needs_no_randomness():
    target = Target(tiny_model("llama"), name="tiny")
    law = make_law(0.0)
    assert answer(target, NoDrafter(), 0, law)[0] == answer(target, DSparkDrafter(tiny_head(target), target), 1, law)[0]
    assert probs(law, [()], torch.tensor([[0.0, 1.0]])).tolist() == [[0.0, 1.0]]
