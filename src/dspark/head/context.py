"""What a head knows of a request: context keys and values of final tokens, which only ever grow; and the pass of one
block over them, for one request or for several at once. Eagerly, or through the native runtime where the target runs there.

Shapes: R requests, T tokens, M tapped layers, G block size, D hidden, Vd draft vocabulary, E head dim."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from dspark.config import Sizes
from dspark.head.head import Head
from dspark.target.native.cache import PAGE_TOKENS, Cache, Page, Pool, pages_for
from dspark.target.native.stack import Drawn, NativeStack, Rows
from dspark.target.target import Target


@dataclass
class Context:
    """Of one request: keys and values of its first `num_tokens` tokens, as its runner keeps them."""

    kv: Any  # a native Cache, or eagerly a list of tensors [1, K, capacity, E]
    num_tokens: int = 0
    borrowed: bool = False  # eagerly: the tensors are another's, to be read only

    @property
    def own(self) -> list[torch.Tensor]:
        """Its memory, or a lender's, besides pages of a pool."""
        return [] if isinstance(self.kv, Cache) else self.kv

    def fork(self, num_tokens: int) -> "Context":
        """Its first tokens for another request; copied, for the most part, when that adds to them."""
        if isinstance(self.kv, Cache):
            return Context(self.kv.fork(num_tokens), num_tokens)
        return Context(list(self.kv), num_tokens, borrowed=bool(self.kv))


class Pending:
    """Features of final tokens on their way into the context, in pages: a view of a pass's features would keep all of them alive."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.pages: list[Page] = []
        self.rows: list[torch.Tensor] = []  # of each page [PAGE_TOKENS, M, D]

    def growth(self, num_tokens: int) -> int:
        """Pages that so many tokens more take."""
        return max(0, pages_for(self.num_tokens + num_tokens) - len(self.pages))

    def add(self, features_TMD: torch.Tensor, pool: Pool) -> None:
        done = 0
        while done < len(features_TMD):
            begun = self.num_tokens % PAGE_TOKENS
            if not begun:
                self.pages.append(pool.take())
                used = self.pages[-1].memory[: PAGE_TOKENS * features_TMD[0].nbytes]
                self.rows.append(used.view(features_TMD.dtype).view(PAGE_TOKENS, *features_TMD.shape[1:]))
            count = min(len(features_TMD) - done, PAGE_TOKENS - begun)
            self.rows[-1][begun : begun + count] = features_TMD[done : done + count]
            done, self.num_tokens = done + count, self.num_tokens + count

    def features(self) -> torch.Tensor:
        """All of them [T, M, D]."""
        return torch.cat(self.rows)[: self.num_tokens]

    def fork(self, num_tokens: int, pool: Pool | None) -> "Pending":
        """The first ones for another request: whole pages are shared, since nobody writes to them again, and one begun is copied."""
        forked, whole = Pending(), num_tokens // PAGE_TOKENS
        forked.pages, forked.rows, forked.num_tokens = self.pages[:whole], self.rows[:whole], whole * PAGE_TOKENS
        if num_tokens > forked.num_tokens:
            assert pool is not None  # these pages are its
            forked.add(self.rows[whole][: num_tokens - forked.num_tokens], pool)
        return forked


def feature_pool(runner: "Runner", features_TMD: torch.Tensor) -> Pool:
    """The runner's pool of pages for features like these."""
    size = PAGE_TOKENS * features_TMD[0].nbytes
    if runner.feature_pool is None or runner.feature_pool.page_bytes < size:
        runner.feature_pool = Pool(size, features_TMD.device)
    return runner.feature_pool


class Chained(NamedTuple):
    """A draft: where its tokens are in the draft vocabulary (-1: no number was finite, from there on), the logits of their
    confidences if the head has any, and by how much each row's best logit leads the next best."""

    choices: list[int]
    confidences: list[float] | None
    margins: list[float]


class Runner(Protocol):
    """Runs a head over the contexts of requests; none of its results depends on the other requests."""

    pool: Pool | None  # of the contexts' pages; None: eagerly each has memory of its own
    feature_pool: Pool | None  # of features' pages; None before the first
    token_bytes: int  # of a token in a context

    def start(self) -> Context: ...
    def growth(self, context: Context, num_tokens: int) -> int:
        """Bytes more that a context of `num_tokens` tokens and a block after them takes."""
        ...

    def commit(self, new: Sequence[tuple[Context, torch.Tensor]]) -> None:
        """Turn final tokens' features [T, M, D] into context keys and values, once."""

    def block(self, contexts: Sequence[Context], anchors_RD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [R, G, D] and base logits [R, G, Vd] of the blocks after the anchors with these embeddings."""
        ...

    def add_bias(self, logits_R: Sequence[torch.Tensor], z_Rr: torch.Tensor) -> list[int]:
        """Add the sequential head's bias W2 z to rows of logits [Vd], in place; where each largest sum is (-1: nowhere)."""
        ...

    def chain(
        self, anchors: Sequence[int], h_R: Sequence[torch.Tensor], logits_R: Sequence[torch.Tensor], drawn_R: Sequence[Drawn | None]
    ) -> list[Chained] | None:
        """Drafts after the anchors from hidden states [K, D] and base logits [K, Vd] of each request, to which the biases are
        added in place: greedily (None), or drawn, and the rows of drawn tokens become their laws. None: this runner takes one token
        at a time."""
        ...


def make_runner(head: Head, target: Target) -> Runner:
    """The native runner if the target runs natively and the head's shape allows, else the eager one."""
    return NativeRunner(head) if runs_natively(head.config, head.fc.weight, target) else EagerRunner(head)


def runs_natively(config: Sizes, weight: torch.Tensor, target: Target) -> bool:
    """Does the target run natively, and can a head of these sizes, with weights where this one is?"""
    sizes = (config.hidden_size, config.head_dim, config.draft_vocab_size, config.intermediate_size)
    return target.runtime is not None and weight.device.type == "cpu" and not any(size % 16 for size in sizes)


class EagerRunner:
    def __init__(self, head: Head):
        self.head, config = head, head.config
        self.pool: Pool | None = None
        self.feature_pool: Pool | None = None
        self.token_bytes = config.context_numbers * head.fc.weight.element_size()

    def start(self) -> Context:
        return Context([])

    def growth(self, context: Context, num_tokens: int) -> int:
        enough = context.kv and not context.borrowed and num_tokens <= context.kv[0].shape[2]
        return 0 if enough else self.token_bytes * room(num_tokens)  # the new buffers; the old ones go after that

    def commit(self, new: Sequence[tuple[Context, torch.Tensor]]) -> None:
        for context, features_TMD in new:
            if len(features_TMD):
                self._commit(context, features_TMD)

    def _commit(self, context: Context, features_TMD: torch.Tensor) -> None:
        before, after = context.num_tokens, context.num_tokens + len(features_TMD)
        positions = torch.arange(before, after, device=features_TMD.device)
        fresh = self.head.context_kv(features_TMD[None].to(self.head.fc.weight.dtype), positions[None])
        flat = [tensor for kv in fresh for tensor in kv]
        if self.growth(context, after):
            grown = [t.new_empty(1, t.shape[1], room(after), t.shape[3]) for t in flat]
            for old, buffer in zip(context.kv, grown, strict=False):
                buffer[:, :, :before] = old[:, :, :before]
            context.kv, context.borrowed = grown, False
        for buffer, tensor in zip(context.kv, flat, strict=True):
            buffer[:, :, before:after] = tensor
        context.num_tokens = after

    def block(self, contexts: Sequence[Context], anchors_RD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self.head.fc.weight
        hidden = []
        for context, anchor_D in zip(contexts, anchors_RD, strict=True):
            position = torch.tensor([[context.num_tokens]], device=weight.device)
            hidden.append(self.head.hidden(anchor_D[None, None].to(weight.dtype), position, self._views(context, weight))[0, 0])
        h_RGD = torch.stack(hidden)
        return h_RGD, self.head.base_logits(h_RGD).to(torch.float32, copy=True)  # biases are added in place

    def add_bias(self, logits_R: Sequence[torch.Tensor], z_Rr: torch.Tensor) -> list[int]:
        return add_bias(self.head, logits_R, z_Rr)

    def chain(
        self, anchors: Sequence[int], h_R: Sequence[torch.Tensor], logits_R: Sequence[torch.Tensor], drawn_R: Sequence[Drawn | None]
    ) -> list[Chained] | None:
        return None

    def _views(self, context: Context, like: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if not context.kv:  # a prompt of one token has nothing before its anchor
            config = self.head.config
            empty = like.new_empty(1, config.num_key_value_heads, 0, config.head_dim)
            return [(empty, empty)] * config.num_hidden_layers
        views = [buffer[:, :, self.head.config.first_seen(context.num_tokens) : context.num_tokens] for buffer in context.kv]
        return list(zip(views[::2], views[1::2], strict=True))


def room(num_tokens: int) -> int:
    """Tokens to have place for when there are so many: few more, and seldom copied."""
    return -(-(num_tokens + num_tokens // 8) // 64) * 64


class NativeRunner:
    def __init__(self, head: Head):
        self.head, config = head, head.config
        dtype = head.fc.weight.dtype
        self.stack = NativeStack(config, list(head.layers), head.norm, head.output_rows.to(dtype), (head.rotary.inverse, 1.0))
        self.fc = self.stack.linear(head.fc.weight)
        self.norm = head.hidden_norm.weight.detach().float()
        # stack.cpp takes sixteen numbers at a time
        w2_rows = None if head.markov_head is None or head.config.markov_rank % 16 else head.markov_head.markov_w2.weight
        self.w2 = None if w2_rows is None else self.stack.linear(w2_rows)
        self.confidence = confidence_row(head)
        self.masks = head.mask_embedding.float().expand(config.block_size - 1, config.hidden_size)
        self.pool: Pool | None = Pool(self.stack.page_bytes)
        self.feature_pool: Pool | None = None
        self.token_bytes = self.stack.page_bytes // PAGE_TOKENS

    def start(self) -> Context:
        assert self.pool is not None
        return Context(Cache(self.pool))

    def growth(self, context: Context, num_tokens: int) -> int:
        return context.kv.growth(context.num_tokens, num_tokens + len(self.masks) + 1)

    def commit(self, new: Sequence[tuple[Context, torch.Tensor]]) -> None:
        rows = [Rows(context.kv, context.num_tokens, len(features)) for context, features in new]
        self.stack.context(rows, self.fc, self.norm, torch.cat([features.flatten(1) for _, features in new]).float())
        for context, features in new:
            context.num_tokens += len(features)

    def block(self, contexts: Sequence[Context], anchors_RD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        G = len(self.masks) + 1
        rows = [Rows(context.kv, context.num_tokens, G, self.head.config.first_seen(context.num_tokens)) for context in contexts]
        x_RGD = torch.cat([anchors_RD.float()[:, None], self.masks.expand(len(contexts), -1, -1)], dim=1)
        done = self.stack.forward(rows, x_RGD.flatten(0, 1), len(contexts) * G, causal=False)
        hidden = done.normed.to(self.head.fc.weight.dtype).view(len(contexts), G, -1)
        return hidden, done.logits.view(len(contexts), G, -1)

    def add_bias(self, logits_R: Sequence[torch.Tensor], z_Rr: torch.Tensor) -> list[int]:
        return add_bias(self.head, logits_R, z_Rr) if self.w2 is None else self.stack.bias(self.w2, z_Rr, logits_R)

    def chain(
        self, anchors: Sequence[int], h_R: Sequence[torch.Tensor], logits_R: Sequence[torch.Tensor], drawn_R: Sequence[Drawn | None]
    ) -> list[Chained] | None:
        markov = self.head.markov_head
        if self.w2 is None or markov is None or self.head.config.markov_head_type != "vanilla":
            return None
        found = self.stack.chain(markov.markov_w1.weight, self.w2, self.head.draft_ids, self.confidence, anchors, h_R, logits_R, drawn_R)
        return [Chained(choices, c if self.confidence is not None else None, margins) for choices, c, margins in found]


def confidence_row(head: Head) -> torch.Tensor | None:
    """Weights over [h; W1[x_prev]] and bias of the confidence head, float32 [D + r + 1]."""
    if head.confidence_head is None:
        return None
    proj, config = head.confidence_head.proj, head.config
    unused = proj.weight.new_zeros(config.hidden_size + config.markov_rank - proj.in_features)
    return torch.cat([proj.weight[0], unused, proj.bias]).detach().float()


def add_bias(head: Head, logits_R: Sequence[torch.Tensor], z_Rr: torch.Tensor) -> list[int]:
    markov = head.markov_head
    assert markov is not None  # a head of rank 0 has no z
    best = []
    for row_V, bias_V in zip(logits_R, F.linear(z_Rr, markov.markov_w2.weight).float(), strict=True):
        row_V.add_(bias_V)
        where = int(row_V.argmax())
        best.append(where if math.isfinite(row_V[where]) else -1)
    return best
