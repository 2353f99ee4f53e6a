"""Writes docs/models.md from the families of the tests: `python tests/models_page.py`. test_families.py fails while the page is stale."""

from collections.abc import Callable
from pathlib import Path

from dspark.target.target import Target
from tiny import FAMILIES, tiny_model

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
# Models that people know by another name than transformers' class.
KNOWN_AS = {
    "llama": "Llama, SmolLM2", "qwen3_5": "Qwen3.5, Qwen3.6", "qwen3_5_moe": "Qwen3.5 MoE, Qwen3.6 MoE", "step3p7": "Step-3.7",
    "deepseek_v4": "DeepSeek-V4", "glm_moe_dsa": "GLM-5", "granitemoehybrid": "Granite 4 hybrid", "nemotron_h": "Nemotron-H, Nemotron 3",
    "gpt_oss": "GPT-OSS", "gemma3": "Gemma 3", "gemma4": "Gemma 4", "glm4_moe": "GLM-4 MoE", "deepseek_v3": "DeepSeek-V3",
    "deepseek_v32": "DeepSeek-V3.2", "lfm2": "LFM2", "lfm2_moe": "LFM2 MoE", "qwen3_next": "Qwen3-Next", "qwen3_moe": "Qwen3 MoE",
    "olmo_hybrid": "OLMo Hybrid", "falcon_h1": "Falcon-H1", "kimi_linear": "Kimi Linear", "mamba2": "Mamba 2",
}  # fmt: skip
NATIVE = ("llama", "qwen2", "qwen3")  # test_families.py runs these on the native runtime too
KINDS = {
    "DynamicLayer": "full attention",
    "DynamicSlidingWindowLayer": "sliding window",
    "DynamicIndexedLayer": "indexed (DSA)",
    "GatedDeltaLayer": "gated delta rule",
    "DeepseekV4HCACache": "heavily compressed",
    "DeepseekV4CSACache": "compressed and indexed",
    "DummyLayer": "shared keys",
    "LinearAttentionAndFullAttentionLayer": "full attention with Mamba2",
}
MIXERS = {"lfm2": "convolution", "lfm2_moe": "convolution", "kimi_linear": "KDA", "nemotron_h": "Mamba2"}
# test_mtp.py runs these
MTP = {
    "qwen3_next": "one module", "qwen3_5": "one module", "qwen3_5_moe": "one module", "deepseek_v3": "one module", "glm4_moe": "one module",
    "step3p7": "three in a chain",
}  # fmt: skip
NO_CACHE = {"nemotron_h"}  # whose layers without a cache are no attention layers that share another's

BEFORE = """# Models

This page is made by `python tests/models_page.py` from the families of `tests/tiny.py`. All rows were run with **small random weights**
in float32 on a CPU, with transformers 5.23. Of real checkpoints, only the demo target (SmolLM2-135M) has been run.

For each family the tests (`tests/test_families.py`, a part of them in `make test-slow`) hold:

* *Roll-back.* After a verify pass of six rows and the roll-back of what was rejected, the cache's tensors and the next logits are those of
  plain decoding of the accepted tokens: for every accepted count 0 to 5, prompts of 1 to 7 and of 19 tokens, across sliding windows (8),
  compression windows (4 and 8) and chunks (8). transformers' own cache, cropped, fails the same test.
* *Prompts* in passes of 1, 3, 8 and 64 rows give the same state as one pass.
* *Greedy tokens* are those of `model.generate`, with the DSpark head (vanilla, gated, RNN), DFlash (rank 0), prompt lookup, the arbiter, and
  no drafter.

* *Own MTP modules* (`tests/test_mtp.py`, `tests/test_turns.py`), where the family has them: drafts equal those of the saved weights, without a cache;
  greedy tokens are those of `model.generate`, alone and with another drafter in every round; the engine's answers are the reference loop's.
* *The DSpark head in DeepSeek-V4's own checkpoints* (`tests/test_bundle.py`): drafts, their laws and confidences equal the released formulas,
  written out there a row, head and expert at a time in float64; nine mistakes that one could make each show. Greedy tokens are those of
  `model.generate`, a seed replays, the engine's answers are the reference loop's.
* *The engine* (`tests/test_engine.py`): Gemma 3, Qwen3.5, DeepSeek-V4 and Nemotron-H, one of each kind of cache that is not cut back, and the native
  runtime. Eagerly, requests that run together go through the model one after the other.

| family | cache layers | rejected tokens are forgotten by | prefix cache takes | runtime | `--drafter mtp` |
|---|---|---|---|---|---|
"""

AFTER = """
## The ways to forget

*Crop*: the layer drops its last tokens. *Recompute*: a verify pass keeps its keys, values, decays and step sizes and the state before it; the
accepted rows are applied to that state again. *Snapshot and replay*: what the layers held is put back, and the accepted tokens go through
the model once more. That is one more target pass for each rejection; the planner's measured costs include it.

*Any beginning*: a new request takes as much of an earlier text as it shares. *Whole texts*: it takes an earlier text only if it goes on from
that text's last token, as the next turn of a chat does; states that were left behind cannot be had again.

Any other cache is refused by name. `load_target(..., rollback="snapshot")`, `dspark.graft(..., rollback="snapshot")` or `--rollback snapshot`
tries it with snapshot and replay: the model is taken if, in a check at load, its next logits after every roll-back are those of plain
decoding, and refused if not.

## A head in the target's own checkpoint

DeepSeek-V4's DSpark releases bring their head: tensors `mtp.0` to `mtp.2` (transformers leaves them out), and `dspark_*` keys in `config.json`.
Without `--head` it drafts by itself, and the command says so; `--head none` leaves it out. `--head FOLDER`, or `dspark.load_head(target.name,
target)`, reads it from any checkpoint of the same target. It is only read: it is not trained, calibrated, saved or converted, and it has no
golden vectors. Its FP8 and FP4 tensors become bfloat16 numbers in memory, 39 GB for three layers of V4-Flash's size.

No released checkpoint was loaded, only random weights in the released names; acceptance and speed are not known. The released code rounds
keys to FP8 on their way into its cache, which is not imitated. The releases of V4.1 (other taps, names and hyper-connections) are refused.

## What is equal to the bit, and what is near

A recomputed gated delta state has the bits that plain decoding gives from the same inputs, in float32 and bfloat16: a verify pass uses the
step-by-step rule, as plain decoding does. Snapshots are put back to the bit, and a replay is the pass that plain scoring of the accepted tokens
would be. What goes into these layers is near only: eagerly, a pass of several rows uses other matrix kernels than one of a single row
(float32: the tests allow a share of 1e-4 of the largest logit; bfloat16: states of gated delta layers within 2%).

## Known gaps

* **Nemotron-H.** In transformers 5.23 its Mamba layers bound the time step from below (`time_step_min`) in passes of several rows and not in
  passes of one, so that a prompt leaves another state than the same tokens decoded. dspark never applies the bound: its state is that of
  decoding token by token, and its text can differ from `model.generate`'s, whose prompt pass applies it. The greedy tokens above are compared
  without the bound.
* **Jamba and Mamba** cannot be targets: a pass of several rows forgets their state in transformers 5.23. The check at load refuses them.
  **Bamba** was refused by the check as well; why was not looked into.
* **Qwen3.5, Step-3.7** and other models with a vision tower: text only.
* Multi-token-prediction modules: the one that DeepSeek-V4's plain releases bring is not read; those of DeepSeek-V3.2 and GLM-5 are refused,
  because transformers 5.23 makes no attention masks for them. In the engine they draft for one request after the other. No released checkpoint
  was loaded, and no acceptance or speed was measured.
* Rotary embeddings that depend on the length of the text (longrope, dynamic) are refused.
* DeepSeek-V4: `dspark train` samples prompts of one length at a time, because its compressed keys do not leave padding out.
* No hub kernels (fla, mamba_ssm, causal-conv1d) and no GPU were used. If a kernel replaces a gated delta layer as a whole, the first roll-back
  raises an error that says so.
* Models that a snapshot serves pay for each rejection; no speed was measured.
"""


def page(target_of: Callable[[str], Target] = lambda family: Target(tiny_model(family))) -> str:
    return BEFORE + "".join(row(family, target_of(family)) for family in FAMILIES) + AFTER


def row(family: str, target: Target) -> str:
    layers = target.start().cache.layers
    kinds = list(dict.fromkeys(kind(family, type(layer).__name__) for layer in layers))
    ways = ["crop"] if any(i not in target.forgets.snapshot | target.forgets.delta for i in range(len(layers))) else []
    ways += ["recompute"] if target.forgets.delta else []
    ways += ["snapshot and replay"] if target.forgets.replays else []
    reuse = "any beginning" if target.can_shorten(target.start()) else "whole texts"
    native = "native, eager" if family in NATIVE else "eager"
    name = KNOWN_AS.get(family, FAMILIES[family][0])
    known = f"{name} (`{family}`)"
    return f"| {known} | {', '.join(k for k in kinds if k)} | {', '.join(ways)} | {reuse} | {native} | {MTP.get(family, '-')} |\n"


def kind(family: str, layer: str) -> str:
    if layer == "LinearAttentionLayer":
        return MIXERS.get(family, "Mamba2")
    return "" if layer == "DummyLayer" and family in NO_CACHE else KINDS[layer]


if __name__ == "__main__":
    PAGE.write_text(page())
