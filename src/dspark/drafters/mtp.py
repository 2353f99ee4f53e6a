"""The target's own multi-token-prediction modules as a drafter.

A slot of module k is final once the token it embeds is. Only final slots stay in the modules' caches: a draft's own are taken out again
when it is done, whether or not it will be accepted. Rounds that others drafted leave no gap: the slots of their tokens are filled
when the modules draft next.

Shapes: K drafted tokens, T slots of one pass, M tapped layers (the last one only), D hidden size, V vocabulary."""

import copy
from collections.abc import Sequence

import torch

from dspark.core.sampling import Coupled, Law, Streams, best, draw
from dspark.core.verifier import Draft, FewTokens
from dspark.drafters.dspark import law_of_choices
from dspark.head.mtp import MtpHead
from dspark.target.rollback import HOLD_EVERYTHING
from dspark.target.target import Target


class MtpDrafter:
    """Draws up to `block_size` tokens (default: the head's), each after a pass of a module over the one before."""

    def __init__(self, head: MtpHead, target: Target, block_size: int | None = None):
        self.head, self.target = head, target
        self.block_size = head.block_size if block_size is None else block_size
        self.start()

    def start(self) -> None:
        self.tap()
        self.cache = self.head.start()
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
        self.num_committed += len(features_TMD)

    @property
    def num_bytes(self) -> int:
        """Memory that the modules' caches and what they have yet to read take."""
        tensors = [tensor for layer in self.cache.layers for tensor in vars(layer).values()]
        held = [tensor for tensor in (*tensors, *self.pending, *self.waiting) if isinstance(tensor, torch.Tensor)]
        storages = [tensor.untyped_storage() for tensor in held]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())  # more than a view of it shows

    @property
    def slot_bytes(self) -> int:
        """Memory of one slot in all modules' caches; known once all of them have drafted."""
        tensors = [tensor for layer in self.cache.layers for tensor in vars(layer).values() if isinstance(tensor, torch.Tensor)]
        return sum(tensor.nbytes // tensor.shape[-2] for tensor in tensors if tensor.dim() > 2 and tensor.shape[-2])

    @property
    def num_slots(self) -> int:
        """At most, of each module, that the next draft adds."""
        return self.num_committed - min(self.num_final) + self.block_size

    def can_fork(self, num_tokens: int) -> bool:
        """Are the modules' caches cut back to so many tokens without what a sliding window has forgotten?"""
        return num_tokens == self.num_committed or all(type(layer) in HOLD_EVERYTHING for layer in self.cache.layers)

    def fork(self, num_tokens: int) -> "MtpDrafter":
        """A drafter for another text that begins with the same tokens: `num_tokens` of them if that is all that is known here, else with as
        many more as there are modules, since each module's last slots have read a token further on."""
        assert self.can_fork(num_tokens), "a sliding window cannot be cut back"
        forked = MtpDrafter(self.head, self.target, self.block_size)
        forked.cache, forked.num_committed = copy.deepcopy(self.cache), num_tokens
        known = self.num_committed - sum(map(len, self.pending))  # hidden states that module 0 has read, or that wait for it
        pending_TMD = torch.cat(self.pending)[: max(0, num_tokens - known)] if self.pending else None
        forked.pending = [] if pending_TMD is None else [pending_TMD.clone()]
        for k, num_final in enumerate(self.num_final):
            forked.num_final[k] = min(num_final, num_tokens)
            if num_final > num_tokens:
                self.head.forget(k, num_final - num_tokens, forked.cache)
            waiting_TD = self.waiting[k]
            if waiting_TD is not None:
                forked.waiting[k] = waiting_TD[: max(0, num_tokens - num_final)].clone()
        return forked

    @torch.inference_mode()
    def draft(self, ids: Sequence[int], limit: int, law: Law, noise: torch.Generator | Coupled) -> Draft:
        """Draw up to `limit` tokens, each by the law of its row over the whole vocabulary.

        No tokens after a prompt of one: there is no hidden state before its anchor yet."""
        self.tap()
        num, num_slots = min(limit, self.block_size), len(ids) - 1
        if num < 1 or num_slots < 1:
            return Draft([], torch.empty(0, 0))
        assert self.num_committed == num_slots, f"{self.num_committed} hidden states for a text of {len(ids)} tokens"
        block = Block(ids, law, noise, num)
        self.whole = False
        features_TMD = torch.cat(self.pending)
        self.pending = [features_TMD.new_empty(0, *features_TMD.shape[1:])]
        hidden_TD = self.head.hidden(features_TMD)
        last = self.head.num_modules - 1
        num_extra = 0
        for step in range(num):
            k = min(step, last)
            if step <= last:
                slot, hidden_TD = self.num_final[k], self.with_waiting(k, hidden_TD)
            else:
                slot, hidden_TD, num_extra = num_slots + step - last - 1, hidden_TD[-1:], num_extra + 1
            handed_TD, logits_V = self.head.run(k, hidden_TD, block.text[slot + 1 + k :][: len(hidden_TD)], slot, self.cache)
            if step <= last:
                self.settle(k, hidden_TD, num_slots)
            hidden_TD = handed_TD
            if not block.take(logits_V):
                break
        if step < last:  # the next module was not asked: what it would have read waits for it
            self.waiting[step + 1] = self.with_waiting(step + 1, hidden_TD)[: self.num_final[step] - self.num_final[step + 1]].clone()
        for k in range(min(step, last) + 1):
            self.head.forget(k, num_slots - self.num_final[k] + (num_extra if k == last else 0), self.cache)
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
    """A draft in the making, after the text `ids`: `text` with the tokens drawn so far."""

    def __init__(self, ids: Sequence[int], law: Law, noise: torch.Generator | Coupled, num: int):
        self.text, self.start, self.law, self.noise, self.num = list(ids), len(ids), law, noise, num
        self.uniforms = [] if isinstance(noise, Coupled) else Streams.uniforms(noise, num)
        self.laws: list[torch.Tensor] = []
        self.logits_V = torch.empty(0)
        self.error: Exception | None = None

    def take(self, logits_V: torch.Tensor) -> bool:
        """Draw the next token; False where the draft ends for what it drew."""
        k, self.logits_V = len(self.text) - self.start, logits_V
        try:
            return self.choose(k, logits_V)
        except Exception as error:  # broken numbers, or a processor's
            self.error = error
            return False  # tokens that led here stay: to drop a draft for what it drew would change the law

    def choose(self, k: int, logits_V: torch.Tensor) -> bool:
        if self.law.greedy and not self.law.processors:  # no need to form such laws
            self.text.append(best(logits_V[None])[0])
            return True
        q_V = law_of_choices(self.law, self.text, logits_V, torch.arange(len(logits_V), device=logits_V.device), len(logits_V))
        if q_V is None:
            return False
        if self.law.greedy:
            token = int(q_V.argmax())
        elif isinstance(self.noise, Coupled):
            token = self.noise.choose(q_V, len(self.text), len(q_V))
        else:
            token = draw(q_V, self.uniforms[k])
        self.laws.append(q_V)
        self.text.append(token)
        return True

    def finish(self) -> Draft:
        tokens = self.text[self.start :]
        if not tokens:
            if self.error is not None:
                raise self.error
            return Draft([], torch.empty(0, 0))
        laws = torch.stack(self.laws) if self.laws else FewTokens.certain(tokens, len(self.logits_V), self.logits_V.device)
        return Draft(tokens, laws, num_asked=self.num if len(tokens) < self.num else 0)
