"""Are the texts of all modes the same? Reads the JSON that `dspark bench --json` ends with.

    python bench/tokens.py RESULT.json [--baseline hf] [--strip OUT.json]

Prints, for every mode, how many prompts gave the baseline's tokens and where the others first differ;
exits 1 if any differ. `--strip` writes the document without the token ids, small enough to keep."""

import argparse
import json
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--baseline", default="hf")
    parser.add_argument("--strip", type=Path)
    options = parser.parse_args()
    document = json.loads(options.result.read_text().strip().splitlines()[-1])
    runs: dict[str, dict[int, list[int]]] = {}
    for run in document["prompts"]:
        runs.setdefault(run["mode"], {})[run["index"]] = run["token_ids"]
    if options.baseline not in runs:
        print(f"error: no mode {options.baseline} in {options.result}; it has {', '.join(runs)}", file=sys.stderr)
        return 2
    baseline, all_same = runs.pop(options.baseline), True
    for mode, texts in runs.items():
        differing = [(i, first_difference(texts[i], baseline[i])) for i in texts if texts[i] != baseline[i]]
        all_same &= not differing
        where = "".join(f"; prompt {i} from token {at}" for i, at in differing)
        print(
            f"{mode}: {len(texts) - len(differing)} of {len(texts)} prompts equal {options.baseline}, {sum(map(len, texts.values()))} tokens{where}"
        )
    if options.strip:
        for run in document["prompts"]:
            del run["token_ids"]
        options.strip.write_text(json.dumps(document) + "\n")
    return 0 if all_same else 1


def first_difference(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


if __name__ == "__main__":
    sys.exit(main())
