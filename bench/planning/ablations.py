"""What planning is worth, by what it goes by: sources of confidences x planners x curves of cost, by replay.

    python bench/planning/ablations.py record TARGET --head HEAD --prompts FILE.jsonl ... --out ROUNDS.npz [--temperature T]
    python bench/planning/ablations.py fit FITTED.npz ROUNDS.npz
    python bench/planning/ablations.py replay FITTED.npz ROUNDS.npz [--costs TRACE.jsonl]

`record` decodes every prompt with all drafted tokens verified, and keeps confidence logits, margins and what was accepted.
`fit` fits each source on the rounds of FITTED and prints how good its estimates are on those of ROUNDS (one file given twice: on the
halves of its prompts). `replay` then replays each planner on them, one request at a time: sums of costs, no measurements. The costs are
those of a trace of this machine (`dspark bench --trace`), and two made up, in plain steps: one smooth, one a stair.

Sources: raw; temperatures (the paper's STS); bias (a logistic curve of the logit); margin (a curve of the logit and of the margin between
the two best draft logits); margin alone; oracle (1 where a token stood, else 0: no planner can have it, it is the bound)."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dspark.core.planner import Costs, CostTable
from dspark.measure.calibrate import Settings, halves, mean, record
from dspark.measure.calibration import Curves, Rounds, figures, fit_curves, fit_temperatures, margin_survival, survival
from dspark.measure.replay import replay
from dspark.measure.trace import Drafted, Request, Trace, read_trace
from dspark.prompts import read_prompts

PLANS = ("fixed", "length:2", "length:4", "threshold:0.2", "threshold:0.5", "early-stop", "lagged", "auto")
ROWS = 8
MADE_UP = {
    "smooth": Costs(0.3, tuple(1 + 0.1 * k for k in range(ROWS))),
    "stair": Costs(0.3, (1.0, 1.4, 1.4, 1.4, 1.8, 1.8, 1.8, 1.8)),  # rows in fours
}
SOURCES: dict[str, Callable[[Rounds, Rounds], np.ndarray]] = {
    "raw": lambda fitted, rounds: survival(rounds),
    "temperatures": lambda fitted, rounds: survival(rounds, Curves.temperatures_only(fit_temperatures(fitted))),
    "bias": lambda fitted, rounds: survival(rounds, fit_curves(fitted)),
    "margin": lambda fitted, rounds: survival(rounds, fit_curves(fitted, with_margin=True)),
    "margin alone": margin_survival,
    "oracle": lambda fitted, rounds: np.where(
        np.isnan(rounds.logits_RG), np.nan, rounds.num_accepted_R[:, None] > np.arange(rounds.logits_RG.shape[1])
    ),
}


def write_rounds(options: argparse.Namespace) -> None:
    from dspark.head.folder import load_head
    from dspark.target.load import load_target

    torch.set_num_threads(options.threads)
    target = load_target(options.target, options.dtype)
    head = load_head(options.head, target, calibrated=False)
    prompts = [(target.prompt_ids(p.content), str(p.extra.get("set") or file.stem)) for file in options.prompts for p in read_prompts(file)]

    def progress(stage: str, done: int, total: int) -> None:
        print(f"\r{stage}: {done} of {total}", end="", file=sys.stderr, flush=True)

    rounds = record(target, head, prompts, Settings(options.temperature), options.max_new_tokens, progress)
    np.savez(
        options.out, logits=rounds.logits_RG, margins=rounds.margins_RG, accepted=rounds.num_accepted_R, prompts=rounds.prompts_R,
        sets=[name for _, name in prompts], lengths=[len(ids) for ids, _ in prompts],
    )  # fmt: skip


def read_rounds(path: Path) -> tuple[Rounds, Any]:
    found = np.load(path)
    return Rounds(found["logits"], found["margins"], found["accepted"], found["prompts"]), found


def pair(options: argparse.Namespace) -> tuple[Rounds, Rounds, Any]:
    """Rounds to fit on, rounds to look at, and what else the file of the latter holds."""
    fitted, _ = read_rounds(options.fitted)
    rounds, file = read_rounds(options.rounds)
    if options.fitted == options.rounds:
        first, second = halves(file["sets"].tolist())
        return rounds.of(first), rounds.of(second), file
    return fitted, rounds, file


def fit(options: argparse.Namespace) -> None:
    fitted, rounds, _ = pair(options)
    print(f"fitted on {len(fitted)} rounds, measured on {len(rounds)}; means over positions")
    print(f"{'source':<14} {'ECE':>7} {'chance':>7} {'AUROC':>6} {'Brier':>6}")
    for name, estimates in SOURCES.items():
        found = figures(estimates(fitted, rounds), rounds.num_accepted_R)
        cells = [mean(found, figure) or 0.0 for figure in ("ece", "chance", "auroc", "brier")]
        print(f"{name:<14} {cells[0]:>7.2%} {cells[1]:>7.2%} {cells[2]:>6.3f} {cells[3]:>6.3f}")


def as_trace(rounds: Rounds, estimates_RG: np.ndarray, costs: CostTable, file: Any) -> Trace:
    """The rounds with confidences whose running products are the estimates."""
    before_RG = np.concatenate([np.ones((len(rounds), 1)), estimates_RG[:, :-1]], axis=1)
    confidences_RG = np.divide(estimates_RG, before_RG, out=np.zeros_like(before_RG), where=before_RG > 0)
    requests = []
    for prompt in dict.fromkeys(rounds.prompts_R.tolist()):
        mine = rounds.prompts_R == prompt
        drafted = tuple(
            Drafted(tuple(row[~np.isnan(row)].tolist()), int(accepted))
            for row, accepted in zip(confidences_RG[mine], rounds.num_accepted_R[mine], strict=True)
        )
        num_tokens = sum(r.num_accepted + 1 for r in drafted)
        requests.append(Request(prompt, str(file["sets"][prompt]), int(file["lengths"][prompt]), num_tokens, drafted))
    return Trace(rounds.logits_RG.shape[1], costs, tuple(requests), {})


def replay_all(options: argparse.Namespace) -> None:
    fitted, rounds, file = pair(options)
    tables = {name: CostTable((0,), (costs,)) for name, costs in MADE_UP.items()}
    if options.costs:
        tables = {"this machine": read_trace(options.costs).costs, **tables}
    for curve, costs in tables.items():
        print(f"\n{curve}: {', '.join(f'{row / costs.at(256).plain:.2f}' for row in costs.at(256).rows[:ROWS])} plain steps by rows, a draft "
              f"{costs.at(256).draft / costs.at(256).plain:.2f}; times plain decoding, one request")  # fmt: skip
        print(f"{'source':<14} " + " ".join(f"{plan:>13}" for plan in PLANS))
        for name, estimates in SOURCES.items():
            trace = as_trace(rounds, estimates(fitted, rounds), costs, file)
            plain = replay(trace, "plain").figures()["tokens_per_second"]
            print(f"{name:<14} " + " ".join(f"{replay(trace, plan).figures()['tokens_per_second'] / plain:>13.3f}" for plan in PLANS))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    recording = commands.add_parser("record")
    recording.add_argument("target")
    recording.add_argument("--head", type=Path, required=True)
    recording.add_argument("--prompts", type=Path, action="append", required=True)
    recording.add_argument("--out", type=Path, required=True)
    recording.add_argument("--temperature", type=float, default=0.0)
    recording.add_argument("--max-new-tokens", type=int, default=128)
    recording.add_argument("--dtype", default="bfloat16")
    recording.add_argument("--threads", type=int, default=torch.get_num_threads())
    recording.set_defaults(run=write_rounds)
    for name, run in (("fit", fit), ("replay", replay_all)):
        command = commands.add_parser(name)
        command.add_argument("fitted", type=Path)
        command.add_argument("rounds", type=Path)
        command.set_defaults(run=run)
        if name == "replay":
            command.add_argument("--costs", type=Path, help="a trace made on this machine")
    options = parser.parse_args()
    options.run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
