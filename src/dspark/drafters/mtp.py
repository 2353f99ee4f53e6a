"""Modules that draft a token a pass as a drafter: the multi-token-prediction modules of the target's own checkpoint (head/mtp.py), or a
trained head of their manner (head/recurrent.py: mtp, eagle3), which counts as one module.

A slot of module k is final once the token it embeds is. Only final slots stay in the modules' caches: a draft's own are taken out again
when it is done, whether or not it will be accepted. Rounds that others drafted leave no gap: the slots of their tokens are filled
when the modules draft next.

Shapes: K drafted tokens, T slots of one pass, M tapped layers (the last one only), D hidden size, V vocabulary, C tokens to
choose from."""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from dspark.core.sampling import Coupled, Law, Streams, best, draw
from dspark.core.verifier import Draft, FewTokens, Rows
from dspark.drafters.dspark import drawn_by, law_of_choices
from dspark.head.chain import Modules, NativeChain, make_modules
from dspark.head.mtp import MtpHead
from dspark.head.recurrent import RecurrentHead
from dspark.target.native.cache import Cache
from dspark.target.native.stack import Drawn
from dspark.target.rollback import HOLD_EVERYTHING
from dspark.target.target import Target


class MtpDrafter:
    """Draws up to `block_size` tokens (default: the head's), each after a pass of a module over the one before.

    `modules` run the head on this target; drafters of many requests share them."""

    def __init__(self, head: MtpHead | RecurrentHead, target: Target, block_size: int | None = None, modules: Modules | None = None):
        self.head, self.target = head, target
        self.modules: Any = modules or make_modules(head, target)
        self.block_size = head.block_size if block_size is None else block_size
        self.start()

    def start(self) -> None:
        self.tap()
        self.cache = self.modules.start()
        self.pending: list[torch.Tensor] = []
        self.num_committed = 0
        self.whole = True  # not so after a pass that failed half way: its caches are of no use any more
        self.num_final = [0] * self.head.num_modules  # slots that each module's cache holds
        # What each module will read in the slots that are not final there, but were where it comes from.
        self.waiting: list[torch.Tensor | None] = [None] * self.head.num_modules

    def tap(self) -> None:
        """Another drafter may have tapped other layers since this one's last round."""
        self.target.need(self.layer_ids)

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """Of the target, whose states it reads."""
        return self.head.layer_ids

    def commit(self, features_TMD: torch.Tensor) -> None:
        """Kept until the next draft, which knows the tokens after them: while others draft, or nobody does, this costs nothing."""
        # a copy, since a view would keep alive all that the pass gave
        self.pending.append(self.target.of_layers(features_TMD, self.layer_ids).clone())
        while len(self.pending) > 1 and len(self.pending[-1]) >= len(self.pending[-2]):  # few tensors, however many rounds
            self.pending[-2:] = [torch.cat(self.pending[-2:])]
        self.num_committed += len(features_TMD)

    @property
    def num_bytes(self) -> int:
        """Memory that the modules' caches, unless they are pages of a pool, and what they have yet to read take."""
        layers = [] if isinstance(self.cache, Cache) else self.cache.layers
        tensors = [tensor for layer in layers for tensor in vars(layer).values()]
        held = [tensor for tensor in (*tensors, *self.pending, *self.waiting) if isinstance(tensor, torch.Tensor)]
        storages = [tensor.untyped_storage() for tensor in held]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())  # more than a view of it shows

    @property
    def slot_bytes(self) -> int:
        """Memory of one slot in all modules' caches; known once all of them have drafted."""
        if isinstance(self.cache, Cache):
            return self.modules.slot_bytes
        tensors = [tensor for layer in self.cache.layers for tensor in vars(layer).values() if isinstance(tensor, torch.Tensor)]
        return sum(tensor.nbytes // tensor.shape[-2] for tensor in tensors if tensor.dim() > 2 and tensor.shape[-2])

    def draft_bytes(self, slot_bytes: int) -> int:
        """Memory that the next draft takes at most, beyond what it has, with so much for a slot."""
        waiting = 4 * self.target.hidden_size * sum(waiting_TD is None for waiting_TD in self.waiting)  # a state of each, from then on
        if isinstance(self.cache, Cache):
            return waiting + self.cache.growth(self.num_final[0], self.num_committed + self.block_size)
        return waiting + slot_bytes * (self.num_committed - min(self.num_final) + self.block_size)

    def can_fork(self, num_tokens: int) -> bool:
        """Are the modules' caches cut back to so many tokens without what a sliding window has forgotten?"""
        if num_tokens == self.num_committed or isinstance(self.cache, Cache):
            return True
        return all(type(layer) in HOLD_EVERYTHING for layer in self.cache.layers)

    def fork(self, num_tokens: int) -> "MtpDrafter":
        """A drafter for another text that begins with the same tokens: `num_tokens` of them if that is all that is known here, else with as
        many more as there are modules, since each module's last slots have read a token further on."""
        assert self.can_fork(num_tokens), "a sliding window cannot be cut back"
        forked = MtpDrafter(self.head, self.target, self.block_size, self.modules)
        native = isinstance(self.cache, Cache)
        forked.cache = self.cache.fork(min(self.num_final[0], num_tokens)) if native else copy.deepcopy(self.cache)
        forked.num_committed = num_tokens
        known = self.num_committed - sum(map(len, self.pending))  # hidden states that module 0 has read, or that wait for it
        pending_TMD = torch.cat(self.pending)[: max(0, num_tokens - known)] if self.pending else None
        forked.pending = [] if pending_TMD is None else [pending_TMD.clone()]
        for k, num_final in enumerate(self.num_final):
            forked.num_final[k] = min(num_final, num_tokens)
            if num_final > num_tokens:
                self.modules.forget(k, num_final - num_tokens, forked.cache)
            waiting_TD = self.waiting[k]
            if waiting_TD is not None:
                forked.waiting[k] = waiting_TD[: max(0, num_tokens - num_final)].clone()
        return forked

    @torch.inference_mode()
    def draft(self, ids: Sequence[int], limit: int, law: Law, noise: torch.Generator | Coupled) -> Draft:
        """Draw up to `limit` tokens, each by the law of its row over the head's vocabulary.

        No tokens after a prompt of one: there is no hidden state before its anchor yet."""
        self.tap()
        num, num_slots = min(limit, self.block_size), len(ids) - 1
        if num < 1 or num_slots < 1:
            return Draft([], torch.empty(0, 0))
        assert self.num_committed == num_slots, f"{self.num_committed} hidden states for a text of {len(ids)} tokens"
        block = Block(ids, law, noise, num, self.head.draft_ids, self.target.vocab_size)
        self.whole = False
        features_TMD = torch.cat(self.pending)
        self.pending = [features_TMD.new_empty(0, *features_TMD.shape[1:])]
        hidden_TD = self.modules.hidden(features_TMD)
        last = self.head.num_modules - 1
        num_extra = 0
        for step in range(num):
            k = min(step, last)
            if step <= last:
                slot, hidden_TD = self.num_final[k], self.with_waiting(k, hidden_TD)
            else:
                slot, hidden_TD, num_extra = num_slots + step - last - 1, hidden_TD[-1:], num_extra + 1
            handed_TD, logits_C = self.modules.run(k, hidden_TD, block.text[slot + 1 + k :][: len(hidden_TD)], slot, self.cache)
            if step <= last:
                self.settle(k, hidden_TD, num_slots)
            hidden_TD = handed_TD
            if not block.take(logits_C):
                break
            if isinstance(self.modules, NativeChain) and num > 1 and self.modules.follows:
                drawn = block.drawn()
                if block.greedy or drawn is not None:
                    block.follow(*self.modules.follow(hidden_TD[-1], block.text[-1], num - 1, drawn, num_slots, self.cache))
                    break
        if step < last:  # the next module was not asked: what it would have read waits for it
            self.waiting[step + 1] = self.with_waiting(step + 1, hidden_TD)[: self.num_final[step] - self.num_final[step + 1]].clone()
        for k in range(min(step, last) + 1):
            self.modules.forget(k, num_slots - self.num_final[k] + (num_extra if k == last else 0), self.cache)
        self.whole = True
        return block.finish()

    def with_waiting(self, k: int, hidden_TD: torch.Tensor) -> torch.Tensor:
        """What module k reads from its first slot that is not final: what waits for it, then the output of the module before."""
        waiting_TD = self.waiting[k]
        return hidden_TD if waiting_TD is None else torch.cat([waiting_TD, hidden_TD])

    def settle(self, k: int, hidden_TD: torch.Tensor, num_slots: int) -> None:
        """Module k has read `hidden_TD`. Slots whose token is final stay; the others, and the last one in any case, are read again in the
        next draft, from those of these hidden states that are final."""
        before, final = self.num_final[k], max(self.num_final[k], num_slots - 1 - k)
        self.num_final[k] = final
        self.waiting[k] = hidden_TD[final - before : (self.num_final[k - 1] if k else num_slots) - before].clone()


class Block:
    """A draft in the making, after the text `ids`: `text` with the tokens drawn so far, of those in `draft_ids` (None: of all)."""

    def __init__(
        self, ids: Sequence[int], law: Law, noise: torch.Generator | Coupled, num: int, draft_ids: torch.Tensor | None, vocab_size: int
    ):
        self.draft_ids, self.vocab_size = draft_ids, vocab_size
        self.text, self.start, self.law, self.noise, self.num = list(ids), len(ids), law, noise, num
        self.uniforms = [] if isinstance(noise, Coupled) else Streams.uniforms(noise, num)
        self.laws: list[torch.Tensor] = []
        self.device = torch.device("cpu")
        self.error: Exception | None = None

    def take(self, logits_C: torch.Tensor) -> bool:
        """Draw the next token by its row; False where the draft ends for what it drew."""
        k, self.device = len(self.text) - self.start, logits_C.device
        try:
            return self.choose(k, logits_C)
        except Exception as error:  # broken numbers, or a processor's
            self.error = error
            return False  # tokens that led here stay: to drop a draft for what it drew would change the law

    def choose(self, k: int, logits_C: torch.Tensor) -> bool:
        if self.greedy:
            self.text.append(self.token(best(logits_C[None])[0]))
            return True
        ids_C = torch.arange(len(logits_C), device=logits_C.device) if self.draft_ids is None else self.draft_ids
        vocab_size = len(logits_C) if self.draft_ids is None else self.vocab_size
        q_C = law_of_choices(self.law, self.text, logits_C, ids_C, vocab_size)
        if q_C is None:
            return False
        if self.law.greedy:
            where = int(q_C.argmax())
        elif isinstance(self.noise, Coupled):
            where = self.noise.choose(q_C, len(self.text), vocab_size, self.draft_ids)
        else:
            where = draw(q_C, self.uniforms[k])
        self.laws.append(q_C)
        self.text.append(self.token(where))
        return True

    @property
    def greedy(self) -> bool:
        """Each token is the best of its row, which no processor changes: such laws need not be formed."""
        return self.law.greedy and not self.law.processors

    def drawn(self) -> Drawn | None:
        """How the rest of it is drawn, where a runner can."""
        k = len(self.text) - self.start
        places = range(len(self.text), self.start + self.num)
        return drawn_by(self.law, self.noise, self.uniforms[k:], places, self.vocab_size, self.device)

    def follow(self, choices: Sequence[int], logits_KC: torch.Tensor) -> None:
        """Take the rest as a runner has chosen it; at a row without a finite number the draft ends."""
        num = next((k for k, choice in enumerate(choices) if choice < 0), len(choices))
        self.text += [self.token(choice) for choice in choices[:num]]
        if not self.greedy:
            self.laws += list(logits_KC[:num])

    def token(self, where: int) -> int:
        return where if self.draft_ids is None else int(self.draft_ids[where])

    def finish(self) -> Draft:
        tokens = self.text[self.start :]
        if not tokens:
            if self.error is not None:
                raise self.error
            return Draft([], torch.empty(0, 0))
        laws: Rows
        if not self.laws:
            laws = FewTokens.certain(tokens, self.vocab_size, self.device)
        elif self.draft_ids is None:
            laws = torch.stack(self.laws)
        else:
            laws = FewTokens(self.draft_ids.expand(len(tokens), -1), torch.stack(self.laws), self.vocab_size)
        return Draft(tokens, laws, num_asked=self.num if len(tokens) < self.num else 0)
