"""A grafted model's `generate` says what it said before, and refuses what it cannot speculate."""

import copy
import io
import warnings
from collections import Counter, defaultdict
from functools import cache

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from chances import p_value
from dspark.core.decode import decode
from dspark.errors import HeadError, SettingError
from dspark.grafting import graft, ungraft
from dspark.target.target import Target
from tiny import NATIVE_SHAPE, tiny_head, tiny_model

PROMPT = torch.tensor([[3, 17, 99, 45, 3, 17, 99]])
NUM_NEW = 20


@cache
def plain_model():
    return tiny_model("llama", **NATIVE_SHAPE)


HEADS = {"vanilla": ("vanilla", 8), "rnn": ("rnn", 8), "dflash": ("vanilla", 0)}


@pytest.fixture(params=[(head, runtime) for head in HEADS for runtime in ("eager", "native")], ids="/".join)
def model(request):
    head, runtime = request.param
    model = tiny_model("llama", **NATIVE_SHAPE)
    graft(model, tiny_head(Target(model), *HEADS[head], head_dim=16), runtime)
    return model


def new_tokens(sequences: torch.Tensor) -> list[int]:
    return sequences[0, PROMPT.shape[1] :].tolist()


def assert_same(model, **settings) -> list[int]:
    """Both models generate the same tokens; returns them."""
    settings = {"do_sample": False, "max_new_tokens": NUM_NEW} | settings
    found, expected = new_tokens(model.generate(PROMPT, **settings)), new_tokens(plain_model().generate(PROMPT, **settings))
    assert found == expected
    return found


class Recorder(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


class EndsWith(StoppingCriteria):
    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


class ForbidsInPlace(LogitsProcessor):
    """Writes into the scores it is given, as many users' processors do."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores):
        scores[:, self.token] = -float("inf")
        return scores


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 1},
        {"suppress_tokens": [44, 38]},
        {"bad_words_ids": [[44], [38, 124]]},
        {"forced_eos_token_id": 9},
        {"sequence_bias": {(44,): -10.0}},
        {"max_new_tokens": 1},
        {"max_new_tokens": 3},
        {"max_length": PROMPT.shape[1] + 5, "max_new_tokens": None},
        {"attention_mask": torch.ones_like(PROMPT)},
    ],
    ids=str,
)
def test_greedy_equals_ungrafted(model, settings):
    assert_same(model, **settings)


def test_max_new_tokens_counts_exactly(model):
    for count in range(1, 8):
        assert len(assert_same(model, max_new_tokens=count)) == count


def test_end_token_ends(model):
    full = assert_same(model)
    for index in (0, 3, 7):
        end = full[index]
        found = assert_same(model, eos_token_id=end, pad_token_id=0)
        assert found == full[: full.index(end) + 1]
    assert_same(model, eos_token_id=full[0], pad_token_id=0, min_new_tokens=6)


def test_custom_criteria_are_honoured(model):
    full = assert_same(model)
    found = assert_same(model, stopping_criteria=StoppingCriteriaList([EndsWith(full[5])]))
    assert found == full[: full.index(full[5]) + 1]


def test_stop_strings_are_honoured(model, letter_tokenizer):
    full = assert_same(model)
    found = assert_same(model, stop_strings=[chr(full[5]) + chr(full[6])], tokenizer=letter_tokenizer)
    assert found == full[:7]


def test_a_processor_that_writes_in_place(model):
    first = assert_same(model)[0]
    assert_same(model, logits_processor=LogitsProcessorList([ForbidsInPlace(first)]))


def test_streamer_receives_what_is_returned(model):
    streamer = Recorder()
    found = model.generate(PROMPT, do_sample=False, max_new_tokens=NUM_NEW, streamer=streamer)
    assert streamer.tokens == found[0].tolist()
    assert streamer.ended


def test_dictionaries_are_returned_when_asked(model):
    found = model.generate(PROMPT, do_sample=False, max_new_tokens=NUM_NEW, return_dict_in_generate=True)
    assert new_tokens(found.sequences) == assert_same(model)
    settings = {"do_sample": False, "max_new_tokens": 4}
    again = model.generate(found.sequences, past_key_values=found.past_key_values, **settings)
    assert torch.equal(again, plain_model().generate(found.sequences, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"min_p": 0.05, "repetition_penalty": 1.2},
        {"renormalize_logits": True, "typical_p": 0.9},
    ],
    ids=str,
)
def test_sampling_replays_from_torchs_seed(model, settings):
    answers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        answers.append(new_tokens(model.generate(PROMPT, do_sample=True, max_new_tokens=NUM_NEW, **settings)))
    assert answers[0] == answers[1] != answers[2]
    assert len(answers[0]) == NUM_NEW


# A vocabulary so small that every beginning of three tokens can be counted.
SMALL = torch.tensor([[4, 0, 1, 4, 0]])
NUM_COUNTED = 3


def small_model():
    return tiny_model("llama", vocab_size=16, num_hidden_layers=2, **NATIVE_SHAPE)


def law_of_transformers(settings: dict) -> dict[tuple[int, ...], float]:
    """Every beginning's probability by the scores that transformers' own loop would draw the next token from."""
    model, begun = small_model(), {(): 1.0}
    for _ in range(NUM_COUNTED):
        ids = torch.tensor([[*SMALL[0].tolist(), *tokens] for tokens in begun])
        scores = model.generate(ids, do_sample=True, max_new_tokens=1, output_scores=True, return_dict_in_generate=True, **settings).scores
        rows = scores[0].double().softmax(-1).tolist()
        begun = {(*b, x): begun[b] * p for b, row in zip(begun, rows, strict=True) for x, p in enumerate(row) if p > 0}
    return defaultdict(float, begun)


ALL_WARPERS = ("native", "dspark", {"temperature": 0.9, "top_k": 9, "top_p": 0.9, "min_p": 0.04})
REPETITION = ("eager", "auto", {"temperature": 1.3, "repetition_penalty": 1.4, "top_p": 0.95})


@pytest.mark.parametrize(
    ("runtime", "drafter", "settings", "num_samples"),
    [(*ALL_WARPERS, 80), *(pytest.param(*each, 4_000, marks=pytest.mark.slow) for each in (ALL_WARPERS, REPETITION))],
)
def test_sampled_tokens_have_the_law_of_transformers(runtime, drafter, settings, num_samples, monkeypatch):
    rounds, said, model = [], Counter(), small_model()

    def noted(*arguments):
        for done in decode(*arguments):
            rounds.append(done)
            yield done

    monkeypatch.setattr("dspark.grafting.decode", noted)
    graft(model, tiny_head(Target(model), rank=16, head_dim=16, block_size=5), runtime, drafter=drafter)
    with torch.random.fork_rng():
        for seed in range(num_samples):
            torch.manual_seed(seed)
            sequences = model.generate(SMALL, do_sample=True, max_new_tokens=NUM_COUNTED + 1, **settings)
            said[tuple(sequences[0, SMALL.shape[1] :][:NUM_COUNTED].tolist())] += 1
        expected = law_of_transformers(settings)
    assert p_value(said, expected) > 1e-5
    # Acceptances and rejections both took part.
    assert sum(done.num_accepted for done in rounds) > num_samples / 20
    assert sum(done.num_accepted < done.num_planned for done in rounds) > num_samples / 20


def test_top_k_of_one_samples_the_greedy_tokens(model):
    found = new_tokens(model.generate(PROMPT, do_sample=True, top_k=1, max_new_tokens=NUM_NEW))
    assert found == assert_same(model)


def test_generation_config_objects_work(model):
    assert_same(model, generation_config=GenerationConfig(do_sample=False, max_new_tokens=6, repetition_penalty=1.5), max_new_tokens=6)


def test_a_second_call_starts_afresh(model):
    assert assert_same(model) == assert_same(model)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_beams": 2}, "beams"),
        ({"num_return_sequences": 2, "do_sample": True}, "return sequences"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"output_logits": True, "return_dict_in_generate": True}, "output_logits"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"past_key_values": object()}, "past_key_values"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"custom_generate": print}, "custom_generate"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1]])}, "padded"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_speculated_is_refused(model, settings, reason):
    with pytest.raises(SettingError, match=reason):
        model.generate(PROMPT, max_new_tokens=4, **settings)


def test_a_batch_is_refused(model):
    with pytest.raises(SettingError, match="batch of 2"):
        model.generate(PROMPT.repeat(2, 1), max_new_tokens=4)


def test_ungraft_restores_the_original(model):
    ungraft(model)
    assert "generate" not in vars(model)
    assert not any(module._forward_hooks for module in model.modules())
    found = model.generate(PROMPT.repeat(2, 1), do_sample=False, max_new_tokens=4, output_scores=True, return_dict_in_generate=True)
    assert len(found.scores) == 4
    ungraft(model)


def test_ungraft_gives_back_a_generate_of_the_users_own():
    model = tiny_model("llama")
    own = model.generate = lambda *args, **kwargs: "own"
    graft(model, tiny_head(Target(tiny_model("llama"))))
    ungraft(model)
    assert model.generate is own


def test_grafting_again_replaces_the_head():
    model = tiny_model("llama", **NATIVE_SHAPE)
    target = Target(tiny_model("llama", **NATIVE_SHAPE))
    for kind in ("vanilla", "gated"):
        graft(model, tiny_head(target, kind))
        assert_same(model)
    ungraft(model)
    assert "generate" not in vars(model)


@pytest.fixture(scope="module")
def letter_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token=chr(0)))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


HOOKS = {
    "a layer's output": lambda m: m.model.layers[1].register_forward_hook(lambda module, args, out: out + torch.arange(32).sin()),
    "the logits": lambda m: m.lm_head.register_forward_hook(lambda module, args, out: out.flip(-1)),
    "an input": lambda m: m.model.layers[2].register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:])),
    "a method": lambda m: setattr(m.model.layers[1].mlp, "forward", lambda x: x * 3),
    "a norm": lambda m: setattr(m.model, "norm", torch.nn.LayerNorm(32)),
}


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("change", HOOKS)
def test_a_changed_model_says_what_it_said(change, before):
    model = tiny_model("llama", **NATIVE_SHAPE)
    head = tiny_head(Target(model), head_dim=16)
    if before:
        HOOKS[change](model)
        graft(model, head)
    else:
        graft(model, head)
        HOOKS[change](model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = new_tokens(model.generate(PROMPT, do_sample=False, max_new_tokens=NUM_NEW))
    ungraft(model)
    expected = new_tokens(model.generate(PROMPT, do_sample=False, max_new_tokens=NUM_NEW))
    assert found == expected != new_tokens(plain_model().generate(PROMPT, do_sample=False, max_new_tokens=NUM_NEW))
    assert before or any("decoding eagerly" in str(w.message) for w in caught)


def test_what_is_returned_can_be_trained_on(model):
    sequences = model.generate(PROMPT, do_sample=False, max_new_tokens=4)
    assert sequences.dtype == torch.int64 and not sequences.is_inference()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(sequences).logits.sum().backward()
    assert model.lm_head.weight.grad is not None


def test_a_copy_is_plain_and_its_own(model):
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copied, torch.load(file, weights_only=False)):
        assert new_tokens(other.generate(PROMPT, do_sample=False, max_new_tokens=NUM_NEW)) == assert_same(model)
        with torch.no_grad():
            other.lm_head.weight.copy_(other.lm_head.weight.flip(0))
        changed = new_tokens(other.generate(PROMPT, do_sample=False, max_new_tokens=NUM_NEW))
        assert changed != assert_same(model)
        graft(other, tiny_head(Target(other), head_dim=16))
        assert new_tokens(other.generate(PROMPT, do_sample=False, max_new_tokens=NUM_NEW)) == changed


def test_stop_strings_of_a_config_are_honoured(model, letter_tokenizer):
    stop = letter_tokenizer.decode([assert_same(model)[7]])
    config = GenerationConfig(max_new_tokens=NUM_NEW, do_sample=False, stop_strings=[stop])
    found = new_tokens(model.generate(PROMPT, generation_config=config, tokenizer=letter_tokenizer))
    assert found == new_tokens(plain_model().generate(PROMPT, generation_config=config, tokenizer=letter_tokenizer))
    assert len(found) <= 8 and config.stop_strings == [stop]


def test_a_head_of_another_shape_is_refused():
    other = tiny_head(Target(tiny_model("llama", hidden_size=64)))
    model = tiny_model("llama")
    with pytest.raises(HeadError, match="hidden size"):
        graft(model, other)
    assert "generate" not in model.__dict__


def test_ungraft_gives_back_the_mode():
    model = tiny_model("llama").train()
    graft(model, tiny_head(Target(tiny_model("llama"))))
    ungraft(model)
    assert model.training


# One family of each way to roll back; the others differ in nothing that a graft sees.
@pytest.mark.parametrize("family", ["gemma4", "lfm2", "qwen3_5", "deepseek_v4", "mamba2", "nemotron_h"])
def test_models_with_other_caches_say_what_they_said(family, capsys):
    plain, grafted = tiny_model(family), tiny_model(family)
    for module in [*plain.modules(), *grafted.modules()]:
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))  # else Nemotron-H's own prompt pass is not what its decoding would do
    graft(grafted, tiny_head(Target(grafted)), "eager", "fixed")
    assert ("roll-back by snapshot" in capsys.readouterr().err) == (family in ("deepseek_v4", "mamba2", "nemotron_h"))
    for prompt in ([5], [7, 8, 9, 10] * 5):
        ids = torch.tensor([prompt])
        found, expected = (model.generate(ids, do_sample=False, max_new_tokens=NUM_NEW).tolist() for model in (grafted, plain))
        assert found == expected
    ungraft(grafted)
    assert grafted.generate(ids, do_sample=False, max_new_tokens=NUM_NEW).tolist() == expected
