"""Speed and tau by drafter, interleaved prompt by prompt in one run, as ratios to plain decoding.

Only decoding is compared: modes take turns on each prompt in an order that rotates, so that a
machine that slows down slows them all."""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from dspark.core.decode import Round
from dspark.errors import PromptError, SettingError
from dspark.generation import Result, check_request, generate, make_drafter, make_planner
from dspark.head.head import Head
from dspark.target.target import Target

MODES = ("plain", "dspark", "dflash", "lookup", "hf", "hf-lookup")
DRAFTER_OF = {"plain": "none", "dspark": "dspark", "dflash": "dflash", "lookup": "lookup"}


@dataclass(frozen=True)
class Mode:
    """One way of decoding: one of MODES, and behind an @ its plan where it has one (`dspark@length:3`)."""

    name: str
    head: Head | None = None

    @property
    def kind(self) -> str:
        return self.name.partition("@")[0]

    @property
    def plan(self) -> str | None:
        return self.name.partition("@")[2] or None


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
) -> list[Run]:
    """Decode every prompt (ids, set name) in every mode. `watch` sees each mode's first answer to each prompt.

    Raises `SettingError` for an unknown mode or one named twice, and the `UserError` family for a request that no
    mode could serve, before anything is measured."""
    for mode in modes:
        if mode.kind not in MODES or (mode.plan and mode.kind not in DRAFTER_OF):
            raise SettingError(f"unknown mode {mode.name!r}", f"choose from {', '.join(MODES)}, with @PLAN behind one that drafts")
    if len({mode.name for mode in modes}) < len(modes):
        raise SettingError(f"a mode is named twice in {', '.join(mode.name for mode in modes)}", "name each mode once")
    for index, (ids, name) in enumerate(prompts):
        try:
            check_request(target, ids, max_new_tokens, seed + index, ())
        except PromptError as error:
            raise PromptError(f"prompt {index} (set {name}): {error.message}", error.hint) from error
    ways = {mode.name: Way(target, mode, temperature) for mode in modes}
    for way in ways.values():
        way.decode(prompts[0][0], min(8, max_new_tokens), 0)  # warms up
    runs = []
    for index, (ids, name) in enumerate(prompts):
        results: dict[str, list[Result]] = {mode.name: [] for mode in modes}
        for repeat in range(repeats):
            shift = (index + repeat) % len(modes)
            for mode in [*modes[shift:], *modes[:shift]]:
                results[mode.name].append(ways[mode.name].decode(ids, max_new_tokens, seed + index))
        for mode in modes:
            watch(mode.name, index, results[mode.name][0])
        runs += [as_run(mode.name, index, name, results[mode.name]) for mode in modes]
        progress(index + 1, len(prompts))
    return runs


class Way:
    """A mode at work. At T = 0 its planner learns from prompt to prompt, as `dspark generate` has it."""

    def __init__(self, target: Target, mode: Mode, temperature: float):
        self.target, self.mode, self.temperature = target, mode, temperature
        if mode.kind in DRAFTER_OF:
            self.drafter = make_drafter(DRAFTER_OF[mode.kind], target, mode.head)
            planner = make_planner(mode.plan, target, self.drafter)
            self.plan = planner if temperature == 0 else mode.plan

    def decode(self, ids: list[int], max_new_tokens: int, seed: int) -> Result:
        if self.mode.kind not in DRAFTER_OF:
            return hf_generate(self.target, ids, max_new_tokens, self.temperature, seed, lookup=self.mode.kind == "hf-lookup")
        return generate(
            self.target, self.mode.head, ids, max_new_tokens, temperature=self.temperature, seed=seed, drafter=self.drafter, plan=self.plan
        )


def hf_generate(target: Target, ids: list[int], max_new_tokens: int, temperature: float, seed: int, lookup: bool) -> Result:
    """transformers' own loop on the same model: the baseline most people have."""
    target.untap()
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
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
    with its quartiles as spread."""
    plain = {r.index: r for r in runs if r.mode == baseline}
    report: dict = {}
    for mode in dict.fromkeys(r.mode for r in runs):
        mine = [r for r in runs if r.mode == mode]
        report[mode] = summary(mine, plain) | {"sets": {}}
        for name in dict.fromkeys(r.set for r in mine):
            report[mode]["sets"][name] = summary([r for r in mine if r.set == name], plain)
    return report


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
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        figures["ratio_to_plain"] = {"median": round(quartiles[1], 3), "quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)]}
    return figures


def table(report: dict) -> str:
    """The aggregate for people: one line a mode and set."""
    lines = [f"{'mode':<10} {'set':<12} {'prompts':>7} {'tokens/s':>9} {'tau':>6} {'ratio':>6}  {'quartiles':<13} acceptance by position"]
    for mode, figures in report.items():
        for name, f in [("all", figures), *figures["sets"].items()]:
            ratio = f.get("ratio_to_plain")
            middle = f"{ratio['median']:>6.2f}  {ratio['quartiles'][0]:.2f} - {ratio['quartiles'][1]:.2f} " if ratio else " " * 21
            accepted = " ".join("  - " if a is None else f"{a:.2f}" for a in f["acceptance_by_position"])
            lines.append(f"{mode:<10} {name:<12} {f['prompts']:>7} {f['tokens_per_second']:>9.1f} {f['tau']:>6.2f} {middle} {accepted}")
    return "\n".join(lines)


def machine() -> dict:
    """What a figure needs beside it to mean anything."""
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
    }
