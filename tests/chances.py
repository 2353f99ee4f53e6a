"""Counts of what was said against the chances that it had."""

from collections import Counter

from scipy.stats import chisquare

RARE = 8  # cells expected less often than this are merged


def p_value(said: Counter, chances: dict[tuple[int, ...], float]) -> float:
    """Chi-square of counts against an exact law; what is impossible must not occur at all."""
    num_samples = said.total()
    impossible = [tokens for tokens in said if chances[tokens] == 0]
    assert not impossible, f"{impossible[0]} has probability 0"
    common = [tokens for tokens, chance in chances.items() if chance * num_samples >= RARE]
    counts, expected = [said[tokens] for tokens in common], [chances[tokens] * num_samples for tokens in common]
    rest = num_samples - sum(expected)
    if rest >= RARE:
        counts.append(num_samples - sum(counts))
        expected.append(rest)
    scale = sum(counts) / sum(expected)
    return chisquare(counts, [value * scale for value in expected]).pvalue
