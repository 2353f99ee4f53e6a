"""Prompt lookup: what followed the last occurrence of the text's ending is proposed again."""

from collections.abc import Sequence

import torch

from dspark.core.verifier import Draft

LONGEST, SHORTEST = 4, 2  # tokens of the ending to look for; single tokens match too often to be worth a row


class PromptLookup:
    def __init__(self, vocab_size: int, block_size: int = 8, device: torch.device | str = "cpu"):
        self.vocab_size, self.block_size, self.device = vocab_size, block_size, device

    def start(self) -> None:
        pass

    def draft(self, ids: Sequence[int], limit: int, law, generator) -> Draft:
        tokens = follow(ids, limit)
        law_KV = torch.zeros(len(tokens), self.vocab_size, device=self.device)
        law_KV[range(len(tokens)), tokens] = 1.0  # a proposal without chance: q is one-hot
        return Draft(tokens, law_KV)

    def commit(self, features_TMD: torch.Tensor) -> None:
        pass


def follow(ids: Sequence[int], limit: int) -> list[int]:
    """Up to `limit` tokens that followed the latest earlier occurrence of the longest ending."""
    for size in range(min(LONGEST, len(ids) - 1), SHORTEST - 1, -1):
        ending = list(ids[-size:])
        for start in range(len(ids) - size - 1, -1, -1):
            if ids[start + size - 1] == ending[-1] and list(ids[start : start + size]) == ending:
                return list(ids[start + size : start + size + limit])
    return []
