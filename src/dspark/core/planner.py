"""How many drafted tokens to verify. A plan sees a token's confidence before it keeps the token.

A plan is exact when the decision to verify x_k depends on nothing drawn at or after x_k.
`confidences[k]` looks at x_1..x_{k-1} only (paper eq. 7), so any rule that walks the block from
the front and stops at the first position it dislikes is exact. A rule that looks ahead and
then cuts is not: its bias is the failing control of our tests (paper, appendix A).
This module imports no torch."""

from collections.abc import Callable, Sequence

# (confidences, limit) -> number of tokens to verify, 0..limit
Plan = Callable[[Sequence[float], int], int]


def fixed(confidences: Sequence[float], limit: int) -> int:
    """Verify everything that was drafted and may still be used."""
    return limit


def threshold(least: float) -> Plan:
    """Stop in front of the first token whose survival, the product of confidences, is below `least`."""

    def plan(confidences: Sequence[float], limit: int) -> int:
        survival = 1.0
        for k in range(limit):
            survival *= confidences[k]
            if survival < least:
                return k
        return limit

    return plan
