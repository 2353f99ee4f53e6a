"""What the tests of grammars share: rounds under a law with a mask, and requests of the engine that each follow a grammar."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from dspark.core.decode import decode, judge_coupled, judge_fast
from dspark.core.sampling import Coupled, Law, Streams, probs
from dspark.drafters import NoDrafter
from dspark.engine.engine import Engine
from dspark.engine.request import Failed, Finished, Request
from dspark.generation import stopping_rule
from dspark.target.target import Target
from test_law import DRAFTS, PROMPT, Case, one_hot
from tiny import tiny_head, tiny_model


def masked_case(matcher: Any, law: Law, draft: str, possible: Callable[[tuple[int, ...]], bool], spread: float = 1.0) -> Case:
    """As `test_law.make_case`, with the grammar's processor in the law. After an answer that is not `possible` there is no law; any
    will do."""
    rng = torch.Generator().manual_seed(0)
    table = torch.randn(5, 5, 5, generator=rng, dtype=torch.float64) * spread
    law = Law((*law.processors, matcher.processor), law.warpers, law.greedy)

    @cache
    def p(tokens):
        if not possible(tokens[len(PROMPT) :]):
            return torch.full((5,), 0.2, dtype=torch.float64)
        return probs(law, [tokens], table[tokens[-2:]][None])[0]

    def forced(tokens):
        proposed = matcher.propose(tokens)
        return one_hot(proposed[0]) if proposed else p(tokens)

    q = cache(forced if draft == "forced" else lambda tokens: DRAFTS[draft](p(tokens), rng))
    return Case(p, q, cache(lambda tokens: 0.3 + 0.7 * torch.rand(1, generator=rng).item()))


def wide_target(tokenizer) -> Target:
    """Its vocabulary is wider than the tokenizer's."""
    vocab_size = len(tokenizer) + 21
    return Target(tiny_model("llama", vocab_size=vocab_size, eos_token_id=tokenizer.eos_token_id, max_position_embeddings=512), tokenizer)


def answers_together(
    target: Target, with_head: bool, grammars: Sequence[Any], law: Callable[[float, Any], Law], limit: int
) -> list[list[int]]:
    """The engine's answers to one request a grammar, all at once: every third greedy, every second with its forced tokens proposed.
    Each is held to the plain loop's. `law` makes one of a temperature and a processor."""
    engine = Engine(target, tiny_head(target, block_size=5) if with_head else None, plan="fixed")
    heard: list[list] = [[] for _ in grammars]
    plain, drafters = [], set()
    engine.on_step = lambda step: drafters.update(done.drafter for done in step.rounds)
    for i, grammar in enumerate(grammars):
        prompt, seed = [i, 40], None if i % 3 == 0 else i
        temperature, noise, judge = (0.0, Streams(0), judge_fast) if seed is None else (1.0, Coupled(seed), judge_coupled)
        alone, matcher = (grammar.matcher(len(prompt)) for _ in range(2))
        ends = stopping_rule(target, target.eos_ids, ())
        rounds = decode(target, NoDrafter(), prompt, law(temperature, alone.processor), noise, limit, ends, judge=judge)
        plain.append([token for done in rounds for token in done.tokens])
        propose = matcher.propose if i % 2 else None
        engine.submit(Request(prompt, limit, law(temperature, matcher.processor), seed, propose=propose), heard[i].append)
    for _ in range(2000):
        if all(events and isinstance(events[-1], Finished | Failed) for events in heard):
            break
        engine.step()
    assert all(isinstance(events[-1], Finished) for events in heard), heard
    assert [[token for event in events[:-1] for token in event.ids] for events in heard] == plain
    assert {"grammar", "dspark"} <= drafters if with_head else "grammar" in drafters
    return plain
