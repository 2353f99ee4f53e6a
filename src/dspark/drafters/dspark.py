"""The DSpark head as a drafter; a head of rank 0 is DFlash.

Shapes: R requests, G block size, K drafted tokens, C tokens to choose from, V vocabulary, M tapped layers, D hidden, r Markov rank."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers.generation.logits_process import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper

from dspark.core.calibration import chances
from dspark.core.sampling import Coupled, Law, Streams, apply, best, draw, probs
from dspark.core.verifier import Draft, FewTokens, Joined, Rows
from dspark.head.context import Chained, Pending, Runner, feature_pool, make_runner
from dspark.head.head import Head
from dspark.target.native.stack import Drawn
from dspark.target.target import Target
from dspark.warpers import UnsortedTopP

# What `Drawn` calls them, in its order.
WARPERS: dict[type, str] = {
    TemperatureLogitsWarper: "temperature", TopKLogitsWarper: "top_k", UnsortedTopP: "top_p", MinPLogitsWarper: "min_p",
}  # fmt: skip


class DSparkDrafter:
    """Draws a block from the head and its context of one request.

    `recording` is for calibration: confidences are then the head's own, uncalibrated, and margins are noted.
    `runner` is the head's on this target; drafters of many requests share one."""

    def __init__(self, head: Head, target: Target, recording: bool = False, runner: Runner | None = None):
        self.head, self.target, self.recording = head, target, recording
        self.block_size = head.config.block_size
        self.runner = runner or make_runner(head, target)
        self.start()

    def start(self) -> None:
        self.tap()
        self.context = self.runner.start()
        self.pending = Pending()

    def tap(self) -> None:
        """Another drafter may have tapped other layers since this one's last round."""
        self.target.need(self.layer_ids)

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """Of the target, whose states it reads."""
        return self.head.config.target_layer_ids

    def commit(self, features_TMD: torch.Tensor) -> None:
        """Kept until the next draft: while others draft, or nobody does, the head costs nothing."""
        if len(features_TMD):
            own_TMD = self.target.of_layers(features_TMD, self.layer_ids)
            self.pending.add(own_TMD, feature_pool(self.runner, own_TMD))

    def fork(self, num_tokens: int) -> "DSparkDrafter":
        """A drafter for another text that begins with the same tokens. What is pending stays so: the other may never draft."""
        forked = DSparkDrafter(self.head, self.target, self.recording, self.runner)
        forked.context = self.context.fork(min(num_tokens, self.context.num_tokens))
        forked.pending = self.pending.fork(num_tokens - forked.context.num_tokens, self.runner.feature_pool)
        return forked

    def commit_bytes(self, num_tokens: int) -> int:
        """Memory that features of so many tokens more take."""
        pool = self.runner.feature_pool
        return 0 if pool is None else pool.page_bytes * self.pending.growth(num_tokens)

    def draft_bytes(self, num_tokens: int = 0) -> int:
        """Memory that the context takes, beyond what it has, for a draft after so many tokens more."""
        return self.runner.growth(self.context, self.context.num_tokens + self.pending.num_tokens + num_tokens)

    def flush(self) -> None:
        """Turn what was committed into context keys and values."""
        flush_many([self])

    def draft(self, ids: Sequence[int], limit: int, law: Law, noise: torch.Generator | Coupled) -> Draft:
        """Draw up to `limit` tokens, each by the law of its row over the draft vocabulary, or over the best tokens of the
        row before its bias where the bias of all would be dear: drafts may be cheap in any way as long as the law
        they were drawn from is known exactly (it is the one returned)."""
        self.tap()
        return draft_many([Ask(self, ids, limit, law, noise)])[0]


class Ask(NamedTuple):
    """One request's wish for a draft of up to `limit` tokens after `ids`; its first ones may be drawn already, by another drafter."""

    drafter: DSparkDrafter
    ids: Sequence[int]
    limit: int
    law: Law
    noise: torch.Generator | Coupled
    begun: Draft = Draft([], torch.empty(0, 0))


@torch.inference_mode()
def flush_many(drafters: Sequence[DSparkDrafter]) -> None:
    """`flush` of each, in one pass where the runner can."""
    new = [(d.context, d.pending.features()) for d in drafters if d.pending.num_tokens]
    if new:
        drafters[0].runner.commit(new)
    for drafter in drafters:
        drafter.pending = Pending()


@dataclass
class Block:
    """A draft in the making: rows over the tokens to choose from, and what has been drawn."""

    ask: Ask
    logits_KC: torch.Tensor
    shortlist_KC: torch.Tensor | None
    ids_KC: torch.Tensor
    uniforms: list[float]
    drawn: Drawn | None  # its law, where it is one that a runner can draw from
    tokens: list[int] = field(default_factory=list)
    laws: list[torch.Tensor] = field(default_factory=list)
    chained: Chained | None = None
    ended: bool = False

    @property
    def last(self) -> int:
        return self.tokens[-1] if self.tokens else self.ask.ids[-1]

    @property
    def greedy(self) -> bool:
        """Each token is the best of its row, which no processor changes: such laws need not be formed."""
        return self.ask.law.greedy and not self.ask.law.processors

    def add_bias(self, k: int, z_r: torch.Tensor) -> None:
        """The sequential head's bias on the shortlist of row k."""
        markov, shortlist_KC = self.ask.drafter.head.markov_head, self.shortlist_KC
        assert markov is not None and shortlist_KC is not None
        self.logits_KC[k] += markov.markov_w2.weight[shortlist_KC[k]].float() @ z_r.float()

    def take(self, k: int, choice: int) -> None:
        """Draw token k; `choice` is where its row is largest, if that is known (else -1)."""
        law, head, row_C = self.ask.law, self.ask.drafter.head, self.logits_KC[k]
        if self.greedy:
            self.tokens.append(int(self.ids_KC[k, best(row_C[None])[0] if choice < 0 else choice]))
            return
        q_C = law_of_choices(law, [*self.ask.ids, *self.tokens], row_C, self.ids_KC[k], head.config.vocab_size)
        if q_C is None:
            self.ended = True
            return
        if law.greedy:
            where = int(q_C.argmax())
        elif isinstance(self.ask.noise, Coupled):
            where = self.ask.noise.choose(q_C, len(self.ask.ids) + k, head.config.vocab_size, self.ids_KC[k])
        else:
            where = draw(q_C, self.uniforms[k])
        self.laws.append(q_C)
        self.tokens.append(int(self.ids_KC[k, where]))

    def attempt(self, k: int, choice: int) -> None:
        """`take` token k, or one that was drawn already; of what cannot be drawn behind the first the draft ends."""
        if k < len(self.ask.begun.tokens):
            self.tokens.append(self.ask.begun.tokens[k])
            return
        try:
            self.take(k, choice)
        except Exception:  # broken numbers, or a processor's
            if k == 0:
                raise
            self.ended = True  # tokens that led here stay: to drop a draft for what it drew would change the law

    @property
    def chainable(self) -> bool:
        """Could a runner draw all of it in one go?"""
        return self.shortlist_KC is None and (self.greedy or self.drawn is not None) and not self.ask.begun.tokens

    def follow(self, chained: Chained) -> None:
        """Take all tokens as a runner has chosen them; the rows of drawn ones hold their laws by now."""
        self.chained = chained
        for k, choice in enumerate(chained.choices[: len(self.logits_KC)]):
            if choice < 0:
                self.attempt(k, choice)  # raises for the first token; behind it the draft ends
                self.ended = True
                return
            self.tokens.append(int(self.ids_KC[k, choice]))

    def finish(self, h_GD: torch.Tensor, w_Kr: torch.Tensor | None) -> Draft:
        """The draft, with its confidences."""
        num, law, head, recording = len(self.tokens), self.ask.law, self.ask.drafter.head, self.ask.drafter.recording
        if num == 0:
            return Draft([], torch.empty(0, 0))
        logits: list[float] | None = None
        if self.chained is not None:
            logits = self.chained.confidences
        elif head.confidence_head is not None:
            logits = head.confidence_head(h_GD[:num], None if w_Kr is None else w_Kr[:num]).tolist()
        fit = None if head.calibration is None or recording else head.calibration.nearest(law.temperature)
        margins = None
        if recording or (fit is not None and any(fit.margin_weights)):
            # logits_KC has the biases in it by now
            chained = self.chained and self.chained.margins[:num]
            margins = chained or (-self.logits_KC[:num].topk(2).values.diff()[:, 0]).tolist()
        confidences = None if logits is None else chances(logits[:num], margins, fit)
        uncalibrated = None if logits is None or fit is None else chances(logits[:num], None, None)
        begun = self.ask.begun.probs_KV
        laws: Rows
        if self.greedy:
            laws = FewTokens.certain(self.tokens, head.config.vocab_size, self.ids_KC.device)
        elif not self.laws and self.chained is None:
            laws = begun
        else:
            laws_KC = torch.stack(self.laws) if self.chained is None else self.logits_KC[:num]
            laws = FewTokens(self.ids_KC[len(begun) : num], laws_KC, head.config.vocab_size)
            laws = Joined(begun, laws) if len(begun) else laws
        return Draft(self.tokens, laws, confidences, margins if recording else None, len(self.logits_KC) if self.ended else 0, uncalibrated)


@torch.inference_mode()
def draft_many(asks: Sequence[Ask]) -> list[Draft]:
    """`DSparkDrafter.draft` for requests whose drafters share a runner, in one pass where it can."""
    drafts = [Draft([], torch.empty(0, 0))] * len(asks)
    wanting = [i for i, ask in enumerate(asks) if ask.limit > 0]
    if not wanting:
        return drafts
    drafters = [asks[i].drafter for i in wanting]
    head, runner, markov = drafters[0].head, drafters[0].runner, drafters[0].head.markov_head
    flush_many(drafters)
    anchors = torch.tensor([asks[i].ids[-1] for i in wanting], device=head.fc.weight.device)
    h_RGD, logits_RGC = runner.block([drafter.context for drafter in drafters], drafters[0].target.embed(anchors))
    blocks = [begin(asks[i], logits_GC) for i, logits_GC in zip(wanting, logits_RGC, strict=True)]
    longest = max(len(block.logits_KC) for block in blocks)
    simple = [r for r, block in enumerate(blocks) if block.chainable]
    h_R, logits_R = ([rows[r, :longest] for r in simple] for rows in (h_RGD, logits_RGC))
    if simple and (found := runner.chain([blocks[r].last for r in simple], h_R, logits_R, [blocks[r].drawn for r in simple])):
        for r, chained in zip(simple, found, strict=True):
            blocks[r].follow(chained)
    w_RKr: list[list[torch.Tensor]] = [[] for _ in blocks]
    state_Rr: torch.Tensor | None = None
    for k in range(longest):
        going = [r for r, block in enumerate(blocks) if k < len(block.logits_KC) and not block.ended and block.chained is None]
        if not going:
            break
        choices = [-1] * len(going)
        if markov is not None:
            # All requests take the step, so that the state's rows stay theirs.
            w_Rr = markov.markov_w1.weight[torch.tensor([block.last for block in blocks], device=h_RGD.device)]
            z_Rr, state_Rr = markov.step(w_Rr, h_RGD[:, k], state_Rr)
            for r in going:
                w_RKr[r].append(w_Rr[r])
            if blocks[0].shortlist_KC is None:
                choices = runner.add_bias([blocks[r].logits_KC[k] for r in going], z_Rr[going])
            else:
                for r in going:
                    blocks[r].add_bias(k, z_Rr[r])
        for r, choice in zip(going, choices, strict=True):
            blocks[r].attempt(k, choice)
    for i, block, h_GD, w_Kr in zip(wanting, blocks, h_RGD, w_RKr, strict=True):
        drafts[i] = block.finish(h_GD, torch.stack(w_Kr) if w_Kr else None)
    return drafts


def begin(ask: Ask, logits_GC: torch.Tensor) -> Block:
    head = ask.drafter.head
    num = min(ask.limit, head.config.block_size)
    logits_KC, shortlist_KC = logits_GC[:num], None
    if head.config.num_choices < len(head.draft_ids):
        logits_KC, shortlist_KC = logits_KC.topk(head.config.num_choices, dim=-1)
    ids_KC = head.draft_ids.expand(num, -1) if shortlist_KC is None else head.draft_ids[shortlist_KC]
    uniforms = [] if isinstance(ask.noise, Coupled) else Streams.uniforms(ask.noise, num)
    places = range(len(ask.ids), len(ask.ids) + num)
    drawn = drawn_by(ask.law, ask.noise, uniforms, places, head.config.vocab_size, head.fc.weight.device)
    return Block(ask, logits_KC, shortlist_KC, ids_KC, uniforms, drawn)


def drawn_by(
    law: Law, noise: torch.Generator | Coupled, uniforms: Sequence[float], places: range, vocab_size: int, device: torch.device
) -> Drawn | None:
    """How tokens at these places of the text are drawn, if their law is made of temperature, top-k, top-p and min-p in this order; else None."""
    kinds = [type(warper) for warper in law.warpers]
    plain = all(getattr(w, "min_tokens_to_keep", 1) == 1 and getattr(w, "filter_value", -math.inf) == -math.inf for w in law.warpers)
    if law.greedy or law.processors or not plain or kinds != [kind for kind in WARPERS if kind in kinds]:
        return None
    settings = {name: getattr(warper, name) for warper, name in zip(law.warpers, (WARPERS[kind] for kind in kinds), strict=True)}
    races = [noise.exponentials(place, vocab_size, device) for place in places] if isinstance(noise, Coupled) else []
    return Drawn(**{"temperature": 1.0, **settings}, uniforms=uniforms, races=races)


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
