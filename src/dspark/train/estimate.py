"""What a training run will take, said before it starts. Arithmetic from the target's size, no probing run."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from dspark.config import TrainConfig
from dspark.prompts import Prompt
from dspark.target.target import Target

# Sustained rate of one Zen 4 core in the batched stages, measured: bfloat16 matrix products with all
# that surrounds them. Other machines scale the time, not the text.
FLOPS_PER_THREAD = {torch.bfloat16: 6.5e10, torch.float32: 3.5e10}


def estimate(target: Target, config: TrainConfig, shape: dict, prompts: Sequence[Prompt] | None, answers: Sequence[Path]) -> str:
    """One paragraph: time, memory and disk, rough to a factor of two."""
    weights = sum(p.numel() for p in target.model.parameters())
    rate = FLOPS_PER_THREAD.get(target.model.dtype, 3.5e10) * torch.get_num_threads()
    num_answers = sum(Path(a).read_bytes().count(b"\n") for a in answers) if answers else config.num_prompts + len(prompts or ())
    tokens = num_answers * (config.max_answer_tokens + 80)
    sampling = 0 if answers else tokens * 2 * weights / rate
    visits = config.steps * config.sequences_per_step
    passes = min(visits, num_answers) * (config.max_answer_tokens + 80)
    features = passes * 2 * weights / rate
    D = target.hidden_size
    width = shape.get("intermediate_size") or getattr(target.text_config, "intermediate_size", None) or 4 * D
    layer = 4 * D * D + 3 * D * width
    draft_vocabulary = shape.get("draft_vocab_size") or target.vocab_size
    block_rows = visits * config.anchors_per_sequence * shape.get("block_size", 5)
    steps = (
        block_rows * 6 * (shape.get("num_hidden_layers", 2) * layer + draft_vocabulary * (D + shape.get("markov_rank", 96))) / (2 * rate)
    )
    rows_memory = config.sequences_per_step * config.anchors_per_sequence * shape.get("block_size", 5) * draft_vocabulary * 4 * 5
    memory = weights * target.model.dtype.itemsize + rows_memory + 1e9
    disk = min(config.cache_gigabytes * 1e9, passes * (5 * D * 2 + 6 * config.teacher_tokens)) + 1e9
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return (
        f"about {minutes(sampling)} to sample answers, {minutes(features)} for features, {minutes(steps)} for {config.steps} steps "
        f"on {torch.get_num_threads()} threads; about {memory / 1e9:.1f} GB of memory ({free / 1e9:.0f} GB free now) and {disk / 1e9:.1f} GB of disk"
    )


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
