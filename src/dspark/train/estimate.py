"""What a training run will take, said before it starts. Arithmetic from the target's size, no probing run."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from dspark.config import TrainConfig
from dspark.profiling import device_name
from dspark.prompts import Prompt
from dspark.target.target import Target
from dspark.train.answers import INVENT_TOKENS, OPENER_TOKENS
from dspark.train.features import fits_gpu

# What is measured while training: points of the curve and answers each; prompts and tokens of real rounds, at T = 0 and 1.
CURVE_POINTS, CURVE_ANSWERS = 10, 48
ROUNDS_PROMPTS, ROUNDS_TOKENS = 16, 64
# Sustained rate of one Zen 4 core in the batched stages, measured: bfloat16 matrix products with all
# that surrounds them. Other machines scale the time, not the text.
FLOPS_PER_THREAD = {torch.bfloat16: 6.5e10, torch.float32: 3.5e10}
# The same of one NVIDIA H200 with the demo target: passes and steps, and sampling; and the seconds its step takes to compile.
GPU_FLOPS, GPU_SAMPLING_FLOPS, GPU_COMPILING = 7.5e13, 3e13, 50.0
# Bytes of weights a second that decoding one token after another reads on two of those cores (bench/results).
BYTES_PER_SECOND = {"native": 2.9e10, "eager": 6e9}
GPU_BYTES_PER_SECOND, GPU_PASS = 2e12, 0.035  # on a GPU; no eager pass took less there: the processor launches a thousand kernels
PROMPT_TOKENS = 80  # of an instruction with its template


def estimate(
    target: Target, config: TrainConfig, shape: dict, prompts: Sequence[Prompt] | None, answers: Sequence[Path], served: bool = False
) -> str:
    """One paragraph: time, memory and disk, rough to a factor of two. How long a server takes to answer is not known."""
    weights = sum(p.numel() for p in target.model.parameters())
    on_gpu = target.device.type == "cuda"
    rate = GPU_FLOPS if on_gpu else FLOPS_PER_THREAD.get(target.model.dtype, 3.5e10) * torch.get_num_threads()
    sampling_rate = GPU_SAMPLING_FLOPS if on_gpu else rate
    inventing = 0 if answers else config.num_prompts * (INVENT_TOKENS + OPENER_TOKENS) * 2 * weights / sampling_rate
    num_answers = sum(Path(a).read_bytes().count(b"\n") for a in answers) if answers else config.num_prompts + len(prompts or ())
    tokens = num_answers * (config.max_answer_tokens + PROMPT_TOKENS)
    sampling = 0 if answers or served else tokens * 2 * weights / sampling_rate
    visits = config.steps * config.sequences_per_step
    passes = min(visits + config.held_out, num_answers) * (config.max_answer_tokens + PROMPT_TOKENS)
    features = passes * 2 * weights / rate
    D = target.hidden_size
    width = shape.get("intermediate_size") or getattr(target.text_config, "intermediate_size", None) or 4 * D
    layer = 4 * D * D + 3 * D * width
    draft_vocabulary = shape.get("draft_vocab_size") or target.vocab_size
    block = shape.get("block_size", 5)
    block_row = 2 * (shape.get("num_hidden_layers", 2) * layer + draft_vocabulary * (D + shape.get("markov_rank", 96))) / (2 * rate)
    steps = visits * config.anchors_per_sequence * block * 3 * block_row + (GPU_COMPILING if on_gpu else 0)  # forth and back
    looks = CURVE_POINTS * min(CURVE_ANSWERS, config.held_out) + config.held_out  # at held-out answers, an anchor a token
    read = weights * target.model.dtype.itemsize
    one_pass = max(GPU_PASS, read / GPU_BYTES_PER_SECOND) if on_gpu else read / BYTES_PER_SECOND[target.runtime_name]
    rounds = 2 * min(ROUNDS_PROMPTS, config.held_out) * ROUNDS_TOKENS * one_pass
    measuring = looks * config.max_answer_tokens * block * block_row + rounds
    rows_memory = config.sequences_per_step * config.anchors_per_sequence * block * draft_vocabulary * 4 * 5
    memory = weights * target.model.dtype.itemsize + rows_memory + 1e9
    samples = passes * (5 * D * 2 + 6 * config.teacher_tokens)
    if fits_gpu(target.device, samples):
        memory, disk = memory + samples, 1e9
    else:
        disk = min(config.cache_gigabytes * 1e9, samples) + 1e9
    free = torch.cuda.mem_get_info(target.device)[0] if on_gpu else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    where = device_name(target.device) if on_gpu else f"{torch.get_num_threads()} threads"
    stages = {"to invent instructions": inventing, "to sample answers": sampling, "for features": features,
              f"for {config.steps} steps": steps, "for measuring on held-out answers": measuring}  # fmt: skip
    return (
        f"about {', '.join(f'{minutes(seconds)} {what}' for what, seconds in stages.items() if seconds)} "
        f"on {where}; about {memory / 1e9:.1f} GB of memory ({free / 1e9:.0f} GB free now) and {disk / 1e9:.1f} GB of disk"
    )


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
