"""The target's own multi-token-prediction modules as a drafter.

A slot of module k is final once the token it embeds is. Only final slots stay in the modules' caches: a draft's own are taken out again
when it is done, whether or not it will be accepted. Rounds that others drafted leave no gap: the slots of their tokens are filled
when the modules draft next.

Shapes: K drafted tokens, T slots of one pass, M tapped layers (the last one only), D hidden size, V vocabulary."""

from collections.abc import Sequence

import torch

from dspark.core.sampling import Coupled, Law, Streams, best, draw
from dspark.core.verifier import Draft, FewTokens
from dspark.drafters.dspark import law_of_choices
from dspark.head.mtp import MtpHead
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
        self.num_final = [0] * self.head.num_modules  # slots that each module's cache holds
        # What each module will read in the slots that are not final there, but were where it comes from.
        self.waiting: list[torch.Tensor | None] = [None] * self.head.num_modules

    def tap(self) -> None:
        """Another drafter may have tapped other layers since this one's last round."""
        layers = (self.target.num_layers - 1,)
        if self.target.layer_ids != layers:
            self.target.tap(layers)

    def commit(self, features_TMD: torch.Tensor) -> None:
        """Kept until the next draft, which knows the tokens after them: while others draft, or nobody does, this costs nothing."""
        self.pending.append(features_TMD)
        self.num_committed += len(features_TMD)

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
            self.waiting[step + 1] = self.with_waiting(step + 1, hidden_TD)[: self.num_final[step] - self.num_final[step + 1]]
        for k in range(min(step, last) + 1):
            self.head.forget(k, num_slots - self.num_final[k] + (num_extra if k == last else 0), self.cache)
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
        self.waiting[k] = hidden_TD[final - before : (self.num_final[k - 1] if k else num_slots) - before]


class Block:
    """A draft in the making, after the text `ids`: `text` with the tokens drawn so far."""

    def __init__(self, ids: Sequence[int], law: Law, noise: torch.Generator | Coupled, num: int):
        self.text, self.start, self.law, self.noise, self.num = list(ids), len(ids), law, noise, num
        self.uniforms = [] if isinstance(noise, Coupled) else Streams.uniforms(noise, num)
        self.laws: list[torch.Tensor] = []
        self.logits_V = torch.empty(0)

    def take(self, logits_V: torch.Tensor) -> bool:
        """Draw the next token; False where the draft ends for what it drew."""
        k, self.logits_V = len(self.text) - self.start, logits_V
        try:
            return self.choose(k, logits_V)
        except Exception:  # broken numbers, or a processor's
            if k == 0:
                raise
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
            return Draft([], torch.empty(0, 0))
        laws = torch.stack(self.laws) if self.laws else FewTokens.certain(tokens, len(self.logits_V), self.logits_V.device)
        return Draft(tokens, laws, num_asked=self.num if len(tokens) < self.num else 0)
