"""Which drafted tokens stand, and which token comes next: exact speculative sampling.

Block verification (Sun et al. 2024, algorithm 2), which lets more tokens stand than the rule of the paper's section 2
(Leviathan et al. 2023: keep x with probability min(1, p(x)/q(x)), end at the first that is not kept) and has the same law. There
a token that the target likes better than the draft did is kept for certain, and the excess is lost. Here it makes up for a token
before it: a block stands up to its k-th token with probability s_k = min(1, s_{k-1} p(x_k)/q(x_k)), s_0 = 1. In a block of one token
the rules are the same. Where a block ends must depend on nothing drawn after its end, as for any plan (planner.py).
Shapes: K verified tokens, V vocabulary."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dspark.core.sampling import draw


class Rows(Protocol):
    """Laws over the vocabulary, one a row: a tensor [T, V], or rows [V] that are made when they are read."""

    def __len__(self) -> int: ...
    def __getitem__(self, k: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class FewTokens:
    """Laws over a vocabulary of V tokens that give weight to C of them a row, as dense rows [V] when asked for.

    A draft chooses among few tokens; most of its rows are never read, and greedy decoding reads none."""

    ids_KC: torch.Tensor
    probs_KC: torch.Tensor
    vocab_size: int

    @staticmethod
    def certain(tokens: Sequence[int], vocab_size: int, device: torch.device | str) -> "FewTokens":
        """The laws of tokens that were proposed without chance: all weight on one token a row."""
        ids_K1 = torch.tensor(tokens, dtype=torch.long, device=device)[:, None]
        return FewTokens(ids_K1, torch.ones(len(tokens), 1, device=device), vocab_size)

    def __len__(self) -> int:
        return len(self.ids_KC)

    def __getitem__(self, k: int) -> torch.Tensor:
        return self.probs_KC.new_zeros(self.vocab_size).scatter_(0, self.ids_KC[k], self.probs_KC[k])


@dataclass(frozen=True)
class Joined:
    """The rows of one after the other's."""

    first: Rows
    rest: Rows

    def __len__(self) -> int:
        return len(self.first) + len(self.rest)

    def __getitem__(self, k: int) -> torch.Tensor:
        return self.first[k] if k < len(self.first) else self.rest[k - len(self.first)]


@dataclass(frozen=True)
class Draft:
    """Proposed tokens with the law each was drawn from, `probs_KV` (rows [V]), and its estimated chance of
    acceptance given that all before it were accepted (None: the drafter has no opinion).

    `margins` (best draft logit of each row minus the second) are noted for calibration only, `uncalibrated` are the confidences
    as the head gave them where a calibration has changed them. `num_asked` is set where
    the draft ended early for what it drew: it was to have so many tokens."""

    tokens: list[int]
    probs_KV: Rows
    confidences: list[float] | None = None
    margins: list[float] | None = None
    num_asked: int = 0
    uncalibrated: list[float] | None = None

    def planned(self, plan: Callable[[Sequence[float] | None, int], int]) -> int:
        """How many of its tokens to verify by `plan(confidences, limit)`.

        That its own tokens ended it must not be seen when the first of them are decided about: plans may look at the limit."""
        num, limit = len(self.tokens), max(len(self.tokens), self.num_asked)
        confidences = self.confidences and [*self.confidences, *[0.0] * (limit - num)]
        return min(num, plan(confidences, limit))


@dataclass(frozen=True)
class Verdict:
    """The first `num_accepted` drafted tokens stand; `next_token` follows them."""

    num_accepted: int
    next_token: int


def stands(p: torch.Tensor, q: torch.Tensor, standing: float = 1.0) -> torch.Tensor:
    """Chance that a block stands up to a token of chance p under the target and q > 0 under the draft, where it does up to the one
    before with chance `standing`; elementwise, in double precision."""
    return ((p / q).double() * standing).clamp_max(1.0)


def acceptance(p_V: torch.Tensor, q_V: torch.Tensor, token: int, standing: float = 1.0) -> float:
    """`stands` of a token that was drawn from q."""
    return stands(p_V[token], q_V[token], standing).item()


def left_over(p_V: torch.Tensor, q_V: torch.Tensor, standing: float = 1.0) -> torch.Tensor:
    """What the next token still needs of each word's chance [V], once tokens drawn from q have brought what they may."""
    return (standing * p_V - q_V).clamp_min(0)


def ending(p_V: torch.Tensor, q_V: torch.Tensor, standing: float) -> float:
    """Chance that a block stands up to here, given that no more of it does; p and q are the laws of the next token."""
    if standing == 1:
        return 1.0
    left = left_over(p_V, q_V, standing).sum().item()
    return left / (left + 1 - standing)


def residual(p_V: torch.Tensor, q_V: torch.Tensor, standing: float = 1.0) -> torch.Tensor:
    """The law of the token after a block that stands up to here and no further.

    Where p and q agree to the last bit nothing is left over; a rejection there is a rounding
    event of probability ~1e-7, and p itself is then the law within that rounding."""
    left = left_over(p_V, q_V, standing)
    total = left.sum()
    return left / total if total > 0 else p_V


def verify(target_probs_KV: Rows, draft: Draft, uniforms: Sequence[float], recover: float) -> Verdict:
    """Judge a (planned prefix of a) draft of K tokens.

    `target_probs_KV` has K+1 rows: the target's law at each drafted position and after the last. Rows after a token that the target
    never says are not read.
    `uniforms` (K of them) decide how much stands, `recover` draws the next token; all in [0, 1)."""
    num_verified = len(target_probs_KV) - 1
    p, q, standing = [target_probs_KV[0]], [], [1.0]  # after each part of the block, from none of it on
    for k in range(num_verified):
        q.append(draft.probs_KV[k])
        chance = acceptance(p[k], q[k], draft.tokens[k], standing[k])
        if chance == 0:
            break
        standing.append(chance)
        p.append(target_probs_KV[k + 1])

    def chance_of_end(k: int) -> float:
        return standing[k] if k == num_verified else ending(p[k], q[k], standing[k])

    k = len(standing) - 1
    while k > 0 and uniforms[k - 1] >= chance_of_end(k):
        k -= 1
    return Verdict(k, draw(p[k] if k == num_verified else residual(p[k], q[k], standing[k]), recover))


def verify_greedy(best_K: Sequence[int], drafted: Sequence[int]) -> Verdict:
    """`verify` at temperature 0, where the target's laws are one-hot: a token stands iff it is the target's best.

    `best_K` are the target's best tokens at each drafted position and after the last."""
    num_accepted = next((k for k, token in enumerate(drafted) if token != best_K[k]), len(drafted))
    return Verdict(num_accepted, best_K[num_accepted])
