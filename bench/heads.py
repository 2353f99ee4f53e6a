"""Tokens a round by head and set of prompts, from what `dspark bench --json` wrote (`runs/heads.sh`).

python bench/heads.py FILE.json ..."""

import json
import sys
from pathlib import Path


def taus(file: Path) -> dict[str, dict[str, float]]:
    """By column, a set and its temperature: tokens a round of each mode that drafts."""
    document = json.loads(file.read_text().strip().splitlines()[-1])
    law = f"T={document['arguments']['temperature']:g}"
    columns: dict[str, dict[str, float]] = {}
    for mode, figures in document["modes"].items():
        for name, found in figures["sets"].items():
            if mode != "plain":
                columns.setdefault(f"{name}, {law}", {})[mode.removesuffix("@fixed")] = found["tau"]
    return columns


def table(columns: dict[str, dict[str, float]]) -> str:
    """In Markdown, a line a head, the best of each column in bold."""
    heads = list(dict.fromkeys(head for column in columns.values() for head in column))
    lines = [f"| head | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for head in heads:
        cells = []
        for column in columns.values():
            tau = column.get(head)
            cells.append("" if tau is None else f"**{tau:.2f}**" if tau == max(column.values()) else f"{tau:.2f}")
        lines.append(f"| {head} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    columns: dict[str, dict[str, float]] = {}
    for name in sys.argv[1:]:
        columns |= taus(Path(name))
    if not columns:
        sys.exit("error: no file given\nhint: python bench/heads.py FILE.json ...")
    print(table(columns))
