"""A drafter that knows the answer, so that a test decides how many tokens of each round are accepted."""

from collections.abc import Iterable, Sequence
from itertools import cycle

import torch

from dspark.core.verifier import Draft
from dspark.target.target import Target


def plain_greedy(target: Target, prompt_ids: Sequence[int], max_new_tokens: int, **settings) -> list[int]:
    """The new tokens of transformers' own greedy decoding."""
    ids = torch.tensor([list(prompt_ids)])
    return target.model.generate(ids, do_sample=False, max_new_tokens=max_new_tokens, **settings)[0, len(prompt_ids) :].tolist()


class Oracle:
    """Proposes `truth`, the tokens that follow the prompt, with the next of `counts` right ones in each draft."""

    def __init__(self, truth: Sequence[int], num_prompt: int, vocab_size: int, block_size: int, counts: Iterable[int] | None = None):
        self.truth, self.num_prompt, self.vocab_size, self.block_size = list(truth), num_prompt, vocab_size, block_size
        self.counts = list(range(block_size + 1)) if counts is None else list(counts)

    def start(self) -> None:
        self.remaining, self.planned, self.num_features = cycle(self.counts), [], 0

    def draft(self, ids: Sequence[int], limit: int, law, generator) -> Draft:
        offset = len(ids) - self.num_prompt
        tokens, num_right = self.truth[offset : offset + limit], next(self.remaining)
        if num_right < len(tokens):
            tokens[num_right] = (tokens[num_right] + 1) % self.vocab_size
        self.planned.append(min(num_right, len(tokens)))
        law_KV = torch.nn.functional.one_hot(torch.tensor(tokens, dtype=torch.long), self.vocab_size).float()
        return Draft(tokens, law_KV)

    def commit(self, features_TMD: torch.Tensor) -> None:
        self.num_features += len(features_TMD)
