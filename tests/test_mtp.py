"""Multi-token-prediction modules: read from the target's checkpoint, right drafts, no trace of what was rejected, and the target's own text."""

import json
from collections import Counter
from functools import cache
from itertools import cycle, product
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.cache_utils import MtpCache

from dspark import profiling
from dspark.cli.main import main
from dspark.core.decode import decode
from dspark.core.planner import Always
from dspark.core.sampling import GREEDY, Coupled, Streams
from dspark.drafters import MtpDrafter
from dspark.errors import HeadError
from dspark.generation import generate, make_drafter, make_law, make_planner
from dspark.head.mtp import load_mtp
from dspark.target.load import load_target
from dspark.target.target import Target
from mtp_checkpoints import ALSO_WITH_MTP, WITH_MTP, modules_of, save_with_mtp
from oracle import Oracle, plain_greedy
from saved import byte_tokenizer
from tiny import tiny_model

PROMPT = [3, 17, 99, 45, 8, 8, 101, 64, 3, 17, 99]  # longer than the tiny models' window of 8
NUM_NEW = 12
ROUNDING = 1e-4  # as in test_families.py


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    @cache
    def target_of(family: str) -> Target:
        return load_target(save_with_mtp(tmp_path_factory.mktemp(family), family, shards=family == "deepseek_v3"))

    return target_of


@pytest.fixture(scope="module")
def greedy_of(targets):
    return cache(lambda family, length=None, num=NUM_NEW: plain_greedy(targets(family), PROMPT[:length], num))


def by_hand(target: Target, family: str, ids: list[int], num: int) -> tuple[list[int], torch.Tensor]:
    """The greedy draft of `num` tokens after `ids` and its logits, from the weights that were saved and without any cache: every module
    reads the whole text each time."""
    modules, outputs = reference(family)
    before_norm, last = family == "step3p7", len(outputs) - 1
    seen: dict[str, torch.Tensor] = {}

    def note(module, args, output):
        seen["before"], seen["after"] = args[0], output

    norm = target.model.get_decoder().norm.register_forward_hook(note)
    with torch.inference_mode():
        target.model(torch.tensor([ids[:-1]]))
        norm.remove()
        hidden = seen["before" if before_norm else "after"]
        text, rows, reads = list(ids), [], hidden
        for step in range(num):
            k = min(step, last)
            # past the last module, it reads its own output too, one slot further
            reads = hidden if step <= last else torch.cat([reads, hidden[:, -1:]], 1)
            positions = torch.arange(1 + k, len(text))[None]
            norm = modules.layers[k].post_norm.register_forward_hook(note)
            modules.forward_layer(k, reads, positions, MtpCache(config=modules.config), input_ids=torch.tensor([text[1 + k :]]))
            norm.remove()
            hidden = seen["before" if before_norm else "after"]
            rows.append(seen["after"][0, -1] @ outputs[k].T)
            text.append(int(rows[-1].argmax()))
    return text[len(ids) :], torch.stack(rows)


@cache
def reference(family: str):
    return modules_of(family)


def committed(drafter: MtpDrafter, target: Target, ids: list[int]) -> MtpDrafter:
    drafter.start()
    drafter.commit(target.prefill(target.start(), ids[:-1]))
    return drafter


def drafted(drafter: MtpDrafter, ids: list[int], num: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens, and the laws at T = 1 along the same tokens."""
    tokens = MtpDrafter.draft(drafter, ids, num, GREEDY, torch.Generator()).tokens
    forced = Coupled(0)
    forced.choose = lambda q_V, position, size, ids_C=None: tokens[position - len(ids)]  # type: ignore[method-assign]
    return tokens, MtpDrafter.draft(drafter, ids, num, make_law(1.0), forced).probs_KV


@pytest.mark.parametrize("family", WITH_MTP | ALSO_WITH_MTP)
def test_drafts_are_those_of_the_saved_modules_without_a_cache(family, targets):
    target = targets(family)
    head = load_mtp(target)
    assert head.num_modules == (WITH_MTP | ALSO_WITH_MTP)[family][0]
    for length in (2, 3, 4, len(PROMPT)):
        ids = PROMPT[:length]
        tokens, laws = drafted(committed(MtpDrafter(head, target, 5), target, ids), ids, 5)
        expected, logits = by_hand(target, family, ids, 5)
        assert tokens == expected
        assert (laws - logits.softmax(-1)).abs().max() < ROUNDING


@pytest.mark.parametrize("family", ["qwen3_5", "step3p7"])
def test_a_prompt_in_pieces_gives_the_same_drafts(family, targets, monkeypatch):
    target = targets(family)
    drafters = [committed(MtpDrafter(load_mtp(target), target), target, PROMPT) for _ in range(2)]
    tokens, laws = drafted(drafters[0], PROMPT, 3)
    monkeypatch.setattr("dspark.head.mtp.PREFILL_ROWS", 3)
    in_pieces, others = drafted(drafters[1], PROMPT, 3)
    assert in_pieces == tokens and (laws - others).abs().max() < ROUNDING


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_other_precisions_draft_too(dtype, tmp_path):
    target = load_target(save_with_mtp(tmp_path / "target", "step3p7"), dtype=dtype)
    result = generate(target, None, PROMPT, NUM_NEW, drafter="mtp", plan="fixed", temperature=0.0)
    assert result.num_tokens == NUM_NEW and sum(done.num_drafted for done in result.rounds_log) > NUM_NEW / 2
    assert target.mtp.hidden(torch.zeros(1, 1, target.hidden_size)).dtype == torch.bfloat16


def test_only_heads_of_their_own_are_kept(targets):
    assert [load_mtp(targets(family)).config.own_heads for family in WITH_MTP] == [0, 0, 0, 3]


@pytest.mark.parametrize(("family", "block_size"), [*product(WITH_MTP, [1, 2, 3, 4]), *((family, 2) for family in ALSO_WITH_MTP)])
def test_greedy_tokens_are_those_of_transformers(family, block_size, targets, greedy_of):
    target = targets(family)
    drafter = MtpDrafter(load_mtp(target), target, block_size)
    for length in (1, 2, len(PROMPT)) if block_size == 3 else (len(PROMPT),):
        result = generate(target, None, PROMPT[:length], NUM_NEW, drafter=drafter, plan="fixed")
        assert result.token_ids == greedy_of(family, length)
        assert sum(done.num_drafted for done in result.rounds_log) > NUM_NEW / 2


class Turns:
    """Drafters that take turns, by round; each is told what became final."""

    def __init__(self, turns):
        self.turns, self.block_size = turns, max(drafter.block_size for drafter in turns)

    def start(self) -> None:
        self.next = cycle(self.turns)
        for drafter in set(self.turns):
            drafter.start()

    def draft(self, ids, limit, law, noise):
        return next(self.next).draft(ids, limit, law, noise)

    def commit(self, features_TMD) -> None:
        for drafter in set(self.turns):
            drafter.commit(features_TMD)


class Compared(MtpDrafter):
    """Looks in every draft whether one that has seen only the accepted text, in one pass, would draft the same."""

    num_compared = 0

    def draft(self, ids, limit, law, noise):
        num = min(limit, self.block_size)
        if num and len(ids) > 1:
            tokens, laws = drafted(self, ids, num)
            fresh = committed(MtpDrafter(self.head, self.target, num), self.target, list(ids))
            expected, expected_laws = drafted(fresh, ids, num)
            assert tokens == expected and (laws - expected_laws).abs().max() < ROUNDING
            for k, (layer, other) in enumerate(list(zip(self.cache.layers, fresh.cache.layers, strict=True))[:num]):
                assert self.num_final[k] == fresh.num_final[k]
                assert layer.get_seq_length() == other.get_seq_length()
                assert (layer.keys - other.keys).abs().max() < ROUNDING
            self.num_compared += 1
        return super().draft(ids, limit, law, noise)


@pytest.mark.parametrize("others", [0, 2], ids=["alone", "with others"])
@pytest.mark.parametrize("family", WITH_MTP)
def test_nothing_stays_of_what_was_rejected_or_drafted_by_others(family, others, targets, greedy_of):
    """Oracle drafts have 0, 1, .. 4 right tokens in turn, so that rounds of every accepted count come between."""
    num = 22 if others else 6
    target, truth = targets(family), greedy_of(family, num=num)
    compared = Compared(load_mtp(target), target, 4)
    oracle = Oracle(truth, len(PROMPT), target.vocab_size, 4)
    drafter = Turns([compared, *[oracle] * others]) if others else compared
    said = [token for done in decode(target, drafter, PROMPT, GREEDY, Streams(0), num) for token in done.tokens]
    assert said == truth and compared.num_compared > 2


def test_drafts_of_changing_lengths_leave_the_same_state(targets, greedy_of):
    target = targets("step3p7")
    compared, lengths = Compared(load_mtp(target), target, 5), cycle([1, 4, 0, 2, 5, 3])

    class Changing(Always):
        def ask(self, limit, num_tokens):
            return min(limit, next(lengths))

    rounds = decode(target, compared, PROMPT, GREEDY, Streams(0), NUM_NEW, planner=Changing())
    said = [token for done in rounds for token in done.tokens]
    assert said == greedy_of("step3p7") and compared.num_compared > 5


@pytest.mark.parametrize("plan", ["auto", "fixed", "length:1", "threshold:0.5", "early-stop", "lagged"])
def test_every_planner_takes_them(plan, targets, greedy_of, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # costs are measured here
    monkeypatch.setattr(profiling, "PLANNING_SECONDS", 0.1)
    target = targets("qwen3_5")
    drafter = make_drafter("mtp", target, None)
    planner = make_planner(plan, target, drafter)
    assert drafter.block_size == 3
    for _ in range(2):
        result = generate(target, None, PROMPT, NUM_NEW, drafter=drafter, plan=planner)
        assert result.token_ids == greedy_of("qwen3_5")
    assert any(done.num_drafted for done in result.rounds_log) or plan == "auto"  # which may have parked


@pytest.mark.parametrize("family", ["qwen3_5", "step3p7"])
def test_each_drafted_token_is_drawn_from_the_law_that_is_stated(family, targets):
    """Uniform numbers spread evenly over [0, 1) bring each first token as often as its law says; a second token's law is conditioned on it."""
    target = targets(family)
    drafter = committed(MtpDrafter(load_mtp(target), target, 2), target, PROMPT)
    law = make_law(1.3, top_k=5, repetition_penalty=1.2)
    drafter.draft(PROMPT, 2, law, torch.Generator())  # reads the prompt, in a pass of more rows than those of the drafts to come
    num, counts, seconds = 100, Counter(), {}
    for i in range(num):
        with monkeyed_uniforms([(i + 0.5) / num, 0.5]):
            draft = drafter.draft(PROMPT, 2, law, torch.Generator())
        counts[draft.tokens[0]] += 1
        first_V = draft.probs_KV[0]
        seconds.setdefault(draft.tokens[0], draft.probs_KV[1])
        assert torch.equal(seconds[draft.tokens[0]], draft.probs_KV[1]) and draft.probs_KV[1][draft.tokens[1]] > 0
    assert (first_V > 0).sum() == 5 and abs(first_V.sum() - 1) < 1e-5
    assert all(abs(counts[token] - num * chance) <= 1 for token, chance in enumerate(first_V.tolist()))
    assert len(seconds) > 1 and not all(torch.equal(next(iter(seconds.values())), other) for other in seconds.values())


def monkeyed_uniforms(values: list[float]):
    return patch("dspark.drafters.mtp.Streams.uniforms", lambda generator, count: values[:count])


def test_a_seed_replays_and_a_grammar_like_mask_ends_a_draft(targets):
    target = targets("deepseek_v3")
    drafter = MtpDrafter(load_mtp(target), target, 3)

    def answer(seed: int) -> list[int]:
        return generate(target, None, PROMPT, 12, temperature=1.0, seed=seed, drafter=drafter, plan="fixed").token_ids

    assert answer(1) == answer(1) != answer(2)

    def none_after_two(ids, scores):
        return torch.full_like(scores, -float("inf")) if ids.shape[1] >= len(PROMPT) + 2 else scores

    drafter = committed(drafter, target, PROMPT)
    for law in (make_law(0.0, logits_processors=[none_after_two]), make_law(1.0, logits_processors=[none_after_two])):
        draft = drafter.draft(PROMPT, 3, law, torch.Generator())
        assert (len(draft.tokens), draft.num_asked) == (2, 3)
    assert drafter.draft(PROMPT, 0, GREEDY, torch.Generator()).tokens == []


def test_what_has_no_modules_says_so(tmp_path):
    with pytest.raises(HeadError, match="not loaded from a checkpoint"):
        load_mtp(Target(tiny_model("llama")))
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    with pytest.raises(HeadError, match="llama has no multi-token-prediction modules"):
        make_drafter("mtp", load_target(tmp_path / "llama"), None)


def test_modules_of_a_kind_that_transformers_cannot_run_are_refused(tmp_path):
    tiny_model("deepseek_v32").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | {"model.layers.4.eh_proj.weight": torch.zeros(32, 64)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(HeadError, match="layers of the kind indexed_attention"):
        load_mtp(load_target(tmp_path))


def test_a_missing_tensor_is_refused_by_name(tmp_path):
    folder = save_with_mtp(tmp_path / "damaged", "qwen3_5")
    tensors = load_file(folder / "model.safetensors")
    del tensors["mtp.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    target = load_target(folder)
    settings = dict(vars(target.text_config))
    with pytest.raises(HeadError, match=r"mlp\.up_proj"):
        load_mtp(target)
    assert vars(target.text_config) == settings


def test_the_command_line_takes_them(targets, tmp_path, capsys):
    folder = save_with_mtp(tmp_path / "target", "qwen3_5", vocab_size=259)
    byte_tokenizer().save_pretrained(folder)
    texts = []
    for drafter in ("mtp", "none"):
        assert main(["generate", str(folder), "hello", "--max-new-tokens", "12", "--plan", "fixed", "--drafter", drafter, "--json"]) == 0
        captured = capsys.readouterr()
        texts.append(json.loads(captured.out)["token_ids"])
        assert drafter == "none" or "no head is known" not in captured.err
    assert texts[0] == texts[1]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "abc"}\n')
    assert main(["bench", str(folder), "--prompts", str(prompts), "--compare", "plain,mtp@fixed", "--max-new-tokens", "8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])["modes"]
    assert main(["verify", str(folder), "--drafter", "mtp", "--prompts", str(prompts), "--max-new-tokens", "8", "--json"]) == 0
    checks = json.loads(verified := capsys.readouterr().out)["checks"]
    assert all(check["passed"] for check in checks) and "law of a round at T=1 (mtp)" in verified
    assert report["mtp@fixed"]["identical_to_plain"] == 1 and len(report["mtp@fixed"]["acceptance_by_position"]) == 3
