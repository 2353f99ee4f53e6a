"""What a head knows of one request: context keys and values of final tokens, which only ever grow, and the
pass of one block over them. Eagerly, or through the native runtime where the target runs there.

Shapes: T tokens, M tapped layers, G block size, D hidden, Vd draft vocabulary, E head dim."""

import math
from typing import Protocol

import torch
import torch.nn.functional as F

from dspark.head.head import Head
from dspark.target.native.stack import NativeStack
from dspark.target.target import Target


class Context(Protocol):
    num_tokens: int

    def start(self) -> None: ...
    def commit(self, features_TMD: torch.Tensor) -> None: ...
    def block(self, anchor_D: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...
    def add_bias(self, logits_V: torch.Tensor, z_r: torch.Tensor) -> int: ...


def make_context(head: Head, target: Target) -> Context:
    """The native context if the target runs natively and the head's shape allows, else the eager one."""
    config = head.config
    sizes = (config.hidden_size, config.head_dim, config.draft_vocab_size, config.intermediate_size)
    native = target.runtime is not None and head.fc.weight.device.type == "cpu" and not any(size % 16 for size in sizes)
    return NativeContext(head) if native else EagerContext(head)


class EagerContext:
    def __init__(self, head: Head):
        self.head = head
        self.start()

    def start(self) -> None:
        self.num_tokens = 0
        self.buffers: list[torch.Tensor] = []

    def commit(self, features_TMD: torch.Tensor) -> None:
        """Turn final tokens' features into context keys and values, once."""
        num_new = len(features_TMD)
        if num_new == 0:
            return
        positions = torch.arange(self.num_tokens, self.num_tokens + num_new, device=features_TMD.device)
        new = self.head.context_kv(features_TMD[None].to(self.head.fc.weight.dtype), positions[None])
        flat = [tensor for kv in new for tensor in kv]
        if not self.buffers or self.num_tokens + num_new > self.buffers[0].shape[2]:
            capacity = max(256, 2 * (self.num_tokens + num_new))
            grown = [t.new_empty(1, t.shape[1], capacity, t.shape[3]) for t in flat]
            for old, buffer in zip(self.buffers, grown, strict=False):
                buffer[:, :, : self.num_tokens] = old[:, :, : self.num_tokens]
            self.buffers = grown
        for buffer, tensor in zip(self.buffers, flat, strict=True):
            buffer[:, :, self.num_tokens : self.num_tokens + num_new] = tensor
        self.num_tokens += num_new

    def block(self, anchor_D: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [G, D] and base logits [G, Vd] of the block after the anchor with this embedding."""
        weight = self.head.fc.weight
        position = torch.tensor([[self.num_tokens]], device=weight.device)
        h_GD = self.head.hidden(anchor_D[None, None].to(weight.dtype), position, self._context(weight))[0, 0]
        return h_GD, self.head.base_logits(h_GD).to(torch.float32, copy=True)  # biases are added in place

    def add_bias(self, logits_V: torch.Tensor, z_r: torch.Tensor) -> int:
        """Add the sequential head's bias W2 z to a row of logits [Vd], in place; where the largest sum is (-1: nowhere)."""
        return add_bias(self.head, logits_V, z_r)

    def _context(self, like: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if not self.buffers:  # a prompt of one token has nothing before its anchor
            config = self.head.config
            empty = like.new_empty(1, config.num_key_value_heads, 0, config.head_dim)
            return [(empty, empty)] * config.num_hidden_layers
        views = [buffer[:, :, : self.num_tokens] for buffer in self.buffers]
        return list(zip(views[::2], views[1::2], strict=True))


class NativeContext:
    def __init__(self, head: Head):
        self.head, config = head, head.config
        dtype = head.fc.weight.dtype
        self.stack = NativeStack(config, list(head.layers), head.norm, head.output_rows.to(dtype), (head.rotary.inverse, 1.0))
        self.fc = self.stack.linear(head.fc.weight)
        self.norm = head.hidden_norm.weight.detach().float()
        # stack.cpp takes sixteen numbers at a time
        w2_rows = None if head.markov_head is None or head.config.markov_rank % 16 else head.markov_head.markov_w2.weight
        self.w2 = None if w2_rows is None else self.stack.linear(w2_rows)
        self.masks = head.mask_embedding.float().expand(config.block_size - 1, config.hidden_size)
        self.start()

    def start(self) -> None:
        self.num_tokens, self.cache = 0, self.stack.new_cache()

    def commit(self, features_TMD: torch.Tensor) -> None:
        self.stack.context(self.cache, self.fc, self.norm, features_TMD.flatten(1).float(), self.num_tokens)
        self.num_tokens += len(features_TMD)

    def block(self, anchor_D: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.cat([anchor_D.float()[None], self.masks])
        done = self.stack.forward(self.cache, rows, self.num_tokens, len(rows), causal=False)
        return done.normed.to(self.head.fc.weight.dtype), done.logits

    def add_bias(self, logits_V: torch.Tensor, z_r: torch.Tensor) -> int:
        return add_bias(self.head, logits_V, z_r) if self.w2 is None else self.stack.bias(self.w2, z_r, logits_V)


def add_bias(head: Head, logits_V: torch.Tensor, z_r: torch.Tensor) -> int:
    markov = head.markov_head
    assert markov is not None  # a head of rank 0 has no z
    logits_V += F.linear(z_r, markov.markov_w2.weight).float()
    where = int(logits_V.argmax())
    return where if math.isfinite(logits_V[where]) else -1
