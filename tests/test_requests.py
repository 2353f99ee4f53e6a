"""One request: settings are checked at the border, and the answer ends exactly where it should."""

import codecs
import json
import re
from dataclasses import replace

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dspark.core.decode import decode
from dspark.core.planner import Always, Costs, worth
from dspark.core.sampling import Law, Streams
from dspark.drafters import DSparkDrafter, PromptLookup
from dspark.drafters.arbiter import LOOKUP_TOKENS
from dspark.drafters.lookup import Found
from dspark.errors import LogitsError, PromptError, SettingError, TargetError
from dspark.generation import generate, make_law, stream
from dspark.head.context import EagerRunner, NativeRunner
from dspark.prompts import Prompt, read_prompts
from dspark.target.native.runtime import NativeRuntime
from dspark.target.target import Target
from oracle import Oracle, plain_greedy
from tiny import NATIVE_SHAPE, tiny_head, tiny_model

PROMPT = [3, 17, 99, 45]
NUM_NEW = 24
GAMMA = 4


class Letters:
    """A tokenizer of one or two letters a token; ids from 120 on are single bytes of UTF-8, given in `data`."""

    chat_template = None

    def __init__(self, data: bytes = b""):
        self.data = data

    def text(self, token: int) -> str:
        return chr(97 + token % 26) + "-" * (token % 3 == 0)

    def decode(self, ids, skip_special_tokens=False) -> str:
        pieces = [bytes([self.data[i - 120]]) if 120 <= i < 120 + len(self.data) else self.text(i).encode() for i in ids]
        # One mark for every byte of an unfinished character, as tokenizers' ByteFallback gives.
        return b"".join(pieces).decode("utf-8", errors="byte_marks")


def mark_each_byte(error: UnicodeDecodeError) -> tuple[str, int]:
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("byte_marks", mark_each_byte)


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(tiny_model("llama"), Letters(), name="tiny")


@pytest.fixture(scope="module")
def truth(target) -> list[int]:
    return plain_greedy(target, PROMPT, NUM_NEW)


def oracle(target, truth, counts=(GAMMA,)) -> Oracle:
    return Oracle(truth, len(PROMPT), target.vocab_size, GAMMA, counts)


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"prompt_ids": []}, PromptError, "empty"),
        ({"prompt_ids": [3, 128]}, PromptError, "128 is outside the target's vocabulary of 128"),
        ({"prompt_ids": "a text"}, PromptError, "the prompt is text, and token ids are wanted"),
        ({"prompt_ids": [[3, 5]]}, PromptError, "the prompt is a batch"),
        ({"prompt_ids": torch.tensor([[3, 5]])}, PromptError, "the prompt is a batch"),
        ({"prompt_ids": [-1]}, PromptError, "-1 is outside"),
        ({"prompt_ids": [1] * 250, "max_new_tokens": 7}, PromptError, "250 tokens plus 7 new ones exceeds .* 256"),
        ({"prompt_ids": [1] * 300}, PromptError, "300 tokens"),
        ({"max_new_tokens": 0}, SettingError, "max_new_tokens is 0"),
        ({"max_new_tokens": -3}, SettingError, "max_new_tokens is -3"),
        ({"seed": -1}, SettingError, "seed is -1"),
        ({"seed": 2**63}, SettingError, "seed is"),
        ({"temperature": -0.5}, SettingError, "temperature is -0.5"),
        ({"temperature": float("nan")}, SettingError, "temperature is nan"),
        ({"temperature": float("inf")}, SettingError, "temperature is inf"),
        ({"top_k": -1}, SettingError, "top_k is -1"),
        ({"top_p": 0.0}, SettingError, "top_p is 0"),
        ({"top_p": 1.5}, SettingError, "top_p is 1.5"),
        ({"min_p": -0.1}, SettingError, "min_p is -0.1"),
        ({"min_p": 1.1}, SettingError, "min_p is 1.1"),
        ({"repetition_penalty": 0.0}, SettingError, "repetition_penalty is 0"),
        ({"drafter": "nonsense"}, SettingError, "unknown drafter 'nonsense'"),
        ({"drafter": "dspark"}, SettingError, "'dspark' needs a head"),
        ({"drafter": "dflash"}, SettingError, "'dflash' needs a head"),
        ({"stop": [""]}, SettingError, "stop string is empty"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_values_without_meaning_are_refused(changes, error, reason, target):
    request = {"prompt_ids": PROMPT, "max_new_tokens": 4} | changes
    with pytest.raises(error, match=reason):
        generate(target, None, request.pop("prompt_ids"), **request)


def test_a_length_that_is_never_drafted_is_refused_with_the_drafters_own(target):
    head = tiny_head(target)
    most = {"dspark": head.config.block_size, "auto": LOOKUP_TOKENS, "lookup": PromptLookup(1).block_size}
    for drafter, length in most.items():
        for more in (length + 1, 99999):
            told = f"plan 'length:{more}' asks for more tokens than are ever drafted: at most {length} here\nhint: use length:{length}, or fixed"
            with pytest.raises(SettingError, match=re.escape(told)):
                generate(target, head, PROMPT, 4, drafter=drafter, plan=f"length:{more}")
        assert generate(target, head, PROMPT, 4, drafter=drafter, plan=f"length:{length}").num_tokens == 4


def test_a_prompt_that_just_fits_is_answered(target):
    assert generate(target, None, [1] * 250, 6).num_tokens == 6


def test_dflash_refuses_a_sequential_head(target):
    with pytest.raises(SettingError, match="rank 0"):
        generate(target, tiny_head(target), PROMPT, 4, drafter="dflash")


def test_stop_strings_without_a_tokenizer_are_refused():
    with pytest.raises(SettingError, match="tokenizer"):
        generate(Target(tiny_model("llama")), None, PROMPT, 4, stop=["a"])


def test_a_single_stop_string_is_not_taken_for_its_letters(target, truth):
    text = Letters().decode(truth)
    assert generate(target, None, PROMPT, NUM_NEW, stop=text[6:10]).text == text[: text.index(text[6:10])]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(temperature):
    target = Target(tiny_model("llama"), name="broken")
    target.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(LogitsError, match="broken produced NaN"):
        generate(target, None, PROMPT, 4, temperature=temperature)


def test_a_law_without_any_token_is_refused(target):
    with pytest.raises(LogitsError, match="no token is possible"):
        generate(target, None, PROMPT, 4, logits_processors=[lambda ids, scores: torch.full_like(scores, -float("inf"))])


@pytest.mark.parametrize("count", range(1, 11))
@pytest.mark.parametrize("counts", [(GAMMA,), (0,), (2, 4, 1)], ids=str)
def test_max_new_tokens_counts_exactly(count, counts, target, truth):
    result = generate(target, None, PROMPT, count, drafter=oracle(target, truth, counts))
    assert result.token_ids == truth[:count]
    assert result.finish_reason == "length"
    assert result.rounds == len(result.rounds_log)
    assert result.tau == count / result.rounds


def test_no_row_is_scored_that_cannot_be_used(target, truth):
    scored = []
    plain_score = target.score

    def counting(state, tokens, num_logits=None):
        scored.append(len(tokens))
        return plain_score(state, tokens, num_logits)

    target.score = counting
    try:
        generate(target, None, PROMPT, GAMMA + 3, drafter=oracle(target, truth))
    finally:
        del target.score
    assert scored == [len(PROMPT) - 1, GAMMA + 1, 2]


@pytest.mark.parametrize("index", range(7))
def test_an_end_token_inside_an_accepted_block_ends_there(index, target, truth):
    end = truth[index]
    result = generate(target, None, PROMPT, NUM_NEW, drafter=oracle(target, truth), eos_ids=frozenset({end}))
    assert result.token_ids == truth[: truth.index(end) + 1]
    assert result.finish_reason == "stop"


def test_without_end_tokens_the_models_own_do_not_count(truth):
    model = tiny_model("llama")
    model.generation_config.eos_token_id = truth[5]
    target = Target(model)
    assert generate(target, None, PROMPT, NUM_NEW).token_ids == truth[: truth.index(truth[5]) + 1]
    result = generate(target, None, PROMPT, 6, eos_ids=frozenset())
    assert (result.token_ids, result.finish_reason) == (truth[:6], "length")


@pytest.mark.parametrize("start", range(1, 16, 2))
@pytest.mark.parametrize("length", [1, 2, 5])
def test_stop_strings_cut_the_text(start, length, target, truth):
    text = Letters().decode(truth)
    stop = text[start : start + length]
    shown = []
    result = generate(target, None, PROMPT, NUM_NEW, drafter=oracle(target, truth), stop=["never", stop], on_text=shown.append)
    assert result.text == "".join(shown) == text[: text.index(stop)]
    assert result.finish_reason == "stop"
    needed = next(n for n in range(1, NUM_NEW + 1) if stop in Letters().decode(truth[:n]))
    assert result.token_ids == truth[:needed]


@pytest.mark.parametrize("counts", [(0,), (1, 2), (GAMMA,)], ids=str)
def test_streamed_text_never_shows_half_a_character(counts, truth):
    smile, begin = "é😀".encode(), 2

    class Smiles(Letters):
        def decode(self, ids, skip_special_tokens=False):
            places = range(begin, begin + len(smile))
            return super().decode([120 + places.index(i) if i in places else token % 97 for i, token in enumerate(ids)])

    target = Target(tiny_model("llama"), Smiles(smile))
    shown = []
    result = generate(target, None, PROMPT, NUM_NEW, drafter=oracle(target, truth, counts), on_text=shown.append)
    assert "é😀" in result.text
    assert "".join(shown) == result.text
    # A stop string may begin before the half character that is held back.
    where, shown = result.text.index("é"), []
    stop = result.text[where - 1 : where + 1]
    stopped = generate(target, None, PROMPT, NUM_NEW, drafter=oracle(target, truth, counts), on_text=shown.append, stop=stop)
    assert "".join(shown) == stopped.text == result.text[: where - 1]


@pytest.mark.parametrize("rank", [8, 0])
@pytest.mark.parametrize("penalty", [0.7, 1.3, 2.0])
def test_repetition_penalty_sees_the_prefix_of_every_verified_row(penalty, rank, target):
    prompt = [7, 8, 9, 7, 8, 9, 7, 8]
    expected = plain_greedy(target, prompt, NUM_NEW, repetition_penalty=penalty)
    drafters = {"head": {"head": tiny_head(target, rank=rank)}, "lookup": {"drafter": "lookup"},
                "oracle": {"drafter": Oracle(expected, len(prompt), target.vocab_size, GAMMA)}}  # fmt: skip
    for name, settings in drafters.items():
        result = generate(target, prompt_ids=prompt, max_new_tokens=NUM_NEW, repetition_penalty=penalty, **({"head": None} | settings))
        assert result.token_ids == expected, name


def test_users_processors_see_the_prefix_of_every_verified_row(target):
    expected = plain_greedy(target, PROMPT, NUM_NEW, no_repeat_ngram_size=1)
    settings = {"logits_processors": [NoRepeatNGramLogitsProcessor(1)]}
    assert generate(target, tiny_head(target), PROMPT, NUM_NEW, **settings).token_ids == expected
    assert generate(target, None, PROMPT, NUM_NEW, drafter=oracle(target, expected, range(GAMMA + 1)), **settings).token_ids == expected


def test_a_processor_may_write_in_place(target, truth):
    def forbid(ids, scores):
        scores[:, truth[0]] = -float("inf")
        return scores

    expected = plain_greedy(target, PROMPT, NUM_NEW, suppress_tokens=[truth[0]])
    assert generate(target, tiny_head(target), PROMPT, NUM_NEW, logits_processors=[forbid]).token_ids == expected


def test_a_seed_replays_and_another_differs(target):
    def sampled(seed):
        return generate(target, tiny_head(target), PROMPT, NUM_NEW, temperature=0.8, top_k=30, top_p=0.95, seed=seed).token_ids

    assert sampled(3) == sampled(3) != sampled(4)


def test_a_law_splits_where_the_prefix_stops_mattering():
    law = make_law(0.5, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2)
    assert [type(p).__name__ for p in law.processors] == ["RepetitionPenaltyLogitsProcessor"]
    kinds = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
    assert all(isinstance(w, kind) for w, kind in zip(law.warpers, kinds, strict=True))
    assert make_law(0.0, top_k=5).warpers == ()


GOOD = {"prompt": "hello", "id": 7}
BAD_LINES = {
    "no JSON": "{",
    "no object": "[1]",
    "neither": '{"text": "hi"}',
    "both": '{"prompt": "a", "messages": []}',
    "empty prompt": '{"prompt": ""}',
    "prompt a number": '{"prompt": 3}',
    "no messages": '{"messages": []}',
    "messages a text": '{"messages": "hi"}',
    "messages a number": '{"messages": 5}',
    "message a text": '{"messages": ["hi"]}',
    "no role": '{"messages": [{"content": "hi"}]}',
    "no content": '{"messages": [{"role": "user"}]}',
    "long number": '{"prompt": "a", "n": ' + "9" * 5000 + "}",
    "nested": '{"prompt": "a", "n": ' + "[" * 100_000 + "]" * 100_000 + "}",
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_prompt_errors_carry_the_line(name, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join([json.dumps(GOOD), "", BAD_LINES[name], json.dumps(GOOD)]))
    with pytest.raises(PromptError, match="line 3"):
        read_prompts(file)


def test_prompts_keep_their_other_keys(tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(GOOD) + "\n\n" + json.dumps({"messages": chat, "kind": "chat"}) + "\n")
    assert read_prompts(file) == [Prompt("hello", {"id": 7}), Prompt(chat, {"kind": "chat"})]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"], ids=ascii)
def test_prompts_may_hold_any_character_json_allows(separator, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": f"a{separator}b"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_prompts(file) == [Prompt(f"a{separator}b")]


@pytest.mark.parametrize("data", [b"", b"\n \n", b"\xff\xfe"], ids=["empty", "blank", "no text"])
def test_files_without_prompts_are_refused(data, tmp_path):
    (tmp_path / "prompts.jsonl").write_bytes(data)
    with pytest.raises(PromptError, match=r"prompts\.jsonl"):
        read_prompts(tmp_path / "prompts.jsonl")


def test_a_missing_prompts_file_is_refused(tmp_path):
    with pytest.raises(PromptError, match="cannot read prompts file"):
        read_prompts(tmp_path / "missing.jsonl")


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_targets_whose_rotation_depends_on_the_length_are_refused(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    with pytest.raises(TargetError, match=f"{rope_type} rope"):
        Target(tiny_model("llama", rope_parameters=rope))


def test_processors_see_only_texts_that_can_exist():
    """A grammar that knows three tokens raises on any other prefix; drafts must not show it one."""
    following = {5: 6, 6: 9, 9: 5}

    class Grammar:
        def __call__(self, input_ids, scores):
            masked = torch.full_like(scores, -float("inf"))
            masked[:, following[int(input_ids[0, -1])]] = 0.0
            return masked

    target = Target(tiny_model("llama"))
    for head in (tiny_head(target), tiny_head(target, draft_vocab=16)):
        result = generate(target, head, [5], 9, logits_processors=[Grammar()])
        assert result.token_ids == [6, 9, 5] * 3


def test_two_streams_in_turn_do_not_disturb_each_other():
    target = Target(tiny_model("llama"))
    one, two = tiny_head(target), tiny_head(target, rank=0)
    two = type(two)(replace(two.config, target_layer_ids=(1, 2)), two.draft_ids, two.output_rows, two.mask_embedding)
    settings = {"max_new_tokens": 16, "law": make_law(0.0)}
    expected = generate(target, None, [1, 2, 3], 16).token_ids
    streams = [stream(target, head, [1, 2, 3], **settings) for head in (one, two)]
    texts: list[list[int]] = [[], []]
    for _ in range(16):
        for i, rounds in enumerate(streams):
            texts[i] += next(rounds).tokens if len(texts[i]) < 16 else []
    assert texts == [expected, expected]


@pytest.mark.parametrize("shortlist", [0, 10])
@pytest.mark.parametrize("runtime", ["eager", "native"])
@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn", "dflash"])
def test_a_greedy_draft_is_the_same_with_and_without_its_laws_formed(kind, runtime, shortlist):
    model = tiny_model("llama", **NATIVE_SHAPE)
    target = Target(model, runtime=NativeRuntime(model) if runtime == "native" else None)
    rank, kind = (0, "vanilla") if kind == "dflash" else (16, kind)
    head = tiny_head(target, kind=kind, rank=rank, draft_vocab=96, head_dim=16)
    head.config = replace(head.config, shortlist=shortlist)
    drafter = DSparkDrafter(head, target)
    assert isinstance(drafter.runner, NativeRunner) == (runtime == "native")
    nothing = make_law(0.0, logits_processors=[lambda ids, logits: logits])
    drafts = []
    for law in (make_law(0.0), nothing):
        drafter.start()
        state = target.start()
        drafter.commit(target.prefill(state, PROMPT[:-1]))
        drafts.append(drafter.draft(PROMPT, GAMMA, law, torch.Generator()))
    fast, formed = drafts
    assert fast.tokens == formed.tokens
    assert len(set(fast.tokens)) > 1
    # natively a draft in one go sums them in float32 in an order of its own: they choose lengths, never tokens
    if runtime == "native" and kind == "vanilla" and rank and not shortlist:
        assert fast.confidences == pytest.approx(formed.confidences, rel=1e-6)
    else:
        assert fast.confidences == formed.confidences
    assert torch.equal(torch.stack([fast.probs_KV[k] for k in range(GAMMA)]), torch.stack([formed.probs_KV[k] for k in range(GAMMA)]))


@pytest.mark.parametrize("runtime", ["eager", "native"])
@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_a_draft_has_the_law_of_the_whole_draft_vocabulary(kind, runtime):
    model = tiny_model("llama", **NATIVE_SHAPE)
    target = Target(model, runtime=NativeRuntime(model) if runtime == "native" else None)
    head = tiny_head(target, kind=kind, rank=16, draft_vocab=96, head_dim=16)
    drafter = DSparkDrafter(head, target)
    state = target.start()
    features = target.prefill(state, PROMPT[:-1])
    drafter.commit(features)
    draft = drafter.draft(PROMPT, GAMMA, make_law(1.0), torch.Generator().manual_seed(1))
    runner = EagerRunner(head)
    context = runner.start()
    runner.commit([(context, features)])
    h_GD = runner.block([context], target.embed(torch.tensor(PROMPT[-1:])))[0][0]
    previous = torch.tensor([PROMPT[-1], *draft.tokens[:-1]])
    logits, _ = head(h_GD[None, None], previous[None, None])
    for k, law_C in enumerate(logits[0, 0].softmax(-1)):
        assert torch.allclose(draft.probs_KV[k][head.draft_ids], law_C, atol=1e-5)


def test_a_plan_does_not_see_that_a_draft_ended_for_what_it_drew(target):
    """After one token the processor allows none that the head can draft. A plan that heeds the length of the draft would then
    leave that token unverified more often than others."""
    head, prompt, token = tiny_head(target, draft_vocab=64), [114, 24], 56
    rule = worth(Costs(0.1, (1.0, 2.2, 2.2, 2.2, 2.2)), 1.0, [1.0] * 4)  # one token more never pays, four may
    assert (rule([0.9], 1), rule([0.9] * 4, 4)) == (0, 4)
    drafter = DSparkDrafter(head, target)

    def odd_after(ids, logits):
        allowed = torch.arange(logits.shape[-1]) % 2 == 1
        return logits.masked_fill(~allowed, float("-inf")) if ids[0, -1] == token and ids.shape[1] > len(prompt) else logits

    law = Law(processors=(odd_after,))
    head.confidence_head = None
    chance = float(target.score(target.start(), prompt).logits_TV[-1].softmax(-1)[token])
    count, accepted, num = 0, 0, 600
    for seed in range(num):
        first = next(decode(target, drafter, prompt, law, Streams(seed), 6, planner=Always(rule)))
        count += first.tokens[0] == token
        accepted += first.num_accepted
    assert accepted
    assert abs(count - chance * num) < 3.9 * (chance * (1 - chance) * num) ** 0.5  # one in ten thousand


def test_a_head_that_gives_no_numbers_is_reported(target):
    head = tiny_head(target)
    head.markov_head.markov_w2.weight[5, 0] = float("nan")
    with pytest.raises(LogitsError):
        generate(target, head, PROMPT, 8)


def test_prompt_lookup_follows_the_latest_occurrence_of_the_longest_ending():
    def scan(ids, limit):
        for size in (16, 8, 4, 3, 2):
            for start in range(len(ids) - size - 1, -1, -1):
                if ids[start : start + size] == ids[-size:]:
                    text = list(ids)
                    for k in range(limit):
                        text.append(text[start + size + k])
                    return text[len(ids) :]
        return []

    generator = torch.Generator().manual_seed(0)
    drafter, found = PromptLookup(3), 0
    for _ in range(5):
        drafter.start()
        ids = torch.randint(3, (2,), generator=generator).tolist()
        while len(ids) < 60:
            ids += torch.randint(3, (int(torch.randint(1, 4, (1,), generator=generator)),), generator=generator).tolist()
            drafted = drafter.draft(ids, 5, None, None).tokens
            assert drafted == scan(ids, 5)
            found += bool(drafted)
    assert found > 50


def test_prompt_lookup_tells_how_much_was_found_and_whether_it_went_on_alike():
    lookup = PromptLookup(10)
    assert lookup.follow([1, 2, 3], 2) == ([], None)
    assert lookup.follow([1, 2, 3, 1, 2], 2) == ([3, 1], Found(2, varied=False))
    assert lookup.follow([1, 2, 3, 1, 2, 3], 1) == ([1], Found(3, varied=False))
    assert lookup.follow([1, 2, 3, 1, 2, 3, 4, 1, 2], 1) == ([3], Found(2, varied=False))
    assert lookup.follow([1, 2, 3, 1, 2, 3, 4, 1, 2, 3], 1) == ([4], Found(3, varied=True))
    lookup.start()
    assert lookup.follow([2, 3, 4, 2, 3], 1) == ([4], Found(2, varied=False))
