"""Calibration: estimates become chances, the file comes back or is refused, and no token ever depends on it."""

import json
import random
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

from dspark.core.calibration import MOST_SHIFT, Calibration, Fit, OnlineCalibration
from dspark.core.planner import Always, threshold
from dspark.drafters import DSparkDrafter
from dspark.errors import HeadError, PromptError, SettingError
from dspark.generation import generate, make_law, split_law
from dspark.head.calibration import beside_kept, doubts, read_calibration, refuse_unwritable, write_calibration
from dspark.head.folder import load_head, save_head
from dspark.measure.calibrate import Settings, calibrate, halves
from dspark.measure.calibration import (
    Curves,
    Rounds,
    acceptance,
    auroc,
    ece,
    figures,
    fit_curves,
    fit_logistic,
    fit_temperatures,
    margin_survival,
    sigmoid,
    survival,
)
from dspark.target.load import use_runtime
from dspark.target.target import Target
from saved import run, save_tiny_pair
from tiny import NATIVE_SHAPE, TINY_FIT, tiny_calibration, tiny_head, tiny_model


def simulated(temperatures, num_rounds: int, seed: int = 0) -> Rounds:
    """Rounds whose real acceptance logits are z; a head that reports T * z is over-confident by exactly T."""
    generator = np.random.default_rng(seed)
    real_RG = generator.normal(1.0, 1.5, (num_rounds, len(temperatures)))
    stands_RG = generator.random(real_RG.shape) < sigmoid(real_RG)
    accepted_R = np.cumprod(stands_RG, axis=1).sum(1)
    return Rounds(real_RG * np.array(temperatures), 2 * real_RG + 1, accepted_R, np.arange(num_rounds))


def test_known_temperatures_are_found_again():
    known = [1.5, 2.0, 3.0, 0.5]
    rounds, held_out = simulated(known, 40_000), simulated(known, 40_000, seed=1)
    found = fit_temperatures(rounds)
    assert found == pytest.approx(known, rel=0.12)
    before, after = (figures(survival(held_out, curves), held_out.num_accepted_R) for curves in (None, Curves.temperatures_only(found)))
    assert all(b["ece"] > 0.02 and a["ece"] < 0.01 for b, a in zip(before, after, strict=True))
    assert all(a["brier"] < b["brier"] for b, a in zip(before, after, strict=True))
    assert after[0]["auroc"] == pytest.approx(before[0]["auroc"], abs=1e-12)  # one temperature keeps the order


def test_a_bias_that_no_temperature_removes():
    """Slope and offset as they were found at the first position of a head at T = 1."""

    def biased(seed: int) -> Rounds:
        generator = np.random.default_rng(seed)
        logits_RG = generator.normal(0.0, 1.0, (20_000, 1))
        stands_R = generator.random(20_000) < sigmoid(0.68 * logits_RG[:, 0] - 0.26)
        return Rounds(logits_RG, logits_RG, stands_R.astype(int), np.arange(20_000))

    rounds, held_out = biased(0), biased(1)
    tried = [Curves.temperatures_only([T]) for T in np.geomspace(0.1, 10, 41)]
    best = min(figures(survival(held_out, curves), held_out.num_accepted_R)[0]["ece"] for curves in tried)
    found = fit_curves(rounds)
    assert found.temperatures == pytest.approx([1 / 0.68], rel=0.1) and found.biases == pytest.approx([-0.26], abs=0.05)
    with_bias = figures(survival(held_out, found), held_out.num_accepted_R)[0]["ece"]
    assert best > 0.02 and with_bias < 0.015


def test_the_weight_of_a_margin_that_knows_more_is_found():
    def made(seed: int) -> Rounds:
        generator = np.random.default_rng(seed)
        logits_RG, margins_RG = generator.normal(0.0, 1.0, (20_000, 1)), generator.exponential(2.0, (20_000, 1))
        stands_R = generator.random(20_000) < sigmoid(0.5 * logits_RG[:, 0] + 0.8 * margins_RG[:, 0] - 1.0)
        return Rounds(logits_RG, margins_RG, stands_R.astype(int), np.arange(20_000))

    rounds, held_out = made(0), made(1)
    found = fit_curves(rounds, with_margin=True)
    assert (found.temperatures, found.biases) == (pytest.approx([2.0], rel=0.15), pytest.approx([-1.0], abs=0.1))
    assert found.margin_weights == pytest.approx([0.8], abs=0.05)
    with_margin, without = (figures(survival(held_out, c), held_out.num_accepted_R)[0] for c in (found, fit_curves(rounds)))
    assert with_margin["auroc"] > without["auroc"] + 0.1 and with_margin["ece"] < 0.015


def test_few_rounds_leave_a_curve_near_what_the_head_says():
    nothing = Rounds(np.array([[3.0, np.nan]]), np.full((1, 2), np.nan), np.array([1]), np.arange(1))
    found = fit_curves(nothing)
    assert found.temperatures == pytest.approx([1.0, 1.0], abs=0.2) and found.biases == pytest.approx([0.0, 0.0], abs=0.2)


def test_calibrated_estimates_err_by_chance_only():
    rounds = simulated([1.0, 1.0], 2000)
    for figure in figures(survival(rounds), rounds.num_accepted_R):
        assert figure["ece"] == pytest.approx(figure["chance"], rel=0.6) and figure["chance"] > 0.005


def test_positions_that_say_nothing_keep_temperature_1():
    nothing = Rounds(np.array([[0.0, np.nan]] * 4), np.full((4, 2), np.nan), np.array([0, 1, 0, 1]), np.arange(4))
    assert fit_temperatures(nothing) == [1.0, 1.0]  # every temperature makes 0.5 of the first logits
    assert figures(survival(nothing), nothing.num_accepted_R)[1]["rounds"] == 0


def test_ece_by_hand():
    # two bins of 20: [0.5, 0.55) has mean 0.52 and 1 of 2, the last one mean 0.98 and 1 of 3; 1.0 belongs to the last
    estimates, happened = np.array([0.51, 0.53, 0.97, 0.97, 1.0]), np.array([True, False, True, False, False])
    assert ece(estimates, happened) == pytest.approx(2 / 5 * 0.02 + 3 / 5 * (0.98 - 1 / 3))


def test_auroc_counts_pairs_and_ties_half():
    generator = np.random.default_rng(0)
    estimates, happened = generator.integers(0, 6, 60) / 6, generator.random(60) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a in estimates[happened] for b in estimates[~happened]]
    assert auroc(estimates, happened) == pytest.approx(np.mean(pairs))
    assert auroc(estimates, np.ones(60, bool)) is None


def test_acceptance_is_conditional_and_a_position_never_judged_takes_the_last_rate():
    logits = np.zeros((4, 3))
    logits[3, 1:] = np.nan  # drafted one token
    rounds = Rounds(logits, logits, np.array([0, 1, 1, 1]), np.arange(4))
    assert acceptance(rounds) == [3 / 4, 0.0, 0.0]


def test_the_margin_baseline_finds_the_curve_it_was_made_with():
    rounds = simulated([1.0, 1.0], 20_000)  # margin = 2 z + 1
    inputs = np.stack([rounds.margins_RG[:, 0], np.ones(len(rounds))])
    assert fit_logistic(inputs, rounds.num_accepted_R > 0, [0.0, 0.0]) == pytest.approx([0.5, -0.5], abs=0.05)
    held_out = simulated([1.0, 1.0], 20_000, seed=1)
    assert all(f["ece"] < 0.015 for f in figures(margin_survival(rounds, held_out), held_out.num_accepted_R))


def test_prompts_are_on_one_side_and_sets_on_both():
    sets = ["a"] * 9 + ["b"] * 2 + ["c"] * 30
    fitted, held_out = halves(sets)
    assert sorted(fitted + held_out) == list(range(41)) and abs(len(fitted) - len(held_out)) <= 1
    assert {sets[i] for i in fitted} == {sets[i] for i in held_out} == {"a", "b", "c"}


def drifted(online: OnlineCalibration, shift: float, num_rounds: int) -> None:
    """Rounds whose confidences' logits are off by -shift at every position."""
    generator = random.Random(0)
    for _ in range(num_rounds):
        logits = [generator.gauss(0.5, 1.0) for _ in range(3)]
        accepted = 0
        while accepted < 3 and generator.random() < 1 / (1 + np.exp(-logits[accepted] - shift)):
            accepted += 1
        online.learn([1 / (1 + np.exp(-z)) for z in logits], 3, accepted)


def test_a_drift_is_learned_online():
    online = OnlineCalibration(3)
    drifted(online, -1.0, 3000)
    assert online.shifts[0] == pytest.approx(-1.0, abs=0.35) and online.shifts[1] == pytest.approx(-1.0, abs=0.5)
    assert online.adjust([0.5, 0.5]) == pytest.approx([1 / (1 + np.exp(-b)) for b in online.shifts[:2]])


@pytest.mark.parametrize("accepted", [0, 1])
def test_a_shift_stays_within_its_bound_and_a_step_within_its_size(accepted):
    online = OnlineCalibration(2)
    before = 0.0
    for _ in range(2000):
        online.learn([0.0 if accepted else 1.0, 0.5], 1, accepted)
        assert abs(online.shifts[0] - before) <= online.step
        before = online.shifts[0]
    assert online.shifts == [MOST_SHIFT if accepted else -MOST_SHIFT, 0.0]  # what was never judged teaches nothing


def test_a_law_tells_its_temperature():
    assert [make_law(T, top_k=5).temperature for T in (0.0, 0.7, 1.0)] == [0.0, pytest.approx(0.7), 1.0]
    behind = LogitsProcessorList([TemperatureLogitsWarper(0.5), lambda ids, logits: logits, TopKLogitsWarper(5)])
    assert split_law(behind, greedy=False).temperature == 0.5


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(tiny_model("llama"), name="tiny")


@pytest.fixture
def folder(target, tmp_path):
    """A saved head with a calibration."""
    head = tiny_head(target)
    head.calibration = tiny_calibration(head, target, TINY_FIT, replace(TINY_FIT, temperature=1.0))
    save_head(head, target, tmp_path / "head", list(range(3, 40)), {}, "# card\n")
    return tmp_path / "head"


def test_a_calibration_is_saved_and_loaded_with_its_head(folder, target):
    assert load_head(folder, target).calibration.fits == (TINY_FIT, replace(TINY_FIT, temperature=1.0))
    assert load_head(folder, target, calibrated=False).calibration is None


def test_a_new_fit_takes_the_place_of_that_for_its_settings_alone(folder, target):
    old = load_head(folder, target).calibration
    narrow = replace(TINY_FIT, top_p=0.9, temperature=1.0)
    again = replace(TINY_FIT, rounds=TINY_FIT.rounds + 1)
    found = replace(old, fits=(again, narrow))
    kept = beside_kept(found, folder, 4)
    assert kept.fits == (again, narrow, replace(TINY_FIT, temperature=1.0))
    assert kept.nearest(1.0) == narrow  # the newest
    other = replace(found, precision="another")
    assert beside_kept(other, folder, 4) == other
    (folder / "calibration.json").write_text("{")
    assert beside_kept(found, folder, 4) == found


def test_a_calibration_from_before_margins_is_read(folder, target):
    def earlier(raw):
        raw["format"] = 1
        for fit in raw["fits"]:
            del fit["margin_weights"]

    edited(folder / "calibration.json", earlier)
    assert load_head(folder, target).calibration.fits == (TINY_FIT, replace(TINY_FIT, temperature=1.0))


def test_saving_another_head_takes_the_old_calibration_away(folder, target):
    save_head(tiny_head(target, seed=1), target, folder, list(range(3, 40)), {}, "# card\n")
    assert load_head(folder, target).calibration is None and not list(folder.glob("calibration*"))


def test_the_law_of_the_request_chooses_the_fit(target):
    head = tiny_head(target)
    head.calibration = tiny_calibration(head, target, TINY_FIT, replace(TINY_FIT, temperature=1.0, temperatures=(0.5,) * 4))
    assert [head.calibration.nearest(T).temperature for T in (0.0, 0.4, 0.5, 0.7, 3.0)] == [0.0, 0.0, 1.0, 1.0, 1.0]
    for T, expected in ((0.0, (2.0, 3.0, 4.0, 5.0)), (0.7, (0.5,) * 4)):  # both with the biases of TINY_FIT
        drafts = []
        for recording in (False, True):  # a recording drafter tells the head's own confidences
            drafter = DSparkDrafter(head, target, recording)
            drafter.commit(target.prefill(target.start(), [5, 6, 7]))
            drafts.append(drafter.draft([5, 6, 7, 8], 4, make_law(T), torch.Generator().manual_seed(0)))
        calibrated, raw = (torch.tensor(d.confidences).logit() for d in drafts)
        torch.testing.assert_close((calibrated - torch.tensor(TINY_FIT.biases)) * torch.tensor(expected), raw, rtol=1e-3, atol=1e-3)
        assert drafts[0].tokens == drafts[1].tokens and drafts[0].margins is None
        assert len(drafts[1].margins) == 4 and min(drafts[1].margins) > 0


@pytest.mark.parametrize("runtime", ["eager", "native"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_margins_count_by_their_weights(runtime, temperature):
    target = Target(tiny_model("llama", **NATIVE_SHAPE))
    use_runtime(target, runtime)
    head = tiny_head(target, head_dim=16, rank=16)
    weights = (0.5, 0.0, -0.25, 2.0)
    head.calibration = tiny_calibration(head, target, replace(TINY_FIT, temperature=temperature, margin_weights=weights))
    drafts = []
    for recording in (False, True):
        drafter = DSparkDrafter(head, target, recording)
        drafter.commit(target.prefill(target.start(), [5, 6, 7]))
        drafts.append(drafter.draft([5, 6, 7, 8], 4, make_law(temperature), torch.Generator().manual_seed(0)))
    found, raw = (np.log(np.array(d.confidences) / (1 - np.array(d.confidences))) for d in drafts)
    expected = raw / np.array(TINY_FIT.temperatures) + np.array(TINY_FIT.biases) + np.array(weights) * np.array(drafts[1].margins)
    assert found == pytest.approx(expected, abs=1e-3) and drafts[0].tokens == drafts[1].tokens


@pytest.mark.parametrize("T", [0.0, 1.0])
def test_no_token_depends_on_a_confidence(T, target):
    head, ids = tiny_head(target), [5, 9, 17, 3]
    plain = generate(target, head, ids, 40, temperature=T, seed=3)
    head.calibration = tiny_calibration(head, target, replace(TINY_FIT, temperatures=(100.0, 0.01, 50.0, 0.1)))
    calibrated = generate(target, head, ids, 40, temperature=T, seed=3)
    assert [r.confidences for r in calibrated.rounds_log] != [r.confidences for r in plain.rounds_log]
    assert [r.uncalibrated for r in calibrated.rounds_log] == [r.confidences for r in plain.rounds_log]
    same = [[replace(r, confidences=None, uncalibrated=None) for r in result.rounds_log] for result in (calibrated, plain)]
    assert same[0] == same[1]
    if T == 0:  # a plan may read them: other rounds, the same text
        assert generate(target, head, ids, 40, plan=Always(threshold(0.5))).token_ids == plain.token_ids


def edited(path, change) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


DAMAGE = {
    "no object": (lambda path: path.write_text("[]"), "is damaged"),
    "no JSON": (lambda path: path.write_text('{"fits": '), "not JSON"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot read"),
    "another format": (lambda path: edited(path, lambda raw: raw.update(format=3)), "has format 3"),
    "no fits": (lambda path: edited(path, lambda raw: raw.update(fits=[])), "holds no fit"),
    "a fit without rounds": (lambda path: edited(path, lambda raw: raw["fits"][0].pop("rounds")), "a fit has"),
    "too few temperatures": (lambda path: edited(path, lambda raw: raw["fits"][0]["temperatures"].pop()), "4 numbers were expected"),
    "a text": (lambda path: edited(path, lambda raw: raw["fits"][0]["temperatures"].__setitem__(1, "2")), "'2' among the temperatures"),
    "zero": (lambda path: edited(path, lambda raw: raw["fits"][1]["temperatures"].__setitem__(1, 0)), "0 among the temperatures"),
    "no number": (lambda path: edited(path, lambda raw: raw["fits"][0]["acceptance"].__setitem__(1, float("nan"))), "nan among the"),
    "no law": (lambda path: edited(path, lambda raw: raw["fits"][0].update(temperature=None)), "temperature is None"),
    "half a round": (lambda path: edited(path, lambda raw: raw["fits"][0].update(rounds=300.5)), "rounds is 300.5"),
    "another target": (lambda path: edited(path, lambda raw: raw.update(target_sha256="0")), "another target"),
    "another head": (lambda path: edited(path, lambda raw: raw.update(head_sha256="0")), "another head"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_calibration_is_refused_with_the_way_out(damage, folder, target):
    act, says = DAMAGE[damage]
    act(folder / "calibration.json")
    with pytest.raises(HeadError, match=says) as caught:
        load_head(folder, target)
    assert "calibration.json" in caught.value.message and "delete it, or calibrate again" in caught.value.hint
    load_head(folder, target, calibrated=False)


def test_another_precision_of_the_target_is_the_same_target(folder, target):
    edited(folder / "calibration.json", lambda raw: raw.update(target_sha256="0", precision="bfloat16"))
    assert load_head(folder, target).calibration is not None


def test_a_full_disk_leaves_the_good_calibration(folder, target, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(self, text, encoding=None):
        self.write_bytes(text[:20].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(HeadError, match="No space left"):
        write_calibration(load_head(folder, target).calibration, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_calibration_that_is_a_link_is_written_where_it_points(folder, target, tmp_path):
    away, calibration = tmp_path / "away.json", load_head(folder, target).calibration
    (folder / "calibration.json").rename(away)
    (folder / "calibration.json").symlink_to(away)
    before = away.read_bytes()
    away.write_text("old")
    refuse_unwritable(folder)
    write_calibration(calibration, folder)
    assert (folder / "calibration.json").is_symlink() and away.read_bytes() == before


def test_a_calibration_left_half_written_by_a_kill_is_not_taken_up(folder, target):
    (folder / "calibration.json").rename(folder / "calibration.json.partial")
    save_head(tiny_head(target, seed=1), target, folder, list(range(3, 40)), {}, "# card\n")
    assert not list(folder.glob("calibration*"))


def test_a_pair_is_measured_on_prompts_not_fitted_on(target):
    head = tiny_head(target)
    prompts = [([3 + i, 5, 9], "even" if i % 2 == 0 else "odd") for i in range(4)]
    found, reports = calibrate(target, head, [*prompts, prompts[0]], [Settings(1.0)], max_new_tokens=80)
    (fit,), (report,) = found.fits, reports
    assert fit == report.fit and fit.prompts == 4 and fit.rounds >= 200 and fit.held_out_rounds < fit.rounds
    assert [f["rounds"] for f in report.before] == [f["rounds"] for f in report.after] == [f["rounds"] for f in report.margin]
    assert all(f["ece"] == f["brier"] == 0 for f in report.oracle)
    assert sum(found["before"][0]["rounds"] for found in report.sets.values()) == report.before[0]["rounds"]
    head.calibration = found
    assert calibrate(target, head, prompts, [Settings(1.0)], max_new_tokens=80)[0] == found  # not of what is calibrated already


def test_what_cannot_be_calibrated_is_refused(target):
    head, prompts = tiny_head(target), [([3, 4], "a"), ([5, 6, 7], "a")]
    with pytest.raises(SettingError, match="rounds at T=1 are too few") as caught:
        calibrate(target, head, prompts, [Settings(1.0)], max_new_tokens=20)
    assert "more prompts" in caught.value.hint
    with pytest.raises(SettingError, match="1 different prompts"):
        calibrate(target, head, prompts[:1] * 5)
    with pytest.raises(PromptError, match=r"prompt 1 \(set a\).*exceeds"):
        calibrate(target, head, prompts, max_new_tokens=target.max_context - 2)
    head.confidence_head = None
    with pytest.raises(HeadError, match="no confidence head"):
        calibrate(target, head, prompts)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny target, a head for it, and prompts."""
    root = save_tiny_pair(tmp_path_factory.mktemp("calibrate"))
    lines = [json.dumps({"prompt": f"number {i}", "set": "ab"[i % 2]}) for i in range(8)]
    (root / "p.jsonl").write_text("\n".join(lines))
    return root


def test_the_command_writes_what_loads_and_serving_says_what_it_was_fitted_for(place, capsys, tmp_path):
    head = shutil.copytree(place / "head", tmp_path / "head")
    (head / "calibration.json").write_text("{")  # damage must not stand in the way of calibrating again
    common = ["--prompts", place / "p.jsonl", "--max-new-tokens", 40, "--top-k", 40]
    code, out, _ = run(capsys, "calibrate", head, "--target", place / "target", *common, "--json")
    document = json.loads(out.splitlines()[-1])
    assert code == 0 and "position 4" in out and "margin, mean" in out and "T=1, top-k 40" in out
    assert document["calibration"] == json.loads(json.dumps(asdict(read_calibration(head, 4))))
    assert [(fit["temperature"], fit["top_k"]) for fit in document["calibration"]["fits"]] == [(0.0, 0), (1.0, 40)]
    assert all(report["sets"].keys() == {"a", "b"} for report in document["reports"])
    for T, says in (("0", ""), ("0.7", "calibrated for T=0 and T=1; T=0.7 uses the fit for T=1\n")):
        code, _, err = run(capsys, "generate", place / "target", "hi", "--head", head, "--max-new-tokens", 4, "--temperature", T)
        assert code == 0 and says in err and ("calibrated for" in err) == bool(says)
    code, out, _ = run(capsys, "inspect", head)
    assert code == 0 and "expected calibration error" in out
    code, out, _ = run(capsys, "inspect", head, "--json")
    assert json.loads(out)["calibration"]["fits"] == document["calibration"]["fits"]


def test_without_prompts_the_target_invents_some(place, capsys, tmp_path):
    head = shutil.copytree(place / "head", tmp_path / "head")
    code, out, _ = run(
        capsys, "calibrate", head, "--target", place / "target", "--num-prompts", 8, "--max-new-tokens", 45, "--temperature", 1, "--bias"
    )
    assert code == 0 and "math" in out
    (fit,) = read_calibration(head, 4).fits
    assert fit.temperature == 1.0 and any(fit.biases) and not any(fit.margin_weights)
    code, _, _ = run(capsys, "calibrate", head, "--target", place / "target", "--num-prompts", 8, "--max-new-tokens", 45, "--margin")
    assert code == 0 and all(any(fit.margin_weights) for fit in read_calibration(head, 4).fits)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--max-new-tokens", 2], "too few to calibrate on"),
        (["--num-prompts", 5], "--num-prompts cannot take effect"),
        (["--temperature", -1], "--temperature is -1.0"),
        (["--top-p", 0], "--top-p is 0.0"),
        (["--max-new-tokens", 600], "exceeds the target's context"),
        (["--max-new-tokens", 0], "--max-new-tokens is 0"),
    ],
)
def test_a_mistake_gives_one_message_and_changes_nothing(place, capsys, more, says):
    code, out, err = run(capsys, "calibrate", place / "head", "--target", place / "target", "--prompts", place / "p.jsonl", *more)
    assert code == 2 and out == "" and says in err and err.count("error:") == 1
    assert not list((place / "head").glob("*calibration*"))


def test_a_folder_closed_to_the_user_is_said_before_anything_is_measured(place, capsys, monkeypatch):
    def closed(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.touch", closed)
    monkeypatch.setattr("dspark.target.load.load_target", lambda *args, **kwargs: pytest.fail("the target was loaded"))
    code, _, err = run(capsys, "calibrate", place / "head", "--target", place / "target", "--prompts", place / "p.jsonl")
    assert code == 2 and "cannot write to" in err and "copy the head" in err


def test_a_fit_that_is_worse_than_none_is_said():
    fit = Fit(0.0, 0, 1.0, (1.0, 2.0), (0.0, 0.0), (0.0, 0.0), (0.5, 0.5), (0.1, None), (0.3, None), 400, 200, 20)
    better = replace(fit, temperature=1.0, ece_after=(0.05, None))
    said = doubts(Calibration("t", "float32", "", "", (fit, better)))
    assert len(said) == 1 and "T=0" in said[0] and "30.0% against 10.0%" in said[0]
