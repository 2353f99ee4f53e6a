"""Prompt lookup: what followed the last occurrence of the text's ending is proposed again."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dspark.core.verifier import Draft, FewTokens

# Tokens of the ending to look for, longest first; single tokens match too often to be worth a row.
SIZES = (16, 8, 4, 3, 2)


class Found(NamedTuple):
    """An ending that was found again: its size in tokens, and whether different tokens have followed it before."""

    size: int
    varied: bool


class PromptLookup:
    """`before` is text to look in besides, as if it stood before the prompt: an expected answer, say."""

    def __init__(self, vocab_size: int, block_size: int = 8, device: torch.device | str = "cpu", before: Sequence[int] = ()):
        self.vocab_size, self.block_size, self.device, self.before = vocab_size, block_size, device, list(before)
        self.start()

    def start(self) -> None:
        self.follows: dict[tuple[int, ...], int] = {}  # a sequence of tokens -> where the text went on after its latest occurrence
        self.varied: set[tuple[int, ...]] = set()  # sequences that different tokens have followed
        self.num_seen = 0

    def draft(self, ids: Sequence[int], limit: int, law, noise) -> Draft:
        return self.proposal(self.follow(ids, limit)[0])

    def proposal(self, tokens: list[int]) -> Draft:
        return Draft(tokens, FewTokens.certain(tokens, self.vocab_size, self.device))

    def commit(self, features_TMD: torch.Tensor) -> None:
        pass

    def follow(self, ids: Sequence[int], limit: int) -> tuple[list[int], Found | None]:
        """What followed the latest earlier occurrence of the longest known ending, and what was found ([], None: nothing).

        `limit` tokens: where the text ends before, it goes on into its own proposal, as a text that repeats itself does."""
        ids = [*self.before, *ids] if self.before else ids
        for end in range(max(self.num_seen, 1), len(ids)):  # every sequence that something follows
            for size in SIZES:
                if size <= end:
                    sequence = tuple(ids[end - size : end])
                    if ids[self.follows.get(sequence, end)] != ids[end]:
                        self.varied.add(sequence)
                    self.follows[sequence] = end
        self.num_seen = len(ids)
        for size in SIZES:
            ending = tuple(ids[-size:])
            start = self.follows.get(ending) if size < len(ids) else None
            if start is not None:
                period = len(ids) - start
                return [ids[start + k % period] for k in range(limit)], Found(size, ending in self.varied)
        return [], None
