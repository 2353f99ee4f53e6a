"""The DSpark head as a drafter; a head of rank 0 is DFlash.

Shapes: G block size, K drafted tokens, C shortlist, V vocabulary, Vd draft vocabulary, M tapped
layers, D hidden, E head dim."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dspark.core.sampling import Law, Streams, apply, draw, probs
from dspark.core.verifier import Draft
from dspark.head.head import Head
from dspark.target.target import Target


class DSparkDrafter:
    """Owns the head's context keys and values of one request; they only ever grow."""

    def __init__(self, head: Head, target: Target):
        self.head, self.target = head, target
        self.block_size = head.config.block_size
        self.start()

    def start(self) -> None:
        self._tap()
        self.num_context = 0
        self.buffers: list[torch.Tensor] = []

    def _tap(self) -> None:
        """Another drafter may have tapped other layers since this one's last round."""
        if self.target.layer_ids != self.head.config.target_layer_ids:
            self.target.tap(self.head.config.target_layer_ids)

    @torch.inference_mode()
    def commit(self, features_TMD: torch.Tensor) -> None:
        """Turn final tokens' features into context keys and values, once."""
        num_new = len(features_TMD)
        if num_new == 0:
            return
        positions = torch.arange(self.num_context, self.num_context + num_new, device=features_TMD.device)
        weight = self.head.fc.weight
        new = self.head.context_kv(features_TMD[None].to(weight.dtype), positions[None])
        flat = [tensor for kv in new for tensor in kv]
        if not self.buffers or self.num_context + num_new > self.buffers[0].shape[2]:
            capacity = max(256, 2 * (self.num_context + num_new))
            grown = [t.new_empty(1, t.shape[1], capacity, t.shape[3]) for t in flat]
            for old, buffer in zip(self.buffers, grown, strict=False):
                buffer[:, :, : self.num_context] = old[:, :, : self.num_context]
            self.buffers = grown
        for buffer, tensor in zip(self.buffers, flat, strict=True):
            buffer[:, :, self.num_context : self.num_context + num_new] = tensor
        self.num_context += num_new

    def _context(self, like: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if not self.buffers:  # a prompt of one token has nothing before its anchor
            config = self.head.config
            empty = like.new_empty(1, config.num_key_value_heads, 0, config.head_dim)
            return [(empty, empty)] * config.num_hidden_layers
        views = [buffer[:, :, : self.num_context] for buffer in self.buffers]
        return list(zip(views[::2], views[1::2], strict=True))

    @torch.inference_mode()
    def draft(self, ids: Sequence[int], limit: int, law: Law, generator: torch.Generator) -> Draft:
        """Draw up to `limit` tokens; the law of each is the renormalised shortlist of its row.

        Only the shortlist's rows of W2 are touched: drafts may be cheap in any way as long as the
        law they were drawn from is known exactly (it is the one returned)."""
        self._tap()
        num = min(limit, self.block_size)
        if num == 0:
            return Draft([], torch.empty(0, 0))
        head, weight = self.head, self.head.fc.weight
        anchor = self.target.embed(torch.tensor([[ids[-1]]], device=weight.device)).to(weight.dtype)
        position = torch.tensor([[self.num_context]], device=weight.device)
        h_GD = head.hidden(anchor, position, self._context(weight))[0, 0, :num]
        size = min(head.config.shortlist, len(head.draft_ids))
        base_KC, shortlist_KC = head.base_logits(h_GD).float().topk(size, dim=-1)
        uniforms = Streams.uniforms(generator, num)
        tokens: list[int] = []
        confidences: list[float] = []
        state, markov = None, head.markov_head
        law_KV = torch.zeros(num, head.config.vocab_size, device=weight.device)
        for k in range(num):
            previous = torch.tensor([tokens[-1] if tokens else ids[-1]], device=weight.device)
            logits_C, w = base_KC[k], None
            if markov is not None:
                w = markov.markov_w1(previous)
                z, state = markov.step(w, h_GD[k : k + 1], state)
                logits_C = logits_C + F.linear(z, markov.markov_w2.weight[shortlist_KC[k]])[0].float()
            if head.confidence_head is not None:
                confidences.append(torch.sigmoid(head.confidence_head(h_GD[k : k + 1], w).float()).item())
            ids_C = head.draft_ids[shortlist_KC[k]]
            q_C = shortlist_law(law, [*ids, *tokens], logits_C, ids_C, head.config.vocab_size)
            if q_C is None:
                break
            tokens.append(int(ids_C[draw(q_C, uniforms[k])]))
            law_KV[k, ids_C] = q_C
        num = len(tokens)
        return Draft(tokens, law_KV[:num], confidences[:num] if head.confidence_head is not None else None)


def shortlist_law(law: Law, prefix: Sequence[int], logits_C: torch.Tensor, ids_C: torch.Tensor, vocab_size: int) -> torch.Tensor | None:
    """The law [C] over a shortlist of tokens; None where the processors, which read the prefix and a full
    row of logits, forbid all of it: the draft then ends."""
    if law.processors:
        logits_V = logits_C.new_full((1, vocab_size), float("-inf"))
        logits_V[0, ids_C] = logits_C
        logits_C = apply(law.processors, torch.tensor([list(prefix)], device=ids_C.device), logits_V)[0, ids_C]
        if not torch.isfinite(logits_C).any():
            return None
    return probs(Law(warpers=law.warpers, greedy=law.greedy), [()], logits_C[None])[0]
