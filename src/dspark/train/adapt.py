"""`dspark adapt`: a head goes on with another target of the same shape, a fine-tune or a quantisation of its own, from that
target's answers. Real rounds on held-out prompts say whether it got better; a head that did not is not written."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dspark.config import TrainConfig
from dspark.errors import HeadError, SettingError
from dspark.head.folder import dspark_only, golden_file, load_head, read_tensors, refuse_bundled, save_head
from dspark.head.golden import features_likeness, read_features
from dspark.head.head import Head
from dspark.profiling import profile
from dspark.prompts import Prompt, read_json
from dspark.target.target import Target
from dspark.train.card import write_card
from dspark.train.estimate import Done, done_before, estimate, minutes
from dspark.train.features import FeatureStore
from dspark.train.lowrank import add_low_rank, matrices, merge_low_rank
from dspark.train.remote import Server
from dspark.train.run import (
    Bar,
    begin_or_resume,
    brought_answers,
    count_rounds,
    digest,
    finished,
    golden_ids,
    held_out_calibration,
    make_answers,
    origin,
    refuse_beforehand,
    renewed_vocabulary,
    round_figures,
    run_steps,
    say,
    settings,
    token_counts,
)
from dspark.train.trainer import measure
from dspark.train.warmstart import with_vocabulary

JUDGED_PROMPTS = 32  # held-out ones, decoded before and after; twice as many as after training, for a difference is judged
PROFILE_CONTEXT, PROFILE_SECONDS = 300, 8.0
Counts = dict[str, list[tuple[int, int]]]  # by law: (tokens, rounds) of each prompt


def adapt(
    target: Target,
    out: Path,
    config: TrainConfig,
    source: Path,
    low_rank: int = 0,
    prompts: Sequence[Prompt] | None = None,
    answers: Sequence[Path] = (),
    resume: bool = False,
    command: str = "",
    server: Server | None = None,
) -> dict:
    """Train the head in `source` on for `target` and write it to `out` if held-out rounds are better for it; returns its provenance.

    `adapted` in it holds the figures of both heads; `written` there says whether `out` is a head now. `low_rank`: only updates of
    this rank are learned, beside the matrices; 0: all weights. The rest is as in `train`. Raises the `UserError` family; a head of
    another shape, vocabulary or tokenizer is refused."""
    work = out / "progress"
    refuse_beforehand(target, config, {}, prompts, answers, server)
    refuse_bundled(source)
    given = dspark_only(load_head(source, target, calibrated=False, same_target=False), source)
    if low_rank and not matrices(given, low_rank):
        raise SettingError(f"--low-rank is {low_rank}: no matrix of this head is that large", "use a smaller rank, or leave it out")
    brought = brought_answers(target, config, prompts, answers)
    start = [digest(parameter) for parameter in given.parameters()]
    described = settings(target, config, {}, prompts, answers, start, server) | {"low_rank": low_rank}
    begin_or_resume(out, work, described, resume, command)
    done = finished(out)
    if done is not None and done.get("adapted"):
        say(f"the run in {out} is finished: nothing is left to do")
        return done | {"finished_before": True}
    bar = Bar()
    say(estimate(target, config, vars(given.config), prompts, answers, server is not None, done_before(work) if resume else Done()))
    records = brought or make_answers(target, config, prompts, work, bar, server)
    judged = records[: min(config.held_out, JUDGED_PROMPTS)]
    before = once(work / "rounds-before.json", lambda: count_rounds(target, given, judged, bar, " of the head as it is"))
    started = time.time()
    draft_ids = renewed_vocabulary(target, given.draft_ids, token_counts(records[config.held_out :]))
    num_new = len(draft_ids) - int(torch.isin(draft_ids, given.draft_ids.cpu()).sum())
    renewed = with_vocabulary(given, target, draft_ids) if num_new else given
    head, store, curve = learn(target, renewed, records, config, low_rank, work, bar)
    seconds = round(time.time() - started)
    provenance = origin(target, config, records, command) | {
        "seconds_last_start": seconds,
        "curve": curve,
        "held_out_teacher_forced": measure(head, target, store, config, config.held_out),
    }
    # Judged as it will be served: rounded, read back, its golden vectors replayed.
    save_head(head, target, work / "candidate", golden_ids(records), provenance, write_card(head, target, provenance, None))
    served = dspark_only(load_head(work / "candidate", target), work)
    after = count_rounds(target, served, judged, bar, " of the adapted head")
    rounds = round_figures(after)
    gain, error = difference(before, after)
    provenance |= {
        "held_out_rounds": rounds,
        "adapted": {
            **whence(source, served, target),
            "low_rank": low_rank,
            "new_draft_tokens": num_new,
            "before": round_figures(before),
            "after": rounds,
            "gain": round(gain, 3),
            "standard_error": round(error, 3),
            **expected_speed(target, served, before, after, seconds),
            "written": gain > error,
        },
    }
    if gain > error:
        head.calibration = held_out_calibration(target, served, records[: config.held_out], bar)
        save_head(head, target, out, golden_ids(records), provenance, write_card(head, target, provenance, rounds))
    return provenance


def learn(
    target: Target, given: Head, records: Sequence[dict], config: TrainConfig, low_rank: int, work: Path, bar: Bar
) -> tuple[Head, FeatureStore, list[dict]]:
    """Train all weights of the head, or low-rank updates that are merged at the end; the curve beside it."""
    head = given.float().requires_grad_(True)
    if low_rank:
        add_low_rank(head, low_rank, config.seed)
    target.tap(head.config.target_layer_ids)
    store = FeatureStore(target, records, work / "cache", config.teacher_tokens, config.cache_gigabytes, config.feature_dtype)
    curve = run_steps(head, target, store, config, work, bar)
    merge_low_rank(head)
    return head, store, curve


def once(path: Path, measured: Callable[[], Counts]) -> Counts:
    """What was measured in an earlier start of this run, or now."""
    hint = "delete it and continue with --resume: it is measured again"
    if not path.exists():
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(measured()))
        os.replace(partial, path)
    found = read_json(path, HeadError, hint)
    try:
        return {law: [(int(tokens), int(rounds)) for tokens, rounds in found[law]] for law in ("t0", "t1")}
    except (TypeError, KeyError, ValueError) as error:
        raise HeadError(f"{path} does not hold tokens and rounds by prompt", hint) from error


def whence(source: Path, head: Head, target: Target) -> dict:
    """The head this one came from: its folder's name, its weights' digest, its target, and how near the new target's features are.
    `head` has the taps of both."""
    file, weights = golden_file(source), sorted(source.glob("model*.safetensors"))
    origin = file.with_name("provenance.json")
    record = read_json(origin, HeadError, "restore it") if origin.exists() else {}
    golden = read_tensors(file) if file.exists() else None
    likeness = None if golden is None else features_likeness(golden, read_features(head, target, golden["ids"].tolist())).min().item()
    return {
        "from": source.resolve().name,
        "from_sha256": hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest(),
        "from_target": record.get("target") if isinstance(record, dict) else None,
        "features_agree": None if likeness is None else round(likeness, 3),
    }


def tau_of(counts: Counts) -> float:
    """Tokens a round over both laws."""
    pairs = [pair for each in counts.values() for pair in each]
    return sum(n for n, _ in pairs) / max(1, sum(r for _, r in pairs))


def difference(before: Counts, after: Counts) -> tuple[float, float]:
    """How many tokens a round more, over both laws, and its standard error (jackknife over prompts, each with both heads)."""

    def gain(left_out: int | None) -> float:
        kept = [{law: [p for i, p in enumerate(each) if i != left_out] for law, each in counts.items()} for counts in (before, after)]
        return tau_of(kept[1]) - tau_of(kept[0])

    without = torch.tensor([gain(i) for i in range(len(before["t0"]))], dtype=torch.float64)
    n = len(without)
    error = ((without - without.mean()).square().sum() * (n - 1) / n).sqrt().item() if n > 1 else 0.0
    return gain(None), error


def expected_speed(target: Target, head: Head, before: Counts, after: Counts, seconds: float) -> dict:
    """What the gain is worth on this machine, by what a plain step and a round with all drafts verified cost in it now.

    `repaid_after_tokens`: how many tokens it takes until the seconds of training are won back; None if never."""
    context = min(PROFILE_CONTEXT, target.max_context - 32)
    costs = profile(target, head, context, seconds=PROFILE_SECONDS, with_bandwidth=False)
    assert costs.break_even is not None
    # A planner parks a head that loses: plain decoding is the least.
    speeds = [max(1.0, tau_of(counts) / costs.break_even) for counts in (before, after)]
    saved = 1e-3 * costs.rows[1] * (1 / speeds[0] - 1 / speeds[1])  # seconds a token
    return {
        "break_even": round(costs.break_even, 3),
        "times_plain_before": round(speeds[0], 3),
        "times_plain_after": round(speeds[1], 3),
        "repaid_after_tokens": round(seconds / saved) if saved > 0 else None,
    }


def gain_report(provenance: dict) -> str:
    """The expected gain for people."""
    found = provenance["adapted"]
    lines = [f"{found['from']} ({found['from_sha256'][:12]}) adapted to {provenance['target']}"]
    if found["features_agree"] is not None:
        lines[0] += f", whose features agree with those it was made for to {found['features_agree']:.2f}"
    if found.get("new_draft_tokens"):
        lines.append(f"{found['new_draft_tokens']:,} of its draft tokens gave way to such as the new target says")
    lines.append(f"{'held-out rounds':<20} {'before':>8} {'after':>8}")
    for law in ("t0", "t1"):
        lines.append(f"{f'tau at T={law[1]}':<20} {found['before'][f'tau_{law}']:>8.2f} {found['after'][f'tau_{law}']:>8.2f}")
    lines.append(f"{'times plain':<20} {found['times_plain_before']:>8.2f} {found['times_plain_after']:>8.2f}   expected, both laws")
    lines.append(
        f"gain {found['gain']:+.3f} tokens a round (standard error {found['standard_error']:.3f}, {found['after']['prompts']} prompts)"
    )
    lines.append(f"a round costs {found['break_even']:.2f} plain tokens on this machine: more of them a round, and the head pays")
    repaid = found["repaid_after_tokens"]
    worth = "they do not pay here yet" if repaid is None else f"repaid after {repaid:,} generated tokens"
    lines.append(f"{minutes(provenance['seconds_last_start'])} of training since the last start; {worth}")
    return "\n".join(lines)
