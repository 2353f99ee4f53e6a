"""What makes confidences probabilities: fitted temperatures, by sampling law, and a bounded shift learned on the way.

This module imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp


@dataclass(frozen=True)
class Fit:
    """What makes confidence logits z and margins m chances, sigmoid(z / T + b + w m), fitted under one sampling law (paper,
    Sequential Temperature Scaling, where b and w are 0). A margin is the best draft logit of a position less the second.

    Tuples go by drafted position. `temperature` is the law's own, 0 for greedy. `acceptance` is the share of judged tokens
    that were accepted, given that all before them were. The errors (ECE, 20 bins) are those of `held_out_rounds` rounds,
    of prompts that were not fitted on; None where no such round drafted that far."""

    temperature: float
    top_k: int
    top_p: float
    temperatures: tuple[float, ...]
    biases: tuple[float, ...]
    margin_weights: tuple[float, ...]
    acceptance: tuple[float, ...]
    ece_before: tuple[float | None, ...]
    ece_after: tuple[float | None, ...]
    rounds: int
    held_out_rounds: int
    prompts: int


def chances(logits: Sequence[float], margins: Sequence[float] | None, fit: Fit | None) -> list[float]:
    """Confidences of the first positions; without a fit the head's own, sigmoid(z). `margins` may be None where the fit weighs none."""
    if fit is None:
        return [sigmoid(z) for z in logits]
    sums = [z / T + b for z, T, b in zip(logits, fit.temperatures, fit.biases, strict=False)]
    if margins is not None:
        sums = [z + w * m if w else z for z, w, m in zip(sums, fit.margin_weights, margins, strict=False)]  # a margin can be infinite
    return [sigmoid(z) for z in sums]


def sigmoid(z: float) -> float:
    return 0.0 if z < -700 else 1 / (1 + exp(-z))


@dataclass(frozen=True)
class Calibration:
    """The fits of one head, and what they were measured on: the target's name and precision, and digests that tell the
    target's weights at that precision, and the head's, from others."""

    target: str
    precision: str
    target_sha256: str
    head_sha256: str
    fits: tuple[Fit, ...]

    def nearest(self, temperature: float) -> Fit:
        """The fit whose law has the nearest temperature; the higher of two that are equally near."""
        return min(self.fits, key=lambda fit: (abs(fit.temperature - temperature), -fit.temperature))


STEP = 0.05  # of a shift, times how far an estimate was off: a drift of 1 takes about a hundred judged tokens
MOST_SHIFT = 2.0  # odds change 7-fold at most: what a wrong turn can do stays bounded
NEAREST_TO_CERTAIN = 1e-6


class OnlineCalibration:
    """A shift of each position's confidence logit, learned from what was accepted; starts at none.

    It is a stochastic gradient step on the log loss of the judged tokens. It learns from finished rounds only, so a
    plan that reads its estimates decides nothing by a token that is still to be judged."""

    def __init__(self, block_size: int, step: float = STEP):
        self.shifts, self.step = [0.0] * block_size, step

    def adjust(self, confidences: Sequence[float]) -> list[float]:
        """The drafter's confidences with each position's shift applied."""
        return [shifted(c, b) for c, b in zip(confidences, self.shifts, strict=False)]

    def learn(self, confidences: Sequence[float], num_planned: int, num_accepted: int) -> None:
        """Take up one round; its confidences are those of the drafter, not adjusted ones."""
        num_judged = min(num_accepted + 1, num_planned)  # the first rejection ends what is known
        for k, estimate in enumerate(self.adjust(confidences[:num_judged])):
            moved = self.shifts[k] + self.step * ((k < num_accepted) - estimate)
            self.shifts[k] = max(-MOST_SHIFT, min(MOST_SHIFT, moved))


def shifted(confidence: float, shift: float) -> float:
    """sigmoid(logit(confidence) + shift)."""
    c = max(NEAREST_TO_CERTAIN, min(1 - NEAREST_TO_CERTAIN, confidence))
    return 1 / (1 + (1 - c) / c * exp(-shift))
