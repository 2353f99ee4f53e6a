"""The native runtime: the same numbers as transformers', the same bits for a row whatever rows are beside it,
and never in the way of a model or a machine it cannot serve."""

import ctypes
import hashlib
import math
import mmap
import os
import platform
import stat
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from dspark.config import WINDOW_STEP
from dspark.core.sampling import Coupled, best
from dspark.drafters import DSparkDrafter, PromptLookup
from dspark.drafters.dspark import Ask, draft_many
from dspark.errors import LogitsError, RuntimeUnavailable, SettingError
from dspark.generation import generate, make_law
from dspark.head.context import EagerRunner, NativeRunner, make_runner
from dspark.head.folder import load_head, save_head
from dspark.target.load import load_target
from dspark.target.native import build
from dspark.target.native.cache import PAGE_TOKENS
from dspark.target.native.pages import gather_weights, let_go, mapped_checkpoints
from dspark.target.native.runtime import NativeRuntime, reason_against
from dspark.target.native.stack import MAX_ROWS, Drawn
from dspark.target.quantize import is_int8, num_bytes, quantize_int8, rows_of
from dspark.target.target import Target
from saved import save_tiny_target
from tiny import NATIVE_SHAPE, tiny_head, tiny_model

FAMILIES = ("llama", "qwen2", "qwen3")
DTYPES = (torch.float32, torch.bfloat16, torch.int8)
# Of 16 as in the tiny shapes, and of whole tiles of the matrix unit: one, more, the most.
HEAD_DIMS = (16, 32, 64, 128)
# 48 is no multiple of the 32 products of one bfloat16 step, 3 query heads are no multiple of the threads.
ROUNDING = 3e-5
ODD = NATIVE_SHAPE | {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 80}


def native(family: str, dtype: torch.dtype = torch.float32, **shape) -> Target:
    model = tiny_model(family, **(NATIVE_SHAPE | shape)).to(torch.bfloat16 if dtype == torch.int8 else dtype)
    if dtype == torch.int8:
        quantize_int8(model)
    return Target(model, name="tiny", runtime=NativeRuntime(model))


def ids_of(count: int, seed: int = 0) -> list[int]:
    return torch.randint(128, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def rows_in_passes(target: Target, ids: list[int], sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    state, logits, features = target.start(), [], []
    for size in sizes:
        done = target.score(state, ids[state.num_tokens : state.num_tokens + size])
        target.rollback(state, 0)
        logits.append(done.logits_TV)
        features.append(done.features_TMD)
    return torch.cat(logits), torch.cat(features)


def resized(model):
    model.resize_token_embeddings(137, mean_resizing=False)


CHANGES = {
    "norms through .data": lambda m: m.model.norm.weight.data.mul_(2.0),
    "biases through .data": lambda m: m.model.layers[1].self_attn.k_proj.bias.data.add_(1.0),
    "weights": lambda m: m.model.layers[1].mlp.up_proj.weight.data.mul_(2.0),
    "a module": lambda m: setattr(m.model.layers[2].mlp, "down_proj", nn.Linear(64, 32, bias=False)),
    "more tokens than a multiple of 16": resized,
    "another precision": lambda m: m.half(),
}


@pytest.mark.filterwarnings("ignore:decoding eagerly")
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_changed_between_requests_is_seen_as_it_is(change):
    target, ids = native("qwen2"), ids_of(20)
    before = target.score(target.start(), ids).logits_TV
    with torch.no_grad():
        CHANGES[change](target.model)
    eager = Target(target.model)
    expected = eager.score(eager.start(), ids).logits_TV
    found = target.score(target.start(), ids).logits_TV
    assert error(found, expected) < ROUNDING
    assert found.shape != before.shape or error(found, before) > 10 * ROUNDING or change == "another precision"


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_token_of_a_row_is_the_first_of_equals(dtype, threads):
    target = native("llama", dtype)
    with torch.no_grad():
        rows = target.model.lm_head.weight
        rows[1::2] = rows[torch.randperm(64, generator=torch.Generator().manual_seed(0)) * 2]  # every logit twice, far apart
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        scored = target.score(target.start(), ids_of(70))
    finally:
        torch.set_num_threads(before)
    assert scored.best_T == best(scored.logits_TV)
    assert len(set(scored.best_T)) > 10
    assert all((row == row.max()).sum() == 2 for row in scored.logits_TV)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_without_a_best_token_is_refused(value):
    target = native("llama")
    with torch.no_grad():
        target.model.lm_head.weight[77] = value
    with pytest.raises(LogitsError, match="at token 0"):
        target.score(target.start(), ids_of(5))


def windowed(head, window: int):
    head.config = replace(head.config, window=window)
    return head


@pytest.mark.parametrize("head_dim", [16, 32])  # with 32, tiles where there are such
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [20, 97, 150])
def test_a_window_sees_the_last_pages_and_nothing_before(dtype, num_tokens, head_dim):
    target = native("llama", dtype, head_dim=head_dim)
    head = windowed(tiny_head(target, head_dim=head_dim).to(dtype), 40)
    features = torch.randn(num_tokens, 2, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    anchor_1D = target.embed(torch.tensor([7]))
    first = max(0, num_tokens - 40) // 32 * 32
    assert head.config.first_seen(num_tokens) == first and PAGE_TOKENS == WINDOW_STEP

    def hidden(runner, features):
        context = runner.start()
        runner.commit([(context, features)])
        return runner.block([context], anchor_1D)[0][0].float()

    found = hidden(make_runner(head, target), features)
    assert error(found, hidden(EagerRunner(head), features)) < (ROUNDING if dtype == torch.float32 else 0.03)
    elsewhere = torch.cat([torch.randn_like(features[:first]), features[first:]])
    assert torch.equal(found, hidden(make_runner(head, target), elsewhere))
    whole = hidden(make_runner(windowed(head, 0), target), features)
    assert torch.equal(found, whole) == (first == 0)


@pytest.mark.parametrize("shape", [NATIVE_SHAPE, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_are_those_of_transformers(family, shape):
    target = native(family, **shape)
    eager = Target(target.model)
    ids = ids_of(100)
    for each in (target, eager):
        each.tap((-1, 0, 3))
    expected = eager.score(eager.start(), ids)
    found = target.score(target.start(), ids)
    assert error(found.logits_TV, expected.logits_TV) < ROUNDING
    assert error(found.features_TMD, expected.features_TMD) < ROUNDING


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_bfloat16_is_as_near_to_float32_as_transformers_is(head_dim):
    target = native("llama", torch.bfloat16, head_dim=head_dim)
    ids = ids_of(60)
    exact = target.model.float()(torch.tensor([ids])).logits[0]
    target.model.bfloat16()
    eager = (Target(target.model).score(Target(target.model).start(), ids).logits_TV - exact).square().mean()
    ours = (target.score(target.start(), ids).logits_TV - exact).square().mean()
    assert 0 < ours < 1.5 * eager


def nothing(model) -> None:
    pass


def outlier(model) -> None:
    """One input of the MLP dwarfs the others, and one layer sees only zeros."""
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = 300.0
        model.model.layers[2].input_layernorm.weight.zero_()


@pytest.mark.parametrize("change", [nothing, outlier])
@pytest.mark.parametrize("family", FAMILIES)
def test_8_bit_weights_are_as_near_to_their_float32_values_as_torchao_is(family, change):
    target = native(family, torch.int8)
    change(target.model)
    exact = tiny_model(family, **NATIVE_SHAPE)
    for name, parameter in exact.named_parameters():
        stored = target.model.get_parameter(name)
        parameter.data.copy_(rows_of(stored, torch.arange(len(stored))) if stored.dim() == 2 else stored)
    ids = ids_of(60)
    expected, eager, ours = (each.score(each.start(), ids).logits_TV for each in (Target(exact), Target(target.model), target))
    assert 0 < (ours - expected).square().mean() < 1.5 * (eager - expected).square().mean()
    assert is_int8(target.model.lm_head.weight)
    assert num_bytes(target.model.lm_head.weight) == 128 * (32 + 4)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [NATIVE_SHAPE, ODD, {"head_dim": 64}], ids=["even", "odd", "tiles"])
def test_the_bits_of_a_row_do_not_depend_on_the_rows_beside_it(shape, dtype, threads):
    target = native("qwen3", dtype, **shape)
    target.tap((0, 3))
    ids = ids_of(MAX_ROWS + 26)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        logits, features = rows_in_passes(target, ids, [1] * len(ids))
        for sizes in ([len(ids)], [2] * 77, [3] * 51 + [1], [*range(4, 17), 24], [MAX_ROWS, 26], [17] * 9 + [1], [33, 65, 56]):
            assert sum(sizes) == len(ids)
            again = rows_in_passes(target, ids, sizes)
            assert torch.equal(again[0], logits), sizes
            assert torch.equal(again[1], features), sizes
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rejected_rows_leave_no_bit_behind(dtype):
    target = native("llama", dtype)
    ids, wrong = ids_of(40), ids_of(40, seed=1)
    expected, _ = rows_in_passes(target, ids, [1] * 40)
    state, rows = target.start(), []
    while state.num_tokens < 40:
        kept = 1 + state.num_tokens % 3
        scored = target.score(state, [*ids[state.num_tokens : state.num_tokens + kept], *wrong[:5]])
        target.rollback(state, 5)
        rows.append(scored.logits_TV[:kept])
    assert torch.equal(torch.cat(rows)[:40], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn", "dflash", "lookup"])
def test_drafted_tokens_are_the_plain_ones_at_every_precision(kind, dtype):
    target = native("llama", dtype, max_position_embeddings=1024)
    num_new = 4 * PAGE_TOKENS + 8
    plain = generate(target, None, ids_of(5), num_new).token_ids
    for gamma in (1, 4, 8):
        if kind == "lookup":
            found = generate(target, None, ids_of(5), num_new, drafter=PromptLookup(128, gamma))
        else:
            head = tiny_head(target, "vanilla" if kind == "dflash" else kind, 0 if kind == "dflash" else 8, gamma, head_dim=16).to(
                target.model.dtype
            )
            found = generate(target, head, ids_of(5), num_new)
        assert found.token_ids == plain
        assert any(done.num_drafted for done in found.rounds_log)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [0, 8])
def test_native_blocks_are_the_eager_ones(rank, dtype):
    target = native("llama", dtype)
    head = tiny_head(target, rank=rank, head_dim=16, block_size=5).to(target.model.dtype)
    target.tap(head.config.target_layer_ids)
    features = target.score(target.start(), ids_of(30)).features_TMD
    tolerance = {torch.float32: ROUNDING, torch.bfloat16: 0.03, torch.int8: 0.03}[dtype]
    runners = make_runner(head, target), EagerRunner(head)
    assert isinstance(runners[0], NativeRunner)
    contexts = [runner.start() for runner in runners]
    for first, last in ((0, 0), (0, 1), (1, 4), (4, 30)):
        for runner, context in zip(runners, contexts, strict=True):
            runner.commit([(context, features[first:last])])
        anchors = target.embed(torch.tensor([7]))
        (h, logits), (h_eager, logits_eager) = (r.block([c], anchors) for r, c in zip(runners, contexts, strict=True))
        assert error(h.float(), h_eager.float()) < tolerance
        assert error(logits, logits_eager) < tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("runtime", ["native", "eager"])
def test_blocks_of_several_requests_are_those_of_each_alone(runtime, dtype):
    target = native("llama", dtype)
    head = tiny_head(target, rank=16, head_dim=16, block_size=5).to(target.model.dtype)
    target.tap(head.config.target_layer_ids)
    runner = make_runner(head, target) if runtime == "native" else EagerRunner(head)
    together, alone = ([runner.start() for _ in range(3)] for _ in range(2))
    features = [target.score(target.start(), ids_of(size, seed=size)).features_TMD for size in (90, 1, 33)]
    runner.commit([(context, rows) for context, rows in zip(together, features, strict=True)])
    runner.commit([(together[1], features[0][:2]), (together[0], features[2])])
    for context, rows in zip(alone, features, strict=True):
        runner.commit([(context, rows)])
    runner.commit([(alone[0], features[2])])
    runner.commit([(alone[1], features[0][:2])])
    anchors = target.embed(torch.tensor([3, 9, 27]))
    h_RGD, logits_RGV = runner.block(together, anchors)
    bias = torch.randn(3, 16).to(target.model.dtype)
    with_bias = logits_RGV.clone()
    best = runner.add_bias([with_bias[r, r] for r in range(3)], bias)
    for r in range(3):
        h, logits = runner.block([alone[r]], anchors[r : r + 1])
        assert torch.equal(h[0], h_RGD[r])
        if runtime == "native":
            assert torch.equal(logits[0], logits_RGV[r])
            found = runner.add_bias([logits[0, r]], bias[r : r + 1])
            assert found == best[r : r + 1] == [int(logits[0, r].argmax())]
            assert torch.equal(logits[0, r], with_bias[r, r])
        else:  # torch's products of three rows may round otherwise than those of one
            assert error(logits[0], logits_RGV[r]) < (1e-6 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("with_markov", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_greedy_drafts_in_one_go_are_those_taken_token_by_token(dtype, with_markov):
    target = native("llama", dtype)
    head = tiny_head(target, rank=16, head_dim=16, block_size=5, with_markov=with_markov).to(target.model.dtype)
    target.tap(head.config.target_layer_ids)
    runner = make_runner(head, target)
    laws = [make_law(0.0), make_law(0.0), make_law(1.0), make_law(0.0)]
    drafts = []
    for chain in (runner.chain, lambda *_: None):
        runner.chain = chain
        drafters = [DSparkDrafter(head, target, runner=runner) for _ in laws]
        for size, drafter in zip((90, 1, 33, 7), drafters, strict=True):
            drafter.commit(target.score(target.start(), ids_of(size, seed=size)).features_TMD)
        noise = torch.Generator().manual_seed(0)
        drafts.append(draft_many([Ask(d, [3 + r], 5 - r, law, noise) for r, (d, law) in enumerate(zip(drafters, laws, strict=True))]))
    assert [draft.tokens for draft in drafts[0]] == [draft.tokens for draft in drafts[1]]
    assert len({token for draft in drafts[0] for token in draft.tokens}) > 4  # drafts that differ
    for one, other in zip(*drafts, strict=True):
        assert one.confidences == pytest.approx(other.confidences, abs=2e-6 if dtype == torch.float32 else 0.01)


def test_a_draft_in_one_go_tells_by_how_much_its_tokens_lead_and_stops_at_broken_numbers():
    target = native("llama", torch.float32)
    head = tiny_head(target, rank=16, head_dim=16, block_size=5)
    runner = make_runner(head, target)
    generator = torch.Generator().manual_seed(0)
    h, logits = torch.randn(2, 5, head.config.hidden_size, generator=generator), torch.randn(2, 5, len(head.draft_ids), generator=generator)
    logits[1, 3, 2] = float("nan")
    found = runner.chain([3, 9], list(h), list(logits), [None, None])
    assert found is not None
    best, expected = logits[0].topk(2).indices[:, 0].tolist(), (-logits[0].topk(2).values.diff())[:, 0]
    assert found[0].choices == best and found[0].margins == pytest.approx(expected.tolist(), rel=1e-5)
    assert found[1].choices[:3] == logits[1, :3].argmax(-1).tolist() and found[1].choices[3:] == [-1, -1]


SETTINGS = [
    {"temperature": 1.0}, {"temperature": 0.3}, {"temperature": 1.5, "top_k": 5}, {"temperature": 0.8, "top_p": 0.7},
    {"temperature": 1.0, "min_p": 0.2}, {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_p": 0.05}, {"temperature": 1e-4},
]  # fmt: skip


@pytest.mark.parametrize("noise", ["streams", "coupled"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_tokens_drawn_in_one_go_are_those_drawn_one_by_one_from_the_same_laws(settings, noise):
    target = native("llama", torch.float32)
    head = tiny_head(target, rank=16, head_dim=16, block_size=5)
    target.tap(head.config.target_layer_ids)
    runner = make_runner(head, target)
    called = []
    one_go = runner.chain
    for seed in range(6):
        drafts = []
        for chain in (lambda *args: called.append(1) or one_go(*args), lambda *_: None):
            runner.chain = chain
            drafter = DSparkDrafter(head, target, runner=runner)
            drafter.commit(target.score(target.start(), ids_of(20, seed=seed)).features_TMD)
            random = Coupled(seed) if noise == "coupled" else torch.Generator().manual_seed(seed)
            drafts += draft_many([Ask(drafter, [*range(19), seed], 5, make_law(**settings), random)])
        one, other = drafts
        assert one.tokens == other.tokens
        assert one.confidences == pytest.approx(other.confidences, abs=2e-6)
        for k in range(5):
            assert torch.allclose(one.probs_KV[k], other.probs_KV[k], rtol=2e-5, atol=1e-12)
            assert torch.equal(one.probs_KV[k] > 0, other.probs_KV[k] > 1e-34)
            assert one.probs_KV[k].double().sum().item() == pytest.approx(1.0, abs=1e-6)
            assert one.probs_KV[k][one.tokens[k]] > 0
    assert len(called) == 6


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_in_one_go_ends_where_numbers_are_broken(temperature):
    target = native("llama")
    head = tiny_head(target, rank=16, head_dim=16, block_size=5)
    runner = make_runner(head, target)
    sound = runner.block
    for row in (3, 0):

        def broken(*args, row=row):
            h_RGD, logits_RGV = sound(*args)
            logits_RGV[0, row, 2] = math.nan
            return h_RGD, logits_RGV

        runner.block = broken
        ask = Ask(DSparkDrafter(head, target, runner=runner), [7], 5, make_law(temperature), torch.Generator().manual_seed(0))
        if row == 0:
            with pytest.raises(LogitsError):
                draft_many([ask])
        else:
            draft = draft_many([ask])[0]
            assert len(draft.tokens) == len(draft.probs_KV) == len(draft.confidences) == 3 and draft.num_asked == 5


def test_a_drawn_token_is_where_its_number_lies_in_the_reported_law():
    """Each slice of the cumulative law gives its token; the law is the one returned, with none of probability 0."""
    target = native("llama", torch.float32)
    head = tiny_head(target, rank=16, head_dim=16, block_size=5)
    runner = make_runner(head, target)
    torch.manual_seed(0)
    h, base = torch.randn(1, head.config.hidden_size), 3 * torch.randn(1, len(head.draft_ids))
    base[0, 40:] = -math.inf
    drawn = {}
    for u in [0.0, *torch.linspace(0.001, 0.999, 400).tolist(), 1 - 2**-53]:
        row = base.clone()
        found = runner.chain([3], [h], [row], [Drawn(1.3, top_k=0, uniforms=[u])])[0]
        drawn.setdefault(found.choices[0], []).append(u)
    law = row[0].double()
    cumulative = law.cumsum(0)
    assert (law[40:] == 0).all() and len(drawn) > 10
    for token, numbers in drawn.items():
        assert law[token] > 0
        assert cumulative[token] - law[token] - 1e-7 <= min(numbers) and max(numbers) <= cumulative[token] + 1e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_drawn_drafts_do_not_depend_on_company_or_threads(dtype):
    target = native("llama", dtype)
    head = tiny_head(target, rank=16, head_dim=16, block_size=5).to(target.model.dtype)
    runner = make_runner(head, target)
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(4, 5, head.config.hidden_size, generator=generator)
    base = 3 * torch.randn(4, 5, len(head.draft_ids), generator=generator)
    how = [None, *(Drawn(0.9, k, p, uniforms=torch.rand(5, generator=generator).tolist()) for k, p in ((0, 1.0), (9, 1.0), (0, 0.8)))]
    before = torch.get_num_threads()
    try:
        outcomes = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            together = base.clone()
            found = runner.chain([3, 9, 4, 5], list(h), list(together), how)
            for r in range(4):
                alone = base[r].clone()
                assert runner.chain([[3, 9, 4, 5][r]], [h[r]], [alone], how[r : r + 1])[0].choices == found[r].choices
                assert torch.equal(alone, together[r])
            outcomes.append((together, [each.choices for each in found]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(rows, outcomes[0][0]) and choices == outcomes[0][1] for rows, choices in outcomes)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_bits_of_a_request_are_the_same_whatever_requests_are_beside_it(family, dtype, head_dim):
    """Prompts of all lengths, prompt rows without logits among them, more rows than one pass takes."""
    target = native(family, dtype, head_dim=head_dim)
    target.tap([0, 1])
    prompts = [ids_of(size, seed=size) for size in (1, 7, 40, 100, 3, 66, 2)]
    nexts = [ids_of(size, seed=100 + size) for size in (1, 6, 2, 70, 33, 1, 8)]
    asked = [1, 6, 2, 5, 0, 1, 8]
    together = [target.start() for _ in prompts]
    target.score_many([(state, prompt, 0) for state, prompt in zip(together, prompts, strict=True)])
    found = target.score_many(list(zip(together, nexts, asked, strict=True)))
    for state, prompt, tokens, count, scored in zip(together, prompts, nexts, asked, found, strict=True):
        alone = target.start()
        target.score(alone, prompt)
        expected = target.score(alone, tokens)
        assert state.num_tokens == alone.num_tokens
        assert torch.equal(scored.features_TMD, expected.features_TMD)
        assert torch.equal(scored.logits_TV, expected.logits_TV[len(tokens) - count :])
        assert scored.best_T == (expected.best_T or [])[len(tokens) - count :]
    after = target.score_many([(state, [5], 1) for state in together])
    again = target.score_many([(state, [5], 1) for state in reversed(together)])  # one token later
    assert len(after) == len(again) == len(prompts)


def test_several_requests_are_scored_eagerly_too():
    target = Target(tiny_model("llama"), name="tiny")
    together = [target.start() for _ in range(2)]
    found = target.score_many([(together[0], ids_of(9), 2), (together[1], ids_of(4), 0)])
    assert [len(scored.logits_TV) for scored in found] == [2, 0]
    assert torch.equal(found[0].logits_TV, target.score(target.start(), ids_of(9)).logits_TV[-2:])


def test_drafting_twice_from_one_state_gives_one_draft():
    """The block's own keys lie behind the context; they must not outlive the pass."""
    target = native("llama")
    head = tiny_head(target, head_dim=16)
    runner = make_runner(head, target)
    target.tap(head.config.target_layer_ids)
    features = target.score(target.start(), ids_of(20)).features_TMD
    context, straight = runner.start(), runner.start()
    runner.commit([(context, features[:10])])
    runner.block([context], target.embed(torch.tensor([3])))
    runner.commit([(context, features[10:])])
    runner.commit([(straight, features)])
    anchors = target.embed(torch.tensor([9]))
    assert torch.equal(runner.block([context], anchors)[1], runner.block([straight], anchors)[1])


def test_a_saved_head_serves_the_target_at_every_precision(tmp_path):
    target = native("llama")
    save_head(tiny_head(target, head_dim=16), target, tmp_path, ids_of(30), {}, "")
    for dtype in DTYPES:
        other = native("llama", dtype)
        plain = generate(other, None, ids_of(5), 20).token_ids
        head = load_head(tmp_path, other)
        assert generate(other, head, ids_of(5), 20).token_ids == plain
        places = sorted(tensor.data_ptr() for tensor in (*head.parameters(), *head.buffers()))
        assert places[-1] - places[0] < 2**21 or not hasattr(mmap, "MADV_HUGEPAGE")  # in one block, and read from there:
        runner = make_runner(head, other)
        assert isinstance(runner, NativeRunner) and runner.stack.stack.output.weight == head.output_rows.data_ptr()


def test_a_head_of_odd_sizes_drafts_eagerly():
    target = native("llama")
    assert isinstance(make_runner(tiny_head(target, head_dim=8), target), EagerRunner)
    assert isinstance(make_runner(tiny_head(target, head_dim=16, draft_vocab=100), target), EagerRunner)


def test_changed_weights_are_taken_up():
    target = native("llama")
    ids = ids_of(10)
    before = target.score(target.start(), ids).logits_TV
    with torch.no_grad():
        target.model.model.layers[1].mlp.up_proj.weight.mul_(0.5)
        target.model.model.norm.weight.mul_(2.0)
    eager = Target(target.model)
    expected = eager.score(eager.start(), ids).logits_TV
    assert not torch.allclose(before, expected, atol=1e-2)
    assert error(target.score(target.start(), ids).logits_TV, expected) < ROUNDING


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gathered_weights_are_the_same_weights(dtype):
    target = native("llama", dtype)
    before = target.score(target.start(), ids_of(20)).logits_TV
    eager = Target(target.model).score(Target(target.model).start(), ids_of(20)).logits_TV
    assert gather_weights(target.model) == hasattr(mmap, "MADV_HUGEPAGE")
    places = sorted(getattr(p, "qdata", p).data_ptr() for p in target.model.parameters())
    assert places[-1] - places[0] < 2**21 or not hasattr(mmap, "MADV_HUGEPAGE")
    assert torch.equal(target.score(target.start(), ids_of(20)).logits_TV, before)
    assert torch.equal(Target(target.model).score(Target(target.model).start(), ids_of(20)).logits_TV, eager)


@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_weights_rounded_on_their_way_from_the_file_are_those_that_transformers_rounds(stored, wanted, tmp_path):
    model = tiny_model("llama", **NATIVE_SHAPE).to(getattr(torch, stored))
    model.save_pretrained(tmp_path)
    target = load_target(tmp_path, dtype=wanted)
    expected = type(model).from_pretrained(tmp_path, dtype=getattr(torch, wanted))
    assert target.precision == wanted and target.model.config.dtype == expected.config.dtype
    assert [(name, str(t.dtype)) for name, t in target.model.state_dict().items()] == [
        (name, str(t.dtype)) for name, t in expected.state_dict().items()
    ]
    assert all(torch.equal(target.model.state_dict()[name], t) for name, t in expected.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(target.model.buffers(), expected.buffers(), strict=True))


@pytest.mark.parametrize("runtime", ["native", "eager"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_weights_quantised_on_their_way_from_the_file_are_those_that_torchao_quantises_at_once(
    stored, tied, runtime, tmp_path, monkeypatch
):
    monkeypatch.setattr("dspark.target.quantize.PIECE", 200)  # matrices of some pieces, the last one shorter
    model = tiny_model("qwen2", **NATIVE_SHAPE, tie_word_embeddings=tied).to(getattr(torch, stored))
    model.save_pretrained(tmp_path)
    expected = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    quantize_(expected, Int8WeightOnlyConfig(set_inductor_config=False))
    target = load_target(tmp_path, dtype="int8", runtime=runtime)
    assert target.precision == "int8" and target.model.config.dtype == torch.bfloat16
    named = dict(expected.named_parameters())
    assert [name for name, _ in target.model.named_parameters()] == list(named)
    for name, found in target.model.named_parameters():
        assert (type(found), found.shape, found.dtype) == (type(named[name]), named[name].shape, named[name].dtype)
        for part in ("qdata", "scale") if is_int8(found) else ("data",):
            assert torch.equal(getattr(found, part), getattr(named[name], part))
    assert is_int8(target.model.lm_head.weight) and not is_int8(target.model.model.embed_tokens.weight)
    rows = torch.randn(3, 32, dtype=torch.bfloat16)
    assert torch.equal(target.model.lm_head(rows), expected.lm_head(rows))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell what is mapped")
def test_a_tensor_in_a_file_is_let_go_and_comes_back_the_same(tmp_path):
    save_file({"one": torch.arange(2**20), "other": torch.arange(2**20) + 1}, tmp_path / "model.safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    ours, mapped = torch.arange(2**20), mapped_checkpoints()
    assert tensors["one"].sum() + tensors["other"].sum() > 0  # all of it was read
    before = resident(tensors["one"])
    for tensor in (tensors["one"], ours):
        let_go(tensor, mapped)
    assert resident(tensors["one"]) < before - 2**20
    assert torch.equal(tensors["one"], ours) and torch.equal(ours, torch.arange(2**20)) and torch.equal(tensors["other"], ours + 1)


def resident(tensor: torch.Tensor) -> int:
    """Bytes in memory of the mapping that a tensor lies in."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        span = line.split()[0].split("-")
        if len(span) == 2:
            here = int(span[0], 16) <= tensor.data_ptr() < int(span[1], 16)
        elif here and line.startswith("Rss:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("no such mapping")


def test_tied_weights_stay_tied_when_gathered():
    model = tiny_model("llama", **NATIVE_SHAPE, tie_word_embeddings=True)
    gather_weights(model)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_a_model_made_in_inference_mode_runs():
    with torch.inference_mode():
        target = native("llama")
        eager = Target(target.model)
        expected = eager.score(eager.start(), ids_of(10)).logits_TV
        assert error(target.score(target.start(), ids_of(10)).logits_TV, expected) < ROUNDING


def test_nan_weights_are_reported():
    target = native("llama")
    with torch.no_grad():
        target.model.model.layers[0].mlp.down_proj.weight[3, 3] = float("nan")
    with pytest.raises(Exception, match="NaN logits"):
        target.score(target.start(), ids_of(3))


REFUSED = {
    "another family": (lambda: tiny_model("gemma3"), "not one of"),
    "half precision": (lambda: tiny_model("llama", **NATIVE_SHAPE).half(), "float16"),
    "odd sizes": (lambda: tiny_model("llama"), "multiples of 16, and it has a "),
    "another activation": (lambda: tiny_model("llama", **NATIVE_SHAPE, hidden_act="gelu"), "gelu"),
    "sliding window": (
        lambda: tiny_model("qwen2", **NATIVE_SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=1), "sliding"
    ),
    "replaced layer": (lambda: with_low_rank(tiny_model("llama", **NATIVE_SHAPE)), "LowRank"),
}  # fmt: skip


class LowRank(nn.Linear):
    """As an adapter library would put it in a layer's place."""


def with_low_rank(model):
    model.model.layers[2].self_attn.v_proj = LowRank(32, 32, bias=False)
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_models_it_cannot_run_are_refused_with_the_reason(case):
    make, reason = REFUSED[case]
    model = make()
    assert reason in (reason_against(model) or "")
    with pytest.raises(RuntimeUnavailable, match=reason):
        NativeRuntime(model)


def test_load_target_falls_back_to_eager_and_says_so(tmp_path, capsys):
    save_tiny_target(tmp_path / "target")  # sizes of 8
    assert load_target(tmp_path / "target").runtime is None
    assert "decoding eagerly" in capsys.readouterr().err
    assert load_target(tmp_path / "target", runtime="eager").runtime is None
    assert capsys.readouterr().err == ""
    with pytest.raises(RuntimeUnavailable, match="multiples of 16"):
        load_target(tmp_path / "target", runtime="native")
    with pytest.raises(SettingError, match="unknown runtime"):
        load_target(tmp_path / "target", runtime="fast")


@pytest.fixture
def compiler(tmp_path, monkeypatch) -> Path:
    """A compiler that copies a file instead of compiling, and counts its runs."""
    script = tmp_path / "c++"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && { echo fake 1.0; exit 0; }\necho run >> "$0.runs"\n'
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && printf library > "$2"; shift; done\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))
    return script


def runs(compiler: Path) -> int:
    return len(Path(f"{compiler}.runs").read_text().splitlines())


def test_the_library_is_built_once_and_a_damaged_one_again(compiler, tmp_path):
    said: list[str] = []
    path = build.built(said.append, tmp_path / "cache")
    assert build.built(said.append, tmp_path / "cache") == path
    assert runs(compiler) == len(said) == 1
    path.write_bytes(b"lib")
    assert build.built(said.append, tmp_path / "cache") == path
    assert runs(compiler) == 2
    assert path.read_bytes() == b"library"
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".sha256", ".so"]
    assert path.with_suffix(".sha256").read_text() == hashlib.sha256(b"library").hexdigest()


def test_another_machine_or_source_gets_another_library(compiler, tmp_path, monkeypatch):
    path = build.built(print, tmp_path / "cache")
    monkeypatch.setattr(build, "processor_flags", lambda: "flags: mmx")
    assert build.built(print, tmp_path / "cache") != path


def test_builds_that_nobody_used_for_a_month_are_deleted(compiler, tmp_path, monkeypatch):
    def build_for(flags: str) -> Path:
        monkeypatch.setattr(build, "processor_flags", lambda: flags)
        return build.built(print, tmp_path / "cache")

    made = [build_for(str(i)) for i in range(6)]
    for path, days in zip(made, (50, 40, 60, 45, 20, 10), strict=True):
        os.utime(path, (time.time() - days * 86400,) * 2)
    assert build_for("1") == made[1]  # used now
    newest = build_for("new")
    kept = {path.stem for path in (tmp_path / "cache").iterdir()}
    assert kept == {path.stem for path in (made[1], made[4], made[5], newest)}
    for path in (made[1], made[4], made[5]):
        os.utime(path, (0, 0))
    build_for("newer")
    assert len(list((tmp_path / "cache").glob("*.so"))) == len(list((tmp_path / "cache").glob("*.sha256"))) == build.NUM_KEPT


def test_no_compiler_or_a_failing_one_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    with pytest.raises(RuntimeUnavailable, match="no C\\+\\+ compiler found"):
        build.built(print, tmp_path / "cache")
    failing = tmp_path / "c++"
    failing.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "x.cpp:1: error: no such vector" >&2\nexit 1\n')
    os.chmod(failing, 0o755)
    monkeypatch.setenv("CXX", str(failing))
    with pytest.raises(RuntimeUnavailable, match="no such vector"):
        build.built(print, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_seed_replays():
    target = native("llama", torch.bfloat16)
    head = tiny_head(target, head_dim=16).to(torch.bfloat16)
    answers = [generate(target, head, ids_of(6), 30, temperature=1.0, top_k=5, seed=seed).token_ids for seed in (3, 3, 4)]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the flags name x86 processors")
@pytest.mark.parametrize("level", ["x86-64-v2", "x86-64-v3", "x86-64-v4"])
def test_processors_with_fewer_instructions_compute_the_same(level, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "FLAGS", [flag.replace("native", level) for flag in build.FLAGS])
    library = ctypes.CDLL(str(build.built(print, tmp_path)))
    for dtype in DTYPES:
        target = native("qwen3", dtype)
        target.tap((0, 3))
        ids = ids_of(40)
        usual, _ = rows_in_passes(target, ids, [40])
        with monkeypatch.context() as patch:
            patch.setattr("dspark.target.native.stack.compiled", lambda: library)
            logits, features = rows_in_passes(target, ids, [1] * 40)
            for sizes in ([40], [3, 5, 8, 24]):
                again = rows_in_passes(target, ids, sizes)
                assert torch.equal(again[0], logits)
                assert torch.equal(again[1], features)
        assert error(logits, usual) < (ROUNDING if dtype == torch.float32 else 0.03)
