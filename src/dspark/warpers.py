"""transformers' top-p without a sort of the vocabulary.

Shapes: R rows, V vocabulary, K best tokens looked at."""

import math

import torch
from transformers import TopPLogitsWarper

SMALL = 4096  # a row of so few tokens is sorted as soon as looked at
LOOKS = (64, 512, 4096)  # how many of the best tokens are looked at, as long as more may be kept
OPEN, TIED = 0, -1


class UnsortedTopP(TopPLogitsWarper):
    """Keeps the very tokens that transformers' class keeps: its result, bit for bit.

    The border is looked for among a row's best tokens, with their probabilities under the whole row. The row is sorted, by transformers' class, where
    float rounding may decide (`num_kept`), where the logits on both sides of the border are equal, where more than the last of `LOOKS` may be
    kept, and where the settings are not the default ones or the numbers neither float32 nor float64."""

    @classmethod
    def like(cls, warper: TopPLogitsWarper) -> "UnsortedTopP":
        return cls(warper.top_p, warper.filter_value, warper.min_tokens_to_keep)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        usual = self.filter_value == -math.inf and self.min_tokens_to_keep == 1 and scores.dtype in (torch.float32, torch.float64)
        if not usual or scores.shape[-1] <= SMALL:
            return self.sorted(scores)
        probs_RV = scores.softmax(-1)
        return self.looked(scores, probs_RV, probs_RV.sum(-1, keepdim=True, dtype=torch.float64), LOOKS)

    def sorted(self, logits_RV: torch.Tensor) -> torch.Tensor:
        return super().__call__(None, logits_RV)  # it reads the logits alone

    def looked(self, logits_RV: torch.Tensor, probs_RV: torch.Tensor, sums_R1: torch.Tensor, looks: tuple[int, ...]) -> torch.Tensor:
        if not looks or looks[0] >= logits_RV.shape[-1]:
            return self.sorted(logits_RV)
        best_RK, ids_RK = logits_RV.topk(looks[0])
        up_to_RK = probs_RV.gather(-1, ids_RK).cumsum(-1, dtype=torch.float64) / sums_R1
        num_R = self.num_kept(best_RK, up_to_RK, logits_RV.shape[-1])
        goes_RK = torch.arange(looks[0], device=num_R.device) >= num_R[:, None]
        kept_RV = torch.full_like(logits_RV, -math.inf).scatter_(-1, ids_RK, best_RK.masked_fill_(goes_RK, -math.inf))
        if int(num_R.min()) > 0:
            return kept_RV
        tied, unknown = num_R == TIED, num_R == OPEN
        if tied.any():
            kept_RV[tied] = self.sorted(logits_RV[tied])
        if unknown.any():
            kept_RV[unknown] = self.looked(logits_RV[unknown], probs_RV[unknown], sums_R1[unknown], looks[1:])
        return kept_RV

    def num_kept(self, best_RK: torch.Tensor, up_to_RK: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """How many of the best tokens [R] are kept; `OPEN` where that cannot be told from these, `TIED` where only the sort's order tells.
        `up_to_RK` is the probability of a token and all better ones.

        transformers keeps a token while it and all worse ones together have more than 1 - top_p. Its sum of them is off, relatively, by what
        float arithmetic gives, half a unit in the last place for each addition that a number goes through. The softmax adds
        from the worst token on, in four lanes or more: additions of a quarter of a token's rank. The cumulative sum adds in double precision (CPU)
        or in blocks of 512 tokens or more (GPU). 128 stands for exponentials, quotients, and adding up within lanes and blocks. Seen on
        a CPU: 1 to 5 units for rows of all kinds, 930 where all but few of 150,000 logits are equal (bound: 9,000)."""
        num_seen = up_to_RK.shape[-1]
        mean_rank_R1 = num_seen - up_to_RK.sum(-1, keepdim=True) + (1 - up_to_RK[:, -1:]) * vocab_size
        rounding = torch.finfo(best_RK.dtype).eps / 2
        goes = float(torch.tensor(1 - self.top_p, dtype=best_RK.dtype))
        # what our own sums are off by: they are differences of doubles near 1
        ours = vocab_size * torch.finfo(torch.float64).eps
        off_R1 = goes * rounding * (128 + vocab_size / 512 + mean_rank_R1 / 4) + ours
        least_R1 = 1 + torch.searchsorted(up_to_RK, 1 - goes - off_R1)
        most_R1 = 1 + torch.searchsorted(up_to_RK, 1 - goes + off_R1, right=True)
        border_R2 = best_RK.gather(-1, torch.cat([most_R1 - 1, most_R1], -1).clamp_max(num_seen - 1))
        num_R1 = most_R1.masked_fill(border_R2[:, :1] == border_R2[:, 1:], TIED)
        return num_R1.masked_fill((least_R1 != most_R1) | (most_R1 >= num_seen), OPEN)[:, 0]
