"""The command line: contract of the JSON output, one clear message and exit 2 for a user's mistake."""

import gc
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from typing import get_args

import pytest

import dspark.generation
from dspark.cli.main import VERBS, main, parse
from dspark.cli.options import check_file, cores, starting
from dspark.cli.train import advice
from dspark.errors import PromptError, RuntimeUnavailable, SettingError
from dspark.measure.lossless import roll_back
from dspark.prompts import ROLES, read_prompts
from dspark.server.schemas import Message
from dspark.target.load import load_target
from dspark.target.native.build import built
from dspark.target.target import Target
from saved import run, save_tiny_pair


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny target and a head for it."""
    return save_tiny_pair(tmp_path_factory.mktemp("cli"))


def test_generate_json_keeps_its_contract(place, capsys, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "abc", "set": "s"}\n{"messages": [{"role": "user", "content": "xyz"}], "id": 7}\n')
    code, out, _ = run(capsys, "generate", place / "target", "--prompts", file, "--head", place / "head", "--max-new-tokens", 9, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [line["index"] for line in lines] == [0, 1]
    assert lines[0]["set"] == "s" and lines[1]["id"] == 7
    for line in lines:
        assert {"text", "token_ids", "num_tokens", "rounds", "tau", "seconds", "tokens_per_second", "finish_reason"} <= line.keys()
        assert line["num_tokens"] == len(line["token_ids"]) <= 9
        assert line["finish_reason"] == ("length" if line["num_tokens"] == 9 else "stop")


def test_all_drafters_say_the_same_as_plain_decoding(place, capsys):
    texts = []
    for more in (["--head", "none"], ["--head", place / "head"], ["--head", place / "head", "--drafter", "lookup"]):
        code, out, _ = run(capsys, "generate", place / "target", "hello", "--max-new-tokens", 20, "--json", *more)
        assert code == 0
        texts.append(json.loads(out)["token_ids"])
    assert texts[0] == texts[1] == texts[2]


def test_streamed_text_is_the_text(place, capsys):
    _, streamed, _ = run(capsys, "generate", place / "target", "hello", "--max-new-tokens", 20, "--head", "none")
    _, out, _ = run(capsys, "generate", place / "target", "hello", "--max-new-tokens", 20, "--head", "none", "--json")
    assert streamed == json.loads(out)["text"] + "\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "{target}", "hi", "--temperature", "-1"], "--temperature is -1.0"),
        (["generate", "{target}", "hi", "--top-p", "0"], "--top-p is 0.0"),
        (["generate", "{target}", "hi", "--seed", "-2"], "--seed is -2"),
        (["generate", "{target}", "hi", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["generate", "{target}", ""], "prompt 0 is empty"),
        (["generate", "{target}"], "no prompt given"),
        (["generate", "", "hi"], "TARGET is empty\nhint: give one"),
        (["generate", "{target}", "hi", "--head", ""], "--head is empty\nhint: give one"),
        (["generate", "{target}", "hi", "--head="], "--head is empty"),
        (["train", "{target}", "--out", ""], "--out is empty"),
        (["calibrate", "", "--target", "{target}"], "HEAD is empty"),
        (["serve", "{target}", "--api-key", ""], "--api-key is empty"),
        (["serve", "{target}", "--name="], "--name is empty"),
        (["generate", "{target}", "hi", "--prompts", ""], "--prompts is empty"),
        (["bench", "{target}", "--trace="], "--trace is empty"),
        (["generate", "{target}", "hi", "--device", ""], "--device is empty"),
        (["train", "{target}", "--out", "{new}", "--device="], "--device is empty"),
        (["generate", "{target}", "x" * 600], "exceeds the target's context of 512"),
        (["generate", "{target}", "x" * 600], "hint: shorten the prompt\n"),
        (["generate", "{target}", "hi", "--head", "none", "--drafter", "dspark"], "needs a head, and there is none"),
        (["generate", "{target}", "hi", "--drafter", "magic"], "unknown drafter 'magic'"),
        (["generate", "{target}", "hi", "--drafter", "dflash", "--head", "{head}"], "needs a head of rank 0"),
        (["generate", "{target}", "hi", "--dtype", "int3"], "unknown dtype 'int3'"),
        (["generate", "{target}", "hi", "--threads", "0"], "--threads is 0"),
        (["generate", "/nowhere/at/all", "hi"], "no folder /nowhere/at/all"),
        (["generate", "{target}", "hi", "--head", "/nowhere"], "no head at /nowhere"),
        (["generate", "{target}", "--prompts", "/nowhere.jsonl"], "cannot read prompts file /nowhere.jsonl"),
        (["inspect", "/nowhere"], "no head at /nowhere"),
        (["train", "{target}", "--out", "{new}", "--steps", "0"], "--steps is 0"),
        (["train", "{target}", "--out", "{new}", "--taps", "a,b"], "--taps is 'a,b'"),
        (["train", "{target}", "--out", "{new}", "--answers", "{prompts}", "--prompts", "{prompts}"], "cannot take effect"),
        (["train", "{target}", "--out", "{new}", "--answers", "{prompts}", "--num-prompts", "5"], "cannot take effect"),
        (["train", "{target}", "--out", "{new}", "--num-prompts", "9", "--held-out", "9"], "leave nothing to train on"),
        (["train", "{target}", "--out", "{new}", "--draft-vocab", "200"], "has no room for the 259 special and byte tokens"),
        (
            ["train", "{target}", "--out", "{new}", "--start-from", "{head}", "--layers", "4"],
            "--layers cannot take effect beside --start-from",
        ),
        (["train", "{target}", "--out", "{new}", "--start-from", "{head}", "--rank", "1"], "cannot be widened to rank 1"),
        (["train", "{target}", "--out", "{new}", "--kinds", "code,poems"], "--kinds names 'poems'"),
        (["train", "{target}", "--out", "{new}", "--start-from", "/nowhere"], "no head at /nowhere"),
        (["train", "{target}", "--out", "{new}", "--device", "cuda:99"], "cannot put the target on cuda:99: "),
        (["train", "{target}", "--out", "{new}", "--seed", "99999999999999999999"], "--seed is 99999999999999999999"),
        (["generate", "{target}", "hi", "--threads", "99999999999999999999"], "--threads is 99999999999999999999"),
        (["generate", "{target}", "hi", "--runtime", "warp"], "unknown runtime 'warp'"),
        (["generate", "{target}", "hi", "--rollback", "warp"], "unknown rollback 'warp'"),
        (["generate", "{target}", "hi", "--head", "{prompts}"], "is a file"),
        (["bench", "{target}", "--prompts", "{prompts}", "--compare", "plain,warp", "--head", "none"], "unknown mode 'warp'"),
        (["bench", "{target}", "--prompts", "{prompts}", "--head", "none"], "mode dspark needs a head"),
        (["bench", "{target}", "--prompts", "{prompts}", "--compare", "plain, plain"], "named twice"),
        (["bench", "{target}", "--prompts", "{prompts}", "--other", "plain={head}"], "write NAME=HEAD"),
        (["bench", "{target}", "--prompts", "{prompts}", "--other", "mine"], "write NAME=HEAD"),
        (["bench", "{target}", "--prompts", "{prompts}", "--other", "mine=/nowhere", "--compare", "plain,mine"], "/nowhere"),
        (["bench", "{target}", "--prompts", "{long}", "--compare", "hf"], "prompt 1 (set p): prompt of"),
        (["bench", "{target}", "--prompts", "{prompts}", "--compare", "hf", "--seed", "-1"], "--seed is -1"),
        (["bench", "{target}", "--prompts", "{prompts}", "--compare", "hf", "--max-new-tokens", "600"], "600 new ones exceeds"),
        (["bench", "{target}", "--prompts", "{prompts}", "--head", "{head}", "--trace", "/nowhere/t"], "--trace is /nowhere/t"),
        (["bench", "{target}", "--prompts", "{prompts}", "--compare", "hf", "--report", "out"], "add plain to --compare"),
        (["bench", "{target}", "--prompts", "{prompts}", "--compare", "plain", "--head", "none", "--trace", "t"], "needs a head"),
        (["bench", "{target}", "--prompts", "{prompts}", "--compare", "plain,auto", "--head", "none"], "auto needs a head or multi-token"),
        (["replay", "/nowhere.jsonl"], "cannot read trace /nowhere.jsonl"),
        (["replay", "{prompts}"], "is not a trace"),
        (["generate", "{target}", "\udcff", "--raw"], "is not text in this terminal's encoding"),
        (["generate", "{target}", "hi", "--device", "meta"], "--device is meta"),
        (["generate", "{target}", "hi", "--threads", "4096"], "--threads is 4096"),
        (["train", "{target}", "--out", "{new}", "--taps", ""], "--taps is ''"),
        (["train", "{target}", "--out", "{new}", "--num-prompts", "100000000000"], "100000000000 prompts are too many"),
        (["train", "{target}", "--out", "{new}", "--cache-gb", "inf"], "--cache-gb is inf"),
        (["train", "{target}", "--out", "{new}", "--max-answer-tokens", "600"], "--max-answer-tokens is 600"),
        (["train", "{target}", "--out", "{new}", "--block-size", "65"], "a block of 65 tokens"),
        (["train", "{target}", "--out", "{new}", "--window", "1000000000000"], "--window is 1000000000000"),
    ],
)
def test_a_mistake_gives_one_message_and_exit_2(place, capsys, tmp_path, arguments, says):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    names = {"target": place / "target", "head": place / "head", "new": tmp_path / "new", "prompts": tmp_path / "p.jsonl",
             "long": tmp_path / "long" / "p.jsonl"}  # fmt: skip
    names["long"].parent.mkdir()
    names["long"].write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": "a" * 600}) + "\n")
    code, out, err = run(capsys, *[a.format(**names) if a.startswith("{") else a for a in arguments])
    assert code == 2 and out == ""
    assert says in err and err.count("error:") == 1 and "Traceback" not in err


def test_an_empty_key_in_the_environment_does_not_open_the_server(capsys, monkeypatch):
    monkeypatch.setenv("DSPARK_API_KEY", "")
    told = "error: $DSPARK_API_KEY is set and empty\nhint: give it a key, or `unset DSPARK_API_KEY` for a server that needs none\n"
    assert run(capsys, "serve", "/nowhere") == (2, "", told)
    assert "no folder /nowhere" in run(capsys, "serve", "/nowhere", "--port", 0, "--api-key", "sesame")[2]  # what is given wins
    monkeypatch.delenv("DSPARK_API_KEY")
    assert "no folder /nowhere" in run(capsys, "serve", "/nowhere", "--port", 0)[2]


def test_a_bad_prompts_line_is_named(place, capsys, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "fine"}\n\n{"prompt": \n')
    code, _, err = run(capsys, "generate", place / "target", "--prompts", file)
    assert code == 2 and "line 3" in err


def test_unknown_roles_are_named_by_line_as_the_server_names_them(place, capsys, tmp_path):
    file = tmp_path / "p.jsonl"
    lines = [{"messages": [{"role": role, "content": "a"}, {"role": "user", "content": "b"}]} for role in ("developer", "system", "wizard")]
    file.write_text("\n".join(map(json.dumps, lines)))
    code, _, err = run(capsys, "generate", place / "target", "--prompts", file)
    assert code == 2 and "line 3: message 1 has the role 'wizard'" in err
    file.write_text("\n".join(map(json.dumps, lines[:2])))
    taken_as_system, system = read_prompts(file)
    assert taken_as_system == system
    assert get_args(Message.model_fields["role"].annotation) == ROLES


def test_a_target_without_a_chat_template_is_said_once(place, capsys, tmp_path):
    folder = shutil.copytree(place / "target", tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    code, out, err = run(capsys, "generate", folder, "one", "two", "--max-new-tokens", 3, "--head", "none", "--json")
    assert code == 0 and len(out.splitlines()) == 2
    assert err.count("has no chat template: the prompt goes in as it stands") == 1
    assert "chat template" not in run(capsys, "generate", folder, "one", "--max-new-tokens", 3, "--head", "none", "--raw")[2]


def test_threads_are_those_of_this_machine(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert f"{cores()} CPUs can be used here" in " ".join(capsys.readouterr().out.split())
    assert f"hint: use 1 to {cores()}:" in run(capsys, "generate", "/nowhere", "hi", "--threads", 4096)[2]


@pytest.mark.parametrize(("typed", "near"), [("genrate", "generate"), ("tain", "train"), ("verfy", "verify")])
def test_a_mistyped_verb_is_told_the_nearest(capsys, typed, near):
    told = f"error: there is no verb {typed!r}\nhint: the nearest is {near}; see `dspark --help`\n"
    assert run(capsys, typed, "target") == (2, "", told)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--taps", "3,1"], "--taps is 3,1"),
        (["--taps=-2,1"], "--taps is -2,1"),
        (["--lr", "0"], "--lr is 0.0"),
        (["--muon-lr", "nan"], "--muon-lr is nan"),
        (["--resume"], "no training run to resume"),
        (["--num-prompts", "5"], "leave nothing to train on"),
        (["--start-from", "/nowhere/head"], "no head at /nowhere/head"),
        (["--out", "{file}/head"], "p.jsonl is a file"),
        (["--out", "{file}"], "p.jsonl is a file"),
        (["--out", "{head}"], "nothing was overwritten"),
    ],
)
def test_train_checks_what_it_can_before_it_loads_the_target(place, capsys, tmp_path, options, says):
    (tmp_path / "p.jsonl").write_text("{}")
    named = {"file": tmp_path / "p.jsonl", "head": place / "head"}
    code, _, err = run(capsys, "train", "/nowhere/target", "--out", tmp_path / "new", *[option.format(**named) for option in options])
    assert code == 2 and says in err and "no folder /nowhere/target" not in err and not (tmp_path / "new").exists()


def test_verify_passes_on_a_real_pair_and_bench_ends_with_json(place, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("dspark.profiling.BANDWIDTH_BYTES", 2**22)
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "abc", "set": "one"}\n{"prompt": "hello you", "set": "two"}\n')
    code, out, err = run(capsys, "verify", place / "target", "--head", place / "head", "--prompts", file, "--max-new-tokens", 16)
    for stage in (
        "greedy tokens, drafter dspark",
        "greedy tokens, drafter lookup",
        "law of a round, drafter lookup",
        "roll-back",
        "replay",
    ):
        assert f"{stage}:   0%" in err and f"{stage}: 100%" in err and f"{stage}:" not in out
    assert "| 2/2 [" in err
    assert code == 0 and "FAIL" not in out and out.count("ok  ") >= 4
    assert "ok   law of a round at T=1 (lookup)" in out
    code, out, _ = run(
        capsys, "bench", place / "target", "--head", place / "head", "--prompts", file, "--max-new-tokens", 8, "--compare", "plain,dspark,lookup,hf", "--json"
    )  # fmt: skip
    document = json.loads(out.splitlines()[-1])
    assert code == 0 and {"machine", "arguments", "modes", "prompts"} <= document.keys()
    assert document["modes"]["dspark"]["sets"].keys() == {"one", "two"}
    assert document["modes"]["plain"]["ratio_to_plain"] == {"median": 1.0, "quartiles": None}
    assert "texts identical to plain's: dspark 2 of 2, lookup 2 of 2, hf 2 of 2" in out
    assert document["modes"]["hf"]["identical_to_plain"] == 2 and "identical_to_plain" not in document["modes"]["plain"]
    reading = document["modes"]["plain"]["reading"]
    rate = reading["weight_bytes"] * document["modes"]["plain"]["tokens_per_second"] / reading["bandwidth"]
    assert f", {rate:.0%} of the " in out.splitlines()[-3]
    plain, drafted, lookup, hf = (
        [r["token_ids"] for r in document["prompts"] if r["mode"] == m] for m in ("plain", "dspark", "lookup", "hf")
    )  # fmt: skip
    assert plain == drafted == lookup == hf
    # So little mass that the best token alone is left of each row: sampling says what greedy decoding does.
    code, out, err = run(
        capsys, "bench", place / "target", "--head", place / "head", "--prompts", file, "--max-new-tokens", 8, "--compare", "plain,dspark,lookup,hf", "--json",
        "--temperature", 1, "--top-p", 1e-6,
    )  # fmt: skip
    assert code == 0 and "T=1, top-p 1e-06" in err
    assert [r["token_ids"] for r in json.loads(out.splitlines()[-1])["prompts"]] == [r["token_ids"] for r in document["prompts"]]
    code, _, err = run(capsys, "bench", "/nowhere", "--prompts", file, "--temperature", 1, "--top-p", 1.5)
    assert code == 2 and "--top-p is 1.5" in err
    code, _, err = run(capsys, "bench", "/nowhere", "--prompts", file, "--contexts", "16", "--limit", 1, "--top-p", 0.9)
    assert code == 2 and "--top-p cannot take effect with --contexts" in err


def test_a_drafter_that_drafts_nothing_is_not_called_ok(place, capsys):
    code, out, _ = run(capsys, "verify", place / "target", "--drafter", "none", "--max-new-tokens", 4, "--json")
    checks = json.loads(out)["checks"]
    passed = {check["name"]: check["passed"] for check in checks}
    assert all("never drafts" in check["detail"] for check in checks if check["passed"] is None)
    assert code == 0 and passed["greedy tokens equal plain decoding (none)"] is passed["law of a round at T=1 (none)"] is None
    assert passed["roll-back restores the state"]


def test_bench_checks_its_modes_before_it_loads_anything(capsys, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    for more in (["--compare", "plain,warp"], ["--compare", "dspark", "--head", "none"], ["--compare", "dflash"]):
        code, _, err = run(capsys, "bench", "/nowhere", "--prompts", tmp_path / "p.jsonl", *more)
        assert code == 2 and "mode" in err and "no folder" not in err


def test_heads_that_are_none_are_told_before_the_target_is_loaded(place, capsys, tmp_path):
    """The target is nowhere: what is said first is of the head."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    bench = [
        "bench",
        "/nowhere/target",
        "--prompts",
        tmp_path / "p.jsonl",
        "--compare",
        "plain,mtp,mine",
        "--other",
        f"mine={place / 'head'}",
    ]
    generate, chat, serve = ["generate", "/nowhere/target", "hi"], ["chat", "/nowhere/target"], ["serve", "/nowhere/target", "--port", 0]
    train = ["train", "/nowhere/target", "--out", tmp_path / "new", "--warm-start", "mtp"]
    for command in (generate, chat, serve, bench, train):
        for folder, says in (
            ("/nowhere/head", "no head at /nowhere/head"),
            (place, f"no head in {place}: it holds no config.json"),
            (place / "head", "a head of the kind dspark cannot stand for multi-token-prediction modules"),
        ):
            code, _, err = run(capsys, *command, "--mtp", folder)
            assert code == 2 and says in err and err.count("error:") == 1
    for command in (generate, chat, serve, ["verify", "/nowhere/target"], ["profile", "/nowhere/target"]):
        assert "no head at /nowhere/head" in run(capsys, *command, "--head", "/nowhere/head")[2]
    assert "no head at /nowhere/head" in run(capsys, *bench, "--compare", "plain,b", "--other", "b=/nowhere/head")[2]


def test_a_head_in_the_place_of_the_target_is_told_its_target(place, capsys, tmp_path):
    folder = place / "head"
    hint = f"give its target, {place / 'target'}, and this as the head: `--head {folder}`"
    assert run(capsys, "generate", folder, "hi") == (2, "", f"error: {folder} is a draft head, not a target\nhint: {hint}\n")
    for config, target in (
        ({"speculators_model_type": "dspark", "speculators_config": {"verifier": {"name_or_path": "org/model"}}}, "org/model"),
        ({"model_type": "qwen3", "dflash_config": {}, "dspark": {"target": "mine"}}, "mine"),
        ({"model_type": "qwen3", "target_layer_ids": [1], "block_size": 7}, "TARGET"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        err = run(capsys, "generate", tmp_path, "hi")[2]
        assert (
            err.startswith(f"error: {tmp_path} is a draft head, not a target\nhint: give its target, {target}, and")
            and len(err.splitlines()) == 2
        )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "/nowhere", "hi", "--drafter", "magic"], "unknown drafter 'magic'"),
        (["chat", "/nowhere", "--plan", "length:-1"], "unknown plan 'length:-1'"),
        (["verify", "/nowhere", "--drafter", "dspark", "--drafter", "magic"], "unknown drafter 'magic'"),
        (["verify", "/nowhere", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["calibrate", "/nowhere/head", "--target", "/nowhere", "--temperature", "1", "--temperature", "-1"], "temperature is -1.0"),
        (["profile", "/nowhere", "--costs", "/nowhere/file"], "--costs is /nowhere/file"),
    ],
)
def test_settings_that_no_target_could_take_are_told_before_it_is_loaded(capsys, arguments, says):
    code, _, err = run(capsys, *arguments)
    assert code == 2 and says in err and "no folder" not in err


def test_files_that_cannot_be_written_are_told_before_anything_is_loaded(capsys, tmp_path):
    """A name too long for any file system, a folder that is a file, one without leave; nothing is left behind."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "index.html").mkdir()
    before = sorted(tmp_path.rglob("*"))
    bench = ["bench", "/nowhere", "--prompts", tmp_path / "p.jsonl", "--compare", "plain,dspark", "--head", "/nowhere"]
    for option, name, says in (
        ("--trace", "n" * 300, "File name too long"),
        ("--trace", "none/t", "No such file or directory"),
        ("--trace", "p.jsonl/t", "Not a directory"),
        ("--trace", "there", "a folder"),
        ("--report", "new/" + "n" * 300, "File name too long"),
        ("--report", "p.jsonl", "File exists"),
        ("--report", "p.jsonl/page", "Not a directory"),
        ("--report", "there", "in which index.html is a folder"),
    ):
        code, out, err = run(capsys, *bench, option, tmp_path / name)
        assert code == 2 and out == "" and f"{option} is {tmp_path / name.partition('/')[0]}" in err and says in err and "hint: " in err
    assert sorted(tmp_path.rglob("*")) == before
    code, _, err = run(capsys, *bench, "--trace", tmp_path / "t", "--report", tmp_path / "new" / "page")  # can be, so the target is next
    assert code == 2 and "--trace" not in err and "--report" not in err and sorted(tmp_path.rglob("*")) == before


def test_a_file_that_is_there_stays_as_it_is_until_it_is_written(tmp_path):
    (tmp_path / "there").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "away")
    os.mkfifo(tmp_path / "pipe")
    for name in ("there", "link", "pipe"):
        check_file("--trace", tmp_path / name)
    assert (tmp_path / "there").read_text() == "old" and not (tmp_path / "away").exists()
    assert {file.name for file in tmp_path.iterdir()} == {"there", "link", "pipe"}


def test_a_recorded_bench_run_is_reported_and_replayed(place, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("dspark.profiling.BANDWIDTH_BYTES", 2**22)
    monkeypatch.setattr("dspark.profiling.PLANNING_SECONDS", 0.1)
    monkeypatch.setattr("dspark.measure.replay.PLACE_TOKENS", 1)
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path / "cache"))
    file, trace = tmp_path / "p.jsonl", tmp_path / "t.jsonl"
    file.write_text('{"prompt": "abc", "set": "one"}\n{"prompt": "hello you", "set": "two"}\n')
    code, out, _ = run(
        capsys, "bench", place / "target", "--head", place / "head", "--prompts", file, "--max-new-tokens", 12, "--compare", "plain,lookup",
        "--trace", trace, "--report", tmp_path / "page", "--json"
    )  # fmt: skip
    document = json.loads(out.splitlines()[-1])
    assert code == 0 and document["modes"].keys() == {"plain", "lookup", "dspark@fixed"}
    report = json.loads((tmp_path / "page" / "report.json").read_text())
    assert report["modes"].keys() == document["modes"].keys() and "<svg" in (tmp_path / "page" / "index.html").read_text()
    code, out, err = run(capsys, "replay", trace, "--requests", "1,3", "--plans", "plain,fixed,auto", "--json")
    replays = json.loads(out.splitlines()[-1])["replays"]
    assert code == 0 and [(f["requests"], f["plan"]) for f in replays[:4]] == [(1, "plain"), (1, "fixed"), (1, "auto"), (3, "plain")]
    assert replays[1]["tau"] == pytest.approx(document["modes"]["dspark@fixed"]["tau"], abs=1e-3) and "not measured" in err
    assert "example made of a formula" in run(capsys, "replay", trace, "--costs", "example", "--requests", "2")[2]
    for arguments, says in [
        (["--requests", "0"], "--requests is '0'"),
        (["--plans", "auto,magic"], "unknown plan 'magic'"),
        (["--plans", ","], "--plans names no plan"),
        (["--costs", tmp_path / "none.json"], "cannot read"),
    ]:
        code, out, err = run(capsys, "replay", trace, *arguments)
        assert code == 2 and out == "" and says in err


def test_a_report_that_fails_leaves_the_figures_of_the_run(place, capsys, tmp_path, monkeypatch):
    def fails(*_):
        raise SettingError("cannot write the report", "name another folder")

    monkeypatch.setattr("dspark.profiling.BANDWIDTH_BYTES", 2**22)
    monkeypatch.setattr("dspark.profiling.PLANNING_SECONDS", 0.1)
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("dspark.measure.report.write_report", fails)
    (tmp_path / "p.jsonl").write_text('{"prompt": "abc"}\n')
    code, out, err = run(
        capsys, "bench", place / "target", "--head", place / "head", "--prompts", tmp_path / "p.jsonl", "--max-new-tokens", 4, "--compare", "plain",
        "--trace", tmp_path / "t", "--report", tmp_path / "page", "--json",
    )  # fmt: skip
    assert code == 2 and err.endswith("error: cannot write the report\nhint: name another folder\n") and (tmp_path / "t").exists()
    assert "tokens/s" in out.splitlines()[0] and json.loads(out.splitlines()[-1])["modes"].keys() == {"plain", "dspark@fixed"}


def test_verify_fails_on_a_target_that_does_not_roll_back(place, capsys, monkeypatch):
    monkeypatch.setattr("dspark.target.rollback.Rollback.crop", lambda *_: None)
    code, out, _ = run(capsys, "verify", place / "target", "--head", place / "head", "--max-new-tokens", 16)
    assert code == 1 and "FAIL roll-back" in out


def test_rounding_that_depends_on_the_rows_of_a_pass_is_no_broken_roll_back(place):
    target, longest, exact = load_target(place / "target"), {}, Target.score

    def score(state, tokens, num_logits=None):
        scored = exact(target, state, tokens, num_logits)
        if num_logits is None:  # no prompt
            longest[id(state)] = max(longest.get(id(state), 0), len(tokens))
        return replace(scored, logits_TV=scored.logits_TV + 0.001 * longest.get(id(state), 0))

    target.score, ids = score, target.prompt_ids("hello")
    kept = []  # states stay alive, so that no two have one id
    start, target.start = target.start, lambda: kept.append(start()) or kept[-1]
    assert roll_back(target, ids).passed
    target.rollback = lambda state, num_rejected: None
    assert not roll_back(target, ids).passed


def test_profile_tells_rows_draft_and_bandwidth(place, capsys, monkeypatch):
    monkeypatch.setattr("dspark.profiling.BANDWIDTH_BYTES", 2**22)
    code, out, _ = run(capsys, "profile", place / "target", "--head", place / "head", "--context", 40, "--json")
    found = json.loads(out)
    assert code == 0 and list(found["rows"]) == ["1", "2", "3", "4", "6", "8", "12", "16"]
    assert found["block_size"] == 4 and found["draft"] > 0 and found["bandwidth"] > 1e8
    assert found["break_even"] == pytest.approx((found["rows"]["6"] + found["draft"]) / found["rows"]["1"])
    code, out, _ = run(capsys, "profile", place / "target", "--head", "none", "--context", 40)
    assert code == 0 and "draft of" not in out and "GB/s" in out
    assert run(capsys, "profile", place / "target", "--context", 600)[0] == 2
    monkeypatch.setattr("dspark.cli.profile.DISTURBED", 0.0)
    assert "measure again" in run(capsys, "profile", place / "target", "--head", "none", "--context", 40)[2]


def test_costs_that_cannot_be_written_say_so(place, capsys, monkeypatch):
    monkeypatch.setattr("dspark.profiling.BANDWIDTH_BYTES", 2**22)
    code, _, err = run(capsys, "profile", place / "target", "--head", place / "head", "--context", 40, "--costs", "/dev/full")
    assert code == 2 and "cannot write costs /dev/full" in err and "Traceback" not in err


def test_train_resumes_by_itself_names_what_differs_and_says_when_it_is_finished(place, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("dspark.profiling.BANDWIDTH_BYTES", 2**22)
    begin = ["train", place / "target", "--out", tmp_path / "new", "--num-prompts", 6, "--held-out", 2, "--max-answer-tokens", 12]
    begin += ["--steps", 2, "--sequences", 2, "--anchors", 4, "--draft-vocab", 0, "--dtype", "float32", "--layers", 1]
    assert run(capsys, *begin, "--only-answers")[0] == 0
    resume = ["train", place / "target", "--out", tmp_path / "new", "--resume"]
    code, out, err = run(capsys, *resume, "--steps", 3)
    assert code == 2 and "--steps is 3" in err and "started with 2" in err
    code, out, err = run(capsys, *resume, "--steps", 2, "--block-size", 5)
    assert code == 0 and "head saved" in out and "2 steps" in err
    assert "progress" in err and "MB) may be deleted" in err and f"--answers {tmp_path}/new/progress/answers.jsonl" in err
    code, out, err = run(capsys, *resume)
    assert code == 0 and "head saved" in out and "is finished" in err and "may be deleted" not in err
    command = json.loads((tmp_path / "new" / "provenance.json").read_text())["command"]
    assert command == shlex.join(["dspark", "train", str(place / "target"), "--out", str(tmp_path / "new"), "--dtype=float32",
        "--num-prompts=6", "--max-answer-tokens=12", "--held-out=2", "--layers=1", "--block-size=5", "--draft-vocab=0", "--steps=2",
        "--sequences=2", "--anchors=4"])  # fmt: skip


@pytest.mark.parametrize(
    ("given", "meant"),
    [("sglng", "specforge, for SGLang"), ("sglang", "specforge, for SGLang"), ("VLLM", "speculators, for vLLM"), ("llama.cpp", "gguf, for llama.cpp"),
     ("llamacpp", "gguf, for llama.cpp"), ("GGUF", "gguf, for llama.cpp"), ("speculator", "speculators, for vLLM"), ("DeepSpec", "deepspec")],
)  # fmt: skip
def test_who_names_an_engine_or_mistypes_a_format_is_told_the_format(capsys, given, meant):
    every = "speculators (vLLM), specforge (SGLang), gguf (llama.cpp), deepspec, dspark"
    for option, formats in (("--to", every), ("--from", f"{every}, eagle3")):
        code, out, err = run(capsys, "convert", "/nowhere", "out", option, given)
        assert code == 2 and out == "" and err.startswith(f"error: {option} is {given!r}, which is no format\nhint: use {option} {meant}; ")
        assert err.endswith(f"; all formats: {formats}\n")
    assert (
        run(capsys, "convert", "/nowhere", "out", "--to", "onnx")[2]
        == f"error: --to is 'onnx', which is no format\nhint: all formats: {every}\n"
    )


def test_a_head_whose_run_was_stopped_says_so_and_how_to_go_on(place, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("dspark.profiling.BANDWIDTH_BYTES", 2**22)
    out = tmp_path / "my head"
    begin = ["train", place / "target", "--out", out, "--num-prompts", 6, "--held-out", 2, "--max-answer-tokens", 12]
    begin += ["--steps", 2, "--sequences", 2, "--anchors", 4, "--draft-vocab", 0, "--dtype", "float32", "--layers", 1]
    generate = ["generate", place / "target", "hi", "--head", out, "--max-new-tokens", 3]
    go_on = f"`dspark train {place / 'target'} --out '{out}' --resume`"
    note = f"warning: the run that makes {out} was stopped before it measured and calibrated this head; go on with {go_on}"

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dspark.train.run.run_steps", stopped)
        assert run(capsys, *begin)[0] == 130
    code, _, err = run(capsys, *generate)
    assert code == 2 and f"no head in {out}: it holds no config.json\nhint: its run goes on with {go_on}\n" in err
    with monkeypatch.context() as patch:
        patch.setattr("dspark.train.run.held_out_rounds", stopped)
        assert run(capsys, *begin, "--resume")[0] == 130
    code, _, err = run(capsys, *generate)
    assert code == 0 and err.splitlines().count(note) == 1
    code, _, err = run(capsys, "inspect", out)
    assert code == 0 and note in err
    code, _, err = run(capsys, *shlex.split(go_on.strip("`"))[1:])
    assert code == 0 and "warning: the run" not in err
    code, _, err = run(capsys, *generate)
    assert code == 0 and "warning: the run" not in err and "warning" not in run(capsys, "inspect", out)[2]


@pytest.mark.parametrize(("tau", "warns"), [(1.0, True), (99.0, False)])
def test_a_head_that_does_not_pay_here_yet_is_said(place, tau, warns):
    text = advice(str(place / "head"), {"break_even": 1.5, "held_out_rounds": {"tau_t0": tau}})
    assert ("does not pay on this machine yet" in text) is warns


def test_inspect_prints_the_card(place, capsys):
    code, out, _ = run(capsys, "inspect", place / "head")
    assert code == 0 and out.startswith("# a card")
    card = place / "head" / "README.md"
    card.write_text("---\nlibrary_name: dspark\n---\n# a card\n---\nmore\n")
    assert run(capsys, "inspect", place / "head")[1].startswith("# a card\n---\nmore")
    card.write_text("# a card\n")
    code, out, _ = run(capsys, "inspect", place / "head", "--json")
    assert json.loads(out)["config"]["block_size"] == 4


def test_the_command_on_a_card_works_as_inspect_prints_it(place, capsys, tmp_path):
    folder = shutil.copytree(place / "head", tmp_path / "my head")
    (folder / "README.md").write_text(f'    dspark generate {place / "target"} "..." --head DIR\n')
    line = run(capsys, "inspect", folder)[1].splitlines()[0]
    assert line == f"    dspark generate {place / 'target'} \"...\" --head '{folder}'"
    assert run(capsys, *shlex.split(line)[1:], "--max-new-tokens", 3)[0] == 0
    assert "--head" not in run(capsys, "inspect", "smollm2-135m")[1].partition("Trained on")[0]  # the target's own: found without


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "half \\ud83d of a pair"}', "surrogate"),
        ('{"prompt": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ],
    ids=["surrogate", "nested"],
)
def test_lines_that_no_reader_takes_are_named(place, capsys, tmp_path, line, says):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "fine \\ud83d\\ude00"}\n' + line + "\n")
    code, _, err = run(capsys, "generate", place / "target", "--prompts", file)
    assert code == 2 and "line 2" in err and says in err


def test_a_damaged_provenance_record_is_said(place, capsys, tmp_path):
    shutil.copytree(place / "head", tmp_path / "head")
    (tmp_path / "head" / "provenance.json").write_text("{")
    code, _, err = run(capsys, "inspect", tmp_path / "head", "--json")
    assert code == 2 and "provenance.json: not JSON" in err
    assert run(capsys, "inspect", tmp_path / "head")[0] == 0
    for name, more in (("README.md", []), ("provenance.json", ["--json"])):
        file = tmp_path / "head" / name
        file.write_bytes(b"\xff")
        assert name in run(capsys, "inspect", tmp_path / "head", *more)[2]
        file.unlink()
        file.mkdir()
        assert name in run(capsys, "inspect", tmp_path / "head", *more)[2]


def test_inspect_sees_the_head_that_a_killed_save_was_replacing(place, capsys, tmp_path):
    folder = shutil.copytree(place / "head", tmp_path / "head")
    (folder / "config.json").rename(folder / "config.json.old")
    (folder / "config.json.partial").write_text("{}")
    assert run(capsys, "inspect", folder)[1].startswith("# a card")


def test_a_full_disk_is_said_with_the_way_out_of_its_verb(place, capsys, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dspark.target.load.load_target", full)
    assert "--resume" in run(capsys, "train", place / "target", "--out", tmp_path / "new")[2]
    assert "--resume" not in run(capsys, "generate", place / "target", "hi")[2]
    monkeypatch.setattr("dspark.target.load.load_target", lambda *args, **kwargs: os.truncate(tmp_path / "file", 2**62))
    (tmp_path / "file").write_text("")
    assert "error: a file would be larger than is allowed here (ulimit -f) (" in run(capsys, "generate", place / "target", "hi")[2]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("nothing 2>&-", 2, ""),  # what is for stderr does not go to stdout
        ("--help >&-", 0, ""),
        ("--help >/dev/full", 2, "error: the disk is full\nhint: free some space\n"),
        ("train --help | true", 1, ""),
    ],
)
def test_streams_may_be_closed_full_or_left(line, code, says):
    command = f"set -o pipefail; {shlex.quote(sys.executable)} -m dspark {line}"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # what is left is written at the end
    done = subprocess.run(["bash", "-c", command], check=False, capture_output=True, text=True, timeout=60, env=buffered)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", says)


def test_a_terminal_that_lacks_a_character_gets_the_rest(place):
    command = [sys.executable, "-m", "dspark.cli.main", "generate", place / "target", "hi", "--head", "none", "--max-new-tokens", "40"]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, check=False, capture_output=True, timeout=120, env=ascii_only)
    assert done.returncode == 0 and b"40 tokens" in done.stderr
    done = subprocess.run([*command, "--json"], check=False, capture_output=True, timeout=120, env=ascii_only)
    assert "\ufffd" in json.loads(done.stdout)["text"]  # bytes that are no character


def test_a_template_may_raise_anything(place):
    target = load_target(place / "target")
    target.tokenizer.chat_template = "{{ 1 / 0 }}"
    with pytest.raises(PromptError, match="division by zero"):
        target.prompt_ids("hi")


def test_a_compiler_that_does_not_run_is_said(monkeypatch, tmp_path):
    (tmp_path / "cc").write_bytes(b"\x7fELF no program")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "cc"))
    with pytest.raises(RuntimeUnavailable, match="cannot build the native runtime"):
        built(print, tmp_path)


def test_chat_says_what_it_cannot_read(place):
    command = [sys.executable, "-m", "dspark.cli.main", "chat", place / "target", "--head", "none", "--max-new-tokens", "5"]
    done = subprocess.run(
        command, check=False, input=b"caf\xe9\n", capture_output=True, timeout=120, env={**os.environ, "PYTHONIOENCODING": "utf-8"}
    )
    assert done.returncode == 2 and b"is not utf-8 text" in done.stderr and b"Traceback" not in done.stderr


def test_chat_tells_bytes_that_are_no_text_and_goes_on(place, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\udcff\nhi\n"))
    code, _, err = run(capsys, "chat", place / "target", "--head", "none", "--max-new-tokens", 3)
    assert code == 0 and r"the message '\udcff' is not text" in err and "[3 tokens" in err
    code, _, err = run(capsys, "chat", "/nowhere", "--system", "\udcff")
    assert code == 2 and r"--system '\udcff' is not text" in err


def test_chat_without_an_input_says_so(place):
    done = subprocess.run(
        f"{sys.executable} -m dspark.cli.main chat {place / 'target'} <&-", shell=True, check=False, capture_output=True, timeout=120
    )
    assert done.returncode == 2 and b"the input is closed" in done.stderr


def test_chat_answers_each_line_and_ends_with_the_input(place):
    command = [sys.executable, "-m", "dspark.cli.main", "chat", place / "target", "--head", "none", "--max-new-tokens", "5"]
    done = subprocess.run(command, check=False, input="hello\nmore\n", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr.count("tokens/s, length]") == 2


def test_ctrl_c_stops_an_answer_and_not_the_chat(place, capsys, monkeypatch):
    answer, given = dspark.generation.generate, []

    def stopped_at_first(target, head, ids, on_text, **settings):
        given.append(target.tokenizer.decode(ids))
        if len(given) == 1:
            on_text("half an ans")
            raise KeyboardInterrupt
        return answer(target, head, ids, on_text=on_text, **settings)

    monkeypatch.setattr("dspark.generation.generate", stopped_at_first)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nmore\n"))
    code, out, err = run(capsys, "chat", place / "target", "--head", place / "head", "--max-new-tokens", 5)
    assert code == 0 and out.startswith("half an ans\n") and "[stopped]" in err and err.count("tokens/s, ") == 1
    assert "half an ans" in given[1]  # what was said stays in the conversation


def test_help_is_quick_and_imports_no_torch():
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "dspark.cli.main", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "torch" not in done.stderr
    assert time.perf_counter() - begin < 5  # half a second on an idle machine


def test_every_verb_has_a_help_page():
    for verb in VERBS:
        with pytest.raises(SystemExit) as ended:
            main([verb, "--help"])
        assert ended.value.code == 0


def test_prompts_may_stand_behind_options(place, capsys):
    code, out, _ = run(capsys, "generate", place / "target", "one", "--head", "none", "--max-new-tokens", 3, "two", "--json", "--", "-3")
    assert code == 0 and [json.loads(line)["index"] for line in out.splitlines()] == [0, 1, 2]


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_option_is_told_the_nearest_whatever_else_is_missing(capsys, verb):
    told = f"error: there is no option --hepl\nhint: the nearest is --help; see `dspark {verb} --help`\n"
    assert run(capsys, verb, "--hepl=5") == (2, "", told)
    told = f"error: there is no option --zzz\nhint: see `dspark {verb} --help`\n"
    assert run(capsys, verb, "--zzz", "hi") == (2, "", told)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bench", "target"], "the following arguments are required: --prompts"),
        (["bench", "target", "--promts", "p.jsonl"], "there is no option --promts\nhint: the nearest is --prompts;"),
        (["generate", "target", "hi", "--max-tokens", "5"], "there is no option --max-tokens\nhint: the nearest is --max-new-tokens;"),
        (["generate", "target", "hi", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["generate", "target", "hi", "--stop"], "argument --stop: expected one argument"),
        (["generate", "target", "hi", "--stop", "---"], "--stop needs a value, and --- reads as an option\nhint: if it is the value, write --stop=---"),
        (["generate", "target", "hi", "--stop", "-3+4"], "--stop needs a value, and -3+4 reads as an option\nhint: if it is the value, write --stop=-3+4"),
        (["generate", "target", "hi", "--stop", "-h x"], "--stop needs a value, and -h x reads as an option\nhint: if it is the value, write '--stop=-h x'"),
        (["generate", "target", "hi", "--stop", "--"], "--stop needs a value, and -- ends the options\nhint: if it is the value, write --stop=--"),
        (["generate", "target", "-3+4=?"], "-3+4=? reads as an option, and there is none\nhint: if it is a text, write it behind --: -- '-3+4=?'"),
        (["generate", "target", "-hello"], "there is no option -hello"),
        (["convert", "head", "new", "--taps", "-1,2"], "--taps needs a value, and -1,2 reads as an option\nhint: if it is the value, write --taps=-1,2"),
        (["generate", "target", "hi", "--taps", "1,2"], "there is no option --taps\nhint: train and convert have it;"),
        (["replay", "trace", "--compare", "plain"], "there is no option --compare\nhint: bench has it;"),
        (["serve", "--prompt", "hi"], "there is no option --prompt\nhint: see"),
        (["generate", "target", "-x"], "there is no option -x"),
        (["profile", "target", "more"], "'more' is one argument too many"),
        (["train", "target", "--out", "new", "--optimizer", "sgd"], "argument --optimizer: invalid choice: 'sgd'"),
        (["calibrate", "head", "--target", "target", "--bias", "--margin"], "argument --margin: not allowed with argument --bias"),
        (["--json", "generate"], "there is no option --json\nhint: see `dspark --help`"),
        (["nothing"], "there is no verb 'nothing'\nhint: see `dspark --help`"),
        (["--", "generate"], "the following arguments are required: VERB"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_read_give_one_message_and_no_usage(capsys, arguments, says):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and err.startswith(f"error: {says}")
    assert [line.partition(":")[0] for line in err.splitlines()] == ["error", "hint"]


def test_texts_and_values_may_begin_with_a_dash(capsys):
    code, _, err = run(capsys, "generate", "/nowhere", "--stop=--end", "--repetition-penalty", "-1", "-5 degrees", "--", "--hepl", "-x")
    assert code == 2 and "--repetition-penalty is -1.0" in err
    assert parse(["generate", "target", "hi", "--stop=--"]).stop == ["--"]


def test_a_command_that_no_longer_exists_is_told_at_resuming(place, capsys, tmp_path):
    label = tmp_path / "new" / "progress" / "settings.json"
    label.parent.mkdir(parents=True)
    for command, says in (("dspark train t --out x --gone 3", "there is no option --gone"), ("dspark train 't", "No closing quotation")):
        label.write_text(json.dumps({"command": command}))
        code, _, err = run(capsys, "train", place / "target", "--out", tmp_path / "new", "--resume")
        assert code == 2 and f"the command in {label} cannot be read: {says}" in err and "hint: " in err


def test_no_verb_shows_the_verbs(capsys):
    with pytest.raises(SystemExit) as ended:
        main([])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and all(verb in out for verb in VERBS)


def test_sampling_settings_are_checked_in_the_options_names_before_anything_is_loaded(capsys):
    for verb in (["generate", "/nowhere", "hi"], ["chat", "/nowhere"]):
        for setting in ("--temperature", "--top-k", "--top-p", "--min-p", "--repetition-penalty", "--seed", "--max-new-tokens"):
            code, out, err = run(capsys, *verb, setting, "-1")
            assert code == 2 and out == "" and err.startswith(f"error: {setting} is -1")


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "/nowhere", "hi", "--temperature", "-1"],
        ["chat", "/nowhere", "--max-new-tokens", "0"],
        ["bench", "/nowhere", "--prompts", "/nowhere", "--seed", "-1"],
        ["calibrate", "/nowhere", "--target", "/nowhere", "--top-p", "2"],
        ["verify", "/nowhere", "--max-new-tokens", "0"],
    ],
    ids=lambda command: command[0],
)
def test_a_setting_without_meaning_is_said_before_torch_is_imported(command):
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "dspark", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and f"error: {command[-2]} is {command[-1]}" in done.stderr
    assert "| torch" not in done.stderr and "| transformers" not in done.stderr


def test_the_collector_waits_for_a_start_only():
    class Failed(Exception):
        pass

    try:
        with starting():
            assert not gc.isenabled()
        assert gc.isenabled() and gc.get_freeze_count()
        with pytest.raises(Failed), starting():
            raise Failed
        assert gc.isenabled()
    finally:
        gc.unfreeze()
