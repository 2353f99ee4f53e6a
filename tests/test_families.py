"""Every family: roll-back restores the state, and drafted greedy tokens are those of transformers."""

from functools import cache

import pytest
import torch
import transformers

from dspark.drafters import NoDrafter, PromptLookup
from dspark.errors import TargetError
from dspark.generation import generate
from dspark.target.native.runtime import NativeRuntime
from dspark.target.target import Target
from oracle import Oracle, plain_greedy
from tiny import FAMILIES, NATIVE_SHAPE, SHAPE, tiny_head, tiny_model

GAMMA = 5
# Longer than the tiny models' window of 8, so that sliding layers have dropped tokens already.
BEYOND_WINDOW = 19
GAMMAS = range(1, 9)
NUM_NEW = 24
PROMPTS = {
    "one token": [5],
    "short": [3, 17, 99, 45],
    "repeating": [7, 8, 9, 10, 7, 8, 9, 10, 7, 8],
    "beyond the window": list(range(40, 40 + BEYOND_WINDOW)),
}
HEADS = {"vanilla": ("vanilla", 8), "gated": ("gated", 8), "rnn": ("rnn", 8), "dflash": ("vanilla", 0)}
DRAFTERS = (*HEADS, "lookup", "none")
# Two float32 passes of different length give the same row up to this share of its largest value.
ROUNDING = 3e-5
TIE = 1e-4


# Every exactness test also runs on the native runtime, where it takes the family.
NATIVE = ("llama/native", "qwen2/native", "qwen3/native")
CASES = (*FAMILIES, *NATIVE)


@cache
def target_of(family: str, seed: int = 0) -> Target:
    if family not in NATIVE:
        return Target(tiny_model(family, seed))
    model = tiny_model(family.removesuffix("/native"), seed, **NATIVE_SHAPE)
    return Target(model, runtime=NativeRuntime(model))


@cache
def greedy_of(family: str, seed: int, prompt: str, num_new: int = NUM_NEW) -> tuple[int, ...]:
    return tuple(plain_greedy(target_of(family, seed), PROMPTS[prompt], num_new))


def random_ids(count: int, seed: int) -> list[int]:
    return torch.randint(SHAPE["vocab_size"], (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def step_by_step(target: Target, ids: list[int]) -> torch.Tensor:
    """Logits after every token of `ids`, decoded one a pass."""
    state, rows = target.start(), []
    for token in ids:
        rows.append(target.score(state, [token]).logits_TV[0])
        target.rollback(state, 0)
    return torch.stack(rows)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert error(found, expected) < ROUNDING
    assert found.argmax(-1).tolist() == expected.argmax(-1).tolist()


def assert_same_tokens(target: Target, prompt: list[int], found: list[int], expected: list[int]) -> None:
    """Equal, or different first where the two tokens' logits are a tie."""
    if found == expected:
        return
    first = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
    logits = step_by_step(target, [*prompt, *expected[:first]])[-1]
    gap = (logits[found[first]] - logits[expected[first]]).abs().item()
    assert gap < TIE, f"token {first} is {found[first]} instead of {expected[first]}, logits {gap:.2g} apart"


@pytest.mark.parametrize("num_prompt", [*range(1, GAMMA + 3), BEYOND_WINDOW])
@pytest.mark.parametrize("family", CASES)
def test_rollback_equals_plain_decoding_of_the_accepted_tokens(family, num_prompt):
    target = target_of(family)
    target.tap(range(target.num_layers))
    prompt, drafted, following = random_ids(num_prompt, 1), random_ids(GAMMA, 2), random_ids(3, 3)
    for num_accepted in range(GAMMA + 1):
        accepted = drafted[:num_accepted]
        expected = step_by_step(target, [*prompt, *accepted, *following])
        state = target.start()
        target.prefill(state, prompt[:-1])
        scored = target.score(state, [prompt[-1], *drafted])
        assert_same_logits(scored.logits_TV[: num_accepted + 1], expected[num_prompt - 1 : num_prompt + num_accepted])
        target.rollback(state, GAMMA - num_accepted)
        assert state.num_tokens == num_prompt + num_accepted
        assert family in NATIVE or state.cache.get_seq_length() == state.num_tokens
        assert_same_logits(target.score(state, following).logits_TV, expected[-len(following) :])
    target.untap()


@pytest.mark.parametrize("family", CASES)
def test_rounds_in_a_row_with_every_accepted_count_leave_the_plain_state(family):
    target = target_of(family)
    rounds = [(num_accepted, random_ids(GAMMA + 1, num_accepted)) for num_accepted in (0, 5, 1, 4, 2, 3, 0, 0, 5, 5)]
    expected = step_by_step(target, [token for num_accepted, ids in rounds for token in ids[: num_accepted + 1]])
    state, done = target.start(), 0
    for num_accepted, ids in rounds:
        scored = target.score(state, ids)
        target.rollback(state, GAMMA - num_accepted)
        assert_same_logits(scored.logits_TV[: num_accepted + 1], expected[done : done + num_accepted + 1])
        done += num_accepted + 1
    assert state.num_tokens == len(expected)


@pytest.mark.parametrize("family", CASES)
def test_one_rejected_token_left_behind_would_be_seen(family):
    target = target_of(family)
    prompt, drafted, following = random_ids(BEYOND_WINDOW, 1), random_ids(GAMMA, 2), random_ids(3, 3)
    expected = step_by_step(target, [*prompt, *drafted[:2], *following])
    state = target.start()
    target.score(state, [*prompt, *drafted])
    target.rollback(state, GAMMA - 3)
    assert error(target.score(state, following).logits_TV, expected[-len(following) :]) > 100 * ROUNDING


@pytest.mark.parametrize("rows", [1, 3, 8, 64])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "llama/native"])
def test_prefill_in_passes_of_any_size_gives_the_same_state(family, rows, monkeypatch):
    monkeypatch.setattr("dspark.target.target.PREFILL_ROWS", rows)
    target = target_of(family)
    target.tap([0, 2])
    prompt, following = random_ids(30, 4), random_ids(3, 5)
    state, whole = target.start(), target.start()
    features = target.prefill(state, prompt)
    assert error(features, target.score(whole, prompt).features_TMD) < ROUNDING
    assert_same_logits(target.score(state, following).logits_TV, step_by_step(target, prompt + following)[-3:])
    target.untap()


def drafted(family: str, seed: int, prompt: str, drafter: str, gamma: int) -> list[int]:
    target = target_of(family, seed)
    if drafter in HEADS:
        kind, rank = HEADS[drafter]
        return generate(
            target,
            tiny_head(target, kind, rank, block_size=gamma, seed=seed, head_dim=16 if family in NATIVE else 8),
            PROMPTS[prompt],
            NUM_NEW,
        ).token_ids
    chosen = PromptLookup(target.vocab_size, gamma) if drafter == "lookup" else NoDrafter()
    return generate(target, None, PROMPTS[prompt], NUM_NEW, drafter=chosen).token_ids


def assert_drafted_equals_plain(family: str, seed: int, prompt: str, drafter: str, gamma: int) -> None:
    found = drafted(family, seed, prompt, drafter, gamma)
    assert_same_tokens(target_of(family, seed), PROMPTS[prompt], found, list(greedy_of(family, seed, prompt)))


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("family", CASES)
def test_greedy_tokens_equal_transformers(family, drafter):
    for gamma in (1, 4, 8):
        for prompt in ("one token", "repeating"):
            assert_drafted_equals_plain(family, 0, prompt, drafter, gamma)


@pytest.mark.slow
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("family", CASES)
def test_greedy_tokens_equal_transformers_in_full(family, drafter):
    for prompt in PROMPTS:
        for gamma in GAMMAS:
            assert_drafted_equals_plain(family, 1, prompt, drafter, gamma)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("family", CASES)
def test_accepted_counts_are_as_planned_and_tokens_stay_the_same(family, gamma):
    target = target_of(family)
    num_new = (gamma + 1) * (gamma + 2) // 2 + 3
    truth = greedy_of(family, 0, "short", num_new)
    oracle = Oracle(truth, len(PROMPTS["short"]), target.vocab_size, gamma)
    result = generate(target, None, PROMPTS["short"], num_new, drafter=oracle)
    assert_same_tokens(target, PROMPTS["short"], result.token_ids, list(truth))
    assert [done.num_accepted for done in result.rounds_log] == oracle.planned
    assert set(oracle.planned) == set(range(gamma + 1))
    assert oracle.num_features == len(PROMPTS["short"]) + num_new - 1


@pytest.mark.parametrize("drafter", HEADS)
def test_reduced_draft_vocabulary_keeps_the_tokens(drafter):
    kind, rank = HEADS[drafter]
    target = target_of("llama")
    head = tiny_head(target, kind, rank, draft_vocab=32)
    result = generate(target, head, PROMPTS["short"], NUM_NEW)
    assert result.token_ids == list(greedy_of("llama", 0, "short"))


SMALL = {
    key: SHAPE[key]
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 16}
THREE_TO_ONE = ["linear_attention"] * 3 + ["full_attention"]
ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
UNFIT = {
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "recurrent",
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        SMALL | DELTA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        "recurrent",
    ),
    "qwen3_5": (
        "Qwen3_5ForCausalLM",
        "Qwen3_5TextConfig",
        SMALL | DELTA | {"layer_types": THREE_TO_ONE, "rope_parameters": ROPE | {"mrope_section": [2, 1, 1], "mrope_interleaved": True}},
        "recurrent",
    ),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", SMALL | {"layer_types": ["conv", "full_attention"] * 2}, "LinearAttentionLayer"),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        "encoder-decoder",
    ),
    "bert": (
        "BertForMaskedLM",
        "BertConfig",
        {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        "cache",
    ),
    # GPT-1 keeps no keys and values at all: every pass would start from nothing.
    "openai_gpt": (
        "OpenAIGPTLMHeadModel",
        "OpenAIGPTConfig",
        {"vocab_size": 128, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4},
        "cache",
    ),
    # A backbone without output embedding has no logits.
    "no_output": ("LlamaModel", "LlamaConfig", SMALL, "output"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_unfit_models_are_refused_by_name(name):
    model_class, config_class, settings, reason = UNFIT[name]
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings))
    with pytest.raises(TargetError, match=f"{model_class}.*{reason}|{reason}.*{model_class}"):
        Target(model)
