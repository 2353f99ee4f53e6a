"""Confidence calibration: Sequential Temperature Scaling, what it is compared with, and figures of merit.

Pure functions. Shapes: R rounds, G positions of a block. Tables [R, G] hold NaN where a round drafted fewer tokens. An
estimate of a position is the running product of its confidences, its event that all tokens up to there were accepted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

BINS = 20  # of equal width, for the expected calibration error
# Temperatures tried, 0.1 to 10 in steps of 6%, and then 21 within one such step. Both hold 1 in their middle.
COARSE = 10 ** np.linspace(-1, 1, 81)
FINE = 10 ** np.linspace(-1 / 40, 1 / 40, 21)


@dataclass(frozen=True)
class Rounds:
    """Recorded rounds: confidence logits and margins (best draft logit minus the second) [R, G], accepted tokens [R], and
    the number of the prompt each came from [R]."""

    logits_RG: np.ndarray
    margins_RG: np.ndarray
    num_accepted_R: np.ndarray
    prompts_R: np.ndarray

    def __len__(self) -> int:
        return len(self.num_accepted_R)

    def of(self, prompts: Sequence[int]) -> "Rounds":
        """The rounds of these prompts."""
        mine = np.isin(self.prompts_R, list(prompts))
        return Rounds(self.logits_RG[mine], self.margins_RG[mine], self.num_accepted_R[mine], self.prompts_R[mine])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -50, 50)))  # NaN stays NaN


@dataclass(frozen=True)
class Curves:
    """Confidences by position, sigmoid(z / T + b + w m), from logits z and margins m."""

    temperatures: Sequence[float]
    biases: Sequence[float]
    margin_weights: Sequence[float]

    @staticmethod
    def temperatures_only(temperatures: Sequence[float]) -> "Curves":
        none = [0.0] * len(temperatures)
        return Curves(temperatures, none, none)


def survival(rounds: Rounds, curves: Curves | None = None) -> np.ndarray:
    """The estimated chance that the first k tokens stand [R, G]: the running product of confidences, raw ones without curves."""
    logits_RG = rounds.logits_RG
    if curves is not None:
        weights_G = np.asarray(curves.margin_weights)
        logits_RG = logits_RG / np.asarray(curves.temperatures) + np.asarray(curves.biases)
        if weights_G.any():
            logits_RG = logits_RG + weights_G * rounds.margins_RG
    return np.cumprod(sigmoid(logits_RG), axis=1)


def ece(estimates_R: np.ndarray, happened_R: np.ndarray) -> float:
    """Expected calibration error: how far mean estimate and frequency are apart in each bin, weighted by its rounds."""
    bins = np.minimum((estimates_R * BINS).astype(int), BINS - 1)
    return float(np.abs(np.bincount(bins, estimates_R - happened_R)).sum() / len(estimates_R))


def auroc(estimates_R: np.ndarray, happened_R: np.ndarray) -> float | None:
    """Chance that an event that happened had the higher estimate than one that did not, ties counting half; None where
    all or none happened."""
    num_happened = int(happened_R.sum())
    num_pairs = num_happened * (len(happened_R) - num_happened)
    if num_pairs == 0:
        return None
    _, where_R, counts = np.unique(estimates_R, return_inverse=True, return_counts=True)
    ranks_R = (np.cumsum(counts) - (counts - 1) / 2)[where_R]
    return float((ranks_R[happened_R].sum() - num_happened * (num_happened + 1) / 2) / num_pairs)


def figures(estimates_RG: np.ndarray, num_accepted_R: np.ndarray) -> list[dict]:
    """ECE, AUROC and Brier score of the estimates by position, over the rounds that drafted so far.

    `chance` is the ECE that as many rounds show on average when the estimates are exactly right."""
    report: list[dict] = []
    for k in range(estimates_RG.shape[1]):
        drafted_R = ~np.isnan(estimates_RG[:, k])
        estimates, happened = estimates_RG[drafted_R, k], num_accepted_R[drafted_R] > k
        if not len(estimates):
            report.append({"rounds": 0, "ece": None, "auroc": None, "brier": None, "chance": None})
            continue
        generator = np.random.default_rng(0)
        draws = [ece(estimates, generator.random(len(estimates)) < estimates) for _ in range(20)]
        report.append({"rounds": len(estimates), "ece": ece(estimates, happened), "auroc": auroc(estimates, happened),
                       "brier": float(np.mean((estimates - happened) ** 2)), "chance": float(np.mean(draws))})  # fmt: skip
    return report


def fit_temperatures(rounds: Rounds) -> list[float]:
    """T_1 .. T_G: from the first position on, with those before it fixed, the one whose estimates have the least ECE; of
    equals the one nearest to 1. A position that no round drafted gets 1."""
    temperatures, before_R = [], np.ones(len(rounds))
    for logits_R, k in zip(rounds.logits_RG.T, range(rounds.logits_RG.shape[1]), strict=True):
        drafted_R = ~np.isnan(logits_R)
        before, logits, happened = before_R[drafted_R], logits_R[drafted_R], rounds.num_accepted_R[drafted_R] > k

        def error(T: float, before=before, logits=logits, happened=happened) -> float:
            return ece(before * sigmoid(logits / T), happened)

        best = 1.0
        if len(happened):
            best = least(error, COARSE)
            best = least(error, best * FINE)
        temperatures.append(float(best))
        before_R = before_R * sigmoid(logits_R / best)
    return temperatures


def fit_curves(rounds: Rounds, with_margin: bool = False) -> Curves:
    """The logistic curve of least log loss through the tokens judged at each position, of the logit or of logit and margin.

    Where nearly all logits are near 0 a temperature alone changes nothing, and cannot put right what is off by a bias; and a head learns
    to tell the overlap of the laws, the acceptance at temperature 1, while the margin tells more of greedy drafts."""
    temperatures, biases, weights = [], [], []
    for k, (logits_R, margins_R) in enumerate(zip(rounds.logits_RG.T, rounds.margins_RG.T, strict=True)):
        judged_R = ~np.isnan(logits_R) & (rounds.num_accepted_R >= k)
        inputs = np.stack([logits_R[judged_R], np.ones(judged_R.sum()), *([margins_R[judged_R]] if with_margin else [])])
        slope, offset, *weight = fit_logistic(inputs, rounds.num_accepted_R[judged_R] > k, prior=[1.0, 0.0, 0.0][: len(inputs)])
        temperatures.append(float(1 / np.clip(slope, 1 / COARSE[-1], 1 / COARSE[0])))
        biases.append(float(offset))
        weights.append(float(weight[0]) if with_margin else 0.0)
    return Curves(temperatures, biases, weights)


def least(error: Callable[[float], float], candidates: np.ndarray) -> float:
    """The candidate of the least error, the one nearest to 1 of equals."""
    return min(sorted(candidates, key=lambda T: abs(np.log(T))), key=error)


def acceptance(rounds: Rounds) -> list[float]:
    """Share of tokens accepted by position, given that all before were; a position never judged takes the last one's."""
    rates = [0.0]
    for k, logits_R in enumerate(rounds.logits_RG.T):
        judged_R = ~np.isnan(logits_R) & (rounds.num_accepted_R >= k)
        rates.append(float(np.mean(rounds.num_accepted_R[judged_R] > k)) if judged_R.any() else rates[-1])
    return rates[1:]


def margin_survival(fitted: Rounds, held_out: Rounds) -> np.ndarray:
    """The baseline's estimates for `held_out` [R, G]: at each position the draft logits' margin through a logistic curve
    that was fitted to the tokens of `fitted` judged there."""
    confidences_RG = np.full_like(held_out.margins_RG, np.nan)
    for k, margins_R in enumerate(fitted.margins_RG.T):
        judged_R = ~np.isnan(margins_R) & (fitted.num_accepted_R >= k)
        inputs = np.stack([margins_R[judged_R], np.ones(judged_R.sum())])
        slope, offset = fit_logistic(inputs, fitted.num_accepted_R[judged_R] > k, prior=[0.0, 0.0])
        confidences_RG[:, k] = sigmoid(slope * held_out.margins_RG[:, k] + offset)
    return np.cumprod(confidences_RG, axis=1)


def fit_logistic(inputs: np.ndarray, happened: np.ndarray, prior: Sequence[float], ridge: float = 1.0) -> np.ndarray:
    """Weights of the inputs [inputs, R], the logistic curve of least log loss, by Newton's method. The ridge, which draws them towards
    `prior`, keeps them finite where the data are few or can be told apart."""
    weights = np.array(prior)
    for _ in range(30):
        p = sigmoid(weights @ inputs)
        gradient = inputs @ (p - happened) + ridge * (weights - prior)
        weights = weights - np.linalg.solve((inputs * (p * (1 - p))) @ inputs.T + ridge * np.eye(len(inputs)), gradient)
    return weights
