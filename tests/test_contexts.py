"""Acceptance by context: what is read once and cut is what would be read anew, and drafts depend on distances alone."""

import json
from datetime import date
from pathlib import Path

import pytest
import torch

from dspark.cli.main import main
from dspark.drafters import DSparkDrafter, MtpDrafter
from dspark.errors import HeadError, SettingError
from dspark.generation import generate
from dspark.head.folder import save_head
from dspark.measure.contexts import answered, by_context, conversations
from dspark.prompts import Prompt
from dspark.target.load import load_target
from dspark.target.target import Target
from dspark.train.card import CONTEXTS_SECTION, add_contexts, check_card, with_contexts, write_card
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


def test_the_table_goes_into_the_card_and_stays_when_the_card_is_written_anew(pair, tmp_path, capsys, monkeypatch):
    target, head = pair
    monkeypatch.setattr("dspark.cli.bench.open_head", lambda options, target: head)
    monkeypatch.setattr("dspark.cli.bench.open_target", lambda options: target)
    trained = {"steps": 1, "sequences_per_step": 1, "anchors_per_sequence": 1, "optimizer": "adamw", "seed": 0, "held_out": 1}
    provenance = {"answers": 1, "answer_tokens": 9, "command": "dspark train", "train": trained, "held_out_teacher_forced": {}}
    folder, card = tmp_path / "head", write_card(head, target, provenance, None)
    save_head(head, target, folder, list(range(3, 30)), provenance, card)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt.content, "set": "a"}) + "\n" for prompt in PROMPTS))
    command = [
        "bench",
        "x",
        "--head",
        str(folder),
        "--prompts",
        str(tmp_path / "p.jsonl"),
        "--max-new-tokens",
        "8",
        "--limit",
        "2",
        "--card",
    ]
    taus = {}
    for temperature, lengths in (("1", "40"), ("0", "40"), ("0", "40,80")):  # the last in place of the one before
        assert main([*command, "--contexts", lengths, "--temperature", temperature, "--json"]) == 0
        rows = json.loads(capsys.readouterr().out.splitlines()[-1])["contexts"]
        taus[temperature] = [f"{row['tau']:.2f}" for row in rows]
    record, written = json.loads((folder / "provenance.json").read_text()), (folder / "README.md").read_text()
    assert [(table["temperature"], len(table["rows"])) for table in record["contexts"]] == [(0.0, 2), (1.0, 1)]
    assert {name: record[name] for name in provenance} == provenance
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in written.splitlines() if line.startswith(("| context", "| T = "))]
    assert [row[1:] for row in cells] == [["40", "80"], taus["0"], [*taus["1"], ""]]
    assert cells[1][0] == f"T = 0 (2 questions, 8 tokens each, {date.today()})"
    assert written == write_card(head, target, record, None)
    assert CONTEXTS_SECTION.sub("", written) == card
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "golden.safetensors",
        "provenance.json",
        "README.md",
    }


def test_a_table_written_by_hand_is_replaced_and_a_card_of_another_kind_gets_it_at_the_end():
    tables = [{"temperature": 0.0, "prompts": 6, "max_new_tokens": 64, "date": "today", "rows": [{"context": 1024, "tau": 2.4}]}]
    for text in ((Path(__file__).parents[1] / "heads/smollm2-135m/README.md").read_text(), "# mine\n"):
        written = with_contexts(text, tables)
        assert written.count("Tokens a round by length") == 1 and "| context, tokens | 1,024 |" in written and "| 2.40 |\n" in written
        assert with_contexts(written, tables) == written
        assert CONTEXTS_SECTION.sub("", written).split() == CONTEXTS_SECTION.sub("", text).split()


def test_a_head_without_a_place_for_the_table_is_told_before_anything_is_loaded(pair, tmp_path, capsys):
    target, head = pair
    folder = tmp_path / "head"
    save_head(head, target, folder, list(range(3, 30)), {}, "# card\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    command = ["bench", "/nowhere", "--head", str(folder), "--prompts", str(tmp_path / "p.jsonl"), "--limit", "1", "--card"]
    assert main(command) == 2 and "--card cannot take effect without --contexts" in capsys.readouterr().err
    for name in ("README.md", "provenance.json"):
        (folder / name).unlink()
        assert main([*command, "--contexts", "40"]) == 2 and f"cannot read {folder / name}" in capsys.readouterr().err


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


@pytest.mark.parametrize("tables", [[1], {"a": 1}, [{"temperature": 1, "rows": 3}], [{"rows": []}]])
def test_damaged_tables_are_told_before_anything_is_measured(tables, tmp_path):
    (tmp_path / "README.md").write_text("# card\n")
    (tmp_path / "provenance.json").write_text(json.dumps({"contexts": tables}))
    with pytest.raises(HeadError, match="`contexts` does not hold tables"):
        check_card(tmp_path)


def test_a_card_that_is_a_link_is_written_where_it_points(tmp_path):
    measured = {"temperature": 0.0, "max_new_tokens": 4, "date": "today", "prompts": 1, "rows": [{"context": 40, "tau": 1.5}]}
    folder, away, blobs = tmp_path / "head", tmp_path / "away", tmp_path / "blobs"
    for each in (folder, away, blobs):
        each.mkdir()
    (away / "card.md").write_text("# card\n")
    (blobs / "0a1b").write_text("{}")  # as in the hub's cache, where other revisions may share it
    (folder / "README.md").symlink_to(away / "card.md")
    (folder / "provenance.json").symlink_to(Path("..", "blobs", "0a1b"))
    check_card(folder)
    add_contexts(folder, measured)
    assert (folder / "README.md").is_symlink() and "| 1.50 |" in (away / "card.md").read_text()
    assert (blobs / "0a1b").read_text() == "{}" and json.loads((folder / "provenance.json").read_text())["contexts"] == [measured]
    assert [len(list(each.iterdir())) for each in (folder, away, blobs)] == [2, 1, 1]
