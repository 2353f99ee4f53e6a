"""Tokens a round and speed beside plain decoding, by head and set of prompts, from what `dspark bench --json` wrote (`runs/heads.sh`).

python bench/heads.py FILE.json ..."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Figures = dict[str, dict[str, Any]]  # by column: by mode, what was measured of it


def read(file: Path) -> Figures:
    """A column for each set and for all of them, with the temperature in its name. `@fixed`, what a head is asked for by default, is left out."""
    document = json.loads(file.read_text().strip().splitlines()[-1])
    law = f"T={document['arguments']['temperature']:g}"
    columns: Figures = {}
    for mode, figures in document["modes"].items():
        sets = figures["sets"] | ({"all": figures} if len(figures["sets"]) > 1 else {})
        for name, found in sets.items():
            if mode != "plain":
                columns.setdefault(f"{name}, {law}", {})[mode.removesuffix("@fixed")] = found
    return columns


def tau(found: dict) -> float | None:
    return found["tau"]


def speed(found: dict) -> float | None:
    """Over plain decoding's, the median over prompts."""
    return found.get("ratio_to_plain", {}).get("median")


def table(columns: Figures, figure: Callable[[dict], float | None]) -> str:
    """In Markdown, a line a head, the best of each column in bold."""
    heads = list(dict.fromkeys(head for column in columns.values() for head in column))
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    best = {name: max((figure(found) or 0.0 for found in column.values()), default=0.0) for name, column in columns.items()}
    for head in heads:
        values = [(name, figure(column[head]) if head in column else None) for name, column in columns.items()]
        cells = ["" if value is None else f"**{value:.2f}**" if value == best[name] else f"{value:.2f}" for name, value in values]
        lines.append(f"| {head} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    columns: Figures = {}
    for name in sys.argv[1:]:
        columns |= read(Path(name))
    if not columns:
        sys.exit("error: no file given\nhint: python bench/heads.py FILE.json ...")
    print(f"Tokens a round:\n\n{table(columns, tau)}\n\nSpeed, plain decoding of the same run is 1:\n\n{table(columns, speed)}")
