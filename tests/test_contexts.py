"""Acceptance by context: what is read once and cut is what would be read anew, and drafts depend on distances alone."""

import json

import pytest
import torch

from dspark.cli.main import main
from dspark.drafters import DSparkDrafter, MtpDrafter
from dspark.errors import SettingError
from dspark.generation import generate
from dspark.measure.contexts import answered, by_context, conversations
from dspark.prompts import Prompt
from dspark.target.load import load_target
from dspark.target.target import Target
from saved import save_tiny_target
from tiny import tiny_head, tiny_model, tiny_recurrent

PROMPTS = [Prompt(text) for text in ("tell me", "and why", "what else", "good", "then what", "go on")]


@pytest.fixture
def pair(tmp_path, monkeypatch):
    monkeypatch.setattr("dspark.measure.contexts.ANSWER_TOKENS", 8)
    target = load_target(save_tiny_target(tmp_path / "target"))
    return target, tiny_head(target)


def test_figures_are_those_of_decoding_each_conversation_anew(pair):
    target, head = pair
    turns, lengths = answered(target, head, PROMPTS[2:], 120, lambda *told: None), [40, 80, 120]
    rows = by_context(target, DSparkDrafter(head, target), PROMPTS[:2], turns, lengths, 16)
    for length, row in zip(lengths, rows, strict=True):
        ids = [conversations(target, prompt, turns, [length])[0] for prompt in PROMPTS[:2]]
        assert all(length - 50 < len(each) <= length for each in ids)
        anew = [generate(target, head, each, 16, drafter="dspark", plan="fixed") for each in ids]
        assert row["rounds"] == sum(result.rounds for result in anew) and row["prompt_tokens"] == round(sum(map(len, ids)) / 2)
        assert row["tau"] == round(sum(result.num_tokens for result in anew) / row["rounds"], 3)


def test_lengths_that_cannot_be_are_refused(pair):
    target, head = pair
    turns = answered(target, head, PROMPTS[2:3], 60, lambda *told: None)
    for lengths, says in (([250], "longest that does is 240"), ([10], "longer than a context of 10"), ([40, 200], "of 200 tokens")):
        with pytest.raises(SettingError, match=says):
            by_context(target, DSparkDrafter(head, target), PROMPTS[:1], turns, lengths, 16)


def test_the_command_prints_a_line_for_each_length(pair, tmp_path, capsys, monkeypatch):
    target, head = pair
    monkeypatch.setattr("dspark.cli.bench.open_head", lambda options, target: head)
    monkeypatch.setattr("dspark.cli.bench.open_target", lambda options: target)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt.content, "set": "a"}) + "\n" for prompt in PROMPTS))
    command = ["bench", "x", "--prompts", str(tmp_path / "p.jsonl"), "--contexts", "80,40", "--max-new-tokens", "8"]
    assert main([*command, "--limit", "1", "--json"]) == 0
    *lines, document = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["context", "40", "80"]
    assert [row["context"] for row in json.loads(document)["contexts"]] == [40, 80]
    for more, says in (
        ([], "needs --limit"),
        (["--limit", "1", "--contexts", "x"], "numbers of tokens"),
        (["--limit", "1", "--trace", "t"], "--trace"),
        (["--limit", "1", "--contexts", "\u00b2"], "numbers of tokens"),
    ):
        assert main([*command, *more]) == 2 and says in capsys.readouterr().err


def test_what_cannot_be_measured_is_said_before_any_answer(pair, tmp_path, capsys, monkeypatch):
    target, head = pair
    monkeypatch.setattr("dspark.cli.bench.open_head", lambda options, target: head)
    monkeypatch.setattr("dspark.cli.bench.open_target", lambda options: target)
    monkeypatch.setattr("dspark.measure.contexts.answered", lambda *arguments: pytest.fail("answers were sampled"))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt.content}) + "\n" for prompt in PROMPTS))
    command = ["bench", "x", "--prompts", str(tmp_path / "p.jsonl"), "--limit", "1", "--max-new-tokens", "8", "--contexts"]
    for more, says in (
        (["40,900"], "longest that does is 248"),
        (["10,40"], "a context of 10"),
        (["40", "--temperature", "nan"], "is nan"),
    ):
        assert main([*command, *more]) == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["mtp", "eagle3"])
def test_heads_of_the_other_kinds_are_measured_too(kind, pair):
    target, _ = pair
    head = tiny_recurrent(target, kind)
    turns = answered(target, head, PROMPTS[2:], 80, lambda *told: None)
    (row,) = by_context(target, MtpDrafter(head, target), PROMPTS[:2], turns, [80], 16)
    anew = [generate(target, head, conversations(target, prompt, turns, [80])[0], 16, drafter=kind, plan="fixed") for prompt in PROMPTS[:2]]
    assert row["rounds"] == sum(result.rounds for result in anew)


def test_a_draft_does_not_depend_on_where_its_context_begins():
    """Rotary attention sees distances: training at shifted positions would change nothing."""
    target = Target(tiny_model("llama"))
    head = tiny_head(target)
    features = torch.randn(1, 20, 2, target.hidden_size, generator=torch.Generator().manual_seed(0))
    anchor = target.embed(torch.tensor([[7]]))

    def hidden(offset: int) -> torch.Tensor:
        kv = head.context_kv(features, torch.arange(offset, offset + 20)[None])
        return head.hidden(anchor, torch.tensor([[offset + 20]]), kv)

    torch.testing.assert_close(hidden(8000), hidden(0), rtol=2e-3, atol=2e-3)
    with pytest.raises(AssertionError):  # the distance between context and anchor does matter
        torch.testing.assert_close(
            head.hidden(anchor, torch.tensor([[60]]), head.context_kv(features, torch.arange(20)[None])), hidden(0), rtol=2e-3, atol=2e-3
        )
