"""`dspark adapt`: another target of the same shape is taken and no other one; what is written was better in real rounds."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark.config import TrainConfig
from dspark.errors import HeadError, SettingError
from dspark.head.folder import load_head, save_head
from dspark.target.load import load_target
from dspark.target.target import Target
from dspark.train import adapt as adapting
from dspark.train import trainer
from dspark.train.adapt import adapt, difference, gain_report
from dspark.train.lowrank import add_low_rank, merge_low_rank
from dspark.train.run import renewed_vocabulary
from dspark.train.sample import sample_batch
from dspark.train.warmstart import with_vocabulary
from saved import run, save_tiny_target
from tiny import tiny_head, tiny_model

CONFIG = TrainConfig(
    steps=40, sequences_per_step=4, anchors_per_sequence=8, held_out=4, num_prompts=0, max_answer_tokens=12, teacher_tokens=8,
    learning_rate=3e-2, teacher_ce=True, ce_weight=1.0, l1_weight=0.5,
)  # fmt: skip


def moved(folder: Path, to: Path) -> Path:
    """A copy of the target whose every weight moved. It has eight tokens left that follow each other by rule, nearly: a tiny
    head can learn that."""
    shutil.copytree(folder, to)
    target = load_target(to, runtime="eager")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in target.model.named_parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            if "o_proj" in name or "down_proj" in name:
                parameter.mul_(0.05)
        rows = target.model.get_output_embeddings().weight
        rows.mul_(0.05)
        rows[40:48].mul_(100)
    target.model.save_pretrained(to)
    return to


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """`old`, a target with a head, and `new`, the same fine-tuned; answers of the new one."""
    root = tmp_path_factory.mktemp("adapt")
    save_tiny_target(root / "old")
    old = load_target(root / "old")
    save_head(tiny_head(old, block_size=3, layers=1), old, root / "head", list(range(1, 30)), {"target": "old"}, "# a card\n")
    new = load_target(moved(root / "old", root / "new"))
    prompts = [[i % 250 + 1, (7 * i) % 250 + 1, 3] for i in range(28)]
    answers = sample_batch(new, prompts, [0.0] * len(prompts), 24, seed=0, stop_ids=frozenset())
    records = [{"prompt_ids": p, "answer_ids": a, "temperature": 0.0, "kind": "x"} for p, a in zip(prompts, answers, strict=True)]
    (root / "answers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return root


@pytest.fixture
def new(place) -> Target:
    return load_target(place / "new")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr("dspark.train.run.CALIBRATION_TOKENS", 2)  # too few rounds to calibrate on, which costs no time
    monkeypatch.setattr("dspark.train.run.ROUNDS_TOKENS", 10)
    monkeypatch.setattr(adapting, "PROFILE_SECONDS", 0.0)


def test_a_target_of_other_weights_is_taken_only_to_adapt_to(place, new):
    with pytest.raises(HeadError, match=r"another target|do not come out again"):
        load_head(place / "head", new)
    head = load_head(place / "head", new, same_target=False)
    assert head.self_test is None
    assert torch.equal(head.output_rows.float(), new.output_rows(head.draft_ids))  # the new target's own rows
    assert torch.equal(head.mask_embedding.float(), new.embed(torch.tensor(head.config.mask_token_id)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": 64}, "hidden size 32, target .* has 64"),
        ({"num_hidden_layers": 3}, "layers 4, target .* has 3"),
        ({"vocab_size": 300}, "vocabulary of 259, target .* has 300"),
    ],
)
def test_a_target_of_another_shape_is_refused(place, tmp_path, changes, says):
    other = load_target(save_tiny_target(tmp_path / "other", **changes))
    with pytest.raises(HeadError, match=says):
        adapt(other, tmp_path / "out", CONFIG, place / "head", answers=[place / "answers.jsonl"])
    assert not (tmp_path / "out").exists()


def test_a_target_with_another_tokenizer_is_refused(place, new, tmp_path):
    new.tokenizer.add_tokens(["one more"])
    with pytest.raises(HeadError, match="another tokenizer"):
        adapt(new, tmp_path / "out", CONFIG, place / "head", answers=[place / "answers.jsonl"])


def test_damaged_golden_vectors_are_refused_still(place, new, tmp_path):
    folder = shutil.copytree(place / "head", tmp_path / "head")
    (folder / "golden.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(HeadError, match=r"golden\.safetensors"):
        load_head(folder, new, same_target=False)


def test_a_head_with_a_weight_of_another_head_is_refused_still(place, new, tmp_path):
    folder = shutil.copytree(place / "head", tmp_path / "head")
    weights = load_file(folder / "model.safetensors")
    weights["fc.weight"] = weights["fc.weight"].flip(0).contiguous()
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(HeadError, match=r"first in the context"):
        load_head(folder, new, same_target=False)


@pytest.mark.parametrize("low_rank", [0, 4])
def test_an_adapted_head_is_better_in_real_rounds_and_tells_where_it_came_from(place, new, tmp_path, low_rank, monkeypatch):
    monkeypatch.setattr("dspark.train.run.ROUNDS_TOKENS", 30)
    out = tmp_path / "out"
    report = adapt(new, out, CONFIG, place / "head", low_rank, answers=[place / "answers.jsonl"], command="dspark adapt ...")
    found = report["adapted"]
    assert found["written"] and found["after"]["tau_t0"] > found["before"]["tau_t0"] and found["gain"] > found["standard_error"] > 0, found
    assert found["from"] == "head" and len(found["from_sha256"]) == 64 and found["from_target"] == "old" and found["low_rank"] == low_rank
    assert found["features_agree"] < 1 and found["break_even"] > 0
    head = load_head(out, load_target(place / "new"))  # golden vectors are the new pair's
    with pytest.raises(HeadError):
        load_head(out, load_target(place / "old"))
    assert load_file(out / "model.safetensors").keys() == load_file(place / "head" / "model.safetensors").keys()
    assert json.loads((out / "provenance.json").read_text())["adapted"] == found
    card, text = (out / "README.md").read_text(), gain_report(report)
    assert "Adapted from the head head" in card and ("updates of rank 4, merged" in card) is bool(low_rank)
    assert (
        f"{found['before']['tau_t0']:.2f}" in text and f"{found['after']['tau_t0']:.2f}" in text and "plain tokens on this machine" in text
    )
    again = adapt(load_target(place / "new"), out, CONFIG, place / "head", low_rank, answers=[place / "answers.jsonl"], resume=True)
    assert again["finished_before"] and again["adapted"] == found
    assert head.config.block_size == 3


def test_a_head_that_is_not_better_is_not_written(place, capsys, tmp_path):
    arguments = ["adapt", place / "head", "--target", place / "new", "--out", tmp_path / "out"]
    begin = [
        *arguments,
        "--num-prompts",
        8,
        "--held-out",
        2,
        "--max-answer-tokens",
        16,
        "--dtype",
        "float32",
        "--steps",
        1,
        "--lr",
        "1e-12",
    ]
    code, out, err = run(capsys, *begin, "--sequences", 2, "--anchors", 4)
    assert code == 3 and "not written" in err and "progress is kept" in err and "to invent instructions" in err
    assert f"--out OTHER --answers {tmp_path / 'out'}/progress/answers.jsonl" in err and (tmp_path / "out/progress/answers.jsonl").exists()
    assert "tau at T=0" in out and "head saved" not in out
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["progress"]
    code, out, err = run(capsys, *arguments, "--resume", "--json")
    assert code == 3 and not json.loads(out)["adapted"]["written"]
    assert json.loads(out)["command"].startswith(f"dspark adapt {place / 'head'} --target {place / 'new'} --out {tmp_path / 'out'} ")


def test_a_killed_run_goes_on_and_measures_the_old_head_once(place, new, tmp_path, monkeypatch):
    given = {"answers": [place / "answers.jsonl"], "low_rank": 4}
    config = TrainConfig(**{**vars(CONFIG), "checkpoint_seconds": 0.0, "steps": 5})
    whole = adapt(new, tmp_path / "whole", config, place / "head", **given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("dspark.train.trainer.step_batch", interrupted(trainer.step_batch, after=3))
        adapt(load_target(place / "new"), tmp_path / "out", config, place / "head", **given)
    monkeypatch.setattr(adapting, "count_rounds", after_only(adapting.count_rounds))
    resumed = adapt(load_target(place / "new"), tmp_path / "out", config, place / "head", resume=True, **given)
    same = ("before", "after", "gain", "written")
    assert {name: resumed["adapted"][name] for name in same} == {name: whole["adapted"][name] for name in same}
    one, other = (load_file(tmp_path / name / "progress" / "candidate" / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(SettingError, match="low_rank"):
        adapt(load_target(place / "new"), tmp_path / "out", config, place / "head", answers=given["answers"], resume=True)
    (tmp_path / "out" / "progress" / "rounds-before.json").write_text('{"t0": 1}')
    (tmp_path / "out" / "provenance.json").unlink(missing_ok=True)
    with pytest.raises(HeadError, match=r"rounds-before\.json"):
        adapt(load_target(place / "new"), tmp_path / "out", config, place / "head", resume=True, **given)


def interrupted(real, after: int):
    def step_batch(store, config, step, block_size, share):
        if step == after:
            raise KeyboardInterrupt
        return real(store, config, step, block_size, share)

    return step_batch


def after_only(real):
    def count(target, head, records, bar, note=""):
        assert "as it is" not in note
        return real(target, head, records, bar, note)

    return count


def test_low_rank_updates_start_at_nothing_and_merge_into_plain_weights():
    model = tiny_model("llama").model
    ids = torch.tensor([[1, 2, 3]])
    before, names = model(ids).last_hidden_state, set(model.state_dict())
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.requires_grad_(True)
    assert add_low_rank(model, 2, seed=0) == 29  # 7 matrices of 4 layers, and the embedding
    torch.testing.assert_close(model(ids).last_hidden_state, before, rtol=0, atol=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) < sum(t.numel() for t in original.values()) / 4
    optimizer = torch.optim.SGD(trained, lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids).last_hidden_state[..., 0].sum().backward()
        optimizer.step()
    after = model(ids).last_hidden_state
    assert not torch.allclose(after, before)
    merge_low_rank(model)
    torch.testing.assert_close(model(ids).last_hidden_state, after, rtol=1e-5, atol=1e-5)
    assert set(model.state_dict()) == names
    moved_by = model.state_dict()["layers.1.mlp.up_proj.weight"] - original["layers.1.mlp.up_proj.weight"]
    assert torch.linalg.matrix_rank(moved_by, rtol=1e-3) in (1, 2)


def test_a_rank_that_no_matrix_has_is_refused(place, new, tmp_path):
    with pytest.raises(SettingError, match="no matrix of this head is that large"):
        adapt(new, tmp_path / "out", CONFIG, place / "head", 1000, answers=[place / "answers.jsonl"])
    assert not (tmp_path / "out").exists()


def test_a_gain_is_judged_by_its_standard_error():
    before = {"t0": [(10, 10), (10, 5), (12, 6)], "t1": [(10, 10), (10, 8), (9, 9)]}
    assert difference(before, before) == (0.0, 0.0)
    gain, error = difference(before, {"t0": [(10, 5), (10, 5), (12, 6)], "t1": [(10, 10), (10, 8), (9, 9)]})
    assert gain == pytest.approx(61 / 43 - 61 / 48) and 0 < gain < 2 * error  # one prompt alone got better
    gain, error = difference(before, {"t0": [(10, 5), (10, 3), (12, 3)], "t1": [(10, 5), (10, 4), (9, 5)]})
    assert gain > 3 * error


def test_what_the_command_line_refuses(place, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("dspark.cli.adapt.open_target", lambda options: pytest.fail("mistakes are found before the target is loaded"))
    for more, says in (
        (["--low-rank", "-1"], "--low-rank is -1"),
        (["--steps", "0"], "--steps is 0"),
        (["--lr", "-1"], "--lr is -1.0"),
        (["--num-prompts", "3"], "3 prompts leave nothing to train on"),
        (["--resume"], "no training run to resume"),
        (["--answers", place / "answers.jsonl", "--num-prompts", "3"], "--num-prompts cannot take effect"),
        (["--api-key-env", "KEY"], "--api-key-env cannot take effect without --answers-from"),
    ):
        code, _, err = run(capsys, "adapt", place / "head", "--target", place / "new", "--out", tmp_path / "out", *more)
        assert code == 2 and says in err, err
    code, _, err = run(capsys, "adapt", "/nowhere", "--target", place / "new", "--out", tmp_path / "out")
    assert code == 2 and "no head at /nowhere" in err


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn", "dflash"])
def test_other_draft_tokens_begin_without_a_bias_and_the_old_ones_are_said_as_before(kind):
    target = Target(tiny_model("llama"))
    head = tiny_head(target, *(("vanilla", 0) if kind == "dflash" else (kind,)), draft_vocab=32)
    counts = Counter({1: 5, 3: 2, int(head.draft_ids[-1]): 1})
    draft_ids = renewed_vocabulary(target, head.draft_ids, counts)
    assert {1, 3, int(head.draft_ids[-1])} <= {*draft_ids.tolist()} and len(draft_ids) == 32 and draft_ids.diff().min() > 0
    assert len({*head.draft_ids.tolist()} - {*draft_ids.tolist()}) == 2
    renewed = with_vocabulary(head, target, draft_ids)
    h, previous = torch.randn(1, 2, 4, target.hidden_size), torch.randint(0, 128, (1, 2, 4))
    (before, confidence), (after, same) = head(h, previous), renewed(h, previous)
    old, kept = torch.isin(head.draft_ids, draft_ids), torch.isin(draft_ids, head.draft_ids)
    assert torch.allclose(after[..., kept], before[..., old], atol=1e-6) and torch.equal(confidence, same)
    assert torch.allclose(after[..., ~kept], h @ target.output_rows(draft_ids[~kept]).float().T, atol=1e-6)
    assert torch.equal(renewed_vocabulary(target, draft_ids, counts), draft_ids)  # nothing is left to renew


def test_adapting_renews_the_draft_vocabulary(place, new, tmp_path, monkeypatch):
    monkeypatch.setattr("dspark.train.run.always_kept", lambda target: set())  # bytes, which are all that this tokenizer has
    said = {token for line in (place / "answers.jsonl").read_text().splitlines() for token in json.loads(line)["answer_ids"]}
    old = load_target(place / "old")
    head = tiny_head(old, block_size=3, draft_vocab=64)
    save_head(head, old, tmp_path / "head", [3, 17, 99], {}, "")
    report = adapt(new, tmp_path / "out", CONFIG, tmp_path / "head", answers=[place / "answers.jsonl"])
    assert report["adapted"]["new_draft_tokens"] > 0 and "gave way" in gain_report(report)
    served = load_head(tmp_path / "out" / "progress" / "candidate", load_target(place / "new"))
    assert len(said & {*served.draft_ids.tolist()}) > len(said & {*head.draft_ids.tolist()})
