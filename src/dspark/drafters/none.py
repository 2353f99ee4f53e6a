"""No drafts: every round is one plain decoding step."""

import torch

from dspark.core.verifier import Draft


class NoDrafter:
    block_size = 0

    def start(self) -> None:
        pass

    def draft(self, ids, limit, law, noise) -> Draft:
        return Draft([], torch.empty(0, 0))

    def commit(self, features_TMD: torch.Tensor) -> None:
        pass
