"""The card of a head, in the hub's form: what it is, how it was made, what it was measured to do."""

from dspark.head.calibration import summary
from dspark.head.head import Head
from dspark.head.recurrent import AnyHead
from dspark.target.target import Target


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
Trained on {provenance["answers"]} answers ({provenance["answer_tokens"]:,} tokens) of the target's own, {train["steps"]} steps of
{train["sequences_per_step"] * train["anchors_per_sequence"]} anchors, {train["optimizer"]}, seed {train["seed"]}:

    {provenance["command"]}

Versions, data and the training curve are in `provenance.json`.
"""
