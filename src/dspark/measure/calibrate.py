"""`dspark calibrate`: record rounds by real decoding, fit on half of the prompts, measure on the other half."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from dspark.core.calibration import Calibration, Fit
from dspark.drafters import DSparkDrafter
from dspark.errors import HeadError, PromptError, SettingError
from dspark.generation import check_request, generate, make_law
from dspark.head.calibration import head_digest
from dspark.head.head import Head
from dspark.measure.calibration import Curves, Rounds, acceptance, figures, fit_curves, fit_temperatures, margin_survival, survival
from dspark.target.target import Target

LEAST_ROUNDS = 200  # half of them are fitted; fewer leave most of the 20 bins of a late position empty
MORE = "give more prompts, or raise --max-new-tokens"


@dataclass(frozen=True)
class Settings:
    """A sampling law to calibrate for, in the words of `generate`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


LAWS = (Settings(0.0), Settings(1.0))
CURVES = {  # what confidences are fitted with
    "temperatures": lambda rounds: Curves.temperatures_only(fit_temperatures(rounds)),
    "bias": fit_curves,
    "margin": lambda rounds: fit_curves(rounds, with_margin=True),
}


@dataclass(frozen=True)
class Report:
    """One law's fit and the figures by position on the prompts not fitted on: `before` and `after` the fit, beside the
    baseline `margin` and an `oracle` that knows the outcome; `sets` has before and after by the prompts' sets."""

    fit: Fit
    before: list[dict]
    after: list[dict]
    margin: list[dict]
    oracle: list[dict]
    sets: dict[str, dict] = field(default_factory=dict)


def calibrate(
    target: Target,
    head: Head,
    prompts: Sequence[tuple[list[int], str]],
    laws: Sequence[Settings] = LAWS,
    max_new_tokens: int = 128,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    curve: str = "temperatures",
) -> tuple[Calibration, list[Report]]:
    """Fit the head's confidences to what is accepted after these prompts (ids, set name), under each law: temperatures
    as in the paper, or another of `CURVES`.

    Raises `HeadError` for a head without confidences, the `UserError` family for a request that cannot be served, both
    before anything is measured, and `SettingError` when the rounds are too few to fit."""
    if head.confidence_head is None:
        raise HeadError("this head has no confidence head: there is nothing to calibrate")
    prompts = list({tuple(ids): (ids, name) for ids, name in prompts}.values())  # one copy: no prompt on both sides
    if len(prompts) < 2:
        raise SettingError(f"{len(prompts)} different prompts cannot be split in two halves", "give more prompts")
    for settings in laws:
        make_law(**asdict(settings))
    for index, (ids, name) in enumerate(prompts):
        try:
            check_request(target, ids, max_new_tokens, index, ())
        except PromptError as error:
            raise PromptError(f"prompt {index} (set {name}): {error.message}", error.hint) from error
    sets = [name for _, name in prompts]
    reports = [fit_law(record(target, head, prompts, law, max_new_tokens, progress), law, sets, curve) for law in laws]
    fits = tuple(report.fit for report in reports)
    return Calibration(target.name, target.precision, target.digest(), head_digest(head), fits), reports


def record(target: Target, head: Head, prompts: Sequence[tuple[list[int], str]], law: Settings, max_new_tokens: int, progress) -> Rounds:
    """The rounds of decoding every prompt under this law, all drafted tokens verified."""
    drafter = DSparkDrafter(head, target, recording=True)
    rows, size = [], head.config.block_size
    for index, (ids, _) in enumerate(prompts):
        result = generate(target, head, ids, max_new_tokens, **asdict(law), seed=index, drafter=drafter, plan="fixed")
        rows += [(r.confidences, r.margins, r.num_accepted, index) for r in result.rounds_log if r.num_drafted]
        progress(f"rounds at T={law.temperature:g}", index + 1, len(prompts))
    if len(rows) < LEAST_ROUNDS:
        raise SettingError(f"{len(rows)} rounds at T={law.temperature:g} are too few to calibrate on, {LEAST_ROUNDS} are the least", MORE)
    confidences, margins, accepted, sources = zip(*rows, strict=True)
    # sigmoid rounds to 0 and 1 beyond 16 either way; no temperature brings such logits back to the middle
    confidences_RG = np.clip(padded(confidences, size), 1e-7, 1 - 1e-7)
    return Rounds(np.log(confidences_RG / (1 - confidences_RG)), padded(margins, size), np.array(accepted), np.array(sources))


def padded(rows: Sequence[Sequence[float]], size: int) -> np.ndarray:
    """Rows [R, size], NaN behind the end of each."""
    return np.array([[*row, *[np.nan] * (size - len(row))] for row in rows])


def fit_law(rounds: Rounds, law: Settings, sets: Sequence[str], curve: str = "temperatures") -> Report:
    fitted_prompts, held_out_prompts = halves(sets)
    fitted, held_out = rounds.of(fitted_prompts), rounds.of(held_out_prompts)
    if min(len(fitted), len(held_out)) < LEAST_ROUNDS // 4:
        raise SettingError(f"the halves of the prompts gave {len(fitted)} and {len(held_out)} rounds at T={law.temperature:g}", MORE)
    size = rounds.logits_RG.shape[1]
    curves = CURVES[curve](fitted)
    before, after = before_and_after(held_out, curves)
    happened_RG = (held_out.num_accepted_R[:, None] > np.arange(size)).astype(float)
    happened_RG[np.isnan(held_out.logits_RG)] = np.nan
    fit = Fit(
        **asdict(law),
        temperatures=tuple(curves.temperatures),
        biases=tuple(curves.biases),
        margin_weights=tuple(curves.margin_weights),
        acceptance=tuple(acceptance(rounds)),
        ece_before=tuple(f["ece"] for f in before),
        ece_after=tuple(f["ece"] for f in after),
        rounds=len(rounds),
        held_out_rounds=len(held_out),
        prompts=len(sets),
    )
    by_set = {}
    for name in dict.fromkeys(sets):
        mine = held_out.of([i for i in held_out_prompts if sets[i] == name])
        if len(mine):
            by_set[name] = dict(zip(("before", "after"), before_and_after(mine, curves), strict=True))
    margin = figures(margin_survival(fitted, held_out), held_out.num_accepted_R)
    return Report(fit, before, after, margin, figures(happened_RG, held_out.num_accepted_R), by_set)


def before_and_after(rounds: Rounds, curves: Curves) -> tuple[list[dict], list[dict]]:
    return figures(survival(rounds), rounds.num_accepted_R), figures(survival(rounds, curves), rounds.num_accepted_R)


def halves(sets: Sequence[str]) -> tuple[list[int], list[int]]:
    """Prompt numbers to fit on and to measure on: a seeded order, dealt out set by set."""
    order = np.random.default_rng(0).permutation(len(sets)).tolist()
    order.sort(key=lambda index: sets[index])
    return order[::2], order[1::2]


def mean(by_position: Sequence[dict], name: str) -> float | None:
    """The mean of a figure over the positions that have it."""
    values = [figure[name] for figure in by_position if figure[name] is not None]
    return float(np.mean(values)) if values else None


def table(reports: Sequence[Report]) -> str:
    """The reports for people: by position, the mean over positions, the baselines, and the mean by set."""
    return "\n\n".join(law_table(report) for report in reports)


def law_table(report: Report) -> str:
    fit = report.fit
    law = f"T={fit.temperature:g}" + (f", top-k {fit.top_k}" if fit.top_k else "") + (f", top-p {fit.top_p:g}" if fit.top_p < 1 else "")
    lines = [f"{law}: {fit.rounds} rounds of {fit.prompts} prompts; the figures are of {fit.held_out_rounds} rounds of the half not fitted on",
             f"{'':<12} {'rounds':>6} {'accepted':>8} {'T_k':>6} {'b_k':>6} {'w_k':>6} {'ECE':>7} {'after':>7} {'chance':>7} {'AUROC':>6} {'after':>6} {'Brier':>6} {'after':>6}"]  # fmt: skip
    for k, (before, after) in enumerate(zip(report.before, report.after, strict=True)):
        cells = f"{before['rounds']:>6} {fit.acceptance[k]:>8.3f} {fit.temperatures[k]:>6.2f} {fit.biases[k]:>6.2f} {fit.margin_weights[k]:>6.2f}"
        lines.append(f"position {k + 1:<3} {cells} {compared([before], [after])}")
    lines.append(f"{'all, mean':<12} {fit.held_out_rounds:>6} {'':>8} {'':>20} {compared(report.before, report.after)}")
    for name, by_position in (("margin", report.margin), ("oracle", report.oracle)):
        lines.append(f"{name + ', mean':<12} {'':>6} {'':>8} {'':>20} {compared(None, by_position)}")
    for name, found in report.sets.items():
        lines.append(f"{name[:12]:<12} {found['before'][0]['rounds']:>6} {'':>8} {'':>20} {compared(found['before'], found['after'])}")
    return "\n".join(lines)


def compared(before: Sequence[dict] | None, after: Sequence[dict]) -> str:
    def cell(found: Sequence[dict] | None, name: str, form: str, width: int) -> str:
        value = None if found is None else mean(found, name)
        return f"{'-' if value is None else format(value, form):>{width}}" if found is not None else " " * width

    cells = [cell(before, "ece", ".2%", 7), cell(after, "ece", ".2%", 7), cell(after, "chance", ".2%", 7)]
    cells += [cell(found, name, ".3f", 6) for name in ("auroc", "brier") for found in (before, after)]
    return " ".join(cells)
