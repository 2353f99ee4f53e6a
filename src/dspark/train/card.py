"""The card of a head, in the hub's form: what it is, how it was made, what it was measured to do."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from dspark.errors import HeadError
from dspark.head.calibration import behind, beside, summary
from dspark.head.head import Head
from dspark.head.recurrent import AnyHead
from dspark.prompts import read_json
from dspark.target.target import Target

CARD, RECORD = "README.md", "provenance.json"
CONTEXTS = "contexts"  # of a provenance: the tables of `dspark bench --contexts --card`, one a temperature
TRAINED = "Trained on "  # what the card says after its tables
CONTEXTS_TITLE = "Tokens a round by length of context"
CONTEXTS_SECTION = re.compile(rf"^{CONTEXTS_TITLE}.*\n\n(?:\|.*\n)+\n?", re.MULTILINE)


def kind_of(head: AnyHead) -> str:
    """What the head is, in a line."""
    if not isinstance(head, Head):
        steps = f"trained on {head.config.trained_steps} step{'s' if head.config.trained_steps > 1 else ''} of its chain; 1 layer"
        return f"EAGLE-3, {steps}" if head.kind == "eagle3" else f"A multi-token-prediction module, {steps}"
    rank, name = head.config.markov_rank, head.config.markov_head_type
    what = f"DSpark, {name} sequential head of rank {rank}" if rank else "DFlash (no sequential head)"
    return f"{what}; {head.config.num_hidden_layers} layers"


def write_card(head: AnyHead, target: Target, provenance: dict, rounds: dict | None) -> str:
    config, train = head.config, provenance["train"]
    parameters = sum(p.numel() for p in head.parameters())
    measured = "" if rounds is None else (
        f"\nTokens per round by real decoding on {rounds['prompts']} held-out prompts, {rounds['max_new_tokens']} tokens each: "
        f"**{rounds['tau_t0']}** at T = 0, **{rounds['tau_t1']}** at T = 1.\n"
    )  # fmt: skip
    if head.calibration is not None:
        measured += (
            f"\nIts confidences, calibrated (mean over positions):\n\n- {summary(head.calibration).replace(chr(10), chr(10) + '- ')}\n"
        )
    came = provenance.get("adapted")
    if came is not None:
        measured += (
            f"\nAdapted from the head {came['from']} (sha256 {came['from_sha256'][:12]}) of {came['from_target'] or 'another target'}, which gives "
            f"{came['before']['tau_t0']} and {came['before']['tau_t1']} on the same prompts"
            + (f"; updates of rank {came['low_rank']}, merged.\n" if came["low_rank"] else ".\n")
        )
    teacher = provenance["held_out_teacher_forced"]
    rows = "".join(
        f"| {name} | {' | '.join(f'{a:.2f}' for a in teacher[f'acceptance_{name}'])} |\n"
        for name in ("t0", "t1")
        if f"acceptance_{name}" in teacher
    )
    positions = " | ".join(str(k + 1) for k in range(config.block_size))
    return f"""---
library_name: dspark
base_model: {target.name}
tags: [speculative-decoding, dspark]
---
# Draft head for {target.name}

{kind_of(head)}, block of {config.block_size}, {config.draft_vocab_size} of {config.vocab_size} tokens,
taps after layers {", ".join(map(str, config.target_layer_ids))}; {parameters / 1e6:.1f} M parameters.
It changes how fast the target answers, never what it answers.

    dspark generate {target.name} "..." --head DIR
{measured}
Acceptance by position given that all before it were accepted (held-out answers, real prefix):

| law | {positions} |
|---|{"---|" * config.block_size}
{rows}
{contexts_section(provenance.get(CONTEXTS, ()))}{TRAINED}{provenance["answers"]} answers ({provenance["answer_tokens"]:,} tokens) of the target's own, {train["held_out"]} of them held out; {train["steps"]} steps of
{train["sequences_per_step"] * train["anchors_per_sequence"]} anchors, {train["optimizer"]}, seed {train["seed"]}:

    {provenance["command"]}

Versions, data and the training curve are in `provenance.json`.
"""


def check_card(folder: Path) -> None:
    """Raise `HeadError` unless `add_contexts` can write to this head."""
    read_card(folder)
    for place in {folder, *(behind(folder / name).parent for name in (CARD, RECORD))}:
        if not os.access(place, os.W_OK | os.X_OK):
            raise HeadError(f"cannot write to {place}: it is not yours", "copy the head to a folder of your own, and measure that")


def read_card(folder: Path) -> tuple[str, dict]:
    """The card and the provenance of a head. Raises `HeadError` where one of them is missing or damaged."""
    hint = "only heads that came with a card and its record have a place for the table: leave --card out"
    provenance = read_json(folder / RECORD, HeadError, hint)
    if not isinstance(provenance, dict):
        raise HeadError(f"{folder / RECORD} is damaged: an object was expected", "restore the file")
    try:
        contexts_section(provenance.get(CONTEXTS, []))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise HeadError(
            f"{folder / RECORD} is damaged: `{CONTEXTS}` does not hold tables", "restore the file, or delete that entry"
        ) from error
    try:
        return (folder / CARD).read_text(encoding="utf-8"), provenance
    except (OSError, UnicodeDecodeError) as error:
        raise HeadError(f"cannot read {folder / CARD}: {error}", hint) from error


def add_contexts(folder: Path, measured: dict) -> None:
    """Put what was measured at one temperature into the head's provenance and card, in place of what stood there of it. `measured`:
    `temperature`, `date`, `prompts`, `max_new_tokens`, and `rows` as `measure.contexts` gives them. Raises `HeadError`."""
    card, provenance = read_card(folder)
    others = [each for each in provenance.get(CONTEXTS, []) if each["temperature"] != measured["temperature"]]
    provenance[CONTEXTS] = sorted([*others, measured], key=lambda each: each["temperature"])
    texts = {RECORD: json.dumps(provenance, indent=2) + "\n", CARD: with_contexts(card, provenance[CONTEXTS])}
    try:
        for name, text in texts.items():
            beside(folder / name).write_text(text, encoding="utf-8")
        for name in texts:
            os.replace(beside(folder / name), behind(folder / name))
    except OSError as error:
        for name in texts:
            beside(folder / name).unlink(missing_ok=True)
        raise HeadError(f"cannot write to {folder}: {error.strerror}", "free some space, or make the folder writable") from error


def with_contexts(card: str, tables: Sequence[Mapping]) -> str:
    """The card with these tables: in place of an earlier one, else before what it was trained on, else at the end."""
    section = contexts_section(tables)
    if CONTEXTS_SECTION.search(card):
        return CONTEXTS_SECTION.sub(lambda found: section, card, count=1)
    before, trained, after = card.partition(f"\n{TRAINED}")
    return f"{before}\n{section}{trained[1:]}{after}"


def contexts_section(tables: Sequence[Mapping]) -> str:
    """Tokens a round by length of context, a line a temperature; empty without any."""
    if not tables:
        return ""
    lengths = sorted({row["context"] for table in tables for row in table["rows"]})
    lines = []
    for table in tables:
        taus = {row["context"]: f"{row['tau']:.2f}" for row in table["rows"]}
        law = f"T = {table['temperature']:g} ({table['prompts']} questions, {table['max_new_tokens']} tokens each, {table['date']})"
        lines.append(f"| {law} | {' | '.join(taus.get(length, '') for length in lengths)} |\n")
    return (
        f"{CONTEXTS_TITLE}: questions behind one conversation of the target's own answers, all drafted tokens verified\n\n"
        f"| context, tokens | {' | '.join(f'{length:,}' for length in lengths)} |\n|---|{'---|' * len(lengths)}\n{''.join(lines)}\n"
    )
