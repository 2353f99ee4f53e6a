"""A trace: what every round of real decoding drafted, believed and got, with this machine's costs beside it.

It is recorded with the plan `fixed`, so each round tells how many of all its drafted tokens stood. A file of JSON lines:
the first says how it was made, each other one is a request."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dspark.core.decode import Round
from dspark.core.planner import Costs, CostTable
from dspark.errors import TraceError
from dspark.prompts import parse_json

FORMAT = "dspark trace 1"
REMEDY = "record it anew: `dspark bench TARGET --prompts FILE.jsonl --trace FILE`"


@dataclass(frozen=True)
class Drafted:
    """One round: the confidences of its drafted tokens, all of them verified, and how many stood; and the confidences before
    calibration, none where they are the same."""

    confidences: tuple[float, ...]
    num_accepted: int
    uncalibrated: tuple[float, ...] = ()


@dataclass(frozen=True)
class Request:
    """One answer: `prompt` is its number in the run, `num_prompt` and `num_tokens` count the tokens before it and in it."""

    prompt: int
    set: str
    num_prompt: int
    num_tokens: int
    rounds: tuple[Drafted, ...]


@dataclass(frozen=True)
class Trace:
    """Requests in the order they were decoded; `made_by` is the machine and the settings, for people."""

    block_size: int
    costs: CostTable
    requests: tuple[Request, ...]
    made_by: dict


def as_request(prompt: int, set: str, num_prompt: int, rounds: Sequence[Round]) -> Request:
    """What a trace keeps of an answer's rounds, drafted by a head with a confidence head."""
    drafted = tuple(Drafted(tuple(r.confidences or ()), r.num_accepted, tuple(r.uncalibrated or ())) for r in rounds)
    return Request(prompt, set, num_prompt, sum(len(r.tokens) for r in rounds), drafted)


def write_trace(trace: Trace, path: Path) -> None:
    """Raises `TraceError` where the file cannot be written."""
    head = {"format": FORMAT, "block_size": trace.block_size, "costs": asdict(trace.costs), "made_by": trace.made_by}
    lines = [json.dumps(head), *(json.dumps(asdict(request)) for request in trace.requests)]
    try:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise TraceError(f"cannot write trace {path}: {error.strerror}", "name a file in a folder that exists") from error


def read_trace(path: Path) -> Trace:
    """The trace in a file. Raises `TraceError` naming the line that is not as `write_trace` leaves it."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise TraceError(f"cannot read trace {path}: {error.strerror}", REMEDY) from error
    except UnicodeDecodeError as error:
        raise TraceError(f"trace {path} is not UTF-8 text (byte {error.start})", REMEDY) from error
    found = [
        (f"{path}, line {n}", parse_json(line, f"{path}, line {n}", TraceError, REMEDY)) for n, line in enumerate(lines, 1) if line.strip()
    ]
    if not found or not isinstance(found[0][1], dict) or found[0][1].get("format") != FORMAT:
        raise TraceError(f"{path} is not a trace: its first line does not say {FORMAT!r}", REMEDY)
    if len(found) == 1:
        raise TraceError(f"trace {path} holds no request", REMEDY)
    made_by, block_size, costs = checked(*found[0], read_head)
    requests = tuple(checked(where, record, lambda each: read_request(each, block_size)) for where, record in found[1:])
    return Trace(block_size, costs, requests, made_by)


def checked(where: str, record: Any, read: Callable[[dict], Any]) -> Any:
    """What `read` makes of a record; where it finds something else than it needs, a `TraceError` saying so."""
    try:
        return read(record)
    except (KeyError, TypeError, ValueError) as error:
        says = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise TraceError(f"{where}: {says}", REMEDY) from error


def read_head(record: dict) -> tuple[dict, int, CostTable]:
    return record["made_by"], whole(record["block_size"], 1), as_table(record["costs"])


def whole(value: Any, least: int, most: float = float("inf")) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r} where a whole number from {least} to {most:g} belongs")
    return value


def number(value: Any, above: float, most: float = float("inf")) -> float:
    """A number of at least `above` and at most `most`, infinity not among them."""
    if type(value) not in (int, float) or not above <= value <= most or value == float("inf"):
        raise ValueError(f"{value!r} where a number from {above:g} to {most:g} belongs")
    return float(value)


def as_table(record: dict) -> CostTable:
    """The cost table in its JSON form."""
    contexts = tuple(whole(context, 0) for context in record["contexts"])
    costs = tuple(Costs(number(c["draft"], 0), tuple(number(each, 1e-9) for each in c["rows"])) for c in record["costs"])
    if (
        not contexts
        or list(contexts) != sorted(set(contexts))
        or len(contexts) != len(costs)
        or len({len(c.rows) for c in costs} - {0}) != 1
    ):
        raise ValueError("costs need ascending contexts and the same rows for each")
    return CostTable(contexts, costs)


def read_request(record: dict, block_size: int) -> Request:
    rounds = tuple(read_round(each, block_size) for each in record["rounds"])
    if not isinstance(record["set"], str):
        raise ValueError(f"set {record['set']!r} is no text")
    least = sum(r.num_accepted + 1 for r in rounds[:-1]) + 1
    num_tokens = whole(record["num_tokens"], least, sum(r.num_accepted + 1 for r in rounds))
    return Request(whole(record["prompt"], 0), record["set"], whole(record["num_prompt"], 1), num_tokens, rounds)


def read_round(record: dict, block_size: int) -> Drafted:
    confidences = tuple(number(each, 0, 1) for each in record["confidences"])
    uncalibrated = tuple(number(each, 0, 1) for each in record.get("uncalibrated", ()))
    if uncalibrated and len(uncalibrated) != len(confidences):
        raise ValueError(f"{len(uncalibrated)} uncalibrated confidences for {len(confidences)} tokens")
    return Drafted(confidences, whole(record["num_accepted"], 0, whole(len(confidences), 0, block_size)), uncalibrated)
