"""The DSpark head as a drafter; a head of rank 0 is DFlash.

Shapes: G block size, K drafted tokens, C tokens to choose from, V vocabulary, M tapped layers, D hidden."""

from collections.abc import Sequence

import torch

from dspark.core.sampling import Law, Streams, apply, best, draw, probs
from dspark.core.verifier import Draft, FewTokens
from dspark.head.context import make_context
from dspark.head.head import Head
from dspark.target.target import Target


class DSparkDrafter:
    """Draws a block from the head and its context of one request.

    `recording` is for calibration: confidences are then the head's own, uncalibrated, and margins are noted."""

    def __init__(self, head: Head, target: Target, recording: bool = False):
        self.head, self.target, self.recording = head, target, recording
        self.block_size = head.config.block_size
        self.context = make_context(head, target)
        self.start()

    def start(self) -> None:
        self.tap()
        self.context.start()
        self.pending: list[torch.Tensor] = []

    def tap(self) -> None:
        """Another drafter may have tapped other layers since this one's last round."""
        if self.target.layer_ids != self.head.config.target_layer_ids:
            self.target.tap(self.head.config.target_layer_ids)

    def commit(self, features_TMD: torch.Tensor) -> None:
        """Kept until the next draft: while others draft, or nobody does, the head costs nothing."""
        self.pending.append(features_TMD)

    @torch.inference_mode()
    def flush(self) -> None:
        """Turn what was committed into context keys and values."""
        if self.pending:
            self.context.commit(torch.cat(self.pending))
            self.pending = []

    @torch.inference_mode()
    def draft(self, ids: Sequence[int], limit: int, law: Law, generator: torch.Generator) -> Draft:
        """Draw up to `limit` tokens, each by the law of its row over the draft vocabulary, or over the best tokens of the
        row before its bias where the bias of all would be dear: drafts may be cheap in any way as long as the law
        they were drawn from is known exactly (it is the one returned)."""
        self.tap()
        num = min(limit, self.block_size)
        if num == 0:
            return Draft([], torch.empty(0, 0))
        self.flush()
        head, markov = self.head, self.head.markov_head
        h_GD, logits_KC = self.context.block(self.target.embed(torch.tensor([ids[-1]], device=head.fc.weight.device))[0])
        shortlist_KC = None
        if head.config.num_choices < len(head.draft_ids):
            logits_KC, shortlist_KC = logits_KC[:num].topk(head.config.num_choices, dim=-1)
        ids_KC = head.draft_ids.expand(num, -1) if shortlist_KC is None else head.draft_ids[shortlist_KC]
        uniforms = Streams.uniforms(generator, num)
        one_hot = law.greedy and not law.processors  # no need to form such laws
        tokens: list[int] = []
        laws: list[torch.Tensor] = []
        states: list[torch.Tensor] = []
        state = None
        for k in range(num):
            logits_C, choice = logits_KC[k], None
            if markov is not None:
                previous = tokens[-1] if tokens else ids[-1]
                w = markov.markov_w1.weight[previous : previous + 1]
                z, state = markov.step(w, h_GD[k : k + 1], state)
                states.append(w)
                if shortlist_KC is None:
                    choice = self.context.add_bias(logits_C, z[0])
                else:
                    logits_C += markov.markov_w2.weight[shortlist_KC[k]].float() @ z[0].float()
            if one_hot:
                choice = best(logits_C[None])[0] if choice is None or choice < 0 else choice
                tokens.append(int(ids_KC[k, choice]))
                continue
            q_C = law_of_choices(law, [*ids, *tokens], logits_C, ids_KC[k], head.config.vocab_size)
            if q_C is None:
                break
            laws.append(q_C)
            tokens.append(int(ids_KC[k, q_C.argmax() if law.greedy else draw(q_C, uniforms[k])]))
        num = len(tokens)
        if num == 0:
            return Draft([], torch.empty(0, 0))
        confidences = None
        if head.confidence_head is not None:
            w_KR = torch.cat(states[:num]) if states else None
            logits_K = head.confidence_head(h_GD[:num], w_KR).float()
            if head.calibration is not None and not self.recording:
                fit = head.calibration.nearest(law.temperature)
                logits_K = logits_K / logits_K.new_tensor(fit.temperatures[:num]) + logits_K.new_tensor(fit.biases[:num])
            confidences = logits_K.sigmoid().tolist()
        # logits_KC has the biases in it by now
        margins = (-logits_KC[:num].topk(2).values.diff()[:, 0]).tolist() if self.recording else None
        if one_hot:
            return Draft(tokens, FewTokens.certain(tokens, head.config.vocab_size, ids_KC.device), confidences, margins)
        return Draft(tokens, FewTokens(ids_KC[:num], torch.stack(laws), head.config.vocab_size), confidences, margins)


def law_of_choices(law: Law, prefix: Sequence[int], logits_C: torch.Tensor, ids_C: torch.Tensor, vocab_size: int) -> torch.Tensor | None:
    """The law [C] over the tokens to choose from; None where the processors, which read the prefix and a full
    row of logits, forbid all of it: the draft then ends."""
    if law.processors:
        logits_V = logits_C.new_full((1, vocab_size), float("-inf"))
        logits_V[0, ids_C] = logits_C
        logits_C = apply(law.processors, torch.tensor([list(prefix)], device=ids_C.device), logits_V)[0, ids_C]
        if not torch.isfinite(logits_C).any():
            return None
    return probs(Law(warpers=law.warpers, greedy=law.greedy), [()], logits_C[None])[0]
