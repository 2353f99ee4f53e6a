"""The report of a bench run: its figures, those replayed from its trace, and one page that shows them beside the paper's."""

import html
import json
from collections.abc import Sequence
from dataclasses import replace as with_changes
from pathlib import Path

from dspark.core.planner import survivals_of
from dspark.errors import SettingError
from dspark.measure.replay import COMPARED, CONCURRENCY, EXAMPLE_COSTS, measured, read_costs, replay
from dspark.measure.trace import Trace

CUTS = [round(0.1 * n, 1) for n in range(10)]
BINS = 10
REPORT_FILES = ("index.html", "report.json")


def figures(modes: dict, trace: Trace, made_by: dict, heads: dict[str, dict]) -> dict:
    """All that the page shows. `modes` is the aggregate of a bench run that holds `plain`, `heads` tells the shapes of modes' heads."""
    by_set = {name: with_changes(trace, requests=tuple(r for r in trace.requests if r.set == name)) for name in modes["plain"]["sets"]}
    about, example = read_costs(EXAMPLE_COSTS)
    drafting = {mode: found for mode, found in modes.items() if found["acceptance_by_position"]}
    return {
        **made_by,
        "modes": modes,
        "acceptance": {mode: found["acceptance_by_position"] for mode, found in drafting.items()},
        "speed": {mode: {name: speed(found) for name, found in with_all(modes[mode])} for mode in modes if mode != "plain"},
        "thresholds": {name: [sweep(part, cut) for cut in CUTS] for name, part in {"all": trace, **by_set}.items()},
        "lengths": {name: [at_length(part, n) for n in range(1, trace.block_size + 1)] for name, part in {"all": trace, **by_set}.items()},
        "heads": {mode: {**heads[mode], "tau": modes[mode]["tau"]} for mode in modes if mode in heads},
        "reliability": [reliability_of(trace, k) for k in range(trace.block_size)],
        "concurrency": {
            "this machine's costs, extrapolated: not a measurement": [
                replay(trace, plan, n, measured(trace.costs)).figures() for plan in COMPARED for n in CONCURRENCY
            ],
            "example costs, a formula: not a measurement": [
                replay(trace, plan, n, lambda num_tokens: example).figures() for plan in COMPARED for n in CONCURRENCY
            ],
        },
        "example_costs": about,
    }


def with_all(found: dict) -> list[tuple[str, dict]]:
    return [("all", found), *found["sets"].items()]


def speed(found: dict) -> dict:
    """Tau, the ratio to plain decoding, and the share of plain decoding's time that is saved: medians and quartiles over prompts."""
    median = found["ratio_to_plain"]["median"]
    ratio = {"median": median, "quartiles": found["ratio_to_plain"]["quartiles"] or [median] * 2}  # of too few prompts: no whiskers
    saved = {"median": 1 - 1 / median, "quartiles": [1 - 1 / each for each in ratio["quartiles"]]}
    return {"tau": found["tau"], "ratio": ratio, "saved": saved}


def sweep(trace: Trace, cut: float) -> dict:
    found = replay(trace, f"threshold:{cut}").figures()
    return {"cut": cut, "acceptance": found["acceptance"], "tau": found["tau"]}


def at_length(trace: Trace, length: int) -> dict:
    plain, found = replay(trace, "plain").figures(), replay(trace, f"length:{length}").figures()
    return {"length": length, "tau": found["tau"], "ratio": found["tokens_per_second"] / plain["tokens_per_second"]}


def reliability_of(trace: Trace, k: int) -> dict:
    """How often the first k+1 drafted tokens all stood, by the product of their confidences, over the rounds that drafted so far."""
    rounds = [r for request in trace.requests for r in request.rounds if len(r.confidences) > k]
    estimates, stood = [survivals_of(r.confidences)[k] for r in rounds], [r.num_accepted > k for r in rounds]
    found = {"position": k + 1, "rounds": len(rounds), "bins": reliability(estimates, stood), "ece": calibration_error(estimates, stood)}
    if all(r.uncalibrated for r in rounds):
        before = [survivals_of(r.uncalibrated)[k] for r in rounds]
        found["before"] = {"bins": reliability(before, stood), "ece": calibration_error(before, stood)}
    return found


def reliability(probabilities: Sequence[float], outcomes: Sequence[bool]) -> list[dict]:
    """Mean estimate and frequency in each of ten equal bins of the estimate that is not empty."""
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for probability, outcome in zip(probabilities, outcomes, strict=True):
        bins[min(int(BINS * probability), BINS - 1)].append((probability, outcome))
    return [
        {"estimate": sum(p for p, _ in each) / len(each), "frequency": sum(o for _, o in each) / len(each), "rounds": len(each)}
        for each in bins
        if each
    ]


def calibration_error(probabilities: Sequence[float], outcomes: Sequence[bool]) -> float | None:
    """By `dspark.measure.calibration.ece`; None where the package has no such module or there is nothing to judge."""
    try:
        import numpy as np

        from dspark.measure.calibration import ece
    except ImportError:
        return None
    return ece(np.array(probabilities), np.array(outcomes)) if len(probabilities) else None


def write_report(data: dict, table: str, folder: Path) -> None:
    """`index.html`, which needs nothing beside it, and `report.json`. Raises `SettingError` where they cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in zip(REPORT_FILES, (page(data, table), json.dumps(data, indent=1)), strict=True):
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise SettingError(f"cannot write the report to {folder}: {error.strerror}", "name another folder") from error


def page(data: dict, table: str) -> str:
    from dspark.measure.plots import PLOTS, STYLE, draw

    machine, arguments = data["machine"], data["arguments"]
    made = (
        f"{machine['processor']}, {machine['threads']} threads, {arguments['dtype']}, batch 1, T={arguments['temperature']:g}, "
        f"{arguments['max_new_tokens']} new tokens, torch {machine['torch']}, transformers {machine['transformers']}"
    )
    target = html.escape(str(arguments["target"]))
    shown = "\n".join(f"<h2>{title}</h2>\n<p>{text}</p>\n{draw(plot, data, title)}" for title, text, plot in PLOTS)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>dspark: {target}</title>\n'
        f'<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark"><style>{STYLE}</style></head>\n'
        f"<body><h1>dspark bench: {target}</h1>\n<p>{html.escape(made)}. All figures are in <code>report.json</code>.</p>\n"
        f"<pre>{html.escape(table)}</pre>\n{shown}\n</body></html>\n"
    )
