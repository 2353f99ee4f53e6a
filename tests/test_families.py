"""Every family: roll-back restores the state, and drafted greedy tokens are those of transformers.

docs/models.md (models_page.py) is the table of what runs here."""

import dataclasses
from functools import cache

import pytest
import torch
import transformers

import models_page
from dspark.drafters import NoDrafter, PromptLookup
from dspark.errors import TargetError
from dspark.generation import generate
from dspark.target.delta import STEP_BY_STEP, GatedDeltaLayer, Steps
from dspark.target.native.runtime import NativeRuntime
from dspark.target.rollback import tensors_of
from dspark.target.target import State, Target
from dspark.train.sample import sample_batch
from oracle import Oracle, plain_greedy
from tiny import FAMILIES, NATIVE_SHAPE, SHAPE, randomized, tiny_head, tiny_model

GAMMA = 5
# Longer than the tiny models' window of 8, so that sliding layers have dropped tokens already, and not a multiple of any compression.
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
DRAFTERS = (*HEADS, "arbiter", "lookup", "none")
# Two float32 passes of different length give the same row up to this share of its largest value.
ROUNDING = 1e-4
TIE = 1e-4


# Every exactness test also runs on the native runtime, where it takes the family.
NATIVE = tuple(f"{family}/native" for family in models_page.NATIVE)
CASES = (*FAMILIES, *NATIVE)
# By default these run everything, one of each kind of cache runs most, and of the rest only a part does not wait for `make test-slow`.
THOROUGH = ("llama", "gemma3", "gpt_oss", *NATIVE)
KINDS = (*THOROUGH, "lfm2", "qwen3_5", "deepseek_v4", "nemotron_h")
DELTA = ["qwen3_next", "qwen3_5", "qwen3_5_moe", "olmo_hybrid"]
REPLAYING = ["deepseek_v4", "nemotron_h", "mamba2", "granitemoehybrid", "falcon_h1", "kimi_linear"]


def some(case: tuple, by_default: bool):
    """These arguments, by default or in the slow suite."""
    return pytest.param(*case) if by_default else pytest.param(*case, marks=pytest.mark.slow)


@cache
def target_of(family: str, seed: int = 0) -> Target:
    if family not in NATIVE:
        return Target(tiny_model(family, seed))
    model = tiny_model(family.removesuffix("/native"), seed, **NATIVE_SHAPE)
    return Target(model, runtime=NativeRuntime(model))


@cache
def greedy_of(family: str, seed: int, prompt: str, num_new: int = NUM_NEW) -> tuple[int, ...]:
    target = target_of(family, seed)
    with target.forgets.as_decoded():  # Nemotron-H's own prompt pass is not what its decoding would do
        return tuple(plain_greedy(target, PROMPTS[prompt], num_new))


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


def assert_same_state(found: State, expected: State) -> None:
    """The same numbers of tokens, and caches with the same tensors and counts in the same places."""
    assert found.num_tokens == expected.num_tokens
    if not hasattr(found.cache, "layers"):
        return  # the native cache is compared by its logits: what lies past its tokens means nothing
    for layer, other in zip(found.cache.layers, expected.cache.layers, strict=True):
        assert type(layer) is type(other) and vars(layer).keys() == vars(other).keys()
        for name, value in vars(layer).items():
            tensors, others = tensors_of(value), tensors_of(vars(other)[name])
            assert [t.shape for t in tensors] == [t.shape for t in others], name
            assert all(error(t, o) < ROUNDING for t, o in zip(tensors, others, strict=True) if t.numel()), name
            assert tensors or value == vars(other)[name], name


def one_by_one(target: Target, state: State, tokens: list[int]) -> torch.Tensor:
    rows = []
    for token in tokens:
        rows.append(target.score(state, [token]).logits_TV[0])
        target.rollback(state, 0)
    return torch.stack(rows)


def check_rollback(target: Target, num_prompt: int, gamma: int = GAMMA) -> None:
    """For every accepted count: logits of the verify pass, the state after it, and the next logits are those of plain decoding."""
    prompt, drafted, following = random_ids(num_prompt, 1), random_ids(gamma, 2), random_ids(3, 3)
    plain = target.start()
    rows = one_by_one(target, plain, prompt)
    for num_accepted in range(gamma + 1):
        if num_accepted:
            rows = torch.cat([rows, one_by_one(target, plain, drafted[num_accepted - 1 : num_accepted])])
        state, expected = target.start(), target.fork(plain, plain.num_tokens)
        target.prefill(state, prompt[:-1])
        scored = target.score(state, [prompt[-1], *drafted])
        assert_same_logits(scored.logits_TV[: num_accepted + 1], rows[num_prompt - 1 :])
        target.rollback(state, gamma - num_accepted)
        assert_same_state(state, expected)
        assert_same_logits(target.score(state, following).logits_TV, one_by_one(target, expected, following))


@pytest.mark.parametrize(
    "family,num_prompt",
    [
        some((family, num_prompt), family in THOROUGH or (family in KINDS and num_prompt in (1, 4)) or num_prompt == BEYOND_WINDOW)
        for family in CASES
        for num_prompt in [*range(1, GAMMA + 3), BEYOND_WINDOW]
    ],
)
def test_rollback_equals_plain_decoding_of_the_accepted_tokens(family, num_prompt):
    target = target_of(family)
    target.tap(range(target.num_layers))
    check_rollback(target, num_prompt)
    target.untap()


@pytest.mark.parametrize(
    "family", [some((family,), family in KINDS) for family in ("llama", "gemma3", "gemma4", "step3p7", "lfm2", *DELTA, *REPLAYING)]
)
def test_transformers_own_cache_would_not_pass(family):
    target = Target(tiny_model(family))
    # as transformers makes and crops it, without windows that keep what was dropped, recomputed states, or snapshots
    stock = dataclasses.replace(target.forgets, delta=frozenset(), snapshot=frozenset())
    target.forgets = stock
    object.__setattr__(stock, "new_cache", lambda: transformers.DynamicCache(config=target.model.config))
    if family == "llama":
        check_rollback(target, BEYOND_WINDOW)  # whose cache holds every token
        return
    with pytest.raises((AssertionError, RuntimeError)):
        check_rollback(target, BEYOND_WINDOW)


def test_nemotron_as_transformers_runs_it_would_not_pass():
    target = Target(tiny_model("nemotron_h"))
    target.forgets = dataclasses.replace(target.forgets, clamped=())
    with pytest.raises(AssertionError):
        check_rollback(target, BEYOND_WINDOW)


@pytest.mark.parametrize("family", [some((family,), family in KINDS) for family in DELTA])
def test_a_recurrent_state_left_as_it_was_would_be_seen(family, monkeypatch):
    monkeypatch.setattr(GatedDeltaLayer, "_without", lambda layer, num_rejected: layer.recurrent_states[0])
    with pytest.raises(AssertionError):
        check_rollback(target_of(family), BEYOND_WINDOW)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", range(1, 9))
def test_recomputed_delta_states_have_the_bits_of_plain_decoding(num_rows, dtype):
    """The rule alone, given the same inputs: what comes before it is a matrix product, whose bits depend on the number of rows."""
    rule = vars(transformers.models.qwen3_5.modeling_qwen3_5)[STEP_BY_STEP]
    target_of("qwen3_5")  # whose kernels are watched from then on
    noise = torch.Generator().manual_seed(num_rows)
    query, key = (torch.randn(1, 8, 2, 16, generator=noise).to(dtype) for _ in range(2))
    value, state = torch.randn(1, 8, 4, 16, generator=noise).to(dtype), torch.randn(1, 4, 16, 16, generator=noise)
    g, beta = -torch.rand(1, 8, 4, generator=noise), torch.rand(1, 8, 4, generator=noise).to(dtype)
    options = {"use_qk_l2norm_in_kernel": True}
    stepped = state
    for t in range(num_rows):
        _, stepped = rule(
            *(rows[:, t : t + 1] for rows in (query, key, value)), g=g[:, t : t + 1], beta=beta[:, t : t + 1], initial_state=stepped,
            output_final_state=True, **options,
        )  # fmt: skip
    assert torch.equal(Steps(key, value, g, beta, rule, options).applied(state, num_rows), stepped)


@pytest.mark.parametrize("family", [some((family,), family in KINDS) for family in DELTA])
def test_states_in_bfloat16_are_near_those_of_plain_decoding(family):
    target = Target(tiny_model(family).bfloat16())
    prompt, drafted = random_ids(BEYOND_WINDOW, 1), random_ids(GAMMA, 2)
    tried, plain = target.start(), target.start()
    for state in (tried, plain):
        target.prefill(state, prompt[:-1])
    target.score(tried, [prompt[-1], *drafted])
    target.rollback(tried, GAMMA - 2)
    one_by_one(target, plain, [prompt[-1], *drafted[:2]])
    for i in target.forgets.delta:
        layer, other = tried.cache.layers[i], plain.cache.layers[i]
        assert layer.recurrent_states[0].dtype == torch.float32
        assert error(layer.recurrent_states[0], other.recurrent_states[0]) < 0.02


def test_a_piece_of_a_prompt_keeps_nothing_for_a_roll_back_and_says_so():
    target = target_of("qwen3_5")
    state = target.start()
    target.score(state, random_ids(12, 1), num_logits=1)
    assert all(layer.before is None and layer.steps is None for layer in state.cache.layers[:3])
    with pytest.raises(TargetError, match="verify pass"):
        target.rollback(state, 2)


@pytest.mark.parametrize("family", [some((family,), family in KINDS) for family in CASES])
def test_a_fork_goes_its_own_way(family):
    target = target_of(family)
    state = target.start()
    target.prefill(state, random_ids(BEYOND_WINDOW, 1))
    before = target.fork(state, BEYOND_WINDOW)
    for seed in (2, 3):
        target.score(state, random_ids(4, seed))
        target.rollback(state, 2)
    again = target.start()
    target.prefill(again, random_ids(BEYOND_WINDOW, 1))
    assert_same_state(before, again)
    shorter = target.fork(before, BEYOND_WINDOW - 5)
    assert (shorter is None) == any(type(layer).__name__ not in HOLDING for layer in getattr(before.cache, "layers", ()))
    if shorter is not None:
        again = target.start()
        target.prefill(again, random_ids(BEYOND_WINDOW, 1)[:-5])
        assert_same_state(shorter, again)


HOLDING = ("DynamicLayer", "DynamicIndexedLayer", "DummyLayer")


@pytest.mark.parametrize("family", [some((family,), family in KINDS) for family in CASES])
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


@pytest.mark.parametrize("family", [some((family,), family in THOROUGH) for family in CASES])
def test_one_rejected_token_left_behind_would_be_seen(family):
    target = target_of(family)
    prompt, drafted, following = random_ids(BEYOND_WINDOW, 1), random_ids(GAMMA, 2), random_ids(3, 3)
    expected = step_by_step(target, [*prompt, *drafted[:2], *following])
    state = target.start()
    target.score(state, [*prompt, *drafted])
    target.rollback(state, GAMMA - 3)
    assert error(target.score(state, following).logits_TV, expected[-len(following) :]) > 30 * ROUNDING


@pytest.mark.parametrize(
    "family,rows",
    [some((family, rows), family in KINDS and (family in THOROUGH or rows == 3)) for family in CASES for rows in (1, 3, 8, 64)],
)
def test_prefill_in_passes_of_any_size_gives_the_same_state(family, rows, monkeypatch):
    monkeypatch.setattr("dspark.target.target.PREFILL_ROWS", rows)
    target = target_of(family)
    target.tap([0, 2])
    prompt, following = random_ids(30, 4), random_ids(3, 5)
    state, whole = target.start(), target.start()
    features = target.prefill(state, prompt)
    assert error(features, target.score(whole, prompt).features_TMD) < ROUNDING
    expected = step_by_step(target, prompt + following)
    target.rollback(whole, 0)
    assert_same_state(state, whole)
    assert_same_logits(target.score(state, following).logits_TV, expected[-3:])
    target.untap()


def drafted(family: str, seed: int, prompt: str, drafter: str, gamma: int) -> list[int]:
    target = target_of(family, seed)
    if drafter in HEADS or drafter == "arbiter":
        kind, rank = HEADS.get(drafter, ("vanilla", 8))
        head = tiny_head(target, kind, rank, block_size=gamma, seed=seed, head_dim=16 if family in NATIVE else 8)
        named = {"drafter": "auto"} if drafter == "arbiter" else {}
        return generate(target, head, PROMPTS[prompt], NUM_NEW, **named).token_ids
    chosen = PromptLookup(target.vocab_size, gamma) if drafter == "lookup" else NoDrafter()
    return generate(target, None, PROMPTS[prompt], NUM_NEW, drafter=chosen).token_ids


def assert_drafted_equals_plain(family: str, seed: int, prompt: str, drafter: str, gamma: int) -> None:
    found = drafted(family, seed, prompt, drafter, gamma)
    assert_same_tokens(target_of(family, seed), PROMPTS[prompt], found, list(greedy_of(family, seed, prompt)))


@pytest.mark.parametrize(
    "family,drafter",
    [
        some(
            (family, drafter),
            family in THOROUGH or drafter == "vanilla" or (family in KINDS and drafter in ("dflash", "arbiter", "lookup")),
        )
        for family in CASES
        for drafter in DRAFTERS
    ],
)
def test_greedy_tokens_equal_transformers(family, drafter):
    for gamma in (1, 4, 8) if family in THOROUGH else (4,):
        for prompt in ("one token", "repeating") if family in THOROUGH else ("repeating",):
            assert_drafted_equals_plain(family, 0, prompt, drafter, gamma)


@pytest.mark.slow
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("family", CASES)
def test_greedy_tokens_equal_transformers_in_full(family, drafter):
    for prompt in PROMPTS:
        for gamma in GAMMAS if family in THOROUGH else (1, 3, 8):
            assert_drafted_equals_plain(family, 1, prompt, drafter, gamma)


@pytest.mark.parametrize(
    "family,gamma", [some((family, gamma), family in KINDS and (family in THOROUGH or gamma == 4)) for family in CASES for gamma in GAMMAS]
)
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


@pytest.mark.parametrize(
    "family", [some((family,), family in ("deepseek_v3", "qwen3_5", "deepseek_v4", "nemotron_h")) for family in FAMILIES]
)
def test_training_samples_prompts_of_any_length_together(family):
    target = target_of(family)
    answers = sample_batch(target, [PROMPTS[name] for name in PROMPTS], [0.0] * len(PROMPTS), 8, seed=0)
    assert answers == [list(greedy_of(family, 0, name)[:8]) for name in PROMPTS]


@pytest.mark.parametrize("drafter", HEADS)
def test_reduced_draft_vocabulary_keeps_the_tokens(drafter):
    kind, rank = HEADS[drafter]
    target = target_of("llama")
    head = tiny_head(target, kind, rank, draft_vocab=32)
    result = generate(target, head, PROMPTS["short"], NUM_NEW)
    assert result.token_ids == list(greedy_of("llama", 0, "short"))


SMALL = {name: SHAPE[name] for name in SHAPE if name not in ("head_dim", "tie_word_embeddings")}
JAMBA = SMALL | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8}
UNFIT = {
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "LinearAttentionLayer of mamba",
    ),
    "jamba": ("JambaForCausalLM", "JambaConfig", JAMBA, "LinearAttentionLayer of jamba"),
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


def unfit_model(name: str):
    model_class, config_class, settings, _ = UNFIT[name]
    return getattr(transformers, model_class)(getattr(transformers, config_class)(**settings))


@pytest.mark.parametrize("name", UNFIT)
def test_unfit_models_are_refused_by_name(name):
    model_class, _, _, reason = UNFIT[name]
    with pytest.raises(TargetError, match=f"{model_class}.*{reason}|{reason}.*{model_class}"):
        Target(unfit_model(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mamba", "jamba"])
def test_a_model_that_does_not_roll_back_is_refused_though_the_user_asks(name, dtype):
    """A pass of several rows forgets their state in transformers 5.23."""
    with pytest.raises(TargetError, match="does not roll back exactly"):
        Target(randomized(unfit_model(name)).to(dtype), rollback_by="snapshot")


@pytest.mark.parametrize("family", [some((family,), family == "qwen3_5") for family in ("qwen3_5", "deepseek_v4", "mamba2")])
def test_a_model_that_no_test_covers_is_taken_if_the_user_asks_and_it_rolls_back(family, monkeypatch):
    for name in ("GATED_DELTA", "SNAPSHOT_FAMILIES", "SNAPSHOT_LAYERS"):
        monkeypatch.setattr(f"dspark.target.rollback.{name}", set())
    model = tiny_model(family)
    with pytest.raises(TargetError, match="no test covers"):
        Target(model)
    target = Target(model, rollback_by="snapshot")
    check_rollback(target, BEYOND_WINDOW)
    Target(model.bfloat16(), rollback_by="snapshot")


def test_the_page_of_models_is_not_stale():
    assert models_page.PAGE.read_text() == models_page.page(target_of), "write it anew: python tests/models_page.py"
