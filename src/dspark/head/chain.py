"""The native way of a head that drafts a token a pass (head/recurrent.py): its passes through stack.cpp, its slots in pages.

Shapes: T slots of one pass, G tokens of a draft, M tapped layers, D hidden size, Vd draft vocabulary."""

from collections.abc import Sequence

import torch

from dspark.head.context import runs_natively
from dspark.head.mtp import MtpHead
from dspark.head.recurrent import RecurrentHead
from dspark.target.native.cache import PAGE_TOKENS, Cache, Pool
from dspark.target.native.stack import Drawn, NativeStack, Rows, passes
from dspark.target.target import Target


class NativeChain:
    """Runs a head by the methods of `RecurrentHead`, for any number of requests, each with its own cache.

    A slot's position counts from 0 here and from 1 there: rotary attention sees differences only."""

    num_modules = 1

    def __init__(self, head: RecurrentHead, target: Target):
        self.head, self.target = head, target
        rows = head.rows.to(head.norm.weight.dtype)
        self.stack = NativeStack(head.config, [head.layer], head.norm, rows, (head.rotary.inverse, 1.0), head.layer.joint)
        self.pool = Pool(self.stack.page_bytes)
        self.slot_bytes = self.stack.page_bytes // PAGE_TOKENS

    def start(self) -> Cache:
        return Cache(self.pool)

    def hidden(self, features_TMD: torch.Tensor) -> torch.Tensor:
        return self.head.hidden(features_TMD).float()

    def run(self, k: int, hidden_TD: torch.Tensor, tokens: Sequence[int], slot: int, cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
        """Append slots from `slot` on to the cache: their states [T, D], and logits [Vd] after the last of them; float32."""
        x_TD = hidden_TD.to(torch.float32, copy=True)
        embedded_TD = self.target.embed(torch.tensor(list(tokens))).float()
        for rows, first, last in passes([Rows(cache, slot, len(tokens))]):
            done = self.stack.forward(rows, x_TD[first:last], int(last == len(tokens)), embedded_TD=embedded_TD[first:last])
        return x_TD, done.logits[0]

    def follow(
        self, state_D: torch.Tensor, token: int, num_tokens: int, drawn: Drawn | None, slot: int, cache: Cache
    ) -> tuple[list[int], torch.Tensor]:
        """The draft's other tokens in one go, behind the one that was drawn after the slot before `slot`, whose state this is: where they
        are in the draft vocabulary (-1: no number was finite, from there on), each the best of its row or `drawn`, and the rows [G, Vd],
        those of drawn tokens their laws."""
        rest = Rows(cache, slot, num_tokens)
        return self.stack.follow(rest, self.embeddings.contiguous(), self.head.draft_ids, state_D.clone(), token, drawn)

    @property
    def embeddings(self) -> torch.Tensor:
        """The target's [V, D], as they are now."""
        return self.target.model.get_input_embeddings().weight.detach()

    @property
    def follows(self) -> bool:
        """Can `follow` read the target's embeddings: are they of the precision of the head's weights?"""
        return self.embeddings.dtype == self.stack.dtype

    def forget(self, k: int, num_slots: int, cache: Cache) -> None:
        """Nothing is to be done: the next pass overwrites them."""


Modules = MtpHead | RecurrentHead | NativeChain


def make_modules(head: MtpHead | RecurrentHead, target: Target) -> Modules:
    """What runs them: natively if the target runs so and the head is a trained one whose shape allows it, else eagerly themselves."""
    if isinstance(head, MtpHead) or not runs_natively(head.config, head.norm.weight, target):
        return head
    return NativeChain(head, target)
