"""From logits to the law a token is drawn from, and the draw itself.

Target and drafts go through `probs`; temperature zero is a one-hot law from the same function.
Shapes: T rows, V vocabulary."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dspark.errors import LogitsError

IMPOSSIBLE = "no token is possible under these logits and sampling settings (NaN, or every token masked)"

# (prefix_ids [1, L], logits [1, V]) -> logits [1, V], as transformers' LogitsProcessor
Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Law:
    """A sampling law: `processors` look at the tokens before a row, `warpers` at its logits only.

    Both are applied in order, processors first; `greedy` then keeps the best token alone."""

    processors: tuple[Processor, ...] = ()
    warpers: tuple[Processor, ...] = ()
    greedy: bool = False

    @property
    def temperature(self) -> float:
        """The temperature that the law samples at, 0 when greedy: what its warpers (`temperature`, as transformers names
        it) multiply to. Read to choose a calibration only."""
        return 0.0 if self.greedy else math.prod(getattr(p, "temperature", 1.0) for p in (*self.processors, *self.warpers))


GREEDY = Law(greedy=True)


def probs(law: Law, prefixes: Sequence[Sequence[int]], logits_TV: torch.Tensor) -> torch.Tensor:
    """The law of each row's token [T, V], in float32 or the wider type given; row t follows `prefixes[t]`.

    Raises `LogitsError` where a row leaves no token possible."""
    logits_TV = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
    if law.processors:
        rows = []
        for prefix, row_V in zip(prefixes, logits_TV, strict=True):
            ids = torch.tensor([list(prefix)], dtype=torch.long, device=row_V.device)
            # a copy: processors may write into what they are given, and rows share the scored logits
            rows.append(apply(law.processors, ids, row_V[None].clone()))
        logits_TV = torch.cat(rows)
    if law.greedy:
        refuse_empty(logits_TV)
        return torch.zeros_like(logits_TV).scatter_(-1, logits_TV.argmax(-1, keepdim=True), 1.0)
    logits_TV = apply(law.warpers, torch.empty(len(logits_TV), 0, dtype=torch.long), logits_TV)
    refuse_empty(logits_TV)
    return logits_TV.softmax(-1)


def best(logits_TV: torch.Tensor) -> list[int]:
    """Each row's best token, the first of equals, as the one-hot law of `probs` has it."""
    if logits_TV.device.type == "cpu":  # numpy's argmax takes a tenth of the time of torch's; both take a NaN for the best
        rows = logits_TV.numpy()
        ids = rows.argmax(-1)
        possible = bool(np.isfinite(rows[np.arange(len(rows)), ids]).all())
    else:
        ids = logits_TV.argmax(-1)
        possible = bool(torch.isfinite(logits_TV.gather(-1, ids[:, None])).all())
    if not possible:
        raise LogitsError(IMPOSSIBLE)
    return ids.tolist()


def apply(processors: Sequence[Processor], ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    for process in processors:
        logits = process(ids, logits)
    return logits


def refuse_empty(logits_TV: torch.Tensor) -> None:
    if not torch.isfinite(logits_TV.amax(-1)).all():
        raise LogitsError(IMPOSSIBLE)


def draw(probs_V: torch.Tensor, uniform: float) -> int:
    """The token whose slice of the cumulative law holds `uniform` in [0, 1); never one of probability 0."""
    cdf = probs_V.cumsum(-1, dtype=torch.float64)
    token = int(torch.searchsorted(cdf, uniform * cdf[-1], right=True))
    # Rounding can push the search past the end; the last token with mass is where the cdf first peaks.
    return token if token < len(cdf) else int(cdf.argmax())


class Streams:
    """One request's randomness. Draft, acceptance and recovery draw from separate streams, so no
    decision can depend on a number that a later one uses again; one seed replays the request."""

    def __init__(self, seed: int):
        self.draft, self.accept, self.recover = (torch.Generator().manual_seed(seed * 3 + i) for i in range(3))

    @staticmethod
    def uniforms(generator: torch.Generator, count: int) -> list[float]:
        return torch.rand(count, generator=generator, dtype=torch.float64).tolist()


class Coupled:
    """One request's randomness when it has to give the same answer whatever is drafted: every token is the one whose
    probability, divided by an exponential number of its own, is largest (a draw from exactly its law), and these numbers depend
    on the seed and on the token's position alone. Draft and target use the same ones, so a good draft still agrees.

    A drafted token then stands with probability (1 - d) / (1 + d) or better, d the laws' total variation distance; independent
    randomness gives 1 - d (`Streams`), which is why this is for requests that ask for a seed."""

    KEPT = 16  # positions whose numbers are kept, a vocabulary each: those of a round are used twice

    def __init__(self, seed: int):
        self.seed, self.kept = seed, {}  # type: tuple[int, dict[int, torch.Tensor]]

    @property
    def draft(self) -> "Coupled":
        """The same numbers serve the draft. (An attribute would be a cycle, and keep them until the garbage collector comes.)"""
        return self

    def exponentials(self, position: int, vocab_size: int, device: torch.device) -> torch.Tensor:
        if position not in self.kept:
            while len(self.kept) >= self.KEPT:
                del self.kept[min(self.kept)]
            random = np.random.Generator(np.random.Philox(key=[self.seed, position]))
            # Drawn in double precision: float32 ones lie on a grid of 2^-23, and in a large vocabulary one of them often is 0.
            numbers = random.standard_exponential(vocab_size).astype(np.float32)
            self.kept[position] = torch.from_numpy(numbers).clamp_min(torch.finfo(torch.float32).tiny).to(device)
        return self.kept[position]

    def choose(self, probs_C: torch.Tensor, position: int, vocab_size: int, ids_C: torch.Tensor | None = None) -> int:
        """Where among these tokens (all of the vocabulary, or those of `ids_C`) the one at `position` of the text is."""
        numbers = self.exponentials(position, vocab_size, probs_C.device)
        return int((probs_C / (numbers if ids_C is None else numbers[ids_C])).argmax())
