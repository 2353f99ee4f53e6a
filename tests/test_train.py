"""Training: what is packed is what is served, runs repeat and resume exactly, and nothing outgrows its bound."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark.config import TrainConfig
from dspark.core.sampling import Law
from dspark.drafters import DSparkDrafter
from dspark.errors import HeadError, PromptError, SettingError, TargetError, UserError
from dspark.generation import generate
from dspark.head.context import EagerRunner
from dspark.head.folder import load_head
from dspark.prompts import Prompt
from dspark.target.load import load_target
from dspark.target.target import Target
from dspark.train import trainer
from dspark.train.answers import answer_prompts, invent_prompts, read_answers, read_records
from dspark.train.batch import make_batch
from dspark.train.estimate import CALIBRATION_TOKENS, Pace, done_before, estimate, measuring, pace, sampling_all, space
from dspark.train.features import FeatureStore
from dspark.train.loss import greedy_agreement, log_softmax_at, losses
from dspark.train.run import held_out_first, interleave, train
from dspark.train.sample import sample_batch
from dspark.train.trainer import anchor_states, loss_after, within_window
from dspark.train.warmstart import widened
from saved import save_tiny_target
from tiny import tiny_head, tiny_model

CONFIG = TrainConfig(
    steps=6, sequences_per_step=2, anchors_per_sequence=5, held_out=2, num_prompts=0, max_answer_tokens=12, teacher_tokens=8, learning_rate=1e-2
)  # fmt: skip
SHAPE = {"num_hidden_layers": 1, "block_size": 3, "markov_rank": 4, "draft_vocab_size": 100}
# The saved tiny target has 259 special and byte tokens, which every draft vocabulary keeps.
WITH_BYTES = SHAPE | {"draft_vocab_size": 260}


def silent(*args) -> None:
    pass


def records(count: int, vocab_size: int = 128) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    make = lambda n: torch.randint(vocab_size, (n,), generator=generator).tolist()  # noqa: E731
    return [{"prompt_ids": make(3 + i % 4), "answer_ids": make(9 + i % 3), "temperature": float(i % 2), "kind": "x"} for i in range(count)]


@pytest.fixture
def target() -> Target:
    return Target(tiny_model("llama"), name="tiny")


@pytest.fixture
def store(target, tmp_path) -> FeatureStore:
    target.tap((0, 3))
    return FeatureStore(target, records(8), tmp_path / "cache", 8, 1.0)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_a_packed_block_equals_the_served_one(target, store, kind):
    head = tiny_head(target, kind=kind)
    sample = store[5]
    batch = make_batch([sample], len(sample.teacher_ids_nP), head.config.block_size, None)
    S = batch.features_NSMD.shape[1]
    context_kv = head.context_kv(batch.features_NSMD.float(), torch.arange(S)[None])
    anchors = target.embed(batch.previous_NAG[:, :, 0])
    packed = head.hidden(anchors, batch.anchors_NA, context_kv, batch.visible_NAS)
    for a, position in enumerate(batch.anchors_NA[0].tolist()):
        served = head.hidden(
            anchors[:, a : a + 1],
            torch.tensor([[position]]),
            head.context_kv(batch.features_NSMD[:, :position].float(), torch.arange(position)[None]),
        )
        torch.testing.assert_close(packed[0, a], served[0, 0], rtol=1e-4, atol=1e-4)


def test_training_sees_the_window_that_serving_does(target, tmp_path):
    target.tap((0, 3))
    generator = torch.Generator().manual_seed(1)
    long = {"prompt_ids": [1, 2], "answer_ids": torch.randint(128, (120,), generator=generator).tolist(), "temperature": 1.0, "kind": "x"}
    head = tiny_head(target)
    head.config = replace(head.config, window=20)
    sample = FeatureStore(target, [long], tmp_path, 8, 1.0)[0]
    batch = make_batch([sample], len(sample.teacher_ids_nP), head.config.block_size, None)
    anchors, features = target.embed(batch.previous_NAG[:, :, 0]), batch.features_NSMD.float()
    kv = head.context_kv(features, torch.arange(features.shape[1])[None])
    packed = head.hidden(anchors, batch.anchors_NA, kv, within_window(batch, head.config))
    runner = EagerRunner(head)
    for a in (0, 30, 60, 118):
        context = runner.start()
        runner.commit([(context, features[0, : batch.anchors_NA[0, a]])])
        torch.testing.assert_close(packed[0, a], runner.block([context], anchors[0, a][None])[0][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_teacher_forced_logits_equal_the_drafters_law(target, kind):
    head = tiny_head(target, kind=kind, block_size=4)
    drafter = DSparkDrafter(head, target)
    ids = [5, 9, 17, 3, 44, 80]
    drafter.commit(target.prefill(target.start(), ids[:-1]))
    draft = drafter.draft(ids, 4, Law(), torch.Generator().manual_seed(0))
    h = head.hidden(target.embed(torch.tensor([[ids[-1]]])), torch.tensor([[5]]), drafter.runner._views(drafter.context, h_like(head)))
    logits, confidence = head(h, torch.tensor([[[ids[-1], *draft.tokens[:-1]]]]))
    for k in range(4):
        inside = draft.probs_KV[k] > 0
        expected = logits[0, 0, k].masked_fill(~inside, float("-inf")).softmax(-1)
        torch.testing.assert_close(draft.probs_KV[k], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(draft.confidences), confidence[0, 0].sigmoid(), rtol=1e-4, atol=1e-5)


def h_like(head) -> torch.Tensor:
    return head.fc.weight


def test_teacher_is_the_targets_law(target, store):
    sample = store[2]
    logits = target.model(input_ids=sample.ids_S[None]).logits[0]
    law = logits[sample.start : -1].softmax(-1)
    torch.testing.assert_close(law.gather(-1, sample.teacher_ids_nP.long()), sample.teacher_probs_nP.float(), rtol=2e-3, atol=2e-4)


def test_loss_of_a_perfect_draft_is_small(target, store):
    config = replace(CONFIG, confidence_weight=0.0, ce_weight=0.0, l1_weight=1.0)
    batch = make_batch([store[3]], 4, 3, None)
    probs = torch.zeros(1, 4, 3, 128).scatter_(-1, batch.teacher_ids_NAGP, batch.teacher_probs_NAGP)
    index = torch.arange(128)
    perfect = losses((probs + 1e-9).log(), None, batch, index, config)
    uniform = losses(torch.zeros(1, 4, 3, 128), None, batch, index, config)
    tail = 1 - batch.teacher_probs_NAGP.sum(-1)[batch.valid_NAG]
    assert perfect.total.item() <= 2 * tail.max().item() + 1e-3 < uniform.total.item()
    assert torch.equal(greedy_agreement(probs, batch, index), batch.valid_NAG)


def test_a_detached_confidence_trains_its_own_layer_alone(target, store):
    def gradients(**settings):
        head = tiny_head(target, block_size=3)
        for parameter in head.parameters():
            parameter.requires_grad_(True)
        batch = make_batch([store[3]], 4, 3, None)
        loss_after(head, anchor_states(target, batch), batch, torch.arange(128), replace(CONFIG, **settings)).total.backward()
        return {name: p.grad for name, p in head.named_parameters() if p.grad is not None}

    without, detached, attached = gradients(confidence_weight=0.0), gradients(detached_confidence=True), gradients()
    own = {name for name in attached if name.startswith("confidence_head")}
    assert own and all(torch.equal(detached[name], attached[name]) and detached[name].any() for name in own)
    assert all(torch.equal(detached[name], without[name]) for name in attached.keys() - own)
    assert any(not torch.equal(attached[name], without[name]) for name in attached.keys() - own)


@pytest.mark.parametrize("rows", [1, 128, 300])
def test_log_softmax_at_is_log_softmax_with_its_gradient(rows):
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, 2, 50, generator=generator, dtype=torch.float64, requires_grad=True)
    index = torch.randint(50, (rows, 2, 7), generator=generator)  # some columns twice
    weight = torch.randn(rows, 2, 7, generator=generator)
    expected = logits.log_softmax(-1).gather(-1, index)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), logits)
    found = log_softmax_at(logits, index)
    (gradient,) = torch.autograd.grad((found * weight).sum(), logits)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)


def test_the_cache_is_bounded_and_does_not_change_samples(target, tmp_path):
    target.tap((0, 3))
    given = records(6)
    unbounded = FeatureStore(target, given, tmp_path / "a", 8, 1.0)
    per_token = 2 * 32 * 2 + 8 * 6
    bounded = FeatureStore(target, given, tmp_path / "b", 8, per_token * 30 / 1e9)
    none = FeatureStore(target, given, tmp_path / "none", 8, 1e-9)
    assert None in bounded.offsets and any(o is not None for o in bounded.offsets)
    for i in range(6):
        for again in (unbounded[i], bounded[i], none[i]):
            torch.testing.assert_close(unbounded[i].features_SMD, again.features_SMD, rtol=0, atol=0)
            assert torch.equal(unbounded[i].teacher_ids_nP, again.teacher_ids_nP)
    assert folder_bytes(tmp_path / "b") <= per_token * 30 and not (tmp_path / "none").exists()
    FeatureStore(target, given, tmp_path / "b", 8, 0.0)
    assert folder_bytes(tmp_path / "b") == 0


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_features_in_float8_take_half_the_room_and_are_near(target, tmp_path):
    target.tap((0, 3))
    given = records(6)
    exact, small = (FeatureStore(target, given, tmp_path / dtype, 8, 1.0, dtype) for dtype in ("bfloat16", "float8"))
    uncached = FeatureStore(target, given, tmp_path / "none", 8, 0.0, "float8")
    for i in range(6):
        error = (small[i].features_SMD - exact[i].features_SMD).float().abs()
        assert (
            error <= 0.07 * exact[i].features_SMD.abs() + 1e-4 * exact[i].features_SMD.abs().amax(-1, keepdim=True)
        ).all() and error.any()
        assert torch.equal(small[i].features_SMD, uncached[i].features_SMD)  # a head does not depend on the cache's bound
        assert torch.equal(small[i].teacher_probs_nP, exact[i].teacher_probs_nP)
    of = lambda name: sum(file.stat().st_size for file in (tmp_path / name).glob("[fs]*.[bf][f813]*"))  # noqa: E731
    assert of("float8") == of("bfloat16") * (32 + 4) // (2 * 32)
    assert FeatureStore(target, given, tmp_path / "float8", 8, 1.0, "float8").filled.all()
    assert not FeatureStore(target, given, tmp_path / "float8", 8, 1.0).filled.any()


def test_a_cache_of_other_answers_is_not_trusted(target, tmp_path):
    target.tap((0, 3))
    first = FeatureStore(target, records(4), tmp_path, 8, 1.0)
    first[0]
    assert first.filled.sum() == 1
    assert FeatureStore(target, records(4), tmp_path, 8, 1.0).filled.sum() == 1
    assert FeatureStore(target, records(5)[1:], tmp_path, 8, 1.0).filled.sum() == 0


@pytest.mark.parametrize("name", ["features.bf16", "teacher_ids.i32", "teacher_probs.f16", "filled.u8", "cache.json"])
def test_a_cache_with_a_cut_file_is_filled_anew(target, tmp_path, name):
    target.tap((0, 3))
    expected = FeatureStore(target, records(4), tmp_path, 8, 1.0)[0].features_SMD.clone()
    for size in (100, 1, 0):
        (tmp_path / name).write_bytes(b"\xff" * size)
        again = FeatureStore(target, records(4), tmp_path, 8, 1.0)
        assert torch.equal(again[0].features_SMD, expected) and again.filled.sum() == 1


def steps(target, store, config, checkpoint=None, stop_at=None):
    head = tiny_head(target, rank=4, block_size=3)
    for parameter in head.parameters():
        parameter.requires_grad_(True)

    def maybe_stop(step, result):
        if step == stop_at:
            raise KeyboardInterrupt

    trainer.train_steps(head, target, store, config, checkpoint, maybe_stop)
    return head.state_dict()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_seed_gives_one_head_and_a_resumed_run_equals_an_unbroken_one(target, store, tmp_path, optimizer):
    config = replace(CONFIG, optimizer=optimizer, checkpoint_seconds=0.0)
    straight, again = steps(target, store, config), steps(target, store, config)
    other = steps(target, store, replace(config, seed=1))
    with pytest.raises(KeyboardInterrupt):
        steps(target, store, config, tmp_path / "checkpoint.pt", stop_at=4)
    resumed = steps(target, store, config, tmp_path / "checkpoint.pt")
    assert all(torch.equal(straight[name], again[name]) for name in straight)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert any(not torch.equal(straight[name], other[name]) for name in straight)


def test_training_raises_the_acceptance(target, tmp_path):
    """On its own greedy answers the tiny head must learn something within seconds."""
    target.tap((0, 3))
    prompts = [[i % 120 + 1, (7 * i) % 120 + 1] for i in range(24)]
    answers = sample_batch(target, prompts, [0.0] * 24, 16, seed=0)
    given = [{"prompt_ids": p, "answer_ids": a, "temperature": 0.0, "kind": "x"} for p, a in zip(prompts, answers, strict=True)]
    store = FeatureStore(target, given, tmp_path, 8, 1.0)
    config = replace(
        CONFIG, steps=60, sequences_per_step=6, anchors_per_sequence=12, learning_rate=5e-3, held_out=4, teacher_ce=True, ce_weight=1.0
    )
    head = tiny_head(target, rank=4, block_size=3)
    for parameter in head.parameters():
        parameter.requires_grad_(True)
    seen = []
    trainer.train_steps(
        head, target, store, config, None, lambda step, r: seen.append(r.overlap_NAG.sum().item() / r.valid_NAG.sum().item())
    )
    assert sum(seen[-10:]) / 10 > 2 * sum(seen[:5]) / 5


def test_batched_sampling_is_greedy_decoding_at_temperature_0(target):
    prompts = [[1, 2, 3], [9, 8, 7, 6, 5, 4], [40]]
    answers = sample_batch(target, prompts, [0.0] * 3, 10, seed=0, stop_ids=frozenset())
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        expected = target.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        assert expected[0, len(prompt) :].tolist() == answer


def test_batched_sampling_drops_finished_rows_without_touching_the_others(target):
    prompts = [[i, i + 1] for i in range(1, 9)]
    free = sample_batch(target, prompts, [0.0] * 8, 12, seed=0, stop_ids=frozenset())
    stops = frozenset({free[0][1], free[3][2], free[5][0]})
    stopped = sample_batch(target, prompts, [0.0] * 8, 12, seed=0, stop_ids=stops)
    for whole, cut in zip(free, stopped, strict=True):
        end = next((i + 1 for i, t in enumerate(whole) if t in stops), len(whole))
        assert cut == whole[:end]


def test_batched_sampling_follows_the_law(target):
    """One token from one prompt, 4,000 rows at T=1: the frequencies are the target's probabilities."""
    law = target.score(target.start(), [3, 4]).logits_TV[-1].softmax(-1)
    drawn = [a[0] for a in sample_batch(target, [[3, 4]] * 4000, [1.0] * 4000, 1, seed=1)]
    counts = torch.bincount(torch.tensor(drawn), minlength=128).double()
    expected = law.double() * 4000
    common = expected > 8
    statistic = ((counts - expected)[common] ** 2 / expected[common]).sum().item()
    assert statistic < int(common.sum()) + 5 * (2 * int(common.sum())) ** 0.5


def test_the_estimate_names_every_stage_that_will_run(target, tmp_path):
    (tmp_path / "answers.jsonl").write_text("{}\n" * 40)
    config = replace(CONFIG, num_prompts=40)
    own = estimate(target, config, SHAPE, None, [])
    given = estimate(target, config, SHAPE, None, [tmp_path / "answers.jsonl"])
    assert all(stage in own for stage in ("to invent instructions", "to sample answers", "for 6 steps", "calibrating on held-out answers"))
    assert "invent" not in given and "sample" not in given and "on held-out answers" in given
    served = estimate(target, config, SHAPE, None, [], served=True)
    assert "to invent instructions" in served and "sample" not in served  # how long a server takes is not known
    served = estimate(target, replace(config, num_prompts=0), SHAPE, [Prompt("x")] * 40, [], served=True)
    assert "at most" not in served and "for features" in served


def test_the_estimate_of_a_resumed_run_counts_what_is_left(tmp_path, capsys, monkeypatch):
    stages = ("to invent", "to sample", "for features", "steps", "for measuring and calibrating")
    target, out, work = load_target(save_tiny_target(tmp_path / "target")), tmp_path / "head", tmp_path / "head" / "progress"
    config = replace(CONFIG, num_prompts=6, steps=4, checkpoint_seconds=0.0)

    def said(text: str) -> list[str]:
        return [stage for stage in stages if stage in text]

    monkeypatch.setattr("dspark.train.run.held_out_calibration", lambda *_: None)
    monkeypatch.setattr("dspark.train.estimate.pace", lambda *_: Pace(128, 0.1, 0.1))

    def estimated() -> str:
        return next(line for line in capsys.readouterr().err.splitlines() if " of memory (" in line)

    train(target, out, config, WITH_BYTES)
    first = estimated()
    assert said(first) == list(stages) and "left" not in first
    (out / "provenance.json").unlink()  # killed while it measured
    train(target, out, config, WITH_BYTES, resume=True)
    resumed = estimated()
    assert (
        said(resumed) == ["for measuring and calibrating"]
        and resumed.startswith("what is left: as fast as")
        and " MB more of disk" in resumed
    )

    def left() -> str:
        return estimate(target, config, WITH_BYTES, None, [], done=done_before(work))

    checkpoint = torch.load(work / "checkpoint.pt", weights_only=True)
    torch.save(checkpoint | {"step": 1}, work / "checkpoint.pt")
    assert "for 3 steps" in left() and said(left()) == ["steps", "for measuring and calibrating"]
    (work / "checkpoint.pt").unlink()
    assert "for 4 steps" in left() and said(left()) == ["steps", "for measuring and calibrating"]
    shutil.rmtree(work / "cache")
    assert said(left()) == list(stages[2:])
    answers = (work / "answers.jsonl").read_text().splitlines(keepends=True)
    (work / "answers.jsonl").write_text("".join(answers[:-1]))
    assert said(left()) == list(stages[1:])
    (work / "answers.jsonl").unlink()
    (work / "prompts.jsonl").unlink()
    assert said(left()) == list(stages)


def test_the_estimate_is_what_sampling_takes_here(target, monkeypatch):
    forward = target.model.forward
    monkeypatch.setattr(target.model, "forward", lambda *args, **kwargs: (time.sleep(0.02), forward(*args, **kwargs))[1])
    found = pace(target, 128)
    assert found is not None and found.rows == 128
    slow = Pace(128, 100 * found.batch_seconds, 100 * found.token_seconds)
    begin = time.perf_counter()
    sample_batch(target, [[1, 2, 3]] * 128, [1.0] * 128, 40, 0, frozenset())
    assert 0.25 < sampling_all(target, 128, 43, found) / (time.perf_counter() - begin) < 4
    assert sampling_all(target, 256, 43, slow) == pytest.approx(200 * sampling_all(target, 128, 43, found))
    assert measuring(target, replace(CONFIG, held_out=20), SHAPE, slow, CONFIG.steps) > 2 * 20 * CALIBRATION_TOKENS * slow.token_seconds


@pytest.mark.parametrize(("seconds", "known"), [(0.0, True), (0.003, True), (0.15, True), (0.4, False), (1.0, False)])
def test_an_estimate_takes_no_longer_than_three_seconds_and_says_what_it_does_not_know(target, monkeypatch, seconds, known):
    """A target whose pass takes so many seconds more, and a tenth of it for each row."""
    real, forward = sample_batch, target.model.forward

    def slowly(target, prompts, *args, **kwargs):
        time.sleep(seconds * (1 + len(prompts) / 10) / 2)  # the model's own pass sleeps too
        return real(target, prompts, *args, **kwargs)

    monkeypatch.setattr("dspark.train.estimate.sample_batch", slowly)
    monkeypatch.setattr(target.model, "forward", lambda *args, **kwargs: (time.sleep(seconds / 2), forward(*args, **kwargs))[1])
    begin = time.perf_counter()
    said = estimate(target, replace(CONFIG, num_prompts=300), SHAPE, None, [])
    assert time.perf_counter() - begin < 4
    assert ("unknown until measured" in said) is not known and ("to sample answers" in said) is known and "of disk" in said


@pytest.mark.parametrize("kind", [None, "eagle3"])
def test_the_disk_that_is_estimated_is_what_a_run_fills(kind, tmp_path, monkeypatch):
    """At its fullest, when a checkpoint stands beside the one before, and with a head whose weights are more than all else."""
    target, out = load_target(save_tiny_target(tmp_path / "target")), tmp_path / "head"
    config, given = replace(CONFIG, steps=2, checkpoint_seconds=0.0), records(10)
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, given)))
    shape = {"markov_rank": 256, "draft_vocab_size": 260} if kind is None else {"kind": kind, "draft_vocab_size": 260}
    stored, replaced = [], os.replace
    size_of = lambda folder: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())  # noqa: E731

    def replace_and_count(old, new):
        stored.append((size_of(out / "progress" / "cache"), size_of(out)))
        replaced(old, new)

    monkeypatch.setattr("os.replace", replace_and_count)
    train(target, out, config, shape, answers=[tmp_path / "answers.jsonl"])
    cache, whole = max(stored, key=lambda each: each[1])
    num_tokens = sum(len(record["prompt_ids"]) + len(record["answer_ids"]) for record in given)
    _, features, other, _ = space(target, config, shape, num_tokens)
    assert 0.85 * features < cache <= features
    assert 0.6 * other < whole - cache < 1.2 * other


def test_a_small_head_is_not_said_to_fill_a_gigabyte(target):
    assert " MB of disk" in estimate(target, CONFIG, SHAPE, [Prompt("x")] * 40, [])


def test_interleaving_keeps_every_window_mixed():
    mixed = interleave(list("aaaaaa"), list("bbb"))
    assert sorted(mixed) == list("aaaaaabbb")
    assert all("b" in mixed[i : i + 4] for i in range(0, 6))


def test_the_whole_command_from_nothing_to_a_head_that_loads(tmp_path):
    save_tiny_target(tmp_path / "target")
    target = load_target(tmp_path / "target")
    out = tmp_path / "head"
    config = replace(CONFIG, num_prompts=6, steps=3)
    report = train(target, out, config, WITH_BYTES, command="dspark train ...")
    head = load_head(out, load_target(tmp_path / "target"))
    assert head.config.block_size == 3 and report["held_out_rounds"]["tau_t0"] >= 1
    assert json.loads((out / "provenance.json").read_text())["train"]["seed"] == 0
    with pytest.raises(SettingError, match="holds an unfinished or finished"):
        train(target, out, config, WITH_BYTES)
    with pytest.raises(SettingError, match=r"other settings: steps was 3 and is 4\n"):
        train(target, out, replace(config, steps=4), WITH_BYTES, resume=True)
    with pytest.raises(SettingError, match=r"block_size was 3 and is 2; other prompts\n"):
        train(target, out, config, WITH_BYTES | {"block_size": 2}, [Prompt("hi")], resume=True)
    before = (out / "model.safetensors").read_bytes()
    (out / "provenance.json").unlink()  # the last thing that a run writes
    train(target, out, config, WITH_BYTES, resume=True, command="dspark train ...")
    assert (out / "model.safetensors").read_bytes() == before


def test_a_finished_run_is_not_measured_again(tmp_path, monkeypatch):
    target = load_target(save_tiny_target(tmp_path / "target"))
    config = replace(CONFIG, num_prompts=6, steps=2)
    train(target, tmp_path / "head", config, WITH_BYTES)
    for lost in ("config.json", "golden.safetensors"):  # without one of them there is no head: it is written again
        (tmp_path / "head" / lost).unlink()
        report = train(target, tmp_path / "head", config, WITH_BYTES, resume=True)
        assert "finished_before" not in report and load_head(tmp_path / "head", target)
    monkeypatch.setattr("dspark.train.run.measure", None)
    monkeypatch.setattr("dspark.train.run.held_out_rounds", None)
    again = train(target, tmp_path / "head", config, WITH_BYTES, resume=True)
    assert again.pop("finished_before") and again == json.loads(json.dumps(report))
    (tmp_path / "head" / "provenance.json").write_text("{")
    with pytest.raises(HeadError, match=r"provenance\.json"):
        train(target, tmp_path / "head", config, WITH_BYTES, resume=True)


def test_training_ends_with_a_calibration_on_held_out_prompts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dspark.train.run.CALIBRATION_TOKENS", 30)
    monkeypatch.setattr("dspark.measure.calibrate.LEAST_ROUNDS", 40)
    target = load_target(save_tiny_target(tmp_path / "target"))
    train(target, tmp_path / "head", replace(CONFIG, num_prompts=12, held_out=4, steps=2), WITH_BYTES)
    fits = load_head(tmp_path / "head", target).calibration.fits
    assert [(fit.temperature, fit.prompts, len(fit.temperatures)) for fit in fits] == [(0.0, 4, 3), (1.0, 4, 3)]
    assert (tmp_path / "head" / "README.md").read_text().count("expected calibration error") == 2
    monkeypatch.setattr("dspark.train.run.CALIBRATION_TOKENS", 4)  # too few rounds make no calibration, but a head
    train(target, tmp_path / "more", replace(CONFIG, num_prompts=6, steps=2), {}, start_from=tmp_path / "head")
    assert "not calibrated" in capsys.readouterr().err and load_head(tmp_path / "more", target).calibration is None


SLOW = pytest.mark.slow  # the same path as for the others


@pytest.mark.parametrize(
    "name",
    ["settings.json", "checkpoint.pt", "answers.jsonl", pytest.param("curve.jsonl", marks=SLOW), pytest.param("prompts.jsonl", marks=SLOW)],
)
def test_a_damaged_progress_file_is_named_and_made_again_once_deleted(tmp_path, name):
    target = load_target(save_tiny_target(tmp_path / "target"))
    out, config = tmp_path / "head", replace(CONFIG, num_prompts=6, steps=2)
    train(target, out, config, WITH_BYTES)
    (out / "provenance.json").unlink()  # as if the last figures were still to be measured
    file, before = out / "progress" / name, (out / "model.safetensors").read_bytes()
    lines = [b"\x00" * 40 + b"\n", b"[]\n", b'{"step": ' + b"9" * 5000 + b"}\n", b"[" * 100_000 + b"\n"]
    # A last line without its end is what a kill leaves, and no damage.
    for data in [*lines, b"{}\n"] if name.endswith(".jsonl") else [file.read_bytes()[:40], b"", *lines]:
        file.write_bytes(data)
        with pytest.raises(UserError, match=file.name):
            train(target, out, config, WITH_BYTES, resume=True)
    file.unlink()
    if name != "settings.json":
        train(target, out, config, WITH_BYTES, resume=True)
        assert (out / "model.safetensors").read_bytes() == before


def test_a_full_disk_leaves_no_half_settings(tmp_path, monkeypatch):
    target = load_target(save_tiny_target(tmp_path / "target"))

    def full(self, text, *args, **kwargs):
        self.write_bytes(text[:3].encode())
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(HeadError, match="No space left"):
        patch.setattr("pathlib.Path.write_text", full)
        train(target, tmp_path / "out", replace(CONFIG, num_prompts=6), WITH_BYTES)
    train(target, tmp_path / "out", replace(CONFIG, num_prompts=6), WITH_BYTES, only_answers=True)


def test_what_is_refused_locks_no_folder(tmp_path):
    target = load_target(save_tiny_target(tmp_path / "target"))
    (tmp_path / "bad.jsonl").write_text('{"prompt_ids": [1]}\n')
    (tmp_path / "few.jsonl").write_text('{"prompt_ids": [1], "answer_ids": [1]}\n')
    config = replace(CONFIG, num_prompts=6)
    failing = [Prompt([{"role": "user", "content": {}}])] * 3
    for says, changes, given in (
        ("line 1", {}, {"answers": [tmp_path / "bad.jsonl"]}),
        ("usable answers", {}, {"answers": [tmp_path / "few.jsonl"]}),
        ("max-answer-tokens is 250", {"max_answer_tokens": 250}, {}),
        ("too many", {"num_prompts": 10**11}, {}),
        ("cache-gb is nan", {"cache_gigabytes": float("nan")}, {}),
        ("cache-gb is -1", {"cache_gigabytes": -1.0}, {}),
        ("cannot take this chat", {}, {"prompts": failing}),
        ("only 0 of 3 prompts fit", {"num_prompts": 0}, {"prompts": [Prompt("a" * 300)] * 3}),
    ):
        with pytest.raises(UserError, match=says):
            train(target, tmp_path / "out", replace(config, **changes), WITH_BYTES, **given)
        assert not (tmp_path / "out").exists()


def test_a_diverged_run_stops_and_keeps_the_last_good_checkpoint(target, store, tmp_path):
    config = replace(CONFIG, checkpoint_seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        steps(target, store, config, tmp_path / "checkpoint.pt", stop_at=3)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    head = tiny_head(target, rank=4, block_size=3)
    for parameter in head.parameters():
        parameter.requires_grad_(True)

    def breaks(step, result):
        head.fc.weight.data.fill_(float("nan"))

    for seconds, says in ((0.0, "head of step 3"), (99.0, "loss of step 4")):
        with pytest.raises(SettingError, match=f"diverged: the {says}"):
            trainer.train_steps(head, target, store, replace(config, checkpoint_seconds=seconds), tmp_path / "checkpoint.pt", breaks)
        assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_training_goes_on_from_a_given_head(tmp_path):
    save_tiny_target(tmp_path / "target")
    target = load_target(tmp_path / "target")
    config = replace(CONFIG, num_prompts=12)
    train(target, tmp_path / "first", config, WITH_BYTES)
    (tmp_path / "answers.jsonl").write_bytes((tmp_path / "first" / "progress" / "answers.jsonl").read_bytes())
    still = replace(config, steps=1, learning_rate=1e-12)
    train(target, tmp_path / "second", still, {}, answers=[tmp_path / "answers.jsonl"], start_from=tmp_path / "first")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads((tmp_path / "second" / "config.json").read_text())["block_size"] == 3
    train(
        target,
        tmp_path / "third",
        replace(still, learning_rate=1e-2),
        {},
        answers=[tmp_path / "answers.jsonl"],
        start_from=tmp_path / "first",
    )
    third = load_file(tmp_path / "third" / "model.safetensors")
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_a_head_of_larger_rank_drafts_as_the_one_it_came_from(tmp_path):
    save_tiny_target(tmp_path / "target")
    target = load_target(tmp_path / "target")
    train(target, tmp_path / "first", replace(CONFIG, num_prompts=12), WITH_BYTES)
    head = load_head(tmp_path / "first", target).float()
    torch.nn.init.normal_(head.markov_head.markov_w2.weight)
    torch.nn.init.normal_(head.confidence_head.proj.weight)
    rank, prompt = head.config.markov_rank, [1, 2, 3, 4]
    wide = widened(head, target, rank + 3)
    assert wide.config.markov_rank == rank + 3 and wide.markov_head.markov_w1.weight[:, rank:].abs().sum() > 0
    for temperature in (0.0, 1.0):
        one, other = (generate(target, h, prompt, 40, temperature=temperature) for h in (head, wide))
        assert one.rounds_log == other.rounds_log
    with pytest.raises(SettingError, match="cannot be widened to rank 1"):
        widened(head, target, 1)
    answers = [tmp_path / "first" / "progress" / "answers.jsonl"]
    still = replace(CONFIG, num_prompts=12, steps=1)
    train(target, tmp_path / "second", still, {"markov_rank": rank + 3}, answers=answers, start_from=tmp_path / "first")
    assert json.loads((tmp_path / "second" / "config.json").read_text())["markov_rank"] == rank + 3
    assert load_file(tmp_path / "second" / "model.safetensors")["markov_head.markov_w2.weight"][:, rank:].abs().sum() > 0


def test_invented_instructions_are_of_the_kinds_asked_for(tmp_path):
    save_tiny_target(tmp_path / "target")
    target = load_target(tmp_path / "target")
    invented = invent_prompts(target, 6, 0, tmp_path / "prompts.jsonl", silent, ("code", "chat"))
    assert [record["kind"] for record in invented] == ["chat", "code"] * 3


def test_answers_resume_at_the_batch_they_were_in(tmp_path, monkeypatch):
    save_tiny_target(tmp_path / "target")
    target = load_target(tmp_path / "target")
    monkeypatch.setattr("dspark.train.answers.BATCH", 2)
    whole = invent_prompts(target, 6, 0, tmp_path / "whole.jsonl", silent)
    text = (tmp_path / "whole.jsonl").read_text()
    lines = text.splitlines(keepends=True)
    (tmp_path / "torn.jsonl").write_text("".join(lines[:3]) + lines[3][:10])
    assert invent_prompts(target, 6, 0, tmp_path / "torn.jsonl", silent) == whole
    assert (tmp_path / "torn.jsonl").read_text() == text
    answers = answer_prompts(target, whole, 6, 0, tmp_path / "answers.jsonl", silent)
    assert answers == read_records(tmp_path / "answers.jsonl") and len(answers) == 6


def test_held_out_answers_are_a_fair_sample_that_training_never_sees():
    given = [{"prompt_ids": [i // 2], "answer_ids": [i]} for i in range(40)]
    mixed = held_out_first(given, 6, seed=0)
    prompts = [r["prompt_ids"][0] for r in mixed[:6]]
    assert max(prompts) > 5 and not {r["prompt_ids"][0] for r in mixed[6:]} & set(prompts)


def test_training_overwrites_neither_a_target_nor_a_finished_head(tmp_path):
    folder = save_tiny_target(tmp_path / "target")
    weights = (folder / "model.safetensors").read_bytes()
    target = load_target(folder)
    with pytest.raises(SettingError, match="already; nothing was overwritten"):
        train(target, folder, replace(CONFIG, num_prompts=6), WITH_BYTES)
    assert (folder / "model.safetensors").read_bytes() == weights
    with pytest.raises(SettingError, match="no training run to resume"):
        train(target, tmp_path / "new", replace(CONFIG, num_prompts=6), WITH_BYTES, resume=True)
    with pytest.raises(SettingError, match="do not divide"):
        train(target, tmp_path / "new", replace(CONFIG, num_prompts=6), WITH_BYTES | {"num_key_value_heads": 3})
    assert not (tmp_path / "new").exists()


def test_answers_that_cannot_be_used_are_named_by_line(tmp_path):
    file = tmp_path / "answers.jsonl"
    good = '{"prompt_ids": [1], "answer_ids": [2, 3]}'
    file.write_text(good)
    assert read_answers(file, 128, 64) == [{"prompt_ids": [1], "answer_ids": [2, 3], "temperature": 1.0, "kind": "user"}]
    nested, digits = "[" * 100_000, f'{{"prompt_ids": [{"9" * 5000}], "answer_ids": [1]}}'
    hot = '{"prompt_ids": [1], "answer_ids": [1], "temperature": 1' + "0" * 400 + "}"
    for bad in (
        nested,
        digits,
        hot,
        "\udcff",
        "{",
        '{"prompt_ids": [1]}',
        '{"prompt_ids": [], "answer_ids": [1]}',
        '{"prompt_ids": [1], "answer_ids": [999]}',
    ):
        file.write_text(f"{good}\n{bad}\n", errors="surrogateescape")
        with pytest.raises(PromptError, match="line 2"):
            read_answers(file, 128, 64)


def test_a_target_with_a_missing_tensor_is_refused(tmp_path):
    folder = save_tiny_target(tmp_path / "target")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TargetError, match="down_proj"):
        load_target(folder)


@pytest.mark.parametrize("data", [b"", b"{", b"{}", b"[]", b"[" * 100_000], ids=["empty", "cut", "no tokens", "list", "nested"])
def test_a_damaged_tokenizer_is_refused_and_none_is_not(tmp_path, data):
    folder = save_tiny_target(tmp_path / "target")
    (folder / "tokenizer.json").write_bytes(data)
    with pytest.raises(TargetError, match=r"cannot read the tokenizer .*tokenizer\.json"):
        load_target(folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert load_target(folder).tokenizer is None
