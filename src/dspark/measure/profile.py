"""What a decoding round costs on this machine: by number of verified rows, and the draft beside it.

All figures are medians of interleaved repeats, so that a machine that slows down slows every row count."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dspark.core.sampling import Law
from dspark.drafters import DSparkDrafter
from dspark.head.head import Head
from dspark.target.quantize import num_bytes
from dspark.target.target import Target

REPEATS = 11
ROWS = (1, 2, 3, 4, 6, 8, 12, 16)
BANDWIDTH_BYTES = 2**29  # far beyond any cache


@dataclass(frozen=True)
class Profile:
    """Milliseconds of one pass by number of rows after `context` tokens; of one draft; and what bounds both:
    bytes of weights a pass reads, and the machine's read bandwidth in bytes a second."""

    context: int
    rows: dict[int, float]
    draft: float | None
    block_size: int | None
    weight_bytes: int
    bandwidth: float

    @property
    def share_of_bandwidth(self) -> float:
        """Weights read by a pass of one row, against what the memory could have delivered meanwhile."""
        return self.weight_bytes / (self.rows[1] * 1e-3) / self.bandwidth

    @property
    def break_even(self) -> float | None:
        """Tokens a round must yield for the head to pay: cost of its round in plain steps."""
        if self.draft is None or self.block_size is None:
            return None
        needed = min((n for n in self.rows if n > self.block_size), default=max(self.rows))
        return (self.rows[needed] + self.draft) / self.rows[1]


def profile(
    target: Target,
    head: Head | None,
    context: int = 300,
    rows: Sequence[int] = ROWS,
    repeats: int = REPEATS,
    progress: Callable[[int], None] = lambda done: None,
) -> Profile:
    """Time passes of `rows` tokens after `context` ones, and the head's draft there."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(target.vocab_size, (context + 1,), generator=generator).tolist()
    drafter = DSparkDrafter(head, target) if head is not None else None
    state = target.start()
    features = target.prefill(state, ids[:-1])
    if drafter is not None:
        drafter.start()
        drafter.commit(features)
    times: dict[int, list[float]] = {n: [] for n in (0, *rows)}
    bandwidths = []
    for repeat in range(repeats + 1):  # the first one warms up
        bandwidths.append(read_bandwidth(1))
        for n, taken in times.items():
            begin = time.perf_counter()
            if n:
                target.score(state, (ids * 2)[:n])
                target.rollback(state, n)
            elif drafter is not None:
                drafter.draft(ids, drafter.block_size, Law(greedy=True), generator)
            if repeat:
                taken.append(1e3 * (time.perf_counter() - begin))
        progress(repeat + 1)
    medians = {n: statistics.median(each) for n, each in times.items()}
    draft = medians.pop(0) if drafter is not None else None
    return Profile(
        context,
        {n: medians[n] for n in rows},
        draft,
        drafter.block_size if drafter else None,
        weight_bytes(target),
        statistics.median(bandwidths),
    )


def weight_bytes(target: Target) -> int:
    """Bytes of weights that one pass reads: all but an input embedding of its own, of which it reads single rows."""
    embedding, output = target.model.get_input_embeddings().weight, target.model.get_output_embeddings().weight
    total = sum(num_bytes(p) for p in target.model.parameters())
    return total if embedding is output else total - num_bytes(embedding)


def read_bandwidth(repeats: int = 5) -> float:
    """Bytes a second that torch's threads read from memory, one stream each, while adding up: the best of several tries."""
    block = read_block(BANDWIDTH_BYTES)
    best = 0.0
    for _ in range(repeats):
        begin = time.perf_counter()
        block.sum()
        best = max(best, BANDWIDTH_BYTES / (time.perf_counter() - begin))
    return best


@functools.cache
def read_block(num_bytes: int) -> torch.Tensor:
    return torch.ones(num_bytes // 4)
