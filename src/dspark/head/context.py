"""What a head knows of a request: context keys and values of final tokens, which only ever grow; and the pass of one
block over them, for one request or for several at once. Eagerly, or through the native runtime where the target runs there.

Shapes: R requests, T tokens, M tapped layers, G block size, D hidden, Vd draft vocabulary, E head dim."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from dspark.head.head import Head
from dspark.target.native.stack import NativeStack, Rows
from dspark.target.target import Target


@dataclass
class Context:
    """Of one request: keys and values of its first `num_tokens` tokens, as its runner keeps them."""

    kv: Any  # a native Cache, or eagerly a list of tensors [1, K, capacity, E]
    num_tokens: int = 0

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return sum(t.nbytes for t in self.kv) if isinstance(self.kv, list) else self.kv.data.nbytes

    def fork(self, num_tokens: int) -> "Context":
        """A copy of its own of the first tokens."""
        if not isinstance(self.kv, list):
            return Context(self.kv.fork(num_tokens), num_tokens)
        return Context([t[:, :, :num_tokens].clone() for t in self.kv], num_tokens)


class Chained(NamedTuple):
    """A greedy draft: where its tokens are in the draft vocabulary (-1: no number was finite, from there on), the logits of their
    confidences if the head has any, and by how much each token's logit leads the next best."""

    choices: list[int]
    confidences: list[float] | None
    margins: list[float]


class Runner(Protocol):
    """Runs a head over the contexts of requests; none of its results depends on the other requests."""

    def start(self) -> Context: ...
    def commit(self, new: Sequence[tuple[Context, torch.Tensor]]) -> None:
        """Turn final tokens' features [T, M, D] into context keys and values, once."""

    def block(self, contexts: Sequence[Context], anchors_RD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [R, G, D] and base logits [R, G, Vd] of the blocks after the anchors with these embeddings."""
        ...

    def add_bias(self, logits_R: Sequence[torch.Tensor], z_Rr: torch.Tensor) -> list[int]:
        """Add the sequential head's bias W2 z to rows of logits [Vd], in place; where each largest sum is (-1: nowhere)."""
        ...

    def chain(self, anchors: Sequence[int], h_R: Sequence[torch.Tensor], logits_R: Sequence[torch.Tensor]) -> list[Chained] | None:
        """Greedy drafts after the anchors from hidden states [K, D] and base logits [K, Vd] of each request, to which the biases are
        added in place. None: this runner takes one token at a time."""
        ...


def make_runner(head: Head, target: Target) -> Runner:
    """The native runner if the target runs natively and the head's shape allows, else the eager one."""
    config = head.config
    sizes = (config.hidden_size, config.head_dim, config.draft_vocab_size, config.intermediate_size)
    native = target.runtime is not None and head.fc.weight.device.type == "cpu" and not any(size % 16 for size in sizes)
    return NativeRunner(head) if native else EagerRunner(head)


class EagerRunner:
    def __init__(self, head: Head):
        self.head = head

    def start(self) -> Context:
        return Context([])

    def commit(self, new: Sequence[tuple[Context, torch.Tensor]]) -> None:
        for context, features_TMD in new:
            if len(features_TMD):
                self._commit(context, features_TMD)

    def _commit(self, context: Context, features_TMD: torch.Tensor) -> None:
        before, after = context.num_tokens, context.num_tokens + len(features_TMD)
        positions = torch.arange(before, after, device=features_TMD.device)
        fresh = self.head.context_kv(features_TMD[None].to(self.head.fc.weight.dtype), positions[None])
        flat = [tensor for kv in fresh for tensor in kv]
        if not context.kv or after > context.kv[0].shape[2]:
            grown = [t.new_empty(1, t.shape[1], max(256, 2 * after), t.shape[3]) for t in flat]
            for old, buffer in zip(context.kv, grown, strict=False):
                buffer[:, :, :before] = old[:, :, :before]
            context.kv = grown
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

    def chain(self, anchors: Sequence[int], h_R: Sequence[torch.Tensor], logits_R: Sequence[torch.Tensor]) -> list[Chained] | None:
        return None

    def _views(self, context: Context, like: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if not context.kv:  # a prompt of one token has nothing before its anchor
            config = self.head.config
            empty = like.new_empty(1, config.num_key_value_heads, 0, config.head_dim)
            return [(empty, empty)] * config.num_hidden_layers
        views = [buffer[:, :, : context.num_tokens] for buffer in context.kv]
        return list(zip(views[::2], views[1::2], strict=True))


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

    def start(self) -> Context:
        return Context(self.stack.new_cache())

    def commit(self, new: Sequence[tuple[Context, torch.Tensor]]) -> None:
        rows = [Rows(context.kv, context.num_tokens, len(features)) for context, features in new]
        self.stack.context(rows, self.fc, self.norm, torch.cat([features.flatten(1) for _, features in new]).float())
        for context, features in new:
            context.num_tokens += len(features)

    def block(self, contexts: Sequence[Context], anchors_RD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        G = len(self.masks) + 1
        rows = [Rows(context.kv, context.num_tokens, G) for context in contexts]
        x_RGD = torch.cat([anchors_RD.float()[:, None], self.masks.expand(len(contexts), -1, -1)], dim=1)
        done = self.stack.forward(rows, x_RGD.flatten(0, 1), len(contexts) * G, causal=False)
        hidden = done.normed.to(self.head.fc.weight.dtype).view(len(contexts), G, -1)
        return hidden, done.logits.view(len(contexts), G, -1)

    def add_bias(self, logits_R: Sequence[torch.Tensor], z_Rr: torch.Tensor) -> list[int]:
        return add_bias(self.head, logits_R, z_Rr) if self.w2 is None else self.stack.bias(self.w2, z_Rr, logits_R)

    def chain(self, anchors: Sequence[int], h_R: Sequence[torch.Tensor], logits_R: Sequence[torch.Tensor]) -> list[Chained] | None:
        markov = self.head.markov_head
        if self.w2 is None or markov is None or self.head.config.markov_head_type != "vanilla":
            return None
        found = self.stack.chain(markov.markov_w1.weight, self.w2, self.head.draft_ids, self.confidence, anchors, h_R, logits_R)
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
