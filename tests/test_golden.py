"""Golden vectors: what head and target computed comes out again, or the first thing that does not is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark.cli.main import main
from dspark.errors import HeadError
from dspark.generation import generate
from dspark.head.folder import empty_head, load_head, save_head, shipped_head
from dspark.head.golden import TEXT_TOKENS, count_accepted, read_features, say_greedily, told_by
from dspark.head.head import Head, SelfTest
from dspark.measure.lossless import Check, golden_text, verify_pair
from dspark.target.target import Target
from tiny import tiny_head, tiny_model

PROMPT = list(range(3, 20))


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(tiny_model("llama", 0), None, name="tiny")


def head_that_knows(target: Target, num_pairs: int, kind: str = "vanilla") -> tuple[Head, list[int]]:
    """A head that was told what follows `num_pairs` tokens of what the target says greedily after PROMPT."""
    head = tiny_head(target, kind, rank=8)
    text = say_greedily(target, PROMPT, TEXT_TOKENS)
    follows = dict(zip([PROMPT[-1], *text], text, strict=False))
    head.markov_head.markov_w1.weight.zero_()
    head.markov_head.markov_w2.weight.zero_()
    for r, (one, other) in enumerate(list(follows.items())[:num_pairs]):
        head.markov_head.markov_w1.weight[one, r] = 40.0
        head.markov_head.markov_w2.weight[other, r] = 40.0
    return head, text


@pytest.fixture(scope="module")
def saved(target, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "head"
    save_head(head_that_knows(target, 6)[0], target, folder, PROMPT, {}, "")
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "head"))


def edit(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("num_pairs", [0, 3, 6])
def test_the_golden_text_counts_what_decoding_accepts(num_pairs, target):
    head, text = head_that_knows(target, num_pairs)
    ids = [*PROMPT, *text]
    result = generate(target, head, PROMPT, TEXT_TOKENS, drafter="dspark", plan="fixed")
    assert result.token_ids == text
    expected = sum(r.num_accepted for r in result.rounds_log)
    assert count_accepted(head, target, ids, len(PROMPT), read_features(head, target, ids)) == expected
    assert (expected > 3) == (num_pairs == 6)


def test_a_load_says_how_the_head_drafts_here(saved, target):
    test = load_head(saved, target).self_test
    assert test is not None and test.good and test.tokens == TEXT_TOKENS
    assert test.accepted == test.accepted_then > 3
    assert str(test).startswith(f"draft accepted {test.accepted} of {TEXT_TOKENS} on the golden text")
    assert told_by(load_file(saved / "golden.safetensors")) == (test.accepted, TEXT_TOKENS)


def test_a_head_that_drafts_less_than_half_is_warned_of(folder, target):
    edit(folder / "golden.safetensors", lambda golden: golden["accepted"][:1].fill_(20))
    with pytest.warns(UserWarning, match=r"the head drafts badly here: draft accepted \d+ of 24"):
        test = load_head(folder, target).self_test
    assert test is not None and not test.good


FIRST = {
    "fc.weight": "the context (fc, hidden_norm)",
    "layers.0.self_attn.k_proj.weight": "the hidden state of drafted token 1",
    "layers.1.mlp.up_proj.weight": "the hidden state of drafted token 1",
    "norm.weight": "the hidden state of drafted token 1",
    "markov_head.markov_w2.weight": "the logits of drafted token 1",
    "confidence_head.proj.bias": "the confidence of drafted token 1",
}


@pytest.mark.parametrize("name", FIRST)
def test_the_first_thing_that_differs_is_named(name, folder, target):
    edit(folder / "model.safetensors", lambda tensors: tensors[name].neg_().sub_(1.0))
    with pytest.raises(HeadError) as caught:
        load_head(folder, target)
    assert f"do not come out again, first in {FIRST[name]}" in caught.value.message


def test_another_choice_is_named(folder, target):
    draft = load_file(folder / "golden.safetensors")["draft"].tolist()
    edit(folder / "golden.safetensors", lambda golden: golden["draft"][-1:].fill_((draft[-1] + 1) % 128))
    with pytest.raises(HeadError, match=f"first in the choice of drafted token 4, which was {(draft[-1] + 1) % 128} and is {draft[-1]}"):
        load_head(folder, target)


def test_golden_vectors_of_the_first_kind_are_still_compared(folder, target):
    """Heads of earlier versions: all tokens' features, base logits of the last block."""
    head = load_head(folder, target)
    ids = list(range(3, 40))
    features = read_features(head, target, ids)
    with torch.no_grad():
        context_kv = head.context_kv(features[None, :-1].bfloat16().float(), torch.arange(len(ids) - 1)[None])
        hidden = head.hidden(target.embed(torch.tensor([[ids[-1]]])), torch.tensor([[len(ids) - 1]]), context_kv)
        logits = head.base_logits(hidden)[0, 0].half()
    old = {"ids": torch.tensor(ids).int(), "layer_ids": torch.tensor(head.config.target_layer_ids).int(), "features": features.bfloat16(),
           "logits": logits}  # fmt: skip
    save_file(old, folder / "golden.safetensors")
    assert load_head(folder, target).self_test is None
    edit(folder / "model.safetensors", lambda tensors: tensors["layers.0.self_attn.q_proj.weight"].neg_())
    with pytest.raises(HeadError, match="first in the logits"):
        load_head(folder, target)


@pytest.mark.parametrize("kind", [("vanilla", 0), ("gated", 8), ("rnn", 8)])
def test_every_kind_of_head_replays(kind, target, tmp_path):
    save_head(tiny_head(target, *kind, draft_vocab=32), target, tmp_path, PROMPT, {}, "")
    assert load_head(tmp_path, target).self_test is not None


def test_an_empty_head_never_passes(saved, target, monkeypatch):
    monkeypatch.setattr("dspark.head.folder.fill", lambda head, weights: None)
    with pytest.raises(HeadError, match="do not come out again"):
        load_head(saved, target)
    assert torch.isnan(empty_head(tiny_head(target).config, torch.arange(128), target).fc.weight).all()


def test_the_shipped_heads_golden_vectors_are_small():
    file = shipped_head("smollm2-135m") / "golden.safetensors"
    assert file.stat().st_size < 300_000 and told_by(load_file(file)) == (16, 24)


def test_verify_and_inspect_say_it(folder, target, capsys):
    assert golden_text(SelfTest(12, 24, 16)) == Check(
        "golden vectors come out again", True, "draft accepted 12 of 24 on the golden text (16 when the head was saved)"
    )
    assert golden_text(SelfTest(7, 24, 16)).passed is False
    assert verify_pair(target, load_head(folder, target), [PROMPT] * 2, 8, ["dspark"])[0].name == "golden vectors come out again"
    then = told_by(load_file(folder / "golden.safetensors"))
    assert main(["inspect", str(folder)]) == 0
    assert f"draft accepted {then[0]} of 24 tokens when the head was saved" in capsys.readouterr().out
    (folder / "golden.safetensors").unlink()
    assert main(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["golden"] is None
