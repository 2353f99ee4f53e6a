"""Answers of the engine to requests without a seed have the joint law of the target."""

import random
from collections import Counter
from functools import cache

import pytest

from chances import p_value
from dspark.core.sampling import Law, probs
from dspark.drafters.arbiter import NOMINAL
from dspark.engine.engine import Engine
from dspark.engine.load import Load
from dspark.engine.request import Finished, Request, Tokens
from dspark.generation import make_law
from dspark.target.native.runtime import NativeRuntime
from dspark.target.target import Target
from tiny import NATIVE_SHAPE, tiny_head, tiny_model

VOCABULARY = 16
PROMPT = (4, 0, 1, 4, 0)  # the lookup proposes 1
NUM_NEW, NUM_COUNTED = 4, 3
LAWS = {"T=1": make_law(1.0), "top-p": make_law(0.8, top_p=0.9), "repetition": make_law(1.2, repetition_penalty=1.5)}


@pytest.fixture(autouse=True)
def repeatable(monkeypatch):
    """The requests' random seeds are the same in every run, and so are costs."""
    monkeypatch.setattr("dspark.engine.running.randbits", random.Random(5).getrandbits)
    monkeypatch.setattr("dspark.engine.engine.measured_load", lambda *measured: Load(NOMINAL, {}))


@cache
def target() -> Target:
    model = tiny_model("llama", vocab_size=VOCABULARY, num_hidden_layers=2, **NATIVE_SHAPE)
    return Target(model, name="tiny", runtime=NativeRuntime(model))


@cache
def exact_law(law: Law) -> dict[tuple[int, ...], float]:
    """Every beginning's probability under the target alone."""
    chances = {(): 1.0}
    for _ in range(NUM_COUNTED):
        longer = {}
        for tokens, chance in chances.items():
            text = [*PROMPT, *tokens]
            row_V = probs(law, [text], target().score(target().start(), text, num_logits=1).logits_TV.double())[0]
            longer |= {(*tokens, x): chance * row_V[x].item() for x in range(VOCABULARY)}
        chances = longer
    return chances


def sample(law: Law, num_samples: int, plan: str) -> tuple[Counter, Counter]:
    """How often each beginning came, and how each token did; as many requests run at once as may."""
    engine = Engine(target(), tiny_head(target(), head_dim=16, block_size=5), plan=plan, max_waiting=num_samples)
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
        engine.submit(Request(PROMPT, NUM_NEW, law, eos_ids=frozenset()), ear(ids))
    for _ in range(NUM_NEW * num_samples):
        if not (engine.waiting or engine.running):
            break
        engine.step()
    assert all(len(ids) == NUM_NEW for ids in answers)
    return Counter(tuple(ids[:NUM_COUNTED]) for ids in answers), sources


def test_a_wrong_rule_is_seen(monkeypatch):
    monkeypatch.setattr("dspark.core.verifier.acceptance", lambda p_V, q_V, token, standing: 1.0)
    said, _ = sample(LAWS["T=1"], 300, "fixed")
    assert p_value(said, exact_law(LAWS["T=1"])) < 1e-6


@pytest.mark.parametrize("num_samples", [300, pytest.param(5_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("law", "plan"), [("T=1", "fixed"), ("top-p", "threshold:0.01"), ("repetition", "auto")])
def test_answers_of_the_engine_have_the_law_of_the_target(law, plan, num_samples):
    said, sources = sample(LAWS[law], num_samples, plan)
    assert p_value(said, exact_law(LAWS[law])) > 1e-5
    assert min(sources["accepted"], sources["corrected"]) > num_samples / 20
