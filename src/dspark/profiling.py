"""What a decoding round costs on this machine: by number of verified rows, and the draft beside it.

All figures are medians of interleaved repeats, so that a machine that slows down slows every row count.
What the planner needs of them is kept in the user's cache, under a name that holds all they depend on."""

import functools
import hashlib
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import dspark
from dspark.core.planner import Costs, CostTable
from dspark.core.sampling import Law
from dspark.drafters import DSparkDrafter, MtpDrafter
from dspark.head.head import Head
from dspark.head.mtp import MtpHead
from dspark.head.recurrent import RecurrentHead
from dspark.target.demo import cache_directory
from dspark.target.quantize import num_bytes
from dspark.target.target import State, Target

METHOD = 3  # one more whenever costs are measured in another way: those in the cache are then measured again
REPEATS = 11
ROWS = (1, 2, 3, 4, 6, 8, 12, 16)
BANDWIDTH_BYTES = 2**29  # far beyond any cache
PLANNING_CONTEXTS = (256, 2048)  # where the planner's costs are measured; it interpolates between
PLANNING_SECONDS = 8.0  # for each of them, once three repeats are done
LEAST_REPEATS = 3


@dataclass(frozen=True)
class Profile:
    """Milliseconds of one pass by number of rows after `context` tokens; of one draft with its commit, and how much of that is each
    token's behind the first; and what bounds all: bytes of weights a pass reads, and the machine's read bandwidth in bytes a second."""

    context: int
    rows: dict[int, float]
    draft: float | None
    block_size: int | None
    weight_bytes: int
    bandwidth: float
    draft_each: float = 0.0  # 0: a draft is one pass

    @property
    def share_of_bandwidth(self) -> float:
        """Weights read by a pass of one row, against what the memory could have delivered meanwhile."""
        return self.weight_bytes / (self.rows[1] * 1e-3) / self.bandwidth

    @property
    def break_even(self) -> float | None:
        """Tokens a round must yield for the head to pay: cost of its round in plain steps."""
        if self.draft is None or self.block_size is None:
            return None
        needed = min((n for n in self.rows if n > self.block_size), default=max(self.rows))
        return (self.rows[needed] + self.draft) / self.rows[1]


def profile(
    target: Target,
    head: Head | RecurrentHead | MtpHead | None,
    context: int = 300,
    rows: Sequence[int] = ROWS,
    repeats: int = REPEATS,
    progress: Callable[[int], None] = lambda done: None,
    seconds: float = float("inf"),
    with_bandwidth: bool = True,
) -> Profile:
    """Time passes of `rows` tokens after `context` ones, and the head's draft there with the commit of two tokens.

    No repeat begins after `seconds`, but for the first few. Without its bandwidth (0) the profile is cheaper."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(target.vocab_size, (context + 1,), generator=generator).tolist()
    drafter = None if head is None else DSparkDrafter(head, target) if isinstance(head, Head) else MtpDrafter(head, target)
    state = target.start()
    features = target.prefill(state, ids[:-1])
    if drafter is not None:
        drafter.start()
        drafter.commit(features)
        flush(drafter)
    newest, num_drafts, block_size = features[-2:], 0, drafter.block_size if drafter else 0
    lengths = [] if drafter is None else [block_size, 1] if isinstance(drafter, MtpDrafter) and block_size > 1 else [block_size]

    def score(num_rows: int) -> None:
        tokens = (ids * num_rows)[:num_rows]
        target.score(state, tokens)
        forget(target, state, tokens)

    def draft(length: int) -> None:
        assert drafter is not None
        text = ids + ids[: len(newest)] * num_drafts  # what was committed so far, and an anchor
        drafter.draft(text, length, Law(greedy=True), generator)
        drafter.commit(newest)
        flush(drafter)

    def timed(act: Callable[[Any], None], argument: Any) -> float:
        begin = time.perf_counter()
        act(argument)
        if target.device.type == "cuda":
            torch.cuda.synchronize(target.device)  # what was committed may still be on its way
        return 1e3 * (time.perf_counter() - begin)

    times: dict[int, list[float]] = {n: [] for n in (*rows, *(-length for length in lengths))}  # below 0: of drafts
    bandwidths = []
    started = time.perf_counter()
    for repeat in range(repeats + 1):  # the first one warms up
        if repeat > LEAST_REPEATS and time.perf_counter() - started > seconds:
            break
        bandwidths.append(read_bandwidth(1, str(target.device)) if with_bandwidth else 0.0)
        score(1)  # plain passes come behind plain passes
        found = {n: timed(score, n) for n in rows}
        for length in lengths[:1] + lengths:  # the second is as in a round: behind many passes a draft takes half as long again
            score(length + 1)
            found[-length] = timed(draft, length)
            num_drafts += 1
        if repeat:
            for n, taken in found.items():
                times[n].append(taken)
        progress(repeat + 1)
    medians = {n: statistics.median(each) for n, each in times.items()}
    whole, first = (medians[-length] for length in (lengths[0], lengths[-1])) if lengths else (None, None)
    return Profile(
        context,
        {n: medians[n] for n in rows},
        whole,
        block_size or None,
        weight_bytes(target),
        statistics.median(bandwidths),
        max(0.0, (whole - first) / (block_size - 1)) if whole and first and block_size > 1 else 0.0,
    )


def flush(drafter: DSparkDrafter | MtpDrafter) -> None:
    """Have committed features computed now; modules for multi-token prediction do that in their next draft, which knows the tokens."""
    if isinstance(drafter, DSparkDrafter):
        drafter.flush()


def forget(target: Target, state: State, tokens: Sequence[int]) -> None:
    """Roll a whole pass back, as dear as in a round: where a rejection replays what was accepted, half of the rows go through once more."""
    target.rollback(state, len(tokens))
    if target.forgets.replays and len(tokens) > 1:
        again = tokens[: (len(tokens) + 1) // 2]
        target.score(state, again)
        target.rollback(state, len(again))


def planning_costs(
    target: Target,
    head: Head | RecurrentHead | MtpHead | None,
    most_rows: int,
    say: Callable[[str], None] = lambda text: None,
    again: bool = False,
) -> CostTable:
    """The planner's costs of this pair on this machine, up to `most_rows` rows: from the cache, or measured now (`again`: in
    any case). Without a head the draft costs nothing, as prompt lookup's does."""

    def measure() -> CostTable:
        say("measuring what a round costs on this machine (once for each pair of target and head, a few seconds)")
        longest = target.max_context - most_rows - 1
        contexts = sorted({max(1, min(context, longest)) for context in PLANNING_CONTEXTS})
        found: dict[int, Costs] = {}
        started = time.perf_counter()
        for context in contexts:
            if found and time.perf_counter() - started > PLANNING_SECONDS / 2:
                break  # a large model: the prompt alone would take long; the first costs then hold for all lengths
            measured = profile(target, head, context, range(1, most_rows + 1), seconds=PLANNING_SECONDS, with_bandwidth=False)
            found[context] = Costs(measured.draft or 0.0, ascending(list(measured.rows.values())), measured.draft_each)
        return CostTable(tuple(found), tuple(found.values()))

    return cached_costs(target, head, {"rows": most_rows}, measure, again)


def cached_costs(
    target: Target, head: Head | RecurrentHead | MtpHead | None, of: dict, measure: Callable[[], CostTable], again: bool = False
) -> CostTable:
    """What `measure` finds for this pair on this machine, kept in the user's cache. `of` names what is measured; its `rows` are
    how many row counts each of the table's costs has."""
    depends_on = {
        "method": METHOD, "version": dspark.__version__, "torch": torch.__version__, "processor": device_name(target.device), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "device": str(target.device), "runtime": target.runtime_name,
        "target": target.fingerprint(), "head": None if head is None else asdict(head.config), **of,
    }  # fmt: skip
    described = json.loads(json.dumps(depends_on, default=str))
    key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_directory() / "profiles" / f"{key}.json"
    stored = None if again else stored_costs(path, described)
    if stored is not None:
        return stored
    table = measure()
    store(path, {"depends_on": described, **asdict(table)})
    return table


def ascending(values: Sequence[float]) -> tuple[float, ...]:
    """The nearest values, by squares, that never fall: what noise put out of order is pooled (isotonic regression)."""
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and statistics.fmean(pools[-2]) > statistics.fmean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    return tuple(statistics.fmean(pool) for pool in pools for _ in pool)


def stored_costs(path: Path, depends_on: dict) -> CostTable | None:
    """The table in this file, if it is whole and was measured for the same things."""
    try:
        found = json.loads(path.read_bytes())
        if found["depends_on"] != depends_on:
            return None
        costs = tuple(Costs(float(c["draft"]), tuple(float(r) for r in c["rows"]), float(c["each"])) for c in found["costs"])
        table = CostTable(tuple(int(context) for context in found["contexts"]), costs)
        sound = (
            all(len(c.rows) == depends_on["rows"] and min(c.rows) > 0 <= c.each <= c.draft for c in costs)
            and all(math.isfinite(cost) for c in costs for cost in (c.draft, *c.rows))
            and len(costs) == len(table.contexts) > 0
            and list(table.contexts) == sorted(set(table.contexts))
        )
        return table if sound else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def store(path: Path, document: dict) -> None:
    """Keep it for the next start; where the cache cannot be written it is measured again then."""
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(document))
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)


def device_name(device: torch.device) -> str:
    """The GPU, or the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def weight_bytes(target: Target) -> int:
    """Bytes of weights that one pass reads: all but an input embedding of its own, of which it reads single rows."""
    embedding, output = target.model.get_input_embeddings().weight, target.model.get_output_embeddings().weight
    total = sum(num_bytes(p) for p in target.model.parameters())
    return total if embedding is output else total - num_bytes(embedding)


def read_bandwidth(repeats: int = 5, device: str = "cpu") -> float:
    """Bytes a second that torch's threads, or the GPU, read from memory while adding up: the best of several tries."""
    block = read_block(BANDWIDTH_BYTES, device)
    best = 0.0
    for _ in range(repeats):
        begin = time.perf_counter()
        block.sum().item()
        best = max(best, BANDWIDTH_BYTES / (time.perf_counter() - begin))
    return best


@functools.cache
def read_block(num_bytes: int, device: str) -> torch.Tensor:
    return torch.ones(num_bytes // 4, device=device)
