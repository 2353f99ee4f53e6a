"""From replies to a table: medians over prompts with quartiles, and ratios prompt by prompt."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peer import Peer


@dataclass(frozen=True)
class Run:
    """One request to one peer. Times are in seconds; `workers/serve.py` says what they cover, `total_s` is the driver's clock."""

    peer: str
    index: int
    set: str
    tokens: list[int]
    first: int
    prompt_s: float
    decode_s: float
    total_s: float
    drafted: int | None
    accepted: int | None


Rate = Callable[[Run], float | None]


def whole(run: Run) -> float | None:
    """Tokens a second of the whole request, prompt included: what a caller sees."""
    return len(run.tokens) / run.total_s


def decoding(run: Run) -> float | None:
    """Tokens a second after the first round, which holds the prompt; None where the text ended with it."""
    more = len(run.tokens) - run.first
    return more / run.decode_s if more > 0 and run.decode_s > 0 else None


def by_prompt(runs: Sequence[Run], rate: Rate) -> dict[int, float]:
    """Each prompt's median rate over its repeats."""
    rates: dict[int, list[float]] = {}
    for run in runs:
        value = rate(run)
        if value is not None:
            rates.setdefault(run.index, []).append(value)
    return {index: statistics.median(values) for index, values in rates.items()}


def spread(values: Sequence[float]) -> dict | None:
    """Median and quartiles; None of nothing."""
    if not values:
        return None
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}


def same_tokens(mine: Sequence[Run], other: Sequence[Run]) -> list[int] | None:
    """[prompts with the same tokens, prompts that both have]; None if there are none of the latter."""
    first = {run.index: run.tokens for run in reversed(other)}
    texts = {run.index: run.tokens for run in reversed(mine) if run.index in first}
    return [sum(first[index] == tokens for index, tokens in texts.items()), len(texts)] if texts else None


def summarise(peers: Sequence[Peer], runs: Sequence[Run]) -> list[dict]:
    """One row a peer. Ratios are to the first dspark-plain and the first dspark among `peers`, over the prompts that both decoded."""
    of = {str(peer): [run for run in runs if run.peer == str(peer)] for peer in peers}
    bases = {kind: next((str(peer) for peer in peers if peer.kind == kind), None) for kind in ("dspark-plain", "dspark")}
    rows = []
    for peer in peers:
        mine = of[str(peer)]
        row: dict = {"peer": str(peer), "prompts": len({run.index for run in mine})}
        for name, rate in (("whole", whole), ("decoding", decoding)):
            rates = by_prompt(mine, rate)
            row[name] = {"tokens_per_second": spread(list(rates.values()))}
            for kind, base in bases.items():
                others = by_prompt(of.get(base or "", []), rate)
                row[name][f"times {kind}"] = spread([rates[index] / others[index] for index in rates if index in others])
        told = [run for run in mine if run.drafted is not None]
        row["drafted"], row["accepted"] = (
            (sum(run.drafted or 0 for run in told), sum(run.accepted or 0 for run in told)) if told else (None, None)
        )
        row["same as dspark-plain"] = same_tokens(mine, of.get(f"dspark-plain:{peer.precision}", []))
        row["same as its plain"] = same_tokens(mine, of.get(str(peer.plain()), []))
        rows.append(row)
    return rows


def table(rows: Sequence[dict]) -> str:
    """Markdown: the whole request first, then decoding alone."""
    ratios = ("times dspark-plain", "times dspark")
    head = [
        "peer",
        "prompts",
        "tokens/s, whole request",
        *ratios,
        "tokens/s, decoding",
        *ratios,
        "drafts accepted",
        "tokens of dspark-plain",
        "tokens of its plain",
    ]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [row["peer"], str(row["prompts"])]
        for name in ("whole", "decoding"):
            cells += [shown(row[name]["tokens_per_second"], 1), *(shown(row[name][ratio], 2) for ratio in ratios)]
        cells.append(f"{row['accepted']} of {row['drafted']}" if row["drafted"] else "-")
        cells += ["{} of {}".format(*row[same]) if row[same] else "-" for same in ("same as dspark-plain", "same as its plain")]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: dict | None, digits: int) -> str:
    if value is None:
        return "-"
    low, high = value["quartiles"]
    return f"{value['median']:.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"
