"""Multi-token-prediction modules say the first token of a draft, and the DSpark head goes on from it.

The first token is drawn from the modules' law, which sees the target's last state; the head's sequential part then conditions each further
token on the one before, the modules' own for the second. Every token is drawn from the law that is stated for it, given those before it, so
the verifier's rule holds as it stands."""

from collections.abc import Sequence

import torch

from dspark.core.sampling import Coupled, Law
from dspark.core.verifier import Draft
from dspark.drafters.dspark import Ask, DSparkDrafter, draft_many
from dspark.drafters.mtp import MtpDrafter


class SeededDrafter:
    """Blocks of the head's length. The head's confidence of its own first token stands for the modules', which have none."""

    def __init__(self, mtp: MtpDrafter, head: DSparkDrafter):
        self.mtp, self.head = mtp, head
        self.block_size = head.block_size

    @property
    def models(self) -> list[DSparkDrafter | MtpDrafter]:
        return [self.head, self.mtp]

    def tap(self) -> None:
        self.head.target.need(sorted({*self.head.layer_ids, *self.mtp.layer_ids}))

    def start(self) -> None:
        self.tap()
        self.mtp.start()
        self.head.start()

    def commit(self, features_TMD: torch.Tensor) -> None:
        self.mtp.commit(features_TMD)
        self.head.commit(features_TMD)

    def draft(self, ids: Sequence[int], limit: int, law: Law, noise: torch.Generator | Coupled) -> Draft:
        """Draw up to `limit` tokens; all of them from the head after a prompt of one token, or where the modules can say none."""
        self.tap()
        first = self.mtp.draft(ids, min(limit, 1), law, noise)
        return draft_many([Ask(self.head, ids, limit, law, noise, first)])[0]
