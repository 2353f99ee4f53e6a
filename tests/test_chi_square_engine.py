"""Answers of the engine to requests without a seed have the joint law of the target."""

import random
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cache

import pytest

from chances import p_value
from dspark.core.decode import judge_fast
from dspark.core.sampling import Law, probs
from dspark.drafters.arbiter import NOMINAL
from dspark.engine.engine import Engine
from dspark.engine.grammar import Grammar
from dspark.engine.load import Load
from dspark.engine.request import Finished, Request, Tokens
from dspark.generation import make_law
from dspark.head.mtp import MtpHead
from dspark.target.native.runtime import NativeRuntime
from dspark.target.target import Target
from test_chi_square import tiny_modules
from tiny import NATIVE_SHAPE, tiny_head, tiny_model, tiny_recurrent
from words import word_tokenizer

VOCABULARY = 16
PROMPT = (4, 0, 1, 4, 0)  # the lookup proposes 1
NUM_NEW, NUM_COUNTED = 4, 3
LAWS = {"T=1": make_law(1.0), "top-p": make_law(0.8, top_p=0.9), "repetition": make_law(1.2, repetition_penalty=1.5)}


@pytest.fixture(autouse=True)
def repeatable(monkeypatch):
    """The requests' random seeds are the same in every run, and so are costs."""
    monkeypatch.setattr("dspark.engine.running.randbits", random.Random(5).getrandbits)
    monkeypatch.setattr("dspark.engine.engine.measured_load", lambda *measured: Load(NOMINAL, {}))
    monkeypatch.setattr("dspark.engine.engine.planning_costs", lambda *measured: NOMINAL)


@cache
def target(vocab_size: int = VOCABULARY) -> Target:
    model = tiny_model("llama", vocab_size=vocab_size, num_hidden_layers=2, **NATIVE_SHAPE)
    return Target(model, name="tiny", runtime=NativeRuntime(model))


@cache
def exact_law(law: Law, length: int = NUM_COUNTED, vocab_size: int = VOCABULARY, end: int | None = None) -> dict[tuple[int, ...], float]:
    """The probability under the target alone of every beginning of so many tokens, or fewer with the last one `end`."""
    begun, chances = {(): 1.0}, defaultdict(float)
    while begun:
        tokens, chance = begun.popitem()
        text = [*PROMPT, *tokens]
        row_V = probs(law, [text], target(vocab_size).score(target(vocab_size).start(), text, num_logits=1).logits_TV.double())[0]
        for x in row_V.nonzero()[:, 0].tolist():
            (chances if x == end or len(tokens) + 1 == length else begun)[(*tokens, x)] = chance * row_V[x].item()
    return chances


HEADS = {
    "dspark": lambda target: {"head": tiny_head(target, head_dim=16, block_size=5)},
    "chained": lambda target: {"head": tiny_head(target, rank=16, head_dim=16, block_size=5)},  # drawn natively
    "modules": lambda target: {"mtp": MtpHead(*with_target(target, 2))},
    "native eagle3": lambda target: {"head": tiny_recurrent(target, "eagle3", block_size=3, seed=4, head_dim=16)},  # drawn natively
    "trained mtp": lambda target: {"head": tiny_recurrent(target, "mtp", block_size=3, draft_vocab=9, seed=4)},
}


def with_target(target: Target, count: int):
    modules, outputs = tiny_modules(target, count)
    return modules, target, outputs


def sample(request: Callable[[], Request], num_samples: int, plan: str, drafter: str = "dspark", vocab_size: int = VOCABULARY):
    """The answers to so many requests, how each of their tokens came, and who drafted how many tokens; as many run at once as may."""
    drafted = Counter()
    engine = Engine(target(vocab_size), **HEADS[drafter](target(vocab_size)), plan=plan, max_waiting=num_samples)
    engine.on_step = lambda step: drafted.update(done.drafter for done in step.rounds for _ in range(done.verified))
    answers, sources = [[] for _ in range(num_samples)], Counter()

    def ear(ids: list[int]):
        def hear(event):
            if isinstance(event, Tokens):
                ids.extend(event.ids)
                sources.update(event.sources)
            else:
                assert isinstance(event, Finished)

        return hear

    for ids in answers:
        engine.submit(request(), ear(ids))
    for _ in range(20 * num_samples):
        if not (engine.waiting or engine.running):
            break
        engine.step()
    return answers, sources, drafted


def beginnings(answers: list[list[int]]) -> Counter:
    assert all(len(ids) == NUM_NEW for ids in answers)
    return Counter(tuple(ids[:NUM_COUNTED]) for ids in answers)


def plain(law: Law) -> Callable[[], Request]:
    return lambda: Request(PROMPT, NUM_NEW, law, eos_ids=frozenset())


def test_a_wrong_rule_is_seen(monkeypatch):
    monkeypatch.setattr("dspark.core.verifier.acceptance", lambda p_V, q_V, token, standing: 1.0)
    monkeypatch.setattr("dspark.target.target.judge_natively", judge_fast)  # which obeys it
    answers, _, _ = sample(plain(LAWS["T=1"]), 300, "fixed")
    assert p_value(beginnings(answers), exact_law(LAWS["T=1"])) < 1e-6


@pytest.mark.parametrize("num_samples", [300, pytest.param(5_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("law", "plan"), [("T=1", "fixed"), ("top-p", "threshold:0.01"), ("repetition", "auto")])
def test_answers_of_the_engine_have_the_law_of_the_target(law, plan, num_samples):
    answers, sources, _ = sample(plain(LAWS[law]), num_samples, plan)
    assert p_value(beginnings(answers), exact_law(LAWS[law])) > 1e-5
    assert min(sources["accepted"], sources["corrected"]) > num_samples / 20


@pytest.mark.slow
@pytest.mark.parametrize("num_samples", [5_000])
@pytest.mark.parametrize(
    ("drafter", "plan"), [("modules", "fixed"), ("trained mtp", "auto"), ("native eagle3", "fixed"), ("chained", "fixed")]
)
def test_whoever_drafts_in_the_engine_keeps_the_law(drafter, plan, num_samples):
    answers, sources, drafted = sample(plain(LAWS["T=1"]), num_samples, plan, drafter)
    assert p_value(beginnings(answers), exact_law(LAWS["T=1"])) > 1e-5
    assert drafted["dspark" if drafter == "chained" else "mtp"] > num_samples / 20
    assert min(sources["accepted"], sources["corrected"]) > num_samples / 20


# Tokens that several spellings share, so that what a grammar forces can be said in more than one way.
ABC = {"alphabet": "abc", "words": ["ab", "bc"], "special": ["$"]}
JSON = {"alphabet": '[],12"aeflrstu', "words": ["12", "1,", "true", "fal"], "special": ["$"]}
# grammar -> (its tokenizer, how to make it, tokens of the answer, of which are counted)
GRAMMARS = {
    "regex": (ABC, lambda words, ends: Grammar.from_regex(words, "(a|b)cabcab[abc]*", end_ids=ends), 8, 6),
    "schema": (
        JSON,
        lambda words, ends: Grammar.from_json_schema(
            words,
            {"type": "array", "prefixItems": [{"enum": [1, 12, True]}, {"type": "boolean"}], "items": False, "minItems": 2},
            end_ids=ends,
        ),
        14,
        14,
    ),
}
WIDE = 32  # more than any of these tokenizers has


@pytest.mark.slow
@pytest.mark.parametrize("num_samples", [5_000])
@pytest.mark.parametrize(("grammar", "drafter"), [("regex", "dspark"), ("schema", "modules")])
def test_answers_that_follow_a_grammar_have_the_masked_law(grammar, drafter, num_samples):
    settings, make, length, num_counted = GRAMMARS[grammar]
    words = word_tokenizer(**settings)
    end = words.eos_token_id
    made = make(words, [end])

    def request() -> Request:
        matcher = made.matcher(len(PROMPT))
        law = make_law(1.0, logits_processors=[matcher.processor])
        return Request(PROMPT, length, law, eos_ids=frozenset([end]), propose=matcher.propose)

    answers, sources, drafted = sample(request, num_samples, "fixed", drafter, WIDE)
    said = Counter(tuple(ids[:num_counted]) for ids in answers)
    assert p_value(said, exact_law(request().law, num_counted, WIDE, end)) > 1e-5
    assert min(drafted["grammar"], drafted["mtp" if drafter == "modules" else "dspark"]) > num_samples / 20
    assert min(sources["accepted"], sources["corrected"]) > num_samples / 20
