"""Prompt lookup: what followed the last occurrence of the text's ending is proposed again."""

from collections.abc import Sequence

import torch

from dspark.core.verifier import Draft, FewTokens

LONGEST, SHORTEST = 4, 2  # tokens of the ending to look for; single tokens match too often to be worth a row


class PromptLookup:
    def __init__(self, vocab_size: int, block_size: int = 8, device: torch.device | str = "cpu"):
        self.vocab_size, self.block_size, self.device = vocab_size, block_size, device
        self.start()

    def start(self) -> None:
        self.follows: dict[tuple[int, ...], int] = {}  # a sequence of tokens -> where the text went on after its latest occurrence
        self.num_seen = 0

    def draft(self, ids: Sequence[int], limit: int, law, generator) -> Draft:
        tokens = self.follow(ids, limit)
        return Draft(tokens, FewTokens.certain(tokens, self.vocab_size, self.device))

    def commit(self, features_TMD: torch.Tensor) -> None:
        pass

    def follow(self, ids: Sequence[int], limit: int) -> list[int]:
        """Up to `limit` tokens that followed the latest earlier occurrence of the longest ending."""
        for end in range(max(self.num_seen, 1), len(ids)):  # every sequence that something follows
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                self.follows[tuple(ids[end - size : end])] = end
        self.num_seen = len(ids)
        for size in range(min(LONGEST, len(ids) - 1), SHORTEST - 1, -1):
            start = self.follows.get(tuple(ids[-size:]))
            if start is not None:
                return list(ids[start : start + limit])
        return []
