"""Speed and tau by drafter, interleaved prompt by prompt in one run, as ratios to plain decoding.

Only decoding is compared: modes take turns on each prompt, so that a machine that slows down slows them all, in an order
that changes from prompt to prompt: what ran before leaves its traces in caches and memory."""

import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dspark.core.decode import Round
from dspark.errors import PromptError, SettingError
from dspark.generation import Result, check_request, generate, make_drafter, make_planner
from dspark.head.recurrent import AnyHead
from dspark.target.target import Target

MODES = ("plain", "auto", "dspark", "dflash", "mtp", "mtp+dspark", "lookup", "hf", "hf-lookup")
SHOWN_POSITIONS = 7  # of lookup's fifteen
DRAFTER_OF = {
    "plain": "none",
    "auto": "auto",
    "dspark": "dspark",
    "dflash": "dflash",
    "mtp": "mtp",
    "mtp+dspark": "mtp+dspark",
    "lookup": "lookup",
}


@dataclass(frozen=True)
class Mode:
    """One way of decoding: one of MODES, or a head's own name, and behind an @ its plan where it has one (`dspark@length:3`)."""

    name: str
    head: AnyHead | None = None

    @property
    def kind(self) -> str:
        return kind_of(self.name)

    @property
    def plan(self) -> str | None:
        return self.name.partition("@")[2] or None


def kind_of(mode: str) -> str:
    """What it is called in MODES: a name that is not there is a head's."""
    kind = mode.partition("@")[0]
    return kind if kind in MODES else "dspark"


@dataclass
class Run:
    """One prompt in one mode, the median of its repeats in `seconds`."""

    mode: str
    index: int
    set: str
    num_tokens: int
    rounds: int
    seconds: float
    spread: list[float]
    proposed: list[int]  # times position k was verified
    accepted: list[int]  # times position k was accepted
    token_ids: list[int] = field(repr=False, default_factory=list)


def bench(
    target: Target,
    modes: Sequence[Mode],
    prompts: Sequence[tuple[list[int], str]],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    repeats: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
    watch: Callable[[str, int, Result], None] = lambda mode, index, result: None,
    top_p: float = 1.0,
) -> list[Run]:
    """Decode every prompt (ids, set name) in every mode. `watch` sees each mode's first answer to each prompt.

    Raises `SettingError` for an unknown mode or one named twice, and the `UserError` family for a request that no
    mode could serve, before anything is measured."""
    check_modes([mode.name for mode in modes], [mode.name.partition("@")[0] for mode in modes if mode.head is not None])
    for index, (ids, name) in enumerate(prompts):
        try:
            check_request(target, ids, max_new_tokens, seed + index, ())
        except PromptError as error:
            raise PromptError(f"prompt {index} (set {name}): {error.message}", error.hint) from error
    ways = {mode.name: Way(target, mode, temperature, top_p) for mode in modes}
    for way in ways.values():
        way.decode(prompts[0][0], min(8, max_new_tokens), 0)  # warms up
    runs = []
    for index, (ids, name) in enumerate(prompts):
        results: dict[str, list[Result]] = {mode.name: [] for mode in modes}
        for repeat in range(repeats):
            for mode in turns(modes, index, repeat):
                results[mode.name].append(ways[mode.name].decode(ids, max_new_tokens, seed + index))
        for mode in modes:
            watch(mode.name, index, results[mode.name][0])
        runs += [as_run(mode.name, index, name, results[mode.name]) for mode in modes]
        progress(index + 1, len(prompts))
    return runs


def turns(modes: Sequence[Mode], index: int, repeat: int) -> list[Mode]:
    """The order of a prompt's modes, shuffled, the same in every run."""
    return random.Random(f"{index} {repeat}").sample(modes, len(modes))


def check_modes(names: Sequence[str], heads: Sequence[str] = ()) -> None:
    """Raise `SettingError` for no mode, one that is neither of MODES nor a head's name, or one named twice."""
    if not names:
        raise SettingError("no mode is named", f"give some of {', '.join(MODES)}")
    for name in names:
        kind, _, plan = name.partition("@")
        if kind not in (*MODES, *heads) or (plan and (kind == "plain" or kind_of(kind) not in DRAFTER_OF)):
            known = ", ".join(dict.fromkeys([*MODES, *heads]))
            raise SettingError(f"unknown mode {name!r}", f"choose from {known}, with @PLAN behind one that drafts")
    if len(set(names)) < len(names):
        raise SettingError(f"a mode is named twice in {', '.join(names)}", "name each mode once")


class Way:
    """A mode at work. Its planner learns from prompt to prompt, at any temperature: a seed replays a whole run, not a prompt of it."""

    def __init__(self, target: Target, mode: Mode, temperature: float, top_p: float = 1.0):
        self.target, self.mode = target, mode
        self.law: dict[str, Any] = {"temperature": temperature, "top_p": top_p}
        if mode.kind in DRAFTER_OF:
            named = mode.head is not None and mode.name.partition("@")[0] not in MODES
            self.drafter = make_drafter(mode.head.kind if mode.head and named else DRAFTER_OF[mode.kind], target, mode.head)
            self.plan = make_planner(mode.plan, target, self.drafter)

    def decode(self, ids: list[int], max_new_tokens: int, seed: int) -> Result:
        if self.mode.kind not in DRAFTER_OF:
            return hf_generate(self.target, ids, max_new_tokens, seed, lookup=self.mode.kind == "hf-lookup", **self.law)
        return generate(self.target, self.mode.head, ids, max_new_tokens, seed=seed, drafter=self.drafter, plan=self.plan, **self.law)


def hf_generate(
    target: Target, ids: list[int], max_new_tokens: int, seed: int, lookup: bool, temperature: float = 0.0, top_p: float = 1.0
) -> Result:
    """transformers' own loop on the same model: the baseline most people have."""
    target.untap()
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": top_p} if temperature else {"do_sample": False}
    more = {"prompt_lookup_num_tokens": 8} if lookup else {}
    begin = time.perf_counter()
    prompt = torch.tensor([ids], device=target.device)
    output = target.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_new_tokens, **sampling, **more)
    seconds = time.perf_counter() - begin
    new = output[0, len(ids) :].tolist()
    return Result(new, "", len(new), seconds, "stop" if new and new[-1] in target.eos_ids else "length", [])


def as_run(mode: str, index: int, name: str, results: Sequence[Result]) -> Run:
    proposed, accepted = by_position([r for result in results for r in result.rounds_log])
    seconds = [r.seconds for r in results]
    first = results[0]
    return Run(
        mode,
        index,
        name,
        first.num_tokens,
        first.rounds,
        statistics.median(seconds),
        [min(seconds), max(seconds)],
        proposed,
        accepted,
        first.token_ids,
    )


def by_position(rounds: Sequence[Round]) -> tuple[list[int], list[int]]:
    """How often each position was judged (all before it accepted), and accepted."""
    size = max((r.num_planned for r in rounds), default=0)
    proposed = [sum(r.num_planned > k and r.num_accepted >= k for r in rounds) for k in range(size)]
    return proposed, [sum(r.num_planned > k and r.num_accepted > k for r in rounds) for k in range(size)]


def aggregate(runs: Sequence[Run], baseline: str = "plain") -> dict:
    """By mode, over all prompts and by set: tokens per second, tau, acceptance by position, ratio to plain.

    The ratio is the median over prompts of (tokens per second) / (tokens per second of plain),
    with its quartiles as spread, None for fewer than three prompts."""
    plain = {r.index: r for r in runs if r.mode == baseline}
    report: dict = {}
    for mode in dict.fromkeys(r.mode for r in runs):
        mine = [r for r in runs if r.mode == mode]
        report[mode] = summary(mine, plain) | {"sets": {}}
        for name in dict.fromkeys(r.set for r in mine):
            report[mode]["sets"][name] = summary([r for r in mine if r.set == name], plain)
    return report


def identical_to_plain(runs: Sequence[Run]) -> dict[str, int]:
    """By mode other than plain: how many prompts have plain's tokens. At temperature 0 all should."""
    plain = {r.index: r.token_ids for r in runs if r.mode == "plain"}
    modes = dict.fromkeys(r.mode for r in runs if plain and r.mode != "plain")
    return {mode: sum(r.token_ids == plain[r.index] for r in runs if r.mode == mode) for mode in modes}


def summary(runs: Sequence[Run], plain: dict[int, Run]) -> dict:
    tokens, seconds, rounds = sum(r.num_tokens for r in runs), sum(r.seconds for r in runs), sum(r.rounds for r in runs)
    size = max(len(r.proposed) for r in runs)
    judged = [sum(r.proposed[k] for r in runs if k < len(r.proposed)) for k in range(size)]
    kept = [sum(r.accepted[k] for r in runs if k < len(r.accepted)) for k in range(size)]
    figures = {
        "prompts": len(runs),
        "tokens_per_second": round(tokens / seconds, 2),
        "tau": round(tokens / rounds, 3),
        "acceptance_by_position": [round(a / j, 3) if j else None for a, j in zip(kept, judged, strict=True)],
    }
    ratios = sorted((r.num_tokens / r.seconds) / (plain[r.index].num_tokens / plain[r.index].seconds) for r in runs if r.index in plain)
    if ratios:
        quartiles = [round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]] if len(ratios) >= 3 else None
        figures["ratio_to_plain"] = {"median": round(statistics.median(ratios), 3), "quartiles": quartiles}
    return figures


def table(report: dict) -> str:
    """The aggregate for people: one line a mode and set."""
    wide = max(10, *map(len, report))
    lines = [
        f"{'mode':<{wide}} {'set':<12} {'prompts':>7} {'tokens/s':>9} {'tau':>6} {'ratio':>6}  {'quartiles':<13} acceptance by position"
    ]
    for mode, figures in report.items():
        for name, f in [("all", figures), *figures["sets"].items()]:
            ratio = f.get("ratio_to_plain")
            spread = "{:.2f} - {:.2f}".format(*ratio["quartiles"]) if ratio and ratio["quartiles"] else "-"
            middle = f"{ratio['median']:>6.2f}  {spread:<12}" if ratio else " " * 20
            accepted = " ".join("  - " if a is None else f"{a:.2f}" for a in f["acceptance_by_position"][:SHOWN_POSITIONS])
            lines.append(
                f"{mode:<{wide}} {name:<12} {f['prompts']:>7} {f['tokens_per_second']:>9.1f} {f['tau']:>6.2f} {middle}  {accepted}"
            )
    return "\n".join(lines)


def machine(device: torch.device | None = None) -> dict:
    """What a figure needs beside it to mean anything; `device` is where the target runs."""
    import transformers

    processor = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            processor = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), processor)
    except OSError:
        pass
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    } | ({"gpu": torch.cuda.get_device_name(device)} if device is not None and device.type == "cuda" else {})
