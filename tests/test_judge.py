"""The native verifier says what the reference says, of every kind of draft that it takes, and leaves the others to it."""

import pytest
import torch

from dspark.core.decode import Scored, judge_by_law, judge_fast
from dspark.core.sampling import Law, Streams
from dspark.core.verifier import Draft, FewTokens, Joined, Verdict
from dspark.generation import generate, make_law
from dspark.target.native import judge as native
from dspark.target.native.judge import judge_natively
from dspark.target.native.runtime import NativeRuntime
from dspark.target.target import Target
from tiny import NATIVE_SHAPE, tiny_head, tiny_model

SIZES = [(16, 16), (16, 5), (128, 40), (1040, 33), (49152, 8192)]  # vocabulary, of which a draft chooses from
LAWS = {"T=1": make_law(1.0), "cool": make_law(0.4), "top-k": make_law(1.0, top_k=7), "top-p, min-p": make_law(0.9, top_p=0.8, min_p=0.02)}


def drawn(size: int, choices: int, num: int, likeness: float, seed: int) -> tuple[Draft, Scored]:
    """A draft of so many tokens from random laws, and target rows that are more or less like those."""
    generator = torch.Generator().manual_seed(seed)
    logits_TV = 3 * torch.randn(num + 1, size, generator=generator)
    seen_KV = logits_TV[:num] + (1 - likeness) * 3 * torch.randn(num, size, generator=generator)
    ids_KC = seen_KV.topk(choices, sorted=False).indices
    probs_KC = seen_KV.gather(1, ids_KC).softmax(-1)
    tokens = [int(ids[row.multinomial(1, generator=generator)]) for ids, row in zip(ids_KC, probs_KC, strict=True)]
    return Draft(tokens, FewTokens(ids_KC, probs_KC, size)), Scored(logits_TV, logits_TV[:, :0])


def verdicts(law: Law, draft: Draft, scored: Scored, seed: int) -> list[Verdict]:
    num = len(scored.logits_TV) - 1
    return [judge(law, [1], draft, num, scored, Streams(seed)) for judge in (judge_natively, judge_by_law)]


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """How often the reference was asked in its place."""
    calls: list[int] = []
    monkeypatch.setattr(native, "judge_fast", lambda *arguments: calls.append(1) or judge_fast(*arguments))
    return calls


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("size", "choices"), SIZES)
def test_verdicts_are_the_references(size, choices, law, asked):
    kinds = set()
    for seed in range(30 if size > 2000 else 300):
        num, likeness = seed % 8, (seed // 8 % 4) / 3
        draft, scored = drawn(size, choices, num, likeness, seed)
        ours, reference = verdicts(LAWS[law], draft, scored, seed)
        assert ours == reference, seed
        kinds.add((num, ours.num_accepted))
    assert not asked and len(kinds) > (8 if size > 2000 else 15)  # drafts of every length stood for any part


@pytest.mark.parametrize("likeness", [0.0, 1.0])
def test_borders_of_the_uniform_numbers(likeness, monkeypatch):
    """Where every number is next to 0, or next to 1, or in between, alike for all."""
    for number in (0.0, 1e-300, 0.25, 0.5, 1 - 2**-53):
        monkeypatch.setattr(Streams, "uniforms", staticmethod(lambda generator, count, number=number: [number] * count))
        for seed in range(40):
            draft, scored = drawn(64, 12, seed % 6, likeness, seed)
            ours, reference = verdicts(LAWS["T=1"], draft, scored, 0)
            assert ours == reference


def test_a_draft_of_the_targets_own_law_stands_whole():
    generator = torch.Generator().manual_seed(0)
    logits_TV = torch.randn(5, 64, generator=generator)
    laws = logits_TV.softmax(-1)
    ids_KC = torch.arange(64).expand(4, -1)
    for seed in range(50):
        tokens = [int(row.multinomial(1, generator=generator)) for row in laws[:4]]
        draft = Draft(tokens, FewTokens(ids_KC, laws[:4].clone(), 64))
        ours, reference = verdicts(LAWS["T=1"], draft, Scored(logits_TV, logits_TV[:, :0]), seed)
        assert ours == reference and ours.num_accepted == 4


def test_tokens_proposed_for_certain(asked):
    """As prompt lookup proposes them."""
    accepted = set()
    for seed in range(200):
        draft, scored = drawn(64, 12, 4, 1.0, seed)
        scored.logits_TV[torch.arange(4), draft.tokens] += 4
        ours, reference = verdicts(LAWS["T=1"], Draft(draft.tokens, FewTokens.certain(draft.tokens, 64, "cpu")), scored, seed)
        assert ours == reference
        accepted.add(ours.num_accepted)
    assert accepted == {0, 1, 2, 3, 4} and not asked


def test_an_impossible_token_ends_the_block():
    draft, scored = drawn(32, 6, 4, 1.0, 3)
    scored.logits_TV[2, draft.tokens[2]] = -float("inf")
    for seed in range(100):
        ours, reference = verdicts(LAWS["T=1"], draft, scored, seed)
        assert ours == reference and ours.num_accepted <= 2


def test_what_it_does_not_take_goes_to_the_reference(asked):
    draft, scored = drawn(64, 12, 3, 0.5, 1)
    dense = torch.stack([draft.probs_KV[k] for k in range(3)])
    double = FewTokens(draft.probs_KV.ids_KC, draft.probs_KV.probs_KC.double(), 64)
    strided = FewTokens(draft.probs_KV.ids_KC, draft.probs_KV.probs_KC.repeat_interleave(2, dim=1)[:, ::2], 64)
    joined = Joined(FewTokens.certain(draft.tokens[:1], 64, "cpu"), FewTokens(draft.probs_KV.ids_KC[1:], draft.probs_KV.probs_KC[1:], 64))
    for count, rows in enumerate((dense, double, strided, joined), 1):
        ours, reference = verdicts(LAWS["T=1"], Draft(draft.tokens, rows), scored, 5)
        assert ours == reference and len(asked) == count
    penalty = make_law(1.0, repetition_penalty=1.3)
    assert len(set(verdicts(penalty, draft, scored, 6))) == 1 and len(asked) == 5
    assert len(set(verdicts(Law(greedy=True), draft, scored, 6))) == 1 and len(asked) == 6
    uneven, rows = drawn(60, 12, 3, 0.5, 1)
    assert len(set(verdicts(LAWS["T=1"], uneven, rows, 6))) == 1 and len(asked) == 7


@pytest.mark.parametrize("speculates", [False, True])
def test_answers_are_those_of_the_reference_loop(speculates, monkeypatch):
    model = tiny_model("llama", **NATIVE_SHAPE)
    target = Target(model, runtime=NativeRuntime(model))
    head = tiny_head(target, rank=16, head_dim=16, block_size=5) if speculates else None

    def answers() -> list[list[int]]:
        return [generate(target, head, [3, 17, 99], 40, temperature=1.0, top_p=0.9, seed=seed, plan="fixed").token_ids for seed in range(5)]

    calls: list[int] = []
    monkeypatch.setattr("dspark.target.target.judge_natively", lambda *arguments: calls.append(1) or judge_natively(*arguments))
    ours = answers()
    assert calls
    monkeypatch.setattr("dspark.target.target.judge_natively", judge_by_law)
    assert answers() == ours
