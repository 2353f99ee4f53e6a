"""What a training run will take, said before it starts: seconds of the stages from what sampling and decoding take here at this
moment, measured for two or three seconds; memory and disk by arithmetic."""

import contextlib
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dspark.config import TrainConfig
from dspark.profiling import device_name
from dspark.prompts import Prompt
from dspark.target.target import Target
from dspark.train.answers import INVENT_TOKENS, OPENER_TOKENS, batch_size
from dspark.train.features import SUFFIX, default_taps, fits_gpu, token_bytes
from dspark.train.sample import sample_batch

# What is measured while training: points of the curve at most, steps between two at least (a look costs more than a step), and answers
# each; prompts and tokens of real rounds, and tokens after each held-out prompt to calibrate on, both at T = 0 and 1.
CURVE_POINTS, CURVE_STEPS, CURVE_ANSWERS = 10, 25, 48
ROUNDS_PROMPTS, ROUNDS_TOKENS = 16, 64
CALIBRATION_TOKENS = 128
TEXT_BYTES = 8  # of a token of prompts and answers, as they are written down
# Of a weight, when the disk holds most: a checkpoint (the weight and two moments in float32) is written beside the one before.
CHECKPOINT_BYTES = 2 * 12
SMALL_FILES = 3e5  # golden vectors, curve, records, card
PROMPT_TOKENS = 80  # of an instruction with its template
HEAD_RATE = 2.0  # of multiplications a second in steps against sampling: larger products, measured on two Zen 4 cores
GPU_COMPILING = 50.0  # seconds that the step of the demo target's head took to compile on one NVIDIA H200
# Bounds of the measurement in seconds: of the very first pass, which makes ready what the others use; of a pass of one row; of what
# is expected of the least batch, and of the largest; of passes repeated.
FIRST_SECONDS, ROW_SECONDS, LEAST_SECONDS, BATCH_SECONDS, REST_SECONDS = 1.2, 0.4, 2.0, 0.6, 0.4
FEW_ROWS, LEAST_ROWS = 4, 16  # fewer than the latter say nothing of a batch: they wait for the weights, which all rows share


@dataclass(frozen=True)
class Pace:
    """Seconds on this machine now: one token more for each of `rows` texts that are sampled at once; one token of one text by
    the target's runtime."""

    rows: int
    batch_seconds: float
    token_seconds: float

    def batch(self, rows: int) -> float:
        """One token more for each of so many texts."""
        return self.batch_seconds * max(1.0, rows / self.rows)

    def passes(self, num_tokens: float) -> float:
        """The target over so many tokens that are known."""
        return num_tokens * self.batch_seconds / self.rows


@dataclass(frozen=True)
class Done:
    """What an earlier start of the run left: instructions, answers, answers with features, steps, bytes on disk."""

    invented: int = 0
    answered: int = 0
    cached: int = 0
    steps: int = 0
    size: int = 0


def done_before(work: Path) -> Done:
    """Read from the files of a run's work; what is damaged counts as nothing here, and is told by who needs it."""
    lines = {name: file.read_bytes().count(b"\n") if (file := work / name).exists() else 0 for name in ("prompts.jsonl", "answers.jsonl")}
    filled, steps = work / "cache" / f"filled.{SUFFIX[torch.uint8]}", 0
    with contextlib.suppress(Exception):  # torch raises a dozen kinds for a file that is cut or changed
        steps = int(torch.load(work / "checkpoint.pt", weights_only=True, map_location="cpu", mmap=True)["step"])
    return Done(
        lines["prompts.jsonl"],
        lines["answers.jsonl"],
        filled.read_bytes().count(1) if filled.exists() else 0,
        steps,
        sum(file.stat().st_size for file in work.rglob("*") if file.is_file()),
    )


def pace(target: Target, most_rows: int) -> Pace | None:
    """Sample a token for as many texts as a batch of `most_rows` has, or fewer where that takes too long; None where
    `LEAST_ROWS` do."""
    if min(sampling(target, 1)) > FIRST_SECONDS or (one := min(sampling(target, 1, 0.1))) > ROW_SECONDS:
        return None
    # By small steps: with each row a mixture of experts may read other weights.
    if one + slope(target, one, FEW_ROWS) * (LEAST_ROWS - 1) > LEAST_SECONDS:
        return None
    each = slope(target, one, LEAST_ROWS)
    rows = most_rows
    while rows > LEAST_ROWS and one + (rows - 1) * each > BATCH_SECONDS:
        rows //= 2
    # The mean: what other processes take of the machine now they will take during the run.
    return Pace(rows, statistics.mean(sampling(target, rows, REST_SECONDS)), statistics.mean(decoding(target, REST_SECONDS)))


def slope(target: Target, one: float, rows: int) -> float:
    """Seconds that each row adds to a pass of one row."""
    return max(0.0, min(sampling(target, rows, 0.1)) - one) / (rows - 1)


def sampling(target: Target, rows: int, limit: float = 0.0) -> list[float]:
    """Seconds a token in which training's own sampler continues so many texts."""
    return tries(lambda: sample_batch(target, [[0]] * rows, [1.0] * rows, 1, 0, frozenset()), limit)


def decoding(target: Target, limit: float) -> list[float]:
    """Seconds a token of one text, as rounds are decoded for measuring."""
    state = target.start()

    def one() -> None:
        target.score(state, [0])
        target.rollback(state, 0)

    return tries(one, limit)


def tries(run: Callable[[], Any], limit: float) -> list[float]:
    """Seconds of what runs begin within `limit` seconds, one at least; the first, which makes ready what others use, only if it is alone."""
    seconds: list[float] = []
    give_up = time.perf_counter() + limit
    while not seconds or (len(seconds) < 100 and time.perf_counter() < give_up):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return seconds[1:] or seconds


def estimate(
    target: Target,
    config: TrainConfig,
    shape: dict,
    prompts: Sequence[Prompt] | None,
    answers: Sequence[Path],
    served: bool = False,
    done: Done = Done(),
) -> str:
    """One paragraph: time, memory and disk, rough to a factor of two while the machine's load stays as it is. How long a
    server takes to answer is not known. Of a run that goes on, what is left beside what is `done`."""
    num_answers = sum(Path(a).read_bytes().count(b"\n") for a in answers) if answers else config.num_prompts + len(prompts or ())
    answer_tokens = PROMPT_TOKENS + config.max_answer_tokens
    if done.cached or done.steps:  # what did not fit the context has no answer, and all others have
        done = replace(done, answered=num_answers)
    steps = max(0, config.steps - done.steps)
    seen = steps * config.sequences_per_step + (0 if done.cached else config.held_out)  # what is held out is looked at early
    passes = max(0, min(seen, num_answers - done.cached)) * answer_tokens
    found = pace(target, min(batch_size(target, answer_tokens), max(1, num_answers)))
    if found is None:
        time_needed = "time unknown until measured: a batch of answers takes too long to try one; each stage shows what is left of it"
    else:
        sampled: dict[str, float] = {} if answers else {
            "to invent instructions": sampling_all(target, config.num_prompts - done.invented, OPENER_TOKENS + INVENT_TOKENS, found),
            "to sample answers": 0 if served else sampling_all(target, num_answers - done.answered, answer_tokens, found),
        }  # fmt: skip
        others = {
            "for features": found.passes(passes),
            f"for {steps} steps": stepping(target, config, shape, found, steps),
            "for measuring and calibrating on held-out answers": measuring(target, config, shape, found, steps),
        }
        # texts end where they like: what is sampled is counted as if each were as long as it may be
        parts = [f"at most {listed(sampled)}"] if any(sampled.values()) else []
        time_needed = f"as fast as the machine is now, {'; '.join([*parts, listed(others)])}"
    memory, features, other, free = space(target, config, shape, num_answers * answer_tokens)
    threads = torch.get_num_threads()
    where = device_name(target.device) if target.device.type == "cuda" else f"{threads} thread{'s' if threads > 1 else ''}"
    needed = f"about {memory / 1e9:.1f} GB of memory ({free / 1e9:.0f} GB free now)"
    if done.size:
        return f"what is left: {time_needed} on {where}; {needed} and {size(max(0, features + other - done.size))} more of disk"
    return f"{time_needed} on {where}; {needed} and {size(features + other)} of disk" + (
        f", {size(features)} of it features in {config.feature_dtype}, never more than {config.cache_gigabytes:g} GB" if features else ""
    )


def sampling_all(target: Target, num_texts: int, num_tokens: int, found: Pace) -> float:
    """Seconds to sample so many texts of so many tokens, in batches; 0 for none."""
    if num_texts < 1:
        return 0.0
    rows = max(1, min(batch_size(target, num_tokens), num_texts))
    return math.ceil(num_texts / rows) * num_tokens * found.batch(rows)


def row_work(target: Target, shape: dict) -> float:
    """What a row of the head costs, as a share of one sampled token."""
    rank = 0 if "kind" in shape else shape.get("markov_rank", 96)
    output = (shape.get("draft_vocab_size") or target.vocab_size) * (target.hidden_size + rank)
    return (layer_weights(target, shape) + output) / sum(p.numel() for p in target.model.parameters()) / HEAD_RATE


def layer_weights(target: Target, shape: dict) -> int:
    """Weights of the draft layers."""
    D = target.hidden_size
    width = shape.get("intermediate_size") or getattr(target.text_config, "intermediate_size", None) or 4 * D
    return (1 if "kind" in shape else shape.get("num_hidden_layers", 2)) * (4 * D * D + 3 * D * width)


def trained_rows(shape: dict) -> int:
    """Rows of an anchor in a step: its block, or as much of a recurrent head's chain as is trained."""
    return shape.get("trained_steps") or (1 if shape.get("kind") == "mtp" else shape.get("block_size", 5))


def stepping(target: Target, config: TrainConfig, shape: dict, found: Pace, steps: int) -> float:
    if steps == 0:
        return 0.0
    rows = steps * config.sequences_per_step * config.anchors_per_sequence * trained_rows(shape)
    return found.passes(3 * rows * row_work(target, shape)) + (GPU_COMPILING if target.device.type == "cuda" else 0)  # forth and back


def curve_every(steps: int) -> int:
    """Steps from one point of the held-out curve to the next; the last step has one too."""
    return max(CURVE_STEPS, steps // CURVE_POINTS)


def measuring(target: Target, config: TrainConfig, shape: dict, found: Pace, steps: int) -> float:
    """The curve's points of so many steps, the last look at held-out answers (an anchor a token), rounds that are decoded, and the calibration's."""
    looks = math.ceil(steps / curve_every(config.steps)) * min(CURVE_ANSWERS, config.held_out) + config.held_out
    rows = looks * config.max_answer_tokens * shape.get("block_size", 5)
    decoded = 2 * (min(ROUNDS_PROMPTS, config.held_out) * ROUNDS_TOKENS + config.held_out * CALIBRATION_TOKENS)
    return found.passes(rows * row_work(target, shape)) + decoded * found.token_seconds


def space(target: Target, config: TrainConfig, shape: dict, num_tokens: int) -> tuple[float, float, float, float]:
    """Bytes of memory that a run takes, of disk for features and for all else while it holds most, and of memory that are free.
    `num_tokens`: of all answers with their prompts, since each gets its place in the cache."""
    weights = sum(p.numel() for p in target.model.parameters()) * target.model.dtype.itemsize
    rows = config.sequences_per_step * config.anchors_per_sequence * trained_rows(shape)
    memory = weights + rows * (shape.get("draft_vocab_size") or target.vocab_size) * 4 * 5 + 1e9
    samples = num_tokens * token_bytes(num_taps(target, shape), target.hidden_size, config.teacher_tokens, config.feature_dtype)
    other = head_weights(target, shape) * CHECKPOINT_BYTES + num_tokens * TEXT_BYTES + SMALL_FILES
    if target.device.type == "cuda":
        free = torch.cuda.mem_get_info(target.device)[0]
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if fits_gpu(target.device, samples):
        return memory + samples, 0, other, free
    return memory, min(config.cache_gigabytes * 1e9, samples), other, free


def num_taps(target: Target, shape: dict) -> int:
    """Layers that the head reads."""
    usual = {"mtp": 1, "eagle3": 3}.get(shape.get("kind", ""), len(default_taps(target.num_layers)))
    return len(shape.get("target_layer_ids") or ()) or usual


def head_weights(target: Target, shape: dict) -> int:
    """About as many as the head will have that are trained."""
    D, rank = target.hidden_size, 0 if "kind" in shape else shape.get("markov_rank", 96)
    draft_vocab = shape.get("draft_vocab_size") or target.vocab_size
    own_output = D * draft_vocab if shape.get("kind") == "eagle3" else 0
    return num_taps(target, shape) * D * D + layer_weights(target, shape) + rank * (target.vocab_size + draft_vocab) + own_output


def size(num_bytes: float) -> str:
    if num_bytes >= 1e8:
        return f"{num_bytes / 1e9:.1f} GB"
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes >= 1e7 else f"{num_bytes / 1e6:.1f} MB"


def listed(stages: dict[str, float]) -> str:
    return "about " + ", ".join(f"{minutes(seconds)} {what}" for what, seconds in stages.items() if seconds)


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
