"""Does a model roll back exactly here? Asked at load where no test of ours has answered it."""

from typing import Any

import torch

from dspark.errors import TargetError

PROMPT, BLOCK, FOLLOWING = 7, 4, 4  # tokens
# Largest difference of two rows of logits, in standard deviations of a row. Restored and replayed, a state goes through the same
# operations on the same values as one that never saw a rejected token.
SAME = 1e-3
# Passes of several rows round differently from passes of one, most so below float32, and a mixture of experts may choose others. A state
# that is ignored or mixed up gives other logits altogether, about 2 or more; half of the rows must be nearer than this.
NEAR = {torch.float32: 1e-2, torch.float64: 1e-2}
NEAR_ROUNDED = 0.5


def check_rollback(target: Any) -> None:
    """Compare verify and roll-back of a `Target`, for every number of accepted tokens, with plain decoding of the accepted tokens.

    Raises `TargetError` where the next logits differ."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(target.vocab_size, (PROMPT + BLOCK + FOLLOWING,), generator=generator).tolist()
    prompt, drafted, following = ids[:PROMPT], ids[PROMPT : PROMPT + BLOCK], ids[PROMPT + BLOCK :]
    for num_accepted in range(BLOCK + 1):
        accepted = [prompt[-1], *drafted[:num_accepted]]
        tried, whole, plain = (started(target, prompt[:-1]) for _ in range(3))
        target.score(tried, [prompt[-1], *drafted])
        target.rollback(tried, BLOCK - num_accepted)
        target.score(whole, accepted)
        target.rollback(whole, 0)
        one_by_one(target, plain, accepted)
        found, same, expected = (one_by_one(target, state, following) for state in (tried, whole, plain))
        if distances(found, same).max() > SAME or distances(found, expected).median() > NEAR.get(target.model.dtype, NEAR_ROUNDED):
            raise TargetError(
                f"{type(target.model).__name__} does not roll back exactly: after {BLOCK - num_accepted} of {BLOCK} tokens are rejected, its "
                f"next logits are {distances(found, expected).max():.2g} standard deviations from plain decoding's",
                "this model cannot be a target",
            )


def started(target: Any, prompt: list[int]) -> Any:
    state = target.start()
    target.prefill(state, prompt)
    return state


def one_by_one(target: Any, state: Any, tokens: list[int]) -> torch.Tensor:
    """Logits after each token [T, V], one a pass."""
    rows = []
    for token in tokens:
        rows.append(target.score(state, [token]).logits_TV[0])
        target.rollback(state, 0)
    return torch.stack(rows)


def distances(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Of each row, in its standard deviations [T]. Logits of minus infinity are the same."""
    return (found - expected).nan_to_num(0.0).abs().amax(-1) / expected.masked_fill(expected.isinf(), 0.0).std(-1)
